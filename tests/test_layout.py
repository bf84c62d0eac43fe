"""What keeps one long file as easy to live in as a package: the rules of its sections, held here.

Each check is a function of a `Source` that returns its offences, `roexec.py:LINE: what`. Each is
tried on a snippet that breaks it, so that none of them can be silent for want of looking.
"""
import ast
import builtins
import collections
import pkgutil
import re
import statistics
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.once
ROOT = Path(__file__).parent.parent

BANNER = re.compile(r"# ==== (\d+) (\w+)( \(pure\))? =+")
MAP_LINE = re.compile(r" +(\d+)  (\w+)  +\S")
PURE = ["basics", "yaml", "cron", "jobs", "crontab", "policy", "claims", "render"]

# Each Python has loaded these by the time a program starts.
ALWAYS_LOADED = {"os", "sys", "time"}
# These cost more than most commands do in all; sqlite3 is what nearly all need, but not --version.
HEAVY = {"argparse", "asyncio", "concurrent", "ctypes", "dataclasses", "email", "enum", "getpass",
         "gzip", "html", "http", "imaplib", "importlib", "inspect", "ipaddress", "logging",
         "multiprocessing", "platform", "random", "resource", "secrets", "smtplib", "socketserver",
         "sqlite3", "ssl", "statistics", "subprocess", "tempfile", "traceback", "typing", "urllib",
         "uuid", "xml", "zipfile"}
# What a pure section may use of the standard library. `zoneinfo` reads the rules of a zone, which
# are the same at every call.
PURE_MODULES = {"__future__", "array", "base64", "binascii", "bisect", "calendar", "collections",
                "datetime", "difflib", "functools", "graphlib", "hashlib", "heapq", "html",
                "ipaddress", "itertools", "json", "math", "operator", "re", "shlex", "string",
                "struct", "textwrap", "types", "unicodedata", "zoneinfo"}
PURE_PARTS = {"time": {"strftime", "gmtime"},
              "sys": {"maxsize", "version_info", "intern"},
              "os": {"path", "fspath", "sep"},
              "os.path": {"basename", "commonpath", "dirname", "isabs", "join", "normpath",
                          "relpath", "split", "splitext"}}
EFFECTS = {"open", "print", "input", "breakpoint", "__import__"}
CLOCK_CALLS = {"now", "today", "utcnow"}
# With fewer arguments these take the present instant, or the zone of the process.
NEEDED = {"time.gmtime": 1, "time.strftime": 2, "fromtimestamp": 2, "astimezone": 1}

FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef
SCOPES = (*FUNCTIONS, ast.Lambda, ast.ClassDef,
          ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)

Section = collections.namedtuple("Section", "line number name pure")
HEADER = Section(0, 0, "header", False)


class Source:
    """A text with its syntax tree and its sections."""

    def __init__(self, text):
        self.text, self.lines, self.tree = text, text.splitlines(), ast.parse(text)
        self.sections = [HEADER] + [
            Section(line, int(match[1]), match[2], bool(match[3]))
            for line, match in enumerate(map(BANNER.fullmatch, self.lines), 1) if match]
        self.bound = {}                 # a name of the module -> the statement that binds it first
        for statement in self.tree.body:
            for name in bound_in(ast.Module([statement], [])):
                self.bound.setdefault(name, statement)
        self.home = {name: self.section(statement) for name, statement in self.bound.items()}

    def section(self, node):
        """The section that a node stands in."""
        return [section for section in self.sections if section.line <= node.lineno][-1]

    def each(self, *kinds):
        return (node for node in ast.walk(self.tree) if isinstance(node, kinds))

    def imports(self):
        """(node, module, whether it is done when roexec.py itself is imported); proxies count."""
        inside = {id(node) for function in self.each(*FUNCTIONS, ast.Lambda)
                  for node in ast.walk(function)}
        for node in self.each(ast.Import, ast.ImportFrom):
            names = ([alias.name for alias in node.names] if isinstance(node, ast.Import)
                     else ["." * node.level + (node.module or "")])
            for name in names:
                yield node, name, id(node) not in inside
        for node, names in self.proxies():
            for name in names:
                yield node, name, False

    def proxies(self):
        """The header's statements that bind modules for their first use, with the names bound."""
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and "_Module" in names_in(node.value):
                yield node, [name.id for target in node.targets for name in ast.walk(target)
                             if isinstance(name, ast.Name)]


def names_in(node):
    return {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}


def bound_in(scope):
    """The names that a scope binds itself, not those of the scopes in it."""
    bound, outer = set(), set()

    def visit(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Name) and not isinstance(child.ctx, ast.Load):
                bound.add(child.id)
            elif isinstance(child, ast.arg):
                bound.add(child.arg)
            elif isinstance(child, ast.alias):
                bound.add((child.asname or child.name).split(".")[0])
            elif isinstance(child, (*FUNCTIONS, ast.ClassDef, ast.ExceptHandler)) and child.name:
                bound.add(child.name)
            elif isinstance(child, ast.Global):
                outer.update(child.names)
            if not isinstance(child, SCOPES):
                visit(child)

    visit(scope)
    return bound - outer


def module_names(node, hidden=frozenset(), own=frozenset()):
    """(name, node) of each use of a name of the module; `hidden` are those of scopes around."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Load):
            if child.id not in hidden and child.id not in own:
                yield child.id, child
        elif isinstance(child, ast.Global):
            yield from ((name, child) for name in child.names)
        if isinstance(child, ast.ClassDef):         # its names are not seen in its methods
            yield from module_names(child, hidden, bound_in(child))
        elif isinstance(child, SCOPES):
            yield from module_names(child, hidden | bound_in(child))
        else:
            yield from module_names(child, hidden, own)


def dotted(node):
    """`os.path.join` of an attribute of a name; None for anything else."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


def at(node, what):
    return f"roexec.py:{node if isinstance(node, int) else node.lineno}: {what}"


# The checks.

def map_and_banners_agree(source):
    text = ast.get_docstring(source.tree, clean=False) or ""
    listed = [(int(match[1]), match[2])
              for match in map(MAP_LINE.match, text.splitlines()) if match]
    banners = [(section.number, section.name) for section in source.sections[1:]]
    if not listed:
        yield at(1, "the docstring has no map")
    for number, name in listed:
        if (number, name) not in banners:
            yield at(1, f"the map lists {number} {name}, which has no banner")
    for section in source.sections[1:]:
        if (section.number, section.name) not in listed:
            yield at(section.line, f"{section.number} {section.name} is not in the map")
    if [number for number, _ in banners] != [*range(1, len(banners) + 1)]:
        yield at(1, "the sections are not numbered 1, 2, 3, … in order")


def banners_have_one_shape(source):
    for number, line in enumerate(source.lines, 1):
        if line.startswith("# ===") and not (BANNER.fullmatch(line) and len(line) == 100):
            yield at(number, "a banner is `# ==== 3 cron (pure) ====…` and ends in column 100")
    for section in source.sections[1:]:
        if source.lines[section.line - 3:section.line - 1] != ["", ""]:
            yield at(section.line, "two blank lines stand before a banner")
        if not re.match(r"# \w", "".join(source.lines[section.line:section.line + 1])):
            yield at(section.line, "a section begins with a comment that says what it is for")
        if section.pure != (section.name in PURE):
            yield at(section.line, f"{section.name} is {'not ' if section.pure else ''}to be pure")


def nothing_refers_downwards(source):
    for name, node in module_names(source.tree):
        here = source.section(node)
        there = source.home.get(name, here)
        if there.line > here.line:
            yield at(node, f"{here.name} uses {name} of the later section {there.name}")


def private_names_stay_in_their_section(source):
    for name, node in module_names(source.tree):
        there = source.home.get(name, HEADER)
        if is_private(name) and there != HEADER and there != source.section(node):
            yield at(node, f"{source.section(node).name} uses {name}, private to {there.name}")
    defined = collections.defaultdict(set)          # a private attribute -> the sections it is of
    for node in source.each(ast.ClassDef):
        for name in attributes_of(node):
            defined[name].add(source.section(node))
    for node in source.each(ast.Attribute):
        if (is_private(node.attr) and node.attr in defined
                and source.section(node) not in defined[node.attr]):
            yield at(node, f"{source.section(node).name} uses the attribute {node.attr}, "
                           f"private to {', '.join(s.name for s in defined[node.attr])}")


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_"


def attributes_of(node):
    """The attributes that a class gives its objects: in its body, as slots, and by `self.x = `."""
    yield from bound_in(node)
    for child in ast.walk(node):
        if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
            yield child.attr
        elif isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield child.value                       # of __slots__


def private_names_are_used(source):
    used = {name for name, _ in module_names(source.tree)}
    lazy = {name for _, names in source.proxies() for name in names}
    for name, section in source.home.items():
        if (is_private(name) or name in lazy) and name not in used:
            yield at(source.bound[name], f"{section.name} binds {name} and nothing uses it")


def pure_sections_have_no_effects(source):
    modules = {name.split(".")[0] for _, name, _ in source.imports()}
    for node, name, _ in source.imports():
        top = name.split(".")[0]
        if source.section(node).pure and top not in PURE_MODULES and top not in PURE_PARTS:
            yield at(node, f"{source.section(node).name} imports {name}")
    for name, node in module_names(source.tree):
        if source.section(node).pure and (
                name in EFFECTS or name in modules - PURE_MODULES - set(PURE_PARTS)):
            yield at(node, f"{source.section(node).name} uses {name}")
    for node in source.each(ast.Attribute):
        whole, part = dotted(node.value), node.attr
        if source.section(node).pure and part not in PURE_PARTS.get(whole, {part}):
            yield at(node, f"{source.section(node).name} uses {whole}.{part}")
    for node in source.each(ast.ImportFrom):
        for alias in node.names:
            if source.section(node).pure and alias.name not in PURE_PARTS.get(node.module,
                                                                              {alias.name}):
                yield at(node, f"{source.section(node).name} uses {node.module}.{alias.name}")


def pure_sections_read_no_clock(source):
    for node in source.each(ast.Call):
        if not (isinstance(node.func, ast.Attribute) and source.section(node).pure):
            continue
        called = dotted(node.func) if dotted(node.func) in NEEDED else node.func.attr
        if called in CLOCK_CALLS:
            yield at(node, f"{source.section(node).name} reads the clock by .{called}()")
        if len(node.args) + len(node.keywords) < NEEDED.get(called, 0):
            yield at(node, f"{source.section(node).name} calls {called} without its last argument, "
                           "and so takes the instant or the zone from outside")


def only_the_standard_library_is_imported(source):
    for node, name, _ in source.imports():
        if name.split(".")[0] not in standard_library():
            yield at(node, f"{name} is not of the standard library")


def standard_library():
    if hasattr(sys, "stdlib_module_names"):         # from 3.10 on
        return sys.stdlib_module_names
    folder = sysconfig.get_path("stdlib")
    return {*sys.builtin_module_names,
            *(module.name for module in pkgutil.iter_modules([folder, folder + "/lib-dynload"]))}


def heavy_modules_are_imported_in_functions(source):
    for node, name, at_once in source.imports():
        if at_once and name not in ALWAYS_LOADED:
            yield at(node, f"{name} is imported at every start")
    for node, names in source.proxies():
        for name in HEAVY.intersection(names):
            yield at(node, f"{name} belongs into the functions that need it")
        strings = " ".join(child.value for child in ast.walk(node.value)
                           if isinstance(child, ast.Constant))
        if strings.split() != names:
            yield at(node, "the names differ from the modules they are bound to")


def the_database_is_opened_in_one_place(source):
    places = [node for node in source.each(ast.Attribute) if dotted(node) == "sqlite3.connect"]
    for node in source.each(ast.ImportFrom):
        if node.module == "sqlite3":
            yield at(node, "write sqlite3.NAME, so that one sees who opens the database")
    for node in places[1:]:
        yield at(node, f"sqlite3.connect stands in line {places[0].lineno} already")
    for node in places:
        if source.section(node).name != "store":
            yield at(node, f"{source.section(node).name} opens the database")


def functions_are_short(source):
    for node in source.each(*FUNCTIONS):
        size = node.end_lineno - node.lineno + 1
        if size >= 60:
            yield at(node, f"{node.name} has {size} lines; below 60")


def the_median_function_is_very_short(source):
    sizes = [node.end_lineno - node.lineno + 1 for node in source.each(*FUNCTIONS)]
    if sizes and statistics.median(sizes) >= 10:
        yield at(1, f"the median function has {statistics.median(sizes):g} lines; below 10")


def classes_are_short(source):
    for node in source.each(ast.ClassDef):
        size = node.end_lineno - node.lineno + 1
        if size >= 250:
            yield at(node, f"{node.name} has {size} lines; below 250")


def parameters_are_few(source):
    for node in source.each(*FUNCTIONS):
        count = len(node.args.posonlyargs + node.args.args)
        if count > 6 + (node.args.args[:1] != [] and node.args.args[0].arg in ("self", "cls")):
            yield at(node, f"{node.name} takes {count} parameters by position; 6 at most")


def lines_are_at_most_100_wide(source):
    for number, line in enumerate(source.lines, 1):
        if len(line) > 100:
            yield at(number, f"{len(line)} columns; 100 at most")
        if line != line.rstrip() or "\t" in line:
            yield at(number, "a tab, or blanks at the end")


def no_error_is_swallowed(source):
    for node in source.each(ast.ExceptHandler):
        if node.type is None:
            yield at(node, "a bare except")
        elif (names_in(node.type) & {"Exception", "BaseException"}
              and all(isinstance(statement, (ast.Pass, ast.Continue)) for statement in node.body)):
            yield at(node, "whatever goes wrong here is swallowed")


def only_the_command_line_exits(source):
    for name, node in module_names(source.tree):
        if name in ("SystemExit", "exit", "quit") and source.section(node).name != "cli":
            yield at(node, f"{source.section(node).name} uses {name}")
    for node in source.each(ast.Attribute):
        guard = source.section(node) == HEADER and is_version_guard(source, node)
        if dotted(node) == "sys.exit" and source.section(node).name != "cli" and not guard:
            yield at(node, f"{source.section(node).name} uses sys.exit")


def is_version_guard(source, node):
    return any(isinstance(statement, ast.If)
               and "sys.version_info" in map(dotted, ast.walk(statement.test))
               and statement.lineno <= node.lineno <= statement.end_lineno
               for statement in source.tree.body)


def nothing_runs_text(source):
    for name, node in module_names(source.tree):
        if name in ("eval", "exec", "compile"):
            yield at(node, f"{name} runs text")
    for node, name, _ in source.imports():
        if name.split(".")[0] in ("pickle", "shelve", "marshal"):
            yield at(node, f"{name} runs what it reads")
    for node in source.each(ast.keyword):
        if node.arg == "shell" and getattr(node.value, "value", True) not in (False, None):
            yield at(node.value, "shell=True runs text")
    for node in source.each(ast.Attribute):
        if dotted(node) in ("os.system", "os.popen"):
            yield at(node, f"{dotted(node)} runs text")


def names_are_bound(source):
    known = {*source.home, *dir(builtins), "__file__", "__name__", "__doc__"}
    for name, node in module_names(source.tree):
        if name not in known:
            yield at(node, f"{name} is bound nowhere")


def names_are_bound_once(source):
    first = {}
    for statement in source.tree.body:
        for name in bound_in(ast.Module([statement], [])):
            if first.setdefault(name, statement) is not statement:
                yield at(statement, f"{name} is bound in line {first[name].lineno} already")


def the_oldest_python_reads_it(source):
    try:
        ast.parse(source.text, feature_version=(3, 9))
    except SyntaxError as error:
        yield at(error.lineno, f"not the grammar of Python 3.9: {error.msg}")


CHECKS = [map_and_banners_agree, banners_have_one_shape, nothing_refers_downwards,
          private_names_stay_in_their_section, private_names_are_used,
          pure_sections_have_no_effects, pure_sections_read_no_clock,
          only_the_standard_library_is_imported, heavy_modules_are_imported_in_functions,
          the_database_is_opened_in_one_place, functions_are_short,
          the_median_function_is_very_short, classes_are_short, parameters_are_few,
          lines_are_at_most_100_wide, no_error_is_swallowed, only_the_command_line_exits,
          nothing_runs_text, names_are_bound, names_are_bound_once, the_oldest_python_reads_it]


# The file.

@pytest.fixture(scope="module")
def roexec_source():
    return Source((ROOT / "roexec.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_of_roexec(check, roexec_source):
    offences = list(check(roexec_source))
    assert not offences, "\n".join(["", *offences])


def test_an_import_loads_nothing_but_what_each_start_has():
    script = ("import sys; before = set(sys.modules); sys.path.insert(0, sys.argv[1]); "
              "import os, time, roexec; print(*sorted(set(sys.modules) - before))")
    loaded = subprocess.run([sys.executable, "-I", "-S", "-c", script, str(ROOT)],
                            capture_output=True, text=True, check=True).stdout.split()
    # What `os` and `time` need where no `site` has loaded them before.
    of_os = {"os", "os.path", "posix", "stat", "_stat", "posixpath", "genericpath",
             "_collections_abc", "time"}
    assert set(loaded) - of_os == {"roexec"}


def test_the_package_has_no_dependencies():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r"^.*dependencies.*$", text, re.M) == ["dependencies = []"]


# The checks themselves: each finds the lines marked `# !`, and no others.

def expand(text):
    """The source of a snippet in which `== 1 basics (pure)` stands for a whole banner."""
    return Source(re.sub(r"^== (.+)$", lambda match: "\n\n" + f"# ==== {match[1]} ".ljust(100, "=")
                         + "\n# What it is for.", text, flags=re.M))


def found(check, source):
    return [int(re.fullmatch(r"roexec\.py:(\d+): .+", offence)[1]) for offence in check(source)]


def marked(source):
    return [number for number, line in enumerate(source.lines, 1) if line.endswith("# !")]


BROKEN = [
    (nothing_refers_downwards, """
        == 1 low
        def first(high, near=lambda later: later):
            later = [high for high in near(high)]
            return later, Other.high, "high"

        class Value:
            later = 1
            same = later

            def method(self):
                return later()  # !

        def second():
            return later()  # !
        SIZE = high  # !
        == 2 high
        def later():
            return first()
        high = 1
    """),
    (private_names_stay_in_their_section, """
        class _Header:
            pass
        == 1 low
        class Low:
            __slots__ = ("_slot", "open")

            def __init__(self):
                self._attribute = self._slot = 1

            def _method(self):
                return _Header, _helper()

        def _helper(_argument=None):
            return Low()._method()
        == 2 high
        def high(low):
            low.open, os._exit, _Header, low.__class__
            _helper()  # !
            low._method()  # !
            low._attribute  # !
            low._slot = 2  # !
            global _helper  # !
    """),
    (private_names_are_used, """
        (re, json) = map(_Module, "re json".split())  # !
        class _Module:
            pass
        def public(_argument):
            return re
        def _private():  # !
            return public
    """),
    (pure_sections_have_no_effects, """
        import os, socket, subprocess, time, datetime, math
        == 1 basics (pure)
        def pure(open):
            return time.gmtime(0), os.path.join("a", "b"), math.pi, open, self.read(), datetime.UTC
        def effects():
            import random  # !
            from os import environ  # !
            open("x")  # !
            print("x")  # !
            os.getcwd()  # !
            os.path.exists("x")  # !
            os.environ["HOME"]  # !
            socket.gethostname()  # !
            time.time()  # !
            time.localtime(0)  # !
            subprocess.run  # !
        == 2 store
        def store():
            return open("x"), os.getcwd(), time.time(), socket.gethostname()
    """),
    (pure_sections_read_no_clock, """
        == 1 basics (pure)
        def pure(zone, instant):
            datetime.datetime.fromtimestamp(instant, zone).astimezone(zone).strftime("%H")
            time.strftime("%H", time.gmtime(instant))
            datetime.datetime.now()  # !
            datetime.datetime.now(zone)  # !
            datetime.date.today()  # !
            datetime.datetime.fromtimestamp(instant)  # !
            instant.astimezone()  # !
            time.strftime("%H")  # !
            time.gmtime()  # !
        == 2 store
        def store():
            return datetime.datetime.now()
    """),
    (only_the_standard_library_is_imported, """
        import os, json.decoder
        def function():
            import numpy  # !
            from yaml import load  # !
            from . import helper  # !
            from xml.sax import saxutils
    """),
    (heavy_modules_are_imported_in_functions, """
        import os, sys, time
        import json  # !
        from re import compile  # !
        if os:
            import ssl  # !
        class Late:
            import email  # !
        (re, json) = map(_Module, "re json".split())
        (json, re) = map(_Module, "re json".split())  # !
        (re, sqlite3) = map(_Module, "re sqlite3".split())  # !
        def function():
            import sqlite3
    """),
    (the_database_is_opened_in_one_place, """
        == 1 store
        def one():
            import sqlite3
            return sqlite3.connect("x")
        def two():
            from sqlite3 import connect  # !
            return sqlite3.connect("y")  # !
    """),
    (the_database_is_opened_in_one_place, """
        == 1 api
        def one():
            return sqlite3.connect("x")  # !
    """),
    (functions_are_short, """
        def short(): """ + "\n            pass" * 58 + """
        def long():  # !""" + "\n            pass" * 59),
    (classes_are_short, """
        class Short: """ + "\n            x = 1" * 248 + """
        class Long:  # !""" + "\n            x = 1" * 249),
    (parameters_are_few, """
        def few(a, b, c, d, e, f, *, g, h):
            def method(self, a, b, c, d, e, f):
                pass
        def many(a, b, c, d, e, f, g):  # !
            pass
    """),
    (lines_are_at_most_100_wide, """
        wide = 1  """ + "# " + "-" * 80 + """
        wider = 1  """ + "#" * 89 + "# !" + """
        blanks = 1
    """),
    (no_error_is_swallowed, """
        try:
            work()
        except OSError:
            pass
        except ValueError as error:
            raise
        except (TypeError, Exception):  # !
            pass
        except BaseException:
            undo()
        except:  # !
            raise
    """),
    (only_the_command_line_exits, """
        if sys.version_info < (3, 9):
            sys.exit("too old")
        sys.exit()  # !
        == 1 store
        def store(exit):
            os._exit(exit)
            raise SystemExit  # !
            sys.exit()  # !
        == 2 cli
        def cli():
            sys.exit()
            raise SystemExit
    """),
    (nothing_runs_text, """
        import pickle  # !
        (re, marshal) = map(_Module, "re marshal".split())  # !
        def run(text):
            eval(text)  # !
            exec(text)  # !
            os.system(text)  # !
            subprocess.run(text, shell=True)  # !
            subprocess.run(text, shell=text)  # !
            subprocess.run(text, shell=False)
            re.compile(text)
    """),
    (names_are_bound, """
        def function(known):
            for item in known:
                with item as other:
                    print(item, other, [x for x in known if (y := x)], function)
            except_ = unknown  # !
            return __name__, Missing.attribute  # !
    """),
    (names_are_bound_once, """
        import os
        def first(os):
            first = os
        second = 1
        def second():  # !
            pass
        import sys as first  # !
    """),
]


@pytest.mark.parametrize("check, text", BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_a_check_finds_what_it_is_for(check, text):
    source = expand(textwrap.dedent(text))
    assert sorted(found(check, source)) == marked(source)


def test_each_check_is_tried():
    tried = {check for check, _ in BROKEN} | {
        map_and_banners_agree, banners_have_one_shape, the_median_function_is_very_short,
        the_oldest_python_reads_it}
    assert tried == set(CHECKS)


MAPPED = '''"""A file.

     1  basics     what
     2  store      what
"""
== 1 basics (pure)
== 2 store
'''


@pytest.mark.parametrize("old, new, offences", [
    ("", "", []),
    ("     2  store      what\n", "", ["2 store is not in the map"]),
    ("== 2 store\n", "", ["the map lists 2 store, which has no banner"]),
    ("== 2 store", "== 2 shop", ["the map lists 2 store, which has no banner",
                                 "2 shop is not in the map"]),
    ("== 1 basics (pure)\n== 2 store", "== 2 store\n== 1 basics (pure)",
     ["the sections are not numbered 1, 2, 3, … in order"]),
    ("     1  basics     what\n     2  store      what\n", "",
     ["the docstring has no map", "1 basics is not in the map", "2 store is not in the map"]),
])
def test_the_map_lists_the_banners(old, new, offences):
    source = expand(MAPPED.replace(old, new))
    assert [offence.split(": ", 1)[1] for offence in map_and_banners_agree(source)] == offences


@pytest.mark.parametrize("old, new, offence", [
    ("", "", None),
    ("(pure) ===", "(pure) ====", "a banner is"),
    ("# ==== 2 store =", "# === 2 store ==", "a banner is"),
    ("\n\n\n# ==== 2", "\n\n# ==== 2", "two blank lines"),
    ("# What it is for.", "", "a section begins with a comment"),
    (" (pure) =", " ========", "basics is to be pure"),
    ("2 store =======", "2 store (pure) ", "store is not to be pure"),
])
def test_banners_are_alike(old, new, offence):
    text = expand(MAPPED).text
    assert old in text
    offences = list(banners_have_one_shape(Source(text.replace(old, new, 1))))
    if offence is None:
        assert offences == []
    else:
        assert offence in offences[0]


@pytest.mark.parametrize("lines, offends", [(9, False), (10, True)])
def test_the_median_function_has_fewer_than_ten_lines(lines, offends):
    text = "def f():" + "\n    pass" * (lines - 1) + "\n"
    assert bool(list(the_median_function_is_very_short(Source(text)))) is offends


@pytest.mark.skipif(sys.version_info < (3, 10), reason="this Python cannot read the newer grammar")
def test_newer_grammar_is_found():
    source = Source("x = 1\nmatch x:\n    case 1:\n        pass\n")
    assert found(the_oldest_python_reads_it, source)
