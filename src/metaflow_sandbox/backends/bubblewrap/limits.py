"""Limits of memory, processes and CPUs, by the strongest means that this machine has.

    Scope           groups in a scope that the user's (or root's) systemd delegates to us
    ControlGroups   groups of our own, version 1 or 2, where this process may make them
    neither         `box.py` watches its processes and ends the sandbox: memory, no CPUs

systemd comes first, since it owns the groups where it runs, and takes away again what
others change in those that it has not delegated.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import SandboxError

#: What the names of our groups begin with.
PREFIX = "metaflow-sandbox-"
_ROOT = Path("/sys/fs/cgroup")
_ABANDONED_SECONDS = 60.0
_PERIOD = 100_000  # microseconds over which CPUs are counted
_CONTROLLERS = {"memory": "memory", "processes": "pids", "cpu": "cpu"}


@dataclass(frozen=True)
class Limits:
    """Megabytes, processes (threads count), CPUs. None: not limited."""

    memory: int | None = None
    processes: int | None = None
    cpu: float | None = None


class Group:
    """The control groups of one sandbox.

    Args:
        directories: one for each hierarchy that is used.
        events: the file in which the kernel counts the processes that it ended
            because the group reached its memory limit.
    """

    def __init__(self, directories: list[Path], events: Path | None) -> None:
        self._directories = directories
        self._events = events

    def add(self, pid: int) -> None:
        """Puts a process in; its later children follow."""
        for directory in self._directories:
            (directory / "cgroup.procs").write_text(str(pid))

    def kills(self) -> int:
        """How many processes the kernel ended because the memory limit was reached."""
        with contextlib.suppress(OSError):
            for line in (self._events or Path()).read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
        return 0

    def remove(self) -> None:
        """Removes the groups. Their processes must have ended; the kernel may lag behind."""
        for directory in self._directories:
            for _ in range(100):
                try:
                    directory.rmdir()
                except FileNotFoundError:
                    break
                except OSError:
                    time.sleep(0.01)
                else:
                    break


class Means(ABC):
    """A way to hold a sandbox to its limits.

    Attributes:
        name: what the user is told.
        enforces: which of "memory", "processes" and "cpu" it can limit here.
    """

    name: str
    enforces: frozenset[str]

    def prefix(self, name: str) -> list[str]:
        """What the sandbox's command has to be started by."""
        return []

    def environment(self) -> dict[str, str]:
        """Variables that `prefix` needs; bubblewrap clears them."""
        return {}

    @abstractmethod
    def hold(self, name: str, limits: Limits, pid: int) -> Group:
        """Holds a process that waits for it, and all that it will start, to the limits.

        Raises:
            OSError, SandboxError: it could not be done; the limits aren't in force.
        """

    def settle(self, outer: int) -> None:  # noqa: B027 - most have nothing to do
        """Called with bubblewrap's own process when the sandbox is up."""


def _settings(version: int, limits: Limits) -> dict[str, list[tuple[str, str, bool]]]:
    """{controller: [(file, value, whether it may be missing)]} for what is limited.

    Without a limit for the swap a step could fill that instead. Version 1 counts
    memory and swap together, version 2 swap alone; kernels without swap have neither.
    """
    found: dict[str, list[tuple[str, str, bool]]] = {}
    if limits.memory is not None:
        size = str(limits.memory << 20)
        found["memory"] = (
            [
                ("memory.max", size, False),
                ("memory.swap.max", "0", True),
                ("memory.oom.group", "1", True),
            ]
            if version == 2
            else [
                ("memory.limit_in_bytes", size, False),
                ("memory.memsw.limit_in_bytes", size, True),
            ]
        )
    if limits.processes is not None:
        found["pids"] = [("pids.max", str(limits.processes), False)]
    if limits.cpu is not None:
        quota = int(limits.cpu * _PERIOD)
        found["cpu"] = (
            [("cpu.max", f"{quota} {_PERIOD}", False)]
            if version == 2
            else [
                ("cpu.cfs_period_us", str(_PERIOD), False),
                ("cpu.cfs_quota_us", str(quota), False),
            ]
        )
    return found


class ControlGroups(Means):
    """Groups that this process makes itself.

    Args:
        parents: {controller: directory in which groups can be made}.
    """

    def __init__(self, version: int, parents: Mapping[str, Path]) -> None:
        self.name = f"control groups (version {version})"
        self._version = version
        self._parents = dict(parents)
        self.enforces = frozenset(k for k, c in _CONTROLLERS.items() if c in parents)

    def hold(self, name: str, limits: Limits, pid: int) -> Group:
        self._sweep()
        group = self._make(name, limits)
        try:
            group.add(pid)
        except OSError:
            group.remove()
            raise
        return group

    def _make(self, name: str, limits: Limits) -> Group:
        made: list[Path] = []
        events = None
        try:
            for controller, files in _settings(self._version, limits).items():
                directory = self._parents[controller] / (PREFIX + name)
                if directory not in made:
                    directory.mkdir()
                    made.append(directory)
                for file, value, optional in files:
                    with contextlib.suppress(*([OSError] if optional else [])):
                        (directory / file).write_text(value)
                if controller == "memory":
                    counted = "memory.events" if self._version == 2 else "memory.oom_control"
                    events = directory / counted
        except (OSError, KeyError):
            Group(made, None).remove()
            raise
        return Group(made, events)

    def _sweep(self) -> None:
        """Removes what launchers left that were killed. Groups with processes stay."""
        for parent in set(self._parents.values()):
            for left in parent.glob(f"{PREFIX}*"):
                with contextlib.suppress(OSError):
                    if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                        left.rmdir()

    def works(self) -> bool:
        """Makes a group with every limit, and removes it."""
        limits = Limits(*(1 if kind in self.enforces else None for kind in Limits.__annotations__))
        try:
            self._make(f"probe-{uuid.uuid4().hex[:12]}", limits).remove()
        except OSError:
            return False
        return bool(self.enforces)


class Scope(Means):
    """A transient scope unit for each sandbox, delegated to us: a group of ours below it.

    `systemd-run` makes the scope and becomes the command.
    """

    name = "a systemd scope"

    def __init__(self, program: str, controllers: frozenset[str]) -> None:
        self._program = program
        self.enforces = frozenset(k for k, c in _CONTROLLERS.items() if c in controllers)

    def environment(self) -> dict[str, str]:
        runtime = _runtime_directory()
        bus = os.environ.get("DBUS_SESSION_BUS_ADDRESS", f"unix:path={runtime}/bus")
        return {"XDG_RUNTIME_DIR": runtime, "DBUS_SESSION_BUS_ADDRESS": bus}

    def prefix(self, name: str) -> list[str]:
        return [
            self._program,
            *([] if os.getuid() == 0 else ["--user"]),
            *("--scope", "--quiet", "--collect", f"--unit={PREFIX}{name}"),
            *("--property=Delegate=yes", "--"),
        ]

    def settle(self, outer: int) -> None:
        # Systemd removes a scope whose last process has ended, and with it the kernel's
        # count of what it ended. Stopped, bubblewrap stays when its child has ended.
        os.kill(outer, signal.SIGSTOP)

    def hold(self, name: str, limits: Limits, pid: int) -> Group:
        scope = _ROOT / (_own_path("", str(pid)) or "")
        if scope.name != f"{PREFIX}{name}.scope":
            raise SandboxError(f"systemd put the sandbox into {scope}", op="create")
        # A group has either processes or limited children.
        rest = scope / "rest"
        rest.mkdir()
        for other in (scope / "cgroup.procs").read_text().split():
            (rest / "cgroup.procs").write_text(other)
        settings = _settings(2, limits)
        for controller in settings:
            (scope / "cgroup.subtree_control").write_text(f"+{controller}")
        return ControlGroups(2, dict.fromkeys(settings, scope)).hold(name, limits, pid)


def _own_path(controller: str, process: str = "self") -> str | None:
    """A process's group in the hierarchy of a controller ("" for version 2)."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(",") or controller == controllers == "":
                return path.lstrip("/")
    return None


def _runtime_directory() -> str:
    return os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"


def _scope() -> Scope | None:
    program = shutil.which("systemd-run", path="/usr/bin:/bin")
    if program is None or not Path("/run/systemd/system").is_dir():
        return None
    manager = _ROOT
    if (uid := os.getuid()) != 0:
        manager /= f"user.slice/user-{uid}.slice/user@{uid}.service"
        if not Path(_runtime_directory(), "systemd", "private").exists():
            return None
    try:  # absent with version 1, and where there is no manager of this user
        controllers = (manager / "cgroup.controllers").read_text().split()
    except OSError:
        return None
    return Scope(program, frozenset(controllers))


def _version1() -> Iterator[ControlGroups]:
    parents = {}
    for controller in _CONTROLLERS.values():
        if own := _own_path(controller):
            candidates = [_ROOT / controller / own, _ROOT / controller]
        elif own is not None:
            candidates = [_ROOT / controller]
        else:
            continue
        for parent in candidates:
            if os.access(parent, os.W_OK) and ControlGroups(1, {controller: parent}).works():
                parents[controller] = parent
                break
    if parents:
        yield ControlGroups(1, parents)


def _version2() -> Iterator[ControlGroups]:
    """Groups below the root, or below one that was delegated to this user.

    A group has either processes or limited children: so never below our own group,
    except for the root, to which this doesn't apply.
    """
    own = _own_path("")
    if own is None or not (_ROOT / "cgroup.controllers").exists():
        return
    for parent in (_ROOT, *(p for p in (_ROOT / own).parents if p.is_relative_to(_ROOT))):
        control = parent / "cgroup.subtree_control"
        if not os.access(parent, os.W_OK) or not os.access(parent / "cgroup.procs", os.W_OK):
            continue
        for controller in _CONTROLLERS.values():
            with contextlib.suppress(OSError):
                control.write_text(f"+{controller}")
        with contextlib.suppress(OSError):
            yield ControlGroups(2, dict.fromkeys(control.read_text().split(), parent))


def find() -> Means | None:
    """The best means on this machine; None if only `box.py`'s watcher is left."""
    if scope := _scope():
        return scope
    for groups in (*_version2(), *_version1()):
        if "memory" in groups.enforces and groups.works():
            return groups
    return None
