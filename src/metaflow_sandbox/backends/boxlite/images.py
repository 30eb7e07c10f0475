"""Images: names and where they come from, and the OCI layouts that microVMs are made from.

A home of boxlite's asks the registry again for every tag, and forgets it with the home. So
an image is brought once, and kept as an OCI layout of its own, named by its digest: later
sandboxes need neither the registry nor its credentials, and all of a run get the same.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio

from ...concurrency import blocking
from ...leases import Lease, remove_old
from ..base import Say, unsaid
from .faults import BadImage, explained
from .runtime import Runtime, cache

KIND = "pull"  # of the leases in which images are brought
_OCI = {
    "application/vnd.docker.distribution.manifest.v2+json": (
        "application/vnd.oci.image.manifest.v1+json"
    ),
    "application/vnd.docker.container.image.v1+json": "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.image.rootfs.diff.tar.gzip": (
        "application/vnd.oci.image.layer.v1.tar+gzip"
    ),
}
_HUB = "docker.io"
_HUB_KEY = "https://index.docker.io/v1/"
_LOCK_SECONDS = 0.2
_ABANDONED_SECONDS = 24 * 3600.0
_HELPER_SECONDS = 30.0
_NAME = re.compile(r"[a-z0-9]+([._:/@-]+[A-Za-z0-9_]+)*\Z")


@dataclass(frozen=True)
class Reference:
    """An image in a registry, by its full name.

    Attributes:
        registry: host, with a port if it has one.
        name: with the registry, and a tag or a digest.
    """

    registry: str
    name: str


def parse(image: str) -> Path | Reference:
    """What `image=` names: an OCI layout on this disk, or an image in a registry.

    Raises:
        BadImage: neither, with what to do.
    """
    text = image.removeprefix("oci:")
    path = Path(text).expanduser()
    if text != image or text.startswith(("/", ".", "~")) or (path / "oci-layout").is_file():
        return _layout(image, path)
    name = image.removeprefix("docker://")
    if not _NAME.match(name):
        raise BadImage(
            f"image={image!r} is neither an OCI layout on this disk nor a name such as "
            "python:3.12-slim or registry.example.com/team/image:tag.",
            op="prepare",
        )
    first, slash, rest = name.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        registry = first
    else:
        registry, rest = _HUB, name if slash else f"library/{name}"
    if ":" not in rest.rpartition("/")[2] and "@" not in rest:
        rest += ":latest"
    return Reference(registry, f"{registry}/{rest}")


def _layout(image: str, path: Path) -> Path:
    try:
        found = json.loads((path / "index.json").read_text())["manifests"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise BadImage(
            f"image={image!r}: there is no OCI layout in {path}. Make one with\n"
            f"  skopeo copy docker://NAME oci:{path}\n"
            "or name an image in a registry, such as python:3.12-slim.",
            op="prepare",
        ) from e
    if len(found) != 1:
        raise BadImage(
            f"image={image!r}: the layout has {len(found)} images, and boxlite takes one. Copy the "
            f"one that you mean: skopeo copy oci:{path}:TAG oci:{path}-TAG",
            op="prepare",
        )
    return path.resolve()


# --- credentials


def registry(reference: Reference) -> list[Any]:
    """boxlite's settings for the registry of an image: how to talk to it, and as whom.

    Raises:
        BadImage: the user's docker configuration names a helper that fails.
    """
    import boxlite

    # As docker does it: only what doesn't leave this machine goes without TLS.
    here = reference.registry.rpartition(":")[0] or reference.registry
    plain = here in ("localhost", "127.0.0.1")
    name, password = credentials(reference.registry) or (None, None)
    return [
        boxlite.ImageRegistry(
            reference.registry,
            transport="http" if plain else "https",
            username=name,
            password=password,
        )
    ]


def credentials(host: str) -> tuple[str, str] | None:
    """(name, password) that `docker login` has left for a registry, or None.

    From `config.json` in DOCKER_CONFIG or `~/.docker`, or from the helper that it names,
    which gets the host by its input. Nothing is put on a command line.

    Raises:
        BadImage: the helper fails.
    """
    place = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker") / "config.json"
    try:
        config = json.loads(place.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise BadImage(f"{place} can't be read: {e}", op="prepare") from e
    keys = [_HUB_KEY, "index.docker.io", _HUB] if host == _HUB else [host, f"https://{host}"]
    helpers = config.get("credHelpers") or {}
    for key in keys:
        if helper := helpers.get(key):
            return _ask(helper, key)
    for key in keys:
        entry = (config.get("auths") or {}).get(key)
        if entry and entry.get("auth"):
            with contextlib.suppress(ValueError):
                text = base64.b64decode(entry["auth"]).decode()
                name, _, password = text.partition(":")
                return name, password
    if helper := config.get("credsStore"):
        return _ask(helper, keys[0])
    return None


def _ask(helper: str, key: str) -> tuple[str, str] | None:
    program = f"docker-credential-{helper}"
    try:
        done = subprocess.run(
            [program, "get"], input=key.encode(), capture_output=True, timeout=_HELPER_SECONDS,
            check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as e:
        raise BadImage(
            f"the docker configuration names {program} for {key}, and it can't be run: {e}",
            op="prepare",
        ) from e
    if done.returncode != 0:  # it knows no such registry
        return None
    try:
        found = json.loads(done.stdout)
        name, password = str(found["Username"]), str(found["Secret"])
    except (ValueError, KeyError, TypeError):
        raise BadImage(f"{program} answers what is no credential for {key}", op="prepare") from None
    if name == "<token>":
        raise BadImage(
            f"{program} has an identity token for {key}, which boxlite can't use: log in with a "
            "name and an access token (docker login -u NAME).",
            op="prepare",
        )
    return name, password


# --- the store


@contextlib.asynccontextmanager
async def alone(name: str) -> AsyncIterator[Path]:
    """Holds others off from what has this name in the cache; gives its path there."""
    target = cache() / name
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(f"{target}.lock", "w") as lock:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            await anyio.sleep(_LOCK_SECONDS)  # a thread that waits can't be cancelled
        yield target


async def bring(image: str, say: Say = unsaid) -> Path:
    """The OCI layout of an image, brought from its registry if it isn't here yet.

    Raises:
        BadImage: it can't be had, with what to do.
        SandboxError: there is no space for it.
    """
    found = parse(image)
    if isinstance(found, Path):
        return found
    key = hashlib.sha256(found.name.encode()).hexdigest()[:40]
    async with alone(f"references/{key}") as reference:
        with contextlib.suppress(OSError):
            layout = cache() / "layouts" / reference.read_text()
            if layout.is_dir():
                return layout
        await say(f"bringing the image {found.name}")
        layout = await _pull(image, found)
        reference.write_text(layout.name)
        return layout


async def _pull(image: str, reference: Reference) -> Path:
    settings = await blocking(lambda: registry(reference))
    lease = Lease(KIND)
    home = lease.path / "home"
    try:
        with explained("prepare", home, image):
            runtime = Runtime(home, settings)
            try:
                result = await runtime.pull(reference.name)
            finally:
                await runtime.close()
        return await blocking(lambda: _assemble(cache() / "images", result.config_digest))
    finally:
        await blocking(lease.release)


def _assemble(images: Path, config: str) -> Path:
    """Makes a layout of what boxlite has stored of an image.

    Args:
        images: boxlite's directory.
        config: the digest of the image's configuration, by which its manifest is known.
    """
    for path in (images / "manifests").glob("*.json"):
        with contextlib.suppress(ValueError):
            manifest = json.loads(path.read_bytes())
            if (manifest.get("config") or {}).get("digest") == config:
                return _kept(images, manifest)
    raise BadImage(
        f"boxlite has brought the image {config} and not kept its manifest in {images}. Is this "
        "another boxlite than 0.10? Install the one that this package is tested with: "
        'pip install "metaflow-sandbox[boxlite]"',
        op="prepare",
    )


def _kept(images: Path, manifest: dict[str, Any]) -> Path:
    for part in (manifest, manifest["config"], *manifest["layers"]):
        kind = str(part.get("mediaType", ""))
        part["mediaType"] = _OCI.get(kind, kind)
    manifest["mediaType"] = "application/vnd.oci.image.manifest.v1+json"
    data = json.dumps(manifest, sort_keys=True).encode()
    digest = hashlib.sha256(data).hexdigest()
    target = cache() / "layouts" / digest
    if target.is_dir():
        return target
    with new_layout(target) as layout:
        blobs = layout / "blobs" / "sha256"
        (blobs / digest).write_bytes(data)
        for part in (manifest["config"], *manifest["layers"]):
            hexadecimal = part["digest"].partition(":")[2]
            stored = next(images.glob(f"*/sha256-{hexadecimal}.*"))
            os.link(stored, blobs / hexadecimal)
        write_index(layout, digest, len(data))
    return target


@contextlib.contextmanager
def new_layout(target: Path) -> Any:
    """A directory that becomes `target` when it is complete."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    remove_old(target.parent, _ABANDONED_SECONDS, ".new-*")
    new = Path(tempfile.mkdtemp(prefix=".new-", dir=target.parent))
    try:
        (new / "blobs" / "sha256").mkdir(parents=True)
        yield new
        with contextlib.suppress(FileExistsError, OSError):
            new.rename(target)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_index(layout: Path, digest: str, size: int) -> None:
    """Writes what makes a directory with blobs a layout with one image."""
    entry = {
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": f"sha256:{digest}",
        "size": size,
    }
    index = {"schemaVersion": 2, "manifests": [entry]}
    (layout / "index.json").write_text(json.dumps(index))
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
