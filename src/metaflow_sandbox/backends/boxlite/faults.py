"""What boxlite's errors mean, and what to do about each."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

from ...errors import BackendUnavailable, SandboxError, SandboxGone
from ...text import printable

KVM = Path("/dev/kvm")
NEXT = "Or choose @bubblewrap or @docker, or a cloud: @daytona, @e2b."
if sys.platform == "darwin":
    NEXT = "Or choose @docker, or a cloud: @daytona, @e2b."
_SLOW = "timed out after 30s"
_SLOW_START = "slow_start"
_TAIL = 600
_GONE = ("StoppedError", "NotFoundError", "InvalidStateError", "UpstreamUnavailableError")


class BadImage(SandboxError):
    """An image that isn't there, or can't be used."""

    code = "bad_image"


def starts_slowly(error: SandboxError) -> bool:
    """Whether a guest was not ready in the time that boxlite gives it, and so may be next time."""
    return error.code == _SLOW_START


def how_it_ended(home: Path) -> str | None:
    """What boxlite wrote down of the end of a microVM's process, in words; None if nothing."""
    for record in home.glob("boxes/*/exit*"):  # exit, exit.previous
        with contextlib.suppress(OSError, ValueError, AttributeError):
            signal = json.loads(record.read_text()).get("signal")
            if signal == "SIGSYS":
                return (
                    "boxlite's own filter of system calls ended the microVM. Asking for the free "
                    "space of a directory of inputs does that (df, statvfs; boxlite 0.10.8)"
                )
            if signal:
                return f"the microVM's process was ended by {str(signal)[:20]}"
    return None


@contextlib.contextmanager
def explained(op: str, home: Path, what: object) -> Iterator[None]:
    """Turns boxlite's errors into this package's.

    Args:
        home: boxlite's, whose logs say more than its errors.
        what: the image, for the message.
    """
    import boxlite

    try:
        yield
    except boxlite.BoxliteError as e:
        raise translated(e, op, home, what) from e


def translated(error: Exception, op: str, home: Path, what: object) -> SandboxError:
    """The error of this package that says what one of boxlite's means."""
    kind, text = type(error).__name__, str(error)
    if kind in _GONE and op != "create":
        return SandboxGone("the microVM has ended", op=op)
    if kind == "UnsupportedError":
        return BackendUnavailable(f"boxlite can't run here: {text}\n{no_machine()}", op=op)
    if "No space left on device" in text or "os error 28" in text:
        return SandboxError(
            f"there is no space left for the microVM in {home}: make some, or set TMPDIR (for "
            "microVMs) or XDG_CACHE_HOME (for images) to a directory that has it.",
            code="no_space",
            op=op,
            retryable=False,
        )
    if kind == "InternalError" and "runtime lock" in text:
        return SandboxError(
            f"another process uses {home}, which is this sandbox's own: {text}",
            code="home_locked",
            op=op,
            retryable=False,
        )
    if kind == "InternalError" and "spawn_failed" in text:
        return BadImage(
            f"image={str(what)!r} has no python3 on its PATH, and a step needs one, 3.8 or "
            f"later. Choose an image such as python:3.12-slim, or name it with executable=….",
            op=op,
            retryable=False,
        )
    if kind in ("StorageError", "ImageError", "NetworkError", "UpstreamUnavailableError"):
        return BadImage(
            f"image={str(what)!r} can't be used: {text}\nIs its name right, and its registry "
            "within reach? A private one needs `docker login`.",
            op=op,
            retryable=False,
        )
    if kind == "EngineError":
        said = why_no_boot(log(home))
        if _SLOW in text:
            return BackendUnavailable(
                "boxlite's guest was not ready within 30 seconds, which is all that it is given. "
                f"Either this machine is too busy, or no guest boots here. {said}",
                code=_SLOW_START,
                op=op,
            )
        return BackendUnavailable(f"boxlite could not start a microVM: {text}\n{said}", op=op)
    return SandboxError(
        f"boxlite failed: {text} ({kind}). Its logs are in {home}, as long as that is there.",
        code=f"boxlite_{getattr(error, 'code', kind)}",
        op=op,
    )


def log(home: Path) -> str:
    """The end of what the last microVM of a home said before it gave up."""
    found = []
    for pattern in ("boxes/*/shim.stderr", "boxes/*/logs/console.log"):
        for path in home.glob(pattern):
            with contextlib.suppress(OSError):
                text = path.read_bytes()[-_TAIL:].decode(errors="replace").strip()
                if text:
                    found.append(printable(text))
    return "\n".join(found)


def why_no_boot(said: str) -> str:
    """The likely reason why a microVM with everything in place did not boot."""
    if sys.platform == "darwin":
        return f"It said:\n{said or 'nothing'}\n{NEXT}"
    hint = (
        "/dev/kvm is there and takes calls, but no guest boots with it. That is so on virtual "
        "machines of some clouds, whose KVM is nested or emulated and lacks instructions that "
        "Linux needs. What helps: a machine of metal, or one with nested virtualisation switched "
        "on.\n"
    )
    return f"{hint}{NEXT}\nIt said:\n{said or 'nothing'}"


def no_machine() -> str | None:
    """Why no microVM can run on this machine, with the remedy; None if it may."""
    if sys.platform == "darwin":
        if platform.machine() != "arm64":
            return f"microVMs need a Mac with Apple silicon, and this one has none. {NEXT}"
        return None
    if not sys.platform.startswith("linux"):
        return f"boxlite runs on Linux and on Macs alone. {NEXT}"
    if platform.machine() not in ("x86_64", "aarch64"):
        return f"boxlite knows no {platform.machine()} processors. {NEXT}"
    if not KVM.exists():
        return (
            "there is no /dev/kvm. On a machine of your own: switch virtualisation on in its "
            "firmware, and load the module (sudo modprobe kvm_intel, or kvm_amd). In a container: "
            "start it with --device /dev/kvm. In a virtual machine: switch nested virtualisation "
            f"on for it. {NEXT}"
        )
    if not os.access(KVM, os.R_OK | os.W_OK):
        return (
            "this user may not use /dev/kvm. Mend it with\n"
            "  sudo usermod -aG kvm $USER      (and log in again)\n"
            f"In a container, give it that group: --group-add $(stat -c %g /dev/kvm). {NEXT}"
        )
    return None
