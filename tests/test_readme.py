"""The README: it names every command and every key, and what it shows can be meant."""
import os
import re
import shlex
import subprocess
import time
from pathlib import Path

import pytest
import reference
from helpers import make_job, perform, tool

import roexec

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BEFORE, REFERENCE, BEHIND = reference.split(README)
BLOCKS = [re.sub("^    ", "", block, flags=re.M).strip("\n")
          for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", README, re.M)]
NAMED = set(re.findall(r"[a-z]\w*", " ".join(re.findall(r"`([^`\n]+)`", BEFORE + BEHIND))))
LINES = [line for block in BLOCKS for line in block.splitlines()]
COMMANDS = [re.search(r"(?:^|\W)(roexec (?!=).*)", line)[1] for line in LINES
            if re.match(r"(id=\$\(|.* \| |sudo |TOKEN=\S+ )?roexec ", line)]


CURLS = [line for line in LINES if line.startswith("curl ")]


def tables():
    """The tables of keys of the configuration and of a job, by what they are called in messages."""
    records = {"a job": roexec.Job, "a step": roexec.Step, "a parameter": roexec.Param,
               "limits": roexec.Limits, "backoff": roexec.Backoff,
               "retry_on": roexec.RetryOn, "success": roexec.Success, "a hook": roexec.Hook,
               "the configuration": roexec.Config, "server": roexec._ServerSettings,
               "tls": roexec.TlsSettings, "auth": roexec.AuthSettings,
               "metrics": roexec.MetricsSettings, "mail": roexec.MailSettings,
               "vault": roexec.VaultSettings, "a source of env_from": roexec._EnvSource,
               "store": roexec._StoreSettings, "clustering": roexec.ClusterSettings,
               "tls of etcd": roexec._ClusterTls}
    return [(name, key) for name, record in records.items() for key in record.KEYS]


@pytest.mark.parametrize("name", [command.name for command in roexec.commands()])
def test_every_command_stands_in_an_example(name):
    assert any(roexec._split(words)[0].name == name
               for words in map(words_of, COMMANDS) if "--help" not in words)


@pytest.mark.parametrize("name, key", tables(), ids=" ".join)
def test_every_key_is_told(name, key):
    shown = {key for block in BLOCKS for key in re.findall(r"([a-z_]+):", block)}
    of_examples = ("the configuration", "server", "tls", "auth", "store", "clustering")
    assert key in NAMED | (shown if name in of_examples else set())


@pytest.mark.parametrize("hook", roexec.HOOKS)
def test_every_hook_is_told(hook):
    assert hook in NAMED


def words_of(line):
    """The words of a command line of the README, without what belongs to the shell."""
    line = re.sub(r"\$\w+", "x", line.rstrip(")"))
    words = shlex.split(line, comments=True)[1:]
    return words[:words.index(">")] if ">" in words else words


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_line_can_be_meant(line):
    words = words_of(line)
    if not {"--help", "--version"} & set(words):
        command, rest, behind = roexec._split(words)
        assert roexec._parse(command, rest, behind) is not None


def documents():
    return [block for block in BLOCKS if re.match(r"\w+:(\s|$)", block)]


@pytest.mark.parametrize("text", documents(), ids=lambda text: text.partition(":")[0])
def test_every_piece_of_a_file_is_accepted(text, tmp_path):
    if text.startswith("server:"):
        assert roexec.read_config(text, "config.yml", str(tmp_path))
    else:
        if not text.startswith(("jobs:", "pipeline:")):
            text = "job:\n  id: x\n  command: x\n" + re.sub("^(?=.)", "  ", text, flags=re.M)
        assert roexec.read_job_file(text, "jobs.yml", str(tmp_path)).jobs


def test_there_are_examples_of_all_kinds():
    assert len(COMMANDS) > 25
    assert [text.partition(":")[0] for text in documents()] == [
        "jobs", "params", "env_from", "hooks", "limits", "pipeline", "server", "server",
        "server", "server"]


def test_the_reference_of_commands_is_what_the_parser_knows():
    assert REFERENCE == reference.reference(roexec.commands(), roexec.COMMAND_GROUPS), \
        "write make reference"


def test_the_changes_name_every_command():
    changes = (Path(__file__).parent.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    for command in roexec.commands():
        name = command.name
        assert f"`{name.split()[0] if name.startswith(('list', 'token')) else name}`" in changes


# The calls of the HTTP API, as they are written.

@pytest.fixture
def called(store, clean):
    """`called(line)` -> what a call prints of a server that has the jobs and a run it speaks of."""
    root = Path(__file__).parent.parent
    jobs = roexec.read_job_file((root / "examples/jobs.yml").read_text(), "x", "/").jobs
    jobs.append(make_job("true", "deploy", overlap="queue"))
    owner = roexec.Caller(name="user me", scopes=("*",), owner=True)
    now = time.time()
    with store.write() as db:
        roexec.perform_apply(db, roexec.plan_apply(db, {"api": jobs}), now)
        roexec.set_settings(db, {"metrics": {"enabled": True}})
        tokens = {name: roexec.add_token(db, roexec.token_of(
            {"name": name, "role": "admin"}, owner, now, None), owner, now)
            for name in ("ci-token", "prometheus")}
    run = perform(store, "echo hello", job_id="hello")
    server = roexec.start_http(store, "127.0.0.1", 0, print)
    tool("curl")

    def call(line):
        line = line.replace(":8080", f":{server.address[1]}").replace(
            "curl ", f"curl -q -sS -f --noproxy '*' --max-time {2 if lasts(line) else 60} ", 1)
        token = tokens["prometheus" if "prometheus" in line else "ci-token"]
        return subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True, cwd=root,
                              env={**os.environ, "id": run["id"], "TOKEN": token})
    yield call
    server.close()


def lasts(line):
    """Whether the answer to a call ends only when curl has had enough."""
    return line.endswith("/events") or "follow" in line


def test_the_calls_of_the_api_work_as_they_are_written(called):
    assert len(CURLS) > 12
    for line in CURLS:
        done = called(line)
        assert done.returncode == (28 if lasts(line) else 0), (line, done.stderr)
        assert lasts(line) or done.stdout.strip(), line
