"""The parts of Metaflow's datastore that the relay needs and that have no public name.

Everything else goes through public methods. The storage implementation is the
same whatever it is backed by, so nothing here knows a datastore by its type.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from metaflow.util import decompress_list


class Parent:
    """One input of a task: its place and the host's record of its artifacts."""

    def __init__(self, flow_datastore: Any, path: str) -> None:
        run, step, task, *attempt = path.split("/")
        self.datastore = flow_datastore.get_task_datastore(
            run, step, task, attempt=int(attempt[0]) if attempt else None
        )
        self.run, self.step, self.task = run, step, task
        self.attempt: int = self.datastore.attempt
        record = self.datastore.ds_metadata
        self.objects: dict[str, str] = record["objects"]
        self.info: dict[str, dict[str, Any]] = record["info"]

    def read(self, name: str, default: Any = None) -> Any:
        """An artifact that the host wrote, by Metaflow's own unpickling."""
        return self.datastore[name] if name in self.objects else default


def parents_of(flow_datastore: Any, input_paths: str) -> list[Parent]:
    """The inputs of a task, in Metaflow's order."""
    return [Parent(flow_datastore, path) for path in decompress_list(input_paths) if path]


def blob_files(
    flow_datastore: Any, keys: Iterable[str]
) -> Iterator[tuple[str, str, dict[str, Any] | None]]:
    """(key, local file as stored, its metadata) of each blob; the file is short-lived."""
    paths = {f"{flow_datastore.flow_name}/data/{key[:2]}/{key}": key for key in keys}
    with flow_datastore._storage_impl.load_bytes(list(paths)) as loaded:
        for path, file, metadata in loaded:
            if file is None:
                raise FileNotFoundError(f"the datastore has lost the blob {paths[path]}")
            yield paths[path], file, metadata


def stored(flow_datastore: Any, key: str) -> bytes | None:
    """The content of a blob, if the datastore has it."""
    path = f"{flow_datastore.flow_name}/data/{key[:2]}/{key}"
    if not flow_datastore._storage_impl.is_file([path])[0]:
        return None
    ((_, content),) = flow_datastore.ca_store.load_blobs([key])
    return bytes(content)


def save_cards(flow_datastore: Any, cards: Iterable[tuple[str, Any]]) -> None:
    """Stores (path, file object) pairs where Metaflow looks for cards."""
    from metaflow.plugins.cards.card_datastore import CardDatastore

    root = CardDatastore.get_storage_root(flow_datastore.TYPE)
    type(flow_datastore._storage_impl)(root).save_bytes(iter(cards), overwrite=True)
