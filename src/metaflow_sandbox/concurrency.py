"""The little that anyio leaves to its users."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.lowlevel

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

T = TypeVar("T")

# A pipe that is reported as writable takes this much without blocking.
_PIECE = 4096
_AGAIN_SECONDS = 0.2
_TERMS = 25  # then it is killed


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


async def interruptible(function: Callable[[], T]) -> T:
    """Runs something that blocks on programs in a thread; when cancelled, ends these programs.

    It is waited for even then, so that it can tidy up. Only Linux tells whose programs they
    are; elsewhere they are waited for.
    """
    thread = 0
    ended = anyio.Event()

    def run() -> T:
        nonlocal thread
        thread = threading.get_native_id()
        return function()

    async def end_programs() -> None:
        try:
            await ended.wait()
        except anyio.get_cancelled_exc_class():
            count = 0
            with anyio.CancelScope(shield=True):
                while not ended.is_set():
                    for pid in _programs(thread):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGTERM if count < _TERMS else signal.SIGKILL)
                    count += 1
                    with anyio.move_on_after(_AGAIN_SECONDS):
                        await ended.wait()
            raise

    with plain_errors():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(end_programs)
            try:
                result = await anyio.to_thread.run_sync(run)
            except Exception:
                await anyio.lowlevel.checkpoint_if_cancelled()  # then it failed because of that
                raise
            finally:
                ended.set()
    return result


def _programs(thread: int) -> Iterator[int]:
    """The processes that a thread of this process has started, and those that they have."""
    threads = [Path(f"/proc/self/task/{thread}")]
    for path in threads:
        with contextlib.suppress(OSError):  # it has ended, or there is no /proc
            for pid in (path / "children").read_text().split():
                yield int(pid)
                threads += Path(f"/proc/{pid}/task").iterdir()


async def write_all(fd: int, data: bytes) -> None:
    """Writes to a pipe, terminal or file without blocking the event loop on a slow reader."""
    for start in range(0, len(data), _PIECE):
        with contextlib.suppress(PermissionError, OSError):  # a regular file can't be waited for
            await anyio.wait_writable(fd)
        os.write(fd, data[start : start + _PIECE])
