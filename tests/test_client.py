"""Commands that ask a server elsewhere: as they ask the store of this host, or a clear sentence."""
import json
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

import engines
import pytest
from helpers import apply, make_job, read_runs, serve, token, wait_for

import roexec

JOBS = """
jobs:
  - {id: hello, command: "echo hi; echo bad >&2; printf part; exit 3", tags: [x], name: Greet}
  - {id: tick, schedule: "0 5 * 3 *", timezone: Europe/Berlin, command: [date], env: {A: "1.10"}}
  - {id: off, schedule: "@daily", enabled: false, command: "true"}
  - id: chain
    pipeline:
      - {id: one, command: "echo from one"}
      - {id: two, command: "echo from two; exit 4", depends_on: one}
      - {id: three, command: "echo from three", depends_on: two}
  - {id: slow, command: "echo begun; exec sleep 60"}
"""


class Served:
    """A server in a process of its own, on a store with some jobs and runs."""

    def __init__(self, folder, port=0, **environment):
        self.folder, self.store = folder, roexec.Store(str(folder / "store"))
        self.environment, self.port = environment, port
        folder.mkdir(exist_ok=True)
        (folder / "jobs.yml").write_text(JOBS)
        self.start()

    def start(self):
        said = self.folder / "said"
        with open(said, "w") as file:
            self.process = subprocess.Popen(
                [sys.executable, roexec.__file__, "--store", self.store.path, "server", "--port",
                 str(self.port)], stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                env={**os.environ, **self.environment})
        found = wait_for(lambda: re.search(r"http=http://127.0.0.1:(\d+)", said.read_text()), 60,
                         said.read_text)
        self.port = int(found[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self, how=signal.SIGTERM):
        self.process.send_signal(how)
        self.process.wait(60)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    # Not the home of this user, in whose folders a live server would leave its name.
    folder = tmp_path_factory.mktemp("served")
    server = Served(folder / "it", HOME=str(folder), XDG_RUNTIME_DIR=str(folder), TZ="UTC")
    yield server
    server.stop()


@pytest.fixture
def call(served, surroundings, capfd, monkeypatch, tmp_path):
    """`call("list jobs")` -> (exit status, standard output, standard error) of asking the server;
    `call.here` of asking its store."""
    def perform(words):
        capfd.readouterr()
        return (roexec.main(words), *capfd.readouterr())

    def there(line, *more, url=served.url):
        return perform(["--url", url, *shlex.split(line), *more])

    def here(line, *more):
        return perform(["--store", served.store.path, *shlex.split(line), *more])
    there.here = here
    (tmp_path / "jobs.yml").write_text(JOBS)
    return there


@pytest.fixture
def registered(served, call):
    """The jobs, as they are at first, registered through the API."""
    assert call("apply -f jobs.yml")[0] == 0
    return served


@pytest.fixture
def ran(registered, call):
    """The id of a run of `hello` that has ended."""
    runs = read_runs(registered.store, job_id="hello", state="failed")
    if not runs:
        assert call("run chain")[0] == 4
        assert call("run hello")[0] == 3
        runs = read_runs(registered.store, job_id="hello", state="failed")
    return runs[-1]["id"]


SAME = """
    list jobs
    list jobs --json
    list runs
    list runs --json
    list runs --job hello --state failed
    list runs --active
    list runs --job nothing
    list runs --since 1s --job tick
    list runs --limit 0
    show tick
    show hello --json
    show tick --json
    show latest --json
    show nothing
    next
    next tick --count 2
    next tick --json
    next off
    next hello
    next nothing
    next --count 0
    next tick --from 2026-03-28 --to 2026-03-31
    next --from 2026-03-28 --to 2026-03-31 --duration 2h --json
    next --cron @hourly --from 2026-03-28
    why tick
    why tick 2026-03-29T05:00 --json
    why tick yesterday
    why nothing
    status
    logs latest
    logs hello --raw
    logs hello --stream err
    logs hello --tail 2
    logs hello --grep part
    logs hello --stream both
    logs nothing
    logs hello --follow --raw
    logs chain
    logs chain -f
    logs chain --tail 5
    logs chain --stream out
    logs chain --raw --grep two
    show chain
    wait hello
    wait nothing
    export
    export tick --json
    export nothing
    token list
    token list --json
    token rotate nothing
    token revoke nothing
    token rotate ci --dry-run
    token create --name ci --scope run:list
    token create --name ci --scope run:list --dry-run
    token create --name new --scope run:lost
    audit --limit 3
    audit --limit 0 --json
    pause tick --dry-run
    pause nothing
    resume tick off
    delete nothing
    delete tick nothing
    delete tick off --dry-run
    cancel hello
    cancel nothing
    retry hello --dry-run
    retry hello --from lost
    retry chain --dry-run
    retry chain --from one --dry-run --json
    retry chain --from four --dry-run
    list runs --steps --job chain
    run chain --dry-run
    retry nothing
    run hello --dry-run
    run nothing
    add new --set timeout=soon -- true
    add new --dry-run -- true
    list jobs --dry-run
"""


@pytest.mark.parametrize("line", [*filter(None, map(str.strip, SAME.splitlines()))])
def test_a_command_says_the_same_of_a_server_as_of_its_store(line, call, ran, served):
    if "token" in line and not call.here("token list")[1]:
        assert call("token create --name ci --scope run:list")[0] == 0
    here, there = call.here(line), call(line)
    assert there[:2] == here[:2]
    of_place = re.sub(r"in \S+; a server runs on it", f"on {served.url}", here[2])
    assert there[2] == of_place
    assert there[0] in (0, 1, 2, 3, 125)


CHANGES = """
    add NAME --schedule @daily --set timeout=1h -- echo 'a  b' | 0
    add NAME -- true                    | 0
    pause NAME                          | 0
    pause NAME                          | 0
    pause NAME --for 2h                 | 0
    resume NAME                         | 0
    resume NAME                         | 0
    run NAME                            | 0
    run NAME --env A=b                  | 0
    token create --name NAME --role viewer --jobs 'NAME*' --expires 2099-01-01 | 0
    token rotate NAME                   | 0
    token revoke NAME                   | 0
    delete NAME                         | 0
    delete NAME                         | 1
    run NAME                            | 125
"""


def test_what_is_changed_over_there_is_changed_as_it_is_here(registered, call):
    def plain(text):
        text = re.sub(r"here\w*|there\w*", "NAME", text)
        return re.sub(r"\d{4}-\S+|roexec_\S+|\b[a-z0-9]{10}\b", "VALUE", text)

    for line in filter(None, map(str.strip, CHANGES.splitlines())):
        line, expected = line.rsplit("|", 1)
        here = call.here(line.replace("NAME", "here"))
        there = call(line.replace("NAME", "there"))
        assert [there[0], plain(there[1]), plain(there[2])] == [
            int(expected), plain(here[1]), plain(here[2])], line
        if int(expected) == 0 and "delete" not in line:
            assert plain(call("show there")[1]) == plain(call.here("show here")[1]), line


def test_the_output_of_a_run_elsewhere_comes_as_it_was_and_its_exit_status_too(registered, call):
    assert call("run hello") == (3, "hi\npart", "bad\n")
    assert call("run hello --env A=b")[0] == 3
    status, out, _ = call("run chain")          # each step has a stream of its own
    assert (status, sorted(out.splitlines())) == (4, ["from one", "from two"])
    status, out, _ = call("run hello --detach")
    assert status == 0 and re.fullmatch(r"\w{10}\n", out)
    assert call("wait", out.strip())[0] == 3
    run_id = json.loads(call("run hello --detach --json")[1])["run"]
    assert call("wait", run_id)[0] == 3
    status, out, _ = call("retry latest")
    assert status == 0 and read_runs(registered.store, id=out.strip())[0]["trigger"] == "retry"
    assert call("wait", out.strip())[0] == 3


def test_a_run_in_the_way_is_named_and_can_be_cancelled(registered, call):
    run_id = call("run slow --detach")[1].strip()
    wait_for(lambda: read_runs(registered.store, id=run_id)[0]["state"] == "running")
    assert call("run slow") == (
        125, "", f'roexec: job "slow" is running already: run {run_id}\n')
    status, out, _ = call("cancel slow")            # which may have been done by then
    assert status == 0 and re.fullmatch(f"{run_id}: (is being )?cancelled\n", out)
    assert call("wait", run_id)[0] == 130
    assert call("cancel", run_id) == (
        1, "", f"roexec: run {run_id} has ended already: cancelled\n")


def spawn(*words, **environment):
    """The command in a process of its own, with pipes."""
    return subprocess.Popen([sys.executable, roexec.__file__, *words], stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, **environment})


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_run_ends_the_run_as_it_does_here(how, registered, call):
    client = spawn("run", "slow", ROEXEC_URL=registered.url)
    assert client.stdout.readline() == "begun\n"
    client.send_signal(how)
    assert client.communicate(timeout=60) == ("", "")
    assert client.returncode == 130
    assert read_runs(registered.store, job_id="slow")[-1]["state"] == "cancelled"


def test_interrupting_run_while_it_is_asked_for_ends_the_run_once_it_is_known(registered, call,
                                                                            monkeypatch):
    start, handler = roexec.Remote.start, signal.getsignal(signal.SIGINT)

    def start_and_interrupt(remote, *values):
        run_id = start(remote, *values)
        os.kill(os.getpid(), signal.SIGINT)
        return run_id
    monkeypatch.setattr(roexec.Remote, "start", start_and_interrupt)
    assert call("run slow")[0] == 130
    assert read_runs(registered.store, job_id="slow")[-1]["state"] == "cancelled"
    assert signal.getsignal(signal.SIGINT) is handler


def test_what_steps_print_is_followed_while_they_are_on(registered, call, marks):
    wait = f"echo begun; until grep -q go {marks.path}; do sleep 0.02; done; echo over"
    apply(registered.store, roexec.Job({"id": "line", "pipeline": [
        {"id": "one", "command": wait, "directory": "/"}]}))
    run_id = call("run line --detach")[1].strip()
    try:
        wait_for(lambda: read_runs(registered.store, parent=run_id))
        clients = [spawn("--url", registered.url, "logs", run_id, "-f"),
                   spawn("--url", registered.url, "run", "line", "--queue")]
        wait_for(lambda: "[OUT] one: begun" in clients[0].stdout.readline())
    finally:
        marks.path.write_text("go")
    logged, printed = (client.communicate(timeout=60)[0] for client in clients)
    assert "[OUT] one: over" in logged and logged.endswith("[INFO] Completed, exit=0\n")
    assert printed == "begun\nover\n"
    assert [client.returncode for client in clients] == [0, 0]


# Job files.

def test_files_are_read_here_and_what_is_wrong_is_told_with_its_place(registered, call, tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more/a.yml").write_text("jobs:\n  - {id: a, command: x, timeuot: 5}\n")
    (tmp_path / "more/b.yml").write_text("job:\n  id: b\n  command: x\n  schedule: 61 * * * *\n")
    for path in ("more", f"{tmp_path}/more", "./more"):
        here, there = (ask(f"apply -f {path}") for ask in (call.here, call))
        assert there[0] == 1 and "a.yml:2:" in there[2]
        assert here[2].startswith(there[2])
    assert call("apply -f missing.yml") == call.here("apply -f missing.yml")
    assert call("apply -f jobs.yml jobs.yml")[0] == 2
    (tmp_path / "bytes.yml").write_bytes(b"jobs: [\xff]")
    assert call("apply -f bytes.yml") == (1, "", "roexec: bytes.yml: byte 7 is not UTF-8\n")


def test_with_prune_jobs_go_that_left_their_file_or_whose_file_left_its_folder(registered, call,
                                                                             tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.yml").write_text("jobs:\n  - {id: a1, command: x}\n  - {id: a2, command: x}\n")
    (folder / "b.yml").write_text("jobs:\n  - {id: b1, command: x}\n")
    assert call("apply -f set")[1] == "a1: added\na2: added\nb1: added\n"
    (folder / "a.yml").write_text("jobs:\n  - {id: a1, command: y}\n")
    (folder / "b.yml").unlink()
    assert call("apply -f set --prune --dry-run")[1] == (
        "a1: changed (dry run)\na2: removed (dry run)\nb1: removed (dry run)\n")
    assert call("apply -f set --prune --json")[0] == 0
    ids = [job["id"] for job in json.loads(call("list jobs --json")[1])["jobs"]]
    assert "a1" in ids and not {"a2", "b1"} & set(ids)
    assert call("delete a1")[0] == 0


def test_a_job_file_comes_from_standard_input_too(registered, call):
    client = subprocess.run([sys.executable, roexec.__file__, "--url", registered.url, "apply",
                             "-f", "-", "--dry-run"], input="job: {id: new, command: x}", text=True,
                            capture_output=True, timeout=60)
    assert (client.returncode, client.stdout) == (0, "new: added (dry run)\n"), client.stderr


# Who may.

SCOPED = [
    ("run:create", "run hello --detach", 0, ""),
    ("run:create", "list jobs", 1, "this needs the scope job:read, which token few does not have"),
    ("run:create", "run hello", 125, "this needs the scope run:list"),
    ("run:create,run:list", "run hello", 3, "this needs the scope log:read, which token few does "
     "not have; so what run"),
    ("run:create,log:read", "run hello", 3, ""),
    ("run:list", "list runs", 0, ""),
    ("run:list", "list runs --job nothing", 1, "this needs the scope job:read"),
    ("run:list", "wait hello", 3, ""),
    ("job:read", "status", 0, ""),
    ("log:read", "logs latest", 0, ""),
    ("job:read", "show hello", 0, ""),
    ("run:list", "show latest", 0, ""),
    ("job:read", "export", 1, "this needs the scope job:write"),
    ("job:read", "pause hello", 1, "this needs the scope job:pause"),
    ("job:read", "apply -f jobs.yml", 1, "this needs the scope job:write"),
    ("job:read", "token list", 1, "this needs the scope token:admin"),
]


@pytest.mark.parametrize("scopes, line, status, told", SCOPED)
def test_a_token_with_few_scopes_does_what_these_allow_and_the_missing_one_is_named(
        scopes, line, status, told, ran, call, served):
    call.here("token revoke few")
    text = token(served.store, "few", scopes=scopes.split(","))
    found = call(f"{line} --token {text}")
    assert found[0] == status
    assert told in found[2] if told else found[2] in ("", "bad\n")
    assert text not in found[1] + found[2]


def test_the_token_comes_from_the_environment_and_is_in_no_error(call, registered, monkeypatch):
    secret = "not-a-token-that-anybody-has"
    monkeypatch.setenv("ROEXEC_TOKEN", secret)
    for line in ("list jobs", "status --verbose", "run hello", "list jobs --json"):
        status, out, err = call(line)
        assert status in (1, 125) and err.endswith(
            f"{registered.url} does not know this token, or it has expired\n")
        assert secret not in out + err
    monkeypatch.setenv("ROEXEC_TOKEN", "two words")
    assert call("list jobs")[2] == ("roexec: the token has a character that no token has; it is "
                                    "one word\n")
    monkeypatch.setenv("ROEXEC_TOKEN", token(registered.store, "env", role="viewer") + "\n")
    assert call("list jobs")[0] == 0
    monkeypatch.delenv("ROEXEC_TOKEN")
    assert call(f"list jobs --url http://x:{secret}@127.0.0.1:1") == (
        2, "", "roexec: a token does not belong into the URL; put it into ROEXEC_TOKEN\n")


def test_without_a_token_where_one_is_needed_it_is_told_where_to_put_it(store, call):
    server = serve(store, [], auth={"owner": False})
    try:
        url = "http://127.0.0.1:%d" % server.address[1]
        assert call("list jobs", url=url) == (
            1, "", f"roexec: {url} wants a token: put it into ROEXEC_TOKEN; on its host roexec "
            "token create makes one\n")
    finally:
        server.close()


# Whom to ask.

@pytest.mark.parametrize("line, told", [
    ("exec -- true", "exec: this is for a store of this host alone; do without --url"),
    ("server", "server: this is for"), ("doctor", "doctor: this is for"),
    ("maintenance check", "maintenance check: this is for"), ("edit hello", "edit: this is for"),
    ("init", "init: this is for"), ("run --name x -- true", "run --name: this is for"),
    ("logs --job hello", "logs of many runs: this is for"),
    ("list jobs --store x", "--store is for a store of this host, --url for a server"),
    ("list jobs --url ftp://x", "ftp://x is no URL of a server; write for example https://"),
    ("list jobs --url localhost:8080", "localhost:8080 is no URL of a server"),
    ("list jobs --url http://", "http:// is no URL of a server"),
    ("list jobs --url http://x:99999", "http://x:99999 is no URL of a server"),
    ("list jobs --url http://x/?a=b", "http://x/?a=b is no URL of a server"),
])
def test_what_cannot_be_asked_elsewhere_is_refused(line, told, call):
    status, out, err = call(line)
    assert (status, out) == (2 if not line.startswith(("exec", "run")) else 125, "") or status == 2
    assert told in err and err.count("\n") == 1


def test_a_variable_names_the_server_unless_a_store_is_given(registered, call, monkeypatch, cli):
    monkeypatch.setenv("ROEXEC_URL", registered.url)
    assert cli("list jobs", store=None)[:2] == call("list jobs")[:2]
    assert cli("list jobs")[1] == ""                # the store of this test
    assert cli("maintenance check", store=None)[2] == (
        "roexec: maintenance check: this is for a store of this host alone; unset ROEXEC_URL, or "
        "write --store\n")
    assert cli("exec -- true", store=None)[0] == 0
    monkeypatch.delenv("ROEXEC_URL")
    assert cli("list jobs --token x")[2] == "roexec: --token is for a server; write --url too\n"


def test_help_warns_of_a_token_that_others_can_see(call):
    out = call("list jobs --help")[1]
    assert "--url URL" in out and "ROEXEC_TOKEN" in out
    assert "--url" not in call("doctor --help")[1]


# Servers that go away, are slow, strange or hostile.

def test_following_goes_on_where_it_was_when_the_server_begins_again(tmp_path, call, marks):
    server = Served(tmp_path / "it", *engines.free_ports(1))
    apply(server.store, make_job(
        f"for i in 1 2 3; do echo line $i; until grep -q $i {marks.path}; do sleep 0.01; done; done"
        "; echo over >&2; exit 7", "steps"))
    runner = spawn("--url", server.url, "run", "steps")
    assert runner.stdout.readline() == "line 1\n"
    follower = spawn("--url", server.url, "logs", "steps", "-f", "--stream", "out")
    said, asked, ends = [], [], []
    remote = roexec.Remote(server.url, None, said.append)
    ask = remote.ask
    remote.ask = lambda *words: asked.append(words) or ask(*words)
    waiter = threading.Thread(target=lambda: ends.append(remote.wait("steps")))
    waiter.start()
    wait_for(lambda: len(asked) > 1)
    try:
        assert follower.stdout.readline() == "line 1\n"
        server.stop(signal.SIGKILL)
        wait_for(lambda: said)
        assert said[0].endswith("; trying again for 2m")
        marks.path.write_text("1\n2\n")
        server.start()
        assert follower.stdout.readline() == "line 2\n"
        marks.path.write_text("1\n2\n3\n")
        out, err = runner.communicate(timeout=60)
        assert (runner.returncode, out) == (7, "line 2\nline 3\n") and err.endswith("over\n")
        assert follower.stdout.read() == "line 3\n" and follower.wait(60) == 0
        waiter.join(60)
        assert ends[0]["exit_code"] == 7
    finally:
        marks.path.write_text("1\n2\n3\n")
        follower.kill()
        follower.communicate()
        remote.wire.close()
        server.stop()


def test_a_server_that_begins_to_answer_and_never_does_is_given_up(call, peer, monkeypatch):
    monkeypatch.setattr(roexec, "_GONE_TIME", 0.3)
    monkeypatch.setattr(roexec, "_RETRY_PAUSE", 0.1)

    def treat(connection, request):
        run = b'{"id": "x", "state": "running", "steps": []}'
        connection.sendall(http(body=run) if b"/logs" not in request else
                           b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    status, out, err = call("logs x -f", url=peer(treat).url)
    assert (status, out) == (1, "") and err.endswith("broke in the middle of an answer\n")


def test_a_server_that_stays_away_is_given_up_in_words(tmp_path, call, monkeypatch):
    monkeypatch.setattr(roexec, "_GONE_TIME", 0.2)
    monkeypatch.setattr(roexec, "_RETRY_PAUSE", 0.1)
    server, follows, take = Served(tmp_path / "it"), threading.Event(), roexec.Following._take
    monkeypatch.setattr(roexec.Following, "_take",
                        lambda *values: (yield from take(*values)) or follows.set())
    done = tmp_path / "done"
    apply(server.store, make_job(f"until test -e {done}; do sleep 0.1; done", "long"))
    assert call("run long --detach", url=server.url)[0] == 0
    killer = threading.Thread(target=lambda: follows.wait(60) and server.stop(signal.SIGKILL))
    killer.start()
    status, _, err = call("logs long -f", url=server.url)
    killer.join()
    done.touch()
    assert status == 1 and err.endswith(
        "does a server run there, and does it listen beyond its own host (server: {host: …})?\n")


class Peer:
    """Listens, and treats each connection as a function of the socket does."""

    def __init__(self, treat, context=None):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.treat, self.context, self.requests = treat, context, []
        self.url = "http%s://127.0.0.1:%d" % ("s" if context else "", self.listener.getsockname()[1])
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.handle, args=(connection,), daemon=True).start()

    def handle(self, connection):
        with connection:
            try:
                if self.context:
                    connection = self.context.wrap_socket(connection, server_side=True)
                request = connection.recv(1 << 16)
                self.requests.append(request)
                self.treat(connection, request)
            except OSError:
                pass

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.thread.join()              # or else it could accept for who has the number next
        self.listener.close()


@pytest.fixture
def peer():
    peers = []

    def begin(treat, context=None):
        if isinstance(treat, bytes):
            answer, treat = treat, lambda connection, _: connection.sendall(answer)
        peers.append(Peer(treat, context))
        return peers[-1]
    yield begin
    for each in peers:
        each.close()


def http(status="200 OK", body=b"", **headers):
    headers = {"Content_Type": "application/json", "Content_Length": len(body), **headers}
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode() + body


def error(status, code, message):
    return http(status, json.dumps({"error": {"code": code, "message": message}}).encode())


def drip(connection, _):
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
    while True:
        connection.sendall(b"X: y\r\n")
        time.sleep(0.01)


def flood(connection, _):
    connection.sendall(http(Content_Length=1 << 40))
    while True:
        connection.sendall(b" " * (1 << 16))


STRANGE = [
    (http("302 Found", Location="https://evil.example.com/x"),
     "redirects to https://evil.example.com/x; the token does not go there by itself: write that"),
    (http(body=b"<html>", Content_Type="text/html"),
     "is no server of roexec: it sent text/html"),
    (http(body=b"[1]"), "is no server of roexec: it sent application/json"),
    (http(body=b"{" * 100_000), "is no server of roexec: it sent application/json"),
    (http(body=b"\xff\xfe{}"), "is no server of roexec"),
    (http("204 No Content"), "answers something else than expected (KeyError)"),
    (http(body=b"{}"), "answers something else than expected (KeyError)"),
    (http(body=b'{"jobs": [5], "next": null}'), "answers something else than expected (TypeError)"),
    (http(body=b'{"jobs": [{}], "next": null}'), "answers something else than expected (KeyError)"),
    (http("502 Bad Gateway", b"<html>", Content_Type="text/html"),
     "answers 502 Bad Gateway, and it is not roexec that says so"),
    (error("503 Service Unavailable", "unavailable", "the disk is full"), "the disk is full"),
    (error("400 Bad Request", "bad_request", "a\x1b[31m\nb"), "a\\x1b[31m\nroexec: b"),
    (error("404 Not Found", "not_found", roexec.NO_ROUTE),
     "does not know how to do this: the roexec there is of an unknown version, this one is "
     + roexec.__version__),
    (error("405 Method Not Allowed", "method_not_allowed", "…"), "does not know how to do this"),
    (http("404 Not Found", b'{"error": 5}'), "answers 404 Not Found, and it is not roexec"),
    (b"SSH-2.0-OpenSSH_9.6\r\n", "does not speak HTTP"),
    (b"", "has ended the connection without an answer; should it be https:// instead?"),
    (http(Content_Length=100, body=b"{"), "broke in the middle of an answer"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab", "broke in the middle"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "broke in the middle"),
    (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n", "broke in the middle"),
    (drip, "does not answer in time"),
    (flood, "is larger than 67.1 MB"),
]


@pytest.mark.parametrize("answer, told", STRANGE, ids=lambda value: str(value)[:30])
def test_an_answer_that_is_none_of_roexec_is_told_in_words(answer, told, call, peer, monkeypatch):
    monkeypatch.setattr(roexec, "_WHOLE_TIME", 0.5 if answer is drip else 30)
    there = peer(answer)
    status, out, err = call("list jobs --token t0ken", url=there.url)
    assert (status, out) == (1, "") and told in err and "Traceback" not in err
    assert "t0ken" not in err and b"Bearer t0ken" in wait_for(lambda: there.requests)[0]


def test_a_silent_server_is_given_up(call, peer, monkeypatch):
    monkeypatch.setattr(roexec, "_SILENCE_TIME", 0.2)
    there = peer(lambda connection, _: connection.recv(1))           # until it is given up
    assert call("list jobs", url=there.url)[2].endswith("does not answer in time\n")


def test_a_list_without_end_is_given_up(call, peer, monkeypatch):
    monkeypatch.setattr(roexec, "_MOST_ITEMS", 5)
    there = peer(http(body=b'{"runs": [{"id": "x"}], "next": "c"}', Connection="close"))
    assert call("cancel x", url=there.url)[2].endswith("lists more than 5 runs\n")


@pytest.fixture
def nobodys():
    """A port that somebody has who does not listen."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def test_what_does_not_listen_or_has_no_name_is_told(call, nobodys):
    url = f"http://127.0.0.1:{nobodys}"
    assert call("list jobs", url=url)[2] == (
        f"roexec: nothing listens on port {nobodys} of 127.0.0.1: does a server run there, and does "
        "it listen beyond its own host (server: {host: …})?\n")
    assert call("status", url=url)[0] == 3
    assert call("run hello", url=url)[0] == 125
    status, _, err = call("list jobs", url="http://nowhere.invalid")
    assert status == 1 and "the name nowhere.invalid of http://nowhere.invalid is not known" in err


def test_the_start_of_a_run_whose_answer_got_lost_is_asked_for_again_with_the_same_key(
        registered, call, peer, monkeypatch):
    monkeypatch.setattr(roexec, "_RETRY_PAUSE", 0.05)
    begun = len(read_runs(registered.store, job_id="tick"))

    def forward(connection, request):
        while b"\r\n\r\n" not in request or not request.endswith(b"}"):
            request += connection.recv(1 << 16)
        with socket.create_connection(("127.0.0.1", registered.port)) as server:
            server.sendall(request)
            answer = server.recv(1 << 16)
        if len(there.requests) > 2:
            connection.sendall(answer)
    there = peer(forward)
    text = token(registered.store, "lossy", role="operator")
    status, out, _ = call(f"run tick --detach --token {text}", url=there.url)
    assert (status, len(there.requests)) == (0, 3)
    runs = read_runs(registered.store, job_id="tick")[begun:]
    assert [run["id"] for run in runs] == [out.strip()]


def test_what_is_to_be_sent_once_is_sent_where_the_server_has_ended_the_kept_connection(peer):
    there = peer(http(body=b"{}"))      # which then closes it, without a word
    wire = roexec._Wire(there.url, None)
    for number in range(1, 4):
        assert wire.body(wire.request("POST", "/", b"{}")) == b"{}"
        assert len(there.requests) == number
        wait_for(lambda: roexec.has_ended(wire._kept))
    wire.close()


def test_a_piece_of_a_log_that_breaks_off_is_asked_for_again(peer, monkeypatch):
    monkeypatch.setattr(roexec, "_RETRY_PAUSE", 0.01)
    line, said = b"2025-08-01T10:00:00Z [OUT] hello\n", []
    whole = http(body=line, Content_Type="text/plain", Roexec_Next_Offset=len(line))
    there = peer(lambda connection, _: connection.sendall(
        whole[:-5] if len(there.requests) == 1 else whole))
    remote = roexec.Remote(there.url, None, said.append)
    log = roexec.GrowingLog(remote, "aaaa")
    assert (log.more(), log.offset) == ([line], len(line))
    remote.wire.close()
    assert "broke in the middle of an answer" in said[0]


def test_what_became_of_a_run_whose_log_is_over_is_asked_for_again(peer, monkeypatch):
    monkeypatch.setattr(roexec, "_RETRY_PAUSE", 0.01)
    run = http(body=b'{"state": "succeeded"}')
    answers = [http("204 No Content"), run[:-5], run]
    there = peer(lambda connection, _: connection.sendall(answers.pop(0)))
    remote = roexec.Remote(there.url, None, lambda text: None)
    following = roexec.Following(remote, "aaaa")
    assert list(following) == [] and following.outcome == {"state": "succeeded"}
    remote.wire.close()


# TLS.

@pytest.fixture
def secure(store, tmp_path, monkeypatch):
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem",
                    "-out", "cert.pem", "-days", "9", "-subj", "/CN=localhost", "-addext",
                    "subjectAltName=DNS:localhost"], cwd=tmp_path, check=True, capture_output=True)
    server = serve(store, [], tls={"cert": str(tmp_path / "cert.pem"),
                                   "key": str(tmp_path / "key.pem")})
    yield server.address[1]
    server.close()


def test_a_certificate_is_looked_at_and_an_authority_of_ones_own_can_be_named(
        secure, store, call, monkeypatch, tmp_path, peer):
    apply(store, make_job("true", "only"))
    url = f"https://localhost:{secure}"
    status, out, err = call("list jobs", url=url)
    assert (status, out) == (1, "") and "the certificate of localhost is not trusted: self" in err
    assert "SSL_CERT_FILE names the file of that" in err
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    assert call("list jobs", url=url)[1].splitlines()[1].startswith("only")
    status, _, err = call("list jobs", url=f"https://127.0.0.1:{secure}")
    assert status == 1 and "the certificate of 127.0.0.1 is not trusted: IP address mismatch" in err
    status, _, err = call("list jobs", url=f"http://localhost:{secure}")
    assert status == 1 and "should it be https:// instead?" in err
    plain = peer(http(body=b"{}")).url.replace("http:", "https:")
    status, _, err = call("list jobs", url=plain)
    assert status == 1 and "does not speak TLS on port" in err and "should it be http://" in err


def test_a_deadline_leaves_a_connection_encrypted(secure, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    connection = roexec._Wire(f"https://localhost:{secure}", None).connect()
    connection.request("GET", "/api/v1/health")
    wait_for(lambda: select.select([connection.sock], [], [], 0)[0])
    deadline = roexec._Deadline(connection)
    deadline.end(), deadline.cancel()
    assert connection.sock.recv(4) in (b"HTTP", b"")
    connection.close()


# A system that is not POSIX.

LIKE_WINDOWS = """
import os, signal, sys
for name in ("fcntl", "pwd", "grp", "resource", "termios"):
    sys.modules[name] = None
for name in ("getuid", "geteuid", "getgid", "fork", "mkfifo", "getpgrp", "setsid", "killpg"):
    delattr(os, name)
for name in ("SIGPIPE", "SIGKILL", "SIGHUP", "SIGCHLD", "pthread_sigmask"):
    delattr(signal, name)
sys.path.insert(0, sys.argv[1])
import roexec
sys.exit(roexec.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("line, status, expected", [
    ("list jobs", 0, "hello  -"), ("list runs", 0, "RUN"), ("show hello", 0, "job       hello"),
    ("apply -f jobs.yml --dry-run", 0, "hello: unchanged (dry run)"), ("run hello", 3, "hi"),
    ("logs hello -f", 0, "[OUT] hi"), ("next tick", 0, "05:00:00+0"), ("status", 0, "healthy"),
    ("export tick", 0, "- id: tick"), ("audit", 0, "WHEN")])
def test_a_server_is_asked_from_a_system_without_posix_too(line, status, expected, ran, call,
                                                           served):
    done = subprocess.run([sys.executable, "-c", LIKE_WINDOWS, os.path.dirname(roexec.__file__),
                           "--url", served.url, *shlex.split(line)], text=True,
                          capture_output=True, timeout=60)
    assert done.returncode == status, done.stderr
    assert expected in done.stdout
