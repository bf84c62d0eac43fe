"""As whom commands run, and what they may use: each thing by its effect, and what is recorded."""
import grp
import os
import pathlib
import pwd
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

import pytest
from helpers import (claimed, descendants, end_of, in_child, make_job, output_of, perform,
                     read_attempts, read_log_of, supervise, wait_for)

import roexec

pytestmark = pytest.mark.usefixtures("clean")      # of processes

# Of a user that no host has, and no other suite at the same time: the kernel counts the processes
# of a user on the whole host.
UID = 20_000 + 4 * random.SystemRandom().randrange(10_000)
GID, MORE = UID + 1, [UID + 2, UID + 3]
IS_ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not IS_ROOT, reason="only root can become another user")
MEBIBYTE = 1 << 20


@pytest.fixture
def home():
    """A folder that everybody may enter."""
    path = tempfile.mkdtemp()
    os.chmod(path, 0o777)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def someone(monkeypatch, home):
    """The name of a user with groups of its own and the folder `home`."""
    entry = pwd.struct_passwd(("someone", "x", UID, GID, "", home, "/bin/false"))
    by_name, by_uid, groups = pwd.getpwnam, pwd.getpwuid, os.getgrouplist
    monkeypatch.setattr(pwd, "getpwnam", lambda name: entry if name == "someone" else by_name(name))
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: entry if uid == UID else by_uid(uid))
    monkeypatch.setattr(os, "getgrouplist", lambda name, gid: [
        gid, *MORE] if name == "someone" else groups(name, gid))
    return "someone"


def as_someone(function):
    """What a function does in a process that has become a plain user -> its exit code."""
    def become():
        os.setgroups(MORE)
        os.setresgid(GID, GID, GID)
        os.setresuid(UID, UID, UID)
        return function()
    return end_of(in_child(become))


# Users and groups.

@needs_root
def test_a_command_runs_as_its_user_with_all_groups_and_nothing_of_ours(store, someone):
    run = perform(store, "grep -E '^(Uid|Gid|Groups|CapEff):' /proc/self/status; "
                  "echo $HOME $USER $LOGNAME; pwd", user=someone, directory="~",
                  hooks={"post_run": "echo hook $(id -u):$(id -g)"})
    uids, gids, groups, capabilities, names, folder, hook = output_of(store, run).splitlines()
    assert uids.split() == ["Uid:"] + [str(UID)] * 4
    assert gids.split() == ["Gid:"] + [str(GID)] * 4
    assert set(map(int, groups.split()[1:])) == {GID, *MORE}
    assert int(capabilities.split()[1], 16) == 0
    assert names == f"{folder} someone someone"
    assert hook == f"hook {UID}:{GID}"
    assert run["state"] == "succeeded"


@needs_root
def test_a_condition_and_a_source_of_secrets_run_as_the_user_too(store, someone, home):
    run = perform(store, "echo $WHO", user=someone, condition=f"id -u > {home}/condition",
                  env_from={"command": "echo WHO=$(id -u)"})
    assert output_of(store, run) == f"{UID}\n"
    with open(home + "/condition") as file:
        assert file.read() == f"{UID}\n"


@needs_root
def test_a_group_alone_is_added_and_replaces_the_first_one(store):
    group = next(entry for entry in grp.getgrall() if entry.gr_gid not in os.getgroups())
    run = perform(store, "id -u; id -g; id -G", group=group.gr_name)
    uid, gid, groups = output_of(store, run).splitlines()
    assert (uid, gid) == ("0", str(group.gr_gid))
    assert set(map(int, groups.split())) == {group.gr_gid, *os.getgroups()}


@needs_root
def test_a_group_beside_a_user_replaces_its_first_one(store, someone):
    group = grp.getgrall()[-1]
    run = perform(store, "id -u; id -g; id -G", user=someone, group=group.gr_name)
    uid, gid, groups = output_of(store, run).splitlines()
    assert (uid, gid) == (str(UID), str(group.gr_gid))
    assert set(map(int, groups.split())) == {group.gr_gid, GID, *MORE}


@needs_root
def test_the_umask_and_the_owner_of_new_files_are_those_of_the_job(store, someone, home):
    perform(store, "echo text > new", user=someone, directory=home, umask="027")
    found = os.stat(home + "/new")
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (UID, GID, 0o640)


@needs_root
def test_a_folder_is_entered_as_the_user(store, someone, home):
    os.mkdir(home + "/closed", 0o700)
    run = perform(store, "true", user=someone, directory=home + "/closed")
    assert (run["state"], run["reason"], run["exit_code"]) == ("failed", "start", 126)
    assert run["message"] == f"cannot start in the folder {home}/closed: Permission denied"
    os.chown(home + "/closed", UID, GID)
    assert perform(store, "true", user=someone,
                   directory=home + "/closed")["state"] == "succeeded"


@pytest.mark.parametrize("more, problem", [
    ({"user": "nobody-has-this"}, '"nobody-has-this" is no user of this host'),
    ({"group": "nobody-has-this"}, '"nobody-has-this" is no group of this host'),
])
def test_where_the_user_is_unknown_nothing_runs_but_notices(store, tmp_path, more, problem):
    command = f"touch {tmp_path}/ran"
    run = perform(store, command, **more, retries=3, env_from={"command": command + "; echo A=1"},
                  condition=command, hooks={"pre_run": command, "post_run": command,
                  "on_failure": [command, {"webhook": "http://127.0.0.1:9/"}]})
    assert (run["state"], run["reason"]) == ("failed", "start")
    assert run["message"] == "cannot start as the job says: " + problem
    assert not os.path.exists(tmp_path / "ran") and read_attempts(store, run["id"]) == []
    assert f"[ERROR] Cannot start as the job says: {problem}" in read_log_of(store, run["id"])
    with store.read() as db:
        assert [row["kind"] for row in roexec.unsent_notices(db)] == ["webhook"]


def test_a_hook_for_missed_slots_is_not_run_as_somebody_else_either(store, tmp_path):
    job = make_job(user="nobody-has-this", hooks={"on_missed": f"touch {tmp_path}/ran"})
    journal = claimed(store, job)
    journal.header["only"] = "on_missed"
    roexec.Supervision(journal, store.folder, roexec.Signals()).perform()
    assert "cannot start as the job says" in str(journal.events)
    assert not os.path.exists(tmp_path / "ran")


def test_the_loss_of_a_run_whose_user_is_gone_leaves_no_process_and_is_told(store, tmp_path):
    journal = claimed(store, make_job(user="nobody-has-this", if_lost="rerun"))
    left = subprocess.Popen(["sleep", "600"], start_new_session=True)
    for event, values in (("supervisor", {"pid": 1, "start": 0, "log": None}),
                          ("starting", {"what": "attempt"}),
                          ("started", {"pid": left.pid,
                                       "start": roexec.process_start(left.pid)})):
        journal.note(event, **values)
    run = supervise(store, roexec.Journal.glance(journal.path) and _again(journal))
    assert (run["state"], run["reason"]) == ("lost", "supervisor")
    assert left.wait(60) < 0 and len(read_attempts(store, run["id"])) == 1


def _again(journal):
    journal.close()
    return roexec.Journal.find(journal.path)


@needs_root
@pytest.mark.parametrize("call, broken, problem", [
    ("setresuid", lambda *_: None, "the identity could not be changed in whole"),
    ("setresgid", lambda *_: None, "the identity could not be changed in whole"),
    ("setgroups", lambda _: None, "the identity could not be changed in whole"),
    ("setuid", lambda _: None, "root could be had back"),
])
def test_a_system_that_does_not_change_the_identity_in_whole_runs_nothing(
        store, someone, home, monkeypatch, call, broken, problem):
    monkeypatch.setattr(os, call, broken)
    run = perform(store, "echo > ran", user=someone, directory=home)
    assert (run["state"], run["reason"], run["exit_code"]) == ("failed", "start", 126)
    assert run["message"].startswith(f"cannot start as someone: {problem}")
    assert os.listdir(home) == []


@needs_root
@pytest.mark.parametrize("call", ["setgroups", "setresgid", "setresuid"])
def test_an_identity_that_is_refused_runs_nothing(store, someone, home, monkeypatch, call):
    def refuse(*_):
        raise BlockingIOError(11, "Resource temporarily unavailable")
    monkeypatch.setattr(os, call, refuse)
    run = perform(store, "echo > ran", user=someone, directory=home)
    assert run["message"] == "cannot start as someone: Resource temporarily unavailable"
    assert run["exit_code"] == 126 and os.listdir(home) == []


@needs_root
def test_where_the_user_has_too_many_processes_nothing_runs(store, someone, home):
    for _ in range(2):
        in_child(lambda: as_someone(lambda: os.execv("/bin/sleep", ["sleep", "600"])))
    wait_for(lambda: [_uid_of(pid) for pid in descendants()].count(UID) == 2)
    run = perform(store, "echo > ran", user=someone, directory=home, limits={"processes": 1})
    assert (run["state"], run["reason"], run["exit_code"]) == ("failed", "start", 126)
    assert "Resource temporarily unavailable" in run["message"] and os.listdir(home) == []


def _uid_of(pid):
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None


def error_of(**more):
    with pytest.raises(ValueError) as caught:
        roexec.setup_of(make_job(**more))
    return str(caught.value)


@needs_root
def test_who_is_not_root_can_be_only_who_he_is(someone):
    def look():
        assert error_of(user="root") == 'only root can become "root", and this is someone'
        assert error_of(user="someone", group=grp.getgrgid(0).gr_name).startswith(
            f'only root can become "{grp.getgrgid(0).gr_name}"')
        assert not roexec.setup_of(make_job(user="someone"))
    assert as_someone(look) == 0


@needs_root
def test_who_is_not_root_lowers_limits_and_never_asks_for_more(store, someone, home):
    mine = roexec.Setup(limits=(("RLIMIT_NOFILE", 1 << 19), ("RLIMIT_CORE", 0)))

    def look():
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))
        with open(home + "/out", "w") as file:
            pid = roexec.fork_exec("/bin/sh", ["sh", "-c", "ulimit -Sn; ulimit -Hn"], {},
                                   (0, file.fileno(), 2), mine, group=None, folder="/", umask=0o22,
                                   signals=())
            assert end_of(pid) == 0
    assert as_someone(look) == 0
    with open(home + "/out") as file:
        assert file.read() == "200\n200\n"


# Starting by fork and exec.

STARTS = {
    "a missing program": (["no-such-program"], {}),
    "a missing path": (["/nowhere/x"], {}),
    "a missing path below the folder": (["./nowhere"], {}),
    "a program in the folder": (["./plain"], {}),
    "a script without a first line": (["./script", "two words"], {}),
    "a script without a first line, in PATH": (["script", "two words"],
                                               {"env": {"PATH": "FOLDER"}}),
    "a missing interpreter": (["./interpreter"], {}),
    "a file that is no program": (["./data"], {}),
    "a folder": (["/tmp"], {}),
    "a path through a file": (["./data/x"], {}),
    "a missing folder": ("true", {"directory": "/nowhere"}),
    "a folder that is none": ("true", {"directory": "/etc/passwd"}),
    "its shell is missing": ("true", {"shell": "/nowhere/sh"}),
    "it is killed": ("kill -9 $$", {}),
    "an exit code": ("exit 5", {}),
}


@pytest.mark.parametrize("name", STARTS)
def test_both_ways_to_start_a_command_say_the_same(store, home, name):
    for file, text, mode in (("plain", "#!/bin/sh\necho plain", 0o755), ("data", "x", 0o644),
                             ("script", "echo \"$0|$1\"", 0o755),
                             ("interpreter", "#!/nowhere/sh\n", 0o755)):
        with open(f"{home}/{file}", "w") as target:
            target.write(text)
        os.chmod(f"{home}/{file}", mode)
    command, more = STARTS[name]
    more = {"directory": home, **more}
    if "env" in more:
        more["env"] = {"PATH": home}
    told = []
    for way in ({}, {"nice": 0}):
        run = perform(store, command, **more, **way)
        told.append(([run[key] for key in ("state", "reason", "exit_code", "signal", "message")],
                     output_of(store, run)))
    assert told[0] == told[1]
    assert (told[0][0][4] is None) == (name in (
        "a program in the folder", "a script without a first line", "it is killed", "an exit code",
        "a script without a first line, in PATH"))


def test_a_forked_command_sees_three_descriptors_default_signals_and_a_session(store):
    roexec.inherit_nothing()
    run = perform(store, "ls /proc/self/fd | wc -l; grep -E '^Sig(Blk|Ign)' /proc/self/status; "
                  "cut -d' ' -f1,6 /proc/$$/stat", nice=0)
    files, blocked, ignored, ids = output_of(store, run).splitlines()
    assert files == "4"                 # and that of the listing
    of_the_c_library = 0b11 << 31       # signals 32 and 33, which sigaction(2) refuses
    assert [int(line.split()[1], 16) & ~of_the_c_library for line in (blocked, ignored)] == [0, 0]
    assert len(set(ids.split())) == 1


# Limits.

def test_nice_is_added_to_ours(store):
    run = perform(store, "nice; nice -n 0 true", nice=7)
    assert output_of(store, run) == f"{os.nice(0) + 7}\n"


def test_what_only_root_may_is_said(store, someone):
    if IS_ROOT:
        code = as_someone(lambda: _cannot_be_nicer())
    else:
        code = _cannot_be_nicer()
    assert not code


def _cannot_be_nicer():
    with pytest.raises(PermissionError) as caught:
        roexec.fork_exec("/bin/true", ["true"], {}, (0, 1, 2), roexec.Setup(nice=-20), group=None,
                         folder="/", umask=0o22, signals=())
    assert caught.value.filename == "with nice -20"


def test_a_command_that_computes_too_long_ends_with_the_signal_that_says_so(store):
    run = perform(store, "while :; do :; done", limits={"cpu_time": 1}, timeout=60)
    assert (run["state"], run["reason"], run["signal"]) == ("failed", "signal", "SIGXCPU")
    attempt, = read_attempts(store, run["id"])
    assert 0.5 < attempt["cpu_seconds"] < 30 and attempt["exit_code"] is None


def test_a_file_that_becomes_too_long_ends_the_command_but_not_its_log(store, home):
    run = perform(store, ["dd", "if=/dev/zero", f"of={home}/new", "bs=1000", "count=100"],
                  limits={"file_size": 10_000})
    assert (run["state"], run["signal"]) == ("failed", "SIGXFSZ")
    assert os.path.getsize(home + "/new") == 10_000
    run = perform(store, "seq 5000", limits={"file_size": 100})
    assert run["state"] == "succeeded" and len(output_of(store, run)) > 20_000


def test_no_more_files_can_be_opened_than_the_limit_says(store):
    run = perform(store, "ulimit -n; exec 3</dev/null; exec 4</dev/null && echo four; "
                  "echo five </dev/null || exit 3", limits={"files": 5})
    assert output_of(store, run, stream="out") == "5\nfour\n"
    assert (run["state"], run["reason"], run["exit_code"]) == ("failed", "exit", 3)


@needs_root
def test_no_more_processes_can_be_started_than_the_limit_says(store, someone):
    run = perform(store, "echo first; (echo second); echo third", user=someone,
                  limits={"processes": 1})
    assert output_of(store, run, stream="out") == "first\n"
    assert run["state"] == "failed" and "ork" in output_of(store, run, stream="err")


def test_limits_end_with_the_command(store):
    perform(store, "true", limits={"files": 5}, nice=3)
    assert output_of(store, perform(store, "ulimit -n; nice")) == subprocess.run(
        ["sh", "-c", "ulimit -n; nice"], capture_output=True, text=True, check=True).stdout


# Memory and processor.

def holding(mebibytes, until="/nowhere"):
    """Words of a command that holds so much memory, and grows to it in steps, until a file is
    there."""
    return (f"{sys.executable} -ISc 'import os, time\nheld = []\nfor _ in range({mebibytes}):\n"
            f"    held.append(b\"x\" * {MEBIBYTE})\n"
            f"while not os.path.exists(\"{until}\"): time.sleep(0.02)'")


@pytest.fixture
def no_cgroup(monkeypatch):
    monkeypatch.setattr(roexec, "delegated_cgroup", lambda: None)


def test_a_tree_that_grows_beyond_its_memory_is_killed_soon(store, no_cgroup):
    began = time.monotonic()
    run = perform(store, f"trap '' TERM; {holding(50)} & {holding(50)} & wait; sleep 600",
                  limits={"memory": 80 * MEBIBYTE}, grace=600)
    assert time.monotonic() - began < 300
    assert (run["state"], run["reason"], run["signal"]) == ("failed", "memory", "SIGKILL")
    assert roexec.exit_status(run) == 137
    attempt, = read_attempts(store, run["id"])
    assert 80 * MEBIBYTE < attempt["max_rss_bytes"] < 200 * MEBIBYTE
    log = read_log_of(store, run["id"])
    assert "[INFO] limits.memory is kept by watching the processes\n" in log
    assert "[INFO] Killed 3 processes\n" in log
    assert not descendants()


def test_a_tree_below_its_memory_ends_by_itself_and_its_peak_is_recorded(store, no_cgroup, tmp_path,
                                                                        monkeypatch):
    look, seen = roexec.Watch.exceeded, tmp_path / "seen"

    def look_and_let_go(watch, processes):
        exceeded = look(watch, processes)
        if watch.peak > 45 * MEBIBYTE:
            seen.touch()
        return exceeded
    monkeypatch.setattr(roexec.Watch, "exceeded", look_and_let_go)
    run = perform(store, f"{holding(20, seen)} & {holding(20, seen)} & wait", timeout=60,
                  limits={"memory": 500 * MEBIBYTE})
    attempt, = read_attempts(store, run["id"])
    assert run["state"] == "succeeded"
    assert 45 * MEBIBYTE < attempt["max_rss_bytes"] < 200 * MEBIBYTE


def test_the_memory_of_a_command_is_its_own_or_unknown(store):
    """What the kernel says of a small child is what its supervisor held."""
    found = {}
    for name, words in (("small", ["true"]), ("large", shlex.split(holding(100, "/")))):
        subprocess.run([sys.executable, roexec.__file__, "--store", store.path, "run", "--name",
                        name, "--", *words], check=True)
        with store.read() as db:
            found[name], = roexec.get_attempts(db, roexec.find_run(db, name)["id"])
    assert found["small"]["max_rss_bytes"] is None
    assert 100 * MEBIBYTE < found["large"]["max_rss_bytes"] < 200 * MEBIBYTE


def test_a_run_that_is_out_of_memory_is_tried_again_like_any_failure(store, no_cgroup):
    run = perform(store, holding(60), limits={"memory": 30 * MEBIBYTE}, retries=1,
                  backoff=0.01)
    assert (run["state"], run["reason"]) == ("failed", "memory")
    assert len(read_attempts(store, run["id"])) == 2


@pytest.mark.parametrize("limits, remarks", [
    ({"cpu": 0.5}, ["limits.cpu is not kept: no cgroup (v2) has been delegated to the server"]),
    ({"cpu": 0.5, "memory": "1G"},
     ["limits.memory is kept by watching the processes; "
      "limits.cpu is not kept: no cgroup (v2) has been delegated to the server"]),
    ({"files": 100}, []),
])
def test_the_log_says_how_limits_are_kept(store, no_cgroup, limits, remarks):
    run = perform(store, "true", limits=limits)
    lines = [line.split("[INFO] ")[1] for line in read_log_of(store, run["id"]).splitlines()]
    assert [line for line in lines if "limits" in line.lower()] == remarks
    assert run["state"] == "succeeded"


# Cgroups: their files, without the kernel behind them.

@pytest.fixture
def tree(home, monkeypatch):
    """`tree(own, **files)` makes this process stand in the cgroup `own` of a tree of plain files,
    and gives the path of that cgroup's parent."""
    def place(path):
        path = os.fspath(path) if not isinstance(path, int) else path
        for prefix, target in (("/sys/fs/cgroup", "tree"), ("/proc/self/cgroup", "self")):
            if isinstance(path, str) and path.startswith(prefix):
                return f"{home}/{target}{path[len(prefix):]}"
        return path

    def mark(path, name):
        if name != "user.delegate" or marks.get(place(path)) is None:
            raise OSError(61, "No data available")
        return marks[place(path)]

    def make(own, controllers="cpu io memory pids", delegated=b"1"):
        folder = pathlib.Path(home)
        (folder / "self").write_text(f"12:pids:/other\n0::{own}\n" if own else "3:cpu:/\n")
        parent = folder / f"tree{os.path.dirname(own or '/x')}"
        parent.mkdir(parents=True, exist_ok=True)
        marks[str(parent)] = delegated
        if controllers is not None:
            (parent / "cgroup.controllers").write_text(controllers + "\n")
        return parent
    access, marks = os.access, {}
    monkeypatch.setattr(os, "getxattr", mark)
    monkeypatch.setattr(roexec, "open", lambda path, *more: open(place(path), *more), raising=False)
    monkeypatch.setattr(os, "access", lambda path, mode: access(place(path), mode))
    return make


def test_a_delegated_part_is_found_beside_the_group_of_the_server(tree):
    parent = tree("/system.slice/roexec.service/server")
    assert roexec.delegated_cgroup() == "/sys/fs/cgroup/system.slice/roexec.service"
    assert (parent / "cgroup.subtree_control").read_text() == "+memory +cpu"


@pytest.mark.parametrize("own, controllers, delegated", [
    ("/a/b", "cpu memory", None), ("/a/b", "cpu memory", b"0"), ("/a/b", "cpu pids", b"1"),
    ("/a/b", None, b"1"), (None, None, b"1")])
def test_where_no_part_with_both_controllers_is_delegated_there_is_none(tree, own, controllers,
                                                                         delegated):
    parent = tree(own, controllers, delegated)
    assert roexec.delegated_cgroup() is None
    assert not (parent / "cgroup.subtree_control").exists()


def test_a_part_that_cannot_have_controllers_is_none(tree):
    parent = tree("/a/b")
    (parent / "cgroup.subtree_control").mkdir()     # EBUSY, in a kernel
    assert roexec.delegated_cgroup() is None


@needs_root
def test_a_part_is_delegated_to_whom_it_belongs(tree):
    parent = tree("/a/b")
    assert as_someone(lambda: roexec.delegated_cgroup() is not None) == 0
    os.chown(parent, UID, GID)
    assert as_someone(lambda: roexec.delegated_cgroup() is None) == 0


def test_a_cgroup_is_given_its_limits_and_says_what_the_kernel_counted(tmp_path):
    group = roexec.Cgroup(str(tmp_path), "run-x", {"memory": 1000, "cpu": 1.5})
    files = {path.name: path.read_text() for path in (tmp_path / "run-x").iterdir()}
    assert files == {"memory.max": "1000", "memory.oom.group": "1", "memory.swap.max": "0",
                     "cpu.max": "150000 100000"}
    group.kill()
    assert (tmp_path / "run-x/cgroup.kill").read_text() == "1"
    (tmp_path / "run-x/memory.peak").write_text("777\n")
    (tmp_path / "run-x/memory.events").write_text("low 0\nmax 3\noom 1\noom_kill 2\n")
    assert group.close() is True and group.peak == 777
    (tmp_path / "run-x/memory.events").write_text("low 0\nmax 3\noom 1\noom_kill 0\n")
    assert group.close() is False


def test_a_cgroup_that_cannot_have_its_limits_is_not_left(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(roexec.Cgroup, "_write", refuse)
    with pytest.raises(OSError):
        roexec.Cgroup(str(tmp_path), "run-x", {"memory": 1000})
    assert os.listdir(tmp_path) == []


def test_a_command_starts_in_its_cgroup_and_what_the_kernel_ended_is_recorded(
        store, tmp_path, monkeypatch):
    parent = tmp_path / "delegated"
    parent.mkdir()
    monkeypatch.setattr(roexec, "delegated_cgroup", lambda: str(parent))
    run = perform(store, f"cd {parent}/run-$ROEXEC_RUN_ID-$ROEXEC_ATTEMPT; "
                  "test $(cat cgroup.procs) = $$ && echo 'oom_kill 1' > memory.events; "
                  "echo 123456789012 > memory.peak; kill -9 $$", limits={"memory": "1M"}, retries=1,
                  backoff=0.01)
    assert (run["state"], run["reason"], run["signal"]) == ("failed", "memory", "SIGKILL")
    assert [row["max_rss_bytes"] for row in read_attempts(store, run["id"])] == [123456789012] * 2
    assert "[INFO] Limits are kept by a cgroup\n" in read_log_of(store, run["id"])


def test_a_command_that_cannot_join_its_cgroup_does_not_start(store, tmp_path, monkeypatch):
    monkeypatch.setattr(roexec, "delegated_cgroup", lambda: str(tmp_path / "gone"))
    run = perform(store, f"touch {tmp_path}/ran", limits={"memory": "1G"})
    assert (run["state"], run["reason"]) == ("failed", "start")
    assert "No such file or directory" in run["message"] and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("unit, moves", [
    ("run-1.scope", True),
    ("roexec.service", False),          # systemd could not start it again while runs are on
])
def test_a_server_makes_room_in_a_delegated_scope_only(tmp_path, monkeypatch, unit, moves):
    own = tmp_path / unit
    own.mkdir()
    monkeypatch.setattr(roexec, "_cgroup_of", lambda pid: str(own))
    monkeypatch.setattr(roexec, "_is_delegated", lambda folder: folder == str(own))
    roexec.prepare_cgroup()
    assert (own / "server").exists() is moves
    if moves:
        assert (own / "server/cgroup.procs").read_text() == str(os.getpid())


def test_a_server_removes_empty_cgroups_of_runs_that_are_over(tmp_path, monkeypatch):
    monkeypatch.setattr(roexec, "delegated_cgroup", lambda: str(tmp_path))
    for name in ("run-old-1", "run-full-1/x", "run-new-1", "server"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("run-old-1", "run-full-1", "server"):
        os.utime(tmp_path / name, (0, 0))
    roexec.prepare_cgroup()
    assert sorted(os.listdir(tmp_path)) == ["run-full-1", "run-new-1", "server"]
