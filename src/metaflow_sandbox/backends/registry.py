"""Finds backends by name, from the entry points of every installed package."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points, version

from ..errors import BackendUnavailable
from .base import Backend

GROUP = "metaflow_sandbox.backends"

#: The backends that have a decorator of their own, with the extra that installs each.
PROMISED = ("bubblewrap", "boxlite", "docker", "daytona", "e2b")


def names() -> list[str]:
    """The backends that are installed."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def local_order() -> tuple[str, ...]:
    """The backends that plain `@sandbox` tries, the best first."""
    return ("boxlite", "docker") if sys.platform == "darwin" else ("bubblewrap", "docker")


def load(name: str) -> Backend:
    """The backend of that name.

    Raises:
        BackendUnavailable: there is none, with the command that installs it.
    """
    for entry in entry_points(group=GROUP, name=name):
        try:
            backend: Backend = entry.load()()
        except ImportError as e:
            raise BackendUnavailable(
                f"the backend {name!r} needs a package that is not installed ({e}). "
                f'Install it with: pip install "metaflow-sandbox[{name}]"',
                op="load",
            ) from e
        return backend
    if name in PROMISED:
        raise BackendUnavailable(
            f"the backend {name!r} is not part of metaflow-sandbox {version('metaflow-sandbox')}, "
            f"which has: {', '.join(names())}. "
            f'A later version may: pip install -U "metaflow-sandbox[{name}]"',
            op="load",
        )
    raise BackendUnavailable(
        f"there is no backend {name!r}. Installed: {', '.join(names())}. Another package can "
        f"provide one through the entry point group {GROUP!r}.",
        op="load",
    )
