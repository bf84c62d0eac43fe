"""How long from asking for a run over HTTP to the first line of its log in a client that follows it,
beside a bare server that starts the same command at once and passes its first line on."""
import http.client
import http.server
import json
import os
import re
import statistics
import subprocess
import threading
import time

from run import figure
from serving import server, wait_for, workplace

TRIES = 20
COMMAND = ["/bin/sh", "-c", "echo first; sleep 0.2"]


class Bare(http.server.BaseHTTPRequestHandler):
    """Keeps nothing, looks after nothing."""
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        with subprocess.Popen(COMMAND, stdout=subprocess.PIPE) as process:
            line = process.stdout.readline()
            self.send_response(200)
            self.send_header("Content-Length", str(len(line)))
            self.end_headers()
            self.wfile.write(line)

    def log_message(self, *_):
        pass


def bare(port):
    """Seconds until the first line."""
    client = http.client.HTTPConnection("127.0.0.1", port)
    began = time.perf_counter()
    client.request("POST", "/")
    assert client.getresponse().read() == b"first\n"
    client.close()
    return time.perf_counter() - began


def ours(port, headers):
    """Seconds until the first line of the command."""
    client, reader = (http.client.HTTPConnection("127.0.0.1", port) for _ in range(2))
    began = time.perf_counter()
    client.request("POST", "/api/v1/jobs/tick/run", headers=headers)
    run_id = json.load(client.getresponse())["id"]
    reader.request("GET", f"/api/v1/runs/{run_id}/logs?follow=1&stream=out", headers=headers)
    response = reader.getresponse()
    assert response.readline() == b"first\n"
    took = time.perf_counter() - began
    response.read()                     # the run has ended
    client.close()
    reader.close()
    return took


def main():
    reference = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bare)
    threading.Thread(target=reference.serve_forever, daemon=True).start()
    job = {"id": "tick", "command": COMMAND, "directory": "/", "max_concurrent": 0}
    with workplace() as (folder, command), server(
            folder, command, [job], "--port", "0") as (process, store):
        with open(os.path.join(folder, "server.log")) as log:
            port = int(re.search(r"http=http://127.0.0.1:(\d+)", log.read())[1])
        token = subprocess.run([*command, "--store", store.path, "token", "create", "--name", "ci",
                                "--role", "admin"], capture_output=True, check=True, text=True)
        headers = {"Authorization": f"Bearer {token.stdout.strip()}"}
        wait_for(lambda: ours(port, headers) > 0, process)
        pairs = [(ours(port, headers), bare(reference.server_port)) for _ in range(TRIES)]
    reference.shutdown()
    reference.server_close()
    ours_took, bare_took = (statistics.median(column) for column in zip(*pairs))
    print(f"first line after {ours_took * 1000:.0f} ms, bare {bare_took * 1000:.0f} ms")
    print(figure("first line of a followed log, to that of a bare server", ours_took / bare_took,
                 "<=", 10))


if __name__ == "__main__":
    main()
