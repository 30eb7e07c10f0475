"""Who this process is to the kernel, and a user namespace for a root that may not mount.

A container's root often lacks the right to mount, and may still make a user namespace
in which it has it. That has two users: root, who mounts, and the one that the step
becomes, who is nobody outside.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
from pathlib import Path

from ...errors import BackendUnavailable, SandboxError

_NS_GET_USERNS = 0xB701


def global_root() -> bool:
    """Whether this is the machine's own root, in a container too; not a namespace's.

    The owner of /proc/sys is what decides over writing there. Maps of users don't
    tell: that of a namespace that real root made looks like a user's.
    """
    if os.getuid() != 0:
        return False
    try:
        return os.stat("/proc/sys/kernel").st_uid == 0
    except OSError:  # a /proc without it, on which bubblewrap fails by itself
        return True


class Uids:
    """Users that are nobody on this machine, one for each sandbox of this process."""

    _FIRST = 1879048192  # far above what systems and their containers hand out
    _EACH = 512  # for each process id, of which the kernel has up to 4,194,304

    def __init__(self) -> None:
        self._taken: set[int] = set()

    def take(self) -> int:
        """A user that no living sandbox has.

        Raises:
            SandboxError: this process has too many sandboxes.
        """
        first = self._FIRST + os.getpid() * self._EACH
        for uid in range(first, first + self._EACH):
            if uid not in self._taken:
                self._taken.add(uid)
                return uid
        raise SandboxError(
            f"one run can't have more than {self._EACH} sandboxes of bubblewrap at once: run it "
            "with fewer --max-workers",
            op="create",
        )

    def give_back(self, uid: int) -> None:
        """Once nothing runs as this user any more."""
        self._taken.discard(uid)


def owner_of(namespace: int) -> int | None:
    """The user namespace to which another namespace belongs; None if it is our own.

    Returns:
        A descriptor that the caller closes.
    """
    owner = fcntl.ioctl(namespace, _NS_GET_USERNS)
    if os.path.sameopenfile(owner, (own := os.open("/proc/self/ns/user", os.O_RDONLY))):
        os.close(owner)
        owner = -1
    os.close(own)
    return owner if owner >= 0 else None


def with_two_users(uid: int) -> int:
    """A new user namespace with root and `uid`, both the same as outside.

    Returns:
        A descriptor that holds it, and that the caller closes.

    Raises:
        BackendUnavailable: it can't be made here.
    """
    ranges = (line.split() for line in Path("/proc/self/uid_map").read_text().splitlines())
    if not any(int(first) <= uid < int(first) + int(count) for first, _, count in ranges):
        raise BackendUnavailable(
            "this is the machine's root in a user namespace that has no other user (unshare -r): "
            "start it outside, or as another user",
            op="create",
        )
    # `cat` answers when `unshare` has done its work.
    with subprocess.Popen(
        ["unshare", "--user", "cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PATH": "/usr/bin:/bin"},
    ) as process:
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise RuntimeError("no pipes")
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(b".")
            process.stdin.flush()
        if process.stdout.read(1) != b".":
            said = process.stderr.read().decode(errors="replace").strip()
            raise BackendUnavailable(f"a user namespace for root: {said}", op="create")
        home = Path("/proc", str(process.pid))
        try:
            for name in ("uid_map", "gid_map"):
                (home / name).write_text(f"0 0 1\n{uid} {uid} 1\n")
            return os.open(home / "ns" / "user", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise BackendUnavailable(
                f"a user namespace for root: {e.strerror} (it takes CAP_SETUID, CAP_SETGID and "
                "CAP_SETFCAP)",
                op="create",
            ) from e
        finally:
            process.stdin.close()
