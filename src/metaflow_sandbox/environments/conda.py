"""`@conda` and `@pypi`, resolved by Metaflow's own solvers as far as these only read.

For `@pypi`, Metaflow makes a conda environment on the host and runs the pip in it. Here
the host's own pip resolves for the other Python (`pip_for.py`), and builds nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from metaflow import metaflow_config
from metaflow.exception import MetaflowException
from metaflow.plugins.pypi.micromamba import Micromamba

from . import DependencyError, Environment, Package, pypi

_PYTHON = re.compile(r"/python-(\d+\.\d+\.\d+)[^/]*\Z")


class Solver(Micromamba):  # type: ignore[misc]
    """Metaflow's micromamba, that makes no environment, and remembers what files should hash to."""

    def __init__(self) -> None:
        super().__init__()
        self.hashes: dict[str, str] = {}

    def _call(self, args: list[str], env: dict[str, str] | None = None) -> Any:
        result = super()._call(args, env)
        if isinstance(result, dict):
            for item in (result.get("actions") or {}).get("LINK") or ():
                self.hashes[item["url"]] = item.get("sha256") or ""
        return result

    def path_to_environment(self, id_: str, platform: str | None = None) -> None:
        """There is none, so packages are downloaded whatever Metaflow made before."""

    def create(self, *arguments: Any) -> None:
        raise RuntimeError("an environment of a sandboxed step is never made on the host")


@dataclass(frozen=True)
class CondaEnvironment(Environment):
    """Conda packages, Python among them, and Python packages on top.

    Attributes:
        wheels: or source.
        build: the wheels that source is built with.
    """

    platform: str
    python_version: str
    conda: tuple[Package, ...]
    wheels: tuple[Package, ...]
    build: tuple[Package, ...]
    solver: Solver

    @property
    def title(self) -> str:  # type: ignore[override]
        count = len(self.conda) + len(self.wheels) - 1
        return f"Python {self.python_version} and {count} packages"

    @property
    def lock(self) -> Any:
        return [[[p.url, p.sha256] for p in kind] for kind in (self.conda, self.wheels, self.build)]

    def download(self, target: Path) -> Mapping[str, Path]:
        for package, path in fetch_conda(self.solver, self.conda, self.platform).items():
            verify(path, package)
            subdir = urlsplit(package.url).path.split("/")[-2]
            (target / "conda" / subdir).mkdir(parents=True, exist_ok=True)
            place(path, target / "conda" / subdir / path.name)
        for kind, packages in (("wheels", self.wheels), ("build", self.build)):
            if packages:
                pypi.download(packages, self.python_version, self.platform, target / kind)
                for package in packages:
                    verify(downloaded(target / kind, package), package)
        return {"micromamba": installer(self.solver, self.platform, target)}


def resolve_conda(
    environment: Any, step: str, platform: str, say: Callable[[str], None]
) -> CondaEnvironment | None:
    """See `resolve`."""
    node = next(s for s in environment.flow if s.name == step)
    try:
        described = environment.get_environment(node)
        if not described:
            return None  # disabled=True
        solver = Solver()
        key = [described["id_"], platform]

        def locked(kind: str, solve: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
            # Metaflow's lock, beside the datastore: what was resolved once stays as it is.
            known: list[dict[str, Any]] | None = environment.read_from_environment_manifest(
                [*key, kind]
            )
            # Metaflow's own doesn't say what the build of source needs.
            unknown = any(pypi.is_source(i["url"]) and "build" not in i for i in known or ())
            if not known or (kind == "pypi" and unknown) or environment._force_rebuild:
                say(f"its {kind} packages are looked for.")
                known = solve()
                environment.write_to_environment_manifest([*key, kind], known)
            return known

        asked = described["conda"]
        if str(asked["python"]).strip().endswith("t"):
            raise DependencyError(
                f"python={asked['python']!r}: there are no packages here for a Python without its "
                "lock. Leave out the t.",
                op="resolve",
            )

        def solve_conda() -> list[dict[str, Any]]:
            found = solver.solve(key[0], asked["packages"], asked["python"], platform)
            return [{**item, "sha256": solver.hashes.get(item["url"], "")} for item in found]

        conda = locked("conda", solve_conda)
        fetch = partial(hash_conda, solver, platform=platform)
        conda = _hashed(environment, [*key, "conda"], conda, fetch)
        version = _python_version(conda)
        wheels: list[dict[str, Any]] = []
        build: list[dict[str, Any]] = []
        if "pypi" in described:
            packages = described["pypi"]["packages"]
            wheels = locked("pypi", lambda: pypi.solve(packages, version, platform))
            fetch = partial(hash_wheels, python=version, platform=platform)
            wheels = _hashed(environment, [*key, "pypi"], wheels, fetch)
            if any(pypi.is_source(item["url"]) for item in wheels):
                build = locked("build", lambda: pypi.solve_build(wheels, version, platform))
                build = _hashed(environment, [*key, "build"], build, fetch)
    except MetaflowException as e:
        raise DependencyError(str(e), op="resolve") from e
    kinds = _packages(conda), _packages(wheels), _packages(build)
    return CondaEnvironment(platform, version, *kinds, solver)


def _packages(items: list[dict[str, Any]]) -> tuple[Package, ...]:
    return tuple(Package(item["url"], item["sha256"]) for item in items)


def _python_version(conda: list[dict[str, Any]]) -> str:
    for item in conda:
        if found := _PYTHON.search(urlsplit(item["url"]).path):
            return found[1]
    raise DependencyError("the conda packages have no Python among them.", op="resolve")


def _hashed(
    environment: Any,
    key: list[str],
    items: list[dict[str, Any]],
    fetch: Callable[[tuple[Package, ...]], dict[str, str]],
) -> list[dict[str, Any]]:
    """A lock with hashes. Metaflow's own has none: then what comes first is what it is."""
    missing = tuple(Package(item["url"], "") for item in items if not item.get("sha256"))
    if not missing:
        return items
    found = fetch(missing)
    whole = [{**item, "sha256": item.get("sha256") or found[item["url"]]} for item in items]
    environment.write_to_environment_manifest(key, whole)
    return whole


def hash_conda(solver: Solver, packages: tuple[Package, ...], platform: str) -> dict[str, str]:
    """{url: sha256} of what micromamba downloads."""
    return {p.url: digest(f) for p, f in fetch_conda(solver, packages, platform).items()}


def hash_wheels(packages: tuple[Package, ...], python: str, platform: str) -> dict[str, str]:
    """{url: sha256} of what pip downloads."""
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory, "wheels")
        pypi.download(packages, python, platform, target)
        return {p.url: digest(downloaded(target, p)) for p in packages}


def fetch_conda(
    solver: Solver, packages: tuple[Package, ...], platform: str
) -> dict[Package, Path]:
    """Where micromamba has the packages, downloaded if it hasn't."""
    items = [{"url": package.url} for package in packages]

    def there() -> dict[str, str | None]:
        known: dict[str, str | None] = solver.metadata("", items, "", platform)
        return known

    try:
        paths = there()
        if missing := [item for item in items if not paths.get(item["url"])]:
            _download(solver, missing, platform)
            paths = there()
    except MetaflowException as e:
        raise DependencyError(str(e), op="download") from e
    found = {}
    for package in packages:
        path = paths.get(package.url)
        if path is None:
            raise DependencyError(f"{package.url} could not be downloaded.", op="download")
        found[package] = Path(path)
    return found


def _download(solver: Solver, items: list[dict[str, str]], platform: str) -> None:
    """Has Metaflow fetch packages. Those for another platform it fetches once for each id."""
    id_ = f"sandbox-{uuid.uuid4().hex}"
    try:
        solver.download(id_, items, "", platform)
    finally:
        mark = Path(solver.info()["envs_dirs"][0], "metaflow", platform, id_)
        shutil.rmtree(mark, ignore_errors=True)


def installer(solver: Solver, platform: str, target: Path) -> Path:
    """A directory with `bin/micromamba` for the sandbox."""
    given = metaflow_config.SANDBOX_MICROMAMBA
    if given and Path(given).is_dir():
        return Path(given)
    program = Path(given) if given else Path(solver.bin)
    if not given and (platform != solver.platform() or not _is_program(program)):
        raise DependencyError(
            f"conda packages are installed inside the sandbox, where {program} is of no use: it is "
            f"no program for {platform}. Download micromamba for {platform} and name it: "
            "METAFLOW_SANDBOX_MICROMAMBA=/path/to/micromamba",
            op="download",
        )
    directory = target.parent / f"{target.name}-micromamba"
    (directory / "bin").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(program, directory / "bin/micromamba")
    (directory / "bin/micromamba").chmod(0o755)
    return directory


def _is_program(path: Path) -> bool:
    """Whether it needs nothing else of this machine: a script would."""
    with open(path, "rb") as file:
        return file.read(4) == b"\x7fELF"


def file_name(url: str) -> str:
    """What a package's file is called."""
    return unquote(urlsplit(url).path.rsplit("/", 1)[-1])


def downloaded(directory: Path, package: Package) -> Path:
    """Where pip put a package. Servers may call an archive otherwise than its address does."""
    path = directory / file_name(package.url)
    if path.exists() or not package.sha256:
        return path
    return next((p for p in directory.iterdir() if digest(p) == package.sha256), path)


def digest(path: Path) -> str:
    """A file's sha256."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


def verify(path: Path, package: Package) -> None:
    """Holds a file against the lock.

    Raises:
        DependencyError
    """
    if (found := digest(path)) != package.sha256:
        raise DependencyError(
            f"{package.url} is not what the lock says: its sha256 is {found}, not "
            f"{package.sha256}. If it was damaged, remove {path}; if it was replaced at its "
            "source, find out why, then run with --force-rebuild-environments.",
            op="download",
        )


def place(source: Path, target: Path) -> None:
    """Puts a file there, without a copy if that can be."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
