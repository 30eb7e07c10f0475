"""Bubblewrap keeps the contract: by its own bindings, and like a remote provider would."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import anyio
import pytest
from remote_like import RemoteLike

from metaflow_sandbox.backends.base import SandboxSpec
from metaflow_sandbox.backends.bubblewrap import Bubblewrap
from metaflow_sandbox.testing import BackendContract


class TestBubblewrap(BackendContract):
    @pytest.fixture
    def backend(self):
        return Bubblewrap()


class TestRemoteLike(BackendContract):
    @pytest.fixture
    def backend(self):
        return RemoteLike()


@pytest.mark.parametrize("milliseconds", range(0, 40, 2))
def test_a_start_that_is_cancelled_at_any_point_leaves_no_process(milliseconds):
    async def start():
        with anyio.move_on_after(milliseconds / 1000):
            sandbox = await Bubblewrap().create(SandboxSpec(disk=64))
            await sandbox.destroy()

    anyio.run(start)
    assert_none_is_left()


@pytest.mark.parametrize("milliseconds", range(0, 24, 3))
def test_what_a_killed_launcher_left_is_ended_by_the_next_preflight(milliseconds):
    script = (
        "import anyio\nfrom metaflow_sandbox.backends.bubblewrap import Bubblewrap\n"
        "from metaflow_sandbox.backends.base import SandboxSpec\n"
        "print('ready', flush=True)\nanyio.run(Bubblewrap().create, SandboxSpec(disk=64))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        time.sleep(milliseconds / 1000)
        process.kill()
    anyio.run(Bubblewrap().preflight)
    assert_none_is_left()


def assert_none_is_left():
    deadline = time.monotonic() + 10
    while (left := mine()) and time.monotonic() < deadline:
        time.sleep(0.05)  # another worker's, perhaps, which is about to end
    assert left == []


def mine():
    """Bubblewrap's processes of sandboxes of this interpreter that nobody owns."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (path / "cmdline").read_bytes()
            parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
            if b"bwrap\0--args" in command and sys.executable.encode() in command:
                above = Path("/proc", parent, "cmdline").read_bytes()
                if above != command and int(parent) in (1, os.getpid()):
                    found.append(path.name)
    return found
