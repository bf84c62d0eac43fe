"""The command line: what is asked, which store it reaches, what is printed, the exit status."""
import contextlib
import itertools
import json
import os
import random
import re
import shlex
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest
from helpers import perform, process, read_runs, wait_for

import roexec

NOW = 1754042400.0          # 2025-08-01T10:00:00Z
JOBS = """
jobs:
  - id: hello
    name: Say hello
    schedule: "0 2 * * *"
    command: echo hello
  - id: backup
    command: [sh, -c, "echo out; echo err >&2; exit 3"]
    tags: [nightly]
"""


pytestmark = pytest.mark.usefixtures("surroundings")


@pytest.fixture
def store(tmp_path):
    """A store that does not exist yet."""
    return roexec.Store(str(tmp_path / "store"))


@pytest.fixture
def jobs(cli, tmp_path):
    """The store with the two jobs of `jobs.yml`; gives that file."""
    path = tmp_path / "jobs.yml"
    path.write_text(JOBS)
    assert cli("apply -f jobs.yml")[0] == 0
    return path


def record(store, job_id="hello", state="succeeded", *, at=NOW, **values):
    """Put a run into the store -> its id."""
    ended = state in roexec.FINAL_STATES
    row = {"id": roexec.new_run_id(), "job_id": job_id, "trigger": "manual", "queued_at": at,
           "version": 1, "state": state, "started_at": None if state == "queued" else at,
           "finished_at": at + 1 if ended else None, **values}
    with store.write() as db:
        return roexec.add_run(db, **row)


def state_of(store, run_id):
    with store.read() as db:
        return roexec.get_run(db, run_id)["state"]


def registered(store):
    """{id: spec} of the jobs in the store."""
    with store.read() as db:
        return {row["id"]: json.loads(row["spec"]) for row in roexec.list_jobs(db)}


@contextlib.contextmanager
def a_server(store, answers=True):
    """What a live server looks like from outside: its lock, and somebody who empties the FIFO."""
    store.create()
    lock = roexec.open_private(store.file("server.lock"))
    assert roexec.try_lock(lock)
    os.write(lock, b"4711\n")
    fifo = os.open(store.file("wake"), os.O_RDWR)
    reader = threading.Thread(target=os.read, args=(fifo, 100))
    if answers:
        reader.start()
    try:
        yield fifo
    finally:
        if answers:
            os.write(fifo, b"end")
            reader.join()
        os.close(fifo)
        os.close(lock)


# The table of commands.

COMMANDS = {command.name: command for command in roexec.commands()}
CHANGING = {"run", "exec", "add", "apply", "edit", "delete", "pause", "resume", "cancel", "retry",
            "server", "init", "install", "uninstall", "token create", "token rotate",
            "token revoke", "maintenance purge", "maintenance check", "maintenance backup",
            "maintenance restore", "cluster step-down"}


def test_the_commands_are_those_of_the_design():
    assert set(COMMANDS) == CHANGING | {
        "completion", "doctor", "export", "import crontab", "list jobs", "list runs", "show",
        "logs", "logs export", "next", "why", "status", "wait", "token list", "audit",
        "cluster status"}
    assert {name for name, command in COMMANDS.items() if command.changes} == CHANGING


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_an_example_that_it_understands(name, cli):
    status, out, err = cli(f"{name} --help")
    assert (status, err) == (0, "")
    assert f"usage: roexec {name}" in out and f"example: roexec {COMMANDS[name].example}" in out
    words = shlex.split(COMMANDS[name].example.partition(" >")[0])
    command, arguments, behind = roexec._split(words)
    assert command.name == name
    assert roexec._parse(command, arguments, behind) is not None


@pytest.mark.parametrize("name", COMMANDS)
def test_defaults_without_the_parser_are_those_of_the_parser(name):
    parsed = vars(roexec._parser(COMMANDS[name]).parse_intermixed_args([]))
    assert vars(roexec.Options(COMMANDS[name])) == {
        key: value for key, value in parsed.items() if key != "help"}


def test_the_overview_names_every_command(cli):
    status, out, _ = cli("--help", store=None)
    assert status == 0
    for name in COMMANDS:
        assert f"\n  {name} " in out


def test_the_overview_has_each_group_of_commands_once(cli):
    _, out, _ = cli("--help", store=None)
    assert re.findall(r"^(?!usage)(.*):$", out, re.M) == list(roexec.COMMAND_GROUPS.values())


@pytest.mark.parametrize("family, names", [
    ("token", ["token create", "token list", "token rotate", "token revoke"]),
    ("import", ["import crontab"])])
def test_a_family_of_commands_lists_its_own(family, names, cli):
    status, out, err = cli(f"{family} --help", store=None)
    assert (status, err) == (0, "") and out.startswith(f"usage: roexec {family} ")
    assert [name for name in COMMANDS if f"\n  {name} " in out] == names


def test_the_options_of_a_command_stand_before_those_of_all(cli):
    _, out, _ = cli("list runs --help")
    assert out.index("--active") < out.index("--store") < out.index("--help")


@pytest.mark.parametrize("line", [
    "--json list jobs", "list jobs --json", "-v --json list jobs"])
def test_global_options_stand_before_or_after_the_command(line, cli, jobs):
    status, out, _ = cli(line)
    assert status == 0 and {job["id"] for job in json.loads(out)["jobs"]} == {"hello", "backup"}


@pytest.mark.parametrize("line, sentence", [
    ("lst jobs", 'there is no command "lst"'),
    ("statsu", 'did you mean "status"?'),
    ("list", 'there is no command "list"; there are list jobs and list runs'),
    ("list jobz", 'there is no command "list jobz"; there are list jobs and list runs'),
    ("--frob list jobs", "--frob"),
    ("list runs --stat failed", 'did you mean "--state"?'),
    ("list runs --limit many", '--limit: "many" is not a whole number; see roexec list runs --h'),
    ("--verson", 'there is no option "--verson"; did you mean "--version"?'),
    ("-x", 'there is no option "-x"; see roexec --help'),
    ("apply jobs.yml", "unrecognized arguments: jobs.yml; write roexec apply -f FILE [FILE ...]"),
    ("why hello -1h", "unrecognized arguments: -1h; write roexec why JOB [INSTANT]"),
    ("server --port 99999", "--port: 99999 is not a whole number from 0 to 65535"),
    ("next --count -3", '--count: "-3" is not a whole number'),
    ("list runs --state broken", 'there is no state "broken"'),
    ("next --duration 5m", "--duration is for --to"),
    ("next --cron '0 2 * * *' --to 2030-01-01 --count 3", "do without --count"),
    ("next --cron '0 2 * * *' --to 2030-01-01 --duration 5x", '"5x" is not a duration'),
    ("next --cron '0 2 * * *' --from 2025-01-02 --to 2025-01-01", "before the first instant"),
    ("import tab", 'there is no command "import tab"; there is import crontab'),
    ("import crontab", "name one crontab"),
    ("import crontab a b", "name one crontab"),
    ("import crontab a --system --user b", "write one of them"),
    ("list runs --since yesterday", '"yesterday" is neither'),
    ("list jobs --dry-run", "list jobs changes nothing"),
    ("--dry-run export", "export changes nothing"),
    ("status -- x", "nothing can stand behind --"),
    ("--store", "a command is missing"),
    ("delete", "say which one"),
    ("show a b", "one id is enough"),
    ("apply", "apply -f"),
    ("add x --set timeout -- true", "KEY=VALUE"),
    ("next --cron '61 * * * * * * *'", ""),
    ("next --timezone UTC", "--cron"),
])
def test_a_wrong_command_line_is_one_sentence_and_status_2(line, sentence, cli):
    status, out, err = cli(line)
    assert (status, out) == (2, "")
    assert err.startswith("roexec: ") and err.count("\n") == 1 and sentence in err


@pytest.mark.parametrize("line, sentence", [
    ("run", "say which one"),
    ("run -- true", "--name NAME"),
    ("run --name x hello -- true", "--name is for commands"),
    ("run --name x", "write -- before the command"),
    ("run --name x -- cmd", "no command behind --"),
    ("run --env A hello", "there is no A in your environment; write --env NAME=VALUE"),
    ("run --env A-B hello", "--env A-B: write --env NAME=VALUE"),
    ("run --env 1A=b hello", "NAME=VALUE"),
    ("run --env ROEXEC_SLOT=b hello", "roexec's own"),
    ("exec ls", "unrecognized arguments: ls"),
    ("exec", "write -- before the command"),
    ("wait --dry-run x", "wait changes nothing"),
    ("wait nobody", "there is no"),
    ("run nobody", "there is no store in "),
])
def test_run_exec_and_wait_answer_with_125_for_everything_of_roexecs_own(line, sentence, cli):
    status, out, err = cli(line)
    assert (status, out) == (125, "") and sentence in err and err.count("\n") == 1


@pytest.mark.parametrize("key, status, sentence", [
    ("user=nobody-of-here", 125, 'cannot start as the job says: "nobody-of-here" is no user'),
    ("condition=false", 0, "skipped: the condition ended with 1"),
    ("pre_run=false", 125, "the hook pre_run failed"),
    ("env_from={command: exit 3}", 125, "env_from: the command failed, exit=3"),
    ("directory=/no/such/folder", 126, "cannot start in the folder /no/such/folder"),
    ("command=sleep 60\ntimeout=0.2s", 124, "timed_out, reason=timeout"),
    ("command=echo\nsuccess={output: done}", 1, "failed, reason=output")])
def test_a_run_in_the_foreground_says_why_its_command_did_not_run(
        key, status, sentence, cli, store, capfd):
    keys = key if "command=" in key else f"{key}\ncommand=echo here"
    line = " ".join(f"--set {shlex.quote(text)}" for text in keys.splitlines())
    assert cli(f"add x {line}")[0] == 0
    capfd.readouterr()
    assert roexec.main(["run", "x", "--store", store.path]) == status
    out, err = capfd.readouterr()
    assert out.strip() == "" and err.startswith(f"roexec: {sentence}") and err.count("\n") == 1


def test_no_command_at_all_shows_the_overview_as_an_error(cli, capfd):
    assert roexec.main([]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("usage: roexec COMMAND")


# What a start costs.

def modules_of(*arguments):
    """The modules that a command imports, beside those of a bare interpreter."""
    script = ("import os, sys; sys.path.insert(0, sys.argv.pop(1)); before = set(sys.modules)\n"
              "import roexec; status = roexec.main(sys.argv[1:])\n"
              "print(*(set(sys.modules) - before), file=sys.stderr)")
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script,
                           os.path.dirname(roexec.__file__), *arguments],
                          capture_output=True, text=True, check=True)
    return set(done.stderr.splitlines()[-1].split())


def test_version_imports_nothing_at_all():
    assert modules_of("--version") == {"roexec"}


def test_list_jobs_imports_no_parser_and_nothing_of_the_network(jobs, store, monkeypatch):
    monkeypatch.setenv("ROEXEC_STORE", store.path)
    loaded = modules_of("list", "jobs")
    assert "sqlite3" in loaded
    assert not loaded & {"argparse", "http", "socket", "urllib", "subprocess", "email", "ssl",
                         "shutil", "difflib", "logging", "gettext"}


# Which store.

def test_the_store_is_what_is_given_then_the_environments_then_the_configurations(
        tmp_path, monkeypatch):
    config = roexec.Config({"store": {"path": "/from/config"}})
    monkeypatch.setenv("ROEXEC_STORE", "/from/environment")
    assert roexec.locate_store("given", config) == str(tmp_path / "given")
    assert roexec.locate_store(None, config) == "/from/environment"
    monkeypatch.delenv("ROEXEC_STORE")
    assert roexec.locate_store(None, config) == "/from/config"


@pytest.mark.parametrize("uid, owner, expected", [
    (0, None, "/var/lib/roexec"),
    (1000, None, "HOME/.local/state/roexec"),
    (1000, 1000, "/var/lib/roexec"),
    (1000, 0, "HOME/.local/state/roexec"),
])
def test_the_usual_store_is_the_hosts_for_root_and_its_owner(uid, owner, expected, monkeypatch):
    def host(path):
        if owner is None:
            raise FileNotFoundError
        return os.stat_result((0,) * 4 + (owner,) + (0,) * 5)
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setattr(roexec.os, "stat", host)
    usual = roexec.usual_store()
    monkeypatch.undo()
    assert usual.replace(os.path.join(os.path.dirname(usual.split("/.local")[0]), "home"),
                         "HOME") == expected


def test_a_relative_folder_in_the_environment_is_void(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert roexec.user_folder("XDG_STATE_HOME", ".local/state") == str(
        tmp_path / "home/.local/state/roexec")
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert roexec.user_folder("XDG_STATE_HOME", ".local/state") == "/state/roexec"


@contextlib.contextmanager
def announced(store):
    entry = roexec.announce_server(store)
    try:
        yield entry
    finally:
        roexec.withdraw_announcement(entry)


def test_without_a_store_that_of_the_one_live_server_is_used_and_named(cli, jobs, store):
    with announced(store):
        status, out, err = cli("list jobs", store=None)
    assert status == 0 and "hello" in out
    assert f"using the store {store.path} of the server that runs (process {os.getpid()})" in err


def test_the_usual_store_is_used_without_a_word(cli, jobs, store, monkeypatch):
    monkeypatch.setattr(roexec, "usual_store", lambda: store.path)
    with announced(store):
        assert cli("list jobs", store=None)[2] == ""


def test_several_live_servers_are_listed_and_refused(cli, store, monkeypatch):
    monkeypatch.setattr(roexec, "live_servers", lambda: {"/one": 7, "/two": 8})
    status, _, err = cli("list jobs", store=None)
    assert status == 1 and "/one (process 7), /two (process 8)" in err and "--store" in err


def test_the_file_of_a_server_that_died_means_nothing_and_is_cleared_away(store, tmp_path):
    with announced(store):
        pass
    servers = tmp_path / "servers"
    assert list(servers.iterdir()) == []
    (servers / "99999999").write_text("/dead\n")
    (servers / "99999998.new").write_text("/dead\n")
    assert roexec.live_servers() == {}
    with announced(store):
        assert roexec.live_servers() == {store.path: os.getpid()}
        assert [entry.name for entry in servers.iterdir()] == [str(os.getpid())]
        assert stat.S_IMODE(servers.stat().st_mode) == 0o700


def test_a_server_that_cannot_announce_itself_says_what_to_write(store, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(roexec, "servers_folder", lambda: str(tmp_path / "file/servers"))
    said = []
    store.say = said.append
    assert roexec.announce_server(store) is None
    assert said and f"--store {store.path}" in said[0]


READING = ["list jobs", "list runs", "show hello", "logs hello", "next", "why hello", "status",
           "export", "wait hello", "run hello", "delete hello", "pause hello", "cancel hello",
           "retry hello", "token list", "audit"]
DRY = ["run hello", "run --name x -- true", "exec -- true", "add x -- true", "apply -f jobs.yml",
       "delete hello", "pause hello", "resume hello", "cancel latest", "retry latest",
       "token create --name ci --role viewer", "token rotate ci", "token revoke ci"]


@pytest.mark.parametrize("line", READING + ["--dry-run " + line for line in DRY])
def test_reading_and_dry_runs_never_create_a_store(line, cli, store, tmp_path):
    (tmp_path / "jobs.yml").write_text(JOBS)
    status, _, err = cli(line)
    assert not os.path.exists(store.path)
    assert status in (0, 1, 3, 125) and "Traceback" not in err
    if status in (1, 125):
        assert err.startswith(f"roexec: there is no store in {store.path} yet")


@pytest.mark.parametrize("what", ["jobs", "runs"])
def test_an_empty_list_names_the_store_and_whether_a_server_runs_on_it(what, cli, store):
    status, out, err = cli(f"list {what}")
    assert (status, out) == (0, "")
    assert store.path in err and "no store there yet" in err and "no server runs" in err
    with a_server(store):
        assert cli(f"list {what}")[2] == f"roexec: no {what} in {store.path}; a server runs on it\n"


def forked(arguments, uid=None):
    """Perform a command in a fork, which keeps what is patched -> (process id, its errors)."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(theirs, 2)
            os.close(ours)
            os.close(theirs)
            sys.stderr = open(2, "w", closefd=False)
            if uid is not None:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
            os._exit(roexec.main(arguments))
        finally:
            os._exit(99)
    os.close(theirs)
    return pid, open(ours)


def exit_code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


@pytest.fixture
def open_folder():
    """A folder that every user can reach (tmp_path is its owner's alone)."""
    import shutil
    import tempfile
    folder = tempfile.mkdtemp()
    os.chmod(folder, 0o755)
    yield folder
    shutil.rmtree(folder)


@needs_root
@pytest.mark.parametrize("line", ["list jobs", "apply -f jobs.yml", "status"])
def test_a_store_that_one_may_not_open_says_whose_it_is(line, open_folder, tmp_path):
    store = roexec.Store(os.path.join(open_folder, "store")).create()
    jobs = os.path.join(open_folder, "jobs.yml")
    with open(jobs, "w") as file:
        file.write(JOBS)
    os.chdir(open_folder)
    pid, errors = forked(["--store", store.path, *line.split()], uid=65534)
    os.chdir(tmp_path)
    with errors:
        err = errors.read()
    assert exit_code(pid) == 1
    assert err == (f"roexec: {store.path} belongs to root; run as that user, or name another store "
                   "with --store\n")


def executable_by_all():
    """A Python that every user may execute, or None."""
    for path in (sys.executable, "/usr/bin/python3"):
        script = ("import os, sys; os.setuid(65534)\n"
                  "sys.exit(sys.version_info < (3, 9) or not os.access(sys.executable, os.X_OK))")
        if os.path.exists(path) and subprocess.run([path, "-c", script]).returncode == 0:
            return path
    return None


@needs_root
def test_root_becomes_the_owner_of_the_store_so_that_nothing_in_it_becomes_roots(open_folder):
    python = executable_by_all()
    if python is None:
        pytest.skip("there is no Python here that another user may execute")
    path = os.path.join(open_folder, "store")
    os.mkdir(path, 0o700)
    os.chown(path, 65534, 65534)
    done = subprocess.run([python, roexec.__file__, "--store", path, "run", "--name", "who", "--",
                           "id", "-u"], capture_output=True, text=True, cwd="/")
    assert (done.returncode, done.stdout) == (0, "65534\n")
    assert "working as" in done.stderr
    for folder, folders, files in os.walk(path):
        for name in [".", *folders, *files]:
            assert os.lstat(os.path.join(folder, name)).st_uid == 65534, name


def test_the_configuration_is_read_from_where_it_is_looked_for(cli, tmp_path, store, monkeypatch):
    for folder in (tmp_path / "home/.config/roexec", tmp_path / "a", tmp_path / "b"):
        folder.mkdir(parents=True)
        (folder / "config.yml").write_text(f"store: {{path: {folder.name}-store}}\n")
    usual = str(tmp_path / "home/.config/roexec/roexec-store")
    assert usual in cli("list jobs", store=None)[2]
    monkeypatch.setenv("ROEXEC_CONFIG", str(tmp_path / "a/config.yml"))
    assert str(tmp_path / "a/a-store") in cli("list jobs", store=None)[2]
    assert str(tmp_path / "b/b-store") in cli("list jobs --config b/config.yml", store=None)[2]


@pytest.mark.parametrize("text, sentence", [
    (None, "cannot read"), ("sever: {}", ":1:1: "), ("store: {type: sqlite, path: /x/y}", ".db")])
def test_a_broken_configuration_is_told_in_its_place(text, sentence, cli, tmp_path):
    if text:
        (tmp_path / "config.yml").write_text(text)
    status, out, err = cli("list jobs --config config.yml", store=None)
    assert (status, out) == (1, "") and sentence in err and err.count("\n") == 1


def test_a_database_file_is_a_store_as_well(cli, jobs, tmp_path):
    path = str(tmp_path / "other.db")
    assert cli("apply -f jobs.yml", store=path)[0] == 0
    assert os.path.isfile(path) and os.path.isdir(path + ".d")
    assert "hello" in cli("list jobs", store=path)[1]


# apply, add, delete, export.

def test_apply_says_what_became_of_each_job(cli, jobs, store):
    jobs.write_text(JOBS.replace("echo hello", "echo bye") + "  - {id: new, command: x}\n")
    assert cli("apply -f jobs.yml")[:2] == (
        0, "hello: changed\nbackup: unchanged\nnew: added\n")
    assert json.loads(cli("apply -f jobs.yml --json")[1]) == {
        "changes": [{"id": name, "change": "unchanged"} for name in ("hello", "backup", "new")],
        "dry_run": False}


def test_apply_says_where_nobody_would_start_what_is_scheduled(cli, jobs, store):
    assert f"when a server runs on {store.path}" in cli("apply -f jobs.yml")[2]
    with a_server(store):
        assert cli("apply -f jobs.yml")[2] == ""


def test_a_dry_run_says_what_would_change_and_changes_nothing(cli, jobs, store):
    before = registered(store)
    jobs.write_text("jobs: [{id: new, command: x}]")
    assert cli("apply --prune --dry-run -f jobs.yml")[:2] == (
        0, "new: added (dry run)\nbackup: removed (dry run)\nhello: removed (dry run)\n")
    assert registered(store) == before


def test_only_prune_removes_what_a_file_no_longer_has(cli, jobs, store):
    jobs.write_text("jobs: [{id: new, command: x}]")
    cli("add other -- true")
    cli("apply -f jobs.yml")
    assert set(registered(store)) == {"hello", "backup", "new", "other"}
    cli("apply --prune -f jobs.yml")
    assert set(registered(store)) == {"new", "other"}


def test_apply_takes_several_files_a_folder_and_standard_input(cli, store, tmp_path):
    (tmp_path / "folder").mkdir()
    for name, job_id in (("b.yaml", "b"), ("a.yml", "a"), ("c.json", "c"), (".hidden.yml", "h"),
                         ("notes.txt", "n")):
        (tmp_path / "folder" / name).write_text(f'{{"job": {{"id": "{job_id}", "command": "x"}}}}')
    (tmp_path / "one.yml").write_text("job: {id: one, command: x}")
    status, out, _ = cli("apply -f folder one.yml -f -", stdin="jobs: [{id: two, command: x}]")
    assert (status, out) == (0, "a: added\nb: added\nc: added\none: added\ntwo: added\n")
    with store.read() as db:
        sources = {row["id"]: row["source"] for row in roexec.list_jobs(db)}
    assert sources["a"] == str(tmp_path / "folder/a.yml") and sources["two"] == "<stdin>"
    assert registered(store)["two"]["directory"] == str(tmp_path)


def test_a_file_that_left_a_folder_is_pruned_with_the_folder(cli, store, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.yml").write_text(f"job: {{id: {name}, command: x}}")
    cli("apply -f folder")
    cli("add other -- true")
    (folder / "a.yml").unlink()
    assert cli("apply --prune -f folder")[1] == "a: removed\nb: unchanged\n"


@pytest.mark.parametrize("files, sentences", [
    ({"a.yml": "job: {id: x, command: x}", "b.yml": "job: {id: x, command: x}"},
     ['job "x" stands in ', "a.yml and in "]),
    ({"a.yml": "jobs:\n- id: x\n  comand: y\n- command: z\n"},
     ['a.yml:3:3: unknown key "comand"', "a.yml:4:3: "]),
    ({"a.yml": ""}, ["a.yml:", "empty"]),
    ({}, ["cannot read a.yml: No such file or directory"]),
])
def test_a_wrong_file_changes_nothing_and_is_told_in_whole(files, sentences, cli, jobs, store):
    before = registered(store)
    for name, text in files.items():
        (jobs.parent / name).write_text(text)
    status, out, err = cli("apply -f jobs.yml a.yml " + " ".join(set(files) - {"a.yml"}))
    assert (status, out) == (1, "")
    for sentence in sentences:
        assert sentence in err
    assert all(line.startswith("roexec: ") for line in err.splitlines())
    assert registered(store) == before


def test_a_job_of_another_source_is_left_alone_and_both_are_named(cli, jobs, store):
    (jobs.parent / "a.yml").write_text("jobs: [{id: fresh, command: x}, {id: hello, command: x}]")
    status, _, err = cli("apply -f a.yml")
    assert status == 1 and f"{jobs.parent / 'a.yml'}" in err and f"registered by {jobs}" in err
    assert set(registered(store)) == {"hello", "backup"}


def test_an_empty_folder_is_an_error_and_not_no_jobs(cli, tmp_path):
    (tmp_path / "folder").mkdir()
    assert "there is no job file in folder" in cli("apply -f folder")[2]


def test_the_same_file_twice_is_refused(cli, jobs):
    assert cli("apply -f jobs.yml ./jobs.yml")[0] == 2


def test_a_change_wakes_the_server(cli, jobs, store):
    with a_server(store, answers=False) as fifo:
        for line in ("apply -f jobs.yml", "pause hello", "delete hello"):
            cli(line)
            assert os.read(fifo, 10) == b"w", line


def test_add_registers_a_job_as_a_file_would(cli, store):
    assert cli('add tidy --schedule "0 3 * * *" --set timeout=1h --set retries=2 '
               '--set env="{A: b}" -- cmd rm -rf "a b"')[:2] == (0, "tidy: added\n")
    assert registered(store)["tidy"] == {
        "id": "tidy", "schedule": ["0 3 * * *"], "command": ["rm", "-rf", "a b"],
        "env": {"A": "b"}, "timeout": "1h", "retries": 2}


@pytest.mark.parametrize("line, sentence", [
    ("add latest -- true", "latest"), ("add x", "command"),
    ("add x --set timout=1 -- true", "timeout")])
def test_add_refuses_what_a_file_could_not_say(line, sentence, cli, store):
    status, _, err = cli(line)
    assert status == 1 and sentence in err
    assert not store.exists


def test_delete_removes_all_or_none_and_keeps_history(cli, jobs, store):
    run_id = record(store)
    assert cli("delete hello nobody")[0] == 1
    assert set(registered(store)) == {"hello", "backup"}
    assert cli("delete --id hello backup")[:2] == (0, "hello: deleted\nbackup: deleted\n")
    assert registered(store) == {} and state_of(store, run_id) == "succeeded"


def test_the_nearest_id_is_named_where_there_is_none(cli, jobs):
    assert cli("delete helo")[2] == \
        'roexec: there is no job "helo"; did you mean "hello"?\n'
    assert 'did you mean "hello"' in cli("show helo")[2]


def test_what_is_exported_applies_to_the_same_jobs(cli, jobs, store, tmp_path):
    exported = cli("export")[1]
    other = roexec.Store(str(tmp_path / "other"))
    assert cli("apply -f -", store=other.path, stdin=exported)[0] == 0
    assert registered(other) == registered(store)
    assert [job["id"] for job in json.loads(cli("export backup --json")[1])["jobs"]] == ["backup"]


# pause, resume, list jobs, show.

@pytest.fixture
def editor(monkeypatch):
    """`editor(script)`: what the editor does, a script of sed(1)."""
    def edits(script):
        monkeypatch.setenv("EDITOR", f"sed -i {shlex.quote(script)}")
    return edits


def test_a_job_without_a_file_is_edited_by_itself(cli, store, editor):
    cli("add tidy --schedule @daily --set timeout=1h -- rm -rf /tmp/x")
    editor("s/1h/2h/")
    status, out, _ = cli("edit tidy --dry-run")
    assert status == 0 and '-    timeout: "1h"\n+    timeout: "2h"\n' in out
    assert out.endswith("tidy: changed (dry run)\n")
    assert registered(store)["tidy"]["timeout"] == "1h"
    assert cli("edit tidy")[1].endswith("tidy: changed\n")
    assert registered(store)["tidy"] == {"id": "tidy", "schedule": ["@daily"], "timeout": "2h",
                                         "command": ["rm", "-rf", "/tmp/x"]}
    editor("")
    assert cli("edit tidy")[1] == "tidy: unchanged\n"


def test_a_job_of_a_file_is_edited_there_with_its_comments(cli, jobs, store, editor):
    jobs.write_text("# by hand\n" + JOBS)
    editor("s/echo hello/echo bye/")
    assert "-    command: echo hello\n+    command: echo bye\n" in cli("edit hello")[1]
    assert jobs.read_text() == "# by hand\n" + JOBS.replace("echo hello", "echo bye")
    assert registered(store)["hello"]["command"] == "echo bye"
    assert "unchanged" in cli("apply -f jobs.yml")[1]


@pytest.mark.parametrize("script, sentence", [
    ("s/command:/comand:/", 'did you mean "command"?'), ("s/id: tidy/id: other/", "the one job"),
    ("s/.*//", "nothing was changed")])
def test_what_cannot_be_meant_changes_nothing(script, sentence, cli, store, editor):
    cli("add tidy -- true")
    before = registered(store)
    editor(script)
    status, _, err = cli("edit tidy", stdin="")
    assert status == 1 and sentence in err and "nothing was changed" in err
    assert registered(store) == before


def test_an_editor_that_fails_changes_nothing(cli, jobs, store, monkeypatch):
    monkeypatch.setenv("VISUAL", "false")
    assert cli("edit hello")[2] == \
        "roexec: the editor (false) has failed, status 1; nothing was changed\n"


def test_what_is_edited_is_nobody_elses_to_read(cli, jobs, tmp_path, monkeypatch):
    monkeypatch.setenv("VISUAL", f"stat -c %a > {tmp_path}/modes $(dirname $1) #")
    cli("edit hello")
    assert (tmp_path / "modes").read_text() == "700\n"
    assert not list(tmp_path.glob("roexec-*"))


def test_a_file_that_somebody_else_changes_meanwhile_is_left_alone(cli, jobs, monkeypatch):
    monkeypatch.setenv("VISUAL", f"echo '# by hand' >> {jobs}; sed -i s/hello/bye/")
    status, _, err = cli("edit hello")
    assert status == 1 and "has been changed by somebody else" in err
    assert jobs.read_text() == JOBS + "# by hand\n"


def test_a_mistake_can_be_mended_at_once_on_a_terminal(jobs, store, tmp_path):
    script = tmp_path / "editor"
    script.write_text("#!/bin/sh\nif [ -e once ]; then sed -i s/comand/command/ $1; exit; fi\n"
                      "touch once; sed -i 's/command: echo hello/comand: echo bye/' $1\n")
    script.chmod(0o755)
    out = on_terminal(store, "edit", "hello", EDITOR=str(script), typed=b"y\n")
    assert "jobs.yml:6:5" in out and "Edit it again? [Y/n]" in out and "hello: changed" in out
    assert registered(store)["hello"]["command"] == "echo bye"


def hostile_text(chance):
    return "".join(chance.choice(HOSTILE) for _ in range(chance.randrange(7)))


HOSTILE = ["a", "b c", "\n", "\n\n", " ", "\t", "#", " #x", ": ", "- ", "'", '"', "\\", "%", "@",
           "&", "!", "|", ">", "{", "[", "?", "~", "null", "true", "0o17", "1e3", "---", "...", "é",
           "\u2028", "\u0085", "\ufeff", "\u202e", "\x7f", "\x1b[2J", "\U0001f600", "\r", "$X",
           "<<", "=", "yes", "12:30:00"]


@pytest.mark.parametrize("seed", range(20))
def test_whatever_a_job_has_its_export_gives_the_same_job(seed):
    chance = random.Random(seed)
    for _ in range(50):
        spec = {"id": "x", "directory": "~", "stdin": hostile_text(chance),
                "command": chance.choice([hostile_text(chance), ["a", hostile_text(chance)]]),
                "env": {"A": hostile_text(chance)},
                "hooks": {"on_failure": [{"command": hostile_text(chance) or "x"}]}}
        try:
            job = roexec.job_from_mapping(spec, None)
        except roexec.Invalid:          # an empty command, say
            continue
        exported = roexec.job_to_yaml([job])
        assert roexec.read_job_file(exported, "x.yml", "/elsewhere").jobs == [job]


def test_pause_and_resume_say_whether_they_changed_anything(cli, jobs, store):
    assert cli("pause hello")[1] == "hello: paused\n"
    assert cli("pause hello backup --dry-run")[1] == \
        "hello: already paused (dry run)\nbackup: paused (dry run)\n"
    assert cli("pause --id hello")[1] == "hello: already paused\n"
    assert " paused " in cli("list jobs")[1]
    assert cli("resume hello")[1] == "hello: resumed\n"
    assert cli("resume hello")[1] == "hello: not paused\n"


def test_a_pause_for_some_time_says_until_when_and_is_over_by_itself(cli, jobs, store):
    until = r"2\d{3}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
    assert re.fullmatch(f"hello: paused until {until}\n", cli("pause hello --for 2h")[1])
    payload = json.loads(cli("show hello --json")[1])
    assert payload["paused"] and payload["next_run"] >= payload["paused_until"]
    assert f" paused until {payload['paused_until']} " in cli("list jobs")[1]
    assert f"paused until {payload['paused_until']}" in cli("why hello")[1]
    assert f"until {payload['paused_until']}: these slots before that" in cli("next hello")[2]
    assert cli("pause hello")[1] == "hello: paused\n"
    with store.write() as db:
        roexec.pause_job(db, "hello", True, time.time() - 1)
    assert " scheduled " in cli("list jobs")[1] and "paused" not in cli("why hello")[1]
    assert cli("next hello --count 1")[2] == ""
    assert cli("resume hello")[1] == "hello: not paused\n"


def test_all_jobs_are_paused_and_resumed_at_once(cli, jobs, store):
    assert cli("pause --all")[1] == "backup: paused\nhello: paused\n"
    assert cli("resume --all --dry-run")[1] == \
        "backup: resumed (dry run)\nhello: resumed (dry run)\n"
    assert cli("resume --all")[1] == "backup: resumed\nhello: resumed\n"


@pytest.mark.parametrize("line, sentence", [
    ("pause", "say which one: roexec pause JOB"), ("pause --all hello", "write it without an id"),
    ("pause hello --for soon", '--for: "soon" is not a duration')])
def test_what_to_pause_has_to_be_said(line, sentence, cli, jobs):
    status, _, err = cli(line)
    assert status == 2 and sentence in err


def test_pausing_survives_apply(cli, jobs, store):
    cli("pause hello")
    jobs.write_text(JOBS.replace("echo hello", "echo bye"))
    cli("apply -f jobs.yml")
    assert json.loads(cli("show hello --json")[1])["paused"] is True


def test_jobs_are_listed_by_id_with_what_comes_and_what_was(cli, jobs, store):
    run_id = record(store, "backup", "queued")
    with store.write() as db:
        roexec.change_run(db, run_id, "running", started_at=NOW, boot=roexec.boot_id())
        roexec.finish_run(db, run_id, "failed", [], reason="exit", exit_code=3, finished_at=NOW + 1)
    lines = [re.split("  +", line) for line in cli("list jobs")[1].splitlines()]
    assert lines[0] == ["ID", "SCHEDULE", "STATUS", "NEXT RUN", "LAST RUN", "RESULT", "NAME"]
    assert lines[1] == ["backup", "-", "manual", "-", "2025-08-01T10:00:00Z", "failed", "-"]
    assert lines[2][:3] == ["hello", "0 2 * * *", "scheduled"] and lines[2][3].endswith("02:00:00Z")


def test_the_servers_settings_hold_for_every_client(cli, jobs, store, tmp_path):
    (tmp_path / "config.yml").write_text("scheduler: {timezone: '+02:00'}\n")
    line = "show hello --json --config config.yml"
    assert json.loads(cli(line)[1])["timezone"] == "UTC+02:00"
    with store.write() as db:
        roexec.set_settings(db, {"defaults": {"enabled": False},
                                 "scheduler": {"timezone": "+05:00"}})
    shown = json.loads(cli(line)[1])
    assert (shown["timezone"], shown["enabled"], shown["next_run"]) == ("UTC+05:00", False, None)


def test_an_exact_job_id_wins_over_a_run_prefix(cli, jobs, store):
    record(store, id="hellorun12")
    assert cli("show hello")[1].startswith("job ")
    assert cli("show hellor")[1].startswith("run ")
    assert cli("show latest")[1].startswith("run ")


@pytest.mark.parametrize("target, expected", [
    ("r1aaaaaaaa", "r1aaaaaaaa"), ("r1aa", "r1aaaaaaaa"), ("latest", "r3aaaaaaaa"),
    ("hello", "r1aaaaaaaa")])
def test_a_run_is_named_by_id_prefix_job_or_latest(target, expected, cli, jobs, store):
    record(store, id="r1aaaaaaaa")
    record(store, "backup", id="r2aaaaaaaa")
    record(store, "backup", id="r3aaaaaaaa")
    with store.read() as db:
        assert roexec.find_run(db, target)["id"] == expected
    assert cli(f"wait {target}")[0] == 0


def test_a_run_that_is_unknown_or_ambiguous_is_told_so(cli, jobs, store):
    record(store, id="abcdaaaaaa")
    record(store, id="abcdbbbbbb")
    assert "more than one run id begins" in cli("wait abcd")[2]
    assert "there is no run or job" in cli("wait abc")[2]
    assert "has no runs yet" in cli("wait backup")[2]


# list runs.

def run_ids(cli, line):
    return [run["id"] for run in json.loads(cli(line + " --json")[1])["runs"]]


def test_what_is_on_comes_first_then_the_latest_that_ended(cli, jobs, store):
    with a_server(store):       # it looks after the running ones
        names = [record(store, state=state, id=f"run{number:07}", at=NOW + number)
                 for number, state in enumerate(("queued", "running", "succeeded", "queued",
                                                 "failed", "skipped", "running"))]
        queued, running, ended = [3, 0], [6, 1], [5, 4, 2]
        assert run_ids(cli, "list runs") == [names[i] for i in queued + running + ended]
        assert run_ids(cli, "list runs --active") == [names[i] for i in queued + running]
        assert run_ids(cli, "list runs --limit 1") == [names[i] for i in queued + running + [5]]
        assert run_ids(cli, "list runs --state failed,queued --state skipped") == [
            names[i] for i in queued + [5, 4]]


def test_runs_are_chosen_by_job_time_and_step(cli, jobs, store):
    first = record(store)
    late = record(store, "backup", at=time.time() - 60)
    step = record(store, step="one", parent=first)
    assert run_ids(cli, "list runs") == [late, first]
    assert run_ids(cli, "list runs --steps") == [step, late, first]
    assert run_ids(cli, "list runs --job hello") == [first]
    assert run_ids(cli, "list runs --since 2h") == [late]
    assert run_ids(cli, "list runs --since 2025-08-01T10:00:00Z") == [late, first]
    assert run_ids(cli, "list runs --since 2025-08-01T10:00:01Z") == [late]


def test_twenty_ended_runs_are_listed_unless_said_otherwise(cli, jobs, store):
    names = [record(store) for _ in range(25)]
    assert run_ids(cli, "list runs") == names[:4:-1]
    assert len(run_ids(cli, "list runs --limit 30")) == 25


def test_queued_runs_that_no_server_will_start_are_told(cli, jobs, store):
    record(store, "backup", "queued", owner=roexec.own_identity())
    assert cli("list runs")[2] == ""
    record(store, "hello", "queued")
    assert cli("list runs")[2] == "roexec: what is queued waits for a server; none runs on this " \
        "store\n"


# logs.

LOG = (b"2025-08-01T10:00:00Z [INFO] Starting run\n2025-08-01T10:00:00Z [OUT] one\n"
       b"2025-08-01T10:00:01Z [ERR] two\n2025-08-01T10:00:01Z [OUT~] three\n")


@pytest.fixture
def logged(store, jobs):
    """A run that ended, with a log."""
    folder = os.path.join(store.folder, "logs/hello")
    os.makedirs(folder)
    with open(os.path.join(folder, "x.log"), "wb") as file:
        file.write(LOG)
    return record(store, log="logs/hello/x.log")


@pytest.mark.parametrize("options, expected", [
    ("", LOG.decode()),
    ("--tail 1", "2025-08-01T10:00:01Z [OUT~] three\n"),
    ("--raw", "one\ntwo\nthree"),
    ("--stream out", "one\nthree"),
    ("--stream err", "two\n"),
    ("--follow", LOG.decode()),
    ("--raw --tail 2", "two\nthree"),
])
def test_a_log_is_printed_as_asked(options, expected, cli, logged):
    assert cli(f"logs {logged} {options}") == (0, expected, "")
    assert cli(f"logs hello {options}") == (0, expected, "")


def test_lines_that_were_removed_are_told_with_raw_beside_the_output(cli, logged, store):
    part = os.path.join(store.folder, "logs/hello/x.log.parts/000000000001000")
    begun = os.path.getsize(os.path.join(store.folder, "logs/hello/x.log"))
    os.mkdir(os.path.dirname(part))
    with open(part, "w") as file:
        file.write("2025-08-01T02:00:09Z [OUT] newest\n")
    told = f"{1000 - begun} bytes of the log were removed here"
    assert cli("logs hello --tail 2")[1].splitlines()[-2:] == [
        f"2025-08-01T02:00:09Z [INFO] {told}: from={begun} to=1000",
        "2025-08-01T02:00:09Z [OUT] newest"]
    status, out, err = cli("logs hello --raw")
    assert (status, out.endswith("newest\n"), err) == (0, True, f"roexec: {told}\n")


def test_a_log_that_is_not_there_is_told(cli, logged, store):
    with store.write() as db:
        roexec.set_log(db, logged, "logs/hello/gone.log")
    assert cli("logs latest")[::2] == (
        1, "roexec: the log of this run is not there (any more)\n")
    skipped = record(store, state="skipped", reason="paused")
    assert f"run {skipped} has no log: it is skipped (paused)" in cli(f"logs {skipped} -f")[2]


def test_following_waits_for_a_queued_run_and_ends_with_it(cli, logged, store):
    run_id = record(store, "backup", "queued")

    def live():
        with store.write() as db:
            roexec.change_run(db, run_id, "running", boot=roexec.boot_id(), started_at=NOW)
        with store.write() as db:
            roexec.finish_run(db, run_id, "succeeded", [], finished_at=NOW, log="logs/hello/x.log")
    with a_server(store):
        timer = threading.Timer(0.1, live)
        timer.start()
        result = cli(f"logs {run_id} -f")
        timer.join()
    assert result == (0, LOG.decode(), "")


# next.

def test_next_lists_the_slots_of_all_jobs_in_order(cli, jobs, store):
    cli('add noon --schedule "0 12 * * *" -- true')
    cli('add off --schedule "0 12 * * *" --set enabled=false -- true')
    out = cli("next --from 2025-08-01T00:00:00Z --count 3")[1]
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [
        ["2025-08-01T02:00:00Z", "hello"], ["2025-08-01T12:00:00Z", "noon"],
        ["2025-08-02T02:00:00Z", "hello"]]


def test_a_slot_at_the_instant_asked_from_is_among_the_next(cli, jobs):
    slots = json.loads(cli("next hello --from 2025-08-01T02:00:00Z --count 1 --json")[1])["slots"]
    assert slots[0]["slot"] == "2025-08-01T02:00:00Z"


def test_next_marks_what_a_change_of_clocks_does(cli, store):
    line = 'next --timezone Europe/Berlin --count 2 --json --cron "30 2 * * *" --from '
    gap = json.loads(cli(line + "2025-03-30T00:00:00Z")[1])["slots"]
    assert [(slot["slot"], slot["mark"]) for slot in gap] == [
        ("2025-03-30T01:00:00Z", "moved from 02:30"), ("2025-03-31T00:30:00Z", None)]
    fold = json.loads(cli(line + "2025-10-25T22:00:00Z")[1])["slots"]
    assert [(slot["slot"], slot["mark"]) for slot in fold] == [
        ("2025-10-26T00:30:00Z", "first of two"), ("2025-10-27T01:30:00Z", None)]


def test_next_says_why_a_job_has_no_slots(cli, jobs, store):
    cli("pause hello")
    assert cli("next backup")[::2] == (0, 'roexec: job "backup" has no schedule\n')
    status, out, err = cli("next hello")
    assert (status, err) == (0, 'roexec: job "hello" is paused: these slots will be skipped\n')
    assert out.count("\n") == 11
    assert cli("next")[1] == ""


def test_next_of_an_expression_needs_no_store_and_hashes_the_id_that_is_given(cli, store):
    assert cli('next --cron "0 2 * * *" --count 1')[0] == 0
    assert cli('next --cron "H 2 * * *" --count 1')[0] == 2
    assert cli('next --cron "H 2 * * *" --count 1 --id backup')[0] == 0
    assert not store.exists


def test_all_slots_until_an_instant_are_shown_with_what_they_would_meet(cli, jobs, store):
    cli('add tick --schedule "0,30 * * * *" -- true')
    record(store, "tick", finished_at=NOW + 2000)
    line = "next --from 2025-08-02T02:00:00Z --to 2025-08-02T03:30:00Z"
    status, out, err = cli(line)
    assert (status, err) == (0, "")
    assert [line.split()[:2] + line.split()[3:] for line in out.splitlines()[1:5]] == [
        ["2025-08-02T02:00:00Z", "hello", "-"], ["2025-08-02T02:00:00Z", "tick", "-"],
        ["2025-08-02T02:30:00Z", "tick",
         *"meets the run of 2025-08-02T02:00:00Z and is skipped".split()],
        ["2025-08-02T03:00:00Z", "tick", "-"]]
    assert out.splitlines()[6:] == [
        "slots             4", "busiest minutes   2025-08-02T02:00:00Z (2)", "meet a run        1",
        "duration unknown  hello"]
    data = json.loads(cli(line + " --json")[1])
    assert (data["count"], data["meet"], data["unknown_durations"]) == (4, 1, ["hello"])
    assert data["busiest"] == [{"minute": "2025-08-02T02:00:00Z", "count": 2}]
    assert [slot["action"] for slot in data["slots"]] == ["start", "start", "skip", "start"]
    data = json.loads(cli(line + " --json --duration 90s")[1])
    assert (data["meet"], data["unknown_durations"]) == (0, [])
    assert [slot["job_id"] for slot in json.loads(cli(line + " hello --json")[1])["slots"]] == [
        "hello"]


def test_until_an_instant_places_of_all_jobs_count_and_paused_jobs_do_not(cli, jobs, store):
    cli('add tick --schedule "*/10 * * * *" --set overlap=queue -- true')
    with store.write() as db:
        roexec.set_settings(db, {"defaults": {}, "scheduler": {"max_concurrent": 1}})
    line = "next --from 2025-08-02T01:59 --to 2025-08-02T02:25 --duration 11m --json"
    assert [(slot["job_id"], slot["action"]) for slot in json.loads(cli(line)[1])["slots"]] == [
        ("hello", "start"), ("tick", "start"), ("tick", "queue"), ("tick", "skip")]
    cli("pause hello")
    assert [slot["job_id"] for slot in json.loads(cli(line)[1])["slots"]] == ["tick"] * 3


def test_an_expression_can_be_shown_until_an_instant(cli, store):
    out = cli('next --cron "*/20 * * * *" --from 2025-08-01 --to 2025-08-02 --duration 25m '
              "--json")[1]
    assert (json.loads(out)["count"], json.loads(out)["meet"]) == (72, 36)
    assert not store.exists


# Stores that are not there, or not what they should be.

@pytest.mark.parametrize("line", ["maintenance purge", "maintenance purge --dry-run", "export",
                                  "maintenance check", "maintenance check --dry-run", "show x"])
def test_without_a_store_a_command_says_what_makes_one(line, cli, store):
    status, out, err = cli(line)
    assert (status, out) == (1, "") and not os.path.exists(store.path)
    assert err == (f"roexec: there is no store in {store.path} yet; `roexec apply`, `roexec add` "
                   "and `roexec server` make one\n")


def test_a_file_in_the_place_of_a_store_has_no_jobs_and_no_server(cli, store):
    with open(store.path, "w"):
        pass
    status, out, err = cli("list jobs")
    assert (status, out) == (0, "") and "there is no store there yet" in err
    assert cli("add x -- true")[2] == (
        f"roexec: {store.path} is no folder; name another store with --store\n")


def test_a_damaged_database_is_told_with_the_command_that_helps(cli, store, jobs):
    store.close()
    size = os.path.getsize(store.database)
    with open(store.database, "r+b") as file:
        file.seek(1024)
        file.write(b"\x5a" * (size - 1024))
    assert cli("export")[2].endswith(" is malformed; see roexec maintenance check\n")


@needs_root
def test_root_is_told_where_the_owner_of_a_store_cannot_read_the_python_that_runs(store, tmp_path):
    store.create()
    os.chown(store.path, 12345, 12345)
    private = tmp_path / "private.py"
    private.touch(0o600)
    done = subprocess.run(
        [sys.executable, "-c", "import os, sys; os.__file__ = sys.argv[1]; import roexec; "
         "sys.exit(roexec.main(sys.argv[2:]))", private, "list", "jobs", "--store", store.path],
        cwd=os.path.dirname(roexec.__file__), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"roexec: 12345, who owns {store.path}, cannot read this Python")


# import crontab.

def test_a_system_crontab_that_is_read_as_that_of_a_user_is_noticed(cli, tmp_path):
    (tmp_path / "copy").write_text("17 * * * *\troot\tcd / && run-parts /etc/cron.hourly\n")
    assert "import it with --system" in cli("import crontab copy")[2]
    assert "--system" not in cli("import crontab copy --system")[2]


def test_a_crontab_becomes_a_job_file_that_applies_as_it_is(cli, store, tmp_path):
    (tmp_path / "tab").write_text("# Tidy up\n0,30 2 * * * /bin/tidy %x\nMAILTO=ops\n@daily log\n")
    status, out, err = cli("import crontab tab")
    assert status == 0 and err.splitlines() == [
        "roexec: tab:2: where a change of clocks skips several of its times, it runs once right "
        "after the gap; Debian's cron runs it for each of them",
        "roexec: tab:3: MAILTO: nothing is mailed, what a job prints is in the log of its run; to "
        'hear of failures give it a hook such as on_failure: "mail -s failed ADDRESS"']
    assert cli("apply -f -", stdin=out)[:2] == (0, "tidy: added\nlog: added\n")
    specs = registered(store)
    assert specs["tidy"] == {
        "id": "tidy", "description": "Tidy up", "schedule": "0,30 2 * * *",
        "command": "/bin/tidy ", "directory": "~", "stdin": "x\n", "env": {"PATH": "/usr/bin:/bin"},
        "max_concurrent": 0}
    data = json.loads(cli("import crontab tab --json")[1])
    assert cli("apply -f -", stdin=json.dumps(data))[1] == "tidy: unchanged\nlog: unchanged\n"


def test_what_cannot_be_carried_over_is_told_with_its_line_and_status_1(cli, store):
    status, out, err = cli("import crontab -", stdin="* * * * * ok\n61 * * * * x\n")
    assert (status, err) == (1, 'roexec: <stdin>:2: left out: minute: cron refuses "61"\n')
    assert "id: ok" in out and not store.exists
    assert cli("import crontab nowhere")[::2] == (
        1, "roexec: cannot read nowhere: No such file or directory\n")


def test_the_jobs_of_another_user_are_imported_with_that_user(cli):
    me = roexec.owner_name(os.geteuid())
    text = f"@daily {me} mine\n@daily nobody-else other\n"
    status, out, err = cli("import crontab - --system", stdin=text)
    assert status == 0 and ("<stdin>:2: it runs as nobody-else" in err) is (me != "root")
    jobs = roexec.load_yaml(out)["jobs"]
    assert [(job["id"], job.get("user")) for job in jobs] == [
        ("mine", None), ("other", "nobody-else")]
    assert "user: nobody-else" in cli("import crontab - --user nobody-else", stdin="@daily x\n")[1]
    assert "user:" not in cli(f"import crontab - --user {me}", stdin="@daily x\n")[1]


@pytest.mark.parametrize("path, system", [
    ("/etc/crontab", True), ("/etc/cron.d/php", True), ("/etc/../etc/crontab", True),
    ("crontab", False), ("/var/spool/cron/crontabs/me", False)])
def test_where_cron_itself_looks_for_users_they_are_read(path, system):
    assert roexec._is_system_crontab(path) is system


# status.

def test_status_tells_healthy_from_stuck_and_from_not_running(cli, jobs, store):
    assert cli("status")[0] == 3
    with a_server(store):
        status, out, _ = cli("status")
        assert status == 0 and "health   healthy" in out and "process  4711" in out
    with store.write() as db:
        db.execute("UPDATE jobs SET position = position - 3 * 86400")
    with a_server(store):
        status, out, _ = cli("status --json")
        assert status == 1
        assert 'job "hello" was due at ' in json.loads(out)["health"]


def test_a_server_that_does_not_answer_is_not_healthy(cli, jobs, store, monkeypatch):
    monkeypatch.setattr(roexec, "_ANSWER_PATIENCE", 0.05)
    with a_server(store, answers=False):
        assert (cli("status")[0], "does not answer" in cli("status")[1]) == (1, True)


def test_status_shows_the_notices_that_wait_and_that_were_given_up(cli, jobs, store):
    assert "unsent" not in cli("status")[1]
    with store.write() as db:
        for number, until in ((1, None), (2, NOW + 10)):
            notice = roexec.add_notice(db, "webhook", "https://chat.example/secret", f"r{number}",
                                       b"{}", NOW, title=f"job {number} failed")
            roexec.begin_notice(db, {"id": notice, "tries": 0}, NOW, NOW + 300)
            roexec.notice_failed(db, notice, NOW, "chat.example: 404", until)
    _, out, _ = cli("status")
    assert "unsent: 2, 1 of them given up" in out and "secret" not in out
    assert re.search(r"webhook +given up .* job 1 failed +chat.example: 404", out)
    assert re.search(r"webhook +waiting .* job 2 failed", out)
    told = json.loads(cli("status --json")[1])["unsent_notices"]
    assert [(notice["run"], notice["state"], notice["next_try"]) for notice in told] == [
        ("r2", "waiting", "2025-08-01T10:00:10Z"), ("r1", "given_up", None)]


# why.

@pytest.fixture
def since_july(jobs, store):
    """The job `hello` (each day at 2) has been registered since July, and is decided until NOW."""
    with store.write() as db:
        db.execute("UPDATE versions SET since = ?", (NOW - 31 * 86400,))
    return store


def skip(store, reason, slot="2025-08-01T02:00:00Z", **values):
    slot = int(roexec.parse_instant(slot, None))
    return record(store, state="skipped", **{"at": slot, "slot": slot, "last_slot": slot,
                                             "reason": reason, "trigger": "schedule", **values})


SLOT = 1754013600           # 2025-08-01T02:00:00Z


@pytest.mark.parametrize("reason, values, words", [
    ("paused", {"slot": "2025-07-30T02:00:00Z", "last_slot": SLOT, "count": 3},
     ["from 2025-07-30T02:00:00Z", "until 2025-08-01T02:00:00Z"]),
    ("window", {}, ["outside of its window"]),
    ("missed", {"at": SLOT + 7200}, ["no server", "2025-07-31T02:00:01Z for the last time",
                                     "one saw it 2025-08-01T04:00:00Z, 2h late", "window is 1h"]),
    ("overlap", {}, ["run other12345 (started 2025-08-01T01:59:00Z, ended 2025-08-01T02:05:00Z, "
                     "succeeded)", "overlap: skip"]),
    ("condition", {"message": "the condition ended with 3"}, ["the condition ended with 3"]),
    ("capacity", {"message": "10000 runs were queued"}, ["10000 runs were queued"]),
])
def test_why_tells_for_what_reason_a_slot_was_skipped(reason, values, words, cli, since_july):
    record(since_july, id="before1234", at=SLOT - 86399, slot=SLOT - 4 * 86400, trigger="schedule")
    record(since_july, id="other12345", at=SLOT - 60, finished_at=SLOT + 300)
    skip(since_july, reason, **values)
    status, out, err = cli("why hello 2025-08-01T02:00")
    assert (status, err) == (0, "") and all(word in out for word in words), out
    answer, = json.loads(cli("why --id hello 2025-08-01 02:00 --json")[1])["answers"]
    assert answer["slot"] == "2025-08-01T02:00:00Z"
    assert answer["why"][0]["reason"] == {"paused": "paused_then"}.get(reason, reason)


@pytest.mark.parametrize("instant, words", [
    ("2025-08-01T02:00", ["There is no record"]),
    ("2025-08-01T02:01", ["not due", "last 2025-08-01T02:00:00Z", "next 2025-08-02T02:00:00Z"]),
    ("2025-06-01T02:00", ["registered only 2025-07-01T10:00:00Z"]),
    ("2125-08-01T02:00Z", ["It is due, and starts 2125-08-01T02:00:00Z", "No server runs"]),
])
def test_why_tells_of_an_instant_without_a_run(instant, words, cli, since_july):
    status, out, _ = cli(f"why hello {instant}")
    assert status == 0 and all(word in out for word in words), out


def test_why_without_an_instant_is_about_now_the_latest_slot_and_the_next(cli, since_july,
                                                                          monkeypatch):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)      # it may be just before two
    latest = int(now) // 86400 * 86400 + 7200
    latest -= 86400 * (latest > now)
    record(since_july, id="latest1234", at=latest, slot=latest, trigger="schedule")
    run_id = record(since_july, state="queued")
    assert cli("pause hello")[0] == 0
    status, out, _ = cli("why hello")
    assert status == 0
    assert [line for line in out.splitlines() if not line.startswith("  ")] == [
        "hello, now:",
        *(f"hello, {roexec.format_instant(slot)} (local {roexec.format_instant(slot)[:-1]}+00:00):"
          for slot in (latest, latest + 86400))]
    assert f"  Run {run_id} waits for a server" in out and "  The job is paused: roexec re" in out
    assert "  Run latest1234: succeeded, started " in out and "  It will be skipped" in out


def test_why_reads_an_instant_as_local_time_of_the_job(cli, jobs):
    cli('add dst --schedule "30 2 * * *" --set timezone=Europe/Berlin -- true')
    with_gap = json.loads(cli("why dst 2125-03-25T02:30 --json")[1])["answers"]
    assert [(each["local"], each["mark"]) for each in with_gap] == [
        ("2125-03-25T03:00:00+02:00", "moved from 02:30")]
    assert [said["reason"] for said in with_gap[0]["why"]] == ["gap", "due", "no_server"]
    twice = json.loads(cli("why dst 2125-10-28T02:30 --json")[1])["answers"]
    assert [(each["local"], each["mark"], each["why"][0]["reason"]) for each in twice] == [
        ("2125-10-28T02:30:00+02:00", "first of two", "due"),
        ("2125-10-28T02:30:00+01:00", None, "not_due")]
    cli('add wall --schedule "*/30 * * * *" --set timezone=Europe/Berlin -- true')
    gap, = json.loads(cli("why wall 2125-03-25T02:30 --json")[1])["answers"]
    assert [said["reason"] for said in gap["why"]] == ["gap"]


def test_why_of_a_run_that_waits_for_its_next_attempt_says_until_when(cli, store, tmp_path):
    cli("add again --set retries=1 --set backoff=1h -- false")
    assert cli("run again --detach")[0] == 0
    deadline = time.monotonic() + 60
    while "next attempt, number 2, until 20" not in cli("why again")[1]:
        assert time.monotonic() < deadline, cli("why again")
        time.sleep(0.05)
    assert cli("cancel again")[0] == 0 and cli("wait again")[0] == 130


@pytest.mark.parametrize("line, sentence", [
    ("why", "say which one"), ("why hello soon", '"soon" is no instant')])
def test_why_without_a_job_or_with_no_instant_is_wrong_usage(line, sentence, cli, jobs):
    status, out, err = cli(line)
    assert (status, out) == (2, "") and sentence in err


def test_why_of_an_unknown_job_names_the_nearest(cli, jobs):
    status, _, err = cli("why helo")
    assert status == 1 and 'there is no job "helo"; did you mean "hello"?' in err


# cancel, retry, wait.

def test_a_queued_run_is_withdrawn(cli, jobs, store):
    run_id = record(store, state="queued")
    assert cli(f"cancel {run_id} --dry-run")[1] == f"{run_id}: cancelled (dry run)\n"
    assert state_of(store, run_id) == "queued"
    assert cli("cancel hello")[:2] == (0, f"{run_id}: cancelled\n")
    assert state_of(store, run_id) == "cancelled"
    assert "has ended already: cancelled" in cli(f"cancel {run_id}")[2]


def test_cancelling_a_job_with_several_active_runs_lists_them_and_refuses(cli, jobs, store):
    first, second = record(store, state="queued"), record(store, state="queued")
    status, _, err = cli("cancel hello")
    assert status == 1 and f"{first}, {second}" in err
    assert cli(f"cancel {first} {second}")[0] == 0
    assert cli("cancel hello")[2] == 'roexec: job "hello" has no active run\n'


def test_a_run_that_ends_before_its_cancel_keeps_no_other_one_from_being_cancelled(cli, jobs, store,
                                                                                monkeypatch):
    first, second = record(store, state="queued"), record(store, state="queued")
    cancel = roexec.cancel_run

    def end_first(store, run_id, **more):
        if run_id == first:
            with store.write() as db:
                roexec.finish_run(db, first, "cancelled", [], reason="user", finished_at=1)
        cancel(store, run_id, **more)
    monkeypatch.setattr(roexec, "cancel_run", end_first)
    status, out, err = cli(f"cancel {first} {second}")
    assert (status, out) == (1, f"{second}: cancelled\n")
    assert err == f"roexec: run {first} has ended already: cancelled\n"


def test_retry_queues_a_new_run_for_the_server_and_prints_its_id(cli, jobs, store):
    run_id = record(store, state="failed", env='{"A":"b"}')
    with a_server(store):
        status, out, _ = cli(f"retry {run_id}")
    assert status == 0
    with store.read() as db:
        row = roexec.get_run(db, out.strip())
    assert (row["state"], row["retry_of"], row["trigger"]) == ("queued", run_id, "retry")
    assert json.loads(row["env"]) == {"A": "b"}


def test_only_an_ended_run_of_a_registered_job_can_be_retried(cli, jobs, store):
    assert "has not ended yet" in cli(f"retry {record(store, state='queued')}")[2]
    assert 'there is no job "gone"' in cli(f"retry {record(store, 'gone')}")[2]


@pytest.mark.parametrize("values, expected", [
    ({"state": "succeeded", "exit_code": 0}, 0), ({"state": "failed", "exit_code": 7}, 7),
    ({"state": "failed", "signal": "SIGKILL"}, 137), ({"state": "timed_out"}, 124),
    ({"state": "cancelled"}, 130), ({"state": "lost"}, 125), ({"state": "skipped"}, 0)])
def test_wait_gives_the_exit_status_of_the_run(values, expected, cli, jobs, store):
    assert cli(f"wait {record(store, **values)}")[0] == expected


# Job files that a server owns.

TIMES = itertools.count(1)


def write(path, text):
    """Write a file that cannot be taken for the one that was there before."""
    path.write_text(text)
    os.utime(path, (next(TIMES),) * 2)


@pytest.fixture
def owned(store, tmp_path):
    """(folder of a server's job files, the function that the server calls, what it said)."""
    folder, said = tmp_path / "folder", []
    folder.mkdir()
    write(folder / "a.yml", "jobs: [{id: a, command: x}, {id: aa, command: x}]")
    write(folder / "b.yml", "job: {id: b, command: x}")
    store.create()
    files = roexec.JobFiles(store, [str(folder)], {}, lambda text, level="INFO": said.append(
        f"{level} {text}"))
    files()
    return folder, files, said


def test_a_server_registers_its_job_files_at_its_start(owned, store):
    assert set(registered(store)) == {"a", "aa", "b"}
    assert owned[2] == ["INFO Job a added", "INFO Job aa added", "INFO Job b added"]


def test_a_changed_file_is_applied_once_it_has_been_still(owned, store):
    folder, files, said = owned
    said.clear()
    write(folder / "a.yml", "jobs: [{id: a, command: y}]")
    files()
    assert said == [], "it may be half written"
    write(folder / "a.yml", "jobs: [{id: a, command: z}]")
    files()
    assert said == [], "it has changed again"
    files()
    assert said == ["INFO Job a changed", "INFO Job aa removed"]
    files()
    assert len(said) == 2 and registered(store)["a"]["command"] == "z"


def test_a_signal_makes_it_look_at_once(owned, store):
    folder, files, said = owned
    write(folder / "b.yml", "job: {id: b, command: y}")
    files.due = True
    files()
    assert said[-1] == "INFO Job b changed"


@pytest.mark.parametrize("text", ["jobs: [{id: a, comand: y}]", "", "jobs"])
def test_a_broken_file_is_reported_once_and_its_jobs_stay(text, owned, store):
    folder, files, said = owned
    said.clear()
    write(folder / "a.yml", text)
    write(folder / "b.yml", "job: {id: b, command: y}")
    for _ in range(4):
        files()
    assert said[0].startswith(f"ERROR {folder}/a.yml:1:") and said[1:] == [
        "WARNING The jobs described there stay as they were until that is mended",
        "INFO Job b changed"]
    assert set(registered(store)) == {"a", "aa", "b"}


def test_status_tells_of_a_broken_file_until_it_is_mended(owned, store, cli):
    folder, files, _ = owned
    assert "a.yml" not in cli("status")[1]
    for text, times in (("jobs: [{id: a, comand: y}]", 1), ("jobs: [{id: a, command: y}]", 0)):
        write(folder / "a.yml", text)
        files()
        files()
        for words in ("status", "doctor"):
            assert cli(words)[1].count(f"{folder}/a.yml:1:16: ") == times


def test_jobs_of_a_file_that_left_the_folder_are_removed(owned, store, cli):
    folder, files, _ = owned
    cli("add other -- true")
    (folder / "a.yml").unlink()
    files()
    files()
    assert set(registered(store)) == {"b", "other"}


def test_a_folder_that_cannot_be_read_is_reported_and_its_jobs_stay(owned, store):
    folder, files, said = owned
    said.clear()
    folder.rename(folder.parent / "elsewhere")
    files()
    files()
    assert said[0].startswith(f"ERROR cannot read {folder}") and said[1:] == [
        "WARNING The jobs described there stay as they were until that is mended"]
    assert set(registered(store)) == {"a", "aa", "b"}


def test_two_files_with_one_id_are_reported_and_nothing_changes(owned, store):
    folder, files, said = owned
    write(folder / "b.yml", "jobs: [{id: a, command: new}]")
    files()
    files()
    assert said[-1].startswith('ERROR job "a" stands in ')
    assert set(registered(store)) == {"a", "aa", "b"}


def test_a_first_start_with_a_broken_file_is_refused_and_later_ones_are_not(cli, jobs, tmp_path):
    jobs.write_text("jobs: [{id: a, comand: y}]")
    fresh = str(tmp_path / "fresh")
    status, _, err = cli("server --dry-run --jobs jobs.yml", store=fresh)
    assert status == 1 and f"{jobs}:1:16: " in err and not os.path.exists(fresh)
    assert cli("server --dry-run --jobs jobs.yml")[0] == 0


def test_a_server_serves_and_ends_when_asked(store, jobs, cli):
    pid, log = forked(["--store", store.path, "server", "--no-http", "--jobs", "jobs.yml"])
    with log:
        try:
            assert any("Server started" in line for line in iter(log.readline, ""))
            wait_for(lambda: cli("status", store=None)[0] == 0)     # it announces its store
            second = process(store, "server", "--no-http")
            assert (second.returncode, second.stderr) == (
                1, f"roexec: a server (process {pid}) works on the store {store.path} already; end that one first\n")
            assert cli("retry " + record(store, "backup", "failed"))[0] == 0
            assert cli("wait latest")[0] == 3
        finally:
            os.kill(pid, signal.SIGTERM)
    assert exit_code(pid) == 0
    assert cli("status")[0] == 3


# run, exec, and how a command ends, in processes of their own.

def test_run_is_silent_beside_the_command_and_gives_its_exit_status(jobs, store):
    done = process(store, "run", "--id", "backup")
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")


def test_run_under_a_name_records_and_registers_nothing(jobs, store, cli):
    done = process(store, "run", "--name", "say it!", "--env", "A=5", "--", "cmd", "sh", "-c",
                   "echo $A; pwd")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"5\n{os.getcwd()}\n", "")
    run = json.loads(cli("show latest --json")[1])
    assert (run["job_id"], run["name"], run["state"]) == ("say-it-", "say it!", "succeeded")
    assert set(registered(store)) == {"hello", "backup"}


def test_a_detached_run_prints_its_id_alone_and_can_be_waited_for(jobs, store):
    done = process(store, "run", "backup", "--detach")
    assert re.fullmatch(r"[a-z0-9]{10}\n", done.stdout) and done.returncode == 0
    assert process(store, "wait", done.stdout.strip()).returncode == 3


def test_retry_without_a_server_runs_at_once(jobs, store):
    run_id = record(store, "backup", "failed")
    done = process(store, "retry", run_id)
    assert done.returncode == 0, done.stderr
    assert process(store, "wait", done.stdout.strip()).returncode == 3


@pytest.mark.parametrize("arguments, expected", [
    (("exec", "--", "sh", "-c", "exit 5"), 5),
    (("exec", "--", "cmd", "sh", "-c", "kill -9 $$"), 137),
    (("exec", "--", "no-such-program"), 127),
    (("run", "--name", "x", "--", "no-such-program"), 127),
    (("run", "--name", "x", "--", "/etc"), 126),
])
def test_exit_statuses_are_those_of_shells(arguments, expected, store):
    assert process(store, *arguments).returncode == expected


def test_exec_records_nothing(store):
    process(store, "exec", "--", "true")
    assert not store.exists


@pytest.mark.parametrize("line, expected", [
    ("run hello --dry-run", "hello: would run echo hello (dry run)\n"),
    ("exec --dry-run -- ls 'a b'", "would run ls 'a b' (dry run)\n")])
def test_a_dry_run_says_what_would_run(line, expected, cli, jobs):
    assert cli(line)[:2] == (0, expected)


def test_a_current_folder_that_is_gone_is_told(cli, store, tmp_path):
    (tmp_path / "gone").mkdir()
    os.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    result = cli("add x -- true")
    os.chdir(tmp_path)
    assert result == (1, "", "roexec: the current folder is gone; change to another one\n")


def test_a_reader_that_went_away_is_no_error(jobs, store):
    for _ in range(300):
        record(store, message="x" * 400)
    done = subprocess.run(
        f"{shlex.quote(sys.executable)} {shlex.quote(roexec.__file__)} --store "
        f"{shlex.quote(store.path)} list runs --limit 300 | head -1", shell=True,
        capture_output=True, text=True)
    assert done.stdout.startswith("RUN ") and done.stderr == ""


def test_output_that_cannot_be_written_is_one_sentence(jobs, store):
    with open("/dev/full", "w") as full:
        done = process(store, "list", "jobs", capture_output=False, stdout=full,
                       stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, "roexec: No space left on device\n")


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_standard_streams_are_never_taken_for_a_file_of_the_store(closed, jobs, store):
    redirections = " ".join(f"{number}>&-" for number in closed)
    line = f"{shlex.quote(sys.executable)} {shlex.quote(roexec.__file__)} --store " \
           f"{shlex.quote(store.path)} apply -f jobs.yml {redirections}"
    assert subprocess.run(line, shell=True).returncode == 0
    assert set(registered(store)) == {"hello", "backup"}


def test_ctrl_c_ends_a_command_with_130_and_nothing_else(jobs, store):
    run_id = record(store, state="queued")
    waiting = subprocess.Popen(
        [sys.executable, roexec.__file__, "--store", store.path, "-v", "logs", "-f", run_id],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    waiting.stderr.readline()       # it has begun
    waiting.send_signal(signal.SIGINT)
    out, err = waiting.communicate(timeout=60)
    assert (waiting.returncode, out) == (130, "") and "Traceback" not in err


def on_terminal(store, *words, redirect="", typed=b"", program=roexec.__file__, seen=None,
                **variables):
    """What a command shows on a terminal at which something is typed; `seen(output)` is told, each
    time that there is more."""
    import pty
    pid, descriptor = pty.fork()
    if pid == 0:
        os.environ.update({"TERM": "xterm", **variables})
        os.execv("/bin/sh", ["sh", "-c", f'"$0" "$@" {redirect}', sys.executable, program,
                             "--store", store.path, *words])
    os.write(descriptor, typed)
    output = b""
    with contextlib.suppress(OSError):      # EIO: the other side has been closed
        while True:
            data = os.read(descriptor, 4096)
            if not data:
                break
            output += data
            if seen is not None:
                seen(output.decode(errors="replace"))
    os.close(descriptor)
    os.waitpid(pid, 0)
    return output.decode()


def test_the_same_output_has_colour_on_a_terminal_alone(jobs, store):
    assert "\x1b[1mID" in on_terminal(store, "list", "jobs")
    assert "\x1b" not in on_terminal(store, "list", "jobs", NO_COLOR="1")
    assert "\x1b" not in process(store, "list", "jobs").stdout


SOON = """
import os, sys
sys.path.insert(0, {folder!r})
import roexec
line, found = roexec._StatusLine, []
tick, patience = line.tick, line.patience

def look(self):
    found[:] = [os.path.exists({now!r})]        # before the output is read
    return min(0.02, patience(self))
line.patience, line.tick = look, lambda *values: found[0] and tick(*values)
roexec._STATUS_AFTER = float(os.environ.get("AFTER", 0))
sys.exit(roexec.main())
"""


@pytest.fixture
def soon(tmp_path):
    """A roexec that may have a status line as soon as the file `now` is there, after `AFTER` s."""
    path = tmp_path / "soon.py"
    path.write_text(SOON.format(folder=os.path.dirname(roexec.__file__), now=str(tmp_path / "now")))
    return str(path)


STATUS = re.compile(r"\r(\w+ [0-9.]+m?s(?: of about [0-9]+\w+)?)\x1b\[K")
CLEARED = "\r\x1b[K"


def test_a_run_that_takes_long_has_a_status_line_that_is_gone_when_output_comes(store, soon,
                                                                                tmp_path):
    store.create()
    at = time.time() - 100
    record(store, "slow", at=at, finished_at=at + 42)

    def seen(output):
        """Let the command go on when there was a status line, and when there is another one."""
        for name, text in (("first", output), ("second", output.partition("two\r\n")[2])):
            if STATUS.search(text):
                (tmp_path / name).touch()
    (tmp_path / "now").touch()
    shown = on_terminal(store, "run", "--name", "slow", "--", "sh", "-c",
                        "echo one; until test -e first; do sleep 0.02; done; echo two; "
                        "until test -e second; do sleep 0.02; done; exit 3", program=soon,
                        seen=seen, AFTER="0.2")
    seconds = [int(re.fullmatch(r"slow (\d+)s of about 42s", text)[1])
               for text in STATUS.findall(shown)]
    assert len(seconds) > 1 and seconds == sorted(set(seconds))
    assert STATUS.sub("", shown) in [f"{before}one\r\n{CLEARED}two\r\n{CLEARED}"
                                     for before in ("", CLEARED)]


@pytest.mark.parametrize("script, how", [
    ("touch now; sleep 0.4", {"redirect": "2>errors"}),
    ("touch now; sleep 0.4", {"redirect": "| cat"}),
    ("touch now; sleep 0.4", {"TERM": "dumb"}),
    ("printf 'name? '; touch now; sleep 0.4; echo", {}),
    ("stty -echo </dev/tty; touch now; sleep 0.4", {}),
    ("touch now; sleep 0.1", {"AFTER": "600"}),
])
def test_a_status_line_is_not_drawn_where_it_might_spoil_something(script, how, store, soon):
    shown = on_terminal(store, "run", "--name", "x", "--", "sh", "-c", script, program=soon, **how)
    assert "\x1b" not in shown


def test_what_stty_tostop_forbids_to_jobs_in_the_background_is_shown_nevertheless(store):
    shown = on_terminal(store, "run", "--name", "x", "--", "sh", "-c",
                        "stty tostop </dev/tty; echo shown")
    assert shown == "shown\r\n"


# Tokens, and who has changed what.

ME = "user " + roexec.owner_name(os.getuid())


def token_of(store, text):
    with store.read() as db:
        row = roexec.find_token(db, text.strip(), time.time())
    return row and roexec.token_payload(row)


def test_a_token_is_printed_once_and_alone(cli, store):
    status, out, err = cli("token create --name ci --scope run:list,run:create --scope log:read "
                           "--jobs deploy* --expires 30d")
    assert status == 0 and re.fullmatch(r"roexec_[\w-]{32}\n", out)
    assert err == "roexec: keep it now: it is not shown again\n"
    token = token_of(store, out)
    assert (token["name"], token["jobs"]) == ("ci", "deploy*")
    assert token["scopes"] == ["run:list", "run:create", "log:read"]
    assert out.strip() not in "".join(cli(line)[1] for line in (
        "token list", "token list --json", "audit", "audit --json"))
    assert cli("token list")[1].splitlines()[1].startswith("ci    deploy*  ")


def test_who_makes_a_token_that_may_define_jobs_is_told_what_that_means(cli):
    for options, told in (("--role admin", True), ("--scope job:write --jobs a*", True),
                          ("--role operator", False)):
        err = cli(f"token create --name x{len(options)} {options}")[2]
        assert ("may define jobs (job:write), and so run any command as the user of the "
                "server" in err) is told


def test_a_token_is_renewed_and_revoked(cli, store):
    first = cli("token create --name ci --role viewer --expires 1h")[1]
    second = json.loads(cli("token rotate ci --json")[1])
    assert token_of(store, first) is None and second["name"] == "ci"
    assert token_of(store, second["token"])["expires_at"] is not None
    assert cli("token revoke ci") == (0, "ci: revoked\n", "")
    assert token_of(store, second["token"]) is None


@pytest.mark.parametrize("line, status, message", [
    ("token create --role viewer", 2, "give it a name: roexec token create --name ci-token"),
    ("token create --name x", 2, "scopes: write what the token may do"),
    ("token create --name x --scope run:lst", 2, 'scopes: there is no scope "run:lst"; did you'),
    ("token create --name ci --role viewer", 1, 'there is a token "ci" already; rotate it'),
    ("token rotate", 2, "say which one: roexec token rotate NAME"),
    ("token rotate cii", 1, 'there is no token "cii"; did you mean "ci"?'),
    ("token revoke ci cii", 1, 'there is no token "cii"; did you mean "ci"?'),
    ("token", 2, 'there is no command "token"; there are token create, token list, token rotate '
     "and token revoke")])
def test_what_cannot_be_done_with_a_token_is_told(line, status, message, cli, store):
    cli("token create --name ci --role viewer")
    found, out, err = cli(line)
    assert (found, out) == (status, "") and err.startswith(f"roexec: {message}")
    with store.read() as db:
        assert [row["name"] for row in roexec.list_tokens(db)] == ["ci"]


def test_a_dry_run_changes_no_token(cli, store):
    cli("token create --name ci --role viewer")
    with store.read() as db:
        before = "".join(db.iterdump())
    for line, said in (("create --name x --role viewer", "x: created"), ("rotate ci", "ci: rotated"),
                       ("revoke ci", "ci: revoked")):
        assert cli(f"token {line} --dry-run")[:2] == (0, f"{said} (dry run)\n")
    with store.read() as db:
        assert "".join(db.iterdump()) == before


def test_each_change_is_noted_with_who_made_it(cli, jobs, store):
    jobs.write_text("jobs: [{id: hello, command: x}]")
    cli("apply -f jobs.yml --prune")
    cli("pause hello"), cli("pause hello"), cli("resume hello --dry-run"), cli("resume hello")
    run = record(store, state="queued")
    cli(f"cancel {run}")
    assert cli("run --name fast -- true")[0] == 0
    cli("token create --name ci --role viewer"), cli("token revoke ci"), cli("delete hello")
    rows = json.loads(cli("audit --json")[1])["audit"]
    assert {row["who"] for row in rows} == {ME}
    assert [(row["action"], row["job_id"] or row["target"], row["detail"]) for row in rows] == [
        ("delete", "hello", None), ("token revoke", "ci", None),
        ("token create", "ci", "job:read run:list log:read"), ("run", "fast", None),
        ("cancel", "hello", None), ("resume", "hello", None), ("pause", "hello", None),
        ("delete", "backup", None), ("apply", "hello", "changed"), ("apply", "backup", "added"),
        ("apply", "hello", "added")]
    assert rows[3]["target"] == read_runs(store, job_id="fast")[0]["id"]
    assert cli("audit --limit 1")[1].splitlines()[1].split()[1:] == [*ME.split(), "delete", "hello",
                                                                      "-", "-"]


def test_a_change_that_fails_is_not_noted(cli, jobs, store, monkeypatch):
    before = cli("audit")[1]
    monkeypatch.setattr(roexec, "perform_apply", lambda *_: 1 / 0)
    assert cli("add other -- true")[0] == 1 and cli("delete hello nobody")[0] == 1
    assert cli("audit")[1] == before


# Upkeep.

def test_purge_says_what_goes_and_does_it(cli, jobs, store):
    for days in (50, 40, 20):
        record(store, at=time.time() - days * 86400)
    assert cli("maintenance purge --older 30d --dry-run")[1] == (
        "2 runs; would free 0 B (dry run)\n")
    assert len(read_runs(store)) == 3
    assert cli("maintenance purge --older 30d --keep 2")[1] == "1 run; freed 0 B\n"
    assert json.loads(cli("maintenance purge --older 30d --json")[1]) == {
        "runs": 1, "logs": 0, "bytes": 0, "dry_run": False}
    assert cli("maintenance purge")[1] == "nothing to purge\n"
    assert [row["action"] for row in audit(store)] == ["purge", "purge"]


def audit(store):
    with store.read() as db:
        return [row for row in roexec.list_audit(db, 50) if row["action"] == "purge"]


@pytest.mark.parametrize("line, error", [
    ("maintenance", "there is no command \"maintenance\""),
    ("maintenance purge --older soon", "--older: \"soon\" is not a duration"),
    ("maintenance purge --keep 0", "--keep is 1 or more"),
    ("maintenance purge --job nobody --keep 1", "there is no job \"nobody\"")])
def test_a_purge_that_cannot_be_meant_is_refused(line, error, cli, jobs):
    status, out, err = cli(line)
    assert (out, error in err) == ("", True) and status in (1, 2), err


def test_the_log_of_a_run_that_is_removed_says_when_and_why(cli, jobs, store):
    run_id = record(store, log_gone="on 2025-08-01T00:00:00Z, since …")
    assert cli(f"logs {run_id}")[2] == (
        f"roexec: the log of run {run_id} was removed on 2025-08-01T00:00:00Z, since …\n")


def test_a_backup_is_made_looked_at_and_restored(cli, jobs, store, tmp_path):
    record(store)
    assert cli("maintenance backup b.tar --dry-run")[1] == (
        f"would write {tmp_path}/b.tar: 2 jobs, 1 run (dry run)\n")
    assert not (tmp_path / "b.tar").exists()
    assert cli("maintenance backup b.tar --logs")[:2] == (0, f"{tmp_path}/b.tar: 2 jobs, 1 run\n")
    record(store)
    assert cli("maintenance restore b.tar --dry-run")[1] == (
        f"restored {store.path}: 2 jobs, 1 run (dry run)\n")
    assert len(read_runs(store)) == 2
    status, out, err = cli("maintenance restore b.tar")
    assert (status, out) == (0, f"restored {store.path}: 2 jobs, 1 run\n")
    assert f"what was there before lies in {store.folder}/before-" in err
    assert len(read_runs(store)) == 1
    assert json.loads(cli("maintenance restore b.tar --json --dry-run")[1]) == {
        "jobs": 2, "runs": 1, "before": None, "dry_run": True}
    assert cli("audit --json")[1].count('"restore"') == 1


@pytest.mark.parametrize("line, error", [
    ("maintenance backup", "name one file"), ("maintenance backup a b", "name one file"),
    ("maintenance restore none.tar", "there is no file"),
    ("maintenance restore jobs.yml", "is no backup, or a damaged one"),
    ("maintenance restore store/roexec.db", "is the database of the store itself")])
def test_a_backup_that_cannot_be_meant_is_refused(line, error, cli, jobs):
    status, out, err = cli(line)
    assert (out, error in err) == ("", True) and status in (1, 2), err


def test_check_says_what_it_finds_and_mends_it(cli, jobs, store):
    assert cli("maintenance check")[:2] == (0, "all is well\n")
    record(store, log="logs/hello/2025-08-01T10:00:00.log")
    text = f"{store.folder}/logs/hello/2025-08-01T10:00:00.log is not there; its run says so now"
    assert cli("maintenance check --dry-run")[:2] == (0, f"mended: {text} (dry run)\n")
    assert json.loads(cli("maintenance check --json")[1]) == {
        "findings": [{"kind": "mended", "text": text}]}
    assert cli("maintenance check")[:2] == (0, "all is well\n")


def test_check_fails_where_a_person_is_needed(cli, jobs, store):
    with open(store.database, "r+b") as file:
        file.seek(8000)
        file.write(b"x" * 20_000)
    status, out, err = cli("maintenance check")
    assert status == 1 and out.startswith("wrong: the database is damaged"), err


# The logs of many runs.

@pytest.fixture
def three_logs(cli, jobs, store):
    """Three runs with logs, of an hour, of two and of three ago, the last one's packed, one on."""
    made = {}
    for hours, job_id, text in ((3, "hello", b"old\n"), (2, "backup", b"bad \xff\nend"),
                                (1, "hello", b"new\nerror 42\n")):
        at = time.time() - hours * 3600
        made[hours] = record(store, job_id, at=at)
        log = roexec.LogWriter(store.folder, job_id, at, made[hours])
        log.write("Attempt 1", at)
        log.output("err" if hours == 2 else "out", text, at)
        log.close(at)
        with store.write() as db:
            roexec.set_log(db, made[hours], log.path)
    with store.read() as db:
        roexec.pack_log(store.folder, roexec.get_run(db, made[3])["log"], 1 << 30)
    return made


def exported(cli, line):
    status, out, err = cli(f"logs export {line}")
    assert (status, err) == (0, "")
    return json.loads(out)


def test_an_export_has_each_line_of_each_run_in_order_of_their_starts(cli, three_logs):
    found = exported(cli, "")
    assert [(line["run"], line["stream"], line["line"]) for line in found] == [
        (three_logs[3], "info", "Attempt 1"), (three_logs[3], "out", "old"),
        (three_logs[2], "info", "Attempt 1"), (three_logs[2], "err", "bad \ufffd"),
        (three_logs[2], "err", "end"),
        (three_logs[1], "info", "Attempt 1"), (three_logs[1], "out", "new"),
        (three_logs[1], "out", "error 42")]
    assert set(found[0]) == {"time", "job", "run", "step", "attempt", "stream", "line", "partial"}
    assert found[3]["base64"] == "YmFkIP8=" and "base64" not in found[4]
    assert [line["partial"] for line in found] == [False] * 4 + [True] + [False] * 3
    assert {line["attempt"] for line in found} == {1}
    lines = cli("logs export --format ndjson")[1].splitlines()
    assert list(map(json.loads, lines)) == found


@pytest.mark.parametrize("line, runs", [
    ("--since 90m", [1, 1, 1]), ("--job backup", [2, 2, 2]), ("--since 150m --job hello", [1, 1, 1]),
    ("--since 10m", [])])
def test_an_export_of_some(cli, three_logs, line, runs):
    assert [found["run"] for found in exported(cli, line)] == [three_logs[hours] for hours in runs]


def test_an_export_as_text_has_the_job_and_the_run_in_each_line(cli, three_logs):
    lines = cli("logs export --format text --job hello")[1].splitlines()
    assert re.fullmatch(rf"20\S+Z hello {three_logs[3]} \[INFO\] Attempt 1", lines[0]), lines
    assert cli("logs --job hello")[1].splitlines() == lines


def test_an_export_that_fails_is_closed_all_the_same(cli, three_logs, store):
    with store.read() as db:
        path = store.file(roexec.get_run(db, three_logs[3])["log"]) + ".gz"
    with open(path, "ab") as file:
        file.write(b"junk")
    status, out, _ = cli("logs export")
    assert status == 1
    assert json.loads(out) == [{"error": f"{path}: the packed log is damaged"}]
    assert json.loads(cli("logs export --format ndjson")[1]) == json.loads(out)[0]
    assert json.loads(cli("logs export --since 150m")[1])[-1]["line"] == "error 42"


def test_an_export_of_nothing_is_an_empty_list(cli, jobs):
    assert cli("logs export")[:2] == (0, "[\n]\n")
    assert cli("logs export --format ndjson")[:2] == (0, "")


@pytest.mark.parametrize("line, texts", [
    ("logs --grep error", ["error 42"]), ("logs --grep e[nr] --stream err", ["end"]),
    ("logs --since 90m --raw", ["new", "error 42"]), ("logs --job hello --grep ^.l", ["old"]),
    ("logs --since 90m --tail 1", ["error 42"]), ("logs hello --grep new", ["new"]),
    ("logs backup --since 1m", []), ("logs hello --raw --grep 4", ["error 42"])])
def test_logs_are_searched(cli, three_logs, line, texts):
    out = cli(line)[1]
    assert [text.rpartition("] ")[2] for text in out.splitlines()] == texts


@pytest.mark.parametrize("line, error", [
    ("logs --grep (", "--grep (: missing )"), ("logs --since soon", "neither a duration"),
    ("logs --job hello -f", "-f follows one run"), ("logs hello --job hello", "--job is for"),
    ("logs --job none", 'there is no job "none"'), ("logs export --job none", "no job \"none\""),
    ("logs export --format xml", 'there is no format "xml"'), ("logs", "say which one")])
def test_a_search_that_cannot_be_meant_is_refused(cli, jobs, line, error):
    status, out, err = cli(line)
    assert (out, error in err, status > 0) == ("", True, True), err


def test_who_has_no_keys_for_the_bucket_is_told_to_ask_the_server_for_a_log(
        cli, store, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    config = tmp_path / "config.yml"
    config.write_text("store: {type: s3, bucket: runs, path: elsewhere}")
    run = perform(store.create(), "echo hi")
    os.unlink(store.file(run["log"]))
    line = f"--config {config} logs {run['id']}"
    status, _, err = cli(line)
    assert status == 1 and "there are no credentials for S3" in err and "--url" not in err
    lock = roexec.hold_server_lock(store)
    try:
        with store.write() as db:
            roexec.set_meta(db, "url", "http://127.0.0.1:8080")
        status, _, err = cli(line)
    finally:
        os.close(lock)
    assert status == 1 and err.endswith("which may get at the bucket: --url http://127.0.0.1:8080\n")
