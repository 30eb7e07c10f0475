"""Directories on this machine that live as long as their owner, and no longer.

A lease is a directory with a locked file in it. The kernel drops the lock when
the owner ends, however it ends, so whoever comes next can tell what is stale
and removes it. Everything that this package puts on the host's disk, outside of
the user's datastore, is inside one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import anyio

from .errors import SandboxError

_NEW = ".new-"
_ABANDONED_SECONDS = 3600.0
_LOCK_SECONDS = 0.2


def base() -> Path:
    """The directory that holds this user's leases: private, and surely ours.

    Raises:
        SandboxError: somebody else made it, or it can't be made.
    """
    try:
        path = Path(tempfile.gettempdir(), f"metaflow-sandbox-{os.getuid()}")
    except FileNotFoundError as e:
        raise SandboxError(
            "there is no directory for temporary files that can be written: set TMPDIR to one; in "
            "a container with --read-only add --tmpfs /tmp.",
            op="lease",
        ) from e
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as e:
        raise SandboxError(
            f"{path} can't be made ({e.strerror}): set TMPDIR to a directory that you can write.",
            op="lease",
        ) from e
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise SandboxError(
            f"{path} is not a private directory of yours; somebody else may have made it. "
            "Remove it, or set TMPDIR to another directory.",
            op="lease",
        )
    return path


def identity() -> str:
    """A name of `base` that no other directory has: of another user, TMPDIR or container.

    Raises:
        SandboxError: as `base`.
    """
    path = base() / "identity"
    with contextlib.suppress(FileExistsError):
        os.symlink(uuid.uuid4().hex, path)  # there at once as a whole, which a file isn't
    return os.readlink(path)


def here() -> str:
    """Where the leases of this user's runs are, in a form that says nothing about the machine.

    The name of the machine alone is also that of other users, whose leases nobody sees here.

    Raises:
        SandboxError: as `base`.
    """
    return hashlib.sha256(f"{platform.node()} {identity()}".encode()).hexdigest()[:12]


class Lease:
    """A directory of this process. `release` removes it; so does the next `living`."""

    def __init__(self, kind: str, name: str | None = None) -> None:
        root = base()
        self.id = name or uuid.uuid4().hex[:12]
        self.path = root / f"{kind}-{self.id}"
        # Locked before it gets its name, so that nobody takes it for a stale one.
        new = Path(tempfile.mkdtemp(prefix=_NEW, dir=root))
        self._lock = os.open(new / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        new.rename(self.path)

    def release(self) -> None:
        """Removes the directory and all in it. Quiet if that was done already."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _locked(lock: Path) -> bool:
    """Whether somebody holds this lock. One that is gone went first when a lease was removed."""
    try:
        with open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError:
        return True  # it can't be known, so nothing is removed
    return False


async def alone(lock: int) -> None:
    """Waits until no other process has this file locked. A thread that waits can't be cancelled."""
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        await anyio.sleep(_LOCK_SECONDS)


def remove_old(directory: Path, seconds: float, pattern: str = "*") -> None:
    """Removes the directories in a directory that nobody has changed for so long."""
    for path in directory.glob(pattern):
        with contextlib.suppress(OSError):  # another process was quicker
            if time.time() - path.stat().st_mtime > seconds:
                shutil.rmtree(path, ignore_errors=True)


def living(kind: str, bury: Callable[[Path], None] | None = None) -> list[Path]:
    """The leases of a kind whose owners live. Removes those whose owners don't.

    Args:
        bury: called with each of those before it is removed.
    """
    found = []
    remove_old(base(), _ABANDONED_SECONDS, f"{_NEW}*")
    for path in base().iterdir():
        if path.name.startswith(f"{kind}-"):
            if _locked(path / "lock"):
                found.append(path)
            else:
                if bury is not None:
                    bury(path)
                shutil.rmtree(path, ignore_errors=True)
    return found
