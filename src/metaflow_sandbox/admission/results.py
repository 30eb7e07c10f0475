"""Reads an attempt's archive (see `collect` in `agent/agent.py`) without trusting a byte of it."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from ..errors import Rejected
from .blobs import unpacked
from .text import harmless

_HEADER = 2000
_DATA_JSON = 8 << 20
_CARD = 64 << 20
MAX_ARTIFACTS = 10_000
#: What sends results may pause so long; a sandbox can stop what sends them.
QUIET_SECONDS = 30.0
MAX_CARDS = 100
SHA = re.compile(r"[0-9a-f]{40}\Z")
_CARD_FILE = re.compile(r"[A-Za-z0-9_]{1,100}(-[A-Za-z0-9_]{1,100}){1,2}\.html\Z")


@dataclass
class Results:
    """What an attempt delivered. Contents lie in files that the host named.

    Attributes:
        objects: {artifact name: key}, info: {artifact name: its record}. Both as
            the sandbox claims; names are identifiers and keys look like keys.
        blobs: {key: (file with the bytes as delivered, whether these are not compressed)}.
        cards: {file name: file}.
        complete: whether the task finished recording (`data.json` came).
    """

    objects: dict[str, str] = field(default_factory=dict)
    info: dict[str, dict[str, Any]] = field(default_factory=dict)
    blobs: dict[str, tuple[Path, bool]] = field(default_factory=dict)
    cards: dict[str, Path] = field(default_factory=dict)
    complete: bool = False


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
        if header["name"] == "data.json":
            _read_data_json(results, target)
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
        if results.complete or size > _DATA_JSON:
            raise Rejected("the record of the artifacts is too large, or comes twice")
        results.complete = True
        return directory / "data.json"
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
    if size > _CARD or file in results.cards or len(results.cards) >= MAX_CARDS:
        raise Rejected("a card is too large, comes twice, or there are too many")
    path = directory / f"card-{len(results.cards)}"
    results.cards[file] = path
    return path


def _read_data_json(results: Results, path: Path) -> None:
    try:
        data = json.loads(path.read_bytes())
        objects, info = data["objects"], data["info"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Rejected("the record of the artifacts is not what Metaflow writes") from None
    if not isinstance(objects, dict) or not isinstance(info, dict) or len(objects) > MAX_ARTIFACTS:
        raise Rejected("the record of the artifacts is not what Metaflow writes")
    for name, sha in objects.items():
        # Names become parts of file names in the metadata.
        if not name.isidentifier() or len(name.encode()) > 200 or not name.isprintable():
            raise Rejected(f"an artifact has the name {harmless(name)}")
        if not isinstance(sha, str) or not SHA.match(sha) or not isinstance(info.get(name), dict):
            raise Rejected(f"the artifact {harmless(name)} has no proper record")
        results.objects[name] = sha
        results.info[name] = info[name]


def blob(results: Results, sha: str, limit: int) -> bytes:
    """The bytes of a delivered blob; see `unpacked`.

    Raises:
        Rejected: it was not delivered, is larger, or is something else.
    """
    if sha not in results.blobs:
        raise Rejected(f"the blob {sha} was neither an input nor delivered")
    path, raw = results.blobs[sha]
    return unpacked(path, raw, sha, limit)
