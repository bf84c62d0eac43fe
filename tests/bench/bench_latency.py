"""How long after its slot a command starts, beside a bare Python loop that sleeps to an instant."""
import os
import statistics
import time

from run import figure
from serving import query, server, wait_for, workplace

TICKS = 10
DATE = ["/bin/date", "+%s.%N"]          # says when it was started


def bare(folder, ticks):
    """Lateness in milliseconds of commands that a bare loop starts at odd seconds."""
    path = os.path.join(folder, "bare")
    with open(path, "wb") as file:
        actions = [(os.POSIX_SPAWN_DUP2, file.fileno(), 1)]
        for _ in range(ticks):
            instant = (int(time.time()) // 2 + 1) * 2 + 1
            time.sleep(instant - time.time())
            os.waitpid(os.posix_spawn(DATE[0], DATE, {}, file_actions=actions), 0)
    with open(path) as file:
        return [(float(line) % 2 - 1) * 1000 for line in file]


def ours(store):
    """Lateness in milliseconds of the runs of the job `tick`."""
    found = []
    for slot, log in query(store, "SELECT slot, log FROM runs WHERE job_id = 'tick' AND "
                                  "state = 'succeeded'"):
        with open(store.file(log)) as file:
            found += [(float(line.split()[-1]) - slot) * 1000 for line in file if "[OUT]" in line]
    return found


def measure(count):
    """The median lateness, in milliseconds, beyond that of the loop, with `count` idle jobs."""
    idle = [{"id": f"idle-{number}", "schedule": f"{number % 60} {number // 60 % 24} 29 2 *",
             "command": "true", "directory": "/"} for number in range(count)]
    tick = {"id": "tick", "schedule": "@every 2s", "command": DATE, "directory": "/"}
    with workplace() as (folder, command), server(
            folder, command, [*idle, tick], "--no-http") as (process, store):
        reference = bare(folder, TICKS)
        wait_for(lambda: len(ours(store)) >= TICKS, process)
        return statistics.median(ours(store)) - statistics.median(reference)


def main():
    for count in (0, 10_000):
        print(figure(f"start after that of a bare loop, ms, {count} idle jobs", measure(count),
                     "<=", 2))


if __name__ == "__main__":
    main()
