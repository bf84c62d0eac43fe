"""Before any route: heads read strictly, who is at the other end, tokens, and the gate."""
import contextlib
import http.client
import json
import os
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import time

import pytest

from helpers import basic, serve, status_of, token
from served import (GOOD, ask, connected, connection, database, error, has_ipv6,  # noqa: F401
                    needs_root, needs_tables, said, server, store)

import roexec
from roexec import Place, Refusal, Request, Route, gate, parse_head, start_http


# Heads.

@pytest.mark.parametrize("head, status", [
    (b"GET /", 400), (b"GET / HTTP/1.1", 400), (b"", 400), (b"GET  / HTTP/1.1\r\nHost: a", 400),
    (b" GET / HTTP/1.1\r\nHost: a", 400), (b"get / HTTP/1.1\r\nHost: a", 400),
    (b"GET / HTTP/1.1 \r\nHost: a", 400), (b"GET /\tHTTP/1.1\r\nHost: a", 400),
    (b"GET / HTTP/2.0\r\nHost: a", 505), (b"PRI * HTTP/2.0", 505), (b"GET / HTTP/0.9", 505),
    (b"GET / HTTP/11\r\nHost: a", 400), (b"GET / http/1.1\r\nHost: a", 400),
    (b"GET http://localhost/ HTTP/1.1\r\nHost: localhost", 400),
    (b"OPTIONS * HTTP/1.1\r\nHost: a", 400), (b"GET x HTTP/1.1\r\nHost: a", 400),
    (b"GET /%zz HTTP/1.1\r\nHost: a", 400), (b"GET /a?b=% HTTP/1.1\r\nHost: a", 400),
    (b"GET /a%2 HTTP/1.1\r\nHost: a", 400), (b"GET /a#b HTTP/1.1\r\nHost: a", 400),
    (b"GET /\xe4 HTTP/1.1\r\nHost: a", 400), (b"GET /\0 HTTP/1.1\r\nHost: a", 400),
    (GOOD + b"\r\nHost: localhost", 400), (GOOD + b"\r\nHOST: other", 400),
    (b"GET / HTTP/1.1\r\nHost: a b", 400), (b"GET / HTTP/1.1\r\nHost: a/b", 400),
    (b"GET / HTTP/1.1\r\nHost: a@b", 400), (b"GET / HTTP/1.1\r\nHost: a:b", 400),
    (b"GET / HTTP/1.1\r\nHost: a, b", 400), (b"GET / HTTP/1.1\r\nHost: ::1", 400),
    (b"GET / HTTP/1.1\r\nHost:", 400), (b"GET / HTTP/1.0\r\nHost: a\r\nHost: a", 400),
    (GOOD + b"\r\n folded", 400), (GOOD + b"\r\nA: b\r\n\tfolded", 400), (GOOD + b"\r\nA", 400),
    (GOOD + b"\r\nA : b", 400), (GOOD + b"\r\n: b", 400), (GOOD + b"\r\nA\t: b", 400),
    (GOOD + b"\r\n\xe4: b", 400), (GOOD + b"\r\nA: \0", 400), (GOOD + b"\r\nA: b\nC: d", 400),
    (GOOD + b"\r\nA: b\rC: d", 400), (GOOD + b"\r\nA: \x7f", 400), (GOOD + b"\nA: b", 400),
    (GOOD + b"\r\nContent-Length: 1\r\nContent-Length: 1", 400),
    (GOOD + b"\r\nContent-Length: 1, 1", 400), (GOOD + b"\r\nContent-Length: +1", 400),
    (GOOD + b"\r\nContent-Length: -1", 400), (GOOD + b"\r\nContent-Length: 0x1", 400),
    (GOOD + b"\r\nContent-Length: 1_0", 400), (GOOD + b"\r\nContent-Length:", 400),
    (GOOD + b"\r\nContent-Length: \xb2", 400), (GOOD + b"\r\nContent-Length: 1 1", 400),
    (GOOD + b"\r\nContent-Length: " + b"0" * 19, 400),
    (GOOD + b"\r\nContent-Length: 1048577", 413),
    (GOOD + b"\r\nContent-Length: 999999999999999999", 413),
    (GOOD + b"\r\nTransfer-Encoding: chunked", 411), (GOOD + b"\r\nTransfer-Encoding: x", 411),
    (GOOD + b"\r\ntransfer-encoding:\r\nContent-Length: 1", 400),
    (GOOD + b"\r\nA: b" * 100, 431),
])
def test_a_head_that_two_could_read_differently_is_refused(head, status):
    with pytest.raises(Refusal) as refused:
        parse_head(head)
    assert refused.value.status == status


@pytest.mark.parametrize("head, method, path, query, headers", [
    (GOOD, "GET", "/", "", {"host": ["localhost"]}),
    (b"POST /a%20b?c=d?e HTTP/1.0", "POST", "/a%20b", "c=d?e", {}),
    (GOOD + b"\r\nA:b\r\nA: \t c d \t\r\nB-c:", "GET", "/", "",
     {"host": ["localhost"], "a": ["b", "c d"], "b-c": [""]}),
    (GOOD + b"\r\nX: \xe4", "GET", "/", "", {"host": ["localhost"], "x": ["ä"]}),
])
def test_a_head_is_read(head, method, path, query, headers):
    request = parse_head(head)
    assert (request.method, request.path, request.query, request.headers) == (
        method, path, query, headers)


@pytest.mark.parametrize("lines, keeps", [
    (b"HTTP/1.1\r\nHost: a", True), (b"HTTP/1.1\r\nHost: a\r\nConnection: Close", False),
    (b"HTTP/1.1\r\nHost: a\r\nConnection: x\r\nConnection: y , close", False),
    (b"HTTP/1.1\r\nHost: a\r\nConnection: closed", True),
    (b"HTTP/1.0", False), (b"HTTP/1.0\r\nConnection: keep-alive", False)])
def test_a_connection_is_kept_unless_its_client_wants_it_otherwise(lines, keeps):
    assert parse_head(b"GET / " + lines).keeps is keeps


def test_no_head_takes_long_to_read():
    for filling in (b" ", b"\t", b"a ", b",", b"A: b\r\n", b"\xff"):
        for end in (b"", b"\0", b"\r"):
            began = time.process_time()
            with contextlib.suppress(Refusal):
                parse_head(GOOD + b"\r\nA: " + filling * (16384 // len(filling)) + end)
            assert time.process_time() - began < 0.1


def test_a_head_of_random_bytes_is_read_strictly_or_refused():
    chance = random.Random(7)
    parts = [b"GET", b"POST", b" ", b"/", b"/api/v1/jobs/a%20b?c=d", b"%", b"HTTP/1.1", b"HTTP/1.0",
             b"\r\n", b"\n", b"\r", b"\0", b"\t", b":", b"Host: localhost", b"Host:", b"a", b"\xff",
             b"Content-Length: 1", b"Content-Length: 0x1", b"Transfer-Encoding: chunked", b",", b"="]
    good = [b"GET", b" ", b"/api/v1/jobs/a%20b?c=d", b" ", b"HTTP/1.1", b"\r\n", b"Host: localhost",
            b"\r\n", b"Content-Length: 1", b"\r\n", b"Accept: a"]
    accepted = 0
    for _ in range(20_000):
        head = list(good)
        for _ in range(chance.randrange(3)):
            at = chance.randrange(len(head) + 1)
            head[at:at + chance.randrange(2)] = [chance.choice(parts)]
        head = b"".join(head).partition(b"\r\n\r\n")[0]
        try:
            request = roexec.parse_head(head)
        except roexec.Refusal as refusal:
            assert refusal.status in (400, 411, 413, 431, 505)
            continue
        accepted += 1
        lines = head.split(b"\r\n")
        assert re.fullmatch(rb"[A-Z]+ /[!-~]* HTTP/1\.[01]", lines[0]), head
        assert all(re.fullmatch(rb"[%\w-]+:[^\r\n\0]*", line) for line in lines[1:]), head
        names = [line.partition(b":")[0].lower() for line in lines[1:]]
        assert names.count(b"host") <= 1 and names.count(b"content-length") <= 1, head
        assert b"transfer-encoding" not in names and request.length in range(1 << 20), head
    assert 1000 < accepted < 19_000


# Who is let in.

def test_health_is_open_and_says_nothing_else(connection):
    connection.request("GET", "/api/v1/health", headers={
        "Host": "any.example", "X-Forwarded-For": "10.0.0.1", "Authorization": "Bearer x"})
    response = connection.getresponse()
    assert (response.status, response.read()) == (200, b'{"status": "ok"}\n')


def test_a_store_that_cannot_be_read_is_not_healthy_and_not_named_to_strangers(error, store):
    os.rename(store.database, store.database + ".away")
    assert error("/health") == (503, "unavailable", "the store cannot be read")


NOBODYS = roexec.OPEN, roexec.PAGE


def place_of(port=8080, owner=lambda: None, tokens=(), hosts=()):
    """A place on the host "here"; tokens are {text: row}."""
    return Place(port=port, name="here", hosts=hosts, owner=owner, token=dict(tokens).get)


def refusal_of(scope, headers, owned=True, port=8080):
    """The status and code with which the gate refuses; None where it does not."""
    request = Request("GET", "/", {name: [text] for name, text in headers.items()})
    try:
        caller = gate(scope, request, place_of(port, lambda: "me" if owned else None))
    except Refusal as refusal:
        return refusal.status, refusal.code
    assert all(caller.may(each) is (scope not in NOBODYS) for each in roexec.SCOPES)


@pytest.mark.parametrize("headers, expected", [
    ({}, None),
    ({"host": "LocalHost:8080"}, None), ({"host": "localhost"}, None),
    ({"host": "127.0.0.1:8080"}, None), ({"host": "[::1]:8080"}, None), ({"host": "[::1]"}, None),
    ({"host": "127.0.0.1"}, None),
    ({"host": "localhost:8081"}, 421), ({"host": "127.0.0.2:8080"}, 401),
    ({"host": "localhost.:8080"}, 421), ({"host": "evil.example"}, 421),
    ({"host": "localhost.evil.example:8080"}, 421), ({"host": ""}, 421), ({"host": None}, 421),
    ({"host": "10.0.0.1:8080"}, 401), ({"host": "[fd00::1]"}, 401), ({"host": "Here:8080"}, 401),
    ({"host": "10.1:8080"}, 421), ({"host": "2130706433"}, 421), ({"host": "0x7f.0.0.1"}, 421),
    ({"host": "here.evil.example"}, 421), ({"origin": "http://here"}, 403),
    ({"origin": "http://localhost:8080"}, None), ({"origin": "https://LOCALHOST:8080"}, None),
    ({"origin": "http://localhost"}, 403), ({"origin": "http://evil.example"}, 403),
    ({"origin": "http://127.0.0.1:8080"}, 403), ({"origin": "null"}, 403), ({"origin": ""}, 403),
    ({"host": None, "origin": ""}, 403), ({"host": "", "origin": "null"}, 403),
    ({"sec-fetch-site": "same-origin"}, None), ({"sec-fetch-site": "none"}, None),
    ({"sec-fetch-site": "cross-site"}, 401), ({"sec-fetch-site": "same-site"}, 401),
    ({"sec-fetch-site": "none, none"}, 401),
    ({"forwarded": "for=1"}, 401), ({"via": "1.1 x"}, 401), ({"x-real-ip": "127.0.0.1"}, 401),
    ({"x-forwarded-for": "127.0.0.1"}, 401), ({"x-forwarded-anything": ""}, 401),
    ({"authorization": "Bearer x"}, 401), ({"authorization": "Basic eDp5"}, 401),
    ({"authorization": ""}, 401),
])
def test_the_owner_passes_the_gate_where_nothing_is_doubtful(headers, expected):
    given = {name: text for name, text in {"host": "localhost:8080", **headers}.items()
             if text is not None}
    status = (refusal_of("job:read", given) or (None,))[0]
    assert status == expected
    stranger = (refusal_of("job:read", given, owned=False) or (None,))[0]
    assert stranger == (403 if expected == 403 else 401)
    without_route = (refusal_of(None, given, owned=False) or (None,))[0]
    assert without_route == stranger
    anybody = (refusal_of(roexec.OPEN, given, owned=False) or (None,))[0]
    assert anybody == (403 if expected == 403 else None)
    page = (refusal_of(roexec.PAGE, given, owned=False) or (None,))[0]
    other_port = given.get("host") == "localhost:8081"      # that of a tunnel
    assert page == (None if expected == 401 or other_port else expected)


@needs_tables
@pytest.mark.parametrize("path", ["/jobs", "/nowhere", "/jobs/hello", "/runs/x/logs"])
def test_a_stranger_is_challenged_for_a_token_and_learns_nothing(path, ask):
    status, payload, headers = ask(path, Via="1.1 proxy")
    assert (status, payload["error"]["code"]) == (401, "unauthorized")
    assert headers["WWW-Authenticate"] == "Bearer"
    assert ask(path, "DELETE", Via="1.1 proxy")[0] == 401


def test_a_route_without_a_scope_stops_the_server_at_its_start(store, monkeypatch):
    for scope in (None, "", "jobs"):
        route = Route(method="GET", path="/api/v1/new", scope=scope, handler=None)
        monkeypatch.setattr(roexec, "ROUTES", (*roexec.ROUTES, route))
        with pytest.raises(ValueError, match="GET /api/v1/new has no scope"):
            start_http(store, "127.0.0.1", 0, print)
        monkeypatch.undo()


AS_ANOTHER = """
import encodings.idna, os, socket, sys
if sys.argv[2] != "0":
    os.setgid(int(sys.argv[2])), os.setuid(int(sys.argv[2]))
for path in ("/api/v1/health", "/api/v1/jobs", "/nowhere"):
    with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as client:
        client.sendall(b"GET %b HTTP/1.0\\r\\nHost: localhost\\r\\n\\r\\n" % path.encode())
        print(client.makefile("rb").read().split()[1].decode(), end=" ")
"""


@needs_tables
@needs_root
@pytest.mark.parametrize("uid, expected", [
    (0, "200 200 404 "), (65534, "200 401 401 "), (12345, "200 401 401 ")])
def test_other_users_of_the_host_are_not_let_in(uid, expected, server):
    client = subprocess.run([sys.executable, "-I", "-S", "-c", AS_ANOTHER, str(server.address[1]),
                             str(uid)], capture_output=True, text=True, check=True, timeout=60)
    assert client.stdout == expected


@needs_tables
@needs_root
def test_a_server_lets_its_own_user_and_root_in(store, monkeypatch):
    for uid, overflow, expected in ((12345, 65534, True), (12345, 12345, False)):
        monkeypatch.setattr(roexec, "_overflow_uid", lambda overflow=overflow: overflow)
        monkeypatch.setattr(roexec, "peer_uid", lambda connection: 12345)
        monkeypatch.setattr(roexec.os, "geteuid", lambda: uid)
        assert roexec.local_user(None) == ("12345" if expected else None)
        monkeypatch.setattr(roexec, "peer_uid", lambda connection: 0)
        assert roexec.local_user(None) == "root"
        for nobody in (None, 1, 54321):
            monkeypatch.setattr(roexec, "peer_uid", lambda connection: nobody)
            assert roexec.local_user(None) is None
            assert roexec.local_user(None, (54321,)) == (nobody and {54321: "54321"}.get(nobody))


@needs_tables
@pytest.mark.parametrize("family, host, to", [
    (socket.AF_INET, "127.0.0.1", None), (socket.AF_INET, "0.0.0.0", "127.0.0.7"),
    (socket.AF_INET6, "::1", None), (socket.AF_INET6, "::", "127.0.0.1"),
    (socket.AF_INET6, "::", "::1")])
def test_who_is_at_the_other_end_is_found_out(family, host, to):
    if family == socket.AF_INET6 and not has_ipv6():
        pytest.skip("this host has no IPv6")
    with connected(family, host, to) as (client, accepted, _):
        assert roexec.peer_uid(accepted) == os.getuid()
        assert roexec.peer_uid(client) == os.getuid()


@needs_tables
def test_a_client_that_has_closed_its_socket_proves_nothing():
    with connected() as (client, accepted, _):
        client.sendall(b"x")
        client.close()
        assert accepted.recv(2) == b"x"
        assert roexec.peer_uid(accepted) is None


@needs_tables
def test_a_client_that_will_send_nothing_more_proves_nothing():
    with connected() as (client, accepted, _):
        client.shutdown(socket.SHUT_WR)
        assert accepted.recv(1) == b""
        assert roexec.peer_uid(accepted) is None


class Remembered:
    """A connection whose ends were asked for while it was there."""

    def __init__(self, connection):
        self.ends, self.getsockopt = (connection.getsockname(), connection.getpeername()), (
            connection.getsockopt)

    def getsockname(self):
        return self.ends[0]

    def getpeername(self):
        return self.ends[1]


@needs_tables
def test_a_later_client_with_the_same_port_is_not_taken_for_an_earlier_one():
    # An address whose ports nobody else has used lately, nor uses just now.
    of_its_own = (f"127.9.{os.getpid() // 256 % 256}.{os.getpid() % 256}", 0)
    with connected(source=of_its_own) as (client, accepted, listener):
        first, ends = Remembered(accepted), client.getsockname()
        assert roexec.peer_uid(first) == os.getuid()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()                  # a reset: nothing remains of the connection
        with socket.socket() as later:
            later.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            later.bind(ends)
            later.connect(listener.getsockname())
            second, _ = listener.accept()
            with second:
                assert second.getpeername() == first.getpeername()
                assert roexec.peer_uid(second) == os.getuid()
                assert roexec.peer_uid(first) is None


ROW = b"   0: 0100007F:%04X 0100007F:%04X %b 00000000:00000000 00:00000000 00000000  %d 0 %d 1 0"
ENDS = (b"\x7f\0\0\1", 1000), (b"\x7f\0\0\1", 80)


@pytest.mark.parametrize("line, expected", [
    (ROW % (1000, 80, b"01", 7, 99), {(b"01", b"7", b"99")}),
    (ROW % (80, 1000, b"01", 7, 99), set()), (ROW % (1001, 80, b"01", 7, 99), set()),
    (ROW % (1000, 80, b"08", 0, 0), {(b"08", b"0", b"0")}),
    (b"  sl  local_address rem_address   st", set())])
@pytest.mark.skipif(sys.byteorder == "big", reason="the rows are those of a little-endian host")
def test_rows_of_the_table_of_sockets_are_read(line, expected):
    assert roexec._rows_between([line], *ENDS) == expected
    mapped = line.replace(b"0100007F", b"0000000000000000FFFF00000100007F")
    assert roexec._rows_between([mapped, mapped], *ENDS) == expected


@needs_tables
def test_rows_that_contradict_each_other_prove_nothing(monkeypatch):
    with connected() as (_, accepted, _):
        rows = {(b"01", b"%d" % os.getuid(), b"99")}
        for more, expected in ((set(), os.getuid()), ({(b"01", b"5", b"100")}, None)):
            monkeypatch.setattr(roexec, "_rows_between", lambda *_: rows | more)
            assert roexec.peer_uid(accepted) == expected
        for row in ((b"08", b"0", b"99"), (b"01", b"0", b"0")):
            monkeypatch.setattr(roexec, "_rows_between", lambda *_: {row})
            assert roexec.peer_uid(accepted) is None


def test_a_connection_from_elsewhere_is_nobodys(monkeypatch):
    monkeypatch.setattr(roexec, "_rows_between", lambda *_: pytest.fail("it was looked up"))
    for ours, theirs in ((("127.0.0.1", 80), ("10.0.0.1", 9)), (("10.0.0.1", 80), ("127.0.0.1", 9)),
                         (("::1", 80, 0, 0), ("fe80::1%eth0", 9, 0, 2)),
                         (("::ffff:10.0.0.1", 80, 0, 0), ("::1", 9, 0, 0))):
        remote = Remembered.__new__(Remembered)
        remote.ends = ours, theirs
        assert roexec.peer_uid(remote) is None


@needs_tables
def test_who_it_is_is_found_out_once_per_connection(ask, monkeypatch):
    asked = []
    monkeypatch.setattr(roexec, "local_user",
                        lambda connection, uids: asked.append(connection) or "me")
    assert [ask("/jobs")[0], ask("/runs")[0], ask("/nowhere")[0]] == [200, 200, 404]
    assert len(asked) == 1


# Tokens.

@pytest.fixture
def closed(store, said):
    """A server of that store that lets nobody in without a token."""
    server = serve(store, said, auth={"owner": False}, hosts=["ci.example", "ci.example:81"])
    yield server
    server.close()
    assert not said


def walk(server, **headers):
    """{route: status} of the whole table, without hosts, pages or proxies in between."""
    found = {}
    for route in roexec.ROUTES:
        path = route.path.replace("{}", "hello")
        for method in (route.method, "HEAD") if route.method == "GET" else (route.method,):
            found[method, path, route.scope] = status_of(server, method, path, **headers)
    return found


def test_the_whole_table_is_closed_to_whoever_has_no_token(closed, store, monkeypatch):
    monkeypatch.setattr(roexec.Failures, "note", lambda *_: 0)
    expired = token(store, "old", role="admin", expires="1s")
    with store.write() as db:
        db.execute("UPDATE tokens SET expires_at = ?", (time.time() - 1,))
    valid = token(store, role="admin")
    rotated = token(store, "rotated", role="admin")
    revoked = token(store, "revoked", role="admin")
    with store.write() as db:
        me = roexec.Caller(name="user me")
        roexec.renew_token(db, "rotated", me, time.time())
        roexec.remove_token(db, "revoked", me, time.time())
    for credentials in (None, "", "Bearer", "Bearer ", "Bearer x", f"Bearer {valid}x",
                        f"Bearer {valid[:-1]}", f"Bearer {expired}", f"Bearer {rotated}",
                        f"Bearer {revoked}", f"Token {valid}", valid, basic("x", valid),
                        basic("", valid), basic("ci", "x"), "Basic !", "Basic ",
                        f"Bearer {valid}, Bearer {valid}"):
        given = {} if credentials is None else {"Authorization": credentials}
        for (method, path, scope), status in walk(closed, **given).items():
            assert (status == 401) is (scope not in NOBODYS), (credentials, method, path, status)
    assert status_of(closed, "GET", "/nowhere") == status_of(closed, "BREW", "/api/v1/jobs") == 401
    assert status_of(closed, "OPTIONS", "/api/v1/jobs") == 401


@pytest.mark.parametrize("scopes", [
    *roexec.ROLES.values(), *[(scope,) for scope in roexec.SCOPES]], ids=" ".join)
@pytest.mark.parametrize("pattern", [None, "hello"])
def test_the_whole_table_asks_for_its_scopes(scopes, pattern, closed, store):
    caller = roexec.Caller(name="token ci", scopes=scopes, pattern=pattern)
    text, _ = roexec._new_token()
    with store.write() as db:
        db.execute("INSERT INTO tokens VALUES ('ci', ?, ?, ?, 0, NULL, NULL)",
                   (roexec._token_digest(text), ",".join(scopes), pattern))
    for (method, path, scope), status in walk(closed, Authorization=f"Bearer {text}").items():
        allowed = scope in (*NOBODYS, roexec.ANY) or caller.may(scope)
        assert status not in (401, 421) and status < 500
        assert (status != 403) is allowed, (method, path, status)


@pytest.mark.parametrize("host, bearer, with_basic", [
    ("localhost", 200, 200), ("localhost:9", 200, 200), ("127.0.0.1:1", 200, 200),
    ("[::1]", 200, 200), ("CI.example", 200, 200), ("ci.example:81", 200, 200),
    ("ci.example:82", 200, 200), ("evil.example", 200, 421), ("127.0.0.2", 200, 200),
    ("192.0.2.7:9000", 200, 200), ("[2001:db8::1]:9000", 200, 200), ("192.0.2.7.evil", 200, 421),
    ("0177.0.0.1", 200, 421), ("xci.example", 200, 421), ("[1.2.3.4]", 200, 421)])
def test_a_bearer_may_use_any_name_of_the_host_and_basic_a_known_one(host, bearer, with_basic,
                                                                     closed, store):
    text = token(store, role="viewer")
    given = {"Host": host, "Authorization": f"Bearer {text}"}
    assert status_of(closed, "GET", "/api/v1/jobs", **given) == bearer
    given["Authorization"] = basic("ci", text)
    assert status_of(closed, "GET", "/api/v1/jobs", **given) == with_basic
    assert status_of(closed, "GET", "/api/v1/health", Host=host) == 200


def test_the_page_is_got_by_a_name_of_the_server_alone_and_also_by_a_link(closed):
    for host, expected in (("localhost", 200), ("127.0.0.1:99", 200), ("CI.example", 200),
                           ("evil.example", 421), ("192.0.2.7:9000", 200), ("[::2]", 200),
                           (socket.gethostname().upper() + ":9000", 200), ("0x7f.1", 421)):
        assert status_of(closed, "GET", "/", Host=host) == expected
        assert status_of(closed, "GET", "/", Host=host, Sec_Fetch_Site="cross-site") == expected
    assert status_of(closed, "GET", "/", Origin="http://evil.example") == 403


@pytest.mark.parametrize("host, origin, expected", [
    ("localhost:80", "http://localhost:80", 200), ("localhost", "https://localhost", 200),
    ("localhost", "http://localhost:80", 403), ("localhost", "http://ci.example", 200),
    ("localhost", "https://ci.example:81", 200), ("localhost", "https://ci.example:82", 403),
    ("ci.example:82", "https://ci.example:82", 200), ("localhost", "null", 403),
    ("localhost", "http://evil.example", 403), ("localhost", "", 403)])
def test_a_page_of_another_origin_is_refused_whatever_it_bears(host, origin, expected, closed,
                                                               store):
    for credentials in (f"Bearer {token(store, role='viewer')}", basic("ci", "x")):
        found = status_of(closed, "GET", "/api/v1/jobs", Host=host, Origin=origin,
                          Authorization=credentials)
        assert found == (401 if expected == 200 and credentials[1] == "a" else expected)
    assert status_of(closed, "GET", "/api/v1/health", Host=host, Origin=origin) == expected
    assert status_of(closed, "POST", "/nowhere", Host=host, Origin=origin) in (401, expected)


def test_basic_that_a_page_of_another_site_makes_a_browser_send_is_refused(closed, store):
    given = {"Authorization": basic("ci", token(store, role="viewer"))}
    for site, expected in (("same-origin", 200), ("none", 200), ("cross-site", 403),
                           ("same-site", 403)):
        assert status_of(closed, "GET", "/api/v1/jobs", Sec_Fetch_Site=site, **given) == expected


def test_a_refusal_of_a_host_says_what_to_write(closed):
    with contextlib.closing(http.client.HTTPConnection(*closed.address)) as connection:
        connection.request("GET", "/api/v1/jobs", headers={
            "Host": "task.example:81", "Authorization": basic("ci", "x")})
        answer = json.loads(connection.getresponse().read())
    assert 'server: {hosts: ["task.example"]}' in answer["error"]["message"]


@needs_tables
def test_through_a_proxy_a_token_is_needed_and_enough(ask, store):
    text = token(store, role="viewer")
    for name in ("Forwarded", "X_Forwarded_For", "X_Real_IP", "Via", "X_Forwarded_Proto"):
        assert ask("/jobs", **{name: "1"})[0] == 401
        assert ask("/jobs", Authorization=f"Bearer {text}", **{name: "1"})[0] == 200


def by_curl(server, path, *options):
    return subprocess.run(["curl", "-sS", "-w", "%{http_code}", "-o", "/dev/null", *options,
                           f"http://localhost:{server.address[1]}/api/v1{path}"],
                          capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.skipif(not shutil.which("curl"), reason="there is no curl")
def test_curl_gets_in_with_a_token_either_way(closed, store):
    text = token(store, role="operator")
    assert by_curl(closed, "/jobs") == "401"
    assert by_curl(closed, "/jobs", "-H", f"Authorization: Bearer {text}") == "200"
    assert by_curl(closed, "/jobs", "-u", f"ci:{text}") == "200"
    assert by_curl(closed, "/jobs/hello/run", "-u", f"ci:{text}", "-X", "POST") == "202"
    assert by_curl(closed, "/tokens", "-u", f"ci:{text}") == "403"


@needs_tables
def test_tokens_are_made_shown_renewed_and_removed(ask, store):
    body = json.dumps({"name": "ci", "scopes": ["run:list"], "jobs": "h*", "expires": "30d"})
    status, made, headers = ask("/tokens", "POST", body)
    assert (status, headers["Location"]) == (201, "/api/v1/tokens/ci")
    assert made["token"].startswith("roexec_") and len(made["token"]) == 39
    shown = {key: value for key, value in made.items() if key != "token"}
    assert ask("/tokens")[1] == {"tokens": [shown], "next": None}
    assert ask("/tokens/ci")[1] == shown
    assert (shown["scopes"], shown["jobs"], shown["last_used_at"]) == (["run:list"], "h*", None)
    assert ask("/tokens", "POST", body)[0] == 409
    status, renewed, _ = ask("/tokens/ci/rotate", "POST")
    assert status == 200 and renewed["token"] != made["token"]
    with store.read() as db:
        assert roexec.find_token(db, made["token"], time.time()) is None
        assert roexec.find_token(db, renewed["token"], time.time())["name"] == "ci"
    status, content, headers = ask("/tokens/ci", "DELETE")
    assert (status, content, headers["Content-Length"]) == (204, b"", None)
    for path, method in (("", "GET"), ("", "DELETE"), ("/rotate", "POST")):
        assert ask(f"/tokens/ci{path}", method)[0] == 404
    with store.read() as db:
        assert "roexec_" not in "".join(db.iterdump())


@needs_tables
@pytest.mark.parametrize("body, status", [
    ("{}", 422), ('{"name": "ci"}', 422), ('{"name": "ci", "role": "root"}', 422),
    ('{"name": "ci", "role": "viewer", "expires": "2001-01-01"}', 422), ("[]", 400), ("x", 400),
    ('{"name": "ci", "rolle": "viewer"}', 400)])
def test_a_token_that_cannot_be_is_refused(body, status, ask):
    assert ask("/tokens", "POST", body)[0] == status


def test_with_a_token_nobody_makes_one_that_may_do_more(closed, store):
    token(store, "boss", role="admin")
    text = token(store, scopes=["token:admin", "run:list"])

    def call(method, path, body=None):
        with contextlib.closing(http.client.HTTPConnection(*closed.address)) as connection:
            connection.request(method, path, body and json.dumps(body),
                               {"Authorization": f"Bearer {text}"})
            return connection.getresponse().status
    assert call("POST", "/api/v1/tokens", {"name": "a", "scopes": ["run:list"]}) == 201
    assert call("POST", "/api/v1/tokens", {"name": "b", "scopes": ["run:create"]}) == 422
    assert call("POST", "/api/v1/tokens", {"name": "b", "role": "admin", "jobs": "*"}) == 422
    assert call("POST", "/api/v1/tokens/boss/rotate") == 403
    assert call("POST", "/api/v1/tokens/a/rotate") == 200


@needs_tables
def test_each_change_over_http_is_noted_with_who_made_it(ask, store):
    text = token(store, role="admin")
    ask("/tokens", "POST", '{"name": "x", "role": "viewer"}')
    run = ask("/jobs/hello/run", "POST", Authorization=f"Bearer {text}")[1]["id"]
    ask("/tokens/x", "DELETE")
    ask("/jobs/hello/run", "POST")              # refused: it is on
    me = f"user {roexec.owner_name(os.getuid())}"
    status, payload, _ = ask("/audit?limit=3")
    assert status == 200 and payload["next"] is not None
    assert [(row["who"], row["action"], row["job_id"], row["target"])
            for row in payload["audit"]] == [
        (me, "token revoke", None, "x"), ("token ci", "run", "hello", run),
        (me, "token create", None, "x")]
    more = ask(f"/audit?limit=3&cursor={payload['next']}")[1]
    assert [(row["action"], row["target"]) for row in more["audit"]] == [("token create", "ci")]
    assert text not in json.dumps([payload, more])


def test_when_a_token_was_used_is_kept_once_in_a_while(closed, store):
    given = {"Authorization": f"Bearer {token(store, role='viewer')}"}

    def used():
        with store.read() as db:
            return roexec.get_token(db, "ci")["used_at"]
    assert status_of(closed, "GET", "/api/v1/jobs", **given) == 200
    closed.note_uses()
    first = used()
    assert abs(first - time.time()) < 20
    assert status_of(closed, "GET", "/api/v1/jobs", **given) == 200
    closed.note_uses()
    assert used() == first
    closed.noted -= 100
    closed.note_uses()
    assert used() > first


def test_wrong_tokens_are_answered_more_and_more_slowly_and_are_forgotten():
    failures = roexec.Failures()
    waits = [failures.note("a", 100) for _ in range(8)]
    assert waits == sorted(waits) and waits[0] <= 0.1 and waits[-1] == 2.0
    assert failures.note("b", 100) == waits[0]
    assert failures.note("a", 1000) == waits[0]
    for peer in range(3000):
        failures.note(peer, 2000)
    assert len(failures.known) <= 1000 and failures.note(2999, 2000) > waits[0]


def test_a_right_token_is_not_slowed_down_by_wrong_ones(closed, store, monkeypatch):
    slept = []
    monkeypatch.setattr(roexec.time, "sleep", slept.append)
    for _ in range(4):
        assert status_of(closed, "GET", "/api/v1/jobs", Authorization="Bearer x") == 401
    given = {"Authorization": f"Bearer {token(store, role='viewer')}"}
    assert status_of(closed, "GET", "/api/v1/jobs", **given) == 200
    assert [seconds for seconds in slept if seconds >= 0.1] == [0.1, 0.2, 0.4, 0.8]


def test_a_store_that_cannot_be_read_lets_nobody_in(closed, store):
    os.rename(store.database, store.database + ".away")
    assert status_of(closed, "GET", "/api/v1/jobs", Authorization="Bearer x") == 503
