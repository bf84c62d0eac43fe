"""Requests per second for the list of 100 jobs, beside a bare ThreadingHTTPServer that returns the
same bytes: keep-alive, 8 connections, one client for both."""
import contextlib
import http.server
import re
import selectors
import socket
import subprocess
import sys
import time

from run import figure
from serving import server, workplace

CONNECTIONS, ROUNDS, SECONDS = 8, 5, 1.5
LIST = b"GET /api/v1/jobs?limit=100 HTTP/1.1\r\nHost: localhost\r\n%b\r\n"
NEEDED = re.compile(rb"\r\nContent-Length: (\d+)\r\n")


class Bare(http.server.BaseHTTPRequestHandler):
    """As fast as it can be: one packet for an answer, and nothing is looked up."""
    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = -1, True

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content)

    def log_message(self, *_):
        pass


def serve_bare():
    """The program of the reference: answers with what it reads from standard input."""
    content = sys.stdin.buffer.read()
    bare = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bare)
    bare.content = content
    print(bare.server_port, flush=True)
    bare.serve_forever()


@contextlib.contextmanager
def bare_server(content):
    """The port of the reference."""
    with subprocess.Popen([sys.executable, __file__, "bare"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        process.stdin.write(content)
        process.stdin.close()
        try:
            yield int(process.stdout.readline())
        finally:
            process.terminate()


def read_answer(client, buffer):
    """Whether all of an answer is in the buffer, with what can be read now."""
    buffer += client.recv(1 << 20)
    end = buffer.find(b"\r\n\r\n")
    if end < 0:
        return False
    assert buffer.startswith(b"HTTP/1.1 200 "), bytes(buffer[:500])
    return len(buffer) >= end + 4 + int(NEEDED.search(buffer)[1])


def fetch(port):
    """The content of one answer."""
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(LIST % b"")
        buffer = bytearray()
        while not read_answer(client, buffer):
            pass
    return bytes(buffer).partition(b"\r\n\r\n")[2]


def rate(port, header=b""):
    """Answers per second to so many connections, each of which asks again when it has one."""
    request = LIST % header
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as waiting:
        for _ in range(CONNECTIONS):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            waiting.register(client, selectors.EVENT_READ, bytearray())
            client.sendall(request)
        answers, began = 0, time.perf_counter()
        while time.perf_counter() - began < SECONDS:
            for key, _ in waiting.select():
                if read_answer(key.fileobj, key.data):
                    key.data.clear()
                    key.fileobj.sendall(request)
                    answers += 1
        return answers / (time.perf_counter() - began)


def main():
    jobs = [{"id": f"job-{number}", "schedule": f"{number % 60} 3 * * *", "directory": "/",
             "command": f"echo {number}", "env": {"NUMBER": str(number)}} for number in range(100)]
    with workplace() as (folder, command), server(
            folder, command, jobs, "--port", "0") as (_, store):
        with open(f"{folder}/server.log") as log:
            port = int(re.search(r"http=http://127.0.0.1:(\d+)", log.read())[1])
        content = fetch(port)
        assert content.count(b'"spec"') == 100
        token = subprocess.run([*command, "--store", store.path, "token", "create", "--name", "ci",
                                "--role", "admin"], capture_output=True, check=True).stdout.strip()
        bearer = b"Authorization: Bearer %b\r\n" % token
        with bare_server(content) as bare:
            ours, with_token, theirs = [], [], []
            for _ in range(ROUNDS):
                theirs.append(rate(bare))
                ours.append(rate(port))
                with_token.append(rate(port, bearer))
    print(f"the list of 100 jobs, {len(content)} bytes: {max(ours):.0f} answers per second; with a "
          f"token: {max(with_token):.0f}; bare: {max(theirs):.0f}")
    print(figure("rate of a list of jobs to a bare server's", max(ours) / max(theirs), ">=", 0.7))
    print(figure("the same with a token", max(with_token) / max(theirs), ">=", 0.7))


if __name__ == "__main__":
    serve_bare() if sys.argv[1:] == ["bare"] else main()
