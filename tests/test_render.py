"""Payloads (what --json and the API give) and the text that people and pipes see."""
import ast
import datetime
import json
import math
import re

import pytest

import roexec
from roexec import Job, Style, job_payload, jobs_table, run_payload, run_text, runs_table, table

UTC = datetime.timezone.utc
BERLIN = datetime.timezone(datetime.timedelta(hours=2), "CEST")
NOON = 1754042400           # 2025-08-01T10:00:00Z

RUN = {"seq": 1, "id": "abcd123456", "job_id": "backup", "name": None, "version": 1, "spec": None,
       "step": None, "parent": None, "retry_of": None, "trigger": "schedule", "slot": NOON,
       "last_slot": None, "count": 1, "state": "succeeded", "reason": None, "message": None,
       "cancel": None, "owner": None, "env": '{"SECRET":"x"}', "priority": 0,
       "queued_at": NOON + 0.25, "started_at": NOON + 0.5, "finished_at": NOON + 10.5,
       "exit_code": 0, "signal": None, "boot": "b", "node": None, "log": "logs/backup/1.log"}
ATTEMPT = {"run_id": "abcd123456", "number": 1, "started_at": NOON + 0.5,
           "finished_at": NOON + 3.0, "exit_code": 0, "signal": None, "cpu_seconds": 0.5,
           "max_rss_bytes": 2_000_000, "output_bytes": 12}
SPEC = {"id": "backup", "name": "Back up", "schedule": "0 2 * * *", "command": "true",
        "tags": ["nightly"]}
JOB_ROW = {"id": "backup", "spec": json.dumps(SPEC), "version": 3, "source": "/etc/jobs.yml",
           "paused": 0, "active": None, "last_id": None, "last_state": None,
           "last_started_at": None, "last_finished_at": None}


def run(**changes):
    attempts = changes.pop("attempts", [ATTEMPT])
    return run_payload({**RUN, **changes}, attempts)


def job(row=(), spec=(), next_run=None, zone=UTC):
    spec = {**SPEC, **dict(spec)}
    row = {**JOB_ROW, "spec": json.dumps(spec), **dict(row)}
    return job_payload(row, Job.from_spec(spec), next_run, zone, NOON)


def cells(text):
    """The cells of a table's lines."""
    return [[cell.strip() for cell in line.split("  ") if cell] for line in text.splitlines()]


# Payloads.

def test_a_run_has_exactly_the_members_that_the_design_lists():
    assert list(run()) == [
        "id", "job_id", "step", "parent", "retry_of", "name", "trigger", "slot", "last_slot",
        "count", "state", "reason", "message", "queued_at", "started_at", "finished_at",
        "duration", "exit_code", "signal", "attempts", "retry_at", "progress", "node", "log"]
    assert list(run()["attempts"][0]) == [
        "number", "started_at", "finished_at", "exit_code", "signal", "cpu_seconds",
        "max_rss_bytes", "output_bytes"]


def test_a_run_never_shows_the_values_of_its_variables():
    assert "SECRET" not in json.dumps(run())


def test_instants_of_a_run_are_utc_text_with_fractions_where_known():
    payload = run()
    assert payload["slot"] == "2025-08-01T10:00:00Z"
    assert payload["queued_at"] == "2025-08-01T10:00:00.25Z"
    assert payload["attempts"][0]["finished_at"] == "2025-08-01T10:00:03Z"


@pytest.mark.parametrize("changes, expected", [
    ({}, 2.5),
    ({"attempts": [ATTEMPT, {**ATTEMPT, "number": 2, "started_at": NOON + 5,
                             "finished_at": NOON + 9}]}, 8.5),
    ({"attempts": []}, 10.0),
    ({"attempts": [{**ATTEMPT, "finished_at": None}], "state": "lost"}, 10.0),
    ({"finished_at": None, "state": "running"}, None),
    ({"started_at": None, "state": "skipped", "attempts": []}, None),
])
def test_the_duration_is_from_the_first_attempts_start_to_the_last_ones_end(changes, expected):
    assert run(**changes)["duration"] == expected


def test_an_attempt_that_is_on_has_null_for_what_is_unknown():
    attempt = run(attempts=[{"number": 1, "started_at": NOON}])["attempts"][0]
    assert attempt == {"number": 1, "started_at": "2025-08-01T10:00:00Z", "finished_at": None,
                       "exit_code": None, "signal": None, "cpu_seconds": None,
                       "max_rss_bytes": None, "output_bytes": None}


def test_a_job_has_the_members_of_the_design():
    payload = job({"last_id": "r1", "last_state": "failed", "last_started_at": NOON,
                   "last_finished_at": NOON + 1}, next_run=NOON)
    assert payload == {
        "id": "backup", "name": "Back up", "schedule": ["0 2 * * *"],
        "words": ["at 02:00 every day"], "usual": None, "timezone": "UTC",
        "enabled": True, "paused": False, "paused_until": None, "next_run": "2025-08-01T10:00:00Z",
        "last_run": {"id": "r1", "state": "failed", "started_at": "2025-08-01T10:00:00Z",
                     "finished_at": "2025-08-01T10:00:01Z"},
        "tags": ["nightly"], "source": "/etc/jobs.yml", "spec": SPEC, "version": 3,
        "active": None}


def test_a_job_without_runs_and_slots_has_null_there():
    payload = job()
    assert payload["last_run"] is None and payload["next_run"] is None


def test_the_spec_of_a_job_is_as_written_and_the_rest_as_it_is_in_effect():
    row = {**JOB_ROW, "spec": json.dumps(SPEC)}
    in_effect = Job.from_spec({**SPEC, "timezone": "+05:00", "enabled": False})
    payload = job_payload(row, in_effect, None, UTC, NOON)
    assert (payload["timezone"], payload["enabled"]) == ("+05:00", False)
    assert payload["spec"] == SPEC


def test_a_page_says_what_it_lists_and_where_the_next_one_begins():
    assert roexec.page("jobs", [1], "c") == {"jobs": [1], "next": "c"}
    assert roexec.page("runs", []) == {"runs": [], "next": None}


# What comes next.

class Hourly:
    """A schedule with a slot at each full hour; 02:00 of the day was moved from 01:30."""
    reboot, zone = False, None

    def next_slot(self, after, zone):
        return (after // 3600 + 1) * 3600

    def moved(self, slot, zone):
        return "01:30" if slot % 86400 == 7200 else None


@pytest.fixture
def hourly(monkeypatch):
    monkeypatch.setattr(Job, "crons", lambda self: (Hourly(),) if self.schedule else ())
    return lambda **spec: Job.from_spec({**SPEC, **spec})


def take(count, slots):
    return [slot for slot, _ in zip(slots, range(count))]


def test_slots_outside_the_window_do_not_come(hourly):
    windowed = hourly(window={"start": "2025-08-01T12:00:00Z", "end": "2025-08-01T14:00:00Z"})
    assert take(9, roexec.upcoming_slots(windowed, NOON, UTC)) == [
        NOON + 7200, NOON + 10800, NOON + 14400]


@pytest.mark.parametrize("spec", [{"enabled": False}, {"schedule": []}])
def test_a_job_that_is_disabled_or_has_no_schedule_has_no_next_run(hourly, spec):
    assert roexec.next_run(hourly(**spec), NOON, UTC) is None


def test_a_paused_job_has_no_next_run(hourly):
    assert roexec.next_run(hourly(), NOON, UTC, paused=math.inf) is None
    assert roexec.next_run(hourly(), NOON, UTC) == NOON + 3600


def test_the_next_run_is_the_slot_and_its_jitter(hourly):
    jittered = hourly(jitter="10m")
    delay = roexec.jitter_delay("backup", NOON + 3600, 600)
    assert roexec.next_run(jittered, NOON, UTC) == NOON + 3600 + delay


def test_a_coming_slot_says_what_a_change_of_clocks_does_to_it(hourly):
    zone = roexec.get_zone("Europe/Berlin")
    fold = 1761436800       # 2025-10-26T00:00:00Z, when 02:00 comes for the first time
    assert [roexec.slot_payload(hourly(), slot, zone)["mark"] for slot in (
        fold, fold + 3600, fold + 7200, fold + 10800)] == [
        "first of two", "second of two", "moved from 01:30", None]
    assert roexec.slot_payload(hourly(), NOON, BERLIN)["local"] == "2025-08-01T12:00:00+02:00"


# Why.

def every_reason():
    """The reasons for a slot to be skipped, and those that stand in the code of `explain`."""
    with open(roexec.__file__, encoding="utf-8") as file:
        functions = [node for node in ast.parse(file.read()).body
                     if re.match("_?(explain|why)(_|$)", getattr(node, "name", ""))]
    dicts = [node for function in functions for node in ast.walk(function)
             if isinstance(node, ast.Dict)]
    found = {ast.literal_eval(value) for node in dicts for key, value in zip(node.keys, node.values)
             if isinstance(value, ast.Constant) and getattr(key, "value", None) == "reason"}
    return {*roexec.REASONS["skipped"], *found, "queued_job", "queued_catch_up"}


def test_each_reason_has_a_sentence_and_each_sentence_a_reason():
    assert set(roexec._SENTENCES) == every_reason()


@pytest.mark.parametrize("sentence, text", [
    ({"reason": "running", "run": "r1", "since": NOON, "attempt": None},
     "Run r1 is on since 2025-08-01T10:00:00Z"),
    ({"reason": "retry", "run": "r1", "attempt": 2, "until": NOON},
     "Run r1 has failed and waits for its next attempt, number 2, until 2025-08-01T10:00:00Z"),
    ({"reason": "queued_job", "run": "r9", "behind": list("abcdefg"), "limit": 1},
     "Run r9 waits for a place behind a, b, c, d, e and 2 more: max_concurrent of the job is 1"),
    ({"reason": "paused", "since": None}, "The job is paused: roexec resume backup"),
    ({"reason": "paused", "since": None, "until": NOON},
     "The job is paused until 2025-08-01T10:00:00Z: roexec resume backup"),
    ({"reason": "window", "start": None, "end": NOON},
     "That is outside of its window until 2025-08-01T10:00:00Z"),
    ({"reason": "overlap", "overlap": "skip", "others": [
        {"id": "r0", "state": "succeeded", "started_at": NOON - 60, "finished_at": NOON}]},
     "It was skipped, since the job was on: run r0 (started 2025-08-01T09:59:00Z, ended "
     "2025-08-01T10:00:00Z, succeeded) (overlap: skip)"),
    ({"reason": "missed", "alive": NOON, "seen": NOON + 7200, "late": 7000, "window": 3600,
      "why": "window"},
     "It was missed: no server saw it in time; one had decided something 2025-08-01T10:00:00Z for "
     "the last time; one saw it 2025-08-01T12:00:00Z, 1h57m late; catch_up_window is 1h"),
    ({"reason": "condition", "run": "r1", "message": "the condition ended with {run}\x1b"},
     "It was skipped by its condition: the condition ended with {run}\\x1b; roexec logs r1"),
    ({"reason": "ran", "run": "r1", "state": "failed", "detail": "exit", "since": NOON,
      "late": None, "until": NOON, "message": None},
     "Run r1: failed (exit), started 2025-08-01T10:00:00Z, ended 2025-08-01T10:00:00Z"),
])
def test_a_sentence_leaves_out_what_is_not_known(sentence, text):
    payload = roexec.explanation_payload(Job.from_spec(SPEC), [(None, [sentence])], UTC)
    assert payload["answers"][0]["why"][0]["text"] == text
    assert roexec.explanation_text(payload, Style()) == f"backup, now:\n  {text}\n"


def test_the_instants_of_an_explanation_are_text_and_people_get_them_in_their_zone():
    said = [{"reason": "overlap", "overlap": "skip", "others": [
        {"id": "r0", "state": "running", "started_at": NOON, "finished_at": None}]}]
    payload = roexec.explanation_payload(Job.from_spec(SPEC), [(NOON, said)], BERLIN)
    answer, = payload["answers"]
    assert (answer["slot"], answer["local"]) == ("2025-08-01T10:00:00Z",
                                                 "2025-08-01T12:00:00+02:00")
    assert answer["why"][0]["others"][0]["started_at"] == "2025-08-01T10:00:00Z"
    text = roexec.explanation_text(payload, Style(BERLIN, now=NOON + 60))
    assert "started 2025-08-01 12:00:00 CEST (1m ago)" in text


# Text.

def test_columns_are_aligned_and_what_is_missing_is_a_dash():
    assert table(("A", "BB"), [("xxx", None), ("", 0)], Style()) == (
        "A    BB\nxxx  -\n-    0\n")


def test_a_pipe_gets_no_colour_and_a_terminal_does():
    assert "\x1b" not in runs_table([run()], Style())
    assert "\x1b[32msucceeded\x1b[0m" in runs_table([run()], Style(UTC, color=True, now=NOON))


def test_colour_does_not_move_columns():
    plain = runs_table([run(), run(state="failed")], Style(UTC, now=NOON))
    coloured = runs_table([run(), run(state="failed")], Style(UTC, color=True, now=NOON))
    for code in ("\x1b[0m", "\x1b[1m", "\x1b[31m", "\x1b[32m"):
        coloured = coloured.replace(code, "")
    assert coloured == plain


def test_people_see_local_time_and_pipes_see_utc():
    assert "2025-08-01 12:00:00" in runs_table([run()], Style(BERLIN, now=NOON))
    assert "2025-08-01T10:00:00Z" in runs_table([run()], Style())


def test_a_pipe_sees_nothing_that_changes_by_itself():
    running = run(state="running", finished_at=None)
    assert cells(runs_table([running], Style()))[1][5] == "-"
    assert cells(runs_table([running], Style(UTC, now=NOON + 60)))[1][5] == "1m"
    assert "ago" not in run_text(run(), Style())


def test_of_a_run_that_is_on_people_see_how_long_it_usually_takes():
    running = run(state="running", finished_at=None)
    style = Style(UTC, now=NOON + 60)
    assert cells(runs_table([running], style, {"backup": 300}))[1][5] == "1m of about 5m"
    assert "1m of about 5m" in run_text(running, style, usual=300)
    assert cells(runs_table([running], Style(), {"backup": 300}))[1][5] == "-"


@pytest.mark.parametrize("changes, expected", [
    ({"state": "skipped", "reason": "paused", "count": 3, "last_slot": NOON + 60, "attempts": []},
     "paused (3 slots until 2025-08-01T10:01:00Z)"),
    ({"state": "failed", "reason": "start", "message": "no such program"},
     "start; no such program"),
    ({"attempts": [ATTEMPT, {**ATTEMPT, "number": 2}]}, "2 attempts"),
    ({"message": "one\ntwo\x1b[2J"}, "one\\ntwo\\x1b[2J"),
])
def test_the_note_of_a_run_says_why(changes, expected):
    assert cells(runs_table([run(**changes)], Style()))[1][-1] == expected


@pytest.mark.parametrize("changes, expected", [
    ({"exit_code": 0}, "0"), ({"exit_code": 7}, "7"),
    ({"exit_code": None, "signal": "SIGKILL"}, "SIGKILL"), ({"exit_code": None}, "-")])
def test_a_run_shows_its_exit_code_or_its_signal(changes, expected):
    assert cells(runs_table([run(**changes)], Style()))[1][6] == expected


def test_the_run_of_a_step_names_its_step():
    assert cells(runs_table([run(step="unpack")], Style()))[1][1] == "backup/unpack"


def test_only_the_last_column_is_cut_and_only_where_there_is_a_width():
    rows = [("identifier", "a long sentence about it")]
    assert table(("ID", "NOTE"), rows, Style(width=26)).splitlines()[1] == \
        "identifier  a long sent..."
    assert table(("ID", "NOTE"), rows, Style()).splitlines()[1].endswith("about it")


@pytest.mark.parametrize("row, spec, expected", [
    ({}, {}, "scheduled"),
    ({}, {"schedule": []}, "manual"),
    ({}, {"enabled": False}, "disabled"),
    ({"paused": math.inf}, {}, "paused"),
    ({"paused": NOON + 60}, {}, "paused until 2025-08-01T10:01:00Z"),
    ({"paused": NOON}, {}, "scheduled"),
    ({"active": "running"}, {}, "running"),
    ({"active": "queued", "paused": math.inf}, {}, "queued (paused)"),
])
def test_a_job_says_in_a_word_what_it_is_up_to(row, spec, expected):
    assert roexec.job_status(job(row, spec), Style()) == expected
    assert expected in jobs_table([job(row, spec)], Style())


def test_people_see_schedules_in_words_and_pipes_as_they_are_written():
    spec = {"schedule": ["0 2 * * *", "H 1,5,8,11,17,23 1,4,9,12,19,30 1,5,8,11 *"]}
    assert cells(jobs_table([job(spec=spec)], Style()))[1][1] == ", ".join(spec["schedule"])
    assert cells(jobs_table([job(spec=spec)], Style(UTC)))[1][1] == \
        "at 02:00 every day, " + spec["schedule"][1]        # in words it would be too long
    slots = [roexec.slot_payload(Job.from_spec({**SPEC, "schedule": ["@hourly", "30 9 * * *"]}),
                                 slot, UTC) for slot in (NOON, NOON - 1800)]
    assert [slot["schedule"] for slot in slots] == ["@hourly", "30 9 * * *"]
    assert [row[3] for row in cells(roexec.slots_table(slots, Style(UTC)))] == [
        "SCHEDULE", "every hour", "at 09:30 every day"]
    assert cells(roexec.slots_table(slots, Style()))[0] == ["SLOT", "JOB", "LOCAL", "NOTE"]


def test_what_is_foreseen_is_shown_with_what_is_to_be_said_about_it_all():
    both = [Job.from_spec({**SPEC, "id": job_id, "schedule": "*/30 * * * *"}) for job_id in "ab"]
    foreseen = roexec.foresee(both, NOON, NOON + 3600, UTC, {"a": 1801})
    payload = roexec.foresight_payload(foreseen, UTC, ["b"])
    text = roexec.foresight_text(payload, Style())
    assert cells(text)[3][-1] == "meets the run of 2025-08-01T10:00:00Z and is skipped"
    assert text.endswith("""
slots             4
busiest minutes   2025-08-01T10:00:00Z (2), 2025-08-01T10:30:00Z (2)
meet a run        1
duration unknown  b
""")
    assert payload["slots"][2] == {
        "job_id": "a", "slot": "2025-08-01T10:30:00Z", "local": "2025-08-01T10:30:00+00:00",
        "schedule": "*/30 * * * *", "mark": None, "start": "2025-08-01T10:30:00Z",
        "action": "skip", "meets": "2025-08-01T10:00:00Z"}
    assert roexec.foresight_text(roexec.foresight_payload([], UTC, []), Style()) == \
        "slots             0\nmeet a run        0\n"


def test_control_characters_of_names_never_reach_a_terminal():
    assert roexec.printable("a\x1b]0;x\x07\u202eb ä") == "a\\x1b]0;x\\x07\\u202eb ä"


def test_a_run_is_shown_with_its_attempts_and_where_its_log_lies():
    text = run_text(run(reason="exit", state="failed"), Style(), log="/store/logs/backup/1.log")
    assert "state     failed  (exit)" in text
    assert "log       /store/logs/backup/1.log" in text
    assert cells(text)[-1] == ["1", "2025-08-01T10:00:00Z", "2.5s", "0", "0.5s", "2.0 MB", "12 B"]


def test_a_moment_says_for_people_how_far_away_it_is():
    style = Style(BERLIN, now=NOON)
    assert style.moment("2025-08-01T11:30:00Z") == "2025-08-01 13:30:00 CEST (in 1h30m)"
    assert style.moment("2025-08-01T09:59:00.5Z") == "2025-08-01 11:59:00 CEST (1m ago)"
    assert Style().moment("2025-08-01T11:30:00Z") == "2025-08-01T11:30:00Z"


def test_a_job_is_shown_with_its_definition_as_a_job_file():
    text = roexec.job_text(job(), Job.from_spec(SPEC), Style())
    head, definition = text.split("\n\n", 1)
    assert "source    /etc/jobs.yml" in head and "version   3" in head
    assert roexec.load_yaml(definition) == {"jobs": [SPEC]}


def told_of_cluster(**more):
    """The lines about a node of a cluster of two, {label: text}, and its nodes."""
    payload = {
        "node": "a", "role": "follower", "trouble": None, "leader": "b", "term": 7, "lease": 10,
        "clock_offset": 0.0, "nodes": [
            {"node": "b", "role": "leader", "started_at": "2025-08-01T10:00:00Z",
             "version": "0.1.0", "url": "http://b:8080"}],
        "etcd": {"endpoints": ["h:1", "h:2"], "answers": True, "since": None},
        "store": {"place": "s3://x/p/", "waiting": 0, "behind": 0.0, "trouble": None,
                  "complete": True}}
    payload["store"].update(more.pop("store", {}))
    head, _, nodes = roexec.cluster_text({**payload, **more}, Style()).partition("\n\n")
    return dict(re.split(" {2,}", line, maxsplit=1) for line in head.splitlines()), cells(nodes)


def test_a_cluster_is_shown_with_its_nodes():
    told, nodes = told_of_cluster()
    assert told == {"node": "a (follower)", "leader": "b", "term": "7", "lease": "10s",
                    "clock": "+0.0s against etcd's", "etcd": "h:1, h:2: answers",
                    "store": "s3://x/p/: 0 changes wait"}
    assert nodes[-1] == ["b", "leader", "2025-08-01T10:00:00Z", "0.1.0", "http://b:8080"]


def test_what_is_wrong_with_a_cluster_is_said_once():
    told, _ = told_of_cluster(trouble="not read yet: no bucket", store={"trouble": "no bucket"})
    assert told["trouble"] == "not read yet: no bucket" and "bucket" not in told
    told, _ = told_of_cluster(store={"trouble": "no answer", "waiting": 3, "behind": 60.0})
    assert told["bucket"] == "no answer" and "trouble" not in told
    assert told["store"] == "s3://x/p/: 3 changes wait, the oldest for 1m"
