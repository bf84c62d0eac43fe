"""Crontabs as job files: what cron(8) makes of their lines, and what is said about them."""
import calendar
import datetime
import functools
import random
from datetime import timezone

import pytest

import roexec
from roexec import Cron, get_zone, iter_slots, load_yaml, read_crontab, read_job_file

UTC = timezone.utc
NIGHT = "0 2 * * *"


def imported(text, owner="me"):
    """The Crontab of a text, and what is in its job file: {id: Job}."""
    crontab = read_crontab(text, "tab", owner, "me")
    file = read_job_file(crontab.text, "jobs.yml", "/")
    assert file.warnings == []
    return crontab, {job.id: job for job in file.jobs}


def the_job(*lines, owner="me"):
    """The only job of some lines, which is complete."""
    crontab, jobs = imported("\n".join(lines) + "\n", owner)
    assert crontab.complete, crontab.notes
    job, = jobs.values()
    return job


def notes_of(*lines, owner="me"):
    return [note.partition(": ")[2] for note in
            imported("\n".join(lines) + "\n", owner)[0].notes]


# What Debian ships.

SYSTEM = """\
# /etc/crontab: system-wide crontab
# Unlike any other crontab you don't have to run the `crontab'
# command to install the new version when you edit this file
# and files in /etc/cron.d. These files also have username fields,
# that none of the other crontabs do.

SHELL=/bin/sh
PATH=/usr/local/sbin:/usr/local/bin:/sbin:/bin:/usr/sbin:/usr/bin

# Example of job definition:
# .---------------- minute (0 - 59)
# |  .------------- hour (0 - 23)
# |  |  .---------- day of month (1 - 31)
# |  |  |  .------- month (1 - 12) OR jan,feb,mar,apr ...
# |  |  |  |  .---- day of week (0 - 6) (Sunday=0 or 7) OR sun,mon,tue,wed,thu,fri,sat
# |  |  |  |  |
# *  *  *  *  * user-name command to be executed
17 *\t* * *\troot\tcd / && run-parts --report /etc/cron.hourly
25 6\t* * *\troot\ttest -x /usr/sbin/anacron || { cd / && run-parts --report /etc/cron.daily; }
47 6\t* * 7\troot\ttest -x /usr/sbin/anacron || { cd / && run-parts --report /etc/cron.weekly; }
52 6\t1 * *\troot\ttest -x /usr/sbin/anacron || { cd / && run-parts --report /etc/cron.monthly; }
#
"""


def test_debians_system_crontab_is_carried_over_whole_for_root():
    crontab = read_crontab(SYSTEM, "/etc/crontab", None, "root")
    assert (crontab.notes, crontab.complete) == ([], True)
    head, body = crontab.text.split("\njobs:\n")
    assert body == """\
  - id: run-parts
    schedule: "17 * * * *"
    command: "cd / && run-parts --report /etc/cron.hourly"
  - id: run-parts-2
    schedule: "25 6 * * *"
    command: "test -x /usr/sbin/anacron || { cd / && run-parts --report /etc/cron.daily; }"
  - id: run-parts-3
    schedule: "47 6 * * 7"
    command: "test -x /usr/sbin/anacron || { cd / && run-parts --report /etc/cron.weekly; }"
  - id: run-parts-4
    schedule: "52 6 1 * *"
    command: "test -x /usr/sbin/anacron || { cd / && run-parts --report /etc/cron.monthly; }"
"""
    assert head.startswith("# Made of the crontab /etc/crontab.") and "cron's own rules" in head
    assert load_yaml(head) == {"defaults": crontab.defaults} == {"defaults": {
        "directory": "~", "max_concurrent": 0,
        "env": {"PATH": "/usr/local/sbin:/usr/local/bin:/sbin:/bin:/usr/sbin:/usr/bin"}}}


def test_jobs_of_another_user_name_it_and_are_told_line_by_line():
    lines = SYSTEM + "* * * * * www-data [ -x /usr/lib/php/sessionclean ]; /bin/php-clean\n"
    crontab, jobs = imported(lines, owner=None)
    assert len(crontab.notes) == 5 and crontab.complete
    assert crontab.notes[0] == "tab:18: it runs as root, which takes a server that root runs"
    assert all(job.enabled for job in jobs.values())
    assert [job.user for job in jobs.values()] == ["root"] * 4 + ["www-data"]
    assert "\n  # line 23: it runs as www-data, " in crontab.text
    assert jobs["php-clean"].command == "[ -x /usr/lib/php/sessionclean ]; /bin/php-clean"


def test_root_is_told_nothing_of_the_users_of_its_jobs_and_has_none_itself():
    crontab = read_crontab(SYSTEM + "* * * * * www-data /bin/true\n", "tab", None, "root")
    assert [spec.get("user") for spec in crontab.jobs] == [None] * 4 + ["www-data"]
    assert not crontab.notes


USER = """\
# use /bin/bash to run commands, instead of the default /bin/sh
SHELL=/bin/bash
# mail any output to `paul', no matter whose crontab this is
MAILTO=paul
#
# run five minutes after midnight, every day
5 0 * * *       $HOME/bin/daily.job >> $HOME/tmp/out 2>&1
# run at 2:15pm on the first of every month -- output mailed to paul
15 14 1 * *     $HOME/bin/monthly
# run at 10 pm on weekdays, annoy Joe
0 22 * * 1-5    mail -s "It's 10pm" joe%Joe,%%Where are your kids?%
23 0-23/2 * * * echo "run 23 minutes after midn, 2am, 4am ..., everyday"
5 4 * * sun     echo "run at 5 after 4 every Sunday"
0 */4 1 * mon   echo "run every 4th hour on the 1st and on every Monday"
0 0 */2 * sun   echo "run at midn on every Sunday that's an uneven date"
# Run on every second Saturday of the month
0 4 8-14 * *    test $(date +\\%u) -eq 6 && echo "2nd Saturday"
"""


def test_the_examples_of_the_manual_are_carried_over():
    crontab, jobs = imported(USER)
    assert crontab.complete and len(crontab.notes) == 1 and len(jobs) == 8
    assert crontab.notes[0].startswith("tab:4: MAILTO: nothing is mailed")
    assert list(jobs) == ["daily.job", "monthly", "mail", "echo", "echo-2", "echo-3", "echo-4",
                          "echo-5"]
    assert jobs["mail"].command == 'mail -s "It\'s 10pm" joe'
    assert jobs["mail"].stdin == "Joe,\n\nWhere are your kids?\n"
    assert jobs["mail"].description == "run at 10 pm on weekdays, annoy Joe"
    assert jobs["echo-5"].command == 'test $(date +%u) -eq 6 && echo "2nd Saturday"'
    assert jobs["echo"].description is None and jobs["echo"].shell == ("/bin/bash", "-c")
    assert [jobs[name].schedule for name in ("echo-3", "echo-4")] == [
        ("0 */4 1 * mon",), ("0 0 */2 * sun",)]
    for job in jobs.values():
        assert (job.directory, job.max_concurrent, job.enabled) == ("~", 0, True)
        assert job.env == {"PATH": "/usr/bin:/bin", "SHELL": "/bin/bash"}
    assert crontab.text.count("/bin/bash") == 2         # said once, as shell and variable


# Comments.

@pytest.mark.parametrize("lines, description", [
    (["# one"], "one"), (["#one", "#", "##  two  "], "one\n\ntwo"),
    (["#####", "# one", "#####"], "one"), (["  # one"], "one"),
    (["# one", ""], None), (["# one", "A=b"], None), (["# m h  dom mon dow   command"], None),
    (["# old", "#0 5 * * 1 tar -zcf /x /home", "# new"], "new"), (["# 5 old ones"], "5 old ones"),
    (["# @daily old"], None),
    (["# a: b", "# - \"c\" \\"], "a: b\n- \"c\" \\")])
def test_the_comment_above_a_job_is_its_description(lines, description):
    assert the_job(*lines, f"{NIGHT} x").description == description


def test_only_the_next_job_has_the_comment():
    _, jobs = imported(f"# one\n{NIGHT} a\n{NIGHT} b\n")
    assert [job.description for job in jobs.values()] == ["one", None]


# Variables.

@pytest.mark.parametrize("line, name, value", [
    ("A=b", "A", "b"), ("A = b  c  ", "A", "b  c"), (" \tA\t=b", "A", "b"),
    ("A=b # c", "A", "b # c"),
    ("A='b c'", "A", "b c"), ('A="b" ', "A", "b"), ('A=" b  "', "A", " b"), ('A=""', "A", ""),
    ("A=\"'b'\"", "A", "b"), ("'A B'=c", None, None), ('"A"="c"', "A", "c"),
    ("A=b'c'", "A", "b'c'"),
    ("A=b=c", "A", "b=c"), ("A=$HOME/x", "A", "$HOME/x"), ("A=0755", "A", "0755"),
    ("A=yes", "A", "yes"), ("a.b=c", "a.b", "c"), ("A=ä", "A", "ä")])
def test_variables_are_quoted_as_cron_has_it(line, name, value):
    crontab = read_crontab(f"{line}\n{NIGHT} x\n", "tab", "me", "me")
    job, = read_job_file(crontab.text, "jobs.yml", "/").jobs
    assert job.env == {"PATH": "/usr/bin:/bin", **({name: value} if name else {})}
    assert crontab.complete is (name is not None)


@pytest.mark.parametrize("line", ['A="b', "A='b'c", 'A="b" # c', "A'B", "'A=b'=c", "=b"])
def test_what_is_no_variable_and_no_entry_is_left_out(line):
    crontab, jobs = imported(f"{line}\n{NIGHT} x\n")
    assert not crontab.complete and list(jobs) == ["x"]
    assert crontab.notes[0].startswith("tab:1: left out: ")


def test_variables_hold_for_the_jobs_below_them():
    _, jobs = imported(f"A=1\n{NIGHT} a\nA=2\nPATH=/x\n{NIGHT} b\n")
    assert [job.env for job in jobs.values()] == [
        {"A": "1", "PATH": "/usr/bin:/bin"}, {"A": "2", "PATH": "/x"}]


@pytest.mark.parametrize("lines, values", [
    (["SHELL=/bin/sh"], {"shell": ("/bin/sh", "-c"), "env": {"PATH": "/usr/bin:/bin"}}),
    (["SHELL='/bin/my sh'"], {"shell": ("/bin/my sh", "-c")}),
    (["HOME=/srv"], {"directory": "/srv",
                     "env": {"PATH": "/usr/bin:/bin", "HOME": "/srv"}}),
    (["CRON_TZ=Asia/Tokyo"], {"schedule": (f"CRON_TZ=Asia/Tokyo {NIGHT}",), "timezone": None,
                              "env": {"PATH": "/usr/bin:/bin"}}),
    (["CRON_TZ=Asia/Tokyo", 'CRON_TZ=""'], {"schedule": (NIGHT,)}),
    (["TZ=Asia/Tokyo"], {"schedule": (NIGHT,), "timezone": None,
                         "env": {"PATH": "/usr/bin:/bin", "TZ": "Asia/Tokyo"}}),
    (["RANDOM_DELAY=45"], {"jitter": 2700}), (["RANDOM_DELAY=0"], {"jitter": 0}),
    (["MAILTO=a", 'MAILFROM="b"'], {"env": {"PATH": "/usr/bin:/bin"}}),
    (["LOGNAME=a"], {"env": {"PATH": "/usr/bin:/bin"}})])
def test_variables_that_cron_itself_reads(lines, values):
    job = the_job(*lines, f"{NIGHT} x")
    assert {name: getattr(job, name) for name in values} == values


@pytest.mark.parametrize("line, note", [
    ('MAILTO=""', None), ("MAILTO=ops", "MAILTO: nothing is mailed, "),
    ("A=", 'cron wants A="" for an empty value'), ("CRON_TZ=UTC", "CRON_TZ is the zone of"),
    ("RANDOM_DELAY=5", "RANDOM_DELAY becomes jitter"), ("LOGNAME=x", "cron sets LOGNAME itself"),
    ("ROEXEC_SLOT=x", 'left out: "ROEXEC_SLOT" is set by roexec itself')])
def test_of_a_variable_it_is_said_what_changes(line, note):
    notes = notes_of(line, f"{NIGHT} x")
    assert len(notes) == (note is not None) and (note is None or notes[0].startswith(note))


@pytest.mark.parametrize("line, sentence", [
    ("CRON_TZ=Mars/Base", '"Mars/Base" is no time zone'), ("RANDOM_DELAY=soon", "no number of"),
    ("SHELL=bash", 'no path from "/"'), ("HOME=here", 'no path from "/"')])
def test_jobs_that_a_variable_makes_impossible_are_left_out(line, sentence):
    crontab, jobs = imported(f"{line}\n{NIGHT} x\n")
    assert not jobs and not crontab.complete and sentence in crontab.notes[-1]
    assert crontab.text.endswith("\njobs: []\n")


# Commands.

@pytest.mark.parametrize("written, command, stdin", [
    ("a  b ", "a  b ", None), ("a # b", "a # b", None), (r"a \% b", "a % b", None),
    ("a%", "a", None), ("a%b", "a", "b\n"), ("a%b%", "a", "b\n"), ("a%%b", "a", "\nb\n"),
    (r"a%b\%c%d", "a", "b%c\nd\n"), (r"a%b\c", "a", "b\\c\n"), (r"a%\\%b", "a", "\\%b\n"),
    (r"a \n b", r"a \n b", None), (r"a \\ b", r"a \ b", None), (r"a \\%b", "a \\", "b\n"),
    (r"a \\\% b", r"a \% b", None), ("a \\", "a \\", None), ("a%%%", "a", "\n\n"),
    ("a%b\\", "a", "b\\\n"), ("a%%\\", "a", "\n\\"), ("A=1 b", "A=1 b", None),
    ("a\tb: 'c'", "a\tb: 'c'", None)])
def test_percent_signs_and_backslashes_are_those_of_cron(written, command, stdin):
    job = the_job(f"{NIGHT}  {written}")
    assert (job.command, job.stdin) == (command, stdin)
    assert ("cron makes one backslash of two, and the job has it so"
            in notes_of(f"{NIGHT} {written}")) is ("\\\\" in written.partition("a%")[0])


@pytest.mark.parametrize("command, job_id", [
    ("/usr/local/bin/backup.sh --all", "backup.sh"), ("cd /srv/app && ./run daily", "run"),
    ("[ -x /bin/a ] && /bin/a -q", "a"), ("nice -n 10 ionice -c3 /bin/dump", "dump"),
    ("A=b C=d /bin/x", "x"), ("/usr/bin/php -f /srv/cron.php", "cron.php"),
    ("if [ -d /x ]; then certbot -q renew; fi", "certbot"), ("(cd /x; tar c .) | gzip", "tar"),
    ("test -e /run/systemd/system || SERVICE_MODE=1 /usr/lib/e2scrub_all_cron", "e2scrub_all_cron"),
    ("command -v debian-sa1 > /dev/null && debian-sa1 1 1", "debian-sa1"), (":", "job"),
    ("/usr/bin/latest", "job"), ("'/opt/a b'", "a"), ("ä", "job"), ("x" * 70, "x" * 64)])
def test_a_job_is_called_after_its_program(command, job_id):
    assert the_job(f"{NIGHT} {command}").id == job_id


def test_ids_are_unique():
    _, jobs = imported(f"{NIGHT} a\n{NIGHT} a\n{NIGHT} a-2\n{NIGHT} {'x' * 64}\n"
                       f"{NIGHT} {'x' * 64}\n")
    assert list(jobs) == ["a", "a-2", "a-2-2", "x" * 64, "x" * 58 + "-2"]


# Lines.

@pytest.mark.parametrize("line, sentence", [
    ("* * * *", "cron wants five fields and a command"), (NIGHT, "five fields and a command"),
    (f"{NIGHT} %x", "there is no command"), ("@daily", "cron wants a command"),
    ("@every 5m x", 'cron knows no "@every"'), ("@Daily x", 'did you mean "@daily"?'),
    ("* * * * * * x", 'begins with "*"'), ("60 * * * * x", 'minute: cron refuses "60"'),
    ("5/15 * * * * x", "write 5-59/15"), ("* * L * * x", 'day of month: cron refuses "L"'),
    ("H * * * * x", 'minute: cron refuses "H"'), ("* * ? * * x", 'cron refuses "?"'),
    ("* * * * 5L x", 'day of week: cron refuses "5L"'), ("* * * * monday x", "refuses"),
    ("1, * * * * x", "refuses"), ("1- * * * * x", "refuses"), ("*/0 * * * * x", "refuses"),
    ("*/x * * * * x", "refuses"), ("* * 0 * * x", "refuses"), ("5-64/30 * * * * x", "refuses"),
    ("0 0 30 2 * x", "a day that never comes"), ("0 0 * * fri-sun x", "never fires"),
    ("٣ * * * * x", "which is not ASCII")])
def test_what_cron_refuses_or_never_starts_is_left_out_and_told(line, sentence):
    crontab, jobs = imported(f"\n{line}\n{NIGHT} kept\n")
    assert list(jobs) == ["kept"] and not crontab.complete
    note, = crontab.notes
    assert note.startswith("tab:2: left out: ") and sentence in note


@pytest.mark.parametrize("line, sentence", [
    (f"{NIGHT} root", '"root" is read as the user, and there is no command'),
    (f"{NIGHT} /bin/x y", '"/bin/x" is no user')])
def test_a_system_crontab_names_a_user_in_each_line(line, sentence):
    assert sentence in imported(line + "\n", owner=None)[0].notes[0]


@pytest.mark.parametrize("text, note", [
    (f"{NIGHT} x", "tab:1: the file does not end in a newline"),
    (f"\r\n{NIGHT} x\r\n", "tab:1: a carriage return ends the line")])
def test_ends_of_lines_that_cron_minds_are_told(text, note):
    crontab, jobs = imported(text)
    assert len(crontab.notes) == 1 and crontab.notes[0].startswith(note)
    assert jobs["x"].command == "x"


def test_an_empty_crontab_is_a_job_file_without_jobs():
    for text in ("", "# nothing\n\n"):
        crontab, jobs = imported(text)
        assert (jobs, crontab.notes, crontab.complete) == ({}, [], True)


def test_what_is_not_utf8_is_refused_with_its_line():
    with pytest.raises(roexec.RoexecError, match="tab:2: this is not UTF-8"):
        read_crontab(b"# one\n# \xe4\n", "tab", "me", "me")


def test_control_characters_reach_neither_notes_nor_comments_of_the_file():
    crontab, jobs = imported(f"{NIGHT} \x1b[2J\n60 \x1b * * * x\n")
    assert "\x1b" not in crontab.text + "".join(crontab.notes)
    assert [job.command for job in jobs.values()] == ["\x1b[2J"]


# Schedules.

@pytest.mark.parametrize("written, schedule", [
    ("*/5/2 5* * * *", "*/5 5 * * *"), ("0 0 * * mon#2", "0 0 * * mon"),
    ("1-5-7 ** 1-3? * *", "1-5 * 1-3 * *"), ("007 0 * * *", "7 0 * * *"),
    ("0-10/60 * * * *", "0 * * * *"), ("* */24 * * *", "* 0 * * *"),
    ("0 0 */40 * 1", "0 0 */31 * 1"), ("0 0 * */13 */9", "0 0 * */12 */7"),
    ("0 0 13 * fri-sun", "0 0 13 * *"), ("0 0 5-3 * 1", "0 0 * * 1"),
    ("0 0 5-3,* * 1", "0 0 1-31 * 1"), ("30-20,7 0 * * *", "7 0 * * *")])
def test_what_cron_reads_carelessly_is_told_and_meant(written, schedule):
    assert the_job(f"{written} x").schedule == (schedule,)
    assert any("cron reads" in note for note in notes_of(f"{written} x"))


@pytest.mark.parametrize("written", [
    "*/15 08-18 1,15 JAN-mar,dec mon-Fri", "00 0-23/2 * * 7", "5,* 5-5 31 * 0-7", "@reboot",
    "@hourly", "@midnight", "@annually"])
def test_what_is_usual_stays_as_it_is_written(written):
    assert the_job(f"{written} x").schedule == (written,)
    assert notes_of(f"{written} x") == []


@pytest.mark.parametrize("schedule, differs", [
    ("0,30 2 * * *", True), ("0 2,3 * * *", True), ("*/5 2 * * *", False), ("0,30 14 * * *", False),
    ("30 2 * * *", False), ("0 1,3 * * *", False), ("0,30 * * * *", False), ("0-59 0 1 * *", True)])
def test_the_one_difference_after_a_gap_is_told(schedule, differs):
    notes = notes_of(f"{schedule} x")
    assert any("once right after the gap; Debian's cron" in note for note in notes) is differs


# The oracle: cron's own way to read fields, a character at a time, and a table of local minutes.

LIMITS = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))
NAMES = ({}, {}, {}, {name.lower(): number for number, name in enumerate(calendar.month_abbr)},
         {name: number for number, name in enumerate("sun mon tue wed thu fri sat".split())})


class Refused(Exception):
    pass


def oracle_number(chars, names):
    token = ""
    while chars and chars[0].isalnum():
        token += chars.pop(0)
    if token.lower() in names:
        return names[token.lower()]
    if not token.isdigit():
        raise Refused
    return int(token)


def oracle_field(word, limits, names):
    low, high = limits
    chars, numbers = list(word), set()
    while True:
        begin, end, step = low, high, 1
        if chars[:1] == ["*"]:
            chars.pop(0)
        else:
            begin = end = oracle_number(chars, names)
            if chars[:1] == ["/"]:
                raise Refused
            if chars[:1] == ["-"]:
                chars.pop(0)
                end = oracle_number(chars, names)
            elif chars[:1] == ["/"]:
                raise Refused
        if chars[:1] == ["/"]:
            chars.pop(0)
            step = oracle_number(chars, {})
        if step == 0 or not (low <= begin <= high and low <= end <= high):
            raise Refused
        numbers.update(range(begin, end + 1, step))
        if chars[:1] != [","]:
            return numbers
        chars.pop(0)


@functools.lru_cache(None)
def local_minutes(zone, year):
    """{local minute: [UTC seconds]} of a year; what no clock shows has the instant after it."""
    zone, table = get_zone(zone), {}
    begin = datetime.datetime(year, 1, 1)
    for instant in range(START - 86400, END + 86400, 60):
        local = datetime.datetime.fromtimestamp(instant, zone).replace(tzinfo=None)
        table.setdefault((local - begin) // datetime.timedelta(minutes=1), []).append(instant)
    for minute in range(max(table) - 1440, min(table), -1):
        table.setdefault(minute, (None, table[minute + 1][0] or table[minute + 1][1]))
    return table


START, END = 1704067200, 1735689600         # the year 2024, in UTC


def oracle_slots(words, zone):
    """The instants at which cron starts an entry in 2024, and whether it follows the clock."""
    fields = [oracle_field(*field) for field in zip(words, LIMITS, NAMES)]
    minutes, hours, dates, months, weekdays = fields
    follows = words[0][0] == "*" or words[1][0] == "*"
    table, slots = local_minutes(zone, 2024), set()
    for day in range(-1, 367):
        date = datetime.date(2024, 1, 1) + datetime.timedelta(day)
        of_month, of_week = date.day in dates, bool({date.isoweekday(),
                                                     date.isoweekday() % 7} & weekdays)
        both = words[2][0] == "*" or words[4][0] == "*"
        if date.month in months and (of_month and of_week if both else of_month or of_week):
            for hour in hours:
                for minute in minutes:
                    found = table.get(day * 1440 + hour * 60 + minute, ())
                    if found and found[0] is None:          # in a gap
                        slots.update(found[1:] * (not follows))
                    else:
                        slots.update(found if follows else found[:1])
    return sorted(slot for slot in slots if START <= slot < END), follows


def random_field(chance, index):
    low, high = LIMITS[index]

    def number():
        names = [name for name in NAMES[index] if name]
        if names and chance.random() < 0.3:
            return chance.choice(names)
        return str(chance.randint(low, high + (chance.random() < 0.02)))

    def item():
        kind = chance.random()
        text = number() if kind < 0.5 else f"{number()}-{number()}" if kind < 0.8 else "*"
        if kind >= 0.5 and chance.random() < 0.5 or chance.random() < 0.02:
            text += f"/{chance.choice([1, 2, 3, 5, 7, 15, 31, 40, 90])}"
        return text

    if chance.random() < (0.25, 0.3, 0.6, 0.7, 0.6)[index]:
        return "*"
    text = ",".join(item() for _ in range(chance.choice([1, 1, 2, 3])))
    return text + (chance.choice(["*", "/2", "x", "#3", "-", "-4"])
                   if chance.random() < 0.08 else "")


@pytest.mark.parametrize("zone", ["Europe/Berlin", "Australia/Lord_Howe"])
def test_jobs_start_at_exactly_the_instants_at_which_cron_starts_them(zone):
    chance, compared, carelessly, refused = random.Random(zone), 0, 0, 0
    while compared < 50:
        words = [random_field(chance, index) for index in range(5)]
        if chance.random() < 0.3:
            words[1] = chance.choice(["1", "2", "1,2", "2-3"])      # where most gaps are
        crontab, jobs = imported(" ".join(words) + " x\n")
        try:
            if len(oracle_field(words[0], LIMITS[0], {})
                   ) * len(oracle_field(words[1], LIMITS[1], {})) > 60:
                continue                # too many for a test
            slots, _ = oracle_slots(words, zone)
        except Refused:
            assert not jobs, words
            refused += 1
            continue
        if not jobs:
            assert not slots, words
            continue
        if any("at a change of clocks" in note for note in crontab.notes):
            continue
        assert list(iter_slots(jobs["x"], START, END, get_zone(zone))) == slots, words
        compared += 1
        carelessly += any("cron reads" in note for note in crontab.notes)
    assert carelessly > 5 and refused > 5


def test_the_job_of_a_star_that_a_step_empties_is_fixed_and_told_so():
    assert the_job("*/60 2 * * * x").schedule == ("0 2 * * *",)
    assert any("at a change of clocks" in note for note in notes_of("*/60 2 * * * x"))
    assert not any("at a change of clocks" in note for note in notes_of("*/60 * * * * x"))


def test_macros_mean_what_their_fields_mean():
    for macro, fields in (("@hourly", "0 * * * *"), ("@daily", "0 0 * * *"),
                          ("@weekly", "0 0 * * 0"), ("@monthly", "0 0 1 * *"),
                          ("@yearly", "0 0 1 1 *")):
        zone = get_zone("Europe/Berlin")
        assert list(Cron(the_job(f"{macro} x").schedule[0]).slots(START, END, zone)) == \
            oracle_slots(fields.split(), "Europe/Berlin")[0]
