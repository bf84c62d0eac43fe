"""The driver of `make bench`: what a bench prints decides, and none runs on for ever."""
import importlib.util
import re
from pathlib import Path

import pytest

BENCH = Path(__file__).parent / "bench"


@pytest.fixture(scope="module")
def driver():
    spec = importlib.util.spec_from_file_location("bench_driver", BENCH / "run.py")
    driver = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(driver)
    return driver


@pytest.fixture
def bench(driver, tmp_path, capsys):
    """`bench(NAME=program, ...)` -> (exit status, the driver's lines) of a folder of benches."""
    def call(*names, time_limit=60, **programs):
        for name, program in programs.items():
            (tmp_path / f"bench_{name}.py").write_text(program)
        status = driver.main(names, str(tmp_path), time_limit)
        return status, re.sub(r", \d+ s$", "", capsys.readouterr().out, flags=re.M).splitlines()
    return call


def test_a_kept_goal_is_ok(bench):
    assert bench(a='print("rate: 0.70 (goal >= 0.6) ok")') == (0, [
        "rate: 0.70 (goal >= 0.6) ok", "-- bench_a.py: ok", "1 of 1 benches kept their goals"])


@pytest.mark.parametrize("program, wrong", [
    ('print("rate: 0.50 (goal >= 0.6) MISSED")', "missed rate"),
    ('print("rate: fast")', "no figure"),
    ('print("rate: 0.70 (goal >= 0.6) ok"); raise SystemExit(3)', "exit status 3"),
])
def test_a_bench_that_keeps_no_goal_fails_and_the_next_one_runs(bench, program, wrong):
    status, lines = bench(a=program, b='print("x: 1.00 (goal <= 1) ok")')
    assert status == 1
    assert f"-- bench_a.py: {wrong}" in lines and "-- bench_b.py: ok" in lines
    assert lines[-1] == "1 of 2 benches kept their goals"


def test_a_bench_that_runs_on_is_ended_with_what_it_started(bench):
    program = ('import subprocess, time; print("x: 1.00 (goal <= 1) ok", flush=True); '
               'subprocess.Popen(["sleep", "100"]); time.sleep(100)')
    status, lines = bench(a=program, time_limit=2)
    assert status == 1 and "-- bench_a.py: not done after 2 s" in "; ".join(lines)


def test_only_the_named_benches_run(bench):
    good = 'print("x: 1.00 (goal <= 1) ok")'
    assert bench("b", a="raise SystemExit(1)", b=good)[0] == 0


def test_no_bench_at_all_fails(bench):
    assert bench()[0] == 1


@pytest.mark.parametrize("value, relation, goal, line", [
    (2.299, "<=", 2.3, "x: 2.30 (goal <= 2.3) ok"),
    (2.31, "<=", 2.3, "x: 2.31 (goal <= 2.3) MISSED"),
    (0.6, ">=", 0.6, "x: 0.60 (goal >= 0.6) ok"),
    (0.594, ">=", 0.6, "x: 0.59 (goal >= 0.6) MISSED"),
])
def test_a_figure_is_judged_as_it_was_measured(driver, value, relation, goal, line):
    assert driver.figure("x", value, relation, goal) == line
    assert driver.FIGURE.fullmatch(line)
