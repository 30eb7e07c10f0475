"""Makes one sandbox in a process of its own: `one_sandbox.py module:Backend`."""

import importlib
import sys

import anyio

from metaflow_sandbox.backends.base import SandboxSpec


async def main() -> None:
    module, _, name = sys.argv[1].partition(":")
    backend = getattr(importlib.import_module(module), name)()
    sandbox = await backend.create(SandboxSpec(disk=256 if backend.limits().disk else None))
    try:
        await anyio.sleep(0.5)
        assert (await sandbox.run(["echo", "ok"])).stdout == b"ok\n"
    finally:
        await sandbox.destroy()
    print("ok")


if __name__ == "__main__":
    anyio.run(main)
