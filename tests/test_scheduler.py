"""The loop and its processes: slots, places, recovery, runs without a server, what kills do."""
import contextlib
import fcntl
import itertools
import os
import pty
import random
import select
import shutil
import signal
import socket
import sys
import time

import pytest
from helpers import (apply, await_state, claimed, descendants, end_of, hourly_schedule, in_child,
                     is_alive, make_job, read_attempts, read_log_of, read_pid, read_run, read_runs,
                     wait_for)

import roexec
from roexec import RoexecError, own_identity

pytestmark = pytest.mark.usefixtures("clean")      # of processes

HOUR = 3600


def ask(store, job, **more):
    """Ask for a run, as `run --detach` does where a server is."""
    return roexec.request_run(store, job, **{"trigger": "manual", **more})


def sleeper(tmp_path, job_id="x", **more):
    """A job that says its process id and then lasts."""
    return make_job(f"echo $$ > {tmp_path}/{job_id}.pid; exec sleep 600", job_id, **more)


def states(store):
    return [(row["job_id"], row["state"], row["reason"]) for row in read_runs(store)]


def past_slots(store, job, hours, last):
    """Register an hourly job such that its slots up to the last are undecided -> these slots."""
    slots = [last - HOUR * number for number in reversed(range(hours))]
    apply(store, job, since=slots[0] - 1)
    return slots


# Kills and restarts.

def test_ten_runs_outlive_the_server_that_is_killed_and_nothing_is_lost(store, start, marks,
                                                                         tmp_path):
    go, (schedule, slot) = tmp_path / "go", hourly_schedule()
    jobs = [make_job(f"echo begun {number}; echo {number} >> {marks.path}; "
                     f"while ! test -e {go}; do sleep 0.02; done; "
                     f"echo middle; seq 2000; echo end >&2; exit {number}", f"j{number}",
                     schedule=schedule) for number in range(10)]
    apply(store, *jobs, since=slot - 1)
    server = start()
    wait_for(lambda: len(marks()) == 10)
    server.kill()
    assert {row["state"] for row in read_runs(store)} == {"running"}
    server = start()
    go.touch()
    wait_for(lambda: all(row["state"] in roexec.FINAL_STATES for row in read_runs(store)))
    for row in read_runs(store):
        number = int(row["job_id"][1:])
        assert (row["state"], row["exit_code"]) == ("failed" if number else "succeeded", number)
        log = read_log_of(store, row["id"], raw=True)
        assert log.startswith(f"begun {number}\nmiddle\n1\n") and "2000\n" in log
        assert "end\n" in log and len(log.splitlines()) == 2003
    assert sorted(row["slot"] for row in read_runs(store)) == [slot] * 10
    assert len(marks()) == 10
    server.stop()


def test_a_server_killed_while_it_claims_a_herd_loses_no_slot_and_runs_none_twice(
        store, start, marks):
    schedule, slot = hourly_schedule()
    jobs = [make_job(f"echo $ROEXEC_JOB_ID >> {marks.path}", f"j{number}", schedule=schedule)
            for number in range(60)]
    apply(store, *jobs, since=slot - 1)
    chance = random.Random(5)
    for _ in range(24 if os.environ.get("ROEXEC_LONG") else 6):
        pid = start(wait=False).pid
        time.sleep(chance.random() * 0.1)           # the random moment is what is tested
        os.kill(pid, signal.SIGKILL)
        end_of(pid)
    server = start()
    wait_for(lambda: len(read_runs(store)) == 60 and {row["state"] for row in read_runs(store)}
             <= set(roexec.FINAL_STATES), what=lambda: states(store))
    rows = read_runs(store)
    assert len({row["job_id"] for row in rows}) == 60
    assert {row["state"] for row in rows} == {"succeeded"}
    assert sorted(marks()) == sorted(job.id for job in jobs)
    server.stop()
    assert not [name for name in os.listdir(store.file("active")) if not name.endswith(".new")]


@pytest.mark.parametrize("step", ["create", "change_run", "commit", "hand_over"])
def test_a_claim_that_is_cut_short_is_made_again(store, start, marks, step):
    schedule, slot = hourly_schedule()
    apply(store, make_job(f"echo ran >> {marks.path}", schedule=schedule), since=slot - 1)

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def prepare(scheduler):
        if step == "create":
            os.rename = die
        elif step == "change_run":
            roexec.change_run = die
        elif step == "hand_over":
            roexec.Supervisors.hand_over = lambda self: self.waiting and die()
        else:
            claim = roexec.claim
            roexec.claim = lambda *values: claim(*values) and die()
    assert end_of(start(prepare=prepare, wait=False).pid) == -signal.SIGKILL
    assert len(os.listdir(store.file("active"))) == 1
    server = start()
    wait_for(lambda: [state for _, state, _ in states(store)] == ["succeeded"],
             what=lambda: server.said + str(states(store)))
    assert marks() == ["ran"]
    server.stop()


def test_a_server_that_waits_for_a_command_that_was_stopped_says_so(store):
    said = []
    with open(store.file("server.lock"), "w") as held:      # as `settle` holds it
        fcntl.flock(held, fcntl.LOCK_SH)
        store.say = lambda text: (said.append(text), fcntl.flock(held, fcntl.LOCK_UN))
        os.close(roexec.hold_server_lock(store))
    assert [text.partition(";")[0] for text in said] == [
        "waiting for a command that takes in what has ended meanwhile"]


def test_a_new_server_takes_the_store_while_runs_go_on_and_ctrl_c_ends_none(
        store, start, tmp_path):
    job = sleeper(tmp_path)
    apply(store, job)
    server = start()
    with pytest.raises(RoexecError, match=f"process {server.pid}"):
        roexec.hold_server_lock(store)
    run_id = ask(store, job)
    pid = read_pid(tmp_path / "x.pid")
    os.kill(server.pid, signal.SIGINT)
    assert end_of(server.pid) == 0
    server = start()
    assert is_alive(pid) and read_run(store, run_id)["state"] == "running"
    with pytest.raises(roexec.Refused) as refused:
        ask(store, job)
    assert refused.value.run["id"] == run_id
    roexec.cancel_run(store, run_id)
    assert await_state(store, run_id, "cancelled")["reason"] == "user"
    assert not is_alive(pid)
    server.stop()


def test_a_server_that_is_asked_to_end_leaves_at_once(store, start, tmp_path):
    job = sleeper(tmp_path)
    apply(store, job)
    server = start()
    ask(store, job)
    pid = read_pid(tmp_path / "x.pid")
    server.stop()                       # which waits for less than the run lasts
    assert is_alive(pid)


def test_a_server_with_a_drain_waits_for_runs_that_end_in_time(store, start, tmp_path):
    job = make_job(f"echo $$ > {tmp_path}/pid; while ! test -e {tmp_path}/go; "
                   "do sleep 0.01; done; exit 3")
    apply(store, job)

    def prepare(scheduler):
        wait = scheduler._await_runs
        scheduler.drain = 600
        scheduler._await_runs = lambda *values: (tmp_path / "drains").touch() or wait(*values)
    server = start(prepare=prepare)
    run_id = ask(store, job)
    read_pid(tmp_path / "pid")
    os.kill(server.pid, signal.SIGTERM)
    wait_for((tmp_path / "drains").exists)
    other = make_job(job_id="other")
    apply(store, other)
    late = ask(store, other)
    (tmp_path / "go").touch()
    assert end_of(server.pid) == 0
    assert read_run(store, run_id)["exit_code"] == 3        # which the server has taken in
    assert read_run(store, late)["state"] == "queued"


def test_a_server_with_which_the_host_ends_ends_all_runs_in_time(store, start, tmp_path):
    job = make_job(f"trap '' TERM; echo $$ > {tmp_path}/pid; sleep 600 & sleep 600", grace="1h")
    apply(store, job)

    def prepare(scheduler):
        roexec.ends_with_us, roexec._LAST_GRACE = lambda: True, 0.2
        wait = scheduler._await_runs    # for as long as it takes here
        scheduler._await_runs = lambda seconds, others=(): wait(60 if others else 0, others)
    server = start(prepare=prepare)
    run_id = ask(store, job)
    read_pid(tmp_path / "pid")
    server.stop()
    run = read_run(store, run_id)
    assert (run["state"], run["reason"]) == ("cancelled", "shutdown")
    wait_for(lambda: not descendants())


def test_where_the_launcher_was_killed_the_server_executes_itself_again(store, tmp_path):
    script = tmp_path / "server.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {os.path.dirname(roexec.__file__)!r})
import roexec
launcher = roexec.start_launcher()
store = roexec.Store({store.path!r})
lock = roexec.hold_server_lock(store)
store.create().keep_open()
def say(text, level="INFO", at=None):
    with open({str(tmp_path / "said")!r}, "a") as file:
        file.write(text + "\\n")
say(f"started {{len(os.listdir('/proc/self/fd'))}}")
scheduler = roexec.Scheduler(store, launcher, say)
scheduler.run()
store.close()
""")
    said = tmp_path / "said"
    job = sleeper(tmp_path)
    apply(store, job)
    server = in_child(lambda: os.execv(sys.executable, [sys.executable, "-B", str(script)]))

    def launchers():
        return [pid for pid, process in roexec.processes().items()
                if process.parent == server and process.alive]
    wait_for(lambda: said.exists())
    run_id = ask(store, job)
    pid = read_pid(tmp_path / "x.pid")
    launcher, = launchers()
    os.kill(launcher, signal.SIGKILL)
    wait_for(lambda: said.read_text().count("\nstarted ") == 1)
    assert launcher not in wait_for(launchers)
    assert is_alive(pid) and not is_alive(launcher)
    files = [int(line.split()[1]) for line in said.read_text().splitlines()
             if line.startswith("started")]
    assert files[1] <= files[0]
    other = make_job("exit 3", "other")
    apply(store, other)
    assert await_state(store, ask(store, other), "failed")["exit_code"] == 3
    os.kill(pid, signal.SIGTERM)
    assert await_state(store, run_id, "failed")["signal"] == "SIGTERM"
    os.kill(server, signal.SIGTERM)
    assert end_of(server) == 0


def test_a_server_that_is_to_end_does_not_start_again_where_its_launcher_was_killed(
        store, start):
    server = start()
    launcher = wait_for(lambda: [pid for pid, process in roexec.processes().items()
                                 if process.parent == server.pid and process.alive])[0]
    os.kill(server.pid, signal.SIGSTOP)
    os.kill(launcher, signal.SIGKILL)
    wait_for(lambda: not is_alive(launcher))
    os.kill(server.pid, signal.SIGTERM)
    os.kill(server.pid, signal.SIGCONT)
    assert end_of(server.pid) == 0
    assert "starting again" not in server.said


def test_a_killed_supervisor_of_a_server_makes_a_lost_run_and_leaves_no_process(
        store, start, tmp_path, marks):
    job = make_job(f"setsid sleep 600 & echo $PPID > {tmp_path}/pid; sleep 600", grace=0.2,
                   hooks={"on_failure": f"echo $ROEXEC_STATUS $ROEXEC_REASON >> {marks.path}"})
    apply(store, job)
    server = start()
    run_id = ask(store, job)
    supervisor = read_pid(tmp_path / "pid")
    os.kill(supervisor, signal.SIGKILL)
    run = await_state(store, run_id, "lost")
    assert (run["reason"], marks()) == ("supervisor", ["lost supervisor"])
    assert "has lost its supervisor" in server.said
    wait_for(lambda: not [pid for pid in descendants(server.pid) if "sleep" in command_of(pid)])
    server.stop()


def command_of(pid):
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return file.read()
    except OSError:
        return ""


def test_what_goes_wrong_in_a_supervisor_is_reported_and_the_run_ends(store, start, marks):
    apply(store, make_job(), make_job("exit 3", "y"))
    os.makedirs(store.file("logs"), exist_ok=True)
    with open(store.file("logs/x"), "w"):           # where the job's folder has to be
        pass
    server = start()
    run = await_state(store, ask(store, make_job()), "lost")
    assert run["reason"] == "supervisor" and "its supervisor failed" in run["message"]
    wait_for(lambda: "Traceback" in server.said)
    assert server.said.count("Traceback") == 1
    assert await_state(store, ask(store, make_job("exit 3", "y")), "failed")["exit_code"] == 3
    server.stop()


def test_no_descriptor_and_no_process_is_left_after_many_runs(store, start):
    def hurry(scheduler):
        roexec._IDLE = 0.1
    server = start(settings={"scheduler": {"max_concurrent": 8}}, prepare=hurry)
    jobs = [make_job(job_id=f"j{number}") for number in range(8)]
    apply(store, *jobs)

    def perform(times):
        for _ in range(times):
            for run_id in [ask(store, job) for job in jobs]:
                await_state(store, run_id, "succeeded")

    def files(pid):
        return len(os.listdir(f"/proc/{pid}/fd"))

    def of_children():
        """The numbers for the processes of the server; none where one is just ending."""
        with contextlib.suppress(OSError):
            return sorted(map(files, descendants(server.pid)))
        return []

    def at_rest():
        """Three are left: the launcher, and one idle supervisor with its keeper."""
        few, *others = of_children() or [0]
        return few == 3 and len(others) == 2 and others[1] - others[0] <= 4
    perform(2)
    wait_for(at_rest, what=of_children)
    before = files(server.pid)
    perform(23)
    assert len(read_runs(store)) == 200
    wait_for(lambda: files(server.pid) <= before, what=lambda: (files(server.pid), before))
    wait_for(at_rest, what=of_children)
    assert os.listdir(store.file("active")) == []
    server.stop()
    wait_for(lambda: not descendants())


def test_more_runs_than_files_may_be_open_all_run(store, start):
    import resource
    schedule, slot = hourly_schedule()
    jobs = [make_job(job_id=f"j{number}", schedule=schedule) for number in range(300)]
    apply(store, *jobs, since=slot - 1)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def limit(scheduler):
        roexec._MOST_WAITING = 40
        resource.setrlimit(resource.RLIMIT_NOFILE, (120, 120))
    server = start(prepare=limit)
    wait_for(lambda: len(read_runs(store, state="succeeded")) == 300, what=lambda: server.said)
    assert "ERROR" not in server.said
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before
    server.stop()


def test_where_no_file_can_be_opened_what_comes_back_waits_for_the_next_look(store, monkeypatch):
    supervisors = roexec.Supervisors(store.folder, None, select.poll(), print)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    supervisors.all[ours.fileno()] = supervisor = roexec._Supervisor(ours)
    supervisor.is_new, supervisor.run = False, claimed(store, make_job()).name
    theirs.send(f"done {supervisor.run}".encode())

    def too_many(*_):
        raise OSError(24, "Too many open files")
    monkeypatch.setattr(roexec.Journal, "find", too_many)
    assert supervisors.hear(ours.fileno()) == []
    assert supervisor.run is None and supervisor in supervisors.idle
    supervisors.close()
    theirs.close()


def test_a_supervisor_that_is_killed_before_it_reads_disturbs_no_server(store):
    said = []
    supervisors = roexec.Supervisors(store.folder, None, select.poll(), said.append)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    descriptor = ours.fileno()
    supervisors.all[descriptor] = roexec._Supervisor(ours)
    supervisors.poller.register(ours)
    supervisors.forking = 1
    ours.send(b"abcdefghij")
    theirs.close()                                  # which gives ECONNRESET, not an end of file
    assert supervisors.hear(descriptor) == [] and not supervisors.all and not said


# Slots.

def test_a_slot_starts_on_time_and_only_once(store, start):
    apply(store, make_job(schedule="@every 1s", max_concurrent=0))
    server = start()

    def delays():
        return [read_attempts(store, row["id"])[0]["started_at"] - row["slot"]
                for row in read_runs(store, state="succeeded")]
    wait_for(lambda: len([delay for delay in delays() if delay < 0.5]) >= 2, what=delays)
    assert min(delays()) >= 0
    rows = read_runs(store)
    assert {(row["trigger"], row["reason"]) for row in rows} == {("schedule", None)}
    slots = [row["slot"] for row in rows]
    assert slots == list(range(slots[0], slots[0] + len(slots)))
    server.stop()


def test_slots_are_skipped_while_a_run_is_on(store, start, tmp_path):
    apply(store, sleeper(tmp_path, schedule="@every 1s"), since=time.time() - 4)
    server = start()
    row = wait_for(lambda: next(iter(read_runs(store, reason="overlap")), None))
    first = read_runs(store)[0]
    assert len(read_runs(store)) == 2 and first["state"] == "running"
    assert row["slot"] == first["slot"] + 1 and row["count"] >= 3
    assert row["last_slot"] == row["slot"] + row["count"] - 1
    assert first["id"] in row["message"]
    server.stop()


def test_one_slot_is_queued_and_further_ones_are_skipped(store, start, tmp_path):
    go = tmp_path / "go"
    command = f"while ! test -e {go}; do sleep 0.02; done"
    apply(store, make_job(command))
    server = start()
    await_state(store, ask(store, make_job(command)), "running")
    apply(store, make_job(command, schedule="@every 1s", overlap="queue"), since=time.time() - 4)
    wait_for(lambda: len(read_runs(store)) == 3)
    assert [row["state"] for row in read_runs(store)] == ["running", "queued", "skipped"]
    apply(store, make_job(command, overlap="queue"))
    go.touch()
    wait_for(lambda: len(read_runs(store, state="succeeded")) == 2)
    first, second = read_runs(store, state="succeeded")
    assert second["started_at"] >= first["finished_at"]
    server.stop()


def test_a_new_slot_replaces_the_run_that_is_on_once_that_is_dead(store, start, marks):
    command = (f"trap 'sleep 0.1; echo end >> {marks.path}; exit' TERM; "
               f"echo start >> {marks.path}; while :; do sleep 0.02; done")
    job = make_job(command, grace=60)
    apply(store, job, since=time.time() - 60)
    server = start()
    first = ask(store, job)
    wait_for(lambda: marks() == ["start"])
    slot = int(time.time())             # it is due now, and not again for a day
    schedule = time.strftime("%S %M %H * * *", time.localtime(slot))
    apply(store, make_job(command, schedule=schedule, overlap="replace", grace=60), since=slot - 1)
    wait_for(lambda: len(marks()) == 3, what=marks)
    assert marks() == ["start", "end", "start"]
    before, after = read_runs(store)
    assert (before["id"], before["state"], before["reason"]) == (first, "cancelled", "replaced")
    assert after["slot"] == slot and after["started_at"] >= before["finished_at"]
    server.stop()


def test_places_of_a_job_and_of_all_are_kept_and_given_by_priority(store, start, tmp_path, marks):
    go = tmp_path / "go"
    first = make_job(f"while ! test -e {go}; do sleep 0.01; done", "first")
    others = [make_job(f"echo $ROEXEC_JOB_ID >> {marks.path}", name, priority=priority)
              for name, priority in (("low", -1), ("middle", 0), ("other", 0), ("high", 9))]
    apply(store, first, *others)
    server = start(settings={"scheduler": {"max_concurrent": 1}})
    run_id = ask(store, first)
    await_state(store, run_id, "running")
    ids = [ask(store, job) for job in others]
    wait_for(lambda: not read_runs(store, state="running") or len(read_runs(store)) == 5)
    assert {read_run(store, other)["state"] for other in ids} == {"queued"}
    go.touch()
    for other in ids:
        await_state(store, other, "succeeded")
    assert marks() == ["high", "middle", "other", "low"]
    server.stop()


def test_a_job_has_as_many_runs_as_it_may(store, start, tmp_path):
    job = make_job("exec sleep 600", max_concurrent=2)
    apply(store, job)
    server = start()
    ids = [ask(store, job) for _ in range(2)]
    for run_id in ids:
        await_state(store, run_id, "running")
    with pytest.raises(roexec.Refused):
        ask(store, job)
    third = ask(store, job, wait=True)
    assert read_run(store, third)["state"] == "queued"
    roexec.cancel_run(store, ids[0])
    await_state(store, third, "running")
    server.stop()


def test_slots_of_a_paused_job_are_skipped_and_its_queued_run_waits(store, start, tmp_path):
    blocker, other = sleeper(tmp_path, "blocker", priority=9), make_job(job_id="other")
    apply(store, make_job(schedule="@every 1s", overlap="queue"), since=time.time() - 2)
    apply(store, blocker, other)
    blocking = ask(store, blocker)
    server = start(settings={"scheduler": {"max_concurrent": 1}})
    queued = wait_for(lambda: read_runs(store, job_id="x", state="queued"))[0]["id"]
    with store.write() as db:
        roexec.pause_job(db, "x", True)
    store.wake()
    row = wait_for(lambda: next(iter(read_runs(store, reason="paused")), None))
    assert row["slot"] > read_run(store, queued)["slot"]
    roexec.cancel_run(store, blocking)
    await_state(store, ask(store, other), "succeeded")
    assert read_run(store, queued)["state"] == "queued"
    with store.write() as db:
        roexec.pause_job(db, "x", False)
    store.wake()
    await_state(store, queued, "succeeded")
    server.stop()


def test_a_pause_ends_by_itself_also_while_no_server_runs(store, start):
    apply(store, make_job(schedule="@every 1s", max_concurrent=0), since=time.time() - 10)
    until = int(time.time()) - 5
    with store.write() as db:
        roexec.pause_job(db, "x", True, until)
    server = start()
    wait_for(lambda: read_runs(store, state="succeeded"))
    rows = read_runs(store)
    assert (rows[0]["reason"], rows[0]["last_slot"]) == ("paused", until - 1)
    assert min(row["slot"] for row in rows[1:]) == until
    with store.write() as db:           # in which nobody else decides a slot
        soon = int(time.time()) + 2
        roexec.pause_job(db, "x", True, soon)
    store.wake()
    wait_for(lambda: [row for row in read_runs(store, reason="paused")[1:]
                      if row["last_slot"] == soon - 1])
    wait_for(lambda: read_runs(store, slot=soon, state="succeeded"))
    server.stop()


def test_slots_outside_the_window_are_skipped(store, start):
    apply(store, make_job(schedule="@every 1s", window={"end": "2020-01-01"}),
          since=time.time() - 4)
    server = start()
    row = wait_for(lambda: read_runs(store))[0]
    assert (row["state"], row["reason"]) == ("skipped", "window") and row["count"] >= 4
    server.stop()


@pytest.mark.parametrize("catch_up, ran, missed", [("latest", 1, 3), ("all", 4, 0),
                                                   ("none", 0, 4)])
def test_slots_of_an_outage_are_caught_up_as_the_job_says(store, start, marks, tmp_path, catch_up,
                                                          ran, missed):
    schedule, last = hourly_schedule()
    job = make_job(f"echo $ROEXEC_SLOT $ROEXEC_TRIGGER >> {marks.path}", schedule=schedule,
                   catch_up=catch_up, catch_up_window="9h",
                   hooks={"on_missed": f"echo $ROEXEC_STATUS $ROEXEC_REASON >> {tmp_path}/missed"})
    slots = past_slots(store, job, 4, last)
    server = start()
    wait_for(lambda: sum(row["count"] for row in read_runs(store)) == 4
             and all(row["state"] in roexec.FINAL_STATES for row in read_runs(store)))
    caught = read_runs(store, state="succeeded")
    assert [row["slot"] for row in caught] == (slots[-ran:] if ran else [])
    assert {row["trigger"] for row in caught} <= {"catch_up"}
    assert marks() == [f"{roexec.format_instant(slot)} catch_up" for slot in slots[4 - ran:]]
    rows = read_runs(store, state="skipped", reason="missed")
    assert [(row["slot"], row["last_slot"], row["count"]) for row in rows] == (
        [(slots[0], slots[missed - 1], missed)] if missed else [])
    if missed:
        wait_for(lambda: (tmp_path / "missed").exists() and read_run(store, rows[0]["id"])["log"])
        assert (tmp_path / "missed").read_text() == "skipped missed\n"
    server.stop()
    start().stop()
    assert len(marks()) == ran


def test_a_hook_for_missed_slots_that_a_kill_has_held_up_runs_once(store, start, marks):
    schedule, last = hourly_schedule()
    past_slots(store, make_job(schedule=schedule, catch_up="none", hooks={
        "on_missed": f"echo missed >> {marks.path}"}), 5, last)

    def die(self):
        if self.waiting:
            os.kill(os.getpid(), signal.SIGKILL)

    def prepare(scheduler):
        roexec.Supervisors.hand_over = die
    assert end_of(start(prepare=prepare, wait=False).pid) == -signal.SIGKILL
    for _ in range(2):
        server = start()
        run = wait_for(lambda: read_runs(store, reason="missed"))[0]
        wait_for(lambda: read_run(store, run["id"])["log"])
        server.stop()
    assert marks() == ["missed"] and len(read_runs(store, reason="missed")) == 1


def test_reboot_jobs_start_once_in_a_boot_if_they_may(store, start, marks):
    def job(name, **more):
        return make_job(f"echo {name} >> {marks.path}", name, schedule="@reboot", **more)
    apply(store, job("plain"), job("both", max_concurrent=0), job("disabled", enabled=False),
          job("paused"), job("outside", window={"end": "2020-01-01"}))
    with store.write() as db:
        roexec.pause_job(db, "paused", True)
    for _ in range(2):
        server = start()
        wait_for(lambda: len(read_runs(store, state="succeeded")) == 2)
        server.stop()
    apply(store, job("later"))
    server = start()
    done = make_job(job_id="done")
    apply(store, done)
    await_state(store, ask(store, done), "succeeded")
    assert sorted(marks()) == ["both", "plain"]
    server.stop()


def test_a_change_is_seen_at_once(store, start):
    def only_when_told(scheduler):
        roexec._LOOK = 600
    server = start(prepare=only_when_told)
    job = make_job("exit 3", "new")
    apply(store, job)
    assert await_state(store, ask(store, job), "failed")["exit_code"] == 3
    apply(store, make_job("exit 4", "new"))
    assert await_state(store, ask(store, job), "failed")["exit_code"] == 4
    server.stop()


def test_a_job_that_changes_in_the_instant_of_its_slot_is_decided_as_it_is_then(store):
    now = time.time()
    timetable = roexec._Timetable(store, print)
    apply(store, *(make_job(job_id=name, schedule="@every 1s")
                   for name in ("later", "disabled", "deleted", "same")), since=now - 2)
    with store.write() as db:
        timetable.refresh(db)
    due = timetable.pop_due(now)
    assert sorted(due) == ["deleted", "disabled", "later", "same"]
    apply(store, make_job(job_id="later", schedule="@yearly"),
          make_job(job_id="disabled", schedule="@every 1s", enabled=False))
    with store.write() as db:
        roexec.delete_jobs(db, ["deleted"], now)
    with store.write() as db:
        timetable.refresh(db)
        for job_id in due:
            what = timetable.decide(db, job_id, now)
            if what is not None:
                timetable.write_down(db, (job_id, *what), now, [], [])
    assert {row["job_id"] for row in read_runs(store)} == {"same"}
    for job_id in ("same", "same"):
        timetable.plan(job_id)
    assert timetable.pop_due(now + 10) == ["same"]


# Trouble.

def test_a_disk_error_loses_no_slot(store, start, marks):
    apply(store, make_job(f"echo $ROEXEC_SLOT >> {marks.path}", schedule="@every 1s",
                          max_concurrent=0), since=time.time() - 4)
    trouble = [RoexecError("the disk is full"), OSError(28, "No space left on device")]

    def prepare(scheduler):
        write, sleep = roexec.Store.write, time.sleep

        def failing(self):
            if scheduler.last_second > 0 and trouble:
                raise trouble.pop()
            return write(self)
        roexec.Store.write = failing
        time.sleep = lambda seconds: sleep(min(seconds, 0.05))
        scheduler.each_second.append(lambda: trouble or setattr(roexec.Store, "write", write))
    server = start(prepare=prepare, wait=False)
    wait_for(lambda: len(read_runs(store, state="succeeded")) >= 4)
    slots = [row["slot"] for row in read_runs(store)]
    assert slots == list(range(slots[0], slots[0] + len(slots)))
    assert "the disk is full" in server.said and "No space left" in server.said
    server.stop()


def test_a_function_of_the_server_that_fails_stops_no_slot(store, start):
    apply(store, make_job(schedule="@every 1s", max_concurrent=0), since=time.time() - 4)

    def fail():
        raise RoexecError("jobs.yml:1:1: it is broken")
    server = start(prepare=lambda scheduler: scheduler.each_second.insert(0, fail))
    wait_for(lambda: len(read_runs(store, state="succeeded")) >= 3)
    assert "it is broken" in server.said
    server.stop()


def set_back_at_a_signal(seconds):
    """For `prepare`: SIGUSR1 sets the clock of a server back."""
    real = time.time

    def set_back(*_):
        time.time = lambda: real() - seconds
    return lambda scheduler: signal.signal(signal.SIGUSR1, set_back)


def test_after_a_correction_of_the_clock_slots_count_from_then(store, start):
    apply(store, make_job(schedule="@every 1s", max_concurrent=0), since=time.time() - 3)
    server = start(prepare=set_back_at_a_signal(4 * HOUR))
    wait_for(lambda: len(read_runs(store, state="succeeded")) >= 2)
    os.kill(server.pid, signal.SIGUSR1)
    wait_for(lambda: "The clock was set back by 4h" in server.said)
    wait_for(lambda: read_runs(store)[-1]["slot"] < time.time() - 3 * HOUR)
    slots = [row["slot"] for row in read_runs(store)]
    assert len(slots) == len(set(slots))
    server.stop()


@pytest.mark.parametrize("where", ["_see_clock", "_turn"])
def test_a_server_that_is_held_up_does_not_say_that_the_clock_was_set_back(store, start, where):
    turns = []

    def hold_up(scheduler):
        go_on = getattr(scheduler, where)

        def late(*values):
            turns.append(1)
            if len(turns) == 3:
                time.sleep(1.2)
            elif len(turns) == 6:
                scheduler.say("six turns")
            return go_on(*values)
        setattr(scheduler, where, late)
    server = start(prepare=hold_up)
    wait_for(lambda: store.wake() or "six turns" in server.said)
    server.stop()
    assert "set back" not in server.said


def test_a_small_step_back_waits_for_the_position(store, start):
    apply(store, make_job(schedule="@every 1s", max_concurrent=0), since=time.time() - 3)
    server = start(prepare=set_back_at_a_signal(600))
    wait_for(lambda: len(read_runs(store, state="succeeded")) >= 2)
    os.kill(server.pid, signal.SIGUSR1)
    wait_for(lambda: "The clock was set back by 10m" in server.said)
    count, second = len(read_runs(store)), int(time.time()) + 2
    other = make_job("exit 3", "other")
    apply(store, other)
    assert await_state(store, ask(store, other), "failed")["exit_code"] == 3
    wait_for(lambda: time.time() > second)
    assert len(read_runs(store, job_id="x")) == count
    server.stop()


def test_a_journal_of_another_store_is_left_alone_and_reported_once(store, start, tmp_path):
    other = roexec.Store(str(tmp_path / "other")).create()
    with other.write() as db:
        roexec.add_run(db, id="abcdefghij", job_id="x", trigger="manual", state="queued",
                       queued_at=time.time())
        journal, = roexec.claim(db, other.file("active"), lambda row: make_job(), None,
                                lambda row: True)
    journal.close()
    shutil.copy(journal.path, store.file("active/abcdefghij"))
    server = start()
    job = make_job()
    apply(store, job)
    for _ in range(3):
        await_state(store, ask(store, job), "succeeded")
    assert server.said.count("belongs to another store") == 1
    server.stop()
    assert os.path.exists(store.file("active/abcdefghij"))


@pytest.mark.parametrize("content", [b"", bytes(9000), b'{"run": "x', None])
def test_a_running_row_whose_journal_is_gone_or_unreadable_is_lost(store, start, content):
    with store.write() as db:
        roexec.add_run(db, id="abcdefghij", job_id="x", trigger="manual", state="running",
                       queued_at=time.time(), started_at=time.time(), boot="another boot")
    if content is not None:
        with open(store.file("active/abcdefghij"), "wb") as file:
            file.write(content)
    server = start()
    run = await_state(store, "abcdefghij", "lost")
    assert run["reason"] == "power" and "journal" in run["message"]
    server.stop()
    assert "Traceback" not in server.said and not os.path.exists(store.file("active/abcdefghij"))


@pytest.mark.parametrize("content", [b"", bytes(9000), b'{"run": "x', None])
@pytest.mark.parametrize("if_lost, cancelled, expected", [
    ("rerun", False, ("succeeded", None)), ("fail", False, ("lost", "power")),
    ("rerun", True, ("cancelled", "user"))])
def test_a_run_whose_journal_a_power_cut_has_taken_goes_on_as_its_row_tells(
        if_lost, cancelled, expected, content, store, start, marks):
    job = make_job(f"echo $ROEXEC_ATTEMPT $GIVEN $ROEXEC_SLOT >> {marks.path}", if_lost=if_lost,
                   backoff=0.01, hooks={"on_failure": f"echo lost >> {marks.path}"})
    apply(store, job)
    with store.write() as db:
        roexec.add_run(db, id="abcdefghij", job_id="x", trigger="schedule", state="running",
                       slot=1754013600, env='{"GIVEN": "yes"}', queued_at=time.time(),
                       started_at=time.time() - 7200, boot="another boot")
        if cancelled:
            roexec.ask_to_cancel(db, "abcdefghij", "user")
    if content is not None:
        with open(store.file("active/abcdefghij"), "wb") as file:
            file.write(content)
    server = start()
    run = await_state(store, "abcdefghij", *roexec.FINAL_STATES)
    server.stop()
    assert (run["state"], run["reason"]) == expected
    assert marks() == {"succeeded": ["2 yes 2025-08-01T02:00:00Z"], "lost": ["lost"],
                       "cancelled": []}[run["state"]]
    assert "Traceback" not in server.said and os.listdir(store.file("active")) == []


def test_a_journal_that_somebody_has_removed_is_not_made_again(store, start, marks):
    job = make_job(f"echo ran >> {marks.path}; sleep 600", if_lost="rerun", backoff=0.01)
    apply(store, job)

    def hurry(scheduler):
        roexec._LOOK = 0.1
    server = start(prepare=hurry)
    run_id = ask(store, job)
    wait_for(marks)
    os.unlink(store.file(f"active/{run_id}"))
    run = await_state(store, run_id, "lost")
    assert run["reason"] == "supervisor" and marks() == ["ran"]
    server.stop()


def test_files_of_journals_that_come_and_go_disturb_nobody(store, monkeypatch):
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: [*listdir(path), "gone.new", "gone"])
    assert roexec.found_journals(store) == []


def test_who_takes_runs_in_is_not_taken_for_a_server(store, monkeypatch):
    find, seen = roexec.found_journals, []
    monkeypatch.setattr(roexec, "found_journals",
                        lambda *values: seen.append(store.server()) or find(*values))
    roexec.settle(store)
    assert seen == [None]


def test_a_server_waits_for_a_command_that_takes_runs_in_and_not_for_a_server(store, monkeypatch):
    kinds = {name: getattr(fcntl, name) for name in ("LOCK_SH", "LOCK_EX")}
    for kind in kinds:
        other = roexec.open_private(store.file("server.lock"))
        assert roexec.try_lock(other, kinds[kind])
        naps, clock = [], itertools.count(step=0.3)
        with monkeypatch.context() as patch:
            patch.setattr(time, "monotonic", lambda: next(clock))
            patch.setattr(time, "sleep", lambda _: naps.append(1) or len(naps) == 20
                          and os.close(other))
            if kind == "LOCK_SH":
                os.close(roexec.hold_server_lock(store))
                assert len(naps) == 20
            else:
                with pytest.raises(RoexecError, match="works on the store"):
                    roexec.hold_server_lock(store)
                assert len(naps) < 20
                os.close(other)


# Without a server.

def run_in_child(store, job, **options):
    """`run_here` in a process of its own, whose output is read -> (pid, descriptor)."""
    reader, writer = os.pipe()

    def run():
        os.close(reader)
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        return roexec.run_here(roexec.Store(store.path), job, **options)
    pid = in_child(run)
    os.close(writer)
    return pid, reader


def read_rest(descriptor):
    with open(descriptor, "rb") as file:
        return file.read().decode()


def test_a_foreground_run_shows_its_output_and_gives_the_exit_status(store):
    apply(store, make_job("echo out; echo err >&2; exit 3"))
    pid, output = run_in_child(store, make_job("echo out; echo err >&2; exit 3"))
    assert sorted(read_rest(output).splitlines()) == ["err", "out"]
    assert end_of(pid) == 3
    run, = read_runs(store)
    assert (run["state"], run["exit_code"], run["trigger"]) == ("failed", 3, "manual")
    assert os.listdir(store.file("active")) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_has_ended_waits_for_its_reader_until_a_signal(store, monkeypatch, number):
    flush, register = roexec.Console.flush, roexec.Console.register

    def flush_and_interrupt(console, *signals):
        console.register = lambda poller: os.kill(os.getpid(), number) or register(console, poller)
        flush(console, *signals)
    monkeypatch.setattr(roexec, "_DRAIN", 0.1)
    monkeypatch.setattr(roexec.Console, "flush", flush_and_interrupt)
    job = make_job("head -c 100000 /dev/zero")      # more than one pipe holds, less than two
    apply(store, job)
    pid, output = run_in_child(store, job)
    assert end_of(pid) == 0
    os.close(output)


def test_after_a_kill_of_a_foreground_run_the_next_one_records_it_and_runs(store, tmp_path):
    job = make_job(f"trap '' TERM; setsid sleep 600 & echo $$ > {tmp_path}/pid; sleep 600",
                   grace=0.2)
    apply(store, job)
    pid, _ = run_in_child(store, job)
    command = read_pid(tmp_path / "pid")
    os.kill(pid, signal.SIGKILL)
    end_of(pid)
    assert is_alive(command)
    apply(store, make_job("exit 4"))
    pid, _ = run_in_child(store, make_job("exit 4"))
    assert end_of(pid) == 4
    assert [(row["state"], row["reason"]) for row in read_runs(store)] == [
        ("lost", "supervisor"), ("failed", "exit")]
    assert not descendants()


def lost_before_a_retry(store, command):
    """A run that has lost its supervisor, and has an attempt ahead -> its id."""
    journal = claimed(store, make_job(command, "lost", retries=1, backoff=0))
    for event, more in (("starting", {"what": "attempt"}), ("ended", {"exit_code": 1}),
                        ("retry", {"until": 0})):
        journal.note(event, **more)
    journal.close()
    return journal.run_id


def test_a_run_that_is_finished_beside_a_foreground_run_does_not_end_with_that(store, tmp_path):
    lost = lost_before_a_retry(store, f"echo $$ > {tmp_path}/new; mv {tmp_path}/new "
                               f"{tmp_path}/pid; exec sleep 600")
    job = make_job(f"until test -e {tmp_path}/pid; do sleep 0.02; done", leftovers="kill")
    apply(store, job)
    pid, output = run_in_child(store, job)
    assert (end_of(pid), read_rest(output)) == (0, "")
    assert is_alive(read_pid(tmp_path / "pid")) and read_run(store, lost)["state"] == "running"
    roexec.cancel_run(store, lost)
    wait_for(lambda: roexec.settle(store) or read_run(store, lost)["state"] == "cancelled")


def test_a_detached_run_does_not_wait_for_the_end_of_one_that_it_has_finished(store, tmp_path):
    lost = lost_before_a_retry(store, "for i in $(seq 400); do "
                               f"test -e {tmp_path}/go && exit; sleep 0.05; done; exit 9")
    apply(store, make_job())
    run_id = roexec.run_detached(store, make_job())
    (tmp_path / "go").touch()
    await_state(store, run_id, "succeeded")
    wait_for(lambda: roexec.settle(store) or read_run(store, lost)["state"] == "succeeded",
             what=lambda: read_run(store, lost))


def test_a_killed_foreground_run_is_not_started_by_somebody_else(store, marks, monkeypatch):
    job = make_job(f"echo ran >> {marks.path}")
    apply(store, job)

    def claim_and_die():
        roexec.Supervision.perform = lambda self: os.kill(os.getpid(), signal.SIGKILL)
        roexec.run_here(store, job)
    assert end_of(in_child(claim_and_die)) == -signal.SIGKILL
    roexec.settle(store, wait=True)
    run, = read_runs(store)
    assert (run["state"], run["reason"], marks()) == ("lost", "supervisor", [])


def test_a_detached_run_returns_at_once_and_goes_on_alone(store, tmp_path):
    job = make_job(f"echo $$ > {tmp_path}/pid; cat; readlink /proc/$$/fd/0; ps -o tty= -p $$; "
                   f"while ! test -e {tmp_path}/go; do sleep 0.01; done; exit 5")
    apply(store, job)
    run_id = roexec.run_detached(store, job)
    assert read_run(store, run_id)["state"] in ("queued", "running")
    read_pid(tmp_path / "pid")
    with pytest.raises(RoexecError, match=run_id):
        roexec.run_detached(store, job)
    (tmp_path / "go").touch()
    assert await_state(store, run_id, "failed")["exit_code"] == 5
    assert read_log_of(store, run_id, raw=True).split() == ["/dev/null", "?"]


def test_a_detached_run_that_fails_later_writes_into_no_other_file(store, tmp_path, monkeypatch):
    def fail(*_):
        files = [open(tmp_path / str(number), "w") for number in range(20)]
        raise RoexecError(f"{len(files)} files are open")
    monkeypatch.setattr(roexec, "_await_place", fail)
    job = make_job()
    apply(store, job)
    run_id = roexec.run_detached(store, job)
    wait_for(lambda: roexec.settle(store) or read_run(store, run_id)["state"] == "cancelled")
    assert {path.read_text() for path in tmp_path.glob("[0-9]*")} == {""}


def test_a_cancel_works_without_a_server_and_says_what_has_ended(store, tmp_path):
    job = sleeper(tmp_path)
    apply(store, job)
    run_id = roexec.run_detached(store, job)
    command = read_pid(tmp_path / "x.pid")
    roexec.cancel_run(store, run_id)
    assert await_state(store, run_id, "cancelled")["reason"] == "user"
    assert not is_alive(command)
    with pytest.raises(RoexecError, match="has ended already: cancelled"):
        roexec.cancel_run(store, run_id)


def test_a_cancel_works_after_the_server_was_killed_and_by_the_next_one(store, start, tmp_path):
    jobs = [sleeper(tmp_path, name) for name in "ab"]
    apply(store, *jobs)
    server = start()
    ids = [ask(store, job) for job in jobs]
    pids = [read_pid(tmp_path / f"{name}.pid") for name in "ab"]
    server.kill()
    roexec.cancel_run(store, ids[0])
    wait_for(lambda: not is_alive(pids[0]))
    wait_for(lambda: roexec.settle(store) or read_run(store, ids[0])["state"] == "cancelled")
    server = start()
    roexec.cancel_run(store, ids[1])
    await_state(store, ids[1], "cancelled")
    assert not is_alive(pids[1])
    server.stop()


def test_a_run_that_waits_for_its_turn_can_be_withdrawn(store, tmp_path):
    job = sleeper(tmp_path, overlap="queue")
    apply(store, job)
    first = roexec.run_detached(store, job)
    read_pid(tmp_path / "x.pid")
    pid, _ = run_in_child(store, job)
    second = wait_for(lambda: read_runs(store, state="queued"))[0]["id"]
    os.kill(pid, signal.SIGINT)
    assert end_of(pid) == 130
    assert read_run(store, second)["state"] == "cancelled"
    pid, _ = run_in_child(store, job)
    third = wait_for(lambda: read_runs(store, state="queued"))[0]["id"]
    os.kill(pid, signal.SIGKILL)
    end_of(pid)
    roexec.settle(store)
    assert read_run(store, third)["state"] == "cancelled"
    roexec.cancel_run(store, first)


def test_a_queued_run_of_a_job_that_another_node_has_removed_is_cancelled(store, start):
    with store.write() as db:
        roexec.add_run(db, id="r", job_id="gone", trigger="schedule", slot=60, state="queued",
                       queued_at=60.5)
    start()
    row = await_state(store, "r", "cancelled")
    assert (row["reason"], row["message"]) == ("user", "the job was deleted")


def test_a_run_that_waits_goes_on_when_the_one_before_it_loses_its_supervisor(store, tmp_path):
    job = make_job(f"echo $PPID > {tmp_path}/pid; exec sleep 600", grace=0.2)
    apply(store, job)
    first = roexec.run_detached(store, job)
    supervisor = read_pid(tmp_path / "pid")
    pid, _ = run_in_child(store, make_job("exit 6"), wait=True)
    wait_for(lambda: read_runs(store, state="queued"))
    os.kill(supervisor, signal.SIGKILL)
    wait_for(lambda: read_run(store, first)["state"] == "lost")
    second = read_runs(store)[1]["id"]
    wait_for(lambda: read_run(store, second)["state"] != "queued")
    roexec.cancel_run(store, second)
    end_of(pid)


def test_a_server_leaves_runs_that_belong_to_a_command_to_it(store, start, tmp_path):
    job = make_job()
    apply(store, job)
    run_id = ask(store, job, owner=own_identity())
    server = start()
    other = make_job("exit 3", "y")
    apply(store, other)
    await_state(store, ask(store, other), "failed")
    assert read_run(store, run_id)["state"] == "queued"
    server.stop()


def test_an_unregistered_command_has_the_callers_environment_folder_and_input(
        store, tmp_path, monkeypatch):
    monkeypatch.setenv("MINE", "yes")
    (tmp_path / "input").write_text("typed\n")
    job = roexec.Job({"id": "n", "command": ["sh", "-c", "echo $MINE; pwd; cat"]})

    def run():
        os.dup2(os.open(tmp_path / "input", os.O_RDONLY), 0)
        return roexec.run_here(store, job, name="n", caller=True)
    assert end_of(in_child(run)) == 0
    run, = read_runs(store)
    assert read_log_of(store, run["id"], raw=True) == f"yes\n{tmp_path}\ntyped\n"
    assert (run["name"], run["job_id"], run["version"]) == ("n", "n", None)


@pytest.mark.parametrize("blocking", [True, False])
def test_a_slow_reader_of_a_foreground_run_gets_all_of_it(store, blocking):
    job = make_job("seq 30000; echo end >&2")
    apply(store, job)
    reader, writer = os.pipe()
    os.set_blocking(writer, blocking)

    def run():
        os.close(reader)
        os.dup2(writer, 1)
        return roexec.run_here(store, job)
    pid = in_child(run)
    os.close(writer)
    run_id = wait_for(lambda: read_runs(store))[0]["id"]
    wait_for(lambda: roexec.live_run(store, read_run(store, run_id))[0]["log"])
    taken = b""
    while len(taken) < 60_000:
        taken += os.read(reader, 4096)
    await_state(store, run_id, "succeeded")     # after it has waited for us, but not for ever
    taken += read_rest(reader).encode()
    assert taken.decode().split() == [str(number) for number in range(1, 30001)]
    assert end_of(pid) == 0
    log = read_log_of(store, run_id, raw=True)
    assert "30000\n" in log and "end\n" in log and "refused" not in read_log_of(store, run_id)


def test_the_loss_of_the_reader_ends_neither_run_nor_log(store):
    job = make_job("seq 30000; echo end; exit 3")
    apply(store, job)
    pid, reader = run_in_child(store, job)
    os.read(reader, 100)
    os.close(reader)
    assert end_of(pid) == 3
    assert read_log_of(store, read_runs(store)[0]["id"], raw=True).endswith("30000\nend\n")


# On a terminal.

class Terminal:
    """A foreground run of a command on a pseudo-terminal, which leads its session."""

    def __init__(self, store, command):
        job = roexec.Job({"id": "c", "command": ["sh", "-c", command]})
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            status = 70
            try:
                status = roexec.run_here(store, job, name="c", caller=True)
            finally:
                os._exit(status)
        self.seen = ""

    def await_text(self, text):
        def look():
            if select.select([self.file], [], [], 0.05)[0]:
                try:
                    self.seen += os.read(self.file, 4096).decode()
                except OSError:
                    pass
            return text in self.seen
        wait_for(look, what=lambda: f"{text!r} is not in {self.seen!r}")

    def await_command(self):
        """Wait until the command has the terminal: only then is what is typed for it alone."""
        wait_for(lambda: os.tcgetpgrp(self.file) != self.pid)

    def type(self, text):
        os.write(self.file, text.encode())

    def end(self):
        status = end_of(self.pid)
        os.close(self.file)
        return status


@pytest.fixture
def terminal(store):
    return lambda command: Terminal(store, command)


def test_a_command_on_a_terminal_reads_what_is_typed_and_ends_with_it(terminal, store):
    here = terminal("exec cat")
    here.type("hello\n")
    here.await_text("hello\r\nhello\r\n")
    here.type("\x04")
    assert here.end() == 0
    assert read_log_of(store, read_runs(store)[0]["id"], raw=True) == "hello\n"


def test_ctrl_c_reaches_a_command_once(terminal, store):
    here = terminal("trap 'echo got it' INT; echo ready; while read line; do echo $line; done; "
                    "echo over; exit 3")
    here.await_text("ready")
    here.await_command()
    here.type("\x03")
    here.await_text("^C")
    here.type("more\n")
    here.await_text("got it")
    here.type("\x04")
    assert here.end() == 3
    assert read_log_of(store, read_runs(store)[0]["id"], raw=True).count("got it") == 1


def test_ctrl_c_ends_a_command_that_does_not_mind(terminal, store):
    here = terminal("echo ready; exec sleep 600")
    here.await_text("ready")
    here.await_command()
    here.type("\x03")
    assert here.end() == 130
    run, = read_runs(store)
    assert (run["state"], run["reason"]) == ("cancelled", "user")


def test_a_command_can_be_stopped_and_continued(terminal, store):
    here = terminal("echo ready; read line; echo read $line; exit 4")
    here.await_text("ready")
    here.await_command()
    here.type("\x1a")
    wait_for(lambda: os.waitpid(here.pid, os.WUNTRACED | os.WNOHANG)[0])
    assert os.tcgetpgrp(here.file) == here.pid
    os.kill(here.pid, signal.SIGCONT)
    here.await_command()
    here.type("more\n")
    here.await_text("read more")
    assert here.end() == 4


def test_a_command_that_wants_the_terminal_too_early_is_not_stopped(terminal, monkeypatch):
    give = roexec.Console.give_terminal

    def give_late(self, group=None):
        if group is not None:           # until the command has been stopped for its reading
            with open(f"/proc/{group}/stat") as file:
                wait_for(lambda: file.seek(0) == 0 and ") T " in file.read())
        give(self, group)
    monkeypatch.setattr(roexec.Console, "give_terminal", give_late)
    here = terminal("exec cat")
    here.type("hello\n")
    here.await_text("hello\r\nhello\r\n")
    here.type("\x04")
    assert here.end() == 0


def test_a_retry_can_be_ended_from_the_terminal(terminal, store, monkeypatch):
    monkeypatch.setattr(roexec, "retry_delay", lambda *_: 600)
    here = terminal("echo ready; exit 1")
    here.await_text("ready")
    wait_for(lambda: os.tcgetpgrp(here.file) == here.pid)
    run_id = read_runs(store)[0]["id"]
    with open(store.file(roexec.live_run(store, read_run(store, run_id))[0]["log"])) as log:
        wait_for(lambda: log.seek(0) == 0 and "Retrying" in log.read())
    here.type("\x03")
    assert here.end() == 130
    assert read_runs(store)[0]["state"] == "cancelled"


def test_the_loss_of_the_terminal_ends_neither_command_nor_log(terminal, store, tmp_path):
    here = terminal(f"echo $$ > {tmp_path}/pid; while ! test -e {tmp_path}/go; "
                    "do sleep 0.01; done; seq 30000; echo end; exit 3")
    command = read_pid(tmp_path / "pid")
    wait_for(lambda: os.tcgetpgrp(here.file) == command)
    os.close(here.file)
    os.killpg(command, signal.SIGHUP)               # as the kernel does when a shell ends then
    (tmp_path / "go").touch()
    assert end_of(here.pid) == 3
    assert read_log_of(store, read_runs(store)[0]["id"], raw=True).endswith("30000\nend\n")


# Requests.

def test_an_unregistered_name_knows_no_overlap(store, tmp_path):
    job = roexec.Job({"id": "n", "command": "exec sleep 600"})
    first, second = (roexec.run_detached(store, job, name="n") for _ in range(2))
    for run_id in (first, second):
        await_state(store, run_id, "running")
        roexec.cancel_run(store, run_id)
        await_state(store, run_id, "cancelled")


def test_settings_of_the_server_are_below_the_jobs_of_all_clients(store):
    apply(store, make_job(retries=4))
    with store.write() as db:
        roexec.set_settings(db, {"defaults": {"timeout": 60, "retries": 2}})
        job = roexec.effective_job(db, "x", {"defaults": {"timeout": 5}})
        assert (job.timeout, job.retries) == (60, 4)
        with pytest.raises(roexec.NoSuchJob, match="did you mean"):
            roexec.effective_job(db, "xx")


@pytest.mark.parametrize("state, line", [
    ("succeeded", "[INFO] Run r1 completed, exit=0, job=x"),
    ("failed", "[ERROR] Run r1 failed, exit=3, job=x"),
    ("timed_out", "[ERROR] Run r1 timed_out, signal=SIGKILL, job=x"),
    ("lost", "[ERROR] Run r1 lost, reason=supervisor, job=x"),
    ("cancelled", "[INFO] Run r1 cancelled, reason=user, job=x"),
    ("skipped", "[INFO] Run r1 skipped, reason=overlap, job=x")])
def test_only_an_end_that_somebody_should_look_at_is_an_error_in_the_servers_log(state, line):
    said, more = [], {"succeeded": {"exit_code": 0}, "failed": {"exit_code": 3},
                      "timed_out": {"signal": "SIGKILL"}}.get(state, {})
    reason = roexec.REASONS.get(state, [None])[0]
    roexec._tell_end(lambda text, level="INFO": said.append(f"[{level}] {text}"),
                     {"id": "r1", "job_id": "x", "state": state, "reason": reason, **more})
    assert said == [line]


def test_a_reason_that_no_exit_status_tells_is_in_the_servers_log():
    said = []
    roexec._tell_end(lambda text, level: said.append(text), {
        "id": "r1", "job_id": "x", "state": "failed", "reason": "output", "exit_code": 0})
    assert said == ["Run r1 failed, exit=0, reason=output, job=x"]


@pytest.mark.parametrize("cgroup, options", [
    ("/system.slice/roexec.service/server", []),
    ("/user.slice/user@1000.service/app.slice/roexec.service", ["--user"]),
])
def test_the_manager_of_the_unit_is_asked_how_it_would_be_stopped(tmp_path, monkeypatch, cgroup,
                                                                  options):
    (tmp_path / "cgroup").write_text(f"0::{cgroup}\n")
    program = tmp_path / "systemctl"
    program.write_text(f"#!/bin/sh\necho \"$@\" >{tmp_path}/asked; cat {tmp_path}/mode\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("INVOCATION_ID", "0" * 32)
    monkeypatch.setattr(roexec, "open", lambda path, *more: open(
        tmp_path / "cgroup" if path == "/proc/self/cgroup" else path, *more), raising=False)
    (tmp_path / "mode").write_text("KillMode=control-group\n")
    assert "write KillMode=process" in roexec.unit_warning()
    words = (tmp_path / "asked").read_text().split()
    assert words == [*options, "show", "--property=KillMode", "roexec.service"]
    (tmp_path / "mode").write_text("KillMode=process\n")
    assert roexec.unit_warning() is None
