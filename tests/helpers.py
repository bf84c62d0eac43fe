"""What the tests of processes share: stores, runs, servers, and waiting for something."""
import os
import signal
import sys
import time
import traceback

import roexec


def wait_for(condition, seconds=20, what="it did not happen in time"):
    """The first true value of `condition()`."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, what() if callable(what) else what
        time.sleep(0.004)


def make_job(command="true", job_id="x", **more):
    return roexec.Job({"id": job_id, "command": command, "directory": "/", **more})


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
    with open(store.file(read_run(store, run_id)["log"]), "rb") as file:
        return roexec.select_lines(file.read(), **how).decode(errors="replace")


def await_state(store, run_id, *states, seconds=20):
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


def descendants(of=None):
    """{pid} of all that descend from a process, which must be a subreaper; no zombies."""
    table, found = roexec.processes(), {of or os.getpid()}
    grew = True
    while grew:
        more = {pid for pid, process in table.items() if process.parent in found} - found
        found |= more
        grew = bool(more)
    return {pid for pid in found - {of or os.getpid()} if table[pid].alive}


def kill_descendants():
    """End all processes that a test has started, and reap them."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for pid in descendants():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)


def is_alive(pid):
    return roexec.process_start(pid) is not None


def read_pid(path):
    """The process id in a file, once it is there."""
    return int(wait_for(lambda: path.exists() and path.read_text().strip(), what=f"no {path}"))


class Server:
    """A server of a store, in a process of its own; `said` is what it has logged.

    `prepare(scheduler)` is called before it runs; with `wait` it is running when this returns.
    """

    def __init__(self, store, log, settings=None, prepare=None, wait=True):
        self.log = log
        log.write_text("")
        self.pid = in_child(lambda: self._serve(store, settings, prepare))
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
        with open(self.log, "a") as file:
            file.write(f"[{level}] {text}\n")

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
