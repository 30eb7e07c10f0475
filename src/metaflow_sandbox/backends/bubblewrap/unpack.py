"""Unpacks an image's layers: `unpack.py LAYERS TARGET MAX_BYTES`, inside a sandbox.

LAYERS is a directory of tar archives, applied in the order of their names. The result
is for reading alone: everybody may read all of it, since as root a sandbox has another
user than this one, and it has neither devices, pipes and sockets nor programs that
change their user. Links are kept as they are; whether an archive's paths or links lead
out of TARGET doesn't matter to the host, since there is nothing else in this sandbox,
but they are held inside all the same, as a container engine does it. Standard library
only.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import stat
import sys
import tarfile

OPAQUE, GONE = ".wh..wh..opq", ".wh."
MAX_ENTRIES, MAX_LINKS, MAX_PATH = 2_000_000, 40, 4096
MAX_DEPTH = 200  # Python removes directories by recursion
MEMORY = 1 << 30  # bytes: `tarfile` reads a header whole, however long it says that it is
GZIP = b"\x1f\x8b"


def parts_of(name: str) -> list[str]:
    if len(name) > MAX_PATH:
        raise SystemExit(f"a path has {len(name)} characters")
    return [p for p in name.split("/") if p not in ("", ".")]


def is_directory(path: str) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def remove(path: str) -> None:
    if is_directory(path):
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


class Unpacker:
    def __init__(self, root: str, max_bytes: int) -> None:
        self.root = root
        self.left = max_bytes
        self.entries = 0
        self.brought: set[str] = set()  # real paths, by the layer at hand

    def layer(self, path: str) -> None:
        """Applies one layer."""
        self.brought.clear()
        with open(path, "rb") as file:
            zipped = file.read(2) == GZIP
        # Not `r:*`: xz takes as much memory as its header says.
        with tarfile.open(path, "r:gz") if zipped else tarfile.open(path, "r:") as archive:
            # Not `next()`: before Python 3.11 that fails on an archive without members.
            for member in archive:
                # It would remember them all.
                archive.members.clear()  # type: ignore[attr-defined]
                self.count()
                parts = parts_of(member.name)
                if parts and parts[-1] != "..":
                    self.apply(archive, member, parts)

    def count(self) -> None:
        """Counts what may take an inode."""
        self.entries += 1
        if self.entries > MAX_ENTRIES:
            raise SystemExit(f"the image has more than {MAX_ENTRIES} files")

    def apply(self, archive: tarfile.TarFile, member: tarfile.TarInfo, parts: list[str]) -> None:
        parent, name = self.directory(parts[:-1]), parts[-1]
        if name == OPAQUE:
            for hidden in os.listdir(parent):
                self.hide(os.path.join(parent, hidden))
        elif name.startswith(GONE):
            if (hidden := name[len(GONE) :]) not in ("", ".", ".."):
                self.hide(os.path.join(parent, hidden))
        else:
            self.add(archive, member, os.path.join(parent, name))

    def directory(self, parts: list[str], make: bool = True) -> str:
        """The real directory of a path below the root, made if needed; links stay inside."""
        todo, links = list(parts), 0
        path: list[str] = []
        while todo:
            part = todo.pop(0)
            if part == "..":
                path = path[:-1]
                continue
            full = os.path.join(self.root, *path, part)
            try:
                mode = os.lstat(full).st_mode
            except FileNotFoundError:
                mode = 0
            if stat.S_ISLNK(mode):
                links += 1
                if links > MAX_LINKS:
                    raise SystemExit(f"too many links in {'/'.join(parts)!r}")
                target = os.readlink(full)
                todo = parts_of(target) + todo
                if target.startswith("/"):
                    path = []
                continue
            if not stat.S_ISDIR(mode):
                if not make:
                    raise SystemExit(f"a hard link into {'/'.join(parts)!r}, which is not there")
                self.count()
                remove(full)  # a higher layer puts a directory in a file's place
                os.mkdir(full, 0o755)
            path.append(part)
            if len(path) > MAX_DEPTH:
                raise SystemExit(f"directories lie more than {MAX_DEPTH} deep")
        return os.path.join(self.root, *path)

    def hide(self, path: str) -> None:
        """Removes what layers below have there. What this one has brought stays, before or after.

        Spelled out by the format: a mark may come after what it doesn't mean.
        """
        if is_directory(path):
            for name in os.listdir(path):
                self.hide(os.path.join(path, name))
            if path not in self.brought:
                with contextlib.suppress(OSError):  # something of this layer's is in it
                    os.rmdir(path)
        elif path not in self.brought:
            remove(path)

    def add(self, archive: tarfile.TarFile, member: tarfile.TarInfo, target: str) -> None:
        if member.isdir():
            if not is_directory(target):
                remove(target)
                os.mkdir(target, 0o755)
        elif member.issym():
            remove(target)
            os.symlink(member.linkname, target)
        elif member.islnk():
            self.add_hard_link(member, target)
        elif member.isreg():
            self.add_file(archive, member, target)
        else:
            return
        self.brought.add(target)

    def add_hard_link(self, member: tarfile.TarInfo, target: str) -> None:
        source = parts_of(member.linkname)
        if not source or source[-1] == "..":
            raise SystemExit(f"a hard link to {member.linkname!r}, which is a directory")
        found = os.path.join(self.directory(source[:-1], make=False), source[-1])
        if found != target:
            remove(target)
            os.link(found, target, follow_symlinks=False)

    def add_file(self, archive: tarfile.TarFile, member: tarfile.TarInfo, target: str) -> None:
        remove(target)
        if not 0 <= member.size <= self.left:
            raise SystemExit("the image is larger than may be unpacked")
        self.left -= member.size
        content = archive.extractfile(member)
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "wb") as file:
            if content is not None:
                shutil.copyfileobj(content, file, 1 << 20)
            os.fchmod(file.fileno(), 0o755 if member.mode & 0o111 else 0o644)


def main(argv: list[str]) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    unpacker = Unpacker(argv[1], int(argv[2]))
    try:
        for name in sorted(os.listdir(argv[0])):
            unpacker.layer(os.path.join(argv[0], name))
    except MemoryError:
        raise SystemExit(f"a layer's headers take more than {MEMORY >> 20} MB of memory") from None


main(sys.argv[1:])
