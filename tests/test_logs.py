"""One run's log: what is written, that every byte comes back, and what a full disk does to it."""
import contextlib
import errno
import gzip
import os
import random
import re
import resource
import stat
import tracemalloc

import pytest

import roexec
from roexec import LogWriter, StoredLog, follow, newest_lines, select_lines

AT = 1754013600             # 2025-08-01T02:00:00Z
STAMP = b"2025-08-01T02:00:00Z"


@pytest.fixture
def log(tmp_path):
    """A log that has just been begun, in the folder `tmp_path`."""
    writer = LogWriter(str(tmp_path), "backup", AT, "abcd123456")
    yield writer
    writer.close(AT)


@pytest.fixture
def content(log, tmp_path):
    """`content()` is what the log holds."""
    return lambda: (tmp_path / log.path).read_bytes()


def lines(*texts):
    return b"".join(STAMP + b" " + text + b"\n" for text in texts)


# The file.

def test_a_log_lies_below_its_job_and_bears_the_start_of_its_run(log, tmp_path):
    assert log.path == "logs/backup/2025-08-01T02:00:00.log"
    assert (tmp_path / log.path).is_file()


def test_a_second_run_in_the_same_second_gets_a_log_with_its_id(log, tmp_path):
    second = LogWriter(str(tmp_path), "backup", AT + 0.9, "wxyz987654")
    second.write("mine", AT)
    second.close(AT)
    assert second.path == "logs/backup/2025-08-01T02:00:00-wxyz987654.log"
    assert (tmp_path / log.path).read_bytes() == b""
    with pytest.raises(FileExistsError):
        LogWriter(str(tmp_path), "backup", AT, "wxyz987654")


def test_a_log_that_lies_beside_those_of_other_nodes_has_the_id_of_its_run(tmp_path):
    first = LogWriter(str(tmp_path), "backup", AT, "abcd123456", step="a.b_c", shared=True)
    first.write("mine", AT)
    first.close(AT)
    assert first.path == "logs/backup/2025-08-01T02:00:00-a.b_c-abcd123456.log"
    size = os.stat(tmp_path / first.path).st_size
    assert roexec.remove_log(str(tmp_path), first.path) == size > 0
    assert not (tmp_path / first.path).exists()


def test_only_the_owner_may_read_a_log_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        LogWriter(str(tmp_path), "backup", AT, "a").close(AT)
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / path).stat().st_mode) for path in (
        "logs", "logs/backup", "logs/backup/2025-08-01T02:00:00.log")]
    assert modes == [0o700, 0o700, 0o600]


@pytest.mark.parametrize("link", [
    "logs", "logs/backup", "logs/backup/2025-08-01T02:00:00.log"])
def test_nothing_is_written_through_a_link(link, tmp_path):
    (tmp_path / "elsewhere/backup").mkdir(parents=True)
    (tmp_path / link).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / link).symlink_to(tmp_path / "elsewhere")
    try:
        log = LogWriter(str(tmp_path), "backup", AT, "a")
        log.write("x", AT)
        log.close(AT)
        assert log.path == "logs/backup/2025-08-01T02:00:00-a.log"
        assert link.endswith(".log"), "a link to a folder is refused"
    except OSError as error:
        assert error.filename == str(tmp_path / "logs/backup/2025-08-01T02:00:00.log")
    assert list((tmp_path / "elsewhere").rglob("*")) == [tmp_path / "elsewhere/backup"]


def test_a_link_in_place_of_a_log_is_not_read(log, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / log.path)
    with pytest.raises(OSError, match="symbolic links"):
        StoredLog(str(tmp_path / "link"))
    with pytest.raises(FileNotFoundError):
        StoredLog(str(tmp_path / "gone"))


def test_no_descriptor_of_a_log_is_inherited_or_left_open(tmp_path):
    before = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    log = LogWriter(str(tmp_path), "backup", AT, "a")
    assert not os.get_inheritable(log._descriptor)
    with StoredLog(str(tmp_path / log.path)):
        opened = set(os.listdir("/proc/self/fd")) - set(before) if before else ()
        for number in opened:
            with contextlib.suppress(OSError):          # the listing's own
                assert not os.get_inheritable(int(number))
    log.close(AT)
    log.close(AT)
    assert not before or set(os.listdir("/proc/self/fd")) <= set(before)


def test_a_log_that_was_begun_goes_on_at_its_end(log, tmp_path, content):
    log.write("Starting run", AT)
    with open(tmp_path / log.path, "ab") as file:
        file.write(STAMP + b" [OUT] its writer was ki")
    again = LogWriter(str(tmp_path), "backup", AT, "a", path=log.path)
    again.write("Going on", AT, "ERROR")
    again.close(AT)
    assert content() == lines(b"[INFO] Starting run", b"[OUT] its writer was ki",
                              b"[ERROR] Going on")


def test_a_log_that_was_begun_and_is_gone_is_made_anew(tmp_path):
    log = LogWriter(str(tmp_path), "backup", AT, "a", path="logs/backup/x.log")
    log.write("Going on", AT)
    log.close(AT)
    assert (tmp_path / "logs/backup/x.log").read_bytes() == lines(b"[INFO] Going on")


def test_a_log_that_was_begun_is_not_followed_through_a_link(log, tmp_path):
    (tmp_path / "logs/backup/link.log").symlink_to(tmp_path / log.path)
    with pytest.raises(OSError, match="symbolic links"):
        LogWriter(str(tmp_path), "backup", AT, "a", path="logs/backup/link.log")


# Lines and output.

def test_a_log_reads_as_the_design_shows_it(log, content):
    log.write("Starting run", AT)
    log.write("Running /usr/local/bin/backup.sh", AT + 2.9)
    log.output("out", b"dumping 14 tables\ndone\n", AT + 2)
    log.output("err", b"warning: table x is empty\n", AT + 3)
    log.write("Run wxyz987 failed, exit=1", AT + 315, "ERROR")
    assert content() == b"""\
2025-08-01T02:00:00Z [INFO] Starting run
2025-08-01T02:00:02Z [INFO] Running /usr/local/bin/backup.sh
2025-08-01T02:00:02Z [OUT] dumping 14 tables
2025-08-01T02:00:02Z [OUT] done
2025-08-01T02:00:03Z [ERR] warning: table x is empty
2025-08-01T02:05:15Z [ERROR] Run wxyz987 failed, exit=1
"""


def test_a_line_of_roexecs_own_is_one_line_without_control_characters(log, content):
    log.write("Running a\nb\x1b[2J \udcff ä", AT)
    assert content() == lines("[INFO] Running a\\nb\\x1b[2J \\udcff ä".encode())


OUT, ERR, FLUSH, WRITE = "out", "err", "flush", "write"


@pytest.mark.parametrize("events, expected", [
    ([(OUT, b"a"), (OUT, b"b\n")], [b"[OUT] ab"]),
    ([(OUT, b"a\nb"), (OUT, b"c\nd\n")], [b"[OUT] a", b"[OUT] bc", b"[OUT] d"]),
    ([(OUT, b"a"), (ERR, b"b\n"), (OUT, b"c\n")], [b"[OUT~] a", b"[ERR] b", b"[OUT] c"]),
    ([(OUT, b"a"), (ERR, b"b")], [b"[OUT~] a"]),
    ([(OUT, b"a"), (WRITE, "x"), (OUT, b"\n")], [b"[OUT~] a", b"[INFO] x", b"[OUT] "]),
    ([(ERR, b"a"), (FLUSH, None), (FLUSH, None)], [b"[ERR~] a"]),
    ([(OUT, b"\n\n")], [b"[OUT] ", b"[OUT] "]),
    ([(OUT, b""), (FLUSH, None)], []),
    ([(OUT, b"\r\x00\xff\n")], [b"[OUT] \r\x00\xff"]),
])
def test_a_piece_without_its_end_waits_until_a_line_is_needed(events, expected, log, content):
    for what, value in events:
        if what in (OUT, ERR):
            log.output(what, value, AT)
        else:
            log.flush(AT) if what == FLUSH else log.write(value, AT)
    assert content() == lines(*expected)


def test_what_waits_is_counted_and_written_at_the_end(log, content):
    log.output("err", b"one\ntwo", AT)
    assert log.pending == 3
    log.close(AT)
    assert log.pending == 0 and content() == lines(b"[ERR] one", b"[ERR~] two")


def test_no_more_than_64_kib_wait(log, content):
    log.output("out", b"x" * 65536, AT)
    assert log.pending == 65536 and content() == b""
    log.output("out", b"x", AT)
    assert log.pending == 0 and content() == lines(b"[OUT~] " + b"x" * 65537)


def random_chunks(seed):
    """[(stream, bytes)] with short and long lines, unfinished ones, and what looks like stamps."""
    choose = random.Random(seed)
    pieces = [b"\n", b"\n\n", b"a", b"text \xff\x00\r", STAMP + b" [OUT] x\n", b" [ERR~] ",
              b"\n" + STAMP + b" [OUT~] y", b"z" * 40_000, b"\n" * 300]
    return [(choose.choice(("out", "err")), b"".join(choose.choices(pieces, k=choose.randrange(7))))
            for _ in range(choose.randrange(40))]


@pytest.mark.parametrize("seed", range(60))
def test_both_streams_come_back_byte_for_byte_in_the_order_of_delivery(seed, log, content):
    choose, chunks = random.Random(-seed - 1), random_chunks(seed)
    for number, (stream, data) in enumerate(chunks):
        log.output(stream, data, AT + number / 3)
        assert log.pending <= 65536
        if choose.random() < 0.2:
            log.write(f"{STAMP} [OUT] of no stream", AT)
        if choose.random() < 0.2:
            log.flush(AT)
    log.close(AT)
    stored = content()
    assert all(line.startswith(b"2025-08-01T02:00:") for line in stored.split(b"\n")[:-1])
    assert select_lines(stored, raw=True) == b"".join(data for _, data in chunks)
    for wanted in ("out", "err"):
        assert select_lines(stored, stream=wanted) == b"".join(
            data for stream, data in chunks if stream == wanted)


def test_lines_are_selected_as_asked():
    data = lines(b"[INFO] Starting", b"[OUT] one", b"[ERR] two", b"[OUT~] three", b"[ERROR] x")
    assert select_lines(data) == data
    assert select_lines(data, raw=True) == b"one\ntwo\nthree"
    assert select_lines(data, stream="out") == select_lines(data, True, "out") == b"one\nthree"
    assert select_lines(data, stream="err") == b"two\n"
    assert select_lines(b"", raw=True) == b""


# A full disk.

class Disk:
    """Stands in for the disk of a log: it takes `room` bytes more and fails with `code` then."""

    def __init__(self, monkeypatch):
        self.room, self.code, self.tries = None, errno.ENOSPC, 0
        self.real_write, self.real_open = os.pwrite, os.open
        monkeypatch.setattr(roexec.os, "pwrite", self.pwrite)
        monkeypatch.setattr(roexec.os, "open", self.open)

    def pwrite(self, descriptor, data, offset):
        self.tries += 1
        if self.room is None:
            return self.real_write(descriptor, data, offset)
        if not self.room:
            raise OSError(self.code, os.strerror(self.code))
        taken = self.real_write(descriptor, bytes(data)[:self.room], offset)
        self.room -= taken
        return taken

    def open(self, path, flags, *arguments, **options):
        if flags & os.O_CREAT and self.room == 0:
            raise OSError(self.code, os.strerror(self.code))
        return self.real_open(path, flags, *arguments, **options)


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


@pytest.mark.parametrize("code, words", [
    (errno.ENOSPC, b"No space left on device"), (errno.EDQUOT, b"Disk quota exceeded"),
    (errno.EIO, b"Input/output error"), (errno.EROFS, b"Read-only file system")])
def test_a_failing_disk_stops_the_log_and_the_log_says_how_much_is_missing(
        code, words, log, disk, content):
    log.output("out", b"before\n", AT)
    disk.room, disk.code = 0, code
    log.output("out", b"12345\n", AT)
    log.output("err", b"678", AT + 0.5)
    log.write("Run failed", AT + 0.5, "ERROR")
    assert log.lost == 9 and content() == lines(b"[OUT] before")
    disk.room = None
    log.output("out", b"after\n", AT + 1)
    assert log.lost == 9
    assert content() == lines(b"[OUT] before") + lines(
        b"[ERROR] 9 bytes of output are missing here: " + words, b"[OUT] after",
    ).replace(b"00Z", b"01Z")


def test_a_full_disk_is_tried_again_each_second_and_at_the_end(log, disk, content):
    disk.room = 0
    for tenth in range(35):
        log.output("out", b"x\n", AT + tenth / 10)
    assert disk.tries == 4 and log.lost == 70
    log.output("out", b"x\n", AT - 100)
    assert disk.tries == 5, "a clock that was set back does not stop it"
    disk.room = None
    log.output("out", b"end", AT - 100)
    log.close(AT - 100)
    assert log.lost == 72
    assert select_lines(content(), raw=True) == b"end"
    assert content().count(b"72 bytes of output are missing here") == 1


def test_each_gap_says_its_own_bytes(log, disk, content):
    for number in (1, 2):
        disk.room = 0
        log.output("out", b"x" * number + b"\n", AT + 10 * number)
        disk.room = None
        log.output("out", b"y\n", AT + 10 * number + 1)
    assert log.lost == 5
    assert content().count(b" 2 bytes") == content().count(b" 3 bytes") == 1


@pytest.mark.parametrize("room", range(0, 120, 7))
def test_a_disk_that_fills_in_the_middle_of_a_line_leaves_whole_lines(room, log, disk, content):
    sent = b"one\ntwo\n" + b"three\n"
    log.write("Starting run", AT)
    disk.room = room
    log.output("out", sent[:8], AT)
    log.output("out", sent[8:], AT)
    log.output("err", b"piece", AT)
    log.flush(AT)
    kept = select_lines(content(), raw=True)
    assert content().endswith(b"\n") and (sent + b"piece").startswith(kept)
    assert log.lost == len(sent) + 5 - len(kept)
    disk.room = None
    log.close(AT)
    told = b"%d bytes of output are missing here" % log.lost
    assert (told in content()) is (log.lost > 0)
    assert content().startswith(lines(b"[INFO] Starting run"))


def test_a_limit_of_the_kernel_leaves_whole_lines_too(log, content):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        log.output("out", b"0123456789\n" * 20, AT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert content() == lines(b"[OUT] 0123456789") * 2 and log.lost == 18 * 11
    log.close(AT)
    assert content()[76:] == lines(b"[ERROR] 198 bytes of output are missing here: File too large")


def test_a_log_for_which_there_is_no_room_yet_is_made_when_there_is(tmp_path, disk):
    disk.room = 0
    log = LogWriter(str(tmp_path), "backup", AT, "a")
    log.output("out", b"one\n", AT)
    assert (log.path, log.lost) == (None, 4)
    disk.room = None
    log.output("out", b"two\n", AT + 1)
    log.close(AT + 1)
    assert (tmp_path / log.path).read_bytes() == lines(
        b"[ERROR] 4 bytes of output are missing here: No space left on device",
        b"[OUT] two").replace(b"00Z", b"01Z")


def test_a_run_without_any_room_ends_without_a_log(tmp_path, disk):
    disk.room = 0
    log = LogWriter(str(tmp_path), "backup", AT, "a")
    log.output("out", b"one\ntwo", AT)
    log.close(AT)
    assert (log.path, log.lost) == (None, 7)


def test_a_log_that_may_not_be_made_is_an_error(tmp_path):
    (tmp_path / "logs").write_text("")
    with pytest.raises(OSError, match=str(tmp_path)):
        LogWriter(str(tmp_path), "backup", AT, "a")


# Reading.

@pytest.mark.parametrize("seed", range(30))
def test_the_last_lines_and_starts_of_lines_are_found_at_every_size(seed, tmp_path, monkeypatch):
    choose = random.Random(seed)
    monkeypatch.setattr(roexec, "_MOST_KEPT", choose.choice((1, 2, 7, 64)))
    data = b"".join(b"x" * choose.randrange(20) + b"\n" for _ in range(choose.randrange(30)))
    (tmp_path / "log").write_bytes(data)
    starts = [0] + [index + 1 for index, byte in enumerate(data) if byte == 10]
    with StoredLog(str(tmp_path / "log")) as file:
        for number in range(35):
            expected = b"".join(data.splitlines(True)[-number:] if number else [])
            assert data[file.tail(number):] == expected
        for offset in range(len(data) + 1):
            assert file.line_start(offset) == min(start for start in starts if start >= offset)
        assert file.line_start(len(data) + 5) == len(data)


def test_a_log_that_has_ended_is_read_whole_from_an_offset(log, tmp_path, content):
    log.output("out", b"one\ntwo\n", AT)

    def read(offset):
        return b"".join(part.data for part in follow(str(tmp_path / log.path), offset=offset))
    assert read(0) == content()
    assert read(1) == read(30) == lines(b"[OUT] two"), "what is no start means the next line"
    assert read(60) == read(1000) == b""


def test_following_gives_each_line_once_and_ends_after_the_last(log, tmp_path, content):
    script = iter([
        lambda: log.output("out", b"one\n", AT),
        lambda: log.output("err", b"two\nthr", AT),
        lambda: None,
        lambda: log.output("err", b"ee\n", AT)])
    over = []

    def wait(seconds):
        assert 0 < seconds <= 0.2
        next(script)()

    def ended():
        if b"three" in content() and not over:
            log.write("Completed, exit=0", AT)      # between the look for lines and this answer
            over.append(True)
        return bool(over)

    chunks = [part.data for part in follow(str(tmp_path / log.path), ended, wait=wait)]
    assert chunks == [lines(b"[OUT] one"), lines(b"[ERR] two"), lines(b"[ERR] three"),
                      lines(b"[INFO] Completed, exit=0")]


def test_a_line_is_given_when_it_is_whole_and_at_the_end_in_any_case(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"one\ntw")
    steps = [b"one\ntwo\nth"]
    parts = follow(str(path), lambda: not steps, wait=lambda seconds: path.write_bytes(steps.pop()))
    assert [(part.begin, part.end, part.data) for part in parts] == [
        (0, 4, b"one\n"), (4, 8, b"two\n"), (8, 10, b"th")]


def test_a_large_log_is_read_in_chunks_of_whole_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(roexec, "_READ_BLOCK", 1000)
    data = b"".join(b"%d\n" % number for number in range(5000)) + b"y" * 2500 + b"\nz\n"
    (tmp_path / "log").write_bytes(data)
    chunks = []

    def ended():
        assert b"".join(chunks) == data, "nobody is asked before all has been read"
        return True

    for part in follow(str(tmp_path / "log"), ended):
        chunks.append(part.data)
    assert b"".join(chunks) == data and max(map(len, chunks)) <= 1000
    assert all(chunk.endswith(b"\n") for chunk in chunks[:20])


def test_the_longest_line_that_is_written_is_read_as_one(log, tmp_path):
    log.output("out", b"x" * 65536, AT)
    log.output("out", b"y" * ((1 << 20) - 1) + b"\n", AT)
    parts = list(follow(str(tmp_path / log.path)))
    assert len(parts) == 1 and parts[0].data.count(b"\n") == 1


def test_memory_does_not_grow_with_the_log(log, tmp_path):
    chunks = [b"x" * (1 << 20), b"y" * 59 + b"\n", (b"z" * 59 + b"\n") * 10_000]
    tracemalloc.start()
    try:
        for number in range(24):
            log.output("out", chunks[number % 3], AT)
        read = sum(len(select_lines(part.data, raw=True)) for part in follow(
            str(tmp_path / log.path)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert read == 8 * sum(map(len, chunks)) and peak < 12 << 20


# Size.

class Small:
    """A log with a limit of 800 bytes, so of parts of 200, and all that was ever written to it."""

    def __init__(self, tmp_path, **more):
        self.path, self.folder, self.whole = str(tmp_path / "logs/x.log"), tmp_path, b""
        self.writer = LogWriter(str(tmp_path), "x", AT, "id", path="logs/x.log", most=800, **more)

    def write(self, *numbers):
        for number in numbers:
            text = b"%d" % number
            self.writer.output("out", text + b"\n", AT)
            self.whole += lines(b"[OUT] " + text)

    def parts(self):
        return [self.path, *sorted(map(str, (self.folder / "logs/x.log.parts").glob("*")))]

    def check(self):
        """What is stored is the first lines and the newest, each at the offset it always had."""
        stored, offset, gaps = b"", 0, []
        for part in follow(self.path):
            assert part.begin == offset
            offset = part.end
            if part.is_gap:
                gaps.append((part.begin, part.end))
                told = b" [INFO] %d bytes of the log were removed here: from=%d to=%d\n"
                assert part.data == STAMP + told % (part.end - part.begin, part.begin, part.end)
            else:
                assert part.data == self.whole[part.begin:part.end] and part.data.endswith(b"\n")
                stored += part.data
        assert offset == len(self.whole) == self.writer.size
        return stored, gaps


@pytest.fixture
def small(tmp_path):
    small = Small(tmp_path)
    yield small
    small.writer.close(AT)


def test_a_log_at_its_largest_keeps_its_first_quarter_and_the_newest_lines(small):
    counts = set()
    for number in range(300):
        small.write(number)
        stored, gaps = small.check()
        sizes = [os.path.getsize(path) for path in small.parts()]
        assert sum(sizes) == len(stored) <= 800 and max(sizes) <= 200
        assert len(gaps) == (1 if len(small.whole) > len(stored) else 0)
        if gaps:
            assert gaps[0][0] == sizes[0] > 150 and len(stored) > 500
        counts.add(len(sizes))
    assert counts == {1, 2, 3, 4}


@pytest.mark.parametrize("size", [1, 30, 173, 174, 500, 3000])
def test_chunks_of_every_size_are_divided_at_the_ends_of_lines(size, small):
    text = b"y" * size + b"\n"
    small.writer.output("out", text * 40, AT)
    small.whole = lines(b"[OUT] " + text[:-1]) * 40
    stored, _ = small.check()
    assert len(stored) <= max(800, 4 * (size + 28))


@pytest.mark.parametrize("killed", [False, True])
def test_a_supervisor_that_goes_on_with_a_log_goes_on_with_its_parts(killed, small, tmp_path):
    for number in range(40):
        small.write(number)
        if killed:
            with open(small.parts()[-1], "ab") as file:
                file.write(STAMP + b" [OUT] its writer was ki")
            small.whole += lines(b"[OUT] its writer was ki")
        else:
            small.writer.close(AT)
        small.writer = LogWriter(str(tmp_path), "x", AT, "id", path="logs/x.log", most=800)
        small.check()


def test_offsets_and_the_last_lines_are_found_beyond_what_was_removed(small):
    small.write(*range(100, 200))
    _, [(gap, after)] = small.check()
    whole, starts = small.whole, range(0, len(small.whole) + 1, 31)
    with StoredLog(small.path) as log:
        assert log.end() == len(whole)
        for offset in range(len(whole) + 1):
            expected = offset if gap <= offset <= after else min(
                start for start in starts if start >= offset)
            assert log.line_start(offset) == expected
        kept = (len(whole) - after) // 31
        for number in range(kept + 1):
            assert log.tail(number) == len(whole) - 31 * number
        assert log.tail(kept + 1) == gap - 31 and log.tail(1000) == 0
        assert log.read(gap, 50)[0] == after and log.read(gap - 31, 1000) == (
            gap - 31, whole[gap - 31:gap])
    parts = list(follow(small.path, offset=gap + 5))
    assert (parts[0].begin, parts[0].end, parts[0].is_gap) == (gap + 5, after, True)
    assert newest_lines(small.path, 100) == whole[-93:]


def test_a_reader_that_is_slower_than_the_writer_is_told_what_it_has_missed(small):
    """Those that read at different speeds see the same lines at the same offsets."""
    for step in (1, 7, 23, 60):
        written, reader = len(small.whole), follow(
            small.path, lambda: False, offset=len(small.whole),
            wait=lambda _: small.write(*range(step)))
        seen, end = b"", written
        for part in reader:
            assert part.begin == end
            if not part.is_gap:
                assert part.data == small.whole[part.begin:part.end]
            seen, end = seen + part.data, part.end
            if end > written + 4000:
                break
        reader.close()
        assert (b"were removed here" in seen) is (step > 20)


def test_a_reader_keeps_no_more_files_open_than_there_are_parts(small):
    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    before, most = descriptors(), 0
    for part in follow(small.path, lambda: len(small.whole) > 20_000,
                       wait=lambda _: small.write(*range(9))):
        most = max(most, descriptors() - before)
    assert most <= 5 and descriptors() <= before


@pytest.mark.parametrize("room", range(0, 700, 40))
def test_a_disk_that_fills_up_leaves_whole_lines_in_each_part(room, small, disk):
    small.write(*range(30))
    disk.room = room
    small.writer.output("out", b"".join(b"%d\n" % number for number in range(60)), AT)
    disk.room = None
    small.writer.output("out", b"end\n", AT + 1)
    small.writer.close(AT + 1)
    stored = b"".join(part.data for part in follow(small.path) if not part.is_gap)
    assert all(line.startswith(STAMP[:17]) for line in stored.split(b"\n")[:-1])
    assert stored.endswith(b"[OUT] end\n")
    assert (b"bytes of output are missing here" in stored) is (small.writer.lost > 0)
    assert max(map(os.path.getsize, small.parts())) <= 200


def test_a_larger_limit_than_before_removes_nothing_more(small, tmp_path):
    small.write(*range(100))
    small.writer.close(AT)
    kept = small.parts()
    small.writer = LogWriter(str(tmp_path), "x", AT, "id", path="logs/x.log", most=10_000)
    small.write(*range(50))
    assert small.parts() == kept
    small.check()


# Packing.

@pytest.fixture
def packed(tmp_path):
    """`packed(most)` is (writer, path, the lines before it was packed) of a log of two MiB."""
    def make(most=float("inf")):
        writer = LogWriter(str(tmp_path), "backup", AT, "abcd123456", most=most)
        content = random.Random(1)
        for number in range(2000):
            data = content.randbytes(content.randrange(1500)).replace(b"\n", b"")
            writer.output(content.choice(("out", "err")), b"%d " % number + data + b"\n", AT)
        writer.close(AT)
        path = str(tmp_path / writer.path)
        before = pieces(path)
        assert roexec.pack_log(str(tmp_path), writer.path, 1 << 40) > 0
        return writer, path, before
    return make


def pieces(path, offset=0):
    return b"".join(found.data for found in follow(path, offset=offset))


@pytest.mark.parametrize("most", [float("inf"), 1 << 20])
def test_a_packed_log_reads_as_before_from_any_offset(packed, most):
    writer, path, before = packed(most)
    assert not os.path.exists(path) and pieces(path) == before
    with StoredLog(path) as log:
        assert log.end() == writer.size
        tail = log.tail(3)
        assert before.endswith(pieces(path, tail)) and pieces(path, tail).count(b"\n") == 3
        offsets = [0, writer.size - 1, *random.Random(2).sample(range(writer.size), 20)]
        for offset in map(log.line_start, offsets):
            assert before.endswith(pieces(path, offset)[200:])
    assert newest_lines(path, 5000) in before


def test_gzip_unpacks_a_packed_log(packed):
    _, path, before = packed()
    with gzip.open(path + ".gz") as file:
        assert file.read() == before
    assert os.stat(path + ".gz").st_mode & 0o777 == 0o600


def test_a_log_is_packed_once(packed, tmp_path):
    writer, path, before = packed()
    inode = os.stat(path + ".gz").st_ino
    assert roexec.pack_log(str(tmp_path), writer.path, 1 << 40) == 0
    assert os.stat(path + ".gz").st_ino == inode


def test_whoever_reads_a_log_while_it_is_packed_goes_on(tmp_path, log):
    for number in range(1000):
        log.output("out", b"%0100d\n" % number, AT)
    log.flush(AT)
    path = str(tmp_path / log.path)
    whole = pieces(path)
    with StoredLog(path) as reader:
        roexec.pack_log(str(tmp_path), log.path, 1 << 40)
        assert reader.read(0, 1 << 20)[1] == whole


@pytest.mark.parametrize("cut, pad", [(-1, b""), (20, b""), (0, b"junk" * 10), (500_000, b"")])
def test_a_damaged_packed_log_is_an_error_in_words(packed, cut, pad):
    _, path, _ = packed()
    with open(path + ".gz", "r+b") as file:
        file.truncate(os.fstat(file.fileno()).st_size + cut if cut < 0 else cut or None)
        file.seek(0, os.SEEK_END)
        file.write(pad)
    with pytest.raises(OSError, match="the packed log is damaged"):
        pieces(path)


def test_changed_bytes_of_a_packed_log_are_noticed(packed):
    _, path, _ = packed()
    with open(path + ".gz", "r+b") as file:
        file.seek(5000)
        file.write(b"changed")
    with pytest.raises(OSError, match="the packed log is damaged"):
        pieces(path)


@pytest.mark.parametrize("path", ["logs/x/../../y.log", "logs/../x.log", "/etc/x.log", "x.log",
                                  "logs/x/y", "logs/x/y.log.gz", "logs//y.log"])
def test_nothing_but_a_log_is_removed(tmp_path, path):
    (tmp_path / "logs/x").mkdir(parents=True)
    for name in ("y.log", "x.log", "logs/x.log", "logs/x/y", "logs/x/y.log.gz"):
        (tmp_path / name).touch()
    assert roexec.remove_log(str(tmp_path), path) == 0
    assert (tmp_path / "y.log").exists() and (tmp_path / "logs/x/y.log.gz").exists()


# Lines.

def test_the_attempt_of_a_line_is_told_and_a_part_of_a_line_is_read_too(tmp_path):
    path = tmp_path / "x.log"
    path.write_bytes(lines(b"[INFO] Starting run", b"[INFO] Attempt 1", b"[OUT] Attempt 7",
                           b"[ERROR] Attempt 1 failed, exit=1", b"[INFO] Attempt 2",
                           b"[ERR~] a\rb") + b"2025-08-01T0")
    found = list(roexec.read_lines(path))
    assert [(line.stream, line.attempt, line.partial) for line in found] == [
        ("info", None, False), ("info", 1, False), ("out", 1, False), ("error", 1, False),
        ("info", 2, False), ("err", 2, True), ("info", 2, False)]
    assert found[5].line == b"a\rb" and found[6].line == b"2025-08-01T0"
    assert found[6].time == STAMP.decode()


def test_lines_are_chosen_by_instant_and_text():
    data = (b"2025-08-01T02:00:00Z [OUT] old\n2025-08-01T02:00:05Z [OUT] OUT of it\n"
            b"2025-08-01T02:00:06Z [ERR] new\n")
    assert roexec.matching_lines(data) == data
    assert roexec.matching_lines(data, AT + 5.5) == data[31:]
    assert roexec.matching_lines(data, None, re.compile(b"^OUT")) == data[31:68]


# The server's own log.

DAY = 86400


def test_the_log_of_a_server_is_a_new_file_each_day_and_seven_old_ones_stay(tmp_path):
    write = roexec.ServerLog(str(tmp_path / "s.log"))
    for day in range(10):
        for text in ("first", "second"):
            write(f"{text} of {day}", at=AT + day * DAY)
    names = sorted(os.listdir(tmp_path))
    assert names == ["s.log", *(f"s.log.2025-08-{day:02}" for day in range(3, 10))]
    assert (tmp_path / "s.log.2025-08-04").read_text() == (
        "2025-08-04T02:00:00Z [INFO] first of 3\n2025-08-04T02:00:00Z [INFO] second of 3\n")
    assert (tmp_path / "s.log").stat().st_mode & 0o007 == 0


def test_a_server_that_starts_again_goes_on_with_the_file_of_the_day(tmp_path):
    path = tmp_path / "s.log"
    roexec.ServerLog(str(path))("one", at=AT)
    os.utime(path, (AT, AT))
    roexec.ServerLog(str(path))("two", "ERROR", at=AT + 60)
    assert path.read_text().splitlines() == ["2025-08-01T02:00:00Z [INFO] one",
                                             "2025-08-01T02:01:00Z [ERROR] two"]
    os.utime(path, (AT, AT))
    roexec.ServerLog(str(path))("three", at=AT + DAY)
    assert len((tmp_path / "s.log.2025-08-01").read_text().splitlines()) == 2
    assert path.read_text() == "2025-08-02T02:00:00Z [INFO] three\n"


def test_the_log_of_a_server_may_be_moved_by_others(tmp_path):
    path = tmp_path / "s.log"
    write = roexec.ServerLog(str(path))
    write("one", at=AT)
    path.rename(tmp_path / "moved")
    write("two", at=AT)
    assert path.read_text().endswith("two\n") and "two" not in (tmp_path / "moved").read_text()


def test_what_cannot_be_written_there_goes_to_standard_error(tmp_path, capsys):
    write = roexec.ServerLog(str(tmp_path / "none/s.log"))
    write("one", at=AT)
    assert capsys.readouterr().err == (
        f"2025-08-01T02:00:00Z [INFO] one (cannot write {tmp_path}/none/s.log: No such file or "
        "directory)\n")
    (tmp_path / "none").mkdir()
    write("two", at=AT)
    assert (tmp_path / "none/s.log").read_text() == "2025-08-01T02:00:00Z [INFO] two\n"


def test_without_a_file_it_is_standard_error(capsys):
    roexec.ServerLog()("one\ntwo", at=AT)
    assert capsys.readouterr().err == "2025-08-01T02:00:00Z [INFO] one\\ntwo\n"
