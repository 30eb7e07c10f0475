"""Runs in a container as its first process, and carries out what the host asks for.

    python3 -I -S -c BOOTSTRAP LENGTH        (engine.py has BOOTSTRAP, which reads this program)

Standard input and output are the one connection to the host. After the program comes a line
of JSON, the configuration; after that both ways carry frames:

    KIND (1 byte) CHANNEL (4 bytes) LENGTH (4 bytes) PAYLOAD

    from the host                          to the host
    q   an operation, as JSON              r    ready
    i   input: what a file is written      o e  output
        from, an answer to a connection    n    a program has connected to the proxy's port
    f   the end of input                   f    the end of what a connection sends
    k   ends an operation; a connection    k    a connection broke; the host will end it
        is over when the host says so
    c   credit: a kind, and 4 bytes        c    credit for input
    h   a heartbeat
                                           x    an operation's end: JSON

A stream carries no more than its credit, which the other end gives as it gets rid of data: so
nothing piles up anywhere, and a slow reader holds up nobody else. When the connection closes,
when nothing has come from the host for a while, or when its lifetime is over, this process
ends, and the kernel ends everything in the container. An engine that is killed leaves the
connection open: that is what the heartbeat is for.

The configuration:

    lifetime    seconds
    variables   for commands, over the image's own
    work        the directory that is there from the start
    filters     {machine: a filter of system calls, in base64}, put on everything here
    proxy       a port on the loopback device to listen at, or null

Standard library only, and `operations.py`, which comes along.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import platform
import select
import signal
import socket
import struct
import sys
import time
from functools import partial

from metaflow_sandbox.backends.operations import OPERATIONS, PR_SET_DUMPABLE, prctl, reap

TYPE_CHECKING = False  # as type checkers know it, without the milliseconds of importing `typing`
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

HEADER = struct.Struct("!sII")
NUMBER = struct.Struct("!I")
WINDOW = 256 << 10  # bytes that a stream may be ahead of who reads it
PIECE = 32 << 10
FULL = 1 << 20  # bytes for the host above which nothing more is read
SILENCE = 60.0  # seconds without a heartbeat after which there is no host any more
CONNECTIONS = 128
CONNECTION = 1 << 31  # the first channel of a connection
MAX_ALARM = (1 << 31) - 1
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2
COUNTERS = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")


def memory_kills() -> int:
    """How many processes of this container the kernel has ended for want of memory."""
    for path in COUNTERS:
        with contextlib.suppress(OSError, ValueError), open(path) as file:
            for line in file:
                name, _, number = line.partition(" ")
                if name == "oom_kill":
                    return int(number)
    return 0


class Program(ctypes.Structure):
    """`struct sock_fprog`: a filter for the kernel."""

    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def load_filter(code: bytes) -> None:
    """Puts a filter of system calls on this process and all that it starts, for good."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    program = Program(len(code) // 8, code)
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "the filter of system calls can't be loaded")


class Channel:
    """An operation, or a connection to the proxy.

    Attributes:
        outputs: {kind: descriptor} of what is still read from.
        credit: {kind: bytes} that may be sent to the host.
        input: a descriptor to write to, or -1.
        line: to the process that carries the operation out; None for a connection.
        result: what that process said in the end.
    """

    def __init__(
        self, outputs: dict[bytes, int], given: int, line: socket.socket | None = None
    ) -> None:
        self.outputs = outputs
        self.credit = dict.fromkeys(outputs, WINDOW)
        self.input = given
        self.waiting = bytearray()
        self.ended = False  # whether all input has come
        self.line = line
        self.result: int | None = None

    def close_input(self) -> None:
        if self.input >= 0:
            if self.line is None:
                with contextlib.suppress(OSError):
                    socket.socket(fileno=os.dup(self.input)).shutdown(socket.SHUT_WR)
            os.close(self.input)
            self.input = -1

    def close_outputs(self) -> None:
        for fd in self.outputs.values():
            os.close(fd)
        self.outputs = {}

    def close(self) -> None:
        self.close_input()
        self.close_outputs()
        if self.line is not None:
            self.line.close()


class Box:
    """Everything between the connection to the host and the operations."""

    def __init__(self, listener: socket.socket | None) -> None:
        self.listener = listener
        self.channels: dict[int, Channel] = {}
        self.received = bytearray()
        self.out = bytearray()
        self.next_connection = CONNECTION
        self.heard = time.monotonic()

    def send(self, kind: bytes, number: int = 0, payload: bytes = b"") -> None:
        self.out += HEADER.pack(kind, number, len(payload)) + payload

    def serve(self) -> None:
        """Attends to everything, one event after another, until the host hangs up."""
        self.send(b"r")
        while True:
            self.settle()
            todo = self.awaited()
            poll = select.poll()
            for fd, (events, _) in todo.items():
                poll.register(fd, events)
            for fd, _ in poll.poll(1000 * SILENCE):
                todo[fd][1]()
            if time.monotonic() - self.heard > SILENCE:
                os._exit(1)

    def awaited(self) -> dict[int, tuple[int, Callable[[], object]]]:
        """{descriptor: (what may happen to it, what to do then)} of all that is waited for."""
        todo: dict[int, tuple[int, Callable[[], object]]] = {0: (select.POLLIN, self.receive)}
        if self.out:
            todo[1] = (select.POLLOUT, self.flush)
        room = len(self.out) < FULL
        connections = 0
        for number, channel in self.channels.items():
            connections += number >= CONNECTION
            if channel.line is not None and channel.result is None:
                todo[channel.line.fileno()] = (select.POLLIN, partial(self.end, channel))
            if channel.waiting and channel.input >= 0:
                todo[channel.input] = (select.POLLOUT, partial(self.write, number, channel))
            for kind, fd in channel.outputs.items():
                if room and channel.credit[kind] > 0:
                    todo[fd] = (select.POLLIN, partial(self.read, number, channel, kind))
        if self.listener is not None and connections < CONNECTIONS and room:
            todo[self.listener.fileno()] = (select.POLLIN, self.accept)
        return todo

    def settle(self) -> None:
        """Reports the operations that are over and whose output has been sent."""
        for number, channel in list(self.channels.items()):
            if channel.ended and not channel.waiting:
                channel.close_input()
            if channel.result is not None:
                # A daemon may hold a pipe open: what was written is read, and no more.
                for kind in list(channel.outputs):
                    while channel.credit[kind] > 0 and self.read(number, channel, kind):
                        pass
                if not any(kind in channel.outputs for kind in (b"o", b"e")):
                    end = {"code": channel.result, "memory": memory_kills()}
                    self.send(b"x", number, json.dumps(end).encode())
                    self.drop(number)

    def drop(self, number: int) -> None:
        self.channels.pop(number).close()

    # --- what can happen

    def receive(self) -> None:
        data = os.read(0, WINDOW)
        if not data:
            os._exit(0)
        self.heard = time.monotonic()
        self.received += data
        while len(self.received) >= HEADER.size:
            kind, number, length = HEADER.unpack_from(self.received)
            end = HEADER.size + length
            if len(self.received) < end:
                return
            payload = bytes(self.received[HEADER.size : end])
            del self.received[:end]
            self.take(kind, number, payload)

    def take(self, kind: bytes, number: int, payload: bytes) -> None:
        if kind == b"q":
            self.begin(number, json.loads(payload))
            return
        channel = self.channels.get(number)
        if channel is None:
            return
        if kind == b"i":
            if channel.input >= 0:
                channel.waiting += payload
            else:  # nobody takes it; whoever writes learns why from the result
                self.send(b"c", number, NUMBER.pack(len(payload)))
        elif kind == b"f":
            channel.ended = True
        elif kind == b"c":
            channel.credit[payload[:1]] += NUMBER.unpack(payload[1:])[0]
        elif kind == b"k":
            if channel.line is None:
                self.drop(number)
                return
            channel.close_input()
            channel.close_outputs()
            channel.line.shutdown(socket.SHUT_WR)

    def flush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            del self.out[: os.write(1, memoryview(self.out)[:WINDOW].tobytes())]

    def accept(self) -> None:
        assert self.listener is not None  # noqa: S101 - for type checkers
        with contextlib.suppress(OSError):
            connection, _ = self.listener.accept()
            connection.setblocking(False)
            fd = connection.detach()
            number = self.next_connection
            self.next_connection = max(CONNECTION, (number + 1) & 0xFFFFFFFF)
            self.channels[number] = Channel({b"o": fd}, os.dup(fd))
            self.send(b"n", number)

    def end(self, channel: Channel) -> None:
        assert channel.line is not None  # noqa: S101 - for type checkers
        said = channel.line.recv(16)
        channel.result = int(said) if said.isdigit() else 255

    def read(self, number: int, channel: Channel, kind: bytes) -> bool:
        """Passes on a piece of output. False: there is none, now or any more."""
        if kind not in channel.outputs:  # closed by what happened just before
            return False
        fd = channel.outputs[kind]
        try:
            data = os.read(fd, min(PIECE, channel.credit[kind]))
        except BlockingIOError:
            if channel.result is not None:
                os.close(channel.outputs.pop(kind))
            return False
        except OSError:
            data = b""
        if data:
            channel.credit[kind] -= len(data)
            self.send(kind, number, data)
            return True
        os.close(channel.outputs.pop(kind))
        if channel.line is None:
            self.send(b"f", number)
        return False

    def write(self, number: int, channel: Channel) -> None:
        if channel.input < 0:
            return
        try:
            written = os.write(channel.input, memoryview(channel.waiting)[:PIECE].tobytes())
        except BlockingIOError:
            return
        except OSError:
            written = len(channel.waiting)
            channel.close_input()
            if channel.line is None:
                self.send(b"k", number)
                channel.close_outputs()
        del channel.waiting[:written]
        self.send(b"c", number, NUMBER.pack(written))

    # --- operations

    def begin(self, number: int, request: dict[str, Any]) -> None:
        """Has an operation carried out by a child."""
        line, far = socket.socketpair()
        ours: dict[bytes, int] = {}
        given = -1
        theirs = []
        if request["op"] == "write":
            end, given = os.pipe()
            os.set_blocking(given, False)
            theirs = [end]
        else:
            for kind in (b"o", b"e") if request["op"] == "exec" else (b"o",):
                ours[kind], end = os.pipe()
                os.set_blocking(ours[kind], False)
                theirs.append(end)
        channel = self.channels[number] = Channel(ours, given, line)
        try:
            pid = os.fork()
        except OSError as e:  # the step has used up its processes
            channel.result = e.errno or 255
            pid = -1
        if pid == 0:
            carry_out(request, far, theirs)
        far.close()
        for fd in theirs:
            os.close(fd)


def carry_out(request: dict[str, Any], line: socket.socket, fds: list[int]) -> None:
    """Runs an operation in this process, which is a child, and ends it."""
    code = 255
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.alarm(0)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        kept = {0, 1, 2, line.fileno(), *fds}
        for name in os.listdir("/proc/self/fd"):
            if int(name) not in kept:
                with contextlib.suppress(OSError):  # the one that listed them
                    os.close(int(name))
        # Where memory runs out, what was asked for ends first, not who can tell of it.
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("800")
        code = OPERATIONS[request["op"]](request, line, *fds)
    except OSError as e:
        code = e.errno or 255
    finally:
        with contextlib.suppress(OSError):
            line.send(b"%d" % code)
        os._exit(0)


def main() -> None:
    config = b""
    while not config.endswith(b"\n"):
        config += os.read(0, 1) or os._exit(0)
    settings = json.loads(config)
    # For the first process no signal has an effect unless it is handled.
    signal.signal(signal.SIGALRM, lambda *_: os._exit(1))
    signal.signal(signal.SIGCHLD, reap)
    signal.alarm(min(max(1, int(settings["lifetime"])), MAX_ALARM))
    prctl(PR_SET_DUMPABLE, 0)  # no process of the step can look into this one
    os.umask(0o022)
    # Some clients set these for every container; what they name can't be reached from here.
    for name in ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy"):
        os.environ.pop(name, None)
        os.environ.pop(name.upper(), None)
    os.environ.update(settings["variables"])
    os.makedirs(settings["work"], exist_ok=True)
    listener = None
    if settings["proxy"] is not None:
        listener = socket.create_server(("127.0.0.1", settings["proxy"]), backlog=CONNECTIONS)
        listener.setblocking(False)
    for fd in (0, 1):
        os.set_blocking(fd, False)
    # Where there is none for this machine, the engine's own is in force, as it is anyway.
    if code := settings["filters"].get(platform.machine()):
        load_filter(base64.b64decode(code))
    Box(listener).serve()


if __name__ == "__main__":
    try:
        main()
    except BaseException as e:  # the first process's end is the container's
        sys.stderr.write(f"{type(e).__name__}: {e}\n")
        os._exit(1)
