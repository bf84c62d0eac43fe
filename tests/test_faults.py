"""Faults that are caused: kills at any moment, calls that fail, full disks, clocks that jump.

ROEXEC_LONG=1 makes all rounds and all steps; ROEXEC_SEED repeats the random choices of a run.
"""
import collections
import contextlib
import mmap
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import (Server, apply, await_state, descendants, end_of, in_child, is_alive,
                     kill_descendants, make_job, read_attempts, read_pid, read_run, read_runs,
                     wait_for)

import roexec
from roexec import RoexecError

HOUR = 3600
LONG = bool(os.environ.get("ROEXEC_LONG"))
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    """No process and no setting of this process outlives a test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("INVOCATION_ID", raising=False)
    roexec.become_subreaper()
    yield
    kill_descendants()


@pytest.fixture
def store(tmp_path):
    return roexec.Store(str(tmp_path / "store")).create()


@pytest.fixture
def start(store, tmp_path):
    """`start(**options)` starts a server of the store."""
    return lambda **options: Server(store, tmp_path / "said", **options)


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


def has_settled(store):
    return all(row["state"] in roexec.FINAL_STATES for row in read_runs(store))


def check_store(store, witness):
    """What holds whatever happened, once nothing is on any more: `witness` has the ids of the runs
    whose commands were started, each with the number of its job's exit code."""
    with store.read() as db:
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        kept = {row["id"]: row["position"] for row in db.execute("SELECT * FROM jobs")}
    assert not roexec.lock_is_held(store.file("store.lock"))
    assert [name for name in os.listdir(store.file("active")) if "." not in name] == []
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

    def start(self):
        if self.pid is None:
            self.pid = in_child(lambda: os.execv(sys.executable,
                                                 [sys.executable, str(self.script)]))

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
        victims.start()
        for job in (*long, chance.choice(short)):
            with contextlib.suppress(roexec.Refused):
                asked.append(roexec.request_run(store, job, trigger="manual"))
        time.sleep(chance.random() * chance.choice((0.02, 0.1, 0.4)))       # what is tested
        victims.kill_one(chance)
    victims.start()
    apply(store, *[roexec.Job({**job.spec, "enabled": False}) for job in short])
    gate.unlink()
    wait_for(lambda: has_settled(store), 60, lambda: (
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


# Each call that touches a file is the last one, or fails.

CHANGING = ("openat ?open pwrite64 write ?writev fsync fdatasync ?rename ?renameat ?renameat2 "
            "?unlink unlinkat ?mkdir mkdirat ?mknod mknodat ftruncate flock fcntl sendmsg").split()
FAULTS = {
    "SIGKILL": ("signal=SIGKILL", CHANGING),
    "EIO": ("error=EIO", ["pwrite64", "write", "fsync", "fdatasync", "pread64", "read"]),
    "ENOSPC": ("error=ENOSPC", ["openat", "pwrite64", "write", "ftruncate", "?mkdir", "?rename",
                                "?renameat", "?renameat2"]),
    "EMFILE": ("error=EMFILE", ["openat", "?pipe", "pipe2", "socketpair"]),
    "EAGAIN": ("error=EAGAIN", ["clone", "?clone3", "?fork", "?vfork"])}


@pytest.fixture(scope="module", autouse=True)
def strace():
    """What injects faults. CI has it; elsewhere a test that needs it is skipped."""
    if shutil.which("strace"):
        return True
    assert not os.environ.get("CI"), "strace is missing"
    return False


NEVER = 65_000          # the call that fails, where none is to


class Faulty:
    """A child whose N-th call of some kinds fails, or kills it.

    `begin(wait)` starts it -> its pid; it calls `wait` to be let go on when strace watches it. Its
    commands are not watched: they are not ours.
    """

    def __init__(self, begin, fault, number, trace):
        reader, go = os.pipe()
        action, calls = FAULTS[fault]
        chosen = ",".join(calls)
        self.pid = begin(lambda: (_let_be_traced(), os.close(go), os.read(reader, 1)))
        os.close(reader)
        trace.write_text("")
        self.strace = subprocess.Popen(
            ["strace", "-p", str(self.pid), "-o", str(trace), "-e", f"trace={chosen}", "-e",
             f"inject={chosen}:{action}:when={number}"], stderr=subprocess.PIPE)
        assert b"attached" in self.strace.stderr.readline(), self.strace.stderr.read()
        os.write(go, b"g")
        os.close(go)

    def end(self):
        status = end_of(self.pid)
        self.strace.communicate()
        return status


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


class Claim(Case):
    """A server claims slots and a request, hands them over, takes their ends in, and is told to
    end."""

    def prepare(self):
        super().prepare()
        now = int(time.time()) // HOUR * HOUR
        self.hook = Witness(self.folder / "hook")
        self.log = self.folder / "said"
        for code in (0, 3):
            apply(self.store, numbered_job(self.witness, "due", code, schedule="@every 1h"),
                  since=now - 1)
        apply(self.store, numbered_job(self.witness, "late", 0, schedule="@every 1h",
                                       catch_up="none", hooks={"on_missed": self.hook.note("x")}),
              since=now - 4 * HOUR - 1)
        self.ask(numbered_job(self.witness, "asked", 5))

    def serve(self, ready, **options):
        def soon(scheduler):
            sleep, roexec._LOOK = time.sleep, 0.1
            time.sleep = lambda seconds: sleep(min(seconds, 0.02))
            ready()
        return Server(self.store, self.log, prepare=soon, **options)

    def begin(self, wait):
        return self.serve(wait, wait=False).pid

    def is_done(self):
        return sum(row["count"] for row in read_runs(self.store)) == 8 \
            and has_settled(self.store) and self.hook.lines

    def act(self, pid):
        wait_for(lambda: self.is_done() or not is_alive(pid), what=lambda: (
            briefly(self.store), self.log.read_text()))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)

    def check(self, status):
        said = self.log.read_text()
        if status not in (0, -signal.SIGKILL):      # it could not begin, or not end; that is said
            assert "RoexecError" in said or "OSError" in said, said
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
        before = (len(roexec._MIGRATIONS), 9)
        after = before[0] + 1, before[1] + 1
        assert self.versions(self.store.database) in ((before, after) if status else (after,))
        assert end_of(in_child(self.perform)) == 0
        assert self.versions(self.store.database) == after
        assert self.versions(f"{self.store.database}.version-{before[0]}.db") == before


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("case", [Claim, Attempt, Alone, TakeIn, Cancel, Make, Migrate],
                         ids=lambda case: case.__name__.lower())
def test_each_call_that_touches_a_file_may_be_the_last_or_fail(strace, case, fault, tmp_path,
                                                               chance):
    if not strace:
        pytest.skip("strace is not installed here")
    count = perform(case(tmp_path / "all"), fault, NEVER, tmp_path / "trace")
    numbers = range(1, count + 1)
    if not LONG:
        numbers = chance.sample(numbers, min(count, case.most[fault == "SIGKILL"]))
    for number in numbers:
        perform(case(tmp_path / str(number)), fault, number, tmp_path / "trace")
        shutil.rmtree(tmp_path / str(number))
    print(count)


Case.most = (4, 16)     # how many of the calls fail, or kill, in a short run


def perform(case, fault, number, trace):
    """Perform a case, the N-th call of which fails -> how many calls there were."""
    try:
        faulty = Faulty(case.begin, fault, number, trace)
        case.act(faulty.pid)
        case.check(faulty.end())
    except BaseException:
        print(f"{fault} at call {number}; the last calls until then:\n"
              + "\n".join(trace.read_text().split("\n")[:number + 20][-60:]))
        raise
    finally:
        kill_descendants()
    return sum("(" in line and line[:3] not in ("---", "+++")
               for line in trace.read_text().splitlines())
