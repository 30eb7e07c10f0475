"""A backend that gets its inputs by an archive and its output by the spool, as a cloud's does.

It is bubblewrap underneath, so that these paths run against a real sandbox.
"""

import os
import time
from dataclasses import replace
from pathlib import Path

import anyio

from metaflow_sandbox.backends.base import SandboxSpec
from metaflow_sandbox.backends.bubblewrap import Bubblewrap


class RemoteLike(Bubblewrap):
    name = "remote-like"
    capabilities = replace(Bubblewrap.capabilities, stream="spool")
    inbox = "/sandbox/inbox"
    binds_mounts = False

    async def create(self, spec):
        return await super().create(replace(spec, mounts={}))


class Leased(RemoteLike):
    """Makes sandboxes for three seconds, and writes down when it was asked for more.

    RENEWALS    file that gets a line for each request: the time, the seconds asked for
    """

    name = "leased"
    longest_lifetime = 3.0

    async def create(self, spec):
        _asked_for(spec.lifetime)
        sandbox = await super().create(replace(spec, lifetime=3600))
        sandbox.renew = _renew
        return sandbox


class Preparing(RemoteLike):
    """Is at work on what sandboxes are made from, in one of them, until it is interrupted.

    PREPARING   file that is there once it has begun
    """

    name = "preparing"

    async def prepare(self, recipe, say):
        sandbox = await self.create(SandboxSpec())
        try:
            Path(os.environ["PREPARING"]).touch()
            await sandbox.run(["sleep", "1000"])
        finally:
            with anyio.CancelScope(shield=True):
                await sandbox.destroy()


async def _renew(lifetime):
    _asked_for(lifetime)


def _asked_for(lifetime):
    with open(os.environ["RENEWALS"], "a") as file:
        file.write(f"{time.monotonic()} {lifetime}\n")
