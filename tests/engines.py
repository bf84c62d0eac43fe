"""Real servers of others that tests start and end, each by its process id."""
import http.client
import json
import os
import random
import signal
import socket
import subprocess

from helpers import engines, tool, wait_for


class Engine:
    """One process of a server, `line` as subprocess takes it; what it says is in the file `log`."""

    def __init__(self, line, log):
        self.line, self.log, self.process = line, log, None

    def start(self):
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.line, stdin=subprocess.DEVNULL, stdout=log,
                                            stderr=log, start_new_session=True)
        engines.add(self.process.pid)

    @property
    def pid(self):
        return self.process.pid

    @property
    def is_running(self):
        return self.process is not None and self.process.poll() is None

    @property
    def said(self):
        with open(self.log, encoding="utf-8", errors="replace") as log:
            return log.read()

    def stop(self, how=signal.SIGTERM):
        """End it, if it runs; one that is paused too."""
        if self.is_running:
            self.process.send_signal(how)
            self.process.send_signal(signal.SIGCONT)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.process is not None:
            engines.discard(self.pid)

    def kill(self):
        """kill -9."""
        self.stop(signal.SIGKILL)

    def pause(self):
        """It goes on living, and does nothing."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self):
        self.process.send_signal(signal.SIGCONT)


def free_ports(count):
    """Ports that nobody has, and that the kernel gives to nobody: for a server that cannot take
    port 0, and is to be started again with the same."""
    with open("/proc/sys/net/ipv4/ip_local_port_range", encoding="ascii") as file:
        first = int(file.read().split()[0])
    found = set()
    while len(found) < count:
        port = random.randrange(min(10_000, first // 2), first)
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.add(port)
    return sorted(found, key=lambda port: random.random())


class Etcd:
    """etcd with one member or three, which answers when this is made; `flags` go to each member.

    `tls` are flags for clients over TLS: {"cert-file": …, "key-file": …, "trusted-ca-file": …};
    then the requests of this class need `context`.
    """

    def __init__(self, folder, size=1, *flags, tls=None, context=None):
        self.program, self.tls, self.context = tool("etcd", package="etcd-server"), tls, context
        self.members = []
        for attempt in range(3):        # somebody may have taken a port meanwhile
            self._start(os.path.join(folder, f"etcd-{attempt}"), size, flags)
            try:
                wait_for(self._answers, 60, self._said)
                return
            except _Ended:
                self.close()
        raise AssertionError(self._said())

    def _start(self, folder, size, flags):
        os.makedirs(folder)
        ports = free_ports(2 * size)
        self.ports, peers = ports[:size], [f"http://127.0.0.1:{port}" for port in ports[size:]]
        cluster = ",".join(f"n{index}={peer}" for index, peer in enumerate(peers))
        secure = [f"--{name}={path}" for name, path in (self.tls or {}).items()]
        self.members = []
        for index, (port, peer) in enumerate(zip(self.ports, peers)):
            url = f"http{'s' if self.tls else ''}://127.0.0.1:{port}"
            self.members.append(Engine([
                self.program, "--name", f"n{index}", "--data-dir", f"{folder}/n{index}",
                "--listen-client-urls", url, "--advertise-client-urls", url,
                "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
                "--initial-cluster", cluster, "--logger", "zap", "--log-level", "error",
                *secure, *flags], f"{folder}/n{index}.log"))
            self.members[-1].start()

    def _answers(self):
        if not all(member.is_running for member in self.members):
            raise _Ended
        return all(self.is_healthy(index) for index in range(len(self.members)))

    def _said(self):
        return "etcd does not answer: " + "\n".join(member.said for member in self.members)

    @property
    def endpoints(self):
        """(host, port) of each member."""
        return [("127.0.0.1", port) for port in self.ports]

    @property
    def url(self):
        """The address of all members, as the configuration has it."""
        return (f"etcd{'s' if self.tls else ''}://"
                + ",".join(f"{host}:{port}" for host, port in self.endpoints))

    def ask(self, path, body=None, index=0, timeout=5):
        """(status, object) of an answer of one member; (0, {}) without one."""
        how = {"timeout": timeout, **({"context": self.context} if self.tls else {})}
        kind = http.client.HTTPSConnection if self.tls else http.client.HTTPConnection
        connection = kind("127.0.0.1", self.ports[index], **how)
        try:
            connection.request("GET" if body is None else "POST", path,
                               None if body is None else json.dumps(body))
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        except (OSError, ValueError, http.client.HTTPException):
            return 0, {}
        finally:
            connection.close()

    def is_healthy(self, index=0):
        """Whether a member has a leader, and can write."""
        return self.ask("/health", index=index) == (200, {"health": "true"})

    def leader(self):
        """The index of the member that leads, once there is one."""
        return wait_for(lambda: next(
            ([index] for index, member in enumerate(self.members) if member.is_running
             and self._leads(*self.ask("/v3/maintenance/status", {}, index, 2))), None))[0]

    @staticmethod
    def _leads(status, answer):
        return status == 200 and answer.get("leader") == answer["header"]["member_id"]

    def close(self):
        for member in self.members:
            member.kill()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class _Ended(Exception):
    """A member has ended by itself."""
