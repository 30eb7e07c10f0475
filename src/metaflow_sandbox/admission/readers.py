"""Has what sandboxes left read, for all attempts of a process.

Each request is read by a process of its own, with limits of its own (`reader.py`), that
a warm process forks (`zygote.py`): a bare interpreter takes 30 ms of CPU to start, a fork
a few. What takes too long or too much ends its own reader, and nothing else.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import anyio
import anyio.abc

from ..errors import Rejected
from . import zygote
from .blobs import sent, whole
from .reader import SECONDS

#: Readers at once: each may take `reader.MEMORY`.
AT_ONCE = min(max(os.cpu_count() or 1, 2), 8)
#: Bytes of an answer; the reader's own bounds keep to less.
_ANSWER = 128 << 20
_PIECE = 1 << 16
_WALL_SECONDS = SECONDS * 3.0
_BYTES_A_SECOND = 24  # a power of two: what a slow machine unpacks
_QUIET_MS = 60_000
_PACKAGES = str(Path(__file__).parents[2])


class Readers:
    """Starts the zygote with the first request. `aclose` ends it, and all readers."""

    def __init__(self) -> None:
        self._places = anyio.CapacityLimiter(AT_ONCE)
        self._starting = anyio.Lock()
        self._process: anyio.abc.Process | None = None
        self._control: socket.socket | None = None

    async def read(self, items: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """The values that Metaflow's scheduler acts on; see `reader.py`.

        Raises:
            Rejected: it took too long, or too much memory.
        """
        what = "what the step left for Metaflow's scheduler"
        found: dict[str, dict[str, Any]] = await self._json({"items": items}, what)
        return found

    async def claims(self, record: Path) -> dict[str, Any]:
        """What the step says that it recorded; see `claims.py`.

        Raises:
            Rejected: it isn't what Metaflow writes, or took too long, or too much memory.
        """
        what = "the record of the artifacts"
        answer: dict[str, Any] = await self._json({"record": str(record)}, what)
        if "refused" in answer:
            raise Rejected(answer["refused"])
        return answer

    @contextlib.asynccontextmanager
    async def contents(
        self, items: Sequence[dict[str, Any]], limit: int
    ) -> AsyncIterator[Iterator[tuple[str, bytes]]]:
        """(key, content) of blobs, in order and held against their keys, for a thread.

        Each is unpacked as it is asked for. Not counted in `AT_ONCE`: these readers take
        little memory, and wait for the datastore.

        Args:
            limit: bytes that each may have.

        Raises (on iteration):
            Rejected: one is larger, or something else.
        """
        seconds = SECONDS + (min(len(items), 8) * limit >> _BYTES_A_SECOND)
        request = json.dumps({"blobs": items, "limit": limit, "seconds": seconds}).encode()
        with contextlib.ExitStack() as opened:
            into = opened.enter_context(await self._send(request)) if items else None
            yield _contents(into, [item["sha"] for item in items], limit)

    async def _json(self, request: dict[str, Any], what: str) -> Any:
        async with self._places:
            answer = b""
            # A broken pipe: it ended before it had read all.
            with (
                contextlib.suppress(TimeoutError, BrokenPipeError),
                anyio.fail_after(_WALL_SECONDS),
            ):
                answer = await self._ask(json.dumps(request).encode())
        if not answer.endswith(zygote.END):
            raise Rejected(f"{what} takes too long or too much to read")
        return json.loads(answer)

    async def aclose(self) -> None:
        """Ends the zygote, which kills the readers that there are."""
        process, self._process = self._process, None
        if self._control is not None:
            self._control.close()
            self._control = None
        if process is not None:
            with anyio.CancelScope(shield=True):
                await process.wait()

    async def _ask(self, request: bytes) -> bytes:
        """What a reader answered. If this is cancelled, the reader is killed."""
        with await self._send(request) as into:
            os.set_blocking(into.fileno(), False)
            answer = bytearray()
            while len(answer) <= _ANSWER:
                await anyio.wait_readable(into)
                if not (piece := into.read(_PIECE)):
                    break
                answer += piece
            return bytes(answer)

    async def _send(self, request: bytes) -> io.FileIO:
        """Starts a reader. The pipe with its answer: when that is closed, it is killed."""
        with contextlib.ExitStack() as opened:
            its_request, out = _pipe(opened)
            into, its_answer = _pipe(opened)
            os.set_blocking(out.fileno(), False)
            await self._hand_over([its_request.fileno(), its_answer.fileno()])
            its_request.close()
            its_answer.close()
            left = memoryview(request)
            while left:
                await anyio.wait_writable(out)
                left = left[out.write(left) or 0 :]
            out.close()
            opened.pop_all()
            return into

    async def _hand_over(self, fds: list[int]) -> None:
        """Gives a request's pipes to the zygote, which is started if there is none."""
        async with self._starting:
            for _ in range(2):
                control = self._control or await self._start()
                try:
                    await anyio.wait_writable(control)
                    socket.send_fds(control, [b"."], fds)
                except OSError:  # somebody ended it: another is started
                    await self.aclose()
                else:
                    return

    async def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._control = ours
        with theirs, anyio.CancelScope(shield=True):
            self._process = await anyio.open_process(
                [sys.executable, "-I", "-S", "-c", zygote.PROGRAM, _PACKAGES],
                stdin=theirs.fileno(),
                stdout=DEVNULL,
                stderr=DEVNULL,
            )
        return ours


def _pipe(opened: contextlib.ExitStack) -> tuple[io.FileIO, io.FileIO]:
    """A pipe's end to read from and its end to write to, both closed with `opened`."""
    read, write = os.pipe()
    return (
        opened.enter_context(io.FileIO(read, "r")),
        opened.enter_context(io.FileIO(write, "w")),
    )


def _contents(
    into: io.FileIO | None, keys: Sequence[str], limit: int
) -> Iterator[tuple[str, bytes]]:
    if into is None:
        return
    patience = select.poll()
    patience.register(into, select.POLLIN)

    def exactly(size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = into.read(size - len(data)) if patience.poll(_QUIET_MS) else b""
            if not piece:
                raise Rejected("a blob takes too long or too much to unpack")
            data += piece
        return bytes(data)

    for sha in keys:
        yield sha, whole(sent(exactly, limit), sha)
