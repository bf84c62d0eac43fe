"""Metrics: what is counted, that nothing is lost or counted twice, and that Prometheus reads it."""
import contextlib
import json
import re
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from helpers import (apply, claimed, make_job, perform, serve, status_of, supervise,
                     token, tool, wait_for)

import roexec
from roexec import BUCKETS, job_samples, metrics_text, read_counters

EXAMPLES = Path(__file__).parent.parent / "examples"
NOW = 1754042400.0          # 2025-08-01T10:00:00Z


def counters(store, job_id="x"):
    with store.read() as db:
        return read_counters(db).get(job_id, {})


def turn_on(store, **settings):
    with store.write() as db:
        roexec.set_settings(db, {"metrics": {"enabled": True, **settings}})


def text_of(store, vitals=None):
    """What /metrics answers."""
    request = roexec.Request("GET", "/metrics")
    request.route, request.vitals = roexec.find_routes("/metrics")[0]["GET"], vitals
    return request.route.handler(request, store).body.decode()


def metrics(store):
    """{name with its labels: value} as /metrics has them."""
    text = text_of(store)
    return {name: float(value) for name, value in (
        line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))}


def end(store, state, reason=None, job_id="x", took=2.5, **columns):
    """A run that has ended."""
    with store.write() as db:
        run_id = roexec.add_run(db, **{
            "id": roexec.new_run_id(), "job_id": job_id, "trigger": "manual", "state": "queued",
            "queued_at": NOW, **columns})
        attempts = []
        if took is not None:
            roexec.change_run(db, run_id, "running", started_at=NOW)
            attempts = [{"number": 1, "started_at": NOW, "finished_at": NOW + took}]
        roexec.finish_run(db, run_id, state, attempts, reason=reason, finished_at=NOW + 100)


# What is counted.

@pytest.mark.parametrize("state, reason, columns, expected", [
    ("succeeded", None, {}, {("runs", "succeeded"): 1, ("took", "5"): 1, ("seconds", ""): 2.5,
                             ("success", ""): NOW + 100}),
    ("failed", "exit", {}, {("runs", "failed"): 1, ("took", "5"): 1, ("seconds", ""): 2.5}),
    ("cancelled", "user", {"took": None}, {("runs", "cancelled"): 1}),
    ("skipped", "condition", {"took": None}, {("runs", "skipped"): 1}),
    ("skipped", "condition", {"took": None, "slot": 60}, {("runs", "skipped"): 1,
                                                          ("skipped", "condition"): 1}),
    ("succeeded", None, {"step": "a", "parent": "b"}, {}),
    ("succeeded", None, {"job_id": "unknown"}, {}),
    ("timed_out", "timeout", {"took": 99_999}, {("runs", "timed_out"): 1, ("took", "+Inf"): 1,
                                                ("seconds", ""): 99_999}),
    ("succeeded", None, {"took": 1}, {("runs", "succeeded"): 1, ("took", "1"): 1,
                                      ("seconds", ""): 1, ("success", ""): NOW + 100})])
def test_a_run_that_ends_is_counted(state, reason, columns, expected, store):
    apply(store, make_job())
    end(store, state, reason, **columns)
    assert counters(store) == expected
    assert columns.get("job_id") is None or not counters(store, columns["job_id"])


def test_slots_that_are_skipped_are_counted_one_by_one(store):
    apply(store, make_job(schedule="* * * * *"))
    for first, last, count in ((60, 180, 3), (240, 240, 1), (240, 240, 1)):
        with store.write() as db:
            roexec.skip_slots(db, "x", roexec.SlotRow(
                slot=first, last_slot=last, count=count, trigger="schedule", reason="paused"), NOW)
    assert counters(store) == {("skipped", "paused"): 4}


def test_a_run_that_is_refused_at_once_is_counted(store):
    apply(store, make_job())
    with store.write() as db:
        roexec.add_run(db, id="a", job_id="x", trigger="pipeline", state="failed", reason="start",
                       queued_at=NOW, finished_at=NOW)
    assert counters(store) == {("runs", "failed"): 1}


def test_counters_outlive_their_runs_and_end_with_their_job(store):
    apply(store, make_job(), make_job(job_id="y"))
    perform(store), perform(store, "exit 3"), end(store, "succeeded", job_id="y")
    before = counters(store)
    assert (before["runs", "succeeded"], before["runs", "failed"]) == (1, 1)
    with store.write() as db:
        db.execute("DELETE FROM runs")
    assert counters(store) == before
    with store.write() as db:
        roexec.delete_jobs(db, ["x"], NOW)
    assert not counters(store) and counters(store, "y")
    end(store, "succeeded")                         # one that was on when its job was deleted
    assert not counters(store)
    turn_on(store)
    assert not [name for name in metrics(store) if 'job_name="x"' in name]


def test_an_end_that_is_taken_in_late_is_counted_once(store):
    apply(store, make_job())
    journal = claimed(store, make_job())
    signals = roexec.Signals()
    with contextlib.closing(signals):
        roexec.Supervision(journal, store.folder, signals).perform()
    assert not counters(store)
    journal.close()
    roexec.settle(store), roexec.settle(store)
    assert counters(store)["runs", "succeeded"] == 1


# What is shown.

def test_the_samples_of_a_job_are_what_was_counted():
    found = job_samples("x", {("runs", "failed"): 2, ("runs", "lost"): 1, ("runs", "succeeded"): 4,
                              ("took", "5"): 3, ("took", "+Inf"): 1, ("seconds", ""): 1e5,
                              ("skipped", "paused"): 7, ("success", ""): NOW},
                        {"roexec_runs_active": 0, "roexec_next_run_timestamp_seconds": None})
    assert [(name, {**labels, "job_name": ""}, value) for name, labels, value in found] == [
        *[("roexec_run_count_total", {"job_name": "", "outcome": state}, value)
          for state, value in (("failed", 2), ("lost", 1), ("succeeded", 4))],
        ("roexec_run_errors_total", {"job_name": ""}, 3),
        ("roexec_slots_skipped_total", {"job_name": "", "reason": "paused"}, 7),
        *[("roexec_run_duration_seconds_bucket", {"job_name": "", "le": str(bound)}, value)
          for bound, value in zip((*BUCKETS, "+Inf"), (0, 3, 3, 3, 3, 3, 3, 3, 4))],
        ("roexec_run_duration_seconds_sum", {"job_name": ""}, 1e5),
        ("roexec_run_duration_seconds_count", {"job_name": ""}, 4),
        ("roexec_runs_active", {"job_name": ""}, 0),
        ("roexec_last_success_timestamp_seconds", {"job_name": ""}, NOW)]


def test_a_job_that_has_not_run_has_an_error_count_that_can_grow():
    assert job_samples("x", {}, {}) == [("roexec_run_errors_total", {"job_name": "x"}, 0)]


def test_labels_are_quoted_and_families_stand_together():
    text = metrics_text([("roexec_run_errors_total", {"job_name": 'a"b\\c\nd'}, 0),
                         ("roexec_runs_active", {"job_name": "x"}, 1),
                         ("roexec_run_errors_total", {"job_name": "y"}, 2.5)])
    assert ('# TYPE roexec_run_errors_total counter\n'
            'roexec_run_errors_total{job_name="a\\"b\\\\c\\nd"} 0\n'
            'roexec_run_errors_total{job_name="y"} 2.5\n') in text


def test_beyond_so_many_jobs_they_are_summed(store):
    apply(store, *(make_job(job_id=name, schedule="0 0 * * *") for name in ("a", "b", "c")))
    turn_on(store, max_jobs=1)
    for name in ("a", "b", "c", "c"):
        end(store, "succeeded", job_id=name)
    end(store, "failed", "exit", job_id="b")
    for name in ("b", "c", "of-a-command"):
        with store.write() as db:
            roexec.add_run(db, id=roexec.new_run_id(), job_id=name, trigger="manual",
                           state="queued", queued_at=NOW)
    found = metrics(store)
    assert {re.search('job_name="(.*?)"', name)[1] for name in found if "job_name" in name} == {
        "a", "_other"}
    assert found['roexec_run_count_total{job_name="a",outcome="succeeded"}'] == 1
    assert found['roexec_run_count_total{job_name="_other",outcome="succeeded"}'] == 3
    assert found['roexec_run_errors_total{job_name="_other"}'] == 1
    assert found['roexec_runs_queued{job_name="_other"}'] == 3
    assert found['roexec_last_success_timestamp_seconds{job_name="_other"}'] == NOW + 100
    assert found['roexec_run_duration_seconds_sum{job_name="_other"}'] == 10
    for name in ("a", "_other"):
        coming = found[f'roexec_next_run_timestamp_seconds{{job_name="{name}"}}']
        assert 0 < coming - time.time() <= 25 * 3600
    assert not roexec.valid_id(roexec.OTHER_JOBS)


def test_metrics_are_there_where_they_are_wanted_and_for_whom(store):
    server = serve(store, auth={"owner": False})
    with contextlib.closing(server):
        given = {"Authorization": f"Bearer {token(store, scopes=['metrics:read'])}"}
        assert status_of(server, "GET", "/metrics", **given) == 404
        turn_on(store)
        assert status_of(server, "GET", "/metrics", **given) == 200
        assert status_of(server, "GET", "/metrics?x=1", **given) == 400
        assert status_of(server, "GET", "/metrics") == 401
        for name, scopes, pattern in (("a", ["run:list"], None), ("b", ["*"], "*")):
            text = token(store, name, scopes=scopes, jobs=pattern)
            assert status_of(server, "GET", "/metrics", Authorization=f"Bearer {text}") == 403


def test_the_lag_is_that_of_the_scheduler(store):
    turn_on(store)
    assert metrics(store)["roexec_scheduler_lag_seconds"] == 0

    class Vitals:
        claims = roexec.Alone(lambda: False)

        def lag(self):
            return 12.5
    text = text_of(store, Vitals())
    assert "\nroexec_scheduler_lag_seconds 12.5\n" in text and "\nroexec_leader 0\n" in text


# Prometheus.

@pytest.fixture
def many(store):
    """A store in which all of it has happened."""
    apply(store, make_job(), make_job(job_id="y", schedule="* * * * *"))
    turn_on(store)
    end(store, "succeeded"), end(store, "failed", "exit"), end(store, "lost", "power")
    end(store, "succeeded", took=0.001), end(store, "succeeded", job_id="y", took=1e9)
    with store.write() as db:
        roexec.skip_slots(db, "y", roexec.SlotRow(slot=60, last_slot=60, count=1,
                                                  trigger="schedule", reason="window"), NOW)
    return store


@pytest.mark.engine
def test_promtool_finds_nothing_to_remark(many):
    promtool = tool("promtool", package="prometheus")
    text = text_of(many)
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True,
                             text=True, timeout=60)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    names = re.findall(r"^([^#]\S*(?: \S*)?) \S+$", text, re.M)
    assert len(names) == len(set(names)) > 30


@pytest.mark.engine
def test_the_alert_rules_are_accepted_and_proved():
    promtool = tool("promtool", package="prometheus")
    for words in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts-test.yml"]):
        done = subprocess.run([promtool, *words], cwd=EXAMPLES, capture_output=True, text=True,
                              timeout=60)
        assert done.returncode == 0 and "SUCCESS" in done.stdout, done.stdout + done.stderr


@contextlib.contextmanager
def prometheus(folder, target, credentials):
    """A Prometheus that scrapes a target each second -> `ask(query)`, its results."""
    program = tool("prometheus")
    shutil.copy(EXAMPLES / "alerts.yml", folder)
    (folder / "token").write_text(credentials)
    (folder / "prometheus.yml").write_text(json.dumps({
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": ["alerts.yml"],
        "scrape_configs": [{"job_name": "roexec", "static_configs": [{"targets": [target]}],
                            "authorization": {"credentials_file": "token"}}]}))
    log = open(folder / "log", "w")
    server = subprocess.Popen(
        [program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
         "--web.listen-address=127.0.0.1:0"], stdout=log, stderr=log, cwd=folder)
    try:
        port = wait_for(lambda: re.search(
            r"Listening on\W+address=127.0.0.1:(\d+)", (folder / "log").read_text()),
            what=lambda: (folder / "log").read_text())[1]

        def ask(query):
            url = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode(
                {"query": query})
            with contextlib.suppress(urllib.error.HTTPError):       # it is not ready yet
                with urllib.request.urlopen(url, timeout=60) as answer:
                    return json.load(answer)["data"]["result"]
            return []
        yield ask
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
        log.close()


@pytest.mark.engine
def test_prometheus_scrapes_it_with_a_token(many, tmp_path):
    server = serve(many, auth={"owner": False})
    with contextlib.closing(server), prometheus(
            tmp_path, "127.0.0.1:%d" % server.address[1],
            token(many, scopes=["metrics:read"])) as ask:
        up = wait_for(lambda: [row for row in ask("up") if row["value"][1] == "1"],
                      what=lambda: (tmp_path / "log").read_text())
        assert len(up) == 1
        # A scrape that takes longer than a second is none, and what it would have told is not there.
        row, = wait_for(lambda: ask("roexec_run_errors_total{job_name='x'}"))
        assert row["value"][1] == "2" and "exported_job" not in row["metric"]
        row, = wait_for(lambda: ask(
            "histogram_quantile(0.5, sum by (le) (roexec_run_duration_seconds_bucket))"))
        assert 1 < float(row["value"][1]) <= 5
        end(many, "failed", "exit")
        wait_for(lambda: [row for row in ask("ALERTS{alertname='JobFailed'}")
                          if row["metric"]["job_name"] == "x"])
