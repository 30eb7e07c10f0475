"""Has what a sandbox left for Metaflow's scheduler read, for all attempts of a process.

Each request is read by a process of its own, with limits of its own (`reader.py`), that
a warm process forks (`zygote.py`): a bare interpreter takes 30 ms of CPU to start, a fork
a few. What takes too long or too much ends its own reader, and nothing else.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import anyio
import anyio.abc

from ..errors import Rejected
from . import zygote
from .reader import SECONDS

#: Readers at once: each may take `reader.MEMORY`.
AT_ONCE = min(max(os.cpu_count() or 1, 2), 8)
#: Bytes of an answer; the reader's own bounds keep to less.
_ANSWER = 128 << 20
_PIECE = 1 << 16
_WALL_SECONDS = SECONDS * 3.0
_PACKAGES = str(Path(__file__).parents[2])


class Readers:
    """Starts the zygote with the first request. `aclose` ends it, and all readers."""

    def __init__(self) -> None:
        self._places = anyio.CapacityLimiter(AT_ONCE)
        self._starting = anyio.Lock()
        self._process: anyio.abc.Process | None = None
        self._control: socket.socket | None = None

    async def read(self, items: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """The reader's answer; see `reader.py`.

        Raises:
            Rejected: it took too long, or too much memory.
        """
        request = json.dumps({"items": items}).encode()
        async with self._places:
            answer = b""
            # A broken pipe: it ended before it had read all.
            with (
                contextlib.suppress(TimeoutError, BrokenPipeError),
                anyio.fail_after(_WALL_SECONDS),
            ):
                answer = await self._ask(request)
        if not answer.endswith(zygote.END):
            raise Rejected(
                "what the step left for Metaflow's scheduler takes too long or too much to read"
            )
        found: dict[str, dict[str, Any]] = json.loads(answer)
        return found

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
        with contextlib.ExitStack() as opened:
            its_request, out = _pipe(opened)
            into, its_answer = _pipe(opened)
            os.set_blocking(out.fileno(), False)
            os.set_blocking(into.fileno(), False)
            await self._hand_over([its_request.fileno(), its_answer.fileno()])
            its_request.close()
            its_answer.close()
            left = memoryview(request)
            while left:
                await anyio.wait_writable(out)
                left = left[out.write(left) or 0 :]
            out.close()
            answer = bytearray()
            while len(answer) <= _ANSWER:
                await anyio.wait_readable(into)
                if not (piece := into.read(_PIECE)):
                    break
                answer += piece
            return bytes(answer)

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
