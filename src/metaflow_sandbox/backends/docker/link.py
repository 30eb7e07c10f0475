"""The host's end of the connection to a container's first process; `box.py` is the other.

It runs in the thread that all sandboxes of this process share. Between it and an operation are
pipes, so that each waits for the other where the kernel can see it, and threads share nothing
else. What comes from a container is bounded before it is kept: a stream that sends more than
its credit ends the connection, as does a frame that is none.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import anyio
import anyio.abc
import anyio.lowlevel

from ...egress.rules import Rules
from ...errors import ProtocolError

if TYPE_CHECKING:
    from ...egress.proxy import Proxy

_HEADER = struct.Struct("!cII")
_NUMBER = struct.Struct("!I")
#: What comes first, before anything is asked.
READY = _HEADER.pack(b"r", 0, 0)
_WINDOW = 256 << 10  # as in box.py
_PIECE = 32 << 10
_BEAT_SECONDS = 10.0
_CONNECTIONS = 128
_CONNECTION = 1 << 31


class _Stream:
    """What comes on one channel, in pieces that together are no more than the credit given."""

    def __init__(self) -> None:
        self._send, self._receive = anyio.create_memory_object_stream[bytes](_WINDOW)
        self._granted = _WINDOW

    def put(self, data: bytes) -> None:
        self._granted -= len(data)
        if self._granted < 0 or not data:
            raise ProtocolError("a container sends more than it may", op="exec")
        with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            self._send.send_nowait(data)

    def grant(self, number: int) -> None:
        self._granted += number

    def end(self) -> None:
        self._send.close()

    async def pieces(self) -> AsyncIterator[bytes]:
        with self._receive:
            async for data in self._receive:
                yield data


class _Channel:
    """An operation, or a connection to the proxy."""

    def __init__(self, *kinds: bytes) -> None:
        self.streams = {kind: _Stream() for kind in kinds}
        self.credit = _WINDOW  # bytes of input that may be sent
        self.credited = anyio.Event()
        self.ended = anyio.Event()
        self.result: int | None = None

    def end(self) -> None:
        for stream in self.streams.values():
            stream.end()
        self.ended.set()


class Link:
    """The connection to one container. `run` carries it; `attend` is called for each operation.

    Args:
        into, out: descriptors of the client program that is attached to the container. They
            are closed here.
        rules: what the container may reach; None: nothing.
        learn: called when the connection has closed, before anybody is told.
    """

    def __init__(
        self, into: int, out: int, rules: Rules | None, learn: Callable[[], Awaitable[None]]
    ) -> None:
        self._into, self._out = into, out
        self._learn = learn
        self._rules = rules
        self._proxy: Proxy | None = None
        self._sending = anyio.Lock()
        self._channels: dict[int, _Channel] = {}
        self._numbers = itertools.count(1)
        self._tasks: anyio.abc.TaskGroup | None = None
        self._over = False
        #: How many processes the kernel ended for want of memory, as far as it is known.
        self.memory_kills = 0

    def refusals(self) -> dict[str, str]:
        """{"host:port": why} of what the step asked for and did not get."""
        return dict(self._proxy.refusals) if self._proxy is not None else {}

    # --- the connection

    async def run(self) -> None:
        """Carries everything until the connection closes."""
        try:
            async with contextlib.AsyncExitStack() as stack:
                if self._rules is not None:
                    from ...egress.proxy import proxy

                    self._proxy = await stack.enter_async_context(proxy(None, self._rules))
                self._tasks = await stack.enter_async_context(anyio.create_task_group())
                self._tasks.start_soon(self._beat)
                with contextlib.suppress(ProtocolError, OSError):
                    await self._receive()
                await self.hang_up()
                await self._learn()
                self._finish()
                self._tasks.cancel_scope.cancel()
        finally:
            self._finish()
            await self.hang_up()
            os.close(self._out)

    async def _beat(self) -> None:
        """Lets the container know that this is still here."""
        while True:
            await anyio.sleep(_BEAT_SECONDS)
            await self._send(b"h", 0)

    def _finish(self) -> None:
        self._over = True
        for channel in self._channels.values():
            channel.end()

    async def hang_up(self) -> None:
        """Closes the connection, by which the container ends."""
        into, self._into = self._into, -1
        if into >= 0:
            anyio.notify_closing(into)
            os.close(into)

    async def _receive(self) -> None:
        data = bytearray()
        while piece := await _read(self._out, _WINDOW):
            data += piece
            while len(data) >= _HEADER.size:
                kind, number, length = _HEADER.unpack_from(data)
                if length > _WINDOW:
                    raise ProtocolError("a container sends what is no frame", op="exec")
                end = _HEADER.size + length
                if len(data) < end:
                    break
                payload = bytes(data[_HEADER.size : end])
                del data[:end]
                self._take(kind, number, payload)

    def _take(self, kind: bytes, number: int, payload: bytes) -> None:
        channel = self._channels.get(number)
        if kind == b"n":
            self._connect(number)
        elif channel is None:
            return  # it was given up here, and the container doesn't know yet
        elif kind in channel.streams:
            channel.streams[kind].put(payload)
        elif kind == b"c" and len(payload) == _NUMBER.size:
            channel.credit += _NUMBER.unpack(payload)[0]
            channel.credited.set()
        elif kind == b"f":
            for stream in channel.streams.values():
                stream.end()
        elif kind == b"k":
            channel.end()
        elif kind == b"x":
            try:
                end = json.loads(payload)
                channel.result = int(end["code"])
                self.memory_kills = max(self.memory_kills, int(end["memory"]))
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                raise ProtocolError("a container sends what is no result", op="exec") from None
            channel.end()

    async def _send(self, kind: bytes, number: int, payload: bytes = b"") -> None:
        async with self._sending:
            if self._into < 0:
                return
            # What is sent in part would make all that follows unreadable.
            lost = (OSError, anyio.ClosedResourceError)
            with anyio.CancelScope(shield=True), contextlib.suppress(*lost):
                await write(self._into, _HEADER.pack(kind, number, len(payload)) + payload)

    # --- operations

    async def attend(
        self, request: dict[str, Any], line: socket.socket, fds: Sequence[int]
    ) -> None:
        """Has an operation carried out, and says on the line what became of it.

        Args:
            line, fds: as `BoxedSandbox._send` has them; closed here.
        """
        with contextlib.ExitStack() as owned:
            owned.enter_context(line)
            line.setblocking(False)
            for fd in fds:
                os.set_blocking(fd, False)
            for fd in fds:
                owned.callback(os.close, fd)
            if self._over:
                return
            number = next(self._numbers)
            kinds = (b"o", b"e")[: len(fds)] if request["op"] != "write" else ()
            channel = self._channels[number] = _Channel(*kinds)
            try:
                await self._send(b"q", number, json.dumps(request).encode())
                async with anyio.create_task_group() as tasks:
                    carrying = anyio.CancelScope()
                    tasks.start_soon(self._watch, line, number, channel, carrying)
                    with carrying:
                        await self._carry(number, channel, fds)
                    await channel.ended.wait()
                    tasks.cancel_scope.cancel()
            finally:
                del self._channels[number]
            if channel.result is not None:
                with contextlib.suppress(OSError):
                    line.send(b"%d" % channel.result)

    async def _watch(
        self, line: socket.socket, number: int, channel: _Channel, carrying: anyio.CancelScope
    ) -> None:
        """Ends an operation when who asked for it hangs up."""
        await anyio.wait_readable(line)
        carrying.cancel()
        await self._send(b"k", number)
        if channel.streams == {}:  # an operation on a file, which can't be held up
            channel.end()

    async def _carry(self, number: int, channel: _Channel, fds: Sequence[int]) -> None:
        async with anyio.create_task_group() as tasks:
            if not channel.streams:

                async def feed() -> None:
                    await self._feed(number, channel, fds[0])

                tasks.start_soon(feed)
                await channel.ended.wait()
                tasks.cancel_scope.cancel()
            for kind, fd in zip(channel.streams, fds, strict=False):
                tasks.start_soon(self._drain, number, channel, kind, fd)

    async def _drain(self, number: int, channel: _Channel, kind: bytes, fd: int) -> None:
        """Writes what comes on a stream to a descriptor; nobody may read there any more."""
        wanted = True
        stream = channel.streams[kind]
        async for data in stream.pieces():
            if wanted:
                try:
                    await write(fd, data)
                except OSError:
                    wanted = False
            stream.grant(len(data))
            await self._send(b"c", number, kind + _NUMBER.pack(len(data)))

    async def _feed(self, number: int, channel: _Channel, fd: int) -> None:
        """Sends what is read from a descriptor, up to its end."""
        while True:
            while channel.credit <= 0:
                channel.credited = anyio.Event()
                await channel.credited.wait()
            try:
                data = await _read(fd, min(_PIECE, channel.credit))
            except OSError:
                data = b""
            if not data:
                await self._send(b"f", number)
                return
            channel.credit -= len(data)
            await self._send(b"i", number, data)

    # --- connections to the proxy

    def _connect(self, number: int) -> None:
        connections = sum(n >= _CONNECTION for n in self._channels)
        if (
            self._proxy is None
            or self._tasks is None
            or number < _CONNECTION
            or number in self._channels
            or connections >= _CONNECTIONS
        ):
            raise ProtocolError("a container connects where there is nothing", op="exec")
        channel = self._channels[number] = _Channel(b"o")
        self._tasks.start_soon(self._join, number, channel, self._proxy)

    async def _join(self, number: int, channel: _Channel, proxy: Proxy) -> None:
        near, far = socket.socketpair()
        near.setblocking(False)
        try:
            async with anyio.create_task_group() as tasks:
                carrying = anyio.CancelScope()

                async def carry() -> None:
                    with carrying:
                        async with anyio.create_task_group() as both:
                            both.start_soon(self._feed, number, channel, near.fileno())
                            await self._drain(number, channel, b"o", near.fileno())
                            with contextlib.suppress(OSError):
                                near.shutdown(socket.SHUT_WR)

                async def broken() -> None:
                    await channel.ended.wait()
                    carrying.cancel()

                tasks.start_soon(proxy.attend, far)
                tasks.start_soon(broken)
                await carry()
                tasks.cancel_scope.cancel()
        finally:
            near.close()
            far.close()
            del self._channels[number]
            with anyio.CancelScope(shield=True):
                await self._send(b"k", number)


async def _read(fd: int, size: int) -> bytes:
    """What a descriptor has, which doesn't block; empty at its end."""
    await anyio.lowlevel.checkpoint()  # what never ends must not stop everything else
    while True:
        try:
            return os.read(fd, size)
        except BlockingIOError:
            await anyio.wait_readable(fd)


async def write(fd: int, data: bytes) -> None:
    """Writes all of it to a descriptor that doesn't block."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            await anyio.wait_writable(fd)
