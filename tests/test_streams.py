"""Logs and events as they come: what is sent, where one goes on, and what a client can hold up."""
import contextlib
import http.client
import json
import os
import socket
import threading
import time

import pytest
from helpers import token, wait_for
from served import (LOG, NOW, ask, become, connection, database, error, logged,  # noqa: F401
                    needs_tables, record, row_of, running, said, server, store, write_log)

import roexec

pytestmark = needs_tables
END = len(LOG)
LATE = b"2025-08-01T10:00:09Z [OUT] late\n"


@pytest.fixture
def listen(server):
    """`listen(path, headers)` -> a Listener; each is closed in the end."""
    with contextlib.ExitStack() as stack:
        yield lambda path, **headers: stack.enter_context(Listener(server, path, headers))


class Listener:
    """A client of a stream of events."""

    def __init__(self, server, path, headers):
        self.connection = http.client.HTTPConnection(*server.address, timeout=60)
        headers = {name.replace("_", "-"): text for name, text in headers.items()}
        self.connection.request("GET", "/api/v1" + path, headers={
            "Accept": "text/event-stream", **headers})
        self.response = self.connection.getresponse()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.response.close()
        self.connection.close()

    def next(self):
        """(name, id, data) of the next event; None at the end. Comments are left out."""
        name, number, data = "message", None, None
        while True:
            line = self.response.readline().decode()
            if not line:
                return None
            field, _, value = line.rstrip("\n").partition(": ")
            if field == "event":
                name = value
            elif field == "id":
                number = int(value)
            elif field == "data":
                data = json.loads(value)
            elif line == "\n" and (number is not None or data is not None):
                return name, number, data

    def all(self):
        return list(iter(self.next, None))


def finish(store, run_id, journal=None, state="succeeded", reason=None):
    with store.write() as db:
        roexec.finish_run(db, run_id, state, [], reason=reason, exit_code=0, finished_at=NOW,
                          log="logs/hello/live.log")
    if journal is not None:
        journal.remove()
        journal.close()


# Windows of a log.

@pytest.mark.parametrize("query, expected, next_offset", [
    ("limit=1", LOG[:41], 41), ("limit=41", LOG[:41], 41), ("limit=42", LOG[:72], 72),
    ("limit=9999", LOG, len(LOG)), ("offset=41&limit=1", LOG[41:72], 72),
    ("offset=30&limit=10", LOG[41:72], 72), ("offset=9999&limit=5", b"", len(LOG)),
    (f"offset={10 ** 18 - 1}&limit={10 ** 18 - 1}", b"", len(LOG)),
    ("tail=2&limit=1", LOG[72:103], 103), ("offset=41&limit=40&stream=err", b"two\n", 103)])
def test_a_window_of_a_log_is_given(query, expected, next_offset, ask, store):
    status, content, headers = ask(f"/runs/{logged(store)}/logs?{query}")
    assert (status, content) == (200, expected)
    assert headers["Roexec-Next-Offset"] == str(next_offset)
    assert headers["Roexec-Log-Size"] == str(len(LOG))


def parts(store, run_log, *pieces):
    """Add further parts to a log: (offset, bytes)."""
    folder = store.file(run_log) + ".parts"
    os.mkdir(folder)
    for offset, content in pieces:
        with open(f"{folder}/{offset:015}", "wb") as file:
            file.write(content)


@pytest.fixture
def capped(store):
    """A run whose log lacks the bytes from 134 to 1000."""
    log = write_log(store, "capped.log", LOG)
    parts(store, log, (1000, LATE))
    return record(store, log=log)


def test_of_a_log_that_was_capped_the_gap_is_told(ask, capped, listen):
    gap = (b"2025-08-01T10:00:09Z [INFO] %d bytes of the log were removed here: from=%d to=1000\n"
           % (1000 - END, END))
    status, content, headers = ask(f"/runs/{capped}/logs")
    assert content == LOG + gap + LATE and headers["Roexec-Gap"] is None
    assert headers["Roexec-Next-Offset"] == headers["Roexec-Log-Size"] == str(1000 + len(LATE))
    status, content, headers = ask(f"/runs/{capped}/logs?raw=1")
    assert content == b"one\ntwo\nthreelate\n" and headers["Roexec-Gap"] == f"{END}-1000"
    assert ask(f"/runs/{capped}/logs?raw=1&offset=1000")[2]["Roexec-Gap"] is None
    assert ask(f"/runs/{capped}/logs?offset=500")[1] == gap.replace(
        b"%d bytes" % (1000 - END), b"500 bytes").replace(
        b"from=%d" % END, b"from=500") + LATE
    events = listen(f"/runs/{capped}/logs?offset=100").all()
    assert [(name, number) for name, number, _ in events] == [
        ("message", END), ("gap", 1000), ("message", 1032), ("window", 1032)]
    assert events[1][2] == {"from": END, "to": 1000}


def pack(store, run_id):
    path = row_of(store, run_id)["log"]
    assert roexec.pack_log(store.folder, path, 1 << 40)
    assert not os.path.exists(store.file(path))
    return store.file(path) + ".gz"


def test_a_log_that_was_packed_is_given_as_before(ask, listen, store):
    run_id = logged(store, LOG + LATE * 5000)
    paths = [f"/runs/{run_id}/logs{query}" for query in (
        "", "?tail=1", "?offset=40&limit=100", "?follow=1&raw=1", "?stream=err")]
    before = [ask(path)[1] for path in paths]
    pack(store, run_id)
    assert [ask(path)[1] for path in paths] == before
    assert listen(paths[2]).all()[-1] == ("window", END + 32, {
        "next": END + 32, "size": END + 32 * 5000, "state": "succeeded"})


def test_a_log_that_is_damaged_is_told(ask, connection, said, store):
    begins, ends = (logged(store, LOG + b"".join(
        LATE[:28] + b"%d\n" % number for number in range(200_000))) for _ in range(2))
    with open(pack(store, begins), "r+b") as file:
        file.write(b"no gzip")
    status, payload, _ = ask(f"/runs/{begins}/logs")
    assert (status, payload["error"]["code"]) == (503, "unavailable")
    assert payload["error"]["message"] == "the packed log is damaged"
    with open(pack(store, ends), "r+b") as file:
        file.seek(-3000, os.SEEK_END)
        file.write(b"x" * 100)
    with pytest.raises(http.client.IncompleteRead):
        connection.request("GET", f"/api/v1/runs/{ends}/logs")
        connection.getresponse().read()
    assert [text.count("the packed log is damaged") for text in said] == [1, 1]
    said.clear()


# A log as events.

def test_each_line_is_an_event_with_the_offset_behind_it(listen, store):
    content = LOG + b"\n2025-08-01T10:00:02Z [OUT] 50%\r100%\n2025-08-01T10:00:03Z [ERR] \xff\n"
    run_id = logged(store, content.replace(b"three\n\n", b"three\n"))
    listener = listen(f"/runs/{run_id}/logs")
    assert listener.response.headers["Content-Type"] == "text/event-stream"
    assert listener.all() == [
        ("message", 41, {"time": "2025-08-01T10:00:00Z", "stream": "info", "line": "Starting run",
                         "partial": False}),
        ("message", 72, {"time": "2025-08-01T10:00:00Z", "stream": "out", "line": "one",
                         "partial": False}),
        ("message", 103, {"time": "2025-08-01T10:00:01Z", "stream": "err", "line": "two",
                          "partial": False}),
        ("message", END, {"time": "2025-08-01T10:00:01Z", "stream": "out",
                                  "line": "three", "partial": True}),
        ("message", END + 36, {"time": "2025-08-01T10:00:02Z", "stream": "out", "line": "50%\r100%",
                          "partial": False}),
        ("message", END + 65, {"time": "2025-08-01T10:00:03Z", "stream": "err", "line": "\ufffd",
                          "partial": False, "base64": "/w=="}),
        ("window", END + 65, {"next": END + 65, "size": END + 65, "state": "succeeded"})]
    assert [number for _, number, _ in listen(f"/runs/{run_id}/logs?stream=err").all()] == [
        103, END + 65, END + 65]
    assert [number for _, number, _ in listen(f"/runs/{run_id}/logs?offset=72&limit=1").all()] == [
        103, 103]


def test_a_log_is_followed_as_events_until_the_run_has_ended(listen, store):
    run_id, journal = running(store)
    listener = listen(f"/runs/{run_id}/logs?follow=1")
    assert [listener.next()[1] for _ in range(4)] == [41, 72, 103, END]
    write_log(store, "live.log", LATE)
    assert listener.next()[2]["line"] == "late"
    finish(store, run_id, journal)
    assert listener.all() == [("end", END + 32, {
        "state": "succeeded", "reason": None, "exit_code": 0, "signal": None})]


def test_a_client_goes_on_behind_the_last_event_it_got(listen, error, store):
    run_id, journal = running(store)
    listener = listen(f"/runs/{run_id}/logs?follow=1&offset=0", Last_Event_ID="72")
    assert listener.next()[:2] == ("message", 103)
    finish(store, run_id, journal)
    path = f"/runs/{run_id}/logs?follow=1&tail=1"
    assert [event[1] for event in listen(path, Last_Event_ID="103").all()] == [END, END]
    listener = listen(path, Last_Event_ID=str(END))
    assert (listener.response.status, listener.response.read()) == (204, b"")
    for last in ("", "x", "-1", "9" * 30):
        assert error(path, Accept="text/event-stream", Last_Event_ID=last)[:2] == (
            400, "bad_request")


def test_a_run_that_is_cancelled_while_it_waits_has_an_end(listen, store):
    run_id = record(store, "backup", "queued")
    listener = listen(f"/runs/{run_id}/logs?follow=1")
    with store.write() as db:
        roexec.finish_run(db, run_id, "cancelled", [], reason="user", finished_at=NOW)
    assert [(name, number, data["reason"]) for name, number, data in listener.all()] == [
        ("end", 0, "user")]


def test_a_log_that_gets_further_parts_is_followed_through_them(listen, store):
    run_id, journal = running(store)
    listener = listen(f"/runs/{run_id}/logs?follow=1&offset=103")
    assert listener.next()[1] == END
    parts(store, "logs/hello/live.log", (END, LATE), (1000, LATE))
    assert [listener.next()[:2] for _ in range(3)] == [
        ("message", END + 32), ("gap", 1000), ("message", 1032)]
    finish(store, run_id, journal)
    assert listener.next()[0] == "end"


@pytest.mark.parametrize("query, message", [
    ("raw=1", "raw is for text, and limit for what does not follow"),
    ("follow=1&limit=5", "raw is for text, and limit for what does not follow"),
    ("limit=0", 'limit: "0" is not a number from 1')])
def test_events_of_a_log_are_not_given_as_nobody_can_ask(query, message, error, store):
    status, code, text = error(f"/runs/{logged(store)}/logs?{query}", Accept="text/event-stream")
    assert (status, code) == (400, "bad_request") and text.startswith(message)


# What a client can hold up.

def test_a_client_that_does_not_read_holds_up_nobody(listen, server, store):
    run_id, journal = running(store)
    write_log(store, "live.log", LATE * 1_000_000)        # more than the buffers of the system take
    with socket.create_connection(server.address) as sleeper:
        sleeper.sendall(b"GET /api/v1/runs/%b/logs?follow=1 HTTP/1.1\r\nHost: localhost\r\n\r\n"
                        % run_id.encode())
        wait_for(lambda: server.streams.taken)
        stream = wait_for(lambda: next(iter(server.streams.all.values()), None))
        wait_for(lambda: stream.ready is None and time.monotonic() > stream.taken_at + 0.2)
        listener = listen(f"/runs/{run_id}/logs?follow=1&tail=1")
        assert listener.next()[2]["line"] == "late"
        write_log(store, "live.log", LATE.replace(b"late", b"soon"))
        assert listener.next()[2]["line"] == "soon"
        assert len(stream.pending) < 1 << 20, "what it does not take stays in the file"
        finish(store, run_id, journal)
        received = b"".join(iter(lambda: sleeper.recv(1 << 20), b""))
        assert received.count(b"late\n") >= 999_000 and received.endswith(b"0\r\n\r\n")


def test_a_client_that_takes_nothing_for_long_is_let_go(server, store, monkeypatch):
    run_id, journal = running(store)
    write_log(store, "live.log", LATE * 1_000_000)
    with socket.create_connection(server.address) as sleeper:
        sleeper.sendall(b"GET /api/v1/runs/%b/logs?follow=1 HTTP/1.1\r\nHost: localhost\r\n\r\n"
                        % run_id.encode())
        wait_for(lambda: server.streams.taken)
        monkeypatch.setattr(roexec, "_STALL_TIME", 0.1)
        wait_for(lambda: not server.streams.taken)
    journal.close()


def test_many_follow_at_once_and_cost_no_threads(server, store):
    run_id, journal = running(store)
    request = b"GET /api/v1/runs/%b/logs?follow=1 HTTP/1.1\r\nHost: localhost\r\n\r\n" % (
        run_id.encode())
    before = threading.active_count()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(server.address, timeout=60))
                   for _ in range(100)]
        for client in clients:
            client.sendall(request)
        wait_for(lambda: len(server.streams.taken) == 100 and not server.connections)
        wait_for(lambda: threading.active_count() <= before + 1)
        write_log(store, "live.log", LATE)
        finish(store, run_id, journal)
        for client in clients:
            with client.makefile("rb") as file:
                content = file.read()
            assert b"[OUT] late\n" in content and content.endswith(b"\r\n0\r\n\r\n")
    wait_for(lambda: not server.streams.taken)


def test_no_more_than_so_many_follow(error, listen, server, store, monkeypatch):
    monkeypatch.setattr(roexec, "_MOST_STREAMS", 1)
    listener = listen("/events")
    assert listener.next()[0] == "message"
    assert error("/events")[:2] == (503, "busy")


@pytest.mark.parametrize("peers", ["tokens", "addresses"])
def test_one_token_or_address_takes_no_streams_away_from_others(peers, listen, server, store,
                                                                monkeypatch):
    monkeypatch.setattr(roexec, "_OF_ONE_FOLLOWER", 2)
    first, second = ({"Authorization": f"Bearer {token(store, name, role='viewer')}"}
                     for name in ("first", "second"))
    if peers == "addresses":
        monkeypatch.setattr(roexec, "_peer", lambda address: "elsewhere")
        second = first

    def refused(caller):
        return listen("/events", **caller).response.status == 503

    held = [listen("/events", **first) for _ in range(2)]
    wait_for(lambda: len(server.streams.taken) == 2)
    assert refused(first) and refused(second) is (peers == "addresses")
    held[0].__exit__()
    wait_for(lambda: not refused(first))


def test_the_last_streams_are_for_the_owner(error, listen, server, store, monkeypatch):
    monkeypatch.setattr(roexec, "_MOST_STREAMS", 4)
    monkeypatch.setattr(roexec, "_LEFT_TO_OWNER", 3)
    given = {"Authorization": f"Bearer {token(store, role='viewer')}"}
    assert listen("/events", **given).next()
    wait_for(lambda: len(server.streams.taken) == 1)
    assert error("/events", **given)[:2] == (503, "busy")
    assert all(listen("/events").next() for _ in range(3))


def test_a_defect_in_a_stream_ends_it_alone(listen, said, store, monkeypatch):
    other = listen("/events")
    assert other.next()
    monkeypatch.setattr(roexec, "next_lines", lambda *_: 1 / 0)
    run_id, journal = running(store)
    with pytest.raises(http.client.IncompleteRead):
        listen(f"/runs/{run_id}/logs?follow=1").response.read()
    assert "ZeroDivisionError" in said.pop()
    assert other.next()[0] == "run"
    journal.close()


def test_who_may_no_longer_read_is_let_go(listen, server, store, monkeypatch):
    monkeypatch.setattr(roexec, "_RECHECK_TIME", 0)
    listener = listen("/events")
    assert listener.next()

    def gate(*_, **__):
        raise roexec.Refusal(401, "unauthorized", "no")
    monkeypatch.setattr(roexec, "gate", gate)
    with pytest.raises(http.client.IncompleteRead):
        listener.response.read()
    wait_for(lambda: not server.streams.taken)


# Events.

def test_each_change_of_a_run_or_job_is_an_event(ask, listen, store):
    listener = listen("/events")
    name, start, data = listener.next()
    assert (name, data) == ("message", None)
    run_id = ask("/jobs/hello/run", "POST")[1]["id"]
    name, number, run = listener.next()
    assert (name, run["id"], run["state"]) == ("run", run_id, "queued") and number > start
    whole = ask(f"/runs/{run_id}")[1]
    assert run == {key: whole[key] for key in run}
    ask(f"/runs/{run_id}/cancel", "POST")
    assert next(event[2] for event in iter(listener.next, None) if event[0] == "run")[
        "state"] == "cancelled"
    ask("/jobs/new", "PUT", b"command: x")
    assert next(event[2] for event in iter(listener.next, None) if event[0] == "job") == {
        "id": "new", "deleted": False}
    ask("/jobs/new", "DELETE")
    assert next(event[2] for event in iter(listener.next, None) if event[0] == "job") == {
        "id": "new", "deleted": True}


def test_events_that_were_missed_come_afterwards(ask, listen, store):
    start = listen("/events").next()[1]
    runs = [record(store) for _ in range(3)]
    with store.write() as db:
        roexec.pause_job(db, "hello", True)
    found = []
    listener = listen("/events", Last_Event_ID=str(start))
    while len(found) < 4:
        found += [listener.next()]
        found = [event for event in found if event[2] is not None]
    assert [data["id"] for _, _, data in found] == [*runs, "hello"]
    listener = listen("/events", Last_Event_ID=str(found[1][1]))
    assert listener.next()[:2] == ("message", found[1][1])
    assert listener.next()[2]["id"] == runs[2]


@pytest.mark.parametrize("last", ["0", "999999"])
def test_who_missed_too_much_is_told_to_begin_again(last, listen, store):
    with store.write() as db:
        db.execute("DELETE FROM events WHERE id < 3")
    name, number, data = listen("/events", Last_Event_ID=last).next()
    assert (name, data) == ("reset", {}) and number >= 3


def test_only_the_newest_events_are_kept(store):
    with store.write() as db:
        for number in range(10_050):
            db.execute("INSERT INTO events (job_id) VALUES ('x')")
        first, last = roexec.event_span(db)
        assert last - first == 9999


def test_who_reads_events_too_slowly_is_told_to_begin_again(listen, server, store):
    listener = listen("/events")
    seen = listener.next()[1]
    lookout = roexec.Lookout(store)
    with store.write() as db:
        db.execute("INSERT INTO events (id, job_id) VALUES (?, 'x')", (seen + 100,))
        db.execute("DELETE FROM events WHERE id < ?", (seen + 100,))
    assert lookout.events_after(seen) == (None, seen + 100)
    name, number, _ = listener.next()
    assert (name, number) == ("reset", seen + 100)


def test_events_of_others_are_not_seen(ask, listen, store, become):
    become("run:list", pattern="hel*")
    listener = listen("/events")
    start = listener.next()[1]
    record(store, "backup")
    with store.write() as db:
        roexec.pause_job(db, "hello", True)         # an event of a job, which needs job:read
    mine = record(store, "hello")
    found = next(event for event in iter(listener.next, None) if event[2] is not None)
    assert found[2]["id"] == mine and found[1] > start


def test_a_stream_of_events_shows_that_it_lives(listen, monkeypatch):
    monkeypatch.setattr(roexec, "_BEAT_TIME", 0.1)
    listener = listen("/events")
    listener.next()
    assert listener.response.readline() == b":\n"


def test_the_head_of_a_stream_can_be_asked_for(ask, store):
    status, content, headers = ask("/events", "HEAD")
    assert (status, content, headers["Content-Type"]) == (200, b"", "text/event-stream")


def test_a_client_of_http_1_0_gets_a_stream_without_chunks(server, store):
    run_id, journal = running(store)
    finish(store, run_id, journal)
    with socket.create_connection(server.address, timeout=60) as client:
        client.sendall(b"GET /api/v1/runs/%b/logs?follow=1&raw=1 HTTP/1.0\r\nHost: localhost\r\n"
                       b"\r\n" % run_id.encode())
        with client.makefile("rb") as file:
            assert file.read().partition(b"\r\n\r\n")[2] == b"one\ntwo\nthree"


def test_a_store_that_cannot_be_read_lets_streams_wait(listen, said, server, store, monkeypatch):
    listener = listen("/events")
    listener.next()
    failures = []

    def fail():
        failures.append(1)
        if len(failures) == 3:
            monkeypatch.undo()
        raise roexec.RoexecError("the disk is away") if len(failures) < 3 else KeyError("defect")
    monkeypatch.setattr(server.streams.lookout, "look", fail)
    wait_for(lambda: len(said) == 2)
    assert said.pop(0) == "streams wait: the disk is away", "and it is told once"
    assert "KeyError: 'defect'" in said.pop()
    record(store)
    assert listener.next()[0] == "run"


def test_a_log_that_cannot_be_opened_ends_the_streams_of_its_run_alone(listen, said, store):
    os.makedirs(store.file("logs/hello"))
    os.symlink("/etc/passwd", store.file("logs/hello/live.log"))
    run_id = record(store, state="running")
    other, one = listen("/events"), listen(f"/runs/{run_id}/logs?follow=1")
    assert other.next()
    finish(store, run_id)
    with pytest.raises(http.client.IncompleteRead) as caught:
        one.response.read()
    assert not caught.value.partial and other.next()[2]["id"] == run_id
    assert said.pop().startswith(f"/api/v1/runs/{run_id}/logs ends early: ") and not said


# What a token for some jobs does not get to see.

OF_OTHERS = b"".join(b"2025-08-01T10:00:00Z [%b\n" % line for line in (
    b"INFO] Starting run", b"INFO] Running the job hello", b"INFO] Running the job secret-a",
    b"OUT] Running the job secret-b is what it says itself",
    b"ERROR] Run abcdefghij of the job secret-a failed, exit=1",
    b"INFO] Run abcdefghij of the job hello succeeded, exit=0",
    b"INFO] Hook on_failure: run secret-c", b"INFO] Hook on_failure: webhook",
    b"INFO] Completed, exit=0"))


@pytest.mark.parametrize("follow", ["0", "1"])
@pytest.mark.parametrize("accept", ["text/plain", "text/event-stream"])
def test_a_log_leaves_out_what_is_about_jobs_outside_the_pattern_of_a_token(follow, accept, ask,
                                                                            listen, store):
    run_id = record(store, log="logs/hello/others.log")
    write_log(store, "others.log", OF_OTHERS)
    path = f"/runs/{run_id}/logs?follow={follow}"
    given = {"Authorization": f"Bearer {token(store, role='viewer', jobs='h*')}"}
    if accept == "text/plain":
        found = ask(path, **given)[1].decode().splitlines()
        assert ask(path)[1] == OF_OTHERS
    else:
        events = [event for event in listen(path, **given).all() if event[0] == "message"]
        found = [data["line"] for _, _, data in events]
        assert events[-1][1] == len(OF_OTHERS)
    text = "\n".join(found)
    assert "secret-a" not in text and "secret-c" not in text and "secret-b" in text
    assert text.count("Lines about jobs other than h* are left out") == 1 and len(found) == 7
    assert ask(path + "&raw=1", **given)[1] == b"Running the job secret-b is what it says itself\n"


def test_a_stream_that_comes_as_the_server_ends_writes_nowhere_else(store, server, monkeypatch):
    """The descriptor that wakes the thread of streams may be that of a database by then."""
    write, closed, ends = os.write, threading.Event(), []
    streams = roexec.Streams(store, print, lambda connection: connection.close())

    def late(descriptor, data):
        if data == b"w" and not ends:
            ends.append(threading.Thread(target=lambda: (streams.close(), closed.set())))
            ends[0].start()
            assert not closed.wait(0.3), "what is written to is closed"
        return write(descriptor, data)
    monkeypatch.setattr(os, "write", late)
    ours, theirs = socket.socketpair()
    request = roexec.Request("GET", "/api/v1/events", version=1)
    response = roexec.Response(feed=lambda lookout: (data for data in [b"x"]))
    with ours, theirs:
        assert streams.add(theirs, None, request, response, None)
        ends[0].join()
