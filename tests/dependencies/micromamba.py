"""A `micromamba` made of py-rattler, as far as Metaflow and this project use it.

The real one is on no package index. This runs on the host and inside the sandboxes that
build environments, with any Python 3.10 or later and with `lib/rattler` beside it.
Standard output is one JSON document, as Metaflow expects.
"""

import asyncio
import json
import os
import shutil
import sys
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "lib"))

import rattler  # noqa: E402

ROOT = Path(os.environ.get("MAMBA_ROOT_PREFIX") or Path.home() / "micromamba")
PKGS = Path((os.environ.get("CONDA_PKGS_DIRS") or str(ROOT / "pkgs")).split(",")[0])
PLATFORM = "linux-aarch64" if os.uname().machine == "aarch64" else "linux-64"
REGISTRY = ROOT / "environments.txt"


def config():
    channels = [c for c in os.environ.get("CONDA_CHANNELS", "").split(",") if c]
    return {
        "channels": channels,
        "envs_dirs": [str(ROOT / "envs")],
        "pkgs_dirs": [str(PKGS)],
        "platform": PLATFORM,
    }


def environments():
    known = REGISTRY.read_text().splitlines() if REGISTRY.exists() else []
    return [p for p in dict.fromkeys(known) if Path(p, "conda-meta").is_dir()]


async def solve(channels, specs):
    subdir = os.environ.get("CONDA_SUBDIR") or PLATFORM
    return await rattler.solve(
        sources=channels,
        specs=[spec.replace("==", " ==", 1) if "==" in spec else spec for spec in specs],
        platforms=[subdir, "noarch"],
        virtual_packages=rattler.VirtualPackage.detect(),
        add_pip_as_python_dependency=bool(os.environ.get("MAMBA_ADD_PIP_AS_PYTHON_DEPENDENCY")),
    )


def fetch(url):
    target = PKGS / url.rsplit("/", 1)[-1]
    if not target.exists():
        PKGS.mkdir(parents=True, exist_ok=True)
        part = PKGS / f".{target.name}.{os.getpid()}"
        with urllib.request.urlopen(url) as response, open(part, "wb") as file:
            shutil.copyfileobj(response, file)
        part.rename(target)
    return target


async def install(prefix, files):
    from rattler.repo_data import RepoDataRecord

    records = [await RepoDataRecord.from_package_archive(file) for file in files]
    cache = PKGS / ".rattler"
    cache.mkdir(parents=True, exist_ok=True)
    await rattler.install(
        RepoDataRecord.sort_topologically(records),
        target_prefix=prefix,
        cache_dir=cache,
        show_progress=False,
        execute_link_scripts=True,
    )
    ROOT.mkdir(parents=True, exist_ok=True)
    with open(REGISTRY, "a") as file:
        file.write(os.path.abspath(prefix) + "\n")


def create(words):
    prefix, listed, channels, specs, flags = None, None, [], [], set()
    words = iter(words)
    for word in words:
        name, _, value = word.partition("=")
        if name in ("--prefix", "-p"):
            prefix = value or next(words)
        elif name in ("--file", "-f"):
            listed = value or next(words)
        elif name in ("--channel", "-c"):
            channels.append(value or next(words))
        elif word.startswith("-"):
            flags.add(name)
        else:
            specs.append(word)
    if "--dry-run" in flags:
        try:
            records = asyncio.run(solve(channels, specs))
        except Exception as e:  # of several kinds
            print(json.dumps({"success": False, "solver_problems": [str(e)]}))
            return 1
        link = []
        for record in records:
            digest = record.sha256.hex() if record.sha256 else None
            name, version = record.name.normalized, str(record.version)
            item = {"url": str(record.url), "name": name, "version": version, "sha256": digest}
            link.append(item)
        print(json.dumps({"success": True, "actions": {"LINK": link}}))
        return 0
    if listed:
        lines = [line.strip() for line in Path(listed).read_text().splitlines()]
        files = [Path(line) for line in lines if line and not line.startswith("@")]
    else:
        files = [fetch(url) for url in specs]
    if "--download-only" not in flags:
        asyncio.run(install(prefix, files))
    print(json.dumps({"success": True}))
    return 0


def main(words):
    while words and words[0].startswith("-"):
        words = words[1:]
    command, rest = words[0], words[1:]
    if command == "create":
        return create(rest)
    if command == "config":
        print(json.dumps(config()))
    elif command == "env":
        print(json.dumps({"envs": environments()}))
    elif command == "list":
        prefix = Path(rest[rest.index("--prefix") + 1])
        records = [
            json.loads(p.read_text()) for p in sorted((prefix / "conda-meta").glob("*.json"))
        ]
        kept = ("name", "version", "build", "url")
        print(json.dumps([{key: record.get(key) for key in kept} for record in records]))
    elif command == "run":
        prefix = rest[rest.index("--prefix") + 1]
        argv = rest[rest.index("--prefix") + 2 :]
        os.environ["PATH"] = f"{prefix}/bin:{os.environ['PATH']}"
        os.environ["CONDA_PREFIX"] = prefix
        os.execvp(argv[0], argv)
    else:
        print(f"unknown command {command}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # rattler can crash while the interpreter shuts down
