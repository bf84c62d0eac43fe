"""How roexec stands on a host: what doctor finds, and what mends it."""
import json
import os
import re
import shlex
import shutil
import socket
import sqlite3
import subprocess
import time

import pytest
from helpers import apply, make_job, wait_for

import roexec

pytestmark = pytest.mark.usefixtures("surroundings")
ROOT = os.geteuid() == 0


@pytest.fixture
def doctor(cli, store):
    """`doctor()` -> {about: [(level, text, mend)]}; the exit status agrees with it."""
    def call():
        status, out, err = cli("doctor --json")
        answer = json.loads(out)
        wrong = [found for found in answer["findings"] if found["level"] == "wrong"]
        assert (status, answer["healthy"]) == ((1, False) if wrong else (0, True)), err
        found = {}
        for each in answer["findings"]:
            found.setdefault(each["about"], []).append(
                (each["level"], each["text"], each["mend"]))
        return found
    return call


def wrong(found):
    """[(about, text, mend)] of what is wrong."""
    return [(about, text, mend) for about, entries in found.items()
            for level, text, mend in entries if level == "wrong"]


# doctor.

def test_a_host_as_it_should_be_has_nothing_wrong(doctor, cli, store):
    apply(store, make_job("echo hello", job_id="hello"))
    found = doctor()
    assert wrong(found) == []
    assert {"python", "program", "sqlite", "store", "disk", "clock", "time zone", "server",
            "limits", "port", "jobs"} <= found.keys()
    assert {level for entries in found.values() for level, _, _ in entries} == {"ok", "note"}
    status, out, _ = cli("doctor")
    assert status == 0 and re.search(r"^ok +store +/.*store, \w+, owner \w+$", out, re.M)
    assert re.search(r"^note +server +none runs .* -> roexec server$", out, re.M)


def test_doctor_makes_no_store(cli, tmp_path):
    path = str(tmp_path / "none")
    status, out, _ = cli("doctor", store=path)
    assert status == 0 and f"there is no store in {path} yet" in out
    assert not os.path.exists(path)


def open_to_others(store):
    os.chmod(store.path, 0o755)


def a_foreign_file(store):
    path = store.file("logs/x")
    os.mkdir(path)
    os.chown(path, 12345, 12345)


def no_folder(store):
    apply(store, make_job(directory=store.path + "-x/y z"))


def not_executable(store):
    path = store.path + "-x.sh"
    with open(path, "w") as file:
        file.write("#!/bin/sh\n")
    apply(store, make_job([path]))


@pytest.mark.parametrize("cause, about, words", [
    (open_to_others, "store", "others can look into"),
    pytest.param(a_foreign_file, "store", "1 files of it belong to others, such as", marks=(
        pytest.mark.skipif(not ROOT, reason="only root can give files away"))),
    (no_folder, "jobs", 'job "x": there is no folder'),
    (not_executable, "jobs", "may not be executed"),
])
def test_the_command_that_mends_a_finding_mends_it(cause, about, words, doctor, store):
    cause(store)
    (where, text, mend), = wrong(doctor())
    assert where == about and words in text
    subprocess.run(mend, shell=True, check=True)
    assert wrong(doctor()) == []


@pytest.mark.parametrize("spec, words", [
    ({"user": "nobody-here"}, '"nobody-here" is no user of this host'),
    ({"shell": ["/bin/no-shell", "-c"]}, "there is no program /bin/no-shell"),
    ({"command": ["no-such-program"]}, "no-such-program: there is no such program in /usr/local"),
    ({"command": "no-such-program --all | wc"}, "no-such-program: there is no such program"),
    ({"command": "bin/missing"}, "there is no program /bin/missing"),
    ({"command": "ls", "env": {"PATH": "/nowhere"}}, "ls: there is no such program in /nowhere"),
    ({"condition": "/missing/check"}, "there is no program /missing/check"),
    ({"hooks": {"on_failure": "notify-of-mine $X"}}, "notify-of-mine: there is no such program"),
])
def test_what_a_job_lacks_is_found_before_it_runs(spec, words, doctor, store):
    apply(store, make_job(**{"command": "true", **spec}))
    (about, text, mend), = wrong(doctor())
    assert about == "jobs" and text.startswith('job "x": ') and words in text
    assert mend == "roexec edit x"


@pytest.mark.parametrize("command", [
    "", "# nothing\ntrue", "cd /tmp && ls", "[ -e /x ] || true", "for x in a b; do echo $x; done",
    "X=1 missing", "$HOME/missing", "(missing)", "f() { true; }; f", '"a program" x', "!"])
def test_what_a_shell_alone_can_tell_is_not_guessed(command, doctor, store):
    apply(store, make_job(command))
    assert wrong(doctor()) == []


@pytest.mark.parametrize("version, level", [
    ((3, 25, 0), "wrong"), ((3, 26, 0), "note"), ((3, 44, 5), "note"), ((3, 44, 6), "ok"),
    ((3, 45, 0), "note"), ((3, 50, 6), "note"), ((3, 50, 7), "ok"), ((3, 51, 2), "note"),
    ((3, 51, 3), "ok"), ((3, 52, 0), "ok")])
def test_the_fault_of_sqlite_is_known_by_its_version(version, level, doctor, monkeypatch):
    monkeypatch.setattr(sqlite3, "sqlite_version_info", version)
    assert [entry[0] for entry in doctor()["sqlite"]] == [level]


def test_a_disk_that_is_nearly_full_is_wrong_also_for_status(doctor, cli, store, monkeypatch):
    real = os.statvfs

    def full(path):
        values = list(real(path))
        values[4], values[7] = 1, 5                     # f_bavail, f_favail
        return os.statvfs_result(values)
    monkeypatch.setattr(os, "statvfs", full)
    texts = [text for about, text, _ in wrong(doctor()) if about == "disk"]
    assert re.match(r"only \S+ kB of .* are free", texts[0]) and "5 more files fit" in texts[1]
    status, out, _ = cli("status")
    assert "wrong    disk: only" in out
    assert cli("status --json")[0] == 3 and "no server runs" in out


def test_a_clock_that_was_set_back_is_seen_by_the_newest_run(doctor, store):
    with store.write() as db:
        roexec.add_run(db, id="abcd123456", job_id="x", trigger="manual", state="queued",
                       queued_at=time.time() + 3600)
    (about, text, mend), = wrong(doctor())
    assert about == "clock" and "and the newest run is of" in text
    assert mend == "timedatectl set-ntp true"


def test_a_zone_that_does_not_exist_is_wrong(doctor, monkeypatch):
    monkeypatch.setenv("TZ", "Europe/Berlim")
    (about, text, _), = wrong(doctor())
    assert about == "time zone" and "Europe/Berlim" in text


def test_a_store_of_a_newer_version_is_told(doctor, store):
    with store.write() as db:
        db.execute("PRAGMA user_version = 99")
    texts = [text for _, text, _ in wrong(doctor())]
    assert "was made by a newer roexec" in texts[0]


def test_a_limit_that_this_host_does_not_keep_is_named(doctor, store, monkeypatch):
    monkeypatch.setattr(roexec, "delegated_cgroup", lambda pid="self": None)
    apply(store, make_job(limits={"cpu": 0.5}), make_job(job_id="y", limits={"memory": "1G"}))
    assert [text for _, text, _ in wrong(doctor())] == ['limits.cpu of job "x" is not kept']


def test_a_port_that_somebody_else_has_is_wrong(doctor, tmp_path, cli, store):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        config = tmp_path / "config.yml"
        config.write_text(f"server: {{port: {port}}}\n")
        status, out, _ = cli(f"doctor --config {config}")
        assert status == 1 and f"port {port} of 127.0.0.1 cannot be had" in out
    assert cli(f"doctor --config {config}")[0] == 0


def test_a_broken_configuration_is_a_finding(cli, tmp_path):
    config = tmp_path / "config.yml"
    config.write_text("server: {prot: 1}\n")
    status, out, _ = cli(f"doctor --config {config}")
    assert status == 1 and re.search(r"^wrong +config .*config.yml:1:10: .*prot", out, re.M)
    assert "\nok     store" in out


def test_a_program_that_others_can_change_is_wrong(doctor, tmp_path, monkeypatch):
    program = tmp_path / "roexec"
    program.touch()
    program.chmod(0o757)
    monkeypatch.setattr(roexec, "program_path", lambda: str(program))
    (about, text, mend), = wrong(doctor())
    assert about == "program" and f"somebody else can change {program}" in text
    subprocess.run(mend, shell=True, check=ROOT)
    program.chmod(0o755)
    assert wrong(doctor()) == []


SHOWN = {"LoadState": "loaded", "KillMode": "process", "OOMPolicy": "continue",
         "TasksMax": "infinity", "Delegate": "yes"}


@pytest.fixture
def systemctl(tmp_path, monkeypatch):
    """`systemctl(KillMode=...)`: what systemd says of the unit from now on."""
    program = tmp_path / "bin" / "systemctl"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\ncat {tmp_path}/shown\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)

    def shows(**changes):
        (tmp_path / "shown").write_text("".join(
            f"{name}={value}\n" for name, value in {**SHOWN, **changes}.items()))
    shows()
    return shows


@pytest.mark.parametrize("setting, level, right", [
    ({"KillMode": "control-group"}, "wrong", "KillMode=process"),
    ({"OOMPolicy": "stop"}, "wrong", "OOMPolicy=continue"),
    ({"TasksMax": "512"}, "note", "TasksMax=infinity"),
    ({"Delegate": "no"}, "note", "Delegate=yes")])
def test_settings_of_a_unit_that_would_harm_runs_are_told(setting, level, right, doctor, systemctl):
    if not ROOT:
        pytest.skip("the unit of a user has more to be wrong")
    assert [entry[:2] for entry in doctor()["unit"]] == [("ok", "roexec.service")]
    systemctl(**setting)
    (_, text, mend), = [entry for entry in doctor()["unit"] if entry[0] == level]
    assert f"write {right} into its section [Service]: systemctl edit roexec.service" in mend
    systemctl(**setting, LoadState="not-found")
    assert "unit" not in doctor()


def test_a_proxy_that_runs_as_the_owner_is_told(doctor, tmp_path):
    shutil.copy(shutil.which("sleep"), tmp_path / "nginx")
    proxy = subprocess.Popen([tmp_path / "nginx", "60"])
    try:
        wait_for(lambda: any("nginx (process" in text
                             for _, text, _ in doctor().get("owner", ())))
    finally:
        proxy.kill()
        proxy.wait()


def test_every_command_that_is_to_mend_something_exists(monkeypatch):
    with open(roexec.__file__) as file:
        section = file.read().partition("# What may be wrong.")[2].partition("\n# ==== ")[0]
    mends = re.findall(r'"roexec ([a-z -]+)', section)
    assert mends
    for mend in mends:
        assert roexec._split(shlex.split(mend))


# doctor --job.

def test_the_environment_of_a_job_is_compared_with_the_callers(cli, store, monkeypatch):
    monkeypatch.setenv("ONLY_HERE", "s3cret")
    monkeypatch.setenv("LANG", "C")
    apply(store, make_job(env={"A": "1", "PATH": "/opt/bin"}, umask="027",
                          env_from=[{"file": "/etc/db.env"}]))
    status, out, _ = cli("doctor --job x")
    assert status == 0 and "s3cret" not in out
    assert "umask      027\n" in out and "only the job has A=1\n" in out
    assert "PATH is /opt/bin for the job, and " in out
    assert "ONLY_HERE" in out and 'gives: {"file": "/etc/db.env"}' in out
    payload = json.loads(cli("doctor --job x --json")[1])
    assert payload["only_job"]["A"] == "1" and "ONLY_HERE" in payload["only_caller"]
    assert payload["different"]["PATH"]["job"] == "/opt/bin"


def test_what_doctor_says_a_job_gets_is_what_it_gets(cli, store, monkeypatch, tmp_path):
    monkeypatch.setenv("ONLY_HERE", "1")
    apply(store, make_job(f"env > {tmp_path}/env; pwd > {tmp_path}/pwd", env={"A": "1"},
                          directory=str(tmp_path)))
    assert cli("run x")[0] == 0
    got = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines())
    said = json.loads(cli("doctor --job x --json")[1])
    own = {name: value for name, value in got.items()
           if not name.startswith("ROEXEC_") and name not in ("PWD", "_", "SHLVL", "OLDPWD")}
    here = {name: os.environ[name] for name in own if name not in said["only_job"]}
    for name, values in said["different"].items():
        here[name] = values["job"]
    assert {**here, **said["only_job"]} == own
    assert (tmp_path / "pwd").read_text() == said["directory"] + "\n"
