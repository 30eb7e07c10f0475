"""Processes as others leave them written down, told apart from later ones with their number."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio

_GONE_SECONDS = 10.0


async def settled(value: Any) -> Any:
    """The result of one of boxlite's calls, some of which are made at once and some later."""
    return await value if hasattr(value, "__await__") else value


def identity(pid: int) -> dict[str, Any]:
    """What tells a process from all others of this machine."""
    return {"pid": pid, "started": _started(pid)}


def _started(pid: int) -> str | None:
    """When a process started, in the kernel's ticks; None where there is no /proc."""
    with suppress(OSError, IndexError):
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[19]
    return None


def lives(process: Mapping[str, Any] | None) -> bool:
    """Whether the process of this identity is there and not just waiting to be buried."""
    if process is None:
        return False
    pid = int(process["pid"])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    if process["started"] is None:
        return True
    if _started(pid) != process["started"]:
        return False
    with suppress(OSError, IndexError):
        state = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0]
        return state not in "ZX"
    return False


async def ended(process: Mapping[str, Any] | None) -> None:
    """Ends the process of this identity, and waits until it is gone."""
    end(process)
    with anyio.move_on_after(_GONE_SECONDS):
        while lives(process):  # noqa: ASYNC110 - it is another process's child
            await anyio.sleep(0.02)


def end(process: Mapping[str, Any] | None) -> None:
    """Ends the process of this identity, if it is still that one."""
    if process is not None and lives(process):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(int(process["pid"]), signal.SIGKILL)
