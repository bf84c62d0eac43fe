"""Cron: the right instants or an error, judged by a slow oracle that knows nothing of it."""
import calendar
import datetime
import functools
import hashlib
import os
import random
import zoneinfo

import pytest

from roexec import Cron, CronError, RoexecError, get_zone

UTC = datetime.timezone.utc
SECOND, MINUTE, DAY = (datetime.timedelta(seconds=seconds) for seconds in (1, 60, 86400))
LONG = os.environ.get("ROEXEC_LONG") == "1"
ZONES = sorted(zoneinfo.available_timezones() - {"localtime", "Factory"})
needs_zones = pytest.mark.skipif(not ZONES, reason="this host has no time zone data")


def local(text, zone="UTC"):
    """The aware datetime of `2025-03-30 02:30`; a final `+` means the second of two."""
    naive = datetime.datetime.fromisoformat(text.rstrip("+"))
    return naive.replace(tzinfo=get_zone(zone), fold=text.endswith("+"))


def shown(instant):
    """The inverse of `local`, with seconds where there are any."""
    text = instant.strftime("%Y-%m-%d %H:%M:%S").removesuffix(":00")
    return text + "+" * instant.fold


def take(count, cron, instant):
    slots = []
    for _ in range(count):
        instant = cron.next(instant)
        slots.append(instant)
    return slots


MONTH_NAMES = "jan feb mar apr may jun jul aug sep oct nov dec"


# The oracle: what SEMANTICS say, asked of each minute and each day anew.

class Oracle:
    """Whether a nominal local time matches, and which minutes of a stretch of time are slots."""

    def __init__(self, expression):
        fields = expression.split()
        second, minute, hour, *self.days = fields if len(fields) == 6 else ["0", *fields]
        self.wildcard = minute.startswith("*") or hour.startswith("*")
        self.seconds, self.minutes = numbers(second, 0, 59), numbers(minute, 0, 59)
        self.hours = numbers(hour, 0, 23)
        self.date_matches = functools.lru_cache(None)(self.date_matches)

    def matches(self, nominal):
        return (nominal.minute in self.minutes and nominal.hour in self.hours
                and nominal.second in self.seconds and self.date_matches(nominal.date()))

    def date_matches(self, date):
        dates, months, weekdays = self.days
        by_date = any(date.day in days_of_item(item, date) for item in dates.split(","))
        by_weekday = any(date.day in days_of_weekday(item, date) for item in weekdays.split(","))
        both = any(field.startswith("*") or field == "?" for field in (dates, weekdays))
        if date.month not in numbers(months, 1, 12, MONTH_NAMES):
            return False
        return by_date and by_weekday if both else by_date or by_weekday

    def slots(self, start, end, zone):
        """The slots with start <= slot < end, in UTC seconds that are whole minutes."""
        readings = {}
        for second in range(start - 14400, end, 60):
            instant = datetime.datetime.fromtimestamp(second, zone)
            readings[second] = instant.replace(tzinfo=None, fold=0)
        return [second for second in range(start, end, 60) if self.is_slot(second, readings)]

    def is_slot(self, second, readings):
        reading = readings[second]
        if self.wildcard:
            return self.matches(reading)
        jump = reading - readings[second - 60] - MINUTE
        if datetime.timedelta(0) < jump <= 180 * MINUTE:
            lost = (reading - n * MINUTE for n in range(1, jump // MINUTE + 1))
            if any(map(self.matches, lost)):
                return True
        return self.matches(reading) and not any(
            readings[second - 60 * n] == reading for n in range(1, 181))


@functools.lru_cache(None)
def numbers(text, low, high, names=""):
    """The numbers that a field without rules stands for."""
    names = {name: number for number, name in enumerate(names.split(), low)}
    found = set()
    for item in text.lower().split(","):
        span, _, step = item.partition("/")
        first, _, last = span.partition("-")
        begin = low if first in "*?" else int(names.get(first, first))
        end = 7 if last == "sun" else int(names.get(last, last)) if last else (
            high if step or first in "*?" else begin)
        found.update(range(begin, end + 1, int(step or 1)))
    return found


def days_of_item(item, date):
    """The days of the date's month that an item of the field day of month means."""
    length = calendar.monthrange(date.year, date.month)[1]
    workdays = [day for day in range(1, length + 1) if date.replace(day=day).weekday() < 5]
    if item == "LW":
        return {workdays[-1]}
    if item.startswith("L"):
        return {length - int(item[2:] or 0)}
    if item.endswith("W"):
        day = int(item[:-1])
        return {min(workdays, key=lambda workday: abs(workday - day))} if day <= length else ()
    return numbers(item, 1, 31)


def days_of_weekday(item, date):
    """The days of the date's month that an item of the field day of week means."""
    length = calendar.monthrange(date.year, date.month)[1]

    def days(item):
        weekdays = {number % 7 for number in numbers(item, 0, 7, "sun mon tue wed thu fri sat")}
        return [day for day in range(1, length + 1)
                if date.replace(day=day).isoweekday() % 7 in weekdays]

    if item.endswith("L"):
        return days(item[:-1])[-1:]
    if "#" in item:
        weekday, number = item.split("#")
        return days(weekday)[int(number) - 1:int(number)]
    return days(item)


# Fields.

FIRES = [
    ("* * * * *", "2025-01-01 00:00:30", ["2025-01-01 00:01", "2025-01-01 00:02"]),
    ("*/15 * * * *", "2025-01-01 00:50", ["2025-01-01 01:00", "2025-01-01 01:15"]),
    ("*/40 * * * *", "2025-01-01 00:00", ["2025-01-01 00:40", "2025-01-01 01:00"]),
    ("5/20 3 * * *", "2025-01-01", ["2025-01-01 03:05", "2025-01-01 03:25", "2025-01-01 03:45"]),
    ("1-10/4 0 * * *", "2025-01-01", ["2025-01-01 00:01", "2025-01-01 00:05", "2025-01-01 00:09"]),
    ("0 22-23,0-1 * * *", "2025-01-01 12:00", ["2025-01-01 22:00", "2025-01-01 23:00",
                                               "2025-01-02 00:00", "2025-01-02 01:00"]),
    ("05 02 * * *", "2025-01-01", ["2025-01-01 02:05"]),
    ("*/20 30 2 * * *", "2025-01-01", ["2025-01-01 02:30", "2025-01-01 02:30:20",
                                       "2025-01-01 02:30:40", "2025-01-02 02:30"]),
    ("59 59 23 31 12 *", "2025-01-01", ["2025-12-31 23:59:59", "2026-12-31 23:59:59"]),
    ("0 0 * JAN,mAr sun", "2025-01-20", ["2025-01-26", "2025-03-02", "2025-03-09"]),
    ("0 0 * * 0", "2025-01-01", ["2025-01-05", "2025-01-12"]),
    ("0 0 * * 7", "2025-01-01", ["2025-01-05", "2025-01-12"]),
    ("0 0 * * fri-sun", "2025-01-01", ["2025-01-03", "2025-01-04", "2025-01-05", "2025-01-10"]),
    ("0 0 * * sat-7", "2025-01-01", ["2025-01-04", "2025-01-05", "2025-01-11"]),
    ("0 0 * * sun-sun", "2025-01-01", ["2025-01-05", "2025-01-12"]),
    ("0 0 * * sun-tue", "2025-01-01", ["2025-01-05", "2025-01-06", "2025-01-07", "2025-01-12"]),
    ("0 0 * * 5/2", "2025-01-01", ["2025-01-03", "2025-01-05", "2025-01-10"]),
    ("0 0 * * */2", "2025-01-01", ["2025-01-02", "2025-01-04", "2025-01-05", "2025-01-07"]),
    ("0 0 * * */7", "2025-01-01", ["2025-01-05", "2025-01-12"]),
    # The day fields: either, unless one begins with a star.
    ("0 0 13 * 5", "2025-06-01", ["2025-06-06", "2025-06-13", "2025-06-20", "2025-06-27",
                                  "2025-07-04", "2025-07-11", "2025-07-13"]),
    ("0 0 */2 * 1", "2025-09-01 12:00", ["2025-09-15", "2025-09-29", "2025-10-13"]),
    ("0 0 13 * */5", "2025-06-01", ["2025-06-13", "2025-07-13", "2026-02-13"]),
    ("0 0 *,13 * 5", "2025-06-01", ["2025-06-06", "2025-06-13"]),
    ("0 0 1-31 * 5", "2025-06-01", ["2025-06-02", "2025-06-03"]),
    ("0 0 13 * ?", "2025-06-01", ["2025-06-13", "2025-07-13"]),
    ("0 0 ? * fri", "2025-06-01", ["2025-06-06", "2025-06-13"]),
    ("0 0 0 ? * sat#1,sat#3", "2025-06-01", ["2025-06-07", "2025-06-21"]),
    ("0 0 0 ? * */2", "2025-01-01", ["2025-01-02", "2025-01-04", "2025-01-05"]),
    # Rules for days.
    ("0 0 L * *", "2025-01-15", ["2025-01-31", "2025-02-28", "2025-03-31", "2025-04-30"]),
    ("0 0 l 2 *", "2023-03-01", ["2024-02-29", "2025-02-28"]),
    ("0 0 L-3 * *", "2025-01-01", ["2025-01-28", "2025-02-25", "2025-03-28"]),
    ("0 0 L-29 * *", "2025-01-01", ["2025-01-02", "2025-03-02", "2025-04-01"]),
    ("0 0 LW * *", "2025-01-01", ["2025-01-31", "2025-02-28", "2025-03-31", "2025-04-30",
                                  "2025-05-30", "2025-06-30", "2025-07-31", "2025-08-29"]),
    ("0 0 15W * *", "2025-02-01", ["2025-02-14", "2025-03-14", "2025-04-15", "2025-05-15",
                                   "2025-06-16"]),
    ("0 0 1W * *", "2025-02-01", ["2025-02-03", "2025-03-03", "2025-04-01", "2025-05-01",
                                  "2025-06-02"]),
    ("0 0 31W * *", "2025-01-01", ["2025-01-31", "2025-03-31", "2025-05-30", "2025-07-31",
                                   "2025-08-29"]),
    ("0 0 * * 5L", "2025-01-01", ["2025-01-31", "2025-02-28", "2025-03-28"]),
    ("0 0 * * suNL", "2025-01-01", ["2025-01-26", "2025-02-23", "2025-03-30"]),
    ("0 0 * * 7l", "2025-01-01", ["2025-01-26"]),
    ("0 0 * * mon#2", "2025-01-01", ["2025-01-13", "2025-02-10"]),
    ("0 0 * * 1#5", "2025-01-01", ["2025-03-31", "2025-06-30"]),
    ("0 0 * * mon#1,fri,3L", "2025-01-01", ["2025-01-03", "2025-01-06", "2025-01-10", "2025-01-17",
                                           "2025-01-24", "2025-01-29", "2025-01-31"]),
    ("0 0 L * 5", "2025-05-20", ["2025-05-23", "2025-05-30", "2025-05-31", "2025-06-06"]),
    ("0 0 1,L * *", "2025-01-31", ["2025-02-01", "2025-02-28", "2025-03-01"]),
    # Leap days, across 2100.
    ("0 0 29 2 *", "2025-01-01", ["2028-02-29", "2032-02-29"]),
    ("0 0 29 2 *", "2096-03-01", ["2104-02-29", "2108-02-29"]),
    ("0 0 29 2 mon#5", "2025-01-01", ["2028-02-29", "2032-02-29"]),
    ("0 0 29 2 */7", "2072-01-01", ["2088-02-29"]),
    ("0 0 * 2 mon#5", "2025-01-01", ["2044-02-29", "2072-02-29", "2112-02-29"]),
    # Macros.
    ("@yearly", "2025-01-01", ["2026-01-01"]),
    ("@annually", "2025-01-01", ["2026-01-01"]),
    ("@monthly", "2025-01-01", ["2025-02-01"]),
    ("@weekly", "2025-01-01", ["2025-01-05"]),
    ("@daily", "2025-01-01", ["2025-01-02"]),
    ("@midnight", "2025-01-01", ["2025-01-02"]),
    ("@hourly", "2025-01-01", ["2025-01-01 01:00"]),
    ("@every 90s", "1970-01-01", ["1970-01-01 00:01:30", "1970-01-01 00:03"]),
    ("@every 1h30m", "2025-01-01", ["2025-01-01 01:30", "2025-01-01 03:00"]),
    ("@every 7s", "1969-12-31 23:59:50", ["1969-12-31 23:59:53", "1970-01-01"]),
    ("  0\t2  * * *  ", "2025-01-01", ["2025-01-01 02:00"]),
]


@pytest.mark.parametrize("expression, after, expected", FIRES)
def test_an_expression_fires_when_it_says(expression, after, expected):
    cron = Cron(expression)
    slots = take(len(expected), cron, local(after))
    assert slots == [local(text) for text in expected]
    assert slots == list(cron.between(local(after) + SECOND, slots[-1] + SECOND))
    assert slots[-2::-1] == [slot for slot in backwards(cron, slots[-1], len(slots) - 1)]
    assert all(cron.matches(slot) for slot in slots)


def backwards(cron, instant, count):
    for _ in range(count):
        instant = cron.previous(instant)
        yield instant


DATES = ["*", "*", "?", "*/2", "1", "13", "31", "1-7", "1,15", "L", "L-2", "LW", "15W", "1W,31W",
         "10/9", "8-14", "30"]
MONTHS = ["*", "*", "*/3", "2", "jan,JUN", "feb-apr", "11/2", "12"]
WEEKDAYS = ["*", "*", "?", "mon", "0", "7", "1-5", "fri-sun", "*/2", "5/2", "5L", "sunL", "mon#2",
            "3#5,4", "0,3L"]


@pytest.mark.parametrize("year", [1999, 2000, 2096, 2100])
def test_days_are_those_of_the_oracle(year):
    chosen = random.Random(year)
    start = datetime.date(year, 1, 1)
    for _ in range(40):
        expression = f"0 12 {' '.join(map(chosen.choice, (DATES, MONTHS, WEEKDAYS)))}"
        if expression[:9] in ("0 12 30 2", "0 12 31 2") and expression[-1] in "*?":
            continue                    # never: refused
        cron, oracle = Cron(expression), Oracle(expression)
        days = [start + n * DAY for n in range(366)]
        noon = datetime.time(12, tzinfo=UTC)
        assert list(cron.between(datetime.datetime.combine(days[0], noon),
                                 datetime.datetime.combine(days[-1] + DAY, noon))) == [
            datetime.datetime.combine(day, noon) for day in days if oracle.date_matches(day)
        ], expression


@pytest.mark.parametrize("expression", [
    "* * * * * *", "*/7 * * * * *", "10-20/3,59 */2 5 * * *", "0 59 4/1 * * *", "30 0,30 5 * * *"])
def test_seconds_are_those_of_the_oracle(expression):
    oracle, start = Oracle(expression), local("2025-06-01 04:55")
    seconds = [start + n * SECOND for n in range(4000)]
    slots = [second for second in seconds if oracle.matches(second.replace(tzinfo=None))]
    cron = Cron(expression)
    assert list(cron.between(seconds[0], seconds[-1] + SECOND)) == slots
    assert list(backwards(cron, seconds[-1] + SECOND, len(slots))) == slots[::-1]
    assert [second for second in seconds if cron.matches(second)] == slots


def test_a_fraction_of_a_second_is_kept_in_mind_and_not_in_the_answer():
    cron, noon = Cron("* * * * *"), local("2025-01-01 12:00")
    late = noon.replace(microsecond=999999)
    assert cron.matches(noon) and not cron.matches(late)
    assert cron.previous(late) == noon and cron.previous(noon) == noon - MINUTE
    assert cron.next(late) == noon + MINUTE and cron.next(late - SECOND) == noon
    assert list(cron.between(late, noon + MINUTE)) == []
    assert list(cron.between(noon, late)) == [noon]


@pytest.mark.parametrize("after", ["1970-01-01", "1969-12-31 23:59:59", "0001-06-01",
                                   "9998-12-30 23:59:59"])
def test_the_whole_range_of_datetime_is_served(after):
    instant = local(after)
    assert Cron("* * * * *").next(instant) - instant <= MINUTE
    assert instant - Cron("* * * * *").previous(instant) <= MINUTE
    Cron("0 0 29 2 *").next(instant), Cron("0 0 29 2 *").previous(instant)


def test_the_first_and_the_last_days_of_datetime_have_no_slots():
    cron = Cron("0 * * * *")
    assert local("0001-01-02") < cron.next(datetime.datetime.min.replace(tzinfo=UTC))
    assert local("9999-12-30") > cron.previous(datetime.datetime.max.replace(tzinfo=UTC))


def test_there_is_none_after_the_end_of_time_and_none_before_its_beginning():
    assert Cron("0 0 1 1 *").next(local("9999-06-01")) is None
    assert Cron("0 0 1 7 *").previous(local("0001-06-01")) is None
    assert Cron("@every 366d").next(local("9999-09-01")) is None
    assert Cron("@every 366d").previous(local("0001-02-01")) is None
    assert Cron("* * * * *").next(datetime.datetime.max.replace(tzinfo=UTC)) is None
    assert Cron("* * * * *").previous(datetime.datetime.min.replace(tzinfo=UTC)) is None


# Changes of clocks.

CHANGES = [
    # A gap of an hour, and an hour that comes twice.
    ("Europe/Berlin", "30 2 * * *", "2025-03-29 12:00",
     ["2025-03-30 03:00", "2025-03-31 02:30"]),
    ("Europe/Berlin", "30 2 * * *", "2025-10-25 12:00",
     ["2025-10-26 02:30", "2025-10-27 02:30"]),
    ("Europe/Berlin", "0,30 2,3 * * *", "2025-03-30",
     ["2025-03-30 03:00", "2025-03-30 03:30", "2025-03-31 02:00"]),
    ("Europe/Berlin", "*/30 2 * * *", "2025-03-29 12:00",
     ["2025-03-31 02:00", "2025-03-31 02:30"]),
    ("Europe/Berlin", "*/30 2 * * *", "2025-10-25 12:00",
     ["2025-10-26 02:00", "2025-10-26 02:30", "2025-10-26 02:00+", "2025-10-26 02:30+",
      "2025-10-27 02:00"]),
    ("Europe/Berlin", "0 * * * *", "2025-10-26 01:30",
     ["2025-10-26 02:00", "2025-10-26 02:00+", "2025-10-26 03:00"]),
    ("Europe/Berlin", "@hourly", "2025-03-30 01:30", ["2025-03-30 03:00", "2025-03-30 04:00"]),
    ("Europe/Berlin", "0 0-23 * * *", "2025-10-26 01:30",
     ["2025-10-26 02:00", "2025-10-26 03:00", "2025-10-26 04:00"]),
    ("Europe/Berlin", "0 0-23 * * *", "2025-03-30 00:30",
     ["2025-03-30 01:00", "2025-03-30 03:00", "2025-03-30 04:00"]),
    ("Europe/Berlin", "15 0 2 * * *", "2025-03-30", ["2025-03-30 03:00", "2025-03-31 02:00:15"]),
    ("Europe/Berlin", "*/20 59 2 * * *", "2025-10-26 02:30",
     ["2025-10-26 02:59", "2025-10-26 02:59:20", "2025-10-26 02:59:40", "2025-10-27 02:59"]),
    # Asked from within the second pass.
    ("Europe/Berlin", "45 2 * * *", "2025-10-26 02:15+", ["2025-10-27 02:45"]),
    ("Europe/Berlin", "45 * * * *", "2025-10-26 02:15+", ["2025-10-26 02:45+", "2025-10-26 03:45"]),
    ("Europe/Berlin", "45 * * * *", "2025-10-26 02:15", ["2025-10-26 02:45", "2025-10-26 02:45+"]),
    # The day is that of the nominal time.
    ("Europe/Berlin", "30 2 30 3 *", "2025-01-01", ["2025-03-30 03:00", "2026-03-30 02:30"]),
    ("America/Sao_Paulo", "0 0 * * *", "2018-11-03 12:00",
     ["2018-11-04 01:00", "2018-11-05 00:00"]),
    ("America/Sao_Paulo", "30 0 4 11 *", "2018-11-01", ["2018-11-04 01:00", "2019-11-04 00:30"]),
    ("America/Sao_Paulo", "30 23 * * *", "2018-02-17 12:00",
     ["2018-02-17 23:30", "2018-02-18 23:30"]),
    ("Africa/Cairo", "0 0 * * 5", "2024-04-20", ["2024-04-26 01:00", "2024-05-03 00:00"]),
    ("Asia/Beirut", "*/30 0 * * *", "2025-03-29 12:00", ["2025-03-31 00:00", "2025-03-31 00:30"]),
    # From 23:30 to 00:30 of the next day.
    ("America/Scoresbysund", "0 0 * * 0", "2024-03-30",
     ["2024-03-31 00:00", "2024-04-07 00:00"]),
    # Thirty minutes.
    ("Australia/Lord_Howe", "15 2 * * *", "2025-10-04 12:00",
     ["2025-10-05 02:30", "2025-10-06 02:15"]),
    ("Australia/Lord_Howe", "45 1 * * *", "2025-04-05 12:00",
     ["2025-04-06 01:45", "2025-04-07 01:45"]),
    ("Australia/Lord_Howe", "*/15 * * * *", "2025-04-06 01:15",
     ["2025-04-06 01:30", "2025-04-06 01:45", "2025-04-06 01:30+", "2025-04-06 01:45+",
      "2025-04-06 02:00"]),
    # Two hours, and three.
    ("Antarctica/Troll", "0,30 1-2 * * *", "2025-03-30",
     ["2025-03-30 03:00", "2025-03-31 01:00"]),
    ("Antarctica/Troll", "30 1-2 * * *", "2025-10-26",
     ["2025-10-26 01:30", "2025-10-26 02:30", "2025-10-27 01:30"]),
    # Winter as the exception, and Ramadan as one.
    ("Europe/Dublin", "30 1 * * *", "2025-03-29 12:00", ["2025-03-30 02:00", "2025-03-31 01:30"]),
    ("Europe/Dublin", "30 1 * * *", "2025-10-25 12:00", ["2025-10-26 01:30", "2025-10-27 01:30"]),
    ("Africa/Casablanca", "30 2 * * *", "2025-02-22 12:00",
     ["2025-02-23 02:30", "2025-02-24 02:30"]),
    ("Africa/Casablanca", "30 2 * * *", "2025-04-05 12:00",
     ["2025-04-06 03:00", "2025-04-07 02:30"]),
    # Two changes within a week.
    ("America/Noronha", "30 0 * * *", "2000-10-07 12:00",
     ["2000-10-08 01:00", "2000-10-09 00:30"]),
    ("America/Noronha", "*/30 23 * * *", "2000-10-13 23:30",
     ["2000-10-14 23:00", "2000-10-14 23:30", "2000-10-14 23:00+", "2000-10-14 23:30+",
      "2000-10-15 23:00"]),
    # Corrections: the lost day is lost, the repeated one repeated.
    ("Pacific/Apia", "0 12 * * *", "2011-12-29", ["2011-12-29 12:00", "2011-12-31 12:00"]),
    ("Pacific/Apia", "0 0 30 12 *", "2011-01-01", ["2012-12-30 00:00"]),
    ("Pacific/Apia", "*/30 0 * * *", "2011-12-29 12:00", ["2011-12-31 00:00", "2011-12-31 00:30"]),
    ("Pacific/Apia", "0 0 31 * *", "2011-12-01", ["2011-12-31 00:00", "2012-01-31 00:00"]),
    ("Antarctica/Vostok", "30 20 31 1 *", "1994-01-01",
     ["1994-01-31 20:30", "1994-01-31 20:30+", "1995-01-31 20:30"]),
    ("Antarctica/Vostok", "30 2 * * *", "1994-10-31", ["1994-10-31 02:30", "1994-11-02 02:30"]),
]


@needs_zones
@pytest.mark.parametrize("zone, expression, after, expected", CHANGES)
def test_at_a_change_of_clocks(zone, expression, after, expected):
    cron = Cron(expression)
    slots = take(len(expected), cron, local(after, zone))
    assert [shown(slot) for slot in slots] == [shown(local(text, zone)) for text in expected]
    assert all(slot.tzinfo is get_zone(zone) and cron.matches(slot) for slot in slots)
    before = slots[-1].astimezone(UTC) + SECOND
    assert list(backwards(Cron(f"CRON_TZ={zone} {expression}"), before, len(slots))) == [
        slot.astimezone(UTC) for slot in slots[::-1]]


class Summer(datetime.tzinfo):
    """A zone whose clocks are `shift` ahead of UTC from one instant, or always, to another."""

    def __init__(self, end, shift, start=None):
        self.start = start and start.replace(tzinfo=None)
        self.end, self.shift = end.replace(tzinfo=None), shift

    def fromutc(self, moment):
        moment = moment.replace(tzinfo=None)
        summer = moment < self.end and (not self.start or moment >= self.start)
        fold = self.end <= moment < self.end + self.shift
        return (moment + self.shift * summer).replace(tzinfo=self, fold=fold)

    def utcoffset(self, moment):
        naive = moment.replace(tzinfo=None, fold=0)
        summer = naive < self.end + self.shift * (1 - moment.fold) and (
            not self.start or naive >= self.start + self.shift * moment.fold)
        return self.shift if summer else datetime.timedelta(0)


@pytest.mark.parametrize("minutes, twice", [(20, False), (60, False), (180, False), (181, True)])
@pytest.mark.parametrize("hour", [-2, -0.75, -0.25, 0, 0.5, 36, 71.5])
def test_what_comes_twice_within_three_hours_counts_once(hour, minutes, twice):
    # At its start, and 72 hours later, two chunks of Cron meet.
    zone = Summer(local("2024-01-03") + hour * 60 * MINUTE, minutes * MINUTE)
    change = calendar.timegm(zone.end.timetuple())
    begin, again, end = (change + n * minutes * 60 for n in (-1, 1, 2))
    each = Cron("* * * * *"), [*range(begin, end, 60)]
    once = Cron("0-59 0-23 * * *"), [*range(begin, change, 60), *range(again, end, 60)]
    for cron, slots in (each, (once[0], each[1]) if twice else once):
        assert list(cron.slots(begin, end, zone)) == slots
        before = [end]
        while before[-1] > begin:
            before.append(cron.previous_slot(before[-1], zone))
        assert before[:0:-1] == slots


@pytest.mark.parametrize("hours", range(0, 12 * 24, 17))
def test_two_changes_within_four_days_are_both_seen(hours):
    start = local("2024-01-03") + hours * 60 * MINUTE
    zone = Summer(start + 4 * DAY, 60 * MINUTE, start)
    begin, first = (calendar.timegm(instant.timetuple()) for instant in (start - DAY, start))
    second, end = first + 4 * 86400, first + 5 * 86400
    slots = [slot for slot in range(begin, end, 1800) if not second <= slot < second + 3600]
    assert list(Cron("0,30 0-23 * * *").slots(begin, end, zone)) == slots
    assert Cron("0,30 0-23 * * *").moved(first, zone) == start.strftime("%H:00")


AWKWARD = ["Africa/Cairo", "Africa/Casablanca", "Africa/El_Aaiun", "America/Caracas",
           "America/Sao_Paulo", "America/St_Johns", "Antarctica/Casey", "Antarctica/Troll",
           "Antarctica/Vostok", "Asia/Gaza", "Asia/Kathmandu", "Asia/Pyongyang", "Asia/Tehran",
           "Australia/Lord_Howe", "Europe/Dublin", "Pacific/Apia", "Pacific/Kiritimati",
           "Pacific/Kwajalein"]
AROUND = ["*/20 * * * *", "0 */2 * * *", "17 * * * *", "*/30 0-3,20-23 * * *", "0,30 0-4 * * *",
          "59 23,0 * * *", "15 2 * * *", "0 0 * * *", "5,45 20-23,0-3 * * sun,fri", "0 0-23 * * *",
          "30 0-2 */2 * *", "45 1-23/2 * * *"]


def changes(zone, first, last):
    """The instants, in UTC seconds, of each change of clocks from one year to another."""
    def offset(second):
        return datetime.datetime.fromtimestamp(second, zone).utcoffset()

    start, end = (calendar.timegm((year, 1, 1, 0, 0, 0)) for year in (first, last + 1))
    known, last = offset(start), 0
    for second in range(start, end, 86400):
        if offset(second + 86400) != known:
            known = offset(second + 86400)
            change = next(minute for minute in range(second, second + 86401, 60)
                          if offset(minute) == known)
            assert change - last > 3 * 86400 + 3 * 3600     # Cron takes it for granted
            yield change
            last = change


def check_around(change, zone, expressions):
    start, end = change - 5 * 3600, change + 5 * 3600
    for expression in expressions:
        cron, slots = Cron(expression), Oracle(expression).slots(start, end, zone)
        assert list(cron.slots(start, end, zone)) == slots, (expression, zone, change)
        previous, found = end, []
        while (previous := cron.previous_slot(previous, zone)) >= start:
            found.insert(0, previous)
        assert found == slots, (expression, zone, change)


@needs_zones
@pytest.mark.parametrize("name", AWKWARD)
def test_around_each_change_of_an_awkward_zone_the_slots_are_those_of_the_oracle(name):
    chosen, zone = random.Random(name), get_zone(name)
    for change in changes(zone, 1990, 2040):
        check_around(change, zone, AROUND if LONG else chosen.sample(AROUND, 1))


@needs_zones
@pytest.mark.parametrize("part", range(20))
def test_around_changes_of_all_zones_the_slots_are_those_of_the_oracle(part):
    chosen = random.Random(part)
    for name in ZONES[part::20]:
        first, last = (1990, 2040) if LONG else (chosen.randrange(1990, 2041),) * 2
        for change in changes(get_zone(name), first, last):
            check_around(change, get_zone(name), chosen.sample(AROUND, 4 if LONG else 1))


@needs_zones
def test_next_previous_between_and_matches_agree():
    chosen = random.Random(3)
    choices = (["*", "*/7", "0", "30", "5-50/15", "0,59"], ["*", "*/2", "2", "0-4", "23,0", "1"],
               ["*", "*", "1-7", "L", "15W"], MONTHS, WEEKDAYS)
    for _ in range(800):
        fields = map(chosen.choice, choices)
        cron, zone = Cron(" ".join(fields)), get_zone(chosen.choice(AWKWARD + ZONES))
        instant = datetime.datetime.fromtimestamp(chosen.randrange(631152000, 2240524800), zone)
        slot = cron.next(instant)
        second, end = int(instant.timestamp()), int(slot.timestamp())
        assert cron.matches(slot) and slot.astimezone(UTC) > instant.astimezone(UTC)
        assert cron.next_slot(second, zone) == end == cron.next_slot(end - 1, zone)
        assert cron.previous_slot(end + 1, zone) == end
        assert list(cron.slots(second + 1, end + 1, zone)) == [end]
        assert (cron.previous_slot(end, zone) == second) == cron.matches(instant)
        assert cron.previous_slot(end, zone) <= second
        assert cron.next_slot(cron.previous_slot(end, zone), zone) == end
        between = chosen.randrange(second, end + 1)
        assert (cron.next_slot(between - 1, zone) == between) == (between == end
                                                                 or cron.matches(instant)
                                                                 and between == second)


@needs_zones
def test_a_slot_that_a_gap_has_moved_bears_its_nominal_time():
    berlin = get_zone("Europe/Berlin")

    def moved(expression, text, zone=berlin):
        return Cron(expression).moved(int(local(text, "Europe/Berlin").timestamp()), zone)

    assert moved("30 2 * * *", "2025-03-30 03:00") == "02:30"
    assert moved("20,40 2-3 * * *", "2025-03-30 03:00") == "02:20"
    assert moved("5 30 2 * * *", "2025-03-30 03:00") == "02:30:05"
    assert moved("30 2 * * *", "2025-03-31 02:30") is None
    assert moved("0 3 * * *", "2025-03-30 03:00") is None
    assert moved("0 * * * *", "2025-03-30 03:00") is None
    assert moved("30 2 * * *", "2025-10-26 02:30") is None
    assert moved("CRON_TZ=UTC 0 1 * * *", "2025-03-30 03:00") is None
    assert moved("CRON_TZ=Europe/Berlin 30 2 * * *", "2025-03-30 03:00", UTC) == "02:30"
    assert moved("@every 1h", "2025-03-30 03:00") is None
    assert moved("@reboot", "2025-03-30 03:00") is None


@needs_zones
def test_an_expression_whose_times_all_fall_into_gaps_never_fires_in_that_zone():
    cron = Cron("*/5 2 * 3 sun#2")
    assert cron.fires_in(UTC) and cron.fires_in(get_zone("Europe/Berlin"))
    assert not cron.fires_in(get_zone("America/New_York"))
    assert cron.next(local("2025-01-01", "America/New_York")) is None
    assert Cron("5 2 * 3 sun#2").fires_in(get_zone("America/New_York"))
    assert not Cron("CRON_TZ=America/New_York */5 2 * 3 sun#2").fires_in(UTC)
    assert Cron("@reboot").fires_in(UTC) and Cron("@every 1h").fires_in(UTC)


# Zones.

@needs_zones
def test_cron_tz_beats_the_zone_of_the_datetime_and_the_answer_bears_the_latter():
    cron, new_york = Cron("CRON_TZ=Asia/Tokyo 0 9 * * *"), get_zone("America/New_York")
    slot = cron.next(local("2025-01-01 00:00", "America/New_York"))
    assert shown(slot) == "2025-01-01 19:00" and slot.tzinfo is new_york
    assert str(cron.zone) == "Asia/Tokyo" and Cron("0 9 * * *").zone is None
    assert cron.next_slot(0, new_york) == cron.next_slot(0, UTC) == 0 + 86400
    assert cron.previous(slot + DAY) == slot
    assert next(cron.between(slot, slot + SECOND)).tzinfo is new_york


@pytest.mark.parametrize("prefix, hour", [("CRON_TZ=UTC", 2), ("CRON_TZ=+02:00", 0),
                                          ("CRON_TZ=UTC-3", 5)])
def test_offsets_need_no_zone_data(prefix, hour):
    assert Cron(f"{prefix} 0 2 * * *").next(local("2025-01-01 12:00")) == local(
        "2025-01-02").replace(hour=hour)


@needs_zones
def test_one_cron_may_be_asked_in_one_zone_after_the_other():
    cron = Cron("0 2 * * *")
    for _ in range(2):
        assert cron.next_slot(0, UTC) == 7200
        assert cron.next_slot(0, get_zone("+01:00")) == 3600
        assert cron.next_slot(0, get_zone("Asia/Tokyo")) == 17 * 3600


class Hashless(datetime.tzinfo):
    """A zone as some libraries make them: it cannot be the key of a dictionary."""
    __hash__ = None

    def utcoffset(self, instant):
        return datetime.timedelta(hours=5, minutes=45)

    def dst(self, instant):
        return datetime.timedelta(0)

    def tzname(self, instant):
        return "+05:45"


def test_any_tzinfo_will_do():
    instant = datetime.datetime(2025, 1, 1, 12, tzinfo=Hashless())
    slot = Cron("0 9 * * *").next(instant)
    assert slot.isoformat() == "2025-01-02T09:00:00+05:45" and slot.tzinfo is instant.tzinfo


def test_a_naive_datetime_is_refused():
    naive, cron = datetime.datetime(2025, 1, 1), Cron("* * * * *")
    for ask in (cron.next, cron.previous, cron.matches,
                lambda naive: list(cron.between(naive, naive)),
                lambda naive: list(cron.between(local("2025-01-01"), naive))):
        with pytest.raises(CronError, match="^2025-01-01T00:00:00 has no time zone"):
            ask(naive)


# H, @every, @reboot.

def hashed(seed, field, low, high):
    digest = hashlib.blake2b(f"{seed}{field}".encode(), digest_size=8).digest()
    return low + int.from_bytes(digest, "big") % (high - low + 1)


def test_h_is_a_hash_of_the_seed_and_the_name_of_the_field():
    slot = Cron("H H H H H *", "backup").next(local("2025-01-01"))
    assert [slot.second, slot.minute, slot.hour, slot.day, slot.month] == [
        hashed("backup", *field) for field in (("second", 0, 59), ("minute", 0, 59),
                                               ("hour", 0, 23), ("day of month", 1, 28),
                                               ("month", 1, 12))]
    slot = Cron("0 0 * * h", "backup").next(local("2025-01-01"))
    assert slot.isoweekday() % 7 == hashed("backup", "day of week", 0, 6)


def test_h_with_a_step_or_a_span():
    minute = hashed("backup", "minute", 0, 59)
    hour = local("2025-01-01")
    end = hour + 60 * MINUTE
    assert [slot.minute for slot in Cron("H/15 * * * *", "backup").between(hour, end)] == [
        minute % 15 + n for n in (0, 15, 30, 45)]
    assert [slot.minute for slot in Cron("H(10-19) * * * *", "backup").between(hour, end)] == [
        hashed("backup", "minute", 10, 19)]
    spread = [slot.minute for slot in Cron("H(10-39)/10,5 * * * *", "backup").between(hour, end)]
    first = 10 + (hashed("backup", "minute", 10, 39) - 10) % 10
    assert spread == [5, first, first + 10, first + 20]
    days = {slot.day for slot in take(300, Cron("0 0 H/5 * *", "backup"), hour)}
    assert days == {*range((hashed("backup", "day of month", 1, 28) - 1) % 5 + 1, 29, 5)}


def test_h_spreads_jobs_evenly_and_a_month_has_each_of_its_days():
    slots = [Cron("H H H * *", f"job-{n}").next(local("2025-02-01")) for n in range(2000)]
    for values in ({slot.minute for slot in slots}, {slot.hour for slot in slots},
                   {slot.day for slot in slots}):
        assert len(values) in (60, 24, 28)


@needs_zones
def test_h_is_a_fixed_time():
    second, third = hashed("a", "minute", 0, 59), local("2025-03-30 03:00", "Europe/Berlin")
    cron = Cron("H 2 * * *", "a")
    assert cron.matches(third)
    assert cron.moved(int(third.timestamp()), third.tzinfo) == f"02:{second:02}"


def test_h_restricts_days():
    mondays, hashed_day = {2, 9, 16, 23, 30}, hashed("a", "day of month", 1, 28)
    june = Cron("0 0 H * 1", "a").between(local("2025-06-01"), local("2025-07-01"))
    assert {slot.day for slot in june} == mondays | {hashed_day}


def test_h_without_a_seed_is_refused():
    with pytest.raises(CronError, match="^hour: H is chosen by the id of a job"):
        Cron("0 H * * *")


def test_reboot_has_no_slots():
    cron, now = Cron("@reboot"), local("2025-01-01")
    assert cron.reboot and not Cron("@daily").reboot
    assert cron.next(now) is None and cron.previous(now) is None and not cron.matches(now)
    assert list(cron.between(now, now + DAY)) == []
    assert cron.next_slot(0, UTC) is None and cron.previous_slot(0, UTC) is None


def test_every_is_the_same_in_all_zones_and_goes_both_ways():
    cron = Cron("@every 36h")
    assert cron.next_slot(0, get_zone("+05:00")) == 36 * 3600 == cron.next_slot(1, UTC)
    assert cron.previous_slot(36 * 3600, UTC) == 0 and cron.previous_slot(1, UTC) == 0
    assert cron.previous_slot(0, UTC) == -36 * 3600
    assert list(cron.slots(0, 4 * 86400, UTC)) == [0, 36 * 3600, 72 * 3600]
    assert cron.matches(local("1970-01-02 12:00"))


# What is refused.

ERRORS = [
    ("", '0 fields in ""; write five: minute, hour, day of month, month, day of week; or six, with '
         'seconds first'),
    ("5", '1 field in "5"; write five: …'),
    ("0 2 * *", '4 fields in "0 2 * *"; write five: …'),
    ("0 0 12 * * 1 2025", '7 fields in "0 0 12 * * 1 2025"; write five: …'),
    ("CRON_TZ=UTC", '0 fields in "CRON_TZ=UTC"; …'),
    # Bounds.
    ("0 24 * * *", 'hour: 24 is outside 0-23 in "0 24 * * *"'),
    ("60 * * * *", 'minute: 60 is outside 0-59 in "60 * * * *"'),
    ("60 * * * * *", 'second: 60 is outside 0-59 in "60 * * * * *"'),
    ("0 0 0 * *", 'day of month: 0 is outside 1-31 in "0 0 0 * *"'),
    ("0 0 30-32 * *", 'day of month: 32 is outside 1-31 in "0 0 30-32 * *"'),
    ("0 0 * 13 *", 'month: 13 is outside 1-12 in "0 0 * 13 *"'),
    ("0 0 * * 8", 'day of week: 8 is outside 0-7 in "0 0 * * 8"'),
    ("0 0 * * 8L", 'day of week: 8 is outside 0-7 in "0 0 * * 8L"'),
    ("0 0 * * mon#6", 'day of week: mon#6 is outside 1-5 in "0 0 * * mon#6"'),
    ("0 0 * * 1#0", 'day of week: 1#0 is outside 1-5 in "0 0 * * 1#0"'),
    ("0 0 L-31 * *", 'day of month: L-31 is outside 1-30 in "0 0 L-31 * *"'),
    ("0 0 L-0 * *", 'day of month: L-0 is outside 1-30 in "0 0 L-0 * *"'),
    ("0 0 32W * *", 'day of month: 32 is outside 1-31 in "0 0 32W * *"'),
    ("007 * * * *", 'minute: 007 is outside 0-59 in "007 * * * *"'),
    ("9" * 5000 + " * * * *", "minute: 999…"),
    # Steps.
    ("*/0 * * * *", 'minute: the step 0 is outside 1-59 in "*/0 * * * *"'),
    ("*/60 * * * *", 'minute: the step 60 is outside 1-59 in "*/60 * * * *"'),
    ("0 1-5/24 * * *", 'hour: the step 24 is outside 1-23 in "0 1-5/24 * * *"'),
    ("H/60 * * * *", 'minute: the step 60 is outside 1-59 in "H/60 * * * *"'),
    # Ranges that go round.
    ("0 22-4 * * *", 'hour: 22-4 runs backwards in "0 22-4 * * *"; write 22-23,0-4'),
    ("59-0 * * * *", 'minute: 59-0 runs backwards in "59-0 * * * *"; write 59,0'),
    ("0 22-4/2 * * *", 'hour: 22-4/2 runs backwards in "0 22-4/2 * * *"; write 22,0,2,4'),
    ("0 0 * nov-feb *", 'month: nov-feb runs backwards in "0 0 * nov-feb *"; write 11-12,1-2'),
    ("0 0 * * fri-mon", 'day of week: fri-mon runs backwards in "0 0 * * fri-mon"; write 5-7,1'),
    ("0 0 * * 5-0", 'day of week: 5-0 runs backwards in "0 0 * * 5-0"; write 5-7'),
    ("0 0 * * 7-2", 'day of week: 7-2 runs backwards in "0 0 * * 7-2"; write 7,1-2'),
    ("H(30-10) * * * *", 'minute: 10 is outside 30-59 in "H(30-10) * * * *"'),
    # What means nothing, careless cron's own among it.
    *[(f"{minute} * * * *",
       f'minute: "{minute}" is not understood in "{minute} * * * *"; write a number 0-59, '
       'a list 1,3, a range 1-5, or a step */2')
      for minute in ("5*", "*5", "**", "*/5/2", "*-5", "1-", "-1", "+1", "1.5", "1-2-3", "/5", "?",
                     "x", "jan", "L", "5W", "1#2", "\u0663", "\u00b2", "1_0", "0x1", "H5", "H()",
                     "H(5)", "H-5", "(5)", "~")],
    ("1,,2 * * * *", 'minute: "" is not understood in "1,,2 * * * *"; write a number 0-59, …'),
    ("1, * * * *", 'minute: "" is not understood in "1, * * * *"; write a number 0-59, …'),
    ("0 0 * jann *", 'month: "jann" is not understood in "0 0 * jann *"; write jan'),
    ("0 0 * * Monday", 'day of week: "Monday" is not understood in "0 0 * * Monday"; write mon'),
    ("0 0 * * xyz", 'day of week: "xyz" is not understood in "0 0 * * xyz"; '
                    "write a number 0-7 or sun-sat, a list 1,3, a range 1-5, or a step */2"),
    ("0 0 * * mon-xyz", 'day of week: "xyz" is not understood in "0 0 * * mon-xyz"; …'),
    ("0 0 * mon *", 'month: "mon" is not understood in "0 0 * mon *"; write a number 1-12 or …'),
    ("0 0 * * L", 'day of week: "L" is not understood in "0 0 * * L"; …'),
    *[(f"0 0 {dates} * *", f'day of month: "{dates}" is not understood in "0 0 {dates} * *"; …')
      for dates in ("L/2", "15W/2", "1-15W", "1-L", "L-3W", "W", "?/2", "5L", "mon", "LL", "L-")],
    *[(f"0 0 * * {days}", f'day of week: "{days}" is not understood in "0 0 * * {days}"; …')
      for days in ("mon#2/2", "1-5L", "mon#", "#2", "?5", "5W", "LW", "1#2#3", "mon#-1")],
    # Quartz counts the days of the week from 1.
    ("0 0 12 ? * 2-6", 'day of week: 2-6 beside ? may count from 0 or from 1 in "0 0 12 ? * 2-6"; '
                       "write names, such as mon-fri"),
    ("0 0 12 ? * 2#1", "day of week: 2#1 beside ? may count from 0 or from 1 in …"),
    ("0 0 12 ? * mon,6L", "day of week: mon,6L beside ? may count from 0 or from 1 in …"),
    # Never.
    *[(f"0 0 {days}", f'a day that never comes in "0 0 {days}"')
      for days in ("30 2 *", "31 4,6,9,11 *", "30W 2 *", "L-29 2 *", "31 feb */2", "30-31/1 2 ?",
                   "L-30 apr,jun,sep,nov *", "30,31 2 */7")],
    # @ and CRON_TZ=.
    ("@dayly", '"@dayly" is no macro in "@dayly"; did you mean "@daily"?'),
    ("@daily x", '"@daily x" is no macro in "@daily x"; did you mean "@daily"?'),
    ("@", '"@" is no macro in "@"'),
    ("@every", '"" is not a duration in "@every"; write for example 90s, 5m, 1h30m or 2d'),
    ("@every 90 s", '"90 s" is not a duration in "@every 90 s"; write 1m30s'),
    *[(f"@every {written}",
       f"@every: {written} is not 1s to 366d in whole seconds and with a unit in "
       f'"@every {written}"')
      for written in ("90", "1.5s", "0s", "367d", "60.0")],
    ("@every -5s", '"-5s" is not a duration in "@every -5s"; …'),
    ("CRON_TZ=Mars/Base 0 2 * * *",
     '"Mars/Base" is no time zone in "CRON_TZ=Mars/Base 0 2 * * *"; write for example '
     "Europe/Berlin, UTC or +02:00" if ZONES else '"Mars/Base" cannot be looked up…'),
    ("CRON_TZ= 0 2 * * *", '"" …'),
    ("CRON_TZ=../../etc/passwd 0 2 * * *", '"../../etc/passwd" …'),
]


@pytest.mark.parametrize("expression, text", ERRORS)
def test_what_is_refused_says_where_and_what_to_write(expression, text):
    with pytest.raises(CronError) as caught:
        Cron(expression, "seed")
    said = str(caught.value)
    assert said.startswith(text[:-1]) if text.endswith("…") else said == text
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, RoexecError)


def test_errors_are_on_one_line_and_steer_no_terminal():
    with pytest.raises(CronError) as caught:
        Cron("\x1b[2J\n* * * *")
    assert str(caught.value).startswith(
        r'minute: "\x1b[2J" is not understood in "\x1b[2J\n* * * *"; ')


# What a person would say.

SENTENCES = [
    ("0 2 * * 1-5", "at 02:00 on weekdays"),
    ("0 2 * * *", "at 02:00 every day"),
    ("@daily", "at 00:00 every day"),
    ("@weekly", "at 00:00 on Sundays"),
    ("@yearly", "at 00:00 on the 1st of January"),
    ("@hourly", "every hour"),
    ("@reboot", "at boot"),
    ("@every 1h30m", "every 1h30m"),
    ("* * * * *", "every minute"),
    ("* * * * * *", "every second"),
    ("*/15 * * * *", "every 15 minutes"),
    ("0,15,30,45 * * * *", "every 15 minutes"),
    ("*/40 * * * *", "at minutes 0 and 40 of every hour"),
    ("*/10 * * * * *", "every 10 seconds"),
    ("30 * * * * *", "at second 30 of every minute"),
    ("30 */15 * * * *", "at second 30 of every 15th minute"),
    ("*/10 0-4 * * * *", "every 10 seconds at minutes 0 to 4 of every hour"),
    ("5 * * * *", "at minute 5 of every hour"),
    ("5,35 * * * *", "at minutes 5 and 35 of every hour"),
    ("3-59/5 * * * *", "at minutes 3, 8, … and 58 of every hour"),
    ("0 */2 * * *", "every 2 hours"),
    ("30 */2 * * *", "at minute 30 of every 2nd hour"),
    ("*/5 */3 * * *", "every 5 minutes of every 3rd hour"),
    ("0 2,14 * * *", "at 02:00 and 14:00 every day"),
    ("0,30 9,17 * * *", "at 09:00, 09:30, 17:00 and 17:30 every day"),
    ("30 0 2 * * *", "at 02:00:30 every day"),
    ("0 8-18/2 * * *", "at 08:00, 10:00, 12:00, 14:00, 16:00 and 18:00 every day"),
    ("0 9-17 * * 1-5", "every hour from 09:00 to 17:00 on weekdays"),
    ("*/15 9-17 * * mon-fri", "every 15 minutes from 09:00 to 17:45 on weekdays"),
    ("* 2 * * *", "every minute from 02:00 to 02:59"),
    ("*/5 2,5 * * *", "every 5 minutes at hours 2 and 5"),
    ("0 0 * * 0,6", "at 00:00 on weekends"),
    ("0 0 * * mon,wed,fri", "at 00:00 on Mondays, Wednesdays and Fridays"),
    ("0 0 * * mon-sat", "at 00:00 on Mondays to Saturdays"),
    ("0 0 1 * *", "at 00:00 on the 1st of the month"),
    ("0 0 1,22,23 * *", "at 00:00 on the 1st and 22nd to 23rd of the month"),
    ("0 0 11,12,13 * *", "at 00:00 on the 11th to 13th of the month"),
    ("0 0 29 2 *", "at 00:00 on the 29th of February"),
    ("0 0 L * *", "at 00:00 on the last day of the month"),
    ("0 0 L-3 * *", "at 00:00 on the 4th-last day of the month"),
    ("0 0 LW 12 *", "at 00:00 on the last weekday of December"),
    ("0 0 15W * *", "at 00:00 on the weekday nearest the 15th of the month"),
    ("0 0 * * 5L", "at 00:00 on the last Friday of the month"),
    ("0 0 * * mon#2", "at 00:00 on the 2nd Monday of the month"),
    ("0 12 * jan,jul *", "at 12:00 every day in January and July"),
    ("0 12 * jun-aug 1-5", "at 12:00 on weekdays in June to August"),
    ("0 0 1,15 * 5", "at 00:00 on the 1st and 15th of the month and on Fridays"),
    ("0 0 */2 * 1", "at 00:00 on Mondays that are the 1st, 3rd, … and 31st of the month"),
    ("0 0 1-31 * 5", "at 00:00 every day"),
    ("CRON_TZ=UTC 0 2 * * 1-5", "at 02:00 on weekdays (UTC)"),
    ("CRON_TZ=UTC @every 5m", "every 5m (UTC)"),
]


@pytest.mark.parametrize("expression, sentence", SENTENCES)
def test_an_expression_is_described_as_a_person_would(expression, sentence):
    assert Cron(expression).describe() == sentence


def test_h_is_described_by_the_time_it_stands_for():
    minute, hour = hashed("a", "minute", 0, 59), hashed("a", "hour", 0, 23)
    assert Cron("H H * * *", "a").describe() == f"at {hour:02}:{minute:02} every day"


def test_whatever_can_be_written_can_be_described():
    chosen = random.Random(6)
    times = ["*", "*/2", "*/7", "0", "5", "0,20", "1-5", "1,2,9", "0-23/5", "H"]
    for _ in range(1000):
        fields = [*(chosen.choice(times) for _ in range(3)), chosen.choice(DATES),
                  chosen.choice(MONTHS[:2]), chosen.choice(WEEKDAYS[3:])]
        expression = " ".join(fields).replace("?", "*")
        sentence = Cron(expression, "a").describe()
        assert "  " not in sentence and sentence == sentence.strip(), expression
        assert sentence.startswith(("at ", "every ")), expression
