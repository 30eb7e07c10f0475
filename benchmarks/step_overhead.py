"""What a sandbox adds to a step: the same flows with and without one, alternating.

    python benchmarks/step_overhead.py [ROUNDS]

A flow of three steps of which one is sandboxed pays for the run's supervisor too; one
of seven with five in a row tells what each further step pays. Prints medians and their
differences, and where the time of a sandboxed step went.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HEAD = """
from metaflow import FlowSpec, sandbox, step

class Overhead(FlowSpec):
    @step
    def start(self):
        self.next(self.work0)
"""
WORK = """
    {decorator}
    @step
    def work{number}(self):
        self.x = {number}
        self.next(self.{following})
"""
TAIL = """
    @step
    def end(self):
        pass

if __name__ == "__main__":
    Overhead()
"""
SEVERAL = 5


def flow(count, decorator):
    following = [f"work{i}" for i in range(1, count)] + ["end"]
    works = (
        WORK.format(decorator=decorator, number=i, following=name)
        for i, name in enumerate(following)
    )
    return HEAD + "".join(works) + TAIL


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    times, parts = {}, {}
    with tempfile.TemporaryDirectory() as directory:
        for count in (1, SEVERAL):
            for kind, decorator in (("plain", ""), ("sandboxed", "@sandbox")):
                Path(directory, f"{kind}{count}.py").write_text(flow(count, decorator))
                times[kind, count] = []
        environment = {**os.environ, "METAFLOW_USER": "bench", "METAFLOW_SANDBOX_TIMINGS": "1"}
        for turn in range(rounds + 1):
            for (kind, count), measured in times.items():
                start = time.monotonic()
                done = subprocess.run(
                    [sys.executable, f"{kind}{count}.py", "--no-pylint", "run"],
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
    median = {key: statistics.median(measured) for key, measured in times.items()}
    first = median["sandboxed", 1] - median["plain", 1]
    further = (median["sandboxed", SEVERAL] - median["plain", SEVERAL] - first) / (SEVERAL - 1)
    print(f"median of {rounds}             plain    sandboxed")
    for count in (1, SEVERAL):
        plain, sandboxed = median["plain", count], median["sandboxed", count]
        print(f"{count} step(s) sandboxed   {plain:6.2f} s   {sandboxed:6.2f} s")
    print(f"added by the first step       {first:.2f} s")
    print(f"added by each further one     {further:.2f} s")
    print("where a sandboxed step's time goes (create and stage overlap):")
    for part, seconds in parts.items():
        print(f"  {part:10} {statistics.median(seconds):.3f} s")


if __name__ == "__main__":
    main()
