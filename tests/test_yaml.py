"""YAML: the right value or an error that says where and why, never a wrong value.

The first two tables are the language: what is read, and as what; what is refused, and where. Their
cases follow the chapters of the YAML 1.2.2 specification, numbered beside them.
"""
import json
import math
import random
import time

import pytest

from roexec import Note, RoexecError, YamlError, load_yaml, read_yaml

INF = float("inf")

READ = {
    "an empty document (9.2) is null": [
        ("", None), ("\n", None), ("   \n\n", None), ("# only a comment", None), ("\t\n", None),
        ("---", None), ("---\n", None), ("--- # nothing\n...\n", None), ("...\n", None),
        ("# c\n...\n# d\n", None), ("---\n# c\n...\n...\n", None), ("\ufeff", None),
    ],
    "core schema: null, booleans (10.3.2)": [
        ("~", None), ("null", None), ("Null", None), ("NULL", None), ("nULL", "nULL"),
        ("true", True), ("True", True), ("TRUE", True), ("tRUE", "tRUE"), ("false", False),
        ("False", False), ("FALSE", False), ("yes", "yes"), ("no", "no"), ("on", "on"),
        ("off", "off"), ("y", "y"), ("N", "N"), ("truex", "truex"), ("'true'", "true"),
        ('"null"', "null"), ("|\n true", "true\n"), ("true\n yes", "true yes"),
    ],
    "core schema: integers (10.3.2)": [
        ("0", 0), ("-0", 0), ("12", 12), ("+12", 12), ("-7", -7), ("0755", 755), ("0o17", 15),
        ("0x1F", 31), ("0xff", 255), ("007", 7), ("1_000", "1_000"), ("0O7", "0O7"),
        ("-0x1", "-0x1"), ("+0o7", "+0o7"), ("0b1", "0b1"), ("0o8", "0o8"), ("0xg", "0xg"),
        ("0X1", "0X1"), ("12:30:00", "12:30:00"), ("12:30", "12:30"), ("1 2", "1 2"),
        ("--1", "--1"), ("+-1", "+-1"), ("1,000", "1,000"), ("٣", "٣"), ("+", "+"),
        ("99999999999999999999", 99999999999999999999), ("9" * 1000, int("9" * 1000)),
    ],
    "core schema: floats (10.3.2)": [
        ("1.5", 1.5), ("-1.5", -1.5), ("+.5", 0.5), (".5", 0.5), ("1.", 1.0), ("1e3", 1000.0),
        ("1E3", 1000.0), ("1e+3", 1000.0), ("12e-1", 1.2), ("1.5e3", 1500.0), (".inf", INF),
        ("-.Inf", -INF), ("+.INF", INF), ("-.nan", "-.nan"), (".iNF", ".iNF"), ("inf", "inf"),
        ("nan", "nan"), ("1.5.2", "1.5.2"), (".", "."), ("-.", "-."), (".e3", ".e3"), ("1e", "1e"),
        ("e3", "e3"), ("1_0.5", "1_0.5"), ("1e-999", 0.0), ("1.10", 1.1),
    ],
    "everything else is a text": [
        ("2025-08-01", "2025-08-01"), ("2025-08-01T02:00:00Z", "2025-08-01T02:00:00Z"), ("=", "="),
        ("<<", "<<"), ("a b", "a b"), ("- <<", ["<<"]), ("a: <<", {"a": "<<"}),
        ("[<<, =]", ["<<", "="]), ("10.0.0.1", "10.0.0.1"), ("1.2.3", "1.2.3"),
    ],
    "plain scalars on one line (7.3.3)": [
        ("a:b", "a:b"), ("a#b", "a#b"), ("a #b", "a"), ("a\t#b", "a"), ("-a", "-a"), ("?a", "?a"),
        (":a", ":a"), ("--", "--"), ("-:", {"-": None}), ("::", {":": None}),
        ("a:: b", {"a:": "b"}), ("a,b]c}", "a,b]c}"), ("a'b\"c", "a'b\"c"),
        ("a & b * c", "a & b * c"), ("a   b", "a   b"), ("  a  ", "a"), ("\ta", "a"),
        ("a\t b", "a\t b"), ("http://x:80/?q=a&b#c", "http://x:80/?q=a&b#c"),
        ("a: b:c", {"a": "b:c"}), ("a\\nb", "a\\nb"), ("a!b", "a!b"), ("x: a %b", {"x": "a %b"}),
        ("---a", "---a"), ("....", "...."), ("a: --- b", {"a": "--- b"}), ("é: ü", {"é": "ü"}),
        ("🐍", "🐍"), ("a\u00a0", "a\u00a0"), ("a\u2028b", "a\u2028b"), ("a\x85b", "a\x85b"),
    ],
    "plain scalars of several lines": [
        ("a\nb", "a b"), ("a\n b\n  c", "a b c"), ("a\n\nb", "a\nb"), ("a\n\n\n b", "a\n\nb"),
        ("a: b\n c", {"a": "b c"}), ("a: b\n\n c\nd: e", {"a": "b\nc", "d": "e"}),
        ("a:\n b\n c", {"a": "b c"}), ("- a\n  b\n- c", ["a b", "c"]), ("- a\n b", ["a b"]),
        ("a: b\n  - c", {"a": "b - c"}), ("a: b\n  ? c", {"a": "b ? c"}),
        ("a: b\n  *c &d !e", {"a": "b *c &d !e"}), ("a: b\n  'c' |", {"a": "b 'c' |"}),
        ("a: b  \n  c\t\n  d", {"a": "b c d"}), ("a: b\n \tc", {"a": "b c"}), ("a\n\tb", "a b"),
        ("a\n% b", "a % b"), ("---\na\n%YAML 1.2", "a %YAML 1.2"), ("a: b\n  c # d", {"a": "b c"}),
        ("a: b\n  c#d", {"a": "b c#d"}), ("a: 1\n  2", {"a": "1 2"}), ("a: b\n\n\n", {"a": "b"}),
        ("a: b\n\t\nc: d", {"a": "b", "c": "d"}), ("a: b\n# c\nd: e", {"a": "b", "d": "e"}),
        ("a: b\n     # c\nd: e", {"a": "b", "d": "e"}), ("a\n  \n  b", "a\nb"),
        ("a: b\n  c:d", {"a": "b c:d"}), ("- a\n\n  b\n", ["a\nb"]), ("a\n---b", "a ---b"),
        ("x:\n  -1\n  -2", {"x": "-1 -2"}),
    ],
    "single quotes (7.3.2)": [
        ("''", ""), ("''''", "'"), ("'a''b'", "a'b"), ("'''a'''", "'a'"), ("' a '", " a "),
        ("'a\\n'", "a\\n"), ("'a: b # c'", "a: b # c"), ("'a\nb'", "a b"), ("'a\n\nb'", "a\nb"),
        ("'a \t\n \t b'", "a b"), ("'\n a\n '", " a "), ("a: 'b\n\n  c'", {"a": "b\nc"}),
        ("'a' # b", "a"), ("'a'  ", "a"), ("'a\\\n b'", "a\\ b"), ("'\n\n'", "\n"), ("'  '", "  "),
        ("a: '\n '", {"a": " "}), ("- 'a\n b'\n- c", ["a b", "c"]), ("'\"'", '"'), ("'#'", "#"),
    ],
    "double quotes (7.3.1) and escapes (5.7)": [
        ('""', ""), ('"a\\"b"', 'a"b'), ('"\\\\"', "\\"), ('"\\\\\\""', '\\"'), ('"a\tb"', "a\tb"),
        (r'"\0\a\b\t\n\v\f\r\e"', "\0\a\b\t\n\v\f\r\x1b"), (r'"\N\_\L\P"', "\x85\xa0\u2028\u2029"),
        (r'"\ \/\	"', " /\t"), (r'"\x41\u0042\U00000043"', "ABC"), (r'"\u263A\xe9"', "☺é"),
        (r'"\ud83d\ude00"', "😀"), (r'"\uD83D\uDE00!"', "😀!"), (r'"\U0001F600"', "😀"),
        (r'"\u0000"', "\0"), ('"a\nb"', "a b"), ('"a\n\n\nb"', "a\n\nb"), ('"a\\\nb"', "ab"),
        ('"a \\\n  b"', "a b"), ('"a\\\n  \\  b"', "a  b"), ('"a\\\n\n b"', "a\nb"),
        ('"a\\ \n b"', "a  b"), ('"a\\t\n b"', "a\t b"), ('"a\\\t\t\n b"', "a\t b"),
        ('"a\\\\\n b"', "a\\ b"), ('"a\\\\\\\n b"', "a\\b"), ('" a "', " a "), ('"\n a\n "', " a "),
        ('"a  \t\n\t b"', "a b"), ('"# : - ["', "# : - ["), ('a: "b\n  c"', {"a": "b c"}),
        ('a: "b\n  \tc"', {"a": "b c"}), ('"a" # b', "a"), ('"\\\n"', ""), ('"\\n\n\\n"', "\n \n"),
        ('"---"', "---"), ('"a\n --- b"', "a --- b"), ('"a\n---b"', "a ---b"), ('"%"', "%"),
    ],
    "literal texts (8.1)": [
        ("|\n a\n b\n", "a\nb\n"), ("|\n a", "a\n"), ("|-\n a\n", "a"), ("|+\n a\n\n", "a\n\n"),
        ("|\n a\n\n\n", "a\n"), ("|-\n a\n\n", "a"), ("|\n\n a\n", "\na\n"),
        ("|\n  a\n   b\n", "a\n b\n"), ("|2\n   a\n  b\n", " a\nb\n"),
        ("a: |1\n  b\n c\n", {"a": " b\nc\n"}), ("a: |2-\n   b\n", {"a": " b"}),
        ("a: |-2\n   b\n", {"a": " b"}), ("a: | # c\n b\n", {"a": "b\n"}),
        ("a: |+ # c\n b\n\n", {"a": "b\n\n"}), ("|\n # a\n", "# a\n"), ("|\n a\n# c\n", "a\n"),
        ("|\na\nb\n", "a\nb\n"), ("--- |\na\n...\n", "a\n"),
        ("a: |\n b\n\n# c\nd: e", {"a": "b\n", "d": "e"}),
        ("a: |\n  b\n # c\nd: e", {"a": "b\n", "d": "e"}), ("a: |\nb: c", {"a": "", "b": "c"}),
        ("a: |+\n\n\nb: c", {"a": "\n\n", "b": "c"}), ("a: |-\n\n\nb: c", {"a": "", "b": "c"}),
        ("a: |\n\n\nb: c", {"a": "", "b": "c"}), ("|", ""), ("|+\n", ""), ("|+\n\n", "\n"),
        ("- |+\n   ", ["\n"]), ("- |\n a\n- |\n b\n", ["a\n", "b\n"]),
        ("a: |\n  b\n    \n  c\n", {"a": "b\n  \nc\n"}), ("a: |\n  b\n \n  c\n", {"a": "b\n\nc\n"}),
        ("a: |\n  \tb\n", {"a": "\tb\n"}), ("a: |\n  b\n  \t\n", {"a": "b\n\t\n"}),
        ("a: |\n b: c\n - d\n", {"a": "b: c\n- d\n"}),
        ("a:\n  - |\n   b\n  - c\n", {"a": ["b\n", "c"]}), ("- - |\n   a\n", [["a\n"]]),
        ("a: |\n  b  \n", {"a": "b  \n"}), ("|\n a\n ---\n b\n", "a\n---\nb\n"),
        ("a: |\r\n  b\r\n  c\r\n", {"a": "b\nc\n"}), ("|\n \\n \"'\n", "\\n \"'\n"),
        ("a: |+\n  b\n  \n \nc: d", {"a": "b\n\n\n", "c": "d"}),
    ],
    "folded texts (8.1.3)": [
        (">\n a\n b\n", "a b\n"), (">-\n a\n b\n", "a b"), (">\n a\n\n b\n", "a\nb\n"),
        (">\n a\n\n\n b\n", "a\n\nb\n"), (">\n a\n  b\n c\n", "a\n b\nc\n"),
        (">\n a\n\n  b\n\n c\n", "a\n\n b\n\nc\n"), (">\n  b\n  c\n", "b c\n"),
        (">1\n  b\n a\n", " b\na\n"), (">\n a\n \tb\n c\n", "a\n\tb\nc\n"),
        (">\n\n\n a\n b\n", "\n\na b\n"), (">+\n a\n b\n\n", "a b\n\n"),
        (">\n a\n b\n\n\n", "a b\n"),
        (">\n a\n  b\n  c\n\n  d\n e\n f\n", "a\n b\n c\n\n d\ne f\n"), (">", ""),
        (">-\n a\n\n", "a"), (">\n a \n b\n", "a  b\n"),
        ("a: >\n b\n c\nd: >-\n e\n f\n", {"a": "b c\n", "d": "e f"}),
        (">\na\nb\n# c\nd\n", "a b # c d\n"), ("- >\n a\n- b\n", ["a\n", "b"]),
        ("a: >\n  b\n   \n  c\n", {"a": "b\n \nc\n"}),
    ],
    "block sequences (8.2.1)": [
        ("- a\n- b", ["a", "b"]), ("-\n- a\n-", [None, "a", None]),
        ("- - a\n  - b\n- c", [["a", "b"], "c"]), ("-\n  - a\n  - b", [["a", "b"]]),
        ("- a: b\n  c: d\n- e", [{"a": "b", "c": "d"}, "e"]),
        ("-   a: b\n    c: d", [{"a": "b", "c": "d"}]), ("- - - a", [[["a"]]]), ("-\ta", ["a"]),
        ("- \t-1", [-1]), ("- # c\n  a", ["a"]), ("- # c\n- a", [None, "a"]),
        ("  - a\n  - b", ["a", "b"]), ("-\n a", ["a"]), ("- []\n- {}", [[], {}]),
        ("- a:\n  - b\n  c:\n  - d", [{"a": ["b"], "c": ["d"]}]), ("- : a", [{None: "a"}]),
        ("- ? a\n  : b", [{"a": "b"}]), ("- 'a': b", [{"a": "b"}]), ("- -a", ["-a"]),
        ("-\n  a: b\n-\n  c: d", [{"a": "b"}, {"c": "d"}]),
        ("- a\n\n- b\n# c\n- d", ["a", "b", "d"]), ("- --- a", ["--- a"]),
    ],
    "block mappings (8.2.2)": [
        ("a: b\nc: d", {"a": "b", "c": "d"}), ("a:\nb:", {"a": None, "b": None}),
        ("a:\n  b:\n    c: d\n  e: f\ng: h", {"a": {"b": {"c": "d"}, "e": "f"}, "g": "h"}),
        ("a:\n- b\n- c\nd: e", {"a": ["b", "c"], "d": "e"}),
        ("a:\n  - b\nc: d", {"a": ["b"], "c": "d"}), ("a : b", {"a": "b"}), ("a\t: b", {"a": "b"}),
        ("a:\tb", {"a": "b"}), ("a:  b  ", {"a": "b"}), ("a b c: d", {"a b c": "d"}),
        ("'a': b\n\"c\" : d", {"a": "b", "c": "d"}), ("a: # c\n  b: c", {"a": {"b": "c"}}),
        ("a:\n\n  # c\n\n  b: c", {"a": {"b": "c"}}), ("  a: b\n  c: d", {"a": "b", "c": "d"}),
        ("a:\n  b", {"a": "b"}), ("a:\n  'b'", {"a": "b"}), ("a:\n \tb", {"a": "b"}),
        ("7: a\n2.5: b\ntrue: c\n~: d", {7: "a", 2.5: "b", True: "c", None: "d"}),
        (": a", {None: "a"}), ("a:\n  |\n  b\n", {"a": "b\n"}),
        ("a:\n  - - b\n    - c", {"a": [["b", "c"]]}), ("a#b: c", {"a#b": "c"}),
        ("a: b#c", {"a": "b#c"}), ("-a: b", {"-a": "b"}), ("?a: b", {"?a": "b"}),
        (":a: b", {":a": "b"}), ("? a\n: b", {"a": "b"}), ("? a\n? b\n: c", {"a": None, "b": "c"}),
        ("? a\n: - b\n  - c", {"a": ["b", "c"]}), ("? a\n:\n- b", {"a": ["b"]}),
        ("? |\n a\n: b", {"a\n": "b"}), ("? 'a\n  b'\n: c", {"a b": "c"}),
        ("? a\n  b\n: c", {"a b": "c"}), ("? a\n# c\n: b\nd: e", {"a": "b", "d": "e"}),
        ("?\n  a\n:\n  b", {"a": "b"}), ("?\n: a", {None: "a"}),
        ("? a\n: b: c\n  d: e", {"a": {"b": "c", "d": "e"}}),
        ("? " + "k" * 2000 + "\n: v", {"k" * 2000: "v"}), ("k" * 1024 + ": v", {"k" * 1024: "v"}),
        ("a,b: c]d", {"a,b": "c]d"}), ("a: ''\nb: \"\"", {"a": "", "b": ""}),
        ("---\na: b\n...", {"a": "b"}), ("a: b\r\nc: d\r\n", {"a": "b", "c": "d"}),
        ("a: b\rc: d", {"a": "b", "c": "d"}), ("\ufeffa: b", {"a": "b"}),
        ("a:\n  b:\n  - c\n  -\n    d: e\n", {"a": {"b": ["c", {"d": "e"}]}}),
        ("a: [b]\nc: {d: e}", {"a": ["b"], "c": {"d": "e"}}), ("\"a\\tb\": c", {"a\tb": "c"}),
        ("a: 1\n \t\nb: 2", {"a": 1, "b": 2}),
        ("a: b # c\n# d\n\n  # e\nf: g", {"a": "b", "f": "g"}),
    ],
    "flow sequences (7.4.1)": [
        ("[]", []), ("[ ]", []), ("[a]", ["a"]), ("[a, b]", ["a", "b"]), ("[a,b]", ["a", "b"]),
        ("[a, b, ]", ["a", "b"]), ("[a\n,b\n]", ["a", "b"]),
        ("[[a], [b, [c]]]", [["a"], ["b", ["c"]]]), ("[a b,\n c\n d]", ["a b", "c d"]),
        ("['a', \"b\"]", ["a", "b"]), ("[a, # c\n b]", ["a", "b"]), ("[ # c\n a]", ["a"]),
        ("[a #c\n]", ["a"]), ("[a: b]", [{"a": "b"}]), ("[a: b, c]", [{"a": "b"}, "c"]),
        ("['a':b]", [{"a": "b"}]), ("['a' : b]", [{"a": "b"}]), ("[a:b]", ["a:b"]),
        ("[? a : b]", [{"a": "b"}]), ("[? a]", [{"a": None}]), ("[: a]", [{None: "a"}]),
        ("[a: ]", [{"a": None}]), ("[? a\n b : c]", [{"a b": "c"}]),
        ("[-1, -a, :b, ?c]", [-1, "-a", ":b", "?c"]), ("[a\n - b]", ["a - b"]),
        ("[a\n\n b]", ["a\nb"]), ("a: [b,\n c]", {"a": ["b", "c"]}), ("- [a,\n  b]", [["a", "b"]]),
        ("\t[\n\t]", []), ("[\n\ta,\n\tb\n]", ["a", "b"]),
        ("[~, 1, 1.5, true, x]", [None, 1, 1.5, True, "x"]),
        ("[a|b, a>b, a&b, a*b, a!b, a%b, a@b]", ["a|b", "a>b", "a&b", "a*b", "a!b", "a%b", "a@b"]),
        ("[a'b, c\"d]", ["a'b", "c\"d"]), ("[a#b]", ["a#b"]),
        ("[{a: b}, {c: d}]", [{"a": "b"}, {"c": "d"}]), ("['a\n b', \"c\n d\"]", ["a b", "c d"]),
        ("[] # c", []), ("--- [a]", ["a"]), ("[a] \n", ["a"]), ("[\n# c\n]", []),
        ("[a\t,\tb\t]", ["a", "b"]), ("[a:]", [{"a": None}]),
    ],
    "flow mappings (7.4.2)": [
        ("{}", {}), ("{a: b}", {"a": "b"}), ("{a: b, c: d}", {"a": "b", "c": "d"}),
        ("{a: b,}", {"a": "b"}), ("{a, b: c}", {"a": None, "b": "c"}),
        ("{a:, b: }", {"a": None, "b": None}), ("{a:1}", {"a:1": None}), ('{"a":1}', {"a": 1}),
        ('{"a" :1}', {"a": 1}),
        ("{'a':b, 'c':[d], 'e':{f: g}}", {"a": "b", "c": ["d"], "e": {"f": "g"}}),
        ("{? a : b}", {"a": "b"}), ("{? a, : b}", {"a": None, None: "b"}), ("{? }", {None: None}),
        ("{: a}", {None: "a"}), ("{a\n: b}", {"a": "b"}), ("{a\n b: c\n d}", {"a b": "c d"}),
        ("{'a'\n:\nb}", {"a": "b"}), ("{a: b # c\n, d: e}", {"a": "b", "d": "e"}),
        ("{a: {b: {c: d}}}", {"a": {"b": {"c": "d"}}}),
        ("a: {b: c,\n d: e}", {"a": {"b": "c", "d": "e"}}),
        ("{a: 'b', c: \"d\"}", {"a": "b", "c": "d"}),
        ("{1: a, 2: b, ~: c}", {1: "a", 2: "b", None: "c"}), ("{a: b:c}", {"a": "b:c"}),
        ("{a: -1, b: -c}", {"a": -1, "b": "-c"}), ("{x: http://a/b?c=d}", {"x": "http://a/b?c=d"}),
        ("{ matches\n% : 20 }", {"matches %": 20}), ("k: {\n k\n :\n v\n }", {"k": {"k": "v"}}),
        ("{" + "k" * 2000 + ": v}", {"k" * 2000: "v"}), ("{a:\n\tb}", {"a": "b"}),
    ],
    "JSON": [
        ('{"a": [1, 2.5, -3e2, true, false, null, "x\\u00e9\\/\\"", {}, []]}',
         {"a": [1, 2.5, -300.0, True, False, None, 'xé/"', {}, []]}),
        ('{\n\t"a": {\n\t\t"b": 1\n\t}\n}\n', {"a": {"b": 1}}), ('["\\ud83d\\ude00"]', ["😀"]),
        ('{"a":{"b":[{"c":"d"}]}}', {"a": {"b": [{"c": "d"}]}}), ('"a: b, [c]"', "a: b, [c]"),
    ],
    "anchors and aliases (6.9.2, 7.1)": [
        ("- &a b\n- *a", ["b", "b"]), ("a: &x\n  b: c\nd: *x", {"a": {"b": "c"}, "d": {"b": "c"}}),
        ("a: &x [b]\nc: *x", {"a": ["b"], "c": ["b"]}), ("&a b: c\nd: *a", {"b": "c", "d": "b"}),
        ("&a\nb: c", {"b": "c"}), ("&a\n&b c: d", {"c": "d"}),
        ("- &a a\n- &a b\n- *a", ["a", "b", "b"]), ("- &a\n- *a", [None, None]),
        ("a: &x\nb: *x", {"a": None, "b": None}), ("a: &x |\n b\nc: *x", {"a": "b\n", "c": "b\n"}),
        ("a: &x 'b'\nc: *x", {"a": "b", "c": "b"}), ("a: &x\n- b\nc: *x", {"a": ["b"], "c": ["b"]}),
        ("- &x k: v\n- *x", [{"k": "v"}, "k"]), ("a: &x k\n*x : v", {"a": "k", "k": "v"}),
        ("[&a b, *a]", ["b", "b"]), ("{&a b: c, d: *a}", {"b": "c", "d": "b"}),
        ("[&a , *a]", [None, None]), ("{a: &x {b: c}, d: *x}", {"a": {"b": "c"}, "d": {"b": "c"}}),
        ("&a: k: &v w\nx:\n  *a:", {"k": "w", "x": "k"}), ("- &é a\n- *é", ["a", "a"]),
        ("--- &a\n- b", ["b"]), ("--- &a b", "b"), ("&a : b\nc: d", {None: "b", "c": "d"}),
        ("a: &x 1\nb: [*x, *x]", {"a": 1, "b": [1, 1]}), ("a: &x # c\n  b", {"a": "b"}),
        ("? &a b\n: *a", {"b": "b"}), ("&a [b]", ["b"]), ("&a 'b': *a", {"b": "b"}),
        ("{&a : b}", {None: "b"}), ("[&a 'b':c, *a]", [{"b": "c"}, "b"]),
    ],
    "merge keys": [
        ("a: &x {b: 1, c: 2}\nd:\n  <<: *x\n  c: 3",
         {"a": {"b": 1, "c": 2}, "d": {"c": 3, "b": 1}}),
        ("a: &x {b: 1}\nc: {b: 2, <<: *x}", {"a": {"b": 1}, "c": {"b": 2}}),
        ("- &x {a: 1}\n- &y {a: 2, b: 3}\n- <<: [*x, *y]",
         [{"a": 1}, {"a": 2, "b": 3}, {"a": 1, "b": 3}]),
        ("<<: {a: 1}\nb: 2", {"a": 1, "b": 2}), ("'<<': 1", {"<<": 1}), ('{"<<": 1}', {"<<": 1}),
        ("a: &x [{b: 1}, {c: 2}]\nd: {<<: *x}", {"a": [{"b": 1}, {"c": 2}], "d": {"b": 1, "c": 2}}),
        ("<<: []\na: 1", {"a": 1}), ("? <<\n: {a: 1}", {"a": 1}), ("[<<: {a: 1}]", [{"a": 1}]),
        ("- &x {a: {b: 1}}\n- {<<: *x, a: {c: 2}}", [{"a": {"b": 1}}, {"a": {"c": 2}}]),
        ("a: &x\n  <<: {b: 1}\nc:\n  <<: *x\n  d: 2", {"a": {"b": 1}, "c": {"b": 1, "d": 2}}),
    ],
    "documents and directives (9, 6.8)": [
        ("%YAML 1.2\n---\na", "a"), ("%YAML 1.1\n---\na: 1", {"a": 1}),
        ("%YAML 1.2 # c\n---\na", "a"), ("%FOO bar baz\n---\na", "a"),
        ("# c\n%YAML 1.2\n# d\n---\na", "a"), ("--- a", "a"), ("--- 'a'", "a"), ("---\ta", "a"),
        ("---\n\n  a", "a"), ("--- >\n a\n", "a\n"), ("--- # c\na: b", {"a": "b"}),
        ("a\n...\n", "a"), ("a\n... # c\n# d\n", "a"), ("a\n...\n...\n", "a"), ("...\na", "a"),
        ("--- {a: b}\n", {"a": "b"}), ("---\n- a\n", ["a"]), ("--- |\n %a\n", "%a\n"),
        ("%YAML 1.2\n--- |\n%a\n", "%a\n"), ("%YAML \t 1.2\n---\n", None),
        ("%YAML 1.1\n---\n[12, 1.5, 0x1f, abc, true]", [12, 1.5, 31, "abc", True]),
        ("--- a\n b\n", "a b"),
    ],
    "block structure (8)": [
        ("a:\n    b: 1\n    c:\n     - x\nd: 2", {"a": {"b": 1, "c": ["x"]}, "d": 2}),
        ("- a:\n    - b\n-   - c\n    - d", [{"a": ["b"]}, ["c", "d"]]),
        ("-\n\n  # c\n  a: b\n- - - c", [{"a": "b"}, [["c"]]]),
        ("- a: b\n\n  c: d", [{"a": "b", "c": "d"}]),
        ("a:\n- b:\n  - c\n- d", {"a": [{"b": ["c"]}, "d"]}),
        ("- ? a\n  : - b\n    - c\n", [{"a": ["b", "c"]}]),
        ("? a\n: - b\n? c", {"a": ["b"], "c": None}), ("a:\n  ? b\n  : c", {"a": {"b": "c"}}),
        ("? a\n:\tb", {"a": "b"}), ("?\ta", {"a": None}),
        ("- &x\n  a: b\n- *x", [{"a": "b"}, {"a": "b"}]),
        ("a:\n &x\n- b\nc: *x", {"a": ["b"], "c": ["b"]}), ("--- # c\n# d\n- a", ["a"]),
        ("---\n\n\na: b", {"a": "b"}), ("--- |1\n  a\n", " a\n"),
        ("a: 'b'   \nc: d", {"a": "b", "c": "d"}), ("'a' : b", {"a": "b"}),
        ("a:\n  'b':\n    c", {"a": {"b": "c"}}), ("a: &x b # c\nd: *x # e", {"a": "b", "d": "b"}),
        ("x: a\n\n\n# c\n\ny: b\n", {"x": "a", "y": "b"}),
        ("a: b\n\t# c\nd: e", {"a": "b", "d": "e"}), ("- a\n\t\n- b", ["a", "b"]),
        ("a: {\n}\nb: [\n]", {"a": {}, "b": []}),
        ("a: [\n  b\n]\nc: {\n  d: e\n}", {"a": ["b"], "c": {"d": "e"}}),
        ("- [\n  a\n  ]\n- {b: c,\n d: e}", [["a"], {"b": "c", "d": "e"}]),
    ],
    "texts at their edges": [
        ("a: |\n  b\n\n\n", {"a": "b\n"}), ("a: |+\n  b\n\n# c\n", {"a": "b\n\n"}),
        ("a: >-\n  b\n\n\n  c\n", {"a": "b\n\nc"}), ("- |\n a\n  \n", ["a\n \n"]),
        ("|+\n\n  \n...\n", "\n\n"), ("a: >\n\n  b\n\n  c\n", {"a": "\nb\nc\n"}),
        ("a: >\n  b\n  * c\n  * d\n", {"a": "b * c * d\n"}),
        ("a: >\n   b\n\n\n    c\n   d\n", {"a": "b\n\n\n c\nd\n"}),
        ("a: |\n  b\n # c\n\t# d\ne: f", {"a": "b\n", "e": "f"}),
        ("- |-\n a\n-   |+\n  b\n\n- c", ["a", "b\n\n", "c"]),
        ("a: |9\n          b\n", {"a": " b\n"}), ("a: |\n  b", {"a": "b\n"}),
        ("a: |\n  b\n   ", {"a": "b\n \n"}), ("a: |-\n  b", {"a": "b"}),
        ("a: >+\n  b\n\n", {"a": "b\n\n"}), ("a: >+\n\n\nb: c", {"a": "\n\n", "b": "c"}),
        ("a: 'b\n\n\n  c'", {"a": "b\n\nc"}), ("a: \"b\\\n  \\tc\"", {"a": "b\tc"}),
        ("'a\n\t\n b'", "a\nb"), ("\"\\\n  a\\\n  b\\\n\"", "ab"),
        ('"\\ufeff\\uFFFE\\x00\\u00e9"', "\ufeff\ufffe\0\xe9"),
        ('"\\ud83d\\ude00\\uD83D\\uDE01"', "\U0001f600\U0001f601"),
        ("'\x7f\x9f\ufeff'", "\x7f\x9f\ufeff"), ("a:\n  ---\n  b", {"a": "--- b"}),
        ("a\n ...", "a ..."), ("[a\n ---\n ]", ["a ---"]), ("a: b\n   \n  c", {"a": "b\nc"}),
        ("a: b #c\n#d\ne: f", {"a": "b", "e": "f"}), ("a: b\n  #c\ne: f", {"a": "b", "e": "f"}),
        ("[a\n\n\n b, c]", ["a\n\nb", "c"]), ("{a\n b: c, d\n : e}", {"a b": "c", "d": "e"}),
        ("[\"a\":b, 'c' :d]", [{"a": "b"}, {"c": "d"}]),
        ("[a, [b, {c: d}], e]", ["a", ["b", {"c": "d"}], "e"]),
        ("{a: [b, c], d: {e: , f}}", {"a": ["b", "c"], "d": {"e": None, "f": None}}),
        ("[a, ? b : c, ? , : ]", ["a", {"b": "c"}, {None: None}, {None: None}]),
        ("[&a, &b ]", [None, None]), ("{&a, b: *a}", {None: None, "b": None}),
        ("[&a b: c, *a : d]", [{"b": "c"}, {"b": "d"}]),
        ("{\"a\":1,\"b\":[2,3],\"c\":{}}", {"a": 1, "b": [2, 3], "c": {}}),
        ("{a: b #c\n #d\n}", {"a": "b"}),
    ],
}

REFUSED = {
    "keys that are equal are one key": [
        ("a: b\na: c", "2:1"), ("a: b\n'a': c", "2:1"), ("1: a\n1.0: b", "2:1"),
        ("{a: 1, a: 2}", "1:8"), ("{1: a, true: b}", "1:8"), ("~: a\nnull: b", "2:1"),
        (": a\n: b", "2:1"), ("<<: {b: 2}\n<<: {c: 3}", "2:1"), ("? a\n? a\n", "2:1"),
        ("a: &x b\n*x : c\nb: d", "3:1"), (".nan: a\n.nan: b", "2:1"),
    ],
    "a collection is no key": [
        ("[a]: b", "1:1"), ("{a: b}: c", "1:1"), ("? [a]\n: b", "1:1"), ("? - \n", "1:1"),
        ("? a: b\n: c", "1:1"), ("?\n  - a\n", "1:1"), ("{[a]: b}", "1:2"), ("{{a: b}: c}", "1:2"),
        ("[[a]: b]", "1:2"), ("a: &x [b]\n*x : c", "2:1"), ("[? {a: b} : c]", "1:2"),
    ],
    "tabs do not indent (6.1)": [
        ("\ta: b", "1:1"), ("a:\n\tb: c", "2:1"), ("a: b\n\tc: d", "2:1"),
        ("a:\n  b: c\n\td: e", "3:1"), ("a:\n \t- b", "2:2"), ("-\t- a", "1:2"),
        ("- \ta: b", "1:3"), ("?\t- a", "1:2"), ("? a\n:\t- b", "2:2"), ("a:\n\t- b", "2:1"),
        ("a: b\n\t\n c", "2:1"), ("a: 'b\n\t\n  c'", "2:1"), ("a: |\n\tb", "2:1"),
        ("a: |\n  b\n\tc", "3:1"), ("a: |\n  b\n\t\nc: d", "3:1"), ("a: [\n\tb]", "2:2"),
        ("a: 'b\n\tc'", "2:1"),
    ],
    "outside of the language: tags, several documents": [
        ("!a b", "1:1"), ("a: !b c", "1:4"), ("- !<x> a", "1:3"), ("[!a b]", "1:2"),
        ("!!str a: b", "1:1"), ("&x !a b", "1:4"), ("a\n---\nb", "2:1"), ("---\n---\n", "2:1"),
        ("a\n...\n---\nb", "3:1"), ("a\n...\nb", "3:1"), ("---\n...\n---\n", "3:1"),
    ],
    "anchors and aliases (6.9.2, 7.1)": [
        ("*a", "1:1"), ("a: &x 1\nb: *y", "2:4"), ("&a [*a]", "1:5"), ("&a\nb: *a", "2:4"),
        ("a: 1\nb: &x {c: *x}", "2:11"), ("- &x 1\n- &x [*x]", "2:7"), ("&a &b c", "1:1"),
        ("&a\n&b c", "2:1"), ("&a\n&b\nc: d", "2:1"), ("a: &x *x", "1:4"),
        ("- &x a\n- &y\n  *x", "3:3"), ("&a - b", "1:4"), ("a: &x - b", "1:7"),
        ("a: &x b: c", "1:8"), ("a: & b", "1:4"), ("[&a &b c]", "1:2"), ("&a,b", "1:3"),
        ("&a[b]", "1:1"), ("[&a{}]", "1:2"), ("&ab{ c: d", "1:1"), ("a: &bc[d]", "1:4"),
        ("- &x a\n- *xy[b]", "2:3"), ("- &xy a\n- *xyz", "2:3"), ("a:\n&x\n- b", "2:1"),
        ("- &x a\n- *x b", "2:3"), ("[&a b: c, *a: c]", "1:11"), ("- &b x\n- [&a\n  *b]", "3:3"),
        ("- &b x\n- &a *b : c", "2:3"), ("{&a\n&b c: d}", "2:1"),
    ],
    "block structure (8.2)": [
        ("a: - b", "1:4"), ("a: -", "1:4"), ("a: ? b", "1:4"), ("a: b: c", "1:5"),
        ("a: 'b': c", "1:7"), ("a: [b]: c", "1:7"), ("a: b\n  c: d", "2:4"), ("a\nb: c", "2:2"),
        ("a:\n  b\n  c: d", "3:4"), ("- a: b: c", "1:7"), ("--- a: b", "1:6"), ("--- - a", "1:5"),
        ("--- ? a", "1:5"), ("a: b\n- c", "2:1"), ("- a\nb: c", "2:1"),
        ("a:\n  b: c\n d: e", "3:2"), ("a:\n    b: c\n  d: e", "3:3"), ("- - a\n - b", "2:2"),
        ("  a: b\nc: d", "2:1"), ("a: 'b'\n  c: d", "2:3"), ("a: [b]\n  - c", "2:3"),
        ("a: b\nc", "2:1"), ("a: b\n? c\nd", "3:1"), ("a: b\n'c'", "2:1"), ("a: b\n|\n c", "2:1"),
        ("? a\n  : b", "2:3"), ("a:\n  - b\n  c: d", "3:3"), ("a: b\n: - c", "2:3"),
        ("- a\n-b", "2:1"), ("'a\n b': c", "1:1"), ("\"a\n b\": c", "1:1"),
        ("k" * 1025 + ": v", "1:1"), ("'" + "k" * 1023 + "': v", "1:1"),
        ("[" + "k" * 1025 + ": v]", "1:2"), ("1\n:", "2:1"),
    ],
    "plain scalars (7.3.3)": [
        ("a: b\n  # c\n  d", "3:3"), ("a: b # c\n  d", "2:3"), ("a #b\nc", "2:1"), ("a: @b", "1:4"),
        ("a: `b`", "1:4"), ("a: %b", "1:4"), ("a: ]", "1:4"), ("a: }", "1:4"), ("a: ,b", "1:4"),
        ("a: b\n\n\tc", "3:1"), ("- ,", "1:3"),
    ],
    "quotes (7.3.1, 7.3.2)": [
        ("a: 'b", "1:4"), ("\"a", "1:1"), ("'a''", "1:1"), ("\"a\\\"", "1:1"), ("a: 'b' c", "1:8"),
        ("a: \"b\"c", "1:7"), ("a: 'b'#c", "1:7"), ("a: 'b\nc'", "2:1"), ("a: \"b\nc\"", "2:1"),
        ("a: 'b\n'", "2:1"), ("- 'a\n---\nb'", "1:3"), ("'a\n... b'", "1:1"), ("\"\\x4\"", "1:2"),
        ("\"\\u12\"", "1:2"), ("\"\\U0001F60\"", "1:2"), ("\"\\q\"", "1:2"), ("\"\\'\"", "1:2"),
        ("\"\\ud800\"", "1:2"), ("\"\\udc00\\ud800\"", "1:2"), ("\"\\ud83d \\ude00\"", "1:2"),
        ("\"\\U00110000\"", "1:2"), ("\"\\U0000d800\"", "1:2"),
    ],
    "brackets (7.4)": [
        ("[a", "1:1"), ("[a, b\n", "1:1"), ("{a: b", "1:1"), ("a: [b\nc: d", "2:1"),
        ("[a]]", "1:4"), ("[a] b", "1:5"), ("a: [b]#c", "1:7"), ("a: {b: c} d", "1:11"),
        ("[a, , b]", "1:5"), ("[, a]", "1:2"), ("[,]", "1:2"), ("{, a: b}", "1:2"),
        ("{a: b,, c: d}", "1:7"), ("{a: b c: d}", "1:8"), ("[a b\n c: d]", "1:2"),
        ("['a' 'b']", "1:6"), ("[a }", "1:4"), ("{a ]", "1:4"), ("[-]", "1:2"), ("[- a]", "1:2"),
        ("[a, ?]", "1:5"), ("[a\n: b]", "1:2"), ("['a'\n:b]", "1:2"), ("[a,#b\n]", "1:4"),
        ("a: [\nb]", "2:1"), ("a: [b,\nc]", "2:1"), ("a: {\nb: c}", "2:1"),
        ("a:\n  b: [c,\n  d]", "3:3"), ("a: [\n---\n]", "1:4"), ("[\n...\n]", "1:1"),
        ("[a\n--- ]", "1:1"), ("[a: b: c]", "1:6"), ("[|\n a]", "1:2"), ("[a: 'b'c]", "1:8"),
        ("{a: b]", "1:6"), ("a: [b\n]c", "2:2"),
    ],
    "texts below | and > (8.1)": [
        ("a: |x\n b", "1:4"), ("a: |0\n b", "1:4"), ("a: |10\n b", "1:4"), ("a: |+-\n b", "1:4"),
        ("a: |11\n b", "1:4"), ("a: | b\n c", "1:4"), ("a: |#c\n b", "1:4"),
        ("a: >\n    b\n  c\n", "3:3"), ("a: |\n  b\n# c\n  d", "3:1"), ("a: |\n# c\n  d", "2:1"),
        ("a: |\n    \n  b", "3:3"), ("a: |\n\n   \n  b", "4:3"), ("a: >\n   b\n  c", "3:3"),
        ("- |\n  a\n b", "3:2"), ("a: |2\n  b\n c", "3:2"), ("a: |\n b\n\t# c\nd: e", "3:1"),
    ],
    "documents and directives (6.8, 9)": [
        ("%a", "2:1"), ("%YAML 1.2\na: b", "2:1"), ("%YAML 1.2", "2:1"),
        ("%YAML 1.2\n...\n", "2:1"), ("%YAML 1.2\n%YAML 1.2\n---\n", "2:1"),
        ("%YAML 2.0\n---\n", "1:1"), ("%YAML\n---\n", "1:1"), ("%YAML 1.2 x\n---\n", "1:11"),
        ("%YAML 1.2#x\n---\n", "1:10"), ("%TAG ! x:\n---\n", "1:1"), ("% x\n---\n", "1:1"),
        ("a: b\n%YAML 1.2\n---\n", "2:1"), (" %YAML 1.2\n---\n", "1:2"), ("a\n... b", "2:5"),
        ("---\n%YAML 1.2\n---\n", "2:1"),
    ],
    "merge keys": [
        ("<<: a", "1:1"), ("<<: [{a: 1}, b]", "1:1"), ("<<:", "1:1"), ("{<<: 1}", "1:2"),
        ("<<: [[{a: 1}]]", "1:1"), ("- &x a\n- <<: *x", "2:3"),
    ],
    "characters (5.1)": [
        ("a\x00b", "1:2"), ("a: \x07", "1:4"), ("a: \x7f", "1:4"), ("# \x0b", "1:3"),
        ("'\x01'", "1:2"), ("\"\ud800\"", "1:2"), ("a\ufeff", "1:2"), ("a: b\n\x84", "2:1"),
        ("|\n a\x7f", "2:3"), ("[\x9f]", "1:2"), ("'\ufeff' \ufeff", "1:5"),
        ("\"a\" # \ufffe", "1:7"),
    ],
    "numbers too large": [
        ("a: 1e999", "1:4"), ("[-1E400]", "1:2"), ("a:\n  " + "9" * 1001, "2:3"),
        ("0x" + "f" * 999, "1:1"), ("." + "0" * 1000, "1:1"),
    ],
}


def exact(value):
    """The value with its types: 1, 1.0 and True differ, the order of keys does not matter."""
    if isinstance(value, dict):
        return {(type(key), key): exact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [exact(item) for item in value]
    return type(value), value


def problem_of(text):
    with pytest.raises(YamlError) as caught:
        load_yaml(text)
    return str(caught.value)


def texts(table):
    return [case[0] for cases in table.values() for case in cases]


@pytest.mark.parametrize("chapter", READ)
def test_what_is_read(chapter):
    for text, value in READ[chapter]:
        assert exact(load_yaml(text)) == exact(value), text


@pytest.mark.parametrize("chapter", REFUSED)
def test_what_is_refused_and_where(chapter):
    for text, place in REFUSED[chapter]:
        assert problem_of(text).startswith(place + ": "), text


def test_not_a_number_is_read_too():
    values = load_yaml("[.nan, .NaN, .NAN]")
    assert len(values) == 3 and all(map(math.isnan, values))


def test_line_ends_of_windows_and_of_the_old_macintosh_change_nothing():
    for text in texts(READ):
        if "\r" not in text:
            assert exact(load_yaml(text.replace("\n", "\r\n"))) == exact(load_yaml(text)), text
            assert exact(load_yaml(text.replace("\n", "\r"))) == exact(load_yaml(text)), text
    for text in texts(REFUSED):
        assert problem_of(text.replace("\n", "\r\n")) == problem_of(text)


def test_bytes_are_read_as_utf_8_with_a_byte_order_mark_or_without():
    for text in texts(READ):
        assert exact(load_yaml(text.encode())) == exact(load_yaml(text)), text
    assert load_yaml("\ufeffa: ü".encode()) == {"a": "ü"}


@pytest.mark.parametrize("data, expected", [
    ("a: b".encode("utf-16"), "1:1: this is UTF-16 or UTF-32; save it as UTF-8"),
    (b"\xfe\xff\0a", "1:1: this is UTF-16 or UTF-32; save it as UTF-8"),
    ("a: b".encode("utf-32"), "1:1: this is UTF-16 or UTF-32; save it as UTF-8"),
    (b"\0\0\xfe\xff\0\0\0a", "1:1: this is UTF-16 or UTF-32; save it as UTF-8"),
    ("a: b".encode("utf-16-le"), "1:2: the character U+0000 "),
    (b"a: b\nc: \xe4\n", "2:4: the byte 0xe4 is not UTF-8"),
    (b"\xef\xbb\xbfa: \xff", "1:4: the byte 0xff is not UTF-8"),
    (b"a: '\xed\xa0\x80'", "1:5: the byte 0xed is not UTF-8"),
    (b"# \xc3\r\na: b", "1:3: the byte 0xc3 is not UTF-8"),
])
def test_other_encodings_are_refused(data, expected):
    assert problem_of(data).startswith(expected)


def test_an_error_is_a_value_error_with_its_position():
    with pytest.raises(YamlError) as caught:
        load_yaml("a: b\nc: [")
    error = caught.value
    assert isinstance(error, RoexecError) and isinstance(error, ValueError)
    assert (error.line, error.column, error.problem) == (2, 4, 'this "[" is not closed')
    assert str(error) == '2:4: this "[" is not closed'


# YAML as people write it.

WORKFLOW = """\
name: tests
on:
  push: { branches: [ main ] }
  schedule:
    - cron: '30 5 * * 1-5'   # in UTC
env:
  VERSION: 3.10
jobs:
  test:
    runs-on: ${{ matrix.os }}
    if: github.event_name != 'push' || contains(github.ref, 'main')
    strategy:
      matrix:
        os: [ubuntu-22.04,
             macos-14]
        include:
        - {os: ubuntu-22.04, extra: true}
    steps:
    - uses: example/checkout@v4
      with:
        fetch-depth: 0

    - name: "Test: all"
      run: |
        set -e   # stop at once
        for x in a b; do
          echo "$x: done"
        done

    # the last one
    - run: >-
        make
        check
"""

COMPOSE = """\
x-common: &common
  restart: unless-stopped
  logging: {driver: json-file, options: {max-size: "10m"}}
services:
  web:
    <<: *common
    image: registry.example.com:5000/web:1.2
    command: ["serve", "--port", "80"]
    ports:
      - "8080:80"
      - 127.0.0.1:8443:443
    environment:
      - MODE=a=b
      - EMPTY=
    restart: "no"
  db:
    <<: [*common]
    volumes: [ db:/var/lib/db:rw, ]
volumes:
  db:
"""

MANIFEST = """\
---
apiVersion: v1
kind: ConfigMap
metadata:
  name: settings
  labels: {app.kubernetes.io/name: web, tier: ""}
  annotations:
    example.com/checked: "true"
data:
  port: "80"
  nginx.conf: |+
    server {
      listen 80;
    }

  note: 'it''s
    one line'
...
"""

INTERFACE = """\
openapi: 3.0.3
info: {title: Runs, version: 1.10.0}
paths:
  /runs/{id}:
    get:
      description: >
        One run,
        by its id.

        * a list
      parameters:
        - in: path
          name: id
          required: true
          schema: {type: string, pattern: '^[a-z]+$'}
      responses:
        '200':
          content:
            application/json:
              example: {"id": "a", "n": [1, 2], "x": null}
        default: {$ref: "#/components/responses/Error"}
"""

WRITTEN = [
    (WORKFLOW, {
        "name": "tests",
        "on": {"push": {"branches": ["main"]}, "schedule": [{"cron": "30 5 * * 1-5"}]},
        "env": {"VERSION": 3.1},
        "jobs": {"test": {
            "runs-on": "${{ matrix.os }}",
            "if": "github.event_name != 'push' || contains(github.ref, 'main')",
            "strategy": {"matrix": {"os": ["ubuntu-22.04", "macos-14"],
                                    "include": [{"os": "ubuntu-22.04", "extra": True}]}},
            "steps": [
                {"uses": "example/checkout@v4", "with": {"fetch-depth": 0}},
                {"name": "Test: all",
                 "run": 'set -e   # stop at once\nfor x in a b; do\n  echo "$x: done"\ndone\n'},
                {"run": "make check"}]}}}),
    (COMPOSE, {
        "x-common": {"restart": "unless-stopped",
                     "logging": {"driver": "json-file", "options": {"max-size": "10m"}}},
        "services": {
            "web": {"image": "registry.example.com:5000/web:1.2",
                    "command": ["serve", "--port", "80"],
                    "ports": ["8080:80", "127.0.0.1:8443:443"],
                    "environment": ["MODE=a=b", "EMPTY="], "restart": "no",
                    "logging": {"driver": "json-file", "options": {"max-size": "10m"}}},
            "db": {"volumes": ["db:/var/lib/db:rw"], "restart": "unless-stopped",
                   "logging": {"driver": "json-file", "options": {"max-size": "10m"}}}},
        "volumes": {"db": None}}),
    (MANIFEST, {
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": "settings",
                     "labels": {"app.kubernetes.io/name": "web", "tier": ""},
                     "annotations": {"example.com/checked": "true"}},
        "data": {"port": "80", "nginx.conf": "server {\n  listen 80;\n}\n\n",
                 "note": "it's one line"}}),
    (INTERFACE, {
        "openapi": "3.0.3", "info": {"title": "Runs", "version": "1.10.0"},
        "paths": {"/runs/{id}": {"get": {
            "description": "One run, by its id.\n* a list\n",
            "parameters": [{"in": "path", "name": "id", "required": True,
                            "schema": {"type": "string", "pattern": "^[a-z]+$"}}],
            "responses": {
                "200": {"content": {"application/json": {
                    "example": {"id": "a", "n": [1, 2], "x": None}}}},
                "default": {"$ref": "#/components/responses/Error"}}}}}}),
]


@pytest.mark.parametrize("text, value", WRITTEN)
def test_yaml_as_people_write_it(text, value):
    assert exact(load_yaml(text)) == exact(value)


# Errors that everyone meets.

IN_QUOTES = "; put a text that begins so in quotes"
PROBLEMS = [
    ('on_failure: curl -H "Content-Type: application/json" http://x', '1:34: ": " inside a plain '
     "value; put the value in quotes, or below |"),
    ("- a\n- b\n  c: d", '3:4: ": " inside a plain value; put the value in quotes, or below |'),
    ("schedule: * * * * *", '1:11: a value that begins with "*" is an alias, and nothing has this '
     'name; put the schedule in quotes: "* * * * *"'),
    ("schedule: */5 * * * * # often", '1:11: a value that begins with "*" is an alias, and nothing '
     'has this name; put the schedule in quotes: "*/5 * * * *"'),
    ("- &/5 a\n- */5 * * * *", '2:3: a value that begins with "*" is an alias, and nothing has '
     'this name; put the schedule in quotes: "*/5 * * * *"'),
    ("a: @b", '1:4: "@" cannot begin a value here' + IN_QUOTES),
    ("a: !b c", "1:4: tags are not read" + IN_QUOTES),
    ("a: 'b' c", '1:8: "c" is left over; put the whole value in quotes'),
    ("a: 'b'#c", '1:7: a "#" needs a blank before it'),
    ("a: b\nc", '2:1: "c" stands where "key: value" should'),
    ("a:\n  b: c\n d: e", '3:2: "d: e" belongs to nothing above; check its indentation'),
    ("a: b\na: c", '2:1: the key "a" is there already'),
    ("{1: a, 1.0: b}", "1:8: the key 1.0 is there already, as 1"),
    ("a: |\n  b\n# c\n  d", "3:1: this comment ends the text below |; indent it as the text is"),
    ("a: >\n\tb", "2:1: a tab cannot indent the text below >; write blanks"),
    ("a: |\n    b\n  c", "3:3: this is indented less than the first line of the text below |"),
    ("a: |\n    \n  b", "3:3: this line is indented less than the blank lines above it"),
    ("a: [b, c\nd: e", "2:1: a line inside brackets is indented too little"),
    ("a: [b c\n", '1:4: this "[" is not closed'),
    ("[a b\n c d}", '2:5: "," or "]" is missing here'),
    ('"\\d"', "1:2: \\d is no escape; write \\\\ for a backslash, or use single quotes"),
]


@pytest.mark.parametrize("text, problem", PROBLEMS)
def test_an_error_says_what_to_write(text, problem):
    assert problem_of(text) == problem


def test_an_error_shows_no_control_characters_and_no_long_line():
    assert "\x1b" not in problem_of("a: 'b' \x1b[1m")
    assert len(problem_of("a: 'b' " + "c" * 100_000)) < 120


# %YAML 1.1

@pytest.mark.parametrize("written", [
    "yes", "No", "ON", "off", "y", "N", "0755", "-010", "0o17", "0b11", "1_000", "0x_f", "-0x1f",
    "12:30:00", "1:30", "1:30.5", "1e3", "1.5e3", "1_0.5", ".5_0", "2025-08-01", "=",
    "2025-08-01T02:00:00Z", "2025-8-1 2:00:00", "a\u2028b", "a\x85b"])
def test_what_yaml_1_1_reads_otherwise_is_refused_where_a_document_says_1_1(written):
    assert load_yaml(f"%YAML 1.2\n---\n- {written}") == load_yaml(f"- {written}")
    for text in (f"- {written}", f"{written}: a", f"[{written}]", f"{{a: {written}}}"):
        problem = problem_of(f"%YAML 1.1\n---\n{text}")
        assert problem.endswith(" differs between YAML 1.1 and 1.2; quote it")
    assert load_yaml(f"%YAML 1.1\n---\n'{written}'") == load_yaml(f"'{written}'")


def test_what_both_versions_read_alike_is_read_where_a_document_says_1_1():
    alike = "[a, 0, -12, +7, 1.5, -.5, 1.5e+3, 2., 0x1F, .inf, true, NULL, ~, yes no, a:b, 1st]"
    assert exact(load_yaml("%YAML 1.1\n---\n" + alike)) == exact(load_yaml(alike))


# Bounds.

@pytest.mark.parametrize("opening, closing", [
    ("[", "]"), ("{a: ", "}"), ("- ", ""), ("? - ", ""), ("[{a: ", "}]")])
def test_collections_are_nested_up_to_a_hundred_deep(opening, closing):
    levels = 50 if opening in ("? - ", "[{a: ") else 100
    if opening != "? - ":
        value = load_yaml(opening * levels + "a" + closing * levels)
        for _ in range(100):
            value = value[0 if isinstance(value, list) else "a"]
        assert value == "a"
    deeper = problem_of(opening * (levels + 1) + "a" + closing * (levels + 1))
    assert deeper.endswith(": nested deeper than 100 levels")


def test_anchors_and_explicit_keys_nest_as_deep_without_recursing_to_death():
    mapping = "".join(f"{' ' * i}? a\n{' ' * i}: &x{i}\n" for i in range(100))
    items = "".join(f"{' ' * i}- &x{i}\n" for i in range(100))
    for text in (mapping, items):
        load_yaml(text)
        assert problem_of(text + " " * 100 + "- a\n").endswith(": nested deeper than 100 levels")


def test_a_key_in_its_line_ends_within_1024_characters():
    for text in ("{}: a", "'{}': a", "- {}: a", "[{}: a]"):
        load_yaml(text.format("k" * 1022))
        assert "at most 1024 characters" in problem_of(text.format("k" * 1025))
    assert load_yaml("? " + "k" * 1025) == {"k" * 1025: None}


def test_aliases_add_at_most_100_000_values():
    ten = "a: &a [0, 1, 2, 3, 4, 5, 6, 7, 8]\n"             # with the list itself
    assert len(load_yaml(ten + "b: [" + "*a, " * 10_000 + "]")["b"]) == 10_000
    problem = problem_of(ten + "b: [" + "*a, " * 10_001 + "]")
    assert problem == f"2:{5 + 4 * 10_000}: aliases add more than 100000 values"


def test_aliases_of_aliases_do_not_multiply_without_bound():
    lists = "a0: &a0 [x]\n" + "".join(
        f"a{i + 1}: &a{i + 1} [{f'*a{i}, ' * 10}]\n" for i in range(9))
    merges = "a0: &a0 {x: 1}\n" + "".join(
        f"a{i + 1}: &a{i + 1}\n  k{i}: *a{i}\n  <<: *a{i}\n" for i in range(60))
    for text in (lists, merges):
        assert problem_of(text).endswith(": aliases add more than 100000 values")


def test_an_alias_is_the_same_object():
    value = load_yaml("a: &x [b]\nc: *x\nd: {e: *x}")
    assert value["a"] is value["c"] is value["d"]["e"]


LINEAR = [
    "[", "- ", "? ", "a: ", '"', "&a ", "a ", "#", "\t", "'", "{", "*a ", "|", "\\", " ", ":", ",",
    "- a\n", "a\n", "#\n", " #\n", "\n", " \n", "\t\n", "a #\n", "- [a, b]\n", "- {a: b}\n",
    "- |\n  a\n", "- >-\n  a\n\n", "- 'a\n  b'\n", '- "a\\n\\\n  b"\n', "- &a b\n", "- a\n  b\n",
    "- a: b\n  c: d\n", "-\n", "- ? a\n  : b\n", "a\n\n", "- %\n", "...\n", "\x7f", "\ufeff"]


def seconds_of(text):
    began = time.process_time()
    try:
        load_yaml(text)
    except YamlError:
        pass
    return time.process_time() - began


@pytest.mark.parametrize("before, after", [
    ("", ""), ('"', '"'), ("'", "'"), ("a: |\n  ", ""), ("a: >\n  ", ""), ("[a, ", "]"),
    ("a: b\n", ""), ("%YAML 1.1\n---\n1", ""), ("x: {y: ", "}")])
def test_the_time_grows_with_the_size(before, after):
    for piece in LINEAR:
        for _ in range(4):
            sizes = [before + piece * (size // len(piece)) + after for size in (30_000, 60_000)]
            small, large = map(seconds_of, sizes)
            if large < max(2.5 * small, 0.02):
                break
        else:
            pytest.fail(f"{piece!r}: {small:.3f} s, and {large:.3f} s for twice as much")


@pytest.mark.parametrize("piece", ["[", "- ", "? ", "a: ", '"', "&a ", "a ", "#", "\t"])
def test_a_megabyte_of_anything_takes_little_time_and_two_take_twice_as_much(piece):
    million = piece * (1_000_000 // len(piece))
    for _ in range(5):
        small, large = seconds_of(million), seconds_of(million * 2)
        if large <= max(2.5 * small, 0.02):
            break
    assert large <= max(2.5 * small, 0.02) and large < 4


# Whatever comes.

PIECES = ["\n", " ", "  ", "\t", ":", ": ", "-", "- ", "? ", "#", " #", '"', "'", "[", "]", "{",
          "}", ",", "|", ">", "&a ", "*a", "!", "%", "@", "---", "...", "\n---\n", "\n\n", "\n  ",
          "|2-", "\\", "\\u", "<<", "<<: ",
          "0", "1.5", "~", "a", "é", "\0", "\x85", "\r", "\ufeff"]


def mutated(text, rng):
    for _ in range(rng.choice([1, 1, 2, 4])):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.choice([0, 0, 1, 2, 8]))
        copied = rng.randrange(len(text) + 1)
        piece = rng.choice([rng.choice(PIECES), text[copied:copied + rng.randrange(12)]])
        text = text[:start] + piece + text[end:]
    return text


def test_no_text_makes_it_fail_in_another_way():
    rng = random.Random(20250801)
    sources = [text for text in texts(READ) + texts(REFUSED) + [text for text, _ in WRITTEN]
               if len(text) < 1200]
    refused = 0
    for _ in range(12_000):
        text, notes = mutated(rng.choice(sources), rng), []
        try:
            value = read_yaml(text, notes)
        except YamlError as error:
            refused += 1
            lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
            assert 1 <= error.line <= len(lines) + 1 and error.column >= 1, text
            assert problem_of(text) == str(error), text
        else:
            assert repr(load_yaml(text)) == repr(value), text
            assert_parallel(value, notes[0])
    assert 2000 < refused < 11_000


def test_random_characters_are_read_or_refused():
    rng = random.Random(7)
    for _ in range(4000):
        text = "".join(rng.choice(PIECES) for _ in range(rng.randrange(40)))
        try:
            load_yaml(text)
        except YamlError:
            pass


def random_value(rng, depth=0):
    kind = rng.randrange(9 if depth < 4 else 6)
    if kind > 6:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind > 5:
        return {random_text(rng): random_value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return [None, True, False, rng.randrange(-10**12, 10**12), rng.uniform(-1e9, 1e9),
            random_text(rng)][kind]


def random_text(rng):
    return "".join(rng.choice(PIECES + ["\U0001f600", "\x07", "\u2028", "null", "true", "\x7f"])
                   for _ in range(rng.randrange(5)))


def test_all_json_is_read_as_json_reads_it():
    rng = random.Random(42)
    for _ in range(1500):
        value = random_value(rng)
        text = json.dumps(value, indent=rng.choice([None, 1, 4, "\t"]),
                          ensure_ascii=rng.choice([True, True, False]),
                          separators=rng.choice([None, (",", ":")]))
        assert exact(load_yaml(text)) == exact(json.loads(text)), text


# Notes.

def noted(text):
    """Line, column, text and `plain` of all scalars, and the places of the collections."""
    notes = []
    value = read_yaml(text, notes)
    lines = []

    def visit(note, path):
        place = f"{note.line}:{note.column} {path}"
        if note.items is None:
            lines.append(f"{place} {note.text}" if note.plain
                         else f"{place} {note.text!r}")
        elif note.keys is None:
            lines.append(f"{place} []")
            for number, item in enumerate(note.items):
                visit(item, f"{path}.{number}")
        else:
            lines.append(f"{place} {{}}")
            for key, item in note.items.items():
                visit(note.keys[key], f"{path}.{key}?")
                visit(item, f"{path}.{key}")

    visit(notes[0], "$")
    assert_parallel(value, notes[0])
    return lines


def assert_parallel(value, note):
    assert isinstance(note, Note)
    if isinstance(value, dict):
        assert list(note.keys) == list(note.items) == list(value) and note.text is None
        for key, item in value.items():
            assert note.keys[key].items is None
            assert_parallel(item, note.items[key])
    elif isinstance(value, list):
        assert note.keys is None and len(note.items) == len(value) and note.text is None
        for item, item_note in zip(value, note.items):
            assert_parallel(item, item_note)
    else:
        assert note.keys is note.items is None and isinstance(note.plain, bool)
        assert isinstance(note.text, str)
        if isinstance(value, str):
            assert note.text == value


NOTED = [
    ("a: 1.10\nb:\n  c: 'x'\n  d:\n    - 0755\n    - |\n      y\n", [
        "1:1 $ {}", "1:1 $.a? a", "1:4 $.a 1.10", "2:1 $.b? b", "3:3 $.b {}", "3:3 $.b.c? c",
        "3:6 $.b.c 'x'", "4:3 $.b.d? d", "5:5 $.b.d []", "5:7 $.b.d.0 0755",
        "6:7 $.b.d.1 'y\\n'"]),
    ("[True, {a: ~, 'b':  \"\\x41\"}, c d\n e]", [
        "1:1 $ []", "1:2 $.0 True", "1:8 $.1 {}", "1:9 $.1.a? a", "1:12 $.1.a ~",
        "1:15 $.1.b? 'b'", "1:21 $.1.b 'A'", "1:30 $.2 c d e"]),
    ("env: {A: }", [
        "1:1 $ {}", "1:1 $.env? env", "1:6 $.env {}", "1:7 $.env.A? A", "1:10 $.env.A "]),
    ("a:\nb:  # c\nc:\n- d\n-\n", [
        "1:1 $ {}", "1:1 $.a? a", "1:3 $.a ", "2:1 $.b? b", "2:5 $.b ", "3:1 $.c? c", "4:1 $.c []",
        "4:3 $.c.0 d", "5:2 $.c.1 "]),
    ("", ["1:1 $ "]), ("\n\n--- # c\n", ["3:5 $ "]), ("  a\n   b", ["1:3 $ a b"]),
    ("--- 'a'", ["1:5 $ 'a'"]), ("\ufeffa: ü\nü: b", [
        "1:1 $ {}", "1:1 $.a? a", "1:4 $.a ü", "2:1 $.ü? ü", "2:4 $.ü b"]),
    ("a: &x {b: 1}\nc: *x\nd: [*x]", [
        "1:1 $ {}", "1:1 $.a? a", "1:7 $.a {}", "1:8 $.a.b? b", "1:11 $.a.b 1", "2:1 $.c? c",
        "2:4 $.c {}", "1:8 $.c.b? b", "1:11 $.c.b 1", "3:1 $.d? d", "3:4 $.d []", "3:5 $.d.0 {}",
        "1:8 $.d.0.b? b", "1:11 $.d.0.b 1"]),
    ("x: &x 0755\ny: *x", [
        "1:1 $ {}", "1:1 $.x? x", "1:7 $.x 0755", "2:1 $.y? y", "2:4 $.y 0755"]),
    ("- &x {a: 1, b: 2}\n- c: 3\n  <<: *x\n  b: 4", [
        "1:1 $ []", "1:6 $.0 {}", "1:7 $.0.a? a", "1:10 $.0.a 1", "1:13 $.0.b? b", "1:16 $.0.b 2",
        "2:3 $.1 {}", "2:3 $.1.c? c", "2:6 $.1.c 3", "4:3 $.1.b? b", "4:6 $.1.b 4",
        "1:7 $.1.a? a", "1:10 $.1.a 1"]),
    ("? a\n: - b\n? c\n", [
        "1:1 $ {}", "1:3 $.a? a", "2:3 $.a []", "2:5 $.a.0 b", "3:3 $.c? c", "4:1 $.c "]),
    ("[a: b, ? c]", [
        "1:1 $ []", "1:2 $.0 {}", "1:2 $.0.a? a", "1:5 $.0.a b", "1:8 $.1 {}", "1:10 $.1.c? c",
        "1:11 $.1.c "]),
    ("\r\na: b\r\r\nc: d", ["2:1 $ {}", "2:1 $.a? a", "2:4 $.a b", "4:1 $.c? c", "4:4 $.c d"]),
]


@pytest.mark.parametrize("text, expected", NOTED)
def test_notes_have_the_place_and_the_text_of_each_value(text, expected):
    assert noted(text) == expected


def test_notes_are_parallel_to_the_value_and_do_not_change_it():
    for text in texts(READ) + [text for text, _ in WRITTEN]:
        notes = []
        value = read_yaml(text, notes)
        assert exact(value) == exact(load_yaml(text))
        assert_parallel(value, notes[0])


def test_a_number_keeps_its_source_text():
    notes = []
    read_yaml("[0755, 1.10, +1e3, 0o17, .INF, 'x', \"y\"]", notes)
    assert [note.text for note in notes[0].items] == [
        "0755", "1.10", "+1e3", "0o17", ".INF", "x", "y"]
    assert [note.plain for note in notes[0].items] == [True] * 5 + [False] * 2
