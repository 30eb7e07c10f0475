"""Sandboxes whose first process does what the host asks for: `operations.py`, seen from the host.

The backend sends that process a request with the descriptors that the operation works on,
over a socket or over a connection of its own; `BoxedSandbox` builds a sandbox's methods on that.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from abc import abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel

from ..concurrency import plain_errors
from ..errors import SandboxGone
from . import operations
from .base import Sandbox, Sink, discard

_PIECE = 1 << 16
_END_SECONDS = 10.0


def bundle(main: Path) -> bytes:
    """A program for the inside, as one file: `main`, with the operations that it imports."""
    shared = Path(operations.__file__).read_text()
    return f"""import sys, types
module = sys.modules[{operations.__name__!r}] = types.ModuleType("operations")
exec(compile({shared!r}, "operations.py", "exec"), module.__dict__)
exec(compile({main.read_text()!r}, {main.name!r}, "exec"))
""".encode()


class BoxedSandbox(Sandbox):
    """A sandbox in which a first process of ours carries out operations."""

    @abstractmethod
    def _send(self, request: dict[str, Any], line: socket.socket, fds: Sequence[int]) -> None:
        """Has the first process begin an operation.

        Args:
            request: what `operations` takes.
            line: gets the result, in digits; the operation ends when its other end is closed
                or shut down. It is taken over, as are the descriptors, also when this raises.

        Raises:
            SandboxGone: there is no such process any more.
        """

    @contextlib.asynccontextmanager
    async def _operation(self, request: dict[str, Any], *fds: int) -> AsyncIterator[socket.socket]:
        """Begins an operation; gives the line to it."""
        # By messages, so that an empty answer is one, and the end of nothing.
        line, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        line.setblocking(False)
        try:
            self._send(request, far, fds)
            yield line
        finally:
            line.close()  # which ends the operation, if it still goes on

    async def _result(self, line: socket.socket, op: str) -> int:
        await anyio.wait_readable(line)
        # `recv`, so that descriptors that something inside sends along are dropped.
        answer = line.recv(16)
        if not answer.isdigit():
            raise SandboxGone(self.diagnose() or "the sandbox has ended", op=op)
        return int(answer) & 0xFF

    async def exec(
        self,
        argv: Sequence[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        on_stdout: Sink = discard,
        on_stderr: Sink = discard,
        timeout: float | None = None,
    ) -> int:
        out, out_inside = os.pipe()
        err, err_inside = os.pipe()
        cwd = cwd or self.backend.work
        request = {"op": "exec", "argv": list(argv), "cwd": cwd, "env": dict(env or {})}
        try:
            async with self._operation(request, out_inside, err_inside) as line:
                try:
                    with anyio.fail_after(timeout):
                        return await self._attend(line, (out, on_stdout), (err, on_stderr))
                except TimeoutError:
                    line.shutdown(socket.SHUT_WR)  # asks for the end of the tree
                    with anyio.CancelScope(shield=True), anyio.move_on_after(_END_SECONDS):
                        await anyio.wait_readable(line)
                    raise
        finally:
            os.close(out)
            os.close(err)

    async def _attend(self, line: socket.socket, *streams: tuple[int, Sink]) -> int:
        """Hands on output until the command has ended and its output is read."""
        waiting: dict[int, anyio.CancelScope] = {}
        ended = False

        async def pump(fd: int, sink: Sink) -> None:
            os.set_blocking(fd, False)
            while True:
                try:
                    data = os.read(fd, _PIECE)
                except BlockingIOError:
                    if ended:  # a daemon may hold the pipe open; what was written is read
                        return
                    with anyio.CancelScope() as waiting[fd]:
                        await anyio.wait_readable(fd)
                    continue
                if not data:
                    return
                await sink(data)
                # A sink that never waits, and a command that never stops printing,
                # would keep deadlines and signals from being seen.
                await anyio.lowlevel.checkpoint()

        with plain_errors():
            async with anyio.create_task_group() as tasks:
                for fd, sink in streams:
                    tasks.start_soon(pump, fd, sink)
                code = await self._result(line, "exec")
                ended = True
                for scope in waiting.values():
                    scope.cancel()
        return code

    async def read(self, path: str) -> AsyncIterator[bytes]:
        out, inside = os.pipe()
        try:
            os.set_blocking(out, False)
            async with self._operation({"op": "read", "path": path}, inside) as line:
                while True:
                    await anyio.wait_readable(out)
                    if not (data := os.read(out, _PIECE)):
                        break
                    yield data
                self._check(await self._result(line, "read"), path)
        finally:
            os.close(out)

    async def write(self, path: str, source: AsyncIterator[bytes]) -> None:
        inside, into = os.pipe()
        try:
            os.set_blocking(into, False)
            async with self._operation({"op": "write", "path": path}, inside) as line:
                with contextlib.suppress(BrokenPipeError):  # the answer says why
                    async for data in source:
                        view = memoryview(data)
                        while view:
                            try:
                                view = view[os.write(into, view) :]
                            except BlockingIOError:
                                await anyio.wait_writable(into)
                os.close(into)
                into = -1
                self._check(await self._result(line, "write"), path)
        finally:
            if into >= 0:
                os.close(into)

    @staticmethod
    def _check(code: int, path: str) -> None:
        if code:
            # OSError chooses FileNotFoundError and its kin by the number.
            raise OSError(code, os.strerror(code) if code in errno.errorcode else "failed", path)
