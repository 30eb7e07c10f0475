"""One attempt's life: create, stage, run, collect, admit, record, destroy.

One async function of a job, a backend and a recorder, without global state.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import re
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    wait_random_exponential,
)

from metaflow_extensions.sandbox.plugins.settings import flag

from ..admission import internals, results
from ..admission.readers import Readers
from ..admission.text import harmless
from ..admission.text import message as plain
from ..agent.frames import Frame, FrameDecoder
from ..backends.base import Backend, Sandbox, SandboxSpec, renewed
from ..concurrency import blocking, plain_errors, write_all
from ..errors import NO_PLACE, ConnectionLost, ProtocolError, Rejected, SandboxError
from ..manage import ownership
from ..settings import number
from .job import Job
from .logs import Budget, LogRelay
from .quota import Places
from .record import Admitted, Recorder, Verdict
from .stage import Staging, code_mounts
from .store import Parent, parents_of
from .trace import Trace

# The launcher ends the step at its deadline; the provider ends what a dead launcher left.
_LIFETIME_MARGIN = 600.0
_RECONNECT_SECONDS = 120.0
_RECONNECT_PAUSE = 1.0
_TRIES = 5
_PLACE_SECONDS = 1800.0  # that others of an account are waited for
_ACKNOWLEDGE_SECONDS = 0.2
_ACKNOWLEDGE_BYTES = 1 << 20  # a segment of the spool
_COLLECT_SECONDS = 1800.0
_TAIL = 4096
_MISSING_MODULE = re.compile(r"No module named '([A-Za-z_][\w.]{0,100})'")
# Exit codes to which Metaflow's scheduler gives a meaning that a step may not choose.
_RESERVED_CODES = (202, 203)


@dataclass
class Outcome:
    """How the step's process ended, as the agent reports it. Shares the step's trust."""

    rc: int
    signal: int | None = None
    inline: bytes | None = None
    dropped: int = 0
    problem: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, payload: bytes) -> Outcome:
        """Reads an exit frame.

        Raises:
            ProtocolError: it isn't one.
        """
        try:
            end = json.loads(payload)
            inline = base64.b64decode(end["inline"]) if end["inline"] is not None else None
            seconds = {str(k): float(v) for k, v in (end.get("seconds") or {}).items()}
            number = end["signal"]
            return cls(
                rc=_within(end["rc"], 255),
                signal=None if number is None else _within(number, 64),
                inline=inline,
                dropped=_within(end["dropped"], 1 << 62),
                problem=None if end["problem"] is None else str(end["problem"]),
                seconds=seconds,
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            raise ProtocolError("the exit frame is broken", op="stream") from None


def _passes(error: BaseException) -> bool:
    """Whether what was begun may be begun again: it went wrong on the way, not inside."""
    return isinstance(error, ConnectionLost) or (
        isinstance(error, SandboxError) and error.retryable is True
    )


def _reason(error: BaseException) -> str:
    """What an error says; one about this machine's disk names the places to look at."""
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return str(error)
    return (
        "a disk of this machine is full, not the sandbox's: the datastore's, or that of TMPDIR "
        f"({tempfile.gettempdir()}). Make room, or put them elsewhere, and resume."
    )


def _within(number: Any, most: int) -> int:
    if not 0 <= int(number) <= most:
        raise ValueError(number)
    return int(number)


class Failed(Exception):
    """The attempt failed for a reason that the user should read."""


@contextlib.asynccontextmanager
async def _timed(timings: dict[str, float], name: str) -> AsyncIterator[None]:
    start = time.monotonic()
    try:
        yield
    finally:
        timings[name] = time.monotonic() - start


class Attempt:
    """Runs one attempt.

    Args:
        places: where it waits for its sandbox.
        readers: read what a step left, in processes of their own.
        recording: how many attempts may record at once: each has a blob in memory.
        out, err: descriptors that Metaflow's scheduler reads; the caller closes them.
    """

    def __init__(
        self,
        job: Job,
        backend: Backend,
        recorder: Recorder,
        places: Places,
        readers: Readers,
        recording: anyio.CapacityLimiter,
        *,
        out: int,
        err: int,
    ) -> None:
        self.job = job
        self.request, _ = job.request.check(backend)
        self.backend = backend
        self.recorder = recorder
        self._places = places
        self._recording = recording
        self._readers = readers
        self._trace = Trace(job)
        self.timings: dict[str, float] = {}
        #: What is to be said of its sandbox if that lives on; None where it doesn't.
        self.left: str | None = None
        self._python = self.request.executable or backend.interpreter(job.prepared.image)
        self._code: dict[str, Path] = {}  # the mounts that hold no secret
        self._unpacking: list[str] = []  # the beginning of the command that starts the agent
        self._received = 0  # bytes of frames
        self._sandbox: Sandbox | None = None
        self._output_bytes = int(number("MAX_OUTPUT")) << 20
        budget = Budget(self._output_bytes)
        self._err = err
        self._logs = {"o": LogRelay(out, budget), "e": LogRelay(err, budget)}
        self._passed_on = 0  # bytes of output
        self._tail = bytearray()  # of the step's stderr
        self._outcome: Outcome | None = None

    async def run(self, report: Callable[[int], None]) -> None:
        """The whole life. Whatever happens, no sandbox and no file is left behind.

        Args:
            report: gets the exit code as soon as nothing can change it any more, while the
                sandbox is still to be destroyed. Nothing is written to `out` and `err` after.
        """
        job = self.job
        directory = Path(tempfile.mkdtemp(prefix=f"{job.step}-{job.task}-", dir=job.workspace))
        try:
            async with self._places.one(self._say):
                try:
                    code = await self._run(directory)
                    await self._part(failed=code != 0)
                    report(code)
                finally:
                    with anyio.CancelScope(shield=True):
                        await self._destroy()
        finally:
            with anyio.CancelScope(shield=True):
                await blocking(partial(shutil.rmtree, directory, ignore_errors=True))
            self._trace.event("end", timings=self.timings)

    async def _run(self, directory: Path) -> int:
        try:
            async with self._renewed():
                parents = await self._prepare(directory)
                async with self.recorder.alive():
                    outcome = await self._run_step()
                    return await self._finish(outcome, parents, directory)
        except (SandboxError, Rejected, Failed, OSError) as e:
            self._trace.event("failed", error=type(e).__name__)
            await self._say(_reason(e))
            await blocking(self.recorder.fail)
            return 1

    # --- create and stage

    async def _prepare(self, directory: Path) -> list[Parent]:
        """Makes the sandbox, and meanwhile stages its inputs and records the start."""
        job, backend = self.job, self.backend
        store = self.recorder.flow_datastore
        staging = Staging(job, backend, directory)

        def load_package() -> bytes:
            ((_, blob),) = store.load_data([job.package[1]])
            return bytes(blob)

        mounts = {**job.prepared.mounts, staging.inside: directory}

        async def code() -> None:
            async with _timed(self.timings, "code"):
                found = await blocking(
                    partial(code_mounts, job.workspace, job.package[0], load_package, backend)
                )
            mounts.update(found)
            self._code = {**found, **job.prepared.mounts}

        if backend.binds_mounts:
            await code()
        parents: list[Parent] = []

        def stage() -> None:
            parents.extend(parents_of(store, job.input_paths))
            staging.fill(parents, store, self._output_bytes)
            self.recorder.begin(parents)

        async def create() -> None:
            spec = self._spec(mounts)
            self._trace.asked(spec)
            async with _timed(self.timings, "create"):
                self._sandbox = await self._create(spec)
            self._trace.event("created", id=self._sandbox.id, **self._sandbox.facts())

        with plain_errors():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(create)
                if not backend.binds_mounts:
                    tasks.start_soon(code)
                async with _timed(self.timings, "stage"):
                    await blocking(stage)
        # A cancelled group whose own task was in a thread ends as if nothing had been.
        await anyio.lowlevel.checkpoint_if_cancelled()
        self.recorder.facts.update(self._made.facts())
        async with _timed(self.timings, "upload"):
            self._unpacking = await self._upload(mounts)
        return parents

    def _spec(self, mounts: dict[str, Path]) -> SandboxSpec:
        job, request = self.job, self.request
        limits = self.backend.limits()
        memory, disk = request.memory, request.disk
        if not self.backend.hosted:
            memory = memory or int(number("MEMORY")) or None
            disk = disk or int(number("DISK"))
        whole = request.deadline + _LIFETIME_MARGIN
        return SandboxSpec(
            labels={
                "metaflow-flow": job.flow,
                "metaflow-run": job.run,
                "metaflow-step": job.step,
                "metaflow-task": job.task,
                "metaflow-attempt": str(job.attempt),
                **ownership(job.workspace, whole),
            },
            lifetime=self._lifetime(),
            mounts=mounts,
            cpu=request.cpu,
            memory=memory if limits.memory else None,
            disk=disk if limits.disk else None,
            gpu=request.gpu,
            shared_memory=request.shared_memory,
            image=job.prepared.image,
            network=request.network,
            options=request.options,
            python=request.executable,
        )

    async def _create(self, spec: SandboxSpec) -> Sandbox:
        """Creates the sandbox; tries again what is known to be worth it, since no code ran yet."""

        def stop(state: RetryCallState) -> bool:
            error = state.outcome.exception() if state.outcome is not None else None
            if isinstance(error, SandboxError) and error.code == NO_PLACE:
                return (state.seconds_since_start or 0) > _PLACE_SECONDS
            return state.attempt_number >= _TRIES

        async def say(state: RetryCallState) -> None:
            if state.attempt_number == 3 and state.outcome is not None:
                await self._say(f"{state.outcome.exception()} It is tried again.")

        attempts = AsyncRetrying(
            stop=stop,
            wait=wait_random_exponential(multiplier=0.5, max=30),
            retry=retry_if_exception(lambda e: isinstance(e, SandboxError) and e.retryable is True),
            before_sleep=say,
            sleep=anyio.sleep,
            reraise=True,
        )
        return await attempts(self.backend.create, spec)

    async def _upload(self, mounts: dict[str, Path]) -> list[str]:
        """Sends the inputs, again if the connection drops: nothing has run that could notice."""
        attempts = AsyncRetrying(
            stop=stop_after_attempt(_TRIES),
            wait=wait_random_exponential(multiplier=0.5, max=10),
            retry=retry_if_exception(_passes),
            sleep=anyio.sleep,
            reraise=True,
        )
        return await attempts(self._made.upload, mounts)

    def _renewed(self) -> AbstractAsyncContextManager[None]:
        """Keeps the sandbox alive, from when there is one, where its time is bounded."""
        if self.backend.longest_lifetime is None:
            return contextlib.nullcontext()
        return renewed(lambda: self._sandbox, self._lifetime())

    def _lifetime(self) -> float:
        """Seconds that the sandbox is made for."""
        whole = self.request.deadline + _LIFETIME_MARGIN
        return min(whole, self.backend.longest_lifetime or whole)

    @property
    def _made(self) -> Sandbox:
        """The sandbox, which exists from `_prepare` to `_destroy`."""
        if self._sandbox is None:
            raise RuntimeError("there is no sandbox at this point")
        return self._sandbox

    # --- run

    async def _run_step(self) -> Outcome:
        """Runs the agent, passes the step's output on, and waits for its exit frame."""
        deadline = self.request.deadline
        async with _timed(self.timings, "run"):
            try:
                with anyio.fail_after(deadline):
                    if self.backend.limits().stream == "pipe":
                        await self._run_by_pipe()
                    else:
                        await self._run_by_spool()
            except TimeoutError:
                raise Failed(
                    f"the step was ended after {deadline:.0f} s, its limit. "
                    "Give it more with timeout=… or @timeout."
                ) from None
            finally:
                for log in self._logs.values():
                    await log.close()
        if diagnosis := self._diagnosis():
            raise Failed(f"the step failed: {diagnosis}.")
        if self._outcome is None:
            raise Failed(
                "the sandbox ended before the step did, or the step ended the agent. "
                + harmless(bytes(self._tail).decode(errors="replace"), 1000)
            )
        return self._outcome

    def _agent(self, *arguments: str) -> list[str]:
        inbox = self.backend.inbox
        return [self._python, "-I", "-S", f"{inbox}/attempt/agent.py", *arguments]

    def _directories(self) -> tuple[str, str, str]:
        return f"{self.backend.inbox}/attempt", f"{self.backend.inbox}/code", self.backend.work

    async def _run_by_pipe(self) -> None:
        decoder = FrameDecoder(resumable=False)
        argv = self._agent("run", *self._directories())
        await self._made.exec(
            argv, on_stdout=partial(self._frames, decoder), on_stderr=self._keep_errors
        )

    async def _run_by_spool(self) -> None:
        """Starts the agent detached and follows its spool, again whenever the line drops."""
        spool = f"{self.backend.work}/.spool"
        begin = [*self._unpacking, *self._agent("start", *self._directories(), spool)]
        decoder = FrameDecoder()
        stuck_since: float | None = None
        while self._outcome is None:
            before = decoder.seq
            decoder.reconnect()
            code: int | None = None
            # As long as nothing has come, it isn't known whether it was started.
            command = self._agent("follow", spool, str(before)) if before else begin
            try:
                code = await self._follow(command, spool, decoder)
            except SandboxError as e:
                if not _passes(e):
                    raise
                self._trace.event("dropped", error=e.code, seq=decoder.seq)
            if code == 0:
                return  # the spool has ended
            if code is not None and decoder.seq == 0:
                said = harmless(bytes(self._tail).decode(errors="replace"), 1000)
                raise Failed(f"the agent could not be started (exit code {code}): {said}")
            if decoder.seq > before:
                stuck_since = None
            elif stuck_since is None:
                stuck_since = time.monotonic()
            elif time.monotonic() - stuck_since > _RECONNECT_SECONDS:
                return
            await anyio.sleep(_RECONNECT_PAUSE)

    async def _follow(self, command: list[str], spool: str, decoder: FrameDecoder) -> int:
        """Reads the spool from where the decoder stands, and acknowledges what has come."""
        sandbox = self._made

        async def acknowledge() -> None:
            acknowledged = self._received
            while True:
                await anyio.sleep(_ACKNOWLEDGE_SECONDS)
                if self._received - acknowledged >= _ACKNOWLEDGE_BYTES:
                    acknowledged = self._received
                    # Without it the step waits; what it does to its own spool is its loss.
                    with contextlib.suppress(OSError, SandboxError):
                        await sandbox.write_bytes(f"{spool}/ack", b"%d" % decoder.seq)

        with plain_errors():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(acknowledge)
                code = await sandbox.exec(
                    command,
                    on_stdout=partial(self._frames, decoder),
                    on_stderr=self._keep_errors,
                )
                tasks.cancel_scope.cancel()
        return code

    async def _frames(self, decoder: FrameDecoder, data: bytes) -> None:
        self._received += len(data)
        for frame in decoder.feed(data):
            await self._frame(frame)

    async def _frame(self, frame: Frame) -> None:
        self._trace.frame(frame)
        if self._outcome is not None:
            raise ProtocolError("frames go on after the end", op="stream")
        if frame.kind == "x":
            self._outcome = Outcome.parse(frame.payload)
            return
        self._count(frame.payload)
        if frame.kind == "e":
            await self._keep_tail(frame.payload)
        await self._logs[frame.kind].feed(frame.payload)

    def _count(self, output: bytes) -> None:
        """Ends an attempt whose agent doesn't keep to the limit: it was taken over."""
        self._passed_on += len(output)
        if not output or self._passed_on > self._output_bytes:
            raise ProtocolError("more output comes than an agent passes on", op="stream")

    async def _keep_errors(self, data: bytes) -> None:
        """Takes what the agent itself prints."""
        self._count(data)
        await self._keep_tail(data)

    async def _keep_tail(self, data: bytes) -> None:
        self._tail += data
        del self._tail[:-_TAIL]

    def _diagnosis(self) -> str | None:
        return self._sandbox.diagnose() if self._sandbox is not None else None

    # --- collect, admit and record

    async def _finish(self, outcome: Outcome, parents: list[Parent], directory: Path) -> int:
        dropped = outcome.dropped + self._logs["o"].budget.dropped
        if dropped > 0:
            await self._say(
                f"{dropped} bytes of output were dropped: a step may print "
                f"{self._output_bytes >> 20} MB (METAFLOW_SANDBOX_MAX_OUTPUT)."
            )
        exited_well = outcome.rc == 0 and outcome.problem is None
        self._trace.event("exit", code=outcome.rc, signal=outcome.signal, seconds=outcome.seconds)
        delivered = results.Results()
        if outcome.problem is None:
            delivered = await self._collect(outcome, directory)
        explained = False
        if delivered.record is not None:
            async with _timed(self.timings, "read"):
                admitted = await self._admit(parents, delivered, exited_well, directory)
            async with _timed(self.timings, "record"):
                verdict = await self._record(delivered, admitted)
            if verdict.succeeded:
                return 0
            explained = verdict.explained
        else:
            await blocking(self.recorder.fail)
        if not explained:
            await self._say(self._why(outcome))
        if hint := self._hint():
            await self._say(hint)
        code = outcome.rc if 0 < outcome.rc < 256 else 1
        return 1 if code in _RESERVED_CODES else code

    async def _collect(self, outcome: Outcome, directory: Path) -> results.Results:
        """Takes the results out of the exit frame, or out of the sandbox."""
        if outcome.inline is not None:
            content = outcome.inline

            async def inlined() -> AsyncIterator[bytes]:
                yield content

            return await self._receive(inlined, directory / "results")
        # What was packed stays there, so it can be asked for again.
        attempts = AsyncRetrying(
            stop=stop_after_attempt(_TRIES),
            wait=wait_random_exponential(multiplier=0.5, max=10),
            retry=retry_if_exception(_passes),
            sleep=anyio.sleep,
            reraise=True,
        )
        outbox = partial(self._made.read, f"{self.backend.work}/outbox")
        return await attempts(self._receive, outbox, directory / "results")

    async def _receive(
        self, open_stream: Callable[[], AsyncIterator[bytes]], target: Path
    ) -> results.Results:
        await blocking(partial(shutil.rmtree, target, ignore_errors=True))
        target.mkdir(mode=0o700)  # noqa: ASYNC240 - microseconds
        disk = self.request.disk or int(number("DISK"))
        seconds = max(60.0, min(self.request.deadline, _COLLECT_SECONDS))
        async with _timed(self.timings, "collect"):
            try:
                with anyio.fail_after(seconds):
                    return await results.receive(open_stream(), target, disk << 20)
            except TimeoutError:
                raise Failed(f"the step's results did not come within {seconds:.0f} s.") from None
            except OSError as e:
                raise Failed(f"the step's results can't be read: {_reason(e)}") from None

    async def _admit(
        self, parents: list[Parent], delivered: results.Results, well: bool, directory: Path
    ) -> Admitted:
        """Has what the sandbox left read by processes that can be ended, and decides about it."""
        recorder = self.recorder
        if delivered.record is not None:
            claims = await self._readers.claims(delivered.record)
            delivered.objects, delivered.info = claims["objects"], claims["info"]
        items = await blocking(partial(recorder.internals_request, parents, delivered, directory))
        found = internals.Delivered(await self._readers.read(items))
        return await blocking(partial(recorder.decide, parents, delivered, found, exited_well=well))

    async def _record(self, delivered: results.Results, admitted: Admitted) -> Verdict:
        limit = int(number("MAX_ARTIFACT")) << 20
        blobs = delivered.delivered(sorted(admitted.decision.new))
        async with self._recording, self._readers.contents(blobs, limit) as contents:
            return await blocking(
                partial(self.recorder.finish, delivered, admitted, contents, limit)
            )

    def _why(self, outcome: Outcome) -> str:
        if outcome.problem:
            return f"the agent could not run the step: {harmless(outcome.problem)}"
        if outcome.signal is not None:
            names = {s.value: s.name for s in signal.Signals}
            name = names.get(outcome.signal, "a real-time signal")
            return f"the step was ended by signal {outcome.signal} ({name})."
        if outcome.rc == 0:
            return (
                "the step's process ended with exit code 0 before Metaflow could record its "
                "results, or that it is done (does it call exit?)."
            )
        return f"the step's process ended with exit code {outcome.rc}."

    def _hint(self) -> str | None:
        """What to write when a package is missing inside, with the host's version."""
        found = _MISSING_MODULE.findall(bytes(self._tail).decode(errors="replace"))
        if not found:
            return None
        module = found[-1].partition(".")[0]
        names = packages_distributions().get(module, [module])
        package = names[0]
        if self.job.python is not None:
            here = f'Add it to the step\'s own: packages={{"{package}": "…"}}.'
        else:
            here = (
                f'Name it for the step, @pypi(packages={{"{package}": "…"}}), and run with '
                "--environment=pypi."
            )
        try:
            number = version(package)
        except PackageNotFoundError:
            return (
                f"the sandbox has no package {module!r}, and neither has this environment. {here}"
            )
        said = f"the sandbox has no package {module!r}; here it is {package}=={number}. "
        if self.job.python is None and self.job.prepared.image is None:
            said += (
                "Sandboxes see packages that are installed in this Python environment, not "
                f"editable installs or PYTHONPATH: pip install {package}=={number}. Or: "
            )
        return said + here.replace("…", number)

    async def _part(self, failed: bool) -> None:
        """Says what the user should know of the sandbox, and keeps it if asked to."""
        if self._sandbox is not None:
            for remark in self._sandbox.remarks():
                await self._say(harmless(remark))
            if failed and self.request.keep:
                try:
                    how = await self._sandbox.keep(self._code)
                    await self._say(f"the step's files were kept. Look at them with: {how}")
                except (SandboxError, OSError, TimeoutError) as e:
                    await self._say(f"the step's files could not be kept: {harmless(str(e))}")
        if flag("TIMINGS"):
            await self._say(json.dumps(self.timings))
        if self._trace.directory is not None:
            await self._say(f"what this attempt did is in {self._trace.directory}")

    async def _destroy(self) -> None:
        if self._sandbox is not None:
            sandbox, self._sandbox = self._sandbox, None
            self._trace.event("destroy")
            self.left = (
                f"a sandbox of {self.backend.name}, {sandbox.id}, could not be ended, and may live "
                f"for {self._lifetime() / 60:.0f} minutes: metaflow-sandbox kill {sandbox.id}"
            )
            async with _timed(self.timings, "destroy"):
                try:
                    await sandbox.destroy()
                except Exception as e:
                    raise SandboxError(
                        f"{self.left} ({e})", code="not_destroyed", op="destroy"
                    ) from e
                self.left = None

    async def _say(self, message: str) -> None:
        # Whatever it is made of: an error may quote what came from a sandbox.
        lines = "".join(f"[sandbox] {line}\n" for line in plain(message).split("\n"))
        await write_all(self._err, lines.encode())
