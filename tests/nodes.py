"""Nodes of a cluster for tests: real servers with their own stores, one etcd, one bucket."""
import base64
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timezone

from engines import free_ports
from helpers import descendants, wait_for
from links import Link

import roexec

LEASE = 3       # seconds, the shortest there is


class Node:
    """A server with a folder of its own. `etcd` are (host, port) of the endpoints it is told,
    `s3` is the server of its bucket and `endpoint` the URL at which it is to reach that. `prefix`
    is that of its objects, and of its keys in etcd."""

    def __init__(self, folder, name, etcd, s3, *, endpoint=None, prefix="", lease=LEASE, port=None):
        self.folder, self.name, self.process = str(folder), name, None
        os.makedirs(self.folder, exist_ok=True)
        self.port = port or free_ports(1)[0]
        hosts = ",".join(f"{host}:{port}" for host, port in etcd)
        self.config = os.path.join(self.folder, "config.yml")
        with open(self.config, "w", encoding="utf-8") as file:
            json.dump({
                "server": {"port": self.port},
                "store": {"type": "s3", "path": os.path.join(self.folder, "store"),
                          "bucket": s3.bucket, "prefix": prefix, "region": s3.region,
                          "endpoint": endpoint or s3.endpoint},
                "clustering": {"leader_election": f"etcd://{hosts}/{prefix}".rstrip("/"),
                               "node": name,
                               "lease": lease}}, file)
        self.environment = {
            **os.environ, "AWS_ACCESS_KEY_ID": s3.access, "AWS_SECRET_ACCESS_KEY": s3.secret,
            "ROEXEC_CONFIG": self.config, "XDG_STATE_HOME": self.folder}
        self.log = os.path.join(self.folder, "server.log")

    @property
    def store(self):
        return roexec.Store(os.path.join(self.folder, "store"))

    def start(self):
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, roexec.__file__, "server"], stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, env=self.environment, start_new_session=True)
        return self

    def signal(self, number):
        os.kill(self.process.pid, number)

    def kill(self):
        """End the server as a power cut of it alone would; its launcher ends then, too."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def crash(self):
        """End the server and all that it, or an earlier one, has started, as a power cut would."""
        def is_dead():
            pids = self._pids()
            for pid in pids:
                _send(pid, signal.SIGKILL)
            return not pids
        wait_for(is_dead)
        self.kill()

    def stop(self):
        self.signal(signal.SIGTERM)
        self.process.wait(60)
        self.process = None

    def freeze(self):
        """Let nothing of the host go on, as where a virtual machine is suspended."""
        for pid in self._pids():
            _send(pid, signal.SIGSTOP)

    def thaw(self):
        for pid in self._pids():
            _send(pid, signal.SIGCONT)

    def _pids(self):
        """All that runs on this node: its server, supervisors, also of earlier ones, and what they
        have started."""
        mark, everything = f"ROEXEC_CONFIG={self.config}\0".encode(), descendants()
        return set().union(*({pid, *descendants(pid)} for pid in everything
                             if mark in _environment(pid)))

    def ask(self, method, path, body=None, timeout=20):
        """(status, payload or bytes)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, f"/api/v1{path}", None if body is None else json.dumps(body))
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if answer.headers["Content-Type"] == "application/json":
            content = json.loads(content)
        return answer.status, content

    def get(self, path):
        """The payload at a path, None where the node does not answer."""
        try:
            status, payload = self.ask("GET", path)
        except (OSError, http.client.HTTPException):
            return None
        return payload if status == 200 else None

    def jobs(self):
        """The ids of the jobs that this node knows."""
        return {job["id"] for job in (self.get("/jobs") or {"jobs": ()})["jobs"]}

    def cluster(self):
        return self.get("/cluster") or {"role": None, "leader": None, "nodes": [], "term": None,
                                        "store": {"waiting": None}}

    def leads(self):
        return self.cluster()["role"] == "leader"

    def said(self):
        with open(self.log, encoding="utf-8") as file:
            return file.read()

    def roexec(self, *words, check=True):
        """What a command on this node prints."""
        done = subprocess.run([sys.executable, roexec.__file__, *words], env=self.environment,
                              capture_output=True, text=True, timeout=60, check=False)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def runs(self):
        """Rows of all runs that this node knows."""
        with self.store.read() as db:
            return [dict(row) for row in roexec.list_runs(db, limit=-1)]

    def history(self):
        """{id: all that this node knows of a run} as it should be the same everywhere."""
        with self.store.read() as db:
            ids = [row["id"] for row in roexec.list_runs(db, limit=-1)]
            return {run_id: {**roexec.run_object(db, run_id, self.name), "seq": None}
                    for run_id in ids}

    def runs_of(self, job_id):
        """The rows of a job, with the names of their nodes, in the order of their slots."""
        found = [{**row, "node": row["node"] or self.name} for row in self.runs()
                 if row["job_id"] == job_id]
        return sorted(found, key=lambda row: (row["slot"] or 0, row["queued_at"]))


def leader_of(nodes, seconds=60):
    """The Node that leads."""
    return wait_for(lambda: next((node for node in nodes if node.process and node.leads()), None),
                    seconds, lambda: "\n".join(node.said() for node in nodes))


def _environment(pid):
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read()
    except OSError:
        return b""


def _send(pid, number):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


class Nodes:
    """Three nodes, each with links of its own to each member of etcd and to the bucket.

    `witness` is a file for the lines of `witness_line`.
    """

    def __init__(self, folder, etcd, s3, prefix=""):
        self.folder, self.etcd, self.s3 = str(folder), etcd, s3
        self.links = {name: [Link(port) for port in (*etcd.ports, s3.port)] for name in "abc"}
        self.all = [Node(
            os.path.join(self.folder, name), name,
            [("127.0.0.1", link.port) for link in links[:-1]], s3, prefix=prefix,
            endpoint=f"http://127.0.0.1:{links[-1].port}") for name, links in self.links.items()]
        self.witness = os.path.join(self.folder, "witness")
        with open(self.witness, "w", encoding="utf-8"):
            pass

    def start(self):
        for node in self.all:
            node.start()
        return self

    @property
    def running(self):
        return [node for node in self.all if node.process is not None]

    def etcd_links(self, node):
        return self.links[node.name][:-1]

    def s3_link(self, node):
        return self.links[node.name][-1]

    def leader(self, seconds=60):
        return leader_of(self.running, seconds)

    def followers(self, leader):
        """The other nodes than this one."""
        return [node for node in self.all if node is not leader]

    def ask_leader(self, method, path, body=None):
        """(status, payload) of the answer of the node that leads, also where another one does just
        now: who does not lead refuses."""
        return wait_for(lambda: next((answer for answer in [self.leader().ask(method, path, body)]
                                      if answer[0] != 503), None), 60, self.said)

    def members(self):
        """The names of the nodes that are there, as etcd has it."""
        all_keys = base64.b64encode(b"\0").decode()
        status, answer = self.etcd.ask("/v3/kv/range", {
            "key": all_keys, "range_end": all_keys, "keys_only": True}, timeout=20)
        assert status == 200, answer
        keys = [base64.b64decode(entry["key"]).decode() for entry in answer["kvs"]]
        return {key.rpartition("/")[2] for key in keys if "/members/nodes/" in key}

    def heal(self):
        """All as in the beginning -> the leader."""
        for links in self.links.values():
            for link in links:
                link.heal()
        for member in self.etcd.members:
            if not member.is_running:
                member.start()
            member.resume()
        for node in self.all:
            if node.process is None:
                node.start()
            node.thaw()
        leader = self.leader()
        wait_for(lambda: all(len(node.cluster()["nodes"]) == 3 for node in self.all), 60,
                 self.said)
        return leader

    def apply(self, *jobs):
        """Register jobs, by whichever node leads; all nodes know them then."""
        status, answer = self.ask_leader("POST", "/apply?source=tests", {"jobs": list(jobs)})
        assert status == 200, answer
        ids = {job["id"] for job in jobs}
        for node in self.running:
            wait_for(lambda: ids <= node.jobs(), 60, self.said)

    def witness_line(self, more=""):
        """A command that leaves a line: its slot, run and log, which lies on its node, and now."""
        return (f'echo "$ROEXEC_JOB_ID ${{ROEXEC_SLOT:--}} $ROEXEC_RUN_ID $ROEXEC_ATTEMPT '
                f'$ROEXEC_LOG $(date +%s.%N)" >> {self.witness}; {more}')

    def seen(self, job_id):
        """[Line] of a job in the witness."""
        return [line for line in self.lines() if line.job == job_id]

    def lines(self):
        """[Line] of all jobs."""
        with open(self.witness, encoding="utf-8") as file:
            return list(map(_Line, file))

    def is_healthy(self):
        """Whether etcd can decide, and all nodes do their work."""
        return all(map(self.etcd.is_healthy, range(3))) and len(self.running) == 3 and all(
            node.get("/health") is not None for node in self.running)

    def said(self):
        return "\n".join(f"==== {node.name}\n{node.said()[-5000:]}" for node in self.all)

    def close(self):
        for node in self.all:
            node.thaw()
            node.kill()
        for links in self.links.values():
            for link in links:
                link.close()


class _Line:
    """A line in the witness: what a run has said of itself when it began."""

    def __init__(self, text):
        self.text = text.strip()
        self.job, slot, self.run, attempt, log, at = text.split()
        self.slot = None if slot == "-" else int(roexec.parse_instant(slot, timezone.utc))
        self.attempt, self.at = int(attempt), float(at)
        self.node = log.split("/store/")[0].rpartition("/")[2]

    def __repr__(self):
        return self.text


def wait_until(instant):
    while time.time() < instant:
        time.sleep(0.01)


def is_listening(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
