"""Passes a step's output on to Metaflow's scheduler, line by line, made harmless.

Each line gets Metaflow's own mark of where and when it was printed, and the mark
that the scheduler is to store it. So lines are shown live and stored once, by
any datastore, and those that came before a crash of the launcher are kept.
"""

from __future__ import annotations

from metaflow.mflog import TASK_LOG_SOURCE
from metaflow.mflog.mflog import decorate, set_should_persist

from ..admission.text import escape
from ..concurrency import write_all

#: A longer line is passed on in pieces.
LINE_BYTES = 64 << 10
#: What Metaflow's mark adds to a line.
MARK_BYTES = 80


class Budget:
    """How much output an attempt may still print, on both streams together."""

    def __init__(self, limit: int) -> None:
        self.left = limit
        self.dropped = 0


class LogRelay:
    """Gathers a stream of output into lines and writes them to `fd`."""

    def __init__(self, fd: int, budget: Budget) -> None:
        self._fd = fd
        self.budget = budget
        self._line = bytearray()

    async def feed(self, data: bytes) -> None:
        """Takes the next bytes of the stream."""
        budget = self.budget
        kept = data[: max(budget.left, 0)]
        budget.dropped += len(data) - len(kept)
        self._line += kept
        lines = []
        while (end := self._line.find(b"\n")) >= 0 or len(self._line) > LINE_BYTES:
            end = end if 0 <= end <= LINE_BYTES else LINE_BYTES
            lines.append(bytes(self._line[:end]))
            del self._line[: end + (self._line[end : end + 1] == b"\n")]
        # A line costs the scheduler as much as its mark does, however short it is.
        budget.left -= len(kept) + MARK_BYTES * len(lines)
        await self._emit(lines)

    async def close(self) -> None:
        """Passes on a last line that has no end."""
        if self._line:
            await self._emit([bytes(self._line)])
            self._line.clear()

    async def _emit(self, lines: list[bytes]) -> None:
        if lines:
            marked = (set_should_persist(decorate(TASK_LOG_SOURCE, escape(x))) for x in lines)
            await write_all(self._fd, b"".join(line + b"\n" for line in marked))
