"""What several benches need: the archive, and a server of it on a store of its own."""
import contextlib
import os
import subprocess
import sys
import tempfile
import time

from run import ROOT

sys.path.insert(0, ROOT)
import roexec  # noqa: E402 (found by the line above)

PATIENCE = 120          # seconds


@contextlib.contextmanager
def workplace():
    """A folder with roexec.pyz, built for this Python -> (folder, the command that starts it)."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, f"{ROOT}/zipapp/build.py", sys.executable,
                        "--output", folder], check=True, capture_output=True)
        yield folder, [sys.executable, "-I", "-S", f"{folder}/roexec.pyz"]


@contextlib.contextmanager
def server(folder, command, jobs, *options):
    """A server with the jobs (mappings) -> (the process, its Store)."""
    path = os.path.join(folder, "jobs.yml")
    with open(path, "w") as file:
        file.write(roexec.job_to_yaml([roexec.Job(job) for job in jobs]))
    store = roexec.Store(os.path.join(folder, "store"))
    with open(os.path.join(folder, "server.log"), "w") as log, subprocess.Popen(
            [*command, "--store", store.path, "server", "--jobs", path, *options],
            env={"HOME": folder, "PATH": os.environ["PATH"], "TZ": "UTC"}, stdin=subprocess.DEVNULL,
            stderr=log) as process:
        try:
            wait_for(lambda: "Server started" in open(log.name).read(), process)
            yield process, store
        finally:
            process.terminate()


def wait_for(condition, process):
    """Wait until a condition holds; ends the bench where the server ends or that takes too long."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit("the server has ended" if process.poll() is not None else "it took too long")
        time.sleep(0.01)


def query(store, sql):
    """The rows that a query gives, as tuples."""
    with store.read() as db:
        return [tuple(row) for row in db.execute(sql)]
