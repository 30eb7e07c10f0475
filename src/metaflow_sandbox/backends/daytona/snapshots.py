"""What sandboxes are made from: snapshots, made once by what is in them.

A snapshot's name follows from its content, so that every launcher finds what another made.
Daytona builds it: a launcher that comes later, or one that was killed, changes nothing.
"""

from __future__ import annotations

import contextlib
import functools
import math
import shlex
import urllib.request
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio

from ...errors import NotEnforceable, SandboxError
from ...text import printable
from ..answers import ANSWER
from ..base import Recipe, Sandbox, Say
from . import client, faults

if TYPE_CHECKING:
    from daytona import AsyncDaytona, Image

PREFIX = "metaflow-sandbox-"
BUILD_SECONDS = 3600.0
_POLL_SECONDS = (0.25, 5.0)
_CHECK = (
    "import sys; sys.version_info >= (3, 8) or sys.exit('Python %d.%d is too old' % "
    "sys.version_info[:2])"
)
_LOG_KEPT = 15
_FAILED = ("error", "build_failed")


@dataclass(frozen=True)
class Size:
    """What a sandbox has, in Daytona's units: CPUs, GB, GB, GPUs. None: Daytona's default."""

    cpu: int | None = None
    memory: int | None = None
    disk: int | None = None
    gpu: int | None = None

    @classmethod
    def of(cls, asked: Any) -> Size:
        """The smallest that has at least what a recipe or a spec asks for."""

        def up(value: float | None, unit: int = 1) -> int | None:
            return None if value is None else math.ceil(value / unit)

        return cls(up(asked.cpu), up(asked.memory, 1024), up(asked.disk, 1024), asked.gpu)

    @property
    def given(self) -> dict[str, Any]:
        found = {"cpu": self.cpu, "memory": self.memory, "disk": self.disk, "gpu": self.gpu}
        return {name: value for name, value in found.items() if value is not None}

    def rounded(self, asked: Any) -> str | None:
        """A sentence where it is more than what was asked."""
        parts = []
        if self.cpu is not None and self.cpu != asked.cpu:
            parts.append(f"cpu={asked.cpu:g} is {self.cpu}")
        for name in ("memory", "disk"):
            value = getattr(self, name)
            if value is not None and value << 10 != getattr(asked, name):
                parts.append(f"{name}={getattr(asked, name)} MB is {value} GB")
        if not parts:
            return None
        return f"{', '.join(parts)}: Daytona has whole CPUs and gigabytes."


def name_of(recipe: Recipe, size: Size, image: str) -> str:
    """A snapshot's name. Blocking, as it reads the recipe's files."""
    sizes = [f"{k}={v}" for k, v in sorted(size.given.items())]
    return PREFIX + recipe.key(image, *sizes)


def definition(recipe: Recipe, image: str) -> Image:
    """An image and what prepares it, as the SDK has it: the lines of a Dockerfile."""
    from daytona import Image

    made = Image.base(image)
    # An image may have an ordinary user of its own; `setup` is promised root.
    made = made.dockerfile_commands(["USER root"])
    for command in recipe.setup:
        made = made.run_commands(f"sh -c {shlex.quote(command)}")
    return made.run_commands(f"python3 -c {shlex.quote(_CHECK)}")


async def find(sdk: AsyncDaytona, name: str) -> Any:
    """A snapshot by its name."""
    try:
        return await client.call("prepare", functools.partial(sdk.snapshot.get, name), again=True)
    except TimeoutError:
        raise faults.explain(TimeoutError("no answer"), "prepare", client.url()) from None
    except Exception as e:
        if faults.status_of(e) == 404:
            return None
        raise faults.explain(e, "prepare", client.url()) from e


async def usable(sdk: AsyncDaytona, name: str, say: Say) -> Any:
    """A snapshot that sandboxes can be made from, waited for and waked up if need be.

    Returns:
        None if there is none, or only one whose making failed.
    """
    waked = said = False
    with anyio.fail_after(BUILD_SECONDS):
        async for _ in waiting():
            snapshot = await find(sdk, name)
            if snapshot is None:
                return None
            state = snapshot.state.value
            if state == "active":
                return snapshot
            if state in _FAILED:
                return None
            if state == "inactive" and not waked:
                waked = True
                await say(f"the snapshot {name} was not used for a while: waking it up.")
                with contextlib.suppress(Exception):  # another launcher may be as far
                    activate = functools.partial(sdk.snapshot.activate, snapshot)
                    await client.call("prepare", activate, again=True)
            elif not said:
                said = True
                await say(f"waiting for the snapshot {name}, which is {state}.")
    return None


async def waiting() -> AsyncIterator[None]:
    pause, longest = _POLL_SECONDS
    while True:
        yield
        await anyio.sleep(pause)
        pause = min(pause * 1.5, longest)


async def make(
    sdk: AsyncDaytona, name: str, recipe: Recipe, size: Size, image: str, say: Say
) -> None:
    """Makes a snapshot, or waits for whoever makes it now.

    Raises:
        SandboxError: it can't be made, with the end of its log.
    """
    for _ in range(2):
        if await usable(sdk, name, say):
            return
        await forget_failed(sdk, name)
        try:
            await _build(sdk, name, recipe, size, image, say)
        except Exception as e:
            if faults.status_of(e) != 409:
                raise
        else:
            return
    if not await usable(sdk, name, say):
        raise SandboxError(f"the snapshot {name} could not be made.", op="prepare")


async def _build(
    sdk: AsyncDaytona, name: str, recipe: Recipe, size: Size, image: str, say: Say
) -> None:
    from daytona import CreateSnapshotParams, Resources

    what = await anyio.to_thread.run_sync(definition, recipe, image)
    resources = Resources(**size.given) if size.given else None
    params = CreateSnapshotParams(name=name, image=what, resources=resources)
    await say(f"making a snapshot of {image} ({name}). This is done once.")
    send, receive = anyio.create_memory_object_stream[str](1000)
    log: list[str] = []

    def on_logs(text: str) -> None:
        with contextlib.suppress(anyio.WouldBlock):
            send.send_nowait(text)

    async def tell() -> None:
        async for text in receive:
            for line in _lines(text):
                log.append(line)
                del log[:-_LOG_KEPT]
                await say(line)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tell)
        problem: Exception | None = None
        with send:
            try:
                create = functools.partial(sdk.snapshot.create, params, on_logs=on_logs, timeout=0)
                await client.call("prepare", create, seconds=BUILD_SECONDS)
            except Exception as e:
                problem = e
    if problem is None:
        return
    if faults.status_of(problem) is None and not isinstance(problem, TimeoutError):
        said = "\n".join(await _log_of(sdk, name) or log)
        hint = " It needs a python3, 3.8 or later, on its PATH." if "python3" in said else ""
        raise SandboxError(
            f"image={image!r}: Daytona could not make a snapshot of it: "
            f"{faults.words(problem)}.{hint}\n{said}",
            code="image_failed",
            op="prepare",
            retryable=False,
        ) from problem
    if faults.status_of(problem) == 409:
        raise problem
    raise faults.explain(problem, "prepare", client.url()) from problem


async def forget_failed(sdk: AsyncDaytona, name: str) -> None:
    """Removes what another launcher failed to make: it may succeed now, if a registry was away."""
    failed = await find(sdk, name)
    if failed and failed.state.value in _FAILED:
        with contextlib.suppress(Exception):
            await client.call("prepare", functools.partial(sdk.snapshot.delete, failed))


async def install(sandbox: Sandbox, recipe: Recipe, say: Say) -> None:
    """Brings a recipe's files into a sandbox, runs its installation, and takes them away.

    Raises:
        SandboxError: the installation failed, with the end of what it printed.
    """
    files = await recipe.fetched()
    directories = {inside: path for inside, path in files.items() if path.is_dir()}
    if directories:
        await sandbox.deliver(directories)
    for inside, path in files.items():
        if inside not in directories:
            async with await anyio.open_file(path, "rb") as file:
                await sandbox.write(inside, _pieces(file))
    log: list[str] = []

    async def tell(data: bytes) -> None:
        for line in _lines(data.decode(errors="replace")):
            log.append(line)
            del log[:-_LOG_KEPT]
            await say(line)

    await say(f"installing what the step needs ({shlex.join(recipe.install)[:80]}).")
    code = await sandbox.exec(
        recipe.install, cwd="/", on_stdout=tell, on_stderr=tell, timeout=BUILD_SECONDS
    )
    if code != 0:
        raise SandboxError(
            f"the installation failed with exit code {code}.\n" + "\n".join(log),
            code="install_failed",
            op="prepare",
            retryable=False,
        )
    # Not all of the working directory: a step's environment is in there.
    gone = [
        *files,
        *(f"{sandbox.backend.work}/{name}" for name in (".inputs", ".inputs.lock")),
    ]
    await sandbox.exec(["rm", "-rf", "--", *gone], cwd="/")


async def _pieces(file: anyio.AsyncFile[bytes]) -> AsyncIterator[bytes]:
    while piece := await file.read(1 << 20):
        yield piece


def _lines(text: str) -> list[str]:
    """What a build printed, without what would steer a terminal."""
    return [printable(line).rstrip() for line in text.splitlines() if line.strip()]


async def _log_of(sdk: AsyncDaytona, name: str) -> list[str]:
    """The end of a build's log: the SDK shows none of one that failed within a second."""
    from daytona_api_client_async import SnapshotsApi

    asked = SnapshotsApi(client.api(sdk))
    headers = client.api(sdk).default_headers

    def fetch(url: str) -> bytes:
        request = urllib.request.Request(url, headers=headers)  # noqa: S310 - the API's own
        with urllib.request.urlopen(request, timeout=client.CALL_SECONDS) as answer:  # noqa: S310
            kept = b""
            while piece := answer.read(ANSWER):
                kept = (kept + piece)[-ANSWER:]
            return kept

    with contextlib.suppress(Exception), anyio.fail_after(client.CALL_SECONDS):
        snapshot = await asked.get_snapshot(name)
        where = await asked.get_snapshot_build_logs_url(snapshot.id)
        text = await anyio.to_thread.run_sync(fetch, where.url, abandon_on_cancel=True)
        return _lines(text.decode(errors="replace"))[-_LOG_KEPT:]
    return []


def refuse_with_snapshot(recipe_or_spec: Any, size: Size) -> None:
    """A snapshot that the user names has its size and content.

    Raises:
        NotEnforceable: something else was asked too.
    """
    asked: Mapping[str, Any] = {
        **size.given,
        "image": recipe_or_spec.image,
        "setup": getattr(recipe_or_spec, "setup", ()) or getattr(recipe_or_spec, "install", ()),
    }
    for name in (k for k, v in asked.items() if v):
        raise NotEnforceable(
            f"{name} can't be had together with snapshot=, which decides it. Leave one out.",
            op="prepare",
            retryable=False,
        )
