"""The host's side of metaflow-sandbox. Nothing in this package travels into a sandbox,
except the one file `agent/agent.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metaflow_extensions.sandbox.plugins.tainted import trusting as trusting

__all__ = ["trusting"]


def __getattr__(name: str) -> Any:
    # Late, because it needs Metaflow: programs of this package run on bare interpreters.
    if name == "trusting":
        import metaflow  # noqa: F401 - first: it loads the extension, which can't load it half-way

        from metaflow_extensions.sandbox.plugins.tainted import trusting

        return trusting
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
