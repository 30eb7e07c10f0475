"""One process a run that hosts all of its attempts: `flow.py … sandbox supervise`.

It has Metaflow, the flow and the backends loaded once. Clients (`client.py`) hand it
their command and their output over a private socket; each gets a task of its own. A
client's end ends its attempt; the scheduler's end ends all, and this process.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
from metaflow._vendor import click

from ..admission.readers import Readers
from ..admission.text import message
from ..backends import registry
from ..backends.base import Backend
from ..concurrency import plain_errors, write_all
from ..errors import SandboxError
from .attempt import Attempt
from .client import HEADER, SOCKET
from .job import Job
from .quota import Places
from .record import Recorder

_MAX_MESSAGE = 64 << 20
_BACKLOG = 1024
_POLL_SECONDS = 0.5
_LOOK_SECONDS = 0.05
_PART_SECONDS = 20.0  # that the session waits for the end of sandboxes; they are tried longer
_MOST_TOLD = 16 << 10
_RECORDING = 4  # attempts that may have a blob in memory


class Supervisor:
    """Answers clients until it is told to end.

    Args:
        context: click's context of this command, with Metaflow's objects.
        parse: reads the words after `sandbox step`; raises click.ClickException.
    """

    def __init__(self, context: Any, parse: Callable[[list[str]], dict[str, Any]]) -> None:
        self._context = context
        self._parse = parse
        self._backends: dict[str, tuple[Backend, Places]] = {}
        self._readers = Readers()
        self._recording = anyio.CapacityLimiter(_RECORDING)
        self._ended = anyio.Event()
        self._attempts: list[Attempt] = []
        self._problems: list[str] = []  # of attempts that had told their exit codes

    async def serve(self, listener: socket.socket) -> None:
        """Accepts clients until `end`; then ends what is left of their attempts."""
        async with contextlib.aclosing(self._readers), anyio.create_task_group() as tasks:
            tasks.start_soon(self._accept, listener, tasks)
            await self._ended.wait()
            tasks.cancel_scope.cancel()

    def end(self) -> None:
        """Ends all attempts and the service."""
        self._ended.set()

    async def _accept(self, listener: socket.socket, tasks: anyio.abc.TaskGroup) -> None:
        while True:
            await anyio.wait_readable(listener)
            try:
                line, _ = listener.accept()
            except OSError:
                await anyio.sleep(_POLL_SECONDS)  # no descriptors are left, for now
                continue
            tasks.start_soon(self._attend, line)

    async def _attend(self, line: socket.socket) -> None:
        """One client, from its request to its exit code."""
        fds: list[int] = []
        with contextlib.ExitStack() as opened:
            opened.callback(line.close)
            opened.callback(_close_all, fds)
            line.setblocking(False)
            with contextlib.suppress(OSError, EOFError):
                words = await self._receive(line, fds)
                if words is None:
                    self.end()
                    with anyio.CancelScope(shield=True):
                        await self._part(line)
                elif len(fds) == 2:
                    await self._run(words, fds, line)

    async def _receive(self, line: socket.socket, fds: list[int]) -> list[str] | None:
        """The words of a command; None: the run has ended."""
        if not _is_ours(line):
            raise EOFError
        await anyio.wait_readable(line)
        header, received, _, _ = socket.recv_fds(line, HEADER, 2)
        fds.extend(received)
        size = int.from_bytes(header, "big")
        if len(header) < HEADER or size > _MAX_MESSAGE:
            raise EOFError
        message = bytearray()
        while len(message) < size:
            await anyio.wait_readable(line)
            if not (piece := line.recv(size - len(message))):
                raise EOFError
            message += piece
        return message.decode().split("\0") if message else None

    async def _hung_up(self, line: socket.socket) -> None:
        """Returns when the client is gone: it sends nothing more."""
        while True:
            await anyio.wait_readable(line)
            if not line.recv(64):
                return

    async def _part(self, line: socket.socket) -> None:
        """Waits until the attempts have ended, for a while, and tells what is left of them."""
        with anyio.move_on_after(_PART_SECONDS):
            while self._attempts:  # noqa: ASYNC110 - they are cancelled one by one
                await anyio.sleep(_LOOK_SECONDS)
        left = [*self._problems, *(attempt.left for attempt in self._attempts if attempt.left)]
        line.send("\n".join(left).encode()[:_MOST_TOLD])

    async def _run(self, words: list[str], fds: list[int], line: socket.socket) -> None:
        """Runs an attempt for as long as its client lives, and tells the client its exit code."""
        _, err = fds

        def report(code: int) -> None:
            # The scheduler waits for the end of the output, too.
            _close_all(fds)
            fds.clear()
            with contextlib.suppress(OSError):  # the client is gone
                line.send(b"%d" % code)
                line.shutdown(socket.SHUT_WR)  # it waits for no more, such as a sandbox's end

        attempt = None
        try:
            attempt = self._attempt(words, *fds)
            self._attempts.append(attempt)
            with plain_errors():
                async with anyio.create_task_group() as tasks:

                    async def follow_client() -> None:
                        await self._hung_up(line)
                        tasks.cancel_scope.cancel()

                    tasks.start_soon(follow_client)
                    await attempt.run(report)
                    tasks.cancel_scope.cancel()
        except (SandboxError, click.ClickException) as e:
            problem = str(e)
        except Exception:  # one attempt's surprise is not another's end
            problem = traceback.format_exc()
        else:
            problem = ""
        finally:
            if attempt is not None:
                self._attempts.remove(attempt)
        if not fds:
            self._problems += [problem] if problem else []
        else:
            problem = problem or "the attempt was ended."
            await write_all(err, f"[sandbox] {message(problem)}\n".encode())
            report(1)

    def _attempt(self, words: list[str], out: int, err: int) -> Attempt:
        job = Job.from_context(self._context, self._parse(words))
        if job.backend not in self._backends:
            backend = registry.load(job.backend)
            self._backends[job.backend] = backend, Places(backend)
        backend, places = self._backends[job.backend]
        recorder = Recorder(job, self._context.obj)
        shared = places, self._readers, self._recording
        return Attempt(job, backend, recorder, *shared, out=out, err=err)


def supervise(
    context: Any,
    parse: Callable[[list[str]], dict[str, Any]],
    workspace: Path,
    scheduler: int,
    ready: int,
) -> None:
    """Runs the supervisor of a run until that ends.

    Args:
        workspace: the run's directory, in which the socket is.
        scheduler: the process without which nobody wants the results.
        ready: a descriptor that hears when clients may come.
    """
    supervisor = Supervisor(context, parse)
    listener = _listen(workspace)
    os.write(ready, b"1")
    os.close(ready)

    async def run() -> None:
        async with anyio.create_task_group() as tasks:

            async def end_after(event: Awaitable[None]) -> None:
                await event
                supervisor.end()

            async def outlive() -> None:
                await _ends(scheduler)
                supervisor.end()
                with anyio.CancelScope(shield=True):
                    await ended.wait()
                    shutil.rmtree(workspace, ignore_errors=True)  # nobody else does

            ended = anyio.Event()
            tasks.start_soon(outlive)
            tasks.start_soon(end_after, _signal())
            await supervisor.serve(listener)
            ended.set()
            tasks.cancel_scope.cancel()

    anyio.run(run)
    # Nothing is left to tidy up, and the scheduler waits for this process.
    os._exit(0)


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _is_ours(line: socket.socket) -> bool:
    """Whether this user has the other end.

    Nobody else (but root) gets to the socket, which is in a directory of mode 0700. Linux
    says it once more; macOS has no SO_PEERCRED.
    """
    if not hasattr(socket, "SO_PEERCRED"):
        return True
    credentials = line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return bool(struct.unpack("3i", credentials)[1] == os.getuid())


def _listen(workspace: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.setblocking(False)
    directory = Path.cwd()
    os.chdir(workspace)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(SOCKET)  # of one that was killed
        listener.bind(SOCKET)
        listener.listen(_BACKLOG)
    finally:
        os.chdir(directory)
    return listener


async def _ends(process: int) -> None:
    """Returns when a process has ended."""
    if sys.platform == "linux":
        try:
            pidfd = os.pidfd_open(process)
        except ProcessLookupError:
            return
        try:
            await anyio.wait_readable(pidfd)
        finally:
            os.close(pidfd)
    else:
        while _lives(process):  # noqa: ASYNC110 - there is nothing to wait for
            await anyio.sleep(_POLL_SECONDS)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


async def _signal() -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async for _ in signals:
            return
