"""Job files and configurations: what is accepted, what it becomes, and every error in its place."""
import json

import pytest

import roexec
from roexec import Config, Hook, Invalid, Job, job_from_mapping, read_config, read_job_file


def jobs_of(text, **options):
    return read_job_file(text, "jobs.yml", "/srv/jobs", **options).jobs


def job_of(lines, **options):
    """The job of `lines` below a job that has an id and a command."""
    text = "job:\n  id: a\n  command: x\n" + "".join(f"  {line}\n" for line in lines.splitlines())
    return jobs_of(text, **options)[0]


def problems_of(text, **options):
    with pytest.raises(Invalid) as caught:
        read_job_file(text, "jobs.yml", "/srv/jobs", **options)
    return [str(problem) for problem in caught.value.problems]


def problem_of(line, **options):
    """The only problem of `line` as line 4 of a job that is otherwise right, without its file."""
    problems = problems_of(f"job:\n  id: a\n  command: x\n  {line}\n", **options)
    assert len(problems) == 1, problems
    return problems[0].replace("jobs.yml:", "", 1)


def config_problems(text):
    with pytest.raises(Invalid) as caught:
        read_config(text, "config.yml", "/etc/roexec")
    return [str(problem) for problem in caught.value.problems]


# Shapes of a file.

ONE = "{id: a, command: x}"


@pytest.mark.parametrize("text", [
    f"jobs: [{ONE}]",
    "jobs: {a: {command: x}}",
    "jobs: {a: {id: a, command: x}}",
    f"job: {ONE}",
    f"[{ONE}]",
    f"[{{job: {ONE}}}]",
    f"- defaults: {{}}\n- jobs:\n  - {ONE}\n",
    f"defaults:\njobs: [{ONE}]",
    json.dumps({"jobs": [{"id": "a", "command": "x"}]}, indent=2),
])
def test_every_shape_of_a_file_gives_the_same_job(text):
    assert [job.spec for job in jobs_of(text)] == [
        {"id": "a", "command": "x", "directory": "/srv/jobs"}]


@pytest.mark.parametrize("text", ["jobs: []", "jobs: {}", "defaults: {retries: 1}\njobs: []"])
def test_a_file_can_say_that_there_are_no_jobs(text):
    assert jobs_of(text) == []


@pytest.mark.parametrize("text, expected", [
    ("", "the file is empty; for no jobs write jobs: []"),
    ("# nothing\n", "the file is empty; for no jobs write jobs: []"),
    ("jobs:\n", "jobs is a list, or a mapping of ids to jobs; for none write jobs: []"),
    ("jobs: echo\n", "jobs is a list, or a mapping of ids to jobs; for none write jobs: []"),
    ("{}", "there are no jobs; write them below jobs:"),
    ("[]", "a list is no job file; begin with jobs:"),
    ("hello", '"hello" is no job file; begin with jobs:'),
    ("[1, 2]", "a list is no job file; begin with jobs:"),
    ("id: a\ncommand: x\n", "this looks like a job; put it below job:, or into a list below jobs:"),
    ("job: [x]", "a list is no job; write id:, command: and so on"),
    ("jobs: {a: echo hi}", '"echo hi" is no job; write id:, command: and so on'),
    ("jobs: [echo hi]", '"echo hi" is no job; write id:, command: and so on'),
    ("jbos: []", 'unknown key "jbos" in a job file; did you mean "jobs"?'),
    (f"jobs: [{ONE}]\nx: 1",
     'unknown key "x" in a job file; it may have jobs, job, pipeline, defaults'),
    (f"jobs: [{ONE}]\njob: {ONE}",
     'a file has one of jobs, job and pipeline, and "jobs" stands before this'),
    (f"- job: {ONE}\n- job: {ONE}", '"job" is written a second time'),
    ("id: a\npipeline: [{command: x}]",
     "pipeline: a step needs an id; write for example id: build"),
    ("jobs: {a: {id: b, command: x}}", 'id: "b" stands below the id "a"; remove one'),
])
def test_a_file_of_another_shape_is_refused_with_what_to_write(text, expected):
    problem, = problems_of(text)
    assert problem.split(": ", 1)[1] == expected


def test_an_error_of_the_yaml_reader_has_its_position_and_the_name_of_the_file():
    problem, = problems_of("jobs:\n  - id: [\n")
    assert problem.startswith("jobs.yml:")
    assert int(problem.split(":")[1]) in (2, 3)


def test_one_id_twice_is_an_error_that_names_both_lines():
    text = "jobs:\n- {id: a, command: x}\n- {id: b, command: x}\n- command: y\n  id: a\n"
    assert problems_of(text) == ['jobs.yml:5:7: id: "a" is taken by the job in line 2']


def test_all_problems_of_a_file_are_reported_in_order_each_where_it_stands():
    text = """\
defaults:
  schedule: "@daily"
  timeout: 5 minutes
jobs:
  - id: a
    comand: x
    retries: -1
  - command: [sleep, "1"]
    id: a
    env:
      GOOD: 1
      ROEXEC_X: 1
"""
    assert problems_of(text) == [
        'jobs.yml:2:3: "schedule" is not possible in defaults; write it in each job',
        'jobs.yml:3:12: timeout: "5 minutes" is not a duration; write 5m',
        'jobs.yml:6:5: unknown key "comand" in a job; did you mean "command"?',
        "jobs.yml:7:14: retries: -1 is not a whole number from 0 to 1000000",
        'jobs.yml:9:9: id: "a" is taken by the job in line 5',
        'jobs.yml:12:17: env.ROEXEC_X: "ROEXEC_X" is set by roexec itself; choose another name',
    ]


# Keys and their values.

def test_a_job_that_says_nothing_has_the_defaults_of_the_design():
    job = jobs_of(f"job: {ONE}")[0]
    values = {name: getattr(job, name) for name in Job.KEYS}
    assert values == {
        "id": "a", "name": None, "description": None, "tags": (), "schedule": (), "timezone": None,
        "window": None, "jitter": 0, "catch_up": "latest", "catch_up_window": 3600,
        "enabled": True, "command": "x", "shell": ("/bin/sh", "-c"), "directory": "/srv/jobs",
        "user": None, "group": None, "nice": None, "limits": roexec.Limits(), "umask": 0o022,
        "stdin": None, "env": {}, "env_from": (), "inherit_env": False, "timeout": None,
        "total_timeout": None, "grace": 10, "leftovers": "leave", "if_lost": "fail", "retries": 0,
        "backoff": roexec.Backoff({"delay": 10}), "retry_on": None, "success": roexec.Success(),
        "condition": None, "max_concurrent": 1, "overlap": "skip", "priority": 0, "hooks": {},
        "log": roexec.LogLimits({"keep": "7d", "max_size": "100MiB"}),
        "history": roexec.HistoryLimits({"keep": "90d", "runs": 10_000}),
        "params": {}, "parallel": None, "fail_fast": False, "pipeline": ()}
    assert job.success.exit_codes == (0,)
    assert (job.backoff.delay, job.backoff.factor, job.backoff.max) == (10, 1, None)


@pytest.mark.parametrize("line, name, expected", [
    ("name: Backup database", "name", "Backup database"),
    ("name: 42", "name", "42"),
    ("description: |\n  several\n  lines", "description", "several\nlines\n"),
    ("tags: nightly", "tags", ("nightly",)),
    ("tags: [db, 1.10]", "tags", ("db", "1.10")),
    ('schedule: "0 2 * * *"', "schedule", ("0 2 * * *",)),
    ('schedule: ["0 2 * * *", "@every 90s"]', "schedule", ("0 2 * * *", "@every 90s")),
    ('schedule: ""', "schedule", ()),
    ("schedule: []", "schedule", ()),
    ("schedule:", "schedule", ()),
    ("timezone: Europe/Berlin", "timezone", "Europe/Berlin"),
    ("window: {start: 2025-01-01}", "window", {"start": "2025-01-01"}),
    ("jitter: 5m", "jitter", 300),
    ("catch-up: none", "catch_up", "none"),
    ("catch_up_window: 2d", "catch_up_window", 172800),
    ("enabled: false", "enabled", False),
    ("shell: /bin/bash", "shell", ("/bin/bash", "-c")),
    ("shell: [/usr/bin/python3, -I, -c]", "shell", ("/usr/bin/python3", "-I", "-c")),
    ("directory: /var/tmp", "directory", "/var/tmp"),
    ("directory: data/../logs", "directory", "/srv/jobs/logs"),
    ("directory: ..", "directory", "/srv"),
    ('directory: "~"', "directory", "~"),
    ("directory: ~/data", "directory", "~/data"),
    ("directory: null", "directory", "/srv/jobs"),
    ('umask: "027"', "umask", 0o027),
    ('umask: "0077"', "umask", 0o077),
    ("stdin: yes", "stdin", "yes"),
    ("env: {A: x, B: 0755, C: 1.10, D: True, 7: y, E: \"\"}", "env",
     {"A": "x", "B": "0755", "C": "1.10", "D": "True", "7": "y", "E": ""}),
    ("env_from: {file: x.env, optional: true}", "env_from",
     ({"file": "/srv/jobs/x.env", "optional": True},)),
    ("env-from:\n  - file: ~/.env\n  - host: [LANG, TERM]\n  - command: [get, 1.10]", "env_from",
     ({"file": "~/.env"}, {"host": ["LANG", "TERM"]}, {"command": ["get", "1.10"]})),
    ("env_from: {host: LANG}", "env_from", ({"host": "LANG"},)),
    ("env_from: {secret: vault://secret/data/x}", "env_from",
     ({"secret": "vault://secret/data/x"},)),
    ("env_from: [{secret: 'vault://kv/ä/b-c#pass word', as: DB_PASSWORD}]", "env_from",
     ({"secret": "vault://kv/ä/b-c#pass word", "as": "DB_PASSWORD"},)),
    ("env_from: []", "env_from", ()),
    ("env_from:", "env_from", ()),
    ("inherit_env: true", "inherit_env", True),
    ("inherit-env: [LANG, TERM]", "inherit_env", ("LANG", "TERM")),
    ("timeout: 1h30m", "timeout", 5400),
    ("timeout: 90", "timeout", 90),
    ("timeout: 0.5", "timeout", 0.5),
    ("timeout: 0", "timeout", None),
    ("total-timeout: 2h", "total_timeout", 7200),
    ("grace: 0", "grace", 0),
    ("leftovers: kill", "leftovers", "kill"),
    ("if_lost: rerun", "if_lost", "rerun"),
    ("retries: 3", "retries", 3),
    ("retries:", "retries", 0),
    ("backoff: 30s", "backoff", roexec.Backoff({"delay": 30})),
    ("backoff: {delay: 1s, factor: 1.5, max: 1m}", "backoff",
     roexec.Backoff({"delay": 1, "factor": 1.5, "max": 60})),
    ("retry_on: {exit-codes: [1, 2]}", "retry_on", roexec.RetryOn({"exit_codes": [1, 2]})),
    ("retry_on: {timeout: true, signal: true}", "retry_on",
     roexec.RetryOn({"timeout": True, "signal": True})),
    ("success: {exit_codes: 3}", "success", roexec.Success({"exit_codes": [3]})),
    ("success: {output: done, no-output: 'ERR|WARN'}", "success",
     roexec.Success({"output": "done", "no_output": "ERR|WARN"})),
    ("retry_on: {output: busy}", "retry_on", roexec.RetryOn({"output": "busy"})),
    ("backoff: {delay: 1s, jitter: 0.1}", "backoff", roexec.Backoff({"delay": 1, "jitter": 0.1})),
    ("user: bob", "user", "bob"),
    ("group: staff", "group", "staff"),
    ("nice: -5", "nice", -5),
    ("limits: {memory: 1.5GiB, cpu: 0.5, cpu-time: 1h, files: 64, processes: 9, file_size: 10MB}",
     "limits", roexec.Limits({"memory": 1610612736, "cpu": 0.5, "cpu_time": 3600, "files": 64,
                              "processes": 9, "file_size": 10_000_000})),
    ("log: {keep: 30d, max-size: 1G}", "log",
     roexec.LogLimits({"keep": 30 * 86400, "max_size": 1 << 30})),
    ("log: {max_size: 64K}", "log", roexec.LogLimits({"keep": "7d", "max_size": 65536})),
    ("history: {keep: 365d, runs: 1}", "history",
     roexec.HistoryLimits({"keep": "365d", "runs": 1})),
    ("condition: test -e /tmp/x", "condition", "test -e /tmp/x"),
    ("condition: [test, -e, 5]", "condition", ("test", "-e", "5")),
    ("condition: true", "condition", "true"),
    ("max-concurrent: 0", "max_concurrent", 0),
    ("overlap: queue", "overlap", "queue"),
    ("priority: -5", "priority", -5),
])
def test_a_key_becomes_an_attribute(line, name, expected):
    job = job_of(line)
    assert getattr(job, name) == expected
    assert getattr(Job.from_spec(json.loads(json.dumps(job.spec))), name) == expected


@pytest.mark.parametrize("written, expected", [
    ("echo hello", "echo hello"),
    ("|\n    cd /tmp\n    ls", "cd /tmp\nls\n"),
    ("[sleep, 1.10, 0755, True]", ("sleep", "1.10", "0755", "True")),
    ("true", "true"),
])
def test_a_command_is_a_text_or_a_list_of_texts_as_written(written, expected):
    assert jobs_of(f"job:\n  id: a\n  command: {written}\n")[0].command == expected


def test_the_dash_is_accepted_in_every_name_of_a_key_and_the_spec_has_underscores():
    job = job_of("max-concurrent: 2\nretry-on: {exit-codes: [1]}\npre-run: x\n"
                 "hooks: {on-failure: y}")
    assert job.spec == {
        "id": "a", "command": "x", "directory": "/srv/jobs", "max_concurrent": 2,
        "retry_on": {"exit_codes": [1]}, "hooks": {"on_failure": "y", "pre_run": "x"}}


def test_names_of_variables_keep_their_dashes_and_underscores():
    assert job_of("env: {A_B: 1, a-b: 2}").env == {"A_B": "1", "a-b": "2"}


@pytest.mark.parametrize("line, expected", [
    ("timeout: 1 hour", '4:12: timeout: "1 hour" is not a duration; write 1h'),
    ("timeout: 2 weeks", '4:12: timeout: "2 weeks" is not a duration; write 14d'),
    ("timeout: 1 h, 30 min", '4:12: timeout: "1 h, 30 min" is not a duration; write 1h30m'),
    ("timeout: 12:30:00", '4:12: timeout: "12:30:00" is not a duration; write 12h30m'),
    ("timeout: 1:30", '4:12: timeout: "1:30" is not a duration; write 1h30m for hours and minutes, '
                      "1m30s for minutes and seconds"),
    ("timeout: soon", '4:12: timeout: "soon" is not a duration; '
                      "write for example 90s, 5m, 1h30m or 2d"),
    ("timeout: true", "4:12: timeout: true is not a duration; "
                      "write for example 90s, 5m, 1h30m or 2d"),
    ("timeout: .inf", '4:12: timeout: "inf" is not a duration between 0 and 100 years'),
    ("timeout: -1", '4:12: timeout: "-1" is not a duration between 0 and 100 years'),
    ("umask: 022", '4:10: umask: 022 is read as a number; write "022" in quotes'),
    ("umask: 0o22", "4:10: umask: 0o22 is not a umask; write three octal digits in quotes, "
                    'for example "022"'),
    ("umask: 0o022", '4:10: umask: 0o022 is read as a number; write "0022" in quotes'),
    ('umask: "099"', '4:10: umask: "099" is not a umask; write three octal digits in quotes, '
                     'for example "022"'),
    ("enabled: yes", '4:12: enabled: "yes" is a text here (as YAML 1.2 has it); write true'),
    ("enabled: Off", '4:12: enabled: "Off" is a text here (as YAML 1.2 has it); write false'),
    ("enabled: 1", "4:12: enabled: 1 stands where true or false is wanted"),
    ("inherit_env: on", '4:16: inherit_env: "on" is a text here (as YAML 1.2 has it); write true'),
    ("inherit_env: LANG",
     '4:16: inherit_env: "LANG" stands where true, false or a list of names is wanted'),
    ("retries: three", '4:12: retries: "three" is not a whole number from 0 to 1000000'),
    ('retries: "3"', '4:12: retries: "3" is a text; write 3 without quotes'),
    ("retries: 1.5", "4:12: retries: 1.5 is not a whole number from 0 to 1000000"),
    ("retries: true", "4:12: retries: true is not a whole number from 0 to 1000000"),
    ("overlap: skipp",
     '4:12: overlap: "skipp" is none of skip, queue, replace; did you mean "skip"?'),
    ("catch_up: false", "4:13: catch_up: false is none of latest, all, none"),
    ("name: [a]", "4:9: name: a list stands where a text is wanted"),
    ('name: "a\\tb"', "4:9: name: write some text on one line"),
    ("tags: {a: b}", "4:9: tags: a mapping stands where a text is wanted"),
    ("tags: [a, [b]]", "4:13: tags: a list stands where a text is wanted"),
    ("stdin: [a]", "4:10: stdin: a list stands where a text is wanted"),
    ('stdin: "a\\0b"',
     "4:10: stdin: a text cannot contain a NUL character or half of a surrogate pair"),
    ("condition: {command: x}",
     "4:14: condition: a command is a text, or a list of program and arguments"),
    ("condition: [[x]]", "4:15: condition: a list stands where a text is wanted"),
    ("condition: []", "4:14: condition: the list is empty; write the program and its arguments"),
    ('condition: ""',
     '4:14: condition: the command is empty; to do nothing write "true" or ":"'),
    ("shell: /bin/bash -eu",
     "4:10: shell: write program and options as a list: [/bin/bash, -eu, -c]"),
    ("shell: false", "4:10: shell: false is not a program; to do without a shell write the command "
                     "as a list"),
    ("directory: ~", '4:14: directory: ~ means null in YAML; write "~" in quotes for the home '
                     "folder"),
    ("directory: ~bob/x",
     '4:14: directory: "~bob/x" names another user\'s home; write the path from "/"'),
    ("env: [A=1]", '4:8: env: write "NAME: value" lines, not a list'),
    ("env: A=1", '4:8: env: "A=1" stands where "NAME: value" lines are wanted'),
    ("env: {A: }",
     '4:12: env.A: no value; write "" for an empty one, or inherit_env: [A] for the server\'s'),
    ("env: {A: [1]}", "4:12: env.A: a list stands where a text is wanted"),
    ("env: {\"A=B\": 1}", '4:16: env.A=B: "A=B" cannot be the name of a variable'),
    ("env: {export A: 1}", '4:19: env.export A: "export A" cannot be the name of a variable'),
    ("env_from: /etc/x.env", "4:13: env_from: write {file: /etc/x.env}"),
    ("env_from: [vault://secret/data/x]", "4:14: env_from: write {secret: vault://secret/data/x}"),
    ("env_from: {}", "4:13: env_from: a source has one of file, host, command, secret"),
    ("env_from: [{file: x}, {file: x, host: [A], command: y}]",
     "4:25: env_from: file and host and command are 3 sources; make a list of them"),
    ("env_from: {secrets: x}",
     '4:14: unknown key "secrets" in a source of env_from; did you mean "secret"?'),
    ("env_from: {file: ~bob/x}",
     '4:20: env_from.file: "~bob/x" names another user\'s home; write the path from "/"'),
    ("env_from: {file: [x]}", "4:20: env_from.file: a list stands where a text is wanted"),
    ("env_from: {host: [A], optional: true}",
     "4:13: env_from: optional goes with file, not with host"),
    ("env_from: {command: x, as: A}", "4:13: env_from: as goes with secret, not with command"),
    ("env_from: {host: [A, 'B C']}",
     '4:24: env_from.host: "B C" cannot be the name of a variable'),
    ("env_from: {host: ROEXEC_RUN_ID}", '4:20: env_from.host: "ROEXEC_RUN_ID" is set by roexec '
                                        "itself; choose another name"),
    ("env_from: {command: []}",
     "4:23: env_from.command: the list is empty; write the program and its arguments"),
    ("env_from: {secret: secret/data/x}",
     '4:22: env_from.secret: "secret/data/x" is no secret; write vault:// and its path, for '
     "example vault://secret/data/db, or vault://secret/data/db#password for one key"),
    ("env_from: {secret: vault://secret/data/x, as: DB}",
     "4:13: env_from: as: names the variable of one key; write which behind the secret, for "
     "example vault://secret/data/db#db"),
    ("env_from: {secret: 'vault://secret/data/x#a b'}",
     '4:13: env_from: the key "a b" cannot be the name of a variable; add as: NAME'),
    ("env_from: {secret: 'vault://secret/data/x#a', as: ROEXEC_A}",
     '4:53: env_from.as: "ROEXEC_A" is set by roexec itself; choose another name'),
    ("window: {}", "4:11: window: it is empty; write start, end, or leave it out"),
    ("window: {start: 12:00}", '4:19: window.start: "12:00" is a time of day; a window is between '
                               "two dates, put hours into the schedule"),
    ("window: {start: 2025-02-01, end: 2025-01-01}", "4:11: window: it ends before it starts"),
    ("window: {begin: 2025-01-01}", '4:12: unknown key "begin" in window; it may have start, end'),
    ("window: 2025-01-01",
     '4:11: window: "2025-01-01" stands where "key: value" lines are wanted (start, end)'),
    ("backoff: {factor: 0.5}", "4:21: backoff.factor: 0.5 is not a number from 1 to 1000"),
    ("backoff: {max: 1m}",
     "4:12: backoff: max means nothing without a factor; write for example factor: 2"),
    ("backoff: {delay: 2m, factor: 2, max: 1m}", "4:12: backoff: max is less than delay"),
    ("retry_on: {}",
     "4:13: retry_on: it is empty; write exit_codes, timeout, signal, output, or leave it "
     "out"),
    ("retry_on: [1]", '4:13: retry_on: a list stands where "key: value" lines are wanted '
                      "(exit_codes, timeout, signal, output)"),
    ("success: {output: '('}", '4:21: success.output: "(" is no regular expression: missing ), '
                               "unterminated subpattern at position 0"),
    ("nice: 20", "4:9: nice: 20 is not a whole number from -20 to 19"),
    ("user: [a]", "4:9: user: a list stands where a text is wanted"),
    ("limits: {memory: 1 GB}", '4:20: limits.memory: "1 GB" is not a size; write for example 512M, '
                               "1.5GiB or 4096"),
    ("limits: {memroy: 1G}", '4:12: unknown key "memroy" in limits; did you mean "memory"?'),
    ("log: {max_size: 10K}", "4:19: log.max_size: write a size of 64K or more"),
    ("log: {keep: 0}", "4:15: log.keep: write a duration above 0"),
    ("log: {size: 1G}", '4:9: unknown key "size" in log; did you mean "max_size"?'),
    ("log: 7d", '4:8: log: "7d" stands where "key: value" lines are wanted (keep, max_size)'),
    ("history: {runs: 0}", "4:19: history.runs: 0 is not a whole number from 1 to 1000000"),
    ("limits: {cpu: 0}", "4:17: limits.cpu: 0 is not a number from 0.01 to 1000"),
    ("success: {exit_codes: [0, 256]}",
     "4:29: success.exit_codes: 256 is not a whole number from 0 to 255"),
    ("cron: x", '4:3: unknown key "cron" in a job; did you mean "schedule"?'),
    ("environment: {}", '4:3: unknown key "environment" in a job; did you mean "env"?'),
    ("time-out: 1h", '4:3: unknown key "time-out" in a job; did you mean "timeout"?'),
    ("on_fail: x", '4:3: unknown key "on_fail" in a job; did you mean "on_failure"?'),
    ("zzz: x", '4:3: unknown key "zzz" in a job'),
    ("1.10: x", '4:3: unknown key "1.10" in a job'),
    ('"a\\0b": x', '4:3: unknown key "a\0b" in a job'),
    ("null: x", '4:3: unknown key "null" in a job'),
    ("max_concurrent: 1\n  max-concurrent: 2",
     '5:3: "max_concurrent" is written twice, with "-" and with "_"; remove one'),
])
def test_a_wrong_value_is_refused_where_it_stands_with_what_to_write(line, expected):
    assert problem_of(line) == expected


@pytest.mark.parametrize("secret", [
    "vault://secret", "vault://secret/", "vault:///x", "vault://secret//x", "vault://secret/../x",
    "vault://secret/data/x?version=2", "vault://secret/a%2fb", "vault://secret/x#", "vault:/a/b",
    "https://secret/data/x", "vault://secret/./x", "vault://secret/a b"])
def test_what_is_no_path_of_a_secret_is_refused(secret):
    assert f'"{secret}" is no secret' in problem_of(f"env_from: {{secret: '{secret}'}}")


def test_a_file_of_variables_is_relative_to_the_job_file_and_to_nothing_without_one():
    job = {"id": "a", "command": "x", "env_from": {"file": "a.env"}}
    assert job_from_mapping(job, "/srv").env_from == ({"file": "/srv/a.env"},)
    with pytest.raises(Invalid, match="env_from.file: \"a.env\" is relative to nothing"):
        job_from_mapping(job, None)


def test_a_schedule_is_judged_by_cron_and_in_the_zone_of_the_job():
    assert problem_of('schedule: "0 2 * *"').startswith("4:13: schedule: ")
    assert problem_of('schedule: ["0 2 * * *", "61 * * * *"]').startswith("4:27: schedule: ")
    assert problem_of("schedule: 5").startswith("4:13: schedule: ")


@pytest.mark.parametrize("line", [
    'schedule: "0 0 30 2 *"', 'schedule: "0 0 31 4,6 *"', 'schedule: ["@daily", "0 0 30 2 *"]'])
def test_a_schedule_that_can_never_fire_is_refused(line):
    assert "never" in problem_of(line)


def test_a_schedule_that_never_fires_in_the_zone_of_the_job_is_refused():
    never = 'schedule: "*/5 2 * 3 sun#2"'     # New York's clocks go from 02:00 to 03:00 then
    assert job_of(never).schedule == ("*/5 2 * 3 sun#2",)
    assert "never" in problem_of(f"{never}\n  timezone: America/New_York")
    assert "never" in problem_of(never, defaults={"timezone": "America/New_York"})
    job_of(f"{never}\ntimezone: UTC", defaults={"timezone": "America/New_York"})


def test_an_unknown_timezone_is_refused():
    assert problem_of("timezone: Europe/Berlni").startswith("4:13: timezone: ")
    assert job_of('timezone: "+02:00"').timezone == "+02:00"


def test_a_job_needs_an_id_and_a_command():
    assert problems_of("jobs:\n  - name: x\n    retries: 1\n") == [
        "jobs.yml:2:5: a job needs an id; write for example id: backup",
        "jobs.yml:2:5: the job has no command; write command: and what to run"]
    assert problems_of("jobs:\n  - id: a\n    command:\n") == [
        'jobs.yml:2:5: the job "a" has no command; write command: and what to run']


@pytest.mark.parametrize("text, valid", [
    ("a", True), ("0", True), ("backup-db", True), ("A.b_c-9", True), ("x" * 64, True),
    ("", False), ("-a", False), (".a", False), ("_a", False), ("x" * 65, False), ("a b", False),
    ("a/b", False), ("ä", False), ("a\n", False), ("latest", False), ("all", False),
    ("export", False), ("Latest", True),
])
def test_what_an_id_is(text, valid):
    assert roexec.valid_id(text) is valid


@pytest.mark.parametrize("written, expected", [
    ("backup db", 'id: "backup db" cannot be an id; an id is a letter or digit, then up to 63 '
                  'letters, digits, ".", "_" or "-", for example "backup-db"'),
    ("latest", 'id: "latest" is reserved; choose another id'),
])
def test_a_wrong_id_is_refused(written, expected):
    assert problems_of(f"job: {{id: {written}, command: x}}") == [f"jobs.yml:1:11: {expected}"]


def test_an_id_is_the_text_as_written():
    assert [job.id for job in jobs_of("jobs: {007: {command: x}, 1.10: {command: x}}")] == [
        "007", "1.10"]
    assert jobs_of("job: {id: 0755, command: x}")[0].id == "0755"
    assert jobs_of('{"job": {"id": 12, "command": ["x", 1.10]}}')[0].command == ("x", "1.10")


# Variables that will not be expanded.

@pytest.mark.parametrize("value, variable", [
    ("$PATH:/opt/bin", "$PATH"), ("x${home}y", "${home}"), ("$HOME", "$HOME")])
def test_a_variable_in_a_value_of_env_is_warned_of(value, variable):
    file = read_job_file(f'job: {{id: a, command: x,\n env: {{P: "{value}"}}}}', "jobs.yml", "/")
    assert file.jobs[0].env == {"P": value}
    warning, = file.warnings
    assert str(warning) == (f"jobs.yml:2:11: P: {variable} in a value of env is not expanded; write "
                            "the value itself, or set the variable in the command")


def test_a_dollar_that_is_no_variable_is_not_warned_of():
    text = "job: {id: a, command: $HOME/x, env: {A: pa$$word, B: $5, C: a$, D: cost$x}}"
    assert read_job_file(text, "jobs.yml", "/").warnings == []


# Hooks.

@pytest.mark.parametrize("lines", [
    "hooks: {on_failure: x, post_run: y}",
    "notify: {on_failure: x, on_finish: y}",
    "on_failure: x\npost_run: y",
    "hooks: {on_failure: x}\nnotify: {post-run: y}",
    "hooks: {on-failure: {command: x}}\non-finish: [y]",
])
def test_hooks_mean_the_same_in_every_spelling(lines):
    assert job_of(lines).hooks == {
        "on_failure": (Hook({"command": "x"}),), "post_run": (Hook({"command": "y"}),)}


@pytest.mark.parametrize("lines, place", [
    ("hooks: {on_failure: x}\n  on_failure: y", "5:3"),
    ("notify: {on_failure: x}\n  hooks: {on_failure: y}", "4:12"),
    ("post_run: x\n  on-finish: y", "5:3"),
    ("hooks: {post-run: x, on-finish: y}", "4:24"),
])
def test_the_same_hook_in_two_spellings_is_an_error(lines, place):
    problem = problem_of(lines)
    assert problem.startswith(f"{place}: the hook ")
    assert problem.endswith("is written twice, in two spellings; make a list of them")


def test_a_condition_alone_belongs_to_the_entry_before_it():
    job = job_of("on_failure:\n  - mail -s failed ops\n  - condition: test -e /tmp/x\n"
                 "  - {command: [page, 5], timeout: 5s}\n  - {condition: c}")
    assert job.hooks["on_failure"] == (
        Hook({"command": "mail -s failed ops", "condition": "test -e /tmp/x"}),
        Hook({"command": ["page", "5"], "condition": "c", "timeout": 5}))
    assert job.hooks["on_failure"][0].timeout == 60
    assert job.hooks["on_failure"][1].command == ("page", "5")


@pytest.mark.parametrize("line, expected", [
    ("on_failure: {condition: x}",
     "4:15: on_failure: a condition alone belongs to the entry before it, and there is none"),
    ("on_failure: [{condition: x}, y]",
     "4:16: on_failure: a condition alone belongs to the entry before it, and there is none"),
    ("on_failure: [x, {condition: y}, {condition: z}]",
     "4:35: on_failure: the entry before this one has a condition already"),
    ("on_failure: [{command: x, condition: y}, {condition: z}]",
     "4:44: on_failure: the entry before this one has a condition already"),
    ("on_failure: {timeout: 5s}",
     "4:15: on_failure: a hook needs a command, or webhook, mail, ping or run"),
    ("on_failure: [x, {condition: y, timeout: 5s}]",
     "4:19: on_failure: a hook needs a command, or webhook, mail, ping or run"),
    ("on_failure: {}",
     "4:15: on_failure: a hook needs a command, or webhook, mail, ping or run"),
    ("on_failure: [x, ]\n  on_retry: [null]",
     "5:14: on_retry: nothing stands where a text is wanted"),
    ("on_failure: {command: x, timeout: 0}",
     "4:37: on_failure.timeout: write a duration above 0"),
    ("on_failure: [/bin/mail, -s, x]",
     '4:27: on_failure: "-s" is no command; a list here is several hooks, write '
     "{command: [program, argument]} for one"),
    ("hooks: {on_fail: x}", '4:11: unknown key "on_fail" in hooks; did you mean "on_failure"?'),
    ("notify: /bin/mail", '4:11: notify: "/bin/mail" stands where "key: value" lines are wanted '
     "(pre_run, on_retry, on_success, on_failure, post_run, on_missed, on_finish)"),
    ("on_failure: {comand: x}",
     '4:16: unknown key "comand" in a hook; did you mean "command"?'),
])
def test_a_wrong_hook_is_refused(line, expected):
    expected = expected.replace("nothing stands", "null stands") if "[null]" in line else expected
    assert problem_of(line) == expected


@pytest.mark.parametrize("written, kind, target", [
    ("x", "command", "x"), ("{command: [a, 1]}", "command", ("a", "1")),
    ("{webhook: 'https://hooks.example.com/T0/B0?x=1&y=%20'}", "webhook",
     "https://hooks.example.com/T0/B0?x=1&y=%20"),
    ("{webhook: 'http://user:p%40ss@[::1]:8080'}", "webhook", "http://user:p%40ss@[::1]:8080"),
    ("{webhook: HTTP://EXAMPLE.COM/}", "webhook", "HTTP://EXAMPLE.COM/"),
    ("{ping: https://hc-ping.com/x}", "ping", "https://hc-ping.com/x"),
    ("{mail: ops@example.com}", "mail", ("ops@example.com",)),
    ("{mail: [ops@example.com, o'neil+x@example.co.uk], condition: c}", "mail",
     ("ops@example.com", "o'neil+x@example.co.uk")),
    ("{run: other}", "run", "other"), ("{run: 007}", "run", "007"),
])
def test_a_hook_is_of_one_kind_and_has_a_target(written, kind, target):
    hook, = job_of(f"on_failure: {written}").hooks["on_failure"]
    assert (hook.kind, hook.target) == (kind, target)
    assert hook.condition == ("c" if "condition" in written else None)


def test_a_condition_alone_may_belong_to_a_notice():
    hook, = job_of("on_failure: [{ping: 'https://a/'}, {condition: c}]").hooks["on_failure"]
    assert hook == Hook({"ping": "https://a/", "condition": "c"}) and hook.kind == "ping"


_NO_ADDRESS = ("this is no address; write https://HOST/PATH, in ASCII and without blanks "
               "(other characters as %XX)")


@pytest.mark.parametrize("hook, expected", [
    ("webhook: 'ftp://example.com/'", _NO_ADDRESS), ("webhook: example.com/x", _NO_ADDRESS),
    ("webhook: 'https://example.com/a b'", _NO_ADDRESS),
    ("ping: 'https://exämple.com/'", _NO_ADDRESS),
    ('ping: "https://example.com/\\r\\nX: y"', _NO_ADDRESS), ("ping: 'https://'", _NO_ADDRESS),
    ("ping: 'https://example.com:70000/'", _NO_ADDRESS), ("ping: 'https://h:0/'", _NO_ADDRESS),
    ("ping: 'https://[::1'", _NO_ADDRESS), ("webhook: 'https://a#b@c/'", _NO_ADDRESS),
    ("mail: ops", '"ops" is no mail address; write one alone, for example ops@example.com, and '
                  "several as a list"),
    ("mail: [a@b.c, 'Ops <ops@example.com>']", '"Ops <ops@example.com>" is no mail address; write '
     "one alone, for example ops@example.com, and several as a list"),
    ('mail: "a@b.c\\nBcc: x@y.z"', '"a@b.c\nBcc: x@y.z" is no mail address; write one alone, for '
     "example ops@example.com, and several as a list"),
    ("mail: []", "the list of mail is empty; write an address"),
    ("mail: a@b.c, run: x", "mail and run in one hook; make a list of several"),
    ("command: x, ping: 'https://a'", "command and ping in one hook; make a list of several"),
    ("ping: 'https://a', timeout: 5s", "only a command has a timeout, not ping; remove it"),
    ("run: 'a b'", '"a b" cannot be an id; an id is a letter or digit, then up to 63 letters, '
                   'digits, ".", "_" or "-", for example "a-b"'),
])
def test_a_wrong_notice_is_refused(hook, expected):
    assert problem_of(f"on_failure: {{{hook}}}").split(": ", 2)[2] == expected


# Defaults.

def test_defaults_of_the_file_are_folded_in_and_the_job_is_stronger():
    job = jobs_of("defaults: {timeout: 60s, retries: 2, env: {A: 1, B: 2}, tags: [x],\n"
                  "           hooks: {on_failure: f}, notify: {on_success: s}, directory: sub}\n"
                  "jobs: [{id: a, command: x, retries: 0, env: {B: 3}, tags: [y], post_run: p}]")[0]
    assert job.spec == {
        "id": "a", "command": "x", "tags": ["y"], "directory": "/srv/jobs/sub", "timeout": "60s",
        "retries": 0, "env": {"A": "1", "B": "3"},
        "hooks": {"on_failure": "f", "on_success": "s", "post_run": "p"}}
    assert job.timeout == 60 and job.retries == 0


def test_null_removes_what_comes_from_below_also_from_the_configuration():
    job = jobs_of("defaults: {timeout: 60s, env: {A: 1}, hooks: {on_failure: f, on_retry: r},"
                  " directory: /x}\njob: {id: a, command: x, timeout: null, env: null,"
                  " on_failure: null, directory: null}")[0]
    assert job.timeout is None and job.env == {} and list(job.hooks) == ["on_retry"]
    assert job.directory == "/srv/jobs"
    whole = roexec.effective(job, {"timeout": 5, "env": {"B": "2"}, "hooks": {"on_failure": "g"},
                                   "retries": 4})
    assert whole.timeout is None and whole.env == {} and list(whole.hooks) == ["on_retry"]
    assert whole.retries == 4


def test_null_removes_one_key_of_what_is_merged_key_by_key():
    below = {"env": {"A": "c", "B": "c"}, "limits": {"files": 9, "nice": 1}, "log": {"keep": "1d"}}
    jobs, = [roexec.read_job_file(
        "defaults: {env: {A: f, C: f, D: f}, limits: {memory: 1G, cpu: 2}, log: {max_size: 1G}}\n"
        "job: {id: a, command: x, env: {A: null, B: null, C: null}, limits: {cpu: null,"
        " files: null}, log: {max_size: null}}", "jobs.yml", "/srv/jobs", below).jobs]
    assert jobs[0].spec["env"] == {"A": None, "B": None, "D": "f"}, "C is gone for good"
    job = roexec.effective(jobs[0], below)
    assert job.env == {"D": "f"} and (job.log.keep, job.log.max_size) == (86400, 100 << 20)
    assert (job.limits.memory, job.limits.cpu, job.limits.files) == (1 << 30, None, None)
    again = roexec.read_job_file(roexec.job_to_yaml(jobs), "jobs.yml", "/srv/jobs", below).jobs
    assert again == jobs


def test_a_variable_without_a_value_is_an_error_where_no_default_below_has_it():
    for text in ("defaults: {env: {B: 1}}\njob: {id: a, command: x, env: {A: null}}",
                 "defaults: {env: {A: null}}\njob: {id: a, command: x, env: {}}"):
        problem, = problems_of(text)
        assert "env.A: no value" in problem
    with pytest.raises(roexec.Invalid, match="env.A: no value"):
        roexec.job_from_mapping({"id": "a", "command": "x", "env": {"A": None}}, None)


@pytest.mark.parametrize("written, names", [
    ("hooks: null", []), ("notify: null", []), ("hooks: {}", ["on_failure"]),
    ("hooks: null, on_retry: r", ["on_retry"]), ("on_failure: null", [])])
def test_null_for_all_hooks_removes_all_of_them(written, names):
    job = jobs_of(f"defaults: {{on_failure: f}}\njob: {{id: a, command: x, {written}}}")[0]
    assert list(job.hooks) == names


def test_defaults_of_the_configuration_lie_below_those_of_the_file():
    job = job_of("timeout: 5s\nenv: {A: job}")
    whole = roexec.effective(job, {"timeout": 9, "grace": "1m", "env": {"A": "c", "B": "c"}})
    assert (whole.timeout, whole.grace, whole.env) == (5, 60, {"A": "job", "B": "c"})
    assert roexec.effective(job, {}) is job
    assert roexec.effective(job, None) is job


@pytest.mark.parametrize("line", ["id: a", "name: a", "command: x", "schedule: '@daily'"])
def test_what_makes_a_job_itself_cannot_be_a_default(line):
    name = line.split(":")[0]
    assert problems_of(f"defaults:\n  {line}\njobs: []") == [
        f'jobs.yml:2:3: "{name}" is not possible in defaults; write it in each job']


# Values.

def test_a_job_cannot_be_changed():
    job = job_of("retries: 1")
    with pytest.raises(AttributeError, match="cannot be changed"):
        job.retries = 2
    with pytest.raises(AttributeError):
        job.other = 2


def test_jobs_are_equal_if_their_specs_are_whatever_the_order_of_keys_in_the_file():
    one, other = job_of("retries: 1\ntimeout: 5s"), job_of("timeout: 5s\nretries: 1")
    assert one == other and hash(one) == hash(other)
    assert json.dumps(one.spec) == json.dumps(other.spec)
    assert one != job_of("retries: 1\ntimeout: 5") and one != one.spec


def test_a_spec_comes_back_as_the_same_job():
    job = job_of("env: {A: 0755}\nretry_on: {exit_codes: [1]}\non_failure: [a, {condition: b}]")
    again = Job.from_spec(json.loads(json.dumps(job.spec)))
    assert again == job
    assert all(getattr(again, name) == getattr(job, name) for name in Job.KEYS)


def test_the_crons_of_a_job_are_made_once_with_its_id_as_seed():
    job = job_of('schedule: ["H H * * *", "@daily"]')
    assert len(job.crons()) == 2 and job.crons() is job.crons()
    zone = roexec.get_zone("UTC")
    assert job.crons()[0].next_slot(0, zone) == roexec.Cron("H H * * *", "a").next_slot(0, zone)
    assert job_of("").crons() == ()


def test_the_zone_of_a_job_is_its_own_else_the_one_given():
    default = object()
    assert job_of("").zone(default) is default
    assert str(job_of("timezone: Europe/Berlin").zone(default)) == "Europe/Berlin"


@pytest.mark.parametrize("window, zone, expected", [
    ("{start: 2025-01-01, end: 2025-01-01}", "UTC", (1735689600, 1735775999)),
    ("{start: 2025-01-01}", "Europe/Berlin", (1735686000, None)),
    ("{end: 2025-01-01T00:00:00Z}", "Europe/Berlin", (None, 1735689600)),
    ("{end: '2025-01-01 01:00'}", "Europe/Berlin", (None, 1735689600)),
])
def test_a_window_is_in_the_zone_of_the_job_unless_it_has_an_offset(window, zone, expected):
    assert job_of(f"window: {window}").window_instants(roexec.get_zone(zone)) == expected


def test_references_to_jobs_that_do_not_exist_are_named():
    job = Job.from_spec({"id": "a", "hooks": {"on_success": [{"run": "bakcup"}, "x"],
                                              "on_failure": {"run": "c"}}})
    assert roexec.check_references(job, {"backup", "c"}) == [
        'hooks.on_success of job "a" runs the job "bakcup", which does not exist; '
        'did you mean "backup"?']


# Mappings that come from no file.

def test_a_mapping_is_validated_as_a_job_of_a_file_is():
    job = job_from_mapping({"id": "a", "command": ["x", 1], "max-concurrent": 2}, None)
    assert job.spec == {"id": "a", "command": ["x", "1"], "max_concurrent": 2}
    assert job.directory is None


def test_problems_of_a_mapping_name_keys_instead_of_lines():
    with pytest.raises(Invalid) as caught:
        job_from_mapping({"id": "a", "command": "x", "hooks": {"on_failure": [{"command": "x",
                          "timeout": "x"}]}, "env": {"V": 1.1}, "directory": "x", "params": 1}, None)
    assert str(caught.value).splitlines() == [
        'job: hooks.on_failure.timeout: "x" is not a duration; '
        "write for example 90s, 5m, 1h30m or 2d",
        "job: env.V: 1.1 may have been written otherwise; put it in quotes",
        'job: directory: "x" is relative to nothing; write the path from "/"',
        'job: params: 1 stands where "NAME: default" lines are wanted',
    ]


def test_settings_are_texts_as_they_stand_or_yaml():
    job = job_from_mapping({"id": "a", "command": ["x"], "retries": 1}, "/srv", [
        ("retries", "3"), ("max-concurrent", "2"), ("timeout", "1h"), ("umask", "027"),
        ("schedule", "*/5 * * * *"), ("tags", "[a, 1.10]"), ("env", "{PORT: 0755}"),
        ("enabled", "false"), ("condition", "[ -e x ]"), ("on_failure", "echo a: b"),
        ("name", "1.10"), ("directory", "data"), ("backoff", "{delay: 1s, factor: 2}")])
    assert job.spec == {
        "id": "a", "name": "1.10", "tags": ["a", "1.10"], "schedule": "*/5 * * * *",
        "enabled": False, "command": ["x"], "directory": "/srv/data", "umask": "027",
        "env": {"PORT": "0755"}, "timeout": "1h", "retries": 3,
        "backoff": {"delay": "1s", "factor": 2}, "condition": "[ -e x ]", "max_concurrent": 2,
        "hooks": {"on_failure": "echo a: b"}}


@pytest.mark.parametrize("key, text, expected", [
    ("retries", "many", 'job: retries: "many" is not a whole number from 0 to 1000000'),
    ("retreis", "3", 'job: unknown key "retreis" in a job; did you mean "retries"?'),
    ("enabled", "yes", 'job: enabled: "yes" is a text here (as YAML 1.2 has it); write true'),
])
def test_a_wrong_setting_is_refused(key, text, expected):
    with pytest.raises(Invalid) as caught:
        job_from_mapping({"id": "a", "command": "x"}, None, [(key, text)])
    assert str(caught.value) == expected


def test_a_setting_that_is_no_yaml_is_refused():
    with pytest.raises(Invalid, match="^job: env: "):
        job_from_mapping({"id": "a", "command": "x"}, None, [("env", "{A: [")])


@pytest.mark.parametrize("value", [None, [], "x", 5])
def test_a_mapping_that_is_none_is_refused(value):
    with pytest.raises(Invalid, match="^job: .* is no job"):
        job_from_mapping(value, None)


def test_half_of_a_surrogate_pair_is_refused():
    with pytest.raises(Invalid, match="half of a surrogate pair"):
        job_from_mapping({"id": "a", "command": "x", "stdin": "\ud83d"}, None)


# Export.

HARD_TEXTS = [
    "plain", "two words", "true", "No", "null", "~", "0755", "1e3", "12:30", "* * * * *", "a: b",
    "a #b", "#a", "- a", "-", "?", "a:", "'", '"', "\\", "\t", " a", "a ", "", "\n", "a\n",
    "a\nb", "a\nb\n", "a\nb\n\n", "a\n\nb\n", " a\nb", "a\n  b\n", "\ta\nb", "a\n \nb", "a\r\nb",
    "ä\nö", "\x85", "\u2028", "\ufeff", "\U0001f600", "\x7f", "\x1b[1m", "%a", "@a", "`a`", "{a}",
    "[a]", "a, b", "&a", "*a", "!a", "|", ">", "=", "<<", "a\nb: c\n# d\n", "---", "...",
    "---\na\n", "a\n...\n", "/usr/bin/x -a --b=c", "x\n#!/bin/sh\n", "key: |\n  x\n",
]


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_every_text_comes_back_from_export(text):
    job = Job.from_spec({"id": "a", "command": ["x", text], "directory": "/x", "stdin": text,
                         "env": {"V": text, "".join(text.split()).replace("=", "") or "k": "1"}})
    assert jobs_of(roexec.job_to_yaml([job])) == [job]


def test_export_of_a_whole_job_reads_like_a_file_and_applies_to_the_same_jobs():
    job = job_of("schedule: '0 2 * * *'\nenv: {A: 0755, B: x}\non_failure: [a, {condition: [b]}]\n"
                 "retries: 3\nenabled: false\ntimeout: 1.5\ntags: []\nstdin: |\n  one\n  two\n"
                 "backoff: {delay: 1s}\ngrace:")
    text = roexec.job_to_yaml([job, job_from_mapping({"id": "b", "command": ["c"]}, None)])
    assert text == """\
jobs:
  - id: a
    tags: []
    schedule: "0 2 * * *"
    enabled: false
    command: x
    directory: /srv/jobs
    stdin: |
      one
      two
    env:
      A: "0755"
      B: x
    timeout: 1.5
    grace: null
    retries: 3
    backoff:
      delay: "1s"
    hooks:
      on_failure:
        - a
        - condition:
            - b
  - id: b
    command:
      - c
"""
    assert jobs_of(text)[0] == job
    assert jobs_of(roexec.job_to_yaml([])) == []


# The configuration.

def test_a_configuration_that_says_nothing_has_all_defaults():
    for config in (Config(), read_config("", "c", "/"), read_config("server:\n", "c", "/")):
        assert (config.server.host, config.server.port) == ("127.0.0.1", 8080)
        assert (config.store.type, config.store.path) == ("local", None)
        assert (config.scheduler.max_concurrent, config.scheduler.timezone) == (None, None)
        assert config.jobs == () and config.defaults == {} and not config.host_was_set


def test_log_and_history_of_the_configuration_hold_for_all_runs_and_below_its_defaults():
    config = read_config("log: {keep: 1d, max_size: 1M}\nhistory: {runs: 5}\n"
                         "defaults: {log: {keep: 2d}, timeout: 5}\n", "c", "/")
    assert config.defaults == {"timeout": 5, "log": {"keep": "2d", "max_size": "1M"},
                               "history": {"runs": 5}}
    job = roexec.effective(job_of("log: {keep: 3d}"), config.defaults)
    assert (job.log.keep, job.log.max_size, job.history.runs) == (3 * 86400, 1 << 20, 5)
    settings = {"log": config.log, "history": config.history, "defaults": config.defaults}
    command = roexec.effective_command({"id": "a", "command": "x"}, settings)
    assert (command.log.keep, command.history.runs, command.timeout) == (86400, 5, None)
    assert roexec.effective_command({"id": "a"}, {}).log == roexec.LogLimits()


def test_a_configuration_with_everything():
    config = read_config("""\
server: {host: 0.0.0.0, port: 8081}
store: {type: sqlite, path: ../roexec.db}
scheduler:
  max-concurrent: 10
  timezone: Europe/Berlin
jobs: [jobs.yml, /srv/jobs]
defaults: {timeout: 60s, retries: 2, env: {A: 0755}, notify: {on-failure: x}}
""", "config.yml", "/etc/roexec")
    assert (config.server.host, config.server.port) == ("0.0.0.0", 8081)
    assert (config.store.type, config.store.path) == ("sqlite", "/etc/roexec.db")
    assert (config.scheduler.max_concurrent, config.scheduler.timezone) == (10, "Europe/Berlin")
    assert config.jobs == ("/etc/roexec/jobs.yml", "/srv/jobs")
    assert config.defaults == {"timeout": "60s", "retries": 2, "env": {"A": "0755"},
                               "hooks": {"on_failure": "x"}}
    assert config.host_was_set


def test_the_vault_of_a_configuration():
    config = read_config("vault: {address: 'https://vault.example.com:8200/', role-id: r-1, "
                         "secret_id_file: id, namespace: team/a, ca: ca.pem}", "c", "/etc/roexec")
    assert config.vault == {
        "address": "https://vault.example.com:8200", "role_id": "r-1", "namespace": "team/a",
        "secret_id_file": "/etc/roexec/id", "ca": "/etc/roexec/ca.pem"}
    assert roexec.VaultSettings(config.vault).role_id == "r-1"
    assert roexec.VaultSettings(config.vault).token_file is None and Config().vault is None


@pytest.mark.parametrize("lines, expected", [
    ("{}", "1:8: vault: it is empty; write address, token_file, role_id, secret_id_file, namespace, "
           "ca, or leave it out"),
    ("{token_file: t}",
     "1:8: vault: write address:, for example https://vault.example.com:8200"),
    ("{address: 'http://v'}",
     "1:8: vault: write either token_file, or role_id and secret_id_file"),
    ("{address: 'http://v', token_file: t, role_id: r, secret_id_file: s}",
     "1:8: vault: write either token_file, or role_id and secret_id_file"),
    ("{address: 'http://v', role_id: r}",
     "1:8: vault: role_id and secret_id_file go together; write both or none"),
    ("{address: 'http://v', token_file: t, ca: c}",
     "1:8: vault: ca is for an address that begins with https://"),
    ("{address: 'vault:8200', token_file: t}", '1:18: vault.address: "vault:8200" is no address of '
     "Vault; write for example https://vault.example.com:8200"),
    ("{address: 'http://v:70000', token_file: t}", '1:18: vault.address: "http://v:70000" is no '
     "address of Vault; write for example https://vault.example.com:8200"),
    ("{address: 'https://u:p@v/', token_file: t}", '1:18: vault.address: "https://u:p@v/" is no '
     "address of Vault; write for example https://vault.example.com:8200"),
    ("{address: 'http://v', token: t}",
     '1:30: unknown key "token" in vault; did you mean "token_file"?'),
])
def test_a_wrong_vault_is_refused(lines, expected):
    assert config_problems(f"vault: {lines}") == [f"config.yml:{expected}"]


def test_the_mail_server_of_a_configuration():
    config = read_config("mail: {host: mail.example.com, from: roexec@example.com, user: u, "
                         "password-file: secret}", "config.yml", "/etc/roexec")
    assert config.mail == {"host": "mail.example.com", "from": "roexec@example.com", "user": "u",
                           "password_file": "/etc/roexec/secret"}
    mail = roexec.MailSettings(config.mail)
    assert (mail.host, mail.port, mail.sender) == ("mail.example.com", 587, "roexec@example.com")
    assert (mail.tls, mail.timeout, mail.password_file) == ("starttls", 30, "/etc/roexec/secret")
    assert Config().mail is None and roexec.MailSettings(None).host is None


@pytest.mark.parametrize("written, port", [
    ("tls: starttls", 587), ("tls: tls", 465), ("tls: none", 25), ("tls: none, port: 2525", 2525)])
def test_the_port_of_a_mail_server_is_the_usual_one(written, port):
    config = read_config(f"mail: {{host: h, {written}}}", "c", "/")
    assert roexec.MailSettings(config.mail).port == port


def test_a_host_that_was_set_to_its_default_was_set():
    assert read_config("server: {host: 127.0.0.1}", "c", "/").host_was_set
    assert not read_config("server: {port: 1}", "c", "/").host_was_set


@pytest.mark.parametrize("text, expected", [
    ("[a]", '1:1: a list stands where "key: value" lines are wanted '
            "(server, store, scheduler, jobs, defaults, mail, vault, log, "
            "history, metrics, clustering)"),
    ("sever: {}", '1:1: unknown key "sever" in the configuration; did you mean "server"?'),
    ("server: {prot: 1}", '1:10: unknown key "prot" in server; did you mean "port"?'),
    ("server: {port: 70000}", "1:16: server.port: 70000 is not a whole number from 0 to 65535"),
    ('server: {port: "80"}', '1:16: server.port: "80" is a text; write 80 without quotes'),
    ("server: {host: 'localhost:80'}",
     '1:16: server.host: "localhost:80" is not a host; write an address or a name alone, '
     "and the port under port:"),
    ("server: {tls: {}}", "1:15: server.tls: cert and key go together; write both, or leave tls "
     "out"),
    ("server: {tls: {cert: a}}", "1:15: server.tls: cert and key go together; write both, or leave "
     "tls out"),
    ("server: {auth: {users: x}}", '1:17: unknown key "users" in server.auth; did you mean '
     '"local_users"?'),
    ("server: {auth: {owner: 1}}", "1:24: server.auth.owner: 1 stands where true or false is "
     "wanted"),
    ("server: {hosts: ['http://a']}", '1:18: server.hosts: "http://a" is not the name of a host; '
     "write for example roexec.example.com, or with a port roexec.example.com:8443"),
    ("store: {bucket: runs}",
     "1:8: store: bucket is for type: s3; write that too, or leave it out"),
    ("store: /var/lib/x", "1:8: store: write {path: /var/lib/x}"),
    ("store: {type: s3}", "1:8: store: type: s3 needs bucket:, where the store is kept"),
    ("store: {type: s3, bucket: My_Bucket}", '1:27: store.bucket: "My_Bucket" is not the name of a '
     "bucket: 3 to 63 lower-case letters, digits, dots and dashes"),
    ("store: {type: s3, bucket: runs, endpoint: s3.example.com}", '1:43: store.endpoint: '
     '"s3.example.com" is no address; write for example https://s3.example.com'),
    ("store: {type: s3, bucket: runs, region: Frankfurt am Main}", '1:41: store.region: '
     '"Frankfurt am Main" is no region; write for example eu-central-1'),
    ("store: {type: postgres}", '1:15: store.type: "postgres" is none of local, sqlite, s3'),
    ("store: {type: sqlite}", "1:8: store: type: sqlite needs path:, the database file"),
    ("store: {type: sqlite, path: /srv/runs}", "1:8: store: path: the name of a database file ends "
     "in .db; write for example /srv/runs.db"),
    ("store: {path: ~/x}", '1:15: store.path: "~/x": the home folder depends on who reads this; '
                           'write the path from "/"'),
    ("scheduler: {timezone: Mars}", None),
    ("scheduler: {max_concurrent: many}",
     '1:29: scheduler.max_concurrent: "many" is not a whole number from 0 to 1000000'),
    ("metrics: {enabled: yes}", '1:20: metrics.enabled: "yes" is a text here (as YAML 1.2 has it); '
                                "write true"),
    ("metrics: {max-jobs: 0}", "1:21: metrics.max_jobs: 0 is not a whole number from 1 to 1000000"),
    ("clustering: {enabled: true}", "1:13: clustering: write leader_election:, for example "
     "etcd://h1:2379,h2:2379,h3:2379"),
    ("clustering: {leader_election: etcd://h:2379}", "1:1: clustering needs a store that all nodes "
     "share; write store: {type: s3, bucket: NAME}"),
    ("clustering: {leader_election: 'http://h:2379'}", '1:31: clustering.leader_election: '
     '"http://h:2379" is no address of etcd; write for example etcd://h1:2379,h2:2379,h3:2379, or '
     "etcds:// for TLS"),
    ("clustering: {leader_election: etcd://h, lease: 1s}",
     "1:13: clustering: lease is at least 3s and at most 10m"),
    ("clustering: {leader_election: etcd://h, user: u}",
     "1:13: clustering: user and password_file go together; write both or none"),
    ("clustering: {leader_election: etcd://h, tls: {ca: c}}",
     "1:13: clustering: tls is for a leader_election that begins with etcds://"),
    ("clustering: {leader_election: etcds://h, tls: {cert: c}}",
     "1:47: clustering.tls: cert and key go together; write both or none"),
    ("clustering: {leader_election: etcd://h, node: a b}", '1:47: clustering.node: "a b" is no '
     'name of a node; write letters, digits, ".", "_" and "-"'),
    ("mail: {host: h, user: u}",
     "1:7: mail: user and password_file go together; write both or none"),
    ("mail: {host: h, user: u, password-file: p, tls: none}",
     "1:7: mail: tls: none would send the password in clear text; remove user and password_file, "
     "or tls: none"),
    ("mail: {host: h, timeout: 5m}", "1:7: mail: timeout is at most 100s"),
    ("mail: {host: h, password: x}",
     '1:17: unknown key "password" in mail; did you mean "password_file"?'),
    ("mail: {host: h, from: x}", '1:23: mail.from: "x" is no mail address; write one alone, for '
                                 "example ops@example.com, and several as a list"),
    ("mail: {host: h, tls: ssl}", '1:22: mail.tls: "ssl" is none of starttls, tls, none'),
    ("defaults: {timeout: x}", '1:21: defaults.timeout: "x" is not a duration; '
                               "write for example 90s, 5m, 1h30m or 2d"),
    ("defaults: {command: x}",
     '1:12: "command" is not possible in defaults; write it in each job'),
    ("defaults: {directory: /x}",
     "1:12: directory is not possible here, since a job of a file has that file's folder; "
     "write it under defaults: of the file"),
])
def test_a_wrong_configuration_is_refused_where_it_is_wrong(text, expected):
    problem, = config_problems(text)
    if expected is None:
        expected = problem.split(":", 1)[1] if ":1:23: scheduler.timezone: " in problem else ""
    assert problem == f"config.yml:{expected}"


def test_all_problems_of_a_configuration_are_reported():
    assert [problem.split(": ")[0] for problem in config_problems(
        "server: {host: 'a b', port: x}\nclustering: {}\nlog: {}\ndefaults: {retries: x}\n")] == [
            "config.yml:1:16", "config.yml:1:29", "config.yml:2:13", "config.yml:3:6",
            "config.yml:4:21"]


@pytest.mark.parametrize("text, tls, endpoints, prefix", [
    ("etcd://h1", False, (("h1", 2379),), "roexec"),
    ("etcd://h1:1,h2:22,10.0.0.3:333", False, (("h1", 1), ("h2", 22), ("10.0.0.3", 333)), "roexec"),
    ("etcds://[::1]:2379,[fe80::1]", True, (("::1", 2379), ("fe80::1", 2379)), "roexec"),
    ("etcd://h1:2379/", False, (("h1", 2379),), "roexec"),
    ("etcd://h1:2379/ops/roexec/", False, (("h1", 2379),), "ops/roexec"),
])
def test_an_address_of_etcd_has_endpoints_and_a_prefix(text, tls, endpoints, prefix):
    assert roexec.EtcdAddress.of(text) == roexec.EtcdAddress(
        tls=tls, endpoints=endpoints, prefix=prefix)


def test_a_cluster_is_configured_as_the_readme_has_it():
    config = roexec.read_config(
        "store: {type: s3, bucket: runs, prefix: /ops/, endpoint: 'http://127.0.0.1:9000/'}\n"
        "clustering:\n  enabled: true\n  leader-election: etcd://h1:2379,h2:2379\n"
        "  node: a\n  lease: 15s\n  advertise: https://a.example.com:8443\n", "config.yml", "/etc")
    assert (config.store.bucket, config.store.prefix, config.store.endpoint) == (
        "runs", "ops/", "http://127.0.0.1:9000")
    cluster = config.clustering
    assert (cluster.node, cluster.lease, cluster.advertise, cluster.enabled) == (
        "a", 15, "https://a.example.com:8443", True)
    assert cluster.leader_election.endpoints == (("h1", 2379), ("h2", 2379))


# Two passes.

def test_a_file_without_doubts_is_read_once_and_one_with_a_doubt_twice(monkeypatch):
    calls = []
    real = roexec.read_yaml

    def counted(text, notes=None):
        calls.append(notes is not None)
        return real(text, notes)
    monkeypatch.setattr(roexec, "read_yaml", counted)
    jobs_of("jobs: [{id: a, command: x, env: {A: b}, retries: 3, timeout: 5}]")
    assert calls == [False]
    jobs_of("jobs: [{id: a, command: x, env: {A: 1}}]")
    assert calls == [False, False, True]


# Pipelines.

STEPS = """\
pipeline:
  - id: build
    command: ./build.sh
  - id: test
    command: ./test.sh
    depends_on: [build]
  - id: deploy
    command: ./deploy.sh
    depends_on: [test]
"""


def pipeline_of(steps, rest="", **options):
    """The only job of a file with a pipeline; `steps` are flow mappings, one a line."""
    lines = "".join(f"  - {step}\n" for step in steps.splitlines())
    return jobs_of(f"id: p\n{rest}\npipeline:\n{lines}", **options)[0]


def step_problem(steps, rest=""):
    lines = "".join(f"  - {step}\n" for step in steps.splitlines())
    problems = problems_of(f"id: p\n{rest}\npipeline:\n{lines}")
    assert len(problems) == 1, problems
    return problems[0].replace("jobs.yml:", "", 1)


@pytest.mark.parametrize("text, job_id", [
    (STEPS, "jobs"), ("id: p\n" + STEPS, "p"), ("defaults: {}\n" + STEPS, "jobs"),
    ("- defaults: {}\n- id: p\n  " + STEPS.replace("\n", "\n  "), "p"),
    ("job:\n  id: p\n  " + STEPS.replace("\n", "\n  "), "p"),
    ("jobs:\n  - id: p\n    " + STEPS.replace("\n", "\n    "), "p"),
    ("- id: p\n  " + STEPS.replace("\n", "\n  "), "p")])
def test_a_pipeline_stands_wherever_a_job_does(text, job_id):
    job, = jobs_of(text)
    assert job.id == job_id
    assert [(step.id, step.command, step.depends_on) for step in job.steps().values()] == [
        ("build", "./build.sh", {}), ("test", "./test.sh", {"build": "succeeded"}),
        ("deploy", "./deploy.sh", {"test": "succeeded"})]


def test_a_pipeline_without_a_name_of_its_own_needs_an_id():
    with pytest.raises(Invalid, match="a job needs an id"):
        read_job_file(STEPS, "<stdin>", "/")


@pytest.mark.parametrize("written, expected", [
    ("build", {"build": "succeeded"}), ("[build, lint]", {"build": "succeeded",
                                                          "lint": "succeeded"}),
    ("{build: failed}", {"build": "failed"}), ("[]", {}), ("", {}),
    ("{build: finished, lint: succeeded}", {"build": "finished", "lint": "succeeded"})])
def test_what_a_step_depends_on(written, expected):
    job = pipeline_of("{id: build, command: x}\n{id: lint, command: x}\n"
                      f"{{id: c, command: x, depends-on: {written}}}")
    assert job.steps()["c"].depends_on == expected


@pytest.mark.parametrize("steps, expected", [
    ("{id: a, command: x}\n{id: a, command: y}",
     '5:10: pipeline.id: "a" is taken by the step in line 4'),
    ("{id: build, command: x}\n{id: b, command: x, depends_on: [biuld]}",
     '5:38: pipeline.depends_on: there is no step "biuld"; did you mean "build"?'),
    ("{id: a, command: x}\n{id: b, command: x, depends_on: {c: failed}}",
     '5:38: pipeline.depends_on: there is no step "c"'),
    ("{id: a, command: x}\n{id: b, command: x, depends_on: c}",
     '5:37: pipeline.depends_on: there is no step "c"'),
    ("{id: a, command: x, depends_on: [a]}",
     "4:38: pipeline.depends_on: a step cannot depend on itself"),
    ("{id: a, command: x}\n{id: b, command: x, depends_on: {a: done}}",
     '5:41: pipeline.depends_on.a: "done" is none of succeeded, failed, finished'),
    ("{id: a, command: x, depends_on: c}\n{id: b, command: x, depends_on: a}\n"
     "{id: c, command: x, depends_on: b}",
     "4:3: pipeline: these steps wait for one another: a -> c -> b -> a"),
    ("{command: x}", "4:5: pipeline: a step needs an id; write for example id: build"),
    ("{id: a}", "4:5: pipeline: a step needs a command, or job: and the id of one"),
    ("{id: a, command: x, job: b}",
     "4:5: pipeline: a step has either a command or a job; remove one of them"),
    ("{id: a, job: b, retries: 2}", "4:30: pipeline.retries: it is not possible in a step that "
                                    "runs a job; write it in that job"),
    ("{id: a, command: x, schedule: x}",
     '4:25: "schedule" is not possible in a step; write it beside pipeline:'),
    ("{id: a, command: x, params: {}}",
     '4:25: "params" is not possible in a step; write it beside pipeline:'),
    ("{id: a, command: x, pipeline: []}",
     '4:25: "pipeline" is not possible in a step; write it beside pipeline:'),
    ("{id: a, command: x, depend_on: b}",
     '4:25: unknown key "depend_on" in a step; did you mean "depends_on"?'),
    ("{id: a, command: x, retries: -1}",
     "4:34: pipeline.retries: -1 is not a whole number from 0 to 1000000"),
    ("make", '4:5: pipeline: "make" is no step; write id:, command: and depends_on:')])
def test_a_wrong_step_is_refused_where_it_stands(steps, expected):
    assert step_problem(steps) == expected


@pytest.mark.parametrize("lines, expected", [
    ("fail_fast: true", '4:3: "fail_fast" is for jobs with a pipeline; remove it'),
    ("parallel: 2", '4:3: "parallel" is for jobs with a pipeline; remove it'),
    ("depends_on: [b]", '4:3: unknown key "depends_on" in a job; it belongs to the steps of a '
                        "pipeline: write both below pipeline:"),
    ("pipeline: [{id: a, command: x}]",
     '3:3: "command" beside pipeline: means nothing; write it in the steps')])
def test_what_is_wrong_about_a_pipeline_in_a_job(lines, expected):
    assert problem_of(lines) == expected


@pytest.mark.parametrize("written", ["[]", "{a: x}", "make"])
def test_a_pipeline_is_a_list_of_steps(written):
    assert problems_of(f"job:\n  id: a\n  pipeline: {written}\n") == [
        "jobs.yml:3:13: pipeline: a pipeline is a list of steps; write for example "
        "- {id: build, command: make}"]


@pytest.mark.parametrize("line", ["success: {exit_codes: 3}", "limits: {files: 9}", "stdin: x",
                                  "leftovers: kill", "if_lost: rerun"])
def test_what_is_about_a_command_stands_in_the_steps(line):
    key = line.partition(":")[0]
    assert step_problem("{id: a, command: x}", line) == (
        f'2:1: "{key}" beside pipeline: means nothing; write it in the steps')


def test_a_step_takes_over_who_and_where_from_its_pipeline_and_nothing_else():
    job = pipeline_of(
        "{id: a, command: x}\n{id: b, command: x, env: {B: 3}, directory: /tmp, user: eve, retries: 1}",
        "env: {A: 1, B: 2}\nenv_from: {host: H}\ndirectory: /srv\nuser: bob\n"
        'group: g\numask: "027"\nshell: bash\ntimezone: UTC\nparams: {P: 1}\nnice: 5\n'
        "inherit_env: [L]\ntimeout: 1h\nretries: 3\non_failure: x\ncondition: c\nname: n\ntags: t")
    a, b = job.steps().values()
    assert a.spec == {
        "id": "a", "timezone": "UTC", "command": "x", "shell": "bash", "directory": "/srv",
        "user": "bob", "group": "g", "nice": 5, "umask": "027", "env": {"A": "1", "B": "2"},
        "env_from": {"host": "H"}, "inherit_env": ["L"], "params": {"P": "1"}}
    assert (b.env, b.directory, b.user, b.retries) == ({"A": "1", "B": "3"}, "/tmp", "eve", 1)
    assert (job.timeout, job.retries, a.timeout, a.retries, a.hooks) == (3600, 3, None, 0, {})


@pytest.mark.parametrize("fold", ["file", "configuration"])
def test_defaults_of_commands_are_those_of_steps(fold):
    defaults = {"timeout": "1m", "retries": 2, "limits": {"files": 9}, "env": {"A": "1"},
                "on_failure": "x", "if_lost": "rerun", "max_concurrent": 3}
    steps = "{id: a, command: x, retries: 0}\n{id: b, job: c}"
    if fold == "file":
        job = pipeline_of(steps, f"defaults: {json.dumps(defaults)}")
    else:
        below = read_config(json.dumps({"defaults": defaults}), "config.yml", "/").defaults
        job = roexec.effective(pipeline_of(steps), below)
    a, b = job.steps().values()
    assert (job.timeout, job.retries, job.max_concurrent, job.env) == (None, 0, 3, {"A": "1"})
    assert list(job.hooks) == ["on_failure"] and not a.hooks
    assert (a.timeout, a.retries, a.limits.files, a.env, a.if_lost) == (60, 0, 9, {"A": "1"},
                                                                        "rerun")
    assert (b.timeout, b.retries) == (None, 0)


def test_a_pipeline_can_be_exported_and_read_again():
    job = pipeline_of("{id: a, command: x, hooks: {on_failure: [x, {condition: y}]}}\n"
                      "{id: b, job: c, depends_on: {a: finished}}",
                      "parallel: 2\nparams: {P: {type: integer, default: 3}, S: {secret: true}}")
    assert jobs_of(roexec.job_to_yaml([job])) == [job]


def test_jobs_that_steps_run_and_that_do_not_exist_are_named():
    job = pipeline_of("{id: a, job: bakcup}\n{id: b, command: x, on_failure: {run: c}}\n"
                      "{id: d, job: backup}")
    assert roexec.check_references(job, {"backup"}) == [
        'step "a" of job "p" runs the job "bakcup", which does not exist; did you mean "backup"?',
        'hooks.on_failure of step "b" of job "p" runs the job "c", which does not exist']


@pytest.mark.parametrize("steps_of, cycle", [
    ({"p": "{id: a, job: p}"}, "p -> p"),
    ({"p": "{id: a, job: q}", "q": "{id: a, command: x}\n{id: b, job: p}"}, "p -> q -> p"),
    ({"p": "{id: a, command: x, on_failure: {run: p}}"}, "p -> p"),
    ({"p": "{id: a, job: q}", "q": "{id: a, job: r}", "r": "{id: a, job: x}"}, None)])
def test_a_pipeline_that_would_start_itself_is_named(steps_of, cycle):
    jobs = {name: roexec.Job({**pipeline_of(steps).spec, "id": name})
            for name, steps in steps_of.items()}
    said = roexec.check_starts({**jobs, "x": Job({"id": "x", "command": "x"})})
    if cycle is None:
        assert said is None
    else:
        assert said.startswith("the job ") and set(said.partition(": ")[2].split(" -> ")) == set(
            cycle.split(" -> "))


# Parameters.

def test_the_default_of_a_parameter_is_its_text_as_written():
    job = job_of("params: {A: 1.10, B: 0755, C: True, D: \"\", E: {default: 1e3}, F: {}}")
    assert {name: param.default for name, param in job.params.items()} == {
        "A": "1.10", "B": "0755", "C": "True", "D": "", "E": "1e3", "F": None}


@pytest.mark.parametrize("written, expected", [
    ("{A: }", '4:15: params.A: no value; write "" for an empty one, or {} for one that a start has '
              "to give"),
    ("{A: {secret: true, default: x}}", "4:15: params.A: a secret has no default, which the store "
                                        "would keep; let a start give it"),
    ("{A: {type: integer, default: x}}",
     '4:15: params.A: its default is not an integer (it is "x")'),
    ("{A: {values: [a, b], default: c}}",
     '4:15: params.A: its default is none of a, b (it is "c")'),
    ("{A: {type: date}}", '4:22: params.A.type: "date" is none of text, integer, number, boolean'),
    ("{A-B: x}", '4:17: params.A-B: "A-B" cannot be a parameter; its name has letters, digits '
                 "and _"),
    ("{ROEXEC_X: x}", '4:22: params.ROEXEC_X: "ROEXEC_X" is set by roexec itself; choose another '
                      "name"),
    ("[A]", '4:11: params: a list stands where "NAME: default" lines are wanted')])
def test_a_wrong_parameter_is_refused(written, expected):
    assert problem_of(f"params: {written}") == expected


def test_a_schedule_needs_a_default_of_each_parameter():
    assert problem_of("params: {A: {}}, schedule: '@daily'".replace(", s", "\n  s")) == (
        "4:11: params: A has no default, and a schedule gives none; write one")


@pytest.mark.parametrize("spec, given, problems", [
    ({"A": "x"}, {}, []), ({"A": "x"}, {"A": "y", "B": "z"}, []),
    ({"A": {}}, {}, ["the parameter A has no default; give it with --env A=VALUE"]),
    ({"A": {"secret": True}}, {}, ["the parameter A has no default; give it with --env A"]),
    ({"A": {"secret": True}}, {"A": None}, []),
    ({"A": {"type": "integer"}}, {"A": "-12"}, []),
    ({"A": {"type": "integer"}}, {"A": "1.5"}, ['the parameter A is not an integer (it is "1.5")']),
    ({"A": {"type": "integer"}}, {"A": "12\n"}, ['the parameter A is not an integer '
                                                  '(it is "12\n")']),
    ({"A": {"type": "number"}}, {"A": "-1.5e3"}, []),
    ({"A": {"type": "boolean"}}, {"A": "true"}, []),
    ({"A": {"type": "boolean"}}, {"A": "yes"}, ['the parameter A is not a boolean (it is "yes")']),
    ({"A": {"values": ["a", "b"]}}, {"A": "c"},
     ['the parameter A is none of a, b (it is "c")']),
    ({"A": {"secret": True, "type": "integer"}}, {"A": "s3cret"},
     ["the parameter A is not an integer"])])
def test_what_is_given_is_checked(spec, given, problems):
    assert Job({"id": "a", "command": "x", "params": spec}).problems_of(given) == problems
