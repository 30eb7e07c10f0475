"""Unpacks blobs as Metaflow stores them, in a reader's process (`reader.py`).

What it answers is a stream: for each blob, in order, frames of a letter, a length in four
bytes and as many bytes: `d` is content, `e` the end of the blob, `r` why it is rejected.
Standard library only.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import Rejected

_PIECE = 1 << 20
#: Bytes of a frame before its content.
FRAME = 5


def _inflate(path: Path, limit: int) -> Iterator[bytes]:
    decompressor = zlib.decompressobj(wbits=31)  # one gzip member
    total = 0
    with open(path, "rb") as file:
        while not decompressor.eof:
            data = decompressor.unconsumed_tail or file.read(_PIECE)
            if not data:
                raise Rejected("a blob is cut short")
            try:
                piece = decompressor.decompress(data, _PIECE)
            except zlib.error:
                raise Rejected("a blob is not compressed as Metaflow does it") from None
            total += len(piece)
            if total > limit:
                raise Rejected(
                    f"an artifact is larger than {limit >> 20} MB "
                    "(raise METAFLOW_SANDBOX_MAX_ARTIFACT if it should be)"
                )
            yield piece
        if decompressor.unused_data or file.read(1):
            raise Rejected("a blob goes on after its end")


def pieces(path: Path, raw: bool, limit: int) -> Iterator[bytes]:
    """The content of a blob's file, unpacked under `limit`.

    Raises:
        Rejected: it is larger, or not packed as Metaflow does it.
    """
    if not raw:
        yield from _inflate(path, limit)
        return
    if path.stat().st_size > limit:
        raise Rejected(f"an artifact is larger than {limit >> 20} MB")
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            yield piece


def whole(parts: Iterable[bytes], sha: str) -> bytes:
    """The parts of a blob joined, and held against its key.

    Raises:
        Rejected: they are something else.
    """
    content = io.BytesIO()  # whose value is not copied, unlike a list of pieces
    for part in parts:
        content.write(part)
    data = content.getvalue()
    if hashlib.sha1(data, usedforsecurity=False).hexdigest() != sha:
        raise Rejected(f"the content of the blob {sha} is something else")
    return data


def unpacked(path: Path, raw: bool, sha: str, limit: int) -> bytes:
    """The content of a blob's file, unpacked under `limit` and held against its key."""
    return whole(pieces(path, raw, limit), sha)


def send(items: Iterable[Mapping[str, Any]], limit: int, out: BinaryIO) -> None:
    """Writes the stream of these blobs, up to the first that is rejected."""
    for item in items:
        try:
            for piece in pieces(Path(item["file"]), item["raw"], limit):
                _frame(out, b"d", piece)
        except Rejected as e:
            _frame(out, b"r", str(e).encode())
            return
        _frame(out, b"e", b"")


def _frame(out: BinaryIO, kind: bytes, content: bytes) -> None:
    out.write(kind + len(content).to_bytes(FRAME - 1, "big"))
    out.write(content)


def sent(read: Callable[[int], bytes], limit: int) -> Iterator[bytes]:
    """The parts of the next blob of a stream, bounded whatever its writer has become.

    Args:
        read: gives exactly so many bytes.

    Raises:
        Rejected: its writer says so, or breaks the form.
    """
    left = limit
    while True:
        head = read(FRAME)
        kind, size = head[:1], int.from_bytes(head[1:], "big")
        if kind == b"e" and size == 0:
            return
        if kind not in (b"d", b"r") or size > _PIECE:
            raise Rejected("a blob was not unpacked as it should be")
        content = read(size)
        if kind == b"r":
            raise Rejected(content.decode(errors="replace"))
        left -= size
        if left < 0:
            raise Rejected("a blob was not unpacked as it should be")
        yield content
