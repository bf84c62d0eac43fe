"""Nodes of a cluster as users have them: real servers, etcd with three members, a bucket, and what
happens to them."""
import collections
import contextlib
import os
import random
import shutil
import signal
import time

import pytest
from engines import Etcd, start_s3
from helpers import STALLS, kill_descendants, wait_for
from nemesis import Nemesis
from nodes import LEASE, Nodes, wait_until

import roexec

pytestmark = pytest.mark.engine
LONG = bool(os.environ.get("ROEXEC_LONG"))


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    """Three nodes that all tests of this file share."""
    roexec.become_subreaper()
    folder = tmp_path_factory.mktemp("nodes")
    with contextlib.ExitStack() as opened:
        opened.callback(kill_descendants)
        etcd = opened.enter_context(Etcd(str(folder / "etcd"), 3))
        (folder / "s3").mkdir()
        s3 = start_s3(str(folder / "s3"))
        opened.callback(s3.close)
        nodes = Nodes(folder, etcd, s3)
        opened.callback(nodes.close)
        yield nodes.start()


@pytest.fixture
def nodes(rig, request):
    """The nodes as in the beginning, without jobs."""
    rig.heal()
    yield rig
    print(rig.said())
    rig.heal()
    status, answer = rig.ask_leader("POST", "/apply?source=tests&prune=1", {"jobs": []})
    assert status == 200, answer


def ticking(nodes, job_id, more="", **options):
    """A job that is due each second, once it has run."""
    nodes.apply({"id": job_id, "schedule": "@every 1s", "max_concurrent": 0,
                 "command": nodes.witness_line(more), **options})
    return wait_for(lambda: nodes.seen(job_id), 60, nodes.said)[0].slot


def await_same_history(nodes, seconds=60):
    """The history of all nodes, once it is the same."""
    def look():
        first, *others = [node.history() for node in nodes.all]
        return first if all(other == first for other in others) else None
    return wait_for(look, seconds, lambda: nodes.said() + difference(nodes))


def difference(nodes):
    """What nodes say differently of runs."""
    known = {node.name: node.history() for node in nodes.all}
    lines = []
    for run_id in sorted(set().union(*known.values())):
        found = {name: history.get(run_id) for name, history in known.items()}
        first, *others = found.values()
        if any(other != first for other in others):
            lines += [run_id, *(f"    {name} {row}" for name, row in found.items())]
    return "\n".join(lines)


def settled(nodes, first, seconds=60):
    """{job: {slot: row}} of jobs that are due each second, from the `first` slots {job: slot} to
    now: each of them has a row, none was started twice, and what has started has told of it."""
    last = int(time.time()) - 1

    def decided(job_id):
        return any((row["last_slot"] or row["slot"] or 0) > last
                   for row in nodes.leader().runs_of(job_id))
    wait_for(lambda: all(map(decided, first)), seconds, nodes.said)
    status, answer = nodes.ask_leader("POST", "/apply?source=tests&prune=1", {"jobs": []})
    assert status == 200, answer
    wait_for(lambda: not unfinished(nodes), seconds,
             lambda: f"{nodes.said()}\n{difference(nodes)}\n{unfinished(nodes)}")
    await_same_history(nodes, seconds)
    found = [(slot, text) for job_id in first
             for slot, text in disagreements(nodes, job_id, first[job_id], last)]
    assert not found, "\n".join(
        [*(text for _, text in found), *(about(nodes, slot) for slot, _ in found[:3])])
    return {job_id: {slot: row for slot, row in slots_of(nodes, job_id) if slot <= last}
            for job_id in first}


def unfinished(nodes):
    return [f"{node.name}: {row}" for node in nodes.all for row in node.runs()
            if row["state"] not in roexec.FINAL_STATES]


def slots_of(nodes, job_id):
    """(slot, row) of each slot that a row is about."""
    for row in nodes.all[0].runs_of(job_id):
        if row["slot"] is not None:
            for slot in range(row["slot"], (row["last_slot"] or row["slot"]) + 1):
                yield slot, row


def disagreements(nodes, job_id, first, last):
    """(slot, what is wrong) where rows do not explain what the witness has seen."""
    rows, lines = nodes.all[0].runs_of(job_id), nodes.seen(job_id)
    slots = {}
    for slot, row in slots_of(nodes, job_id):
        slots.setdefault(slot, []).append(row)
    for slot, about_it in slots.items():
        if len(about_it) > 1 and {row["state"] for row in about_it} != {"skipped"}:
            yield slot, f"{job_id}: slot {slot} has several rows: {briefly(*about_it)}"
    for slot in range(first, last + 1):
        if slot not in slots:
            yield slot, f"{job_id}: slot {slot} has no row"
    started = collections.defaultdict(list)
    for line in lines:
        started[line.run].append(line)
        if line.slot is not None and line.run not in [row["id"] for row in slots.get(line.slot, ())]:
            yield line.slot, f"{job_id}: another run was started: {line}, rows {briefly(*slots.get(line.slot, ()))}"
    known = {row["id"]: row for row in rows}
    for run_id, its in started.items():
        row = known.get(run_id)
        numbers = [line.attempt for line in its]
        if len(numbers) > len(set(numbers)):
            yield its[0].slot or int(its[0].at), f"{job_id}: started twice: {its}, row {briefly(row)}"
        if row is None or row["state"] == "skipped" or row["node"] not in [
                line.node for line in its]:
            yield its[0].slot or int(its[0].at), f"{job_id}: {its}, but the row {briefly(row)}"
    for run_id, row in known.items():       # those before are of other tests, and other commands
        if run_id not in started and row["state"] in ("succeeded", "failed") \
                and row["queued_at"] >= first:
            yield row["slot"] or int(row["queued_at"]), f"{job_id}: never started: {briefly(row)}"


def briefly(*rows):
    return [row and {name: value for name, value in row.items() if value is not None and name not in (
        "seq", "job_id", "version", "priority", "boot")} for row in rows]


def about(nodes, slot):
    """What servers have logged around an instant."""
    times = {time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(slot + more)) for more in range(-4, 9)}
    return "\n".join([f"around {roexec.format_instant(slot)}, {slot}", *(
        f"{node.name} {line}" for node in nodes.all for line in node.said().splitlines()
        if line.partition(" ")[0] in times)])


def log_of(node, run_id):
    """What a node gives as the log of a run, once those that it has to ask know it."""
    def look():
        status, answer = node.ask("GET", f"/runs/{run_id}/logs")
        assert status in (200, 503), answer
        return (answer,) if status == 200 else None
    return wait_for(look, 60, node.said)[0].decode()


def test_a_leader_that_is_killed_is_followed_within_its_lease(nodes):
    first = ticking(nodes, "killed", catch_up="all")
    leader = nodes.leader()
    leader.kill()
    killed = time.time()
    line = wait_for(lambda: next((line for line in nodes.seen("killed") if line.at > killed
                                  and line.node != leader.name), None), 30, nodes.said)
    assert line.at < killed + LEASE + 2 + STALLS, nodes.said()
    leader.start()
    slots = settled(nodes, {"killed": first})["killed"]
    assert {row["state"] for row in slots.values()} <= {"succeeded", "lost"}


def test_a_leader_that_is_paused_for_longer_than_its_lease_starts_no_slot_again(nodes):
    first = ticking(nodes, "paused", catch_up="all")
    leader = nodes.leader()
    leader.signal(signal.SIGSTOP)
    paused = time.time()
    others = [node for node in nodes.all if node is not leader]
    wait_for(lambda: any(node.leads() for node in others), 60, nodes.said)
    wait_for(lambda: sum(line.at > paused and line.node != leader.name
                         for line in nodes.seen("paused")) > LEASE, 60, nodes.said)
    leader.signal(signal.SIGCONT)
    wait_for(lambda: leader.cluster()["role"] == "follower", 60, nodes.said)
    settled(nodes, {"paused": first})


def test_a_leader_that_is_asked_to_end_hands_over_at_once(nodes):
    first = ticking(nodes, "ended", catch_up="all")
    leader = nodes.leader()
    leader.stop()
    assert leader.name not in nodes.members(), "nobody waits for the end of its lease"
    stopped = time.time()
    line = wait_for(lambda: next((line for line in nodes.seen("ended") if line.at > stopped
                                  and line.node != leader.name), None), 30, nodes.said)
    assert line.at < stopped + 2 + STALLS, nodes.said()
    leader.start()
    slots = settled(nodes, {"ended": first})["ended"]
    assert {row["state"] for row in slots.values()} == {"succeeded"}


def test_a_leader_steps_down_when_it_is_asked_to_wherever_that_is(nodes):
    first = ticking(nodes, "stepped")
    leader = nodes.leader()
    follower, _ = nodes.followers(leader)
    status, _ = follower.ask("POST", "/cluster/step-down", {})
    assert status == 202
    wait_for(lambda: follower.cluster()["leader"] not in (None, leader.name), 2 + STALLS,
             nodes.said)
    wait_for(lambda: leader.cluster()["role"] == "follower", 60, nodes.said)
    settled(nodes, {"stepped": first})
    wait_for(lambda: len(follower.cluster()["nodes"]) == 3, 60, nodes.said)


def test_without_most_of_etcd_runs_go_on_and_slots_wait_and_health_says_so(nodes):
    first = ticking(nodes, "waiting", catch_up="all")
    nodes.apply({"id": "long", "schedule": "@every 1h", "command": "sleep 5; echo over"})
    status, run = nodes.ask_leader("POST", "/jobs/long/run", {})
    assert status == 202
    for member in nodes.etcd.members[:2]:
        member.kill()
    killed = time.time()
    for node in nodes.all:
        wait_for(lambda: "etcd does not answer" in str(node.ask("GET", "/health")[1]), 60,
                 nodes.said)
        assert node.ask("GET", "/health")[0] == 503
    dark = time.time()
    assert dark < killed + LEASE + 3 + STALLS
    row = wait_for(lambda: next((row for node in nodes.all for row in node.runs_of("long")
                                 if row["state"] == "succeeded"), None), 60, nodes.said)
    assert row["id"] == run["id"]
    wait_until(dark + 4)
    assert not [line for line in nodes.seen("waiting") if line.slot > dark]
    for member in nodes.etcd.members[:2]:
        member.start()
    for node in nodes.all:
        wait_for(lambda: node.ask("GET", "/health")[0] == 200, 60, nodes.said)
    slots = settled(nodes, {"waiting": first})["waiting"]
    assert {row["state"] for row in slots.values()} == {"succeeded"}
    assert len([slot for slot in slots if slot > dark]) >= 3    # those of the outage, too


def test_without_the_bucket_runs_go_on_and_all_of_it_is_there_afterwards(nodes):
    first = ticking(nodes, "bucketless")
    for node in nodes.all:
        nodes.s3_link(node).cut()
    leader, cut = nodes.leader(), time.time()
    waiting = leader.cluster()["store"]["waiting"]
    wait_for(lambda: sum(line.at > cut for line in nodes.seen("bucketless")) > 5, 60, nodes.said)
    lines = [line for line in nodes.seen("bucketless") if line.at > cut]
    assert max(line.at - line.slot for line in lines) < 5 + STALLS, lines   # a try of S3: 30 s
    assert leader.cluster()["store"]["waiting"] > waiting
    wait_for(lambda: leader.ask("GET", "/health")[0] == 200, 60, nodes.said)
    for node in nodes.all:
        nodes.s3_link(node).heal()
    slots = settled(nodes, {"bucketless": first})["bucketless"]
    assert {row["state"] for row in slots.values()} == {"succeeded"}
    for node in nodes.all:
        wait_for(lambda: node.cluster()["store"]["waiting"] == 0, 60, nodes.said)


def test_a_node_with_an_empty_disk_shows_jobs_history_and_logs_within_seconds(nodes):
    ticking(nodes, "shown", "echo said by $ROEXEC_RUN_ID")
    leader = nodes.leader()
    other, _ = nodes.followers(leader)
    run = wait_for(lambda: next((row for row in other.runs_of("shown")
                                 if row["state"] == "succeeded"), None), 60, nodes.said)
    other.kill()
    shutil.rmtree(other.store.folder)
    other.start()
    started = time.time()
    wait_for(lambda: run["id"] in {each["id"] for each in (other.get("/runs?job=shown&limit=100")
                                                          or {"runs": ()})["runs"]}, 60, nodes.said)
    wait_for(lambda: "shown" in other.jobs(), 60, nodes.said)
    text = f"said by {run['id']}"
    assert text in log_of(other, run["id"])
    assert time.time() < started + 8 + STALLS
    leader.kill()                       # now from the bucket
    wait_for(lambda: leader.name not in [each["node"] for each in other.cluster()["nodes"]], 60,
             nodes.said)
    assert text in log_of(other, run["id"])


def test_what_a_node_was_running_when_it_went_away_is_lost_until_it_tells_better(nodes):
    gate = f"{nodes.folder}/gate"
    waits = f"while [ ! -e {gate} ]; do sleep 0.05; done"
    nodes.apply({"id": "once", "schedule": "@every 1h", "command": waits},
                {"id": "again", "schedule": "@every 1h", "command": waits, "if_lost": "rerun"},
                {"id": "due", "schedule": "@every 1s", "command": waits})
    leader = nodes.leader()
    follower, _ = nodes.followers(leader)
    ids = {job_id: leader.ask("POST", f"/jobs/{job_id}/run", {})[1]["id"]
           for job_id in ("once", "again")}
    ids["due"] = wait_for(lambda: next((row["id"] for row in leader.runs_of("due")
                                        if row["state"] == "running"), None), 60, nodes.said)

    def state_of(node, run_id):
        row = node.history().get(run_id)
        return row and (row["state"], row["reason"])
    for run_id in ids.values():
        wait_for(lambda: state_of(follower, run_id) == ("running", None), 60, nodes.said)
    leader.kill()
    for run_id in ids.values():
        wait_for(lambda: state_of(follower, run_id) == ("lost", "node"), 60, nodes.said)
    repeated = wait_for(lambda: next((row for row in follower.runs_of("again")
                                      if row["retry_of"]), None), 60, nodes.said)
    assert repeated["retry_of"] == ids["again"]
    assert not any(row["retry_of"] for row in follower.runs_of("once"))
    with open(gate, "w", encoding="utf-8"):
        pass
    leader.start()
    for run_id in (*ids.values(), repeated["id"]):
        for node in nodes.all:
            wait_for(lambda: state_of(node, run_id) == ("succeeded", None), 60,
                     lambda: nodes.said() + difference(nodes))
    await_same_history(nodes)


def test_a_run_that_a_follower_is_asked_for_runs_on_the_leader(nodes):
    nodes.apply({"id": "asked", "schedule": "@every 1h", "command": nodes.witness_line("echo hi")})
    leader = nodes.leader()
    follower, _ = nodes.followers(leader)
    status, run = follower.ask("POST", "/jobs/asked/run", {})
    assert status == 202
    wait_for(lambda: nodes.seen("asked"), 60, nodes.said)
    assert [(line.run, line.node) for line in nodes.seen("asked")] == [(run["id"], leader.name)]
    row = wait_for(lambda: next((row for row in follower.runs_of("asked")
                                 if row["state"] == "succeeded"), None), 60, nodes.said)
    assert row["node"] == leader.name
    assert "hi" in log_of(follower, run["id"])


# Faults by chance.

FAILS_AT_TIMES = 'test $ROEXEC_ATTEMPT -gt 1 || case $ROEXEC_SLOT in *[13579]Z) exit 1;; esac'
JOBS = {
    "plain": {},
    "queue": {"overlap": "queue"},
    "retried": {"retries": 2, "backoff": "1s", "max_concurrent": 0, "more": FAILS_AT_TIMES},
    "long": {"max_concurrent": 0, "more": "sleep 2"},
    "caught-up": {"catch_up": "all", "max_concurrent": 0},
    "again": {"if_lost": "rerun", "max_concurrent": 0, "more": "sleep 0.5"}}


def test_whatever_fails_no_slot_is_started_twice_and_each_has_a_row(nodes):
    seed = int(os.environ.get("ROEXEC_SEED") or random.SystemRandom().randrange(10**6))
    print(f"ROEXEC_SEED={seed}")
    nodes.apply(*({"id": job_id, "schedule": "@every 1s",
                   "command": nodes.witness_line(options.get("more", "")),
                   **{name: value for name, value in options.items() if name != "more"}}
                  for job_id, options in JOBS.items()))
    wait_for(lambda: all(nodes.seen(job_id) for job_id in JOBS), 60, nodes.said)
    first = {job_id: min(line.slot for line in nodes.seen(job_id)) for job_id in JOBS}
    nemesis = Nemesis(nodes, seed)
    try:
        nemesis.torment(60 * float(os.environ.get("SOAK_MINUTES", 10)) if LONG else 40)
        nemesis.heal()
        slots = settled(nodes, first, 180)
    finally:
        print("\n".join(nemesis.told))
    states = collections.Counter((row["state"], row["reason"]) for its in slots.values()
                                 for row in its.values())
    print(sum(states.values()), "slots:", dict(states), "fail-over:",
          [round(seconds, 1) for seconds in nemesis.failovers])
    assert {job_id for job_id in JOBS if any(row["state"] == "succeeded" for row in slots[
        job_id].values())} == set(JOBS)
