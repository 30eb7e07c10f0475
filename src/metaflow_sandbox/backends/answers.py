"""How much is read of what is answered from inside a sandbox.

A step may become root there and answer in the place of its provider's daemon. Answers are small,
but for a file's content and a command's output, which stream: no more is held of one than a real
one has.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

ANSWER = 1 << 16
MESSAGE = 1 << 20  # of a command's output


async def beginning(pieces: AsyncIterator[Any], most: int = ANSWER) -> AsyncIterator[bytes]:
    """The first `most` bytes of an answer. What comes after them is not read."""
    left = most
    async for piece in pieces:
        yield bytes(piece[:left])
        left -= len(piece)
        if left <= 0:
            return


async def held(pieces: AsyncIterator[Any], most: int = ANSWER) -> bytes:
    """The same, in one."""
    data = bytearray()
    async for piece in beginning(pieces, most):
        data += piece
    return bytes(data)
