"""Nodes of a cluster for tests: real servers with their own stores, one etcd, one bucket."""
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time

from engines import free_ports
from helpers import wait_for

import roexec

LEASE = 3       # seconds, the shortest there is


class Node:
    """A server with a folder of its own. `etcd` are (host, port) of the endpoints it is told,
    `s3` is the server of its bucket and `endpoint` the URL at which it is to reach that."""

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
                "clustering": {"leader_election": f"etcd://{hosts}", "node": name,
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

    def stop(self):
        self.signal(signal.SIGTERM)
        self.process.wait(30)
        self.process = None

    def ask(self, method, path, body=None, timeout=10):
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

    def cluster(self):
        return self.get("/cluster") or {"role": None, "leader": None, "nodes": [], "term": None}

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


def leader_of(nodes, seconds=30):
    """The Node that leads."""
    return wait_for(lambda: next((node for node in nodes if node.process and node.leads()), None),
                    seconds, lambda: "\n".join(node.said() for node in nodes))


def wait_until(instant):
    while time.time() < instant:
        time.sleep(0.01)


def is_listening(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
