"""The folder on disk and the only SQL: who may open it, one writer, and that nothing is lost."""
import ast
import contextlib
import fcntl
import json
import math
import os
import re
import resource
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import zoneinfo
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from helpers import end_of, in_child, make_job

import roexec
from roexec import (ACTIVE_STATES, FINAL_STATES, REASONS, STATES, Job, NoSuchJob, NoSuchRun,
                    RoexecError, SlotRow, Store, active_runs, add_run, ask_to_cancel, change_run,
                    changed_jobs, count_apart, count_changes, count_queued, count_running,
                    delete_jobs, file_system, find_run, finish_run, get_attempts, get_job,
                    get_meta, get_run, get_settings, host_zone, is_at, job_ids, job_versions,
                    last_decision, list_jobs, list_runs, lock_is_held, new_run_id, newest_run,
                    newest_slot_row, open_private, pause_job, paused_in_queue, perform_apply,
                    own_runs, plan_apply, process_start, run_filter, run_rows, runs_on_at,
                    set_log, set_meta, set_position, set_settings, skip_slots, slot_is_known,
                    step_rows, store_id, try_lock, usual_durations)

NOW = 1754049600.0          # 2025-08-01T12:00:00Z
ROOT = os.geteuid() == 0


@pytest.fixture
def said():
    """What the store has told."""
    return []


@pytest.fixture
def store(tmp_path, said):
    made = Store(str(tmp_path / "store"), said.append).create()
    yield made
    made.close()


@pytest.fixture
def db(store):
    """A connection within a transaction."""
    with store.write() as connection:
        yield connection


@contextlib.contextmanager
def process(function, *values):
    """A child that performs `function(tell, *values)`; its pid is given once it has called `tell`.

    It is killed at the end, where it has not ended.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            function(lambda: os.write(writer, b"."), *values)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writer)
    try:
        assert os.read(reader, 1) == b"."
        yield pid
    finally:
        os.close(reader)
        if os.waitpid(pid, os.WNOHANG) == (0, 0):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def forever():
    while True:
        signal.pause()


def value(store, key="x"):
    with store.read() as connection:
        return get_meta(connection, key)


def put(store, number, key="x"):
    with store.write() as connection:
        set_meta(connection, key, number)


def refusal(function, *values):
    with pytest.raises(RoexecError) as caught:
        function(*values)
    return str(caught.value)


# Making a store.

def test_a_store_is_made_with_what_it_needs(store, tmp_path):
    assert sorted(os.listdir(tmp_path / "store")) == [
        "active", "logs", "roexec.db", "store.lock", "wake"]
    assert stat.S_ISFIFO(os.stat(store.file("wake")).st_mode)
    assert store.exists


def test_a_store_in_one_file_has_its_folder_beside_it(tmp_path):
    one = Store(str(tmp_path / "my.db")).create()
    put(one, 5)
    assert sorted(os.listdir(tmp_path)) == ["my.db", "my.db.d"]
    assert value(one) == 5
    assert sorted(os.listdir(tmp_path / "my.db.d")) == ["active", "logs", "store.lock", "wake"]


def test_to_make_a_store_again_changes_nothing(store):
    put(store, 5)
    store.create()
    assert value(store) == 5


@pytest.mark.parametrize("name", ["deep/below/store", "my.db"])
def test_nothing_of_a_store_is_open_to_others_whatever_the_umask(tmp_path, name, monkeypatch):
    before = os.umask(0)
    try:
        made = Store(str(tmp_path / name)).create()
        made.keep_open()
        put(made, 5)
        with monkeypatch.context() as patch:
            patch.setattr(roexec, "_MIGRATIONS", [*roexec._MIGRATIONS, "CREATE TABLE more (a)"])
            made.create()
        paths = [path for path in (tmp_path / name).parent.rglob("*")]
        assert {path.name for path in paths} >= {
            os.path.basename(made.database) + end for end in ("", "-wal", "-shm", ".version-1.db")}
        for path in paths:
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
        assert stat.S_IMODE(os.stat(made.folder).st_mode) == 0o700
        made.close()
        for path in (tmp_path / "deep", tmp_path / "deep/below"):
            assert not path.exists() or stat.S_IMODE(path.stat().st_mode) == 0o755
        assert os.umask(0) == 0
    finally:
        os.umask(before)


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o770, 0o775])
def test_a_folder_that_is_too_open_is_made_private_and_that_is_said(tmp_path, said, mode):
    folder = tmp_path / "store"
    folder.mkdir()
    folder.chmod(mode)
    Store(str(folder), said.append).create()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert said == [f"{folder} could be read by others; it is private now (mode 0700)"]


def test_a_folder_into_which_everybody_may_write_is_refused(tmp_path):
    folder = tmp_path / "store"
    folder.mkdir()
    for mode in (0o777, 0o1777, 0o702):
        folder.chmod(mode)
        text = refusal(Store(str(folder)).create)
        assert text == (f"everybody may write into {folder}; name a folder of its own with --store,"
                        f" or make this one private: chmod 700 {folder}")
        assert os.listdir(folder) == []


@pytest.mark.skipif(not ROOT, reason="only root can make a folder somebody else's")
@pytest.mark.parametrize("uid, name", [(1, "daemon"), (54321, "54321")])
def test_a_folder_of_somebody_else_is_refused_by_name(tmp_path, uid, name):
    folder = tmp_path / "store"
    folder.mkdir(mode=0o700)
    os.chown(folder, uid, uid)
    assert refusal(Store(str(folder)).create) == (
        f"{folder} belongs to {name}; run as that user, or name another store with --store")
    assert os.listdir(folder) == []


@pytest.mark.skipif(not ROOT, reason="only root can make a folder somebody else's")
def test_who_may_not_look_into_a_store_is_told_whose_it_is(store):
    os.chown(store.folder, 54321, 54321)

    def look(tell):
        os.setuid(65534)
        for function in (lambda: store.exists, store.read().__enter__, store.write().__enter__,
                         store.lock().__enter__):
            assert refusal(function) == (
                f"{store.path} belongs to 54321; run as that user, or name another store with "
                "--store")
        tell()
    for folder in Path(store.folder).parents:           # only the store itself is closed
        if folder.stat().st_mode & 0o011 == 0:
            folder.chmod(0o711)
    with process(look):
        pass


def test_the_owner_of_what_is_there_is_named_for_a_relative_path_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    owner = roexec.owner_name(os.geteuid())
    assert str(Store("not/there").refusal()).startswith(f"not/there belongs to {owner};")


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs"])
def test_a_network_file_system_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(roexec, "file_system", lambda path: kind)
    folder = tmp_path / "store"
    assert refusal(Store(str(folder)).create) == (
        f"{folder} lies on a network file system ({kind}), where locks do not hold; name a folder "
        "on a disk of this host with --store")
    assert not (folder / "roexec.db").exists()


@pytest.mark.skipif(not os.path.exists("/proc/self/mountinfo"), reason="this host has no mountinfo")
def test_the_file_system_of_a_path_is_known(tmp_path):
    assert file_system("/proc") == "proc"
    assert file_system(str(tmp_path / "missing")) == ""


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    path = tmp_path / "file"
    assert refusal(Store(str(path)).create) == (
        f"{path} is no folder; name another store with --store")
    assert refusal(Store(str(path / "deep")).create) == (
        f"cannot make the folder {path}: File exists")
    assert path.read_text() == "mine"
    assert not Store(str(path / "deep")).exists


def test_a_database_file_that_others_may_read_is_made_private_and_that_is_said(tmp_path, said):
    path = tmp_path / "my.db"
    path.touch()
    path.chmod(0o644)
    Store(str(path), said.append).create()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert said == [f"{path} could be read by others; it is private now (mode 0600)"]


def test_a_database_file_is_never_a_link(tmp_path):
    path = tmp_path / "my.db"
    path.symlink_to(tmp_path / "elsewhere.db")
    assert refusal(Store(str(path)).create) == f"{path} is no file; name another store with --store"
    assert not (tmp_path / "elsewhere.db").exists()


@pytest.mark.skipif(not ROOT, reason="only root can make a file somebody else's")
def test_a_database_file_of_somebody_else_is_refused(tmp_path):
    path = tmp_path / "my.db"
    path.touch()
    os.chown(path, 54321, 54321)
    assert "my.db belongs to " in refusal(Store(str(path)).create)


def test_a_database_of_something_else_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "theirs.db"
    with contextlib.closing(sqlite3.connect(path)) as theirs:
        theirs.execute("CREATE TABLE bookmarks (url)")
        theirs.commit()
    before = path.read_bytes()
    assert refusal(Store(str(path)).create) == (
        f"{path} is a database of something else; name another store with --store")
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "notes.db"
    path.write_text("buy milk\n" * 500)
    umask = os.umask(0o022)
    assert refusal(Store(str(path)).create) == f"the database {path}: file is not a database"
    assert os.umask(umask) == 0o022
    assert refusal(Store(str(path)).read().__enter__).endswith("file is not a database")
    assert path.read_text() == "buy milk\n" * 500


@pytest.mark.parametrize("name", [
    "a b", "50%25", "what?mode=ro", "a#b", "ünïcode ✓", os.fsdecode(b"caf\xe9"), "a'b\"c",
    "a&b;c"])
def test_a_store_may_have_any_name(tmp_path, name):
    made = Store(os.path.join(str(tmp_path), name)).create()
    put(made, 5)
    assert value(made) == 5
    assert os.listdir(os.fsencode(tmp_path)) == [os.fsencode(name)]


# Versions of the schema.

MORE = "ALTER TABLE jobs ADD COLUMN colour TEXT; CREATE TABLE more (a);"


def test_an_older_database_is_brought_up_to_date_after_a_backup(store, monkeypatch):
    put(store, 5)
    monkeypatch.setattr(roexec, "_MIGRATIONS", [*roexec._MIGRATIONS, MORE])
    for context in (store.read, store.write):
        assert refusal(context().__enter__) == (
            f"the store {store.path} was made by an older roexec; `roexec server` or `roexec "
            "apply` bring it up to date")
    store.create()
    assert value(store) == 5
    with store.read() as connection:
        assert connection.execute("SELECT * FROM more").fetchall() == []
        assert connection.execute("PRAGMA user_version").fetchone()[0] == 2
    with contextlib.closing(sqlite3.connect(store.file("roexec.db.version-1.db"))) as backup:
        assert backup.execute("PRAGMA user_version").fetchone()[0] == 1
        assert backup.execute("SELECT value FROM meta WHERE key = 'x'").fetchone()[0] == 5
    assert not lock_is_held(store.file("store.lock"))


def test_without_anything_to_do_there_is_no_backup(store):
    store.create()
    assert not any("version" in name for name in os.listdir(store.folder))


def test_a_step_that_fails_leaves_the_database_as_it_was(store, monkeypatch):
    put(store, 5)
    with monkeypatch.context() as patch:
        patch.setattr(roexec, "_MIGRATIONS",
                      [*roexec._MIGRATIONS, MORE + "CREATE TABLE jobs (a);"])
        assert "table jobs already exists" in refusal(store.create)
    assert value(store) == 5
    with store.read() as connection:
        assert "colour" not in connection.execute("SELECT * FROM jobs").description[0]
        assert not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'more'").fetchall()
    put(store, 6)
    assert value(store) == 6


def test_a_store_of_a_newer_roexec_is_refused_in_words(store):
    with store.write() as connection:
        connection.execute("PRAGMA user_version = 7")
    for function in (store.create, store.read().__enter__, store.write().__enter__):
        assert refusal(function) == (
            f"the store {store.path} was made by a newer roexec (its version is 7, this one knows "
            f"{len(roexec._MIGRATIONS)}); use that one")
    assert not lock_is_held(store.file("store.lock"))


# Reading.

def test_reading_where_there_is_no_store_says_how_to_make_one_and_makes_nothing(tmp_path):
    nowhere = Store(str(tmp_path / "none"))
    for context in (nowhere.read, nowhere.write):
        assert refusal(context().__enter__) == (
            f"there is no store in {nowhere.path} yet; `roexec apply`, `roexec add` and `roexec "
            "server` make one")
    assert not nowhere.exists and nowhere.server() is None
    nowhere.wake()
    nowhere.checkpoint()
    nowhere.close()
    assert os.listdir(tmp_path) == []


def test_a_reader_sees_one_state(store):
    put(store, 1)
    with store.read() as connection:
        assert get_meta(connection, "x") == 1
        put(store, 2)
        assert get_meta(connection, "x") == 1
    assert value(store) == 2


def test_a_reader_cannot_write(store):
    put(store, 1)

    def write():
        with store.read() as connection:
            set_meta(connection, "x", 2)
    assert refusal(write) == (
        f"the database {store.database}: attempt to write a readonly database")
    assert value(store) == 1


def test_a_reader_waits_for_no_writer(store):
    put(store, 1)
    with store.write() as connection:
        set_meta(connection, "x", 2)
        assert value(store) == 1
    assert value(store) == 2


# One writer.

def count_up(store, times):
    for _ in range(times):
        with store.write() as connection:
            set_meta(connection, "x", get_meta(connection, "x", 0) + 1)


def test_threads_write_one_after_the_other(store):
    store.keep_open()
    threads = [threading.Thread(target=count_up, args=(store, 25)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert value(store) == 100


def test_processes_write_one_after_the_other(store):
    def work(tell):
        count_up(Store(store.path), 25)
        tell()
    with process(work), process(work), process(work):
        count_up(store, 25)
    assert value(store) == 100


def test_a_writer_keeps_out_those_who_do_not_know_of_the_lock(store):
    with contextlib.closing(sqlite3.connect(store.database, timeout=0)) as other:
        with store.write():
            with pytest.raises(sqlite3.OperationalError, match="database is locked"):
                other.execute("BEGIN IMMEDIATE")


def hold(tell, store, *then):
    """A writer that stays in the middle of its transaction."""
    with Store(store.path).write() as connection:
        set_meta(connection, "x", "half")
        connection.execute("CREATE TABLE large AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL "
                           "SELECT i + 1 FROM n WHERE i < 400) SELECT randomblob(20000) FROM n")
        tell()
        while not any(os.path.exists(path) for path in then):
            time.sleep(0.002)


def test_a_stopped_holder_is_named_to_whoever_waits(store, tmp_path, said, monkeypatch):
    monkeypatch.setattr(roexec, "_PATIENCE", 0.05)
    with process(hold, store, tmp_path / "go on") as pid:
        os.kill(pid, signal.SIGSTOP)

        def let_go_on(text):
            said.append(text)
            (tmp_path / "go on").touch()
            os.kill(pid, signal.SIGCONT)
        waiter = Store(store.path, let_go_on)
        put(waiter, "mine")
        assert value(store) == "mine"
    assert len(said) == 1
    assert said[0].startswith(f"waiting for process {pid} (")
    assert said[0].endswith(f"), which holds {store.file('store.lock')}")


def test_who_does_not_wait_long_is_told_nothing(store, tmp_path, said, monkeypatch):
    assert roexec._PATIENCE == 5
    monkeypatch.setattr(roexec, "_PATIENCE", 60)
    with process(hold, store, tmp_path / "go on"):
        (tmp_path / "go on").touch()
        put(store, 5)
    assert said == []


def test_signals_are_held_back_while_one_writes(store):
    def write_and_interrupt():      # without the threads that other tests may have left here
        kept = {signal.SIGINT, signal.SIGTERM, signal.SIGTSTP}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        with store.write():
            assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before | kept
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
        with pytest.raises(KeyboardInterrupt):
            with store.write() as connection:
                os.kill(os.getpid(), signal.SIGINT)
                set_meta(connection, "x", 5)
        assert value(store) == 5 and not lock_is_held(store.file("store.lock"))
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    assert end_of(in_child(write_and_interrupt)) == 0


@pytest.mark.parametrize("kept", [False, True])
def test_an_exception_rolls_everything_back_and_gives_the_lock_back(store, kept):
    put(store, 1)
    if kept:
        store.keep_open()
    for error in (KeyError("mine"), KeyboardInterrupt(), RoexecError("in words")):
        with pytest.raises(type(error)) as caught:
            with store.write() as connection:
                set_meta(connection, "x", 2)
                raise error
        assert caught.value is error
        assert not lock_is_held(store.file("store.lock"))
    assert value(store) == 1
    put(store, 3)
    assert value(store) == 3


def test_an_error_of_the_database_is_in_words_and_rolls_back(store):
    def fail():
        with store.write() as connection:
            set_meta(connection, "x", 2)
            connection.execute("INSERT INTO meta VALUES ('x', 3)")
    assert refusal(fail) == f"the database {store.database}: UNIQUE constraint failed: meta.key"
    assert value(store) is None and not lock_is_held(store.file("store.lock"))


def test_an_error_after_which_sqlite_has_rolled_back_itself_keeps_its_own_words(store):
    def fail():
        with store.write() as connection:
            set_meta(connection, "x", 2)
            connection.execute("INSERT OR ROLLBACK INTO meta VALUES ('x', 3)")
    assert refusal(fail) == f"the database {store.database}: UNIQUE constraint failed: meta.key"
    assert value(store) is None and not lock_is_held(store.file("store.lock"))


def test_a_writer_that_is_killed_leaves_the_earlier_state_and_a_free_lock(store):
    put(store, "whole")
    with process(hold, store) as pid:
        assert lock_is_held(store.file("store.lock"))
        assert os.stat(store.database + "-wal").st_size > 1 << 20       # in the middle, really
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert not lock_is_held(store.file("store.lock"))
        assert value(store) == "whole"
        put(store, "next")
    assert value(store) == "next"
    with store.read() as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        assert not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'large'").fetchall()


# The write-ahead log.

def inode(store):
    return os.stat(store.database + "-wal").st_ino


def test_a_write_of_a_command_leaves_the_log_of_a_server_where_it_is(store):
    store.keep_open()
    put(store, 1)
    before = inode(store)

    def work(tell):
        for number in (2, 3):
            put(Store(store.path), number)
            assert value(Store(store.path)) == number
        tell()
    with process(work):
        pass
    assert inode(store) == before
    assert value(store) == 3
    put(store, 4)
    assert inode(store) == before and value(Store(store.path)) == 4


def test_to_close_moves_the_log_into_the_database(store):
    store.keep_open()
    put(store, 1)
    store.close()
    assert not os.path.exists(store.database + "-wal") and value(store) == 1
    store.close()
    put(store, 2)
    assert not os.path.exists(store.database + "-wal") and value(store) == 2


def test_a_large_log_is_moved_into_the_database(store, monkeypatch):
    store.keep_open()
    put(store, "x" * 100_000)
    size = os.stat(store.database + "-wal").st_size
    store.checkpoint()
    assert os.stat(store.database + "-wal").st_size == size > 100_000
    monkeypatch.setattr(roexec, "_LARGE_LOG", size - 1)
    before = inode(store)
    store.checkpoint()
    assert os.stat(store.database + "-wal").st_size == 0 and inode(store) == before
    assert value(store) == "x" * 100_000


def test_what_is_committed_is_synchronised_and_never_moved_by_itself(store):
    store.keep_open()
    for connection in (store.kept, store.connect("rw")):
        assert connection.execute("PRAGMA synchronous").fetchone()[0] == 2          # FULL
        assert connection.execute("PRAGMA wal_autocheckpoint").fetchone()[0] == 0
        assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        assert connection.execute("PRAGMA busy_timeout").fetchone()[0] == 5000
    connection.close()


def test_a_log_that_cannot_be_moved_is_reported_in_words(store, monkeypatch):
    class Full:
        def execute(self, statement):
            raise sqlite3.OperationalError("database or disk is full")

        def close(self):
            pass
    put(store, 1)
    store.kept = Full()
    monkeypatch.setattr(roexec, "_LARGE_LOG", -1)
    Path(store.database + "-wal").touch(0o600)
    assert refusal(store.checkpoint) == f"the database {store.database}: database or disk is full"
    assert not lock_is_held(store.file("store.lock"))


# A full disk.

def fill(store, size):
    with store.write() as connection:
        set_meta(connection, "large", os.urandom(size))


@contextlib.contextmanager
def largest_file(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kept", [False, True])
def test_a_write_that_finds_no_room_loses_nothing(store, kept):
    put(store, "whole")
    if kept:
        store.keep_open()
    with largest_file(300_000):
        text = refusal(fill, store, 500_000)
        assert text.startswith(f"the database {store.database}: ") and "rollback" not in text
        assert value(store) == "whole" and value(store, "large") is None
        assert not lock_is_held(store.file("store.lock"))
        put(store, "small")             # there is room for it
    fill(store, 500_000)
    assert value(store) == "small" and len(value(store, "large")) == 500_000


@pytest.mark.skipif(not ROOT, reason="only root can mount a small disk")
@pytest.mark.parametrize("kept", [False, True])
def test_a_full_disk_is_told_in_words_and_loses_nothing(tmp_path, kept):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", tmp_path],
                             capture_output=True)
    if mounted.returncode:
        pytest.skip("this root may not mount anything")
    try:
        made = Store(str(tmp_path / "store")).create()
        put(made, "whole")
        if kept:
            made.keep_open()
        free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
        (tmp_path / "rest").write_bytes(b"x" * (free - 200_000))
        for _ in range(3):
            text = refusal(fill, made, 1_000_000)
            assert text.startswith(f"the database {made.database}: ") and "rollback" not in text
            assert not lock_is_held(made.file("store.lock"))
            assert value(made) == "whole" and value(made, "large") is None
        (tmp_path / "rest").unlink()
        fill(made, 500_000)
        assert value(made) == "whole" and len(value(made, "large")) == 500_000
        with made.read() as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    finally:
        made.close()
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.skipif(not ROOT, reason="only root can mount a small disk")
def test_a_store_for_which_there_is_no_room_is_refused_in_words(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20k", "none", tmp_path],
                      capture_output=True).returncode:
        pytest.skip("this root may not mount anything")
    try:
        made = Store(str(tmp_path / "store"))
        for _ in range(3):
            assert re.search("full|I/O|No space", refusal(made.create))
    finally:
        subprocess.run(["umount", tmp_path], check=True)


# Locks, waking, facts of the host.

def test_a_lock_is_held_until_its_holder_closes_it(tmp_path):
    path = str(tmp_path / "lock")
    assert not lock_is_held(path)
    mine, other = open_private(path), open_private(path)
    assert not lock_is_held(path)
    assert try_lock(mine) and not try_lock(other) and lock_is_held(path)
    os.close(mine)
    assert not lock_is_held(path) and try_lock(other)
    os.close(other)


def test_two_who_ask_do_not_take_each_other_for_the_holder(tmp_path, monkeypatch):
    """Each asks while the other one does."""
    path, answers = str(tmp_path / "lock"), []
    os.close(open_private(path))
    flock = fcntl.flock

    def ask_twice(descriptor, operation):
        flock(descriptor, operation)
        monkeypatch.setattr(fcntl, "flock", flock)
        answers.append(lock_is_held(path))
    monkeypatch.setattr(fcntl, "flock", ask_twice)
    answers.append(lock_is_held(path))
    assert answers == [False, False]


def test_a_private_file_is_the_owners_alone_and_no_link(tmp_path):
    before = os.umask(0)
    try:
        os.close(open_private(str(tmp_path / "file")))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with pytest.raises(OSError):
        open_private(str(tmp_path / "link"))


def test_whether_a_path_still_names_an_open_file(tmp_path):
    path = tmp_path / "file"
    descriptor = open_private(str(path))
    assert is_at(descriptor, path)
    path.rename(tmp_path / "other")
    assert not is_at(descriptor, path)
    path.touch()
    assert not is_at(descriptor, path) and is_at(descriptor, tmp_path / "other")
    os.close(descriptor)


def test_a_server_hears_that_something_has_changed(store):
    store.wake()                                        # nobody is there: nothing happens
    fifo = os.open(store.file("wake"), os.O_RDWR | os.O_NONBLOCK)
    store.wake()
    assert os.read(fifo, 10) == b"w"
    while True:
        try:
            os.write(fifo, b"w" * 4096)
        except BlockingIOError:
            break
    store.wake()                                        # full: it will wake anyway
    os.close(fifo)


def test_the_server_of_a_store_is_who_holds_its_lock(store):
    assert store.server() is None
    lock = open_private(store.file("server.lock"))
    assert store.server() is None
    assert try_lock(lock) and store.server() == 0
    os.write(lock, b"%d\n" % os.getpid())
    assert store.server() == os.getpid()
    os.close(lock)
    assert store.server() is None


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="this host has no /proc")
def test_a_process_is_known_by_its_start_until_it_ends():
    assert process_start(os.getpid()) == process_start(os.getpid()) > 0
    with process(lambda tell: (tell(), forever())) as pid:
        assert process_start(pid) >= process_start(os.getpid())
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert process_start(pid) is None               # a zombie has ended
    assert process_start(pid) is None


def test_a_name_of_a_process_may_look_like_the_fields_behind_it():
    script = ("import ctypes; ctypes.CDLL(None).prctl(15, b'a) Z 1 (b', 0, 0, 0); "
              "print(flush=True); input()")
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        assert process_start(child.pid) > 0
    finally:
        child.communicate(b"\n")


def test_run_ids_are_random_small_letters_and_digits():
    ids = {new_run_id() for _ in range(2000)}
    assert len(ids) == 2000 and all(re.fullmatch("[a-z0-9]{10}", text) for text in ids)
    assert {text[0] for text in ids} >= set("az09") <= {text[-1] for text in ids}


@pytest.mark.parametrize("name, hours", [
    ("Asia/Tokyo", 9), (":Asia/Tokyo", 9), ("UTC", 0), ("No/Where", 0)])
def test_the_zone_of_the_host_is_that_of_tz(monkeypatch, name, hours):
    monkeypatch.setenv("TZ", name)
    assert datetime(2025, 8, 1, tzinfo=host_zone()).utcoffset() == timedelta(hours=hours)


def test_without_tz_the_zone_of_the_host_is_that_of_etc_localtime(monkeypatch, tmp_path):
    monkeypatch.delenv("TZ", raising=False)
    realpath, target = os.path.realpath, tmp_path / "localtime"
    monkeypatch.setattr(os.path, "realpath", lambda path, **more: str(target)
                        if path == "/etc/localtime" else realpath(path, **more))
    assert host_zone() == timezone.utc                  # there is none
    for folder in zoneinfo.TZPATH:
        if os.path.exists(os.path.join(folder, "Asia/Tokyo")):
            target.write_bytes(Path(folder, "Asia/Tokyo").read_bytes())
    if target.exists():                                 # a copy has no name, but the content
        assert datetime(2025, 8, 1, tzinfo=host_zone()).utcoffset() == timedelta(hours=9)
    target = Path("/usr/share/zoneinfo/Asia/Tokyo")
    assert str(host_zone()) == "Asia/Tokyo"


# Facts about the whole store.

def test_a_store_has_one_id(store, db):
    first = store_id(db)
    assert re.fullmatch("[a-z0-9]{10}", first) and store_id(db) == first


@pytest.mark.parametrize("before, after, moved", [
    ({"scheduler": {"timezone": "UTC"}}, {"scheduler": {"timezone": "Europe/Berlin"}}, "without"),
    ({"scheduler": {"timezone": None}}, {"scheduler": {"timezone": "UTC"}}, "without"),
    ({}, {"defaults": {"timezone": "UTC"}}, "without"),
    ({"scheduler": {"timezone": "UTC"}}, {"defaults": {"timezone": "UTC"}}, ""),
    ({"scheduler": {"timezone": "UTC"}}, {"scheduler": {"timezone": "UTC", "max_concurrent": 1}},
     ""),
    ({}, {"defaults": {"enabled": False}}, "with without"),
    ({}, {"defaults": {"timeout": 5}}, ""),
    (None, {"scheduler": {"timezone": "UTC"}}, ""),         # the first server
])
def test_slots_count_from_the_instant_at_which_a_setting_changes_the_zone(before, after, moved, db):
    jobs = {"with": make_job(job_id="with", timezone="Asia/Tokyo", schedule="0 2 * * *"),
            "without": make_job(job_id="without", schedule="0 2 * * *"),
            "ahead": make_job(job_id="ahead", schedule="0 2 * * *")}
    perform_apply(db, plan_apply(db, {"f": list(jobs.values())}), NOW)
    ahead = time.time() + 1000
    set_position(db, "ahead", ahead)
    if before is not None:
        set_settings(db, before)
        for name in ("with", "without"):
            set_position(db, name, NOW)
    set_settings(db, after)
    positions = {row["id"]: row["position"] for row in list_jobs(db)}
    assert positions.pop("ahead") == ahead
    assert {name for name, position in positions.items() if position != NOW} == set(moved.split())
    assert all(position == NOW or 0 <= time.time() - position < 60
               for position in positions.values())


def test_settings_are_kept_and_count_as_a_change(db):
    assert get_settings(db) is None and count_changes(db) == 0
    settings = {"defaults": {"env": {"A": "ü"}}, "scheduler": {"max_concurrent": 3}}
    set_settings(db, settings)
    assert get_settings(db) == settings and count_changes(db) == 1


# Jobs.

def job(job_id="backup", **spec):
    return Job({"id": job_id, "command": "true", **spec})


def apply(db, jobs, source="/etc/jobs.yml", now=NOW, prune=False):
    """Register jobs -> {id: what happened}."""
    changes = plan_apply(db, {source: jobs}, prune)
    perform_apply(db, changes, now)
    return {change.id: change.change for change in changes}


def test_a_job_is_added_then_unchanged_then_changed(db):
    assert apply(db, [job()]) == {"backup": "added"}
    changes = count_changes(db)
    assert apply(db, [job()]) == {"backup": "unchanged"}
    assert count_changes(db) == changes and get_job(db, "backup")["version"] == 1
    assert apply(db, [job(timeout="5m")]) == {"backup": "changed"}
    row = get_job(db, "backup")
    assert row["version"] == 2 and row["spec"] == \
        '{"id": "backup", "command": "true", "timeout": "5m"}'
    versions = db.execute("SELECT version, spec, source, since FROM versions "
                          "ORDER BY version").fetchall()
    assert [tuple(row) for row in versions] == [
        (1, '{"id": "backup", "command": "true"}', "/etc/jobs.yml", NOW),
        (2, '{"id": "backup", "command": "true", "timeout": "5m"}', "/etc/jobs.yml", NOW)]


def test_a_plan_changes_nothing(db):
    plan = plan_apply(db, {"/a": [job()]})
    assert [(change.id, change.change, change.source) for change in plan] == [
        ("backup", "added", "/a")]
    assert job_ids(db) == [] and count_changes(db) == 0


def test_what_is_not_given_is_kept_unless_pruned(db):
    apply(db, [job("one"), job("two"), job("three")])
    apply(db, [job("theirs")], source="/etc/other.yml")
    apply(db, [job("by-hand")], source=None)
    assert apply(db, [job("two")]) == {"two": "unchanged"}
    assert apply(db, [job("two")], prune=True) == {
        "two": "unchanged", "one": "removed", "three": "removed"}
    assert job_ids(db) == ["by-hand", "theirs", "two"]
    assert apply(db, [], prune=True) == {"two": "removed"}
    assert job_ids(db) == ["by-hand", "theirs"]


def test_a_job_of_another_source_is_refused_with_both_named(db):
    apply(db, [job("one"), job("two")])
    apply(db, [job("mine")], source=None)
    assert refusal(apply, db, [job("one"), job("new"), job("mine")], "/etc/b.yml") == (
        'job "one" of /etc/b.yml is registered by /etc/jobs.yml; change it there, or delete it '
        'first\njob "mine" of /etc/b.yml is registered by roexec add; change it there, or delete '
        "it first")
    assert refusal(apply, db, [job("two")], None) == (
        'job "two" of roexec add is registered by /etc/jobs.yml; change it there, or delete it '
        "first")
    assert job_ids(db) == ["mine", "one", "two"]
    assert {row["source"] for row in list_jobs(db)} == {"/etc/jobs.yml", None}


def test_a_job_may_move_between_sources_that_are_given_together(db):
    apply(db, [job("one"), job("two")], source="/a")
    changes = plan_apply(db, {"/a": [job("one")], "/b": [job("two")]}, prune=True)
    perform_apply(db, changes, NOW)
    assert {change.id: change.change for change in changes} == {
        "one": "unchanged", "two": "changed"}
    assert {row["id"]: row["source"] for row in list_jobs(db)} == {"one": "/a", "two": "/b"}


def test_a_job_that_was_deleted_belongs_to_nobody(db):
    apply(db, [job()], source="/a")
    delete_jobs(db, ["backup"], NOW)
    assert apply(db, [job()], source="/b") == {"backup": "added"}


def test_jobs_are_listed_by_id_in_pages(db):
    apply(db, [job(name) for name in ("c", "a", "d", "b")])
    delete_jobs(db, ["b"], NOW)
    assert [row["id"] for row in list_jobs(db)] == job_ids(db) == ["a", "c", "d"]
    assert [row["id"] for row in list_jobs(db, limit=2)] == ["a", "c"]
    assert [row["id"] for row in list_jobs(db, after="c", limit=2)] == ["d"]


def test_an_unknown_job_is_refused_with_the_nearest(db):
    apply(db, [job("backup-db")])
    with pytest.raises(NoSuchJob, match='^there is no job "backup-bd"; did you mean "backup-db"'):
        get_job(db, "backup-bd")
    delete_jobs(db, ["backup-db"], NOW)
    with pytest.raises(NoSuchJob, match='^there is no job "backup-db"$'):
        get_job(db, "backup-db")
    assert "\\x1b" in refusal(get_job, db, "\x1b[31m")


# The position of a job.

HOURLY = {"schedule": "0 * * * *"}


@pytest.mark.parametrize("change, moves", [
    ({"timeout": "5m"}, False), ({"command": "false"}, False), ({"jitter": "5m"}, False),
    ({"window": {"start": "2025-01-01"}}, False), ({"catch_up": "all"}, False),
    ({"schedule": "5 * * * *"}, True), ({"schedule": ["0 * * * *", "5 * * * *"]}, True),
    ({"timezone": "Europe/Berlin"}, True), ({"enabled": False}, True), ({"schedule": []}, True)])
def test_slots_count_anew_where_the_schedule_becomes_another(db, change, moves):
    apply(db, [job(**HOURLY)], now=NOW)
    assert get_job(db, "backup")["position"] == NOW
    set_position(db, "backup", NOW + 3600)
    apply(db, [job(**{**HOURLY, **change})], now=NOW + 9999)
    assert get_job(db, "backup")["position"] == NOW + (9999 if moves else 3600)


def test_a_job_that_is_enabled_again_has_missed_nothing(db):
    apply(db, [job(**HOURLY, enabled=False)], now=NOW)
    apply(db, [job(**HOURLY, enabled=False, timeout=5)], now=NOW + 100)
    assert get_job(db, "backup")["position"] == NOW
    apply(db, [job(**HOURLY)], now=NOW + 9999)
    assert get_job(db, "backup")["position"] == NOW + 9999


def test_a_position_survives_the_deletion_of_its_job_and_never_goes_back(db):
    apply(db, [job(**HOURLY)], now=NOW)
    set_position(db, "backup", NOW + 3600)
    delete_jobs(db, ["backup"], NOW + 1)
    apply(db, [job(**HOURLY)], now=NOW + 2)             # the clock of that host is behind
    row = get_job(db, "backup")
    assert (row["position"], row["version"]) == (NOW + 3600, 2)
    delete_jobs(db, ["backup"], NOW + 5000)
    apply(db, [job(**HOURLY)], now=NOW + 9999)
    assert get_job(db, "backup")["position"] == NOW + 9999
    apply(db, [job(schedule="@daily")], now=NOW)
    assert get_job(db, "backup")["position"] == NOW + 9999


def test_pausing_survives_apply_but_not_deletion(db):
    apply(db, [job()])
    assert pause_job(db, "backup", True) and not pause_job(db, "backup", True)
    apply(db, [job(timeout="5m", schedule="@daily")])
    assert get_job(db, "backup")["paused"] == math.inf
    assert pause_job(db, "backup", False) and not pause_job(db, "backup", False)
    pause_job(db, "backup", True)
    delete_jobs(db, ["backup"], NOW)
    with pytest.raises(NoSuchJob):
        pause_job(db, "backup", False)
    apply(db, [job()])
    assert get_job(db, "backup")["paused"] == 0


def test_a_server_learns_what_has_changed_since_it_last_looked(db):
    apply(db, [job("one"), job("two"), job("three")])
    seen = count_changes(db)
    assert changed_jobs(db, seen) == []
    pause_job(db, "one", True)
    delete_jobs(db, ["two"], NOW)
    set_position(db, "three", NOW + 1)                  # its own doing
    assert [(row["id"], row["paused"], row["deleted"]) for row in changed_jobs(db, seen)] == [
        ("one", math.inf, 0), ("two", 0, 1)]
    assert len(changed_jobs(db, -1)) == 3


# Runs.

def run(db, run_id="abcd123456", job_id="backup", state="queued", **columns):
    if state in REASONS:
        columns.setdefault("reason", REASONS[state][0])
    return add_run(db, **{"id": run_id, "job_id": job_id, "trigger": "manual", "state": state,
                          "queued_at": NOW, **columns})


@pytest.mark.parametrize("before", STATES)
def test_each_change_of_state_is_allowed_or_refused(db, before):
    for number, after in enumerate(STATES):
        run_id = run(db, f"run{number}", state=before)
        if after in STATES[before]:
            change_run(db, run_id, after, log="a.log")
            assert (get_run(db, run_id)["state"], get_run(db, run_id)["log"]) == (after, "a.log")
        else:
            assert refusal(change_run, db, run_id, after) == (
                f"run {run_id} is {before} and cannot become {after}")
            assert get_run(db, run_id)["state"] == before
            assert refusal(lambda: change_run(db, run_id, after, log="a.log"))
            assert get_run(db, run_id)["log"] is None


def test_a_state_that_there_is_not_and_a_run_that_there_is_not_are_refused(db):
    run(db)
    assert "cannot become done" in refusal(change_run, db, "abcd123456", "done")
    with pytest.raises(NoSuchRun, match='there is no run "nothing"'):
        change_run(db, "nothing", "running")


@pytest.mark.parametrize("state", FINAL_STATES)
def test_only_the_reasons_of_a_state_are_ever_written(db, state):
    reasons = {reason for some in REASONS.values() for reason in some} | {None, "", "bad luck"}
    allowed = set(REASONS.get(state, (None,)))
    for number, reason in enumerate(sorted(reasons, key=str)):
        run_id = run(db, f"run{number}", state="running")
        if reason in allowed:
            finish_run(db, run_id, state, [], reason=reason)
            assert get_run(db, run_id)["reason"] == reason
        else:
            assert refusal(finish_run, db, run_id, state, [], reason) == (
                f"{reason!r} is no reason for a run to be {state}")
            assert get_run(db, run_id)["state"] == "running"


def test_an_end_takes_its_attempts_in(db):
    apply(db, [job()])
    run(db, state="running")
    finish_run(db, "abcd123456", "failed", [
        {"number": 1, "started_at": NOW, "finished_at": NOW + 1, "signal": "SIGKILL"},
        {"number": 2, "started_at": NOW + 2, "exit_code": 3, "cpu_seconds": 0.5,
         "max_rss_bytes": 9, "output_bytes": 7}], reason="exit", exit_code=3,
        finished_at=NOW + 3)
    assert [tuple(row)[1:] for row in get_attempts(db, "abcd123456")] == [
        (1, NOW, NOW + 1, None, "SIGKILL", None, None, None),
        (2, NOW + 2, None, 3, None, 0.5, 9, 7)]
    row = get_job(db, "backup")
    assert (row["last_id"], row["last_state"], row["last_finished_at"]) == (
        "abcd123456", "failed", NOW + 3)


def test_the_last_run_of_a_job_is_no_skipped_one_and_no_step(db):
    apply(db, [job()])
    run(db, "ended", state="running")
    finish_run(db, "ended", "succeeded", [])
    run(db, "left-out")
    finish_run(db, "left-out", "skipped", [], reason="condition")
    run(db, "step", state="running", parent="ended", step="build")
    finish_run(db, "step", "succeeded", [])
    assert get_job(db, "backup")["last_id"] == "ended"


def test_a_job_shows_whether_a_run_of_it_is_on(db):
    apply(db, [job(), job("other")])
    def active(): return {row["id"]: row["active"] for row in list_jobs(db)}
    assert active() == {"backup": None, "other": None}
    run(db, "waits")
    run(db, "step", state="running", parent="waits", step="s")
    assert active() == {"backup": "queued", "other": None}
    run(db, "goes", state="running")
    assert active() == {"backup": "running", "other": None}
    assert get_job(db, "backup")["active"] == "running"


def test_a_slot_never_runs_twice(db):
    run(db, "one", slot=100)
    run(db, "two", slot=100, job_id="other")
    run(db, "step", slot=100, parent="one", step="s")
    with pytest.raises(sqlite3.IntegrityError):
        run(db, "three", slot=100)
    for number in range(3):
        run(db, f"by hand {number}")
    assert slot_is_known(db, "backup", 100) and not slot_is_known(db, "backup", 101)
    assert not slot_is_known(db, "third", 100)


def test_deleting_a_job_cancels_what_is_queued_and_nothing_else(db):
    apply(db, [job(), job("other")])
    run(db, "done", state="succeeded")
    run(db, "goes", state="running")
    run(db, "waits")
    run(db, "theirs", job_id="other")
    delete_jobs(db, ["backup"], NOW + 5)
    states = {row["id"]: row["state"] for row in list_runs(db)}
    assert states == {"done": "succeeded", "goes": "running", "waits": "cancelled",
                      "theirs": "queued"}
    row = get_run(db, "waits")
    assert (row["reason"], row["message"], row["finished_at"]) == (
        "user", "the job was deleted", NOW + 5)
    assert job_ids(db) == ["other"]


def test_the_first_wish_to_cancel_counts(db):
    run(db)
    ask_to_cancel(db, "abcd123456", "replaced")
    ask_to_cancel(db, "abcd123456", "user")
    assert get_run(db, "abcd123456")["cancel"] == "replaced"


def test_the_log_of_a_run_comes_and_goes(db):
    run(db)
    set_log(db, "abcd123456", "logs/a.log")
    assert get_run(db, "abcd123456")["log"] == "logs/a.log"
    set_log(db, "abcd123456", None)
    assert get_run(db, "abcd123456")["log"] is None


def test_paused_jobs_with_queued_runs_are_known(db):
    apply(db, [job(name) for name in ("a", "b", "c")])
    run(db, "run1", "a")
    run(db, "run2", "b")
    run(db, "run3", "c", "running")
    for name in ("a", "c"):
        pause_job(db, name, True)
    assert paused_in_queue(db, NOW) == {"a"}
    assert pause_job(db, "a", True, NOW + 1) and not pause_job(db, "a", True, NOW + 1)
    assert paused_in_queue(db, NOW) == {"a"} and paused_in_queue(db, NOW + 1) == set()


def test_active_runs_are_counted_and_listed_without_steps(db):
    for number, (job_id, state) in enumerate([
            ("a", "running"), ("a", "queued"), ("b", "queued"), ("b", "running"),
            ("b", "running"), ("a", "failed")]):
        run(db, f"run{number}", job_id, state)
    run(db, "step", "a", "running", parent="run0", step="s")
    run(db, "step2", "a", "queued", parent="run0", step="s")
    assert [row["id"] for row in active_runs(db)] == [f"run{number}" for number in range(5)]
    assert [row["id"] for row in active_runs(db, "a")] == ["run0", "run1"]
    assert [row["id"] for row in own_runs(db, "queued")] == ["run1", "run2"]
    run(db, "elsewhere", "b", "running", node="other")
    assert [row["id"] for row in own_runs(db, "running")] == ["run0", "run3", "run4"]
    assert count_running(db) == {"a": 1, "b": 3} and count_queued(db) == 2


# Skipped slots.

def skipped(slot, reason="missed", last=None, count=1, message=None):
    return SlotRow(slot=slot, last_slot=slot if last is None else last, count=count,
                   trigger="schedule", reason=reason, message=message)


def rows(db, job_id="backup"):
    return [(row["slot"], row["last_slot"], row["count"], row["reason"])
            for row in reversed(list_runs(db, run_filter(job_id=job_id)))]


def test_slots_skipped_for_one_reason_are_one_row_that_grows(db):
    first = skip_slots(db, "backup", skipped(60), NOW)
    assert skip_slots(db, "backup", skipped(120), NOW + 1) == first
    assert skip_slots(db, "backup", skipped(180, last=600, count=8), NOW + 2) == first
    assert rows(db) == [(60, 600, 10, "missed")]
    row = get_run(db, first)
    assert (row["state"], row["trigger"], row["queued_at"], row["finished_at"]) == (
        "skipped", "schedule", NOW, NOW + 2)


def test_another_reason_or_a_run_in_between_begins_a_row(db):
    skip_slots(db, "backup", skipped(60), NOW)
    skip_slots(db, "backup", skipped(120, "paused"), NOW)
    skip_slots(db, "other", skipped(120, "paused"), NOW)
    run(db, "mine", state="succeeded")                  # by hand: it is no slot
    skip_slots(db, "backup", skipped(180, "paused"), NOW)
    run(db, "slot", slot=240, state="succeeded")
    skip_slots(db, "backup", skipped(300, "paused"), NOW)
    assert rows(db) == [(60, 60, 1, "missed"), (120, 180, 2, "paused"), (None, None, 1, None),
                        (240, None, 1, None), (300, 300, 1, "paused")]
    assert rows(db, "other") == [(120, 120, 1, "paused")]


def test_a_row_that_grows_keeps_the_newest_message(db):
    first = skip_slots(db, "backup", skipped(60, "overlap", message="run a was running"), NOW)
    skip_slots(db, "backup", skipped(120, "overlap", message="run b was running"), NOW)
    assert get_run(db, first)["message"] == "run b was running"
    skip_slots(db, "backup", skipped(180, "overlap"), NOW)
    assert get_run(db, first)["message"] == "run b was running"


# Finding runs.

@pytest.fixture
def some_runs(db):
    apply(db, [job("backup"), job("abcd"), job("idle"), job("busy")])
    run(db, "abcd000001", "backup", "succeeded")
    run(db, "abcd000002", "backup", "failed")
    run(db, "efgh000001", "abcd", "succeeded")
    run(db, "busy000001", "busy", "running")
    run(db, "busy000002", "busy", "succeeded")
    run(db, "gone000001", "deleted-job", "succeeded")
    run(db, "step000001", "backup", "running", parent="abcd000001", step="s")
    return db


@pytest.mark.parametrize("target, found", [
    ("abcd000001", "abcd000001"),                       # its id
    ("backup", "abcd000002"),                           # the newest of a job, steps apart
    ("busy", "busy000001"),                             # the active one of a job
    ("abcd", "efgh000001"),                             # a job wins over the beginning of an id
    ("latest", "gone000001"), ("deleted-job", "gone000001"),
    ("efgh", "efgh000001"), ("abcd000002", "abcd000002"), ("busy00000", None),
    ("step", "step000001")])
def test_a_run_is_found_by_what_a_person_writes(some_runs, target, found):
    if found is None:
        assert refusal(find_run, some_runs, target) == (
            f'more than one run id begins with "{target}"; write more of it')
    else:
        assert find_run(some_runs, target)["id"] == found


@pytest.mark.parametrize("target, text", [
    ("efg", 'there is no run or job "efg"'), ("", 'there is no run or job ""'),
    ("idle", 'job "idle" has no runs yet'),
    ("backpu", 'there is no run or job "backpu"; did you mean "backup"?'),
    ("abcd0000019", 'there is no run or job "abcd0000019"'),
    ("%%%%", 'there is no run or job "%%%%"'), ("ABCD0", 'there is no run or job "ABCD0"'),
    ("\x1b[31m", 'there is no run or job "\\x1b[31m"')])
def test_a_run_that_is_not_found_is_refused_in_words(some_runs, target, text):
    with pytest.raises(NoSuchRun) as caught:
        find_run(some_runs, target)
    assert str(caught.value) == text


def test_a_skipped_run_is_meant_only_where_a_job_has_no_other(db):
    run(db, "ran", state="failed")
    run(db, "left-out", state="skipped")
    run(db, "never", job_id="idle", state="skipped")
    assert find_run(db, "backup")["id"] == "ran"
    assert find_run(db, "idle")["id"] == find_run(db, "latest")["id"] == "never"


def test_without_runs_there_is_no_latest(db):
    assert refusal(find_run, db, "latest") == "there are no runs yet"
    assert newest_run(db, "backup") is None


def test_runs_are_listed_from_the_newest_in_pages(some_runs):
    ids = [row["id"] for row in list_runs(some_runs, run_filter())]
    assert ids == ["gone000001", "busy000002", "busy000001", "efgh000001", "abcd000002",
                   "abcd000001"]
    page, before = [], None
    while True:
        found = list_runs(some_runs, run_filter(), limit=2, before=before)
        if not found:
            break
        page += [row["id"] for row in found]
        before = found[-1]["seq"]
    assert page == ids
    assert len(list_runs(some_runs, run_filter(steps=True))) == 7


def test_runs_of_very_many_jobs_are_listed_in_one_order(some_runs):
    others = [f"other{number}" for number in range(1100)]
    for wanted, ids in ((["backup", *others, "abcd"], ["efgh000001", "abcd000002", "abcd000001"]),
                        (others, []), ([], [])):
        for most in (2, 50):
            found = list_runs(some_runs, run_filter(), most, job_ids=wanted)
            assert [row["id"] for row in found] == ids[:most]
    assert set(run_rows(some_runs, [*others, "busy000001", "abcd000001"])) == {
        "busy000001", "abcd000001"}


@pytest.mark.parametrize("wanted, ids", [
    ({"states": ["failed"]}, [2]), ({"states": ["running"]}, [4]), ({"job_id": "backup"}, [2, 1]),
    ({"states": ["succeeded", "failed"], "job_id": "backup"}, [2, 1]),
    ({"states": FINAL_STATES}, [3, 2, 1]), ({"states": ["failed", "lost"]}, [2]),
    ({"since": NOW + 2}, [4, 3, 2]), ({"until": NOW + 2}, [1]),
    ({"since": NOW + 2, "until": NOW + 4}, [3, 2]), ({"job_id": "nothing"}, []),
    ({"states": ()}, [4, 3, 2, 1])])
def test_runs_are_chosen_by_state_job_and_time(db, wanted, ids):
    run(db, "1", "backup", "succeeded", queued_at=NOW + 1)
    run(db, "2", "backup", "failed", queued_at=NOW + 2)
    run(db, "3", "other", "succeeded", queued_at=NOW + 3)
    run(db, "4", "other", "running", queued_at=NOW + 4)
    assert [int(row["id"]) for row in list_runs(db, run_filter(**wanted))] == ids


def test_the_usual_duration_is_the_middle_of_the_newest_successes(db):
    for number, (state, took) in enumerate([
            ("succeeded", 5000), *[("succeeded", took) for took in (9, 1, 2, 8, 3, 7, 4, 6, 5, 10)],
            ("failed", 9999), ("running", None)]):
        run(db, f"run{number}", state=state, started_at=NOW,
            finished_at=None if took is None else NOW + took)
    run(db, "taken over", "other", "succeeded")
    assert usual_durations(db, ["backup", "other", "nothing"]) == {"backup": 6}


# What became of slots.

def test_the_row_about_a_slot_is_the_newest_that_begins_at_or_before_it(db):
    run(db, "1", slot=60, state="skipped", last_slot=180)
    run(db, "2", slot=240)
    run(db, "3", "other", slot=100)
    run(db, "4", slot=None)
    assert [row and row["id"] for row in (newest_slot_row(db, "backup", until) for until in (
        59, 60, 180, 239, 240, 9999))] == [None, "1", "1", "1", "2", "2"]
    assert newest_slot_row(db, "backup")["id"] == "2" and newest_slot_row(db, "none") is None


def test_the_runs_that_were_on_at_an_instant_are_those_between_their_begin_and_end(db):
    run(db, "1", state="succeeded", queued_at=NOW, finished_at=NOW + 10)
    run(db, "2", state="running", queued_at=NOW + 5)
    run(db, "3", state="skipped", queued_at=NOW, finished_at=NOW + 10)
    run(db, "4", "other", "running", queued_at=NOW)
    on = [[row["id"] for row in runs_on_at(db, "backup", NOW + at)] for at in (-1, 0, 5, 10)]
    assert on == [[], ["1"], ["1", "2"], ["2"]]


def test_the_last_decision_before_a_slot_is_that_of_a_server(db):
    run(db, "1", "other", trigger="schedule", queued_at=NOW - 50)
    run(db, "2", "other", trigger="manual", queued_at=NOW - 20)
    run(db, "3", "other", trigger="catch_up", queued_at=NOW + 90)
    run(db, "4", trigger="schedule", slot=int(NOW), queued_at=NOW + 90)
    assert last_decision(db, get_run(db, "4")) == NOW - 50
    assert last_decision(db, {"seq": 1, "slot": int(NOW)}) is None


def test_the_versions_of_a_job_say_since_when_it_is_what_it_is(db):
    for number, schedule in enumerate(["* * * * *", "0 * * * *", "0 * * * *"]):
        perform_apply(db, plan_apply(db, {None: [job(schedule=schedule)]}), NOW + number)
    assert [(since, Job(json.loads(spec)).schedule) for since, spec in job_versions(db, "backup")
            ] == [(NOW, ("* * * * *",)), (NOW + 1, ("0 * * * *",))]


# How the database is asked.

class Listener:
    """A connection that also notes how SQLite goes about each statement."""

    def __init__(self, db):
        self.db, self.plans = db, []

    def execute(self, statement, values=()):
        self.plans += [row[3] for row in self.db.execute("EXPLAIN QUERY PLAN " + statement, values)]
        return self.db.execute(statement, values)


@pytest.mark.parametrize("ask, index", [
    (active_runs, "runs_active"), (lambda db: active_runs(db, "a"), "runs_active (job_id=?)"),
    (lambda db: get_job(db, "backup"), "runs_active (job_id=?)"),
    (list_jobs, "runs_active (job_id=?)"),
    (lambda db: own_runs(db, "queued"), "runs_active"), (count_queued, "runs_active"), (count_apart, "runs_active"),
    (lambda db: step_rows(db, "a"), "runs_parent (parent=?)"),
    (count_running, "runs_state (state=?)"),
    (lambda db: paused_in_queue(db, NOW), "runs_state (state=?)"),
    (lambda db: slot_is_known(db, "a", 5), "runs_slot (job_id=? AND slot=?)"),
    (lambda db: newest_run(db, "a"), "runs_job (job_id=?)"),
    (lambda db: usual_durations(db, ["a"]), "runs_job (job_id=?)"),
    (lambda db: newest_slot_row(db, "a"), "runs_job (job_id=?)"),
    (lambda db: newest_slot_row(db, "a", 5), "runs_slot (job_id=? AND slot<?)"),
    (lambda db: runs_on_at(db, "a", 5), "runs_job (job_id=?)"),
    (lambda db: skip_slots(db, "a", skipped(60), NOW), "runs_slot (job_id=? AND slot<?)"),
    (lambda db: list_runs(db, run_filter(job_id="a")), "runs_job (job_id=?)"),
    (lambda db: list_runs(db, run_filter(["failed"], "a")), "runs_job (job_id=?)"),
    (lambda db: list_runs(db, run_filter(ACTIVE_STATES)), "runs_state (state=?)"),
    (lambda db: changed_jobs(db, 5), "jobs_changed (changed>?)")])
def test_what_is_asked_often_never_looks_at_all_runs(db, ask, index):
    apply(db, [job()])
    listener = Listener(db)
    ask(listener)
    assert any(plan.endswith((f"INDEX {index}", f"INDEX {index} ")) for plan in listener.plans), \
        listener.plans
    assert not any(re.match("SCAN (TABLE )?runs(?! USING INDEX runs_active)", plan)
                   for plan in listener.plans), listener.plans


def test_the_newest_runs_are_found_without_sorting_all(db):
    for wanted in ({}, {"states": FINAL_STATES}, {"states": ["failed"]}, {"job_id": "a"},
                   {"states": FINAL_STATES, "job_id": "a"}):
        listener = Listener(db)
        list_runs(listener, run_filter(**wanted))
        assert not any("TEMP B-TREE" in plan for plan in listener.plans), (wanted, listener.plans)


NEWER = {"RETURNING": "3.35", r"UPDATE\b[^;(]*\bFROM\b": "3.33",
         r"FILTER *\(": "3.30", r"\bIIF *\(": "3.32", "->": "3.38", "STRICT": "3.37",
         "VACUUM INTO": "3.27", r"UNIXEPOCH *\(": "3.38", "NULLS (FIRST|LAST)": "3.30",
         "DROP COLUMN": "3.35", "MATERIALIZED": "3.35", "GENERATED ALWAYS": "3.31",
         r"\b(RIGHT|FULL) (OUTER )?JOIN": "3.39", "IS (NOT )?DISTINCT FROM": "3.39",
         r"STRING_AGG|\bCONCAT(_WS)? *\(": "3.44", r"\bFORMAT *\(": "3.38", "EXCLUDE ": "3.28",
         "GROUPS ": "3.28", r"\d_\d": "3.46", r"MEDIAN *\(": "3.51",
         r"\bJSON\w* *\(": "to be built with JSON"}


def statements(text):
    """(line, statement) of each text constant of a source that looks like SQL."""
    for node in ast.walk(ast.parse(text)):
        texts = [node] if isinstance(node, ast.Constant) else \
            node.values if isinstance(node, ast.JoinedStr) else []
        for part in texts:
            if isinstance(part, ast.Constant) and isinstance(part.value, str) and re.search(
                    "SELECT|INSERT|UPDATE|DELETE|CREATE|PRAGMA|BEGIN|WHERE|ORDER BY", part.value):
                yield node.lineno, part.value


def too_new(text):
    return [f"{line}: {pattern} needs SQLite {version}" for line, statement in statements(text)
            for pattern, version in NEWER.items() if re.search(pattern, statement.upper())]


def with_sql():
    """The sections store and tables."""
    text = Path(roexec.__file__).read_text()
    return re.search(r"^# ==== \d+ store =.*?^# ==== \d+ tables =.*?(?=^# ==== )", text, re.S | re.M)[0]


def test_sql_stays_within_sqlite_3_26():
    assert len(list(statements(with_sql()))) > 100
    assert too_new(with_sql()) == []


@pytest.mark.parametrize("statement", [
    "INSERT INTO a VALUES (1) RETURNING id", "UPDATE a SET b = c.b FROM c WHERE c.id = a.id",
    "SELECT COUNT(*) FILTER (WHERE a) FROM b", "SELECT iif(a, 1, 2) FROM b",
    "SELECT a ->> '$.b' FROM c", "SELECT json_extract(a, '$.b') FROM c", "CREATE TABLE a (b INTEGER) STRICT", "SELECT unixepoch()",
    "SELECT a FROM b ORDER BY a NULLS FIRST", "ALTER TABLE a DROP COLUMN b -- UPDATE"])
def test_newer_sql_would_be_seen(statement):
    assert too_new(f"db.execute({statement!r})")
    assert too_new(f'db.execute(f"{statement} {{more}}")')


# That only SQLite opens the database file: to close any other descriptor would drop its locks.

opened = []
sys.addaudithook(lambda event, values: opened.append(values[0]) if event == "open" else None)


@pytest.mark.parametrize("name", ["store", "my.db"])
def test_the_database_file_is_opened_by_sqlite_alone(tmp_path, name, monkeypatch):
    made = Store(str(tmp_path / name)).create()
    made.keep_open()
    count_up(made, 2)
    monkeypatch.setattr(roexec, "_LARGE_LOG", 0)
    made.checkpoint()
    assert made.exists and value(made) == 2 and made.server() is None
    made.close()
    monkeypatch.setattr(roexec, "_MIGRATIONS", [*roexec._MIGRATIONS, MORE])
    made.create()
    paths = {os.fsdecode(path) for path in opened if isinstance(path, (str, bytes, os.PathLike))}
    assert made.file("store.lock") in paths
    assert not [path for path in paths if path.startswith(made.database) and ".d/" not in path]


# What holds as long as nobody changes the database.

def test_what_was_read_before_a_memo_lost_its_connection_is_not_kept(store):
    memo = roexec.Memo(store)
    version = memo.version()
    memo.close()                        # as an error of SQLite does
    with store.write() as db:
        roexec.set_meta(db, "x", 1)
    memo.version()
    memo.keep("x", version, "what was there before", math.inf)
    assert memo.get("x", 0) is None
    memo.close()


def test_a_memo_keeps_so_many_values_and_bytes(store):
    memo = roexec.Memo(store, most=3, room=100)

    def kept(*sizes):
        count_up(store, 1)
        version = memo.version()
        for number, size in enumerate(sizes):
            memo.keep(number, version, str(number), 9, size)
        return [number for number in range(len(sizes)) if memo.get(number, 8) == str(number)]

    assert kept(1, 1, 1) == [0, 1, 2] and kept(60, 40) == [0, 1]
    assert kept(60, 41) == [1] and memo.get(1, 10) is None
    assert kept(1, 101) == [0] and kept(0, 0, 0, 0) == [3]
    count_up(store, 1)
    assert memo.get(3, 8) is None
    memo.close()
