"""Unpacks blobs as Metaflow stores them. Standard library only: `reader.py` needs it too."""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

from ..errors import Rejected

_PIECE = 1 << 20


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


def unpacked(path: Path, raw: bool, sha: str, limit: int) -> bytes:
    """The content of a blob's file, unpacked under `limit` and held against its key.

    Raises:
        Rejected: it is larger, or something else.
    """
    if raw and path.stat().st_size > limit:
        raise Rejected(f"an artifact is larger than {limit >> 20} MB")
    content = io.BytesIO()  # whose value is not copied, unlike a list of pieces
    for piece in [path.read_bytes()] if raw else _inflate(path, limit):
        content.write(piece)
    data = content.getvalue()
    if hashlib.sha1(data, usedforsecurity=False).hexdigest() != sha:
        raise Rejected(f"the content of the blob {sha} is something else")
    return data
