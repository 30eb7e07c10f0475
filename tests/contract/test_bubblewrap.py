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
from metaflow_sandbox.backends.bubblewrap import Bubblewrap, limits, network
from metaflow_sandbox.backends.bubblewrap.program import mapped
from metaflow_sandbox.errors import SandboxError, SandboxGone
from metaflow_sandbox.testing import BackendContract


class TestBubblewrap(BackendContract):
    @pytest.fixture
    def backend(self):
        return Bubblewrap()


@pytest.mark.sample(0.4)
class TestRemoteLike(BackendContract):
    @pytest.fixture
    def backend(self):
        return RemoteLike()


as_root = pytest.mark.skipif(
    os.getuid() != 0, reason="for users this is the only way, which TestBubblewrap takes"
)


@as_root
@pytest.mark.sample(0.3)
class TestWatched(BackendContract):
    """Without control groups, as they are missing for users of machines without systemd."""

    @pytest.fixture
    def backend(self):
        backend = Bubblewrap()
        backend.means = None
        return backend


@as_root
@pytest.mark.sample(0.3)
class TestRootInANamespace(BackendContract):
    """As root in a container that may not mount."""

    @pytest.fixture
    def backend(self, monkeypatch):
        backend = Bubblewrap()
        ways = backend._ways
        monkeypatch.setattr(backend, "_ways", lambda s: (w for w in ways(s) if w.namespace))
        return backend


PREFLIGHT = (
    "import anyio\nfrom metaflow_sandbox.backends.bubblewrap import Bubblewrap\n"
    "print(anyio.run(Bubblewrap().preflight))"
)


def preflight(*command, **more):
    return subprocess.run(
        [*command, sys.executable, "-c", PREFLIGHT], capture_output=True, text=True, **more
    )


def test_root_of_a_users_own_namespace_is_treated_as_that_user():
    done = preflight("unshare", "--user", "--map-root-user")
    if os.getuid() == 0:  # then it is the machine's root, who has nobody else to become
        assert "no other user (unshare -r)" in done.stderr
    else:
        assert done.returncode == 0, done.stderr


@as_root
def test_root_without_the_right_to_mount_makes_a_namespace():
    done = preflight("setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin")
    assert done.returncode == 0, done.stderr


@as_root
def test_root_without_any_rights_learns_what_is_missing():
    done = preflight("setpriv", "--bounding-set", "-all", "--inh-caps", "-all")
    assert done.returncode != 0
    assert "CAP_SETFCAP" in done.stderr


def test_a_proc_with_covered_parts_is_refused_and_explained():
    user = [] if os.getuid() == 0 else ["--user", "--map-root-user"]
    script = 'mount --bind /dev/null /proc/uptime; exec "$@"'
    nobody = ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"]
    as_nobody = nobody if os.getuid() == 0 else []
    done = preflight("unshare", "--mount", *user, "sh", "-c", script, "sh", *as_nobody)
    assert done.returncode != 0
    # Machines of CI look like containers, for which there are other words.
    assert "Parts of /proc are covered" in done.stderr or "systempaths=" in done.stderr


def test_a_machine_without_user_namespaces_is_explained(tmp_path):
    user = [] if os.getuid() == 0 else ["--user", "--map-root-user"]
    script = 'echo 0 > /proc/sys/user/max_user_namespaces; exec "$@"'
    nobody = ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"]
    if os.getuid() == 0:
        user, as_nobody = ["--user", "--map-root-user"], nobody
        done = preflight("unshare", *user, "sh", "-c", script, "sh", *as_nobody)
    else:
        done = preflight("unshare", *user, "sh", "-c", script, "sh")
    assert done.returncode != 0
    assert "max_user_namespaces" in done.stderr


def test_too_many_files_end_a_sandbox():
    script = "i = 0\nwhile True:\n open(f'f{i}', 'w').close(); i += 1"

    async def attack():
        sandbox = await Bubblewrap().create(SandboxSpec(disk=64, memory=256, network=False))
        try:
            with contextlib.suppress(SandboxGone):
                done = await sandbox.run([sys.executable, "-c", script], timeout=60)
                assert done.exit_code != 0
            return sandbox.diagnose()
        finally:
            await sandbox.destroy()

    said = anyio.run(attack) or "the files ran out by themselves"
    assert "memory" in said or "files" in said


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("truncate -s 1T sparse", "over 128 MB"),
        ("touch hidden; chmod 000 hidden", "can be read"),
    ],
)
def test_what_can_not_be_kept_whole_is_said_and_fills_no_disk(script, said, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    async def attack():
        sandbox = await Bubblewrap().create(SandboxSpec(disk=64, network=False))
        try:
            await sandbox.run(["sh", "-c", script])
            with pytest.raises(SandboxError, match=said):
                await sandbox.keep({})
            assert (await sandbox.run(["true"])).exit_code == 0
        finally:
            await sandbox.destroy()

    anyio.run(attack)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


async def remarks(backend):
    sandbox = await backend.create(SandboxSpec(disk=64, network=True))
    await sandbox.destroy()
    return sandbox.remarks()


def test_a_means_that_does_not_serve_gives_way_to_the_next(monkeypatch, tmp_path):
    """systemd and slirp4netns are there and refuse: the sandbox is held by other means."""
    for name in ("systemd-run", "slirp4netns"):
        fake = tmp_path / name
        fake.write_text("#!/bin/sh\necho no >&2\nexit 1\n")
        fake.chmod(0o755)
    monkeypatch.setattr(network, "_PATH", f"{tmp_path}:{network._PATH}")
    backend = Bubblewrap()
    backend.has_route = True
    backend.means = limits.Scope(str(tmp_path / "systemd-run"), frozenset({"memory"}))
    notes = anyio.run(backend.preflight).notes
    assert anyio.run(remarks, backend) == [
        "network: by the HTTP(S) proxy alone, since slirp4netns did not start: no"
    ]
    assert any("looking ten times a second" in note for note in notes)
    assert any("through an HTTP(S) proxy" in note for note in notes)


def test_nothing_enters_a_namespace_before_it_has_users():
    """Bubblewrap tells of its child earlier: what enters then has no rights, and a sandbox
    would lose its route."""
    process = subprocess.Popen(["unshare", "--user", "cat"], stdin=subprocess.PIPE)
    users = Path(f"/proc/{process.pid}/uid_map")
    own = os.readlink("/proc/self/ns/user")
    while os.readlink(f"/proc/{process.pid}/ns/user") == own:
        time.sleep(0.01)

    async def attack():
        with anyio.move_on_after(0.2):
            await mapped(process.pid)
            raise AssertionError("it has no users yet")
        users.write_text(f"0 {os.getuid()} 1")
        await mapped(process.pid)

    anyio.run(attack)
    process.communicate()
    with pytest.raises((ProcessLookupError, FileNotFoundError)):
        anyio.run(mapped, process.pid)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can take a mount from others")
def test_a_sandbox_with_a_route_takes_no_mount_from_this_machine(tmp_path):
    """Where mounts are shared with other namespaces, as systemd has them."""
    assert network.route_available()
    inner = tmp_path / "outer/inner"

    async def make():
        await (await Bubblewrap().create(SandboxSpec(disk=64, network=True))).destroy()

    with contextlib.ExitStack() as mounted:
        for path in (inner.parent, inner):
            path.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "test", path], check=True)
            mounted.callback(subprocess.run, ["umount", path])
            subprocess.run(["mount", "--make-shared", path], check=True)
        anyio.run(make)
        assert inner.is_mount()


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
    # Bubblewrap itself may live a little longer, and only then its child is an orphan.
    assert_none_is_left(lambda: anyio.run(Bubblewrap().preflight))


def assert_none_is_left(attempt=lambda: None):
    deadline = time.monotonic() + 10
    attempt()
    while (left := mine()) and time.monotonic() < deadline:
        time.sleep(0.05)  # another worker's, perhaps, which is about to end
        attempt()
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
