"""What a small step costs on the emulated E2B, by how far away the service is.

    python benchmarks/e2b.py [ROUNDS]

Runs a flow of one small `@e2b` step with 0 and with 100 ms before each answer, in turn, and prints
the medians of what an attempt's time went to, and of its requests that wait for each other.
"""

import json
import re
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "contract"))

from tests.conftest import Project
from tests.emulators.e2b.server import running

LATENCIES = (0.0, 0.1)
PARTS = ("create", "stage", "upload", "run")
FLOW = """
    from metaflow import FlowSpec, e2b, step

    class Small(FlowSpec):
        @e2b
        @step
        def start(self):
            self.x = 1
            self.next(self.end)

        @step
        def end(self):
            pass

    if __name__ == "__main__":
        Small()
"""


def once(project, service, latency):
    """{part: seconds} of one attempt, and "whole": from its first request to its last answer."""
    service.reset()
    service.settings(latency=latency)
    output = project.run("flow.py", "run", env={"METAFLOW_SANDBOX_TIMINGS": "1"}).ok().output
    found = json.loads(re.search(r"\[sandbox\] (\{\"create.*\}|\{.*\})$", output, re.M)[1])
    wanted = [e for e in service.journal() if e["method"] == "POST"]
    whole = wanted[-1]["ended"] - wanted[0]["began"]
    return {**{part: found[part] for part in PARTS if part in found}, "whole": whole}, len(wanted)


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    measured = {latency: [] for latency in LATENCIES}
    with tempfile.TemporaryDirectory() as directory, running() as service:
        project = Project(Path(directory))
        project.environment |= service.environment
        project.write("flow.py", FLOW)
        for turn in range(rounds + 1):
            for latency, found in measured.items():
                result = once(project, service, latency)
                if turn:
                    found.append(result)
    names = [name for name in (*PARTS, "whole") if name in measured[0.0][0][0]]
    print(f"| seconds, median of {rounds} | {' | '.join(names)} | requests in a row |")
    print("| --- |" + " --- |" * (len(names) + 1))
    for latency, found in measured.items():
        cells = [f"{statistics.median(parts[n] for parts, _ in found):.2f}" for n in names]
        requests = statistics.median(number for _, number in found)
        print(f"| {latency * 1000:.0f} ms away | {' | '.join(cells)} | {requests:g} |")


if __name__ == "__main__":
    main()
