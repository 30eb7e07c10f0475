"""Connected sockets, and the tunnel between two of them."""

from __future__ import annotations

import os
import socket
import struct

import anyio
import anyio.lowlevel

PIECE = 64 << 10


class Stream:
    """A connected socket, which it owns.

    Not `anyio.abc.SocketStream`: made from an accepted socket, that reads on by itself, without
    bound, while nobody receives, so that a sandbox could fill the host's memory.

    All methods raise OSError when the connection broke.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._unread = b""
        self._patience = float("inf")
        self._waiting = anyio.CancelScope()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()

    async def receive(self) -> bytes:
        """What came, up to `PIECE` bytes; empty at the end.

        Raises:
            TimeoutError: nothing came for as long as `hurry` said.
        """
        if self._unread:
            data, self._unread = self._unread, b""
            return data
        while True:
            with anyio.fail_after(self._patience) as self._waiting:
                await anyio.wait_readable(self._socket)
            try:
                return self._socket.recv(PIECE)
            except BlockingIOError:
                continue

    def unread(self, data: bytes) -> None:
        """Gives back what was received, for the next `receive`."""
        self._unread = data

    async def send(self, data: bytes) -> None:
        await anyio.lowlevel.checkpoint()  # many small pieces must not stop everything else
        view = memoryview(data)
        while view:
            try:
                view = view[self._socket.send(view) :]
            except BlockingIOError:
                await anyio.wait_writable(self._socket)

    def end(self) -> None:
        """Says that nothing more will be sent."""
        self._socket.shutdown(socket.SHUT_WR)

    def hurry(self, seconds: float) -> None:
        """From now on, also for who waits already, `receive` waits no longer than this."""
        self._patience = seconds
        self._waiting.deadline = anyio.current_time() + seconds

    def break_off(self) -> None:
        """Makes closing look like the fault it is, not like the end of what was sent."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def accept(listener: socket.socket) -> Stream:
    """The next connection. Waits while none can be made, because descriptors have run out."""
    while True:
        await anyio.wait_readable(listener)
        try:
            return Stream(listener.accept()[0])
        except BlockingIOError:
            continue
        except OSError:
            await anyio.sleep(0.1)


async def connect(address: str, port: int) -> Stream:
    """Connects to an IP address, which is looked up nowhere.

    Raises:
        OSError: it can't be reached.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        stream = Stream(sock)
        try:
            sock.connect((address, port))
        except BlockingIOError:
            await anyio.wait_writable(sock)
            if error := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(error, os.strerror(error)) from None
    except BaseException:
        sock.close()
        raise
    return stream


async def tunnel(one: Stream, other: Stream, *, patience: float) -> None:
    """Carries bytes both ways until both have ended, or one broke.

    Args:
        patience: seconds for which one direction may be silent once the other has ended.
            Whoever closed a socket for good looks like one who only ended sending.
    """

    async def carry(source: Stream, sink: Stream) -> None:
        try:
            while data := await source.receive():
                await sink.send(data)
            sink.end()
            sink.hurry(patience)
        except OSError:
            one.break_off()
            other.break_off()
            tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(carry, one, other)
        tasks.start_soon(carry, other, one)
