"""Real servers of others that tests start and end, each by its process id."""
import contextlib
import glob
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.parse
import urllib.request
import uuid

from helpers import engines, tool, wait_for

import roexec


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
        wait_for(lambda: all(_state(path) in ("T", None) for path in
                             glob.glob(f"/proc/{self.pid}/task/*/stat")))

    def resume(self):
        self.process.send_signal(signal.SIGCONT)


def _state(path):
    """The state of a thread, in its file of proc(5); None where it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError), \
            open(path, encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()[0]
    return None


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
                wait_for(self._answers, 120, self._said)
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


class Moto:
    """moto, which imitates S3 in memory and checks who asks. `gateway` is what answers."""
    region, bucket, can_return = "us-east-1", "tests", False    # it forgets all when it ends
    checks_clocks = False

    def __init__(self, folder, program):
        self.port, = free_ports(1)
        self.endpoint = f"http://127.0.0.1:{self.port}"
        free = "INITIAL_NO_AUTH_ACTION_COUNT=3"         # questions: those that make the user
        self.gateway = Engine(["env", free, program, "-H", "127.0.0.1", "-p", str(self.port)],
                              os.path.join(folder, "moto.log"))
        self.gateway.start()
        wait_for(lambda: is_open(self.port), 60, lambda: self.gateway.said)
        self._ask("CreateUser")
        said = self._ask("CreateAccessKey")
        self._ask("PutUserPolicy", PolicyName="p", PolicyDocument=json.dumps({
            "Version": "2012-10-17",
            "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}))
        self.access, self.secret = (re.search(f"<{name}>([^<]+)", said)[1]
                                    for name in ("AccessKeyId", "SecretAccessKey"))

    def _ask(self, action, **more):
        form = {"Action": action, "UserName": "u", "Version": "2010-05-08", **more}
        scope = "AWS4-HMAC-SHA256 Credential=x/20200101/us-east-1/iam/aws4_request"
        request = urllib.request.Request(
            self.endpoint + "/", urllib.parse.urlencode(form).encode(),
            {"Authorization": f"{scope}, SignedHeaders=host, Signature=0"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.read().decode()

    def close(self):
        self.gateway.kill()


class Ceph:
    """A Ceph that keeps its objects in memory, and `gateway`, its radosgw, which may end and come
    back."""
    region, bucket, can_return = "us-east-1", "tests", True
    checks_clocks = True
    access, secret = "ACCESSKEYOFTESTS", "secretkeyoftests"
    TOOLS = {"ceph-mon": "ceph-mon", "ceph-osd": "ceph-osd", "ceph-mgr": "ceph-mgr",
             "ceph": "ceph-common", "radosgw": "radosgw"}

    def __init__(self, folder):
        for name, package in self.TOOLS.items():
            tool(name, package)
        self.folder, self.engines = folder, []
        monitor, older, self.port = free_ports(3)
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.monitor = f"[v2:127.0.0.1:{monitor},v1:127.0.0.1:{older}]"
        for name in ("mon", "osd", "mgr", "rgw", "run", "log"):
            os.makedirs(os.path.join(folder, name))
        with open(self._path("ceph.conf"), "w", encoding="utf-8") as file:
            file.write(self._settings())
        try:
            self._start_monitor()
            self._start_disk()
            self._start_gateway()
        except BaseException:
            self.close()
            raise

    def _path(self, name):
        return os.path.join(self.folder, name)

    def _settings(self):
        self.id = uuid.uuid4()
        common = {
            "fsid": self.id, "mon host": self.monitor, "mon initial members": "a",
            "public addr": "127.0.0.1", "cluster addr": "127.0.0.1",
            "ms bind ipv6": "false", "osd pool default size": 1, "osd pool default min size": 1,
            "osd pool default pg num": 4, "osd pool default pgp num": 4,
            "osd crush chooseleaf type": 0, "mon allow pool size one": "true",
            "mon max pg per osd": 1000, "mon data avail warn": 1, "mon data avail crit": 1,
            "osd objectstore": "memstore", "memstore device bytes": 1 << 31,
            "mon data": self._path("mon"), "osd data": self._path("osd"),
            "mgr data": self._path("mgr"), "rgw data": self._path("rgw"),
            "run dir": self._path("run"), "admin socket": self._path("run/$name.asok"),
            "log file": self._path("log/$name.log"), "pid file": self._path("run/$name.pid"),
            "keyring": self._path("keyring"), "auth allow insecure global id reclaim": "false",
            "rgw frontends": f"beast endpoint=127.0.0.1:{self.port}"}
        return "[global]\n" + "".join(f"{name} = {text}\n" for name, text in common.items())

    def _run(self, *line):
        """What a tool of Ceph says, once it has done what it was asked for."""
        done = subprocess.run([line[0], "-c", self._path("ceph.conf"), *line[1:]], timeout=90,
                              stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              check=False)
        assert done.returncode == 0, f"{' '.join(line)}: {done.stderr}"
        return done.stdout.strip()

    def _start(self, name, *more):
        engine = Engine([name, "-c", self._path("ceph.conf"), *more, "-f"],
                        self._path(f"log/{name}.out"))
        engine.start()
        self.engines.append(engine)
        return engine

    def _start_monitor(self):
        keys, monmap = self._path("keyring"), self._path("monmap")
        may_all = "--cap", "osd", "allow *"
        for new, name, *caps in (
                ("--create-keyring", "mon.", "--cap", "mon", "allow *"),
                ("", "client.admin", "--cap", "mon", "allow *", *may_all, "--cap", "mgr",
                 "allow *"),
                ("", "osd.0", "--cap", "mon", "allow profile osd", *may_all),
                ("", "mgr.x", "--cap", "mon", "allow profile mgr", *may_all),
                ("", "client.rgw", "--cap", "mon", "allow rw", "--cap", "osd", "allow rwx")):
            self._run("ceph-authtool", *filter(None, [new]), keys, "--gen-key", "-n", name, *caps)
        self._run("monmaptool", "--create", "--fsid", str(self.id), "--addv", "a", self.monitor,
                  monmap)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keys)
        self._start("ceph-mon", "-i", "a")

    def _start_disk(self):
        number = self._run("ceph", "--connect-timeout", "60", "osd", "create")
        self._run("ceph-osd", "-i", number, "--mkfs")
        self._run("ceph", "osd", "crush", "add", f"osd.{number}", "1.0", "host=localhost",
                  "root=default")
        self._start("ceph-osd", "-i", number)
        self._start("ceph-mgr", "-i", "x")

    def _start_gateway(self):
        wait_for(lambda: " 1 up" in self._run("ceph", "osd", "stat"), 120, "no disk of Ceph came up")
        self._run("radosgw-admin", "user", "create", "--uid=test", "--display-name=test",
                  f"--access-key={self.access}", f"--secret-key={self.secret}")
        self.gateway = self._start("radosgw", "-n", "client.rgw")
        self._await_gateway()

    def _await_gateway(self):
        wait_for(lambda: is_open(self.port), 120, lambda: self.gateway.said)

    def start_gateway(self):
        """Have it back, with all objects."""
        self.gateway.start()
        self._await_gateway()

    def close(self):
        for engine in reversed(self.engines):
            engine.kill()


def start_s3(folder):
    """A server of S3: Ceph's gateway, as in CI; or moto, which is there at once, where
    ROEXEC_MOTO names its moto_server, or where there is no Ceph."""
    moto = os.environ.get("ROEXEC_MOTO") or (
        not shutil.which("radosgw") and not os.environ.get("CI") and shutil.which("moto_server"))
    server = Moto(folder, moto) if moto else Ceph(folder)
    keys = roexec.S3Keys(access=server.access, secret=server.secret)
    headers = {"host": f"127.0.0.1:{server.port}", "x-amz-content-sha256": "UNSIGNED-PAYLOAD",
               "x-amz-date": time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())}
    headers["authorization"] = roexec.sign_request(keys, server.region, "PUT", f"/{server.bucket}",
                                                   headers, "UNSIGNED-PAYLOAD")
    request = urllib.request.Request(f"{server.endpoint}/{server.bucket}", method="PUT",
                                     headers=headers)
    urllib.request.urlopen(request, timeout=60).close()
    return server


def is_open(port):
    """Whether somebody takes connections at a port of this host."""
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0
