"""What is due and what becomes of it, who gets a place, what is tried again: all as tables."""
import itertools
import math
import random
from datetime import timezone

import pytest

import roexec
from roexec import (ACTIVE_STATES, FINAL_STATES, MOST_CAUGHT_UP, MOST_COUNTED, ON_TIME, REASONS,
                    ROLES, SCOPES, STATES, Caller, Ended, Job, Known, Met, StepOrder, admit,
                    backoff_delay, busiest_minutes, decide_slots, explain, foresee, get_zone,
                    is_moved, iter_slots, jitter_delay, last_slot, local_instants, next_run, next_slot, outcome,
                    overlap_action, parse_instant, retry_delay, steps_to_repeat, survives_failure,
                    token_of, upcoming_slots)

UTC = timezone.utc
NOON = 1754049600           # 2025-08-01T12:00:00Z, a Friday
HOUR, DAY = 3600, 86400


def job(schedule="* * * * *", **spec):
    return Job({"id": "backup", "command": "true", "schedule": schedule, **spec})


def decided(a_job, position, now, paused=0, zone=UTC):
    """The decision as [(minutes from noon, trigger or reason, count)], and the new position."""
    rows, position = decide_slots(a_job, position, now, zone, paused)
    return [((row.slot - NOON) / 60, row.reason or row.trigger, row.count)
            for row in rows], position


# Slots.

def test_the_slots_of_several_schedules_are_one_set():
    both = job(["0 12 * * *", "*/30 * * * *", "0 * * * *"])
    assert list(iter_slots(both, NOON - 1800, NOON + 1801, UTC)) == [NOON - 1800, NOON, NOON + 1800]
    assert next_slot(both, NOON, UTC) == NOON + 1800
    assert last_slot(both, NOON, UTC) == NOON - 1800


def test_between_two_seconds_the_next_and_the_last_slot_are_the_nearest():
    second = job("@every 1s")
    assert next_slot(second, NOON - 0.5, UTC) == NOON == last_slot(second, NOON + 0.5, UTC)
    assert next_slot(second, NOON, UTC) == NOON + 1 and last_slot(second, NOON, UTC) == NOON - 1


@pytest.mark.parametrize("schedule", [[], "@reboot", ["@reboot"]])
def test_a_job_without_a_schedule_has_no_slots(schedule):
    idle = job(schedule)
    assert next_slot(idle, NOON, UTC) is last_slot(idle, NOON, UTC) is None
    assert list(upcoming_slots(idle, NOON, UTC)) == list(iter_slots(idle, 0, NOON, UTC)) == []
    assert decided(idle, 0, NOON) == ([], 0)
    assert decided(idle, 0, NOON, paused=math.inf) == ([], 0)
    assert next_run(idle, NOON, UTC) is None


def test_the_zone_of_a_job_beats_the_one_that_is_passed():
    noon = "0 12 * * *"
    assert next_slot(job(noon), NOON, get_zone("Asia/Tokyo")) == NOON + 15 * HOUR
    assert next_slot(job(noon, timezone="UTC"), NOON - 1, get_zone("Asia/Tokyo")) == NOON
    assert last_slot(job(noon, timezone="+01:00"), NOON, UTC) == NOON - HOUR
    assert next_slot(job("CRON_TZ=+02:00 0 12 * * *", timezone="+01:00"), NOON - DAY, UTC) \
        == NOON - 2 * HOUR


def test_upcoming_slots_are_those_in_the_window_with_both_ends():
    windowed = job("0 * * * *", window={"start": "2025-08-01T14:00:00Z",
                                        "end": "2025-08-01T16:00:00Z"})
    assert list(upcoming_slots(windowed, NOON, UTC)) == [NOON + n * HOUR for n in (2, 3, 4)]
    assert list(upcoming_slots(windowed, NOON + 3 * HOUR, UTC)) == [NOON + 4 * HOUR]
    assert list(upcoming_slots(windowed, NOON + 4 * HOUR, UTC)) == []
    assert next_run(windowed, NOON, UTC) == NOON + 2 * HOUR


def test_a_disabled_job_has_no_upcoming_slots():
    assert list(upcoming_slots(job(enabled=False), NOON, UTC)) == []


def test_a_slot_that_its_jitter_still_delays_is_the_next_run():
    daily = job("0 12 * * *", jitter="1h")
    start = NOON + jitter_delay("backup", NOON, HOUR)
    assert NOON + 2 < start < NOON + HOUR
    assert next_run(daily, NOON + 1, UTC, position=NOON - DAY) == start
    assert next_run(daily, start - 1, UTC, position=NOON - DAY) == start
    tomorrow = NOON + DAY + jitter_delay("backup", NOON + DAY, HOUR)
    assert next_run(daily, start, UTC, position=NOON) == tomorrow
    assert next_run(daily, NOON + 1, UTC, position=NOON + 1) == tomorrow    # registered just now
    assert next_run(daily, NOON + 1, UTC, paused=math.inf, position=NOON - DAY) is None


def test_the_next_run_of_a_job_that_is_paused_until_an_instant_is_the_first_from_then_on():
    daily = job("0 12 * * *")
    for paused, expected in [(NOON - 1, NOON), (NOON, NOON), (NOON + 1, NOON + DAY),
                             (NOON + DAY, NOON + DAY)]:
        assert next_run(daily, NOON - HOUR, UTC, paused) == expected


# Jitter.

def test_jitter_is_less_than_it_says_and_spreads():
    delays = [jitter_delay(f"job-{number}", NOON, 600) for number in range(500)]
    assert all(0 <= delay < 600 for delay in delays)
    assert len(set(delays)) > 300 and min(delays) < 30 and max(delays) > 570


def test_jitter_is_the_same_everywhere_and_after_every_restart():
    assert [jitter_delay("backup", NOON + n, 600) for n in range(3)] == [256, 102, 60]
    assert jitter_delay("sync", NOON, 600) != jitter_delay("backup", NOON, 600)


def test_without_jitter_nothing_is_delayed():
    assert jitter_delay("backup", NOON, 0) == jitter_delay("backup", NOON, 0.5) == 0


def test_jitter_delays_the_start_and_not_the_slot():
    jittered = job("0 12 * * *", jitter="10m")
    start = NOON + jitter_delay("backup", NOON, 600)
    assert decided(jittered, NOON - 1, start - 1) == ([], NOON - 1)
    assert decided(jittered, NOON - 1, start) == ([(0, "schedule", 1)], NOON)
    assert decided(jittered, NOON - 1, start + ON_TIME) == ([(0, "schedule", 1)], NOON)
    assert decided(jittered, NOON - 1, start + ON_TIME + 1) == ([(0, "catch_up", 1)], NOON)


def test_no_slot_is_late_that_an_earlier_one_holds_up_by_its_jitter():
    """With a jitter longer than the interval, and the scheduler awake all the time."""
    jittered = job("*/2 * * * *", jitter="30m")
    position, fates = NOON - 1, []
    for now in range(NOON, NOON + 6 * HOUR, 5):
        rows, position = decide_slots(jittered, position, now, UTC)
        fates += [(row.slot, row.trigger, row.reason) for row in rows]
    assert fates == [(NOON + 120 * n, "schedule", None) for n in range(len(fates))]
    assert len(fates) >= 5.4 * 30


# What becomes of due slots.

def test_a_slot_is_due_at_its_second_and_not_before():
    assert decided(job(), NOON - 60, NOON - 0.01) == ([], NOON - 60)
    assert decided(job(), NOON - 60, NOON) == ([(0, "schedule", 1)], NOON)
    assert decided(job(), NOON, NOON + 59) == ([], NOON)


def test_no_slot_at_or_before_the_position_is_considered():
    assert decided(job(), NOON, NOON) == ([], NOON)
    assert decided(job(), NOON + HOUR, NOON) == ([], NOON + HOUR)


@pytest.mark.parametrize("late, rows", [
    (0, [(0, "schedule", 1)]), (60, [(0, "schedule", 1)]), (61, [(0, "catch_up", 1)]),
    (3600, [(0, "catch_up", 1)]), (3601, [(0, "missed", 1)]), (20 * HOUR, [(0, "missed", 1)])])
def test_a_slot_is_started_caught_up_or_missed_by_its_lateness(late, rows):
    assert decided(job("0 12 * * *"), NOON - DAY, NOON + late) == (rows, NOON)


@pytest.mark.parametrize("catch_up, rows", [
    ("latest", [(-90, "missed", 5), (0, "catch_up", 1)]),
    ("all", [(-90, "missed", 2), *((minute, "catch_up", 1) for minute in (-54, -36, -18, 0))]),
    ("none", [(-90, "missed", 6)])])
def test_arrears_go_by_catch_up_within_its_window(catch_up, rows):
    """Six slots, 18 minutes apart, of which those of the last hour can be caught up."""
    arrears = job("@every 18m", catch_up=catch_up)
    assert decided(arrears, NOON - 91 * 60, NOON + 121) == (rows, NOON)


def test_under_latest_a_slot_on_time_is_the_latest():
    assert decided(job(), NOON - 600, NOON + 30)[0] == [(-9, "missed", 9), (0, "schedule", 1)]
    assert decided(job(catch_up="all"), NOON - 180, NOON + 61)[0] == [
        (-2, "catch_up", 1), (-1, "catch_up", 1), (0, "catch_up", 1), (1, "schedule", 1)]


def test_all_catches_up_a_thousand_at_most():
    rows, position = decided(job("@every 1s", catch_up="all"), NOON - 2000, NOON + ON_TIME)
    fates = [fate for _, fate, _ in rows]
    assert fates.count("catch_up") == MOST_CAUGHT_UP and fates.count("schedule") == ON_TIME + 1
    assert rows[0] == ((-1999) / 60, "missed", 2000 - 1 - MOST_CAUGHT_UP)
    assert position == NOON + ON_TIME


def test_catch_up_window_may_be_shorter_than_what_is_on_time():
    short = job("0 12 * * *", catch_up_window=0)
    assert decided(short, NOON - 1, NOON + 60)[0] == [(0, "schedule", 1)]
    assert decided(short, NOON - 1, NOON + 61)[0] == [(0, "missed", 1)]
    start = NOON + jitter_delay("backup", NOON, 600)
    assert decided(job("0 12 * * *", catch_up_window=0, jitter="10m"), NOON - 1,
                   start + 61)[0] == [(0, "missed", 1)]


def test_the_due_slots_of_a_paused_job_are_one_row():
    assert decided(job(), NOON - 600, NOON, paused=math.inf) == ([(-9, "paused", 10)], NOON)
    assert decided(job(), NOON - 2 * DAY, NOON, paused=math.inf) == (
        [(1 - 2880, "paused", 2880)], NOON)


def test_slots_after_a_pause_are_decided_as_if_there_had_been_none():
    assert decided(job(), NOON - 600, NOON, paused=NOON - 300) == (
        [(-9, "paused", 4), (-5, "missed", 4), (-1, "schedule", 1), (0, "schedule", 1)], NOON)
    assert decided(job(), NOON - 2 * DAY, NOON, paused=NOON - DAY)[0][:2] == [
        (1 - 2880, "paused", 1439), (-1440, "missed", 1439)]


def test_a_disabled_job_has_no_rows_and_its_position_follows():
    assert decided(job(enabled=False), NOON - DAY, NOON) == ([], NOON)
    assert decided(job(enabled=False), NOON + DAY, NOON) == ([], NOON + DAY)


def test_slots_outside_the_window_are_rows_of_their_own_reason():
    windowed = job("*/10 * * * *", catch_up="all", window={
        "start": "2025-08-01T11:30:00Z", "end": "2025-08-01T11:40:00Z"})
    assert decided(windowed, NOON - HOUR, NOON) == (
        [(-50, "window", 2), (-30, "catch_up", 1), (-20, "catch_up", 1), (-10, "window", 2)], NOON)


def test_what_is_long_past_tells_the_window_from_what_was_missed():
    windowed = job("0 * * * *", window={"start": "2025-08-01T04:00:00Z",
                                        "end": "2025-08-01T06:00:00Z"})
    assert decided(windowed, NOON - 11.5 * HOUR, NOON)[0] == [
        (-660, "window", 3), (-480, "missed", 3), (-300, "window", 6)]


def test_the_latest_of_a_window_that_has_closed_is_caught_up():
    closed = job("* * * * *", window={"end": "2025-08-01T11:40:30Z"})
    assert decided(closed, NOON - HOUR, NOON)[0] == [
        (-59, "missed", 39), (-20, "catch_up", 1), (-19, "window", 20)]


# Against a slow oracle.

def fates_of(a_job, slots, now, paused):
    """{slot: fate} of the slots that are due, from the words of the design alone."""
    fates, due = {}, -math.inf
    start, end = a_job.window_instants(UTC)
    for slot in slots:
        due = max(due, slot + jitter_delay(a_job.id, slot, a_job.jitter))
        if due > now:
            break
        lateness = now - due
        fates[slot] = ("paused" if slot < paused
                       else "window" if not (start or 0) <= slot <= (end or math.inf)
                       else "schedule" if lateness <= 60
                       else "late" if lateness <= a_job.catch_up_window else "missed")
    late = [slot for slot in fates if fates[slot] == "late"]
    kept = {"none": [], "all": late[-1000:],
            "latest": late[-1:] if "schedule" not in fates.values() else []}[a_job.catch_up]
    return {slot: fate if fate != "late" else "catch_up" if slot in kept else "missed"
            for slot, fate in fates.items()}


def spread(rows, slots):
    """{slot: fate} of rows; each slot in exactly one of them, in order, in as few as can be."""
    fates = {}
    for row in rows:
        covered = [slot for slot in slots if row.slot <= slot <= row.last_slot]
        assert covered[0] == row.slot and covered[-1] == row.last_slot
        assert len(covered) == row.count and (row.count == 1 or row.reason)
        assert row.reason in (None, *REASONS["skipped"]) and row.trigger in ("schedule", "catch_up")
        for slot in covered:
            assert slot > max(fates, default=0)
            fates[slot] = row.reason or row.trigger
    for one, two in zip(rows, rows[1:]):
        assert one.reason is None or one.reason != two.reason
    return fates


def random_job(chance):
    spec = {"catch_up": chance.choice(["latest", "all", "none"]),
            "catch_up_window": chance.choice([0, 30, 600, HOUR, 3 * HOUR, 400 * DAY]),
            "jitter": chance.choice([0, 0, 0, 1, 45, 600, 2 * HOUR])}
    edges = sorted(chance.randrange(NOON - DAY, NOON + DAY) for _ in range(2))
    window = {key: roexec.format_instant(edge) for key, edge in zip(("start", "end"), edges)
              if chance.random() < 0.5}
    if window:
        spec["window"] = window
    schedule = chance.sample(["* * * * *", "*/7 * * * *", "0 */2 * * *", "@every 90s",
                              "@every 47m", "30 12 * * *", "5,6,7 11-13 * * *"],
                             chance.choice([1, 1, 2]))
    return job(schedule, **spec)


@pytest.mark.parametrize("seed", range(40))
def test_each_slot_between_two_positions_ends_in_exactly_one_row(seed):
    chance = random.Random(seed)
    for _ in range(6):
        a_job, position = random_job(chance), NOON - chance.randrange(DAY)
        slots, now = list(iter_slots(a_job, position + 1, NOON + DAY, UTC)), position
        for _ in range(8):
            now += chance.choice([0, 0.25, 1, 30, 61, 400, HOUR, 5 * HOUR, -600])
            paused = chance.choice([0, 0, 0, 0, math.inf, now - chance.randrange(2 * HOUR)])
            wanted = fates_of(a_job, [slot for slot in slots if slot > position], now, paused)
            rows, after = decide_slots(a_job, position, now, UTC, paused)
            assert spread(rows, slots) == wanted
            assert after == max(wanted, default=position) >= position
            position = after


@pytest.mark.parametrize("spec, paused", [
    ({}, 0), ({"catch_up": "all"}, 0), ({"catch_up": "none"}, 0), ({}, math.inf),
    ({"catch_up_window": "366d"}, 0), ({"catch_up_window": "366d", "catch_up": "all"}, 0),
    ({"catch_up_window": "366d"}, math.inf), ({"timezone": "Europe/Berlin", "jitter": "5m"}, 0),
    ({}, NOON - 100 * DAY), ({"window": {"start": "2025-07-01", "end": "2025-07-02"}}, 0)])
def test_an_outage_of_a_year_with_a_slot_each_second_costs_little(spec, paused, monkeypatch):
    looked = []
    for name in ("next_slot", "previous_slot"):
        method = getattr(roexec.Cron, name)
        monkeypatch.setattr(roexec.Cron, name, lambda *args, method=method: looked.append(1)
                            or method(*args))
    rows, position = decide_slots(job("@every 1s", **spec), NOON - 365 * DAY, NOON, UTC, paused)
    assert len(looked) < 5 * MOST_COUNTED and len(rows) < 1100
    jitter = 300 if "jitter" in spec else 0
    assert rows[0].slot == NOON - 365 * DAY + 1 and NOON - jitter <= position <= NOON
    assert all(one.last_slot + 1 == two.slot for one, two in zip(rows, rows[1:]))
    assert rows[-1].last_slot == position and rows[0].message == f"more than {MOST_COUNTED} slots"


def test_so_many_slots_are_counted_exactly_and_more_only_as_more():
    long_ago = NOON - 10 * DAY
    for count in (MOST_COUNTED - 1, MOST_COUNTED, MOST_COUNTED + 1):
        seconds = job("@every 1s", window={"end": roexec.format_instant(long_ago + count)})
        rows, _ = decide_slots(seconds, long_ago, NOON, UTC)
        assert rows[0].count == min(count, MOST_COUNTED)
        assert rows[0].last_slot - rows[0].slot + 1 == count
        assert (rows[0].message is None) == (count <= MOST_COUNTED)


def test_a_slot_in_the_gap_is_due_once_and_what_comes_twice_once():
    daily = job("30 2 * * *", timezone="Europe/Berlin", catch_up="all", catch_up_window="2d")
    for day, instant in (("2025-03-30", "01:00"), ("2025-10-26", "00:30")):
        begin = parse_instant(day, UTC)
        rows, _ = decide_slots(daily, begin - HOUR, begin + 12 * HOUR, UTC)
        assert [row.slot for row in rows] == [parse_instant(f"{day} {instant}", UTC)]


# Overlap.

def run(state, slot=None, run_id=None):
    return {"id": run_id or f"{state}{slot}", "state": state, "slot": slot}


ON, WAITS, ASKED = run("running", 1), run("queued", 2), run("queued")


@pytest.mark.parametrize("active, most, skip, queue, replace", [
    ((), 1, ("start", None), ("start", None), ("start", None)),
    ((ON,), 0, ("start", None), ("start", None), ("start", None)),
    ((ON,), 2, ("start", None), ("start", None), ("start", None)),
    ((ON,), 1, ("skip", ON), ("queue", None), ("replace", ON)),
    ((WAITS,), 1, ("skip", WAITS), ("queue", None), ("replace", WAITS)),
    ((ASKED,), 1, ("skip", ASKED), ("queue", None), ("replace", ASKED)),
    ((ON, WAITS), 1, ("skip", ON), ("skip", WAITS), ("replace", WAITS)),
    ((ON, ASKED), 1, ("skip", ON), ("queue", None), ("replace", ASKED)),
    ((ON, ASKED, WAITS), 1, ("skip", ON), ("skip", WAITS), ("replace", ASKED)),
    ((ON, WAITS), 2, ("skip", ON), ("queue", None), ("replace", WAITS)),
    ((ON, run("running", 0)), 2, ("skip", ON), ("queue", None), ("replace", ON))])
def test_overlap_decides_for_a_slot_at_the_limit_of_its_job(active, most, skip, queue, replace):
    for overlap, action in (("skip", skip), ("queue", queue), ("replace", replace)):
        assert overlap_action(job(max_concurrent=most, overlap=overlap), "schedule",
                              active) == action


@pytest.mark.parametrize("trigger", ["manual", "api", "retry"])
@pytest.mark.parametrize("active, wait, skip, queue, replace", [
    ((), False, ("start", None), ("start", None), ("start", None)),
    ((ON,), False, ("skip", ON), ("queue", None), ("replace", ON)),
    ((ON,), True, ("queue", None), ("queue", None), ("replace", ON)),
    ((ON, WAITS), False, ("skip", ON), ("queue", None), ("replace", WAITS)),
    ((ON, WAITS, ASKED), True, ("queue", None), ("queue", None), ("replace", WAITS)),
    ((WAITS,), False, ("skip", WAITS), ("queue", None), ("replace", WAITS))])
def test_a_person_is_refused_or_waits_without_bound(trigger, active, wait, skip, queue, replace):
    for overlap, action in (("skip", skip), ("queue", queue), ("replace", replace)):
        assert overlap_action(job(overlap=overlap), trigger, active, wait) == action


@pytest.mark.parametrize("overlap", ["skip", "queue", "replace"])
def test_overlap_is_not_for_arrears(overlap):
    assert overlap_action(job(overlap=overlap), "catch_up", (ON, WAITS)) == ("start", None)


# Places.

def queued(*runs):
    """Rows, in order of insertion, of (job id, slot or None, priority, trigger)."""
    rows = []
    for seq, (job_id, slot, *more) in enumerate(runs, 1):
        priority, trigger = (*more, 0, "schedule")[:2] if len(more) != 1 else (more[0], "schedule")
        rows.append({"job_id": job_id, "slot": slot, "priority": priority, "seq": seq,
                     "queued_at": 100 + seq, "trigger": trigger, "parent": None})
    return rows


def places(rows, running=(), limits=(), most=None, paused=()):
    return [row["seq"] for row in admit(rows, dict(running), dict(limits), most, paused)]


@pytest.mark.parametrize("runs, order", [
    ([("a", 3), ("a", 1), ("a", 2)], [2, 3, 1]),
    ([("b", 1), ("a", 1), ("c", 1)], [2, 1, 3]),
    ([("a", 1, 0), ("a", 2, 5), ("a", 3, -1), ("a", 4, 5)], [2, 4, 1, 3]),
    ([("a", None), ("a", 500), ("a", 50)], [3, 1, 2]),      # one by hand counts from its asking
    ([("b", None), ("a", None)], [1, 2]), ([("a", 7), ("a", 7)], [1, 2])])
def test_places_go_by_priority_then_slot_then_job(runs, order):
    assert places(queued(*runs)) == order
    for most in range(1, len(order) + 2):
        assert places(queued(*runs), most=most) == order[:most]


@pytest.mark.parametrize("running, limits, most, paused, admitted", [
    ({}, {}, None, (), [1, 2, 3, 4]), ({}, {}, 0, (), [1, 2, 3, 4]),
    ({}, {"a": 1}, None, (), [1, 3, 4]), ({"a": 1}, {"a": 1}, None, (), [3, 4]),
    ({"a": 1}, {"a": 2, "b": 1}, None, (), [1, 3]), ({"a": 9}, {"a": 2}, None, (), [3, 4]),
    ({"a": 9}, {"a": 0, "b": None}, None, (), [1, 2, 3, 4]),
    ({"z": 2}, {}, 4, (), [1, 2]), ({"z": 4}, {}, 4, (), []), ({"z": 5}, {}, 4, (), []),
    ({"a": 1}, {"a": 1}, 2, (), [3]), ({}, {}, None, ("a",), [2, 3, 4]),
    ({}, {}, 2, ("a", "b"), [2])])
def test_places_are_bounded_by_the_job_and_by_all(running, limits, most, paused, admitted):
    rows = queued(("a", 1), ("a", None), ("b", 200), ("b", 201))
    assert places(rows, running, limits, most, paused) == admitted


@pytest.mark.parametrize("most", [0, 1, 3])
def test_caught_up_runs_of_a_job_wait_for_one_another(most):
    rows = queued(*(("a", slot, 0, "catch_up") for slot in (1, 2, 3)), ("b", 2, 0, "catch_up"))
    assert places(rows, limits={"a": most, "b": most}) == [1, 4]
    assert places(rows, running={"a": 1}, limits={"a": most}) == [4]


@pytest.mark.parametrize("seed", range(30))
def test_no_limit_is_exceeded_and_no_place_stays_free(seed):
    chance = random.Random(seed)
    rows = queued(*((chance.choice("abc"), chance.choice([None, chance.randrange(300)]),
                     chance.randrange(3)) for _ in range(20)))
    running = {name: chance.randrange(4) for name in "abcd"}
    limits = {name: chance.randrange(4) for name in "abc"}
    most = chance.choice([0, 3, 6, 10])
    admitted = admit(rows, running, limits, most)
    counts = {name: running[name] + sum(row["job_id"] == name for row in admitted)
              for name in running}
    for name, limit in limits.items():
        assert not limit or counts[name] <= max(limit, running[name])
    full = most and sum(counts.values()) >= most
    assert not admitted or not most or sum(counts.values()) <= most
    for row in rows:
        at_limit = limits[row["job_id"]] and counts[row["job_id"]] >= limits[row["job_id"]]
        assert row in admitted or full or at_limit
    assert running == {name: counts[name] - sum(row["job_id"] == name for row in admitted)
                       for name in running}


# Attempts.

EXIT_0, EXIT_1, EXIT_7 = Ended(exit_code=0), Ended(exit_code=1), Ended(exit_code=7)
KILLED, LOST = Ended(signal="SIGKILL"), Ended(lost=True)
TIMEOUT, TOTAL = (Ended(signal="SIGTERM", timeout=kind) for kind in ("timeout", "total_timeout"))
NO_PROGRAM = Ended(exit_code=127, error="nothing: no such file")


@pytest.mark.parametrize("ended, state, reason", [
    (EXIT_0, "succeeded", None), (EXIT_1, "failed", "exit"),
    (Ended(exit_code=126), "failed", "start"), (NO_PROGRAM, "failed", "start"),
    (KILLED, "failed", "signal"),
    (TIMEOUT, "timed_out", "timeout"), (TOTAL, "timed_out", "total_timeout"),
    (Ended(exit_code=0, timeout="timeout"), "timed_out", "timeout"),
    (LOST, "lost", "supervisor"), (Ended(lost=True, exit_code=0), "lost", "supervisor")])
def test_the_end_of_a_command_is_a_state_and_a_reason(ended, state, reason):
    assert outcome(job(), ended) == (state, reason)
    assert reason in (REASONS.get(state) or (None,))


def test_success_is_what_the_job_says():
    lenient = job(success={"exit_codes": [0, 7]})
    assert outcome(lenient, EXIT_7) == outcome(lenient, EXIT_0) == ("succeeded", None)
    assert outcome(job(success={"exit_codes": [7]}), EXIT_0) == ("failed", "exit")


@pytest.mark.parametrize("retry_on, retried", [
    (None, [EXIT_1, EXIT_7, KILLED, TIMEOUT, NO_PROGRAM]),
    ({"exit_codes": [7]}, [EXIT_7]), ({"exit_codes": [127]}, [NO_PROGRAM]),
    ({"timeout": True}, [TIMEOUT]), ({"signal": True}, [KILLED]),
    ({"exit_codes": [1, 7], "signal": True}, [EXIT_1, EXIT_7, KILLED])])
def test_what_is_retried_is_what_retry_on_lists(retry_on, retried):
    spec = {} if retry_on is None else {"retry_on": retry_on}
    patient = job(retries=2, backoff=30, **spec)
    for ended in (EXIT_0, EXIT_1, EXIT_7, KILLED, TIMEOUT, TOTAL, NO_PROGRAM, LOST):
        wanted = 30 if ended in retried else None
        assert [retry_delay(patient, ended, number) for number in (1, 2, 3)] == [
            wanted, wanted, None]
        assert retry_delay(job(**spec), ended, 1) is None


@pytest.mark.parametrize("spec, delays", [
    ({}, [None]), ({"retries": 3}, [None]), ({"if_lost": "fail", "retries": 3}, [None]),
    ({"if_lost": "rerun"}, [10, None]), ({"if_lost": "rerun", "retries": 0}, [10, None]),
    ({"if_lost": "rerun", "retries": 2, "backoff": "1m"}, [60, 60, None]),
    ({"if_lost": "rerun", "retry_on": {"exit_codes": [3]}}, [10, None])])
def test_a_lost_attempt_is_made_again_only_if_the_job_says_so(spec, delays):
    lossy = job(**spec)
    assert [retry_delay(lossy, LOST, number) for number in range(1, len(delays) + 1)] == delays


@pytest.mark.parametrize("backoff, delays", [
    ("30s", [30, 30, 30]), (0, [0, 0, 0]), ({"delay": "10s", "factor": 2}, [10, 20, 40]),
    ({"delay": "10s", "factor": 3, "max": "1m"}, [10, 30, 60]),
    ({"delay": "1m", "max": "30s"}, [30, 30, 30]), ({"delay": "8s", "factor": 1.5}, [8, 12, 18])])
def test_backoff_grows_by_its_factor_up_to_its_bound(backoff, delays):
    patient = job(retries=5, backoff=backoff)
    assert [backoff_delay(patient.backoff, number) for number in (1, 2, 3)] == delays
    assert [retry_delay(patient, EXIT_1, number) for number in (1, 2, 3)] == delays


@pytest.mark.parametrize("backoff, delay", [
    ({"delay": "10s", "factor": 2.5}, roexec.LONGEST),
    ({"delay": "10s", "factor": 2}, roexec.LONGEST),
    ({"delay": "1s", "factor": 2.5, "max": "1h"}, 3600), ({"delay": 0, "factor": 2.5}, 0)])
def test_a_backoff_is_finite_however_many_attempts_there_were(backoff, delay):
    assert backoff_delay(job(backoff=backoff).backoff, 5000) == delay


# States.

def test_states_are_closed_and_every_way_ends():
    assert set(itertools.chain(*STATES.values())) | {"queued"} == set(STATES)
    assert FINAL_STATES == ("succeeded", "failed", "timed_out", "cancelled", "lost", "skipped")
    assert set(ACTIVE_STATES) | set(FINAL_STATES) == set(STATES)
    assert not set(ACTIVE_STATES) & set(FINAL_STATES)
    for state in FINAL_STATES:
        assert STATES[state] == () and state in STATES["running"]
    assert "queued" not in itertools.chain(*STATES.values())


def test_each_final_state_but_success_has_its_reasons():
    assert set(REASONS) == set(FINAL_STATES) - {"succeeded"}
    assert REASONS == {
        "skipped": tuple("overlap window paused missed condition capacity dependency".split()),
        "failed": tuple("exit signal output start pre_run condition memory outputs secret".split()),
        "timed_out": ("timeout", "total_timeout"),
        "cancelled": tuple("user replaced shutdown fail_fast parent".split()),
        "lost": ("supervisor", "power", "node")}


# What is to come.

def foreseen(jobs, minutes, durations=(), **how):
    """[(minutes from noon, job, action, minutes of the run that is met)]"""
    found = foresee(jobs, NOON, NOON + minutes * 60, UTC, dict(durations), **how)
    return [((item.slot - NOON) // 60, item.job.id, item.action,
             item.meets and (item.meets - NOON) // 60) for item in found]


def named(job_id, schedule, **spec):
    return job(schedule, **{"id": job_id, **spec})


@pytest.mark.parametrize("spec, seconds, rows", [
    ({}, 600, [(0, "start", None), (10, "start", None), (20, "start", None), (30, "start", None)]),
    ({}, 601, [(0, "start", None), (10, "skip", 0), (20, "start", None), (30, "skip", 20)]),
    ({"overlap": "queue"}, 900, [
        (0, "start", None), (10, "queue", 0), (20, "queue", 10), (30, "queue", 20)]),
    ({"overlap": "queue"}, 1500, [
        (0, "start", None), (10, "queue", 0), (20, "skip", 0), (30, "queue", 10)]),
    ({"overlap": "replace"}, 900, [
        (0, "start", None), (10, "replace", 0), (20, "replace", 10), (30, "replace", 20)]),
    ({"max_concurrent": 0}, 1500, [
        (0, "start", None), (10, "start", 0), (20, "start", 0), (30, "start", 10)]),
    ({"max_concurrent": 2}, 1500, [
        (0, "start", None), (10, "start", 0), (20, "skip", 0), (30, "start", 10)]),
    ({"enabled": False}, 0, []),
    ({"window": {"start": "2025-08-01T12:05:00Z", "end": "2025-08-01T12:20:00Z"}}, 600,
     [(10, "start", None), (20, "start", None)])])
def test_what_is_foreseen_of_a_job_is_what_its_overlap_does(spec, seconds, rows):
    a_job = named("a", "*/10 * * * *", **spec)
    assert foreseen([a_job], 40, {"a": seconds}) == [
        (minute, "a", action, meets) for minute, action, meets in rows]


def test_a_run_whose_duration_is_unknown_meets_nothing():
    assert [row[2:] for row in foreseen([named("a", "* * * * *")], 30)] == [("start", None)] * 30


def test_a_run_that_waits_for_a_place_of_all_meets_the_next_slot():
    jobs = [named("a", "0 * * * *", priority=1), named("b", "*/10 * * * *")]
    rows = foreseen(jobs, 25, {"a": 900, "b": 60}, max_concurrent=1)
    assert rows == [(0, "a", "start", None), (0, "b", "start", None), (10, "b", "skip", 0),
                    (20, "b", "start", None)]
    assert [row[2] for row in foreseen(jobs, 25, {"a": 900, "b": 60})] == ["start"] * 4


def test_what_is_foreseen_is_in_order_of_slots_and_says_when_jitter_lets_it_start():
    jobs = [named("b", "*/5 * * * *", jitter="4m"), named("a", "*/5 * * * *")]
    rows = foresee(jobs, NOON + 1, NOON + 1200, UTC, {})
    assert [(item.slot - NOON, item.job.id) for item in rows] == [
        (slot, job_id) for slot in (300, 600, 900) for job_id in "ab"]
    for item in rows:
        assert item.start == item.slot + jitter_delay(item.job.id, item.slot, item.job.jitter)


@pytest.mark.parametrize("seed", range(60))
def test_what_is_foreseen_has_each_slot_once_and_agrees_with_a_slow_rehearsal(seed):
    chance = random.Random(seed)
    a_job = named("a", chance.choice(["*/5 * * * *", ["*/7 * * * *", "3 * * * *"], "* * * * *"]),
                  overlap=chance.choice(["skip", "queue", "replace"]),
                  max_concurrent=chance.choice([0, 1, 1, 2, 3]))
    seconds, rows, active = chance.randint(1, 900), [], []
    for now in range(NOON, NOON + 2 * HOUR):
        for row in [row for row in active if row["end"] == now]:
            active.remove(row)
        for row in admit([row for row in active if row["state"] == "queued"],
                         {"a": sum(row["state"] == "running" for row in active)},
                         {"a": a_job.max_concurrent}, None):
            row.update(state="running", end=now + seconds)
        if next_slot(a_job, now - 1, UTC) == now:
            action, other = overlap_action(a_job, "schedule", active)
            on = sorted(active, key=lambda row: row["state"] != "running")
            rows.append((now, action, on[0]["slot"] if on else None))
            if action == "replace":
                active.remove(other)
            if action != "skip":
                active.append({"job_id": "a", "trigger": "schedule", "state": "queued", "slot": now,
                               "queued_at": now, "priority": 0, "seq": now, "end": None,
                               "parent": None})
            for row in admit([row for row in active if row["state"] == "queued"],
                             {"a": sum(row["state"] == "running" for row in active)},
                             {"a": a_job.max_concurrent}, None):
                row.update(state="running", end=now + seconds)
    assert rows == [(item.slot, item.action, item.meets) for item in
                    foresee([a_job], NOON, NOON + 2 * HOUR, UTC, {"a": seconds})]


def test_the_busiest_minutes_are_those_in_which_several_slots_start():
    jobs = [named("a", "0 * * * *"), named("b", "*/30 * * * *"), named("c", "0,45 * * * *"),
            named("d", "30 13 * * *")]
    rows = foresee(jobs, NOON, NOON + 2 * HOUR, UTC, {})
    assert busiest_minutes(rows) == [
        (NOON, 3), (NOON + HOUR, 3), (NOON + HOUR + 1800, 2)]
    assert busiest_minutes(rows, 1) == [(NOON, 3)] and busiest_minutes([]) == []


# Why.

def known(a_job=None, **more):
    """What is known at noon of a job that was registered a day before, with a server."""
    return Known(**{"now": NOON, "zone": UTC, "versions": [(NOON - DAY, a_job or job("0 * * * *"))],
                    "position": NOON, "active": [], "limits": {}, "held": (), "server": True,
                    "paused": 0,
                    **more})


def run_row(**more):
    return {"id": "r1", "job_id": "backup", "state": "running", "reason": None, "message": None,
            "trigger": "schedule", "slot": NOON, "last_slot": None, "count": 1, "priority": 0,
            "seq": 1, "owner": None, "queued_at": NOON, "started_at": NOON, "finished_at": None,
            "parent": None, **more}


def met(others=(), alive=None, **row):
    return Met(row=run_row(**row) if row else None, others=others, alive=alive)


def reasons(*arguments):
    return [said["reason"] for said in explain(*arguments)]


HOURLY = job("0 * * * *")
OFF = job("0 * * * *", enabled=False)


@pytest.mark.parametrize("facts, expected", [
    (known(), ["not_due"]),
    (known(server=False), ["no_server"]),
    (known(paused=math.inf), ["paused"]), (known(paused=NOON + 1), ["paused"]),
    (known(paused=NOON), ["not_due"]),
    (known(OFF), ["disabled"]),
    (known(job([])), ["manual"]),
    (known(job("@reboot")), ["reboot"]),
    (known(job("0 * * * *", window={"start": "2025-09-01"})), ["window"]),
    (known(job("0 * * * *", window={"end": "2025-07-01"})), ["window"]),
    (known(position=NOON - HOUR), ["overdue"]),
    (known(job("0 * * * *", jitter="1h"), position=NOON - HOUR), ["jitter"]),
    (known(active=[run_row()]), ["running"]),
    (known(active=[run_row(retry_at=NOON + 9, attempt=1)]), ["retry"]),
    (known(active=[run_row(job_id="other")]), ["not_due"]),
    (known(active=[run_row()], paused=math.inf), ["running", "paused"]),
    (known(active=[run_row(state="queued")]), ["queued"]),
    (known(active=[run_row(state="queued")], server=False), ["queued_no_server", "no_server"]),
    (known(active=[run_row(state="queued", owner="boot 1 2")], server=False),
     ["queued_owner", "no_server"]),
    (known(active=[run_row(state="queued")], held={"backup"}, paused=math.inf),
     ["queued_paused", "paused"]),
])
def test_why_a_job_does_not_run_now(facts, expected):
    assert reasons(facts) == expected


def test_who_waits_for_a_place_is_told_behind_whom():
    first, second = run_row(), run_row(id="r2", seq=2, state="queued", slot=NOON + 60)
    third = run_row(id="r3", seq=3, state="queued", slot=NOON + 120)
    other = run_row(id="r4", seq=4, job_id="other", state="queued", slot=NOON + 90)
    told = [(said["run"], said["reason"], said.get("behind"), said.get("limit"))
            for said in explain(known(active=[first, second, third, other],
                                      limits={"backup": 2, "other": 1}, max_concurrent=3))]
    assert told == [("r1", "running", None, None), ("r2", "queued", None, None),
                    ("r3", "queued_job", ["r1", "r2"], 2)]
    told = explain(known(active=[first, other, third], limits={"other": 1}, max_concurrent=2))[1]
    assert (told["reason"], told["behind"], told["limit"]) == ("queued_all", ["r1", "r4"], 2)
    caught_up = run_row(id="r5", state="queued", trigger="catch_up")
    told = explain(known(active=[first, caught_up], limits={"backup": 9}))[1]
    assert (told["reason"], told["behind"]) == ("queued_catch_up", ["r1"])


@pytest.mark.parametrize("state, reason", [
    (state, reason) for state in FINAL_STATES if state != "skipped"
    for reason in REASONS.get(state, (None,))])
def test_of_a_slot_that_ran_it_says_how(state, reason):
    said, = explain(known(), NOON, met(state=state, reason=reason, finished_at=NOON + 9))
    assert (said["reason"], said["state"], said["detail"]) == ("ran", state, reason)
    assert said["late"] is None
    said, = explain(known(), NOON, met(state=state, reason=reason, started_at=NOON + 300))
    assert said["late"] == 300


@pytest.mark.parametrize("reason", REASONS["skipped"])
def test_each_reason_for_a_slot_to_be_skipped_is_told(reason):
    said, = explain(known(), NOON, met(state="skipped", reason=reason, finished_at=NOON))
    assert said["reason"] == {"paused": "paused_then"}.get(reason, reason)


def test_a_slot_in_a_row_of_many_is_that_row_and_what_is_no_slot_is_not():
    many = met(state="skipped", reason="paused", slot=NOON - 5 * HOUR, last_slot=NOON,
               finished_at=NOON)
    assert reasons(known(), NOON - 2 * HOUR, many) == ["paused_then"]
    assert reasons(known(), NOON - 2 * HOUR + 1, many) == ["not_due"]
    before = met(state="skipped", reason="paused", slot=NOON - 5 * HOUR, last_slot=NOON - 3 * HOUR)
    assert reasons(known(), NOON - 2 * HOUR, before) == ["unrecorded"]


def test_an_overlap_names_the_runs_in_the_way():
    other = run_row(id="r0", slot=NOON - HOUR, state="succeeded", finished_at=NOON + 5)
    said, = explain(known(), NOON, met(state="skipped", reason="overlap", others=[other]))
    assert [run["id"] for run in said["others"]] == ["r0"] and said["overlap"] == "skip"


@pytest.mark.parametrize("spec, seen, why", [
    ({}, NOON + 2 * HOUR, "window"), ({}, NOON + 1800, "newer"),
    ({"catch_up": "none"}, NOON + 1800, "none")])
def test_a_missed_slot_says_how_long_nobody_was_there_and_why_it_was_not_caught_up(spec, seen, why):
    said, = explain(known(job("0 * * * *", **spec), now=NOON + DAY, position=NOON + DAY), NOON,
                    met(alive=NOON - 99, state="skipped", reason="missed", queued_at=seen))
    assert (said["alive"], said["seen"], said["late"], said["why"]) == (
        NOON - 99, seen, seen - NOON, why)


def test_of_a_row_that_has_grown_over_outages_a_later_one_is_not_dated_by_the_first():
    said, = explain(known(now=NOON + DAY, position=NOON + DAY), NOON + 3 * HOUR, met(
        alive=NOON - 99, state="skipped", reason="missed", last_slot=NOON + 3 * HOUR,
        queued_at=NOON + HOUR, finished_at=NOON + 5 * HOUR))
    assert (said["alive"], said["seen"], said["late"]) == (None, NOON + 5 * HOUR, 2 * HOUR)


@pytest.mark.parametrize("facts, instant, expected", [
    (known(), NOON - 1, ["not_due"]),
    (known(), NOON - 2 * DAY, ["unregistered"]),
    (known(), NOON - HOUR, ["unrecorded"]),
    (known(job([])), NOON, ["manual"]),
    (known(OFF), NOON, ["disabled"]),
    (known(position=NOON - HOUR), NOON, ["overdue"]),
    (known(position=NOON - HOUR, server=False), NOON, ["no_server_then"]),
    (known(job("0 * * * *", jitter="1h"), position=NOON - HOUR), NOON, ["jitter"]),
    (known(), NOON + HOUR, ["due"]),
    (known(server=False), NOON + HOUR, ["due", "no_server"]),
    (known(paused=math.inf), NOON + HOUR, ["will_be_paused"]),
    (known(paused=NOON + HOUR), NOON + HOUR, ["due"]),
    (known(job("0 * * * *", window={"end": "2025-08-01"})), NOON + DAY, ["window"]),
    (known(versions=[(NOON - DAY, OFF), (NOON - 60, HOURLY)]), NOON - HOUR, ["disabled"]),
    (known(versions=[(NOON - DAY, job("7 * * * *")), (NOON - 60, HOURLY)]), NOON - HOUR,
     ["rescheduled"]),
    (known(versions=[(NOON - DAY, HOURLY), (NOON - 60, job("7 * * * *"))]), NOON - HOUR,
     ["undecided"]),
    (known(versions=[(NOON, HOURLY)]), NOON, ["unregistered"]),
])
def test_of_a_slot_without_a_row_it_says_why_there_is_none(facts, instant, expected):
    assert reasons(facts, instant, met()) == expected


def test_what_is_not_due_says_when_it_was_and_when_it_is():
    said, = explain(known(), NOON + 60, met())
    assert (said["last"], said["next"]) == (NOON, NOON + HOUR)


def test_since_when_a_job_is_disabled_is_when_that_began():
    versions = [(NOON - 300, HOURLY), (NOON - 200, OFF),
                (NOON - 100, job("0 * * * *", enabled=False, tags=["x"]))]
    assert explain(known(versions=versions))[0]["since"] == NOON - 200


BERLIN = get_zone("Europe/Berlin")


@pytest.mark.parametrize("text, expected, gap", [
    ("2025-08-01T14:00", ["2025-08-01T12:00:00Z"], False),
    ("2025-08-01T14:00Z", ["2025-08-01T14:00:00Z"], False),
    ("2025-08-01T14:00:00.75", ["2025-08-01T12:00:00Z"], False),
    ("2025-08-01 14:00+05:30", ["2025-08-01T08:30:00Z"], False),
    ("2025-08-01", ["2025-07-31T22:00:00Z"], False),
    ("2025-03-30T02:30", ["2025-03-30T01:00:00Z"], True),
    ("2025-03-30T02:00", ["2025-03-30T01:00:00Z"], True),
    ("2025-03-30T03:00", ["2025-03-30T01:00:00Z"], False),
    ("2025-03-30T01:30Z", ["2025-03-30T01:30:00Z"], False),
    ("2025-10-26T02:30", ["2025-10-26T00:30:00Z", "2025-10-26T01:30:00Z"], False),
    ("2025-10-26T03:00", ["2025-10-26T02:00:00Z"], False),
])
def test_an_instant_without_an_offset_is_local_time(text, expected, gap):
    assert local_instants(text, BERLIN) == ([parse_instant(each, UTC) for each in expected], gap)


@pytest.mark.parametrize("zone", [UTC, get_zone("+01:00"), get_zone("Asia/Tokyo")])
def test_a_zone_that_is_always_the_same_makes_one_instant_of_a_text(zone):
    assert local_instants("2025-08-01T14:00", zone) == (
        [parse_instant("2025-08-01T14:00", zone)], False)


def test_only_what_names_a_time_of_day_is_moved_by_a_gap():
    (after,), _ = local_instants("2025-03-30T01:00:00Z", BERLIN)
    assert is_moved(job("30 2 * * *"), after, BERLIN)
    assert not is_moved(job("*/30 * * * *"), after, BERLIN)
    assert not is_moved(job(["@reboot", "30 2 * * *"]), after + DAY, BERLIN)


# Who may do what.

@pytest.mark.parametrize("caller, scopes", [
    (Caller(name="user me", scopes=(), owner=True), SCOPES),
    (Caller(name="token x", scopes=("*",)), SCOPES),
    (Caller(name="token x", scopes=ROLES["admin"]), SCOPES),
    (Caller(name="token x", scopes=()), ()),
    (Caller(name="token x", scopes=("run:create",)), ("run:create",)),
    (Caller(name="token x", scopes=ROLES["viewer"]), ("job:read", "run:list", "log:read")),
    (Caller(name="token x", scopes=ROLES["operator"]),
     ("job:read", "job:pause", "run:list", "run:create", "run:cancel", "log:read")),
    (Caller(name="token x", scopes=("*",), pattern="*"),
     tuple(scope for scope in SCOPES if scope not in ("token:admin", "metrics:read"))),
    (Caller(name="token x", scopes=("token:admin", "metrics:read", "job:read"), pattern="a"),
     ("job:read",))])
def test_a_caller_may_do_what_its_scopes_say(caller, scopes):
    assert tuple(scope for scope in SCOPES if caller.may(scope)) == scopes
    assert not any(caller.may(other) for other in ("job", "job:", "")) or "*" in caller.scopes \
        or caller.owner


@pytest.mark.parametrize("pattern, job_id, seen", [
    (None, "deploy", True), ("*", "deploy", True), ("deploy*", "deploy", True),
    ("deploy*", "deploy-web", True), ("deploy*", "Deploy", False), ("deploy*", "redeploy", False),
    ("deploy", "deploy-web", False), ("d?ploy", "deploy", True), ("d?ploy", "dploy", False),
    ("a.b", "a-b", False)])
def test_a_caller_sees_the_jobs_of_its_pattern(pattern, job_id, seen):
    assert Caller(name="token x", scopes=("*",), pattern=pattern).sees(job_id) is seen


def test_each_role_is_made_of_scopes():
    assert {scope for scopes in ROLES.values() for scope in scopes} <= {*SCOPES, "*"}
    assert set(ROLES["viewer"]) < set(ROLES["operator"])


OWNER = Caller(name="user me", scopes=("*",), owner=True)
TOKEN_ADMIN = Caller(name="token ci", scopes=("token:admin", "run:list"))


@pytest.mark.parametrize("spec, expected", [
    ({"scopes": ["run:create", "run:list"]}, (["run:list", "run:create"], None, None)),
    ({"scopes": ["run:list", "run:list"]}, (["run:list"], None, None)),
    ({"role": "viewer", "scopes": ["run:cancel"]},
     (["job:read", "run:list", "run:cancel", "log:read"], None, None)),
    ({"role": "admin"}, (["*"], None, None)),
    ({"scopes": ["*", "run:list"]}, (["*"], None, None)),
    ({"scopes": ["*"], "jobs": "deploy*"}, (["*"], "deploy*", None)),
    ({"role": "viewer", "expires": "30d"}, (list(ROLES["viewer"]), None, NOON + 30 * DAY)),
    ({"role": "viewer", "expires": 90}, (list(ROLES["viewer"]), None, NOON + 90)),
    ({"role": "viewer", "expires": "2025-08-02"}, (list(ROLES["viewer"]), None, NOON + DAY // 2)),
])
def test_a_token_is_what_was_asked_for(spec, expected):
    token = token_of({"name": "ci", **spec}, OWNER, NOON, UTC)
    assert token["name"] == "ci" and set(token["scopes"]) == set(expected[0])
    assert (token["pattern"], token["expires_at"]) == expected[1:]


@pytest.mark.parametrize("spec, message", [
    ({"name": None}, 'name: "" cannot be the name of a token'),
    ({"name": "a b"}, 'name: "a b" cannot be the name of a token'),
    ({"name": 5}, 'name: "5" cannot be the name of a token'),
    ({"scopes": []}, "scopes: write what the token may do"),
    ({"scopes": ["run:lst"]}, 'scopes: there is no scope "run:lst"; did you mean "run:list"?'),
    ({"scopes": ["zzz"]}, 'scopes: there is no scope "zzz"; there are job:read, '),
    ({"scopes": "run:list"}, "scopes: write a list of texts"),
    ({"scopes": [1]}, "scopes: write a list of texts"),
    ({"role": "root"}, 'role: "root" is none; there are viewer, operator, admin'),
    ({"jobs": "a b"}, 'jobs: "a b" is no pattern of job ids'),
    ({"jobs": "[ab]"}, 'jobs: "[ab]" is no pattern of job ids'),
    ({"jobs": ""}, 'jobs: "" is no pattern'), ({"jobs": 5}, 'jobs: "5" is no pattern'),
    ({"jobs": "a*", "scopes": ["token:admin"]}, "scopes: token:admin and metrics:read are about"),
    ({"jobs": "*", "scopes": ["metrics:read"]}, "scopes: token:admin and metrics:read are about"),
    ({"expires": "soon"}, 'expires: "soon" is neither a duration such as 30d nor'),
    ({"expires": "2025-07-31"}, 'expires: "2025-07-31" is in the past'),
    ({"expires": 0}, 'expires: "0" is in the past'),
    ({"expires": ["1d"]}, "expires: "),
])
def test_a_token_that_cannot_be_is_refused_in_words(spec, message):
    with pytest.raises(ValueError) as refused:
        token_of({"name": "ci", "scopes": ["run:list"], **spec}, OWNER, NOON, UTC)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize("creator, spec, missing", [
    (OWNER, {"role": "admin"}, None),
    (TOKEN_ADMIN, {"scopes": ["run:list", "token:admin"]}, None),
    (TOKEN_ADMIN, {"scopes": ["run:list"], "jobs": "a*"}, None),
    (TOKEN_ADMIN, {"scopes": ["run:create"]}, "run:create"),
    (TOKEN_ADMIN, {"role": "admin"}, "job:read"),
    (TOKEN_ADMIN, {"scopes": ["*"], "jobs": "a*"}, "job:read"),
    (Caller(scopes=("job:read", "run:list", "log:read", "token:admin")), {"role": "viewer"}, None),
])
def test_nobody_gives_away_more_than_they_have(creator, spec, missing):
    try:
        token = token_of({"name": "ci", **spec}, creator, NOON, UTC)
    except ValueError as error:
        assert missing and f"{missing} is not for you to give" in str(error)
    else:
        given = Caller(scopes=token["scopes"], pattern=token["pattern"])
        assert missing is None and all(creator.may(scope) for scope in SCOPES if given.may(scope))


# Steps of pipelines.

def all_graphs(count):
    """Each pipeline of `count` steps in which a step depends on earlier ones in some way."""
    kinds = (None, "succeeded", "failed", "finished")
    pairs = [(a, b) for b in range(count) for a in range(b)]
    for chosen in itertools.product(kinds, repeat=len(pairs)):
        wanted = {str(step): {} for step in range(count)}
        for (a, b), kind in zip(pairs, chosen):
            if kind:
                wanted[str(b)][str(a)] = kind
        yield wanted


def slow_ready(wanted, states):
    """The set of steps that are ready, and those that are to be skipped: by the definition."""
    satisfying = {"succeeded": {"succeeded"}, "failed": {"failed", "timed_out", "lost"},
                  "finished": set(FINAL_STATES)}
    states, skipped = dict(states), set()
    grew = True
    while grew:
        grew = False
        for step, needs in wanted.items():
            if step not in states and any(states.get(need, "") not in satisfying[kind] | {""}
                                          for need, kind in needs.items()):
                states[step] = "skipped"
                skipped.add(step)
                grew = True
    ready = {step for step, needs in wanted.items() if step not in states
             and all(need in states for need in needs)}
    return ready, skipped


@pytest.mark.parametrize("count, sample", [(1, 1), (2, 1), (3, 1), (4, 8)])
def test_steps_become_ready_and_are_skipped_as_the_definition_says(count, sample):
    chance = random.Random(7)
    for wanted in all_graphs(count):
        if sample > 1 and chance.randrange(sample):
            continue
        order, on, known = StepOrder(wanted), [], {}
        while True:
            ready, skipped = slow_ready(wanted, known)
            assert not skipped
            taken = list(iter(order.take, None))
            assert taken == sorted(ready - set(on))
            on += taken
            if not on:
                break
            step = on.pop(chance.randrange(len(on)))
            known[step] = chance.choice(FINAL_STATES)
            _, skipped = slow_ready(wanted, known)
            found = order.end(step, known[step])
            assert set(found) == skipped and len(found) == len(skipped)
            known.update(dict.fromkeys(skipped, "skipped"))
            assert order.states == known
        assert order.is_over and set(known) == set(wanted)


def test_ends_may_be_told_in_any_order_when_a_pipeline_goes_on():
    for wanted in all_graphs(3):
        for states in itertools.product(("succeeded", "failed", None), repeat=3):
            known = {str(step): state for step, state in enumerate(states) if state}
            if any(need not in known for step in known for need in wanted[step]):
                continue
            expected, skipped = slow_ready(wanted, known)
            for way in (list(known), list(known)[::-1]):
                order = StepOrder(wanted)
                for step in way:
                    order.end(step, known[step])
                ended = set(order.states)
                assert ended >= set(known) and set(iter(order.take, None)) <= set(wanted) - ended


def test_a_chain_of_many_steps_is_skipped_at_once():
    wanted = {str(step): {str(step - 1): "succeeded"} if step else {} for step in range(20_000)}
    order = StepOrder(wanted)
    assert order.take() == "0" and order.take() is None
    assert len(order.end("0", "failed")) == 19_999 and order.is_over


DIAMOND = {"a": {}, "b": {"a": "succeeded"}, "c": {"a": "succeeded"},
           "d": {"b": "succeeded", "c": "succeeded"}, "e": {}}


@pytest.mark.parametrize("ends, first, repeated", [
    ({"a": "succeeded", "b": "failed", "c": "succeeded", "d": "dependency", "e": "succeeded"}, None,
     "bd"),
    ({"a": "lost", "b": "dependency", "c": "dependency", "d": "dependency", "e": "succeeded"}, None,
     "abcd"),
    ({"a": "succeeded", "b": "condition", "c": "succeeded", "d": "dependency", "e": "succeeded"},
     None, "d"),
    (dict.fromkeys("abcde", "succeeded"), None, ""),
    (dict.fromkeys("abcde", "succeeded"), "c", "cd"),
    ({"a": "succeeded", "b": "succeeded", "c": "succeeded", "d": "succeeded"}, None, "e")])
def test_a_retry_repeats_what_failed_and_what_depends_on_it(ends, first, repeated):
    states = {step: ("skipped", end) if end in REASONS["skipped"] else (end, None)
              for step, end in ends.items()}
    assert steps_to_repeat(StepOrder(DIAMOND), states, first) == set(repeated)


def test_what_a_step_needs_and_what_needs_it():
    order = StepOrder(DIAMOND)
    assert order.needs("d") == {"a", "b", "c"} and order.needs("a") == set()
    assert order.dependents(["b", "e"]) == {"b", "d", "e"}


@pytest.mark.parametrize("needs, survives", [
    ({}, False), ({"a": "succeeded"}, False), ({"a": "succeeded", "b": "finished"}, True),
    ({"a": "failed"}, True)])
def test_what_cleans_up_runs_under_fail_fast(needs, survives):
    assert survives_failure(needs) is survives
