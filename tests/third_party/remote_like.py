"""A backend that gets its inputs by an archive and its output by the spool, as a cloud's does.

It is bubblewrap underneath, so that these paths run against a real sandbox.
"""

from dataclasses import replace

from metaflow_sandbox.backends.bubblewrap import Bubblewrap


class RemoteLike(Bubblewrap):
    name = "remote-like"
    capabilities = replace(Bubblewrap.capabilities, stream="spool")
    inbox = "/sandbox/inbox"
    binds_mounts = False

    async def create(self, spec):
        return await super().create(replace(spec, mounts={}))
