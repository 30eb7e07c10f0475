"""The bubblewrap command line: what a sandbox sees. This list is the security boundary.

Bubblewrap promises nothing by itself. The order matters: mounts are made from
first to last, and a later one hides an earlier one.
"""

from __future__ import annotations

import os
import stat
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import BackendUnavailable

WORK = "/sandbox"

#: What the system's programs and libraries need from /etc. No hosts' names, no
#: resolver, no users, no keys.
_ETC = (
    "/etc/ld.so.cache",
    "/etc/ssl/certs",
    "/etc/ca-certificates",
    "/etc/pki",
    "/etc/alternatives",
    "/etc/localtime",
    "/etc/nsswitch.conf",
    "/etc/mime.types",
)

#: What an image's root has that is made anew: the kernel's, ours, and what is written to.
_NOT_FROM_IMAGES = (
    "dev", "etc", "inbox", "kept", "proc", "run", "sandbox", "sys", "tmp",
)  # fmt: skip
_OWN_ETC = ("passwd", "group", "hosts", "resolv.conf", "hostname", "shadow", "gshadow", "mtab")

#: What programs keep in the top directory of a Python environment, passwords included.
_SECRETIVE = (".condarc", ".env", ".netrc", ".pypirc", "condarc", "pip.conf")

PASSWD = b"root:x:0:0:root:/:/usr/sbin/nologin\nsandbox:x:%d:%d:sandbox:/sandbox/home:/bin/sh\n"
GROUP = b"root:x:0:\nsandbox:x:%d:\n"
HOSTS = b"127.0.0.1 localhost sandbox\n::1 localhost sandbox\n"


def plain(path: str) -> str:
    """The same place without "..", of which the parts before it don't exist in a sandbox.

    Links stay links: a virtual environment is known by the link through which it is used.
    """
    if ".." not in Path(path).parts:
        return path
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


#: The interpreter of this process, as a sandbox sees it.
PYTHON = plain(sys.executable)


def python_trees() -> list[Path]:
    """The directories of this Python environment that a step needs: no other of the host's.

    The interpreter's and the virtual environment's own trees, and what else is
    a package directory on `sys.path`. Other entries (the current directory,
    PYTHONPATH, the sources of editable installs) are left out, because such
    trees hold what nobody means to share; the flow's own code travels in its
    code package.
    """
    places = [sys.base_prefix, sys.prefix, sys.base_exec_prefix]
    places += [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]
    places += [e for e in sys.path if os.path.basename(e) in ("site-packages", "dist-packages")]
    trees = [Path(plain(place)) for place in places]
    # A virtual environment's interpreter is a chain of links to the real one, through
    # other environments: but a link may lie anywhere, so only those count.
    link = Path(PYTHON)
    library = f"lib/python{sys.version_info.major}.{sys.version_info.minor}"
    while link.is_symlink():
        link = Path(os.path.normpath(link.parent / link.readlink()))
        prefix = link.parent.parent
        if (prefix / library).is_dir() or (prefix / "pyvenv.cfg").is_file():
            trees.append(prefix)
    kept: list[Path] = []
    for tree in sorted({t for t in trees if t.is_dir()}, key=lambda t: len(t.parts)):
        if not any(tree.is_relative_to(k) for k in kept):
            kept.append(tree)
    return kept


def _ancestors(path: str) -> list[str]:
    return [str(p) for p in reversed(Path(path).parents) if str(p) != "/"]


class Options:
    """Collects bubblewrap's options, making each directory above a mount point once.

    Without its own `--dir`, bubblewrap makes such a directory readable by root
    alone, and a step that has become another user can't pass it.
    """

    def __init__(self, moved: Mapping[Path, str] | None = None) -> None:
        self.args: list[str] = []
        self._moved = moved or {}
        self._made = {"/", "/usr", "/proc", "/dev"}
        self._bound: list[str] = []

    def add(self, *args: str) -> None:
        self.args += args

    def parents(self, path: str) -> None:
        for ancestor in _ancestors(path):
            inside = any(ancestor.startswith(f"{bound}/") for bound in self._bound)
            if ancestor not in self._made and not inside:
                self._made.add(ancestor)
                self.add("--perms", "0755", "--dir", ancestor)

    def bind(self, source: str | Path, target: str | Path, how: str = "--ro-bind") -> None:
        self.parents(str(target))
        self.add(how, self._where(Path(source)), str(target))
        self._made.add(str(target))
        self._bound.append(str(target))

    def _where(self, source: Path) -> str:
        for tree, place in self._moved.items():
            if source.is_relative_to(tree):
                return os.path.normpath(f"{place}/{source.relative_to(tree)}")
        return str(source)

    def data(self, fd: int, target: str) -> None:
        self.parents(target)
        self.add("--perms", "0444", "--ro-bind-data", str(fd), target)

    def scratch(self, target: str, megabytes: float) -> None:
        self.parents(target)
        self.add("--size", str(int(megabytes * (1 << 20))), "--perms", "1777", "--tmpfs", target)
        self._made.add(target)


@dataclass(frozen=True)
class HostRoot:
    """A root made of this machine's programs: /usr, a little of /etc, the Python environment."""

    trees: Sequence[Path]

    def add_to(self, o: Options) -> None:
        o.add("--ro-bind", "/usr", "/usr")
        for name in ("bin", "sbin", "lib", "lib64", "lib32", "libx32"):
            path = Path("/", name)
            if path.is_symlink():
                o.add("--symlink", str(path.readlink()).lstrip("/"), str(path))
            elif path.is_dir():
                o.bind(path, path)
        for etc in _ETC:
            if os.path.exists(etc):
                o.bind(etc, etc)

    def add_late(self, o: Options) -> None:
        """After the tmpfs mounts, which would hide an environment below /tmp."""
        for tree in self.trees:
            if not tree.is_relative_to("/usr"):
                o.bind(tree, tree)
        for place in {*self.trees, Path(plain(sys.prefix)), Path(plain(sys.base_prefix))}:
            for name in _SECRETIVE:
                if (place / name).is_file() and not (place / name).is_symlink():
                    o.add("--ro-bind", "/dev/null", str(place / name))


def host_root() -> HostRoot:
    """The root of a sandbox that asked for no image.

    Raises:
        BackendUnavailable: this Python lives where it would share the home directory.
    """
    trees = python_trees()
    home = Path.home()
    for tree in trees:
        if home.is_relative_to(tree):
            raise BackendUnavailable(
                f"this Python lives at {tree}, so sharing it would share your home directory "
                "too. Use a virtual environment.",
                op="create",
            )
    return HostRoot(trees)


@dataclass(frozen=True)
class ImageRoot:
    """A root made of an unpacked image, whose content nobody vouches for.

    Its directories are bound one by one into a root of bubblewrap's own. Nothing is
    ever mounted below them, since bubblewrap would follow an image's links while it
    makes mount points, and write on the host (CVE-2026-87766). For the same reason
    /etc is put together file by file, and links are copied as links.

    Attributes:
        variables: the environment that the image sets.
    """

    path: Path
    variables: Mapping[str, str]

    def add_to(self, o: Options) -> None:
        self._entries(o, self.path, "/", _NOT_FROM_IMAGES)

    def add_late(self, o: Options) -> None:
        etc = self.path / "etc"
        if etc.is_dir() and not etc.is_symlink():
            self._entries(o, etc, "/etc/", _OWN_ETC)

    @staticmethod
    def _entries(o: Options, directory: Path, target: str, without: Sequence[str]) -> None:
        for entry in sorted(directory.iterdir()):
            if entry.name in without:
                continue
            mode = entry.lstat().st_mode
            if stat.S_ISLNK(mode):
                o.parents(target + entry.name)
                o.add("--symlink", os.readlink(entry), target + entry.name)
            elif stat.S_ISDIR(mode) or (stat.S_ISREG(mode) and target != "/"):
                o.bind(entry, target + entry.name)


def options(
    *,
    root: HostRoot | ImageRoot,
    mounts: Mapping[str, Path],
    writable: Mapping[str, Path],
    disk: int,
    shared_memory: int | None,
    files: Mapping[str, int],
    as_root: bool,
    environment: Mapping[str, str],
    moved: Mapping[Path, str] | None = None,
) -> list[str]:
    """Bubblewrap's options for one sandbox, to be passed by `--args FD`, never on argv.

    Args:
        mounts: {path inside: directory on the host}, read-only.
        writable: the same, to be written: for our own programs, never for a step.
        disk: megabytes that can be written in all, in memory: three quarters at
            `WORK`, an eighth each at /tmp and /dev/shm.
        shared_memory: megabytes at /dev/shm, in the place of its eighth.
        files: {path inside: descriptor with its content}.
        as_root: whether bubblewrap is run by the real root. It then makes no
            user namespace, since the namespace's root would still be the host's
            for /proc/sys; the first process changes its user instead.
        environment: the variables inside, all of them.
        moved: {tree on the host: where bubblewrap finds it}, if it isn't at its place.
    """
    o = Options(moved)
    o.add("--unshare-ipc", "--unshare-pid", "--unshare-uts", "--unshare-cgroup-try")
    o.add("--unshare-net", "--die-with-parent", "--new-session", "--hostname", "sandbox")
    # The first process is out of reach of signals from within, SIGSTOP too.
    o.add("--as-pid-1")
    o.add("--clearenv", "--cap-drop", "ALL")
    if as_root:
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):
            o.add("--cap-add", capability)
    else:
        o.add("--unshare-user", "--disable-userns", "--assert-userns-disabled")
        o.add("--uid", "1000", "--gid", "1000")

    root.add_to(o)
    o.add("--proc", "/proc", "--dev", "/dev")
    # Root could write some of these whatever its capabilities; for others they
    # are read-only already.
    o.add("--ro-bind", "/proc/sys", "/proc/sys")
    # Keys belong to users, not to namespaces: this lists the host user's.
    for keys in ("/proc/keys", "/proc/key-users"):
        if os.path.exists(keys):
            o.add("--ro-bind", "/dev/null", keys)

    o.scratch("/tmp", disk / 8)
    o.scratch("/dev/shm", shared_memory or disk / 8)
    o.scratch(WORK, disk * 3 / 4)
    root.add_late(o)
    for target, source in mounts.items():
        o.bind(source, target)
    for target, source in writable.items():
        o.bind(source, target, "--bind")
    for target, fd in files.items():
        o.data(fd, target)
    for name, value in environment.items():
        o.add("--setenv", name, value)
    # /dev and / are tmpfs too, without a size: nothing may be written there.
    o.add("--chdir", WORK, "--remount-ro", "/dev", "--remount-ro", "/")
    return o.args
