"""Sandboxes that are containers, of Docker or Podman, on this machine or another.

    engine.py     the client program: what the engine can do, and what its errors mean
    images.py     pulls images, and makes those that `setup` asks for
    sandbox.py    one container and the client program that is attached to it
    link.py       the host's end of that connection
    box.py        the other end: the container's first process

All goes by the client program, since that alone knows the user's contexts, DOCKER_HOST,
credentials and Podman. A container has no network device: what it may reach, it reaches by the
egress proxy of this process, through the same connection.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import anyio
from anyio.from_thread import BlockingPortalProvider

from ...errors import BackendUnavailable, NotEnforceable, SandboxError
from .. import build
from ..base import (
    IN_IMAGES,
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
from . import images
from .engine import BadImage, Engine, explain
from .sandbox import MADE, MARK, DockerSandbox

_STALE = "10m"
_SWEEP_SECONDS = 60
_REMOVED_SECONDS = 30.0
_SETUP_SECONDS = 86400.0
_GONE = ("no such container", "no container with")


def default_image() -> str:
    """An image with this Python, of the same minor version."""
    return f"python:{sys.version_info.major}.{sys.version_info.minor}-slim"


class Docker(Backend):
    name = "docker"
    capabilities = Capabilities(
        cpu=True,
        memory=True,
        disk=True,
        gpu=True,
        shared_memory=True,
        image=True,
        network=("internet", "none", "hosts"),
        setup=True,
        stream="pipe",
    )
    environments = IN_IMAGES
    options = {"runtime": "runsc", "root": "writable"}

    def __init__(self) -> None:
        #: The thread in which the connections to this process's containers are served.
        self.portals = BlockingPortalProvider()
        #: Tags of images that were made anew: steps share what one of them asked for.
        self.rebuilt: set[str] = set()
        self._images: dict[str, dict[str, Any]] = {}
        self._may_size = True  # until the storage driver says that it can't

    @cached_property
    def engine(self) -> Engine:
        return Engine.ask()

    @property
    def binds_mounts(self) -> bool:  # type: ignore[override]
        return self.engine.local

    @property
    def inbox(self) -> str:  # type: ignore[override]
        return "/inbox" if self.binds_mounts else "/sandbox/inbox"

    def limits(self) -> Capabilities:
        try:
            engine = self.engine
        except BackendUnavailable:
            return self.capabilities  # the preflight says why nothing can be had
        return replace(
            self.capabilities,
            cpu=engine.cpu,
            memory=engine.memory,
            gpu="nvidia" in (engine.runtimes or ()),
        )

    @property
    def _sizes(self) -> bool:
        """Whether the storage driver limits a container's root."""
        return self.engine.sizes and self._may_size

    async def preflight(self) -> Preflight:
        engine = await anyio.to_thread.run_sync(lambda: self.engine)
        self.sweep()
        notes = ["the internet is reached through an HTTP(S) proxy alone."]
        for name, held in (("memory", engine.memory), ("processes", engine.processes)):
            if not held:
                notes.append(
                    f"{name} can't be limited by this engine: give it control groups, version 2, "
                    "that are delegated to you."
                )
        if engine.memory and not engine.swap:
            notes.append("what exceeds memory=… may go to swap, which this engine can't close.")
        if not engine.local:
            notes.append("inputs are copied into containers, since it can't bind them as they are.")
        return Preflight(engine.name, notes)

    def sweep(self) -> None:
        # What a client program left that was killed between making a container and starting it.
        with suppress(SandboxError, OSError, subprocess.TimeoutExpired):
            subprocess.run(
                [self.engine.program, "container", "prune", "--force",
                 "--filter", f"label={MADE}", "--filter", f"until={_STALE}"],
                stdin=subprocess.DEVNULL, capture_output=True, timeout=_SWEEP_SECONDS, check=False,
            )  # fmt: skip
            images.sweep(self.engine)

    async def prepare(self, recipe: Recipe, say: Say = unsaid) -> Prepared:
        engine = await anyio.to_thread.run_sync(lambda: self.engine)
        name = recipe.image or default_image()
        image = await images.get(engine, name, say)
        await self._try(name, image, recipe)
        if not self._sizes:
            if recipe.disk is not None and recipe.options.get("root"):
                raise NotEnforceable(
                    'disk= can\'t be held together with root="writable" on this engine, whose '
                    "storage driver doesn't limit what a container writes: leave one of them out.",
                    op="prepare",
                )
            if volumes := engine.volumes(image):
                names = ", ".join(volumes)
                await say(f"the volumes of the image {name} begin empty in each step: {names}")
        if not recipe.plain:
            image = await images.make(self, name, image, recipe, say)
        self._images[image["Id"]] = image
        for_one_run = recipe.once and not recipe.plain
        discard = partial(images.discard, engine, image) if for_one_run else None
        return Prepared(image["Id"], discard=discard)

    async def _try(self, name: str, image: dict[str, Any], recipe: Recipe) -> None:
        """Makes a sandbox of an image, to see that it has what a step needs."""
        self._images[image["Id"]] = image
        spec = SandboxSpec(
            labels={"purpose": "preflight"},
            disk=64,
            image=image["Id"],
            network=False,
            options=recipe.options,
        )
        try:
            sandbox = await self.create(spec)
        except BadImage as e:
            raise BadImage(f"image={name!r}: {e}", op="prepare", retryable=False) from None
        await sandbox.destroy()

    async def create(self, spec: SandboxSpec) -> DockerSandbox:
        engine = await anyio.to_thread.run_sync(lambda: self.engine)
        self.refuse(spec)
        if (root := spec.options.get("root")) not in (None, "writable"):
            raise NotEnforceable(f'root={root!r}: give "writable", or leave it out.', op="create")
        if spec.network is None:
            spec = replace(spec, network=True)
        image = await self._image(engine, spec.image or default_image())
        if self._sizes:
            try:
                return await self._start(spec, image, sized=True)
            except SandboxError as e:
                if "storage-opt" not in str(e):
                    raise
                self._may_size = False  # such as overlay2 on XFS without project quotas
        return await self._start(spec, image, writable=root is not None)

    async def _start(
        self,
        spec: SandboxSpec,
        image: dict[str, Any],
        *,
        writable: bool = False,
        sized: bool = False,
    ) -> DockerSandbox:
        sandbox = DockerSandbox(
            self,
            self.engine,
            spec,
            image,
            writable=writable,
            sized=sized,
            bound=self.binds_mounts,
        )
        return await sandbox.start()

    async def create_to_commit(
        self, image: dict[str, Any], options: Mapping[str, str], network: bool
    ) -> DockerSandbox:
        """A sandbox with a root that can be written, to make an image of."""
        spec = SandboxSpec(
            labels={"purpose": "setup"},
            lifetime=_SETUP_SECONDS,
            memory=build.memory(self),
            network=network,
            options=options,
        )
        return await self._start(spec, image, writable=True)

    async def _image(self, engine: Engine, name: str) -> dict[str, Any]:
        if name not in self._images:
            found = await engine.image(name)
            if found is None:
                raise BadImage(
                    f"image={name!r} is not there: docker pull {name}", op="create", retryable=False
                )
            self._images[name] = found
        return self._images[name]

    async def list(self, labels: Mapping[str, str]) -> list[SandboxInfo]:
        engine = await anyio.to_thread.run_sync(lambda: self.engine)
        asked = ["ps", "--all", "--quiet", "--no-trunc", "--filter", f"label={MADE}"]
        answer = await engine.call(*asked)
        if answer.code != 0:
            raise explain(answer.said, "list")
        if not (ids := answer.out.decode().split()):
            return []
        # One that ends meanwhile is missed from what is printed, which is what is wanted.
        answer = await engine.call("container", "inspect", *ids)
        found = []
        for container in json.loads(answer.out or b"[]"):
            with suppress(ValueError, KeyError, TypeError):
                mark = json.loads(container["Config"]["Labels"][MARK])
                living = container["State"]["Status"] in ("created", "running", "paused")
                if living and labels.items() <= mark["labels"].items():
                    name = container["Name"].removeprefix("/")
                    found.append(SandboxInfo(name, mark["labels"], float(mark["created"])))
        return found

    async def destroy(self, sandbox_id: str) -> None:
        engine = await anyio.to_thread.run_sync(lambda: self.engine)
        with anyio.move_on_after(_REMOVED_SECONDS):
            while True:
                answer = await engine.call("rm", "--force", "--volumes", sandbox_id)
                lower = answer.said.lower()
                if "in progress" not in lower:
                    break
                await anyio.sleep(0.1)
        if (
            answer.code != 0
            and "no such container" not in lower
            and "no container with" not in lower
        ):
            raise explain(answer.said, "destroy")
