"""What source says of itself, read without running any of it.

pip runs a source distribution to learn what it needs. Here only its files are read, and
whether they told the truth shows when it was built, inside (`install.py`). Run by
`pip_for.py` in pip's process: pip and the standard library alone.
"""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from email.message import Message
from email.parser import HeaderParser
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from pip._vendor.packaging.requirements import Requirement

_FILES = {"PKG-INFO": "PKG-INFO", "pyproject.toml": "pyproject.toml"}
_NEEDS = re.compile(r"(?:[^/]+/)?[^/]+\.egg-info/requires\.txt")
_BYTES = 4 << 20
#: What PEP 518 has for projects that say nothing; setuptools before 70.1 needs the other, too.
_SETUPTOOLS = ["setuptools>=40.8.0", "wheel"]


class Unknown(Exception):
    """It can't be known without running it."""


def unpack(archive: str, target: str) -> None:
    """Writes the few files that are read here into a directory, and none of the others.

    Names are ours, and links are not followed, so that no archive can write elsewhere.
    """
    for name, file in _members(archive):
        inside = name.partition("/")[2]
        known = _FILES.get(inside) or ("requires.txt" if _NEEDS.fullmatch(inside) else None)
        if known:
            content = file.read(_BYTES + 1)
            if len(content) > _BYTES:
                raise Unknown(f"{name} is larger than {_BYTES >> 20} MB")
            Path(target, known).write_bytes(content)


def _members(archive: str) -> Iterator[tuple[str, IO[bytes]]]:
    """(name, content) of regular files."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            for name in zipped.namelist():
                if not name.endswith("/"):
                    with zipped.open(name) as file:
                        yield name, file
        return
    with tarfile.open(archive) as tarred:
        for member in tarred:
            if member.isreg() and (content := tarred.extractfile(member)):
                yield member.name, content


def describe(directory: str) -> tuple[str, str, str, list[str]]:
    """(name, version, METADATA, what its build needs) of what `unpack` wrote.

    Raises:
        Unknown
    """
    told = {path.name: path.read_text(errors="replace") for path in Path(directory).iterdir()}
    about = _toml(told.get("pyproject.toml", ""))
    project: dict[str, Any] = about.get("project") or {}
    dynamic = project.get("dynamic") or []
    info = HeaderParser().parsestr(told.get("PKG-INFO", ""))
    name = info["Name"] or project.get("name")
    version = info["Version"] or project.get("version")
    if not name or not version:
        raise Unknown("it has neither a PKG-INFO nor its version in pyproject.toml")
    if _is_final(info):
        needs, extras = info.get_all("Requires-Dist") or [], info.get_all("Provides-Extra") or []
    elif project and "dependencies" not in dynamic and "optional-dependencies" not in dynamic:
        optional = project.get("optional-dependencies") or {}
        needs, extras = list(project.get("dependencies") or []), list(optional)
        needs += [_only_for(need, extra) for extra in optional for need in optional[extra]]
    elif info["Name"]:
        needs, extras = _of_egg_info(told.get("requires.txt", ""))
    else:
        raise Unknown("what it needs is only known to its build")
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    if python := info["Requires-Python"] or project.get("requires-python"):
        lines.append(f"Requires-Python: {python}")
    lines += [f"Provides-Extra: {extra}" for extra in extras]
    lines += [f"Requires-Dist: {need}" for need in needs]
    return name, version, "\n".join(lines) + "\n", _build_needs(about.get("build-system") or {})


def _toml(text: str) -> dict[str, Any]:
    reader = import_module("tomllib" if sys.version_info >= (3, 11) else "pip._vendor.tomli")
    try:
        found: dict[str, Any] = reader.loads(text)
    except ValueError as e:
        raise Unknown(f"its pyproject.toml can't be read: {e}") from None
    return found


def _is_final(info: Message) -> bool:
    """Whether PKG-INFO has what the wheel's metadata will have (PEP 643), or looks like it."""
    dynamic = [field.lower() for field in info.get_all("Dynamic") or []]
    numbers = [int(n) for n in re.findall(r"\d+", info["Metadata-Version"] or "0")]
    static = numbers >= [2, 2] and "requires-dist" not in dynamic
    return static or bool(info.get_all("Requires-Dist"))


def _of_egg_info(text: str) -> tuple[list[str], list[str]]:
    """(needs, extras) as setuptools found them when it made the archive."""
    needs, extras, extra, marker = [], [], "", ""
    for line in filter(None, (line.strip() for line in text.splitlines())):
        if line.startswith("["):
            extra, _, marker = line[1:-1].partition(":")
            extras += [extra] if extra and extra not in extras else []
        else:
            need = f"{line} ; {marker}" if marker else line
            needs.append(_only_for(need, extra) if extra else need)
    return needs, extras


def _only_for(need: str, extra: str) -> str:
    requirement, _, marker = need.partition(" ;" if " @ " in need else ";")
    condition = f"extra == '{extra}'"
    return f"{requirement} ; {f'({marker.strip()}) and ' if marker else ''}{condition}"


def _build_needs(system: dict[str, Any]) -> list[str]:
    wanted: Iterable[str] = system.get("requires", _SETUPTOOLS)
    if str(system.get("build-backend", "setuptools")).startswith("setuptools"):
        wanted = [*wanted, "wheel"]
    try:
        # Parsed, since they become words of a command.
        return sorted({str(Requirement(need)) for need in wanted})
    except (ValueError, TypeError) as e:
        raise Unknown(f"its pyproject.toml can't be read: {e}") from None
