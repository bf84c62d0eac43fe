"""What tests share: stores, runs, servers, others that a run speaks to, and waiting."""
import base64
import http.server
import json
import os
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import traceback
import urllib.parse

import pytest

import roexec


STALLS = 8      # seconds for which processes of a test may stand still where a host has much to do


def wait_for(condition, seconds=60, what="it did not happen in time"):
    """The first true value of `condition()`.

    The time is what a hang takes to be told, not what a machine with much to do may take.
    """
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, what() if callable(what) else what
        time.sleep(0.004)


def make_job(command="true", job_id="x", **more):
    return roexec.Job({"id": job_id, "command": command, "directory": "/", **more})


def hourly_schedule():
    """An hourly schedule and its last slot, which was half an hour ago: it is late, and none comes
    due while a test is on."""
    slot = (int(time.time()) // 60 - 30) * 60
    return time.strftime("%M * * * *", time.localtime(slot)), slot


def apply(store, *jobs, since=None):
    """Register jobs, as if that had been at the instant `since`."""
    with store.write() as db:
        roexec.perform_apply(db, roexec.plan_apply(db, {None: jobs}), since or time.time())
    store.wake()


def read_runs(store, **columns):
    """The rows of all runs that have these values, as dicts, oldest first."""
    with store.read() as db:
        rows = [dict(row) for row in db.execute("SELECT * FROM runs ORDER BY seq")]
    return [row for row in rows if all(row[name] == value for name, value in columns.items())]


def read_run(store, run_id):
    return read_runs(store, id=run_id)[0]


def read_attempts(store, run_id):
    with store.read() as db:
        return [dict(row) for row in roexec.get_attempts(db, run_id)]


def read_log_of(store, run_id, **how):
    data = b"".join(lines.data for lines in roexec.follow(
        store.file(read_run(store, run_id)["log"])))
    return roexec.select_lines(data, **how).decode(errors="replace")


def claimed(store, job, slot=None, **columns):
    """The journal of a new run of a job that has its place."""
    with store.write() as db:
        roexec.add_run(db, **{"id": roexec.new_run_id(), "job_id": job.id, "trigger": "manual",
                              "state": "queued", "queued_at": time.time(), "slot": slot,
                              **columns})
        journal, = roexec.claim(db, store.file("active"), lambda row: job, None,
                                lambda row: True)
    return journal


def supervise(store, journal):
    """Carry a run to its end in this process -> its row in the store."""
    signals = roexec.Signals()
    try:
        roexec.Supervision(journal, store.folder, signals).perform()
    finally:
        signals.close()
        journal.close()
    roexec.settle(store)
    return read_run(store, journal.run_id)


def perform(store, command="true", **more):
    """Run a job with this command -> the row of the run."""
    return supervise(store, claimed(store, make_job(command, **more)))


def output_of(store, run, **how):
    return read_log_of(store, run["id"], raw=True, **how)


def await_state(store, run_id, *states, seconds=60):
    """The row of a run once it is in one of these states."""
    return wait_for(lambda: next((row for row in read_runs(store, id=run_id)
                                  if row["state"] in states), None), seconds,
                    lambda: f"{run_id} is {read_run(store, run_id)}")


def in_child(function):
    """Perform a function in a forked process -> its pid; what it raises is told on stderr."""
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            status = function() or 0
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)
    return pid


def end_of(pid):
    """The exit code of a child once it has ended, as subprocess counts it."""
    status, = wait_for(lambda: _reaped(pid), what=f"{pid} did not end")
    return os.waitstatus_to_exitcode(status)


def _reaped(pid):
    found, status = os.waitpid(pid, os.WNOHANG)
    return (status,) if found else None


engines = set()         # {pid} of others' servers, which several tests may share; tests/engines.py


def descendants(of=None):
    """{pid} of all that descend from a process, which must be a subreaper; neither zombies nor
    engines."""
    table, found = roexec.processes(), {of or os.getpid()}
    grew = True
    while grew:
        more = {pid for pid, process in table.items()
                if process.parent in found} - found - engines
        found |= more
        grew = bool(more)
    return {pid for pid in found - {of or os.getpid()} if table[pid].alive}


def kill_descendants():
    """End all processes that a test has started, and reap them."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = descendants()
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        if engines and not found:       # only they are left
            return
        time.sleep(0.002)


class Pid(int):
    """The id of a process that is on, which tells it from a later one with the same number: there
    are few numbers, and many processes where several suites are run."""

    def __init__(self, _):
        self.start = roexec.process_start(self)


def is_alive(pid):
    start = roexec.process_start(pid)
    return start is not None and start == getattr(pid, "start", start)


def read_pid(path):
    """The process id in a file, once it is there."""
    return Pid(wait_for(lambda: path.exists() and path.read_text().strip(), what=f"no {path}"))


class Server:
    """A server of a store, in a process of its own; `said` is what it has logged.

    `prepare(scheduler)` is called before it runs; with `wait` it is running when this returns.
    """

    def __init__(self, store, log, settings=None, prepare=None, wait=True):
        self.log = log
        log.write_text("")
        self.descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)      # as standard error is open
        self.pid = in_child(lambda: self._serve(store, settings, prepare))
        os.close(self.descriptor)
        if wait:
            wait_for(lambda: "ready" in self.said or not is_alive(self.pid))
            assert is_alive(self.pid), self.said

    def _serve(self, store, settings, prepare):
        try:
            launcher = roexec.start_launcher()
            store = roexec.Store(store.path)
            lock = roexec.hold_server_lock(store)
            store.create().keep_open()
            if settings is not None:
                with store.write() as db:
                    roexec.set_settings(db, settings)
            scheduler = roexec.Scheduler(store, launcher, self._say)
            scheduler.each_second.append(lambda: self._say("ready"))
            scheduler.each_second.append(scheduler.each_second.clear)
            if prepare is not None:
                prepare(scheduler)
            scheduler.run()
            store.close()
            os.close(lock)
        except BaseException:
            self._say("crashed " + traceback.format_exc())
            raise

    def _say(self, text, level="INFO", at=None):
        os.write(self.descriptor, f"[{level}] {text}\n".encode())

    @property
    def said(self):
        return self.log.read_text()

    def kill(self):
        """kill -9."""
        os.kill(self.pid, signal.SIGKILL)
        end_of(self.pid)

    def stop(self):
        """SIGTERM, as `systemctl stop` does."""
        os.kill(self.pid, signal.SIGTERM)
        assert end_of(self.pid) == 0, self.said


def process(store, *arguments, **options):
    """roexec in a process of its own, finished -> CompletedProcess with text."""
    return subprocess.run([sys.executable, roexec.__file__, "--store", store.path, *arguments],
                          stdin=subprocess.DEVNULL, text=True, timeout=60,
                          **{"capture_output": True, **options})


# Servers of the HTTP API.

def serve(store, said=None, host="127.0.0.1", **settings):
    """A server of a store on a free port, with these settings of the configuration."""
    say = print if said is None else lambda text, level="INFO": said.append(text)
    config = roexec.read_config(json.dumps({"server": settings}), "config.yml", "/")
    return roexec.start_http(store, host, 0, say, roexec.Access(config.server, say))


def token(store, name="ci", **spec):
    """The text of a new token."""
    maker = roexec.Caller(name="user me", scopes=("*",), owner=True)
    now = time.time()
    with store.write() as db:
        return roexec.add_token(db, roexec.token_of({"name": name, **spec}, maker, now, None), maker,
                                now)


def basic(name, text):
    return "Basic " + base64.b64encode(f"{name}:{text}".encode()).decode()


def status_of(server, method, path, **headers):
    """The status of the answer to a request over a connection of its own."""
    lines = [f"{method} {path} HTTP/1.1", *(f"{name.replace('_', '-')}: {text}" for name, text in {
        "Host": "localhost", "Content-Length": "0", **headers}.items())]
    with socket.create_connection(server.address, timeout=60) as client:
        client.sendall("\r\n".join([*lines, "", ""]).encode())
        return int(client.makefile("rb").readline().split()[1])


# Servers on this host.

class Web(http.server.ThreadingHTTPServer):
    """Keeps the requests that it gets; answers what `answer(handler)` does, else 200.

    With a `context` it speaks TLS.
    """
    daemon_threads = True

    def __init__(self, context=None):
        self.requests, self.answer, self.context = [], None, context
        super().__init__(("127.0.0.1", 0), WebHandler)
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self.thread.start()

    def get_request(self):
        connection, address = super().get_request()
        if self.context:
            connection = self.context.wrap_socket(connection, server_side=True,
                                                  do_handshake_on_connect=False)
        return connection, address

    def handle_error(self, request, client_address):
        pass

    def url(self, path="/", host="127.0.0.1"):
        return f"http{'s' if self.context else ''}://{host}:{self.server_port}{path}"

    def close(self):
        self.shutdown()
        self.server_close()
        self.thread.join()


class WebHandler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, dict(self.headers.items()), body))
        if self.server.answer:
            self.server.answer(self)
        else:
            reply(200)(self)

    def log_message(self, *_):
        pass


def reply(status, body=b"secret words", **headers):
    def answer(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)
    return answer


class Smtp(socketserver.ThreadingTCPServer):
    """Speaks as much SMTP as a client needs; `replies` are other replies to a verb, or an address.

    `mails` are (sender, recipients, bytes), `said` the lines of clients.
    """
    daemon_threads = True

    def __init__(self, context=None, starttls=True, implicit=False):
        self.replies, self.mails, self.said = {}, [], []
        self.context, self.starttls, self.implicit = context, starttls and context, implicit
        super().__init__(("127.0.0.1", 0), SmtpHandler)
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self.thread.start()

    def handle_error(self, request, client_address):
        pass

    def settings(self, **more):
        tls = "tls" if self.implicit else "starttls" if self.starttls else "none"
        return {"mail": {"host": "localhost", "port": self.server_address[1], "tls": tls,
                         "from": "roexec@example.com", "timeout": 60, **more}}

    close = Web.close


class SmtpHandler(socketserver.BaseRequestHandler):
    def handle(self):
        self.secure, self.sender, self.recipients = False, None, []
        self.file = self.request.makefile("rb")
        if self.server.implicit:
            self.wrap()
        self.tell("220 ready")
        while True:
            line = self.file.readline()
            if not line:
                return
            self.server.said.append(line)
            verb, _, rest = line.decode().strip().partition(" ")
            getattr(self, "do_" + verb.upper(), self.do_other)(rest)

    def wrap(self):
        self.file.close()
        self.request = self.server.context.wrap_socket(self.request, server_side=True,
                                                       do_handshake_on_connect=False)
        self.file = self.request.makefile("rb")
        self.request.do_handshake()
        self.secure = True

    def finish(self):
        self.file.close()
        self.request.close()

    def tell(self, line, key=None):
        self.request.sendall(self.server.replies.get(key, line).encode() + b"\r\n")

    def do_EHLO(self, _):
        more = "250-STARTTLS\r\n" if self.server.starttls and not self.secure else ""
        self.tell(f"250-localhost\r\n{more}250 AUTH PLAIN")

    def do_STARTTLS(self, _):
        self.tell("220 go", "STARTTLS")
        self.wrap()

    def do_AUTH(self, _):
        self.tell("235 in" if self.secure else "538 not in clear text", "AUTH")

    def do_MAIL(self, rest):
        self.sender, self.recipients = rest, []
        self.tell("250 ok", "MAIL")

    def do_RCPT(self, rest):
        address = rest.split(">")[0].split("<")[1]
        if address not in self.server.replies:
            self.recipients.append(address)
        self.tell("250 ok", address)

    def do_DATA(self, _):
        self.tell("354 go on", "DATA")
        lines = []
        for line in self.file:
            if line == b".\r\n":
                break
            lines.append(line[1:] if line.startswith(b".") else line)
        self.server.mails.append((self.sender, self.recipients, b"".join(lines)))
        self.tell("250 taken", "END")

    def do_QUIT(self, _):
        self.tell("221 bye")
        self.request.shutdown(socket.SHUT_RDWR)

    def do_other(self, _):
        self.tell("250 ok")


class Answers:
    """Speaks HTTP; `replies` are for the next requests, then `usual`: each is (status, body,
    headers), or a function of the handler. `requests` are (method, target, headers, body)."""

    def __init__(self):
        self.requests, self.replies, self.usual, self.connections = [], [], (200, b""), 0
        answers = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                answers.connections += 1
                super().setup()

            def do_GET(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                answers.requests.append((self.command, self.path, dict(self.headers), body))
                reply = answers.replies.pop(0) if answers.replies else answers.usual
                if callable(reply):
                    reply(self)
                    return
                status, body, *headers = reply
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)),
                                    **(headers[0] if headers else {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_PUT = do_POST = do_DELETE = do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def error_xml(code, message="It is so.", **more):
    """An answer of S3 that says what is wrong."""
    fields = "".join(f"<{name}>{text}</{name}>" for name, text in more.items())
    return (f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message>{fields}'
            "</Error>").encode()


class VaultServer:
    """Speaks as much of Vault's API as is needed; `requests` is what it was asked.

    `answers` are (status, body) or callables for the next requests, before its usual ones.
    """

    def __init__(self, tls=None):
        self.requests, self.answers, self.tokens = [], [], {"t0k3n-of-vault"}
        self.mounts = {"secret/": "2", "kv/": "1", "deep/er/": "2"}
        self.secrets = {"secret/data/db": {"user": "bob", "password": "s3cr3t-Pässword"},
                        "kv/db": {"password": "old-passw0rd"},
                        "deep/er/data/x": {"a": "deep-value"}}
        self.deleted = {}
        vault = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                size = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(size)) if size else None
                vault.requests.append((self.command, self.path, dict(self.headers), body))
                answer = vault.answers.pop(0) if vault.answers else vault.usual
                answer = answer(self, body) if callable(answer) else answer
                if answer is not None:
                    status, content, *headers = answer
                    data = content if isinstance(content, bytes) else json.dumps(content).encode()
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    for name, value in headers:
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)

            do_POST = do_GET

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None
        if tls is not None:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_address[1]
        self.address = f"http{'s' if tls else ''}://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def usual(self, request, body):
        path = urllib.parse.unquote(request.path).removeprefix("/v1/")
        if path == "auth/approle/login":
            if body != {"role_id": "role", "secret_id": "s3cr3t-id"}:
                return 400, {"errors": ["invalid role or secret ID"]}
            self.tokens.add("t0k3n-of-role")
            return 200, {"auth": {"client_token": "t0k3n-of-role", "lease_duration": 1200,
                                  "renewable": True}, "data": None}
        token = request.headers.get("X-Vault-Token")
        if token is None:
            return 403, {"errors": ["missing client token"]}
        if token not in self.tokens:
            return 403, {"errors": ["2 errors occurred:\n\t* permission denied\n\t* invalid token"
                                    "\n\n"]}
        asks_mount = path.startswith("sys/internal/ui/mounts/")
        path = path.removeprefix("sys/internal/ui/mounts/")
        mount = next((mount for mount in self.mounts if path.startswith(mount)), None)
        if asks_mount and mount is not None:
            return 200, {"data": {"path": mount, "type": "kv",
                                  "options": {"version": self.mounts[mount]}}}
        if asks_mount:
            return 403, {"errors": ["preflight capability check returned 403"]}
        if mount is None:
            return 404, {"errors": [f'no handler for route "{path}". route entry not found.']}
        versioned = self.mounts[mount] == "2"
        if versioned and not path[len(mount):].startswith("data/"):
            return 404, {"errors": [], "warnings": [
                "Invalid path for a versioned K/V secrets engine. See the API docs."]}
        if path in self.deleted:
            return 404, {"data": {"data": None, "metadata": {
                "deletion_time": "2026-01-01T00:00:00Z", "destroyed": self.deleted[path],
                "version": 3}}}
        if path not in self.secrets:
            return 404, {"errors": []}
        data = self.secrets[path]
        metadata = {"created_time": "2018-03-22T02:24:06.9Z", "custom_metadata": None,
                    "deletion_time": "", "destroyed": False, "version": 2}
        return 200, {"request_id": "1", "lease_id": "", "renewable": False, "lease_duration": 0,
                     "data": {"data": data, "metadata": metadata} if versioned else data}


def tool(name, package=None):
    """The path of a program that tests ask. CI has all of them; elsewhere a test that needs one
    which is not there is skipped. `package` is Debian's, where it has another name."""
    path = shutil.which(name)
    if path is None:
        assert not os.environ.get("CI"), f"{name} is missing"
        pytest.skip(f"{name} is not here; Debian has it in {package or name}")
    return path
