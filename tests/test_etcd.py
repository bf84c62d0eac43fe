"""What is asked of etcd, and what becomes of it where etcd, or the way to it, fails."""
import base64
import contextlib
import socket
import ssl
import subprocess
import threading
import time
import types

import pytest
from engines import Etcd
from helpers import tool, wait_for
from links import Link

import roexec
from roexec import EtcdClient, EtcdEntry, EtcdError

engine = pytest.mark.engine
PASSWORD = "s3cr3t-Pässword"


@pytest.fixture
def made():
    """`made(endpoints, **options)` -> an EtcdClient; all are closed at the end."""
    with contextlib.ExitStack() as stack:
        def make(endpoints, timeout=5, **options):
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
    lease = client.grant(1)
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
    prefix, lease = client.prefix, client.grant(1)
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
def test_a_watch_ends_after_its_time_and_goes_on_where_it_was(client):
    with client.watch(client.prefix, 0, seconds=0.5) as watch:
        first = client.put(client.prefix, b"1")
        seconds, events = took(list, watch)
    assert [entry.value for entry in events] == [b"1"] and seconds < 5
    assert watch.revision == first + 1
    client.put(client.prefix, b"2")
    with client.watch(client.prefix, watch.revision, seconds=0.5) as watch:
        assert [entry.value for entry in watch] == [b"2"]


@engine
def test_a_watch_is_ended_by_another_thread(client):
    with client.watch(client.prefix, 0) as watch:
        timer = threading.Timer(0.2, watch.close)
        timer.start()
        seconds, events = took(list, watch)
    assert events == [] and seconds < 5
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
        link.delay(0.2)
        threads = [threading.Thread(target=client.get, args=("x",)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert link.connections == 3


@engine
def test_a_request_does_not_wait_for_an_acknowledgement(client):
    client.get("x")
    assert took(lambda: [client.get("x") for _ in range(50)])[0] < 50 * 0.03


# Clocks.

@engine
@pytest.mark.parametrize("shift, least, most", [(0, 0, 0), (-30, 28, 31), (30, -31, -28)])
def test_the_offset_of_the_clock_is_what_is_certain(made, solo, shift, least, most):
    with Link(solo.ports[0]) as link:
        client = made(local(link.port))
        assert client.offset() is None
        link.shift_date(shift)
        for _ in range(5):
            client.get("x")
            assert least <= client.offset() <= most
            time.sleep(0.15)            # other places in a second


@engine
def test_the_offset_of_the_clock_is_that_of_most_endpoints(made, solo, monkeypatch):
    with Link(solo.ports[0]) as wrong:
        wrong.shift_date(3600)
        client = made([*solo.endpoints, ("127.0.0.1", wrong.port), ("localhost", solo.ports[0])])
        client.status()
        assert client.offset() == 0
        client = made(local(wrong.port, solo.ports[0]))
        client.status()
        assert -1801 < client.offset() < -1799
        monkeypatch.setattr(roexec, "_DATE_COUNTS", -1)
        assert client.offset() is None


# Users.

def administer(etcd, *requests):
    for path, body in requests:
        status, answer = etcd.ask(f"/v3/auth/{path}", body)
        assert status == 200, answer


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """An etcd with a user who may use keys that begin with mine/; tokens last a second."""
    with Etcd(tmp_path_factory.mktemp("etcd"), 1, "--auth-token-ttl", "1") as etcd:
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
    assert len({*tokens, client._way._token}) == 4


@engine
def test_a_token_that_has_ended_by_itself_is_replaced(guarded, made):
    client = made(guarded.endpoints, user="me", password=PASSWORD)
    client.put("mine/a", b"1")
    token = client._way._token

    def renewed():
        assert client.get("mine/a").value == b"1"
        time.sleep(1.1)
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
    with client.watch("x", revision, 0.5) as watch:
        assert [entry.value for entry in watch] == [b"1"]
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
    client, leader = made(three.endpoints, 2), three.leader()
    while client._way._first != leader:
        client._way.leave(three.endpoints[client._way._first])
    lease = client.grant(10)
    client.put("x", b"1", lease)
    watch = client.watch("x", 0)
    three.members[leader].kill()
    assert works_again(lambda: client.put("x", b"2", lease), 5)[0] < 5
    assert works_again(lambda: client.keep_alive(lease), 5)[0] < 5
    with watch, pytest.raises(EtcdError, match="has ended a watch"):
        list(watch)
    with client.watch("x", watch.revision, 1) as watch:
        assert [entry.value for entry in watch][-1:] == [b"2"]
    assert [bool(member["error"]) for member in client.status()].count(True) == 1


@engine
def test_a_member_that_stands_still_is_left_for_another(three, made):
    client, leader = made(three.endpoints, 1), three.leader()
    follower = (leader + 1) % 3
    while client._way._first != follower:
        client._way.leave(three.endpoints[client._way._first])
    client.put("x", b"1")
    three.members[follower].pause()
    seconds, error = took(refused, client.put, "x", b"2")
    assert 0.9 < seconds < 1.5 and error.unknown and "in time" in str(error)
    assert took(client.put, "x", b"3")[0] < 0.9


@engine
def test_without_a_quorum_each_request_is_an_error_in_time(three, made):
    client, leader = made(three.endpoints, 2), three.leader()
    client.put("x", b"1")
    lease = client.grant(60)
    with client.watch("x", 0) as watch:
        left = three.endpoints.index(watch._endpoint)
        for index, member in enumerate(three.members):
            if index != left:
                member.kill()
        for ask in (lambda: client.put("x", b"2"), lambda: client.get("x"),
                    lambda: client.keep_alive(lease), lambda: client.txn([], [("get", "x")])):
            for _ in range(3):
                seconds, error = took(refused, ask)
                assert seconds < 2.5 and (error.unknown or "no leader" in str(error)
                                          or "is not there" in str(error))
        with pytest.raises(EtcdError, match="no leader"):
            list(watch)
    seconds, error = took(refused, client.put, "x", b"2")
    assert seconds < 1 and not error.unknown and "more than half of its members" in str(error)
    for index, member in enumerate(three.members):
        if index != left:
            member.start()
    works_again(lambda: client.put("x", b"3"), 20)
    assert client.get("x").value == b"3"
