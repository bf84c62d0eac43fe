"""What a start of the archive costs, in starts of a bare interpreter."""
import os
import subprocess
import sys
import tempfile
import time

from run import ROOT, figure

ROUNDS = 40
BARE = [sys.executable, "-I", "-S", "-c", "pass"]


def seconds(command, environment, sink):
    """How long the command takes from its spawn to its end."""
    actions = [(os.POSIX_SPAWN_DUP2, sink, 1)]
    began = time.perf_counter()
    pid = os.posix_spawn(command[0], command, environment, file_actions=actions)
    status = os.waitpid(pid, 0)[1]
    taken = time.perf_counter() - began
    if status:
        sys.exit(f"{' '.join(command)}: wait status {status}")
    return taken


def main():
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "wb") as null:
        subprocess.run([sys.executable, f"{ROOT}/zipapp/build.py", sys.executable,
                        "--output", folder], check=True, stdout=null, stderr=null)
        environment = {"HOME": folder, "PATH": os.environ["PATH"], "TZ": "UTC"}
        start = [sys.executable, "-I", "-S", f"{folder}/roexec.pyz", "--store", f"{folder}/store"]
        for job in "abcde":
            added = subprocess.run([*start, "add", job, "--schedule", "0 2 * * *", "--", "true"],
                                   env=environment, capture_output=True, text=True)
            if added.returncode:
                sys.exit(added.stderr)
        commands = BARE, [*start[:4], "--version"], [*start, "list", "jobs"]
        # The least of many rounds, taken in turns: what else the machine does only adds to a start.
        rounds = [[seconds(command, environment, null.fileno()) for command in commands]
                  for _ in range(ROUNDS)]
        bare, version, listing = map(min, zip(*rounds))
    print(figure("start of --version / of a bare Python", version / bare, "<=", 2.3))
    print(figure("start of list jobs / of a bare Python", listing / bare, "<=", 4))


if __name__ == "__main__":
    main()
