"""Directories on the host live as long as their owner, and no longer."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings

import pytest

from metaflow_sandbox.errors import SandboxError
from metaflow_sandbox.leases import Lease, base, living


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """A temporary directory of this test's own."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


OWNER = """
import sys, time
from metaflow_sandbox.leases import Lease
lease = Lease("run")
(lease.path / "file").write_text("left behind")
print(lease.path, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def another_process(script=OWNER):
    """A process with a lease, and the lease's path."""
    command = [sys.executable, "-c", script]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def test_a_lease_is_a_private_directory_until_it_is_released(temporary):
    lease = Lease("run")
    assert lease.path.parent == base() and base().parent == temporary
    assert lease.path.stat().st_mode & 0o777 == 0o700
    (lease.path / "file").write_text("content")
    assert living("run") == [lease.path]
    lease.release()
    assert not lease.path.exists()
    assert living("run") == []


def test_releasing_twice_is_quiet():
    lease = Lease("run")
    lease.release()
    lease.release()


def test_a_released_lease_holds_no_descriptor():
    before = os.listdir("/proc/self/fd")
    for _ in range(5):
        Lease("run").release()
    assert os.listdir("/proc/self/fd") == before


def test_the_lease_of_a_killed_process_is_removed_and_a_living_one_stays():
    mine = Lease("run")
    with another_process() as (_, alive), another_process() as (victim, left):
        assert {str(p) for p in living("run")} == {str(mine.path), alive, left}
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        assert os.path.exists(left)
        assert {str(p) for p in living("run")} == {str(mine.path), alive}
        assert not os.path.exists(left)
        assert os.path.exists(alive) and mine.path.exists()
    mine.release()


def test_children_that_the_owner_started_do_not_keep_its_lease():
    script = OWNER + "\n"
    script = script.replace(
        "print(lease", "import subprocess; subprocess.Popen(['sleep', '30'])\nprint(lease"
    )
    with another_process(script) as (victim, left):
        (child,) = _children(victim.pid)
        try:
            victim.kill()
            victim.wait()
            assert living("run") == []
            assert not os.path.exists(left)
        finally:
            os.kill(child, signal.SIGKILL)


def _children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as f:
        return [int(p) for p in f.read().split()]


def test_another_kind_of_lease_is_left_alone():
    with another_process() as (victim, left):
        victim.kill()
        victim.wait()
        assert living("box") == []
        assert os.path.exists(left)
        assert living("run") == []
        assert not os.path.exists(left)


def test_a_name_that_is_taken_is_not_taken_over():
    first = Lease("box", "name")
    (first.path / "file").write_text("mine")
    with pytest.raises(OSError):
        Lease("box", "name")
    assert (first.path / "file").read_text() == "mine"
    assert living("box") == [first.path]
    first.release()


def test_a_lease_that_is_just_being_made_is_not_swept():
    new = base() / ".new-xyz"
    new.mkdir()
    assert living("run") == []
    assert new.exists()


def test_a_lease_that_was_never_finished_is_swept_at_last():
    new = base() / ".new-xyz"
    (new / "deep").mkdir(parents=True)
    os.utime(new, (time.time() - 7200,) * 2)
    living("run")
    assert not new.exists()


def test_a_lease_whose_release_was_interrupted_is_removed_by_the_next():
    with another_process() as (victim, left):
        os.unlink(os.path.join(left, "lock"))  # as rmtree does, in no certain order
        victim.kill()
        victim.wait()
    os.utime(left, (time.time() - 7200,) * 2)
    living("run")
    assert not os.path.exists(left)


def test_a_lease_whose_lock_can_not_be_looked_at_is_left_alone():
    with another_process() as (_, alive):
        os.chmod(os.path.join(alive, "lock"), 0)
        pid = os.fork()
        if pid == 0:  # without the rights of root, which permissions don't hold
            try:
                header = (ctypes.c_uint32 * 2)(0x20080522, 0)
                ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)())
                living("run")
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        assert os.path.exists(os.path.join(alive, "file"))


# --- the directory that holds the leases ------------------------------------------------


def test_the_directory_is_made_private_whatever_the_umask(temporary):
    old = os.umask(0)
    try:
        assert base().stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(old)
    assert base() == temporary / f"metaflow-sandbox-{os.getuid()}"


def refused():
    for attempt in (base, lambda: Lease("run"), lambda: living("run")):
        with pytest.raises(SandboxError, match="TMPDIR"):
            attempt()


@pytest.mark.parametrize("mode", [0o755, 0o777, 0o1777, 0o770, 0o707, 0o701, 0o710, 0o740])
def test_a_directory_that_others_can_enter_is_refused(mode):
    path = base()
    path.chmod(mode)
    refused()


def test_a_directory_of_somebody_else_is_refused():
    path = base()
    if os.getuid() != 0:
        warnings.warn("only root can make somebody else's directory: NOT TESTED", stacklevel=1)
        return
    os.chown(path, 65534, 65534)
    refused()


def test_a_link_to_a_directory_is_refused(temporary):
    other = temporary / "other"
    other.mkdir(mode=0o700)
    (temporary / f"metaflow-sandbox-{os.getuid()}").symlink_to(other)
    refused()
    assert list(other.iterdir()) == []


def test_a_link_to_nowhere_is_refused_and_nothing_is_made_there(temporary):
    (temporary / f"metaflow-sandbox-{os.getuid()}").symlink_to(temporary / "nowhere")
    refused()
    assert not (temporary / "nowhere").exists()


def test_a_file_in_its_place_is_refused(temporary):
    (temporary / f"metaflow-sandbox-{os.getuid()}").write_text("")
    refused()


def test_what_is_not_ours_in_the_directory_is_left_alone():
    (base() / "notes").write_text("x")
    (base() / "other-kind").mkdir()
    assert living("run") == []
    assert {p.name for p in base().iterdir()} == {"notes", "other-kind"}
