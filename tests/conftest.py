"""What holds for all tests, and the fixtures that several files use."""
import io
import os
import shlex
import signal
import sys
import types

import engines
import pytest
from helpers import Answers, Server, kill_descendants

import roexec

# A shell starts what it runs in the background with SIGINT ignored (POSIX, "Asynchronous Lists"),
# and so would be each command that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)


@pytest.fixture
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
def marks(tmp_path):
    """A file to which commands add lines; `marks()` are its lines."""
    path = tmp_path / "marks"
    path.touch()

    def lines():
        return path.read_text().splitlines()
    lines.path = path
    return lines


@pytest.fixture
def surroundings(tmp_path, monkeypatch):
    """A home of its own, no settings from outside, and a folder for live servers of its own."""
    for name in list(os.environ):
        if name.startswith(("ROEXEC_", "XDG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setattr(roexec, "servers_folder", lambda: str(tmp_path / "servers"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def cli(store, surroundings, capfd, monkeypatch):
    """`cli("list jobs", ...)` -> (exit status, standard output, standard error)."""
    def call(line, *more, store=store.path, stdin=None):
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        capfd.readouterr()
        chosen = ["--store", store] if store else []
        status = roexec.main([*chosen, *shlex.split(line), *more])
        return (status, *capfd.readouterr())
    return call


@pytest.fixture(scope="module")         # some tests look after all descendants of this process
def s3_server(tmp_path_factory):
    """A real server of S3 with an empty bucket."""
    server = engines.start_s3(str(tmp_path_factory.mktemp("s3")))
    yield server
    server.close()


@pytest.fixture
def bucket(s3_server):
    """`bucket(**settings)` is a client of the server's bucket, by default below a prefix of its own
    that stays the same in a test."""
    clients, prefix = [], roexec.new_run_id()

    def client(timeout=30, access=None, secret=None, **settings):
        credentials = roexec.S3Credentials({
            "AWS_ACCESS_KEY_ID": access or s3_server.access,
            "AWS_SECRET_ACCESS_KEY": secret or s3_server.secret}, "/nonexistent")
        clients.append(roexec.S3Client(types.SimpleNamespace(**{
            "bucket": s3_server.bucket, "prefix": prefix, "endpoint": s3_server.endpoint,
            "region": s3_server.region, **settings}), credentials, timeout))
        return clients[-1]
    yield client
    for each in clients:
        each.close()


@pytest.fixture
def answers():
    """A server whose answers a test writes: Answers."""
    server = Answers()
    yield server
    server.close()
