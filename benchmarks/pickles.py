"""What the interpreter of pickles adds to plain unpickling, in CPU time, alternating.

    python benchmarks/pickles.py [ROUNDS]

Prints medians and the ratio of each kind of data. An array of 100 MB is promised to cost
at most 15 % more.
"""

import datetime
import pickle
import statistics
import sys
import time

import numpy
import pandas

from metaflow_extensions.sandbox.plugins.pickles import load_data

RANDOM = numpy.random.default_rng(0)
KINDS = {
    "array, 100 MB": RANDOM.random(12_500_000),
    "array, 100 MB, truth values": RANDOM.random(100_000_000) < 0.5,
    "frame, 80 MB": pandas.DataFrame(RANDOM.random((1_000_000, 10))),
    "arrays, 2,000 small": [numpy.arange(10) for _ in range(2_000)],
    "numbers, 200,000": list(range(200_000)),
    "dicts, 20,000": [{"id": i, "score": i / 7, "text": "x"} for i in range(20_000)],
    "dates, 20,000": [datetime.datetime(2020, 1, 1, microsecond=i) for i in range(20_000)],
}


def took(function, data):
    start = time.process_time()
    loaded = function(data)
    seconds = time.process_time() - start
    del loaded
    return seconds


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    print(f"median of {rounds}                   plain       read     ratio")
    for name, value in KINDS.items():
        data = pickle.dumps(value, 4)
        pairs = [(took(pickle.loads, data), took(load_data, data)) for _ in range(rounds + 1)][1:]
        plain, ours = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        print(f"{name:30} {plain:8.3f} s {ours:8.3f} s {ratio:8.2f}")


if __name__ == "__main__":
    main()
