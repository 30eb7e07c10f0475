"""What a sandbox says that it recorded (`data.json`), read in a reader's process (`reader.py`).

Eight megabytes of JSON can be two hundred in memory, and whatever is said of an artifact
that nobody asks for is kept by nobody. Standard library only.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from unicodedata import normalize

from ..errors import Rejected
from .text import harmless

MAX_ARTIFACTS = 10_000
SHA = re.compile(r"[0-9a-f]{40}\Z")
_FIELD = 1000  # characters, or of JSON


def read(path: Path) -> dict[str, dict[str, Any]]:
    """{"objects": {artifact: key}, "info": {artifact: its record}} as a sandbox claims.

    Names are identifiers, keys look like keys; of a record only `type`, `encoding` and
    `serializer_info` are there, and not what is longer than any that Metaflow writes.

    Raises:
        Rejected: it is not what Metaflow writes.
    """
    try:
        data = json.loads(path.read_bytes())
        objects, info = data["objects"], data["info"]
    except (ValueError, KeyError, TypeError, RecursionError, MemoryError):
        raise Rejected("the record of the artifacts is not what Metaflow writes") from None
    if not isinstance(objects, dict) or not isinstance(info, dict) or len(objects) > MAX_ARTIFACTS:
        raise Rejected("the record of the artifacts is not what Metaflow writes")
    kept: dict[str, Any] = {}
    for name, sha in objects.items():
        # Names become parts of file names in the metadata, and of a class in Metaflow's client,
        # where Python takes those that look alike for one.
        proper = name.isidentifier() and name.isprintable() and normalize("NFKC", name) == name
        if not proper or len(name.encode()) > 200:
            raise Rejected(f"an artifact has the name {harmless(name)}")
        if not isinstance(sha, str) or not SHA.match(sha) or not isinstance(info.get(name), dict):
            raise Rejected(f"the artifact {harmless(name)} has no proper record")
        kept[name] = _record(info[name])
    return {"objects": objects, "info": kept}


def _record(claimed: dict[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for field in ("type", "encoding"):
        value = claimed.get(field)
        if isinstance(value, str) and len(value) <= _FIELD:
            record[field] = value
    details = claimed.get("serializer_info")
    try:
        short = isinstance(details, dict) and len(json.dumps(details)) <= _FIELD
    except (ValueError, RecursionError):
        short = False
    if short:
        record["serializer_info"] = details
    return record
