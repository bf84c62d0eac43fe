"""Faults by chance, for Nodes: what is done to whom, when and for how long follows from a seed."""
import contextlib
import heapq
import http.client
import itertools
import os
import random
import shutil
import time

from helpers import STALLS, wait_for
from nodes import LEASE


DISKS = bool(os.environ.get("ROEXEC_DISKS"))   # lose them, too: more than is promised
_NO_ANSWER = OSError, ValueError, KeyError, TypeError, http.client.HTTPException


class Nemesis:
    """Has one fault after the other, which overlap. `told` are lines about what was done."""

    def __init__(self, nodes, seed):
        self.nodes, self.chance, self.told = nodes, random.Random(seed), []
        self.ends, self.numbers = [], itertools.count()     # of faults: (when, number, function)
        self.failovers, self.away = [], set()

    def torment(self, seconds):
        """Do so for some seconds, and heal nothing that is still on."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._wait(self.chance.uniform(0.2, 3))
            fault = self.chance.choice(self._FAULTS + self._OF_DISKS * DISKS)
            target = self.chance.choice(("leader", "leader", 0, 1, 2))
            length = self.chance.uniform(*(fault[1:] or (1, LEASE + 3)))
            dice = self.chance.random()
            fault[0](self, self._node(target), length, dice)

    def heal(self):
        """End all faults."""
        self.ends.sort()
        while self.ends:
            self.ends.pop(0)[2]()
        self.nodes.heal()

    def _wait(self, seconds):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            while self.ends and self.ends[0][0] <= time.monotonic():
                heapq.heappop(self.ends)[2]()
            time.sleep(0.02)

    def _tell(self, text):
        self.told.append(f"{time.strftime('%H:%M:%S', time.gmtime())} {text}")

    def _until(self, seconds, text, end):
        """Have a fault end after some seconds."""
        self._tell(f"{text} for {seconds:.1f}s")

        def over():
            self._tell(f"over: {text}")
            end()
        heapq.heappush(self.ends, (time.monotonic() + seconds, next(self.numbers), over))

    def _node(self, target):
        """The node that is meant: one by its number, or the one that leads, as far as known."""
        leader = None
        for node in self.nodes.running if target == "leader" else ():
            with contextlib.suppress(*_NO_ANSWER):
                if node.name not in self.away:
                    leader = node.ask("GET", "/cluster", timeout=0.5)[1]["leader"] or leader
        if leader is None:
            return self.nodes.all[target if target != "leader" else 0]
        return next(node for node in self.nodes.all if node.name == leader)

    # Faults of nodes; one has only one of them at a time.

    def _takes(self, node):
        if node.name in self.away or node.process is None:
            return False
        self.away.add(node.name)
        return True

    def _stop(self, node, seconds, dice):
        if self._takes(node):
            whole = dice < 0.5
            node.freeze() if whole else node.signal(19)
            self._until(seconds, f"{node.name} {'is frozen' if whole else 'is stopped'}",
                        lambda: self._thaw(node))

    def _thaw(self, node):
        node.thaw()
        self.away.discard(node.name)

    def _kill(self, node, seconds, dice):
        if not self._takes(node):
            return
        (node.crash if dice < 0.4 else node.kill)()
        self._until(seconds, f"{node.name} is {'wholly ' if dice < 0.4 else ''}killed",
                    lambda: self._start(node))

    def _kill_the_leader(self, _, seconds, dice):
        """Kill it while all else works, and see how long it takes until another one does."""
        self.heal()
        wait_for(self.nodes.is_healthy, 120, self.nodes.said)
        leader = self.nodes.leader()
        self._kill(leader, seconds, dice)
        self._measure(leader)

    def _lose_disk(self, node, seconds, dice):
        if self._takes(node):
            node.crash()
            shutil.rmtree(node.store.folder)
            self._until(seconds, f"{node.name} has lost its disk", lambda: self._start(node))

    def _end(self, node, seconds, dice):
        if self._takes(node):
            node.stop()
            self._until(seconds * dice, f"{node.name} has ended", lambda: self._start(node))

    def _start(self, node):
        node.start()
        self.away.discard(node.name)

    def _measure(self, node):
        """Until some slot is started or recorded by another node."""
        killed = time.time()
        limit = LEASE + 3 + STALLS
        while time.time() < killed + limit:
            if any(line.at > killed and line.node != node.name for line in self.nodes.lines()):
                self.failovers.append(time.time() - killed)
                return
            time.sleep(0.1)
        rows = [row for other in self.nodes.running for row in other.runs()
                if row["queued_at"] > killed]
        assert rows, f"no slot was started or recorded within {limit}s\n{self.nodes.said()}"
        self.failovers.append(min(row["queued_at"] for row in rows) - killed)

    # Of etcd and of links.

    def _kill_member(self, _, seconds, dice):
        member = self._member(dice)
        if member.is_running:
            member.kill()
            self._until(seconds, f"etcd {self.nodes.etcd.members.index(member)} is killed",
                        member.start)

    def _pause_member(self, _, seconds, dice):
        member = self._member(dice)
        if member.is_running:
            member.pause()
            self._until(seconds, f"etcd {self.nodes.etcd.members.index(member)} is stopped",
                        lambda: member.is_running and member.resume())

    def _member(self, dice):
        members = self.nodes.etcd.members
        return members[int(dice * len(members))]

    def _spoil(self, node, seconds, dice):
        links = self.nodes.links[node.name]
        chosen = {0: links[:-1], 1: links[-1:], 2: links}.get(
            int(dice * 5), [links[int(dice * 1000) % len(links)]])
        kind = int(dice * 100_000) % 5
        for link in chosen:
            [link.cut, link.hold, lambda: link.delay(0.1 + dice), link.drop_replies,
             lambda: link.drop_replies(reset=True)][kind]()
        self._until(seconds, f"{node.name}'s links {[links.index(link) for link in chosen]} are "
                    + ("cut", "held", "slow", "without replies", "reset by replies")[kind],
                    lambda: [link.heal() for link in chosen])

    def _step_down(self, node, seconds, dice):
        with contextlib.suppress(*_NO_ANSWER):
            if node.process is not None and node.name not in self.away:
                self._tell(f"{node.name} is to step down")
                node.ask("POST", "/cluster/step-down", {}, timeout=1)

    _FAULTS = ((_stop, 1, 2.5 * LEASE), (_stop, LEASE + 1, 2.5 * LEASE), (_kill, 0, 2 * LEASE),
               (_kill_the_leader, LEASE + 3.5, 2 * LEASE + 2), (_end,), (_kill_member,), (_pause_member,),
               (_spoil,), (_spoil,), (_spoil, 1, 3 * LEASE), (_step_down,))
    _OF_DISKS = ((_lose_disk,),)        # with what its last second has not put into the bucket
