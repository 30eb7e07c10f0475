"""One run of `inside.py` in a microVM: the host's end of its line."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import anyio
import anyio.lowlevel

from ...concurrency import plain_errors
from ...errors import ProtocolError, SandboxGone
from .inside import PIECE
from .processes import settled

T = TypeVar("T")

#: Where the guest finds `inside.py`, in the volume with the inputs.
PROGRAM = ".inside.py"
_ACKNOWLEDGE = 8  # frames; a quarter of the program's window
_MAX_FRAME = 2 * PIECE
_END_SECONDS = 10.0


class Life:
    """The process that is a microVM, as the host sees it.

    Args:
        pid: of a process that is still there.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else -1

    async def over(self) -> None:
        """Returns when the microVM has ended."""
        if self._pidfd < 0:
            while _lives(self.pid):  # noqa: ASYNC110 - there is nothing to wait for
                await anyio.sleep(0.2)
            return
        own = os.dup(self._pidfd)  # only one task may wait for a descriptor
        try:
            await anyio.wait_readable(own)
        finally:
            os.close(own)

    def end(self) -> None:
        """Ends it at once. From any thread."""
        import signal

        with contextlib.suppress(ProcessLookupError):
            if self._pidfd >= 0:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            else:
                os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


async def unless_over(life: Life, call: Callable[[], Awaitable[T]]) -> T:
    """What a call to boxlite gives. It may not notice that its microVM has ended; this does.

    Raises:
        SandboxGone: the microVM ended first.
    """
    result: list[T] = []
    with plain_errors():
        async with anyio.create_task_group() as tasks:

            async def watch() -> None:
                await life.over()
                tasks.cancel_scope.cancel()

            tasks.start_soon(watch)
            with contextlib.suppress(StopAsyncIteration):
                result.append(await call())
            tasks.cancel_scope.cancel()
    await anyio.lowlevel.checkpoint_if_cancelled()
    if not result:
        raise SandboxGone("the microVM has ended", op="exec")
    return result[0]


class Operation:
    """A running operation. `frame` gives what it sends, `send` adds to its input.

    It sends no more than a window of what wasn't `taken`.
    """

    def __init__(self, life: Life, execution: Any) -> None:
        self._life = life
        self._execution = execution
        self._stdin = execution.stdin()
        self._stdout = execution.stdout()
        self._text = ""
        self._frames: list[tuple[str, bytes]] = []
        self._taken = 0
        self._sending = anyio.Lock()

    async def send(self, data: bytes) -> None:
        async with self._sending:
            await unless_over(self._life, lambda: self._stdin.send_input(data))

    async def taken(self) -> None:
        """Says that a frame of data is dealt with, so that another may come."""
        import boxlite

        self._taken += 1
        if self._taken >= _ACKNOWLEDGE:
            taken, self._taken = self._taken, 0
            # A program that has ended hears no more, and what it sent last is still to be read.
            with contextlib.suppress(boxlite.BoxliteError):
                await self.send(b"+" * taken)

    async def frame(self) -> tuple[str, bytes]:
        """The next frame: its letter and its data.

        Raises:
            SandboxGone: there is none, since the program or the microVM has ended.
            ProtocolError: it isn't one.
        """
        while not self._frames:
            text: str = await unless_over(self._life, self._stdout.__anext__)
            *whole, self._text = (self._text + text).split(";")
            if len(self._text) > _MAX_FRAME:
                raise ProtocolError("the microVM sends what is no frame", op="exec")
            self._frames = [_parsed(frame.strip()) for frame in whole]
        return self._frames.pop(0)

    async def end(self) -> None:
        """Has the program end everything it started, and waits for that."""
        with (
            anyio.CancelScope(shield=True),
            anyio.move_on_after(_END_SECONDS),
            contextlib.suppress(Exception),  # it has ended already, in whatever way
        ):
            await settled(self._stdin.close())
            await unless_over(self._life, self._execution.wait)


def _parsed(frame: str) -> tuple[str, bytes]:
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(base64.b64decode(frame[1:], validate=True), PIECE)
    except (binascii.Error, zlib.error, ValueError):
        raise ProtocolError("the microVM sends what is no frame", op="exec") from None
    if not unpacker.eof:
        raise ProtocolError("the microVM sends a frame that is too large", op="exec")
    return frame[:1], data


@contextlib.asynccontextmanager
async def operation(
    life: Life, box: Any, python: str, program: str, request: dict[str, Any]
) -> AsyncIterator[Operation]:
    """Starts an operation inside, and ends it with all that it started when the context ends."""
    execution = await unless_over(life, lambda: box.exec(python, ["-I", "-S", program]))
    running = Operation(life, execution)
    try:
        await running.send(json.dumps(request).encode() + b"\n")
        yield running
    finally:
        await running.end()
