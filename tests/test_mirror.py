"""Section mirror: the store in a real bucket, to it, from it, and what goes wrong between them."""
import contextlib
import json
import os
import re
import signal
import sqlite3
import statistics
import threading
import time
import types

import pytest
from helpers import STALLS, apply, basic, end_of, error_xml, in_child, make_job, perform, read_runs
from links import Link

import roexec

pytestmark = pytest.mark.engine
NOW = 1_790_000_000.25          # 2026-09-21T14:13:20.25Z
DAY = "2026-09-21"


@pytest.fixture
def mirror(tmp_path, bucket):
    """`mirror(node, client)` is the Mirror of a new store; `said` are the texts it has said."""
    def make(node="a", client=None, folder=None, prepared=True):
        store = roexec.Store(str(tmp_path / (folder or node))).create()
        said = []
        made = roexec.Mirror(store, client or bucket(), node, lambda text, level: said.append(text))
        made.said = said
        if prepared:
            made.prepare()
        return made
    return make


def ship_all(mirror):
    """Write all that waits -> the keys."""
    keys = []
    while mirror.waiting()[0]:
        keys += mirror.ship()
    return keys


def add(mirror, run_id="r1", **row):
    """Add a run of this node; without a state it has succeeded."""
    with mirror.store.write() as db:
        roexec.add_run(db, **{"id": run_id, "job_id": "x", "trigger": "manual", "version": 1,
                              "state": "succeeded", "queued_at": NOW, "started_at": NOW + 1,
                              "finished_at": NOW + 2, "exit_code": 0, **row})


def key_of(run_id="r1"):
    return f"runs/{DAY}/{DAY}T14:13:20-{run_id}.json"


def rows_of(store, table, *without):
    with store.read() as db:
        rows = [dict(row) for row in db.execute(f"SELECT * FROM {table}")]
    return sorted(({name: value for name, value in row.items() if name not in without}
                   for row in rows), key=lambda row: [*map(str, row.values())])


def read(client, key):
    return json.loads(client.get(key))


def keys_of(client, prefix=""):
    return [key for key, _, _ in client.list(prefix)]


def caller():
    return roexec.Caller(name="user root", scopes=("*",), owner=True)


def token_ci(creator):
    return roexec.token_of({"name": "ci", "role": "viewer"}, creator, NOW, None)


def fill(mirror):
    """Rows of each kind: jobs (with versions, paused, removed), runs, a token, what was changed."""
    store = mirror.store
    apply(store, make_job(schedule="@hourly", params={"A": {"secret": True}}),
          make_job(job_id="gone"), make_job(job_id="paused"), since=NOW)
    apply(store, make_job("false", schedule="@hourly"), since=NOW + 5)
    with store.write() as db:
        roexec.delete_jobs(db, ["gone"], NOW + 6, caller().name)
        roexec.pause_job(db, "paused", True, by=caller().name)
        roexec.add_token(db, token_ci(caller()), caller(), NOW)
    perform(store, "echo one; echo two", job_id="x")
    add(mirror, "r1", slot=1_789_999_200, last_slot=1_789_999_200)
    add(mirror, "r2", state="skipped", reason="overlap", slot=1_790_000_000, count=3,
        last_slot=1_790_007_200)
    add(mirror, "r3", state="running", finished_at=None, exit_code=None, spec='{"id": "x"}',
        env='{"A": "\\u00fc", "B": null}', message="“quoted”\nand long", outputs='{"o": "1"}')
    with store.write() as db:
        roexec.finish_run(db, "r3", "failed", [
            {"number": 1, "started_at": NOW, "finished_at": NOW + 0.1, "exit_code": 3,
             "cpu_seconds": 0.25, "max_rss_bytes": 4096}], reason="exit", finished_at=NOW + 9.125)


def test_each_kind_of_row_goes_up_and_comes_down_identical(mirror, clean):
    first, second = mirror("a"), mirror("b")
    fill(first)
    keys = ship_all(first)
    assert len(keys) == len(set(keys)) == 3 + 4 + 1 + 3
    assert not second.is_hydrated
    assert second.hydrate() == len(keys)
    assert second.is_hydrated and second.said == [] and second.waiting() == (0, 0)
    for table, without in {
            "jobs": ("changed", "position", "last_run"), "versions": (), "attempts": (),
            "runs": ("seq", "node", "owner", "work"), "tokens": (),
            "audit": ("key", "seq")}.items():
        assert rows_of(second.store, table, *without) == rows_of(first.store, table, *without)
    assert {row["node"] for row in read_runs(second.store)} == {"a"}
    assert [row["id"] for row in read_runs(second.store)][:3] == ["r1", "r2", "r3"]
    with second.store.read() as db:
        job = roexec.find_job(db, "x")
        assert job["position"] == 1_790_007_200     # its newest slot
        assert job["last_id"] == read_runs(first.store)[0]["id"]
        assert roexec.find_job(db, "paused")["paused"] == float("inf")
    assert second.hydrate() == 0


def test_objects_are_readable_and_hold_no_secret(mirror, clean):
    first = mirror()
    fill(first)
    with first.store.write() as db:
        text = roexec.renew_token(db, "ci", caller(), NOW + 50)
    run_id = roexec.request_run(first.store, make_job(params={"A": {"secret": True}}),
                                trigger="manual", env={"A": "s3cr3t-value"})
    ship_all(first)
    client, whole = first.client, b""
    for key in keys_of(client):
        whole += client.get(key)
    assert b"s3cr3t-value" not in whole and text.encode() not in whole
    assert basic("ci", text).encode() not in whole
    run, = (read(client, key) for key in keys_of(client) if run_id in key)
    assert run["env"] == {"A": None} and run["node"] == "a"
    assert b'\n "message": "\xe2\x80\x9cquoted' in client.get(key_of("r3"))
    assert read(client, "jobs/x.json")["spec"]["command"] == "false"
    assert read(client, "store.json")["version"] == 1
    assert read(client, "tokens/ci.json").keys() == {"name", "digest", "scopes", "pattern",
                                                     "created_at", "expires_at"}


def test_what_was_there_before_goes_into_the_bucket_too(mirror, clean):
    first = mirror(prepared=False)
    fill(first)
    assert first.waiting() == (0, 0)
    first.prepare()
    first.prepare()
    keys = ship_all(first)
    assert len(keys) == 11 and len(keys_of(first.client, "logs/")) == 1
    assert first.ship() == []


def test_changes_wait_in_order_and_those_of_one_object_together(mirror):
    first = mirror()
    for command in ("true", "false", "id"):
        apply(first.store, make_job(command))
    add(first, "r1", state="queued", started_at=None, finished_at=None)
    add(first, "r2")
    with first.store.write() as db:
        roexec.change_run(db, "r1", "running", started_at=NOW)
    assert first.waiting()[0] == 3 and 0 <= first.waiting()[1] < 20
    assert first.ship(limit=2) == ["jobs/x.json", key_of("r1")]
    assert read(first.client, key_of("r1"))["state"] == "running"
    assert first.ship() == [key_of("r2")]


def test_a_change_while_its_object_is_written_stays(mirror, monkeypatch):
    first = mirror()
    add(first)
    put = first.client.put

    def change_meanwhile(key, data, **how):
        put(key, data, **how)
        if key == key_of():
            with first.store.write() as db:
                roexec.ask_to_cancel(db, "r1", "user")
    monkeypatch.setattr(first.client, "put", change_meanwhile)
    first.ship()
    assert first.waiting()[0] == 1
    monkeypatch.undo()
    assert first.ship() == [key_of()]
    assert read(first.client, key_of())["cancel"] == "user" and first.waiting()[0] == 0


@pytest.mark.parametrize("trouble", ["refused", "silent", "lost answers"])
def test_an_outage_delays_and_loses_nothing(mirror, bucket, s3_server, trouble):
    with Link(s3_server.port) as link:
        first = mirror(client=bucket(endpoint=f"http://127.0.0.1:{link.port}"))
        roexec._PACE, pace = 1 << 40, roexec._PACE
        try:
            add(first, "r0")
            ship_all(first)
            first.client.timeout, timeout = 0.3, first.client.timeout
            {"refused": link.cut, "silent": link.hold, "lost answers": link.drop_replies}[trouble]()
            times = []
            for number in range(1, 30):
                began = time.monotonic()
                add(first, f"r{number}")
                times.append(time.monotonic() - began)
            assert statistics.median(times) < 0.3       # nothing waits for the bucket
            for _ in range(2):
                with pytest.raises(roexec.S3Error):
                    first.ship()
            assert first.waiting()[0] == 29
            link.heal()
            first.client.timeout = timeout
            assert sorted(ship_all(first)) == sorted(key_of(f"r{each}") for each in range(1, 30))
        finally:
            roexec._PACE = pace
    assert len(keys_of(bucket(), "runs/")) == 30


def test_what_was_written_before_an_outage_counts(mirror, answers, bucket, monkeypatch):
    monkeypatch.setattr(roexec, "_pause", lambda number: None)
    first = mirror(client=bucket(endpoint=answers.url))
    for number in range(5):
        add(first, f"r{number}")
    answers.replies = [(200, b"")] * 4
    answers.usual = 503, error_xml("SlowDown")
    written = first.ship()
    assert len(written) == 3
    with pytest.raises(roexec.S3Error, match="SlowDown"):
        first.ship()
    assert first.waiting()[0] == 2
    answers.usual = 200, b""
    assert sorted(written + first.ship()) == [key_of(f"r{number}") for number in range(5)]


def test_a_kill_after_a_write_repeats_it_harmlessly(mirror, clean):
    first = mirror()
    for number in range(5):
        add(first, f"r{number}")

    def killed():
        put = first.client.put

        def put_and_die(key, data, **how):
            put(key, data, **how)
            if key == key_of("r2"):
                os.kill(os.getpid(), signal.SIGKILL)
        first.client.put = put_and_die
        first.ship()
    assert end_of(in_child(killed)) == -signal.SIGKILL
    first.client.close()
    assert key_of("r2") in keys_of(first.client, "runs/") and first.waiting()[0] == 5
    assert len(ship_all(first)) == 5
    second = mirror("b")
    second.hydrate()
    assert [row["id"] for row in read_runs(second.store)] == [f"r{number}" for number in range(5)]


def many(client, count):
    """Put objects of runs, one a minute, as a node `old` would have."""
    template = {"id": "", "job_id": "x", "trigger": "schedule", "state": "succeeded", "count": 1,
                "version": 1, "priority": 0, "queued_at": 0, "started_at": 0, "finished_at": 0,
                "exit_code": 0, "node": "old", "seq": 0, "attempts": []}
    left = list(range(count))

    def work():
        while left:
            number = left.pop()
            instant = NOW - 0.25 + 60 * (number - count)
            stamp = roexec.format_instant(instant).rstrip("Z")
            client.put(f"runs/{stamp[:10]}/{stamp}-r{number}.json", json.dumps({
                **template, "id": f"r{number}", "queued_at": instant, "started_at": instant,
                "finished_at": instant + 1, "seq": number + 1}).encode())
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_an_empty_node_has_two_thousand_runs_within_seconds(mirror, monkeypatch):
    first = mirror("a")
    many(first.client, 2000)
    apply(first.store, make_job())
    ship_all(first)
    second, order = mirror("b"), []
    fill_in = roexec._Intake._import

    def watched(self, objects, *more):
        order.extend(key for kind, key, _ in objects if kind == "runs")
        if len(order) < 500:            # a run begins meanwhile
            add(second, f"new{len(order)}")
        return fill_in(self, objects, *more)
    monkeypatch.setattr(roexec._Intake, "_import", watched)
    began = time.monotonic()
    assert second.hydrate() == 2001
    took = time.monotonic() - began
    assert took < 20 + STALLS, f"{took:.1f}s"
    assert [row["id"] for row in read_runs(second.store) if row["node"]] == [
        f"r{number}" for number in range(2000)]
    assert read_runs(second.store)[-1]["id"].startswith("new")      # and is newer than all of them
    assert max(order[:200]) > min(order[-200:])                     # the newest came first
    assert order[0][5:15] > order[-1][5:15]


def test_an_interrupted_filling_goes_on_and_keeps_the_order(mirror, monkeypatch):
    first = mirror("a")
    many(first.client, 700)
    first._meet()
    second, imports = mirror("b"), []
    fill_in = roexec._Intake._import

    def fail_later(self, objects, *more):
        imports.append(len(objects))
        if len(imports) == 3:
            raise roexec.S3Error("away")
        return fill_in(self, objects, *more)
    monkeypatch.setattr(roexec._Intake, "_import", fail_later)
    with pytest.raises(roexec.S3Error):
        second.hydrate()
    monkeypatch.undo()
    before = len(read_runs(second.store))
    assert 0 < before < 700 and not second.is_hydrated
    add(first, "r9999", queued_at=NOW + 60)
    ship_all(first)
    add(second, "mine")
    assert second.hydrate() == 700 - before + 1
    ids = [row["id"] for row in read_runs(second.store)]
    assert ids == [*(f"r{number}" for number in range(700)), "mine", "r9999"]


# Two nodes.

@pytest.fixture
def pair(mirror):
    """Two mirrors of one bucket that know each other's rows."""
    first, second = mirror("a"), mirror("b")
    apply(first.store, make_job(), since=NOW)
    ship_all(first)
    for each in (first, second):
        each.hydrate()
    return first, second


def exchange(source, target):
    """What one node has written is fetched by the other -> how many objects have changed it."""
    return target.fetch(ship_all(source))


def change(mirror, run_id, **columns):
    with mirror.store.write() as db:
        names = ", ".join(f"{name} = ?" for name in columns)
        db.execute(f"UPDATE runs SET {names} WHERE id = ?", (*columns.values(), run_id))


LOST = {"state": "lost", "reason": "node", "finished_at": NOW + 30}
QUEUED = {"state": "queued", "started_at": None, "finished_at": None, "exit_code": None}
RUNNING = {"state": "running", "finished_at": None, "exit_code": None}

RUNS = [
    # (what node a has as its own, what node b writes about it, the state that both have then)
    ("an end is the truth", {}, LOST, "succeeded"),
    ("so is that it runs", RUNNING, LOST, "running"),
    ("but not that it waits", QUEUED, LOST, "lost"),
    ("the same is nothing new", {}, {"state": "succeeded"}, "succeeded"),
]


@pytest.mark.parametrize("own, written, state", [case[1:] for case in RUNS],
                         ids=[case[0] for case in RUNS])
def test_a_node_knows_best_what_it_has_run(pair, own, written, state):
    first, second = pair
    add(first, **own)
    exchange(first, second)
    change(second, "r1", **written)             # as a leader does for a node that is away
    exchange(second, first)
    exchange(first, second)
    assert [row["state"] for each in pair for row in read_runs(each.store)] == [state, state]
    assert [row["node"] for each in pair for row in read_runs(each.store)] == [None, "a"]
    assert read(first.client, key_of())["state"] == state
    assert ship_all(first) == ship_all(second) == []


def test_what_is_of_another_node_follows_it(pair):
    first, second = pair
    add(first, **RUNNING)
    exchange(first, second)
    assert read_runs(second.store)[0]["state"] == "running"
    with first.store.write() as db:
        roexec.finish_run(db, "r1", "failed", [
            {"number": 1, "started_at": NOW, "finished_at": NOW + 3, "exit_code": 3}],
            reason="exit", finished_at=NOW + 3)
    assert exchange(first, second) == 1
    assert read_runs(second.store)[0]["reason"] == "exit"
    assert len(rows_of(second.store, "attempts")) == 1


def test_what_waits_here_is_not_replaced_from_there(pair):
    first, second = pair
    add(first, **RUNNING)
    keys = ship_all(first)
    second.fetch(keys)
    change(second, "r1", **LOST)
    assert second.fetch(keys) == 0
    assert read_runs(second.store)[0]["state"] == "lost"


def test_a_run_that_waited_goes_to_the_node_that_took_it_over(pair):
    first, second = pair
    add(first, **QUEUED)
    exchange(first, second)
    change(second, "r1", node=None, state="running", started_at=NOW + 5)
    exchange(second, first)
    assert [(row["state"], row["node"]) for row in read_runs(first.store)] == [("running", "b")]


SKIPPED = {"state": "skipped", "reason": "overlap", "started_at": None, "exit_code": None,
           "slot": 1_790_000_000}

BOTH = [
    # (what each of two nodes has written as its own run, whose counts)
    ("who has started it knows", SKIPPED, {"slot": 1_790_000_000}, "b"),
    ("also where it was cancelled", {**SKIPPED, "state": "cancelled", "reason": "user"}, {}, "b"),
    ("who has counted more slots knows more", {**SKIPPED, "last_slot": 1_790_000_003, "count": 4},
     {**SKIPPED, "last_slot": 1_790_000_001, "count": 2}, "a"),
    ("else it is the same for all", SKIPPED, SKIPPED, "b"),
]


@pytest.mark.parametrize("one, other, winner", [case[1:] for case in BOTH],
                         ids=[case[0] for case in BOTH])
@pytest.mark.parametrize("turns", ["ab", "ba"])
def test_two_nodes_that_each_had_a_run_agree_in_the_end(pair, turns, one, other, winner):
    nodes = dict(zip("ab", pair))
    add(nodes["a"], **one)
    add(nodes["b"], **other)
    for name in turns * 2:
        exchange(nodes[name], nodes["b" if name == "a" else "a"])
    assert ship_all(pair[0]) == ship_all(pair[1]) == []
    objects = []
    for name, mirror in nodes.items():
        with mirror.store.read() as db:
            objects.append({**roexec.run_object(db, "r1", name), "seq": None})
    assert objects[0] == objects[1]
    assert objects[0]["node"] == winner


@pytest.mark.parametrize("own", [SKIPPED, {**QUEUED, "slot": 1_790_000_000}])
def test_a_node_that_comes_back_does_not_write_over_what_went_on_without_it(pair, own):
    first, second = pair
    add(first, **own)                   # and it dies before that is in the bucket
    add(second, slot=1_790_000_000)
    ship_all(second)                    # and it loses its disk
    first.hydrate()
    ship_all(first)
    assert read(first.client, key_of())["state"] == read_runs(first.store)[0]["state"] == "succeeded"


def test_what_is_written_down_for_a_node_that_is_gone_is_its_run(pair):
    first, second = pair
    add(first, slot=1_790_000_000)              # and it dies before that is in the bucket
    claim = roexec.Claim(run="r1", slot=1_790_000_000, last_slot=1_790_000_000, count=1,
                         trigger="schedule", queued_at=NOW, state="starting", owner="a", boot="b1")
    claim, = roexec.Cursor(due=claim.slot, open=(claim,)).take_over("b", "b2", {"b"}).open
    with second.store.write() as db:
        roexec.write_claim(db, second.store, "x", claim, NOW + 60)
    row, = read_runs(second.store)
    assert (row["state"], row["reason"], row["node"]) == ("lost", "node", "a")
    exchange(second, first)                     # it comes back
    exchange(first, second)
    assert [row["state"] for each in pair for row in read_runs(each.store)] == ["succeeded"] * 2
    assert keys_of(first.client, "runs/") == [key_of()]


def test_a_second_look_at_the_bucket_fetches_only_what_has_changed(pair, monkeypatch):
    monkeypatch.setattr(roexec, "_FRESH", -10)      # seconds: also what has just been written
    first, second = pair
    for number in range(5):
        add(first, f"r{number}")
    ship_all(first)
    second.hydrate()
    fetched, get = [], second.client.get
    monkeypatch.setattr(second.client, "get", lambda key: fetched.append(key) or get(key))
    second.hydrate()
    assert not [key for key in fetched if key.startswith("runs/")]
    second.seen[key_of("r3")] -= 1                  # as if it was written anew since
    second.hydrate()
    assert [key for key in fetched if key.startswith("runs/")] == [key_of("r3")]


class Told:
    """What nodes tell each other of, as their Membership has it; `works` is whether they can,
    `is_seen` whether they have looked."""
    prefix = "members/"

    def __init__(self):
        self.kept, self.nodes, self.works = {}, {"a": {"key": "1"}, "b": {"key": "2"}}, True
        self.client, self.is_seen = self, True

    @property
    def shipped(self):
        return {key.rpartition("/")[2]: json.loads(value) for key, value in self.kept.items()
                if self.is_seen}

    def get(self, key):
        return key in self.kept and types.SimpleNamespace(value=self.kept[key]) or None

    def put(self, key, value):
        if not self.works:
            raise roexec.EtcdError("no answer", unknown=True)
        self.kept[key] = value


def test_a_node_hears_of_all_that_another_one_writes_before_and_after_its_restarts(pair):
    told, (first, second) = Told(), pair
    hears, tells = (roexec.Exchange(mirror, told, print) for mirror in (second, first))
    for exchange in (hears, tells):
        exchange.turn()
    told.is_seen = False
    for restart in range(3):
        for number in range(2):
            add(first, f"r{restart}x{number}")
        tells.turn()
        tells = roexec.Exchange(first, told, print)
    told.is_seen = True
    hears.turn()
    assert len(read_runs(second.store)) == 6


def test_a_node_that_hears_of_all_need_not_look_at_it_again_later(pair, monkeypatch):
    monkeypatch.setattr(roexec, "_NOTED", 0)
    hears, known = roexec.Exchange(pair[1], Told(), print), []
    for _ in range(3):
        hears.turn()
        with pair[1].store.read() as db:
            known.append(roexec.get_meta(db, "hydrated"))
    assert known == sorted(set(known))


def test_what_could_not_be_told_is_told_later(pair):
    told, (first, second) = Told(), pair
    hears, tells = (roexec.Exchange(mirror, told, print) for mirror in (second, first))
    hears.turn()
    add(first)
    told.works = False
    with pytest.raises(roexec.EtcdError):
        tells.turn()
    told.works = True
    tells.turn()
    hears.turn()
    assert [row["id"] for row in read_runs(second.store)] == ["r1"]


def test_what_was_written_before_the_disk_was_full_is_told(pair, monkeypatch):
    told, (first, second), written = Told(), pair, roexec.objects_written
    hears, tells = (roexec.Exchange(mirror, told, print) for mirror in (second, first))
    hears.turn(), tells.turn()
    for number in range(4):
        add(first, f"r{number}")
    monkeypatch.setattr(roexec, "_SETTLED", 2)
    faults = [None, sqlite3.OperationalError("database or disk is full")]

    def full(db, rows):
        fault = faults.pop(0) if faults else None
        if fault:
            raise fault
        written(db, rows)
    monkeypatch.setattr(roexec, "objects_written", full)
    for _ in range(2):
        with contextlib.suppress(roexec.StoreFailure):
            tells.turn()
    hears.turn()
    assert len(read_runs(second.store)) == 4 and not faults


def test_what_a_node_that_left_had_no_time_to_tell_is_seen(pair):
    told, (first, second) = Told(), pair
    hears = roexec.Exchange(second, told, print)
    hears.turn()
    add(first)
    ship_all(first)                     # and then it is killed
    del told.nodes["a"]
    hears.turn()
    assert [row["id"] for row in read_runs(second.store)] == ["r1"]


@pytest.mark.parametrize("earlier, later, wins", [(10, 20, "later"), (20, 10, "earlier"),
                                                  (20, 20, "earlier")])
def test_of_two_changes_of_a_job_the_newer_wins(pair, earlier, later, wins):
    first, second = pair
    apply(first.store, make_job("echo earlier"), since=NOW + earlier)
    apply(second.store, make_job("echo later"), since=NOW + later)
    keys = ship_all(second)
    first.store.say = None
    with first.store.write() as db:             # as if its change had been written before
        db.execute("DELETE FROM changes")
    first.fetch(keys)
    assert json.loads(rows_of(first.store, "jobs")[0]["spec"])["command"] == f"echo {wins}"


def test_removing_and_pausing_a_job_arrives(pair):
    first, second = pair
    with first.store.write() as db:
        roexec.pause_job(db, "x", True, NOW + 5000)
    exchange(first, second)
    assert rows_of(second.store, "jobs")[0]["paused"] == NOW + 5000
    with first.store.write() as db:
        roexec.delete_jobs(db, ["x"], time.time())
    exchange(first, second)
    with second.store.read() as db:
        assert roexec.job_ids(db) == []
    apply(second.store, make_job())
    exchange(second, first)
    with first.store.read() as db:
        assert roexec.job_ids(db) == ["x"] and roexec.find_job(db, "x")["version"] == 2


def test_the_position_of_a_job_from_elsewhere_is_its_newest_slot(pair):
    first, second = pair
    add(first, slot=int(NOW) + 77)
    exchange(first, second)
    with second.store.read() as db:
        assert roexec.find_job(db, "x")["position"] == int(NOW) + 77


def test_a_token_that_is_rotated_or_revoked_is_so_everywhere(pair):
    first, second = pair
    made = caller()
    with first.store.write() as db:
        old = roexec.add_token(db, token_ci(made), made, NOW)
    exchange(first, second)
    with second.store.read() as db:
        assert roexec.find_token(db, old, NOW)["name"] == "ci"
    with first.store.write() as db:
        new = roexec.renew_token(db, "ci", made, NOW + 1)
    exchange(first, second)
    with second.store.read() as db:
        assert not roexec.find_token(db, old, NOW) and roexec.find_token(db, new, NOW)
    with first.store.write() as db:
        roexec.remove_token(db, "ci", made, NOW + 2)
    exchange(first, second)
    with second.store.read() as db:
        assert roexec.list_tokens(db) == []
    assert keys_of(first.client, "tokens/") == []


def test_a_token_that_was_revoked_does_not_come_back_from_the_bucket(pair):
    first, _ = pair
    made = caller()
    with first.store.write() as db:
        roexec.add_token(db, token_ci(made), made, NOW)
    ship_all(first)
    with first.store.write() as db:
        roexec.remove_token(db, "ci", made, NOW + 2)
    assert first.fetch(["tokens/ci.json"]) == 0
    first.hydrate()
    ship_all(first)
    with first.store.read() as db:
        assert roexec.list_tokens(db) == []
    assert keys_of(first.client, "tokens/") == []


def test_an_older_change_of_a_job_does_not_replace_a_newer_one_in_the_bucket(pair):
    first, second = pair
    apply(first.store, make_job("echo earlier"), since=NOW + 10)
    apply(second.store, make_job("echo later"), since=NOW + 20)
    ship_all(second)
    ship_all(first)                     # which has not heard of the other yet
    for each in pair:
        assert json.loads(rows_of(each.store, "jobs")[0]["spec"])["command"] == "echo later"
    assert read(first.client, "jobs/x.json")["spec"]["command"] == "echo later"


def test_a_change_of_a_job_that_is_written_late_does_not_stay_in_place_of_a_newer_one(pair):
    first, second = pair
    apply(first.store, make_job("echo 1"))
    exchange(first, second)
    apply(first.store, make_job("echo 2"))
    put = first.client.put

    def late(key, *words, **more):      # another node leads, and has written by then
        first.client.put = put
        apply(second.store, make_job("echo 3"))
        apply(second.store, make_job("echo 4"))
        ship_all(second)
        return put(key, *words, **more)
    first.client.put = late
    keys = ship_all(first)
    second.fetch(keys)
    ship_all(second)
    assert read(first.client, keys[0])["spec"]["command"] == "echo 4"
    first.fetch(keys)
    assert not first.waiting()[0] and not second.waiting()[0]


def test_a_job_with_many_large_versions_keeps_a_small_object(mirror):
    first, second = mirror("a"), mirror("b")
    for number in range(12):
        apply(first.store, make_job(f"echo {number} " + "x" * 200_000), since=NOW + number)
    ship_all(first)
    second.hydrate()
    with second.store.read() as db:
        assert [spec[:40] for _, spec in roexec.job_versions(db, "x")][-1:] == [
            '{"id": "x", "command": "echo 11 xxxxxxxx']
        assert len(roexec.job_versions(db, "x")) == 5


def test_what_was_removed_while_a_node_was_away_is_removed_there(pair):
    first, second = pair
    made = caller()
    with first.store.write() as db:
        roexec.add_token(db, token_ci(made), made, NOW)
    add(first, "r1")
    exchange(first, second)
    add(second, "mine")
    with first.store.write() as db:
        roexec.remove_token(db, "ci", made, NOW)
        roexec.remove_runs(db, ["r1"])
    ship_all(first)
    second.hydrate()
    with second.store.read() as db:
        assert roexec.list_tokens(db) == []
    assert [row["id"] for row in read_runs(second.store)] == ["mine"]


def test_a_slot_that_two_runs_have_is_refused_aloud(pair):
    first, second = pair
    add(first, "r1", slot=int(NOW))
    add(second, "r2", slot=int(NOW))
    exchange(first, second)
    assert [row["id"] for row in read_runs(second.store)] == ["r2"]
    assert "r1.json in the bucket is refused: its slot" in second.said[0]


def test_what_was_registered_before_a_node_knew_goes_on_with_the_versions_there(mirror):
    first, second = mirror("a"), mirror("b")
    for number in range(3):
        apply(first.store, make_job(f"echo {number}"), since=NOW + number)
    apply(first.store, make_job(job_id="same"), since=NOW)
    apply(first.store, make_job("false", job_id="same"), since=NOW)
    ship_all(first)
    apply(second.store, make_job("echo mine"), make_job("false", job_id="same"), since=NOW + 9)
    second.hydrate()
    exchange(second, first)
    for each in (first, second):
        with each.store.read() as db:
            assert roexec.find_job(db, "x")["version"] == 4
            assert [json.loads(spec)["command"] for _, spec in roexec.job_versions(db, "x")] == [
                "echo 0", "echo 1", "echo 2", "echo mine"]
            assert roexec.find_job(db, "same")["version"] == 2
    assert ship_all(first) == ship_all(second) == []


def test_a_bucket_is_of_one_store(mirror, bucket):
    mirror("a").ship()
    other = mirror("c")
    add(other)
    with pytest.raises(roexec.S3Error, match="store.json is of another store; name another prefix"):
        other.ship()
    bucket().put("store.json", b'{"id": "abc", "version": 2}')
    with pytest.raises(roexec.S3Error, match="is of a newer roexec"):
        mirror("d").hydrate()
    bucket().put("store.json", b'"')
    with pytest.raises(roexec.S3Error, match="is not what roexec has written"):
        mirror("e").hydrate()


def test_a_bucket_that_somebody_emptied_is_filled_again(mirror, bucket, tmp_path, clean):
    first = mirror()
    fill(first)
    ship_all(first)
    first.hydrate()
    before = keys_of(bucket())
    for key in before:
        bucket().delete(key)
    again = roexec.Mirror(first.store, bucket(), "a", print)
    again.hydrate()
    ship_all(again)
    assert keys_of(bucket()) == before


# Logs.

@pytest.mark.parametrize("kind", ["plain", "packed", "in parts"])
def test_logs_go_up_and_are_fetched_when_asked_for(mirror, clean, kind):
    first, second = mirror("a"), mirror("b")
    limits = {"log": {"max_size": "64K"}} if kind == "in parts" else {}
    row = perform(first.store, "seq 30000" if limits else "seq 100", job_id="x", **limits)
    if kind == "packed":
        roexec.pack_log(first.store.folder, row["log"], 1 << 20)
    ship_all(first)
    stored = keys_of(first.client, "logs/")
    assert {"plain": stored == [row["log"]], "packed": stored == [row["log"] + ".gz"],
            "in parts": len(stored) > 2}[kind]
    second.hydrate()
    there, = read_runs(second.store)
    assert not roexec.log_exists(second.store.folder, there["log"])
    path = second.fetch_log(there)
    assert b"".join(lines.data for lines in roexec.follow(path)) == b"".join(
        lines.data for lines in roexec.follow(first.store.file(row["log"])))
    second.client.put = second.client.list = None
    assert second.fetch_log(there) == path          # it is here now
    assert not os.path.exists(second.store.file("fetched"))


def test_a_log_is_there_before_its_run_has_ended_there(mirror, clean, monkeypatch):
    first, order = mirror(), []
    add(first, state="running", finished_at=None)
    log = "logs/x/2026-09-21T14:13:20.log"
    os.makedirs(first.store.file("logs/x"))
    with open(first.store.file(log), "w", encoding="utf-8") as file:
        file.write("2026-09-21T14:13:20Z [OUT] hello\n")
    with first.store.write() as db:
        roexec.finish_run(db, "r1", "succeeded", [], finished_at=NOW + 2, log=log)
    put = first.client.put
    monkeypatch.setattr(first.client, "put", lambda key, data, **how: order.append(key) or put(
        key, data, **how))
    assert ship_all(first) == [key_of()]
    assert order[:3] == ["store.json", log, key_of()]


def test_a_large_log_goes_in_parts(mirror, clean):
    first, second = mirror("a"), mirror("b")
    row = perform(first.store, "head -c 17M /dev/zero | tr '\\0' x | fold -w 1000", job_id="x")
    ship_all(first)
    assert first.client.head(row["log"])["size"] > 17 << 20
    assert "-" in first.client.head(row["log"])["etag"]     # as those in parts have it
    second.hydrate()
    path = second.fetch_log(read_runs(second.store)[0])
    assert os.path.getsize(path) == os.path.getsize(first.store.file(row["log"]))


def test_a_log_that_is_nowhere_is_none(mirror):
    first = mirror()
    for log in (None, "logs/x/2026-09-21T14:13:20.log", "../../etc/passwd", "logs/../../x.log"):
        assert first.fetch_log({"log": log}) is None


def test_a_purge_reaches_the_bucket_and_the_other_node(mirror, clean):
    first, second = mirror("a"), mirror("b")
    apply(first.store, make_job(), since=NOW)
    rows = [perform(first.store, "echo hello", job_id="x") for _ in range(3)]
    exchange(first, second)
    second.hydrate()
    path = second.fetch_log(read_runs(second.store)[0])
    upkeep = roexec.Upkeep(first.store, None)
    upkeep.purge_runs(newest=1)
    assert len(read_runs(first.store)) == 1
    keys = ship_all(first)
    assert len(keys_of(first.client, "runs/")) == len(keys_of(first.client, "logs/")) == 1
    assert second.fetch(keys) == 2
    assert [row["id"] for row in read_runs(second.store)] == [rows[-1]["id"]]
    assert not os.path.exists(path) and second.ship() == []


def test_a_log_that_is_dropped_leaves_the_bucket(mirror, clean):
    first, second = mirror("a"), mirror("b")
    row = perform(first.store, "echo hello", job_id="x")
    exchange(first, second)
    with first.store.write() as db:
        roexec.drop_logs(db, [row["id"]], "by a test")
    exchange(first, second)
    assert keys_of(first.client, "logs/") == []
    assert read_runs(second.store)[0]["log_gone"] == "by a test"


def test_a_look_at_the_store_forgets_no_log_of_the_bucket(mirror, clean):
    first, second = mirror("a"), mirror("b")
    perform(first.store, "echo hello", job_id="x")
    exchange(first, second)
    assert roexec.check_store(second.store) == []
    assert read_runs(second.store)[0]["log"] and second.waiting()[0] == 0


def test_a_log_that_cannot_be_read_keeps_nothing_else_away(mirror, clean):
    first = mirror()
    row = perform(first.store, "echo hello", job_id="x")
    os.unlink(first.store.file(row["log"]))
    os.mkdir(first.store.file(row["log"]))
    add(first)
    assert len(ship_all(first)) == 2
    assert first.said == [f"The log {row['log']} does not go into the bucket: Is a directory"]


def test_logs_go_up_once(mirror, clean, monkeypatch):
    first, keys = mirror(), []
    for _ in range(3):
        perform(first.store, "echo hello", job_id="x")
    put = first.client.put
    monkeypatch.setattr(first.client, "put", lambda key, data, **how: keys.append(key) or put(
        key, data, **how))
    ship_all(first)
    assert len([key for key in keys if key.startswith("logs/")]) == len(set(
        row["log"] for row in read_runs(first.store)))


def test_a_log_that_is_packed_while_it_goes_up_is_there(mirror, clean, monkeypatch):
    first = mirror()
    row = perform(first.store, "echo hello", job_id="x")
    found = roexec.stored_files

    def packed_meanwhile(log):
        files = found(log)
        monkeypatch.undo()
        roexec.pack_log(first.store.folder, row["log"], 1 << 20)
        return files
    monkeypatch.setattr(roexec, "stored_files", packed_meanwhile)
    ship_all(first)
    assert keys_of(first.client, "logs/") == [row["log"] + ".gz"]


# What nobody knows.

def test_what_no_row_knows_is_swept_after_a_day(mirror, clean):
    first = mirror()
    row = perform(first.store, "echo hello", job_id="x")
    ship_all(first)
    client = first.client
    stray = [key_of("stray"), "logs/x/2026-01-02T03:04:05.log.gz", "runs/notes.txt",
             row["log"] + ".parts/000000000000100.gz"]
    for key in stray:
        client.put(key, b"{}")
    client.put("elsewhere", b"")
    later = time.time() + 2 * 86400
    assert first.sweep(later) == 0              # it may not know all yet
    first.hydrate()
    add(first, "new")
    assert first.sweep(time.time()) == 0
    assert first.sweep(later) == 3
    left = keys_of(client)
    assert set(stray).intersection(left) == {stray[3]} and "elsewhere" in left
    assert len(keys_of(client, "runs/")) == 1


# Objects that others have made.

def good_run(**more):
    return {"id": "r1", "job_id": "x", "trigger": "manual", "state": "succeeded", "count": 1,
            "priority": 0, "queued_at": NOW, "finished_at": NOW + 1, "node": "z", "seq": 1,
            "attempts": [], **more}


GOOD_JOB = {"id": "x", "version": 1, "source": None, "paused": 0, "deleted": False,
            "changed_at": NOW, "spec": {"id": "x", "command": "true"}, "versions": []}
GOOD_TOKEN = {"name": "ci", "digest": "0" * 64, "scopes": ["*"], "created_at": NOW}
RUN, AUDIT = key_of(), f"audit/{DAY}/{DAY}T14:13:20-z-1.json"
BROKEN = [
    (RUN, b"", "it is no JSON"), (RUN, b"\xff", "it is no JSON"), (RUN, b"[]", "it is no object"),
    (RUN, b"[" * 100_000, "it is no JSON"), (RUN, b"x" * (5 << 20), "larger than"),
    (RUN, good_run(log="logs/x/../../../etc/passwd"), "its log is not one of its job"),
    (RUN, good_run(log="logs/other/2026-09-21T14:13:20.log"), "its log is not one of its job"),
    (RUN, good_run(log="/etc/passwd.log"), "its log"),
    (RUN, good_run(state="strange"), "its state or trigger"),
    (RUN, good_run(trigger="x"), "its state or trigger"),
    (RUN, good_run(finished_at=None), "it has ended, or not"),
    (RUN, good_run(state="running"), "it has ended, or not"),
    (RUN, good_run(slot=int(NOW) * 2), "it is of the future"),
    (RUN, good_run(slot=1.5), '"slot" is not'), (RUN, good_run(count="1"), '"count" is not'),
    (RUN, good_run(exit_code=True), '"exit_code" is not'),
    (RUN, good_run(exit_code=1 << 70), '"exit_code" is not'),
    (RUN, good_run(message="\0"), '"message" is not'),
    (RUN, good_run(node="../x"), '"node" is not'),
    (RUN, good_run(message="\ud800"), '"message" is not'),
    (RUN, good_run(queued_at=float("nan")), '"queued_at" is not'),
    (RUN, good_run(job_id="../x"), '"job_id" is not'), (RUN, good_run(spec="x"), '"spec" is not'),
    (RUN, good_run(attempts=[{"number": "1"}]), '"number" is not'),
    (RUN, good_run(attempts=None), '"attempts" is not'),
    (RUN, good_run(id="r2"), "it is not what its key says"),
    (RUN, good_run(queued_at=NOW + 1), "it is not what its key says"),
    ("runs/x.json", good_run(), "its key is not one of roexec's"),
    ("../../x.json", good_run(), "its key is not one of roexec's"),
    ("jobs/x.json", {**GOOD_JOB, "spec": {"id": "x"}}, "command"),
    ("jobs/x.json", {**GOOD_JOB, "spec": {"id": "y", "command": "x"}}, "its spec is of another"),
    ("jobs/y.json", GOOD_JOB, "it is not what its key says"),
    ("jobs/x.json", {**GOOD_JOB, "changed_at": 100e9}, "it is of the future"),
    ("jobs/x.json", {**GOOD_JOB, "paused": -1}, '"paused" is not'),
    ("jobs/x.json", {**GOOD_JOB, "versions": [1]}, "it is no object"),
    ("tokens/ci.json", {**GOOD_TOKEN, "digest": "0"}, '"digest" is not'),
    ("tokens/ci.json", {**GOOD_TOKEN, "scopes": ["all"]}, "its scopes are none"),
    ("tokens/ci.json", {**GOOD_TOKEN, "scopes": [1]}, "its scopes are none"),
    ("tokens/no.json", GOOD_TOKEN, "it is not what its key says"),
    ("tokens/ci.json", {**GOOD_TOKEN, "created_at": 100e9}, "it is of the future"),
    (AUDIT, {"at": NOW, "who": "x"}, '"action" is not'),
]


def test_objects_that_are_well_made_are_taken(mirror):
    first = mirror()
    for key, value in ((RUN, good_run(unknown="of a newer roexec")), ("jobs/x.json", GOOD_JOB),
                       ("tokens/ci.json", GOOD_TOKEN),
                       (AUDIT, {"at": NOW, "who": "x", "action": "y"})):
        first.client.put(key, json.dumps(value).encode())
        assert first.fetch([key]) == 1 and first.fetch([key]) == 0, key
    assert first.said == [] and first.waiting()[0] == 0


def test_a_broken_object_is_refused_aloud_and_harms_nothing(mirror, tmp_path):
    first = mirror()
    for key, value, text in BROKEN:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        if ".." not in key:
            first.client.put(key, data)
        assert first.fetch([key]) == 0
        said = first.said.pop()
        assert f"The object {key} in the bucket is refused: " in said and text in said, (key, value)
        assert first.said == []
    for table in ("jobs", "runs", "tokens", "audit", "attempts", "versions", "changes"):
        assert rows_of(first.store, table) == []
    first.client.put(RUN, json.dumps(good_run(id="r9")).encode())
    first.client.put(key_of("r2"), json.dumps(good_run(id="r2")).encode())
    assert first.hydrate() == 1                 # one that is broken keeps no other away
    assert os.listdir(tmp_path) == ["a"]


def test_a_backup_of_a_store_in_a_bucket_can_be_restored(mirror, tmp_path, clean):
    first = mirror()
    fill(first)
    first.store.copy_to(str(tmp_path / "copy.db"))
    fresh = roexec.Store(str(tmp_path / "fresh"))
    roexec.restore(fresh, str(tmp_path / "copy.db"), lambda *_: None)
    assert len(read_runs(fresh)) == 4 and read_runs(fresh)[0]["log"]


# What a person is told of it.

def test_doctor_looks_at_the_bucket_and_at_what_waits_for_it(store, bucket, s3_server, monkeypatch):
    client = bucket()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.access)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret)
    settings = {"store": {"type": "s3", "bucket": s3_server.bucket, "endpoint": s3_server.endpoint,
                          "prefix": client.prefix, "region": s3_server.region}}
    config = roexec.read_config(json.dumps(settings), "config.yml", "/")

    def found(check):
        return [(each.level, each.text) for each in roexec.examine(store, config, {"x": check})]
    place = f"s3://{client.bucket}/{client.prefix}"
    assert found(roexec._check_bucket) == [("ok", place)]
    roexec.Mirror(store, client, "a", print).prepare()
    apply(store, make_job("true"))
    assert found(roexec._check_outbox) == []
    monkeypatch.setattr(roexec, "_LONG_BEHIND", -1)
    (level, text), = found(roexec._check_outbox)
    assert level == "wrong" and re.match(r"\d+ changes wait to be written into the bucket", text)
    assert any("changes wait" in each.text for each in roexec.status_warnings(store, config))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    (level, text), = found(roexec._check_bucket)
    assert level == "wrong" and "wrong" not in text
