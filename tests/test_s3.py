"""Section s3: signatures, credentials, objects in a real bucket, and what answers go wrong."""
import itertools
import json
import os
import socket
import ssl
import struct
import subprocess
import threading
import time
import types

import pytest
from helpers import STALLS, error_xml, tool

import roexec

KEYS = roexec.S3Keys(access="AKIAIOSFODNN7EXAMPLE",
                     secret="wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
MIB = 1 << 20

# The examples of Amazon S3's API reference, "Authenticating Requests: Using the Authorization
# Header", all of 2013-05-24 and of one bucket.
EXAMPLES = [
    ("GET", "/test.txt", {"range": "bytes=0-9"}, EMPTY,
     "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"),
    ("PUT", "/test%24file.text",
     {"date": "Fri, 24 May 2013 00:00:00 GMT", "x-amz-storage-class": "REDUCED_REDUNDANCY"},
     "44ce7dd67c959e0d3524ffac1771dfbba87d2b6b4b4e99e42034a8b803f8b072",
     "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd"),
    ("GET", "/?lifecycle=", {}, EMPTY,
     "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"),
    ("GET", "/?max-keys=2&prefix=J", {}, EMPTY,
     "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"),
]


@pytest.mark.parametrize("method, target, headers, digest, signature", EXAMPLES)
def test_requests_are_signed_as_the_reference_has_it(method, target, headers, digest, signature):
    headers = {"host": "examplebucket.s3.amazonaws.com", "x-amz-date": "20130524T000000Z",
               "x-amz-content-sha256": digest, **headers}
    text = roexec.sign_request(KEYS, "us-east-1", method, target, headers, digest)
    assert text == (
        "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request,"
        f"SignedHeaders={';'.join(sorted(headers))},Signature={signature}")


def test_a_request_to_another_service_is_signed_as_the_reference_has_it():
    """"Signature Version 4 signing process", the example with ListUsers."""
    keys = roexec.S3Keys(access="AKIDEXAMPLE", secret="wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY")
    headers = {"content-type": "application/x-www-form-urlencoded; charset=utf-8",
               "host": "iam.amazonaws.com", "x-amz-date": "20150830T123600Z"}
    target = "/?Action=ListUsers&Version=2010-05-08"
    assert roexec.canonical_request("GET", target, headers, EMPTY) == (
        "GET\n/\nAction=ListUsers&Version=2010-05-08\n"
        "content-type:application/x-www-form-urlencoded; charset=utf-8\nhost:iam.amazonaws.com\n"
        f"x-amz-date:20150830T123600Z\n\ncontent-type;host;x-amz-date\n{EMPTY}")
    assert roexec.sign_request(keys, "us-east-1", "GET", target, headers, EMPTY,
                               service="iam").endswith(
        "Signature=5d672d79c15b13162d9279b0855cfba6789a8edb4c82c400e06b5924a6f2b5d7")


def test_blanks_in_headers_are_signed_as_one():
    assert "\nx:a b c\n" in roexec.canonical_request("GET", "/", {"x": "  a  b \t c "}, EMPTY)


def test_keys_do_not_show_what_they_are():
    assert "AKIA" not in repr(KEYS) and "wJal" not in str([KEYS])


# Credentials.

FILE = """
[default]
aws_access_key_id = AKDEFAULT
aws_secret_access_key = s3cr3t=with%signs
[other]
aws_access_key_id=AKOTHER
aws_secret_access_key=0ther
aws_session_token=t0ken
[half]
aws_access_key_id=AKHALF
[profile configured]
aws_access_key_id = AKCONFIG
aws_secret_access_key = c0nfig
region = eu-west-1
"""


@pytest.mark.parametrize("profile, found", [
    ("default", ("AKDEFAULT", "s3cr3t=with%signs", None)),
    ("other", ("AKOTHER", "0ther", "t0ken")),
    ("configured", ("AKCONFIG", "c0nfig", None)),
    ("half", None), ("nobody", None),
])
def test_a_profile_is_found_in_the_shared_file(profile, found):
    keys = roexec.parse_credentials(FILE, profile)
    assert (keys and (keys.access, keys.secret, keys.token)) == found


@pytest.mark.parametrize("text", ["aws_secret_access_key = s3cr3t\n", "[default\ns3cr3t",
                                  "[a]\ns3cr3t"])
def test_what_is_no_file_of_credentials_is_said_without_its_text(text):
    with pytest.raises(ValueError) as caught:
        roexec.parse_credentials(text, "default")
    assert "s3cr3t" not in str(caught.value)


def reset(handler):
    """Break the connection off."""
    handler.close_connection = True
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.rfile.close()
    handler.wfile.close()
    handler.connection.close()


def temporary(access="ASIA1", seconds=3600, **more):
    return 200, json.dumps({
        "Code": "Success", "AccessKeyId": access, "SecretAccessKey": "s3cr3t", "Token": "t0ken",
        "Expiration": roexec.format_instant(int(time.time() + seconds)), **more}).encode()


def credentials(home="/nonexistent", **environment):
    return roexec.S3Credentials({"AWS_EC2_METADATA_DISABLED": "true", **environment}, str(home))


def test_the_environment_comes_before_the_file(tmp_path):
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text(FILE)
    assert credentials(tmp_path).current().access == "AKDEFAULT"
    keys = credentials(tmp_path, AWS_ACCESS_KEY_ID="AKENV", AWS_SECRET_ACCESS_KEY="s",
                       AWS_SESSION_TOKEN="t").current()
    assert (keys.access, keys.secret, keys.token) == ("AKENV", "s", "t")


def test_files_and_profiles_are_where_the_environment_says(tmp_path):
    file = tmp_path / "keys"
    file.write_text(FILE)
    assert credentials(AWS_SHARED_CREDENTIALS_FILE=str(file), AWS_PROFILE="other"
                       ).current().access == "AKOTHER"
    assert credentials(AWS_CONFIG_FILE=str(file), AWS_PROFILE="configured"
                       ).current().access == "AKCONFIG"
    with pytest.raises(roexec.S3Error, match="no keys for AWS_PROFILE nobody"):
        credentials(AWS_CONFIG_FILE=str(file), AWS_PROFILE="nobody").current()


@pytest.mark.parametrize("environment, text", [
    ({}, "there are no credentials for S3; set AWS_ACCESS_KEY_ID"),
    ({"AWS_ACCESS_KEY_ID": "AK", "AWS_SECRET_ACCESS_KEY": "s3cr3t\n"}, "have characters that none"),
    ({"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://example.com/s3cr3t"}, "neither https nor on"),
    ({"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://127.0.0.1:1/s3cr3t"},
     "no credentials from 127.0.0.1:1: Connection refused"),
    ({"AWS_SHARED_CREDENTIALS_FILE": "/etc"}, "cannot read /etc: Is a directory"),
])
def test_what_is_wrong_with_credentials_is_said_without_them(environment, text):
    with pytest.raises(roexec.S3Error, match=text) as caught:
        credentials(**environment).current()
    assert "s3cr3t" not in str(caught.value)


def test_a_container_is_given_credentials_and_new_ones_before_they_end(answers, tmp_path):
    token = tmp_path / "token"
    token.write_text("first\n")
    source = credentials(AWS_CONTAINER_CREDENTIALS_FULL_URI=answers.url + "/v1/keys?a=b",
                         AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE=str(token))
    answers.replies = [temporary("ASIA1", 3600), temporary("ASIA2", 200), temporary("ASIA3"),
                       (500, b""), temporary("ASIA4", -1), (500, b"")]
    assert source.current().access == source.current().access == "ASIA1"
    assert len(answers.requests) == 1 and answers.requests[0][1] == "/v1/keys?a=b"
    token.write_text("second")
    source.forget()
    assert source.current().access == "ASIA2"       # it ends in 200 seconds: the next asks again
    assert source.current().access == "ASIA3"
    assert [headers["Authorization"] for _, _, headers, _ in answers.requests] == [
        "first", "second", "second"]


def test_credentials_that_are_still_good_outlive_an_endpoint_that_fails(answers):
    source = credentials(AWS_CONTAINER_CREDENTIALS_FULL_URI=answers.url)
    answers.replies, answers.usual = [temporary("ASIA1", 200)], (500, b"s3cr3t")
    assert source.current().access == source.current().access == "ASIA1"
    assert len(answers.requests) == 2
    source.forget()
    with pytest.raises(roexec.S3Error, match="it answers 500$"):
        source.current()


@pytest.mark.parametrize("answer", [
    (200, b"s3cr3t"), (200, b"[]"), (200, b'{"AccessKeyId": "s3cr3t"}'), (404, b"s3cr3t"),
    temporary(Expiration="s3cr3t"), temporary(Token=["s3cr3t"]), temporary(Token="s3cr3t\r\nx: y"),
])
def test_an_endpoint_that_gives_no_credentials_is_no_leak(answers, answer):
    answers.usual = answer
    with pytest.raises(roexec.S3Error) as caught:
        credentials(AWS_CONTAINER_CREDENTIALS_FULL_URI=answers.url).current()
    assert "s3cr3t" not in str(caught.value)


def test_an_instance_is_asked_by_a_token(answers):
    answers.replies = [(200, b"metat0ken"), (200, b"my-role\n"), temporary("ASIAROLE")]
    source = roexec.S3Credentials({"AWS_EC2_METADATA_SERVICE_ENDPOINT": answers.url}, "/none")
    assert source.current().access == "ASIAROLE"
    assert [(method, path) for method, path, _, _ in answers.requests] == [
        ("PUT", "/latest/api/token"), ("GET", "/latest/meta-data/iam/security-credentials/"),
        ("GET", "/latest/meta-data/iam/security-credentials/my-role")]
    assert answers.requests[2][2]["X-aws-ec2-metadata-token"] == "metat0ken"


# A bucket whose answers are written here.

@pytest.fixture
def client(answers, monkeypatch):
    """A client of `answers`, which does not wait long before it tries again."""
    monkeypatch.setattr(roexec, "_pause", lambda number: None)
    made = client_of(answers.url)
    yield made
    made.close()


def client_of(endpoint=None, source=None, timeout=30, **settings):
    return roexec.S3Client(types.SimpleNamespace(**{
        "bucket": "attic", "prefix": "deep/er", "endpoint": endpoint, "region": "eu-north-1",
        **settings}), source or credentials(AWS_ACCESS_KEY_ID="AK1", AWS_SECRET_ACCESS_KEY="s3cr3t",
                                            AWS_SESSION_TOKEN="t0ken"), timeout)


@pytest.mark.parametrize("settings, address, path", [
    ({}, "https://attic.s3.eu-north-1.amazonaws.com", ""),
    ({"region": None}, "https://attic.s3.us-east-1.amazonaws.com", ""),
    ({"region": "cn-north-1"}, "https://attic.s3.cn-north-1.amazonaws.com.cn", ""),
    ({"bucket": "my.attic"}, "https://s3.eu-north-1.amazonaws.com", "/my.attic"),
    ({"endpoint": "https://s3.example.com:9000/"}, "https://s3.example.com:9000", "/attic"),
    ({"endpoint": "http://example.com/s3"}, "http://example.com/s3", "/s3/attic"),
])
def test_where_a_bucket_is(settings, address, path):
    client = client_of(**settings)
    assert (client.address, client._base) == (address, path)


@pytest.mark.parametrize("prefix, path", [("deep/er/", "/attic/deep/er/k"), ("/x/", "/attic/x/k"),
                                          ("", "/attic/k"), (None, "/attic/k")])
def test_keys_stand_below_the_prefix(answers, prefix, path):
    client = client_of(answers.url, prefix=prefix)
    client.put("k", b"")
    client.close()
    assert answers.requests[0][1] == path


def test_a_request_shows_no_secret_and_bears_the_token(answers, client):
    client.put("a b/ü", b"body")
    method, path, headers, body = answers.requests[0]
    assert (method, path, body) == ("PUT", "/attic/deep/er/a%20b/%C3%BC", b"body")
    assert headers["x-amz-security-token"] == "t0ken"
    assert "s3cr3t" not in str(headers)
    assert ("SignedHeaders=host;x-amz-content-sha256;x-amz-date;x-amz-security-token,"
            in headers["authorization"])


def test_a_connection_is_kept_and_one_that_has_ended_is_not_used(answers, client):
    for _ in range(5):
        client.put("k", b"x")
    assert answers.connections == 1
    answers.replies = [(200, b"", {"Connection": "close"})]
    client.put("k", b"x")
    client.put("k", b"x")
    assert answers.connections == 2 and len(answers.requests) == 7


PASSING = [(503, error_xml("SlowDown")), (500, error_xml("InternalError")), (502, b"<html>"),
           (504, b""), (429, b""), (400, error_xml("RequestTimeout")), reset]


@pytest.mark.parametrize("reply", PASSING)
def test_what_passes_is_tried_again(answers, client, reply):
    answers.replies, answers.usual = [reply] * 3, (200, b"body")
    assert client.get("k") == b"body"
    assert len(answers.requests) == 4
    answers.requests.clear()
    answers.usual = reply
    with pytest.raises(roexec.S3Error):
        client.get("k")
    assert len(answers.requests) == 4


@pytest.mark.parametrize("status, body, text", [
    (403, error_xml("AccessDenied", "Access Denied"),
     "GET k: AccessDenied: Access Denied (403); the credentials need a policy that allows s3:Get"),
    (403, error_xml("SignatureDoesNotMatch"), "the secret access key is not the one of"),
    (404, error_xml("NoSuchBucket"), "make it, or mend bucket: of store"),
    (400, error_xml("AuthorizationHeaderMalformed", Region="eu-west-9"),
     "write region: eu-west-9 for store"),
    (403, error_xml("X", "s3cr3t and t0ken\n\x1b[31m".replace("\x1b", "")), "*** and ***\\n[31m"),
    (403, b"s3cr3t", "GET k: it answers 403"),
    (302, b"", "it answers 302"),
])
def test_a_refusal_is_said_once_in_words_of_use(answers, client, status, body, text):
    answers.usual = status, body
    with pytest.raises(roexec.S3Error) as caught:
        client.get("k")
    assert text in str(caught.value) and caught.value.status == status
    assert str(caught.value).startswith(f"the bucket attic at {answers.url}: ")
    assert "s3cr3t" not in str(caught.value) and "t0ken" not in str(caught.value)
    assert not isinstance(caught.value, roexec.NoSuchKey)
    assert len(answers.requests) == 1


@pytest.mark.parametrize("seconds, text", [(-1200, "20m behind"), (7200, "2h ahead")])
def test_a_wrong_clock_is_said_plainly(answers, client, monkeypatch, seconds, text):
    now = int(time.time())
    there = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(now - seconds))
    monkeypatch.setattr(time, "time", lambda: now)
    answers.usual = 403, error_xml("RequestTimeTooSkewed"), {"Date": there}
    answers.server.RequestHandlerClass.date_time_string = lambda *_: there
    with pytest.raises(roexec.S3Error, match=f"the clock of this host is {text}; set"):
        client.get("k")


def test_credentials_that_have_ended_are_looked_up_again_once(answers):
    source = Sequence("AK1", "AK2")
    client = client_of(answers.url, source)
    answers.replies = [(403, error_xml("ExpiredToken"))]
    client.put("k", b"x")
    assert ["AK1/" in answers.requests[0][2]["authorization"],
            "AK2/" in answers.requests[1][2]["authorization"]] == [True, True]
    answers.usual = 403, error_xml("ExpiredToken")
    with pytest.raises(roexec.S3Error):
        client.put("k", b"x")
    client.close()
    assert len(answers.requests) == 4 and source.forgotten == 2


class Sequence:
    """Credentials, others after each `forget`."""

    def __init__(self, *accesses):
        self.accesses, self.forgotten = accesses, 0

    def current(self):
        return roexec.S3Keys(access=self.accesses[min(self.forgotten, 1)], secret="s")

    def forget(self):
        self.forgotten += 1


def trickle(handler):
    """An answer whose head goes on and on."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for number in itertools.count():
        handler.wfile.write(b"X-%d: x\r\n" % number)
        handler.wfile.flush()
        time.sleep(0.02)


def drip(handler):
    """An answer whose body has no end."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        handler.wfile.write(b"x")
        handler.wfile.flush()
        time.sleep(0.02)


def silence(handler):
    """No answer until the client has gone."""
    handler.rfile.read(1)


@pytest.mark.parametrize("reply", [trickle, drip, silence])
def test_a_slow_answer_ends_at_the_deadline(answers, monkeypatch, reply):
    monkeypatch.setattr(roexec, "_PACE", 1 << 40)
    client = client_of(answers.url, timeout=0.4)
    answers.usual, began = reply, time.monotonic()
    with pytest.raises(roexec.S3Error, match="there is no answer in time"):
        client.get("k")
    assert 0.3 < time.monotonic() - began < STALLS
    client.close()


def test_a_server_that_is_away_is_said_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        client = client_of(f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(roexec.S3Error, match="attic at http://127.0.0.1.*Connection refused"):
            client.get("k")


def test_tls_is_spoken_to_whom_a_certificate_is_for(answers, tmp_path, monkeypatch):
    key, certificate = str(tmp_path / "key"), str(tmp_path / "certificate")
    subprocess.run([tool("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt",
                    "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", key, "-out", certificate,
                    "-subj", "/CN=s3", "-addext", "subjectAltName=IP:127.0.0.1"],
                   check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    answers.server.socket = context.wrap_socket(answers.server.socket, server_side=True)
    url = answers.url.replace("http:", "https:")
    stranger = client_of(url)
    with pytest.raises(roexec.S3Error, match="certificate cannot be trusted .*SSL_CERT_FILE names"):
        stranger.put("k", b"x")
    stranger.close()
    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    client, before = client_of(url), answers.connections
    for _ in range(5):
        client.put("k", b"x")
    client.close()
    assert len(answers.requests) == 5 and answers.connections == before + 1


def test_an_answer_that_is_too_large_is_refused(answers, client):
    answers.replies = [(200, b"x" * 4 * MIB), (200, b"x" * (4 * MIB + 1))]
    assert client.get("k") == b"x" * 4 * MIB
    with pytest.raises(roexec.S3Error, match="the answer is larger than 4.2 MB"):
        client.get("k")


def page(*keys, more=None):
    entries = "".join(f"<Contents><Key>{key}</Key><Size>1</Size>"
                      "<LastModified>2026-01-02T03:04:05.678Z</LastModified></Contents>"
                      for key in keys)
    end = f"<IsTruncated>{'true' if more else 'false'}</IsTruncated>" + (
        f"<NextContinuationToken>{more}</NextContinuationToken>" if more else "")
    return 200, ('<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
                 f"{entries}{end}</ListBucketResult>").encode()


def test_a_list_is_read_page_by_page(answers, client):
    answers.replies = [page("deep/er/a", "deep/er/b+%2B%C3%BC", more="to ken"), page("deep/er/c")]
    assert list(client.list("x/", start_after="x/a")) == [
        ("a", 1, 1767323045.678), ("b +ü", 1, 1767323045.678), ("c", 1, 1767323045.678)]
    assert answers.requests[0][1] == ("/attic?encoding-type=url&list-type=2&prefix=deep%2Fer%2Fx%2F"
                                      "&start-after=deep%2Fer%2Fx%2Fa")
    assert "continuation-token=to%20ken&" in answers.requests[1][1]


@pytest.mark.parametrize("body", [
    b"", b"<html>", b"\xff\xfe<\0", b"<a/>", b"<ListBucketResult><Contents/></ListBucketResult>",
    b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>",
    b'<!DOCTYPE a [<!ENTITY b "bbbb">]><ListBucketResult>&b;</ListBucketResult>',
    page("k")[1].replace(b"<Size>1", b"<Size>x"),
])
def test_a_list_that_is_none_is_refused(answers, client, body):
    answers.usual = 200, body
    with pytest.raises(roexec.S3Error, match="answers what S3 would not"):
        list(client.list())


@pytest.mark.parametrize("replies, result", [
    ([(200, b"")], True),
    ([(412, error_xml("PreconditionFailed"))], False),
    ([(500, b""), (200, b"mine")], True),               # it was done all the same
    ([reset, (200, b"mine")], True),
    ([reset, (200, b"theirs")], False),
    ([(409, error_xml("ConditionalRequestConflict")), (404, error_xml("NoSuchKey")), (200, b"")],
     True),
    ([reset, (404, error_xml("NoSuchKey")), (412, b""), (200, b"mine")], True),
    ([reset, (404, error_xml("NoSuchKey")), (412, b""), (200, b"theirs")], False),
])
def test_a_conditional_write_whose_answer_is_lost_is_read_back(answers, client, replies, result):
    answers.replies = list(replies)
    assert client.put("k", b"mine", if_none_match=True) is result
    assert not answers.replies
    assert answers.requests[0][2]["if-none-match"] == "*"


def test_a_store_without_conditional_writes_is_refused(answers, client):
    answers.usual = 501, error_xml("NotImplemented")
    with pytest.raises(roexec.S3Error, match="no conditional writes .If-None-Match., which roexec"):
        client.put("k", b"mine", if_none_match=True)


@pytest.mark.parametrize("replies, text", [
    ([(206, b"ab", {"Content-Range": "bytes 0-1/4", "ETag": '"1"'}),
      (206, b"cd", {"Content-Range": "bytes 2-3/4", "ETag": '"2"'})], "has changed while"),
    ([(206, b"ab", {"Content-Range": "bytes 0-1/4"}),
      (206, b"", {"Content-Range": "bytes 2-3/4"})], "has changed while"),
    ([(206, b"ab", {"Content-Length": "9", "Content-Range": "bytes 0-8/9", "Connection": "close"})]
     * 4, "ends too early"),
    ([(404, error_xml("NoSuchKey"))], "NoSuchKey"),
    ([(416, b"")], None), ([(200, b"whole")], None),
    ([(206, b"ab", {"Content-Range": "bytes 0-1/4"}),
      (206, b"cd", {"Content-Range": "bytes 2-3/4"})], None),
])
def test_a_file_is_there_once_it_is_complete(answers, client, tmp_path, replies, text):
    answers.replies = list(replies)
    if text:
        with pytest.raises(roexec.S3Error, match=text):
            client.download("k", str(tmp_path / "file"))
        assert os.listdir(tmp_path) == []
    else:
        client.download("k", str(tmp_path / "file"))
        assert (tmp_path / "file").read_bytes() == {416: b"", 200: b"whole", 206: b"abcd"}[
            replies[0][0]]
        assert os.listdir(tmp_path) == ["file"]
        assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


@pytest.fixture
def large(tmp_path):
    """A file of 33 MiB."""
    path = tmp_path / "large"
    with open(path, "wb") as file:
        for _ in range(33):
            file.write(os.urandom(MIB))
    return path


BEGUN = 200, (b"<InitiateMultipartUploadResult><UploadId>U&amp;1</UploadId>"
              b"</InitiateMultipartUploadResult>")
PART = 200, b"", {"ETag": '"<e>"'}
ENDED = 200, b"<CompleteMultipartUploadResult><Key>k</Key><ETag/></CompleteMultipartUploadResult>"


@pytest.mark.parametrize("replies, text", [
    ([BEGUN, PART, PART, PART, ENDED], None),
    ([BEGUN, PART, reset, PART, PART, (503, b""), ENDED], None),
    ([BEGUN, PART, PART, PART, reset, (404, error_xml("NoSuchUpload")),
      (200, b"x" * 33, {"Content-Length": str(33 * MIB)})], None),
    ([BEGUN, PART, PART, PART, (200, error_xml("InternalError")), (204, b"")], "InternalError"),
    ([BEGUN, PART, (403, error_xml("AccessDenied")), (204, b"")], "AccessDenied"),
    ([BEGUN, PART, PART, PART, (404, error_xml("NoSuchUpload")), (404, b""), (204, b"")],
     "HEAD k"),
    ([(200, b"<x/>")], "answers what S3 would not"),
])
def test_a_large_object_goes_in_parts_or_not_at_all(answers, client, large, replies, text):
    answers.replies = list(replies)
    with open(large, "rb") as file:
        if text is None:
            assert client.put("k", file) is True
        else:
            with pytest.raises(roexec.S3Error, match=text):
                client.put("k", file)
    assert not answers.replies
    bodies = {path.partition("?")[2]: body for method, path, _, body in answers.requests
              if "partNumber" in path}
    if text is None:
        assert b"".join(bodies[key] for key in sorted(bodies)) == large.read_bytes()
        assert max(map(len, bodies.values())) == 16 * MIB
        ends = [body for method, _, _, body in answers.requests if method == "POST" and body]
        assert b"<PartNumber>3</PartNumber><ETag>&lt;e&gt;</ETag>" in ends[0]
    elif len(replies) > 1:
        assert answers.requests[-1][:2] == ("DELETE", "/attic/deep/er/k?uploadId=U%261")


# A real bucket.

@pytest.mark.engine
def test_objects_are_written_read_listed_and_removed(bucket):
    client = bucket()
    for key in ("a/2", "a/1", "b"):
        assert client.put(key, key.encode()) is True
    client.put("b", b"again")
    assert client.get("b") == b"again" and client.head("b")["size"] == 5
    assert '"' not in client.head("b")["etag"]
    assert [(key, size) for key, size, _ in client.list()] == [("a/1", 3), ("a/2", 3), ("b", 5)]
    assert [key for key, _, _ in client.list("a/", start_after="a/1")] == ["a/2"]
    modified = next(client.list())[2]
    assert abs(modified - time.time()) < 60
    client.delete("b")
    client.delete("b")
    for ask in (client.get, client.head):
        with pytest.raises(roexec.NoSuchKey, match="b"):
            ask("b")


@pytest.mark.engine
@pytest.mark.parametrize("key", ["d ir/ü+&=~'()*!@:,$.txt%20", "a//b", "%2F", "a/./b",
                                 "runs/\u2028<&>"])
def test_odd_keys_are_one_key(bucket, key):
    client = bucket()
    client.put(key, b"here")
    assert client.get(key) == b"here"
    assert [found for found, _, _ in client.list()] == [key]


@pytest.mark.engine
def test_a_prefix_hides_the_rest_of_the_bucket(bucket):
    bucket(prefix="one/two").put("k", b"1")
    assert [key for key, _, _ in bucket(prefix="one").list()] == ["two/k"]
    assert list(bucket(prefix="one/tw").list()) == []
    assert "one/two/k" in [key for key, _, _ in bucket(prefix="").list("one/")]


@pytest.mark.engine
def test_a_long_list_has_all_of_it(bucket):
    client, wanted = bucket(), [f"k/{number:04}" for number in range(1100)]
    left = list(wanted)

    def work():
        while left:
            client.put(left.pop(), b"")
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [key for key, _, _ in client.list("k/")] == wanted


@pytest.mark.engine
def test_of_those_who_write_a_new_object_one_does(bucket):
    client, results = bucket(), []
    threads = [threading.Thread(target=lambda number=number: results.append(
        (client.put("k", b"%d" % number, if_none_match=True), number))) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winner, = [number for won, number in results if won]
    assert client.get("k") == b"%d" % winner


@pytest.mark.engine
def test_a_large_file_goes_there_and_comes_back(bucket, large, tmp_path):
    client = bucket()
    with open(large, "rb") as file:
        client.put("large", file)
    assert client.head("large")["size"] == 33 * MIB
    client.download("large", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == large.read_bytes()
    with open(os.devnull, "rb") as file:
        client.put("empty", file)
    client.download("empty", str(tmp_path / "empty"))
    assert (tmp_path / "empty").read_bytes() == b""


@pytest.mark.engine
def test_an_upload_that_fails_leaves_nothing(bucket, large, monkeypatch):
    client = bucket()
    with open(large, "rb") as file:
        monkeypatch.setattr(client, "_complete", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            client.put("large", file)
    said = client._ask("GET", None, {"uploads": "", "prefix": client.prefix})[1]
    assert b"<ListMultipartUploadsResult" in said and b"<Upload>" not in said
    assert list(client.list()) == []


@pytest.mark.engine
@pytest.mark.parametrize("settings, text", [
    ({"secret": "wr0ng-secret"}, "SignatureDoesNotMatch.*the secret access key is not the one"),
    ({"access": "AKNOBODY"}, "InvalidAccessKeyId.*this access key id is not known there"),
    ({"bucket": "no-such-bucket"}, "NoSuchBucket.*make it, or mend bucket: of store"),
])
def test_a_real_refusal_is_understood(bucket, s3_server, settings, text):
    with pytest.raises(roexec.S3Error, match=text) as caught:
        bucket(**settings).put("k", b"")
    assert s3_server.secret not in str(caught.value) and "wr0ng" not in str(caught.value)


@pytest.mark.engine
def test_a_clock_that_is_off_is_understood(bucket, s3_server, monkeypatch):
    if not s3_server.checks_clocks:
        pytest.skip("this server looks at no clock")
    client, gmtime = bucket(), time.gmtime
    monkeypatch.setattr(time, "gmtime", lambda *given: gmtime(*given or [time.time() - 1200]))
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 1200)
    with pytest.raises(roexec.S3Error, match="the clock of this host is (19|20|40)m.* behind"):
        client.put("k", b"")


@pytest.mark.engine
def test_a_gateway_that_was_away_serves_again(bucket, s3_server):
    if not s3_server.can_return:
        pytest.skip("this server would have forgotten all")
    client = bucket()
    client.put("k", b"kept")
    s3_server.gateway.kill()
    with pytest.raises(roexec.S3Error, match="Connection refused"):
        client.get("k")
    s3_server.start_gateway()
    assert client.get("k") == b"kept"
