"""Images that are made here: the trial image of the preflight, and those with `setup` in them.

What `setup` and an installation leave is kept as one more layer upon the image's, with the
files that they made, changed or removed. It is packed inside and hashed on the way out; nothing
of it is unpacked by us.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import platform
import shutil
import tarfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from ...concurrency import blocking
from ...errors import SandboxError
from ...text import printable
from ..base import Recipe, SandboxSpec, Say, Sink, discard, unsaid
from .faults import BadImage
from .images import alone, new_layout, write_index
from .runtime import cache
from .sandbox import BoxliteSandbox

if TYPE_CHECKING:
    from . import Boxlite

_OCI = "application/vnd.oci.image"
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "arm64": "arm64"}
_DISK = 16384
_MEMORY = 2048
_LIFETIME = 3600.0
_LISTED = "/tmp/.metaflow-sandbox-listed"  # noqa: S108 - in the guest, where it is memory
_KEPT = 2000  # characters of what a failed command said
# Machine code that waits for ever: pause() in a loop; where that isn't, ppoll(0, 0, 0, 0, 0).
_WAIT_X86 = "b822000000 0f05 ebf7"
_WAIT_ARM = "280980d2 000080d2 010080d2 020080d2 030080d2 040080d2 010000d4 f9ffff17"
_WAIT = {"amd64": (62, _WAIT_X86), "arm64": (183, _WAIT_ARM)}  # with ELF's number of the machine
_VERSION = "import sys; print('%d.%d' % sys.version_info[:2])"
# Both are run in a guest: the one before `setup`, the other at the end. What has changed is
# told by the time of the change, which no program can set; what is gone, by the list.
_LIST = """
import os, sys
with open(sys.argv[1], "wb") as out:
    top = os.lstat("/").st_dev
    for folder, names, files in os.walk(b"/"):
        names[:] = [n for n in names if os.lstat(os.path.join(folder, n)).st_dev == top]
        for name in names + files:
            out.write(os.path.join(folder, name) + b"\\0")
"""
_PACK = """
import io, os, sys, tarfile
listed, left_out = os.fsencode(sys.argv[1]), set(map(os.fsencode, sys.argv[2:]))
since, top = os.stat(listed).st_ctime_ns, os.lstat("/").st_dev
gone = set(open(listed, "rb").read().split(b"\\0")) - {b""}
out = tarfile.open(fileobj=sys.stdout.buffer, mode="w|", format=tarfile.PAX_FORMAT)
for folder, names, files in os.walk(b"/"):
    kept = []
    for name in sorted(names + files):
        path = os.path.join(folder, name)
        gone.discard(path)
        found = os.lstat(path)
        if path in left_out or found.st_dev != top:
            continue
        if name in names:
            kept.append(name)
        if found.st_ctime_ns >= since:
            text = os.fsdecode(path)
            out.add(text, text[1:], recursive=False)
    names[:] = kept
for path in sorted(gone):
    folder, name = os.path.split(path)
    if folder not in gone and not any(path.startswith(other + b"/") for other in left_out):
        mark = os.fsdecode(os.path.join(folder, b".wh." + name))
        out.addfile(tarfile.TarInfo(mark[1:]), io.BytesIO())
out.close()
"""


@dataclass(frozen=True)
class Layer:
    """A blob with files: its digest, its size in bytes, and the digest of what is packed in it."""

    digest: str
    size: int
    diff: str


def _executable(machine: int, code: bytes) -> bytes:
    """The smallest static program: an ELF header, one segment, and the code."""
    base, headers = 0x400000, 64 + 56
    size = headers + len(code)

    def number(value: int, width: int) -> bytes:
        return value.to_bytes(width, "little")

    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header = ident + number(2, 2) + number(machine, 2) + number(1, 4)
    header += number(base + headers, 8) + number(64, 8) + number(0, 8) + number(0, 4)
    header += b"".join(number(n, 2) for n in (64, 56, 1, 0, 0, 0))
    segment = number(1, 4) + number(5, 4) + number(0, 8) + number(base, 8) * 2
    return header + segment + number(size, 8) * 2 + number(0x1000, 8) + code


def trial(target: Path) -> Path:
    """An OCI layout with a program that waits and nothing else: all that a trial needs."""
    architecture = _MACHINES[platform.machine()]
    target = target.with_name(f"{target.name}-{architecture}")
    if target.is_dir():
        return target
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("dev", "proc", "sys", "tmp", "etc", "run", "inbox"):
            directory = tarfile.TarInfo(name)
            directory.type, directory.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(directory)
        machine, code = _WAIT[architecture]
        program = _executable(machine, bytes.fromhex(code))
        member = tarfile.TarInfo("pause")
        member.mode, member.size = 0o755, len(program)
        archive.addfile(member, io.BytesIO(program))
    content = file.getvalue()
    packed = gzip.compress(content, mtime=0)
    with new_layout(target) as layout:
        layer = layout / "blobs" / "sha256" / hashlib.sha256(packed).hexdigest()
        layer.write_bytes(packed)
        made = Layer(layer.name, len(packed), hashlib.sha256(content).hexdigest())
        _describe(layout, made, None, {"Cmd": ["/pause"], "Env": ["PATH=/"]})
    return target


def _describe(layout: Path, layer: Layer, base: Path | None, config: dict[str, Any]) -> None:
    """Writes the documents of an image: a layer of ours, upon those of another image if any.

    Args:
        config: how it is run, where there is no other.
    """

    def put(document: dict[str, Any], kind: str) -> dict[str, Any]:
        data = json.dumps(document, sort_keys=True).encode()
        digest = hashlib.sha256(data).hexdigest()
        (layout / "blobs" / "sha256" / digest).write_bytes(data)
        return {"mediaType": f"{_OCI}.{kind}.v1+json", "digest": f"sha256:{digest}",
                "size": len(data)}  # fmt: skip

    manifest: dict[str, Any] = {"schemaVersion": 2, "layers": []}
    described: dict[str, Any] = {
        "architecture": _MACHINES[platform.machine()],
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": []},
    }
    if base is not None:
        manifest = _document(base, digest_of(base))
        described = _document(base, manifest["config"]["digest"])
        described.pop("history", None)  # it has an entry for each layer
        for part in manifest["layers"]:
            _share(base, layout, part["digest"])
    described["rootfs"]["diff_ids"].append(f"sha256:{layer.diff}")
    manifest["layers"].append(
        {"mediaType": f"{_OCI}.layer.v1.tar+gzip", "digest": f"sha256:{layer.digest}",
         "size": layer.size}
    )  # fmt: skip
    manifest["mediaType"] = f"{_OCI}.manifest.v1+json"
    manifest["config"] = put(described, "config")
    entry = put(manifest, "manifest")
    write_index(layout, str(entry["digest"]).partition(":")[2], entry["size"])


def _blob(layout: Path, digest: str) -> Path:
    return layout / "blobs" / digest.replace(":", "/")


def _document(layout: Path, digest: str) -> dict[str, Any]:
    return dict(json.loads(_blob(layout, digest).read_bytes()))


def _share(base: Path, layout: Path, digest: str) -> None:
    try:
        os.link(_blob(base, digest), _blob(layout, digest))
    except OSError:  # the user's own layout may be on another file system
        shutil.copyfile(_blob(base, digest), _blob(layout, digest))


def digest_of(layout: Path) -> str:
    """The digest of a layout's image."""
    (entry,) = json.loads((layout / "index.json").read_text())["manifests"]
    return str(entry["digest"])


async def look_over(backend: Boxlite, image: str, layout: Path, say: Say = unsaid) -> None:
    """Makes sure that steps can run in an image, once: that it boots and has a Python.

    The first boot is also when boxlite turns it into a disk, which all later ones share.

    Raises:
        BadImage: they can't, with what to do.
    """
    record = cache() / "looked-over" / digest_of(layout).partition(":")[2]
    if not record.exists():
        await _first_boot(backend, image, layout, record.name, say)
    found = record.read_text()
    here = ".".join(platform.python_version_tuple()[:2])
    numbers = found.split(".")
    if len(numbers) != 2 or not all(n.isdigit() for n in numbers):
        record.unlink(missing_ok=True)
        raise BadImage(f"image={image!r}: its python3 doesn't say its version.", op="prepare")
    if (int(numbers[0]), int(numbers[1])) < (3, 8):
        raise BadImage(
            f"image={image!r} has Python {found}, and a step needs 3.8 or later.", op="prepare"
        )
    if found != here:
        await say(
            f"the image {image} has Python {found}, and this is {here}: what one pickles the other "
            "may not load."
        )


async def _first_boot(backend: Boxlite, image: str, layout: Path, name: str, say: Say) -> None:
    async with alone(f"looked-over/{name}") as record:
        if not record.exists():
            await say(f"making a disk of the image {image}")
            spec = SandboxSpec(memory=_MEMORY, network=False)
            sandbox = await BoxliteSandbox.start(backend, spec, layout)
            try:
                done = await sandbox.run([backend.python, "-I", "-c", _VERSION])
            finally:
                await sandbox.destroy()
            new = record.with_suffix(".new")
            new.write_bytes(done.stdout.strip()[:20])
            new.rename(record)


async def prepare(backend: Boxlite, recipe: Recipe, base: Path, say: Say) -> Path:
    """The layout that a recipe makes of another; made once.

    Raises:
        SandboxError: a command failed, with what it said.
    """
    more = (digest_of(base), backend.provider(), *filter(None, (recipe.once,)))
    key = await anyio.to_thread.run_sync(recipe.key, *more)
    async with alone(f"prepared/{key}") as target:
        if not target.is_dir() or (recipe.rebuild and target not in backend.rebuilt):
            await say("preparing the image: this is done once")
            await _make(backend, recipe, base, target, say)
            backend.rebuilt.add(target)
    return target


async def remove(layout: Path) -> None:
    """Removes what `prepare` made for one run."""
    record = cache() / "looked-over" / digest_of(layout).partition(":")[2]
    await blocking(partial(shutil.rmtree, layout, ignore_errors=True))
    record.unlink(missing_ok=True)


async def _make(backend: Boxlite, recipe: Recipe, base: Path, target: Path, say: Say) -> None:
    spec = SandboxSpec(
        labels={"purpose": "prepare"}, lifetime=_LIFETIME, memory=_MEMORY, disk=_DISK,
        network=bool(recipe.setup),
    )  # fmt: skip
    sandbox = await BoxliteSandbox.start(backend, spec, base)
    try:
        await _python(sandbox, _LIST, _LISTED)
        for command in recipe.setup:
            await say(f"setup: {command}")
            await _run(sandbox, ["sh", "-c", command], f"setup command {command!r}")
        if recipe.install:
            await _bring(sandbox, recipe)
            await _run(sandbox, list(recipe.install), "the installation")
        with new_layout(target) as layout:
            layer = await _pack(sandbox, layout / "blobs" / "sha256", left_out(backend, recipe))
            await anyio.to_thread.run_sync(_describe, layout, layer, base, {})
            shutil.rmtree(target, ignore_errors=True)  # what it replaces
    finally:
        await sandbox.destroy()


def left_out(backend: Boxlite, recipe: Recipe) -> list[str]:
    """What is no part of the image that is made, with all below it."""
    return [backend.inbox, backend.work, *recipe.files]


async def _bring(sandbox: BoxliteSandbox, recipe: Recipe) -> None:
    """Puts the files of a recipe where its installation finds them."""
    for path, source in (await recipe.fetched()).items():
        names = [source] if source.is_file() else [p for p in source.rglob("*") if p.is_file()]
        for name in names:
            inside = path if name == source else f"{path}/{name.relative_to(source)}"
            await sandbox.write_file(inside, name)


async def _run(sandbox: BoxliteSandbox, argv: list[str], what: str) -> None:
    tail = bytearray()

    async def keep(data: bytes) -> None:
        tail.extend(data)
        del tail[:-_KEPT]

    code = await sandbox.exec(argv, cwd="/", on_stdout=keep, on_stderr=keep)
    if code != 0:
        said = printable(tail.decode(errors="replace"))
        raise SandboxError(
            f"{what} failed with exit code {code}: {sandbox.diagnose() or ''}\n{said}",
            code="setup_failed",
            op="prepare",
            retryable=False,
        )


async def _python(sandbox: BoxliteSandbox, script: str, *words: str, out: Sink = discard) -> None:
    """Runs one of the programs above in a guest."""
    said = bytearray()

    async def keep(data: bytes) -> None:
        said.extend(data)
        del said[:-_KEPT]

    command = [sandbox.backend.python, "-I", "-S", "-c", script, *words]
    code = await sandbox.exec(command, cwd="/", on_stdout=out, on_stderr=keep)
    if code != 0:
        raise SandboxError(
            f"what was prepared could not be packed (exit code {code}): "
            f"{printable(said.decode(errors='replace'))}",
            code="setup_failed",
            op="prepare",
        )


async def _pack(sandbox: BoxliteSandbox, blobs: Path, without: list[str]) -> Layer:
    """Stores what has changed in a guest as a layer."""
    diff = hashlib.sha256()
    new = blobs / "new"
    with gzip.GzipFile(new, "wb", compresslevel=1, mtime=0) as file:

        async def store(data: bytes) -> None:
            diff.update(data)
            await anyio.to_thread.run_sync(file.write, data)

        await _python(sandbox, _PACK, _LISTED, *without, out=store)
    packed = hashlib.sha256()
    with open(new, "rb") as stored:
        while piece := stored.read(1 << 20):
            packed.update(piece)
    new.rename(blobs / packed.hexdigest())
    size = (blobs / packed.hexdigest()).stat().st_size
    return Layer(packed.hexdigest(), size, diff.hexdigest())
