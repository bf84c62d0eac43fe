"""The HTTP API: what its routes answer about jobs, runs and logs."""
import json
import os
import time

import pytest

from helpers import wait_for
from served import (LOG, NOW, OWNER, ask, connection, database, dial, error,  # noqa: F401
                    head, logged, needs_tables, pages, record, row_of, running, said, server,
                    store, write_log)

import roexec
from roexec import Request


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
