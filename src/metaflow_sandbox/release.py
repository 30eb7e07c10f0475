"""Releases an artifact that a sandbox wrote: shows what it names, and changes its record.

The artifact's bytes stay what they are. Its record says afterwards what may be loaded
of them: in the datastore, where later steps and `resume` look, and in the metadata, where
Metaflow's client does, as far as the provider lets a record be changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import metaflow
from metaflow.datastore import FlowDataStore
from metaflow.plugins import DATASTORES

from metaflow_extensions.sandbox.plugins.pickles import (
    Refused,
    is_class,
    load_data,
    names,
    rules,
)
from metaflow_extensions.sandbox.plugins.settings import number
from metaflow_extensions.sandbox.plugins.tainted import class_names, mark, tainted, unmarked

from .errors import SandboxError


class NotReleased(SandboxError):
    """There is no such artifact, or nothing to release."""

    code = "not_released"


@dataclass(frozen=True)
class Found:
    """An artifact that a sandbox wrote, and what could be found out without loading it.

    Attributes:
        kind: its type, as the sandbox says.
        names: what its pickle names, if it isn't loaded as it is.
        refused: why it isn't loaded as it is; None if it is.
        classes: what it may have beside data so far.
    """

    flow: str
    run: str
    key: str
    origin: str
    kind: str
    size: int
    encoding: str
    names: tuple[str, ...]
    refused: str | None
    classes: tuple[str, ...]
    datastore: Any


def find(pathspec: str) -> Found:
    """Looks an artifact up, FLOW/RUN/STEP/TASK/ARTIFACT, in the configured metadata.

    Raises:
        NotReleased: it isn't there, or no sandbox wrote it.
    """
    if len(pathspec.split("/")) != 5:
        raise NotReleased(f"{pathspec} is no artifact: give FLOW/RUN/STEP/TASK/ARTIFACT.")
    metaflow.namespace(None)
    flow, run, step, task, name = pathspec.split("/")
    try:
        artifact = metaflow.DataArtifact(pathspec)
    except metaflow.exception.MetaflowException as e:
        raise NotReleased(f"{pathspec}: {e}") from None
    about = artifact._object
    store = _datastore(flow, about["ds_type"], about["location"])
    record = store.get_task_datastore(run, step, task).ds_metadata
    key = record["objects"].get(name)
    info = record["info"].get(name, {})
    if key is None or not tainted(info.get("encoding")):
        raise NotReleased(f"{pathspec} was not written in a sandbox, or is released: just load it.")
    ((_, content),) = store.ca_store.load_blobs([key])
    details = info.get("serializer_info") or {}
    classes, inner = unmarked(info["encoding"])
    named, refused = _look(bytes(content), inner)
    return Found(
        flow=flow,
        run=run,
        key=key,
        origin=f"{details.get('origin', '?')}/{details.get('artifact', '?')}",
        kind=str(info.get("type")),
        size=len(content),
        encoding=inner,
        names=named,
        refused=refused,
        classes=classes,
        datastore=store,
    )


def chosen(found: Found, classes: tuple[str, ...]) -> tuple[str, ...]:
    """The classes to release an artifact with: the given ones, else those that it names.

    Raises:
        NotReleased: it names what can't be a class, or nothing but what data names.
    """
    if found.refused is None and not classes:
        raise NotReleased("It is data: it is loaded as it is.")
    try:
        wanted = class_names(list(classes or (n for n in found.names if n not in rules())))
    except ValueError as e:
        raise NotReleased(f"{e}. Give --trust for each class.") from None
    if not wanted:
        raise NotReleased(
            "It names no class and is refused, so it is a program. --all runs it wherever it is "
            "loaded, as whoever wrote it in the sandbox likes."
        )
    code = [name for name in wanted if not classes and not is_class(name)]
    if code:
        raise NotReleased(
            f"{', '.join(code)}: no class, as far as can be seen without importing it, but code. "
            "So it is a program: --all runs it wherever it is loaded, as whoever wrote it in the "
            "sandbox likes."
        )
    return wanted


def release(found: Found, classes: tuple[str, ...] | None) -> tuple[list[str], list[str]]:
    """Changes the records of an artifact in all tasks of its run that have it.

    Args:
        classes: what may be in it beside data; None: anything, as Metaflow loads it.

    Returns:
        The pathspecs whose records were changed, and those whose metadata could not be:
        the client goes on refusing these.
    """
    encoding = found.encoding
    if classes is not None:
        encoding = mark({*classes, *found.classes}) + found.encoding
    changed, kept = [], []
    for task in _tasks(found):
        store = found.datastore.get_task_datastore(found.run, task.parent.id, task.id)
        record = store.ds_metadata
        names = [
            name
            for name, key in record["objects"].items()
            if key == found.key and tainted(record["info"].get(name, {}).get("encoding"))
        ]
        if not names:
            continue
        for name in names:
            record["info"][name]["encoding"] = encoding
        writer = found.datastore.get_task_datastore(
            found.run, task.parent.id, task.id, attempt=store.attempt, mode="w"
        )
        writer.save_metadata({writer.METADATA_DATA_SUFFIX: record})
        for name in names:
            path = f"{task.pathspec}/{name}"
            changed.append(path)
            if not _change_metadata(path, store.attempt, encoding):
                kept.append(path)
    return changed, kept


def _look(content: bytes, encoding: str) -> tuple[tuple[str, ...], str | None]:
    if not encoding.startswith("pickle-"):
        return (), f"it is stored as {encoding}"
    try:
        load_data(content, seconds=number("MAX_LOAD"))
    except Refused as e:
        refused = str(e)
    else:
        return (), None
    # A name that data may have is in programs, too: getattr of one leads to all others.
    try:
        return tuple(ascii(name)[1:-1] for name in names(content)), refused
    except Refused as e:
        return (), str(e)


def _datastore(flow: str, kind: str, location: str) -> Any:
    storage = next(d for d in DATASTORES if kind == d.TYPE)
    root = location[len(":root:") :]
    return FlowDataStore(flow, None, storage_impl=storage, ds_root=root)


def _tasks(found: Found) -> Iterator[Any]:
    for step in metaflow.Run(f"{found.flow}/{found.run}", _namespace_check=False):
        yield from (task for task in step if task.finished)


def _change_metadata(pathspec: str, attempt: int, encoding: str) -> bool:
    """Changes what the client reads, where that is a file. A service keeps what it has."""
    provider = metaflow.DataArtifact(pathspec)._metaflow.metadata
    if provider.TYPE != "local":
        return False
    flow, run, step, task, name = pathspec.split("/")
    path = os.path.join(
        provider._create_and_get_metadir(flow, run, step, task), f"{attempt}_artifact_{name}.json"
    )
    with open(path) as file:
        record = json.load(file)
    record["content_type"] = encoding
    provider._dump_json_to_file(path, record, allow_overwrite=True)
    return True
