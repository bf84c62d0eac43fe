"""Runs the benches beside this file, one after the other: `run.py [NAME ...]`, all without names.

A bench is a program `bench_NAME.py` that prints a line for each figure,

    NAME: VALUE (goal <= GOAL) ok

with `>=` for `<=` and `MISSED` for `ok` as it comes out. A figure is a ratio inside one run, so
that it says the same on every machine. A bench has TIME_LIMIT seconds; the exit status is 1 where
a goal was missed, a bench failed, printed no figure or took too long, else 0.
"""
import glob
import os
import re
import signal
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
TIME_LIMIT = 300
FIGURE = re.compile(r"(.+): (-?[\d.]+) \(goal (<=|>=) ([\d.]+)\) (ok|MISSED)")


def figure(name, value, relation, goal):
    """The line of one figure; benches print it."""
    kept = value <= goal if relation == "<=" else value >= goal
    return f"{name}: {value:.2f} (goal {relation} {goal:g}) {'ok' if kept else 'MISSED'}"


def run(path, time_limit):
    """Run one bench, showing what it prints; the sentences that say what is wrong with it."""
    with subprocess.Popen([sys.executable, path], stdin=subprocess.DEVNULL, cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          start_new_session=True) as bench:
        try:
            output, _ = bench.communicate(timeout=time_limit)
            wrong = [f"exit status {bench.returncode}"] if bench.returncode else []
        except subprocess.TimeoutExpired:
            os.killpg(bench.pid, signal.SIGKILL)
            output, _ = bench.communicate()
            wrong = [f"not done after {time_limit} s"]
    print(output, end="", flush=True)
    figures = [match for match in map(FIGURE.fullmatch, output.splitlines()) if match]
    if not figures:
        wrong.append("no figure")
    return wrong + [f"missed {match[1]}" for match in figures if match[5] == "MISSED"]


def main(names, folder=HERE, time_limit=TIME_LIMIT):
    paths = ([os.path.join(folder, f"bench_{name}.py") for name in names]
             or sorted(glob.glob(os.path.join(folder, "bench_*.py"))))
    failed = []
    for path in paths:
        began = time.monotonic()
        wrong = run(path, time_limit)
        name = os.path.basename(path)
        taken = time.monotonic() - began
        print(f"-- {name}: {'; '.join(wrong) or 'ok'}, {taken:.0f} s", flush=True)
        failed += [name] * bool(wrong)
    print(f"{len(paths) - len(failed)} of {len(paths)} benches kept their goals")
    return 1 if failed or not paths else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
