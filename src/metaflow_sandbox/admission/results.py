"""Reads an attempt's archive (see `collect` in `agent/agent.py`) without trusting a byte of it."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from ..errors import Rejected
from .claims import MAX_ARTIFACTS, SHA
from .text import harmless

_HEADER = 2000
_DATA_JSON = 8 << 20
#: Bytes of one card, and of all of an attempt's. Wrapped they may be several times as large.
CARD, CARDS = 16 << 20, 64 << 20
#: What sends results may pause so long; a sandbox can stop what sends them.
QUIET_SECONDS = 30.0
MAX_CARDS = 100
_CARD_FILE = re.compile(r"[A-Za-z0-9_]{1,100}(-[A-Za-z0-9_]{1,100}){1,2}\.html\Z")


@dataclass
class Results:
    """What an attempt delivered. Contents lie in files that the host named.

    Attributes:
        record: the file of `data.json`; None if the task didn't finish recording.
        objects, info: what is in it, see `claims.py`; empty until that was read.
        blobs: {key: (file with the bytes as delivered, whether these are not compressed)}.
        cards: {file name: file}.
        card_bytes: how many these have together.
    """

    record: Path | None = None
    objects: dict[str, str] = field(default_factory=dict)
    info: dict[str, dict[str, Any]] = field(default_factory=dict)
    blobs: dict[str, tuple[Path, bool]] = field(default_factory=dict)
    cards: dict[str, Path] = field(default_factory=dict)
    card_bytes: int = 0

    def delivered(self, keys: Iterable[str]) -> list[dict[str, Any]]:
        """These blobs, as a reader wants to have them.

        Raises:
            Rejected: one was not delivered.
        """
        items = []
        for sha in keys:
            if sha not in self.blobs:
                raise Rejected(f"the blob {sha} was neither an input nor delivered")
            path, raw = self.blobs[sha]
            items.append({"sha": sha, "file": str(path), "raw": raw})
        return items


async def receive(stream: AsyncIterator[bytes], directory: Path, limit: int) -> Results:
    """Unpacks an archive of at most `limit` bytes into `directory`.

    Raises:
        Rejected: it is not such an archive.
    """
    results = Results()
    buffer = bytearray()
    total = 0
    source = aiter(stream)

    async def more() -> bool:
        nonlocal total
        piece = b""
        while not piece:
            try:
                with anyio.fail_after(QUIET_SECONDS):
                    piece = await anext(source)
            except StopAsyncIteration:
                return False
        total += len(piece)
        if total > limit:
            raise Rejected(f"the results are larger than {limit >> 20} MB")
        buffer.extend(piece)
        return True

    while buffer or await more():
        while (end := buffer.find(b"\n", 0, _HEADER)) < 0:
            if len(buffer) >= _HEADER or not await more():
                raise Rejected("the archive of the results is cut short")
        header = _header(bytes(buffer[:end]))
        del buffer[: end + 1]
        target = _place(results, header, directory)
        left = header["size"]
        with open(target, "wb") as file:  # noqa: ASYNC230 - local, and a piece at a time
            while left:
                if not buffer and not await more():
                    raise Rejected("the archive of the results is cut short")
                taken = buffer[:left]
                file.write(taken)
                del buffer[:left]
                left -= len(taken)
    return results


def _header(line: bytes) -> dict[str, Any]:
    try:
        header: dict[str, Any] = json.loads(line)
        size, name = header["size"], header["name"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Rejected("the archive of the results has a broken header") from None
    if type(size) is not int or size < 0 or name not in ("data.json", "blob", "card"):
        raise Rejected("the archive of the results has a broken header")
    return header


def _place(results: Results, header: dict[str, Any], directory: Path) -> Path:
    """Where an entry's content goes: a path that the host makes up."""
    name, size = header["name"], header["size"]
    if name == "data.json":
        if results.record or size > _DATA_JSON:
            raise Rejected("the record of the artifacts is too large, or comes twice")
        results.record = directory / "data.json"
        return results.record
    if name == "blob":
        sha, raw = header.get("sha"), header.get("raw")
        if not isinstance(sha, str) or not SHA.match(sha) or type(raw) is not bool:
            raise Rejected("a blob has no proper key")
        if sha in results.blobs or len(results.blobs) >= MAX_ARTIFACTS:
            raise Rejected("a blob comes twice, or there are too many")
        path = directory / f"blob-{sha}"
        results.blobs[sha] = (path, raw)
        return path
    file = header.get("file")
    if not isinstance(file, str) or not _CARD_FILE.match(file):
        raise Rejected(f"a card has the name {harmless(str(file))}")
    if file in results.cards or len(results.cards) >= MAX_CARDS:
        raise Rejected("a card comes twice, or there are too many")
    results.card_bytes += size
    if size > CARD or results.card_bytes > CARDS:
        raise Rejected(
            f"a card is too large: one may have {CARD >> 20} MB, all together {CARDS >> 20} MB"
        )
    path = directory / f"card-{len(results.cards)}"
    results.cards[file] = path
    return path
