"""How long a command takes in a new sandbox: create, run, destroy, beside the bare command.

    python benchmarks/start.py [ROUNDS]

Each round runs every row once, in turn. Prints medians in milliseconds, and ratios.
"""

import statistics
import subprocess
import sys
import time

import anyio

from metaflow_sandbox.backends.base import SandboxSpec
from metaflow_sandbox.backends.bubblewrap import Bubblewrap

COMMANDS = {"true": ["/bin/true"], "python -c pass": [sys.executable, "-c", "pass"]}
NETWORKS = {"no network": False, "listed hosts": ["example.com"], "internet": True}


async def bare(command):
    subprocess.run(command, check=True)


def sandboxed(backend, network):
    async def run(command):
        sandbox = await backend.create(SandboxSpec(disk=256, memory=512, network=network))
        try:
            assert (await sandbox.run(command)).exit_code == 0
        finally:
            await sandbox.destroy()

    return run


async def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    backend = Bubblewrap()
    ways = {"bare": bare} | {f"sandbox, {k}": sandboxed(backend, n) for k, n in NETWORKS.items()}
    times = {(way, name): [] for way in ways for name in COMMANDS}
    for turn in range(rounds + 1):
        for (way, name), measured in times.items():
            start = time.monotonic()
            await ways[way](COMMANDS[name])
            if turn:
                measured.append(time.monotonic() - start)
    names = list(COMMANDS)
    print(f"| ms, median of {rounds} | {' | '.join(names)} |\n| --- |{' --- |' * len(names)}")
    for way in ways:
        cells = []
        for name in names:
            median = statistics.median(times[way, name])
            ratio = median / statistics.median(times["bare", name])
            cells.append(f"{median * 1000:.1f} (x{ratio:.1f})")
        print(f"| {way} | {' | '.join(cells)} |")


if __name__ == "__main__":
    anyio.run(main)
