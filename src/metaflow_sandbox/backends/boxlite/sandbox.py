"""One microVM: a home of boxlite's with one box in it, in a lease that ends with this process."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import shutil
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel

from ...concurrency import blocking
from ...egress.rules import Rules
from ...errors import SandboxError, SandboxGone
from ...leases import Lease
from ..base import Sandbox, SandboxSpec, Sink, discard
from . import inside, network, processes
from .faults import explained, how_it_ended, starts_slowly
from .operation import PROGRAM, Life, operation
from .runtime import Runtime

if TYPE_CHECKING:
    from . import Boxlite

KIND = "vm"
_GIB = 1024
_DEFAULT_MEMORY = 1024
_DEFAULT_DISK = 4096
LEAST_MEMORY = 128
# The volume's server holds a descriptor for each file that the guest has looked at.
_OPEN_FILES = 65536
_READY_SECONDS = 120.0  # from the guest's boot until commands can be run
_CONSOLE = 64 << 10
_OUT_OF_MEMORY = (b"Out of memory: Killed process", b"oom-kill:")


class BoxliteSandbox(Sandbox):
    """Made by `start`."""

    def __init__(self, backend: Boxlite, spec: SandboxSpec, layout: Path) -> None:
        self.backend: Boxlite = backend
        self._spec = spec
        self._layout = layout
        self._lease = Lease(KIND)
        self.id = self._lease.id
        self._runtime: Runtime | None = None
        self._box: Any = None
        self._life: Life | None = None
        self._timer: threading.Timer | None = None
        self._inputs = self._lease.path / "inputs"
        self._ended = False
        self._expired = False
        self._numbers = count()
        self._gate: network.Gate | None = None

    @classmethod
    async def start(cls, backend: Boxlite, spec: SandboxSpec, layout: Path) -> BoxliteSandbox:
        """Boots a microVM from an OCI layout.

        Raises:
            BackendUnavailable: no microVM can boot here.
            SandboxError
        """
        made = cls(backend, spec, layout)
        try:
            await made._boot_patiently()
            await made._make_work()
            if spec.network is not False:
                await made._open_gate()
            made._arm(spec.lifetime)
        except BaseException:
            await made.destroy()
            raise
        return made

    @classmethod
    async def try_out(cls, backend: Boxlite, spec: SandboxSpec, layout: Path) -> None:
        """Boots a microVM in which nothing can run, and ends it."""
        made = cls(backend, spec, layout)
        try:
            await made._boot_patiently()
        finally:
            await made.destroy()

    async def _boot_patiently(self) -> None:
        try:
            await self._boot()
        except SandboxError as e:
            if not starts_slowly(e):
                raise
            # A machine that is busy: boxlite waits for 30 seconds, and no longer.
            await self._shut_down()
            await self._boot()

    async def _boot(self) -> None:
        await blocking(self._lay_out)
        self._record()
        self._runtime = Runtime(self._lease.path / "home")
        with explained("create", self._lease.path / "home", self._layout):
            self._box = await self._runtime.create(self._options())
            await self._box.start()
            pid = (await processes.settled(self._box.info())).state.pid
        if pid is None:
            raise SandboxGone("the microVM ended as soon as it had booted", op="create")
        self._life = Life(pid)
        self._record()
        self._arm(_READY_SECONDS)

    def _lay_out(self) -> None:
        self._inputs.mkdir(exist_ok=True)
        shutil.copyfile(inside.__file__, self._inputs / PROGRAM)

    def _record(self) -> None:
        """Leaves what others need to find this sandbox and to end it."""
        record = {
            "labels": dict(self._spec.labels),
            "process": processes.identity(self._life.pid) if self._life else None,
            "expires": time.time() + self._spec.lifetime,
        }
        new = self._lease.path / "record.new"
        new.write_text(json.dumps(record))
        new.rename(self._lease.path / "record.json")

    def _options(self) -> Any:
        import boxlite

        spec = self._spec
        security = boxlite.SecurityOptions.standard()
        security.max_open_files = _open_files()
        # No device at all: what a step may reach goes through our own proxy, since
        # `allow_net` leaves the host's loopback open.
        outbound = boxlite.OutboundNetworkSpec(mode="disabled")
        return boxlite.BoxOptions(
            rootfs_path=str(self._layout),
            cpus=int(spec.cpu or 1),
            memory_mib=spec.memory or _DEFAULT_MEMORY,
            disk_size_gb=math.ceil((spec.disk or _DEFAULT_DISK) / _GIB),
            volumes=[(str(self._inputs), self.backend.inbox, True)],
            network=boxlite.NetworkSpec(outbound=outbound),
            user="0:0",
            detach=False,
            auto_delete=1,
            advanced=boxlite.AdvancedBoxOptions(security=security),
        )

    async def _make_work(self) -> None:
        work = self.backend.work
        script = f"import os; os.makedirs({work!r}, exist_ok=True)"
        code = await self.exec([self.backend.python, "-I", "-S", "-c", script], cwd="/")
        if code != 0:
            raise SandboxError(
                f"{work} can't be made in the microVM (exit code {code})",
                code="create_failed",
                op="create",
            )

    async def _open_gate(self) -> None:
        listed = None if self._spec.network in (None, True) else tuple(self._spec.network or ())  # type: ignore[arg-type]
        self._gate = network.Gate(self.backend.portals)
        await self._gate.open(self._operation, Rules(hosts=listed), self._lease.path)

    def _arm(self, seconds: float) -> None:
        """Ends the microVM after so long, by a thread: an event loop may be busy or stuck."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True
        self._timer.start()

    def _expire(self) -> None:
        self._expired = True
        if self._life is not None:
            self._life.end()

    # --- operations

    def _alive(self, op: str) -> Life:
        if self._ended or self._life is None:
            raise SandboxGone(self._why_gone(), op=op)
        return self._life

    def _why_gone(self) -> str:
        if self._expired:
            return "the microVM was ended, since its lifetime was over"
        how = how_it_ended(self._lease.path / "home")
        return self.diagnose() or how or "the microVM has ended"

    @contextlib.asynccontextmanager
    async def _operation(self, request: dict[str, Any]) -> AsyncIterator[Any]:
        life = self._alive(request["op"])
        program = f"{self.backend.inbox}/{PROGRAM}"
        try:
            with explained(request["op"], self._lease.path / "home", self._layout):
                async with operation(
                    life, self._box, self.backend.python, program, request
                ) as running:
                    yield running
        except SandboxGone:
            raise SandboxGone(self._why_gone(), op=request["op"]) from None

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
        request = {
            "op": "exec", "argv": list(argv), "cwd": cwd or self.backend.work,
            "env": {**(network.variables() if self._gate else {}), **(env or {})},
        }  # fmt: skip
        sinks = {"o": on_stdout, "e": on_stderr}
        with anyio.fail_after(timeout):
            async with self._operation(request) as running:
                while True:
                    kind, data = await running.frame()
                    if kind in sinks:
                        await sinks[kind](data)
                        await running.taken()
                    elif kind == "x":
                        return _code(data) & 0xFF
                    await anyio.lowlevel.checkpoint()

    async def read(self, path: str) -> AsyncIterator[bytes]:
        async with self._operation({"op": "read", "path": path}) as running:
            while True:
                kind, data = await running.frame()
                if kind == "x":
                    _check(_code(data), path)
                    return
                yield data
                await running.taken()

    async def write_file(self, path: str, source: Path) -> None:
        """Copies a file of the host's."""

        async def pieces() -> AsyncIterator[bytes]:
            async with await anyio.open_file(source, "rb") as file:
                while piece := await file.read(1 << 20):
                    yield piece

        await self.write(path, pieces())

    async def write(self, path: str, source: AsyncIterator[bytes]) -> None:
        name = f".write-{next(self._numbers)}"
        place = self._inputs / name
        try:
            async with await anyio.open_file(place, "wb") as file:
                async for data in source:
                    await file.write(data)
            request = {"op": "write", "path": path, "source": f"{self.backend.inbox}/{name}"}
            async with self._operation(request) as running:
                _, code = await running.frame()
                _check(_code(code), path)
        finally:
            with anyio.CancelScope(shield=True):
                await blocking(partial(place.unlink, missing_ok=True))

    async def upload(self, mounts: Mapping[str, Path]) -> list[str]:
        """Lays the directories out in the one volume that there is, by links where that can be.

        A microVM has room for three volumes and no more, and not for files alone.
        """
        for target, source in mounts.items():
            below = os.path.relpath(target, self.backend.inbox)
            if below.startswith(".."):
                raise SandboxError(
                    f"{target} is not below {self.backend.inbox}, which alone is shared with a "
                    "microVM",
                    code="deliver_failed",
                    op="deliver",
                )
            await blocking(partial(_tree, str(source), str(self._inputs / below)))
        return []

    # --- how it goes, and its end

    def diagnose(self) -> str | None:
        if any(word in self._console() for word in _OUT_OF_MEMORY):
            return (
                "the microVM's kernel ended processes because its memory ran out: give it more "
                "with memory=… (MB)"
            )
        return None

    def _console(self) -> bytes:
        """The end of what the guest's kernel said."""
        found = b""
        for path in (self._lease.path / "home" / "boxes").glob("*/logs/console.log"):
            with contextlib.suppress(OSError), open(path, "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _CONSOLE))
                found += file.read(_CONSOLE)
        return found

    def facts(self) -> dict[str, str]:
        return {
            "sandbox-provider": self.backend.provider(),
            "sandbox-limits": "microVM",
            "sandbox-image": self._layout.name,
            "sandbox-network": "proxy" if self._gate else "none",
        }

    def remarks(self) -> list[str]:
        found = self._gate.refusals() if self._gate is not None else {}
        return [f"network: {target} was refused: {reason}" for target, reason in found.items()]

    async def _shut_down(self) -> None:
        """Ends the microVM and the runtime, so that the home can be made anew."""
        if self._timer is not None:
            self._timer.cancel()
        life, self._life = self._life, None
        gate, self._gate = self._gate, None
        runtime, self._runtime = self._runtime, None
        self._box = None
        # From the last to the first, each whatever those before it raise.
        async with contextlib.AsyncExitStack() as steps:
            if runtime is not None:
                steps.push_async_callback(runtime.close)
            if life is not None:
                steps.callback(life.close)
            if gate is not None:
                steps.push_async_callback(gate.close)
            if life is not None:
                life.end()
                with anyio.move_on_after(10):
                    await life.over()

    async def destroy(self) -> None:
        if self._ended:
            return
        self._ended = True
        with anyio.CancelScope(shield=True):
            try:
                await self._shut_down()
            finally:
                await blocking(partial(remove_sockets, self._lease.path))
                await blocking(self._lease.release)


def remove_sockets(lease: Path) -> None:
    """Removes what boxlite has of a lease's boxes elsewhere: sockets need short names."""
    for box in (lease / "home" / "boxes").glob("*"):
        shutil.rmtree(f"/tmp/bl-{os.getuid()}/{box.name}", ignore_errors=True)  # noqa: S108


def _open_files() -> int:
    """How many files a microVM's process may have open: a limit above the hard one ends it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)


def _code(data: bytes) -> int:
    return int(data) if data.isdigit() and len(data) < 6 else 255


def _check(code: int, path: str) -> None:
    if code:
        # OSError chooses FileNotFoundError and its kin by the number.
        raise OSError(code, os.strerror(code), path)


def _link(source: str, target: str) -> None:
    """A second name for a file, or a copy on another file system or of a file of somebody else."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _tree(source: str, target: str) -> None:
    shutil.copytree(source, target, symlinks=True, copy_function=_link, dirs_exist_ok=True)
