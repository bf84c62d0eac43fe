"""Notices: what they say, to whom they are sent and to whom never, and that none is lost unseen."""
import base64
import contextlib
import email
import email.policy
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time

import pytest

import roexec
from helpers import Smtp, SmtpHandler, Web, reply, wait_for
from roexec import (Hook, NoticeError, Store, add_notice, add_run, begin_notice, build_notices,
                    deliver, due_notices, finish_run, merge_notices, next_notice, notice_failed,
                    notice_sent, notice_target, notice_title, output_tail, purge_notices,
                    run_payload, send_notice, start_postman, unsent_notices)

NOW = 1754049600.0          # 2025-08-01T12:00:00Z
PAUSES = 10, 60, 300, 1800, 7200


@pytest.fixture
def store(tmp_path):
    made = Store(str(tmp_path / "store")).create()
    yield made
    made.close()


# Servers on this host.

def drip(first, each):
    """An answer that begins, and then comes byte by byte for longer than one waits."""
    def answer(handler):
        handler.wfile.write(first)
        for _ in range(3000):
            handler.wfile.write(each)
            time.sleep(0.02)
    return answer


@pytest.fixture
def web():
    server = Web()
    yield server
    server.close()


@pytest.fixture
def smtp():
    server = Smtp()
    yield server
    server.close()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """The path of a certificate, and its key, for localhost."""
    if shutil.which("openssl") is None:
        pytest.skip("a certificate for the test needs the program openssl")
    path = str(tmp_path_factory.mktemp("tls") / "both.pem")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
                    "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj",
                    "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", path,
                    "-out", path + ".crt"], check=True, capture_output=True)
    with open(path + ".crt", "rb") as source, open(path, "ab") as target:
        target.write(source.read())
    return path


@pytest.fixture
def context(certificate):
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(certificate)
    return made


@pytest.fixture
def trusted(certificate, monkeypatch):
    """The host trusts the certificate of the test."""
    monkeypatch.setenv("SSL_CERT_FILE", certificate + ".crt")


# What notices say.

def run_of(state="failed", *attempts, **columns):
    """The payload of a run that has ended."""
    row = {"id": "k3j9x0a1b2", "job_id": "backup-db", "step": None, "parent": None,
           "retry_of": None, "name": None, "trigger": "schedule", "slot": 1754049600,
           "last_slot": None, "count": 1, "state": state, "reason": None, "message": None,
           "queued_at": NOW, "started_at": NOW, "finished_at": NOW + 312, "exit_code": None,
           "signal": None, "node": None, "log": "logs/backup-db/x.log", **columns}
    return run_payload(row, attempts)


def attempt(number, exit_code=None, signal=None):
    return {"number": number, "started_at": NOW, "finished_at": NOW + 1, "exit_code": exit_code,
            "signal": signal}


FAILED = {"state": "failed", "reason": "exit", "exit_code": 3}


def built(hook, event="on_failure", run=None, **facts):
    return build_notices(Hook(hook), event, run or run_of(**FAILED), key=f"{event} 0",
                         **{"host": "db1.example.com", "now": NOW, "name": "Nightly backup",
                            "output": b"dumping\nno space\n", **facts})


def body_of(hook, *values, **facts):
    return built(hook, *values, **facts)[0]["body"]


WEBHOOK = {"webhook": "https://hooks.example.com/T/s3cret"}
PING = {"ping": "https://hc.example.com/uuid"}
MAIL = {"mail": "ops@example.com"}


@pytest.mark.parametrize("event, run, title", [
    ("on_failure", run_of(**FAILED), "backup-db failed (exit 3)"),
    ("on_failure", run_of(reason="signal", signal="SIGKILL"), "backup-db failed (SIGKILL)"),
    ("on_failure", run_of(reason="start", exit_code=127), "backup-db failed (exit 127)"),
    ("on_failure", run_of(reason="pre_run"), "backup-db failed (pre run)"),
    ("on_failure", run_of(reason="output", exit_code=0), "backup-db failed (output)"),
    ("on_failure", run_of("timed_out", reason="timeout", signal="SIGTERM"), "backup-db timed out"),
    ("on_failure", run_of("timed_out", reason="total_timeout"),
     "backup-db timed out (total timeout)"),
    ("on_failure", run_of("lost", reason="power"), "backup-db was lost (power)"),
    ("post_run", run_of("cancelled", reason="user"), "backup-db was cancelled (user)"),
    ("on_success", run_of("succeeded", exit_code=0), "backup-db succeeded"),
    ("on_success", run_of("succeeded", step="dump"), "backup-db/dump succeeded"),
    ("pre_run", run_of("running"), "backup-db started"),
    ("on_retry", run_of("running", attempt(1, 1), attempt(2, 4)),
     "backup-db failed (exit 4), will be tried again"),
    ("on_retry", run_of("running", attempt(1, signal="SIGSEGV")),
     "backup-db failed (SIGSEGV), will be tried again"),
    ("on_retry", run_of("running"), "backup-db failed, will be tried again"),
    ("on_missed", run_of("skipped", reason="missed"), "backup-db missed a slot"),
    ("on_missed", run_of("skipped", reason="missed", count=12), "backup-db missed 12 slots"),
    ("on_failure", run_of(job_id="a\r\nBcc: x\x1b[2J", **FAILED),
     "a\\r\\nBcc: x\\x1b[2J failed (exit 3)"),
])
def test_a_title_says_what_has_happened(event, run, title):
    assert notice_title(run, event) == title


def test_a_webhook_gets_the_run_and_a_text():
    run = run_of(message="the disk is full", **FAILED)
    notice, = built(WEBHOOK, "on_failure", run, log_url="https://roexec.example.com/runs/x")
    assert {**notice, "body": None} == {
        "kind": "webhook", "target": WEBHOOK["webhook"], "run_id": "k3j9x0a1b2", "body": None,
        "title": "backup-db failed (exit 3)", "key": "on_failure 0"}
    assert json.loads(notice["body"]) == {
        "text": "backup-db failed (exit 3) on db1.example.com\nthe disk is full\n"
                "https://roexec.example.com/runs/x",
        "event": "on_failure", "job": "backup-db", "job_name": "Nightly backup", "state": "failed",
        "reason": "exit", "exit_code": 3, "duration": 312, "host": "db1.example.com",
        "log_url": "https://roexec.example.com/runs/x", "run": run}


def test_the_text_of_a_webhook_calls_nobody_and_steers_nothing():
    run = run_of(message="<!channel> & \x1b[31m\r\n<@U1>", **FAILED)
    assert json.loads(body_of(WEBHOOK, "on_failure", run))["text"] == (
        "backup-db failed (exit 3) on db1.example.com\n"
        "&lt;!channel&gt; &amp; \\x1b[31m\\r\\n&lt;@U1&gt;")


def read_mail(data):
    return email.message_from_bytes(data.replace(b"\r\n", b"\n"), policy=email.policy.default)


def test_a_mail_says_what_has_happened_and_shows_the_end_of_the_output():
    notices = built({"mail": ["ops@example.com", "db@example.com"]})
    assert [notice["target"] for notice in notices] == ["ops@example.com", "db@example.com"]
    assert notices[0]["body"] == notices[1]["body"]
    mail = read_mail(notices[0]["body"])
    assert dict(mail.items()) == {
        "To": "ops@example.com, db@example.com",
        "Subject": "[roexec] backup-db failed (exit 3) on db1.example.com",
        "Date": "Fri, 01 Aug 2025 12:00:00 -0000",
        "Message-ID": "<k3j9x0a1b2.on-failure-0@db1.example.com>",
        "Auto-Submitted": "auto-generated", "MIME-Version": "1.0",
        "Content-Type": 'text/plain; charset="utf-8"', "Content-Transfer-Encoding": "7bit"}
    assert mail.get_content() == """\
backup-db failed (exit 3) on db1.example.com.
(Nightly backup)

run       k3j9x0a1b2
job       backup-db
state     failed  (exit)
trigger   schedule
slot      2025-08-01T12:00:00Z
queued    2025-08-01T12:00:00Z
started   2025-08-01T12:00:00Z
finished  2025-08-01T12:05:12Z
duration  5m12s
exit      3
log       logs/backup-db/x.log

The end of its output:

dumping
no space

"""


@pytest.mark.parametrize("output, shown", [
    (None, ""), (b"", "\nIt has printed nothing.\n"),
    (b"a\tb\r\nc\x1b[2J\xff\x00\xc3\xa4",
     "\nThe end of its output:\n\na\tb\nc\\x1b[2J\ufffd\\x00\u00e4\n")])
def test_output_in_a_mail_is_text(output, shown):
    text = read_mail(body_of(MAIL, output=output)).get_content()
    assert text.partition("x.log\n")[2] == shown


def test_a_mail_has_only_the_end_of_much_output():
    output = b"first\n" + b"x" * 200 + b"\n" + b"line\n" * 40_000 + b"last"
    text = read_mail(body_of(MAIL, output=output)).get_content()
    shown = text.partition("output:")[2].strip()
    assert 65_000 < len(shown) <= 65_536 and shown.endswith("last") and "first" not in text


@pytest.mark.parametrize("name, host", [
    ("evil\r\nBcc: x@example.com", "h\r\nX-Evil: 1"), ("\x1b]0;x\x07", "h\x1b[2J"),
    ("N\u00e4chtliche Sicherung \U0001f4be", "h\u00f6st"), ("a\u2028b\x85", "h\u2028x")])
def test_no_name_makes_a_header_or_steers_a_terminal(name, host):
    run = run_of(job_id=name, name=name, message=name, **FAILED)
    data = body_of(MAIL, "on_failure", run, name=name, host=host)
    mail = read_mail(data)
    assert {key.lower() for key in mail.keys()} == {
        "to", "subject", "date", "message-id", "auto-submitted", "mime-version", "content-type",
        "content-transfer-encoding"}
    assert b"\x1b" not in data and data.isascii()
    for text in (mail["Subject"], mail.get_content()):
        assert not set(text) & set("\x1b\x07\x85\u2028")
    assert mail["Subject"] == (f"[roexec] {roexec.printable(name)} failed (exit 3) on "
                               f"{roexec.printable(host)}")


def test_a_line_break_in_a_header_is_refused_by_the_policy():
    with pytest.raises(ValueError):
        body_of({"mail": ["a@b.c\r\nBcc: x@y.z"]})


@pytest.mark.parametrize("event, run, signal_name", [
    ("pre_run", run_of("running"), "start"), ("on_success", run_of("succeeded", exit_code=0), ""),
    ("on_success", run_of("succeeded", exit_code=3), ""), ("post_run", run_of("succeeded"), ""),
    ("on_failure", run_of(**FAILED), "3"), ("post_run", run_of(**FAILED), "3"),
    ("on_failure", run_of(reason="output", exit_code=0), "fail"),
    ("on_failure", run_of(reason="signal", signal="SIGKILL"), "fail"),
    ("on_failure", run_of("timed_out", reason="timeout", exit_code=1), "fail"),
    ("on_failure", run_of("lost", reason="power"), "fail"),
    ("post_run", run_of("cancelled", reason="user"), "fail"),
    ("on_retry", run_of("running", attempt(1, 3)), "log"),
    ("on_missed", run_of("skipped", reason="missed"), "fail"),
])
def test_a_ping_signals_how_the_run_goes(event, run, signal_name):
    assert body_of(PING, event, run, output=b"out").split(b"\n") == [signal_name.encode(), b"out"]


def test_a_ping_has_the_last_10_kb_of_output():
    assert body_of(PING, output=b"a" * 20_000 + b"\xff\n") == b"3\n" + b"a" * 9998 + b"\xff\n"
    assert body_of(PING, output=None) == b"3\n"


def test_the_tail_of_a_log_is_output_without_stamps(tmp_path):
    log = roexec.LogWriter(str(tmp_path), "x", NOW, "id")
    log.write("Starting run", NOW)
    for number in range(20_000):
        log.output("out", b"line %d\n" % number, NOW)
    log.output("err", b"no end", NOW)
    log.close(NOW)
    tail = output_tail(tmp_path / log.path, 1000)
    assert tail.endswith(b"line 19999\nno end") and b"[" not in tail and 300 < len(tail) <= 1000
    assert output_tail(tmp_path / "none.log") == b""


# Sending by HTTP.

def send(kind, target, body=b"{}", **settings):
    send_notice({"kind": kind, "target": target, "body": body}, settings)


def error_of(*values, **settings):
    with pytest.raises(NoticeError) as caught:
        send(*values, **settings)
    return caught.value


def test_a_webhook_is_a_post_of_json(web):
    send("webhook", web.url("/T/x?a=b%20c"), b'{"text": "x"}')
    (path, headers, body), = web.requests
    assert (path, body) == ("/T/x?a=b%20c", b'{"text": "x"}')
    assert headers == {
        "Accept-Encoding": "identity", "Content-Length": "13", "Connection": "close",
        "Host": f"127.0.0.1:{web.server_port}", "Content-Type": "application/json",
        "User-Agent": f"roexec/{roexec.__version__}"}


@pytest.mark.parametrize("path, sent", [("", "/"), ("?x=1", "/?x=1"), ("/a#b", "/a")])
def test_an_address_without_a_path_has_one(web, path, sent):
    send("webhook", web.url(path))
    assert web.requests[0][0] == sent


def test_user_and_password_of_an_address_become_a_header(web):
    send("webhook", web.url("/x").replace("//", "//user:p%40ss@"))
    headers = web.requests[0][1]
    assert headers["Authorization"] == "Basic " + base64.b64encode(b"user:p@ss").decode()
    assert headers["Host"] == f"127.0.0.1:{web.server_port}"


@pytest.mark.parametrize("target, signal_name, path", [
    ("/uuid", "start", "/uuid/start"), ("/uuid/", "fail", "/uuid/fail"), ("/uuid", "", "/uuid"),
    ("/uuid?create=1", "17", "/uuid/17?create=1"), ("", "start", "/start")])
def test_a_ping_goes_to_the_address_of_its_signal(web, target, signal_name, path):
    send("ping", web.url(target), signal_name.encode() + b"\nlast\nlines")
    assert web.requests[0][::2] == (path, b"last\nlines")


@pytest.mark.parametrize("status, permanent", [
    (400, True), (401, True), (404, True), (410, True), (408, False), (429, False),
    (500, False), (502, False), (503, False)])
def test_an_answer_that_is_an_error(web, status, permanent):
    web.answer = reply(status)
    error = error_of("webhook", web.url())
    assert (str(error), error.permanent, error.away) == (f"it answered {status}", permanent, False)


@pytest.mark.parametrize("status", [200, 201, 202, 204])
def test_an_answer_that_is_none(web, status):
    web.answer = reply(status, b"")
    send("webhook", web.url())


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(web, status):
    web.answer = reply(status, Location=web.url("/there"))
    error = error_of("webhook", web.url("/here"))
    assert error.permanent and f"it answered {status}; redirects are not" in str(error)
    assert [path for path, _, _ in web.requests] == ["/here"]


def test_proxies_of_the_environment_are_not_used(web, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    send("webhook", web.url("/x"))
    assert web.requests[0][0] == "/x"


REFUSED = ["169.254.169.254", "169.254.0.1", "[::ffff:a9fe:a9fe]", "[::ffff:169.254.169.254]",
           "2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "0xa9.0xfe.43518", "[::a9fe:a9fe]",
           "[64:ff9b::a9fe:a9fe]", "[2002:a9fe:a9fe::1]", "[fe80::1]", "0.0.0.0", "0", "0.1.2.3",
           "[::]", "[::ffff:0.0.0.0]", "224.0.0.1", "[ff02::1]", "[::ffff:224.0.0.1]",
           "255.255.255.255", "100.100.100.200", "192.0.0.192", "168.63.129.16",
           "[fd00:ec2::254]", "[fd20:ce::254]"]


@pytest.mark.parametrize("host", REFUSED)
def test_some_addresses_are_never_sent_to(host, monkeypatch):
    monkeypatch.setattr(roexec, "connect_within", lambda *_: pytest.fail("it connects"))
    error = error_of("webhook", f"http://{host}/")
    assert error.permanent and "is an address to which no notice is sent" in str(error)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0x7f.1", "2130706433",
                                  "[::ffff:127.0.0.1]"])
def test_services_of_this_host_are_sent_to(web, host):
    send("webhook", web.url(host=host))
    assert web.requests[0][1]["Host"] == f"{host}:{web.server_port}"


@pytest.mark.parametrize("address", ["10.0.0.1", "172.16.0.1", "192.168.1.1", "fd12::1", "::1",
                                     "100.64.0.1", "8.8.8.8", "2001:db8::1"])
def test_private_addresses_are_sent_to(address):
    assert not roexec._is_refused(address)


def resolver(monkeypatch, *answers):
    """Names resolve to each of these lists of addresses in turn; the list of names asked for."""
    asked = []

    def getaddrinfo(host, port, **_):
        asked.append(host)
        return [(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "",
                 (address, port)) for address in answers[min(len(asked), len(answers)) - 1]]
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


def test_a_name_is_resolved_once_and_keeps_its_place_in_the_headers(web, monkeypatch):
    asked = resolver(monkeypatch, ["127.0.0.1"], ["169.254.169.254"])
    send("webhook", web.url(host="hooks.example.com"))
    assert asked == ["hooks.example.com"]
    assert web.requests[0][1]["Host"] == f"hooks.example.com:{web.server_port}"


def test_a_name_with_a_refused_address_among_others_reaches_the_others(web, monkeypatch):
    resolver(monkeypatch, ["169.254.169.254", "127.0.0.1"])
    send("webhook", web.url(host="hooks.example.com"))
    assert len(web.requests) == 1


def test_the_next_address_is_tried_where_one_does_not_answer(web, monkeypatch):
    resolver(monkeypatch, ["127.1.2.3", "127.0.0.1"])
    send("webhook", web.url(host="hooks.example.com"))
    assert len(web.requests) == 1


def test_names_that_do_not_exist_are_tried_again(monkeypatch):
    def getaddrinfo(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    error = error_of("ping", "https://hc.example.com/secret-uuid", b"\n")
    assert (str(error), error.permanent, error.away) == (
        "the name hc.example.com is not known", False, True)


@pytest.mark.parametrize("url", ["http://" + "a" * 70 + ".example/", "http://a..example/"])
def test_what_cannot_be_a_name_is_an_error(url):
    assert "is not known" in str(error_of("webhook", url))


def test_nobody_listens():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        error = error_of("webhook", f"http://127.0.0.1:{unused.getsockname()[1]}/s3cret")
    assert (str(error), error.permanent, error.away) == ("Connection refused", False, True)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(roexec, "_HTTP_DEADLINE", 0.2)


NO_ANSWER = "there was no answer within 0.2s"


@pytest.mark.parametrize("answer", [
    drip(b"", b"H"), drip(b"HTTP/1.", b"1"),
    drip(b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n")])
def test_a_slow_answer_ends_at_the_deadline(web, impatient, answer):
    web.answer = answer
    began = time.monotonic()
    error = error_of("webhook", web.url())
    assert (str(error), error.permanent, error.away) == (NO_ANSWER, False, True)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("begin", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: "])
def test_what_comes_slowly_after_the_status_does_not_undo_it(web, monkeypatch, begin):
    told = threading.Event()

    class Guard(roexec.Guard):
        """The deadline comes once the status is there."""

        def __init__(self, connection, deadline):
            super().__init__(connection, deadline)
            threading.Thread(target=lambda: told.wait(60) and self.end()).start()

    def answer(handler):
        handler.wfile.write(begin)
        told.set()
        drip(b"", b"x")(handler)
    monkeypatch.setattr(roexec, "_HTTP_DEADLINE", 600)
    monkeypatch.setattr(roexec, "Guard", Guard)
    web.answer = answer
    send("webhook", web.url())


def test_of_a_huge_answer_little_is_read(web):
    written = []

    def answer(handler):
        handler.wfile.write(b"HTTP/1.1 503 Busy\r\n\r\n")
        try:
            for _ in range(1000):
                handler.wfile.write(b"x" * 1_000_000)
                written.append(1)
        finally:
            written.append("end")
    web.answer = answer
    assert str(error_of("webhook", web.url())) == "it answered 503"
    wait_for(lambda: "end" in written)
    assert len(written) < 50


@pytest.mark.parametrize("answer", [b"nonsense\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", b"",
                                    b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n"])
def test_what_is_no_http_is_an_error(web, answer):
    web.answer = lambda handler: handler.wfile.write(answer)
    error = error_of("webhook", web.url())
    assert error.away and not error.permanent
    assert str(error) == ("the answer is no HTTP" if answer else
                          "Remote end closed connection without response")


def test_a_name_service_that_hangs_ends_at_the_deadline(impatient, monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(60) and [])
    assert str(error_of("webhook", "http://hooks.example.com/")) == NO_ANSWER
    over.set()


def test_who_reads_nothing_and_who_does_not_begin_tls_end_at_the_deadline(impatient):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = f"127.0.0.1:{silent.getsockname()[1]}"
        assert str(error_of("webhook", f"http://{place}/", b"x" * 9_000_000)) == NO_ANSWER
        assert str(error_of("webhook", f"https://{place}/")) == NO_ANSWER


def test_tls_is_verified(context, trusted):
    server = Web(context)
    try:
        send("webhook", server.url(host="localhost"))
        assert len(server.requests) == 1
        error = error_of("webhook", server.url(host="127.0.0.1"))
        assert "not valid for '127.0.0.1'" in str(error) and not error.permanent
    finally:
        server.close()


def test_the_name_in_tls_is_that_of_the_address(context, trusted, monkeypatch):
    asked = []
    context.sni_callback = lambda connection, name, _: asked.append(name)
    resolver(monkeypatch, ["127.0.0.1"])
    server = Web(context)
    try:
        assert "not valid for 'hooks.example.com'" in str(error_of(
            "webhook", server.url(host="hooks.example.com")))
        assert asked == ["hooks.example.com"] and server.requests == []
    finally:
        server.close()


def test_a_certificate_that_nobody_has_signed_is_refused(context):
    server = Web(context)
    try:
        assert "self" in str(error_of("webhook", server.url(host="localhost")))
        assert server.requests == []
    finally:
        server.close()


@pytest.mark.parametrize("url", ["file:///etc/passwd", "gopher://127.0.0.1/", "ftp://127.0.0.1/"])
def test_only_http_is_spoken(url):
    error = error_of("webhook", url)
    assert error.permanent and str(error) == "this is no address of http or https"


@pytest.mark.parametrize("path", ["/a b", "/a\r\nX: y", "/\u00e4"])
def test_an_address_that_would_break_a_request_is_refused(web, path):
    error = error_of("webhook", web.url() + path)
    assert not web.requests and error.permanent and path not in str(error)


def test_no_connection_stays_open(web, monkeypatch):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        send("webhook", web.url())
    monkeypatch.setattr(roexec, "_HTTP_DEADLINE", 0.2)
    web.answer = drip(b"HTTP/1.1 500 x\r\n\r\n", b"x")
    error_of("webhook", web.url("/"))
    wait_for(lambda: len(os.listdir("/proc/self/fd")) <= before + 1)


def test_the_place_of_a_notice_is_shown_without_what_is_secret():
    shown = [notice_target({"kind": kind, "target": target}) for kind, target in (
        ("webhook", "https://user:pass@hooks.example.com:8443/T0/s3cret?key=s3cret"),
        ("ping", "https://hc.example.com/uuid"), ("mail", "ops@example.com"))]
    assert shown == ["https://hooks.example.com:8443", "https://hc.example.com", "ops@example.com"]


# Sending by SMTP.

def mail_body(**facts):
    return body_of({"mail": ["ops@example.com", "db@example.com"]}, **facts)


def test_a_mail_is_sent_to_its_recipient(smtp):
    body = mail_body(output="z\u00e4h\n.\n.dots\n".encode())
    send("mail", "db@example.com", body, **smtp.settings())
    (sender, recipients, data), = smtp.mails
    assert sender.lower().startswith("from:<roexec@example.com>")
    assert recipients == ["db@example.com"]
    mail = read_mail(data)
    assert mail["From"] == "roexec@example.com"
    assert mail["To"] == "ops@example.com, db@example.com"
    assert mail["Subject"] == "[roexec] backup-db failed (exit 3) on db1.example.com"
    assert mail.get_content().endswith("\n\nz\u00e4h\n.\n.dots\n\n")
    wait_for(lambda: smtp.said[-1] == b"quit\r\n")


@pytest.mark.parametrize("host, sender", [
    ("db1", "roexec@db1"), ("h\u00f6st..a_b", "roexec@h-st.a-b"), ("...", "roexec@unknown")])
def test_without_a_sender_it_is_roexec_at_this_host(smtp, monkeypatch, host, sender):
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    settings = smtp.settings()
    del settings["mail"]["from"]
    send("mail", "ops@example.com", mail_body(), **settings)
    assert read_mail(smtp.mails[0][2])["From"] == sender


def test_without_a_mail_server_a_mail_waits_for_one():
    error = error_of("mail", "ops@example.com", mail_body())
    assert not error.permanent and "write mail: {host: …} into the configuration" in str(error)


@pytest.mark.parametrize("verb, answer, permanent, text", [
    ("ops@example.com", "550 no such user", True, "550 no such user"),
    ("ops@example.com", "450 greylisted", False, "450 greylisted"),
    ("MAIL", "553 not you", True, "553 not you"), ("MAIL", "421 too busy", False, "421 too busy"),
    ("DATA", "554 spam", True, "554 spam"), ("END", "452 disk\x1b[2J full", False,
                                             "452 disk\\x1b[2J full"),
    ("END", "550-a\r\n550 b", True, "550 a\\nb")])
def test_what_a_mail_server_refuses(smtp, verb, answer, permanent, text):
    smtp.replies[verb] = answer
    error = error_of("mail", "ops@example.com", mail_body(), **smtp.settings())
    assert (str(error), error.permanent, error.away) == (text, permanent, False)


def test_a_mail_that_was_taken_has_arrived_whatever_comes_then(smtp, monkeypatch):
    monkeypatch.setattr(SmtpHandler, "do_QUIT", lambda self, _: self.request.shutdown(2))
    send("mail", "ops@example.com", mail_body(), **smtp.settings())
    assert len(smtp.mails) == 1


@pytest.fixture
def password_file(tmp_path):
    path = tmp_path / "password"
    path.write_text("s3cret\n")
    return str(path)


@pytest.mark.parametrize("implicit", [False, True])
def test_a_login_goes_over_tls(context, trusted, password_file, implicit):
    server = Smtp(context, implicit=implicit)
    try:
        send("mail", "ops@example.com", mail_body(),
             **server.settings(user="roexec", password_file=password_file))
        login, = [line for line in server.said if line.startswith(b"AUTH")]
        assert base64.b64decode(login.split()[2]) == b"\0roexec\0s3cret"
        assert len(server.mails) == 1
    finally:
        server.close()


def test_nothing_is_said_where_tls_is_missing_or_false(smtp, context, password_file):
    settings = smtp.settings(user="roexec", password_file=password_file, tls="starttls")
    error = error_of("mail", "ops@example.com", mail_body(), **settings)
    assert "STARTTLS" in str(error) and not error.permanent
    server = Smtp(context)
    try:
        error = error_of("mail", "ops@example.com", mail_body(), **server.settings(
            user="roexec", password_file=password_file))
        assert "self" in str(error) and not error.permanent and error.away
    finally:
        server.close()
    assert not any(line.startswith((b"AUTH", b"MAIL")) for line in smtp.said + server.said)


def test_a_wrong_password_can_be_mended(context, trusted, password_file):
    server = Smtp(context)
    server.replies["AUTH"] = "535 wrong"
    try:
        error = error_of("mail", "ops@example.com", mail_body(), **server.settings(
            user="roexec", password_file=password_file))
        assert (str(error), error.permanent, error.away) == ("535 wrong", False, True)
    finally:
        server.close()


@pytest.mark.parametrize("content, expected", [
    (None, "No such file or directory"), ("pass\u00e9", "is not ASCII"), (b"\xff", "decode")])
def test_a_password_that_cannot_be_used(context, trusted, tmp_path, content, expected):
    path = tmp_path / "password"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    server = Smtp(context)
    try:
        error = error_of("mail", "ops@example.com", mail_body(), **server.settings(
            user="roexec", password_file=str(path)))
        assert expected in str(error) and str(path) in str(error) and not error.permanent
        assert "\u00e9" not in str(error) and server.mails == []
    finally:
        server.close()


def test_a_mail_server_that_says_nothing_ends_at_its_timeout():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        error = error_of("mail", "ops@example.com", mail_body(), mail={
            "host": "127.0.0.1", "port": silent.getsockname()[1], "tls": "none", "timeout": 0.2})
    assert (str(error), error.away) == (NO_ANSWER, True)


def test_a_mail_server_that_goes_on_slowly_ends_at_its_timeout(smtp, monkeypatch):
    def slowly(self, _):
        for _ in range(3000):
            self.request.sendall(b"250-x\r\n")
            time.sleep(0.02)
    monkeypatch.setattr(SmtpHandler, "do_MAIL", slowly)
    began = time.monotonic()
    error = error_of("mail", "ops@example.com", mail_body(), **smtp.settings(timeout=0.2))
    assert str(error) == NO_ANSWER and time.monotonic() - began < 30


# The outbox.

def add(store, kind="webhook", target="https://a.example/", run_id="r", *, body=b"{}", **more):
    with store.write() as db:
        return add_notice(db, kind, target, run_id, body, **{"now": NOW, **more})


def rows(store):
    with store.read() as db:
        return [dict(row) for row in db.execute("SELECT * FROM outbox ORDER BY id")]


def states(store):
    return [row["state"] for row in rows(store)]


def due(store, now, limit=100):
    with store.read() as db:
        return [row["id"] for row in due_notices(db, now, limit)]


def test_a_notice_is_due_at_once_and_in_order(store):
    ids = [add(store), add(store, "mail", "a@b.c"), add(store, now=NOW + 5)]
    assert due(store, NOW) == ids[:2] and due(store, NOW + 5) == ids
    assert due(store, NOW + 5, 1) == ids[:1]
    with store.read() as db:
        assert next_notice(db) == NOW


def test_a_notice_with_a_key_is_added_once_for_each_run_and_target(store):
    assert add(store, key="pre_run 0") and not add(store, key="pre_run 0")
    assert add(store, key="pre_run 1") and add(store, key="pre_run 0", run_id="s")
    assert add(store, key="pre_run 0", target="https://b.example/")
    with store.write() as db:
        notice_sent(db, 1)
    assert not add(store, key="pre_run 0") and add(store) and add(store)


def test_a_ping_takes_the_place_of_an_older_one_of_its_run(store):
    def ping(target="https://a.example/", run_id="r", **more):
        return add(store, "ping", target, run_id, **more)
    add(store), ping(), ping("https://b.example/"), ping(run_id="s")
    last = ping(key="x")
    assert due(store, NOW) == [1, 3, 4, last] and rows(store)[1]["state"] == "superseded"
    assert ping(key="x") is None and due(store, NOW) == [1, 3, 4, last]


def test_who_begins_a_notice_has_it_alone(store):
    add(store, body=b"x")
    with store.write() as db:
        notice, = due_notices(db, NOW, 10)
        assert begin_notice(db, notice, NOW, NOW + 300) == b"x"
        assert begin_notice(db, notice, NOW, NOW + 300) is None
        assert due_notices(db, NOW, 10) == [] and next_notice(db) == NOW + 300
        again, = due_notices(db, NOW + 300, 10)         # its process has died
        assert begin_notice(db, again, NOW, NOW + 600) == b"x"
        notice_sent(db, notice["id"])
        assert begin_notice(db, again, NOW, NOW + 300) is None and next_notice(db) is None


def test_a_failure_is_kept_with_the_notice(store):
    number = add(store, title="x failed")
    with store.write() as db:
        begin_notice(db, due_notices(db, NOW, 1)[0], NOW, NOW + 300)
        notice_failed(db, number, NOW + 1, "it answered 503", NOW + 11)
    row, = rows(store)
    assert (row["state"], row["tries"], row["error"], row["tried_at"], row["next_try"], row["body"]
            ) == ("waiting", 1, "it answered 503", NOW + 1, NOW + 11, b"{}")
    with store.write() as db:
        notice_failed(db, number, NOW + 2, "it answered 404", None)
    with store.read() as db:
        row, = map(dict, unsent_notices(db))
    assert "body" not in row and rows(store)[0]["body"] is None
    assert (row["state"], row["title"], row["error"]) == ("given_up", "x failed", "it answered 404")
    assert due(store, NOW + 1e6) == []


def test_what_is_due_in_hours_was_put_off_by_another_clock(store):
    add(store, now=NOW + 10 * 365 * 86400)
    assert due(store, NOW) == [1]


def test_settled_notices_go_after_a_while_but_not_those_of_live_runs(store):
    with store.write() as db:
        for name, state in (("live", "running"), ("over", "succeeded")):
            add_run(db, id=name, job_id="x", trigger="manual", state=state, queued_at=NOW)
    for run_id in ("live", "over", "gone", "waits"):
        add(store, run_id=run_id, key="k")
    add(store, run_id="late", now=NOW + 9)
    with store.write() as db:
        for number in (1, 3, 5):
            notice_sent(db, number)
        notice_failed(db, 2, NOW, "x", None)
        purge_notices(db, NOW + 5)
    assert [row["run_id"] for row in rows(store)] == ["live", "waits", "late"]


def test_notices_are_merged_only_as_they_were_seen(store):
    add(store), add(store)
    with store.write() as db:
        seen = due_notices(db, NOW, 10)
        begin_notice(db, seen[1], NOW, NOW + 300)
        merge_notices(db, seen, NOW, "2 notices", b"both")
    assert states(store) == ["waiting", "waiting"]
    with store.write() as db:
        merge_notices(db, due_notices(db, NOW + 300, 10), NOW + 300, "2 notices", b"both")
    assert states(store) == ["merged", "merged", "waiting"]
    assert rows(store)[2]["count"] == 2 and rows(store)[2]["body"] == b"both"


# Delivery.

@pytest.fixture
def said():
    return []


def tell(said):
    return lambda text, level: said.append(f"[{level}] {text}")


def test_what_is_due_is_sent_once(store, web, said):
    for number in range(3):
        add(store, target=web.url(f"/{number}"))
    assert deliver(store, {}, NOW, tell(said)) is None
    assert [path for path, _, _ in web.requests] == ["/0", "/1", "/2"]
    assert states(store) == ["sent"] * 3 and rows(store)[0]["body"] is None and said == []
    deliver(store, {}, NOW + 1e5, tell(said))
    assert len(web.requests) == 3


def test_a_failure_is_tried_again_and_given_up_visibly(store, web, said):
    web.answer = reply(503)
    add(store, target=web.url("/s3cret"), title="x failed (exit 3)")
    now = NOW
    for number, pause in enumerate(PAUSES, 1):
        assert deliver(store, {}, now, tell(said)) == now + pause
        assert deliver(store, {}, now + pause - 1, tell(said)) == now + pause
        assert len(web.requests) == number
        now += pause
    assert deliver(store, {}, now, tell(said)) is None and len(web.requests) == 6
    row, = rows(store)
    assert (row["state"], row["tries"], row["error"]) == ("given_up", 6, "it answered 503")
    place = web.url("")
    assert said[0] == (f"[ERROR] The webhook to {place} did not arrive (x failed (exit 3)): "
                       "it answered 503; it is tried again in 10s")
    assert said[4].endswith("it is tried again in 2h")
    assert said[5] == (f"[ERROR] The webhook to {place} did not arrive (x failed (exit 3)): "
                       "it answered 503; it is given up")


def test_a_refusal_is_given_up_at_once_and_the_next_one_is_sent(store, web, said):
    web.answer = lambda handler: reply(404 if handler.path == "/a" else 200)(handler)
    add(store, target=web.url("/a")), add(store, target=web.url("/b"))
    assert deliver(store, {}, NOW, tell(said)) is None
    assert states(store) == ["given_up", "sent"] and len(said) == 1


def test_a_host_that_is_away_is_asked_once_in_a_round(store, web, said, monkeypatch):
    asked = resolver(monkeypatch, [])
    for host in ("away.example", "away.example", "away.example"):
        add(store, target=f"http://{host}/{len(rows(store))}")
    add(store, "ping", "http://away.example/x", body=b"\n")
    add(store, target="http://other.example/")
    assert deliver(store, {}, NOW, tell(said)) == NOW + 10
    assert asked == ["away.example", "other.example"]
    assert [row["tries"] for row in rows(store)] == [1] * 5 and len(said) == 5
    deliver(store, {}, NOW + 10, tell(said))
    assert len(asked) == 4


def test_a_defect_is_given_up_like_any_failure(store, said, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("https://a.example/s3cret")
    monkeypatch.setattr(roexec, "send_notice", broken)
    add(store), add(store, "mail", "a@b.c")
    assert deliver(store, {}, NOW, tell(said)) == NOW + 10
    assert [row["error"] for row in rows(store)] == ["a defect of roexec, ZeroDivisionError"] * 2
    assert "s3cret" not in str(said)


def test_one_recipient_that_is_refused_does_not_stop_another(store, smtp, said):
    smtp.replies["a@example.com"] = "450 later"
    for notice in built({"mail": ["a@example.com", "b@example.com"]}):
        with store.write() as db:
            add_notice(db, now=NOW, **notice)
    deliver(store, smtp.settings(), NOW, tell(said))
    assert states(store) == ["waiting", "sent"] and smtp.mails[0][1] == ["b@example.com"]


def test_the_store_is_not_held_while_a_notice_is_sent(store, web):
    seen = []

    def answer(handler):
        with store.write() as db:
            seen.append(db.execute("SELECT state, tries FROM outbox").fetchone()[:])
        reply(200)(handler)
    web.answer = answer
    add(store, target=web.url())
    deliver(store, {}, NOW)
    assert [tuple(row) for row in seen] == [("waiting", 1)] and states(store) == ["sent"]


def test_two_that_deliver_at_once_send_each_notice_once(store, web):
    for number in range(8):
        add(store, target=web.url(f"/{number}"))
    threads = [threading.Thread(target=deliver, args=(Store(store.path), {}, NOW))
               for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path for path, _, _ in web.requests) == [f"/{n}" for n in range(8)]
    assert states(store) == ["sent"] * 8


def test_a_notice_that_comes_after_slow_ones_is_sent_by_one_process_alone(store, monkeypatch):
    sent, passed, monotonic = [], [], time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + sum(passed))

    def slowly(notice, settings):
        sent.append(notice["target"])
        if len(sent) == 1:
            passed.append(400)
        elif len(sent) == 2:
            deliver(store, {}, NOW + 401)
    monkeypatch.setattr(roexec, "send_notice", slowly)
    for target in ("http://slow", "http://late"):
        add(store, target=target)
    deliver(store, {}, NOW)
    assert sent == ["http://slow", "http://late"]


def test_a_delivery_that_is_stopped_leaves_the_rest(store, web):
    for number in range(4):
        add(store, target=web.url(f"/{number}"))
    assert deliver(store, {}, NOW, stopped=lambda: len(web.requests) >= 2) == NOW
    assert states(store) == ["sent", "sent", "waiting", "waiting"]


def test_many_for_one_target_within_a_minute_become_one(store, web):
    for number in range(11):
        add(store, target=web.url("/many"), now=NOW + number * 6, title=f"job{number} failed")
    for number in range(10):
        add(store, target=web.url("/few"), now=NOW)
    for number in range(12):
        add(store, "ping", web.url("/ping"), run_id=f"r{number}", body=b"\n", now=NOW)
    deliver(store, {}, NOW + 100)
    paths = [path for path, _, _ in web.requests]
    assert (paths.count("/many"), paths.count("/few"), paths.count("/ping")) == (1, 10, 12)
    body, = [json.loads(body) for path, _, body in web.requests if path == "/many"]
    assert body["text"].splitlines() == [f"11 notices on {socket.gethostname()}"] + [
        f"job{number} failed" for number in range(11)]
    assert (body["count"], body["event"], len(body["runs"])) == (11, "merged", 11)
    assert body["runs"][3] == {"id": "r", "title": "job3 failed"}
    assert states(store)[:11] == ["merged"] * 11 and set(states(store)[11:]) == {"sent"}


def test_many_over_a_longer_time_stay_many(store, web):
    for number in range(12):
        add(store, target=web.url("/x"), now=NOW + number * 7)
    deliver(store, {}, NOW + 1000)
    assert len(web.requests) == 12


def test_many_mails_become_one_mail(store, smtp):
    for number in range(150):
        with store.write() as db:
            for notice in built(MAIL, run=run_of(job_id=f"j{number}", **FAILED)):
                add_notice(db, now=NOW, **{**notice, "key": str(number)})
    deliver(store, smtp.settings(), NOW)
    (_, recipients, data), = smtp.mails
    mail = read_mail(data)
    assert recipients == ["ops@example.com"] and mail["To"] == "ops@example.com"
    assert mail["Subject"] == f"[roexec] 150 notices on {socket.gethostname()}"
    lines = mail.get_content().splitlines()
    assert lines[2] == "j0 failed (exit 3)" and len(lines) == 103 and lines[-1] == "and 50 more"


def test_merged_notices_are_counted_when_they_are_merged_again(store, web):
    web.answer = reply(500)
    for _ in range(11):
        add(store, target=web.url("/x"))
    deliver(store, {}, NOW)
    for _ in range(15):
        add(store, target=web.url("/x"), now=NOW + 5)
    deliver(store, {}, NOW + 10)
    assert json.loads(web.requests[-1][2])["count"] == 26


def test_old_notices_are_purged_by_the_way(store, web):
    add(store, target=web.url())
    deliver(store, {}, NOW)
    add(store, target=web.url(), now=NOW + 8 * 86400)
    deliver(store, {}, NOW + 8 * 86400)
    assert [row["id"] for row in rows(store)] == [2]


# The postman of a server.

def test_a_postman_sends_what_comes_and_wakes_for_it(store, web, said):
    masks, settings = [], {}

    def ask():
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, []))
        return settings
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    postman = start_postman(store, ask, tell(said))
    try:
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
        wait_for(lambda: masks)
        assert {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD} <= masks[0]
        for number in range(3):
            add(store, target=web.url(f"/{number}"), now=time.time())
            postman.wake()
            wait_for(lambda: len(web.requests) > number)
        wait_for(lambda: set(states(store)) == {"sent"})
    finally:
        postman.close()
    assert not postman._thread.is_alive() and said == []


def test_a_postman_comes_back_for_what_is_due_later(store, web, said, monkeypatch):
    monkeypatch.setattr(roexec, "_PAUSES", (0.05,))
    web.answer = lambda handler: reply(503 if len(web.requests) == 1 else 200)(handler)
    add(store, target=web.url(), now=time.time())
    postman = start_postman(store, dict, tell(said))
    try:
        wait_for(lambda: states(store) == ["sent"])
        assert len(said) == 1 and len(web.requests) == 2
    finally:
        postman.close()


def test_a_postman_outlives_errors(store, web, said, monkeypatch):
    calls = []

    def settings():
        calls.append(1)
        if len(calls) < 3:
            raise ZeroDivisionError if len(calls) == 1 else roexec.RoexecError("no store")
        return {}
    add(store, target=web.url(), now=time.time())
    postman = start_postman(store, settings, tell(said))
    try:
        for number in (1, 2):
            wait_for(lambda: len(said) == number)
            postman.wake()
        wait_for(lambda: states(store) == ["sent"])
    finally:
        postman.close()
    assert "ZeroDivisionError" in said[0]
    assert said[1] == "[ERROR] Notices cannot be sent: no store"


def test_closing_a_postman_does_not_wait_for_a_slow_host(store, web):
    reached, over = threading.Event(), threading.Event()
    web.answer = lambda handler: reached.set() or over.wait(60) and reply(200)(handler)
    add(store, target=web.url(), now=time.time())
    postman = start_postman(store, dict, lambda *_: None)
    assert reached.wait(60)
    began = time.monotonic()
    postman.close()
    assert time.monotonic() - began < 30
    over.set()
    postman._thread.join(60)
    assert states(store) == ["sent"]


def test_an_end_that_is_taken_in_twice_is_told_once(store, web):
    def take_in():
        with Store(store.path).write() as db:
            add_notice(db, "webhook", web.url(), "r", b"{}", NOW)
            try:
                finish_run(db, "r", "failed", [], reason="exit", exit_code=3, finished_at=NOW)
            except roexec.RoexecError as error:
                refused.append(error)
                raise

    def attempt_it():
        with contextlib.suppress(roexec.RoexecError):
            take_in()
        deliver(Store(store.path), {}, NOW)
    refused = []
    with store.write() as db:
        add_run(db, id="r", job_id="x", trigger="manual", state="running", queued_at=NOW)
    threads = [threading.Thread(target=attempt_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 3 and len(web.requests) == 1 and states(store) == ["sent"]
