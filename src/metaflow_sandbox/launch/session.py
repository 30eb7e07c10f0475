"""What the sandboxed steps of one run share in the scheduler's process."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.from_thread

from .. import cache, environments
from ..admission.text import harmless
from ..backends import registry
from ..backends.base import Backend, Preflight, Prepared, Recipe, SandboxSpec, Say
from ..concurrency import interruptible, plain_errors
from ..errors import BackendUnavailable, NotEnforceable, SandboxError
from ..leases import Lease, living
from ..manage import ownership
from . import client
from .job import save_prepared
from .progress import shown
from .quota import quota_of
from .request import Request
from .stage import withhold

T = TypeVar("T")

_END_SECONDS = 30.0
_MAKING_SECONDS = 86400.0  # longer than anything is made for; its provider ends it much sooner
_NAMED = 5
_LOOK_SECONDS = 120.0
_LOOK = (
    "import ctypes, platform, sys, zlib; assert sys.version_info >= (3, 8), sys.version; "
    "print(platform.machine(), sys.executable, '%d.%d.%d' % sys.version_info[:3], sep='\\n')"
)


class Session:
    """Made before the first task starts, closed when the run ends.

    Attributes:
        workspace: the run's directory on this machine; launchers put theirs below it.
        package: (metadata, sha, url) of the uploaded code package, once there is one.
        backends: {step: name of its backend}.

    Args:
        flow: its name.
        with_specs: the decorators that `--with` gave to any step.
    """

    def __init__(self, flow: str, with_specs: Sequence[str]) -> None:
        self._flow = flow
        living("run")  # which removes what was left behind by those that were killed
        self.workspace = Lease("run")
        options = "\0".join([str(os.getpid()), *with_specs])
        (self.workspace.path / "supervisor.options").write_text(options)
        self.package: tuple[str, str, str] | None = None
        self.backends: dict[str, str] = {}
        self._loaded: dict[str, Backend] = {}
        self._preflights: dict[str, Preflight] = {}
        self._said: set[str] = set()
        self._log: Callable[..., None] = lambda *_, **__: None
        self._discarded: set[Path] = set()
        self._discards: list[Callable[[], Awaitable[None]]] = []
        self._looked: dict[tuple[str, str | None, str], environments.Inside] = {}

    def admit(
        self, step: str, request: Request, environment: Any, logger: Callable[..., None]
    ) -> None:
        """Chooses a step's backend, makes sure that it works here, and gets ready what it needs.

        Args:
            environment: Metaflow's, with the step's @conda and @pypi.

        Raises:
            BackendUnavailable: it doesn't, with the commands that mend it.
            NotEnforceable: it can't do what the step asks for.
            SandboxError: its image can't be used.
            InvalidParameter: `env` names a variable that isn't set.
        """
        self._log = logger
        request.variables()
        backend, preflight = self._choose(request)
        _, notes = request.check(backend)
        quota_of(backend)

        def log(line: str) -> None:
            logger(f"[sandbox] {line}", system_msg=True)

        with shown(step, log) as say:
            prepare = partial(self._prepare, step, request, environment, backend, say)
            prepared, python = anyio.run(_until_ended, prepare)
        save_prepared(self.workspace.path, step, prepared, python)
        self.backends[step] = backend.name
        lines = [f"Steps run in sandboxes of {preflight.provider}."]
        lines += [f"{backend.name}: {note}" for note in preflight.notes]
        lines += [f"Step {step}: {note}" for note in notes]
        for line in lines:
            if line not in self._said:
                self._said.add(line)
                log(line)

    async def _make(self, backend: Backend, recipe: Recipe, say: Say) -> Prepared:
        """What a backend makes of a recipe; the end of the run discards what is for it alone."""
        made = await backend.prepare(recipe, say)
        if made.discard is not None:
            self._discards.append(made.discard)
        return made

    async def _prepare(
        self, step: str, request: Request, environment: Any, backend: Backend, say: Say
    ) -> tuple[Prepared, str | None]:
        """What the step's sandboxes are made from, and its Python where that is its own."""

        def tell(line: str) -> None:
            async def told() -> None:
                await say(line)

            anyio.from_thread.run(told)

        force = bool(getattr(environment, "_force_rebuild", False))
        alone = request.cache is False
        plain = Recipe(
            request.image,
            request.setup,
            options=request.options,
            cpu=request.cpu,
            memory=request.memory,
            disk=request.disk,
            gpu=request.gpu,
            python=request.executable,
            labels={
                "metaflow-flow": self._flow,
                "metaflow-step": step,
                **ownership(self.workspace.path, _MAKING_SECONDS),
            },
            once=self.workspace.path.name if alone else "",
            # What a provider keeps can't be replaced while others may use it.
            rebuild=force and not alone and not backend.keeps_builds,
        )
        if environment.TYPE == "local" and not request.executable:
            return await self._make(backend, plain, say), None
        beneath = plain if environment.TYPE == "local" else backend.beneath(plain)
        inside = await self._inside(beneath, request.executable, backend, say)
        found = await interruptible(partial(environments.resolve, environment, step, inside, tell))
        if found is None:
            return await self._make(backend, plain, say), None
        if force and backend.keeps_builds:
            await say(
                f"--force-rebuild-environments resolves anew; {backend.name} goes on with what it "
                "has of the same content"
            )
        recipe = found.recipe(beneath, backend, self.workspace.path)
        prepared = await self._make(backend, recipe, say)
        if alone:
            self._discarded.update(prepared.mounts.values())
        return prepared, found.python(backend)

    async def _inside(
        self, plain: Recipe, executable: str | None, backend: Backend, say: Say
    ) -> environments.Inside:
        """The Python that the step's sandboxes have of themselves, asked in one.

        Raises:
            SandboxError: it is none.
        """
        prepared = await self._make(backend, plain, say)
        python = executable or backend.interpreter(prepared.image)
        asked = (backend.name, prepared.image, python)
        if found := self._looked.get(asked):
            return found
        spec = SandboxSpec(
            labels=plain.labels,
            lifetime=_LOOK_SECONDS,
            image=prepared.image,
            network=backend.least_network(),
            options=plain.options,
            python=executable,
        )
        try:
            sandbox = await backend.create(spec)
        except NotEnforceable:
            if backend.least_network() == spec.network:
                raise
            sandbox = await backend.create(replace(spec, network=backend.least_network()))
        try:
            done = await sandbox.run([python, "-I", "-S", "-c", _LOOK], timeout=_LOOK_SECONDS)
        finally:
            with anyio.CancelScope(shield=True):
                await sandbox.destroy()
        words = done.stdout.decode(errors="replace").splitlines()
        if done.exit_code != 0 or len(words) != 3:
            said = harmless(done.stderr[-300:].decode(errors="replace")).strip()
            where = f"the image {plain.image!r}" if plain.image else f"sandboxes of {backend.name}"
            raise SandboxError(
                f"{python} is no Python in {where} that can run a step: it has to be 3.8 or later, "
                f"with zlib and ctypes. {said or 'It says nothing'}.\n"
                "Name another by executable=….",
                op="look",
            )
        found = environments.Inside(*words)
        self._looked[asked] = found
        return found

    def _choose(self, request: Request) -> tuple[Backend, Preflight]:
        if request.backend:
            backend = self._load(request.backend)
            return backend, self._preflight(backend)
        problems = []
        for name in registry.local_order():
            try:
                backend = self._load(name)
                return backend, self._preflight(backend)
            except BackendUnavailable as e:
                problems.append(f"{name}: {e}")
        raise BackendUnavailable(
            "no local backend works on this machine, and a step is never run without one.\n"
            + "\n".join(problems),
            op="preflight",
        )

    def _load(self, name: str) -> Backend:
        """The one instance of a run, which knows what it has made for it."""
        if name not in self._loaded:
            self._loaded[name] = registry.load(name)
        return self._loaded[name]

    def _preflight(self, backend: Backend) -> Preflight:
        if backend.name not in self._preflights:
            self._preflights[backend.name] = anyio.run(backend.preflight)
        return self._preflights[backend.name]

    def pack(
        self,
        package: tuple[str, str, str],
        members: Iterable[tuple[str, str]],
        logger: Callable[..., None],
    ) -> None:
        """Takes over the uploaded code package, and says which of the user's files stay out.

        Args:
            members: (path, name in the package) of these files.
        """
        self.package = package
        if names := withhold(self.workspace.path, members):
            shown = ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
            logger(
                f"[sandbox] Not in any sandbox: {shown}. Links lead there from outside of the "
                "flow's directory. Copy what a sandboxed step needs into it.",
                system_msg=True,
            )

    def client(self) -> list[str]:
        """The command that runs an attempt; the task's own follows it."""
        return [sys.executable, "-I", "-S", client.__file__, str(self.workspace.path)]

    def close(self) -> None:
        """Ends the supervisor, and removes the run's directory."""
        left = client.end(str(self.workspace.path), _END_SECONDS)
        for line in left.splitlines():
            self._log(f"[sandbox] {harmless(line)}", system_msg=True)
        self.workspace.release()
        for path in self._discarded:
            cache.discard(path)
        for discard in reversed(self._discards):  # what was made of another first
            with contextlib.suppress(SandboxError, OSError):
                anyio.run(discard)
        for name in set(self.backends.values()):
            self._load(name).sweep()


async def _until_ended(prepare: Callable[[], Awaitable[T]]) -> T:
    """Does it, and ends what it made if this process is asked to end meanwhile.

    SIGINT is taken from asyncio too, whose way to cancel heeds no shield.

    Raises:
        KeyboardInterrupt, SystemExit: it was asked to.
    """
    asked = 0

    async def wait_for_signals() -> None:
        nonlocal asked
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup's
            numbers.append(signal.SIGHUP)
        with anyio.open_signal_receiver(*numbers) as signals:
            async for number in signals:
                asked = number
                tasks.cancel_scope.cancel()

    with plain_errors():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait_for_signals)
            prepared = await prepare()
            tasks.cancel_scope.cancel()
    if asked == signal.SIGINT:
        raise KeyboardInterrupt
    if asked:
        raise SystemExit(128 + asked)
    return prepared
