#!/usr/bin/env python3
"""roexec: a task runner and cron replacement in one file that needs nothing but Python.

The file is read from top to bottom; a section uses only sections above it.

     1  basics     errors, durations, sizes, instants, time zones, lazily compiled patterns
     2  yaml       text to values, with line, column and source text: load_yaml, YamlError
     3  cron       schedules as sets of instants: Cron, CronError
     4  jobs       Job and Config: validated, immutable, from text and back
     5  crontab    the files of cron(8) as job files
     6  policy     what is due, what to do about it, retry or give up, states of a run
     7  render     payloads, tables and plain text, the same for the CLI and the API
     8  store      Store: the folder, its locks, the database and its schema
     9  tables     jobs, runs, events, notices, tokens: what is asked and changed of them
    10  logs       one run's log: write, read, follow
    11  secrets    variables from files, commands and Vault; masks over what is secret
    12  notices    webhook, mail and ping, and the outbox that they wait in
    13  limits     as whom a command runs, and what it may use
    14  journal    the life of a run, written so that a crash loses nothing of it
    15  processes  a command and all that descends from it: start, signals, end
    16  runner     the supervisor: a run with its attempts and hooks
    17  pipelines  steps in order, in parallel, and again from where they failed
    18  runs       a run's place, its start, its way into the store, recovery
    19  scheduler  the loop of the server, the launcher
    20  upkeep     retention, purge, check, backup, restore
    21  views      what there is to say of jobs and runs, the same for the CLI and the API
    22  page       the web page, served with a strict content policy
    23  gate       what an HTTP request asks for, who asks, and whether they may
    24  streams    logs that are followed and events, all of them from one look at the store
    25  api        the routes, their functions and their description
    26  http       connections, their limits, TLS
    27  client     a server elsewhere, for the same commands
    28  host       what a host needs: doctor, install, init, completion
    29  cli        one function per command; main(argv) -> exit status

Data flows one way: text -> nodes -> Job -> store -> due slot -> journal -> supervisor -> events ->
store -> CLI or API. Public Python names: load_yaml, YamlError, Cron, CronError, Job, Config, Store,
main.
"""
import os
import sys
import time

if sys.version_info < (3, 9):
    sys.exit("roexec needs Python 3.9 or newer; this is %d.%d." % sys.version_info[:2])

__version__ = "0.1.0"


class _Module:
    """A module of the standard library that is imported at its first use.

    Most commands need few of them, and each costs milliseconds at every start.
    """

    def __init__(self, name):
        self._name = name

    def __getattr__(self, attribute):
        module = globals()[self._name] = __import__(self._name)
        return getattr(module, attribute)


(array, base64, binascii, bisect, collections, contextlib, datetime, errno, fcntl, hashlib, heapq,
 io, itertools, json, math, pwd, re, select, shlex, signal, socket, stat, struct, threading, types,
 zoneinfo) = map(_Module, (
    "array base64 binascii bisect collections contextlib datetime errno fcntl hashlib heapq "
    "io itertools json math pwd re select shlex signal socket stat struct threading types "
    "zoneinfo").split())


# ==== 1 basics (pure) =============================================================================
# What every section needs: errors, durations, sizes, instants, zones. Instants are seconds since
# 1970-01-01T00:00:00Z (int for slots, float elsewhere), durations are seconds. Errors about a value
# are ValueErrors whose text begins with the value as it was written.

class RoexecError(Exception):
    """Something that a user can cause, and mend; its text is for that person."""


class Pattern:
    """A regular expression that is compiled at its first use: `re` costs more than many commands.

    `flags` are letters of the inline syntax, such as "x" for a verbose pattern.
    """

    def __init__(self, text, flags=""):
        self.text = f"(?{flags}){text}" if flags else text

    def __getattr__(self, name):        # at the first use of a method; then it is found at once
        compiled = re.compile(self.text)
        for method in ("match", "fullmatch", "search", "finditer", "findall", "sub", "split"):
            setattr(self, method, getattr(compiled, method))
        return getattr(compiled, name)


class Value:
    """An immutable value with the attributes that its class lists in __slots__."""
    __slots__ = ()

    def __init__(self, **values):
        for name in self.__slots__:
            object.__setattr__(self, name, values.pop(name, None))
        if values:
            raise TypeError(f"{type(self).__name__} has no {', '.join(values)}")

    def changed(self, **values):
        """The same with other values for some attributes."""
        return type(self)(**{**{name: getattr(self, name) for name in self.__slots__}, **values})

    def __setattr__(self, name, value):
        raise AttributeError(f"a {type(self).__name__} cannot be changed")

    __delattr__ = None

    def __eq__(self, other):
        return type(self) is type(other) and all(
            getattr(self, name) == getattr(other, name) for name in self.__slots__)

    def __hash__(self):
        return hash(repr(self))

    def __repr__(self):
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.__slots__)
        return f"{type(self).__name__}({values})"


def nearest(word, choices):
    """`; did you mean "backup"?` for the choice that is most like the word, else an empty text."""
    import difflib
    found = difflib.get_close_matches(word, list(choices), 1, 0.6)
    return f'; did you mean "{found[0]}"?' if found else ""


def printable(text):
    """The text on one line, without characters that would steer a terminal or deceive a reader."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escape(char) for char in text)


def _escape(char):
    return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(
        char, f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}")


def listed(texts):
    """`a, b, c and d`, shortened where they are many."""
    texts = texts if len(texts) < 8 else [*texts[:2], "…", texts[-1]]
    return " and ".join(filter(None, [", ".join(texts[:-1]), *texts[-1:]]))


def ordinal(number):
    """`1st`, `22nd`, `13th`; of a number from 0 to 99."""
    return str(number) + {1: "st", 2: "nd", 3: "rd"}.get(number % 10 * (number // 10 != 1), "th")


# Durations and sizes.

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = Pattern(r"(?=.)(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?")
_AMOUNT = Pattern(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)|inf|nan")
_LOOSE = Pattern(r"(\d+(?:\.\d+)?)\s*(s|m|h|d|w|(?:sec|min|hr|hour|day|week|second|minute)s?)\b"
                 r"[\s,]*", "i")
_CLOCK = Pattern(r"(\d{1,3}):(\d\d)(?::(\d\d))?")
LONGEST = 100 * 366 * 86400             # seconds; no duration is longer


def parse_duration(written):
    """Seconds (int where whole, else float) of `90`, `90s`, `1h30m`, `2d`, or of a number.

    Raises ValueError that says what to write instead.
    """
    text = written if isinstance(written, str) else _shown(written)
    if not isinstance(written, bool) and _AMOUNT.fullmatch(text):
        seconds = float(text)
    else:
        found = _DURATION.fullmatch(text)
        if not found:
            shown = text if isinstance(written, bool) else f'"{text}"'
            raise ValueError(f"{shown} is not a duration; write {_instead(text)}")
        seconds = sum(float(number or 0) * factor
                      for number, factor in zip(found.groups(), (86400, 3600, 60, 1)))
    if not 0 <= seconds <= LONGEST:
        raise ValueError(f'"{text}" is not a duration between 0 and 100 years')
    return int(seconds) if seconds == int(seconds) else seconds


def _shown(value):
    return str(value).lower() if isinstance(value, bool) else str(value)


def _instead(text):
    """What to write for a text that looks like a duration."""
    clock = _CLOCK.fullmatch(text)
    if clock and clock[3] is None:
        hours = _exactly(int(clock[1]) * 3600 + int(clock[2]) * 60)
        minutes = _exactly(int(clock[1]) * 60 + int(clock[2]))
        return f"{hours} for hours and minutes, {minutes} for minutes and seconds"
    if clock:
        return _exactly(int(clock[1]) * 3600 + int(clock[2]) * 60 + int(clock[3]))
    parts = _LOOSE.findall(text.strip())
    if parts and not _LOOSE.sub("", text.strip()):
        factors = {**_UNITS, "w": 7 * 86400}
        return _exactly(sum(float(number) * factors[unit[0].lower()] for number, unit in parts))
    return "for example 90s, 5m, 1h30m or 2d"


def _exactly(seconds):
    """A duration in all its units: 12h30m5s."""
    text = ""
    for unit in "dhm":
        number, seconds = divmod(seconds, _UNITS[unit])
        text += f"{int(number)}{unit}" if number else ""
    return text + f"{seconds:g}s" if seconds or not text else text


def format_duration(seconds):
    """A duration for people, in its two largest units: 4ms, 0.5s, 42s, 1m5s, 1h30m, 2d3h."""
    if 0 < seconds < 0.0995:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < 9.95:
        return f"{seconds:.1f}".removesuffix(".0") + "s"
    minutes, seconds = round(seconds / 60) * 60, round(seconds)
    if minutes >= 86400:                # 23h59m59s is 1d
        seconds = round(seconds / 3600) * 3600
    elif seconds >= 3600:
        seconds = minutes
    for large, small in (("d", "h"), ("h", "m"), ("m", "s")):
        if seconds >= _UNITS[large]:
            number, rest = divmod(seconds, _UNITS[large])
            rest //= _UNITS[small]
            return f"{number}{large}" + (f"{rest}{small}" if rest else "")
    return f"{seconds}s"


_SIZE = Pattern(r"(\d+(?:\.\d+)?)(?:([KMGT])(?:(iB)|(B))?|B)?")


def parse_size(written):
    """Bytes of `512M`, `1.5GiB`, `10MB`, `4096`: K, M, G, T are powers of 1024 as in systemd, with
    a B alone powers of 1000. Raises ValueError that says what to write instead."""
    text = written if isinstance(written, str) else _shown(written)
    found = None if isinstance(written, bool) else _SIZE.fullmatch(text)
    if not found:
        raise ValueError(f'"{text}" is not a size; write for example 512M, 1.5GiB or 4096')
    power = "KMGT".index(found[2]) + 1 if found[2] else 0
    size = float(found[1]) * (1000 if found[4] else 1024) ** power
    if size >= 1 << 63:                 # what no file and no limit of a system can be
        raise ValueError(f'"{text[:40]}" is too large for a size')
    return int(size)


def format_size(number):
    """Bytes for people, in powers of 1000: 12 B, 2.0 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.95:
            return f"{number:.1f} {unit}" if unit != "B" else f"{number} B"
        number /= 1000
    return f"{number:.1f} TB"


# Instants and zones.

_INSTANT = Pattern(r"(\d{4}-\d\d-\d\d)(?:[Tt ](\d\d:\d\d(?::\d\d)?)(\.\d{1,9})?)?"
                   r"([Zz]|[-+]\d\d:?\d\d)?")
_OFFSET = Pattern(r"(?:UTC|GMT)?([-+])(\d\d?):?(\d\d)?")


def format_instant(seconds):
    """`2025-08-01T02:00:00Z` (RFC 3339), with a fraction where there is one."""
    whole, fraction = divmod(round(seconds, 6), 1)
    text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole))
    return text + (f"{fraction:.6f}"[1:].rstrip("0") if fraction else "") + "Z"


def parse_instant(text, zone):
    """Seconds of an RFC 3339 instant; one without an offset is in `zone` (a tzinfo).

    A bare date is its first second, `T` may be a blank, seconds may be missing. Raises ValueError.
    """
    found = _INSTANT.fullmatch(text)
    try:
        if not found or (found[4] and not found[2]):
            raise ValueError
        read = datetime.datetime.fromisoformat(f"{found[1]}T{found[2] or '00:00'}")
        zone = fixed_zone(found[4].upper()) if found[4] else zone
        if zone is None:                # the offset is out of range
            raise ValueError
        return read.replace(tzinfo=zone).timestamp() + float(found[3] or 0)
    except (ValueError, OverflowError):
        raise ValueError(f'"{text}" is no instant; write for example 2025-08-01T02:00:00Z, '
                         "2025-08-01 02:00 or 2025-08-01") from None


def fixed_zone(name):
    """The tzinfo of `UTC`, `Z`, `+02:00`, `UTC-5`; None for any other name."""
    if name.upper() in ("UTC", "Z", "GMT", "ETC/UTC"):
        return datetime.timezone.utc
    found = _OFFSET.fullmatch(name)
    if not found or int(found[2]) > 23 or int(found[3] or 0) > 59:
        return None
    offset = datetime.timedelta(hours=int(found[2]), minutes=int(found[3] or 0))
    return datetime.timezone(-offset if found[1] == "-" else offset)


def get_zone(name):
    """The tzinfo of an offset or of a name in the host's zone data; raises ValueError in words."""
    zone = fixed_zone(name)
    if zone is not None:
        return zone
    try:
        return zoneinfo.ZoneInfo(name)
    except (ValueError, OSError, zoneinfo.ZoneInfoNotFoundError):
        known = zoneinfo.available_timezones()
    if not known:
        raise ValueError(f'"{name}" cannot be looked up, this host has no time zone data; '
                         "install the package tzdata, or write an offset such as +02:00")
    raise ValueError(f'"{name}" is no time zone'
                     + (nearest(name, known) or "; write for example Europe/Berlin, UTC or +02:00"))


# ==== 2 yaml (pure) ===============================================================================
# YAML 1.2.2 as configuration uses it: one document, no tags, the core schema. The right value, or
# an error that says where and why. One recursive descent over the text: a method begins at self.at,
# reads one thing there and leaves self.at behind it; `value` goes on to the next thing, which is
# outside of brackets the next line that has something, with the indentation self.indent. `n` is the
# column of the block collection around, -1 without one: what belongs to it is indented by more.
# Numbers in round brackets are chapters of the specification.

_DEEPEST = 100                          # collections inside one another
_MOST_COPIES = 100_000                  # values that aliases may add to a document
_LONGEST_KEY = 1024                     # characters of an implicit key (7.4.2)
_LONGEST_NUMBER = 1000                  # characters

_IN_QUOTES = Pattern("[\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff]")        # and only there (5.1)
_NOT_PRINTABLE = Pattern("[\0-\x08\x0b-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufeff\ufffe\uffff]")
_BLANKS = Pattern(r"[ \t]*")
_LINE_END = Pattern(r"[ \t]*(?:(?<=[ \t\n])#[^\n]*)?\n(?:[ \t\n]*\n)?( *)(?:\t[ \t]*)?")
_MARKER = Pattern(r"(?:---|\.\.\.)(?=[ \t\n])|\0")                                      # (9.1)
_DIRECTIVE = Pattern(r"%(?:YAML[ \t]+1\.([0-9]+)|(?!(?:YAML|TAG)[ \t\n])[^ \t\n][^\n]*)")  # (6.8)
_COLON = Pattern(r"[ \t]*:(?=[ \t\n])")
_ANCHOR = Pattern(r"&([^ \t\n,\[\]{}]+)(?=[ \t\n,\]}])[ \t]*(?![ \t&*])")               # (6.9.2)
_ALIAS = Pattern(r"\*([^ \t\n,\[\]{}]+)(?=[ \t]*(?:[\n,\]}]|(?<=[ \t])[#:]))")
_SINGLE = Pattern(r"([^'\n]*)(''|['\n])")                                               # (7.3.2)
_DOUBLE = Pattern(r'([^"\\\n]*)(["\n]|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|'
                  r"\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\U[0-9a-fA-F]{8}|\\[\s\S])")   # (7.3.1)
_ESCAPES = {"''": "'", **{"\\" + char: meant for char, meant in zip(                    # (5.7)
    '0abt\tnvfre "/\\N_LP', '\0\a\b\t\t\n\v\f\r\x1b "/\\\x85\xa0\u2028\u2029')}}
_HEADER = Pattern(r"[|>]([-+]?[1-9]?|[1-9][-+])(?:[ \t]+#[^\n]*|[ \t]*)\n"           # (8.1.1)
                  r"((?:[ \n]*\n)?)( *)")
_FOLDED_LINE = Pattern(r"^([^ \t\n][^\n]*)\n(\n*)(?=[^ \t\n])", "m")                    # (8.1.3)

# The first line of a plain scalar, behind blanks, and a further one; END ends one, too (7.3.3).
# Behind its first character neither can fail, so nothing is read twice.
_REST = (r"[^\n:#END]*(?:(?::(?![ \t\nEND])|(?<![ \t])#)[^\nEND]*?)?"
         r"(?=[ \t]#|:[ \t\nEND]|[\nEND])")
_START = r"[ \t]*((?:[^ \t\n\-?:,\[\]{}#&*!|>'\"%@`]|[-?:](?![ \t\nEND]))" + _REST + ")"
_MORE = r"(?!#|:[ \t\nEND])[^ \t\nEND]" + _REST
_PLAIN, _PLAIN_LINE, _FLOW_PLAIN, _FLOW_LINE = (
    Pattern(text.replace("END", end)) for end in ("", r",\[\]{}") for text in (_START, _MORE))
# A key that needs no question mark, and its colon: its anchor, all of it, itself if it is plain.
_A_KEY = Pattern(
    rf"(?:&([^ \t\n,\[\]{{}}]+)[ \t]+(?!\*))?((?={_PLAIN.text})\3|'(?:[^'\n]|'')*'|"
    r'"(?:[^"\\\n]|\\.)*"|\*[^ \t\n,\[\]{}]+(?=[ \t])|)[ \t]*:(?=[ \t\n])')

# The core schema (10.3.2), and the plain scalars that YAML 1.1 reads, or may read, otherwise.
_WORDS = {word: value for words, value in (
    ("null Null NULL ~ ", None), ("true True TRUE", True), ("false False FALSE", False),
    (".inf .Inf .INF +.inf +.Inf +.INF", float("inf")), ("-.inf -.Inf -.INF", float("-inf")),
    (".nan .NaN .NAN", float("nan"))) for word in words.split(" ")}
_NUMBER = Pattern(r"([-+]?[0-9]+)|(0o[0-7]+|0x[0-9a-fA-F]+)|"
                  r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_OTHER_IN_1_1 = Pattern(
    r"(?!(?:[-+]?(?:0|[1-9][0-9]*)(?:\.[0-9]*(?:[eE][-+][0-9]+)?)?|[-+]?\.[0-9]+|0x[0-9a-fA-F]+)\Z)"
    r"(?:[yYnN]|[yY]es|YES|[nN]o|NO|[oO]n|ON|[oO]ff|OFF|=|[-+]?\.?[0-9][-+0-9a-fA-FxXo_:.]*|"
    r"[0-9]{4}-[0-9][0-9]?-[0-9][0-9]?[Tt \t].*|[^\x85\u2028\u2029]*[\x85\u2028\u2029].*)")
_ONE_ANCHOR = "a value has one anchor, an alias none; quote a text with &"
_NO_KEY = f"a key is one text or number in its line, of at most {_LONGEST_KEY} characters; quote it"
_TAB = "a tab cannot indent; write blanks"
_MERGE = object()                       # the key << that is plain, until its mapping is complete


class YamlError(RoexecError, ValueError):
    """A text that is not read as YAML: `problem` at `line` and `column`, which count from 1."""

    def __init__(self, line, column, problem):
        super().__init__(f"{line}:{column}: {problem}")
        self.line, self.column, self.problem = line, column, problem


class Note(Value):
    """Where a value stands, from line and column 1 on, and how it is written: a tree as the values.

    `text` is a plain scalar as written, or the value of one in another style; `plain` says which.
    `keys` has the Notes of a mapping's keys by key, `items` those of its values by key, or of a
    list's in order; each is None where it has no meaning.
    """
    __slots__ = ("line", "column", "text", "plain", "keys", "items")


def load_yaml(text):
    """The value of a YAML document (str, or UTF-8 bytes); raises YamlError."""
    return read_yaml(text)


def read_yaml(text, notes=None):
    """As load_yaml; where `notes` is a list, the Note of the whole value is appended to it."""
    if not isinstance(text, str):
        if text.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")):
            raise YamlError(1, 1, "this is UTF-16 or UTF-32; save it as UTF-8")
        text = text.decode("utf-8", "surrogateescape")
    reader = _Document(text, notes is not None)
    node = reader.document()
    if notes is not None:
        notes.append(_noted(node, [match.start() for match in re.finditer("\n", reader.text)]))
    return node[0]


def _noted(node, lines):
    """The Note of a node; `lines` are the places before the lines."""
    value, at, written, parts = node
    line = bisect.bisect_left(lines, at)
    note = Note(line=line, column=at - lines[line - 1], plain=written is not None)
    if isinstance(value, list):
        return note.changed(items=[_noted(part, lines) for part in parts])
    if isinstance(value, dict):
        keys, items = ({key: _noted(pair[side], lines) for key, pair in parts.items()}
                       for side in (0, 1))
        return note.changed(keys=keys, items=items)
    return note.changed(text=value if written is None else written)


class _Scalars:
    """The text, the place in it, and scalars of all five styles. What is read is a node: (value,
    place, a plain scalar as written or None, parts), where parts are the nodes of a list, {key:
    (node of the key, node of the value)} of a mapping, else None."""

    def __init__(self, text, noting):
        self.keeping = noting or "<<" in text
        text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        # Each line has an end before it and one of its own, and no index is ever too large.
        self.text = "\n" + text + "\n\0"[text[-1:] in ("", "\n"):]
        self.at = self.depth = self.values = self.copies = 0
        self.indent = 0                 # -1 at the end; a half below a column where a tab is (6.1)
        self.anchors = {}               # name -> (node, how many values)
        self.brackets = []              # where those stand that are open
        self.suspects = {match.start() + 1 for match in _NOT_PRINTABLE.finditer(text)}

    def error(self, at, problem):
        return YamlError(self.text.count("\n", 0, at), at - self.text.rfind("\n", 0, at), problem)

    def shown(self, at):
        rest = self.text[at:self.text.find("\n", at)]
        return printable(rest if len(rest) <= 40 else rest[:37] + "...")

    def is_indicator(self, kind):
        return self.text[self.at] == kind and self.text[self.at + 1] in " \t\n"

    def next_line(self, comment="#"):
        """Go on to the next line that has something, over blanks and comments (6.6)."""
        text, at = self.text, self.at
        while True:
            match = _LINE_END.match(text, at)
            if not match:
                raise self.left_over(_BLANKS.match(text, at).end())
            self.at = match.end()
            if text[self.at] != comment:
                break
            at = text.index("\n", self.at)
        (start, end), at = match.span(1), self.at
        self.indent = end - start if end == at else end - start - 0.5
        if start == at and text[at] in "-.\0" and _MARKER.match(text, at):
            self.indent = -1

    def left_over(self, at):
        if _COLON.match(self.text, at):
            return self.error(at, '": " inside a plain value; put the value in quotes, or below |')
        return self.error(at, 'a "#" needs a blank before it' if self.text[at] == "#" else
                          f'"{self.shown(at)}" is left over; put the whole value in quotes')

    def scalar(self, written, at):
        """The node of a plain scalar."""
        if self.old and _OTHER_IN_1_1.fullmatch(written):
            raise self.error(at, f'"{self.shown(at)}" differs between YAML 1.1 and 1.2; quote it')
        if written[:1] not in "0123456789+-." or not (number := _NUMBER.fullmatch(written)):
            return _WORDS.get(written, written), at, written, None
        if len(written) <= _LONGEST_NUMBER:
            value = int(written) if number[1] else int(written, 0) if number[2] else float(written)
            if value not in (math.inf, -math.inf):
                return value, at, written, None
        raise self.error(at, "a number this large is not read; put a text in quotes")

    def plain(self, match, n):
        """The plain scalar whose first line is matched, with its further lines (7.3.3)."""
        text, start, pieces = self.text, match.start(1), [match[1].rstrip(" \t")]
        further, self.at = _FLOW_LINE if self.brackets else _PLAIN_LINE, match.end()
        while text[self.at] in " \t\n":
            end = self.at
            self.gap(n)
            if self.indent <= n or not (line := further.match(text, self.at)):
                break
            if text.find("#", end, self.at) >= 0:
                raise self.error(self.at, "a comment has ended the value above; put it in quotes")
            pieces += self.folded(end, n), line[0].rstrip(" \t")
            self.at = line.end()
        else:
            if not self.brackets:
                raise self.left_over(self.at)
        return self.scalar(pieces[0] if len(pieces) == 1 else "".join(pieces), start)

    def folded(self, start, n):
        """What the line ends between `start` and here count as in a scalar (6.5)."""
        if n >= 0 and self.text.find("\t", start, self.at) >= 0 and (
                tab := re.compile(rf"\n {{0,{n}}}\t").search(self.text, start, self.at)):  # (6.4)
            raise self.error(tab.end() - 1, _TAB)
        if self.indent <= n:
            raise self.error(self.at, "a line inside quotes is indented too little")
        return "\n" * (self.text.count("\n", start, self.at) - 1) or " "

    def quoted(self, n):
        """A scalar in quotes (7.3.1, 7.3.2)."""
        text, start, pieces, stop = self.text, self.at, [], None
        quote, chunk = text[start], (_DOUBLE if text[start] == '"' else _SINGLE).match
        self.at += 1
        while stop != quote:
            match = chunk(text, self.at)
            (piece, stop), self.at = match.groups(), match.end()
            if stop[-1] == "\n":
                end = self.at = self.at - 1
                self.next_line(None)
                if self.indent == -1:
                    raise self.error(start, "the quote is not closed")
                fold = self.folded(end, n)
                pieces += (piece.rstrip(" \t"), fold) if stop == "\n" else (piece, fold.strip(" "))
            else:
                pieces += piece, "" if stop == quote else self.escaped(stop)
        if self.suspects:
            self.suspects -= {match.start() for match in _IN_QUOTES.finditer(text, start, self.at)}
        return "".join(pieces), start, None, None

    def escaped(self, written):
        try:
            if len(written) == 2:
                return _ESCAPES[written]
            halves = written.encode().decode("unicode_escape")  # of a surrogate pair, as in JSON
            return halves.encode("utf-16", "surrogatepass").decode("utf-16")
        except (KeyError, UnicodeError):
            raise self.error(self.at - len(written), f"{printable(written)} is no escape; write "
                             "\\\\ for a backslash, or use single quotes") from None

    def block_scalar(self, n):
        """A literal or folded scalar (8.1)."""
        text, start = self.text, self.at
        if not (header := _HEADER.match(text, start)):
            raise self.error(start, f"{text[start]} begins a text below it; put this in quotes")
        chomp, digit = header[1].strip("123456789"), header[1].strip("-+")
        first, begin = header.start(2), header.end()
        widest, columns = max(map(len, header[2].split("\n"))), len(header[3])
        if digit:
            columns = max(n, 0) + int(digit)
        elif columns <= n or not columns and _MARKER.match(text, begin):
            columns = max(n + 1, widest)
        elif columns < widest:
            raise self.error(begin, "this line is indented less than the blank lines above it")
        outside = rf"\n(?=(?! {{{columns}}}| *\n)|{_MARKER.text})"
        end = re.compile(outside).search(text, first - 1).end()
        value = "\n".join([line[columns:] for line in text[first:end].split("\n")])
        if text[start] == ">":
            value = _FOLDED_LINE.sub(lambda line: line[1] + (line[2] or " "), value)
        kept = value.rstrip("\n")
        value = value if chomp == "+" else kept + "\n" if kept and not chomp else kept
        self.at, blanks, below = end - 1, _BLANKS.match(text, end), f"the text below {text[start]}"
        if "\t" in blanks[0]:
            raise self.error(text.index("\t", end), f"a tab cannot indent {below}; write blanks")
        self.next_line()
        if self.indent > n and text[blanks.end()] == "#":
            raise self.error(blanks.end(), f"this comment ends {below}; indent it as the text is")
        if self.indent > n:
            raise self.error(self.at, f"this is indented less than the first line of {below}")
        return value, start, None, None


class _Document(_Scalars):
    """Anchors and aliases, collections in brackets (7.4) and in blocks (8.2), and the document."""

    def anchor(self, n, dashes):
        """The value behind an anchor (6.9.2)."""
        match, values = _ANCHOR.match(self.text, self.at), self.values
        if not match:
            raise self.error(self.at, _ONE_ANCHOR)
        self.at = match.end()
        self.anchors.pop(match[1], None)
        if self.brackets:
            self.gap(n)
        node = self.value(n, dashes, False, True)
        self.anchors[match[1]] = node, 1 + self.values - values
        return node

    def alias(self):
        """The value of an alias: the same object (7.1)."""
        start, match = self.at, _ALIAS.match(self.text, self.at)
        if not match or match[1] not in self.anchors:
            value = self.shown(start).split(" #")[0].rstrip()
            raise self.error(start, 'a value that begins with "*" is an alias, and nothing has '
                             f'this name; put the schedule in quotes: "{value}"')
        (value, _, written, parts), count = self.anchors[match[1]]
        self.at, self.values, self.copies = match.end(1), self.values + count, self.copies + count
        if self.copies > _MOST_COPIES:
            raise self.error(start, f"aliases add more than {_MOST_COPIES} values")
        return value, start, written, parts

    def content(self, n):
        """A node in quotes or brackets, an alias, or nothing."""
        kind = self.text[self.at]
        if kind in "'\"[{":
            return self.flow(n) if kind in "[{" else self.quoted(n)
        if kind == "*":
            return self.alias()
        if kind in ",]}:":
            return self.scalar("", self.at)
        problem = "tags are not read" if kind == "!" else (
            f'"{printable(kind)}" cannot begin a value here')
        raise self.error(self.at, f"{problem}; put a text that begins so in quotes")

    def enter(self):
        """Begin a collection; the column of a block collection here, which no tab can be before."""
        self.depth += 1
        if self.depth > _DEEPEST:
            raise self.error(self.at, f"nested deeper than {_DEEPEST} levels")
        return math.floor(self.indent)

    def flow(self, n):
        """A collection in brackets."""
        text, start = self.text, self.at
        parts, closing = ([], "]") if text[start] == "[" else ({}, "}")
        self.enter()
        self.brackets.append(start)
        self.gap(n, 1)
        while text[self.at] != closing:
            if text[self.at] == ",":
                raise self.error(self.at, "a value is missing before the comma")
            self.pair(n, parts)
            if text[self.at] not in ("," + closing):
                raise self.error(self.at, f'"," or "{closing}" is missing here')
            self.gap(n, text[self.at] == ",")
        self.at += 1
        self.brackets.pop()
        return self.collection(start, parts)

    def gap(self, n, indicator=0):
        """Go on in brackets, over an indicator and what does not count; else to the next line."""
        if self.brackets:
            self.at = _BLANKS.match(self.text, self.at + indicator).end()
            if self.text[self.at] not in "\n#":
                return
        self.next_line()
        if self.brackets and self.indent == -1:
            raise self.error(self.brackets[-1],
                             f'this "{self.text[self.brackets[-1]]}" is not closed')
        if self.brackets and self.indent <= n - (self.text[self.at] in "]}"):   # as its key may be
            raise self.error(self.at, "a line inside brackets is indented too little")

    def pair(self, n, parts):
        """A pair of a mapping in braces; in a list, a value, or a mapping of one pair."""
        start, explicit, in_list = self.at, self.is_indicator("?"), isinstance(parts, list)
        self.gap(n, explicit)
        key, value, alone = self.value(n), self.scalar("", self.at), in_list and not explicit
        # Behind quotes and brackets a colon needs no blank.
        if self.text[self.at] == ":" and (self.text[self.at + 1] in " \t\n,[]{}" or
                                          self.text[key[1]] in "'\"[{"):
            if alone and (self.at - start > _LONGEST_KEY or "\n" in self.text[start:self.at]):
                raise self.error(start, _NO_KEY)
            self.gap(n, 1)
            value = self.value(n)
        elif alone:
            return parts.append(key)
        pairs = {} if in_list else parts
        self.store(pairs, start, key, value)
        if in_list:
            self.enter()
            parts.append(self.collection(start, pairs))

    def store(self, pairs, start, key, value):
        """Put a pair to those of its mapping, if its key is a scalar and new there."""
        if key[3] is not None:
            raise self.error(start, _NO_KEY)
        name = _MERGE if key[2] == "<<" else key[0]
        if name in pairs:
            names = [json.dumps(node[2] if name is _MERGE else node[0])
                     for node in (key, pairs[name][0])]
            raise self.error(start, f"the key {names[0]} is there already" + (
                "" if names[0] == names[1] else f", as {names[1]}"))
        pairs[name] = key, value

    def collection(self, start, parts, column=float("inf")):
        """The node of a collection that ends here, in front of a line of at most that column."""
        self.depth -= 1
        self.ended(column)
        if isinstance(parts, list):
            self.values += len(parts)
            value = [part[0] for part in parts]
            return value, start, None, parts if self.keeping else ()
        if _MERGE in parts:             # own keys win, then earlier sources
            key, merged = parts.pop(_MERGE)
            for source in merged[3] if isinstance(merged[0], list) else [merged]:
                if not isinstance(source[0], dict):
                    raise self.error(key[1], "<< takes mappings; put it in quotes if it is a name")
                for name, pair in source[3].items():
                    parts.setdefault(name, pair)
        self.values += 2 * len(parts)
        value = {key: pair[1][0] for key, pair in parts.items()}
        return value, start, None, parts if self.keeping else ()

    def document(self):
        self.next_line()
        self.suffixes()
        self.directives()
        marked = self.indent == -1
        if marked and self.text[self.at] == "\0":
            node = self.scalar("", self.at)
        else:
            self.at += 3 * marked
            node = self.value(-1, starts=not marked)
        self.suffixes()
        self.ended(-1)
        if self.text[self.at] == "-":
            raise self.error(self.at, "a second document begins here; a file has one")
        for at in sorted(self.suspects):
            code = ord(self.text[at])
            raise self.error(at, f"the byte 0x{code & 255:02x} is not UTF-8" if code >> 7 == 0x1B9
                             else f"the character U+{code:04X} stands only in quotes, as an escape")
        return node

    def suffixes(self):
        while self.indent == -1 and self.text[self.at] == ".":
            self.at += 3
            self.next_line()

    def directives(self):
        begin, version = self.at, None
        while self.indent == 0 and self.text[self.at] == "%":
            match = _DIRECTIVE.match(self.text, self.at)
            if not match or match[1] and version:
                raise self.error(self.at, f'"{self.shown(self.at)}" is not read; write %YAML 1.2')
            self.at, version = match.end(), match[1] or version
            self.next_line()
        self.old = version in ("0", "1")        # their plain scalars are refused where they differ
        if self.at > begin and (self.indent > -1 or self.text[self.at] != "-"):
            raise self.error(self.at, "--- is missing behind the line that begins with %")

    def ended(self, column):
        """Refuse a line whose indentation is none of those that the lines above allow."""
        if self.indent > column:
            tab = self.text.find("\t", self.text.rfind("\n", 0, self.at), self.at)
            raise self.error(tab, _TAB) if tab > 0 else self.error(
                self.at, f'"{self.shown(self.at)}" belongs to nothing above; check its indentation')

    def value(self, n, dashes=False, starts=False, anchored=False):
        """A node, and on to what follows it. It `starts` where block collections do; with `dashes`
        those of a list below may be in column n; `anchored`: an anchor before it is its own."""
        text, at = self.text, self.at
        if starts and self.is_indicator("-"):
            return self.sequence()
        if starts and (self.is_indicator("?") or _A_KEY.match(text, at, at + _LONGEST_KEY + 2)):
            return self.mapping()
        if match := (_FLOW_PLAIN if self.brackets else _PLAIN).match(text, at):
            if starts and text[match.end()] == ":":
                raise self.error(at, _NO_KEY)
            return self.plain(match, n)
        start = self.at = _BLANKS.match(text, at).end()
        if anchored and text[start] in "&*":
            raise self.error(start, _ONE_ANCHOR)
        if text[start] == "&":
            return self.anchor(n, dashes)
        if text[start] in "\n#":
            self.next_line()
            if self.indent > n:
                return self.value(n, dashes, True, anchored)
            below = dashes and self.indent == n and self.is_indicator("-")
            return self.sequence() if below else self.scalar("", start)
        if text[start] in "|>" and not self.brackets:
            return self.block_scalar(n)
        node = self.content(n)
        if starts and _COLON.match(text, self.at):
            raise self.error(start, _NO_KEY)
        self.gap(n)
        return node

    def entry(self, column, dashes=False):
        """The node behind a dash, or a ? and its colon, in that column; it may start there."""
        blanks = _BLANKS.match(self.text, self.at + 1)
        self.at, self.indent = blanks.end(), column + 1 + len(blanks[0]) - ("\t" in blanks[0]) / 2
        return self.value(column, dashes, True)

    def sequence(self):
        """A list whose dashes are in the column self.indent (8.2.1)."""
        start, column, parts = self.at, self.enter(), []
        while self.indent == column and self.is_indicator("-"):
            parts.append(self.entry(column))
        return self.collection(start, parts, column)

    def mapping(self):
        """A mapping whose keys begin in the column self.indent (8.2.2)."""
        start, column, pairs = self.at, self.enter(), {}
        while self.indent == column:
            at = self.at
            if match := _A_KEY.match(self.text, at, at + _LONGEST_KEY + 2):
                (anchor, _, plain), self.at = match.groups(), match.start(2)
                key = self.scalar(plain.rstrip(" \t"), self.at) if plain else self.content(0)
                self.anchors[anchor] = key, 1       # None stands for none
                self.at = match.end()
                value = self.value(column, True)
            elif self.is_indicator("?"):
                key, value = self.entry(column, True), self.scalar("", self.at)
                if self.indent == column and self.is_indicator(":"):
                    value = self.entry(column, True)
            else:
                raise self.error(at, f'"{self.shown(at)}" stands where "key: value" should')
            self.store(pairs, at, key, value)
        return self.collection(start, pairs, column)


# ==== 3 cron (pure) ===============================================================================
# What a schedule means. In a zone it is one set of instants, its slots, and every question about it
# is answered from that set. Fields, days and changes of clocks are those of Debian's cron(8): a
# fixed time in a gap comes right after it, one that comes twice counts once. An expression means
# what it says here, or is refused in words; nothing is guessed. Inside, an instant is an integer of
# UTC seconds; a nominal time is what a local clock should read, in seconds since 1970-01-01 00:00
# on that clock; a set of small numbers is an integer with a bit for each.

class CronError(RoexecError, ValueError):
    """An expression, or an instant without a zone, that is refused: where, what, what to write."""


def _is_leap(year):
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)


# Sets of small numbers: the least of them from `low` on, or the greatest up to `high`; else -1.

def _least(numbers, low):
    rest = numbers >> low
    return low + (rest & -rest).bit_length() - 1 if rest else -1


def _greatest(numbers, high):
    return (numbers & (1 << high + 1) - 1).bit_length() - 1


def _span(low, high, step=1):
    if step == 1:
        return (2 << high) - (1 << low)
    return sum(1 << number for number in range(low, high + 1, step))


def _members(numbers):
    return [number for number in range(numbers.bit_length()) if numbers >> number & 1]


def _runs(numbers, show, to):
    """The texts of a list of numbers in which consecutive ones are one text: 1-3, 5."""
    groups = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    runs = [[show(number) for _, number in group] for _, group in groups]
    return [run[0] if len(run) == 1 else run[0] + to + run[-1] for run in runs]


# Fields: each is (name, least, largest, largest of H, names). It stands for a set of numbers, a day
# field also for rules: ("last", 3, 0) is 3 days before the last of the month, ("workday", 15, 0)
# the one nearest to the 15th (0: the last), ("weekday", 1, 2) the second Monday (0: the last).

_MONTHS = ("January February March April May June July August September October November "
           "December").split()
_WEEKDAYS = "Sunday Monday Tuesday Wednesday Thursday Friday Saturday".split()
_FIELDS = (("second", 0, 59, 59, ()), ("minute", 0, 59, 59, ()), ("hour", 0, 23, 23, ()),
           ("day of month", 1, 31, 28, ()),
           ("month", 1, 12, 12, [name[:3].upper() for name in _MONTHS]),
           ("day of week", 0, 7, 6, [name[:3].upper() for name in _WEEKDAYS]))
_ITEM = Pattern(r"(?:\*|([a-z]{3}|[0-9]+)(?:-([a-z]{3}|[0-9]+))?)(?:/([0-9]+))?", "i")
_HASH = Pattern(r"H(?:\(([0-9]+)-([0-9]+)\))?(?:/([0-9]+))?", "i")
_RULES = {"day of month": Pattern(r"L(?:-([0-9]+))?|(L|[0-9]+)W", "i"),
          "day of week": Pattern(r"([a-z]{3}|[0-9]+)(?:L|\#([0-9]+))", "i")}


def _read_field(text, field, seed):
    """The set of numbers and the list of rules of a field."""
    if text == "*" or text == "?" and field[0].startswith("day"):
        return _span(field[1], field[2]), []
    if text.isdigit() and text.isascii():
        return 1 << _within(text, field[1], field[2]), []
    numbers, rules = 0, []
    for item in text.split(","):
        found = _ITEM.fullmatch(item)
        if found:
            numbers |= _numbers(item, field, *found.groups())
        elif item[:1].upper() == "H":
            numbers |= _hashed(item, field, seed)
        else:
            rules.append(_rule(item, field))
    return numbers, rules


def _numbers(item, field, first, last, step):
    """The numbers of `5`, `mon`, `1-5` or `*`, with or without a step."""
    low = high = _number(first, field) if first else field[1]
    if last:
        high = 7 if low and last.upper() == "SUN" else _number(last, field)
    elif step or not first:
        high = field[2]
    step = _within(step, 1, field[2], "the step ") if step else 1
    if high < low:
        restart = 1 if field[2] == 7 else field[1]          # after 7, which is Sunday
        numbers = [*range(low, field[2] + 1), *range(restart, high + 1)][::step]
        raise ValueError(f"{item} runs backwards; write {','.join(_runs(numbers, str, '-'))}")
    return _span(low, high, step)


def _number(token, field):
    """The number of `5`, `mon` or `MAR`."""
    if token.isdigit():
        return _within(token, field[1], field[2])
    if token.upper() not in field[4]:
        raise _puzzled(token, field)
    return field[1] + field[4].index(token.upper())


def _within(digits, least, largest, what=""):
    if len(digits) > 2 or not least <= int(digits) <= largest:
        raise ValueError(f"{what}{digits} is outside {least}-{largest}")
    return int(digits)


def _hashed(item, field, seed):
    """The numbers of `H`, `H/15` or `H(0-29)`, which the seed chooses."""
    found = _HASH.fullmatch(item)
    if not found:
        raise _puzzled(item, field)
    if not seed:
        raise ValueError("H is chosen by the id of a job, and there is none")
    name, low, largest, high, _ = field
    if found[1]:
        low = _within(found[1], low, high)
        high = _within(found[2], low, high)
    size = high - low + 1
    step = _within(found[3], 1, largest, "the step ") if found[3] else size
    digest = hashlib.blake2b((seed + name).encode(), digest_size=8).digest()
    return _span(low + int.from_bytes(digest, "big") % size % step, high, step)


def _rule(item, field):
    """The rule of `L`, `L-3`, `LW`, `15W`, `5L` or `mon#2`."""
    found = field[0] in _RULES and _RULES[field[0]].fullmatch(item)
    if not found:
        raise _puzzled(item, field)
    first, second = found.groups()
    if field[0] == "day of week":
        week = _within(second, 1, 5, f"{first}#") if second else 0
        return "weekday", _number(first, field) % 7, week
    if second:
        return "workday", 0 if second in "Ll" else _number(second, field), 0
    return "last", _within(first, 1, 30, "L-") if first else 0, 0


def _day_of(rule, length, first):
    """The day, as a set, that a rule means in a month of that length whose 1st is a `first`."""
    kind, number, week = rule
    if kind == "last":
        day = length - number
    elif kind == "weekday":
        day = 1 + (number - first) % 7
        day += (week - 1 if week else (length - day) // 7) * 7
    else:
        day = number or length
        if day <= length:
            saturday, sunday = -1 if day > 1 else 2, 1 if day < length else -2
            day += {6: saturday, 0: sunday}.get((first + day - 1) % 7, 0)
    return 1 << day if 0 < day <= length else 0


def _puzzled(item, field):
    """The refusal of an item that means nothing in its field."""
    _, least, largest, _, names = field
    hint = f" or {names[0]}-{names[-1]}".lower() if names else ""
    hint = f"a number {least}-{largest}{hint}, a list 1,3, a range 1-5, or a step */2"
    hint = item[:3].lower() if item[:3].upper() in names else hint
    return ValueError(f'"{item}" is not understood; write {hint}')


# Nominal times.

_LENGTHS = [(31, 28 + leap, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31) for leap in (0, 1)]
_WEEKS = sum(1 << day for day in range(1, 366 + 7, 7))      # the first of each seven days of a year


class _Times:
    """The nominal times that six fields stand for, seconds first."""

    def __init__(self, fields, seed):
        sets = []
        for text, field in zip(fields, _FIELDS):
            try:
                sets.append(_read_field(text, field, seed))
            except ValueError as error:
                raise ValueError(f"{field[0]}: {error}") from None
        (self.seconds, _), (self.minutes, _), (self.hours, _) = sets[:3]
        (self.dates, self.date_rules), (self.months, _), (weekdays, self.weekday_rules) = sets[3:]
        self.weekdays = (weekdays | weekdays >> 7) & 127            # 7 is Sunday, as 0 is
        self.fixed = fields[1][0] != "*" and fields[2][0] != "*"
        # cron(8): both day fields must match if one of them begins with a star, else either may.
        self.both = fields[3][0] in "*?" or fields[5][0] in "*?"
        self.years = {}                 # the results of `days`
        # A date up to the 28th meets every weekday sooner or later.
        if not (self.dates & _span(1, 28) and (self.weekdays or not self.both)
                or any(self.days(leap, first) for leap in (False, True) for first in range(7))):
            raise ValueError("a day that never comes")

    def nearest(self, local, step):
        """The nearest of the times that is not before `local` (step 1), or not after it (-1)."""
        seek, edge = (_least, 0) if step > 0 else (_greatest, 366)
        year, _, _, hour, minute, second, _, day, _ = time.gmtime(local)
        eve = local // 86400 - day              # the day before the year, counted from 1970
        days = self.days(_is_leap(year), (eve + 5) % 7)         # 1970-01-01: Thursday, 4
        today = days >> day & 1
        if today and self.hours >> hour & 1:
            if self.minutes >> minute & 1:
                found = seek(self.seconds, second)
                if found >= 0:
                    return local - second + found
            found = seek(self.minutes, minute + step)
            if found >= 0:
                return local - second + (found - minute) * 60 + seek(self.seconds, edge)
        hour = seek(self.hours, hour + step) if today else -1
        if hour < 0:
            hour, day = seek(self.hours, edge), seek(days, day + step)
        while day < 0:
            eve += 365 + _is_leap(year) if step > 0 else -365 - _is_leap(year - 1)
            year += step
            day = seek(self.days(_is_leap(year), (eve + 5) % 7), edge)
        return ((eve + day) * 1440 + hour * 60 + seek(self.minutes, edge)) * 60 + seek(
            self.seconds, edge)

    def days(self, leap, first):
        """The days with times of a year whose 1 January, day 1, is the weekday `first`."""
        if (leap, first) in self.years:
            return self.years[leap, first]
        months = dates = eve = 0
        weekdays = (self.weekdays * 129 >> first & 127) * _WEEKS
        for month, length in enumerate(_LENGTHS[leap], 1):
            if self.months >> month & 1:
                days = (2 << length) - 2
                months |= days << eve
                dates |= (self.dates & days) << eve
                for rule in self.date_rules:
                    dates |= _day_of(rule, length, (first + eve) % 7) << eve
                for rule in self.weekday_rules:
                    weekdays |= _day_of(rule, length, (first + eve) % 7) << eve
            eve += length
        days = months & (dates & weekdays if self.both else dates | weekdays)
        return self.years.setdefault((leap, first), days)


# Changes of clocks. They are looked for in chunks of 3 days: no zone has ever changed its clocks
# twice within that and 3 hours (Freetown 1939: 4 days), so a chunk has one change at most.

_CHUNK = 3 * 86400
_LARGEST_SHIFT = 3 * 3600                       # a larger change is a correction: cron(8)


def _change_near(chunk, zone, likely):
    """(instant, offset before, offset after) of a change in the chunk, or an instant before it;
    `likely` is another change, since most come at the same time of the week."""
    def offset(second):
        return datetime.datetime.fromtimestamp(second, zone).utcoffset()

    low = chunk * _CHUNK - _LARGEST_SHIFT       # the end of an earlier fold may be in the chunk
    high = (chunk + 1) * _CHUNK
    before, after = offset(low), offset(high)
    instant = high if before != after else min(low, likely)
    likely = low + (likely - low) % (7 * 86400)
    probes = [likely - 1, likely]
    while before != after and instant - low > 1:
        middle = (low + instant) // 2
        if probes:
            middle = min(max(low + 1, probes.pop()), instant - 1)
        elif instant - low > 3600:              # most changes are at a full hour
            middle = max(low + 1, middle // 3600 * 3600)
        elif instant % 3600 == 0:
            middle = instant - 1
        low, instant = (middle, instant) if offset(middle) == before else (low, middle)
    return instant, before.days * 86400 + before.seconds, after.days * 86400 + after.seconds


# Schedules.

_MACROS = {"@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *", "@monthly": "0 0 1 * *",
           "@weekly": "0 0 * * 0", "@daily": "0 0 * * *", "@midnight": "0 0 * * *",
           "@hourly": "0 * * * *"}
_HORIZON = 60 * 366 * 86400
_FIRST, _LAST = -62135164800, 253401868800      # a few days within the years 1 and 9999 of datetime
_SAMPLE = 1735689600                            # 2025: what fires at all, fires within 60 years
_NEAR = 27 * 3600                               # two offsets of a zone differ by 26 hours at most


class Cron:
    """The slots of an expression: cron fields, a macro, `@every 90s` or `@reboot`.

    `seed` (the id of the job) chooses the numbers of `H`. `zone` is the tzinfo of `CRON_TZ=`, else
    None; it beats those passed in. `@reboot` has no slots, but `reboot`. Raises CronError.
    """
    __slots__ = ("expression", "zone", "reboot", "_period", "_times", "_known")

    def __init__(self, expression, seed=""):
        self.expression, self.zone, self._period, self._times = expression, None, None, None
        self._known = None, None, 0, 0, 0       # chunk, zone, change: those last asked for
        words = expression.split()
        try:
            if words and words[0].startswith("CRON_TZ="):
                self.zone = get_zone(words.pop(0)[len("CRON_TZ="):])
            self.reboot = words == ["@reboot"]
            if words and words[0] == "@every":
                self._period = _period(" ".join(words[1:]))
            elif not self.reboot:
                self._times = _Times(_six_fields(words), seed)
        except ValueError as error:
            problem, semicolon, hint = str(error).partition("; ")
            raise CronError(printable(f'{problem} in "{expression}"{semicolon}{hint}')) from None

    # Over aware datetimes; answers bear the tzinfo of the (first) argument.
    def next(self, after):
        """The first slot after an aware datetime; None if there is none within 60 years."""
        return _local(self.next_slot(_seconds(after), after.tzinfo), after.tzinfo)

    def previous(self, before):
        """The last slot before an aware datetime; None if there is none within 60 years."""
        return _local(self.previous_slot(_seconds(before, up=True), before.tzinfo), before.tzinfo)

    def between(self, start, end):
        """The slots from one aware datetime on and before another, one after the other."""
        for slot in self.slots(_seconds(start, up=True), _seconds(end, up=True), start.tzinfo):
            yield _local(slot, start.tzinfo)

    def matches(self, instant):
        """Whether an aware datetime is a slot."""
        return _seconds(instant) == self.next_slot(_seconds(instant, up=True) - 1, instant.tzinfo)

    def describe(self):
        """What a person would say: `at 02:00 on weekdays`."""
        words = self.expression.split()
        text = "at boot" if self.reboot else f"every {words[-1]}"
        if self._times:
            text, days = _clock(self._times), _days(self._times)
            text += f" {days}" if days else " every day" * text[3].isdigit()
        return text + f" ({words[0][len('CRON_TZ='):]})" * bool(self.zone)

    # Over UTC seconds, in a zone, which is a tzinfo.
    def next_slot(self, after, zone):
        """The first slot after `after`; None if there is none within 60 years."""
        if self._times is None:
            return self._period and (after // self._period + 1) * self._period
        zone, second = self.zone or zone, max(after + 1, _FIRST)
        limit, asked, found = min(after + _HORIZON, _LAST), 1, 0
        while second <= limit:
            begin, end, offset, floor = self._stretch(second, zone)
            local = floor if second == begin else max(floor, second + offset)
            if not asked <= local <= found:
                asked, found = local, self._times.nearest(local, 1)
            slot = max(begin, found - offset)
            if slot < end:
                return slot
            second = end if end - second < _NEAR else max(end, slot - _NEAR)
        return None

    def previous_slot(self, before, zone):
        """The last slot before `before`; None if there is none within 60 years."""
        if self._times is None:
            return self._period and (before - 1) // self._period * self._period
        zone, second = self.zone or zone, min(before - 1, _LAST)
        limit, asked, found = max(before - _HORIZON, _FIRST), 0, 1
        while second >= limit:
            begin, _, offset, floor = self._stretch(second, zone)
            if not found <= second + offset <= asked:
                asked, found = second + offset, self._times.nearest(second + offset, -1)
            if found >= floor:
                return max(begin, found - offset)
            second = begin - 1 if second - begin < _NEAR else min(begin, found - offset + _NEAR) - 1
        return None

    def slots(self, start, end, zone):
        """The slots with start <= slot < end, one after the other."""
        slot = self.next_slot(start - 1, zone)
        while slot is not None and slot < end:
            yield slot
            slot = self.next_slot(slot, zone)

    def moved(self, slot, zone):
        """The first local time, `02:30`, of those that a gap has moved to this slot; else None."""
        if self._times is None:
            return None
        begin, _, offset, floor = self._stretch(slot, self.zone or zone)
        local = self._times.nearest(floor, 1)
        late = slot == begin and local < begin + offset
        return time.strftime("%H:%M:%S", time.gmtime(local)).removesuffix(":00") if late else None

    def fires_in(self, zone):
        """Whether it ever fires in that zone: a gap can swallow each time of `*/5 2 * 3 sun#2`."""
        return self.reboot or self.next_slot(_SAMPLE, zone) is not None

    def _stretch(self, second, zone):
        """(begin, end, offset, floor) of a time around `second` without a change of clocks.

        Its slots are the nominal times from `floor` on and before end + offset, less the offset,
        but not before `begin`, to which a gap moves its times.
        """
        chunk, known = second // _CHUNK, self._known
        if known[0] != chunk or known[1] is not zone:
            known = self._known = (chunk, zone, *_change_near(chunk, zone, known[2]))
        _, _, change, before, after = known
        begin = chunk * _CHUNK
        if second < change:
            return begin, change, before, begin + before
        end = begin + _CHUNK
        begin = max(begin, change)
        floor = begin + after
        if self._times.fixed and abs(after - before) <= _LARGEST_SHIFT:
            # After a gap its times are still to come; after a fold they have been.
            floor = change + before if begin == change else max(floor, change + before)
        return begin, end, after, floor


def _period(written):
    period = parse_duration(written)
    if written[-1] not in "smhd" or isinstance(period, float) or not 1 <= period <= 366 * 86400:
        raise ValueError(f"@every: {written} is not 1s to 366d in whole seconds and with a unit")
    return period


def _six_fields(words):
    """The fields, seconds first, of the words of an expression or of a macro."""
    if words[:1] and words[0].startswith("@"):
        if words[0] not in _MACROS or words[1:]:
            raise ValueError(f'"{" ".join(words)}" is no macro'
                             + nearest(words[0], [*_MACROS, "@reboot", "@every"]))
        words = _MACROS[words[0]].split()
    if len(words) == 5:
        return ["0", *words]
    if len(words) != 6:
        raise ValueError(f"{len(words)} field{'s' * (len(words) != 1)}; write five: minute, hour, "
                         "day of month, month, day of week; or six, with seconds first")
    if "?" in words[3:6:2] and re.search(r"(?<![#/0-9])[0-9]", words[5]):
        raise ValueError(f"day of week: {words[5]} beside ? may count from 0 or from 1; write "
                         "names, such as mon-fri")
    return words


def _seconds(instant, up=False):
    """The whole UTC seconds of an aware datetime, the next ones if `up`."""
    if instant.tzinfo is None:
        raise CronError(f"{instant.isoformat()} has no time zone; pass an aware datetime")
    return round(instant.timestamp() - instant.microsecond / 1e6) + (up and instant.microsecond > 0)


def _local(slot, zone):
    if slot is None or not _FIRST <= slot <= _LAST:
        return None
    return datetime.datetime.fromtimestamp(slot, zone)


# Sentences.

def _clock(times):
    """`at 02:00 and 14:00`, `every 15 minutes from 09:00 to 17:45`, `at minute 5 of every hour`."""
    seconds, minutes, hours = map(_members, (times.seconds, times.minutes, times.hours))
    each_hour, scattered = len(minutes) * len(seconds), len(_runs(hours, str, "")) > 1
    few = each_hour * len(hours) <= 4 or each_hour == 1 and scattered
    if few and (len(hours) < 3 or hours != [*range(0, 24, 24 // len(hours))]):
        return "at " + listed([f"{hour:02}:{minute:02}" + f":{second:02}" * (seconds != [0])
                                for hour in hours for minute in minutes for second in seconds])
    parts = []
    for numbers, size, unit in zip((seconds, minutes, hours), (60, 60, 24),
                                   ("second", "minute", "hour")):
        step, runs = size // len(numbers), _runs(numbers, str, " to ")
        if len(numbers) == size:
            parts.append(f"every {unit}" if not parts else
                         f"of every {unit}" * parts[-1].startswith("at"))
        elif len(numbers) > 1 and numbers == [*range(0, size, step)]:
            parts.append(f"of every {ordinal(step)} {unit}" if parts else f"every {step} {unit}s")
        elif unit == "hour" and len(runs) == 1:
            parts.append("every hour " * (not parts) + f"from {hours[0]:02}:{minutes[0]:02} "
                         f"to {hours[-1]:02}:{minutes[-1]:02}")
        elif parts or numbers != [0]:
            parts.append(f"at {unit}{'s' * (len(numbers) > 1)} {listed(runs)}")
    return " ".join(filter(None, parts))


def _days(times):
    """`on weekdays`, `on the 1st and 15th of January`; empty for every day."""
    months = listed(_runs(_members(times.months), lambda month: _MONTHS[month - 1], " to "))
    of, within = f" of {months}", f" in {months}"
    if times.months == _span(1, 12):
        of, within = " of the month", ""
    every_date, every_weekday = times.dates == _span(1, 31), times.weekdays == _span(0, 6)
    if every_date and every_weekday or not times.both and (every_date or every_weekday):
        return within and "every day" + within
    dates = _runs(_members(times.dates), ordinal, " to ") + [*map(_spoken, times.date_rules)]
    dates = f"the {listed(dates)}{of}"
    weekdays = _runs(sorted((day - 1) % 7 for day in _members(times.weekdays)),
                     lambda day: _WEEKDAYS[(day + 1) % 7] + "s", " to ")
    weekdays = {"Mondays to Fridays": ["weekdays"], "Saturdays to Sundays": ["weekends"]}.get(
        "".join(weekdays), weekdays) + [f"the {_spoken(rule)}" for rule in times.weekday_rules]
    weekdays = listed(weekdays) + (of if times.weekday_rules else within)
    if every_date or every_weekday:
        return f"on {weekdays if every_date else dates}"
    return f"on {weekdays} that are {dates}" if times.both else f"on {dates} and on {weekdays}"


def _spoken(rule):
    kind, number, week = rule
    if kind == "weekday":
        return f"{ordinal(week) if week else 'last'} {_WEEKDAYS[number]}"
    if kind == "last":
        return f"{ordinal(number + 1)}-last day" if number else "last day"
    return f"weekday nearest the {ordinal(number)}" if number else "last weekday"


# ==== 4 jobs (pure) ===============================================================================
# What jobs and configurations are: read from texts or mappings, checked, immutable from then on.
# All that is accepted is honoured. What is not is a Problem that says where it stands, what is
# wrong and what to write instead; all problems of a file are reported together.
#
# A table of KEYS describes each mapping. A key's reader makes the value of the spec (which is what
# is stored and shown: as written, with the file's defaults folded in) or raises ValueError; its
# maker turns the spec's value into the attribute. So a new key is one line.
#
# A text is read once for its values alone; a second time, with the position and the source text of
# each, only if something was wrong, or a number stands where the text as written is wanted.

HOOKS = ("pre_run", "on_retry", "on_success", "on_failure", "post_run", "on_missed")
_HOOK_NAMES = (*HOOKS, "on_finish")                     # on_finish is another name of post_run
_HOOK_KEYS = ("hooks", "notify", *_HOOK_NAMES)          # the keys of a job that are about hooks
_MERGED = ("env", "params", "hooks", "limits", "log", "history")    # key by key, not as a whole
_HOOK_KINDS = ("command", "webhook", "mail", "ping", "run")          # a hook has one of them
_NO_DEFAULT = dict.fromkeys(("id", "name", "command", "pipeline", "schedule"),
                            '"{}" is not possible in defaults; write it in each job')
_ELSEWHERE = {"depends_on": "; it belongs to the steps of a pipeline: write both below pipeline:",
              "job": "; a step of a pipeline can run another job"}
_OTHER_WORDS = {"cron": "schedule", "environment": "env", "cmd": "command", "script": "command",
                "cwd": "directory", "workdir": "directory", "tz": "timezone"}
_MEANT = {"true": "true", "yes": "true", "on": "true", "y": "true",
          "false": "false", "no": "false", "off": "false", "n": "false"}
_RESERVED_IDS = ("latest", "all", "export")             # words of the command line
_MOST = 1_000_000

_ID = Pattern(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NOT_IN_IDS = Pattern(r"[^A-Za-z0-9._-]+")
_VARIABLE = Pattern(r"[^=\s\0\ud800-\udfff]+")
_NO_TEXT = Pattern(r"[\0\ud800-\udfff]")
_NO_LINE = Pattern(r"[\0-\x1f\x7f-\x9f\u2028\u2029]")
_VAULT_SECRET = Pattern(r"vault://([^\s?#%]+/[^\s?#%]+)(?:#(.+))?")
_VAULT_ADDRESS = Pattern(r"https?://(?:\[[0-9A-Fa-f:.]+\]|[\w.-]+)(?::(\d{1,5}))?/?", "a")
_EXPANSION = Pattern(r"(?<![\w$])\$[A-Za-z_]\w*|(?<!\$)\$\{[A-Za-z_]\w*\}", "a")
_NUMERIC = Pattern(r"-?[0-9]+(?:\.[0-9]+)?")
_TIME_OF_DAY = Pattern(r"\d{1,2}:\d\d(?::\d\d)?")
_UMASK = Pattern(r"0?[0-7]{3}")
_URL = Pattern(r"https?://(?:[\w.~%!$&'()*+,;=:-]+@)?(?:[\w.-]+|\[[0-9a-f:.]+\])(?::(\d{1,5}))?"
               r"(?:[/?][!-~]*)?", "ai")
_ADDRESS = Pattern(r"[\w.!#$%&'*+/=?^`{|}~-]+@[\w.-]+", "a")       # the usual ones of RFC 5322
_HOST_NAME = Pattern(r"\w(?:[\w.-]*[\w.])?|(?=[^:]*:[^:]*:)[0-9A-Fa-f:.]+(?:%\w+)?", "a")


def valid_id(text):
    """Whether a text can be the id of a job."""
    return _ID.fullmatch(text) is not None and text not in _RESERVED_IDS


# Problems, and where they stand.

class Problem(Value):
    """One thing that is wrong: file, line and column (None if unknown), path of keys, message."""
    __slots__ = ("file", "line", "column", "path", "message")

    def __str__(self):
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        return ": ".join(filter(None, (place, self.path, self.message)))


class Invalid(RoexecError):
    """Something with `problems`, which are all that it has; its text has one a line."""

    def __init__(self, problems):
        super().__init__("\n".join(printable(str(problem)) for problem in problems))
        self.problems = problems


class _Again(Exception):
    """The pass without notes met something that needs them."""


class _Reading:
    """One pass. `notes`: True with notes, False where a pass with them can follow, else None.
    `variables` are the names that the defaults below have in `env`, which null can remove."""
    __slots__ = ("file", "folder", "notes", "problems", "warnings", "variables")

    def __init__(self, file, folder, notes):
        self.file, self.folder, self.notes = file, folder, notes
        self.problems, self.warnings, self.variables = [], [], set()


class _Place:
    """Where a value stands: the path of keys to it, and its note where there is one."""
    __slots__ = ("reading", "path", "note")

    def __init__(self, reading, path, note):
        self.reading, self.path, self.note = reading, path, note

    def item(self, key, name=None):
        """The place of an item of the list or mapping here; items of lists have the list's path."""
        note, path = self.note, self.path
        if note is not None:
            note = note.items[key] if type(note.items) is list else note.items.get(key)
        if name is not None:
            path = f"{path}.{name}" if path else name
        return _Place(self.reading, path, note)

    def key(self, key, path=""):
        """The place of a key itself, whose problems name it and so need no path."""
        return _Place(self.reading, path, self.note and self.note.keys.get(key))

    def read(self, reader, value):
        """What a reader makes of the value here; None if it raises ValueError, which is noted."""
        try:
            return reader(value, self)
        except ValueError as error:
            self.problem(str(error))
            return None

    def problem(self, message):
        self.reading.problems.append(self._problem(self.path, message))

    def warn(self, name, message):
        self.reading.warnings.append(self._problem(name, message))

    def _problem(self, path, message):
        if self.reading.notes is False:
            raise _Again
        note = self.note if self.reading.notes else None
        return Problem(file=self.reading.file, line=note and note.line,
                       column=note and note.column, path=path, message=message)

    def written(self, value):
        """The text of a scalar as it stands in the file."""
        if isinstance(value, str):
            return value
        if self.note is not None:
            return self.note.text
        if self.reading.notes is False:
            raise _Again
        if isinstance(value, float):
            raise ValueError(f"{value} may have been written otherwise; put it in quotes")
        return json.dumps(value)

    def shown(self, value):
        """A value as errors quote it."""
        if isinstance(value, (dict, list)):
            return "a mapping" if isinstance(value, dict) else "a list"
        if isinstance(value, str):
            return f'"{value}"' if len(value) <= 200 else f'"{value[:200]}…"'
        return (self.note.text or "nothing") if self.note else json.dumps(value)

    def unwanted(self, value, wanted):
        return ValueError(f"{self.shown(value)} stands where {wanted} is wanted")


def _known(value, place, names, later, what):
    """(name, value, place, key) of each key of a mapping; one not in `names` is a problem.

    The name has underscores, the key is as it is. `later` are names not yet supported.
    """
    if not isinstance(value, dict):
        raise ValueError(f'{place.shown(value)} stands where "key: value" lines are wanted '
                         f"({', '.join(names)})")
    seen = set()
    for key, item in value.items():
        written = key if type(key) is str else place.key(key).written(key)
        name = written.replace("-", "_")
        if name in later:
            place.key(key).problem(f'"{name}" is not supported yet')
        elif name not in names:
            place.key(key).problem(_unknown(written, names, later, what))
        elif name in seen:
            place.key(key).problem(f'"{name}" is written twice, with "-" and with "_"; remove one')
        else:
            seen.add(name)
            yield name, item, place.item(key, name), key


def _unknown(written, names, later, what):
    other = _OTHER_WORDS.get(written)
    if what == "a job" and written in _ELSEWHERE:
        return f'unknown key "{written}" in a job{_ELSEWHERE[written]}'
    hint = f'; did you mean "{other}"?' if other in names else nearest(written, [*names, *later])
    if not hint and len(names) < 10:
        hint = f"; it may have {', '.join(names)}"
    return f'unknown key "{written}" in {what}{hint}'


# Readers: (value, place) -> the value of the spec, or a ValueError for that place.

def _text(value, place):
    if value is None or isinstance(value, (dict, list)):
        raise place.unwanted(value, "a text")
    text = place.written(value)
    if _NO_TEXT.search(text):
        raise ValueError("a text cannot contain a NUL character or half of a surrogate pair")
    return text


def _line(value, place):
    text = _text(value, place)
    if not text.strip() or _NO_LINE.search(text):
        raise ValueError("write some text on one line")
    return text


def _id(value, place):
    text = _text(value, place)
    if text in _RESERVED_IDS:
        raise ValueError(f'"{text}" is reserved; choose another id')
    if not valid_id(text):
        near = _NOT_IN_IDS.sub("-", text).strip("._-")[:64]
        raise ValueError(f'"{text}" cannot be an id; an id is a letter or digit, then up to 63 '
                         'letters, digits, ".", "_" or "-", for example '
                         f'"{near if valid_id(near) else "backup-db"}"')
    return text


def _list_of(reader):
    """A reader of one such value, or of a list of them."""
    def read(value, place):
        return _items(reader, value, place) if isinstance(value, list) else reader(value, place)
    return read


def _items(reader, values, place):
    return [place.item(index).read(reader, value) for index, value in enumerate(values)]


def _one_of(*words, later=()):
    def read(value, place):
        if isinstance(value, str) and value in words:
            return value
        if value in later:
            raise ValueError(f'"{value}" is not supported yet')
        near = nearest(value, words) if isinstance(value, str) else ""
        raise ValueError(f"{place.shown(value)} is none of {', '.join(words)}{near}")
    return read


def _switch(value, place, wanted="true or false"):
    if isinstance(value, bool):
        return value
    meant = _MEANT.get(value.lower()) if isinstance(value, str) else None
    if meant:
        raise ValueError(f'"{value}" is a text here (as YAML 1.2 has it); write {meant}'
                         + (" without quotes" if value.lower() == meant else ""))
    raise place.unwanted(value, wanted)


def _number_from(low, high, kinds=(int,)):
    def read(value, place):
        if type(value) in kinds and low <= value <= high:
            return value
        if isinstance(value, str) and _NUMERIC.fullmatch(value):
            raise ValueError(f'"{value}" is a text; write {value} without quotes')
        kind = "a number" if float in kinds else "a whole number"
        raise ValueError(f"{place.shown(value)} is not {kind} from {low} to {high}")
    return read


def _duration(value, place):
    if value is None or isinstance(value, (dict, list)):
        raise place.unwanted(value, "a duration")
    parse_duration(value)
    return value


def _size(value, place):
    if value is None or isinstance(value, (dict, list)):
        raise place.unwanted(value, "a size")
    if parse_size(value) == 0:
        raise ValueError("write a size above 0")
    return value


def _pattern(value, place):
    text = _text(value, place)
    try:
        re.compile(text.encode())
    except re.error as error:
        raise ValueError(f"{place.shown(value)} is no regular expression: {error}") from None
    return text


def _some_duration(value, place):
    if parse_duration(_duration(value, place)) == 0:
        raise ValueError("write a duration above 0")
    return value


def _command(value, place):
    if isinstance(value, dict):
        raise ValueError("a command is a text, or a list of program and arguments")
    if isinstance(value, list):
        return _words(value, place)
    text = _text(value, place)
    if not text.strip():
        raise ValueError('the command is empty; to do nothing write "true" or ":"')
    return text


def _words(value, place):
    if not value:
        raise ValueError("the list is empty; write the program and its arguments")
    if value[0] == "":
        raise ValueError("the name of the program is empty")
    return _items(_text, value, place)


def _shell(value, place):
    if isinstance(value, list):
        return _words(value, place)
    if isinstance(value, bool):
        raise ValueError(f"{place.shown(value)} is not a program; to do without a shell write the "
                         "command as a list")
    words = _line(value, place).split()
    if len(words) > 1:
        raise ValueError(f"write program and options as a list: [{', '.join(words + ['-c'])}]")
    return words[0]


def _directory(value, place):
    if value is None:
        if place.written(value) == "~":
            raise ValueError('~ means null in YAML; write "~" in quotes for the home folder')
        return None
    text = _line(value, place)
    if text == "~" or text.startswith("~/"):
        return text
    if text.startswith("~"):
        raise ValueError(f'"{text}" names another user\'s home; write the path from "/"')
    if place.reading.folder is None and not os.path.isabs(text):
        raise ValueError(f'"{text}" is relative to nothing; write the path from "/"')
    return os.path.normpath(os.path.join(place.reading.folder or "/", text))


def _path(value, place):
    text = _line(value, place)
    if text.startswith("~"):
        raise ValueError(f'"{text}": the home folder depends on who reads this; '
                         'write the path from "/"')
    return os.path.normpath(os.path.join(place.reading.folder, text))


def _umask(value, place):
    if isinstance(value, str) and _UMASK.fullmatch(value):
        return value
    shown = place.shown(value)
    digits = shown.replace("0o", "")
    if type(value) is int and _UMASK.fullmatch(digits):
        quoted = digits if digits == shown else digits.zfill(4)
        raise ValueError(f'{shown} is read as a number; write "{quoted}" in quotes')
    raise ValueError(f"{shown} is not a umask; write three octal digits in quotes, "
                     'for example "022"')


def _timezone(value, place):
    text = _text(value, place)
    get_zone(text)
    return text


def _env(value, place):
    if isinstance(value, list):
        raise ValueError('write "NAME: value" lines, not a list')
    if not isinstance(value, dict):
        raise ValueError(f'{place.shown(value)} stands where "NAME: value" lines are wanted')
    variables = {}
    for key, item in value.items():
        name = key if type(key) is str else place.key(key).written(key)
        here = place.item(key, name)
        here.read(_own_variable, name)
        if name in variables:
            here.problem("it is written twice; remove one")
        if item is None and name in place.reading.variables:
            variables[name] = None
        elif item is None:
            here.problem(f'no value; write "" for an empty one, or inherit_env: [{name}] '
                         "for the server's")
        else:
            variables[name] = text = here.read(_text, item)
            found = _EXPANSION.search(text or "")
            if found:
                here.warn(name, f"{found[0]} in a value of env is not expanded; write the value "
                                "itself, or set the variable in the command")
    return variables


def _variable(value, place):
    name = _text(value, place)
    if not _VARIABLE.fullmatch(name):
        raise ValueError(f'"{name}" cannot be the name of a variable')
    return name


def _own_variable(value, place):
    name = _variable(value, place)
    if name.startswith("ROEXEC_"):
        raise ValueError(f'"{name}" is set by roexec itself; choose another name')
    return name


def _inherit_env(value, place):
    if isinstance(value, list):
        return _items(_variable, value, place)
    return _switch(value, place, "true, false or a list of names")


def _bound(value, place):
    text = _text(value, place)
    if _TIME_OF_DAY.fullmatch(text):
        raise ValueError(f'"{text}" is a time of day; a window is between two dates, '
                         "put hours into the schedule")
    parse_instant(text, fixed_zone("UTC"))
    return text


def _url(value, place):
    """An address of the web. It is a credential, so no error quotes it."""
    found = _URL.fullmatch(_text(value, place))
    if not found or int(found[1] or 1) not in range(1, 65536):
        raise ValueError("this is no address; write https://HOST/PATH, in ASCII and without blanks "
                         "(other characters as %XX)")
    return value


def _address(value, place):
    text = _text(value, place)
    if not _ADDRESS.fullmatch(text):
        raise ValueError(f'"{text}" is no mail address; write one alone, for example '
                         "ops@example.com, and several as a list")
    return text


def _host(value, place):
    text = _text(value, place)
    if not _HOST_NAME.fullmatch(text):
        raise ValueError(f'"{text}" is not a host; write an address or a name alone, '
                         "and the port under port:")
    return text


# Makers: a value of the spec -> the attribute.

def _several(value):
    """A list, or one value, of which an empty text stands for none, as a tuple."""
    return tuple(value) if isinstance(value, list) else () if value == "" else (value,)


def _tuple(value):
    return tuple(value) if isinstance(value, list) else value


def _shell_words(value):
    return tuple(value) if isinstance(value, list) else (value, "-c")


def _limit(value):
    return parse_duration(value) or None


def _without_nulls(value):
    return {name: text for name, text in value.items() if text is not None}


# Records.

class _Record(Value):
    """A value made of a spec: of a mapping of some of its KEYS to what their readers returned.

    KEYS is {name: (reader, maker or None, default of the attribute)}; LATER are the names of keys
    that are not supported yet. Null in a spec is the default; in one that is MERGED key by key it
    is kept, since it removes what stands below.
    """
    KEYS, LATER, NAME, MAY_BE_EMPTY, MERGED = {}, (), "", False, False

    def __init_subclass__(cls):
        for name, (_, _, default) in cls.KEYS.items():
            setattr(cls, name, default)

    def __init__(self, spec=None):
        keys, assign = self.KEYS, object.__setattr__
        for name, value in (spec or {}).items():
            if value is not None and name in keys:
                maker = keys[name][1]
                assign(self, name, value if maker is None else maker(value))

    def __eq__(self, other):
        return type(self) is type(other) and all(
            getattr(self, name) == getattr(other, name) for name in self.KEYS)

    __hash__ = Value.__hash__

    def __repr__(self):
        return f"{type(self).__name__}({ {name: getattr(self, name) for name in self.KEYS} })"

    @classmethod
    def read(cls, value, place):
        """The spec of a mapping: the reader of a key that has such a record."""
        spec, before = {}, len(place.reading.problems)
        for name, item, there, _ in _known(value, place, cls.KEYS, cls.LATER,
                                           cls.NAME or place.path):
            if item is not None:
                spec[name] = there.read(cls.KEYS[name][0], item)
            elif cls.MERGED:
                spec[name] = None
        if len(place.reading.problems) == before:
            cls.check(spec)
        return spec

    @classmethod
    def check(cls, spec):
        """Raises ValueError if parts that are right in themselves do not go together."""
        if not spec and not cls.MAY_BE_EMPTY:
            raise ValueError(f"it is empty; write {', '.join(cls.KEYS)}, or leave it out")


class Backoff(_Record):
    """The seconds between two attempts: `delay`, times `factor` each time, up to `max`; `jitter`
    is the part of it by which it may be shorter or longer."""
    KEYS = {
        "delay": (_duration, parse_duration, 10),
        "factor": (_number_from(1, 1000, (int, float)), None, 1),
        "max": (_duration, parse_duration, None),
        "jitter": (_number_from(0, 1, (int, float)), None, 0),
    }

    def __init__(self, spec=None):
        super().__init__(spec if isinstance(spec, dict) else {"delay": spec})

    @classmethod
    def read(cls, value, place):
        nested = isinstance(value, (dict, list))
        return super().read(value, place) if nested else _duration(value, place)

    @classmethod
    def check(cls, spec):
        super().check(spec)
        backoff = cls(spec)
        if backoff.max is not None and backoff.factor == 1:
            raise ValueError("max means nothing without a factor; write for example factor: 2")
        if backoff.max is not None and backoff.max < backoff.delay:
            raise ValueError("max is less than delay")


class RetryOn(_Record):
    """Which failures are tried again, where not all of them are."""
    KEYS = {
        "exit_codes": (_list_of(_number_from(0, 255)), _several, ()),
        "timeout": (_switch, None, False),
        "signal": (_switch, None, False),
        "output": (_pattern, None, None),
    }


class Success(_Record):
    """What counts as success of a command."""
    KEYS = {
        "exit_codes": (_list_of(_number_from(0, 255)), _several, (0,)),
        "output": (_pattern, None, None),
        "no_output": (_pattern, None, None),
    }


class Limits(_Record):
    """What the commands of an attempt may use: bytes, seconds, numbers, processors."""
    KEYS = {
        "memory": (_size, parse_size, None),
        "cpu": (_number_from(0.01, 1000, (int, float)), None, None),
        "cpu_time": (_some_duration, parse_duration, None),
        "files": (_number_from(3, _MOST), None, None),
        "processes": (_number_from(1, _MOST), None, None),
        "file_size": (_size, parse_size, None),
    }
    MERGED = True


def _log_size(value, place):
    if parse_size(_size(value, place)) < 1 << 16:
        raise ValueError("write a size of 64K or more")
    return value


class LogLimits(_Record):
    """How long a log is kept after the end of its run (seconds), and how large it gets (bytes)."""
    KEYS = {
        "keep": (_some_duration, parse_duration, 7 * 86400),
        "max_size": (_log_size, parse_size, 100 << 20),
    }
    MERGED = True


class HistoryLimits(_Record):
    """How long a run is kept after its end (seconds), and how many of a job."""
    KEYS = {
        "keep": (_some_duration, parse_duration, 90 * 86400),
        "runs": (_number_from(1, _MOST), None, 10_000),
    }
    MERGED = True


class Hook(_Record):
    """What is to be done at a certain point of a run; with a condition, only if that succeeds."""
    KEYS = {
        "command": (_command, _tuple, None),
        "webhook": (_url, None, None),
        "mail": (_list_of(_address), _several, None),
        "ping": (_url, None, None),
        "run": (_id, None, None),
        "condition": (_command, _tuple, None),
        "timeout": (_some_duration, parse_duration, 60),
    }
    NAME, MAY_BE_EMPTY = "a hook", True

    @property
    def kind(self):
        """What it is: command, webhook, mail, ping or run."""
        return next(name for name in _HOOK_KINDS if getattr(self, name) is not None)

    @property
    def target(self):
        """The command, the URL of a webhook or ping, the tuple of addresses, or the job's id."""
        return getattr(self, self.kind)

    @classmethod
    def check(cls, spec):
        kinds = [name for name in _HOOK_KINDS if name in spec]
        if len(kinds) > 1:
            raise ValueError(f"{' and '.join(kinds)} in one hook; make a list of several")
        if spec.get("mail") == []:
            raise ValueError("the list of mail is empty; write an address")
        if kinds not in ([], ["command"]) and "timeout" in spec:
            raise ValueError(f"only a command has a timeout, not {kinds[0]}; remove it")


def _source_file(value, place):
    text = _line(value, place)
    return _directory(text, place)


def _vault_secret(value, place):
    text = _line(value, place)
    found = _VAULT_SECRET.fullmatch(text)
    if not found or {"", ".", ".."} & set(found[1].split("/")):
        raise ValueError(f'"{text}" is no secret; write vault:// and its path, for example '
                         "vault://secret/data/db, or vault://secret/data/db#password for one key")
    return text


class _EnvSource(_Record):
    KEYS = {
        "file": (_source_file, None, None),
        "optional": (_switch, None, False),
        "host": (_list_of(_own_variable), None, None),
        "command": (_command, None, None),
        "secret": (_vault_secret, None, None),
        "as": (_own_variable, None, None),
    }
    NAME = "a source of env_from"

    @classmethod
    def read(cls, value, place):
        if isinstance(value, str):
            kind = "secret" if value.startswith("vault:") else "file"
            raise ValueError(f"write {{{kind}: {value}}}")
        return super().read(value, place)

    @classmethod
    def check(cls, spec):
        kinds = [name for name in ("file", "host", "command", "secret") if name in spec]
        if len(kinds) > 1:
            raise ValueError(f"{' and '.join(kinds)} are {len(kinds)} sources; make a list of them")
        if not kinds:
            raise ValueError("a source has one of file, host, command, secret")
        for name, kind in (("optional", "file"), ("as", "secret")):
            if name in spec and kind not in spec:
                raise ValueError(f"{name} goes with {kind}, not with {kinds[0]}")
        if "secret" in spec:
            cls._check_key(spec["secret"].partition("#")[2], spec.get("as"))

    @classmethod
    def _check_key(cls, key, name):
        if name and not key:
            raise ValueError("as: names the variable of one key; write which behind the secret, "
                             f"for example vault://secret/data/db#{name.lower()}")
        if key and not name and (not _VARIABLE.fullmatch(key) or key.startswith("ROEXEC_")):
            raise ValueError(f'the key "{key}" cannot be the name of a variable; add as: NAME')


class _Window(_Record):
    KEYS = {"start": (_bound, None, None), "end": (_bound, None, None)}

    @classmethod
    def check(cls, spec):
        super().check(spec)
        spans = [_window_span(spec, fixed_zone(zone)) for zone in ("-12:00", "+14:00")]
        if None not in spans[0] and all(start > end for start, end in spans):
            raise ValueError("it ends before it starts")


def _window_span(window, zone):
    """(start, end) of a window in seconds, both inclusive; None where it is open."""
    start, end = window.get("start"), window.get("end")
    if end is not None and len(end) == len("2025-01-01"):       # a date ends with its last second
        last = datetime.datetime.fromisoformat(f"{end}T23:59:59")
        end = last.replace(tzinfo=zone, fold=1).timestamp()
    elif end is not None:
        end = parse_instant(end, zone)
    return None if start is None else parse_instant(start, zone), end


# Hooks.

def _read_hooks(value, place):
    """{name: spec} of the hooks of a job in all spellings; None where null removes them all.

    The spec of one is null where null removes it, or all but those that are written here.
    """
    hooks, removed = {}, False
    for name, item, there, key in _written_hooks(value, place):
        name = "post_run" if name == "on_finish" else name
        if name is None:
            removed = True
        elif name in hooks:
            key.problem(f'the hook "{name}" is written twice, in two spellings; '
                        "make a list of them")
        else:
            hooks[name] = None if item is None else there.read(_hook, item)
    if removed:
        return {**dict.fromkeys(HOOKS), **hooks} if hooks else None
    return {name: hooks[name] for name in HOOKS if name in hooks}


def _written_hooks(value, place):
    """(name, value, place, place of the key) of each; the name None where null is for all."""
    keys = {key.replace("-", "_"): key for key in value if isinstance(key, str)}
    for name in _HOOK_KEYS:
        if name not in keys:
            continue
        item, there = value[keys[name]], place.item(keys[name], name)
        if name not in ("hooks", "notify"):
            yield name, item, there, place.key(keys[name])
        elif item is None:
            yield None, item, there, None
        else:
            for hook in there.read(_hook_mapping, item) or ():
                yield hook


def _hook_mapping(value, place):
    return [(name, item, there, place.key(key))
            for name, item, there, key in _known(value, place, _HOOK_NAMES, (), "hooks")]


def _hook(value, place):
    """The spec of a hook: its one entry, or a list of them."""
    if not isinstance(value, list):
        return _hook_entry(value, place, [])
    entries = []
    for index, item in enumerate(value):
        there = place.item(index)
        entries.append(there.read(lambda item, there: _hook_entry(item, there, entries), item))
    return entries


def _hook_entry(value, place, before):
    if not isinstance(value, dict):
        if before and isinstance(value, str) and value.startswith("-"):
            raise ValueError(f'"{value}" is no command; a list here is several hooks, write '
                             "{command: [program, argument]} for one")
        return _command(_text(value, place), place)
    count = len(place.reading.problems)
    spec = Hook.read(value, place)
    if len(place.reading.problems) == count and not spec.keys() & set(_HOOK_KINDS):
        if list(spec) != ["condition"]:
            raise ValueError("a hook needs a command, or webhook, mail, ping or run")
        if not before:
            raise ValueError("a condition alone belongs to the entry before it, and there is none")
        if isinstance(before[-1], dict) and "condition" in before[-1]:
            raise ValueError("the entry before this one has a condition already")
    return spec


def _make_hooks(spec):
    return {name: _make_hook(spec[name]) for name in HOOKS if spec.get(name)}


def _make_hook(value):
    entries = []
    for entry in value if isinstance(value, list) else [value]:
        entry = entry if isinstance(entry, dict) else {"command": entry}
        if list(entry) == ["condition"]:
            entries[-1] = {**entries[-1], **entry}
        else:
            entries.append(entry)
    return tuple(map(Hook, entries))


# Parameters.

_PARAM_TYPES = {"text": Pattern(r"(?s).*"), "integer": Pattern(r"[-+]?[0-9]+"),
                "number": Pattern(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"),
                "boolean": Pattern(r"true|false")}


class Param(_Record):
    """A value that may be given to a run: its default (None: it has to be given), its type, the
    allowed values (any, without some), and whether it is secret."""
    KEYS = {
        "default": (_text, None, None),
        "type": (_one_of(*_PARAM_TYPES), None, "text"),
        "values": (_list_of(_text), _several, ()),
        "secret": (_switch, None, False),
        "description": (_text, None, None),
    }
    NAME, MAY_BE_EMPTY = "a parameter", True

    @classmethod
    def read(cls, value, place):
        if value is None:
            raise ValueError('no value; write "" for an empty one, or {} for one that a start has '
                             "to give")
        nested = isinstance(value, (dict, list))
        return super().read(value, place) if nested else _text(value, place)

    @classmethod
    def check(cls, spec):
        param = cls(spec)
        if param.secret and param.default:
            raise ValueError("a secret has no default, which the store would keep; let a start "
                             "give it")
        problem = param.default is not None and param.problem(param.default)
        if problem:
            raise ValueError(f"its default {problem}")

    def problem(self, value):
        """Why a text cannot be its value, as the end of a sentence that does not quote a secret;
        None if it can."""
        shown = "" if self.secret else f' (it is "{value}")'
        if self.values and value not in self.values:
            return f"is none of {', '.join(self.values)}{shown}"
        if not _PARAM_TYPES[self.type].fullmatch(value):
            article = "an" if self.type == "integer" else "a"
            return f"is not {article} {self.type}{shown}"
        return None


def _params(value, place):
    if not isinstance(value, dict):
        raise ValueError(f'{place.shown(value)} stands where "NAME: default" lines are wanted')
    params = {}
    for key, item in value.items():
        name = key if type(key) is str else place.key(key).written(key)
        there = place.item(key, name)
        there.read(_param_name, name)
        params[name] = there.read(Param.read, item)
    return params


def _param_name(value, place):
    name = _own_variable(value, place)
    if not (name.isascii() and name.isidentifier()):
        raise ValueError(f'"{name}" cannot be a parameter; its name has letters, digits and _')
    return name


def _make_params(spec):
    return {name: Param(value if isinstance(value, dict) else {"default": value})
            for name, value in spec.items()}


# Steps: what is written below `pipeline`.

_STEP_KEYS = ("id", "name", "description", "timezone", "command", "shell", "directory", "user",
              "group", "nice", "umask", "stdin", "env", "env_from", "inherit_env", "timeout",
              "total_timeout", "grace", "leftovers", "if_lost", "retries", "backoff", "retry_on",
              "success", "condition", "limits", "hooks")
# What a step takes over from its pipeline, and which defaults of jobs are those of steps.
_INHERITED = ("timezone", "shell", "directory", "user", "group", "nice", "umask", "env", "env_from",
              "inherit_env", "params", "log")
_DEFAULTS_OF_STEPS = ("timeout", "total_timeout", "grace", "leftovers", "if_lost", "retries",
                      "backoff", "retry_on", "success", "limits")
_OF_COMMANDS = ("command", "stdin", "success", "limits", "leftovers", "if_lost")
_OF_PIPELINES = ("parallel", "fail_fast")
_OF_JOB_STEPS = ("id", "name", "description", "job", "depends_on", "condition", "timeout", "env",
                 "hooks")


def _steps(value, place):
    if not isinstance(value, list) or not value:
        raise ValueError("a pipeline is a list of steps; write for example "
                         "- {id: build, command: make}")
    specs = [place.item(index).read(_step, item) for index, item in enumerate(value)]
    places = [place.item(index) for index in range(len(value))]
    lines = {}
    for spec, there in zip(specs, places):
        if spec and spec.get("id") is not None:
            if spec["id"] in lines:
                there.item("id", "id").problem(
                    f'"{spec["id"]}" is taken by the step in line {lines[spec["id"]]}'
                    if lines[spec["id"]] else f'two steps are called "{spec["id"]}"')
            lines[spec["id"]] = there.note and there.note.line
    for spec, there, item in zip(specs, places, value):
        _check_dependencies(spec, there, item, lines)
    if not place.reading.problems:
        _check_order(specs, place)
    return specs


def _step(value, place):
    """The spec of a step: a reader."""
    if not isinstance(value, dict):
        raise ValueError(f"{place.shown(value)} is no step; write id:, command: and depends_on:")
    allowed = {}
    for key, item in value.items():
        name = str(key).replace("-", "_")
        if name in Job.KEYS and name not in _STEP_KEYS:
            place.key(key).problem(f'"{name}" is not possible in a step; write it beside pipeline:')
        else:
            allowed[key] = item
    spec = _merged({}, _read_keys(allowed, place, Step, "a step"), Step)
    missing = [name for name in ("id", "command") if value.get(name) is None]
    if "job" in spec and "command" in missing:
        missing.remove("command")
        for name in [name for name in spec if name not in _OF_JOB_STEPS]:
            place.item(name, name).problem(
                "it is not possible in a step that runs a job; write it in that job")
    if "job" in spec and "command" in spec:
        place.problem("a step has either a command or a job; remove one of them")
    for name in missing:
        place.problem({"id": "a step needs an id; write for example id: build",
                       "command": "a step needs a command, or job: and the id of one"}[name])
    return spec


def _depends_on(value, place):
    if not isinstance(value, dict):
        return _list_of(_id)(value, place)
    return {key: place.item(key, str(key)).read(_one_of("succeeded", "failed", "finished"), item)
            for key, item in value.items()}


def _make_dependencies(value):
    return value if isinstance(value, dict) else dict.fromkeys(_several(value), "succeeded")


def _check_dependencies(spec, place, value, ids):
    """Each step that is depended on has to be another one of `ids`."""
    if spec is None:
        return
    key = "depends_on" if "depends_on" in value else "depends-on"
    there = place.item(key, "depends_on")
    for number, name in enumerate(_make_dependencies(spec.get("depends_on") or {})):
        if name in ids and name != spec.get("id"):
            continue
        where = there.item(number) if isinstance(value[key], list) else there
        where = there.key(name, there.path) if isinstance(value[key], dict) else where
        if name in ids:
            where.problem("a step cannot depend on itself")
        elif name is not None:
            where.problem(f'there is no step "{name}"{nearest(name, ids)}')


def _check_order(specs, place):
    """No step may depend on itself through others."""
    cycle = _cycle({spec["id"]: list(_make_dependencies(spec.get("depends_on") or {}))
                    for spec in specs})
    if cycle:
        place.problem(f"these steps wait for one another: {' -> '.join(cycle)}")


def _cycle(edges):
    """The first cycle in {node: [nodes that it needs]}, its first node again at the end; or []."""
    import graphlib
    try:
        graphlib.TopologicalSorter(edges).prepare()
        return []
    except graphlib.CycleError as error:
        return error.args[1][::-1]


# Jobs.

class Job(_Record):
    """A job, made of a spec that has been checked (job_from_mapping and read_job_file do that).

    Durations are seconds; `hooks` is {name: tuple of Hooks}, `params` {name: Param}; a command is a
    str for the shell, or a tuple to be executed as it is. `pipeline` has the specs of steps, which
    `steps` makes.
    """
    KEYS = {
        "id": (_id, None, None),
        "name": (_line, None, None),
        "description": (_text, None, None),
        "tags": (_list_of(_line), _several, ()),
        "schedule": (_list_of(_text), _several, ()),
        "timezone": (_timezone, None, None),
        "window": (_Window.read, None, None),
        "jitter": (_duration, parse_duration, 0),
        "catch_up": (_one_of("latest", "all", "none"), None, "latest"),
        "catch_up_window": (_duration, parse_duration, 3600),
        "enabled": (_switch, None, True),
        "command": (_command, _tuple, None),
        "shell": (_shell, _shell_words, ("/bin/sh", "-c")),
        "directory": (_directory, None, None),
        "user": (_line, None, None),
        "group": (_line, None, None),
        "nice": (_number_from(-20, 19), None, None),
        "umask": (_umask, lambda value: int(value, 8), 0o022),
        "stdin": (_text, None, None),
        "env": (_env, _without_nulls, {}),
        "env_from": (_list_of(_EnvSource.read), _several, ()),
        "inherit_env": (_inherit_env, _tuple, False),
        "timeout": (_duration, _limit, None),           # 0 is no limit
        "total_timeout": (_duration, _limit, None),
        "grace": (_duration, parse_duration, 10),
        "leftovers": (_one_of("leave", "kill"), None, "leave"),
        "if_lost": (_one_of("fail", "rerun"), None, "fail"),
        "retries": (_number_from(0, _MOST), None, 0),
        "backoff": (Backoff.read, Backoff, Backoff()),
        "retry_on": (RetryOn.read, RetryOn, None),
        "success": (Success.read, Success, Success()),
        "condition": (_command, _tuple, None),
        "max_concurrent": (_number_from(0, _MOST), None, 1),
        "overlap": (_one_of("skip", "queue", "replace"), None, "skip"),
        "priority": (_number_from(-_MOST, _MOST), None, 0),
        "limits": (Limits.read, Limits, Limits()),
        "hooks": (None, _make_hooks, {}),               # _read_hooks reads them in all spellings
        "log": (LogLimits.read, LogLimits, LogLimits()),
        "history": (HistoryLimits.read, HistoryLimits, HistoryLimits()),
        "params": (_params, _make_params, {}),
        "parallel": (_number_from(1, _MOST), None, None),
        "fail_fast": (_switch, None, False),
        "pipeline": (_steps, tuple, ()),
    }
    spec = _crons = None

    def __init__(self, spec):
        super().__init__(spec)
        object.__setattr__(self, "spec", spec)

    @classmethod
    def from_spec(cls, spec):
        """The job of a spec that a store has kept."""
        return cls(spec)

    def __eq__(self, other):
        return isinstance(other, Job) and self.spec == other.spec

    def __hash__(self):
        return hash(json.dumps(self.spec, sort_keys=True))

    def crons(self):
        """The Crons of its schedule, made at the first call."""
        if self._crons is None:
            object.__setattr__(self, "_crons",
                               tuple(Cron(expression, self.id) for expression in self.schedule))
        return self._crons

    def zone(self, default):
        """The tzinfo of its schedule: of its own timezone, else the default."""
        return get_zone(self.timezone) if self.timezone else default

    def window_instants(self, default_zone):
        """(start, end) in seconds UTC, both inclusive; None where the window is open."""
        return _window_span(self.window, self.zone(default_zone)) if self.window else (None, None)

    def steps(self):
        """{id: Step} of its pipeline, in order, with what they take over from it."""
        below = {name: self.spec[name] for name in _INHERITED if name in self.spec}
        return {spec["id"]: Step(_merged(below, spec, Step)) for spec in self.pipeline}

    def problems_of(self, given):
        """Sentences about its params, where {name: value} is given to a run; None is a value that
        is kept elsewhere."""
        problems = []
        for name, param in self.params.items():
            value = given.get(name, param.default)
            if value is None and name not in given:
                problems.append(f"the parameter {name} has no default; give it with --env "
                                f"{name}={'' if param.secret else 'VALUE'}".rstrip("="))
            problem = value is not None and param.problem(value)
            if problem:
                problems.append(f"the parameter {name} {problem}")
        return problems


class Step(Job):
    """A step of a pipeline: a job that runs a command, or as `job` the one with that id;
    `depends_on` is {step: succeeded, failed or finished}."""
    KEYS = {**{name: Job.KEYS[name] for name in (*_STEP_KEYS, "params", "log")},
            "depends_on": (_depends_on, _make_dependencies, {}),
            "job": (_id, None, None)}


# Readers of what a command line gives as it stands; for others its text is YAML.
_AS_TEXT = (_id, _line, _text, _command, _timezone, _directory, _umask, Job.KEYS["schedule"][0])


def effective(job, defaults):
    """The job with the configuration's defaults (a spec, or None) below it."""
    return Job(_with_defaults(defaults, job.spec)) if defaults else job


def effective_command(spec, settings):
    """The Job of a command that is not registered: of all settings it knows `log` and `history`."""
    return effective(Job(spec), {name: settings[name] for name in ("log", "history")
                                 if settings.get(name)})


def _with_defaults(defaults, spec):
    """The spec of a job with defaults below it; those of commands go to the steps of a pipeline."""
    if not spec.get("pipeline"):
        return _merged(defaults, spec)
    below = {name: value for name, value in defaults.items() if name in _DEFAULTS_OF_STEPS}
    steps = [_merged(below, step, Step) if step and "job" not in step else step
             for step in spec["pipeline"]]
    rest = {name: value for name, value in defaults.items() if name not in _DEFAULTS_OF_STEPS}
    return _merged(rest, {**spec, "pipeline": steps})


def _merged(below, above, kind=Job):
    """The spec of two, of which the second is stronger, in the order of KEYS."""
    spec = {**below, **above}
    for name in _MERGED:
        if isinstance(below.get(name), dict) and isinstance(above.get(name), dict):
            spec[name] = {**below[name], **above[name]}
    return {name: spec[name] for name in kind.KEYS if name in spec}


def _read_keys(value, place, kind=Job, what="a job"):
    """The spec of the keys of a job, or of defaults, or of a step."""
    spec, hooks = {}, _read_hooks(value, place)
    if hooks != {}:
        spec["hooks"] = hooks
    names = dict.fromkeys((*kind.KEYS, *_HOOK_KEYS))
    for name, item, there, _ in _known(value, place, names, kind.LATER, what):
        if name not in _HOOK_KEYS:
            found = None
            if item is not None or name == "directory":         # whose reader looks for ~
                found = there.read(kind.KEYS[name][0], item)
            if found is not None or item is None:
                spec[name] = found
    return spec


def _read_defaults(value, place, refused=_NO_DEFAULT):
    """The spec of defaults; `refused` has sentences about keys that cannot be among them."""
    if not isinstance(value, dict):
        raise ValueError(f'{place.shown(value)} stands where "key: value" lines are wanted')
    allowed = {}
    for key, item in value.items():
        name = str(key).replace("-", "_")
        if name in refused:
            place.key(key).problem(refused[name].format(name))
        else:
            allowed[key] = item
    return _merged({}, _read_keys(allowed, place))


def _read_job(value, place, defaults, named=None):
    """The spec of a job with a file's defaults below it; `named` is (id, place) of its key."""
    own = _read_keys(value, place)
    if named is not None:
        if own.get("id") not in (None, named[0]):
            place.item("id", "id").problem(
                f'"{own["id"]}" stands below the id "{named[0]}"; remove one')
        own["id"] = named[1].read(_id, named[0])
    spec = _with_defaults(defaults, own)
    if spec.get("directory") is None and place.reading.folder is not None:
        spec = _merged(spec, {"directory": place.reading.folder})
    if all(str(key).replace("-", "_") in (*Job.KEYS, *_HOOK_KEYS) for key in value):
        _check_needed(value, place, spec, named)        # else one of these may be what is needed
    return spec


def _check_needed(value, place, spec, named):
    if spec.get("id") is None and value.get("id") is None and named is None:
        place.problem("a job needs an id; write for example id: backup")
    the_job = f'job "{spec["id"]}"' if spec.get("id") else "job"
    if value.get("pipeline") is not None:
        for key in value:
            if key.replace("-", "_") in _OF_COMMANDS:
                place.key(key).problem(f'"{key}" beside pipeline: means nothing; write it in the '
                                       "steps")
    elif value.get("command") is None:
        place.problem(f"the {the_job} has no command; write command: and what to run")
    else:
        for key in value:
            if key.replace("-", "_") in _OF_PIPELINES:
                place.key(key).problem(f'"{key}" is for jobs with a pipeline; remove it')
    missing = [name for name, param in (spec.get("params") or {}).items()
               if isinstance(param, dict) and param.get("default") is None]
    if missing and spec.get("schedule"):
        place.item("params", "params").problem(
            f"{missing[0]} has no default, and a schedule gives none; write one")


def _check_schedule(place, spec, zone_name):
    """Each expression must be one of cron, with the job's id as seed, and fire in its zone."""
    def fires(expression, _):
        cron = Cron(expression, spec.get("id") or "job")
        zone = cron.zone or (zone_name and get_zone(zone_name))
        if zone and not cron.fires_in(zone):
            raise ValueError(f'"{expression}" never fires in {zone}')

    schedule = spec.get("schedule") or []
    if None not in _several(schedule):                  # which is a problem already
        place.item("schedule", "schedule").read(_list_of(fires), schedule)


def check_references(job, ids):
    """A sentence for each job that a job runs, in hooks or steps, and that is not among the ids."""
    named = _jobs_in_hooks(job, f'of job "{job.id}"')
    for step in job.steps().values():
        named += _jobs_in_hooks(step, f'of step "{step.id}" of job "{job.id}"')
        if step.job is not None:
            named.append((f'step "{step.id}" of job "{job.id}"', step.job))
    return [f'{who} runs the job "{other}", which does not exist{nearest(other, ids)}'
            for who, other in named if other not in ids]


def _jobs_in_hooks(job, of):
    return [(f"hooks.{name} {of}", hook.run) for name, hooks in job.hooks.items()
            for hook in hooks if hook.run is not None]


def check_starts(jobs):
    """A sentence about a pipeline of {id: Job} that would start itself, through its steps and
    those of others; None if there is none."""
    edges = {}
    for job in jobs.values():
        if job.pipeline:
            steps = job.steps().values()
            edges[job.id] = [step.job for step in steps if step.job is not None] + [
                other for step in steps for _, other in _jobs_in_hooks(step, "")]
    cycle = _cycle(edges)
    return f'the job "{cycle[0]}" would start itself: {" -> ".join(cycle)}' if cycle else None


# Job files.

class JobFile(Value):
    """What a file holds: its jobs, and as `warnings` Problems that are none of running them."""
    __slots__ = ("jobs", "warnings")


def read_job_file(text, file, folder, defaults=None):
    """The JobFile of a text in YAML or JSON (str, or UTF-8 bytes).

    Problems name the `file`; relative paths count from the absolute `folder`. `defaults` is the
    spec of the configuration's, of which only the time zone matters here. Raises Invalid.
    """
    specs, warnings = _in_two_passes(
        text, file, folder, lambda value, place: _read_file(value, place, defaults or {}))
    return JobFile(jobs=[Job(spec) for spec in specs], warnings=warnings)


def read_job(text, file, job_id):
    """The JobFile of the keys of one job in YAML or JSON; its id, which is given, may be left out.

    There are no relative paths. Raises Invalid.
    """
    def reader(value, place):
        if not isinstance(value, dict):
            raise ValueError(f"{place.shown(value)} is no job; write command: and so on")
        spec = _read_job(value, place, {}, (job_id, place))
        _check_schedule(place, spec, spec.get("timezone"))
        return spec

    spec, warnings = _in_two_passes(text, file, None, reader)
    return JobFile(jobs=[Job(spec)], warnings=warnings)


def named_jobs(spec):
    """The ids of other jobs that a spec names, in hooks and steps."""
    if isinstance(spec, list):
        return {job_id for item in spec for job_id in named_jobs(item)}
    if not isinstance(spec, dict):
        return set()
    here = {spec[name] for name in ("run", "job") if isinstance(spec.get(name), str)}
    return here.union(*(named_jobs(item) for name, item in spec.items()
                        if name not in ("env", "params")))


def _in_two_passes(text, file, folder, reader):
    """(what the reader makes of the value of the text, warnings); raises Invalid."""
    try:
        try:
            place = _Place(_Reading(file, folder, False), "", None)
            result = place.read(reader, read_yaml(text))
        except _Again:
            notes = []
            value = read_yaml(text, notes)
            place = _Place(_Reading(file, folder, True), "", notes[0])
            result = place.read(reader, value)
    except YamlError as error:
        raise Invalid([Problem(file=file, line=error.line, column=error.column,
                               message=error.problem)]) from None
    if place.reading.problems:
        raise Invalid(sorted(place.reading.problems,
                             key=lambda problem: (problem.line or 0, problem.column or 0)))
    return result, place.reading.warnings


def _read_file(value, place, below):
    """The specs of the jobs of a file: a reader of its whole value."""
    parts, defaults, specs, lines = _parts(value, place), {}, [], {}
    written, there = parts.get("defaults", (None, None))
    place.reading.variables.update(below.get("env") or ())
    if written is not None:
        defaults = there.read(_read_defaults, written) or {}
    place.reading.variables.update(defaults.get("env") or ())
    for item, there, named in _jobs_in(parts):
        if not isinstance(item, dict):
            there.problem(f"{there.shown(item)} is no job; write id:, command: and so on")
            continue
        spec = _read_job(item, there, defaults, named)
        if spec.get("env"):             # what only the file's defaults had is gone for good
            spec["env"] = {name: text for name, text in spec["env"].items()
                           if text is not None or name in (below.get("env") or ())}
        _check_schedule(there, spec, {**below, **spec}.get("timezone"))
        _check_unique(spec.get("id"), named[1] if named else there.item("id", "id"), lines)
        specs.append(spec)
    return specs


def _check_unique(job_id, place, lines):
    """`lines` is {id: line} of the jobs so far."""
    if job_id in lines:
        place.problem(f'"{job_id}" is taken by the job in line {lines[job_id]}')
    elif job_id is not None:
        lines[job_id] = place.note and place.note.line


def _parts(value, place):
    """{"jobs", "job" or "defaults": (value, place)} of the mapping, or mappings, of a file."""
    if value is None:
        raise ValueError("the file is empty; for no jobs write jobs: []")
    mappings = [(value, place)]
    if isinstance(value, list):
        mappings = [(item, place.item(index)) for index, item in enumerate(value)]
        dicts = [item for item in value if isinstance(item, dict)]
        if any(map(_is_like_a_job, dicts)) and not any("defaults" in item for item in dicts):
            return {"jobs": (value, place)}
    elif isinstance(value, dict) and "pipeline" not in value and _is_like_a_job(value):
        raise ValueError("this looks like a job; put it below job:, or into a list below jobs:")
    if not mappings or not all(isinstance(item, dict) for item, _ in mappings):
        raise ValueError(f"{place.shown(value)} is no job file; begin with jobs:")
    parts = {}
    for item, there in mappings:
        _add_parts(item, there, parts)
    if not {"jobs", "job", "pipeline"} & parts.keys() and not place.reading.problems:
        raise ValueError("there are no jobs; write them below jobs:")
    return parts


def _is_like_a_job(value):
    return bool({"id", "command"} & value.keys()) and not {"jobs", "job"} & value.keys()


def _add_parts(value, place, parts):
    kinds = ("jobs", "job", "pipeline")
    if "pipeline" in value and not {"jobs", "job"} & value.keys():      # the job stands right here
        whole = {key: item for key, item in value.items() if key != "defaults"}
        value = {"pipeline": whole, **{key: value[key] for key in value if key == "defaults"}}
    for name, item, there, key in _known(value, place, (*kinds, "defaults"), (), "a job file"):
        other = next((kind for kind in kinds if kind in parts), None)
        if name in parts:
            place.key(key).problem(f'"{name}" is written a second time')
        elif name != "defaults" and other is not None:
            place.key(key).problem(f'a file has one of jobs, job and pipeline, and "{other}" '
                                   "stands before this")
        elif name == "pipeline":
            parts[name] = item, place
        else:
            parts[name] = item, _Place(there.reading, "", there.note)


def _jobs_in(parts):
    """(value, place, (id, its place) where the id is a key, else None) of each job of a file."""
    if "job" in parts:
        yield (*parts["job"], None)
    if "pipeline" in parts:
        value, place = parts["pipeline"]
        stem = os.path.splitext(os.path.basename(place.reading.file))[0]
        named = isinstance(value, dict) and value.get("id") is None and valid_id(stem)
        yield value, place, (stem, place) if named else None
    jobs, place = parts.get("jobs", ([], None))
    if isinstance(jobs, dict):
        for key, item in jobs.items():
            there = place.key(key, "id")
            yield item, place.item(key), (there.written(key), there)
    elif isinstance(jobs, list):
        for index, item in enumerate(jobs):
            yield item, place.item(index), None
    else:
        place.problem("jobs is a list, or a mapping of ids to jobs; for none write jobs: []")


# Jobs that come from no file.

def job_from_mapping(value, folder, settings=()):
    """The job of a mapping, such as a body in JSON, with settings (KEY, TEXT) of a command line.

    A setting's text stands for itself where its key takes a text, else it is read as YAML. Without
    a folder there are no relative paths. Raises Invalid; its problems name keys, not lines.
    """
    place, spec = _Place(_Reading("job", folder, None), "", None), None
    if not isinstance(value, dict):
        place.problem(f"{place.shown(value)} is no job; write id:, command: and so on")
    else:
        value = _with_settings(value, place, settings)
        spec = _read_job(value, place, {})
        _check_schedule(place, spec, spec.get("timezone"))
    if place.reading.problems:
        raise Invalid(place.reading.problems)
    return Job(spec)


def _with_settings(value, place, settings):
    """The mapping with the settings, whose notes the place gets."""
    place.note = types.SimpleNamespace(line=None, column=None, keys={}, items={})
    for key, text in settings:
        name, notes = key.replace("-", "_"), []
        value = {other: item for other, item in value.items()
                 if str(other).replace("-", "_") != name}
        if name in _HOOK_NAMES or (name in Job.KEYS and Job.KEYS[name][0] in _AS_TEXT):
            value[key] = text
            continue
        try:
            value[key] = read_yaml(text, notes)
            place.note.items[key] = notes[0]
        except YamlError as error:
            _Place(place.reading, name, None).problem(error.problem)
    return value


# Export.

_UNQUOTED = Pattern(r"[A-Za-z/](?:[\w ./=+@%,-]*[\w./=+@%,-])?", "a")


def job_to_yaml(jobs, defaults=None):
    """A job file in YAML that gives the same jobs; `defaults` is a spec of what is below them."""
    below = f"defaults:{_as_yaml(defaults, '  ')}\n\n" if defaults else ""
    return below + f"jobs:{_as_yaml([job.spec for job in jobs], '  ')}\n"


def _as_yaml(value, indent):
    """A value as it follows `key:` or `-`; lines of its own have this indentation."""
    if value and isinstance(value, dict):
        return "".join(f"\n{indent}{_scalar(key)}:{_as_yaml(item, indent + '  ')}"
                       for key, item in value.items())
    if value and isinstance(value, list):
        return "".join(f"\n{indent}- {_as_yaml(item, indent + '  ').lstrip()}" for item in value)
    if isinstance(value, str) and _fits_a_block(value):
        lines = "".join(f"\n{indent}{line}".rstrip(" ") for line in value.splitlines())
        return (" |" if value.endswith("\n") else " |-") + lines
    return f" {_scalar(value)}"


def _fits_a_block(text):
    """Whether a text has several lines, and none that one could not see as it is."""
    lines = text.replace("\t", " ").split("\n")
    return (len(lines) > 1 and lines[0] != "" and not lines[0].startswith(" ")
            and not text.endswith("\n\n")
            and all(line.isprintable() and line == line.rstrip() for line in lines))


def _scalar(value):
    if not isinstance(value, str):
        return json.dumps(value)
    if _UNQUOTED.fullmatch(value) and value.lower() not in (*_MEANT, "null"):
        return value
    return json.dumps(value, ensure_ascii=not value.isprintable())


# The configuration.

_HOST_AND_PORT = Pattern(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?", "a")


def _host_and_port(value, place):
    text = _text(value, place)
    if not _HOST_AND_PORT.fullmatch(text):
        raise ValueError(f'"{text}" is not the name of a host; write for example roexec.example.com'
                         ", or with a port roexec.example.com:8443")
    return text.lower()


class TlsSettings(_Record):
    """TLS of the server: `cert`, the path of its certificates in PEM, and `key`, of their key."""
    KEYS = {
        "cert": (_path, None, None),
        "key": (_path, None, None),
    }

    @classmethod
    def check(cls, spec):
        if set(spec) != {"cert", "key"}:
            raise ValueError("cert and key go together; write both, or leave tls out")


class AuthSettings(_Record):
    """Who is let in without a token over loopback: `owner`, whether anybody is, and `local_users`,
    the names of users besides the server's own and root."""
    KEYS = {
        "owner": (_switch, None, True),
        "local_users": (_list_of(_line), _several, ()),
    }
    MAY_BE_EMPTY = True


class _ServerSettings(_Record):
    KEYS = {
        "host": (_host, None, "127.0.0.1"),
        "port": (_number_from(0, 65535), None, 8080),
        "hosts": (_list_of(_host_and_port), _several, ()),
        "tls": (TlsSettings.read, TlsSettings, None),
        "auth": (AuthSettings.read, AuthSettings, AuthSettings()),
        "log": (_path, None, None),
        "drain": (_some_duration, parse_duration, 0),
    }
    MAY_BE_EMPTY = True


class _StoreSettings(_Record):
    KEYS = {
        "type": (_one_of("local", "sqlite", later=("s3",)), None, "local"),
        "path": (_path, None, None),
    }
    LATER = ("bucket", "endpoint", "region", "prefix")

    @classmethod
    def read(cls, value, place):
        if isinstance(value, str):
            raise ValueError(f"write {{path: {value}}}")
        return super().read(value, place)

    @classmethod
    def check(cls, spec):
        if spec.get("type") == "sqlite" and "path" not in spec:
            raise ValueError("type: sqlite needs path:, the database file")
        if spec.get("type") == "sqlite" and not spec["path"].endswith(".db"):
            raise ValueError("path: the name of a database file ends in .db; write for example "
                             f"{spec['path']}.db")


class _SchedulerSettings(_Record):
    KEYS = {
        "max_concurrent": (_number_from(0, _MOST), _limit, None),
        "timezone": (_timezone, None, None),
    }
    MAY_BE_EMPTY = True


class MetricsSettings(_Record):
    """Whether /metrics is there, `enabled`, and for how many jobs one by one, `max_jobs`."""
    KEYS = {
        "enabled": (_switch, None, False),
        "max_jobs": (_number_from(1, _MOST), None, 1000),
    }
    MAY_BE_EMPTY = True


class MailSettings(_Record):
    """The mail server: host, port, tls, user, password_file, timeout; `from` is `sender`."""
    KEYS = {
        "host": (_host, None, None),
        "port": (_number_from(1, 65535), None, None),
        "from": (_address, None, None),
        "tls": (_one_of("starttls", "tls", "none"), None, "starttls"),
        "user": (_line, None, None),
        "password_file": (_path, None, None),
        "timeout": (_some_duration, parse_duration, 30),
    }

    def __init__(self, spec=None):
        super().__init__(spec)
        if self.port is None:           # RFC 8314: submission, the same within TLS, and RFC 5321
            object.__setattr__(self, "port", {"starttls": 587, "tls": 465, "none": 25}[self.tls])

    @property
    def sender(self):
        """The address in From; None where none was written."""
        return getattr(self, "from")

    @classmethod
    def check(cls, spec):
        super().check(spec)
        if "host" not in spec:
            raise ValueError("write host:, the mail server")
        if ("user" in spec) != ("password_file" in spec):
            raise ValueError("user and password_file go together; write both or none")
        if "user" in spec and spec.get("tls") == "none":
            raise ValueError("tls: none would send the password in clear text; remove user and "
                             "password_file, or tls: none")
        if parse_duration(spec.get("timeout", 0)) > 100:        # then a try counts as lost
            raise ValueError("timeout is at most 100s")


def _vault_address(value, place):
    text = _line(value, place)
    found = _VAULT_ADDRESS.fullmatch(text)
    if not found or int(found[1] or 1) not in range(1, 65536):
        raise ValueError(f'"{text}" is no address of Vault; write for example '
                         "https://vault.example.com:8200")
    return text.rstrip("/")


class VaultSettings(_Record):
    """Where Vault is, and who asks: a token in a file, or an AppRole; `ca` is a file in PEM."""
    KEYS = {
        "address": (_vault_address, None, None),
        "token_file": (_path, None, None),
        "role_id": (_line, None, None),
        "secret_id_file": (_path, None, None),
        "namespace": (_line, None, None),
        "ca": (_path, None, None),
    }

    @classmethod
    def check(cls, spec):
        super().check(spec)
        if "address" not in spec:
            raise ValueError("write address:, for example https://vault.example.com:8200")
        if ("role_id" in spec) != ("secret_id_file" in spec):
            raise ValueError("role_id and secret_id_file go together; write both or none")
        if ("token_file" in spec) == ("role_id" in spec):
            raise ValueError("write either token_file, or role_id and secret_id_file")
        if "ca" in spec and spec["address"].startswith("http:"):
            raise ValueError("ca is for an address that begins with https://")


def _config_defaults(value, place):
    return _read_defaults(value, place, {**_NO_DEFAULT, "directory": (
        "directory is not possible here, since a job of a file has that file's folder; "
        "write it under defaults: of the file")})


class Config(_Record):
    """A configuration, made of a checked spec; without one, that which says nothing.

    `server` has host, port, hosts, tls and auth; `store` type and path; `scheduler` max_concurrent
    and timezone; `jobs` are absolute paths of job files and folders, `defaults` the spec of jobs'
    defaults; `mail` is the spec of MailSettings, or None, and `vault` that of VaultSettings; `log`,
    `history` and `metrics` are specs too, of LogLimits, HistoryLimits and MetricsSettings.
    """
    KEYS = {
        "server": (_ServerSettings.read, _ServerSettings, _ServerSettings()),
        "store": (_StoreSettings.read, _StoreSettings, _StoreSettings()),
        "scheduler": (_SchedulerSettings.read, _SchedulerSettings, _SchedulerSettings()),
        "jobs": (_list_of(_path), _several, ()),
        "defaults": (_config_defaults, None, {}),
        "mail": (MailSettings.read, None, None),
        "vault": (VaultSettings.read, None, None),
        "log": (LogLimits.read, None, None),
        "history": (HistoryLimits.read, None, None),
        "metrics": (MetricsSettings.read, None, None),
    }
    LATER = ("clustering",)
    NAME, MAY_BE_EMPTY = "the configuration", True

    def __init__(self, spec=None):
        """Of `defaults` and `log` and `history` beside them, which hold for all runs, the former
        are the stronger."""
        super().__init__(spec)
        below = {name: getattr(self, name) for name in ("log", "history") if getattr(self, name)}
        object.__setattr__(self, "defaults", _merged(below, self.defaults))

    @property
    def host_was_set(self):
        """Whether the host was written, be it as the default has it."""
        return "host" in vars(self.server)


def read_config(text, file, folder):
    """The Config of a text in YAML or JSON; relative paths are from the folder. Raises Invalid."""
    return Config(_in_two_passes(text, file, folder, lambda value, place: Config.read(
        {} if value is None else value, place))[0])


# ==== 5 crontab (pure) ============================================================================
# Crontabs as job files, for those who move. Fields, variables and commands are read as Debian's
# cron(8) reads them, where it is careless too, so that a job starts at the same instants with the
# same input. What changes, and what a job file cannot say, is a note with the number of its line.

class Crontab(Value):
    """A crontab as jobs: their specs `jobs`, the spec of `defaults` below them, `text` of the job
    file of both, and `notes`, which are texts. It is `complete` if no line was left out."""
    __slots__ = ("jobs", "defaults", "text", "notes", "complete")


def read_crontab(text, file, owner, me):
    """The Crontab of a text (str, or UTF-8 bytes), which its notes call `file`.

    `owner` is the user whose crontab it is; None for a system crontab, which names a user in each
    line. The jobs of another user than `me` say so. Raises RoexecError if it is not UTF-8.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            line = text.count(b"\n", 0, error.start) + 1
            raise RoexecError(f"{file}:{line}: this is not UTF-8") from None
    reader, lines = _CrontabReader(file, owner, me), text.split("\n")
    for number, line in enumerate(lines, 1):
        reader.read_line(line.lstrip(" \t").rstrip("\r"), number)
    if lines[-1]:
        reader.note(len(lines), "the file does not end in a newline, so cron would ignore it")
    if "\r" in text:
        reader.note(text.count("\n", 0, text.index("\r")) + 1,
                    "a carriage return ends the line, which cron would pass on to the command")
    return reader.result()


_NOT_VARIABLES = ("MAILTO", "MAILFROM", "CONTENT_TYPE", "CONTENT_TRANSFER_ENCODING", "CRON_TZ",
                  "RANDOM_DELAY")
_SETTING_NOTES = {
    "LOGNAME": "cron sets LOGNAME itself, whatever is written here",
    "CRON_TZ": "CRON_TZ is the zone of the schedules below, as in cronie; Debian's cron takes no "
               "notice of it",
    "RANDOM_DELAY": "RANDOM_DELAY becomes jitter, another one for each slot, where cronie keeps "
                    "one; Debian's cron takes no notice of it"}


class _CrontabReader:
    """The lines of a crontab, one after the other, and what has been read so far."""

    def __init__(self, file, owner, me):
        self.file, self.owner, self.me = file, owner, me
        self.variables, self.comment = {}, []
        self.jobs, self.notes, self.complete = [], [], True     # jobs: (spec, its notes)

    def note(self, number, message):
        """Note something about a line."""
        self.notes.append(printable(f"{self.file}:{number}: {message}"))

    def read_line(self, line, number):
        """Read a line without the blanks before it."""
        comment, self.comment = self.comment, []
        setting = _SETTING.fullmatch(line)
        try:
            if line.startswith("#"):
                self.comment = _with_comment(comment, line.lstrip("#").strip())
            elif setting:
                self._set(*_name_and_value(setting), number)
            elif line:
                self._add(line, "\n".join(comment).strip(), number)
        except ValueError as error:
            self.complete = False
            self.note(number, f"left out: {error}")

    def _set(self, name, value, number):
        if value is None:
            self.note(number, f'cron wants {name}="" for an empty value')
            value = ""
        _check_job({"id": "x", "command": "x", "env": {name: value}})
        if name in _SETTING_NOTES:
            self.note(number, _SETTING_NOTES[name])
        elif name in _NOT_VARIABLES and value:
            self.note(number, f"{name}: nothing is mailed, what a job prints is in the log of its "
                              "run; to hear of failures give it a hook such as "
                              'on_failure: "mail -s failed ADDRESS"')
        if name != "LOGNAME":
            self.variables[name] = value

    def _add(self, line, comment, number):
        """Add the job of an entry."""
        notes = []
        words, rest = _crontab_words(line)
        schedule = _crontab_schedule(words, notes)
        owner, rest = (self.owner, rest) if self.owner else _user_and_command(rest)
        if self.owner and rest.startswith("*"):
            raise ValueError('cron refuses a command that begins with "*"; is it a sixth field?')
        spec = self._job(schedule, rest, notes)
        if comment:
            spec["description"] = comment
        if owner != self.me:
            spec["user"] = owner
            if self.me != "root":
                notes.append(f"it runs as {owner}, which takes a server that root runs")
        self.jobs.append((_check_job(spec), [f"line {number}: {text}" for text in notes]))
        for text in notes:
            self.note(number, text)

    def _job(self, schedule, text, notes):
        """The mapping of a job, of its schedule and the rest of its line."""
        variables = {"PATH": "/usr/bin:/bin", **self.variables}
        command, stdin = _command_and_input(text, notes)
        spec = {"id": _job_id(command, {spec["id"] for spec, _ in self.jobs}), "schedule": schedule,
                "command": command, "stdin": stdin,
                "directory": _absolute_path(variables, "HOME")}
        shell = _absolute_path(variables, "SHELL")
        if shell == "/bin/sh":              # which is what jobs have anyway
            del variables["SHELL"]
        elif shell:
            spec["shell"] = [shell, "-c"] if " " in shell else shell
        if schedule != "@reboot":
            _add_zone_and_jitter(spec, variables)
        spec["env"] = {name: variables[name] for name in variables if name not in _NOT_VARIABLES}
        return {key: value for key, value in spec.items() if value is not None}

    def result(self):
        """The Crontab."""
        specs = [spec for spec, _ in self.jobs]
        defaults = {"directory": "~", "max_concurrent": 0, **_take_what_is_common(specs)}
        return Crontab(jobs=specs, defaults=defaults, notes=self.notes, complete=self.complete,
                       text=_job_file(self.file, defaults, self.jobs))


def _check_job(mapping):
    """The spec of a mapping; raises ValueError where it cannot be a job."""
    try:
        return job_from_mapping(mapping, None).spec
    except Invalid as error:
        raise ValueError("; ".join(problem.message for problem in error.problems)) from None


def _absolute_path(variables, name):
    path = variables.get(name)
    if path is not None and not os.path.isabs(path):
        raise ValueError(f'{name} is "{path}", which is no path from "/"')
    return path


def _add_zone_and_jitter(spec, variables):
    zone, delay = variables.get("CRON_TZ"), variables.get("RANDOM_DELAY") or "0"
    if zone:
        spec["schedule"] = f"CRON_TZ={zone} {spec['schedule']}"
    if not (delay.isascii() and delay.isdigit()):
        raise ValueError(f'RANDOM_DELAY is "{delay}", which is no number of minutes')
    if int(delay):
        spec["jitter"] = f"{int(delay)}m"


# The job file.

def _take_what_is_common(specs):
    """The spec of the variables and the shell that all the specs have, which are taken out."""
    env = set.intersection(*(set(spec["env"].items()) for spec in specs)) if specs else ()
    shells = {str(spec.get("shell")): spec.get("shell") for spec in specs}
    common = {"shell": shells.popitem()[1]} if len(shells) == 1 else {}
    for spec in specs:
        spec["env"] = {name: text for name, text in spec["env"].items() if (name, text) not in env}
        if not spec["env"]:
            del spec["env"]
        if common:
            spec.pop("shell", None)
    common["env"] = dict(sorted(env))
    return {key: value for key, value in common.items() if value}


def _job_file(file, defaults, jobs):
    """The text of a job file of specs, each below its notes."""
    text = (f"# Made of the crontab {printable(file)}. The defaults are cron's own rules: runs of "
            "a job may overlap,\n# start in the home folder, and find programs in no more than "
            "cron's PATH. Cron mails what a job\n# prints; here it is in the log of its run. Cron "
            "forgets what was due while it was down; here the\n# newest slot of the last hour is "
            "caught up, unless catch_up is none.\n")
    text += job_to_yaml([], defaults)
    if jobs:
        text = text[:-len(" []\n")] + "\n"
    for spec, notes in jobs:
        text += "".join(f"  # {printable(note)}\n" for note in notes)
        text += job_to_yaml([Job(spec)]).partition("\n")[2]
    return text


# Variables and comments.

_SETTING = Pattern(r"""
    (?: '([^'=]*)' | "([^"=]*)" | ([^\s=#'"][^\s=]*) ) \s* = \s*
    (?: '([^']*)' \s* | "([^"]*)" \s* | ([^\s'"].*) )?""", "xa")
_HEADING = Pattern(r"m(?:in\w*)?\s+h", "i")     # of the columns


def _name_and_value(setting):
    """Name and value of a variable, as cron has quotes and blanks; no value is None."""
    name = next(text for text in setting.groups()[:3] if text is not None)
    value = next((text for text in setting.groups()[3:] if text is not None), None)
    value = value and value.rstrip()
    if value and len(value) > 1 and value[0] in "'\"" and value[-1] == value[0]:
        value = value[1:-1]                     # cron takes off a second pair, too
    return name, value


def _with_comment(comment, text):
    """The lines of a comment with one more; none if that is an entry, or heads their columns."""
    try:
        words, rest = _crontab_words(text)
        _crontab_schedule(words, [])
        return []
    except ValueError:
        if _HEADING.match(text):
            return []
    return [*comment, text if any(map(str.isalnum, text)) else ""]


# Entries.

_FIELD_BLANKS = Pattern(r"[ \t]+")
_NO_USER = Pattern(r"[^a-z_]|.+[^\w.$-]", "is")
_MACROS_OF_CRON = ("@reboot", "@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight",
                   "@hourly")


def _crontab_words(line):
    """The words of the schedule, which are five or a macro, and the rest of a line."""
    count = 1 if line.startswith("@") else 5
    words = _FIELD_BLANKS.split(line, count)
    if len(words) <= count or not words[count]:
        raise ValueError(f"cron wants {'a command' if count == 1 else 'five fields and a command'}")
    if count == 1 and words[0] not in _MACROS_OF_CRON:
        raise ValueError(f'cron knows no "{words[0]}"' + nearest(words[0], _MACROS_OF_CRON))
    return words[:count], words[count]


def _user_and_command(text):
    user, *command = _FIELD_BLANKS.split(text, 1)
    if _NO_USER.match(user):
        raise ValueError(f'"{user}" is no user; if this is the crontab of a user, it has none in '
                         "its lines (do without --system)")
    if not command or not command[0]:
        raise ValueError(f'"{user}" is read as the user, and there is no command')
    return user, command[0]


_COMMAND = Pattern(r"((?:[^\\%]|\\.|\\$)*)(?:%(.*))?", "s")


def _command_and_input(text, notes):
    """The command of an entry and its standard input, which begins at a % (or None)."""
    command, stdin = _COMMAND.fullmatch(text).groups()
    if not command.strip():
        raise ValueError("there is no command")
    if "\\\\" in command:
        notes.append("cron makes one backslash of two, and the job has it so")
    command = re.sub(r"\\([%\\])", r"\1", command)
    if not stdin:
        return command, None
    stdin = re.sub(r"\\?%", lambda found: "\n" if found[0] == "%" else "%", stdin)
    return command, stdin + "\n" * (stdin.rstrip("\\")[-1:] not in ("", "\n"))


_SHELL_PARTS = Pattern(r"[;|&{})]|(?<!\$)\(|\b(?:then|do|else)\b")
_BEFORE_PROGRAMS = ("nice ionice sudo env exec nohup time timeout chronic command ! sh bash python "
                    "python3 perl php").split()
_NO_PROGRAMS = ("cd test [ [[ if while for until fi done export set sleep umask ulimit . source "
                "true :").split()
_NOT_IN_JOB_IDS = Pattern(r"[^A-Za-z0-9._-]+")


def _job_id(command, taken):
    """An id that is not taken: the name of the program that a command is about."""
    names = filter(None, map(_program_of, _SHELL_PARTS.split(command)))
    name = next((name for name in names if valid_id(name)), "job")
    numbered = (f"{name[:58]}-{number}" for number in itertools.count(2))
    return name if name not in taken else next(text for text in numbered if text not in taken)


def _program_of(part):
    """The name of the program that a part of a command runs, as an id has it; empty for none."""
    words = part.split()
    while words and (words[0] in _BEFORE_PROGRAMS or "=" in words[0] or words[0][0] in "-0123456789"
                     or os.path.basename(words[0]) in _BEFORE_PROGRAMS):
        del words[0]
    if not words or words[0] in _NO_PROGRAMS:
        return ""
    return _NOT_IN_JOB_IDS.sub("-", os.path.basename(words[0])).strip("._-")[:64]


# Schedules. After an item of a field cron goes on behind a comma, else ignores the rest of the
# field. A range that runs backwards is empty, and a step may be larger than its range.

_CRONTAB_FIELDS = (
    ("minute", 0, 59, ()), ("hour", 0, 23, ()), ("day of month", 1, 31, ()),
    ("month", 1, 12, "jan feb mar apr may jun jul aug sep oct nov dec".split()),
    ("day of week", 0, 7, "sun mon tue wed thu fri sat".split()))
_CRONTAB_ITEM = Pattern(r"(?:\*|([a-z0-9]+)(?:-([a-z0-9]*))?)(?:/([a-z0-9]*))?", "ia")


def _crontab_schedule(words, notes):
    """The expression, as Cron reads it, of what cron makes of five fields or a macro."""
    if len(words) == 1:
        return words[0]
    fields = []
    for word, field in zip(words, _CRONTAB_FIELDS):
        try:
            fields.append(_crontab_field(word, field))
        except ValueError as error:
            raise ValueError(f'{field[0]}: cron refuses "{word}"{error}') from None
        if fields[-1] != word:
            notes.append(f'{field[0]}: cron reads "{word}" as {fields[-1] or "nothing"}, '
                         "and so does the job")
    _replace_no_days(fields)
    if not all(fields):
        raise ValueError(f'"{" ".join(words)}" never fires')
    if "*" in (words[0][0], words[1][0]) and fields[0][0] != "*" != fields[1][0]:
        notes.append("at a change of clocks, cron treats it as a job with * in its first fields; "
                     "here its times are fixed")
    if _comes_more_than_once_after_a_gap(fields):
        notes.append("where a change of clocks skips several of its times, it runs once right "
                     "after the gap; Debian's cron runs it for each of them")
    return " ".join(fields)


def _replace_no_days(fields):
    """Of two restricted day fields, of which either counts, let one without days be none."""
    for empty, other in ((2, 4), (4, 2)):
        if not fields[empty] and fields[other] and fields[other][0] != "*":
            fields[empty] = "*"


def _comes_more_than_once_after_a_gap(fields):
    """Whether fixed times lie within an hour of each other at the time of day of most gaps."""
    if "*" in (fields[0][0], fields[1][0]):
        return False
    daily = Cron(f"{fields[0]} {fields[1]} * * *")
    times = list(daily.slots(0, 4 * 3600, fixed_zone("UTC")))
    return any(later - time <= 3600 for time, later in zip(times, times[1:]))


def _crontab_field(word, field):
    """A field as Cron reads it; empty if it has no values. Raises ValueError if cron refuses it."""
    items, at = [], 0
    while True:
        found = _CRONTAB_ITEM.match(word, at)
        if not found:
            raise ValueError("" if word.isascii() else ", which is not ASCII")
        star = found[1] is None and (at == 0 or any(items))     # only a first * counts as one
        items.append(_crontab_item(*found.groups(), field, star))
        at = found.end()
        if word[at:at + 1] != ",":
            return ",".join(filter(None, items))
        at += 1


def _crontab_item(first, last, step, field, star):
    """An item of a field as Cron reads it: `first`-`last`/`step`; without `first` it is a `*`."""
    name, low, high, _ = field
    begin = low if first is None else _crontab_number(first, field)
    end = high if first is None else begin if last is None else _crontab_number(last, field)
    text = "*" if star else f"{low}-{high}" if first is None else _short(first)
    text += f"-{_short(last)}" if last is not None else ""
    if begin > end:
        return ""
    if step is None:
        return text
    if first is not None and last is None:
        raise ValueError(f", a step needs a range or *; write {first}-{high}/{step}")
    if not step.isdigit() or int(step) == 0:
        raise ValueError("")
    if int(step) <= high:
        return f"{text}/{_short(step)}"
    # Only its first value is left; where a * in front counts, the largest step says so as well.
    return f"*/{high}" if star and name not in ("minute", "hour") else str(begin)


def _crontab_number(token, field):
    _, low, high, names = field
    if token.lower() in names:
        return low + names.index(token.lower())
    if not token.isdigit() or not low <= int(token) <= high:
        raise ValueError("")
    return int(token)


def _short(token):
    """A number in the two digits that Cron reads at most."""
    return str(int(token)) if token.isdigit() and len(token) > 2 else token


# ==== 6 policy (pure) =============================================================================
# What is to be done, decided from what is known and the instant that is passed in: which slots are
# due and what becomes of them, who gets a place, whether a failed attempt is tried again, and which
# states a run can take. It guarantees nothing but its answers; others carry them out.

STATES = {                              # a state -> the states that may follow it
    "queued": ("running", "skipped", "cancelled", "failed", "lost"),
    "running": ("succeeded", "failed", "timed_out", "cancelled", "lost", "skipped"),
    "succeeded": (), "failed": (), "timed_out": (), "cancelled": (), "lost": (), "skipped": ()}
FINAL_STATES = tuple(state for state, following in STATES.items() if not following)
ACTIVE_STATES = ("queued", "running")
REASONS = {                             # a state -> its reasons; nothing else is ever written
    "skipped": ("overlap", "window", "paused", "missed", "condition", "capacity", "dependency"),
    "failed": ("exit", "signal", "output", "start", "pre_run", "condition", "memory", "outputs",
               "secret"),
    "timed_out": ("timeout", "total_timeout"),
    "cancelled": ("user", "replaced", "shutdown", "fail_fast", "parent"),
    "lost": ("supervisor", "power")}

TRIGGERS = ("schedule", "catch_up", "manual", "api", "retry", "pipeline")

ON_TIME = 60            # seconds; a slot seen no later than this is simply started
MOST_CAUGHT_UP = 1000   # slots of one job
MOST_QUEUED = 10_000    # runs
MOST_COUNTED = 10_000   # slots of one row; beyond that the row says "more than"


# Slots.

def jitter_delay(job_id, slot, jitter):
    """Seconds by which the start of a slot is delayed: the same on each host and at each try."""
    if not jitter:
        return 0
    return binascii.crc32(f"{job_id} {slot}".encode()) % max(int(jitter), 1)


def delayed(job, slot):
    """The instant at which a slot of a job is to start."""
    return slot + jitter_delay(job.id, slot, job.jitter)


def next_slot(job, after, zone):
    """The least slot > `after` (UTC seconds) of all schedules of a job, or None.

    `zone` is the tzinfo for a job that names none. Neither the window nor `enabled` counts here.
    """
    zone = job.zone(zone)
    slots = [cron.next_slot(math.floor(after), zone) for cron in job.crons() if not cron.reboot]
    return min((slot for slot in slots if slot is not None), default=None)


def upcoming_slots(job, after, zone):
    """The slots > `after` that will start a run: those in the window of a job that is enabled."""
    if not job.enabled:
        return
    start, end = job.window_instants(zone)
    if start is not None:
        after = max(after, start - 1)
    slot = next_slot(job, after, zone)
    while slot is not None and (end is None or slot <= end):
        if start is None or slot >= start:
            yield slot
        slot = next_slot(job, slot, zone)


def next_run(job, now, zone, paused=0, position=None):
    """When a job starts next: its next slot and the jitter of that; None if it will not.

    `paused` is the instant until which it is paused, infinity for one that has to be resumed. With
    the job's `position` a slot counts that has passed and is still delayed by its jitter.
    """
    after = now if position is None else max(position, now - job.jitter)
    after = max(after, paused - 1)
    for slot in () if paused == math.inf else upcoming_slots(job, after, zone):
        start = delayed(job, slot)
        if slot > now or start > now:
            return start
    return None


class SlotRow(Value):
    """What becomes of a slot, or of `count` consecutive ones from `slot` to `last_slot`.

    `reason` is None for one that is to run, with `trigger` "schedule" or "catch_up".
    """
    __slots__ = ("slot", "last_slot", "count", "trigger", "reason", "message")


def decide_slots(job, position, now, zone, paused=0):
    """What becomes of the slots of a job that are due -> ([SlotRow], the new position).

    `position` is where an earlier decision ended (UTC seconds): no slot at or before it is
    considered; `paused` is the instant until which the job is paused. Slots are decided in order:
    one delayed by jitter holds up later ones, which are late only from then on.
    """
    if not job.enabled:
        return [], max(position, now)
    rows, position = _pass_over(job, position, _too_old(job, position, now, zone), zone, paused)
    window, fates, due = job.window_instants(zone), {}, -math.inf
    slot = next_slot(job, position, zone)
    while slot is not None:
        due = max(due, delayed(job, slot))
        if due > now:
            break
        position, fates[slot] = slot, _fate(job, slot, now - due, window, paused)
        slot = next_slot(job, slot, zone)
    _catch_up(job, fates)
    for slot, fate in fates.items():
        _add_row(rows, slot, fate)
    return rows, position


def _fate(job, slot, lateness, window, paused):
    """The trigger with which a slot that is due starts, or the reason for which it does not."""
    if slot < paused:
        return "paused"
    if _is_outside(slot, window):
        return "window"
    if lateness <= ON_TIME:
        return "schedule"
    return "catch_up" if lateness <= job.catch_up_window else "missed"


def _is_outside(slot, window):
    start, end = window
    return start is not None and slot < start or end is not None and slot > end


def _catch_up(job, fates):
    """Let those slots be missed that `catch_up` gives up.

    Under `latest` a slot that is on time is the latest: none is caught up beside it.
    """
    keep = {"all": MOST_CAUGHT_UP, "latest": 0 if "schedule" in fates.values() else 1,
            "none": 0}[job.catch_up]
    late = [slot for slot, fate in fates.items() if fate == "catch_up"]
    for slot in late[:max(len(late) - keep, 0)]:
        fates[slot] = "missed"


def _add_row(rows, slot, fate):
    """Add a slot to the last row if that is skipped for the same reason, else a row."""
    if fate in ("schedule", "catch_up"):
        rows.append(SlotRow(slot=slot, last_slot=slot, count=1, trigger=fate))
    elif rows and rows[-1].reason == fate:
        rows[-1] = SlotRow(slot=rows[-1].slot, last_slot=slot, count=rows[-1].count + 1,
                           trigger="schedule", reason=fate, message=rows[-1].message)
    else:
        rows.append(SlotRow(slot=slot, last_slot=slot, count=1, trigger="schedule", reason=fate))


def _too_old(job, position, now, zone):
    """The instant before which no slot can be caught up, nor need be looked at by itself."""
    oldest = now - max(job.catch_up_window, ON_TIME) - job.jitter
    begin = max(oldest, position)
    if now - begin <= MOST_COUNTED:
        return oldest
    slot = now
    for _ in range(MOST_COUNTED):
        slot = last_slot(job, slot, zone)
        if slot is None or slot <= begin:
            return oldest
    return slot


def _pass_over(job, position, before, zone, paused):
    """The rows of the slots > `position` and < `before`, however many, and the new position."""
    start, end = job.window_instants(zone)
    spans = ((paused, "paused"), (-math.inf if start is None else start, "window"),
             (math.inf if end is None else math.floor(end) + 1, "missed"), (math.inf, "window"))
    rows = []
    for until, reason in spans:
        until = min(until, before)
        first = next_slot(job, position, zone) if position < until else None
        if first is not None and first < until:
            rows.append(_row_of_many(job, first, until, zone, reason))
            position = rows[-1].last_slot
        if until == before:
            break
    return rows, position


def _row_of_many(job, first, until, zone, reason):
    """The row of the slots from `first` on and < `until`; they are counted up to a bound."""
    for count, slot in enumerate(iter_slots(job, first, until, zone), 1):
        if count == MOST_COUNTED:
            break
    last = last_slot(job, until, zone)
    return SlotRow(slot=first, last_slot=last, count=count, trigger="schedule", reason=reason,
                   message=None if last == slot else f"more than {count} slots")


def iter_slots(job, start, end, zone):
    """The slots of a job in order, start <= slot < end (UTC seconds)."""
    slot = next_slot(job, start - 1, zone)
    while slot is not None and slot < end:
        yield slot
        slot = next_slot(job, slot, zone)


def last_slot(job, before, zone):
    """The greatest slot < `before`, or None."""
    zone = job.zone(zone)
    slots = [cron.previous_slot(math.ceil(before), zone) for cron in job.crons()
             if not cron.reboot]
    return max((slot for slot in slots if slot is not None), default=None)


# Places.

def overlap_action(job, trigger, active, wait=False):
    """What a start that comes due does where the job has `active` runs: an action and a run.

    `active` are rows of the job's queued and running runs, oldest first. Actions: `start` (or wait
    for a global place), `queue` (behind them), `skip` (for a person: refuse), `replace` the run.
    """
    running = [run for run in active if run["state"] == "running"]
    waiting = [run for run in active if run["state"] == "queued"]
    beyond = waiting[max(0, job.max_concurrent - len(running)):]       # the free places
    if not job.max_concurrent or len(active) < job.max_concurrent or trigger == "catch_up":
        return "start", None
    manual = trigger in ("manual", "api", "retry")
    if job.overlap == "replace":
        return "replace", (waiting or running)[0]
    if job.overlap == "queue" or (manual and wait):
        scheduled = [run for run in beyond if run["slot"] is not None]
        return ("skip", scheduled[0]) if scheduled and not manual else ("queue", None)
    return "skip", (running or waiting)[0]


def admit(queued, running, limits, max_concurrent, paused=(), apart=0):
    """Which of the queued runs get a place now, in the order in which they start.

    `queued` are rows in order of their insertion, `running` is {job id: number of running runs},
    `limits` {job id: max_concurrent}, 0 or None is no limit; `paused` job ids keep theirs waiting.
    A run that a step of a pipeline waits for takes no global place, as `apart` of those running do.
    """
    counts, free = dict(running), math.inf
    if max_concurrent:
        free = max_concurrent - sum(counts.values()) + apart
    admitted = []
    for run in sorted(queued, key=_start_order):
        if free < 1 and run["parent"] is None:
            continue
        job_id, limit = run["job_id"], limits.get(run["job_id"])
        if run["trigger"] == "catch_up":
            limit = 1                   # they wait for one another, whatever the job's limit
        if job_id in paused and run["slot"] is not None:
            continue
        if limit and counts.get(job_id, 0) >= limit:
            continue
        counts[job_id] = counts.get(job_id, 0) + 1
        free -= run["parent"] is None
        admitted.append(run)
    return admitted


def _start_order(run):
    """By priority, then slot (a start by hand counts from when it was asked for), then job."""
    instant = run["queued_at"] if run["slot"] is None else run["slot"]
    return -run["priority"], instant, run["job_id"], run["seq"]


# What is to come.

class Foreseen(Value):
    """A slot that is to come: of a `job`, the `slot`, the `start` that jitter makes of it, what
    that does then (an `action` of `overlap_action`), and as `meets` the slot of the run of the job
    that is still on, or None."""
    __slots__ = ("job", "slot", "start", "action", "meets")


def foresee(jobs, start, end, zone, durations, max_concurrent=None):
    """[Foreseen] of the slots of jobs, start <= slot < end, in order, if nothing comes between.

    The scheduler's own decisions, on a clock that goes from one event to the next. `durations` is
    {job id: seconds}, the runs of other jobs are over at once; `max_concurrent` is for all jobs.
    """
    rehearsal, due, foreseen = _Rehearsal(jobs, durations, max_concurrent), [], []
    positions = [math.ceil(start) - 1] * len(jobs)
    for index, job in enumerate(jobs):
        _look_ahead(due, index, job, positions[index], end, zone)
    while due:
        now = due[0][0]
        rehearsal.go_on(now)
        while due and due[0][0] == now:
            index = heapq.heappop(due)[1]
            job = jobs[index]
            rows, positions[index] = decide_slots(job, positions[index], now, zone)
            foreseen += [rehearsal.start(job, row, now) for row in rows
                         if row.reason is None and row.slot < end]
            _look_ahead(due, index, job, positions[index], end, zone)
        rehearsal.admit(now)
    return sorted(foreseen, key=lambda item: (item.slot, item.job.id))


def _look_ahead(due, index, job, position, end, zone):
    """Add to the heap when a job has to be decided next."""
    slot = next_slot(job, position, zone) if job.enabled else None
    if slot is not None and slot < end:
        heapq.heappush(due, (delayed(job, slot), index))


class _Rehearsal:
    """Runs that take places and time, and do nothing."""

    def __init__(self, jobs, durations, max_concurrent):
        self.durations, self.max_concurrent = durations, max_concurrent
        self.limits = {job.id: job.max_concurrent for job in jobs}
        self.active = {job.id: [] for job in jobs}          # their rows, oldest first
        self.queued, self.running = [], dict.fromkeys(self.active, 0)
        self.ends, self.seq = [], 0                         # a heap of (instant, seq, row)

    def go_on(self, now):
        """Let runs end until `now`; their places are taken at once by those that wait."""
        while self.ends and self.ends[0][0] <= now:
            instant, _, row = heapq.heappop(self.ends)
            if row in self.active[row["job_id"]]:           # it was not replaced
                self._end(row)
                self.admit(instant)

    def start(self, job, slot_row, now):
        """Ask for a run for a slot -> its Foreseen."""
        active = self.active[job.id]
        met = min(active, key=lambda row: row["state"] != "running", default=None)
        action, other = overlap_action(job, slot_row.trigger, active)
        if action == "replace":
            self._end(other)
        if action != "skip":
            self.seq += 1
            row = {"job_id": job.id, "slot": slot_row.slot, "trigger": slot_row.trigger,
                   "state": "queued", "queued_at": now, "priority": job.priority, "seq": self.seq,
                   "parent": None}
            active.append(row)
            self.queued.append(row)
        return Foreseen(job=job, slot=slot_row.slot, start=now, action=action,
                        meets=met and met["slot"])

    def admit(self, now):
        """Let runs that are queued take the places that are free."""
        for row in self.queued and admit(self.queued, self.running, self.limits,
                                         self.max_concurrent):
            self.queued.remove(row)
            row["state"] = "running"
            self.running[row["job_id"]] += 1
            end = now + self.durations.get(row["job_id"], 0)
            heapq.heappush(self.ends, (end, row["seq"], row))

    def _end(self, row):
        self.active[row["job_id"]].remove(row)
        if row["state"] == "queued":
            self.queued.remove(row)
        else:
            self.running[row["job_id"]] -= 1


def busiest_minutes(foreseen, most=5):
    """[(minute, how many start)] of the minutes in which several slots start, the worst first."""
    counts = collections.Counter(int(item.start) // 60 * 60 for item in foreseen)
    worst = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [(minute, count) for minute, count in worst[:most] if count > 1]

# Attempts.

class Ended(Value):
    """How a command ended. `timeout` is "timeout" or "total_timeout" where one passed; `lost` is
    true if nobody saw the end, `memory` where it exceeded its limit, `outputs` where what it hands
    on is not as it has to be; `error` says in words why it could not be started, or what is wrong;
    `matched` are the patterns of PATTERNS that its output has matched."""
    __slots__ = ("exit_code", "signal", "timeout", "lost", "memory", "outputs", "error", "matched")


PATTERNS = ("success.output", "success.no_output", "retry_on.output")


def patterns_of(job):
    """{name of PATTERNS: regular expression} of what a job wants to know of its output."""
    values = {"success.output": job.success.output, "success.no_output": job.success.no_output,
              "retry_on.output": job.retry_on and job.retry_on.output}
    return {name: text for name, text in values.items() if text}


def outcome(job, ended):
    """(state, reason) of an attempt; a reason is None where the state says it all."""
    if ended.lost:
        return "lost", "supervisor"
    if ended.timeout:
        return "timed_out", ended.timeout
    if ended.memory:
        return "failed", "memory"
    if ended.signal:
        return "failed", "signal"
    if ended.outputs:
        return "failed", "outputs"
    if ended.error is not None or ended.exit_code not in job.success.exit_codes:
        return "failed", "start" if ended.exit_code in (126, 127) else "exit"
    matched = ended.matched or ()
    wanted = not job.success.output or "success.output" in matched
    return ("succeeded", None) if wanted and "success.no_output" not in matched \
        else ("failed", "output")


def reason_beside(reason):
    """`, reason=memory` where neither a signal nor an exit status tells it, else an empty text."""
    return f", reason={reason}" if reason in ("memory", "output", "outputs") else ""


def retry_delay(job, ended, number, chance=0.5):
    """Seconds until the next attempt after attempt `number` (from 1), or None to give up.

    `chance` is a random number from 0 to 1, for the jitter of the backoff.
    """
    state, reason = outcome(job, ended)
    if state == "succeeded" or reason == "total_timeout":
        return None
    if state == "lost":
        again = job.if_lost == "rerun" and number <= max(job.retries, 1)
    else:
        again = number <= job.retries and _is_retried(job.retry_on, ended)
    return backoff_delay(job.backoff, number, chance) if again else None


def _is_retried(retry_on, ended):
    if retry_on is None:
        return True
    if "retry_on.output" in (ended.matched or ()):
        return True
    if ended.timeout:
        return bool(retry_on.timeout)
    if ended.signal or ended.memory:
        return bool(retry_on.signal)
    return ended.exit_code in (retry_on.exit_codes or ())


def backoff_delay(backoff, number, chance=0.5):
    """Seconds to wait after attempt `number` (from 1); `jitter` is the part of it by which it may
    be shorter or longer."""
    longest = LONGEST if backoff.max is None else backoff.max
    try:
        delay = backoff.delay * backoff.factor ** (number - 1)
        return min(delay * (1 + (backoff.jitter or 0) * (2 * chance - 1)), longest)
    except OverflowError:
        return longest if backoff.delay else 0


# Steps of pipelines.

_SATISFYING = {"succeeded": ("succeeded",), "failed": ("failed", "timed_out", "lost"),
               "finished": FINAL_STATES}


class StepOrder:
    """Which steps of a pipeline are ready, as others end.

    `wanted` is {step: {step that it depends on: succeeded, failed or finished}} in the order of
    the file; `states` are the final ones so far. Each step costs its dependencies once.
    """

    def __init__(self, wanted):
        self.wanted, self.states = wanted, {}
        self._open = {step: len(needs) for step, needs in wanted.items()}
        self._dependents = {step: [] for step in wanted}
        for step, needs in wanted.items():
            for need in needs:
                self._dependents[need].append(step)
        self._places = {step: place for place, step in enumerate(wanted)}
        self._steps = list(wanted)
        self._ready = [place for step, place in self._places.items() if not wanted[step]]

    @property
    def is_over(self):
        """Whether each step has ended."""
        return len(self.states) == len(self.wanted)

    def take(self):
        """The first step, in the order of the file, that is ready and was not taken; or None."""
        while self._ready:
            step = self._steps[heapq.heappop(self._ready)]
            if step not in self.states:
                return step
        return None

    def end(self, step, state):
        """Note that a step has ended -> the steps that can no longer become ready, in the order in
        which that is known: these are skipped now, and have ended too."""
        skipped, ended = [], [(step, state)]
        while ended:
            step, state = ended.pop()
            if step in self.states:
                continue
            self.states[step] = state
            for other in self._dependents[step]:
                if other in self.states:
                    continue
                if state not in _SATISFYING[self.wanted[other][step]]:
                    skipped.append(other)
                    ended.append((other, "skipped"))
                self._open[other] -= 1
                if not self._open[other]:
                    heapq.heappush(self._ready, self._places[other])
        return list(dict.fromkeys(skipped))

    def dependents(self, steps):
        """{step} of these and all that depend on them, directly or not."""
        found, ahead = set(), list(steps)
        while ahead:
            step = ahead.pop()
            if step not in found:
                found.add(step)
                ahead += self._dependents[step]
        return found

    def needs(self, step):
        """{step} of those that a step depends on, directly or not."""
        found, ahead = set(), list(self.wanted[step])
        while ahead:
            need = ahead.pop()
            if need not in found:
                found.add(need)
                ahead += self.wanted[need]
        return found


def survives_failure(needs):
    """Whether a step with these dependencies also runs under `fail_fast`: it waits for more than
    success."""
    return any(wanted != "succeeded" for wanted in needs.values())


def steps_to_repeat(order, ends, first=None):
    """{step} that a retry repeats: those that did not succeed, and what depends on them; with
    `first` that one too. `ends` is {step: (state, reason)} of an earlier run; one that its own
    condition has skipped needs no other try."""
    good = {step for step, end in ends.items()
            if end[0] == "succeeded" or end == ("skipped", "condition")}
    again = [step for step in order.wanted if step not in good or step == first]
    return order.dependents(again)


# Why.

class Known(Value):
    """What is known of a job at an instant, to say why it runs or does not.

    `versions` are (since, Job), oldest first, the last of them the job as it is; `active` the rows
    of all queued and running runs, oldest first, those of the job with `retry_at` and `attempt`;
    `limits` {job id: max_concurrent} of those that are queued, `max_concurrent` that of all, `held`
    the ids of paused jobs with queued runs; `server` is whether one is there; `paused` the instant
    until which the job is paused, `paused_since` the first slot that was skipped for that; `zone`
    as in `next_slot`.
    """
    __slots__ = ("now", "zone", "versions", "paused", "paused_since", "position", "active",
                 "limits", "max_concurrent", "held", "server")

    @property
    def job(self):
        """The Job as it is."""
        return self.versions[-1][1]


class Met(Value):
    """What the store has about an instant: the `row` of the run of a slot at or before it, rows of
    `others` that were on then, and when, before it, a server has decided something (`alive`)."""
    __slots__ = ("row", "others", "alive")


def explain(known, instant=None, met=None):
    """Why a job has not run, or will not, at an instant (UTC seconds), or now: what there is to say
    in order, as [{"reason": …, what the reason is about}] (render has the sentences)."""
    if instant is None:
        return _explain_now(known)
    version = max((number for number, (since, _) in enumerate(known.versions) if since < instant),
                  default=None)
    if version is None:
        return [{"reason": "unregistered", "since": known.versions[0][0],
                 "next": next(upcoming_slots(known.job, known.now, known.zone), None)}]
    job = known.versions[version][1]
    due = _is_slot(job, instant, known.zone)
    row = met and met.row
    if row and (row["slot"] == instant or due and (row["last_slot"] or 0) >= instant):
        return [_why_recorded(known, job, instant, met)]
    later = known.versions[version + 1:]
    if not due:
        return [_why_not_due(known, job, instant, later)]
    if not job.enabled:
        since = _since_when(known.versions[:version + 1], "enabled")
        return [{"reason": "disabled", "since": since,
                 "until": next((since for since, other in later if other.enabled), None)}]
    if instant > known.now:
        return _explain_later(known, job, instant)
    return [_why_no_row(known, job, instant, later)]


def local_instants(text, zone):
    """([second], whether it is in a gap) of an instant as text, without an offset a local time: two
    of one that comes twice; of one that a gap jumps over the first after it. Raises ValueError."""
    first, written = (math.floor(parse_instant(text, place))
                      for place in (zone, datetime.timezone.utc))
    if first == written == math.floor(parse_instant(text, fixed_zone("+01:00"))):
        return [first], False
    nominal = datetime.datetime.fromtimestamp(written, datetime.timezone.utc)
    second = math.floor(nominal.replace(tzinfo=zone, fold=1).timestamp())
    if first <= second:
        return sorted({first, second}), False
    before, after = second, first
    offset = datetime.datetime.fromtimestamp(before, zone).utcoffset()
    while after - before > 1:
        middle = (before + after) // 2
        if datetime.datetime.fromtimestamp(middle, zone).utcoffset() == offset:
            before = middle
        else:
            after = middle
    return [after], True


def is_moved(job, slot, zone):
    """Whether a slot stands for times that a gap has jumped over."""
    zone = job.zone(zone)
    return any(not cron.reboot and cron.moved(slot, cron.zone or zone) for cron in job.crons())


def _is_slot(job, instant, zone):
    return instant == next_slot(job, instant - 1, zone)


def _since_when(versions, *names):
    """Since when the last version's attributes are what they are."""
    since, job = versions[-1]
    for earlier, other in reversed(versions):
        if any(getattr(job, name) != getattr(other, name) for name in names):
            break
        since = earlier
    return since


def _explain_now(known):
    own = [run for run in known.active if run["job_id"] == known.job.id]
    said = [_why_active(known, run) for run in own]
    stopped = _why_stopped(known)
    if stopped is not None:
        return [*said, stopped]
    if not known.server:
        said.append({"reason": "no_server"})
    late = [slot for slot in (next_slot(known.job, known.position, known.zone),)
            if slot is not None and slot <= known.now]
    if late and known.server:
        said.append(_why_undecided(known, known.job, late[0]))
    return said or [_why_not_due(known, known.job, known.now, ())]


def _why_stopped(known):
    """What keeps a job from having slots that start, or None."""
    job, (start, end) = known.job, known.job.window_instants(known.zone)
    if not job.schedule:
        return {"reason": "manual"}
    if not job.enabled:
        return {"reason": "disabled", "since": _since_when(known.versions, "enabled")}
    if known.paused > known.now:
        return {"reason": "paused", **_pause_of(known)}
    if all(cron.reboot for cron in job.crons()):
        return {"reason": "reboot"}
    if start is not None and known.now < start or end is not None and known.now > end:
        return {"reason": "window", "start": start, "end": end}
    return None


def _pause_of(known):
    return {"since": known.paused_since,
            "until": None if known.paused == math.inf else known.paused}


def _why_active(known, run):
    if run["state"] == "queued":
        return _why_queued(known, run)
    if run.get("retry_at") is not None:
        return {"reason": "retry", "run": run["id"], "attempt": run["attempt"] + 1,
                "until": run["retry_at"]}
    number = run.get("attempt") or 1
    return {"reason": "running", "run": run["id"], "since": run["started_at"],
            "attempt": number if number > 1 else None}


def _why_queued(known, run):
    """What a queued run waits for; the order is that of `admit`."""
    said = {"reason": "queued", "run": run["id"], "since": run["queued_at"]}
    if run["job_id"] in known.held and run["slot"] is not None:
        return {**said, "reason": "queued_paused"}
    running = [other for other in known.active if other["state"] == "running"]
    queued = [other for other in known.active if other["state"] == "queued"]
    counts = collections.Counter(other["job_id"] for other in running)
    ahead = [other for other in admit(queued, counts, known.limits, None, known.held)
             if _start_order(other) < _start_order(run)]
    limit = 1 if run["trigger"] == "catch_up" else known.limits.get(run["job_id"])
    same = [other["id"] for other in running + ahead if other["job_id"] == run["job_id"]]
    if limit and len(same) >= limit:
        reason = "queued_catch_up" if run["trigger"] == "catch_up" else "queued_job"
        return {**said, "reason": reason, "behind": same, "limit": limit}
    if known.max_concurrent and len(running) + len(ahead) >= known.max_concurrent:
        return {**said, "reason": "queued_all", "limit": known.max_concurrent,
                "behind": [other["id"] for other in running + ahead]}
    if run["owner"]:
        return {**said, "reason": "queued_owner"}
    return said if known.server else {**said, "reason": "queued_no_server"}


def _why_recorded(known, job, instant, met):
    row = met.row
    active = next((run for run in known.active if run["id"] == row["id"]), None)
    if active is not None:
        return _why_active(known, active)
    if row["state"] != "skipped":
        late = (row["started_at"] or instant) - delayed(job, instant)
        return {"reason": "ran", "run": row["id"], "state": row["state"], "detail": row["reason"],
                "since": row["started_at"], "until": row["finished_at"],
                "late": late if late > ON_TIME else None, "message": row["message"]}
    said = {"reason": row["reason"], "run": row["id"], "message": row["message"]}
    if row["reason"] == "missed":
        return {**said, **_why_missed(job, instant, row, met.alive)}
    if row["reason"] == "overlap":
        return {**said, "overlap": job.overlap, "others": [
            {name: run[name] for name in ("id", "state", "started_at", "finished_at")}
            for run in met.others if run["id"] != row["id"]]}
    if row["reason"] == "paused":
        return {**said, "reason": "paused_then", "since": row["slot"], "until": row["last_slot"]}
    if row["reason"] == "window":
        return {**said, **dict(zip(("start", "end"), job.window_instants(known.zone)))}
    return said


def _why_missed(job, slot, row, alive):
    """Since when no server was there, as far as one can know, and why it was not caught up."""
    seen = row["queued_at"] if slot <= row["queued_at"] else row["finished_at"]    # it has grown
    late = seen - slot
    why = ("none" if job.catch_up == "none" else
           "window" if late > job.catch_up_window else "newer")
    return {"why": why, "late": late, "seen": seen, "window": job.catch_up_window,
            "alive": alive if seen == row["queued_at"] else None}


def _why_not_due(known, job, instant, later):
    """No slot of the schedule that held at an instant, perhaps one of a schedule of later."""
    for number, (since, other) in enumerate(later):
        if _is_slot(other, instant, known.zone) and not _is_slot(job, instant, known.zone):
            return {"reason": "rescheduled", "since": since, "schedule": list(job.schedule),
                    "to": list(other.schedule)}
    if not job.schedule:
        return {"reason": "manual"}
    return {"reason": "not_due", "schedule": list(job.schedule),
            "last": last_slot(job, instant, known.zone),
            "next": next_slot(job, instant, known.zone)}


def _explain_later(known, job, slot):
    """What is going to become of a slot, as things are."""
    window = job.window_instants(known.zone)
    if slot < known.paused:
        return [{"reason": "will_be_paused", **_pause_of(known)}]
    if _is_outside(slot, window):
        return [{"reason": "window", "start": window[0], "end": window[1]}]
    said = [{"reason": "due", "next": delayed(job, slot)}]
    return said if known.server else [*said, {"reason": "no_server"}]


def _why_no_row(known, job, slot, later):
    """Why there is no row about a slot that has passed."""
    if slot > known.position:
        return _why_undecided(known, job, slot)
    for since, other in later:
        if any(getattr(job, name) != getattr(other, name)
               for name in ("schedule", "timezone", "enabled")):
            return {"reason": "undecided", "since": since}
    return {"reason": "unrecorded"}


def _why_undecided(known, job, slot):
    start = delayed(job, slot)
    if start > known.now:
        return {"reason": "jitter", "until": start}
    if known.server:
        return {"reason": "overdue", "since": start}
    return {"reason": "no_server_then", "since": start, "catch_up": job.catch_up,
            "window": None if job.catch_up == "none" else job.catch_up_window}


# Who may do what.

# Variables that say which programs are run, and how they are loaded.
LOADERS = Pattern(r"(?:LD_|DYLD_|BASH_|PYTHON|PERL5|RUBY|LUA_|NODE_|JAVA_|JDK_|GCONV_|GIT_).*|PATH|"
                  r"ENV|IFS|PS4|SHELLOPTS|BASHOPTS|CLASSPATH|CDPATH")


def refused_variables(job, names, may_define):
    """Those of some variables that a caller may not give to a run of a Job: who may not define jobs
    only gives those that it declares, and of what says how programs are loaded only its params:
    what it sets for itself in `env` would let them run any other. Nobody else gives these either
    where the job does not declare them."""
    refused = []
    for name in names:
        loads, declared = LOADERS.fullmatch(name), name in job.env
        if name not in job.params and (
                loads and not (may_define and declared) or not (may_define or declared)):
            refused.append(name)
    return refused


SCOPES = ("job:read", "job:write", "job:pause", "run:list", "run:create", "run:cancel", "log:read",
          "token:admin", "metrics:read")
ROLES = {                               # a name -> the scopes that it stands for
    "viewer": ("job:read", "run:list", "log:read"),
    "operator": ("job:read", "run:list", "log:read", "run:create", "run:cancel", "job:pause"),
    "admin": ("*",)}
_OF_ALL_JOBS = ("token:admin", "metrics:read")      # nobody has these for some jobs only


class Caller(Value):
    """Who asks for something: `name`, as audit rows have it (`user root`, `token ci-token`), the
    `scopes` (`*` is all), the `pattern` of the ids of jobs that it is about (`*` and `?` as in a
    shell; None: all), and whether it is the `owner`, who may do everything."""
    __slots__ = ("name", "scopes", "pattern", "owner")

    def may(self, scope):
        """Whether it has a scope, for the jobs that it sees."""
        if self.pattern is not None and scope in _OF_ALL_JOBS:
            return False
        return bool(self.owner or "*" in self.scopes or scope in self.scopes)

    def sees(self, job_id):
        """Whether a job, and with it its runs and logs, is one of those that it is about."""
        if self.pattern is None:
            return True
        wanted = re.escape(self.pattern).replace(r"\*", ".*").replace(r"\?", ".")
        return re.fullmatch(wanted, job_id) is not None


_JOB_PATTERN = Pattern(r"[A-Za-z0-9._*?-]{1,64}", "a")


def token_of(spec, creator, now, zone):
    """What a new token is to be: {name, scopes, pattern, expires_at (UTC seconds, None: never)}.

    `spec` may have `name`, `scopes` (a list), `role`, `jobs` (a pattern) and `expires` (a duration,
    or an instant, without offset in `zone`). Raises ValueError, also for what the creator, a
    Caller, does not have: nobody gives away more.
    """
    name, pattern = spec.get("name"), spec.get("jobs")
    if not isinstance(name, str) or not valid_id(name):
        raise ValueError(f'name: "{printable(str(name or ""))}" cannot be the name of a token; one '
                         "has letters, digits and ._- and begins with a letter or digit")
    if pattern is not None and not (isinstance(pattern, str) and _JOB_PATTERN.fullmatch(pattern)):
        raise ValueError(f'jobs: "{printable(str(pattern))}" is no pattern of job ids; write for '
                         "example deploy*")
    scopes = _token_scopes(spec)
    missing = scope_to_give(creator, scopes, pattern)
    if missing:
        raise ValueError(f"scopes: {missing} is not for you to give, since you do not have it")
    if pattern is not None and set(scopes) & set(_OF_ALL_JOBS):
        raise ValueError(f"scopes: {' and '.join(_OF_ALL_JOBS)} are about all jobs; a token for "
                         f"{pattern} cannot have them")
    return {"name": name, "scopes": scopes, "pattern": pattern,
            "expires_at": _expiry(spec.get("expires"), now, zone)}


def _token_scopes(spec):
    """The scopes that a list and a role make, in order; raises ValueError."""
    words, role = spec.get("scopes") or [], spec.get("role")
    if role is not None and not (isinstance(role, str) and role in ROLES):
        raise ValueError(f'role: "{printable(str(role))}" is none; there are {", ".join(ROLES)}')
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError("scopes: write a list of texts")
    for word in words:
        if word != "*" and word not in SCOPES:
            raise ValueError(f'scopes: there is no scope "{printable(word)}"'
                             + (nearest(word, SCOPES) or f'; there are {", ".join(SCOPES)}, *'))
    wanted = {*words, *ROLES.get(role, ())}
    if not wanted:
        raise ValueError("scopes: write what the token may do: scopes, or a role "
                         f"({', '.join(ROLES)})")
    return ["*"] if "*" in wanted else [scope for scope in SCOPES if scope in wanted]


def scope_to_give(creator, scopes, pattern):
    """A scope that a token with these would have, but not its creator (a Caller), or None."""
    token = Caller(scopes=scopes, pattern=pattern)
    return next((scope for scope in SCOPES if token.may(scope) and not creator.may(scope)), None)


def _expiry(text, now, zone):
    if text is None:
        return None
    try:
        instant = now + parse_duration(text)
    except ValueError:
        try:
            instant = parse_instant(str(text), zone)
        except ValueError:
            raise ValueError(f'expires: "{printable(str(text))}" is neither a duration such as 30d '
                             "nor an instant such as 2026-12-31") from None
    if instant <= now:
        raise ValueError(f'expires: "{printable(str(text))}" is in the past')
    return instant


# ==== 7 render (pure) =============================================================================
# What is shown of jobs, runs and slots: payloads, which --json and the API give, and from the same
# payloads the tables and texts of the CLI. A pipe gets UTC and nothing that changes by itself;
# people get local time, colour and how long ago. No control character reaches a terminal.

_COLOURS = {"succeeded": 32, "failed": 31, "timed_out": 31, "lost": 31, "running": 36, "queued": 33,
            "paused": 33, "skipped": 33, "cancelled": 33, "ok": 32, "note": 33, "wrong": 31}
_PAINTED = ("STATE", "STATUS", "RESULT")


class Style:
    """How text is to look: `Style()` as for a pipe, and what a terminal adds.

    `zone` (a tzinfo) shows local time, `now` (seconds) how far away it is, `width` (columns) cuts.
    """

    def __init__(self, zone=None, color=False, now=None, width=None):
        self.zone, self.color, self.now, self.width = zone, color, now, width

    def paint(self, text):
        """The text, its first word in the colour of the state that it names."""
        word, blank, rest = text.partition(" ")
        if not self.color or word not in _COLOURS:
            return text
        return f"\x1b[{_COLOURS[word]}m{word}\x1b[0m{blank}{rest}"

    def time(self, instant):
        """The instant of a payload to the second, as short as a column wants it; None for None."""
        return self._local(instant, "%Y-%m-%d %H:%M:%S")

    def moment(self, instant):
        """The instant of a payload with its zone and how far away it is; None for None."""
        text = self._local(instant, "%Y-%m-%d %H:%M:%S %Z")
        if instant is None or self.now is None:
            return text
        away = parse_instant(instant, None) - self.now
        far = format_duration(abs(away))
        return f"{text} (in {far})" if away > 0 else f"{text} ({far} ago)"

    def _local(self, instant, layout):
        if instant is None or self.zone is None:
            return instant and instant[:19] + "Z"
        return format(datetime.datetime.fromtimestamp(parse_instant(instant, None), self.zone),
                      layout)


# Payloads. Rows are mappings with the columns of the store; what is unknown is None, never absent.

def run_payload(row, attempts):
    """A run as --json and the API give it, of its row and the rows of its attempts, in order.

    A row that was completed from a journal may also have `retry_at` (seconds) and `progress`.
    """
    row, attempts = dict(row), [dict(attempt) for attempt in attempts]
    return {
        "id": row["id"], "job_id": row["job_id"], "step": row["step"], "parent": row["parent"],
        "retry_of": row["retry_of"], "name": row["name"], "trigger": row["trigger"],
        "slot": _instant(row["slot"]), "last_slot": _instant(row["last_slot"]),
        "count": row["count"], "state": row["state"], "reason": row["reason"],
        "message": row["message"], "queued_at": _instant(row["queued_at"]),
        "started_at": _instant(row["started_at"]), "finished_at": _instant(row["finished_at"]),
        "duration": duration_of(row, attempts), "exit_code": row["exit_code"],
        "signal": row["signal"],
        "attempts": [_attempt_payload(attempt) for attempt in attempts],
        "retry_at": _instant(row.get("retry_at")), "progress": row.get("progress"),
        "node": row["node"], "log": row["log"]}


def line_payload(line):
    """A line of a log, of a LogLine; where it is not UTF-8 its bytes are in `base64` too."""
    text = line.line.decode(errors="replace")
    payload = {"time": line.time, "stream": line.stream, "line": text, "partial": line.partial}
    if text.encode() != line.line:
        payload["base64"] = base64.b64encode(line.line).decode()
    return payload


def log_line_payload(run, line):
    """A line of a log as an export gives it, of the row of the run and a LogLine."""
    return {"time": line.time, "job": run["job_id"], "run": run["id"], "step": run["step"],
            "attempt": line.attempt, **line_payload(line)}


def log_line_bytes(run, line):
    """A line of a log among those of other runs: behind its instant the job and the run."""
    job = run["job_id"] + (f"/{run['step']}" if run["step"] else "")
    return b"".join((line.stored[:20], f" {job} {run['id']}".encode(), line.stored[20:], b"\n"))


def why_no_log(row):
    """Why there is no log of a run, in words, of its row."""
    if row["log_gone"]:
        return f"the log of run {row['id']} was removed {row['log_gone']}"
    yet = "" if row["state"] in FINAL_STATES else " yet"
    reason = f" ({row['reason']})" if row["reason"] else ""
    return f"run {row['id']} has no log{yet}: it is {row['state']}{reason}"


def _instant(seconds):
    return None if seconds is None else format_instant(seconds)


def duration_of(row, attempts):
    """Seconds from the first attempt's start to the last one's end, of a run that has ended."""
    first, last = (attempts[0], attempts[-1]) if attempts else (row, row)
    begin = first["started_at"]
    end = last.get("finished_at") or row["finished_at"]
    if begin is None or row["finished_at"] is None:
        return None
    return round(max(0, end - begin), 6)


def _attempt_payload(attempt):
    return {
        "number": attempt["number"], "started_at": _instant(attempt["started_at"]),
        "finished_at": _instant(attempt.get("finished_at")),
        **{name: attempt.get(name) for name in (
            "exit_code", "signal", "cpu_seconds", "max_rss_bytes", "output_bytes")}}


def job_payload(row, job, next_run, zone, now, usual=None):
    """A job as --json and the API give it: `spec` as written, the rest as it is in effect.

    `job` is the Job with the defaults in effect, `next_run` seconds or None, `zone` the
    scheduler's tzinfo, `now` seconds, `usual` the seconds that it takes usually.
    """
    paused = row["paused"] > now
    last = None if row["last_id"] is None else {
        "id": row["last_id"], "state": row["last_state"],
        "started_at": _instant(row["last_started_at"]),
        "finished_at": _instant(row["last_finished_at"])}
    return {
        "id": job.id, "name": job.name, "schedule": list(job.schedule),
        "words": [cron.describe() for cron in job.crons()],
        "timezone": job.timezone or str(zone), "enabled": job.enabled, "paused": paused,
        "paused_until": _instant(row["paused"]) if paused and row["paused"] < math.inf else None,
        "next_run": _instant(next_run), "last_run": last, "usual": usual,
        "tags": list(job.tags), "source": row["source"], "spec": json.loads(row["spec"]),
        "version": row["version"], "active": row["active"]}


def public_spec(spec):
    """A spec for those who may not define jobs: without the values of variables, what a command
    reads, and the addresses of webhooks and pings, which let in whoever knows them."""
    if isinstance(spec, list):
        return [public_spec(item) for item in spec]
    if not isinstance(spec, dict):
        return spec
    shown = {name: None if name in _SECRET_KEYS else public_spec(item)
             for name, item in spec.items()}
    if isinstance(spec.get("env"), dict):
        shown["env"] = dict.fromkeys(spec["env"])
    return shown


_SECRET_KEYS = ("stdin", "webhook", "ping")


def job_diff(before, job):
    """What becomes of the definition of a job, as a unified diff; either may be None."""
    import difflib
    old, new = ([] if each is None else job_to_yaml([each]).splitlines(keepends=True)
                for each in (before, job))
    return "".join(difflib.unified_diff(old, new, "before", "after")) or None


def brief_run_payload(row):
    """Of a run what a list of many needs, of its row alone."""
    row = dict(row)
    return {
        "id": row["id"], "job_id": row["job_id"], "step": row["step"], "parent": row["parent"],
        "trigger": row["trigger"], "state": row["state"], "reason": row["reason"],
        "message": row["message"], "exit_code": row["exit_code"], "signal": row["signal"],
        "slot": _instant(row["slot"]), "last_slot": _instant(row["last_slot"]),
        "count": row["count"], "queued_at": _instant(row["queued_at"]),
        "started_at": _instant(row["started_at"]), "finished_at": _instant(row["finished_at"]),
        "duration": duration_of(row, ())}


def slot_payload(job, slot, zone):
    """A slot (seconds) of a job in UTC and in the job's zone, else `zone`.

    `schedule` is the expression that it comes from, `mark` what a change of clocks does to it.
    """
    zone = job.zone(zone)
    local = datetime.datetime.fromtimestamp(slot, zone).isoformat()
    causes = [(expression, _mark(cron, slot, cron.zone or zone))
              for cron, expression in zip(job.crons(), job.schedule)
              if cron.next_slot(slot - 1, cron.zone or zone) == slot]
    return {"job_id": job.id, "slot": format_instant(slot), "local": local,
            "schedule": causes[0][0] if causes else None,
            "mark": next((mark for _, mark in causes if mark), None)}


def _mark(cron, slot, zone):
    """`moved from 02:30`, `first of two`, `second of two` by the zone of its schedule, or None."""
    local = datetime.datetime.fromtimestamp(slot, zone)
    moved = cron.moved(slot, zone)
    if moved:
        return f"moved from {moved}"
    if local.replace(fold=0).utcoffset() != local.replace(fold=1).utcoffset():
        return "second of two" if local.fold else "first of two"
    return None


def foresight_payload(foreseen, zone, unknown):
    """The Foreseen of some time, and how many they are, the busiest minutes, how many `meet` a run
    of their job that is still on; `unknown` are the ids of jobs whose durations are not known."""
    slots = [{**slot_payload(item.job, item.slot, zone), "start": format_instant(item.start),
              "action": item.action, "meets": _instant(item.meets)} for item in foreseen]
    return {"slots": slots, "count": len(slots), "meet": sum(item.meets is not None
                                                             for item in foreseen),
            "busiest": [{"minute": format_instant(minute), "count": count}
                        for minute, count in busiest_minutes(foreseen)],
            "unknown_durations": list(unknown)}


def page(name, items, cursor=None):
    """A page of a list: its items under their name, and the cursor of the next page or None."""
    return {name: items, "next": cursor}


def notice_payload(row):
    """A notice that waits to be sent, or was given up, of its row of the outbox; no target, which
    may be a credential."""
    return {"kind": row["kind"], "run": row["run_id"], "title": row["title"],
            "state": row["state"], "tries": row["tries"], "error": row["error"],
            "created_at": _instant(row["created_at"]), "next_try": _instant(row["next_try"])}


def token_payload(row):
    """A token of its row; its text is nowhere."""
    return {"name": row["name"], "scopes": row["scopes"].split(","), "jobs": row["pattern"],
            "created_at": _instant(row["created_at"]), "expires_at": _instant(row["expires_at"]),
            "last_used_at": _instant(row["used_at"])}


def audit_payload(row):
    """A change of its row: who made it, when, and what."""
    return {"at": _instant(row["at"]), "who": row["who"], "action": row["action"],
            "job_id": row["job_id"], "target": row["target"], "detail": row["detail"]}


# Metrics, in the text format of Prometheus.

BUCKETS = (1, 5, 15, 60, 300, 1800, 7200, 43200)    # seconds
OTHER_JOBS = "_other"                               # no job can have this id

_METRICS = {                            # a name -> its type, and what it says
    "roexec_run_count_total": ("counter", "Runs that have ended, by their outcome."),
    "roexec_run_errors_total": ("counter", "Runs that have failed, timed out or were lost."),
    "roexec_run_duration_seconds": ("histogram", "How long runs have taken."),
    "roexec_last_success_timestamp_seconds": ("gauge", "When a run has succeeded last."),
    "roexec_next_run_timestamp_seconds": ("gauge", "When a job is to start next."),
    "roexec_runs_active": ("gauge", "Runs that are on."),
    "roexec_runs_queued": ("gauge", "Runs that wait for a place."),
    "roexec_slots_skipped_total": ("counter", "Due slots that did not run, by the reason."),
    "roexec_scheduler_lag_seconds": ("gauge", "How late the scheduler was of late, at most."),
    "roexec_leader": ("gauge", "Whether this server starts runs."),
}


def job_samples(job_id, counters, gauges):
    """The samples [(name, labels, value)] of one job: of its counters {(name, label): value} and of
    gauges {name: value or None}."""
    def of(name):
        return {label: value for (kind, label), value in sorted(counters.items()) if kind == name}
    job, runs, took = {"job_name": job_id}, of("runs"), of("took")
    samples = [("roexec_run_count_total", {**job, "outcome": state}, value)
               for state, value in runs.items()]
    samples.append(("roexec_run_errors_total", job, sum(
        runs.get(state, 0) for state in ("failed", "timed_out", "lost"))))
    samples += [("roexec_slots_skipped_total", {**job, "reason": reason}, value)
                for reason, value in of("skipped").items()]
    count = 0
    for bound in (*map(str, BUCKETS), "+Inf") if took else ():
        count += took.get(bound, 0)
        samples.append(("roexec_run_duration_seconds_bucket", {**job, "le": bound}, count))
    if took:
        samples += [("roexec_run_duration_seconds_sum", job, of("seconds").get("", 0)),
                    ("roexec_run_duration_seconds_count", job, count)]
    gauges = {**gauges, "roexec_last_success_timestamp_seconds": of("success").get("")}
    return samples + [(name, job, value) for name, value in gauges.items() if value is not None]


def metrics_text(samples):
    """The samples [(name, labels, value)] as Prometheus reads them, family by family."""
    families = {name: [] for name in _METRICS}
    for name, labels, value in samples:
        family = name if name in families else name.rpartition("_")[0]
        inner = ",".join(f'{label}="{_label_value(text)}"' for label, text in labels.items())
        families[family].append(f"{name}{{{inner}}} {value}\n" if inner else f"{name} {value}\n")
    return "".join(f"# HELP {name} {_METRICS[name][1]}\n# TYPE {name} {_METRICS[name][0]}\n"
                   + "".join(lines) for name, lines in families.items())


def _label_value(text):
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


# Text.

def table(header, rows, style):
    """Aligned columns, a dash where a value is missing; the width cuts the last column alone."""
    lines = [[_cell(value) for value in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = "".join(_table_line(cells, header, widths, style) + "\n" for cells in lines)
    head, newline, body = text.partition("\n")
    return (f"\x1b[1m{head}\x1b[0m" if style.color else head) + newline + body


def _cell(value):
    return "-" if value is None or value == "" else printable(str(value))


def _table_line(cells, header, widths, style):
    line = ""
    for name, cell, width in zip(header, cells[:-1], widths):
        line += (style.paint(cell) if name in _PAINTED else cell) + " " * (width - len(cell) + 2)
    room = max(10, (style.width or 0) - sum(widths[:-1]) - 2 * len(widths[:-1]))
    last = cells[-1]
    return line + (last[:room - 3] + "..." if style.width and len(last) > room else last)


def fields(pairs, style):
    """Lines of a label and its value, in order; those without a value are left out."""
    width = max(len(label) for label, _ in pairs) + 2
    text = ""
    for label, value in pairs:
        if value is not None and value != "":
            shown = printable(str(value))
            shown = style.paint(shown) if label.upper() in _PAINTED else shown
            text += f"{label:<{width}}{shown}\n"
    return text


def runs_table(runs, style, usual=None):
    """A table of run payloads; `usual` has the seconds that runs of a job id take usually."""
    header = "RUN", "JOB", "STATE", "TRIGGER", "TIME", "DURATION", "EXIT", "NOTE"
    return table(header, [_run_row(run, style, usual or {}) for run in runs], style)


def _run_row(run, style, usual):
    return (run["id"], job_or_step(run), run["state"], run["trigger"],
            style.time(run["started_at"] or run["slot"] or run["queued_at"]),
            _run_time(run, style, None if run["step"] else usual.get(run["job_id"])),
            _exit(run), _note(run, style))


def job_or_step(run):
    """What the run of a payload is of: `JOB`, or `JOB/STEP`."""
    return f"{run['job_id']}/{run['step']}" if run["step"] else run["job_id"]


def _run_time(run, style, usual):
    """How long a run took; for people also how long one has been on, of how long about."""
    if run["duration"] is not None:
        return format_duration(run["duration"])
    if run["state"] != "running" or run["started_at"] is None or style.now is None:
        return None
    text = format_duration(max(0, style.now - parse_instant(run["started_at"], None)))
    return f"{text} of about {format_duration(usual)}" if usual else text


def _exit(ended):
    return ended["signal"] if ended["exit_code"] is None else ended["exit_code"]


def _note(run, style):
    reason = run["reason"] or ""
    if run["count"] > 1:
        reason += f" ({run['count']} slots until {style.time(run['last_slot'])})"
    number = len(run["attempts"])
    return "; ".join(filter(None, (
        reason, run["message"], f"{number} attempts" if number > 1 else None,
        run["retry_at"] and f"next attempt {style.time(run['retry_at'])}")))


def run_text(run, style, usual=None, log=None):
    """A run payload in full; `usual` seconds that it takes usually, `log` where its log lies."""
    state = f"{run['state']}  ({run['reason']})" if run["reason"] else run["state"]
    several = run["count"] > 1
    text = fields((
        ("run", run["id"]), ("job", job_or_step(run)), ("name", run["name"]), ("state", state),
        ("message", run["message"]), ("trigger", run["trigger"]), ("parent", run["parent"]),
        ("retry of", run["retry_of"]), ("slot", style.moment(run["slot"])),
        ("until", f"{style.moment(run['last_slot'])}, {run['count']} slots" if several else None),
        ("queued", style.moment(run["queued_at"])), ("started", style.moment(run["started_at"])),
        ("finished", style.moment(run["finished_at"])), ("duration", _run_time(run, style, usual)),
        ("retry at", style.moment(run["retry_at"])), ("exit", _exit(run)), ("node", run["node"]),
        ("log", log or run["log"])), style)
    if run.get("steps"):
        text += "\n" + steps_text(run, style)
    if not run["attempts"]:
        return text
    header = "ATTEMPT", "STARTED", "DURATION", "EXIT", "CPU", "MEMORY", "OUTPUT"
    return text + "\n" + table(header, [_attempt_row(row, style) for row in run["attempts"]], style)


_DEEPEST_STEP = 12           # levels of steps that are drawn


def steps_text(run, style):
    """The graph of the steps of a run payload: each stands below the last step that it waits for,
    and names those that it waits for where that does not tell all."""
    steps, below, depth = {step["step"]: step for step in run["steps"]}, {None: []}, {}
    for name, step in steps.items():
        depth[name] = 1 + max((depth.get(need, 0) for need in step["depends_on"]), default=-1)
    for name, step in steps.items():
        needs = [need for need in step["depends_on"] if need in steps]
        last = max(needs, key=lambda need: (depth[need], list(steps).index(need)), default=None)
        below.setdefault(last, []).append(name)
    rows, ahead = [], [(name, "") for name in reversed(below[None])]
    while ahead:
        name, prefix = ahead.pop()
        rows.append(_step_row(run, steps[name], prefix, style))
        indent = prefix.replace("`-", "  ").replace("|-", "| ")
        for number, other in enumerate(reversed(below.get(name, ()))):
            mark = "`- " if number == 0 else "|- "
            ahead.append((other, (indent + mark) if len(indent) < 3 * _DEEPEST_STEP else indent))
    return table(("STEP", "STATE", "TIME", "DURATION", "EXIT", "AFTER", "RUN", "NOTE"), rows, style)


def _step_row(run, step, prefix, style):
    needs = step["depends_on"]
    after = ", ".join(need if kind == "succeeded" else f"{need} ({kind})"
                      for need, kind in needs.items())
    of = f"of run {step['parent']}" if step["parent"] != run["id"] else None
    return (prefix + step["step"], step["state"], style.time(step["started_at"]),
            _run_time(step, style, None), _exit(step),
            after if len(needs) > 1 or "(" in after else None, step["id"],
            "; ".join(filter(None, (_note(step, style), of))))


def _attempt_row(attempt, style):
    begin, end = attempt["started_at"], attempt["finished_at"]
    took = end and parse_instant(end, None) - parse_instant(begin, None)
    return (attempt["number"], style.time(begin), _as(format_duration, took and max(0, took)),
            _exit(attempt), _as(format_duration, attempt["cpu_seconds"]),
            _as(format_size, attempt["max_rss_bytes"]), _as(format_size, attempt["output_bytes"]))


def _as(form, value):
    return None if value is None else form(value)


def job_status(job, style):
    """In a word what the job of a payload is up to: running, queued, paused, scheduled …"""
    stopped = None if job["enabled"] else "disabled"
    if job["paused"]:
        until = style.time(job["paused_until"])
        stopped = f"paused until {until}" if until else "paused"
    if job["active"]:
        return f"{job['active']} ({stopped})" if stopped else job["active"]
    return stopped or ("scheduled" if job["schedule"] else "manual")


def jobs_table(jobs, style):
    """A table of job payloads."""
    header = "ID", "SCHEDULE", "STATUS", "NEXT RUN", "LAST RUN", "RESULT", "NAME"
    return table(header, [_job_row(job, style) for job in jobs], style)


def _job_row(job, style):
    last = job["last_run"] or {"started_at": None, "state": None}
    schedule = [_schedule(expression, job["id"], style) for expression in job["schedule"]]
    return (job["id"], ", ".join(schedule), job_status(job, style), style.time(job["next_run"]),
            style.time(last["started_at"]), last["state"], job["name"])


def _schedule(expression, job_id, style):
    """An expression, for people in words unless these are many."""
    words = Cron(expression, job_id).describe() if style.zone is not None else ""
    return words if 0 < len(words) <= 40 else expression


def job_text(payload, job, style):
    """A job payload in full, and below it the definition of its Job as a job file."""
    last = payload["last_run"]
    result = last and "  ".join(filter(None, (
        style.moment(last["started_at"]), last["state"], last["id"])))
    return fields((
        ("job", payload["id"]), ("name", payload["name"]), ("status", job_status(payload, style)),
        *(("schedule", f"{cron.expression}  ({cron.describe()})") for cron in job.crons()),
        ("timezone", payload["timezone"]), ("next run", style.moment(payload["next_run"])),
        ("last run", result), ("tags", ", ".join(payload["tags"])), ("source", payload["source"]),
        ("version", payload["version"])), style) + "\n" + job_to_yaml([job])


def tokens_table(tokens, style):
    """A table of token payloads."""
    header = "NAME", "JOBS", "CREATED", "EXPIRES", "LAST USED", "SCOPES"
    return table(header, [
        (token["name"], token["jobs"] or "all", style.time(token["created_at"]),
         style.time(token["expires_at"]) or "never", style.time(token["last_used_at"]),
         " ".join(token["scopes"])) for token in tokens], style)


def audit_table(changes, style):
    """A table of changes, from the newest."""
    return table(("WHEN", "WHO", "WHAT", "JOB", "TARGET", "DETAIL"), [
        (style.time(change["at"]), *map(change.get, ("who", "action", "job_id", "target",
                                                     "detail"))) for change in changes], style)


def slots_table(slots, style):
    """A table of slot payloads, in UTC and in the local time of each job."""
    if style.zone is None:
        return table(("SLOT", "JOB", "LOCAL", "NOTE"), [
            (slot["slot"], slot["job_id"], slot["local"], _slot_note(slot, style))
            for slot in slots], style)
    causes = {(slot["schedule"], slot["job_id"]) for slot in slots}
    words = {cause: _schedule(*cause, style) for cause in causes}
    return table(("SLOT", "JOB", "LOCAL", "SCHEDULE", "NOTE"), [
        (slot["slot"], slot["job_id"], slot["local"], words[slot["schedule"], slot["job_id"]],
         _slot_note(slot, style)) for slot in slots], style)


_MEETINGS = {"start": "and both go on", "queue": "and waits for it", "skip": "and is skipped",
             "replace": "and replaces it"}


def _slot_note(slot, style):
    meets = slot.get("meets")
    return "; ".join(filter(None, (slot["mark"], meets and (
        f"meets the run of {style.time(meets)} {_MEETINGS[slot['action']]}"))))


def foresight_text(payload, style):
    """The slots of a foresight payload and what is to be said about them all."""
    busiest = [f"{style.time(entry['minute'])} ({entry['count']})" for entry in payload["busiest"]]
    summary = fields((("slots", payload["count"]), ("busiest minutes", ", ".join(busiest)),
                      ("meet a run", payload["meet"]),
                      ("duration unknown", ", ".join(payload["unknown_durations"]))), style)
    return (slots_table(payload["slots"], style) + "\n" if payload["slots"] else "") + summary


def status_text(payload, style):
    """What `status` has found out, and the notices that did not get to where they were to."""
    notices = payload["unsent_notices"]
    given_up = [notice for notice in notices if notice["state"] == "given_up"]
    count = f"{len(notices)}, {len(given_up)} of them given up" if given_up else len(notices)
    text = fields([(label, value) for label, value in payload.items()
                   if label not in ("unsent_notices", "warnings")]
                  + [("wrong", warning) for warning in payload["warnings"]]
                  + [("notices", f"unsent: {count}" if notices else None)], style)
    if not notices:
        return text
    header = "NOTICE", "STATUS", "SINCE", "TRIES", "NEXT TRY", "ABOUT", "ERROR"
    return text + "\n" + table(header, [
        (notice["kind"], notice["state"].replace("_", " "), style.time(notice["created_at"]),
         notice["tries"], style.time(notice["next_try"]), notice["title"], notice["error"])
        for notice in notices], style)


def findings_text(findings, style):
    """A line for each finding of `doctor`, with what mends it."""
    width = max(len(found["about"]) for found in findings)
    text = ""
    for found in findings:
        mend = f" -> {found['mend']}" if found["mend"] else ""
        line = printable(f"{found['about']:<{width}}  {found['text']}{mend}")
        text += f"{style.paint(found['level'])}{'':<{7 - len(found['level'])}}{line}\n"
    return text


def environments_text(payload, style):
    """What `doctor --job` has found: what a job gets, and the caller has not, and the other way."""
    text = fields([(name, payload[name]) for name in ("job", "user", "directory", "umask")], style)
    text += "".join(f"only the job has {name}={value}\n"
                    for name, value in payload["only_job"].items())
    text += "".join(f"{name} is {values['job']} for the job, and {values['caller']} here\n"
                    for name, values in payload["different"].items())
    if payload["only_caller"]:
        text += f"only here there is {', '.join(payload['only_caller'])}\n"
    text += "".join(f"at each run there is also what this gives: {json.dumps(source)}\n"
                    for source in payload["env_from"])
    return "".join(printable(line) + "\n" for line in text.splitlines())


# Why.

# A reason of `explain` -> the clauses of its sentence; one about what is not known is left out.
_SENTENCES = {
    "running": ("Run {run} is on", " since {since}", ", attempt {attempt}"),
    "retry": ("Run {run} has failed and waits for its next attempt, number {attempt}, until "
              "{until}",),
    "queued": ("Run {run} is queued since {since} and starts at once",),
    "queued_job": ("Run {run} waits for a place behind {behind}: max_concurrent of the job is "
                   "{limit}",),
    "queued_all": ("Run {run} waits for a place behind {behind}: max_concurrent of the scheduler "
                   "is {limit}",),
    "queued_catch_up": ("Run {run} waits for {behind}: runs that are caught up start one after the "
                        "other",),
    "queued_paused": ("Run {run} waits until the job is resumed: roexec resume {job}",),
    "queued_owner": ("Run {run} waits for the command that asked for it, which alone starts it",),
    "queued_no_server": ("Run {run} waits for a server: no server runs on this store",),
    "paused": ("The job is paused", " until {until}", ", its slots are skipped from {since}",
               ": roexec resume {job}"),
    "paused_then": ("The job was paused: skipped were the slots from {since}", " until {until}"),
    "will_be_paused": ("It will be skipped, since the job is paused", " (from {since} on)",
                       " until {until}",
                       ": roexec resume {job}"),
    "disabled": ("The job says enabled: false", " since {since}", ", until {until}"),
    "manual": ("The job has no schedule: it runs when somebody asks for it",),
    "reboot": ("The job is due when the first server after a boot starts",),
    "window": ("That is outside of its window", " from {start}", " until {end}"),
    "no_server": ("No server runs on this store, so nothing starts by itself: roexec server",),
    "not_due": ("It is not due", "; it was last {last}", "; it is next {next}",
                " ({schedule})"),
    "rescheduled": ("It was not due then: its schedule was {schedule}", ", and is {to}",
                    " since {since}"),
    "unregistered": ("The job was registered only {since}: slots count from then on",
                     "; it is next due {next}"),
    "due": ("It is due, and starts {next}",),
    "jitter": ("It is due, and its jitter delays the start until {until}",),
    "overdue": ("It was due {since}, and the server has not decided it yet",),
    "no_server_then": ("It was due {since}, and no server has run since then",
                       "; the next one catches up what is not older than {window} (catch_up: "
                       "{catch_up})"),
    "undecided": ("No server had decided it when the schedule was changed, {since}",),
    "unrecorded": ("There is no record of it: it is gone by now, or the job was deleted then, or "
                   "the clock was set",),
    "gap": ("This time does not exist there: the clocks jump over it. What is due in the gap runs "
            "right after it, {next}",),
    "ran": ("Run {run}: {state}", " ({detail})", ", started {since}", ", {late} late",
            ", ended {until}", "; {message}"),
    "overlap": ("It was skipped, since the job was on", ": {others}", " (overlap: {overlap})"),
    "missed": ("It was missed: no server saw it in time",
               "; one had decided something {alive} for the last time", "; one saw it {seen}",
               ", {late} late", "; {because}"),
    "condition": ("It was skipped by its condition", ": {message}", "; roexec logs {run}"),
    "capacity": ("It was skipped", ": {message}"),
    "dependency": ("It was skipped, since a step that it depends on did not succeed",),
}
_NOT_CAUGHT_UP = {"none": "catch_up: none", "window": "catch_up_window is {window}",
                  "newer": "catch_up: latest has run a newer one in its place"}
_MOMENTS = ("since", "until", "last", "next", "seen", "alive", "start", "end", "started_at",
            "finished_at")


def explanation_payload(job, answers, zone):
    """What `explain` has said as --json has it: `answers` are (slot or None, [sentence]), of the
    instants and of now, in order."""
    given = []
    for slot, said in answers:
        payload = slot_payload(job, slot, zone) if slot is not None else {}
        sentences = [_with_instants(sentence) for sentence in said]
        given.append({"slot": payload.get("slot"), "local": payload.get("local"),
                      "mark": payload.get("mark"), "why": [
            {**sentence, "text": _sentence(sentence, job.id, Style())} for sentence in sentences]})
    return {"job_id": job.id, "answers": given}


def _with_instants(value):
    """A sentence with the instants of payloads in the place of seconds."""
    return {name: [_with_instants(item) if isinstance(item, dict) else item for item in entry]
            if isinstance(entry, list) else _instant(entry) if name in _MOMENTS else entry
            for name, entry in value.items()}


def _sentence(sentence, job_id, style):
    known = {name: _in_words(name, value, style) for name, value in sentence.items()
             if value is not None and value != []}
    known["job"] = job_id
    if sentence["reason"] == "missed":
        known["because"] = _NOT_CAUGHT_UP[sentence["why"]].format(**known)
    text = ""
    for clause in _SENTENCES[sentence["reason"]]:
        try:
            text += clause.format(**known)
        except KeyError:
            pass
    return printable(text)


def _in_words(name, value, style):
    if name in _MOMENTS:
        return style.moment(value)
    if name in ("late", "window"):
        return format_duration(value)
    if name == "others":
        return ", ".join(_on_then(run, style) for run in value)
    if name == "behind" and len(value) > 5:
        return ", ".join(value[:5]) + f" and {len(value) - 5} more"
    return ", ".join(value) if isinstance(value, list) else value


def _on_then(run, style):
    began = run["started_at"] and f"started {style.moment(run['started_at'])}"
    ended = run["finished_at"] and f"ended {style.moment(run['finished_at'])}"
    return f"run {run['id']} (" + ", ".join(filter(None, (began, ended, run["state"]))) + ")"


def explanation_text(payload, style):
    """An explanation payload: a heading for each instant, and below it what there is to say."""
    text = ""
    for answer in payload["answers"]:
        about = "now" if answer["slot"] is None else style.moment(answer["slot"])
        local = answer["local"] and f"local {answer['local']}"
        where = "; ".join(filter(None, (local, answer["mark"])))
        text += f"{payload['job_id']}, {about}" + (f" ({where})" if where else "") + ":\n"
        text += "".join(f"  {_sentence(sentence, payload['job_id'], style)}\n"
                        for sentence in answer["why"])
    return text


# ==== 8 store =====================================================================================
# The folder on disk: its files and locks, and the database with its schema. Every change of state
# is one transaction, made by one writer at a time; what was committed survives a kill and a power
# cut.

# Files, locks, and facts of the host.

def open_private(path, flags=os.O_RDWR | os.O_CREAT):
    """A descriptor of a file that is the owner's alone (0600), never through a link."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def try_lock(descriptor, kind=None):
    """Take the flock(2) of an open file, an exclusive one; False where somebody else has it."""
    try:
        fcntl.flock(descriptor, (kind or fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def lock_is_held(path):
    """Whether some live process holds the flock of a file; one that is not there is free.

    It is tried as a shared lock, so that two who ask do not take each other for the holder.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        return not try_lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def is_at(descriptor, path):
    """Whether a path still names the open file: a lock on a file that was replaced is void."""
    try:
        here, there = os.fstat(descriptor), os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def boot_id():
    """What tells this boot of the host from every other."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except FileNotFoundError:   # macOS and the BSDs have the instant of the boot only
        return str(int(time.time() - time.monotonic()) // 60)


def process_start(pid):
    """When a process started, in ticks since the boot; None if there is none.

    With the boot id this tells a process from a later one with the same number.
    """
    fields = process_stat(pid)
    return int(fields[19]) if fields and fields[0] not in (b"Z", b"X") else None


def process_stat(pid):
    """The fields of a process from its state on (proc(5), stat), in bytes; None without one."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def start_thread(function, name):
    """A thread that performs a function, and has no part in signals; it does not keep the process
    from ending."""
    thread = threading.Thread(target=function, name=name, daemon=True)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return thread


def new_run_id():
    """Ten random lower-case letters and digits."""
    number = int.from_bytes(os.urandom(8), "big")
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    return "".join(digits[number // 36 ** place % 36] for place in range(10))


def host_zone():
    """The zone of this host: of $TZ, else what /etc/localtime points to, else its content."""
    name = os.environ.get("TZ", "").lstrip(":")
    if name:
        try:
            return get_zone(name)
        except ValueError:
            return datetime.timezone.utc        # as the C library reads a TZ it does not know
    try:
        target = os.path.realpath("/etc/localtime")
        if "/zoneinfo/" in target:
            return get_zone(target.split("/zoneinfo/")[-1])
        with open(target, "rb") as file:
            return zoneinfo.ZoneInfo.from_file(file, "localtime")
    except (FileNotFoundError, ValueError):
        return datetime.timezone.utc


def owner_name(uid):
    """The name of a user, else the number as text."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs",
                        "fuse.sshfs"}


def file_system(path):
    """The type of the file system that a path lies on, "" if unknown (proc(5), mountinfo)."""
    try:
        device = os.stat(path).st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        with open("/proc/self/mountinfo") as file:
            for line in file:
                before, _, after = line.partition(" - ")
                if before.split()[2] == wanted:
                    return after.split()[0]
    except OSError:
        pass
    return ""


def make_private_folder(path, say):
    """Make a folder, or see to it that one is its owner's alone; `say` is told of a change.

    Raises RoexecError where it belongs to somebody else, or others may write into it.
    """
    before = os.umask(0o022)
    os.umask(before | 0o022)            # for what is made on the way to it
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        state = os.stat(path)
    except OSError as error:
        raise RoexecError(f"cannot make the folder {error.filename}: {error.strerror}") from None
    finally:
        os.umask(before)
    if not stat.S_ISDIR(state.st_mode):
        raise RoexecError(f"{path} is no folder; name another store with --store")
    if state.st_uid != os.geteuid():
        raise RoexecError(f"{path} belongs to {owner_name(state.st_uid)}; run as that user, or "
                          "name another store with --store")
    if state.st_mode & 0o002:
        raise RoexecError(f"everybody may write into {path}; name a folder of its own with "
                          f"--store, or make this one private: chmod 700 {path}")
    if state.st_mode & 0o077:
        os.chmod(path, 0o700)
        say(f"{path} could be read by others; it is private now (mode 0700)")


# The database.

_MIGRATIONS = ["""
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE jobs (
    id TEXT PRIMARY KEY, spec TEXT NOT NULL, version INTEGER NOT NULL, source TEXT,
    position REAL NOT NULL,             -- each slot at or before it is decided (UTC seconds)
    paused REAL NOT NULL DEFAULT 0,     -- until when (UTC seconds), infinity until it is resumed
    deleted INTEGER NOT NULL DEFAULT 0,
    changed INTEGER NOT NULL,           -- the count of changes when this row changed last
    last_run TEXT) WITHOUT ROWID;
CREATE INDEX jobs_changed ON jobs (changed);
CREATE TABLE versions (
    job_id TEXT, version INTEGER, spec TEXT NOT NULL, source TEXT, since REAL NOT NULL,
    PRIMARY KEY (job_id, version)) WITHOUT ROWID;
CREATE TABLE runs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, job_id TEXT NOT NULL,
    name TEXT, version INTEGER, spec TEXT, step TEXT, parent TEXT, retry_of TEXT,
    "trigger" TEXT NOT NULL, slot INTEGER, last_slot INTEGER, count INTEGER NOT NULL DEFAULT 1,
    state TEXT NOT NULL, reason TEXT, message TEXT,
    cancel TEXT,                        -- the reason of a cancel that was asked for
    cause TEXT,                         -- RUN/N: the N-th notice of that run has asked for it,
                                        -- RUN/job: that run is a step that waits for it
    owner TEXT,                         -- the process that alone may start it, if one may
    env TEXT, priority INTEGER NOT NULL DEFAULT 0, queued_at REAL NOT NULL, started_at REAL,
    finished_at REAL, exit_code INTEGER, signal TEXT,
    boot TEXT,                          -- the boot in which it began to run
    node TEXT, log TEXT,
    log_gone TEXT,                      -- when and why its log was removed
    outputs TEXT,                       -- what a step hands on, as JSON
    taken TEXT,                         -- {step: run} that a retry has taken over, as JSON
    work TEXT);                         -- the scratch folder of a pipeline, below work/
CREATE UNIQUE INDEX runs_slot ON runs (job_id, slot) WHERE slot IS NOT NULL AND step IS NULL;
CREATE INDEX runs_job ON runs (job_id, seq);
CREATE INDEX runs_state ON runs (state, seq);
CREATE INDEX runs_active ON runs (job_id, seq)
    WHERE state IN ('queued', 'running') AND step IS NULL;
CREATE UNIQUE INDEX runs_cause ON runs (cause) WHERE cause IS NOT NULL;
CREATE INDEX runs_parent ON runs (parent) WHERE parent IS NOT NULL;
CREATE INDEX runs_work ON runs (work) WHERE work IS NOT NULL;
CREATE INDEX runs_logs ON runs (finished_at) WHERE log IS NOT NULL;
CREATE TABLE attempts (
    run_id TEXT, number INTEGER, started_at REAL, finished_at REAL, exit_code INTEGER, signal TEXT,
    cpu_seconds REAL, max_rss_bytes INTEGER, output_bytes INTEGER,
    PRIMARY KEY (run_id, number)) WITHOUT ROWID;
CREATE TABLE outbox (
    id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, target TEXT NOT NULL, run_id TEXT,
    key TEXT,                           -- tells it from the other notices of its run
    title TEXT, count INTEGER NOT NULL DEFAULT 1, body BLOB,
    state TEXT NOT NULL DEFAULT 'waiting',      -- then sent, merged, superseded or given_up
    tries INTEGER NOT NULL DEFAULT 0, created_at REAL NOT NULL, tried_at REAL, next_try REAL,
    error TEXT);
CREATE UNIQUE INDEX outbox_key ON outbox (run_id, key, kind, target) WHERE key IS NOT NULL;
CREATE INDEX outbox_waiting ON outbox (next_try) WHERE state = 'waiting';
CREATE TABLE tokens (
    name TEXT PRIMARY KEY, digest TEXT NOT NULL UNIQUE,
    scopes TEXT NOT NULL,               -- with commas
    pattern TEXT, created_at REAL NOT NULL, expires_at REAL, used_at REAL) WITHOUT ROWID;
CREATE TABLE counters (                 -- of registered jobs, as the metrics have them
    job_id TEXT, name TEXT, label TEXT, value REAL NOT NULL,
    PRIMARY KEY (job_id, name, label)) WITHOUT ROWID;
CREATE TABLE audit (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, who TEXT NOT NULL,
    action TEXT NOT NULL, job_id TEXT, target TEXT, detail TEXT);
CREATE TABLE events (                   -- the newest changes, of a run or of a job
    id INTEGER PRIMARY KEY, job_id TEXT NOT NULL, run_id TEXT);
CREATE TRIGGER run_added AFTER INSERT ON runs BEGIN
    INSERT INTO events (job_id, run_id) VALUES (NEW.job_id, NEW.id); END;
CREATE TRIGGER run_changed AFTER UPDATE OF state, count ON runs
    WHEN OLD.state != NEW.state OR OLD.count != NEW.count BEGIN
    INSERT INTO events (job_id, run_id) VALUES (NEW.job_id, NEW.id); END;
CREATE TRIGGER job_added AFTER INSERT ON jobs BEGIN
    INSERT INTO events (job_id) VALUES (NEW.id); END;
CREATE TRIGGER job_changed AFTER UPDATE OF changed ON jobs BEGIN
    INSERT INTO events (job_id) VALUES (NEW.id); END;
CREATE TRIGGER event_added AFTER INSERT ON events BEGIN
    DELETE FROM events WHERE id <= NEW.id - 10000; END;
CREATE TABLE answers (                  -- to requests that bear an Idempotency-Key
    key TEXT PRIMARY KEY,               -- a digest of who asked, for which job, with which key
    request TEXT NOT NULL,              -- a digest of what was asked for
    run_id TEXT NOT NULL, at REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX answers_at ON answers (at);
"""]

_PATIENCE = 5                           # seconds, until one says what one waits for
_LARGE_LOG = 4 << 20                    # bytes of the write-ahead log that ask for a checkpoint


class StoreFailure(RoexecError):
    """SQLite could not do what it was asked for."""


def no_store(store):
    """The error for a store that is not there."""
    return RoexecError(f"there is no store in {store.path} yet; `roexec apply`, `roexec add` and "
                       "`roexec server` make one")


class Store:
    """A store: the folder `folder` with the database file `database`, logs/ and active/.

    `path` is a folder, or a database file that ends in .db, whose folder is then `<path>.d`.
    `say(text)` is told what a person should know. Nothing is opened or made before it is needed.
    """

    def __init__(self, path, say=None):
        self.path = path
        one_file = path.endswith(".db")
        self.folder = path + ".d" if one_file else path
        self.database = path if one_file else os.path.join(path, "roexec.db")
        self.say = say or (lambda text: None)
        self.kept = None                # where `keep_open` was called
        self.told_of_log = False        # that the write-ahead log cannot be read
        self.memo, self.given = None, {}    # the Memo of a server; {run id: secrets}, only here

    @property
    def exists(self):
        """Whether there is a database; raises RoexecError where one may not look."""
        try:
            return os.stat(self.database).st_size > 0
        except (FileNotFoundError, NotADirectoryError):
            return False
        except PermissionError:
            raise self.refusal() from None

    @property
    def is_read_only(self):
        """Whether its file system can only be read, for now."""
        folder = os.path.dirname(os.path.abspath(self.database))
        return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)

    def file(self, name):
        """The path of something in the folder."""
        return os.path.join(self.folder, name)

    def create(self):
        """Make what is missing, and bring an older database up to date -> self."""
        make_private_folder(self.folder, self.say)
        if self.database == self.path:
            _check_database_file(self)
        kind = file_system(self.folder)
        if kind in NETWORK_FILE_SYSTEMS:
            raise RoexecError(f"{self.folder} lies on a network file system ({kind}), where locks "
                              "do not hold; name a folder on a disk of this host with --store")
        try:
            for name in ("logs", "active"):
                os.makedirs(self.file(name), 0o700, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.mkfifo(self.file("wake"), 0o600)
            with self.lock():
                self._migrate()
        except OSError as error:
            raise RoexecError(f"cannot write into {self.folder}: {error.strerror}") from None
        return self

    def write(self):
        """A context: the connection within a transaction that is committed at its end.

        One writer at a time, on the whole host; an exception rolls everything back.
        """
        return _Transaction(self, "rw")

    def read(self):
        """A context: a connection that only reads, and sees one state of the database."""
        return _Transaction(self, "ro")

    def keep_open(self):
        """Keep the writing connection from now on, as a server does; `close` ends that."""
        with self.lock():
            self.kept = self.connect("rw")

    def close(self):
        """Close the connection that is kept, under the lock: it checkpoints."""
        if self.kept is not None:
            with self.lock():
                self.kept.close()
                self.kept = None

    def checkpoint(self, large=None):
        """Move the write-ahead log into the database where it has become large, or larger than some
        bytes; what somebody still reads of it stays."""
        import sqlite3
        try:
            size = os.stat(self.database + "-wal").st_size
        except FileNotFoundError:
            return
        if size > (large or _LARGE_LOG):
            try:
                with self.lock():
                    self._checkpoint()
            except sqlite3.Error as error:          # a full disk: it has only become no smaller
                raise self.failure(error) from None

    def _checkpoint(self):
        db = self.kept or self.connect("rw")
        try:                            # not waiting for readers: writers would wait as long
            db.execute("PRAGMA busy_timeout = 0").close()
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").close()
        finally:
            db.execute(f"PRAGMA busy_timeout = {_PATIENCE * 1000}").close()
            if db is not self.kept:
                db.close()

    def copy_to(self, path, progress=None):
        """Copy the database, as it is at one instant, into a file of its own (0600) whose name ends
        in .db; writers go on meanwhile. `progress(done, total)` is told of its pages.

        A file that is there is removed first, and where this fails. Raises RoexecError.
        """
        import sqlite3
        before, copy = os.umask(0o077), Store(path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        try:
            with contextlib.closing(self.connect("ro")) as db, \
                    contextlib.closing(copy.connect("rwc")) as target:
                db.execute("BEGIN").close()
                check_version(self, db)     # from this look on, one state is what it sees
                db.backup(target, pages=500, progress=progress and (
                    lambda status, left, total: progress(total - left, total)))
                target.execute("PRAGMA journal_mode = DELETE").close()
        except BaseException as error:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            if isinstance(error, sqlite3.Error):
                at_fault = copy if isinstance(error, sqlite3.OperationalError) else self
                raise at_fault.failure(error) from None
            raise
        finally:
            os.umask(before)

    def wake(self):
        """Tell the server, if one is there, that something has changed."""
        try:
            fifo = os.open(self.file("wake"), os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:        # ENXIO: nobody reads; ENOENT: there is no store yet
            if error.errno not in (errno.ENXIO, errno.ENOENT):
                raise
            return
        with contextlib.suppress(BlockingIOError):      # it is full: the server will wake anyway
            os.write(fifo, b"w")
        os.close(fifo)

    def server(self):
        """The process id of the live server of this store; None without one, 0 if unknown."""
        path = self.file("server.lock")
        if not lock_is_held(path):
            return None
        with open(path) as file:
            text = file.readline(20).strip()
        return int(text) if text.isdigit() else 0

    def leave_word(self, trouble):
        """Say, as the server, what keeps it from its work; None takes that back."""
        with contextlib.suppress(OSError), open(self.file("server.lock"), "r+") as file:
            file.truncate(file.write(f"{os.getpid()}\n{trouble or ''}\n"))

    def trouble(self):
        """What keeps the live server from its work, by its own word; None where nothing does."""
        with open(self.file("server.lock")) as file:
            return file.read().partition("\n")[2].strip() or None

    def refusal(self):
        """The error for a store that one may not open: whose it is."""
        path = os.path.abspath(self.folder)
        while True:
            try:
                owner = owner_name(os.stat(path).st_uid)
                break
            except OSError:
                path = os.path.dirname(path)
        return RoexecError(f"{self.path} belongs to {owner}; run as that user, or name another "
                           "store with --store")

    def lock(self):
        """A context: the only writer of this store, among the threads here and on the host."""
        return _StoreLock(self)

    def connect(self, mode, more=""):
        """A connection to the database; `mode` is ro, rw or rwc, as in SQLite's URIs."""
        import sqlite3
        db = None
        try:
            db = sqlite3.connect(f"file:{_quoted(self.database)}?mode={mode}{more}", uri=True,
                                 isolation_level=None, timeout=5, check_same_thread=False)
            db.row_factory = sqlite3.Row
            if mode != "ro":
                db.execute("PRAGMA synchronous = FULL").close()
                db.execute("PRAGMA wal_autocheckpoint = 0").close()
            return db
        except sqlite3.Error as error:
            if db is not None:
                db.close()
            raise self.failure(error) from None

    def failure(self, error):
        """The RoexecError of one of SQLite's."""
        with contextlib.suppress(OSError):
            if self.is_read_only:
                error = os.strerror(errno.EROFS)
        advice = "; see roexec maintenance check" if "malformed" in str(error) else ""
        return StoreFailure(f"the database {self.database}: {error}{advice}")

    def _migrate(self):
        """Bring the database to the newest version, each step in one transaction, after a backup.

        The steps only add, so that what an older roexec has written can always be read.
        """
        import sqlite3
        before, db = os.umask(0o077), None
        try:
            db = self.connect("rwc")
            version = check_version(self, db)
            if version == 0 and db.execute("SELECT 1 FROM sqlite_master").fetchone():
                raise RoexecError(f"{self.database} is a database of something else; name another "
                                  "store with --store")
            if version == 0:
                db.execute("PRAGMA auto_vacuum = INCREMENTAL").close()      # before all else
            elif version < len(_MIGRATIONS):
                self.copy_to(f"{self.database}.version-{version}.db")
            db.execute("PRAGMA journal_mode = WAL").close()
            for number, script in enumerate(_MIGRATIONS[version:], version + 1):
                db.executescript(f"BEGIN IMMEDIATE; {script}; PRAGMA user_version = {number}; "
                                 "COMMIT")
        except sqlite3.Error as error:
            raise self.failure(error) from None
        finally:
            if db is not None:
                db.close()
            os.umask(before)


def _quoted(path):
    """A path for SQLite's URIs; its name may be any bytes."""
    return "".join(f"%{byte:02x}" if byte in b"%?#" or byte > 126 else chr(byte)
                   for byte in os.fsencode(path))


def check_version(store, db):
    """The version of a database; raises RoexecError for one that a newer roexec has made."""
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > len(_MIGRATIONS):
        raise RoexecError(f"the store {store.path} was made by a newer roexec (its version is "
                          f"{version}, this one knows {len(_MIGRATIONS)}); use that one")
    return version


def _check_database_file(store):
    """See to it that a database outside of the private folder is its owner's alone too."""
    parent = os.path.dirname(os.path.abspath(store.path))
    if not os.access(parent, os.W_OK):
        raise RoexecError(f"cannot write into {parent}; name another store with --store")
    try:
        state = os.stat(store.path, follow_symlinks=False)
    except FileNotFoundError:
        return
    if not stat.S_ISREG(state.st_mode):
        raise RoexecError(f"{store.path} is no file; name another store with --store")
    if state.st_uid != os.geteuid():
        raise store.refusal()
    if state.st_mode & 0o077:
        os.chmod(store.path, 0o600)
        store.say(f"{store.path} could be read by others; it is private now (mode 0600)")


class _StoreLock:
    """The flock(2) of `store.lock`, with signals held back.

    It is of an open file of its own, and so excludes threads of one process as well. SQLite up
    to 3.51.2 can corrupt a WAL database when two connections write or checkpoint at the same
    instant (sqlite.org/wal.html, "the WAL-reset bug"). A holder that Ctrl-Z stops would stop every
    start of a run.
    """

    def __init__(self, store):
        self.store = store

    def __enter__(self):
        try:
            self.file = open_private(self.store.file("store.lock"))
        except OSError as error:
            if isinstance(error, PermissionError):
                raise self.store.refusal() from None
            raise RoexecError(f"cannot open {self.store.file('store.lock')}: "
                              f"{error.strerror}") from None
        try:
            self._wait()
        except BaseException:
            os.close(self.file)
            raise
        with contextlib.suppress(OSError):      # the disk is full: then nobody is told who holds it
            os.pwrite(self.file, b"%-10d\n" % os.getpid(), 0)

    def _wait(self):
        deadline, delay = time.monotonic() + _PATIENCE, 0.0005
        while True:
            self.mask = signal.pthread_sigmask(
                signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGTSTP))
            if try_lock(self.file):
                return
            signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)
            if deadline and time.monotonic() > deadline:
                self.store.say(f"waiting for {_holder(self.file)}, which holds "
                               f"{self.store.file('store.lock')}")
                deadline = None
            time.sleep(delay)
            delay = min(delay * 1.5, 0.01)

    def __exit__(self, *_):
        os.close(self.file)             # which gives the lock back
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)


def _holder(descriptor):
    """`process 123 (roexec list jobs)`: who wrote the number into a lock file."""
    number = os.pread(descriptor, 10, 0).strip().decode()
    try:
        with open(f"/proc/{number}/cmdline", "rb") as file:
            words = file.read().decode(errors="replace").split("\0")
        return f"process {number} ({printable(' '.join(words).strip())})"
    except OSError:
        return f"process {number or 'unknown'}"


class _Transaction:
    """What `Store.write` and `Store.read` return."""

    def __init__(self, store, mode):
        self.store, self.mode, self.shared = store, mode, None

    def __enter__(self):
        import sqlite3
        store = self.store
        if not store.exists:
            raise no_store(store)
        if self.mode == "rw":
            self.lock = store.lock()
            self.lock.__enter__()
        try:
            self.db = self._opened()
            self.db.execute("BEGIN IMMEDIATE" if self.mode == "rw" else "BEGIN").close()
        except sqlite3.Error as error:
            self._close()
            raise store.failure(error) from None
        except BaseException:
            self._close()
            raise
        return self.db

    def _opened(self):
        import sqlite3
        store = self.store
        if self.mode == "rw" and store.kept is not None:
            return store.kept
        self.db = store.connect(self.mode)
        try:
            version = check_version(store, self.db)
        except sqlite3.OperationalError:
            if self.mode == "rw" or store.server() is not None:
                raise
            self.db.close()
            self.db = self._opened_as_it_is()
            version = check_version(store, self.db)
        if version < len(_MIGRATIONS):
            raise RoexecError(f"the store {store.path} was made by an older roexec; `roexec "
                              "server` or `roexec apply` bring it up to date")
        return self.db

    def _opened_as_it_is(self):
        """A connection where SQLite cannot make the files that it wants beside the database, as on
        a disk that can only be read, or is full. The lock keeps writers away."""
        store, log = self.store, self.store.database + "-wal"
        with contextlib.suppress(FileNotFoundError):
            self.shared = os.open(store.file("store.lock"), os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(self.shared, fcntl.LOCK_SH)
        if os.path.exists(log) and os.stat(log).st_size and not store.told_of_log:
            store.say(f"the newest changes, in {log}, cannot be read: there is no room beside it, "
                      "or its disk can only be read")
            store.told_of_log = True
        return store.connect("ro", "&immutable=1")

    def __exit__(self, kind, error, _):
        import sqlite3
        try:
            if self.mode == "rw" and not kind:
                self.db.execute("COMMIT").close()
            elif self.db.in_transaction:        # after some errors, SQLite has rolled back itself
                self.db.execute("ROLLBACK").close()
        except sqlite3.Error as problem:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK").close()
            raise self.store.failure(problem) from None
        finally:
            self._close()
        if kind and issubclass(kind, sqlite3.Error):
            raise self.store.failure(error) from None

    def _close(self):
        db = getattr(self, "db", None)
        try:
            if db is not None and db is not self.store.kept:
                db.close()
        finally:
            if self.mode == "rw":
                self.lock.__exit__()
            if self.shared is not None:
                os.close(self.shared)


def put_in_place(new, path):
    """Give a file, once it is on the disk, the name of another: whenever the host stops, one of the
    two is there."""
    _sync(new)
    os.replace(new, path)
    _sync(os.path.dirname(os.path.abspath(path)))


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ==== 9 tables ====================================================================================
# What is asked of the tables of the store, and changed in them: jobs, runs, slots, events, notices,
# tokens. All SQL but that of the schema stands here, in functions of a `db` that work within the
# transaction which `Store.write` or `Store.read` opened.

# Facts about the whole store.

def get_meta(db, key, default=None):
    """A value that the store keeps under a name."""
    row = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return default if row is None else row[0]


def set_meta(db, key, value):
    """Keep a value under a name."""
    db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))


def store_id(db):
    """What tells this store from every other: ten random letters and digits."""
    if get_meta(db, "store") is None:
        set_meta(db, "store", new_run_id())
    return get_meta(db, "store")


def get_settings(db):
    """What the last server was configured with: {"defaults": {…}, "scheduler": {…}}, or None."""
    text = get_meta(db, "settings")
    return None if text is None else json.loads(text)


def set_settings(db, settings):
    """Keep the settings that hold for every client of the store. The slots of jobs that are in
    another zone by them, or enabled or not, count from now on."""
    before = get_settings(db)
    if before is not None and before != settings:
        for row in list_jobs(db):
            job = Job.from_spec(json.loads(row["spec"]))
            if _timing(job, before) != _timing(job, settings):
                set_position(db, row["id"], max(row["position"], time.time()))
    set_meta(db, "settings", json.dumps(settings))
    _next_change(db)


def _timing(job, settings):
    whole = effective(job, settings.get("defaults"))
    return whole.enabled, whole.timezone or (settings.get("scheduler") or {}).get("timezone")


def count_changes(db):
    """A number that grows with each change of a job or of the settings."""
    return get_meta(db, "changes", 0)


def _next_change(db):
    number = count_changes(db) + 1
    set_meta(db, "changes", number)
    return number


# Jobs.

_JOBS = """
SELECT jobs.*, last.id AS last_id, last.state AS last_state, last.started_at AS last_started_at,
       last.finished_at AS last_finished_at,
       (SELECT MAX(state) FROM runs INDEXED BY runs_active WHERE job_id = jobs.id AND
        state IN ('queued', 'running') AND step IS NULL) AS active
FROM jobs LEFT JOIN runs AS last ON last.id = jobs.last_run
"""


def list_jobs(db, after="", limit=-1):
    """Rows of the registered jobs by id, those > `after`, `limit` at most (-1: all)."""
    return db.execute(_JOBS + "WHERE NOT deleted AND jobs.id > ? ORDER BY jobs.id LIMIT ?",
                      (after, limit)).fetchall()


def find_job(db, job_id):
    """The row of a registered job, or None."""
    return db.execute(_JOBS + "WHERE NOT deleted AND jobs.id = ?", (job_id,)).fetchone()


def get_job(db, job_id):
    """The row of a registered job; raises RoexecError that names the nearest id."""
    row = find_job(db, job_id)
    if row is None:
        raise NoSuchJob(f'there is no job "{printable(job_id)}"' + nearest(job_id, job_ids(db)))
    return row


class NoSuchJob(RoexecError):
    """A job that is not registered."""


def job_ids(db):
    """The ids of the registered jobs."""
    return [row[0] for row in db.execute("SELECT id FROM jobs WHERE NOT deleted ORDER BY id")]


def changed_jobs(db, since):
    """Rows (id, spec, paused, position, deleted) of jobs that changed after change `since`."""
    return db.execute("SELECT id, spec, version, paused, position, deleted FROM jobs "
                      "WHERE changed > ?", (since,)).fetchall()


class Change(Value):
    """What applying does to a job: `change` is added, changed, unchanged or removed."""
    __slots__ = ("id", "change", "job", "source")


def plan_apply(db, sources, prune=False):
    """The [Change] that makes the jobs of some sources what is given; nothing is changed yet.

    `sources` is {source: [Job]} in order (a source is a path, or None for `add`). With `prune` jobs
    of these sources that are not given are removed. Raises Taken for a job of another source.
    """
    known = {row["id"]: row for row in db.execute(
        "SELECT id, spec, source FROM jobs WHERE NOT deleted")}
    given = {job.id: source for source, jobs in sources.items() for job in jobs}
    changes, problems = [], []
    for source, jobs in sources.items():
        for job in jobs:
            row = known.get(job.id)
            if row is None:
                changes.append(Change(id=job.id, change="added", job=job, source=source))
            elif row["source"] != source and row["source"] not in sources:
                problems.append(
                    f'job "{job.id}" of {source or "roexec add"} is registered by '
                    f'{row["source"] or "roexec add"}; change it there, or delete it first')
            else:
                same = row["spec"] == json.dumps(job.spec) and row["source"] == source
                changes.append(Change(id=job.id, change="unchanged" if same else "changed",
                                      job=job, source=source))
        if prune:
            changes += [Change(id=job_id, change="removed", source=source)
                        for job_id, row in sorted(known.items())
                        if row["source"] == source and job_id not in given]
    cycle = _would_start_itself(known, changes)
    if problems:
        raise Taken("\n".join(problems))
    if cycle:
        raise StartsItself(cycle)
    return changes


def _would_start_itself(known, changes):
    """A sentence about a pipeline that would start itself once changes are made, or None."""
    jobs = {job_id: Job(json.loads(row["spec"])) for job_id, row in known.items()
            if '"pipeline"' in row["spec"]}
    for change in changes:
        jobs.pop(change.id, None)
        if change.job is not None:
            jobs[change.id] = change.job
    return check_starts(jobs)


class Taken(RoexecError):
    """Jobs that another source has registered."""


class StartsItself(RoexecError):
    """A pipeline that would start itself through other jobs."""


def perform_apply(db, changes, now, by=None):
    """Carry out what `plan_apply` has planned in the same transaction; `now` in UTC seconds, `by`
    the name of the Caller who asks."""
    removed = [change.id for change in changes if change.change == "removed"]
    for change in changes:
        if change.change in ("added", "changed"):
            _put_job(db, change.job, change.source, now)
            _note_change(db, by, "apply", change.id, now, change.change)
    delete_jobs(db, removed, now, by)


def _note_change(db, by, action, job_id, now, detail=None):
    if by is not None:
        add_audit(db, by, action, now, job_id=job_id, detail=detail)


def _put_job(db, job, source, now):
    """Register a job. Slots count from now on where it is new or its schedule is another one."""
    old = db.execute("SELECT * FROM jobs WHERE id = ?", (job.id,)).fetchone()
    spec, version, position, paused = json.dumps(job.spec), 1, now, 0
    if old is not None:
        version, paused = old["version"] + 1, 0 if old["deleted"] else old["paused"]
        before = Job.from_spec(json.loads(old["spec"]))
        same = not old["deleted"] and all(getattr(before, name) == getattr(job, name)
                                          for name in ("schedule", "timezone", "enabled"))
        position = old["position"] if same else max(old["position"], now)
    db.execute("INSERT OR REPLACE INTO jobs VALUES (?, ?, ?, ?, ?, ?, 0, ?, ?)",
               (job.id, spec, version, source, position, paused, _next_change(db),
                old and old["last_run"]))
    db.execute("INSERT INTO versions VALUES (?, ?, ?, ?, ?)",
               (job.id, version, spec, source, now))


def _count(db, job_id, counts, replace=False):
    """Add to counters of a registered job: {(name, label): value}."""
    value = "excluded.value" if replace else "value + excluded.value"
    for (name, label), number in counts.items():
        db.execute("INSERT INTO counters SELECT id, ?, ?, ? FROM jobs WHERE id = ? AND NOT deleted "
                   f"ON CONFLICT (job_id, name, label) DO UPDATE SET value = {value}",
                   (name, label, number, job_id))


def _count_end(db, row, attempts):
    """Count a run that has ended, of its row; steps are parts of one that counts."""
    row = dict(row)
    if row["step"] is not None:
        return
    counts = {("runs", row["state"]): 1}
    if row["state"] == "skipped":
        if row["slot"] is not None:
            counts["skipped", row["reason"]] = 1
    elif duration_of(row, attempts) is not None:
        seconds = duration_of(row, attempts)
        bound = next((str(bound) for bound in BUCKETS if seconds <= bound), "+Inf")
        counts.update({("took", bound): 1, ("seconds", ""): seconds})
    _count(db, row["job_id"], counts)
    if row["state"] == "succeeded" and row["finished_at"] is not None:
        _count(db, row["job_id"], {("success", ""): row["finished_at"]}, replace=True)


def read_counters(db):
    """{job id: {(name, label): value}} of the registered jobs, whole numbers as int. The names are
    runs (by state), took (by bucket), seconds, skipped (by reason) and success (the instant)."""
    counters = {}
    for row in db.execute("SELECT * FROM counters"):
        value = int(row["value"]) if row["value"] == int(row["value"]) else row["value"]
        counters.setdefault(row["job_id"], {})[row["name"], row["label"]] = value
    return counters


def delete_jobs(db, ids, now, by=None):
    """Remove jobs, as `by` asks; history stays, queued runs are cancelled, running ones go on.

    A row remains of each, for its position: a slot that was decided stays so.
    """
    for job_id in ids:
        db.execute("UPDATE jobs SET deleted = 1, changed = ?, position = MAX(position, ?) "
                   "WHERE id = ?", (_next_change(db), now, job_id))
        db.execute("DELETE FROM counters WHERE job_id = ?", (job_id,))
        _note_change(db, by, "delete", job_id, now)
        for run in active_runs(db, job_id):
            if run["state"] == "queued":
                finish_run(db, run["id"], "cancelled", [], reason="user", finished_at=now,
                           message="the job was deleted")


def pause_job(db, job_id, paused, until=None, by=None):
    """Pause the schedule of a job until an instant (UTC seconds), else until it is resumed; or,
    with `paused` false, resume it, as `by` asks -> whether that changed anything."""
    until = (math.inf if until is None else until) if paused else 0
    if get_job(db, job_id)["paused"] == until:
        return False
    db.execute("UPDATE jobs SET paused = ?, changed = ? WHERE id = ?",
               (until, _next_change(db), job_id))
    _note_change(db, by, "pause" if paused else "resume", job_id, time.time())
    return True


def set_position(db, job_id, position):
    """Say that each slot of a job up to an instant (UTC seconds) is decided."""
    db.execute("UPDATE jobs SET position = ? WHERE id = ?", (position, job_id))


# Runs.

def add_run(db, **row):
    """Add a run with these columns -> its id. (job, slot) is unique: a slot never runs twice."""
    names = ", ".join(f'"{name}"' for name in row)
    marks = ", ".join("?" * len(row))
    db.execute(f"INSERT INTO runs ({names}) VALUES ({marks})", tuple(row.values()))
    if row["state"] in FINAL_STATES and row.get("slot") is None:
        _count_end(db, get_run(db, row["id"]), ())
    return row["id"]


def change_run(db, run_id, state, **columns):
    """The one door for a change of state; raises RoexecError for one that is not possible."""
    before = [name for name, following in STATES.items() if state in following]
    columns["state"] = state
    names = ", ".join(f'"{name}" = ?' for name in columns)
    marks = ", ".join("?" * len(before))
    done = db.execute(f"UPDATE runs SET {names} WHERE id = ? AND state IN ({marks})",
                      (*columns.values(), run_id, *before))
    if not done.rowcount:
        row = get_run(db, run_id)
        raise RoexecError(f"run {run_id} is {row['state']} and cannot become {state}")


def finish_run(db, run_id, state, attempts, reason=None, **columns):
    """Take in the end of a run: its final state, the reason, and the rows of its attempts."""
    if reason not in (REASONS.get(state) or (None,)):
        raise RoexecError(f"{reason!r} is no reason for a run to be {state}")
    change_run(db, run_id, state, reason=reason, **columns)
    db.executemany("INSERT OR REPLACE INTO attempts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                   [(run_id, *(attempt.get(name) for name in _ATTEMPT)) for attempt in attempts])
    _count_end(db, get_run(db, run_id), attempts)
    if state != "skipped":
        db.execute("UPDATE jobs SET last_run = ? WHERE id = (SELECT job_id FROM runs WHERE "
                   "id = ? AND step IS NULL)", (run_id, run_id))


_ATTEMPT = ("number", "started_at", "finished_at", "exit_code", "signal", "cpu_seconds",
            "max_rss_bytes", "output_bytes")


def skip_slots(db, job_id, row, now):
    """Record a SlotRow that did not run -> the id of the job's last row, grown, or of a new one."""
    last = newest_slot_row(db, job_id, row.slot - 1)
    if last is not None and (last["state"], last["reason"]) == ("skipped", row.reason):
        if last["last_slot"] >= row.slot:       # counted already, before the clock was set back
            return last["id"]
        db.execute("UPDATE runs SET last_slot = ?, count = count + ?, finished_at = ?, "
                   "message = COALESCE(?, message) WHERE id = ?",
                   (row.last_slot, row.count, now, row.message, last["id"]))
        _count(db, job_id, {("skipped", row.reason): row.count})
        return last["id"]
    _count(db, job_id, {("skipped", row.reason): row.count})
    return add_run(
        db, id=new_run_id(), job_id=job_id, trigger=row.trigger, slot=row.slot,
        last_slot=row.last_slot, count=row.count, state="skipped", reason=row.reason,
        message=row.message, queued_at=now, finished_at=now)


def set_work(db, run_id, name):
    """Say what the scratch folder of a pipeline is called."""
    db.execute("UPDATE runs SET work = ? WHERE id = ?", (name, run_id))


def set_log(db, run_id, path):
    """Say where the log of a run lies, relative to the folder of the store; None: nowhere."""
    db.execute("UPDATE runs SET log = ? WHERE id = ?", (path, run_id))


def ask_to_cancel(db, run_id, reason):
    """Note that a run is to be cancelled, and why, before anybody is told."""
    db.execute("UPDATE runs SET cancel = COALESCE(cancel, ?) WHERE id = ?", (reason, run_id))


def find_run_row(db, run_id):
    """The row of a run, or None."""
    return db.execute("SELECT * FROM runs WHERE id = ?", (run_id,)).fetchone()


def get_run(db, run_id):
    """The row of a run; raises NoSuchRun."""
    row = find_run_row(db, run_id)
    if row is None:
        raise NoSuchRun(f'there is no run "{printable(run_id)}"')
    return row


class NoSuchRun(RoexecError):
    """A run that is not in the store."""


def get_attempts(db, run_id):
    """The rows of a run's attempts, from the first."""
    return db.execute("SELECT * FROM attempts WHERE run_id = ? ORDER BY number",
                      (run_id,)).fetchall()


def active_runs(db, job_id=None):
    """Rows of the queued and running runs that are no steps, of one job or of all, oldest first."""
    chosen, values = ("", ()) if job_id is None else ("AND job_id = ?", (job_id,))
    return db.execute("SELECT * FROM runs INDEXED BY runs_active WHERE state IN ('queued', "
                      f"'running') AND step IS NULL {chosen} ORDER BY seq", values).fetchall()


def queued_runs(db):
    """Rows of the queued runs that are no steps, oldest first."""
    return db.execute("SELECT * FROM runs INDEXED BY runs_active WHERE state IN ('queued', "
                      "'running') AND step IS NULL AND state = 'queued' ORDER BY seq").fetchall()


def count_queued(db):
    """How many runs are queued; steps are not counted."""
    return db.execute("SELECT COUNT(*) FROM runs INDEXED BY runs_active WHERE state IN ('queued', "
                      "'running') AND step IS NULL AND state = 'queued'").fetchone()[0]


def count_running(db, state="running"):
    """{job id: how many of its runs are running, or in another state}."""
    return dict(map(tuple, db.execute("SELECT job_id, COUNT(*) FROM runs WHERE state = ? AND "
                                      "step IS NULL GROUP BY job_id", (state,))))


def count_apart(db):
    """How many running runs take no global place, since a step of a pipeline waits for them."""
    return db.execute("SELECT COUNT(*) FROM runs INDEXED BY runs_active WHERE state IN ('queued', "
                      "'running') AND step IS NULL AND state = 'running' AND parent IS NOT NULL"
                      ).fetchone()[0]


# Steps: runs with a parent and a step. A run of another job that a step asks for has a parent only.

def step_rows(db, run_id):
    """Rows of the steps of a run in order; one that was repeated in the same run comes again."""
    return db.execute("SELECT * FROM runs WHERE parent = ? AND step IS NOT NULL ORDER BY seq",
                      (run_id,)).fetchall()


def remove_steps(db, run_id):
    """Remove the rows of steps that were never begun, of a run that did not come to them."""
    db.execute("DELETE FROM runs WHERE parent = ? AND step IS NOT NULL AND state = 'queued'",
               (run_id,))


def kept_work(db):
    """The names of the scratch folders of runs that are on, or have their logs yet."""
    return {row[0] for row in db.execute(
        "SELECT work FROM runs WHERE work IS NOT NULL AND (log IS NOT NULL OR state IN ('queued', "
        "'running'))")}


def run_of_cause(db, cause):
    """The row of the run that something has asked for, or None."""
    return db.execute("SELECT * FROM runs WHERE cause = ?", (cause,)).fetchone()


def slot_is_known(db, job_id, slot):
    """Whether there is a row for a slot of a job already."""
    return db.execute("SELECT 1 FROM runs WHERE job_id = ? AND slot = ? AND step IS NULL",
                      (job_id, slot)).fetchone() is not None


def chain_length(db, cause):
    """How many runs hooks have started one after the other, up to the one with this `cause`."""
    length = 0
    while cause is not None:
        if run_of_cause(db, cause) is None:
            break
        length += 1
        row = find_run_row(db, cause.partition("/")[0])
        if row and row["step"]:
            row = find_run_row(db, row["parent"])
        cause = row and row["cause"]
    return length


def find_run(db, target):
    """The row of the run that a person means: its id, a job id (its active run, else its newest),
    `latest`, or the beginning of a run's id, 4 characters at least. Raises RoexecError."""
    row = find_run_row(db, target)
    if row is None and target == "latest":
        row = db.execute("SELECT * FROM runs WHERE step IS NULL "
                         "ORDER BY seq DESC LIMIT 1").fetchone()
        if row is None:
            raise NoSuchRun("there are no runs yet")
    return row or newest_run(db, target) or _run_by_prefix(db, target)


def newest_run(db, job_id):
    """The row of a job's active run, else of its newest, of one that was not skipped if there is
    any; None without runs."""
    newest = "SELECT * FROM runs WHERE job_id = ? AND step IS NULL {} ORDER BY seq DESC LIMIT 1"
    return next(iter(active_runs(db, job_id)), None) or db.execute(
        newest.format("AND state != 'skipped'"), (job_id,)).fetchone() or db.execute(
        newest.format(""), (job_id,)).fetchone()


def _run_by_prefix(db, target):
    if target in job_ids(db):
        raise NoSuchRun(f'job "{target}" has no runs yet')
    rows = []
    if len(target) >= 4:
        rows = db.execute("SELECT * FROM runs WHERE id >= ? AND id < ? LIMIT 2",
                          (target, target + "\x7f")).fetchall()
    if len(rows) > 1:
        raise NoSuchRun(f'more than one run id begins with "{printable(target)}"; write more of it')
    if not rows:
        raise NoSuchRun(f'there is no run or job "{printable(target)}"'
                        + nearest(target, job_ids(db)))
    return rows[0]


def list_runs(db, where=(), limit=50, before=None, job_ids=None):
    """Rows of runs, newest first. `where` are (condition, value, …) of `run_filter`; `before` is
    the seq of the last row seen; `job_ids` are those of which runs are wanted, None for all."""
    conditions = [condition for condition, *_ in where] + ["seq < ?"] * (before is not None)
    values = [value for _, *more in where for value in more] + [before] * (before is not None)
    chosen = " AND ".join(conditions) or "1"
    if job_ids is None:
        return db.execute(f"SELECT * FROM runs WHERE {chosen} ORDER BY seq DESC LIMIT ?",
                          (*values, limit)).fetchall()
    rows = _in_parts(db, f"SELECT * FROM runs WHERE {chosen} AND job_id IN ({{}}) "
                         f"ORDER BY seq DESC LIMIT {limit:d}", job_ids, *values)
    return sorted(rows, key=lambda row: -row["seq"])[:limit]


def run_filter(states=None, job_id=None, since=None, until=None, steps=False, *, parent=None,
               triggers=None):
    """The conditions of `list_runs`; `since` and `until` (UTC seconds) mean `queued_at`. With a
    `parent` they are the steps of that run."""
    where = [] if steps or parent is not None else [("step IS NULL",)]
    if parent is not None:
        where.append(("parent = ?", parent))
    if triggers:
        where.append((f'"trigger" IN ({", ".join("?" * len(triggers))})', *triggers))
    if states:              # `+` keeps off the index of states where it would cost a long sort
        plus = "+" if job_id is not None or "succeeded" in states and len(states) > 1 else ""
        where.append((f"{plus}state IN ({', '.join('?' * len(states))})", *states))
    if job_id is not None:
        where.append(("job_id = ?", job_id))
    if since is not None:
        where.append(("queued_at >= ?", since))
    if until is not None:
        where.append(("queued_at < ?", until))
    return where


def usual_durations(db, job_ids):
    """{job id: seconds} that the newest successful runs of jobs took, where there are some."""
    usual = {}
    for job_id in job_ids:
        rows = db.execute("SELECT finished_at - started_at FROM runs WHERE job_id = ? AND "
                          "+state = 'succeeded' AND started_at IS NOT NULL "
                          "ORDER BY seq DESC LIMIT 10", (job_id,)).fetchall()
        if rows:
            usual[job_id] = sorted(row[0] for row in rows)[len(rows) // 2]
    return usual


def paused_in_queue(db, now):
    """The ids of jobs that have queued runs and are paused at an instant (UTC seconds)."""
    return {row[0] for row in db.execute("SELECT DISTINCT job_id FROM runs JOIN jobs ON jobs.id = "
                                         "job_id WHERE state = 'queued' AND paused > ?", (now,))}


# What became of slots.

def newest_slot_row(db, job_id, until=None):
    """The row of a job's newest slot (of those <= `until`: the row that would be about it)."""
    if until is None:
        return db.execute("SELECT * FROM runs WHERE job_id = ? AND slot IS NOT NULL "
                          "ORDER BY seq DESC LIMIT 1", (job_id,)).fetchone()
    return db.execute("SELECT * FROM runs WHERE job_id = ? AND slot <= ? AND step IS NULL "
                      "ORDER BY slot DESC LIMIT 1", (job_id, until)).fetchone()


def runs_on_at(db, job_id, instant):
    """Rows of the runs of a job that were queued or running at an instant, oldest first."""
    return db.execute("SELECT * FROM runs WHERE job_id = ? AND step IS NULL AND state != "
                      "'skipped' AND queued_at <= ? AND (finished_at IS NULL OR finished_at > ?) "
                      "ORDER BY seq", (job_id, instant, instant)).fetchall()


def last_decision(db, row):
    """The instant before the slot of a row at which a server has decided something last, or None:
    what it was about is the row before this one, nearly always."""
    found = db.execute(
        "SELECT queued_at FROM runs WHERE seq < ? AND queued_at <= ? AND \"trigger\" IN "
        "('schedule', 'catch_up') ORDER BY seq DESC LIMIT 1", (row["seq"], row["slot"])).fetchone()
    return found and found[0]


def seen_job_ids(db):
    """The ids of all jobs that are registered or have runs, in order."""
    return [row[0] for row in db.execute("""
        WITH RECURSIVE ran (id) AS (SELECT MIN(job_id) FROM runs UNION ALL
            SELECT (SELECT MIN(job_id) FROM runs WHERE job_id > ran.id) FROM ran
            WHERE id IS NOT NULL)
        SELECT id FROM ran WHERE id IS NOT NULL UNION SELECT id FROM jobs WHERE NOT deleted
        ORDER BY id""")]


def job_spec(db, job_id, version):
    """The spec, as JSON, of a version of a job; None for one that is not there."""
    row = db.execute("SELECT spec FROM versions WHERE job_id = ? AND version = ?",
                     (job_id, version)).fetchone()
    return row and row[0]


def job_versions(db, job_id):
    """[(since, spec as JSON)] of what a job has been, oldest first."""
    return [(row["since"], row["spec"]) for row in db.execute(
        "SELECT since, spec FROM versions WHERE job_id = ? ORDER BY version", (job_id,))]


# Events: what has changed, kept by triggers so that no change is without one.

def event_span(db):
    """(the id of the oldest event that is kept, that of the newest); (1, 0) without any."""
    first, last = db.execute("SELECT MIN(id), MAX(id) FROM events").fetchone()
    return (1, 0) if last is None else (first, last)


def list_events(db, after, limit):
    """Rows (id, job_id, run_id) of the events behind one, in order; run_id is None for a job."""
    return db.execute("SELECT * FROM events WHERE id > ? ORDER BY id LIMIT ?",
                      (after, limit)).fetchall()


def run_rows(db, run_ids):
    """{id: row} of those runs that are there."""
    return {row["id"]: row for row in _in_parts(
        db, "SELECT * FROM runs WHERE id IN ({})", list(run_ids))}


# Answers to requests with a key, so that one that is repeated is not carried out again.

_KEPT_ANSWER = 86400        # seconds


class Repeated(RoexecError):
    """A request with a key that has been answered already, by the run `run_id`; `same` is whether
    it asks for the same."""

    def __init__(self, run_id, same):
        super().__init__(f"this key was used already: run {run_id}")
        self.run_id, self.same = run_id, same


def purge_answers(db, now):
    """Forget the answers that are as old as they may become."""
    db.execute("DELETE FROM answers WHERE at <= ?", (now - _KEPT_ANSWER,))


def keep_answer(db, key, request, run_id, now):
    """Note that a request with a key was answered by a run; raises Repeated where one was."""
    purge_answers(db, now)
    row = db.execute("SELECT run_id, request FROM answers WHERE key = ?", (key,)).fetchone()
    if row is not None:
        raise Repeated(row["run_id"], row["request"] == request)
    db.execute("INSERT INTO answers VALUES (?, ?, ?, ?)", (key, request, run_id, now))


# What holds as long as the database does not change.

class Memo:
    """Values computed from the database that hold as long as nobody has changed it: `most` of them,
    and of those that are large `room` bytes."""

    def __init__(self, store, most=64, room=32 << 20):
        self.store, self.most, self.room = store, most, room
        self._db, self._version, self._values, self._size = None, None, {}, 0
        self._mutex = threading.Lock()

    def version(self):
        """What differs once somebody has committed a change; None where one cannot know."""
        import sqlite3
        with self._mutex:
            try:
                if self._db is None:
                    self._db = self.store.connect("ro")
                version = self._db.execute("PRAGMA data_version").fetchone()[0]
            except (sqlite3.Error, RoexecError):
                self._close()
                return None
            if version != self._version:
                self._version, self._values, self._size = version, {}, 0
            return version

    def get(self, key, now):
        """The value under a key; None where there is none that holds (any more)."""
        if self.version() is None:
            return None
        value, until = self._values.get(key, (None, -math.inf))
        return value if now < until else None

    def keep(self, key, version, value, until, size=0):
        """Keep a value that was computed after `version` was the version, until an instant; `size`
        is how many bytes it has, where these are many."""
        with self._mutex:
            if version is not None and version == self._version and size <= self.room:
                if len(self._values) >= self.most or self._size + size > self.room:
                    self._values, self._size = {}, 0
                self._values[key] = value, until
                self._size += size

    def close(self):
        """Close the connection that it has."""
        with self._mutex:
            self._close()

    def _close(self):
        if self._db is not None:
            self._db.close()
            self._db = None
        self._version, self._values, self._size = None, {}, 0


# The outbox: notices that wait to be sent, and for a while those that were.

_NOTICE = ("id, kind, target, run_id, title, count, state, tries, created_at, tried_at, next_try, "
           "error")


def add_notice(db, kind, target, run_id, body, now, *, title=None, key=None, count=1):
    """Add a notice that is due at once -> its id; None where the run has one with this key.

    `body` (bytes) is what `send_notice` understands. A ping takes the place of those that the same
    run has waiting for the same target: what they would say is not true any more.
    """
    cursor = db.execute(
        "INSERT OR IGNORE INTO outbox (kind, target, run_id, body, created_at, next_try, title, "
        "key, count) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (kind, target, run_id, body, now, now, title, key, count))
    if not cursor.rowcount:
        return None
    if kind == "ping":
        db.execute("UPDATE outbox SET state = 'superseded', body = NULL WHERE kind = 'ping' AND "
                   "run_id = ? AND target = ? AND state = 'waiting' AND id < ?",
                   (run_id, target, cursor.lastrowid))
    return cursor.lastrowid


def due_notices(db, now, limit):
    """Rows, without bodies, of the notices to be sent now, oldest first.

    One that is due in more than three hours was put off before the clock was set back.
    """
    return db.execute(f"SELECT {_NOTICE} FROM outbox WHERE state = 'waiting' AND (next_try <= ? OR "
                      "next_try > ?) ORDER BY id LIMIT ?", (now, now + 3 * 3600, limit)).fetchall()


def next_notice(db):
    """The instant at which the next notice is due, or None."""
    return db.execute("SELECT MIN(next_try) FROM outbox WHERE state = 'waiting'").fetchone()[0]


def begin_notice(db, notice, now, next_try):
    """Count a try of a notice, of which this was the row -> its body.

    It is due again at `next_try`, should nobody say how this try ended. None where somebody else
    has begun or ended it since: whoever sends has begun it, so that each is sent by one alone.
    """
    done = db.execute("UPDATE outbox SET tries = tries + 1, tried_at = ?, next_try = ? WHERE "
                      "id = ? AND tries = ? AND state = 'waiting'",
                      (now, next_try, notice["id"], notice["tries"]))
    return db.execute("SELECT body FROM outbox WHERE id = ?",
                      (notice["id"],)).fetchone()[0] if done.rowcount else None


def notice_sent(db, notice_id):
    """Say that a notice has arrived."""
    db.execute("UPDATE outbox SET state = 'sent', body = NULL, error = NULL WHERE id = ? AND "
               "state = 'waiting'", (notice_id,))


def notice_failed(db, notice_id, now, text, next_try):
    """Say why a try failed, and when the next one is due; None gives the notice up."""
    state = "given_up" if next_try is None else "waiting"
    db.execute("UPDATE outbox SET error = ?, tried_at = ?, next_try = ?, state = ? WHERE id = ? "
               "AND state = 'waiting'", (text, now, next_try, state, notice_id))
    db.execute("UPDATE outbox SET body = NULL WHERE id = ? AND state != 'waiting'", (notice_id,))


def merge_notices(db, notices, now, title, body):
    """Put one notice in the place of several of one target; nothing if any of them has changed."""
    same = [db.execute("SELECT 1 FROM outbox WHERE id = ? AND tries = ? AND state = 'waiting'",
                       (row["id"], row["tries"])).fetchone() for row in notices]
    if None not in same:
        db.executemany("UPDATE outbox SET state = 'merged', body = NULL WHERE id = ?",
                       [(row["id"],) for row in notices])
        add_notice(db, notices[0]["kind"], notices[0]["target"], None, body, now, title=title,
                   count=sum(row["count"] for row in notices))


def unsent_notices(db, limit=100):
    """Rows, without bodies, of notices that wait or were given up, newest first."""
    return db.execute(f"SELECT {_NOTICE} FROM outbox WHERE state IN ('waiting', 'given_up') "
                      "ORDER BY id DESC LIMIT ?", (limit,)).fetchall()


def purge_notices(db, before):
    """Remove notices that were settled and are older than an instant, but not those of runs that
    are still on, since they are what keeps the same notice from being added again."""
    db.execute("DELETE FROM outbox WHERE state != 'waiting' AND created_at < ? AND NOT EXISTS "
               "(SELECT 1 FROM runs WHERE runs.id = run_id AND runs.state IN "
               "('queued', 'running'))", (before,))


# Tokens. What is kept of one is a digest: 192 random bits need no slow hash, and nobody can choose
# a digest, so that the time that the look-up of one takes tells nothing.

def _new_token():
    text = "roexec_" + base64.urlsafe_b64encode(os.urandom(24)).decode()
    return text, _token_digest(text)


def _token_digest(text):
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def already_a_token(name):
    """The Exists of a name that is in use."""
    return Exists(f'there is a token "{name}" already; rotate it, or revoke it first')


def add_token(db, token, creator, now, dry_run=False):
    """Keep a new token, which `token_of` has returned -> its text; `creator` is a Caller.

    Raises Exists. In a dry run that is all that it does.
    """
    if db.execute("SELECT 1 FROM tokens WHERE name = ?", (token["name"],)).fetchone():
        raise already_a_token(token["name"])
    if dry_run:
        return None
    text, digest = _new_token()
    db.execute("INSERT INTO tokens VALUES (?, ?, ?, ?, ?, ?, NULL)",
               (token["name"], digest, ",".join(token["scopes"]), token["pattern"], now,
                token["expires_at"]))
    add_audit(db, creator.name, "token create", now, target=token["name"],
              detail=" ".join([*token["scopes"], *filter(None, [token["pattern"]])]))
    return text


class Exists(RoexecError):
    """Something of this name is there already."""


def renew_token(db, name, creator, now):
    """Give a token a new text -> that; it lasts as long again as it was to. Raises NoSuchToken."""
    row, (text, digest) = get_token(db, name), _new_token()
    expires_at = row["expires_at"] and now + row["expires_at"] - row["created_at"]
    db.execute("UPDATE tokens SET digest = ?, created_at = ?, expires_at = ?, used_at = NULL "
               "WHERE name = ?", (digest, now, expires_at, name))
    add_audit(db, creator.name, "token rotate", now, target=name)
    return text


def remove_token(db, name, caller, now):
    """Remove a token, which is void from then on; raises NoSuchToken."""
    get_token(db, name)
    db.execute("DELETE FROM tokens WHERE name = ?", (name,))
    add_audit(db, caller.name, "token revoke", now, target=name)


def get_token(db, name):
    """The row of a token; raises NoSuchToken that names the nearest one."""
    row = db.execute("SELECT * FROM tokens WHERE name = ?", (name,)).fetchone()
    if row is None:
        names = [row["name"] for row in list_tokens(db)]
        raise NoSuchToken(f'there is no token "{printable(name)}"' + nearest(name, names))
    return row


class NoSuchToken(RoexecError):
    """A token that is not there."""


def find_token(db, text, now):
    """The row of the token with this text, or None; one that has expired is none."""
    return db.execute("SELECT * FROM tokens WHERE digest = ? AND (expires_at IS NULL OR "
                      "expires_at > ?)", (_token_digest(text), now)).fetchone()


def list_tokens(db, after="", limit=-1):
    """Rows of the tokens by name, those > `after`, `limit` at most (-1: all)."""
    return db.execute("SELECT * FROM tokens WHERE name > ? ORDER BY name LIMIT ?",
                      (after, limit)).fetchall()


def note_token_uses(db, uses):
    """Keep when tokens were used last: {name: UTC seconds}."""
    db.executemany("UPDATE tokens SET used_at = ? WHERE name = ?",
                   [(instant, name) for name, instant in list(uses.items())])


# Who has changed what, and when.

_MOST_AUDIT = 100_000   # rows; older ones go


def add_audit(db, who, action, now, **what):
    """Note a change in the transaction that makes it: by whom (the `name` of a Caller), what, when
    (UTC seconds). `job_id`, `target` (a run, a token) and `detail` say more, and no secret."""
    cursor = db.execute(
        "INSERT INTO audit (at, who, action, job_id, target, detail) VALUES (?, ?, ?, ?, ?, ?)",
        (now, who, action, *map(what.get, ("job_id", "target", "detail"))))
    db.execute("DELETE FROM audit WHERE seq <= ?", (cursor.lastrowid - _MOST_AUDIT,))


def list_audit(db, limit, before=None):
    """Rows of the newest changes, newest first; `before` is the seq of the last one seen."""
    return db.execute("SELECT * FROM audit WHERE seq < ? ORDER BY seq DESC LIMIT ?",
                      (math.inf if before is None else before, limit)).fetchall()
# What goes with time. Those who remove much do so in many short transactions.

_SOME = 500             # values in one statement; older versions of SQLite take 999


def _in_parts(db, statement, values, *before):
    """The rows of a statement with `{}` for the marks of some values, for all of them."""
    rows = []
    for start in range(0, len(values), _SOME):
        some = values[start:start + _SOME]
        rows += db.execute(statement.format(", ".join("?" * len(some))), (*before, *some))
    return rows


def jobs_with_limits(db):
    """Rows (id, spec) of the jobs, deleted ones too, that may say themselves what is kept."""
    return db.execute("SELECT id, spec FROM jobs WHERE spec LIKE '%\"history\"%' OR "
                      "spec LIKE '%\"log\"%'").fetchall()


def known_job_ids(db):
    """The ids of all jobs that are, or were, registered."""
    return {row[0] for row in db.execute("SELECT id FROM jobs")}


def ended_runs(db, after, limit, job_id=None, until=None):
    """Rows (seq, id, job_id, queued_at, ended) of runs, no steps, whose seq is > `after`, in order;
    those of a job, with a seq <= `until`. One that is still on has None for `ended`."""
    chosen, values = "", []
    if job_id is not None:
        chosen, values = "AND job_id = ? AND seq <= ?", [job_id, until or 1 << 62]
    return db.execute(
        "SELECT seq, id, job_id, queued_at, COALESCE(last_slot, finished_at) AS ended FROM runs "
        f"WHERE step IS NULL AND seq > ? {chosen} ORDER BY seq LIMIT ?",
        (after, *values, limit)).fetchall()


def newest_seq(db):
    """The seq of the newest run; 0 without any."""
    return db.execute("SELECT COALESCE(MAX(seq), 0) FROM runs").fetchone()[0]


def seq_beyond(db, job_id, number):
    """The seq of the first run of a job, no step, beyond its newest `number`; 0 without one."""
    row = db.execute("SELECT seq FROM runs WHERE job_id = ? AND step IS NULL ORDER BY seq DESC "
                     "LIMIT 1 OFFSET ?", (job_id, number)).fetchone()
    return row[0] if row else 0


def crowded_jobs(db, number, job_id=None):
    """{job id: how many} of the jobs that have more than a number of runs, steps counted."""
    chosen, values = ("", ()) if job_id is None else ("WHERE job_id = ?", (job_id,))
    return dict(map(tuple, db.execute(
        f"SELECT job_id, COUNT(*) FROM runs {chosen} GROUP BY job_id HAVING COUNT(*) > ?",
        (*values, number))))


def kept_runs(db, job_id):
    """The ids of the runs of a job that stay whatever their age: the newest, the newest that was
    not skipped, the newest that failed, and the one that has ended last."""
    newest = "SELECT id FROM runs WHERE job_id = ? AND step IS NULL {} ORDER BY seq DESC LIMIT 1"
    rows = [db.execute(newest.format(which), (job_id,)).fetchone() for which in (
        "", "AND state != 'skipped'", "AND +state IN ('failed', 'timed_out', 'lost')")]
    rows.append(db.execute("SELECT last_run FROM jobs WHERE id = ?", (job_id,)).fetchone())
    return {row[0] for row in rows if row}


def with_steps(db, ids):
    """Ids of runs, and of all their steps."""
    found, ids = list(ids), list(ids)
    while ids:
        ids = [row[0] for row in _in_parts(
            db, "SELECT id FROM runs WHERE parent IN ({}) AND step IS NOT NULL", ids)]
        found += ids
    return found


def logs_of(db, ids):
    """The logs of runs, relative to the folder of the store."""
    return [row[0] for row in _in_parts(
        db, "SELECT log FROM runs WHERE id IN ({}) AND log IS NOT NULL", list(ids))]


def remove_runs(db, ids, dry_run=False):
    """Remove runs that have ended, with their steps -> the ids that are gone, the paths of logs.

    One stays that a run has asked for that is on, which keeps it from being asked for again, and
    one that is being retried, since what its steps have handed on is still needed.
    """
    needed = _being_retried(db)
    ids = [run_id for run_id in ids if run_id not in needed]
    ids = [row[0] for row in _in_parts(
        db, "SELECT id FROM runs WHERE id IN ({}) AND finished_at IS NOT NULL AND (cause IS NULL "
        "OR NOT EXISTS (SELECT 1 FROM runs AS other WHERE other.id = substr(runs.cause, 1, "
        "instr(runs.cause, '/') - 1) AND other.finished_at IS NULL))", with_steps(db, ids))]
    logs = logs_of(db, ids)
    if not dry_run:
        _in_parts(db, "DELETE FROM attempts WHERE run_id IN ({})", ids)
        _in_parts(db, "DELETE FROM runs WHERE id IN ({})", ids)
    return ids, logs


def _being_retried(db):
    """The ids of the runs that active ones are retries of, and of those that these are."""
    found, ids = set(), [row["retry_of"] for row in active_runs(db) if row["retry_of"]]
    while ids:
        found.update(ids)
        rows = _in_parts(db, "SELECT retry_of FROM runs WHERE id IN ({})", ids)
        ids = [row[0] for row in rows if row[0] and row[0] not in found]
    return found


def old_logs(db, before, after, limit):
    """Rows (seq, id, job_id, step, finished_at, log) of runs with a log that ended before an
    instant, from the oldest; `after` is (finished_at, seq) of the last one seen."""
    return db.execute(
        "SELECT seq, id, job_id, step, finished_at, log FROM runs WHERE log IS NOT NULL AND "
        "finished_at < ? AND (finished_at, seq) > (?, ?) ORDER BY finished_at, seq LIMIT ?",
        (before, *after, limit)).fetchall()


def drop_logs(db, ids, text, dry_run=False):
    """Say that runs that have ended, and their steps, have no log any more, and why -> the paths
    of what is to be removed."""
    ids = with_steps(db, ids)
    logs = logs_of(db, ids)
    if not dry_run:
        _in_parts(db, "UPDATE runs SET log = NULL, log_gone = ? WHERE id IN ({}) AND log IS NOT "
                  "NULL", ids, text)
    return logs


def logs_of_job(db, job_id):
    """{path of a log: the instant of the end of its run} of the runs recorded under a job."""
    return dict(map(tuple, db.execute("SELECT log, finished_at FROM runs WHERE job_id = ? AND "
                                      "log IS NOT NULL", (job_id,))))


def logged_runs(db, since=None, job_id=None):
    """The seqs of the runs, steps too, that may have logged something since an instant (UTC
    seconds), of a job or of all, in order of their start."""
    chosen, values = ("", ()) if job_id is None else ("AND job_id = ?", (job_id,))
    every = [f"SELECT started_at, seq FROM runs WHERE {which} {chosen}" for which in (
        "log IS NOT NULL AND finished_at >= ?", "state = 'running'")]
    rows = db.execute(" UNION ALL ".join(every) + " ORDER BY started_at, seq",
                      (-math.inf if since is None else since, *values, *values))
    return array.array("q", (seq for _, seq in rows))


def runs_by_seq(db, seqs):
    """Rows of runs, in the order of their seqs as given."""
    rows = {row["seq"]: row for row in _in_parts(
        db, "SELECT * FROM runs WHERE seq IN ({})", list(seqs))}
    return [rows[seq] for seq in seqs if seq in rows]


def jobs_with_logs(db):
    """The ids under which runs with a log are recorded."""
    return {row[0] for row in db.execute("SELECT DISTINCT job_id FROM runs WHERE log IS NOT NULL")}


def lose_logs(db, job_id, logs, text):
    """Say that logs of runs recorded under a job are gone, and why."""
    _in_parts(db, "UPDATE runs SET log = NULL, log_gone = ? WHERE job_id = ? AND log IN ({})",
              logs, text, job_id)


def lost_runs_without_log(db, job_id, started):
    """The ids of the lost runs of a job of which nobody could say where their log is, and that
    started at an instant (UTC seconds), or some seconds earlier or later."""
    return [row[0] for row in db.execute(
        "SELECT id FROM runs WHERE job_id = ? AND log IS NULL AND log_gone IS NULL AND "
        "+state = 'lost' AND started_at BETWEEN ? AND ?", (job_id, started - 5, started + 5))]


def problems_of(db):
    """What SQLite finds wrong with the database, in its words."""
    import sqlite3
    try:
        found = [row[0] for row in db.execute("PRAGMA integrity_check(20)")]
    except sqlite3.DatabaseError as error:
        return [str(error)]
    return [] if found == ["ok"] else found


def schema_of(db):
    """The definitions of all that is in the database."""
    return {tuple(row) for row in db.execute("SELECT type, name, tbl_name, sql FROM sqlite_master "
                                             "WHERE name NOT LIKE 'sqlite_stat%'")}


def count_rows(db):
    """{"jobs": how many are registered, "runs": how many are recorded}."""
    return {"jobs": len(job_ids(db)),
            "runs": db.execute("SELECT COUNT(*) FROM runs").fetchone()[0]}


def count_free(db):
    """(pages of the database that hold nothing, all pages, bytes of one)."""
    return tuple(db.execute(f"PRAGMA {name}").fetchone()[0]
                 for name in ("freelist_count", "page_count", "page_size"))


def give_back(db, pages):
    """Take some pages that hold nothing from the end of the database file."""
    for _ in range(pages):
        db.execute("PRAGMA incremental_vacuum(1)").close()


# ==== 10 logs =====================================================================================
# One run's log. Each line bears an instant and a tag; of output, OUT or ERR, or OUT~ or ERR~ where
# the newline at its end is the log's own, so that every byte of both streams comes back. Lines are
# written whole and never changed. A full disk stops the log, not the run, and the log says how much
# is missing. Memory is bounded everywhere.
#
# A log is a file, and where that is a quarter of what the log may be large, further parts:
# `<log>.parts/<offset>`, where the offset, 15 digits, is the number of bytes of the log before the
# part. The first and the newest three are kept. So an offset means the same line for ever, and
# where a part begins later than the one before it ends, lines were removed. `StoredLog` alone knows
# where an offset lies; a part may be longer than the distance to the next, which has the same then.

_MOST_KEPT = 1 << 16        # bytes of a line that wait for its end
_READ_BLOCK = 2 << 20       # bytes: more than a chunk and what waited make
_FOLLOW_PAUSE = 0.1         # seconds between looks for new lines
_DISK_TROUBLE = "ENOSPC", "EDQUOT", "EIO"

_OUTPUT_LINE = Pattern(rb"(?m)^.{20} \[(OUT|ERR)(~?)\] (.*\n?)")


class LogWriter:
    """Writes the log of a run, `<folder>/logs/<job id>/<start>.log`, as fast as output comes; that
    of a step is `<start>-<step>.log`.

    Instants are seconds. With `path` it goes on with that log, relative to `folder`, at its end.
    Raises OSError where the log cannot be made, but not for a full or failing disk: then lines are
    lost, `lost` counts the bytes of output among them, and each second it is tried again. `path` is
    where the log lies, relative to `folder`; None until there is room for one. Of a log that grows
    beyond `most` bytes the first quarter and the newest lines are kept.
    """

    def __init__(self, folder, job_id, started, run_id, *, step=None, path=None,
                 most=float("inf")):
        self.path, self.lost = path, 0
        self._folder, self._paths = folder, _log_paths(job_id, started, run_id, step)
        self._descriptor, self._begin, self._size = None, 0, 0     # begin: offset of the last part
        self._most_in_part = most / 4
        self._stream, self._kept = "out", b""
        self._second, self._instant = None, b""
        self._trouble, self._tried, self._missing = None, 0, 0
        try:
            self._open()
        except OSError as error:
            if errno.errorcode.get(error.errno) not in _DISK_TROUBLE:
                raise
            self._trouble, self._tried = error.strerror, started

    @property
    def pending(self):
        """How many bytes of a line wait for its end; who owns the log calls `flush` in time."""
        return len(self._kept)

    @property
    def size(self):
        """How many bytes have been written, those included that were removed since."""
        return self._size

    def write(self, text, now, level="INFO"):
        """Write a line of roexec's own; `level` is INFO or ERROR."""
        self.flush(now)
        self._put(self._line(text, now, level), 0, now)

    def output(self, stream, data, now):
        """Write a chunk (bytes, 1 MiB at most) of "out" or "err"; a line without end waits."""
        if stream != self._stream:
            self.flush(now)
            self._stream = stream
        end = data.rfind(b"\n") + 1
        if end:
            stamp = self._stamp(now, stream.upper())
            kept, self._kept = self._kept, b""
            lines = b"".join((stamp, kept, data[:end])).replace(b"\n", b"\n" + stamp)
            self._put(memoryview(lines)[:-len(stamp)], len(kept) + end, now)
        self._kept += data[end:]
        if len(self._kept) > _MOST_KEPT:
            self.flush(now)

    def flush(self, now):
        """Write what waits for the end of its line, as a piece."""
        if self._kept:
            kept, self._kept = self._kept, b""
            stamp = self._stamp(now, self._stream.upper() + "~")
            self._put(b"".join((stamp, kept, b"\n")), len(kept), now)

    def close(self, now):
        """Write what waits, try once more to say what is missing, and close the file."""
        self._tried = 0
        self.flush(now)
        self._put(b"", 0, now)
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            with contextlib.suppress(OSError):      # it is closed all the same: close(2)
                os.close(descriptor)

    def _stamp(self, now, tag):
        if int(now) != self._second:
            self._second = int(now)
            self._instant = format_instant(self._second).encode()
        return b"%b [%b] " % (self._instant, tag.encode())

    def _line(self, text, now, level):
        return self._stamp(now, level) + printable(text).encode() + b"\n"

    def _put(self, lines, size, now):
        """Write stamped lines that hold `size` bytes of output, or count those as lost."""
        if self._trouble:
            if 0 <= now - self._tried < 1:
                return self._lose(size)
            self._tried = now
            gap = self._line(f"{self._missing} bytes of output are missing here: {self._trouble}",
                             now, "ERROR")
            if self._append(gap) < len(gap):
                return self._lose(size)
            self._trouble, self._missing = None, 0
        written = self._append(lines)
        if written < len(lines):
            self._tried = now
            self._lose(size - len(select_lines(bytes(lines[:written]), raw=True)))

    def _lose(self, size):
        self.lost += size
        self._missing += size

    def _append(self, lines):
        """Write at the end of the file -> how many bytes, whole lines all of them."""
        written = 0
        try:
            if self._descriptor is None:
                self._open()
            while written < len(lines):
                end = written + self._fitting(lines[written:], self._size + written)
                while written < end:
                    written += os.pwrite(self._descriptor, lines[written:end],
                                         self._size + written - self._begin)
        except OSError as error:
            self._trouble = error.strerror
            written = bytes(lines[:written]).rfind(b"\n") + 1
            if self._descriptor is not None:
                with contextlib.suppress(OSError):      # what comes next is written over it
                    os.ftruncate(self._descriptor, self._size + written - self._begin)
        self._size += written
        return written

    def _fitting(self, lines, offset):
        """How many bytes of lines, whole ones, belong into one part; it may have to be begun."""
        room = self._most_in_part - (offset - self._begin)
        if len(lines) <= room:
            return len(lines)
        end = bytes(lines[:max(0, int(room))]).rfind(b"\n") + 1
        if end == 0 and offset > self._begin:
            self._begin_part(offset)
            return self._fitting(lines, offset)
        return end or bytes(lines).index(b"\n") + 1     # one that is longer than a part

    def _begin_part(self, offset):
        descriptor = _make_log(self._folder, _part(self.path, offset), os.O_WRONLY | os.O_CREAT)
        os.close(self._descriptor)
        self._descriptor, self._begin = descriptor, offset
        log = os.path.join(self._folder, self.path)
        for start in _part_offsets(log)[:-3]:
            with contextlib.suppress(OSError):          # tried again with the next part
                os.unlink(_part(log, start))

    def _open(self):
        if self.path:
            self._begin = max(_part_offsets(os.path.join(self._folder, self.path)), default=0)
            last = _part(self.path, self._begin)
            self._descriptor, size = _reopen_log(self._folder, last)
            self._size = self._begin + size
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        for path in self._paths:
            with contextlib.suppress(FileExistsError):
                self._descriptor = _make_log(self._folder, path, flags)
                self.path = path
                return
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)


def _log_paths(job_id, started, run_id, step):
    start = f"logs/{job_id}/{format_instant(int(started)).rstrip('Z')}"
    start += f"-{step}" if step else ""
    return f"{start}.log", f"{start}-{run_id}.log"


def _part(path, offset):
    """The file of a log whose first byte is at an offset."""
    return f"{path}.parts/{offset:015}" if offset else path


def _part_offsets(path):
    """The offsets of the parts of a log behind its first, in order."""
    try:
        return sorted({int(name[:15]) for name in os.listdir(path + ".parts")
                       if name.removesuffix(".gz").isdigit()})
    except FileNotFoundError:
        return []


def _reopen_log(folder, path):
    """The last part of a log that was begun -> its descriptor and size, once a line that lacks its
    end has one."""
    descriptor = _make_log(folder, path, os.O_RDWR | os.O_CREAT)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":     # its writer was killed
            size += os.pwrite(descriptor, b"\n", size)
        return descriptor, size
    except OSError:
        os.close(descriptor)
        raise


def _make_log(folder, path, flags):
    """Open a file below a folder, making the folders on the way where they are missing."""
    try:
        return _open_beneath(folder, path, flags)
    except FileNotFoundError:
        parent = folder
        for name in path.split("/")[:-1]:
            parent = f"{parent}/{name}"
            with contextlib.suppress(FileExistsError):
                os.mkdir(parent, 0o700)
    return _open_beneath(folder, path, flags)


def _open_beneath(folder, path, flags):
    """A descriptor of a file at a path below a folder, with no link on the way; 0600 if new."""
    *parents, name = path.split("/")
    here = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        for parent in parents:
            inner = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC,
                            dir_fd=here)
            os.close(here)
            here = inner
        return os.open(name, flags, 0o600, dir_fd=here)
    except OSError as error:
        error.filename = os.path.join(folder, path)
        raise
    finally:
        os.close(here)


# Reading.

class StoredLog:
    """A log open for reading, whatever its parts; offsets are those of the log as it was written.

    `path` is the first file, whose folder has the parts beside it; `close` it. Raises OSError.
    """

    def __init__(self, path):
        self.path = os.fspath(path)
        self._parts = [(0, _open_part(path))]       # in order of their offsets
        self.refresh()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Close the files."""
        for _, file in self._parts:
            file.close()

    def refresh(self):
        """Know the parts that there are now -> whether any of them is new."""
        offsets, last = _part_offsets(self.path), self._parts[-1][0]
        for offset, file in self._parts[1:]:
            if offset not in offsets:
                self._parts.remove((offset, file))
                file.close()
        for offset in offsets:
            if offset > last:
                with contextlib.suppress(FileNotFoundError):        # it was removed this instant
                    self._parts.append((offset, _open_part(_part(self.path, offset))))
        return self._parts[-1][0] > last

    def end(self):
        """The offset after the last byte."""
        offset, file = self._parts[-1]
        return offset + file.seek(0, os.SEEK_END)

    def read(self, offset, most):
        """(offset, bytes): what is stored from an offset on, `most` at once, none at the end. It is
        a later offset where lines were removed; what follows them is asked for anew."""
        for begin, file in self._parts:
            here = max(offset, begin)
            file.seek(here - begin)
            data = file.read(most)
            if data:
                return here, data
        return offset, b""

    def gaps(self):
        """[(from, to)]: the offsets between which lines were removed."""
        found, end = [], 0
        for begin, file in self._parts:
            if begin > end:
                found.append((end, begin))
            end = max(end, begin + file.seek(0, os.SEEK_END))
        return found

    def size(self):
        """How many bytes are stored, unpacked."""
        return sum(file.seek(0, os.SEEK_END) for _, file in self._parts)

    def extents(self, most):
        """Yield (offset, iterator of blocks) of each part that is to be kept, in order: of a log
        that is larger than `most` bytes, the first quarter and the newest lines."""
        end, ranges = self.end(), [(0, math.inf)]
        if self.size() > most:
            head = self.line_start(most // 4)
            tail = self.line_start(end - max(0, most - head))
            ranges = [(0, head), (max(head, tail), math.inf)]
        bounds = [begin for begin, _ in self._parts] + [math.inf]
        for begin, stop in ranges:
            for first, following in zip(bounds, bounds[1:]):
                low, high = max(first, begin), min(following, stop)
                if low < high and (low == 0 or self._has(low)):
                    yield low, self._blocks(low, high)

    def _has(self, offset):
        here, data = self.read(offset, 1)
        return bool(data) and here == offset

    def _blocks(self, offset, stop):
        while offset < stop:
            here, data = self.read(offset, int(min(_BLOCK, stop - offset)))
            if here != offset or not data:
                return
            yield data
            offset += len(data)

    def line_start(self, offset):
        """The offset of the first line that begins at an offset or after it, or an offset among
        removed lines as it is."""
        if offset <= 0:
            return 0
        if offset >= self.end():        # maybe where no file can have a byte
            return self.end()
        here, block = self.read(offset - 1, _MOST_KEPT)
        if here > offset - 1:
            return offset
        while block:
            end = block.find(b"\n") + 1
            if end:
                return here + end
            here, block = self.read(here + len(block), _MOST_KEPT)
        return self.end()

    def tail(self, lines):
        """The offset of the last `lines` lines, found from the end backwards."""
        wanted = lines + 1
        for begin, file in reversed(self._parts):
            position = file.seek(0, os.SEEK_END)
            while position > 0:
                start = max(0, position - _MOST_KEPT)
                file.seek(start)
                block = file.read(position - start)
                found = block.count(b"\n")
                if found >= wanted:
                    end = len(block)
                    for _ in range(wanted):
                        end = block.rfind(b"\n", 0, end)
                    return self.read(begin + start + end + 1, 1)[0]
                position, wanted = start, wanted - found
        return 0


def _open_part(path):
    def opened(name):
        return open(name, "rb", buffering=0, opener=lambda name, flags: os.open(
            name, flags | os.O_NOFOLLOW | os.O_CLOEXEC))
    try:
        return opened(path)
    except FileNotFoundError as error:
        with contextlib.suppress(FileNotFoundError):
            return _PackedFile(opened(os.fspath(path) + ".gz"))
        raise error


class Lines(Value):
    """Whole lines of a log, `data`, that lie between two offsets; `is_gap` where they are a line
    that stands for lines which were removed."""
    __slots__ = ("begin", "end", "data", "is_gap")


def gap_line(begin, end, data):
    """The line in place of removed ones; it bears the instant of the next line."""
    text = f" [INFO] {end - begin} bytes of the log were removed here: from={begin} to={end}\n"
    return Lines(begin=begin, end=end, data=data[:20] + text.encode(), is_gap=True)


def select_lines(data, raw=False, stream=None):
    """What is asked for of whole lines of a log (bytes): all of it, or output without stamps.

    `raw` gives the bytes of the streams as they were, in the order in which they came; `stream`,
    "out" or "err", those of one alone.
    """
    if not raw and stream is None:
        return data
    wanted = (stream.upper().encode(),) if stream else (b"OUT", b"ERR")
    return b"".join([text[:-1] if piece else text
                     for tag, piece, text in _OUTPUT_LINE.findall(data) if tag in wanted])


def next_lines(log, offset, over, most):
    """[Lines] of a StoredLog from an offset on, none at its end. What only a killed writer leaves,
    a piece that is no whole line, is given once the log is `over`."""
    here, data = log.read(offset, most)
    end = data.rfind(b"\n") + 1
    if over or len(data) == most:
        end = end or len(data)
    if not end:
        return []
    lines = Lines(begin=here, end=here + end, data=data[:end], is_gap=False)
    return [gap_line(offset, here, data), lines] if here > offset else [lines]


def follow(path, ended=lambda: True, *, offset=0, wait=None):
    """Yield Lines of a log from an offset on until it is over, by default what there is now.

    That is once `ended()` is true and all has been read; `wait(seconds)` is called where there is
    nothing to read yet. Raises OSError.
    """
    with StoredLog(path) as log:
        offset, over = log.line_start(offset), False
        while True:
            found = next_lines(log, offset, over, _READ_BLOCK)
            yield from found
            if found:
                offset = found[-1].end
            elif not log.refresh():
                if over:
                    return
                over = ended()
                if not over:
                    wait(_FOLLOW_PAUSE)


_LOG_LINE = Pattern(rb"(?s)(.{20}) \[(OUT|ERR|INFO|ERROR)(~?)\] (.*)")
_ATTEMPT_LINE = Pattern(rb"Attempt (\d+)")


class LogLine(Value):
    """A line of a log, `stored` (bytes, without newline): its `time` (text), `stream` (out, err,
    info or error), `line` (bytes), whether it is `partial`, and the `attempt` it belongs to."""
    __slots__ = ("stored", "time", "stream", "line", "partial", "attempt")


def log_line(stored, last=None):
    """The LogLine of a stored line (bytes, without newline), behind that which came last. Where a
    killed writer has left a part of one, it has the instant of the last."""
    found = _LOG_LINE.fullmatch(stored)
    stamp, tag, piece, line = found.groups() if found else (None, b"INFO", b"", stored)
    number = tag == b"INFO" and _ATTEMPT_LINE.fullmatch(line)
    return LogLine(
        stored=stored, line=line, stream=tag.decode().lower(), partial=bool(piece),
        time=stamp.decode(errors="replace") if stamp else last and last.time,
        attempt=int(number[1]) if number else last and last.attempt)


def read_lines(path, since=None, pattern=None):
    """Yield the LogLines of a log whose instant is not before `since` (UTC seconds) and in whose
    text a compiled pattern (of bytes) finds something. Raises OSError."""
    first, line = "" if since is None else _instant_bytes(since).decode(), None
    for lines in follow(path):
        for stored in lines.data.removesuffix(b"\n").split(b"\n"):
            line = log_line(stored, line)
            if (line.time or "") >= first and (pattern is None or pattern.search(line.line)):
                yield line


def _instant_bytes(since):
    return format_instant(int(since)).encode()


def matching_lines(data, since=None, pattern=None):
    """Those of whole lines of a log (bytes) that `read_lines` would yield."""
    first = b"" if since is None else _instant_bytes(since)
    return b"".join(stored + b"\n" for stored in data.removesuffix(b"\n").split(b"\n")
                    if stored >= first and (
                        pattern is None or pattern.search(stored[stored.find(b"] ") + 2:])))


def newest_lines(path, size):
    """The newest lines of a log, `size` bytes at most."""
    with StoredLog(path) as log:
        begin = log.line_start(log.end() - size)
    return b"".join(lines.data for lines in follow(path, offset=begin))


# Packing. What gzip(1) unpacks, in members of their own for each block, with both sizes in the
# header (RFC 1952, "extra field"), so that an offset is found without unpacking all before it.

_BLOCK = 1 << 20                    # bytes that are packed together
_MEMBER = "<4sIBB H2sH II"          # magic, time, flags, system; extra field: "RX", both sizes
_MAGIC = b"\x1f\x8b\x08\x04"


def _member_of(block):
    """A member: a block of bytes, packed."""
    import zlib
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    body = packer.compress(block) + packer.flush()
    size = struct.calcsize(_MEMBER) + len(body) + 8
    return b"".join((struct.pack(_MEMBER, _MAGIC, 0, 0, 255, 12, b"RX", 8, size, len(block)), body,
                     struct.pack("<II", zlib.crc32(block), len(block))))


class _PackedFile:
    """A packed file as if it were not; it has what is needed of a file: seek, read and close."""

    def __init__(self, file):
        self._file, self._members, self._position = file, [], 0     # members: (offset, place, size)
        self._unpacked = None, b""      # the member that was read last
        self.close = file.close
        try:
            self._end = self._find_members()
        except BaseException:
            file.close()
            raise

    def _find_members(self):
        offset = place = 0
        while True:
            self._file.seek(place)
            head = self._file.read(struct.calcsize(_MEMBER))
            if not head:
                return offset
            if len(head) < struct.calcsize(_MEMBER) or head[:4] != _MAGIC or head[12:14] != b"RX":
                raise self._damaged()
            size, length = struct.unpack(_MEMBER, head)[-2:]
            if size <= len(head) or not 0 < length <= _BLOCK:
                raise self._damaged()
            self._members.append((offset, place, size))
            offset, place = offset + length, place + size

    def _damaged(self):
        return OSError(errno.EIO, "the packed log is damaged", self._file.name)

    def seek(self, offset, whence=os.SEEK_SET):
        """Go to an offset, from the beginning or the end -> the offset from the beginning."""
        self._position = offset + (self._end if whence == os.SEEK_END else 0)
        return self._position

    def read(self, most):
        """The next bytes, fewer than `most` only at the end."""
        pieces = []
        while most > 0 and self._position < self._end:
            number = bisect.bisect(self._members, (self._position, math.inf)) - 1
            skipped = self._position - self._members[number][0]
            piece = self._member(number)[skipped:skipped + most]
            pieces.append(piece)
            self._position += len(piece)
            most -= len(piece)
        return b"".join(pieces)

    def _member(self, number):
        import zlib
        if self._unpacked[0] != number:
            offset, place, size = self._members[number]
            self._file.seek(place)
            unpacker = zlib.decompressobj(31)
            try:
                data = unpacker.decompress(self._file.read(size), _BLOCK + 1)
            except zlib.error:
                raise self._damaged() from None
            following = (*self._members, (self._end, 0, 0))[number + 1][0]
            if not unpacker.eof or offset + len(data) != following:
                raise self._damaged()
            self._unpacked = number, data
        return self._unpacked[1]


class LogFiles(Value):
    """A log on the disk: its `path` relative to the store's folder, its `files` (names relative
    likewise), their `size` in bytes, when it was `written` last, and whether it `is_packed`."""
    __slots__ = ("path", "files", "size", "written", "is_packed")


def list_logs(folder, job_id):
    """({path: LogFiles}, the files that a kill has left half written) of what is recorded under a
    job; the paths are relative to the folder of the store."""
    found, left = {}, []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for entry in os.scandir(os.path.join(folder, "logs", job_id)):
            entries = os.scandir(entry) if entry.name.endswith(".log.parts") else [entry]
            base = entry.name.removesuffix(".gz").removesuffix(".parts")
            for entry in entries:
                name = os.path.relpath(entry.path, folder)
                if entry.name.endswith(".gz.new"):
                    left.append(name)
                elif base.endswith(".log"):
                    found.setdefault(f"logs/{job_id}/{base}", []).append((name, _state(entry)))
    return {path: LogFiles(path=path, files=[name for name, _ in files],
                           size=sum(state.st_size for _, state in files),
                           written=max(state.st_mtime for _, state in files),
                           is_packed=all(name.endswith(".gz") for name, _ in files))
            for path, files in found.items()
            if all(state for _, state in files)}, left


def _state(entry):
    try:
        return entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None


def remove_log(folder, path):
    """Remove a log, a path relative to the store's folder -> how many bytes that has freed."""
    if not _LOG_PATH.fullmatch(path):
        return 0
    log = os.path.join(folder, path)
    files = _stored_files(log)
    for file in files:
        _remove_file(file)
    with contextlib.suppress(OSError):
        os.rmdir(log + ".parts")
    return sum(state.st_size for state in files.values())


_LOG_PATH = Pattern(r"logs/[A-Za-z0-9][A-Za-z0-9._-]{0,63}/[0-9A-Za-z:-]+\.log")


def log_exists(folder, path):
    """Whether a log is there, a path relative to the store's folder."""
    return bool(_stored_files(os.path.join(folder, path)))


def start_of_log(path):
    """(the instant, UTC seconds; the id of the run or "") that the name of a log says."""
    name = os.path.basename(path).removesuffix(".log")
    return parse_instant(name[:19] + "Z", None), name[20:]


def size_of_log(folder, path):
    """How many bytes of the disk a log takes, a path relative to the store's folder."""
    return sum(state.st_size for state in _stored_files(os.path.join(folder, path)).values())


def _stored_files(log):
    """{path: its state} of the files of a log."""
    found = {}
    for offset in (0, *_part_offsets(log)):
        for path in (_part(log, offset), _part(log, offset) + ".gz"):
            with contextlib.suppress(FileNotFoundError):
                found[path] = os.stat(path, follow_symlinks=False)
    return found


def _remove_file(path):
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def pack_log(folder, path, most):
    """Pack the log of a run that has ended; of one that is larger than `most` bytes the first
    quarter and the newest lines stay -> how many bytes that has freed.

    A kill loses nothing: what is new has its name before what is old goes. Raises OSError.
    """
    name = os.path.join(folder, path)
    with StoredLog(name) as log:
        before = _stored_files(name)
        written = max(state.st_mtime for state in before.values())
        if log.size() <= most and all(file.endswith(".gz") for file in before):
            return 0
        made = {}                       # {path of a part: the file that is to have its name}
        try:
            for offset, blocks in log.extents(most):
                part = _part(name, offset) + ".gz"
                made[part] = part + ".new"
                _write_packed(made[part], blocks, written)
            for part, new in made.items():
                os.replace(new, part)
        except BaseException:
            for new in made.values():
                _remove_file(new)
            raise
    for file in before:
        if file not in made:
            _remove_file(file)
    with contextlib.suppress(OSError):
        os.rmdir(name + ".parts")
    return sum(state.st_size for state in before.values()) - sum(
        os.stat(file).st_size for file in made)


def _write_packed(path, blocks, written):
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    with open(path, "wb", opener=lambda name, flags: os.open(
            name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)) as file:
        for block in blocks:
            file.write(_member_of(block))
        file.flush()
        os.fsync(file.fileno())
    os.utime(path, (written, written))


# The server's own log.

_OLD_SERVER_LOGS = 7


class ServerLog:
    """The log of a server: `log(text, level, at)` writes a line; `at` is an instant other than now.

    It goes to standard error, else to the file `path`, which is a new one each day (UTC); those of
    the last seven days stay beside it as `<path>.<day>`. What cannot be written ends no server.
    """

    def __init__(self, path=None):
        self._path, self._file, self._day, self._lock = path, None, "", threading.Lock()

    def __call__(self, text, level="INFO", at=None):
        instant = format_instant(int(time.time() if at is None else at))
        line = f"{instant} [{level}] {printable(text)}\n"
        if self._path is not None:
            try:
                with self._lock:
                    self._see_file(instant[:10])
                    os.write(self._file, line.encode())
                return
            except OSError as error:
                line = f"{line[:-1]} (cannot write {self._path}: {error.strerror})\n"
        with contextlib.suppress(OSError):      # whoever read it has gone; the jobs still run
            sys.stderr.write(line)
            sys.stderr.flush()

    def _see_file(self, day):
        """See to it that the file is open, is the one that has the name, and is of this day."""
        if self._file is None:
            self._open(day)
        if day > self._day:
            os.replace(self._path, f"{self._path}.{self._day}")
            self._remove_old()
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._file), os.stat(self._path)):
                return
        os.close(self._file)            # somebody else has moved it, as logrotate(8) does
        self._file = None
        self._open(day)

    def _open(self, day):
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._file = os.open(self._path, flags, 0o640)
        state = os.fstat(self._file)
        self._day = format_instant(int(state.st_mtime))[:10] if state.st_size else day

    def _remove_old(self):
        folder, name = os.path.split(os.path.abspath(self._path))
        old = sorted(other for other in os.listdir(folder)
                     if other.startswith(name + ".") and _DATED.fullmatch(other[len(name) + 1:]))
        for other in old[:-_OLD_SERVER_LOGS]:
            os.unlink(os.path.join(folder, other))


_DATED = Pattern(r"\d{4}-\d\d-\d\d")


# ==== 11 secrets ==================================================================================
# What a run gets from elsewhere when it starts (env_from: files, the server's environment, a
# command, Vault), and masks that keep those values out of all that is written about it. A source
# gives what it says, or the run does not start. No error holds a value. A secret of Vault is there
# within ten seconds, or it is an error.

_TIME_FOR_A_SECRET = 10                 # seconds, from the first look-up of a name to the last byte
_LEAST_MASKED = 8                       # characters; shorter values that are no secrets are shown
_MOST_READ = 1 << 20                    # bytes of a file, of what a command prints, of an answer
_LONGEST_VARIABLE = 128 << 10           # bytes with its name and a NUL: execve(2)


class SecretError(RoexecError):
    """A source of env_from that gives nothing; its text never holds a value."""


def resolve_environment(entries, *, vault, user_home, environment, directory, run_command,
                        owner=None, is_cancelled=lambda: False):
    """The variables of env_from (dict) and the values among them to mask (set of str).

    `entries` are mappings as Job.env_from has them; of two with one name the later wins. `vault`
    is the spec of VaultSettings or None, `environment` the server's, `run_command(command)` gives
    what a command has printed (bytes) or raises RoexecError. Relative paths count from
    `directory`, `~` is `user_home`. Files belong to root, to this process's user, or to `owner` (a
    uid: the user of the job), and nobody else may write them. `is_cancelled()` is asked while
    Vault is waited for. Raises SecretError.
    """
    owners = {0, os.geteuid(), owner}
    client = _Vault(vault and VaultSettings(vault), owners, is_cancelled)
    variables, masked = {}, set()
    for entry in entries:
        kind = next(name for name in ("file", "host", "command", "secret") if name in entry)
        if kind == "file":
            found = _from_file(entry, user_home, directory, owners)
        elif kind == "host":
            found = _from_host(entry["host"], environment)
        elif kind == "command":
            found = _variables_in(run_command(entry["command"]), "the command of env_from")
        else:
            found = _from_vault(entry, client)
        least = 1 if kind == "secret" else _LEAST_MASKED
        for name, value in found.items():
            _check_variable(name, value, kind)
        variables.update(found)
        masked.update(value for value in found.values() if len(value) >= least)
    return variables, masked


def _check_variable(name, value, kind):
    """Raises SecretError for what execve(2) would not take, or roexec sets itself."""
    if not name or "=" in name or any(char.isspace() or char == "\0" for char in name):
        raise SecretError(f'a {kind} of env_from has "{printable(name)}", which cannot be the '
                          "name of a variable; take that key alone, with as: NAME")
    if name.startswith("ROEXEC_"):
        raise SecretError(f"a {kind} of env_from sets {name}, which roexec sets itself")
    try:
        size = len(os.fsencode(name + value)) + 2
    except UnicodeEncodeError:          # half of a surrogate pair
        size = None
    if "\0" in value or size is None:
        raise SecretError(f"{name} of env_from holds a character that no variable can have")
    if size > _LONGEST_VARIABLE:
        raise SecretError(f"{name} of env_from is longer than a variable can be (128 KiB)")


def _from_host(names, environment):
    names = [names] if isinstance(names, str) else names
    missing = [name for name in names if name not in environment]
    if missing:
        raise SecretError(f"the server's environment has no {', '.join(missing)}, which env_from "
                          "takes from it")
    return {name: environment[name] for name in names}


# Files of variables.

def _from_file(entry, user_home, directory, owners):
    path = entry["file"]
    if path == "~" or path.startswith("~/"):
        path = user_home + path[1:]
    path = os.path.join(directory or "/", path)
    try:
        return _variables_in(_read_trusted(path, owners), path)
    except FileNotFoundError:
        if entry.get("optional"):
            return {}
        raise SecretError(f"the file {printable(path)} of env_from does not exist; write "
                          "optional: true if it may be missing") from None
    except OSError as error:
        raise SecretError(f"the file {printable(path)} of env_from cannot be read: "
                          f"{error.strerror}") from None


def _read_trusted(path, owners):
    """The bytes of a file that only `owners` may change; raises OSError or SecretError."""
    def opener(name, flags):
        return os.open(name, flags | os.O_NONBLOCK | os.O_CLOEXEC)      # a FIFO would wait

    with open(path, "rb", opener=opener) as file:
        found, shown = os.fstat(file.fileno()), printable(path)
        if not stat.S_ISREG(found.st_mode):
            raise SecretError(f"{shown} is no regular file")
        if found.st_mode & 0o022:
            raise SecretError(f"others may write {shown}; chmod go-w {shlex.quote(shown)}")
        if found.st_uid not in owners:
            raise SecretError(f"{shown} belongs to {owner_name(found.st_uid)}, who may change it; "
                              f"chown root {shlex.quote(shown)}")
        return _bounded(file.read(_MOST_READ + 1), shown)


def _bounded(data, what):
    if len(data) > _MOST_READ:
        raise SecretError(f"{what} holds more than {format_size(_MOST_READ)}")
    return data


# Lines of `NAME=VALUE`, as systemd.exec(5) has them in an EnvironmentFile, less what other readers
# of such files take otherwise: that is refused, since nobody could tell which was meant.
#
# - Empty lines, and lines that begin with `#` or `;`, are skipped. `export` may stand before a
#   name, blanks around the name and the value.
# - A bare value is what stands up to the end of the line, as it is. A backslash, or a `#` after a
#   blank, belongs into quotes.
# - In 'single quotes' all is as it is, over several lines too; there is no ' in it.
# - In "double quotes" a backslash stands before " \ $ ` or the end of a line, which it removes;
#   any other is refused.
# - Nothing is expanded. Behind a closing quote there are only blanks. Of two lines with one name
#   the later wins. Lines may end in CR LF. The text is UTF-8.

_NO_VARIABLE = Pattern(r"[ \t]*(?:[#;].*)?(?:\n|\Z)")
_VARIABLE_LINE = Pattern(r"""[ \t]*(?:export[ \t]+)?([A-Za-z_][\w.-]*)[ \t]*=[ \t]*
    (?: '([^']*)' | "((?:[^"\\]|\\.)*)" | ([^'"\s][^\n]*)? ) [ \t]*(?:\n|\Z)""", "asx")
_ASSIGNED_NAME = Pattern(r"[ \t]*(?:export[ \t]+)?([A-Za-z_][\w.-]*)[ \t]*=", "a")
_ESCAPE = Pattern(r"\\(.)", "s")
_AMBIGUOUS = Pattern(r"\\|[ \t]#")


def _variables_in(data, where):
    """The variables in bytes of such lines; raises SecretError, without a word of the lines."""
    where = printable(where)
    try:
        text = _bounded(data, where).decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise SecretError(f"{where} is not in UTF-8") from None
    variables, position = {}, 0
    while position < len(text):
        found = _NO_VARIABLE.match(text, position)
        if not found:
            try:
                found = _VARIABLE_LINE.match(text, position) or _no_line(text, position)
                variables[found[1]] = _value_of(*found.groups())
            except ValueError as error:
                line = text.count("\n", 0, position) + 1
                raise SecretError(f"{where}:{line}: {error}") from None
        position = found.end()
    return variables


def _no_line(text, position):
    name = _ASSIGNED_NAME.match(text, position)
    if name:
        raise ValueError(f"the quotes of {name[1]} do not end, or something stands behind them; "
                         "for a value with quotes in it use the other kind of quotes")
    raise ValueError("this is no NAME=VALUE line; a value of several lines stands in quotes")


def _value_of(name, single, double, bare):
    if single is not None:
        return single
    if bare is not None:
        if _AMBIGUOUS.search(bare):
            raise ValueError(f"{name} has a backslash or a # after a blank; put the value in "
                             "single quotes")
        return bare.rstrip(" \t")
    if any(char not in '"\\$`\n' for char in _ESCAPE.findall(double or "")):
        raise ValueError(f"{name} has a backslash that is read in several ways; put the value in "
                         "single quotes")
    return _ESCAPE.sub(lambda escape: escape[1].strip("\n"), double or "")


# Masks.

_MASK = b"***"
_WORD = rb"[0-9A-Za-z_\x80-\xff]"
_LEAST_ANYWHERE = 4                     # bytes; shorter values are masked where they stand alone
_LEAST_LINE = 8                         # characters of a line of what has several
_BASE64_LINE = 76                       # characters of a line, RFC 2045
_BY_FREQUENCY = (b"\n etaoinsrlhdcumpfgybw0123456789.:/-=_\"vk"      # about as logs have them
                 b"TESIANRDOLCMPBFGUxHWYVjqzKXJZQ")


class Masks:
    """Replaces values by *** before they are written, also where chunks of output divide them.

    Each value is masked as it is (less blanks around it), in base64, as URLs and JSON have it, and
    line by line where it has several (of 8 characters or more). Of overlapping ones the first, then
    the longest counts. A value of up to 3 bytes is masked only where no letter, digit or _ adjoins:
    else a password "1" would make every log unreadable. Time is linear in the output.
    """

    def __init__(self, values=()):
        forms = {form for value in values for form in _forms_of(value) if form}
        short = {form for form in forms if len(form) < _LEAST_ANYWHERE}
        whole = sorted(forms, key=lambda form: (-len(form), form))
        self._pattern = Pattern(b"|".join(
            (rb"(?<!%b)%b(?!%b)" % (_WORD, re.escape(form), _WORD)) if form in short
            else re.escape(form) for form in whole))
        # In what holds a form is one of these, and first of all its rarest byte: that is looked for
        # in a tenth of the time, and in most logs it is missing.
        self._probes = {}               # rarest byte -> forms with no other form in them
        for form in whole:
            if not any(other in form for other in forms if len(other) < len(form)):
                self._probes.setdefault(bytes([max(form, key=_rarity)]), []).append(form)
        # What is kept back until more has come: the beginning of a form, and a short one as a
        # whole, since what comes next may adjoin.
        self._awaited = sorted(form + b"\0" if form in short else form for form in forms)
        self._longest = max(map(len, self._awaited), default=0)
        heads = {}                      # first byte -> what follows, up to 4 bytes in all
        for form in self._awaited:
            heads.setdefault(form[:1], set()).update(
                re.escape(form[1:size]) + (rb"\Z" if size < 4 else b"")
                for size in range(1, min(5, len(form))))
        self._heads = Pattern(b"|".join(re.escape(first) + b"(?=%b)" % b"|".join(sorted(more))
                                        for first, more in heads.items()))
        self._streams = {}              # name -> the byte before, what is kept back

    def feed(self, stream, data):
        """What can be written now of the output of a stream, of which `data` (bytes) has come.

        Kept back is the beginning of a value, less than the longest has (or a whole one of up to
        3 bytes), until what follows has come or `flush` says that nothing will.
        """
        if not self._probes:
            return data
        before, kept = self._streams.get(stream, (b"", b""))
        data = b"".join((before, kept, data))
        masked, end = self._mask(data, len(before), False)
        self._streams[stream] = data[max(0, end - 1):end], data[end:]
        return masked

    def flush(self, stream):
        """What was kept back of a stream, at its end; before that it would give a value away."""
        before, kept = self._streams.pop(stream, (b"", b""))
        return self._mask(before + kept, len(before), True)[0]

    def text(self, text):
        """A whole text (str) with the values masked."""
        if not self._probes:
            return text
        data = text.encode("utf-8", "surrogateescape")
        return self._mask(data, 0, True)[0].decode("utf-8", "surrogateescape")

    def _mask(self, data, position, is_all):
        """(data from `position` on, masked, up to where it may be written; that place)."""
        end = len(data) if is_all else self._written_up_to(data, position)
        pieces = []
        if any(form in data for rarest, forms in self._probes.items() if rarest in data
               for form in forms):
            for found in self._pattern.finditer(data, position):
                if found.start() >= end:
                    break
                pieces += data[position:found.start()], _MASK
                position = found.end()
                if position > end:
                    end = self._written_up_to(data, position)
        pieces.append(data[position:end])
        return b"".join(pieces), end

    def _written_up_to(self, data, position):
        """Where the first beginning of a form stands that goes on behind the data."""
        for found in self._heads.finditer(data, max(position, len(data) - self._longest + 1)):
            rest = data[found.start():]
            place = bisect.bisect_right(self._awaited, rest)
            if place < len(self._awaited) and self._awaited[place].startswith(rest):
                return found.start()
        return len(data)


def _rarity(byte):
    return _BY_FREQUENCY.find(byte) % 256       # what is not listed is the rarest


def _forms_of(value):
    """What a value looks like in output (set of bytes)."""
    import urllib.parse
    text = value.strip()
    data = text.encode("utf-8", "surrogateescape")
    forms = {data}
    if len(data) < _LEAST_ANYWHERE:
        return forms
    for quoted in (urllib.parse.quote(data, ""), urllib.parse.quote(data),
                   urllib.parse.quote_plus(data)):
        forms |= {quoted.encode(), _HEX_PAIR.sub(lambda found: found[0].lower(), quoted).encode()}
    for ascii_only in (True, False):
        forms.add(json.dumps(text, ensure_ascii=ascii_only)[1:-1].encode(errors="surrogateescape"))
    forms |= _base64_of(data)
    lines = text.splitlines()
    if len(lines) > 1:
        forms |= {line.strip().encode("utf-8", "surrogateescape") for line in lines
                  if len(line.strip()) >= _LEAST_LINE}
    return forms


def _base64_of(data):
    """Base64 of bytes, alone and as the beginning of more (`echo` adds a newline), on one line or
    several."""
    forms, encoded = set(), base64.b64encode(data)
    for whole in (encoded, encoded.rstrip(b"="), encoded[:len(data) * 4 // 3]):
        for each in (whole, whole.translate(bytes.maketrans(b"+/", b"-_"))):
            forms.add(each[:_BASE64_LINE])
            forms |= {each[start:start + _BASE64_LINE]
                      for start in range(_BASE64_LINE, len(each) - _LEAST_LINE + 1, _BASE64_LINE)}
    return forms


_HEX_PAIR = Pattern(r"%[0-9A-F]{2}")


# Vault (and OpenBao): its HTTP API, versions 1 and 2 of the key-value engine.

_TRY_AGAIN = {412, 429, 500, 502, 503, 504}
_REDIRECTS = {301, 302, 307, 308}


def _from_vault(entry, client):
    path, _, key = entry["secret"].removeprefix("vault://").partition("#")
    found = client.read(path)
    if not key:
        return {name: _text_of(value, name, path) for name, value in found.items()}
    if key not in found:
        keys = ", ".join(map(printable, sorted(found))) or "no keys at all"
        raise SecretError(f'vault://{path} has no key "{key}"; it has {keys}{nearest(key, found)}')
    return {entry.get("as") or key: _text_of(found[key], key, path)}


def _text_of(value, key, path):
    if isinstance(value, bool):
        return json.dumps(value)
    if not isinstance(value, str):
        kind = {dict: "a mapping", list: "a list"}.get(type(value), "null")
        raise SecretError(f'the key "{printable(key)}" of vault://{path} is {kind}, not a text; '
                          "take the other keys one by one")
    return value


class _Vault:
    """What one run asks of Vault; each secret is read once, with one token."""

    def __init__(self, settings, owners, is_cancelled):
        self.settings, self.owners, self.is_cancelled = settings, owners, is_cancelled
        self.token, self.hidden, self.found, self.deadline = None, [], {}, None

    def read(self, path):
        """{key: value} of a secret, numbers as they are written. Raises SecretError."""
        if self.settings is None:
            raise SecretError(f"vault://{path} is asked for, and the configuration has no vault:")
        if path not in self.found:
            self.deadline = time.monotonic() + _TIME_FOR_A_SECRET
            self.found[path] = self._in_time(lambda: self._read(path))
        return self.found[path]

    def _in_time(self, function):
        """What a function returns. It works in a thread, as nothing else bounds a name service."""
        results = []

        def work():
            try:
                results.append((function(), None))
            except BaseException as error:      # it is raised below
                results.append((None, error))

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        while thread.is_alive() and time.monotonic() < self.deadline + 0.5:
            thread.join(0.1)
            if self.is_cancelled():
                raise SecretError("the run was cancelled while it waited for Vault")
        if not results:
            raise self._silent("it took too long")
        value, error = results[0]
        if error is not None:
            raise error
        return value

    def _silent(self, why):
        return SecretError(f"Vault at {self.settings.address} does not answer within "
                           f"{_TIME_FOR_A_SECRET}s: {Masks(self.hidden).text(printable(why))}")

    # Secrets.

    def _read(self, path):
        if self.token is None:
            self.token = self._log_in()
            self.hidden.append(self.token)
        place = path if "/data/" in path else self._place_of(path)
        status, answer = self._ask("GET", place)
        data = answer.get("data")
        if isinstance(data, dict) and data.keys() == {"data", "metadata"} and (
                isinstance(data["metadata"], dict) and "version" in data["metadata"]):
            data, metadata = data["data"], data["metadata"]
            if data is None:
                verb = "destroyed" if metadata.get("destroyed") is True else "deleted"
                raise SecretError(f"the newest version of vault://{path} has been {verb}")
        if status >= 300:
            raise SecretError(self._refusal(status, answer, path, place))
        if not isinstance(data, dict):
            raise SecretError(f"Vault at {self.settings.address} answers for vault://{path} with "
                              "what is no secret; is that address Vault's?")
        return data

    def _place_of(self, path):
        """Where a secret is read: as `vault kv` does, the mount is asked whether it has versions.

        Where Vault does not tell, the path is taken as it is.
        """
        status, answer = self._ask("GET", "sys/internal/ui/mounts/" + path)
        mount = answer.get("data") if status == 200 else None
        if not isinstance(mount, dict) or not isinstance(mount.get("path"), str):
            return path
        root, options = mount["path"].strip("/") + "/", mount.get("options")
        versioned = isinstance(options, dict) and options.get("version") == "2"
        return f"{root}data/{path[len(root):]}" if versioned and path.startswith(root) else path

    def _log_in(self):
        settings = self.settings
        if settings.token_file is not None:
            return self._credential(settings.token_file, "token_file")
        secret_id = self._credential(settings.secret_id_file, "secret_id_file")
        self.hidden.append(secret_id)
        status, answer = self._ask("POST", "auth/approle/login",
                                   {"role_id": settings.role_id, "secret_id": secret_id})
        if status in (400, 403):
            raise SecretError(f"Vault refuses the login: {self._reasons(answer)}; look at role_id "
                              f"of vault and at {printable(settings.secret_id_file)}")
        if status >= 300:
            raise SecretError(self._refusal(status, answer, None, "auth/approle/login"))
        auth = answer.get("auth")
        token = auth.get("client_token") if isinstance(auth, dict) else None
        if not isinstance(token, str) or not _CREDENTIAL.fullmatch(token):
            raise SecretError(f"Vault at {settings.address} answers a login without a token")
        return token

    def _credential(self, path, name):
        """What a file of the configuration holds; it goes into a header, so it is checked here."""
        try:
            text = _read_trusted(path, self.owners).decode("ascii", "replace").strip()
        except OSError as error:
            raise SecretError(f"the {name} of vault, {printable(path)}, cannot be read: "
                              f"{error.strerror}") from None
        if not _CREDENTIAL.fullmatch(text):
            raise SecretError(f"the {name} of vault, {printable(path)}, holds no token or id alone")
        return text

    # What Vault says when it gives nothing.

    def _reasons(self, answer):
        """Vault's own words, without credentials that a proxy may have put there."""
        errors = answer.get("errors")
        text = "; ".join(map(str, errors)) if isinstance(errors, list) else ""
        return Masks(self.hidden).text(printable(" ".join(text.split()))[:300])

    def _refusal(self, status, answer, path, place):
        """A sentence about an answer that is none."""
        reasons, at = self._reasons(answer), f"Vault at {self.settings.address}"
        if status == 403:
            return (f'{at} refuses to read {place}: {reasons or "permission denied"}; the token '
                    f'needs a policy with the capability "read" on the path "{place}", and must '
                    "not have expired")
        if status == 404:
            return self._nothing_there(answer, path)
        if "seal" in reasons or "not initialized" in reasons:
            return f"{at} is sealed or not initialized ({reasons}); it has to be unsealed"
        if "standby" in reasons or "not active" in reasons:
            return f"{at} is a standby that finds no active node ({reasons})"
        if status == 429:
            return f"{at} has too many requests (429): a rate limit quota, or a standby"
        about = f" for vault://{path}" if path else ""
        return f"{at} answers {status}{about}: {reasons or 'without a reason'}"

    def _nothing_there(self, answer, path):
        if "no handler for route" in self._reasons(answer):
            space = self.settings.namespace
            where = f"the namespace {space}" if space else "the root namespace; is one missing?"
            return f"no secrets engine is mounted for vault://{path} in {where}"
        if "versioned" in str(answer.get("warnings")):
            return (f"vault://{path} lies in an engine of version 2; write data/ behind the name "
                    "of its mount, for example vault://secret/data/x")
        return f"there is no secret vault://{path}"

    # HTTP.

    def _ask(self, method, path, body=None):
        """(status, answer) of a request; what may pass is tried again until the deadline."""
        import http.client
        pause = 0.1
        while True:
            try:
                status, answer = self._follow(method, path, body)
                if status not in _TRY_AGAIN or time.monotonic() + pause >= self.deadline:
                    return status, answer
            except (OSError, http.client.HTTPException, ValueError) as error:
                why = self._trouble(error)
                if time.monotonic() + pause >= self.deadline:
                    raise self._silent(why) from None
            time.sleep(pause)
            pause = min(2 * pause, 2)

    def _trouble(self, error):
        """What kept an answer away; raises SecretError where trying again is useless."""
        at = f"Vault at {self.settings.address}"
        if hasattr(error, "verify_message"):        # ssl.SSLCertVerificationError
            raise SecretError(f"{at} has a certificate that cannot be trusted "
                              f"({error.verify_message}); ca of vault names the file with the "
                              "certificate of its authority") from None
        if type(error).__module__ == "ssl":
            raise SecretError(f"{at} does not speak TLS as it should ({error.reason})") from None
        if isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN:
            raise SecretError(f"{at} cannot be found: {error.strerror}") from None
        return getattr(error, "strerror", None) or str(error) or type(error).__name__

    def _follow(self, method, path, body):
        """(status, answer) after redirects within this address: the token goes nowhere else."""
        import urllib.parse
        target = "/v1/" + urllib.parse.quote(path)
        for _ in range(4):
            status, location, data = self._exchange(method, target, body)
            if status not in _REDIRECTS:
                return status, _answer_of(data)
            here = urllib.parse.urlsplit(self.settings.address)
            there = urllib.parse.urlsplit(urllib.parse.urljoin(self.settings.address,
                                                               location or ""))
            if (there.scheme, there.netloc) != (here.scheme, here.netloc):
                shown = printable(f"{there.scheme}://{there.netloc.rpartition('@')[2]}")
                raise SecretError(f"Vault at {self.settings.address} sends one on to {shown}; if "
                                  "that is right, write it as address of vault")
            target = there.path + (f"?{there.query}" if there.query else "")
        raise SecretError(f"Vault at {self.settings.address} redirects without end")

    def _exchange(self, method, target, body):
        """(status, Location, bytes) of one request."""
        headers = {"X-Vault-Request": "true"}
        if self.token is not None:
            headers["X-Vault-Token"] = self.token
        if self.settings.namespace is not None:
            headers["X-Vault-Namespace"] = self.settings.namespace.encode()
        connection = self._connection()
        try:
            connection.request(method, target, body and json.dumps(body), headers)
            response = connection.getresponse()
            data = _bounded(response.read(_MOST_READ + 1), "the answer of Vault")
            return response.status, response.getheader("Location"), data
        finally:
            connection.close()

    def _connection(self):
        import http.client
        import urllib.parse
        address = urllib.parse.urlsplit(self.settings.address)
        left = max(0.001, self.deadline - time.monotonic())
        if address.scheme == "http":
            return http.client.HTTPConnection(address.hostname, address.port, timeout=left)
        return http.client.HTTPSConnection(address.hostname, address.port, timeout=left,
                                           context=self._tls())

    def _tls(self):
        try:
            import ssl
        except ImportError:
            raise SecretError("this Python has no ssl, which an https address needs") from None
        try:
            return ssl.create_default_context(cafile=self.settings.ca)
        except OSError as error:        # ssl.SSLError is one
            why = error.strerror or "it holds no certificate"
            raise SecretError(f"the ca of vault, {printable(str(self.settings.ca))}, cannot be "
                              f"read: {why}") from None


_CREDENTIAL = Pattern(r"[!-~]+")


def _answer_of(data):
    """The mapping of an answer, numbers as they are written; empty where it is none."""
    try:
        answer = json.loads(data, parse_int=str, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError):
        return {}
    return answer if isinstance(answer, dict) else {}


# ==== 12 notices ==================================================================================
# What is told to people and programs about runs: webhooks, mail, and pings of a monitor. They are
# built as rows of the outbox, by functions without effects, in the transaction that they belong to;
# and sent later by a Postman, tried again, and given up where one can see it. So they never delay
# or fail a run. Each is sent by one process alone, though once more where that dies meanwhile.
# Addresses of webhooks and pings are credentials: no text about a notice has more than the host.

_PAUSES = 10, 60, 300, 1800, 7200       # seconds after each failure; after one more it is given up
_LEASE = 300                            # seconds, in which a try of any kind is over
_HTTP_DEADLINE = 10                     # seconds, from the look-up of the name to the answer
_MOST_OF_ANSWER = 1 << 16               # bytes
_MOST_IN_MAIL = 1 << 16                 # bytes of output
_MOST_IN_PING = 10_000                  # bytes, as healthchecks.io keeps them
KEPT_NOTICES = 7 * 86400                # seconds, for which one can see what became of a notice
_MANY, _MINUTE = 10, 60                 # more than so many for one target in so many seconds
_MOST_TITLES = 100

# Where clouds keep credentials for whoever can ask from within, beyond the link-local addresses:
# AWS and Google over IPv6, Alibaba, Oracle, Azure.
_METADATA = ("fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "192.0.0.192", "168.63.129.16")


class NoticeError(RoexecError):
    """A notice that did not arrive: `permanent` where it never will, `away` where nobody answered.

    What is away for one notice is so for the next as well.
    """

    def __init__(self, text, permanent=False, away=False):
        super().__init__(printable(text))
        self.permanent, self.away = permanent, away


# What notices say.

def output_tail(path, size=_MOST_IN_MAIL):
    """The end of what a run has printed (bytes, `size` at most), of the log at a path.

    Empty where there is no such log.
    """
    try:
        return select_lines(newest_lines(path, 4 * size), raw=True)[-size:]
    except OSError:                     # (Four times, since stamps are longer than short lines.)
        return b""


def notice_title(run, event):
    """What has happened to the run of a payload, in some words: `backup-db failed (exit 3)`.

    `event` is the name of the hook; an attempt that `on_retry` is about is the payload's last.
    """
    job = printable(job_or_step(run))
    if event == "pre_run":
        return f"{job} started"
    if event == "on_missed":
        return f"{job} missed {run['count']} slots" if run["count"] > 1 else f"{job} missed a slot"
    if event == "on_retry":
        detail = run["attempts"] and _exit_text(run["attempts"][-1])
        return f"{job} failed{f' ({detail})' if detail else ''}, will be tried again"
    return f"{job} {_OUTCOMES.get(run['state'], run['state'])}{_reason_text(run)}"


_OUTCOMES = {"timed_out": "timed out", "cancelled": "was cancelled", "lost": "was lost",
             "skipped": "was skipped"}


def _exit_text(ended):
    if ended["signal"]:
        return ended["signal"]
    return f"exit {ended['exit_code']}" if ended["exit_code"] is not None else None


def _reason_text(run):
    if run["reason"] in (None, "timeout"):
        return ""
    told = _exit_text(run) if run["reason"] in ("exit", "signal", "start") else None
    return f" ({told or run['reason'].replace('_', ' ')})"


def build_notices(hook, event, run, *, key, host, now, name=None, output=None, log_url=None):
    """The notices of a hook: [arguments of add_notice] but its `now`; it reads and asks nothing.

    `event` is the hook's name, `run` the payload of the run at that point, `key` a text that no
    other hook of the run has; `host` the name of this host, `now` seconds, `name` the job's name,
    `output` the end of the run's output (bytes; None where there can be none yet).
    """
    title = notice_title(run, event)
    facts = {"title": title, "event": event, "run": run, "host": host, "now": now, "key": key,
             "name": name, "output": output, "log_url": log_url}
    body = {"webhook": _webhook_body, "mail": _mail_body, "ping": _ping_body}[hook.kind](
        hook, facts)
    targets = hook.target if hook.kind == "mail" else (hook.target,)
    return [{"kind": hook.kind, "target": target, "run_id": run["id"], "body": body,
             "title": title, "key": key} for target in targets]


def _webhook_body(_hook, facts):
    run = facts["run"]
    lines = [f"{facts['title']} on {printable(facts['host'])}", run["message"], facts["log_url"]]
    return _json_body(lines, event=facts["event"], job=run["job_id"], job_name=facts["name"],
                      **{name: run[name] for name in ("state", "reason", "exit_code", "duration")},
                      host=facts["host"], log_url=facts["log_url"], run=run)


def _json_body(lines, **more):
    """A body whose `text` is for people, as Slack's incoming webhooks and their kin want it."""
    text = "\n".join(printable(line) for line in lines if line)
    for char, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):     # else it calls @channel
        text = text.replace(char, entity)
    return json.dumps({"text": text, **more}).encode()


def _mail_body(hook, facts):
    run, output = facts["run"], facts["output"]
    text = f"{facts['title']} on {printable(facts['host'])}.\n"
    text += f"({printable(facts['name'])})\n" if facts["name"] else ""
    text += "\n" + run_text(run, Style(), log=facts["log_url"])
    if output:
        text += f"\nThe end of its output:\n\n{_mail_lines(output[-_MOST_IN_MAIL:])}\n"
    elif output is not None:
        text += "\nIt has printed nothing.\n"
    return _mail_message(", ".join(hook.target), facts, f"{run['id']}.{facts['key']}", text)


def _mail_lines(output):
    """Output as it can stand in a mail: tabs and lines, and nothing that steers a terminal."""
    lines = output.decode(errors="replace").replace("\r\n", "\n").split("\n")
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in lines)


def _mail_message(recipients, facts, name, text):
    """The bytes of a message that lacks its sender; RFC 3834 has why it says that it is automatic.

    `name` tells it from every other. The policy raises ValueError for a line break in a header.
    """
    import email.message
    import email.policy
    import email.utils
    message = email.message.EmailMessage(email.policy.SMTP.clone(cte_type="7bit"))
    message["To"] = recipients
    message["Subject"] = f"[roexec] {facts['title']} on {printable(facts['host'])}"
    message["Date"] = email.utils.formatdate(facts["now"])
    message["Message-ID"] = f"<{_plain(name)}@{_plain(facts['host'])}>"
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(text)
    return message.as_bytes()


def _plain(text):
    """A text as it may stand on either side of the @ of an address."""
    parts = [_UNUSUAL.sub("-", part) for part in text.split(".")]
    return ".".join(filter(None, parts)) or "unknown"


_UNUSUAL = Pattern(r"[^A-Za-z0-9-]+")


def _ping_body(_hook, facts):
    """What to signal, on a line of its own, and what goes into the body of the request."""
    output = (facts["output"] or b"")[-_MOST_IN_PING:]
    return _ping_signal(facts["run"], facts["event"]).encode() + b"\n" + output


def _ping_signal(run, event):
    """What healthchecks.io wants behind the address: `start`, nothing for success, an exit status,
    `fail`; `log` says nothing about success."""
    if event in ("pre_run", "on_retry"):
        return "start" if event == "pre_run" else "log"
    if run["state"] == "succeeded":
        return ""
    return str(run["exit_code"]) if run["exit_code"] and run["state"] == "failed" else "fail"


def _merged_notice(notices, host, now):
    """(title, body) of the one notice that stands for several of one target, oldest first."""
    count = sum(row["count"] for row in notices)
    title = f"{count} notices"
    titles = [row["title"] or f"a {row['kind']}" for row in notices]
    more = len(titles) - _MOST_TITLES
    lines = titles[:_MOST_TITLES] + [f"and {more} more"] * (more > 0)
    if notices[0]["kind"] == "mail":
        text = f"{title} on {printable(host)} in short time:\n\n" + "\n".join(lines) + "\n"
        facts = {"title": title, "host": host, "now": now}
        return title, _mail_message(notices[0]["target"], facts, f"{new_run_id()}.merged", text)
    return title, _json_body([f"{title} on {printable(host)}", *lines], event="merged",
                             count=count, host=host, runs=[
                                 {"id": row["run_id"], "title": row["title"]} for row in notices])


# Sending.

def send_notice(notice, settings):
    """Send a notice, a mapping with kind, target and body; raises NoticeError.

    `settings` are those of the store; `mail` among them is the spec of MailSettings.
    """
    if notice["kind"] == "mail":
        _send_mail(notice, MailSettings(settings.get("mail")))
    elif notice["kind"] == "ping":
        signal_name, _, output = notice["body"].partition(b"\n")
        _post(notice["target"], output, "text/plain; charset=utf-8", signal_name.decode())
    else:
        _post(notice["target"], notice["body"], "application/json")


def notice_target(notice):
    """Where a notice goes to, without what would be a credential."""
    if notice["kind"] == "mail":
        return notice["target"]
    return "{0.scheme}://{1}".format(*_url_parts(notice["target"]))


def _url_parts(url):
    """(the parts of an address, its host and port as they stand, without user and password)."""
    import urllib.parse
    parts = urllib.parse.urlsplit(url)
    return parts, parts.netloc.rpartition("@")[2]


def _post(url, body, content_type, signal_name=""):
    """POST to an address of http or https. Redirects are not followed: only the administrator says
    where to; proxies of the environment are not used, and of the answer only the status counts."""
    import http.client
    import urllib.parse
    parts, host = _url_parts(url)
    if parts.scheme not in ("http", "https") or not all("!" <= char <= "~" for char in url):
        raise NoticeError("this is no address of http or https", permanent=True)
    path = (f"{parts.path.rstrip('/')}/{signal_name}" if signal_name else parts.path) or "/"
    headers = {"Host": host, "User-Agent": f"roexec/{__version__}", "Content-Type": content_type,
               "Connection": "close"}
    if "@" in parts.netloc:
        user = urllib.parse.unquote_to_bytes(parts.netloc.rpartition("@")[0])
        headers["Authorization"] = "Basic " + base64.b64encode(user).decode()
    deadline = time.monotonic() + _HTTP_DEADLINE
    try:
        with _Call(parts, deadline) as connection:
            client = http.client.HTTPConnection(parts.hostname, 80)
            client.sock = connection.socket
            client.request("POST", path + (f"?{parts.query}" if parts.query else ""), body, headers)
            with client.getresponse() as answer, contextlib.suppress(OSError, ValueError,
                                                                     http.client.HTTPException):
                answer.read(_MOST_OF_ANSWER)
    except (OSError, ValueError, http.client.HTTPException) as error:
        if not isinstance(error, OSError):      # its text may have parts of the answer
            error = OSError(errno.EPROTO, "the answer is no HTTP")
        raise _away(error, time.monotonic() >= deadline, _HTTP_DEADLINE) from None
    _judge(answer.status)


def _judge(status):
    """Raise what an HTTP status other than success means."""
    if status in range(300, 400):
        raise NoticeError(f"it answered {status}; redirects are not followed, write the address "
                          "where it leads to", permanent=True)
    if status not in range(200, 300):
        raise NoticeError(f"it answered {status}",
                          permanent=status in range(400, 500) and status not in (408, 429))


def _away(error, late, seconds):
    """The NoticeError of an error on the way; `late` is whether the time was over."""
    if late or isinstance(error, (TimeoutError, socket.timeout)):
        return NoticeError(f"there was no answer within {format_duration(seconds)}", away=True)
    text = getattr(error, "verify_message", "") or getattr(error, "strerror", "") or str(error)
    return NoticeError(text or type(error).__name__, away=True)


class _Call:
    """A context: a connection for the parts of an address that is over at a deadline.

    The name is resolved once, and what is connected to is what was checked.
    """

    def __init__(self, parts, deadline):
        self.parts, self.deadline = parts, deadline

    def __enter__(self):
        host = self.parts.hostname
        port = self.parts.port or (443 if self.parts.scheme == "https" else 80)
        self.socket = _connected(_allowed(_resolve(host, port, self.deadline)), self.deadline)
        self.guard = _Guard(self.socket, self.deadline)
        if self.parts.scheme == "https":
            import ssl
            try:
                self.socket = ssl.create_default_context().wrap_socket(
                    self.socket, server_hostname=host)
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_):
        self.guard.close()
        self.socket.close()


class _Guard:
    """Ends a connection at a deadline, however slowly its other side goes on."""

    def __init__(self, connection, deadline):
        self.copy = socket.socket(fileno=os.dup(connection.fileno()))   # TLS takes the other over
        self.timer = threading.Timer(max(0, deadline - time.monotonic()), self._end)
        self.timer.daemon = True
        self.timer.start()

    def _end(self):
        with contextlib.suppress(OSError):
            self.copy.shutdown(socket.SHUT_RDWR)

    def close(self):
        self.timer.cancel()
        self.timer.join()
        self.copy.close()


def _resolve(host, port, deadline):
    """The addresses of a name, as getaddrinfo gives them, which itself would wait for minutes."""
    found = []

    def resolve():
        try:
            found.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, ValueError):           # ValueError: it cannot be a name at all
            found.append([])
    thread = threading.Thread(target=resolve, daemon=True)
    thread.start()
    thread.join(max(0, deadline - time.monotonic()))
    if not found:
        raise TimeoutError
    if not found[0]:
        raise NoticeError(f"the name {host} is not known", away=True)
    return found[0]


def _allowed(addresses):
    """Those to which something may be sent; raises NoticeError where there is none.

    Loopback and private ones are among them: who writes a job may run any command as its user, and
    the chat, the mail relay and the monitor of a company are on such addresses. What is refused has
    no such service, but gives credentials away to whoever can make a program ask there.
    """
    allowed = [address for address in addresses if not _is_refused(address[4][0])]
    if not allowed:
        raise NoticeError(f"{addresses[0][4][0]} is an address to which no notice is sent",
                          permanent=True)
    return allowed


def _is_refused(text):
    import ipaddress
    address = ipaddress.ip_address(text.partition("%")[0])
    if address.version == 6:
        inner = address.ipv4_mapped or address.sixtofour
        if address in ipaddress.ip_network("64:ff9b::/96") or int(address) >> 32 == 0:
            inner = ipaddress.ip_address(int(address) & 0xFFFFFFFF)     # RFC 6052, RFC 4291
        if inner is not None and int(address) != 1:
            address = inner
    return (address.is_link_local or address.is_multicast or address.is_unspecified
            or str(address) in (*_METADATA, "255.255.255.255")
            or address.version == 4 and int(address) < 1 << 24)         # 0.0.0.0/8: RFC 1122


def _connected(addresses, deadline):
    """A socket that is connected to the first of some addresses that can be reached."""
    for number, (family, kind, protocol, _, address) in enumerate(addresses, 1):
        connection = socket.socket(family, kind, protocol)
        try:
            left = deadline - time.monotonic()
            connection.settimeout(max(0.001, left / (len(addresses) - number + 1)))
            connection.connect(address)
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            return connection
        except BaseException as error:
            connection.close()
            if number == len(addresses) or not isinstance(error, OSError):
                raise


def _send_mail(notice, server):
    import email
    import email.policy
    import smtplib
    if server.host is None:
        raise NoticeError("no mail server is known; write mail: {host: …} into the configuration")
    message = email.message_from_bytes(notice["body"], policy=email.policy.SMTP)
    host = _plain(socket.gethostname())
    message["From"] = sender = server.sender or f"roexec@{host}"
    deadline = time.monotonic() + server.timeout
    try:
        client = _mail_client(server, host)
        guard = _Guard(client.sock, deadline)
        try:
            _log_in(client, server)
            client.send_message(message, sender, [notice["target"]])
            with contextlib.suppress(OSError):      # it has the mail
                client.quit()
        finally:
            guard.close()
            client.close()
    except (OSError, ValueError) as error:          # SMTPException is an OSError
        late = time.monotonic() >= deadline
        if isinstance(error, smtplib.SMTPException) and not late:
            raise _mail_error(error) from None
        raise _away(error, late, server.timeout) from None


def _mail_client(server, host):
    """A connection with a mail server that has said its greeting."""
    import smtplib
    import ssl
    name = host if "." in host else "[127.0.0.1]"       # as smtplib has it, which would ask the DNS
    if server.tls == "tls":
        return smtplib.SMTP_SSL(server.host, server.port, name, timeout=server.timeout,
                                context=ssl.create_default_context())
    return smtplib.SMTP(server.host, server.port, name, timeout=server.timeout)


def _log_in(client, server):
    """Begin TLS where it is wanted, and log in where there is a user; nothing goes on without."""
    import ssl
    if server.tls == "starttls":
        client.starttls(context=ssl.create_default_context())
    if server.user:
        try:
            with open(server.password_file, encoding="utf-8") as file:
                password = file.read(4096).rstrip("\r\n")
        except (OSError, ValueError) as error:
            raise NoticeError(f"cannot read the password in {server.password_file}: "
                              f"{getattr(error, 'strerror', None) or error}") from None
        if not password.isascii():          # smtplib would raise an error that quotes it
            raise NoticeError(f"the password in {server.password_file} is not ASCII")
        client.login(server.user, password)


def _mail_error(error):
    """The NoticeError of one of smtplib's: 5xx is for ever (RFC 5321), but for a wrong password."""
    import smtplib
    code, text = getattr(error, "smtp_code", 0), getattr(error, "smtp_error", str(error))
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        code, text = next(iter(error.recipients.values()))
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    mendable = isinstance(error, (smtplib.SMTPAuthenticationError, smtplib.SMTPConnectError,
                                  smtplib.SMTPHeloError))
    return NoticeError(f"{code} {text[:300]}" if code else text[:300],
                       permanent=code >= 500 and not mendable, away=mendable or not code)


# The postman.

def deliver(store, settings, now, say=None, stopped=None):
    """Send what is due, one notice after another -> the instant when the next is due, or None.

    The store is not held meanwhile. `say(text, level)` is told of what did not arrive; no further
    notice is sent once `stopped()` is true.
    """
    return _Delivery(store, settings, now, say or (lambda text, level: None)).perform(stopped)


class _Delivery:
    """What `deliver` does; `away` has the NoticeErrors of the hosts that did not answer."""

    def __init__(self, store, settings, now, say):
        self.store, self.settings, self.now, self.say = store, settings, now, say
        self.away = {}

    def perform(self, stopped):
        began = False
        while True:
            with self.store.read() as db:
                notices, due = due_notices(db, self.now, 500), next_notice(db)
            if not notices:
                break
            began = True
            if not self._merge(notices):
                for notice in notices:
                    if stopped and stopped():
                        return due
                    self._deliver(notice)
        if began:
            with self.store.write() as db:
                purge_notices(db, self.now - KEPT_NOTICES)
        return due

    def _merge(self, notices):
        """Make one notice of many for the same target -> whether there were such."""
        crowds = [rows for rows in _same_minute(notices) if len(rows) > _MANY]
        for rows in crowds:
            title, body = _merged_notice(rows, socket.gethostname(), self.now)
            with self.store.write() as db:
                merge_notices(db, rows, self.now, title, body)
        return bool(crowds)

    def _deliver(self, notice):
        """Send a notice, and record how that went."""
        with self.store.write() as db:
            body = begin_notice(db, notice, self.now, self.now + _LEASE)
        if body is None:
            return
        host = "mail" if notice["kind"] == "mail" else notice_target(notice)
        error = self.away.get(host) or self._error_of({**notice, "body": body})
        if error is None:
            with self.store.write() as db:
                notice_sent(db, notice["id"])
        else:
            if error.away:
                self.away[host] = error
            self._failed(notice, error)

    def _error_of(self, notice):
        """Send a notice -> the NoticeError of what went wrong, or None."""
        try:
            return send_notice(notice, self.settings)
        except NoticeError as error:
            return error
        except Exception as error:          # a defect, whose text might show an address
            return NoticeError(f"a defect of roexec, {type(error).__name__}")

    def _failed(self, notice, error):
        tries, next_try, more = notice["tries"] + 1, None, "it is given up"
        if not error.permanent and tries <= len(_PAUSES):
            next_try = self.now + _PAUSES[tries - 1]
            more = f"it is tried again in {format_duration(_PAUSES[tries - 1])}"
        with self.store.write() as db:
            notice_failed(db, notice["id"], self.now, str(error), next_try)
        self.say(f"The {notice['kind']} to {notice_target(notice)} did not arrive "
                 f"({notice['title'] or notice['run_id']}): {error}; {more}", "ERROR")


def _same_minute(notices):
    """Lists of rows that have one target and were added within a minute, but no pings."""
    groups = {}
    for row in notices:
        if row["kind"] != "ping":
            lists = groups.setdefault((row["kind"], row["target"]), [])
            if not lists or row["created_at"] - lists[-1][0]["created_at"] > _MINUTE:
                lists.append([])
            lists[-1].append(row)
    return [rows for lists in groups.values() for rows in lists]


class Postman:
    """A thread that sends the notices of a store as they become due; see start_postman."""

    def __init__(self, store, settings, say):
        self._store, self._settings, self._say = store, settings, say
        self._awake, self._closed = threading.Event(), False
        self._thread = start_thread(self._run, "postman")

    def wake(self):
        """Say that there may be new notices."""
        self._awake.set()

    def close(self):
        """End; a notice that is being sent meanwhile has a second to arrive."""
        self._closed = True
        self.wake()
        self._thread.join(1)

    def _run(self):
        while not self._closed:
            self._awake.clear()
            self._awake.wait(self._deliver())

    def _deliver(self):
        """Send what is due -> for how many seconds there is nothing to do, a minute at most."""
        import traceback
        try:
            due = deliver(self._store, self._settings(), time.time(), self._say,
                          lambda: self._closed)
        except RoexecError as error:
            self._say(f"Notices cannot be sent: {error}", "ERROR")
            return _MINUTE
        except Exception:
            self._say(f"Notices cannot be sent: {traceback.format_exc()}", "ERROR")
            return _MINUTE
        return _MINUTE if due is None else min(max(0.0, due - time.time()), _MINUTE)


def start_postman(store, settings, say):
    """The Postman of a server. `settings()` gives those of the store, `say(text, level)` logs."""
    return Postman(store, settings, say)


# ==== 13 limits ===================================================================================
# As whom a command runs and what it may use: users and groups, which are taken on in order,
# verified and never fallen back from; nice and rlimits; memory and processor by a cgroup where the
# server has been given a part of that tree (cgroup v2), else memory by watching what the processes
# hold.

class Setup(Value):
    """What a child does before it executes its program; None leaves a thing as it is.

    `uid`, `gid`, `groups` (a tuple) are numbers, `nice` is added to ours, `limits` are pairs (name
    in `resource`, value), `cgroup` is a folder.
    """
    __slots__ = ("uid", "gid", "groups", "nice", "limits", "cgroup")

    def __bool__(self):
        return any(getattr(self, name) is not None for name in self.__slots__)


_RLIMITS = {"cpu_time": "RLIMIT_CPU", "files": "RLIMIT_NOFILE", "processes": "RLIMIT_NPROC",
            "file_size": "RLIMIT_FSIZE"}


def setup_of(job):
    """The Setup of a job's commands. Raises ValueError for a user or group that does not exist, or
    that only root could become."""
    limits = tuple((name, math.ceil(getattr(job.limits, key))) for key, name in _RLIMITS.items()
                   if getattr(job.limits, key) is not None)
    uid, gid, groups = _identity(job.user, job.group)
    return Setup(uid=uid, gid=gid, groups=groups, nice=job.nice, limits=limits or None)


def _identity(user, group):
    """(uid, gid, groups) to become; None for what remains as it is."""
    if user is None and group is None:
        return None, None, None
    uid, gid, groups = os.geteuid(), os.getegid(), None
    if user is not None:
        try:
            entry = pwd.getpwnam(user)
        except KeyError:
            raise ValueError(f'"{user}" is no user of this host') from None
        uid, gid = entry.pw_uid, entry.pw_gid
        groups = tuple(os.getgrouplist(user, gid))
    if group is not None:
        import grp
        try:
            gid = grp.getgrnam(group).gr_gid
        except KeyError:
            raise ValueError(f'"{group}" is no group of this host') from None
        groups = tuple({gid, *(groups or os.getgroups())})
    if os.geteuid() != 0:
        if (uid, gid) == (os.geteuid(), os.getegid()):
            return None, None, None
        wanted = group if uid == os.geteuid() else user
        raise ValueError(f'only root can become "{wanted}", and this is '
                         f"{owner_name(os.geteuid())}")
    return uid, gid, groups


def fork_exec(path, words, environment, descriptors, setup, *, group, folder, umask, signals):
    """Start a program by fork and exec, for what posix_spawn(3) cannot do -> its pid.

    `group` is None for a session of its own, else as for setpgid(2). Raises OSError of what went
    wrong in the child; its `filename` says at what.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        step = ["starting"]
        try:
            os.setsid() if group is None else os.setpgid(0, group)
            _become(setup, folder, umask, step)
            for here, there in zip(descriptors, (0, 1, 2)):
                os.dup2(here, there)
            for number in signals:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            step[0] = path
            os.execve(path, words, environment)
        except OSError as error:
            os.write(writer, f"{error.errno} {step[0]}".encode())
        except Exception as error:
            os.write(writer, f"{errno.EPERM} {step[0]}: {error}".encode())
        finally:
            os._exit(126)
    os.close(writer)
    with open(reader) as file:
        number, _, step = file.read().partition(" ")
    if number:
        os.waitpid(pid, 0)
        raise OSError(int(number), os.strerror(int(number)), step)
    return pid


def _become(setup, folder, umask, step):
    """Take on what a Setup says, in an order in which each step is still allowed."""
    if setup.cgroup is not None:
        step[0] = "in its cgroup"
        with open(os.path.join(setup.cgroup, "cgroup.procs"), "w") as file:
            file.write(str(os.getpid()))
    if setup.limits:
        import resource
        for name, value in setup.limits:
            step[0] = f"with {name}"
            hard = resource.getrlimit(getattr(resource, name))[1]
            # SIGXCPU, which says why, comes before the SIGKILL of the hard limit.
            most = value + 1 if name == "RLIMIT_CPU" else value
            if os.geteuid() != 0 and hard != resource.RLIM_INFINITY:
                value, most = min(value, hard), min(most, hard)
            resource.setrlimit(getattr(resource, name), (value, most))
    if setup.nice is not None:
        step[0] = f"with nice {setup.nice}"
        os.nice(setup.nice)
    if setup.uid is not None:
        step[0] = f"as {owner_name(setup.uid)}"
        os.setgroups(setup.groups if setup.groups is not None else [setup.gid])
        os.setresgid(setup.gid, setup.gid, setup.gid)
        os.setresuid(setup.uid, setup.uid, setup.uid)
        _verify(setup)
    step[0] = f"in the folder {folder}"
    os.chdir(folder)                    # as that user, who may see less than we do
    os.umask(umask)


def _verify(setup):
    """Raise ValueError if anything of our own identity has remained (CVE-2006-2607 of cron)."""
    if (os.getresuid() != (setup.uid,) * 3 or os.getresgid() != (setup.gid,) * 3
            or set(os.getgroups()) - {setup.gid} != set(setup.groups or ()) - {setup.gid}):
        raise ValueError("the identity could not be changed in whole")
    if setup.uid != 0:
        try:
            os.setuid(0)
        except PermissionError:
            return
        raise ValueError("root could be had back")


# Memory and processor.

class Watch:
    """Memory limited by looking: the sum of what the processes of a tree hold (proc(5), statm)."""
    interval = 0.2          # seconds between two looks

    def __init__(self, limit):
        self.limit, self.peak, self.folder, self.due = limit, 0, None, 0.0

    def exceeded(self, processes):
        """Whether the processes, {pid: start} that a function gives, hold more than the limit."""
        if time.monotonic() < self.due:
            return False
        self.due = time.monotonic() + self.interval
        held = sum(map(_resident, processes()))
        self.peak = max(self.peak, held)
        return held > self.limit

    def kill(self):
        """Nothing that could be killed at once."""

    def close(self):
        """Nothing is left."""
        return False


def own_peak():
    """The most memory that this process has held: what getrusage(2) says of a child is never less,
    since a child begins with what its parent holds."""
    with contextlib.suppress(OSError):
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    return 0


def _resident(pid):
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


class Cgroup:
    """A cgroup of its own for a run (cgroup v2): the kernel keeps its limits, and counts."""

    interval = float("inf")

    def __init__(self, parent, name, limits):
        self.folder, self.peak = os.path.join(parent, name), 0
        os.mkdir(self.folder)
        try:
            if limits.get("memory") is not None:
                self._write("memory.max", str(int(limits["memory"])))
                self._write("memory.oom.group", "1")
                with contextlib.suppress(FileNotFoundError):    # a kernel without swap accounting
                    self._write("memory.swap.max", "0")
            if limits.get("cpu") is not None:
                self._write("cpu.max", f"{int(limits['cpu'] * 100_000)} 100000")
        except OSError:
            self.close()
            raise

    def exceeded(self, processes):
        """The kernel ends what exceeds its limit; `close` tells."""
        return False

    def kill(self):
        """Kill all that is in it at once, where the kernel (5.14) can."""
        with contextlib.suppress(OSError):
            self._write("cgroup.kill", "1")

    def close(self):
        """Remove it -> whether the kernel ended it for want of memory."""
        with contextlib.suppress(OSError, ValueError):
            self.peak = int(self._read("memory.peak"))          # from Linux 5.19 on
        killed = False
        with contextlib.suppress(OSError):
            events = dict(line.split() for line in self._read("memory.events").splitlines())
            killed = int(events.get("oom_kill", 0)) > 0
        with contextlib.suppress(OSError):          # something was left in it, on purpose
            os.rmdir(self.folder)
        return killed

    def _read(self, name):
        with open(os.path.join(self.folder, name)) as file:
            return file.read()

    def _write(self, name, text):
        with open(os.path.join(self.folder, name), "w") as file:
            file.write(text)


def delegated_cgroup(pid="self"):
    """The folder below which a process, this one unless said otherwise, may make cgroups, or None.

    It has to stand in a sub-group of a delegated one (systemd's DelegateSubgroup=): a cgroup with
    processes of its own cannot have limited ones below it.
    """
    try:
        parent = os.path.dirname(_cgroup_of(pid))
        if not _is_delegated(parent) or not os.access(parent, os.W_OK):
            return None
        with open(os.path.join(parent, "cgroup.controllers")) as file:
            if not {"memory", "cpu"} <= set(file.read().split()):
                return None
        with open(os.path.join(parent, "cgroup.subtree_control"), "w") as file:
            file.write("+memory +cpu")
        return parent
    except (OSError, StopIteration):
        return None


def _cgroup_of(pid):
    with open(f"/proc/{pid}/cgroup") as file:
        return next("/sys/fs/cgroup" + line.strip()[3:] for line in file if line.startswith("0::"))


def _is_delegated(folder):
    """Whether the service manager has given this part of its tree away: only then it is ours to
    change (systemd's CGROUP_DELEGATION; systemd 251 sets the mark)."""
    return os.getxattr(folder, "user.delegate") == b"1"


def prepare_cgroup():
    """What a server does first: take a place that leaves room for runs beside it, where it stands
    in a delegated scope itself (systemd-run --scope); remove empty cgroups that runs have left.

    Not in a service: systemd could not start it again while runs are on (219/CGROUP), since no
    process can be put into a cgroup that has limited ones. DelegateSubgroup= is made for that.
    """
    with contextlib.suppress(OSError, StopIteration):
        own = _cgroup_of("self")
        if own.endswith(".scope") and _is_delegated(own):
            os.makedirs(own + "/server", exist_ok=True)
            with open(own + "/server/cgroup.procs", "w") as file:
                file.write(str(os.getpid()))
    parent = delegated_cgroup()
    for name in os.listdir(parent) if parent else ():
        folder = os.path.join(parent, name)
        with contextlib.suppress(OSError):          # it has processes
            if name.startswith("run-") and os.stat(folder).st_mtime < time.time() - 60:
                os.rmdir(folder)


def cgroup_members(parent, run_id):
    """The pids in the cgroups that a run has below a folder (None: it has none)."""
    found = set()
    for folder in _cgroups_of(parent, run_id):
        with contextlib.suppress(OSError):
            with open(folder + "/cgroup.procs") as file:
                found.update(map(int, file))
    return found


def remove_cgroups(parent, run_id):
    """Kill at once what is in the cgroups of a run, and remove those that are empty."""
    for folder in _cgroups_of(parent, run_id):
        with contextlib.suppress(OSError):
            with open(folder + "/cgroup.kill", "w") as file:        # from Linux 5.14 on
                file.write("1")
        with contextlib.suppress(OSError):
            os.rmdir(folder)


def _cgroups_of(parent, run_id):
    with contextlib.suppress(TypeError, OSError):
        return [f"{parent}/{name}" for name in os.listdir(parent)
                if name.startswith(f"run-{run_id}-")]
    return []


def cgroups_for(job):
    """The folder for the cgroups of a job's attempts; None where it needs none, or cannot."""
    return None if job.limits.memory is None and job.limits.cpu is None else delegated_cgroup()


def meter_of(job, parent, name):
    """What keeps the limits of memory and processor of a job, and a sentence for the log; (None,
    None) where there are none. `parent` is what `cgroups_for` says."""
    limits = {key: getattr(job.limits, key) for key in ("memory", "cpu")}
    if limits == {"memory": None, "cpu": None}:
        return None, None
    if parent is not None:
        return Cgroup(parent, name, limits), "Limits are kept by a cgroup"
    remarks = [] if limits["memory"] is None else [
        "limits.memory is kept by watching the processes"]
    if limits["cpu"] is not None:
        remarks.append("limits.cpu is not kept: no cgroup (v2) has been delegated to the server")
    return limits["memory"] and Watch(limits["memory"]), "; ".join(remarks)


# ==== 14 journal ==================================================================================
# The life of a run, as its supervisor writes it down: each step before or right after it is done,
# so that whoever finds the journal later knows what may be alive. That it is locked says that its
# supervisor is.

# Bytes that are written beforehand, so that a full disk loses no exit code. (Written, since to free
# what fallocate(2) has reserved takes ext4 a hundred times as long.)
_ROOM = 8192


class Journal:
    """`active/<run id>`: a header line, then an event a line, as JSON; locked while looked after.

    `header` has run, job, spec, trigger, slot, env, boot and store; that of a step also parent and
    step, and its file is `active/<parent>.<run id>`. Lines are written at an own offset into room
    that is reserved: O_APPEND would write behind that room.
    """

    def __init__(self, path, descriptor, data=None):
        self.path, self.descriptor = path, descriptor
        data = _read_all(descriptor) if data is None else data
        complete = data[:data.rfind(b"\n") + 1]
        self.header, *self.events = _parsed(complete.split(b"\n")) or [{}]
        self.name, self._end = os.path.basename(path), len(complete)
        self.run_id = self.header.get("run", self.name)
        self.taken = None               # the row of the run, where this has been taken in

    @classmethod
    def create(cls, folder, header):
        """A new, locked journal in a folder, whole from the instant at which it has its name."""
        path = os.path.join(folder, journal_name(header["run"], header.get("parent")))
        descriptor = open_private(path + ".new", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            data = json.dumps(header).encode() + b"\n"
            os.pwrite(descriptor, data + bytes(_ROOM), 0)
            os.rename(path + ".new", path)
        except BaseException:
            os.unlink(path + ".new")
            os.close(descriptor)
            raise
        return cls(path, descriptor, data)

    @classmethod
    def find(cls, path):
        """The journal at a path, locked; None where somebody looks after it, or it is gone."""
        try:
            descriptor = open_private(path, os.O_RDWR)
        except FileNotFoundError:
            return None
        if try_lock(descriptor) and is_at(descriptor, path):
            return cls(path, descriptor)
        os.close(descriptor)
        return None

    @classmethod
    def glance(cls, path):
        """The journal at a path as it is now, for reading only; None where there is none."""
        try:
            with open(path, "rb") as file:
                return cls(path, None, file.read())
        except FileNotFoundError:
            return None

    def note(self, event, **values):
        """Write an event down -> the event; its `at` is the instant (UTC seconds)."""
        values = {"event": event, "at": time.time(), **values}
        self.events.append(values)
        data = json.dumps(values).encode() + b"\n"
        os.pwrite(self.descriptor, data, self._end)
        before, self._end = self._end, self._end + len(data)
        if before // _ROOM != self._end // _ROOM:
            with contextlib.suppress(OSError):          # the room there is may well be enough
                os.pwrite(self.descriptor, bytes(_ROOM), self._end)
        return values

    @property
    def job(self):
        """The Job, or Step, that is carried out."""
        return (Step if self.header.get("parent") else Job)(self.header["spec"])

    def cancelled(self):
        """(reason, seconds of grace or None) of a cancel that was asked for, else None."""
        try:
            with open(self.path + ".cancel") as file:
                reason, _, grace = file.read().partition(" ")
                return reason, float(grace) if grace else None
        except FileNotFoundError:
            return None

    def cancel(self, reason, grace=None):
        """Ask for a cancel: write down why, then send SIGTERM to the supervisor if there is one.

        A supervisor that has missed the signal finds the reason at the start of the run, and one
        that finds it at the end takes no other run, which the signal might hit.
        """
        with contextlib.suppress(OSError):          # a full disk: the signal alone will do
            with open(self.path + ".reason", "w") as file:
                file.write(reason if grace is None else f"{reason} {grace}")
            os.rename(self.path + ".reason", self.path + ".cancel")
        now = Journal.glance(self.path) or self
        supervisor = Progress(now.events).supervisor
        if supervisor and process_start(supervisor["pid"]) == supervisor["start"] \
                and lock_is_held(self.path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(supervisor["pid"], signal.SIGTERM)

    def close(self):
        """Give the lock back."""
        os.close(self.descriptor)

    def steps(self):
        """[(step, run id)] of a pipeline: of each pass over its steps, in order."""
        runs = list((self.header.get("steps") or {}).items())
        for event in self.events:
            if event["event"] == "pass":
                runs += event["steps"].items()
        return runs

    def path_of(self, run_id):
        """Where the journal of a step of this pipeline lies."""
        return os.path.join(os.path.dirname(self.path), journal_name(run_id, self.run_id))

    def remove(self):
        """Remove the files of the journal, unless another one has its name by now."""
        if is_at(self.descriptor, self.path):
            for path in (*(self.path_of(run_id) for _, run_id in self.steps()), self.path):
                for suffix in ("", ".cancel", ".result"):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path + suffix)


def journal_name(run_id, parent=None):
    """The name of the file of a run's journal: one of a step goes with that of its pipeline."""
    return f"{parent}.{run_id}" if parent else run_id


def _read_all(descriptor):
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def _parsed(lines):
    """The objects of lines; one that is not whole is left out."""
    lines = [line.strip(b"\0").decode(errors="replace") for line in lines]
    try:
        return json.loads("[" + ",".join(filter(None, lines)) + "]")
    except ValueError:
        return [value for value in map(_object, lines) if value]


def _object(line):
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


class Progress:
    """What the events of a journal add up to.

    `attempts` are rows as the store has them; `open` is the process (a dict with what, pid, start,
    and boot, keeper and cgroups of its supervisor) that may be alive, or None; `done` are the
    names of what was begun; `supervisor`, `retry`, `outcome` and `finished` are events, or None;
    `outputs` is what a step hands on.
    """

    def __init__(self, events=()):
        self.outputs = {}
        self.supervisor = self.log = self.open = self.retry = self.outcome = self.finished = None
        self.attempts, self.done = [], []
        for event in events:
            self.apply(event)

    def apply(self, event):
        """Take one more event; one that only a newer roexec knows changes nothing."""
        getattr(self, "_" + event["event"], dict)(event)

    def _supervisor(self, event):
        self.supervisor, self.log = event, event["log"] or self.log

    def _starting(self, event):
        self.open = {"what": event["what"], "at": event["at"], "pid": None, "start": None,
                     **{name: (self.supervisor or {}).get(name)
                        for name in ("boot", "keeper", "cgroups")}}
        if event["what"] != "env_from":         # which may be asked again
            self.done.append(event["what"])
        if event["what"] == "attempt":
            self.retry = None
            self.attempts.append({"number": len(self.attempts) + 1, "started_at": event["at"]})

    def _started(self, event):
        self.open.update(pid=event["pid"], start=event["start"])

    def _ended(self, event):
        if self.open and self.open["what"] == "attempt":
            self.attempts[-1].update(event, finished_at=event["at"])
        self.open = None

    def _request(self, event):          # of a step that runs a job: it has no process
        self.done.append("attempt")
        self.attempts.append({"number": 1, "started_at": event["at"]})

    def _answered(self, event):
        self.attempts[-1].update(event, finished_at=event["at"])

    def _outputs(self, event):
        self.outputs = event["values"]

    def _retry(self, event):
        self.retry = event

    def _outcome(self, event):
        self.outcome = event

    def _finished(self, event):
        self.finished, self.log = event, event.get("log") or self.log


# ==== 15 processes ================================================================================
# The processes of a run: what they get, how one is started, supervised and ended with all that
# descends from it. Where the supervisor was killed they are found all the same: by session and
# environment, and what has left both as an orphan of its keeper. (Not where that was killed too, or
# where a foreground run, which has none, was, unless there is a cgroup.)

class Process(Value):
    """A process of this host; `start` in ticks since the boot, `alive` is false for a zombie."""
    __slots__ = ("parent", "session", "start", "alive")


def processes():
    """{pid: Process} of this host."""
    found = {}
    for name in os.listdir("/proc"):
        fields = process_stat(name) if name.isdigit() else None
        if fields:
            found[int(name)] = Process(parent=int(fields[1]), session=int(fields[3]),
                                       start=int(fields[19]), alive=fields[0] not in (b"Z", b"X"))
    return found


def _tree(chosen, table):
    """{pid: Process} of the chosen processes and all their descendants that are alive."""
    children = {}
    for pid, process in table.items():
        children.setdefault(process.parent, []).append(pid)
    found, ahead = set(), list(chosen)
    while ahead:
        pid = ahead.pop()
        if pid not in found:
            found.add(pid)
            ahead += children.get(pid, ())
    return {pid: table[pid] for pid in found if table[pid].alive and pid != os.getpid()}


def _remnants(run_id, left):
    """{pid: Process} of what is left of a run whose supervisor died; `left` is `Progress.open`.

    That is the session of its command (if its leader is alive it must be the one that was started,
    not a later process with its number), the orphans below its keeper, what is in its cgroups, what
    bears the run's id in its environment, and what descends from these.
    """
    session, (keeper, began) = left["pid"], left["keeper"] or (None, None)
    if not _has_proc():
        return {session: None} if session and _signal_group(session, 0) else {}
    table, mark = processes(), f"ROEXEC_RUN_ID={run_id}\0".encode()
    if session in table and table[session].start != left["start"]:
        session = None
    if keeper in table and table[keeper].start != began:
        keeper = None
    inside = cgroup_members(left["cgroups"], run_id)
    return _tree([pid for pid, process in table.items()
                  if process.session == session or process.parent == keeper or pid in inside
                  or mark in _environment_of(pid)], table)


def _has_proc():
    return os.path.isdir("/proc/self")      # macOS and the BSDs have none: a group is all we know


def _environment_of(pid):
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read() + b"\0"
    except OSError:                     # it is gone, or another user's
        return b""


def _signal_all(found, number):
    """Send a signal to each of {pid: Process}, unless it is another one by now, and let it run.

    The eldest come first: a script whose command is ended before it goes on with the next one.
    """
    for pid in sorted(found, key=lambda pid: (found[pid] and found[pid].start, pid)):
        process = found[pid]
        if process is None:
            _signal_group(pid, number), _signal_group(pid, signal.SIGCONT)
        elif process_start(pid) == process.start:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
                os.kill(pid, signal.SIGCONT)


def _signal_group(group, number):
    try:
        os.killpg(group, number)
        return True
    except (ProcessLookupError, PermissionError):
        return False


_UNKILLABLE = 10.0      # seconds after which one gives up on processes that survive SIGKILL


def _end_all(left, first, grace, pause, kill):
    """End what `left()` finds, {pid: Process}, each time: a signal, `grace` seconds, then `kill()`
    and SIGKILL until nothing is left -> (how many there were, how many survived).

    Within the grace an orphan that has come meanwhile gets the signal too; one whose parent is
    among those found may be what that cleans up with. `pause(seconds)` waits, or less.
    """
    count = 0
    for number, seconds in ((first, grace), (signal.SIGKILL, _UNKILLABLE)):
        if number == signal.SIGKILL:
            kill()
        told, deadline, delay = {}, time.monotonic() + seconds, 0.005
        while True:
            found = left()
            count = max(count, len(found))
            meant = {pid: process for pid, process in found.items()
                     if number == signal.SIGKILL or not told or pid not in told
                     and process is not None and process.parent not in found}
            _signal_all(meant, number)
            told.update(meant)
            rest = deadline - time.monotonic()
            if not found or rest <= 0:
                break
            pause(min(delay, rest))
            delay = min(delay * 1.5, 0.1)
    return count, len(found)


def kill_remnants(run_id, left, grace):
    """End what is left of a run whose supervisor died -> how many processes were there."""
    count, _ = _end_all(lambda: _remnants(run_id, left), signal.SIGTERM, grace, time.sleep,
                        lambda: remove_cgroups(left["cgroups"], run_id))
    remove_cgroups(left["cgroups"], run_id)
    return count


# Starting a command.

BASE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def clean_environment(uid):
    """The environment of registered jobs, before anything of their own (design, section 7)."""
    try:
        entry = pwd.getpwuid(uid)
        home, user = entry.pw_dir, entry.pw_name
    except KeyError:
        home, user = "/", str(uid)
    return {"PATH": BASE_PATH, "HOME": home, "USER": user, "LOGNAME": user, "SHELL": "/bin/sh",
            "LANG": os.environ.get("LANG", "C.UTF-8")}


_OF_A_RUN = ["ROEXEC_" + name for name in (
    "JOB_ID RUN_ID STEP ATTEMPT SLOT TRIGGER LOG STATUS REASON EXIT_CODE OUTPUT WORKDIR").split()]


def job_environment(job, uid, base=None, variables=()):
    """The environment that a job has as a user, before what a run adds; `base` is the caller's for
    `run -- CMD`, else None, and `variables` are those of `env_from`."""
    environment = dict(clean_environment(uid) if base is None else base)
    if job.timezone:
        environment["TZ"] = job.timezone
    if job.inherit_env:
        names = os.environ if job.inherit_env is True else job.inherit_env
        environment.update((name, os.environ[name]) for name in names if name in os.environ)
    environment.update(variables)
    environment.update(job.env)
    environment.update((name, param.default) for name, param in job.params.items()
                       if param.default is not None)
    return environment


def job_folder(job, environment):
    """The folder in which a job runs; `~` is that of its user."""
    home, folder = environment.get("HOME") or "/", job.directory or "~"
    return home + folder[1:] if folder == "~" or folder.startswith("~/") else folder


def run_environment(environment, header, given):
    """The environment of a run: that of its job, and what the run adds."""
    environment.update(header.get("outputs") or {})
    environment.update(given)
    for name in _OF_A_RUN:              # a run within a run has its own
        environment.pop(name, None)
    environment.update(ROEXEC_JOB_ID=header["job"], ROEXEC_RUN_ID=header["run"],
                       ROEXEC_TRIGGER=header["trigger"])
    for name in ("slot", "step"):
        if header.get(name) is not None:
            environment[f"ROEXEC_{name.upper()}"] = format_instant(header[name]) \
                if name == "slot" else header[name]
    return environment


def own_identity():
    """What tells this process from every other: boot id, pid, start time."""
    return f"{boot_id()} {os.getpid()} {process_start(os.getpid())}"


class CannotStart(RoexecError):
    """A command that could not be started; `exit_code` is what a shell gives: 126 or 127."""

    def __init__(self, exit_code, text):
        super().__init__(text)
        self.exit_code = exit_code


def find_program(name, environment):
    """The path of a program, looked up in the PATH of the job as execvp(3) would."""
    if "/" in name:
        return name
    denied = None
    for folder in environment.get("PATH", os.defpath).split(":"):
        path = os.path.join(folder or ".", name)
        if os.path.isfile(path):
            if os.access(path, os.X_OK):
                return path
            denied = path
    if denied:
        raise CannotStart(126, f"{denied}: {os.strerror(errno.EACCES)}")
    raise CannotStart(127, f"{name}: there is no such program in {environment.get('PATH', '')}")


def words_of(command, shell):
    """The words to execute: a text goes to the shell, a list is executed as it is."""
    return [*shell, command] if isinstance(command, str) else list(command)


def command_text(command):
    """A command on one line, for people: of a script its first one."""
    first, *more = command.strip().splitlines() if isinstance(command, str) else [
        shlex.join(command)]
    return printable(first) + (" ..." if more else "")


def spawn(words, environment, descriptors, group=None, child=None):
    """Start a program -> its pid. `descriptors` become its 0, 1, 2; nothing else is inherited.

    `child` are keywords of `fork_exec` where there is more to do than posix_spawn(3) can. It leads
    a session of its own; with `group=0` a process group of this session instead, as the
    command of a shell with job control. Signals are set to their defaults, none is blocked (Python
    ignores SIGPIPE and SIGXFSZ, which a child would inherit); but where this process ignores the
    loss of its terminal, so does the command there.
    """
    path, signals = find_program(words[0], environment), _CATCHABLE
    actions = [(os.POSIX_SPAWN_DUP2, here, there) for there, here in enumerate(descriptors)
               if here != there]
    if group is not None and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signals = set(_CATCHABLE) - {signal.SIGHUP}

    def start(path, words):
        if child is not None:
            return fork_exec(path, words, environment, descriptors, group=group, signals=signals,
                             **child)
        return os.posix_spawn(path, words, environment, file_actions=actions, setsigmask=(),
                              setsigdef=signals,
                              **({"setsid": True} if group is None else {"setpgroup": group}))
    try:
        try:
            return start(path, words)
        except OSError as error:
            if error.errno != errno.ENOEXEC:
                raise
            return start("/bin/sh", ["sh", path, *words[1:]])
    except OSError as error:
        if error.filename not in (None, path, "/bin/sh"):       # a step before the program
            raise CannotStart(126, f"{error.filename}: {error.strerror}") from None
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR) and not os.path.exists(
            os.path.join(child["folder"] if child else "", path))
        what = "there is no such program" if missing else error.strerror
        if error.errno == errno.ENOENT and not missing:
            what = "its interpreter is missing"
        raise CannotStart(127 if missing else 126, f"{path}: {what}") from None
    except ValueError as error:         # a NUL character
        raise CannotStart(126, f"{path}: {error}") from None


# All signals of POSIX but SIGKILL and SIGSTOP, whose number differs.
_CATCHABLE = tuple({*range(1, 32)} - {9, 17 if sys.platform == "darwin" else 19})


def inherit_nothing():
    """Let no command inherit what we did from our caller, but 0, 1 and 2."""
    for name in os.listdir("/dev/fd"):
        if int(name) > 2:
            with contextlib.suppress(OSError):          # the listing's own is closed by now
                os.set_inheritable(int(name), False)


def become_subreaper():
    """Inherit the orphans of one's descendants (prctl(2), PR_SET_CHILD_SUBREAPER); False where the
    host cannot do that."""
    try:
        import ctypes
        return ctypes.CDLL(None).prctl(36, ctypes.c_ulong(1), 0, 0, 0) == 0
    except (ImportError, OSError, AttributeError):
        return False


def fork(function):
    """Perform a function in a child -> its pid. The child never comes back from here."""
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:      # inherited so: none could be waited
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)           # for (wait(2))
    pid = os.fork()
    if pid == 0:
        try:
            function()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def keep_orphans(function):
    """Perform `function(keeper)` in a child, until it has ended.

    Should the child be killed, what it leaves hangs below this process, which stays until nothing
    of that is left: so whoever finishes the run finds it all, whatever it made of its session and
    its environment. `keeper` is [pid, start]; None where the host has no subreapers.
    """
    keeper = [os.getpid(), process_start(os.getpid())] if become_subreaper() else None
    child = fork(lambda: function(keeper))
    for name in os.listdir("/dev/fd"):
        if int(name) > 2:               # sockets and locks are the child's
            with contextlib.suppress(OSError):
                os.close(int(name))
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, 0) != (child, 0):
            pass


def exit_status(run):
    """The exit status that a run (a row or payload) gives to `run` and `wait`, as shells have it.

    124 is timeout(1)'s, 128+n a shell's for a signal, 125 timeout(1)'s for its own failures.
    """
    special = {"timed_out": 124, "cancelled": 130, "lost": 125, "skipped": 0}
    if run["state"] in special:
        return special[run["state"]]
    if run["signal"]:
        return 128 + signal_number(run["signal"])
    if run["exit_code"] is None:
        return 0 if run["state"] == "succeeded" else 125
    return run["exit_code"] or int(run["state"] == "failed")    # `success` wanted something else


# One command under supervision.

_READ_SIZE = 1 << 18     # bytes taken at once
_SMALL_PIPE, _LARGE_PIPE = 1 << 15, 1 << 20
_DRAIN = 1.0            # seconds for what is still in the pipes when the command has ended


class Signals:
    """What has been asked of this process by signals: handlers only set flags here.

    `descriptor` becomes readable at each signal. On a terminal SIGHUP tells of its loss, which ends
    no run; else it asks for the end, as SIGTERM does.
    """

    def __init__(self, forwarded=(), terminal=False):
        self.descriptor, self._writer = quiet_pipe()
        self.asked = None               # the last signal that asks for the end
        self.start = process_start(os.getpid())
        self.continued = False
        numbers = (signal.SIGTERM, signal.SIGHUP, *forwarded)
        self._before = {number: signal.signal(number, self._ask) for number in numbers}
        if terminal:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            # What a command has printed is passed on from the background (stty tostop).
            self._before[signal.SIGTTOU] = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        for number in (signal.SIGCHLD, signal.SIGCONT):
            self._before[number] = signal.signal(number, self._note)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)

    def _ask(self, number, _):
        self.asked = number

    def _note(self, number, _):
        self.continued = self.continued or number == signal.SIGCONT

    def drain(self):
        """Take what the descriptor has."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self.descriptor, 512):
                pass

    def close(self):
        """Put everything back as it was."""
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self.descriptor)
        os.close(self._writer)


def milliseconds(seconds):
    """What poll(2) takes: an int of C, where a negative one would mean for ever."""
    return min(max(0, math.ceil(min(seconds, LONGEST) * 1000)), (1 << 31) - 1)


def quiet_pipe():
    """A pipe whose ends never block."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    return reader, writer


class RunningCommand:
    """A started command: its streams are read and its end awaited around one poll(2).

    `sink(stream, data)` gets its output, `console` what a person is to see, `signals` tells of
    requests, `meter` keeps its memory. `kill_reason` becomes "timeout", "total_timeout", "memory"
    or "cancel" where it has to end.
    """

    def __init__(self, pid, streams, sink, signals, console=None, meter=None):
        self.pid, self.streams, self.sink = pid, streams, sink
        self.signals, self.console, self.meter = signals, console, meter
        self.kill_reason, self.killed, self.survivors = None, 0, 0
        self.ended = False              # the command is a zombie by now; it pins pid and session
        self.cpu_seconds, self.max_rss_bytes, self.output_bytes = 0.0, 0, 0
        self._own_peak = own_peak()
        self.enlarged = set()           # streams of much output
        self.refused = False            # somebody still holds a pipe, and we no longer read it

    def wait(self, deadlines, grace, is_cancelled, leftovers="leave"):
        """Look after the command until it and, where it is to be killed, its tree have ended.

        `deadlines` are (monotonic instant, kill reason), `grace()` is asked when it is needed.
        Returns Ended.
        """
        deadline, reason = min(deadlines, default=(math.inf, None))
        while not self._has_ended():
            now = time.monotonic()
            if is_cancelled():
                self.kill_reason = "cancel"
            elif now >= deadline:
                self.kill_reason = reason
            elif self.meter is not None and self.meter.exceeded(self._left):
                self.kill_reason = "memory"
            if self.kill_reason:
                self._kill(grace)
                break
            self._turn(deadline - now)
        self._drain()
        if leftovers == "kill" and not self.kill_reason:
            self._kill(grace)
        return self._reap()

    def _turn(self, seconds):
        """One turn of the poll: read what is there, and look whether the command has ended."""
        longest = math.inf if self.meter is None else self.meter.interval
        status = self.console and self.console.status
        if status:
            longest = min(longest, status.patience())
        self._read(min(seconds, longest, self.sink.patience()))
        self.sink.tick()
        if status and not self.console.backlog:
            status.tick(self.pid)

    def _read(self, seconds, most_waiting=0):
        poller = select.poll()
        poller.register(self.signals.descriptor, select.POLLIN)
        busy = self.console is not None and self.console.register(poller)
        if not busy or len(self.console.backlog) < most_waiting:
            for descriptor in self.streams:
                poller.register(descriptor, select.POLLIN)
        for descriptor, _ in poller.poll(milliseconds(seconds)):
            if descriptor == self.signals.descriptor:
                self.signals.drain()
            elif descriptor in self.streams:
                self._take(descriptor)
            else:
                self.console.write_on(descriptor)

    def _take(self, descriptor):
        data = os.read(descriptor, _READ_SIZE)
        if not data:
            del self.streams[descriptor]
            os.close(descriptor)
            return
        if len(data) >= _SMALL_PIPE and descriptor not in self.enlarged:
            self.enlarged.add(descriptor)
            _enlarge_pipe(descriptor)
        self.output_bytes += len(data)
        self._pass_on(self.streams[descriptor], self.sink.output(self.streams[descriptor], data))

    def _pass_on(self, stream, data):
        if self.console is not None and data:
            self.console.show(stream, data)

    def _has_ended(self):
        """Reap orphans that were left to us, by pid; the command itself is only looked at."""
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while not self.ended:
            try:
                info = os.waitid(os.P_ALL, 0, options)
            except ChildProcessError:   # somebody else has reaped it: its end is unknown
                self.ended = True
                break
            if info is None:
                break
            if info.si_pid == self.pid:
                self.ended = True
            else:
                self._reap_one(info.si_pid)
        if self.console is not None and not self.ended:
            self.console.follow_stops(self.pid)
        return self.ended

    def _reap_one(self, pid):
        _, status, usage = os.wait4(pid, 0)
        self.cpu_seconds += usage.ru_utime + usage.ru_stime
        self.max_rss_bytes = max(self.max_rss_bytes, usage.ru_maxrss * _RSS_UNIT)
        return status

    def _drain(self):
        """Read what is left in the pipes; whoever still holds one may write for a second more."""
        deadline = time.monotonic() + _DRAIN
        while self.streams or (self.console is not None and self.console.backlog):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            self._read(left, 64)        # also what the console's reader does not take yet
        for stream in ("out", "err"):
            self._pass_on(stream, self.sink.end(stream))
        self.refused = bool(self.streams)
        self.close()

    def _kill(self, grace):
        """SIGTERM (or what a person sent) to the tree, `grace()` seconds, then SIGKILL until
        nothing of it is left."""
        first = signal.SIGTERM
        if self.signals.asked in (signal.SIGINT, signal.SIGQUIT):
            first = self.signals.asked
        if self.kill_reason == "memory":            # there is no time to lose
            first, grace = signal.SIGKILL, lambda: 0
        self.killed, self.survivors = _end_all(
            self._left, first, grace(), self._pause,
            lambda: self.meter is not None and self.meter.kill())

    def _pause(self, seconds):
        """Read for some seconds, or until the command ends."""
        deadline, before = time.monotonic() + seconds, self.ended
        while self._has_ended() == before and time.monotonic() < deadline:
            self._read(deadline - time.monotonic())

    def _left(self):
        """{pid: Process} of what is alive of the tree: the command's session, and what descends
        from this supervisor, which inherits orphans. Orphans that have ended are reaped."""
        self._has_ended()
        if not _has_proc():
            return {self.pid: None} if _signal_group(self.pid, 0) and not self.ended else {}
        table, own = processes(), os.getpid()
        for pid, process in table.items():
            if process.parent == own and not process.alive and pid != self.pid:
                self._reap_one(pid)
        return _tree([pid for pid, process in table.items()
                      if process.parent == own or process.session == self.pid], table)

    def _reap(self):
        if not self._is_child():
            return Ended(lost=True)
        code = os.waitstatus_to_exitcode(self._reap_one(self.pid))
        memory = self.kill_reason == "memory"
        if self.max_rss_bytes <= self._own_peak:
            self.max_rss_bytes = 0      # that of this process; the command's is unknown
        if self.meter is not None:
            memory = self.meter.close() or memory
            self.max_rss_bytes = max(self.max_rss_bytes, self.meter.peak)
        return Ended(exit_code=code if code >= 0 else None, memory=memory or None,
                     signal=_signal_name(-code) if code < 0 else None,
                     timeout=self.kill_reason if self.kill_reason in REASONS["timed_out"] else None)

    def _is_child(self):
        try:
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            return True
        except ChildProcessError:
            return False

    def close(self):
        """Close the streams that are open."""
        for descriptor in self.streams:
            os.close(descriptor)
        self.streams = {}


def _enlarge_pipe(descriptor):
    """Let more wait in a pipe (fcntl(2)): much output then costs fewer turns of its writer's and
    ours. It is refused where the user has much in pipes already."""
    with contextlib.suppress(OSError, AttributeError):
        fcntl.fcntl(descriptor, getattr(fcntl, "F_SETPIPE_SZ", 1031), _LARGE_PIPE)


_RSS_UNIT = 1 if sys.platform == "darwin" else 1024     # getrusage(2)


def _signal_name(number):
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIG{number}"           # a real-time signal


def signal_number(name):
    """The number of a signal by its name, or of one that has none by `SIG` and the number."""
    return int(name[3:]) if name[3:].isdigit() else signal.Signals[name]


class _StatusLine:
    """How long a run is on, of how long about, in a line on standard error that is renewed each
    second: `backup-db 12s of about 1m`.

    It is not drawn where it might spoil something: a line of output that has no end yet, a
    password prompt (the command has changed the terminal's modes), another program's screen.
    """

    def __init__(self, title):
        self.title, self.usual = printable(title), None     # seconds that runs take usually
        self.began = self._next = None              # the monotonic instants
        self.is_drawn = self.inside = False         # the output stands inside of a line
        self._group, self._modes = os.getpgrp(), self._modes_now()

    @classmethod
    def if_possible(cls, title):
        """A status line, None where standard error is no terminal that can take one back."""
        pipe = stat.S_ISFIFO(os.fstat(1).st_mode)   # its reader may be drawing, as less does
        able = os.environ.get("TERM", "dumb") != "dumb"
        return cls(title) if able and not pipe and os.isatty(2) else None

    def patience(self):
        """Seconds until `tick` has something to do."""
        if self.began is None:
            self.began = time.monotonic()
            self._next = self.began + _STATUS_AFTER
        return max(0, self._next - time.monotonic())

    def tick(self, group):
        """Draw it if it is time; `group` is the process group that may have the terminal."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + 1 - (now - self.began) % 1
        if not self.inside and self._is_ours(group):
            text = f"{self.title} {format_duration(int(now - self.began))}"
            text += f" of about {format_duration(self.usual)}" if self.usual else ""
            width = os.get_terminal_size(2).columns or 80
            self._write(f"\r{text[:width - 1]}\x1b[K")
            self.is_drawn = True

    def clear(self):
        """Leave the line empty, with the cursor at its beginning."""
        if self.is_drawn:
            self.is_drawn = False
            self._write("\r\x1b[K")

    def _is_ours(self, group):
        try:
            return os.tcgetpgrp(2) in (self._group, group) and self._modes_now() == self._modes
        except OSError:                 # it is lost, or that of another session
            return False

    def _modes_now(self):
        import termios
        try:
            return termios.tcgetattr(2)[3]
        except termios.error:
            return None

    def _write(self, text):
        """Write if the terminal takes it now: Ctrl-S may hold it."""
        poller = select.poll()
        poller.register(2, select.POLLOUT)
        with contextlib.suppress(OSError):
            if poller.poll(0):
                os.write(2, text.encode())


_STATUS_AFTER = 2       # seconds; a shorter run has no status line


class Console:
    """The caller's terminal or pipes of a run in the foreground.

    Output is passed on unchanged, only as fast as its reader takes it; a reader that goes away ends
    neither run nor log. With a terminal this process acts as a shell with job control does; with a
    title (of a run) it may have a `status` line.
    """

    def __init__(self, title=None):
        self.status = title and _StatusLine.if_possible(title)
        self.backlog, self._gone = collections.deque(), set()
        self._group = os.getpgrp()
        try:
            self.terminal = os.isatty(0) and os.tcgetpgrp(0) == self._group
        except OSError:
            self.terminal = False

    def show(self, stream, data):
        """Pass on a chunk of "out" or "err"."""
        descriptor = 1 if stream == "out" else 2
        if descriptor not in self._gone:
            self.backlog.append((descriptor, memoryview(data)))

    def register(self, poller):
        """Wait for the reader of what is due -> whether anything is."""
        if self.backlog:
            poller.register(self.backlog[0][0], select.POLLOUT)
        return bool(self.backlog)

    def write_on(self, descriptor):
        """Write a piece: a pipe that is ready takes PIPE_BUF bytes without blocking (POSIX)."""
        _, data = self.backlog.popleft()
        try:
            if self.status:
                self.status.clear()
            written = os.write(descriptor, data[:select.PIPE_BUF])
            if self.status and written and os.isatty(descriptor):
                self.status.inside = data[written - 1] != 10
        except BlockingIOError:         # somebody else made it so, and has filled it
            written = 0
        except OSError:                 # EPIPE, EIO: its reader has gone
            self._gone.add(descriptor)
            self.backlog = collections.deque(
                item for item in self.backlog if item[0] != descriptor)
            return
        if written < len(data):
            self.backlog.appendleft((descriptor, data[written:]))

    def error(self, text):
        """Tell the person something, on standard error."""
        self.backlog.append((2, memoryview(f"roexec: {text}\n".encode())))

    def flush(self):
        """Write what is left, waiting for the reader."""
        while self.backlog:
            poller = select.poll()
            self.register(poller)
            poller.poll()
            self.write_on(self.backlog[0][0])

    def give_terminal(self, group=None):
        """Make a process group that of the terminal, ours without one (tcsetpgrp(3))."""
        if self.terminal:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
            with contextlib.suppress(OSError):
                os.tcsetpgrp(0, self._group if group is None else group)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def follow_stops(self, pid):
        """Stop with a command that Ctrl-Z stopped, and let it go on when we do."""
        stopped = None
        with contextlib.suppress(ChildProcessError):        # it has ended this instant
            stopped = self.terminal and os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG)
        if not stopped:
            return
        # One that wanted the terminal before it had it was stopped, and only has to go on.
        if stopped.si_status not in (signal.SIGTTIN, signal.SIGTTOU) or self._owner() != pid:
            if self.status:
                self.status.clear()
            self.give_terminal()
            os.killpg(self._group, signal.SIGSTOP)
            # Here again: a shell has sent SIGCONT, by `fg` with the terminal, by `bg` without.
            if self._owner() == self._group:
                self.give_terminal(pid)
        _signal_group(pid, signal.SIGCONT)

    def _owner(self):
        """The process group that has the terminal; None where that is lost."""
        try:
            return os.tcgetpgrp(0)
        except OSError:
            return None


# ==== 16 runner ===================================================================================
# The supervisor: it carries out one run at a time, from its journal, with all attempts and hooks,
# and never opens the store.

class _Execution:
    """How the commands of one run are executed: environment, folder, streams, log, journal.

    `folder` is the store's. In the foreground there is a `console`; `base` is the caller's
    environment where the run has that, with the caller's folder and standard input. `tell()` says
    that the journal has a notice that should not wait for the end; `keep_orphans` gives a keeper.
    `given` are secrets, {name: text}, which have a null in the header's `env`.
    """

    def __init__(self, journal, folder, signals, console=None, base=None, *, tell=None,
                 keeper=None, given=None):
        self.journal, self.folder, self.header = journal, folder, journal.header
        self.keeper, self.cgroups, self.boot = keeper, None, None
        self.signals, self.console, self.base, self.tell = signals, console, base, tell
        self.job, self.progress = journal.job, Progress(journal.events)
        self.secrets = given or {}
        self.given = {**{name: value for name, value in (self.header.get("env") or {}).items()
                         if value is not None}, **self.secrets}
        self.log, self.setup, self.last_output = None, Setup(), 0.0
        self.masks = Masks(self.secrets.values())
        self.problem = None             # why no command may be started at all

    def note(self, event, **values):
        """Write an event into the journal, and know it."""
        self.progress.apply(self.journal.note(event, **values))

    def info(self, text, level="INFO"):
        """Write a line of roexec's own into the log, if there is one."""
        if self.log is not None:
            self.log.write(self.masks.text(text), time.time(), level)

    def check_given(self):
        """The outcome if values are missing that had to be given to the run, else None."""
        for name, value in (self.header.get("env") or {}).items():
            if value is None and name not in self.secrets:
                text = (f"the value of {name} was given when the run was asked for, and is kept "
                        "nowhere; ask for the run again")
                self.info(text, "ERROR")
                return {"state": "failed", "reason": "secret", "message": text}
        problems = self.job.problems_of(self.given)
        for text in problems:
            self.info(text, "ERROR")
        return problems and {"state": "failed", "reason": "start", "message": problems[0]} or None

    # What `RunningCommand` asks of its sink.

    def output(self, stream, data):
        """Take a chunk of output -> what of it may be seen now."""
        self.last_output = time.time()
        data = self.masks.feed(stream, data)
        if data:
            self.log.output(stream, data, self.last_output)
        return data

    def end(self, stream):
        """The end of a stream -> what was kept back, since a secret might have begun there."""
        data = self.masks.flush(stream)
        if data:
            self.log.output(stream, data, time.time())
        return data

    def patience(self):
        """Seconds after which a piece of a line is to be written."""
        return _PIECE_WAITS if self.log.pending else math.inf

    def tick(self):
        """Called after each turn: a piece of a line that has waited is written."""
        now = time.time()
        if self.log.pending and not 0 <= now - self.last_output < _PIECE_WAITS:
            self.log.flush(now)

    def is_cancelled(self):
        """Whether the run is to end: somebody has asked for it, or a signal came."""
        return self.signals.asked is not None

    # Commands.

    def _run(self, what, command, timeout, stdin=None, sink=None):
        """Run the command of an attempt, a condition or a hook to its end -> Ended. Its output goes
        into the log, or to a sink."""
        attempt, began = what == "attempt", self.log.size
        self.note("starting", what=what)
        try:
            running = self._start(command, stdin, attempt, sink or self)
        except CannotStart as error:
            self.info(f"Cannot start {error}", "ERROR")
            ended = Ended(exit_code=error.exit_code,
                          error=self.masks.text(f"cannot start {error}"))
            self.note("ended", exit_code=ended.exit_code, error=ended.error)
            return ended
        self.note("started", pid=running.pid, start=process_start(running.pid))
        deadlines = self._deadlines(timeout, attempt)
        cancelled = _never if what.startswith("post_run") else self.is_cancelled
        ended = running.wait(deadlines, self._grace, cancelled,
                             self.job.leftovers if attempt else "leave")
        if self.console is not None and attempt:
            self.console.give_terminal()
            if self.console.terminal and ended.signal == "SIGINT":
                self.signals.asked = signal.SIGINT          # Ctrl-C reached the command itself
        if attempt:
            ended = self.examined(ended.changed(matched=self._matched(began)))
        if self.console is not None and self.console.status:
            self.console.status.clear()
        self._tell_of(running)
        self.note("ended", exit_code=ended.exit_code, signal=ended.signal, timeout=ended.timeout,
                  memory=ended.memory, matched=ended.matched, outputs=ended.outputs,
                  error=ended.error, cpu_seconds=round(running.cpu_seconds, 6),
                  max_rss_bytes=running.max_rss_bytes or None,
                  output_bytes=running.output_bytes)
        return ended

    def examined(self, ended):
        """How an attempt has ended, by what else there is to look at."""
        return ended

    def _matched(self, began):
        """The names of the job's patterns that a line of the output has matched from an offset."""
        patterns, matched = patterns_of(self.job), set()
        self.log.flush(time.time())
        if patterns and self.log.path is not None:
            patterns = {name: re.compile(text.encode()) for name, text in patterns.items()}
            for line in _printed_lines(os.path.join(self.folder, self.log.path), began):
                matched.update(name for name in patterns.keys() - matched
                               if patterns[name].search(line))
        return sorted(matched)

    def _grace(self):
        """Seconds between SIGTERM and SIGKILL."""
        _, limit = self.journal.cancelled() or (None, None)
        return self.job.grace if limit is None else min(self.job.grace, limit)

    def _deadlines(self, timeout, attempt):
        now = time.monotonic()
        deadlines = [] if timeout is None else [(now + timeout, "timeout")]
        if attempt and self.job.total_timeout is not None:
            deadlines.append((now + self._total_left(), "total_timeout"))
        return deadlines

    def _tell_of(self, running):
        if running.killed:
            self.info(f"Killed {running.killed} processes" if running.killed > 1
                      else "Killed 1 process")
        if running.survivors:
            self.info(f"{running.survivors} processes survived SIGKILL", "ERROR")
        if running.refused:
            self.info("A process that was left holds the output open; what it writes from now on "
                      "is refused")

    def _start(self, command, stdin, attempt, sink):
        """Start a command -> RunningCommand. Raises CannotStart."""
        console = self.console if attempt else None
        source = self._standard_input(stdin, attempt)
        out, err, meter = os.pipe(), os.pipe(), None
        try:
            meter = self._meter() if attempt else None
            pid = self._spawn(words_of(command, self.job.shell), (source, out[1], err[1]),
                              0 if console is not None and console.terminal else None,
                              meter and meter.folder)
        except BaseException as error:
            os.close(out[0])
            os.close(err[0])
            if meter is not None:
                meter.close()
            if isinstance(error, OSError):
                raise CannotStart(126, f"{error.strerror}: {error.filename}") from None
            raise
        finally:
            os.close(out[1])
            os.close(err[1])
            if source > 2:
                os.close(source)
        if console is not None:
            console.give_terminal(pid)
        return RunningCommand(pid, {out[0]: "out", err[0]: "err"}, sink, self.signals, console,
                              meter)

    def _meter(self):
        number = len(self.progress.attempts)
        meter, remark = meter_of(self.job, self.cgroups, f"run-{self.journal.run_id}-{number}")
        if remark is not None:
            self.info(remark)
        return meter

    def _spawn(self, words, descriptors, group, cgroup=None):
        if self.problem is not None:
            raise CannotStart(126, self.problem)
        if self.base is not None:                   # the caller's folder and umask are ours
            return spawn(words, self.environment, descriptors, group)
        folder = job_folder(self.job, self.environment)
        setup = self.setup if cgroup is None else self.setup.changed(cgroup=cgroup)
        if setup:
            return spawn(words, self.environment, descriptors, group,
                         {"setup": setup, "folder": folder, "umask": self.job.umask})
        before = os.umask(self.job.umask)
        try:
            os.chdir(folder)
            return spawn(words, self.environment, descriptors, group)
        except OSError as error:
            raise CannotStart(126, f"in the folder {folder}: {error.strerror}") from None
        finally:
            os.umask(before)

    def _standard_input(self, data, attempt):
        """A descriptor of what a command reads: text of the job, what a hook gets, or nothing."""
        if attempt and self.base is not None:
            return 0
        if attempt and self.job.stdin is not None:
            data = self.job.stdin.encode()
        if data is None:
            return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        return file_of(data)

    def _total_left(self):
        """Seconds until the `total_timeout`, which counts from the first attempt; None without."""
        if self.job.total_timeout is None or not self.progress.attempts:
            return self.job.total_timeout
        return (self.progress.attempts[0]["started_at"] + self.job.total_timeout - time.time())


def _printed_lines(path, offset):
    """The lines of output in a log from an offset on; the pieces of one are put together."""
    begun = {"out": b"", "err": b""}
    for line in (line for lines in follow(path, offset=offset) for line in io.BytesIO(lines.data)):
        for stream in begun:
            text = begun[stream] + select_lines(line, stream=stream)
            if text.endswith(b"\n"):
                yield text
                text = b""
            begun[stream] = text[-MOST_FOR_HOOKS:]
    yield from filter(None, begun.values())


class _Collector:
    """A sink for output that is wanted, and is not to be seen."""

    def __init__(self):
        self.data = bytearray()

    def output(self, stream, data):
        if stream == "out" and len(self.data) <= MOST_FOR_HOOKS:       # more is refused
            self.data += data
        return b""

    def end(self, stream):
        return b""

    def patience(self):
        return math.inf

    def tick(self):
        pass


LIVE_HOOKS = "pre_run", "on_retry"      # whose notices do not wait for the end of the run


class _Hooks(_Execution):
    """The hooks of a run: commands, and notices that whoever has the store sends."""

    def _hooks(self, name):
        """Run the hooks of a name in order -> whether all of them succeeded."""
        succeeded = True
        for index, hook in enumerate(self.job.hooks.get(name, ())):
            data = self.printed() if name != "pre_run" else None
            if hook.condition and \
                    self._run(name + " condition", hook.condition, 60).exit_code != 0:
                continue
            if hook.kind != "command":
                self._notice(name, index, hook)
                continue
            self.info(f"Hook {name}: running {command_text(hook.command)}")
            result = self._run(name, hook.command, hook.timeout, data)
            if result.exit_code != 0:
                succeeded = False
                self.info(f"Hook {name} failed, {_ending(result)}", "ERROR")
        return succeeded

    def _notice(self, name, index, hook):
        """Ask for a notice, or for the run of another job: whoever has the store sees to it."""
        target = f" {hook.target}" if hook.kind == "run" else ""
        self.info(f"Hook {name}: {hook.kind}{target}")
        self.note("notice", hook=name, index=index)
        if self.tell is not None and (self.header.get("parent") or name in LIVE_HOOKS):
            self.tell()

    def _tell_hooks(self, state, reason, exit_code):
        self.environment.update(ROEXEC_STATUS=state, ROEXEC_REASON=reason or "",
                                ROEXEC_EXIT_CODE="" if exit_code is None else str(exit_code))

    def _end_hooks(self, decided):
        """The hooks at the end. (A supervisor that is lost after the decision loses them.)"""
        self._tell_hooks(decided["state"], decided["reason"], decided.get("exit_code"))
        if decided["state"] == "skipped":
            return
        if decided["state"] == "succeeded":
            self._hooks("on_success")
        elif decided["state"] != "cancelled":
            self._hooks("on_failure")
        self._hooks("post_run")

    def printed(self):
        """What the run has printed: the newest MiB, without stamps."""
        self.log.flush(time.time())
        if self.log.path is None:
            return b""
        return select_lines(
            newest_lines(os.path.join(self.folder, self.log.path), MOST_FOR_HOOKS), raw=True)


class Supervision(_Hooks):
    """One run, from its journal to its end; `_Execution` says what it is made with."""

    def perform(self):
        """Carry the run to its end; what came before in the journal is taken as done.

        Where the header says `only`, the hooks of that name are all there is to do.
        """
        try:
            self._perform()
        except Exception as error:      # of this host, or ours: it must not be tried for ever
            self.end_remnants()
            if self.progress.outcome is None:
                self.note("outcome", state="lost", reason="supervisor",
                          message=f"its supervisor failed: {error}")
            self.note("finished")
            raise

    def _perform(self):
        earlier, number = self.progress.supervisor, len(self.progress.attempts)
        self.boot = (earlier or {}).get("boot") or self.header["boot"]
        self.cgroups = cgroups_for(self.job)
        self.note("supervisor", pid=os.getpid(), start=self.signals.start, log=self._open_log(),
                  boot=boot_id(), keeper=self.keeper, cgroups=self.cgroups)
        self._prepare()
        if self.header.get("only"):
            if earlier is None:
                self.resolve()
                self._tell_hooks("skipped", "missed", None)
                self._hooks(self.header["only"])
        elif self.progress.outcome is None:
            decided = self.decide(number)
            self.note("outcome", **decided)
            if self.console is not None:
                _tell_person(self.console, **decided)
            self._end_hooks(self.progress.outcome)
        else:
            self.end_remnants()        # of a hook: those that were not begun are lost
        self.log.close(time.time())
        self.note("finished", log=self.log.path)

    def _prepare(self):
        """Find out as whom and with what the commands run. Where that is not possible, nobody else
        is taken in place of the user: then notices are all that is left to do."""
        try:
            self.setup = setup_of(self.job)
        except ValueError as error:
            self.problem = f"as the job says: {error}"
        self.make_environment({})

    def make_environment(self, variables):
        uid = os.geteuid() if self.setup.uid is None else self.setup.uid
        self.environment = run_environment(
            job_environment(self.job, uid, self.base, variables), self.header, self.given)
        self.environment["ROEXEC_LOG"] = os.path.join(self.folder, self.log.path or "")
        self.environment["ROEXEC_ATTEMPT"] = str(len(self.progress.attempts))

    def resolve(self):
        """Get the variables of `env_from` -> the outcome if that is not possible, else None."""
        if self.problem is not None:
            self.info(f"Cannot start {self.problem}", "ERROR")
            return {"state": "failed", "reason": "start",
                    "message": f"cannot start {self.problem}"}
        problem = self.check_given()
        if problem is not None or not self.job.env_from:
            return problem
        try:
            variables, secrets = resolve_environment(
                self.job.env_from, vault=self.header.get("vault"),
                user_home=self.environment["HOME"], environment=os.environ,
                directory=job_folder(self.job, self.environment), run_command=self._capture,
                owner=self.setup.uid, is_cancelled=self.is_cancelled)
        except RoexecError as error:
            self.info(str(error), "ERROR")
            return {"state": "failed", "reason": "secret", "message": str(error)}
        self.masks = Masks({*secrets, *self.secrets.values()})
        self.make_environment(variables)
        return None

    def _capture(self, command):
        """The standard output of a command of `env_from`, which goes nowhere else."""
        sink = _Collector()
        ended = self._run("env_from", command, 60, sink=sink)
        if ended.exit_code != 0:
            raise RoexecError(f"env_from: the command failed, {ended.error or _ending(ended)}")
        return bytes(sink.data)

    def _open_log(self):
        earlier = self.progress.log
        started = max(time.time(), self.header.get("not_before") or 0)
        self.log = LogWriter(self.folder, self.header["job"], started, self.header["run"],
                             step=self.header.get("step"), path=earlier,
                             most=self.job.log.max_size)
        self.log.write("Going on after the loss of a supervisor" if earlier else "Starting run",
                       started)
        return self.log.path

    # The order of things (SEMANTICS, "The life of a run").

    def decide(self, number):
        """The values of the event `outcome`, where `number` attempts were begun before."""
        lost = self.is_lost(number)
        self.end_remnants()
        if self.journal.cancelled() is not None or self.is_cancelled():
            return self.cancelled()
        problem = self.resolve()
        if self.is_cancelled():
            return self.cancelled()
        if lost and (number == 0 or problem is not None):
            return self._decided(Ended(lost=True))
        if problem is not None:
            return problem
        if number == 0:
            return self.before_attempts() or self.attempt_until_done(0)
        ended = Ended(lost=True) if lost else Ended(
            **{name: self.progress.attempts[-1].get(name) for name in Ended.__slots__})
        delay = self._delay_before_next(ended, number)
        if delay is None:
            return self._decided(ended)
        return self.attempt_until_done(number, delay)

    def is_lost(self, number):
        """Whether nobody knows how far the run has come, whose supervisor was lost."""
        return (self.progress.open is not None
                and not self.progress.open["what"].startswith(("on_retry", "env_from"))
                or self.boot != boot_id()
                or number == 0 and (bool(self.progress.done) or self._belongs_to_another()))

    def _belongs_to_another(self):
        """Whether only a process that has ended could start the run, with its environment."""
        return self.header.get("owner") not in (None, own_identity())

    def end_remnants(self):
        """Kill what a lost supervisor has left of this run."""
        left = self.progress.open
        if left is None:
            return
        # Of another boot its numbers are those of other processes.
        if (left["boot"] or self.header["boot"]) == boot_id():
            killed = kill_remnants(self.journal.run_id, left, self.job.grace)
            if killed:
                self.info(f"Killed {killed} processes that were left")
        self.note("ended", lost=True)
        self.info("Lost: its supervisor was killed", "ERROR")

    def before_attempts(self):
        """Condition and `pre_run`; the outcome if one of them forbids the run."""
        late = time.time() - self.header["claimed_at"]
        if late > max(ON_TIME, self.job.catch_up_window):
            return {"state": "lost", "reason": "supervisor", "message": "it was never started"}
        self._await_instant()
        if self.job.condition:
            ended = self._run("condition", self.job.condition, 60)
            if self.is_cancelled():
                return self.cancelled()
            if ended.timeout or ended.signal or ended.exit_code in (126, 127):
                return self._final("failed", "condition", ended)
            if ended.exit_code:
                return {"state": "skipped", "reason": "condition", "message":
                        f"the condition ended with {ended.exit_code}"}
        if not self._hooks("pre_run"):
            return {"state": "failed", "reason": "pre_run", "message": "the hook pre_run failed"}
        return self.cancelled() if self.is_cancelled() else None

    def _await_instant(self):
        """Wait for the instant of a slot: a scheduler has prepared its start a little earlier."""
        early = (self.header.get("not_before") or 0) - time.time()
        if 0 < early < 1 and (early < 0.003 or self._pause(early - 0.002)):
            time.sleep(max(0, self.header["not_before"] - time.time()))

    def attempt_until_done(self, number, delay=0):
        while True:
            if delay and not self._pause(delay):
                return self.cancelled()
            number += 1
            ended = self.attempt(number)
            if self.is_cancelled():
                return self.cancelled()
            delay = self._delay_before_next(ended, number)
            if delay is None:
                return self._decided(ended)

    def attempt(self, number):
        self.begin_attempt(number)
        self.info(f"Running {command_text(self.job.command)}")
        return self._run("attempt", self.job.command, self.job.timeout)

    def begin_attempt(self, number):
        self.environment["ROEXEC_ATTEMPT"] = str(number)
        for name in ("ROEXEC_STATUS", "ROEXEC_REASON", "ROEXEC_EXIT_CODE"):
            self.environment.pop(name, None)            # what on_retry was told
        self.info(f"Attempt {number}")

    def _delay_before_next(self, ended, number):
        """Seconds until the next attempt, or None. Says so, and runs `on_retry`."""
        delay = retry_delay(self.job, ended, number, int.from_bytes(os.urandom(4), "big") / 2**32)
        if delay is None or self.is_cancelled():
            return None
        total = self._total_left()
        if total is not None and delay >= total:
            return None
        if self.progress.retry is not None:         # decided by an earlier supervisor
            return max(0, self.progress.retry["until"] - time.time())
        if self.progress.done[-1] == "attempt":     # else an earlier supervisor has begun them
            state, reason = outcome(self.job, ended)
            self.info(f"Attempt {number} {state}, {_ending(ended)}{reason_beside(reason)}",
                      "ERROR")
            self._tell_hooks(state, reason, ended.exit_code)
            self._hooks("on_retry")
        self.note("retry", until=time.time() + delay)
        self.info(f"Retrying ({number}/{max(self.job.retries, 1)}) after backoff "
                  f"{format_duration(delay)}")
        return delay

    def _pause(self, seconds):
        """Wait -> False if the run was cancelled meanwhile."""
        deadline = time.monotonic() + seconds
        poller = select.poll()
        poller.register(self.signals.descriptor, select.POLLIN)
        while not self.is_cancelled() and time.monotonic() < deadline:
            poller.poll(milliseconds(deadline - time.monotonic()))
            self.signals.drain()
        return not self.is_cancelled()

    def _decided(self, ended):
        state, reason = outcome(self.job, ended)
        if state == "lost" and self.boot != boot_id():
            reason = "power"
        return self._final(state, reason, ended)

    def _final(self, state, reason, ended):
        """An outcome with its last line in the log."""
        if state == "succeeded":
            self.info(f"Completed, {_ending(ended)}")
        else:
            self.info(f"Run {self.journal.run_id} {state}, {_ending(ended)}"
                      + reason_beside(reason), "ERROR")
        return {"state": state, "reason": reason, "message": ended.error,
                "exit_code": ended.exit_code, "signal": ended.signal}

    def cancelled(self):
        reason, _ = self.journal.cancelled() or (
            "user" if self.console is not None else "shutdown", None)
        self.info(f"Run {self.journal.run_id} cancelled, reason={reason}")
        return {"state": "cancelled", "reason": reason}


MOST_FOR_HOOKS = 1 << 20
_PIECE_WAITS = 0.2      # seconds for the rest of a line


def _never():
    return False


def _tell_person(console, state, reason=None, message=None, **_):
    """Say to who waits in the foreground what no command has said."""
    if message and state != "succeeded":
        console.error(message if state == "failed" else f"{state}: {message}")
    elif state == "timed_out" or reason_beside(reason):
        console.error(f"{state}, reason={reason}")


def _ending(ended):
    """How a command ended, as the log says it."""
    if ended.timeout:
        return ended.timeout
    if ended.lost:
        return "lost"
    return f"signal={ended.signal}" if ended.signal else f"exit={ended.exit_code}"


def file_of(data):
    """A descriptor that reads as the data, and belongs to no name."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("stdin")
    else:                               # macOS and the BSDs
        import tempfile
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.write(descriptor, data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


# The supervisors of a server.

def serve_runs(channel, folder, perform, *, keeper=None, console=None):
    """The body of a supervisor: take runs from their owner, one at a time, until it goes away.

    `channel` is a SOCK_SEQPACKET socket: the name of a journal comes with the journal, locked, and
    with what was given in memory alone; the answer is "done" or, where it ends now, "last", the
    name, and the traceback of what went wrong here; "notice" in between names journals that ask
    for one. `perform` carries a run out, with what `_Execution` is made with.
    """
    signals = Signals()
    try:
        while True:
            signals.asked = None
            journal, given = _receive_run(channel, folder)
            if journal is None:
                return
            answer = _supervise(perform, channel, journal, folder, signals, console=console,
                                keeper=keeper, given=given)
            os.chdir("/")
            journal.close()
            # A SIGTERM for that run may still be on its way; or daemons were left.
            last = journal.cancelled() is not None or has_children()
            if not _answer(channel, f"{'last' if last else 'done'} {answer}"):
                Store(folder).wake()
            if last:
                return
    finally:
        signals.close()
        channel.close()


def _supervise(perform, channel, journal, *execution, **more):
    try:
        perform(journal, *execution, tell=lambda *names: _answer(
            channel, f"notice {' '.join(names or (journal.name,))}"), **more)
        return journal.name
    except Exception:
        import traceback
        return f"{journal.name} {traceback.format_exc()}"


def _answer(channel, text):
    try:
        channel.send(text.encode()[:LONGEST_ANSWER])
        return True
    except OSError:                     # the server has gone
        return False


LONGEST_ANSWER = 60_000    # bytes; a message of a socket has to fit into its buffer


def has_children():
    """Whether any process descends from this one: what is left hangs below a child of ours."""
    try:
        while True:
            info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG)
            if info is None:
                return True
    except ChildProcessError:
        return False


def send_run(channel, journal, given=None):
    """Hand a run to the supervisor at the other end; `given` is not to be written anywhere."""
    if not given:
        return send_descriptor(channel, journal.name, journal.descriptor)
    memory = file_of(json.dumps(given).encode())
    try:
        send_descriptor(channel, journal.name, journal.descriptor, memory)
    finally:
        os.close(memory)


def _receive_run(channel, folder):
    """(journal, what was given) that `send_run` has sent; (None, None) where nobody is there."""
    name, descriptor, *memory = receive_descriptors(channel)
    if name is None:
        return None, None
    given = {}
    for other in memory:
        with open(other, "rb") as file:
            given = json.loads(file.read())
    return Journal(os.path.join(folder, "active", name), descriptor), given


def send_descriptor(channel, text, *descriptors):
    """Send a text and open files over a Unix socket (SCM_RIGHTS)."""
    channel.sendmsg([text.encode()], [
        (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))])


def receive_descriptors(channel):
    """(text, descriptor, …) of what was sent; (None, None) where the other side has gone away.

    The flag MSG_CMSG_CLOEXEC is why `socket.recv_fds` will not do: a command would inherit the
    lock. Raises RoexecError for a text without its file.
    """
    try:
        data, ancillary, _, _ = channel.recvmsg(
            4096, socket.CMSG_SPACE(8), getattr(socket, "MSG_CMSG_CLOEXEC", 0))
    except ConnectionError:
        data = b""
    if not data:
        return None, None
    descriptors = array.array("i")
    for _, _, content in ancillary:
        descriptors.frombytes(content[:len(content) // 4 * 4])
    if not descriptors:
        raise RoexecError(f"the message {data!r} came without its file")
    return (data.decode(), *descriptors)


STALL = 0.005           # seconds without an end after which one more supervisor is worth its fork
_AT_LEAST = 3           # supervisors that a herd may have without waiting for that
_IDLE = 5.0             # seconds until a supervisor that nobody needs ends


class _Supervisor:
    """A supervisor as its owner knows it; `run` is the name of its journal, None without one."""
    __slots__ = ("channel", "run", "since", "is_new")

    def __init__(self, channel):
        self.channel, self.run, self.is_new = channel, None, True
        self.since = time.monotonic()   # when it was asked for, or has become idle


OTHER_FILES = 64            # that whoever has Supervisors may have open besides one for each


class Supervisors:
    """The supervisors that runs are handed to: one is kept ready, and a herd gets more as long as
    none comes back by itself. `waiting` are journals of runs that wait for one.

    `folder` is the store's; `fork(channel)` has a process made that serves runs on that socket, and
    raises OSError where it cannot. `given` has by the name of a journal what is kept in memory
    alone: the secrets that were given to its run.
    """

    def __init__(self, folder, fork, poller, say):
        self.folder, self.make, self.poller, self.say = folder, fork, poller, say
        self.given = {}
        self.all, self.idle, self.forking = {}, [], 0       # all: {descriptor: _Supervisor}
        self.waiting = collections.deque()
        self.stalled = False            # runs waited, and nobody came back
        self.telling = []               # names of journals that ask for notices

    def close(self):
        """Leave the supervisors to themselves: each ends when its run has."""
        for supervisor in self.all.values():
            supervisor.channel.close()
        for journal in self.waiting:
            journal.close()             # whoever comes next starts it, if that is in time

    def take_telling(self):
        """The names of journals that have asked for notices since the last time."""
        told, self.telling = self.telling, []
        return told

    def are_busy(self):
        """Whether any run is on, or waits for a supervisor."""
        return bool(self.waiting) or any(supervisor.run for supervisor in self.all.values())

    def runs(self):
        """The names of the journals that are in their hands, or wait for them."""
        return {supervisor.run for supervisor in self.all.values()} | {
            journal.name for journal in self.waiting}

    def fork(self):
        """Have one more made."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self.make(theirs)
        except OSError:                 # too many processes, or the launcher has ended
            ours.close()
            return
        finally:
            theirs.close()
        self.all[ours.fileno()] = _Supervisor(ours)
        self.poller.register(ours, select.POLLIN)
        self.forking += 1

    def hear(self, descriptor):
        """Take a message of a supervisor -> [the journal that it has given back]."""
        supervisor = self.all[descriptor]
        try:
            word, _, text = supervisor.channel.recv(LONGEST_ANSWER).decode().partition(" ")
        except ConnectionError:         # it was killed before it had read what was sent to it
            word = text = ""
        if word == "notice":
            self.telling += text.split()
            return []
        run, supervisor.run = supervisor.run, None
        if supervisor.is_new:
            supervisor.is_new = False
            self.forking -= 1
        if word in ("ready", "done"):
            supervisor.since = time.monotonic()
            self.idle.append(supervisor)
        elif word == "":
            self._forget(supervisor)
        try:
            journal = run and Journal.find(os.path.join(self.folder, "active", run))
        except OSError:                 # too many files are open: found at the next look
            journal = None
        if "Traceback" in text:
            self.say(f"A supervisor has failed, run {text}", "ERROR")
            if journal and not Progress(journal.events).finished:
                journal.close()         # tried again at the next look, not for ever at once
                return []
        return [journal] if journal else []

    def _forget(self, supervisor):
        self.poller.unregister(supervisor.channel)
        del self.all[supervisor.channel.fileno()]
        supervisor.channel.close()
        if supervisor in self.idle:
            self.idle.remove(supervisor)

    def hand_over(self):
        """Give runs that wait to supervisors that do not; see to it that there are enough."""
        while self.waiting and self.idle:
            supervisor, journal = self.idle.pop(), self.waiting.popleft()
            try:
                send_run(supervisor.channel, journal, self.given.get(journal.name))
            except OSError:             # it has ended: seen by the poll
                self.waiting.appendleft(journal)
                continue
            self.given.pop(journal.name, None)
            supervisor.run = journal.name
            journal.close()             # the lock has gone with it
        if self.forking or self.idle:
            return
        if not self.waiting or len(self.all) < _AT_LEAST or self.stalled:
            self.fork()

    def rest(self):
        """Let supervisors end that nobody has needed for a while, but one."""
        while len(self.idle) > 1 and time.monotonic() - self.idle[0].since > _IDLE:
            self._forget(self.idle[0])


# A command that is not recorded.

def exec_here(words):
    """Run a command in the foreground and record nothing -> its exit status, as shells have it."""
    signals, console = Signals((signal.SIGINT, signal.SIGQUIT)), Console()
    inherit_nothing()
    try:
        pid = spawn(words, dict(os.environ), (0, 1, 2), 0 if console.terminal else None)
        console.give_terminal(pid)
        ended = RunningCommand(pid, {}, _Collector(), signals, console).wait(
            (), lambda: 10, lambda: signals.asked is not None)
    except CannotStart as error:
        console.error(error)
        ended = Ended(exit_code=error.exit_code)
    finally:
        console.give_terminal()
        console.flush()
        signals.close()
    return ended.exit_code if ended.signal is None else 128 + signal_number(ended.signal)


# ==== 17 pipelines ================================================================================
# A run that has steps: its supervisor starts a run for each step that is ready, as a server starts
# the runs of jobs, and goes on from their ends. Which steps are ready is decided in policy. It
# never opens the store: the journals of steps stay beside its own until it has finished, so that
# whoever finds that later goes on from there. A step that was started is not started again, unless
# it says so; that it is about to be is on the disk before.

def perform_run(journal, folder, signals, **how):
    """Carry out a run, whatever it is, from its journal; `how` is what Supervision is made with."""
    kind = _StepRun if journal.header.get("parent") else \
        _PipelineRun if journal.header["spec"].get("pipeline") else Supervision
    kind(journal, folder, signals, **how).perform()


def step_end(journal):
    """How the step of a journal has ended, None if it has not: the values of its outcome, and as
    `outputs` what it hands on, `at` when it ended."""
    progress = Progress(journal.events)
    if progress.finished is None:
        return None
    outputs = progress.outputs if progress.outcome["state"] == "succeeded" else {}
    return {**progress.outcome, "at": progress.finished["at"], "outputs": outputs}


def step_ends(journal):
    """{run id: end} of the steps of a pipeline that have ended, by its journal and theirs."""
    ends = {event["run"]: {**event, "outputs": {}} for event in journal.events
            if event["event"] == "over"}
    for _, run_id in journal.steps():
        of_step = None if run_id in ends else Journal.glance(journal.path_of(run_id))
        end = of_step and step_end(of_step)
        if end:
            ends[run_id] = end
    return ends


# What steps share.

def work_path(folder, name):
    """The scratch folder of a pipeline run; `name` is that of the run which was the first."""
    return os.path.join(folder, "work", name, "scratch")


def _make_work(folder, name, setup):
    """Make it, for the user of a setup. Where that is another one, who may not enter the store, a
    link leads out of it."""
    base = os.path.join(folder, "work", name)
    if os.path.isdir(os.path.join(base, "scratch")):
        return
    os.makedirs(os.path.dirname(base), 0o700, exist_ok=True)
    if setup.uid in (None, os.geteuid()):
        for path in (base, os.path.join(base, "scratch")):
            os.makedirs(path, 0o700, exist_ok=True)
        return
    import tempfile
    real = tempfile.mkdtemp(prefix=f"roexec-{name}-", dir="/var/tmp")
    os.chmod(real, 0o711)
    os.mkdir(os.path.join(real, "scratch"), 0o700)
    os.chown(os.path.join(real, "scratch"), setup.uid, -1 if setup.gid is None else setup.gid)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(base)
    os.symlink(real, base)


def remove_unused_work(store):
    """Remove the scratch folders of runs whose logs are gone."""
    import shutil
    if not os.path.isdir(store.file("work")):
        return
    names = os.listdir(store.file("work"))      # before it is asked which of them are needed
    with store.read() as db:
        unused = set(names) - kept_work(db)
    for name in unused:
        path = store.file(f"work/{name}")
        if os.path.islink(path):
            shutil.rmtree(os.readlink(path), ignore_errors=True)
            os.unlink(path)
        else:
            shutil.rmtree(path, ignore_errors=True)


_MOST_OUTPUTS, _LONGEST_OUTPUT = 1 << 20, 64 << 10      # bytes
_OUTPUT_NAME = Pattern(r"[A-Za-z_][A-Za-z0-9_]*")


def parse_outputs(data):
    """{name: value} of what a step has written (bytes): lines of NAME=VALUE, or NAME<<MARK and
    lines up to MARK. Raises ValueError that says in which line what is wrong."""
    if len(data) > _MOST_OUTPUTS:
        raise ValueError(f"more than {_MOST_OUTPUTS} bytes")
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not of UTF-8") from None
    if lines[-1] == "":
        lines.pop()
    values, numbered = {}, iter(enumerate(lines, 1))
    for number, line in numbered:
        if not line.strip():
            continue
        name, value = _output_of(line, number, numbered)
        if len(value.encode()) > _LONGEST_OUTPUT or "\0" in value:
            raise ValueError(f"line {number}: the value of {name} has more than {_LONGEST_OUTPUT} "
                             "bytes, or a NUL character among them")
        values[name] = value
    return values


def _output_of(line, number, following):
    """(name, value) of a line, and of those that follow where it has a mark."""
    name, sign, value = line.partition("=")
    if "<<" in name:
        name, sign, mark = line.partition("<<")
    if not sign or not _OUTPUT_NAME.fullmatch(name):
        raise ValueError(f"line {number} is neither NAME=VALUE nor NAME<<MARK")
    if LOADERS.fullmatch(name) or name.startswith("ROEXEC_"):
        raise ValueError(f"line {number}: {name} is not for steps to set")
    if sign == "=":
        return name, value
    text = []
    for _, more in following:
        if more == mark:
            return name, "\n".join(text)
        text.append(more)
    raise ValueError(f"line {number}: there is no line {mark} that ends the value of {name}")


# The run of a pipeline.

class _OfPipeline(Supervision):
    """The run of a pipeline or of a step: commands of both know the folder that they share, and
    what steps have handed on."""

    def make_environment(self, variables):
        super().make_environment(variables)
        self.environment["ROEXEC_WORKDIR"] = work_path(self.folder, self.header["work"])

    def hand_on(self, outputs):
        """Let further commands know outputs of steps; what was given is stronger."""
        self.environment.update((name, value) for name, value in outputs.items()
                                if name not in self.given)


class _PipelineRun(_OfPipeline):
    """The run of a pipeline. Its attempts are passes over the steps that have not succeeded."""
    resumes_cancelled = False

    def is_cancelled(self):
        """Whether the run is to end, also where an earlier supervisor was told so."""
        return self.resumes_cancelled or super().is_cancelled()

    def is_lost(self, number):
        return number == 0 and super().is_lost(number)

    def _is_under_way(self):
        """Whether an earlier supervisor was lost in the middle of a pass."""
        return self.progress.open is not None and self.progress.open["what"] == "attempt"

    def end_remnants(self):
        if not self._is_under_way():    # its steps look after themselves
            super().end_remnants()

    def decide(self, number):
        if not self._is_under_way():
            return super().decide(number)
        self.resumes_cancelled = self.journal.cancelled() is not None
        self.resolve()                 # where that is not possible, the steps that need it fail
        return self.attempt_until_done(number - 1)

    def before_attempts(self):
        _make_work(self.folder, self.header["work"], self.setup)
        return super().before_attempts()

    def attempt(self, number):
        if not self._is_under_way():
            self.begin_attempt(number)
            if number > 1:
                self.note("pass", steps={step: new_run_id() for step in self._steps_to_repeat()})
            self.note("starting", what="attempt")
        kept, ids = self._so_far()
        steps = _Steps(self, ids, kept)
        try:
            ended = steps.perform()
        except BaseException:
            steps.abandon()
            raise
        finally:
            steps.hands.close()
        for outputs in steps.outputs.values():
            self.hand_on(outputs)
        self.note("ended", exit_code=ended.exit_code, signal=ended.signal, timeout=ended.timeout,
                  error=ended.error)
        return ended

    def _so_far(self):
        """({step: end} of those that are not repeated, {step: run id} of the pass)."""
        kept, ends = dict(self.header.get("taken") or {}), step_ends(self.journal)
        passes = [self.header["steps"]] + [event["steps"] for event in self.journal.events
                                           if event["event"] == "pass"]
        for steps in passes[:-1]:
            kept.update((step, ends[run_id]) for step, run_id in steps.items() if run_id in ends)
        return {step: end for step, end in kept.items() if step not in passes[-1]}, passes[-1]

    def _steps_to_repeat(self):
        kept, ids = self._so_far()
        ends, found = step_ends(self.journal), dict(kept)
        found.update((step, ends[run_id]) for step, run_id in ids.items() if run_id in ends)
        order = StepOrder({step: job.depends_on for step, job in self.job.steps().items()})
        again = steps_to_repeat(order, {step: (end["state"], end["reason"])
                                        for step, end in found.items()})
        return [step for step in order.wanted if step in again]

    def printed(self):
        """What the steps have printed, one after the other: the newest MiB."""
        texts = []
        for _, run_id in self.journal.steps():
            journal = Journal.glance(self.journal.path_of(run_id))
            log = journal and Progress(journal.events).log
            if log:
                texts.append(select_lines(newest_lines(os.path.join(self.folder, log),
                                                       MOST_FOR_HOOKS), raw=True))
        return b"".join(texts)[-MOST_FOR_HOOKS:]


_TELL_EVERY = 0.1           # seconds
_MOST_TOLD = 1000           # names of journals at a time, which fit into an answer
_HURRY = 0.2                # seconds within which starts are noted together
_MOST_PREPARED = 128        # steps
_LOOK_AT_OTHERS = 0.5       # seconds between looks at the journals of steps in other hands
_MOST_READY = 16            # steps that wait for a supervisor: each is an open file


class _Hands:
    """The supervisors of the steps of a pipeline, which are children of its own supervisor."""

    def __init__(self, run):
        self.run, self.children = run, set()
        self.poller = select.poll()
        self.poller.register(run.signals.descriptor, select.POLLIN)
        self.pool = Supervisors(run.folder, self._fork, self.poller, run.info)

    def _fork(self, channel):
        self.children.add(fork(lambda: self._become_keeper(channel)))

    def _become_keeper(self, channel):
        signal.set_wakeup_fd(-1)
        os.setsid()
        for name in os.listdir("/dev/fd"):          # among them the lock of the pipeline's journal
            if int(name) > 2 and int(name) != channel.fileno():
                with contextlib.suppress(OSError):
                    os.close(int(name))
        keep_orphans(lambda keeper: self._become_supervisor(channel, keeper))

    def _become_supervisor(self, channel, keeper):
        os.setsid()
        become_subreaper()
        console = None if self.run.console is None else Console()
        channel.send(b"ready")
        serve_runs(channel, self.run.folder, perform_run, keeper=keeper, console=console)

    def close(self):
        """Let the supervisors end, and see to it that they have."""
        self.pool.close()
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline and any(map(process_start, self.children)):
            time.sleep(0.002)
        has_children()


class _Steps:
    """One pass over the steps of a pipeline: those that are ready are handed to supervisors of its
    own. `run` is the _PipelineRun, `ids` {step: run id} of the steps of this pass, `kept` {step:
    end} of the others."""

    def __init__(self, run, ids, kept):
        import resource
        self.run, self.ids, self.jobs, self.boot = run, ids, run.job.steps(), boot_id()
        self.kept = {step: end for step, end in kept.items() if step in self.jobs}
        self.order = StepOrder({step: job.depends_on for step, job in self.jobs.items()})
        self.ends, self.outputs = {}, {}        # of the steps, as far as there are some
        self.on = {}                    # {name of a journal: step} of those that were started
        self.stopped = None             # the reason for which no step is started any more
        self.timeout = None             # the reason where a timeout has passed
        self.looked, self.hands = time.monotonic(), _Hands(run)
        self.prepared = collections.deque()     # steps that are noted as started, and soon will be
        self.synced, self.batch = -math.inf, 0  # when that was last, and of how many
        self.untold, self.told = [], 0.0        # names of journals, and when some were told last
        self.pool = self.hands.pool
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.most = min(run.job.parallel or math.inf, max(1, files - OTHER_FILES))

    def perform(self):
        """Go on until each step has ended -> the Ended of the pass."""
        self._restore()
        deadline, reason = min(_deadlines_of(self.run), default=(math.inf, None))
        while True:
            if self.stopped != "parent" and self.run.is_cancelled():
                self._stop("parent")
            elif self.stopped != "parent" and time.monotonic() >= deadline:
                self.timeout = reason
                self._stop("parent")
            self._start_ready()
            if self.order.is_over:
                self.tell()
                return Ended(timeout=self.timeout) if self.timeout else _first_failure(self.ends)
            if self.pool.waiting:
                self.pool.hand_over()
            self._hear(math.inf if self.stopped == "parent" else deadline - time.monotonic())

    # What an earlier supervisor has left.

    def _restore(self):
        ends, begun, known = step_ends(self.run.journal), {}, dict(self.kept)
        for event in self.run.journal.events:
            if event["event"] == "step":
                begun[event["run"]] = event
        known.update((step, ends[run_id]) for step, run_id in self.ids.items() if run_id in ends)
        skipped = []
        for step, end in sorted(known.items(), key=lambda item: item[1].get("at", 0)):
            self._know(step, end)
            skipped += self.order.end(step, end["state"])
        for step in skipped:
            if step not in known:
                self._say_over(step, "skipped", "dependency")
        for step, run_id in self.ids.items():
            if run_id in begun and step not in self.order.states:
                self._find(step, begun[run_id])
        if self.run.job.fail_fast and any(_is_failure(end) for end in self.ends.values()):
            self._stop("fail_fast")

    def _find(self, step, begun):
        """Go on with a step that was to be started: by whatever its journal says."""
        name, path = self._name(step), self._path(step)
        journal = Journal.find(path)
        if journal is not None:
            self.on[name] = step
            self._take_back(journal)
        elif os.path.exists(path):
            self.on[name] = step        # it is alive, and looked at until it has ended
        elif begun["boot"] != self.boot and self.jobs[step].if_lost != "rerun":
            self._over(step, "lost", "power")

    # Starting.

    def _name(self, step):
        return journal_name(self.ids[step], self.run.journal.run_id)

    def _path(self, step):
        return self.run.journal.path_of(self.ids[step])

    def _start_ready(self):
        """Start the steps that are ready, as many as may be on."""
        while True:
            room = min(self.most - len(self.on), _MOST_READY - len(self.pool.waiting))
            if room <= 0 or not self.prepared and not self._prepare(room):
                return
            step = self.prepared.popleft()
            if self.stopped and not self._survives(step, self.stopped):
                self._over(step, "cancelled", self.stopped)
            else:
                self._start(step)

    def _prepare(self, room):
        """Note which steps are started next -> whether there are some.

        That has to be on the disk before, lest a power cut lets one be started twice. Where they
        end faster than a disk writes, more are noted at a time.
        """
        hurry = time.monotonic() - self.synced < _HURRY
        most = max(room, min(2 * self.batch, _MOST_PREPARED)) if hurry else room
        while len(self.prepared) < most:
            step = self.order.take()
            if step is None:
                break
            if self._name(step) not in self.on:
                self.prepared.append(step)
                self.run.note("step", step=step, run=self.ids[step], boot=self.boot)
        if self.prepared:
            getattr(os, "fdatasync", os.fsync)(self.run.journal.descriptor)
            self.synced, self.batch = time.monotonic(), len(self.prepared)
        return bool(self.prepared)

    def _survives(self, step, reason):
        return reason == "fail_fast" and survives_failure(self.jobs[step].depends_on)

    def _start(self, step):
        header, job = self.run.header, self.jobs[step]
        try:
            journal = Journal.create(os.path.dirname(self.run.journal.path), {
                **{name: header.get(name) for name in ("job", "slot", "env", "store", "vault",
                                                       "work")},
                "run": self.ids[step], "parent": header["run"], "step": step, "spec": job.spec,
                "trigger": "pipeline", "boot": self.boot, "claimed_at": time.time(),
                "outputs": self._outputs_for(step),
                "gives": job.job and _gives(self.run.job, step)})
        except OSError as error:        # a full disk
            self._over(step, "failed", "start", f"its journal cannot be made: {error.strerror}")
            return
        self.on[journal.name] = step
        self.run.info(f"Step {step} started, run={journal.run_id}")
        self._hand(journal)

    def _hand(self, journal):
        self.pool.given[journal.name] = self.run.secrets
        self.pool.waiting.append(journal)

    def _outputs_for(self, step):
        """What the steps that a step needs hand on to it; of one name, the later in the file."""
        outputs, needs = {}, self.order.needs(step) if self.outputs else ()
        for other in self.jobs if needs else ():
            if other in needs:
                outputs.update(self.outputs.get(other, {}))
        return outputs

    # Hearing of ends.

    def _hear(self, seconds):
        """Wait for ends, and take them."""
        if self.pool.waiting:
            seconds = min(seconds, STALL)
        others = len(self.on) > len(self.pool.runs() - {None})
        if others:
            seconds = min(seconds, _LOOK_AT_OTHERS)
        if self.untold:
            seconds = min(seconds, self.told + _TELL_EVERY - time.monotonic())
        events, returned = self.hands.poller.poll(milliseconds(max(0, seconds))), []
        self.pool.stalled = bool(self.pool.waiting and not events)
        for descriptor, _ in events:
            if descriptor == self.run.signals.descriptor:
                self.run.signals.drain()
                has_children()          # which reaps those that have ended
            else:
                returned += self.pool.hear(descriptor)
        self.untold += self.pool.take_telling()
        if self.untold and time.monotonic() - self.told >= _TELL_EVERY:
            self.tell()
        for journal in returned:
            self._take_back(journal)
        if others and time.monotonic() - self.looked >= _LOOK_AT_OTHERS:
            self._look_at_others()

    def _look_at_others(self):
        """Take back the journals that others have finished, or left."""
        self.looked, ours = time.monotonic(), self.pool.runs()
        for name, step in list(self.on.items()):
            path = self._path(step)
            journal = None if name in ours else Journal.find(path)
            if journal is not None:
                self._take_back(journal)
            elif name not in ours and not os.path.exists(path):
                self._over(step, "lost", "supervisor", "its journal is gone")

    def _take_back(self, journal):
        step, end = self.on[journal.name], step_end(journal)
        if end is None:                 # its supervisor was killed: another one goes on
            self.run.info(f"Step {step} has lost its supervisor", "ERROR")
            self._hand(journal)
            return
        journal.close()
        self._end(step, end)

    def _over(self, step, state, reason, message=None):
        """Let a step end that has no journal, or will not have one."""
        self._say_over(step, state, reason, message)
        self._end(step, {"state": state, "reason": reason, "message": message, "outputs": {}})

    def _say_over(self, step, state, reason, message=None):
        self.run.note("over", step=step, run=self.ids[step], state=state, reason=reason,
                      message=message)
        if state == "skipped":
            self.run.info(f"Step {step} skipped, reason={reason}")

    def _know(self, step, end):
        self.ends[step] = end
        if end.get("outputs"):
            self.outputs[step] = end["outputs"]

    def _end(self, step, end):
        """Go on from the end of a step."""
        self._know(step, end)
        if end["state"] != "skipped" or end["reason"] != "dependency":
            self.run.info(f"Step {step} {end['state']}{_how(end)}",
                          "ERROR" if _is_failure(end) else "INFO")
        self.on.pop(self._name(step), None)
        self.untold.append(self._name(step))
        for other in self.order.end(step, end["state"]):
            self._say_over(other, "skipped", "dependency")
            self._know(other, {"state": "skipped", "reason": "dependency"})
        if self.run.job.fail_fast and not self.stopped and _is_failure(end):
            self._stop("fail_fast")

    def tell(self):
        """Tell whoever has the store of what it can take in: some at a time, as each time is a
        transaction."""
        names, self.untold, self.told = self.untold, [], time.monotonic()
        while names and self.run.tell is not None:
            self.run.tell(*names[:_MOST_TOLD])
            del names[:_MOST_TOLD]

    def _stop(self, reason):
        """Cancel the steps that are on, and start no more of them."""
        self.stopped = reason
        _, grace = self.run.journal.cancelled() or (None, None)
        for step in list(self.on.values()):
            journal = Journal.glance(self._path(step))
            if journal and not self._survives(step, reason) and journal.cancelled() is None:
                journal.cancel(reason, grace)

    def abandon(self):
        """End what is on, since there is nobody any more who would go on from there."""
        self._stop("parent")
        paths = [self._path(step) for step in self.on.values()]
        deadline = time.monotonic() + max(job.grace for job in self.jobs.values()) + 15
        while any(map(lock_is_held, paths)) and time.monotonic() < deadline:
            time.sleep(0.05)


def _gives(job, step):
    """The variables that a step of a pipeline which runs a job gives to that."""
    return next(spec.get("env") for spec in job.pipeline if spec["id"] == step) or {}


def _first_failure(ends):
    """The Ended of a pass, of the ends of its steps: that of the first that has failed."""
    bad = [(not _is_failure(end), number, step) for number, (step, end)
           in enumerate(ends.items()) if end["state"] not in ("succeeded", "skipped")]
    if not bad:
        return Ended(exit_code=0)
    step = min(bad)[2]
    end, error = ends[step], f"step {step} {ends[step]['state']}"
    error += f": {end['message']}" if end.get("message") else _how(end)
    if end.get("signal") and end["state"] == "failed":
        return Ended(signal=end["signal"], error=error)
    return Ended(exit_code=exit_status({"exit_code": None, "signal": None, **end}), error=error)


def _deadlines_of(run):
    """(monotonic instant, reason) of the timeouts of a pipeline whose pass is on."""
    began, now = run.progress.attempts, time.time()
    for limit, first, reason in ((run.job.timeout, began[-1], "timeout"),
                                 (run.job.total_timeout, began[0], "total_timeout")):
        if limit is not None:
            yield time.monotonic() + first["started_at"] + limit - now, reason


def _is_failure(end):
    return end["state"] in ("failed", "timed_out", "lost")


def _how(end):
    """How a step has ended, for a line of the log."""
    if end.get("signal"):
        return f", signal={end['signal']}"
    if end.get("exit_code") is not None:
        return f", exit={end['exit_code']}"
    return f", reason={end['reason']}" if end["reason"] else ""


# The run of a step.

_PATIENCE_FOR_JOBS = 60     # seconds for a run of another job to end once it is cancelled


class _StepRun(_OfPipeline):
    """The run of a step: it may hand values on, and may be nothing but the run of another job."""

    def begin_attempt(self, number):
        super().begin_attempt(number)
        path = os.path.join(os.path.dirname(work_path(self.folder, self.header["work"])),
                            f"output-{self.header['run']}")
        self.environment["ROEXEC_OUTPUT"] = path
        try:
            descriptor = open_private(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if self.setup.uid not in (None, os.geteuid()):
                os.fchown(descriptor, self.setup.uid, -1)
            os.close(descriptor)
        except OSError as error:        # the step fails when it wants to write there
            self.info(f"Cannot make {path}: {error.strerror}", "ERROR")

    def examined(self, ended):
        """Read what the step hands on, if it has succeeded."""
        path = self.environment["ROEXEC_OUTPUT"]
        try:
            if outcome(self.job, ended)[0] != "succeeded":
                return ended
            with open(path, "rb", opener=open_private) as file:
                values = parse_outputs(file.read(_MOST_OUTPUTS + 1))
            for name, value in values.items():
                if self.masks.text(value) != value:
                    raise ValueError(f"the value of {name} contains a secret")
        except FileNotFoundError:
            return ended
        except (OSError, ValueError) as error:
            text = f"ROEXEC_OUTPUT: {getattr(error, 'strerror', None) or error}"
            self.info(text, "ERROR")
            return ended.changed(outputs=True, error=text)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)
        if values:
            self.note("outputs", values=values)
            self.hand_on(values)
        return ended

    # A step that runs a job: it asks whoever has the store, by a file, and is answered by another.

    def is_lost(self, number):
        return not (self.job.job is not None and number) and super().is_lost(number)

    def decide(self, number):
        if self.job.job is None or not number:
            return super().decide(number)
        self.resolve()
        return self._run_job()

    def attempt_until_done(self, number, delay=0):
        if self.job.job is None:
            return super().attempt_until_done(number, delay)
        self.begin_attempt(1)
        self.info(f"Running the job {self.job.job}")
        self.note("request")
        self._ask()
        return self._run_job()

    def _ask(self, cancel=None):
        """Leave the request; with `cancel`, the reason, that what it asked for is to end."""
        path = self.journal.path + ".request"
        with open(path + ".new", "w", opener=open_private) as file:
            json.dump({"step": self.header["run"], "parent": self.header["parent"],
                       "job": self.job.job, "env": self.header["gives"], "cancel": cancel}, file)
        os.rename(path + ".new", path)
        Store(self.folder).wake()

    def _answer(self):
        """The answer to the request, None as long as there is none."""
        try:
            with open(self.journal.path + ".result") as file:
                return json.load(file)
        except FileNotFoundError:
            return None

    def _run_job(self):
        """Wait for the run of the job -> the outcome of the step."""
        deadline, why = math.inf, None
        if self.job.timeout is not None:
            deadline = self.progress.attempts[0]["started_at"] + self.job.timeout
        while True:
            answer = self._answer()
            cancelled = self.is_cancelled() or self.journal.cancelled() is not None
            if answer is not None:
                break
            if why is None and (cancelled or time.time() >= deadline):
                why = "cancelled" if cancelled else "timeout"
                self._ask("parent")
                served = Store(self.folder).server() is not None
                deadline = time.time() + (_PATIENCE_FOR_JOBS if served else 0)
            elif why is not None and time.time() >= deadline:
                break
            poller = select.poll()
            poller.register(self.signals.descriptor, select.POLLIN)
            poller.poll(milliseconds(max(0, min(deadline - time.time(), 0.1))))
            self.signals.drain()
        answer = answer or {"state": "cancelled", "reason": "parent", "message": None,
                            "exit_code": None, "signal": None, "run": None}
        self.note("answered", exit_code=answer["exit_code"], signal=answer["signal"])
        return self._outcome_of(answer, why)

    def _outcome_of(self, answer, why):
        if why == "cancelled":
            return self.cancelled()
        if why == "timeout" and answer["state"] == "cancelled":
            answer = {**answer, "state": "timed_out", "reason": "timeout"}
        run_id = answer.pop("run")
        self.info(f"Run {run_id} of the job {self.job.job} {answer['state']}{_how(answer)}",
                  "ERROR" if _is_failure(answer) else "INFO")
        return {**answer, "message": answer["message"] or f"run {run_id}"}


# ==== 18 runs =====================================================================================
# From requests to supervisors, and back into the store. A run gets its place in the transaction
# that marks it as running, whoever starts it; its journal is there, and locked, before that. What a
# crash leaves is finished by whoever holds `server.lock`, or needs the place.

class WrongParameters(RoexecError):
    """A start that gives values which the params of the job do not allow."""


class Refused(RoexecError):
    """A start that `overlap` forbids; `run` is the row of the run in the way."""

    def __init__(self, job_id, run):
        super().__init__(f'job "{job_id}" is {run["state"]} already: run {run["id"]}; wait for it, '
                         "or write --queue")
        self.run = run


# Asking for a run, and its place.

def effective_job(db, job_id, settings=None):
    """The Job with an id, with the defaults of the configuration folded in.

    The settings of the last server count, else those passed. Raises NoSuchJob.
    """
    settings = get_settings(db) or settings or {}
    return job_in_effect(get_job(db, job_id), settings.get("defaults"))


def job_to_retry(db, run, settings=None):
    """The Job that a retry of a run would run, as `effective_job`; raises RoexecError for none."""
    check_retry(run)
    return effective_job(db, run["job_id"], settings)


def check_retry(run):
    """Raise RoexecError where a run (a row or payload) cannot be retried."""
    if run["state"] not in FINAL_STATES:
        raise RoexecError(f"run {run['id']} has not ended yet: it is {run['state']}")
    if run["name"] is not None:
        raise RoexecError(f"run {run['id']} is of a command that is not registered; write "
                          "roexec run --name NAME -- COMMAND again")


def whole_of(db, run, first=None):
    """(row, step) of what a retry of a run repeats: of a step, its pipeline from there on."""
    return (get_run(db, run["parent"]), first or run["step"]) if run["step"] else (run, first)


def steps_to_retry(db, run, job, first=None, everything=False):
    """What `request_run` is to know for a retry of a pipeline: as `taken` {step: run} of the steps
    that are not repeated, and as `work` the folder that they share. Raises RoexecError as
    `repeated_steps` does."""
    rows = newest_steps(db, run)
    again = repeated_steps(job, run, rows, first, everything)
    if everything or not job.pipeline:
        return {}
    return {"taken": {step: rows[step]["id"] for step in job.steps() if step not in again},
            "work": run["work"]}


def repeated_steps(job, run, steps, first=None, everything=False):
    """The steps that a retry of a run of a pipeline repeats: those that did not succeed and what
    depends on them, the step `first` too, or with `everything` all.

    `steps` are rows or payloads {step: newest}. Raises RoexecError where there is nothing to
    repeat, or no such step.
    """
    if first is not None and first not in job.steps():
        raise RoexecError(f'there is no step "{printable(first)}" in job "{job.id}"'
                          + nearest(first, job.steps()))
    if everything or not job.pipeline:
        return job.steps()
    order = StepOrder({step: spec.depends_on for step, spec in job.steps().items()})
    again = steps_to_repeat(order, {step: (row["state"], row["reason"])
                                    for step, row in steps.items()}, first)
    if not again:
        raise RoexecError(f"no step of run {run['id']} has failed; name the first to be repeated "
                          "with --from, or write --all")
    return again


def newest_steps(db, run):
    """{step: row} of the steps of a run, the newest of one that was repeated; those that a retry
    has taken over are those of the earlier run."""
    rows = {step: find_run_row(db, other)
            for step, other in json.loads(run["taken"] or "{}").items()}
    rows.update((row["step"], row) for row in step_rows(db, run["id"]))
    return {step: row for step, row in rows.items() if row is not None}


def job_in_effect(row, defaults):
    """The Job of a row, with defaults (a spec, or None) folded in."""
    return effective(Job(json.loads(row["spec"])), defaults)


def request_run(store, job, *, trigger, env=None, name=None, retry_of=None, wait=False, owner=None,
                by=None, note=None, taken=None, work=None):
    """Ask for a run of a job -> its id. It is queued; the server is told.

    `env` {name: text} is added to the job's; `name` is for a command that is not registered, which
    knows no overlap; with `owner` (`own_identity()`) only that process starts it; `by` is the name
    of the Caller who asks; `note(db, id)` is called in the transaction that adds it. What is given
    to secret params goes into `store.given` alone: who claims the run in this process passes it on.
    `taken` and `work` are those of `steps_to_retry`. Raises Refused and WrongParameters.
    """
    run_id, other, env = new_run_id(), None, env or {}
    problems = job.problems_of(env) + [f"the value of {key} is kept nowhere; give it again: --env "
                                       f"{key}" for key, value in env.items() if value is None]
    if problems:
        raise WrongParameters("\n".join(problems))
    secrets = {key: env[key] for key in env if key in job.params and job.params[key].secret}
    env = {**env, **dict.fromkeys(secrets)}
    with store.write() as db:
        if note is not None:
            note(db, run_id)
        active = active_runs(db, job.id) if name is None else ()
        action, other = overlap_action(job, trigger, active, wait)
        if action == "skip":
            raise Refused(job.id, other)
        version = None if name is not None else get_job(db, job.id)["version"]
        add_run(db, id=run_id, job_id=job.id, name=name, version=version, trigger=trigger,
                state="queued", queued_at=time.time(), retry_of=retry_of, priority=job.priority,
                env=json.dumps(env) if env else None, owner=owner,
                spec=None if name is None else json.dumps(job.spec),
                taken=json.dumps(taken) if taken else None, work=work)
        if action == "replace":
            replace_run(db, other)
        if by is not None:
            add_audit(db, by, "retry" if retry_of else "run", time.time(), job_id=job.id,
                      target=run_id)
        if secrets:
            store.given[run_id] = secrets
    if action == "replace":
        signal_cancel(store, other["id"], "replaced")
    store.wake()
    return run_id


def replace_run(db, run):
    """Make place for a newer run of the same job: the old one keeps its place until it is dead."""
    if run["state"] == "queued":
        finish_run(db, run["id"], "cancelled", [], reason="replaced", finished_at=time.time())
    else:
        ask_to_cancel(db, run["id"], "replaced")


def _is_alive(identity):
    boot, pid, start = identity.split()
    return boot == boot_id() and str(process_start(int(pid))) == start


def claim(db, folder, jobs, max_concurrent, wanted, **header):
    """Give the queued runs that `wanted(row)` their places if it is their turn -> their journals.

    `jobs(row)` is the effective Job of a run, or None if there is none any more. Each journal is
    made and locked before the run is marked as running; `header` is what its header has besides.
    """
    queued = queued_runs(db)
    if not queued:
        return []
    known, boot = {row["id"]: jobs(row) for row in queued}, boot_id()
    limits = {row["job_id"]: 0 if row["name"] is not None or known[row["id"]] is None
              else known[row["id"]].max_concurrent for row in queued}
    journals, now = [], time.time()
    try:
        for row in admit(queued, count_running(db), limits, max_concurrent,
                         paused_in_queue(db, now), count_apart(db)):
            if wanted(row) and known[row["id"]] is not None:
                journals.append(make_journal(db, folder, row, known[row["id"]], now,
                                             boot=boot, **header))
                change_run(db, row["id"], "running", started_at=now, boot=boot)
    except BaseException:
        discard(journals)
        raise
    return journals


def make_journal(db, folder, row, job, now, **more):
    """A Journal, locked, for the run of a row; `more` is put into its header."""
    if job.pipeline and "only" not in more:
        more.update(_prepare_steps(db, row, job, now))
    from_elsewhere = job.env_from or any(step.env_from for step in job.steps().values())
    return Journal.create(folder, {
        "run": row["id"], "job": row["job_id"], "spec": job.spec, "trigger": row["trigger"],
        "slot": row["slot"], "env": json.loads(row["env"] or "{}"), "store": store_id(db),
        "owner": row["owner"], "claimed_at": now, "not_before": None if row["slot"] is None else
        delayed(job, row["slot"]),
        "vault": (get_settings(db) or {}).get("vault") if from_elsewhere else None, **more})


def _prepare_steps(db, row, job, now):
    """The rows of the steps of a pipeline that starts -> what its header says about them."""
    known = {other["step"]: other for other in step_rows(db, row["id"])}    # of a lost journal
    taken = {step: other for step, other in newest_steps(db, row).items()
             if other["state"] in FINAL_STATES}
    steps = {spec["id"]: known[spec["id"]]["id"] if spec["id"] in known else new_run_id()
             for spec in job.pipeline if spec["id"] not in taken}
    for step in [step for step in steps if step not in known]:
        _add_step(db, row, step, steps[step], now)
    work = row["work"] or row["id"]
    set_work(db, row["id"], work)
    return {"steps": steps, "work": work, "taken": {
        step: {"state": other["state"], "reason": other["reason"], "message": other["message"],
               "outputs": json.loads(other["outputs"] or "{}")} for step, other in taken.items()}}


def _add_step(db, parent, step, run_id, now):
    add_run(db, id=run_id, job_id=parent["job_id"], version=parent["version"], step=step,
            parent=parent["id"], trigger="pipeline", state="queued", queued_at=now)


def cancel_run(store, run_id, reason="user", by=None):
    """Cancel a run: a queued one is withdrawn, a running one ends gracefully. `by` is the name of
    the Caller who asks.

    The wish is committed first, then told. Raises HasEnded for a run that has ended, and for a step
    that was not begun.
    """
    with store.write() as db:
        run = get_run(db, run_id)
        state = live_run(store, run)[0]["state"]
        if state in FINAL_STATES:
            raise HasEnded(f"run {run_id} has ended already: {state}")
        if run["step"] and state == "queued":
            raise HasEnded(f"step {run['step']} was not begun; cancel its pipeline, run "
                           f"{run['parent']}")
        if state == "queued":
            finish_run(db, run_id, "cancelled", [], reason=reason, finished_at=time.time())
        else:
            ask_to_cancel(db, run_id, reason)
        if by is not None:
            add_audit(db, by, "cancel", time.time(), job_id=run["job_id"], target=run_id)
    if state == "running":
        signal_cancel(store, _name_of(run), reason)
    store.wake()


class HasEnded(RoexecError):
    """A run about which nothing can be done any more."""


def signal_cancel(store, name, reason, grace=None):
    """Tell the supervisor of a run, by the name of its journal, that it is cancelled, with at most
    `grace` seconds."""
    journal = Journal.glance(store.file(f"active/{name}"))
    if journal is not None:
        journal.cancel(reason, grace)


# Runs that are on.

def _name_of(run):
    """The name of the journal of a run, of its row."""
    return journal_name(run["id"], run["parent"] if run["step"] else None)


def live_run(store, run):
    """(row, rows of attempts or None) of a run, of its row, with what its journal says. The row of
    a step is queued until somebody takes its end in."""
    journal = None
    if run["state"] == "running" or run["step"] and run["state"] == "queued":
        journal = Journal.glance(store.file(f"active/{_name_of(run)}"))
    if journal is None:
        return run, None
    progress = Progress(journal.events)
    found = {**dict(run), "log": progress.log,
             "retry_at": progress.retry and progress.retry["until"]}
    if run["step"]:
        begun = progress.attempts[0]["started_at"] if progress.attempts else None
        found.update(state="running", started_at=begun)
        found.update(_columns_of(progress) if progress.finished else {})
    return found, progress.attempts


def live_log(store, run):
    """Where the log of a run lies, of its row, relative to the folder of the store, or None."""
    return live_run(store, run)[0]["log"]


def _columns_of(progress):
    """The columns of a run that has finished, of its Progress."""
    decided, attempts = progress.outcome, progress.attempts
    return {"state": decided["state"], "reason": decided["reason"],
            **{name: decided.get(name) for name in ("message", "exit_code", "signal")},
            "log": progress.log, "finished_at": progress.finished["at"],
            **({"started_at": attempts[0]["started_at"]} if attempts else {})}


# Taking in.


def take_in(db, journal):
    """Take a finished journal into the store -> the row of the run as it is then, or None.

    The journal is removed by the caller when that is committed.
    """
    row, progress = find_run_row(db, journal.run_id), Progress(journal.events)
    if row is None or row["state"] != "running":
        if row is not None and row["log"] is None and progress.log:         # of hooks alone
            set_log(db, row["id"], progress.log)
            post_notices(db, journal)
        return None
    if journal.header.get("steps"):
        _take_in_steps(db, journal, row, progress)
    columns = _columns_of(progress)
    if columns["state"] == "cancelled":
        columns["reason"] = row["cancel"] or columns["reason"]
    if progress.outputs and columns["state"] == "succeeded":
        columns["outputs"] = json.dumps(progress.outputs)
    finish_run(db, row["id"], columns.pop("state"), progress.attempts, **columns)
    post_notices(db, journal)
    return {**progress.outcome, "id": row["id"], "job_id": row["job_id"], "cause": row["cause"],
            "reason": columns["reason"]}


def _take_in_steps(db, journal, row, progress):
    """Take in the steps of a pipeline that has finished, as far as that was not done."""
    overs = {event["run"]: event for event in journal.events if event["event"] == "over"}
    taken = {other["id"] for other in step_rows(db, row["id"]) if other["state"] in FINAL_STATES}
    for step, run_id in journal.steps():
        if run_id in taken:
            continue
        over, of_step = overs.get(run_id), Journal.glance(journal.path_of(run_id))
        if (over or of_step) and find_run_row(db, run_id) is None:
            _add_step(db, row, step, run_id, (over or of_step.events[0])["at"])
        if of_step:
            take_in_step(db, of_step)
        elif over and get_run(db, run_id)["state"] == "queued":
            finish_run(db, run_id, over["state"], [], reason=over["reason"],
                       message=over["message"], finished_at=over["at"])
    if not progress.attempts:
        remove_steps(db, row["id"])
    _lose_steps(db, row["id"], "supervisor")


def take_in_step(db, journal):
    """Take in what the journal of a step says, which stays until its pipeline has finished."""
    row, progress = find_run_row(db, journal.run_id), Progress(journal.events)
    if row is None or row["state"] in FINAL_STATES or not progress.supervisor:
        return
    if row["state"] == "queued":
        change_run(db, row["id"], "running", started_at=progress.supervisor["at"],
                   boot=journal.header["boot"])
    if progress.finished:
        take_in(db, journal)
    else:
        post_notices(db, journal)


def _lose_steps(db, run_id, reason):
    for row in step_rows(db, run_id):
        if row["state"] not in FINAL_STATES:
            finish_run(db, row["id"], "lost", [], reason=reason, finished_at=time.time())


def post_notices(db, journal):
    """Put the notices that a journal asks for into the outbox, and queue the runs; what is there
    already stays as it is, so that a journal may be read while its run is on, and again."""
    asked = [event for event in journal.events if event["event"] == "notice"]
    if not asked:
        return
    job, row = journal.job, get_run(db, journal.run_id)
    folder = os.path.dirname(os.path.dirname(journal.path))
    attempts = get_attempts(db, row["id"]) or Progress(journal.events).attempts
    payload = run_payload(row, attempts)
    for number, event in enumerate(asked):
        hook, name = job.hooks[event["hook"]][event["index"]], event["hook"]
        if row["state"] not in FINAL_STATES and name not in LIVE_HOOKS:
            continue                    # they tell of the end, which is not taken in yet
        if hook.kind == "run":
            _run_next(db, row, number, hook.target, os.path.dirname(journal.path))
            continue
        log = _log_of_failure(db, row) or row["log"] or Progress(journal.events).log
        output = output_tail(os.path.join(folder, log)) if log and name != "pre_run" else None
        for notice in build_notices(hook, name, payload, key=str(number), output=output,
                                    host=socket.gethostname(), now=time.time(), name=job.name):
            add_notice(db, now=time.time(), **notice)


def _log_of_failure(db, row):
    """The log of the step of a run that has failed first, or None."""
    failed = [step for step in step_rows(db, row["id"]) if step["log"] is not None
              and step["state"] in ("failed", "timed_out", "lost")]
    return min(failed, key=lambda step: step["finished_at"])["log"] if failed else None


def post_live_notices(db, store, name):
    """Put the notices of a run that is on into the outbox, by the name of its journal; take the end
    of a step in."""
    journal = Journal.glance(store.file(f"active/{name}"))
    if journal is not None:
        (take_in_step if journal.header.get("parent") else post_notices)(db, journal)


# Runs of jobs that steps wait for.

def answer_requests(db, store):
    """See to what steps ask for, in files beside their journals: runs of other jobs, whose ends
    they are told in the same way."""
    for name in os.listdir(store.file("active")):
        if name.endswith(".request"):
            path = store.file(f"active/{name}")
            with contextlib.suppress(FileNotFoundError):
                with open(path) as file:
                    _answer_request(db, store, path, json.load(file))


def _answer_request(db, store, path, request):
    run = run_of_cause(db, f"{request['step']}/job")
    if run is None and request["cancel"]:
        os.unlink(path)
    elif run is None:
        _run_for_step(db, request)
        run = run_of_cause(db, f"{request['step']}/job")
    elif request["cancel"] and run["state"] == "queued":
        finish_run(db, run["id"], "cancelled", [], reason="parent", finished_at=time.time())
        run = get_run(db, run["id"])
    elif request["cancel"] and run["state"] == "running" and not run["cancel"]:
        ask_to_cancel(db, run["id"], "parent")
        signal_cancel(store, run["id"], "parent")
    if run is not None and run["state"] in FINAL_STATES:
        answer = path.removesuffix(".request") + ".result"
        if os.path.exists(path.removesuffix(".request")):
            with open(answer + ".new", "w", opener=open_private) as file:
                json.dump({"run": run["id"], **{name: run[name] for name in (
                    "state", "reason", "message", "exit_code", "signal")}}, file)
            os.rename(answer + ".new", answer)
        os.unlink(path)


def _run_for_step(db, request):
    """Queue the run that a step waits for. Where that is not possible, there is a row that says
    why."""
    link, problems = f"{request['step']}/job", []
    values = {"id": new_run_id(), "job_id": request["job"], "trigger": "pipeline", "cause": link,
              "parent": request["parent"], "queued_at": time.time(),
              "env": json.dumps(request["env"])}
    try:
        job = effective_job(db, request["job"])
        problems = job.problems_of(request["env"])
    except NoSuchJob as error:
        problems = [str(error)]
    if chain_length(db, find_run_row(db, request["parent"])["cause"]) >= _LONGEST_CHAIN:
        problems = [f"a chain of {_LONGEST_CHAIN} runs ends here"]
    if problems:
        add_run(db, message=problems[0], state="failed", reason="start", finished_at=time.time(),
                **values)
        return
    add_run(db, version=get_job(db, job.id)["version"], state="queued", priority=job.priority,
            **values)


_LONGEST_CHAIN = 20     # runs that hooks start one after the other


def _run_next(db, cause, number, job_id, folder):
    """Queue the run that a hook asks for. Where that is refused, there is a row that says why."""
    link = f"{cause['id']}/{number}"
    if chain_length(db, link):
        return
    values = {"id": new_run_id(), "job_id": job_id, "trigger": "pipeline", "cause": link,
              "queued_at": time.time()}
    refused = {"state": "failed", "reason": "start", "finished_at": time.time()}
    if chain_length(db, cause["cause"]) >= _LONGEST_CHAIN:
        add_run(db, message=f"a chain of {_LONGEST_CHAIN} runs ends here", **values, **refused)
        return
    try:
        job = effective_job(db, job_id)
    except NoSuchJob as error:
        add_run(db, message=str(error), **values, **refused)
        return
    action, other = overlap_action(job, "manual", active_runs(db, job_id))
    if action == "skip":
        refused.update(state="skipped", reason="overlap")
        add_run(db, message=f"run {other['id']} was {other['state']}", **values, **refused)
        return
    add_run(db, version=get_job(db, job_id)["version"], state="queued", priority=job.priority,
            **values)
    if action == "replace":
        replace_run(db, other)
        running = Journal.glance(os.path.join(folder, other["id"]))
        if running is not None:
            running.cancel("replaced")


def deliver_alone(store, settings=None):
    """Where no server runs: send what waits in the outbox, from a process of its own."""
    with store.read() as db:
        due, settings = due_notices(db, time.time(), 1), get_settings(db) or settings or {}
    if due and store.server() is None:
        child = fork(lambda: fork(lambda: (leave_session(), deliver(store, settings, time.time()))))
        os.waitpid(child, 0)


def _start_courier(store, journal, settings):
    """A process that posts the notices of a run while it is on, and sends them where no server
    does -> a function that tells it of new ones; None for a run that has none before its end."""
    job = journal.job
    live = [hook for name in LIVE_HOOKS for hook in job.hooks.get(name, ())] + [
        hook for step in job.steps().values() for hooks in step.hooks.values() for hook in hooks]
    if all(hook.kind == "command" for hook in live):
        return None
    reader, writer = os.pipe()
    child = fork(lambda: fork(lambda: _carry(store, journal, settings, reader, writer)))
    os.waitpid(child, 0)
    os.close(reader)
    os.set_blocking(writer, False)

    def tell(*names):
        with contextlib.suppress(OSError):          # it has failed: the end of the run posts them
            os.write(writer, "".join(f"{name}\n" for name in names or (journal.name,)).encode())
    return tell


def _carry(store, journal, settings, reader, writer):
    leave_session()
    os.close(writer)
    journal.close()                     # the lock is the supervisor's
    for name in open(reader):           # of the journal that asks for one
        with store.write() as db:
            post_live_notices(db, store, name.strip())
        store.wake()
        if store.server() is None:
            with store.read() as db:
                settings = get_settings(db) or settings or {}
            deliver(store, settings, time.time())


def lose_without_journal(db, store):
    """End the running rows that have no journal: a power cut took it, or somebody removed it."""
    for row in active_runs(db):
        if row["state"] == "running" and not os.path.exists(store.file(f"active/{row['id']}")):
            again = _make_again(db, store.file("active"), row)
            if again is None:
                _lose(db, row, "its journal is gone")
            else:
                again.close()           # it is found at the next look


def _make_again(db, folder, row):
    """The journal that a power cut has taken or spoilt, as the row of its run tells: as far as one
    can know, an attempt was on. None where there was no power cut, or the job is gone."""
    job = None if row["boot"] == boot_id() else _job_of(db, row, get_settings(db) or {})
    if job is None:
        return None
    journal = make_journal(db, folder, row, job, row["started_at"], boot=row["boot"])
    journal.note("starting", what="attempt", at=row["started_at"])
    if row["cancel"]:
        journal.cancel(row["cancel"])
    return journal


def tell_cancels(db, store):
    """Tell the supervisors of runs that are to be cancelled once more: whoever asked for it may
    have died between its commit and that."""
    for row in active_runs(db):
        journal = row["state"] == "running" and row["cancel"] and Journal.glance(
            store.file(f"active/{row['id']}"))
        if journal:
            journal.cancel(*journal.cancelled() or (row["cancel"],))


def _lose(db, row, message):
    reason = "supervisor" if row["boot"] == boot_id() else "power"
    finish_run(db, row["id"], "lost", [], reason=reason, finished_at=time.time(), message=message)
    _lose_steps(db, row["id"], reason)


def withdraw_orphans(db):
    """Cancel queued runs whose process, which alone may start them, has ended."""
    for row in active_runs(db):
        if row["state"] == "queued" and row["owner"] and not _is_alive(row["owner"]):
            finish_run(db, row["id"], "cancelled", [], reason="user", finished_at=time.time(),
                       message="the command that waited for it has ended")


def found_journals(store, known=()):
    """The Journals, locked now, that nobody looks after; `known` are ids to pass over."""
    free = []
    for name in sorted(os.listdir(store.file("active"))):
        path = store.file(f"active/{name}")
        if "." in name:                 # .new, .cancel: of a crash, unless the journal is there
            base = name.partition(".")[0]
            with contextlib.suppress(FileNotFoundError):
                old = time.time() - os.stat(path).st_mtime > 60
                if old and not os.path.exists(store.file(f"active/{base}")):
                    os.unlink(path)
            continue
        journal = None if name in known else Journal.find(path)
        if journal is not None:
            free.append(journal)
    return free


def sort_journals(db, journals, say):
    """(done, unfinished) of free journals; those that were never committed count as done."""
    done, unfinished, ours = [], [], store_id(db)
    for journal in journals:
        row, progress = find_run_row(db, journal.run_id), Progress(journal.events)
        ahead = row is not None and (row["state"] == "running" or journal.header.get("only")
                                     and not progress.supervisor)
        if journal.header and journal.header.get("store") != ours:
            say(f"{journal.path} belongs to another store; it is left alone")
            journal.close()
        elif progress.finished or not ahead:
            journal.taken = take_in(db, journal)
            done.append(journal)
        elif not journal.header:
            again = _make_again(db, os.path.dirname(journal.path), row)
            if again is None:
                _lose(db, row, "its journal cannot be read")
                done.append(journal)
            else:
                journal.close()
                unfinished.append(again)
        else:
            if row["cancel"] and journal.cancelled() is None:
                journal.cancel(row["cancel"])       # whoever asked for it could not tell
            unfinished.append(journal)
    return done, unfinished


def discard(journals):
    """Remove journals that have been taken in; one that stays is found again."""
    for journal in journals:
        with contextlib.suppress(OSError):
            journal.remove()
        journal.close()


def settle(store, wait=False):
    """Where no server runs: take finished journals in, and see to it that lost runs are finished.

    They are left to processes of their own. With `wait` these are waited for, until what was left
    of the runs must be dead; they may have attempts ahead. A server does this itself.
    """
    if not store.exists or not os.path.isdir(store.file("active")) or store.is_read_only:
        return
    lock = open_private(store.file("server.lock"))
    children, deadline = [], time.monotonic()
    try:
        if not try_lock(lock):
            return
        journals = found_journals(store)
        with store.write() as db:
            done, unfinished = sort_journals(db, journals, store.say)
            lose_without_journal(db, store)
            tell_cancels(db, store)
            withdraw_orphans(db)
        discard(done)
        while unfinished:
            journal = unfinished.pop()
            progress = Progress(journal.events)
            if progress.open or not progress.attempts:
                deadline = max(deadline, time.monotonic() + 10 + Job(journal.header["spec"]).grace)
            others = [lock, *(other.descriptor for other in unfinished)]
            children.append(fork(lambda: _finish_alone(store, journal, others)))
            journal.close()
    finally:
        os.close(lock)
    if wait and children:
        while children and time.monotonic() < deadline:
            children = [child for child in children if os.waitpid(child, os.WNOHANG) == (0, 0)]
            time.sleep(0.01)
        settle(store)
    if done:
        deliver_alone(store)


def _finish_alone(store, journal, others):
    for descriptor in others:           # locks that are not ours
        os.close(descriptor)
    inherit_nothing()
    leave_session()

    def finish(keeper):
        become_subreaper()
        perform_run(journal, store.folder, Signals(), keeper=keeper)
    keep_orphans(finish)


def leave_session():
    """Leave the caller's session, terminal and pipes."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    if null > 2:
        os.close(null)


# A run without a server.

def run_here(store, job, *, caller=False, settings=None, **request):
    """Run a job in the foreground, recorded -> its exit status.

    With `caller` it has the caller's environment, folder and standard input. `settings` count where
    the store has none of a server; the other keywords are those of `request_run`. Raises Refused.
    """
    console = Console(request.get("name") or job.id)
    signals = Signals((signal.SIGINT, signal.SIGQUIT), console.terminal)
    try:
        return exit_status(_run_alone(store, job, signals, console, caller=caller,
                                      settings=settings, **request))
    finally:
        console.flush()
        signals.close()


def _run_alone(store, job, signals, console, told=None, *, caller, settings=None,
               trigger="manual", keeper=None, **request):
    """Queue a run, wait for its place, supervise it in this process -> its row in the end."""
    if not store.exists:
        store.create()
    inherit_nothing()
    settle(store, wait=True)
    run_id = request_run(store, job, trigger=trigger, owner=own_identity(), **request)
    if told is not None:
        told(run_id)
    journal = _await_place(store, run_id, signals, settings)
    if journal is not None:
        base = dict(os.environ) if caller else None
        if console is not None and console.status:
            with store.read() as db:
                console.status.usual = usual_durations(db, [job.id]).get(job.id)
        courier = _start_courier(store, journal, settings)
        become_subreaper()              # from now on: the courier is no orphan of the run
        perform_run(journal, store.folder, signals, console=console, base=base, tell=courier,
                    keeper=keeper, given=store.given.pop(run_id, None))
        with store.write() as db:
            take_in(db, journal)
        discard([journal])
        store.wake()
        deliver_alone(store, settings)
    with store.read() as db:
        return get_run(db, run_id)


def _await_place(store, run_id, signals, settings):
    """The journal of a run when it has its place; None where it was withdrawn or cancelled."""
    told, poller, settled = False, select.poll(), time.monotonic()
    poller.register(signals.descriptor, select.POLLIN)
    while True:
        if time.monotonic() - settled > _LOOK_ALONE:
            settle(store, wait=True)    # what is waited for may have lost its supervisor
            settled = time.monotonic()
        with store.write() as db:
            run = get_run(db, run_id)
            if run["state"] != "queued":
                return None
            if signals.asked is not None:
                finish_run(db, run_id, "cancelled", [], reason="user", finished_at=time.time())
                return None
            settings = get_settings(db) or settings or {}
            limit = (settings.get("scheduler") or {}).get("max_concurrent")
            journals = claim(db, store.file("active"), lambda row: _job_of(db, row, settings),
                             limit, lambda row: row["id"] == run_id, vault=settings.get("vault"))
            reason = None if journals or told else _what_is_waited_for(db, run)
        if journals:
            return journals[0]
        if reason:
            store.say(reason)
            told = True
        poller.poll(200)
        signals.drain()


_LOOK_ALONE = 1.0       # seconds between looks at the journals of other commands


def _what_is_waited_for(db, run):
    others = [row["id"] for row in active_runs(db, run["job_id"]) if row["id"] != run["id"]]
    if others:
        return f"run {run['id']} waits for run {others[0]} of the same job"
    return f"run {run['id']} waits for a place: as many runs are on as max_concurrent allows"


def _job_of(db, row, settings):
    """The effective Job of a queued run, None if it is registered no longer."""
    if row["spec"] is not None:
        return effective_command(json.loads(row["spec"]), settings)
    try:
        return effective_job(db, row["job_id"], settings)
    except NoSuchJob:
        return None


def run_detached(store, job, **request):
    """Run a job in a process of its own, which keeps nothing of the caller's -> the run's id.

    The keywords are those of `run_here`, and `trigger` and `retry_of`. Raises Refused.
    """
    reader, writer = os.pipe()
    child = fork(lambda: fork(lambda: _run_detached(store, job, reader, writer, request)))
    os.close(writer)
    os.waitpid(child, 0)
    with open(reader) as answer:
        kind, _, text = answer.read().partition(" ")
    if kind != "run":
        raise RoexecError(text or "the run could not be started; nothing was recorded")
    return text


def _run_detached(store, job, reader, writer, request):
    os.close(reader)
    leave_session()

    def tell(kind, text):
        with contextlib.suppress(OSError):          # it has been told of the run already
            os.write(writer, f"{kind} {text}".encode())
            os.close(writer)

    def run(keeper):
        try:
            _run_alone(store, job, Signals(), None, lambda run_id: tell("run", run_id),
                       **{"caller": False, "keeper": keeper, **request})
        except RoexecError as error:
            tell("error", str(error))
    keep_orphans(run)


# ==== 19 scheduler ================================================================================
# The loop of a server. It decides what becomes of slots that are due and of runs that wait, has
# those that get a place started, and takes in how they have ended. A launcher forks their
# supervisors.

# The launcher.

def start_launcher():
    """Fork the process that forks supervisors -> the socket to it. This comes first of all: it has
    no thread, lock, store or connection, only what supervisors need."""
    prepare_cgroup()    # before the fork: supervisors are where the launcher is
    _warm_up()
    inherit_nothing()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fork(lambda: _launch(ours, theirs))
    theirs.close()
    return ours


def _warm_up():
    """Import and compile here, once, what each supervisor would have to."""
    import ctypes
    import gc
    for module in (array, contextlib, ctypes, errno, fcntl, json, math, pwd, select, shlex, socket):
        getattr(module, "__name__")
    json.dumps(Job({"id": "x", "command": "x"}).spec)
    clean_environment(os.geteuid()), format_instant(0), command_text(["x"])
    gc.freeze()         # a collection would touch, and so copy, what the forks share


def _launch(ours, channel):
    """The launcher's body: each message is the folder of the store, with a supervisor's socket."""
    import gc
    gc.disable()
    ours.close()
    leave_session()
    for name in list(os.environ):
        if name == "NOTIFY_SOCKET" or name.startswith(("LISTEN_", "WATCHDOG_")):
            del os.environ[name]
    for number in _NOT_FOR_CHILDREN:
        signal.signal(number, signal.SIG_IGN)
    become_subreaper()
    signal.signal(signal.SIGCHLD, reap_all)
    while True:
        folder, descriptor = receive_descriptors(channel)
        if folder is None:
            return
        try:
            fork(lambda: _become_keeper(channel, folder, descriptor))
        except OSError:                 # too many processes; the server asks again at once
            time.sleep(0.1)
        os.close(descriptor)


_NOT_FOR_CHILDREN = (2, 15, 1, 20)      # INT, TERM, HUP, TSTP: the launcher ends with the server


def reap_all(*_):
    """Take the ends of all children that have ended, whoever they were."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _become_keeper(launcher, folder, descriptor):
    launcher.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    keep_orphans(lambda keeper: _become_supervisor(folder, descriptor, keeper))


def _become_supervisor(folder, descriptor, keeper):
    for number in _NOT_FOR_CHILDREN:
        signal.signal(number, signal.SIG_DFL)
    os.setsid()
    become_subreaper()
    server = socket.socket(fileno=descriptor)
    server.send(b"ready")
    serve_runs(server, folder, perform_run, keeper=keeper)


# The loop.

_BATCH = 64             # jobs decided in one transaction
_LEAD = 0.008           # seconds by which a start is prepared before its instant
_LOOK = 2.0             # seconds between looks at the journals of an earlier server
_MOST_WAITING = 512     # runs that have a place and wait for a supervisor
_CORRECTION = 3 * 3600  # seconds; a step back by more corrects the clock (cron(8))


class _Entry:
    """A registered job as the loop knows it: its next slot is due at `instant`, and it has to be
    looked at at `due`, a little earlier, or then."""
    __slots__ = ("job", "version", "position", "paused", "instant", "due")


class _Timetable:
    """The registered jobs as the loop knows them, and when each has to be looked at next."""

    def __init__(self, store, say):
        self.store, self.say = store, say
        self.entries, self.heap = {}, []                    # heap: (due, job id)
        self.changes, self.settings, self.zone = -1, {}, datetime.timezone.utc
        self.limit = None                                   # of all runs

    def next_due(self):
        """The instant (UTC seconds) at which a job has to be looked at; infinity without one."""
        return self.heap[0][0] if self.heap else math.inf

    def pop_due(self, now):
        """The ids of jobs that are due, some of them at a time; `plan` puts them back."""
        due = []
        while self.heap and self.heap[0][0] <= now and len(due) < _BATCH:
            instant, job_id = heapq.heappop(self.heap)
            entry = self.entries.get(job_id)
            if entry is not None and entry.due == instant and job_id not in due:
                due.append(job_id)
        return due

    def plan(self, job_id):
        """Note when a job has to be looked at next."""
        entry = self.entries.get(job_id)
        if entry is None:
            return
        slot = next_slot(entry.job, entry.position, self.zone) if entry.job.enabled else None
        entry.due = None
        if slot is not None:
            entry.instant = delayed(entry.job, slot)
            self._look_at(job_id, entry, entry.instant - _LEAD)

    def _look_at(self, job_id, entry, due):
        entry.due = due
        heapq.heappush(self.heap, (due, job_id))

    def refresh(self, db):
        """Know what has changed in the store since the last time."""
        changes = count_changes(db)
        if changes == self.changes:
            return
        settings = get_settings(db) or {}
        if settings != self.settings or self.changes < 0:
            self.settings, self.changes = settings, -1
            scheduler = settings.get("scheduler") or {}
            self.limit = scheduler.get("max_concurrent")
            self.zone = get_zone(scheduler["timezone"]) if scheduler.get("timezone") \
                else host_zone()
        for row in changed_jobs(db, self.changes):
            self.entries.pop(row["id"], None)
            if not row["deleted"]:
                self._know(row)
        self.changes = changes

    def _know(self, row):
        try:
            job = job_in_effect(row, self.settings.get("defaults"))
        except RoexecError as error:
            self.say(f"Job {row['id']} cannot be scheduled: {error}", "ERROR")
            return
        entry = self.entries[row["id"]] = _Entry()
        entry.job, entry.version = job, row["version"]
        entry.position, entry.paused = row["position"], row["paused"]
        if entry.position > time.time() + _CORRECTION:
            entry.position = time.time()
        self.plan(row["id"])

    def job_of(self, row):
        """The effective Job of a run, None if it is registered no longer."""
        if row["spec"] is not None:
            return effective_command(json.loads(row["spec"]), self.settings)
        entry = self.entries.get(row["job_id"])
        return entry and entry.job

    def correct(self, db, now):
        """Let slots count from now on where a position lies in the future."""
        for job_id, entry in self.entries.items():
            if entry.position > now:
                set_position(db, job_id, now)
                entry.position = now

    def start_boot(self, db, boot):
        """Queue the `@reboot` jobs that are known when the first server of a boot starts."""
        if get_meta(db, "boot") == boot:
            return
        set_meta(db, "boot", boot)
        for entry in self.entries.values():
            start, end = entry.job.window_instants(self.zone)
            if any(cron.reboot for cron in entry.job.crons()) and entry.job.enabled \
                    and max(entry.paused, start or 0) <= time.time() <= (end or math.inf):
                self._add(db, entry, "schedule", time.time())

    def decide(self, db, job_id, now, replaced, started):
        """Decide the due slots of a job -> its new position, for `move` once that is committed.

        Ids of runs to be replaced and journals of hooks to be run are added to the lists.
        """
        entry = self.entries.get(job_id)
        if entry is None or entry.due is None or entry.due > now:   # it is another one since
            return None
        job = entry.job
        if now < entry.instant and active_runs(db, job_id):     # it may have ended until then
            self._look_at(job_id, entry, entry.instant)
            return None
        position = entry.position
        if now - position > _CORRECTION:        # it may be that of a clock that was wrong
            newest = newest_slot_row(db, job_id, now)
            if newest is not None:
                position = max(position, min(now, newest["last_slot"] or newest["slot"]))
        rows, position = decide_slots(job, position, max(now, entry.instant), self.zone,
                                      entry.paused)
        for row in rows:
            if slot_is_known(db, job.id, row.slot):     # before a clock was corrected
                continue
            if row.reason is None:
                self._start_slot(db, entry, row, now, replaced)
                continue
            run_id = skip_slots(db, job.id, row, now)
            path = self.store.file(f"active/{run_id}")
            if row.reason == "missed" and "on_missed" in job.hooks and not os.path.exists(path):
                started.append(make_journal(db, self.store.file("active"), get_run(db, run_id),
                                            job, now, boot=boot_id(), only="on_missed"))
        set_position(db, job.id, position)
        return position

    def move(self, job_id, position):
        """Know the new position of a job; None where nothing was decided yet."""
        if position is not None and job_id in self.entries:
            self.entries[job_id].position = position
            self.plan(job_id)

    def _start_slot(self, db, entry, row, now, replaced):
        job = entry.job
        action, other = overlap_action(job, row.trigger, active_runs(db, job.id))
        reason, message = None, None
        if action == "skip":
            reason, message = "overlap", f"run {other['id']} was {other['state']}"
        elif count_queued(db) >= MOST_QUEUED:
            reason, message = "capacity", f"{MOST_QUEUED} runs were queued"
        if reason:
            skip_slots(db, job.id, SlotRow(slot=row.slot, last_slot=row.slot, count=1,
                                           trigger=row.trigger, reason=reason, message=message),
                       now)
            return
        self._add(db, entry, row.trigger, now, row.slot)
        if action == "replace":
            replace_run(db, other)
            if other["state"] == "running":
                replaced.append(other["id"])

    def _add(self, db, entry, trigger, now, slot=None):
        add_run(db, id=new_run_id(), job_id=entry.job.id, version=entry.version, trigger=trigger,
                slot=slot, state="queued", queued_at=now, priority=entry.job.priority)


STUCK = "the scheduler does not answer"


class Vitals:
    """How the loop of a server is doing: any thread may ask, and commands are left word of it."""

    def __init__(self, store, supervisors, timetable):
        self.store, self.supervisors, self.timetable = store, supervisors, timetable
        self.last_turn, self.failed, self.found = time.monotonic(), False, None
        self.worst = -math.inf, 0.0     # (when, the most seconds that it was late of late)

    def note_turn(self, now):
        """Note that the loop begins a turn at an instant, and how late that is for some slot."""
        self.last_turn = time.monotonic()
        late = now - self.timetable.next_due()
        if late > self.worst[1] or self.last_turn > self.worst[0] + _RECENT:
            self.worst = self.last_turn, max(0.0, late)

    def lag(self):
        """The most seconds by which a slot was late in the last minute, or is."""
        return max(self.worst[1], self._overdue())

    def _overdue(self):
        with contextlib.suppress(IndexError):       # the loop has just taken the last one
            return time.time() - self.timetable.next_due()
        return 0.0

    def trouble(self):
        """What keeps the server from its work, a sentence; None where nothing does."""
        return STUCK if time.monotonic() > self.last_turn + _STUCK else self.found

    def look(self):
        """See whether something is wrong; the loop does, each second."""
        found = self._store_trouble() or self._work_trouble()
        if found != self.found:
            self.found = found
            self.store.leave_word(found)

    def _store_trouble(self):
        disk = os.statvfs(self.store.folder)
        if disk.f_flag & os.ST_RDONLY:
            return "the file system of the store is read-only"
        room = disk.f_bfree if os.geteuid() == 0 else disk.f_bavail     # root has a reserve
        if not room or disk.f_files and not disk.f_favail:
            return "the disk of the store is full"
        return "the scheduler fails at its work; its log says why" if self.failed else None

    def _work_trouble(self):
        asked_for = [each.since for each in self.supervisors.all.values() if each.is_new]
        if asked_for and min(asked_for) < time.monotonic() - _STUCK:
            return "the launcher does not answer"
        waiting = self.supervisors.waiting
        if waiting and waiting[0].header.get("claimed_at", math.inf) < time.time() - ON_TIME \
                or self._overdue() > ON_TIME:
            return "runs have been due for more than a minute and are not started"
        return None


_STUCK = 10.0           # seconds without a turn of the loop, or an answer of the launcher
_RECENT = 60.0          # seconds


class SystemdNotifier:
    """Tells the manager of services how a server is doing (sd_notify(3)); to be called each second
    by its loop. Without a manager that wants to know it does nothing."""

    def __init__(self, vitals):
        self.vitals, self.address = vitals, os.environ.get("NOTIFY_SOCKET")
        self.ready, self.status = False, None
        watched = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watched = watched and "WATCHDOG_USEC" in os.environ

    def __call__(self):
        status, supervisors = self.vitals.found, self.vitals.supervisors
        if status is None:
            runs = sum(each.run is not None for each in supervisors.all.values())
            status = (f"jobs: {len(self.vitals.timetable.entries)}, runs in hand: {runs}, waiting: "
                      f"{len(supervisors.waiting)}")
        said = ["READY=1"] * (not self.ready) + ["WATCHDOG=1"] * self.watched
        if status != self.status:
            said.append(f"STATUS={status}")
        if said and self.tell(*said):
            self.ready, self.status = True, status

    def tell(self, *lines):
        """Send such lines -> whether they have arrived."""
        if not self.address:
            return False
        path = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        with contextlib.suppress(OSError), socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.setblocking(False)
            channel.sendto("\n".join(lines).encode(), path)
            return True
        return False


class _Calls:
    """What calls upon the loop: signals, which have `asked` for its end so many times or want a
    `reload`, and whoever writes into the FIFO of the store."""

    def __init__(self, store):
        self.asked, self.reload = 0, False
        self.signals, self.writer = quiet_pipe()
        self.before = {number: signal.signal(number, self.note)
                       for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        self.before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, signal.SIG_IGN)
        signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        self.fifo = os.open(store.file("wake"), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def note(self, number, _):
        """The handler of the signals."""
        if number == signal.SIGHUP:
            self.reload = True
        else:
            self.asked += 1

    def close(self):
        """Put signals back as they were."""
        signal.set_wakeup_fd(-1)
        for number, handler in self.before.items():
            signal.signal(number, handler)
        for descriptor in (self.signals, self.writer, self.fifo):
            os.close(descriptor)


class Scheduler:
    """The loop of a server. The order of its start is that of `server` in the command line.

    `say(text, level, at)` writes its log. `each_second` and `on_reload` are called each second and
    at SIGHUP. `run` returns when SIGTERM or SIGINT asks for the end; runs go on.
    """

    def __init__(self, store, launcher, say):
        self.store, self.launcher, self.say = store, launcher, say
        self.each_second, self.on_reload = [], []
        self.poller = select.poll()
        self.supervisors = Supervisors(
            store.folder, lambda channel: send_descriptor(launcher, store.folder, channel.fileno()),
            self.poller, say)
        self.timetable = _Timetable(store, say)
        self.vitals = Vitals(store, self.supervisors, self.timetable)
        self.postman = None             # who is to be told of new notices
        self.ended = []                 # journals that are to be taken in
        self.more_queued = False        # whether not all have got the places that are free
        self.said = set()               # what is to be said once
        self.drain = 0                  # seconds to wait for runs when asked to end
        self.last_look = self.last_second = -math.inf
        self.offset = time.time() - time.monotonic()

    def run(self):
        """Schedule until asked to end."""
        self._prepare()
        try:
            more = True
            while not self.calls.asked:
                ended = self._sleep(0 if more else self._seconds())
                _see_store(self.store, self.calls.fifo)
                self.vitals.note_turn(time.time())
                try:
                    more = self._turn(ended, time.time())
                except (RoexecError, OSError) as error:     # a full disk, say: tried again
                    self.say(str(error), "ERROR")
                    self.vitals.failed = True
                    more = False
                    time.sleep(1)
            self._await_runs(self.drain)
            if ends_with_us():
                self._end_runs()
        finally:
            self._leave()

    # Start and end.

    def _prepare(self):
        self.calls = _Calls(self.store)
        for descriptor in (self.calls.signals, self.calls.fifo, self.launcher.fileno()):
            self.poller.register(descriptor, select.POLLIN)
        self.files = _allow_many_files()
        self.supervisors.fork()
        self._take_in(self._look(), (), time.time(), True)
        with self.store.write() as db:
            self.timetable.start_boot(db, _boot_of_jobs())
        self.last_look = -math.inf

    def _leave(self):
        self.calls.close()
        self.supervisors.close()
        for journal in self.ended:
            journal.close()
        self.launcher.close()

    def _await_runs(self, seconds, others=()):
        """Take runs in that end within some seconds, ours and some of others'; a further signal
        ends the waiting."""
        deadline, asked = time.monotonic() + seconds, self.calls.asked
        journals = [self.store.file(f"active/{run_id}") for run_id in others]
        while self.calls.asked == asked and (self.supervisors.are_busy()
                                       or any(map(lock_is_held, journals))):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            self._take_in(self._sleep(min(left, _LOOK)) + self._look(), (), None, False)
            self.supervisors.hand_over()

    def _end_runs(self):
        """End all runs at once, since what ends us ends the host, in 10 s (docker stop)."""
        running = _ask_all_to_end(self.store)
        for run_id in running:
            signal_cancel(self.store, run_id, "shutdown", _LAST_GRACE)
        self._await_runs(_LAST_GRACE + 2, running)      # also those that commands have begun

    # Sleeping.

    def _seconds(self):
        """How long there is nothing to do."""
        longest = self.last_second + 1 - time.monotonic()
        if self.supervisors.waiting:
            longest = min(longest, STALL)
        return max(0, min(longest, self.timetable.next_due() - time.time()))

    def _sleep(self, seconds):
        """Wait for something to happen -> the journals that supervisors have given back.

        poll(2) counts in milliseconds: the last one is slept exactly, where a slot is due in it.
        """
        events = self.poller.poll(math.floor(seconds * 1000))
        self.supervisors.stalled = bool(seconds and not events)
        if not events and seconds:
            rest = self.timetable.next_due() - time.time()
            if 0 < rest < 0.002:
                time.sleep(rest)
        ended = []
        for descriptor, _ in events:
            if descriptor in self.supervisors.all:
                ended += self.supervisors.hear(descriptor)
            elif descriptor == self.launcher.fileno():
                _start_again(self.store, self.say)
            else:
                _drain(descriptor)
                self.last_look = -math.inf          # something has changed: look at it
        return ended

    # One turn.

    def _turn(self, ended, now):
        """Do what is due now -> whether there is more to do at once."""
        self.ended += ended
        self._see_clock(now)
        if time.monotonic() - self.last_second >= 1 or self.calls.reload:
            self.last_second = time.monotonic()
            if self.calls.reload:
                self.calls.reload = False
                _call(self.on_reload, self.say)
            _call((self.vitals.look, *self.each_second), self.say)
        self.supervisors.hand_over()    # before the disk is waited for
        looking = time.monotonic() - self.last_look >= _LOOK
        if looking:
            self.last_look = time.monotonic()
            self.ended += self._look()
        due = self.timetable.pop_due(now)
        waiting = len(self.supervisors.waiting)
        if due or looking or len(self.ended) >= (_BATCH if waiting else 1) \
                or self.supervisors.telling or self.more_queued and waiting < _MOST_WAITING // 2:
            ended, self.ended = self.ended, []
            self._take_in(ended, due, now, looking)
            self.supervisors.hand_over()
        self.supervisors.rest()
        return self.timetable.next_due() <= now or self.last_look == -math.inf

    def _see_clock(self, now):
        """Where the clock was set back by more than three hours, slots count from now on."""
        before, offset = self.offset, now - time.monotonic()
        if offset < before - 1:
            self.say(f"The clock was set back by {format_duration(before - offset)}")
            if offset < before - _CORRECTION:
                with self.store.write() as db:
                    self.timetable.correct(db, now)
            for job_id in self.timetable.entries:
                self.timetable.plan(job_id)
        self.offset = offset

    def _take_in(self, journals, due, now, looking):
        """One transaction: take ends in, decide slots, give places. Then the runs are started."""
        started, decided, replaced = [], [], []
        try:
            with self.store.write() as db:
                done, unfinished = sort_journals(db, journals, self._say_once)
                self.timetable.refresh(db)
                for run_id in self.supervisors.take_telling():
                    post_live_notices(db, self.store, run_id)
                if looking:
                    answer_requests(db, self.store)
                    lose_without_journal(db, self.store)
                    tell_cancels(db, self.store)
                    withdraw_orphans(db)
                for job_id in due:
                    position = self.timetable.decide(db, job_id, now, replaced, started)
                    decided.append((job_id, position))
                started += self._claim(db)
                ends = [journal.taken for journal in done if journal.taken]
        except BaseException:
            for journal in journals + started:      # found again at the next look, which knows
                journal.close()                     # whether the commit holds after all
            for job_id in due:
                self.timetable.plan(job_id)
            raise
        self.vitals.failed = False
        for job_id, position in decided:
            self.timetable.move(job_id, position)
        discard(done)
        if any((row.get("cause") or "").endswith("/job") for row in ends):
            self.last_look = -math.inf              # a step waits for that
        self._start(unfinished, started, replaced)
        for row in ends:
            _tell_end(self.say, row)
        if self.postman is not None:
            self.postman.wake()
        self.store.checkpoint()

    def _claim(self, db):
        """The journals of runs whose turn it is: some at a time, since each is an open file."""
        waiting = len(self.supervisors.waiting)
        if self.calls.asked or waiting >= _MOST_WAITING // 2:
            return []
        most = min(_MOST_WAITING, self.files - OTHER_FILES - len(self.supervisors.all))
        places = iter(range(most - waiting))
        started = claim(db, self.store.file("active"), self.timetable.job_of, self.timetable.limit,
                        lambda row: not row["owner"] and next(places, None) is not None)
        self.more_queued = next(places, None) is None
        return started

    def _say_once(self, text):
        if text not in self.said:
            self.said.add(text)
            self.say(text, "ERROR")

    def _start(self, unfinished, started, replaced):
        self.supervisors.waiting += unfinished + started    # first, whatever fails below
        self.supervisors.given.update(_given_to(self.store, started))
        for run_id in replaced:
            signal_cancel(self.store, run_id, "replaced")
        for journal in started:
            if not journal.header.get("only"):
                self.say(f"Run {journal.run_id} started, job={journal.header['job']}", at=max(
                    time.time(), journal.header["not_before"] or 0))
        for journal in unfinished:
            self.say(f"Run {journal.run_id} has lost its supervisor, job={journal.header['job']}",
                     "ERROR")

    # Ends.

    def _look(self):
        """Journals that nobody looks after: of an earlier server, or of commands that died."""
        return found_journals(self.store, self.supervisors.runs().union(
            journal.name for journal in self.ended))


def _given_to(store, journals):
    """{name: secrets} of journals whose runs were given some, which the store then forgets."""
    return {journal.name: store.given.pop(journal.run_id) for journal in journals
            if journal.run_id in store.given}


def _ask_all_to_end(store):
    with store.write() as db:
        running = [row["id"] for row in active_runs(db) if row["state"] == "running"]
        for run_id in running:
            ask_to_cancel(db, run_id, "shutdown")
    return running


def _call(functions, say):
    for function in functions:
        try:
            function()
        except (RoexecError, OSError) as error:
            say(str(error), "ERROR")


def _see_store(store, fifo):
    """End where the store was removed, or another one has its name: what is written now would be
    read by nobody, and the jobs of the new one would have two servers."""
    if not is_at(fifo, store.file("wake")):
        store.kept.close()              # without the lock, which is not that of this database
        store.kept = None
        raise RoexecError(f"the store {store.path} was removed, or replaced by another; start the "
                          "server again")


def _start_again(store, say):
    """The launcher has died: become a new server, as every restart does."""
    say("The launcher has ended; starting again", "ERROR")
    store.close()
    reap_all()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]] if hasattr(sys, "orig_argv")
             else [sys.executable, *sys.argv])


def _tell_end(say, row):
    if row["state"] == "succeeded":
        say(f"Run {row['id']} completed, exit={row['exit_code']}, job={row['job_id']}")
        return
    how = f"reason={row['reason']}"
    if row.get("signal"):
        how = f"signal={row['signal']}"
    elif row.get("exit_code") is not None:
        how = f"exit={row['exit_code']}"
    say(f"Run {row['id']} {row['state']}, {how}{reason_beside(row['reason'])}, job={row['job_id']}",
        "INFO" if row["state"] in ("cancelled", "skipped") else "ERROR")


_LAST_GRACE = 5         # seconds between SIGTERM and SIGKILL where the host ends with us
_INITS = {"tini", "docker-init", "dumb-init", "catatonit", "sh", "bash", "dash", "ash", "busybox"}


def ends_with_us():
    """Whether the host, a container then, ends when this process does: it is PID 1, or stands
    below an init or a shell that is."""
    if os.getpid() == 1 or os.getppid() != 1:
        return os.getpid() == 1
    with open("/proc/1/comm") as file:
        return file.read().strip() in _INITS


def unit_warning():
    """What to say where systemd would end all runs at a restart of our unit, else None."""
    if "INVOCATION_ID" not in os.environ:           # systemd.exec(5)
        return None
    found = unit_of("self")
    mode = found and show_unit(*found, ["KillMode"]).get("KillMode")
    if mode in (None, "process", "none"):
        return None
    return (f"A restart of {found[1]} will end the runs that are on, since its KillMode is {mode}; "
            "write KillMode=process into its section [Service]")


def unit_of(pid):
    """([option of systemctl], unit) of the service of systemd that a process is of, or None."""
    try:
        with open(f"/proc/{pid}/cgroup") as file:
            path = file.read().strip().rpartition(":")[2]
    except OSError:
        return None
    units = [name for name in path.split("/") if name.endswith(".service")]
    # user@1000.service is a manager of its own.
    return (["--user"] if units[1:] else [], units[-1]) if units else None


def show_unit(options, unit, names):
    """{name: value} of properties of a unit; empty where systemd does not answer."""
    import subprocess
    try:
        shown = subprocess.run(["systemctl", *options, "show", "--property=" + ",".join(names),
                                unit], capture_output=True, text=True, timeout=5).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)


def _boot_of_jobs():
    """What `@reboot` is due once for; in a container, where we are PID 1, its start counts."""
    return boot_id() + (f" {process_start(1)}" if os.getpid() == 1 else "")


def _allow_many_files():
    """Raise the limit of open files -> what it is then: each run on takes one. Commands keep the
    limit there was, since the launcher does."""
    import resource
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):      # macOS takes no infinite one
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return math.inf if most == resource.RLIM_INFINITY else most


def _drain(descriptor):
    with contextlib.suppress(BlockingIOError):
        while len(os.read(descriptor, 4096)) == 4096:
            pass


def hold_server_lock(store):
    """The descriptor of the lock that makes this process the server of a store.

    Raises RoexecError where another one is.
    """
    make_private_folder(store.folder, store.say)
    descriptor = open_private(store.file("server.lock"))
    deadline = time.monotonic() + 1     # a command may hold it for an instant, to take runs in
    while not try_lock(descriptor):
        if time.monotonic() > deadline:
            os.close(descriptor)
            raise RoexecError(f"a server (process {store.server()}) works on the store "
                              f"{store.path} already; end that one first")
        time.sleep(0.01)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
    return descriptor


# ==== 20 upkeep ===================================================================================
# What keeps a store small and whole over the years: old runs and logs go, what a crash has left is
# mended, and a copy is there. Rows go first, files afterwards, so that no row names what is gone;
# the store is never held for longer than some milliseconds, and then left to others for as long.

_PAGE = 1000                # rows that are looked at together
_FEWEST, _MOST_AT_ONCE = 20, 1000       # changes in one transaction
_HOLD = 0.01                # seconds that a transaction is to take
_PAUSE = 0.015              # seconds between two, at least: longer than a writer sleeps that waits
_LARGE = 1 << 20            # bytes of the write-ahead log that are moved at once
_DAY = 86400
_SOON, _LOOK_AGAIN = 30, 600            # seconds after the start of a server, and between looks


class _Policy:
    """How long runs and logs are kept, by the settings of the store and by its jobs themselves."""

    def __init__(self, db, settings):
        defaults = settings.get("defaults")
        self._known, bare = known_job_ids(db), {"id": "x", "command": "x"}
        self._usual, self._other = effective(Job(bare), defaults), effective_command(bare, settings)
        self._own = {row["id"]: job_in_effect(row, defaults) for row in jobs_with_limits(db)}

    def of(self, job_id):
        """A Job that has the limits of the runs recorded under an id."""
        return self._own.get(job_id) or (self._usual if job_id in self._known else self._other)

    def least(self, value):
        """The least `value(job)`."""
        return min(map(value, (self._usual, self._other, *self._own.values())))


class Upkeep:
    """What is done to a store so that it stays small; `freed` counts runs, logs, bytes and such.

    `settings` count where the store has none. `progress(share, text)` is told how far it is; once
    `stopped()` is true it ends early, and goes on the next time. With `dry_run` it only counts.
    """

    def __init__(self, store, settings, *, dry_run=False, progress=None, stopped=None):
        self.store, self.now, self.dry_run = store, time.time(), dry_run
        self.progress = progress or (lambda share, text: None)
        self.stopped = stopped or (lambda: False)
        self.freed = collections.Counter()
        with store.read() as db:
            self._policy = _Policy(db, get_settings(db) or settings or {})
            self._newest = max(1, newest_seq(db))
        self._at_once, self._kept = _MOST_AT_ONCE if dry_run else 100, {}
        self._counted = set()           # logs, in a dry run

    def told(self):
        """What went, in words; empty where nothing did."""
        freed = self.freed
        parts = [f"{freed[what]} {what if freed[what] != 1 else what.replace('s', '', 1)}"
                 for what in ("runs", "logs", "logs of no run", "logs packed") if freed[what]]
        would = "would free" if self.dry_run else "freed"
        return f"{', '.join(parts)}; {would} {format_size(freed['bytes'])}" if parts else ""

    # Runs.

    def purge_runs(self, *, older=None, newest=None, job_id=None):
        """Remove runs that ended more than `older` seconds ago, or, without, any, but the `newest`
        ones of each job; those of one job, or of all. Without both, what their limits say."""
        policy = self._policy
        if older is not None:
            self._remove(self._aged(job_id, older, lambda job: older, newest or 0))
        elif newest is not None:
            self._remove(self._crowded(job_id, newest, lambda job: newest))
        else:
            def keep(job):
                return policy.of(job).history.keep

            def runs(job):
                return policy.of(job).history.runs
            shortest = policy.least(lambda job: job.history.keep)
            self._remove(self._aged(job_id, shortest, keep))
            self._remove(row for row in self._crowded(
                job_id, policy.least(lambda job: job.history.runs), runs)
                if row["ended"] >= self.now - keep(row["job_id"]))      # else it has just been seen

    def _aged(self, job_id, shortest, keep, spared=0):
        """Rows of runs that ended more than `keep(job id)` seconds ago; `shortest` is the least."""
        spared_from = {}
        for row in self._rows(job_id, before=self.now - shortest):
            job = row["job_id"]
            if row["ended"] is not None and row["ended"] < self.now - keep(job):
                if spared and job not in spared_from:
                    with self.store.read() as db:
                        spared_from[job] = seq_beyond(db, job, spared)
                if not spared or row["seq"] <= spared_from[job]:
                    yield row

    def _crowded(self, job_id, least, most):
        """Rows of ended runs beyond the newest `most(job id)` of a job; `least` is the least."""
        with self.store.read() as db:
            crowded = crowded_jobs(db, least, job_id)
        for job, count in crowded.items():
            if count > most(job):
                with self.store.read() as db:
                    until = seq_beyond(db, job, most(job))
                yield from (row for row in self._rows(job, until) if row["ended"] is not None)

    def _rows(self, job_id, until=None, before=None):
        """Rows of `ended_runs`, of which none stays in any case, from the oldest; those that follow
        where all were queued after an instant are younger still."""
        after = 0
        while not self.stopped():
            with self.store.read() as db:
                rows = ended_runs(db, after, _PAGE, job_id, until)
                chosen = [row for row in rows if not self._stays(db, row)]
            yield from chosen
            if len(rows) < _PAGE or before is not None and all(
                    row["queued_at"] > before for row in rows):
                return
            after = rows[-1]["seq"]
            self.progress(after / self._newest, f"{self.freed['runs']} runs removed")

    def _stays(self, db, row):
        job_id = row["job_id"]
        if job_id not in self._kept:
            self._kept[job_id] = kept_runs(db, job_id)
        return row["id"] in self._kept[job_id]

    def _remove(self, rows):
        for ids in self._some(row["id"] for row in rows):
            gone, logs = self._change(remove_runs, ids, self.dry_run)
            self.freed["runs"] += len(set(gone).intersection(ids))
            self._remove_files(logs)

    # Logs.

    def purge_logs(self):
        """Remove the logs of runs that ended longer ago than `log.keep`."""
        shortest = self._policy.least(lambda job: job.log.keep)
        after = (-math.inf, 0)
        while not self.stopped():
            with self.store.read() as db:
                rows = old_logs(db, self.now - shortest, after, self._at_once)
                due = self._logs_due(db, rows)
            for keep, ids in due.items():
                why = (f"on {format_instant(int(self.now))}, since its run had ended more than "
                       f"{format_duration(keep)} before (log.keep)")
                self._remove_files(self._change(drop_logs, ids, why, self.dry_run))
            if not rows:
                return
            after = rows[-1]["finished_at"], rows[-1]["seq"]
            self.progress(None, f"{self.freed['logs']} logs removed")

    def _logs_due(self, db, rows):
        due = {}                        # {log.keep: ids}; steps go with the whole
        for row in rows:
            keep = self._policy.of(row["job_id"]).log.keep
            old = row["finished_at"] < self.now - keep
            if old and row["step"] is None and not self._stays(db, row):
                due.setdefault(keep, []).append(row["id"])
        return due

    def _remove_files(self, logs):
        for path in set(logs) - self._counted:
            self.freed["logs"] += 1
            self.freed["bytes"] += (size_of_log if self.dry_run else remove_log)(
                self.store.folder, path)
        if self.dry_run:
            self._counted.update(logs)

    def tend_files(self):
        """Pack the logs of runs that ended more than a day ago, cut those that are too large, and
        remove those of no run that are as old as `log.keep`."""
        jobs = sorted(os.listdir(self.store.file("logs")))
        for number, job_id in enumerate(jobs):
            if self.stopped():
                return
            self.progress(number / len(jobs), f"{self.freed['logs packed']} logs packed")
            self._tend_folder(job_id)
        remove_unused_work(self.store)

    def _tend_folder(self, job_id):
        limits = self._policy.of(job_id).log
        found, left = list_logs(self.store.folder, job_id)
        for path in left:
            os.unlink(self.store.file(path))
        asked = [log for log in found.values() if log.written < self.now - (
            _DAY if not log.is_packed else limits.keep) or log.size > limits.max_size / 1000]
        known = logs_that_are_known(self.store, job_id) if asked else {}
        for log in asked:
            if log.path not in known:
                if log.written < self.now - limits.keep:
                    self.freed["logs of no run"] += 1
                    self.freed["bytes"] += remove_log(self.store.folder, log.path)
            elif known[log.path] is not None:
                self._pack(log, known[log.path], limits.max_size)
        with contextlib.suppress(OSError):
            os.rmdir(self.store.file(f"logs/{job_id}"))         # where nothing is left in it

    def _pack(self, log, ended, most):
        large = log.size > most or log.is_packed
        if large or ended < self.now - _DAY:
            freed = pack_log(self.store.folder, log.path, most)
            self.freed["logs packed"] += bool(freed)
            self.freed["bytes"] += freed

    # The database.

    def forget(self):
        """Forget notices that were settled long ago, and answers to keys that hold no longer."""
        with self.store.write() as db:
            purge_notices(db, self.now - KEPT_NOTICES)
            purge_answers(db, self.now)

    def give_back(self):
        """Make the database file smaller where a quarter of it holds nothing."""
        if self.dry_run:
            return
        before = None
        while True:
            with self.store.read() as db:
                free, pages, size = count_free(db)
            before = before or pages
            if free < pages / 4 or free * size < 4 * _LARGE or self.stopped():
                break
            self._change(give_back, self._at_once)
        self.freed["bytes"] += (before - pages) * size

    def copy(self):
        """Put a consistent copy of the database into the folder `backup` of the store."""
        make_private_folder(self.store.file("backup"), self.store.say)
        new = self.store.file("backup/new.db")
        self.store.copy_to(new, lambda done, total: self.progress(done / total, "copied"))
        put_in_place(new, self.store.file("backup/roexec.db"))

    # Transactions.

    def _some(self, items):
        """Lists of items, each as long as fits into one transaction."""
        some = []
        for item in items:
            some.append(item)
            if len(some) >= self._at_once:
                yield some
                some = []
        if some and not self.stopped():
            yield some

    def _change(self, function, *values):
        """The value of `function(db, *values)` in a transaction, which only reads in a dry run."""
        if self.dry_run:
            with self.store.read() as db:
                return function(db, *values)
        with self.store.write() as db:
            began = time.monotonic()
            result = function(db, *values)
        held = time.monotonic() - began
        better = int(self._at_once * min(max(_HOLD / held, 0.5), 1.5))
        self._at_once = max(_FEWEST, min(_MOST_AT_ONCE, better))
        self.store.checkpoint(_LARGE)
        time.sleep(max(_PAUSE, held))
        return result


def logs_that_are_known(store, job_id):
    """{path: the end of its run, None while that is on} of the logs recorded under a job.

    A log that was found before this is called, and is not in it, is of no run: a run that is on has
    a journal, which goes when the log is in the store.
    """
    live = {}
    for name in os.listdir(store.file("active")):
        journal = None if "." in name else Journal.glance(store.file(f"active/{name}"))
        if journal is not None:
            live[Progress(journal.events).log] = None
    with store.read() as db:
        return {**live, **logs_of_job(db, job_id)}


class UpkeepIsOn(RoexecError):
    """Another process does the upkeep of the store already."""


def hold_upkeep(store):
    """The descriptor of the lock of the one who does the upkeep; raises UpkeepIsOn, and
    RoexecError where there is no store."""
    if not store.exists:
        raise no_store(store)
    descriptor = open_private(store.file("upkeep.lock"))
    if not try_lock(descriptor):
        os.close(descriptor)
        raise UpkeepIsOn(f"another process does the upkeep of {store.path} already; wait for it")
    return descriptor


class Steward:
    """A thread of a server that does the upkeep of its store, daily and soon after its start."""

    def __init__(self, store, say, first=_SOON):
        self._store, self._say, self._first = store, say, first
        self._closed = threading.Event()
        self._thread = start_thread(self._run, "steward")

    def close(self):
        """End; what was not done is done the next time."""
        self._closed.set()
        self._thread.join(1)

    def _run(self):
        import traceback
        wait = self._first
        while not self._closed.wait(wait):
            wait = _LOOK_AGAIN
            try:
                self._look()
            except (RoexecError, OSError) as error:     # a full disk, say
                self._say(f"The upkeep has stopped: {_told(error)}; it is tried again in "
                          f"{format_duration(wait)}", "ERROR")
            except Exception:
                self._say(f"The upkeep has failed: {traceback.format_exc()}", "ERROR")

    def _look(self):
        """Do what there is to do where the last time is a day ago, or in the future."""
        with self._store.read() as db:
            last = get_meta(db, "upkeep", 0)
        if 0 <= time.time() - last < _DAY:
            return
        with contextlib.suppress(UpkeepIsOn):
            upkeep = keep_small(self._store, copy=True, stopped=self._closed.is_set)
            if upkeep.told():
                self._say(f"Upkeep: {upkeep.told()}")
            if not self._closed.is_set():
                with self._store.write() as db:
                    set_meta(db, "upkeep", time.time())


def _told(error):
    return str(error) if isinstance(error, RoexecError) else f"{error.filename}: {error.strerror}"


def keep_small(store, settings=None, copy=False, **how):
    """Do what the limits of the store and its jobs say -> the Upkeep; `how` is for that. With
    `copy` the daily copy of the database is made as well."""
    lock = hold_upkeep(store)
    try:
        upkeep = Upkeep(store, settings, **how)
        upkeep.purge_runs()
        upkeep.purge_logs()
        if not upkeep.dry_run:
            upkeep.tend_files()
            upkeep.forget()
            upkeep.give_back()
        if copy and not upkeep.stopped():
            upkeep.copy()
        return upkeep
    finally:
        os.close(lock)


# The logs of many runs.

def each_log(store, since=None, job_id=None):
    """Yield (row, path of the log) of the runs, steps too, that have logged something since an
    instant (UTC seconds), of a job or of all, in order of their start."""
    with store.read() as db:
        seqs = logged_runs(db, since, job_id)
    for start in range(0, len(seqs), _PAGE):
        with store.read() as db:
            rows = runs_by_seq(db, seqs[start:start + _PAGE])
        for row in rows:
            log = row["log"] or live_log(store, row["id"])
            if log and log_exists(store.folder, log):       # it may have been removed just now
                yield row, store.file(log)


# What a crash, or somebody, has left.

class Trouble(Value):
    """Something that was found wrong, in words; `kind` is mended, left (it does no harm, and goes
    by itself) or wrong."""
    __slots__ = ("kind", "text")


def check_store(store, *, dry_run=False, progress=None):
    """Look for what is wrong with a store, and mend what a crash has left -> [Trouble]."""
    check = _Check(store, dry_run, progress or (lambda share, text: None))
    lock = hold_upkeep(store)
    try:
        check.perform()
    finally:
        os.close(lock)
    return check.troubles


class _Check:
    """What `check_store` does; in a dry run `mended` means that it could be."""

    def __init__(self, store, dry_run, progress):
        self.store, self.dry_run, self.progress = store, dry_run, progress
        self.troubles = []

    def find(self, kind, text):
        self.troubles.append(Trouble(kind=kind, text=text))

    def perform(self):
        self.progress(None, "looking at the database")
        with self.store.read() as db:
            problems = problems_of(db)
        if problems:
            self.find("wrong", f"the database is damaged ({problems[0]}); stop the server and put "
                      "the daily copy in its place: roexec maintenance restore "
                      + self.store.file("backup/roexec.db"))
            return
        if not self.dry_run:
            settle(self.store)
        self._remove_unfinished()
        self._look_at_journals()
        with self.store.read() as db:
            jobs = jobs_with_logs(db)
        jobs = sorted(jobs.union(os.listdir(self.store.file("logs"))))
        for number, job_id in enumerate(jobs):
            self.progress(number / len(jobs), f"looking at the logs of {job_id}")
            self._look_at_logs(job_id)

    def _remove_unfinished(self):
        import shutil
        for name in ("restore.new", "backup/new.db"):
            path = self.store.file(name)
            if os.path.lexists(path):
                self.find("mended", f"{path} was never finished; it is removed")
                if not self.dry_run:
                    shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)

    def _look_at_journals(self):
        with self.store.read() as db:
            ours = get_meta(db, "store")
        for name in sorted(os.listdir(self.store.file("active"))):
            path = self.store.file(f"active/{name}")
            journal = None if "." in name else Journal.glance(path)
            if journal is not None and journal.header.get("store", ours) != ours:
                self.find("wrong", f"{path} belongs to another store; if its run has ended, "
                          f"remove it: rm {path}")

    def _look_at_logs(self, job_id):
        found, unfinished = list_logs(self.store.folder, job_id)
        known = logs_that_are_known(self.store, job_id)
        for path in unfinished:
            self.find("mended", f"{self.store.file(path)} was never finished; it is removed")
            if not self.dry_run:
                os.unlink(self.store.file(path))
        for path in sorted(found.keys() - known.keys()):
            self._look_at_stray(job_id, path)
        missing = [path for path, ended in known.items() if path not in found and ended is not None
                   and not log_exists(self.store.folder, path)]
        for path in missing:
            self.find("mended", f"{self.store.file(path)} is not there; its run says so now")
        if missing and not self.dry_run:
            gone = f"by something else: it was not there on {format_instant(int(time.time()))}"
            with self.store.write() as db:
                lose_logs(db, job_id, missing, gone)

    def _look_at_stray(self, job_id, path):
        with contextlib.suppress(ValueError):
            started, run_id = start_of_log(path)
            with self.store.read() as db:
                runs = lost_runs_without_log(db, job_id, started)
            runs = [run for run in runs if not run_id or run == run_id]
            if len(runs) == 1:
                self.find("mended", f"{self.store.file(path)} is the log of run {runs[0]}, which "
                          "was lost")
                if not self.dry_run:
                    with self.store.write() as db:
                        set_log(db, runs[0], path)
                return
        self.find("left", f"{self.store.file(path)} is of no run; it goes when it is as old as "
                  "log.keep")


# A copy elsewhere, and back.

_IN_ARCHIVE = Pattern(r"roexec\.db|jobs\.yml|logs/[A-Za-z0-9][A-Za-z0-9._-]{0,63}/"
                      r"[0-9A-Za-z:-]+\.log(?:\.gz|\.parts/\d{15}(?:\.gz)?)?")
_IN_A_PLAIN_TAR = Pattern(r"(|.*/)(?:backup/(roexec\.db)|(logs/.*))")


def back_up(store, path, jobs, *, logs=False, progress):
    """Write an archive of a store, as it is at one instant: the database, a job file (the text
    `jobs`) and, where asked for, the logs; packed where its name ends in gz.

    What had the name goes only when all is written. Raises RoexecError.
    """
    new = path + ".new"
    if os.path.lexists(path) and not os.path.isfile(path):
        raise RoexecError(f"{path} is no file; name one that can be replaced")
    try:
        with open(new, "wb", opener=open_private) as file:
            store.copy_to(new + ".db", lambda done, total: progress(done / total, "copied"))
            _write_archive(store, file, path.endswith("gz"), (new + ".db", jobs), logs, progress)
        put_in_place(new, path)
    except OSError as error:
        raise RoexecError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        for name in (new, new + ".db"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)


def _write_archive(store, file, is_packed, content, logs, progress):
    import io
    import tarfile
    database, jobs = content
    how = {"mode": "w:gz", "compresslevel": 5} if is_packed else {"mode": "w"}
    with tarfile.open(fileobj=file, **how) as archive:
        progress(None, "writing the database")
        archive.add(database, "roexec.db")
        info = tarfile.TarInfo("jobs.yml")
        info.size, info.mtime, info.mode = len(jobs.encode()), int(time.time()), 0o600
        archive.addfile(info, io.BytesIO(jobs.encode()))
        folders = sorted(os.listdir(store.file("logs"))) if logs else []
        for number, job_id in enumerate(folders):
            progress(number / len(folders), f"writing the logs of {job_id}")
            for log in list_logs(store.folder, job_id)[0].values():
                for name in log.files:
                    _add_log(archive, store, name)


def _add_log(archive, store, name):
    """Add a file of a log as long as it is now; it may have been packed, or removed, just now."""
    for name in (name, name + ".gz"):
        with contextlib.suppress(FileNotFoundError):
            with open(store.file(name), "rb") as file:
                return archive.addfile(archive.gettarinfo(arcname=name, fileobj=file), file)


def restore(store, path, progress, dry_run=False):
    """Put what a backup, a copy of the database or a plain tar of a store holds in the place of a
    store -> ({"jobs", "runs"}: how many, the folder in which lies what was there, or None).

    Nothing is changed before all is unpacked and found to be sound. Raises RoexecError.
    """
    import shutil
    import tempfile
    if dry_run:
        with tempfile.TemporaryDirectory() as fresh:
            _unpack(path, fresh, progress)
            return _check_unpacked(path, Store(fresh)), None
    locks = [hold_server_lock(store)]
    try:
        locks.append(hold_upkeep(store))
        _refuse_live_runs(store)
        fresh = store.file("restore.new")
        shutil.rmtree(fresh, ignore_errors=True)
        os.mkdir(fresh, 0o700)
        try:
            _unpack(path, fresh, progress)
            progress(None, "looking at the database")
            counts = _check_unpacked(path, Store(fresh))
            old = _swap(store, fresh)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        store.create()
        _forget_missing_logs(store)
        return counts, old
    except OSError as error:
        raise RoexecError(f"cannot restore {path}: {error.strerror or error}") from None
    finally:
        for lock in locks:
            os.close(lock)


def _refuse_live_runs(store):
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(store.file("active"))):
            if "." not in name and lock_is_held(store.file(f"active/{name}")):
                raise RoexecError(f"run {name} is on; wait for it, or cancel it, before its store "
                                  "is replaced")


def _unpack(path, fresh, progress):
    import tarfile
    import zlib
    with open(path, "rb") as file:
        head = file.read(16)
    if head == b"SQLite format 3\0":
        source = Store(path)
        source.database = path
        return source.copy_to(os.path.join(fresh, "roexec.db"),
                              lambda done, total: progress(done / total, "database copied"))
    try:
        size = os.stat(path).st_size
        with tarfile.open(path, "r:*") as archive:
            _unpack_members(archive, path, fresh, lambda: progress(
                min(1.0, archive.offset / size) if head[:2] != b"\x1f\x8b" else None, "unpacking"))
    except (tarfile.TarError, EOFError, zlib.error):
        raise RoexecError(f"{path} is no backup, or a damaged one") from None
    except OSError as error:
        if error.errno is None:         # gzip.BadGzipFile, of a checksum
            raise RoexecError(f"{path} is a damaged backup") from None
        raise


def _unpack_members(archive, path, fresh, progress):
    """Unpack an archive: of ours nothing but what a backup has, of others the copy and the logs."""
    import shutil
    ours, prefixes, seen = None, set(), set()
    for member in archive:
        progress()
        ours = member.name == "roexec.db" if ours is None else ours
        name = member.name if ours else _name_in_store(member.name, prefixes)
        if name is None:
            continue
        if not member.isreg() or not _IN_ARCHIVE.fullmatch(name) or name in seen:
            if not ours and member.isdir():
                continue
            raise RoexecError(f'{path} holds "{printable(member.name)}", which is no file of a '
                              "backup, or is there twice; nothing was restored")
        seen.add(name)
        target = os.path.join(fresh, name)
        os.makedirs(os.path.dirname(target), 0o700, exist_ok=True)
        with open(target, "xb", opener=open_private) as file:
            shutil.copyfileobj(archive.extractfile(member), file, 1 << 20)
        os.utime(target, (member.mtime, member.mtime))
    if "roexec.db" not in seen or len(prefixes) > 1:
        raise RoexecError(f"{path} holds no backup of one store, nor a copy of its database "
                          "(backup/roexec.db)")


def _name_in_store(name, prefixes):
    found = _IN_A_PLAIN_TAR.fullmatch(name)
    if not found:
        return None
    prefixes.add(found[1])
    return found[2] or found[3]


def _check_unpacked(path, fresh):
    """What is in an unpacked store; raises RoexecError where it is not as roexec makes it."""
    import sqlite3
    try:
        fresh.create()
        with Store(fresh.file("empty")).create().read() as db:
            schema = schema_of(db)
        with fresh.read() as db:
            problems = problems_of(db)
            if not problems and schema_of(db) != schema:
                problems = ["it is not made by roexec alone"]
            if not problems:
                return count_rows(db)
    except (RoexecError, sqlite3.Error) as error:
        problems = [str(error)]
    raise RoexecError(f"the database in {path} is not sound: {problems[0]}; nothing was restored")


def _swap(store, fresh):
    """Put a fresh store in the place of what is there -> the folder that has the latter, or None.

    The database comes last, in one step, and its write-ahead log has left with the old one.
    """
    old = store.file(f"before-{format_instant(int(time.time()))}")
    moved = [name for name in (store.database, store.database + "-wal", store.database + "-shm",
                               store.file("active"))
             if os.path.exists(name)]
    if os.listdir(os.path.join(fresh, "logs")) and os.path.exists(store.file("logs")):
        moved.append(store.file("logs"))
    if moved:
        os.mkdir(old, 0o700)
    for path in moved:
        os.rename(path, os.path.join(old, os.path.basename(path)))
    if not os.path.exists(store.file("logs")):
        os.rename(os.path.join(fresh, "logs"), store.file("logs"))
    put_in_place(os.path.join(fresh, "roexec.db"), store.database)
    return old if moved else None


def _forget_missing_logs(store):
    when = f"on {format_instant(int(time.time()))}, when a backup without it was restored"
    with store.read() as db:
        jobs = jobs_with_logs(db)
    for job_id in jobs:
        with store.read() as db:
            missing = [path for path in logs_of_job(db, job_id)
                       if not log_exists(store.folder, path)]
        if missing:
            with store.write() as db:
                lose_logs(db, job_id, missing, when)


# ==== 21 views ====================================================================================
# What there is to say of the store, as payloads: of jobs and runs, why a job has not run, metrics.
# The API and --json of the CLI give the same.

def in_effect(db, settings=None):
    """(defaults of all jobs, tzinfo of those that name none, how many runs at once or None), by
    the settings of the last server, else those passed; without a store `db` is None."""
    settings = db and get_settings(db) or settings or {}
    scheduler = settings.get("scheduler") or {}
    name = scheduler.get("timezone")
    return (settings.get("defaults") or {}, get_zone(name) if name else host_zone(),
            scheduler.get("max_concurrent"))


def job_payloads(db, rows, now, settings=None):
    """Payloads of rows of jobs, as they are in effect, with their next runs after `now`; the
    settings count where the store has none of a server."""
    defaults, zone, _ = in_effect(db, settings)
    usual, payloads = usual_durations(db, [row["id"] for row in rows]), []
    for row in rows:
        job = job_in_effect(row, defaults)
        coming = next_run(job, now, zone, row["paused"], row["position"])
        payloads.append(job_payload(row, job, coming, zone, now, usual.get(row["id"])))
    return payloads


def exported_jobs(db, ids):
    """Jobs as a file has to describe them, in which one without a folder would get that of the
    file. Raises NoSuchJob."""
    specs = [json.loads(get_job(db, job_id)["spec"]) for job_id in ids]
    return [effective(Job.from_spec(spec), {"directory": "~"}) for spec in specs]


def coming_slots(jobs, after, zone, count):
    """Payloads of the next slots of jobs, those > `after`, in order, `count` at most."""
    def slots(job):
        return ((slot, job.id, job) for slot in upcoming_slots(job, after, zone))

    merged = heapq.merge(*map(slots, jobs))
    return [slot_payload(job, slot, zone) for slot, _, job in itertools.islice(merged, count)]


def foresight(jobs, start, end, zone, usual, max_concurrent):
    """The payload of what `foresee` says about jobs; `usual` is {job id: seconds}."""
    foreseen = foresee(jobs, start, end, zone, usual, max_concurrent)
    return foresight_payload(foreseen, zone, [job.id for job in jobs if job.id not in usual])


def explanation(store, db, job_id, text=None, settings=None):
    """The payload of why a job has not run at an instant, as it was written, or what there is to
    say now, of its latest and of its next slot. Raises NoSuchJob, and ValueError for no instant."""
    known = _known_of(store, db, job_id, settings)
    job, zone = known.job, known.zone
    if text:
        return explanation_payload(job, _why_at(db, known, text), zone)
    slots = (last_slot(job, math.floor(known.now) + 1, zone),
             next(upcoming_slots(job, known.now, zone), None))
    answers = [(slot, _why(db, known, slot)) for slot in slots if slot is not None]
    return explanation_payload(job, [(None, explain(known)), *answers], zone)


def _why_at(db, known, text):
    """The answers to an instant as it was written."""
    instants, gap = local_instants(text, known.job.zone(known.zone))
    if not gap:
        return [(instant, _why(db, known, instant)) for instant in instants]
    instant, = instants
    moved = is_moved(known.job, instant, known.zone)
    return [(instant, [{"reason": "gap", "next": instant},
                       *(_why(db, known, instant) if moved else ())])]


def _why(db, known, instant):
    row = newest_slot_row(db, known.job.id, instant)
    others = runs_on_at(db, known.job.id, instant)
    alive = row and last_decision(db, row)
    return explain(known, instant, Met(row=row, others=others, alive=alive))


def _known_of(store, db, job_id, settings):
    """What `explain` wants to know of a job."""
    row, (defaults, zone, most) = get_job(db, job_id), in_effect(db, settings)
    active = [{**dict(run), **_attempts_of(store, db, run, job_id)} for run in active_runs(db)]
    limits = {}
    for run in active:
        if run["state"] == "queued" and run["job_id"] not in limits:
            with contextlib.suppress(NoSuchJob):
                limits[run["job_id"]] = 0 if run["name"] is not None else effective_job(
                    db, run["job_id"], settings).max_concurrent
    newest = newest_slot_row(db, job_id)
    paused_since = newest["slot"] if newest and newest["reason"] == "paused" else None
    return Known(
        now=time.time(), zone=zone, paused=row["paused"], paused_since=paused_since,
        versions=[(since, effective(Job.from_spec(json.loads(spec)), defaults))
                  for since, spec in job_versions(db, job_id)],
        position=row["position"], active=active, limits=limits, max_concurrent=most,
        held=paused_in_queue(db, time.time()), server=store.server() is not None)


def _attempts_of(store, db, run, job_id):
    """How far a running run of the job is."""
    if run["job_id"] != job_id or run["state"] != "running":
        return {}
    payload, = run_payloads(store, db, [run])
    if not payload["attempts"]:
        return {}
    return {"attempt": len(payload["attempts"]),
            "started_at": parse_instant(payload["attempts"][0]["started_at"], None),
            "retry_at": payload["retry_at"] and parse_instant(payload["retry_at"], None)}


def run_payloads(store, db, rows):
    """Payloads of rows of runs; what a running one has done so far its journal says."""
    return [run_payload(*_completed(store, db, row)) for row in rows]


def step_payloads(store, db, run):
    """Payloads of the steps of a run, of its row, in order; each has `depends_on` too. Those that a
    retry has taken over are those of the earlier run."""
    rows, spec = newest_steps(db, run), job_spec(db, run["job_id"], run["version"])
    steps = Job(json.loads(spec)).steps() if rows and spec else {}
    payloads = run_payloads(store, db, [rows[step] for step in steps if step in rows])
    return [{**payload, "depends_on": steps[payload["step"]].depends_on} for payload in payloads]


def _completed(store, db, row):
    """A row of a run, and the rows of its attempts."""
    row, attempts = live_run(store, row)
    return row, get_attempts(db, row["id"]) if attempts is None else attempts


def metric_samples(db, most, now):
    """The samples of all jobs: of the first `most` by id one by one, those of others as one."""
    counters, (defaults, zone, _) = read_counters(db), in_effect(db)
    running, queued = count_running(db), count_running(db, "queued")
    samples, others, known = [], [], set()
    for row in list_jobs(db):
        job_id = row["id"]
        job = job_in_effect(row, defaults)
        gauges = {"roexec_next_run_timestamp_seconds":
                  next_run(job, now, zone, row["paused"], row["position"]),
                  "roexec_runs_active": running.get(job_id, 0),
                  "roexec_runs_queued": queued.get(job_id, 0)}
        known.add(job_id)
        if len(known) <= most:
            samples += job_samples(job_id, counters.get(job_id, {}), gauges)
        else:
            others.append((counters.get(job_id, {}), gauges))
    for job_id in {*running, *queued} - known:      # of commands that are not registered
        others.append(({}, {"roexec_runs_active": running.get(job_id, 0),
                            "roexec_runs_queued": queued.get(job_id, 0)}))
    return samples + (job_samples(OTHER_JOBS, *_summed(others)) if others else [])


def _summed(jobs):
    """The counters and gauges of several jobs as those of one: of instants, the last success and
    the next run."""
    counters, gauges = {}, {}
    for more, gauges_of_one in jobs:
        for key, value in more.items():
            counters[key] = max(value, counters.get(key, 0)) if key[0] == "success" \
                else value + counters.get(key, 0)
        for name, value in gauges_of_one.items():
            if value is not None and name.endswith("_seconds"):
                gauges[name] = min(value, gauges.get(name, value))
            elif value is not None:
                gauges[name] = value + gauges.get(name, 0)
    return counters, gauges


# ==== 22 page =====================================================================================
# What a browser gets at `/`: one page without any other file, which asks the API as any client. Its
# script makes elements and sets their texts; nothing that it is told is ever read as HTML. What
# stands here is what is sent: there is no step in between.

_HTML = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>roexec</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg'
 viewBox='0 0 16 16'%3E%3Crect width='16' height='16' rx='4' fill='%232e7d54'/%3E%3Cpath
 d='M4 11V8m4 3V4m4 7V6' stroke='%23fff' stroke-width='2' stroke-linecap='round'/%3E%3C/svg%3E">
<style>__STYLE__</style>
</head>
<body>
<button id="skip" type="button">Skip to the content</button>
<header id="top">
<a id="brand" href="#/">roexec</a>
<nav aria-label="Views">
<a href="#/" data-view="overview">Overview</a>
<a href="#/timeline" data-view="timeline">Timeline</a>
<a href="#/files" data-view="files" hidden>Job files</a>
</nav>
<span id="live" role="status"></span>
<span id="who"></span>
</header>
<main id="main" tabindex="-1"></main>
<div id="said" role="status"></div>
<dialog id="dialog" aria-labelledby="dialog-title"></dialog>
<noscript>This page needs JavaScript.</noscript>
<script>__SCRIPT__</script>
</body>
</html>
"""

_STYLE = """
:root {
  --bg: #faf9f7; --panel: #fff; --line: #e3e1dc; --text: #22262b; --quiet: #5f656d;
  --link: #1b5cab; --hover: #f1efeb; --ok: #2e7d54; --bad: #c2382f; --late: #9a5b00;
  --lost: #7b46b0; --on: #2468c4; --off: #6b7178; --mark: #ffe58a;
  --mono: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  --state: var(--off); color-scheme: light dark;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #15171a; --panel: #1b1e22; --line: #2d3136; --text: #e2e4e7; --quiet: #9da3ab;
    --link: #86b6f5; --hover: #22262b; --ok: #58b583; --bad: #ee7d73; --late: #dba04e;
    --lost: #bd98e8; --on: #6ea6ef; --off: #868c94; --mark: #6b5a12;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--text);
  font: 14px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word; }
a { color: var(--link); text-decoration: none; }
a:hover { text-decoration: underline; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; border-radius: 4px; }
main:focus-visible { outline: none; }
h1 { font-size: 21px; font-weight: 600; margin: 0; line-height: 1.3; }
h2 { font-size: 13px; font-weight: 600; margin: 28px 0 8px; }
p { margin: 6px 0; }
ul, ol { list-style: none; margin: 0; padding: 0; }
dd { margin: 0; }
[hidden] { display: none !important; }
.hidden, #skip:not(:focus) { position: absolute; width: 1px; height: 1px; overflow: hidden;
  clip-path: inset(50%); white-space: nowrap; }
#skip { position: absolute; top: 8px; left: 8px; z-index: 9; }
.quiet, dt, th, .empty, .count, .at, .chip, .tag, nav a, #live, button:disabled, ::placeholder,
.jobs .schedule, .jobs .last, .plot > span, .hours span, .line.info, .line.gap {
  color: var(--quiet); }
dt, th, .tag, .plot > span, .hours span { font-size: 12px; }
.code, .told, .step, .lines, dialog, .sign-in { background: var(--panel); border-radius: 8px;
  border: 1px solid var(--line); }
.row > *, .jobs .name, .side a, .side li > span, .step span { overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap; }
.text { white-space: pre-wrap; }
.number, time, .count, [data-live], .at { font-variant-numeric: tabular-nums; }
.empty { padding: 48px 0; text-align: center; }
.failure { color: var(--bad); }
.warning { color: var(--late); }

#top, nav, #who, .tools, .chips, .head, .actions, .legend, .check { display: flex; gap: 8px;
  align-items: center; }
#top, .tools, .head, .actions, .legend { flex-wrap: wrap; }
#top { gap: 8px 20px; padding: 10px 24px;
  border-bottom: 1px solid var(--line); background: var(--panel); }
#brand { font-weight: 650; font-size: 15px; color: inherit; }
nav { gap: 4px; flex: 1; white-space: nowrap; }
nav a { padding: 4px 10px; border-radius: 6px; }
nav a:hover, .button:hover, button:hover { background: var(--hover); text-decoration: none; }
nav [aria-current] { color: var(--text); background: var(--hover); }
#live { min-width: 4em; text-align: right; font-size: 12.5px; }
#who { font-size: 12.5px; }
main { padding: 20px 24px 64px; max-width: 1440px; margin: 0 auto; }
#said { position: fixed; left: 50%; bottom: 20px; transform: translateX(-50%); z-index: 8;
  max-width: min(90vw, 40em); }
#said p { background: var(--text); color: var(--bg); padding: 8px 16px; border-radius: 8px;
  margin: 0; box-shadow: 0 4px 20px #0003; }

button, .button, select, input, textarea { font: inherit; color: inherit;
  background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: 5px 12px; }
code, pre, textarea, .mono, .line { font: 12.5px/1.5 var(--mono); }
button, .button { cursor: pointer; white-space: nowrap; }
.button { display: inline-block; }
button:disabled { cursor: default; }
button.main:enabled { background: var(--ok); border-color: var(--ok); color: var(--bg); }
input, textarea { border-color: var(--off); width: 100%; }
input[type=checkbox] { width: auto; margin: 0; }
::placeholder { opacity: 1; }
label { display: block; margin: 10px 0; }
label select { display: block; width: 100%; }
.check { margin: 0; white-space: nowrap; }
.tools { gap: 12px; margin-bottom: 16px; }
.tools input[type=search] { flex: 0 1 22em; }
.chips { gap: 4px; flex: 1; overflow-x: auto; padding: 2px 0; white-space: nowrap;
  scrollbar-width: none; }
.chip { padding: 3px 10px; border-radius: 99px; border: 1px solid #0000; }
.chip[aria-current] { color: var(--text); border-color: var(--line); background: var(--panel); }
.count { font-weight: 400; }
.head { justify-content: space-between; min-height: 34px; }

.badge { font-size: 12.5px; font-weight: 500; color: var(--state); }
h1 .badge { font-size: 14px; margin-left: 4px; }
.badge::before { content: ""; display: inline-block; width: 8px; height: 8px; margin-right: 6px;
  border-radius: 50%; background: var(--state); }
.succeeded, .added { --state: var(--ok); } .failed, .removed { --state: var(--bad); }
.timed_out, .paused { --state: var(--late); } .lost { --state: var(--lost); }
.running, .changed { --state: var(--on); }
.badge.skipped::before, .badge.queued::before, .badge.disabled::before {
  background: none; border: 2px solid var(--off); }
.tag { border: 1px solid var(--line); border-radius: 4px; padding: 0 5px; margin-right: 4px; }

.progress { height: 3px; border-radius: 2px; background: var(--line); overflow: hidden; }
.progress::before { content: ""; display: block; height: 100%; background: var(--on);
  transform-origin: left; transform: scaleX(var(--done, 0)); transition: transform 1s linear; }

.overview { display: grid; grid-template-columns: minmax(0, 1fr) 260px; column-gap: 32px; }
.overview > .tools { grid-column: 1 / -1; }
.jobs { grid-column: 1; grid-row: 2; min-width: 0; min-height: 60vh; }
.side { grid-column: 2; grid-row: 2; position: sticky; top: 20px; height: calc(100vh - 40px);
  display: grid; grid-template-rows: 1fr 1fr; gap: 16px; }
.side section { overflow-y: auto; min-height: 0; }
.side h2 { margin: 8px 0; }
.side li { padding: 7px 0; border-top: 1px solid var(--line); display: grid; gap: 1px; }
.side .progress { margin-top: 4px; }
.side .failed, .side .timed_out, .side .lost { padding-left: 10px;
  box-shadow: inset 3px 0 var(--state); }

.rows { position: relative; --row: 56px; }
.row { position: absolute; left: 0; right: 0; top: 0; height: var(--row); display: grid;
  align-items: center; gap: 16px; border-top: 1px solid var(--line); contain: strict; }
.row > * { min-width: 0; }
.name { font-weight: 550; color: inherit; margin-right: 8px; }
.jobs .name { display: block; margin: 0; }
.jobs .what .quiet { margin-right: 8px; font-size: 13px; }
.jobs .row { grid-template-columns: minmax(12em, 2.2fr) minmax(8em, 1.3fr) 7.5em 164px 8.5em; }
.jobs .last { display: flex; flex-wrap: wrap; column-gap: 8px; }
.jobs .last .badge { width: 100%; line-height: 1.3; }
.jobs .last .progress { width: 100%; margin-top: 2px; }
.job .rows { --row: 40px; }
.job .row { grid-template-columns: minmax(14em, 1.4fr) 8em minmax(10em, 1fr) 6em minmax(0, 2fr); }

.bars { display: flex; gap: 2px; height: 28px; align-items: flex-end; justify-content: flex-end; }
.bars a { width: 6px; border-radius: 1px; background: var(--state);
  height: calc(var(--high) * 100%); }
.bars a:hover { outline: 2px solid var(--state); }
.bars .succeeded { opacity: .5; }
.bars .skipped { background: none; border: 1px solid var(--off); }

.facts { display: grid; gap: 14px 24px;
  grid-template-columns: repeat(auto-fill, minmax(150px, 1fr));
  padding: 14px 0; margin: 10px 0 0; border: solid var(--line); border-width: 1px 0; }
.facts dd { overflow-wrap: anywhere; }
.slim { min-height: 30px; padding-top: 6px; white-space: pre-wrap; }
.slim .progress { margin-top: 6px; }
.columns { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 1fr); gap: 40px; }
.plot { position: relative; height: 150px; padding: 20px 8px; border-bottom: 1px solid var(--line);
  border-top: 1px dashed var(--line); }
.plot > div { position: relative; height: 100%; }
.plot > span { position: absolute; }
.plot .top { top: 0; right: 0; } .plot .from { left: 0; bottom: -20px; }
.plot .to { right: 0; bottom: -20px; }
.plot a { position: absolute; width: 8px; height: 8px; margin: -4px; border-radius: 50%;
  background: var(--state); opacity: .75; }
.code { margin: 0; padding: 12px 16px; overflow: auto; max-height: 24em; }
.code span { display: block; } .plus { color: var(--ok); } .minus { color: var(--bad); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 16px 0 0; }
th, td { text-align: right; padding: 4px 24px 4px 0; white-space: nowrap; font-weight: 400; }

.timeline .row, .scale { display: grid; grid-template-columns: 14em minmax(0, 1fr); gap: 16px; }
.timeline .rows { --row: 40px; }
.track { height: 32px; cursor: pointer; outline-offset: -2px; }
.track svg { width: 100%; height: 32px; display: block; }
.track path { fill: var(--state); fill-opacity: .85; }
.track .skipped { fill: none; stroke: var(--off); stroke-width: 1px;
  vector-effect: non-scaling-stroke; }
.track .slot { fill: var(--off); }
.track .unknown { fill: var(--hover); }
.track .now { stroke: var(--link); } .track .chosen { stroke: var(--text); stroke-dasharray: 3 3; }
.scale { position: sticky; top: 0; background: var(--bg); z-index: 2; height: 28px; }
.hours { position: relative; }
.hours span { position: absolute; transform: translateX(-50%); top: 5px; white-space: nowrap; }
.legend { gap: 14px; }
.told { position: sticky; bottom: 0; min-height: 96px; max-height: 40vh; overflow: auto; z-index: 2;
  padding: 8px 16px; margin-top: 24px; }

.graph { margin: 20px 0 0; padding: 2px 2px 10px; }
.graph > div { position: relative; }
.graph path { fill: none; stroke: var(--off); stroke-width: 1.5; }
.step { position: absolute; width: 160px; height: 40px; padding: 3px 10px; color: inherit;
  display: grid;
  line-height: 1.25; grid-template-columns: 16px minmax(0, 1fr); align-items: center;
  font-size: 13px; }
.step[aria-current] { border-color: var(--link); box-shadow: 0 0 0 1px var(--link); }
.step i { width: 9px; height: 9px; border-radius: 50%; background: var(--state); }
.step .quiet { grid-column: 2; font-size: 11.5px; }

.log { margin-top: 24px; }
.log .tools { margin-bottom: 8px; }
.log .tools [role=status] { flex: 1; font-size: 12.5px; }
.lines { height: max(60vh, 280px); overflow: auto; padding: 8px 0; }
.lines > p { padding: 0 16px; }
.line { display: grid; grid-template-columns: 6.5em minmax(0, 1fr); line-height: 1.55;
  padding: 0 16px 0 0; }
.line > span { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.line:hover { background: var(--hover); }
.at { user-select: none; text-align: right; padding-right: 14px; }
.line.err { box-shadow: inset 3px 0 var(--late); }
.line.error { box-shadow: inset 3px 0 var(--bad); color: var(--bad); }
.line.marked, mark { background: var(--mark); color: inherit; }
.bold { font-weight: 700; }
.c0, .c7, .c8, .c15 { color: var(--quiet); } .c1, .c9 { color: var(--bad); }
.c2, .c10 { color: var(--ok); } .c3, .c11 { color: var(--late); } .c4, .c12 { color: var(--on); }
.c5, .c13 { color: var(--lost); } .c6, .c14 { color: var(--link); }

dialog, .sign-in { color: inherit; padding: 20px 24px; width: min(34em, 92vw); }
dialog h2 { margin: 0 0 12px; font-size: 16px; }
dialog .actions { justify-content: flex-end; }
.sign-in { margin: 12vh auto 0; }
.editor textarea { padding: 12px 16px; white-space: pre; display: block; }
.errors li, .coming li { padding: 3px 0; }
.errors button { padding: 0 8px; font-family: var(--mono); font-size: 12px; }

@media (max-width: 1100px) {
  .jobs .row { grid-template-columns: minmax(9em, 2fr) 7.5em 124px 8.5em; }
  .jobs .schedule { display: none; }
}
@media (max-width: 760px) {
  #top { padding: 8px 12px; gap: 4px 10px; } nav a { padding: 4px 7px; }
  #who .quiet { display: none; }
  main { padding: 12px 12px 48px; }
  .tools { gap: 8px; } .tools .chips { flex: 1 1 100%; }
  .tools input[type=search], .tools .legend { flex: 1 1 100%; }
  .overview, .columns { display: block; }
  .overview > .side { position: static; height: 104px; display: flex; overflow-x: auto;
    margin-bottom: 12px; }
  .side section { flex: 0 0 85%; }
  .side ul { display: flex; gap: 8px; overflow-x: auto; }
  .side li { flex: 0 0 168px; height: 64px; border: 1px solid var(--line); border-radius: 8px;
    padding: 7px 10px; align-content: start; background: var(--panel); }
  .jobs .rows { --row: 92px; }
  .jobs .row { grid-template-columns: minmax(0, 1fr) auto; gap: 2px 12px; padding: 8px 0;
    grid-template-rows: auto 1fr; }
  .jobs .row .bars { grid-row: 2; grid-column: 1; justify-content: flex-start; }
  .jobs .row .last { grid-row: 2; grid-column: 2; width: 8.5em; }
  .jobs .row .next { grid-row: 1; grid-column: 2; text-align: right; align-self: start; }
  .job .rows { --row: 56px; }
  .job .row { grid-template-columns: minmax(0, 1fr) auto; gap: 0 12px; }
  .job .row > * { align-self: start; } .job .row .number { text-align: right; }
  .job .row .reason { display: none; } .log button { padding: 5px 9px; }
  .timeline .rows { --row: 56px; }
  .timeline .row { display: block; padding-top: 3px; } .scale .what { display: none; }
  .scale { display: block; } .hours span:nth-child(even) { display: none; }
  .line { grid-template-columns: 5.6em minmax(0, 1fr); }
  .at { font-size: 11px; padding-right: 8px; }
  .facts { grid-template-columns: repeat(2, minmax(0, 1fr)); }
}
@media (prefers-reduced-motion: reduce) {
  .progress::before { transition: none; }
}
"""

_SCRIPT = r"""
"use strict";

// Elements. Whatever comes from the server is text: it is set as text and never parsed. What would
// deceive a reader (controls, overrides of direction, invisible characters) is written out.

const HIDDEN =
  /[\0-\b\v-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;
const HANDLERS = ["onclick", "onsubmit", "oninput", "onchange", "onkeydown"];
const $ = (id) => document.getElementById(id);

function printable(value) {
  return String(value).replace(HIDDEN, (char) =>
    "\\u" + char.codePointAt(0).toString(16).padStart(4, "0"));
}

// h("p.quiet", {title: "…"}, children): attributes may be left out.
function h(name, ...children) {
  const [tag, ...classes] = name.split(".");
  const node = document.createElement(tag);
  if (classes.length) node.className = classes.join(" ");
  return fill(node, children);
}

const svg = (name, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", name), children);

function fill(node, children) {
  const given = children[0] && children[0].constructor === Object ? children.shift() : {};
  for (const [name, value] of Object.entries(given)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "style") Object.entries(value).forEach((item) => node.style.setProperty(...item));
    else if (name.startsWith("on")) node[name] = value;
    else node.setAttribute(name, value === true ? "" : printable(value));
  }
  const shown = children.flat(9).filter((child) => child || child === 0);
  node.append(...shown.map((child) => child instanceof Node ? child : printable(child)));
  return node;
}

const quiet = (...children) => h("span.quiet", ...children);
const bdi = (text) => h("bdi", text);

// Change a tree into another by as few steps as possible, so that focus, selection and place stay.
// A node with data-keep is left to whoever made it; its place is marked by `kept`.
function morph(node, wanted) {
  if (node.nodeType === Node.TEXT_NODE) {
    if (node.data !== wanted.data) node.data = wanted.data;
  } else if (!node.dataset.keep) {
    morphAttributes(node, wanted);
    morphChildren(node, wanted);
  }
}

const kept = (node) => node.isConnected ? node.cloneNode(false) : node;
const keyOf = (node) => node.dataset && (node.dataset.keep || node.dataset.key);

function morphChildren(node, wanted) {
  const keyed = new Map([...node.childNodes].map((child) => [keyOf(child), child]));
  let next = node.firstChild;
  const drop = () => {
    const gone = next;
    next = next.nextSibling;
    gone.remove();
  };
  for (const child of [...wanted.childNodes]) {
    const key = keyOf(child);
    const old = key ? keyed.get(key)
      : next && !keyOf(next) && next.nodeName === child.nodeName && next;
    if (old && old.parentNode === node) {
      while (next !== old) drop();
      next = old.nextSibling;
      morph(old, child);
    } else node.insertBefore(child, next);
  }
  while (next) drop();
}

function morphAttributes(node, wanted) {
  for (const {name, value} of wanted.attributes) {
    if (name !== "style" && node.getAttribute(name) !== value) node.setAttribute(name, value);
  }
  for (const {name} of [...node.attributes]) {
    if (name !== "style" && !wanted.hasAttribute(name)) node.removeAttribute(name);
  }
  if (node.style.cssText !== wanted.style.cssText) node.style.cssText = wanted.style.cssText;
  for (const name of HANDLERS) node[name] = wanted[name];
}

// Time and numbers, in words. Instants are the API's texts; inside they are seconds.

let skew = 0;                       // how far the server's clock is ahead of ours, in seconds
const now = () => Date.now() / 1000 + skew;
const seconds = (instant) => instant ? Date.parse(instant) / 1000 : null;
const instantOf = (at) => new Date(Math.round(at) * 1000).toISOString().slice(0, 19) + "Z";
const two = (number) => String(Math.floor(number)).padStart(2, "0");

function span(length, fine = true) {
  const s = Math.max(0, length);
  if (s < 1 && fine) return Math.round(s * 1000) + "ms";
  if (s < 10 && fine) return s.toFixed(1) + "s";
  if (s < 60) return Math.floor(s) + "s";
  if (s < 3600) return Math.floor(s / 60) + "m " + two(s % 60) + "s";
  if (s < 86400) return Math.floor(s / 3600) + "h " + two(s % 3600 / 60) + "m";
  return Math.floor(s / 86400) + "d " + Math.floor(s % 86400 / 3600) + "h";
}

function away(at) {
  const left = at - now();
  if (left >= 1) return "in " + span(left, false);
  const past = -left;
  if (past < 1) return "now";
  const [size, unit] = past < 60 ? [1, "s"] : past < 3600 ? [60, "m"]
    : past < 86400 ? [3600, "h"] : [86400, "d"];
  return Math.floor(past / size) + unit + " ago";
}

const DAY = new Intl.DateTimeFormat(undefined, {weekday: "short", day: "numeric", month: "short"});
const today = (at) => DAY.format(at * 1000) === DAY.format(now() * 1000);

const clock = (at) => new Date(at * 1000).toTimeString().slice(0, 8);
const moment = (at) => (today(at) ? "" : DAY.format(at * 1000) + " ") + clock(at);

function size(bytes) {
  let unit = 0;
  for (; bytes >= 1024 && unit < 4; unit++) bytes /= 1024;
  return (unit && bytes < 100 ? bytes.toFixed(1) : Math.round(bytes)) + " "
    + ["B", "KiB", "MiB", "GiB", "TiB"][unit];
}

const many = (count, one) => count + " " + one + (count === 1 ? "" : "s");

// What changes by itself, once a second: a function of seconds for each kind of data-live.
const LIVE = {
  away,
  elapsed: (at) => span(now() - at, false),
  left: (at) => at > now() ? "about " + span(at - now(), false) + " left"
    : span(now() - at, false) + " longer than usual",
};

function tick() {
  if (document.hidden) return;
  for (const node of document.querySelectorAll("[data-live]")) {
    const text = LIVE[node.dataset.live](Number(node.dataset.at));
    if (node.firstChild.data !== text) node.firstChild.data = text;
  }
  for (const node of document.querySelectorAll("[data-begin]")) {
    node.style.setProperty("--done", doneOf(node.dataset));
  }
}

const doneOf = ({begin, end}) =>
  Math.min(1, Math.max(0, (now() - begin) / Math.max(0.001, end - begin))).toFixed(3);

const live = (kind, at) => h("span", {"data-live": kind, "data-at": at}, LIVE[kind](at));

const timeOf = (instant, text) => h("time", {datetime: instant,
  title: new Date(instant) + " · " + instant}, text);
const when = (instant, kind = "away") =>
  instant ? timeOf(instant, live(kind, seconds(instant))) : quiet("–");
const exactly = (instant) => instant ? timeOf(instant, moment(seconds(instant))) : null;

// The API.

class Failure extends Error {
  constructor(status, error) {
    super(error.message || "the server answers " + status);
    Object.assign(this, {status, errors: error.errors || []});
  }
}

const TOKEN = "roexec-token";
const parameters = (values) => {
  const given = Object.entries(values).filter(([, value]) => value || value === 0);
  return given.length ? "?" + new URLSearchParams(given) : "";
};

async function send(target, {headers, ...options} = {}) {
  const token = sessionStorage.getItem(TOKEN);
  const response = await fetch("api/v1/" + target, {
    credentials: "omit", ...options,
    headers: {...headers, ...(token ? {Authorization: "Bearer " + token} : {})},
  });
  if (response.ok) return response;
  let error = {};
  try {
    error = (await response.json()).error;
  } catch (unreadable) { /* what is in front of the server has answered */ }
  if (response.status === 401 && model.me) leave();
  throw new Failure(response.status, error);
}

const ask = async (target, options) => (await send(target, options)).json();
const post = (target, body) => ask(target, {method: "POST",
  body: typeof body === "string" ? body : JSON.stringify(body)});
const jobPath = (id) => "jobs/" + encodeURIComponent(id);
const runPath = (id) => "runs/" + encodeURIComponent(id);

// Server-sent events of a response: {type, id, data}; some are an id alone.
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = [], event = {type: "message", data: ""};
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    rest.push(value);
    if (!value.includes("\n")) continue;       // of a very long line
    const lines = rest.join("").split("\n");
    rest = [lines.pop()];
    for (const line of lines) {
      const field = line.slice(0, line.indexOf(":")), text = line.slice(field.length + 2);
      if (line === "") {
        yield {...event, data: event.data && JSON.parse(event.data)};
        event = {type: "message", id: event.id, data: ""};
      } else if (field === "event") event.type = text;
      else if (field === "id") event.id = text;
      else if (field === "data") event.data += text;
    }
  }
}

// What is known, and how it stays true: lists once, then the server's events.

const FAILED = ["failed", "timed_out", "lost"];
const isBad = (run) => FAILED.includes(run.state);
const isOver = (run) => !["queued", "running"].includes(run.state);
const model = {me: null, jobs: new Map(), order: [], complete: false, active: new Map(),
  failed: [], stale: new Set()};
const can = (scope) => Boolean(model.me) && [scope, "*"].some((one) =>
  model.me.scopes.includes(one));

function takeJob(job) {
  model.jobs.set(job.id, {...model.jobs.get(job.id), ...job});
  model.stale.delete(job.id);
}

function takeRun(run) {
  if (!run.step) {
    if (isOver(run)) model.active.delete(run.id);
    else model.active.set(run.id, run);
    model.failed = model.failed.filter((other) => other.id !== run.id);
    if (isBad(run)) model.failed = [run, ...model.failed].slice(0, 30);
    const id = run.job_id, last_run = run;
    if (model.jobs.has(id) && run.finished_at && run.state !== "skipped") takeJob({id, last_run});
    model.stale.add(id);
  }
  if (view && view.took) view.took(run);
  changed();
}

async function loadJobs() {
  const seen = new Set();
  let cursor = null;
  do {
    const page = await ask("jobs" + parameters({brief: 1, limit: cursor ? 500 : 40, cursor}));
    page.jobs.forEach((job) => (seen.add(job.id), takeJob(job)));
    cursor = page.next;
    changed();
  } while (cursor);
  for (const id of model.jobs.keys()) if (!seen.has(id)) forget(id);
  model.complete = true;
  changed();
}

const reloadJobs = atMostEach(1000, () => doing(loadJobs()));

async function loadRuns() {
  const [active, failed] = await Promise.all([
    ask("runs" + parameters({state: "active", limit: 500})),
    ask("runs" + parameters({state: FAILED.join(), limit: 20}))]);
  model.active = new Map(active.runs.map((run) => [run.id, run]));
  model.failed = failed.runs;
  changed();
}

const pause = (length) => new Promise((done) => setTimeout(done, length));
const stream = {last: null, stop: null};

// A hidden tab keeps no connection: a browser has six for all tabs of one server.
async function follow() {
  for (;;) {
    while (document.hidden || !can("run:list")) await pause(200);
    stream.stop = new AbortController();
    try {
      await listen();
    } catch (error) { /* it is tried again */ }
    $("live").textContent = document.hidden ? "" : "reconnecting …";
    await pause(document.hidden ? 0 : 2000);
  }
}

async function listen() {
  const response = await send("events", {signal: stream.stop.signal,
    headers: stream.last ? {"Last-Event-ID": stream.last} : {}});
  $("live").textContent = "live";
  doing(loadRuns());
  for await (const event of eventsOf(response)) {
    stream.last = event.id || stream.last;
    if (event.type === "run") takeRun(event.data);
    else if (event.type === "job") takeJobEvent(event.data);
    else if (event.type === "reset") reloadJobs();
  }
}

function forget(id) {
  model.jobs.delete(id);
  model.order = [];
}

function takeJobEvent({id, deleted}) {
  if (deleted) forget(id);
  else if (model.jobs.has(id)) model.stale.add(id);
  else reloadJobs();
  if (view && view.tookJob) view.tookJob(id);
  changed();
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden && stream.stop) stream.stop.abort();
  if (view && view.seen) view.seen(!document.hidden);
  tick();
});

// Draw soon, but ten times a second at most, and a fifth of the time at most.
let waiting = 0, next = 0;
function changed() {
  waiting = waiting || setTimeout(() => {
    const start = performance.now();
    waiting = 0;
    draw();
    next = performance.now() + Math.max(100, 4 * (performance.now() - start));
  }, Math.max(0, next - performance.now()));
}

// Views: functions of (argument, query) that give {title, render()} and, where they need it,
// turned(query), took(run), tookJob(id), placed(), seen(whether), stop(). Their place is the
// address: #/run/ID.

let view = null, where = "";

function parseAddress() {
  const [place, query] = location.hash.slice(1).split("?");
  const [, name, argument] = place.split("/");
  let decoded = "";
  try {
    decoded = decodeURIComponent(argument || "");
  } catch (malformed) { /* then it is none of ours */ }
  return {name: VIEWS[name] ? name : "overview", argument: decoded,
    query: Object.fromEntries(new URLSearchParams(query))};
}

function address(name, argument, query) {
  return "#/" + (name === "overview" ? "" : name)
    + (argument ? "/" + encodeURIComponent(argument) : "") + parameters(query || {});
}

const places = new Map();           // address -> how far it was scrolled

function openView() {
  if (!model.me) return;
  const {name, argument, query} = parseAddress();
  if (view && where === name + "/" + argument) {
    if (view.turned) view.turned(query);
    return draw();
  }
  if (view && view.stop) view.stop();
  const first = where === "";
  where = name + "/" + argument;
  view = VIEWS[name](argument, query);
  for (const link of document.querySelectorAll("nav [data-view]")) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  $("main").replaceChildren(h("section"));
  draw();
  scrollTo(0, places.get(location.hash) || 0);
  if (!first) $("main").focus({preventScroll: true});
}

function draw() {
  if (!view || !$("main").firstElementChild) return;
  morph($("main").firstElementChild, view.render());
  document.title = printable(view.title) + " · roexec";
  if (view.placed) view.placed();
}

// Keep something of a view in the address, without a new step in the history.
function keepInAddress(values) {
  const {name, argument, query} = parseAddress();
  history.replaceState(null, "", address(name, argument, {...query, ...values}));
  if (view.turned) view.turned({...query, ...values});
  draw();
}

function say(text) {
  $("said").replaceChildren(h("p", text));
  clearTimeout(say.timer);
  say.timer = setTimeout(() => $("said").replaceChildren(), 8000);
}

// What a promise gives, else null, and the person is told why.
async function doing(promise, done) {
  try {
    const result = await promise;
    if (done) say(done);
    return result;
  } catch (error) {
    say(error.message);
    return null;
  }
}

const button = (text, onclick, attributes) =>
  h("button", {type: "button", onclick, ...attributes}, text);

// Parts that views share.

const stateWord = (state) => state.replace("_", " ");
const badge = (state) => h("span.badge." + state, stateWord(state));
const blank = (trouble) => h("section", h("p.empty", trouble ? trouble.message : "Loading …"));
const link = (name, argument, text = argument, attributes = {}) =>
  h("a", {href: address(name, argument), ...attributes}, bdi(text));
const tagLinks = (job) => job.tags.map((tag) =>
  h("a.tag", {tabindex: -1, href: address("overview", "", {tag})}, bdi(tag)));
const beginOf = (run) => run.started_at || run.slot || run.queued_at;

function reasonOf(run) {
  const told = run.signal || (run.exit_code ? "exit " + run.exit_code : run.reason);
  return [told, run.message].filter(Boolean).join(": ");
}

function progress(run, usual) {
  const begin = seconds(run.started_at);
  if (begin === null || !usual) return h("div.progress");
  const end = begin + usual;
  return h("div.progress", {"data-begin": begin, "data-end": end,
    style: {"--done": doneOf({begin, end})}});
}

function eta(run, usual) {
  if (!run.started_at) return ["queued ", when(run.queued_at)];
  return [when(run.started_at, "elapsed"), usual
    ? [" · ", live("left", seconds(run.started_at) + usual)] : null];
}

// Bars of runs, oldest first: height is duration, colour is outcome.
function bars(runs, count) {
  const shown = runs.slice(0, count).reverse();
  const longest = Math.max(0.001, ...shown.map((run) => run.duration || 0));
  const bad = shown.filter((run) => isBad(run)).length;
  return h("div.bars", {role: "img", "aria-label": "the last " + many(shown.length, "run")
    + (bad ? ", " + bad + " of them failed" : "")},
  shown.map((run) => mark(run, {"--high": run.duration === null ? 0.3
    : (0.2 + 0.8 * Math.sqrt(run.duration / longest)).toFixed(2)})));
}

// A run in a picture.
const mark = (run, style) => h("a", {class: run.state, href: address("run", run.id), tabindex: -1,
  title: [stateWord(run.state), run.duration !== null && span(run.duration),
    moment(seconds(beginOf(run)))].filter(Boolean).join(" · "), style});

// A list of any length, of which only the rows in view exist. Their height is --row. A row is drawn
// again when what `facts` gives for its item is no longer the same.
class Rows {
  constructor(label, drawRow, facts = (item) => [item]) {
    Object.assign(this, {drawRow, facts, items: [], shown: new Map()});
    this.node = h("div.rows", {role: "list", "aria-label": label, "data-keep": label});
  }

  window() {
    const height = parseFloat(getComputedStyle(this.node).getPropertyValue("--row"));
    const top = this.node.getBoundingClientRect().top;
    const first = Math.max(0, Math.floor(-top / height) - 8);
    const last = Math.min(this.items.length, Math.ceil((innerHeight - top) / height) + 8);
    return {height, first, last: Math.max(first, last)};
  }

  place() {
    const {height, first, last} = this.window();
    this.node.style.height = this.items.length * height + "px";
    const wanted = new Map();
    for (let at = first; at < last; at++) wanted.set(this.items[at].id, at);
    for (const [key, row] of this.shown) {
      if (wanted.has(key) || row.contains(document.activeElement)) continue;
      row.remove();
      this.shown.delete(key);
    }
    let next = this.node.firstChild;
    for (const [key, at] of wanted) {
      this.drawAt(key, at);
      const row = this.shown.get(key);
      row.style.transform = `translateY(${at * height}px)`;
      if (row === next) next = next.nextSibling;
      else this.node.insertBefore(row, next);
    }
  }

  drawAt(key, at) {
    const old = this.shown.get(key), facts = [at, ...this.facts(this.items[at])];
    if (old && old.facts.every((fact, index) => fact === facts[index])) return;
    const row = h("div.row", {role: "listitem", "aria-posinset": at + 1,
      "aria-setsize": this.items.length}, this.drawRow(this.items[at]));
    if (old) morph(old, row);
    else this.shown.set(key, row);
    (old || row).facts = facts;
  }
}

// Ask for what the rows in view lack, one request at a time.
function filler(rows, lacks, fetchFor) {
  let busy = false;
  return async function look() {
    const {first, last} = rows.window();
    const wanted = busy ? [] : rows.items.slice(first, last).filter(lacks).slice(0, 40);
    if (!wanted.length) return;
    busy = true;
    try {
      await fetchFor(wanted);
    } catch (error) {
      say(error.message);
      await pause(5000);
    }
    await pause(300);
    busy = false;
    draw();
  };
}

// Overview: every job, what runs now, what failed lately.

const KINDS = {
  all: () => true,
  running: (job, active) => active.has(job.id),
  failing: (job) => Boolean(job.last_run) && isBad(job.last_run),
  paused: (job) => job.paused || !job.enabled,
  manual: (job) => !job.schedule.length,
};

// The jobs that the address asks for, by words and by tag.
function matching({q, tag}) {
  const words = (q || "").toLowerCase().split(/\s+/);
  if (model.order.length !== model.jobs.size) model.order = [...model.jobs.keys()].sort();
  return model.order.map((id) => model.jobs.get(id)).filter((job) => {
    if (!q && !tag) return true;
    const all = [job.id, job.name, ...job.tags, ...job.words].join(" ").toLowerCase();
    return words.every((word) => all.includes(word)) && (!tag || job.tags.includes(tag));
  });
}

function searchField(query) {
  return h("input", {type: "search", id: "search", placeholder: "Search jobs  ( / )",
    "aria-label": "Search jobs", value: query.q || "", autocomplete: "off", spellcheck: "false",
    oninput: (event) => keepInAddress({q: event.target.value})});
}

function activeByJob() {
  const found = new Map();
  for (const run of model.active.values()) {
    const other = found.get(run.job_id);
    if (!other || run.state === "running") found.set(run.job_id, run);
  }
  return found;
}

function overview(_, query) {
  let active = new Map();
  const rows = new Rows("Jobs", (job) => jobRow(job, active.get(job.id)),
    (job) => [job, active.get(job.id)]);
  const look = filler(rows, (job) => !job.recent || model.stale.has(job.id),
    (jobs) => fetchRecent(jobs, {limit: 20}));

  function render() {
    active = activeByJob();
    const found = matching(query), kind = KINDS[query.state] ? query.state : "all";
    rows.items = found.filter((job) => KINDS[kind](job, active));
    const chip = (name) => h("a.chip", {href: address("overview", "",
      {...query, state: name === "all" ? "" : name}),
    "aria-current": name === kind && "true"}, name[0].toUpperCase() + name.slice(1) + " ",
    h("span.count", found.filter((job) => KINDS[name](job, active)).length));
    return h("section.overview",
      h("h1.hidden", "Overview"),
      h("div.tools", searchField(query),
        h("div.chips", Object.keys(KINDS).map(chip),
          query.tag && h("a.chip", {"aria-current": "true",
            href: address("overview", "", {...query, tag: ""})}, query.tag + " ×"))),
      can("run:list") && h("div.side", runningNow(), failedLately()),
      h("div.jobs", !rows.items.length && h("p.empty",
        model.complete ? "No such job." : "Loading …"),
      kept(rows.node)));
  }

  function turned(values) {
    query = values;
    const field = $("search");
    if (field && field !== document.activeElement) field.value = query.q || "";
  }

  return {title: "Overview", render, turned, placed() { rows.place(); look(); }};
}

function jobRow(job, run) {
  const state = run ? run.state : job.paused ? "paused" : job.enabled ? "" : "disabled";
  const last = job.last_run;
  return [
    h("div.what", link("job", job.id, job.id, {class: "name"}),
      quiet(job.name && job.name !== job.id ? job.name : ""), tagLinks(job)),
    h("div.schedule", job.schedule.length ? job.words.join(", ")
      : "by hand"),
    h("div.next", state === "paused" || state === "disabled" ? badge(state)
      : job.schedule.length ? when(job.next_run) : quiet("–")),
    bars(job.recent || [], 20),
    h("div.last", run && run.state === "running"
      ? [badge("running"), when(run.started_at, "elapsed"), progress(run, job.usual)]
      : run ? [badge("queued"), when(run.queued_at)]
        : last ? [badge(last.state), when(last.finished_at || last.started_at)]
          : quiet("never ran"))];
}

function runningNow() {
  const runs = [...model.active.values()].sort((a, b) =>
    (a.state === "queued") - (b.state === "queued") || (beginOf(a) < beginOf(b) ? -1 : 1));
  return sideList("Now", runs, "Nothing runs.", (run) => {
    const usual = (model.jobs.get(run.job_id) || {}).usual;
    return [quiet(eta(run, usual)), progress(run, usual)];
  });
}

const failedLately = () => sideList("Failed lately", model.failed, "Nothing failed.", (run) =>
  [quiet(when(run.finished_at || run.queued_at), " · ", reasonOf(run) || stateWord(run.state))]);

function sideList(title, runs, none, drawRun) {
  return h("section", {"aria-label": title}, h("h2", title, " ", h("span.count", runs.length)),
    h("ul", runs.slice(0, 50).map((run) => h("li", {"data-key": run.id, class: run.state},
      link("run", run.id, run.job_id), drawRun(run))), !runs.length && h("li.quiet", none)));
}

async function fetchRecent(jobs, options) {
  const ids = jobs.map((job) => job.id).join();
  const [found, history] = await Promise.all([
    ask("jobs" + parameters({ids, brief: 1, limit: 100})),
    can("run:list") ? ask("history" + parameters({jobs: ids, ...options})) : {jobs: {}}]);
  found.jobs.forEach(takeJob);
  for (const {id} of jobs) {
    model.stale.delete(id);
    const job = model.jobs.get(id);
    if (job) Object.assign(job, {recent: (history.jobs[id] || {runs: []}).runs});
  }
}

// Timeline: the hours before and after now; a click or the arrow keys tell what a slot became.

function timeline(_, query) {
  const known = new Map();          // job id -> {items}, and since and until when all are there
  const rows = new Rows("Timeline of jobs", timelineRow, (job) => [known.get(job.id),
    chosen.job === job.id && chosen, Math.floor(now() / 30), rows.node.clientWidth]);
  let chosen = {}, told = [h("p.quiet",
    "Choose a run or a slot; what did not run is explained.")];
  const hours = () => Number(query.hours) || 24;
  const range = () => ({from: now() - hours() * 3600, to: now() + hours() * 3600});
  const look = filler(rows, (job) => !known.has(job.id) || model.stale.has(job.id), fetchLines);
  const timer = setInterval(draw, 30000);

  async function fetchLines(jobs) {
    const {from, to} = range(), ids = jobs.map((job) => job.id).join();
    const [history, coming] = await Promise.all([
      can("run:list") ? ask("history" + parameters({jobs: ids, since: instantOf(from), limit: 400}))
        : {jobs: {}},
      ask("next" + parameters({jobs: ids, from: instantOf(now()), to: instantOf(to), each: 200}))]);
    for (const {id} of jobs) {
      const past = history.jobs[id] || {runs: [], more: false};
      const future = coming.slots.filter((slot) => slot.job_id === id);
      model.stale.delete(id);
      known.set(id, {items: itemsOf(past.runs, future),
        since: past.more ? seconds(past.runs[past.runs.length - 1].queued_at) : 0,
        until: coming.cut.includes(id) ? seconds(future[future.length - 1].slot) : Infinity});
    }
  }

  function timelineRow(job) {
    const line = known.get(job.id) || {items: []};
    const at = chosen.job === job.id ? chosen.at : null;
    return [
      h("div.what", link("job", job.id, job.id, {class: "name"})),
      h("div.track", {tabindex: 0, role: "slider", "aria-label": "Timeline of " + job.id,
        "aria-valuemax": Math.max(0, line.items.length - 1),
        "aria-valuenow": Math.max(0, line.items.indexOf(chosen.item)),
        "aria-valuetext": chosen.job === job.id && chosen.item ? describe(chosen.item)
          : line.items.length + " runs and slots",
        onclick: (event) => point(job, line, event), onkeydown: (event) => step(job, line, event)},
      drawLine(line, range(), rows.node.clientWidth, at))];
  }

  function point(job, line, event) {
    const box = event.currentTarget.getBoundingClientRect(), {from, to} = range();
    const at = from + (event.clientX - box.left) / box.width * (to - from);
    const near = (to - from) / box.width * 6;
    const fits = line.items.filter((item) => at >= item.begin - near && at <= item.end + near);
    const item = fits.sort((a, b) => Math.abs(a.begin + a.end - 2 * at)
      - Math.abs(b.begin + b.end - 2 * at))[0];
    choose(job, item, item && item.count < 2 ? item.begin : Math.round(at));
  }

  function step(job, line, event) {
    const by = {ArrowRight: 1, ArrowLeft: -1, Home: -1e9, End: 1e9}[event.key];
    if (event.key === "Enter" && chosen.item && chosen.item.run) {
      location.hash = address("run", chosen.item.run.id);
    } else if (by && line.items.length) {
      event.preventDefault();
      const here = chosen.job === job.id ? line.items.indexOf(chosen.item) : -1;
      const start = here < 0 ? line.items.findIndex((item) => item.end > now()) : here + by;
      const item = line.items[Math.min(line.items.length - 1, Math.max(0, start))];
      choose(job, item, item.begin);
    }
  }

  async function choose(job, item, at) {
    chosen = {job: job.id, item, at};
    const head = h("p", link("job", job.id), " ", item ? describe(item) : moment(at), " ",
      item && item.run && h("a", {href: address("run", item.run.id)}, "Open the run"));
    told = [head];
    draw();
    if (item && item.run && item.run.state !== "skipped") return;
    const mine = chosen;
    const said = await doing(ask(jobPath(job.id) + "/why"
      + parameters({at: instantOf(item && item.count < 2 ? item.slot : at)})));
    if (said && mine === chosen) {
      told = [head, said.answers.map((answer) => answer.why.map(({text}) => h("p", text.replace(
        /\d{4}-\d\d-\d\dT[\d:.]+Z/g, (instant) => moment(seconds(instant))))))];
      draw();
    }
  }

  function render() {
    rows.items = matching(query);
    const {from, to} = range();
    const zoom = (value) => h("a.chip", {"aria-current": value === hours() && "true",
      href: address("timeline", "", {...query, hours: value === 24 ? "" : value})}, value + " h");
    return h("section.timeline",
      h("h1.hidden", "Timeline"),
      h("div.tools", searchField(query),
        h("div.chips", [6, 24, 72].map(zoom)), legend()),
      h("div.scale", {"aria-hidden": "true"}, h("div.what"),
        h("div.hours", hourMarks(from, to))),
      !rows.items.length && h("p.empty", "No such job."),
      kept(rows.node),
      h("div.told", {role: "region", "aria-label": "Explanation", "aria-live": "polite"},
        told));
  }

  return {title: "Timeline", render, turned(values) {
    if (values.hours !== query.hours) known.clear();
    query = values;
  }, placed() { rows.place(); look(); },
  stop: () => clearInterval(timer)};
}

const legend = () => h("div.legend", {"aria-hidden": "true"},
  ["succeeded", "failed", "timed_out", "running", "skipped"].map(badge));

// What a line of the timeline shows, in order: {begin, end, state, slot, count, run}.
function itemsOf(runs, slots) {
  const items = runs.map((run) => {
    const begin = seconds(beginOf(run));
    const until = run.state === "skipped" ? seconds(run.last_slot) : seconds(run.finished_at);
    return {begin, end: until || (isOver(run) ? begin : now()), state: run.state,
      slot: seconds(run.slot), count: run.count || 1, run};
  });
  for (const slot of slots) {
    const at = seconds(slot.slot);
    items.push({begin: at, end: at, state: "slot", slot: at, count: 1, note: slot.mark});
  }
  return items.sort((a, b) => a.begin - b.begin);
}

function describe(item) {
  const {run, note} = item;
  if (!run) return "due " + moment(item.begin) + (note ? ", " + note : "");
  return stateWord(run.state) + " " + moment(item.begin)
    + (item.count > 1 ? " to " + moment(item.end) + ", " + item.count + " slots" : "")
    + (run.duration ? ", took " + span(run.duration) : "")
    + (run.reason ? ", reason: " + run.reason : "");
}

// One path for each state: a line with hundreds of runs costs as much as one with a few.
function drawLine({items, since, until}, {from, to}, width, at) {
  const x = (instant) => Math.round((instant - from) / (to - from) * 10000) / 10;
  const pixel = 1000 / Math.max(200, width);
  const paths = {}, lanes = [];
  let lastSlot = -10;
  for (const item of items) {
    if (item.end < from || item.begin > to) continue;
    const begin = Math.max(0, x(item.begin));
    const end = Math.max(begin + 3 * pixel, x(item.state === "running" ? now() : item.end));
    const draw = (text) => { paths[item.state] = (paths[item.state] || "") + text; };
    if (item.state === "slot") {
      if (begin - lastSlot < 3 * pixel) continue;
      draw(`M${begin} 11h${1.5 * pixel}v10h${-1.5 * pixel}z`);
      lastSlot = begin;
    } else {
      let lane = lanes.findIndex((busy) => busy <= item.begin);
      lane = Math.min(2, lane < 0 ? lanes.length : lane);
      lanes[lane] = item.end;
      draw(`M${begin} ${5 + lane * 8}h${end - begin}v${lane ? 6 : 22 - Math.min(2,
        lanes.length - 1) * 8}h${begin - end}z`);
    }
  }
  const line = (name, position) => svg("line", {class: name, x1: position, x2: position, y1: 0,
    y2: 32, "vector-effect": "non-scaling-stroke"});
  return svg("svg", {viewBox: "0 0 1000 32", preserveAspectRatio: "none", "aria-hidden": "true"},
    since > from && svg("rect", {class: "unknown", width: x(since), height: 32}),
    until < to && svg("rect", {class: "unknown", x: x(until), width: 1000, height: 32}),
    Object.entries(paths).map(([state, d]) => svg("path", {class: state, d})),
    line("now", 500), at && line("chosen", x(at)));
}

function hourMarks(from, to) {
  const step = [1, 2, 3, 6, 12, 24].find((hours) => (to - from) / 3600 / hours <= 12) * 3600;
  const zone = new Date().getTimezoneOffset() * 60, marks = [];
  for (let at = Math.ceil((from - zone) / step) * step + zone; at < to; at += step) {
    const text = clock(at).slice(0, 5);
    marks.push(h("span", {style: {left: (at - from) / (to - from) * 100 + "%"}},
      text === "00:00" ? DAY.format(at * 1000) : text));
  }
  return marks;
}

// Job: its definition, its history, its controls.

function job(id, query) {
  let found = null, trouble = null, runs = [], cursor = "", slots = [], file, loading = false;
  const rows = new Rows("Runs of " + id, runRow);

  async function load() {
    try {
      [found, {slots}, file] = await Promise.all([ask(jobPath(id)),
        ask(jobPath(id) + "/next?count=8"), can("job:write") && exported(id)]);
      trouble = null;
    } catch (error) {
      trouble = error;
    }
    changed();
  }

  async function loadMore() {
    if (loading || cursor === null || !can("run:list")) return;
    loading = true;
    const page = await doing(ask("runs" + parameters({job: id, limit: runs.length ? 500 : 100,
      cursor})));
    loading = false;
    if (!page) return;
    const have = new Set(runs.map((run) => run.id));
    runs = [...runs, ...page.runs.filter((run) => !have.has(run.id))];
    cursor = page.next;
    changed();
  }

  function took(run) {
    if (run.job_id !== id || run.step) return;
    const at = runs.findIndex((other) => other.id === run.id);
    if (at >= 0) runs[at] = {...runs[at], ...run};
    else runs = [run, ...runs];
    refresh();
  }

  const refresh = atMostEach(1000, load);

  function render() {
    if (!found) return blank(trouble);
    const ended = runs.filter((run) => isOver(run) && run.state !== "skipped");
    const good = ended.filter((run) => run.state === "succeeded").length;
    const active = runs.filter((run) => !isOver(run));
    rows.items = runs;
    return h("section.job",
      h("div.head",
        h("h1", bdi(id), " ", active.length ? badge(active[0].state)
          : found.paused ? badge("paused") : found.enabled ? null : badge("disabled")),
        h("div.actions", jobActions())),
      found.name && found.name !== id && h("p", found.name),
      found.spec.description && h("p.text", found.spec.description),
      h("dl.facts",
        fact("Schedule", found.schedule.length ? found.schedule.map((text, at) =>
          h("div", found.words[at] || text, " ", h("code", text))) : "by hand"),
        fact("Next run", when(found.next_run), " ", quiet(exactly(found.next_run))),
        found.paused_until && fact("Paused until", exactly(found.paused_until)),
        fact("Succeeded", ended.length ? [Math.round(good / ended.length * 1000) / 10 + " %",
          quiet(" of " + many(ended.length, "run"))] : "–"),
        fact("Takes usually", found.usual ? span(found.usual) : "–"),
        fact("Time zone", found.timezone), fact("Source", found.source),
        found.tags.length > 0 && fact("Tags", tagLinks(found))),
      h("div.columns",
        h("section", h("h2", "Durations"), plot(ended.slice(0, 200).reverse())),
        h("section.coming", h("h2", "Next"), slots.length ? h("ol",
          slots.map((slot) => h("li", exactly(slot.slot), " ",
            quiet(when(slot.slot), slot.mark && " · " + slot.mark))))
          : h("p.quiet", "No schedule."))),
      h("h2", "Definition"),
      h("pre.code", {tabindex: 0, "aria-label": "Definition"},
        file || JSON.stringify(found.spec, null, 2)),
      h("h2", "History"),
      !runs.length && h("p.quiet", "It never ran."),
      kept(rows.node));
  }

  function jobActions() {
    const [word, told] = found.paused ? ["Resume", "The job is resumed."]
      : ["Pause", "The job is paused: its slots are skipped."];
    return [
      can("run:create") && button("Run …", () => runDialog(found), {class: "main"}),
      can("job:pause") && button(word, () =>
        doing(post(jobPath(id) + "/" + word.toLowerCase()), told).then(load)),
      can("job:write") && h("a.button", {href: address("files", "", {job: id})}, "Edit")];
  }

  load();
  loadMore();
  return {title: id, render, took, tookJob: (other) => { if (other === id) refresh(); }, placed() {
    if (!found) return;
    rows.place();
    if (rows.window().last > runs.length - 20) loadMore();
  }};
}

const exported = async (id) => (await send("export" + parameters({jobs: id}))).text();

function runRow(run) {
  return [
    h("div.what", link("run", run.id, run.id, {class: "name mono"}), quiet(run.trigger)),
    h("div", badge(run.state)),
    h("div", exactly(beginOf(run)), run.count > 1 && quiet(" … ", many(run.count, "slot"))),
    h("div.number", run.state === "running" ? when(run.started_at, "elapsed")
      : run.duration === null ? "–" : span(run.duration)),
    h("div.quiet.reason", reasonOf(run))];
}

const fact = (label, ...value) => h("div", h("dt", label), h("dd", ...value));

function atMostEach(length, action) {
  let timer = 0;
  return () => {
    timer = timer || setTimeout(() => {
      timer = 0;
      action();
    }, length);
  };
}

// Durations over time: a dot for each run, at its place in time, linked to it.
function plot(runs) {
  const timed = runs.filter((run) => run.duration !== null);
  if (!timed.length) return h("p.quiet.plot", "No runs have ended yet.");
  const longest = Math.max(0.001, ...timed.map((run) => run.duration));
  const first = seconds(beginOf(timed[0])), last = seconds(beginOf(timed[timed.length - 1]));
  const placeOf = (run) => ({bottom: run.duration / longest * 100 + "%",
    left: (seconds(beginOf(run)) - first) / Math.max(1, last - first) * 100 + "%"});
  return h("div.plot", {role: "img", "aria-label": many(timed.length, "run") + ", up to "
    + span(longest)},
  h("span.top", span(longest)), h("span.from", moment(first)), h("span.to", moment(last)),
  h("div", timed.map((run) => mark(run, placeOf(run)))));
}

// A form for a run: what the job declares, and more for those who may define jobs. A retry asks for
// secrets alone, which nobody has kept.

const secretsOf = (found) => Object.entries(found.spec.params || {}).filter(([, param]) =>
  param && param.secret);

function runDialog(found, target = jobPath(found.id) + "/run", again = null) {
  const declared = again ? secretsOf(found) : Object.entries(found.spec.params || {});
  const names = again ? [] : Object.keys(found.spec.env || {});
  const fields = [
    ...declared.map(([name, param]) => paramField(name, param)),
    names.length > 0 && h("details", {open: !declared.length}, h("summary", "Variables"),
      names.map((name) => textField(name, {placeholder: found.spec.env[name] || ""}))),
    !again && can("job:write") && h("label", "More variables, NAME=value on a line each",
      h("textarea", {rows: 2, spellcheck: "false"}))];
  const failure = h("p.failure", {role: "alert"});
  const form = h("form", {onsubmit: async (event) => {
    event.preventDefault();
    try {
      const run = await post(target, {...givenBy(form), ...again});
      $("dialog").close();
      location.hash = address("run", run.id);
    } catch (error) {
      failure.textContent = printable(error.message);
    }
  }},
  h("h2", {id: "dialog-title"}, again ? "Retry " : "Run ", bdi(found.id)), fields, failure,
  h("div.actions", button("Close", () => $("dialog").close()),
    h("button.main", "Run")));
  $("dialog").replaceChildren(form);
  $("dialog").showModal();
}

function paramField(name, param) {
  const declared = param && typeof param === "object" ? param : {default: param};
  const initial = declared.default, required = initial === undefined;
  const values = declared.values || (declared.type === "boolean" && ["true", "false"]);
  const text = [bdi(name), declared.description && quiet(" ", declared.description)];
  if (!values) {
    return textField(name, {placeholder: initial, required,
      type: declared.secret ? "password" : "text"}, text);
  }
  return h("label", text, h("select", {name, required},
    required && h("option", {value: ""}, "–"), values.map((value) =>
      h("option", {value, selected: String(value) === String(initial)}, String(value)))));
}

function textField(name, attributes, text) {
  return h("label", text || bdi(name), h("input", {name, type: "text", autocomplete: "off",
    spellcheck: "false", ...attributes}));
}

function givenBy(form) {
  const env = {};
  for (const field of form.elements) if (field.name && field.value) env[field.name] = field.value;
  for (const line of (form.querySelector("textarea") || {value: ""}).value.split("\n")) {
    const at = line.indexOf("=");
    if (at > 0) env[line.slice(0, at).trim()] = line.slice(at + 1);
  }
  return {env};
}

// Run: what happened, the steps of a pipeline, the log.

function run(id, query) {
  let found = null, trouble = null, parent = null, definition, log, lively = false;
  let pipeline = {steps: [], graph: {}};

  async function load() {
    try {
      found = await ask(runPath(id));
      parent = found.parent ? await ask(runPath(found.parent)) : null;
      pipeline = await ask(runPath(found.parent || id) + "/steps");
      definition = definition || await jobOf(found.job_id);
      trouble = null;
    } catch (error) {
      trouble = error;
    }
    const first = found && !log && can("log:read");
    if (first) log = new LogView(found, query.at);
    draw();
    if (first) log.open();
  }

  const refresh = atMostEach(500, load);

  function render() {
    if (!found) return blank(trouble);
    const usual = found.step ? null : (definition || {}).usual;
    lively = lively || !isOver(found);          // what it needs then stays, so that nothing moves
    return h("section.run",
      h("div.head",
        h("h1", link("job", found.job_id), parent && [" / ", bdi(found.step)],
          " ", badge(found.state)),
        h("div.actions", runActions())),
      (lively || reasonOf(found)) && h("div.slim", isOver(found) ? reasonOf(found)
        : [eta(found, usual), progress(found, usual)]),
      h("dl.facts",
        fact("Run", h("code", id)),
        fact("Trigger", found.trigger, found.retry_of && [" of ", link("run", found.retry_of)]),
        found.slot && fact("Slot", exactly(found.slot)),
        parent && fact("Part of", link("run", parent.id)),
        fact("Started", exactly(found.started_at) || "–"),
        fact("Took", found.duration === null ? found.started_at && !found.finished_at
          ? when(found.started_at, "elapsed") : "–" : span(found.duration)),
        fact("Exit", found.signal || (found.exit_code ?? "–")),
        fact("Node", found.node || "–"),
        found.retry_at && fact("Next attempt", when(found.retry_at))),
      pipeline.steps.length > 0 && graph(pipeline, found.parent || id, id),
      found.attempts.length > 0 && attemptTable(found), log && kept(log.node));
  }

  function runActions() {
    return [
      !isOver(found) && can("run:cancel") && button("Cancel", () =>
        confirm("End this run?")
          && doing(post(runPath(id) + "/cancel"), "The run is told to end.").then(load)),
      isOver(found) && found.state !== "skipped" && can("run:create") && !parent
        && button("Retry", () => retry(found.id, {})),
      parent && isOver(parent) && can("run:create")
        && button("Retry from this step", () => retry(parent.id, {from: found.step}))];
  }

  async function retry(which, body) {
    const target = runPath(which) + "/retry";
    if (definition && secretsOf(definition).length) return runDialog(definition, target, body);
    const made = await doing(post(target, body));
    if (made) location.hash = address("run", made.id);
  }

  load();
  const stop = () => log && log.stop();
  return {title: "Run " + id, render, stop, seen: (shown) => shown ? log && log.goOn() : stop(),
    took(other) {
      if ([other.id, other.parent].includes(id) || (found && other.parent === found.parent
        && other.parent) || (found && other.id === found.parent)) refresh();
    },
    turned(values) { if (log && values.at) log.goTo(Number(values.at)); }};
}

async function jobOf(id) {
  try {
    return can("job:read") ? await ask(jobPath(id)) : null;
  } catch (deleted) {
    return null;
  }
}

function attemptTable(found) {
  const cell = (text) => h("td.number", text);
  const known = (value, form) => value === null ? "–" : form(value);
  return h("div.scroll", h("table",
    h("thead", h("tr", ["Attempt", "Started", "Took", "Exit", "CPU", "Memory", "Output"]
      .map((text) => h("th", {scope: "col"}, text)))),
    h("tbody", found.attempts.map((attempt) => h("tr", cell(attempt.number),
      h("td", exactly(attempt.started_at)),
      cell(attempt.finished_at ? span(seconds(attempt.finished_at) - seconds(attempt.started_at))
        : when(attempt.started_at, "elapsed")),
      cell(attempt.signal || (attempt.exit_code ?? "–")), cell(known(attempt.cpu_seconds, span)),
      cell(known(attempt.max_rss_bytes, size)), cell(known(attempt.output_bytes, size)))))));
}

// A pipeline as a graph: a column for each length of the longest way to a step.
function graph(pipeline, top, current) {
  const runs = new Map(pipeline.steps.map((run) => [run.step, run]));
  const needs = new Map(Object.entries(pipeline.graph));
  const depth = new Map(), columns = [];
  const depthOf = (id) => {
    if (!depth.has(id)) {
      depth.set(id, 0);
      depth.set(id, Math.max(-1, ...needs.get(id).map(depthOf)) + 1);
    }
    return depth.get(id);
  };
  for (const id of needs.keys()) (columns[depthOf(id)] = columns[depthOf(id)] || []).push(id);
  const place = new Map(columns.flatMap((ids, x) =>
    ids.map((id, y) => [id, {x: x * 200, y: y * 52}])));
  const high = Math.max(...columns.map((ids) => ids.length)) * 52 - 12;
  const wide = columns.length * 200 - 40;
  const edges = [...needs].flatMap(([id, some]) => some.map((one) => {
    const a = place.get(one), b = place.get(id);
    return svg("path", {d: `M${a.x + 160} ${a.y + 20}C${a.x + 180} ${a.y + 20} ${b.x - 20} `
      + `${b.y + 20} ${b.x} ${b.y + 20}`});
  }));
  return h("div.scroll.graph", {tabindex: 0, role: "group", "aria-label": "Steps"},
    h("div", {style: {width: wide + "px", height: high + "px"}},
      svg("svg", {width: wide, height: high, "aria-hidden": "true"}, edges),
      [...needs.keys()].map((id) => {
        const run = runs.get(id), {x, y} = place.get(id);
        const style = {left: x + "px", top: y + "px"};
        const said = [h("i", {class: run ? run.state : "waits"}), h("span", bdi(id)),
          quiet(!run ? "–" : run.parent !== top ? "taken over"
            : run.state === "running" && run.started_at ? when(run.started_at, "elapsed")
              : run.duration ? span(run.duration) : stateWord(run.state))];
        return run ? h("a.step", {href: address("run", run.id), style, "data-key": id,
          title: id + ": " + stateWord(run.state),
          "aria-current": run.id === current && "true"}, said)
          : h("span.step", {style, "data-key": id, title: id}, said);
      })));
}

// The log. Only a window of it is here: it grows at both ends as one scrolls, and loses lines at
// the other end. A place in it is an offset of the API, which never changes: links to lines hold.

const WINDOW = 1 << 16;             // bytes fetched at a time
const SEARCHED = 1 << 20;           // bytes looked through at a time
const MOST_LINES = 4000;
const LONGEST_LINE = 4000;          // characters shown of one line

class LogView {
  constructor(run, at) {
    Object.assign(this, {run, lines: [], begin: 0, end: 0, size: 0, errors: false, text: "",
      marked: at ? Number(at) : null, ended: isOver(run), stuck: true, busy: false});
    this.abort = new AbortController();
    this.list = h("div.lines", {tabindex: 0, role: "log", "aria-label": "Log",
      "aria-live": "off", onscroll: () => this.scrolled()});
    this.status = quiet({role: "status"});
    this.node = h("section.log", {"data-keep": "log"}, this.tools(),
      this.list);
  }

  tools() {
    const redraw = atMostEach(200, () => this.redraw());
    return h("div.tools",
      h("input", {type: "search", id: "log-search", placeholder: "Find in the log, Enter: next",
        "aria-label": "Find in the log", spellcheck: "false", autocomplete: "off",
        oninput: (event) => { this.text = event.target.value; redraw(); },
        onkeydown: (event) => { if (event.key === "Enter") this.find(); }}),
      h("label.check", h("input", {type: "checkbox", onchange: (event) => {
        this.errors = event.target.checked;
        this.open();
      }}), "Only errors"),
      this.status,
      button("Start", () => this.goTo(0)),
      button("End", () => { this.marked = null; this.open(); }),
      button("Raw", () => this.download()));
  }

  stop() {
    this.abort.abort();
  }

  goOn() {
    this.abort = new AbortController();
    this.follow();
  }

  ask(asked, Accept) {
    return send(runPath(this.run.id) + "/logs" + parameters({...asked,
      stream: this.errors ? "err" : ""}), {headers: {Accept}, signal: this.abort.signal});
  }

  // The lines of a window: {lines: [{at, next, time, stream, line}], next, size}.
  async fetch(offset, limit) {
    const response = await this.ask({offset, limit}, "text/event-stream");
    const found = {lines: [], next: offset, size: Number(response.headers.get("Roexec-Log-Size"))};
    if (response.status === 204) return found;
    let at = offset;
    for await (const event of eventsOf(response)) at = this.take(event, at, found);
    return found;
  }

  take(event, at, found) {
    if (event.type === "window") {
      Object.assign(found, event.data);
    } else if (event.type === "gap") {
      found.lines.push({at, next: event.data.to, stream: "gap",
        line: size(event.data.to - event.data.from) + " are left out here"});
      return event.data.to;
    } else if (event.type === "message" && event.data) {
      const next = Number(event.id);
      found.lines.push({...event.data, at, next});
      return next;
    }
    return at;
  }

  async open(at = this.marked) {
    this.abort.abort();
    this.abort = new AbortController();
    if (!this.run.log) {
      this.show({lines: [], next: 0});
      return this.follow();
    }
    try {
      const head = await send(runPath(this.run.id) + "/logs", {method: "HEAD"});
      this.size = Number(head.headers.get("Roexec-Log-Size"));
      const from = Math.max(0, at === null ? this.size - WINDOW : at - WINDOW / 4);
      const found = await this.fetch(from, WINDOW);
      this.begin = found.lines.length && from ? found.lines[0].at : from;
      this.show(found);
      this.stuck = at === null;
      if (at === null) this.list.scrollTop = this.list.scrollHeight;
      else this.reveal();
    } catch (error) {
      return this.fail(error);
    }
    this.follow();
  }

  fail(error) {
    if (error.name !== "AbortError") this.list.replaceChildren(h("p.quiet", error.message));
  }

  goTo(at) {
    this.marked = at;
    const here = this.lines.some((line) => line.at === at);
    if (here) this.reveal();
    else this.open(at);
  }

  reveal() {
    this.redraw();
    const line = this.list.querySelector(".marked") || this.list.firstElementChild;
    if (line) line.scrollIntoView({block: "center"});
  }

  show(found) {
    this.lines = found.lines;
    this.end = found.next;
    if (found.size) this.size = Math.max(this.size, found.size);
    this.redraw();
  }

  redraw() {
    const top = this.list.scrollTop;
    this.list.replaceChildren(...this.lines.map((line) => this.draw(line)));
    if (!this.lines.length) this.list.append(h("p.quiet",
      this.errors ? "No errors here." : this.ended ? "No log." : "No output yet."));
    this.list.scrollTop = top;
    this.tell();
  }

  tell(text) {
    const part = this.begin > 0 || this.end < this.size;
    this.status.textContent = text
      || (part ? this.percent(this.end) + " of " + size(this.size) : "");
  }

  percent(at) {
    return Math.round(at / Math.max(1, this.size) * 100) + " %";
  }

  draw(line) {
    const shown = line.line.slice(0, LONGEST_LINE), rest = line.line.length - shown.length;
    return h("div.line." + line.stream + (line.at === this.marked ? ".marked" : ""),
    h("a.at", {tabindex: -1, href: address("run", this.run.id, {at: line.at}),
      title: line.time}, line.time && clock(seconds(line.time))),
    h("span", ansi(shown).map(([text, style]) => this.highlight(text, style)),
      rest > 0 && quiet(" … " + many(rest, "more character") + ": see Raw")));
  }

  highlight(text, style) {
    const parts = [], wanted = this.text.toLowerCase(), lower = text.toLowerCase();
    let from = 0;
    for (let at; wanted && (at = lower.indexOf(wanted, from)) >= 0; from = at + wanted.length) {
      parts.push(text.slice(from, at), h("mark", text.slice(at, at + wanted.length)));
    }
    parts.push(text.slice(from));
    return style ? h("span", {class: style}, parts) : parts;
  }

  scrolled() {
    const {scrollTop, clientHeight, scrollHeight} = this.list;
    this.stuck = scrollTop + clientHeight > scrollHeight - 30;
    if (scrollTop < 300 && this.begin > 0) this.grow(() => this.earlier());
    else if (scrollTop + clientHeight > scrollHeight - 300 && this.end < this.size) {
      this.grow(async () => this.add(await this.fetch(this.end, WINDOW)));
    }
  }

  async grow(fetchMore) {
    if (this.busy || this.following) return;
    this.busy = true;
    try {
      await fetchMore();
    } catch (error) {
      this.fail(error);
    }
    this.busy = false;
    this.follow();
  }

  async earlier() {
    const from = Math.max(0, this.begin - WINDOW);
    const found = await this.fetch(from, this.begin - from);
    const lines = found.lines.filter((line) => line.at < this.begin);
    const high = this.list.scrollHeight, top = this.list.scrollTop;
    this.list.prepend(...lines.map((line) => this.draw(line)));
    this.list.scrollTop = top + this.list.scrollHeight - high;
    this.lines = [...lines, ...this.lines];
    this.begin = from && lines.length ? lines[0].at : from;
    this.cut(false);
    this.tell();
  }

  add(found) {
    const stuck = this.stuck && this.following;
    if (!this.lines.length && found.lines.length) this.list.replaceChildren();
    this.list.append(...found.lines.map((line) => this.draw(line)));
    this.lines.push(...found.lines);
    this.run.log = true;
    this.end = found.next;
    this.size = Math.max(this.size, this.end, found.size || 0);
    this.cut(true);
    if (stuck) this.list.scrollTop = this.list.scrollHeight;
    this.tell();
  }

  // Let go of lines at one end.
  cut(first) {
    const over = this.lines.length - MOST_LINES;
    if (over <= 0) return;
    const top = this.list.scrollHeight;
    const gone = first ? this.lines.splice(0, over) : this.lines.splice(-over);
    gone.forEach(() => (first ? this.list.firstChild : this.list.lastChild).remove());
    if (first) {
      this.list.scrollTop -= top - this.list.scrollHeight;
      this.begin = this.lines[0].at;
    } else this.end = gone[0].at;
  }

  // What is still being written, several lines at a time.
  async follow() {
    if (this.following || this.ended && this.end >= this.size || this.end < this.size) return;
    this.following = true;
    const {signal} = this.abort, found = {lines: []};
    let timer = 0, at = this.end;
    const flush = () => {
      timer = 0;
      if (!signal.aborted) this.add({lines: found.lines.splice(0), next: at});
    };
    try {
      const response = await this.ask({offset: at, follow: 1}, "text/event-stream");
      for await (const event of response.status === 204 ? [] : eventsOf(response)) {
        at = this.take(event, at, found);
        timer = timer || setTimeout(flush, 80);
      }
      this.ended = true;
    } catch (error) {
      if (!signal.aborted) setTimeout(() => this.follow(), 3000);
    }
    this.following = false;
  }

  // The next line with the text, here or in what is not here: that is looked through as text, which
  // is ten times as fast as line by line.
  async find() {
    const wanted = this.text.toLowerCase();
    if (!wanted) return;
    const has = (line) => line.line.toLowerCase().includes(wanted);
    const after = this.marked ?? -1;
    const here = this.lines.find((line) => line.at > after && has(line));
    if (here) return this.mark(here);
    try {
      for (const [first, last] of [[this.end, this.size], [0, this.end]]) {
        for (let from = first, next; from < last; from = Math.max(from + 1, next)) {
          this.tell("searching … " + this.percent(from));
          const response = await this.ask({offset: from, limit: SEARCHED}, "text/plain");
          if ((await response.text()).toLowerCase().includes(wanted)) {
            const line = (await this.fetch(from, SEARCHED)).lines.find(has);
            if (line) return this.mark(line);
          }
          next = Number(response.headers.get("Roexec-Next-Offset"));
        }
      }
      this.tell("not found");
    } catch (error) {
      this.fail(error);
    }
  }

  mark({at}) {
    history.replaceState(null, "", address("run", this.run.id, {at}));
    this.goTo(at);
  }

  async download() {
    const response = await doing(send(runPath(this.run.id) + "/logs?raw=1"));
    if (!response) return;
    const url = URL.createObjectURL(await response.blob());
    h("a", {href: url, download: this.run.job_id + "-" + this.run.id + ".log"}).click();
    setTimeout(() => URL.revokeObjectURL(url), 60000);
  }
}

// Escape sequences of terminals: colours from a table of sixteen, all else is dropped, as is what a
// carriage return overwrites.

const ESCAPE = /\x1b(?:\[([\d;:]*)[ -/]*([@-~])|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])/g;

function ansi(text) {
  const shown = text.replace(/\r+$/, "").split("\r").pop();
  const pieces = [], style = new Map();
  let from = 0;
  const put = (piece) => piece && pieces.push([piece, [...style.values()].join(" ")]);
  for (const found of shown.matchAll(ESCAPE)) {
    put(shown.slice(from, found.index));
    from = found.index + found[0].length;
    if (found[2] === "m") setStyle(style, found[1].split(/[;:]/).map(Number));
  }
  put(shown.slice(from));
  return pieces;
}

function setStyle(style, codes) {
  for (let at = 0; at < codes.length; at++) {
    const code = codes[at];
    if (code === 0) style.clear();
    else if (code === 1) style.set("weight", "bold");
    else if (code === 22) style.delete("weight");
    else if (code === 38 || code === 48) {           // of 256 the first sixteen are the table
      if (code === 38 && codes[at + 1] === 5) style.set("colour", "c" + codes[at + 2]);
      at += codes[at + 1] === 5 ? 2 : 4;
    } else if (code >= 30 && code <= 37) style.set("colour", "c" + (code - 30));
    else if (code >= 90 && code <= 97) style.set("colour", "c" + (code - 82));
    else if (code === 39) style.delete("colour");
  }
}

// Job files: write, check against the server, apply.

const EXAMPLE = `jobs:
  - id: backup-db
    schedule: "0 2 * * *"
    command: /usr/local/bin/backup.sh
`;

function files(_, query) {
  let text = "", result = null, failure = null, checked = null, busy = false;
  const area = h("textarea", {id: "file", spellcheck: "false", "aria-label": "Job file", rows: 18,
    placeholder: EXAMPLE, oninput() { text = area.value; changed(); }});
  const editor = h("div.editor", {"data-keep": "editor"}, area);

  async function begin(id) {
    const file = await doing(exported(id));
    if (file) area.value = text = file;
    changed();
  }

  async function submit(dry) {
    const sent = text;
    busy = true;
    try {
      result = await post("apply" + parameters({dry_run: dry ? 1 : ""}), sent);
      failure = null;
      checked = dry ? sent : null;
      if (!dry) reloadJobs();
    } catch (error) {
      [failure, result, checked] = [error, null, null];
    }
    busy = false;
    changed();
  }

  function goTo({line, column}) {
    const lines = text.split("\n");
    const at = lines.slice(0, line - 1).join("\n").length + (line > 1 ? 1 : 0);
    area.focus();
    area.setSelectionRange(at + (column || 1) - 1, at + (lines[line - 1] || "").length);
    area.scrollTop = (line - 4) * parseFloat(getComputedStyle(area).lineHeight);
  }

  function render() {
    const changes = result ? result.changes.filter((one) => one.change !== "unchanged") : [];
    return h("section.files",
      h("div.head", h("h1", "Job files"), h("div.actions",
        button("Check", () => submit(true), {disabled: busy || !text.trim()}),
        button("Apply", () => submit(false), {class: "main", disabled: busy || checked !== text
          || !changes.length}))),
      h("p.quiet", "Check shows what would change."),
      kept(editor),
      h("div.result", {"aria-live": "polite"}, failure && problems(), result && [
        h("h2", changes.length ? many(changes.length, "change")
          + (result.dry_run ? ", not applied yet" : " applied") : "Nothing would change"),
        result.warnings.map((warning) => h("p.warning", warning)),
        changes.map(difference)]));
  }

  function problems() {
    if (!failure.errors.length) return h("p.failure", failure.message);
    return [h("h2", many(failure.errors.length, "error")),
      h("ul.errors", failure.errors.map((error) => h("li",
        error.line && button(error.line + ":" + (error.column || 1), () => goTo(error)), " ",
        error.path && h("code", error.path), " ", error.message)))];
  }

  if (query.job) begin(query.job);
  return {title: "Job files", render};
}

function difference(change) {
  const lines = (change.diff || "").split("\n").filter((line) => !/^(---|\+\+\+|$)/.test(line));
  return h("div", h("h2", badge(change.change), " ", bdi(change.id)),
    change.diff && h("pre.code", {tabindex: 0, "aria-label": "Difference"}, lines.map((line) =>
      h("span", {class: {"+": "plus", "-": "minus", "@": "quiet"}[line[0]]}, line + "\n"))));
}

// Who looks: the owner on this host, or a token, which is kept for this tab only.

function signIn() {
  const failure = h("p.failure", {role: "alert"});
  const field = h("input", {type: "password", id: "token", autocomplete: "off", required: true});
  $("main").replaceChildren(h("form.sign-in", {onsubmit: async (event) => {
    event.preventDefault();
    sessionStorage.setItem(TOKEN, field.value.trim());
    failure.textContent = "";
    if (!await enter()) failure.textContent = "This token is not valid here.";
  }},
  h("h1", "Sign in"),
  h("p.quiet", "Who is not this server's user on its own host needs a token: ",
    h("code", "roexec token create")),
  h("label", "Token", field), failure,
  h("button.main", "Sign in")));
  document.title = "Sign in · roexec";
  field.focus();
}

function leave() {
  sessionStorage.removeItem(TOKEN);
  location.reload();
}

async function enter() {
  loadJobs().catch((error) => model.me && say(error.message));
  try {
    model.me = await ask("me");
  } catch (error) {
    sessionStorage.removeItem(TOKEN);
    if (error.status !== 401) $("main").replaceChildren(blank(error));
    else if (!$("token")) signIn();
    return false;
  }
  const {now: theirs, owner, name} = model.me;
  skew = seconds(theirs) - Date.now() / 1000;
  $("who").replaceChildren(quiet(owner ? "owner" : name), sessionStorage.getItem(TOKEN)
    ? button("Sign out", leave) : "");
  for (const link of document.querySelectorAll("nav a")) {
    link.hidden = link.dataset.view === "files" && !can("job:write");
  }
  openView();
  return true;
}

const VIEWS = {__proto__: null, overview, timeline, job, run, files};

addEventListener("hashchange", openView);
let frame = 0;
addEventListener("scroll", () => {
  places.set(location.hash, scrollY);
  frame = frame || requestAnimationFrame(() => {
    frame = 0;
    if (view && view.placed) view.placed();
  });
}, {passive: true});
addEventListener("resize", draw);
addEventListener("keydown", (event) => {
  const field = $("search") || $("log-search");
  if (event.key === "/" && field && !/input|textarea|select/i.test(event.target.tagName)) {
    event.preventDefault();
    field.focus();
  }
});
$("skip").onclick = () => $("main").focus();
history.scrollRestoration = "manual";
setInterval(tick, 1000);
follow();
enter();
"""


def web_page():
    """The page (bytes) and the headers {name: text} that it is to be sent with.

    By its policy (Content Security Policy Level 3) only this script runs and only this style holds,
    it can ask nobody but this server, and nobody can put it into a frame.
    """
    page = _HTML.replace("__STYLE__", _STYLE).replace("__SCRIPT__", _SCRIPT)
    policy = ("default-src 'none'", f"script-src {_source(_SCRIPT)}",
              f"style-src {_source(_STYLE)}", "connect-src 'self'", "img-src data:",
              "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
              "require-trusted-types-for 'script'", "trusted-types 'none'")
    return page.encode(), {"Content-Security-Policy": "; ".join(policy),
                           "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}


def _source(text):
    """What names a text between tags in a policy: its hash."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# ==== 23 gate =====================================================================================
# HTTP before any route: what a request asks for, read strictly, who is at the other end, and the
# one gate, which lets in who bears a token, and over loopback the server's own user and root.

OPEN = "open"                   # the scope of a route that anybody may use
PAGE = "page"                   # that of what anybody's browser may get, by a name of ours
ANY = "any"                     # that of one for whoever is known, with whatever scopes

MOST_HEAD = 16 << 10            # bytes of a request before its body
_MOST_FIELDS = 100              # of a head
_MOST_BODY = 1 << 20            # bytes


# What a route gets and gives.

class Request:
    """A request: `method`, `path` and `query` as they were sent, `version` the 1 of HTTP/1.1,
    `headers` {lower-case name: [values]}, `length` of the body (bytes).

    `route`, `arguments` (texts in the path), `body` (bytes), `caller` (a Caller), `vitals` (those
    of the scheduler, where there is one) and `warnings` (a function that gives texts) are put in
    when they are known.
    """

    def __init__(self, method, target, headers=None, *, version=1):
        self.method, self.version, self.headers = method, version, headers or {}
        self.path, _, self.query = target.partition("?")
        self.length, self.arguments, self.body = 0, (), b""
        self.route = self.caller = self.vitals = None
        self.warnings = list

    def header(self, name):
        """The value of a header; that of one that is repeated joined by commas; None without."""
        values = self.headers.get(name)
        return None if values is None else ", ".join(values)

    @property
    def keeps(self):
        """Whether the connection can serve a further request."""
        options = (self.header("connection") or "").lower().replace(" ", "").split(",")
        return self.version == 1 and "close" not in options

    def options(self):
        """{name: value} of the query; raises Refusal for a name that its route does not know, or
        that is repeated."""
        known = [name for name, place, _ in self.route.named_parameters() if place == "query"]
        options = {}
        for part in filter(None, self.query.split("&")):
            name, _, value = map(unquoted, part.replace("+", " ").partition("="))
            if name not in known:
                raise Refusal(400, "bad_request", f'unknown parameter "{printable(name)}"'
                              + nearest(name, known))
            if name in options:
                raise Refusal(400, "bad_request", f"{name} is given twice")
            options[name] = value
        return options


def unquoted(text):
    """A part of a path or query without its %XX; raises Refusal where that is not UTF-8."""
    import urllib.parse
    try:
        return urllib.parse.unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise Refusal(400, "bad_request", f'"{text}" is not UTF-8') from None


class Response(Value):
    """An answer: `status`, `type` and more `headers` ({name: text}), and one of `body` (bytes),
    `stream`, a function that gives an iterator of bytes, and `feed`, a function of a Lookout that
    gives one for Streams.

    A body that is all of what the database has stays the same until an instant, `until` (seconds).
    """
    __slots__ = ("status", "type", "headers", "body", "stream", "feed", "until")


def json_response(payload, status=200, **headers):
    """A Response with a payload as JSON; `_` in the names of headers stands for `-`."""
    return Response(status=status, type="application/json",
                    headers={name.replace("_", "-"): text for name, text in headers.items()},
                    body=json.dumps(payload).encode() + b"\n")


class Refusal(RoexecError):
    """A request that is answered with an error: the status, a code for programs, a sentence."""

    def __init__(self, status, code, message, *, headers=None, **members):
        super().__init__(message)
        self.status, self.code = status, code
        self.headers, self.members = headers or {}, members

    def response(self):
        """The Response."""
        error = {"code": self.code, "message": str(self), **self.members}
        return json_response({"error": error}, self.status, **self.headers)


# Reading the head of a request (RFC 9112), strictly: what two readers could take for two things is
# refused, so that nobody in front of us can be made to see other requests than we do.

_REQUEST_LINE = Pattern(r"([A-Z]{1,20}) (\S+) HTTP/(\d)\.(\d)")
_TARGET = Pattern(r"/(?:[!$&-~\"]|%[0-9A-Fa-f]{2})*")
_FIELD_NAME = Pattern(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_FIELD_VALUE = Pattern(r"[^\x00-\x08\n-\x1f\x7f]*")
_HOST_FIELD = Pattern(r"(?:[A-Za-z0-9._~-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?")
DIGITS = Pattern(r"\d{1,18}", "a")


def parse_head(head):
    """The Request of a head (bytes, without the empty line at its end); raises Refusal."""
    first, *lines = head.decode("latin-1").split("\r\n")
    found = _REQUEST_LINE.fullmatch(first)
    if not found:
        raise Refusal(400, "bad_request", "this is not a request of HTTP/1.1")
    if found[3] != "1":
        raise Refusal(505, "version_not_supported", "only HTTP/1.1 and HTTP/1.0 are spoken here")
    if not _TARGET.fullmatch(found[2]):
        raise Refusal(400, "bad_request", "the target of the request is not a path, or has a % "
                      "without two hexadecimal digits")
    if len(lines) > _MOST_FIELDS:
        raise Refusal(431, "head_too_large", f"more than {_MOST_FIELDS} header fields")
    headers = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not (colon and _FIELD_NAME.fullmatch(name) and _FIELD_VALUE.fullmatch(value)):
            raise Refusal(400, "bad_request", "a line of the head is not a header field")
        headers.setdefault(name.lower(), []).append(value.strip(" \t"))
    request = Request(found[1], found[2], headers, version=int(found[4] != "0"))
    _check_host(request)
    request.length = _body_length(request)
    return request


def _check_host(request):
    """RFC 9112, 3.2: exactly one, and a valid one; HTTP/1.0 knows none."""
    hosts = request.headers.get("host", [])
    if len(hosts) > 1 or (request.version == 1 and not hosts):
        raise Refusal(400, "bad_request", "a request has exactly one Host")
    if hosts and not _HOST_FIELD.fullmatch(hosts[0]):
        raise Refusal(400, "bad_request", "the Host is malformed")


def _body_length(request):
    lengths = request.headers.get("content-length")
    if "transfer-encoding" in request.headers:
        if lengths is not None:
            raise Refusal(400, "bad_request", "both a Content-Length and a Transfer-Encoding")
        raise Refusal(411, "length_required", "send the body with a Content-Length, not in chunks")
    if lengths is None:
        return 0
    if len(lengths) > 1 or not DIGITS.fullmatch(lengths[0]):
        raise Refusal(400, "bad_request", "the Content-Length is no number, or not the only one")
    if int(lengths[0]) > _MOST_BODY:
        raise Refusal(413, "body_too_large", f"a body has at most {_MOST_BODY} bytes")
    return int(lengths[0])


# Who is at the other end of a connection.

def local_user(connection, uids=()):
    """The name of the user at the other end of a TCP connection: the server's own, root or one of
    `uids`; else None."""
    uid = peer_uid(connection)
    known = uid is not None and uid in (os.geteuid(), 0, *uids) and uid != _overflow_uid()
    return owner_name(uid) if known else None


def peer_uid(connection):
    """The uid of the process at the other end of a loopback connection; None where in doubt.

    By the kernel's table of sockets (proc(5)). A client that has closed its socket is listed with
    uid 0 and inode 0, so a row without an inode proves nothing. And a port is free again once both
    ends are gone: only if ours is still connected afterwards the row cannot be of a later client.
    """
    ours, theirs = map(packed_end, (connection.getsockname(), connection.getpeername()))
    if not (is_loopback(ours[0]) and is_loopback(theirs[0])):
        return None
    rows = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError), open(f"/proc/net/{table}", "rb") as file:
            rows |= _rows_between(file, theirs, ours)
    if len(rows) != 1:
        return None
    state, uid, inode = rows.pop()
    connected = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == b"\x01"
    return int(uid) if state == b"01" and inode != b"0" and connected else None


def _rows_between(lines, local, remote):
    """The set of (state, uid, inode) in a table of sockets from one end to the other."""
    pairs = [b" ".join(map(_as_listed, (local, remote)))]
    if len(local[0]) == 4:
        pairs.append(b" ".join(_as_listed((_MAPPED + address, port))
                               for address, port in (local, remote)))
    wanted = tuple(b" %b " % pair for pair in pairs)
    rows = [line.split() for line in lines if any(pair in line for pair in wanted)]
    return {(row[3], row[7], row[9]) for row in rows}


_MAPPED = b"\0" * 10 + b"\xff\xff"          # an IPv4 address as one of IPv6 (RFC 4291, 2.5.5.2)


def packed_end(address):
    """(packed address, port) of one end, that of a v4-mapped address as of IPv4."""
    host, port = address[0].partition("%")[0], address[1]
    packed = socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    return packed[12:] if packed.startswith(_MAPPED) else packed, port


def is_loopback(packed):
    """Whether a packed address is one of this host alone."""
    return packed[0] == 127 if len(packed) == 4 else packed == b"\0" * 15 + b"\1"


def _as_listed(end):
    """An end as /proc/net/tcp writes it: words of 32 bits in the byte order of the host."""
    packed, port = end
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return b"".join(b"%08X" % word for word in words) + b":%04X" % port


def _overflow_uid():
    """Who stands for users that a user namespace cannot name; anybody could be one of these."""
    try:
        with open("/proc/sys/kernel/overflowuid") as file:
            return int(file.read())
    except OSError:
        return 65534


# The gate.

_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
_OF_PROXIES = ("forwarded", "via", "x-real-ip")


class Place(Value):
    """Where a request has arrived: the `port` of the server, the `name` of its host, the `hosts`
    that it is called besides. `owner()` says which local user is at the other end, None for any
    other, and `token(text)` gives the row of a token, or None."""
    __slots__ = ("port", "name", "hosts", "owner", "token")


def gate(scope, request, place):
    """The Caller of a request that may pass; raises Refusal. `scope` is that of its route, None
    without a route."""
    host = (request.header("host") or "").lower()
    _check_origin(request, host, place)
    if scope == PAGE:
        _check_name(host, place)
    if scope in (OPEN, PAGE):
        return Caller(name="anybody", scopes=())
    if "authorization" in request.headers:
        caller = _bearer(request, host, place)
    else:
        caller = _owner(request, host, place)
    if scope not in (None, ANY) and not caller.may(scope):
        raise Refusal(403, "forbidden", f"this needs the scope {scope}, which {caller.name} does "
                      "not have")
    return caller


def _check_origin(request, host, place):
    """A browser says which page has made it ask; its host and port must be ours (a proxy may have
    taken TLS off, so that its scheme means nothing)."""
    origin = request.header("origin")
    if origin is not None:
        page = origin.partition("://")[2].lower()
        if not page or page != host and page not in place.hosts:
            raise Refusal(403, "foreign_origin", f"a page of {printable(origin)} asks, which is "
                          "not this server")


def _check_name(host, place):
    """Where a browser adds what lets a request pass by itself, any page can make it ask, also for a
    name that was made to mean this host. So such a request must be for a name of ours, or for an
    address: no page has come from there that was not ours."""
    name = _HOST_NAME_ALONE.match(host)[0]
    if name not in _LOOPBACK_NAMES and not _is_address(name) \
            and not {name, host} & {place.name, *place.hosts}:
        raise _foreign_host(name, place)


def _foreign_host(name, place):
    return Refusal(421, "foreign_host", f'this server is not called "{name}"; ask it as '
                   f'localhost:{place.port}, or write server: {{hosts: ["{name}"]}} into its '
                   "configuration")


def _is_own_site(request):
    """Whether no page of another site has made a browser ask."""
    return request.header("sec-fetch-site") in (None, "same-origin", "none")


_HOST_NAME_ALONE = Pattern(r"\[.*\]|[^:]*")


def _is_address(name):
    """Whether a host of a URL is an IP literal."""
    in_brackets = name[:1] == "["
    try:
        socket.inet_pton(socket.AF_INET6 if in_brackets else socket.AF_INET, name.strip("[]"))
    except (OSError, ValueError):
        return False
    return True


def _owner(request, host, place):
    """The Caller of a request without credentials: a local user, where nothing is doubtful."""
    proxied = any(name in _OF_PROXIES or name.startswith("x-forwarded-")
                  for name in request.headers)
    user = place.owner() if _is_own_site(request) and not proxied else None
    if user is None:
        raise _no_token("a token is needed: Authorization: Bearer TOKEN; roexec token create makes "
                        "one")
    name = _HOST_NAME_ALONE.match(host)[0]
    if name not in _LOOPBACK_NAMES:
        _check_name(host, place)
        raise _no_token(f"without a token ask localhost:{place.port}")
    if host not in (name, f"{name}:{place.port}"):
        raise _foreign_host(host, place)
    return Caller(name=f"user {user}", scopes=("*",), owner=True)


def _no_token(message, code="unauthorized"):
    """A 401. It never asks for Basic, for which a browser would open a dialog."""
    return Refusal(401, code, message, headers={"WWW_Authenticate": "Bearer"})


def _bearer(request, host, place):
    """The Caller of a request with a token (RFC 6750), be it as the password of its name (RFC 7617,
    curl -u), which a browser adds by itself."""
    kind, _, text = request.header("authorization").partition(" ")
    name, text = None, text.strip(" ")
    if kind.lower() == "basic":
        if not _is_own_site(request):
            raise Refusal(403, "foreign_origin", "a page of another site asks")
        _check_name(host, place)
        with contextlib.suppress(ValueError):
            name, _, text = base64.b64decode(text, validate=True).decode().partition(":")
    elif kind.lower() != "bearer":
        raise _no_token("write Authorization: Bearer TOKEN")
    row = place.token(text)
    if row is None or name not in (None, row["name"]):
        raise _no_token("there is no such token, or it has expired", BAD_TOKEN)
    return Caller(name=f"token {row['name']}", scopes=tuple(row["scopes"].split(",")),
                  pattern=row["pattern"])


BAD_TOKEN = "invalid_token"


class Failures:
    """Who has borne wrong tokens lately, so that guessing is slow: few seconds each, more from try
    to try, and never for whoever bears a right one. A thousand peers are remembered."""

    def __init__(self):
        self.known = {}                 # {peer: (how many, monotonic seconds of the last one)}
        self.mutex = threading.Lock()

    def note(self, peer, now):
        """Note a failure -> the seconds after which it is to be answered."""
        with self.mutex:
            count, last = self.known.pop(peer, (0, now))
            count = max(0, count - int((now - last) / _FORGOTTEN)) + 1
            if len(self.known) >= _MOST_PEERS:
                del self.known[next(iter(self.known))]      # the one that has failed longest ago
            self.known[peer] = count, now
        return min(_SLOWEST, 0.05 * 2 ** min(count, 10))


_MOST_PEERS = 1000
_FORGOTTEN = 10         # seconds after which a failure counts no more
_SLOWEST = 2.0          # seconds


# ==== 24 streams ==================================================================================
# Streams that last: a log that is followed, events. Each is an iterator of bytes, and of functions
# without arguments that say whether there is more by now. One thread serves all of them and looks
# once at the store for all, so that a thousand cost no thousand threads, and each is given what its
# client takes, at its own pace.

EVENT_STREAM = "text/event-stream"
_MOST_STREAMS = 1000
_OF_ONE_FOLLOWER = 128          # streams of one address elsewhere, or from here of one token
_LEFT_TO_OWNER = 64             # streams that nobody but the owner gets
SHARE = 256 << 10               # bytes that are read at once, for one of them
_LOOK_TIME = 0.02               # seconds between looks at what streams wait for, of a few
_BEAT_TIME = 15                 # seconds after which a stream of events shows that it lives
_STALL_TIME = 600               # seconds for which a client may take nothing
_RECHECK_TIME = 10              # seconds between looks whether a client may still read
_EVENTS_AT_ONCE = 500           # that a client who missed some gets in one piece


def event_bytes(name, data, number):
    """An event of a stream (WHATWG HTML, 9.2.5), the bytes of it."""
    return b"event: %b\nid: %d\ndata: %b\n\n" % (name, number, json.dumps(data).encode())


class _WatchedRun:
    """A run that is followed: its state, its StoredLog and the `end` of that, once it has one."""

    def __init__(self, store, run_id):
        self.store, self.run_id, self.followers = store, run_id, 0
        self.ended, self.row, self.outcome, self.log, self.end = False, None, None, None, 0
        self.trouble = None             # the error that ends its streams: it, or its log, is gone

    def look(self, row, changed=True):
        """See what has become of it, by its row where the store has changed."""
        path = None
        if changed and row is None:
            self.trouble = NoSuchRun(f'there is no run "{self.run_id}"')
            self.ended = True
        elif changed:
            self.row = row
            self.outcome = {name: row[name] for name in ("state", "reason", "exit_code", "signal")}
            self.ended, path = row["state"] in FINAL_STATES, row["log"]
        if self.log is None:
            path = path or not self.ended and live_log(self.store, self.row)
            if path:
                with contextlib.suppress(FileNotFoundError):
                    self.log = StoredLog(self.store.file(path))
        if self.log is not None:
            self.log.refresh()
            self.end = self.log.end()


class Lookout:
    """What streams wait for, looked at once for all of them: the id of the `newest` event, and the
    runs that are followed."""

    def __init__(self, store):
        self.store, self.version, self.newest = store, None, 0
        self.runs, self.latest = {}, (None, None)

    def look(self):
        """See what there is by now; raises RoexecError."""
        version, rows = self.store.memo.version(), {}
        changed = version is None or version != self.version
        if changed:
            with self.store.read() as db:
                self.newest = event_span(db)[1]
                rows = run_rows(db, self.runs) if self.runs else rows
            self.version = version
        for run_id, run in self.runs.items():
            try:
                run.look(rows.get(run_id), changed)
            except OSError as error:    # of its log
                run.trouble, run.ended = error, True

    @property
    def pause(self):
        """Seconds until the next look: less while a log is about to begin, more for many runs."""
        soon = any(run.log is None and run.outcome["state"] == "running"
                   for run in self.runs.values())
        return (_LOOK_TIME / 4 if soon else _LOOK_TIME) + len(self.runs) / 5000

    def join(self, run_id):
        """The _WatchedRun of a run; `leave` it. Raises NoSuchRun."""
        run = self.runs.get(run_id)
        if run is None:
            run = _WatchedRun(self.store, run_id)
            with self.store.read() as db:
                run.look(get_run(db, run_id))
            self.runs[run_id] = run
        run.followers += 1
        return run

    def leave(self, run):
        """Say that one follower less is there."""
        run.followers -= 1
        if run.followers == 0:
            del self.runs[run.run_id]
            if run.log is not None:
                run.log.close()

    def events_after(self, seen):
        """([(run or job, job id, bytes of the event)] behind an event, the id of the last of them);
        (None, the newest id) where some of them are gone. Of several about one thing it is the
        last, and says what has become of it by now."""
        asked = seen, self.newest
        if self.latest[0] != asked:
            self.latest = asked, self._read_events(seen)
        return self.latest[1]

    def _read_events(self, seen):
        with self.store.read() as db:
            first, newest = event_span(db)
            if seen < first - 1:
                return None, newest
            rows = list_events(db, seen, _EVENTS_AT_ONCE)
            last = {(row["job_id"], row["run_id"]): row["id"] for row in rows}
            runs = run_rows(db, [run_id for _, run_id in last if run_id])
            registered = {job_id for job_id, run_id in last if run_id is None
                          and find_job(db, job_id) is not None}
        found = []
        for (job_id, run_id), number in sorted(last.items(), key=lambda item: item[1]):
            if run_id is None:
                event = {"id": job_id, "deleted": job_id not in registered}
                found.append(("job", job_id, event_bytes(b"job", event, number)))
            elif run_id in runs:
                event = brief_run_payload(runs[run_id])
                found.append(("run", job_id, event_bytes(b"run", event, number)))
        return found, max(last.values(), default=newest)


class _Stream:
    """A connection that Streams serves: the iterator of what comes, what its client has not taken
    yet, and, while it waits, the function that says whether there is more."""

    def __init__(self, connection, chunks, request, response, recheck):
        self.connection, self.chunks, self.path = connection, chunks, request.path
        self.chunked, self.recheck = request.version == 1, recheck
        self.beats = response.type == EVENT_STREAM
        self.pending, self.ready, self.over = b"", None, False
        self.taken_at = self.checked_at = time.monotonic()

    def put(self, data):
        """Let some bytes be sent."""
        self.pending = memoryview(b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data)

    def is_gone(self):
        """Whether its client has gone; what that still says is dropped."""
        try:
            return not self.connection.recv(1 << 12)
        except OSError as error:
            return not _would_block(error)


def _would_block(error):
    return isinstance(error, BlockingIOError) or type(error).__name__ in (
        "SSLWantReadError", "SSLWantWriteError")


class Streams:
    """Serves lasting streams, in a thread that begins with the first of them."""

    def __init__(self, store, say, close_connection):
        self.lookout, self.say, self.close_connection = Lookout(store), say, close_connection
        self.all, self.new = {}, collections.deque()
        self.taken = {}                 # {connection: whose it is}
        self.poller, self.mutex = select.poll(), threading.Lock()
        self.thread, self.closed, self.told = None, False, None

    def add(self, connection, follower, request, response, recheck):
        """Take over a connection of a follower, whose head was sent -> whether there is a place."""
        with self.mutex:
            if self.closed or not self.has_place_for(follower):
                return False
            self.taken[connection] = follower
            self.new.append(_Stream(connection, response.feed(self.lookout), request, response,
                                    recheck))
            if self.thread is None:
                self.reader, self.writer = quiet_pipe()
                self.poller.register(self.reader, select.POLLIN)
                self.thread = threading.Thread(target=self.run, name="streams", daemon=True)
                self.thread.start()
        os.write(self.writer, b"w")
        return True

    def has_place_for(self, follower):
        """Whether one more stream can be served; `follower` is something that tells whose it is,
        None the owner."""
        if follower is None:
            return len(self.taken) < _MOST_STREAMS
        return (len(self.taken) < _MOST_STREAMS - _LEFT_TO_OWNER
                and sum(other == follower for other in list(self.taken.values()))
                < _OF_ONE_FOLLOWER)

    def close(self):
        """End all streams where they are; a client sees that there would be more."""
        with self.mutex:
            self.closed, thread = True, self.thread
        if thread is not None:
            os.write(self.writer, b"w")
            thread.join()
            for descriptor in (self.reader, self.writer):
                os.close(descriptor)

    def run(self):
        """Serve until closed."""
        beaten = time.monotonic()
        while not self.closed:
            try:
                self.turn()
                if time.monotonic() - beaten > 1:
                    beaten, self.told = time.monotonic(), None
                    self.look_after(beaten)
            except (RoexecError, OSError) as error:     # a full disk, say: tried again
                self.wait_for(str(error))
            except Exception:
                import traceback
                self.wait_for(traceback.format_exc())
        for stream in [*self.all.values(), *self.new]:
            self.drop(stream)

    def wait_for(self, trouble):
        """Wait until trouble may be over; it is told once."""
        if trouble != self.told:
            self.told = trouble
            self.say(f"streams wait: {trouble}", "ERROR")
        time.sleep(1)

    def turn(self):
        """Wait a moment for what streams wait for, and serve those that can go on."""
        for descriptor, event in self.poller.poll(self.lookout.pause * 1000 if self.all else None):
            if descriptor == self.reader:
                os.read(self.reader, 1 << 12)
                continue
            stream = self.all[descriptor]
            if event & ~select.POLLOUT and stream.is_gone():
                self.drop(stream)
            elif event & select.POLLOUT:
                self.push(stream)
        self.take_new()
        self.lookout.look()
        for stream in list(self.all.values()):
            if stream.ready is not None and stream.ready():
                self.push(stream)

    def take_new(self):
        while self.new:
            stream = self.new.popleft()
            stream.connection.setblocking(False)
            self.all[stream.connection.fileno()] = stream
            self.poller.register(stream.connection, select.POLLIN)
            self.push(stream)

    def push(self, stream):
        """Send what a stream has, as much as its client takes, and no more than its share."""
        try:
            for _ in range(4):
                if not stream.pending and not self.fill(stream):
                    return
                sent = stream.connection.send(stream.pending)
                stream.pending, stream.taken_at = stream.pending[sent:], time.monotonic()
        except OSError as error:
            if not _would_block(error):
                self.drop(stream)
                return
        self.poller.modify(stream.connection, select.POLLIN | select.POLLOUT)

    def fill(self, stream):
        """Get the next bytes of a stream -> whether there are some now."""
        stream.ready = None
        try:
            for item in () if stream.over else stream.chunks:
                if callable(item):
                    stream.ready = item
                    self.poller.modify(stream.connection, select.POLLIN)
                    return False
                if item:
                    stream.put(item)
                    return True
            if stream.chunked and not stream.over:
                stream.over, stream.pending = True, memoryview(b"0\r\n\r\n")
                return True
        except (RoexecError, OSError) as error:     # without its end a client sees that it is cut
            self.say(f"{stream.path} ends early: {error}", "ERROR")
        except Exception:
            import traceback
            self.say(f"{stream.path} failed: {traceback.format_exc()}", "ERROR")
        self.drop(stream)
        return False

    def look_after(self, now):
        """Let streams of events show that they live, and end those that are not to go on."""
        for stream in list(self.all.values()):
            quiet = now - stream.taken_at
            if stream.ready is None and quiet > _STALL_TIME:
                self.drop(stream)
            elif stream.ready is not None and stream.beats and quiet > _BEAT_TIME:
                stream.put(b":\n\n")
                self.push(stream)
            elif now - stream.checked_at > _RECHECK_TIME:
                stream.checked_at = now
                try:
                    stream.recheck()
                except Refusal:
                    self.drop(stream)

    def drop(self, stream):
        """Close a connection and forget its stream."""
        if self.all.pop(stream.connection.fileno(), None):
            self.poller.unregister(stream.connection)
        stream.chunks.close()
        with self.mutex:
            self.taken.pop(stream.connection, None)
        self.close_connection(stream.connection)


# ==== 25 api ======================================================================================
# The routes: each is a line of ROUTES with the scope that it needs, a function of (request, store)
# that knows no sockets, and described by OpenAPI from that line.

_MOST_LISTED = 1000             # items of a page
_MOST_HISTORIES = 100           # jobs
_MOST_SLOTS = 10_000            # of an answer
_LARGE_BODY = 2048              # bytes from which on it is compressed
_MOST_BYTES = 1 << 62           # of a log


# The routes' functions. What they raise besides Refusal is put into an answer by `answer`.

def _get_health(request, store):
    """Whether the server works; whoever asks may be a stranger, and is told nothing more."""
    try:
        with store.read() as db:
            count_changes(db)
    except RoexecError:
        raise Refusal(503, "unavailable", "the store cannot be read") from None
    trouble = request.vitals and request.vitals.trouble()
    if trouble:
        raise Refusal(503, "unavailable", trouble)
    return json_response({"status": "ok"})


def _get_page(request, store):
    """The web page, which then asks as any client."""
    body, headers = web_page()
    return Response(status=200, type="text/html; charset=utf-8", headers=headers, body=body,
                    until=math.inf)


def _get_jobs(request, store):
    """The jobs, by id."""
    options = request.options()
    limit = _whole_number(options, "limit", 1, _MOST_LISTED) or 50
    states, tag, brief = _words_of(options, "state", _JOB_STATES), options.get("tag"), _flag(
        options, "brief")
    ids = _job_list(options, _MOST_HISTORIES, "ids") if "ids" in options else None
    filters = ("jobs", states, tag, ids)
    last, jobs, until, now = _seen(options, filters) or "", [], math.inf, time.time()
    with store.read() as db:
        while len(jobs) <= limit:
            rows = list_jobs(db, last, limit + 1) if ids is None else _rows_after(db, ids, last)
            if not rows:
                break
            last = rows[-1]["id"]
            seen = job_payloads(db, [row for row in rows if request.caller.sees(row["id"])], now)
            until = min([until, *map(_changes_at, seen)])
            jobs += [job for job in seen if (tag is None or tag in job["tags"])
                     and (not states or _states_of(job).intersection(states))]
    more = len(jobs) > limit
    jobs = [_shown_job(job, request.caller, brief) for job in jobs[:limit]]
    cursor = _cursor(jobs[-1]["id"], filters) if more else None
    return json_response(page("jobs", jobs, cursor)).changed(until=until)


def _rows_after(db, ids, last):
    rows = (find_job(db, job_id) for job_id in sorted(ids) if job_id > last)
    return [row for row in rows if row is not None]


_JOB_STATES = ("running", "queued", "paused", "disabled", "scheduled", "manual")


def _states_of(job):
    """The words of _JOB_STATES that hold for the job of a payload."""
    return {job["active"], "paused" if job["paused"] else None,
            "disabled" if not job["enabled"] else "scheduled" if job["schedule"] else "manual"}


def _changes_at(job):
    """When the payload of a job becomes another one by itself (seconds)."""
    return min((parse_instant(job[name], None) for name in ("next_run", "paused_until")
                if job[name] is not None), default=math.inf)


def _shown_job(job, caller, brief=False):
    """The payload of a job as somebody may see it."""
    if brief:
        return {name: value for name, value in job.items() if name != "spec"}
    return job if caller.may("job:write") else {**job, "spec": public_spec(job["spec"])}


def _asked_id(request):
    """The id of a job in a path, be there one or not; raises NoSuchJob where one may not know."""
    job_id = request.arguments[0]
    if not request.caller.sees(job_id):
        raise NoSuchJob(f'there is no job "{printable(job_id)}"')
    return job_id


def _asked_job(db, request):
    """The row of the job in a path, as far as one sees it; raises NoSuchJob."""
    job_id = _asked_id(request)
    try:
        return get_job(db, job_id)
    except NoSuchJob:                   # whose nearest name may be one that is not to be seen
        known = filter(request.caller.sees, job_ids(db))
        raise NoSuchJob(f'there is no job "{printable(job_id)}"' + nearest(job_id, known)) from None


def _get_job(request, store):
    """A job."""
    request.options()
    with store.read() as db:
        return _job_response(db, _asked_job(db, request), request.caller)


def _job_response(db, row, caller, status=200):
    job, = job_payloads(db, [row], time.time())
    response = json_response(_shown_job(job, caller), status)
    tag = f'"{row["version"]}-{_digest(response.body.decode())}"'
    return response.changed(headers={"ETag": tag}, until=_changes_at(job))


def _get_why(request, store):
    """Why a job has not run at an instant, or does not run now."""
    options, caller = request.options(), request.caller
    with store.read() as db:
        job_id = _asked_job(db, request)["id"]
        try:
            payload = explanation(store, db, job_id, options.get("at"))
        except ValueError as error:
            raise Refusal(400, "bad_request", f"at: {error}") from None
    for sentence in (each for answer in payload["answers"] for each in answer["why"]):
        if caller.pattern is not None and sentence["reason"] == "queued_all":
            del sentence["behind"], sentence["text"]        # runs of jobs that it may not see
    return json_response(payload)


def _get_next_of_job(request, store):
    """The next slots of a job."""
    options = request.options()
    count = _whole_number(options, "count", 1, _MOST_LISTED) or 10
    with store.read() as db:
        row, (defaults, zone, _) = _asked_job(db, request), in_effect(db)
        payload, = job_payloads(db, [row], time.time())
    job = job_in_effect(row, defaults)
    slots = coming_slots([job], _after_option(options), zone, count)
    return json_response({"slots": slots, **{
        name: payload[name] for name in ("enabled", "paused", "paused_until")}})


def _after_option(options):
    """The second before the first one that is asked for by `from`."""
    begin = _instant_option(options, "from")
    return math.ceil(time.time() if begin is None else begin) - 1


def _get_next(request, store):
    """The next slots of several jobs: of all together, so many of `each`, or all of some time with
    what would become of them."""
    options = request.options()
    count, each = (_whole_number(options, name, 1, _MOST_LISTED) for name in ("count", "each"))
    end, after = _instant_option(options, "to"), _after_option(options)
    if count and (end is not None or each) or options.get("duration") and (end is None or each):
        raise Refusal(400, "bad_request", "count is without to and each, duration with to alone")
    if end is not None and end <= after + 1:
        raise Refusal(400, "bad_request", "to: that is before the first instant asked for")
    with store.read() as db:
        (defaults, zone, most), rows = in_effect(db), _rows_of_jobs(db, request, options, after)
        jobs = [job_in_effect(row, defaults) for row in rows]
        jobs = [job for job in jobs if job.enabled and job.schedule]
        usual = usual_durations(db, [job.id for job in jobs]) if end and not each else {}
    if each:
        return json_response(_next_of_each(jobs, after, math.inf if end is None else end, zone,
                                           each))
    if end is None:
        return json_response({"slots": coming_slots(jobs, after, zone, count or 10)})
    _check_amount(jobs, after, end, zone)
    if options.get("duration"):
        usual = dict.fromkeys((job.id for job in jobs), _duration_option(options))
    return json_response(foresight(jobs, after + 1, end, zone, usual, most))


def _rows_of_jobs(db, request, options, after):
    """Rows of the jobs that are asked for, else of all that are not paused, as far as one sees
    them."""
    if "jobs" in options:
        rows = [find_job(db, job_id) for job_id in _job_list(options, _MOST_LISTED)]
    else:
        rows = [row for row in list_jobs(db) if row["paused"] <= max(after, time.time())]
    return [row for row in rows if row is not None and request.caller.sees(row["id"])]


def _next_of_each(jobs, after, end, zone, each):
    """{slots, cut}: so many slots of each job, those < `end`, and the ids of those with more."""
    slots, cut = [], []
    for job in jobs:
        mine = list(itertools.islice(itertools.takewhile(
            lambda slot: slot < end, upcoming_slots(job, after, zone)), each + 1))
        slots += [(slot, job) for slot in mine[:each]]
        cut += [job.id] * (len(mine) > each)
        if len(slots) > _MOST_SLOTS:
            raise _too_many_slots()
    slots.sort(key=lambda item: (item[0], item[1].id))
    return {"slots": [slot_payload(job, slot, zone) for slot, job in slots], "cut": cut}


def _check_amount(jobs, after, end, zone):
    """Refuse what would take long: a schedule of each second has millions of slots in a month."""
    left = _MOST_SLOTS
    for job in jobs:
        left -= sum(1 for _ in itertools.islice(iter_slots(job, after + 1, end, zone), left + 1))
        if left < 0:
            raise _too_many_slots()


def _too_many_slots():
    return Refusal(400, "bad_request", f"that would be more than {_MOST_SLOTS} slots; ask for "
                   "fewer jobs, or for less time")


def _duration_option(options):
    try:
        return parse_duration(options["duration"])
    except ValueError as error:
        raise Refusal(400, "bad_request", f"duration: {error}") from None


def _get_export(request, store):
    """Jobs as a job file."""
    options = request.options()
    with store.read() as db:
        ids = list(filter(request.caller.sees, job_ids(db)))
        for job_id in _job_list(options, _MOST_LISTED) if "jobs" in options else ():
            if job_id not in ids:
                raise NoSuchJob(f'there is no job "{printable(job_id)}"' + nearest(job_id, ids))
        if "jobs" in options:
            ids = _job_list(options, _MOST_LISTED)
        jobs = exported_jobs(db, ids)
    if "application/json" in (request.header("accept") or ""):
        return json_response({"jobs": [job.spec for job in jobs]})
    return Response(status=200, type="application/yaml", headers={},
                    body=job_to_yaml(jobs).encode())


def _get_status(request, store):
    """How the server does: what is on, and the notices that did not get to where they were to."""
    request.options()
    caller = request.caller
    with store.read() as db:
        states = [run["state"] for run in active_runs(db) if caller.sees(run["job_id"])]
        jobs, notices = list(filter(caller.sees, job_ids(db))), unsent_notices(db)
        about = run_rows(db, [row["run_id"] for row in notices if row["run_id"]])
    if caller.pattern is not None:
        notices = [row for row in notices if row["run_id"] in about
                   and caller.sees(about[row["run_id"]]["job_id"])]
    trouble, whole = request.vitals and request.vitals.trouble(), caller.may("job:write")
    return json_response({
        "store": store.path if whole else None, "process": os.getpid() if whole else None,
        "health": trouble or "healthy", "jobs": len(jobs), "running": states.count("running"),
        "queued": states.count("queued"), "warnings": request.warnings() if whole else [],
        "unsent_notices": list(map(notice_payload, notices))})


def _get_me(request, store):
    """Who asks, what they may do, and where they have come to."""
    request.options()
    caller = request.caller
    with store.read() as db:
        zone = in_effect(db)[1]
    return json_response({
        "name": caller.name, "owner": bool(caller.owner), "jobs": caller.pattern,
        "scopes": [scope for scope in SCOPES if caller.may(scope)],
        "now": format_instant(round(time.time(), 3)), "version": __version__,
        "node": socket.gethostname(), "timezone": str(zone)})


# Changes of jobs.

def _put_one_job(request, store):
    """Register a job, or change it."""
    options = request.options()
    job_id = _asked_id(request)
    file = _read_or_refuse(lambda: read_job(request.body, "the body", job_id))
    _check_seen(request.caller, named_jobs(file.jobs[0].spec))

    def plan(db):
        row = find_job(db, job_id)
        _check_version(request, job_id, row)
        source = row and row["source"]
        if source and source.startswith("/"):
            raise Refusal(409, "source", f'job "{job_id}" is registered by {source}; change it '
                          "there, or delete it first")
        return plan_apply(db, {source: file.jobs})

    changes, missing = _apply(request, store, plan, _flag(options, "dry_run"))
    answer = _changes_response(changes, [*file.warnings, *missing], _flag(options, "dry_run"))
    return answer.changed(status=201) if changes[0]["change"] == "added" else answer


def _delete_one_job(request, store):
    """Remove a job; its history stays."""
    dry_run, job_id = _flag(request.options(), "dry_run"), request.arguments[0]

    def plan(db):
        row = _asked_job(db, request)
        _check_version(request, job_id, row)
        return [Change(id=job_id, change="removed", source=row["source"])]

    return _changes_response(*_apply(request, store, plan, dry_run), dry_run)


def _check_version(request, job_id, row):
    """Refuse a change of a job that is not what the client takes it for (RFC 9110, 13.1)."""
    wanted, absent = request.header("if-match"), request.header("if-none-match")
    versions = [tag.strip().removeprefix("W/").strip('"').partition("-")[0]
                for tag in (wanted or "").split(",")]
    now = f"is version {row['version']}" if row else "is not there"
    if wanted is not None and (row is None or not {"*", str(row["version"])} & set(versions)) \
            or absent == "*" and row is not None:
        raise Refusal(412, "precondition_failed", f'job "{job_id}" {now} by now; look at it again')


def _post_apply(request, store):
    """Register the jobs of one or several job files."""
    options = request.options()
    prune, dry_run = _flag(options, "prune"), _flag(options, "dry_run")
    caller, texts = request.caller, _texts_of(request.body, options.get("source"))
    with store.read() as db:
        defaults = in_effect(db)[0]
    files, sources, warnings = {}, {}, []
    for source, text in texts.items():
        files[source] = _read_or_refuse(lambda: read_job_file(text, source, None, defaults))
        sources[source] = files[source].jobs
        warnings += files[source].warnings
    _check_ids(sources)
    for jobs in sources.values():
        _check_seen(caller, {job.id for job in jobs}.union(*(named_jobs(job.spec) for job in jobs)))

    def plan(db):
        return [change for change in plan_apply(db, sources, prune)
                if change.change != "removed" or caller.sees(change.id)]

    changes, missing = _apply(request, store, plan, dry_run)
    return _changes_response(changes, warnings + missing, dry_run)


def _texts_of(body, source):
    """{source: text of a job file} of a body: one, or those of {"files": […]}."""
    try:
        given = json.loads(body.decode()).get("files")
    except (ValueError, RecursionError, AttributeError):
        given = None                    # a job file in YAML, or no JSON object
    texts = {"api" if source is None else source: body}
    if given is not None:
        if not isinstance(given, list) or not all(
                isinstance(file, dict) and set(file) == {"source", "text"}
                and all(isinstance(text, str) for text in file.values()) for file in given):
            raise Refusal(400, "bad_request", 'files is a list of {"source": …, "text": …}')
        texts = {file["source"]: file["text"] for file in given}
        if len(texts) != len(given) or source is not None:
            raise Refusal(400, "bad_request", "each of files has a source of its own")
    for name in texts:
        if not 1 <= len(name) <= 200 or not name.isprintable() or name.startswith("/"):
            raise Refusal(400, "bad_request", f'source: "{printable(name)}" cannot be a source; '
                          "write a name, not a path of this host")
    return texts


def _check_ids(sources):
    places = {}
    for source, jobs in sources.items():
        for job in jobs:
            if places.setdefault(job.id, source) != source:
                raise Refusal(422, "invalid", f'job "{job.id}" stands in {places[job.id]} and in '
                              f"{source}; remove one of them", errors=[])


def _check_seen(caller, job_ids):
    for job_id in sorted(job_ids):
        if not caller.sees(job_id):
            raise Refusal(403, "forbidden", f'job "{printable(job_id)}" is none of those that '
                          f"this token is about: {caller.pattern}")


def _read_or_refuse(read):
    try:
        return read()
    except Invalid as invalid:
        raise Refusal(422, "invalid", str(invalid), errors=[
            {name: getattr(problem, name) for name in problem.__slots__}
            for problem in invalid.problems]) from None


def _apply(request, store, plan, dry_run):
    """Carry out the [Change] that `plan(db)` gives -> what has, or would have, become of jobs, and
    sentences about jobs that they run, and that there are not."""
    with store.read() if dry_run else store.write() as db:
        before = {row["id"]: Job(json.loads(row["spec"])) for row in list_jobs(db)}
        try:
            changes = plan(db)
        except Taken as taken:
            raise Refusal(409, "source", str(taken)) from None
        except StartsItself as error:
            raise Refusal(422, "invalid", str(error), errors=[]) from None
        if not dry_run:
            perform_apply(db, changes, time.time(), request.caller.name)
        missing = missing_jobs(db, changes)
    if not dry_run:
        store.wake()
    return [{"id": change.id, "change": change.change, "diff": job_diff(
        before.get(change.id), change.job)} for change in changes], missing


def missing_jobs(db, changes):
    """Sentences about jobs that those of changes run, and that there are not."""
    jobs = [change.job for change in changes if change.job]
    ids = {*(job_ids(db) if db else ()), *(job.id for job in jobs)}
    return [text for job in jobs for text in check_references(job, ids)]


def _changes_response(changes, warnings, dry_run):
    return json_response({"changes": changes, "warnings": list(map(str, warnings)),
                          "dry_run": dry_run})


def _post_pause(request, store):
    """Pause the schedule of a job, for some time or until it is resumed."""
    request.options()
    given, until = _body_object(request, ("for", "until")), None
    try:
        if given.get("for") is not None:
            until = math.ceil(time.time() + parse_duration(given["for"]))
        elif given.get("until") is not None:
            until = parse_instant(given["until"], datetime.timezone.utc)
    except (ValueError, TypeError, AttributeError):
        raise Refusal(400, "bad_request", 'write {"for": "2h"}, or {"until": '
                      '"2025-08-01T02:00:00Z"}') from None
    return _paused(request, store, True, until)


def _post_resume(request, store):
    """Let the schedule of a job go on."""
    request.options()
    _body_object(request, ())
    return _paused(request, store, False, None)


def _paused(request, store, paused, until):
    with store.write() as db:
        pause_job(db, _asked_job(db, request)["id"], paused, until, request.caller.name)
    store.wake()
    with store.read() as db:
        return _job_response(db, _asked_job(db, request), request.caller)


# Runs.

def _post_run(request, store):
    """Start a run of a job."""
    request.options()
    given = _body_object(request, ("env", "params", "queue"))
    with store.read() as db:
        job = effective_job(db, _asked_job(db, request)["id"])
    env = _given_env(given, job, request.caller)
    if given.get("queue", False) not in (False, True):
        raise Refusal(400, "bad_request", "queue is true or false")
    return _start(request, store, job, given, trigger="api", env=env,
                  wait=given.get("queue", False))


def _post_retry(request, store):
    """Run again what a run ran; of a pipeline the steps that did not succeed, those from a step on,
    or all."""
    request.options()
    given = _body_object(request, ("env", "params", "from", "all"))
    first, everything = given.get("from"), given.get("all", False)
    if not isinstance(first, (str, type(None))) or everything not in (False, True):
        raise Refusal(400, "bad_request", "from is the id of a step, and all is true or false")
    with store.read() as db:
        run = _asked_run(db, request)
        try:
            run, first = whole_of(db, run, first)
            job = job_to_retry(db, run)
            steps = steps_to_retry(db, run, job, first, everything)
        except RoexecError as error:
            raise Refusal(409, "state", str(error)) from None
    env = {**json.loads(run["env"] or "{}"), **_given_env(given, job, request.caller)}
    return _start(request, store, job, given, trigger="retry", env=env, retry_of=run["id"], **steps)


def _start(request, store, job, given, **how):
    """Ask for a run, unless this has been asked for already with the same key -> the Response."""
    key, headers = _key_of(request, job.id), {}
    secret = [name for name, param in job.params.items() if param.secret]
    fingerprint = _digest((request.path, {name: {
        each: None if each in secret else text for each, text in value.items()}
        if isinstance(value, dict) else value for name, value in given.items()}))

    def note(db, run_id):
        if key is not None:
            keep_answer(db, key, fingerprint, run_id, time.time())

    try:
        run_id = request_run(store, job, note=note, by=request.caller.name, **how)
    except WrongParameters as error:
        raise Refusal(422, "invalid_params", str(error)) from None
    except Refused as refused:
        run = refused.run
        raise Refusal(409, "overlap", f'job "{job.id}" is {run["state"]} already: run {run["id"]}',
                      run=run["id"]) from None
    except Repeated as repeated:
        if not repeated.same:
            raise Refusal(422, "key_reused", "this Idempotency-Key was used for another request: "
                          f"run {repeated.run_id}", run=repeated.run_id, errors=[]) from None
        run_id, headers = repeated.run_id, {"Idempotency_Replayed": "true"}
    return _run_response(store, run_id, **headers)


def _run_response(store, run_id, **headers):
    """The Response that something is being done about a run."""
    with store.read() as db:
        run, = run_payloads(store, db, [get_run(db, run_id)])
    return json_response(run, 202, Location=f"/api/v1/runs/{run_id}", **headers)


_KEY = Pattern(r"[!-~]{1,255}")


def _key_of(request, job_id):
    """What the store keeps of the Idempotency-Key of a request, or None."""
    key = request.header("idempotency-key")
    if key is None:
        return None
    if not _KEY.fullmatch(key):
        raise Refusal(400, "bad_request", "an Idempotency-Key has 1 to 255 visible characters")
    return hashlib.blake2b(json.dumps([request.caller.name, job_id, key]).encode(),
                           digest_size=16).hexdigest()


def _post_cancel(request, store):
    """End a run, or withdraw one that is queued."""
    request.options()
    _body_object(request, ())
    with store.read() as db:
        run = _asked_run(db, request)
    try:
        cancel_run(store, run["id"], by=request.caller.name)
    except HasEnded as error:
        raise Refusal(409, "state", str(error)) from None
    return _run_response(store, run["id"])


def _body_object(request, keys):
    """The object that a body is; an empty body is an empty one. Raises Refusal."""
    body = request.body
    try:
        given = json.loads(body.decode()) if body.strip() else {}
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "bad_request", f"the body is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise Refusal(400, "bad_request", "the body is not an object"
                      + (f'; write {{"{keys[0]}": …}}' if keys else ""))
    for key in given:
        if key not in keys:
            raise Refusal(400, "bad_request", f'unknown key "{printable(key)}" in the body; there '
                          f"{'are' if keys[1:] else 'is'} {', '.join(keys) or 'none'}")
    return given


def _given_env(given, job, caller):
    """{name: value} that a body gives to a run, as far as somebody may; raises Refusal."""
    env, params = (given.get(name, {}) for name in ("env", "params"))
    for name, values in (("env", env), ("params", params)):
        if not isinstance(values, dict) or not all(
                isinstance(value, str) for value in values.values()):
            raise Refusal(400, "bad_request", f"{name} is an object whose values are strings: "
                          f'{{"{name}": {{"NAME": "value"}}}}')
    for name in params:
        if name not in job.params:
            raise Refusal(422, "invalid_params", f'params: job "{job.id}" has no '
                          f'"{printable(name)}"' + nearest(name, job.params))
    env = {**env, **params}
    try:                                        # names and values as a job may have them
        job_from_mapping({"id": "any", "command": "any", "env": env}, None)
    except Invalid as invalid:
        raise Refusal(400, "bad_request", "\n".join(
            f"{problem.path}: {problem.message}" for problem in invalid.problems)) from None
    refused = refused_variables(job, env, caller.may("job:write"))
    if refused:
        raise Refusal(403, "variable", f"env.{refused[0]}: the job does not "
                      + ("have it among its params, and it says how programs are loaded"
                         if LOADERS.fullmatch(refused[0]) else
                         "declare it, and only who may define jobs gives others"))
    return env


def _get_runs(request, store):
    """The runs, newest first."""
    options = request.options()
    limit = _whole_number(options, "limit", 1, _MOST_LISTED) or 50
    states, triggers = _states(options.get("state")), _words_of(options, "trigger", TRIGGERS)
    chosen = {"states": states, "job_id": options.get("job"), "parent": options.get("parent"),
              "since": _instant_option(options, "since"), "steps": _flag(options, "steps"),
              "until": _instant_option(options, "until"), "triggers": triggers}
    filters = ("runs", chosen, options.get("tag"))
    seen = _seen(options, filters)
    if seen is not None and not DIGITS.fullmatch(seen):
        raise _bad_cursor()
    with store.read() as db:
        rows = list_runs(db, run_filter(**chosen), limit + 1, before=seen and int(seen),
                         job_ids=_visible_jobs(db, request.caller, options.get("tag")))
        runs = run_payloads(store, db, rows[:limit])
    more = len(rows) > limit
    cursor = _cursor(rows[limit - 1]["seq"], filters) if more else None
    still = all(map(_is_still, runs))
    return json_response(page("runs", runs, cursor)).changed(until=math.inf if still else None)


def _is_still(run):
    """Whether the database alone says all about a run of a payload, and not a journal more."""
    return run["state"] in FINAL_STATES or run["state"] == "queued" and run["step"] is None


def _visible_jobs(db, caller, tag=None):
    """The ids of the jobs with a tag that somebody sees; None for all."""
    if tag is not None:
        return [job["id"] for job in job_payloads(db, list_jobs(db), time.time())
                if tag in job["tags"] and caller.sees(job["id"])]
    return None if caller.pattern is None else list(filter(caller.sees, seen_job_ids(db)))


def _states(text):
    """The states of a list with commas; `active` and `final` stand for several."""
    groups = {"active": ACTIVE_STATES, "final": FINAL_STATES}
    words = _words_of({"state": text}, "state", (*STATES, *groups))
    return sorted({state for word in words for state in groups.get(word, (word,))})


def _get_run(request, store):
    """A run."""
    request.options()
    with store.read() as db:
        run, = run_payloads(store, db, [_asked_run(db, request)])
    return json_response(run).changed(until=math.inf if _is_still(run) else None)


def _get_steps(request, store):
    """The steps of a run of a pipeline so far, those that a retry has taken over too, and the graph
    of all its steps: the ids of those that each depends on."""
    request.options()
    with store.read() as db:
        run = _asked_run(db, request)
        steps, spec = step_payloads(store, db, run), job_spec(db, run["job_id"], run["version"])
    graph = Job(json.loads(spec)).steps() if spec else {}
    return json_response({"steps": steps, "graph": {
        step: list(each.depends_on) for step, each in graph.items()}})


def _asked_run(db, request):
    """The row of the run in a path: its id, `latest`, a job's id or the beginning of the run's, as
    far as one sees it. What changes a run is given its id. Raises NoSuchRun."""
    target, caller = request.arguments[0], request.caller
    row, reads = find_run_row(db, target), request.method in ("GET", "HEAD")
    if row is None and reads:
        if target == "latest":
            row, = list_runs(db, run_filter(), 1, job_ids=_visible_jobs(db, caller)) or [None]
        elif caller.sees(target) or len(target) >= 4:
            with contextlib.suppress(NoSuchRun):
                row = find_run(db, target)
    if row is None or not caller.sees(row["job_id"]):
        raise NoSuchRun(f'there is no run {"or job " if reads else ""}"{printable(target)}"')
    return row


def _get_history(request, store):
    """The newest runs of several jobs, in brief."""
    options = request.options()
    limit = _whole_number(options, "limit", 1, _MOST_LISTED) or 20
    since, until = (_instant_option(options, name) for name in ("since", "until"))
    histories = {}
    with store.read() as db:
        for job_id in _job_list(options, _MOST_HISTORIES):
            if request.caller.sees(job_id):
                rows = list_runs(db, run_filter(job_id=job_id, since=since, until=until), limit + 1)
                histories[job_id] = {"runs": [brief_run_payload(row) for row in rows[:limit]],
                                     "more": len(rows) > limit}
    return json_response({"jobs": histories}).changed(until=math.inf)


def _job_list(options, most, name="jobs"):
    """The ids of jobs in a list with commas; raises Refusal for none, or for more than so many."""
    ids = list(dict.fromkeys(filter(None, options.get(name, "").split(","))))
    if not 1 <= len(ids) <= most:
        raise Refusal(400, "bad_request", f"{name}: give the ids of 1 to {most} jobs, with commas")
    return ids


# Tokens, and who has changed what.

def _get_tokens(request, store):
    """The tokens, by name."""
    options = request.options()
    limit = _whole_number(options, "limit", 1, _MOST_LISTED) or 50
    with store.read() as db:
        rows = list_tokens(db, after=_seen(options, ()) or "", limit=limit + 1)
    cursor = _cursor(rows[limit - 1]["name"], ()) if len(rows) > limit else None
    return json_response(page("tokens", list(map(token_payload, rows[:limit])), cursor))


def _get_token(request, store):
    """A token."""
    with store.read() as db:
        return json_response(token_payload(get_token(db, request.arguments[0])))


def _post_token(request, store):
    """Make a token; its text is in this answer alone."""
    spec = _body_object(request, ("name", "scopes", "role", "jobs", "expires"))
    now = time.time()
    try:
        token = token_of(spec, request.caller, now, datetime.timezone.utc)
    except ValueError as error:
        raise Refusal(422, "invalid_token_request", str(error)) from None
    with store.write() as db:
        text = add_token(db, token, request.caller, now)
    return _token_response(store, token["name"], text, 201)


def _token_response(store, name, text, status):
    """A token with its text, which this is the only answer to show."""
    with store.read() as db:
        payload = {**token_payload(get_token(db, name)), "token": text}
    return json_response(payload, status, Location=f"/api/v1/tokens/{name}")


def _rotate_token(request, store):
    """Give a token a new text, which is in this answer alone."""
    name, caller = request.arguments[0], request.caller
    with store.write() as db:
        row = get_token(db, name)
        missing = scope_to_give(caller, row["scopes"].split(","), row["pattern"])
        if missing:
            raise Refusal(403, "forbidden", f"token {name} has the scope {missing}, which "
                          f"{caller.name} does not have")
        text = renew_token(db, name, caller, time.time())
    return _token_response(store, name, text, 200)


def _delete_token(request, store):
    """Revoke a token."""
    with store.write() as db:
        remove_token(db, request.arguments[0], request.caller, time.time())
    return Response(status=204, headers={}, body=b"")


def _get_audit(request, store):
    """Who has changed what, newest first."""
    options = request.options()
    limit = _whole_number(options, "limit", 1, _MOST_LISTED) or 50
    seen = _seen(options, ())
    if seen is not None and not DIGITS.fullmatch(seen):
        raise _bad_cursor()
    with store.read() as db:
        rows = list_audit(db, limit + 1, seen and int(seen))
    cursor = _cursor(rows[limit - 1]["seq"], ()) if len(rows) > limit else None
    return json_response(page("audit", list(map(audit_payload, rows[:limit])), cursor))


# Parameters and cursors.

def _words_of(options, name, known):
    """The words, of those known, in a parameter that is a list with commas."""
    words = sorted(set(filter(None, (options.get(name) or "").split(","))))
    for word in set(words).difference(known):
        raise Refusal(400, "bad_request", f'{name}: "{printable(word)}" is not one of '
                      + ", ".join(known))
    return words


def _instant_option(options, name):
    """The seconds of an instant in a parameter, or None; without an offset it is in UTC."""
    text = options.get(name)
    try:
        return None if text is None else parse_instant(text, datetime.timezone.utc)
    except ValueError:
        raise Refusal(400, "bad_request", f'{name}: "{printable(text)}" is no instant; write for '
                      "example 2025-08-01T02:00:00Z") from None


def _whole_number(options, name, low, high):
    """The number that a parameter gives, or None; raises Refusal."""
    text = options.get(name)
    if text is None:
        return None
    if not DIGITS.fullmatch(text) or not low <= int(text) <= high:
        raise Refusal(400, "bad_request", f'{name}: "{printable(text)}" is not a number from '
                      f"{low} to {high}")
    return int(text)


def _flag(options, name):
    text = options.get(name, "0")
    if text not in ("0", "1"):
        raise Refusal(400, "bad_request", f'{name}: "{printable(text)}" is neither 0 nor 1')
    return text == "1"


def _cursor(last, filters):
    """Where a page ended: the last item, and a digest of the filters, for which alone it holds."""
    return _digest(filters) + str(last)


def _seen(options, filters):
    """What a cursor says was seen last, as text, or None without one; raises Refusal."""
    cursor = options.get("cursor")
    if cursor is not None and cursor[:8] != _digest(filters):
        raise _bad_cursor()
    return cursor and cursor[8:]


def _digest(filters):
    return hashlib.blake2b(json.dumps(filters).encode(), digest_size=4).hexdigest()


def _bad_cursor():
    return Refusal(400, "bad_request", "the cursor is not one of a list with these filters; begin "
                   "again without it")


# Logs.

def _get_log(request, store):
    """The log of a run, as text or as events: what there is now, or with `follow` until its end."""
    asked = _AskedLog(request)
    with store.read() as db:
        run = _asked_run(db, request)
    log = _find_log(store, run["id"])
    if asked.follow:
        end = log.extent(asked)[2] if log.ended else math.inf
        if asked.resumed and asked.offset >= end:
            return Response(status=204, headers={}, body=b"")
        return Response(status=200, type=asked.type, headers={}, feed=lambda lookout: (
            log.followed(asked, lookout)))
    begin, end, size = log.extent(asked)
    headers = {"Roexec-Next-Offset": str(end), "Roexec-Log-Size": str(size)}
    if asked.raw:
        headers.update(("Roexec-Gap", f"{first}-{last}") for first, last in log.gaps
                       if begin < last and first < end)
    return Response(status=200, type=asked.type, headers=headers,
                    stream=lambda: log.slice(asked, begin, end, size))


class _AskedLog:
    """Which lines of a log are asked for, and in which form. Raises Refusal."""

    def __init__(self, request):
        options, self.caller, self.told = request.options(), request.caller, False
        self.tail, self.offset = (_whole_number(options, name, 0, _MOST_BYTES)
                                  for name in ("tail", "offset"))
        self.limit = _whole_number(options, "limit", 1, _MOST_BYTES)
        if self.tail is not None and self.offset is not None:
            raise Refusal(400, "bad_request", "tail and offset exclude each other")
        self.stream = options.get("stream")
        if self.stream not in (None, "out", "err"):
            raise Refusal(400, "bad_request", f'stream: "{printable(self.stream)}" is neither out '
                          "nor err")
        self.follow, self.raw = _flag(options, "follow"), _flag(options, "raw")
        self.events = EVENT_STREAM in (request.header("accept") or "").lower()
        self.resumed = self.events and "last-event-id" in request.headers
        if self.events and self.raw or self.follow and self.limit is not None:
            raise Refusal(400, "bad_request", "raw is for text, and limit for what does not follow")
        if self.resumed:
            self.tail, self.offset = None, _last_event(request)

    @property
    def type(self):
        """The media type."""
        return EVENT_STREAM if self.events else "text/plain; charset=utf-8"

    def first(self, log):
        """The offset at which a StoredLog is read from."""
        return log.line_start(self.offset or 0) if self.tail is None else log.tail(self.tail)

    def form(self, lines):
        """The bytes to send of Lines."""
        if self.events:
            return _line_events(lines, self)
        return select_lines(self.seen(lines.data), self.raw, self.stream)

    def seen(self, data):
        """Of whole lines those that are not about jobs which the caller does not see; in the place
        of the first that is, a line says so."""
        return data if self.caller.pattern is None else _OF_A_JOB.sub(self._seen, data)

    def _seen(self, found):
        stamp, job_id, end = found.groups()
        if self.caller.sees(job_id.decode()):
            return found[0]
        told, self.told = self.told, True
        return b"" if told else b"%b [INFO] Lines about jobs other than %b are left out%b" % (
            stamp, self.caller.pattern.encode(), end)


# What a run says of runs of other jobs, in hooks and steps.
_OF_A_JOB = Pattern(rb"(?m)^(\S{20}) \[(?:INFO|ERROR)\] (?:Hook \w+: run|Running the job|"
                    rb"Run \w+ of the job) ([A-Za-z0-9._-]+)(?: .*)?(\n|$)")


def _last_event(request):
    """The id after which a client goes on."""
    text = request.header("last-event-id")
    if not DIGITS.fullmatch(text):
        raise Refusal(400, "bad_request", "the Last-Event-ID is no number")
    return int(text)


def _line_events(lines, asked):
    """Lines of a log as an event each, of those that are asked for."""
    if lines.is_gap:
        return event_bytes(b"gap", {"from": lines.begin, "to": lines.end}, lines.end)
    events, offset = [], lines.begin
    for line in lines.data.removesuffix(b"\n").split(b"\n"):
        offset += len(line) + 1
        line = asked.seen(line)
        payload = line and line_payload(log_line(line))
        if payload and asked.stream in (None, payload["stream"]):
            events.append(b"id: %d\ndata: %b\n\n" % (offset, json.dumps(payload).encode()))
    return b"".join(events)


def _find_log(store, run_id):
    """The log of a run, wherever it is at the moment."""
    with store.read() as db:
        row = get_run(db, run_id)
    path = row["log"]
    if path is None and row["state"] not in FINAL_STATES:
        path = live_log(store, row)
        if path is None:                # it may have ended in between
            with store.read() as db:
                row = get_run(db, run_id)
            path = row["log"]
    return _Log(store, row, path)


class _Log:
    """The log of a run at a path below the store's folder, which is None while there is none."""

    def __init__(self, store, row, path):
        self.store, self.run_id, self.path, self.state = store, row["id"], path, row["state"]
        self.ended, self.gaps = self.state in FINAL_STATES, []
        self.why = why_no_log(row)

    def open(self):
        """A StoredLog; raises Refusal where there is none."""
        if self.path is None:
            raise Refusal(404, "no_log", self.why)
        try:
            return StoredLog(self.store.file(self.path))
        except FileNotFoundError:
            raise Refusal(404, "no_log",
                          "the log of this run is not there (any more)") from None

    def extent(self, asked):
        """The offsets between which whole lines lie that are asked for, and that of the end."""
        with self.open() as log:
            size = log.end() if self.ended else log.tail(0)
            begin, end, self.gaps = min(asked.first(log), size), size, log.gaps()
            if asked.limit is not None:
                end = min(log.line_start(begin + asked.limit), size)
            return begin, end, size

    def slice(self, asked, begin, end, size):
        """The lines between two offsets, in chunks."""
        try:
            for lines in follow(self.store.file(self.path), offset=begin):
                if lines.begin >= end:
                    break
                data = lines.data if lines.is_gap else lines.data[:end - lines.begin]
                yield asked.form(lines.changed(data=data))
        except OSError as error:        # of the file, not of the client
            raise RoexecError(str(error)) from None
        if asked.events:
            yield event_bytes(b"window", {"next": end, "size": size, "state": self.state}, end)

    def followed(self, asked, lookout):
        """The lines until the run has ended; one that is queued is awaited. For Streams."""
        run = lookout.join(self.run_id)
        try:
            while run.log is None and not run.ended:
                yield lambda: run.log is not None or run.ended
            offset = run.log and asked.first(run.log)
            while run.log is not None:
                over = run.ended
                found = next_lines(run.log, offset, over, SHARE)
                for lines in found:
                    offset = lines.end
                    yield asked.form(lines)
                if not found and not run.log.refresh():
                    if over:
                        break
                    yield lambda: run.ended or run.end > offset
            if run.trouble:
                raise run.trouble
            if asked.events:
                yield event_bytes(b"end", run.outcome, offset or 0)
        finally:
            lookout.leave(run)


# Events.

def _get_events(request, store):
    """What becomes of jobs and runs from now on, or from the event after which a client goes on."""
    request.options()
    last = None if request.header("last-event-id") is None else _last_event(request)
    with store.read() as db:
        first, newest = event_span(db)
    known = last is not None and first - 1 <= last <= newest
    seen = last if known else newest
    return Response(status=200, type=EVENT_STREAM, headers={}, feed=lambda lookout: _events(
        lookout, request.caller, seen, reset=last is not None and not known))


def _events(lookout, caller, seen, reset):
    yield event_bytes(b"reset", {}, seen) if reset else b"id: %d\n\n" % seen
    while True:
        while lookout.newest <= seen:
            yield lambda: lookout.newest > seen
        found, last = lookout.events_after(seen)
        if found is None:
            yield event_bytes(b"reset", {}, last)
        else:
            wanted = [event for name, job_id, event in found if caller.sees(job_id)
                      and (name == "run" or caller.may("job:read"))]
            yield b"".join(wanted) + b"id: %d\n\n" % last
        seen = last


# Metrics.

def _get_metrics(request, store):
    """The metrics for Prometheus, where the configuration wants them."""
    request.options()
    with store.read() as db:
        settings = MetricsSettings((get_settings(db) or {}).get("metrics"))
        if not settings.enabled:
            raise Refusal(404, "not_found", "metrics are off; write metrics: {enabled: true} into "
                          "the configuration")
        samples = metric_samples(db, settings.max_jobs, time.time())
    lag = request.vitals.lag() if request.vitals else 0
    samples += [("roexec_scheduler_lag_seconds", {}, round(lag, 6)), ("roexec_leader", {}, 1)]
    return Response(status=200, type="text/plain; version=0.0.4; charset=utf-8", headers={},
                    body=metrics_text(samples).encode())


# The description of the API: OpenAPI 3.1, made of the routes and of what follows.

# Members of objects, `name:type`; `[]` behind a type is a list of it, `?` says that it may be null.
# All of an answer are there; of what is sent none has to be.
_MEMBERS = {
    "Health": "status:text",
    "Me": "name:text owner:boolean jobs:text? scopes:text[] now:instant version:text node:text "
          "timezone:text",
    "Notice": "kind:text run:text? title:text? state:text tries:integer error:text? "
              "created_at:instant next_try:instant?",
    "Status": "store:text? process:integer? health:text jobs:integer running:integer "
              "queued:integer warnings:text[] unsent_notices:Notice[]",
    "LastRun": "id:text state:state started_at:instant? finished_at:instant?",
    "Job": "id:text name:text? schedule:text[] words:text[] timezone:text enabled:boolean "
           "paused:boolean paused_until:instant? next_run:instant? last_run:LastRun? usual:number? "
           "tags:text[] source:text? version:integer active:text?",
    "JobPage": "jobs:Job[] next:text?",
    "Attempt": "number:integer started_at:instant? finished_at:instant? exit_code:integer? "
               "signal:text? cpu_seconds:number? max_rss_bytes:integer? output_bytes:integer?",
    "Run": "id:text job_id:text step:text? parent:text? retry_of:text? name:text? trigger:text "
           "slot:instant? last_slot:instant? count:integer state:state reason:text? message:text? "
           "queued_at:instant started_at:instant? finished_at:instant? duration:number? "
           "exit_code:integer? signal:text? attempts:Attempt[] retry_at:instant? progress:any "
           "node:text? log:text?",
    "RunPage": "runs:Run[] next:text?",
    "Steps": "steps:Run[] graph:any",
    "BriefRun": "id:text job_id:text step:text? parent:text? trigger:text state:state reason:text? "
                "message:text? exit_code:integer? signal:text? slot:instant? "
                "last_slot:instant? count:integer queued_at:instant "
                "started_at:instant? finished_at:instant? duration:number?",
    "RunsOfJob": "runs:BriefRun[] more:boolean",
    "History": "jobs:RunsOfJob{}",
    "Slot": "job_id:text slot:instant local:text schedule:text? mark:text?",
    "NextOfJob": "slots:Slot[] enabled:boolean paused:boolean paused_until:instant?",
    "Next": "slots:Slot[]",
    "Reason": "reason:text",
    "Answer": "slot:instant? local:text? mark:text? why:Reason[]",
    "Explanation": "job_id:text answers:Answer[]",
    "Change": "id:text change:change diff:text?",
    "Changes": "changes:Change[] warnings:text[] dry_run:boolean",
    "Token": "name:text scopes:text[] jobs:text? created_at:instant expires_at:instant? "
             "last_used_at:instant?",
    "NewToken": "name:text scopes:text[] jobs:text? created_at:instant expires_at:instant? "
                "last_used_at:instant? token:text",
    "TokenPage": "tokens:Token[] next:text?",
    "Audit": "at:instant who:text action:text job_id:text? target:text? detail:text?",
    "AuditPage": "audit:Audit[] next:text?",
    "Problem": "file:text path:text? line:integer? column:integer? message:text",
    "ErrorText": "code:text message:text",
    "Error": "error:ErrorText",
    "InvalidText": "code:text message:text errors:Problem[]",
    "InvalidError": "error:InvalidText",
}
_REQUESTS = {
    "RunRequest": "env:text{} params:text{} queue:boolean",
    "RetryRequest": "env:text{} params:text{} from:text all:boolean",
    "PauseRequest": "for:text until:instant",
    "EmptyRequest": "",
    "TokenRequest": "name:text scopes:text[] role:text jobs:text expires:text",
    "JobFile": "",                      # a job or a file of jobs, as the README describes them
}
_KINDS = {
    "text": {"type": "string"}, "number": {"type": "number"}, "integer": {"type": "integer"},
    "boolean": {"type": "boolean"}, "any": {},
    "instant": {"type": "string", "format": "date-time",
                "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$"},
    "state": {"type": "string", "enum": list(STATES)},
    "change": {"type": "string", "enum": ["added", "changed", "unchanged", "removed"]}}
_SAMPLES = {"text": "backup-db", "number": 12.5, "integer": 1, "boolean": False, "any": None,
            "instant": "2025-08-01T02:00:00Z", "state": "succeeded", "change": "added"}


def _whole(low, high):
    return {"type": "integer", "minimum": low, "maximum": high}


# Kinds of parameters: a description, a schema, an example.
_PARAMETERS = {
    "text": ("which one", {"type": "string"}, "backup-db"),
    "limit": ("how many at most", _whole(1, _MOST_LISTED), 50),
    "count": ("how many (10)", _whole(1, _MOST_LISTED), 5),
    "each": ("how many of each job", _whole(1, _MOST_LISTED), 5),
    "cursor": ("`next` of the page before", {"type": "string"}, None),
    "brief": ("without `spec`", {"type": "string", "enum": ["0", "1"]}, "1"),
    "tag": ("of jobs with this tag", {"type": "string"}, "nightly"),
    "job_states": ("words with commas: " + " ".join(_JOB_STATES), {"type": "string"}, "paused"),
    "state": ("states with commas; active and final stand for several", {"type": "string"},
              "failed,lost"),
    "trigger": ("words with commas: " + " ".join(TRIGGERS), {"type": "string"}, "manual,api"),
    "job": ("the id of a job", {"type": "string"}, "backup-db"),
    "jobs": ("ids of jobs with commas", {"type": "string"}, "backup-db,hello"),
    "ids": ("these jobs, with commas", {"type": "string"}, "backup-db,hello"),
    "parent": ("the steps of this run", {"type": "string"}, "abcd123456"),
    "steps": ("also the steps of pipelines", {"type": "string", "enum": ["0", "1"]}, "1"),
    "since": ("queued at or after this instant", {"type": "string"}, "2025-08-01T00:00:00Z"),
    "until": ("queued before this instant", {"type": "string"}, "2025-08-02T00:00:00Z"),
    "from": ("from this instant on (now)", {"type": "string"}, "2025-08-01T00:00:00Z"),
    "to": ("before this instant", {"type": "string"}, "2025-08-02T00:00:00Z"),
    "duration": ("let each run take as long, not as usual", {"type": "string"}, "10m"),
    "at": ("an instant; without an offset in the zone of the job", {"type": "string"},
           "2025-08-01T02:00"),
    "dry_run": ("change nothing", {"type": "string", "enum": ["0", "1"]}, "1"),
    "prune": ("remove the jobs of the source that are not given", {"type": "string",
                                                                   "enum": ["0", "1"]}, "1"),
    "source": ("where the jobs come from (api)", {"type": "string"}, "ci"),
    "offset": ("bytes of the log before what is wanted", _whole(0, _MOST_BYTES), 0),
    "tail": ("the last lines", _whole(0, _MOST_BYTES), 20),
    "bytes": ("bytes to look at, to the end of a line", _whole(1, _MOST_BYTES), 65536),
    "stream": ("of one stream alone", {"type": "string", "enum": ["out", "err"]}, "err"),
    "raw": ("the output as it was", {"type": "string", "enum": ["0", "1"]}, "1"),
    "follow": ("go on until the run ends", {"type": "string", "enum": ["0", "1"]}, "1"),
    "Idempotency-Key": ("the same request is carried out once in 24 hours",
                        {"type": "string", "minLength": 1, "maxLength": 255}, "deploy-4711"),
    "If-Match": ("the version that is meant", {"type": "string"}, '"3"'),
    "If-None-Match": ("`*`: only if there is none", {"type": "string"}, None),
    "Last-Event-ID": ("go on behind this event", _whole(0, _MOST_BYTES), None)}

_STATUSES = {200: "done", 201: "made", 202: "under way", 204: "done, or over", 304: "as you know",
             400: "malformed", 401: "a token is needed", 403: "not for this caller",
             404: "there is none, as far as the caller sees", 409: "not in this state",
             411: "the length is missing", 412: "another version", 413: "too large",
             421: "not a name of this server", 422: "invalid", 503: "try again later"}


def _schema_of(kind):
    """The schema of a type as _MEMBERS has it."""
    if kind.endswith("?"):
        return {"anyOf": [_schema_of(kind[:-1]), {"type": "null"}]}
    if kind.endswith("[]"):
        return {"type": "array", "items": _schema_of(kind[:-2])}
    if kind.endswith("{}"):
        return {"type": "object", "additionalProperties": _schema_of(kind[:-2])}
    return _KINDS[kind] if kind in _KINDS else {"$ref": f"#/components/schemas/{kind}"}


def _object_schema(members, required):
    pairs = [member.split(":") for member in members.split()]
    schema = {"type": "object", "properties": {name: _schema_of(kind) for name, kind in pairs}}
    return {**schema, "required": [name for name, _ in pairs]} if required else schema


def _sample(kind):
    """An example of a type."""
    bare = kind.rstrip("?")
    if bare.endswith("[]"):
        return [_sample(bare[:-2])]
    if bare.endswith("{}"):
        return {"NAME" if bare == "text{}" else "backup-db": _sample(bare[:-2])}
    if bare in _SAMPLES:
        return _SAMPLES[bare]
    return {name: _sample(inner) for name, inner in (
        member.split(":") for member in {**_MEMBERS, **_REQUESTS}[bare].split())}


_FILE_SAMPLES = {"apply": {"jobs": [{"id": "hello", "schedule": "@daily", "command": "echo"}]},
                 "jobs": {"schedule": "@daily", "command": "echo"}}


def _get_openapi(request, store):
    """This description."""
    request.options()
    schemas = {name: _object_schema(members, True) for name, members in _MEMBERS.items()}
    schemas.update((name, _object_schema(members, False)) for name, members in _REQUESTS.items())
    paths = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return json_response({
        "openapi": "3.1.0",
        "info": {"title": "roexec", "version": __version__, "license": {
            "name": "MIT", "identifier": "MIT"}},
        "paths": paths, "components": {"schemas": schemas, "securitySchemes": {
            "bearer": {"type": "http", "scheme": "bearer"},
            "basic": {"type": "http", "scheme": "basic"}}}}).changed(until=math.inf)


def _operation(route):
    """What OpenAPI says of a route."""
    operation = {
        "operationId": route.handler.__name__.strip("_"),
        "summary": " ".join((route.handler.__doc__ or "").split()),
        "description": f"Scope: {route.scope}",
        "security": [] if route.scope in (OPEN, PAGE) else [{"bearer": []}, {"basic": []}, {}],
        "parameters": [_parameter(*parameter) for parameter in route.named_parameters()],
        "responses": {str(status): answer for status, answer in _responses(route)}}
    if route.body is not None:
        sample = _FILE_SAMPLES[route.path.split("/")[3]] if route.body == "JobFile" else _sample(
            route.body)
        content = {"schema": _schema_of(route.body), "example": sample}
        media = ["application/json"] + ["application/yaml"] * (route.body == "JobFile")
        operation["requestBody"] = {"required": route.body == "JobFile",
                                    "content": dict.fromkeys(media, content)}
    return operation


def _parameter(name, place, kind):
    text, schema, example = _PARAMETERS[kind]
    told = {"name": name, "in": place, "description": text, "schema": schema}
    if place == "path":
        told["required"] = True
    return told if example is None else {**told, "example": example}


def _responses(route):
    """(status, what OpenAPI says of it) of a route: what it declares, and what any may answer."""
    declared = [answer.partition(":")[::2] for answer in route.answers]
    answers = {int(status): what for status, what in declared}
    common = [400, 401, 403, 413, 421, 503]
    common += [404] * ("{" in route.path) + [304] * (route.method == "GET")
    common += [411] * (route.body is not None)
    for status in sorted({*answers, *common}):
        answer = {"description": _STATUSES[status]}
        kinds = (answers.get(status) or ("" if status in (204, 304) else "Error")).split(",")
        content = {kind if "/" in kind else "application/json": {} if "/" in kind else {
            "schema": _schema_of(kind), "example": _sample(kind)} for kind in kinds if kind}
        yield status, {**answer, "content": content} if content else answer


# The routes.

class Route(Value):
    """A method and a path, in which `{…}` is an argument; the scope needed; the function; what is
    told of it: the names of its `parameters`, its `body` and its `answers`; the `parts` of the
    path, with `{}` for each argument."""
    __slots__ = ("method", "path", "scope", "handler", "parameters", "body", "answers",
                 "parts")

    def __init__(self, path="", **more):
        parts = ["{}" if part[:1] == "{" else part for part in path.split("/")]
        super().__init__(**{**more, "path": path, "parts": parts})

    def named_parameters(self):
        """(name, query, header or path, its kind) of each parameter."""
        for name in re.findall(r"{(\w+)}", self.path):
            yield name, "path", "text"
        for name in self.parameters:
            name, _, kind = name.partition(":")
            yield name, "header" if name[0].isupper() else "query", kind or name


def _route(text, handler):
    """The Route of a line `METHOD PATH scope parameters < body -> answers`."""
    asked, _, answers = text.partition(" -> ")
    asked, _, body = asked.partition(" < ")
    method, path, scope, *parameters = asked.split()
    return Route(method=method, path=path, scope=scope, handler=handler,
                 parameters=parameters, body=body or None, answers=answers.split())


ROUTES = tuple(_route(text, handler) for text, handler in (
    ("GET / page -> 200:text/html", _get_page),
    ("GET /api/v1/health open -> 200:Health 503", _get_health),
    ("GET /api/v1/me any -> 200:Me", _get_me),
    ("GET /api/v1/status job:read -> 200:Status", _get_status),
    ("GET /api/v1/openapi.json any -> 200:any", _get_openapi),
    ("GET /api/v1/jobs job:read limit cursor tag state:job_states brief ids -> 200:JobPage",
     _get_jobs),
    ("GET /api/v1/jobs/{id} job:read -> 200:Job", _get_job),
    ("PUT /api/v1/jobs/{id} job:write dry_run If-Match If-None-Match < JobFile -> "
     "200:Changes 201:Changes 409 412 422:InvalidError", _put_one_job),
    ("DELETE /api/v1/jobs/{id} job:write dry_run If-Match If-None-Match -> 200:Changes "
     "412", _delete_one_job),
    ("POST /api/v1/jobs/{id}/run run:create Idempotency-Key < RunRequest -> 202:Run "
     "409 422", _post_run),
    ("POST /api/v1/jobs/{id}/pause job:pause < PauseRequest -> 200:Job", _post_pause),
    ("POST /api/v1/jobs/{id}/resume job:pause < EmptyRequest -> 200:Job", _post_resume),
    ("GET /api/v1/jobs/{id}/next job:read from count -> 200:NextOfJob", _get_next_of_job),
    ("GET /api/v1/jobs/{id}/why job:read at -> 200:Explanation", _get_why),
    ("GET /api/v1/next job:read jobs from to count each duration -> 200:Next", _get_next),
    ("POST /api/v1/apply job:write source prune dry_run < JobFile -> 200:Changes 409 "
     "422:InvalidError", _post_apply),
    ("GET /api/v1/export job:write jobs -> 200:JobFile,application/yaml 404", _get_export),
    ("GET /api/v1/runs run:list limit cursor state job tag trigger since until parent "
     "steps -> 200:RunPage", _get_runs),
    ("GET /api/v1/history run:list jobs since until limit -> 200:History", _get_history),
    ("GET /api/v1/runs/{id} run:list -> 200:Run", _get_run),
    ("GET /api/v1/runs/{id}/steps run:list -> 200:Steps", _get_steps),
    ("POST /api/v1/runs/{id}/cancel run:cancel < EmptyRequest -> 202:Run 409", _post_cancel),
    ("POST /api/v1/runs/{id}/retry run:create Idempotency-Key < RetryRequest -> "
     "202:Run 409 422", _post_retry),
    ("GET /api/v1/runs/{id}/logs log:read offset tail limit:bytes stream raw follow "
     "Last-Event-ID -> 200:text/plain,text/event-stream 204", _get_log),
    ("GET /api/v1/events run:list Last-Event-ID -> 200:text/event-stream", _get_events),
    ("GET /api/v1/tokens token:admin limit cursor -> 200:TokenPage", _get_tokens),
    ("POST /api/v1/tokens token:admin < TokenRequest -> 201:NewToken 409 422", _post_token),
    ("GET /api/v1/tokens/{name} token:admin -> 200:Token", _get_token),
    ("DELETE /api/v1/tokens/{name} token:admin -> 204", _delete_token),
    ("POST /api/v1/tokens/{name}/rotate token:admin < EmptyRequest -> 200:NewToken",
     _rotate_token),
    ("GET /api/v1/audit token:admin limit cursor -> 200:AuditPage", _get_audit),
    ("GET /metrics metrics:read -> 200:text/plain 404", _get_metrics)))


def check_routes(routes):
    """Raise ValueError for a route that does not say who may use it."""
    for route in routes:
        if route.scope not in (OPEN, PAGE, ANY, *SCOPES):
            raise ValueError(f"{route.method} {route.path} has no scope")


def find_routes(path):
    """{method: Route} of a path, HEAD for each GET, and the arguments in the path."""
    parts, found, arguments = path.split("/"), {}, ()
    for route in ROUTES:
        wanted = route.parts
        if len(wanted) == len(parts) and wanted[-1] in ("{}", parts[-1]) and all(
                want == part or want == "{}" and part
                for want, part in zip(wanted[1:], parts[1:])):
            found[route.method] = route
            arguments = tuple(unquoted(part) for want, part in zip(wanted, parts) if want == "{}")
    if "GET" in found:
        found["HEAD"] = found["GET"]
    return found, arguments


NO_ROUTE = "there is nothing of this name here"


def admitted(request, place):
    """The Route of a request that may pass the gate; its arguments are put into the request."""
    routes, request.arguments = find_routes(request.path)
    route = routes.get(request.method)
    request.caller = gate(route and route.scope, request, place)
    allowed = ", ".join(sorted({*routes, "OPTIONS"}))
    if routes and request.method == "OPTIONS":
        return Route(handler=lambda request, store: Response(
            status=204, headers={"Allow": allowed}, body=b""))
    if route is None and routes:
        raise Refusal(405, "method_not_allowed", f"{request.path} knows {allowed} only",
                      headers={"Allow": allowed})
    if route is None:
        raise Refusal(404, "not_found", NO_ROUTE)
    if request.header("expect") not in (None, "100-continue"):
        raise Refusal(417, "expectation_failed", "only 100-continue can be expected")
    return route


def refusal_of(error):
    """The Refusal that a RoexecError means."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, (NoSuchJob, NoSuchRun, NoSuchToken)):
        return Refusal(404, "not_found", str(error))
    if isinstance(error, Exists):
        return Refusal(409, "exists", str(error))
    return Refusal(503, "unavailable", str(error))


def answer(route, request, store, say):
    """The Response of a route to a request that was read whole; never raises."""
    if request.method not in ("GET", "HEAD"):
        return _answered(route, request, store, say)
    memo, version, response = store.memo, None, None
    caller = request.caller
    key = (request.path, request.query, caller.name, caller.scopes, caller.pattern,
           _takes_gzip(request))
    if memo is not None:
        response = memo.get(key, time.time())
        version = None if response else memo.version()
    if response is None:
        response = _finished(_answered(route, request, store, say), request)
        if response.until is not None and memo is not None:
            memo.keep(key, version, response, response.until, len(response.body))
    return _unless_known(response, request)


def _answered(route, request, store, say):
    request.route = route
    try:
        return route.handler(request, store)
    except RoexecError as error:
        return refusal_of(error).response()
    except OSError as error:            # a log that is damaged, say
        say(f"{request.method} {request.path}: {error}", "ERROR")
        return Refusal(503, "unavailable", error.strerror or "a file cannot be read").response()
    except Exception:
        import traceback
        say(f"{request.method} {request.path} failed: {traceback.format_exc()}", "ERROR")
        return Refusal(500, "internal", "roexec has a defect here; see the server's log").response()


def _takes_gzip(request):
    """Whether an answer may be compressed (RFC 9110, 12.5.3)."""
    for part in (request.header("accept-encoding") or "").lower().split(","):
        name, _, weight = part.replace(" ", "").partition(";q=")
        if name == "gzip":
            return weight.strip("0.") != "" or not weight
    return False


def _finished(response, request):
    """The Response with a tag that tells its content from others, compressed where that pays."""
    if response.status != 200 or response.body is None or "ETag" in response.headers:
        return response
    body, headers = response.body, dict(response.headers)
    if len(body) >= _LARGE_BODY:
        headers["Vary"] = "Accept-Encoding"
        if _takes_gzip(request):
            import gzip
            body, headers["Content-Encoding"] = gzip.compress(body, 6, mtime=0), "gzip"
    headers["ETag"] = f'"{hashlib.blake2b(body, digest_size=10).hexdigest()}"'
    return response.changed(body=body, headers=headers)


def _unless_known(response, request):
    """The Response, or a short one where the client has that content already (RFC 9110, 13.1.2)."""
    known, tag = request.header("if-none-match"), response.headers.get("ETag")
    if known is None or tag is None or response.status != 200:
        return response
    tags = [each.strip().removeprefix("W/") for each in known.split(",")]
    return response.changed(status=304, body=b"") if tag in tags or "*" in tags else response


# ==== 26 http =====================================================================================
# The sockets of HTTP: connections, their limits, TLS, how an answer goes out. Whatever a client
# does, it can hold a thread or memory for a bounded time and size. Heads are read here and not by
# http.server, which takes bare line feeds, folded lines and repeated lengths, and has no limit in
# time.

_MOST_CONNECTIONS = 1024
_OF_ONE_PEER = 128              # connections of one address elsewhere
_FOR_THE_OWNER = 64             # connections that nobody but the owner gets
_HEAD_TIME = 10                 # seconds from the first byte of a head to its last
_IDLE_TIME = 30                 # seconds of waiting for a request, for its body, or for a reader
_LINGER_TIME = 1                # seconds of listening to a client that was refused
_CLOSING_TIME = 2               # seconds that open requests have when the server ends


class _Connection:
    """One connection, in a thread of its own; mixed into http.server.BaseHTTPRequestHandler."""
    protocol_version = request_version = "HTTP/1.1"
    wbufsize = -1                       # without these two each answer takes 40 ms: the rest of it
    disable_nagle_algorithm = True      # waits for an acknowledgement that is delayed

    def setup(self):
        super().setup()
        self.buffer = bytearray()       # what was received and belongs to no request yet
        self.users = []                 # who is at the other end, found out once
        access, port = self.server.access, self.connection.getsockname()[1]
        self.place = Place(port=port, name=access.name, hosts=access.hosts, owner=self.owner,
                           token=self.server.find_token)

    def handle(self):
        with contextlib.suppress(OSError):      # it has gone already, or cannot speak TLS
            self.setup_tls()
            super().handle()

    def setup_tls(self):
        """Shake hands, in this thread, since a client may take its time."""
        if hasattr(self.connection, "do_handshake"):
            self.connection.settimeout(_HEAD_TIME)
            self.connection.do_handshake()

    def finish(self):
        for file in (self.wfile, self.rfile):
            with contextlib.suppress(OSError):      # what is left to be sent, nobody reads
                file.close()

    def owner(self):
        """The name of the local user at the other end who is let in without a token, or None."""
        if not self.users:
            access = self.server.access
            self.users.append(local_user(self.connection, access.uids) if access.owner else None)
        return self.users[0]

    def handle_one_request(self):
        self.close_connection = True
        request, unread = None, True
        try:
            head = self.read_head()
            if head is None:
                return
            request = parse_head(head)
            self.close_connection = not request.keeps
            route = admitted(request, self.place)
            self.read_body(request)
            unread, request.vitals = False, self.server.vitals
            request.warnings = self.server.warnings
            response = answer(route, request, self.server.store, self.server.say)
            if response.feed is not None and not self.server.streams.has_place_for(
                    self.follower(request)):
                raise Refusal(503, "busy", "too many clients follow something; try again later",
                              headers={"Retry_After": "5"})
            self.close_connection = self.close_connection or response.feed is not None
        except RoexecError as error:
            refusal = refusal_of(error)
            self.slow_down(refusal)
            response = refusal.response()
        except OSError:                 # it has gone, or takes too long
            self.close_connection = True
            return
        self.send(request, response, unread and (request is None or request.length > 0))

    def follower(self, request):
        """Whose a stream is: an address elsewhere, here the name of a token; None: the owner's."""
        caller = request.caller
        return self.server.connections.get(self.request) or (None if caller.owner else caller.name)

    def slow_down(self, refusal):
        """Let whoever bears a wrong token wait."""
        if refusal.code == BAD_TOKEN:
            time.sleep(self.server.failures.note(self.server.connections.get(self.request),
                                                 time.monotonic()))

    def receive(self, deadline):
        """Wait for more -> whether there is more; raises OSError, socket.timeout among them."""
        self.connection.settimeout(max(0.001, deadline - time.monotonic()))
        data = self.connection.recv(1 << 16)
        self.buffer += data
        return bool(data)

    def read_head(self):
        """The bytes of the next head; None where no further request comes."""
        if not self.buffer and not self.receive(time.monotonic() + _IDLE_TIME):
            return None
        deadline = time.monotonic() + _HEAD_TIME
        while True:
            end = self.buffer.find(b"\r\n\r\n", 0, MOST_HEAD)
            if end >= 0:
                head = bytes(self.buffer[:end])
                del self.buffer[:end + 4]
                return head
            if b"\n\n" in self.buffer:
                raise Refusal(400, "bad_request", "lines of a head end with CR LF")
            if len(self.buffer) >= MOST_HEAD:
                raise Refusal(431, "head_too_large",
                              f"the head of a request has at most {MOST_HEAD} bytes")
            try:
                if not self.receive(deadline):
                    return None
            except socket.timeout:
                raise Refusal(408, "timeout", "the head of the request took too long") from None

    def read_body(self, request):
        """Put the body into a request; raises OSError where it does not come in time."""
        deadline = time.monotonic() + _IDLE_TIME
        if request.header("expect") and len(self.buffer) < request.length:
            self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        while len(self.buffer) < request.length:
            if not self.receive(deadline):
                raise ConnectionAbortedError
        request.body = bytes(self.buffer[:request.length])
        del self.buffer[:request.length]

    def send(self, request, response, unread):
        """Write an answer; `unread` says that more of the request may come, which is dropped."""
        self.close_connection = self.close_connection or unread
        try:
            self.connection.settimeout(_IDLE_TIME)
            streamed = response.stream is not None or response.feed is not None
            chunked = streamed and request.version == 1
            head = self.head_of(response, chunked)
            if request is not None and request.method == "HEAD":
                self.wfile.write(head)
            else:                       # in one piece: each costs a call of the system
                self.wfile.write(head + (response.body or b""))
                if response.stream is not None:
                    self.send_stream(request, response, chunked)
            self.wfile.flush()
            if response.feed is not None and request.method != "HEAD":
                self.server.streams.add(self.connection, self.follower(request), request, response,
                                        lambda: admitted(request, self.place))
            if unread:
                self.linger()
        except OSError:                 # nobody reads it
            self.close_connection = True

    def head_of(self, response, chunked):
        """The bytes of the head of an answer."""
        headers = {"Server": "roexec", "Date": self.server.date(),
                   "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store",
                   **response.headers}
        if response.type:
            headers["Content-Type"] = response.type
        if chunked:
            headers["Transfer-Encoding"] = "chunked"
        elif response.body is not None and response.status not in (204, 304):   # RFC 9110, 8.6
            headers["Content-Length"] = str(len(response.body))
        if self.close_connection:
            headers["Connection"] = "close"
        lines = [f"HTTP/1.1 {response.status} {self.responses[response.status][0]}",
                 *map(": ".join, headers.items()), "", ""]
        return "\r\n".join(lines).encode("latin-1")

    def send_stream(self, request, response, chunked):
        self.wfile.flush()
        try:
            for data in filter(None, response.stream()):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)
                self.wfile.flush()
        except RoexecError as error:    # too late for an error: a stream without its end says it
            self.server.say(f"{request.path} ends early: {error}", "ERROR")
            raise ConnectionAbortedError from None
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def linger(self):
        """Drop what still comes: closing now would be a reset, which can take the answer away."""
        deadline = time.monotonic() + _LINGER_TIME
        self.connection.shutdown(socket.SHUT_WR)
        while time.monotonic() < deadline and self.receive(deadline):
            self.buffer.clear()


class _Server:
    """The listening socket and its connections; mixed into socketserver.ThreadingTCPServer."""
    allow_reuse_address, daemon_threads, block_on_close = True, True, False
    request_queue_size = 128

    vitals = None                       # of the scheduler of the same process
    warnings = list                     # a function that gives texts on what is wrong with the host
    dated = None, None

    def start(self, store, access, say):
        """Serve from now on, in threads that no signal of the process reaches."""
        self.store, self.access, self.say = store, access, say
        self.address = self.server_address[:2]
        self.connections, self.changed = {}, threading.Condition()      # {socket: its peer}
        self.failures, self.uses, self.noted = Failures(), {}, -math.inf
        store.memo = Memo(store)
        self.streams = Streams(store, say, super().shutdown_request)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            threading.Thread(target=self.serve_forever, args=(5,), name="http",
                             daemon=True).start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def admit(self, settings):
        """Let in who is to come in by other settings; raises RoexecError, and the old ones stay."""
        self.access = Access(settings, self.say)

    def find_token(self, text):
        """The row of the token with this text, or None."""
        now, memo, key = time.time(), self.store.memo, ("token", text)
        row = memo and memo.get(key, now)
        if row is None:
            version = memo and memo.version()
            with self.store.read() as db:
                row = find_token(db, text, now)
            if row is not None and memo:
                memo.keep(key, version, row, row["expires_at"] or math.inf)
        if row is not None:
            self.uses[row["name"]] = now
        return row

    def note_uses(self):
        """Keep when tokens were used, now and then: a commit for each request would be too many."""
        if self.uses and time.monotonic() - self.noted > _NOTE_TIME:
            self.noted = time.monotonic()
            uses, self.uses = self.uses, {}
            with self.store.write() as db:
                note_token_uses(db, uses)

    def date(self):
        """The header Date of answers in this second."""
        now = int(time.time())
        second, text = self.dated
        if second != now:
            from email.utils import formatdate
            text = formatdate(now, usegmt=True)
            self.dated = now, text
        return text

    def get_request(self):
        try:
            connection, address = super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                time.sleep(0.1)         # it stays there, and would be tried again at once
            raise
        context = self.access.context()
        if context is not None:
            connection = context.wrap_socket(connection, server_side=True,
                                             do_handshake_on_connect=False)
        return connection, address

    def process_request(self, request, client_address):
        peer = _peer(client_address)
        with self.changed:
            placed = self.has_place_for(request, peer)
            if placed:
                self.connections[request] = peer
        if not placed:
            request.setblocking(False)
            with contextlib.suppress(OSError):
                request.send(b"HTTP/1.1 503 Service Unavailable\r\nServer: roexec\r\n"
                             b"Content-Length: 0\r\nRetry-After: 5\r\nConnection: close\r\n\r\n")
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def has_place_for(self, connection, peer):
        """Whether one more connection can be served; the last places are for the owner."""
        free = _MOST_CONNECTIONS - len(self.connections)
        if peer is not None:
            of_peer = sum(other == peer for other in self.connections.values())
            return free > _FOR_THE_OWNER and of_peer < _OF_ONE_PEER
        owner = self.access.owner and free > 0
        return free > _FOR_THE_OWNER or owner and bool(local_user(connection, self.access.uids))

    def shutdown_request(self, request):
        if request not in self.streams.taken:
            super().shutdown_request(request)
        with self.changed:
            self.connections.pop(request, None)
            self.changed.notify_all()

    def handle_error(self, request, client_address):
        import traceback
        self.say(f"a connection of {client_address[0]} failed: {traceback.format_exc()}", "ERROR")

    def close(self):
        """Stop accepting, and give open requests a moment to be answered."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)      # wakes the thread that accepts
        self.shutdown()
        self.server_close()
        with self.changed:
            for connection in self.connections:         # each ends after what it does now
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RD)
            self.changed.wait_for(lambda: not self.connections, _CLOSING_TIME)
        self.streams.close()
        self.store.memo.close()


_NOTE_TIME = 60         # seconds between writes of when tokens were used


def _peer(address):
    """Who counts as one peer: an IPv4 address, or a network of IPv6, where everybody has many; None
    for this host, on which everybody has the same."""
    packed = packed_end(address)[0]
    return None if is_loopback(packed) else packed[:8]


class Access:
    """Who may come in, of the `server` of a Config: `hosts`, `owner` and `uids` of local users; and
    the `name` of this host.

    Raises RoexecError for a user that does not exist, and for certificates that cannot be used.
    """

    def __init__(self, settings, say):
        self.hosts, self.owner = settings.hosts, settings.auth.owner
        self.name = socket.gethostname().lower()
        self.uids = tuple(map(_uid_of, settings.auth.local_users))
        self.tls, self.say, self.look, self.kept = settings.tls, say, None, None
        if self.tls is not None:
            self.kept, self.look = self.load(), self.look_of_files()

    def context(self):
        """The SSLContext of the moment, None without TLS; other files are used from then on."""
        if self.tls is not None and self.look_of_files() != self.look:
            self.look = self.look_of_files()
            try:
                self.kept = self.load()
                self.say(f"TLS uses {self.tls.cert} as it is now")
            except RoexecError as error:
                self.say(f"{error}; the one before is used", "ERROR")
        return self.kept

    def look_of_files(self):
        """What changes where one of the files does."""
        look = []
        for path in (self.tls.cert, self.tls.key):
            with contextlib.suppress(OSError):
                state = os.stat(path)
                look += path, state.st_mtime_ns, state.st_size, state.st_ino
        return look

    def load(self):
        """An SSLContext of the files; raises RoexecError."""
        try:
            import ssl
        except ImportError:
            raise RoexecError("this Python has no ssl, so server: {tls: …} cannot be") from None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.tls.cert, self.tls.key, password=lambda: "")
        except (OSError, ValueError) as error:
            raise RoexecError(f"server.tls: {self.tls.cert} and {self.tls.key} cannot be used: "
                              f"{getattr(error, 'reason', None) or error}") from None
        return context


def _uid_of(name):
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise RoexecError(f'server.auth.local_users: there is no user "{printable(name)}" on this '
                          "host") from None


def start_http(store, host, port, say, access=None):
    """Serve the API of a store in threads -> an object with `.address` (host, port), `.close()`.

    Port 0 is any free one. `say(text, level)` is told of defects; `access` is an Access, else that
    of a configuration that says nothing. Raises RoexecError where one cannot listen there.
    """
    import http.server
    import socketserver
    check_routes(ROUTES)
    handler = type("Connection", (_Connection, http.server.BaseHTTPRequestHandler), {})
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, *_, address = min(found, key=lambda info: info[0] != socket.AF_INET)
        kind = type("Server", (_Server, socketserver.ThreadingTCPServer),
                    {"address_family": family})
        server = kind(address, handler)
    except OSError as error:
        raise RoexecError(_why_not(error, host, port)) from None
    server.start(store, access or Access(Config().server, say), say)
    return server


def prepare_access(store, http, say):
    """See to it that somebody can come in from elsewhere: where the server `http` can be reached
    and has no token, one for an administrator is left in the store, for its owner to read."""
    if is_loopback(packed_end(http.server_address)[0]):
        return
    if http.access.tls is None:
        say("Tokens travel unencrypted, unless a proxy in front speaks TLS; write server: {tls: "
            "{cert: …, key: …}}", "WARNING")
    path, owner = store.file("admin-token"), Caller(name="server", scopes=("*",), owner=True)
    with store.write() as db:
        if list_tokens(db, limit=1):
            return
        now = time.time()
        text = add_token(db, token_of({"name": "admin", "role": "admin"}, owner, now, None), owner,
                         now)
        with open(open_private(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w") as file:
            file.write(text + "\n")
    say(f"There was no token yet; one for an administrator is in {path}")


def _why_not(error, host, port):
    """Why one cannot listen, and what to do about it."""
    if error.errno == errno.EADDRINUSE:
        return (f"port {port} on {host} is in use; choose another by --port N or in the "
                "configuration (server: {port: …}), or write --no-http")
    return f"cannot listen on port {port} of {host}: {error.strerror}"


# ==== 27 client ===================================================================================
# A server elsewhere, for the same commands: with --url they ask Remote, through the API of that
# server, what they else ask the store, and get the same payloads. One connection is kept, each
# answer has a deadline and a largest size, and no redirect is followed, since the token would go
# where it leads. The token is in no error.

_CONNECT_TIME = 10              # seconds
_SILENCE_TIME = 45              # seconds without a byte; a stream shows each 15 that it lives
_WHOLE_TIME = 120               # seconds from a request to the end of its answer
_GONE_TIME = 120                # seconds for which a server that has answered once is tried again
_MOST_ANSWERED = 64 << 20       # bytes
_MOST_OF_LINE = 16 << 20        # bytes of an event
_TOKEN = Pattern(r"[!-~]+")


class Unreachable(RoexecError):
    """A server that does not answer; `sent` says whether it may have got the request."""

    def __init__(self, text, sent=False):
        super().__init__(text)
        self.sent = sent


class Denied(RoexecError):
    """Something that a server refuses: `status` is that of HTTP, `code` and `members` those of the
    error, as far as it is one of the API."""

    def __init__(self, text, status, code=None, members=None):
        super().__init__(text)
        self.status, self.code, self.members = status, code, members or {}


class Strange(RoexecError):
    """An answer that is none of roexec's API, or of another version of it."""


class _Wire:
    """HTTP to the server at a URL, by one connection that is kept."""

    def __init__(self, url, token):
        import urllib.parse
        parts = urllib.parse.urlsplit(url)
        try:
            self.host, port = parts.hostname, parts.port
        except ValueError:
            port = self.host = None
        if parts.scheme not in ("http", "https") or not self.host or parts.query or parts.fragment:
            raise ValueError(f"{printable(url.partition('@')[2] or url)} is no URL of a server; "
                             "write for example https://roexec.example.com:8080")
        if "@" in parts.netloc:
            raise ValueError("a token does not belong into the URL; put it into ROEXEC_TOKEN")
        if token and not _TOKEN.fullmatch(token):
            raise ValueError("the token has a character that no token has; it is one word")
        self.tls = parts.scheme == "https"
        self.port = port or (443 if self.tls else 80)
        self.path = parts.path.rstrip("/")
        self.url = f"{parts.scheme}://{parts.netloc}{self.path}"
        self.headers = {"User-Agent": f"roexec/{__version__}"}
        if token:
            self.headers["Authorization"] = f"Bearer {token}"
        self._kept = None

    def connect(self):
        """A new connection; raises Unreachable."""
        import http.client
        kind, how = http.client.HTTPConnection, {"timeout": _CONNECT_TIME}
        if self.tls:
            kind, how["context"] = http.client.HTTPSConnection, _trust()
        connection = kind(self.host, self.port, **how)
        try:
            connection.connect()
        except OSError as error:
            connection.close()
            raise Unreachable(self._why(error)) from None
        connection.sock.settimeout(_SILENCE_TIME)
        return connection

    def _why(self, error):
        """Why one cannot connect, and what to do about it."""
        if isinstance(error, socket.gaierror):
            return f"the name {self.host} of {self.url} is not known here: {error.strerror}"
        if isinstance(error, ConnectionRefusedError):
            return (f"nothing listens on port {self.port} of {self.host}: does a server run there, "
                    "and does it listen beyond its own host (server: {host: …})?")
        if isinstance(error, socket.timeout):
            return f"{self.url} does not answer within {_CONNECT_TIME}s"
        if type(error).__name__ == "SSLCertVerificationError":
            return (f"the certificate of {self.host} is not trusted: {error.verify_message}; where "
                    "it is by an authority of your own, SSL_CERT_FILE names the file of that")
        if type(error).__name__.startswith("SSL"):
            return (f"{self.host} does not speak TLS on port {self.port} "
                    f"({error.reason or error}); should it be http:// instead?")
        return f"cannot connect to {self.url}: {error.strerror or error}"

    def request(self, method, path, body=None, headers=None):
        """Send a request -> its response, of which nothing was read but the head.

        Where a connection that was kept has ended meanwhile, what can be sent twice is. Raises
        Unreachable.
        """
        headers = {**self.headers, **(headers or {})}
        kept, self._kept = self._kept, None
        if kept is not None:
            try:
                return self._send(kept, method, path, body, headers)
            except Unreachable:
                if method != "GET" and "Idempotency-Key" not in headers:
                    raise
        return self._send(self.connect(), method, path, body, headers)

    def _send(self, connection, method, path, body, headers):
        import http.client
        deadline = _Deadline(connection)
        try:
            connection.request(method, self.path + path, body, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            deadline.cancel()
            connection.close()
            raise Unreachable(self._broken(error, deadline), sent=True) from None
        response.connection, response.deadline = connection, deadline
        return response

    def _broken(self, error, deadline):
        """What has become of a connection."""
        kind = type(error).__name__
        if deadline.passed or isinstance(error, socket.timeout):
            return f"{self.url} does not answer in time"
        if kind == "RemoteDisconnected":
            return (f"{self.url} has ended the connection without an answer"
                    + ("" if self.tls else "; should it be https:// instead?"))
        if kind in ("BadStatusLine", "UnknownProtocol", "LineTooLong"):
            return f"what answers at {self.url} does not speak HTTP"
        return f"the connection to {self.url} broke in the middle of an answer"

    def pieces(self, response):
        """The body of a response, in pieces as they come; raises Unreachable where it is cut."""
        import http.client
        try:
            for piece in iter(lambda: response.read1(1 << 16), b""):
                yield piece
            if response.length or response.deadline.passed:
                raise http.client.IncompleteRead(b"")
            response.close()
            if not response.will_close:
                self._kept, response.connection = response.connection, None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise Unreachable(self._broken(error, response.deadline), sent=True) from None
        finally:
            response.deadline.cancel()
            if response.connection is not None:
                response.connection.close()

    def close(self):
        """End the connection that is kept."""
        if self._kept is not None:
            self._kept.close()

    def body(self, response):
        """The whole body of a response (bytes); raises RoexecError."""
        data = bytearray()
        for piece in self.pieces(response):
            data += piece
            if len(data) > _MOST_ANSWERED:
                raise Strange(f"an answer of {self.url} is larger than "
                              f"{format_size(_MOST_ANSWERED)}")
        return bytes(data)


class _Deadline:
    """Ends a connection that has not done in time what it is to do, however it dawdles."""

    def __init__(self, connection):
        self.socket, self.passed = connection.sock, False
        self.timer = threading.Timer(_WHOLE_TIME, self.end)
        self.timer.daemon = True
        self.timer.start()

    def end(self):
        self.passed = True
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def cancel(self):
        """It was done, or need not be."""
        self.timer.cancel()


def _trust():
    """The SSLContext that trusts whom the system does, or SSL_CERT_FILE and SSL_CERT_DIR name."""
    try:
        import ssl
    except ImportError:
        raise RoexecError("this Python has no ssl, so https:// cannot be spoken") from None
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


class _Asking:
    """Requests to the API of the server at a URL. Raises ValueError for no URL, or no token."""

    def __init__(self, url, token, say):
        self.wire, self.say, self.token = _Wire(url, token), say, token

    @property
    def name(self):
        """What messages call it."""
        return self.wire.url

    def open(self, method, path, query=None, body=None, headers=None):
        """The response to a request below /api/v1, if that is one of success; raises RoexecError.
        """
        import urllib.parse
        words = {name: text for name, text in (query or {}).items() if text not in (None, "")}
        target = f"/api/v1/{path}" + (f"?{urllib.parse.urlencode(words)}" if words else "")
        body = json.dumps(body).encode() if body is not None else None
        response = self.wire.request(method, target, body, headers)
        if not 200 <= response.status < 300:
            raise self._refusal(response)
        return response

    def ask(self, method, path, query=None, body=None, headers=None):
        """What the answer to a request says (an object); raises RoexecError."""
        response = self.open(method, path, query, body, headers)
        data = self.wire.body(response)
        if response.status == 204:
            return {}
        payload = _object_of(response, data)
        if payload is None:
            raise Strange(f"what answers at {self.name} is no server of roexec: it sent "
                          f"{printable(response.getheader('Content-Type') or 'nothing')[:80]}")
        return payload

    def _refusal(self, response):
        """The error that a response means."""
        status, place = response.status, response.getheader("Location") or "elsewhere"
        if 300 <= status < 400:
            response.deadline.cancel()
            response.connection.close()
            return Strange(f"{self.name} redirects to {printable(place)[:200]}; the token does not "
                           "go there by itself: write that URL")
        error = (_object_of(response, self.wire.body(response)) or {}).get("error")
        if not isinstance(error, dict):
            return Denied(f"{self.name} answers {status} {printable(response.reason)[:80]}, and it "
                          "is not roexec that says so", status)
        text = "\n".join(map(printable, str(error.get("message"))[:100_000].splitlines()))
        if status == 401:
            text = (f"{self.name} does not know this token, or it has expired" if self.token
                    else f"{self.name} wants a token: put it into ROEXEC_TOKEN; on its host roexec "
                    "token create makes one")
        elif status == 405 or error.get("message") == NO_ROUTE:
            text = f"{self.name} does not know how to do this: {self._versions()}"
        return Denied(text, status, error.get("code"), error)

    def _versions(self):
        """Which versions meet here."""
        theirs = "of an unknown version"
        with contextlib.suppress(RoexecError):
            response = self.wire.request("GET", "/api/v1/me")
            me = _object_of(response, self.wire.body(response)) or {}
            theirs = printable(str(me.get("version", theirs)))[:40]
        return f"the roexec there is {theirs}, this one is {__version__}"

    def puzzled(self, error):
        """The error that a payload means from which something expected was missing."""
        return Strange(f"{self.name} answers something else than expected "
                       f"({type(error).__name__}): {self._versions()}")

    def every(self, path, name, *, most=None, **query):
        """All items of a list, or the first so many, page by page."""
        items, cursor = [], None
        while True:
            payload = self.ask("GET", path, {"limit": 1000, **query, "cursor": cursor})
            items += payload[name]
            cursor = payload["next"]
            if not cursor or not payload[name] or most is not None and len(items) >= most:
                return items[:most]
            if len(items) > _MOST_ITEMS:
                raise Strange(f"{self.name} lists more than {_MOST_ITEMS} {name}")

    def patiently(self, ask):
        """What `ask()` gives, asked again for a while where the server is gone; raises
        RoexecError."""
        until, told = time.monotonic() + _GONE_TIME, False
        while True:
            try:
                return ask()
            except RoexecError as error:
                if time.monotonic() > until or not _may_pass(error):
                    raise
                if not told:
                    self.say(f"{error}; trying again for {format_duration(_GONE_TIME)}")
            told = True
            time.sleep(_RETRY_PAUSE)


class Remote(_Asking):
    """The server at a URL, as commands ask it; they ask the store of this host the same."""

    def another(self):
        """The same with a connection of its own, as another thread needs it."""
        return Remote(self.name, self.token, self.say)

    # Jobs.

    def jobs(self):
        """Payloads of all jobs."""
        return self.every("jobs", "jobs")

    def job(self, job_id):
        """The payload of a job; raises RoexecError."""
        return self.ask("GET", f"jobs/{_in_path(job_id)}")

    def find(self, target):
        """(payload of the job, None) of the id of a job, else (None, that of the run meant)."""
        try:
            return self.job(target), None
        except Denied as error:
            if error.status not in (403, 404):
                raise
            job_denied = error
        try:
            return None, self.run(target)
        except Denied as error:
            raise job_denied if (error.status, job_denied.status) == (404, 403) else error

    def slots(self, job_id, after, count):
        """Payloads of the next slots, those > `after`, of a job or of all."""
        query = {"from": format_instant(after + 1), "count": count}
        path = f"jobs/{_in_path(job_id)}/next" if job_id else "next"
        return self.ask("GET", path, query)["slots"] if count else []

    def foresight(self, job_id, after, end, duration):
        """The payload of all slots > `after` and < `end`, of a job or of all."""
        if job_id:
            self.job(job_id)
        return self.ask("GET", "next", {"jobs": job_id, "from": format_instant(after + 1),
                                        "to": format_instant(end), "duration": duration})

    def why(self, job_id, text):
        """The payload of why a job has not run; raises ValueError for no instant."""
        try:
            return self.ask("GET", f"jobs/{_in_path(job_id)}/why", {"at": text})
        except Denied as error:
            if error.status == 400:
                raise ValueError(str(error).removeprefix("at: ")) from None
            raise

    def status(self):
        """The payload of whether the server is healthy."""
        return self.ask("GET", "status")

    def exported(self, ids):
        """The specs of jobs, or of all, as a file has to have them."""
        return self.ask("GET", "export", {"jobs": ",".join(ids)},
                        headers={"Accept": "application/json"})["jobs"]

    def apply(self, texts, prune, dry_run):
        """Apply job files, {source: text} -> their answer; raises RoexecError."""
        body = {"files": [{"source": source, "text": text} for source, text in texts.items()]}
        return self.ask("POST", "apply", {"prune": int(prune), "dry_run": int(dry_run)}, body)

    def put(self, job, dry_run):
        """Register a Job -> the answer, as `apply` gives it; raises RoexecError."""
        return self.ask("PUT", f"jobs/{_in_path(job.id)}", {"dry_run": int(dry_run)}, job.spec)

    def delete(self, ids, dry_run):
        """Delete jobs, none of them if one does not exist."""
        for dry in (1,) if dry_run else (1, 0) if len(ids) > 1 else (0,):
            for job_id in ids:
                self.ask("DELETE", f"jobs/{_in_path(job_id)}", {"dry_run": dry})

    def pause(self, ids, pausing, until):
        """Pause the schedules of jobs until an instant (seconds), or resume them."""
        body = {"until": format_instant(until)} if pausing and until != math.inf else {}
        for job_id in ids:
            self.ask("POST", f"jobs/{_in_path(job_id)}/{'pause' if pausing else 'resume'}", None,
                     body)

    def now(self):
        """The time there (seconds)."""
        return parse_instant(self.ask("GET", "me")["now"], None)

    # Runs.

    def runs(self, groups, job_id=None, since=None, steps=False):
        """Payloads of runs, newest first, of each of some groups ([state], how many or None)."""
        found = {}
        for states, limit in groups:
            query = {"state": ",".join(states), "job": job_id, "steps": int(steps),
                     "since": since and format_instant(since)}
            if limit is None or limit > 1000:
                listed = self.every("runs", "runs", most=limit, **query)
            else:
                listed = self.ask("GET", "runs", {**query, "limit": limit})["runs"] if limit else ()
            found.update((run["id"], run) for run in listed)
        return list(found.values())

    def run(self, target):
        """The payload of the run that a person means; raises RoexecError."""
        return self.ask("GET", f"runs/{_in_path(target)}")

    def steps(self, run_id):
        """Payloads of the steps of a run."""
        return self.ask("GET", f"runs/{_in_path(run_id)}/steps")["steps"]

    def usual(self, job_ids):
        """{job id: seconds} that runs of jobs take usually, as far as that is known here."""
        try:
            jobs = self.every("jobs", "jobs", ids=",".join(sorted(job_ids)[:100]), brief=1)
        except Denied:
            return {}
        return {job["id"]: job["usual"] for job in jobs if job["usual"] is not None}

    def start(self, job_id, env, queue):
        """Start a run of a job -> its id; however the connection breaks, it is one run."""
        import secrets
        headers = {"Idempotency-Key": secrets.token_hex(16)}
        body = {"env": env, "queue": queue}
        path = f"jobs/{_in_path(job_id)}/run"
        try:
            return self.ask("POST", path, None, body, headers)["id"]
        except Unreachable as error:
            if not error.sent:
                raise
        return self.patiently(lambda: self.ask("POST", path, None, body, headers)["id"])

    def retried(self, run, first, everything):
        """(Job, steps that would not be repeated) of a retry of the run of a payload."""
        check_retry(run)
        if run["step"]:
            run, first = self.run(run["parent"]), first or run["step"]
        job = Job(self.job(run["job_id"])["spec"])
        steps = {step["step"]: step for step in self.steps(run["id"])}
        again = repeated_steps(job, run, steps, first, everything)
        return job, [step for step in steps if step not in again]

    def retry(self, run, env, first, everything):
        """Run again what the run of a payload ran -> the id of the new run."""
        body = {"env": env, "all": everything, **({"from": first} if first else {})}
        return self.ask("POST", f"runs/{_in_path(run['id'])}/retry", None, body)["id"]

    def cancel(self, run_id):
        """Cancel a run -> its state by then."""
        return self.ask("POST", f"runs/{_in_path(run_id)}/cancel")["state"]

    def wait(self, target):
        """The payload of a run once it has ended."""
        run, pause = self.run(target), 0.1
        while run["state"] not in FINAL_STATES:
            time.sleep(pause)
            run, pause = self.patiently(lambda: self.run(run["id"])), min(2, pause * 1.5)
        return run

    # Logs.

    def log(self, target, tail=None):
        """Yield the Lines of the log of a run as it is now."""
        response = self.open("GET", f"runs/{_in_path(target)}/logs", {"tail": tail})
        response.deadline.cancel()
        rest = b""
        for piece in self.wire.pieces(response):
            whole, newline, rest = (rest + piece).rpartition(b"\n")
            yield from _lines_in(whole + newline)
        yield from _lines_in(rest)

    # Tokens, and who has changed what.

    def tokens(self):
        """Payloads of all tokens."""
        return self.every("tokens", "tokens")

    def add_token(self, token, dry_run):
        """Make a token, as `token_of` has it -> its text, or None in a dry run."""
        if dry_run:
            if any(known["name"] == token["name"] for known in self.tokens()):
                raise already_a_token(token["name"])
            return None
        expires = token["expires_at"]
        return self.ask("POST", "tokens", None, {
            "name": token["name"], "scopes": token["scopes"], "jobs": token["pattern"],
            "expires": expires and format_instant(expires)})["token"]

    def rotate_token(self, name, dry_run):
        """Give a token a new text -> that, or None in a dry run."""
        if dry_run:
            return self.ask("GET", f"tokens/{_in_path(name)}") and None
        return self.ask("POST", f"tokens/{_in_path(name)}/rotate")["token"]

    def revoke_tokens(self, names, dry_run):
        """Remove tokens, none of them if one does not exist."""
        for name in names:
            self.ask("GET", f"tokens/{_in_path(name)}")
        for name in () if dry_run else names:
            self.ask("DELETE", f"tokens/{_in_path(name)}")

    def audit(self, limit):
        """Payloads of the newest changes."""
        if limit > 1000:
            return self.every("audit", "audit", most=limit)
        return self.ask("GET", "audit", {"limit": limit})["audit"] if limit else []


_MOST_ITEMS = 1_000_000
_RETRY_PAUSE = 1.0              # seconds


class Following:
    """The log of a run as it grows, an iterable of Lines, whatever becomes of the connection or the
    server meanwhile. Once it is over `outcome` says what has become of the run: its state,
    exit_code, signal. It can be gone through again, from where it was left."""

    def __init__(self, remote, run_id, tail=None):
        self.remote, self.run_id, self.tail = remote, run_id, tail
        self.last = self.gap = self.outcome = None

    def __iter__(self):
        response, silent = self._begin(), None
        while response.status != 204:
            response.deadline.cancel()
            silent = silent or time.monotonic()
            try:
                for events in _events_in(self.remote.wire.pieces(response)):
                    silent = None
                    yield from self._take(events)
            except Unreachable:         # what comes of it `patiently` finds out
                if silent and time.monotonic() - silent > _GONE_TIME:
                    raise               # it answers again and again, and says nothing
            if self.outcome is not None:
                return
            time.sleep(_RETRY_PAUSE)
            response = self.remote.patiently(self._begin)
        self.remote.wire.body(response)
        self.outcome = self.remote.run(self.run_id)

    def _begin(self):
        headers, query = {"Accept": "text/event-stream"}, {"follow": 1}
        if self.last is None:
            query["tail"] = self.tail
        else:
            headers["Last-Event-ID"] = self.last
        return self.remote.open("GET", f"runs/{_in_path(self.run_id)}/logs", query, headers=headers)

    def _take(self, events):
        """Yield the Lines of events; what was yielded is not asked for again."""
        data, last = b"", self.last
        for kind, last, payload in events:
            if kind == "gap":
                yield from _some_lines(data)
                data, self.gap = b"", payload
            elif kind == "end":
                self.outcome = payload
            else:
                line = stamped_line(payload)
                if self.gap is not None:
                    yield gap_line(self.gap["from"], self.gap["to"], line)
                    self.gap = None
                data += line
        yield from _some_lines(data)
        self.last = last


class GrowingLog:
    """The lines of the log of a run, of which is asked again and again what has come."""

    def __init__(self, remote, run_id):
        self.remote, self.run_id, self.offset = remote, run_id, 0

    def more(self, over=False):
        """Further lines, as bytes, some megabytes at most."""
        query = {"offset": self.offset, "limit": _SOME_BYTES}
        try:
            response = self.remote.patiently(lambda: self.remote.open(
                "GET", f"runs/{_in_path(self.run_id)}/logs", query))
        except Denied as error:
            if error.code != "no_log":  # which it has not yet
                raise
            return []
        data = self.remote.wire.body(response)
        self.offset = int(response.getheader("Roexec-Next-Offset"))
        return data.splitlines(keepends=True)

    def until_end(self, follow, wait):
        """Yield Lines until there is nothing more; with `follow` until the run has ended, and
        `wait(seconds)` is called where nothing has come."""
        while True:
            over = not follow or self.remote.patiently(lambda: self.remote.run(
                self.run_id))["state"] in FINAL_STATES
            lines = self.more()
            yield from _some_lines(b"".join(lines))
            if not lines and over:
                return
            if not lines:
                wait(_LOOK_PAUSE)

    def close(self):
        """Nothing is open of it."""


_SOME_BYTES = 4 << 20
_LOOK_PAUSE = 0.5               # seconds


def _events_in(pieces):
    """Yield lists of (kind, id, data) of the pieces of a stream of events (WHATWG HTML, 9.2.6)."""
    rest, last = b"", None
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n\n")
        events = []
        for event in whole:
            fields = dict(line.partition(": ")[::2] for line in event.decode().split("\n"))
            last = fields.get("id", last)
            if "data" in fields:
                events.append((fields.get("event"), last, json.loads(fields["data"])))
        yield events
        if len(rest) > _MOST_OF_LINE:
            raise Strange(f"an event is larger than {format_size(_MOST_OF_LINE)}")


_GAP = Pattern(rb"(?m)^.{20} \[INFO\] \d+ bytes of the log were removed here: "
               rb"from=(\d+) to=(\d+)\n")


def _lines_in(data):
    """Yield Lines of the text of a log, in which those that stand for others can be told."""
    at = 0
    for gap in _GAP.finditer(data):
        yield from _some_lines(data[at:gap.start()])
        yield Lines(begin=int(gap[1]), end=int(gap[2]), data=gap[0], is_gap=True)
        at = gap.end()
    yield from _some_lines(data[at:])


def _some_lines(data):
    return [Lines(data=data, is_gap=False)] if data else []


def stamped_line(payload):
    """A line of a log as it is stored (bytes), of its payload."""
    text = payload["line"].encode(errors="replace")
    if "base64" in payload:
        text = base64.b64decode(payload["base64"])
    if payload["time"] is None:
        return text + b"\n"
    tag = payload["stream"].upper() + ("~" if payload["partial"] else "")
    return f"{payload['time']} [{tag}] ".encode() + text + b"\n"


def _may_pass(error):
    """Whether what is wrong may be over by itself: the server begins again, or is too busy."""
    return isinstance(error, Unreachable) or isinstance(error, Denied) and error.status in (
        502, 503, 504)


def _in_path(text):
    import urllib.parse
    return urllib.parse.quote(text, safe="")


def _object_of(response, data):
    """The object that an answer is, None where it is none."""
    if "json" not in (response.getheader("Content-Type") or ""):
        return None
    try:
        payload = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return payload if isinstance(payload, dict) else None


# ==== 28 host =====================================================================================
# How roexec stands on a host: where its things lie, which servers live there, what may be wrong
# with it, how it is put into place and taken away again.

# Where things lie.

HOST_CONFIG, HOST_STORE = "/etc/roexec", "/var/lib/roexec"


def user_folder(variable, usual):
    """roexec's folder in a base directory of the user; a relative one is void, as XDG has it."""
    base = os.environ.get(variable, "")
    if not os.path.isabs(base):
        home = os.path.expanduser("~")
        base = os.path.join("/" if home == "~" else home, usual)
    return os.path.join(base, "roexec")


def usual_store():
    """The store that is used where nothing names one: the host's for root and its owner."""
    uid = os.geteuid()
    try:
        host = uid == 0 or os.stat(HOST_STORE).st_uid == uid
    except OSError:
        host = False
    return HOST_STORE if host else user_folder("XDG_STATE_HOME", ".local/state")


def become_owner(store, say=None):
    """Root becomes the owner of a store, so that nothing in it ever becomes root's; `say` is told
    of it."""
    try:
        state = os.stat(store.path)
    except OSError:
        return
    uid, gid = state.st_uid, state.st_gid
    if os.geteuid() != 0 or uid == 0:
        return
    try:
        user = pwd.getpwuid(uid)
        gid, groups = user.pw_gid, os.getgrouplist(user.pw_name, user.pw_gid)
        os.environ.update(HOME=user.pw_dir, USER=user.pw_name, LOGNAME=user.pw_name)
    except KeyError:
        groups = [gid]
    os.setgroups(groups)
    os.setgid(gid)
    os.setuid(uid)
    if (os.getuid(), os.geteuid(), os.getgid(), os.getegid()) != (uid, uid, gid, gid):
        raise RoexecError(f"cannot become {owner_name(uid)}, who owns {store.path}")
    if not os.access(os.__file__, os.R_OK):
        raise RoexecError(f"{owner_name(uid)}, who owns {store.path}, cannot read this Python "
                          f"({sys.executable}); run roexec by another, such as /usr/bin/python3")
    if say is not None:
        say(f"working as {owner_name(uid)}, who owns {store.path}")


# Live servers. A server holds the lock of a file that has the number of its process as its name,
# and the path of its store as its content.

def servers_folder():
    """Where the live servers of this user are announced."""
    if os.geteuid() == 0:
        return "/run/roexec"
    return os.path.join(user_folder("XDG_STATE_HOME", ".local/state"), "servers")


def announce_server(store):
    """Let commands that are given no store find this one -> what `withdraw_announcement` takes."""
    folder, before = servers_folder(), os.umask(0o077)
    path = os.path.join(folder, str(os.getpid()))
    try:
        os.makedirs(folder, exist_ok=True)
        descriptor = open_private(path)
        if try_lock(descriptor) and is_at(descriptor, path):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, os.fsencode(store.path))
            return path, descriptor
        os.close(descriptor)
        why = "another process holds it"
    except OSError as error:
        why = error.strerror
    finally:
        os.umask(before)
    store.say(f"cannot write {path} ({why}); commands find this server by --store {store.path}")
    return None


def withdraw_announcement(entry):
    """Undo `announce_server`."""
    if entry is not None:
        os.unlink(entry[0])
        os.close(entry[1])


def live_servers():
    """{path of a store: process} of the servers of this user; what dead ones left is removed."""
    servers, folder = {}, servers_folder()
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return servers
    for name in names:
        path, number = os.path.join(folder, name), name.partition(".")[0]
        try:
            if not number.isdigit():
                continue
            if lock_is_held(path):
                with open(path, "rb") as file:
                    servers[os.fsdecode(file.read())] = int(number)
            else:
                os.unlink(path)
        except OSError:                 # its server has just ended; or it is none of ours
            continue
    servers.pop("", None)               # one that is just beginning
    return servers


# What may be wrong. Each check is a function of an Examined that yields Findings; it changes
# nothing, and asks for no more rights than the commands that are to work.

class Finding(Value):
    """Something that was looked at: `level` is ok, note or wrong, `about` a word or two, `mend`
    what mends it, a command where there is one, or None."""
    __slots__ = ("level", "about", "text", "mend")


class Examined:
    """What is examined: a Store, which may not be there yet, and the Config."""

    def __init__(self, store, config):
        self.store, self.config = store, config

    @property
    def server(self):
        """The process of the live server, None without one; raises RoexecError."""
        try:
            return self.store.server()
        except PermissionError:
            raise self.store.refusal() from None

    def jobs(self):
        """The jobs in effect."""
        if not self.store.exists:
            return []
        with self.store.read() as db:
            defaults = in_effect(db, {"defaults": self.config.defaults})[0]
            return [job_in_effect(row, defaults) for row in list_jobs(db)]


def examine(store, config, checks=None):
    """The [Finding] of all checks, or of some; one that cannot look says so."""
    findings, examined = [], Examined(store, config)
    for about, check in (checks or _CHECKS).items():
        try:
            findings += [Finding(about=about, **found) for found in check(examined)]
        except (RoexecError, OSError) as error:
            text = str(error) if isinstance(error, RoexecError) else f"cannot be looked at: {error}"
            if text not in [found.text for found in findings]:      # a store that cannot be read
                findings.append(Finding(about=about, **_wrong(text)))
    return findings


def _ok(text):
    return {"level": "ok", "text": text}


def _remark(text, mend=None):
    return {"level": "note", "text": text, "mend": mend}


def _wrong(text, mend=None):
    return {"level": "wrong", "text": text, "mend": mend}


# Python and its parts.

_PARTS = {
    "ssl": "webhooks, pings, mail and Vault cannot be reached by TLS",
    "ctypes": "what a command leaves behind in a session of its own is not ended with it",
    "resource": "limits of jobs are not kept",
}


def _check_python(_):
    yield _ok("Python %d.%d.%d" % sys.version_info[:3] + f", {sys.executable}")
    for name, without in _PARTS.items():
        try:
            __import__(name)
        except ImportError:
            yield _wrong(f"its module {name} is missing: {without}",
                         "install all of the standard library: apt install python3")


def program_path():
    """The file that this program is: roexec.pyz, or roexec.py."""
    return os.path.realpath(getattr(__loader__, "archive", __file__))


def _check_program(_):
    yield _ok(f"roexec {__version__}, {program_path()}")
    exposed = {found: None for path in (program_path(), os.path.realpath(sys.executable))
               for found in _exposed(path)}
    for path in exposed:
        yield _wrong(f"somebody else can change {path}, and so what the server runs",
                     f"chown root {path}; chmod go-w {path}")


def _exposed(path):
    """Those of a path and the folders that it lies in that others than root and we can change."""
    while True:
        state = os.stat(path)
        sticky = stat.S_ISDIR(state.st_mode) and state.st_mode & stat.S_ISVTX
        if state.st_uid not in (0, os.geteuid()) or not sticky and (
                state.st_mode & 0o002 or state.st_mode & 0o020 and _has_members(state.st_gid)):
            yield path
        if path == "/":
            return
        path = os.path.dirname(path)


def _has_members(gid):
    """Whether anybody but root is in a group by its list; the private group of a user has none."""
    import grp
    try:
        return bool(set(grp.getgrgid(gid).gr_mem) - {"root", owner_name(os.geteuid())})
    except KeyError:
        return False


def _check_sqlite(_):
    import sqlite3
    text, version = f"SQLite {sqlite3.sqlite_version}", sqlite3.sqlite_version_info
    if version < (3, 26):
        yield _wrong(f"{text} is too old", "use a Python with SQLite 3.26 or newer")
    elif version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) \
            or (3, 44, 6) <= version < (3, 45):
        yield _ok(text)
    else:
        yield _remark(f"{text} can corrupt a database that two programs write at once; roexec's "
                      "own lock excludes that", "let nothing but roexec write into the database")


# The store, its disk, the clock.

_GONE_AT_BOOT = {"tmpfs": "with the next boot", "ramfs": "with the next boot",
                 "overlay": "with this container"}


def _check_store(examined):
    store = examined.store
    if not store.exists:
        yield _remark(f"there is no store in {store.path} yet", "roexec server")
        return
    state, me = os.stat(store.folder), owner_name(os.geteuid())
    owner = owner_name(state.st_uid)
    if owner != me:
        yield _wrong(f"{store.path} belongs to {owner}, and this is {me}",
                     f"sudo -u {owner} roexec doctor")
        return
    with store.read() as db:            # which a newer version, or a damage, forbids
        count_changes(db)
    if state.st_mode & 0o077:
        yield _wrong(f"others can look into {store.path}", f"chmod 700 {store.path}")
    foreign = [path for path in _files_of(store) if os.lstat(path).st_uid != state.st_uid]
    if foreign:
        yield _wrong(f"{len(foreign)} files of it belong to others, such as {foreign[0]}",
                     f"chown -R {owner} {store.folder}")
    kind = file_system(store.folder)
    if kind in NETWORK_FILE_SYSTEMS:
        yield _wrong(f"{store.path} lies on a network file system ({kind}), where locks do not "
                     "hold", "move it to a disk of this host")
    elif kind in _GONE_AT_BOOT:
        yield _remark(f"{store.path} lies on {kind}, and is gone {_GONE_AT_BOOT[kind]}",
                      "name another folder with --store, or mount a volume there")
    else:
        yield _ok(f"{store.path}, {kind or 'unknown file system'}, owner {owner}")


def _files_of(store, most=10_000):
    """The paths of files in the store that are looked at: those that are written all the time."""
    names = [".", "active", "logs"]
    for name in names:
        for entry in itertools.islice(os.scandir(store.file(name)), most):
            yield entry.path


_LEAST_FREE, _ENOUGH_FREE = 64 << 20, 1 << 30       # bytes; between them a hundredth of the disk
_LEAST_INODES = 1000


def _check_disk(examined):
    folder = examined.store.folder
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder) or "/"
    found = os.statvfs(folder)
    free, total = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
    room = f"{format_size(free)} of {format_size(total)}"
    mend = "make room there, or write roexec maintenance purge --older 30d"
    if free < max(_LEAST_FREE, min(total // 100, _ENOUGH_FREE)):
        yield _wrong(f"only {room} are free on the disk of {folder}", mend)
    else:
        yield _ok(f"{room} are free")
    if found.f_files and found.f_favail < max(_LEAST_INODES, found.f_files // 100):
        yield _wrong(f"only {found.f_favail} more files fit on the disk of {folder} (inodes)", mend)


_BEGUN = 1735689600         # 2025-01-01: no clock that is right says less


def _check_clock(examined):
    now, newest = time.time(), None
    if examined.store.exists:
        with examined.store.read() as db:
            newest = next((row["queued_at"] for row in list_runs(db, limit=1)), None)
    shown, mend = format_instant(int(now)), "timedatectl set-ntp true"
    if now < _BEGUN:
        yield _wrong(f"the clock is wrong: {shown}", mend)
    elif newest is not None and newest > now + 60:
        yield _wrong(f"the clock says {shown}, and the newest run is of "
                     f"{format_instant(int(newest))}", mend)
    elif _is_unsynchronized():
        yield _remark(f"{shown}; nothing keeps the clock of this host right (NTP)", mend)
    else:
        yield _ok(shown)


def _is_unsynchronized():
    """Whether the kernel says that nobody has set its clock by a better one (adjtimex(2))."""
    import ctypes
    try:
        return ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512)) == 5    # TIME_ERROR
    except AttributeError:              # not Linux
        return False


def _check_zone(examined):
    name = os.environ.get("TZ", "").lstrip(":")
    try:
        get_zone(name or "UTC")
    except ValueError as error:
        yield _wrong(f"TZ is {error}", "set TZ to a name such as Europe/Berlin, or unset it")
    else:
        yield _ok(f"local time is {host_zone()}")
    try:
        get_zone("Europe/Berlin")
    except ValueError:
        yield _remark("there are no data of time zones: jobs cannot name one", "apt install tzdata")


# The server, its unit and its port.

def _check_server(examined):
    if examined.server is None:
        yield _remark("none runs on this store: nothing starts by itself", "roexec server")
        return
    trouble = examined.store.trouble()
    yield _wrong(f"process {examined.server}: {trouble}") if trouble else _ok(
        f"process {examined.server}")
    files = _limit_of_files(examined.server)
    if files is not None and files < 1024:
        yield _wrong(f"it can have {files} files open; each run that is on takes one",
                     "raise the limit (ulimit -n, LimitNOFILE= in its unit)")


def _limit_of_files(pid):
    try:
        with open(f"/proc/{pid}/limits") as file:
            found = [line.split() for line in file if line.startswith("Max open files")]
    except OSError:
        return None
    return int(found[0][3]) if found and found[0][3].isdigit() else None


# A setting of a unit -> when it is wrong, and why that matters; what it ought to be.
_UNIT_SETTINGS = {
    "KillMode": (lambda value: value not in ("process", "none"), "wrong",
                 "a restart ends the runs that are on", "process"),
    "OOMPolicy": (lambda value: value != "continue", "wrong",
                  "one job that runs out of memory ends the server", "continue"),
    "TasksMax": (lambda value: value.isdigit() and int(value) < 1 << 20, "note",
                 "it counts the processes of all jobs together", "infinity"),
    "Delegate": (lambda value: value == "no", "note",
                 "memory and processors of jobs cannot be limited by cgroups", "yes"),
}


def _check_unit(examined):
    own = os.geteuid() != 0 and examined.store.path != HOST_STORE
    words, unit = examined.server and unit_of(examined.server) or (
        ["--user"] if own else [], "roexec.service")
    found = show_unit(words, unit, ["LoadState", *_UNIT_SETTINGS])
    if found.get("LoadState") != "loaded":
        return
    yield _ok(unit)
    for name, (is_wrong, level, why, right) in _UNIT_SETTINGS.items():
        if found.get(name) and is_wrong(found[name]):
            yield {"level": level, "text": f"{name} of {unit} is {found[name]}: {why}",
                   "mend": f"write {name}={right} into its section [Service]: "
                           f"systemctl {' '.join([*words, 'edit', unit])}"}
    user = owner_name(os.geteuid())
    if words and not os.path.exists(f"/var/lib/systemd/linger/{user}"):
        yield _wrong(f"it ends when {user} logs out", f"loginctl enable-linger {user}")


def _check_limits(examined):
    if sys.platform == "linux" and not os.path.isdir("/proc/self"):
        yield _wrong("there is no /proc: what commands leave behind is not found", "mount it")
    if examined.server and delegated_cgroup(examined.server):
        yield _ok("memory and processors are limited by cgroups")
        return
    yield _remark("limits.memory is kept by watching, limits.cpu not at all: no cgroup (v2) is "
                  "delegated to a server here", "roexec install, where systemd 254 or newer runs")
    for job in examined.jobs():
        if job.limits.cpu is not None:
            yield _wrong(f'limits.cpu of job "{job.id}" is not kept')


def _check_port(examined):
    host, port = examined.config.server.host, examined.config.server.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            free, why = True, ""
        except OSError as error:
            free, why = False, error.strerror
    if examined.server is not None:
        yield _remark(f"nothing listens on port {port} of {host}; the server may have been given "
                      "another one") if free else _ok(f"{port} of {host}")
    elif free:
        yield _ok(f"{port} of {host} is free")
    else:
        yield _wrong(f"port {port} of {host} cannot be had: {why}",
                     "write another one into the configuration, server: {port: 8081}")


_PROXIES = {"nginx", "haproxy", "caddy", "apache2", "httpd", "traefik", "envoy", "lighttpd",
            "socat", "varnishd", "squid"}


def _check_owner(examined):
    """Who is let in without a token: what looks as if it came from our user on this host."""
    owners, found = {0, os.geteuid()}, _proxies()
    workers = {name for name, uid in found.values() if uid not in owners}   # who do the forwarding
    for pid, (name, _) in sorted(found.items()) if examined.config.server.auth.owner else ():
        if name not in workers:
            yield _remark(f"{name} (process {pid}) runs as root or as the user of the server: what "
                          "it forwards without a header that says so counts as the owner's",
                          "run it as another user, or write server: {auth: {owner: false}}")
    if ends_with_us() or os.path.exists("/.dockerenv") or os.path.exists("/run/.containerenv"):
        yield _remark("this is a container: whoever comes through a published port needs a token")


def _proxies():
    """{pid: (name, uid)} of the processes that are known to forward."""
    found = {}
    for pid in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if pid.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{pid}/comm") as file:
                name = file.read().strip()
                if name in _PROXIES:
                    found[int(pid)] = name, os.stat(f"/proc/{pid}").st_uid
    return found


def _check_tokens(examined):
    rows, now = [], time.time()
    if examined.store.exists:
        with examined.store.read() as db:
            rows = list_tokens(db)
    for row in rows:
        if row["expires_at"] is None:
            yield _remark(f"{row['name']} never expires, and may {row['scopes']}",
                          f"roexec token create --name … --expires 90d, and then roexec token "
                          f"revoke {row['name']}")
        elif row["expires_at"] < now:
            yield _remark(f"{row['name']} has expired", f"roexec token revoke {row['name']}")
    if rows:
        yield _ok(f"{len(rows)} in all")


# The jobs.

def _check_jobs(examined):
    jobs = examined.jobs()
    problems = [(job, problem) for job in jobs for problem in job_problems(job)]
    for job, (text, mend) in problems:
        yield _wrong(f'job "{job.id}": {text}', mend or f"roexec edit {job.id}")
    ids = {job.id for job in jobs}
    unknown = [(job, text) for job in jobs for text in check_references(job, ids)]
    for job, text in unknown:
        yield _wrong(text, f"roexec edit {job.id}")
    if not problems and not unknown:
        yield _ok(f"{len(jobs)}: their users, folders, shells and programs are there")


def job_problems(job):
    """(what is missing on this host for a job to run, what mends it or None), as far as one can
    tell without running it."""
    try:
        uid = setup_of(job).uid
        job.crons(), job.zone(None)
    except ValueError as error:
        yield str(error), None
        return
    environment = job_environment(job, os.geteuid() if uid is None else uid)
    folder = job_folder(job, environment)
    if not os.path.isdir(folder):
        yield f"there is no folder {folder}", f"mkdir -p {shlex.quote(folder)}"
    commands = [job.command, job.condition, *(hook.command for hooks in job.hooks.values()
                                              for hook in hooks)]
    for program in dict.fromkeys(name for command in commands if command is not None
                                 for name in _programs_of(command, job.shell)):
        try:
            path = os.path.join(folder, find_program(program, environment))
        except CannotStart as error:
            yield str(error), None
            continue
        if not os.path.isfile(path):
            yield f"there is no program {path}", None
        elif not os.access(path, os.X_OK):
            yield f"{path} may not be executed", f"chmod +x {shlex.quote(path)}"
    for name, step in () if isinstance(job, Step) else job.steps().items():
        for text, mend in job_problems(step):
            yield f'step "{name}": {text}', mend


_SHELLS = {"sh", "bash", "dash", "ash", "ksh", "zsh", "mksh", "yash"}
_SHELL_WORDS = set((        # POSIX, "Shell Command Language": reserved words and utilities within
    ". : [ alias bg break case cd command continue declare eval exec exit export false fc fg for "
    "function getopts hash if jobs let local pwd read readonly return select set shift source "
    "time times trap true type typeset ulimit umask unalias unset until wait while").split())
_PLAIN_WORD = Pattern(r"[\w./+-]+", "a")


def _programs_of(command, shell):
    """The programs that a command certainly needs: a shell, and the first word of its script."""
    if not isinstance(command, str):
        return command[:1]
    first = command.split(None, 1)[0] if command.strip() else ""
    known = os.path.basename(shell[0]) in _SHELLS and first not in _SHELL_WORDS
    return (shell[0], first) if known and _PLAIN_WORD.fullmatch(first) else (shell[0],)


_CHECKS = {"python": _check_python, "program": _check_program, "sqlite": _check_sqlite,
           "store": _check_store, "disk": _check_disk, "clock": _check_clock,
           "time zone": _check_zone, "server": _check_server, "unit": _check_unit,
           "limits": _check_limits, "port": _check_port, "owner": _check_owner,
           "tokens": _check_tokens,
           "jobs": _check_jobs}


def status_warnings(store, config):
    """What of the findings `status` tells: what is wrong with the store, its disk, the clock."""
    checks = {about: _CHECKS[about] for about in ("store", "disk", "clock")}
    return [found for found in examine(store, config, checks) if found.level == "wrong"]


def compare_environments(job, caller):
    """What a job gets in comparison with the environment of a caller, {name: value}: a payload.

    Values of `env_from` are looked up at each run, and here only where from.
    """
    setup = setup_of(job)
    uid = os.geteuid() if setup.uid is None else setup.uid
    environment = job_environment(job, uid)
    own = {"_", "SHLVL", "PWD", "OLDPWD"}       # of each shell
    return {
        "job": job.id, "user": owner_name(uid), "umask": f"{job.umask:03o}",
        "directory": job_folder(job, environment),
        "only_job": {name: value for name, value in sorted(environment.items())
                     if name not in caller},
        "different": {name: {"job": value, "caller": caller[name]}
                      for name, value in sorted(environment.items())
                      if caller.get(name, value) != value},
        "only_caller": sorted(caller.keys() - environment.keys() - own),
        "env_from": list(job.env_from)}


# Putting it into place, and taking it away. What is to be done are Actions, so that a dry run can
# print the same as what a run performs.

class Action(Value):
    """Something to be done: `text` says what, and `perform()` does it."""
    __slots__ = ("text", "perform")


def perform_steps(steps, say):
    """Say and perform steps in order; raises RoexecError for the first that fails."""
    for step in steps:
        say(step.text)
        try:
            step.perform()
        except OSError as error:
            raise RoexecError(f"{step.text}: {error.strerror or error}") from None


def _file_step(path, data, mode=0o644):
    """Steps that put a text or bytes into a file, by a rename, where it has others."""
    data = data.encode() if isinstance(data, str) else data
    try:
        with open(path, "rb") as file:
            if file.read() == data:
                return []
    except FileNotFoundError:
        pass
    return [Action(text=f"write {path}", perform=lambda: _put_file(path, data, mode))]


def _put_file(path, data, mode):
    """A program that runs from the file goes on with the old one (its inode stays)."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    new = f"{path}.{os.getpid()}.new"
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            os.fchmod(descriptor, mode)
            file.flush()
            os.fsync(descriptor)
        os.replace(new, path)
    except BaseException:
        os.unlink(new)
        raise


def _command_step(*words, may_fail=False):
    return Action(text=shlex.join(words), perform=lambda: _run_command(words, may_fail))


def _run_command(words, may_fail, data=None):
    import subprocess
    done = subprocess.run(words, input=data, capture_output=True, text=True)
    if done.returncode and not may_fail:
        raise RoexecError(f"{shlex.join(words)} has failed, status {done.returncode}: "
                          f"{printable((done.stderr or done.stdout).strip())}")


def _remove_step(path):
    return [Action(text=f"remove {path}", perform=lambda: os.unlink(path))] \
        if os.path.lexists(path) else []


def _has_program(name):
    try:
        return bool(find_program(name, {"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}))
    except CannotStart:
        return False


CONFIG_TEMPLATE = """\
# The configuration of roexec. What is commented out shows what can be said.

jobs: jobs.yml                  # a job file, or a folder of them, that the server follows

# server:
#   host: 127.0.0.1             # 0.0.0.0 lets others in, who need a token
#   port: 8080

# store:                        # history, logs, and what is running
#   type: local
#   path: /var/lib/roexec

# scheduler:
#   max_concurrent: 10          # runs at once, of all jobs together; further ones wait
#   timezone: Europe/Berlin     # of schedules; without it the host's

# defaults:                     # for jobs that do not say otherwise
#   timeout: 1h
#   retries: 2

# mail:                         # the server for {mail: ADDRESS} in hooks
#   host: smtp.example.com
#   from: roexec@example.com
#   user: roexec
#   password_file: /etc/roexec/mail-password

# vault:                        # for vault:// in env_from
#   address: https://vault.example.com:8200
#   token_file: /etc/roexec/vault-token
"""
JOBS_TEMPLATE = """\
# The jobs of this host. The server follows this file: a change holds a second after it was saved.
# To check it: roexec apply -f jobs.yml --dry-run

jobs:
  - id: hello                   # without a schedule: roexec run hello
    command: echo "Hello from $(hostname)"

  # - id: backup-db
  #   name: Backup database
  #   schedule: "0 2 * * *"
  #   command: /usr/local/bin/backup.sh
  #   env: {DB_HOST: db.internal}
  #   timeout: 1h
  #   retries: 3
  #   backoff: 30s
  #   hooks:
  #     on_failure: {mail: ops@example.com}
"""


def init_steps(folder):
    """Steps that write config.yml and jobs.yml into a folder, where there are none yet."""
    steps = []
    for name, text in (("config.yml", CONFIG_TEMPLATE), ("jobs.yml", JOBS_TEMPLATE)):
        path = os.path.join(folder, name)
        if not os.path.lexists(path):
            steps += _file_step(path, text)
    return steps


_MARK = "# Written by roexec install, which writes it again; without this line it is left alone.\n"
_UNIT = _MARK + """\
# For settings of your own: systemctl edit roexec

[Unit]
Description=roexec, scheduler and runner of jobs
After=local-fs.target network.target time-sync.target
# However often it fails, it is started again.
StartLimitIntervalSec=0

[Service]
# It tells when it is ready, how it is (systemctl status), and that its loop still turns.
Type=notify
WatchdogSec=2min
ExecStart={command}
ExecReload=/bin/kill -HUP $MAINPID
Restart=always
RestartSec=1
# A restart or an upgrade must end the server only: runs belong to their supervisors.
KillMode=process
# Limits of jobs need a part of the cgroup tree. (DelegateSubgroup is of systemd 254.)
Delegate=yes
DelegateSubgroup=server
# A job that runs out of memory must not take the server along; nor are jobs to be few.
OOMPolicy=continue
TasksMax=infinity
{identity}
[Install]
WantedBy={target}
"""
_OPENRC = """\
#!/sbin/openrc-run
""" + _MARK + """\
name=roexec
description="scheduler and runner of jobs"
supervisor=supervise-daemon
command={python}
command_args="{arguments}"
command_user={user}
error_log=/var/log/roexec.log
respawn_delay=1
respawn_max=0
# A restart must end the server only: runs belong to their supervisors.
rc_cgroup_cleanup=no
extra_started_commands=reload

depend() {{
    need localmount
    use net
}}

start_pre() {{
    checkpath --file --owner {user} --mode 0640 /var/log/roexec.log
}}

reload() {{
    supervise-daemon roexec --signal HUP
}}
"""


def systemd_unit(words, user):
    """The unit that runs the server by some words; as a user, None: in the manager of a user."""
    identity = "" if user is None else (
        "# Makes /var/lib/roexec, the store, and gives it to the user of the unit.\n"
        "StateDirectory=roexec\nStateDirectoryMode=0700\n"
        + (f"User={user}\n" if user != "root" else ""))
    return _UNIT.format(command=shlex.join(words), identity=identity,
                        target="default.target" if user is None else "multi-user.target")


class Installation:
    """An installation on this host, for all or (`own`) for the user who asks for it.

    `user` is who runs the server: for all that is the owner of the store, else `wanted`, else
    "roexec". Raises RoexecError where that cannot be.
    """

    def __init__(self, own=False, wanted=None):
        self.own = own
        if not own and os.geteuid() != 0:
            raise RoexecError("only root can change what is installed for the host; write it with "
                              "sudo, or with --user what is for yourself")
        home = os.path.expanduser("~")
        self.program = os.path.join(home, ".local/bin/roexec") if own else "/usr/local/bin/roexec"
        self.store = Store(user_folder("XDG_STATE_HOME", ".local/state") if own else HOST_STORE)
        self.config = user_folder("XDG_CONFIG_HOME", ".config") if own else HOST_CONFIG
        self.user = self._choose_user(wanted)
        self.words = [sys.executable, "-I", self.program, "server"]
        self.manager = self._find_manager()

    def _choose_user(self, wanted):
        owner = None
        with contextlib.suppress(OSError):
            owner = owner_name(os.stat(self.store.path).st_uid)
        if self.own:
            return owner_name(os.geteuid())
        if wanted and owner and wanted != owner:
            raise RoexecError(f"the store {self.store.path} belongs to {owner}; stop the server, "
                              f"write chown -R {wanted} {self.store.path}, then install again")
        return wanted or owner or "roexec"

    def _find_manager(self):
        if os.path.isdir("/run/systemd/system") and _has_program("systemctl"):
            return _Systemd(self)
        if not self.own and _has_program("openrc-run"):
            return _OpenRc(self)
        if _has_program("crontab"):
            return _Crontab(self)
        raise RoexecError("there is neither systemd nor OpenRC nor crontab here to start a server "
                          "with the host; let what starts things here run "
                          + shlex.join(self.words))

    def check(self):
        """Raise RoexecError for what would not work afterwards."""
        if self.user not in ("root", owner_name(os.geteuid())):
            for path in (os.path.realpath(sys.executable), sys.executable):
                while path != "/":
                    if not os.stat(path).st_mode & 0o001:
                        raise RoexecError(
                            f"{self.user} cannot run {sys.executable}, since {path} is private; "
                            f"write for example /usr/bin/python3 {program_path()} install")
                    path = os.path.dirname(path)
        if self.store.exists:
            ask_as_owner(self.store, _check_that_it_is_known)

    def steps(self):
        """The Steps that install it, or upgrade what is there."""
        with open(program_path(), "rb") as file:
            program = _file_step(self.program, file.read(), 0o755)
        steps = [*program, *self._user_steps(), *self._store_steps(), *init_steps(self.config)]
        return steps + self.manager.steps(bool(program))

    def _user_steps(self):
        with contextlib.suppress(KeyError):
            pwd.getpwnam(self.user)
            return []
        shell = next((path for path in ("/usr/sbin/nologin", "/sbin/nologin")
                      if os.path.exists(path)), "/bin/false")
        if _has_program("useradd"):
            return [_command_step("useradd", "--system", "--user-group", "--no-create-home",
                                  "--home-dir", HOST_STORE, "--shell", shell, self.user)]
        if _has_program("adduser"):     # of busybox
            return [_command_step("addgroup", "-S", self.user),
                    _command_step("adduser", "-S", "-D", "-H", "-G", self.user, "-h", HOST_STORE,
                                  "-s", shell, self.user)]
        raise RoexecError(f"there is no user {self.user}, and neither useradd nor adduser to make "
                          "one; make it, or name another one with --as")

    def _store_steps(self):
        if os.path.isdir(self.store.path):
            return []
        return [Action(text=f"make the folder {self.store.path} for {self.user}",
                     perform=self._make_store)]

    def _make_store(self):
        os.makedirs(os.path.dirname(self.store.path), exist_ok=True)
        os.mkdir(self.store.path, 0o700)
        if not self.own:
            entry = pwd.getpwnam(self.user)
            os.chown(self.store.path, entry.pw_uid, entry.pw_gid)

    def removal(self):
        """The Steps that take program and service away, and leave store and configuration."""
        return self.manager.removal() + _remove_step(self.program)

    def leftovers(self):
        """The commands that would remove what `removal` leaves."""
        left = [path for path in (self.store.path, self.config) if os.path.isdir(path)]
        commands = [f"rm -r {shlex.quote(path)}" for path in left]
        return commands + (["userdel roexec"] if self.user == "roexec" and not self.own else [])


def _check_that_it_is_known(store):
    with contextlib.closing(store.connect("ro")) as db:         # an older one is brought up to date
        check_version(store, db)


def ask_as_owner(store, question):
    """Ask something of a store as its owner, in a process of its own: no file of it becomes root's.

    Raises the RoexecError that the question raises.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        answer = "it could not be asked"
        try:
            become_owner(store)
            question(store)
            answer = ""
        except (RoexecError, OSError) as error:
            answer = str(error)
        finally:
            os.write(writer, answer.encode())
            os._exit(0)
    os.close(writer)
    with open(reader) as file:
        answer = file.read()
    os.waitpid(child, 0)
    if answer:
        raise RoexecError(answer)


class _Service:
    """How a server is started with the host: a file at `path`, and the commands of the manager."""

    def __init__(self, installation):
        self.installation = installation

    def _file_steps(self, text, mode=0o644):
        """Steps that write the file, unless somebody has made it their own."""
        try:
            with open(self.path) as file:
                if _MARK not in file.read():
                    return []
        except FileNotFoundError:
            pass
        return _file_step(self.path, text, mode)


class _Systemd(_Service):
    def __init__(self, installation):
        super().__init__(installation)
        own = installation.own
        self.systemctl = ["systemctl", *(["--user"] if own else [])]
        self.path = os.path.join(
            os.path.dirname(user_folder("XDG_CONFIG_HOME", ".config")) if own else "/etc",
            "systemd/user" if own else "systemd/system", "roexec.service")

    def steps(self, changed):
        """Steps that make the unit known, started with the host, and running what is new."""
        installation = self.installation
        unit = self._file_steps(systemd_unit(
            installation.words, None if installation.own else installation.user))
        reload = [_command_step(*self.systemctl, "daemon-reload")] if unit else []
        linger = [_command_step("loginctl", "enable-linger", may_fail=True)] \
            if installation.own else []
        return [*unit, *reload, *linger, _command_step(*self.systemctl, "enable", "roexec"),
                _command_step(*self.systemctl, "restart" if changed or unit else "start",
                              "roexec")]

    def removal(self):
        """Steps that end the server and forget the unit; runs that are on go on."""
        if not os.path.lexists(self.path):
            return []
        return [_command_step(*self.systemctl, "disable", "--now", "roexec"),
                *_remove_step(self.path), _command_step(*self.systemctl, "daemon-reload")]


class _OpenRc(_Service):
    path = "/etc/init.d/roexec"

    def steps(self, changed):
        """Steps that make the script known, started with the host, and running what is new."""
        python, *arguments = self.installation.words
        script = self._file_steps(_OPENRC.format(
            python=python, arguments=shlex.join(arguments), user=self.installation.user), 0o755)
        return [*script, _command_step("rc-update", "add", "roexec", "default"),
                _command_step("rc-service", "roexec", "restart" if changed or script else "start")]

    def removal(self):
        """Steps that end the server and forget the script; runs that are on go on."""
        if not os.path.lexists(self.path):
            return []
        return [_command_step("rc-service", "roexec", "stop"),
                _command_step("rc-update", "del", "roexec", "default"), *_remove_step(self.path)]


class _Crontab(_Service):
    """A line `@reboot` in the crontab of the user who runs the server."""

    @property
    def line(self):
        installation = self.installation
        log = shlex.quote(os.path.join(installation.store.path, "server.log"))
        return f"@reboot exec {shlex.join(installation.words)} >>{log} 2>&1"

    def _crontab(self, *words):
        return ["crontab", *([] if self.installation.own else ["-u", self.installation.user]),
                *words]

    def _lines(self):
        """The lines of the crontab, without ours."""
        import subprocess
        shown = subprocess.run(self._crontab("-l"), capture_output=True, text=True)
        lines = shown.stdout.splitlines() if shown.returncode == 0 else []
        others = [line for line in lines if f" {self.installation.program} server " not in line]
        return others, lines

    def _write_step(self, lines):
        words, text = self._crontab("-"), "".join(line + "\n" for line in lines)
        return Action(text=f"write the crontab of {self.installation.user}",
                    perform=lambda: _run_command(words, False, text))

    def steps(self, changed):
        """Steps that add the line, and let a server run that is what is installed."""
        others, lines = self._lines()
        wanted = [*others, self.line]
        crontab = [] if wanted == lines else [self._write_step(wanted)]
        running = self.installation.store.server()
        if running and not (changed or crontab):
            return []
        return [*crontab, *self._stop_steps(running),
                Action(text=f"start a server as {self.installation.user}", perform=self._start)]

    def _stop_steps(self, running):
        return [Action(text=f"end the server (process {running})", perform=self._stop)] \
            if running else []

    def _stop(self):
        store, deadline = self.installation.store, time.monotonic() + 30
        pid = store.server()
        if pid:
            os.kill(pid, signal.SIGTERM)
        while store.server() is not None:
            if time.monotonic() > deadline:
                raise RoexecError(f"the server (process {pid}) does not end")
            time.sleep(0.05)

    def _start(self):
        import subprocess
        entry = pwd.getpwnam(self.installation.user)
        identity = {} if os.geteuid() else {
            "user": entry.pw_uid, "group": entry.pw_gid,
            "extra_groups": os.getgrouplist(entry.pw_name, entry.pw_gid)}
        subprocess.run(["/bin/sh", "-c", self.line.partition(" ")[2] + " &"], cwd="/",
                       env=clean_environment(entry.pw_uid), start_new_session=True,
                       stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL, **identity)
        deadline = time.monotonic() + 30
        while self.installation.store.server() is None:
            if time.monotonic() > deadline:
                raise RoexecError("the server has not begun; see "
                                  + self.installation.store.file("server.log"))
            time.sleep(0.05)

    def removal(self):
        """Steps that remove the line and end the server; runs that are on go on."""
        others, lines = self._lines()
        return ([] if others == lines else [self._write_step(others)]) + self._stop_steps(
            self.installation.store.server())


# Completion of command lines, made of the table of commands.

SHELLS = ("bash", "zsh", "fish")


def _words_of_option(metavar):
    """What stands behind an option: ids (`jobs`, `runs`), `files`, `none`, or words."""
    if metavar.rstrip(".") in ("FILE", "PATH", "FOLDER"):
        return "files"
    if metavar in ("JOB", "STATE"):
        return {"JOB": "jobs", "STATE": " ".join(STATES)}[metavar]
    return metavar.replace("|", " ") if "|" in metavar and "=" not in metavar else "none"


def _words_of_command(command):
    """What stands alone behind the name of a command, as for options."""
    if command.usage.startswith(("FILE", "[FOLDER")):
        return "files"
    if command.takes_words or not command.takes_ids:
        return "jobs" if command.takes_ids and "JOB" in command.usage else "none"
    if "RUN" in command.usage:
        return "runs"
    if "JOB" in command.usage:
        return "jobs"
    return command.usage.replace("|", " ") if " | " in command.usage else "none"


def completion_script(shell, commands):
    """The script by which a shell (one of SHELLS) completes command lines of these commands."""
    if shell == "fish":
        return _fish(commands)
    words, cases = {"": []}, ""
    for command in commands:
        first, _, second = command.name.partition(" ")
        if first not in words[""]:
            words[""].append(first)
        if second:
            words.setdefault(first, []).append(second)
    for command in commands:
        cases += _bash_case(command, words.get(command.name, ()))
    for first, seconds in words.items():
        if first not in {command.name for command in commands}:
            cases += f'        "{first}") kind="{" ".join(seconds)}" ;;\n'
    families = "|".join(f'"{command.name}"' for command in commands if " " in command.name)
    return (_ZSH if shell == "zsh" else "") + _BASH.replace("@FAMILIES@", families).replace(
        "@CASES@", cases.rstrip("\n"))


def _bash_case(command, seconds):
    """`seconds` are the words that make the name that of another command."""
    behind, switches = {}, []
    for flags, metavar, *_ in command.options:
        switches += [flag for flag in flags.split() if flag.startswith("--")]
        if metavar is not None:
            kind = _words_of_command(command) if flags == "--id" else _words_of_option(metavar)
            behind.setdefault(kind, []).extend(flags.split())
    behind = " ".join(f"{'|'.join(flags)}) kind=\"{kind}\" options= more= ;;"
                      for kind, flags in behind.items())
    return (f'        "{command.name}") kind="{_words_of_command(command)}" '
            f'options="{" ".join(switches)}" more="{" ".join(seconds)}"\n'
            f'            case $previous in {behind} esac ;;\n')


_ZSH = """\
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }
autoload -Uz bashcompinit && bashcompinit
"""
_BASH = """\
# Completes command lines of roexec. Made by `roexec completion`; make it anew after an upgrade.

_roexec_ids() {
    command roexec "${store[@]}" list "$@" 2>/dev/null | while read -r id rest; do
        [ "$id" = ID ] || [ "$id" = RUN ] || echo "$id"
    done
}

_roexec() {
    local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}"
    local before="" word="" name="" kind="" options="" more="" number=0 store
    store=()
    for word in "${COMP_WORDS[@]}"; do
        number=$((number + 1))
        [ "$number" -gt 1 ] || continue
        [ "$number" -le "$COMP_CWORD" ] || break
        case $word in
            --) COMPREPLY=($(compgen -f -- "$current")); return ;;
        esac
        case $before in
            --store|--config|--url|--token) store+=("$before" "$word") ;;
            *)  case $word in
                    -*) ;;
                    *)  if [ -z "$name" ]; then
                            name=$word
                        else
                            case "$name $word" in @FAMILIES@) name="$name $word" ;; esac
                        fi ;;
                esac ;;
        esac
        before=$word
    done
    case $name in
@CASES@
    esac
    case $current in -*) kind=$options ;; esac
    case $kind in
        jobs) kind=$(_roexec_ids jobs) ;;
        runs) kind="latest $(_roexec_ids jobs; _roexec_ids runs)" ;;
        none) kind="" ;;
        files) COMPREPLY=($(compgen -f -- "$current")); return ;;
    esac
    COMPREPLY=($(compgen -W "$kind $more" -- "$current"))
}

complete -o filenames -F _roexec roexec
"""


def _fish(commands):
    text = _FISH
    for command in commands:
        first, _, second = command.name.partition(" ")
        where = f"__fish_seen_subcommand_from {first}"
        if second:
            others = [other.name.partition(" ")[2] for other in commands
                      if other.name.startswith(first + " ")]
            text += _fish_line("__fish_use_subcommand", f"-f -a {first}")
            text += _fish_line(f"{where}; and not __fish_seen_subcommand_from {' '.join(others)}",
                               f"-f -a {second} -d {shlex.quote(command.help)}")
            where += f"; and __fish_seen_subcommand_from {second}"
        else:
            text += _fish_line("__fish_use_subcommand",
                               f"-f -a {first} -d {shlex.quote(command.help)}")
        text += _fish_line(where, _fish_words(_words_of_command(command)))
        for flags, metavar, what, _ in command.options:
            names = " ".join(f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}"
                             for flag in flags.split())
            kind = metavar and (_words_of_command(command) if flags == "--id" else
                                _words_of_option(metavar))
            text += _fish_line(where, f"{names}{' -r ' + _fish_words(kind) if kind else ''} "
                                      f"-d {shlex.quote(what)}")
    return text


def _fish_line(where, what):
    return f"complete -c roexec -n {shlex.quote(where)} {what}\n"


def _fish_words(kind):
    return {"files": "-F", "none": "-f", "jobs": "-f -a '(__roexec_ids jobs)'",
            "runs": "-f -a 'latest (__roexec_ids jobs) (__roexec_ids runs)'"}.get(
                kind, f"-f -a {shlex.quote(kind)}")


_FISH = """\
# Completes command lines of roexec. Made by `roexec completion`; make it anew after an upgrade.

function __roexec_ids
    command roexec list $argv 2>/dev/null | tail -n +2 | string split -f1 ' '
end

"""


# ==== 29 cli ======================================================================================
# The command line. One table of commands drives parsing and help; each command is a small function
# of its Session that returns the exit status. Standard output has what was asked for and nothing
# else, standard error has what is to be said about it. Only `main` ends the program.

class Usage(RoexecError):
    """A command line that cannot be meant; the text says what to write."""


def _say(text):
    """Tell the person something; a standard error that cannot be written is no error."""
    try:
        for line in str(text).splitlines():
            sys.stderr.write(f"roexec: {line}\n")
        sys.stderr.flush()
    except OSError:
        pass


def _here():
    try:
        return os.getcwd()
    except FileNotFoundError:
        raise RoexecError("the current folder is gone; change to another one") from None


def _absolute(path):
    return os.path.normpath(path if os.path.isabs(path) else os.path.join(_here(), path))


def _read_bytes(path):
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise RoexecError(f"cannot read {path}: {error.strerror}") from None


# Which configuration, and which store.

def _config_path(given):
    """The path of the configuration, or None; never one that merely lies in the current folder."""
    asked = given or os.environ.get("ROEXEC_CONFIG")
    if asked:
        return _absolute(asked)
    for folder in (user_folder("XDG_CONFIG_HOME", ".config"), HOST_CONFIG):
        path = os.path.join(folder, "config.yml")
        if os.access(path, os.R_OK):
            return path
    return None


def _settings_of(config):
    """What a server keeps in the store of its configuration, for every client."""
    return {"defaults": config.defaults,
            "scheduler": {"max_concurrent": config.scheduler.max_concurrent,
                          "timezone": config.scheduler.timezone},
            "mail": config.mail, "vault": config.vault, "log": config.log,
            "history": config.history, "metrics": config.metrics}


def locate_store(given, config):
    """The absolute path of the store that --store, $ROEXEC_STORE or the configuration names; None
    where none does. Raises RoexecError."""
    path = given or os.environ.get("ROEXEC_STORE")
    path = path or config.store.path
    return path and _absolute(path)


def _store_in_use():
    """The path of the one live server's store, which is named if it is not the usual one."""
    usual, servers = usual_store(), live_servers()
    if len(servers) > 1:
        listed = ", ".join(f"{path} (process {pid})" for path, pid in servers.items())
        raise RoexecError(f"several servers run, on {listed}; name the store with --store")
    for path, pid in servers.items():
        if path != usual:
            _say(f"using the store {path} of the server that runs (process {pid})")
        return path
    return usual


# What a command works with.

class Session:
    """A command that is performed: its options, the configuration, the store it reaches, or, where
    it is to ask a server elsewhere, its `url`."""

    def __init__(self, command, options):
        self.command, self.options = command, options
        self.url = _url_to_ask(command, options)
        self._config = self._store = self._asked = None
        self._uid = None if self.url else os.getuid()       # root may become somebody else

    @property
    def caller(self):
        """The Caller of a command: who can write into the store may do everything. What one may do
        elsewhere the server decides."""
        name = "elsewhere" if self.url else f"user {owner_name(self._uid)}"
        return Caller(name=name, scopes=("*",), owner=True)

    def read_config(self):
        """Read the configuration, again if it was read before; raises RoexecError."""
        path = _config_path(self.options.config)
        self._config = Config() if path is None else read_config(
            _read_bytes(path), path, os.path.dirname(path))

    @property
    def config(self):
        """The Config."""
        if self._config is None:
            self.read_config()
        return self._config

    @property
    def store(self):
        """The Store, located at the first use; by then this process is its owner's."""
        if self.url:
            raise Usage(_only_here(self.command, self.options))
        if self._store is None:
            path = locate_store(self.options.store, self.config)
            if path is None:            # a second server has a store of its own
                path = usual_store() if self.command.name == "server" else _store_in_use()
            self._store = Store(path, _say)
            if self.options.verbose:
                _say(f"the store is {path}")
            tell = self.options.verbose or self.command.name == "run"
            become_owner(self._store, _say if tell else None)
        return self._store

    @property
    def settled(self):
        """The Store, once what ended while no server ran has been taken in."""
        try:
            settle(self.store)
        except StoreFailure as error:
            _say(f"what has ended meanwhile cannot be recorded: {error}")
        return self.store

    @property
    def asked(self):
        """Whom the command asks: a Remote, or the Local that is this host's store."""
        if self._asked is None and self.url:
            try:
                self._asked = Remote(self.url, _token_to_bear(self.options), _say)
            except ValueError as error:
                raise Usage(str(error)) from None
            if self.options.verbose:
                _say(f"the server is {self._asked.name}")
        self._asked = self._asked or Local(self)
        return self._asked

    def close(self):
        """End the connection to a server, if there is one."""
        if self.url and self._asked:
            self._asked.wire.close()

    @property
    def style(self):
        """How text looks here: as for a pipe, unless standard output is a terminal."""
        if not sys.stdout.isatty():
            return Style()
        color = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        width = os.get_terminal_size(sys.stdout.fileno()).columns
        return Style(host_zone(), color, time.time(), width or None)

    def change(self):
        """A transaction, which under --dry-run can only read."""
        return self.store.read() if self.options.dry_run else self.store.write()

    @property
    def settings(self):
        """The settings of the configuration, which count where no server has had others."""
        return _settings_of(self.config)

    def ids(self):
        """The ids that were given, with --id or alone; at least one, none of them empty."""
        ids = [*self.options.id, *self.options.ids]
        if not ids or "" in ids:
            raise Usage(f"say which one: roexec {self.command.name} {self.command.usage}")
        return ids

    def id(self):
        """The only id that was given."""
        first, *more = self.ids()
        if more:
            raise Usage(f"one id is enough for {self.command.name}")
        return first

    def words(self):
        """The command behind `--`; a leading `cmd` names the command runner and may be left out."""
        words = self.options.behind
        if words is None:
            raise Usage(f"write -- before the command: roexec {self.command.example}")
        words = words[1:] if words[:1] == ["cmd"] else words
        if not words:
            raise Usage(f"there is no command behind --: roexec {self.command.example}")
        return words

    def give(self, payload, text):
        """Print a payload with --json, else the text, a function of the Style."""
        if self.options.json:
            print(json.dumps(payload, indent=2))
        else:
            sys.stdout.write(text(self.style))

    def report(self, changes):
        """Tell the person what has, or would have, become of ids: (id, what)."""
        dry = self.options.dry_run
        self.give({"changes": [{"id": name, "change": what} for name, what in changes],
                   "dry_run": dry},
                  lambda style: "".join(f"{name}: {what}{' (dry run)' * dry}\n"
                                        for name, what in changes))

    def nothing(self, what):
        """Say where nothing was found, and whether a server runs there."""
        if self.url:
            return _say(f"no {what} on {self.asked.name}")
        store = self.store
        there = "" if store.exists else " (there is no store there yet)"
        return _say(f"no {what} in {store.path}{there}; "
                    f"{'no' if store.server() is None else 'a'} server runs on it")


def _url_to_ask(command, options):
    """The URL of the server that a command is to ask, None for the store of this host."""
    if options.url is not None and not command.asks:
        raise Usage(_only_here(command, options))
    if options.url is not None and options.store:
        raise Usage("--store is for a store of this host, --url for a server; write one of them")
    url = options.url
    if url is None and not options.store and command.name != "server":
        url = os.environ.get("ROEXEC_URL") or None
    if options.token is not None and url is None:
        raise Usage("--token is for a server; write --url too")
    return url


def _token_to_bear(options):
    return (options.token or os.environ.get("ROEXEC_TOKEN") or "").strip()


def _only_here(command, options):
    name = {"run": "run --name", "logs": "logs of many runs"}.get(command.name, command.name)
    where = "do without --url" if options.url is not None else "unset ROEXEC_URL, or write --store"
    return f"{name}: this is for a store of this host alone; {where}"


class Local:
    """The store of this host, as commands ask it; they ask a server elsewhere, Remote, the same."""

    def __init__(self, session):
        self.session = session

    # Jobs.

    def jobs(self):
        """Payloads of all jobs."""
        payloads = self._jobs()
        if any(payload["active"] for payload in payloads):
            settle(self.session.store)  # only then there can be anything to take in
            payloads = self._jobs()
        return payloads

    def _jobs(self):
        session = self.session
        if not session.store.exists:
            return []
        with session.store.read() as db:
            return job_payloads(db, list_jobs(db), time.time(), session.settings)

    def job(self, job_id):
        """The payload of a job; raises RoexecError."""
        session = self.session
        with session.store.read() as db:
            payload, = job_payloads(db, [get_job(db, job_id)], time.time(), session.settings)
        return payload

    def find(self, target):
        """(payload of the job, None) of the id of a job, else (None, that of the run meant)."""
        with self.session.settled.read() as db:
            is_job = find_job(db, target) is not None
        return (self.job(target), None) if is_job else (None, self.run(target))

    def slots(self, job_id, after, count):
        """Payloads of the next slots, those > `after`, of a job or of all."""
        with self.session.store.read() as db:
            jobs, zone = self._jobs_due(db, job_id, after)
        return coming_slots(jobs, after, zone, count)

    def foresight(self, job_id, after, end, duration):
        """The payload of all slots > `after` and < `end`, of a job or of all."""
        session = self.session
        with session.store.read() as db:
            jobs, zone = self._jobs_due(db, job_id, after)
            jobs = [job for job in jobs if job.enabled and job.schedule]
            ids, most = [job.id for job in jobs], in_effect(db, session.settings)[2]
            usual = usual_durations(db, ids) if duration is None else dict.fromkeys(ids, duration)
        return foresight(jobs, after + 1, end, zone, usual, most)

    def _jobs_due(self, db, job_id, after):
        """([Job], tzinfo of those that name none): one, or all that are not paused."""
        defaults, zone, _ = in_effect(db, self.session.settings)
        rows = [get_job(db, job_id)] if job_id else [
            row for row in list_jobs(db) if row["paused"] <= max(after, time.time())]
        return [job_in_effect(row, defaults) for row in rows], zone

    def why(self, job_id, text):
        """The payload of why a job has not run; raises ValueError for no instant."""
        store = self.session.settled
        with store.read() as db:
            return explanation(store, db, job_id, text, self.session.settings)

    def status(self):
        """The payload of whether the server is healthy."""
        session = self.session
        store = session.settled
        process, health, states, jobs = store.server(), "there is no store yet", [], []
        notices = []
        if store.exists:
            health = "no server runs" if process is None else (
                "healthy" if _answers(store) else STUCK)
            with store.read() as db:
                states, jobs = [run["state"] for run in active_runs(db)], job_ids(db)
                notices = unsent_notices(db)
                if health == "healthy":
                    health = store.trouble() or _overdue(db, session.settings) or health
        return {"store": store.path, "process": process, "health": health, "jobs": len(jobs),
                "running": states.count("running"), "queued": states.count("queued"),
                "warnings": _warnings(store, session.config),
                "unsent_notices": [notice_payload(row) for row in notices]}

    def exported(self, ids):
        """The specs of jobs, or of all, as a file has to have them."""
        with self.session.store.read() as db:
            return [job.spec for job in exported_jobs(db, ids or job_ids(db))]

    def delete(self, ids, dry_run):
        """Delete jobs, none of them if one does not exist."""
        with self.session.change() as db:
            for job_id in ids:
                get_job(db, job_id)
            if not dry_run:
                delete_jobs(db, ids, time.time(), self.session.caller.name)
        self.tell(dry_run)

    def pause(self, ids, pausing, until):
        """Pause the schedules of jobs until an instant (seconds), or resume them."""
        with self.session.store.write() as db:
            for job_id in ids:
                pause_job(db, job_id, pausing, until, self.session.caller.name)
        self.tell()

    def tell(self, dry_run=False):
        """Tell the server that something was changed."""
        if not dry_run:
            self.session.store.wake()

    def now(self):
        """The time there (seconds)."""
        return time.time()

    # Runs.

    def runs(self, groups, job_id=None, since=None, steps=False):
        """Payloads of runs, newest first, of each of some groups ([state], how many or None)."""
        store, rows = self.session.settled, []
        if not store.exists:
            return []
        with store.read() as db:
            for states, limit in groups:
                where = run_filter(states, job_id, since, steps=steps)
                rows += list_runs(db, where, -1 if limit is None else limit)
            return run_payloads(store, db, rows)

    def run(self, target):
        """The payload of the run that a person means; raises RoexecError."""
        store = self.session.settled
        with store.read() as db:
            payload, = run_payloads(store, db, [find_run(db, target)])
        return payload

    def steps(self, run_id):
        """Payloads of the steps of a run."""
        store = self.session.store
        with store.read() as db:
            return step_payloads(store, db, get_run(db, run_id))

    def usual(self, job_ids):
        """{job id: seconds} that runs of jobs take usually, as far as that is known."""
        with self.session.store.read() as db:
            return usual_durations(db, job_ids)

    def retried(self, run, first, everything):
        """(Job, steps that would not be repeated) of a retry of the run of a payload."""
        with self.session.store.read() as db:
            _, job, how = self._retry(db, run, first, everything)
        return job, how.get("taken", ())

    def _retry(self, db, run, first, everything):
        run, first = whole_of(db, get_run(db, run["id"]), first)
        job = job_to_retry(db, run, self.session.settings)
        return run, job, steps_to_retry(db, run, job, first, everything)

    def retry(self, run, env, first, everything):
        """Run again what the run of a payload ran -> the id of the new run."""
        session, store = self.session, self.session.store
        with store.read() as db:
            run, job, how = self._retry(db, run, first, everything)
        env = {**json.loads(run["env"] or "{}"), **env}
        how.update(env=env, retry_of=run["id"], trigger="retry", by=session.caller.name)
        secret = any(param.secret and name in env for name, param in job.params.items())
        if store.server() is not None and not secret:
            return request_run(store, job, **how)
        return run_detached(store, job, settings=session.settings, **how)

    def cancel(self, run_id):
        """Cancel a run -> its state by then."""
        store = self.session.store
        cancel_run(store, run_id, by=self.session.caller.name)
        with store.read() as db:
            return get_run(db, run_id)["state"]

    def wait(self, target):
        """The row of a run once it has ended."""
        watch = _Watch(self.session.settled, target)
        while not watch.ended():
            time.sleep(0.1)
        return watch.run

    # Tokens, and who has changed what.

    def tokens(self):
        """Payloads of all tokens."""
        if not self.session.store.exists:
            return []
        with self.session.store.read() as db:
            return [token_payload(row) for row in list_tokens(db)]

    def add_token(self, token, dry_run):
        """Make a token, as `token_of` has it -> its text, or None in a dry run."""
        session = self.session
        if not dry_run:
            session.store.create()
        if not session.store.exists:
            return None
        with session.change() as db:
            return add_token(db, token, session.caller, time.time(), dry_run)

    def rotate_token(self, name, dry_run):
        """Give a token a new text -> that, or None in a dry run."""
        with self.session.change() as db:
            get_token(db, name)
            return None if dry_run else renew_token(db, name, self.session.caller, time.time())

    def revoke_tokens(self, names, dry_run):
        """Remove tokens, none of them if one does not exist."""
        with self.session.change() as db:
            for name in names:
                get_token(db, name)
            for name in () if dry_run else names:
                remove_token(db, name, self.session.caller, time.time())

    def audit(self, limit):
        """Payloads of the newest changes."""
        if not self.session.store.exists:
            return []
        with self.session.store.read() as db:
            return [audit_payload(row) for row in list_audit(db, limit)]


# Job files.

def _is_job_file(name):
    return name.endswith((".yml", ".yaml", ".json")) and not name.startswith(".")


class _JobFiles:
    """The job files at some paths, `given`: once they are read the jobs of each, and what is wrong.

    `jobs` is {absolute path: [Job]} of those that could be read, `labels` {absolute path: path as
    given} of all, `folders` the folders among the paths; `problems` and `warnings` are texts.
    """

    def __init__(self, paths):
        self.given = paths
        self.jobs, self.labels, self.folders, self.repeated = {}, {}, set(), []
        self.problems, self.warnings = [], []
        for path in paths:
            try:
                self._expand(path)
            except RoexecError as error:
                self.problems.append(str(error))

    def read(self, defaults):
        """Read them all; `defaults` is the spec of the configuration's."""
        for source, label in self.labels.items():
            try:
                self.jobs[source] = self._read(source, label, defaults)
            except RoexecError as error:
                self.problems += str(error).splitlines()
        return self

    def _expand(self, path):
        if path == "-":
            return self._add("<stdin>", "<stdin>")
        source = _absolute(path)
        files = files_at(path)
        if files != [path]:
            self.folders.add(source)
        for label in files:
            self._add(_absolute(label), label)

    def _add(self, source, label):
        if source in self.labels:
            self.repeated.append(label)
        self.labels[source] = label

    def _read(self, source, label, defaults):
        if source == "<stdin>":
            text, folder = sys.stdin.buffer.read(), _here()
        else:
            text, folder = _read_bytes(label), os.path.dirname(source)
        file = read_job_file(text, label, folder, defaults)
        self.warnings += map(str, file.warnings)
        return file.jobs

    def check_ids(self):
        """Raise RoexecError if an id stands in two files."""
        places = {}
        for source, jobs in self.jobs.items():
            for job in jobs:
                other = places.setdefault(job.id, source)
                if other != source:
                    raise RoexecError(f'job "{job.id}" stands in {other} and in {source}; '
                                      "remove one of them")

    def sources(self, rows):
        """{source: [Job]}, also of files that have left one of the folders; `rows` are of jobs."""
        left = {row["source"] for row in rows if row["source"]} - self.labels.keys()
        gone = [source for source in sorted(left) if os.path.dirname(source) in self.folders
                and _is_job_file(os.path.basename(source))]
        return {**dict.fromkeys(gone, ()), **self.jobs}


def files_at(path):
    """The paths of the job files that a path means: itself, or those in a folder, by name."""
    try:
        names = sorted(filter(_is_job_file, os.listdir(path)))
    except (FileNotFoundError, NotADirectoryError):
        return [path]                   # reading it will say what is wrong
    except OSError as error:
        raise RoexecError(f"cannot read {path}: {error.strerror}") from None
    if not names:
        raise RoexecError(f"there is no job file in {path}; one ends in .yml, .yaml or .json, "
                          "and for no jobs says jobs: []")
    return [os.path.join(path, name) for name in names]


class JobFiles:
    """The job files that a server owns; to be called each second, it follows all their changes.

    Where something has changed, and then been still from one call to the next, all are applied. A
    broken one is reported once, and its jobs stay. With `due = True` the next call applies at once.
    """

    def __init__(self, store, paths, defaults, say):
        self.store, self.paths, self.defaults, self.say = store, paths, defaults, say
        self.due = True
        self._seen = self._applied = None
        self._told, self._again = [], None

    def __call__(self):
        seen = [_look_of(path) for path in self.paths]
        still, self._seen = seen == self._seen, seen
        again = self._again is not None and time.monotonic() > self._again
        if self.due or again or (still and seen != self._applied):
            self.due, self._applied = False, seen
            self._apply()

    def _apply(self):
        files = _JobFiles(self.paths).read(self.defaults)
        told = [(text, "ERROR") for text in files.problems]
        if told:
            told.append(("The jobs described there stay as they were until that is mended",
                         "WARNING"))
        try:
            files.check_ids()
            with self.store.write() as db:
                changes = plan_apply(db, files.sources(list_jobs(db)), prune=True)
                perform_apply(db, changes, time.time(), "server")
                missing = missing_jobs(db, changes)
        except RoexecError as error:
            changes, missing = [], []
            told += [(text, "ERROR") for text in str(error).splitlines()]
        told += [(text, "WARNING") for text in [*files.warnings, *missing]]
        for line in told:
            if line not in self._told:
                self.say(*line)
        for change in changes:
            if change.change != "unchanged":
                self.say(f"Job {change.id} {change.change}")
        # What was in the way, be it a full disk or a job of the same id, may go by itself.
        self._told, self._again = told, time.monotonic() + 60 if told else None


def _look_of(path):
    """What changes where a job file at a path does."""
    look = []
    try:
        for file in files_at(path):
            look.append(file)
            if os.path.exists(file):
                state = os.stat(file)
                look += state.st_mtime_ns, state.st_size, state.st_ino
    except (OSError, RoexecError) as error:
        look.append(str(error))
    return look


# Commands about jobs.

def _cmd_apply(session):
    if not session.options.file:
        raise Usage(f"name the job files: roexec {session.command.example}")
    files = _JobFiles(session.options.file)
    if files.repeated:
        raise Usage(f"{files.repeated[0]} is given twice")
    if session.url:
        return _apply_there(session, files)
    files.read(session.config.defaults)
    for text in files.warnings:
        _say(f"warning: {text}")
    if files.problems:
        raise RoexecError("\n".join(files.problems))
    files.check_ids()
    return _register(session, files.sources, session.options.prune)


def _apply_there(session, files):
    """Have the server read the files; it names them by what they are called here."""
    options, asked = session.options, session.asked
    if files.problems:
        raise RoexecError("\n".join(files.problems))
    names = {source_name(label): label for label in files.labels.values()}
    texts = {name: _file_text(label) for name, label in names.items()}
    for folder in map(source_name, files.given) if options.prune and files.folders else ():
        texts.update((job["source"], "jobs: []") for job in asked.jobs() if _has_left(
            job["source"], folder, texts))
    try:
        answer = asked.apply(texts, options.prune, options.dry_run)
    except Denied as error:
        raise RoexecError(_with_labels(error, names)) from None
    _report_answer(session, answer)


def _report_answer(session, answer):
    """Say what a server has made of jobs."""
    for text in answer["warnings"]:
        _say(f"warning: {printable(text)}")
    session.report([(change["id"], change["change"]) for change in answer["changes"]])


def source_name(path):
    """What a server calls the job file at a path of this host: the path as it was written."""
    return os.path.normpath(path).lstrip("/")


def _file_text(label):
    data = sys.stdin.buffer.read() if label == "<stdin>" else _read_bytes(label)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RoexecError(f"{label}: byte {error.start} is not UTF-8") from None


def _has_left(source, folder, texts):
    """Whether a source was a file of a folder in which it is no more."""
    return bool(source) and source not in texts and os.path.dirname(source) == folder \
        and _is_job_file(os.path.basename(source))


def _with_labels(error, names):
    """The text of what a server has found wrong with files, which are called as they are here."""
    problems = error.members.get("errors")
    if not isinstance(problems, list) or not problems:
        return str(error)
    return "\n".join(printable(str(Problem(**{
        **{name: problem.get(name) for name in Problem.__slots__},
        "file": names.get(problem.get("file"), problem.get("file"))}))) for problem in problems)


def _cmd_add(session):
    options, folder = session.options, None if session.url else _here()
    job_id = session.id()
    settings = [_pair(text, "--set", "KEY=VALUE") for text in options.set]
    mapping = {"id": job_id}
    if options.schedule:
        mapping["schedule"] = options.schedule
    if options.behind is not None:
        mapping["command"] = session.words()
    job = job_from_mapping(mapping, folder, settings)
    if "directory" not in dict(settings):           # the user's home, not where this was written
        job = Job({key: value for key, value in job.spec.items() if key != "directory"})
    if session.url:
        return _report_answer(session, session.asked.put(job, options.dry_run))
    return _register(session, lambda rows: {None: [job]})


def _pair(text, option, shape):
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise Usage(f'{option} {printable(text)}: write {option} {shape}')
    return key, value


def _register(session, sources, prune=False):
    """Apply the jobs of sources, a function of the rows of the jobs that there are."""
    store, dry = session.store, session.options.dry_run
    if dry and not store.exists:
        changes = [Change(id=job.id, change="added", job=job)
                   for jobs in sources([]).values() for job in jobs]
        missing = missing_jobs(None, changes)
    else:
        if not dry:
            store.create()
        with session.change() as db:
            changes = plan_apply(db, sources(list_jobs(db)), prune)
            if not dry:
                perform_apply(db, changes, time.time(), session.caller.name)
            missing = missing_jobs(db, changes)
    for text in missing:
        _say(f"warning: {text}")
    session.asked.tell(dry)
    session.report([(change.id, change.change) for change in changes])
    jobs = [change.job for change in changes if change.job]
    if any(job.schedule and job.enabled for job in jobs) and store.server() is None:
        _say(f"scheduled jobs start when a server runs on {store.path}: roexec server")


def _cmd_delete(session):
    ids = session.ids()
    session.asked.delete(ids, session.options.dry_run)
    session.report([(job_id, "deleted") for job_id in ids])


def _cmd_export(session):
    specs = session.asked.exported([*session.options.id, *session.options.ids])
    session.give({"jobs": specs}, lambda style: job_to_yaml(map(Job, specs)))


def _cmd_edit(session):
    job_id = session.id()
    with session.store.read() as db:
        row, exported = get_job(db, job_id), job_to_yaml(exported_jobs(db, [job_id]))
    draft = _Draft(row, exported)
    if not draft.edit():
        return session.report([(job_id, "unchanged")])
    if not session.options.json:
        sys.stdout.write(draft.difference())
    if not session.options.dry_run:
        draft.save()
    return _register(session, lambda rows: {row["source"]: draft.jobs})


class _Draft:
    """A job that is being edited: the file that it is described in, where that is still there, else
    its export. `jobs` are those of the text once it has been edited."""

    def __init__(self, row, exported):
        self.id, self.jobs, source = row["id"], [], row["source"]
        self.path = source if source and os.path.exists(source) else None
        if self.path is None:
            self.text = exported
        elif os.access(self.path, os.W_OK):
            self.text = _read_bytes(self.path).decode("utf-8", "replace")
        else:
            raise RoexecError(f'job "{self.id}" is described in {self.path}, which '
                              f"{owner_name(os.geteuid())} may not change; change it there, and "
                              f"write roexec apply -f {self.path}")
        self.edited = self.text

    def edit(self):
        """Let the person edit until nothing is wrong -> whether anything is different."""
        import tempfile
        with tempfile.TemporaryDirectory(prefix="roexec-") as folder:
            path = os.path.join(folder, f"{self.id}.yml")
            while True:
                with open(path, "w", encoding="utf-8") as file:
                    file.write(self.edited)
                _open_editor(path)
                self.edited = _read_bytes(path).decode("utf-8", "replace")
                if self.edited == self.text:
                    return False
                try:
                    self.jobs = self._read()
                    return True
                except RoexecError as error:
                    _say(error)
                if not _agrees("Edit it again?"):
                    raise RoexecError("nothing was changed")

    def _read(self):
        label = self.path or f"{self.id}.yml"
        jobs = read_job_file(self.edited, label, os.path.dirname(self.path or "/")).jobs
        if self.path is None:
            if [job.id for job in jobs] != [self.id]:
                raise RoexecError(f'{label}: this is about the one job "{self.id}"; for another '
                                  "one write roexec add, or roexec apply")
            if jobs[0].directory == "~":        # as it is without a file
                jobs = [Job({key: value for key, value in jobs[0].spec.items()
                             if key != "directory"})]
        return jobs

    def difference(self):
        """What was changed, as diff -u shows it."""
        import difflib
        lines = difflib.unified_diff(self.text.splitlines(), self.edited.splitlines(),
                                     "before", "after", lineterm="")
        return "".join(printable(line) + "\n" for line in lines)

    def save(self):
        """Write the file, if there is one, unless somebody else has changed it meanwhile."""
        if self.path is None:
            return
        if _read_bytes(self.path).decode("utf-8", "replace") != self.text:
            raise RoexecError(f"{self.path} has been changed by somebody else; nothing was changed")
        with open(self.path, "w", encoding="utf-8") as file:
            file.write(self.edited)


def _open_editor(path):
    """Open $VISUAL, else $EDITOR, else vi(1), as other programs do: it may have options."""
    import subprocess
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    status = subprocess.call(["/bin/sh", "-c", f'{editor} "$1"', editor, path])
    if status != 0:
        raise RoexecError(f"the editor ({editor}) has failed, status {status}; nothing was changed")


def _agrees(question):
    """Whether the person at the terminal says yes; without one nobody does."""
    if not sys.stdin.isatty():
        return False
    sys.stderr.write(f"roexec: {question} [Y/n] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("", "y", "yes")


def _cmd_pause(session):
    options, asked = session.options, session.asked
    pausing, until = session.command.name == "pause", math.inf
    if pausing and options.for_ is not None:
        until = math.ceil(asked.now() + _duration_of("--for", options.for_))
    if options.all and (options.id or options.ids):
        raise Usage("--all is for all jobs; write it without an id")
    jobs = asked.jobs() if options.all else [asked.job(job_id) for job_id in session.ids()]
    if not options.dry_run:
        asked.pause([job["id"] for job in jobs], pausing, until)
    session.report([(job["id"], _pause_in_words(job, until if pausing else 0)) for job in jobs])


def _pause_in_words(job, until):
    """What becomes of the job of a payload that is paused until an instant, 0 or infinity too."""
    if not until:
        return "resumed" if job["paused"] else "not paused"
    end = None if until == math.inf else format_instant(until)
    if job["paused"] and job["paused_until"] == end:
        return "already paused"
    return f"paused until {end}" if end else "paused"


# Commands that show.

def _cmd_list_jobs(session):
    payloads = session.asked.jobs()
    if not payloads:
        session.nothing("jobs")
    session.give(page("jobs", payloads),
                 lambda style: jobs_table(payloads, style) if payloads else "")


def _cmd_list_runs(session):
    options, asked = session.options, session.asked
    states = _asked_states(options.state)
    since = options.since and _since(options.since)
    most = 0 if options.active else max(0, options.limit)
    groups = [([state for state in chosen if state in states], limit) for chosen, limit in (
        (("queued",), None), (("running",), None), (FINAL_STATES, most))]
    payloads = asked.runs([group for group in groups if group[0]], options.job, since,
                          options.steps)
    if not payloads and options.job:
        asked.job(options.job)
    if not payloads:
        session.nothing("runs")
    elif not session.url:
        _say_what_waits(session.store, payloads)
    session.give(page("runs", payloads),
                 lambda style: runs_table(payloads, style, _usual_of(asked, payloads, style))
                 if payloads else "")


def _say_what_waits(store, payloads):
    """Say that no server starts what waits for one."""
    queued = {payload["id"] for payload in payloads if payload["state"] == "queued"}
    if queued and store.server() is None:
        with store.read() as db:
            waits = any(row["id"] in queued and not row["owner"] for row in active_runs(db))
        if waits:
            _say("what is queued waits for a server; none runs on this store")


def _usual_of(asked, payloads, style):
    """{job id: seconds} that what is running takes usually, where that is shown."""
    running = {payload["job_id"] for payload in payloads if payload["state"] == "running"}
    return asked.usual(running) if running and style.now is not None else {}


def _asked_states(texts):
    states = [state for text in texts for state in text.split(",")]
    for state in states:
        if state not in STATES:
            raise Usage(f'there is no state "{printable(state)}"'
                        + (nearest(state, STATES) or f"; there are {', '.join(STATES)}"))
    return states or list(STATES)


def _since(text):
    """Seconds of an instant, or of one that lies as long ago as a duration says."""
    try:
        return time.time() - parse_duration(text)
    except ValueError:
        return _instant_of(text, "neither a duration such as 2h nor an instant")


def _instant_of(text, what="no instant"):
    try:
        return parse_instant(text, host_zone())
    except ValueError:
        raise Usage(f'"{printable(text)}" is {what}; write for example 2025-08-01T02:00:00Z or '
                    "2025-08-01") from None


def _cmd_show(session):
    job, run = session.asked.find(session.id())
    if job is not None:
        return session.give(job, lambda style: job_text(job, Job(job["spec"]), style))
    steps, log = session.asked.steps(run["id"]), run["log"]
    if steps:
        run["steps"] = steps
    if log and not session.url:
        log = session.store.file(log)
    return session.give(run, lambda style: run_text(
        run, style, _usual_of(session.asked, [run], style).get(run["job_id"]), log))


def _cmd_next(session):
    options = session.options
    after = math.ceil(_instant_of(options.from_) if options.from_ else time.time()) - 1
    if options.to is None and options.duration is not None:
        raise Usage("--duration is for --to, which shows what runs would meet")
    if options.timezone and options.cron is None:
        raise Usage("--timezone is for --cron; a job has its own")
    give = _give_slots if options.to is None else _give_foresight
    if options.cron is not None:
        return give(session, _OfCron(options, session.settings), None, after)
    return give(session, session.asked, session.id() if options.id or options.ids else None, after)


class _OfCron:
    """The slots of an expression, asked for as those of jobs are."""

    def __init__(self, options, settings):
        self.jobs, self.settings = [_job_of_cron(options)], settings
        self.zone = in_effect(None, settings)[1]

    def slots(self, _, after, count):
        """Payloads of its next slots."""
        return coming_slots(self.jobs, after, self.zone, count)

    def foresight(self, _, after, end, duration):
        """The payload of all of them for some time."""
        usual = {} if duration is None else {self.jobs[0].id: duration}
        return foresight(self.jobs, after + 1, end, self.zone, usual,
                         in_effect(None, self.settings)[2])


def _job_of_cron(options):
    seed = (options.id + options.ids + [""])[0]
    try:
        Cron(options.cron, seed)
        if options.timezone:
            get_zone(options.timezone)
    except ValueError as error:
        raise Usage(str(error)) from None
    return Job.from_spec({"id": seed or "cron", "schedule": options.cron,
                          "timezone": options.timezone})


def _give_slots(session, asked, job_id, after):
    """Print the next slots of a job or of all, in order."""
    count = session.options.count
    job = job_id and asked.job(job_id)
    if job and job["paused"]:
        until, before = (f" until {job['paused_until']}", " before that") if job["paused_until"] \
            else ("", "")
        _say(f'job "{job_id}" is paused{until}: these slots{before} will be skipped')
    payloads = asked.slots(job_id, after, 10 if count is None else max(0, count))
    if job and not payloads:
        why = ("is disabled" if not job["enabled"] else "has no further slots" if job["schedule"]
               else "has no schedule")
        _say(f'job "{job_id}" {why}')
    session.give({"slots": payloads},
                 lambda style: slots_table(payloads, style) if payloads else "")


def _give_foresight(session, asked, job_id, after):
    """Print all slots of a job or of all until --to, and what would become of them."""
    options = session.options
    end = _instant_of(options.to)
    if options.count is not None:
        raise Usage("--to shows all slots until then; do without --count")
    if end <= after:
        raise Usage(f"--to {options.to} is before the first instant asked for")
    duration = options.duration and _duration_of("--duration", options.duration)
    payload = asked.foresight(job_id, after, end, duration)
    session.give(payload, lambda style: foresight_text(payload, style))


def _duration_of(option, text):
    try:
        return parse_duration(text)
    except ValueError as error:
        raise Usage(f"{option}: {error}") from None


# Why a job runs, or does not.

def _cmd_why(session):
    job_id, *words = session.ids()
    try:
        payload = session.asked.why(job_id, " ".join(words))
    except ValueError as error:
        raise Usage(str(error)) from None
    session.give(payload, lambda style: explanation_text(payload, style))


# Moving from cron.

def _cmd_import_crontab(session):
    options = session.options
    if len(options.ids) != 1:
        raise Usage(f"name one crontab, or - for standard input: roexec {session.command.example}")
    if options.system and options.user is not None:
        raise Usage("--user is for the crontab of a user, --system for one that names a user in "
                    "each line; write one of them")
    path, me = options.ids[0], owner_name(os.geteuid())
    text = sys.stdin.buffer.read() if path == "-" else _read_bytes(path)
    system = options.system or (options.user is None and _is_system_crontab(path))
    owner = None if system else me if options.user is None else options.user
    crontab = read_crontab(text, "<stdin>" if path == "-" else path, owner, me)
    session.give({"defaults": crontab.defaults, "jobs": crontab.jobs}, lambda style: crontab.text)
    for note in crontab.notes:
        _say(note)
    if not system and any(re.match(r"root\s", job["command"]) for job in crontab.jobs):
        _say('"root" is no program; if each line names a user, import it with --system')
    return 0 if crontab.complete else 1


def _is_system_crontab(path):
    """Whether cron itself would look for a user in each line of this file."""
    path = os.path.realpath(path)
    return path == "/etc/crontab" or os.path.dirname(path) == "/etc/cron.d"


_ANSWER_PATIENCE = 5    # seconds for a server to notice that it was woken


def _cmd_status(session):
    try:
        payload = session.asked.status()
    except Unreachable as error:
        _say(error)
        return 3
    session.give(payload, lambda style: status_text(payload, style))
    if payload["process"] is None and not session.url:
        return 3
    return 0 if payload["health"] == "healthy" and not payload["warnings"] else 1


def _warnings(store, config):
    return [f"{found.about}: {found.text}" for found in status_warnings(store, config)]


def _answers(store):
    """Whether the server takes what wakes it from the FIFO."""
    store.wake()
    fifo = os.open(store.file("wake"), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    poller, deadline = select.poll(), time.monotonic() + _ANSWER_PATIENCE
    poller.register(fifo, select.POLLIN)
    try:
        while poller.poll(0):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True
    finally:
        os.close(fifo)


def _overdue(db, settings):
    """A sentence on a slot that the server ought to have decided long ago, or None."""
    defaults, zone, _ = in_effect(db, settings)
    for row in list_jobs(db):
        job = job_in_effect(row, defaults)
        slot = next_slot(job, row["position"], zone) if job.enabled else None
        if slot and delayed(job, slot) + ON_TIME < time.time():
            return f'job "{job.id}" was due at {format_instant(slot)} and is still undecided'
    return None


def _cmd_doctor(session):
    if session.options.job is not None:
        return _give_environments(session, dict(os.environ))
    findings = []
    try:
        session.read_config()
    except RoexecError as error:
        findings = [Finding(level="wrong", about="config", text=str(error))]
        session._config = Config()
    findings += examine(session.store, session.config)
    payloads = [{name: getattr(found, name) for name in Finding.__slots__} for found in findings]
    healthy = all(found.level != "wrong" for found in findings)
    session.give({"healthy": healthy, "findings": payloads},
                 lambda style: findings_text(payloads, style))
    return 0 if healthy else 1


def _give_environments(session, caller):
    with session.store.read() as db:    # which may make this process another user's
        job = effective_job(db, session.options.job, session.settings)
    payload = compare_environments(job, caller)
    session.give(payload, lambda style: environments_text(payload, style))


# Commands about logs and the end of runs.

class _Watch:
    """A run that is looked at again and again; now and then also whether it was lost."""

    def __init__(self, store, target):
        self.store, self._settle_at = store, time.monotonic() + 1
        with store.read() as db:
            self.run = find_run(db, target)

    def ended(self):
        """Whether the run has ended by now."""
        if self.run["state"] not in FINAL_STATES:
            if time.monotonic() > self._settle_at:
                settle(self.store)
                self._settle_at = time.monotonic() + 1
            with self.store.read() as db:
                self.run = get_run(db, self.run["id"])
            self.run = live_run(self.store, self.run)[0]
        return self.run["state"] in FINAL_STATES

    def log(self):
        """Where the log lies below the store's folder; None where there is none, or not yet."""
        log = live_log(self.store, self.run)
        if log is None:
            self.ended()
        return log or self.run["log"]


def _cmd_logs(session):
    options = session.options
    if options.stream not in (None, "out", "err"):
        raise Usage(f'there is no stream "{printable(options.stream)}"; write out or err')
    chosen = {"since": options.since and _since(options.since), "pattern": _searched(options.grep)}
    if not (options.id or options.ids) and (options.job or options.since or options.grep):
        return _print_logs(session, chosen)
    if options.job:
        raise Usage("--job is for the logs of many runs; name a run or a job, or write --job")
    if session.url:
        return _print_log_there(session, chosen)
    watch = _Watch(session.settled, session.id())
    while True:
        over, log = watch.ended(), watch.log()
        if over or log is not None or not options.follow:
            break
        time.sleep(0.1)
    if log is None:
        raise RoexecError(why_no_log(watch.run))
    with session.store.read() as db:
        has_steps = bool(step_rows(db, watch.run["id"]))
    try:
        if has_steps:
            logs = _StepLogs(lambda run_id: _log_of_step(session.store, run_id), options, chosen)
            logs.print(follow(session.store.file(log), watch.ended if options.follow else
                              lambda: True, wait=logs.wait))
        else:
            _print_log(session.store.file(log), options, watch.ended, chosen)
    except FileNotFoundError:
        raise RoexecError("the log of this run is not there (any more)") from None


def _searched(text):
    try:
        return None if text is None else re.compile(text.encode())
    except re.error as error:
        raise Usage(f"--grep {printable(text)}: {error}") from None


def _print_log(path, options, ended, chosen):
    offset = 0
    if options.tail is not None:
        with StoredLog(path) as log:
            offset = log.tail(max(0, options.tail))
    ended = ended if options.follow else lambda: True
    _print_lines(follow(path, ended, offset=offset, wait=time.sleep), options, chosen)


def _print_log_there(session, chosen):
    """Print the log of a run elsewhere, with those of its steps."""
    options, asked, target = session.options, session.asked, session.id()
    tail = None if options.tail is None else max(0, options.tail)
    target = asked.run(target)["id"] if options.follow else target
    if _has_steps(asked, target):
        logs = _StepLogs(lambda run_id: GrowingLog(asked, run_id), options, chosen)
        logs.print(GrowingLog(asked, target).until_end(options.follow, logs.wait))
    else:
        _print_lines(Following(asked, target, tail) if options.follow else asked.log(target, tail),
                     options, chosen)


def _has_steps(asked, run_id):
    try:
        return bool(asked.steps(run_id))
    except Denied as error:
        if error.status != 403:
            raise
        return False                    # who may read logs alone gets that of the pipeline


def _log_of_step(store, run_id):
    """What grows of the log of a step, or None without one."""
    with store.read() as db:
        row = find_run_row(db, run_id)
    log = row and live_log(store, row)
    with contextlib.suppress(FileNotFoundError):
        return _StoredGrowth(store.file(log)) if log else None


class _StoredGrowth:
    """The lines of a stored log as it grows; GrowingLog is the same of one elsewhere."""

    def __init__(self, path):
        self.log, self.offset = StoredLog(path), 0

    def more(self, over):
        """Further lines, as bytes; once it is `over` a piece of one too."""
        found = next_lines(self.log, self.offset, over, 1 << 16)
        if not found and self.log.refresh():
            found = next_lines(self.log, self.offset, over, 1 << 16)
        self.offset = found[-1].end if found else self.offset
        return [line for lines in found for line in lines.data.splitlines(keepends=True)]

    def close(self):
        """Close it."""
        self.log.close()


def _print_lines(log, options, chosen):
    """Print what is asked for of the Lines of a log."""
    sys.stdout.flush()
    for lines in log:
        data = select_lines(matching_lines(lines.data, **chosen), options.raw, options.stream)
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        if lines.is_gap and not data:
            _say(f"{lines.end - lines.begin} bytes of the log were removed here")


_STEP_BEGINS = Pattern(rb"\S{20} \[INFO\] Step (\S+) started, run=(\w+)\n?")
_STEP_ENDS = Pattern(rb"\S{20} \[(?:INFO|ERROR)\] Step (\S+) (?!started|has lost)\w+(?:, .*)?\n?")


class _StepLogs:
    """Prints the log of a pipeline with those of its steps between its lines, by their instants:
    all of a step comes between the lines that say when it has begun and ended."""

    def __init__(self, open_log, options, chosen):
        self.open_log, self.options, self.chosen = open_log, options, chosen
        self.steps = {}                 # {step: (its log, lines that wait)} of those that are on
        self.held = collections.deque(maxlen=max(0, options.tail)) if options.tail is not None \
            else None

    def print(self, log):
        """Print the Lines of the log of a pipeline; whoever waits for more of them does so by
        `wait`."""
        for lines in log:
            for line in lines.data.splitlines(keepends=True):
                self._take(line)
        self._drain(b"\xff", True)
        self._let_go()

    def _take(self, line):
        begins, ends = _STEP_BEGINS.fullmatch(line), _STEP_ENDS.fullmatch(line)
        self._drain(line[:20], False)
        if ends and ends[1] in self.steps:
            self._drain(b"\xff", True, ends[1])
            self.steps.pop(ends[1])[0].close()
        self._write(line)
        if begins:
            log = self.open_log(begins[2].decode())
            if log is not None:
                self.steps[begins[1]] = log, collections.deque()

    def _drain(self, before, over, only=None):
        """Print the lines of steps that are older than an instant, in their order."""
        while True:
            heads = []
            for step in self.steps if only is None else (only,):
                self._fill(self.steps[step], over)
                if self.steps[step][1]:
                    heads.append((self.steps[step][1][0][:20], step))
            if not heads or min(heads)[0] >= before:
                return
            step = min(heads)[1]
            self._write(self.steps[step][1].popleft(), step)

    def _fill(self, step, over):
        log, waiting = step
        if not waiting:
            waiting.extend(log.more(over))

    def _write(self, line, step=None):
        data = select_lines(matching_lines(line, **self.chosen), self.options.raw,
                            self.options.stream)
        if step is not None and not self.options.raw and self.options.stream is None:
            stamp, bracket, text = data.partition(b"] ")
            data = b"".join((stamp, bracket, step, b": ", text)) if bracket else data
        if self.held is not None:
            self.held.append(data)
        else:
            sys.stdout.buffer.write(data)

    def wait(self, seconds):
        """Wait for more, and print meanwhile what steps have logged."""
        self._drain(b"\xff", False)
        self._let_go()
        time.sleep(seconds)

    def _let_go(self):
        sys.stdout.flush()
        held, self.held = self.held or (), None
        sys.stdout.buffer.write(b"".join(held))
        sys.stdout.buffer.flush()


def _print_logs(session, chosen):
    """Print what many runs have logged, in order of their start."""
    options = session.options
    if options.follow:
        raise Usage("-f follows one run; name it")
    printed = (select_lines(line.stored + b"\n", True, options.stream)
               if options.raw or options.stream else log_line_bytes(row, line)
               for row, line in _lines_of(session, options.job, **chosen))
    if options.tail is not None:
        printed = collections.deque(printed, max(0, options.tail))
    sys.stdout.flush()
    for data in printed:
        sys.stdout.buffer.write(data)


def _lines_of(session, job_id, since=None, pattern=None):
    """An iterator of (row, LogLine) of what the runs of a job, or of all, have logged."""
    store = session.settled
    if job_id is not None:
        _check_recorded(store, job_id)
    return ((row, line) for row, path in each_log(store, since, job_id)
            for line in read_lines(path, since, pattern))


_EXPORTS = {"json": ("[\n", ",\n", "\n]\n"), "ndjson": ("", "\n", "\n"), "text": None}


def _cmd_logs_export(session):
    options = session.options
    kind = options.format or "json"
    if kind not in _EXPORTS:
        raise Usage(f'there is no format "{printable(kind)}"; write json, ndjson or text')
    lines = _lines_of(session, options.job, options.since and _since(options.since))
    if kind == "text":
        for row, line in lines:
            sys.stdout.buffer.write(log_line_bytes(row, line))
        return 0
    begin, between, end = _EXPORTS[kind]
    write, joint = sys.stdout.write, begin
    try:
        for row, line in lines:
            write(joint + json.dumps(log_line_payload(row, line)))
            joint = between
    except (RoexecError, OSError, KeyboardInterrupt) as error:
        if isinstance(error, BrokenPipeError):
            raise
        write(joint + json.dumps({"error": _failure_of(error)}) + end)
        return 1
    write(end if joint == between else f"{begin}]\n" if begin else "")


def _failure_of(error):
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return str(error) or "it was interrupted"


def _cmd_wait(session):
    return exit_status(session.asked.wait(session.id()))


def _cmd_cancel(session):
    asked, changes = session.asked, []
    for run_id in [_run_to_cancel(asked, target)["id"] for target in session.ids()]:
        state = "cancelled" if session.options.dry_run else asked.cancel(run_id)
        changes.append((run_id, state if state == "cancelled" else "is being cancelled"))
    session.report(changes)


def _run_to_cancel(asked, target):
    """The payload of the run that `cancel` means: the only active one, where a job was named."""
    active = asked.runs([(ACTIVE_STATES, None)], target)
    if len(active) > 1:
        raise RoexecError(f'job "{target}" has several active runs; name those that you mean: '
                          + ", ".join(run["id"] for run in reversed(active)))
    job, run = (None, active[0]) if active else asked.find(target)
    if job is not None:
        raise RoexecError(f'job "{target}" has no active run')
    if run["state"] in FINAL_STATES:
        raise RoexecError(f"run {run['id']} has ended already: {run['state']}")
    return run


# Commands that run something.

def _cmd_run(session):
    options = session.options
    env, by_name = dict(map(_given_variable, options.env)), options.name is not None
    if by_name and (options.id or options.ids):
        raise Usage("--name is for commands behind --, and an id for a job that is registered; "
                    "write one of them")
    if options.behind is not None and not by_name:
        raise Usage("a command behind -- needs a name: roexec run --name NAME -- COMMAND")
    if by_name:
        job = _job_of_words(options.name, session.words())
    elif session.url:
        return _run_there(session, session.id(), env)
    else:
        job_id = session.id()
        with session.store.read() as db:
            job = effective_job(db, job_id, session.settings)
    if options.dry_run:
        return _would_run(session, job)
    if by_name:
        session.store.create()
    how = {"env": env, "name": options.name, "caller": by_name, "wait": options.queue,
           "settings": session.settings, "by": session.caller.name}
    if not options.detach:
        return run_here(session.store, job, **how)
    return _give_run(session, run_detached(session.store, job, **how))


def _run_there(session, job_id, env):
    """Have a server run a job, and print what it prints -> its exit status."""
    options, asked = session.options, session.asked
    if options.dry_run:
        return _would_run(session, Job(asked.job(job_id)["spec"]))
    run_id = asked.start(job_id, env, options.queue)
    if options.detach:
        return _give_run(session, run_id)

    def interrupted(number, frame):     # Ctrl-C ends the run, as it does here; a second one us
        signal.signal(number, signal.default_int_handler)
        _cancel_there(asked, run_id)

    before = {number: signal.signal(number, interrupted)
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return exit_status(_show_output(session, Following(asked, run_id)))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show_output(session, following):
    """Print what a run prints as it comes -> what has become of it."""
    try:
        _Output(following).print()
    except Denied as error:
        if error.status != 404 and error.code != "forbidden":
            raise
        if error.status != 404:         # that is a run which ended before it had a log
            _say(f"{error}; so what run {following.run_id} prints is not shown")
        return session.asked.wait(following.run_id)
    return following.outcome


class _Output:
    """Prints what a run elsewhere prints, and with it, as it comes, what its steps do."""

    def __init__(self, following):
        self.following, self.mutex, self.steps = following, threading.Lock(), []

    def print(self):
        """Print all until the run has ended."""
        for lines in self.following:
            self.show(lines.data)
            for line in lines.data.splitlines(keepends=True):
                begins = _STEP_BEGINS.fullmatch(line)
                if begins:
                    self.steps.append(threading.Thread(
                        target=self.print_step, args=(begins[2].decode(),), daemon=True))
                    self.steps[-1].start()
        for thread in self.steps:
            thread.join()

    def print_step(self, run_id):
        """Print what a step does, over a connection of its own."""
        remote = self.following.remote.another()
        try:
            for lines in Following(remote, run_id):
                self.show(lines.data)
        except BrokenPipeError:         # its reader has gone; whoever reads the log next sees it
            pass
        except (RoexecError, OSError, LookupError, TypeError, ValueError) as error:
            _say(f"what step run {run_id} prints is not shown: {error}")
        finally:
            remote.wire.close()

    def show(self, data):
        """Print what of a log is output."""
        with self.mutex:
            for name, file in (("out", sys.stdout), ("err", sys.stderr)):
                file.buffer.write(select_lines(data, stream=name))
                file.flush()


def _cancel_there(asked, run_id):
    """Cancel a run because of Ctrl-C; raises KeyboardInterrupt where that cannot be."""
    try:
        asked.cancel(run_id)
    except RoexecError as error:
        _say(f"{error}; run {run_id} goes on")
        raise KeyboardInterrupt from None


def _given_variable(text):
    """(name, value) of --env; of a name alone, the value that the caller's environment has."""
    if text in os.environ:
        return _given_variable(f"{text}={os.environ[text]}")
    if text.isidentifier():
        raise Usage(f"--env {printable(text)}: there is no {printable(text)} in your environment; "
                    "write --env NAME=VALUE")
    name, value = _pair(text, "--env", "NAME=VALUE")
    if not (name.isascii() and name.isidentifier()):
        raise Usage(f"--env {printable(text)}: write --env NAME=VALUE; a name has letters, digits "
                    "and _")
    if name.startswith("ROEXEC_"):
        raise Usage(f"--env {name}: names that begin with ROEXEC_ are roexec's own")
    return name, value


def _job_of_words(name, words):
    """The job of a command that is run under a name and not registered."""
    job_id = "".join(char if char.isascii() and (char.isalnum() or char in "._-") else "-"
                     for char in name).lstrip("._-")[:64]
    if not valid_id(job_id):
        raise Usage(f'--name "{printable(name)}" cannot be a name; write one with a letter or digit'
                    if not job_id else f'--name {job_id} is reserved; choose another name')
    return job_from_mapping({"id": job_id, "command": words}, _here())


def _would_run(session, job, taken=()):
    """Print what a dry run does not run; `taken` are steps that are not repeated."""
    what = ", ".join(step for step in job.steps() if step not in taken) if job.pipeline \
        else command_text(job.command)
    session.give({"job": job.id, "command": job.command, "dry_run": True,
                  **({"steps": what.split(", ")} if job.pipeline else {})},
                 lambda style: f"{job.id or ''}: would run {what} (dry run)\n".removeprefix(": "))


def _give_run(session, run_id):
    session.give({"run": run_id}, lambda style: run_id + "\n")


def _cmd_exec(session):
    words = session.words()
    if session.options.dry_run:
        return _would_run(session, Job({"command": words}))
    return exec_here(words)


def _cmd_retry(session):
    asked, options = session.asked, session.options
    run = asked.run(session.id())
    if options.dry_run:
        return _would_run(session, *asked.retried(run, options.from_, options.all))
    env = dict(map(_given_variable, options.env))
    return _give_run(session, asked.retry(run, env, options.from_, options.all))


# Tokens of the HTTP API, and who has changed what.

def _cmd_token_create(session):
    options, caller, now = session.options, session.caller, time.time()
    spec = {"name": options.name, "role": options.role, "jobs": options.jobs,
            "scopes": [word for text in options.scope for word in text.split(",") if word],
            "expires": options.expires}
    if options.name is None:
        raise Usage(f"give it a name: roexec {session.command.example}")
    try:
        token = token_of(spec, caller, now, host_zone())
    except ValueError as error:
        raise Usage(str(error)) from None
    text = session.asked.add_token(token, options.dry_run)
    if Caller(scopes=token["scopes"]).may("job:write"):
        _say("this token may define jobs (job:write), and so run any command as the user of the "
             "server")
    _give_token(session, token["name"], text)


def _give_token(session, name, text):
    """Print a token, which nobody can see again."""
    if session.options.dry_run:
        return session.report([(name, session.command.name.split()[1] + "d")])
    _say("keep it now: it is not shown again")
    return session.give({"name": name, "token": text}, lambda style: text + "\n")


def _cmd_token_list(session):
    payloads = session.asked.tokens()
    if not payloads:
        session.nothing("tokens")
    session.give(page("tokens", payloads),
                 lambda style: tokens_table(payloads, style) if payloads else "")


def _cmd_token_rotate(session):
    name = session.id()
    return _give_token(session, name, session.asked.rotate_token(name, session.options.dry_run))


def _cmd_token_revoke(session):
    names = session.ids()
    session.asked.revoke_tokens(names, session.options.dry_run)
    session.report([(name, "revoked") for name in names])


def _cmd_audit(session):
    payloads = session.asked.audit(max(0, session.options.limit))
    if not payloads:
        session.nothing("changes")
    session.give(page("audit", payloads),
                 lambda style: audit_table(payloads, style) if payloads else "")


# Installing.

def _cmd_init(session):
    folders = session.options.ids or [
        user_folder("XDG_CONFIG_HOME", ".config") if os.geteuid() else HOST_CONFIG]
    if len(folders) > 1:
        raise Usage("one folder is enough for init")
    _take(session, init_steps(_absolute(folders[0])),
          f"config.yml and jobs.yml in {folders[0]} are there already, and stay as they are")


def _take(session, steps, nothing):
    """Perform the steps, or say them only."""
    options, dry = session.options, session.options.dry_run
    if not dry:
        perform_steps(steps, lambda text: options.json or print(text, flush=True))
    if options.json:
        print(json.dumps({"steps": [step.text for step in steps], "dry_run": dry}, indent=2))
    elif dry:
        print("".join(f"{step.text} (dry run)\n" for step in steps), end="")
    if not steps:
        _say(nothing)


def _installation(session):
    options = session.options
    if options.store or options.config:
        raise Usage("an installation has a store and a configuration of its own; do without "
                    "--store and --config")
    return Installation(options.user, getattr(options, "as_", None))


def _cmd_install(session):
    if session.options.user and session.options.as_:
        raise Usage("--user installs it for you alone, so there is no --as")
    installation = _installation(session)
    installation.check()
    _take(session, installation.steps(), "nothing is to be done")
    if not session.options.dry_run:
        _say(f"the server runs as {installation.user} on {installation.store.path}; its jobs are "
             f"in {installation.config}/jobs.yml")


def _cmd_uninstall(session):
    installation = _installation(session)
    _take(session, installation.removal(), "it is not installed")
    for command in () if session.options.dry_run else installation.leftovers():
        _say(f"what is left can be removed by: {command}")


def _cmd_completion(session):
    shells = session.options.ids
    if len(shells) != 1 or shells[0] not in SHELLS:
        raise Usage(f"say for which shell: roexec completion {session.command.usage}")
    sys.stdout.write(completion_script(shells[0], _COMMANDS))


# Upkeep.

class _Bar:
    """How far something is, in a line on standard error that is renewed; drawn after half a second,
    on a terminal."""

    def __init__(self):
        self._able = sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._next, self._is_drawn = time.monotonic() + 0.5, False

    def __call__(self, share, text):
        """Say that a share (0 to 1; None if unknown) is done, and what."""
        now = time.monotonic()
        if not self._able or now < self._next:
            return
        self._next, self._is_drawn = now + 0.1, True
        width = os.get_terminal_size(2).columns or 80
        done = "" if share is None else f"{'#' * int(share * 30):.<30} {share:4.0%}  "
        sys.stderr.write(f"\r{done + text:.{width - 1}}\x1b[K")
        sys.stderr.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._is_drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def _cmd_maintenance_purge(session):
    options, store = session.options, session.settled
    if not store.exists:
        raise no_store(store)
    older = None if options.older is None else _duration_of("--older", options.older)
    if options.keep is not None and options.keep < 1:
        raise Usage("--keep is 1 or more: the newest run of a job stays in any case")
    if options.job is not None:
        _check_recorded(store, options.job)
    how = {"settings": session.settings, "dry_run": options.dry_run}
    with _Bar() as bar, contextlib.ExitStack() as stack:
        if not options.dry_run:
            store.keep_open()           # else each of many small transactions would checkpoint
            stack.callback(store.close)
        if older is None and options.keep is None and options.job is None:
            upkeep = keep_small(store, progress=bar, **how)
        else:
            stack.callback(os.close, hold_upkeep(store))
            upkeep = Upkeep(store, progress=bar, **how)
            upkeep.purge_runs(older=older, newest=options.keep, job_id=options.job)
            upkeep.give_back()
    if upkeep.freed["runs"] and not options.dry_run:
        with store.write() as db:
            add_audit(db, session.caller.name, "purge", time.time(), job_id=options.job,
                      detail=upkeep.told())
    payload = {**{name: upkeep.freed[name] for name in ("runs", "logs", "bytes")},
               "dry_run": options.dry_run}
    session.give(payload, lambda style: (upkeep.told() or "nothing to purge") + (
        " (dry run)\n" if options.dry_run else "\n"))


def _cmd_maintenance_check(session):
    store = session.store
    with _Bar() as bar:
        findings = check_store(store, dry_run=session.options.dry_run, progress=bar)
    would = " (dry run)" * session.options.dry_run
    session.give({"findings": [{"kind": found.kind, "text": found.text} for found in findings]},
                 lambda style: "".join(f"{found.kind}: {printable(found.text)}{would}\n"
                                       for found in findings) or "all is well\n")
    return 1 if any(found.kind == "wrong" for found in findings) else 0


def _only_file(session):
    if len(session.options.ids) != 1:
        raise Usage(f"name one file: roexec {session.command.example}")
    return _absolute(session.options.ids[0])


def _cmd_maintenance_backup(session):
    path, store, options = _only_file(session), session.settled, session.options
    with store.read() as db:
        jobs, counts = exported_jobs(db, job_ids(db)), count_rows(db)
    if not options.dry_run:
        with _Bar() as bar:
            back_up(store, path, job_to_yaml(jobs), logs=options.logs, progress=bar)
    _tell_counts(session, f"{'would write ' * options.dry_run}{path}", counts)


def _tell_counts(session, what, counts, **more):
    jobs, runs = (f"{counts[name]} {name if counts[name] != 1 else name[:-1]}"
                  for name in ("jobs", "runs"))
    session.give({**counts, **more, "dry_run": session.options.dry_run},
                 lambda style: f"{what}: {jobs}, {runs}"
                 + (" (dry run)\n" if session.options.dry_run else "\n"))


def _cmd_maintenance_restore(session):
    path, store = _only_file(session), session.store
    if not os.path.isfile(path):
        raise RoexecError(f"there is no file {path}")
    if store.exists and path == os.path.realpath(store.database):
        raise Usage(f"{path} is the database of the store itself; name a backup")
    with _Bar() as bar:
        counts, old = restore(store, path, bar, session.options.dry_run)
    if not session.options.dry_run:
        with store.write() as db:
            add_audit(db, session.caller.name, "restore", time.time(), detail=path)
    _tell_counts(session, f"restored {store.path}", counts, before=old)
    if old:
        _say(f"what was there before lies in {old}; remove it when you need it no more")


def _check_recorded(store, job_id):
    """Raise NoSuchJob where nothing is recorded under an id, and no job has it."""
    with store.read() as db:
        if newest_run(db, job_id) is None:
            get_job(db, job_id)


# The server.

def _host_to_serve(config):
    """The address of the configuration; in a container, whose loopback nobody else reaches, all."""
    return "0.0.0.0" if ends_with_us() and not config.host_was_set else config.server.host


def _cmd_server(session):
    options, config, store = session.options, session.config, session.store
    say = ServerLog(config.server.log)
    files = JobFiles(store, _owned_paths(session), config.defaults, say)
    host = options.host or _host_to_serve(config)
    port = config.server.port if options.port is None else options.port
    if port > 65535:
        raise Usage(f"--port: {port} is not a whole number from 0 to 65535")
    if options.dry_run:
        _check_job_files(files)
        place = "without HTTP" if options.no_http else f"on http://{host}:{port}"
        print(f"would serve {store.path} {place} (dry run)")
        return
    _close_at_exec()
    access = Access(config.server, say)
    with contextlib.ExitStack() as stack:
        launcher = start_launcher()     # first of all: it must not inherit anything
        if not store.exists:
            _check_job_files(files)
        store.say = say
        stack.callback(os.close, hold_server_lock(store))
        store.create()
        store.keep_open()
        stack.callback(store.close)
        with store.write() as db:
            set_settings(db, session.settings)
        files()
        scheduler, address = Scheduler(store, launcher, say), None
        if not options.no_http:
            http = start_http(store, host, port, say, access)
            stack.callback(http.close)
            address = f"http{'s' if access.tls else ''}://%s:%d" % http.address
            _join(session, scheduler, http)
            prepare_access(store, http, say)
        stack.callback(withdraw_announcement, announce_server(store))
        scheduler.drain = config.server.drain if options.drain is None else _duration_of(
            "--drain", options.drain)
        scheduler.postman = start_postman(store, lambda: _stored_settings(store), say)
        stack.callback(scheduler.postman.close)
        notifier = SystemdNotifier(scheduler.vitals)
        scheduler.each_second += [files, notifier]
        stack.callback(notifier.tell, "STOPPING=1")
        if os.getpid() == 1:            # what others leave behind is ours to reap
            scheduler.each_second.append(reap_all)
        stack.callback(Steward(store, say).close)
        scheduler.on_reload.insert(0, lambda: _reload(session, files))
        say(f"Server started, process={os.getpid()}, store={store.path}, http={address}")
        warning = unit_warning()
        if warning:
            say(warning, "ERROR")
        scheduler.run()
    say("Server ended" if ends_with_us() else "Server ended; runs that are on go on by themselves")


def _join(session, scheduler, http):
    """Let HTTP know of the scheduler and of settings, and have the scheduler look after it."""
    http.vitals = scheduler.vitals
    http.warnings = lambda: _warnings(session.store, session.config)
    scheduler.each_second.append(http.note_uses)
    scheduler.on_reload.append(lambda: http.admit(session.config.server))


def _stored_settings(store):
    with store.read() as db:
        return get_settings(db) or {}


def _owned_paths(session):
    return [_absolute(path) for path in session.options.jobs] or list(session.config.jobs)


def _check_job_files(files):
    """Say what is wrong; raise RoexecError where there are no earlier jobs that could stay."""
    read = _JobFiles(files.paths).read(files.defaults)
    if read.problems and not files.store.exists:
        raise RoexecError("\n".join(read.problems))
    for text in read.problems:
        _say(text)
    read.check_ids()


def _close_at_exec():
    """No program that is started inherits a descriptor that this process was given."""
    for name in os.listdir("/dev/fd") if os.path.isdir("/dev/fd") else range(256):
        try:
            if int(name) > 2:
                os.set_inheritable(int(name), False)
        except OSError:                 # that of the folder itself
            pass


def _reload(session, files):
    """What SIGHUP asks for; a broken configuration is reported, and the old one stays."""
    try:
        session.read_config()
        with session.store.write() as db:
            set_settings(db, session.settings)
    except RoexecError as error:
        for line in str(error).splitlines():
            files.say(line, "ERROR")
        return
    files.paths, files.defaults = _owned_paths(session), session.config.defaults
    files.due = True
    files.say("Configuration read again")


# The table of commands. An option is (flags, name of its value, None for a switch, help, default).
# N is a whole number; a list collects, and takes several values at once if the name ends in "...".

class Command:
    """A command: its name, the function of a Session, its help, what stands behind the name, an
    example, its options, whether it changes something, and whether it can ask a server."""

    def __init__(self, name, function, help, usage, example, *options, changes=False, asks=True):
        self.name, self.function, self.help, self.usage = name, function, help, usage
        self.example, self.options = example, (*options, *_GLOBAL)
        self.changes, self.asks = changes, asks
        self.takes_ids = _WITH_ID in options or usage.startswith(("FILE", "[FOLDER", "bash"))
        self.takes_words = "-- COMMAND" in usage


_GLOBAL = (
    ("--config", "FILE", "the configuration", None),
    ("--store", "PATH", "the store: a folder, or a database file that ends in .db", None),
    ("--url", "URL", "ask this server, instead of a store of this host; else $ROEXEC_URL", None),
    ("--token", "TOKEN", "the token for it; better in $ROEXEC_TOKEN, since all users of a host can "
     "see the words of a command", None),
    ("-v --verbose", None, "say more; show where an unexpected error happened", False),
    ("--json", None, "print JSON", False),
    ("--dry-run", None, "say what would be done, and do nothing", False),
)
_GLOBAL_WITH_VALUE = tuple(option[0] for option in _GLOBAL if option[1] is not None)
_WITH_ID = ("--id", "ID", "the id; it may also stand alone", [])

_COMMANDS = (
    Command("run", _cmd_run, "run a job now, or a command under a name",
            "JOB | --name NAME -- COMMAND [ARGUMENT ...]", "run --name hello -- echo hello",
            _WITH_ID,
            ("--name", "NAME", "record the command behind -- under this name", None),
            ("--env", "NAME=VALUE", "a variable for the command; may be repeated", []),
            ("--detach", None, "do not wait for it: print the id of the run", False),
            ("--queue", None, "wait for a run of the job that is on", False), changes=True),
    Command("exec", _cmd_exec, "run a command and record nothing",
            "-- COMMAND [ARGUMENT ...]", "exec -- ls -la", changes=True, asks=False),
    Command("add", _cmd_add, "register a job, or change it",
            "ID [--schedule CRON] [--set KEY=VALUE] -- COMMAND [ARGUMENT ...]",
            'add tidy --schedule "0 3 * * *" --set timeout=1h -- rm -rf /tmp/x', _WITH_ID,
            ("--schedule", "CRON", "when it runs; may be repeated", []),
            ("--set", "KEY=VALUE", "any key of a job file; may be repeated", []), changes=True),
    Command("apply", _cmd_apply, "register the jobs of files", "-f FILE [FILE ...]",
            "apply -f jobs.yml",
            ("-f --file", "FILE...", "job files, folders of them, or - for standard input", []),
            ("--prune", None, "also remove jobs that the files no longer have", False),
            changes=True),
    Command("edit", _cmd_edit, "change a job in an editor ($VISUAL, else $EDITOR)", "JOB",
            "edit backup-db", _WITH_ID, changes=True, asks=False),
    Command("delete", _cmd_delete, "remove jobs; their history stays", "JOB [JOB ...]",
            "delete tidy", _WITH_ID, changes=True),
    Command("export", _cmd_export, "print jobs as a job file", "[JOB ...]", "export > jobs.yml",
            _WITH_ID),
    Command("import crontab", _cmd_import_crontab, "print a crontab as a job file",
            "FILE [--user USER | --system]", "import crontab /etc/crontab --system > jobs.yml",
            ("--user", "USER", "whose crontab it is, if not yours", None),
            ("--system", None, "its lines name a user, as in /etc/crontab and /etc/cron.d",
             False), asks=False),
    Command("list jobs", _cmd_list_jobs, "list the jobs", "", "list jobs"),
    Command("list runs", _cmd_list_runs, "list the runs that are on, then the latest that ended",
            "", "list runs --job backup-db --state failed",
            ("--active", None, "only queued and running ones", False),
            ("--job", "JOB", "only those of this job", None),
            ("--state", "STATE", "only those in this state; may be repeated", []),
            ("--since", "TIME", "only those queued since: 2h, or an instant", None),
            ("--limit", "N", "how many that ended (20)", 20),
            ("--steps", None, "also the steps of pipelines", False)),
    Command("show", _cmd_show, "show a job or a run in full", "JOB | RUN | latest", "show latest",
            _WITH_ID),
    Command("logs", _cmd_logs, "print the log of a run, or what many have logged",
            "RUN | JOB | latest | [--job JOB] [--since TIME] [--grep REGEX]",
            "logs --since 1h --grep 'no such file'", _WITH_ID,
            ("-f --follow", None, "go on until the run ends", False),
            ("--tail", "N", "only the last N lines", None),
            ("--raw", None, "the output as it was, without stamps", False),
            ("--stream", "out|err", "only this stream, without stamps", None),
            ("--since", "TIME", "only lines since: 2h, or an instant", None),
            ("--grep", "REGEX", "only lines in which this regular expression is found", None),
            ("--job", "JOB", "of all runs of this job", None)),
    Command("logs export", _cmd_logs_export, "print what runs have logged, for other programs",
            "[--format json|ndjson|text] [--since TIME] [--job JOB]",
            "logs export --format json --since 24h > logs.json",
            ("--format", "FORMAT", "json (a list, streamed), ndjson or text (json)", None),
            ("--since", "TIME", "only lines since: 24h, or an instant", None),
            ("--job", "JOB", "only those of this job", None), asks=False),
    Command("next", _cmd_next, "list the next times at which jobs are due", "[JOB]",
            "next backup-db --count 5", _WITH_ID,
            ("--count", "N", "how many (10)", None),
            ("--from", "TIME", "from this instant on, instead of now", None),
            ("--to", "TIME", "all before this instant, and which would meet a run of their job",
             None),
            ("--duration", "TIME", "with --to: let each run take as long, not as usual", None),
            ("--cron", "CRON", "those of an expression; --id gives the seed of H", None),
            ("--timezone", "ZONE", "the zone of that expression", None)),
    Command("why", _cmd_why, "tell why a job has not run at an instant, or does not run now",
            "JOB [INSTANT]", "why backup-db 2025-08-01T02:00", _WITH_ID),
    Command("status", _cmd_status, "tell whether the server is healthy", "", "status"),
    Command("doctor", _cmd_doctor, "look for what is wrong with this host, the store and its jobs",
            "[--job JOB]", "doctor --job backup-db",
            ("--job", "JOB", "compare the environment of a job with the one here", None),
            asks=False),
    Command("pause", _cmd_pause, "stop the schedules of jobs", "JOB [JOB ...] | --all",
            "pause backup-db --for 2h", _WITH_ID,
            ("--all", None, "of all jobs", False),
            ("--for", "TIME", "for so long; they go on by themselves", None), changes=True),
    Command("resume", _cmd_pause, "let the schedules of jobs go on", "JOB [JOB ...] | --all",
            "resume backup-db", _WITH_ID, ("--all", None, "of all jobs", False), changes=True),
    Command("cancel", _cmd_cancel, "end runs, or withdraw those that are queued",
            "RUN | JOB ...", "cancel backup-db", _WITH_ID, changes=True),
    Command("retry", _cmd_retry, "run again what a run ran, of a pipeline the steps that failed",
            "RUN | JOB | latest", "retry latest", _WITH_ID,
            ("--from", "STEP", "a step, and all that depend on it, as well", None),
            ("--all", None, "all steps", False),
            ("--env", "NAME=VALUE", "another variable; may be repeated", []), changes=True),
    Command("wait", _cmd_wait, "wait for a run, and end with its exit status",
            "RUN | JOB | latest", "wait latest", _WITH_ID),
    Command("token create", _cmd_token_create, "make a token for the HTTP API, and print it",
            "--name NAME --scope SCOPE | --role ROLE",
            "token create --name ci-token --scope run:list,run:create --jobs 'deploy*'",
            ("--name", "NAME", "what it is called", None),
            ("--scope", "SCOPE", "what it may do: job:read job:write job:pause run:list run:create "
             "run:cancel log:read token:admin metrics:read, or * for all; with commas, or repeated",
             []),
            ("--role", "ROLE", "viewer (job:read run:list log:read), operator (also run:create "
             "run:cancel job:pause) or admin (all)", None),
            ("--jobs", "PATTERN", "only jobs of these ids, their runs and logs: deploy*", None),
            ("--expires", "TIME", "30d, or an instant (never)", None), changes=True),
    Command("token list", _cmd_token_list, "list the tokens", "", "token list"),
    Command("token rotate", _cmd_token_rotate, "give a token a new text; the old one is void",
            "NAME", "token rotate ci-token", _WITH_ID, changes=True),
    Command("token revoke", _cmd_token_revoke, "remove tokens; they are void at once",
            "NAME [NAME ...]", "token revoke ci-token", _WITH_ID, changes=True),
    Command("audit", _cmd_audit, "list who has changed what", "", "audit --limit 100",
            ("--limit", "N", "how many of the newest (50)", 50)),
    Command("maintenance purge", _cmd_maintenance_purge,
            "remove old runs with their logs; without options, by the limits of jobs",
            "[--older TIME] [--keep N] [--job JOB]", "maintenance purge --older 30d --keep 10",
            ("--older", "TIME", "those that ended longer ago than this", None),
            ("--keep", "N", "not the newest N of each job", None),
            ("--job", "JOB", "only those of this job", None), changes=True, asks=False),
    Command("maintenance check", _cmd_maintenance_check,
            "look for damage in the store, and mend what a crash has left", "",
            "maintenance check", changes=True, asks=False),
    Command("maintenance backup", _cmd_maintenance_backup,
            "write the store into one archive, consistent while all goes on", "FILE [--logs]",
            "maintenance backup /backup/roexec.tar.gz --logs",
            ("--logs", None, "also the logs", False), changes=True, asks=False),
    Command("maintenance restore", _cmd_maintenance_restore,
            "put a backup in the place of the store", "FILE",
            "maintenance restore /backup/roexec.tar.gz", changes=True, asks=False),
    Command("server", _cmd_server, "run jobs on schedule, and serve the HTTP API",
            "[--jobs PATH]", "server --jobs jobs.yml",
            ("--jobs", "PATH", "a job file or folder to follow; may be repeated", []),
            ("--host", "HOST", "the address to listen on (127.0.0.1)", None),
            ("--port", "N", "the port to listen on (8080)", None),
            ("--no-http", None, "do without the HTTP API", False),
            ("--drain", "TIME", "when asked to end, wait so long for runs first", None),
            changes=True, asks=False),
    Command("init", _cmd_init, "write a configuration and a job file with comments",
            "[FOLDER]", "init", changes=True, asks=False),
    Command("install", _cmd_install, "install this program, and a service that runs the server",
            "[--user | --as USER]", "install --dry-run",
            ("--user", None, "for you alone", False),
            ("--as", "USER", "who runs the server: roexec, or root for jobs of several users",
             None), changes=True, asks=False),
    Command("uninstall", _cmd_uninstall, "remove program and service; store and jobs stay",
            "[--user]", "uninstall --dry-run",
            ("--user", None, "what was installed for you alone", False), changes=True, asks=False),
    Command("completion", _cmd_completion, "print a script that completes command lines in a shell",
            "bash | zsh | fish", "completion bash > /etc/bash_completion.d/roexec", asks=False),
)
# What a reader looks for, by the first command that does it.
COMMAND_GROUPS = {"run": "Run", "add": "Jobs", "list jobs": "Look", "pause": "Steer",
                  "token create": "Access over HTTP", "maintenance purge": "Upkeep",
                  "server": "Set up"}
_FAMILIES = ({command.name.split()[0] for command in _COMMANDS}
             - {command.name for command in _COMMANDS})     # `token`, but not `logs`
_OWN_STATUS = ("run", "exec", "wait")   # they end as the command did; 125 is left for roexec


def commands():
    """The commands, in the order in which the overview lists them."""
    return _COMMANDS


# Parsing.

class Options:
    """The options of a command, at first all of them as they are when nothing is written."""

    def __init__(self, command):
        for flags, _, _, default in command.options:
            setattr(self, _attribute(flags), default[:] if isinstance(default, list) else default)
        if command.takes_ids:
            self.ids = []


def _attribute(flags):
    """`-v --dry-run` -> dry_run."""
    name = flags.split()[-1].strip("-").replace("-", "_")
    return f"{name}_" if name in ("from", "for", "as") else name        # words of Python


def _split(words):
    """(command, its words, the words behind -- or None) of a command line."""
    behind, before = None, []
    if "--" in words:
        at = words.index("--")
        words, behind = words[:at], words[at + 1:]
    rest = list(words)
    while rest and rest[0].startswith("-"):
        before.append(rest.pop(0))
        if before[-1] in _GLOBAL_WITH_VALUE and rest:
            before.append(rest.pop(0))
    if not rest:
        raise Usage(_no_option(before) or "a command is missing; see roexec --help")
    for length in (2, 1):               # `logs export` is not `logs` of a run
        for command in _COMMANDS:
            if command.name == " ".join(rest[:length]):
                return command, before + rest[length:], behind
    raise Usage(_no_command(rest))


def _no_option(words):
    known = [*_flags(_GLOBAL), "--help", "--version"]
    for word in words:
        if word.startswith("-") and word not in known:
            return (f'there is no option "{printable(word)}"'
                    + (nearest(word, known) or "; see roexec --help"))
    return None


def _flags(options):
    return [flag for option in options for flag in option[0].split()]


def _no_command(words):
    first, name = words[0], " ".join(words[:1] if words[1:2] and words[1][:1] == "-" else words[:2])
    family = [command.name for command in _COMMANDS if command.name.startswith(f"{first} ")]
    if family:
        return (f'there is no command "{printable(name)}"; there {"are" if family[1:] else "is"} '
                + listed(family))
    near = nearest(first, {command.name.split()[0] for command in _COMMANDS})
    return f'there is no command "{printable(first)}"' + (near or "; see roexec --help")


def _parse(command, words, behind):
    """The Options that a command was given; raises Usage."""
    options = _parse_plain_words(command, words)
    if options is None:
        options = _parser(command).parse_intermixed_args(words)
    options.behind = behind
    if behind is not None and not command.takes_words:
        raise Usage(f"nothing can stand behind -- for {command.name}")
    if options.dry_run and not command.changes:
        raise Usage(f"{command.name} changes nothing, so there is no --dry-run")
    return options


def _parse_plain_words(command, words):
    """Options where all words are ids, switches, or texts behind their options; else None.

    That is nearly always so, and argparse costs more than many commands do.
    """
    options, words = Options(command), iter(words)
    known = {flag: option for option in command.options for flag in option[0].split()}
    for word in words:
        flags, metavar, _, default = known.get(word, ("ids", "ID", "", []))
        if metavar is None:
            setattr(options, _attribute(flags), True)
            continue
        value = word if flags == "ids" else next(words, "-")
        if value.startswith("-") or metavar == "N" or (flags == "ids" and not command.takes_ids):
            return None
        if default is None:
            setattr(options, _attribute(flags), value)
        else:
            getattr(options, _attribute(flags)).append(value)
    return options


def _parser(command):
    """The argparse parser of a command."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            message, hint = printable(message.removeprefix("argument ")), f"see {name} --help"
            if message.startswith("unrecognized"):
                options = [word for word in message.split() if word.startswith("--")]
                near = nearest(options[0], _flags(command.options))[2:] if options else ""
                hint = near or (hint if options else f"write {usage}")
            raise Usage(f"{message}; {hint}")

    def whole_number(text):
        if not (text.isascii() and text.isdigit()):
            raise argparse.ArgumentTypeError(f'"{text}" is not a whole number')
        return int(text)

    name = f"roexec {command.name}"
    usage = f"{name} {command.usage}".rstrip()
    parser = Parser(prog=name, usage=usage, description=command.help,
                    epilog=f"example: roexec {command.example}", add_help=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for flags, metavar, text, default in command.options:
        how = {"action": "store_true"} if metavar is None else {
            "metavar": metavar.rstrip("."), "default": default,
            "type": whole_number if metavar == "N" else str}
        if isinstance(default, list):
            how.update({"action": "extend", "nargs": "+"} if metavar.endswith("...") else
                       {"action": "append"})
        if flags == "--dry-run" and not command.changes or (
                flags in ("--url", "--token") and not command.asks):
            text = argparse.SUPPRESS
        parser.add_argument(*flags.split(), dest=_attribute(flags), help=text, **how)
    parser.add_argument("-h", "--help", action="store_true", help="show this")
    if command.takes_ids:
        parser.add_argument("ids", nargs="*", help=argparse.SUPPRESS, default=[])
    return parser


# The program.

def _overview(family=None):
    """The commands under what one looks for; or those of a family, such as `token`."""
    text, width = "", max(len(command.name) for command in _COMMANDS) + 2
    for command in _COMMANDS:
        if not family and command.name in COMMAND_GROUPS:
            text += f"\n{COMMAND_GROUPS[command.name]}:\n"
        if not family or command.name.startswith(f"{family} "):
            text += f"  {command.name:<{width}}{command.help}\n"
    if family:
        return f"usage: roexec {family} … [OPTION ...]\n\n{text}"
    return (f"usage: roexec COMMAND [OPTION ...]\n{text}\nroexec COMMAND --help explains a "
            "command; roexec --version prints the version.\n")


def _perform(words):
    """Perform a command line -> exit status."""
    if not words:
        sys.stderr.write(_overview())
        return 2
    if words[0] in ("--version", "-h", "--help"):
        sys.stdout.write(f"roexec {__version__}\n" if words[0] == "--version" else _overview())
        return 0
    if words[1:] in (["-h"], ["--help"]) and words[0] in _FAMILIES:
        sys.stdout.write(_overview(words[0]))
        return 0
    command, words, behind = _split(words)
    if "-h" in words or "--help" in words:
        sys.stdout.write(_parser(command).format_help())
        return 0
    session = Session(command, _parse(command, words, behind))
    try:
        return command.function(session) or 0
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        if not session.url or session.options.verbose:
            raise
        raise session.asked.puzzled(error) from None
    finally:
        session.close()


def _open_standard_streams():
    """Open /dev/null for a standard stream that is closed, lest a file of the store becomes it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:                 # the lowest free number is what open(2) takes
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))
    if hasattr(sys.stdout, "reconfigure"):      # job files and logs are UTF-8 in every locale
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")


def _drop_output():
    """Forget output that cannot be written, or else Python tries it again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _failed(words, error):
    """Say what went wrong -> exit status: 1 refused or failed, 2 usage, 125 beside a command's."""
    expected = isinstance(error, (RoexecError, OSError))
    if not isinstance(error, RoexecError) and ("-v" in words or "--verbose" in words):
        import traceback
        _say(traceback.format_exc())
    if isinstance(error, OSError):
        _say(": ".join(filter(None, (error.filename, error.strerror or str(error)))))
    else:
        _say(error if expected else f"unexpected {type(error).__name__}: {error}; to see where, "
             "run it again with --verbose")
    try:
        if _split(words)[0].name in _OWN_STATUS:
            return 125
    except Usage:
        pass
    return 2 if isinstance(error, Usage) else 1


def main(argv=None):
    """Perform a command line, that of the process without one -> its exit status."""
    _open_standard_streams()
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        status = _perform(words)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:             # as what ends by SIGPIPE does
        status = 128 + signal.SIGPIPE
    except Exception as error:
        status = _failed(words, error)
    _drop_output()
    return status


if __name__ == "__main__":
    sys.exit(main())
