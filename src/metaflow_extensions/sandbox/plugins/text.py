"""Text of others' in messages, made fit for a terminal. Logs are `admission/text.py`'s."""

from __future__ import annotations


def printable(text: str) -> str:
    """Text without what a terminal acts on, which is shown as Python writes it; lines stay."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )
