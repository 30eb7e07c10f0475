"""Builds what a `Recipe` installs, in a sandbox: packages run code when they are installed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from functools import partial
from pathlib import Path

import anyio

from .. import cache
from ..concurrency import blocking
from ..errors import SandboxError
from ..settings import number
from ..text import printable
from .base import Backend, Recipe, Sandbox, SandboxSpec, Say

SECONDS = 3600.0
_TAIL = 4000  # characters of what a failed build said
_PACK = """
import os, sys, tarfile
with tarfile.open(sys.argv[2], "w:gz", compresslevel=1) as archive:
    for name in sorted(os.listdir(sys.argv[1])):
        archive.add(os.path.join(sys.argv[1], name), arcname=name)
"""


class BuildFailed(SandboxError):
    """The packages could not be installed."""

    code = "build_failed"


def spec(backend: Backend, recipe: Recipe, files: Mapping[str, Path]) -> SandboxSpec:
    """A sandbox to build in: without a network, where the backend can do that."""
    return SandboxSpec(
        labels={"purpose": "build"},
        lifetime=min(SECONDS + 600, backend.longest_lifetime or SECONDS + 600),
        mounts=files,
        memory=memory(backend),
        image=recipe.image,
        network=backend.least_network(),
        options=recipe.options,
    )


def memory(backend: Backend) -> int | None:
    """MB that a build may have, where the backend can limit it."""
    return int(number("MEMORY")) or None if backend.limits().memory else None


async def install(sandbox: Sandbox, recipe: Recipe) -> None:
    """Runs the recipe's command.

    Raises:
        BuildFailed: it failed, with the end of what it said.
    """
    tail = bytearray()

    async def keep(data: bytes) -> None:
        tail.extend(data)
        del tail[:-_TAIL]

    try:
        code = await sandbox.exec(recipe.install, on_stdout=keep, on_stderr=keep, timeout=SECONDS)
    except TimeoutError:
        raise BuildFailed(
            f"the environment ({recipe.title}) was not built within {SECONDS / 60:.0f} minutes.",
            op="prepare",
        ) from None
    if code != 0:
        said = printable(tail.decode(errors="replace"))
        why = sandbox.diagnose() or f"the installation exited with {code}:\n{said.strip()}"
        raise BuildFailed(
            f"the environment ({recipe.title}) could not be built: {why}", op="prepare"
        )


@contextlib.asynccontextmanager
async def announced(recipe: Recipe, say: Say) -> AsyncIterator[None]:
    """Says that a build begins, and that it has ended well."""
    await say(f"its environment is built, once: {recipe.title}.")
    start = time.monotonic()
    yield
    await say(f"its environment was built in {time.monotonic() - start:.0f} s.")


async def archived(backend: Backend, recipe: Recipe, say: Say) -> dict[str, Path]:
    """What the recipe installs, as a mount: an archive in this machine's cache.

    Nothing of it is unpacked here.
    """
    prefix = recipe.prefix or ""
    key = await blocking(partial(recipe.key, backend.name))

    async def make(new: Path) -> str:
        async with announced(recipe, say):
            files = await recipe.fetched()
            sandbox = await backend.create(spec(backend, recipe, files))
            try:
                await sandbox.deliver(files)
                await install(sandbox, recipe)
                inside = f"{backend.work}/.environment.tar.gz"
                python = backend.interpreter(recipe.image)
                done = await sandbox.run([python, "-I", "-S", "-c", _PACK, prefix, inside])
                if done.exit_code != 0:
                    raise BuildFailed(
                        f"the environment ({recipe.title}) could not be packed: "
                        f"{done.stderr[-500:].decode(errors='replace')}",
                        op="prepare",
                    )
                await _copy(sandbox, inside, new / cache.ARCHIVE)
            finally:
                with anyio.CancelScope(shield=True):
                    await sandbox.destroy()
        return recipe.title

    return {prefix: (await cache.get(key, make, say, recipe.rebuild)) / cache.ARCHIVE}


async def _copy(sandbox: Sandbox, inside: str, target: Path) -> None:
    with open(target, "wb") as file:  # noqa: ASYNC230 - of this disk
        async for piece in sandbox.read(inside):
            file.write(piece)
            cache.check_size(file.tell())
