"""Cron's next slots against those of cronsim, in the same run.

cronsim comes from the Python that runs this, else from a virtual environment made for the run.
"""
import datetime
import glob
import importlib
import subprocess
import sys
import tempfile
import time
import zoneinfo

from run import ROOT, figure

ROUNDS = 9
EXPRESSIONS = {"*/15 * * * *": 1000, "0 2 * * *": 1000, "0 9 * * 1-5": 1000, "0 0 29 2 *": 100}
START = datetime.datetime(2025, 8, 1, 12, 34, 56)
ZONES = [datetime.timezone.utc, zoneinfo.ZoneInfo("America/New_York")]
# The two that take longest: 60 years of nothing but gaps, and the rarest day across 2100.
LONGEST = [("*/5 2 * 3 sun#2", START), ("0 0 29 2 */7", START.replace(year=2089))]


def load_cronsim(folder):
    """The class CronSim, installed into the folder if need be."""
    try:
        return importlib.import_module("cronsim").CronSim
    except ImportError:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([f"{folder}/bin/python", "-m", "pip", "install", "--quiet", "cronsim"],
                       check=True)
        sys.path.extend(glob.glob(f"{folder}/lib/python*/site-packages"))
        importlib.invalidate_caches()
        return importlib.import_module("cronsim").CronSim


def least(*functions):
    """The least processor seconds that each function takes, in rounds that take turns."""
    taken = [[] for _ in functions]
    for _ in range(ROUNDS):
        for function, times in zip(functions, taken):
            began = time.process_time()
            function()
            times.append(time.process_time() - began)
    return [min(times) for times in taken]


def main():
    sys.path.insert(0, ROOT)
    from roexec import Cron
    with tempfile.TemporaryDirectory() as folder:
        CronSim = load_cronsim(folder)

    def theirs(expression, start, count):
        slots = CronSim(expression, start)
        for _ in range(count):
            last = next(slots)
        return last

    def ours(expression, start, count):
        following, last = Cron(expression).next, start
        for _ in range(count):
            last = following(last)
        return last

    def first(make, expression, start):
        for _ in range(100):
            make(expression, start, 1)

    for expression, count in EXPRESSIONS.items():
        for zone in ZONES:
            start = START.replace(tzinfo=zone)
            assert ours(expression, start, count) == theirs(expression, start, count)
            old, new = least(lambda: theirs(expression, start, count),
                             lambda: ours(expression, start, count))
            print(figure(f"{expression} {zone}, rate of next / cronsim's", old / new, ">=", 3))
            old, new = least(lambda: first(theirs, expression, start),
                             lambda: first(ours, expression, start))
            print(figure(f"{expression} {zone}, parse and first / cronsim's", new / old, "<=", 1))
    # Where cronsim takes 115 microseconds for its next leap day, a millisecond is 8.7 of these.
    for expression, start in LONGEST:
        start = start.replace(tzinfo=ZONES[1])
        old, new = least(lambda: theirs("0 0 29 2 *", start, 20),
                         lambda: ours(expression, start, 1))
        print(figure(f"{expression}, all of it / cronsim's next leap day", new / old * 20, "<=", 8.7))


if __name__ == "__main__":
    main()
