"""A backend that makes nothing, for tests of what is decided about one."""

from metaflow_sandbox.backends.base import Backend


class Idle(Backend):
    name = "idle"

    async def create(self, spec):
        raise NotImplementedError

    async def list(self, labels):
        return []

    async def destroy(self, sandbox_id):
        pass
