"""Artifacts that a sandbox wrote: marked on admission, judged when somebody loads them.

The host stores what a sandboxed step delivers under the encoding `sandbox-v1`.
Inside a sandbox such an artifact loads as usual. Anywhere else only plain data
is loaded, by `pickles.load_data`, and the rest is refused with the ways on;
nothing is lost, the artifact stays stored. Without this extension Metaflow
refuses the encoding by itself.

`serializer_info` of such an artifact, always written by the host:
    encoding    what the sandbox said it wrote, e.g. "pickle-v4"
    origin      pathspec of the task that wrote it
    artifact    the name it was written under
    source      "metaflow-sandbox", which Metaflow names if the extension is missing
"""

import os
import pickle

from metaflow.datastore.artifacts.serializer import ArtifactSerializer, SerializationFormat
from metaflow.exception import MetaflowException

from .pickles import Refused, load_data

#: The encoding that marks an artifact as written in a sandbox.
ENCODING = "sandbox-v1"
#: Set by the agent for the step it runs, and nowhere else.
WORKLOAD = "METAFLOW_SANDBOX_WORKLOAD"


def inside_sandbox():
    """Whether this process runs in a sandbox, where hostile data can do no harm."""
    return os.environ.get(WORKLOAD) == "1"


class ArtifactRefused(MetaflowException):
    headline = "This artifact was written in a sandbox and is more than data"

    def __init__(self, info, obj_type, refused):
        origin = "%s of %s" % (info.get("artifact", "?"), info.get("origin", "?"))
        super().__init__(
            "%s is %s: %s.\n\n"
            "Loading it here would run code that the sandboxed step chose, on this machine.\n"
            "The artifact is stored and nothing is lost. You can\n"
            "  - let the step leave plain data: numbers, strings, bytes, lists, dicts, sets;\n"
            "  - read it in a step that runs in a sandbox itself (@sandbox on that step);\n"
            '  - run the step that wrote it with trust="all", if you trust its code and input.'
            % (origin, obj_type, refused)
        )


class TaintedPickle(ArtifactSerializer):
    """Loads what sandboxes wrote. It never writes: the host sets the mark on admission."""

    TYPE = "sandbox-pickle"
    PRIORITY = 100

    @classmethod
    def can_serialize(cls, obj):
        return False

    @classmethod
    def can_deserialize(cls, metadata):
        return metadata.encoding == ENCODING

    @classmethod
    def serialize(cls, obj, format=SerializationFormat.STORAGE):
        raise NotImplementedError("the mark of a sandbox is set by the host")

    @classmethod
    def deserialize(cls, data, metadata=None, format=SerializationFormat.STORAGE):
        info = metadata.serializer_info
        if not str(info.get("encoding", "")).startswith("pickle-"):
            raise ArtifactRefused(
                info, metadata.obj_type, "it is stored as `%s`, not as a pickle" % info["encoding"]
            )
        if inside_sandbox():
            return pickle.loads(data[0])  # noqa: S301 - in the sandbox is where it may run
        try:
            return load_data(data[0])
        except Refused as e:
            raise ArtifactRefused(info, metadata.obj_type, e) from None
