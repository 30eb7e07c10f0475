"""Sandboxes on this machine, made of Linux namespaces by bubblewrap.

A sandbox is one bubblewrap process with `box.py` as the first process inside
(`policy.py` says what it sees, `seccomp.py` what it may call, `limits.py` what it
may use). It shares the host's kernel: see docs/security.md for what that is worth.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path

import anyio
from anyio.from_thread import BlockingPortalProvider

from ... import cache
from ...concurrency import blocking, write_all
from ...errors import BackendUnavailable, SandboxError
from ...leases import living
from .. import build, seccomp
from ..base import (
    Backend,
    Capabilities,
    Preflight,
    Prepared,
    Recipe,
    SandboxInfo,
    SandboxSpec,
    Say,
    unsaid,
)
from . import image, kept, limits, network, policy, userns
from .program import alive, bury, candidates, end_orphans, explain
from .sandbox import BubblewrapSandbox, Way

_MAX_IMAGE = 64 << 30


class Bubblewrap(Backend):
    name = "bubblewrap"
    capabilities = Capabilities(
        cpu=True,
        memory=True,
        disk=True,
        shared_memory=True,
        image=True,
        network=("internet", "none", "hosts"),
        keep=True,
        stream="pipe",
    )
    work = policy.WORK
    inbox = "/inbox"
    binds_mounts = True
    python = policy.PYTHON

    def __init__(self) -> None:
        #: The thread in which the proxies of this process's sandboxes run.
        self.portals = BlockingPortalProvider()
        self.uids = userns.Uids()

    @cached_property
    def means(self) -> limits.Means | None:
        """What holds sandboxes to their limits on this machine."""
        return limits.find()

    @cached_property
    def has_route(self) -> bool:
        """Whether a sandbox can have the internet by a device, not only by the proxy."""
        return network.route_available()

    def interpreter(self, image: str | None) -> str:
        return "python3" if image else self.python

    def limits(self) -> Capabilities:
        means = self.means
        return replace(self.capabilities, cpu=means is not None and "cpu" in means.enforces)

    async def preflight(self) -> Preflight:
        """Makes one sandbox and runs `true` in it: no reading of versions or settings."""
        self.sweep()
        spec = SandboxSpec(labels={"purpose": "preflight"}, memory=256, disk=64, network=True)
        sandbox = await self.create(spec)
        try:
            if (result := await sandbox.run(["true"])).exit_code != 0:
                raise BackendUnavailable(
                    f"`true` exits with {result.exit_code} in a sandbox: "
                    f"{result.stderr.decode(errors='replace')}",
                    op="preflight",
                )
        finally:
            await sandbox.destroy()
        return Preflight(f"bubblewrap at {sandbox.way.program}", self._notes(sandbox.way))

    def _notes(self, way: Way) -> list[str]:
        notes = []
        if way.means is None:
            notes.append(
                "memory is limited by looking ten times a second, and CPUs can't be, since "
                "control groups can't be made here. A running systemd would make them, or root "
                "where /sys/fs/cgroup may be written."
            )
        else:
            kinds = " and ".join(sorted(way.means.enforces))
            notes.append(f"{kinds} are limited by {way.means.name}.")
        if not way.route:
            notes.append(
                "the internet is reached through an HTTP(S) proxy alone, since slirp4netns and "
                "nft can't be used here (sudo apt install slirp4netns nftables)."
            )
        return notes

    def sweep(self) -> None:
        end_orphans()
        living("box", bury)

    async def prepare(self, recipe: Recipe, say: Say = unsaid) -> Prepared:
        if recipe.image is not None:
            await self._unpack_image(recipe.image, say)
        if not recipe.install or not self.binds_mounts:
            return await super().prepare(recipe, say)
        return Prepared(recipe.image, await self._build(recipe, say))

    async def _build(self, recipe: Recipe, say: Say) -> dict[str, Path]:
        """Builds an environment in the cache's own directory, which sandboxes bind."""
        prefix = recipe.prefix or ""
        digest = image.identity(recipe.image) if recipe.image else ""
        key = await blocking(partial(recipe.key, self.name, digest))

        async def make(new: Path) -> str:
            async with build.announced(recipe, say):
                root = new / cache.ROOT
                root.mkdir()
                files = await recipe.fetched()
                sandbox = await self._create(build.spec(self, recipe, files), {prefix: root})
                try:
                    async with cache.watched(root):
                        await build.install(sandbox, recipe)
                finally:
                    await sandbox.destroy()
            return recipe.title

        return {prefix: (await cache.get(key, make, say, recipe.rebuild)) / cache.ROOT}

    async def _unpack_image(self, image_name: str, say: Say) -> None:

        async def unpack(layers: list[Path], target: Path) -> None:
            await say(f"the image {image_name} is unpacked, once.")
            spec = SandboxSpec(
                labels={"purpose": "unpack"},
                mounts={**image.mounts(layers), "/unpack": image.UNPACK.parent},
                disk=64,
                network=False,
            )
            sandbox = await self._create(spec, {image.TARGET: target})
            try:
                script = f"/unpack/{image.UNPACK.name}"
                done = await sandbox.run(
                    [self.python, "-I", "-S", script, image.LAYERS, image.TARGET, str(_MAX_IMAGE)]
                )
            finally:
                await sandbox.destroy()
            if done.exit_code != 0:
                raise image.why(done.stderr)

        await image.prepare(image_name, unpack)
        try:
            sandbox = await self.create(SandboxSpec(image=image_name, disk=64, network=False))
        except BackendUnavailable as e:
            raise image.BadImage(
                f"image={image_name!r}: no sandbox can be made from it. It needs a python3, 3.8 or "
                f"later, on its PATH, for this kind of processor.\n{e}",
                op="prepare",
            ) from e
        await sandbox.destroy()

    async def create(self, spec: SandboxSpec) -> BubblewrapSandbox:
        return await self._create(spec, {})

    async def _create(self, spec: SandboxSpec, writable: Mapping[str, Path]) -> BubblewrapSandbox:
        if not sys.platform.startswith("linux"):
            raise BackendUnavailable(
                "bubblewrap exists only on Linux: use @boxlite or @docker here.", op="create"
            )
        if platform.machine() not in seccomp.SUPPORTED:
            raise BackendUnavailable(
                f"there is no system call filter for {platform.machine()} yet: use @docker.",
                op="create",
            )
        self.refuse(spec)
        if spec.network is None:
            spec = replace(spec, network=True)
        problems, routeless = [], ""
        for way in self._ways(spec):
            try:
                sandbox = await BubblewrapSandbox.start(self, way, spec, writable)
            except BackendUnavailable as e:
                problems.append(f"{way.program}: {e}")
                if way.route:
                    routeless = f"network: by the HTTP(S) proxy alone, since {e}"
                continue
            sandbox.routeless = "" if way.route else routeless
            return sandbox
        if problems:
            text = "\n".join(dict.fromkeys(problems))
            raise BackendUnavailable(
                f"bubblewrap can't make a sandbox here.\n{text}\n{explain(text)}", op="create"
            )
        raise BackendUnavailable(
            "bubblewrap is not installed. Install it with one of\n"
            "  sudo apt install bubblewrap\n"
            '  pip install "metaflow-sandbox[local]"',
            op="create",
        )

    def _ways(self, spec: SandboxSpec) -> Iterator[Way]:
        """How to start a sandbox, the best first.

        What is installed may not work: systemd may not serve this user, slirp4netns may
        lack its device. The next way still enforces all that was asked.
        """
        means: list[limits.Means | None] = [self.means]
        if isinstance(self.means, limits.Scope) and spec.cpu is None:
            means.append(None)
        routes = [True, False] if spec.network is True and self.has_route else [False]
        namespaces = [False, True] if userns.global_root() else [False]
        for program, namespace, route, held in product(candidates(), namespaces, routes, means):
            yield Way(program, held, route, namespace)

    async def shell(self, name: str, argv: Sequence[str]) -> int:
        found = kept.find(name)
        spec = found.spec()
        sandbox = await self.create(spec)
        try:
            python = [self.interpreter(spec.image), "-I", "-S", "-c", kept.UNPACK]
            done = await sandbox.run([*python, f"{kept.INSIDE}/{kept.ARCHIVE}", policy.WORK])
            if done.exit_code != 0:
                raise SandboxError(
                    f"the kept files could not be unpacked: {done.stderr[-300:]!r}",
                    op="shell",
                )
            if sys.stdin.isatty():
                return await sandbox.terminal(argv)
            out, err = partial(write_all, 1), partial(write_all, 2)
            return await sandbox.exec(argv, on_stdout=out, on_stderr=err)
        finally:
            await sandbox.destroy()

    async def list(self, labels: Mapping[str, str]) -> list[SandboxInfo]:
        found = []
        for path in living("box", bury):
            with suppress(OSError, ValueError):
                record = json.loads((path / "record.json").read_text())
                # Its owner may not have seen yet that it has ended.
                there = alive(record["pid"]) and alive(record["init"])
                if there and labels.items() <= record["labels"].items():
                    name, created = path.name.removeprefix("box-"), path.stat().st_mtime
                    found.append(SandboxInfo(name, record["labels"], created))
        return found

    async def destroy(self, sandbox_id: str) -> None:
        for path in living("box", bury):
            if path.name == f"box-{sandbox_id}":
                with suppress(OSError, ValueError):
                    record = json.loads((path / "record.json").read_text())
                    init = os.pidfd_open(record["init"])
                    try:
                        # While bubblewrap lives, it has not reaped its child, so the number
                        # was that one's; and it has not been reaped while its owner lives.
                        if alive(record["pid"]):
                            signal.pidfd_send_signal(init, signal.SIGKILL)
                            with anyio.move_on_after(10):
                                await anyio.wait_readable(init)
                    finally:
                        os.close(init)
