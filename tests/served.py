"""A server of a store with some jobs, and what one asks it: the fixtures of the tests of HTTP."""
import contextlib
import http.client
import json
import os
import shutil
import socket
import urllib.parse

import pytest

from helpers import serve

import roexec
from roexec import Caller, Store

NOW = 1754042400.0          # 2025-08-01T10:00:00Z
LOG = (b"2025-08-01T10:00:00Z [INFO] Starting run\n2025-08-01T10:00:00Z [OUT] one\n"
       b"2025-08-01T10:00:01Z [ERR] two\n2025-08-01T10:00:01Z [OUT~] three\n")
JOBS = [{"id": "hello", "schedule": "0 2 * * *", "command": "echo hello"},
        {"id": "backup", "command": "echo backup", "overlap": "queue", "env": {"A": "b"}},
        {"id": "replaced", "command": "echo x", "overlap": "replace"}]

OWNER = Caller(name="user me", scopes=("*",), owner=True)
GOOD = b"GET / HTTP/1.1\r\nHost: localhost"        # the head of a request

needs_tables = pytest.mark.skipif(not os.path.exists("/proc/net/tcp"),
                                  reason="this host has no table of sockets in /proc")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become other users")


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """The database of a store with the jobs."""
    store = Store(str(tmp_path_factory.mktemp("api") / "store")).create()
    jobs = [roexec.job_from_mapping(job, "/") for job in JOBS]
    with store.write() as db:
        roexec.perform_apply(db, roexec.plan_apply(db, {"/jobs.yml": jobs}), NOW)
    return store.database


@pytest.fixture
def store(tmp_path, monkeypatch, database):
    """A store with the jobs, in UTC."""
    monkeypatch.setenv("TZ", "UTC")
    (tmp_path / "store").mkdir(0o700)
    shutil.copy(database, tmp_path / "store")
    return Store(str(tmp_path / "store")).create()


@pytest.fixture
def said():
    """What the server has told."""
    return []


@pytest.fixture
def server(store, said, monkeypatch):
    """A server of that store on a free port of 127.0.0.1; nothing may go wrong in it unseen. It
    listens to clients that it has refused until they go, however long they take to send."""
    monkeypatch.setattr(roexec, "_LINGER_TIME", 60)
    server = serve(store, said)
    yield server
    server.close()
    assert not said


@pytest.fixture
def connection(server):
    with contextlib.closing(http.client.HTTPConnection(*server.address, timeout=60)) as connection:
        yield connection


@pytest.fixture
def ask(connection):
    """`ask(path)` -> (status, payload or bytes, headers)."""
    def ask(path, method="GET", body=None, **headers):
        headers = {name.replace("_", "-"): text for name, text in headers.items()}
        connection.request(method, f"/api/v1{path}", body, headers)
        response = connection.getresponse()
        content = response.read()
        if content and response.headers["Content-Type"] == "application/json":
            content = json.loads(content)
        return response.status, content, response.headers
    return ask


@pytest.fixture
def error(ask):
    """`error(path)` -> (status, code, message)."""
    def error(*arguments, **options):
        status, payload, _ = ask(*arguments, **options)
        return status, payload["error"]["code"], payload["error"]["message"]
    return error


def record(store, job_id="hello", state="succeeded", *, at=NOW, **values):
    """Put a run into the store -> its id."""
    row = {"id": roexec.new_run_id(), "job_id": job_id, "trigger": "manual", "queued_at": at,
           "version": 1, "state": state, "started_at": None if state == "queued" else at,
           "finished_at": at + 1 if state in roexec.FINAL_STATES else None, **values}
    with store.write() as db:
        return roexec.add_run(db, **row)


def row_of(store, run_id):
    with store.read() as db:
        return roexec.get_run(db, run_id)


@pytest.fixture
def become(monkeypatch):
    """`become(scopes, pattern)`: who asks from now on is that caller."""
    def become(*scopes, pattern=None):
        caller = Caller(name="token t", scopes=scopes, pattern=pattern)
        monkeypatch.setattr(roexec, "gate", lambda *_, **__: caller)
    return become


def pages(ask, path, name):
    """The ids of each page of a list, by its cursors."""
    cursor = ""
    for _ in range(10):
        payload = ask(path + cursor)[1]
        yield [item["id"] for item in payload[name]]
        if payload["next"] is None:
            return
        cursor = "&cursor=" + urllib.parse.quote(payload["next"])


def write_log(store, name, content):
    path = store.file(f"logs/hello/{name}")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "ab") as file:
        file.write(content)
    return f"logs/hello/{name}"


def logged(store, content=LOG):
    """A run that ended, with a log."""
    return record(store, log=write_log(store, f"{roexec.new_run_id()}.log", content))


def running(store):
    """A run that is on, with a log -> its id and its journal."""
    run_id = record(store, state="running")
    journal = roexec.Journal.create(store.file("active"), {"run": run_id})
    journal.note("supervisor", pid=1, start=1, log=write_log(store, "live.log", LOG))
    return run_id, journal


def head(*lines, host="localhost"):
    """The bytes of a request without a body."""
    return "\r\n".join([lines[0], f"Host: {host}", *lines[1:], "", ""]).encode()


def dial(server):
    return socket.create_connection(server.address, timeout=60)


@contextlib.contextmanager
def connected(family=socket.AF_INET, host="127.0.0.1", to=None, source=None):
    """(client, accepted, listener): the ends of a connection, and the socket that listens."""
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        listener.listen()
        port = listener.getsockname()[1]
        with socket.create_connection((to or host, port), source_address=source) as client:
            accepted, _ = listener.accept()
            with accepted:
                yield client, accepted, listener


def has_ipv6():
    try:
        with connected(socket.AF_INET6, "::1"):
            return True
    except OSError:
        return False
