"""A Docker engine of the tests' own, with images made here: no registry is asked for anything.

    python tests/contract/engines.py COMMAND…    runs a command beside one, as root

The user of `scripts/as-unprivileged-user` may use its socket, by a group, and rootless Podman.
TEST_DOCKERD tells the command where it is.

It has its own directories, socket and pidfile and no bridge, so that it disturbs no other one,
and other tests' engines don't disturb it. Several test processes share one: the first starts
it, the last ends it.
"""

import contextlib
import fcntl
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

PROGRAMS = ("dockerd", "docker", "mmdebstrap")
INSTALL = "apt-get install -y docker.io mmdebstrap"
CACHE = Path("/var/tmp/metaflow-sandbox-tests")
CACHE_SECONDS = 30 * 86400
#: As Debian 12 has it: another minor version than most that run these tests.
IMAGE = "debian-python:3.11"
#: As `@docker` takes it where nothing else is asked for.
DEFAULT = f"python:{sys.version_info.major}.{sys.version_info.minor}-slim"
START_SECONDS = 120


def missing():
    return [name for name in PROGRAMS if shutil.which(name) is None]


@contextlib.contextmanager
def locked(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fresh(path):
    return path.exists() and time.time() - path.stat().st_mtime < CACHE_SECONDS


def root_file_system():
    """An archive of a small Debian with Python, dpkg and apt; made once a month."""
    archive = CACHE / "debian.tar"
    if fresh(archive):  # another user's, perhaps
        return archive
    with locked(CACHE / "lock"):
        if not fresh(archive):
            new = CACHE / "new.tar"
            subprocess.run(
                ["mmdebstrap", "--quiet", "--variant=minbase", "--include=python3", "bookworm",
                 str(new)],
                check=True,
            )  # fmt: skip
            new.rename(archive)
    return archive


class Dockerd:
    """An engine below a directory, shared by the processes that `join` it."""

    def __init__(self, directory, *options):
        self.directory = directory
        self.options = options
        self.socket = directory / "docker.sock"
        self.host = f"unix://{self.socket}"
        self.environment = {"DOCKER_HOST": self.host}

    def docker(self, *arguments, check=True):
        argv = ["docker", "--host", self.host, *arguments]
        done = subprocess.run(argv, capture_output=True, text=True)
        assert done.returncode == 0 or not check, (arguments, done.stdout, done.stderr)
        return done

    def join(self):
        with locked(self.directory / "lock"):
            users = self._users() + 1
            if users == 1:
                self.start()
                try:
                    self.docker("import", str(root_file_system()), IMAGE)
                except BaseException:
                    self.stop()
                    raise
            (self.directory / "users").write_text(str(users))
        return self

    def leave(self):
        with locked(self.directory / "lock"):
            users = self._users() - 1
            (self.directory / "users").write_text(str(users))
            if users == 0:
                self.stop()

    def _users(self):
        with contextlib.suppress(FileNotFoundError):
            return int((self.directory / "users").read_text())
        return 0

    def start(self):
        log = open(self.directory / "log", "ab")
        process = subprocess.Popen(
            ["dockerd", "--data-root", self.directory / "data", "--exec-root",
             self.directory / "exec", "--pidfile", self.directory / "pid", "--host", self.host,
             "--bridge=none", "--iptables=false", "--ip6tables=false", *self.options],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/",
        )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while self.docker("info", check=False).returncode != 0:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise AssertionError((self.directory / "log").read_text()[-3000:])
            time.sleep(0.2)

    def stop(self, number=signal.SIGTERM):
        pid = int((self.directory / "pid").read_text())
        descriptor = os.pidfd_open(pid)
        signal.pidfd_send_signal(descriptor, number)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
        # Ended; the process that started it, another of pytest's, may not look until its own end.
        select.select([descriptor], [], [])
        os.close(descriptor)
        if number == signal.SIGTERM:
            self._unmount()
            shutil.rmtree(self.directory, ignore_errors=True)

    def _unmount(self):
        """What an engine that was killed has left mounted."""
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            if (point := line.split()[4]).startswith(f"{self.directory}/"):
                subprocess.run(["umount", "--lazy", point])


class Podman:
    """Podman with directories of its own; the default image is there. As who runs this."""

    def __init__(self, directory):
        found = [shutil.which(name) for name in ("podman", "runc", "mmdebstrap")]
        if None in found:
            pytest.fail("there is no podman, runc or mmdebstrap: apt-get install -y podman runc")
        if os.getuid() != 0 and not Path("/etc/subuid").read_text().strip():
            pytest.skip("NOT CHECKED: rootless Podman, since /etc/subuid gives nobody other users")
        self.program = directory / "podman"
        self.environment = {"METAFLOW_SANDBOX_DOCKER": str(self.program)}
        # runc, since crun refuses machines that have control groups of both versions.
        options = [f"--runtime={found[1]}", "--cgroup-manager=cgroupfs", "--storage-driver=overlay"]
        options += [f"--{name}={directory / name}" for name in ("root", "runroot", "tmpdir")]
        self.program.write_text(f'#!/bin/sh\nexec {found[0]} {" ".join(options)} "$@"\n')
        self.program.chmod(0o755)

    def docker(self, *arguments, check=True):
        done = subprocess.run([self.program, *arguments], capture_output=True, text=True)
        assert done.returncode == 0 or not check, (arguments, done.stdout, done.stderr)
        return done

    @classmethod
    @contextlib.contextmanager
    def there(cls):
        # It takes no directory with a name of over 50 characters, as those of tests may be.
        with tempfile.TemporaryDirectory(dir="/tmp") as directory:
            engine = cls(Path(directory))
            try:
                engine.docker("import", str(root_file_system()), IMAGE)
                engine.docker("tag", IMAGE, DEFAULT)
                yield engine
            finally:
                engine.docker("system", "reset", "--force", check=False)


#: MOUNTS COMMAND…: in a mount namespace whose user 61234 has a name and other users below it.
_WITH_A_NAME = """
for name in passwd group subuid subgid; do
    [ -e /etc/$name ] || touch /etc/$name
    mount --bind "$0/$name" /etc/$name
done
exec "$@"
"""
USER = 61234  # of scripts/as-unprivileged-user


def with_a_name(directory, command):
    """A command, so changed that rootless Podman can serve that user."""
    names = {
        "passwd": f"unprivileged:x:{USER}:{USER}::/nonexistent:/bin/sh\n",
        "group": f"unprivileged:x:{USER}:\n",
        "subuid": f"unprivileged:{USER << 4}:65536\n",
        "subgid": f"unprivileged:{USER << 4}:65536\n",
    }
    for name, line in names.items():
        there = Path("/etc", name)
        path = directory / name
        path.write_text((there.read_text() if there.exists() else "") + line)
        path.chmod(0o644)
    return ["unshare", "--mount", "sh", "-c", _WITH_A_NAME, str(directory), *command]


if __name__ == "__main__":
    # A name that is short enough for sockets, below a directory that everybody gets to.
    with tempfile.TemporaryDirectory(prefix="engine.", dir="/var/tmp") as base:
        Path(base).chmod(0o755)
        engine = Dockerd(Path(base) / "dockerd", f"--group={USER}").join()
        engine.directory.chmod(0o755)
        environment = {**os.environ, "TEST_DOCKERD": str(engine.directory)}
        try:
            command = with_a_name(Path(base), sys.argv[1:])
            code = subprocess.run(command, env=environment, check=False).returncode
        finally:
            engine.leave()
    sys.exit(code)
