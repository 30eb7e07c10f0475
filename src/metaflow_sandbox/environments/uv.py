"""`--environment=uv`: the packages of `uv.lock`, as wheels for the sandbox's own Python.

Metaflow would install them in the sandbox with uv, from the internet. Here uv only says
what its lock means for this project, and pip downloads that and holds it against the
lock's hashes.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from metaflow.exception import MetaflowException

from . import DependencyError, Environment, pypi

_SECONDS = 300


@dataclass(frozen=True)
class UvEnvironment(Environment):
    """A virtual environment of the sandbox's Python.

    Attributes:
        python_version: three numbers.
        interpreter: the sandbox's Python, of which it is made.
        requirements: what `uv export` wrote: names, versions, conditions and hashes.
    """

    platform: str
    python_version: str
    interpreter: str
    requirements: str

    @property
    def title(self) -> str:  # type: ignore[override]
        count = sum(line[:1].isalnum() for line in self.requirements.splitlines())
        return f"up to {count} packages of uv.lock for Python {self.python_version}"

    @property
    def lock(self) -> Any:
        # Without where indexes are: their addresses have tokens, which are others every day.
        lines = [x for x in self.requirements.splitlines() if not x.startswith("--")]
        return [self.python_version, self.interpreter, lines]

    def download(self, target: Path) -> Mapping[str, Path]:
        pypi.download_listed(
            self.requirements, self.python_version, self.platform, target / "wheels"
        )
        (target / "interpreter").write_text(self.interpreter)
        spec = find_spec("pip")
        if spec is None or spec.origin is None:
            raise DependencyError(pypi.NO_PIP, op="download")
        return {"installer/pip": Path(spec.origin).parent}


def resolve_uv(environment: Any, platform: str, version: str, interpreter: str) -> UvEnvironment:
    """See `resolve`."""
    try:
        project = Path(environment.add_to_package()[0][0]).parent
    except MetaflowException as e:
        raise DependencyError(str(e), op="resolve") from e
    uv = shutil.which("uv")
    if uv is None:
        raise DependencyError(
            "--environment=uv needs uv here, which reads uv.lock: pip install uv", op="resolve"
        )
    command = [
        uv, "export", "--project", str(project), "--frozen", "--no-dev", "--no-emit-local",
        "--no-emit-package=metaflow", "--no-emit-package=metaflow-sandbox", "--no-header",
        "--no-annotate", "--emit-index-url", "--emit-find-links", "--format=requirements.txt",
    ]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_SECONDS)
    if done.returncode != 0:
        raise DependencyError(f"uv can't read {project / 'uv.lock'}:\n{done.stderr}", op="resolve")
    for line in done.stdout.splitlines():
        if " @ " in line:
            url = line.partition(" @ ")[2].split(" ;")[0].split(" \\")[0].strip()
            if pypi.is_source(url):
                raise DependencyError(
                    f"{url} is source, which is not built for --environment=uv, since uv.lock "
                    "doesn't say with what. Make a wheel of it (uv build), and name that.",
                    op="resolve",
                )
    return UvEnvironment(platform, version, interpreter, done.stdout)
