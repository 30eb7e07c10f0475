"""Images that are made here: the trial image of the preflight, and those with `setup` in them.

What `setup` and an installation leave is kept as an OCI layout with one layer: the guest's
whole file system, packed inside and hashed on the way out. Nothing of it is unpacked by us.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import platform
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from ...errors import SandboxError
from ..base import Recipe, SandboxSpec, Say, unsaid
from .faults import BadImage
from .images import alone, new_layout, write_index
from .sandbox import BoxliteSandbox

if TYPE_CHECKING:
    from . import Boxlite

_OCI = "application/vnd.oci.image"
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "arm64": "arm64"}
_DISK = 16384
_MEMORY = 2048
_LIFETIME = 3600.0
_KEPT = 2000  # characters of what a failed command said
# Machine code that waits for ever: pause() in a loop; where that isn't, ppoll(0, 0, 0, 0, 0).
_WAIT_X86 = "b822000000 0f05 ebf7"
_WAIT_ARM = "280980d2 000080d2 010080d2 020080d2 030080d2 040080d2 010000d4 f9ffff17"
_WAIT = {"amd64": (62, _WAIT_X86), "arm64": (183, _WAIT_ARM)}  # with ELF's number of the machine
_VERSION = "import sys; print('%d.%d' % sys.version_info[:2])"
# What a root file system has of the machine it runs on, and of us.
_PACK = """
import os, sys, tarfile
top = os.stat("/").st_dev
out = tarfile.open(fileobj=sys.stdout.buffer, mode="w|", format=tarfile.PAX_FORMAT)
left_out = set(sys.argv[1:])
for folder, names, files in os.walk("/"):
    kept = []
    for name in names:
        path = os.path.join(folder, name)
        if os.path.islink(path):
            files.append(name)
        elif path not in left_out and os.lstat(path).st_dev == top:
            kept.append(name)
        if path not in left_out and not os.path.islink(path):
            out.add(path, path[1:], recursive=False)
    names[:] = kept
    for name in files:
        path = os.path.join(folder, name)
        if os.lstat(path).st_dev == top:
            out.add(path, path[1:], recursive=False)
out.close()
"""


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
        described = {"Cmd": ["/pause"], "Env": ["PATH=/"]}
        _describe(layout, layer.name, len(packed), hashlib.sha256(content).hexdigest(), described)
    return target


def _describe(layout: Path, layer: str, size: int, diff: str, config: dict[str, Any]) -> str:
    """Writes the documents of an image with one layer. Returns its manifest's digest."""

    def put(document: dict[str, Any], kind: str) -> dict[str, Any]:
        data = json.dumps(document, sort_keys=True).encode()
        digest = hashlib.sha256(data).hexdigest()
        (layout / "blobs" / "sha256" / digest).write_bytes(data)
        return {"mediaType": f"{_OCI}.{kind}.v1+json", "digest": f"sha256:{digest}",
                "size": len(data)}  # fmt: skip

    described = {
        "architecture": _MACHINES[platform.machine()],
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{diff}"]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{_OCI}.manifest.v1+json",
        "config": put(described, "config"),
        "layers": [{"mediaType": f"{_OCI}.layer.v1.tar+gzip", "digest": f"sha256:{layer}",
                    "size": size}],
    }  # fmt: skip
    entry = put(manifest, "manifest")
    digest = str(entry["digest"]).partition(":")[2]
    write_index(layout, digest, entry["size"])
    return digest


def configuration(layout: Path) -> dict[str, Any]:
    """What an image says about how it is run."""
    blobs = layout / "blobs"

    def read(digest: str) -> Any:
        return json.loads((blobs / digest.replace(":", "/")).read_bytes())

    (entry,) = json.loads((layout / "index.json").read_text())["manifests"]
    found = read(read(entry["digest"])["config"]["digest"]).get("config")
    return dict(found or {})


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
    name = digest_of(layout).partition(":")[2]
    async with alone(f"looked-over/{name}") as record:
        if not record.exists():
            await say(f"making a disk of the image {image}")
            sandbox = await BoxliteSandbox.start(backend, SandboxSpec(memory=_MEMORY), layout)
            try:
                done = await sandbox.run([backend.python, "-I", "-c", _VERSION])
            finally:
                await sandbox.destroy()
            record.write_bytes(done.stdout.strip()[:20])
        found = record.read_text()
    here = ".".join(platform.python_version_tuple()[:2])
    numbers = found.split(".")
    if len(numbers) != 2 or not all(n.isdigit() for n in numbers):
        record.unlink()
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


async def prepare(backend: Boxlite, recipe: Recipe, base: Path, say: Say) -> Path:
    """The layout that a recipe makes of another; made once.

    Raises:
        SandboxError: a command failed, with what it said.
    """
    key = await anyio.to_thread.run_sync(recipe.key, digest_of(base), backend.provider())
    async with alone(f"prepared/{key}") as target:
        if not target.is_dir():
            await say("preparing the image: this is done once")
            await _make(backend, recipe, base, target, say)
    return target


async def _make(backend: Boxlite, recipe: Recipe, base: Path, target: Path, say: Say) -> None:
    spec = SandboxSpec(
        labels={"purpose": "prepare"}, lifetime=_LIFETIME, memory=_MEMORY, disk=_DISK,
        network=bool(recipe.setup),
    )  # fmt: skip
    sandbox = await BoxliteSandbox.start(backend, spec, base)
    try:
        for command in recipe.setup:
            await say(f"setup: {command}")
            await _run(sandbox, ["sh", "-c", command], f"setup command {command!r}")
        if recipe.install:
            await _bring(sandbox, recipe)
            await _run(sandbox, list(recipe.install), "the installation")
        left_out = ["/proc", "/sys", "/dev", "/tmp", backend.inbox, backend.work, *recipe.files]  # noqa: S108
        with new_layout(target) as layout:
            layer, size, diff = await _pack(sandbox, layout / "blobs" / "sha256", left_out)
            _describe(layout, layer, size, diff, configuration(base))
    finally:
        await sandbox.destroy()


async def _bring(sandbox: BoxliteSandbox, recipe: Recipe) -> None:
    """Puts the files of a recipe where its installation finds them."""
    for path, source in recipe.files.items():
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
        text = "".join(
            c if c.isprintable() or c == "\n" else "?" for c in tail.decode(errors="replace")
        )
        raise SandboxError(
            f"{what} failed with exit code {code}: {sandbox.diagnose() or ''}\n{text}",
            code="setup_failed",
            op="prepare",
            retryable=False,
        )


async def _pack(sandbox: BoxliteSandbox, blobs: Path, left_out: list[str]) -> tuple[str, int, str]:
    """Stores the guest's file system as a layer: (its digest, its size, that of what is in it)."""
    diff = hashlib.sha256()
    new = blobs / "new"
    with gzip.GzipFile(new, "wb", compresslevel=1, mtime=0) as file:

        async def store(data: bytes) -> None:
            diff.update(data)
            await anyio.to_thread.run_sync(file.write, data)

        command = [sandbox.backend.python, "-I", "-S", "-c", _PACK, *left_out]
        code = await sandbox.exec(command, cwd="/", on_stdout=store)
    if code != 0:
        raise SandboxError(
            f"the prepared file system could not be packed (exit code {code})",
            code="setup_failed",
            op="prepare",
        )
    packed = hashlib.sha256()
    with open(new, "rb") as stored:
        while piece := stored.read(1 << 20):
            packed.update(piece)
    new.rename(blobs / packed.hexdigest())
    return packed.hexdigest(), (blobs / packed.hexdigest()).stat().st_size, diff.hexdigest()
