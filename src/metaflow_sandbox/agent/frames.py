"""Reads the agent's frames on the host. The format is described in `agent.py`.

Everything here comes from inside the sandbox, so sizes are bounded and nothing
is believed: a wrong line is an error, never skipped in the hope of a better one.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import ProtocolError

#: Bytes of the longest line: an exit frame with inlined results, in base64 twice.
MAX_LINE = 4 << 20
#: Bytes of frames that may come again after a connection was lost: four times what an agent keeps.
MAX_REPEATED = 64 << 20
_NUMBER = re.compile(rb"[1-9a-f][0-9a-f]{0,15}\Z")


@dataclass(frozen=True)
class Frame:
    """One frame. `kind` is "o" or "e" (bytes of the step's output) or "x" (the end: JSON)."""

    seq: int
    kind: str
    payload: bytes


class FrameDecoder:
    """Turns bytes, split anywhere, into frames in order, each exactly once.

    Frames that were already seen are passed over, so a stream may be resumed
    from any earlier point; on a stream that is not resumable they are an error.
    `seq` is the last frame that was handed out.
    """

    def __init__(self, resumable: bool = True) -> None:
        self.seq = 0
        self._resumable = resumable
        self._buffer = bytearray()
        self._searched = 0  # bytes of it that hold no end of a line
        self._repeated = 0

    def reconnect(self) -> None:
        """Forgets a line that a dropped connection cut short; it will come again."""
        self._buffer.clear()
        self._searched = self._repeated = 0

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yields the frames that `data` completes.

        Raises:
            ProtocolError: a line that is no frame, a gap, a line beyond `MAX_LINE`, or
                more frames again than there can be.
        """
        self._buffer += data
        start = 0
        while (end := self._buffer.find(b"\n", max(start, self._searched))) >= 0:
            line = bytes(self._buffer[start:end])
            start = end + 1
            if (frame := self._parse(line)) is not None:
                yield frame
        del self._buffer[:start]
        self._searched = len(self._buffer)
        if len(self._buffer) > MAX_LINE:
            raise ProtocolError("a frame is longer than any that the agent sends", op="stream")

    def _parse(self, line: bytes) -> Frame | None:
        if len(line) > MAX_LINE:
            raise ProtocolError("a frame is longer than any that the agent sends", op="stream")
        parts = line.split(b" ")
        try:
            magic, seq_text, kind, payload_text, crc = parts
            seq = int(seq_text, 16)
            payload = base64.b64decode(payload_text, validate=True)
            checked = binascii.crc32(line[: -len(crc) - 1]) == int(crc, 16)
        except ValueError:
            raise ProtocolError(f"not a frame: {line[:80]!r}", op="stream") from None
        known = magic == b"mfs1" and kind in (b"o", b"e", b"x") and _NUMBER.match(seq_text)
        if not known or not checked:
            raise ProtocolError(f"not a frame: {line[:80]!r}", op="stream")
        if seq <= self.seq and self._resumable:
            self._repeated += len(line)
            if self._repeated > MAX_REPEATED:
                raise ProtocolError("frames come again and again", op="stream")
            return None
        if seq != self.seq + 1:
            raise ProtocolError(f"frame {seq} comes after frame {self.seq}", op="stream")
        self.seq = seq
        return Frame(seq, kind.decode(), payload)
