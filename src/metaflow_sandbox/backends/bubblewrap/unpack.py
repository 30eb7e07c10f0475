"""Unpacks an image's layers: `unpack.py LAYERS TARGET MAX_BYTES`, inside a sandbox.

LAYERS is a directory of tar archives, applied in the order of their names. The result
is for reading alone: everybody may read all of it, and it has neither devices, pipes
and sockets nor programs that change their user. Links are kept as they are; whether
an archive's paths or links lead out of TARGET doesn't matter to the host, since there
is nothing else in this sandbox, but they are held inside all the same, as a container
engine does it. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import sys
import tarfile

OPAQUE, GONE = ".wh..wh..opq", ".wh."
MAX_ENTRIES, MAX_LINKS = 2_000_000, 40


def parts_of(name: str) -> list[str]:
    return [p for p in name.split("/") if p not in ("", ".")]


def directory(root: str, parts: list[str]) -> str:
    """The real directory of a path below `root`, made if needed; links stay inside."""
    todo, links = list(parts), 0
    path: list[str] = []
    while todo:
        part = todo.pop(0)
        if part == "..":
            path = path[:-1]
            continue
        full = os.path.join(root, *path, part)
        try:
            mode = os.lstat(full).st_mode
        except FileNotFoundError:
            os.mkdir(full, 0o755)
            mode = stat.S_IFDIR
        if stat.S_ISLNK(mode):
            links += 1
            if links > MAX_LINKS:
                raise SystemExit(f"too many links in {'/'.join(parts)}")
            target = os.readlink(full)
            todo = parts_of(target) + todo
            if target.startswith("/"):
                path = []
        elif stat.S_ISDIR(mode):
            path.append(part)
        else:
            os.unlink(full)  # a higher layer puts a directory in a file's place
            os.mkdir(full, 0o755)
            path.append(part)
    return os.path.join(root, *path)


def remove(path: str) -> None:
    if os.path.islink(path) or not os.path.isdir(path):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    else:
        shutil.rmtree(path)


class Unpacker:
    def __init__(self, root: str, max_bytes: int) -> None:
        self.root = root
        self.left = max_bytes
        self.entries = 0

    def layer(self, path: str) -> None:
        """Applies one layer: first what it hides of those below, wherever it says so."""
        for apply in (self.hide, self.add):
            with tarfile.open(path, "r:*") as archive:
                for member in archive:
                    parts = parts_of(member.name)
                    if parts and parts[-1] != "..":
                        apply(archive, member, parts)

    def hide(self, _: tarfile.TarFile, member: tarfile.TarInfo, parts: list[str]) -> None:
        self.entries += 1
        if self.entries > MAX_ENTRIES:
            raise SystemExit(f"the image has more than {MAX_ENTRIES} files")
        if not parts[-1].startswith(GONE):
            return
        parent = directory(self.root, parts[:-1])
        if parts[-1] == OPAQUE:
            for name in os.listdir(parent):
                remove(os.path.join(parent, name))
        elif (name := parts[-1][len(GONE) :]) not in ("", ".", ".."):
            remove(os.path.join(parent, name))

    def add(self, archive: tarfile.TarFile, member: tarfile.TarInfo, parts: list[str]) -> None:
        if parts[-1].startswith(GONE):
            return
        target = os.path.join(directory(self.root, parts[:-1]), parts[-1])
        if member.isdir():
            if os.path.islink(target) or not os.path.isdir(target):
                remove(target)
                os.mkdir(target)
            os.chmod(target, member.mode & 0o777 | 0o755)
        elif member.issym():
            remove(target)
            os.symlink(member.linkname, target)
        elif member.islnk():
            source = parts_of(member.linkname)
            found = os.path.join(directory(self.root, source[:-1]), source[-1])
            if found != target:
                remove(target)
                os.link(found, target, follow_symlinks=False)
        elif member.isreg():
            remove(target)
            self.left -= member.size
            if self.left < 0:
                raise SystemExit("the image is larger than may be unpacked")
            content = archive.extractfile(member)
            fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(fd, "wb") as file:
                if content is not None:
                    shutil.copyfileobj(content, file, 1 << 20)
                os.fchmod(file.fileno(), member.mode & 0o777 | 0o444)


def main(argv: list[str]) -> None:
    unpacker = Unpacker(argv[1], int(argv[2]))
    for name in sorted(os.listdir(argv[0])):
        unpacker.layer(os.path.join(argv[0], name))


main(sys.argv[1:])
