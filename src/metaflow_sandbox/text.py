"""Text of others', made fit for a terminal, as all messages of the host's code have it."""

from __future__ import annotations


def printable(text: str) -> str:
    """Text without what a terminal acts on, which is shown as Python writes it; lines stay."""
    # As late as this: backends load without Metaflow.
    from metaflow_extensions.sandbox.plugins import text as theirs

    return theirs.printable(text)
