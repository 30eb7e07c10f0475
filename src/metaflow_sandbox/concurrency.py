"""The little that anyio leaves to its users."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import anyio

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

T = TypeVar("T")

# A pipe that is reported as writable takes this much without blocking.
_PIECE = 4096


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Raises what went wrong in a task group by itself: the first error, not a group of one.

    For groups whose tasks work on one thing, so that the first failure is the reason.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


async def blocking(function: Callable[[], T]) -> T:
    """Runs something that blocks in a thread; it is waited for even when cancelled."""
    return await anyio.to_thread.run_sync(function)


async def write_all(fd: int, data: bytes) -> None:
    """Writes to a pipe, terminal or file without blocking the event loop on a slow reader."""
    for start in range(0, len(data), _PIECE):
        with contextlib.suppress(PermissionError, OSError):  # a regular file can't be waited for
            await anyio.wait_writable(fd)
        os.write(fd, data[start : start + _PIECE])
