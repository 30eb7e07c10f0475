"""What a microVM reaches: nothing, or what the egress proxy lets through.

Its guest has no network device: boxlite's own would leave the host's loopback open, and with
a root inside nothing in the guest could close it. A port of the guest's loopback is carried to
the proxy, which runs here, through the line of `inside.py`.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
from anyio.from_thread import BlockingPortalProvider

from ...concurrency import plain_errors
from ...egress.rules import Rules
from ...errors import ConnectionLost, ProtocolError, SandboxError, SandboxGone
from . import inside
from .operation import Operation

if TYPE_CHECKING:
    from ...egress.proxy import Proxy

PORT = 3128
_PIECE = 64 << 10
_PIECES = 4  # on their way to a program inside
_CONNECTIONS = 64
_DIGITS = 9  # of a connection's number
_READY_SECONDS = 60.0

_BROKEN = (anyio.WouldBlock, anyio.BrokenResourceError, anyio.ClosedResourceError)

#: Starts an operation of `inside.py`.
Begin = Callable[[dict[str, Any]], AbstractAsyncContextManager[Operation]]


def variables() -> dict[str, str]:
    """What programs inside read to find the proxy."""
    url = f"http://127.0.0.1:{PORT}"
    names = ("http_proxy", "https_proxy", "all_proxy")
    found = {n: url for name in names for n in (name, name.upper())}
    direct = "localhost,127.0.0.1,::1"
    return {**found, "no_proxy": direct, "NO_PROXY": direct}


class Gate:
    """The proxy of one microVM. It runs in a thread that all sandboxes of this process share."""

    def __init__(self, portals: BlockingPortalProvider) -> None:
        self._portals = portals
        self._cleanup = contextlib.ExitStack()
        self._proxy: Proxy | None = None

    async def open(self, begin: Begin, rules: Rules, directory: Path) -> None:
        """Listens inside.

        Args:
            begin: starts operations in the microVM, from any thread.
            directory: private, for a socket.
        """

        def start() -> Proxy:
            portal = self._cleanup.enter_context(self._portals)
            serving = portal.wrap_async_context_manager(_serving(begin, rules, directory))
            return self._cleanup.enter_context(serving)

        self._proxy = await anyio.to_thread.run_sync(start)

    def refusals(self) -> dict[str, str]:
        """{"host:port": why} of what the step asked for and did not get."""
        return dict(self._proxy.refusals) if self._proxy is not None else {}

    async def close(self) -> None:
        await anyio.to_thread.run_sync(self._cleanup.close)


@contextlib.asynccontextmanager
async def _serving(begin: Begin, rules: Rules, directory: Path) -> AsyncIterator[Proxy]:
    from ...egress.proxy import proxy

    path = str(directory / "proxy")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(_CONNECTIONS)
        async with proxy(listener, rules) as running, anyio.create_task_group() as tasks:
            ready = anyio.Event()
            tasks.start_soon(_listen, begin, path, ready)
            with anyio.fail_after(_READY_SECONDS):
                await ready.wait()
            yield running
            tasks.cancel_scope.cancel()


async def _listen(begin: Begin, path: str, ready: anyio.Event) -> None:
    """Has the guest listen, and brings each connection to the proxy, for as long as it lives."""
    places = anyio.Semaphore(_CONNECTIONS)

    async def one(number: int) -> None:
        try:
            with contextlib.suppress(SandboxError, OSError, *_BROKEN):
                await _carry(begin, path, number)
        finally:
            places.release()

    with contextlib.suppress(SandboxGone, ConnectionLost, ProtocolError), plain_errors():
        async with anyio.create_task_group() as tasks:
            async with begin({"op": "listen", "port": PORT}) as operation:
                while True:
                    kind, data = await operation.frame()
                    if kind != "c" or not data.isdigit() or len(data) > _DIGITS:
                        break  # it can't listen, or something else speaks in its place
                    if data == b"0":
                        ready.set()
                    else:
                        await places.acquire()  # else a guest could have us hold any number
                        tasks.start_soon(one, int(data))
                    await operation.taken()
            tasks.cancel_scope.cancel()


async def _carry(begin: Begin, path: str, number: int) -> None:
    """One connection: bytes both ways until both ends have said all."""
    with plain_errors():
        async with (
            await anyio.connect_unix(path) as upstream,
            begin({"op": "connect", "port": PORT, "number": number}) as operation,
        ):
            room = anyio.Semaphore(_PIECES)
            # No more than the window comes; what breaks that ends its own connection.
            said, heard = anyio.create_memory_object_stream[bytes](inside.WINDOW + 1)

            async def down() -> None:
                while True:
                    await room.acquire()
                    try:
                        data = await upstream.receive(_PIECE)
                    except anyio.EndOfStream:
                        break
                    await operation.send(b"d" + len(data).to_bytes(4, "big") + data)
                await operation.send(b"f")

            async def up() -> None:
                async for data in heard:
                    await upstream.send(data)
                    await operation.taken()
                await upstream.send_eof()

            with said, heard:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(down)
                    tasks.start_soon(up)
                    while True:
                        # Never held up by either end: what frees the other comes here too.
                        kind, data = await operation.frame()
                        if kind == "d":
                            said.send_nowait(data)
                        elif kind == "f":
                            said.close()
                        elif kind == "k" and room.value < _PIECES:
                            room.release()
                        else:
                            break
                    tasks.cancel_scope.cancel()
