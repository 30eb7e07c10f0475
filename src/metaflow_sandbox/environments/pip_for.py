"""Runs this environment's pip for another Python or platform: `pip_for.py TOLD ARGUMENT…`.

pip chooses files for another Python by its options, but reads the conditions of
dependencies ("; python_version < '3.12'") with its own: TOLD, a JSON object, says in
`markers` what they hold there. And pip runs source to learn what it needs. Here it can't,
since it may start no program (but `keyring`, which knows passwords): with `sources` in TOLD
it takes what source says of itself (`sdist.py`), and writes down there what the builds of
what it looked at need, as {"name==version": [requirement]}.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import sys
from pathlib import Path
from typing import Any

_SDIST = Path(__file__).with_name("sdist.py")


def _forbid(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty"):
        raise PermissionError("a package is only there as source, which would run here")
    if event == "subprocess.Popen":
        executable = arguments[0] or (arguments[1] or [""])[0]
        if os.path.basename(os.fsdecode(executable)) != "keyring":
            raise PermissionError("a package is only there as source, which would run here")


def _replace(place: Any, name: str, new: Any) -> None:
    """A pip that has something else there is not one that we know."""
    if not callable(getattr(place, name, None)):
        raise SystemExit(f"pip has no {name}, so that it can't be kept from running source")
    setattr(place, name, new)


def _read_sources(sources: str) -> None:
    """Has pip read source, where it would unpack and run it."""
    from pip._internal.cli import cmdoptions
    from pip._internal.distributions.sdist import SourceDistribution
    from pip._internal.exceptions import InstallationError
    from pip._internal.operations import prepare
    from pip._vendor.packaging.requirements import Requirement

    sdist = runpy.run_path(str(_SDIST))
    seen: dict[str, list[str]] = {}

    def unpack(archive: str, location: str, *_: Any) -> None:
        os.makedirs(location, exist_ok=True)
        sdist["unpack"](archive, location)

    def describe(self: Any, *_: Any, **__: Any) -> None:
        try:
            name, version, metadata, needs = sdist["describe"](self.req.source_dir)
        except sdist["Unknown"] as e:
            raise InstallationError(f"{self.req} is source that must be run: {e}") from None
        stem = "-".join(re.sub(r"[^\w.]", "_", word) for word in (name, version))
        directory = Path(self.req.source_dir, f"{stem}.dist-info")
        directory.mkdir()
        (directory / "METADATA").write_text(metadata)
        self.req.metadata_directory = str(directory)
        if self.req.req is None:  # asked for by its address alone
            self.req.req = Requirement(f"{name}=={version}")
        seen[f"{name}=={version}"] = needs
        Path(sources).write_text(json.dumps(seen))

    _replace(prepare, "unpack_file", unpack)
    _replace(SourceDistribution, "prepare_distribution_metadata", describe)
    # Otherwise it refuses source for another Python, which it could not run.
    _replace(cmdoptions, "check_dist_restriction", lambda *_, **__: None)


def main(markers: dict[str, str], sources: str | None, words: list[str]) -> None:
    # Its types differ from one pip to the next.
    module: Any = importlib.import_module("pip._vendor.packaging.markers")
    original = module.default_environment
    module.default_environment = lambda: {**original(), **markers}
    # Looked up now, by programs that are this machine's own.
    import platform

    platform.libc_ver()
    sys.addaudithook(_forbid)
    if sources:
        _read_sources(sources)
    sys.argv = ["pip", *words]
    runpy.run_module("pip", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    main(told["markers"], told.get("sources"), sys.argv[2:])
