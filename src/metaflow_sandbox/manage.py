"""Finds the sandboxes that there are, tells which ones nobody wants, and looks backends over."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from .backends import registry
from .backends.base import Backend, SandboxInfo
from .errors import SandboxError
from .leases import here, living

# Labels that every sandbox of a step has, beside those that name the step.
_OWNER, _HOST, _EXPIRES = "metaflow-owner", "metaflow-host", "metaflow-expires"


def ownership(workspace: Path, lifetime: float) -> dict[str, str]:
    """The labels by which a later `orphans` knows whose a sandbox is, and until when."""
    expires = str(int(time.time() + lifetime))
    return {_OWNER: workspace.name, _HOST: here(), _EXPIRES: expires}


@dataclass(frozen=True)
class Found:
    """A living sandbox."""

    backend: str
    info: SandboxInfo

    @property
    def pathspec(self) -> str:
        """flow/run/step/task/attempt, as far as it is known."""
        names = ("flow", "run", "step", "task", "attempt")
        return "/".join(self.info.labels.get(f"metaflow-{n}", "?") for n in names)

    def as_dict(self) -> dict[str, object]:
        """For `--json`."""
        return {"backend": self.backend, "step": self.pathspec, **asdict(self.info)}


async def find(
    names: Iterable[str], labels: Mapping[str, str]
) -> tuple[list[Found], dict[str, SandboxError]]:
    """The living sandboxes of some backends that have these labels.

    Returns:
        Them, and {backend: why it could not be asked}.
    """
    found: list[Found] = []
    problems: dict[str, SandboxError] = {}
    for name in names:
        try:
            infos = await registry.load(name).list(labels)
        except SandboxError as e:
            problems[name] = e
        except ImportError as e:  # one that can't be loaded keeps nobody from the others
            problems[name] = SandboxError(f"it can't be loaded: {e}", op="list")
        else:
            found += [Found(name, info) for info in infos]
    return found, problems


def is_orphan(found: Found, owners: set[str]) -> bool:
    """Whether a sandbox's time is over, or its run, of this user on this machine, has ended.

    Args:
        owners: names of the leases of living runs.
    """
    labels = found.info.labels
    expires = labels.get(_EXPIRES, "")
    if expires.isdigit() and int(expires) < time.time():
        return True
    return labels.get(_HOST) == here() and labels.get(_OWNER, "") not in owners


async def orphans(
    names: Iterable[str], labels: Mapping[str, str]
) -> tuple[list[Found], dict[str, SandboxError]]:
    """Those of `find` that nobody wants any more."""
    owners = {path.name for path in living("run")}
    found, problems = await find(names, labels)
    return [f for f in found if _OWNER in f.info.labels and is_orphan(f, owners)], problems


async def destroy(found: Found) -> None:
    """Ends a sandbox that was found."""
    await registry.load(found.backend).destroy(found.info.id)


def sweep(names: Iterable[str]) -> None:
    """Removes what runs that were killed left on this machine, beside sandboxes."""
    for name in names:
        with contextlib.suppress(SandboxError, ImportError):  # one that isn't set up left nothing
            registry.load(name).sweep()


@dataclass(frozen=True)
class Examined:
    """What a backend can do here.

    Attributes:
        problem: why it can't be used, with the remedy; None if it can.
        lines: what the user should know, a sentence each.
    """

    name: str
    problem: str | None
    lines: tuple[str, ...] = ()


async def examine(name: str) -> Examined:
    """Makes a sandbox if that is possible, and says what it would be limited to."""
    try:
        backend = registry.load(name)
        preflight = await backend.preflight()
    except (SandboxError, ImportError) as e:
        return Examined(name, str(e))
    lines = (preflight.provider, *preflight.notes, *_limits(backend))
    return Examined(name, None, lines)


def _limits(backend: Backend) -> list[str]:
    limits = backend.limits()
    kinds = ("cpu", "memory", "disk", "gpu", "image", "setup", "keep")
    can = [kind for kind in kinds if getattr(limits, kind)]
    cannot = [kind for kind in kinds if not getattr(limits, kind)]
    networks = {"none": "False", "internet": "True", "hosts": "a list of hosts"}
    return [
        f"enforced here: {', '.join(can) or 'nothing'}; refused: {', '.join(cannot) or 'nothing'}",
        f"network: {', '.join(networks[kind] for kind in limits.network)} (the first if a step "
        "doesn't say)",
    ]
