"""The sockets of HTTP: TLS, places for the owner, and how little a client can do to the server."""
import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import ssl
import statistics
import struct
import subprocess
import threading
import time

import pytest

from helpers import basic, serve, status_of, token, wait_for
from served import (GOOD, LOG, NOW, OWNER, ask, connection, database, dial, error,  # noqa: F401
                    has_ipv6, head, logged, needs_root, needs_tables, running, said, server, store)

import roexec
from roexec import Request, RoexecError, json_response, start_http


@pytest.fixture
def run_server(store, said):
    """`run_server(**settings)` -> a server of the store; it ends with the test."""
    with contextlib.ExitStack() as stack:
        def run(host="127.0.0.1", **settings):
            server = serve(store, said, host, **settings)
            stack.callback(server.close)
            return server
        yield run


# TLS.

@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """`certificates(name)` -> {cert, key}: paths of a certificate for localhost of that name."""
    if not shutil.which("openssl"):
        assert "CI" not in os.environ, "there is no openssl here"
        pytest.skip("there is no openssl here")
    folder = tmp_path_factory.mktemp("certificates")

    def make(name):
        paths = {"cert": str(folder / f"{name}.crt"), "key": str(folder / f"{name}.key")}
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
                        "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj",
                        f"/CN={name}", "-addext", "subjectAltName=DNS:localhost", "-out",
                        paths["cert"], "-keyout", paths["key"]], check=True, capture_output=True)
        return paths
    return make


def over_tls(server, certificate, path="/api/v1/health", **headers):
    """(status, body) of an answer to a client that trusts this certificate alone."""
    context = ssl.create_default_context(cafile=certificate)
    with contextlib.closing(http.client.HTTPSConnection(
            "localhost", server.address[1], timeout=60, context=context)) as connection:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read()


def test_tls_is_spoken_with_files_that_are_read_again_when_they_change(run_server, certificates,
                                                                       store, said):
    first, second = certificates("first"), certificates("second")
    server = run_server(tls=first, auth={"owner": False})
    given = {"Authorization": basic("ci", token(store, role="viewer"))}
    assert over_tls(server, first["cert"], "/api/v1/jobs", **given)[0] == 200
    assert over_tls(server, first["cert"], "/api/v1/jobs")[0] == 401
    for name in ("cert", "key"):
        shutil.copy(second[name], first[name] + ".new")
        os.replace(first[name] + ".new", first[name])
    assert over_tls(server, second["cert"])[0] == 200
    assert said == [f"TLS uses {first['cert']} as it is now"]
    with open(first["key"], "w") as file:
        file.write("broken")
    assert over_tls(server, second["cert"])[0] == over_tls(server, second["cert"])[0] == 200
    assert "cannot be used" in said[1] and said[1].endswith("; the one before is used")
    assert len(said) == 2


def test_a_client_without_tls_gets_nothing_and_is_no_error(run_server, certificates, said):
    server = run_server(tls=certificates("plain"))
    with socket.create_connection(server.address, timeout=60) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert not client.makefile("rb").read().startswith(b"HTTP")
    with socket.create_connection(server.address) as client:
        client.shutdown(socket.SHUT_RDWR)
    wait_for(lambda: not server.connections)
    assert not said


def test_a_handshake_that_takes_for_ever_holds_up_nobody_else(run_server, certificates,
                                                              monkeypatch):
    paths = certificates("slow")
    server = run_server(tls=paths)
    with socket.create_connection(server.address):
        wait_for(lambda: server.connections)
        assert over_tls(server, paths["cert"])[0] == 200
    wait_for(lambda: not server.connections)
    monkeypatch.setattr(roexec, "_HEAD_TIME", 0.3)
    with socket.create_connection(server.address, timeout=60) as client:
        assert client.recv(1) == b"", "it is let go"


@needs_tables
def test_over_tls_too_the_owner_is_let_in_and_a_log_followed(run_server, certificates, store):
    paths, run_id = certificates("owner"), roexec.new_run_id()
    server = run_server(tls=paths)
    assert over_tls(server, paths["cert"], "/api/v1/jobs")[0] == 200
    with store.write() as db:
        roexec.add_run(db, id=run_id, job_id="x", trigger="manual", queued_at=0, state="queued")
        roexec.change_run(db, run_id, "running")
    journal = roexec.Journal.create(store.file("active"), {"run": run_id})
    os.makedirs(store.file("logs/x"))
    with open(store.file("logs/x/1.log"), "w") as file:
        file.write("2025-08-01T10:00:00Z [OUT] one\n")
    journal.note("supervisor", pid=1, start=1, log="logs/x/1.log")

    def finish():
        with store.write() as db:
            roexec.finish_run(db, run_id, "succeeded", [], log="logs/x/1.log", finished_at=1)
    timer = threading.Timer(0.3, finish)
    timer.start()
    found = over_tls(server, paths["cert"], f"/api/v1/runs/{run_id}/logs?follow=1&raw=1")
    assert found == (200, b"one\n")
    timer.join()
    journal.close()


@needs_tables
def test_a_large_log_is_followed_over_tls_at_the_pace_of_its_reader(run_server, certificates,
                                                                    store):
    paths, run_id = certificates("large"), roexec.new_run_id()
    server = run_server(tls=paths)
    os.makedirs(store.file("logs/x"))
    content = b"".join(b"2025-08-01T10:00:00Z [OUT] line %d\n" % number for number in range(900_000))
    with open(store.file("logs/x/1.log"), "wb") as file:
        file.write(content)
    with store.write() as db:
        roexec.add_run(db, id=run_id, job_id="x", trigger="manual", queued_at=0, finished_at=1,
                       state="succeeded", log="logs/x/1.log")
    context = ssl.create_default_context(cafile=paths["cert"])
    with contextlib.closing(http.client.HTTPSConnection(
            "localhost", server.address[1], timeout=60, context=context)) as connection:
        connection.request("GET", f"/api/v1/runs/{run_id}/logs?follow=1")
        response = connection.getresponse()
        stream = wait_for(lambda: next(iter(server.streams.all.values()), None))
        wait_for(lambda: time.monotonic() > stream.taken_at + 0.2)
        assert response.read() == content


@pytest.mark.parametrize("content", [None, "", "x", "-----BEGIN CERTIFICATE-----\n"])
def test_files_that_are_no_certificates_stop_the_server_at_its_start(content, store, tmp_path):
    path = tmp_path / "x.pem"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RoexecError, match=f"^server.tls: {path} and {path} cannot be used: "):
        serve(store, tls={"cert": str(path), "key": str(path)})


def test_a_key_with_a_password_is_refused_and_not_asked_for(store, certificates):
    paths = certificates("locked")
    subprocess.run(["openssl", "ec", "-aes128", "-passout", "pass:secret", "-in", paths["key"],
                    "-out", paths["key"]], check=True, capture_output=True)
    with pytest.raises(RoexecError, match="^server.tls: .* cannot be used: "):
        serve(store, tls=paths)


# Tokens.

def test_a_token_is_void_from_the_moment_on_at_which_it_is_revoked_or_expires(run_server, store,
                                                                              monkeypatch):
    server, me = run_server(auth={"owner": False}), roexec.Caller(name="user me")
    for name, end in (("a", lambda db: roexec.remove_token(db, "a", me, 0)),
                      ("b", lambda db: roexec.renew_token(db, "b", me, 0)),
                      ("c", lambda db: db.execute("UPDATE tokens SET expires_at = 5"))):
        given = {"Authorization": f"Bearer {token(store, name, role='viewer')}"}
        for _ in range(3):
            assert status_of(server, "GET", "/api/v1/jobs", **given) == 200
        with store.write() as db:
            end(db)
        assert status_of(server, "GET", "/api/v1/jobs", **given) == 401
    given = {"Authorization": f"Bearer {token(store, 'd', role='viewer', expires='1h')}"}
    assert status_of(server, "GET", "/api/v1/jobs", **given) == 200
    now = time.time
    monkeypatch.setattr(roexec.time, "time", lambda: now() + 3600)
    assert status_of(server, "GET", "/api/v1/jobs", **given) == 401


def test_an_answer_for_one_caller_is_not_given_to_another(run_server, store):
    with store.write() as db:
        jobs = [roexec.Job({"id": name, "command": "x", "env": {"A": "b"}, "tags": ["of-two"]})
                for name in ("a", "b")]
        roexec.perform_apply(db, roexec.plan_apply(db, {None: jobs}), 0)
    server = run_server(auth={"owner": False})
    texts = {name: token(store, name, scopes=scopes, jobs=pattern) for name, scopes, pattern in (
        ("admin", ["*"], None), ("viewer", ["job:read"], None), ("one", ["job:read"], "b"))}

    def listed(name):
        with contextlib.closing(http.client.HTTPConnection(*server.address)) as connection:
            connection.request("GET", "/api/v1/jobs?tag=of-two",
                               headers={"Authorization": f"Bearer {texts[name]}"})
            return [(job["id"], job["spec"]["env"]["A"])
                    for job in json.loads(connection.getresponse().read())["jobs"]]
    for _ in range(2):
        assert listed("admin") == [("a", "b"), ("b", "b")]
        assert listed("viewer") == [("a", None), ("b", None)]
        assert listed("one") == [("b", None)]


# Users of this host.

def status_for(server, uid):
    """The status of an answer to a process of another user."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            os.write(writer, b"%d" % status_of(server, "GET", "/api/v1/jobs"))
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    with open(reader) as answer:
        return int(answer.read())


@needs_tables
@needs_root
def test_local_users_that_are_named_are_let_in_and_no_others(run_server, monkeypatch):
    server = run_server(auth={"local_users": ["daemon"]})
    daemon, other = roexec.pwd.getpwnam("daemon").pw_uid, roexec.pwd.getpwnam("bin").pw_uid
    assert [status_for(server, uid) for uid in (daemon, other, 0)] == [200, 401, 200]
    server.admit(roexec.read_config("server: {auth: {local_users: bin}}", "c", "/").server)
    assert [status_for(server, uid) for uid in (daemon, other, 0)] == [401, 200, 200]
    server.admit(roexec.read_config("server: {auth: {owner: false}}", "c", "/").server)
    assert [status_for(server, uid) for uid in (daemon, other, 0)] == [401, 401, 401]


def test_a_user_that_is_not_there_is_told(store, run_server):
    with pytest.raises(RoexecError, match='^server.auth.local_users: there is no user "nobodyx"'):
        serve(store, auth={"local_users": "nobodyx"})
    server = run_server(auth={"owner": False})
    before = server.access
    with pytest.raises(RoexecError):
        server.admit(roexec.read_config("server: {auth: {local_users: nobodyx}}", "c", "/").server)
    assert server.access is before


# The first token.

def test_a_server_that_others_can_reach_and_has_no_token_leaves_one(store, run_server, said):
    server = run_server("0.0.0.0", auth={"owner": False})
    path = store.file("admin-token")

    def tell(text, level="INFO"):
        said.append((text, level))
    roexec.prepare_access(store, server, tell)
    assert os.stat(path).st_mode & 0o777 == 0o600
    with open(path) as file:
        text = file.read().strip()
    assert said == [("Tokens travel unencrypted, unless a proxy in front speaks TLS; write server: "
                     "{tls: {cert: …, key: …}}", "WARNING"),
                    (f"There was no token yet; one for an administrator is in {path}", "INFO")]
    assert status_of(server, "GET", "/api/v1/tokens", Authorization=f"Bearer {text}") == 200
    with store.read() as db:
        row, = roexec.list_audit(db, 10)
    assert (row["who"], row["action"], row["target"]) == ("server", "token create", "admin")
    os.unlink(path)
    roexec.prepare_access(store, server, tell)
    assert not os.path.exists(path) and text not in str(said)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_a_server_of_this_host_alone_leaves_none(host, store, said):
    try:
        server = serve(store, said, host)
    except RoexecError:
        pytest.skip("this host has no IPv6")
    roexec.prepare_access(store, server, said.append)
    server.close()
    assert not said and not os.path.exists(store.file("admin-token"))


def test_a_link_in_the_place_of_the_first_token_is_not_followed(store, run_server, tmp_path, said):
    os.symlink(tmp_path / "elsewhere", store.file("admin-token"))
    with pytest.raises(OSError):
        roexec.prepare_access(store, run_server("0.0.0.0"), lambda *_: None)
    assert not (tmp_path / "elsewhere").exists()
    with store.read() as db:
        assert not roexec.list_tokens(db)


# Places.

@contextlib.contextmanager
def dialled(server, count):
    """So many connections that say nothing."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(socket.create_connection(server.address, timeout=60))
        yield


@needs_tables
def test_the_last_places_are_for_the_owner(run_server, monkeypatch):
    monkeypatch.setattr(roexec, "_MOST_CONNECTIONS", 6)
    monkeypatch.setattr(roexec, "_FOR_THE_OWNER", 2)
    server = run_server()
    with dialled(server, 4):
        wait_for(lambda: len(server.connections) == 4)
        assert status_of(server, "GET", "/api/v1/jobs") == 200
        with monkeypatch.context() as patch:
            patch.setattr(roexec, "peer_uid", lambda connection: None)
            assert status_of(server, "GET", "/api/v1/health") == 503
        monkeypatch.setattr(roexec, "_MOST_CONNECTIONS", 4)
        assert status_of(server, "GET", "/api/v1/jobs") == 503
    monkeypatch.setattr(roexec, "peer_uid", lambda connection: None)
    wait_for(lambda: not server.connections)
    assert status_of(server, "GET", "/api/v1/health") == 200


def test_one_peer_elsewhere_gets_some_places_only(run_server, monkeypatch):
    monkeypatch.setattr(roexec, "_OF_ONE_PEER", 2)
    server, address = run_server(), ["10.0.0.1", 1]
    peers = {"10.0.0.1": True, "10.0.0.2": False, "::ffff:10.0.0.1": True, "2001:db8::1": False}
    monkeypatch.setattr(roexec, "_peer", lambda _, of=roexec._peer: of(address))
    with dialled(server, 2):
        wait_for(lambda: len(server.connections) == 2)
        for other, full in peers.items():
            address[0] = other
            assert (status_of(server, "GET", "/api/v1/health") == 503) is full


@pytest.mark.parametrize("one, other, same", [
    ("10.0.0.1", "10.0.0.1", True), ("10.0.0.1", "10.0.0.2", False),
    ("10.0.0.1", "::ffff:10.0.0.1", True), ("2001:db8::1", "2001:db8::2", True),
    ("2001:db8::1", "2001:db8:0:1::1", False), ("fe80::1%lo", "fe80::2", True)])
def test_a_network_of_ipv6_is_one_peer(one, other, same):
    assert (roexec._peer((one, 1)) == roexec._peer((other, 2))) is same
    assert roexec._peer((one, 1)) is not None


def test_this_host_is_nobody_in_particular():
    assert [roexec._peer((host, 1)) for host in ("127.0.0.1", "127.9.9.9", "::1",
                                                 "::ffff:127.0.0.1")] == [None] * 4


# Clients that mean no good.

HOST = b"Host: localhost\r\n"
ABUSE = [
    b"", b"G", b"GET / HTTP/1.1\r\n", b"GET /api/v1/jobs HTTP/1.1\r\n" + HOST,
    b"POST /api/v1/jobs/x/run HTTP/1.1\r\n" + HOST + b"Content-Length: 1000\r\n\r\n{",
    b"GET / HTTP/1.1\r\n" + HOST + b"A: " + b"x" * 15_000,
    b"GET / HTTP/1.1\r\n" + HOST + b"A: " + b"x" * 100_000,
    b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
    b"\r\nGET /api/v1/jobs HTTP/1.1\r\n" + HOST + b"\r\n",
    b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    b"GET /api/v1/jobs HTTP/1.1\r\n" + HOST + b"Authorization: Bearer x\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500, b"\r\n" * 9000,
    b"GET /api/v1/jobs HTTP/1.1\r\n" + HOST + b"Via: x\r\n\r\n" * 500]


@needs_tables
def test_whatever_others_do_the_owner_is_answered_in_time(run_server, said, monkeypatch):
    for name in ("_HEAD_TIME", "_IDLE_TIME"):       # none of them goes by itself meanwhile
        monkeypatch.setattr(roexec, name, 60)
    server = run_server()

    def took():
        """The median time of an answer to the owner, in seconds."""
        times = []
        for _ in range(11):
            began = time.perf_counter()
            assert status_of(server, "GET", "/api/v1/jobs") == 200
            times.append(time.perf_counter() - began)
        return statistics.median(times)
    alone = took()
    with contextlib.ExitStack() as stack:
        clients = []
        for piece in ABUSE * 20:
            client = stack.enter_context(socket.create_connection(server.address, timeout=60))
            client.settimeout(5)
            clients.append(client)
            with contextlib.suppress(OSError):
                client.sendall(piece)
        assert took() < max(1, 10 * alone)
        assert len(server.connections) >= 5 * 20        # those that have not said all
        for client in clients[::2]:                     # and half of them go with a reset
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()
        assert took() < max(1, 10 * alone)
    wait_for(lambda: not server.connections)
    assert not said


def test_nothing_that_is_smuggled_behind_a_request_is_answered(run_server):
    server = run_server()
    for piece in ABUSE:
        with socket.create_connection(server.address, timeout=60) as client:
            with contextlib.suppress(OSError):
                client.sendall(piece)
                client.shutdown(socket.SHUT_WR)
            answer = b""
            with contextlib.suppress(ConnectionError):
                answer = client.makefile("rb").read()
        statuses = [line.split()[1] for line in answer.split(b"\r\n")
                    if line.startswith(b"HTTP/1.1 ")]
        assert not {b"200", b"202"} & set(statuses), (piece, answer)


def test_an_answer_names_no_route_and_no_job_to_a_stranger(run_server):
    server = run_server(auth={"owner": False})
    found = set()
    for method, path in (("GET", "/api/v1/jobs/x"), ("GET", "/nowhere"), ("BREW", "/api/v1/jobs"),
                         ("POST", "/api/v1/tokens"), ("OPTIONS", "/api/v1/jobs")):
        with contextlib.closing(http.client.HTTPConnection(*server.address)) as connection:
            connection.request(method, path)
            found.add(json.dumps(json.loads(connection.getresponse().read())))
    assert len(found) == 1


# Parameters, headers and bodies at random, over the whole table.

VALUES = ["a", "hello", "%2e", "", "0", "-1", "1e9", "9" * 18, "true", "%00", "%ff", "a%2Fb",
          "latest", "x" * 300, "%C3%A4", "2025-01-01", "2025-13-01", "30d", "1", "failed", "final"]
PARAMETERS = ["limit", "cursor", "state", "job", "tag", "since", "until", "offset", "tail", "raw",
              "stream", "dry_run", "prune", "source", "steps", "brief", "ids", "count", "from",
              "to", "jobs", "trigger", "each", "duration", "at", "parent"]
ITEMS = ["a", "hello", "", None, 1, -1, 1e308, True, [], {}, {"A": "b"}, ["x"], {"A": 1}, "30d",
         "2025-01-01", {"command": "true"}, "* * * * *", 10 ** 30, "\ud800", "viewer", ["run:list"]]
KEYS = ["env", "name", "scopes", "role", "jobs", "expires", "for", "until", "id", "command",
        "schedule", "job", "files", "params", "steps", "timeout", "hooks"]
FIELDS = {"If-Match": "*", "If-None-Match": 'W/"1-x"', "Idempotency-Key": "k", "Range": "bytes=0-1",
          "Accept-Encoding": "gzip", "Last-Event-ID": "-1", "Content-Type": "text/plain"}


def random_request(chance):
    """(method, path, body, headers) of a request that may be meant, or not at all."""
    route = chance.choice([route for route in roexec.ROUTES if not route.path.endswith("events")])
    path = route.path
    while "{}" in path:
        path = path.replace("{}", chance.choice([value for value in VALUES if value]), 1)
    path += "?" + "&".join(f"{chance.choice(PARAMETERS)}={chance.choice(VALUES)}"
                           for _ in range(chance.randrange(3)))
    method, body = route.method, None
    if chance.random() < 0.1:
        method = chance.choice(["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "BREW"])
    if method not in ("GET", "HEAD"):
        body = json.dumps({chance.choice(KEYS): chance.choice(ITEMS)
                           for _ in range(chance.randrange(4))}).encode()
        body = chance.choice([body] * 4 + [b"", b"\xff{", b"[1]", b"a: b"])
    return method, path, body, {name: text for name, text in FIELDS.items()
                                if chance.random() < 0.05}


@pytest.mark.parametrize("spec", [{"role": "admin"}, {"scopes": ["*"], "jobs": "h*"}])
def test_no_request_finds_a_defect(spec, run_server, store, said):
    with store.write() as db:
        jobs = [roexec.Job({"id": name, "command": "x", "schedule": "0 * * * *"})
                for name in ("hello", "a")]
        for source, jobs in (("/jobs.yml", []), (None, jobs)):
            roexec.perform_apply(db, roexec.plan_apply(db, {source: jobs}, prune=True), 0)
    server, chance = run_server(), random.Random(repr(spec))
    bearer = {"Authorization": f"Bearer {token(store, 'fuzz', **spec)}"}
    statuses = set()
    with contextlib.closing(http.client.HTTPConnection(*server.address, timeout=60)) as connection:
        for _ in range(20_000 if os.environ.get("ROEXEC_LONG") else 1000):
            method, path, body, headers = random_request(chance)
            connection.request(method, path, body, {**headers, **bearer})
            answer = connection.getresponse()
            content = answer.read()
            assert answer.status < 500 and not said, (method, path, body, content, said)
            statuses.add(answer.status)
    assert {200, 204, 400, 404, 405} <= statuses and 401 not in statuses


# Requests, byte for byte.

def exchange(server, *pieces):
    """What the server answers to these bytes until it closes the connection."""
    with dial(server) as client:
        for piece in pieces:
            client.sendall(piece)
        return client.makefile("rb").read()


@needs_tables
def test_requests_that_come_at_once_are_answered_in_order(server):
    answers = exchange(server, head("GET /api/v1/jobs/hello HTTP/1.1")
                       + head("POST /api/v1/jobs/hello/run HTTP/1.1", "Content-Length: 2") + b"{}"
                       + head("GET /nowhere HTTP/1.1")
                       + head("GET /api/v1/health HTTP/1.1", "Connection: close"))
    assert [line.split()[1] for line in answers.splitlines() if line.startswith(b"HTTP/1.1")] == [
        b"200", b"202", b"404", b"200"]
    assert answers.count(b"Connection: close") == 1


@needs_tables
def test_a_request_that_comes_byte_by_byte_is_read(server):
    request = head("POST /api/v1/jobs/hello/run HTTP/1.1", "Content-Length: 2",
                   "Connection: close") + b"{}"
    answer = exchange(server, *(request[index:index + 1] for index in range(len(request))))
    assert answer.startswith(b"HTTP/1.1 202 ")


def test_an_answer_is_sent_at_once_and_in_one_piece(server):
    with dial(server) as client:
        for _ in range(3):
            client.sendall(head("GET /api/v1/health HTTP/1.1"))
            assert client.recv(10_000).endswith(b'{"status": "ok"}\n')
        served, = server.connections
        assert served.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_head_with_bare_line_feeds_is_not_waited_for(server):
    assert exchange(server, b"GET / HTTP/1.1\nHost: a\n\n").startswith(b"HTTP/1.1 400 ")


@needs_tables
def test_a_client_of_http_1_0_is_answered_and_the_connection_closed(server, store):
    answer = exchange(server, b"GET /api/v1/runs/%b/logs HTTP/1.0\r\nHost: localhost\r\n\r\n"
                      % logged(store).encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    assert body == LOG and b"chunked" not in head and b"Connection: close" in head
    assert exchange(server, b"GET /api/v1/health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    assert exchange(server, b"GET /api/v1/jobs HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 421 ")


@pytest.mark.parametrize("request_, status", [
    (b"GET / HTTP/1.1\r\n\r\n", 400), (b"\r\n\r\n", 400), (b"GET / HTTP/1.1\nHost: a\n\n", 400),
    (GOOD + b"\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
    (GOOD + b"\r\nContent-Length: 9999999\r\n\r\n" + b"x" * 100_000, 413),
    (GOOD + b"\r\nA: " + b"x" * 20_000 + b"\r\n\r\n", 431), (b"x" * 20_000, 431),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\n\n", 400)])
def test_after_a_request_that_is_broken_nothing_more_is_read(request_, status, server):
    answer = exchange(server, request_, head("GET /api/v1/health HTTP/1.1"))
    assert answer.startswith(b"HTTP/1.1 %d " % status) and answer.count(b"HTTP/1.1 ") == 1
    assert b"Connection: close" in answer
    assert set(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]) == {"code", "message"}


@needs_tables
def test_the_body_of_a_stranger_is_not_read_but_the_answer_arrives(server):
    answer = exchange(server, head("POST /api/v1/jobs/hello/run HTTP/1.1", "Via: x",
                                   "Content-Length: 1000000") + b"x" * 1_000_000)
    assert answer.startswith(b"HTTP/1.1 401 ") and b"Connection: close" in answer


@needs_tables
def test_a_client_that_was_refused_is_not_reset_where_the_server_was_held_up(server, monkeypatch):
    monkeypatch.setattr(roexec, "_LINGER_TIME", -3)
    sent, linger = threading.Event(), roexec._Connection.linger

    def late(connection):
        assert sent.wait(60)
        linger(connection)
    monkeypatch.setattr(roexec._Connection, "linger", late)
    with dial(server) as client:
        client.sendall(head("POST /api/v1/jobs/hello/run HTTP/1.1", "Via: x",
                            "Content-Length: 1000000"))
        answer = client.recv(10_000)
        client.sendall(b"x" * 50_000)
        sent.set()
        wait_for(lambda: not server.connections)
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0, "it was not reset"
    assert answer.startswith(b"HTTP/1.1 401 ")


@needs_tables
def test_a_client_that_asks_first_is_told_to_go_on_or_not(server):
    for more, expected in (((), b"HTTP/1.1 100 Continue\r\n\r\n"),
                           (("Via: x",), b"HTTP/1.1 401 Unauthorized\r\n")):
        with dial(server) as client:
            client.sendall(head("POST /api/v1/jobs/backup/run HTTP/1.1", "Content-Length: 2",
                                "Expect: 100-continue", *more))
            assert client.recv(len(expected), socket.MSG_WAITALL) == expected
            if not more:
                client.sendall(b"{}")
                assert client.recv(13, socket.MSG_WAITALL) == b"HTTP/1.1 202 "
    with dial(server) as client:
        client.sendall(head("POST /api/v1/jobs/backup/run HTTP/1.1", "Content-Length: 2"))
        client.settimeout(0.1)
        with pytest.raises(socket.timeout):     # nobody asked
            client.recv(1)
    answer = exchange(server, head("POST /api/v1/jobs/backup/run HTTP/1.1", "Expect: more",
                                   "Content-Length: 2"))
    assert answer.startswith(b"HTTP/1.1 417 ")


@needs_tables
def test_the_largest_body_is_read(ask, error):
    env = {"A": "x" * ((1 << 20) - 18)}
    body = json.dumps({"env": env}).encode()
    assert len(body) <= 1 << 20
    assert ask("/jobs/backup/run", "POST", body)[0] == 202
    assert error("/jobs/backup/run", "POST", body + b" " * 100)[:2] == (413, "body_too_large")


# Limits.

@pytest.mark.parametrize("pieces", [[], [b"GET / HTTP/1.1\r\n"]])
def test_a_client_that_says_nothing_is_let_go(pieces, server, monkeypatch):
    monkeypatch.setattr(roexec, "_HEAD_TIME" if pieces else "_IDLE_TIME", 0.05)
    answer = exchange(server, *pieces)
    assert answer.startswith(b"HTTP/1.1 408 ") if pieces else answer == b""


def test_a_client_that_sends_its_head_for_ever_is_let_go(server, monkeypatch):
    monkeypatch.setattr(roexec, "_HEAD_TIME", 0.2)
    began, answer = time.monotonic(), b""
    with dial(server) as client:
        client.settimeout(0.01)
        while not answer and time.monotonic() - began < 60:
            with contextlib.suppress(socket.timeout):
                client.sendall(b"G")
                answer = client.recv(13)
    assert answer == b"HTTP/1.1 408 "


@needs_tables
def test_a_client_that_sends_its_body_for_ever_is_let_go(server, monkeypatch):
    monkeypatch.setattr(roexec, "_IDLE_TIME", 0.2)
    with dial(server) as client:
        client.sendall(head("POST /api/v1/jobs/hello/run HTTP/1.1", "Content-Length: 1000"))
        client.settimeout(0.01)
        deadline = time.monotonic() + 60
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < deadline:
                with contextlib.suppress(socket.timeout):
                    client.sendall(b" ")
                    if not client.recv(1):
                        break
        assert time.monotonic() < deadline


@needs_tables
def test_a_client_that_does_not_read_is_let_go(server, store, monkeypatch):
    run_id = logged(store, b"2025-08-01T10:00:00Z [OUT] x\n" * 600_000)
    with dial(server) as client:
        wait_for(lambda: server.connections)
        monkeypatch.setattr(roexec, "_IDLE_TIME", 0.2)
        client.sendall(head(f"GET /api/v1/runs/{run_id}/logs HTTP/1.1"))
        wait_for(lambda: not server.connections)


def test_no_more_than_so_many_connections_are_open(server, monkeypatch):
    monkeypatch.setattr(roexec, "_MOST_CONNECTIONS", 2)
    with dial(server), dial(server):
        wait_for(lambda: len(server.connections) == 2)
        assert exchange(server).startswith(b"HTTP/1.1 503 ")
    wait_for(lambda: not server.connections)
    assert exchange(server, head("GET /api/v1/health HTTP/1.0")).startswith(b"HTTP/1.1 200 ")


@needs_tables
def test_a_client_that_goes_in_the_middle_of_a_request_is_no_error(server):
    for request in (b"GET / HT", head("POST /api/v1/jobs/hello/run HTTP/1.1",
                                      "Content-Length: 10") + b"{"):
        with dial(server) as client:
            client.sendall(request)
        with dial(server) as client:
            client.sendall(request)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_for(lambda: not server.connections)


# The server.

@needs_tables
def test_a_defect_is_an_error_for_one_request_and_told(server, ask, said, monkeypatch):
    monkeypatch.setattr(roexec, "job_payloads", lambda *_: 1 / 0)
    status, payload, _ = ask("/jobs")
    assert (status, payload["error"]["code"]) == (500, "internal")
    assert "ZeroDivisionError" not in str(payload)
    assert "GET /api/v1/jobs failed: Traceback" in said[0] and "ZeroDivisionError" in said.pop()
    assert ask("/runs")[0] == 200


@needs_tables
def test_a_store_that_fails_is_told_in_words(ask, store):
    os.rename(store.database, store.database + ".away")
    status, payload, _ = ask("/jobs")
    assert (status, payload["error"]["code"]) == (503, "unavailable")
    assert "there is no store in" in payload["error"]["message"]


@needs_tables
def test_a_stream_that_fails_in_the_middle_has_no_proper_end(connection, store, said):
    run_id, journal = running(store)
    connection.request("GET", f"/api/v1/runs/{run_id}/logs?follow=1")
    response = connection.getresponse()
    assert response.read1(10_000) == LOG
    with store.write() as db:
        db.execute("DELETE FROM runs")
    with pytest.raises(http.client.IncompleteRead):
        response.read()
    assert said.pop() == f'/api/v1/runs/{run_id}/logs ends early: there is no run "{run_id}"'
    journal.close()


@needs_tables
def test_closing_ends_idle_connections_and_followers_and_frees_the_port(store, monkeypatch):
    monkeypatch.setattr(roexec, "_CLOSING_TIME", 60)
    server = start_http(store, "127.0.0.1", 0, print)
    run_id, journal = running(store)
    with dial(server) as idle, dial(server) as follower:
        follower.sendall(head(f"GET /api/v1/runs/{run_id}/logs?follow=1 HTTP/1.1"))
        received = follower.recv(100)
        began = time.monotonic()
        server.close()
        assert time.monotonic() - began < 30 and not server.connections
        assert idle.recv(1) == b""
        received += follower.makefile("rb").read()
        assert received.startswith(b"HTTP/1.1 200 ") and not received.endswith(b"0\r\n\r\n")
        again = start_http(store, *server.address, print)
        again.close()
    journal.close()


@needs_tables
@pytest.mark.parametrize("secure", [False, True])
def test_a_request_that_is_being_answered_is_answered_before_the_end(secure, store, said,
                                                                     certificates, monkeypatch):
    monkeypatch.setattr(roexec, "_CLOSING_TIME", 60)
    begun, go_on = threading.Event(), threading.Event()

    def slowly(*_):
        begun.set()
        assert go_on.wait(60)
        return []
    monkeypatch.setattr(roexec, "job_payloads", slowly)
    paths = certificates("ending") if secure else None
    server = serve(store, said, tls=paths)
    with dial(server) as client:
        if secure:                      # and is not in clear now
            client = ssl.create_default_context(cafile=paths["cert"]).wrap_socket(
                client, server_hostname="localhost")
        client.sendall(head("GET /api/v1/jobs HTTP/1.1"))
        assert begun.wait(60)
        closer = threading.Thread(target=server.close)
        closer.start()
        wait_for(lambda: server.socket.fileno() == -1)
        go_on.set()
        with client, http.client.HTTPResponse(client) as answer:
            answer.begin()
            assert answer.status == 200 and json.loads(answer.read())["jobs"] == []
        closer.join()


def test_closing_does_not_wait_for_ever(store, monkeypatch):
    monkeypatch.setattr(roexec, "_CLOSING_TIME", 0.05)
    go_on = threading.Event()
    monkeypatch.setattr(roexec, "count_changes", lambda db: go_on.wait(60))
    server = start_http(store, "127.0.0.1", 0, print)
    with dial(server) as client:
        client.sendall(head("GET /api/v1/health HTTP/1.1"))
        wait_for(lambda: server.connections)
        server.close()
        go_on.set()
        wait_for(lambda: not server.connections)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="this host does not list threads")
def test_no_signal_reaches_the_threads_of_the_server(store, said):
    before, others = signal.pthread_sigmask(signal.SIG_BLOCK, ()), threading.enumerate()
    server = serve(store, said)
    with contextlib.closing(server), dial(server) as client:
        client.sendall(head("GET /api/v1/health HTTP/1.1"))
        client.recv(1)
        threads = [each for each in threading.enumerate() if each not in others]
        assert len(threads) == 2 and all(each.daemon for each in threads)
        for each in threads:
            with open(f"/proc/self/task/{each.native_id}/status") as file:
                mask = int(next(line for line in file if line.startswith("SigBlk")).split()[1], 16)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD,
                           signal.SIGPIPE):
                assert mask >> number - 1 & 1
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_no_descriptor_is_inherited(server):
    assert not server.socket.get_inheritable()


def test_a_port_that_is_taken_is_told(server, store):
    port = server.address[1]
    with pytest.raises(roexec.RoexecError,
                       match=rf"^port {port} on 127.0.0.1 is in use; choose another by --port N or in"):
        start_http(store, "127.0.0.1", port, print)


def test_an_address_that_is_not_this_hosts_is_told(store):
    with pytest.raises(roexec.RoexecError, match="^cannot listen on port 8080 of 192.0.2.1: "):
        start_http(store, "192.0.2.1", 8080, print)


@needs_tables
@pytest.mark.parametrize("host, to", [("localhost", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"),
                                      ("::1", "::1"), ("::", "::1")])
def test_the_owner_is_let_in_wherever_the_server_listens(host, to, store):
    if ":" in host and not has_ipv6():
        pytest.skip("this host has no IPv6")
    server = start_http(store, host, 0, print)
    try:
        port = server.address[1]
        connection = http.client.HTTPConnection(to, port, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", "/api/v1/jobs", headers={"Host": f"localhost:{port}"})
            assert connection.getresponse().status == 200
    finally:
        server.close()


def test_handlers_know_no_sockets(store):
    route = roexec.find_routes("/api/v1/jobs")[0]["GET"]
    request = Request("GET", "/api/v1/jobs?limit=1")
    request.caller = OWNER
    response = roexec.answer(route, request, store, print)
    assert response.status == 200 and len(json.loads(response.body)["jobs"]) == 1
    assert json_response({}, 201, X_Y="z") == roexec.Response(
        status=201, type="application/json", headers={"X-Y": "z"}, body=b"{}\n")


# curl.

@pytest.fixture
def curl(server):
    """`curl(path, options)` -> what curl prints; no proxy, no settings of whoever runs it."""
    if not shutil.which("curl"):
        assert "CI" not in os.environ, "there is no curl here"
        pytest.skip("there is no curl here")

    def curl(path, *options):
        return subprocess.run(
            ["curl", "-q", "-sS", "--noproxy", "*", "--max-time", "20", *options,
             f"http://localhost:{server.address[1]}/api/v1{path}"],
            capture_output=True, text=True, check=True, timeout=60).stdout
    return curl


@needs_tables
def test_curl_follows_a_log(curl, store):
    run_id, journal = running(store)

    def finish():
        with store.write() as db:
            roexec.finish_run(db, run_id, "succeeded", [], log="logs/hello/live.log",
                              finished_at=NOW)
    timer = threading.Timer(0.1, finish)
    timer.start()
    assert curl(f"/runs/{run_id}/logs?follow=1&raw=1", "-N") == "one\ntwo\nthree"
    timer.join()
    journal.close()


@needs_tables
def test_curl_shows_a_head_and_an_error(curl):
    assert curl("/jobs", "-I").startswith("HTTP/1.1 200 OK\nServer: roexec\n")
    assert curl("/jobs", "-u", "name:password", "-o", os.devnull, "-w", "%{http_code}") == "401"
    large = curl("/jobs/hello/run", "-d", "x" * 3000, "-H", "Expect: 100-continue", "-w",
                 " %{http_code}")
    assert large.endswith("}}\n 400")
