"""The cursor of a job and its moves, one by one in tables; then all that can happen to them.

The checker at the end goes breadth-first through every state that a model of some nodes and an etcd
can reach, with each failure at each step. What the nodes do in it is done by the functions of
roexec.py themselves. Since every step of a node can wait for any time, a pause needs no step of its
own: a node that is paused is one that others overtake.
"""
import collections
import functools
import json
import math
import os

import pytest

import roexec
from roexec import CannotMove, Claim, Cursor, SlotRow, first_cursor, read_cursor

LONG = bool(os.environ.get("ROEXEC_LONG"))


def row(slot, reason=None, count=1):
    return SlotRow(slot=slot, last_slot=slot + count - 1, count=count, trigger="schedule",
                   reason=reason, queued_at=slot)


def claim(run, state="claimed", owner="a", boot="b1", slot=1, **more):
    return Claim(run=run, slot=slot, last_slot=slot, count=1, trigger="schedule", state=state,
                 owner=owner, boot=boot, queued_at=slot, **more)


def cursor(*claims, due=1):
    return Cursor(due=due, open=claims)


def told(cursor):
    """{run: "state owner"}, the short form of the open claims."""
    return {claim.run: f"{claim.state} {claim.owner}" for claim in cursor.open}


# Moves.

def test_a_claim_moves_due_and_opens_what_is_to_be_written_down():
    moved = cursor(due=0).claim([("r", row(60)), ("s", row(120, "missed", 3))], 130, "a", "b1")
    assert moved.due == 130
    assert told(moved) == {"r": "claimed a", "s": "skipped a"}
    assert moved.find("s").count == 3 and moved.find("s").reason == "missed"


@pytest.mark.parametrize("rows, due", [
    ([("r", row(60))], 60), ([("r", row(50))], 70), ([], 60), ([], 59)])
def test_what_is_decided_is_not_claimed_again(rows, due):
    with pytest.raises(CannotMove, match="decided already"):
        cursor(due=60).claim(rows, due, "a", "b1")


def test_a_position_moves_without_any_row():
    assert cursor(due=60).claim([], 61.5, "a", "b1") == cursor(due=61.5)


def test_slots_that_have_no_room_are_left_for_later():
    rows = [(f"r{slot}", row(slot)) for slot in range(1, 101)]
    moved = cursor(due=0).claim(rows, 200, "a", "b1")
    assert len(moved.open) == roexec.MOST_OPEN == moved.due
    with pytest.raises(CannotMove, match="wait to be shipped"):
        moved.claim(rows[64:], 200, "a", "b1")
    moved = moved.close({"r1", "r2"}).claim(rows[64:], 200, "a", "b1")
    assert moved.due == 66 and moved.open[-1].run == "r66"


@pytest.mark.parametrize("found, allowed", [
    (claim("r"), True), (claim("r", boot="b0"), True), (claim("r", owner="b"), False),
    (claim("r", "starting"), False), (claim("r", "skipped"), False), (claim("r", "lost"), False),
    (claim("s"), False)])
def test_only_the_owner_begins_and_only_what_is_claimed(found, allowed):
    if allowed:
        begun = cursor(found).begin("r", "a", "b1")
        assert told(begun) == {"r": "starting a"} and begun.find("r").boot == "b1"
    else:
        with pytest.raises(CannotMove, match="r is not, or no longer, to be begun by a"):
            cursor(found).begin("r", "a", "b1")


def test_closing_forgets_what_has_ended_and_never_moves_due():
    left = cursor(claim("r", "starting"), claim("s"), due=9).close({"r", "unknown"})
    assert told(left) == {"s": "claimed a"} and left.due == 9


@pytest.mark.parametrize("found, live, becomes", [
    (claim("r", owner="b"), "ab", "claimed a"),             # a live one has lost the lead
    (claim("r", owner="b"), "a", "claimed a"),
    (claim("r", "starting", "b"), "ab", "starting b"),
    (claim("r", "starting", "b"), "a", "lost a"),
    (claim("r", "skipped", "b"), "ab", "skipped b"),
    (claim("r", "skipped", "b"), "a", "skipped a"),
    (claim("r", "lost", "b"), "ab", "lost b"),
    (claim("r", "lost", "b"), "a", "lost a"),
    (claim("r", "starting", "a"), "", "starting a"),        # its own it knows better
    (claim("r", "claimed", "a", "b0"), "", "claimed a")])
def test_what_a_new_leader_takes_over(found, live, becomes):
    moved = cursor(found).take_over("a", "b1", live)
    assert told(moved) == {"r": becomes}
    kept = moved.find("r") == found
    assert kept == (becomes == f"{found.state} {found.owner}")
    assert kept or moved.find("r").boot == "b1"


def test_a_lost_run_says_which_node_went_away():
    lost = cursor(claim("r", "starting", "b")).take_over("a", "b1", "a").find("r")
    assert (lost.reason, lost.message) == ("node", "its node b went away")


def test_a_lost_run_is_repeated_once_where_its_job_allows_it():
    moved = cursor(claim("r", "starting", "b", slot=7)).take_over("a", "b1", "a", {"r": ("s", 9)})
    assert told(moved) == {"r": "lost a", "s": "claimed a"}
    again = moved.find("s")
    assert (again.rerun_of, again.slot, again.trigger) == ("r", 7, "retry")
    once_more = moved.close({"r"}).begin("s", "a", "b1").take_over("c", "b1", "c", {"s": ("t", 9)})
    assert told(once_more) == {"s": "lost c"}


# What a node has to write down, and may execute.

@pytest.mark.parametrize("found, state, written", [
    (claim("r"), None, "claimed"), (claim("r"), "queued", None), (claim("r"), "cancelled", None),
    (claim("r", boot="b0"), None, "claimed"), (claim("r", boot="b0"), "queued", None),
    (claim("r", "starting"), None, "lost"), (claim("r", "starting"), "queued", None),
    (claim("r", "starting"), "running", None), (claim("r", "starting"), "failed", None),
    (claim("r", "starting", boot="b0"), "queued", "lost"),
    (claim("r", "starting", boot="b0"), "running", None),
    (claim("r", "skipped"), None, "skipped"), (claim("r", "skipped"), "skipped", None),
    (claim("r", "lost"), None, "lost"), (claim("r", "lost"), "queued", "lost"),
    (claim("r", "lost"), "running", None), (claim("r", "lost"), "lost", None),
    (claim("r", owner="b"), None, None), (claim("r", "lost", "b"), None, None)])
def test_what_a_node_has_to_write_down(found, state, written):
    states = {} if state is None else {"r": state}
    assert [claim.state for claim in cursor(found).to_write("a", "b1", states)] == \
        [written] * (written is not None)


@pytest.mark.parametrize("found, may", [
    (claim("r", "starting"), True), (claim("r"), False), (claim("r", "starting", "b"), False),
    (claim("r", "starting", boot="b0"), False), (claim("r", "lost"), False),
    (claim("s", "starting"), False)])
def test_only_what_this_boot_of_the_owner_has_begun_may_be_executed(found, may):
    assert cursor(found).may_execute("r", "a", "b1") == may


def test_the_first_cursor_of_a_job_claims_what_is_queued_already():
    first = first_cursor(90.5, [("r", row(60))], "a", "b1")
    assert first.due == 90.5 and told(first) == {"r": "claimed a"}


# As text.

def test_a_cursor_comes_back_from_its_text():
    for found in (cursor(), cursor(due=7.25), cursor(claim("r"), claim(
            "s", "lost", reason="node", message="ü", rerun_of="q"))):
        assert read_cursor(found.to_text()) == found
        assert read_cursor(found.to_text().encode()) == found


def test_members_of_later_versions_are_passed_over():
    text = json.loads(cursor(claim("r")).to_text())
    text["later"] = text["open"][0]["later"] = 1
    assert read_cursor(json.dumps(text)) == cursor(claim("r"))


@pytest.mark.parametrize("text", [
    "", "x", "null", "[]", "{}", '{"due": 1}', '{"open": []}', '{"due": "1", "open": []}',
    '{"due": true, "open": []}', '{"due": NaN, "open": []}', '{"due": 1, "open": null}',
    '{"due": 1, "open": ["r"]}', '{"due": 1, "open": [{"run": "r"}]}', "[" * 100_000, b"\xff",
    *(json.dumps({"due": 1, "open": [{**json.loads(cursor(claim("r")).to_text())["open"][0],
                                      **wrong}]})
      for wrong in [{"state": "running"}, {"state": None}, {"run": 1}, {"slot": "1"},
                    {"owner": None}, {"reason": 1}, {"count": True}]),
    cursor(claim("r"), claim("r")).to_text()])
def test_what_is_no_cursor_is_refused(text):
    with pytest.raises(ValueError, match="is not the cursor of a job"):
        read_cursor(text)


# Everything that can happen. A state of the model:
#
#   cursor    the text in etcd, None before the first move
#   leader    the node whose leader key etcd has, or None
#   late      the text of a move that its sender gave up, and that may be done all the same, or None
#   nodes     Node for each
#   executed  for each slot, whether it was executed
#   told      for each slot, whether a final row of it is in the bucket
#   faults    how many more may happen, of any kind
#   spare     how many more times a host may crash, or a disk be lost

State = collections.namedtuple("State", "cursor leader late nodes executed told faults spare")

# up: the process runs; leased: etcd has its node key; leads: it believes so; known: the cursor as it
# knows it, which may be an old one; sent: the text of a move on its way; boot, rows {(run, slot,
# state)}: its disk.
#
# What makes no difference is left out. Who leads no longer can move nothing, and so need not be
# told from one that knows; of what it knows its own claims count. A move that another one has
# overtaken can only be refused; its sender learns no more from that than from reading again.
Node = collections.namedtuple("Node", "up leased leads known sent boot rows")

NOTHING = first_cursor(0, (), "", "").to_text()
FINAL = ("ended", "lost", "skipped")


class Violation(AssertionError):
    """Something happened that must not; the text is the shortest way to it."""


@functools.lru_cache(None)
def parsed(text):
    return read_cursor(text)


@functools.lru_cache(None)
def moved(text, move, *values):
    """The text after a move, None where it is not allowed or changes nothing."""
    try:
        after = getattr(parsed(text), move)(*values).to_text()
    except CannotMove:
        return None
    return None if after == text else after


@functools.lru_cache(None)
def own_part(text, name):
    """What a node that does not lead makes of a cursor."""
    found = parsed(text)
    return found.close({claim.run for claim in found.open if claim.owner != name}).changed(
        due=0).to_text()


@functools.lru_cache(None)
def to_write(text, name, boot, rows):
    return [(claim.run, claim.slot, "queued" if claim.state == "claimed" else claim.state)
            for claim in parsed(text).to_write(
                name, boot, {run: state for run, _, state in rows})]


def with_row(rows, run, slot, state=None):
    """The rows with another state of a run, without it for None."""
    return frozenset([each for each in rows if each[0] != run] + [(run, slot, state)] * bool(state))


class Model:
    """Some nodes that have some slots to run; `fates` says for each slot why it is skipped, or
    None. `by` is what protects a slot: the "cursor"; or a "lease" alone, or a "key" that goes when
    its run is in the bucket, which are here to see that the checker finds their faults."""

    def __init__(self, nodes, fates, by="cursor", faults=math.inf, spare=0):
        self.names, self.fates, self.by = "abc"[:nodes], fates, by
        node = Node(True, False, False, NOTHING, None, "0", frozenset())
        none = (False,) * len(fates)
        self.first = State(None, None, None, (node,) * nodes, none, none, faults, spare)

    # What etcd does.

    def apply(self, state, text):
        """The state after a move was done: none that was sent before can be any more."""
        if self.by == "key":
            return self.apply_to_key(state, text)
        return state._replace(cursor=text, late=None, nodes=tuple(
            node._replace(sent=None) if node.sent else node for node in state.nodes))

    def apply_to_key(self, state, text):
        """A claim only asks that there is no key, and is overtaken by nothing else."""
        if _is_claim(text) and state.cursor is not None:
            return state
        return state._replace(
            cursor=text if parsed(text).open else None,
            late=state.late and (_is_claim(state.late) or None) and state.late,
            nodes=tuple(node._replace(sent=node.sent if node.sent and _is_claim(node.sent) else None)
                        for node in state.nodes))

    def without_leader(self, state):
        if self.by != "cursor":         # nothing compares the term, and a leader does not notice
            return state._replace(leader=None)
        node = state.nodes[state.leader]
        return put(state._replace(leader=None, late=None), state.leader, leads=False, sent=None,
                   known=own_part(node.known, self.names[state.leader]))

    # All steps from a state: (what happens, who does it, the state then). Who is the number of a
    # node, ~number for what others may see of it, None for failures.

    def steps(self, state):
        if state.late:
            yield "a late move is done", None, self.apply(state._replace(late=None), state.late)
        for number, node in enumerate(state.nodes):
            name = self.names[number]
            for what, who, after in self.of_node(state, number, node, name):
                yield f"{name} {what}", who, after

    def of_node(self, state, number, node, name):
        yield from self.failures(state, number, node)
        yield from self.of_disk(state, number, node)
        if not node.up:
            yield "restarts", number, put(state, number, up=True)
            return
        if not node.leased:
            yield "registers", number, put(state, number, leased=True)
        elif state.leader is None:
            yield "is elected", number, put(state._replace(leader=number), number, leads=True)
        if node.sent is not None:
            after = self.apply(state, node.sent)
            yield "has its move done", number, put(after, number, known=node.sent, sent=None)
            if state.faults:
                yield "has its move done, but hears nothing", None, put(
                    fault(after), number, sent=None)
        else:
            yield from self.of_cursor(state, number, node, name)
        yield from self.of_rows(state, number, node, name)

    def of_cursor(self, state, number, node, name):
        seen = state.cursor or NOTHING
        if not node.leads:
            seen = own_part(seen, name)
        if node.known != seen:
            yield "reads the cursor", number, put(state, number, known=seen)
        if node.leads and node.known == seen:
            for what, text in self.moves(state, node, name):
                if text is not None:
                    yield what, number, put(state, number, sent=text)

    def failures(self, state, number, node):
        if state.leader == number and not node.leads:       # that of an earlier process
            yield "loses its old leader key", number, self.without_leader(state)
        if node.leased and (state.faults or not node.up):
            after = state if not node.up else fault(state)
            gone = self.without_leader(after) if state.leader == number else after
            yield "loses its lease", ~number, put(gone, number, leased=False)
        if not state.faults:
            return
        after = fault(state)
        if node.sent and not state.late:
            yield "gives its move up", None, put(after._replace(late=node.sent), number, sent=None)
        if node.up:
            down = put(after._replace(late=node.sent or state.late), number, up=False, leads=False,
                       known=NOTHING, sent=None)
            yield "is killed", None, down
        if node.up and state.spare:
            down = put(down._replace(spare=state.spare - 1), number, boot=node.boot + "'")
            yield "loses its disk", None, put(down, number, rows=frozenset())
            rows = node.rows
            for run, slot, kept in rows:
                if kept == "running":       # it will find it so
                    rows = with_row(rows, run, slot, "lost")
            yield "crashes with its host", None, put(down, number, rows=rows)

    def moves(self, state, node, name):
        """The moves that a leader can ask for, by what it knows."""
        if self.by == "lease":
            return
        text, known = node.known, parsed(node.known)
        slot = 1 + (known.due if self.by == "cursor" or known.open else sum(state.told))
        if slot <= len(self.fates):
            rows = (f"{slot}{name}", row(slot, self.fates[slot - 1])),
            yield f"claims slot {slot}", moved(text, "claim", rows, slot, name, node.boot)
        for run, _, kept in node.rows:
            if kept == "queued":
                yield f"begins {run}", moved(text, "begin", run, name, node.boot)
        live = "".join(self.names[other] for other, each in enumerate(state.nodes) if each.leased)
        yield "takes over", moved(text, "take_over", name, node.boot, live)
        ended = frozenset(claim.run for claim in known.open if state.told[claim.slot - 1])
        yield "closes what has ended", moved(text, "close", ended)

    def of_rows(self, state, number, node, name):
        """What a node does with its rows, by the cursor as it knows it."""
        if self.by == "lease":
            slot = 1 + sum(state.executed)
            if node.leads and slot <= len(self.fates) and not node.rows:
                yield f"queues slot {slot}", number, put(state, number, rows=with_row(
                    node.rows, f"{slot}{name}", slot, "queued"))
        for run, slot, kept in to_write(node.known, name, node.boot, node.rows):
            yield f"writes {run} down as {kept}", number, put(
                state, number, rows=with_row(node.rows, run, slot, kept))
        for run, slot, kept in node.rows:
            if kept != "queued":
                continue
            if self.by == "lease" and node.leads \
                    or parsed(node.known).may_execute(run, name, node.boot):
                yield f"marks {run} as running", number, put(
                    state, number, rows=with_row(node.rows, run, slot, "running"))
            elif state.told[slot - 1]:      # of what is queued only, others may know better
                yield f"reads of {run} in the bucket", number, put(
                    state, number, rows=with_row(node.rows, run, slot))

    def of_disk(self, state, number, node):
        """What goes on without the server: the supervisor executes; and what is shipped."""
        for run, slot, kept in node.rows:
            if kept == "running":
                if state.executed[slot - 1]:
                    raise Violation(f"slot {slot} is executed twice: the second time as {run}")
                yield f"executes {run}", number, put(
                    state._replace(executed=true_at(state.executed, slot - 1)), number,
                    rows=with_row(node.rows, run, slot, "ended"))
            elif kept in FINAL and node.up and not state.told[slot - 1]:
                yield f"ships {run}", number, state._replace(told=true_at(state.told, slot - 1))

    def is_good(self, state, number):
        """Whether each slot was executed, or has a row for all to see, or one of this node; and
        this one waits for nothing any more."""
        rows = state.nodes[number].rows
        explained = {slot for _, slot, kept in rows if kept in FINAL}
        return all(kept != "queued" for _, _, kept in rows) and all(executed or told or slot in explained for slot, (executed, told) in enumerate(
            zip(state.executed, state.told), 1))


def _is_claim(text):
    return [claim.state for claim in parsed(text).open] == ["claimed"]


def put(state, number, **values):
    nodes = list(state.nodes)
    nodes[number] = nodes[number]._replace(**values)
    return state._replace(nodes=tuple(nodes))


def fault(state):
    return state._replace(faults=state.faults - 1)


def true_at(flags, index):
    return flags[:index] + (True,) + flags[index + 1:]


def check(model):
    """Go through all states -> their number. Raises Violation with the shortest trace."""
    number_of, came = {model.first: 0}, [(None, None)]
    queue, back = collections.deque([model.first]), [[]]
    while queue:
        state = queue.popleft()
        here = number_of[state]
        try:
            for what, who, after in model.steps(state):
                there = number_of.get(after)
                if there is None:
                    there = number_of[after] = len(came)
                    came.append((here, what))
                    back.append([])
                    queue.append(after)
                if who is not None:
                    back[there].append((here, who))
        except Violation as found:
            raise Violation(f"{found}\n{trace(came, here)}") from None
    alone = [{number, *(~other for other in range(len(model.names)) if other != number)}
             for number in range(len(model.names))]
    # A state that may lead to no other fault, of a lease either, needs those that are there.
    for who in alone if model.first.faults == math.inf else [set().union(*alone)]:
        stuck = without_way(model, who, list(number_of), back)
        if stuck is not None:
            raise Violation(f"a slot is lost, and {min(who & {0, 1, 2})} alone cannot mend it\n"
                            f"{trace(came, stuck)}")
    return len(came)


def without_way(model, who, states, back):
    """The first state from which the steps of some do not lead to the end; None if there is none.
    Of a node that is not among them others see at most that it loses its lease."""
    nodes = [number for number in who if number >= 0]
    found = [any(model.is_good(state, number) for number in nodes) for state in states]
    queue = [place for place, good in enumerate(found) if good]
    while queue:
        for before, by in back[queue.pop()]:
            if not found[before] and by in who:
                found[before] = True
                queue.append(before)
    return None if all(found) else found.index(False)


def trace(came, place):
    steps = []
    while came[place][0] is not None:
        place, what = came[place]
        steps.append(what)
    return "\n".join(f"{number:>3}  {what}" for number, what in enumerate(reversed(steps), 1))


@pytest.mark.once
@pytest.mark.parametrize("nodes, fates, limits", [
    (2, (None,), {}),
    (2, ("missed",), {"spare": 1}),
    (2, (None,), {"faults": 2, "spare": 2}),
    (2, (None, None), {"faults": 1}),
    *[pytest.param(*case, marks=pytest.mark.skipif(not LONG, reason="takes minutes: ROEXEC_LONG=1"))
      for case in [
        (2, (None,), {"spare": 2}),
        (2, (None, "missed"), {"faults": 2, "spare": 1}),
        (2, (None, None), {"faults": 1, "spare": 1}),
        (2, (None, None), {"faults": 2}),
        (3, (None,), {"faults": 2, "spare": 1}),
        (3, (None,), {"faults": 3})]]])
def test_no_slot_is_executed_twice_and_none_is_lost_silently(nodes, fates, limits):
    assert check(Model(nodes, fates, **limits)) > 1000


def test_a_lease_alone_starts_a_slot_twice():
    with pytest.raises(Violation, match="slot 1 is executed twice"):
        check(Model(2, (None,), "lease"))


def test_a_key_for_each_slot_that_is_collected_starts_a_slot_twice():
    model = Model(2, (None,), "key", faults=0)
    one, other = model.first.nodes      # begun where the one leads, and the other thinks it does
    model.first = model.first._replace(leader=0, nodes=(
        one._replace(leased=True, leads=True), other._replace(leased=True, leads=True)))
    with pytest.raises(Violation, match="slot 1 is executed twice") as found:
        check(model)
    assert "closes what has ended" in str(found.value)


@pytest.mark.once
@pytest.mark.parametrize("method, broken", [
    ("may_execute", lambda cursor, run, me, boot: cursor.find(run) is not None),
    ("begin", lambda cursor, run, owner, boot: Cursor(due=cursor.due, open=tuple(
        claim.changed(state="starting", owner=owner) for claim in cursor.open))),
    ("to_write", lambda cursor, me, boot, states: iter(())),
    ("take_over", lambda cursor, me, boot, live, again=None: cursor)])
def test_a_fault_in_a_move_is_found(monkeypatch, method, broken):
    monkeypatch.setattr(Cursor, method, broken)
    for memory in (parsed, moved, own_part, to_write):
        memory.cache_clear()
    try:
        with pytest.raises(Violation):
            check(Model(2, (None,)))
    finally:
        monkeypatch.undo()
        for memory in (parsed, moved, own_part, to_write):
            memory.cache_clear()
