"""Reads what a sandbox left, in a process of its own.

The bytes are hostile, and there are data that take for ever to build or fill the
memory whatever one forbids. So they are read by a process with little memory and
time that the launcher can end and that can start no other, write no file and open few.
A request comes on standard input, the answer goes to standard output:

    {"items": [{"name", "form", "file", "raw", "sha"}, …]}
              the few values that only the step can know:
              {name: {"value": …} or {"refused": why}}
    {"record": file}
              what the step says that it recorded (`claims.py`), or {"refused": why}
    {"blobs": [{"sha", "file", "raw"}, …], "limit": bytes of one, "seconds": of CPU}
              their contents (`blobs.py`)

Runs on a bare interpreter (`-I -S`), since importing Metaflow would take longer
than all the rest.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

from metaflow_extensions.sandbox.plugins.pickles import Refused, load_plain

from ..errors import Rejected
from . import claims
from .blobs import send, unpacked
from .text import escape

#: Bytes that one of these values may have as a pickle, unpacked.
MAX_BYTES = 32 << 20
MAX_TEXT = 1 << 20
MAX_FOREACH_TEXT = 10_000
MAX_FOREACH_TEXTS = 16 << 20
MAX_STEPS, MAX_NAME = 100, 1000
SECONDS = 10
MEMORY = 2 << 30
FILES = 16
#: What starts this file as a program; the directory of the packages is its argument.
PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from metaflow_sandbox.admission.reader import main; main()"
)


class Caught:
    """Stands for Metaflow's exception wrapper, which can't be imported here."""


def _harmless(text: str) -> str:
    """Text without control characters but for line ends."""
    if len(text) > MAX_TEXT:
        text = text[:MAX_TEXT] + "…"
    lines = text.encode("utf-8", "surrogatepass").split(b"\n")
    return b"\n".join(map(escape, lines)).decode()


def _flag(value: Any) -> bool | None:
    if not isinstance(value, (bool, type(None))):
        raise Refused("it is not a truth value")
    return value


def _integer(value: Any) -> int | None:
    if value is not None and (type(value) is not int or value.bit_length() > 62):
        raise Refused("it is not a number of splits")
    return None if value is None else int(value)


def _texts(value: Any) -> list[str | None] | None:
    if value is None:
        return None
    if type(value) is not list or any(type(v) not in (str, type(None)) for v in value):
        raise Refused("it is not a list of strings")
    if any(v is not None and len(v) > MAX_FOREACH_TEXT for v in value):
        raise Refused("it has strings that are too long")
    if len(value) + sum(len(v) for v in value if v is not None) > MAX_FOREACH_TEXTS:
        raise Refused("it has too many strings")
    return [None if v is None else _harmless(v).replace("\n", "\u240a") for v in value]


def _exception(value: Any) -> dict[str, str | None] | None:
    if value is None:
        return None
    if type(value) is not Caught:
        raise Refused("it is not an exception as Metaflow records it")
    return {k: None if v is None else _harmless(v) for k, v in value.__dict__.items()}


def _transition(value: Any) -> list[Any] | None:
    if value is None:
        return None
    if type(value) is not tuple or len(value) != 2 or type(value[0]) is not list:
        raise Refused("it is not a transition")
    steps, foreach = value
    if len(steps) > MAX_STEPS or type(foreach) not in (str, type(None)):
        raise Refused("it is not a transition")
    if any(type(s) is not str or len(s) > MAX_NAME for s in [*steps, foreach or ""]):
        raise Refused("it is not a transition")
    return [steps, foreach]


FORMS = {
    "flag": _flag,
    "integer": _integer,
    "texts": _texts,
    "exception": _exception,
    "transition": _transition,
}


def read(item: dict[str, Any]) -> dict[str, Any]:
    """The value of one artifact, or why it is refused."""
    try:
        content = unpacked(Path(item["file"]), item["raw"], item["sha"], MAX_BYTES)
        return {"value": FORMS[item["form"]](load_plain(content, Caught))}
    except (Refused, Rejected) as e:
        return {"refused": str(e)}


def _record(file: str) -> dict[str, Any]:
    try:
        return claims.read(Path(file))
    except Rejected as e:
        return {"refused": str(e)}


def limit(kind: int, value: int) -> None:
    """Limits this process. macOS has no limit of memory that it would hold a process to."""
    try:
        resource.setrlimit(kind, (value, value))
    except (OSError, ValueError):
        if kind != resource.RLIMIT_AS or sys.platform == "linux":
            raise


def main() -> None:
    """Answers one request."""
    request = json.load(sys.stdin)
    seconds = request.get("seconds", SECONDS)
    for kind, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_NOFILE, FILES),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        limit(kind, value)
    if "blobs" in request:
        send(request["blobs"], request["limit"], sys.stdout.buffer)
        return
    if "record" in request:
        answer = _record(request["record"])
    else:
        answer = {item["name"]: read(item) for item in request["items"]}
    json.dump(answer, sys.stdout)
