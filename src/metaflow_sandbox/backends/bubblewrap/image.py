"""Images on this disk: an unpacked root file system, or an OCI layout, which is unpacked once.

Layers come from strangers, so nothing of them is unpacked by a process that could
reach anything: `unpack.py` does it inside a sandbox that sees the layers and an empty
directory. What it leaves is complete, read-only for every sandbox, and named by its
content's digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import stat
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import anyio
from platformdirs import user_cache_path

from ...errors import SandboxError
from ...leases import alone, remove_old
from ...text import printable
from . import policy

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
_TAG = "org.opencontainers.image.ref.name"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
# Not with half a character, which JSON can have and no program.
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=[^\0\ud800-\udfff]*\Z")
_MAX_JSON = 4 << 20
_MAX_LAYERS = 500  # four times as many as engines make; each takes options of bubblewrap's
_ABANDONED_SECONDS = 24 * 3600.0


class BadImage(SandboxError):
    """An image that isn't there, or can't be used."""

    code = "bad_image"


@dataclass(frozen=True)
class Layout:
    """An image in an OCI layout.

    Attributes:
        digest: of the manifest, "sha256:…".
        layers: files with tar archives, lowest first, with their digests.
        variables: the environment that the image sets.
    """

    digest: str
    layers: tuple[tuple[Path, str], ...]
    variables: dict[str, str]

    @property
    def unpacked(self) -> Path:
        return _cache() / self.digest.replace(":", "-")


def _cache() -> Path:
    return Path(user_cache_path("metaflow-sandbox")) / "images"


def parse(name: str) -> Path | Layout:
    """What `image=` names: a root file system's directory, or an image in an OCI layout.

    Raises:
        BadImage: neither, with what to do.
    """
    text = name.removeprefix("oci:")
    try:
        path, tag = Path(text).expanduser(), None
        if not path.exists() and ":" in path.name:
            base, _, tag = text.rpartition(":")
            path = Path(base).expanduser()
        path = path.resolve()
        if (path / "oci-layout").is_file():
            return _layout(path, tag)
        unpacked = tag is None and any((path / d).is_dir() for d in ("usr", "bin"))
        if unpacked and path != path.parent:
            os.listdir(path)
            return path
    except (OSError, ValueError, RuntimeError) as e:  # a loop of links, no such user, a NUL
        raise BadImage(f"image={name!r} can't be read: {e}", op="prepare") from e
    if unpacked:
        raise BadImage(
            f"image={name!r} is this machine with all that is on it. Leave image= out, and the "
            "sandbox has this machine's programs alone.",
            op="prepare",
        )
    here = text.startswith(("/", ".", "~"))
    registered = path.name if here else text.removeprefix("docker://")
    raise BadImage(
        f"image={name!r}: there is no unpacked root file system and no OCI layout in {path}. "
        "bubblewrap takes images from this disk alone. Bring one from a registry with\n"
        f"  skopeo copy docker://{registered} oci:image\n"
        'and write image="image", or choose @docker, which knows registries.',
        op="prepare",
    )


def _broken(layout: Path, what: str) -> BadImage:
    return BadImage(
        f"the image in {layout} is broken: {what}. Copy it anew, as in\n"
        f"  skopeo copy docker://NAME oci:{layout}",
        op="prepare",
    )


def _open(path: Path) -> BinaryIO:
    """Opens a regular file: a pipe would make us wait, and a device might never end."""
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f"{path} is no regular file")
    return file


def _blob(layout: Path, digest: Any) -> Path:
    if not isinstance(digest, str) or not _DIGEST.match(digest):
        raise _broken(layout, f"{str(digest)[:80]!r} is not a sha256 digest")
    return layout / "blobs" / "sha256" / digest.partition(":")[2]


def _document(layout: Path, path: Path, digest: str | None = None) -> dict[str, Any]:
    try:
        with _open(path) as file:
            data = file.read(_MAX_JSON + 1)
    except OSError as e:
        raise _broken(layout, f"{path} can't be read: {e.strerror or e}") from e
    if len(data) > _MAX_JSON:
        raise _broken(layout, f"{path} has more than {_MAX_JSON >> 20} MB")
    if digest and "sha256:" + hashlib.sha256(data).hexdigest() != digest:
        raise _broken(layout, f"{path} is not what its digest says")
    try:
        return _object(layout, json.loads(data))
    except (ValueError, RecursionError) as e:
        raise _broken(layout, f"{path} is not JSON: {e}") from e


def _object(layout: Path, value: Any) -> dict[str, Any]:
    """A JSON object, empty where there is none: an image's author decides on types, too."""
    if not isinstance(value, (dict, type(None))):
        raise _broken(layout, f"{str(value)[:80]!r} is not a JSON object")
    return value or {}


def _list(layout: Path, value: Any) -> list[Any]:
    if not isinstance(value, (list, type(None))):
        raise _broken(layout, f"{str(value)[:80]!r} is not a JSON list")
    return value or []


def _layout(path: Path, tag: str | None) -> Layout:
    manifest, digest = _document(path, path / "index.json"), ""
    for _ in range(4):  # an index may list other indexes
        if digest and "layers" in manifest:
            break
        entries = [_object(path, e) for e in _list(path, manifest.get("manifests"))]
        entry = _choose(path, entries, tag)
        blob, digest, tag = _blob(path, entry.get("digest")), str(entry["digest"]), None
        manifest = _document(path, blob, digest)
    layers = []
    for layer in (_object(path, x) for x in _list(path, manifest.get("layers"))):
        kind = str(layer.get("mediaType"))
        if not kind.endswith(("tar", "tar+gzip", "tar.gzip")):
            raise BadImage(
                f"{path} has a layer of type {kind[:100]!r}; copy the image with\n"
                f"  skopeo copy --dest-compress-format gzip oci:{path} oci:{path}-gzip",
                op="prepare",
            )
        layers.append((_blob(path, layer.get("digest")), str(layer["digest"])))
    if not 0 < len(layers) <= _MAX_LAYERS:
        raise _broken(path, f"it has {len(layers)} layers")
    described = _object(path, manifest.get("config")).get("digest")
    config = _document(path, _blob(path, described), described)
    if not _fits(config):
        raise _unfitting(path, [config], "")
    given = _list(path, _object(path, config.get("config")).get("Env"))
    variables = [v for v in given if isinstance(v, str) and _VARIABLE.match(v)]
    split = (v.partition("=") for v in variables)
    return Layout(digest, tuple(layers), {name: value for name, _, value in split})


def _machine() -> str:
    return _MACHINES.get(platform.machine(), platform.machine())


def _fits(described: dict[str, Any]) -> bool:
    """Whether this machine is what an image is for, as far as it says."""
    return (described.get("os") or "linux", described.get("architecture") or _machine()) == (
        "linux",
        _machine(),
    )


def _choose(path: Path, entries: list[dict[str, Any]], tag: str | None) -> dict[str, Any]:
    """The entry of an index for a tag and for this machine."""
    tags = [_object(path, e.get("annotations")).get(_TAG) for e in entries]
    if tag is not None:
        entries = [e for e, t in zip(entries, tags, strict=True) if t == tag]
    platforms = [_object(path, e.get("platform")) for e in entries]
    fitting = [e for e, described in zip(entries, platforms, strict=True) if _fits(described)]
    if len(fitting) == 1:
        return fitting[0]
    what = f" with the tag {tag!r}" if tag else ""
    if not fitting:
        raise _unfitting(path, platforms, what)
    raise BadImage(
        f"{path} has {len(fitting)} images{what} for linux/{_machine()}. Name a tag, as in "
        f"image='{path}:latest'; it has {_shown(tags)}.",
        op="prepare",
    )


def _unfitting(path: Path, platforms: list[dict[str, Any]], what: str) -> BadImage:
    there = [f"{p.get('os') or 'linux'}/{p.get('architecture')}" for p in platforms]
    return BadImage(
        f"{path} has no image{what} for linux/{_machine()}; it has {_shown(there)}. Copy it with\n"
        f"  skopeo copy --override-os linux --override-arch {_machine()} docker://NAME oci:{path}",
        op="prepare",
    )


def _shown(names: list[Any]) -> str:
    return ", ".join(repr(n)[:80] for n in names[:10] if n is not None) or "none"


def root(name: str) -> policy.ImageRoot:
    """The unpacked root of an image that `prepare` has got ready.

    Raises:
        BadImage
    """
    found = parse(name)
    if isinstance(found, Path):
        return policy.ImageRoot(found, {})
    if not (found.unpacked / "rootfs").is_dir():
        raise BadImage(f"image={name!r} was not unpacked yet", op="create")
    return policy.ImageRoot(found.unpacked / "rootfs", found.variables)


def identity(name: str) -> str:
    """What tells an image from others: its digest, or an unpacked one's place."""
    found = parse(name)
    return str(found) if isinstance(found, Path) else found.digest


#: Runs `unpack.py` in a sandbox: (layers, directory to fill).
Unpacker = Callable[[list[Path], Path], Awaitable[None]]


async def prepare(name: str, unpack: Unpacker) -> None:
    """Gets an image ready, if that isn't done: verifies its layers and unpacks them.

    Raises:
        BadImage: it can't be used, with what to do.
    """
    found = parse(name)
    if isinstance(found, Path) or found.unpacked.is_dir():
        return
    try:
        await _prepare(found, unpack)
    except BadImage as e:
        raise BadImage(f"image={name!r}: {e}", op="prepare") from e
    except OSError as e:
        raise BadImage(
            f"image={name!r} can't be unpacked to {_cache()}: {e}. XDG_CACHE_HOME moves it.",
            op="prepare",
        ) from e


async def _prepare(found: Layout, unpack: Unpacker) -> None:
    cache = _cache()
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    remove_old(cache, _ABANDONED_SECONDS, ".new-*")  # of processes that were killed
    with open(f"{found.unpacked}.lock", "w") as lock:
        await alone(lock.fileno())
        if found.unpacked.is_dir():
            return
        new = Path(tempfile.mkdtemp(prefix=".new-", dir=cache))
        try:
            for layer, digest in found.layers:
                await anyio.to_thread.run_sync(_verify, layer, digest)
            (new / "rootfs").mkdir()
            await unpack([layer for layer, _ in found.layers], new / "rootfs")
            new.chmod(0o755)
            new.rename(found.unpacked)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise


def _verify(path: Path, digest: str) -> None:
    layout, found = path.parents[2], hashlib.sha256()
    try:
        with _open(path) as file:
            while piece := file.read(1 << 20):
                found.update(piece)
    except OSError as e:
        raise _broken(layout, f"the layer {path} can't be read: {e.strerror or e}") from e
    if "sha256:" + found.hexdigest() != digest:
        raise _broken(layout, f"the layer {path} is not what its digest says")


UNPACK = Path(__file__).with_name("unpack.py")
LAYERS = "/layers"
TARGET = "/rootfs"


def mounts(layers: list[Path]) -> dict[str, Path]:
    """Where `unpack.py` finds the layers."""
    return {f"{LAYERS}/{i:04d}": layer for i, layer in enumerate(layers)}


def why(stderr: bytes) -> BadImage:
    """The error for what `unpack.py` said when it failed."""
    lines = stderr.decode(errors="replace").strip().split("\n")
    said = printable(lines[-1]) or "it said nothing"
    return BadImage(f"it could not be unpacked: {said[:500]}", op="prepare")
