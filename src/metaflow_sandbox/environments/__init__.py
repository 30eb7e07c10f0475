"""Environments of steps: resolved and downloaded on the host, installed in a sandbox.

Metaflow would make them on the host before the run, and would run packages' code there:
its solvers are used as far as they only read, and nothing is installed by them. What is
resolved is a lock (addresses and hashes), which alone says whether an environment was
built before; packages are downloaded where it was not.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..backends.base import Backend, Recipe
from ..errors import SandboxError

INSTALL = Path(__file__).with_name("install.py")
#: Of the processors that `platform.machine()` names, the platforms that conda names.
PLATFORMS = {"x86_64": "linux-64", "aarch64": "linux-aarch64"}


class DependencyError(SandboxError):
    """The packages that a step asks for can't be had."""

    code = "dependencies"


@dataclass(frozen=True)
class Package:
    """One file to install, as a lock names it."""

    url: str
    sha256: str


class Environment(ABC):
    """A step's environment, resolved.

    Attributes:
        platform: as conda names it.
        title: what is in it, in words.
        lock: another for other packages; as JSON.
    """

    platform: str
    title: str
    lock: Any

    @abstractmethod
    def download(self, target: Path) -> Mapping[str, Path]:
        """Lays out what `install.py` needs. Blocking.

        Args:
            target: an empty directory, to be filled.

        Returns:
            {name of what else is needed beside it: directory on the host}.

        Raises:
            DependencyError: it can't be had, or isn't what the lock says.
        """

    @property
    def digest(self) -> str:
        """Another for other packages, another platform, or another way to install them."""
        install = hashlib.sha256(INSTALL.read_bytes()).hexdigest()
        text = json.dumps([type(self).__name__, self.platform, self.lock, install])
        return hashlib.sha256(text.encode()).hexdigest()[:40]

    def prefix(self, backend: Backend) -> str:
        """Where sandboxes have it: conda's own programs may have 255 bytes of it in them."""
        return f"{backend.environments}/{self.digest[:16]}"

    def python(self, backend: Backend) -> str:
        """The interpreter that runs the step."""
        return f"{self.prefix(backend)}/bin/python"

    def recipe(self, plain: Recipe, backend: Backend, workspace: Path) -> Recipe:
        """How it is built.

        Args:
            plain: what the step's sandboxes are made from without it.
            workspace: the run's directory, where its packages are put until it is.
        """
        build = f"{backend.work}/build"

        def files() -> dict[str, Path]:
            target = workspace / f"packages-{self.digest}"
            target.mkdir(mode=0o755)
            beside = self.download(target)
            (target / INSTALL.name).write_bytes(INSTALL.read_bytes())
            readable(target)
            return {build: target, **{f"{backend.work}/{n}": p for n, p in beside.items()}}

        install = (backend.interpreter(plain.image), "-I", "-S", f"{build}/{INSTALL.name}")
        return replace(
            plain,
            files=Fetched(files),
            install=(*install, self.prefix(backend), build),
            prefix=self.prefix(backend),
            contents=" ".join(filter(None, (self.digest, plain.once))),
            title=self.title,
        )


class Fetched(Mapping[str, Path]):
    """Files that are fetched when somebody first asks for them."""

    def __init__(self, fetch: Callable[[], dict[str, Path]]) -> None:
        self._fetch = fetch
        self._files: dict[str, Path] | None = None

    @property
    def _all(self) -> dict[str, Path]:
        if self._files is None:
            self._files = self._fetch()
        return self._files

    def __getitem__(self, key: str) -> Path:
        return self._all[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)


def readable(top: Path) -> None:
    """Lets the builder's user read what we downloaded, which is private to us by umask."""
    for path in (top, *top.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)


@dataclass(frozen=True)
class Inside:
    """The Python that a sandbox has of itself.

    Attributes:
        machine: its processor, as in `Backend.machine`.
        python: its path there.
        version: three numbers.
    """

    machine: str
    python: str
    version: str


def resolve(
    environment: Any, step: str, inside: Inside, say: Callable[[str], None]
) -> Environment | None:
    """What a step's decorators and `--environment` ask for; None if that is nothing. Blocking.

    Args:
        environment: Metaflow's.
        say: tells the user.

    Raises:
        DependencyError: it can't be resolved, with the solver's reasons.
    """
    platform = PLATFORMS.get(inside.machine)
    if platform is None:
        raise DependencyError(
            f"there are no conda packages or wheels for {inside.machine}.", op="resolve"
        )
    if environment.TYPE in ("conda", "pypi"):
        from .conda import resolve_conda

        return resolve_conda(environment, step, platform, say)
    if environment.TYPE == "uv":
        from .uv import resolve_uv

        return resolve_uv(environment, platform, inside.version, inside.python)
    return None


def take_over(environment: Any, step: str) -> None:
    """Keeps Metaflow from making a step's environment on this machine.

    Metaflow makes the environments of all steps when it begins to package the code,
    whatever their decorators are, and later runs tasks with their interpreters.

    Raises:
        DependencyError: it isn't Metaflow's own.
    """
    if environment.TYPE not in ("conda", "pypi"):
        return
    from metaflow.plugins.pypi.conda_environment import CondaEnvironment

    if not isinstance(environment, CondaEnvironment):
        raise DependencyError(
            f"--environment={environment.TYPE} is another package's here "
            f"({type(environment).__module__}), whose environments can't be built in a sandbox. "
            "Give the step what it needs by image=…, and run without --environment.",
            op="resolve",
        )
    taken: set[str] | None = getattr(environment, "_sandboxed_steps", None)
    if taken is None:
        taken = environment._sandboxed_steps = set()
        original = environment.init_environment

        def init_environment(echo: Any, only_steps: Any = None) -> None:
            for node in environment.flow:
                for deco in node.decorators if node.name in taken else ():
                    if deco.name == "conda":
                        # It would look for the environment here, and run our client with it.
                        deco.disabled = True
            wanted = [s.name for s in environment.flow if s.name not in taken]
            wanted = [name for name in wanted if not only_steps or name in only_steps]
            if wanted:  # to Metaflow, none means all
                original(echo, only_steps=wanted)

        environment.init_environment = init_environment
    taken.add(step)
