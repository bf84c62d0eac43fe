"""Runs with secrets and notices, end to end: a real server, and what it speaks to on loopback."""
import ast
import base64
import email
import email.policy
import http.client
import json
import os
import signal
import subprocess
import time

import pytest
from helpers import (Server, Smtp, VaultServer, Web, apply, await_state, claimed, descendants,
                     end_of, hourly_schedule, in_child, make_job, output_of, perform, read_attempts,
                     read_log_of, read_run, read_runs, supervise, wait_for)

import roexec

pytestmark = pytest.mark.usefixtures("clean")      # of processes

SECRET = "pässw0rd-of-vault/1"
FROM_COMMAND, FROM_FILE, FROM_HOST = "value+of+a+command", "value of a file", "value-of-the-host"
HOUR = 3600


class Lines:
    """A file of literals, to which another process adds."""

    def __init__(self, path):
        self.path = path
        path.touch()

    def append(self, value):
        with open(self.path, "a") as file:
            file.write(repr(value) + "\n")

    def read(self):
        whole, _, _ = self.path.read_text().rpartition("\n")    # not what is just being written
        return [ast.literal_eval(line) for line in whole.splitlines()]


class Peer:
    """A server of helpers in a process of its own, since one with threads should not fork; `got()`
    is what it has been asked."""

    def __init__(self, make, attribute, path):
        self.lines, place = Lines(path), path.with_suffix(".port")

        def serve():
            server = make()
            setattr(server, attribute, self.lines)
            port = server.port if hasattr(server, "port") else server.server_address[1]
            place.with_suffix(".new").write_text(str(port))
            place.with_suffix(".new").rename(place)
            while True:
                signal.pause()
        in_child(serve)
        self.port = int(wait_for(lambda: place.exists() and place.read_text()))
        self.got = self.lines.read

    def url(self, path="/"):
        return f"http://127.0.0.1:{self.port}{path}"

    def paths(self):
        return [path for path, *_ in self.got()]


@pytest.fixture
def web(tmp_path):
    return Peer(Web, "requests", tmp_path / "web")


@pytest.fixture
def start(store, tmp_path):
    """`start()` starts a server of the store with its postman and its HTTP."""
    def started(prepare=None, **options):
        def prepare_all(scheduler):
            def settings():
                with scheduler.store.read() as db:
                    return roexec.get_settings(db) or {}
            scheduler.postman = roexec.start_postman(scheduler.store, settings, scheduler.say)
            address = roexec.start_http(scheduler.store, "127.0.0.1", 0, scheduler.say).address
            scheduler.say(f"port={address[1]}.")
            if prepare is not None:
                prepare(scheduler)
        return Server(store, tmp_path / "said", prepare=prepare_all, **options)
    return started


def ask(store, job, **more):
    return roexec.request_run(store, job, **{"trigger": "manual", **more})


def outbox(store):
    with store.read() as db:
        return [dict(row) for row in db.execute("SELECT * FROM outbox ORDER BY id")]


def api(server, path):
    connection = http.client.HTTPConnection("127.0.0.1", int(
        server.said.partition("port=")[2].partition(".")[0]), timeout=60)
    connection.request("GET", "/api/v1" + path)
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    assert answer.status == 200, data
    return data


# Secrets.

FORMS = [form for value in (SECRET, FROM_COMMAND, FROM_FILE, FROM_HOST)
         for form in (value.encode(), base64.b64encode(value.encode()).rstrip(b"="),
                      json.dumps(value)[1:-1].encode())]


def shows(data):
    """The forms of secrets in bytes."""
    return [form for form in FORMS if form in data]


def shown_in_files(folder):
    found, count = [], 0
    for parent, _, names in os.walk(folder):
        for name in set(names) - {"wake"}:          # a FIFO
            with open(os.path.join(parent, name), "rb") as file:
                count += 1
                found += [(name, form) for form in shows(file.read())]
    assert count > 2
    return found


def shown_in_command_lines():
    found = []
    for pid in descendants():
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                found += shows(file.read())
        except OSError:
            pass
    return found


def secret_job(tmp_path, **more):
    """A job that prints what it has got in many ways, and fails at its first attempt."""
    (tmp_path / "variables").write_text(f"FROM_FILE='{FROM_FILE}'\n")
    (tmp_path / "variables").chmod(0o600)
    (tmp_path / "printer").write_text(f"FROM_COMMAND={FROM_COMMAND}\nTINY=t1ny-\n")
    return make_job(
        "printf '%s\\n' \"$SECRET|$FROM_FILE|$FROM_COMMAND|$TEST_FROM_HOST\"; "
        "printf %s \"$SECRET\" | base64 >&2; half=${SECRET%-*}; printf 'begun %s' \"$half\"; "
        "sleep 0.3; printf '%s ended\\n' \"${SECRET#$half}\"; printf %s \"$SECRET\" | cksum; "
        f"touch {tmp_path}/printed; while test $ROEXEC_ATTEMPT = 2 && ! test -e {tmp_path}/go; "
        "do sleep 0.02; done; printf %s \"$SECRET\"; exit 3",
        env_from=[{"secret": "vault://secret/data/x#password", "as": "SECRET"},
                  {"file": str(tmp_path / "variables")}, {"host": ["TEST_FROM_HOST"]},
                  {"command": f"cat {tmp_path}/printer; cat {tmp_path}/printer >&2"}],
        retries=1, backoff=0.05, **more)


def make_vault():
    vault = VaultServer()
    vault.secrets["secret/data/x"] = {"password": SECRET}
    return vault


@pytest.fixture
def vault(tmp_path):
    peer = Peer(make_vault, "requests", tmp_path / "vault")
    (tmp_path / "token").write_text("t0k3n-of-vault\n")
    (tmp_path / "token").chmod(0o600)
    peer.spec = {"address": peer.url(""), "token_file": str(tmp_path / "token")}
    return peer


def test_a_secret_is_in_the_command_and_nowhere_else(store, start, tmp_path, web, vault,
                                                      monkeypatch):
    monkeypatch.setenv("TEST_FROM_HOST", FROM_HOST)
    smtp = Peer(Smtp, "mails", tmp_path / "smtp")
    server = start(settings={"vault": vault.spec, "mail": {
        "host": "localhost", "port": smtp.port, "tls": "none", "from": "roexec@example.com"}})
    job = secret_job(tmp_path, hooks={
        "pre_run": 'echo "pre $SECRET"', "on_retry": [{"webhook": web.url("/retry")}],
        "on_failure": [f"cat > {tmp_path}/stdin", {"mail": "ops@example.com"},
                       {"webhook": web.url("/hook")}, {"ping": web.url("/ping")}],
        "post_run": 'echo "post $SECRET"'})
    apply(store, job)
    run_id = ask(store, job)
    wait_for(lambda: (tmp_path / "printed").exists() and "/retry" in web.paths())
    wait_for(lambda: api(server, f"/runs/{run_id}/logs").count(b"*** ended") == 2)
    assert shown_in_files(store.folder) == [] and shown_in_command_lines() == []
    (tmp_path / "go").touch()
    run = await_state(store, run_id, "failed")
    wait_for(lambda: len(web.got()) == 3 and smtp.got(), what=lambda: web.got())
    log = read_log_of(store, run_id, raw=True)
    out = read_log_of(store, run_id, stream="out")
    assert out.count("***|***|***|***\n") == 2 and out.count("begun *** ended\n") == 2
    assert "pre ***\n" in log and "post ***\n" in log
    check = subprocess.run(["cksum"], input=SECRET.encode(), check=True,
                           capture_output=True).stdout.decode()
    assert log.count(check) == 2                    # the command has had the value itself
    answers = [api(server, path) for path in (
        "/jobs", "/jobs/x", "/runs", f"/runs/{run_id}", f"/runs/{run_id}/logs")]
    for text in (*answers, (tmp_path / "stdin").read_bytes(), server.said.encode(),
                 str(web.got()).encode(), smtp.lines.path.read_bytes()):
        assert shows(text) == []
    mail = email.message_from_bytes(smtp.got()[0][2], policy=email.policy.SMTP).get_content()
    assert "*** ended" in mail and shows(mail.encode()) == []
    server.stop()
    assert shown_in_files(store.folder) == []
    assert "t1ny-" not in log and run["message"] is None
    assert [path for _, path, *_ in vault.got()] == ["/v1/secret/data/x"]       # once in a run


def test_a_secret_is_masked_on_the_console_too(store, tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_FROM_HOST", FROM_HOST)
    job = make_job("printf %s \"${TEST_FROM_HOST%-*}\"; sleep 0.2; "
                   "printf '%s\\n' \"${TEST_FROM_HOST#value-of-the}\"; "
                   "echo \"$TEST_FROM_HOST\" >&2; exit 4", env_from={"host": ["TEST_FROM_HOST"]})
    apply(store, job)

    def run():
        for number in (1, 2):
            os.dup2(os.open(tmp_path / f"console{number}", os.O_WRONLY | os.O_CREAT), number)
        return roexec.run_here(store, job)
    assert end_of(in_child(run)) == 4
    assert (tmp_path / "console1").read_text() == "***\n"
    assert (tmp_path / "console2").read_text() == "***\n"
    assert shown_in_files(store.folder) == []


def test_a_secret_in_what_goes_wrong_is_masked(store, tmp_path):
    (tmp_path / "variables").write_text("PATH=/the/secret/folder\nHOME=/a/secret/home\n")
    for more in ({"command": ["no-such-program"]}, {"directory": "~", "command": "true"}):
        run = perform(store, env_from={"file": str(tmp_path / "variables")}, **more)
        assert (run["state"], run["reason"]) == ("failed", "start")
        assert "***" in run["message"] and "secret" not in run["message"]
        assert "secret" not in read_log_of(store, run["id"])


@pytest.mark.parametrize("source, message", [
    ({"file": "/nowhere/variables"}, "the file /nowhere/variables of env_from does not exist"),
    ({"host": ["TEST_NOT_SET"]}, "the server's environment has no TEST_NOT_SET"),
    ({"command": "echo value-of-nobody; exit 3"}, "env_from: the command failed, exit=3"),
    ({"command": ["no-such-program"]}, "the command failed, cannot start no-such-program"),
    ({"command": "kill -9 $$"}, "env_from: the command failed, signal=SIGKILL"),
    ({"command": "echo value-of-nobody"}, "the command of env_from:1: this is no NAME=VALUE line"),
    ({"command": "yes A=1 | head -c 2000000"}, "the command of env_from holds more than 1.0 MB"),
    ({"secret": "vault://secret/data/x"}, "the configuration has no vault:"),
])
def test_a_source_that_fails_fails_the_run_before_anything_has_begun(store, tmp_path, source,
                                                                      message):
    run = perform(store, f"touch {tmp_path}/ran", env_from=source, retries=3,
                  condition=f"touch {tmp_path}/ran", hooks={
                      "pre_run": f"touch {tmp_path}/ran", "on_failure": f"echo $ROEXEC_REASON >> "
                      f"{tmp_path}/told", "post_run": f"echo after >> {tmp_path}/told"})
    assert (run["state"], run["reason"]) == ("failed", "secret")
    assert message in run["message"] and run["message"] in read_log_of(store, run["id"])
    assert not (tmp_path / "ran").exists() and read_attempts(store, run["id"]) == []
    assert (tmp_path / "told").read_text() == "secret\nafter\n"
    assert roexec.exit_status(run) == 125


def test_a_run_is_cancelled_while_it_waits_for_a_secret(store, start, tmp_path):
    server, job = start(), make_job(f"touch {tmp_path}/ran", env_from={
        "command": f"touch {tmp_path}/asked; sleep 600"})
    apply(store, job)
    run_id = ask(store, job)
    wait_for(lambda: (tmp_path / "asked").exists())
    roexec.cancel_run(store, run_id)
    run = await_state(store, run_id, *roexec.FINAL_STATES)
    assert (run["state"], run["reason"]) == ("cancelled", "user")
    assert not (tmp_path / "ran").exists()
    server.stop()


def test_after_the_loss_of_a_supervisor_between_attempts_secrets_are_got_again(
        store, start, tmp_path, monkeypatch):
    (tmp_path / "printer").write_text(f"VALUE={FROM_COMMAND}\n")
    pause, killed = roexec.Supervision._pause, tmp_path / "killed"
    monkeypatch.setattr(roexec.Supervision, "_pause", lambda self, seconds: wait_for(killed.exists)
                        and pause(self, seconds))
    server, job = start(), make_job(
        "echo \"$VALUE\"; exit $((2 - ROEXEC_ATTEMPT))", retries=1, backoff=0.8,
        env_from={"command": f"echo asked >> {tmp_path}/asked; cat {tmp_path}/printer"},
        hooks={"on_retry": f"echo retry >> {tmp_path}/asked"})
    apply(store, job)
    run_id = ask(store, job)
    journal = wait_for(lambda: [found for found in [roexec.Journal.glance(
        store.file(f"active/{run_id}"))] if found and roexec.Progress(found.events).retry])[0]
    os.kill(roexec.Progress(journal.events).supervisor["pid"], signal.SIGKILL)
    killed.touch()
    assert await_state(store, run_id, *roexec.FINAL_STATES)["state"] == "succeeded"
    assert (tmp_path / "asked").read_text() == "asked\nretry\nasked\n"
    assert read_log_of(store, run_id, raw=True) == "***\n***\n"
    assert shown_in_files(store.folder) == []
    server.stop()


def recovered(store, job, *events):
    """The row of a run that was lost after these events, once it is recovered."""
    journal = claimed(store, job)
    journal.note("supervisor", pid=1, start=0, log=None)
    for what, *values in events:
        journal.note("starting", what=what)
        if values:
            journal.note("started", pid=1 << 22, start=0)
            journal.note("ended", **values[0])
    journal.close()
    return supervise(store, roexec.Journal.find(journal.path))


def test_a_source_that_was_asked_counts_as_nothing_begun(store, tmp_path):
    job = make_job("echo \"$VALUE\"", env_from={"command": "echo VALUE=plain"},
                   hooks={"pre_run": "echo pre"})
    for events in ([("env_from",)], [("env_from", {"exit_code": 0})]):
        run = recovered(store, job, *events)
        assert run["state"] == "succeeded" and output_of(store, run) == "pre\nplain\n"


def test_a_source_that_is_asked_again_does_not_take_the_place_of_the_hooks(store, tmp_path):
    job = make_job("echo again", retries=1, backoff=0.01, env_from={"command": "echo VALUE=plain"},
                   hooks={"on_retry": "echo retry"})
    first = [("env_from", {"exit_code": 0}), ("attempt", {"exit_code": 3})]
    run = recovered(store, job, *first)
    assert run["state"] == "succeeded" and output_of(store, run) == "retry\nagain\n"
    run = recovered(store, job, *first, ("env_from",))
    assert run["state"] == "succeeded" and output_of(store, run) == "retry\nagain\n"


def test_a_lost_attempt_is_not_made_again_without_its_secrets(store, tmp_path):
    job = make_job(f"touch {tmp_path}/ran", if_lost="rerun", backoff=0.01,
                   env_from={"command": "exit 1"})
    run = recovered(store, job, ("env_from", {"exit_code": 0}), ("attempt",))
    assert (run["state"], run["reason"]) == ("lost", "supervisor")
    assert not (tmp_path / "ran").exists()


# Notices.

def test_a_monitor_is_told_of_the_start_while_the_run_is_on_and_of_its_end(store, start, web,
                                                                            tmp_path):
    server = start()
    for code, end in ((0, "/x"), (7, "/x/7")):
        job = make_job(f"while ! test -e {tmp_path}/go{code}; do sleep 0.02; done; exit {code}",
                       hooks={name: {"ping": web.url("/x")}
                              for name in ("pre_run", "on_success", "on_failure")})
        apply(store, job)
        run_id = ask(store, job)
        wait_for(lambda: web.paths()[-1:] == ["/x/start"])
        assert read_run(store, run_id)["state"] == "running"
        (tmp_path / f"go{code}").touch()
        wait_for(lambda: web.paths()[-1:] == [end], what=web.paths)
    assert web.paths() == ["/x/start", "/x", "/x/start", "/x/7"]
    server.stop()


def test_a_notice_between_attempts_comes_between_them(store, start, web, tmp_path):
    server, job = start(), make_job(
        f"test $ROEXEC_ATTEMPT = 2 && while ! test -e {tmp_path}/go; do sleep 0.02; done",
        retries=1, backoff=0.01, hooks={"on_retry": {"webhook": web.url()}, "on_success": [
            {"webhook": web.url("/skipped"), "condition": "false"}, {"webhook": web.url("/end")}]})
    apply(store, job)
    run_id = ask(store, job)
    body = json.loads(wait_for(web.got)[0][2])
    assert body["event"] == "on_retry" and body["run"]["state"] == "running"
    assert [attempt["exit_code"] for attempt in body["run"]["attempts"]][:1] == [1]
    (tmp_path / "go").touch()
    await_state(store, run_id, "succeeded")
    wait_for(lambda: len(web.got()) == 2)
    assert web.paths() == ["/", "/end"]
    server.stop()


@pytest.mark.parametrize("how", ["foreground", "background", "beside a server"])
def test_notices_of_a_run_that_no_server_looks_after_come_at_once_too(how, store, start, web,
                                                                      tmp_path):
    server = start() if how == "beside a server" else None
    job = make_job(f"test $ROEXEC_ATTEMPT = 2 && while ! test -e {tmp_path}/go; do sleep 0.02; "
                   "done", retries=1, backoff=0.01, hooks={
                       "pre_run": [{"ping": web.url("/p")}, {"ping": "http://192.0.2.1/away"}],
                       "on_retry": {"webhook": web.url("/retry")},
                       "on_success": {"ping": web.url("/p")}})
    apply(store, job)
    pid = None if how == "background" else in_child(lambda: roexec.run_here(store, job))
    if how == "background":
        roexec.run_detached(store, job)
    wait_for(lambda: {"/p/start", "/retry"} <= set(web.paths()), what=web.paths)
    run, = read_runs(store)
    assert run["state"] == "running"
    (tmp_path / "go").touch()
    assert await_state(store, run["id"], "succeeded") and (pid is None or end_of(pid) == 0)
    wait_for(lambda: web.paths()[-1] == "/p", what=web.paths)
    assert sorted(web.paths()) == ["/p", "/p/start", "/retry"]
    if server is not None:
        server.stop()


def test_notices_of_the_end_are_not_posted_before_it_is_taken_in(store, web):
    """A run may have asked for them by the time at which somebody looks for the others."""
    job = make_job(hooks={name: {"ping": web.url("/p")} for name in ("pre_run", "on_success")})
    apply(store, job)
    journal = claimed(store, job)
    for name in ("pre_run", "on_success"):
        journal.note("notice", hook=name, index=0)
    for _ in range(2):
        with store.write() as db:
            roexec.post_live_notices(db, store, journal.run_id)
    assert len(outbox(store)) == 1
    journal.note("outcome", state="succeeded", reason=None)
    journal.note("finished", log=None)
    with store.write() as db:
        roexec.take_in(db, journal)
    journal.close()
    assert len(outbox(store)) == 2
    roexec.deliver(store, {}, time.time())
    assert web.paths() == ["/p"], "what is true no more is not sent"


def test_the_process_for_notices_is_none_of_a_run(store, web, tmp_path):
    """It is neither killed nor counted, and holds no lock: the run ends as lost when killed."""
    job = make_job("sleep 600", timeout=0.3, grace=0.1, leftovers="kill",
                   hooks={"pre_run": {"ping": "http://192.0.2.1/away"}})
    apply(store, job)
    assert end_of(in_child(lambda: roexec.run_here(store, job))) == 124
    run, = read_runs(store)
    killed = [line for line in read_log_of(store, run["id"]).splitlines() if "Killed" in line]
    assert len(killed) == 1 and killed[0].endswith(("Killed 1 process", "Killed 2 processes"))
    pid = in_child(lambda: roexec.run_here(store, roexec.Job({**job.spec, "timeout": "1h"})))
    run = wait_for(lambda: read_runs(store, state="running"))[0]
    wait_for(lambda: roexec.Progress(
        roexec.Journal.glance(store.file(f"active/{run['id']}")).events).attempts)
    os.kill(pid, signal.SIGKILL)
    end_of(pid)
    wait_for(lambda: not roexec.lock_is_held(store.file(f"active/{run['id']}")))
    roexec.settle(store, wait=True)
    assert read_run(store, run["id"])["state"] == "lost"


def test_a_host_that_is_away_delays_and_fails_nothing(store, start, web, monkeypatch):
    monkeypatch.setattr(roexec, "_HTTP_DEADLINE", 600)
    server, job = start(), make_job("exit 0", hooks={
        "pre_run": {"ping": "http://192.0.2.1/x"}, "on_success": [
            {"webhook": "http://127.0.0.1:9/"}, {"webhook": "http://no-such-host.invalid/"}]})
    apply(store, job)
    began = time.monotonic()
    for _ in range(3):
        await_state(store, ask(store, job), "succeeded")
    assert time.monotonic() - began < 300
    assert {row["state"] for row in outbox(store)} <= {"waiting", "merged", "superseded"}
    assert len(outbox(store)) >= 9
    server.stop()


def test_a_notice_is_sent_once_though_a_server_dies_between_commit_and_clean_up(store, start, web):
    def prepare(scheduler):
        def die(journals):
            if journals:
                os.kill(os.getpid(), signal.SIGKILL)
        roexec.discard = die
        scheduler.postman.wake = lambda: None
    job = make_job("true", hooks={"pre_run": {"webhook": web.url("/start")}, "on_success": [
        {"webhook": web.url("/first")}, {"webhook": web.url("/first")}, {"run": "y"}]})
    apply(store, job, make_job("true", "y"))
    server = start(prepare)
    ask(store, job)
    assert end_of(server.pid) == -signal.SIGKILL
    assert len(os.listdir(store.file("active"))) >= 1 and len(outbox(store)) == 3
    server = start()
    wait_for(lambda: len(web.got()) == 3)
    wait_for(lambda: read_runs(store, job_id="y", state="succeeded"))
    wait_for(lambda: not os.listdir(store.file("active")))
    assert sorted(web.paths()) == ["/first", "/first", "/start"]
    assert len(read_runs(store)) == 2
    server.stop()


def test_a_journal_that_is_taken_in_again_adds_nothing(store, web):
    job = make_job("true", hooks={"on_success": [{"webhook": web.url()}, {"run": "x"}]})
    apply(store, job)
    journal = claimed(store, job)
    signals = roexec.Signals()
    roexec.Supervision(journal, store.folder, signals).perform()
    signals.close()
    for _ in range(3):
        with store.write() as db:
            roexec.post_notices(db, journal)
            roexec.take_in(db, journal)
            roexec.post_notices(db, journal)
    journal.close()
    assert len(outbox(store)) == 1 and len(read_runs(store)) == 2


def test_without_a_server_the_command_that_took_the_end_in_sends_it(store, web):
    job = make_job("echo text; exit 3", hooks={"pre_run": {"ping": web.url("/p")}, "on_failure": [
        {"ping": web.url("/p")}, {"webhook": web.url("/hook")}]})
    apply(store, job)
    with open(os.devnull, "w") as null:
        def run():
            os.dup2(null.fileno(), 1)
            return roexec.run_here(store, job)
        assert end_of(in_child(run)) == 3
    wait_for(lambda: len(web.got()) >= 2)
    wait_for(lambda: {row["state"] for row in outbox(store)} <= {"sent", "superseded"})
    assert sorted(set(web.paths()) - {"/p/start"}) == ["/hook", "/p/3"]     # if it was in time


def test_where_no_server_has_been_the_settings_of_the_command_count(store, tmp_path, vault):
    smtp = Peer(Smtp, "mails", tmp_path / "smtp")
    job = make_job(f"test \"$SECRET\" = '{SECRET}'", hooks={"on_success": {"mail": "a@b.example"}},
                   env_from={"secret": "vault://secret/data/x#password", "as": "SECRET"})
    apply(store, job)
    settings = {"vault": vault.spec, "mail": {"host": "localhost", "port": smtp.port, "tls": "none",
                                              "from": "roexec@example.com"}}
    assert end_of(in_child(lambda: roexec.run_here(store, job, settings=settings))) == 0
    wait_for(smtp.got)


def test_without_a_server_a_loss_is_told_by_whoever_finds_it(store, web, tmp_path):
    job = make_job(f"touch {tmp_path}/on; sleep 600",
                   hooks={"on_failure": {"webhook": web.url("/lost")}})
    apply(store, job)
    run_id = roexec.run_detached(store, job)
    wait_for(lambda: (tmp_path / "on").exists())
    journal = roexec.Journal.glance(store.file(f"active/{run_id}"))
    os.kill(roexec.Progress(journal.events).supervisor["pid"], signal.SIGKILL)
    wait_for(lambda: roexec.settle(store, wait=True)
             or read_run(store, run_id)["state"] == "lost")
    wait_for(web.got)
    assert json.loads(web.got()[0][2])["reason"] == "supervisor"


# Runs that hooks start.

def chain(store):
    return [(row["job_id"], row["trigger"], row["state"], row["reason"]) for row in
            read_runs(store)]


def test_a_hook_starts_another_job_which_starts_a_third(store, start):
    jobs = [make_job("true", "a", hooks={"on_success": {"run": "b"}}),
            make_job("exit 1", "b", hooks={"on_failure": {"run": "c"}, "on_success": {"run": "a"}}),
            make_job("true", "c")]
    apply(store, *jobs)
    server = start()
    ask(store, jobs[0])
    wait_for(lambda: read_runs(store, job_id="c", state="succeeded"), what=lambda: chain(store))
    assert chain(store) == [("a", "manual", "succeeded", None), ("b", "pipeline", "failed", "exit"),
                            ("c", "pipeline", "succeeded", None)]
    rows = read_runs(store)
    assert [row["cause"] for row in rows[1:]] == [f"{row['id']}/0" for row in rows[:2]]
    server.stop()


def test_a_job_that_starts_itself_ends_after_twenty_more_runs(store, start):
    job = make_job("true", hooks={"post_run": {"run": "x"}})
    apply(store, job)
    server = start()
    ask(store, job)
    last, = wait_for(lambda: read_runs(store, state="failed"), what=lambda: chain(store))
    assert (last["reason"], last["message"]) == ("start", "a chain of 20 runs ends here")
    assert [row["state"] for row in read_runs(store)] == ["succeeded"] * 21 + ["failed"]
    server.stop()


def test_a_run_that_a_hook_cannot_start_leaves_a_row_that_says_why(store, start, tmp_path):
    busy = [make_job(f"touch {tmp_path}/{name}; sleep 600", name, overlap=name, grace=1)
            for name in ("skip", "queue", "replace")]
    job = make_job("true", hooks={"post_run": [{"run": name} for name in (
        "nowhere", "skip", "queue", "replace")]})
    apply(store, job, *busy)
    server = start()
    ids = {other.id: ask(store, other) for other in busy}
    wait_for(lambda: all((tmp_path / name).exists() for name in ids))
    cause = ask(store, job)
    await_state(store, cause, "succeeded")
    rows = {row["job_id"]: row for row in read_runs(store) if row["cause"]}
    assert set(rows) == {"nowhere", *ids}
    assert (rows["nowhere"]["state"], rows["nowhere"]["reason"]) == ("failed", "start")
    assert '"nowhere"' in rows["nowhere"]["message"]
    assert (rows["skip"]["state"], rows["skip"]["reason"]) == ("skipped", "overlap")
    assert rows["skip"]["message"] == f"run {ids['skip']} was running"
    assert read_run(store, rows["queue"]["id"])["state"] == "queued"
    assert await_state(store, ids["replace"], "cancelled")["reason"] == "replaced"
    await_state(store, rows["replace"]["id"], "running")
    server.stop()


# Missed slots.

def test_missed_slots_are_told_and_start_a_job_once(store, start, web, tmp_path):
    schedule, slot = hourly_schedule()
    job = make_job("true", schedule=schedule, catch_up="none", env_from={"command": "echo A=b"},
                   hooks={"on_missed": [{"webhook": web.url()}, {"run": "y"},
                                        f"echo \"$A $ROEXEC_REASON\" >> {tmp_path}/told"]})
    apply(store, job, since=slot - 3 * HOUR - 1)
    apply(store, make_job("true", "y"))

    def prepare(scheduler):
        def die(journals):
            if journals:
                os.kill(os.getpid(), signal.SIGKILL)
        roexec.discard = die
    assert end_of(start(prepare, wait=False).pid) == -signal.SIGKILL
    server = start()
    wait_for(lambda: (tmp_path / "told").exists() and web.got())
    wait_for(lambda: read_runs(store, job_id="y", state="succeeded"))
    wait_for(lambda: not os.listdir(store.file("active")))
    body, = [json.loads(data) for _, _, data in web.got()]
    missed, = read_runs(store, job_id="x", reason="missed")
    assert body["event"] == "on_missed" and body["run"]["id"] == missed["id"]
    assert missed["log"] and len(outbox(store)) == 1 and len(read_runs(store, job_id="y")) == 1
    assert (tmp_path / "told").read_text() == "b missed\n"
    server.stop()


# What output says of success, and backoff.

@pytest.mark.parametrize("command, more, state, reason, attempts", [
    ("echo all done", {"success": {"output": "done$"}}, "succeeded", None, 1),
    ("echo all done >&2", {"success": {"output": "^all"}}, "succeeded", None, 1),
    ("echo done; exit 1", {"success": {"output": "done"}}, "failed", "exit", 1),
    ("echo not yet", {"success": {"output": "done"}}, "failed", "output", 1),
    ("printf done", {"success": {"output": "^done$"}}, "succeeded", None, 1),
    ("printf 'copying '; sleep 0.3; echo done", {"success": {"output": "^copying done$"}},
     "succeeded", None, 1),
    ("printf 'copying '; echo other >&2; echo done", {"success": {"output": "^copying done$"}},
     "succeeded", None, 1),
    ("echo ERROR: none", {"success": {"no_output": "ERROR"}}, "failed", "output", 1),
    ("echo fine", {"success": {"no_output": "ERROR"}}, "succeeded", None, 1),
    ("true", {"success": {"no_output": "Attempt|Running"}}, "succeeded", None, 1),
    ("echo ERROR done", {"success": {"output": "done", "no_output": "ERROR"}}, "failed", "output",
     1),
    ("test $ROEXEC_ATTEMPT = 1 && echo ERROR; exit 0",
     {"success": {"no_output": "ERROR"}, "retries": 2}, "succeeded", None, 2),
    ("test $ROEXEC_ATTEMPT = 1 && echo try again; exit 1",
     {"retries": 5, "retry_on": {"output": "try again"}}, "failed", "exit", 2),
    ("exit 3", {"retries": 5, "retry_on": {"output": "try again"}}, "failed", "exit", 1),
    ("exit 3", {"retries": 2, "retry_on": {"output": "x", "exit_codes": [3]}}, "failed", "exit", 3),
])
def test_the_output_decides_where_the_job_says_so(store, command, more, state, reason, attempts):
    run = perform(store, command, backoff=0.01, **more)
    assert (run["state"], run["reason"]) == (state, reason)
    assert len(read_attempts(store, run["id"])) == attempts
    assert (run["exit_code"] == 0) == (reason in (None, "output"))


@pytest.mark.parametrize("ended, more, state, reason", [
    ({"exit_code": 0, "matched": ["success.output"]}, {"success": {"output": "x"}}, "succeeded",
     None),
    ({"exit_code": 0, "matched": ["success.no_output"]}, {"success": {"no_output": "x"}}, "failed",
     "output"),
    ({"signal": "SIGKILL", "memory": True}, {}, "failed", "memory"),
])
def test_what_was_seen_of_an_attempt_outlives_its_supervisor(store, ended, more, state, reason):
    run = recovered(store, make_job("true", **more), ("attempt", ended))
    assert (run["state"], run["reason"]) == (state, reason)


def test_what_was_seen_of_an_attempt_is_in_the_journal(store):
    journal = claimed(store, make_job("echo x", success={"output": "x"}))
    run = supervise(store, journal)
    ended = next(event for event in journal.events if event["event"] == "ended")
    assert run["state"] == "succeeded" and ended["matched"] == ["success.output"]


@pytest.mark.parametrize("chance", [b"\0", b"\x80", b"\xff"])
def test_a_backoff_differs_by_its_jitter(store, monkeypatch, chance):
    urandom = os.urandom
    monkeypatch.setattr(os, "urandom", lambda size: chance * size if size == 4 else urandom(size))
    real, delays = roexec.retry_delay, []
    monkeypatch.setattr(roexec, "retry_delay",
                        lambda *values: delays.append(real(*values)) or delays[-1])
    run = perform(store, "exit 1", retries=1, backoff={"delay": 0.1, "jitter": 0.5})
    first, second = read_attempts(store, run["id"])
    wanted = 0.1 * (0.5 + int.from_bytes(chance * 4, "big") / 2**32)
    assert delays == [pytest.approx(wanted), None]
    assert second["started_at"] - first["finished_at"] > wanted - 0.002
