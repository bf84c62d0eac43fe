"""Whether a server is well: what `health`, `status` and systemd are told, and that it is true."""
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers import apply, end_of, in_child, make_job, read_runs, wait_for

import roexec


@pytest.fixture(autouse=True)
def quick(clean, monkeypatch):
    """Nothing is waited for as long as usual."""
    monkeypatch.setattr(roexec, "_STUCK", 1.5)
    monkeypatch.setattr(roexec, "_ANSWER_PATIENCE", 60)


@pytest.fixture
def serving(start, tmp_path):
    """`serving(prepare)` starts a server with HTTP -> it; `.health()` asks that."""
    def serving(prepare=lambda scheduler: None):
        place = tmp_path / "address"

        def prepare_all(scheduler):
            http = roexec.start_http(scheduler.store, "127.0.0.1", 0, scheduler.say)
            http.vitals = scheduler.vitals
            prepare(scheduler)
            place.write_text(json.dumps(http.address))
        server = start(prepare=prepare_all)
        server.health = lambda: health(*json.loads(place.read_text()))
        wait_for(lambda: server.health() == (200, None))
        return server
    return serving


def health(*address):
    """(status, reason) that health gives to a stranger."""
    with closing(HTTPConnection(*address, timeout=60)) as connection:
        connection.request("GET", "/api/v1/health", headers={"Via": "proxy"})
        response = connection.getresponse()
        payload = json.loads(response.read())
        return response.status, payload.get("error", {}).get("message")


def status_of(store, capsys):
    """(exit status, health) of the command `status`."""
    capsys.readouterr()
    status = roexec.main(["--store", store.path, "status", "--json"])
    return status, json.loads(capsys.readouterr().out)["health"]


@contextmanager
def locked(store):
    """Somebody holds the lock of writers."""
    with open(store.file("store.lock"), "r+") as file:
        wait_for(lambda: roexec.try_lock(file))
        yield


def test_a_scheduler_that_is_stuck_is_told_until_it_goes_on(serving, store, capsys, monkeypatch):
    server = serving()
    with locked(store):
        wait_for(lambda: server.health() == (503, roexec.STUCK))
        with monkeypatch.context() as patch:        # in which it will not answer
            patch.setattr(roexec, "_ANSWER_PATIENCE", 1)
            assert status_of(store, capsys) == (1, roexec.STUCK)
    wait_for(lambda: server.health() == (200, None))
    wait_for(lambda: status_of(store, capsys)[1] == "healthy")
    server.stop()


def test_a_scheduler_that_fails_is_told_until_it_succeeds(serving, store, capsys):
    server = serving()
    os.rename(store.file("active"), store.file("away"))
    trouble = "the scheduler fails at its work; its log says why"
    wait_for(lambda: server.health() == (503, trouble))
    wait_for(lambda: status_of(store, capsys) == (1, trouble))
    assert "No such file" in server.said
    os.rename(store.file("away"), store.file("active"))
    wait_for(lambda: server.health() == (200, None))
    wait_for(lambda: status_of(store, capsys)[1] == "healthy")
    server.stop()


def test_a_launcher_that_does_not_answer_is_told(serving, store, capsys):
    server = serving()
    launchers = [pid for pid, process in roexec.processes().items() if process.parent == server.pid]
    for pid in launchers:
        os.kill(pid, signal.SIGSTOP)
    apply(store, make_job("sleep 5"))
    roexec.request_run(store, make_job(), trigger="manual")
    wait_for(lambda: server.health() == (503, "the launcher does not answer"))
    wait_for(lambda: status_of(store, capsys) == (1, "the launcher does not answer"))
    for pid in launchers:
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: server.health() == (200, None))
    server.kill()


@pytest.mark.parametrize("state, trouble", [
    ({}, None), ({"f_flag": os.ST_RDONLY}, "the file system of the store is read-only"),
    ({"f_bfree": 0, "f_bavail": 0}, "the disk of the store is full"),
    ({"f_favail": 0}, "the disk of the store is full"), ({"f_files": 0, "f_favail": 0}, None)])
def test_a_store_that_takes_nothing_is_told(state, trouble, serving, monkeypatch, store, capsys):
    real = os.statvfs

    def statvfs(path):
        found = real(path)
        values = {name: getattr(found, name) for name in dir(found) if name.startswith("f_")}
        return SimpleNamespace(**{**values, **state})
    monkeypatch.setattr(os, "statvfs", statvfs)
    vitals = roexec.Vitals(store, SimpleNamespace(all={}, waiting=[]),
                           SimpleNamespace(next_due=lambda: float("inf")))
    vitals.look()
    assert vitals.trouble() == trouble


def vitals_of(store, due=float("inf"), waiting=(), asked_for=()):
    each = {number: SimpleNamespace(is_new=True, since=since, run=None)
            for number, since in enumerate(asked_for)}
    journals = [SimpleNamespace(header={"claimed_at": at}) for at in waiting]
    vitals = roexec.Vitals(store, SimpleNamespace(all=each, waiting=journals),
                           SimpleNamespace(next_due=lambda: due, entries={}))
    vitals.look()
    return vitals


def test_what_is_due_and_not_started_is_told_after_a_minute(store):
    now, late = time.time(), "runs have been due for more than a minute and are not started"
    assert vitals_of(store, due=now - 20).trouble() is None
    assert vitals_of(store, due=now - 70).trouble() == late
    assert vitals_of(store, waiting=[now - 20]).trouble() is None
    assert vitals_of(store, waiting=[now - 70]).trouble() == late


def test_the_lag_is_the_worst_of_the_last_minute(store, monkeypatch):
    vitals, now = vitals_of(store), time.time()
    assert vitals.lag() == 0
    vitals.timetable.next_due = lambda: now - 5
    vitals.note_turn(now)
    vitals.timetable.next_due = lambda: now + 600
    vitals.note_turn(now)
    assert vitals.lag() == 5
    monkeypatch.setattr(roexec, "_RECENT", -1)
    vitals.note_turn(now)
    assert vitals.lag() == 0
    vitals.timetable.next_due = lambda: time.time() - 30
    assert vitals.lag() > 29                       # no turn has been taken since


def test_the_word_of_a_server_is_of_the_server_that_is_there(store):
    assert store.server() is None
    lock = roexec.hold_server_lock(store)
    assert (store.server(), store.trouble()) == (os.getpid(), None)
    store.leave_word("something is wrong")
    assert (store.server(), store.trouble()) == (os.getpid(), "something is wrong")
    store.leave_word("so")
    assert store.trouble() == "so"
    store.leave_word(None)
    assert (store.server(), store.trouble()) == (os.getpid(), None)
    store.leave_word("it was killed")
    os.close(lock)
    lock = roexec.hold_server_lock(store)
    assert store.trouble() is None
    os.close(lock)


# systemd.

@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path, monkeypatch):
    """The socket of a manager of services; `.said()` gives the lines that have come."""
    name = "\0roexec-test-" + roexec.new_run_id() if request.param == "abstract" else \
        str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(name)
        channel.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", name.replace("\0", "@"))
        monkeypatch.delenv("WATCHDOG_USEC", raising=False)
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
        yield SimpleNamespace(said=lambda: channel.recv(4096).decode().split("\n"),
                              channel=channel)


def command(*words, folder):
    """A server as the command line starts it, in a process of its own -> its process id."""
    def run():
        os.dup2(os.open(folder / "log", os.O_CREAT | os.O_WRONLY), 2)
        return roexec.main(["--store", str(folder / "store"), "server", *words])
    return in_child(run)


def test_systemd_is_told_when_a_server_is_ready_alive_and_ending(manager, monkeypatch, tmp_path,
                                                                 surroundings):
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    monkeypatch.setattr(roexec, "_STUCK", 60)       # nothing is, however long a start takes here
    (tmp_path / "jobs.yml").write_text("jobs: [{id: a, command: env > env}, {id: b, command: x}]")
    began = time.monotonic()
    pid = command("--no-http", "--jobs", str(tmp_path / "jobs.yml"), folder=tmp_path)
    first = manager.said()
    assert first == ["READY=1", "WATCHDOG=1", "STATUS=jobs: 2, runs in hand: 0, waiting: 0"]
    assert manager.said() == manager.said() == ["WATCHDOG=1"]
    assert time.monotonic() - began >= 1        # once a second, and not all the time
    store = roexec.Store(str(tmp_path / "store"))
    roexec.request_run(store, make_job(job_id="a", directory=str(tmp_path)), trigger="manual")
    wait_for(lambda: read_runs(store, state="succeeded"))
    os.kill(pid, signal.SIGTERM)
    assert end_of(pid) == 0
    said = manager.said()
    while said[0] == "WATCHDOG=1":
        said = manager.said()
    assert said == ["STOPPING=1"]


@pytest.mark.parametrize("before", [(), ("unshare", "-pf", "--kill-child")], ids=["", "PID 1"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_starting_says_so_and_ends_when_asked(before, number, cli, store,
                                                               tmp_path):
    """PID 1 is not even told of a signal that it has no handler for."""
    if before and subprocess.run([*before, "true"], capture_output=True).returncode:
        pytest.skip("no name spaces can be made here")
    apply(store, make_job(job_id="a"))
    lock = roexec.open_private(store.file("store.lock"))
    assert roexec.try_lock(lock)                        # which the start waits for
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([*before, sys.executable, roexec.__file__, "--store",
                                    store.path, "server", "--no-http"], stderr=log)
    try:
        wait_for(lambda: store.server() and store.trouble() == "the server is starting")
        status, out, _ = cli("status")
        assert status == 1 and "the server is starting" in out
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]) if before else process.pid, number)
        os.close(lock)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert "Server ended" in (tmp_path / "log").read_text()
    assert "started" not in (tmp_path / "log").read_text() and store.server() is None
    assert cli("status")[0] == 3


def test_a_watchdog_of_another_process_is_not_fed(manager, monkeypatch, store):
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    for pid, fed in ((os.getpid(), True), (1, False)):
        monkeypatch.setenv("WATCHDOG_PID", str(pid))
        roexec.SystemdNotifier(vitals_of(store))()
        assert ("WATCHDOG=1" in manager.said()) is fed


def test_a_status_is_told_when_it_changes(manager, store):
    vitals = vitals_of(store)
    notifier = roexec.SystemdNotifier(vitals)
    notifier(), notifier()
    vitals.found = "the launcher does not answer"
    notifier()
    assert manager.said() == ["READY=1", "STATUS=jobs: 0, runs in hand: 0, waiting: 0"]
    assert manager.said() == ["STATUS=the launcher does not answer"]


def test_a_manager_that_has_gone_or_takes_nothing_is_no_error(manager, store, monkeypatch):
    notifier = roexec.SystemdNotifier(vitals_of(store))
    while notifier.tell("x"):                       # until its queue is full
        pass
    notifier()
    assert not notifier.ready
    manager.channel.close()
    notifier()
    monkeypatch.delenv("NOTIFY_SOCKET")
    roexec.SystemdNotifier(vitals_of(store))()
