"""Feeds the interpreter bytes that are guided by what they reach in it (atheris).

    make fuzz                    ten minutes on each core
    make fuzz FUZZ_SECONDS=3600

Each process has 3 GB and its own time: what executes, imports, crashes, hangs or grows
ends it, and leaves the bytes in `build/fuzz/`. What loads is shown and used, since it is
then that a forged value does its harm.

Atheris is not among the development requirements, since it is there for some Pythons
only: `pip install atheris`.
"""

import contextlib
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
OUT = ROOT / "build" / "fuzz"
MEMORY = 3 << 30
# Names that no data has: if one of these events comes, a pickle got its way.
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.",
    "socket.",
    "pickle.find_class",
)


def known_types():
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "unit")]
    import test_pickles_types

    return test_pickles_types


def seeds():
    """Pickles of each type of data, by each protocol, and forged ones."""
    known = known_types()
    from tests.attacks.test_pickles import ATTACKS, FORGED, bytes_of
    from tests.unit.test_pickles import SPECIAL

    for forged in [*(attack for attack, *_ in ATTACKS.values()), *FORGED.values()]:
        yield bytes_of(forged)[: 1 << 12]

    values = [*known.RARE_ARRAYS.values(), *known.FRAMES.values(), *SPECIAL.values()]
    for value in values:
        for protocol in (2, 4, 5):
            dumped = pickle.dumps(value, protocol)
            if len(dumped) < 1 << 12:
                yield dumped


def fuzz(arguments):
    """One process's work."""
    import atheris
    import numpy  # noqa: F401 - loaded before it is watched: what a pickle makes us import
    import pandas  # noqa: F401

    with atheris.instrument_imports(include=["metaflow_extensions.sandbox.plugins.pickles"]):
        from metaflow_extensions.sandbox.plugins import pickles
    use = known_types().use

    watching = []

    def audit(event, args):
        if watching and event.startswith(FORBIDDEN):
            os.abort()

    def one(data):
        watching.append(True)
        try:
            loaded = pickles.load_data(data, seconds=5)
        except pickles.Refused:
            return
        finally:
            watching.pop()
        with contextlib.suppress(Exception):  # a date that no calendar has, for one
            use(loaded)

    sys.addaudithook(audit)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    atheris.Setup([sys.argv[0], *arguments], one)
    atheris.Fuzz()


def main():
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 600
    corpus = OUT / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    options = [
        f"-max_total_time={seconds}",
        "-timeout=20",
        "-rss_limit_mb=2500",
        "-max_len=8192",
        f"-artifact_prefix={OUT}/",
        "-print_final_stats=1",
    ]
    workers = [
        subprocess.Popen([sys.executable, __file__, "--one", *options, str(corpus)])
        for _ in range(int(os.environ.get("FUZZ_WORKERS", os.cpu_count() or 1)))
    ]
    sys.exit(max(worker.wait() for worker in workers))


if __name__ == "__main__":
    if "--one" in sys.argv:
        fuzz(sys.argv[2:])
    else:
        main()
