"""What a sandbox adds to a step: the same flow with and without one, alternating.

    python benchmarks/step_overhead.py [ROUNDS]

Prints medians and their difference, and where the time of a sandboxed step went.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FLOW = """
from metaflow import FlowSpec, sandbox, step

class Overhead(FlowSpec):
    @step
    def start(self):
        self.next(self.work)

    DECORATOR
    @step
    def work(self):
        self.x = 1
        self.next(self.end)

    @step
    def end(self):
        pass

if __name__ == "__main__":
    Overhead()
"""


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    times = {"plain": [], "sandbox": []}
    parts = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, decorator in (("plain", ""), ("sandbox", "@sandbox")):
            Path(directory, f"{name}.py").write_text(FLOW.replace("DECORATOR", decorator))
        environment = {**os.environ, "METAFLOW_USER": "bench", "METAFLOW_SANDBOX_TIMINGS": "1"}
        for turn in range(rounds + 1):
            for name, measured in times.items():
                start = time.monotonic()
                done = subprocess.run(
                    [sys.executable, f"{name}.py", "--no-pylint", "run"],
                    cwd=directory,
                    env=environment,
                    capture_output=True,
                    text=True,
                    check=True,
                )
                if turn == 0:
                    continue  # warms the caches
                measured.append(time.monotonic() - start)
                for line in done.stdout.splitlines():
                    if '[sandbox] {"' in line:
                        for part, seconds in json.loads(line[line.index("{") :]).items():
                            parts.setdefault(part, []).append(seconds)
    plain, sandboxed = (statistics.median(times[n]) for n in ("plain", "sandbox"))
    print(f"three steps, none sandboxed   {plain:.2f} s   (median of {rounds})")
    print(f"three steps, one sandboxed    {sandboxed:.2f} s")
    print(f"added by the sandbox          {sandboxed - plain:.2f} s   x{sandboxed / plain:.2f}")
    print("of which, in the launcher (create and stage overlap):")
    for part, seconds in parts.items():
        print(f"  {part:10} {statistics.median(seconds):.3f} s")


if __name__ == "__main__":
    main()
