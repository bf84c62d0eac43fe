"""A wire that a test can cut, hold, slow down and falsify: a TCP proxy on loopback."""
import collections
import contextlib
import email.utils
import queue
import re
import select
import socket
import struct
import threading
import time

_MOST_KEPT = 1 << 18            # bytes on their way in one direction; then its source has to wait
_DATE = re.compile(rb"(?<=\nDate: )[^\r\n]+", re.I)


class Link:
    """Passes connections to its `port` on to a port of this host; `target_port` may be changed.

    Each method has taken effect when it returns, and they add up, until `heal()`. A connection is
    taken before the target is asked: one to a target that is not there is reset. `connections`
    counts those that were taken.
    """

    def __init__(self, target_port):
        self.target_port, self.connections = target_port, 0
        self._calls, self._pipes = queue.SimpleQueue(), []
        self._woken, self._waker = socket.socketpair()
        self._holder = _bound(0)        # keeps the port while nothing listens
        self.port = self._holder.getsockname()[1]
        self._listener = None
        self._set_healthy()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def cut(self):
        """Reset all connections, refuse new ones."""
        self._ask(self._cut)

    def hold(self):
        """Take connections, and pass nothing in either direction; what comes meanwhile is passed
        on when it is healed."""
        self._ask(lambda: setattr(self, "_held", True))

    def delay(self, seconds):
        """Pass what comes from now on so much later, in each direction."""
        self._ask(lambda: setattr(self, "_delay", seconds))

    def drop_replies(self, reset=False):
        """Pass requests on, but nothing that is answered; with `reset` the client's connection is
        reset by an answer."""
        self._ask(lambda: setattr(self, "_drops", "reset" if reset else "silently"))

    def shift_date(self, seconds):
        """Add so many whole seconds to the header Date of answers, in plain HTTP."""
        self._ask(lambda: setattr(self, "_shift", seconds))

    @property
    def has_lost(self):
        """Whether a connection that is open has lost something."""
        return any(pipe.has_lost for pipe in list(self._pipes))

    def heal(self):
        """As in the beginning; connections that have lost something are reset."""
        self._ask(self._set_healthy)

    def close(self):
        self._ask(lambda: setattr(self, "_closed", True))
        self._thread.join()
        for each in (self._holder, self._woken, self._waker):
            each.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    # All of this is done by the thread, but for the first call of `_set_healthy`.

    def _ask(self, call):
        done = threading.Event()
        self._calls.put((call, done))
        self._waker.send(b"x")
        assert done.wait(20), "the link is stuck"

    def _set_healthy(self):
        self._held, self._delay, self._drops, self._shift, self._closed = False, 0, None, 0, False
        for pipe in [pipe for pipe in self._pipes if pipe.has_lost]:
            self._reset(pipe)
        if self._listener is None:
            self._listener = _bound(self.port)
            self._listener.listen(128)

    def _cut(self):
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        while self._pipes:
            self._reset(self._pipes[0])

    def _run(self):
        while not self._closed:
            now = time.monotonic()
            pipes = [] if self._held else self._pipes
            due = [pipe for pipe in pipes if pipe.waiting and pipe.waiting[0][0] <= now]
            later = [pipe.waiting[0][0] - now for pipe in pipes if pipe.waiting and pipe not in due]
            readers = [pipe.source for pipe in pipes if pipe.wants_more]
            writers = [pipe.sink for pipe in due]
            listeners = [self._listener] if self._listener else []
            readable, writable, _ = select.select([self._woken, *listeners, *readers], writers, [],
                                                  min(later, default=None))
            for pipe in pipes[:]:
                if pipe in self._pipes and pipe.source in readable:
                    self._guard(pipe, self._read)
                if pipe in self._pipes and pipe.sink in writable:
                    self._guard(pipe, self._write)
            if self._listener in readable:
                self._accept()
            if self._woken in readable:
                self._woken.recv(1)
                call, done = self._calls.get()
                call()
                done.set()
        self._cut()

    def _accept(self):
        client, _ = self._listener.accept()
        self.connections += 1
        server = socket.socket()
        server.settimeout(5)
        up, down = _Pipe(client, server), _Pipe(server, client, is_answer=True)
        up.other, down.other = down, up
        self._pipes += up, down
        try:
            server.connect(("127.0.0.1", self.target_port))
        except OSError:
            self._reset(up)
            return
        for each in (client, server):
            each.setblocking(False)
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _guard(self, pipe, work):
        try:
            work(pipe)
        except BlockingIOError:
            return
        except OSError:
            self._reset(pipe)

    def _read(self, pipe):
        data = pipe.source.recv(1 << 16)
        pipe.at_end = not data
        if pipe.is_answer and self._drops:
            pipe.has_lost = True
            if self._drops == "reset":
                self._reset(pipe)
            return
        if pipe.is_answer and self._shift:
            data = _DATE.sub(self._shifted, data)
        pipe.waiting.append((time.monotonic() + self._delay, data))

    def _shifted(self, found):
        instant = email.utils.parsedate_to_datetime(found[0].decode()).timestamp()
        return email.utils.formatdate(instant + self._shift, usegmt=True).encode()

    def _write(self, pipe):
        due, data = pipe.waiting.popleft()
        if data:
            rest = data[pipe.sink.send(data):]
            if rest:
                pipe.waiting.appendleft((due, rest))
        else:
            pipe.sink.shutdown(socket.SHUT_WR)
            pipe.has_ended = True
            if pipe.other.has_ended:
                self._close(pipe)

    def _close(self, pipe):
        for each in (pipe, pipe.other):
            self._pipes.remove(each)
            each.source.close()

    def _reset(self, pipe):
        for each in (pipe.source, pipe.sink):
            with contextlib.suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._close(pipe)


class _Pipe:
    """One direction of a connection: `waiting` are (instant, bytes), with b"" for the end."""

    def __init__(self, source, sink, is_answer=False):
        self.source, self.sink, self.is_answer = source, sink, is_answer
        self.waiting, self.other = collections.deque(), None
        self.at_end = self.has_ended = self.has_lost = False

    @property
    def wants_more(self):
        return not self.at_end and sum(len(data) for _, data in self.waiting) < _MOST_KEPT


def _bound(port):
    """A socket that has a port, also where another has it; nothing listens yet."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.bind(("127.0.0.1", port))
    return made
