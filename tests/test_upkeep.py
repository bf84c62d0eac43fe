"""Upkeep: what goes with time and what stays, what a kill in the middle leaves, and the copies."""
import contextlib
import io
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import tarfile
import threading
import time
from http.client import HTTPConnection

import pytest
from big_store import fill, write_log
from helpers import (apply, claimed, end_of, in_child, make_job, perform, read_run, read_runs,
                     wait_for)

import roexec
from roexec import RoexecError, Upkeep, keep_small, list_logs, remove_runs, why_no_log

DAY = 86400
HERE = os.path.dirname(roexec.__file__)
pytestmark = pytest.mark.usefixtures("clean")


def add(store, run_id, days, state="succeeded", job_id="x", log=False, **columns):
    """Add a run that ended some days ago -> its id."""
    at = time.time() - days * DAY
    path = write_log(store, job_id, run_id, at) if log else None
    if path:
        os.utime(store.file(path), (at, at))
    ended = None if state in ("queued", "running") else at
    with store.write() as db:
        return roexec.add_run(db, **{
            "id": run_id, "job_id": job_id, "trigger": "manual", "state": state, "queued_at": at,
            "started_at": at, "finished_at": ended, "log": path,
            "reason": (roexec.REASONS.get(state) or (None,))[0], **columns})


def ids(store, **columns):
    return [row["id"] for row in read_runs(store, **columns)]


def settings(store, **what):
    with store.write() as db:
        roexec.set_settings(db, {"defaults": what, "scheduler": {}, **what})


def purge(store, **how):
    upkeep = Upkeep(store, None)
    upkeep.purge_runs(**how)
    return upkeep


def purging(store, **how):
    """The process id of a child that does that."""
    return in_child(lambda: print(purge(roexec.Store(store.path), **how).told()))


def log_names(store, job_id="x"):
    return sorted(os.listdir(store.file(f"logs/{job_id}")))


# Runs.

def test_runs_go_by_the_age_of_their_end_but_the_newest_and_the_newest_failed(store):
    for number, (days, state) in enumerate([
            (400, "failed"), (300, "failed"), (200, "succeeded"), (100, "succeeded"),
            (95, "cancelled"), (91, "skipped")]):
        add(store, f"run{number}", days, state)
    assert purge(store).freed["runs"] == 3
    assert ids(store) == ["run1", "run4", "run5"]


def test_a_run_that_began_long_ago_and_has_ended_lately_stays(store):
    add(store, "long", 200, finished_at=time.time() - DAY)
    add(store, "new", 0)
    purge(store)
    assert ids(store) == ["long", "new"]


def test_a_row_of_skipped_slots_counts_from_its_last_one(store):
    add(store, "grown", 200, "skipped", slot=1, last_slot=int(time.time()) - DAY)
    add(store, "old", 200, "skipped", slot=2, last_slot=int(time.time()) - 100 * DAY)
    add(store, "new", 0)
    purge(store)
    assert ids(store) == ["grown", "new"]


@pytest.mark.parametrize("state", ["queued", "running"])
def test_a_run_that_is_on_is_never_touched(store, state):
    add(store, "on", 500, state)
    for number in range(5):
        add(store, f"new{number}", 400 - number)
    purge(store, newest=1)
    assert ids(store) == ["on", "new4"]
    purge(store, older=0)
    assert ids(store) == ["on", "new4"]


def test_of_a_job_only_the_newest_runs_stay(store):
    settings(store, history={"runs": 2})
    for number in range(5):
        add(store, f"x{number}", 1)
        add(store, f"y{number}", 1, job_id="y")
    assert purge(store).freed["runs"] == 6
    assert ids(store) == ["x3", "y3", "x4", "y4"]


def test_a_job_says_itself_what_stays_of_it(store):
    settings(store, history={"keep": "10d"})
    apply(store, make_job(job_id="mine", history={"keep": "3d"}), make_job(job_id="usual"))
    for job_id in ("mine", "usual", "none"):
        for days in (11, 5, 1):
            add(store, f"{job_id}{days}", days, job_id=job_id)
    purge(store)
    assert sorted(ids(store)) == ["mine1", "none1", "none5", "usual1", "usual5"]


def test_of_a_deleted_job_stays_what_it_has_said(store):
    apply(store, make_job(history={"keep": "3d"}))
    for days in (5, 1):
        add(store, f"x{days}", days)
    with store.write() as db:
        roexec.delete_jobs(db, ["x"], time.time())
    purge(store)
    assert ids(store) == ["x1"]


@pytest.mark.parametrize("how, left", [
    ({"older": 30 * DAY}, ["x20", "x10", "y20", "y10"]),
    ({"older": 30 * DAY, "newest": 3}, ["x40", "x20", "x10", "y40", "y20", "y10"]),
    ({"older": 15 * DAY, "job_id": "x"}, ["x10", "y40", "y20", "y10"]),
    ({"newest": 1}, ["x10", "y10"]),
    ({"newest": 2, "job_id": "y"}, ["x40", "x20", "x10", "y20", "y10"])])
def test_a_person_says_what_goes(store, how, left):
    for job_id in "xy":
        for days in (40, 20, 10):
            add(store, f"{job_id}{days}", days, job_id=job_id)
    purge(store, **how)
    assert ids(store) == left


def test_a_parent_goes_with_its_steps_and_theirs(store):
    add(store, "whole", 100)
    add(store, "step", 100, parent="whole", step="a", log=True)
    add(store, "inner", 100, parent="step", step="c")
    add(store, "job", 10, parent="inner", job_id="other")       # {job: other}, a run of its own
    add(store, "new", 0)
    upkeep = purge(store)
    assert (ids(store), upkeep.freed["runs"], upkeep.freed["logs"]) == (["job", "new"], 1, 1)
    assert log_names(store) == []


def test_steps_do_not_count_among_the_runs_of_a_job(store):
    for number in range(3):
        add(store, f"run{number}", 1)
        for step in range(4):
            add(store, f"step{number}{step}", 1, parent=f"run{number}", step=f"s{step}")
    purge(store, newest=2)
    assert ids(store, parent=None) == ["run1", "run2"] and len(ids(store)) == 10


def test_a_run_that_one_which_is_on_has_asked_for_stays(store):
    """Its row is what keeps it from being asked for again."""
    add(store, "asked", 100, job_id="y", cause="asker/0")
    add(store, "newer", 100, job_id="y")
    add(store, "asker", 101, "running")
    purge(store)
    assert "asked" in ids(store)
    with store.write() as db:
        roexec.finish_run(db, "asker", "succeeded", [], finished_at=time.time())
    purge(store)
    assert ids(store) == ["newer", "asker"]


def test_what_a_run_retries_stays_while_that_is_on(store):
    """A retry takes over what steps have handed on."""
    add(store, "first", 100)
    add(store, "step", 100, parent="first", step="a")
    add(store, "second", 99, retry_of="first")
    add(store, "third", 1, "running", retry_of="second")
    add(store, "new", 0)
    purge(store)
    assert ids(store) == ["first", "step", "second", "third", "new"]
    with store.write() as db:
        roexec.finish_run(db, "third", "succeeded", [], finished_at=time.time())
    purge(store)
    assert ids(store) == ["third", "new"]


def test_settled_notices_and_old_answers_are_forgotten(store):
    now = time.time()
    with store.write() as db:
        for days in (10, 1):
            number = roexec.add_notice(db, "webhook", "http://x/", None, b"", now - days * DAY)
            roexec.notice_sent(db, number)
            db.execute("INSERT INTO answers VALUES (?, 'r', 'run', ?)", (str(days),
                                                                       now - days * DAY + 60))
        roexec.add_notice(db, "webhook", "http://x/", None, b"", now - 20 * DAY)
    keep_small(store)
    with store.read() as db:
        states = [row[0] for row in db.execute("SELECT state FROM outbox ORDER BY id")]
        answers = [row[0] for row in db.execute("SELECT key FROM answers")]
    assert (states, answers) == (["sent", "waiting"], ["1"])


def test_positions_and_the_last_run_of_a_job_stay(store):
    apply(store, make_job(schedule="0 0 1 1 *"))
    add(store, "first", 100)
    with store.write() as db:
        db.execute("UPDATE jobs SET last_run = 'first', position = 12345")
    add(store, "second", 99, "skipped", reason="paused")
    add(store, "third", 98, "cancelled")
    purge(store, older=0)
    with store.read() as db:
        row = roexec.get_job(db, "x")
    assert (row["last_id"], row["position"]) == ("first", 12345)


def test_attempts_go_with_their_run(store):
    run = perform(store)
    perform(store)
    purge(store, newest=1)
    with store.read() as db:
        assert roexec.get_attempts(db, run["id"]) == [] != roexec.get_attempts(
            db, ids(store)[0])


def test_a_dry_run_counts_the_same_and_changes_nothing(store):
    settings(store, history={"keep": "30d", "runs": 3})
    for days in (90, 50, 20, 10, 5, 1):
        add(store, f"run{days}", days, log=days > 5)
    before, names = ids(store), log_names(store)
    foreseen = keep_small(store, dry_run=True)
    assert (ids(store), log_names(store)) == (before, names)
    done = keep_small(store)
    assert foreseen.freed["runs"] == done.freed["runs"] == 3
    assert ids(store) == ["run10", "run5", "run1"]
    assert foreseen.told().startswith("3 runs, 4 logs; would free ")


# Logs.

def test_a_log_goes_before_its_run_and_one_is_told_when_and_why(store):
    apply(store, make_job(log={"keep": "3d"}))
    for days in (5, 4, 1):
        add(store, f"run{days}", days, log=True)
    assert keep_small(store).freed["logs"] == 2
    run = read_run(store, "run5")
    assert run["log"] is None and why_no_log(run) == (
        f"the log of run run5 was removed {run['log_gone']}")
    assert run["log_gone"].endswith("since its run had ended more than 3d before (log.keep)")
    assert len(log_names(store)) == 1


def test_the_newest_run_and_the_newest_failed_one_keep_their_logs(store):
    for number, state in enumerate(["failed", "failed", "succeeded", "succeeded"]):
        add(store, f"run{number}", 50 - number, state, log=True)
    keep_small(store)
    assert [row["id"] for row in read_runs(store) if row["log"]] == ["run1", "run3"]
    assert len(log_names(store)) == 2


def test_logs_of_steps_go_with_that_of_the_whole(store):
    add(store, "whole", 8, log=True)
    add(store, "step", 10, parent="whole", step="a", log=True)
    add(store, "on", 20, "running")
    add(store, "early", 15, parent="on", step="a", log=True)
    add(store, "new", 0)
    keep_small(store)
    assert [row["id"] for row in read_runs(store) if row["log"]] == ["early"]


def test_a_changed_setting_applies_to_what_is_there(store):
    for days in (5, 1, 0):
        add(store, f"run{days}", days, log=True)
    assert keep_small(store).freed["logs"] == 0
    settings(store, log={"keep": "2d"}, history={"keep": "12h"})
    upkeep = keep_small(store)
    assert (ids(store), upkeep.freed["runs"]) == (["run0"], 2)


def read(store, run_id):
    with roexec.StoredLog(store.file(read_run(store, run_id)["log"])) as log:
        return log.read(0, 1 << 20)[1]


def test_a_log_is_packed_a_day_after_the_end_of_its_run(store):
    for days in (2, 0.5):
        add(store, f"run{days}", days, log=True)
    before = read(store, "run2")
    assert keep_small(store).freed["logs packed"] == 1
    assert [name.endswith(".gz") for name in log_names(store)] == [True, False]
    assert read(store, "run2") == before != b""
    assert keep_small(store).told() == ""


def test_a_log_of_a_run_that_is_on_is_left_alone_however_old(store):
    journal = claimed(store, make_job())
    log = roexec.LogWriter(store.folder, "x", 1000, journal.run_id)
    log.write("Starting run", 1000)
    journal.note("supervisor", pid=os.getpid(), start=0, log=log.path)
    os.utime(store.file(log.path), (1000, 1000))
    keep_small(store)
    assert log_names(store) == [os.path.basename(log.path)]
    log.close(1000)
    journal.close()


def test_a_log_of_no_run_goes_when_it_is_as_old_as_others_may_be(store):
    """So a kill between the removal of a row and that of its log leaves nothing for ever."""
    add(store, "old", 20, log=True)
    add(store, "young", 3, log=True)
    add(store, "new", 0)
    with store.write() as db:
        assert set(remove_runs(db, ["old", "young"])[0]) == {"old", "young"}
    assert keep_small(store).freed["logs of no run"] == 1
    assert len(log_names(store)) == 1


def test_a_log_that_is_too_large_is_cut_also_where_it_is_packed_already(store):
    at = time.time() - 2 * DAY
    for run_id, more in (("before", 0), ("after", 100)):
        log = roexec.LogWriter(store.folder, "x", at + more, run_id)
        for number in range(20_000):
            log.output("out", b"%0100d\n" % number, at)
        log.close(at)
        add(store, run_id, 2, log=False)
        with store.write() as db:
            roexec.set_log(db, run_id, log.path)
        os.utime(store.file(log.path), (at, at))
        keep_small(store)                           # packs the first, then settles the second too
    settings(store, log={"max_size": "1M"})
    keep_small(store)
    for run_id in ("before", "after"):
        path = store.file(read_run(store, run_id)["log"])
        pieces = [(lines.is_gap, len(lines.data)) for lines in roexec.follow(path)]
        kept = sum(size for is_gap, size in pieces if not is_gap)
        assert any(is_gap for is_gap, _ in pieces) and 900_000 < kept <= 1 << 20
        assert b"%0100d" % 19_999 in roexec.newest_lines(path, 1000)


def test_what_cannot_be_packed_for_want_of_room_stays_as_it_was(store, monkeypatch):
    add(store, "run", 2, log=True)
    before = read(store, "run")
    monkeypatch.setattr(roexec.os, "fsync", lambda number: (_ for _ in ()).throw(
        OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        Upkeep(store, None).tend_files()
    assert read(store, "run") == before
    assert [name for name in log_names(store) if "gz" in name] == []


# Kills.

def killed_at(number, function):
    """Perform a function in a child that is killed at its n-th change of a file's name; whether it
    came so far."""
    calls = iter(range(number))

    def body():
        for name in ("replace", "unlink", "rmdir", "rename"):
            def dying(*values, original=getattr(os, name), **more):
                if next(calls, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*values, **more)
            setattr(os, name, dying)
        function()
    return end_of(in_child(body)) == -signal.SIGKILL


def test_a_kill_at_any_instant_loses_no_line_and_is_mended_by_the_next_time(store):
    def lay():
        log = roexec.LogWriter(store.folder, "x", 1000, "killed", most=1 << 16)
        for number in range(3000):
            log.output("out", b"%0100d\n" % number, 1000)
        log.close(1000)
        return log.path
    number, more = 0, True
    add(store, "killed", 2)
    while more:
        path = lay()
        with store.write() as db:
            roexec.set_log(db, "killed", path)
        for file in list_logs(store.folder, "x")[0][path].files:
            os.utime(store.file(file), (1000, 1000))
        before = b"".join(piece.data for piece in roexec.follow(store.file(path)))
        more = killed_at(number, lambda: keep_small(roexec.Store(store.path)))
        assert b"".join(piece.data for piece in roexec.follow(store.file(path))) == before
        keep_small(store)
        assert b"".join(piece.data for piece in roexec.follow(store.file(path))) == before
        assert list_logs(store.folder, "x")[0][path].is_packed
        roexec.remove_log(store.folder, path)
        assert log_names(store) == []
        number += 1
    assert number > 5


def test_a_kill_in_the_middle_of_a_purge_leaves_runs_whole(store):
    fill(store, 2000, 10, logs=200)
    pid = purging(store, newest=5)
    wait_for(lambda: len(read_runs(store)) < 1900)
    os.kill(pid, signal.SIGKILL)
    end_of(pid)
    with store.read() as db:
        assert db.execute("SELECT COUNT(*) FROM attempts WHERE run_id NOT IN "
                          "(SELECT id FROM runs)").fetchone()[0] == 0
    purge(store, newest=5)
    assert 50 <= len(ids(store, parent=None)) < 100


# The thread of a server.

def test_a_packed_log_is_read_over_http_and_by_those_who_send_its_end(store):
    add(store, "run", 2, log=True)
    keep_small(store)
    path = read_run(store, "run")["log"]
    assert log_names(store) == [os.path.basename(path) + ".gz"]
    assert roexec.output_tail(store.file(path)) == b"working\nstill working\n"
    http = roexec.start_http(store, "127.0.0.1", 0, lambda *_: None, roexec.Access(
        roexec.Config().server, lambda *_: None))
    try:
        connection = HTTPConnection(*http.address[:2])
        connection.request("GET", "/api/v1/runs/run/logs?raw=1")
        assert connection.getresponse().read() == b"working\nstill working\n"
        connection.request("GET", "/api/v1/runs/run/logs?tail=1")
        assert b"Completed, exit=0" in connection.getresponse().read()
        connection.close()
    finally:
        http.close()


def test_a_server_does_it_daily_and_soon_after_its_start(store):
    said = []
    add(store, "old", 100)
    add(store, "new", 0)
    store.keep_open()
    steward = roexec.Steward(store, lambda text, level="INFO": said.append(text), first=0)
    copy = store.file("backup/roexec.db")
    wait_for(lambda: os.path.exists(copy) and done_at(store))
    steward.close()
    assert said == ["Upkeep: 1 run; freed 0 B"] and ids(store) == ["new"]
    assert ids(roexec.Store(copy)) == ["new"] and os.stat(copy).st_mode & 0o777 == 0o600
    add(store, "older", 100)
    add(store, "newest", 0)
    steward = roexec.Steward(store, said.append, first=0)
    with store.read() as db:                        # not again on this day
        assert time.time() - roexec.get_meta(db, "upkeep") < 60
    steward.close()
    assert "older" in ids(store)
    with store.write() as db:
        roexec.set_meta(db, "upkeep", time.time() - DAY - 1)
    steward = roexec.Steward(store, lambda text, level="INFO": None, first=0)
    wait_for(lambda: "older" not in ids(store))
    steward.close()
    store.close()


def done_at(store):
    with store.read() as db:
        return roexec.get_meta(db, "upkeep")


def test_one_process_alone_does_the_upkeep(store):
    lock = roexec.hold_upkeep(store)
    with pytest.raises(RoexecError, match="another process does the upkeep"):
        keep_small(store)
    os.close(lock)
    keep_small(store)


def test_a_full_disk_is_said_and_it_is_tried_again(store, monkeypatch):
    said = []
    monkeypatch.setattr(roexec, "_LOOK_AGAIN", 0.01)

    def full(self):
        if not said:
            raise OSError(28, "No space left on device", "/x/y")
    monkeypatch.setattr(Upkeep, "tend_files", full)
    steward = roexec.Steward(store, lambda text, level="INFO": said.append((text, level)), first=0)
    wait_for(lambda: done_at(store))
    steward.close()
    assert said == [("The upkeep has stopped: /x/y: No space left on device; it is tried again in "
                     "10ms", "ERROR")]


def test_what_holds_nothing_is_given_back_to_the_disk(store, monkeypatch):
    monkeypatch.setattr(roexec, "_LARGE", 1 << 16)
    fill(store, 18_000, 10)
    store.keep_open()
    store.checkpoint(1)
    before = os.stat(store.database).st_size
    upkeep = purge(store, newest=5)
    upkeep.give_back()
    store.checkpoint(1)
    store.close()
    after = os.stat(store.database).st_size
    assert before > 3 << 20 and after < 0.7 * before
    assert upkeep.freed["bytes"] == pytest.approx(before - after, rel=0.2)


# Others go on meanwhile.

def test_a_purge_leaves_the_store_to_others_all_the_time(store, monkeypatch):
    """It holds the lock for moments, of its own time, and leaves it for as long each time."""
    fill(store, 8000, 100)
    write, sleep, holds, pauses = roexec.Store.write, time.sleep, [], []

    @contextlib.contextmanager
    def timed(self):
        with write(self) as db:
            began = time.monotonic(), time.thread_time()
            yield db
            holds.append((time.thread_time() - began[1], time.monotonic() - began[0]))
    monkeypatch.setattr(roexec.Store, "write", timed)
    here = threading.get_ident()

    def noted(seconds):                 # not what threads of tests before do meanwhile
        if threading.get_ident() != here:
            return sleep(seconds)
        pauses.append(seconds)
    monkeypatch.setattr(time, "sleep", noted)
    purge(store, newest=5)
    assert len(read_runs(store)) < 1500
    assert len(holds) == len(pauses) > 10 and sorted(holds)[len(holds) // 2][0] < 0.05, holds
    assert sum(pause >= max(0.9 * held, roexec._PAUSE)
               for pause, (_, held) in zip(pauses, holds)) > len(holds) // 2


# Check.

def check(store, **how):
    return [(found.kind, found.text.replace(store.folder + "/", ""))
            for found in roexec.check_store(store, **how)]


def test_there_is_nothing_to_say_of_a_store_that_is_well(store):
    perform(store)
    add(store, "packed", 2, log=True)
    keep_small(store)
    assert check(store) == []


def test_a_log_that_somebody_removed_is_told_by_its_run(store):
    add(store, "run", 1, log=True)
    path = read_run(store, "run")["log"]
    roexec.remove_log(store.folder, path)
    assert check(store, dry_run=True) == [("mended", f"{path} is not there; its run says so now")]
    assert read_run(store, "run")["log"] == path
    assert check(store) == [("mended", f"{path} is not there; its run says so now")]
    assert "was removed by something else: it was not there on 20" in why_no_log(
        read_run(store, "run"))
    assert check(store) == []


def test_a_log_of_no_run_is_told_and_left(store):
    add(store, "run", 1, log=True)
    path = read_run(store, "run")["log"]
    with store.write() as db:
        remove_runs(db, ["run"])
    assert check(store) == [("left", f"{path} is of no run; it goes when it is as old as log.keep")]
    assert os.path.exists(store.file(path))


def test_a_log_of_a_run_that_was_lost_with_its_journal_is_found(store):
    at = time.time() - 100
    path = write_log(store, "x", "lostrun", at)
    with store.write() as db:
        roexec.add_run(db, id="lostrun", job_id="x", trigger="manual", state="lost",
                       reason="power", queued_at=at, started_at=at + 0.1, finished_at=at + 50)
    assert check(store) == [("mended", f"{path} is the log of run lostrun, which was lost")]
    assert read_run(store, "lostrun")["log"] == path and check(store) == []


def test_what_was_never_finished_is_removed(store):
    os.makedirs(store.file("logs/x"))
    os.mkdir(store.file("restore.new"))
    os.mkdir(store.file("backup"))
    for name in ("logs/x/2025-01-01T00:00:00.log.gz.new", "backup/new.db", "restore.new/x"):
        open(store.file(name), "w").close()
    names = {"logs/x/2025-01-01T00:00:00.log.gz.new", "backup/new.db", "restore.new"}
    assert set(check(store)) == {("mended", f"{name} was never finished; it is removed")
                                 for name in names}
    assert not any(os.path.exists(store.file(name)) for name in names)


def test_a_journal_of_another_store_is_told(store, tmp_path):
    other = roexec.Store(str(tmp_path / "other")).create()
    journal = claimed(other, make_job())
    path = f"active/{journal.run_id}"
    os.rename(other.file(path), store.file(path))
    with store.write() as db:
        roexec.store_id(db)
    assert [kind for kind, text in check(store) if text.startswith(path)] == ["wrong"]
    journal.close()


def test_a_run_that_is_on_is_nothing_wrong(store):
    journal = claimed(store, make_job())
    log = roexec.LogWriter(store.folder, "x", 1000, journal.run_id)
    log.write("Starting run", 1000)
    journal.note("supervisor", pid=os.getpid(), start=0, log=log.path)
    assert check(store) == []
    log.close(1000)
    journal.close()


def test_a_damaged_database_is_told_with_what_to_do(store):
    fill(store, 3000, 10)
    size = os.stat(store.database).st_size
    with open(store.database, "r+b") as file:           # nobody else has it open
        file.seek(size // 2)
        file.write(b"x" * 40_000)
    (kind, text), = check(store)
    assert kind == "wrong" and "the database is damaged" in text
    assert text.endswith("roexec maintenance restore backup/roexec.db")


# Copies.

def back_up(store, path, **how):
    with store.read() as db:
        jobs = roexec.exported_jobs(db, roexec.job_ids(db))
    roexec.back_up(store, str(path), roexec.job_to_yaml(jobs), progress=lambda *_: None, **how)
    return path


def put_back(path, store, **how):
    return roexec.restore(store, str(path), lambda *_: None, **how)


def content(store):
    """What one can see of a store: its runs, jobs and logs."""
    with store.read() as db:
        jobs = [(row["id"], row["spec"]) for row in roexec.list_jobs(db)]
    runs = read_runs(store)
    return jobs, runs, [read(store, row["id"]) for row in runs if row["log"]]


@pytest.fixture
def full(store):
    """A store with jobs, runs, and logs of all kinds."""
    apply(store, make_job(job_id="x", schedule="0 2 * * *"), make_job(job_id="y"))
    for days in (3, 2, 0):
        add(store, f"run{days}", days, log=True)
    keep_small(store)
    return store


@pytest.mark.parametrize("name", ["b.tar", "b.tar.gz", "b.tgz"])
def test_a_backup_comes_back_as_it_was(full, tmp_path, name):
    path = back_up(full, tmp_path / name, logs=True)
    assert path.stat().st_mode & 0o777 == 0o600 and sorted(os.listdir(tmp_path)) == [name, "store"]
    with tarfile.open(path) as archive:
        assert archive.getnames()[:2] == ["roexec.db", "jobs.yml"]
        jobs = archive.extractfile("jobs.yml").read()
    assert [job.id for job in roexec.read_job_file(jobs, "jobs.yml", "/").jobs] == ["x", "y"]
    other = roexec.Store(str(tmp_path / "other"))
    assert put_back(path, other) == ({"jobs": 2, "runs": 3}, None)
    assert content(other) == content(full)
    assert check(other) == []
    with other.write() as db:                           # and it is one to work with
        assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        assert db.execute("PRAGMA auto_vacuum").fetchone()[0] == 2


def test_a_backup_without_logs_says_so_of_each_run(full, tmp_path):
    path = back_up(full, tmp_path / "b.tar")
    other = roexec.Store(str(tmp_path / "other"))
    put_back(path, other)
    assert "when a backup without it was restored" in why_no_log(read_run(other, "run2"))


def test_what_was_there_before_a_restore_stays_beside_it(full, tmp_path):
    path = back_up(full, tmp_path / "b.tar", logs=True)
    before = content(full)
    add(full, "later", 0, log=True)
    later = content(full)
    _, old = put_back(path, full)
    assert content(full) == before and check(full) == []
    assert content(roexec.Store(old)) == later


@pytest.mark.parametrize("packing", ["daily", "tar", "member"])
def test_the_daily_copy_is_enough(full, tmp_path, packing):
    Upkeep(full, None).copy()
    before = content(full)
    add(full, "later", 0)
    path = full.file("backup/roexec.db")
    other = full
    if packing == "tar":                    # of the whole folder, as anybody would make it
        path, other = tmp_path / "plain.tar.gz", roexec.Store(str(tmp_path / "other"))
        subprocess.run(["tar", "czf", path, "-C", tmp_path, "store"], check=True)
    elif packing == "member":
        path, other = tmp_path / "plain.tar", roexec.Store(str(tmp_path / "other"))
        subprocess.run(["tar", "cf", path, "-C", full.folder, "."], check=True)
    put_back(path, other)
    assert content(other) == before and check(other) == []


def test_a_store_in_one_file_is_restored_too(full, tmp_path):
    path = back_up(full, tmp_path / "b.tar", logs=True)
    other = roexec.Store(str(tmp_path / "one.db"))
    put_back(path, other)
    assert content(other) == content(full)
    put_back(path, other)
    assert content(other) == content(full)


def written(store):
    with store.read() as db:
        return roexec.get_meta(db, "a", 0)


def test_a_copy_is_of_one_instant_while_others_write(store, tmp_path):
    fill(store, 5000, 10)
    stop = threading.Event()

    def write():
        while not stop.is_set():
            with store.write() as db:
                number = roexec.get_meta(db, "a", 0) + 1
                roexec.set_meta(db, "a", number)
                db.execute("UPDATE runs SET priority = ?", (number,))
            store.checkpoint(1)
    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = []
        for _ in range(3):
            wait_for(lambda: written(store) > max(seen, default=0))
            store.copy_to(str(tmp_path / "copy.db"), lambda *_: time.sleep(0.02))
            copy = roexec.Store(str(tmp_path / "copy.db"))
            with copy.read() as db:
                assert roexec.problems_of(db) == []
                priorities = {row[0] for row in db.execute("SELECT priority FROM runs")}
                assert priorities == {roexec.get_meta(db, "a", 0)}
                seen += priorities
    finally:
        stop.set()
        writer.join()
    assert sorted(set(seen)) == seen


def test_a_long_look_at_the_database_holds_up_no_writer(store):
    store.keep_open()
    with store.read() as db:
        roexec.get_meta(db, "x")
        taken = []
        for number in range(50):
            with store.write() as writing:
                roexec.set_meta(writing, "x", os.urandom(100_000))
            began = time.monotonic()
            store.checkpoint(1)
            taken.append(time.monotonic() - began)
            if len(taken) >= 5:                     # and not as long as a writer waits
                assert sorted(taken)[len(taken) // 2] < 4
    store.checkpoint(1)
    assert os.stat(store.database + "-wal").st_size == 0
    store.close()


def archive_of(path, *members):
    """A tar of (name, content or TarInfo)."""
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if isinstance(data, bytes):
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            else:
                info.type, info.linkname = data
                archive.addfile(info)
    return path


LINK, HARD, FIFO, DEVICE = (tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "roexec.db"), (
    tarfile.FIFOTYPE, ""), (tarfile.CHRTYPE, "")


@pytest.mark.parametrize("name, data", [
    ("../evil", b"x"), ("/etc/evil", b"x"), ("logs/../../evil", b"x"), ("logs/x/evil", b"x"),
    ("logs/x/2025-01-01T00:00:00.log", LINK), ("logs/x/2025-01-01T00:00:00.log", HARD),
    ("jobs.yml", FIFO), ("jobs.yml", DEVICE), ("roexec.db", b"x"), ("roexec.db-wal", b"x"),
    ("./jobs.yml", b"x"), ("logs", LINK), ("logs/x", (tarfile.DIRTYPE, "")),
    ("logs/x/2025-01-01T00:00:00.log.parts/1", b"x"), ("active/x", b"x"), ("wake", FIFO)])
def test_an_archive_with_anything_else_is_refused(full, tmp_path, name, data):
    Upkeep(full, None).copy()
    with open(full.file("backup/roexec.db"), "rb") as file:
        path = archive_of(tmp_path / "b.tar", ("roexec.db", file.read()), (name, data))
    before = content(full)
    with pytest.raises(RoexecError, match="which is no file of a backup"):
        put_back(path, full)
    assert content(full) == before and not os.path.exists(full.file("restore.new"))
    assert not os.path.exists(tmp_path / "evil")


def evil_database(full, tmp_path):
    Upkeep(full, None).copy()
    db = sqlite3.connect(full.file("backup/roexec.db"))
    db.execute("CREATE TRIGGER evil AFTER INSERT ON runs BEGIN DELETE FROM runs; END")
    db.commit()
    db.close()
    return full.file("backup/roexec.db")


def database_of_something_else(full, tmp_path):
    db = sqlite3.connect(tmp_path / "other.db")
    db.execute("CREATE TABLE x (y)")
    db.commit()
    db.close()
    return tmp_path / "other.db"


def damaged_database(full, tmp_path):
    fill(full, 1000, 10)
    Upkeep(full, None).copy()
    with open(full.file("backup/roexec.db"), "r+b") as file:
        file.seek(100_000)
        file.write(b"x" * 30_000)
    return full.file("backup/roexec.db")


def newer_database(full, tmp_path):
    Upkeep(full, None).copy()
    db = sqlite3.connect(full.file("backup/roexec.db"))
    db.execute("PRAGMA user_version = 99")
    db.close()
    return full.file("backup/roexec.db")


def cut_archive(full, tmp_path):
    path = back_up(full, tmp_path / "b.tar.gz", logs=True)
    os.truncate(path, os.stat(path).st_size // 2)
    return path


def changed_archive(full, tmp_path):
    path = back_up(full, tmp_path / "b.tar.gz", logs=True)
    with open(path, "r+b") as file:
        file.seek(os.stat(path).st_size // 2)
        file.write(b"changed")
    return path


def text(full, tmp_path):
    (tmp_path / "text").write_text("no archive\n" * 1000)
    return tmp_path / "text"


def empty_archive(full, tmp_path):
    return archive_of(tmp_path / "b.tar", ("readme", b"x"))


@pytest.mark.parametrize("make", [evil_database, database_of_something_else, damaged_database,
                                  newer_database, cut_archive, changed_archive, text,
                                  empty_archive])
def test_what_is_not_sound_is_refused_and_nothing_changes(full, tmp_path, make):
    path = make(full, tmp_path)
    before = content(full)
    for how in ({}, {"dry_run": True}):
        with pytest.raises(RoexecError) as caught:
            put_back(path, full, **how)
        assert str(path) in str(caught.value), caught.value
    assert content(full) == before and not os.path.exists(full.file("restore.new"))


def test_nothing_is_restored_under_a_server_or_a_run(full, tmp_path, start):
    path = back_up(full, tmp_path / "b.tar")
    server = start()
    with pytest.raises(RoexecError, match="works on the store"):
        put_back(path, full)
    server.stop()
    journal = claimed(full, make_job())
    with pytest.raises(RoexecError, match=f"run {journal.run_id} is on; wait for it"):
        put_back(path, full)
    journal.close()


def test_a_dry_run_of_a_restore_looks_and_changes_nothing(full, tmp_path):
    path, other = back_up(full, tmp_path / "b.tar"), roexec.Store(str(tmp_path / "other"))
    assert put_back(path, other, dry_run=True) == ({"jobs": 2, "runs": 3}, None)
    assert not os.path.exists(other.folder)


def test_an_earlier_backup_stays_until_the_next_is_whole(full, tmp_path, monkeypatch):
    path = back_up(full, tmp_path / "b.tar")
    before = path.read_bytes()
    monkeypatch.setattr(roexec.os, "fsync", lambda number: (_ for _ in ()).throw(
        OSError(28, "No space left on device")))
    with pytest.raises(RoexecError, match=f"cannot write {path}: No space left on device"):
        back_up(full, path)
    assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["b.tar", "store"]


@pytest.mark.parametrize("function", ["backup", "copy"])
def test_a_full_disk_is_said_and_leaves_nothing_behind(store, tmp_path, function):
    fill(store, 2000, 10)

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        here = roexec.Store(store.path)
        try:
            back_up(here, tmp_path / "b.tar") if function == "backup" else Upkeep(
                here, None).copy()
        except RoexecError as error:
            (tmp_path / "said").write_text(str(error))
            return 3
    assert end_of(in_child(limited)) == 3
    assert "disk" in (tmp_path / "said").read_text()
    assert sorted(os.listdir(tmp_path)) == ["said", "store"]
    assert not os.path.exists(store.file("backup/new.db")) and check(store) == []


def test_a_backup_goes_nowhere_but_into_a_file(full, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", "/dev/null"):
        with pytest.raises(RoexecError, match="is no file"):
            back_up(full, path)
    with pytest.raises(RoexecError, match="cannot write .*/none/b.tar: "):
        back_up(full, tmp_path / "none/b.tar")


def test_a_kill_in_the_middle_of_a_backup_leaves_the_earlier_one(full, tmp_path):
    path = back_up(full, tmp_path / "b.tar", logs=True)
    number, before = 0, path.read_bytes()
    while killed_at(number, lambda: back_up(roexec.Store(full.path), path, logs=True) and None):
        with tarfile.open(path) as archive:
            assert archive.getnames() and check(full) == []
        if number == 0:
            assert path.read_bytes() == before
        number += 1
    assert number >= 2


def test_a_kill_in_the_middle_of_a_restore_loses_nothing(full, tmp_path):
    path = back_up(full, tmp_path / "b.tar", logs=True)
    wanted = content(full)
    add(full, "later", 0, log=True)
    later, number = content(full), 0
    while killed_at(number, lambda: put_back(path, roexec.Store(full.path)) and None):
        number += 1
        if full.exists and content(full) not in (later, wanted):
            assert [row["id"] for row in read_runs(full)] in (
                [row["id"] for row in wanted[1]], [row["id"] for row in later[1]])
        olds = [name for name in os.listdir(full.folder) if name.startswith("before-")]
        kept = [name for name in olds if roexec.Store(full.file(name)).exists]
        assert full.exists or kept
        put_back(path, full)
        assert content(full) == wanted and check(full) == []
        add(full, "later", 0, log=True)
    assert number > 4


# A big store.

LISTING = """list jobs|list runs|list runs --state failed|list runs --state lost|list runs --active
list runs --job job-00001|list runs --job job-00001 --state lost|list runs --since 30d --state lost
list runs --steps --state skipped|show job-00001|show latest|why job-00001|status|next
next job-00001|logs latest|logs --since 1h|logs export --since 24h|export|audit"""


def test_each_command_that_lists_answers_within_a_second_on_a_big_store(store):
    """Of its own time, not that of others: so it says the same on a busy host."""
    long = os.environ.get("ROEXEC_LONG")
    fill(store, *((1_000_000, 10_000) if long else (20_000, 200)), logs=20)
    for line in LISTING.replace("\n", "|").split("|"):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", "import roexec; roexec.main()", *line.split(),
                               "--store", store.path], capture_output=True, cwd=HERE)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        assert b"Traceback" not in done.stderr and taken < 1.5, (line, taken, done.stderr)


@pytest.mark.skipif("not os.environ.get('ROEXEC_LONG')", reason="ROEXEC_LONG is not set")
def test_starts_go_on_while_a_million_runs_are_purged(store, start):
    fill(store, 1_000_000, 1000)
    apply(store, *(make_job(job_id=f"tick{number}", schedule="* * * * * *")
                   for number in range(3)))
    start()
    pid = purging(store, older=300 * DAY)
    end_of(pid)
    late = sorted(row["started_at"] - row["slot"] for row in read_runs(store, state="succeeded")
                  if row["job_id"].startswith("tick"))
    assert len(late) > 50 and late[len(late) * 9 // 10] < 0.1, late[-20:]
