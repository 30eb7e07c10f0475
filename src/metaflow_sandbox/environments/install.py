"""Installs an environment: `install.py PREFIX BUILD`, inside the sandbox that builds it.

BUILD has what the host downloaded:

    conda/SUBDIR/*     conda packages, which `micromamba` installs, and its programs
    wheels/*           Python packages, which pip installs: the environment's own, or, for
                       one that is made of the sandbox's Python, that beside BUILD. What is
                       source, pip builds first
    build/*            wheels that source is built with
    interpreter        the path of the sandbox's Python, if it is made of that

Standard library only, Python 3.8 and later. It runs the code of packages' authors.
"""

from __future__ import annotations

import glob
import multiprocessing
import os
import re
import shutil
import subprocess
import sys


def run(argv: list[str], environment: dict[str, str]) -> None:
    """Runs a program, and ends this one if it fails."""
    code = subprocess.call(argv, env=environment, stdin=subprocess.DEVNULL)
    if code != 0:
        print(f"{os.path.basename(argv[0])} failed", file=sys.stderr)
        raise SystemExit(code if code > 0 else 1)


def conda(prefix: str, build: str, environment: dict[str, str]) -> None:
    packages = sorted(glob.glob(f"{build}/conda/*/*"))
    listed = os.path.join(environment["TMPDIR"], "explicit")
    with open(listed, "w") as file:
        file.write("\n".join(["@EXPLICIT", *packages]) + "\n")
    # As Metaflow's own bootstrap has it, but with links in the place of copies.
    options = [
        "--yes", "--offline", "--no-deps", "--safety-checks=disabled",
        "--no-extra-safety-checks", "--no-rc", "--no-pyc",
    ]  # fmt: skip
    program = f"{os.path.dirname(build)}/micromamba/bin/micromamba"
    run([program, "create", *options, "--prefix", prefix, "--file", listed], environment)


def pip(prefix: str, wheels: list[str], environment: dict[str, str]) -> None:
    options = [
        "--no-index", "--no-deps", "--no-cache-dir", "--no-compile", "--no-input", "--quiet",
        "--disable-pip-version-check", "--no-warn-script-location",
    ]  # fmt: skip
    run([f"{prefix}/bin/python", "-m", "pip", "install", *options, *wheels], environment)


def from_source(prefix: str, sources: list[str], build: str, environment: dict[str, str]) -> str:
    """Builds wheels. Returns the directory with them."""
    wheels = os.path.join(environment["TMPDIR"], "wheels")
    options = [
        "--no-index", f"--find-links={build}/build", "--no-deps", "--no-cache-dir", "--no-input",
        "--quiet", "--disable-pip-version-check", f"--wheel-dir={wheels}",
    ]  # fmt: skip
    run([f"{prefix}/bin/python", "-m", "pip", "wheel", *options, *sources], environment)
    return wheels


def check(prefix: str, built: list[str], environment: dict[str, str]) -> None:
    """Ends this program if what was built needs more than its source had said."""
    names = {plain(os.path.basename(wheel).split("-")[0]) for wheel in built}
    command = [f"{prefix}/bin/python", "-m", "pip", "check", "--disable-pip-version-check"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if wrong := [line for line in done.stdout.splitlines() if plain(line.split(" ")[0]) in names]:
        text = "\n".join(wrong)
        print(f"{text}\nIts source doesn't say so: add it to the packages.", file=sys.stderr)
        raise SystemExit(1)


def at_once() -> str:
    """How many processes compile; 0: as many as there are CPUs. Some builders have no /dev/shm."""
    try:
        multiprocessing.Lock()
    except (ImportError, OSError):
        return "1"
    return "0"


def plain(name: str) -> str:
    """A package's name as an index writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main(prefix: str, build: str) -> None:
    # Below the prefix, which is on a disk, and so that packages need not be copied.
    place = f"{prefix}/.build"
    os.makedirs(place)
    environment = {
        **os.environ,
        "HOME": place,
        "TMPDIR": place,
        "MAMBA_ROOT_PREFIX": f"{place}/mamba",
        "CONDA_PKGS_DIRS": f"{place}/pkgs",
        "MAMBA_NO_BANNER": "1",
        "MAMBA_NO_PROGRESS_BARS": "1",
        "PYTHONNOUSERSITE": "1",
    }
    packages = sorted(glob.glob(f"{build}/wheels/*"))
    wheels = [path for path in packages if path.endswith(".whl")]
    sources = [path for path in packages if not path.endswith(".whl")]
    if os.path.exists(f"{build}/interpreter"):
        with open(f"{build}/interpreter") as file:
            run([file.read(), "-I", "-m", "venv", "--without-pip", prefix], environment)
        if wheels:
            beside = {"PYTHONPATH": f"{os.path.dirname(build)}/installer"}
            pip(prefix, wheels, {**environment, **beside})
    else:
        conda(prefix, build, environment)
        built: list[str] = []
        if sources:
            built = glob.glob(from_source(prefix, sources, build, environment) + "/*")
        if wheels or built:
            pip(prefix, [*wheels, *built], environment)
        if built:
            check(prefix, built, environment)
    # Nobody can write here later, so this is the time to compile. What doesn't compile
    # (templates, other Pythons' files) is not our concern.
    compiler = [f"{prefix}/bin/python", "-m", "compileall", "-q", "-j", at_once()]
    for library in glob.glob(f"{prefix}/lib/python3*"):
        subprocess.call([*compiler, library], env=environment, stdout=subprocess.DEVNULL)
    shutil.rmtree(place, ignore_errors=True)


main(*sys.argv[1:])
