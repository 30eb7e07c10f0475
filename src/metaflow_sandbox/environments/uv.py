"""`--environment=uv`: the packages of `uv.lock`, as wheels for the sandbox's own Python.

Metaflow would install them in the sandbox with uv, from the internet. Here uv only says
what its lock means for this project, and pip downloads that and holds it against the
lock's hashes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from metaflow.exception import MetaflowException

from . import DependencyError, Environment, pypi

_SECONDS = 300
_INDEX = re.compile(r"^(--(?:extra-)?index-url) (\S+)$", re.M)


@dataclass(frozen=True)
class UvEnvironment(Environment):
    """A virtual environment of the sandbox's Python.

    Attributes:
        python_version: three numbers.
        interpreter: the sandbox's Python, of which it is made.
        requirements: what `uv export` wrote: names, versions, conditions and hashes; and where
            indexes are, with their passwords.
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
    if "unexpected argument" in done.stderr:
        raise DependencyError(
            "--environment=uv needs a later uv here, 0.12 for instance: pip install -U uv",
            op="resolve",
        )
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
    return UvEnvironment(platform, version, interpreter, _with_passwords(done.stdout, project))


def _with_passwords(listed: str, project: Path) -> str:
    """The same with the passwords that uv would have for its indexes when it downloads.

    Those of UV_INDEX_NAME_USERNAME and UV_INDEX_NAME_PASSWORD, and of other addresses of the
    same index: of several, uv writes but one into the list.
    """
    known = {}
    indexes = [*_indexes(project), *(("", found[2]) for found in _INDEX.finditer(listed))]
    for _, url in indexes:
        who, address = _apart(url)
        if who:
            known[address.rstrip("/")] = who
    for name, url in indexes:
        variable = f"UV_INDEX_{re.sub('[^A-Z0-9]', '_', name.upper())}"
        user, password = (os.environ.get(f"{variable}_{x}") for x in ("USERNAME", "PASSWORD"))
        if name and (user is not None or password is not None):
            who = f"{quote(user or '', '')}:{quote(password or '', '')}"
            known[_apart(url)[1].rstrip("/")] = who

    def index(found: re.Match[str]) -> str:
        option, url = found.groups()
        _, address = _apart(url)
        if who := known.get(address.rstrip("/")):
            url = address.replace("//", f"//{who}@", 1)
        return f"{option} {url}"

    return _INDEX.sub(index, listed)


def _apart(url: str) -> tuple[str, str]:
    """Who asks an index (nobody: nothing), and its address without that."""
    parts = urlsplit(url)
    who, _, host = parts.netloc.rpartition("@")
    return who, urlunsplit(parts._replace(netloc=host))


def _indexes(project: Path) -> Iterator[tuple[str, str]]:
    """(name or nothing, address) of the indexes in uv's variables; those with a name in its files.

    Raises:
        DependencyError: files can't be read, without pip.
    """
    for variable in ("INDEX_URL", "EXTRA_INDEX_URL", "DEFAULT_INDEX", "INDEX"):
        for word in os.environ.get(f"UV_{variable}", "").split():
            name, equals, url = word.partition("=")
            yield (name, url) if equals and ":" not in name else ("", word)
    try:
        reader = import_module("tomllib" if sys.version_info >= (3, 11) else "pip._vendor.tomli")
    except ImportError:
        raise DependencyError(pypi.NO_PIP, op="resolve") from None
    of_user = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    settings = ["uv.toml", f"{of_user}/uv/uv.toml", "/etc/uv/uv.toml"]
    settings.append(os.environ.get("UV_CONFIG_FILE") or "uv.toml")
    for path in (project / Path(name).expanduser() for name in settings):
        if path.is_file():
            yield from _named(reader.loads(path.read_text()))
    about = reader.loads((project / "pyproject.toml").read_text())
    yield from _named(about.get("tool", {}).get("uv", {}))


def _named(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for index in settings.get("index", ()):
        if "name" in index and "url" in index:
            yield index["name"], index["url"]
