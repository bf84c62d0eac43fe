"""Pipelines, in real processes: order and parallel branches, what steps hand on, ends of all kinds,
and what a kill leaves, at each point of a run and of whom it hits."""
import json
import os
import random
import signal
import time

import pytest
from helpers import (apply, await_state, claimed, descendants, in_child, is_alive, output_of,
                     read_attempts, read_log_of, read_pid, read_run, read_runs, wait_for)

import roexec
from roexec import Job, Journal, parse_outputs

pytestmark = pytest.mark.usefixtures("clean")


def pipeline(*steps, **more):
    """A job whose steps are mappings, or (id, command, *ids that it depends on)."""
    specs = [step if isinstance(step, dict) else
             {"id": step[0], "command": step[1], "depends_on": list(step[2:])} for step in steps]
    return Job({"id": "p", "directory": "/", **more, "pipeline": specs})


def supervise(store, journal, **how):
    """Carry a run to its end in this process -> its row in the store."""
    signals = roexec.Signals()
    try:
        roexec.perform_run(journal, store.folder, signals, **how)
    finally:
        signals.close()
        journal.close()
    roexec.settle(store)
    return read_run(store, journal.run_id)


def perform(store, *steps, given=None, env=None, **more):
    """Run a pipeline -> (row of the run, {step: row})."""
    columns = {} if env is None else {"env": json.dumps(env)}
    run = supervise(store, claimed(store, pipeline(*steps, **more), **columns), given=given)
    return run, steps_of(store, run["id"])


def steps_of(store, run_id):
    """{step: its row}, the newest of a step that was repeated."""
    return {row["step"]: row for row in read_runs(store, parent=run_id) if row["step"]}


def ends(steps):
    return {step: row["reason"] or row["state"] for step, row in steps.items()}


# Order.

def test_steps_run_in_their_order(store, marks):
    run, steps = perform(store, ("c", f"echo c >> {marks.path}", "b"),
                         ("b", f"echo b >> {marks.path}", "a"), ("a", f"echo a >> {marks.path}"))
    assert marks() == ["a", "b", "c"]
    assert (run["state"], run["reason"], run["exit_code"]) == ("succeeded", None, 0)
    assert list(steps) == ["c", "b", "a"]
    for step, row in steps.items():
        assert (row["state"], row["job_id"], row["trigger"], row["parent"]) == (
            "succeeded", "p", "pipeline", run["id"])
        assert read_attempts(store, row["id"])[0]["exit_code"] == 0


def test_independent_steps_run_at_the_same_time(store, tmp_path):
    meet = f"touch {tmp_path}/$ROEXEC_STEP; while [ ! -e {tmp_path}/{{}} ]; do sleep 0.01; done"
    run, _ = perform(store, ("a", meet.format("b")), ("b", meet.format("c")),
                     ("c", meet.format("a")))
    assert run["state"] == "succeeded"


@pytest.mark.parametrize("parallel", [1, 2])
def test_no_more_steps_are_on_at_once_than_parallel_says(store, marks, parallel):
    command = (f"echo + >> {marks.path}; while [ $(wc -l < {marks.path}) -lt {parallel} ]; do "
               f"sleep 0.01; done; sleep 0.05; echo - >> {marks.path}")
    run, _ = perform(store, *((f"s{number}", command) for number in range(6)), parallel=parallel)
    assert run["state"] == "succeeded"
    on = [marks()[:end].count("+") - marks()[:end].count("-") for end in range(13)]
    assert max(on) == parallel


def test_a_failed_step_stops_what_depends_on_it_and_nothing_else(store):
    run, steps = perform(store, ("a", "exit 3"), ("b", "true", "a"), ("c", "true", "b"),
                         ("d", "sleep 0.1"), ("e", "true", "d"))
    assert ends(steps) == {"a": "exit", "b": "dependency", "c": "dependency", "d": "succeeded",
                           "e": "succeeded"}
    assert steps["b"]["state"] == "skipped" and steps["b"]["finished_at"]
    assert (run["state"], run["reason"], run["exit_code"], run["message"]) == (
        "failed", "exit", 3, "step a failed, exit=3")
    assert roexec.exit_status(run) == 3


@pytest.mark.parametrize("command, more, status", [
    ("exit 7", {}, 7), ("kill -9 $$", {}, 137), ("sleep 60", {"timeout": 0.1}, 124),
    ("exit 7", {"success": {"exit_codes": [7]}}, 0), ("/nowhere/x", {}, 127),
    ("true", {"pre_run": "false", "hooks": {"pre_run": "false"}}, 125),
    ("true", {"condition": "false"}, 0)])
def test_the_exit_status_is_that_of_the_first_step_that_failed(store, command, more, status):
    more.pop("pre_run", None)
    run, _ = perform(store, {"id": "a", "command": command, **more},
                     {"id": "b", "command": "exit 9", "depends_on": {"a": "failed"}}
                     if status else ("b", "true"))
    assert roexec.exit_status(run) == status
    assert run["state"] == ("failed" if status else "succeeded")


def test_what_a_step_waits_for_may_be_failure_or_any_end(store):
    run, steps = perform(
        store, ("bad", "false"), ("good", "true"),
        {"id": "rescue", "command": "true", "depends_on": {"bad": "failed"}},
        {"id": "idle", "command": "true", "depends_on": {"good": "failed"}},
        {"id": "clean", "command": "true", "depends_on": {"idle": "finished", "bad": "finished"}})
    assert ends(steps) == {"bad": "exit", "good": "succeeded", "rescue": "succeeded",
                           "idle": "dependency", "clean": "succeeded"}


def test_steps_that_need_not_run_fail_nothing(store):
    run, steps = perform(store, {"id": "a", "command": "true", "condition": "false"},
                         ("b", "true", "a"), ("c", "true"),
                         {"id": "d", "command": "true", "depends_on": {"c": "failed"}})
    assert ends(steps) == {"a": "condition", "b": "dependency", "c": "succeeded",
                           "d": "dependency"}
    assert run["state"] == "succeeded"


def test_a_step_has_hooks_retries_and_variables_of_its_own(store, marks):
    run, steps = perform(store, {
        "id": "a", "command": f"echo $A $B $ROEXEC_STEP $ROEXEC_JOB_ID >> {marks.path}; "
                              "test $ROEXEC_ATTEMPT = 2",
        "retries": 1, "backoff": 0, "env": {"B": "own"},
        "hooks": {"on_success": f"echo hook $ROEXEC_STATUS >> {marks.path}"}},
        env={"C": "given"}, **{"params": {"A": "param"}})
    assert marks() == ["param own a p"] * 2 + ["hook succeeded"]
    assert len(read_attempts(store, steps["a"]["id"])) == 2 and run["state"] == "succeeded"


def test_the_hooks_of_the_whole_know_how_it_ended_and_what_was_printed(store, marks):
    perform(store, ("a", "echo from a"), ("b", "echo from b; exit 4", "a"),
            hooks={"pre_run": f"echo begin >> {marks.path}",
                   "on_failure": f"(echo $ROEXEC_STATUS $ROEXEC_EXIT_CODE; cat) >> {marks.path}",
                   "post_run": f"echo end >> {marks.path}"})
    assert marks() == ["begin", "failed 4", "from a", "from b", "end"]


def test_a_notice_of_the_whole_has_the_output_of_the_step_that_failed(store):
    perform(store, ("a", "echo from a"), ("b", "echo from b; exit 4", "a"), ("c", "echo from c"),
            hooks={"on_failure": {"mail": "ops@example.com"}})
    with store.read() as db:
        body, = db.execute("SELECT body FROM outbox").fetchone()
    assert b"from b" in body and b"from a" not in body


def test_the_notices_of_a_step_are_its_own(store):
    run, steps = perform(store, {"id": "a", "command": "false", "hooks": {
        "on_failure": {"webhook": "http://127.0.0.1:1/x"}}}, ("b", "true"))
    with store.read() as db:
        rows = [tuple(row) for row in db.execute("SELECT run_id, kind FROM outbox")]
    assert rows == [(steps["a"]["id"], "webhook")]


def test_the_whole_may_be_skipped_by_its_condition_and_leaves_no_steps(store, marks):
    run, steps = perform(store, ("a", f"echo a >> {marks.path}"), condition="false")
    assert (run["state"], run["reason"], steps, marks()) == ("skipped", "condition", {}, [])


# Ends before the end.

def test_fail_fast_ends_the_siblings_and_lets_what_cleans_up_run(store, tmp_path):
    began = time.monotonic()
    run, steps = perform(
        store, ("bad", f"while [ ! -e {tmp_path}/on ]; do sleep 0.01; done; exit 2"),
        ("long", f"touch {tmp_path}/on; sleep 600"), ("later", "true", "long"),
        ("next", "sleep 600"),
        {"id": "clean", "command": "true", "depends_on": {"bad": "finished", "long": "finished"}},
        ("more", "true", "clean"), fail_fast=True, parallel=2)
    assert ends(steps) == {"bad": "exit", "long": "fail_fast", "later": "dependency",
                           "next": "fail_fast", "clean": "succeeded", "more": "fail_fast"}
    assert (run["state"], run["exit_code"]) == ("failed", 2)
    assert time.monotonic() - began < 300


def test_the_timeout_of_the_whole_ends_all_steps(store, marks):
    run, steps = perform(store, ("a", "sleep 600"), ("b", "sleep 600 & wait"), ("c", "true", "a"),
                         {"id": "d", "command": f"echo d >> {marks.path}",
                          "depends_on": {"a": "finished"}}, timeout=0.3)
    assert (run["state"], run["reason"]) == ("timed_out", "timeout")
    assert roexec.exit_status(run) == 124
    assert ends(steps) == {"a": "parent", "b": "parent", "c": "dependency", "d": "parent"}
    assert marks() == []
    wait_for(lambda: not descendants())         # supervisors that were not needed end a little later


def test_a_retry_of_the_whole_repeats_what_failed_and_keeps_the_rest(store, marks, tmp_path):
    run, steps = perform(
        store, ("a", f"echo a >> {marks.path}; echo V=1 >> $ROEXEC_OUTPUT"),
        ("b", f"echo b$V >> {marks.path}; test -e {tmp_path}/once || ! touch {tmp_path}/once", "a"),
        ("c", f"echo c$V >> {marks.path}", "b"), retries=1, backoff=0,
        hooks={"on_retry": f"echo again >> {marks.path}"})
    assert marks() == ["a", "b1", "again", "b1", "c1"]
    assert run["state"] == "succeeded" and len(read_attempts(store, run["id"])) == 2
    assert ends(steps) == {"a": "succeeded", "b": "succeeded", "c": "succeeded"}
    assert [row["state"] for row in read_runs(store, parent=run["id"], step="b")] == [
        "failed", "succeeded"]


# What steps hand on.

@pytest.mark.parametrize("text, values", [
    ("", {}), ("A=1\n", {"A": "1"}), ("A=1", {"A": "1"}), ("A=", {"A": ""}),
    ("A= x y = z \n\nB=$A `x` \"q\"\n", {"A": " x y = z ", "B": "$A `x` \"q\""}),
    ("A<<E\nx\n\n y\nE\nB=2\n", {"A": "x\n\n y", "B": "2"}), ("A<<E\nE\n", {"A": ""}),
    ("A<<\nx\n\n", {"A": "x"}), ("A=1\nA=2\n", {"A": "2"}), ("A=x<<y\n", {"A": "x<<y"}),
    ("GITHUB_REF=x\nLDAP_URL=y\n", {"GITHUB_REF": "x", "LDAP_URL": "y"}),
    ("A=ü\r\n", {"A": "ü\r"}), ("A<<E\nB=1\nE=\nE\n", {"A": "B=1\nE="})])
def test_what_outputs_are(text, values):
    assert parse_outputs(text.encode()) == values


@pytest.mark.parametrize("data, problem", [
    (b"A", "line 1 is neither NAME=VALUE nor NAME<<MARK"),
    (b"A=1\n B=2", "line 2 is neither"), (b"A B=2", "line 1 is neither"), (b"1A=2", "line 1"),
    (b"=2", "line 1"), ("Ä=2".encode(), "line 1"), (b"A<<E\nx\n", "there is no line E that ends"),
    (b"A=\xff", "byte 2 is not of UTF-8"), (b"A=x\0y", "NUL"), (b"A=" + b"x" * 65537, "65536"),
    (b"A<<E\n" + b"x\n" * 40000 + b"E\n", "65536"), (b"\n" * (1 << 20) + b"A=1", "1048576 bytes"),
    (b"LD_PRELOAD=/x", "LD_PRELOAD is not for steps"), (b"PATH=/x", "PATH is not"),
    (b"BASH_ENV=x", "BASH_ENV"), (b"PYTHONPATH=x", "PYTHONPATH"), (b"ROEXEC_RUN_ID=x", "ROEXEC"),
    (b"GIT_SSH_COMMAND=x", "GIT_SSH_COMMAND"), (b"CLASSPATH=x", "CLASSPATH")],
    ids=lambda value: repr(value)[:20])
def test_what_outputs_cannot_be(data, problem):
    with pytest.raises(ValueError) as caught:
        parse_outputs(data)
    assert problem in str(caught.value)


def test_outputs_reach_the_steps_that_need_them_and_the_hooks(store, marks):
    write = 'printf "%s\\n" >> $ROEXEC_OUTPUT '
    show = f'echo "$ROEXEC_STEP:$A:$B:$C" >> {marks.path}'
    run, steps = perform(
        store, ("a", f"echo A=a >> $ROEXEC_OUTPUT; echo B=a >> $ROEXEC_OUTPUT"),
        ("b", "echo B=b >> $ROEXEC_OUTPUT; printf 'C<<X\\n1\\n2\\nX\\n' >> $ROEXEC_OUTPUT", "a"),
        ("c", show, "b"), ("d", f"sleep 0.2; {show}"), ("e", show, "a"),
        hooks={"on_success": show.replace("$ROEXEC_STEP", "hook")}, parallel=2)
    assert write and run["state"] == "succeeded"
    assert sorted("\n".join(marks()).replace("\n2", " 2").splitlines()) == [
        "c:a:b:1 2", "d:::", "e:a:a:", "hook:a:b:1 2"]
    assert json.loads(steps["b"]["outputs"]) == {"B": "b", "C": "1\n2"}


def test_the_order_of_strength_of_variables(store, marks):
    show = f'echo "$E,$P,$O,$G" >> {marks.path}'
    perform(store, ("a", "for n in E P O G; do echo $n=output >> $ROEXEC_OUTPUT; done"),
            ("b", show, "a"), ("c", show), env={"G": "given"}, parallel=1,
            params={"P": "param", "O": "param", "G": "param"})
    assert sorted(marks()) == [",param,param,given", "output,output,output,given"]


def test_each_attempt_begins_with_no_outputs_and_only_success_counts(store, marks):
    run, steps = perform(
        store, {"id": "a", "retries": 1, "backoff": 0, "command":
                "echo N$ROEXEC_ATTEMPT=x >> $ROEXEC_OUTPUT; test $ROEXEC_ATTEMPT = 2"},
        ("b", "echo B=x >> $ROEXEC_OUTPUT; false"),
        {"id": "c", "command": f"env | grep -c '^[NB][12]*=' >> {marks.path}",
         "depends_on": {"a": "succeeded", "b": "failed"}})
    assert marks() == ["1"] and steps["b"]["outputs"] is None
    assert json.loads(steps["a"]["outputs"]) == {"N2": "x"}


@pytest.mark.parametrize("write", ["echo nonsense", "echo LD_PRELOAD=/tmp/x", "printf 'A=\\377'",
                                   "head -c 2000000 /dev/zero"])
def test_outputs_that_are_wrong_fail_the_step(store, write):
    run, steps = perform(store, ("a", f"{write} >> $ROEXEC_OUTPUT"), ("b", "true", "a"))
    assert ends(steps) == {"a": "outputs", "b": "dependency"} and run["state"] == "failed"
    assert "ROEXEC_OUTPUT: " in steps["a"]["message"] and "ROEXEC_OUTPUT: " in read_log_of(
        store, steps["a"]["id"])


def test_an_output_file_that_is_a_link_is_not_followed(store, tmp_path):
    (tmp_path / "secret").write_text("A=1\n")
    run, steps = perform(store, ("a", f"rm $ROEXEC_OUTPUT; ln -s {tmp_path}/secret $ROEXEC_OUTPUT"))
    assert ends(steps) == {"a": "outputs"} and (tmp_path / "secret").exists()


def test_steps_share_a_folder_that_stays_after_the_run(store, marks):
    run, _ = perform(store, ("a", "echo hi > $ROEXEC_WORKDIR/x"),
                     ("b", f"cat $ROEXEC_WORKDIR/x >> {marks.path}", "a"),
                     hooks={"post_run": f"cat $ROEXEC_WORKDIR/x >> {marks.path}"})
    assert marks() == ["hi", "hi"] and os.listdir(store.file(f"work/{run['id']}")) == ["scratch"]
    assert os.stat(store.file(f"work/{run['id']}")).st_mode & 0o077 == 0


def test_the_folder_of_a_run_goes_with_its_log_and_not_while_a_retry_uses_it(store, cli, tmp_path):
    apply(store, pipeline(*FAILING))
    cli("run", "p")
    first = read_runs(store, step=None)[0]["id"]
    again = cli("retry", "p", "--env", "FAIL=0")[1].strip()
    cli("wait", again)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    os.symlink(elsewhere, store.file("work/gone"))
    with store.write() as db:
        roexec.set_log(db, first, None)
    roexec.remove_unused_work(store)
    assert os.listdir(store.file("work")) == [first] and not elsewhere.exists()
    with store.write() as db:
        roexec.set_log(db, again, None)
    roexec.remove_unused_work(store)
    assert os.listdir(store.file("work")) == []


# Secrets.

SECRET = "s3cr3t-Wert-4711"


def grep(folder, text):
    """The files below a folder that contain a text."""
    found = []
    for path, _, names in os.walk(folder):
        for name in names:
            if name != "wake":          # a FIFO
                with open(os.path.join(path, name), "rb") as file:
                    if text.encode() in file.read():
                        found.append(name)
    return found


def test_a_secret_param_reaches_steps_and_nothing_on_disk(store, marks):
    run, steps = perform(
        store, ("a", f'echo got $TOKEN; test "$TOKEN" = {SECRET[:4]}"{SECRET[4:]}"'),
        ("b", "echo $TOKEN; kill -9 $PPID; sleep 5"),
        ("c", 'test -n "$TOKEN"; echo $? >> ' + str(marks.path), "a"),
        params={"TOKEN": {"secret": True}}, env={"TOKEN": None}, given={"TOKEN": SECRET},
        hooks={"post_run": 'echo $TOKEN; test -n "$TOKEN"; echo $? >> ' + str(marks.path)})
    assert marks() == ["0", "0"] and ends(steps) == {"a": "succeeded", "b": "supervisor",
                                                     "c": "succeeded"}
    assert output_of(store, steps["a"]) == "got ***\n"
    assert grep(store.folder, SECRET) == []


def test_an_output_that_contains_a_secret_fails_the_step(store):
    run, steps = perform(store, ("a", "echo A=x$TOKEN >> $ROEXEC_OUTPUT"),
                         params={"TOKEN": {"secret": True}}, env={"TOKEN": None},
                         given={"TOKEN": SECRET})
    assert ends(steps) == {"a": "outputs"} and grep(store.folder, SECRET) == []


def test_a_run_whose_secret_is_gone_fails_and_says_so(store):
    run, steps = perform(store, ("a", "true"), params={"T": {"secret": True}}, env={"T": None})
    assert (run["state"], run["reason"], steps) == ("failed", "secret", {})
    assert "the value of T was given when the run was asked for" in run["message"]


# Kills.

def owners(store, run_id):
    """{step or None: pid of the supervisor} of a run and its steps that are on."""
    pids = {}
    for name in os.listdir(store.file("active")):
        journal = Journal.glance(store.file(f"active/{name}")) if name.count(".") < 2 else None
        supervisor = journal and journal.header and roexec.Progress(journal.events).supervisor
        if supervisor and run_id in (journal.header["run"], journal.header.get("parent")) \
                and roexec.process_start(supervisor["pid"]) == supervisor["start"]:
            pids[journal.header.get("step")] = supervisor["pid"]
    return pids


def waiting_pipeline(marks, tmp_path, **more):
    """a, then b which waits for a file, beside c, then d: each marks its start and its end."""
    command = "echo +$ROEXEC_STEP >> {0}; {1} echo -$ROEXEC_STEP >> {0}"
    wait = f"while [ ! -e {tmp_path}/go ]; do sleep 0.02; done;"
    plain, waits = command.format(marks.path, ""), command.format(marks.path, wait)
    return pipeline(("a", plain + "; echo V=1 >> $ROEXEC_OUTPUT"), ("b", waits, "a"), ("c", plain),
                    ("d", plain + "; test $V = 1", "b"), **more)


ALL_ONCE = sorted(f"{sign}{step}" for sign in "+-" for step in "abcd")


@pytest.mark.parametrize("whom", ["server", "coordinator", "server, coordinator"])
def test_what_is_killed_in_the_middle_goes_on_and_repeats_nothing(store, start, marks, tmp_path,
                                                                  whom):
    apply(store, waiting_pipeline(marks, tmp_path))
    server = start()
    run_id = roexec.request_run(store, roexec_job(store), trigger="manual")
    wait_for(lambda: "+b" in marks() and "-c" in marks())
    pids = owners(store, run_id)
    if "server" in whom:
        server.kill()
    if "coordinator" in whom:
        os.kill(pids[None], signal.SIGKILL)
    if "server" in whom:
        server = start()
    wait_for(lambda: owners(store, run_id).get(None) not in (None, pids[None])
             or "coordinator" not in whom)
    (tmp_path / "go").touch()
    run = await_state(store, run_id, *roexec.FINAL_STATES)
    assert (run["state"], sorted(marks())) == ("succeeded", ALL_ONCE), server.said
    assert set(ends(steps_of(store, run_id)).values()) == {"succeeded"}
    wait_for(lambda: os.listdir(store.file("active")) == [])
    server.stop()


def roexec_job(store):
    with store.read() as db:
        return roexec.effective_job(db, "p")


@pytest.mark.parametrize("with_coordinator", [False, True])
@pytest.mark.parametrize("if_lost", ["fail", "rerun"])
def test_a_step_whose_supervisor_is_killed_is_lost_unless_it_says_rerun(
        store, start, marks, tmp_path, if_lost, with_coordinator):
    job = waiting_pipeline(marks, tmp_path)
    spec = [{**step, "backoff": 0, **({"if_lost": if_lost} if step["id"] == "b" else {})}
            for step in job.spec["pipeline"]]
    apply(store, Job({**job.spec, "pipeline": spec}))
    server = start()
    run_id = roexec.request_run(store, roexec_job(store), trigger="manual")
    wait_for(lambda: "+b" in marks() and "-c" in marks())
    pids = owners(store, run_id)
    os.kill(pids["b"], signal.SIGKILL)
    if with_coordinator:
        os.kill(pids[None], signal.SIGKILL)
    if if_lost == "rerun":
        wait_for(lambda: marks().count("+b") == 2)
        (tmp_path / "go").touch()
    run = await_state(store, run_id, *roexec.FINAL_STATES)
    lost = if_lost == "fail"
    assert run["state"] == ("failed" if lost else "succeeded"), server.said
    assert ends(steps_of(store, run_id)) == {
        "a": "succeeded", "b": "supervisor" if lost else "succeeded", "c": "succeeded",
        "d": "dependency" if lost else "succeeded"}
    assert [marks().count(mark) for mark in ("+a", "-a", "-b", "+c")] == [1, 1, not lost, 1]
    wait_for(lambda: os.listdir(store.file("active")) == [])
    server.stop()


def test_all_processes_killed_at_once_leave_what_was_finished(store, start, marks, tmp_path):
    apply(store, waiting_pipeline(marks, tmp_path))
    server = start()
    run_id = roexec.request_run(store, roexec_job(store), trigger="manual")
    wait_for(lambda: "+b" in marks() and ends(steps_of(store, run_id)).get("c") == "succeeded")
    found = descendants() - {server.pid}
    for pid, number in [(server.pid, signal.SIGSTOP), *((pid, number) for number in (
            signal.SIGSTOP, signal.SIGKILL) for pid in found)]:
        try:
            os.kill(pid, number)        # none sees the end of another
        except ProcessLookupError:      # it was the child of one that is gone
            pass
    server.kill()
    server = start()
    run = await_state(store, run_id, *roexec.FINAL_STATES)
    assert (run["state"], run["exit_code"]) == ("failed", 125)
    assert ends(steps_of(store, run_id)) == {"a": "succeeded", "b": "supervisor", "c": "succeeded",
                                             "d": "dependency"}
    assert sorted(marks()) == ["+a", "+b", "+c", "-a", "-c"]
    server.stop()


@pytest.mark.parametrize("call", ["note", "create", "send_run", "step_end", "fdatasync", "fork"])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_coordinator_killed_at_any_call_starts_no_step_twice(store, start, marks, call, number):
    """It is killed at the n-th of its calls; the next one goes on."""
    mark = "echo +$ROEXEC_STEP >> {0}; sleep 0.02; echo -$ROEXEC_STEP >> {0}".format(marks.path)
    job = pipeline(("a", mark), ("b", mark, "a"), ("c", mark, "a"), ("d", mark, "b", "c"))
    journal = claimed(store, job)
    run_id = journal.run_id
    calls = iter(range(1, 1000))

    def dying(function, own):
        def call(*values, **more):
            if os.getpid() == own and "starting" in str(
                    Journal.glance(store.file(f"active/{run_id}")).events) and \
                    next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*values, **more)
        return call

    def coordinate():
        own = os.getpid()
        place = {"note": roexec.Journal, "create": roexec.Journal, "fdatasync": os,
                 "fork": os}.get(call, roexec)
        function = dying(getattr(place, call), own)
        setattr(place, call, staticmethod(function) if call == "create" else function)
        roexec.become_subreaper()
        roexec.perform_run(journal, store.folder, roexec.Signals())
    pid = in_child(coordinate)
    journal.close()
    wait_for(lambda: not is_alive(pid))
    server = start()
    run = await_state(store, run_id, *roexec.FINAL_STATES)
    assert all(marks().count(mark) <= 1 for mark in ALL_ONCE)
    if run["state"] == "succeeded":
        assert sorted(marks()) == ALL_ONCE
    else:
        assert "supervisor" in ends(steps_of(store, run_id)).values()
    assert call == "send_run" or run["state"] == "succeeded", ends(steps_of(store, run_id))
    server.stop()


def test_a_cancel_ends_the_tree_of_every_step(store, start, marks, tmp_path):
    sleeper = f"sleep 600 & echo $! > {tmp_path}/$ROEXEC_STEP; wait"
    apply(store, pipeline(("a", sleeper), ("b", sleeper), ("c", "true", "a"), hooks={
        "post_run": f"echo $ROEXEC_STATUS >> {marks.path}"}))
    server = start()
    run_id = roexec.request_run(store, roexec_job(store), trigger="manual")
    pids = [read_pid(tmp_path / "a"), read_pid(tmp_path / "b")]
    roexec.cancel_run(store, run_id)
    run = await_state(store, run_id, *roexec.FINAL_STATES)
    assert (run["state"], run["reason"]) == ("cancelled", "user")
    assert ends(steps_of(store, run_id)) == {"a": "parent", "b": "parent", "c": "dependency"}
    assert not any(map(is_alive, pids)) and marks() == ["cancelled"]
    server.stop()


def test_a_cancel_holds_also_where_the_coordinator_was_killed(store, start, tmp_path):
    sleeper = f"echo $$ > {tmp_path}/$ROEXEC_STEP; exec sleep 600"
    apply(store, pipeline(("a", sleeper), ("b", sleeper)))
    server = start()
    run_id = roexec.request_run(store, roexec_job(store), trigger="manual")
    pids = [read_pid(tmp_path / "a"), read_pid(tmp_path / "b")]
    coordinator = owners(store, run_id)[None]
    os.kill(coordinator, signal.SIGSTOP)        # a server tells it of cancels again and again
    with store.write() as db:
        roexec.ask_to_cancel(db, run_id, "user")
    os.kill(coordinator, signal.SIGKILL)
    run = await_state(store, run_id, *roexec.FINAL_STATES)
    assert (run["state"], run["reason"]) == ("cancelled", "user"), server.said
    assert not any(map(is_alive, pids))
    server.stop()


def test_one_step_can_be_cancelled_alone(store, start, tmp_path):
    apply(store, pipeline(("a", f"echo $$ > {tmp_path}/a; exec sleep 600"), ("b", "true", "a"),
                          ("c", "true")))
    server = start()
    run_id = roexec.request_run(store, roexec_job(store), trigger="manual")
    read_pid(tmp_path / "a")
    steps = steps_of(store, run_id)
    with pytest.raises(roexec.RoexecError, match="step b was not begun; cancel its pipeline"):
        roexec.cancel_run(store, steps["b"]["id"])
    roexec.cancel_run(store, steps["a"]["id"])
    run = await_state(store, run_id, *roexec.FINAL_STATES)
    assert (run["state"], run["exit_code"]) == ("failed", 130)
    assert ends(steps_of(store, run_id)) == {"a": "user", "b": "dependency", "c": "succeeded"}
    server.stop()


def test_after_a_power_cut_finished_steps_count_and_started_ones_are_lost(store, marks,
                                                                          monkeypatch):
    mark = f"echo $ROEXEC_STEP >> {marks.path}"
    job = pipeline(("a", mark), ("b", mark, "a"), ("c", mark), ("d", mark), {
        "id": "e", "command": mark, "if_lost": "rerun", "backoff": 0})
    journal = claimed(store, job)
    before, header = roexec.boot_id(), journal.header
    journal.note("supervisor", pid=1, start=1, log=None)
    journal.note("starting", what="attempt")
    for step in "acde":
        journal.note("step", step=step, run=header["steps"][step], boot=before)
        if step != "d":                 # of d, nothing has reached the disk
            of_step = Journal.create(store.file("active"), {
                **header, "run": header["steps"][step], "parent": header["run"], "step": step,
                "spec": job.steps()[step].spec, "steps": None, "outputs": {}})
            of_step.note("supervisor", pid=1, start=1, log=None)
            of_step.note("starting", what="attempt")
            if step == "a":
                of_step.note("ended", exit_code=0)
                of_step.note("outcome", state="succeeded", reason=None)
                of_step.note("finished")
            of_step.close()
    monkeypatch.setattr(roexec, "boot_id", lambda: "another-boot")
    run = supervise(store, journal)
    assert ends(steps_of(store, run["id"])) == {"a": "succeeded", "b": "succeeded", "c": "power",
                                                "d": "power", "e": "succeeded"}
    assert sorted(marks()) == ["b", "e"] and run["state"] == "failed"


@pytest.mark.parametrize("seed", range(3))
def test_kills_at_random_lose_no_step_and_repeat_none(store, start, marks, seed):
    chance = random.Random(seed)
    mark = "echo $ROEXEC_STEP >> {0}; sleep 0.0$(( $$ % 9 ))".format(marks.path)
    steps = [{"id": f"s{number}", "command": mark, "depends_on": {
        f"s{chance.randrange(number)}": "finished" for _ in range(min(number, 2))}}
        for number in range(25)]
    apply(store, pipeline(*steps, parallel=4))
    server = start()
    run_id = roexec.request_run(store, roexec_job(store), trigger="manual")
    for _ in range(6):
        time.sleep(chance.random() / 8)
        chosen = chance.choice(["server", "coordinator", "step", "all"])
        pids = owners(store, run_id)
        for step, pid in pids.items():
            if chosen == "all" or (step is None) == (chosen == "coordinator") and (
                    chosen != "server"):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        if chosen in ("server", "all"):
            server.kill()
            server = start()
    run = await_state(store, run_id, *roexec.FINAL_STATES, seconds=60)
    rows = steps_of(store, run_id)
    assert len(rows) == 25 and {row["state"] for row in rows.values()} <= {"succeeded", "lost"}
    assert len(marks()) == len(set(marks())), marks()
    assert {step for step, row in rows.items() if row["state"] == "succeeded"} <= set(marks())
    assert run["state"] == ("succeeded" if len(marks()) == 25 and "lost" not in {
        row["state"] for row in rows.values()} else "failed")
    server.stop()


def test_the_log_of_a_step_is_kept_as_that_of_a_run_while_its_pipeline_is_on(store, tmp_path):
    job = pipeline(("a", "echo out"), ("b", f": > {tmp_path}/on; sleep 600", "a"),
                   log={"keep": "1h"})
    apply(store, job)
    journal = claimed(store, job)
    pid = in_child(lambda: roexec.perform_run(journal, store.folder, roexec.Signals()))
    journal.close()
    wait_for((tmp_path / "on").exists)
    logs, _ = roexec.list_logs(store.folder, "p")
    assert len(logs) == 3
    for path in logs:
        os.utime(store.file(path), (0, 0))
    roexec.Upkeep(store, None).tend_files()
    assert roexec.list_logs(store.folder, "p")[0].keys() == logs.keys()
    os.kill(pid, signal.SIGTERM)


# Runs of other jobs.

def with_other(step=None, **other):
    """A pipeline with a step that runs the job `other`, and that job."""
    return (pipeline({"id": "a", "job": "other", **(step or {})}, ("b", "true", "a")),
            Job({"id": "other", "command": "true", "directory": "/", **other}))


@pytest.mark.parametrize("command, end, whole", [
    ("true", ("succeeded", None, 0), "succeeded"), ("exit 3", ("failed", "exit", 3), "failed")])
def test_a_step_can_be_the_run_of_another_job(store, start, command, end, whole):
    apply(store, *with_other(command=command))
    server = start()
    run_id = roexec.request_run(store, roexec_job(store), trigger="manual")
    run = await_state(store, run_id, *roexec.FINAL_STATES)
    step, other = steps_of(store, run_id)["a"], read_runs(store, job_id="other")[0]
    assert run["state"] == whole, server.said
    assert (step["state"], step["reason"], step["exit_code"]) == end
    assert (other["state"], other["reason"], other["exit_code"]) == end
    assert (other["parent"], other["step"], other["trigger"]) == (run_id, None, "pipeline")
    assert step["message"] == f"run {other['id']}"
    wait_for(lambda: os.listdir(store.file("active")) == [])
    server.stop()


def test_the_other_job_gets_its_variables_and_takes_no_global_place(store, start, marks):
    apply(store, *with_other({"env": {"X": "1"}}, command=f"echo $X >> {marks.path}",
                             params={"X": {"type": "integer"}}))
    server = start(settings={"scheduler": {"max_concurrent": 1}})
    run_id = roexec.request_run(store, roexec_job(store), trigger="manual")
    assert await_state(store, run_id, *roexec.FINAL_STATES)["state"] == "succeeded", server.said
    assert marks() == ["1"]
    server.stop()


def test_the_other_job_waits_for_its_own_places(store, start, tmp_path):
    apply(store, *with_other(command=f"while [ ! -e {tmp_path}/go ]; do sleep 0.02; done"))
    server = start()
    with store.read() as db:
        first = roexec.request_run(store, roexec.effective_job(db, "other"), trigger="manual")
    await_state(store, first, "running")
    run_id = roexec.request_run(store, roexec_job(store), trigger="manual")
    second = wait_for(lambda: next(iter(read_runs(store, job_id="other", parent=run_id)), None))
    assert read_run(store, second["id"])["state"] == "queued"
    (tmp_path / "go").touch()
    assert await_state(store, run_id, *roexec.FINAL_STATES)["state"] == "succeeded", server.said
    server.stop()


@pytest.mark.parametrize("env, problem", [
    (None, "the parameter X has no default"), ({"X": "y"}, 'X is not an integer (it is "y")')])
def test_another_job_that_cannot_start_fails_the_step(store, start, env, problem):
    apply(store, *with_other({"env": env} if env else {}, params={"X": {"type": "integer"}}))
    server = start()
    run_id = roexec.request_run(store, roexec_job(store), trigger="manual")
    assert await_state(store, run_id, *roexec.FINAL_STATES)["state"] == "failed"
    step = steps_of(store, run_id)["a"]
    assert (step["state"], step["reason"]) == ("failed", "start") and problem in step["message"]
    server.stop()


def test_an_unknown_job_fails_the_step(store, start):
    apply(store, with_other()[0])
    server = start()
    run_id = roexec.request_run(store, roexec_job(store), trigger="manual")
    assert await_state(store, run_id, *roexec.FINAL_STATES)["state"] == "failed"
    assert steps_of(store, run_id)["a"]["message"] == 'there is no job "other"'
    server.stop()


@pytest.mark.parametrize("how", ["cancel", "timeout"])
def test_the_other_run_ends_with_the_step(store, start, tmp_path, monkeypatch, how):
    run_job = roexec._StepRun._run_job

    def run_once_it_is_on(step):        # from when on its timeout counts
        read_pid(tmp_path / "pid")
        step.progress.attempts[0]["started_at"] = time.time()
        return run_job(step)
    if how == "timeout":
        monkeypatch.setattr(roexec._StepRun, "_run_job", run_once_it_is_on)
    apply(store, *with_other({"timeout": 0.5} if how == "timeout" else {},
                             command=f"echo $$ > {tmp_path}/pid; exec sleep 600"))
    server = start()
    run_id = roexec.request_run(store, roexec_job(store), trigger="manual")
    pid = read_pid(tmp_path / "pid")
    if how == "cancel":
        roexec.cancel_run(store, run_id)
    run = await_state(store, run_id, *roexec.FINAL_STATES)
    other = read_runs(store, job_id="other")[0]
    assert (other["state"], other["reason"]) == ("cancelled", "parent") and not is_alive(pid)
    assert ends(steps_of(store, run_id))["a"] == ("parent" if how == "cancel" else "timeout")
    assert run["state"] == ("cancelled" if how == "cancel" else "failed")
    server.stop()


def test_the_other_run_ends_with_the_step_also_where_a_server_starts_long_after(store, start,
                                                                              tmp_path):
    apply(store, *with_other(command=f"echo $$ > {tmp_path}/pid; exec sleep 600"))
    server = start()
    run_id = roexec.request_run(store, roexec_job(store), trigger="manual")
    pid = read_pid(tmp_path / "pid")
    server.stop()
    roexec.cancel_run(store, run_id)
    wait_for(lambda: roexec.settle(store) or read_run(store, run_id)["state"] == "cancelled")
    for name in os.listdir(store.file("active")):
        os.utime(store.file(f"active/{name}"), (0, 0))
    server = start()
    other = await_state(store, read_runs(store, job_id="other")[0]["id"], *roexec.FINAL_STATES)
    assert (other["state"], other["reason"]) == ("cancelled", "parent") and not is_alive(pid)
    wait_for(lambda: os.listdir(store.file("active")) == [])
    server.stop()


def test_what_a_step_has_asked_for_is_not_begun_once_nobody_waits_for_it(store, start):
    apply(store, *with_other())
    request = {"step": "gone", "parent": "lost", "job": "other", "env": {}, "cancel": None}
    with open(store.file("active/lost.gone.request"), "w") as file:
        json.dump(request, file)
    server = start()
    wait_for(lambda: os.listdir(store.file("active")) == [])
    assert not read_runs(store, job_id="other")
    server.stop()


def test_a_step_waits_for_a_server_and_its_timeout_counts(store):
    apply(store, with_other({"timeout": 0.3})[0])
    run, steps = perform(store, {"id": "a", "job": "other", "timeout": 0.3})
    assert ends(steps) == {"a": "timeout"} and run["state"] == "failed"


def test_a_step_ends_at_once_whose_request_was_withdrawn_before_it_was_seen_to(store, start,
                                                                            monkeypatch):
    monkeypatch.setattr(roexec, "_PATIENCE_FOR_JOBS", 3600)
    answer = roexec._answer_request
    monkeypatch.setattr(roexec, "_answer_request", lambda db, store, path, request:
                        request["cancel"] and answer(db, store, path, request))
    apply(store, *with_other())
    server = start()
    run_id = roexec.request_run(store, roexec_job(store), trigger="manual")
    wait_for(lambda: any(name.endswith(".request") for name in os.listdir(store.file("active"))))
    roexec.cancel_run(store, run_id)
    assert await_state(store, run_id, *roexec.FINAL_STATES)["state"] == "cancelled", server.said
    assert ends(steps_of(store, run_id))["a"] == "parent" and not read_runs(store, job_id="other")
    server.stop()


def test_a_step_whose_supervisor_was_lost_before_it_asked_for_its_job_asks_again(store, start,
                                                                              tmp_path, monkeypatch):
    ask = roexec._StepRun._ask

    def ask_or_die(step, cancel=None):
        if not os.path.exists(tmp_path / "died"):
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        ask(step, cancel)
    monkeypatch.setattr(roexec._StepRun, "_ask", ask_or_die)
    apply(store, *with_other())
    server = start()
    run_id = roexec.request_run(store, roexec_job(store), trigger="manual")
    assert await_state(store, run_id, *roexec.FINAL_STATES)["state"] == "succeeded", server.said
    assert len(read_runs(store, job_id="other")) == 1
    server.stop()


@pytest.mark.parametrize("whom", ["server", "coordinator", "step", "all"])
def test_a_step_that_waits_for_another_job_survives_kills(store, start, marks, tmp_path, whom):
    wait = f"while [ ! -e {tmp_path}/go ]; do sleep 0.02; done"
    apply(store, *with_other(command=f"echo ran >> {marks.path}; {wait}"))
    server = start()
    run_id = roexec.request_run(store, roexec_job(store), trigger="manual")
    wait_for(marks)
    pids = owners(store, run_id)
    for step, pid in pids.items():
        if whom == "all" or whom == ("step" if step else "coordinator"):
            os.kill(pid, signal.SIGKILL)
    if whom in ("server", "all"):
        server.kill()
        server = start()
    (tmp_path / "go").touch()
    run = await_state(store, run_id, *roexec.FINAL_STATES)
    assert (run["state"], marks()) == ("succeeded", ["ran"]), (run, server.said)
    server.stop()


def test_a_pipeline_that_would_start_itself_is_refused_when_it_is_applied(store):
    apply(store, Job({"id": "q", "pipeline": [{"id": "x", "job": "p"}]}))
    with pytest.raises(roexec.RoexecError, match="would start itself: (p -> q -> p|q -> p -> q)"):
        apply(store, pipeline({"id": "a", "job": "q"}))


# What a person sees, and does again.

@pytest.fixture
def cli(store, capfd):
    """`cli(word, …)` performs a command line here -> (status, what it has printed, and said)."""
    def call(*words):
        status = roexec.main(["--store", store.path, *words])
        return (status, *capfd.readouterr())
    return call


FAILING = (("a", "echo from a; echo V=1 >> $ROEXEC_OUTPUT; touch $ROEXEC_WORKDIR/made"),
           ("b", "echo from b; test -e $ROEXEC_WORKDIR/made; exit ${FAIL-$V}", "a"),
           ("c", "echo from c; sleep 0.05"), ("d", "echo from d", "b", "c"))


def test_a_retry_repeats_only_what_failed_with_the_outputs_of_the_rest(store, cli):
    apply(store, pipeline(*FAILING))
    assert cli("run", "p")[0] == 1
    first = read_runs(store, job_id="p", step=None)[0]
    assert cli("retry", "p", "--dry-run")[1] == "p: would run b, d (dry run)\n"
    again = cli("retry", "p", "--env", "FAIL=0")[1].strip()
    assert cli("wait", again)[0] == 0
    run = read_run(store, again)
    assert (run["retry_of"], run["parent"], run["work"]) == (first["id"], None, first["id"])
    assert list(steps_of(store, again)) == ["b", "d"]
    assert cli("retry", "p") == (
        1, "", f"roexec: no step of run {again} has failed; name the first to be repeated with "
               "--from, or write --all\n")


@pytest.mark.parametrize("options, repeated", [
    (["--from", "c"], ["b", "c", "d"]), (["--from", "b"], ["b", "d"]),
    (["--all"], ["a", "b", "c", "d"])])
def test_a_retry_can_repeat_more(store, cli, options, repeated):
    apply(store, pipeline(*FAILING))
    cli("run", "p")
    again = cli("retry", "p", "--env", "FAIL=0", *options)[1].strip()
    assert cli("wait", again)[0] == 0 and list(steps_of(store, again)) == repeated
    assert (read_run(store, again)["work"] == again) is (options == ["--all"])


def test_a_retry_of_a_step_is_one_of_its_pipeline_from_there(store, cli):
    apply(store, pipeline(*FAILING))
    cli("run", "p")
    step = steps_of(store, read_runs(store, step=None)[0]["id"])["c"]
    assert cli("retry", step["id"], "--dry-run")[1] == "p: would run b, c, d (dry run)\n"
    assert "there is no step" in cli("retry", "p", "--from", "x")[2]


def test_a_retry_of_a_retry_takes_over_from_both(store, cli):
    apply(store, pipeline(*FAILING))
    cli("run", "p")
    again = cli("retry", "p")[1].strip()
    assert cli("wait", again)[0] == 1
    third = cli("retry", "p", "--env", "FAIL=0")[1].strip()
    assert cli("wait", third)[0] == 0 and list(steps_of(store, third)) == ["b", "d"]


def test_the_graph_of_a_run_is_shown_in_text(store, cli):
    apply(store, pipeline(*FAILING))
    cli("run", "p")
    again = cli("retry", "p", "--env", "FAIL=0")[1].strip()
    cli("wait", again)
    first = read_runs(store, job_id="p", step=None)[0]["id"]
    lines = cli("show", again)[1].splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("STEP"))
    rows = [line.replace("`- ", "`-").split() for line in lines[begin + 1:begin + 5]]
    assert [(row[0], row[1]) for row in rows] == [
        ("a", "succeeded"), ("`-b", "succeeded"), ("`-d", "succeeded"), ("c", "succeeded")]
    assert lines[begin + 1].endswith(f"of run {first}") and "b, c" in lines[begin + 3]
    shown = json.loads(cli("show", again, "--json")[1])["steps"]
    assert [(step["step"], step["parent"]) for step in shown] == [
        ("a", first), ("b", again), ("c", first), ("d", again)]


@pytest.mark.parametrize("wanted, drawn", [
    ({"a": {}, "b": {"a": "succeeded"}, "c": {"a": "succeeded"}, "d": {"b": "failed"}},
     ["a", "|- b", "|  `- d", "`- c"]),
    ({"z": {"a": "succeeded"}, "a": {}}, ["a", "`- z"]),
    ({f"s{n}": {f"s{n - 1}": "succeeded"} if n else {} for n in range(300)}, None)])
def test_a_graph_is_drawn_below_what_is_waited_for(wanted, drawn):
    steps = [{**dict.fromkeys(("started_at", "duration", "exit_code", "signal", "reason", "message",
                               "retry_at")), "step": step, "depends_on": needs, "state": "queued",
              "attempts": [], "count": 1, "id": step, "parent": "r", "job_id": "p"}
             for step, needs in wanted.items()]
    lines = roexec.steps_text({"id": "r", "steps": steps}, roexec.Style()).splitlines()[1:]
    assert len(lines) == len(wanted)
    if drawn:
        assert [line.partition("  queued")[0].rstrip() for line in lines] == drawn


def test_the_log_of_the_whole_has_the_lines_of_its_steps_between_its_own(store, cli):
    apply(store, pipeline(*FAILING, {"id": "e", "command": "echo from e >&2; sleep 1.1; echo late",
                                     "depends_on": {"b": "failed", "c": "succeeded"}}))
    cli("run", "p")
    lines = [line.partition(" ")[2] for line in cli("logs", "p")[1].splitlines()]
    for step in "abce":
        begin = next(number for number, line in enumerate(lines) if f"Step {step} started" in line)
        end = next(number for number, line in enumerate(lines)
                   if f"Step {step} succeeded" in line or f"Step {step} failed" in line)
        own = [number for number, line in enumerate(lines) if f"] {step}: " in line]
        assert begin < min(own) and max(own) < end
    assert "[OUT] a: from a" in lines and "[ERR] e: from e" in lines
    assert cli("logs", "p", "--raw")[1].splitlines()[-1] == "late"
    assert cli("logs", "p", "--stream", "err")[1] == "from e\n"
    assert len(cli("logs", "p", "--tail", "3")[1].splitlines()) == 3
    assert cli("logs", "p", "--grep", "from b$")[1].count("\n") == 1


def test_a_log_that_is_followed_has_the_lines_of_steps_as_they_come(store, start, cli, tmp_path,
                                                                    monkeypatch):
    """The step goes on once its first line has come."""
    more = roexec._StoredGrowth.more

    def noted(log, *values):
        lines = more(log, *values)
        if b"hello" in b"".join(lines):
            (tmp_path / "go").touch()
        return lines
    monkeypatch.setattr(roexec._StoredGrowth, "more", noted)
    apply(store, pipeline(("a", f"echo hello; while [ ! -e {tmp_path}/go ]; do sleep 0.02; done; "
                                "echo bye"), timeout="60s"))
    server = start()
    run_id = roexec.request_run(store, roexec_job(store), trigger="manual")
    lines = cli("logs", run_id, "-f")[1]
    assert lines.index("a: hello") < lines.index("a: bye") < lines.index("Completed")
    server.stop()


def test_a_log_that_is_followed_has_the_lines_of_a_step_that_begins_late(store, start, cli, tmp_path,
                                                                        monkeypatch):
    """The pipeline has told of the step, whose supervisor has not begun a log yet."""
    look, begin, asked = roexec._log_of_step, roexec._StepRun._open_log, tmp_path / "asked"

    def look_first(*values):
        found = look(*values)
        asked.touch()
        return found

    def begin_late(step):
        wait_for(asked.exists)
        return begin(step)
    monkeypatch.setattr(roexec, "_log_of_step", look_first)
    monkeypatch.setattr(roexec._StepRun, "_open_log", begin_late)
    apply(store, pipeline(("a", "echo hello")))
    server = start()
    run_id = roexec.request_run(store, roexec_job(store), trigger="manual")
    lines = cli("logs", run_id, "-f")[1]
    assert lines.index("Step a started") < lines.index("a: hello") < lines.index("Step a succeeded")
    server.stop()


def test_steps_are_listed_only_when_asked_for(store, cli):
    apply(store, pipeline(*FAILING))
    cli("run", "p")
    assert len(cli("list", "runs")[1].splitlines()) == 2
    listed = cli("list", "runs", "--steps")[1]
    assert len(listed.splitlines()) == 6 and "p/d" in listed


def test_the_states_of_steps_are_seen_while_they_are_on(store, start, cli, tmp_path):
    apply(store, pipeline(("a", "true"), ("b", f"while [ ! -e {tmp_path}/go ]; do sleep 0.02; done",
                                          "a"), ("c", "true", "b")))
    server = start()
    run_id = roexec.request_run(store, roexec_job(store), trigger="manual")

    def seen():
        steps = json.loads(cli("show", run_id, "--json")[1]).get("steps", [])
        return [step["state"] for step in steps] == ["succeeded", "running", "queued"]
    wait_for(seen)
    wait_for(lambda: steps_of(store, run_id)["a"]["state"] == "succeeded")    # taken in already
    (tmp_path / "go").touch()
    assert await_state(store, run_id, *roexec.FINAL_STATES)["state"] == "succeeded"
    server.stop()


# Parameters of a start.

def test_what_is_given_is_checked_before_anything_starts(store, cli):
    apply(store, pipeline(("a", "true"), params={"N": {"type": "integer"}}))
    assert cli("run", "p")[::2] == (
        125, "roexec: the parameter N has no default; give it with --env N=VALUE\n")
    assert cli("run", "p", "--env", "N=x")[::2] == (
        125, 'roexec: the parameter N is not an integer (it is "x")\n')
    assert read_runs(store) == []
    assert cli("run", "p", "--env", "N=7")[0] == 0


def test_a_secret_given_on_the_command_line_is_kept_nowhere(store, cli, monkeypatch, marks):
    apply(store, pipeline(("a", f'test "$T" = {SECRET}; echo $? >> {marks.path}; echo "$T"; false'),
                          params={"T": {"secret": True}}))
    monkeypatch.setenv("T", SECRET)
    assert cli("run", "p", "--env", "T")[0] == 1 and marks() == ["0"]
    files = grep(store.folder, SECRET)
    assert files == ["roexec.db-wal"] or files == ["roexec.db"]     # the job itself tests for it
    assert "a: ***" in cli("logs", "p")[1]
    assert cli("retry", "p")[::2] == (1, "roexec: the value of T is kept nowhere; give it again: "
                                         "--env T\n")
    again = cli("retry", "p", "--env", "T")[1].strip()
    assert cli("wait", again)[0] == 1 and marks() == ["0", "0"]


def test_a_secret_given_to_a_server_reaches_the_run_and_nothing_on_disk(store, start, marks):
    command = f'test ${{#T}} = {len(SECRET)}; echo $? >> {marks.path}; echo "$T"'
    apply(store, pipeline(("a", command), params={"T": {"secret": True}}))

    def prepare(scheduler):
        run_id = roexec.request_run(scheduler.store, roexec_job(store), trigger="api",
                                    env={"T": SECRET})
        assert scheduler.store.given == {run_id: {"T": SECRET}}
    server = start(prepare=prepare)
    run_id = wait_for(lambda: read_runs(store))[0]["id"]
    assert await_state(store, run_id, *roexec.FINAL_STATES)["state"] == "succeeded", server.said
    wait_for(lambda: os.listdir(store.file("active")) == [])    # its files are removed after that
    assert marks() == ["0"] and grep(store.folder, SECRET) == []
    assert json.loads(read_run(store, run_id)["env"]) == {"T": None}
    server.stop()


def test_a_queued_run_that_has_lost_its_secret_fails_and_says_so(store, start):
    apply(store, Job({"id": "p", "command": "true", "directory": "/",
                      "params": {"T": {"secret": True}}}))
    run_id = roexec.request_run(store, roexec_job(store), trigger="api", env={"T": SECRET})
    server = start()
    run = await_state(store, run_id, *roexec.FINAL_STATES)
    assert (run["state"], run["reason"]) == ("failed", "secret")
    server.stop()
