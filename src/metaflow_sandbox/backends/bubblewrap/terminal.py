"""The user's terminal, joined to one that a command in a sandbox has."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sys
import termios
import tty
from collections.abc import Iterator

import anyio

_PIECE = 1 << 16


@contextlib.contextmanager
def raw_mode(fd: int) -> Iterator[None]:
    """Keys go through as they are, Ctrl-C too; restored at the end."""
    before = termios.tcgetattr(fd)
    tty.setraw(fd)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def copy_size(source: int, target: int) -> None:
    """Makes one terminal as large as the other."""
    with contextlib.suppress(OSError):
        size = fcntl.ioctl(source, termios.TIOCGWINSZ, b"\0" * 8)
        fcntl.ioctl(target, termios.TIOCSWINSZ, size)


async def join(master: int) -> None:
    """Copies keys in and output out, until cancelled or the other side is closed."""
    os.set_blocking(master, False)

    async def keys() -> None:
        while True:
            await anyio.wait_readable(sys.stdin)
            if not (data := os.read(sys.stdin.fileno(), _PIECE)):
                return
            view = memoryview(data)
            while view:
                await anyio.wait_writable(master)
                view = view[os.write(master, view) :]

    async def sizes() -> None:
        with anyio.open_signal_receiver(signal.SIGWINCH) as changes:
            async for _ in changes:
                copy_size(sys.stdin.fileno(), master)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(keys)
        tasks.start_soon(sizes)
        while True:
            await anyio.wait_readable(master)
            try:
                data = os.read(master, _PIECE)
            except OSError:  # EIO: no process has the other side any more
                break
            if not data:
                break
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        tasks.cancel_scope.cancel()
