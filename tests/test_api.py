"""The HTTP API: who is let in, what is answered, and how little a client can do to the server."""
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest

from helpers import basic, serve, status_of, token, wait_for
from served import (LOG, NOW, ask, connection, database, error, logged, needs_tables,  # noqa: F401
                    pages, record, row_of, running, said, server, store, write_log)

import roexec
from roexec import (Place, Refusal, Request, Route, gate, json_response, parse_head,
                    start_http)

OWNER = roexec.Caller(name="user me", scopes=("*",), owner=True)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become other users")


# Jobs and runs.

@needs_tables
def test_jobs_are_listed_as_the_command_line_has_them(ask, store):
    status, payload, headers = ask("/jobs")
    assert status == 200 and payload["next"] is None
    assert [job["id"] for job in payload["jobs"]] == ["backup", "hello", "replaced"]
    assert payload["jobs"][0] == ask("/jobs/backup")[1]
    with store.read() as db:
        assert payload["jobs"] == roexec.job_payloads(db, roexec.list_jobs(db), time.time())
    assert payload["jobs"][1]["next_run"].endswith("T02:00:00Z")
    assert payload["jobs"][0]["spec"]["env"] == {"A": "b"}


@needs_tables
def test_a_job_is_shown_with_the_settings_of_the_server_in_effect(ask, store):
    with store.write() as db:
        roexec.set_settings(db, {"defaults": {"tags": ["all"]},
                                 "scheduler": {"timezone": "+02:00"}})
    payload = ask("/jobs/hello")[1]
    assert payload["tags"] == ["all"] and "tags" not in payload["spec"]
    assert payload["next_run"].endswith("T00:00:00Z")


@needs_tables
def test_each_answer_says_that_it_is_not_to_be_kept_or_guessed_at(ask):
    for path in ("/jobs", "/nowhere"):
        headers = ask(path)[2]
        assert headers["Server"] == "roexec"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
        assert headers["Content-Type"] == "application/json"
        assert "Access-Control-Allow-Origin" not in headers


@needs_tables
@pytest.mark.parametrize("body, content_type, env", [
    ('{"env": {"KEY": "VAL", "EMPTY": ""}}', "application/x-www-form-urlencoded",
     {"KEY": "VAL", "EMPTY": ""}),
    ('{"env": {"KEY": "ä"}}', "application/json", {"KEY": "ä"}),
    ("{}", "text/plain", None), ("", "application/json", None), (" \n", "text/plain", None),
    (None, "application/json", None)])
def test_a_run_is_started_by_a_post(body, content_type, env, ask, store):
    body = body and body.encode()
    status, payload, headers = ask("/jobs/hello/run", "POST", body, Content_Type=content_type)
    assert (status, payload["state"], payload["trigger"]) == (202, "queued", "api")
    assert headers["Location"] == f"/api/v1/runs/{payload['id']}"
    assert ask(f"/runs/{payload['id']}")[1] == payload
    row = row_of(store, payload["id"])
    assert (json.loads(row["env"]) if row["env"] else None) == env and row["job_id"] == "hello"


@needs_tables
def test_starting_a_run_wakes_the_scheduler(ask, store):
    fifo = os.open(store.file("wake"), os.O_RDWR | os.O_NONBLOCK)
    try:
        ask("/jobs/hello/run", "POST")
        assert os.read(fifo, 10) == b"w"
    finally:
        os.close(fifo)


@needs_tables
def test_a_run_that_is_on_is_named_to_who_asks_for_another(ask, error, store):
    first = ask("/jobs/hello/run", "POST")[1]["id"]
    status, payload, _ = ask("/jobs/hello/run", "POST")
    assert (status, payload["error"]["code"], payload["error"]["run"]) == (409, "overlap", first)
    assert payload["error"]["message"] == f'job "hello" is queued already: run {first}'
    assert len(ask("/runs")[1]["runs"]) == 1


@needs_tables
def test_overlap_is_obeyed(ask):
    assert [ask("/jobs/backup/run", "POST")[0] for _ in range(3)] == [202, 202, 202]
    first = ask("/jobs/replaced/run", "POST")[1]["id"]
    assert ask("/jobs/replaced/run", "POST")[0] == 202
    assert ask(f"/runs/{first}")[1]["reason"] == "replaced"


@needs_tables
@pytest.mark.parametrize("body, message", [
    (b"A=b", "the body is not JSON: "), (b"\xff", "the body is not JSON: "),
    (b'{"env": ', "the body is not JSON: "), (b"[" * 100_000, "the body is not JSON: "),
    (b"[]", 'the body is not an object; write {"env": …}'),
    (b'{"enw": {}}', 'unknown key "enw" in the body; there are env, params, queue'),
    (b'{"env": ["A=b"]}', 'env is an object whose values are strings'),
    (b'{"env": {"A": 1}}', 'env is an object whose values are strings'),
    (b'{"env": null}', 'env is an object whose values are strings'),
    (b'{"env": {"A": "\\u0000"}}', "env.A: a text cannot contain a NUL character"),
    (b'{"env": {"A": "\\ud800"}}', "env.A: a text cannot contain a NUL character or half of a"),
    (b'{"env": {"A=B": "c"}}', 'env.A=B: "A=B" cannot be the name of a variable'),
    (b'{"env": {"\\ud800": "c"}}', "env."),
    (b'{"env": {"ROEXEC_SLOT": "c"}}', 'env.ROEXEC_SLOT: "ROEXEC_SLOT" is set by roexec itself')])
def test_a_body_that_is_wrong_is_refused_in_words(body, message, error, ask):
    status, code, text = error("/jobs/hello/run", "POST", body)
    assert (status, code) == (400, "bad_request") and text.startswith(message)
    assert ask("/runs")[1]["runs"] == []


@needs_tables
@pytest.mark.parametrize("path, method, message", [
    ("/jobs/helo", "GET", 'there is no job "helo"; did you mean "hello"?'),
    ("/jobs/helo/run", "POST", 'there is no job "helo"; did you mean "hello"?'),
    ("/jobs/%2e%2e%2fx", "GET", 'there is no job "../x"'),
    ("/runs/nothing", "GET", 'there is no run or job "nothing"'),
    ("/runs/..%2F..%2Fstore.lock/logs", "GET", 'there is no run or job "../../store.lock"'),
    ("/runs/%00/logs", "GET", 'there is no run or job "\\x00"'),
    ("/", "GET", "there is nothing of this name here"),
    ("/jobs/", "GET", "there is nothing of this name here"),
    ("/jobs//run", "POST", "there is nothing of this name here"),
    ("/jobs/hello/run/", "POST", "there is nothing of this name here"),
    ("/../jobs", "GET", "there is nothing of this name here")])
def test_what_is_not_there_is_a_404(path, method, message, error):
    assert error(path, method) == (404, "not_found", message)


@needs_tables
@pytest.mark.parametrize("path", ["/jobs/%ff", "/runs/%c3/logs", "/jobs?limit=%ff", "/runs?%ff=1"])
def test_what_is_not_utf_8_is_refused(path, error):
    assert error(path)[:2] == (400, "bad_request")


@needs_tables
@pytest.mark.parametrize("method, path, allowed", [
    ("DELETE", "/jobs", "GET, HEAD"), ("POST", "/health", "GET, HEAD"),
    ("GET", "/jobs/hello/run", "POST"), ("HEAD", "/jobs/hello/run", "POST"),
    ("BREW", "/runs/x/logs", "GET, HEAD")])
def test_another_method_is_told_which_ones_there_are(method, path, allowed, ask):
    allowed = ", ".join(sorted([*allowed.split(", "), "OPTIONS"]))
    status, _, headers = ask(path, method)
    assert (status, headers["Allow"]) == (405, allowed)
    status, content, headers = ask(path, "OPTIONS")
    assert (status, content, headers["Allow"]) == (204, b"", allowed)
    assert not [name for name in headers if name.lower().startswith("access-control")]


@needs_tables
def test_head_gives_the_headers_of_get_alone(ask, store):
    run_id = logged(store)
    for path in ("/health", "/jobs", "/jobs/hello", "/runs", f"/runs/{run_id}", "/runs/none",
                 f"/runs/{run_id}/logs"):
        got, head = ask(path), ask(path, "HEAD")
        assert (head[0], head[1]) == (got[0], b"")
        assert dict(head[2], Date="") == dict(got[2], Date="")


@needs_tables
def test_runs_are_listed_from_the_newest_and_can_be_chosen(ask, store):
    first, second, third = (record(store), record(store, "backup", "failed", reason="exit"),
                            record(store, "backup", "queued"))
    record(store, step="one", parent=first)

    def listed(query=""):
        return [run["id"] for run in ask("/runs" + query)[1]["runs"]]
    assert listed() == [third, second, first]
    assert listed("?job=backup") == [third, second]
    assert listed("?state=failed") == [second]
    assert listed("?state=failed,succeeded") == [second, first]
    assert listed("?state=active") == [third] and listed("?state=final") == [second, first]
    assert listed("?job=hello&state=failed") == listed("?job=never") == []


@needs_tables
@pytest.mark.parametrize("path, message", [
    ("/runs?limit=0", 'limit: "0" is not a number from 1 to 1000'),
    ("/runs?limit=1001", 'limit: "1001" is not a number from 1 to 1000'),
    ("/jobs?limit=x", 'limit: "x" is not a number from 1 to 1000'),
    ("/jobs?limit=%D9%A3", 'limit: "٣" is not a number from 1 to 1000'),
    ("/jobs?limit=" + "9" * 5000, 'limit: "999'),
    ("/runs?state=broken", 'state: "broken" is not one of queued, running, succeeded, '),
    ("/runs?stat=failed", 'unknown parameter "stat"; did you mean "state"?'),
    ("/jobs?job=x", 'unknown parameter "job"'),
    ("/runs?job=a&job=b", "job is given twice"),
    ("/runs?cursor=x", "the cursor is not one of a list with these filters"),
    ("/jobs?cursor=", "the cursor is not one of a list with these filters")])
def test_a_parameter_that_is_wrong_is_refused_in_words(path, message, error):
    status, code, text = error(path)
    assert (status, code) == (400, "bad_request") and text.startswith(message)


@needs_tables
def test_pages_of_runs_hold_each_run_once_whatever_comes_or_goes_meanwhile(ask, store):
    runs = [record(store) for _ in range(5)][::-1]
    found = []
    for page in pages(ask, "/runs?limit=2&state=succeeded", "runs"):
        found.append(page)
        record(store)
        if len(found) == 1:
            with store.write() as db:
                db.execute("DELETE FROM runs WHERE id = ?", (page[-1],))
    assert found == [runs[:2], runs[2:4], runs[4:]]


@needs_tables
def test_pages_of_jobs_hold_each_job_once(ask):
    assert list(pages(ask, "/jobs?limit=1", "jobs")) == [["backup"], ["hello"], ["replaced"]]
    assert list(pages(ask, "/jobs?limit=3", "jobs")) == [["backup", "hello", "replaced"]]


@needs_tables
def test_a_cursor_holds_for_its_filters_alone(ask, store):
    for _ in range(3):
        record(store)
    cursor = ask("/runs?limit=1&job=hello")[1]["next"]
    assert ask(f"/runs?limit=2&job=hello&cursor={cursor}")[0] == 200
    for query in ("", "&job=backup", "&job=hello&state=failed"):
        assert ask(f"/runs?cursor={cursor}{query}")[0] == 400
    assert ask(f"/runs?job=hello&cursor={cursor}x")[0] == 400
    assert ask(f"/runs?job=hello&cursor={cursor}{'9' * 30}")[0] == 400


@needs_tables
def test_of_a_run_that_is_on_its_journal_is_shown(ask, store):
    run_id, journal = running(store)
    journal.note("starting", what="attempt")
    journal.note("started", pid=1, start=1)
    journal.note("ended", exit_code=7, signal=None, timeout=None, error=None)
    journal.note("retry", until=NOW + 60)
    journal.close()
    payload = ask(f"/runs/{run_id}")[1]
    assert (payload["state"], payload["retry_at"]) == ("running", "2025-08-01T10:01:00Z")
    assert [(each["number"], each["exit_code"]) for each in payload["attempts"]] == [(1, 7)]
    assert payload["log"] == "logs/hello/live.log"
    assert ask("/runs")[1]["runs"] == [payload]


# Logs.

@needs_tables
@pytest.mark.parametrize("query, expected", [
    ("", LOG), ("?tail=1", LOG[LOG.rindex(b"2025"):]), ("?tail=0", b""), ("?tail=99", LOG),
    ("?raw=1", b"one\ntwo\nthree"), ("?raw=0", LOG), ("?stream=out", b"one\nthree"),
    ("?stream=err", b"two\n"), ("?raw=1&stream=err", b"two\n"), ("?raw=1&tail=2", b"two\nthree"),
    ("?offset=0", LOG), ("?offset=41", LOG[41:]), ("?offset=1", LOG[41:]),
    ("?offset=9999", b""), ("?offset=41&raw=1", b"one\ntwo\nthree"),
    ("?follow=1", LOG), ("?follow=1&tail=2&raw=1", b"two\nthree"),
    ("?follow=1&offset=41", LOG[41:])])
def test_a_log_is_given_as_asked(query, expected, ask, store):
    status, content, headers = ask(f"/runs/{logged(store)}/logs{query}")
    assert (status, content) == (200, expected)
    assert headers["Content-Type"] == "text/plain; charset=utf-8"
    assert headers["Roexec-Next-Offset"] == (None if "follow" in query else str(len(LOG)))


@needs_tables
@pytest.mark.parametrize("query, message", [
    ("tail=1&offset=0", "tail and offset exclude each other"),
    ("stream=in", 'stream: "in" is neither out nor err'),
    ("follow=yes", 'follow: "yes" is neither 0 nor 1'), ("raw=", 'raw: "" is neither 0 nor 1'),
    ("tail=-1", 'tail: "-1" is not a number'), ("offset=" + "9" * 30, 'offset: "99')])
def test_a_log_is_not_given_as_nobody_can_ask(query, message, error, store):
    status, code, text = error(f"/runs/{logged(store)}/logs?{query}")
    assert (status, code) == (400, "bad_request") and text.startswith(message)


@needs_tables
def test_a_log_that_is_not_there_is_told(error, store):
    gone = record(store, log="logs/hello/gone.log")
    skipped = record(store, state="skipped", reason="paused")
    queued = record(store, "backup", "queued")
    for run_id in (gone, skipped):
        assert error(f"/runs/{run_id}/logs?follow=1") == error(f"/runs/{run_id}/logs")
    assert [error(f"/runs/{run_id}/logs") for run_id in (gone, skipped, queued)] == [
        (404, "no_log", "the log of this run is not there (any more)"),
        (404, "no_log", f"run {skipped} has no log: it is skipped (paused)"),
        (404, "no_log", f"run {queued} has no log yet: it is queued")]


@needs_tables
def test_a_client_can_go_on_where_it_stopped_reading_a_log_that_grows(ask, store):
    run_id, journal = running(store)
    write_log(store, "live.log", b"2025-08-01T10:00:02Z [OUT] half of a")
    first = ask(f"/runs/{run_id}/logs")
    assert first[1] == LOG
    write_log(store, "live.log", b" line\n")
    offset = first[2]["Roexec-Next-Offset"]
    assert ask(f"/runs/{run_id}/logs?offset={offset}")[1] == (
        b"2025-08-01T10:00:02Z [OUT] half of a line\n")
    journal.close()


@needs_tables
def test_what_a_log_grows_by_while_it_is_read_is_not_given(store):
    run_id, journal = running(store)
    route = roexec.find_routes(f"/api/v1/runs/{run_id}/logs")[0]["GET"]
    request = Request("GET", f"/api/v1/runs/{run_id}/logs")
    request.arguments, request.caller = (run_id,), OWNER
    response = roexec.answer(route, request, store, print)
    write_log(store, "live.log", b"2025-08-01T10:00:02Z [OUT] late\n")
    assert response.headers["Roexec-Next-Offset"] == str(len(LOG))
    assert b"".join(response.stream()) == LOG
    journal.close()


@needs_tables
def test_a_large_log_comes_whole(ask, store):
    content = b"".join(b"2025-08-01T10:00:00Z [OUT] %d\n" % number for number in range(200_000))
    assert ask(f"/runs/{logged(store, content)}/logs")[1] == content


@needs_tables
def test_the_log_of_a_run_that_ends_just_now_is_found(ask, store, monkeypatch):
    run_id = record(store, state="running")

    def live_run(_, row):
        with store.write() as db:
            roexec.finish_run(db, run_id, "succeeded", [], finished_at=NOW,
                              log=write_log(store, "x.log", LOG))
        return row, None
    monkeypatch.setattr(roexec, "live_run", live_run)
    assert ask(f"/runs/{run_id}/logs")[:2] == (200, LOG)


@needs_tables
def test_following_gives_lines_as_they_come_and_ends_with_the_run(connection, store):
    run_id, journal = running(store)
    connection.request("GET", f"/api/v1/runs/{run_id}/logs?follow=1")
    response = connection.getresponse()
    assert response.read1(10_000) == LOG
    late = b"2025-08-01T10:00:09Z [INFO] Completed, exit=0\n"
    write_log(store, "live.log", late)
    assert response.read1(10_000) == late
    with store.write() as db:
        roexec.finish_run(db, run_id, "succeeded", [], log="logs/hello/live.log",
                          finished_at=NOW)
    journal.remove()
    journal.close()
    assert response.read() == b""
    connection.request("GET", "/api/v1/health")
    assert connection.getresponse().read() == b'{"status": "ok"}\n'


@needs_tables
def test_following_waits_for_a_run_that_is_queued(connection, store):
    run_id = record(store, "backup", "queued")
    connection.request("GET", f"/api/v1/runs/{run_id}/logs?follow=1&raw=1")
    response = connection.getresponse()
    assert response.status == 200
    with store.write() as db:
        roexec.change_run(db, run_id, "running", started_at=NOW)
        roexec.finish_run(db, run_id, "succeeded", [], finished_at=NOW,
                          log=write_log(store, "late.log", LOG))
    assert response.read() == b"one\ntwo\nthree"


@needs_tables
def test_a_run_that_is_cancelled_before_it_began_ends_its_followers(connection, store):
    run_id = record(store, "backup", "queued")
    connection.request("GET", f"/api/v1/runs/{run_id}/logs?follow=1")
    response = connection.getresponse()
    with store.write() as db:
        roexec.finish_run(db, run_id, "cancelled", [], reason="user", finished_at=NOW)
    assert response.read() == b""


@needs_tables
def test_a_follower_that_goes_away_leaves_nothing_behind(server, store):
    run_id, journal = running(store)
    client = dial(server)
    client.sendall(head(f"GET /api/v1/runs/{run_id}/logs?follow=1 HTTP/1.1"))
    while b"three" not in client.recv(10_000):
        pass
    assert len(server.streams.taken) == 1
    client.close()
    wait_for(lambda: not server.streams.taken and not server.connections)
    assert not server.streams.lookout.runs
    journal.close()


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
    of_its_own = ("127.9.8.7", 0)       # an address whose ports nobody else has used lately
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


# Requests, byte for byte.

GOOD = b"GET / HTTP/1.1\r\nHost: localhost"


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


def head(*lines, host="localhost"):
    """The bytes of a request without a body."""
    return "\r\n".join([lines[0], f"Host: {host}", *lines[1:], "", ""]).encode()


def dial(server):
    return socket.create_connection(server.address, timeout=20)


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
    monkeypatch.setattr(roexec, "_IDLE_TIME", 0.05)
    monkeypatch.setattr(roexec, "_HEAD_TIME", 0.05)
    answer = exchange(server, *pieces)
    assert answer.startswith(b"HTTP/1.1 408 ") if pieces else answer == b""


def test_a_client_that_sends_its_head_for_ever_is_let_go(server, monkeypatch):
    monkeypatch.setattr(roexec, "_HEAD_TIME", 0.2)
    began, answer = time.monotonic(), b""
    with dial(server) as client:
        client.settimeout(0.01)
        while not answer and time.monotonic() - began < 5:
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
        deadline = time.monotonic() + 10
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < deadline:
                with contextlib.suppress(socket.timeout):
                    client.sendall(b" ")
                    if not client.recv(1):
                        break
        assert time.monotonic() < deadline


@needs_tables
def test_a_client_that_does_not_read_is_let_go(server, store, monkeypatch):
    monkeypatch.setattr(roexec, "_IDLE_TIME", 0.2)
    run_id = logged(store, b"2025-08-01T10:00:00Z [OUT] x\n" * 600_000)
    with dial(server) as client:
        client.sendall(head(f"GET /api/v1/runs/{run_id}/logs HTTP/1.1"))
        wait_for(lambda: server.connections)
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
def test_closing_ends_idle_connections_and_followers_and_frees_the_port(store):
    server = start_http(store, "127.0.0.1", 0, print)
    run_id, journal = running(store)
    with dial(server) as idle, dial(server) as follower:
        follower.sendall(head(f"GET /api/v1/runs/{run_id}/logs?follow=1 HTTP/1.1"))
        received = follower.recv(100)
        began = time.monotonic()
        server.close()
        assert time.monotonic() - began < 1.9 and not server.connections
        assert idle.recv(1) == b""
        received += follower.makefile("rb").read()
        assert received.startswith(b"HTTP/1.1 200 ") and not received.endswith(b"0\r\n\r\n")
        again = start_http(store, *server.address, print)
        again.close()
    journal.close()


@needs_tables
def test_a_request_that_is_being_answered_is_answered_before_the_end(store, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()

    def slowly(*_):
        begun.set()
        assert go_on.wait(10)
        return []
    monkeypatch.setattr(roexec, "job_payloads", slowly)
    server = start_http(store, "127.0.0.1", 0, print)
    with dial(server) as client:
        client.sendall(head("GET /api/v1/jobs HTTP/1.1"))
        assert begun.wait(10)
        closer = threading.Thread(target=server.close)
        closer.start()
        wait_for(lambda: server.socket.fileno() == -1)
        go_on.set()
        answer = client.makefile("rb").read()
        closer.join()
    assert answer.startswith(b"HTTP/1.1 200 ")


def test_closing_does_not_wait_for_ever(store, monkeypatch):
    monkeypatch.setattr(roexec, "_CLOSING_TIME", 0.05)
    go_on = threading.Event()
    monkeypatch.setattr(roexec, "count_changes", lambda db: go_on.wait(10))
    server = start_http(store, "127.0.0.1", 0, print)
    with dial(server) as client:
        client.sendall(head("GET /api/v1/health HTTP/1.1"))
        wait_for(lambda: server.connections)
        server.close()
        go_on.set()
        wait_for(lambda: not server.connections)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="this host does not list threads")
def test_no_signal_reaches_the_threads_of_the_server(server):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with dial(server) as client:
        client.sendall(head("GET /api/v1/health HTTP/1.1"))
        client.recv(1)
        threads = [each for each in threading.enumerate() if each is not threading.main_thread()]
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
        connection = http.client.HTTPConnection(to, port, timeout=20)
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
