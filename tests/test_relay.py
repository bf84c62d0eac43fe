"""Requests that another node of a cluster has to answer, between two real servers."""
import contextlib
import errno
import http.client
import json
import shutil

import pytest
from helpers import serve, wait_for
from served import LOG, database, record, row_of, said, write_log  # noqa: F401 (fixtures)

import roexec
from roexec import Store

ALL = "roexec-token-of-all"


class Cluster:
    """What a node knows of its cluster, as far as requests need it."""
    settings = "those of a cluster"

    def __init__(self, name):
        self.name, self.key, self.others, self.leading = name, f"key-of-{name}", {}, None

    def leads(self):
        return self.leading == self.name

    def leader(self):
        return self.leading

    def url_of(self, node):
        return self.others[node].url if node in self.others else None

    def node_of_key(self, text):
        return next((name for name, other in self.others.items() if other.key == text), None)

    def status(self):
        return {"node": self.name, "role": "leader" if self.leads() else "follower"}

    def step_down(self):
        self.leading = None


@pytest.fixture
def nodes(tmp_path, monkeypatch, database, said):  # noqa: F811
    """{"a": server, "b": server} of a cluster of two, which a leads; both know the same tokens."""
    monkeypatch.setenv("TZ", "UTC")
    servers = {}
    for name in "ab":
        (tmp_path / name).mkdir(0o700)
        shutil.copy(database, tmp_path / name)
        store = Store(str(tmp_path / name)).create()
        store.name = name
        with store.write() as db:
            for token, scopes in (("all", "*"), ("viewer", "job:read,run:list,log:read")):
                db.execute("INSERT INTO tokens VALUES (?, ?, ?, NULL, 0, NULL, NULL)",
                           (token, roexec._token_digest(f"roexec-token-of-{token}"), scopes))
        servers[name] = serve(store, said)
        servers[name].cluster = Cluster(name)
    for name, other in ("ab", "ba"):
        mine = servers[name].cluster
        mine.leading, mine.others = "a", {other: servers[other].cluster}
        mine.url = "http://%s:%d" % servers[name].address
    yield servers
    for server in servers.values():
        server.close()
    assert not said


@pytest.fixture
def ask(nodes):
    """`ask(node, method, path)` -> (status, payload or bytes, headers)."""
    def ask(node, method, path, body=None, token=ALL, **headers):
        headers = {name.replace("_", "-"): text for name, text in headers.items()}
        headers["Authorization"] = f"Bearer {token}"
        with contextlib.closing(http.client.HTTPConnection(
                *nodes[node].address, timeout=60)) as connection:
            connection.request(method, f"/api/v1{path}", None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            content = answer.read()
        if answer.headers["Content-Type"] == "application/json":
            content = json.loads(content)
        return answer.status, content, answer.headers
    return ask


def runs_of(server):
    with server.store.read() as db:
        return [row["job_id"] for row in roexec.list_runs(db)]


def audited(server):
    with server.store.read() as db:
        return [(row["who"], row["action"]) for row in roexec.list_audit(db, 10)]


def test_what_a_follower_is_asked_to_start_the_leader_starts_in_the_name_of_the_caller(nodes, ask):
    status, run, headers = ask("b", "POST", "/jobs/hello/run", {"env": {"A": "1"}},
                               Idempotency_Key="k")
    assert status == 202 and headers["Location"] == f"/api/v1/runs/{run['id']}"
    assert runs_of(nodes["a"]) == ["hello"] and runs_of(nodes["b"]) == []
    assert audited(nodes["a"])[0] == ("token all", "run")
    again = ask("b", "POST", "/jobs/hello/run", {"env": {"A": "1"}}, Idempotency_Key="k")
    assert again[1]["id"] == run["id"] and again[2]["Idempotency-Replayed"] == "true"


def test_the_leader_answers_itself_and_so_does_each_node_what_is_only_read(nodes, ask):
    assert ask("a", "POST", "/jobs/hello/run")[0] == 202
    assert len(ask("a", "GET", "/runs")[1]["runs"]) == 1 and ask("b", "GET", "/runs")[1][
        "runs"] == []


@pytest.mark.parametrize("method, path, body, status", [
    ("PUT", "/jobs/new", {"command": "true"}, 201), ("DELETE", "/jobs/hello", None, 200),
    ("POST", "/jobs/hello/pause", {}, 200), ("POST", "/apply", {"jobs": []}, 200),
    ("POST", "/tokens", {"name": "n", "scopes": ["job:read"]}, 201),
    ("DELETE", "/tokens/viewer", None, 204), ("DELETE", "/jobs/unknown", None, 404),
    ("PUT", "/jobs/new", {"comand": "true"}, 422), ("POST", "/runs/latest/cancel", {}, 404),
    ("POST", "/cluster/step-down", {}, 202),
])
def test_all_that_changes_something_is_the_leaders_with_its_status_and_its_errors(
        nodes, ask, method, path, body, status):
    before = nodes["b"].store, roexec.count_changes
    with before[0].read() as db:
        count = roexec.count_changes(db)
    assert ask("b", method, path, body)[0] == status
    with before[0].read() as db:
        assert roexec.count_changes(db) == count


def test_without_a_leader_changes_are_refused_and_reads_are_answered(nodes, ask):
    nodes["b"].cluster.leading = None
    status, payload, headers = ask("b", "POST", "/jobs/hello/run")
    assert (status, payload["error"]["code"], headers["Retry-After"]) == (503, "no_leader", "5")
    assert ask("b", "GET", "/jobs")[0] == 200


def test_a_leader_that_does_not_answer_is_named(nodes, ask):
    nodes["a"].close()
    status, payload, _ = ask("b", "POST", "/jobs/hello/run")
    assert status == 503 and "the node a (http://127.0.0.1:" in payload["error"]["message"]


def test_scopes_are_judged_where_the_caller_came_to_and_where_the_request_went(nodes, ask):
    viewer = "roexec-token-of-viewer"
    assert ask("b", "POST", "/jobs/hello/run", token=viewer)[0] == 403
    request = {"Roexec-Caller": json.dumps({"name": "token t", "scopes": ["run:create"],
                                            "pattern": "backup*"})}
    key = nodes["b"].cluster.key
    assert ask("a", "POST", "/jobs/hello/run", token=key, **request)[0] == 404
    assert ask("a", "POST", "/jobs/backup/run", token=key, **request)[0] == 202
    assert ask("a", "DELETE", "/jobs/backup", token=key, **request)[0] == 403


@pytest.mark.parametrize("told", [None, "", "{", "[]", '{"name": "x"}', '{"scopes": ["*"]}', "7"])
def test_a_node_that_does_not_say_who_asks_is_refused(nodes, ask, told):
    headers = {} if told is None else {"Roexec-Caller": told}
    assert ask("a", "GET", "/jobs", token=nodes["b"].cluster.key, **headers)[0] == 400


def test_whom_a_request_is_for_means_nothing_without_the_key_of_a_node(nodes, ask):
    claim = {"Roexec-Caller": json.dumps({"name": "x", "scopes": ["*"], "pattern": None})}
    viewer = "roexec-token-of-viewer"
    assert ask("a", "DELETE", "/jobs/hello", token=viewer, **claim)[0] == 403
    assert ask("a", "DELETE", "/jobs/hello", token="key-of-c", **claim)[0] == 401


def test_a_node_whose_key_the_leader_does_not_know_yet_asks_for_patience(nodes, ask):
    nodes["a"].cluster.others = {}
    status, answer, headers = ask("b", "DELETE", "/jobs/hello")
    assert (status, headers["Retry-After"]) == (503, "5")
    assert "does not know this one" in answer["error"]["message"]


def test_a_request_that_was_passed_on_is_not_passed_on_again(nodes, ask):
    for server in nodes.values():
        server.cluster.leading = "b" if server.cluster.name == "a" else "a"
    assert ask("b", "POST", "/jobs/hello/run")[0] == 202
    assert runs_of(nodes["a"]) == ["hello"]


def elsewhere(nodes, state="succeeded", **values):
    """A run of a, with its log, as both nodes know it -> its id."""
    log = write_log(nodes["a"].store, "x.log", LOG)
    run_id = record(nodes["a"].store, state=state, log=log, **values)
    row = dict(row_of(nodes["a"].store, run_id))
    with nodes["b"].store.write() as db:
        roexec.add_run(db, **{**row, "node": "a", "seq": None})
    return run_id


def test_the_log_of_a_run_is_read_on_its_node(nodes, ask):
    run_id = elsewhere(nodes)
    status, content, headers = ask("b", "GET", f"/runs/{run_id}/logs?offset=0&stream=err")
    assert (status, headers["Roexec-Log-Size"]) == (200, str(len(LOG)))
    assert content == ask("a", "GET", f"/runs/{run_id}/logs?offset=0&stream=err")[1] != b""
    events = ask("b", "GET", f"/runs/{run_id}/logs?follow=1", Accept="text/event-stream")[1]
    assert b"three" in events and b"event: end" in events
    assert ask("b", "HEAD", f"/runs/{run_id}/logs")[:2] == (200, b"")


def test_the_node_of_a_run_is_shown(nodes, ask):
    run_id = elsewhere(nodes)
    assert [ask(node, "GET", f"/runs/{run_id}")[1]["node"] for node in "ab"] == ["a", "a"]


def test_a_run_is_cancelled_on_its_node_even_where_another_one_leads(nodes, ask):
    run_id = elsewhere(nodes, "queued")
    for server in nodes.values():
        server.cluster.leading = "b"
    assert ask("b", "POST", f"/runs/{run_id}/cancel")[0] == 202
    assert row_of(nodes["a"].store, run_id)["state"] == "cancelled"
    nodes["b"].cluster.others.clear()
    status, payload, _ = ask("b", "POST", f"/runs/{run_id}/cancel")
    assert status == 503 and "the node a cannot be reached" in payload["error"]["message"]


def test_who_leads_can_be_asked_of_every_node(nodes, ask):
    assert [ask(node, "GET", "/cluster")[1]["role"] for node in "ab"] == ["leader", "follower"]
    nodes["a"].cluster = None
    status, payload, _ = ask("a", "GET", "/cluster")
    assert (status, payload["error"]["code"]) == (404, "no_cluster")


def test_a_run_of_another_node_that_is_to_be_replaced_is_cancelled_there_once(nodes):
    run_id = elsewhere(nodes, "queued")
    store, cluster, told = nodes["b"].store, nodes["b"].cluster, []
    cancels = roexec.CancelsElsewhere(store, cluster, lambda text, level: told.append(text))
    cancels()
    with store.write() as db:
        roexec.ask_to_cancel(db, run_id, "replaced")
    cancels()                           # this node does not lead
    for server in nodes.values():
        server.cluster.leading = "b"
    assert row_of(nodes["a"].store, run_id)["state"] == "queued"
    cancels()
    wait_for(lambda: row_of(nodes["a"].store, run_id)["state"] == "cancelled")
    assert audited(nodes["a"])[0] == ("node b", "cancel")
    assert row_of(nodes["a"].store, run_id)["reason"] == "replaced"
    cancels()                           # that it has ended is not known here yet
    nodes["b"].cluster.others.clear()
    cancels.asked.clear()
    cancels()
    wait_for(lambda: told)
    assert told == [f"Run {run_id} of the node a is to be replaced, which cannot be told: "
                    f"[Errno {errno.EHOSTUNREACH}] it is not there"]


def test_a_cancel_that_could_not_be_passed_on_is_passed_on_later(nodes, monkeypatch):
    monkeypatch.setattr(roexec, "_CANCEL_PAUSE", 0.01)
    faults, asked_of, told = [OSError("it stalls"), roexec.Response(status=503)], \
        roexec._asked_of, []

    def asked(*words):
        if not faults:
            return asked_of(*words)
        fault = faults.pop(0)
        if isinstance(fault, OSError):
            raise fault
        return fault
    monkeypatch.setattr(roexec, "_asked_of", asked)
    run_id, store = elsewhere(nodes, "queued"), nodes["b"].store
    cancels = roexec.CancelsElsewhere(store, nodes["b"].cluster,
                                      lambda text, level: told.append(text))
    with store.write() as db:
        roexec.ask_to_cancel(db, run_id, "replaced")
    nodes["b"].cluster.leading = "b"
    wait_for(lambda: cancels() or row_of(nodes["a"].store, run_id)["state"] == "cancelled")
    assert [text.rpartition(": ")[2] for text in told] == [
        "it stalls", f"[Errno {errno.EPROTO}] it answers 503"]
