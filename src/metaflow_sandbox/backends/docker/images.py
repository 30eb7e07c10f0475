"""Brings images to the engine, and makes those that `setup` and packages ask for."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.from_thread
from platformdirs import user_cache_path

from ...concurrency import interruptible
from ...errors import SandboxError
from ...leases import alone, here, living
from ...text import printable
from .. import build as builds
from ..base import Recipe, Say
from .engine import NO_SPACE, BadImage, Engine, explain, explain_pull

if TYPE_CHECKING:
    from . import Docker
    from .sandbox import DockerSandbox

#: What images of ours are called, with `Recipe.key` as their tag.
REPOSITORY = "metaflow-sandbox"
#: In the place of what is on a container of ours (`sandbox.MADE`).
_MADE = "metaflow-sandbox-made=image"
#: Of an image for one run alone: where its lease is, and the name of that.
_ONCE = "metaflow-sandbox-once"
_SAY_SECONDS = 10.0
_SWEEP_SECONDS = 60
_TAIL = 2000
_SETUP = {"HOME": "/root", "TMPDIR": "/tmp", "DEBIAN_FRONTEND": "noninteractive"}


async def get(engine: Engine, name: str, say: Say) -> dict[str, Any]:
    """What the engine knows of an image, which is pulled if it isn't there.

    Raises:
        BadImage: it can't be had, with what to do.
    """
    found = await engine.image(name)
    if found is None:
        await say(f"the image {name} is pulled, once.")
        await interruptible(partial(_pull, engine, name, say))
        found = await engine.image(name)
        if found is None:
            raise BadImage(f"image={name!r} was pulled and is not there", op="prepare")
        await say(f"the image {name} is {_digest(found)}.")
    return found


def _digest(image: dict[str, Any]) -> str:
    digests = image.get("RepoDigests") or []
    return str(digests[0] if digests else image["Id"])


async def _say(say: Say, text: str) -> None:
    await say(text)


def _pull(engine: Engine, name: str, say: Say) -> None:
    """Pulls an image, in a thread, and says from time to time how far it is."""
    layers: dict[str, bool] = {}
    lines: list[str] = []
    said = time.monotonic()
    with subprocess.Popen(
        [engine.program, "pull", "--", name],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None  # noqa: S101 - for type checkers
        for raw in process.stdout:
            line = raw.decode(errors="replace").strip()
            lines = [*lines[-9:], line]
            layer, _, state = line.partition(": ")
            if state in ("Pulling fs layer", "Pull complete", "Already exists"):
                layers[layer] = state != "Pulling fs layer"
            if time.monotonic() - said > _SAY_SECONDS:
                said = time.monotonic()
                there = sum(layers.values())
                text = f"pulling {name}: {there} of {len(layers)} layers are there."
                anyio.from_thread.run(_say, say, text)
    if process.returncode != 0:
        raise explain_pull(name, lines)


async def make(
    backend: Docker, name: str, image: dict[str, Any], recipe: Recipe, say: Say
) -> dict[str, Any]:
    """The image of a recipe, made of another one if nobody made it before.

    What `setup` gives is an image of its own, which other installations begin with.

    Raises:
        BadImage: a command failed, with the end of what it printed.
    """
    if recipe.setup:

        async def set_up(sandbox: DockerSandbox) -> None:
            for command in recipe.setup:
                await say(f"setup: {command}")
                await _run(sandbox, ["sh", "-c", command], name)

        # It is no environment, so it stays where those are made anew.
        alone = replace(recipe, files={}, install=(), prefix=None, contents="", rebuild=False)
        image = await _once(backend, image, alone, True, set_up)
    if recipe.install:

        async def install(sandbox: DockerSandbox) -> None:
            async with builds.announced(recipe, say):
                files = await recipe.fetched()
                for inside, source in files.items():
                    await _copy(sandbox, inside, source)
                try:
                    await builds.install(sandbox, recipe)
                except builds.BuildFailed as e:
                    raise builds.BuildFailed(_with_remedy(str(e)), op="prepare") from None
            await _run(sandbox, ["rm", "-rf", "--", *files], name)

        image = await _once(backend, image, replace(recipe, setup=()), False, install)
    return image


async def _once(
    backend: Docker,
    image: dict[str, Any],
    recipe: Recipe,
    network: bool,
    build: Callable[[DockerSandbox], Awaitable[None]],
) -> dict[str, Any]:
    """What an image becomes by `build`, which whoever needs it first has done to a container."""
    engine = backend.engine
    key = await anyio.to_thread.run_sync(recipe.key, image["Id"], *filter(None, (recipe.once,)))
    tag = f"{REPOSITORY}:{key}"
    locks = Path(user_cache_path("metaflow-sandbox")) / "docker"
    locks.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(locks / f"{key}.lock", "w") as lock:  # noqa: ASYNC230 - a file of this machine
        await alone(lock.fileno())
        made = before = await engine.image(tag)
        if made is not None and (not recipe.rebuild or tag in backend.rebuilt):
            return made
        sandbox = await backend.create_to_commit(image, recipe.options, network)
        try:
            await build(sandbox)
            labels = f"{_MADE} {_ONCE}={here()}/{recipe.once}" if recipe.once else _MADE
            words = ["commit", "--pause=false", f"--change=LABEL {labels}", sandbox.id, tag]
            answer = await engine.call(*words, seconds=builds.SECONDS)
            if answer.code != 0:
                raise explain(answer.said, "prepare")
            backend.rebuilt.add(tag)
            if before is not None:
                await engine.call("rmi", before["Id"])  # unless it is in use
        finally:
            with anyio.CancelScope(shield=True):
                await sandbox.destroy()
        made = await engine.image(tag)
    if made is None:
        raise SandboxError(f"the image {tag} was made and is not there", op="prepare")
    return made


async def discard(engine: Engine, image: dict[str, Any]) -> None:
    """Removes what `make` made for one run."""
    await engine.call("rmi", "--force", image["Id"])


def sweep(engine: Engine) -> None:
    """Removes what was made for one run each, of those of this user here that have ended.

    Raises:
        SandboxError, OSError, subprocess.TimeoutExpired: it can't be known, or done.
    """

    def call(*words: str) -> bytes:
        return subprocess.run(
            [engine.program, *words],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=_SWEEP_SECONDS, check=False,
        ).stdout  # fmt: skip

    # Those that were made of others come first.
    if ids := call("images", "--quiet", "--no-trunc", "--filter", f"label={_ONCE}").split():
        ours = f"{here()}/"
        owners = {ours + path.name for path in living("run")}
        for image in json.loads(call("image", "inspect", *map(bytes.decode, ids)) or b"[]"):
            owner = image["Config"]["Labels"][_ONCE]
            if owner.startswith(ours) and owner not in owners:
                call("rmi", image["Id"])  # unless it is in use


def _with_remedy(said: str) -> str:
    """What a build said. It has no disk of its own, but the engine's."""
    return f"{said}\n{NO_SPACE}" if "no space left on device" in said.lower() else said


async def _run(sandbox: DockerSandbox, argv: list[str], name: str) -> None:
    tail = bytearray()

    async def keep(data: bytes) -> None:
        tail.extend(data)
        del tail[:-_TAIL]

    try:
        code = await sandbox.exec(
            argv, cwd="/", env=_SETUP, on_stdout=keep, on_stderr=keep, timeout=builds.SECONDS
        )
    except TimeoutError:
        raise BadImage(
            f"image={name!r} can't be prepared: `{argv[-1]}` did not end within "
            f"{builds.SECONDS / 60:.0f} minutes.",
            op="prepare",
            retryable=False,
        ) from None
    if code != 0:
        text = tail.decode(errors="replace").strip()
        text = _with_remedy(printable(text))
        raise BadImage(
            f"image={name!r} can't be prepared: `{argv[-1]}` exits with {code}. "
            f"It ran as root; setup has the internet through an HTTP proxy alone.\n{text}",
            op="prepare",
            retryable=False,
        )


async def _copy(sandbox: DockerSandbox, inside: str, source: Path) -> None:
    """Copies a file, or the files of a directory, into a container."""
    for path in await anyio.to_thread.run_sync(_files, source):

        async def pieces(path: Path = path) -> AsyncIterator[bytes]:
            async with await anyio.open_file(path, "rb") as file:
                while piece := await file.read(1 << 20):
                    yield piece

        target = inside if path == source else f"{inside}/{path.relative_to(source)}"
        await sandbox.write(target, pieces())


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    return [Path(top, name) for top, _, names in os.walk(source) for name in names]
