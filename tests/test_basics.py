"""Values that every section needs: durations, sizes, instants, zones, and texts for people."""
import re
import zoneinfo
from datetime import datetime, timedelta, timezone

import pytest

import roexec
from roexec import (Pattern, RoexecError, Value, fixed_zone, format_duration, format_instant,
                    format_size, get_zone, nearest, parse_duration, parse_instant, printable)

UTC = timezone.utc


# Durations and sizes.

@pytest.mark.parametrize("written, seconds", [
    ("90", 90), ("90s", 90), ("0", 0), ("0s", 0), ("1.5s", 1.5), ("0.25", 0.25), (".5", 0.5),
    ("5m", 300), ("1h30m", 5400), ("2d", 172800), ("1d2h3m4.5s", 93784.5), ("36500d", 3153600000),
    ("1m0s", 60), ("90m", 5400), (90, 90), (1.5, 1.5), (2.0, 2), ("007", 7), ("+5", 5)])
def test_a_duration_is_seconds(written, seconds):
    assert parse_duration(written) == seconds
    assert type(parse_duration(written)) is type(seconds)


@pytest.mark.parametrize("written, instead", [
    ("12:30", "12h30m for hours and minutes, 12m30s for minutes and seconds"),
    ("12:30:05", "12h30m5s"), ("00:00:00", "0s"),
    ("1h 30m", "1h30m"), ("90 seconds", "1m30s"), ("2 weeks", "14d"), ("1.5h", "1h30m"),
    ("5min", "5m"), ("1 Day, 2 Hours", "1d2h"), ("0.5 sec", "0.5s"), ("0 min", "0s"),
    ("5s ", "5s"),
    ("123:45", "5d3h45m for hours and minutes, 2h3m45s for minutes and seconds")])
def test_what_is_nearly_a_duration_is_refused_with_the_duration_to_write(written, instead):
    with pytest.raises(ValueError) as caught:
        parse_duration(written)
    assert str(caught.value) == f'"{written}" is not a duration; write {instead}'


@pytest.mark.parametrize("written", [
    "", " ", "s", "5x", "500ms", "five minutes", "1m30", "5 minutes or so", "1e3", "0x10", "0o17",
    ".nan", "30m1h", "1h1h", "h5", "1.5h30m!", "1_000"])
def test_what_is_no_duration_is_refused_with_examples(written):
    with pytest.raises(ValueError) as caught:
        parse_duration(written)
    assert str(caught.value) == (f'"{written}" is not a duration; write for example 90s, 5m, '
                                 "1h30m or 2d")


@pytest.mark.parametrize("written", ["-5", "-0.1", "nan", "inf", float("inf"), 10 ** 12, "9" * 400,
                                     "9" * 400 + "d", "36601d"])
def test_a_duration_lies_between_0_and_100_years(written):
    with pytest.raises(ValueError, match=f'^"{written}" is not a duration between 0 and 100 years'):
        parse_duration(written)


@pytest.mark.parametrize("written, shown", [(True, "true"), (False, "false")])
def test_a_boolean_is_no_duration(written, shown):
    with pytest.raises(ValueError, match=f"^{shown} is not a duration; write for example"):
        parse_duration(written)


@pytest.mark.parametrize("seconds, text", [
    (0, "0s"), (0.0001, "1ms"), (0.004, "4ms"), (0.04, "40ms"), (0.1, "0.1s"), (0.5, "0.5s"),
    (1, "1s"), (9.94, "9.9s"), (9.95, "10s"), (42, "42s"),
    (59.4, "59s"), (59.6, "1m"), (60, "1m"), (65, "1m5s"), (3599.7, "1h"), (5400, "1h30m"),
    (5429, "1h30m"), (85000, "23h37m"), (86399, "1d"), (86400, "1d"), (90000, "1d1h"),
    (183600, "2d3h"),
    (172799, "2d"), (31536000, "365d")])
def test_people_read_a_duration_in_its_two_largest_units(seconds, text):
    assert format_duration(seconds) == text


def test_what_is_shown_for_whole_seconds_is_read_as_about_the_same():
    for seconds in (*range(0, 4000, 7), *range(4000, 400_000, 997)):
        least = 1 if seconds < 3600 else 60 if seconds < 86400 else 3600
        assert abs(parse_duration(format_duration(seconds)) - seconds) <= least / 2


@pytest.mark.parametrize("number, text", [
    (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1949, "1.9 kB"), (999_949, "999.9 kB"),
    (999_960, "1.0 MB"), (2_000_000, "2.0 MB"), (5 * 10 ** 9, "5.0 GB"), (10 ** 13, "10.0 TB"),
    (10 ** 16, "10000.0 TB")])
def test_people_read_a_size_in_powers_of_1000(number, text):
    assert format_size(number) == text


# Instants.

@pytest.mark.parametrize("text, seconds", [
    ("2025-08-01T02:00:00Z", 1754013600), ("2025-08-01t02:00:00z", 1754013600),
    ("2025-08-01 02:00:00Z", 1754013600), ("2025-08-01T02:00Z", 1754013600),
    ("2025-08-01T04:00:00+02:00", 1754013600), ("2025-08-01T04:00+0200", 1754013600),
    ("2025-07-31T21:30:00-04:30", 1754013600), ("2025-08-01T02:00:00.25Z", 1754013600.25),
    ("1970-01-01T00:00:00Z", 0), ("1969-12-31T23:59:59Z", -1)])
def test_an_instant_with_an_offset_is_what_it_says(text, seconds):
    assert parse_instant(text, get_zone("Asia/Tokyo")) == seconds


@pytest.mark.parametrize("text, zone, shown", [
    ("2025-08-01", "Europe/Berlin", "2025-07-31T22:00:00Z"),
    ("2025-08-01 02:00", "Europe/Berlin", "2025-08-01T00:00:00Z"),
    ("2025-01-01T02:00:00", "America/New_York", "2025-01-01T07:00:00Z"),
    ("2025-10-26T02:30", "Europe/Berlin", "2025-10-26T00:30:00Z"),      # the first of two
    ("2025-08-01", "+02:00", "2025-07-31T22:00:00Z")])
def test_an_instant_without_an_offset_is_in_the_zone(text, zone, shown):
    assert format_instant(parse_instant(text, get_zone(zone))) == shown


@pytest.mark.parametrize("text", [
    "", "now", "2025-08", "2025-13-01", "2025-02-30", "2025-08-01T25:00", "2025-08-01T02:00:61Z",
    "2025-08-01Z", "2025-08-01T02", "2025-08-01T02:00:00+24:00", "2025-08-01T02:00:00+02:60",
    "2025-08-01T02:00:00 Z", "0000-01-01", "1754013600", "2025-08-01T02:00.5Z+"])
def test_what_is_no_instant_is_refused_with_examples(text):
    with pytest.raises(ValueError) as caught:
        parse_instant(text, UTC)
    assert str(caught.value).startswith(f'"{text}" is no instant; write for example 2025-08-01T02')


@pytest.mark.parametrize("seconds, text", [
    (1754013600, "2025-08-01T02:00:00Z"), (1754013600.0, "2025-08-01T02:00:00Z"),
    (1754013600.5, "2025-08-01T02:00:00.5Z"), (1754013600.123457, "2025-08-01T02:00:00.123457Z"),
    (1754013599.9999999, "2025-08-01T02:00:00Z"), (0, "1970-01-01T00:00:00Z"),
    (-0.5, "1969-12-31T23:59:59.5Z")])
def test_an_instant_is_shown_in_utc_with_a_fraction_where_there_is_one(seconds, text):
    assert format_instant(seconds) == text


def test_an_instant_that_is_shown_is_read_as_the_same():
    for number in range(500):
        seconds = number * 7_919_993 + number % 64 / 64
        assert parse_instant(format_instant(seconds), UTC) == seconds


# Zones.

@pytest.mark.parametrize("name, minutes", [
    ("UTC", 0), ("utc", 0), ("Z", 0), ("GMT", 0), ("Etc/UTC", 0), ("+02:00", 120), ("+0200", 120),
    ("+2", 120), ("-05:30", -330), ("UTC+5", 300), ("UTC-5", -300), ("+00:00", 0),
    ("+23:59", 1439)])
def test_utc_and_offsets_need_no_zone_data(name, minutes, monkeypatch):
    def refuse(name):
        raise AssertionError("asked for zone data")
    monkeypatch.setattr(zoneinfo, "ZoneInfo", refuse)
    assert get_zone(name).utcoffset(None) == timedelta(minutes=minutes)
    assert fixed_zone(name) == get_zone(name)


@pytest.mark.parametrize("name", ["", "Europe/Berlin", "+24:00", "+02:60", "2", "+", "+12345",
                                  "CET-1"])
def test_other_names_are_no_offsets(name):
    assert fixed_zone(name) is None


def test_a_name_is_looked_up_in_the_zone_data():
    summer = datetime(2025, 8, 1, tzinfo=get_zone("Europe/Berlin"))
    assert summer.utcoffset() == timedelta(hours=2)
    assert summer.replace(month=1).utcoffset() == timedelta(hours=1)


@pytest.mark.parametrize("name, hint", [
    ("Europe/Berln", '; did you mean "Europe/Berlin"?'),
    ("europe/berlin", '; did you mean "Europe/Berlin"?'),
    ("Mars/Olympus", "; write for example Europe/Berlin, UTC or +02:00"),
    ("", "; write for example Europe/Berlin, UTC or +02:00"),
    ("+99:00", "; write for example Europe/Berlin, UTC or +02:00"),
    ("Europe", None), ("zone.tab", None), ("../../../etc/passwd", None), ("/etc/localtime", None),
    ("a\0b", None), ("x" * 5000, None)])
def test_an_unknown_zone_is_refused_with_what_to_write(name, hint):
    with pytest.raises(ValueError) as caught:
        get_zone(name)
    assert str(caught.value).startswith(f'"{name}" is no time zone')
    assert hint is None or str(caught.value).endswith(hint)


def test_a_host_without_zone_data_is_named_as_that(monkeypatch):
    monkeypatch.setattr(zoneinfo, "available_timezones", set)
    with pytest.raises(ValueError, match='^"No/Where" cannot be looked up, this host has no time '
                                         "zone data; install the package tzdata"):
        get_zone("No/Where")


# Texts.

def test_the_nearest_choice_is_named_if_it_is_near():
    assert nearest("bakcup", ["sync", "backup", "deploy"]) == '; did you mean "backup"?'
    assert nearest("x", ["sync", "backup"]) == ""
    assert nearest("backup", []) == ""
    assert nearest("retrys", iter(["retries", "env"])) == '; did you mean "retries"?'


@pytest.mark.parametrize("text, shown", [
    ("plain text, ünïcode ✓ 日本", "plain text, ünïcode ✓ 日本"), ("a\nb\tc\rd", r"a\nb\tc\rd"),
    ("\x1b[31mred\x07", r"\x1b[31mred\x07"), ("\x9b1m", r"\x9b1m"), ("\u202egnp", r"\u202egnp"),
    ("\u2028", r"\u2028"), ("\udcff", r"\udcff"), ("", "")])
def test_nothing_printable_steers_a_terminal_or_breaks_the_line(text, shown):
    assert printable(text) == shown


def test_no_character_at_all_escapes_printable():
    everything = printable("".join(map(chr, range(0x110000))))
    assert everything.isprintable()


# Pattern and Value.

def test_a_pattern_is_compiled_once_at_its_first_use(monkeypatch):
    compiled = []
    compile_really = re.compile
    monkeypatch.setattr(re, "compile", lambda text: compiled.append(text) or compile_really(text))
    pattern = Pattern("a+b")
    assert compiled == []
    assert pattern.fullmatch("aab") and not pattern.match("b") and pattern.search("xxab")
    assert pattern.sub("-", "ab ab") == "- -" and pattern.findall("aab") == ["aab"]
    assert pattern.groups == 0 and pattern.split("1ab2") == ["1", "2"]
    assert compiled[:1] == ["a+b"] and len(compiled) <= 2


def test_the_flags_of_a_pattern_are_letters():
    assert Pattern("A b # c", "ix").fullmatch("ab")
    assert not Pattern("A b").fullmatch("ab")


def test_a_pattern_has_no_attributes_that_a_compiled_one_lacks():
    with pytest.raises(AttributeError):
        Pattern("a").nothing


class Point(Value):
    __slots__ = ("x", "y")


def test_a_value_cannot_be_changed():
    point = Point(x=1)
    with pytest.raises(AttributeError, match="^a Point cannot be changed$"):
        point.x = 2
    with pytest.raises((AttributeError, TypeError)):
        del point.x
    assert (point.x, point.y) == (1, None)


def test_a_value_takes_no_attribute_that_it_does_not_have():
    with pytest.raises(TypeError, match="^Point has no z$"):
        Point(x=1, z=2)


def test_values_are_equal_if_all_is():
    class Other(Value):
        __slots__ = ("x", "y")
    assert Point(x=1, y=[2]) == Point(y=[2], x=1)
    assert Point(x=1) != Point(x=2) and Point(x=1) != Other(x=1) and Point(x=1) != 1
    assert len({Point(x=1), Point(x=1), Point(x=2)}) == 2
    assert repr(Point(x=1, y="a")) == "Point(x=1, y='a')"


def test_the_errors_of_a_person_are_no_errors_of_the_program():
    assert issubclass(RoexecError, Exception) and not issubclass(RoexecError, ValueError)
    assert issubclass(roexec.YamlError, RoexecError) and issubclass(roexec.CronError, RoexecError)


@pytest.mark.parametrize("written", ["9" * 400, 16 ** 300, "9999999999T", str(1 << 63)])
def test_a_size_that_no_system_can_have_is_refused(written):
    with pytest.raises(ValueError, match="too large for a size"):
        roexec.parse_size(written)
