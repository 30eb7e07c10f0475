"""One of Daytona's sandboxes: its life by the SDK, commands and files past it (`toolbox.py`).

A command runs in a session of the sandbox's daemon, under `runner.py`, which makes of it what
the contract asks for: any bytes, apart, while it runs; its exit code at once; its whole tree
ended. Without that, `exit` in a command ends the session's shell and no exit code ever comes,
output that isn't UTF-8 is lost, and the end shows a second late.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import math
import shlex
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from ...concurrency import plain_errors
from ...errors import ConnectionLost, ProtocolError, SandboxError, SandboxGone
from ..base import Sandbox, Sink, discard
from . import client, faults

if TYPE_CHECKING:
    from daytona import AsyncSandbox

    from . import Daytona
    from .toolbox import Toolbox

RUNNER = Path(__file__).with_name("runner.py")
# The runner says something every 10 s: silence means that the line is dead.
_QUIET_SECONDS = 60.0
# The daemon replays a log from its first byte: on a slow line a long one would never get to where
# it dropped. Whoever can goes on by a command that begins there, as the agent's spool does.
_REPLAY_BYTES = 1 << 20
_RECONNECTS = 5
_TIMEOUT_MARGIN = 15.0
_TRANSFER_SECONDS = 3600.0
_SMALL = 1 << 20
_LINE = 1 << 17  # the runner's have a quarter of that
_GONE_STATES = (
    "destroyed", "destroying", "stopped", "stopping", "archived", "error", "build_failed",
)  # fmt: skip


@functools.lru_cache(maxsize=1)
def _program() -> str:
    """The runner without its docstring, since it goes along with every command."""
    text = RUNNER.read_text()
    return text[text.index('"""', 3) + 3 :].lstrip()


def command_line(
    python: str,
    argv: Sequence[str],
    cwd: str | None,
    env: Mapping[str, str] | None,
    timeout: float | None,
) -> str:
    """What the session's shell is given, which sources it: a subshell keeps it from ending."""
    job = {"argv": list(argv), "cwd": cwd, "env": dict(env or {}), "timeout": timeout}
    runner = shlex.join([python, "-I", "-S", "-c", _program(), json.dumps(job)])
    return f"(exec {runner}) </dev/null"


_FORMS: Mapping[str, Callable[[str], bytes]] = {
    "b": functools.partial(base64.b64decode, validate=True),
    "l": lambda text: text.encode() + b"\n",
    "t": str.encode,
}


@dataclass
class End:
    """How a command ended, as the runner says."""

    code: int | None  # None: its time was over
    ran_out_of_memory: bool = False


class Output:
    """Reads the runner's lines, and skips those that were seen before a connection dropped."""

    def __init__(self, out: Sink, err: Sink) -> None:
        self._sinks = {"o": out, "e": err}
        self._rest = bytearray()
        self.seen = 0
        self.received = 0
        self.end: End | None = None

    def reconnect(self) -> None:
        """The log comes again from its beginning."""
        self._rest.clear()
        self.received = 0

    async def feed(self, data: bytes) -> None:
        self.received += len(data)
        whole, newline, rest = data.rpartition(b"\n")
        if newline:
            lines = (self._rest + whole).split(b"\n")
            self._rest.clear()
            for line in lines:
                await self._line(line.decode(errors="replace"))
        self._rest += rest
        if len(self._rest) > _LINE:
            raise ProtocolError("a line of a sandbox's log has no end", op="exec")

    async def _line(self, line: str) -> None:
        number, _, rest = line.partition(" ")
        kind, _, payload = rest.partition(" ")
        try:
            seq = int(number, 16)
            if seq <= self.seen:
                return
            self.seen = seq
            if len(kind) == 2:
                await self._sinks[kind[0]](_FORMS[kind[1]](payload))
            elif kind == "x":
                said = json.loads(payload)
                self.end = End(int(said["code"]) & 0xFF, int(said["oom"]) > 0)
            elif kind == "t":
                self.end = End(None)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return  # the runner's are whole; a step can write into the session's shell's output


def why_gone(box: AsyncSandbox) -> str | None:
    """What became of a sandbox that can't be used any more; None: nothing has."""
    state = getattr(box.state, "value", "")
    if state not in _GONE_STATES:
        return None
    if evicted := box.spot_evicted_at:
        return f"evicted at {evicted}"
    return f"{state}: {box.error_reason}" if box.error_reason else str(state)


class DaytonaSandbox(Sandbox):
    """Made by `Daytona.create`, which has taken a client for it."""

    backend: Daytona

    def __init__(self, backend: Daytona, box: AsyncSandbox, toolbox: Toolbox, network: str) -> None:
        self.backend, self.id, self.network = backend, box.id, network
        self._box, self._toolbox = box, toolbox
        self._sessions: list[str] = []  # whose shells wait for a command
        self._destroyed = self._released = False
        self._out_of_memory = False

    # --- commands

    async def ready(self) -> None:
        """Makes the work directory, and a session for the first command at the same time."""
        with plain_errors():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._make_work)
                tasks.start_soon(self._spare_session)

    async def _make_work(self) -> None:
        make = functools.partial(self._toolbox.make_folder, self.backend.work, "755")
        await self._ask("create", make, again=True)

    async def _spare_session(self) -> None:
        self._sessions.append(await self._new_session())

    async def _new_session(self) -> str:
        name = f"metaflow-{uuid.uuid4().hex[:12]}"

        async def make() -> None:
            try:
                await self._toolbox.new_session(name)
            except Exception as e:
                if faults.status_of(e) != 409:  # made by a try whose answer was lost
                    raise

        await self._ask("exec", make, again=True)
        return name

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
        line = command_line(self.backend.python, argv, cwd or self.backend.work, env, timeout)
        session = self._sessions.pop() if self._sessions else await self._new_session()
        output = Output(on_stdout, on_stderr)
        try:
            command = await self._ask("exec", lambda: self._toolbox.start(session, line))
            # The runner keeps the time; this is for when it can't.
            patience = None if timeout is None else timeout + _TIMEOUT_MARGIN
            with anyio.fail_after(patience):
                end = await self._read_log(session, command, output)
        except (ConnectionLost, SandboxGone):
            raise  # what runs there goes on, and somebody may come back to it
        except BaseException:
            await self._end_session(session)
            raise
        self._sessions.append(session)
        self._out_of_memory |= end.ran_out_of_memory
        if end.code is None:
            raise TimeoutError(f"{argv[0]} did not end within {timeout} s")
        return end.code

    async def _end_session(self, session: str) -> None:
        """Ends what a command left undone has started."""
        if self._destroyed:
            return
        with (
            anyio.CancelScope(shield=True),
            anyio.move_on_after(10),
            contextlib.suppress(Exception),
        ):
            await self._toolbox.end_session(session)

    async def _read_log(self, session: str, command: str, output: Output) -> End:
        """Follows a command's log to its end, again where the connection drops, while it is short.

        Raises:
            ConnectionLost: it dropped, and is long, or dropped again and again.
            SandboxGone: its sandbox ended.
        """
        problem: Exception | None = None
        attempt = 0
        while attempt < _RECONNECTS:
            if attempt:
                await anyio.sleep(0.1 * 2**attempt)
                output.reconnect()
            before = output.seen
            problem = await self._follow(session, command, output)
            if output.end is not None:
                return output.end
            attempt = 1 if output.seen > before else attempt + 1
            await self._check(problem)
            if problem is None and output.seen == before:
                # Closed in good order, and nothing of the runner is there or new.
                await self._explain_end(session, command, output)
                break
            if output.received > _REPLAY_BYTES:
                break
        raise ConnectionLost(
            f"the log of a command in the sandbox {self.id} dropped: {problem}", op="exec"
        )

    async def _follow(self, session: str, command: str, output: Output) -> Exception | None:
        """Reads a log until its end or a drop. Returns why it dropped."""
        async with contextlib.aclosing(self._toolbox.output(session, command)) as pieces:
            while output.end is None:
                try:
                    with anyio.fail_after(_QUIET_SECONDS):
                        piece = await anext(pieces, None)
                except SandboxError:
                    raise
                except TimeoutError:
                    return TimeoutError(f"silent for {_QUIET_SECONDS:.0f} s")
                except Exception as e:
                    return e
                if piece is None:
                    break
                await output.feed(piece)
        return None

    async def _explain_end(self, session: str, command: str, output: Output) -> None:
        """A log that ended without the runner's last line: perhaps there is no Python.

        Raises:
            SandboxError: there isn't.
        """
        look = functools.partial(self._toolbox.exit_code, session, command)
        if await self._ask("exec", look, again=True) in (126, 127) and output.seen == 0:
            raise SandboxError(
                f"the sandbox has no {self.backend.python}, which every step needs: give an image "
                "or a snapshot with a Python 3.8 or later on its PATH.",
                code="no_python",
                op="exec",
                retryable=False,
            )

    async def _check(self, problem: BaseException | None) -> None:
        """Asks what became of the sandbox, after something went wrong in it.

        Raises:
            SandboxGone: it ended.
        """
        if self._destroyed:
            raise faults.gone(self.id)
        try:
            await client.call("check", self._box.refresh_data, seconds=15, again=True, patience=60)
        except TimeoutError:
            return
        except Exception as e:
            if faults.is_gone(e):
                raise faults.gone(self.id) from problem
            return
        if why := why_gone(self._box):
            raise faults.gone(self.id, why) from problem

    async def _ask(
        self, op: str, make: Any, *, seconds: float = client.CALL_SECONDS, **options: Any
    ) -> Any:
        """A call to the sandbox's daemon, or about the sandbox.

        Raises:
            SandboxGone, ConnectionLost, SandboxError.
        """
        if self._destroyed:
            raise faults.gone(self.id)
        try:
            return await client.call(op, make, seconds=seconds, **options)
        except TimeoutError as e:
            await self._check(e)
            raise ConnectionLost(
                f"the sandbox {self.id} did not answer within {seconds:.0f} s", op=op
            ) from None
        except SandboxError:
            raise
        except Exception as e:
            await self._check(e)
            if faults.is_transient(e) or faults.status_of(e) in (404, 410):
                # Of the sandbox, which lives, something else is gone: a session whose shell ended.
                raise ConnectionLost(
                    f"the sandbox {self.id} could not be asked: {faults.words(e)}", op=op
                ) from e
            raise faults.explain(e, op, client.url(), nothing_ran=False) from e

    # --- files

    async def write(self, path: str, source: AsyncIterator[bytes]) -> None:
        head = bytearray()
        async for piece in source:
            head += piece
            if len(head) > _SMALL:
                break

        async def whole() -> AsyncIterator[bytes]:
            yield bytes(head)
            async for piece in source:
                yield piece

        if len(head) <= _SMALL:
            await self._file(path, lambda: self._toolbox.upload(path, whole()), again=True)
            return

        # Streamed once: what was read of the source is not there again, nor for a second try here.
        try:
            await self._file(
                path,
                lambda: self._toolbox.upload(path, whole()),
                seconds=_TRANSFER_SECONDS,
                patience=0,
            )
        except SandboxError as e:
            if faults.status_of(e) != 429:
                raise
            await anyio.sleep(faults.wait_of(e))
            raise ConnectionLost(f"{path} was not taken now: {e}", op="files") from e

    async def read(self, path: str) -> AsyncIterator[bytes]:
        # Opening anything else than a file would block the daemon (a FIFO).
        info = await self._file(path, lambda: self._toolbox.info(path), again=True)
        if info.directory:
            raise IsADirectoryError(21, f"is a directory in the sandbox: {path}")
        if not info.regular:
            raise OSError(22, f"not a regular file in the sandbox: {path}")

        async def begin() -> tuple[Any, bytes | None]:
            # It is asked for with the first piece; a stream that has failed ends like one that
            # is whole, so that it must not be asked twice.
            begun = self._toolbox.download(path)
            return begun, await anext(begun, None)

        stream, piece = await self._file(path, begin, seconds=_QUIET_SECONDS, again=True)
        size = 0
        async with contextlib.aclosing(stream):
            while piece is not None:
                size += len(piece)
                yield piece
                further = functools.partial(anext, stream, None)
                piece = await self._file(path, further, seconds=_QUIET_SECONDS, patience=0)
        if size < info.size:
            raise ConnectionLost(
                f"{size} of {info.size} bytes came of {path} in the sandbox {self.id}", op="files"
            )

    async def _file(self, path: str, make: Any, **options: Any) -> Any:
        """A call that is about a file.

        Raises:
            OSError: the file can't be had.
            SandboxGone, ConnectionLost, SandboxError.
        """
        try:
            return await self._ask("files", functools.partial(_about, path, make), **options)
        except _FileProblem as e:
            raise e.error from None

    async def capture(self, name: str, seconds: float) -> None:
        """Makes a snapshot of its files, of that name, unless somebody has made one."""
        take = functools.partial(self._box.create_snapshot, name, timeout=0)
        try:
            await self._ask("prepare", take, seconds=seconds)
        except SandboxError as e:
            if faults.status_of(e) != 409:
                raise

    # --- the end

    async def renew(self, lifetime: float) -> None:
        # Counted anew from now, unlike that of a creation.
        minutes = max(1, math.ceil(lifetime / 60))
        await self._ask("renew", functools.partial(self._box.set_ttl, minutes), again=True)

    def diagnose(self) -> str | None:
        if self._out_of_memory:
            return (
                f"its processes used more memory than the sandbox has ({self._box.memory} GB); "
                "give it more with memory=…"
            )
        return None

    def facts(self) -> dict[str, str]:
        box = self._box
        limits = f"{box.cpu} CPUs, {box.memory} GB of memory, {box.disk} GB of disk"
        return {
            "sandbox-provider": f"Daytona ({box.target}), sandbox {self.id}",
            "sandbox-limits": limits + (f", {box.gpu} GPUs" if box.gpu else ""),
            "sandbox-network": self.network,
        }

    async def destroy(self) -> None:
        if self._destroyed:
            return
        try:
            await self.backend.destroy(self.id)
            self._destroyed = True
        finally:
            if not self._released:
                self._released = True
                await self.backend.clients.release()


class _FileProblem(SandboxError):
    """Carries a built-in exception about a file past the handling of connections."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error), op="files")
        self.error = error


async def _about(path: str, make: Any) -> Any:
    try:
        return await make()
    except SandboxGone:
        raise
    except Exception as e:
        if found := faults.as_file_error(e, path):
            raise _FileProblem(found) from e
        raise
