"""Images on this disk: an unpacked root file system, or an OCI layout, which is unpacked once.

Layers come from strangers, so nothing of them is unpacked by a process that could
reach anything: `unpack.py` does it inside a sandbox that sees the layers and an empty
directory. What it leaves is complete, read-only for every sandbox, and named by its
content's digest.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
from platformdirs import user_cache_path

from ...errors import SandboxError
from . import policy

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=[^\0]*\Z")
_MAX_JSON = 4 << 20
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
    path, tag = Path(text).expanduser(), None
    if not path.exists() and ":" in path.name:
        base, _, tag = text.rpartition(":")
        path = Path(base).expanduser()
    path = path.resolve()
    if (path / "oci-layout").is_file():
        return _layout(path, tag)
    if tag is None and any((path / d).is_dir() for d in ("usr", "bin")):
        return path
    raise BadImage(
        f"image={name!r}: there is no unpacked root file system and no OCI layout in {path}. "
        "bubblewrap takes images from this disk alone. Bring one from a registry with\n"
        f"  skopeo copy docker://{Path(text).name} oci:image\n"
        'and write image="image", or choose @docker, which knows registries.',
        op="prepare",
    )


def _blob(layout: Path, digest: Any) -> Path:
    if not isinstance(digest, str) or not _DIGEST.match(digest):
        raise BadImage(f"{layout}: {str(digest)[:80]!r} is not a sha256 digest", op="prepare")
    return layout / "blobs" / "sha256" / digest.partition(":")[2]


def _document(path: Path, digest: str | None = None) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_JSON + 1)
        found = json.loads(data)
    except (OSError, ValueError, RecursionError) as e:
        raise BadImage(f"{path} of the image can't be read: {e}", op="prepare") from e
    if len(data) > _MAX_JSON or not isinstance(found, dict):
        raise BadImage(f"{path} of the image is not what an OCI layout has", op="prepare")
    if digest and "sha256:" + hashlib.sha256(data).hexdigest() != digest:
        raise BadImage(f"{path} of the image is not what its digest says", op="prepare")
    return found


def _layout(path: Path, tag: str | None) -> Layout:
    manifest = _document(path / "index.json")
    digest = ""
    for _ in range(4):  # an index may list other indexes
        if "layers" in manifest:
            break
        entries = [e for e in manifest.get("manifests", []) if isinstance(e, dict)]
        entry = _choose(path, entries, tag)
        digest, tag = str(entry.get("digest")), None
        manifest = _document(_blob(path, digest), digest)
    layers = []
    for layer in manifest.get("layers") or []:
        kind = str(layer.get("mediaType"))
        if not kind.endswith(("tar", "tar+gzip", "tar.gzip")):
            raise BadImage(
                f"{path} has a layer of type {kind[:100]!r}; copy the image with\n"
                f"  skopeo copy --dest-compress-format gzip oci:{path} oci:{path}-gzip",
                op="prepare",
            )
        layers.append((_blob(path, layer.get("digest")), str(layer["digest"])))
    if not layers:
        raise BadImage(f"{path} has no image with layers", op="prepare")
    config_digest = str((manifest.get("config") or {}).get("digest"))
    config = _document(_blob(path, config_digest), config_digest).get("config") or {}
    variables = [v for v in config.get("Env") or [] if isinstance(v, str) and _VARIABLE.match(v)]
    split = (v.partition("=") for v in variables)
    return Layout(digest, tuple(layers), {name: value for name, _, value in split})


def _choose(path: Path, entries: list[dict[str, Any]], tag: str | None) -> dict[str, Any]:
    """The entry of an index for a tag and for this machine."""
    if tag is not None:
        name = "org.opencontainers.image.ref.name"
        entries = [e for e in entries if (e.get("annotations") or {}).get(name) == tag]
    machine = _MACHINES.get(platform.machine(), platform.machine())
    fitting = [
        e
        for e in entries
        if (e.get("platform") or {}).get("os", "linux") == "linux"
        and (e.get("platform") or {}).get("architecture", machine) == machine
    ]
    if len(fitting) != 1:
        what = f"with the tag {tag!r} " if tag else ""
        raise BadImage(
            f"{path} has {len(fitting)} images {what}for linux/{machine}, and one is needed: "
            f"name a tag, as in image='{path}:latest'.",
            op="prepare",
        )
    return fitting[0]


def root(name: str) -> policy.ImageRoot:
    """The unpacked root of an image that `prepare` has got ready.

    Raises:
        BadImage
    """
    found = parse(name)
    if isinstance(found, Path):
        return policy.ImageRoot(found)
    if not (found.unpacked / "rootfs").is_dir():
        raise BadImage(f"image={name!r} was not unpacked yet", op="create")
    return policy.ImageRoot(found.unpacked / "rootfs")


def variables(name: str) -> dict[str, str]:
    """The environment that an image sets."""
    found = parse(name)
    return {} if isinstance(found, Path) else found.variables


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
    cache = _cache()
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    _sweep(cache)
    with open(f"{found.unpacked}.lock", "w") as lock:
        await anyio.to_thread.run_sync(fcntl.flock, lock, fcntl.LOCK_EX)
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
    found = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                found.update(piece)
    except OSError as e:
        raise BadImage(f"the layer {path} can't be read: {e.strerror}", op="prepare") from e
    if "sha256:" + found.hexdigest() != digest:
        raise BadImage(f"the layer {path} is not what its digest says", op="prepare")


def _sweep(cache: Path) -> None:
    """Removes what was left half unpacked by a process that was killed."""
    for left in cache.glob(".new-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


UNPACK = Path(__file__).with_name("unpack.py")
LAYERS = "/layers"
TARGET = "/rootfs"


def mounts(layers: list[Path]) -> dict[str, Path]:
    """Where `unpack.py` finds the layers."""
    return {f"{LAYERS}/{i:04d}": layer for i, layer in enumerate(layers)}


def why(stderr: bytes) -> BadImage:
    """The error for what `unpack.py` said when it failed."""
    lines = stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
    return BadImage(f"the image could not be unpacked: {lines[-1][:500]}", op="prepare")
