"""What can be wrong with this extension's settings, most of which are numbers.

Metaflow's own check of a number or a flag raises while its configuration loads, which would break
every flow, sandboxed or not. So they are texts there, and read here when a step needs them.
"""

from __future__ import annotations

from metaflow.exception import MetaflowException

#: {METAFLOW_SANDBOX_…: (lowest, highest, what it is a number of)}
NUMBERS = {
    "MEMORY": (0, 1 << 24, "MB"),
    "DISK": (1, 1 << 30, "MB"),
    "MAX_ARTIFACT": (1, 1 << 30, "MB"),
    "MAX_OUTPUT": (0, 1 << 20, "MB"),
    "CACHE": (0, 1 << 30, "MB"),
    "MAX_LOAD": (0.1, 86400, "seconds"),
    "E2B_HOURS": (0.1, 8760, "hours"),
}


class InvalidSetting(MetaflowException):
    headline = "Sandbox"


def number(name: str) -> float:
    """A setting of `NUMBERS`, in its unit.

    Raises:
        InvalidSetting: it is no such number.
    """
    from metaflow import metaflow_config

    text = getattr(metaflow_config, f"SANDBOX_{name}")
    lowest, highest, unit = NUMBERS[name]
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = float("nan")
    if not lowest <= value <= highest:
        raise InvalidSetting(
            f"METAFLOW_SANDBOX_{name}={text!r}: give a number of {unit}, from {lowest:.10g} to "
            f"{highest:.10g}."
        )
    return value


def flag(name: str) -> bool:
    """Whether a setting is on: it has any value but "", "0" and "false"."""
    from metaflow import metaflow_config

    # In the JSON configuration it may be no text.
    value = getattr(metaflow_config, f"SANDBOX_{name}") or ""
    return str(value).lower() not in ("", "0", "false")


def check() -> None:
    """Raises InvalidSetting if any of them is none, and for names of classes that are none."""
    from .tainted import configured

    for name in NUMBERS:
        number(name)
    configured()
