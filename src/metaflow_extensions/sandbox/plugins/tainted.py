"""Artifacts that a sandbox wrote: marked on admission, judged when somebody loads them.

The host stores what a sandboxed step delivers under an encoding of its own:

    sandbox-v1+pickle-v4                     what `trust="data"` may load
    sandbox-v1(pkg.A,pkg.B)+pickle-v4        the same, and objects of these classes

What comes after the plus is what the sandbox said it wrote. Inside a sandbox such an
artifact loads as usual. Anywhere else it is read by `pickles.load_data`, and what that
refuses is shown on one screen with the ways on; nothing is lost, the artifact stays
stored. Without this extension Metaflow refuses the encoding by itself.

The mark, and the classes, are in the encoding because that is all that Metaflow's client
passes on; steps and `dump` also get the `serializer_info` that the host wrote: `origin`
(the task's pathspec), `artifact` (its name there), and `source`, which Metaflow names
where the extension is missing.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

from metaflow.datastore.artifacts.serializer import (
    ArtifactSerializer,
    SerializationFormat,
    SerializerStore,
)
from metaflow.datastore.task_datastore import TaskDataStore
from metaflow.exception import MetaflowException

from .pickles import NotHere, Refused, is_class, load_data
from .text import printable

_VERSION = "sandbox-v1"
_MARKED = re.compile(re.escape(_VERSION) + r"(?:\(([\w.,]+)\))?\+(.*)\Z", re.S)
_CLASS = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+\Z")
#: How many classes one step may name, and their characters together.
MAX_CLASSES, MAX_CLASS_TEXT = 50, 2000
#: Set by the agent for the step it runs, and nowhere else.
WORKLOAD = "METAFLOW_SANDBOX_WORKLOAD"
ALL = "all"

_released: ContextVar[tuple[str, ...]] = ContextVar("released", default=())

# What of other libraries is data already, for those who read that it was refused.
_INSTEAD = {
    "torch": "leave `tensor.numpy()` in the place of a tensor, `state_dict()` as arrays",
    "PIL": "leave `numpy.asarray(image)` in the place of an image, or the bytes of its file",
    "polars": "leave `frame.to_dict(as_series=False)` in the place of a frame, or Parquet's bytes",
    "pyarrow": "leave `table.to_pydict()` in the place of a table, or the bytes of a Parquet file",
    "scipy": "leave the arrays of a sparse matrix (data, indices, indptr) and its shape",
    "re": "leave `pattern.pattern` in the place of a compiled pattern",
}


def inside_sandbox() -> bool:
    """Whether this process runs in a sandbox, where hostile data can do no harm."""
    return os.environ.get(WORKLOAD) == "1"


def mark(classes: Iterable[str] = ()) -> str:
    """What the encoding of an artifact begins with whose writer was trusted with this."""
    names = ",".join(sorted(set(classes)))
    return f"{_VERSION}({names})+" if names else f"{_VERSION}+"


MARK = mark()


def tainted(encoding: object) -> bool:
    """Whether an artifact of this encoding was written in a sandbox."""
    return isinstance(encoding, str) and encoding.startswith(_VERSION)


def unmarked(encoding: str) -> tuple[tuple[str, ...], str]:
    """The classes that may be in an artifact, and what the sandbox said of its encoding.

    Raises:
        ValueError: the encoding is not one that `mark` begins.
    """
    matched = _MARKED.match(encoding)
    if matched is None:
        raise ValueError(f"{encoding!r} is no mark of a sandbox")
    return tuple(matched[1].split(",")) if matched[1] else (), matched[2]


def class_names(value: Any) -> tuple[str, ...]:
    """Names of classes, out of a list or a string with commas.

    Raises:
        ValueError: something else is among them, with what to write.
    """
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)):
        raise ValueError(  # noqa: TRY004 - one kind of error for what a user gave
            'give names of classes, such as ["pkg.Result"]'
        )
    found = []
    for name in names:
        if isinstance(name, type):
            raise ValueError(  # noqa: TRY004
                f'name the class: "{name.__module__}.{name.__qualname__}"'
            )
        if not isinstance(name, str) or not _CLASS.match(name.strip()):
            raise ValueError(f'{name!r} is not a name of a class, such as "pkg.Result"')
        found.append(name.strip())
    if len(found) > MAX_CLASSES or sum(map(len, found)) > MAX_CLASS_TEXT:
        raise ValueError(
            f"give at most {MAX_CLASSES} classes, whose names have {MAX_CLASS_TEXT} characters"
        )
    return tuple(found)


@contextlib.contextmanager
def trusting(*what: str) -> Iterator[None]:
    """Lets this thread load more of what sandboxes wrote, for as long as the context lasts.

    Args:
        what: names of classes whose objects may be loaded, as the refusal names them; or
            "all": whatever there is, as Metaflow loads it. The code that this runs, and
            the data it is given, are the sandboxed step's choice.

    Raises:
        ValueError: a name is not one of a class.
    """
    if not what:
        raise ValueError('give names of classes, such as "pkg.Result", or "all"')
    names = what if what == (ALL,) else class_names(what)
    token = _released.set(_released.get() + tuple(names))
    try:
        yield
    finally:
        _released.reset(token)


def configured() -> tuple[str, ...]:
    """The classes of METAFLOW_SANDBOX_RELEASE.

    Raises:
        MetaflowException: something else is among them.
    """
    from metaflow import metaflow_config

    released = metaflow_config.SANDBOX_RELEASE
    try:
        return class_names(released) if released else ()
    except ValueError as e:
        raise MetaflowException(f"METAFLOW_SANDBOX_RELEASE: {e}.") from None


def _seconds() -> float:
    from .settings import number

    return number("MAX_LOAD")


class ArtifactRefused(MetaflowException):
    headline = "This artifact was written in a sandbox and is more than data"

    def __init__(self, metadata: Any, refused: object, may: Iterable[str] = ()) -> None:
        info = metadata.serializer_info or {}
        where = f"{info['origin']}/{info['artifact']}" if "artifact" in info else "FLOW/…/ARTIFACT"
        name = f"`{info['artifact']}` of {info['origin']}" if "artifact" in info else "The artifact"
        kind = f" ({metadata.obj_type})" if metadata.obj_type else ""
        named = getattr(refused, "name", None) or ""
        instead = _INSTEAD.get(
            named.partition(".")[0],
            "let the step leave data: numbers, text, containers, dates, arrays, frames",
        )
        why, ways = _why_and_ways(refused, named, may, where)
        super().__init__(
            f"{name}{kind} is refused: {refused}.\n\n"
            f"{why}The artifact is stored and nothing is lost. You can\n"
            f"  - {instead};\n"
            "  - read it in a step that runs in a sandbox itself (@sandbox on that step);\n" + ways
        )


def _why_and_ways(refused: object, named: str, may: Iterable[str], where: str) -> tuple[str, str]:
    """Why an artifact isn't loaded, and the ways on that there are for this reason alone."""
    if isinstance(refused, NotHere):
        module, _, rest = named.partition(".")
        how = "install what has it, or add its directory to PYTHONPATH, as for the step"
        if module == "__main__":
            how = f"import it first: from FLOW import {rest.partition('.')[0]}"
        return "It loads where that can be imported.\n", f"  - {how}."
    code = "Loading it here would run code that the sandboxed step chose, on this machine.\n"
    if is_class(named) and named not in may:
        return code, (
            f'  - name its class where it is written: @sandbox(trust=["{named}"]), or '
            'trust="all",\n'
            "    if you trust that code with whatever the step gives it;\n"
            f"  - release this one: metaflow-sandbox release {where}\n"
            "  - in a notebook: from metaflow_sandbox import trusting; "
            f'with trusting("{named}"): …'
        )
    if named and named not in may:
        code += (
            f"`{named}` is no class, as far as can be seen without importing it:\n"
            "it is such code itself.\n"
        )
    else:
        code += "No name of a class would change that.\n"
    return code, (
        "  - let that code run here, if you know it and who wrote it: "
        '@sandbox(trust="all") where it\n'
        f"    is written; or metaflow-sandbox release {where} --all; or, in a notebook,\n"
        '    from metaflow_sandbox import trusting; with trusting("all"): …'
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
        try:
            classes, encoding = unmarked(metadata.encoding)
        except ValueError as e:
            raise ArtifactRefused(metadata, e) from None
        released = _released.get()
        if inside_sandbox() or ALL in released:
            inner = metadata._replace(encoding=encoding)
            for serializer in SerializerStore.get_ordered_serializers():
                if serializer.can_deserialize(inner):
                    return serializer.deserialize(data, inner, format=format)
        if not encoding.startswith("pickle-"):
            raise ArtifactRefused(metadata, f"it is stored as `{encoding}`")
        try:
            may = {*classes, *released, *configured()}
            return load_data(data[0], may, _seconds())
        except Refused as e:
            raise ArtifactRefused(metadata, e, may) from None


def _dump_harmlessly() -> None:
    """Has what `flow.py dump` prints of tasks with tainted artifacts without control characters."""
    plain = TaskDataStore.format
    if getattr(plain, "is_harmless", False):
        return

    def harmless(self: Any, **kwargs: Any) -> str:
        text: str = plain(self, **kwargs)
        records = self._info.values()
        return printable(text) if any(tainted(r.get("encoding")) for r in records) else text

    harmless.is_harmless = True  # type: ignore[attr-defined]
    TaskDataStore.format = harmless


_dump_harmlessly()
