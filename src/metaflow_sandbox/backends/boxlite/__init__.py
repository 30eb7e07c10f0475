"""Sandboxes on this machine, each a microVM with a kernel of its own, by boxlite.

boxlite is a library: its microVM (libkrun, on KVM or Apple's Hypervisor) is a child of this
process and ends with it. `sandbox.py` is one of them, `inside.py` what it does for the host,
`images.py` what it is made from, `faults.py` why it doesn't boot.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from anyio.from_thread import BlockingPortalProvider

from ...errors import NOT_SET_UP, BackendUnavailable, NotEnforceable
from ...leases import living
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
from . import build, faults, images, processes
from .sandbox import KIND, LEAST_MEMORY, BoxliteSandbox, remove_sockets


class Boxlite(Backend):
    name = "boxlite"
    capabilities = Capabilities(
        cpu=True,
        memory=True,
        disk=True,
        image=True,
        network=("internet", "none", "hosts"),
        setup=True,
        stream="pipe",
    )
    work = "/sandbox"
    inbox = "/inbox"
    binds_mounts = True
    environments = IN_IMAGES
    python = "python3"
    #: What sandboxes are made from where a step doesn't say.
    default_image = f"python:{sys.version_info[0]}.{sys.version_info[1]}-slim"

    def __init__(self) -> None:
        #: The thread in which the proxies of this process's sandboxes run.
        self.portals = BlockingPortalProvider()
        #: Layouts that were made anew: steps share what one of them asked for.
        self.rebuilt: set[Path] = set()

    def provider(self) -> str:
        """boxlite, with its version."""
        from importlib.metadata import version

        return f"boxlite {version('boxlite')}"

    def refuse(self, spec: SandboxSpec) -> None:
        super().refuse(spec)
        if spec.cpu is not None and spec.cpu != int(spec.cpu):
            raise NotEnforceable(
                f"cpu={spec.cpu:g}: a microVM has whole processors. Give a whole number.",
                op="create",
            )
        if spec.memory is not None and spec.memory < LEAST_MEMORY:
            raise NotEnforceable(
                f"memory={spec.memory}: a microVM boots with {LEAST_MEMORY} MB or more.",
                op="create",
            )

    async def preflight(self) -> Preflight:
        """Boots one microVM: that /dev/kvm is there, and answers, does not say that any boots."""
        self.usable()
        self.sweep()
        async with images.alone("trial") as target:  # boxlite makes a disk of it the first time
            spec = SandboxSpec(labels={"purpose": "preflight"}, memory=LEAST_MEMORY)
            await BoxliteSandbox.try_out(self, spec, build.trial(target))
        notes = [
            "the internet is reached through an HTTP(S) proxy alone; disk is given in steps of "
            "1024 MB, rounded up."
        ]
        return Preflight(self.provider(), notes)

    def usable(self) -> None:
        """What can be told without booting anything.

        Raises:
            BackendUnavailable: microVMs can't run here, with the remedy.
        """
        if problem := faults.no_machine():
            raise BackendUnavailable(f"boxlite can't run here: {problem}", op="preflight")
        try:
            import boxlite  # noqa: F401
        except ImportError as e:
            raise BackendUnavailable(
                f"boxlite is not installed ({e}). Install it with\n"
                '  pip install "metaflow-sandbox[boxlite]"',
                code=NOT_SET_UP,
                op="preflight",
            ) from e

    def sweep(self) -> None:
        """Ends what lives beyond its time, and removes what killed launchers left."""
        living(images.KIND)
        for path in living(KIND, _bury):
            record = _record(path)
            if record.get("expires", float("inf")) < time.time():
                processes.end(record.get("process"))

    async def prepare(self, recipe: Recipe, say: Say = unsaid) -> Prepared:
        image = recipe.image or self.default_image
        layout = await images.bring(image, say)
        await build.look_over(self, image, layout, say)
        if not recipe.plain:
            layout = await build.prepare(self, recipe, layout, say)
            await build.look_over(self, image, layout, say)
        for_one_run = recipe.once and not recipe.plain
        discard = partial(build.remove, layout) if for_one_run else None
        return Prepared(str(layout), discard=discard)

    async def create(self, spec: SandboxSpec) -> BoxliteSandbox:
        self.refuse(spec)
        self.usable()
        image = spec.image or self.default_image
        layout = await images.bring(image)
        await build.look_over(self, image, layout)
        return await BoxliteSandbox.start(self, spec, layout)

    async def list(self, labels: Mapping[str, str]) -> list[SandboxInfo]:
        found = []
        for path in living(KIND, _bury):
            record = _record(path)
            with suppress(OSError, KeyError):
                there = processes.lives(record["process"])
                if there and labels.items() <= record["labels"].items():
                    name, created = path.name.removeprefix(f"{KIND}-"), path.stat().st_ctime
                    found.append(SandboxInfo(name, record["labels"], created))
        return found

    async def destroy(self, sandbox_id: str) -> None:
        for path in living(KIND, _bury):
            if path.name == f"{KIND}-{sandbox_id}":
                await processes.ended(_record(path).get("process"))


def _record(lease: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return dict(json.loads((lease / "record.json").read_text()))
    return {}


def _bury(lease: Path) -> None:
    """Ends what a launcher left that was killed. Its microVM has ended with it, as a rule."""
    processes.end(_record(lease).get("process"))
    remove_sockets(lease)
