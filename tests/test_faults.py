"""Faults that are caused: kills at any moment, calls that fail, full disks, clocks that jump.

ROEXEC_LONG=1 makes all rounds and all steps; ROEXEC_SEED repeats the random choices of a run.
"""
import collections
import contextlib
import mmap
import os
import random
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from datetime import timezone
from pathlib import Path

import pytest
from helpers import (Pid, Server, apply, await_state, claimed, descendants, end_of, hourly_schedule,
                     in_child, is_alive, kill_descendants, make_job, read_attempts, read_log_of,
                     read_pid, read_run, read_runs, wait_for)

import roexec
from roexec import RoexecError

pytestmark = pytest.mark.usefixtures("clean")      # of processes

HOUR = 3600
LONG = bool(os.environ.get("ROEXEC_LONG"))
ROOT = Path(__file__).parent.parent


@pytest.fixture
def chance():
    """Random choices; the seed is shown where a test fails."""
    seed = int(os.environ.get("ROEXEC_SEED") or random.SystemRandom().randrange(10**6))
    print(f"ROEXEC_SEED={seed}")
    return random.Random(seed)


class Witness:
    """A file to which commands append a line each."""

    def __init__(self, path):
        self.path = path
        path.write_text("")

    def note(self, text, more=""):
        """A command that leaves a line, and then does more."""
        return f"echo {text} >> {self.path}; {more}"

    @property
    def lines(self):
        return self.path.read_text().splitlines()


@pytest.fixture
def witness(tmp_path):
    return Witness(tmp_path / "witness")


def briefly(store):
    """What a failed test shows of the runs: those that are on, and how many ended how."""
    rows = read_runs(store)
    on = [(row["id"], row["job_id"], row["state"], row["slot"]) for row in rows
          if row["state"] in roexec.ACTIVE_STATES]
    return on[:20], collections.Counter((row["state"], row["reason"]) for row in rows)


def journals(store):
    return [name for name in os.listdir(store.file("active")) if "." not in name]


def has_settled(store):
    return all(row["state"] in roexec.FINAL_STATES for row in read_runs(store))


def check_store(store, witness):
    """What holds whatever happened, once nothing is on any more: `witness` has the ids of the runs
    whose commands were started, each with the number of its job's exit code."""
    with store.read() as db:
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        kept = {row["id"]: row["position"] for row in db.execute("SELECT * FROM jobs")}
    assert not roexec.lock_is_held(store.file("store.lock"))
    assert journals(store) == []
    started, slots = witness.lines, {}
    assert len(started) == len(set(started)), "started twice"
    rows = {row["id"]: row for row in read_runs(store)}
    assert set(started) <= set(rows)
    for run_id, row in rows.items():
        assert row["state"] in roexec.FINAL_STATES, row
        assert row["reason"] in (roexec.REASONS.get(row["state"]) or (None,)), row
        assert row["state"] in ("succeeded", "skipped") or row["reason"], row
        if row["reason"] in (None, "exit") and row["state"] != "skipped":
            assert run_id in started, row
            assert row["exit_code"] == exit_code_of(row["job_id"]), row
            assert [(each["number"], each["exit_code"]) for each in read_attempts(
                store, run_id)] == [(1, row["exit_code"])]
        if row["state"] == "skipped":
            assert run_id not in started, row
        if row["slot"] is not None:
            slots.setdefault(row["job_id"], []).append(row)
            assert (row["last_slot"] or row["slot"]) <= kept[row["job_id"]], row
    return slots


def exit_code_of(job_id):
    """Jobs of these tests are called what-3, where 3 is how they end."""
    return int(job_id.rpartition("-")[2])


def numbered_job(witness, name, code, more="", **options):
    return make_job(witness.note("$ROEXEC_RUN_ID", f"{more} exit {code}"), f"{name}-{code}",
                    grace=0.2, **options)


def check_slots(rows, period):
    """Each slot of a job from the first on has a row, and none has two."""
    rows.sort(key=lambda row: row["slot"])
    following = rows[0]["slot"]
    for row in rows:
        assert row["slot"] == following, (row, following)
        last = row["last_slot"] or row["slot"]
        assert last == row["slot"] + period * (row["count"] - 1), row
        following = last + period


# Kills at random moments.

SERVER = """
import sys
sys.path.insert(0, {folder!r})
import roexec
launcher = roexec.start_launcher()
store = roexec.Store({store!r})
lock = roexec.hold_server_lock(store)
store.create().keep_open()
def say(text, level="INFO", at=None):
    with open({said!r}, "a") as file:
        file.write(text + "\\n")
scheduler = roexec.Scheduler(store, launcher, say)
scheduler.each_second += [lambda: say("ready"), scheduler.each_second.clear]
scheduler.run()
store.close()
"""


class Victims:
    """A server that is a program of its own, which is how it can execute itself again, and what
    belongs to it."""

    def __init__(self, store, folder):
        self.script, self.said, self.pid = folder / "server.py", folder / "said", None
        self.said.write_text("")
        self.script.write_text(SERVER.format(folder=os.path.dirname(roexec.__file__),
                                             store=store.path, said=str(self.said)))
        self.killed = dict.fromkeys(("server", "launcher", "supervisor"), 0)

    def start(self, wait):
        """Start a server where there is none, and `wait` until it runs."""
        if self.pid is None:
            before = self.said.read_text().count("ready")
            self.pid = in_child(lambda: os.execv(sys.executable,
                                                 [sys.executable, str(self.script)]))
            wait_for(lambda: not wait or self.said.read_text().count("ready") > before)

    def kill_one(self, chance):
        """kill -9 the server, the launcher or a supervisor."""
        found = {"server": [self.pid], "launcher": [], "supervisor": []}
        table = roexec.processes()
        for pid in descendants():
            with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline") as file:
                if pid != self.pid and str(self.script) in file.read():
                    child = pid in table and table[pid].parent == self.pid
                    found["launcher" if child else "supervisor"].append(pid)
        kind = chance.choice([name for name, pids in found.items() if pids])
        with contextlib.suppress(ProcessLookupError):
            os.kill(chance.choice(found[kind]), signal.SIGKILL)
            self.killed[kind] += 1
        if kind == "server":
            end_of(self.pid)
            self.pid = None

    def stop(self):
        os.kill(self.pid, signal.SIGTERM)
        assert end_of(self.pid) == 0, self.said.read_text()


def test_kills_at_any_moment_start_nothing_twice_and_lose_nothing(store, witness, tmp_path, chance):
    gate, period = tmp_path / "gate", 10
    gate.touch()
    short = [numbered_job(witness, f"s{number}", number % 7, schedule=f"@every {period}s")
             for number in range(200)]
    long = [numbered_job(witness, f"l{number}", number + 10, priority=1,
                         more=f"while test -e {gate}; do sleep 0.2; done;") for number in range(5)]
    with store.write() as db:
        roexec.set_settings(db, {"scheduler": {"max_concurrent": 12}})
    apply(store, *short, *long, since=int(time.time()) // period * period - 1)
    victims, asked = Victims(store, tmp_path), []
    for _ in range(500 if LONG else 40):
        victims.start(wait=chance.random() < 0.7)
        for job in (*long, chance.choice(short)):
            with contextlib.suppress(roexec.Refused):
                asked.append(roexec.request_run(store, job, trigger="manual"))
        time.sleep(chance.random() * chance.choice((0.02, 0.1, 0.4)))       # what is tested
        victims.kill_one(chance)
    victims.start(wait=True)
    wait_for(lambda: len({row["job_id"] for row in read_runs(store) if row["slot"]}) == 200, 180)
    apply(store, *[roexec.Job({**job.spec, "enabled": False}) for job in short])
    gate.unlink()
    wait_for(lambda: has_settled(store), 180, lambda: (
        is_alive(victims.pid), briefly(store), victims.said.read_text()[-2000:]))
    print(victims.killed)
    victims.stop()
    wait_for(lambda: not descendants(), what=descendants)
    slots = check_store(store, witness)
    assert len(slots) == 200 and set(asked) <= {row["id"] for row in read_runs(store)}
    for rows in slots.values():
        check_slots(rows, period)
    lost = read_runs(store, state="lost")
    assert len(lost) <= victims.killed["supervisor"], "a kill of another process has lost a run"
    ended = [row for row in read_runs(store) if row["state"] not in ("lost", "skipped")]
    assert {row["state"] for row in ended} == {"succeeded", "failed"} and len(ended) > 200
    assert "Traceback" not in victims.said.read_text()


# What is left of a run is found, whoever was killed.

def escaping(folder):
    """A command with a process that leaves its session, its parent and its environment behind."""
    # The shell's own redirections come first, so that no pipe tells of it either.
    return ("(setsid env -i /bin/sh -c 'trap \"\" TERM; sleep 600 & "
            f"echo $$ $! > {folder}/escaped; wait' "
            "< /dev/null > /dev/null 2>&1 &); sleep 600")


def escaped(folder):
    path = folder / "escaped"
    wait_for(lambda: path.exists() and path.read_text().endswith("\n"))
    return [Pid(pid) for pid in path.read_text().split()]


def supervisor_of(store, run_id):
    journal = wait_for(lambda: roexec.Journal.glance(store.file(f"active/{run_id}")))
    return roexec.Progress(journal.events).supervisor


@pytest.mark.parametrize("cancel", ["before", "after"])
@pytest.mark.parametrize("killed", [
    ("supervisor",), ("launcher",), ("supervisor", "launcher"), ("launcher", "supervisor"),
    ("supervisor", "server"), ("server", "supervisor", "launcher"), ("keeper",)])
def test_no_process_of_a_cancelled_run_survives_whoever_was_killed(
        killed, cancel, store, tmp_path):
    job = make_job(escaping(tmp_path), grace=0.3)
    apply(store, job)
    victims = Victims(store, tmp_path)
    victims.start(wait=True)
    run_id = roexec.request_run(store, job, trigger="manual")
    pids, supervisor = escaped(tmp_path), supervisor_of(store, run_id)
    assert all(map(is_alive, pids)) and supervisor["keeper"]
    launcher, = [pid for pid, process in roexec.processes().items()
                 if process.parent == victims.pid and process.alive]
    if cancel == "before":
        with store.write() as db:           # committed, and not told yet
            roexec.ask_to_cancel(db, run_id, "user")
    for name in killed:
        pid = {"supervisor": supervisor["pid"], "launcher": launcher, "server": victims.pid,
               "keeper": supervisor["keeper"][0]}[name]
        with contextlib.suppress(ProcessLookupError):   # one that was told of the cancel has ended
            os.kill(pid, signal.SIGKILL)
        if name == "server":
            end_of(pid)
            victims.pid = None
    if cancel == "after":
        with contextlib.suppress(RoexecError):      # it has been found to be lost by now
            roexec.cancel_run(store, run_id)
    elif "supervisor" not in killed:
        roexec.signal_cancel(store, run_id, "user")
    victims.start(wait=True)
    row = await_state(store, run_id, *roexec.FINAL_STATES)
    wait_for(lambda: not any(map(is_alive, pids)))
    assert row["state"] in ({"cancelled"} if cancel == "before" or "supervisor" not in killed
                            else {"cancelled", "lost"})
    if {"launcher", "server"} & set(killed):    # the server has begun again
        wait_for(lambda: victims.said.read_text().count("ready") > 1)
    victims.stop()
    wait_for(lambda: not descendants(), what=descendants)


def test_what_escapes_from_a_run_in_the_background_is_found_without_a_server(store, tmp_path):
    run_id = roexec.run_detached(store, make_job(escaping(tmp_path), grace=0.1), name="x")
    pids, supervisor = escaped(tmp_path), supervisor_of(store, run_id)
    os.kill(supervisor["pid"], signal.SIGKILL)
    wait_for(lambda: not is_alive(supervisor["pid"]))
    assert all(map(is_alive, pids))
    roexec.settle(store, wait=True)
    assert read_run(store, run_id)["state"] == "lost" and not any(map(is_alive, pids))
    wait_for(lambda: not descendants(), what=descendants)


def programs_of(pids):
    """The names of what these processes execute; those that have just ended have none."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            found.append(Path(f"/proc/{pid}/comm").read_text().strip())
    return found


@pytest.fixture
def cgroup():
    """A cgroup (v2) below which runs can have theirs; here it has no controllers."""
    root = "/sys/fs/cgroup" if os.path.exists("/sys/fs/cgroup/cgroup.procs") \
        else "/sys/fs/cgroup/unified"
    folder = f"{root}/roexec-test-{os.getpid()}"
    try:
        os.mkdir(folder)
    except OSError as error:
        pytest.skip(f"no cgroup can be made: {error}")
    yield folder
    kill_descendants()
    os.rmdir(folder)


def test_what_escapes_from_everything_is_found_in_the_cgroup_of_its_run(
        store, tmp_path, cgroup, monkeypatch):
    """The supervisor, which has no keeper here, was killed."""
    monkeypatch.setattr(roexec, "delegated_cgroup", lambda: cgroup)
    monkeypatch.setattr(roexec.Cgroup, "_write", lambda *_: None)
    job = make_job(escaping(tmp_path), limits={"cpu": 1}, grace=0.1)
    journal = claimed(store, job)
    pid = in_child(lambda: roexec.Supervision(journal, store.folder, roexec.Signals()).perform())
    journal.close()
    pids = escaped(tmp_path)
    wait_for(lambda: programs_of(roexec.cgroup_members(cgroup, journal.run_id)).count("sleep") == 2)
    members = roexec.cgroup_members(cgroup, journal.run_id)
    assert members > set(pids)
    os.kill(pid, signal.SIGKILL)
    end_of(pid)
    monkeypatch.setattr(roexec, "delegated_cgroup", lambda: None)       # as a command sees it
    roexec.settle(store, wait=True)
    assert read_run(store, journal.run_id)["state"] == "lost" and not any(map(is_alive, pids))
    assert f"Killed {len(members)} processes" in read_log_of(store, journal.run_id)
    assert not [name for name in os.listdir(cgroup) if name.startswith("run-")]


# Each call that touches a file is the last one, or fails.

CHANGING = ("openat ?open pwrite64 write ?writev fsync fdatasync ?rename ?renameat ?renameat2 "
            "?unlink unlinkat ?mkdir mkdirat ?mknod mknodat ftruncate flock fcntl sendmsg recvmsg "
            "clone ?clone3 ?fork ?vfork").split()
FAULTS = {
    "SIGKILL": ("signal=SIGKILL", CHANGING),
    "EIO": ("error=EIO", ["pwrite64", "write", "fsync", "fdatasync", "pread64", "read"]),
    "ENOSPC": ("error=ENOSPC", ["openat", "pwrite64", "write", "ftruncate", "?mkdir", "?rename",
                                "?renameat", "?renameat2"]),
    "EMFILE": ("error=EMFILE", ["openat", "?pipe", "pipe2", "socketpair"]),
    "EAGAIN": ("error=EAGAIN", ["clone", "?clone3", "?fork", "?vfork", "flock", "sendmsg",
                                "sendto"])}


@pytest.fixture(scope="module", autouse=True)
def strace():
    """What injects faults. CI has it; elsewhere a test that needs it is skipped.

    The modules that are imported at their first use are imported here: their files are not ours.
    """
    for module in vars(roexec).values():
        if type(module).__name__ == "_Module":
            module.__name__
    for name in ("ctypes", "gc", "resource", "sqlite3", "traceback"):
        __import__(name)
    if shutil.which("strace"):
        return True
    assert not os.environ.get("CI"), "strace is missing"
    return False


NEVER = 65_000          # the call that fails, where none is to


class Faulty:
    """A child one call of which fails, or kills it: `point` is the name of the call, and the
    number among those of that name.

    `begin(wait)` starts it -> its pid; it calls `wait` to be let go on when strace watches it. Its
    commands are not watched: they are not ours.
    """

    def __init__(self, begin, fault, point, trace):
        reader, go = os.pipe()
        action, calls = FAULTS[fault]
        name, number = point or (calls[0], NEVER)
        self.pid = begin(lambda: (_let_be_traced(), select.select([reader], (), ())))
        os.close(reader)
        trace.write_text("")
        self.strace = subprocess.Popen(
            ["strace", "-p", str(self.pid), "-o", str(trace), "-e", f"trace={','.join(calls)}",
             "-e", f"inject={name}:{action}:when={number}"], stderr=subprocess.PIPE)
        assert b"attached" in self.strace.stderr.readline(), self.strace.stderr.read()
        os.write(go, b"g")
        os.close(go)

    def end(self):
        status = end_of(self.pid)
        self.close()
        return status

    def close(self):
        if not self.strace.stderr.closed:
            self.strace.communicate()


def _let_be_traced():
    import ctypes
    ctypes.CDLL(None).prctl(0x59616d61, ctypes.c_ulong(-1))     # PR_SET_PTRACER (prctl(2)): anybody


def in_words(function):
    """Perform a function -> 75 where it says in words what is wrong; else it must not fail."""
    try:
        function()
    except (RoexecError, OSError) as error:
        with contextlib.suppress(OSError):
            print(repr(error), file=sys.stderr)
        return 75
    return 0


class Case:
    """Something that is swept: `begin(wait)` starts a child -> its pid, `act(pid)` is performed
    while that goes on, `check(status)` after its end."""

    def __init__(self, folder):
        folder.mkdir()
        self.folder, self.store = folder, roexec.Store(str(folder / "store"))
        self.witness = Witness(folder / "witness")
        self.prepare()

    def prepare(self):
        self.store.create()

    def begin(self, wait):
        return in_child(lambda: (wait(), in_words(self.perform))[1])

    def perform(self):
        raise NotImplementedError

    def act(self, pid):
        pass

    def check(self, status):
        assert status in (0, 75, -signal.SIGKILL), status
        self.settle()
        check_store(self.store, self.witness)

    def settle(self):
        """What the next commands do."""
        wait_for(lambda: roexec.settle(self.store, wait=True) or has_settled(self.store),
                 what=lambda: briefly(self.store))

    def ask(self, job, **more):
        apply(self.store, job)
        return roexec.request_run(self.store, job, trigger="manual", **more)

    def claimed(self, *jobs):
        """The locked journals of new runs of some jobs."""
        ids = [self.ask(job) for job in jobs]
        with self.store.write() as db:
            return roexec.claim(db, self.store.file("active"), lambda row: next(
                job for job in jobs if job.id == row["job_id"]), None, lambda row: row["id"] in ids)


class Told(Server):
    """A server whose log never fails, as the program's never does; it begins after `ready()`."""

    def __init__(self, ready, *values, **options):
        self.ready = ready
        super().__init__(*values, **options)

    def _serve(self, *values):
        self.ready()
        super()._serve(*values)

    def _say(self, text, level="INFO", at=None):
        with contextlib.suppress(OSError):
            super()._say(text, level, at)


class Claim(Case):
    """A server claims slots and a request, hands them over, takes their ends in, and is told to
    end."""

    def prepare(self):
        super().prepare()
        schedule, slot = hourly_schedule()
        self.hook = Witness(self.folder / "hook")
        self.log = self.folder / "said"
        for code in (0, 3):
            apply(self.store, numbered_job(self.witness, "due", code, schedule=schedule),
                  since=slot - 1)
        apply(self.store, numbered_job(self.witness, "late", 0, schedule=schedule, catch_up="none",
                                       hooks={"on_missed": self.hook.note("x")}),
              since=slot - 4 * HOUR - 1)
        self.ask(numbered_job(self.witness, "asked", 5))

    def serve(self, ready, **options):
        def hurry(scheduler):
            sleep, roexec._LOOK = time.sleep, 0.1
            time.sleep = lambda seconds: sleep(min(seconds, 0.02))
        return Told(ready, self.store, self.log, prepare=hurry, **options)

    def begin(self, wait):
        return self.serve(wait, wait=False).pid

    def is_done(self):
        return sum(row["count"] for row in read_runs(self.store)) == 8 \
            and has_settled(self.store) and self.hook.lines and not journals(self.store)

    def act(self, pid):
        wait_for(lambda: self.is_done() or not is_alive(pid), what=lambda: (
            briefly(self.store), self.log.read_text()))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)

    def check(self, status):
        said = self.log.read_text()
        if status not in (0, -signal.SIGKILL):      # it could not begin, or not end; that is said
            assert re.search("RoexecError|StoreFailure|OSError|BlockingIOError", said), said
        server = self.serve(lambda: None)
        wait_for(self.is_done, what=lambda: (briefly(self.store), said, server.said))
        server.stop()
        slots = check_store(self.store, self.witness)
        assert {job: sum(row["count"] for row in rows) for job, rows in slots.items()} == {
            "due-0": 1, "due-3": 1, "late-0": 5}
        for rows in slots.values():
            check_slots(rows, HOUR)
        assert self.hook.lines == ["x"]
        assert not read_runs(self.store, state="lost"), said


class Launch(Claim):
    """The launcher forks the supervisors of such a server, which ends here when its launcher does
    (and else would start again)."""

    def begin(self, wait):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel = ours
        pid = in_child(lambda: (wait(), in_words(lambda: roexec._launch(ours, theirs)))[1])
        theirs.close()
        return pid

    def act(self, pid):
        def ready():
            roexec.start_launcher = lambda: self.channel
            roexec._start_again = lambda *_: os._exit(0)
        server = self.serve(ready, wait=False)
        self.channel.close()
        super().act(server.pid)
        self.status = end_of(server.pid)

    def check(self, status):
        assert status in (0, 75, -signal.SIGKILL), status
        super().check(self.status)


class Attempt(Case):
    """A supervisor carries a run from its start to its end."""

    def prepare(self):
        super().prepare()
        self.hook = Witness(self.folder / "hook")
        names = ("pre_run", "on_failure", "post_run")
        self.journal, = self.claimed(numbered_job(self.witness, "x", 3, hooks={
            name: self.hook.note(name) for name in names}))

    def begin(self, wait):
        pid = super().begin(wait)
        self.journal.close()
        return pid

    def perform(self):
        roexec.Supervision(self.journal, self.store.folder, roexec.Signals()).perform()

    def check(self, status):
        super().check(status)
        assert len(self.hook.lines) == len(set(self.hook.lines))
        run, = read_runs(self.store)
        assert run["state"] == "failed" or status != 0, run
        wait_for(lambda: not descendants())


class Alone(Case):
    """A command runs a job in the foreground, where no server is."""

    def perform(self):
        roexec.run_here(self.store, self.job)

    def prepare(self):
        super().prepare()
        self.job = numbered_job(self.witness, "x", 3)
        apply(self.store, self.job)

    def check(self, status):
        super().check(status)
        assert len(read_runs(self.store)) == 1 or status != 0
        wait_for(lambda: not descendants())


class TakeIn(Case):
    """A command takes in what has ended while no server was there."""

    def prepare(self):
        super().prepare()
        for journal in self.claimed(*(numbered_job(self.witness, "x", code) for code in (0, 3))):
            signals = roexec.Signals()
            roexec.Supervision(journal, self.store.folder, signals).perform()
            signals.close()
            journal.close()

    def perform(self):
        roexec.settle(self.store)

    def check(self, status):
        super().check(status)
        assert not read_runs(self.store, state="lost")


class Cancel(Case):
    """A command cancels a run that is on, without a server."""

    def prepare(self):
        super().prepare()
        journal, = self.claimed(numbered_job(
            self.witness, "x", 3, f"echo $$ > {self.folder}/pid; sleep 600;"))
        self.run_id = journal.run_id
        in_child(lambda: roexec.Supervision(
            journal, self.store.folder, roexec.Signals()).perform())
        journal.close()
        self.command = read_pid(self.folder / "pid")

    def perform(self):
        roexec.cancel_run(self.store, self.run_id)

    def check(self, status):
        if read_run(self.store, self.run_id)["cancel"] is None:
            assert status != 0 and is_alive(self.command)
            roexec.cancel_run(self.store, self.run_id)
        super().check(status)
        run = read_run(self.store, self.run_id)
        assert (run["state"], run["reason"]) == ("cancelled", "user")
        assert not is_alive(self.command)


class Make(Case):
    """A store is made."""

    def prepare(self):
        pass

    def perform(self):
        self.store.create()

    def check(self, status):
        assert status in (0, 75, -signal.SIGKILL), status
        assert status != 0 or self.store.exists
        self.store.create()
        self.ask(make_job())
        with self.store.read() as db:
            assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
            assert roexec.check_version(self.store, db) == len(roexec._MIGRATIONS)


class Migrate(Case):
    """An older store is brought up to date."""

    def prepare(self):
        super().prepare()
        self.run_id = self.ask(numbered_job(self.witness, "x", 0))
        self.before = self.versions(self.store.database)

    def perform(self):
        roexec._MIGRATIONS = [*roexec._MIGRATIONS, "ALTER TABLE jobs ADD COLUMN colour TEXT; "
                              "UPDATE jobs SET colour = 'red'"]
        self.store.create()

    def versions(self, path):
        db = roexec.Store(path).connect("ro")
        with contextlib.closing(db):
            assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
            assert db.execute("SELECT id FROM runs").fetchall()[0][0] == self.run_id
            return (db.execute("PRAGMA user_version").fetchone()[0],
                    len(db.execute("SELECT * FROM jobs").fetchone()))

    def check(self, status):
        assert status in (0, 75, -signal.SIGKILL), status
        before = self.before
        after = before[0] + 1, before[1] + 1
        assert self.versions(self.store.database) in ((before, after) if status else (after,))
        assert end_of(in_child(self.perform)) == 0
        assert self.versions(self.store.database) == after
        assert self.versions(f"{self.store.database}.version-{before[0]}.db") == before


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("case", [Claim, Launch, Attempt, Alone, TakeIn, Cancel, Make, Migrate],
                         ids=lambda case: case.__name__.lower())
def test_each_call_that_touches_a_file_may_be_the_last_or_fail(strace, case, fault, tmp_path,
                                                               chance):
    if not strace:
        pytest.skip("strace is not installed here")
    trace = tmp_path / "trace"
    perform(case(tmp_path / "all"), fault, None, trace)
    counts, points = collections.Counter(), []
    for name, line in calls_in(trace):
        counts[name] += 1
        if fault == "SIGKILL" or not re.match(r"write\(.*, 1\) ", line):    # a pipe: it never fails
            points.append((name, counts[name]))
    assert points or case is Launch, "which makes few calls"
    if not LONG:
        points = chance.sample(points, min(len(points), case.most[fault == "SIGKILL"]))
    for number, point in enumerate(points):
        perform(case(tmp_path / str(number)), fault, point, trace)
        shutil.rmtree(tmp_path / str(number))


Case.most = (6, 24)     # how many of the calls fail, or kill, in a short run


def perform(case, fault, point, trace):
    """Perform a case, one call of which fails, if a point is given, and check what it left."""
    faulty = Faulty(case.begin, fault, point, trace)
    try:
        case.act(faulty.pid)
        case.check(faulty.end())
    except BaseException:
        lines = trace.read_text().splitlines()
        failed = [number for number, line in enumerate(lines) if line.endswith("(INJECTED)")]
        last = failed[0] if failed else len(lines)
        print(f"{fault} at {point}:", *lines[max(0, last - 8):last + 9], sep="\n")
        raise
    finally:
        kill_descendants()
        faulty.close()


def calls_in(trace):
    """(name, line) of the calls that strace has seen, in order."""
    return [(line.partition("(")[0], line) for line in trace.read_text().splitlines()
            if line[0].isalpha()]


# Disks.

@contextlib.contextmanager
def small_disk(folder, size):
    """A file system in memory; only root can have one."""
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)],
            stderr=subprocess.DEVNULL).returncode:
        pytest.skip("only root can mount a small file system")
    try:
        yield
    finally:
        kill_descendants()
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path):
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (65536, 512):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))


def test_a_full_disk_stops_no_run_and_loses_no_slot_and_no_exit_code(tmp_path, witness):
    gate = tmp_path / "gate"
    gate.touch()
    with small_disk(tmp_path / "disk", "2m"):
        store = roexec.Store(str(tmp_path / "disk/store")).create()
        long = numbered_job(witness, "long", 3, f"while test -e {gate}; do echo out; sleep 0.02; "
                            "done; seq 1000;")
        apply(store, numbered_job(witness, "short", 0, schedule="@every 1s", overlap="queue"), long,
              since=time.time() - 2)
        run_id = roexec.request_run(store, long, trigger="manual")
        server = Server(store, tmp_path / "said")
        wait_for(lambda: len(witness.lines) > 2 and run_id in witness.lines)
        fill(tmp_path / "disk/filler")
        wait_for(lambda: "ERROR" in server.said)
        fill(tmp_path / "disk/filler2")         # the room of what was taken in meanwhile
        with pytest.raises(RoexecError, match="full"):
            roexec.request_run(store, long, trigger="manual", wait=True)
        gate.unlink()
        ended = wait_for(lambda: roexec.Progress(roexec.Journal.glance(
            store.file(f"active/{run_id}")).events).finished)
        assert read_run(store, run_id)["state"] == "running"      # there is no room to say more
        for name in ("filler", "filler2"):
            (tmp_path / "disk" / name).unlink()
        run = await_state(store, run_id, "failed")
        assert (run["exit_code"], run["finished_at"]) == (3, ended["at"])
        count = len(witness.lines)
        wait_for(lambda: len(witness.lines) > count + 1)
        apply(store, make_job(job_id="short-0"))
        wait_for(lambda: has_settled(store), what=lambda: briefly(store))
        server.stop()
        check_slots(check_store(store, witness)["short-0"], 1)
        assert "Traceback" not in server.said


def roexec_program(*words, program=(), **options):
    """Run the program as a person would -> subprocess.CompletedProcess."""
    program = program or [sys.executable, "-I", roexec.__file__]
    return subprocess.run([*map(str, program), *map(str, words)], capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=60, **options)


def test_a_store_that_cannot_be_written_is_refused_in_words(tmp_path):
    with small_disk(tmp_path / "disk", "2m"):
        store = roexec.Store(str(tmp_path / "disk/store")).create()
        apply(store, make_job())
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        for words in ("server --no-http", "run --id x", "run --name n -- true", "pause x"):
            done = roexec_program("--store", store.path, *words.split())
            said = done.stderr.splitlines()
            assert done.returncode and len(said) == 1 and store.path in said[0], (words, done)
            assert "ead-only" in said[0], (words, said)
        subprocess.run(["mount", "-o", "remount,rw", str(tmp_path / "disk")], check=True)
        assert roexec_program("--store", store.path, "run", "--id", "x").returncode == 0


@pytest.fixture
def read_all(cli):
    """`read_all(store)`: what the commands that only read say, (standard output, error) of all."""
    def read(store):
        done = [cli(line, store=store.path) for line in (
            "list runs", "list jobs", "show x", "logs latest", "why x", "next x")]
        assert [status for status, _, _ in done] == [0] * 6, done
        return "".join(out for _, out, _ in done), "".join(err for _, _, err in done)
    return read


@pytest.mark.parametrize("left", ["nothing", "log", "log alone"])
def test_a_store_on_a_disk_that_can_only_be_read_can_be_read(left, tmp_path, cli, read_all):
    """`left` is what a server that was killed has left beside the database."""
    with small_disk(tmp_path / "disk", "4m"):
        store = roexec.Store(str(tmp_path / "disk/store")).create()
        apply(store, make_job("echo printed", schedule="0 2 * * *"))
        assert cli("run --id x", store=store.path)[0] == 0
        if left != "nothing":
            server = Server(store, tmp_path / "said")
            apply(store, make_job(job_id="newest"))
            server.kill()
            kill_descendants()
            assert os.path.getsize(store.database + "-wal") > 0
        if left == "log alone":
            os.unlink(store.database + "-shm")
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        said, told = read_all(store)
        assert "succeeded" in said and "[OUT] printed" in said
        assert ("newest" in said) is (left == "log")
        assert ("the newest changes" in told) is (left == "log alone"), told
        assert not left == "nothing" or not told


def test_a_store_that_is_mounted_to_be_read_shows_what_its_server_does(store, start, tmp_path,
                                                                       read_all):
    job = make_job(f"echo printed; while ! test -e {tmp_path}/go; do sleep 0.02; done",
                   schedule="0 2 * * *")
    apply(store, job)
    server, folder = start(), tmp_path / "mounted"
    folder.mkdir()
    run_id = roexec.request_run(store, job, trigger="manual")
    await_state(store, run_id, "running")
    wait_for(lambda: roexec.live_log(store, read_run(store, run_id)))
    if os.geteuid() != 0 or subprocess.run(
            ["mount", "--bind", store.path, str(folder)], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("only root can mount a folder elsewhere")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        assert "running" in read_all(roexec.Store(str(folder)))[0]
        (tmp_path / "go").touch()
        await_state(store, run_id, "succeeded")
        said, told = read_all(roexec.Store(str(folder)))
        assert "succeeded" in said and not told
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
    server.stop()


def test_a_store_on_a_full_disk_can_be_read(tmp_path, cli, read_all):
    with small_disk(tmp_path / "disk", "2m"):
        store = roexec.Store(str(tmp_path / "disk/store")).create()
        apply(store, make_job("echo printed", schedule="0 2 * * *"))
        assert cli("run --id x", store=store.path)[0] == 0
        for name in ("-wal", "-shm"):           # a clean end leaves them empty, or not at all
            with contextlib.suppress(FileNotFoundError):
                os.unlink(store.database + name)
        fill(tmp_path / "disk/filler")
        said, told = read_all(store)
        assert "succeeded" in said and "[OUT] printed" in said
        assert "what has ended meanwhile cannot be recorded" in told and "I/O" in told


@pytest.mark.parametrize("another", [False, True])
def test_a_server_whose_store_was_deleted_ends_and_says_so(store, start, tmp_path, another):
    job = make_job(f"echo $$ > {tmp_path}/pid; sleep 600", "long", grace=0.2)
    apply(store, job, make_job(schedule="@every 1s", max_concurrent=0), since=time.time() - 3)
    server = start()
    roexec.request_run(store, job, trigger="manual")
    command = read_pid(tmp_path / "pid")
    os.rename(store.path, tmp_path / "away")
    if another:
        roexec.Store(store.path).create()
    shutil.rmtree(tmp_path / "away")
    assert end_of(server.pid) != 0
    assert f"the store {store.path} was removed" in server.said
    assert is_alive(command)            # nobody has asked for its end
    if another:
        assert read_runs(store) == []
        server = start()
        apply(store, make_job())
        await_state(store, roexec.request_run(store, make_job(), trigger="manual"), "succeeded")
        server.stop()
    else:
        assert not os.path.exists(store.path)


# The clock.

class Clock:
    """The clock of all processes of a test, which can be set."""

    def __init__(self, monkeypatch, instant):
        self.shared, self.real = mmap.mmap(-1, 8), time.time
        self.set(instant)
        monkeypatch.setattr(time, "time", self.time)

    def time(self):
        return self.real() + struct.unpack("d", self.shared[:])[0]

    def set(self, instant):
        self.shared[:] = struct.pack("d", instant - self.real())


NOON = 1754049600           # 2025-08-01T12:00:00Z
YEARS = 10 * 365 * 24       # hours


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch, NOON - 0.4)


class Hourly:
    """A server with an hourly job, one of which the slot at noon has run."""

    def __init__(self, store, start, clock, tmp_path):
        self.store, self.clock, self.start = store, clock, start
        self.marks = Witness(tmp_path / "marks")
        apply(store, make_job(self.marks.note("$ROEXEC_SLOT"), schedule="0 * * * *",
                              timezone="UTC"), make_job("true", "probe"),
              make_job(job_id="paused", schedule="0 * * * *", timezone="UTC"), since=NOON - 1)
        with store.write() as db:
            roexec.pause_job(db, "paused", True)
        self.server = start()
        wait_for(lambda: self.hours == [0])
        self.settle()

    @property
    def hours(self):
        """The slots that have run, in hours after noon."""
        return [(roexec.parse_instant(line, timezone.utc) - NOON) / HOUR
                for line in self.marks.lines]

    def settle(self):
        """Wait until the server has seen what the clock is now, and has done what is due."""
        for _ in range(2):
            self.store.wake()
            probe = make_job("true", "probe")
            await_state(self.store, roexec.request_run(self.store, probe, trigger="manual"),
                        "succeeded")
        wait_for(lambda: has_settled(self.store), what=lambda: briefly(self.store))

    def jump(self, hours, seconds=0.1):
        """Set the clock to hours after noon, and some seconds."""
        self.clock.set(NOON + hours * HOUR + seconds)
        self.settle()

    def skipped(self, job_id="x"):
        """(first, last in hours after noon, count) of the rows of slots that did not run."""
        return [((row["slot"] - NOON) / HOUR, (row["last_slot"] - NOON) / HOUR, row["count"])
                for row in read_runs(self.store, job_id=job_id, state="skipped")]


@pytest.fixture
def hourly(store, start, clock, tmp_path):
    hourly = Hourly(store, start, clock, tmp_path)
    yield hourly
    hourly.server.stop()


def test_a_second_forth_and_back_repeats_no_slot(hourly, clock):
    hourly.jump(0, 1.5)
    hourly.jump(0, -0.6)
    wait_for(lambda: clock.time() > NOON + 0.2)
    hourly.settle()
    assert (hourly.hours, hourly.skipped()) == ([0], [])


def test_an_hour_forth_is_the_next_slot(hourly):
    hourly.jump(1)
    assert (hourly.hours, hourly.skipped()) == ([0, 1], [])


def test_an_hour_back_repeats_no_slot_even_where_its_run_was_removed(hourly, store):
    with store.write() as db:
        db.execute("DELETE FROM runs WHERE job_id = 'x'")       # as the retention of history does
    hourly.jump(-1)
    hourly.jump(0)
    assert hourly.hours == [0]
    hourly.jump(1)
    assert (hourly.hours, hourly.skipped()) == ([0, 1], [])


def test_after_a_suspend_the_newest_slot_runs_and_the_others_are_one_row(hourly):
    hourly.jump(8)
    assert (hourly.hours, hourly.skipped()) == ([0, 8], [(1, 7, 7)])
    assert hourly.skipped("paused") == [(0, 8, 9)]


def test_a_year_forth_is_an_outage_like_any_other(hourly):
    before = cpu_seconds(hourly.server.pid)
    hourly.jump(365 * 24)
    assert (hourly.hours, hourly.skipped()) == ([0, 8760], [(1, 8759, 8759)])
    assert cpu_seconds(hourly.server.pid) - before < 10


def cpu_seconds(pid):
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_ten_years_back_slots_count_from_then_and_none_is_repeated_or_made_up(hourly):
    hourly.jump(-YEARS)
    assert "The clock was set back by" in hourly.server.said
    hourly.jump(1 - YEARS)
    assert hourly.hours == [0, 1 - YEARS]
    hourly.jump(0, 9)
    assert hourly.hours == [0, 1 - YEARS]
    hourly.jump(1)
    assert (hourly.hours, hourly.skipped()) == ([0, 1 - YEARS, 1], [])
    assert hourly.skipped("paused") == [(0, 1, 2), (1 - YEARS, 1 - YEARS, 1)]


def test_a_start_in_1970_repeats_nothing_and_misses_what_was_missed(hourly, clock, start):
    hourly.server.stop()
    clock.set(30)                       # as a host without a clock of its own starts
    hourly.server = start()
    hourly.settle()
    hourly.jump(3)
    assert (hourly.hours, hourly.skipped()) == ([0, 3], [(1, 2, 2)])
    assert hourly.skipped("paused") == [(0, 3, 4)]


# What a process was given.

def test_many_runs_leave_no_descriptor_no_process_and_no_memory(store, start):
    jobs = [make_job(f"exit {number % 3}", f"j-{number % 3}-{number}", max_concurrent=0,
                     retries=number % 2, backoff=0.001, hooks={"on_success": "true"})
            for number in range(20)]
    apply(store, *jobs)
    server, counts, total = start(settings={"scheduler": {"max_concurrent": 6}}), [], 0

    def files():
        return len(os.listdir(f"/proc/{server.pid}/fd"))
    for _ in range(200 if LONG else 10):
        with store.write() as db:
            for number in range(50):
                job = jobs[number % 20]
                roexec.add_run(db, id=roexec.new_run_id(), job_id=job.id, trigger="manual",
                               state="queued", queued_at=time.time(), version=1)
        store.wake()
        total += 50
        wait_for(lambda: not active(store), 60, lambda: briefly(store))
        counts.append((files(), memory_of(server.pid)))
    opened, memory = zip(*counts)
    assert len(read_runs(store)) == total
    assert {row["exit_code"] for row in read_runs(store)} == {0, 1, 2}
    assert memory[-1] - memory[2] < 8 << 20, memory
    # What has ended is let go of a little later: a supervisor is an open file, and has a keeper.
    wait_for(lambda: files() - min(opened[2:]) <= 10, what=lambda: (opened, files()))
    wait_for(lambda: len(descendants(server.pid)) <= 20)
    wait_for(lambda: not [pid for pid, process in roexec.processes().items() if process.parent in
                          (server.pid, *descendants(server.pid)) and not process.alive])
    wait_for(lambda: os.listdir(store.file("active")) == [])
    server.stop()
    wait_for(lambda: not descendants())


def active(store):
    with store.read() as db:
        return roexec.active_runs(db)


def memory_of(pid):
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def ignoring_children():
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)


@pytest.mark.parametrize("words, status", [
    ("run --name n -- false", 1), ("exec -- false", 1), ("run --id x", 3),
    ("run --id x --detach", 0)])
def test_commands_know_exit_codes_where_sigchld_is_inherited_as_ignored(store, words, status):
    apply(store, make_job("exit 3"))
    done = roexec_program("--store", store.path, *words.split(), preexec_fn=ignoring_children)
    assert (done.returncode, done.stderr) == (status, ""), done
    for run in read_runs(store):
        row = await_state(store, run["id"], *roexec.FINAL_STATES)
        assert (row["state"], row["exit_code"]) == ("failed", status or 3)


def test_a_server_knows_exit_codes_where_sigchld_is_inherited_as_ignored(store, tmp_path):
    job = make_job("exit 3", hooks={"on_failure": "exit 4"}, retries=1, backoff=0.01)
    apply(store, job)
    pid = in_child(lambda: (ignoring_children(), os.execv(sys.executable, [
        sys.executable, "-I", roexec.__file__, "--store", store.path, "server", "--no-http"])))
    run = await_state(store, roexec.request_run(store, job, trigger="manual"), "failed")
    assert [row["exit_code"] for row in read_attempts(store, run["id"])] == [3, 3]
    os.kill(pid, signal.SIGTERM)
    assert end_of(pid) == 0
    wait_for(lambda: not descendants())


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    subprocess.run([sys.executable, ROOT / "zipapp/build.py", sys.executable, "--output", folder],
                   check=True, capture_output=True)
    return folder / "roexec.pyz"


@pytest.mark.parametrize("kind", ["archive", "file"])
def test_modules_in_the_current_folder_are_not_ours(archive, tmp_path, kind):
    folder = tmp_path / "downloads"
    folder.mkdir()
    for name in ("json", "sqlite3", "argparse", "socket", "sitecustomize", "roexec"):
        (folder / f"{name}.py").write_text("raise SystemExit('hostile')")
    assert "hostile" in subprocess.run([sys.executable, "-c", "import json"], cwd=folder, text=True,
                                       capture_output=True).stderr
    program = [sys.executable, archive] if kind == "archive" else [
        sys.executable, "-I", roexec.__file__]
    for words, status in (("run --name n -- false", 1), ("list runs --json", 0),
                          ("exec -- false", 1), ("no such command", 2)):
        done = roexec_program("--store", tmp_path / "store", *words.split(), program=program,
                              cwd=folder)
        assert done.returncode == status and "hostile" not in done.stdout + done.stderr, done
