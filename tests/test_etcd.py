"""What is asked of etcd, and what becomes of it where etcd, or the way to it, fails."""
import base64
import contextlib
import http.client
import itertools
import json
import random
import socket
import socketserver
import ssl
import subprocess
import threading
import time
import types

import pytest
from engines import Etcd
from helpers import STALLS, tool, wait_for
from links import Link

import roexec
from roexec import EtcdClient, EtcdEntry, EtcdError

engine = pytest.mark.engine
PASSWORD = "s3cr3t-Pässword"


@pytest.fixture
def made():
    """`made(endpoints, **options)` -> an EtcdClient; all are closed at the end."""
    with contextlib.ExitStack() as stack:
        def make(endpoints, timeout=20, **options):
            client = EtcdClient(endpoints, timeout, **options)
            stack.callback(client.close)
            return client
        yield make


def local(*ports):
    return [("127.0.0.1", port) for port in ports]


def refused(function, *arguments):
    """The EtcdError that a call raises, whose text is one line."""
    with pytest.raises(EtcdError) as caught:
        function(*arguments)
    assert str(caught.value).isprintable()
    return caught.value


def took(function, *arguments):
    begun = time.monotonic()
    result = function(*arguments)
    return time.monotonic() - begun, result


# One member.

@pytest.fixture(scope="module")
def solo(tmp_path_factory):
    with Etcd(tmp_path_factory.mktemp("etcd")) as etcd:
        yield etcd


@pytest.fixture
def client(solo, made, request):
    client = made(solo.endpoints)
    client.prefix = request.node.name + "/"
    return client


@engine
def test_a_key_is_put_read_and_deleted(client):
    key = client.prefix + "größe 🙂"
    assert client.get(key) is None
    first = client.put(key, b"\x00\xff")
    second = client.put(key, b"")
    assert client.get(key) == EtcdEntry(key=key, value=b"", mod=second, create=first, lease=0)
    assert second > first > 0
    assert (client.delete(key), client.delete(key), client.get(key)) == (True, False, None)


@engine
def test_all_keys_with_a_prefix_are_read_page_by_page_as_they_were_at_one_revision(
        client, monkeypatch):
    monkeypatch.setattr(roexec, "_PAGE_OF_KEYS", 3)
    names = [f"{client.prefix}{number:02}" for number in range(7)]
    for name in reversed(names):
        last = client.put(name, name.encode())
    client.put(client.prefix[:-1] + "0", b"behind")         # the first key after those
    asked, ask = [], client._way.exchange

    def exchange(endpoint, path, body, *more):
        if asked:
            client.put(names[-1], b"later")
        asked.append(body)
        return ask(endpoint, path, body, *more)
    entries, revision = client.get_prefix(client.prefix)
    assert [(entry.key, entry.value) for entry in entries] == [
        (name, name.encode()) for name in names]
    assert revision > last
    monkeypatch.setattr(client._way, "exchange", lambda endpoint, path, *more: (
        exchange(endpoint, path, *more) if path == "kv/range" else ask(endpoint, path, *more)))
    again, same = client.get_prefix(client.prefix)
    assert again == entries and same == revision and len(asked) == 3
    assert client.get(names[-1]).value == b"later"


@engine
@pytest.mark.parametrize("compares, holds", [
    ([], True),
    ([("there", "mod", 1)], True),
    ([("there", "mod", 0)], False),
    ([("there", "mod", 2)], False),
    ([("there", "create", 0)], True),
    ([("there", "create", 1)], False),
    ([("none", "mod", "none"), ("none", "create", "none")], True),
    ([("none", "mod", 1)], False),
    ([("none", "mod", "none"), ("there", "mod", 0)], False),
])
def test_a_transaction_does_one_thing_or_the_other(client, compares, holds):
    """Numbers are counted from the revision that has created `there`, "none" is 0."""
    key = client.prefix
    created = client.put(key + "there", b"1")
    changed = client.put(key + "there", b"2")
    assert changed == created + 1
    done, answers = client.txn(
        [(key + name, target, 0 if number == "none" else created + number)
         for name, target, number in compares],
        [("put", key + "new", b"3"), ("get", key + "there"), ("get", key + "none"),
         ("delete", key + "none")],
        [("get", key + "there"), ("delete", key + "there")])
    there = EtcdEntry(key=key + "there", value=b"2", mod=changed, create=created, lease=0)
    assert done is holds
    assert answers == ([changed + 1, there, None, False] if holds else [there, True])
    assert (client.get(key + "new") is not None) is holds
    client.delete(key + "new")
    client.delete(key + "there")


@engine
def test_of_many_who_claim_a_key_at_once_one_gets_it(client, solo, made):
    results = []

    def claim(number):
        results.append(client.txn([(client.prefix, "mod", 0)],
                                  [("put", client.prefix, b"%d" % number)])[0])
    threads = [threading.Thread(target=claim, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False] * 19 + [True]


@engine
def test_a_lease_ends_with_its_keys(client):
    lease = client.grant(5)
    assert client.keep_alive(lease) >= 1
    client.put(client.prefix, b"x", lease)
    assert client.get(client.prefix).lease == lease
    wait_for(lambda: client.get(client.prefix) is None)
    assert client.keep_alive(lease) == 0
    error = refused(client.put, client.prefix, b"x", lease)
    assert "requested lease not found" in str(error) and not error.unknown
    client.revoke(lease)


@engine
def test_a_lease_that_is_revoked_is_gone(client):
    lease = client.grant(60)
    client.txn([], [("put", client.prefix, b"x", lease)])
    client.revoke(lease)
    assert client.get(client.prefix) is None and client.keep_alive(lease) == 0


@engine
def test_a_watch_tells_of_changes_deletions_and_leases_that_end(client):
    prefix, lease = client.prefix, client.grant(5)
    created = client.put(prefix + "a", b"1")
    with client.watch(prefix, created) as watch:
        changed = client.put(prefix + "a", b"2")
        client.put(prefix[:-1], b"another")
        deleted = client.delete(prefix + "a") and changed + 2
        leased = client.put(prefix + "b", b"", lease)
        events = iter(watch)
        assert [next(events) for _ in range(5)] == [
            EtcdEntry(key=prefix + "a", value=b"1", mod=created, create=created, lease=0),
            EtcdEntry(key=prefix + "a", value=b"2", mod=changed, create=created, lease=0),
            EtcdEntry(key=prefix + "a", value=None, mod=deleted, create=0, lease=0),
            EtcdEntry(key=prefix + "b", value=b"", mod=leased, create=leased, lease=lease),
            EtcdEntry(key=prefix + "b", value=None, mod=leased + 1, create=0, lease=0)]


@engine
def test_a_watch_ends_after_its_time_and_goes_on_where_it_was(client, made, solo):
    patient = made(solo.endpoints)
    with patient.watch(client.prefix, 0, seconds=0.5) as watch:
        first = watch.revision
        assert took(list, watch)[0] < STALLS and watch.revision == first
    client.put(client.prefix, b"1")
    with patient.watch(client.prefix, first, seconds=60) as watch:
        events = iter(watch)
        assert next(events).value == b"1"
        client.put(client.prefix, b"2")
        assert next(events).value == b"2"
        assert watch.revision == first + 1      # the second is not done with
    with client.watch(client.prefix, watch.revision, seconds=60) as watch:
        assert next(iter(watch)).value == b"2"


@engine
def test_a_watch_is_ended_by_another_thread(client):
    with client.watch(client.prefix, 0) as watch:
        timer = threading.Timer(0.2, watch.close)
        timer.start()
        seconds, events = took(list, watch)
    assert events == [] and seconds < STALLS
    timer.join()
    watch.close()


@engine
def test_a_watch_from_what_is_compacted_is_an_error(client, solo):
    first = client.put(client.prefix, b"1")
    last = client.put(client.prefix, b"2")
    assert solo.ask("/v3/kv/compaction", {"revision": str(last)})[0] == 200
    with pytest.raises(EtcdError, match="compacted"), client.watch(client.prefix, first) as watch:
        list(watch)


@engine
def test_each_endpoint_says_how_it_is(made, solo):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        found = made([*solo.endpoints, ("127.0.0.1", port)]).status()
    assert found[0] == {"endpoint": f"127.0.0.1:{solo.ports[0]}", "version": found[0]["version"],
                        "leads": True, "error": None}
    assert found[0]["version"].startswith("3.")
    assert found[1]["endpoint"] == f"127.0.0.1:{port}" and "is not there" in found[1]["error"]
    assert not found[1]["leads"]


@engine
def test_connections_are_kept_and_used_by_one_thread_at_a_time(made, solo):
    with Link(solo.ports[0]) as link:
        client = made(local(link.port))
        for _ in range(10):
            client.get("x")
        assert link.connections == 1
        link.hold()                     # so that none ends before the others have begun
        threads = [threading.Thread(target=client.get, args=("x",)) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_for(lambda: link.connections == 3)
        link.heal()
        for thread in threads:
            thread.join()
        assert link.connections == 3


@engine
def test_a_request_does_not_wait_for_an_acknowledgement(client):
    client.get("x")
    wait_for(lambda: took(client.get, "x")[0] < 0.03)       # Linux takes 40 ms for one, each time


# Clocks.

@engine
@pytest.mark.parametrize("shift, least, most", [(0, 0, 0), (-300, 280, 301),
                                                 (300, -301, -280)])
def test_the_offset_of_the_clock_is_what_is_certain(made, solo, shift, least, most):
    with Link(solo.ports[0]) as link:
        client = made(local(link.port))
        assert client.offset() is None
        link.shift_date(shift)
        client.get("x")
        assert least <= client.offset() <= most


@pytest.mark.parametrize("begun, ended, offset", [
    (1000.0, 1000.0, 0), (1000.99, 1000.99, 0), (999.5, 1001.5, 0), (998.0, 1004.0, 0),
    (1002.5, 1002.75, 1.5), (1002.5, 1009.0, 1.5), (998.5, 998.75, -1.25), (900, 998.75, -1.25)])
def test_a_date_says_what_the_offset_is_at_least(made, begun, ended, offset):
    """The answer was made from the second 1000 on, and before 1001."""
    client = made(local(1))
    client._way._note_clock(("127.0.0.1", 1), "Thu, 01 Jan 1970 00:16:40 GMT", begun, ended)
    assert client.offset() == offset


@engine
def test_the_offset_of_the_clock_is_that_of_most_endpoints(made, solo, monkeypatch):
    with Link(solo.ports[0]) as wrong:
        wrong.shift_date(3600)
        client = made([*solo.endpoints, ("127.0.0.1", wrong.port), ("localhost", solo.ports[0])])
        client.status()
        assert client.offset() == 0
        client = made(local(wrong.port, solo.ports[0]))
        client.status()
        assert -1801 < client.offset() < -1780
        monkeypatch.setattr(roexec, "_DATE_COUNTS", -1)
        assert client.offset() is None


# Users.

def administer(etcd, *requests):
    for path, body in requests:
        status, answer = etcd.ask(f"/v3/auth/{path}", body)
        assert status == 200, answer


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """An etcd with a user who may use keys that begin with mine/; tokens last some seconds."""
    with Etcd(tmp_path_factory.mktemp("etcd"), 1, "--auth-token-ttl", "3") as etcd:
        first, last = (base64.b64encode(text).decode() for text in (b"mine/", b"mine0"))
        administer(etcd, ("user/add", {"name": "root", "password": "r00t"}),
                   ("user/add", {"name": "me", "password": PASSWORD}),
                   ("role/add", {"name": "root"}), ("role/add", {"name": "roexec"}),
                   ("user/grant", {"user": "root", "role": "root"}),
                   ("user/grant", {"user": "me", "role": "roexec"}),
                   ("role/grant", {"name": "roexec", "perm": {
                       "permType": "READWRITE", "key": first, "range_end": last}}),
                   ("enable", {}))
        yield etcd


@engine
def test_a_user_logs_in_and_again_when_the_token_has_ended(guarded, made):
    client = made(guarded.endpoints, user="me", password=PASSWORD)
    client.put("mine/a", b"1")
    tokens = {client._way._token}
    for ask in (lambda: client.get("mine/a").value,
                lambda: client.txn([], [("get", "mine/a")])[1][0].value):
        client._way._token = "unknown.1"
        assert ask() == b"1"
        tokens.add(client._way._token)
    client._way._token = "unknown.1"
    with client.watch("mine/", 0, 0.2) as watch:
        assert list(watch) == []
    tokens.add(client._way._token)
    assert len(tokens) == 4 and "unknown.1" not in tokens
    client._way._token = ""             # as if etcd had wanted none before
    assert client.get("mine/a").value == b"1"


@engine
def test_a_token_that_has_ended_by_itself_is_replaced(guarded, made):
    client = made(guarded.endpoints, user="me", password=PASSWORD)
    client.put("mine/a", b"1")
    token = client._way._token

    def renewed():
        assert client.get("mine/a").value == b"1"
        time.sleep(4)                   # each use lets it last longer
        return client._way._token != token
    wait_for(renewed)


@engine
@pytest.mark.parametrize("user, password, key, text", [
    ("me", PASSWORD, "other", "its user needs a role"),
    ("me", "wr0ng-Pässword", "mine/a", "look at its user and the password"),
    ("nobody", PASSWORD, "mine/a", "look at its user and the password"),
    (None, None, "mine/a", "it wants a user"),
])
def test_who_may_not_is_told_what_to_do(guarded, made, user, password, key, text):
    client = made(guarded.endpoints, user=user, password=password)
    for ask in (lambda: client.put(key, b""), lambda: client.get(key)):
        error = refused(ask)
        assert text in str(error) and not error.unknown and not error.away
        assert "Pässword" not in str(error)
    if user == "me" and password == PASSWORD:
        assert "its user needs a role" in str(refused(client.watch, key, 0))


@engine
def test_a_user_may_be_given_where_etcd_wants_none(made, solo):
    client = made(solo.endpoints, user="me", password=PASSWORD)
    assert client.put("x", b"") > 0


# TLS.

@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """A folder with ca.pem and the certificates that it has signed: server, client."""
    openssl, folder = tool("openssl"), tmp_path_factory.mktemp("tls")
    (folder / "x.cnf").write_text(
        "subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\nsubjectKeyIdentifier=hash\n"
        "authorityKeyIdentifier=keyid\nextendedKeyUsage=serverAuth,clientAuth\n")

    def make(*words):
        subprocess.run([openssl, *words], cwd=folder, check=True, capture_output=True)
    new = "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"
    make(*new, "-x509", "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=ca",
         "-addext", "keyUsage=critical,keyCertSign,cRLSign")
    for number, name in enumerate(("server", "client"), 7):
        make(*new, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        make("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-out",
             f"{name}.pem", "-set_serial", str(number), "-days", "2", "-extfile", "x.cnf")
    return folder


def paths(ca=None, cert=None, key=None):
    return types.SimpleNamespace(ca=ca and str(ca), cert=cert and str(cert), key=key and str(key))


@pytest.fixture(scope="module")
def secure(authority, tmp_path_factory):
    """An etcd that wants the certificate of a client."""
    context = ssl.create_default_context(cafile=authority / "ca.pem")
    context.load_cert_chain(authority / "client.pem", authority / "client.key")
    files = {"cert-file": authority / "server.pem", "key-file": authority / "server.key",
             "trusted-ca-file": authority / "ca.pem"}
    with Etcd(tmp_path_factory.mktemp("etcd"), 1, "--client-cert-auth", tls=files,
              context=context) as etcd:
        yield etcd


@engine
def test_etcd_over_tls_is_asked_with_a_client_certificate(secure, authority, made):
    tls = paths(authority / "ca.pem", authority / "client.pem", authority / "client.key")
    client = made(secure.endpoints, tls=tls)
    revision = client.put("x", b"1")
    with client.watch("x", revision) as watch:
        assert next(iter(watch)).value == b"1"
    assert client.status()[0]["leads"] and client.offset() == 0


@engine
@pytest.mark.parametrize("files, text", [
    (("ca.pem", None, None), "certificate of this client"),
    ((None, "client.pem", "client.key"), "cannot be trusted"),
    (("client.key", None, None), "the ca of etcd, "),
    (("none", None, None), "No such file"),
    (("ca.pem", "client.pem", "server.key"), "the cert and key of etcd, "),
    (None, "only one side speaks TLS"),
])
def test_what_is_wrong_with_tls_is_told(secure, authority, made, files, text):
    tls = files and paths(*(name and authority / name for name in files))
    client = made(secure.endpoints, tls=tls)
    for ask in (lambda: client.put("x", b"1"), lambda: client.watch("x", 0)):
        error = refused(ask)
        assert text in str(error)
        assert not error.unknown or "has ended the connection" in str(error)


@engine
def test_tls_to_an_etcd_without_it_is_told(solo, made):
    error = refused(made(solo.endpoints, tls=paths()).put, "x", b"1")
    assert "only one side speaks TLS" in str(error) and not error.unknown


# Three members.

@pytest.fixture
def three(tmp_path):
    with Etcd(tmp_path, 3) as etcd:
        yield etcd


def works_again(ask, seconds):
    """The seconds until a call succeeds, and the errors before that."""
    begun, errors = time.monotonic(), []
    while True:
        try:
            ask()
            return time.monotonic() - begun, errors
        except EtcdError as error:
            errors.append(error)
            assert time.monotonic() - begun < seconds, error


@engine
def test_it_works_on_within_seconds_when_the_leader_is_killed(three, made):
    client, leader = made(three.endpoints), three.leader()
    while client._way._first != leader:
        client._way.leave(three.endpoints[client._way._first])
    lease = client.grant(60)
    client.put("x", b"1", lease)
    watch = client.watch("x", 0)
    three.members[leader].kill()
    client._way._timeout = 2
    works_again(lambda: client.put("x", b"2", lease), 5 + STALLS)
    works_again(lambda: client.keep_alive(lease), 5 + STALLS)
    client._way._timeout = 20
    with watch, pytest.raises(EtcdError, match="has ended a watch"):
        list(watch)
    with client.watch("x", watch.revision) as watch:
        assert b"2" in (entry.value for entry in watch)
    assert [bool(member["error"]) for member in client.status()].count(True) == 1


@engine
def test_a_member_that_stands_still_is_left_for_another(three, made):
    client, leader = made(three.endpoints), three.leader()
    follower = (leader + 1) % 3
    while client._way._first != follower:
        client._way.leave(three.endpoints[client._way._first])
    client.put("x", b"1")
    three.members[follower].pause()
    client._way._timeout = 1
    seconds, error = took(refused, client.put, "x", b"2")
    assert 0.9 < seconds < 1 + STALLS and error.unknown and "in time" in str(error)
    client._way._timeout = 20
    works_again(lambda: client.put("x", b"3"), 20)      # it may have been the one that led


@engine
def test_without_a_quorum_each_request_is_an_error_in_time(three, made):
    client = made(three.endpoints)
    works_again(lambda: client.put("x", b"1"), 60)
    lease = client.grant(60)
    client._way._timeout = 2
    with client.watch("x", 0) as watch:
        left = three.endpoints.index(watch._endpoint)
        for index, member in enumerate(three.members):
            if index != left:
                member.kill()
        for ask in (lambda: client.put("x", b"2"), lambda: client.get("x"),
                    lambda: client.keep_alive(lease), lambda: client.txn([], [("get", "x")])):
            times = []
            for _ in range(3):
                seconds, error = took(refused, ask)
                times.append(seconds)
                assert (error.unknown or "no leader" in str(error)
                        or "is not there" in str(error))
            assert min(times) < 4, "etcd itself would take seven seconds"
        with pytest.raises(EtcdError, match="no leader"):
            list(watch)
    client._way._timeout = 20
    error = refused(client.put, "x", b"2")
    assert not error.unknown and "more than half of its members" in str(error)
    for index, member in enumerate(three.members):
        if index != left:
            member.start()
    works_again(lambda: client.put("x", b"3"), 60)
    assert client.get("x").value == b"3"


# The way to etcd fails.

@engine
@pytest.mark.parametrize("reset", [False, True])
def test_what_was_done_though_the_answer_was_lost_is_unknown(made, solo, reset):
    with Link(solo.ports[0]) as link:
        client, key = made(local(link.port), 2), f"lost/{reset}"
        link.drop_replies(reset)
        errors = [refused(client.put, key, b"done"),
                  refused(client.txn, [], [("put", key + "2", b"done")])]
        assert all(error.unknown and error.away for error in errors)
        link.heal()
        client._way._timeout = 20
        for each in (key, key + "2"):
            assert wait_for(lambda: client.get(each)).value == b"done"


@engine
def test_what_was_not_sent_is_known_not_to_be_done(made, solo):
    with Link(solo.ports[0]) as link:
        client = made(local(link.port))
        client.get("cut")
        link.cut()
        wait_for(lambda: not refused(client.put, "cut", b"").unknown)
        link.heal()
        assert client.get("cut") is None


@engine
def test_a_connection_that_has_ended_meanwhile_is_opened_again(made, solo):
    with Link(solo.ports[0]) as link:
        client = made(local(link.port))
        client.get("x")
        link.cut()
        link.heal()
        client.put("x", b"1")
        assert link.connections == 2


class Speaker(socketserver.ThreadingTCPServer):
    """Says `answer` to each request: bytes, an (HTTP status, object), or what a function of the
    connection and the request (path, headers, object) says; then it ends the connection."""
    daemon_threads = True

    def __init__(self, answer):
        self.answer, self.requests = answer, []
        super().__init__(("127.0.0.1", 0), SpeakerHandler)
        self.port = self.server_address[1]
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self.thread.start()

    def handle_error(self, request, client_address):
        pass                            # its client has gone

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()
        self.thread.join()


class SpeakerHandler(socketserver.StreamRequestHandler):
    def handle(self):
        path = self.rfile.readline().decode().split()[1].removeprefix("/v3/")
        headers = http.client.parse_headers(self.rfile)
        body = json.loads(self.rfile.read(int(headers["Content-Length"])))
        self.server.requests.append((path, headers, body))
        answer = self.server.answer
        if callable(answer):
            answer = answer(self.request, path, headers, body)
        if isinstance(answer, tuple):
            answer = http_answer(*answer)
        self.wfile.write(answer or b"")


def http_answer(status, content):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return (b"HTTP/1.1 %d X\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"
            % (status, len(data), data))


HEADER = {"header": {"revision": "7"}}


@pytest.mark.parametrize("answer, unknown, away, text", [
    ((200, {}), True, True, "answers 200 and nothing of etcd's API v3; is that etcd, of 3.4"),
    ((200, {"header": {"revision": "x"}}), True, True, "nothing of etcd's API"),
    ((200, {"header": {"revision": "0"}}), True, True, "nothing of etcd's API"),
    ((200, [HEADER]), True, True, "nothing of etcd's API"),
    ((200, b"<html>"), True, True, "nothing of etcd's API v3; is"),
    ((200, b"[" * 3900), True, True, "nothing of etcd's API"),
    ((301, b""), True, True, "answers 301"),
    ((400, {"error": "bad", "message": "bad", "code": 3}), False, False, "refuses: bad"),
    ((404, b"Not Found\n"), False, True, "answers 404 and nothing of etcd's API v3 (Not Found)"),
    ((404, {"code": 5, "message": "etcdserver: not there"}), False, False, "refuses: etcd"),
    ((408, {"error": "slow"}), True, True, "fails: slow"),
    ((429, {"error": "etcdserver: mvcc: database space exceeded"}), False, False, "defragment it"),
    ((500, {"error": "context deadline exceeded", "code": 2}), True, True, "fails: context"),
    ((503, {"error": "etcdserver: request timed out", "code": 14}), True, True, "fails: etcd"),
    ((503, {"error": "etcdserver: no leader", "code": 14}), False, True, "more than half of"),
    ((503, {"code": 14, "message": "etcdserver: no leader"}), False, True, "more than half of"),
    ((503, b"\xff\x00 proxy"), True, True, "answers 503"),
    ((200, {"error": {"grpc_code": 14, "http_code": 503, "message": "end"}}), True, True, "end"),
    ((200, {"error": {"grpc_code": 5, "http_code": 404, "message": "gone"}}), False, False, "gone"),
    ((200, {"error": {"code": 14, "message": "ended"}}), True, True, "fails: ended"),
    (b"SSH-2.0-x\r\n", True, True, "the answer is no HTTP"),
    (b"", True, True, "has ended the connection without an answer"),
    (http_answer(200, HEADER)[:-5], True, True, "ends too early"),
    ((200, {**HEADER, "x": "y" * 5000}), True, True, "larger than 4.0 kB"),
    (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200, True, True, "no HTTP"),
])
def test_each_answer_that_is_none_says_whether_it_may_have_been_done(
        made, monkeypatch, answer, unknown, away, text):
    monkeypatch.setattr(roexec, "_MOST_OF_ETCD", 4000)
    with Speaker(answer) as speaker:
        error = refused(made(local(speaker.port)).put, "x", b"secret value")
    assert text in str(error) and str(error).startswith("etcd at 127.0.0.1:")
    assert (error.unknown, error.away) == (unknown, away)


@pytest.mark.parametrize("host, text", [
    ("nowhere.invalid", "the name nowhere.invalid is not known"), ("a" * 70, "is not known"),
    ("::1", "etcd at [::1]:1 ")])
def test_who_cannot_be_reached_has_done_nothing(made, host, text):
    error = refused(made([(host, 1)]).put, "x", b"")
    assert text in str(error) and not error.unknown and error.away


def drip(data, first=b""):
    """Say it byte by byte, and again and again."""
    def answer(connection, *_):
        with contextlib.suppress(OSError):
            connection.sendall(first)
            for number in itertools.count():
                connection.sendall(data[number % len(data):][:1])
                time.sleep(0.02)
    return answer


def be_silent(connection, *_):
    connection.recv(1)                  # until the other side ends it


def be_silent_within(connection, *_):
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{")
    connection.recv(1)


SLOW = [
    be_silent, be_silent_within, drip(b"HTTP/1.1 200 OK\r\nX: y\r\n"),
    drip(b"1", b"HTTP/1.1 200 OK\r\n\r\n"),
    drip(b"1\r\n{\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")]


@pytest.mark.parametrize("answer", SLOW, ids=range(len(SLOW)))
def test_nothing_takes_longer_than_its_deadline(made, answer):
    with Speaker(answer) as speaker:
        client = made(local(speaker.port), 0.8)
        for ask, argument, unknown in ((client.put, b"", True), (client.watch, 0, False)):
            seconds, error = took(refused, ask, "x", argument)
            assert 0.7 < seconds < STALLS and "does not answer in time" in str(error)
            assert error.unknown is unknown and error.away
        seconds, members = took(client.status)
        assert seconds < STALLS and "does not answer in time" in members[0]["error"]


def test_a_name_service_that_is_silent_is_waited_for_no_longer(made, monkeypatch):
    done = threading.Event()
    monkeypatch.setattr(roexec.socket, "getaddrinfo", lambda *_, **__: done.wait(20) and [])
    seconds, error = took(refused, made([("localhost", 1)], 0.3).put, "x", b"")
    done.set()
    assert seconds < STALLS and not error.unknown


def test_a_handshake_that_does_not_end_is_waited_for_no_longer(made):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = made(local(silent.getsockname()[1]), 0.3, tls=paths())
        for ask in (lambda: client.put("x", b""), lambda: client.watch("x", 0)):
            seconds, error = took(refused, ask)
            assert seconds < STALLS and not error.unknown and "in time" in str(error)


# Endpoints.

def test_another_endpoint_is_asked_at_once_where_nothing_was_done(made):
    no_leader = 503, {"error": "etcdserver: no leader", "code": 14}
    with Speaker((200, HEADER)) as good, Speaker(no_leader) as bad:
        client = made([("127.0.0.1", 1), *local(bad.port, good.port)])
        assert [client.put("x", b"") for _ in range(3)] == [7, 7, 7]
        assert len(bad.requests) == 1 and len(good.requests) == 3
        good.answer = bad.answer
        error = refused(client.put, "x", b"")
    assert all(f":{port}" in str(error) for port in (1, bad.port, good.port)) and not error.unknown


def test_no_other_endpoint_is_asked_once_the_time_is_over(made):
    with socket.create_server(("127.0.0.1", 0)) as silent, \
            Link(silent.getsockname()[1]) as other:
        client = made(local(other.target_port, other.port), 0.3, tls=paths())
        assert not refused(client.put, "x", b"").unknown and other.connections == 0
        refused(client.put, "x", b"")
        wait_for(lambda: other.connections == 1)


def test_after_a_failure_another_endpoint_is_asked(made):
    with Speaker((200, HEADER)) as good, Speaker((500, {"error": "x"})) as bad:
        client = made(local(bad.port, good.port))
        assert refused(client.put, "x", b"").unknown
        assert client.put("x", b"") == 7 and len(bad.requests) == 1
        good.answer = 400, {"error": "no"}
        assert "no" in str(refused(client.put, "x", b""))       # which is nobody's failure
        good.answer = 200, HEADER
        assert client.put("x", b"") == 7 and len(bad.requests) == 1


# What may not be told.

@pytest.mark.parametrize("answer", [
    lambda token: (400, {"error": f"the password {PASSWORD} of {token}"}),
    lambda token: (500, {"error": {"message": f"{PASSWORD} {token}"}}),
    lambda token: (502, f"{PASSWORD} {token}".encode()),
    lambda token: (200, {"token": f"{token}\n{PASSWORD}"}),
    lambda token: (200, f"{PASSWORD} {token}".encode()),
    lambda token: (200, {"result": {"canceled": True, "cancel_reason": f"{PASSWORD} {token}"}}),
    lambda token: f"HTTP/1.1 {token} {PASSWORD}\r\n\r\n".encode(),
    lambda token: f"{token} {PASSWORD}\r\n\r\n".encode(),
])
@pytest.mark.parametrize("fails", ["auth/authenticate", "kv/put", "watch"])
def test_no_error_tells_a_password_or_a_token(made, answer, fails):
    token = "t0k3n.of.etcd"

    def speak(connection, path, headers, body):
        if path == fails:
            return answer(token)
        assert path != "kv/put" or headers["Authorization"] == token
        return 200, {"token": token} if path == "auth/authenticate" else HEADER
    with Speaker(speak) as speaker:
        client = made(local(speaker.port), user="me", password=PASSWORD)
        error = refused(client.watch, "x", 0) if fails == "watch" else refused(client.put, "x", b"")
    told = str(error) + error.reason
    assert PASSWORD not in told and (token not in told or fails == "auth/authenticate")
    assert fails != "auth/authenticate" or not error.unknown    # the put was not sent


@pytest.mark.parametrize("answer", [{"token": "t0k3n.of\netcd"}, {"tokens": "t0k3n.of.etcd"}])
def test_an_answer_with_a_token_that_is_none_is_not_told(made, answer):
    with Speaker((200, answer)) as speaker:
        error = refused(made(local(speaker.port), user="me", password=PASSWORD).put, "x", b"")
    assert "t0k3n" not in str(error) + error.reason and not error.unknown


def test_a_watch_that_is_denied_is_asked_for_with_a_new_token(made):
    """Older releases say so of an old token."""
    denied = {"result": {**HEADER, "canceled": True, "cancel_reason": "permission denied"}}

    def speak(connection, path, headers, body):
        if path == "watch":
            return stream(denied if headers["Authorization"] == "t1" else CREATED)
        tokens.append(f"t{len(tokens) + 1}")
        return 200, {"token": tokens[-1]}
    tokens = []
    with Speaker(speak) as speaker:
        client = made(local(speaker.port), user="me", password=PASSWORD)
        for count in (1, 2):
            with contextlib.suppress(EtcdError), client.watch("x", 7):
                assert count == 2
            assert tokens == ["t1", "t2"][:count]


# Watches that are none.

def stream(*lines):
    return b"HTTP/1.1 200 OK\r\n\r\n" + b"".join(
        line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)


CREATED = {"result": {**HEADER, "created": True}}
EVENT = {"result": {**HEADER, "events": [{"kv": {"key": "eA==", "mod_revision": "7"}}]}}


@pytest.mark.parametrize("lines, count, text", [
    ([CREATED, EVENT], 1, "has ended a watch"),
    ([CREATED, EVENT, json.dumps(EVENT).encode()[:-5]], 1, "nothing of etcd's API"),
    ([CREATED, EVENT, b"{" * 5000], 1, "nothing of etcd's API"),
    ([CREATED, {"result": {**HEADER, "events": [{}]}}], 0, "nothing of etcd's API"),
    ([CREATED, {"error": {"http_code": 503, "message": "etcdserver: no leader"}}], 0, "no leader"),
    ([CREATED, {"result": {**HEADER, "canceled": True, "compact_revision": "9"}}], 0, "compacted"),
    ([EVENT], 1, "has ended a watch"),
])
def test_a_watch_that_breaks_is_an_error(made, monkeypatch, lines, count, text):
    monkeypatch.setattr(roexec, "_MOST_OF_ETCD", 4000)
    with Speaker(stream(*lines)) as speaker, made(local(speaker.port)).watch("x", 7) as watch:
        seen = []
        with pytest.raises(EtcdError, match=text) as caught:
            for entry in watch:
                seen.append(entry)
    assert len(seen) == count and watch.revision == 7 + count and not caught.value.unknown


def test_after_a_watch_that_breaks_another_endpoint_is_asked(made):
    with Speaker(stream(CREATED)) as bad, Speaker((200, HEADER)) as good:
        client = made(local(bad.port, good.port))
        with client.watch("x", 7) as watch, pytest.raises(EtcdError):
            list(watch)
        assert client.put("x", b"") == 7 and len(bad.requests) == 1


def test_a_page_that_says_there_is_more_has_something(made):
    with Speaker((200, {**HEADER, "more": True})) as speaker:
        assert "nothing of etcd's API" in str(refused(made(local(speaker.port)).get_prefix, "x"))


def test_a_watch_with_endless_messages_ends_in_time(made):
    def babble(connection, *_):
        with contextlib.suppress(OSError):
            connection.sendall(stream(CREATED))
            while True:
                connection.sendall(json.dumps(CREATED).encode() + b"\n")
    with Speaker(babble) as speaker, made(local(speaker.port)).watch("x", 7, 0.3) as watch:
        seconds, events = took(list, watch)
    assert events == [] and seconds < STALLS


# Whatever is answered.

def test_whatever_is_answered_only_an_etcd_error_is_raised(made, monkeypatch):
    chance = random.Random(9)
    kv = {"key": "eA==", "value": "eQ==", "mod_revision": "3", "create_revision": "2", "lease": "1"}
    good = [
        {**HEADER, "kvs": [kv, kv], "count": "2"}, {**HEADER, "ID": "5", "TTL": "5"},
        {"result": {**HEADER, "ID": "5", "TTL": "5"}}, {**HEADER, "deleted": "1", "token": "t"},
        {**HEADER, "succeeded": True, "responses": [
            {"response_put": HEADER}, {"response_range": {"kvs": [kv]}},
            {"response_delete_range": {"deleted": "1"}}]},
        {"result": {**HEADER, "created": True,
                    "events": [{"kv": kv}, {"type": "DELETE", "kv": kv}]}},
        {"error": "x", "code": 3, "message": "x"}, {"error": {"http_code": 503, "message": "x"}},
        {**HEADER, "version": "3.4", "leader": "1", "errors": ["x"]}]
    odd = [None, True, -1, 1e400, "", "x", "é", "9" * 5000, [], {}, [[]], [None], {"": None}, 1.5]

    def spoil(value):
        if chance.random() < 0.15:
            return chance.choice(odd)
        if isinstance(value, dict):
            return {name: spoil(each) for name, each in value.items() if chance.random() > 0.1}
        return [spoil(each) for each in value] if isinstance(value, list) else value

    def answer(connection, *_):
        data = json.dumps(spoil(chance.choice(good))).encode() + b"\n"
        text = http_answer(chance.choice([200, 200, 200, 400, 404, 503]), data)
        text = text.replace(b"\r\n\r\n", b"\r\nDate: %b\r\n\r\n" % chance.choice(
            [b"Wed, 25 Nov 2026 23:31:06 GMT", b"x", b"Wed, 99 Nov 99999 99:99:99 GMT", b""]))
        if chance.random() < 0.3:
            place = chance.randrange(len(text))
            text = text[:place] + chance.choice([b"", b"\xff", b"\n", b"9"]) + text[place + 1:]
        return text[:chance.randrange(len(text))] if chance.random() < 0.1 else text

    with Speaker(answer) as speaker:
        client = made(local(speaker.port), 0.5)
        for _ in range(40):
            for ask in (lambda: client.get("x"), lambda: client.get_prefix("x"),
                        lambda: client.put("x", b""), lambda: client.delete("x"),
                        lambda: client.grant(5), lambda: client.keep_alive(5),
                        lambda: client.revoke(5), client.status, client.offset,
                        lambda: client.txn([], [("put", "x", b""), ("get", "x"), ("delete", "x")])):
                with contextlib.suppress(EtcdError):
                    ask()
            with contextlib.suppress(EtcdError), client.watch("x", 1, 0.2) as watch:
                list(watch)
