"""Where env_from takes variables from, Vault among it, and that their values are never seen."""
import base64
import json
import os
import random
import shutil
import socket
import ssl
import subprocess
import time
import tracemalloc
import urllib.parse

import pytest
from helpers import VaultServer

import roexec
from roexec import Masks, RoexecError, SecretError, resolve_environment


def resolve(*entries, vault=None, environment=(), run_command=None, **more):
    """(variables, values to mask) of sources in a folder that does not matter."""
    return resolve_environment(entries, vault=vault, user_home="/nowhere", directory="/",
                               environment=dict(environment), run_command=run_command, **more)


def refusal_of(*entries, **more):
    """The sentence that says why there are no variables."""
    with pytest.raises(SecretError) as caught:
        resolve(*entries, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def write(tmp_path):
    """`write(content, name)` -> the path of a file that only its owner may change."""
    def call(content, name="x.env", mode=0o600):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        path.chmod(mode)
        return str(path)
    return call


# Files of variables.

@pytest.mark.parametrize("text, expected", [
    ("", {}),
    ("\n# no\n ; no\n\t\n", {}),
    ("A=1\nB=two words \n", {"A": "1", "B": "two words"}),
    ("A=1", {"A": "1"}),
    ("A=1\r\nB='x\r\ny'\r\n", {"A": "1", "B": "x\ny"}),
    ("\ufeffA=1", {"A": "1"}),
    ("export A=1\n  export\tB = 2", {"A": "1", "B": "2"}),
    ("export=1", {"export": "1"}),
    ("A=\nB= \nC=''\nD=\"\"", {"A": "", "B": "", "C": "", "D": ""}),
    ("A=x=y\nB=it's \"here\"\nC=a#b\nD=#e", {"A": "x=y", "B": "it's \"here\"", "C": "a#b",
                                             "D": "#e"}),
    ("A=$HOME ${X} `y`\nB='$HOME'\nC=\"$HOME\"", {"A": "$HOME ${X} `y`", "B": "$HOME",
                                                 "C": "$HOME"}),
    ("A=' a # \\n \"b\" '", {"A": ' a # \\n "b" '}),
    ("A='-----BEGIN\nx\n-----END'\nB=2", {"A": "-----BEGIN\nx\n-----END", "B": "2"}),
    ('A="say \\"hi\\", \\$5 \\`x\\` \\\\"', {"A": 'say "hi", $5 `x` \\'}),
    ('A="one \\\ntwo\nthree # x"', {"A": "one two\nthree # x"}),
    ("A.b-c=1\n_=2\nA1=ä", {"A.b-c": "1", "_": "2", "A1": "ä"}),
    ("A=1\nA=2", {"A": "2"}),
    ("A=1;B=2", {"A": "1;B=2"}),
])
def test_a_file_of_variables_is_read_as_documented(write, text, expected):
    assert resolve({"file": write(text)})[0] == expected


NO_LINE = "this is no NAME=VALUE line; a value of several lines stands in quotes"
BAD_QUOTES = ("the quotes of A do not end, or something stands behind them; for a value with "
              "quotes in it use the other kind of quotes")


@pytest.mark.parametrize("text, expected", [
    ("A=1\nhunter2", f":2: {NO_LINE}"),
    ("A='x\ny'\n\nhunter2 = 1 =\n1hunter2=3", f":5: {NO_LINE}"),
    ("=hunter2", f":1: {NO_LINE}"),
    ("export hunter2", f":1: {NO_LINE}"),
    ("A='hunter2", f":1: {BAD_QUOTES}"),
    ('A="hunter2\\"', f":1: {BAD_QUOTES}"),
    ("A= 'hunter2'x", f":1: {BAD_QUOTES}"),
    ("A='hunter2' # why", f":1: {BAD_QUOTES}"),
    ("A=hunter2 # why",
     ":1: A has a backslash or a # after a blank; put the value in single quotes"),
    ("A=hunter\\2", ":1: A has a backslash or a # after a blank; put the value in single quotes"),
    ('A="hunter2\\n"',
     ":1: A has a backslash that is read in several ways; put the value in single quotes"),
    (b"A=hunter2\xff", " is not in UTF-8"),
])
def test_what_others_would_read_otherwise_is_refused_without_showing_it(write, text, expected):
    path = write(text)
    said = refusal_of({"file": path})
    assert said == path + expected and "hunter" not in said


def test_a_nul_and_a_variable_of_roexec_itself_are_refused(write):
    assert "A of env_from holds a character that no variable" in refusal_of(
        {"file": write(b"A=x\0y")})
    assert refusal_of({"optional": True, "file": write("ROEXEC_RUN_ID=1")}) == (
        "a file of env_from sets ROEXEC_RUN_ID, which roexec sets itself")
    assert "longer than a variable can be" in refusal_of({"file": write("A=" + "x" * (128 << 10))})
    assert "holds more than 1.0 MB" in refusal_of({"file": write(b"#" * ((1 << 20) + 1))})


def test_reading_many_lines_takes_time_in_proportion():
    def seconds(count):
        data = b"".join(b"A%d='x'\n\n# c\nB = y  \n" % number for number in range(count))
        start = time.process_time()
        resolve({"command": "x"}, run_command=lambda _: data)
        return time.process_time() - start
    assert min(seconds(8000) for _ in range(3)) < 5 * min(seconds(4000) for _ in range(3))


def test_a_missing_file_is_an_error_unless_it_is_optional(tmp_path):
    path = str(tmp_path / "none.env")
    assert refusal_of({"file": path}) == (f"the file {path} of env_from does not exist; write "
                                          "optional: true if it may be missing")
    assert resolve({"file": path, "optional": True}) == ({}, set())


@pytest.mark.parametrize("mode", [0o602, 0o620, 0o666])
def test_a_file_that_others_may_write_is_refused(write, mode):
    path = write("A=1", mode=mode)
    assert refusal_of({"file": path}) == f"others may write {path}; chmod go-w {path}"
    os.chmod(path, 0o644)
    assert resolve({"file": path})[0] == {"A": "1"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_refused_unless_the_job_is_that_users(write):
    path = write("A=1")
    os.chown(path, 4711, -1)
    assert refusal_of({"file": path}) == (f"{path} belongs to 4711, who may change it; chown root "
                                          f"{path}")
    assert resolve({"file": path}, owner=4711)[0] == {"A": "1"}


def test_what_is_no_file_is_refused_at_once(tmp_path):
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    assert refusal_of({"file": fifo}) == f"{fifo} is no regular file"
    assert refusal_of({"file": str(tmp_path), "optional": True}) == (
        f"the file {tmp_path} of env_from cannot be read: Is a directory")


def test_paths_are_below_the_home_or_the_folder_of_the_job(write, tmp_path):
    write("A=1")
    for path in ("~/x.env", "x.env", str(tmp_path / "x.env")):
        assert resolve_environment([{"file": path}], vault=None, user_home=str(tmp_path),
                                   directory=str(tmp_path), environment={},
                                   run_command=None)[0] == {"A": "1"}


# The other sources, and their order.

def test_the_later_source_wins_and_what_is_masked_has_eight_characters(write):
    printed = {("get", "it"): b"A=from-command\nD=1234567\n"}
    variables, masked = resolve(
        {"file": write("A=from-file\nB=12345678")}, {"host": ["A", "C"]}, {"host": "E"},
        {"command": ["get", "it"]},
        environment={"A": "from-host", "C": "short", "E": "", "F": "no"},
        run_command=lambda command: printed[tuple(command)])
    assert variables == {"A": "from-command", "B": "12345678", "C": "short", "D": "1234567",
                         "E": ""}
    assert masked == {"from-file", "12345678", "from-host", "from-command"}


def test_a_variable_that_the_server_lacks_is_an_error_that_names_it():
    assert refusal_of({"host": ["A", "B", "C"]}, environment={"B": "1"}) == (
        "the server's environment has no A, C, which env_from takes from it")


def test_a_variable_of_the_server_may_be_no_utf_8():
    value = b"\xff12345678".decode("utf-8", "surrogateescape")
    variables, masked = resolve({"host": "A"}, environment={"A": value})
    assert variables == {"A": value}
    assert Masks(masked).feed("out", b"<\xff12345678>") == b"<***>"


def test_what_a_command_prints_is_read_like_a_file_and_its_failure_is_passed_on():
    assert refusal_of({"command": "x"}, run_command=lambda _: b"hunter2") == (
        f"the command of env_from:1: {NO_LINE}")

    def fail(command):
        raise RoexecError("it ended with 3")
    with pytest.raises(RoexecError, match="it ended with 3"):
        resolve({"command": "x"}, run_command=fail)


# Vault: a server of its own that answers as Vault does.

@pytest.fixture
def vault(write):
    """A VaultServer, with `spec` as the configuration would have it for a token."""
    server = VaultServer()
    server.spec = {"address": server.address, "token_file": write("t0k3n-of-vault\n", "token")}
    yield server
    server.close()


def paths_of(server):
    return [f"{method} {path}" for method, path, *_ in server.requests]


def test_every_key_of_a_secret_or_one_under_another_name(vault):
    variables, masked = resolve({"secret": "vault://secret/data/db"},
                                {"secret": "vault://secret/data/db#password", "as": "DB_PASSWORD"},
                                {"secret": "vault://secret/data/db#user"}, vault=vault.spec)
    assert variables == {"user": "bob", "password": "s3cr3t-Pässword",
                         "DB_PASSWORD": "s3cr3t-Pässword"}
    assert masked == {"bob", "s3cr3t-Pässword"}
    assert paths_of(vault) == ["GET /v1/secret/data/db"]        # it is read once


def test_a_request_bears_the_headers_that_vault_wants(vault):
    resolve({"secret": "vault://secret/data/db"}, vault={**vault.spec, "namespace": "team/a"})
    headers = vault.requests[0][2]
    assert headers["X-Vault-Token"] == "t0k3n-of-vault"
    assert headers["X-Vault-Request"] == "true"
    assert headers["X-Vault-Namespace"] == "team/a"


@pytest.mark.parametrize("path, asked, expected", [
    ("kv/db", ["sys/internal/ui/mounts/kv/db", "kv/db"], {"password": "old-passw0rd"}),
    ("secret/db", ["sys/internal/ui/mounts/secret/db", "secret/data/db"],
     {"user": "bob", "password": "s3cr3t-Pässword"}),
    ("deep/er/x", ["sys/internal/ui/mounts/deep/er/x", "deep/er/data/x"], {"a": "deep-value"}),
    ("deep/er/data/x", ["deep/er/data/x"], {"a": "deep-value"}),
])
def test_both_versions_of_the_engine_are_read(vault, path, asked, expected):
    assert resolve({"secret": f"vault://{path}"}, vault=vault.spec)[0] == expected
    assert paths_of(vault) == [f"GET /v1/{place}" for place in asked]


def test_where_the_mount_is_not_told_the_path_is_taken_as_it_is(vault):
    vault.answers = [(403, {"errors": ["permission denied"]})]
    assert resolve({"secret": "vault://kv/db"}, vault=vault.spec)[0] == {
        "password": "old-passw0rd"}


def test_a_secret_of_version_1_may_have_a_key_called_data(vault):
    vault.secrets["kv/data/x"] = {"data": "value-of-data", "metadata": "m"}
    assert resolve({"secret": "vault://kv/data/x"}, vault=vault.spec)[0] == {
        "data": "value-of-data", "metadata": "m"}


def test_a_path_may_have_any_letters(vault):
    vault.secrets["kv/ä+b"] = {"a": "x"}
    assert resolve({"secret": "vault://kv/ä+b"}, vault=vault.spec)[0] == {"a": "x"}
    assert vault.requests[-1][1] == "/v1/kv/%C3%A4%2Bb"


def test_numbers_are_taken_as_they_are_written(vault):
    vault.answers = [(200, b'{"data": {"a": 1.10, "b": 12345678901234567890, "c": true, "d": ""}}')]
    variables, masked = resolve({"secret": "vault://kv/data/x"}, vault=vault.spec)
    assert variables == {"a": "1.10", "b": "12345678901234567890", "c": "true", "d": ""}
    assert masked == {"1.10", "12345678901234567890", "true"}


@pytest.mark.parametrize("value, expected", [
    ({"b": "hunter2"}, 'the key "a" of vault://kv/data/x is a mapping, not a text; take the other '
                       "keys one by one"),
    (["hunter2"], 'the key "a" of vault://kv/data/x is a list, not a text; take the other keys '
                  "one by one"),
    (None, 'the key "a" of vault://kv/data/x is null, not a text; take the other keys one by one'),
    ("hunter2\0", "a of env_from holds a character that no variable can have"),
    ("hunter2\ud800", "a of env_from holds a character that no variable can have"),
])
def test_a_value_that_no_variable_can_have_is_refused_without_showing_it(vault, value, expected):
    vault.answers = [(200, {"data": {"a": value}})]
    assert refusal_of({"secret": "vault://kv/data/x"}, vault=vault.spec) == expected


@pytest.mark.parametrize("key", ["a b", "", "a=b"])
def test_a_key_that_cannot_be_a_variable_is_taken_under_another_name(vault, key):
    vault.secrets["kv/data/x"] = {key: "hunter2"}
    assert refusal_of({"secret": "vault://kv/data/x"}, vault=vault.spec) == (
        f'a secret of env_from has "{key}", which cannot be the name of a variable; take that key '
        "alone, with as: NAME")
    if key:
        assert resolve({"secret": f"vault://kv/data/x#{key}", "as": "A"}, vault=vault.spec)[0] == {
            "A": "hunter2"}


def test_a_missing_key_names_the_keys_there_are_and_no_value(vault):
    assert refusal_of({"secret": "vault://secret/data/db#passwrd"}, vault=vault.spec) == (
        'vault://secret/data/db has no key "passwrd"; it has password, user; did you mean '
        '"password"?')
    vault.secrets["secret/data/db"] = {}
    assert refusal_of({"secret": "vault://secret/data/db#a"}, vault=vault.spec) == (
        'vault://secret/data/db has no key "a"; it has no keys at all')


def test_a_secret_without_a_vault_in_the_configuration_is_refused():
    assert refusal_of({"secret": "vault://secret/data/db"}) == (
        "vault://secret/data/db is asked for, and the configuration has no vault:")


# Logging in.

def test_an_approle_logs_in_once_and_reads_with_the_token_of_the_login(vault, write):
    spec = {"address": vault.address, "role_id": "role", "namespace": "n",
            "secret_id_file": write("s3cr3t-id\n", "id")}
    variables, _ = resolve({"secret": "vault://secret/data/db"}, {"secret": "vault://kv/db"},
                           vault=spec)
    assert variables == {"user": "bob", "password": "old-passw0rd"}
    assert paths_of(vault)[0] == "POST /v1/auth/approle/login"
    assert len([path for path in paths_of(vault) if "login" in path]) == 1
    assert "X-Vault-Token" not in vault.requests[0][2]
    assert vault.requests[0][2]["X-Vault-Namespace"] == "n"
    assert {headers["X-Vault-Token"] for _, _, headers, _ in vault.requests[1:]} == {
        "t0k3n-of-role"}


def test_a_refused_login_says_where_to_look_and_not_what_was_sent(vault, write):
    path = write("wr0ng-id", "id")
    said = refusal_of({"secret": "vault://secret/data/db"}, vault={
        "address": vault.address, "role_id": "role", "secret_id_file": path})
    assert said == ("Vault refuses the login: invalid role or secret ID; look at role_id of vault "
                    f"and at {path}")


@pytest.mark.parametrize("content", ["", "t0k3n one", "t0k3n\nX-Header: 1", "t0k3nä", b"\xff"])
def test_a_file_that_holds_no_token_alone_is_refused_without_showing_it(vault, write, content):
    path = write(content, "token")
    assert refusal_of({"secret": "vault://secret/data/db"}, vault=vault.spec) == (
        f"the token_file of vault, {path}, holds no token or id alone")
    assert vault.requests == []


def test_a_token_is_read_at_each_run_and_only_from_a_file_that_others_cannot_write(vault):
    path = vault.spec["token_file"]
    os.chmod(path, 0o660)
    assert "others may write" in refusal_of({"secret": "vault://secret/data/db"}, vault=vault.spec)
    os.unlink(path)
    assert refusal_of({"secret": "vault://secret/data/db"}, vault=vault.spec) == (
        f"the token_file of vault, {path}, cannot be read: No such file or directory")


# What Vault refuses.

@pytest.fixture
def hurry(monkeypatch):
    """The time for Vault is over when it was asked twice, however long that takes here."""
    follow, asked = roexec._Vault._follow, []

    def follow_twice(client, *request):
        asked.append(request)
        try:
            return follow(client, *request)
        finally:
            if len(asked) == 2:
                client.deadline = time.monotonic()
    monkeypatch.setattr(roexec._Vault, "_follow", follow_twice)
    monkeypatch.setattr(roexec._Vault, "_in_time", lambda client, function: function())


DENIED = ('refuses to read secret/data/x: 1 error occurred: * permission denied; the token needs '
          'a policy with the capability "read" on the path "secret/data/x", and must not have '
          "expired")


@pytest.mark.parametrize("status, errors, expected", [
    (403, ["1 error occurred:\n\t* permission denied\n\n"], DENIED),
    (404, [], "there is no secret vault://secret/data/x"),
    (404, ['no handler for route "secret/data/x". route entry not found.'],
     "no secrets engine is mounted for vault://secret/data/x in the root namespace; is one "
     "missing?"),
    (400, ["bad things"], "answers 400 for vault://secret/data/x: bad things"),
    (405, None, "answers 405 for vault://secret/data/x: without a reason"),
    (503, ["Vault is sealed"],
     "is sealed or not initialized (Vault is sealed); it has to be unsealed"),
    (500, ["local node not active but active cluster node not found"],
     "is a standby that finds no active node (local node not active but active cluster node not "
     "found)"),
    (429, ["request path: rate limit quota exceeded"],
     "has too many requests (429): a rate limit quota, or a standby"),
    (500, ["x" * 1000], "answers 500 for vault://secret/data/x: " + "x" * 300),
    (400, ["no t0k3n-of-vault\x1b[1m"], "answers 400 for vault://secret/data/x: no ***\\x1b[1m"),
])
def test_each_refusal_is_one_sentence_that_says_what_to_mend(vault, hurry, status, errors,
                                                              expected):
    vault.answers = [(status, {"errors": errors})] * 20
    said = refusal_of({"secret": "vault://secret/data/x"}, vault=vault.spec)
    assert said.removeprefix(f"Vault at {vault.address} ") == expected
    assert "t0k3n" not in said


def test_an_engine_of_version_2_and_a_deleted_secret_are_told_of(vault):
    vault.answers = [(403, {"errors": []})]
    assert refusal_of({"secret": "vault://secret/x"}, vault=vault.spec) == (
        "vault://secret/x lies in an engine of version 2; write data/ behind the name of its "
        "mount, for example vault://secret/data/x")
    vault.deleted = {"secret/data/x": False, "secret/data/y": True}
    for name, verb in (("x", "deleted"), ("y", "destroyed")):
        assert refusal_of({"secret": f"vault://secret/data/{name}"}, vault=vault.spec) == (
            f"the newest version of vault://secret/data/{name} has been {verb}")


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"", b'{"data": []}', b"[" * 100000])
def test_what_is_no_answer_of_vault_is_refused(vault, body):
    vault.answers = [(200, body)]
    assert refusal_of({"secret": "vault://kv/data/x"}, vault=vault.spec) == (
        f"Vault at {vault.address} answers for vault://kv/data/x with what is no secret; is that "
        "address Vault's?")


def test_an_answer_without_end_is_not_read_to_its_end(vault):
    vault.answers = [(200, b"x" * ((1 << 20) + 1))]
    assert refusal_of({"secret": "vault://kv/data/x"}, vault=vault.spec) == (
        "the answer of Vault holds more than 1.0 MB")


@pytest.mark.parametrize("trouble", [
    (503, {"errors": ["Vault is sealed"]}), (500, b""), (502, b"<html>"), (429, {"errors": []}),
    lambda request, _: request.connection.shutdown(socket.SHUT_RDWR)])
def test_what_may_pass_is_tried_again(vault, trouble):
    vault.answers = [trouble, trouble]
    assert resolve({"secret": "vault://secret/data/db#user"}, vault=vault.spec)[0] == {
        "user": "bob"}
    assert len(vault.requests) == 3


@pytest.fixture
def unused_port():
    """A port on which nobody listens, and nobody else will."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield unused.getsockname()[1]


def test_a_vault_that_starts_late_is_waited_for(vault, monkeypatch, unused_port):
    spec, pauses = {**vault.spec, "address": f"http://127.0.0.1:{unused_port}"}, []
    connect = socket.create_connection

    def refused_twice(address, *rest, **more):
        if len(pauses) < 2:
            pauses.append(address)
            return connect(address, *rest, **more)
        return connect(("127.0.0.1", vault.port), *rest, **more)

    monkeypatch.setattr(socket, "create_connection", refused_twice)
    assert resolve({"secret": "vault://secret/data/db#user"}, vault=spec)[0] == {"user": "bob"}
    assert pauses == [("127.0.0.1", unused_port)] * 2


def test_a_vault_that_is_not_there_is_given_up_in_time(hurry, write, unused_port):
    assert refusal_of({"secret": "vault://secret/data/x"}, vault={
        "address": f"http://127.0.0.1:{unused_port}", "token_file": write("t", "token")}) == (
        f"Vault at http://127.0.0.1:{unused_port} does not answer within 10s: Connection refused")


def drip(request, _):
    """An answer of which a byte comes each 50 ms: no single read takes long."""
    request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    try:
        for _ in range(1000):
            request.wfile.write(b" ")
            time.sleep(0.05)
    except OSError:
        pass


def silence(request, _):
    request.connection.settimeout(60)
    request.rfile.read(1)


@pytest.mark.parametrize("answer", [drip, silence])
def test_a_vault_that_is_slow_is_given_up_in_time(vault, monkeypatch, answer):
    monkeypatch.setattr(roexec, "_TIME_FOR_A_SECRET", 0.3)
    vault.answers = [answer]
    start = time.monotonic()
    said = refusal_of({"secret": "vault://secret/data/x"}, vault=vault.spec)
    assert said.startswith(f"Vault at {vault.address} does not answer within 0.3s: ")
    assert time.monotonic() - start < 40


def test_a_cancelled_run_does_not_wait_for_vault(vault, monkeypatch):
    monkeypatch.setattr(roexec, "_TIME_FOR_A_SECRET", 60)
    vault.answers, start = [silence], time.monotonic()
    assert refusal_of({"secret": "vault://secret/data/x"}, vault=vault.spec,
                      is_cancelled=lambda: bool(vault.requests)) == (
        "the run was cancelled while it waited for Vault")
    assert time.monotonic() - start < 40


def test_a_name_that_is_unknown_is_told_at_once(write, monkeypatch):
    asked = []

    def unknown(host, *_, **__):
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert refusal_of({"secret": "vault://secret/data/x"}, vault={
        "address": "http://vault.invalid", "token_file": write("t", "token")}) == (
        "Vault at http://vault.invalid cannot be found: Name or service not known")
    assert asked == ["vault.invalid"]


# Redirects.

def test_a_redirect_to_the_same_address_is_followed(vault):
    vault.answers = [(307, b"", ("Location", vault.address + "/v1/secret/data/db?x=1")),
                     (308, b"", ("Location", "/v1/secret/data/db"))]
    assert resolve({"secret": "vault://secret/data/a#user"}, vault=vault.spec)[0] == {
        "user": "bob"}
    assert paths_of(vault) == ["GET /v1/secret/data/a", "GET /v1/secret/data/db?x=1",
                               "GET /v1/secret/data/db"]


def test_a_redirect_to_another_host_gets_no_token(vault):
    other = VaultServer()
    vault.answers = [(307, b"", ("Location", f"http://u:hunter2@127.0.0.1:{other.port}/v1/x"))]
    assert refusal_of({"secret": "vault://secret/data/db"}, vault=vault.spec) == (
        f"Vault at {vault.address} sends one on to {other.address}; if that is right, write it as "
        "address of vault")
    assert other.requests == []
    other.close()


@pytest.mark.parametrize("location", ["http://[::1", "/v1/a b", "/v1/\xe4", "//"])
def test_a_redirect_to_nowhere_is_refused(vault, hurry, location):
    vault.answers = [(307, b"", ("Location", location))] * 20
    assert f"Vault at {vault.address} " in refusal_of({"secret": "vault://secret/data/db"},
                                                      vault=vault.spec)


@pytest.mark.parametrize("location", [None, "/v1/secret/data/db"])
def test_redirects_have_an_end(vault, location):
    headers = [("Location", location)] if location else []
    vault.answers = [(302, b"", *headers)] * 10
    assert "redirects without end" in refusal_of({"secret": "vault://secret/data/db"},
                                                 vault=vault.spec)
    assert len(vault.requests) < 6


# TLS.

@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """(folder with ca.pem, TLS context of a server whose certificate it has signed)."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make certificates with")
    folder = tmp_path_factory.mktemp("tls")
    (folder / "x.cnf").write_text("subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n"
                                  "authorityKeyIdentifier=keyid\nsubjectKeyIdentifier=hash\n")

    def openssl(*words):
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    new = "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"
    openssl(*new, "-x509", "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=ca",
            "-addext", "keyUsage=critical,keyCertSign,cRLSign")
    openssl(*new, "-keyout", "x.key", "-out", "x.csr", "-subj", "/CN=vault")
    openssl("x509", "-req", "-in", "x.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-out", "x.pem",
            "-set_serial", "7", "-days", "2", "-extfile", "x.cnf")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "x.pem", folder / "x.key")
    return folder, context


@pytest.fixture
def secure(authority, write):
    server = VaultServer(authority[1])
    server.spec = {"address": server.address, "token_file": write("t0k3n-of-vault", "token"),
                   "ca": str(authority[0] / "ca.pem")}
    yield server
    server.close()


def test_a_certificate_is_verified_with_the_authority_of_the_configuration(secure):
    assert resolve({"secret": "vault://secret/data/db#user"}, vault=secure.spec)[0] == {
        "user": "bob"}


def test_a_certificate_that_nobody_vouches_for_is_refused_at_once_and_gets_no_token(
        secure, monkeypatch):
    exchange, tried = roexec._Vault._exchange, []
    monkeypatch.setattr(roexec._Vault, "_exchange", lambda *values: (
        tried.append(values), exchange(*values))[1])
    spec = {name: value for name, value in secure.spec.items() if name != "ca"}
    said = refusal_of({"secret": "vault://secret/data/db"}, vault=spec)
    assert said.startswith(f"Vault at {secure.address} has a certificate that cannot be trusted (")
    assert said.endswith("; ca of vault names the file with the certificate of its authority")
    assert len(tried) == 1 and secure.requests == []


def test_a_certificate_for_another_name_is_refused(secure):
    said = refusal_of({"secret": "vault://secret/data/db"}, vault={
        **secure.spec, "address": f"https://localhost:{secure.port}"})
    assert "cannot be trusted (" in said and "localhost" in said and secure.requests == []


def test_a_server_without_tls_is_told_from_one_with(vault, authority):
    said = refusal_of({"secret": "vault://secret/data/db"}, vault={
        **vault.spec, "address": f"https://127.0.0.1:{vault.port}"})
    assert "does not speak TLS as it should" in said


@pytest.mark.parametrize("content, why", [(None, "No such file or directory"), ("x", "")])
def test_an_authority_that_cannot_be_read_is_named(secure, tmp_path, content, why):
    path = tmp_path / "authority.pem"
    if content is not None:
        path.write_text(content)
    said = refusal_of({"secret": "vault://secret/data/db"}, vault={**secure.spec, "ca": str(path)})
    assert said.startswith(f"the ca of vault, {path}, cannot be read: {why}")


# Masks.

def masked(values, *chunks):
    """What is written of chunks of one stream."""
    masks = Masks(values)
    return b"".join([*[masks.feed("out", chunk) for chunk in chunks], masks.flush("out")])


SECRET = "s3cr3t+Wörd/42"


@pytest.mark.parametrize("form", [
    SECRET,
    base64.b64encode(SECRET.encode()).decode(),
    base64.urlsafe_b64encode(SECRET.encode()).decode(),
    urllib.parse.quote(SECRET), urllib.parse.quote(SECRET, ""), urllib.parse.quote_plus(SECRET),
    urllib.parse.quote(SECRET, "").replace("%2B", "%2b").replace("%C3%B6", "%c3%b6")
    .replace("%2F", "%2f"),
    json.dumps(SECRET)[1:-1],
])
def test_a_value_is_masked_in_every_form(form):
    data = f"a {form}, {form}{form}.\n".encode()
    assert masked({SECRET}, data) == b"a ***, ******.\n"
    assert masked({SECRET}, *[data[at:at + 1] for at in range(len(data))]) == b"a ***, ******.\n"


def test_base64_of_a_value_is_masked_whatever_follows_it():
    for size in range(4, 12):
        value = "pass-w0rd-xy"[:size]
        for more in ("", "\n", "ä", "xyz"):
            shown = masked({value}, base64.b64encode((value + more).encode()))
            assert shown.startswith(b"***")
            assert len(shown) <= (3 if not more else 3 + 4 + 4 * len(more.encode()) // 3)


def test_base64_in_lines_is_masked_line_by_line():
    value = "".join(random.Random(1).choices("abcdefghijklmnop0123456789", k=200))
    assert masked({value}, base64.encodebytes(value.encode())) == b"***\n***\n***\n***\n"
    assert masked({value}, base64.b64encode(value.encode())) == b"*" * 12
    value = value[:58]          # of which two characters and == stand on a second line
    assert masked({value}, base64.encodebytes(value.encode()) + b"ZA m==") == (
        b"***\n" + base64.b64encode(value.encode())[76:] + b"\nZA m==")


def test_a_value_of_several_lines_is_masked_as_a_whole_and_line_by_line():
    key = "-----BEGIN KEY-----\nMIIEowIBAAKCAQEA\n  dGhpcyBpcyBub3Q\nshort\n-----END KEY-----\n"
    assert masked({key}, b"<" + key.encode() + b">") == b"<***\n>"
    assert masked({key}, key.replace("\n", "\r\n").encode()) == (
        b"***\r\n***\r\n  ***\r\nshort\r\n***\r\n")
    assert masked({key}, json.dumps({"key": key}).encode()) == b'{"key": "***\\n"}'


def test_blanks_around_a_value_are_no_part_of_it():
    assert masked({" hunter2\n"}, b"got hunter2, hunter2\n") == b"got ***, ***\n"
    assert masked({" ", "\n", ""}, b"a b\n") == b"a b\n"


@pytest.mark.parametrize("data, expected", [
    (b"42", b"***"), (b"a 42\n", b"a ***\n"), (b"x=42;", b"x=***;"), (b"142", b"142"),
    (b"423", b"423"), (b"x42", b"x42"), (b"42_", b"42_"), (b"\xc3\xa442", b"\xc3\xa442"),
    (b"42 42", b"*** ***"), (b"4242", b"4242"), (b"a-42-b", b"a-***-b"),
])
def test_a_very_short_value_is_masked_only_where_it_stands_alone(data, expected):
    assert masked({"42"}, data) == expected
    assert masked({"42"}, *[data[at:at + 1] for at in range(len(data))]) == expected
    assert Masks({"42"}).text(data.decode()).encode() == expected


def test_a_value_that_comes_byte_by_byte_and_slowly_is_never_seen():
    masks = Masks({"hunter22"})
    shown = [masks.feed("out", bytes([byte])) for byte in b"x hunter22 y"]
    assert b"".join(shown) == b"x *** y" and masks.flush("out") == b""
    assert shown == [b"x", b" ", *[b""] * 7, b"***", b" ", b"y"]


def test_only_what_may_become_a_value_is_kept_back():
    masks = Masks({"hunter22", "abcdefgh-ijklmnop"})
    assert masks.feed("out", b"password: ") == b"password: "
    assert masks.feed("out", b"x hunt") == b"x "
    assert masks.feed("out", b"ing hunter2") == b"hunting "
    assert masks.feed("out", b"1 abcdefgh-ijklmno") == b"hunter21 "
    assert masks.flush("out") == b"abcdefgh-ijklmno" and masks.flush("out") == b""


def test_streams_do_not_mix():
    masks = Masks({"hunter22"})
    assert masks.feed("out", b"hunt") == b"" == masks.feed("err", b"hun")
    assert masks.feed("out", b"er22!") == b"***!" and masks.feed("err", b"ger") == b"hunger"


def test_the_longest_of_several_values_is_masked_also_across_chunks():
    values = {"abcd", "abcdefgh", "cdefghijkl"}
    for data, expected in ((b"abcdefgh", b"***"), (b"abcdefg", b"***efg"), (b"abcd", b"***"),
                           (b"xabcdefghijklx", b"x***ijklx"), (b"cdefghijkl", b"***"),
                           (b"cdefghijk", b"cdefghijk"), (b"ab", b"ab")):
        for cut in range(len(data) + 1):
            assert masked(values, data[:cut], data[cut:]) == expected


def test_a_message_is_masked_whole():
    masks = Masks({"hunter22"})
    assert masks.text("cannot start /bin/hunter22: hunter2") == "cannot start /bin/***: hunter2"
    assert masks.text("\udcff hunter22") == "\udcff ***"
    assert Masks().text("hunter22") == "hunter22"


def test_without_values_all_passes_through():
    masks = Masks()
    assert masks.feed("out", b"\0\xff") == b"\0\xff" and masks.flush("out") == b""


def plainly_masked(data, values):
    """What masking means: leftmost, then longest; a value below 4 bytes only where it is alone."""
    def is_word(byte):
        return byte >= 0x80 or chr(byte).isalnum() or byte == ord("_")

    def is_alone(start, end):
        return not any(is_word(byte) for byte in data[max(0, start - 1):start] + data[end:end + 1])

    shown, position = b"", 0
    while position < len(data):
        found = [value for value in values if data.startswith(value, position)
                 and (len(value) > 3 or is_alone(position, position + len(value)))]
        shown += b"***" if found else data[position:position + 1]
        position += max(map(len, found), default=1)
    return shown


@pytest.mark.parametrize("seed", range(300))
def test_masking_any_chunks_is_masking_the_whole(seed):
    chance = random.Random(seed)
    letters = chance.choice(["ab", "abc", "ab-", "a_ .", "xyzä"])
    values = {"".join(chance.choices(letters, k=chance.choice([1, 2, 3, 4, 5, 6, 9, 17])))
              for _ in range(chance.randint(1, 6))}
    forms = {value.strip().encode() for value in values} - {b""}
    text = "".join(chance.choice([chance.choice(letters), chance.choice(sorted(values)),
                                  chance.choice(sorted(values))[:-1], " ", "\n"])
                   for _ in range(chance.randint(0, 60)))
    data, streams = text.encode(), {"out": b"", "err": b""}
    masks, fed = Masks(values), dict.fromkeys(streams, 0)
    while any(fed[name] < len(data) for name in streams):
        name, size = chance.choice(sorted(streams)), chance.choice([0, 1, 2, 3, 5, 8, 40])
        streams[name] += masks.feed(name, data[fed[name]:fed[name] + size])
        fed[name] += size
    for name in streams:
        assert streams[name] + masks.flush(name) == plainly_masked(data, forms)


def test_masking_takes_time_in_proportion_to_the_output_and_little_memory():
    masks, text = Masks({"a" * 40, "abcdefgh" * 5, "x1", "\n".join(["line-" * 4] * 30)}), b"a" * 39
    for data in (b"a", b"a" * 39 + b"b", b"abcdefg ", b"x1 ", b"line-" * 4 + b"\n", b"%61", text):
        def seconds(size):
            chunk = (data * (size // len(data) + 1))[:size]
            start = time.process_time()
            masks.feed("out", chunk)
            return time.process_time() - start
        assert min(seconds(80_000) for _ in range(3)) < 6 * min(
            seconds(40_000) for _ in range(3)) + 0.002, data[:9]
    tracemalloc.start()
    for _ in range(20):
        masks.feed("out", b"a" * 100_000 + b" ")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_masking_keeps_half_of_the_speed_of_capture(tmp_path):
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    chance = random.Random(5)
    masks = Masks({"".join(chance.choices(letters, k=size)) for size in (12, 16, 20, 32, 40)})
    line = b"2025-08-01 12:00:00 INFO request 4711 took 12.5 ms, GET /api/v1/jobs: status 200\n"
    data = (line * 1000)[:65536]
    log, (reader, writer) = roexec.LogWriter(str(tmp_path), "x", 0, "x"), os.pipe()

    def seconds(function):
        start = time.perf_counter()
        for at in range(0, len(data), 16384):       # as much as an empty pipe takes anywhere
            os.write(writer, data[at:at + 16384])
            os.read(reader, 16384)
        log.output("out", function(data), 0)
        return time.perf_counter() - start

    pairs = [(seconds(lambda data: data), seconds(lambda data: masks.feed("out", data)))
             for _ in range(100)]
    plain, masked = map(min, zip(*pairs))
    log.close(0)
    os.close(reader)
    os.close(writer)
    assert masks.feed("out", data) == data
    assert plain / masked >= 0.5
