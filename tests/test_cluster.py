"""Nodes of a cluster against a real etcd, through wires that are cut, held and falsified.

Most tests take the steps of nodes by hand, so that one of them is paused between any two others;
those at the end have processes, which are stopped and killed.
"""
import contextlib
import json
import os
import re
import signal
import time
import types

import pytest
from engines import Etcd
from helpers import STALLS, in_child, read_runs, wait_for
from links import Link

import roexec
from roexec import EtcdClient, EtcdError, SlotRow, Store, read_cursor

pytestmark = pytest.mark.engine
LEASE = 600             # seconds: no lease ends but where a test ends it, or lets time pass
SHORT = 3               # of processes; etcd gives none that is shorter
LONG_AGO = 30           # seconds by which a clock is off, more than a stalled answer may hide


@pytest.fixture(scope="module")
def etcd(tmp_path_factory):
    with Etcd(str(tmp_path_factory.mktemp("etcd"))) as etcd:
        yield etcd


def settings_of(endpoints, prefix, lease=LEASE):
    address = types.SimpleNamespace(prefix=prefix, endpoints=endpoints, tls=False)
    return types.SimpleNamespace(leader_election=address, lease=lease, tls=None, user=None,
                                 password_file=None, advertise=None)


def direct(node):
    """A client whose way to etcd does not fail."""
    return contextlib.closing(EtcdClient([("127.0.0.1", node.links[0].target_port)], 20))


class Loop:
    """What a scheduler does with its `claims`, of one job, without executing anything."""

    def __init__(self, folder, name):
        self.name, self.claims, self.executed = name, None, []
        self.store = Store(str(folder / name)).create()
        self.store.name = name
        with self.store.write() as db:
            roexec.prepare_bucket(db, name)

    def ask(self, slot, reason=None):
        self.claims.ask("j", [SlotRow(slot=slot, last_slot=slot, count=1, trigger="schedule",
                                      reason=reason)], slot)

    def write_down(self):
        """What the loop does with what it was granted -> that."""
        granted = self.claims.granted()
        with self.store.write() as db:
            for job_id, rows, position in granted:
                for row in rows or ():
                    if row.reason is not None:
                        roexec.skip_slots(db, job_id, row, time.time())
                    elif not roexec.slot_is_known(db, job_id, row.slot):
                        roexec.add_run(db, id=row.run, job_id=job_id, slot=row.slot,
                                       trigger=row.trigger, state="queued", queued_at=time.time())
            for job_id, _, claims in self.claims.taken_over():
                for claim in claims:
                    roexec.write_claim(db, self.store, job_id, claim, time.time())
        return granted

    def start_runs(self):
        """Execute what may be executed -> the slots."""
        with self.store.read() as db:
            rows = roexec.own_runs(db, "queued")
        slots = []
        for row in [row for row in rows if self.claims.may_start(row)]:
            with self.store.write() as db:
                roexec.change_run(db, row["id"], "running", started_at=time.time(), boot="b")
            slots.append(row["slot"])
        self.executed += slots
        return slots

    def finish(self):
        """Let the runs that are on end well, and all be shipped."""
        with self.store.write() as db:
            for row in roexec.own_runs(db, "running"):
                roexec.finish_run(db, row["id"], "succeeded", [], finished_at=time.time())
        self.ship()

    def ship(self):
        with self.store.write() as db:
            db.execute("DELETE FROM changes")


class Node(Loop):
    """A node whose steps a test takes. `ahead` are seconds that have passed for it alone."""

    def __init__(self, folder, name, links, prefix):
        super().__init__(folder, name)
        self.links, self.ahead, self.said = links, 0, []
        self.client = EtcdClient([("127.0.0.1", link.port) for link in links], 20)
        self.start(prefix)

    def start(self, prefix=None):
        """As a new process."""
        self.prefix = prefix or self.prefix
        self.membership = roexec.Membership(
            self.client, settings_of(None, self.prefix), self.name,
            {"url": f"http://{self.name}", "key": roexec.new_run_id()},
            lambda *line: self.said.append(line[0]), lambda: roexec.boot_time() + self.ahead)
        self.claims = roexec.Claims(self.store, self.membership,
                                    lambda *line: self.said.append(line[0]))

    @contextlib.contextmanager
    def impatient(self, seconds=0.6):
        """It does not wait long for answers, which do not come, and gets an EtcdError."""
        way = self.client._way
        before, way._timeout = way._timeout, seconds
        with pytest.raises(EtcdError):
            yield
        way._timeout = before

    def restart(self):
        """Killed, and started again with the same disk, when its lease has ended."""
        self.end_lease()
        self.start()
        self.turn()

    def end_lease(self):
        """The lease ends, as it does while a node is paused."""
        self.client.revoke(self.membership.lease)

    def turn(self, may_stand=True):
        self.membership.turn(may_stand)
        self.claims.turn()

    def claim(self, slot):
        """Claim a slot -> the id of its run, which is queued then."""
        self.ask(slot)
        self.claims.turn()
        (_, rows, _), = self.write_down()
        return rows[0].run

    def run(self):
        """What a node does again and again, until there is nothing to do."""
        for _ in range(3):
            self.turn()
            self.write_down()
            self.start_runs()

    def states(self):
        return [(run["slot"], run["state"], run["reason"]) for run in read_runs(self.store)]

    def cursor(self):
        with direct(self) as client:
            entry = client.get(f"{self.prefix}/cursors/j")
        return entry and read_cursor(entry.value)

    def claims_there(self):
        return [(claim.slot, claim.state, claim.owner) for claim in self.cursor().open]


@pytest.fixture
def nodes(etcd, tmp_path, request):
    """`nodes(count)` -> that many Nodes, each with a wire of its own to etcd."""
    with contextlib.ExitStack() as stack:
        def make(count=2):
            made = []
            for name in "abc"[:count]:
                link = stack.enter_context(Link(etcd.ports[0]))
                made.append(Node(tmp_path, name, [link], request.node.name))
                stack.callback(made[-1].client.close)
            return made
        yield make


def leaders(nodes):
    return [node.name for node in nodes if node.membership.leads()]


# Who leads.

def test_one_node_leads_and_all_know_which(nodes):
    three = nodes(3)
    for _ in range(2):
        for node in three:
            node.turn()
    assert leaders(three) == ["a"]
    assert {node.membership.leader for node in three} == {"a"}
    assert sorted(three[2].membership.nodes) == ["a", "b", "c"]


def test_a_leader_that_ends_leaves_at_once(nodes):
    a, b = nodes()
    a.turn(), b.turn()
    a.membership.close()
    assert not a.membership.leads()
    b.turn()
    assert leaders([a, b]) == ["b"] and b.membership.leader == "b"


@pytest.mark.parametrize("call", ["keep_alive", "grant", "txn", "get_prefix"])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("turns", [0, 1])
def test_a_node_that_ends_in_the_middle_of_a_turn_leaves_nothing_behind(nodes, turns, call, after):
    a, b = nodes()
    for _ in range(turns):
        a.turn()
    function = getattr(a.client, call)

    def ending(*values):
        setattr(a.client, call, function)
        if not after:
            a.membership.close()
        found = function(*values)
        if after:
            a.membership.close()
        return found
    setattr(a.client, call, ending)
    with contextlib.suppress(EtcdError):
        a.membership.turn(True)
    a.membership.close()
    b.turn()
    assert leaders([a, b]) == ["b"] and list(b.membership.nodes) == ["b"]


def test_a_paused_leader_does_not_lead_by_its_own_clock_before_its_lease_can_end(nodes):
    a, b = nodes()
    a.turn(), b.turn()
    a.ahead = LEASE * 4 / 5
    assert leaders([a, b]) == []
    a.turn()
    assert leaders([a, b]) == ["a"]     # it was still there, and goes on in its term


def test_a_leader_that_is_asked_to_steps_down_and_rests_for_the_time_of_a_lease(nodes):
    a, b = nodes()
    a.turn(), b.turn()
    a.membership.resigns = True
    a.turn(), b.turn(), a.turn()
    assert leaders([a, b]) == ["b"]
    b.membership.close()
    a.turn()
    assert leaders([a]) == []
    a.ahead += LEASE
    a.turn()
    assert leaders([a]) == ["a"]


def test_a_leader_whose_wire_fails_while_it_steps_down_does_not_lead_on(nodes):
    a, = nodes(1)
    a.turn()
    a.membership.resigns = True
    txn, a.client.txn = a.client.txn, refuse
    with pytest.raises(EtcdError):
        a.turn()
    a.client.txn = txn
    a.turn()
    assert leaders([a]) == []


def refuse(*_):
    raise EtcdError("not now", away=True)


@pytest.mark.parametrize("seconds, word", [(-LONG_AGO, "ahead"), (LONG_AGO, "behind")])
def test_a_node_whose_clock_is_off_does_not_lead_and_says_so(nodes, seconds, word):
    a, = nodes(1)
    a.links[0].shift_date(seconds)
    a.turn(), a.turn()
    assert leaders([a]) == []
    assert word in a.membership.trouble() and "does not lead" in a.membership.trouble()
    assert len(a.said) == 1 and "does not lead" in a.said[0]
    a.links[0].heal()
    a.turn(), a.turn()
    assert leaders([a]) == ["a"] and a.membership.trouble() is None


def test_a_leader_whose_clock_is_set_wrong_leaves_off(nodes):
    a, b = nodes()
    a.turn(), b.turn()
    a.links[0].shift_date(-LONG_AGO)
    a.turn(), a.turn(), b.turn()
    assert leaders([a, b]) == ["b"]


def test_a_second_server_of_one_name_is_kept_away_and_says_so(nodes, tmp_path):
    a, = nodes(1)
    a.turn()
    (tmp_path / "other").mkdir()
    twin = Node(tmp_path / "other", "a", a.links, a.prefix)
    twin.turn()
    assert "another server is called a" in twin.membership.trouble()
    twin.turn()
    assert [text[:27] for text in twin.said] == ["another server is called a "]
    a.membership.close()
    assert not twin.membership.is_there()
    twin.turn()
    assert leaders([twin]) == ["a"] and twin.membership.trouble() is None
    twin.client.close()


def test_a_node_without_etcd_says_since_when_and_leads_again_when_it_is_back(nodes):
    a, = nodes(1)
    a.turn()
    a.links[0].cut()
    a.ahead = LEASE
    with pytest.raises(EtcdError):
        a.membership.turn(True)
    assert "etcd does not answer since" in a.membership.trouble() and leaders([a]) == []
    a.links[0].heal()
    a.ahead = 0
    a.turn()
    assert a.membership.trouble() is None and leaders([a]) == ["a"]


# Slots.

def test_a_slot_is_claimed_written_down_begun_and_executed_and_then_closed(nodes):
    a, = nodes(1)
    a.turn()
    a.claim(60)
    assert a.claims_there() == [(60, "claimed", "a")]
    assert a.start_runs() == []         # it asks first
    a.claims.turn()
    assert a.claims_there() == [(60, "starting", "a")]
    assert a.start_runs() == [60]
    a.finish()
    a.claim(120)
    assert a.claims_there() == [(120, "claimed", "a")] and a.cursor().due == 120


def test_what_is_not_in_the_bucket_keeps_its_claim_until_there_are_many(nodes):
    a, = nodes(1)
    a.turn()
    for slot in range(1, 40):
        a.membership.turn(True)
        a.ask(slot, "overlap" if slot % 2 else "paused")
        a.claims.turn()
        a.write_down()
        assert len(a.cursor().open) <= 33
    assert a.cursor().due == 39


def test_slots_that_grow_a_row_of_skipped_ones_need_no_claim_for_ever(nodes):
    a, = nodes(1)
    a.turn()
    for slot in range(1, 80):
        a.membership.turn(True)
        a.ask(slot, "overlap")
        a.claims.turn()
        assert [rows is not None for _, rows, _ in a.write_down()] == [True]
        a.ship()
    run, = read_runs(a.store)
    assert (run["slot"], run["last_slot"], run["count"]) == (1, 79, 79)
    assert len(a.cursor().open) == 1


def test_many_jobs_are_claimed_together(nodes):
    a, = nodes(1)
    a.turn()
    for number in range(150):
        a.claims.ask(f"j{number}", [SlotRow(slot=60, last_slot=60, count=1, trigger="schedule")], 60)
    moves, txn = [], a.client.txn
    a.client.txn = lambda *move: moves.append(move) or txn(*move)
    a.claims.turn()
    assert len(moves) < 150 / 10
    assert sum(len(rows) for _, rows, _ in a.claims.granted()) == 150


def test_what_is_no_cursor_is_told_and_left_alone(nodes):
    a, = nodes(1)
    a.turn()
    a.client.put(f"{a.prefix}/cursors/j", b"not a cursor")
    a.end_lease()
    a.turn()
    a.ask(60)
    a.claims.turn()
    assert a.client.get(f"{a.prefix}/cursors/j").value == b"not a cursor"
    assert "not a cursor" in "".join(a.said)


@pytest.mark.parametrize("fail", ["drop_replies", "cut"])
def test_a_claim_without_an_answer_counts_if_it_was_done(nodes, fail):
    a, b = nodes()
    a.turn()
    a.ask(60)
    getattr(a.links[0], fail)()
    with a.impatient():
        a.claims.turn()
    (_, rows, _), = a.claims.granted()
    assert rows is None                 # nobody knows: it is decided again
    a.links[0].heal()
    a.turn()
    a.ask(60)
    a.claims.turn(), a.claims.turn()
    a.write_down()
    a.run()
    assert a.executed == [60] and a.claims_there() == [(60, "starting", "a")]


def hold_move(node):
    """Let a node wait in vain for an answer to its next move -> what does it now."""
    sent, txn = [], node.client.txn

    def hold(*move):
        sent.append(move)
        node.client.txn = txn
        raise EtcdError("no answer", unknown=True)
    node.client.txn = hold
    return lambda: txn(*sent[0])[0]


def test_a_claim_that_arrives_after_the_next_one_is_not_done(nodes):
    a, = nodes(1)
    a.turn()
    arrive = hold_move(a)
    a.ask(60)
    a.claims.turn()
    assert [rows for _, rows, _ in a.write_down()] == [None] and a.cursor() is None
    a.claim(60)
    a.start_runs(), a.claims.turn()
    assert a.start_runs() == [60]
    before = a.cursor()
    assert not arrive() and a.cursor() == before


def test_a_claim_that_arrives_before_the_next_one_is_the_one(nodes):
    a, = nodes(1)
    a.turn()
    arrive = hold_move(a)
    a.ask(60)
    a.claims.turn()
    a.write_down()
    assert arrive()
    a.ask(60)
    a.claims.turn(), a.write_down(), a.run()
    assert a.executed == [60] and len(a.cursor().open) == 1


@pytest.mark.parametrize("taken_over", [True, False])
def test_a_begin_that_arrives_late_is_not_done_where_another_has_the_slot(nodes, taken_over):
    a, b = nodes()
    a.turn(), b.turn()
    a.claim(60)
    arrive = hold_move(a)
    a.start_runs(), a.claims.turn()
    if taken_over:
        paused(a, b)
        b.turn(), b.write_down()
    assert arrive() != taken_over
    a.run(), b.run()
    assert (a.executed, b.executed) == (([], [60]) if taken_over else ([60], []))


def test_a_begin_without_an_answer_counts_if_it_was_done(nodes):
    a, b = nodes()
    a.turn()
    a.claim(60)
    a.start_runs()
    a.links[0].drop_replies()
    with a.impatient(2):
        a.claims.turn()
    wait_for(lambda: a.claims_there() == [(60, "starting", "a")])
    assert a.start_runs() == []
    a.links[0].heal()
    a.run()
    assert a.executed == [60]


def test_a_node_that_no_longer_leads_still_starts_what_it_has_begun(nodes):
    a, b = nodes()
    a.turn(), b.turn()
    a.claim(60)
    a.start_runs()
    a.links[0].drop_replies()
    with a.impatient(2):
        a.claims.turn()
    wait_for(lambda: a.claims_there() == [(60, "starting", "a")])
    a.links[0].heal()
    a.membership.resigns = True
    a.membership.turn(True)
    b.run()
    assert leaders([a, b]) == ["b"] and b.claims_there() == [(60, "starting", "a")]
    a.run()
    assert (a.executed, b.executed) == ([60], [])


# A leader that is paused, and another one meanwhile: the slot of 60 is executed once, or is lost
# and says so.

def paused(a, b):
    """The leader is paused for longer than its lease; the other one leads."""
    a.end_lease()
    a.ahead += LEASE
    b.turn()
    assert b.membership.leads()


def test_paused_between_claim_and_begin(nodes):
    a, b = nodes()
    a.turn(), b.turn()
    a.claim(60)
    paused(a, b)
    b.run()
    assert b.executed == [60] and b.claims_there() == [(60, "starting", "b")]
    assert a.start_runs() == []         # it resumes here
    a.claims.turn()
    assert a.start_runs() == []
    a.run()
    assert a.executed == [] and b.claims_there() == [(60, "starting", "b")]


def test_paused_between_the_claim_and_its_reply(nodes):
    a, b = nodes()
    a.turn(), b.turn()
    a.ask(60)
    a.claims.turn()                     # granted, and not written down
    paused(a, b)
    b.run()
    a.write_down(), a.run()
    assert (a.executed, b.executed) == ([], [60])


def test_paused_before_its_claim_is_done_which_then_is_not(nodes):
    a, b = nodes()
    a.turn(), b.turn()
    a.links[0].hold()
    a.ask(60)
    with a.impatient():
        a.claims.turn()
    with direct(a) as client:
        client.revoke(a.membership.lease)
    b.turn()
    b.claim(60)
    a.links[0].heal()                   # what was sent arrives now
    b.run(), a.run()
    assert (a.executed, b.executed) == ([], [60]) and len(b.cursor().open) == 1


def test_paused_between_begin_and_execution(nodes):
    a, b = nodes()
    a.turn(), b.turn()
    a.claim(60)
    a.start_runs(), a.claims.turn()     # it may start now
    paused(a, b)
    b.run()
    assert b.claims_there() == [(60, "starting", "a")]      # it may have been executed
    assert a.start_runs() == []         # it resumes here, and was away too long
    b.ahead += 2 * LEASE                # nobody has seen it for the time of a lease
    b.run()
    assert b.claims_there() == [(60, "lost", "b")]
    assert b.states() == [(60, "lost", "node")]
    a.run()
    assert a.executed == b.executed == []


def test_back_soon_enough_a_node_executes_what_it_has_begun(nodes):
    a, b = nodes()
    a.turn(), b.turn()
    a.claim(60)
    a.start_runs(), a.claims.turn()
    paused(a, b)
    b.run()
    a.run()
    assert (a.executed, b.executed) == ([60], [])


def test_paused_after_execution(nodes):
    a, b = nodes()
    a.turn(), b.turn()
    a.claim(60)
    a.start_runs(), a.claims.turn()
    assert a.start_runs() == [60]
    paused(a, b)
    b.ahead += 2 * LEASE
    b.run()
    assert b.states() == [(60, "lost", "node")] and b.executed == []
    a.finish(), a.run()
    assert a.executed == [60] and a.states() == [(60, "succeeded", None)]


def test_taken_over_from_a_node_that_had_taken_over(nodes):
    a, b, c = nodes(3)
    a.turn(), b.turn(), c.turn()
    a.claim(60)
    paused(a, b)
    b.turn(), b.write_down()            # it owns the claim now, and is paused too
    assert b.claims_there() == [(60, "claimed", "b")]
    paused(b, c)
    c.run()
    assert c.executed == [60]
    b.start_runs(), b.run(), a.run()
    assert a.executed == b.executed == []


def test_of_two_that_think_that_they_lead_one_has_its_way(nodes):
    a, b = nodes()
    a.turn()
    a.end_lease()                       # and a does not know
    b.turn()
    assert leaders([a, b]) == ["a", "b"]
    a.ask(60), b.ask(60)
    a.claims.turn(), b.claims.turn()
    assert [rows for _, rows, _ in a.write_down()] == [None]
    b.write_down(), b.run(), a.run()
    assert (a.executed, b.executed) == ([], [60])


def test_a_leader_of_an_hour_ago_goes_on_behind_what_was_decided(nodes):
    a, b = nodes()
    a.turn(), b.turn()
    a.claim(60)
    paused(a, b)
    b.run(), b.finish()
    for slot in range(120, 3720, 600):
        b.membership.turn(True)
        b.claim(slot)
        b.run(), b.finish()
    assert b.executed == [60, *range(120, 3720, 600)]
    paused(b, a)
    a.write_down()
    a.ask(120)
    a.claims.turn()
    assert a.write_down() == [("j", [], b.cursor().due)]
    a.run()
    assert a.executed == []


def test_a_node_that_comes_back_without_its_disk_says_what_is_lost(nodes, tmp_path):
    a, b = nodes()
    a.turn(), b.turn()
    a.claim(60)
    a.start_runs(), a.claims.turn()
    a.end_lease()
    b.turn()
    (tmp_path / "new").mkdir()
    again = Node(tmp_path / "new", "a", a.links, a.prefix)
    again.run()
    assert leaders([again, b]) == ["b"]
    assert again.states() == [(60, "lost", "node")] and again.executed == []
    again.client.close()


def test_a_node_that_is_started_again_starts_what_it_had_begun(nodes):
    a, b = nodes()
    a.turn(), b.turn()
    a.claim(60)
    a.start_runs(), a.claims.turn()
    a.restart()
    b.run()
    a.run()
    assert a.executed == [60] and b.executed == []


def begin_with_repeats(*nodes):
    """Nodes know the job, whose lost runs may be repeated; the first of them leads."""
    for node in nodes:
        with node.store.write() as db:
            job = roexec.Job({"id": "j", "command": "true", "if_lost": "rerun"})
            roexec.perform_apply(db, roexec.plan_apply(db, {None: [job]}), time.time())
        node.turn()


def test_a_run_that_may_be_repeated_is_once_where_its_node_is_gone(nodes):
    a, b = nodes()
    begin_with_repeats(a, b)
    run = a.claim(60)
    a.start_runs(), a.claims.turn()
    paused(a, b)
    b.run()
    b.ahead += 2 * LEASE
    b.run()
    lost, again = read_runs(b.store)
    assert (lost["id"], lost["state"], lost["slot"]) == (run, "lost", 60)
    assert (again["retry_of"], again["slot"], again["state"]) == (run, None, "running")
    assert b.executed == [None]
    a.run()
    assert a.executed == []


def test_what_repeats_a_lost_run_and_was_taken_over_is_not_started_once_its_claim_is_closed(nodes):
    three = a, b, c = nodes(3)
    begin_with_repeats(*three)
    a.claim(60)
    a.start_runs(), a.claims.turn()
    paused(a, b)
    b.ahead += 2 * LEASE
    b.turn(), b.turn()
    b.write_down()                      # the run that repeats it is queued on b, and not begun
    c.ahead += 2 * LEASE
    paused(b, c)
    c.run()
    assert c.executed == [None] and b.executed == []
    c.finish()
    c.claim(120)
    assert c.claims_there() == [(120, "claimed", "c")]
    b.run()
    assert b.executed == []


@pytest.mark.parametrize("call", ["txn", "get_prefix"])
def test_a_fault_in_the_middle_of_taking_over_is_made_good(nodes, call):
    a, b = nodes()
    a.turn(), b.turn()
    a.claim(60)
    a.end_lease()
    b.membership.turn(True)
    before = getattr(b.client, call)
    setattr(b.client, call, refuse)
    with pytest.raises(EtcdError):
        b.claims.turn()
    assert b.claims.term != b.membership.term or call == "txn"
    setattr(b.client, call, before)
    b.claims.turn()
    b.write_down(), b.run()
    assert b.executed == [60]


def test_a_run_that_ended_well_is_not_repeated_since_its_node_ends_later(nodes):
    a, b = nodes()
    begin_with_repeats(a, b)
    run = a.claim(60)
    a.start_runs(), a.claims.turn(), a.start_runs()
    a.finish()
    with b.store.write() as db:         # as it comes from the bucket
        roexec.begin_import(db)
        roexec.add_run(db, id=run, job_id="j", slot=60, trigger="schedule", state="succeeded",
                       node="a", queued_at=time.time(), finished_at=time.time())
        roexec.end_import(db)
    paused(a, b)
    b.ahead += 2 * LEASE
    b.run()
    assert b.executed == [] and b.states() == [(60, "succeeded", None)]


# Paused where it has just seen that it may.

def then(node, name, act):
    """Once, between the end of a method of its membership and what follows, something is done."""
    before = getattr(node.membership, name)

    def once():
        delattr(node.membership, name)
        value = before()
        act()
        return value
    setattr(node.membership, name, once)


def elapse(node):
    node.ahead += 2 * LEASE


def test_a_leader_that_was_paused_gives_up_nobody_before_it_has_looked_again(nodes):
    a, b = nodes()
    b.turn(), a.turn()
    b.claim(60)
    b.start_runs(), b.claims.turn()
    b.membership.resigns = True
    b.membership.turn(True)
    a.turn()
    assert leaders([a, b]) == ["a"]
    then(a, "is_there", lambda: elapse(a))      # etcd may be slower to end its lease
    a.claims.turn()
    assert a.claims_there() == [(60, "starting", "b")]
    assert b.start_runs() == [60]


def test_a_leader_that_was_paused_loses_no_run_of_a_node_that_is_there(nodes):
    a, b = nodes()
    a.turn(), b.turn(), a.turn()
    cluster = roexec.Cluster(a.store, NoBucket("a"), settings_of([], "none"), print)
    cluster.membership = a.membership
    with a.store.write() as db:
        roexec.add_run(db, id="r", job_id="j", trigger="manual", state="running", node="b",
                       queued_at=time.time())
        elapse(a)
        cluster.lose_runs(db, time.time())
    assert a.states() == [(None, "running", None)]
    b.end_lease()
    a.membership.turn(True)
    a.ahead += LEASE
    a.membership.turn(True)
    with a.store.write() as db:
        cluster.lose_runs(db, time.time())
    assert a.states() == [(None, "lost", "node")]


def test_a_node_that_was_away_meanwhile_does_not_execute_what_it_had_begun(nodes):
    a, b = nodes()
    a.turn(), b.turn()
    a.claim(60)
    a.start_runs(), a.claims.turn()

    def away():
        paused(a, b)
        elapse(b)
        b.turn()
        a.membership.turn(True)
    then(a, "is_there", away)
    assert a.start_runs() == [] and b.claims_there() == [(60, "lost", "b")]


def test_what_is_begun_under_a_lease_that_ends_just_then_is_not_executed(nodes):
    a, b = nodes()
    a.turn(), b.turn()
    a.claim(60)
    a.start_runs(), a.claims.turn()
    a.membership.until = 0
    assert a.start_runs() == []
    a.membership.turn(True)

    def renew():
        a.end_lease()
        a.membership.lease, a.membership.is_known = a.client.grant(LEASE), False
    then(a, "is_there", renew)
    a.claims.turn()
    b.turn(), elapse(b), b.turn(), b.turn()
    assert b.claims_there() == [(60, "lost", "b")]
    a.membership.turn(True)
    assert a.membership.is_there() and a.start_runs() == []


# Processes.

class NoBucket:
    """A Mirror that has nothing to write or read."""
    client = types.SimpleNamespace(bucket="b", prefix="p/")
    is_hydrated = True

    def __init__(self, node):
        self.node = node

    def hydrate(self):
        pass

    def ship(self, limit):
        return []

    def waiting(self):
        return 0, 0


def test_a_node_that_may_have_a_lease_and_nothing_else_says_so(nodes):
    a, = nodes(1)
    a.membership.client.get_prefix = refuse
    for _ in range(2):
        with pytest.raises(EtcdError):
            a.membership.turn(True)
    assert a.membership.until > a.membership.clock()
    assert "etcd does not answer since" in a.membership.trouble()
    del a.membership.client.get_prefix
    a.turn()
    assert a.membership.trouble() is None


def test_what_etcd_says_is_told_and_when_it_is_over(etcd, tmp_path):
    link, told = Link(etcd.ports[0]), []
    cluster = roexec.Cluster(Store(str(tmp_path / "a")).create(), NoBucket("a"), settings_of(
        [("127.0.0.1", link.port)], "told"), lambda *line: told.append(line))
    turn = lambda: cluster._try("etcd", lambda: cluster.membership.turn(True))  # noqa: E731
    try:
        link.cut()
        turn(), turn()
        assert re.fullmatch(r"etcd does not answer since \S+; no slot is decided, and runs that are "
                            rf"on go on: etcd at 127.0.0.1:{link.port} is not there, .+",
                            cluster.trouble())
        link.heal()
        turn(), turn()
        assert cluster.trouble() is None
        assert [line[0][:7] for line in told] == ["etcd at", "The tro"]
        assert told[1] == ("The trouble with etcd is over",)
    finally:
        cluster.close()
        link.close()


def serve(folder, name, endpoints, prefix, lease):
    """A node that decides a slot each half second, and writes down who has executed which; what it
    thinks of itself is in its file `state`."""
    node = Loop(folder, name)
    cluster = roexec.Cluster(node.store, NoBucket(name), settings_of(endpoints, prefix, lease),
                             lambda *line: None)
    node.claims = cluster.claims
    ends, asked = [], False
    signal.signal(signal.SIGTERM, lambda *_: ends.append(True))
    cluster.start(f"http://{name}")
    witness = os.open(folder / "witness", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    while not ends:
        slot = int(time.time() * 2)
        if cluster.leads() and not asked:
            node.ask(slot)
            asked = True
        if node.write_down():
            asked = False
        for slot in node.start_runs():
            os.write(witness, f"{slot} {name}\n".encode())
            node.finish()
        (folder / f"{name}.new").write_text(json.dumps(cluster.status()))
        os.replace(folder / f"{name}.new", folder / f"{name}.state")
        time.sleep(0.02)
    cluster.close()


class Nodes:
    """Processes of nodes, each behind wires of its own."""

    def __init__(self, folder, etcd, prefix, count, lease):
        self.folder = folder
        self.links = {name: [Link(port) for port in etcd.ports] for name in "abc"[:count]}
        self.pids = {name: in_child(lambda name=name: serve(
            folder, name, [("127.0.0.1", link.port) for link in self.links[name]], prefix, lease))
            for name in self.links}

    def state(self, name):
        try:
            return json.loads((self.folder / f"{name}.state").read_text())
        except FileNotFoundError:
            return {"role": None, "nodes": []}

    def leader(self, *names, seconds=60):
        """The one of these nodes that leads, once one does."""
        return wait_for(lambda: next((name for name in names or self.links
                                      if self.state(name)["role"] == "leader"), None), seconds)

    def witnessed(self):
        """[(slot, node)] of what was executed."""
        lines = (self.folder / "witness").read_text().splitlines()
        return [(int(line.split()[0]), line.split()[1]) for line in lines]

    def await_runs_of(self, name, seconds=60):
        known = len(self.witnessed()) if (self.folder / "witness").exists() else 0
        wait_for(lambda: [1 for _, node in self.witnessed()[known:] if node == name], seconds)

    def signal(self, name, number):
        os.kill(self.pids[name], number)

    def close(self):
        for link in [link for links in self.links.values() for link in links]:
            link.close()


@pytest.fixture
def processes(tmp_path, request, clean):
    with contextlib.ExitStack() as stack:
        def make(etcd, count=2, lease=SHORT):
            made = Nodes(tmp_path, etcd, request.node.name, count, lease)
            stack.callback(made.close)
            return made
        yield make


def assert_no_slot_twice(nodes):
    slots = [slot for slot, _ in nodes.witnessed()]
    assert len(slots) == len(set(slots)), slots


def fail(nodes, name, how):
    if how == "kill":
        nodes.signal(name, signal.SIGKILL)
    elif how == "pause":
        nodes.signal(name, signal.SIGSTOP)
    else:
        for link in nodes.links[name]:
            getattr(link, how)()


@pytest.mark.parametrize("how", ["kill", "pause", "cut", "hold"])
def test_another_node_leads_within_a_lease_and_two_seconds(etcd, processes, how):
    nodes = processes(etcd)
    first = nodes.leader()
    nodes.await_runs_of(first)
    other, = set(nodes.links) - {first}
    begun = time.monotonic()
    fail(nodes, first, how)
    assert nodes.leader(other) == other
    assert time.monotonic() - begun < SHORT + 2 + STALLS
    nodes.await_runs_of(other)
    if how == "pause":
        nodes.signal(first, signal.SIGCONT)
    elif how != "kill":
        for link in nodes.links[first]:
            link.heal()
    if how != "kill":
        wait_for(lambda: [nodes.state(first)[name] for name in ("leader", "role")] == [
            other, "follower"])
    nodes.await_runs_of(other)
    assert_no_slot_twice(nodes)


def test_a_leader_that_is_ended_is_followed_at_once(etcd, processes):
    nodes = processes(etcd, lease=60)
    first = nodes.leader()
    other, = set(nodes.links) - {first}
    wait_for(lambda: len(nodes.state(other)["nodes"]) == 2)
    begun = time.monotonic()
    nodes.signal(first, signal.SIGTERM)
    assert nodes.leader(other) == other
    assert time.monotonic() - begun < 1.5 + STALLS      # much less than a lease
    nodes.await_runs_of(other)
    assert_no_slot_twice(nodes)


def test_without_a_quorum_nothing_new_starts_and_all_goes_on_when_it_is_back(
        tmp_path, processes):
    (tmp_path / "engine").mkdir()
    with Etcd(str(tmp_path / "engine"), 3) as etcd:
        nodes = processes(etcd)
        nodes.await_runs_of(nodes.leader())
        for index in (0, 1):
            etcd.members[index].pause()
        wait_for(lambda: all("does not answer" in (nodes.state(name)["trouble"] or "")
                             and nodes.state(name)["role"] == "follower" for name in nodes.links))
        assert not nodes.state("a")["etcd"]["answers"] and nodes.state("a")["etcd"]["since"]
        assert {node["role"] for node in nodes.state("a")["nodes"]} == {"follower"}
        known = nodes.witnessed()
        for index in (0, 1):
            etcd.members[index].resume()
        nodes.await_runs_of(nodes.leader())
        assert nodes.witnessed()[:len(known)] == known
        assert_no_slot_twice(nodes)
        wait_for(lambda: nodes.state(nodes.leader())["trouble"] is None)
