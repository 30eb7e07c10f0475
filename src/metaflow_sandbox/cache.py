"""Environments that were built once, on this disk: complete, read-only, and bounded.

    KEY/root, or KEY/archive    what was built
    KEY/record.json             how many entries and bytes it has, to know whether all is there
    .lock-KEY                   locked by who builds it, and shared by who uses it
    .new-…, .old-…              being built, being removed: locked by who does that

A name says what went in (`Recipe.key`), so whoever finds it may use it. It gets its name
when it is complete: what was being built by a process that was killed has none.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
from platformdirs import user_cache_path

from .concurrency import plain_errors
from .errors import SandboxError
from .settings import number

ROOT, ARCHIVE = "root", "archive"
_KEY = re.compile(r"[A-Za-z0-9_-]{8,100}\Z")
_WAIT_SECONDS = 0.2
_WATCH_SECONDS = 2.0
_OPEN = 0o755  # below a directory that is private
#: Locks that say that this process uses what they are for; the kernel drops them with it.
_in_use: dict[Path, int] = {}


@dataclass(frozen=True)
class Entry:
    """One environment in the cache. `used` is in seconds since 1970."""

    key: str
    bytes: int
    used: float
    description: str


def directory() -> Path:
    """Where environments are kept: private, and surely ours.

    Raises:
        SandboxError: somebody else made it, or it can't be made.
    """
    path = Path(user_cache_path("metaflow-sandbox")) / "environments"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as e:
        raise SandboxError(
            f"{path} can't be made ({e.strerror}): set XDG_CACHE_HOME to a directory that you can "
            "write.",
            op="cache",
        ) from e
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise SandboxError(
            f"{path} can be written by somebody else, and what is in it runs in your sandboxes. "
            "Remove it, or set XDG_CACHE_HOME to another directory.",
            op="cache",
        )
    return path


#: Fills a directory, in which it makes `root` or `archive`; returns what it is, in words.
Build = Callable[[Path], Awaitable[str]]
#: Tells the user something, in a sentence.
Say = Callable[[str], Awaitable[None]]


def limit() -> int:
    """Bytes that all environments together may have."""
    return int(number("CACHE")) << 20


async def get(key: str, build: Build, say: Say, rebuild: bool = False) -> Path:
    """The directory of an environment, built if it isn't there. It stays while we live.

    Those that were not used for longest go, where all have more than `limit`.

    Args:
        rebuild: replaces what was there before this process used it.

    Raises:
        SandboxError: it can't be built, or kept; or replaced, since another process uses it.
    """
    if not _KEY.match(key):
        raise ValueError(f"{key!r} is not a key")
    base = directory()
    _tidy(base)
    target, waited = base / key, False
    while target not in _in_use:
        fd, alone = _try_lock(base, key)
        try:
            there = fd is not None and target.exists()
            whole = there and await anyio.to_thread.run_sync(_whole, target)
            wanted = whole and not rebuild
            if alone and not wanted:
                if there:
                    if not whole:
                        await say("its environment lost files since it was built.")
                    await anyio.to_thread.run_sync(_bury, target)
                await _build(base, target, build)
                await anyio.to_thread.run_sync(_bound, base, limit(), {key})
                rebuild = False
            elif wanted:
                assert fd is not None  # noqa: S101 - for type checkers
                os.utime(target / "record.json")
                fcntl.flock(fd, fcntl.LOCK_SH)
                if target.exists():  # for between two locks it is nobody's
                    _in_use[target], fd = fd, None
            elif there and waited:  # for once it may be one that only looks at it
                raise SandboxError(
                    f"the environment {target} {'is to be built anew' if whole else 'lost files'}, "
                    "and another run or a shell uses it. Wait until that has ended, or give "
                    "cache=False.",
                    op="prepare",
                    code="cache_failed",
                )
            else:
                if not waited and not there:
                    await say("another run builds its environment; this one waits for it.")
                waited = True
                await anyio.sleep(_WAIT_SECONDS)
        finally:
            if fd is not None:
                os.close(fd)
    return target


def hold(path: Path) -> bool:
    """Whether a path is there. If it is in an environment, that stays while we live."""
    base = directory()
    if not path.is_relative_to(base) or not path.exists():
        return path.exists()
    target = base / path.relative_to(base).parts[0]
    if target not in _in_use:
        fd, _ = _try_lock(base, target.name)
        if fd is None:  # it is being removed, or built anew
            return False
        fcntl.flock(fd, fcntl.LOCK_SH)
        _in_use[target] = fd
    return path.exists()


def _tidy(base: Path) -> None:
    """Removes what was left by processes that were killed: nobody has it locked."""
    for pattern in (".new-*", ".old-*"):
        for path in base.glob(pattern):
            with contextlib.suppress(OSError):  # another process was quicker
                held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    if _flock(held, fcntl.LOCK_EX):
                        _remove(path)
                finally:
                    os.close(held)


@contextlib.contextmanager
def _own(base: Path, prefix: str) -> Iterator[Path]:
    """A directory that nobody tidies up while we live. It is removed at the end."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
        with contextlib.suppress(FileNotFoundError):  # tidied up before it was locked
            held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if _flock(held, fcntl.LOCK_EX) and path.exists():
                break
            os.close(held)
    try:
        yield path
    finally:
        _remove(path)
        os.close(held)


def _try_lock(base: Path, key: str) -> tuple[int | None, bool]:
    """A descriptor that holds a key's lock, and whether nobody else does; None: it is being built.

    A lock's file is removed with what it is for, so it is looked for again once locked.
    """
    path = base / f".lock-{key}"
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        alone = _flock(fd, fcntl.LOCK_EX)
        if not alone and not _flock(fd, fcntl.LOCK_SH):
            os.close(fd)
            return None, False
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(fd).st_ino == path.stat().st_ino:
                return fd, alone
        os.close(fd)


def _flock(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


async def _build(base: Path, target: Path, build: Build) -> None:
    try:
        with _own(base, ".new-") as new:
            try:
                description = await build(new)
                await anyio.to_thread.run_sync(_seal, new, description)
                os.rename(new, target)
            finally:  # what failed may be large
                with anyio.CancelScope(shield=True):
                    await anyio.to_thread.run_sync(_remove, new)
    except OSError as e:
        raise SandboxError(
            f"an environment can't be kept in {base}: {e.strerror or e}. `metaflow-sandbox cache "
            "clear` makes room; XDG_CACHE_HOME moves it.",
            op="prepare",
            code="cache_failed",
        ) from e


def check_size(size: int) -> None:
    """Holds what is being built against what all may have together.

    Raises:
        SandboxError
    """
    if size > limit():
        raise SandboxError(
            f"an environment has more than {limit() >> 20} MB, and so no place in the cache: give "
            "it more with METAFLOW_SANDBOX_CACHE=… (MB).",
            op="prepare",
            code="cache_failed",
        )


@contextlib.asynccontextmanager
async def watched(path: Path) -> AsyncIterator[None]:
    """Ends what goes on inside when a directory that it fills has more than all may have."""

    async def watch() -> None:
        while True:
            await anyio.sleep(_WATCH_SECONDS)
            check_size((await anyio.to_thread.run_sync(_size, path))["bytes"])

    with plain_errors():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            yield
            tasks.cancel_scope.cancel()


def _seal(new: Path, description: str) -> None:
    """Takes over what a builder wrote, as something that everybody may read and nobody change.

    Its modes and owners are the builder's choice: nothing is followed, opened or run here.
    """
    owner = (os.getuid(), os.getgid()) if os.getuid() == 0 else None
    for path, found in _walk(new):
        if owner is not None:
            os.chown(path, *owner, follow_symlinks=False)
        if stat.S_ISDIR(found.st_mode):
            os.chmod(path, _OPEN)
        elif stat.S_ISREG(found.st_mode):
            os.chmod(path, _OPEN if found.st_mode & 0o100 else 0o644)
        elif not stat.S_ISLNK(found.st_mode):
            path.unlink()  # a pipe or a socket is nothing that a package has
    new.chmod(_OPEN)
    record: dict[str, Any] = {"description": description, **_count(new)}
    check_size(int(record["bytes"]))
    (new / "record.json").write_text(json.dumps(record))


def _walk(top: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """What is below a directory, each before what is in it, never through a link."""
    for entry in os.scandir(top):
        path, found = Path(entry.path), entry.stat(follow_symlinks=False)
        if stat.S_ISDIR(found.st_mode):
            os.chmod(path, _OPEN)  # else we might not get in
            yield path, found
            yield from _walk(path)
        else:
            yield path, found


def _count(target: Path) -> dict[str, int]:
    """How many files there are, and their bytes; of what was built alone."""
    archive = target / ARCHIVE
    if archive.is_file():
        return {"files": 1, "bytes": archive.stat().st_size}
    return _size(target / ROOT)


def _size(top: Path) -> dict[str, int]:
    files = size = 0
    linked: set[int] = set()
    for folder, _, names in os.walk(top):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # while it is being built
                found = os.lstat(f"{folder}/{name}")
                files += 1
                if found.st_nlink == 1 or found.st_ino not in linked:
                    size += found.st_size
                if found.st_nlink > 1:
                    linked.add(found.st_ino)
    return {"files": files, "bytes": size}


def _whole(target: Path) -> bool:
    """Whether an environment is there with all that it had, since programs tidy caches up."""
    record = _record(target)
    return record is not None and _count(target).items() <= record.items()


def _record(target: Path) -> dict[str, object] | None:
    try:
        record: dict[str, object] = json.loads((target / "record.json").read_text())
    except (OSError, ValueError):
        return None
    return record


def _bury(target: Path) -> None:
    with _own(target.parent, ".old-") as old:
        target.rename(old / "it")


def _remove(path: Path) -> None:
    if not path.exists():
        return
    with contextlib.suppress(OSError):
        for _ in _walk(path):  # directories that can't be entered can't be emptied either
            pass
    shutil.rmtree(path, ignore_errors=True)


# --- for those who look after it


def entries() -> list[Entry]:
    """What is in the cache, the one that was used last first."""
    found = []
    for path in directory().iterdir():
        if not path.name.startswith(".") and (record := _record(path)) is not None:
            used = (path / "record.json").stat().st_mtime
            size = int(str(record.get("bytes", 0)))
            found.append(Entry(path.name, size, used, str(record.get("description", ""))))
    return sorted(found, key=lambda entry: entry.used, reverse=True)


def discard(path: Path) -> None:
    """Removes what `get` gave to this process alone: it is not to be used again."""
    target = next((known for known in _in_use if path.is_relative_to(known)), None)
    if target is not None:
        os.close(_in_use.pop(target))
        _evict(target.parent, target.name)


def clear(keys: set[str] | None = None) -> tuple[list[Entry], list[Entry]]:
    """Removes environments that no run uses.

    Args:
        keys: these; None: all.

    Returns:
        Those that were removed, and those that are in use.
    """
    removed: list[Entry] = []
    kept: list[Entry] = []
    base = directory()
    _tidy(base)
    for entry in entries():
        if keys is None or entry.key in keys:
            (removed if _evict(base, entry.key) else kept).append(entry)
    return removed, kept


def bound() -> list[Entry]:
    """Removes those that were not used for longest, until all are within `limit`."""
    base = directory()
    _tidy(base)
    return _bound(base, limit(), set())


def _bound(base: Path, most: int, kept: set[str]) -> list[Entry]:
    removed = []
    found = entries()
    total = sum(entry.bytes for entry in found)
    for entry in reversed(found):
        if total <= most:
            break
        if entry.key not in kept and _evict(base, entry.key):
            total -= entry.bytes
            removed.append(entry)
    return removed


def _evict(base: Path, key: str) -> bool:
    """Removes an environment, unless somebody uses it."""
    fd, alone = _try_lock(base, key)
    if fd is None:
        return False
    try:
        if alone:
            if (base / key).exists():
                _bury(base / key)
            (base / f".lock-{key}").unlink()
        return alone
    finally:
        os.close(fd)
