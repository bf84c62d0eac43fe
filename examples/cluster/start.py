#!/usr/bin/env python3
"""A cluster of three nodes on this machine, to look at and to break: starts etcd and the nodes, tells
who leads, and ends them all at Ctrl-C. The bucket is one of yours; README.md here has more."""
import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROGRAM = HERE.parent.parent / "roexec.py"
sys.path.insert(0, str(PROGRAM.parent))

import roexec   # noqa: E402

NO_BUCKET = """\
There is no S3 server to keep the history in: name one with --endpoint URL (with --region NAME instead
AWS is asked), and its keys in the environment. Debian has Ceph's gateway (radosgw); one that keeps
all in memory, enough for a look, is

    python3 -m venv /tmp/moto && /tmp/moto/bin/pip install 'moto[server]'
    /tmp/moto/bin/moto_server -p 5000 &
    export AWS_ACCESS_KEY_ID=any AWS_SECRET_ACCESS_KEY=any
    python3 examples/cluster/start.py --endpoint http://127.0.0.1:5000"""
ENDING = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
NO_ETCD = "etcd is not here: Debian has it in etcd-server, others at https://etcd.io"


def options():
    parser = argparse.ArgumentParser(description="Start a cluster of three nodes on this machine.")
    get = os.environ.get
    parser.add_argument("--endpoint", default=get("AWS_ENDPOINT_URL_S3") or get("AWS_ENDPOINT_URL"),
                        help="the URL of the S3 server ($AWS_ENDPOINT_URL_S3, $AWS_ENDPOINT_URL)")
    parser.add_argument("--region", default=get("AWS_REGION") or get("AWS_DEFAULT_REGION"),
                        help="its region ($AWS_REGION); without --endpoint, that of AWS")
    parser.add_argument("--bucket", default="roexec-example",
                        help="the bucket (roexec-example); at an --endpoint it is made if need be")
    parser.add_argument("--prefix", default="cluster", help="the folder in it (cluster)")
    parser.add_argument("--etcd", type=int, choices=(1, 3), default=1,
                        help="how many members etcd has (1)")
    parser.add_argument("--port", type=int, default=8080,
                        help="nodes listen on the next three ports, etcd ten and twenty further on")
    parser.add_argument("--folder", type=Path, default=Path("roexec-cluster"),
                        help="for configurations, stores and logs (roexec-cluster)")
    given = parser.parse_args()
    given.folder = given.folder.absolute()
    return given


# The bucket.

def settings_of_store(given, path):
    store = {"type": "s3", "path": path, "bucket": given.bucket, "prefix": given.prefix,
             "endpoint": given.endpoint, "region": given.region}
    return {key: value for key, value in store.items() if value}


def check_bucket(given):
    """See to it that the bucket is there; exit with a sentence where it cannot be had."""
    text = json.dumps({"store": settings_of_store(given, "/")})
    credentials = roexec.S3Credentials(os.environ, os.path.expanduser("~"))
    client = roexec.S3Client(roexec.read_config(text, "the options", "/").store, credentials)
    try:
        next(client.list("store.json"), None)
    except roexec.S3Error as error:
        if error.code != "NoSuchBucket" or not given.endpoint:
            raise
        make_bucket(given, credentials.current())


def make_bucket(given, keys):
    """Make the bucket, as any tool for S3 can."""
    url = urllib.parse.urlsplit(given.endpoint)
    path, digest = f"{url.path.rstrip('/')}/{given.bucket}", "UNSIGNED-PAYLOAD"
    headers = {"host": url.netloc, "x-amz-content-sha256": digest,
               "x-amz-date": time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())}
    if keys.token:
        headers["x-amz-security-token"] = keys.token
    headers["authorization"] = roexec.sign_request(keys, given.region or "us-east-1", "PUT", path,
                                                   headers, digest)
    request = urllib.request.Request(f"{url.scheme}://{url.netloc}{path}", method="PUT",
                                     headers=headers)
    urllib.request.urlopen(request, timeout=30).close()
    print(f"made the bucket {given.bucket}")


# What is started.

class Processes:
    """Each has a log in the folder, and is ended by its id."""

    def __init__(self, folder):
        self.folder, self.running = folder, {}

    def start(self, name, line):
        with open(self.folder / f"{name}.log", "ab") as log:
            self.running[name] = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=log,
                                                  stderr=log, start_new_session=True)

    def ended(self):
        """Names of those that have ended since this was asked last."""
        ended = [name for name, process in self.running.items() if process.poll() is not None]
        for name in ended:
            del self.running[name]
        return ended

    def end(self):
        """End all, nodes before etcd, so that they can say goodbye to it."""
        print("ending ...", flush=True)
        for processes in (self.named(False), self.named(True)):
            for process in processes:
                process.terminate()
            for process in processes:
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def named(self, is_etcd):
        return [process for name, process in self.running.items()
                if name.startswith("etcd") == is_etcd]


def start_etcd(given, processes):
    """Start each member; its data stays in the folder, as it would on a disk."""
    program, host = shutil.which("etcd"), "http://127.0.0.1"
    if program is None:
        sys.exit(NO_ETCD)
    ports = range(given.port + 10, given.port + 10 + given.etcd)
    members = ",".join(f"m{port}={host}:{port + 10}" for port in ports)
    for port in ports:
        processes.start(f"etcd-{port}", [
            program, "--name", f"m{port}", "--data-dir", f"{given.folder}/etcd-{port}-of-{given.etcd}",
            "--listen-client-urls", f"{host}:{port}", "--advertise-client-urls", f"{host}:{port}",
            "--listen-peer-urls", f"{host}:{port + 10}", "--initial-cluster", members,
            "--initial-advertise-peer-urls", f"{host}:{port + 10}",
            "--auto-compaction-retention", "1h"])
    return f"etcd://{','.join(f'127.0.0.1:{port}' for port in ports)}"


def write_configuration(given, name, port, etcd):
    """The configuration of a node -> its path; node.yml here is one for a host of its own."""
    store = settings_of_store(given, str(given.folder / name))
    path = given.folder / f"{name}.yml"
    path.write_text("\n".join([
        "server:", f"  port: {port}", "  drain: 5s",
        "store:", *(f"  {key}: {json.dumps(value)}" for key, value in store.items()),
        "clustering:", f"  leader_election: {etcd}", f"  node: {name}", "  lease: 5s",
        "metrics: {enabled: true}", f"jobs: {json.dumps(str(HERE / 'jobs.yml'))}", ""]))
    return path


def start_nodes(given, processes, etcd):
    """{name: (URL, configuration)} of the nodes."""
    nodes = {}
    for port, name in enumerate("abc", given.port + 1):
        path = write_configuration(given, name, port, etcd)
        processes.start(name, [sys.executable, str(PROGRAM), "--config", str(path), "server"])
        nodes[name] = f"http://127.0.0.1:{port}", path
    return nodes


# What goes on.

def leader_now(nodes):
    """The name of the node that says that it leads, or None."""
    for name, (url, _) in nodes.items():
        try:
            with urllib.request.urlopen(f"{url}/api/v1/cluster", timeout=2) as answer:
                if json.load(answer)["role"] == "leader":
                    return name
        except OSError:
            pass
    return None


def show(nodes, processes, leader):
    """Print the pages, and what a node that runs says."""
    for name, (url, path) in nodes.items():
        how = f"process {processes.running[name].pid}" if name in processes.running else "ended"
        print(f"  {name}  {url}/  {how}{'  leads' if name == leader else ''}")
    print(subprocess.run([sys.executable, str(PROGRAM), "--config", str(nodes[leader][1]), "cluster",
                          "status"], capture_output=True, text=True, check=False).stdout)
    print(f"""\
Try: kill -9 {processes.running[leader].pid}    # the leader; within seconds another one leads
     python3 roexec.py --config {nodes[leader][1]} cluster step-down
     python3 roexec.py --url {nodes[leader][0]} list runs
Ctrl-C ends all of it.""", flush=True)


def watch(nodes, processes):
    """Tell who leads, and who has ended, until Ctrl-C, or until all have."""
    before = None
    while processes.running:
        for name in processes.ended():
            print(f"{name} has ended; {processes.folder}/{name}.log says why", flush=True)
            if name in nodes:
                print(f"     python3 roexec.py --config {nodes[name][1]} server    # starts it again",
                      flush=True)
        leader = leader_now(nodes)
        if leader in processes.running and leader != before:
            print(f"\n{time.strftime('%H:%M:%S')} {leader} leads", flush=True)
            show(nodes, processes, leader)
            before = leader
        time.sleep(0.5)


def main():
    given = options()
    if not given.endpoint and not given.region:
        sys.exit(NO_BUCKET)
    for number in ENDING:
        signal.signal(number, lambda *_: sys.exit(0))
    given.folder.mkdir(exist_ok=True)
    processes = Processes(given.folder)
    try:
        check_bucket(given)
        nodes = start_nodes(given, processes, start_etcd(given, processes))
        print("starting etcd and three nodes ...", flush=True)
        watch(nodes, processes)
    except (roexec.RoexecError, OSError) as error:
        sys.exit(str(error))
    finally:
        for number in ENDING:           # a second Ctrl-C must not leave anything behind
            signal.signal(number, signal.SIG_IGN)
        processes.end()


if __name__ == "__main__":
    main()
