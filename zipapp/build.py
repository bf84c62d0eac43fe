#!/usr/bin/env python3
"""Builds dist/roexec.pyz, and around it the release's tar: the same bytes from the same tree.

The archive holds the source once and bytecode for each Python it is built with. Nothing of the
machine goes into it: dates, modes and order are fixed, nothing is compressed (each zlib does that
in its own way), and the compiler sees a fixed file name and a fixed hash seed.
"""
import argparse
import glob
import gzip
import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import zipfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHEBANG = b"#!/usr/bin/env python3\n"
PLACES = ("~/.pyenv/versions/*/bin", "~/.local/bin", "/usr/local/bin", "/usr/bin", "/opt/*/bin")
DESCRIBE = "import sys; print(sys.implementation.cache_tag, *sys.version_info[:3])"
COMPILE = """
import marshal, sys
from importlib.util import MAGIC_NUMBER, source_hash
source = sys.stdin.buffer.read()
code = compile(source, "roexec.pyz/roexec.py", "exec", dont_inherit=True, optimize=0)
header = MAGIC_NUMBER + (1).to_bytes(4, "little") + source_hash(source)     # unchecked: PEP 552
sys.stdout.buffer.write(header + marshal.dumps(code))
"""


def find_pythons():
    """Where Pythons are looked for: the running one, PATH, and the usual places."""
    folders = os.environ.get("PATH", "").split(os.pathsep)
    for place in PLACES:
        folders += sorted(glob.glob(os.path.expanduser(place)))
    return [sys.executable] + [path for folder in folders
                               for path in sorted(glob.glob(os.path.join(folder, "python3.*")))
                               if re.fullmatch(r"python3\.\d+", os.path.basename(path))]


def choose_pythons(paths):
    """{cache tag: path} of those that run and are 3.9 or newer; of each tag the newest release."""
    found = {}
    for path in dict.fromkeys(paths):
        try:
            answer = subprocess.run([path, "-I", "-S", "-c", DESCRIBE], stdin=subprocess.DEVNULL,
                                    capture_output=True, timeout=30, text=True).stdout
            tag, *version = answer.split()
            version = tuple(map(int, version))
        except (OSError, ValueError, subprocess.TimeoutExpired):
            continue                                # a shim, or a broken installation
        if version >= (3, 9) and (tag not in found or version > found[tag][0]):
            found[tag] = version, path
    return {tag: path for tag, (version, path) in sorted(found.items(), key=lambda item: item[1])}


def read(name):
    """The bytes of a text file of the tree, with plain newlines whatever a checkout made of it."""
    with open(os.path.join(ROOT, name), "rb") as file:
        return file.read().replace(b"\r\n", b"\n")


def bytecode(python, source):
    """What `python` makes of the source: the content of a .pyc."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run([python, "-s", "-S", "-c", COMPILE], input=source, cwd="/", check=True,
                          stdout=subprocess.PIPE, env={**clean, "PYTHONHASHSEED": "0"}).stdout


def archive(pythons):
    """The bytes of roexec.pyz with bytecode for `pythons`, a {cache tag: path}."""
    source = read("roexec.py")
    members = [("__main__.py", read("zipapp/__main__.py")), ("roexec.py", source),
               ("LICENSE", read("LICENSE"))]
    members += [(f"bytecode/{tag}.pyc", bytecode(path, source)) for tag, path in pythons.items()]
    out = io.BytesIO(SHEBANG)
    out.seek(0, io.SEEK_END)                        # offsets in the zip count from the shebang
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as target:
        for name, data in members:
            member = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            member.create_system, member.external_attr = 3, 0o100644 << 16
            target.writestr(member, data)
    return out.getvalue()


def release(program, folder):
    """The bytes of the .tar.gz: `folder` with `program` as the executable roexec, and papers."""
    examples = sorted(os.path.relpath(os.path.join(folder, name), os.path.join(ROOT, "examples"))
                      for folder, _, names in os.walk(os.path.join(ROOT, "examples"))
                      for name in names)
    members = [("roexec", program, 0o755)] + [
        (name, read(name), 0o644)
        for name in ["README.md", "LICENSE", *(f"examples/{name}" for name in examples)]]
    out = io.BytesIO()
    with gzip.GzipFile("", "wb", 9, out, mtime=0) as packed, \
            tarfile.open(mode="w", fileobj=packed, format=tarfile.USTAR_FORMAT) as target:
        for name, data, mode in members:
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size, member.mode = len(data), mode
            target.addfile(member, io.BytesIO(data))
    return out.getvalue()


def write(path, data, mode):
    """Put the file in place whole, and print its SHA-256 as sha256sum does."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".new", "wb") as file:
        file.write(data)
    os.chmod(file.name, mode)
    os.replace(file.name, path)
    print(f"{hashlib.sha256(data).hexdigest()}  {os.path.basename(path)}")


def main():
    parser = argparse.ArgumentParser(description="Build roexec.pyz.")
    parser.add_argument("pythons", nargs="*", metavar="PYTHON",
                        help="the Pythons to make bytecode for (else each one found)")
    parser.add_argument("--output", default=os.path.join(ROOT, "dist"), metavar="FOLDER")
    parser.add_argument("--release", action="store_true", help="build the release's tar too")
    parser.add_argument("--list", action="store_true", help="print the Pythons, build nothing")
    options = parser.parse_args()
    pythons = choose_pythons(options.pythons or find_pythons())
    if options.list:
        print(*pythons.values(), sep="\n")
        return
    program = archive(pythons)
    write(os.path.join(options.output, "roexec.pyz"), program, 0o755)
    if options.release:
        version = re.search(rb'^__version__ = "(.+)"$', read("roexec.py"), re.M)[1].decode()
        folder = f"roexec-executor-{version}"
        write(os.path.join(options.output, folder + ".tar.gz"), release(program, folder), 0o644)
    print("bytecode for", ", ".join(pythons), file=sys.stderr)


if __name__ == "__main__":
    main()
