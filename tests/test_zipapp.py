"""The archive: the same bytes from the same tree, and a program wherever it is put."""
import gzip
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import pytest

import roexec

ROOT = Path(__file__).parent.parent
TAG = sys.implementation.cache_tag
VERSION = f"roexec {roexec.__version__}\n"


def copy_tree(target):
    """A copy of what goes into a release, as a fresh checkout elsewhere would be."""
    target.mkdir()
    for name in ("roexec.py", "LICENSE", "README.md", "CHANGELOG.md", "Makefile"):
        shutil.copyfile(ROOT / name, target / name)
    for name in ("zipapp", "examples"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def build(tree, *options, **environment):
    """Run the builder of a tree for this Python alone -> what it prints."""
    return subprocess.run([sys.executable, str(tree / "zipapp/build.py"), sys.executable, *options],
                          env={"PATH": os.environ["PATH"], **environment}, cwd="/", check=True,
                          capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the tree with an archive in dist/."""
    tree = copy_tree(tmp_path_factory.mktemp("built") / "tree")
    build(tree, "--release")
    return tree


@pytest.fixture(scope="module")
def archive(tree):
    return tree / "dist/roexec.pyz"


def changed(archive, target, **members):
    """A copy of the archive with other content for some members; None leaves one out."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = members.get(Path(name).stem, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target


def output(*words, **options):
    return subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, **options).stdout


# Its bytes.

def test_another_checkout_gives_the_same_bytes(tree, tmp_path):
    other = copy_tree(tmp_path / "a tree elsewhere")
    for path in other.rglob("*"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
        path.chmod(0o700)
    source = other / "roexec.py"
    source.write_bytes(source.read_bytes().replace(b"\n", b"\r\n"))
    build(other, "--release", TZ="Asia/Kathmandu", LANG="C", PYTHONHASHSEED="7",
          PYTHONOPTIMIZE="2", HOME="/nowhere", SOME_NAME_OF_ROEXEC="parse_duration")
    for path in (tree / "dist").iterdir():
        assert (other / "dist" / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_hash_that_is_printed_is_that_of_the_file(tree, tmp_path):
    printed = build(tree, "--output", str(tmp_path))
    digest = hashlib.sha256((tmp_path / "roexec.pyz").read_bytes()).hexdigest()
    assert printed == f"{digest}  roexec.pyz\n"


def test_nothing_of_the_machine_is_in_it(archive, tree):
    for folder in (tree, ROOT):
        assert os.fsencode(folder) not in archive.read_bytes()


def test_it_holds_the_source_once_and_nothing_is_compressed(archive):
    with zipfile.ZipFile(archive) as members:
        assert members.namelist() == ["__main__.py", "roexec.py", "LICENSE", f"bytecode/{TAG}.pyc"]
        assert members.read("roexec.py") == (ROOT / "roexec.py").read_bytes()
        for member in members.infolist():
            assert member.compress_type == zipfile.ZIP_STORED
            assert member.date_time == (1980, 1, 1, 0, 0, 0)
            assert member.external_attr == 0o100644 << 16
    assert archive.read_bytes().startswith(b"#!/usr/bin/env python3\nPK")


# How it starts.

@pytest.mark.parametrize("flags", [[], ["-I"], ["-I", "-S"]], ids=" ".join)
def test_it_starts_from_any_folder(archive, tmp_path, flags):
    assert output(sys.executable, *flags, archive, "--version", cwd=tmp_path) == VERSION


def test_a_renamed_copy_in_a_read_only_folder_starts_through_a_link(archive, tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    shutil.copyfile(archive, folder / "roexec")
    (folder / "roexec").chmod(0o555)
    folder.chmod(0o555)
    link = tmp_path / "link"
    link.symlink_to(folder / "roexec")
    bare = {"PATH": os.path.dirname(python_of_that_name(tmp_path)) + ":/usr/bin:/bin"}
    try:
        assert output(link, "--version", env=bare) == VERSION
        assert output(sys.executable, link, "--version", cwd=folder) == VERSION
        assert sorted(os.listdir(folder)) == ["roexec"]
    finally:
        folder.chmod(0o755)


def python_of_that_name(tmp_path):
    """A `python3` for the shebang that is the Python of these tests."""
    folder = tmp_path / "path"
    folder.mkdir()
    (folder / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / "python3").chmod(0o755)
    return str(folder / "python3")


def test_the_exit_status_is_that_of_main(archive):
    failed = subprocess.run([sys.executable, archive, "no-such-command"], capture_output=True)
    assert failed.returncode == 2


def test_bytecode_is_what_runs(archive, tmp_path):
    other = changed(archive, tmp_path / "other.pyz", roexec='def main():\n    print("source")\n')
    assert output(sys.executable, other, "--version") == VERSION


@pytest.mark.parametrize("bytecode", [None, b"", b"\0\0\r\n" + bytes(12)],
                         ids=["none", "empty", "of another Python"])
def test_without_fitting_bytecode_the_source_runs(archive, tmp_path, bytecode):
    members = {"roexec": 'def main():\n    print("source")\n', TAG: bytecode}
    assert output(sys.executable, changed(archive, tmp_path / "x.pyz", **members)) == "source\n"


def test_to_say_its_version_it_does_not_load_the_program(archive, tmp_path):
    source = '"""A program."""\n__version__ = "7.8"\nthis is no program\n'
    other = changed(archive, tmp_path / "other.pyz", **{TAG: None}, roexec=source)
    assert output(sys.executable, other, "--version") == "roexec 7.8\n"
    assert subprocess.run([sys.executable, other, "--help"], capture_output=True).returncode == 1


def test_it_can_be_imported(archive, tmp_path):
    script = "import roexec; print(roexec.__version__, roexec.__file__)"
    shown = output(sys.executable, "-c", script, env={"PYTHONPATH": str(archive)}, cwd=tmp_path)
    assert shown == f"{roexec.__version__} {archive}/roexec.py\n"


def test_a_module_loaded_by_it_is_the_one_that_is_imported(archive):
    script = ("import runpy, sys, zipimport; "
              "load = runpy.run_path(sys.argv[1])['load']; "
              "first = load(zipimport.zipimporter(sys.argv[1])); "
              "import roexec; print(roexec is first, roexec.__name__, roexec.__file__)")
    assert output(sys.executable, "-c", script, archive) == f"True roexec {archive}/roexec.py\n"


def test_tracebacks_show_lines_of_the_source(archive, tmp_path):
    script = ("import runpy, sys, traceback, zipimport\n"
              "load = runpy.run_path(sys.argv[1])['load']\n"
              "try: load(zipimport.zipimporter(sys.argv[1])).parse_duration('x')\n"
              "except ValueError: print(traceback.format_exc())")
    shown = output(sys.executable, "-c", script, archive, cwd=tmp_path)
    assert re.search(r'File "roexec.pyz/roexec.py", line \d+, in parse_duration\n +raise ', shown)


def test_it_imports_nothing_that_a_start_from_an_archive_has_not_loaded(archive, tmp_path):
    script = "import sys; sys.stdout.write(' '.join(sorted(sys.modules)))"
    bare = changed(archive, tmp_path / "bare.pyz", __main__=script)
    ours = changed(archive, tmp_path / "ours.pyz", **{TAG: None}, roexec=f"def main(): {script}")
    loaded = [set(output(sys.executable, "-I", "-S", path).split()) for path in (bare, ours)]
    assert loaded[1] - loaded[0] <= {"gc", "marshal", "roexec"}


# Pythons that are too old.

def old_pythons():
    folders = [*os.environ["PATH"].split(os.pathsep),
               *map(str, Path("~/.pyenv/versions").expanduser().glob("*/bin"))]
    for name in ("python2.7", "python3.6", "python3.8"):
        for folder in folders:
            path = os.path.join(folder, name)
            if os.access(path, os.X_OK) and not subprocess.run(
                    [path, "-c", ""], capture_output=True).returncode:
                yield name, path
                break


def test_an_old_python_gets_a_sentence(archive):
    ran = 0
    for name, path in old_pythons():
        old = subprocess.run([path, str(archive), "--version"], capture_output=True, text=True)
        version = name.replace("python", "")
        assert (old.returncode, old.stdout, old.stderr) == (
            1, "", f"roexec needs Python 3.9 or newer; this is {version}.\n")
        ran += 1
    if not ran:
        pytest.skip("no old Python is installed here")


@pytest.mark.parametrize("version", [(2, 7, 18), (3, 8, 0)])
def test_the_guard_comes_first(version):
    source = (ROOT / "zipapp/__main__.py").read_text()
    assert source.isascii() and not re.search(r"\bf[\"']|:=|->|nonlocal|print ", source)
    old = types.SimpleNamespace(version_info=version, exit=sys.exit)
    before_guard = source.split("\nimport gc")[0].replace("import sys\n", "")
    with pytest.raises(SystemExit, match=r"roexec needs Python 3\.9 or newer; this is \d\.\d\."):
        exec(compile(before_guard, "__main__.py", "exec"), {"sys": old})


# The release.

def test_the_tar_is_what_the_readme_unpacks(tree, tmp_path):
    name = f"roexec-executor-{roexec.__version__}"
    packed = (tree / "dist" / f"{name}.tar.gz").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(packed))) as tar:
        modes = {member.name: (member.mode, member.mtime, member.uname) for member in tar}
    assert modes == {f"{name}/{path}": (0o755 if path == "roexec" else 0o644, 0, "") for path in (
        "roexec", "README.md", "LICENSE", *(str(example.relative_to(ROOT)) for example in
                                            (ROOT / "examples").rglob("*") if example.is_file()))}
    (tmp_path / "x.tar.gz").write_bytes(packed)
    output("tar", "-xzf", tmp_path / "x.tar.gz", cwd=tmp_path)
    assert output(sys.executable, tmp_path / name / "roexec", "--version") == VERSION


def test_the_newest_entry_of_the_changelog_is_this_version():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == roexec.__version__


# The Makefile.

@pytest.fixture
def make(tree):
    if not shutil.which("make"):
        pytest.skip("make is not installed here")
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "PYTHONS": sys.executable}
    return lambda *words: output("make", *words, cwd=tree, env=environment)


def test_make_alone_lists_the_targets(make):
    listed = re.findall(r"^  make (\S+) +\S", make(), re.M)
    phony = re.findall(r"^\.PHONY: (.+)", (ROOT / "Makefile").read_text(), re.M)
    assert listed == phony
    assert listed[0] == "help"


def test_make_install_puts_the_program_in_place_by_rename(make, tmp_path):
    program = tmp_path / "usr/bin/roexec"
    program.parent.mkdir(parents=True)
    program.write_text("the version before\n")
    with program.open() as running:
        make("install", f"DESTDIR={tmp_path}", "PREFIX=/usr")
        assert running.read() == "the version before\n"
    assert output(sys.executable, program, "--version") == VERSION
    assert os.listdir(program.parent) == ["roexec"] and os.access(program, os.X_OK)


def test_the_builder_lists_a_python_once_and_none_that_is_broken(tree, tmp_path):
    broken = tmp_path / "python3.11"
    broken.write_text("#!/bin/sh\nexit 127\n")
    broken.chmod(0o755)
    listed = output(sys.executable, tree / "zipapp/build.py", "--list", broken, sys.executable,
                    sys.executable, tmp_path / "missing")
    assert listed == f"{sys.executable}\n"
