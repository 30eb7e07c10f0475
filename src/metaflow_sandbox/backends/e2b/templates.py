"""Templates: what sandboxes of E2B's are made from, and the only place of their size.

A template is named by its recipe's content, built by whoever needs it first, and found by
that name afterwards, from any machine of the account.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import shlex
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from ...errors import NotEnforceable, SandboxError
from ...leases import base
from ..base import Recipe, Say
from .failures import translate, translated

if TYPE_CHECKING:
    from e2b import LogEntry

PREFIX = "metaflow-sandbox-"
_LINE = 200
_BASE = "base"
#: Where sandboxes work, and what they are given.
WORK, INBOX = "/home/user/sandbox", "/home/user/sandbox/inbox"
_BUILD_SECONDS = 3600


def size(recipe: Recipe) -> tuple[int | None, int | None]:
    """(CPUs, MB) of a recipe as E2B counts them.

    Raises:
        NotEnforceable: a part of a CPU.
    """
    cpus = recipe.cpu
    if cpus is not None and cpus != int(cpus):
        raise NotEnforceable(f"cpu={cpus:g}: E2B gives whole CPUs. Give cpu={int(cpus) + 1}.")
    memory = recipe.memory
    return None if cpus is None else int(cpus), None if memory is None else memory + memory % 2


def name_of(recipe: Recipe) -> str:
    """The name of a recipe's template. Blocking: it reads the recipe's files."""
    return PREFIX + recipe.key(*(str(part) for part in size(recipe)))


def needed(recipe: Recipe) -> bool:
    """Whether a recipe needs a template of its own."""
    return recipe.image is not None or not recipe.plain or size(recipe) != (None, None)


@contextlib.asynccontextmanager
async def alone(name: str) -> AsyncIterator[None]:
    """One process of this user on this machine at a time."""
    with open(base() / f"places-{name}", "w") as lock:  # noqa: ASYNC230 - an empty file
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await anyio.sleep(0.5)
        yield


async def exists(name: str) -> bool:
    from e2b import AsyncTemplate

    with translated("prepare", name):
        return await AsyncTemplate.exists(name)


async def build(recipe: Recipe, name: str, say: Say) -> None:
    """Builds a template and passes its log on.

    Raises:
        SandboxError: it failed, with the step that did.
    """
    from e2b import AsyncTemplate

    cpus, memory = size(recipe)
    source = recipe.image or recipe.options.get("template") or "E2B's base"
    await say(
        f"builds a template of E2B's from {source}, once: {name}. E2B keeps it, and counts it "
        "as its plan says; a sandbox of it costs by its CPUs and memory."
    )
    started = time.monotonic()
    failure: Exception | None = None
    lines: asyncio.Queue[str | None] = asyncio.Queue()

    def heard(entry: LogEntry) -> None:
        lines.put_nowait(" ".join(entry.message.split())[:_LINE])

    async def pass_on() -> None:
        while (line := await lines.get()) is not None:
            await say(line)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pass_on)
        try:
            with tempfile.TemporaryDirectory() as context, anyio.fail_after(_BUILD_SECONDS):
                template = _template(recipe, await recipe.fetched(), Path(context))
                await AsyncTemplate.build(
                    template, name, cpu_count=cpus, memory_mb=memory, on_build_logs=heard
                )
        except Exception as e:
            # It stays: whoever finds it sees that it isn't ready, and it may be another's build
            # of the same name that will be.
            tasks.cancel_scope.cancel()
            failure = _failure(e, recipe, source)
        else:
            lines.put_nowait(None)
    if failure is not None:
        raise failure
    await say(f"the template is ready after {time.monotonic() - started:.0f} s.")


def _template(  # type: ignore[no-untyped-def]
    recipe: Recipe, files: Mapping[str, Path], context: Path
):
    """The SDK's description of a recipe. Its files are linked into a directory for the SDK."""
    from e2b import AsyncTemplate

    start = AsyncTemplate(file_context_path=context)
    if recipe.image is not None:
        template = start.from_image(recipe.image)
    else:
        template = start.from_template(recipe.options.get("template", _BASE))
    if files:
        # Or they would belong to root, like what is copied to below them.
        template = template.run_cmd(shlex.join(["mkdir", "-p", INBOX]), user="user")
    for number, (inside, source) in enumerate(files.items()):
        _link(source, context / str(number))
        template = template.copy(str(number), inside, user="root", resolve_symlinks=True)
    for command in recipe.setup:
        template = template.run_cmd(command, user="root")
    if recipe.install:
        template = template.run_cmd(shlex.join(recipe.install), user="root")
    if files:
        template = template.run_cmd(shlex.join(["rm", "-rf", "--", *files]), user="root")
    return template


def _link(source: Path, target: Path) -> None:
    """Links a file, or each file of a directory: the SDK doesn't look into a linked one."""
    if source.is_dir():
        shutil.copytree(source.resolve(), target, copy_function=lambda s, t: Path(t).symlink_to(s))
    else:
        target.symlink_to(source.resolve())


def _failure(e: Exception, recipe: Recipe, source: str) -> Exception:
    if isinstance(e, TimeoutError):
        return SandboxError(
            f"the template for {source} was not ready after {_BUILD_SECONDS // 60} minutes. See "
            "its builds in E2B's dashboard, or try again.",
            code="build_failed", op="prepare", retryable=False,
        )  # fmt: skip
    error = translate(e, "prepare", source)
    if isinstance(error, SandboxError) and error.code == "build_failed":
        hint = (
            "Check the image's name, and that E2B can pull it"
            if recipe.image is not None and not recipe.setup
            else "The lines above say which command failed"
        )
        return SandboxError(
            f"the template for {source} could not be built: {error.message}. {hint}.",
            code="build_failed", op="prepare", retryable=False,
        )  # fmt: skip
    return error
