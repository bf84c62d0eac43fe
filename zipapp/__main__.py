"""Starts roexec from its archive: from the bytecode for this Python, else from the source.

The import system would compile a module in an archive twice at every start, and never looks at
`__pycache__` there. Old Pythons, 2.7 included, must be able to read this file. It imports only
what is loaded by then.
"""
import sys

if sys.version_info < (3, 9):
    sys.exit("roexec needs Python 3.9 or newer; this is %d.%d." % sys.version_info[:2])

import gc
import marshal
import os
from importlib.util import MAGIC_NUMBER


def code_of(archive):
    """The compiled roexec.py of the archive (a zipimporter)."""
    try:
        data = archive.get_data("bytecode/" + str(sys.implementation.cache_tag) + ".pyc")
    except OSError:
        data = b""
    if data[:4] == MAGIC_NUMBER:
        return marshal.loads(memoryview(data)[16:])
    return compile(archive.get_data("roexec.py"), "roexec.pyz/roexec.py", "exec", dont_inherit=True)


def load(archive):
    """The module `roexec` of the archive, entered where `import` finds it."""
    gc.disable()
    module = sys.modules["roexec"] = type(sys)("roexec")
    module.__file__ = archive.archive + "/roexec.py"
    module.__loader__ = archive         # by which tracebacks find the source lines
    exec(code_of(archive), module.__dict__)
    gc.freeze()                         # it lives to the end: a tenth of a start is saved
    gc.set_threshold(10000)             # most commands end before that many objects are there
    gc.enable()
    return module


def leave(status):
    """End at once: to take the program to pieces first costs a twentieth of a start."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except Exception:                   # closed, or nobody reads it: Python knows what to do then
        sys.exit(status)
    os._exit(status or 0)


def version(archive):
    """The version that the source states, or None: to say it one need not load the program."""
    _, found, rest = archive.get_data("roexec.py")[:16384].partition(b'\n__version__ = "')
    return rest.partition(b'"')[0].decode() if found else None


if __name__ == "__main__":
    known = version(__loader__) if sys.argv[1:] == ["--version"] else None
    if known:
        print("roexec " + known)
    else:
        leave(load(__loader__).main())
