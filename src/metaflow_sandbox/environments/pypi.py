"""Wheels for another Python and platform, found and downloaded by this environment's pip.

Nothing is built or run: see `pip_for.py`.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from metaflow.plugins.pypi.utils import markers_from_platform, pip_tags

from . import DependencyError, Package

_PROGRAM = Path(__file__).with_name("pip_for.py")
#: Of pip's configuration, what says where packages are and how to get there. The rest
#: (`user`, `target`, `no-binary`) is about this machine.
_SOURCES = (
    "index-url", "no-index", "cert", "client-cert", "proxy", "timeout", "default-timeout",
    "retries", "keyring-provider",
)  # fmt: skip
_LISTS = ("extra-index-url", "find-links", "trusted-host", "constraint")
#: From the weakest: `pip config list` names each by one of these.
_SECTIONS = ("global", "install", ":env:")
NO_PIP = (
    f"packages are found by pip, which {sys.executable} has not. Install it there: "
    "python -m ensurepip (or: uv pip install pip)"
)
_SECONDS = 1800
_TAIL = 3000


def solve(packages: dict[str, str], python: str, platform: str) -> list[dict[str, Any]]:
    """The wheels that packages and what they need amount to, as Metaflow's lock has them.

    Args:
        packages: {name: version or conditions}, as `@pypi` has them.
        python: three numbers.

    Raises:
        DependencyError: there are none, with pip's reasons.
    """
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory, "report.json")
        command = [
            "install", "--dry-run", f"--target={directory}", f"--report={report}",
            "--upgrade-strategy=only-if-needed", *_options(python, platform),
        ]  # fmt: skip
        _pip([*command, *_requirements(packages)], python, platform)
        found = json.loads(report.read_text())["install"]
    return [_locked(item["download_info"]) for item in found]


def download(packages: tuple[Package, ...], python: str, platform: str, target: Path) -> None:
    """Downloads wheels into a new directory; pip holds them against their hashes.

    Raises:
        DependencyError
    """
    for package in packages:
        refuse_source(package.url)
    hashes = [f" --hash=sha256:{p.sha256}" if p.sha256 else "" for p in packages]
    lines = [f"{p.url}{wanted}\n" for p, wanted in zip(packages, hashes, strict=True)]
    download_listed("".join(lines), python, platform, target, hashed=all(hashes))


def download_listed(
    listed: str, python: str, platform: str, target: Path, hashed: bool = True
) -> None:
    """The same for what is in pip's own format, of which it chooses what Python and platform need.

    Raises:
        DependencyError
    """
    target.mkdir()
    command = ["download", "--no-deps", f"--dest={target}", *_options(python, platform)]
    command += ["--require-hashes"] if hashed else []
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(listed)
        file.flush()
        _pip([*command, f"--requirement={file.name}"], python, platform)


def _requirements(packages: dict[str, str]) -> list[str]:
    """As Metaflow writes them."""
    words = []
    for name, version in packages.items():
        if "@" in version:
            refuse_source(version)
        bare = not version or version.startswith(("<", ">", "!", "~", "@"))
        words.append(f"{name}{version}" if bare else f"{name}=={version}")
    return words


def refuse_source(url: str) -> None:
    """Takes nothing that would have to be built.

    Raises:
        DependencyError
    """
    if not url.partition("#")[0].endswith(".whl"):
        raise DependencyError(
            f"{url} is source, and building it would run it on this machine. Make a wheel "
            "of it (pip wheel), and give its address, or put it where your pip looks for packages "
            "(find-links).",
            op="resolve",
        )


def _locked(info: dict[str, Any]) -> dict[str, Any]:
    archive = info.get("archive_info") or {}
    digest = (archive.get("hashes") or {}).get("sha256", "")
    if not digest and str(archive.get("hash", "")).startswith("sha256="):
        digest = archive["hash"].partition("=")[2]
    refuse_source(info["url"])
    return {"url": info["url"], "require_build": False, "sha256": digest}


def _options(python: str, platform: str) -> list[str]:
    tags = pip_tags(python, platform)
    options = ["--only-binary=:all:", "--progress-bar=off", "--quiet", "--implementation=cp"]
    options += [f"--python-version={python}"]
    options += [f"--abi={abi}" for abi in dict.fromkeys(tag.abi for tag in tags)]
    options += [f"--platform={name}" for name in dict.fromkeys(tag.platform for tag in tags)]
    return options


def _sources() -> dict[str, str]:
    """Where the user's pip looks for packages, as pip's variables.

    They may have passwords in them, which don't belong onto a command line.
    """
    command = [sys.executable, "-I", "-m", "pip", "config", "list"]
    listed = subprocess.run(command, check=False, capture_output=True, text=True).stdout
    found: list[tuple[int, str, str]] = []
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in _SECTIONS and name in _SOURCES + _LISTS:
            with contextlib.suppress(ValueError, SyntaxError):
                found.append((_SECTIONS.index(section), name, str(ast.literal_eval(value))))
    values: dict[str, str] = {}
    for _, name, text in sorted(found):
        if name in _LISTS and name in values:
            text = f"{values[name]} {text}"  # noqa: PLW2901
        values[name] = text
    return {f"PIP_{n.upper().replace('-', '_')}": " ".join(t.split()) for n, t in values.items()}


def _markers(python: str, platform: str) -> str:
    """What conditions of dependencies are held against."""
    short = ".".join(python.split(".")[:2])
    markers = {
        **markers_from_platform(platform),
        "os_name": "posix",
        "sys_platform": "linux",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "implementation_version": python,
        "python_full_version": python,
        "python_version": short,
    }
    return json.dumps(markers)


def _pip(words: list[str], python: str, platform: str) -> None:
    command = [sys.executable, "-I", str(_PROGRAM), _markers(python, platform)]
    command += ["--disable-pip-version-check", "--no-color", "--no-input", *words]
    others = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    environment = {**others, **_sources(), "PIP_CONFIG_FILE": os.devnull}
    try:
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise DependencyError(f"pip did not end within {_SECONDS // 60} minutes.") from None
    if done.returncode == 0:
        return
    said = done.stderr
    if "No module named 'pip'" in said:
        raise DependencyError(NO_PIP, op="resolve")
    if found := re.search(r"No matching distribution found for (.*)", said):
        raise DependencyError(
            f"there is no wheel of {found[1]} for Python {python} on {platform} where pip "
            "looks for packages. Source is not built.",
            op="resolve",
        )
    errors = [line for line in said.splitlines() if not line.startswith("WARNING")]
    raise DependencyError(f"pip failed.\n{chr(10).join(errors)[-_TAIL:]}", op="resolve")
