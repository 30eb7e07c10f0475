"""Runs this environment's pip for another Python or platform: `pip_for.py MARKERS ARGUMENT…`.

pip chooses files for another Python by its options, but reads the conditions of
dependencies ("; python_version < '3.12'") with its own. MARKERS says what they hold
there. And pip builds what it is given as source, by running it: here it can't, since it
may start no program (but `keyring`, which knows passwords).
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from typing import Any


def _forbid(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty"):
        raise PermissionError("a package is only there as source, which would run here")
    if event == "subprocess.Popen":
        executable = arguments[0] or (arguments[1] or [""])[0]
        if os.path.basename(os.fsdecode(executable)) != "keyring":
            raise PermissionError("a package is only there as source, which would run here")


def main(markers: dict[str, str], words: list[str]) -> None:
    import pip._vendor.packaging.markers as module

    original = module.default_environment
    module.default_environment = lambda: {**original(), **markers}
    # Looked up now, by programs that are this machine's own.
    import platform

    platform.libc_ver()
    sys.argv = ["pip", *words]
    sys.addaudithook(_forbid)
    runpy.run_module("pip", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2:])
