"""The supervisor: journals, the start and the end of commands, attempts, hooks, what is left."""
import errno
import json
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from helpers import (claimed, descendants, end_of, in_child, is_alive, make_job, output_of,
                     perform, read_attempts, read_log_of, read_pid, read_run, supervise, wait_for)

import roexec
from roexec import Journal, Progress

pytestmark = pytest.mark.usefixtures("clean")      # of processes


@pytest.fixture
def ready(tmp_path, monkeypatch):
    """A file that the command of an attempt makes: from when on its timeouts count here, however
    long it takes to come so far."""
    path, deadlines = tmp_path / "ready", roexec.Supervision._deadlines

    def count_from_there(supervision, timeout, attempt):
        if attempt:
            wait_for(path.exists)
        return deadlines(supervision, timeout, attempt)
    monkeypatch.setattr(roexec.Supervision, "_deadlines", count_from_there)
    return path


# The journal.

def events_of(journal):
    return [event["event"] for event in journal.events]


def test_a_locked_journal_is_alive_and_a_free_one_can_be_found(store):
    journal = claimed(store, make_job())
    assert Journal.find(journal.path) is None
    assert roexec.lock_is_held(journal.path)
    journal.close()
    found = Journal.find(journal.path)
    assert found.header == journal.header and found.header["spec"]["command"] == "true"
    found.close()
    assert Journal.find(journal.path + "x") is None


def test_a_journal_that_cannot_be_read_does_not_stay_locked(store, monkeypatch):
    journal = claimed(store, make_job())
    journal.close()

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")
    with monkeypatch.context() as disk:
        disk.setattr(os, "pread", fail)
        with pytest.raises(OSError):
            Journal.find(journal.path)
    assert not roexec.lock_is_held(journal.path)
    Journal.find(journal.path).close()


def test_of_two_who_ask_for_a_cancel_at_the_same_time_each_says_its_own_reason(store, monkeypatch):
    journal, rename = claimed(store, make_job()), os.rename

    def be_held_up(*paths):
        monkeypatch.setattr(os, "rename", lambda *_: os._exit(1))
        end_of(in_child(lambda: journal.cancel("shutdown", 5)))     # which is killed half-way
        monkeypatch.setattr(os, "rename", rename)
        rename(*paths)
    monkeypatch.setattr(os, "rename", be_held_up)
    journal.cancel("user")
    assert journal.cancelled() == ("user", None)
    journal.close()


def test_a_journal_that_was_replaced_while_it_was_opened_is_not_found(store, monkeypatch):
    journal = claimed(store, make_job())
    journal.close()

    def replace_and_lock(descriptor):
        shutil.copy(journal.path, journal.path + ".copy")
        os.replace(journal.path + ".copy", journal.path)
        return True
    monkeypatch.setattr(roexec, "try_lock", replace_and_lock)
    assert Journal.find(journal.path) is None


def test_a_line_counts_when_it_is_whole_wherever_a_kill_cuts_the_journal(store):
    journal = claimed(store, make_job())
    for number in range(3):
        journal.note("ended", exit_code=number)
    journal.close()
    with open(journal.path, "rb") as file:
        whole = file.read().rstrip(b"\0")
    for size in range(whole.find(b"\n") + 1, len(whole) + 1):
        with open(journal.path, "wb") as file:
            file.write(whole[:size] + bytes(100))
        found = Journal.find(journal.path)
        kept = whole[:size].count(b"\n") - 1
        assert [event["exit_code"] for event in found.events] == list(range(kept))
        found.note("ended", exit_code="next")
        found.close()
        again = Journal.glance(journal.path)
        assert [event["exit_code"] for event in again.events] == [*range(kept), "next"]


def test_a_stale_temporary_file_of_a_crash_stands_in_nobodys_way(store):
    with store.write() as db:
        roexec.add_run(db, id="abcdefghij", job_id="x", trigger="manual", state="queued",
                       queued_at=time.time())
    with open(store.file("active/abcdefghij.new"), "w") as file:
        file.write("half a line that is longer than a header" * 100)
    with store.write() as db:
        journal, = roexec.claim(db, store.file("active"), lambda row: make_job(), None,
                                lambda row: True)
    assert Journal.glance(journal.path).header["run"] == "abcdefghij"
    assert supervise(store, journal)["state"] == "succeeded"


def test_a_journal_that_could_not_be_made_leaves_nothing_and_no_descriptor(store, monkeypatch):
    before = os.listdir("/proc/self/fd")

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(roexec, "_reserve", full, raising=False)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError):
        Journal.create(store.file("active"), {"run": "abcdefghij"})
    assert os.listdir(store.file("active")) == []
    assert len(os.listdir("/proc/self/fd")) <= len(before)


def test_removing_a_journal_leaves_a_newer_one_of_the_same_name_alone(store):
    old = claimed(store, make_job())
    new = Journal.create(store.file("active"), old.header)
    old.remove()
    assert os.path.exists(new.path)
    new.remove()
    assert os.listdir(store.file("active")) == []
    old.close()
    new.close()


def test_a_full_disk_loses_no_exit_code(store, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(disk)],
            stderr=subprocess.DEVNULL).returncode:
        pytest.skip("only root can mount a small file system")
    try:
        for name in ("active", "logs"):
            (disk / name).mkdir()
        header = claimed(store, make_job("echo lost; exit 3", retries=2, backoff=0.01)).header
        journal = Journal.create(str(disk / "active"), header)
        with pytest.raises(OSError), open(disk / "filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(512))
        signals = roexec.Signals()
        roexec.Supervision(journal, str(disk), signals).perform()
        signals.close()
        journal.close()
        progress = Progress(Journal.glance(journal.path).events)
        assert progress.finished and progress.outcome["exit_code"] == 3
        assert [attempt["exit_code"] for attempt in progress.attempts] == [3, 3, 3]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def sleeping_child():
    pid = in_child(lambda: os.execvp("sleep", ["sleep", "60"]))

    def is_it():
        with open(f"/proc/{pid}/comm") as file:
            return file.read() == "sleep\n"
    wait_for(is_it)
    return pid


def test_a_cancel_signals_the_supervisor_only_while_it_is_the_same_process(store, tmp_path):
    journal = claimed(store, make_job())
    pid = sleeping_child()
    start = roexec.process_start(pid)
    journal.note("supervisor", pid=pid, start=start + 1, log=None)
    journal.cancel("user")
    assert is_alive(pid) and journal.cancelled() == ("user", None)
    journal.note("supervisor", pid=pid, start=start, log=None)
    journal.cancel("replaced", 5)
    assert end_of(pid) == -signal.SIGTERM and journal.cancelled() == ("replaced", 5)
    journal.close()


def test_a_cancel_does_not_hit_what_a_supervisor_does_after_the_run(store):
    pid = sleeping_child()
    journal = claimed(store, make_job())
    journal.note("supervisor", pid=pid, start=roexec.process_start(pid), log=None)
    journal.close()
    end_of(in_child(lambda: Journal.glance(journal.path).cancel("user")))
    assert is_alive(pid)


def test_a_cancel_does_not_hit_the_next_run_of_a_supervisor(store, monkeypatch):
    """The server has heard of the end, and holds the journal until it has taken that in."""
    journal, told = claimed(store, make_job()), []
    journal.note("supervisor", pid=os.getpid(), start=roexec.process_start(os.getpid()), log=None)
    monkeypatch.setattr(os, "kill", lambda *values: told.append(values))
    journal.cancel("user")
    assert told == [(os.getpid(), signal.SIGTERM)]
    journal.note("outcome", state="succeeded", reason=None)
    journal.note("finished")
    journal.cancel("user")
    assert len(told) == 1
    journal.close()


# Recovery: the table of a journal that a kill has cut after each of its events.

def mark(name, more=""):
    return f"echo {name} >> $MARKS; {more}"


def eventful_job(marks, **more):
    """A job that uses all there is: its second attempt succeeds."""
    hooks = {name: mark(name) for name in roexec.HOOKS}
    return make_job(mark("attempt$ROEXEC_ATTEMPT", "test $ROEXEC_ATTEMPT = 2"), retries=1,
                    backoff=0.01, condition=mark("condition"), hooks=hooks, grace=0.3,
                    env={"MARKS": str(marks.path)}, **more)


ALL_MARKS = ["condition", "pre_run", "attempt1", "on_retry", "attempt2", "on_success", "post_run"]


def cut_journals(store, marks, job):
    """(journal of a new run that was cut after an event, what was begun until then) of each."""
    whole = claimed(store, job)
    supervise(store, whole)
    assert marks() == ALL_MARKS
    for size in range(len(whole.events)):
        kept, begun = whole.events[:size], []
        for event in kept:
            if event["event"] == "starting":
                begun.append(event["what"])
        marks.path.write_text("")
        journal = claimed(store, job)
        for event in kept:
            journal.note(**event)
        journal.close()
        yield Journal.find(journal.path), kept, begun


def test_after_a_kill_between_any_two_steps_nothing_runs_twice(store, marks):
    count = 0
    for journal, kept, begun in cut_journals(store, marks, eventful_job(marks)):
        before = [name if name != "attempt" else f"attempt{begun[:index].count('attempt') + 1}"
                  for index, name in enumerate(begun)]
        run, again = supervise(store, journal), marks()
        assert not set(before) & set(again), (kept[-1], again)
        last, names = (kept[-1] if kept else {}), [event["event"] for event in kept]
        if "outcome" in names:
            assert (run["state"], again) == ("succeeded", []), last
        elif not begun:
            assert (run["state"], again) == ("succeeded", ALL_MARKS), last
        elif "attempt2" in before and last.get("event") == "ended":
            assert (run["state"], again) == ("succeeded", ["on_success", "post_run"])
        elif "attempt1" in before and not (begun[-1] == "attempt" and last["event"] != "ended"):
            rest = ALL_MARKS[ALL_MARKS.index(before[-1]) + 1:]
            assert (run["state"], again) == ("succeeded", rest), last
        else:
            assert (run["state"], run["reason"]) == ("lost", "supervisor"), last
            assert again == ["on_failure", "post_run"], last
        assert os.listdir(store.file("active")) == []
        count += 1
    assert count > 20


def test_a_lost_attempt_is_followed_by_one_more_where_the_job_wants_that(store, marks):
    journal = claimed(store, make_job(mark("attempt$ROEXEC_ATTEMPT"), if_lost="rerun",
                                      backoff=0.01, env={"MARKS": str(marks.path)}))
    journal.note("starting", what="attempt")
    run = supervise(store, journal)
    assert (run["state"], marks()) == ("succeeded", ["attempt2"])
    assert [row["exit_code"] for row in read_attempts(store, run["id"])] == [None, 0]


def test_a_cancelled_run_is_never_run_again(store, marks):
    journal = claimed(store, make_job(mark("attempt"), if_lost="rerun", backoff=0.01,
                                      env={"MARKS": str(marks.path)}))
    journal.note("starting", what="attempt")
    journal.cancel("user")
    run = supervise(store, journal)
    assert (run["state"], run["reason"], marks()) == ("cancelled", "user", [])


def test_a_cancel_that_was_committed_but_never_told_holds_at_the_recovery(store, marks):
    job = make_job(mark("attempt"), if_lost="rerun", backoff=0.01, env={"MARKS": str(marks.path)})
    journal = claimed(store, job)
    journal.note("starting", what="attempt")
    journal.close()
    with store.write() as db:
        roexec.ask_to_cancel(db, journal.run_id, "user")
    roexec.settle(store, wait=True)
    run = read_run(store, journal.run_id)
    assert (run["state"], run["reason"], marks()) == ("cancelled", "user", [])


@pytest.mark.parametrize("begun", [(), ("attempt",), ("condition",)])
def test_after_a_power_cut_an_unfinished_run_is_lost(store, marks, begun):
    journal = claimed(store, make_job(mark("attempt"), retries=3, backoff=0.01,
                                      env={"MARKS": str(marks.path)}))
    for what in begun:
        journal.note("starting", what=what)
        journal.note("ended", exit_code=1)
    journal.header["boot"] = "another"
    run = supervise(store, journal)
    assert (run["state"], run["reason"], marks()) == ("lost", "power", [])


def test_a_rerun_after_a_power_cut_is_looked_after_like_any_attempt(store, tmp_path):
    """It runs in this boot, whichever the run was claimed in."""
    journal = claimed(store, make_job(f"echo $$ > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid;"
                                      " sleep 600", if_lost="rerun", backoff=0.01, grace=0.1))
    data = {**journal.header, "boot": "another"}
    journal.close()
    journal = Journal.create(store.file("active"), data)
    journal.note("starting", what="attempt")
    pid = in_child(lambda: roexec.Supervision(journal, store.folder, roexec.Signals()).perform())
    journal.close()
    command = read_pid(tmp_path / "pid")
    os.kill(pid, signal.SIGKILL)
    end_of(pid)
    run = supervise(store, wait_for(lambda: Journal.find(journal.path)))
    assert (run["state"], run["reason"]) == ("lost", "supervisor") and not is_alive(command)
    assert len(read_attempts(store, run["id"])) == 2 and not descendants()


def test_an_orphan_that_comes_within_the_grace_is_asked_to_end_too(store, ready):
    # (What is asked between its fork and its exec, where the trap is still there, may miss it.)
    run = perform(store, "trap 'setsid sleep 600 > /dev/null 2>&1 & "
                  "until grep -qs sleep /proc/$!/comm; do sleep 0.02; done; exit' TERM; "
                  f": > {ready}; while :; do sleep 0.02; done", timeout=0.1, grace=600)
    assert run["state"] == "timed_out" and run["finished_at"] - run["started_at"] < 300
    assert not descendants()


def test_what_a_command_cleans_up_with_is_left_to_it(store, ready):
    run = perform(store, f"trap 'sleep 0.4 && echo clean; exit' TERM; : > {ready}; "
                  "while :; do sleep 0.02; done", timeout=0.1, grace=60)
    assert (run["state"], output_of(store, run).split()[-1:]) == ("timed_out", ["clean"])


def test_what_a_lost_supervisor_has_left_is_killed_before_the_run_is_lost(store, tmp_path):
    pids = tmp_path / "pid"
    command = (f"trap '' TERM; setsid sleep 600 & echo $! > {pids}; sleep 600")
    journal = claimed(store, make_job(command, grace=0.2))
    supervisor = in_child(lambda: roexec.Supervision(
        journal, store.folder, roexec.Signals()).perform())
    journal.close()
    pid = read_pid(pids)
    assert Journal.find(journal.path) is None
    os.kill(supervisor, signal.SIGKILL)
    end_of(supervisor)
    assert is_alive(pid)
    run = supervise(store, Journal.find(journal.path))
    assert (run["state"], run["reason"]) == ("lost", "supervisor")
    assert not descendants() and "Killed" in read_log_of(store, run["id"])
    assert roexec.exit_status(run) == 125


def test_a_hook_that_a_lost_supervisor_has_left_is_killed(store, tmp_path):
    job = make_job(hooks={"on_success": f"echo $$ > {tmp_path}/pid; sleep 600"}, grace=0.2)
    journal = claimed(store, job)
    supervisor = in_child(lambda: roexec.Supervision(
        journal, store.folder, roexec.Signals()).perform())
    journal.close()
    pid = read_pid(tmp_path / "pid")
    os.kill(supervisor, signal.SIGKILL)
    end_of(supervisor)
    assert supervise(store, Journal.find(journal.path))["state"] == "succeeded"
    assert not is_alive(pid)


def test_a_run_that_cannot_be_supervised_ends_and_says_why(store):
    shutil.rmtree(store.file("logs"))
    with open(store.file("logs"), "w"):
        pass
    journal = claimed(store, make_job())
    with pytest.raises(OSError):
        supervise(store, journal)
    roexec.settle(store)
    run = read_run(store, journal.run_id)
    assert (run["state"], run["reason"]) == ("lost", "supervisor")
    assert "logs" in run["message"]


def has_ended(store, run_id):
    """Settle, as commands do; a child that is not there yet may still hold the lock."""
    roexec.settle(store, wait=True)
    return read_run(store, run_id)["state"] in roexec.FINAL_STATES


def test_a_kill_at_a_random_moment_of_the_start_runs_no_command_twice(store, marks):
    job = make_job(f"echo $ROEXEC_RUN_ID >> {marks.path}", catch_up_window="1h")
    chance, runs = random.Random(7), []
    rounds = 200 if os.environ.get("ROEXEC_LONG") else 40
    for _ in range(rounds):
        journal = claimed(store, job)
        runs.append(journal.run_id)
        supervisor = in_child(lambda: roexec.Supervision(
            journal, store.folder, roexec.Signals()).perform())
        journal.close()
        time.sleep(chance.random() * 0.012)         # the random moment is what is tested
        os.kill(supervisor, signal.SIGKILL)
        end_of(supervisor)
        wait_for(lambda: has_ended(store, journal.run_id))
    states = [read_run(store, run_id)["state"] for run_id in runs]
    assert set(states) <= {"lost", "succeeded"} and len(set(marks())) == len(marks())
    for run_id, state in zip(runs, states):
        assert state == "lost" or run_id in marks()
    assert len(marks()) <= len(runs) and not os.listdir(store.file("active"))


# How a command ends.

@pytest.mark.parametrize("command, state, reason, status", [
    ("exit 0", "succeeded", None, 0),
    ("exit 3", "failed", "exit", 3),
    ("exit 255", "failed", "exit", 255),
    ("kill -9 $$", "failed", "signal", 137),
    ("kill -TERM $$", "failed", "signal", 143),
    ("kill -40 $$", "failed", "signal", 168),
    ("exit 126", "failed", "start", 126),
    (["no-such-program"], "failed", "start", 127),
    (["/no/such/program"], "failed", "start", 127),
    (["/etc/passwd/program"], "failed", "start", 127),
    (["/tmp"], "failed", "start", 126),
    (["/etc/passwd"], "failed", "start", 126),
    (["echo", "a\0b"], "failed", "start", 126),
    ("echo a\0b", "failed", "start", 126),
])
def test_the_end_of_a_command_is_recorded_as_shells_know_it(store, command, state, reason, status):
    run = perform(store, command)
    assert (run["state"], run["reason"]) == (state, reason)
    assert roexec.exit_status(run) == status
    if reason in ("exit", "signal"):
        assert f"[ERROR] Run {run['id']} failed" in read_log_of(store, run["id"])


@pytest.mark.parametrize("state, status", [
    ("timed_out", 124), ("cancelled", 130), ("lost", 125), ("skipped", 0)])
def test_states_have_exit_statuses(state, status):
    assert roexec.exit_status({"state": state, "signal": "SIGTERM", "exit_code": None}) == status


def test_a_failed_start_says_which_program_was_looked_for_and_where(store):
    run = perform(store, ["no-such-program"], env={"PATH": "/bin:/opt/x"})
    assert "no-such-program: there is no such program in /bin:/opt/x" in run["message"]
    run = perform(store, "true", directory="/no/such/folder")
    assert (run["state"], run["exit_code"]) == ("failed", 126)
    assert "/no/such/folder" in run["message"]


def test_a_program_without_an_interpreter_line_is_a_shell_script(store, tmp_path):
    script = tmp_path / "script"
    script.write_text("echo $0 $1\n")
    script.chmod(0o755)
    run = perform(store, [str(script), "word with blanks"])
    assert output_of(store, run) == f"{script} word with blanks\n"


def test_a_program_whose_interpreter_is_missing_says_so(store, tmp_path):
    script = tmp_path / "script"
    script.write_text("#!/no/such/shell\n")
    script.chmod(0o755)
    run = perform(store, [str(script)])
    assert (run["exit_code"], run["reason"]) == (126, "start")
    assert "interpreter is missing" in run["message"]


def test_programs_are_looked_up_in_the_path_of_the_job(store, tmp_path):
    for folder, text in (("a", "not executable"), ("b", "#!/bin/sh\necho found\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tool").write_text(text)
    (tmp_path / "b" / "tool").chmod(0o755)
    run = perform(store, ["tool"], env={"PATH": f"{tmp_path}/a:{tmp_path}/b:/bin:/usr/bin"})
    assert output_of(store, run) == "found\n"
    run = perform(store, ["tool"], env={"PATH": f"/bin:{tmp_path}/a:/usr/bin"})
    assert run["exit_code"] == 126 and f"{tmp_path}/a/tool: Permission denied" in run["message"]


# What a command sees.

def test_a_command_sees_three_descriptors_and_none_that_we_have_inherited(tmp_path):
    command = f"ls /proc/self/fd > {tmp_path}/seen"

    def execute():
        os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)
        return roexec.exec_here(["sh", "-c", command])
    assert end_of(in_child(execute)) == 0
    assert (tmp_path / "seen").read_text().split() == ["0", "1", "2", "3"]      # 3 is the folder


def test_a_command_has_default_signals_an_empty_mask_and_a_session(store):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        run = perform(store, "cat /proc/self/status; "
                             "cut -d ' ' -f 1,5,6 /proc/$$/stat")
    finally:
        signal.signal(signal.SIGINT, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    lines = output_of(store, run).splitlines()
    internal = 3 << 31                  # 32 and 33, which the C library keeps for itself
    for name in ("SigBlk", "SigIgn", "SigCgt"):
        line, = (line for line in lines if line.startswith(name))
        assert int(line.split()[1], 16) & ~internal == 0, line
    assert len(set(lines[-1].split())) == 1         # it leads its session


def test_the_environment_is_exactly_the_clean_one(store, monkeypatch):
    monkeypatch.setenv("SURPRISE", "1")
    monkeypatch.setenv("ROEXEC_STORE", "/elsewhere")
    monkeypatch.delenv("LANG", raising=False)
    run = supervise(store, claimed(store, make_job(["env", "-0"]), slot=1754013600))
    found = dict(item.split("=", 1) for item in output_of(store, run).split("\0") if item)
    entry = pwd.getpwuid(os.geteuid())
    assert found == {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": entry.pw_dir, "USER": entry.pw_name, "LOGNAME": entry.pw_name,
        "SHELL": "/bin/sh", "LANG": "C.UTF-8", "ROEXEC_JOB_ID": "x", "ROEXEC_RUN_ID": run["id"],
        "ROEXEC_ATTEMPT": "1", "ROEXEC_TRIGGER": "manual", "ROEXEC_SLOT": "2025-08-01T02:00:00Z",
        "ROEXEC_LOG": store.file(run["log"])}


def test_later_sources_of_the_environment_are_stronger(store, monkeypatch):
    for name in ("A", "B", "C", "LANG"):
        monkeypatch.setenv(name, "host")
    job = make_job(["env"], timezone="Asia/Tokyo", inherit_env=["A", "B", "C", "NONE"],
                   env={"B": "job", "C": "job", "ROEXEC_JOB_ID": "job"})
    run = supervise(store, claimed(store, job, env=json.dumps(
        {"C": "given", "ROEXEC_RUN_ID": "given", "ROEXEC_STATUS": "given"})))
    found = dict(line.split("=", 1) for line in output_of(store, run).splitlines())
    assert [found[name] for name in ("A", "B", "C", "LANG", "TZ")] == [
        "host", "job", "given", "host", "Asia/Tokyo"]
    assert (found["ROEXEC_JOB_ID"], found["ROEXEC_RUN_ID"]) == ("x", run["id"])
    assert "NONE" not in found and "ROEXEC_STATUS" not in found


def test_folder_umask_and_standard_input_are_those_of_the_job(store, tmp_path):
    command = "pwd; umask; cat; touch made"
    run = perform(store, command, directory=str(tmp_path), umask="027", stdin="one\ntwo")
    assert output_of(store, run) == f"{tmp_path}\n0027\none\ntwo"
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o640
    run = perform(store, "pwd; umask; readlink /proc/self/fd/0; cat", directory=None)
    assert output_of(store, run) == f"{os.path.expanduser('~')}\n0022\n/dev/null\n"


def test_a_long_standard_input_is_given_whole(store):
    text = "x" * 300_000
    assert output_of(store, perform(store, ["wc", "-c"], stdin=text)).strip() == "300000"


def test_the_settings_of_one_run_do_not_reach_the_next(store, tmp_path):
    umask = os.umask(0o077)
    try:
        perform(store, "true", directory=str(tmp_path), umask="000")
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(umask)
    assert output_of(store, perform(store, "pwd; umask")) == "/\n0022\n"


# Output.

def test_output_is_kept_byte_for_byte_in_both_streams(store, tmp_path):
    chance = random.Random(3)
    out = bytes(chance.choice(b"\n\0ab\xff ") for _ in range(200_000))
    err = bytes(chance.randrange(256) for _ in range(100_001))
    (tmp_path / "out").write_bytes(out)
    (tmp_path / "err").write_bytes(err)
    run = perform(store, f"cat {tmp_path}/out & cat {tmp_path}/err >&2; wait; printf tail")
    with open(store.file(run["log"]), "rb") as file:
        log = file.read()
    assert roexec.select_lines(log, stream="out") == out + b"tail"
    assert roexec.select_lines(log, stream="err") == err
    assert read_attempts(store, run["id"])[0]["output_bytes"] == len(out) + len(err) + 4


def test_a_log_stays_below_its_size_and_what_was_printed_still_counts(store, tmp_path):
    run = perform(store, "seq 40000; echo end", log={"max_size": "64K"},
                  success={"output": "^39999$", "no_output": "^2$"},
                  hooks={"post_run": f"cat > {tmp_path}/seen"})
    assert (run["state"], run["reason"]) == ("failed", "output"), "^2$ is still in the log"
    log, (attempt,) = store.file(run["log"]), read_attempts(store, run["id"])
    files = [log, *(os.path.join(log + ".parts", name) for name in os.listdir(log + ".parts"))]
    assert sum(map(os.path.getsize, files)) <= 65536 and len(files) <= 4
    gap, = [part for part in roexec.follow(log) if part.is_gap]
    assert 0 < gap.begin < 16384 and gap.end > 1_000_000
    kept = read_log_of(store, run["id"], raw=True).split()
    assert kept[:2] == ["1", "2"] and kept[-2:] == ["40000", "end"] and len(kept) > 1000
    assert (tmp_path / "seen").read_text().endswith("\n40000\nend\n")
    assert attempt["output_bytes"] == sum(len(f"{number}\n") for number in range(1, 40001)) + 4


def test_a_piece_of_a_line_is_in_the_log_before_its_end(store, tmp_path):
    os.mkfifo(tmp_path / "go")
    journal = claimed(store, make_job(f"printf 'password: '; read x < {tmp_path}/go"))
    pid = in_child(lambda: roexec.Supervision(journal, store.folder, roexec.Signals()).perform())
    path = wait_for(lambda: roexec.live_run(store, read_run(store, journal.run_id))[0]["log"])
    with open(store.file(path)) as log:
        wait_for(lambda: log.seek(0) == 0 and "[OUT~] password: \n" in log.read())
    with open(tmp_path / "go", "w"):
        pass
    assert end_of(pid) == 0
    journal.close()


def test_a_daemon_that_holds_the_output_is_left_and_the_run_ends(store, tmp_path):
    run = perform(store, f"sleep 600 & echo $! > {tmp_path}/pid; echo done")
    assert (run["state"], output_of(store, run)) == ("succeeded", "done\n")
    assert run["finished_at"] - run["started_at"] < 30
    last = read_log_of(store, run["id"]).splitlines()
    assert any("holds the output open" in line for line in last[-2:])
    assert is_alive(read_pid(tmp_path / "pid"))


def test_no_output_is_lost_where_its_reader_is_held_up(store, monkeypatch):
    monkeypatch.setattr(roexec, "_DRAIN", -1)       # the time is over before it was looked at
    command = "import os; os.write(1, b'x' * 60_000 + bytes([10])), os.write(2, b'end')"
    wait = roexec.RunningCommand.wait

    def late(self, *values, **more):
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        return wait(self, *values, **more)
    monkeypatch.setattr(roexec.RunningCommand, "wait", late)
    run = perform(store, [sys.executable, "-c", command])
    assert sorted(output_of(store, run).split()) == ["end", "x" * 60_000]


def test_what_others_still_write_is_kept_where_its_reader_is_held_up_meanwhile(store, tmp_path,
                                                                             monkeypatch):
    clock, read, ahead = time.monotonic, roexec.RunningCommand._read, [0]
    monkeypatch.setattr(time, "monotonic", lambda: clock() + ahead[0])

    def late(self, seconds, most_waiting=0):
        held_up = most_waiting == 64 and not ahead[0]
        read(self, 0 if held_up else seconds, most_waiting)
        if held_up:
            (tmp_path / "go").touch()
            wait_for((tmp_path / "said").exists)
            ahead[0] = 600
    monkeypatch.setattr(roexec.RunningCommand, "_read", late)
    run = perform(store, f"(until test -e {tmp_path}/go; do sleep 0.02; done; echo late; "
                  f": > {tmp_path}/said) &")
    assert (output_of(store, run), ahead) == ("late\n", [600])


def test_a_daemon_without_our_output_is_left_and_nobody_waits(store, tmp_path, monkeypatch):
    monkeypatch.setattr(roexec, "_DRAIN", 60)
    run = perform(store, f"setsid sleep 600 >/dev/null 2>&1 & echo $! > {tmp_path}/pid")
    assert run["finished_at"] - run["started_at"] < 30
    assert "output" not in read_log_of(store, run["id"])
    assert is_alive(read_pid(tmp_path / "pid"))


def test_leftovers_are_killed_where_the_job_wants_that(store):
    run = perform(store, "(trap '' TERM; sleep 600) & setsid sleep 600 & exit 4",
                  leftovers="kill", grace=0.1)
    assert (run["state"], run["exit_code"]) == ("failed", 4)
    assert not descendants() and "Killed" in read_log_of(store, run["id"])


# Timeout and cancel.

def test_a_command_that_has_ended_in_time_is_not_timed_out_where_its_supervisor_is_held_up(
        store, monkeypatch):
    clock, look, ahead = time.monotonic, roexec.RunningCommand._has_ended, [0]
    monkeypatch.setattr(time, "monotonic", lambda: clock() + ahead[0])

    def late(self):
        ended = look(self)
        if not ended:
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            ahead[0] = 600
        return ended
    monkeypatch.setattr(roexec.RunningCommand, "_has_ended", late)
    run = perform(store, "sleep 0.1", timeout=300)
    assert (run["state"], ahead) == ("succeeded", [600])


def test_a_total_timeout_comes_no_earlier_where_the_supervisor_is_held_up(store, monkeypatch):
    clocks, ahead, found = (time.time, time.monotonic), [0], []
    monkeypatch.setattr(time, "time", lambda: clocks[0]() + ahead[0])
    monkeypatch.setattr(time, "monotonic", lambda: clocks[1]() + ahead[0])
    total_left, deadlines = roexec.Supervision._total_left, roexec.Supervision._deadlines

    def held_up(supervision):
        ahead[0] += 600
        return total_left(supervision)

    def look(supervision, timeout, attempt):
        with monkeypatch.context() as patch:
            patch.setattr(roexec.Supervision, "_total_left", held_up)
            (deadline, _), = deadlines(supervision, timeout, attempt)
        found.append(deadline - time.monotonic() - total_left(supervision))
        return ()
    monkeypatch.setattr(roexec.Supervision, "_deadlines", look)
    assert perform(store, total_timeout=3600)["state"] == "succeeded"
    assert found[0] > -1


class Dying:
    """A process that ends after some signal has come; the first look and signals take their time."""

    def __init__(self, monkeypatch, end, looks=0, signals=0):
        self.end, self.looks, self.signals, self.now, self.told = end, looks, signals, 0.0, []
        self.ended = False
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(roexec, "_signal_all", self.signal)

    def left(self):
        self.now, self.looks = self.now + self.looks, 0
        return {} if self.ended else {7: roexec.Process(parent=1, alive=True)}

    def signal(self, found, number):
        if found:
            self.told.append(number)
            self.now += self.signals

    def pause(self, seconds):
        self.now += seconds
        self.ended = self.end in self.told

    def end_all(self, grace):
        return roexec._end_all(self.left, signal.SIGTERM, grace, self.pause, lambda: None)


def test_the_grace_counts_from_the_signal_on_however_long_the_look_before_it_takes(monkeypatch):
    process = Dying(monkeypatch, signal.SIGTERM, looks=600)
    assert process.end_all(2) == (1, 0) and signal.SIGKILL not in process.told


def test_what_ends_while_the_supervisor_is_held_up_is_no_survivor(monkeypatch):
    process = Dying(monkeypatch, signal.SIGKILL, signals=600)
    assert process.end_all(0) == (1, 0)
    assert Dying(monkeypatch, None).end_all(0) == (1, 1)


def test_a_timeout_leaves_no_process_behind(store, ready):
    run = perform(store, 'trap "" TERM; sleep 600 & setsid sleep 600 & sleep 600 & '
                  f": > {ready}; wait", timeout=0.1, grace=0.2)
    assert (run["state"], run["reason"]) == ("timed_out", "timeout")
    assert roexec.exit_status(run) == 124
    assert not descendants() and "Killed 4 processes" in read_log_of(store, run["id"])


def test_a_command_that_obeys_ends_within_its_grace(store, ready):
    run = perform(store, f"trap 'echo bye; exit 5' TERM; sleep 600 & : > {ready}; wait",
                  timeout=0.1, grace=60)
    assert (run["state"], run["exit_code"]) == ("timed_out", 5)
    assert output_of(store, run) == "bye\n"
    assert run["finished_at"] - run["started_at"] < 30


def test_the_eldest_process_is_told_to_end_first(monkeypatch):
    # or else a script would go on with its next command
    starts, told = {7: 30, 3: 20, 9: 10}, []
    monkeypatch.setattr(roexec, "process_start", starts.get)
    monkeypatch.setattr(os, "kill", lambda pid, number: told.append((pid, number)))
    roexec._signal_all({pid: roexec.Process(parent=1, session=1, start=start, alive=True)
                        for pid, start in starts.items()}, signal.SIGTERM)
    assert [pid for pid, number in told if number == signal.SIGTERM] == [9, 3, 7]


def test_a_stopped_command_ends_too(store):
    run = perform(store, "kill -STOP $$", timeout=0.1, grace=60)
    assert (run["state"], run["signal"]) == ("timed_out", "SIGTERM")


def test_waiting_for_the_grace_costs_no_cpu(store, ready, monkeypatch):
    looks, look = [], roexec.RunningCommand._has_ended

    def count(command):
        looks.append(1)
        return look(command)
    monkeypatch.setattr(roexec.RunningCommand, "_has_ended", count)
    perform(store, f"(trap '' TERM; : > {ready}; sleep 600) & exec sleep 600", timeout=0.05,
            grace=1.6)
    assert len(looks) < 300             # some at each pause, and not as many as there can be
    assert not descendants()


def test_what_is_printed_during_the_grace_is_kept(store, ready):
    run = perform(store, f"trap 'seq 30000; exit 1' TERM; sleep 600 & : > {ready}; wait",
                  timeout=0.1, grace=60)
    assert output_of(store, run).splitlines()[-1] == "30000"


@pytest.mark.parametrize("long", ["40d", "36500d"])
def test_a_very_long_timeout_is_no_error(store, long):
    run = perform(store, "exit 3", timeout=long, total_timeout=long)
    assert run["exit_code"] == 3


def test_a_very_long_backoff_can_be_cancelled(store):
    journal = claimed(store, make_job("exit 1", retries=1, backoff="40d"))
    pid = in_child(lambda: roexec.Supervision(journal, store.folder, roexec.Signals()).perform())
    journal.close()
    wait_for(lambda: "retry" in events_of(Journal.glance(journal.path)))
    Journal.glance(journal.path).cancel("user")
    assert end_of(pid) == 0
    roexec.settle(store)
    assert read_run(store, journal.run_id)["state"] == "cancelled"


def test_a_pause_whose_end_has_passed_does_not_wait_for_ever(store, monkeypatch):
    journal = claimed(store, make_job())
    supervision = roexec.Supervision(journal, store.folder, roexec.Signals())
    instants = iter([0.0, 0.9, 3.5, 4.0, 4.0, 4.0])         # a suspend between two readings
    monkeypatch.setattr(time, "monotonic", lambda: next(instants))
    before = signal.signal(signal.SIGALRM, supervision.signals._ask)    # ends it as a cancel
    signal.alarm(60)
    try:
        assert supervision._pause(1) is True
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        supervision.signals.close()
        journal.close()


def test_sigterm_ends_a_run_gracefully_and_nothing_is_tried_again(store, marks):
    job = make_job(f"trap 'echo bye; exit 1' TERM; sleep 600 & echo x >> {marks.path}; wait",
                   retries=5, backoff=0, hooks={name: f"echo {name} >> {marks.path}"
                                                for name in roexec.HOOKS})
    journal = claimed(store, job)
    pid = in_child(lambda: roexec.Supervision(journal, store.folder, roexec.Signals()).perform())
    journal.close()
    wait_for(lambda: "x" in marks())
    os.kill(pid, signal.SIGTERM)
    assert end_of(pid) == 0
    roexec.settle(store)
    run = read_run(store, journal.run_id)
    assert (run["state"], run["reason"]) == ("cancelled", "shutdown")
    assert marks() == ["pre_run", "x", "post_run"] and output_of(store, run) == "bye\n"


def test_the_hook_at_the_end_of_a_cancelled_run_keeps_its_condition(store, marks):
    hook = {"command": f"echo post >> {marks.path}", "condition": "sleep 0.05; true"}
    journal = claimed(store, make_job("sleep 600", hooks={"post_run": hook}))
    journal.cancel("user")
    assert supervise(store, journal)["state"] == "cancelled"
    assert marks() == ["post"]


# Attempts.

def test_failed_attempts_are_tried_again_after_a_growing_backoff(store):
    journal = claimed(store, make_job("exit $ROEXEC_ATTEMPT", retries=3,
                                      backoff={"delay": 0.02, "factor": 2, "max": 0.06}))
    run = supervise(store, journal)
    attempts = read_attempts(store, run["id"])
    assert [row["exit_code"] for row in attempts] == [1, 2, 3, 4] and run["exit_code"] == 4
    said = [line.partition("[INFO] Retrying ")[2] for line in
            read_log_of(store, run["id"]).splitlines() if "Retrying" in line]
    assert said == ["(1/3) after backoff 20ms", "(2/3) after backoff 40ms",
                    "(3/3) after backoff 60ms"]
    for before, after in zip(attempts, attempts[1:]):
        assert after["started_at"] >= before["finished_at"] + 0.02
    assert run["started_at"] == attempts[0]["started_at"]


@pytest.mark.parametrize("retry_on, command, attempts", [
    (None, "exit 1", 2), (None, "kill -9 $$", 2), (None, "sleep 60", 2), (None, "exit 127", 2),
    ({"exit_codes": [75]}, "exit 75", 2), ({"exit_codes": [75]}, "exit 1", 1),
    ({"exit_codes": [75]}, "kill -9 $$", 1), ({"signal": True}, "kill -9 $$", 2),
    ({"signal": True}, "exit 1", 1), ({"timeout": True}, "sleep 60", 2),
    ({"exit_codes": [75]}, "sleep 60", 1)])
def test_only_what_retry_on_lists_is_tried_again(store, retry_on, command, attempts):
    run = perform(store, command, retries=1, backoff=0, retry_on=retry_on,
                  timeout=0.15 if command == "sleep 60" else 60)
    assert len(read_attempts(store, run["id"])) == attempts


def test_what_counts_as_success_is_not_tried_again(store):
    run = perform(store, "exit 4", retries=3, success={"exit_codes": [0, 4]})
    assert (run["state"], run["exit_code"]) == ("succeeded", 4)
    assert roexec.exit_status(run) == 4


def test_the_total_timeout_counts_from_the_first_start_and_ends_all_attempts(store, monkeypatch):
    deadlines = roexec.Supervision._deadlines

    def an_hour_later(supervision, *values):
        attempts = supervision.progress.attempts
        if len(attempts) == 3:
            attempts[0]["started_at"] -= 3600
        return deadlines(supervision, *values)
    monkeypatch.setattr(roexec.Supervision, "_deadlines", an_hour_later)
    run = perform(store, "test $ROEXEC_ATTEMPT = 3 && exec sleep 600; exit 1", retries=500,
                  backoff=0, total_timeout=3600)
    assert (run["state"], run["reason"]) == ("timed_out", "total_timeout")
    assert [row["exit_code"] for row in read_attempts(store, run["id"])] == [1, 1, None]
    assert run["finished_at"] - run["started_at"] < 300


def test_no_attempt_is_waited_for_that_could_not_start_within_the_total_timeout(store):
    run = perform(store, "exit 3", retries=5, backoff="1h", total_timeout="1m")
    assert (run["state"], run["exit_code"]) == ("failed", 3)


# Condition and hooks.

@pytest.mark.parametrize("condition, state, reason", [
    ("exit 0", "succeeded", None), ("exit 1", "skipped", "condition"),
    ("exit 99", "skipped", "condition"), ("exit 126", "failed", "condition"),
    (["no-such-program"], "failed", "condition"), ("kill -9 $$", "failed", "condition")])
def test_a_condition_lets_a_run_go_on_skips_it_or_fails_it(store, marks, condition, state, reason):
    hooks = {name: f"echo {name} >> {marks.path}" for name in roexec.HOOKS}
    run = perform(store, "true", condition=condition, hooks=hooks)
    assert (run["state"], run["reason"]) == (state, reason)
    assert marks() == {"succeeded": ["pre_run", "on_success", "post_run"], "skipped": [],
                       "failed": ["on_failure", "post_run"]}[state]
    assert state == "succeeded" or not read_attempts(store, run["id"])


def described_hooks(marks):
    """Hooks that say what they were told, and read."""
    told = "${ROEXEC_STATUS-unset}:${ROEXEC_REASON-unset}:${ROEXEC_EXIT_CODE-unset}"
    return {name: f"echo {name} {told} ,$(cat | tr '\\n' ,) >> {marks.path}"
            for name in roexec.HOOKS}


def test_hooks_run_in_order_are_told_the_outcome_and_read_the_output(store, marks):
    run = perform(store, "echo out$ROEXEC_ATTEMPT; echo err >&2; exit 3", retries=1, backoff=0,
                  hooks=described_hooks(marks))
    assert (run["state"], run["exit_code"]) == ("failed", 3)
    first, second = sorted(("out1", "err")), sorted(("out2", "err"))
    names = [line.split(" ")[0] for line in marks()]
    assert names == ["pre_run", "on_retry", "on_failure", "post_run"]
    told = [line.split(" ")[1] for line in marks()]
    assert told == ["unset:unset:unset", "failed:exit:3", "failed:exit:3", "failed:exit:3"]
    read = [sorted(filter(None, line.split(" ")[2].split(","))) for line in marks()]
    assert read == [[], first, sorted(first + second), sorted(first + second)]


def test_the_next_attempt_does_not_see_what_hooks_were_told(store):
    run = perform(store, "echo ${ROEXEC_STATUS-unset}; exit 1", retries=1, backoff=0,
                  hooks={"on_retry": "true"})
    assert output_of(store, run) == "unset\nunset\n"


def test_hooks_of_a_success(store, marks):
    assert perform(store, "true", hooks=described_hooks(marks))["state"] == "succeeded"
    assert [line.split(" ")[:2] for line in marks()] == [
        ["pre_run", "unset:unset:unset"], ["on_success", "succeeded::0"],
        ["post_run", "succeeded::0"]]


def test_hooks_of_a_timeout(store, marks):
    run = perform(store, "exec sleep 60", timeout=0.1, hooks=described_hooks(marks))
    assert run["state"] == "timed_out"
    assert [line.split(" ")[:2] for line in marks()][1:] == [
        ["on_failure", "timed_out:timeout:"], ["post_run", "timed_out:timeout:"]]


def test_a_failing_pre_run_fails_the_run_without_an_attempt(store, marks):
    hooks = {name: f"echo {name} >> {marks.path}" for name in roexec.HOOKS}
    run = perform(store, f"echo attempt >> {marks.path}", retries=5,
                  hooks={**hooks, "pre_run": ["exit 1", f"echo second >> {marks.path}"]})
    assert (run["state"], run["reason"]) == ("failed", "pre_run")
    assert marks() == ["second", "on_failure", "post_run"]
    assert roexec.exit_status(run) == 125


@pytest.mark.parametrize("hook", ["exit 1", "kill -9 $$", ["no-such-program"],
                                  {"command": "sleep 60", "timeout": 0.1}])
def test_a_hook_at_the_end_never_changes_the_state(store, hook):
    if isinstance(hook, list):
        hook = {"command": hook}
    run = perform(store, "true", hooks={"on_success": hook, "post_run": hook})
    assert (run["state"], run["reason"], run["exit_code"]) == ("succeeded", None, 0)
    assert "Hook on_success failed" in read_log_of(store, run["id"])
    assert not descendants()


@pytest.mark.parametrize("condition, runs", [
    ("true", True), ("false", False), ("kill -9 $$", False), (["no-such-program"], False)])
def test_a_hook_runs_only_if_its_condition_succeeds(store, marks, condition, runs):
    hooks = [{"command": f"echo a >> {marks.path}", "condition": condition},
             f"echo b >> {marks.path}"]
    perform(store, "true", hooks={"on_success": hooks})
    assert marks() == (["a", "b"] if runs else ["b"])


def test_hooks_read_the_newest_mebibyte_of_output(store, tmp_path):
    perform(store, "seq 1 400000", hooks={"on_success": f"cat > {tmp_path}/read"})
    lines = (tmp_path / "read").read_text().splitlines()
    assert lines[-1] == "400000" and 20_000 < len(lines) < 400_000
    assert lines == [str(number) for number in range(int(lines[0]), 400_001)]


# Supervisors of a server.

def test_a_message_without_its_file_is_refused_aloud():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.send(b"abcdefghij")
        with pytest.raises(roexec.RoexecError, match="without its file"):
            roexec.receive_descriptors(theirs)


def test_the_lock_goes_with_the_descriptor_and_no_command_inherits_it(store):
    journal = claimed(store, make_job("ls -l /proc/self/fd"))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    roexec.send_descriptor(ours, journal.run_id, journal.descriptor)
    journal.close()
    ours.close()                                    # the lock lives on in flight
    assert Journal.find(journal.path) is None
    pid = in_child(lambda: roexec.serve_runs(theirs, store.folder, roexec.perform_run))
    theirs.close()
    assert end_of(pid) == 0
    roexec.settle(store)
    run = read_run(store, journal.run_id)
    assert run["state"] == "succeeded" and "active" not in output_of(store, run)


# A command that is not recorded.

@pytest.mark.parametrize("words, status", [
    (["sh", "-c", "exit 7"], 7), (["sh", "-c", "kill -9 $$"], 137),
    (["sh", "-c", "kill -40 $$"], 168), (["no-such-program"], 127), (["/tmp"], 126)])
def test_exec_gives_the_exit_status_of_the_command(words, status, capfd):
    assert roexec.exec_here(words) == status
    assert capfd.readouterr().err.startswith("roexec: " if status in (126, 127) else "")


def test_exec_forwards_signals_and_leaves_nothing(tmp_path):
    command = f"trap 'kill $!; exit 9' INT; sleep 600 & echo $$ > {tmp_path}/pid; wait"
    pid = in_child(lambda: roexec.exec_here(["sh", "-c", command]))
    read_pid(tmp_path / "pid")
    os.kill(pid, signal.SIGINT)
    assert end_of(pid) == 9
    wait_for(lambda: not descendants())
