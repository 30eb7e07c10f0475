"""A remote backend that keeps all that enters its sandboxes, byte for byte.

CAPTURE is a directory on the host: `create` has what was asked for, one file for each
`write` has its bytes, `commands` has a line of JSON for each command.
"""

import json
import os
from pathlib import Path

from remote_like import RemoteLike


class Capturing(RemoteLike):
    name = "capturing"

    async def create(self, spec):
        directory = Path(os.environ["CAPTURE"])
        (directory / "create").write_text(repr(spec))
        sandbox = await super().create(spec)
        execute, write, writes = sandbox.exec, sandbox.write, iter(range(1000))

        async def captured_write(path, source):
            with open(directory / f"write-{next(writes)}", "wb") as file:

                async def pieces():
                    async for piece in source:
                        file.write(piece)
                        yield piece

                await write(path, pieces())

        async def captured_exec(argv, **options):
            with open(directory / "commands", "a") as file:
                given = {"argv": list(argv), "cwd": options.get("cwd"), "env": options.get("env")}
                file.write(json.dumps(given) + "\n")
            return await execute(argv, **options)

        sandbox.write, sandbox.exec = captured_write, captured_exec
        return sandbox
