"""A backend that gets its inputs by an archive and its output by the spool, as a cloud's does.

It is bubblewrap underneath, so that these paths run against a real sandbox.
"""

import os
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
    """Makes sandboxes for three seconds, is slow to take inputs, and bad at being asked for more.

    RENEWALS    file that gets a line for each request, the seconds asked for, and "uploaded"
    """

    name = "leased"
    longest_lifetime = 3.0

    async def create(self, spec):
        _note(spec.lifetime)
        sandbox = await super().create(replace(spec, lifetime=3600))
        upload = sandbox.upload

        async def slow(mounts):
            await anyio.sleep(4)
            _note("uploaded")
            return await upload(mounts)

        sandbox.upload, sandbox.renew = slow, _renew
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
    _note(lifetime)
    raise KeyError("code")  # as an SDK might that can't read an answer


def _note(what):
    with open(os.environ["RENEWALS"], "a") as file:
        file.write(f"{what}\n")
