"""A store with much history: `big_store.py PATH [RUNS [JOBS]]`, a million of 10,000 jobs without.

The runs are those of two years, one job after the other: most succeeded, some failed, were skipped
or cancelled; each hundredth is a pipeline's with three steps. The newest of each job may have logs.
"""
import json
import os
import sys
import time

import roexec

RUN = ("id", "job_id", "version", "step", "parent", "trigger", "slot", "last_slot", "count", "state",
       "reason", "queued_at", "started_at", "finished_at", "exit_code", "boot", "log")
SPAN = 700 * 86400                      # seconds
STATES = [("succeeded", None, 0)] * 90 + [("failed", "exit", 1)] * 5 + [
    ("skipped", "overlap", None)] * 3 + [("timed_out", "timeout", None), ("cancelled", "user", None)]


def fill(store, runs, jobs, now=None, logs=0):
    """Register jobs and add final runs, as if they had been; the newest `logs` runs have logs."""
    now = now or time.time()
    made = [roexec.Job({"id": f"job-{number:05}", "command": "true", "directory": "/",
                        "schedule": f"{number % 60} {number % 24} * * *"})
            for number in range(jobs)]
    with store.write() as db:
        roexec.perform_apply(db, [roexec.Change(id=job.id, change="added", job=job)
                                  for job in made], now)
        marks = ", ".join("?" * len(RUN))
        names = ", ".join(f'"{name}"' for name in RUN)
        db.executemany(f"INSERT INTO runs ({names}) VALUES ({marks})",
                       _rows(store, runs, jobs, now, logs))
        db.execute("INSERT INTO attempts SELECT id, 1, started_at, finished_at, exit_code, NULL, "
                   "0.01, 1000000, 100 FROM runs WHERE state != 'skipped'")
        db.execute("UPDATE jobs SET last_run = (SELECT id FROM runs WHERE job_id = jobs.id AND "
                   "parent IS NULL AND state != 'skipped' ORDER BY seq DESC LIMIT 1)")


def _rows(store, runs, jobs, now, logs):
    for number in range(runs):
        at = int(now - SPAN + SPAN * number / runs)
        state, reason, exit_code = STATES[(number + number // jobs) * 7919 % len(STATES)]
        run_id, job_id = f"r{number:09}", f"job-{number % jobs:05}"
        log = None
        if number >= runs - logs and state != "skipped":
            log = write_log(store, job_id, run_id, at)
        row = (run_id, job_id, 1, None, None, "schedule", at, at if state == "skipped" else None, 1,
               state, reason, at, at, at + number % 50, exit_code, "boot", log)
        yield row
        for step in range(3 if number % 100 == 0 else 0):
            yield (f"s{number:07}{step:02}", job_id, 1, f"step-{step}", run_id, "pipeline", None,
                   None, 1, state, reason, at, at, at + 1, exit_code, "boot", None)


def write_log(store, job_id, run_id, at):
    """Write the log of a run that was -> its path below the folder of the store."""
    log = roexec.LogWriter(store.folder, job_id, at, run_id)
    log.write("Starting run", at)
    log.write("Attempt 1", at)
    log.output("out", b"working\nstill working\n", at)
    log.write("Completed, exit=0", at)
    log.close(at)
    return log.path


if __name__ == "__main__":
    path, runs, jobs = (sys.argv[1:] + ["1000000", "10000"][len(sys.argv) - 2:])[:3]
    began = time.monotonic()
    made = roexec.Store(os.path.abspath(path)).create()
    fill(made, int(runs), int(jobs))
    print(json.dumps({"runs": int(runs), "jobs": int(jobs), "bytes": os.stat(made.database).st_size,
                      "seconds": round(time.monotonic() - began, 1)}))
