"""The user's artifacts: which record each of them gets.

    known        Parameters, Configs, constants, the graph: the host's own record
    inherited    the content came from an input: the record of that input
    new          delivered by this attempt: tainted, unless `trust="all"`; with the classes
                 that `trust` names

The record decides how an artifact is loaded later, so it is never taken from the
sandbox. A step could otherwise load something tainted and save it again, with
the same key, under a harmless claim.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import metaflow  # noqa: F401 - first: it loads the extension, which can't load it half-way

from metaflow_extensions.sandbox.plugins.tainted import mark, tainted, unmarked

from ..errors import Rejected
from .internals import FORBIDDEN, INTERNAL
from .results import Results

_TYPE = re.compile(r"<class '[\w.<>\[\], ]{1,200}'>\Z")
_ENCODING = re.compile(r"[\w.+-]{1,64}\Z")
_INFO_BYTES = 4096
# Metaflow opens what such an artifact points to.
_POINTER = "<class 'metaflow.includefile.IncludedFile'>"

Record = dict[str, Any]


@dataclass(frozen=True)
class Decision:
    """Which key and record each artifact gets; `new` are the keys to be stored."""

    objects: dict[str, str]
    info: dict[str, Record]
    new: frozenset[str]


def inherited_records(
    parents: Iterable[tuple[Mapping[str, str], Mapping[str, Record]]],
) -> dict[str, Record]:
    """{key: record} of all inputs; the tainted one where they differ, and the stricter of two."""
    records: dict[str, Record] = {}
    for objects, info in parents:
        for name, sha in objects.items():
            if sha not in records or tainted(info[name].get("encoding")):
                records[sha] = _stricter(info[name], records.get(sha))
    return records


def _stricter(record: Record, other: Record | None) -> Record:
    """A tainted record, with no class that another one of the same content doesn't name."""
    if other is None or not tainted(other.get("encoding")):
        return record
    classes, encoding = unmarked(record["encoding"])
    others, _ = unmarked(other["encoding"])
    return {**record, "encoding": mark(set(classes) & set(others)) + encoding}


def decide(
    results: Results,
    *,
    known: Mapping[str, tuple[str, Record]],
    inherited: Mapping[str, Record],
    trust: str | tuple[str, ...],
    origin: str,
) -> Decision:
    """Goes through what a sandbox claims to have recorded.

    Args:
        known: {name: (key, record)} that no step can change.
        inherited: {key: record} of the inputs.
        trust: the step's: "data", "all", or names of classes.
        origin: pathspec of the task, recorded with what is new.

    Raises:
        Rejected: a claim that no honest step makes.
    """
    objects = {name: sha for name, (sha, _) in known.items()}
    info = {name: record for name, (_, record) in known.items()}
    new = set()
    for name, sha in results.objects.items():
        if name in known or name in INTERNAL:
            continue
        if name in FORBIDDEN:
            raise Rejected(f"the artifact {name} steers Metaflow's scheduler")
        if sha in inherited:
            objects[name], info[name] = sha, inherited[sha]
            continue
        claimed = results.info[name]
        if trust == "all":
            record = _claimed(claimed)
        else:
            record = _tainted(claimed, name, origin, () if isinstance(trust, str) else trust)
        objects[name], info[name] = sha, record
        new.add(sha)
    return Decision(objects, info, frozenset(new))


def _text(value: Any, form: re.Pattern[str], default: str) -> str:
    return value if isinstance(value, str) and form.match(value) else default


def _tainted(claimed: Record, name: str, origin: str, classes: tuple[str, ...]) -> Record:
    kind = _text(claimed.get("type"), _TYPE, "<class 'object'>")
    return {
        "size": 0,  # set when the content was measured
        "type": "<class 'object'>" if kind == _POINTER else kind,
        "encoding": mark(classes) + _text(claimed.get("encoding"), _ENCODING, "unknown"),
        "serializer_info": {
            "source": "metaflow-sandbox",
            "origin": origin,
            "artifact": name,
        },
    }


def _claimed(claimed: Record) -> Record:
    """The sandbox's own record, for steps that are trusted with everything."""
    details = claimed.get("serializer_info", {})
    if not isinstance(details, dict) or len(json.dumps(details)) > _INFO_BYTES:
        raise Rejected("an artifact's record is not what Metaflow writes")
    encoding = _text(claimed.get("encoding"), _ENCODING, "unknown")
    if tainted(encoding):
        raise Rejected("an artifact claims to have passed admission before")
    return {
        "size": 0,
        "type": _text(claimed.get("type"), _TYPE, "<class 'object'>"),
        "encoding": encoding,
        "serializer_info": details,
    }
