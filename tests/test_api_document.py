"""The OpenAPI document against the live server: what it says holds, whatever one sends."""
import json
import os
import random
import re
import urllib.parse

import pytest
from served import (NOW, ask, connection, database, logged, needs_tables,  # noqa: F401
                    record, said, server, store)

import roexec

pytestmark = needs_tables
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW")
ANYWHERE = {405, 417}       # of requests that are none of an operation's


@pytest.fixture
def document(ask):
    return ask("/openapi.json")[1]


# A checker of as much of JSON Schema as the document uses.

def offences(value, schema, document, where="$"):
    """What is wrong with a value, in words."""
    known = {"type", "properties", "required", "items", "enum", "anyOf", "$ref", "minimum",
             "maximum", "pattern", "format", "additionalProperties", "minLength", "maxLength"}
    assert known.issuperset(schema), schema
    if "$ref" in schema:
        parts = schema["$ref"].split("/")[1:]
        target = document
        for part in parts:
            target = target[part]
        yield from offences(value, target, document, where)
        return
    if "anyOf" in schema:
        if all(list(offences(value, each, document)) for each in schema["anyOf"]):
            yield f"{where}: {value!r} is none of {schema['anyOf']}"
        return
    types = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None),
             "integer": int, "number": (int, float)}
    kind = schema.get("type")
    if kind and not (isinstance(value, types[kind])
                     and (kind == "boolean" or not isinstance(value, bool))):
        yield f"{where}: {value!r} is no {kind}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value!r} is none of {schema['enum']}"
    if "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{where}: {value!r} does not match"
    if "minimum" in schema and value < schema["minimum"] or (
            "maximum" in schema and value > schema["maximum"]):
        yield f"{where}: {value!r} is out of range"
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{where}: {name} is missing"
    if isinstance(value, dict):
        more = schema.get("additionalProperties", {})
        for name, item in value.items():
            inner = schema.get("properties", {}).get(name, more)
            yield from offences(item, inner, document, f"{where}.{name}")
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from offences(item, schema.get("items", {}), document, f"{where}[{number}]")


@pytest.mark.parametrize("value, schema", [
    (1, {"type": "string"}), (True, {"type": "integer"}), (None, {"type": "object"}),
    ("x", {"enum": ["y"]}), (5, {"maximum": 4}), (5, {"minimum": 6}),
    ("x", {"pattern": "^y"}), ({}, {"required": ["a"]}), ([1], {"items": {"type": "string"}}),
    ({"a": 1}, {"properties": {"a": {"type": "string"}}}),
    ({"a": 1}, {"additionalProperties": {"type": "string"}}),
    (1, {"anyOf": [{"type": "string"}, {"type": "null"}]}), (1, {"$ref": "#/a"})])
def test_the_checker_sees_what_is_wrong(value, schema):
    assert list(offences(value, schema, {"a": {"type": "string"}}))


def answers_of(document, path, method, status):
    """What the document says of a status of an operation, or None."""
    operation = document["paths"][path].get(method.lower().replace("head", "get"), {})
    return operation.get("responses", {}).get(str(status))


def check(document, path, method, status, headers, content):
    """Fail where an answer is not one of those that the document has for the operation."""
    told = answers_of(document, path, method, status)
    assert told is not None, f"{method} {path}: {status} is not documented: {content[:300]}"
    media = (headers["Content-Type"] or "").partition(";")[0]
    if method == "HEAD" or status in (204, 304):
        assert content == b""
        return
    assert media in told["content"], f"{method} {path}: {status} as {media}"
    if media == "application/json":
        schema = told["content"][media]["schema"]
        wrong = list(offences(json.loads(content), schema, document))
        assert not wrong, f"{method} {path} {status}: {wrong}"


# The document.

def test_each_route_is_described_with_its_answers(document):
    assert document["openapi"].startswith("3.1.") and document["info"]["version"]
    described = {(method.upper(), path) for path, operations in document["paths"].items()
                 for method in operations}
    assert described == {(route.method, route.path) for route in roexec.ROUTES}
    names = [operation["operationId"] for operations in document["paths"].values()
             for operation in operations.values()]
    assert len(set(names)) == len(names)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["summary"].endswith(".") and operation["description"]
            assert {"400", "503"} <= set(operation["responses"])
            arguments = {each["name"] for each in operation["parameters"] if each["in"] == "path"}
            assert arguments == set(re.findall(r"{(\w+)}", path))
            if path.endswith("/health"):
                assert operation["security"] == []


def test_the_examples_are_what_the_schemas_ask_for(document):
    def media_of(operation):
        yield from operation.get("requestBody", {}).get("content", {}).values()
        for answer in operation["responses"].values():
            yield from answer.get("content", {}).values()
    for operations in document["paths"].values():
        for operation in operations.values():
            for media in media_of(operation):
                if media:
                    assert not list(offences(media["example"], media["schema"], document))
            for parameter in operation["parameters"]:
                if "example" in parameter:
                    assert not list(offences(parameter["example"], parameter["schema"], document))


def test_a_token_without_any_scope_may_read_the_document(ask, monkeypatch):
    monkeypatch.setattr(roexec, "gate", lambda *_, **__: roexec.Caller(name="token t", scopes=()))
    assert ask("/openapi.json")[0] == 200


# A fuzzer.

class Fuzzer:
    """Makes requests of the operations of a document: good ones, odd ones, broken ones."""

    ODD = ["", "0", "1", "-1", "x", "\0", "ä€😀", "../..", "%", "a" * 300, "9" * 40, "null", "[]",
           "1e9", "2025-08-01", "9999-12-31T23:59:59Z", "latest", "all", "*", "'; --", " ", "1,2"]
    BODIES = [b"", b"{}", b"[]", b"null", b"{", b"\xff", b'{"a": 1}', b'{"env": {"A": 1}}',
              b'{"env": null}', b'"x"', b"[" * 3000, b'{"queue": "yes"}', b'{"for": -1}',
              b'{"for": "1000000d"}', b'{"until": "9999-12-31T23:59:59Z"}', b"jobs: []", b"a: b: c",
              b'{"files": [1]}', b'{"files": [{"source": "", "text": "x"}]}', b"- x", b"command: x",
              b'{"name": ["x"], "scopes": 3}', b'{"scopes": [[]], "name": "x"}', b"\x00",
              b'{"expires": {"a": 1}, "name": "x", "role": "admin"}', b'{"name": "x", "role": []}',
              b'{"jobs": "a*", "name": "y", "scopes": ["*"], "expires": "1e9"}', b"1e999",
              b'{"command": "x", "schedule": "* * * * *", "tags": ["a"]}', b'{"id": 5}']

    VALUES = [None, True, 0, -1, 1e300, "", "x", "\0", "\ud800", "a" * 5000, [], {}, [[]], [None],
              {"": ""}, {"a": {"b": []}}, [{"id": "a", "command": "x"}], 2 ** 70]

    def __init__(self, document, ids, seed):
        self.document, self.ids, self.random = document, ids, random.Random(seed)
        self.operations = [(path, method.upper(), operation)
                           for path, operations in document["paths"].items()
                           for method, operation in operations.items()]

    def request(self):
        """(path of the document, method, target, headers, body)."""
        pick = self.random
        path, method, operation = pick.choice(self.operations)
        if pick.random() < 0.05:
            method = pick.choice(METHODS)
        elif method == "GET" and pick.random() < 0.1:
            method = "HEAD"
        target = re.sub(r"{\w+}", lambda _: self.quoted(pick.choice(
            self.ids if pick.random() < 0.8 else self.ODD)), path)
        query, headers = [], {}
        for parameter in operation["parameters"]:
            if parameter["in"] != "path" and pick.random() < 0.4:
                value = self.value(parameter)
                if parameter["in"] == "query":
                    query.append(f"{parameter['name']}={self.quoted(value)}")
                elif all(" " < char < "\x7f" for char in value):
                    headers[parameter["name"]] = value
        if pick.random() < 0.03:
            query.append(pick.choice(["unknown=1", "limit=1&limit=2", "%FF=1", "=", "&&"]))
        if pick.random() < 0.1:
            headers["Accept"] = pick.choice(["text/event-stream", "application/json", "x"])
        if pick.random() < 0.1:
            headers["If-None-Match"] = "*"
        body = self.body(operation) if method in ("POST", "PUT", "PATCH") else None
        return path, method, target + "?" * bool(query) + "&".join(query), headers, body

    def quoted(self, text):
        return urllib.parse.quote(text, safe="") or "%20"

    def value(self, parameter):
        """A value of a parameter: often as it is to be, at an end of its range, or odd."""
        schema, chance = parameter["schema"], self.random.random()
        if chance < 0.3:
            return self.random.choice(self.ODD)
        if "enum" in schema:
            return self.random.choice(schema["enum"])
        if schema["type"] == "integer":
            low, high = schema["minimum"], schema["maximum"]
            return str(self.random.choice([low, low + 1, high, low - 1, high + 1, 5]))
        return str(parameter.get("example", "x"))

    def body(self, operation):
        content = operation.get("requestBody", {}).get("content", {})
        if content and self.random.random() < 0.4:
            sample = dict(content["application/json"]["example"])
            if sample and self.random.random() < 0.4:
                sample[self.random.choice(list(sample))] = self.random.choice(self.VALUES)
            body = json.dumps(sample).encode()
            return body if self.random.random() < 0.7 else self.damaged(body)
        return self.random.choice(self.BODIES)

    def damaged(self, body):
        place = self.random.randrange(len(body))
        return body[:place] + bytes([self.random.randrange(256)]) + body[place + 1:]


def answered(connection, method, target, headers, body):
    """(status, headers, content) of a request; what does not end by itself is cut off."""
    connection.request(method, target, body, headers)
    response = connection.getresponse()
    lasting = response.status == 200 and method == "GET" and (
        target.startswith("/api/v1/events") or "follow=1" in target)
    if not lasting:
        return response.status, response.headers, response.read()
    response.close()
    connection.close()
    return response.status, response.headers, b""


TRIES = 20_000 if os.environ.get("ROEXEC_LONG") else 1200


@pytest.mark.parametrize("who", ["admin", "nobody"])
def test_whatever_is_asked_the_answer_is_one_of_the_document(
        who, connection, document, store, monkeypatch):
    monkeypatch.setattr(roexec, "_SLOWEST", 0)
    caller = roexec.Caller(name="test", scopes=("*",), owner=True)
    with store.write() as db:
        token = roexec.add_token(db, roexec.token_of(
            {"name": "boss", "role": "admin"}, caller, NOW, None), caller, NOW)
    ids = ["hello", "backup", "backup-db", "latest", "admin", "x", logged(store),
           record(store, "backup", "queued"), record(store, "hello", "failed", reason="exit")]
    fuzzer = Fuzzer(document, ids, seed=os.environ.get("ROEXEC_SEED", who))
    seen = set()
    for number in range(TRIES if who == "admin" else TRIES // 3):
        path, method, target, headers, body = fuzzer.request()
        headers.update({"Authorization": f"Bearer {token}"} if who == "admin" else
                       {"Via": "1.1 proxy"})
        status, got, content = answered(connection, method, target, headers, body)
        seen.add(status)
        about = f"{number}: {method} {target} {headers} {body!r} -> {status} {content[:300]!r}"
        assert status < 500 or (status == 503 and json.loads(content)["error"]["code"] in (
            "busy", "unavailable")), about
        if method.lower().replace("head", "get") not in document["paths"][path]:
            assert status in ({204, 405} if who == "admin" else {204, 401, 405}), about
        elif content or method == "HEAD" or status in (204, 304):
            check(document, path, method, status, got, content)
    assert {200, 202, 400, 404} <= seen if who == "admin" else {200, 401} <= seen
