"""Memory limits by control groups, version 1 or 2, where this process may make them."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

#: What the names of our groups begin with.
PREFIX = "metaflow-sandbox-"
_ROOT = Path("/sys/fs/cgroup")
_ABANDONED_SECONDS = 60.0


@dataclass(frozen=True)
class _Hierarchy:
    """Where groups can be made, and what the version calls its files."""

    parent: Path
    limit: str
    swap: str
    events: str


def _own_path(controller: str) -> str | None:
    """This process's group in the hierarchy of a controller ("" for version 2)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(",") or controller == controllers == "":
                return path.lstrip("/")
    return None


def _hierarchy() -> _Hierarchy | None:
    if (own := _own_path("memory")) is not None:
        version1 = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.oom_control")
        for parent in (_ROOT / "memory" / own, _ROOT / "memory"):
            if os.access(parent, os.W_OK) and (parent / version1[0]).exists():
                return _Hierarchy(parent, *version1)
    elif (_ROOT / "cgroup.controllers").exists():
        # Version 2 lets a group have processes or limited children, not both: the
        # root is the exception. Delegated user groups come through systemd.
        controllers = _ROOT / "cgroup.subtree_control"
        with contextlib.suppress(OSError):
            if "memory" not in controllers.read_text().split():
                controllers.write_text("+memory")
            if os.access(_ROOT, os.W_OK):
                return _Hierarchy(_ROOT, "memory.max", "memory.swap.max", "memory.events")
    return None


class MemoryGroup:
    """A control group with a memory limit. Used once, then removed."""

    def __init__(self, hierarchy: _Hierarchy, name: str, megabytes: int) -> None:
        self._hierarchy = hierarchy
        self._path = hierarchy.parent / name
        self._path.mkdir()
        try:
            limit = megabytes << 20
            (self._path / hierarchy.limit).write_text(str(limit))
            # Without this a step could fill the swap instead. Version 1 counts
            # both together, version 2 swap alone; kernels without swap have no file.
            with contextlib.suppress(OSError):
                value = 0 if hierarchy.swap == "memory.swap.max" else limit
                (self._path / hierarchy.swap).write_text(str(value))
        except OSError:
            self._path.rmdir()
            raise

    def add(self, pid: int) -> None:
        """Puts a process in; its later children follow."""
        (self._path / "cgroup.procs").write_text(str(pid))

    def kills(self) -> int:
        """How many processes the kernel ended because the limit was reached."""
        with contextlib.suppress(OSError):
            for line in (self._path / self._hierarchy.events).read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
        return 0

    def remove(self) -> None:
        """Removes the group. Its processes must have ended; the kernel may lag behind."""
        for _ in range(100):
            try:
                self._path.rmdir()
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.01)
            else:
                return


def available() -> bool:
    """Whether memory limits can be enforced here."""
    return _hierarchy() is not None


def limit_memory(name: str, megabytes: int) -> MemoryGroup:
    """Makes a group that holds its processes to so many megabytes.

    Raises:
        OSError: it can't be made, though `available` may have said so.
    """
    hierarchy = _hierarchy()
    if hierarchy is None:
        raise OSError("no control group can be made here")
    for left in hierarchy.parent.glob(f"{PREFIX}*"):
        # Of a launcher that was killed. A group with processes in it can't be removed.
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                left.rmdir()
    return MemoryGroup(hierarchy, name, megabytes)
