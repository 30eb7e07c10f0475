"""What is asked of the proxy, and what it answers by itself."""

from __future__ import annotations

import re
from dataclasses import dataclass

import h11

_AUTHORITY = re.compile(r"(\[[^\[\]]+\]|[^\[\]:]+)(?::([0-9]{1,5}))?")
# For one connection, not for the next one (RFC 9110, 7.6.1).
_HOP = {b"connection", b"keep-alive", b"te", b"trailer", b"upgrade"}
# Stays even if a Connection header names it: the body would be cut in another place.
_FRAMING = {b"content-length", b"transfer-encoding"}


class Reply(Exception):
    """The proxy's own answer, which ends a connection.

    Args:
        status: an HTTP status code.
        text: what happened, in one line. It is the reason phrase too, because that is
            all that Python's clients tell of a tunnel that was refused.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(status, text)
        self.status = status
        self.text = f"metaflow-sandbox: {plain(text, 500)}"

    def encode(self, request: h11.Request | None) -> bytes:
        """The bytes to send in answer to `request`, None if it couldn't be read."""
        body = f"{self.text}\n"
        head = (
            f"HTTP/1.1 {self.status} {self.text}\r\n"
            f"Content-Type: text/plain\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        return (head if request and request.method == b"HEAD" else head + body).encode("ascii")


@dataclass(frozen=True)
class Target:
    """Where a request goes; `path`, with its query, is empty for a tunnel."""

    host: str
    port: int
    path: str = ""

    def __str__(self) -> str:
        return f"{self._name}:{self.port}"

    @property
    def authority(self) -> str:
        """What the Host header says of it."""
        return self._name if self.port == 80 else str(self)

    @property
    def _name(self) -> str:
        bare = ":" in self.host and not self.host.startswith("[")
        return f"[{self.host}]" if bare else self.host


def plain(text: str, length: int) -> str:
    """A text from inside, made fit to be shown: short, without control characters."""
    return "".join(c if " " <= c <= "~" else "?" for c in text[:length])


def read_target(request: h11.Request) -> Target:
    """Where a request goes, its host as it was written.

    Raises:
        Reply: it can't be said with certainty, or it isn't for a proxy to do.
    """
    text = request.target.decode("ascii")
    if request.method == b"CONNECT":
        return Target(*_split(text, None))
    scheme, separator, rest = text.partition("://")
    if not separator:
        raise Reply(400, "this is a proxy: ask for http://host/path, or CONNECT host:port")
    if scheme.lower() != "http":
        raise Reply(400, "only http:// can be asked for by its URL; other schemes take CONNECT")
    if "#" in rest:
        raise Reply(400, "the URL has a fragment")
    names = {name for name, _ in request.headers}
    if names >= _FRAMING:
        raise Reply(400, "the request has both Content-Length and Transfer-Encoding")
    found = re.search("[/?]", rest)
    end = found.start() if found else len(rest)
    path = rest[end:]
    host, port = _split(rest[:end], 80)
    return Target(host, port, path if path.startswith("/") else f"/{path}")


def _split(text: str, default: int | None) -> tuple[str, int]:
    found = _AUTHORITY.fullmatch(text)
    if not found or "@" in text:
        raise Reply(400, "the target is not host:port; names and passwords can't be in it")
    port = int(found[2]) if found[2] else default
    if not port or port > 65535:
        raise Reply(400, "the target has no port from 1 to 65535")
    return found[1], port


def passed_on(
    message: h11.Request | h11.InformationalResponse | h11.Response,
) -> list[tuple[bytes, bytes]]:
    """The headers that go on to the other side, with one that makes it close after this."""
    named = {
        token.strip().lower()
        for name, value in message.headers
        if name == b"connection"
        for token in value.split(b",")
    }
    dropped = (named | _HOP) - _FRAMING
    kept = [
        (name, value)
        for name, value in message.headers.raw_items()
        if name.lower() not in dropped and not name.lower().startswith(b"proxy-")
    ]
    return [*kept, (b"Connection", b"close")]
