"""One of E2B's sandboxes: commands and files, by the SDK and on one point past it."""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import json
import math
import shlex
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from ...concurrency import plain_errors
from ...errors import BackendUnavailable, ConnectionLost, SandboxGone
from ..answers import held
from ..base import Sandbox, Sink, discard
from . import bounds
from .failures import translate, translated

if TYPE_CHECKING:
    from e2b import AsyncSandbox
    from e2b.sandbox_async.commands.command_handle import AsyncCommandHandle

    from . import E2B

USER = "user"
_MARK = "METAFLOW_SANDBOX_COMMAND"
_PROGRAM = Path(__file__).with_name("inside.py").read_text()
_ENDING_SECONDS = 8.0
_DESTROY_SECONDS = 180.0
_KILL_SECONDS = 10.0
_LONGEST_PAUSE = 5.0
_PIECE = 1 << 18
_LONGEST_LINE = 1 << 16
#: Ends every process that has a mark among its variables, its own variables excepted. As
#: root: the SDK's own `kill` ends one process, and its children live on.
_END = """
import os, sys, time
mark, until = sys.argv[1].encode(), time.monotonic() + 5
found = True
while found and time.monotonic() < until:
    found = False
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                with open("/proc/%s/environ" % name, "rb") as file:
                    if mark in file.read():
                        os.kill(int(name), 9)
                        found = True
            except OSError:
                pass
"""


class E2BSandbox(Sandbox):
    """See `Sandbox`. `remote` is the SDK's."""

    #: Seconds without a line, of which the program inside sends one every 20, until the
    #: connection is given up. A load balancer may forget one without a word to either end.
    quiet_seconds = 120.0
    #: Seconds without progress until a transfer is given up; the SDK has no limit for these.
    idle_seconds = 120.0

    def __init__(
        self, backend: E2B, remote: AsyncSandbox, template: str, python: str | None = None
    ) -> None:
        self.backend = backend
        self.id = remote.sandbox_id
        self.remote = remote
        bounds.bound(remote)
        self._template = template
        self._python = python or backend.python
        self._diagnosis: str | None = None
        self._ended_for_memory: int | None = None  # how many, when we first heard
        self._gone = False
        self._began = time.monotonic()
        self._ends = self._began + backend.longest_life

    @property
    def python(self) -> str:
        return self._python

    def facts(self) -> dict[str, str]:
        return {"sandbox-isolation": "a microVM of E2B's", "sandbox-template": self._template}

    def diagnose(self) -> str | None:
        return self._diagnosis

    # --- commands

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
        if self._gone:
            raise SandboxGone(f"the sandbox {self.id} is gone", op="exec")
        work = self.backend.work
        request = {"argv": list(argv), "env": dict(env or {}), "cwd": cwd or work, "made": work}
        program = [self.python, "-I", "-S", "-c", _PROGRAM, json.dumps(request)]
        running = _Running(self, on_stdout, on_stderr)
        mark = uuid.uuid4().hex
        try:
            with anyio.fail_after(timeout):
                code = await running.run(f"exec {shlex.join(program)}", {_MARK: mark})
        except (TimeoutError, anyio.get_cancelled_exc_class()):
            with anyio.CancelScope(shield=True):
                await running.leave()
                await self._end(mark)
            raise
        except SandboxGone as e:
            lived = (time.monotonic() - self._began) / 60
            raise SandboxGone(
                f"{e.message}. It had lived for {lived:.0f} minutes. E2B ends a sandbox at your "
                "plan's limit, or somebody ended it; with @retry the step is run again.",
                op="exec",
            ) from e
        except BaseException:
            with anyio.CancelScope(shield=True):
                await running.leave()
            raise
        if code < 0:  # a signal ended our own program: for want of memory, most likely
            await self._look_for_memory()
        return 137 if code < 0 else code

    async def _end(self, mark: str) -> None:
        """Ends all that a command started, daemons too."""
        command = shlex.join([self.python, "-I", "-S", "-c", _END, mark])
        with contextlib.suppress(Exception), anyio.move_on_after(_ENDING_SECONDS):
            await self.remote.commands.run(command, user="root", timeout=0)

    async def _look_for_memory(self) -> None:
        with contextlib.suppress(Exception), anyio.move_on_after(_ENDING_SECONDS):
            found = await self.remote.commands.run("cat /proc/vmstat", user=USER, timeout=0)
            for line in found.stdout.splitlines():
                if line.startswith("oom_kill "):
                    self.note_memory(int(line.split()[1]))

    def note_memory(self, ended: int) -> None:
        """Takes note of how many processes the kernel has ended for want of memory."""
        if self._ended_for_memory is None:
            self._ended_for_memory = ended
        elif ended > self._ended_for_memory:
            self._diagnosis = (
                "its sandbox ran out of memory, and a process was ended. Give it more with memory=…"
            )

    def note_full(self) -> None:
        """Takes note that a command left the disk full: an agent whose it was could not go on."""
        self._diagnosis = self._diagnosis or (
            "its sandbox's disk is full, which has the size that your plan of E2B's gives. Have it "
            "write less, or delete what it no longer needs"
        )

    # --- files

    async def write(self, path: str, source: AsyncIterator[bytes]) -> None:
        moved = _Progress()
        failed: list[Exception] = []

        async def pieces() -> AsyncIterator[bytes]:
            try:
                async for piece in source:
                    yield piece
                    moved.note()
            except Exception as e:
                failed.append(e)  # the SDK would raise something else for it
                raise

        async def send() -> None:
            try:
                # An iterator is streamed, and has no deadline as a whole.
                await self.remote.files.write(path, pieces(), user=USER)
            except Exception as e:
                raise (failed[0] if failed else translate(e, "write", path)) from e

        await self._while_moving(send, moved, f"write {path}")

    async def read(self, path: str) -> AsyncIterator[bytes]:
        with translated("read", path), anyio.fail_after(self.idle_seconds):
            found = await self.remote.files.get_info(path, user=USER)
        # A FIFO would hold the daemon up, and us with it.
        kind = getattr(found.type, "value", None)
        if kind == "dir":
            raise IsADirectoryError(errno.EISDIR, "a directory in the sandbox", path)
        if kind is None:
            raise OSError(errno.EINVAL, "not a regular file in the sandbox", path)
        async for piece in self._download(path):
            yield piece

    async def _download(self, path: str) -> AsyncIterator[bytes]:
        """A file's content, by the SDK's connections: its `read` asks for gzip, nine times as slow.

        By these, what it does about proxies and certificates is done here too.
        """
        from e2b.api.client_async import get_envd_api

        headers = {"Accept-Encoding": "identity"}
        query = {"path": path, "username": USER}
        # HTTP/2 here breaks on empty frames, so the SDK itself reads by the older one.
        client = get_envd_api(
            self.remote.connection_config, self.remote.envd_api_url, http_version="1.1"
        )
        request = client.build_request("GET", "/files", params=query, headers=headers, timeout=None)
        with translated("read", path):
            with anyio.fail_after(self.idle_seconds):
                response = await client.send(request, stream=True)
            try:
                if response.status_code != 200:
                    with anyio.fail_after(self.idle_seconds):
                        said = await held(response.aiter_raw())
                    raise _answer(response.status_code, said.decode(errors="replace"), path)
                pieces = response.aiter_raw(_PIECE)
                while True:
                    with anyio.fail_after(self.idle_seconds):
                        piece = await anext(pieces, b"")
                    if not piece:
                        break
                    yield piece
            finally:
                await response.aclose()

    async def _while_moving(self, work: Any, moved: _Progress, what: str) -> None:
        """Runs a transfer, and gives it up when it stands still."""

        async def watch() -> None:
            await moved.stalls(self.idle_seconds)
            raise ConnectionLost(
                f"{what}: nothing was transferred for {self.idle_seconds:.0f} s", op="write"
            )

        with plain_errors():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(watch)
                await work()
                tasks.cancel_scope.cancel()

    # --- life

    async def renew(self, lifetime: float) -> None:
        # What goes beyond the plan might be refused, and the sandbox end before its time.
        left = self._ends - time.monotonic()
        if (seconds := math.floor(min(lifetime, left))) > 0:
            with translated("renew", self.id):
                await self.remote.set_timeout(seconds)

    async def destroy(self) -> None:
        if self._gone:
            return
        with anyio.CancelScope(shield=True):
            await self.backend.destroy(self.id)
        self._gone = True


class _Progress:
    """When something last happened."""

    def __init__(self) -> None:
        self.note()

    def note(self) -> None:
        self._at = time.monotonic()

    async def stalls(self, seconds: float) -> None:
        """Returns when nothing has happened for so long."""
        while (left := self._at + seconds - time.monotonic()) > 0:  # noqa: ASYNC110 - no event
            await anyio.sleep(left)


class _Running:
    """A command that runs, and what of its lines has come."""

    def __init__(self, sandbox: E2BSandbox, on_stdout: Sink, on_stderr: Sink) -> None:
        self._sandbox = sandbox
        self._sinks = {"o": on_stdout, "e": on_stderr}
        self._rest = ""
        self._heard = _Progress()
        self._taking = False
        self._failed: list[Exception] = []
        self._handle: AsyncCommandHandle[None] | None = None

    async def run(self, command: str, variables: dict[str, str]) -> int:
        """Starts it and follows it to its end. Returns its exit code, below 0 for a signal."""
        from e2b import CommandExitException

        remote = self._sandbox.remote
        with translated("exec", self._sandbox.id):
            # Without timeout=0 the daemon kills the process after a minute, this one alone.
            self._handle = await remote.commands.run(
                command,
                background=True,
                envs=variables,
                user=USER,
                on_stdout=partial(self._guarded, self._lines),
                on_stderr=partial(self._guarded, self._noise),
                timeout=0,
                request_timeout=min(60.0, self._sandbox.quiet_seconds),  # until it has begun
                retain_output=False,
            )
        self._heard.note()
        code = 0
        with plain_errors():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._watch)
                try:
                    await self._handle.wait()
                except CommandExitException as e:
                    code = e.exit_code
                except Exception as e:
                    raise (
                        self._failed[0] if self._failed else translate(e, "exec", self._sandbox.id)
                    ) from e
                tasks.cancel_scope.cancel()
        if self._failed:
            raise self._failed[0]
        return code

    async def leave(self) -> None:
        """Hears no more of it; it goes on."""
        if self._handle is not None:
            with contextlib.suppress(Exception), anyio.move_on_after(_ENDING_SECONDS):
                await self._handle.disconnect()

    async def _watch(self) -> None:
        """Ends the wait when nothing was heard for long: the SDK itself would wait for ever."""
        quiet = self._sandbox.quiet_seconds
        while True:
            await self._heard.stalls(quiet)
            if not self._taking:
                break
            self._heard.note()
        with translated("exec", self._sandbox.id), anyio.fail_after(10):
            if not await self._sandbox.remote.is_running(request_timeout=5):
                raise SandboxGone(f"the sandbox {self._sandbox.id} is gone", op="exec")
        raise ConnectionLost(f"{self._sandbox.id} was silent for {quiet:.0f} s", op="exec")

    async def _guarded(self, take: Any, text: str) -> None:
        """Keeps what a sink raises, which the SDK would take for its own."""
        # How long a sink takes, such as one for a terminal that somebody holds up, says nothing
        # of the connection.
        self._taking = True
        try:
            await take(text)
        except Exception as e:
            self._failed.append(e)
            raise
        finally:
            self._taking = False
            self._heard.note()

    async def _lines(self, text: str) -> None:
        lines = (self._rest + text).split("\n")
        self._rest = lines.pop()[:_LONGEST_LINE]
        for line in lines:
            kind, _, payload = line.partition(" ")
            try:
                data = base64.b64decode(payload, validate=True)
                number = int(data) if kind == "m" else 0
            except (binascii.Error, ValueError):
                kind, data = "", line.encode()
            if kind == "m":
                self._sandbox.note_memory(number)
            elif kind == "f":
                self._sandbox.note_full()
            elif kind in self._sinks:
                await self._sinks[kind](data)
            elif kind != ".":
                await self._noise(line + "\n")  # a login shell's, of an image that has something

    async def _noise(self, text: str) -> None:
        await self._sinks["e"](text.encode())


def _answer(status: int, text: str, path: str) -> Exception:
    """What an answer of the daemon's to a download means."""
    import e2b

    with contextlib.suppress(ValueError, TypeError, KeyError):
        text = str(json.loads(text)["message"])
    if status == 404:
        return FileNotFoundError(errno.ENOENT, "no such file in the sandbox", path)
    if "ermission denied" in text:
        return PermissionError(errno.EACCES, "not allowed in the sandbox", path)
    if status == 400:
        return e2b.InvalidArgumentException(text)
    if status == 429:
        return e2b.RateLimitException(text)  # type: ignore[no-untyped-call]
    if status == 502 and "was not found" in text:
        return e2b.SandboxNotRunningException(text)
    return e2b.SandboxUnreachableException(f"{status}: {text}")


async def kill(sandbox_id: str) -> None:
    """Ends a sandbox; tries for a while, since whoever forgets one pays for it."""
    from e2b import AsyncSandbox

    patience = time.monotonic() + _DESTROY_SECONDS
    pause = 0.5
    while True:
        try:
            await AsyncSandbox.kill(sandbox_id, request_timeout=_KILL_SECONDS)
        except Exception as e:
            if getattr(e, "status_code", None) in (400, 404):
                return  # no such sandbox
            error = translate(e, "destroy", sandbox_id)
            if isinstance(error, BackendUnavailable) or time.monotonic() > patience:
                raise error from e
            await anyio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)
        else:
            return
