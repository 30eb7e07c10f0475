"""Makes text from a sandbox harmless to print and to store, so that it can be turned back.

Logs are replayed raw, so what is stored must be as harmless as what is shown.
Control characters become their Unicode pictures (ESC becomes U+241B); a picture
that was in the text gets U+2420 before it; a byte that is not part of a printable
character becomes U+2426 and its two hexadecimal digits; so do the characters that
reverse the order of text or end a line unseen.
"""

from __future__ import annotations

import re

_LITERAL = "\u2420"
_BYTE = "\u2426"
_STRAY = range(0xDC80, 0xDD00)  # a byte that is no character
_PICTURES = {code: chr(0x2400 + code) for code in range(32) if code != 9} | {127: "\u2421"}
_SPECIAL = re.compile(
    r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2400-\u2426\u2028-\u202e\u2066-\u2069\udc80-\udcff]"
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_ESCAPED = re.compile(r"\u2420([\u2400-\u2426])|\u2426([0-9a-f]{2})|([\u2400-\u241f\u2421])")


def _escape(match: re.Match[str]) -> str:
    char = match.group()
    code = ord(char)
    if code in _PICTURES:
        return _PICTURES[code]
    if 0x2400 <= code <= 0x2426:
        return _LITERAL + char
    raw = char.encode("utf-8", "surrogateescape" if code in _STRAY else "surrogatepass")
    return "".join(f"{_BYTE}{byte:02x}" for byte in raw)


def escape(data: bytes) -> bytes:
    """The same text without anything that a terminal would act on; tabs stay."""
    return _SPECIAL.sub(_escape, data.decode("utf-8", "surrogateescape")).encode()


def unescape(text: bytes) -> bytes:
    """What `escape` was given."""

    def restore(match: re.Match[str]) -> str:
        literal, byte, picture = match.groups()
        if literal:
            return str(literal)
        if byte:
            # One byte a match: they join to characters when all is encoded again.
            return chr(0xDC00 + int(byte, 16)) if int(byte, 16) >= 0x80 else chr(int(byte, 16))
        return chr(0x7F if picture == "\u2421" else ord(picture) - 0x2400)

    return _ESCAPED.sub(restore, text.decode()).encode("utf-8", "surrogateescape")


def harmless(text: str, limit: int = 300) -> str:
    """A short form of what a sandbox said, for a message."""
    shown = escape(text[:limit].encode("utf-8", "surrogatepass")).decode()
    return shown if len(text) <= limit else shown + "…"


def message(text: str) -> str:
    """Lines for a terminal. What `harmless` made of their parts stays as it is."""
    return _CONTROL.sub(_escape, text)
