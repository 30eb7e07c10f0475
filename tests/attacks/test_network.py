"""What each `network=` lets through, against a small internet in namespaces of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import internet
import pytest

PRIVATE_NAMES = {
    "private.example.com",
    "metadata.example.com",
    "loopback.example.com",
    "own.example.com",
}
PUBLIC_NAMES = {"api.example.com", "other.example.com"}


@pytest.fixture(scope="module")
def found():
    """{from where: {what: outcome}}, by `internet.py`."""
    user = [] if os.getuid() == 0 else ["--user", "--map-root-user"]
    script = Path(internet.__file__)
    done = subprocess.run(
        ["unshare", "--net", "--mount", *user, sys.executable, str(script)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def reached(outcomes):
    return {
        k for k, v in outcomes.items() if isinstance(v, str) and ("hello" in v or v == "reached")
    }


def test_without_a_sandbox_all_of_it_can_be_reached(found):
    unreachable = {"raw gateway", "raw resolver's web"}  # they exist only behind a device
    assert reached(found["bare"]) == {*internet.URLS, *internet.RAW} - unreachable


def test_none_is_none(found):
    assert reached(found["none"]) == set()


def test_the_internet_by_a_device_is_the_public_one(found):
    public = {internet.PUBLIC, *PUBLIC_NAMES, f"raw {internet.PUBLIC}", "raw port 8080"}
    bound = {f"bound raw {internet.PUBLIC}", "bound raw port 8080"}
    assert reached(found["route"]) == public | bound


def test_the_internet_by_the_proxy_is_the_public_one(found):
    assert reached(found["proxy"]) == {internet.PUBLIC, *PUBLIC_NAMES}


def test_hosts_are_those_that_are_listed_and_public(found):
    assert reached(found["hosts"]) == {"api.example.com"}


@pytest.mark.parametrize("where", ["proxy", "hosts"])
def test_the_run_says_what_was_refused(found, where):
    said = "\n".join(found[where]["remarks"])
    for name in PRIVATE_NAMES:
        assert f"{name}:80 was refused" in said
    assert ("other.example.com:80 was refused" in said) == (where == "hosts")
