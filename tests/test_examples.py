"""The examples: each is read as a user's file would be, and each job of theirs runs."""
import configparser
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import engines
import pytest
from helpers import tool, wait_for

import roexec

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
UTC = roexec.fixed_zone("UTC")


@pytest.fixture(scope="module")
def jobs():
    """The jobs of examples/jobs.yml by id."""
    path = EXAMPLES / "jobs.yml"
    found = roexec.read_job_file(path.read_text(encoding="utf-8"), str(path), str(EXAMPLES)).jobs
    return {job.id: job for job in found}


@pytest.fixture(scope="module")
def config():
    path = EXAMPLES / "config-local.yml"
    return roexec.read_config(path.read_text(encoding="utf-8"), str(path), str(EXAMPLES))


def test_the_examples_are_these():
    names = sorted(str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.*"))
    assert names == ["alerts-test.yml", "alerts.yml", "cluster/README.md", "cluster/etcd.yml",
                     "cluster/jobs.yml", "cluster/node.yml", "cluster/s3.conf", "cluster/start.py",
                     "config-local.yml", "docker/compose.yml", "github-actions.yml", "jobs.yml",
                     "pipeline.yml", "roexec.service"]


def test_the_jobs_are_those_of_the_readme(jobs):
    assert list(jobs) == ["hello", "backup-db", "web-check", "sync", "deploy"]


def test_hello_runs_within_a_minute(jobs):
    now = 1754042400.0
    assert roexec.next_slot(jobs["hello"], now, UTC) - now <= 60


def test_the_backup_says_what_its_comments_say(jobs):
    job = jobs["backup-db"]
    assert roexec.next_slot(job, 1754006400, UTC) == 1754013600     # 2025-08-01 00:00, 02:00
    assert job.env == {"DB_HOST": "db.internal", "DB_USER": "backup"}
    assert (job.timeout, job.retries, job.backoff.delay, job.grace) == (3600, 3, 30, 10)
    assert list(job.hooks) == ["on_failure"]


def test_the_other_schedules_are_what_their_comments_say(jobs):
    friday_noon = 1754049600                                        # 2025-08-01 12:00
    assert roexec.next_slot(jobs["web-check"], friday_noon, UTC) == friday_noon + 300
    assert roexec.next_slot(jobs["sync"], friday_noon, UTC) == friday_noon + 900
    friday_night = friday_noon + 12 * 3600
    assert roexec.next_slot(jobs["sync"], friday_night, UTC) == friday_night + 48 * 3600 + 900
    assert roexec.next_slot(jobs["deploy"], friday_noon, UTC) is None


def test_the_configuration_is_for_this_machine_alone(config):
    assert (config.server.host, config.server.port) == ("127.0.0.1", 8080)
    assert config.store.path == str(ROOT / "roexec-data")
    assert config.scheduler.max_concurrent == 10
    assert config.jobs == ()                # `apply` registers them: one id has one source
    assert roexec.effective(roexec.Job({"id": "a", "command": "x"}), config.defaults).retries == 2


def test_the_unit_restarts_the_server_and_no_run():
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str
    unit.read(EXAMPLES / "roexec.service", encoding="utf-8")
    service = dict(unit["Service"])
    expected = {"KillMode": "process", "Delegate": "yes", "DelegateSubgroup": "server",
                "Type": "notify", "WatchdogSec": "2min",
                "OOMPolicy": "continue", "TasksMax": "infinity"}
    assert {key: service.get(key) for key in expected} == expected
    assert (EXAMPLES / "roexec.service").read_text() == roexec.systemd_unit(
        service["ExecStart"].split(), service["User"])
    assert service["ExecStart"] == "/usr/bin/python3 -I /usr/local/bin/roexec server"


@pytest.fixture
def cli(tmp_path):
    """`cli(word, ...)` runs roexec as a process of its own, on a store of its own."""
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}

    def call(*words):
        return subprocess.run(
            [sys.executable, str(ROOT / "roexec.py"), "--store", str(tmp_path / "store"), *words],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    applied = call("apply", "-f", str(EXAMPLES / "jobs.yml"))
    assert applied.returncode == 0, applied.stderr
    return call


@pytest.mark.parametrize("job, options, output", [
    ("hello", ["--env", "KEY=VAL"], ["Hello", "from", "Roexec", "KEY is VAL"]),
    ("backup-db", [], ["dumping from db.internal as backup", "10240"]),
    ("sync", [], ["Jenkinsfile", "alerts-test.yml", "alerts.yml", "cluster", "config-local.yml",
                  "docker", "github-actions.yml", "jobs.yml", "pipeline.yml", "roexec.service"]),
])
def test_a_job_runs_anywhere(cli, job, options, output):
    run = cli("run", "--id", job, *options)
    assert (run.returncode, run.stdout.split("\n")[:-1]) == (0, output), run.stderr


@pytest.mark.skipif(not shutil.which("curl"), reason="the job skips itself where there is no curl")
def test_the_web_check_asks_its_address(cli, tmp_path):
    there = tmp_path / "there"
    there.write_text("there")
    assert cli("run", "--id", "web-check", "--env", f"URL=file://{there}").returncode == 0


def test_the_hooks_of_deploy_write_into_its_log(cli):
    run = cli("run", "--id", "deploy", "--env", "VERSION=1.4.2")
    assert (run.returncode, run.stdout.split("\n")[0]) == (0, "deploying"), run.stderr
    log = cli("logs", "deploy").stdout
    assert "version 1.4.2 is live" in log and "is not live" not in log
    assert re.search(r"that was run [a-z0-9]{10}\n", log)


# From elsewhere, with a token.

def scripts_of_github():
    """The scripts of the steps of the workflow, and the token's options that it wants."""
    text = (EXAMPLES / "github-actions.yml").read_text(encoding="utf-8")
    return [step["run"] for step in roexec.load_yaml(text)["jobs"]["deploy"]["steps"]], text


def scripts_of_jenkins():
    """As Groovy reads them."""
    text = (EXAMPLES / "Jenkinsfile").read_text(encoding="utf-8")
    script, = re.findall(r"sh '''\n(.*?)'''", text, re.S)
    return [script.replace("\\\n", "").replace("\\\\", "\\")], text


@pytest.fixture
def server(cli, tmp_path):
    """The address of a server of the store with the jobs."""
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "roexec.py"), "--store", str(tmp_path / "store"), "server",
             "--port", "0"], stderr=log, env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)})
    try:
        yield wait_for(lambda: re.search(r"http=(http\S+)", (tmp_path / "log").read_text()))[1]
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.parametrize("read", [scripts_of_github, scripts_of_jenkins])
def test_a_job_is_started_and_followed_from_a_pipeline(read, cli, server, tmp_path):
    scripts, text = read()
    line = re.search(r"roexec (token create .+)", text)[1]
    token = cli(*line.split()).stdout.strip()

    def perform(**more):
        """The exit status and the output of the scripts, each as a shell of its own runs it."""
        environment, output = {
            "PATH": os.path.dirname(tool("jq")) + ":" + os.environ["PATH"], "ROEXEC_URL": server,
            "ROEXEC_TOKEN": token, "GITHUB_ENV": str(tmp_path / "env"), "GITHUB_RUN_ID": "7",
            "GITHUB_REF_NAME": "v1.2", "BUILD_TAG": "b-7", "BUILD_NUMBER": "1.2", **more}, ""
        for script in scripts:
            done = subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, env=environment,
                                  capture_output=True, text=True, timeout=60)
            output += done.stdout + done.stderr
            if done.returncode:
                return done.returncode, output
            if (tmp_path / "env").exists():
                environment.update(row.split("=", 1) for row in
                                   (tmp_path / "env").read_text().splitlines())
        return 0, output

    tool("curl")
    status, output = perform()
    assert status == 0 and "deploying" in output, output
    assert perform()[0] == 0                        # tried again it starts no further run
    assert cli("list", "runs", "--job", "deploy", "--json").stdout.count('"trigger": "api"') == 1
    (tmp_path / "env").unlink(missing_ok=True)
    status, output = perform(ROEXEC_TOKEN="wrong", GITHUB_RUN_ID="8", BUILD_TAG="b-8")
    assert status != 0 and "401" in output


def test_the_pipeline_tests_each_python_and_packages_what_passed():
    path = EXAMPLES / "pipeline.yml"
    job, = roexec.read_job_file(path.read_text(encoding="utf-8"), str(path), str(EXAMPLES)).jobs
    steps = job.steps()
    pythons = [step for step in steps if step.startswith("python")]
    assert [*steps] == ["clone", *pythons, "package"] and "python3.9" in pythons
    assert all(steps[step].depends_on == {"clone": "succeeded"} for step in pythons)
    assert list(steps["package"].depends_on) == pythons
    assert len({steps[step].command for step in pythons}) == 1


# A cluster.

def test_the_configuration_of_a_node_is_one_of_a_cluster():
    path = EXAMPLES / "cluster/node.yml"
    node = roexec.read_config(path.read_text(encoding="utf-8"), str(path), "/")
    assert node.cluster.leader_election.tls and len(node.cluster.leader_election.endpoints) == 3
    assert node.store.type == "s3" and node.cluster.advertise == "https://node1.example.com:8080"


def start_cluster(*words, **more):
    """The process of the example, told by `words`, with `more` in its environment."""
    return subprocess.Popen(
        [sys.executable, str(EXAMPLES / "cluster/start.py"), *words], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={
            "PATH": os.environ["PATH"], "HOME": os.environ["HOME"], **more})


@pytest.mark.parametrize("words, more, sentence", [
    ([], {}, "There is no S3 server"),
    (["--endpoint", "http://127.0.0.1:9"], {"AWS_EC2_METADATA_DISABLED": "true", "HOME": "/"},
     "there are no credentials for S3"),
    (["--endpoint", "http://127.0.0.1:9"], {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"},
     "at http://127.0.0.1:9: Connection refused"),
])
def test_a_cluster_that_lacks_something_says_what(words, more, sentence, tmp_path):
    process = start_cluster(*words, "--folder", str(tmp_path / "all"), **more)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and sentence in said and "Traceback" not in said


def processes_of(folder):
    """The ids of processes that were started with a path in a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:                 # it has ended meanwhile
            continue
        if str(folder).encode() in words and path.parent.name != str(os.getpid()):
            found.append(int(path.parent.name))
    return found


@pytest.fixture
def cluster(tmp_path):
    """(process, port, folder, lines that it has printed) of the example, which runs."""
    tool("etcd", package="etcd-server")
    (tmp_path / "s3").mkdir()
    s3 = engines.start_s3(str(tmp_path / "s3"))
    port, folder, said = free_range(24), tmp_path / "all", tmp_path / "said"
    with open(said, "w") as file:
        process = subprocess.Popen(
            [sys.executable, str(EXAMPLES / "cluster/start.py"), "--endpoint", s3.endpoint,
             "--port", str(port), "--folder", str(folder)], stdout=file, stderr=file,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path),
                 "AWS_ACCESS_KEY_ID": s3.access, "AWS_SECRET_ACCESS_KEY": s3.secret})
    try:
        yield process, port, folder, said
    finally:
        process.terminate()
        process.wait(60)
        for pid in processes_of(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        s3.close()


def free_range(count):
    """The first of so many ports that nobody has."""
    while True:
        first, = engines.free_ports(1)
        if not any(map(engines.is_open, range(first, first + count))):
            return first


def runs_of(port, query=""):
    """The payloads of the runs that a node knows; none where it does not answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/runs{query}",
                                    timeout=5) as answer:
            return json.load(answer)["runs"]
    except OSError:
        return []


@pytest.mark.engine
def test_the_cluster_starts_with_one_command_survives_its_leader_and_ends_whole(cluster):
    process, port, folder, said = cluster
    named = re.compile(r"^[\d:]+ (\w) leads\n(?:.*\n)*?.*kill -9 (\d+)", re.M)
    first, pid = wait_for(lambda: named.search(said.read_text()), 60, said.read_text).groups()
    nodes = {name: port + number for number, name in enumerate("abc", 1)}
    wait_for(lambda: runs_of(nodes[first], "?state=succeeded"))
    assert f"{first}  http://127.0.0.1:{nodes[first]}/  process {pid}  leads" in said.read_text()
    os.kill(int(pid), signal.SIGKILL)
    second = wait_for(lambda: next((found[1] for found in named.finditer(said.read_text())
                                    if found[1] != first), None), 60, said.read_text)
    wait_for(lambda: f"{first} has ended" in said.read_text(), what=said.read_text)
    newest = wait_for(lambda: [run for run in runs_of(nodes[second])
                               if run["node"] == second and run["state"] == "succeeded"])
    assert newest[0]["job_id"] == "tick"
    runs = wait_for(lambda: runs_of(nodes[second]))
    slots = [run["slot"] for run in runs if run["state"] in ("succeeded", "lost")]
    assert len(slots) == len(set(slots)) and any(run["node"] == first for run in runs)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0, said.read_text()
    wait_for(lambda: not processes_of(folder), 60, lambda: str(processes_of(folder)))
