"""The wire that other tests cut does to connections what it says."""
import contextlib
import email.utils
import http.client
import time

import pytest
from helpers import Web, WebHandler, reply, wait_for
from links import Link


class KeptAlive(WebHandler):
    protocol_version = "HTTP/1.1"


@pytest.fixture
def web():
    server = Web()
    server.RequestHandlerClass = KeptAlive
    yield server
    server.close()


@pytest.fixture
def link(web):
    with Link(web.server_port) as link:
        yield link


def connect(link, timeout=20):
    return contextlib.closing(http.client.HTTPConnection("127.0.0.1", link.port, timeout=timeout))


def ask(connection, body=b""):
    connection.request("POST", "/", body)
    response = connection.getresponse()
    return response.status, response.read(), response.getheader("Date")


def test_a_link_passes_on_what_comes_in_both_directions(link, web):
    large = bytes(range(256)) * 20_000
    web.answer = reply(200, large[::-1])
    with connect(link) as connection:
        for _ in range(2):
            assert ask(connection, large)[:2] == (200, large[::-1])
    assert link.connections == 1 and {body for _, _, body in web.requests} == {large}


def test_a_link_that_is_cut_resets_and_refuses_until_it_is_healed(link):
    with connect(link) as connection:
        ask(connection)
        link.cut()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            ask(connection)
    with pytest.raises(ConnectionRefusedError), connect(link) as connection:
        ask(connection)
    link.heal()
    with connect(link) as connection:
        assert ask(connection)[0] == 200


def test_a_link_that_holds_passes_nothing_on_before_it_is_healed(link, web):
    with connect(link) as early, connect(link, 0.2) as late:
        ask(early)
        early.sock.settimeout(0.2)
        link.hold()
        for connection in (early, late):
            connection.request("POST", "/", b"held")
            with pytest.raises(OSError, match="timed out"):
                connection.sock.recv(1)
        assert len(web.requests) == 1
        link.heal()
        wait_for(lambda: len(web.requests) == 3)


def test_a_link_delays_each_direction(link):
    link.delay(0.15)
    with connect(link) as connection:
        begun = time.monotonic()
        assert ask(connection)[0] == 200
        assert time.monotonic() - begun >= 0.3


def test_a_link_that_drops_replies_lets_requests_arrive(link, web):
    with connect(link, 0.2) as silent, connect(link) as resetting:
        link.drop_replies()
        with pytest.raises(OSError, match="timed out"):
            ask(silent, b"1")
        wait_for(lambda: link.has_lost)
        link.drop_replies(reset=True)
        with pytest.raises(ConnectionResetError):
            ask(resetting, b"2")
        assert [body for _, _, body in web.requests] == [b"1", b"2"]
        link.heal()
        silent.sock.settimeout(20)
        with pytest.raises(OSError, match="reset"):     # it has lost an answer
            silent.sock.recv(1)


def test_a_link_shifts_the_date_of_answers(link):
    link.shift_date(-3600)
    with connect(link) as connection:
        date = email.utils.parsedate_to_datetime(ask(connection)[2]).timestamp()
    assert -3660 < date - time.time() < -3590


def test_a_link_to_nobody_resets():
    with Link(1) as link, connect(link) as connection, pytest.raises(ConnectionResetError):
        ask(connection)
