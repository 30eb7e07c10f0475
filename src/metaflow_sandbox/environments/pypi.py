"""Packages for another Python and platform, found and downloaded by this environment's pip.

Wheels, and source where there is no wheel. Nothing is built or run: see `pip_for.py`.
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
from urllib.parse import urlsplit

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
NO_GIT = (
    "Packages come as files: as a wheel or an archive of the source, by its address (of a Git "
    "host's, .../archive/COMMIT.zip). Or make a wheel of it (pip wheel), and put it where your pip "
    "looks for packages (find-links)."
)
#: What pip says where wheels are not enough.
_FOR_SOURCE = re.compile("would run here|ResolutionImpossible|conflicting dependencies")
_SECONDS = 1800
_TAIL = 3000


class NoWheel(DependencyError):
    """Wheels alone do not do."""


def solve(packages: dict[str, str], python: str, platform: str) -> list[dict[str, Any]]:
    """What packages and what they need amount to, as Metaflow's lock has it.

    Wheels, if that can be. An item that is source has, under "build", what its build needs.

    Args:
        packages: {name: version or conditions}, as `@pypi` has them.
        python: three numbers.

    Raises:
        DependencyError: there are none, with pip's reasons.
    """
    words = _requirements(packages)
    _refuse_passwords([*packages.values(), *_sources().get("PIP_FIND_LINKS", "").split()])
    try:
        return _solve(words, python, platform, sources=False)
    except NoWheel:
        return _solve(words, python, platform, sources=True)


def solve_build(items: list[dict[str, Any]], python: str, platform: str) -> list[dict[str, Any]]:
    """The wheels by which those of these items that are source are built, as `solve` has them.

    Each build takes of them what it needs, so that two may want different versions.

    Raises:
        DependencyError
    """
    found = {}
    for needs in {tuple(item["build"]): None for item in items if item.get("build")}:
        try:
            wheels = _solve(list(needs), python, platform, sources=False)
        except NoWheel as e:
            raise DependencyError(
                f"to build source, {', '.join(needs)} is needed, and {e}", op="resolve"
            ) from e
        found.update({wheel["url"]: wheel for wheel in wheels})
    return list(found.values())


def _solve(words: list[str], python: str, platform: str, sources: bool) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory, "report.json")
        command = [
            "install", "--dry-run", f"--target={directory}", f"--report={report}",
            "--upgrade-strategy=only-if-needed", *_options(python, platform, sources),
        ]  # fmt: skip
        builds = Path(directory, "builds.json")
        _pip([*command, "--", *words], python, platform, builds if sources else None)
        found = json.loads(report.read_text())["install"]
        needs = json.loads(builds.read_text()) if builds.exists() else {}
    names = [f"{item['metadata']['name']}=={item['metadata']['version']}" for item in found]
    return [
        _locked(item["download_info"], needs.get(name))
        for item, name in zip(found, names, strict=True)
    ]


def download(packages: tuple[Package, ...], python: str, platform: str, target: Path) -> None:
    """Downloads packages into a directory; pip holds them against their hashes.

    Raises:
        DependencyError
    """
    for package in packages:
        refuse_git(package.url)
    for group in _groups(packages):
        hashes = [f" --hash=sha256:{p.sha256}" if p.sha256 else "" for p in group]
        lines = [f"{p.url}{wanted}\n" for p, wanted in zip(group, hashes, strict=True)]
        sources = any(is_source(package.url) for package in group)
        download_listed("".join(lines), python, platform, target, all(hashes), sources)


def _groups(packages: tuple[Package, ...]) -> list[list[Package]]:
    """Packages that pip takes at once: it refuses two versions of a project, as builds may want."""
    groups: list[dict[str, Package]] = []
    for package in packages:
        file = urlsplit(package.url).path.rsplit("/", 1)[-1]
        project = package.url if is_source(package.url) else file.partition("-")[0].lower()
        group = next((group for group in groups if project not in group), None)
        if group is None:
            groups.append(group := {})
        group[project] = package
    return [list(group.values()) for group in groups]


def download_listed(
    listed: str,
    python: str,
    platform: str,
    target: Path,
    hashed: bool = True,
    sources: bool = False,
) -> None:
    """The same for what is in pip's own format, of which it chooses what Python and platform need.

    Raises:
        DependencyError
    """
    target.mkdir(exist_ok=True)
    command = ["download", "--no-deps", f"--dest={target}", *_options(python, platform, sources)]
    command += ["--require-hashes"] if hashed else []
    with tempfile.TemporaryDirectory() as directory:
        file, builds = Path(directory, "requirements.txt"), Path(directory, "builds.json")
        file.write_text(listed)
        _pip([*command, f"--requirement={file}"], python, platform, builds if sources else None)


def _refuse_passwords(words: list[str]) -> None:
    """The lock has addresses without them, by which nothing could be downloaded later.

    Raises:
        DependencyError
    """
    for word in words:
        url = urlsplit(word.removeprefix("@").strip())
        if url.scheme.startswith("http") and url.username is not None:
            raise DependencyError(
                f"the address of something at {url.hostname} has a password or a token in it, and "
                "a lock keeps none. Put it into ~/.netrc (machine, login, password), and leave it "
                "out of the address; that of an index (index-url) may have one.",
                op="resolve",
            )


def _requirements(packages: dict[str, str]) -> list[str]:
    """As Metaflow writes them."""
    words = []
    for name, version in packages.items():
        if "@" in version:
            refuse_git(version)
        bare = not version or version.startswith(("<", ">", "!", "~", "@"))
        words.append(f"{name}{version}" if bare else f"{name}=={version}")
    return words


def is_source(url: str) -> bool:
    """Whether what is there has to be built."""
    return not urlsplit(url).path.endswith(".whl")


def refuse_git(url: str) -> None:
    """Takes files alone.

    Raises:
        DependencyError
    """
    if not urlsplit(url).path.endswith((".whl", ".zip", ".tar.gz", ".tgz", ".tar.bz2")):
        raise DependencyError(f"{url} is no file. {NO_GIT}", op="resolve")


def _locked(info: dict[str, Any], needs: list[str] | None) -> dict[str, Any]:
    archive = info.get("archive_info") or {}
    digest = (archive.get("hashes") or {}).get("sha256", "")
    if not digest and str(archive.get("hash", "")).startswith("sha256="):
        digest = archive["hash"].partition("=")[2]
    url = info["url"]
    refuse_git(url)
    if info.get("subdirectory"):
        raise DependencyError(f"{url} has its package in a subdirectory. {NO_GIT}", op="resolve")
    item = {"url": url, "require_build": is_source(url), "sha256": digest}
    # `hash` is what Metaflow wants to read, should a step without a sandbox have the same lock.
    return {**item, "hash": digest, "build": needs or []} if is_source(url) else item


def _options(python: str, platform: str, sources: bool) -> list[str]:
    tags = pip_tags(python, platform)
    # What is in pip's cache was built here, from source that we have to know of.
    which = ["--prefer-binary", "--no-cache-dir"] if sources else ["--only-binary=:all:"]
    options = [*which, "--progress-bar=off", "--quiet", "--implementation=cp"]
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


def _markers(python: str, platform: str) -> dict[str, str]:
    """What conditions of dependencies are held against."""
    short = ".".join(python.split(".")[:2])
    return {
        **markers_from_platform(platform),
        "os_name": "posix",
        "sys_platform": "linux",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "implementation_version": python,
        "python_full_version": python,
        "python_version": short,
    }


def _pip(words: list[str], python: str, platform: str, sources: Path | None) -> None:
    told = {"markers": _markers(python, platform), "sources": str(sources) if sources else None}
    command = [sys.executable, "-I", str(_PROGRAM), json.dumps(told)]
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory, "log")  # which alone has what an index answers
        command += ["--disable-pip-version-check", "--no-color", "--no-input", f"--log={log}"]
        _run_pip([*command, *words], python, platform, bool(sources), log)


def _run_pip(command: list[str], python: str, platform: str, sources: bool, log: Path) -> None:
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
    if "No permission to execute" in said:
        raise DependencyError(f"a package is asked for from a repository. {NO_GIT}", op="resolve")
    if found := re.search(r"ERROR: (.*) is source that must be run: (.*)", said):
        raise DependencyError(
            f"{found[1]} is source, and what it needs can't be read: {found[2]}. Make a wheel of "
            "it (pip wheel), and put it where your pip looks for packages (find-links).",
            op="resolve",
        )
    if found := re.search(r"No matching distribution found for (.*)", said):
        raise NoWheel(
            f"there is no wheel of {found[1]} for Python {python} on {platform} where pip "
            f"looks for packages{', nor source' if sources else ''}.{_denied(log)}",
            op="resolve",
        )
    errors = [line for line in said.splitlines() if not line.startswith("WARNING")]
    kind = NoWheel if _FOR_SOURCE.search(said) else DependencyError
    raise kind(f"pip failed.\n{chr(10).join(errors)[-_TAIL:]}", op="resolve")


def _denied(log: Path) -> str:
    """Who wanted other credentials, in a sentence, by pip's log."""
    text = log.read_text(errors="replace") if log.exists() else ""
    found = re.search(r"\b(401|403) Client Error: .* for url: (\S+)", text)
    if found is None:
        return ""
    return (
        f" {urlsplit(found[2]).hostname} answered {found[1]}: look at the password or token that "
        "your pip has for it (index-url, ~/.netrc); for uv, UV_INDEX_NAME_USERNAME and _PASSWORD."
    )
