"""boxlite's runtime on a home of its own.

A home admits one runtime. So each sandbox has its own, with the directory of images in
common, which holds what each image is made into; what the homes make of it is their own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
from platformdirs import user_cache_path

from ...concurrency import blocking
from .processes import settled

_CLOSE_SECONDS = 30.0


def cache() -> Path:
    """What all sandboxes of this user share; another boxlite may store it in another way."""
    from importlib.metadata import version

    return Path(user_cache_path("metaflow-sandbox")) / f"boxlite-{version('boxlite')}"


class Runtime:
    """A runtime. `close` is what lets the interpreter end well.

    Args:
        home: a directory for it alone, made if it isn't there.
        registries: boxlite's `ImageRegistry`s, for `pull`.
    """

    def __init__(self, home: Path, registries: Sequence[Any] = ()) -> None:
        import boxlite

        home.mkdir(mode=0o700, exist_ok=True)
        images = cache() / "images"
        images.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (home / "images").is_symlink():
            os.symlink(images, home / "images")
        options = boxlite.Options(home_dir=str(home), image_registries=list(registries))
        self._boxlite: Any = boxlite.Boxlite(options)

    async def create(self, options: Any) -> Any:
        """A box, which doesn't run yet."""
        return await settled(self._boxlite.create(options))

    async def pull(self, reference: str) -> Any:
        """Brings an image, and gives boxlite's `ImagePullResult`."""
        return await settled(self._boxlite.images.pull(reference))

    async def close(self) -> None:
        """Ends what runs. Without it the interpreter may abort when it ends (boxlite 0.10.8)."""
        runtime, self._boxlite = self._boxlite, None
        if runtime is not None:
            with anyio.CancelScope(shield=True), anyio.move_on_after(_CLOSE_SECONDS):
                await settled(runtime.shutdown())
            # The last reference holds the home's lock; it takes threads with it.
            await blocking(lambda: None)
