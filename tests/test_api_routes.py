"""What the routes of the API return for jobs and runs, and what they change."""
import gzip
import json
import time

import pytest
from served import (NOW, ask, become, connection, database, error, needs_tables,  # noqa: F401
                    pages, record, row_of, said, server, store)

import roexec

pytestmark = needs_tables


def register(store, *jobs, source="/more.yml"):
    with store.write() as db:
        jobs = [roexec.job_from_mapping(job, None) for job in jobs]
        roexec.perform_apply(db, roexec.plan_apply(db, {source: jobs}), NOW)


def spec_of(store, job_id):
    with store.read() as db:
        row = roexec.find_job(db, job_id)
        return row and json.loads(row["spec"])


# Lists.

@pytest.mark.parametrize("query, expected", [
    ("", ["backup", "hello", "off", "replaced", "tagged"]), ("?tag=x", ["tagged"]),
    ("?tag=y", []), ("?state=disabled", ["off"]), ("?state=scheduled", ["hello", "tagged"]),
    ("?state=manual,disabled", ["backup", "off", "replaced"]), ("?state=paused", ["hello"]),
    ("?state=queued", ["backup"]), ("?state=queued&tag=x", []), ("?limit=2", ["backup", "hello"])])
def test_jobs_can_be_chosen(query, expected, ask, store):
    register(store, {"id": "tagged", "command": "x", "schedule": "@daily", "tags": ["x"]},
             {"id": "off", "command": "x", "schedule": "@daily", "enabled": False})
    with store.write() as db:
        roexec.pause_job(db, "hello", True)
    record(store, "backup", "queued")
    assert [job["id"] for job in ask("/jobs" + query)[1]["jobs"]] == expected
    query = "&" + query[1:] if query and "limit" not in query else ""
    assert query == "" or sum(pages(ask, "/jobs?limit=1" + query, "jobs"), []) == expected


def test_a_job_says_its_schedule_in_words_and_what_it_takes_usually(ask, store):
    record(store, at=NOW)
    job = ask("/jobs/hello")[1]
    assert job["words"] == ["at 02:00 every day"] and job["usual"] == 1
    assert ask("/jobs/backup")[1]["usual"] is None
    brief = ask("/jobs?brief=1")[1]["jobs"][1]
    assert brief == {name: value for name, value in job.items() if name != "spec"}


@pytest.mark.parametrize("query, expected", [
    ("trigger=manual", [0, 1]), ("trigger=api,retry", [2]), ("since=2025-08-01T10:00:01Z", [1, 2]),
    ("until=2025-08-01T10:00:01Z", [0]), ("since=2025-08-01T10:00:01&trigger=manual", [1]),
    ("tag=x", [1]), ("tag=y", []), ("steps=1", [0, 1, 2, 3]), ("parent=PARENT", [3]),
    ("parent=nothing", [])])
def test_runs_can_be_chosen(query, expected, ask, store):
    register(store, {"id": "tagged", "command": "x", "tags": ["x"]})
    runs = [record(store, at=NOW), record(store, "tagged", at=NOW + 5),
            record(store, at=NOW + 9, trigger="api")]
    runs.append(record(store, parent=runs[0], step="one", trigger="pipeline", at=NOW - 9))
    found = ask("/runs?" + query.replace("PARENT", runs[0]))[1]["runs"]
    assert sorted(runs.index(run["id"]) for run in found) == expected


@pytest.mark.parametrize("path, message", [
    ("/jobs?state=broken", 'state: "broken" is not one of running, queued, paused, '),
    ("/runs?trigger=x", 'trigger: "x" is not one of schedule, catch_up, '),
    ("/runs?since=yesterday", 'since: "yesterday" is no instant; write for example'),
    ("/jobs?brief=yes", 'brief: "yes" is neither 0 nor 1'),
    ("/jobs/hello?brief=1", 'unknown parameter "brief"'),
    ("/runs/x?limit=1", 'unknown parameter "limit"'),
    ("/history", "jobs: give the ids of 1 to 100 jobs"),
    ("/history?jobs=" + ",".join(map(str, range(101))), "jobs: give the ids of 1 to 100 jobs")])
def test_a_wrong_choice_is_refused_in_words(path, message, error):
    status, code, text = error(path)
    assert (status, code) == (400, "bad_request") and text.startswith(message)


def test_the_newest_runs_of_several_jobs_come_at_once(ask, store):
    runs = [record(store, at=NOW + number) for number in range(3)]
    other = record(store, "backup", "skipped", reason="paused", slot=int(NOW), last_slot=int(NOW))
    record(store, parent=runs[0], step="one")
    found = ask("/history?jobs=hello,backup,never&limit=2")[1]["jobs"]
    assert [run["id"] for run in found["hello"]["runs"]] == runs[:0:-1]
    assert [found[name]["more"] for name in ("hello", "backup", "never")] == [True, False, False]
    run, = found["backup"]["runs"]
    whole = ask(f"/runs/{other}")[1]
    assert run == {name: whole[name] for name in run} and run["slot"] == "2025-08-01T10:00:00Z"


def test_a_run_is_found_by_what_a_person_calls_it(ask, error, store):
    old, new = record(store, at=NOW), record(store, "backup", "queued", at=NOW + 1)
    for path, run_id in (("latest", new), ("hello", old), (old[:6], old), (new, new)):
        assert ask(f"/runs/{path}")[1]["id"] == run_id
    assert error(f"/runs/{old[:3]}")[0] == 404
    assert error("/runs/latest/cancel", "POST")[0] == 404, "what is changed is named in full"


# Tags of answers, compression, and what is kept.

def test_an_answer_that_is_known_is_not_sent_again(ask, store):
    for day, path in enumerate(("/jobs", "/jobs/hello", "/runs", "/history?jobs=hello"), 1):
        status, payload, headers = ask(path)
        tag = headers["ETag"]
        for known in (tag, f'"x", {tag}', f"W/{tag}", "*"):
            status, content, headers = ask(path, If_None_Match=known)
            assert (status, content, headers["ETag"]) == (304, b"", tag)
            assert headers["Content-Length"] is None
        assert ask(path, If_None_Match='"other"')[:2] == (200, payload)
        assert ask(path, "HEAD", If_None_Match=tag)[0] == 304
        record(store, at=time.time())
        ask("/jobs/hello/pause", "POST", b'{"until": "2999-01-%02d"}' % day)
        assert ask(path, If_None_Match=tag)[0] == 200


def test_large_answers_are_compressed_for_who_wants_that(connection, store):
    for _ in range(50):
        record(store)
    plain, packed = [], []
    for coding, found in ((None, plain), ("gzip;q=0, br", plain), ("deflate, gzip;q=0.5", packed),
                          ("gzip", packed)):
        headers = {} if coding is None else {"Accept-Encoding": coding}
        connection.request("GET", "/api/v1/runs", headers=headers)
        response = connection.getresponse()
        found.append((response.headers["Content-Encoding"], response.headers["ETag"],
                      response.read()))
        assert response.headers["Vary"] == "Accept-Encoding"
    assert plain[0] == plain[1] and packed[0] == packed[1]
    assert plain[0][0] is None and packed[0][0] == "gzip" and packed[0][1] != plain[0][1]
    assert gzip.decompress(packed[0][2]) == plain[0][2]
    assert len(packed[0][2]) < len(plain[0][2]) / 5


def test_what_has_not_changed_is_not_computed_again(ask, store, monkeypatch):
    first = ask("/jobs")
    monkeypatch.setattr(roexec, "job_payloads", lambda *_: pytest.fail("it was computed"))
    assert ask("/jobs")[:2] == first[:2]
    monkeypatch.undo()
    record(store, "backup", "queued")
    assert ask("/jobs")[1]["jobs"][0]["active"] == "queued"


def test_what_changes_by_itself_is_computed_again_in_time(ask, store, monkeypatch):
    register(store, {"id": "often", "command": "x", "schedule": "0 */10 * * * *"})
    now = 1754042999.5
    monkeypatch.setattr(roexec.time, "time", lambda: now)
    path = "/jobs/often"
    assert ask(path)[1]["next_run"] == ask(path)[1]["next_run"] == "2025-08-01T10:10:00Z"
    now = 1754043000.0
    assert ask(path)[1]["next_run"] == "2025-08-01T10:20:00Z"


# Changes.

def test_a_job_is_registered_changed_and_deleted(ask, store):
    status, payload, _ = ask("/jobs/new", "PUT", b'{"command": "echo 1", "schedule": "@daily"}')
    assert (status, payload["dry_run"], payload["warnings"]) == (201, False, [])
    change, = payload["changes"]
    assert (change["id"], change["change"]) == ("new", "added")
    assert "+  - id: new\n" in change["diff"] and "+    command: echo 1\n" in change["diff"]
    assert spec_of(store, "new")["schedule"] == "@daily"
    status, payload, _ = ask("/jobs/new", "PUT", b"command: echo 2   # YAML\nid: new\n")
    change, = payload["changes"]
    assert (status, change["change"]) == (200, "changed")
    assert "-    command: echo 1\n+    command: echo 2\n" in change["diff"]
    assert ask("/jobs/new", "PUT", b"command: echo 2")[1]["changes"] == [
        {"id": "new", "change": "unchanged", "diff": None}]
    job = ask("/jobs/new")[1]
    assert (job["version"], job["source"], job["spec"]) == (
        2, None, {"id": "new", "command": "echo 2"})
    status, payload, _ = ask("/jobs/new", "DELETE")
    assert (status, payload["changes"][0]["change"]) == (200, "removed")
    assert ask("/jobs/new")[0] == ask("/jobs/new", "DELETE")[0] == 404


def test_a_dry_run_changes_nothing(ask, store):
    for path, method, body in (
            ("/jobs/new?dry_run=1", "PUT", b"command: x"), ("/jobs/hello?dry_run=1", "DELETE", None),
            ("/apply?dry_run=1&prune=1", "POST", b"jobs: [{id: new, command: x}]")):
        status, payload, _ = ask(path, method, body)
        assert status in (200, 201) and payload["dry_run"] and payload["changes"][0]["change"] in (
            "added", "removed")
    assert [job["id"] for job in ask("/jobs")[1]["jobs"]] == ["backup", "hello", "replaced"]


def test_a_change_of_another_version_than_was_meant_is_refused(ask, error):
    ask("/jobs/new", "PUT", b"command: a")
    tag = ask("/jobs/new")[2]["ETag"]
    for headers in ({"If_Match": '"2"'}, {"If_Match": '"x", "3-abc"'}, {"If_None_Match": "*"}):
        for method, body in (("PUT", b"command: b"), ("DELETE", None)):
            status, code, text = error("/jobs/new", method, body, **headers)
            assert (status, code) == (412, "precondition_failed")
            assert text == 'job "new" is version 1 by now; look at it again'
    assert error("/jobs/none", "PUT", b"command: b", If_Match="*")[2] == (
        'job "none" is not there by now; look at it again')
    assert ask("/jobs/none", "PUT", b"command: b", If_None_Match="*")[0] == 201
    assert ask("/jobs/new", "PUT", b"command: b", If_Match=tag)[0] == 200
    assert ask("/jobs/new", "PUT", b"command: c", If_Match=tag)[0] == 412
    assert ask("/jobs/new", "DELETE", If_Match='"2"')[0] == 200


def test_a_job_of_a_file_is_not_changed_elsewhere(error):
    status, code, text = error("/jobs/hello", "PUT", b"command: b")
    assert (status, code) == (409, "source")
    assert text == 'job "hello" is registered by /jobs.yml; change it there, or delete it first'
    assert error("/apply", "POST", b"jobs: [{id: hello, command: x}]")[:2] == (409, "source")


@pytest.mark.parametrize("path, method, body, problem", [
    ("/jobs/new", "PUT", b"command: x\nretris: 3\n",
     {"file": "the body", "line": 2, "column": 1, "path": ""}),
    ("/jobs/new", "PUT", b'{"command": "x",\n "timeout": "soon"}',
     {"file": "the body", "line": 2, "column": 13, "path": "timeout"}),
    ("/jobs/new", "PUT", b"command: [\n", {"file": "the body", "path": None}),
    ("/jobs/new", "PUT", b"- a\n", {"line": 1, "column": 1}),
    ("/jobs/new", "PUT", b"id: old\ncommand: x\n", {"path": "id", "line": 1}),
    ("/jobs/no%20id", "PUT", b"command: x\n", {"path": ""}),
    ("/jobs/new", "PUT", b"", {"file": "the body"}),
    ("/apply", "POST", b"jobs:\n  - id: a\n    comand: x\n",
     {"file": "api", "line": 3, "column": 5, "path": ""}),
    ("/apply?source=ci", "POST", b"{", {"file": "ci", "line": 1}),
    ("/apply", "POST", b'{"files": [{"source": "a.yml", "text": "jobs: [{id: a}]"}]}',
     {"file": "a.yml", "line": 1})])
def test_each_error_of_a_job_is_told_with_its_place(path, method, body, problem, ask, store):
    status, payload, _ = ask(path, method, body)
    assert (status, payload["error"]["code"]) == (422, "invalid")
    first = payload["error"]["errors"][0]
    assert {name: first[name] for name in problem} == problem and first["message"]
    assert first["message"] in payload["error"]["message"]
    assert spec_of(store, "new") is None and spec_of(store, "a") is None


def test_files_are_applied_together(ask, store):
    text = "jobs:\n  - {id: one, command: x}\n  - {id: two, command: y}\n"
    status, payload, _ = ask("/apply", "POST", text.encode())
    assert status == 200 and [(each["id"], each["change"]) for each in payload["changes"]] == [
        ("one", "added"), ("two", "added")]
    assert ask("/jobs/one")[1]["source"] == "api"
    files = {"files": [{"source": "a.yml", "text": text.replace("one", "three").replace(
        "two", "four")}, {"source": "b.json", "text": '{"job": {"id": "five", "command": "z"}}'}]}
    payload = ask("/apply", "POST", json.dumps(files).encode())[1]
    assert [each["id"] for each in payload["changes"]] == ["three", "four", "five"]
    assert ask("/jobs/five")[1]["source"] == "b.json"
    payload = ask("/apply?prune=1", "POST", b"jobs: [{id: one, command: x}]")[1]
    assert [(each["id"], each["change"]) for each in payload["changes"]] == [
        ("one", "unchanged"), ("two", "removed")]
    assert spec_of(store, "two") is None and spec_of(store, "three")


@pytest.mark.parametrize("query, body, message", [
    ("source=/etc/x", b"jobs: []", 'source: "/etc/x" cannot be a source; write a name'),
    ("source=", b"jobs: []", 'source: "" cannot be a source'),
    ("source=a", b'{"files": []}', "each of files has a source of its own"),
    ("", b'{"files": [{"source": "a", "text": ""}, {"source": "a", "text": ""}]}',
     "each of files has a source of its own"),
    ("", b'{"files": [{"source": "a"}]}', 'files is a list of {"source": '),
    ("", b'{"files": {}}', 'files is a list of {"source": ')])
def test_what_nobody_can_apply_is_refused(query, body, message, error):
    status, _, text = error("/apply?" + query, "POST", body)
    assert status == 400 and text.startswith(message)


def test_one_id_in_two_files_is_refused(ask):
    text = "job: {id: a, command: x}"
    files = {"files": [{"source": name, "text": text} for name in ("a.yml", "b.yml")]}
    status, payload, _ = ask("/apply", "POST", json.dumps(files).encode())
    assert status == 422
    assert payload["error"]["message"] == 'job "a" stands in a.yml and in b.yml; remove one of them'


def test_a_job_is_paused_and_resumed(ask, error, store):
    status, payload, _ = ask("/jobs/hello/pause", "POST")
    assert (status, payload["paused"], payload["paused_until"], payload["next_run"]) == (
        200, True, None, None)
    payload = ask("/jobs/hello/pause", "POST", b'{"for": "2h"}')[1]
    assert payload["paused"] and payload["paused_until"] and payload["next_run"]
    payload = ask("/jobs/hello/pause", "POST", b'{"until": "2999-01-01"}')[1]
    assert payload["paused_until"] == "2999-01-01T00:00:00Z"
    assert ask("/jobs/hello/resume", "POST")[1]["paused"] is False
    for body in (b'{"for": "soon"}', b'{"until": 3}', b'{"for": []}'):
        assert error("/jobs/hello/pause", "POST", body)[0] == 400
    assert error("/jobs/none/pause", "POST")[0] == error("/jobs/none/resume", "POST")[0] == 404


# Runs.

def test_a_run_that_waits_is_asked_for_by_queue(ask):
    first = ask("/jobs/hello/run", "POST")[1]
    assert ask("/jobs/hello/run", "POST")[0] == 409
    status, payload, _ = ask("/jobs/hello/run", "POST", b'{"queue": true}')
    assert (status, payload["state"]) == (202, "queued") and payload["id"] != first["id"]
    assert ask("/jobs/hello/run", "POST", b'{"queue": 1.5}')[0] == 400


def test_a_request_with_a_key_is_carried_out_once(ask, error, become):
    status, run, headers = ask("/jobs/hello/run", "POST", b"{}", Idempotency_Key="k1")
    assert status == 202 and headers["Idempotency-Replayed"] is None
    for _ in range(2):
        again = ask("/jobs/hello/run", "POST", b"{}", Idempotency_Key="k1")
        assert again[:2] == (202, run) and again[2]["Idempotency-Replayed"] == "true"
        assert again[2]["Location"] == headers["Location"]
    status, code, _ = error("/jobs/hello/run", "POST", b'{"env": {"A": "b"}}', Idempotency_Key="k1")
    assert (status, code) == (422, "key_reused")
    assert ask("/jobs/hello/run", "POST", b"{}", Idempotency_Key="k2")[0] == 409
    ask(f"/runs/{run['id']}/cancel", "POST")
    assert ask("/jobs/hello/run", "POST", Idempotency_Key="k2")[2]["Idempotency-Replayed"] is None, (
        "a refusal is not remembered")
    assert ask("/jobs/backup/run", "POST", Idempotency_Key="k1")[1]["job_id"] == "backup"
    assert len(ask("/runs")[1]["runs"]) == 3
    become("*")
    assert ask("/jobs/backup/run", "POST", Idempotency_Key="k1")[2]["Idempotency-Replayed"] is None


def test_a_key_is_forgotten_after_a_day(ask, store):
    run = ask("/jobs/backup/run", "POST", Idempotency_Key="k")[1]["id"]
    with store.write() as db:
        db.execute("UPDATE answers SET at = at - 86401")
    assert ask("/jobs/backup/run", "POST", Idempotency_Key="k")[1]["id"] != run


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "\xe4"])
def test_a_key_that_is_none_is_refused(key, error):
    status, _, text = error("/jobs/hello/run", "POST", Idempotency_Key=key)
    assert (status, text) == (400, "an Idempotency-Key has 1 to 255 visible characters")


def test_a_run_is_cancelled(ask, error, store):
    run = ask("/jobs/hello/run", "POST")[1]
    status, payload, headers = ask(f"/runs/{run['id']}/cancel", "POST")
    assert (status, payload["state"], payload["reason"]) == (202, "cancelled", "user")
    assert headers["Location"] == f"/api/v1/runs/{run['id']}"
    status, code, text = error(f"/runs/{run['id']}/cancel", "POST")
    assert (status, code) == (409, "state")
    assert text == f"run {run['id']} has ended already: cancelled"


def test_a_run_is_run_again(ask, error, store):
    run_id = record(store, "backup", "failed", reason="exit", env='{"A": "1", "B": "2"}')
    status, payload, headers = ask(f"/runs/{run_id}/retry", "POST", b'{"env": {"B": "3"}}',
                                   Idempotency_Key="k")
    assert (status, payload["retry_of"], payload["trigger"]) == (202, run_id, "retry")
    assert headers["Location"].endswith(payload["id"])
    assert json.loads(row_of(store, payload["id"])["env"]) == {"A": "1", "B": "3"}
    assert ask(f"/runs/{run_id}/retry", "POST", b'{"env": {"B": "3"}}', Idempotency_Key="k")[1][
        "id"] == payload["id"]
    assert error(f"/runs/{payload['id']}/retry", "POST")[:2] == (409, "state")
    unregistered = record(store, "adhoc", "failed", reason="exit", name="adhoc")
    assert error(f"/runs/{unregistered}/retry", "POST")[:2] == (409, "state")
    deleted = record(store, "gone", "failed", reason="exit")
    assert error(f"/runs/{deleted}/retry", "POST")[:2] == (409, "state")


# What a caller may see and give.

def test_who_may_not_define_jobs_does_not_see_what_is_secret_in_them(ask, store, become):
    register(store, {"id": "s", "command": "x", "env": {"A": "value"}, "stdin": "hidden",
                     "hooks": {"on_failure": [{"webhook": "http://x/secret"}, {"run": "hello"}],
                               "post_run": {"ping": "http://y/secret"}}})
    assert "secret" in json.dumps(ask("/jobs/s")[1])
    become("job:read")
    for path in ("/jobs/s", "/jobs"):
        text = json.dumps(ask(path)[1])
        assert not any(word in text for word in ("secret", "value", "hidden"))
    spec = ask("/jobs/s")[1]["spec"]
    assert spec["env"] == {"A": None} and spec["hooks"]["on_failure"][1] == {"run": "hello"}
    become("job:read", "job:write")
    assert "secret" in json.dumps(ask("/jobs/s")[1])


@pytest.mark.parametrize("scopes, env, expected", [
    (["run:create"], {"A": "1"}, 202), (["run:create"], {"C": "1"}, 403),
    (["run:create"], {"PATH": "/x"}, 403), (["run:create"], {"LD_PRELOAD": "/x"}, 403),
    (["run:create"], {"GIT_SSH_COMMAND": "x"}, 403), (["run:create"], {"GIT_DIR": "/x"}, 202),
    (["*"], {"PATH": "/x", "GIT_SSH_COMMAND": "x"}, 202),
    (["run:create", "job:write"], {"C": "1"}, 202), (["*"], {"MY_PATH": "1", "PATHS": "1"}, 202),
    *((["*"], {name: "1"}, 403) for name in (
        "LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONSTARTUP", "BASH_ENV", "ENV", "IFS",
        "PERL5LIB", "PERL5OPT", "RUBYOPT", "NODE_OPTIONS", "DYLD_INSERT_LIBRARIES", "GCONV_PATH",
        "JAVA_TOOL_OPTIONS", "BASH_FUNC_x", "GIT_EXEC_PATH"))])
def test_variables_are_given_by_who_may_give_them(scopes, env, expected, ask, store, become):
    register(store, {"id": "e", "command": "x", "params": {"GIT_DIR": {"default": "/y"}},
                     "env": {"A": "", "PATH": "/bin", "GIT_SSH_COMMAND": "ssh -4"}})
    become(*scopes)
    status, payload, _ = ask("/jobs/e/run", "POST", json.dumps({"env": env}).encode())
    assert status == expected
    if expected == 403:
        assert payload["error"]["message"].startswith(f"env.{list(env)[0]}: the job does not ")


def test_who_sees_some_jobs_sees_nothing_of_others(ask, error, store, become):
    runs = {job_id: [record(store, job_id, at=NOW + number) for number in range(3)]
            for job_id in ("hello", "backup")}
    register(store, {"id": "hidden", "command": "x", "tags": ["x"]})
    become("*", pattern="h[e]*")
    assert ask("/jobs")[1]["jobs"] == []
    become("*", pattern="hel*")
    assert [job["id"] for job in ask("/jobs?limit=1")[1]["jobs"]] == ["hello"]
    assert ask("/jobs?limit=1")[1]["next"] is None
    assert [run["id"] for run in ask("/runs?limit=3")[1]["runs"]] == runs["hello"][::-1]
    assert ask("/runs?limit=3")[1]["next"] is None and ask("/runs?tag=x")[1]["runs"] == []
    assert ask("/runs?job=backup")[1]["runs"] == []
    assert list(ask("/history?jobs=backup,hello")[1]["jobs"]) == ["hello"]
    assert ask("/runs/latest")[1]["job_id"] == "hello"
    hidden = runs["backup"][0]
    for method, path in (("GET", f"/runs/{hidden}"), ("GET", f"/runs/{hidden}/logs"),
                         ("POST", f"/runs/{hidden}/cancel"), ("POST", f"/runs/{hidden}/retry"),
                         ("GET", f"/runs/{hidden[:6]}"), ("GET", "/runs/backup")):
        unknown = error(path.replace(hidden, "0123456789").replace(hidden[:6], "012345").replace(
            "backup", "never"), method)
        found = error(path, method)
        assert found[:2] == unknown[:2] == (404, "not_found")
        assert found[2].startswith("there is no run ")
    for method, path in (("GET", "/jobs/{}"), ("POST", "/jobs/{}/run"), ("POST", "/jobs/{}/pause"),
                         ("POST", "/jobs/{}/resume"), ("DELETE", "/jobs/{}")):
        for job_id in ("backup", "backuq"):
            assert error(path.format(job_id), method) == (
                404, "not_found", f'there is no job "{job_id}"')
    assert error("/jobs/backup", "PUT", b"command: x") == (
        404, "not_found", 'there is no job "backup"')
    assert error("/jobs/hello2", "PUT", b"command: x\nhooks: {on_failure: {run: backup}}")[0] == 403
    assert ask("/jobs/hello2", "PUT", b"command: x")[0] == 201
    assert error("/apply", "POST", b"jobs: [{id: hello3, command: x}, {id: b, command: x}]")[2] == (
        'job "b" is none of those that this token is about: hel*')


def test_pruning_leaves_jobs_alone_that_one_does_not_see(ask, store, become):
    ask("/apply", "POST", b"jobs: [{id: a1, command: x}, {id: a2, command: x}, {id: b, command: x}]")
    become("*", pattern="a*")
    payload = ask("/apply?prune=1", "POST", b"jobs: [{id: a1, command: x}]")[1]
    assert [(each["id"], each["change"]) for each in payload["changes"]] == [
        ("a1", "unchanged"), ("a2", "removed")]
    assert spec_of(store, "b")


# What is to come, and why.

def test_the_next_slots_of_a_job_are_given(ask, error):
    status, payload, _ = ask("/jobs/hello/next?count=2&from=2025-08-01T03:00:00Z")
    assert status == 200 and [slot["slot"] for slot in payload["slots"]] == [
        "2025-08-02T02:00:00Z", "2025-08-03T02:00:00Z"]
    assert payload["slots"][0] == {
        "job_id": "hello", "slot": "2025-08-02T02:00:00Z", "local": "2025-08-02T02:00:00+00:00",
        "schedule": "0 2 * * *", "mark": None}
    assert (payload["enabled"], payload["paused"], payload["paused_until"]) == (True, False, None)
    assert len(ask("/jobs/hello/next")[1]["slots"]) == 10
    assert ask("/jobs/backup/next")[1]["slots"] == [] and error("/jobs/none/next")[0] == 404


def test_the_next_slots_of_all_jobs_are_given(ask, store, become):
    register(store, {"id": "often", "command": "x", "schedule": "0 */12 * * *"},
             {"id": "paused", "command": "x", "schedule": "@hourly"})
    with store.write() as db:
        roexec.pause_job(db, "paused", True)
    begin = "from=2025-08-01T00:00:00Z"
    found = [(slot["job_id"], slot["slot"][11:13]) for slot in ask(
        f"/next?{begin}&count=3")[1]["slots"]]
    assert found == [("often", "00"), ("hello", "02"), ("often", "12")]
    payload = ask(f"/next?{begin}&jobs=often,paused,never&each=1&to=2025-08-02T00:00:00Z")[1]
    assert [slot["job_id"] for slot in payload["slots"]] == ["often", "paused"]
    assert payload["cut"] == ["often", "paused"]
    payload = ask(f"/next?{begin}&to=2025-08-02T00:00:00Z&duration=13h")[1]
    assert (payload["count"], payload["meet"]) == (3, 1)
    assert [slot["action"] for slot in payload["slots"]] == ["start", "start", "skip"]
    assert ask(f"/next?{begin}&to=2025-08-02T00:00:00Z")[1]["unknown_durations"] == [
        "hello", "often"]
    become("job:read", pattern="o*")
    assert {slot["job_id"] for slot in ask(f"/next?{begin}")[1]["slots"]} == {"often"}


@pytest.mark.parametrize("query, message", [
    ("count=1&each=1", "count is without to and each"), ("duration=1h", "count is without to"),
    ("from=2025-08-01&to=2025-07-01", "to: that is before the first instant asked for"),
    ("to=2999-01-01", "that would be more than 10000 slots"),
    ("from=2025-08-01&to=2025-08-01T00:01&duration=x", "duration: "), ("from=x", 'from: "x" is no '),
    ("jobs=", "jobs: give the ids of 1 to 1000 jobs"), ("each=1001", "each: "),
    ("to=", 'to: "" is no instant'), ("from=", 'from: "" is no instant')])
def test_what_is_to_come_is_not_told_as_nobody_can_ask(query, message, error, store):
    register(store, {"id": "each-second", "command": "x", "schedule": "* * * * * *"})
    status, code, text = error("/next?" + query)
    assert (status, code) == (400, "bad_request") and text.startswith(message)


def test_why_is_answered(ask, error, store):
    record(store, at=1754013600, slot=1754013600, trigger="schedule")
    status, payload, _ = ask("/jobs/hello/why?at=2025-08-01T02:00:00Z")
    assert (status, payload["job_id"]) == (200, "hello")
    answer, = payload["answers"]
    assert answer["slot"] == "2025-08-01T02:00:00Z" and answer["why"][0]["text"]
    now = ask("/jobs/hello/why")[1]
    assert now["answers"][0]["slot"] is None
    assert "no_server" in [sentence["reason"] for sentence in now["answers"][0]["why"]]
    assert error("/jobs/hello/why?at=soon")[:2] == (400, "bad_request")
    assert error("/jobs/none/why")[0] == 404


def test_runs_of_others_are_not_named_in_an_answer_to_why(ask, store, become):
    with store.write() as db:
        roexec.set_settings(db, {"scheduler": {"max_concurrent": 1}})
    other = record(store, "backup", "running")
    record(store, "hello", "queued")
    assert other in json.dumps(ask("/jobs/hello/why")[1])
    become("job:read", pattern="hello")
    assert other not in json.dumps(ask("/jobs/hello/why")[1])


def test_jobs_are_exported_as_a_file(ask, error, become):
    status, content, headers = ask("/export?jobs=backup")
    assert (status, headers["Content-Type"]) == (200, "application/yaml")
    job, = roexec.read_job_file(content, "x", "/").jobs
    assert job.id == "backup" and job.env == {"A": "b"}
    assert len(ask("/export", Accept="application/json")[1]["jobs"]) == 3
    assert error("/export?jobs=none")[0] == 404
    become("*", pattern="h*")
    assert error("/export?jobs=backup")[0] == 404
    assert b"id: hello" in ask("/export")[1] and b"backup" not in ask("/export")[1]


def test_a_caller_learns_who_they_are(ask, become):
    payload = ask("/me")[1]
    assert payload["owner"] and payload["scopes"] == list(roexec.SCOPES)
    assert (payload["version"], payload["timezone"]) == (roexec.__version__, "UTC")
    assert abs(roexec.parse_instant(payload["now"], None) - time.time()) < 60
    become("job:read", pattern="h*")
    payload = ask("/me")[1]
    assert (payload["name"], payload["owner"], payload["scopes"], payload["jobs"]) == (
        "token t", False, ["job:read"], "h*")


def test_params_are_given_by_name_and_secret_ones_are_kept_nowhere(ask, error, store, become):
    register(store, {"id": "p", "command": "x", "overlap": "queue", "params": {
        "SIZE": {"default": "1"}, "KEY": {"secret": True}}})
    become("run:create", "run:list")
    body = b'{"params": {"SIZE": "2", "KEY": "s3cr3t-value"}}'
    status, run, _ = ask("/jobs/p/run", "POST", body, Idempotency_Key="k")
    assert status == 202
    assert json.loads(row_of(store, run["id"])["env"]) == {"SIZE": "2", "KEY": None}
    with store.read() as db:
        assert "s3cr3t-value" not in "\n".join(db.iterdump())
    again = ask("/jobs/p/run", "POST", body.replace(b"s3cr3t", b"0ther"), Idempotency_Key="k")
    assert again[1]["id"] == run["id"], "a secret is not part of what is compared"
    assert error("/jobs/p/run", "POST", body.replace(b"SIZE", b"SIZ"))[:2] == (
        422, "invalid_params")
    assert error("/jobs/p/run", "POST")[:2] == (422, "invalid_params")
    assert error("/jobs/p/run", "POST", b'{"params": {"SIZE": 2}}')[:2] == (400, "bad_request")


def test_how_the_server_does_is_told(ask, store, become):
    run = record(store, "backup", "running")
    record(store, "hello", "queued")
    with store.write() as db:
        for run_id in (run, None):
            roexec.add_notice(db, "webhook", "http://x/secret", run_id, b"", NOW, title="failed")
    status = ask("/status")[1]
    assert (status["health"], status["jobs"], status["running"], status["queued"]) == (
        "healthy", 3, 1, 1)
    assert status["store"] == store.path and len(status["unsent_notices"]) == 2
    assert "secret" not in str(status)
    become("job:read", pattern="hel*")
    assert ask("/status")[1] == {
        "store": None, "process": None, "health": "healthy", "jobs": 1, "running": 0, "queued": 1,
        "warnings": [], "unsent_notices": []}


def test_a_step_that_begins_is_seen_though_the_database_does_not_change(ask, store):
    parent = record(store, state="running")
    step = record(store, state="queued", step="one", parent=parent, trigger="pipeline")
    paths = (f"/runs/{step}", f"/runs?parent={parent}")
    first = [ask(path)[1] for path in paths]
    assert first[1]["runs"] == [first[0]] and first[0]["state"] == "queued"
    journal = roexec.Journal.create(store.file("active"), {"run": step, "parent": parent,
                                                           "step": "one"})
    journal.note("supervisor", pid=1, start=1, log=None)
    assert [ask(path)[1] for path in paths][0]["state"] == "running"
    assert ask(paths[1])[1]["runs"][0]["state"] == "running"
    journal.close()
