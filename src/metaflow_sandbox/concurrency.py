"""The little that anyio leaves to its users."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import anyio

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

T = TypeVar("T")


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
