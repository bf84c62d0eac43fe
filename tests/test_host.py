"""How roexec stands on a host: what doctor finds, and what mends it."""
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import engines
import pytest
from helpers import apply, make_job, tool, wait_for

import roexec

pytestmark = pytest.mark.usefixtures("surroundings")
ROOT = os.geteuid() == 0
PYTHON = next((path for path in ("/usr/bin/python3", "/usr/local/bin/python3")
               if os.path.exists(path) and subprocess.run(
                   [path, "-c", "import sys, sqlite3; sys.exit(sys.version_info < (3, 9))"]
               ).returncode == 0), None)


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


@pytest.mark.skipif(not ROOT or PYTHON is None, reason="needs root, and a Python for everybody")
def test_a_store_that_one_may_not_open_is_one_finding(store, tmp_path):
    folder = tempfile.mkdtemp()
    try:
        os.chmod(folder, 0o755)
        program = shutil.copy(roexec.__file__, folder)
        roexec.Store(os.path.join(folder, "store")).create()
        done = subprocess.run([PYTHON, program, "--store", os.path.join(folder, "store"), "doctor"],
                              user=65534, capture_output=True, text=True, cwd="/")
    finally:
        shutil.rmtree(folder)
    told = [line for line in done.stdout.splitlines() if line.startswith("wrong")]
    assert done.returncode == 1 and len(told) == 1, done.stdout + done.stderr
    assert told[0].startswith("wrong  store") and "belongs to root; run as that user" in told[0]


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
    ({"command": None, "pipeline": [{"id": "a", "command": "true"},
                                    {"id": "b", "command": "/missing"}]},
     'step "b": there is no program /missing'),
])
def test_what_a_job_lacks_is_found_before_it_runs(spec, words, doctor, store):
    spec = {"command": "true", **spec}
    apply(store, roexec.Job({"id": "x", "directory": "/", **{
        key: value for key, value in spec.items() if value is not None}}))
    (about, text, mend), = wrong(doctor())
    assert about == "jobs" and text.startswith('job "x": ') and words in text
    assert mend == "roexec edit x"


def test_a_job_that_would_start_one_that_does_not_exist_is_told(doctor, store):
    apply(store, make_job(job_id="other"), make_job(hooks={"on_success": [{"run": "other"}]}))
    with store.write() as db:
        roexec.delete_jobs(db, ["other"], time.time())
    (about, text, mend), = wrong(doctor())
    assert (about, mend) == ("jobs", "roexec edit x") and 'runs the job "other"' in text


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
    port, = engines.free_ports(1)
    with socket.create_server(("127.0.0.1", port)):
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


def test_a_proxy_that_runs_as_the_owner_is_told(doctor):
    folder, proxies = tempfile.mkdtemp(), []

    def told():
        return any("nginx (process" in text for _, text, _ in doctor().get("owner", ()))
    try:
        os.chmod(folder, 0o755)
        program = shutil.copy(shutil.which("sleep"), os.path.join(folder, "nginx"))
        proxies.append(subprocess.Popen([program, "600"]))
        wait_for(told)
        if ROOT:                        # its workers are who forwards, and they are another user's
            proxies.append(subprocess.Popen([program, "600"], user=65534))
            wait_for(lambda: not told())
    finally:
        for proxy in proxies:
            proxy.kill()
            proxy.wait()
        shutil.rmtree(folder)


def test_tokens_that_never_expire_or_have_expired_are_told(doctor, store, cli):
    assert "tokens" not in doctor()
    for name, options in [("a", ""), ("b", "--expires 30d"), ("c", "--expires 1h")]:
        assert cli(f"token create --name {name} --role viewer {options}")[0] == 0
    with store.write() as db:
        db.execute("UPDATE tokens SET expires_at = 1 WHERE name = 'c'")
    (_, never, mend), (_, expired, remove), (_, count, _) = doctor()["tokens"]
    assert never.startswith("a never expires, and may ") and mend.endswith("token revoke a")
    assert (expired, remove, count) == ("c has expired", "roexec token revoke c", "3 in all")


def test_a_server_that_is_in_trouble_says_so(doctor, store, monkeypatch):
    monkeypatch.setattr(roexec.Store, "server", lambda self: os.getpid())
    monkeypatch.setattr(roexec.Store, "trouble", lambda self: "the launcher does not answer")
    assert ("server", f"process {os.getpid()}: the launcher does not answer", None) in wrong(
        doctor())


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


# init.

def test_init_writes_what_a_server_can_be_started_with_and_never_overwrites(cli, tmp_path):
    folder = tmp_path / "etc" / "roexec"
    assert cli(f"init {folder} --dry-run")[1] == (
        f"write {folder}/config.yml (dry run)\nwrite {folder}/jobs.yml (dry run)\n")
    assert not folder.exists()
    assert cli(f"init {folder}")[1] == f"write {folder}/config.yml\nwrite {folder}/jobs.yml\n"
    status, out, err = cli(f"server --config {folder}/config.yml --dry-run")
    assert (status, err) == (0, "") and "(dry run)" in out
    (folder / "jobs.yml").write_text("jobs: []\n")
    status, out, err = cli(f"init {folder}")
    assert (status, out) == (0, "") and "are there already" in err
    assert (folder / "jobs.yml").read_text() == "jobs: []\n"


def uncommented(text, indent):
    """A template with what is commented out in it; prose begins with a capital letter."""
    return re.sub(rf"^{indent}# (?=[ a-z-])", indent, text, flags=re.M)


def test_what_the_templates_show_can_be_said():
    config = roexec.read_config(uncommented(roexec.CONFIG_TEMPLATE, ""), "config.yml", "/etc")
    assert config.mail and config.vault and config.scheduler.max_concurrent == 10
    assert config.jobs == ("/etc/jobs.yml",)
    file = roexec.read_job_file(uncommented(roexec.JOBS_TEMPLATE, "  "), "jobs.yml", "/etc")
    assert [job.id for job in file.jobs] == ["hello", "backup-db"] and not file.warnings
    only, = roexec.read_job_file(roexec.JOBS_TEMPLATE, "jobs.yml", "/etc").jobs
    assert only.schedule == ()          # nothing begins to run because somebody wrote a file


# install, on a host of which everything that is written is a copy.

PREPARE = """
for folder in /etc /usr/local/bin; do
    mkdir -p {root}$folder; cp -a $folder/. {root}$folder; mount --bind {root}$folder $folder
done
mount -t tmpfs tmpfs /var/lib; mount -t tmpfs tmpfs /run
[ {manager} != systemd ] || mkdir -p /run/systemd/system
export PATH={stubs}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
alias install='{python} {source} install' roexec='{python} -I /usr/local/bin/roexec'
set -e
"""
STUBS = {
    "systemd": {"systemctl": 'echo "systemctl $*" >>{root}/asked'},
    "openrc": {name: f'echo "{name} $*" >>{{root}}/asked'
               for name in ("openrc-run", "rc-update", "rc-service")},
    "crontab": {"crontab": '[ "$1" = -u ]; shift 2; if [ "$1" = -l ]; then cat {root}/table; '
                           "else cat >{root}/table; fi"},
}


@pytest.fixture
def host(tmp_path):
    """`host(manager, script)` performs a script of a shell, in which `install` is the command."""
    if not ROOT or PYTHON is None:
        pytest.skip("needs root, and a Python that everybody can run")
    if subprocess.run(["unshare", "-mpnf", "true"], capture_output=True).returncode:
        pytest.skip("no mounts can be made here")

    def perform(manager, script, source=roexec.__file__):
        stubs = tmp_path / manager
        stubs.mkdir(exist_ok=True)
        for name, text in STUBS[manager].items():
            (stubs / name).write_text("#!/bin/sh\n" + text.format(root=tmp_path) + "\n")
            (stubs / name).chmod(0o755)
        prepare = PREPARE.format(root=tmp_path, manager=manager, stubs=stubs, python=PYTHON,
                                 source=source)
        # PID 1 is no shell: a server below one takes the host for a container. The network is its
        # own, too, as its server has the usual port; SIOCSIFFLAGS brings lo up (netdevice(7)).
        first = ("import fcntl, socket, struct, subprocess, sys; fcntl.ioctl(socket.socket(), 0x8914, "
                 "struct.pack('16sH14x', b'lo', 1)); sys.exit(subprocess.call(sys.argv[1:]))")
        done = subprocess.run(
            ["unshare", "-mpnf", "--kill-child", "--mount-proc", "--propagation", "private",
             PYTHON, "-c", first, "sh", "-c", prepare + script],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()
    return perform


def test_install_puts_program_user_store_configuration_and_unit_into_place(host, tmp_path):
    said = host("systemd", """
        install --dry-run; ls /usr/local/bin/roexec /var/lib/roexec 2>&1 | grep -c 'No such' || true
        install
        stat -c '%U %a %n' /var/lib/roexec /usr/local/bin/roexec /etc/roexec/jobs.yml
        roexec --version; getent passwd roexec | cut -d: -f6-
        cat /etc/systemd/system/roexec.service >{root}/unit
        echo again; install; install --json
    """.replace("{root}", str(tmp_path)))
    steps = ["write /usr/local/bin/roexec",
             "useradd --system --user-group --no-create-home --home-dir /var/lib/roexec --shell "
             "/usr/sbin/nologin roexec",
             "make the folder /var/lib/roexec for roexec",
             "write /etc/roexec/config.yml", "write /etc/roexec/jobs.yml",
             "write /etc/systemd/system/roexec.service", "systemctl daemon-reload",
             "systemctl enable roexec", "systemctl restart roexec"]
    again = ["systemctl enable roexec", "systemctl start roexec"]
    assert said[:len(steps)] == [f"{step} (dry run)" for step in steps] and said[9] == "2"
    assert said[10:19] == steps
    assert said[19:24] == ["roexec 700 /var/lib/roexec", "root 755 /usr/local/bin/roexec",
                           "root 644 /etc/roexec/jobs.yml", f"roexec {roexec.__version__}",
                           "/var/lib/roexec:/usr/sbin/nologin"]
    assert said[24:27] == ["again", *again]
    assert json.loads("".join(said[27:])) == {"steps": again, "dry_run": False}
    assert (tmp_path / "asked").read_text().splitlines() == [*steps[6:], *again, *again]
    assert (tmp_path / "unit").read_text() == roexec.systemd_unit(
        [PYTHON, "-I", "/usr/local/bin/roexec", "server"], "roexec")


def test_install_leaves_a_unit_alone_that_somebody_has_written(host, tmp_path):
    said = host("systemd", """
        mkdir -p /etc/systemd/system; echo mine >/etc/systemd/system/roexec.service
        install --as root; cat /etc/systemd/system/roexec.service; stat -c %U /var/lib/roexec
    """)
    assert said[-2:] == ["mine", "root"] and not [line for line in said if "useradd" in line]


def test_uninstall_leaves_history_and_jobs_and_says_so(host, tmp_path):
    said = host("systemd", f"""
        install >/dev/null; roexec uninstall --dry-run; roexec uninstall 2>{tmp_path}/err
        ls -d /usr/local/bin/roexec /etc/systemd/system/roexec.service /var/lib/roexec 2>&1 || true
        {PYTHON} {roexec.__file__} uninstall 2>&1 | head -1
    """)
    steps = ["systemctl disable --now roexec", "remove /etc/systemd/system/roexec.service",
             "systemctl daemon-reload", "remove /usr/local/bin/roexec"]
    assert said[:8] == [f"{step} (dry run)" for step in steps] + steps
    assert said[8:] == [
        "ls: cannot access '/usr/local/bin/roexec': No such file or directory",
        "ls: cannot access '/etc/systemd/system/roexec.service': No such file or directory",
        "/var/lib/roexec", "roexec: it is not installed"]
    assert (tmp_path / "err").read_text().splitlines() == [
        f"roexec: what is left can be removed by: {command}"
        for command in ("rm -r /var/lib/roexec", "rm -r /etc/roexec", "userdel roexec")]


def test_openrc_gets_a_script_that_a_shell_understands(host, tmp_path):
    said = host("openrc", """
        install; sh -n /etc/init.d/roexec; stat -c %a /etc/init.d/roexec
        grep command /etc/init.d/roexec; roexec uninstall
    """)
    assert said[5:9] == ["write /etc/init.d/roexec", "rc-update add roexec default",
                         "rc-service roexec restart", "755"]
    assert said[9:12] == [f"command={PYTHON}", 'command_args="-I /usr/local/bin/roexec server"',
                          "command_user=roexec"]
    assert said[-4:] == ["rc-service roexec stop", "rc-update del roexec default",
                         "remove /etc/init.d/roexec", "remove /usr/local/bin/roexec"]


def test_what_would_not_work_is_refused_before_anything_is_written(host, tmp_path):
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    said = host("systemd", f"""
        cp {PYTHON} {private}/python3
        {private}/python3 {roexec.__file__} install 2>&1 || echo $?
        mkdir /var/lib/roexec; chown nobody /var/lib/roexec; install --as root 2>&1 || echo $?
        ls /usr/local/bin/roexec 2>&1 || true
    """)
    assert "roexec cannot run" in said[0] and "is private" in said[0] and said[1] == "1"
    assert "belongs to nobody" in said[2] and said[3] == "1"
    assert "No such file" in said[4]


def test_without_root_only_an_installation_for_oneself_is_possible(cli, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    status, _, err = cli("install", store=None)
    assert status == 1 and "write it with sudo, or with --user" in err


def test_an_installation_for_oneself_touches_nothing_of_the_host(host, tmp_path):
    said = host("systemd", f"""
        HOME={tmp_path}/home; mkdir $HOME
        install --user; cat $HOME/.config/systemd/user/roexec.service
        {PYTHON} $HOME/.local/bin/roexec uninstall --user
    """)
    home = tmp_path / "home"
    assert said[:5] == [f"write {home}/.local/bin/roexec",
                        f"make the folder {home}/.local/state/roexec for root",
                        f"write {home}/.config/roexec/config.yml",
                        f"write {home}/.config/roexec/jobs.yml",
                        f"write {home}/.config/systemd/user/roexec.service"]
    assert said[5:9] == ["systemctl --user daemon-reload", "loginctl enable-linger",
                         "systemctl --user enable roexec", "systemctl --user restart roexec"]
    assert "WantedBy=default.target" in said and "StateDirectory=roexec" not in said
    assert said[-1] == f"remove {home}/.local/bin/roexec"


# Upgrades, by archives of different versions.

@pytest.fixture
def build(tmp_path):
    """`build(version, migration)` -> the path of an archive of that version, perhaps with a newer
    store."""
    root = Path(roexec.__file__).parent

    def make(version, migration=None):
        tree = tmp_path / version
        tree.mkdir()
        source = (root / "roexec.py").read_text(encoding="utf-8").replace(
            f'__version__ = "{roexec.__version__}"', f'__version__ = "{version}"')
        if migration:
            source = source.replace("\n_PATIENCE = ", f"\n_MIGRATIONS.append({migration!r})\n"
                                    "_PATIENCE = ", 1)
        (tree / "roexec.py").write_text(source, encoding="utf-8")
        shutil.copy(root / "LICENSE", tree)
        shutil.copytree(root / "zipapp", tree / "zipapp")
        subprocess.run([sys.executable, tree / "zipapp" / "build.py", PYTHON],
                       check=True, capture_output=True)
        return tree / "dist" / "roexec.pyz"
    return make


def test_an_upgrade_disturbs_no_run_and_a_downgrade_is_refused_in_words(host, build, tmp_path):
    first, second = build("9.1.0"), build("9.2.0", "CREATE TABLE later (x)")
    said = host("crontab", f"""
        install >/dev/null; cat {tmp_path}/table
        cd /; roexec add long -- sh -c \
            'echo $$ >/run/pid; until [ -e /run/end ]; do sleep 0.1; done; echo end'
        run=$(roexec run long --detach); until [ -s /run/pid ]; do sleep 0.1; done
        server=$(roexec status | sed -n 's/process *//p')
        {PYTHON} {second} install --dry-run; {PYTHON} {second} install 2>&1; roexec --version
        [ "$server" != "$(roexec status | sed -n 's/process *//p')" ] && echo another server
        kill -0 $(cat /run/pid) && echo the run is on
        touch /run/end; roexec wait $run; echo "status $?"; roexec logs $run --stream out
        install 2>&1 || echo "status $?"
        roexec --version; roexec list jobs | tail -1 | cut -c1-4
        stat -c %U /var/lib/roexec/* | sort -u; roexec uninstall | tail -3; cat {tmp_path}/table
    """, source=first)
    line = f"@reboot exec {PYTHON} -I /usr/local/bin/roexec server >>/var/lib/roexec/server.log 2>&1"
    assert said[:2] == [line, "long: added"]
    steps = ["write /usr/local/bin/roexec", re.match("end the server [(]process [0-9]+[)]",
                                                     said[3])[0], "start a server as roexec"]
    assert said[2:8] == [f"{step} (dry run)" for step in steps] + steps
    assert said[8:14] == ["roexec: the server runs as roexec on /var/lib/roexec; its jobs are in "
                          "/etc/roexec/jobs.yml", "roexec 9.2.0", "another server",
                          "the run is on", "status 0", "end"]
    assert said[14:19] == ["roexec: the store /var/lib/roexec was made by a newer roexec (its "
                           "version is 2, this one knows 1); use that one", "status 1",
                           "roexec 9.2.0", "long", "roexec"]
    assert said[19] == "write the crontab of roexec" and said[21:] == [
        "remove /usr/local/bin/roexec"]


# A container, of which everything but the container engine is real: the steps of the Dockerfile in
# a root tree, its entry point as PID 1, the command line of the compose file, health and exec.

DOCKER = Path(roexec.__file__).parent / "examples" / "docker"
TREE = """
set -e
mkdir -p {tree}/usr/local/bin {tree}/proc {tree}/dev {tree}/tmp {tree}/run {tree}/var/lib {tree}/etc
for folder in /usr /dev; do mount --rbind $folder {tree}$folder; done
mount -t tmpfs tmpfs {tree}/usr/local
mkdir {tree}/usr/local/bin
for name in bin sbin lib lib64; do [ ! -L /$name ] || cp -P /$name {tree}/; done
cp /etc/passwd /etc/group /etc/ld.so.cache {tree}/etc/
cp {program} {tree}/usr/local/bin/roexec
mount -t proc proc {tree}/proc
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
chroot {tree} /bin/sh -ec {steps}
mount --bind {data} {tree}/data
exec chroot {tree} {command}
"""


def instructions(name):
    """What the Dockerfile says behind the instructions of a name."""
    return re.findall(rf"^{name} +(.*)$", (DOCKER / "Dockerfile").read_text(), re.M)


class Container:
    """What `docker run` makes of the image, with `data` as the volume."""

    def __init__(self, tmp_path, program, command, before=()):
        data, log = tmp_path / "data", tmp_path / "log"
        tree = tempfile.mkdtemp(prefix="tree", dir=tmp_path)
        data.mkdir(exist_ok=True)
        words = [*before, *json.loads(instructions("ENTRYPOINT")[0]), *shlex.split(command)]
        script = TREE.format(tree=tree, program=program, data=data,
                             steps=shlex.quote("\n".join(instructions("RUN"))),
                             command=shlex.join(words))
        self.log, file = log, open(log, "a")
        with file:
            self.process = subprocess.Popen(
                ["unshare", "-mpnf", "--kill-child", "--propagation", "private", "sh", "-c",
                 script], stdin=subprocess.DEVNULL, stdout=file, stderr=file)

    def exec(self, *words):
        """docker exec -> CompletedProcess."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return subprocess.run(["nsenter", "-t", children.read_text().strip(), "-m", "-p", "-n", "-r",
                               "-w", *words], capture_output=True, text=True, timeout=60)

    def stop(self):
        """docker stop -> (exit status, seconds); that kills after ten of them, where time passes as
        it should."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        begin = time.monotonic()
        os.kill(int(children.read_text()), signal.SIGTERM)
        return self.process.wait(100), time.monotonic() - begin

    def is_healthy(self):
        command, = re.findall("^HEALTHCHECK .*?CMD (.*)$", (DOCKER / "Dockerfile").read_text(),
                              re.M)
        return self.exec("/bin/sh", "-c", command).returncode == 0


@pytest.fixture
def container(host, build, tmp_path):
    """`container(command, before)` -> a Container; all of them are ended afterwards."""
    program, started = build(roexec.__version__), []
    program.chmod(0o755)

    def run(command, before=()):
        started.append(Container(tmp_path, program, command, before))
        return started[-1]
    yield run
    for one in started:
        one.process.kill()
        one.process.wait()


COMPOSED = roexec.load_yaml((DOCKER / "compose.yml").read_text())["services"]["roexec"]


def states_of_processes(container):
    """The states of the processes in a container."""
    shown = container.exec("/bin/sh", "-c", "cat /proc/[0-9]*/stat").stdout
    return [line.rpartition(") ")[2][0] for line in shown.splitlines()]


def test_the_compose_file_is_about_the_image_and_its_volume():
    assert COMPOSED["command"] == "server --config /data/config.yml"
    assert [volume.split(":")[1] for volume in COMPOSED["volumes"]] == instructions("VOLUME")
    assert [port.rpartition(":")[2] for port in COMPOSED["ports"]] == instructions("EXPOSE")


@pytest.mark.parametrize("before", [
    (), pytest.param(["/usr/bin/tini", "--"], marks=pytest.mark.engine)], ids=["PID 1", "tini"])
def test_a_container_serves_keeps_its_data_and_ends_in_time(before, container, tmp_path):
    if before:
        tool("tini")
    data = tmp_path / "data"
    assert container("init /data").process.wait(60) == 0
    (data / "jobs.yml").write_text(
        "jobs:\n  - {id: stubborn, grace: 1h, command: \"trap '' TERM; echo $$ >/data/pid; while :; do "
        "sleep 0.1; done\"}\n  - {id: often, schedule: '@every 1s', command: echo hi}\n")
    one = container(COMPOSED["command"], before)
    wait_for(lambda: "Server started" in one.log.read_text(), what=one.log.read_text)
    assert "http=http://0.0.0.0:8080" in one.log.read_text()
    wait_for(one.is_healthy, what=one.log.read_text)
    assert len(data.joinpath("admin-token").read_text().strip()) > 20
    assert one.exec("roexec", "run", "stubborn", "--detach").returncode == 0
    # What docker exec leaves behind becomes PID 1's.
    one.exec("/bin/sh", "-c", "(sleep 0.3 &) ; (sleep 0.3 &)")
    wait_for(lambda: "completed, exit=0, job=often" in one.log.read_text())
    wait_for(lambda: (data / "pid").exists())
    wait_for(lambda: "Z" not in states_of_processes(one))
    status, seconds = one.stop()
    assert status == 0 and 4 < seconds < 60, one.log.read_text()     # and not an hour
    again = container(COMPOSED["command"], before)
    wait_for(again.is_healthy, what=again.log.read_text)
    runs = json.loads(again.exec("roexec", "list", "runs", "--job", "stubborn", "--json").stdout)
    ended, = [(run["state"], run["reason"]) for run in runs["runs"]]
    late = seconds > roexec._LAST_GRACE + 2         # then it waits for nobody any more
    assert ended == ("cancelled", "shutdown") or late and ended[0] == "lost"
    assert again.stop()[0] == 0
    assert (data / "roexec.db").exists() and not list(data.glob("active/*"))


# completion.

@pytest.fixture
def shell(cli, store, tmp_path, monkeypatch):
    """`shell(name)` -> the script of that shell, on a host where `roexec` has two jobs and a run."""
    apply(store, make_job(job_id="backup-db"), make_job(job_id="hello"))
    with store.write() as db:
        roexec.add_run(db, id="run4567890", job_id="hello", trigger="manual", state="queued",
                       queued_at=time.time())
    program = tmp_path / "bin" / "roexec"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {roexec.__file__} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setenv("ROEXEC_STORE", store.path)
    (tmp_path / "jobs.yml").touch()

    def make(name):
        path = tmp_path / f"completion.{name}"
        path.write_text(cli(f"completion {name}")[1])
        return path
    return make


COMPLETED = [
    ("roexec canc", ["cancel"]),
    ("roexec li", ["list"]),
    ("roexec list ", ["jobs", "runs"]),
    ("roexec list runs --act", ["--active"]),
    ("roexec list runs --job ", ["backup-db", "hello"]),
    ("roexec list runs --state succ", ["succeeded"]),
    ("roexec pause ba", ["backup-db"]),
    ("roexec run --id h", ["hello"]),
    ("roexec logs ", ["backup-db", "export", "hello", "latest", "run4567890"]),
    ("roexec logs --stream ", ["err", "out"]),
    ("roexec apply -f jo", ["jobs.yml"]),
    ("roexec completion z", ["zsh"]),
    ("roexec --verbose sho", ["show"]),
]


@pytest.mark.parametrize("line, expected", COMPLETED)
def test_bash_completes_commands_options_and_ids(line, expected, shell):
    words = line.split(" ")
    script = (f"source {shell('bash')}; COMP_WORDS=({' '.join(map(shlex.quote, words))}); "
              f'COMP_CWORD={len(words) - 1}; _roexec; printf "%s\\n" "${{COMPREPLY[@]}}"')
    done = subprocess.run(["bash", "-uc", script], capture_output=True, text=True)
    assert (sorted(done.stdout.split()), done.stderr) == (expected, "")


def test_the_store_that_was_typed_is_asked(shell, tmp_path, cli):
    other = str(tmp_path / "other")
    assert cli("add elsewhere -- true", store=other)[0] == 0
    script = (f"source {shell('bash')}; COMP_WORDS=(roexec --store {other} pause e); COMP_CWORD=4; "
              '_roexec; echo "${COMPREPLY[@]}"')
    assert subprocess.run(["bash", "-c", script], capture_output=True).stdout == b"elsewhere\n"


@pytest.mark.engine
@pytest.mark.parametrize("line, expected", COMPLETED)
def test_fish_completes_commands_options_and_ids(line, expected, shell):
    script = f"source {shell('fish')}; complete -C {shlex.quote(line)}"
    done = subprocess.run([tool("fish"), "--no-config", "-c", script], capture_output=True,
                          text=True)
    assert (sorted(row.split("\t")[0] for row in done.stdout.splitlines()), done.stderr) == (
        expected, "")


@pytest.mark.engine
def test_zsh_completes_commands_options_and_ids(shell):
    path = shell("zsh")
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="dumb", PS1="> ")
        os.execv(tool("zsh"), ["zsh", "-f", "-i"])
    try:
        seen = ""

        def types(text, until):
            nonlocal seen
            os.write(terminal, text.encode())
            seen = ""
            deadline = time.monotonic() + 60
            while until not in seen:
                assert time.monotonic() < deadline, seen
                if select.select([terminal], [], [], 0.1)[0]:
                    seen += os.read(terminal, 4096).decode(errors="replace")
        types(f"source {path}; echo re''ady\n", "ready")
        for line, expected in COMPLETED:
            if len(expected) == 1:
                word = line.rpartition(" ")[2]
                types(f"{line}\t", expected[0][len(word):])
                types("\x15", "")                # forget the line
        types("roexec list \t\t", "jobs")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)


@pytest.mark.parametrize("line", ["completion", "completion tcsh", "completion bash zsh"])
def test_a_shell_that_is_not_known_is_wrong_usage(line, cli):
    status, _, err = cli(line)
    assert status == 2 and "roexec completion bash | zsh | fish" in err


# More than one machine.

def found_of(check, store, settings):
    """[(level, text)] of a check with a configuration."""
    config = roexec.read_config(json.dumps(settings), "config.yml", "/")
    return [(found.level, found.text) for found in roexec.examine(
        store, config, {"x": check})]


def test_without_a_bucket_and_without_a_cluster_there_is_nothing_to_be_looked_at(store):
    assert found_of(roexec._check_bucket, store, {}) == []
    assert found_of(roexec._check_etcd, store, {}) == []


@pytest.mark.engine
def test_doctor_looks_at_each_member_of_etcd(store, tmp_path):
    dead, = engines.free_ports(1)
    with engines.Etcd(str(tmp_path)) as etcd:
        found = found_of(roexec._check_etcd, store, {
            "store": {"type": "s3", "bucket": "runs"},
            "clustering": {"leader_election": f"{etcd.url},127.0.0.1:{dead}"}})
    place = etcd.url.partition("//")[2]
    assert found[0][0] == "ok" and re.fullmatch(rf"{place} is [\d.]+, the leader", found[0][1])
    assert found[1][0] == "wrong" and f"127.0.0.1:{dead}" in found[1][1] and len(found) == 2


@pytest.mark.parametrize("version, level", [
    ("3.3.27", "wrong"), ("3.4.0", "ok"), ("3.5.2", "note"), ("3.5.5", "note"), ("3.5.6", "ok"),
    ("3.6.0-rc.1", "ok"),
])
@pytest.mark.parametrize("ahead, clock", [(0.0, None), (-1.5, "note"), (2.1, "wrong")])
def test_doctor_knows_which_etcd_is_to_be_trusted_and_which_clock(store, monkeypatch, version,
                                                                  level, ahead, clock):
    class Client:
        def __init__(self, *_):
            self.close = lambda: None

        def status(self):
            return [{"endpoint": "h:1", "version": version, "leads": False, "error": None}]

        def offset(self):
            return ahead
    monkeypatch.setattr(roexec, "EtcdClient", Client)
    found = found_of(roexec._check_etcd, store, {
        "store": {"type": "s3", "bucket": "runs"}, "clustering": {"leader_election": "etcd://h:1"}})
    assert [each[0] for each in found] == [level] + [clock] * (clock is not None)


@pytest.mark.parametrize("server, cluster, is_told", [
    ({}, {"leader_election": "etcd://h1,h2,h3"}, True),
    ({"host": "0.0.0.0"}, {"leader_election": "etcd://127.0.0.1,h2"}, True),
    ({"host": "0.0.0.0"}, {"leader_election": "etcd://h1", "advertise": "http://me:8080"}, False),
    ({"host": "10.0.0.5"}, {"leader_election": "etcd://h1"}, False),
    ({}, {"leader_election": "etcd://localhost:2379,[::1]:2379"}, False),
    ({}, {"leader_election": "etcd://h1", "enabled": False}, False),
])
def test_a_node_that_others_cannot_reach_is_told_so(store, server, cluster, is_told):
    settings = {"server": server, "store": {"type": "s3", "bucket": "runs"}, "clustering": cluster}
    found = found_of(roexec._check_cluster, store, settings)
    assert [level for level, _ in found] == ["wrong"] * is_told
    assert not is_told or "advertise: URL" in found[0][1]
    config = roexec.read_config(json.dumps(settings), "config.yml", "/")
    about = [warning.about for warning in roexec.status_warnings(store, config)]
    assert ("cluster" in about) == is_told


def test_doctor_tells_its_own_lack_of_credentials_from_that_of_the_server(store, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", store.folder)
    settings = {"store": {"type": "s3", "bucket": "runs"}}
    (level, text), = found_of(roexec._check_bucket, store, settings)
    assert level == "wrong" and text.startswith("there are no credentials for S3; set ")
    lock = roexec.hold_server_lock(store)
    try:
        (level, text), = found_of(roexec._check_bucket, store, settings)
    finally:
        os.close(lock)
    assert level == "note" and text.endswith("; the server of this store may have others than "
                                             "this command")
