"""Artifacts that a sandbox wrote: marked on admission, judged when somebody loads them.

The host stores what a sandboxed step delivers under an encoding of its own,
`sandbox-v1+` and what the sandbox said it wrote (`sandbox-v1+pickle-v4`). Inside
a sandbox such an artifact loads as usual. Anywhere else only plain data is
loaded, by `pickles.load_data`, and the rest is refused with the ways on; nothing
is lost, the artifact stays stored. Without this extension Metaflow refuses the
encoding by itself.

The mark is in the encoding because that is all that Metaflow's client passes on;
steps and `dump` also get the `serializer_info` that the host wrote: `origin` (the
task's pathspec), `artifact` (its name there), and `source`, which Metaflow names
where the extension is missing.
"""

from __future__ import annotations

import os
from typing import Any

from metaflow.datastore.artifacts.serializer import (
    ArtifactSerializer,
    SerializationFormat,
    SerializerStore,
)
from metaflow.exception import MetaflowException

from .pickles import Refused, load_data

#: What the encoding of an artifact that was written in a sandbox begins with.
MARK = "sandbox-v1+"
#: Set by the agent for the step it runs, and nowhere else.
WORKLOAD = "METAFLOW_SANDBOX_WORKLOAD"


def inside_sandbox() -> bool:
    """Whether this process runs in a sandbox, where hostile data can do no harm."""
    return os.environ.get(WORKLOAD) == "1"


def tainted(encoding: object) -> bool:
    """Whether an artifact of this encoding was written in a sandbox."""
    return isinstance(encoding, str) and encoding.startswith(MARK)


class ArtifactRefused(MetaflowException):
    headline = "This artifact was written in a sandbox and is more than data"

    def __init__(self, metadata: Any, refused: object) -> None:
        info = metadata.serializer_info or {}
        name = f"`{info['artifact']}` of {info['origin']}" if "artifact" in info else "The artifact"
        kind = f" ({metadata.obj_type})" if metadata.obj_type else ""
        super().__init__(
            f"{name}{kind} is refused: {refused}.\n\n"
            "Loading it here would run code that the sandboxed step chose, on this machine.\n"
            "The artifact is stored and nothing is lost. You can\n"
            "  - let the step leave plain data: numbers, strings, bytes, lists, dicts, sets;\n"
            "  - read it in a step that runs in a sandbox itself (@sandbox on that step);\n"
            '  - run the step that wrote it with trust="all", if you trust its code and input.'
        )


class TaintedPickle(ArtifactSerializer):
    """Loads what sandboxes wrote. It never writes: the host sets the mark on admission."""

    TYPE = "sandbox-pickle"
    PRIORITY = 100

    @classmethod
    def can_serialize(cls, obj: Any) -> bool:
        return False

    @classmethod
    def can_deserialize(cls, metadata: Any) -> bool:
        return tainted(metadata.encoding)

    @classmethod
    def serialize(cls, obj: Any, format: Any = SerializationFormat.STORAGE) -> Any:
        raise NotImplementedError("the mark of a sandbox is set by the host")

    @classmethod
    def deserialize(
        cls, data: Any, metadata: Any = None, format: Any = SerializationFormat.STORAGE
    ) -> Any:
        inner = metadata._replace(encoding=metadata.encoding[len(MARK) :])
        if inside_sandbox():
            for serializer in SerializerStore.get_ordered_serializers():
                if serializer.can_deserialize(inner):
                    return serializer.deserialize(data, inner, format=format)
        if not inner.encoding.startswith("pickle-"):
            raise ArtifactRefused(metadata, f"it is stored as `{inner.encoding}`")
        try:
            return load_data(data[0])
        except Refused as e:
            raise ArtifactRefused(metadata, e) from None
