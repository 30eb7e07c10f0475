"""Tests of which a commit runs a part, another for each: those that are marked `sample(share)`.

SHARE, from 0 to 1, takes so much of every test, marked or not. SUITE=all runs all of them.
"""

import hashlib
import os
import subprocess


def commit():
    """What stands for this commit. COMMIT says it where there is no repository."""
    if given := os.environ.get("COMMIT"):
        return given
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "none"


def take_part(items):
    """Divides collected tests into those that run and those that another commit runs."""
    kept, left = [], []
    chosen_by = None if whole() else commit()
    everywhere = float(os.environ.get("SHARE") or 1)
    for item in items:
        mark = item.get_closest_marker("sample")
        share = everywhere * (mark.args[0] if mark else 1)
        digest = hashlib.sha256(f"{chosen_by} {item.nodeid}".encode()).digest()
        place = int.from_bytes(digest[:4], "big") / (1 << 32)
        (kept if chosen_by is None or place < share else left).append(item)
    return kept, left


def said():
    """Which part runs, for who reads a report."""
    if whole():
        return "SUITE=all: nothing that is sampled was left out."
    share = os.environ.get("SHARE") or "1"
    return (
        f"A share of {share} of all tests, and less of what is marked `sample`: "
        f"the part of {commit()[:9]}. SUITE=all runs all of it."
    )


def whole():
    """Whether nothing is left out."""
    return os.environ.get("SUITE") == "all"
