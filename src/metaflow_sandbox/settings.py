"""The user's numbers, as the host's code reads them."""

from __future__ import annotations

from .errors import SandboxError


def number(name: str) -> float:
    """METAFLOW_SANDBOX_`name`, in the unit that the documentation gives.

    Raises:
        SandboxError: "invalid_setting"; it is no number, or out of bounds.
    """
    # As late as this: backends load without Metaflow.
    from metaflow_extensions.sandbox.plugins import settings

    try:
        return settings.number(name)
    except settings.InvalidSetting as e:
        raise SandboxError(str(e), code="invalid_setting") from None
