"""What an environment costs: the first and the second run, beside Metaflow without sandboxes.

    python benchmarks/dependencies.py [ROUNDS]

A flow with one step of `@pypi` and one of `@conda`, on the tests' own conda channel and
wheels, so that no network is measured. Each round runs both ways in turn, the first time
with nothing resolved, downloaded or built. Prints medians in seconds.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/dependencies"))

import channel  # noqa: E402

FLOW = """
from metaflow import FlowSpec, bubblewrap, conda, pypi, step

def sandboxed(function):
    return {decorator}(function)

class Deps(FlowSpec):
    @conda(disabled=True)
    @step
    def start(self):
        self.next(self.fetch)

    @sandboxed
    @pypi(packages={{"pydash": "8.0.5"}})
    @step
    def fetch(self):
        import pydash
        self.next(self.count)

    @sandboxed
    @conda(packages={{"numpy": "1.26.4"}})
    @step
    def count(self):
        import numpy
        self.next(self.end)

    @conda(disabled=True)
    @step
    def end(self):
        pass

if __name__ == "__main__":
    Deps()
"""
WAYS = {"plain Metaflow": "(lambda f: f)", "@bubblewrap": "bubblewrap(network=False)"}


def environment(made, home):
    return {
        **os.environ,
        "PATH": f"{made / 'micromamba/bin'}:{os.environ['PATH']}",
        "HOME": str(home),
        "CONDA_CHANNELS": f"file://{made / 'channel'}",
        "MAMBA_ROOT_PREFIX": str(home / "mamba"),
        "MICROMAMBA_PYTHON": sys.executable,
        "METAFLOW_SANDBOX_MICROMAMBA": str(made / "micromamba"),
        "PIP_CONFIG_FILE": str(made / "pip.conf"),
        "XDG_CACHE_HOME": str(home / "cache"),
        "METAFLOW_USER": "bench",
    }


def run(home, variables):
    command = [sys.executable, "flow.py", "--no-pylint", "--environment=conda", "run"]
    start = time.monotonic()
    done = subprocess.run(
        command, check=False, cwd=home, env=variables, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SystemExit(done.stdout + done.stderr)
    return time.monotonic() - start


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    times = {(way, nth): [] for way in WAYS for nth in ("first", "second")}
    with tempfile.TemporaryDirectory() as directory:
        made = Path(directory, "made")
        channel.micromamba(made / "micromamba")
        channel.python_package(made / "channel")
        for wheel in channel.download(made / "wheels", "pip", "requests", "numpy==1.26.4"):
            channel.wheel_package(made / "channel", wheel)
        channel.index(made / "channel")
        channel.download(made / "index", "requests", "pydash==8.0.5")
        (made / "pip.conf").write_text(
            f"[global]\nno-index = true\nfind-links = {made / 'index'}\n"
        )
        for _ in range(rounds):
            for way, decorator in WAYS.items():
                home = Path(directory, "home")
                home.mkdir()
                (home / "flow.py").write_text(FLOW.format(decorator=decorator))
                variables = environment(made, home)
                for nth in ("first", "second"):
                    times[way, nth].append(run(home, variables))
                shutil.rmtree(home)
    print(f"| s, median of {rounds} | first run | second run |\n| --- | --- | --- |")
    for way in WAYS:
        cells = [f"{statistics.median(times[way, nth]):.1f}" for nth in ("first", "second")]
        print(f"| {way} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
