"""Has a sandbox's daemon answer as a hostile one, and measures what that does to a launcher."""

import subprocess
import sys

#: Does something in a sandbox, prints what it raised and by how many MB the peak of its own memory
#: grew.
PROGRAM = """
import resource, sys
import anyio
from metaflow_sandbox.backends import registry
from metaflow_sandbox.backends.base import SandboxSpec
from metaflow_sandbox.errors import SandboxError

async def main(name, action):
    backend = registry.load(name)
    path = backend.work + "/x"
    sandbox = await backend.create(SandboxSpec(network=False))
    actions = {
        "run": lambda: sandbox.run(["true"]),
        "read": lambda: sandbox.read_bytes(path, 4 << 20),
        "write": lambda: sandbox.write_bytes(path, b"x"),
        "write much": lambda: sandbox.write_bytes(path, bytes(2 << 20)),
    }
    try:
        for each in ("write much", "read", "write", "run"):
            await actions[each]()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print("ready", flush=True)
        sys.stdin.readline()
        raised = "nothing"
        try:
            await actions[action]()
        except (SandboxError, OverflowError) as e:
            raised = type(e).__name__
        print(raised, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
    finally:
        await sandbox.destroy()

anyio.run(main, *sys.argv[1:])
"""


def meet(backend, action, begin):
    """Does it after `begin()` has made the daemon a hostile one.

    Returns:
        The name of what was raised, or "nothing", and the MB.
    """
    command = [sys.executable, "-c", PROGRAM, backend, action]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n", process.communicate()[1]
            begin()
            output, problem = process.communicate("\n", timeout=100)
        finally:
            process.kill()
    assert process.returncode == 0, problem
    raised, grown = output.split()
    return raised, int(grown)
