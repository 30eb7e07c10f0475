"""The backend contract: six methods that an adapter writes, and what is built on them.

`Backend`   create, list, destroy       the provider
`Sandbox`   write, read, exec           one disposable machine

Rules that hold for every adapter, and that `metaflow_sandbox.testing` checks:

* A command that exits with a non-zero code is a result. Only infrastructure raises.
* Errors are `SandboxError`s (see `errors.py`) or the built-in exceptions named here.
* Files and output stream: memory use doesn't grow with their size.
* A parameter that the backend can't enforce is not in its `Capabilities`.
* `destroy` may be called twice, and for a sandbox that is gone.
* SDKs are imported in methods, never when a module is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tarfile
import tempfile
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, ClassVar

import anyio

from ..concurrency import interruptible, plain_errors
from ..errors import NotEnforceable, SandboxError

#: Receives a piece of a stream; awaiting it is the back-pressure.
Sink = Callable[[bytes], Awaitable[None]]


#: `Backend.environments` of those who keep them in images.
IN_IMAGES = "/opt/metaflow-sandbox"

#: LOCK ARCHIVE TARGETS… -- COMMAND…: unpacks what `Sandbox.upload` sent, and becomes the command.
#: May be run again after its answer got lost: whoever comes second waits, and finds it done.
_UNPACK = """
import fcntl, os, sys, tarfile
# Environments have links to the interpreter that they are made from.
how = {"filter": "fully_trusted"} if hasattr(tarfile, "fully_trusted_filter") else {}
lock, path, *words = sys.argv[1:]
end = words.index("--")
targets, command = words[:end], words[end + 1:]
held = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
fcntl.flock(held, fcntl.LOCK_EX)
if os.path.exists(path):
    with tarfile.open(path) as archive:
        for member in archive:
            number, _, name = member.name.partition("/")
            target = targets[int(number)]
            os.makedirs(target, exist_ok=True)
            if name:
                member.name = name
                if member.islnk():
                    member.linkname = member.linkname.partition("/")[2]
                archive.extract(member, target, **how)
            elif member.isfile():
                tarfile.open(fileobj=archive.extractfile(member)).extractall(target, **how)
    os.unlink(path)
os.set_inheritable(held, True)
os.execvp(command[0], command)
"""


def nobodys(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """An archive's entry without the host's users: their names are no sandbox's business."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def _bundle(sources: Sequence[Path]) -> IO[bytes]:
    """One archive of several: a directory's files below its number, an archive as its number."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    with tarfile.open(fileobj=file, mode="w") as archive:
        for number, source in enumerate(sources):
            archive.add(source, arcname=str(number), filter=nobodys)
    file.seek(0)
    return file


#: Tells the user something, in a sentence: who waits for an image wants to know.
Say = Callable[[str], Awaitable[None]]


async def unsaid(line: str) -> None:
    """A `Say` that tells nobody."""


async def discard(data: bytes) -> None:
    """A `Sink` for output that nobody wants."""


@dataclass(frozen=True)
class Capabilities:
    """What a backend can enforce. Launching with anything else is refused.

    Attributes:
        cpu, memory, disk, gpu: whether a limit is a limit.
        shared_memory: whether /dev/shm has the size that was asked for.
        image: whether `image=` chooses what the sandbox is made from.
        network: which of "none", "hosts" and "internet" it can give. The first
            is what a step gets that asks for nothing.
        setup: whether shell commands can prepare the image as root.
        keep: whether a sandbox can outlive its attempt for inspection.
        stream: "pipe" if `exec`'s output can't be lost while the launcher lives
            (a local process), "spool" if its connection may drop.
    """

    cpu: bool = False
    memory: bool = False
    disk: bool = False
    gpu: bool = False
    shared_memory: bool = False
    image: bool = False
    network: Sequence[str] = ("internet", "none")
    setup: bool = False
    keep: bool = False
    stream: str = "spool"


@dataclass(frozen=True)
class Preflight:
    """What a backend found on this machine.

    Attributes:
        provider: who does the work, with its version ("bubblewrap 0.11.0 at /usr/bin/bwrap").
        notes: what the user should know before the run: weaker limits, a missing network.
    """

    provider: str
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class SandboxSpec:
    """What one sandbox is to be.

    Attributes:
        labels: plain strings, without secrets or user data, by which it is found again.
        lifetime: seconds after which the provider ends it, whatever happens to us.
        mounts: {absolute path inside: directory on the host, or for backends that don't
            bind them an archive of one}. A backend on this
            machine binds them read-only, in this order, and content that comes later
            is seen; for others `Sandbox.deliver` copies them.
        cpu, memory (MB), disk (MB), gpu: None where nothing was asked.
        shared_memory: MB of /dev/shm, which count as memory and not as disk.
        image: as `Backend.prepare` returned it; None: the backend's own.
        network: False, True, or the hosts that may be reached; None: the backend's default.
        options: those of `Backend.options` that the user gave.
        python: as in `Recipe`.
    """

    labels: Mapping[str, str] = field(default_factory=dict)
    lifetime: float = 3600.0
    mounts: Mapping[str, Path] = field(default_factory=dict)
    cpu: float | None = None
    memory: int | None = None
    disk: int | None = None
    gpu: int | None = None
    shared_memory: int | None = None
    image: str | None = None
    network: bool | Sequence[str] | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    python: str | None = None


@dataclass(frozen=True)
class Recipe:
    """What the sandboxes of a step are made from, got ready once, before any step's code runs.

    Attributes:
        image: as the user named it; None: the backend's own.
        setup: shell commands, run in this order as root.
        files: {absolute path inside: directory on the host}, there for `install` alone. They
            may be downloaded when this is first read, which blocks: await `fetched`.
        install: a command that runs after `setup`, as the sandbox's user, without a network.
            It runs code of packages' authors: in a sandbox alone.
        prefix: the directory that `install` fills, which sandboxes have at the same path.
        options: as in `SandboxSpec`.
        cpu, memory (MB), disk (MB), gpu: what the sandboxes are to have, for providers that
            decide it by what they are made from. Not part of `key`: give it what counts.
        contents: stands for `files` in the key, where it is known before they are there.
        title: what is installed, in words: "python 3.12.1 and 7 packages".
        python: the Python inside, where the user named one; not part of `key`.
        labels: of the sandboxes that make it at a provider, by which they are found; not part of
            `key`.
        once: the run that it is for alone, if that is so; not part of `key`. What is kept under
            another name for it gets a `Prepared.discard`.
        rebuild: whether what is there of its installation is made anew, and replaced.
    """

    image: str | None = None
    setup: tuple[str, ...] = ()
    files: Mapping[str, Path] = field(default_factory=dict)
    install: tuple[str, ...] = ()
    prefix: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    cpu: float | None = None
    memory: int | None = None
    disk: int | None = None
    gpu: int | None = None
    contents: str = ""
    title: str = ""
    python: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    once: str = ""
    rebuild: bool = False

    @property
    def plain(self) -> bool:
        """Whether nothing has to be made beyond the image."""
        return not self.setup and not self.install

    async def fetched(self) -> dict[str, Path]:
        """`files`, downloaded if they have to be."""
        return await interruptible(lambda: dict(self.files))

    def key(self, *more: str) -> str:
        """40 hexadecimal digits that are another for anything else, contents of files included.

        Args:
            more: what else decides: an image's digest, a platform, a size. Blocking, as it
                may read the files.
        """
        files: object = self.contents
        if not self.contents:
            files = {path: _digest(source) for path, source in sorted(self.files.items())}
        parts = (self.image, self.setup, files, self.install, self.prefix, dict(self.options), more)
        text = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:40]


def _digest(source: Path) -> list[tuple[str, str]]:
    """(relative path, sha256 of the content) of a file, or of all below a directory."""
    paths = [source]
    if source.is_dir():
        paths = sorted(Path(top, name) for top, _, names in os.walk(source) for name in names)
    found = []
    for path in paths:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        found.append((os.path.relpath(path, source), digest.hexdigest()))
    return found


@dataclass(frozen=True)
class Prepared:
    """What `Backend.prepare` made of a recipe.

    Attributes:
        image: for `SandboxSpec.image`.
        mounts: for `SandboxSpec.mounts`, beside the others.
        discard: removes it, where it is to serve one run alone: awaited when that has ended.
    """

    image: str | None = None
    mounts: Mapping[str, Path] = field(default_factory=dict)
    discard: Callable[[], Awaitable[None]] | None = None


@dataclass(frozen=True)
class Quota:
    """What an account may have. None: not limited.

    Attributes:
        concurrent: sandboxes at once.
        per_second: creations.
    """

    concurrent: float | None = None
    per_second: float | None = None


def network_kind(network: bool | Sequence[str]) -> str:
    """Which of "none", "hosts" and "internet" a `network` parameter asks for."""
    if isinstance(network, bool):
        return "internet" if network else "none"
    return "hosts"


@dataclass(frozen=True)
class SandboxInfo:
    """A sandbox as `Backend.list` finds it. `created` is in seconds since 1970."""

    id: str
    labels: Mapping[str, str]
    created: float | None = None


@dataclass(frozen=True)
class Completed:
    """The result of `Sandbox.run`."""

    exit_code: int
    stdout: bytes
    stderr: bytes


def refuse_latest(image: str, provider: str) -> None:
    """For providers that keep what they made of an image: one without a version changes.

    Raises:
        SandboxError: with what to write.
    """
    name = image.rpartition("/")[2]
    if "@" in name or (":" in name and not name.endswith(":latest")):
        return
    raise SandboxError(
        f"image={image!r}: name a version or a digest, such as {image.partition(':')[0]}:3.12, "
        f"since {provider} takes no latest one.",
        code="image_failed",
        op="prepare",
        retryable=False,
    )


@contextlib.asynccontextmanager
async def renewed(made: Callable[[], Sandbox | None], lifetime: float) -> AsyncIterator[None]:
    """Keeps a sandbox alive beyond what it was made for.

    Args:
        made: the sandbox, or None while there is none.
        lifetime: seconds that it lives on each time.
    """

    async def renew() -> None:
        while True:
            await anyio.sleep(lifetime / 4)
            # Asked again before its time is over, whatever went wrong; that it is gone is
            # found out elsewhere.
            if (sandbox := made()) is not None:
                with contextlib.suppress(Exception), anyio.fail_after(lifetime / 4):
                    await sandbox.renew(lifetime)

    with plain_errors():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(renew)
            yield
            tasks.cancel_scope.cancel()


class Sandbox(ABC):
    """One disposable machine."""

    #: The backend that made it.
    backend: Backend
    #: Unique within its backend; `Backend.destroy` takes it.
    id: str

    @property
    def python(self) -> str:
        """The Python inside by which what isn't the step's is done."""
        return self.backend.python

    @abstractmethod
    async def exec(
        self,
        argv: Sequence[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        on_stdout: Sink = discard,
        on_stderr: Sink = discard,
        timeout: float | None = None,
    ) -> int:
        """Runs a command and returns its exit code, 128 + n if signal n ended it.

        Output is handed on while the command runs, in order for each stream.
        `argv` is not read by a shell. `env` is added to the sandbox's own
        variables. A command that can't be found exits with 127. If the call is
        cancelled, the command's whole process tree is ended.

        Raises:
            TimeoutError: `timeout` seconds passed; the whole process tree is gone.
            SandboxGone: the sandbox ended before the command did.
            ConnectionLost: only where `stream` is "spool".
        """

    @abstractmethod
    async def write(self, path: str, source: AsyncIterator[bytes]) -> None:
        """Writes a file, making its directory if needed; replaces what was there.

        Raises:
            PermissionError, IsADirectoryError, SandboxGone.
        """

    @abstractmethod
    def read(self, path: str) -> AsyncIterator[bytes]:
        """Streams a regular file.

        Raises (on iteration):
            FileNotFoundError, PermissionError, IsADirectoryError, SandboxGone.
        """

    @abstractmethod
    async def destroy(self) -> None:
        """Ends the sandbox and everything in it. Quiet if it is gone already."""

    # --- built on the four above

    def diagnose(self) -> str | None:
        """What is known from outside about a bad end: that memory ran out, that it was evicted."""
        return None

    def facts(self) -> dict[str, str]:
        """What is recorded with the attempt: how it is isolated, what limits it. No secrets."""
        return {}

    def remarks(self) -> list[str]:
        """What else the user should know of what happened, in sentences: refused hosts."""
        return []

    async def renew(self, lifetime: float) -> None:
        """Has the provider end it so many seconds from now, not before.

        Only called where `Backend.longest_lifetime` is set; again after a while if it raises.

        Raises:
            SandboxError: it could not be done.
        """
        raise NotEnforceable(f"{self.backend.name} can't renew a lifetime", op="renew")

    async def keep(self, mounts: Mapping[str, Path]) -> str:
        """Leaves what is needed to look into this sandbox, which is destroyed after it.

        Only called where `Capabilities.keep` is declared.

        Args:
            mounts: those that somebody who looks needs, and that hold no secret.

        Returns:
            The command by which it is entered.
        """
        raise NotEnforceable(f"{self.backend.name} can't keep a sandbox", op="keep")

    async def write_bytes(self, path: str, data: bytes) -> None:
        """Writes a small file."""

        async def source() -> AsyncIterator[bytes]:
            yield data

        await self.write(path, source())

    async def upload(self, mounts: Mapping[str, Path]) -> list[str]:
        """Sends the content of host directories, all in one file.

        A file among the mounts is an archive of such a directory. Nothing is sent where the
        backend bound the directories (`Backend.binds_mounts`).

        Returns:
            The beginning of a command: it brings everything to its path inside, by the
            sandbox's own Python, and then becomes the command that follows. It holds a lock
            by an inherited descriptor until that command closes it, and may be run again.
        """
        if self.backend.binds_mounts:
            return []
        path = f"{self.backend.work}/.inputs"
        with await anyio.to_thread.run_sync(_bundle, list(mounts.values())) as file:

            async def pieces() -> AsyncIterator[bytes]:
                while piece := await anyio.to_thread.run_sync(file.read, 1 << 20):
                    yield piece

            await self.write(path, pieces())
        python = [self.python, "-W", "ignore", "-I", "-S", "-c", _UNPACK]
        return [*python, f"{path}.lock", path, *mounts, "--"]

    async def deliver(self, mounts: Mapping[str, Path]) -> None:
        """`upload`, and what it returns run at once: for whoever has no command to begin.

        Raises:
            SandboxError: the archive could not be unpacked.
        """
        if not (begin := await self.upload(mounts)):
            return
        result = await self.run([*begin, "true"])
        if result.exit_code != 0:
            raise SandboxError(
                f"the inputs could not be unpacked in the sandbox (exit code {result.exit_code}): "
                f"{result.stderr[-500:].decode(errors='replace')}",
                code="deliver_failed",
                op="deliver",
            )

    async def read_bytes(self, path: str, limit: int) -> bytes:
        """Reads a file of at most `limit` bytes.

        Raises:
            OverflowError: the file is larger.
        """
        data = bytearray()
        async for piece in self.read(path):
            data += piece
            if len(data) > limit:
                raise OverflowError(f"{path} in the sandbox is larger than {limit} bytes")
        return bytes(data)

    async def run(
        self, argv: Sequence[str], *, limit: int = 1 << 20, timeout: float | None = None
    ) -> Completed:
        """Runs a command and keeps up to `limit` bytes of each stream."""
        kept = {"out": bytearray(), "err": bytearray()}

        def keep(name: str) -> Sink:
            async def sink(data: bytes) -> None:
                kept[name] += data[: limit - len(kept[name])]

            return sink

        code = await self.exec(argv, on_stdout=keep("out"), on_stderr=keep("err"), timeout=timeout)
        return Completed(code, bytes(kept["out"]), bytes(kept["err"]))


class Backend(ABC):
    """A provider of sandboxes. Made without arguments; cheap until used."""

    #: What users write: `@sandbox(backend=name)`.
    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    #: Parameters that only this backend's decorator has, with an example of each: strings.
    options: ClassVar[Mapping[str, str]] = {}
    #: What launchers keep to, unless the user set something else.
    quota: Quota = Quota()
    #: Seconds that a sandbox is made for at most, where forgetting one costs money. Launchers
    #: renew it while the step runs. None: they make it for as long as the step may take.
    longest_lifetime: float | None = None
    #: Seconds that a step may take at most, since the provider ends every sandbox then, and
    #: what to do about it, in a sentence. None: as long as it likes.
    longest_step: float | None = None
    longest_step_remedy: str = ""
    #: What a list of hosts lets through beside them, in a sentence.
    hosts_remark: str = ""
    #: Whether what `prepare` makes stays with the provider, where only its user deletes it.
    keeps_builds: bool = False
    #: Whether sandboxes are on somebody else's machines. What a step doesn't ask for is the
    #: provider's to choose then, not METAFLOW_SANDBOX_MEMORY's and METAFLOW_SANDBOX_DISK's.
    hosted: bool = False
    #: A directory inside that the step can write, empty at the start; it may be made by the
    #: first command or file that needs it.
    work: str = "/sandbox"
    #: Where the inputs go inside; the step need not be able to write it.
    inbox: str = "/sandbox/inbox"
    #: A Python interpreter inside, 3.8 or later.
    python: str = "python3"
    #: Whether `create` binds `SandboxSpec.mounts`, so that `deliver` has nothing to do.
    binds_mounts: bool = False

    def least_network(self) -> bool | None:
        """`SandboxSpec.network` of sandboxes for our own work: none, where that can be had."""
        return False if "none" in self.limits().network else None

    @property
    def environments(self) -> str:
        """The directory inside that has the environments: where mounts go, unless the backend
        keeps them in images. There it is one that nothing covers in a sandbox made of them."""
        return f"{self.inbox}/environments"

    @abstractmethod
    async def create(self, spec: SandboxSpec) -> Sandbox:
        """Makes a sandbox. When this raises, nothing is left behind.

        Raises:
            BackendUnavailable: it can't be done here, with what to do about it.
            SandboxError: it failed; `retryable` says whether to try again.
        """

    @abstractmethod
    async def list(self, labels: Mapping[str, str]) -> list[SandboxInfo]:
        """The living sandboxes that have all of these labels."""

    @abstractmethod
    async def destroy(self, sandbox_id: str) -> None:
        """Ends a sandbox by its id. Quiet if there is none."""

    async def preflight(self) -> Preflight:
        """Finds out, before any task starts, whether sandboxes can be made here.

        Raises:
            BackendUnavailable: they can't, with the commands that mend it.
        """
        return Preflight(self.name)

    def sweep(self) -> None:  # noqa: B027 - most have nothing on this machine
        """Ends and removes what launchers that were killed left on this machine."""

    async def prepare(self, recipe: Recipe, say: Say = unsaid) -> Prepared:
        """Gets ready what a step's sandboxes are made from, before any task starts.

        It is kept, found again by `Recipe.key`, and made once by launchers that want it
        at the same time: whoever comes later waits. Unless a backend knows better, what
        `install` makes is kept on this machine, as an archive for `deliver`.

        Raises:
            SandboxError: it isn't there, or can't be made, with what to do.
        """
        from . import build

        if recipe.setup:
            raise NotEnforceable(f"{self.name} can't prepare an image", op="prepare")
        if not recipe.install:
            return Prepared(recipe.image)
        return Prepared(recipe.image, await build.archived(self, recipe, say))

    def beneath(self, recipe: Recipe) -> Recipe:
        """What an environment is installed on, of which the Python is asked first.

        Args:
            recipe: a step's, without an environment.
        """
        return recipe

    def account(self) -> str:
        """Whose quota sandboxes count for, in a form that may be hashed; never a key."""
        return ""

    def interpreter(self, image: str | None) -> str:
        """The Python inside a sandbox made from this image (None: the backend's own choice)."""
        return self.python

    async def shell(self, name: str, argv: Sequence[str]) -> int:
        """Runs a command, at the user's terminal if there is one, in what `keep` left.

        Returns:
            Its exit code.
        """
        raise NotEnforceable(f"{self.name} has no shell", op="shell")

    def refuse(self, spec: SandboxSpec) -> None:
        """For `create` to begin with. Asked before the first task starts, too.

        Raises:
            NotEnforceable: the spec asks for something that can't be had here.
        """
        limits = self.limits()
        for name in ("cpu", "memory", "disk", "gpu", "shared_memory", "image"):
            if getattr(spec, name) is not None and not getattr(limits, name):
                raise NotEnforceable(f"{name} can't be had from {self.name} here", op="create")
        for name in sorted(set(spec.options) - set(self.options)):
            raise NotEnforceable(f"{self.name} has no parameter {name}", op="create")
        if spec.network is not None:
            kind = network_kind(spec.network)
            if kind not in limits.network:
                raise NotEnforceable(f"{self.name} can't give the network {kind!r}", op="create")

    def limits(self) -> Capabilities:
        """The capabilities in force on this machine; by default what the class declares."""
        return self.capabilities
