"""One bubblewrap process, and the socket to the box in it."""

from __future__ import annotations

import array
import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel

from ...egress.rules import Rules
from ...egress.variables import PROXY_PORT, proxy_variables
from ...errors import BackendUnavailable, SandboxError, SandboxGone
from ...leases import Lease
from ...text import printable
from .. import seccomp
from ..base import SandboxSpec
from ..boxed import BoxedSandbox, bundle
from . import image, kept, limits, network, policy, terminal, userns
from .program import program_tree, started

if TYPE_CHECKING:
    from . import Bubblewrap

_START_SECONDS = 30.0
_KEEP_SECONDS = 300.0
_DEFAULT_DISK = 2048
_MESSAGE = 60_000  # bytes of one request to the box
_BOX = Path(__file__).with_name("box.py")
_PLACE = "/mnt"  # where `enter.py` puts what another user could not reach
_ENTER = Path(__file__).with_name("enter.py")

#: Processes and threads that a sandbox may have.
PROCESSES = 2048
_BYTES_PER_INODE = 4096


@dataclass(frozen=True)
class Way:
    """How a sandbox is started here.

    Attributes:
        program: the bubblewrap.
        means: what holds it to its limits; None if only the box's own watcher can.
        route: whether it gets the internet by a device; by the proxy otherwise.
        namespace: whether root needs a user namespace, since it may not mount.
    """

    program: str
    means: limits.Means | None
    route: bool = False
    namespace: bool = False


def _memfd(name: str, content: bytes) -> int:
    fd = os.memfd_create(name)
    os.write(fd, content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


class BubblewrapSandbox(BoxedSandbox):
    """One bubblewrap process and the socket to the box in it. Made by `start` alone."""

    backend: Bubblewrap

    def __init__(self, backend: Bubblewrap, way: Way) -> None:
        self.backend = backend
        self.way = way
        self._cleanup = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._init = -1  # pidfd of the first process inside
        self._group: limits.Group | None = None
        self._gate: network.Gate | None = None
        self._route: network.Route | None = None
        self._proxied = False
        self._passed: str | None = None  # which limit the box's watcher saw passed
        self._ended = False
        self._info_text = b""
        #: Why it has the proxy alone, where this machine should give it more.
        self.routeless = ""

    @classmethod
    async def start(
        cls,
        backend: Bubblewrap,
        way: Way,
        spec: SandboxSpec,
        writable: Mapping[str, Path] | None = None,
    ) -> BubblewrapSandbox:
        """Starts a sandbox and waits until its box answers.

        Args:
            writable: {path inside: directory}, for our own programs alone.
        """
        sandbox = cls(backend, way)
        try:
            await sandbox._start(spec, writable or {})
        except BaseException:
            with anyio.CancelScope(shield=True):
                await sandbox.destroy()
            raise
        return sandbox

    async def _start(self, spec: SandboxSpec, writable: Mapping[str, Path]) -> None:
        self._spec = spec
        lease = Lease("box")
        self._cleanup.callback(lease.release)
        self.id = lease.id
        process = self._process = self._spawn(spec, writable)
        try:
            with anyio.fail_after(_START_SECONDS):
                await self._open_init()
                # Before anything of an image runs, which could undo what ends it with us.
                record = {
                    "labels": dict(spec.labels),
                    "pid": process.pid,
                    "init": self._init_pid,
                    "started": started(self._init_pid),
                }
                (lease.path / "record.json").write_text(json.dumps(record))
                await self._limit(spec)
                if self._route is not None:
                    await self._route.open(self._init_pid)
                os.write(self._block, b"1")
                await self._answered(spec)
                if self.way.means is not None:
                    self.way.means.settle(process.pid)
        except (BrokenPipeError, ProcessLookupError, FileNotFoundError):
            raise await self._died() from None
        except TimeoutError:
            raise SandboxError(
                f"bubblewrap did not start within {_START_SECONDS:.0f} s: {self._said()}",
                code="create_failed",
                op="create",
                retryable=True,
            ) from None

    def _spawn(self, spec: SandboxSpec, writable: Mapping[str, Path]) -> subprocess.Popen[bytes]:
        """Starts bubblewrap, which waits before it runs anything."""
        root = image.root(spec.image) if spec.image else policy.host_root()
        # As root another user runs bubblewrap for an image, or else the box becomes
        # one: another for each sandbox, so that they can't signal each other and each
        # has a limit of processes of its own.
        uid = 1000
        if as_root := userns.global_root():
            uid = self.backend.uids.take()
            self._cleanup.callback(self.backend.uids.give_back, uid)
            for directory in writable.values():
                os.chown(directory, uid, uid)
        before = False
        moved: dict[Path, str] = {}
        if as_root and isinstance(root, policy.ImageRoot):
            before = True
            # Not what everybody may read: AppArmor knows /usr/bin/bwrap by that path alone.
            program = [program_tree(self.way.program)]
            trees = [root.path, *spec.mounts.values(), *writable.values()]
            trees += [t for t in program if t != Path("/usr")]
            moved = {tree: f"{_PLACE}/{i}" for i, tree in enumerate(trees)}

        control, inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._cleanup.callback(control.close)
        control.setblocking(False)
        self._control = control
        with contextlib.ExitStack() as inherited:  # closed as soon as the child has its own

            def pass_on(fd: int) -> int:
                inherited.callback(os.close, fd)
                return fd

            def keep(fd: int) -> int:
                self._cleanup.callback(os.close, fd)
                return fd

            box_socket = pass_on(inside.detach())
            owner = (1000, 1000) if before else (uid, uid)
            files = {
                "/etc/passwd": policy.PASSWD % owner,
                "/etc/group": policy.GROUP % owner[0],
                "/etc/hosts": policy.HOSTS,
                "/run/box.py": bundle(_BOX),
            }
            variables = {
                "HOME": f"{policy.WORK}/home",
                "TMPDIR": f"{policy.WORK}/tmp",
                "PATH": f"{Path(policy.PYTHON).parent}:/usr/local/bin:/usr/bin:/bin",
                "LANG": "C.UTF-8",
                "USER": "sandbox",
            }
            if isinstance(root, policy.ImageRoot):
                variables.pop("PATH")
                variables = {"PATH": image.PATH, **root.variables, **variables}
            proxied = self._proxied = self._connect(spec, files, variables)
            info, info_write = os.pipe()
            block_read, self._block = os.pipe()
            self._info, self._errors = keep(info), keep(os.memfd_create("errors"))
            keep(self._block), pass_on(info_write), pass_on(block_read)
            filter_fd = pass_on(_memfd("seccomp", seccomp.program()))
            contents = {path: pass_on(_memfd("file", data)) for path, data in files.items()}
            options = policy.options(
                root=root,
                mounts=spec.mounts,
                writable=writable,
                disk=spec.disk or _DEFAULT_DISK,
                shared_memory=spec.shared_memory,
                files=contents,
                as_root=as_root and not before,
                environment=variables,
                moved=moved,
            )
            options += ["--seccomp", str(filter_fd), "--info-fd", str(info_write)]
            options += ["--block-fd", str(block_read)]
            joined = pass_on(userns.with_two_users(uid)) if self.way.namespace else None
            if joined is not None and not before:
                options += ["--userns", str(joined)]
            args = pass_on(_memfd("args", b"\0".join(os.fsencode(o) for o in options)))
            watched = self.way.means is None
            config = {
                "lifetime": spec.lifetime,
                "processes": PROCESSES,
                "uid": uid if as_root and not before else None,
                "memory": (spec.memory or 1 << 40) << 20 if watched else None,
                "inodes": ((spec.disk or _DEFAULT_DISK) << 20) // _BYTES_PER_INODE,
                "proxy": PROXY_PORT if proxied else None,
            }
            command = [
                self.way.program, "--args", str(args), "--",
                self.backend.interpreter(spec.image), "-I", "-S", "/run/box.py",
                str(box_socket), json.dumps(config),
            ]  # fmt: skip
            passed = [args, filter_fd, info_write, block_read, box_socket, *contents.values()]
            if joined is not None:
                passed.append(joined)
            if before:
                home, started_by = program_tree(self.way.program), self.way.program
                if home in moved:
                    started_by = f"{moved[home]}/{Path(self.way.program).relative_to(home)}"
                entry = {
                    "uid": uid,
                    "processes": PROCESSES,
                    "userns": joined,
                    "place": _PLACE,
                    "binds": {str(tree): os.path.basename(p) for tree, p in moved.items()},
                    "argv": [started_by, *command[1:]],
                }
                passed.append(pass_on(_memfd("entry", json.dumps(entry).encode())))
                command = [sys.executable, "-I", "-S", str(_ENTER), str(passed[-1])]
            environment = {"PATH": "/usr/bin:/bin"}
            if self.way.means is not None:
                command = self.way.means.prefix(self.id) + command
                environment |= self.way.means.environment()
            # Spawned from this thread, not from a worker: --die-with-parent follows
            # the thread, and this one lives as long as the event loop.
            return subprocess.Popen(
                command,
                pass_fds=passed,
                stdin=subprocess.DEVNULL,
                stdout=self._errors,
                stderr=self._errors,
                cwd="/",
                env=environment,
            )

    def _connect(
        self, spec: SandboxSpec, files: dict[str, bytes], variables: dict[str, str]
    ) -> bool:
        """Prepares the network that was asked for. Returns whether it is the proxy."""
        if spec.network is False:
            return False
        if self.way.route:
            self._route = network.Route()
            files["/etc/resolv.conf"] = network.RESOLV
            return False
        variables.update(proxy_variables())
        return True

    async def _open_init(self) -> None:
        os.set_blocking(self._info, False)
        while b"}" not in self._info_text:
            await anyio.wait_readable(self._info)
            if not (piece := os.read(self._info, 4096)):
                raise BackendUnavailable(self._said(), op="create")
            self._info_text += piece
        self._init_pid = json.loads(self._info_text)["child-pid"]
        self._init = os.pidfd_open(self._init_pid)
        self._cleanup.callback(os.close, self._init)

    async def _limit(self, spec: SandboxSpec) -> None:
        # Again by the first process, for root's sandboxes when it has become another user.
        with contextlib.suppress(PermissionError):
            resource.prlimit(self._init_pid, resource.RLIMIT_NPROC, (PROCESSES, PROCESSES))
        means = self.way.means
        if means is None:
            return
        limit = limits.Limits(
            memory=spec.memory,
            processes=PROCESSES if "processes" in means.enforces else None,
            cpu=spec.cpu,
        )
        try:
            self._group = await anyio.to_thread.run_sync(means.hold, self.id, limit, self._init_pid)
        except ProcessLookupError:
            raise
        except OSError as e:
            raise SandboxError(
                f"the limits could not be set by {means.name}: {e}",
                code="create_failed",
                op="create",
            ) from e

    async def _answered(self, spec: SandboxSpec) -> None:
        await anyio.wait_readable(self._control)
        answer, fds, _, _ = socket.recv_fds(self._control, 16, 1)
        if not answer:
            for fd in fds:
                os.close(fd)
            raise BackendUnavailable(self._said(), op="create")
        # In an image the first process may be anything: it gets no proxy that nobody asked for.
        listener = network.listener(fds[0]) if fds and self._proxied else None
        if answer != b"ready" or bool(fds) != self._proxied or (fds and listener is None):
            if listener is not None:
                listener.close()
            else:
                for fd in fds:
                    os.close(fd)
            raise SandboxError(
                f"the first process of the sandbox sent {answer!r} and {len(fds)} descriptors "
                "where it should say that it is ready: its image has a python3 that is none",
                code="create_failed",
                op="create",
                retryable=False,
            )
        if listener is not None:
            self._gate = network.Gate(self.backend.portals)
            listed = None if isinstance(spec.network, bool) else tuple(spec.network or ())
            rules = Rules(hosts=listed)
            await self._gate.open(listener, rules)

    async def _died(self) -> BackendUnavailable:
        """The error for a first process that is gone before it ran anything."""
        if self._process is not None:
            with anyio.move_on_after(1):  # to say why
                await anyio.to_thread.run_sync(self._process.wait, abandon_on_cancel=True)
        return BackendUnavailable(self._said(), op="create")

    def _said(self) -> str:
        """What bubblewrap printed before it gave up."""
        os.lseek(self._errors, 0, os.SEEK_SET)
        text = os.read(self._errors, 4096).decode(errors="replace")
        # An image's Python can print here, too.
        text = printable(text).strip()
        code = self._process.poll() if self._process is not None else None
        return text or f"it ended with exit code {code} and said nothing"

    # --- keep and enter

    async def keep(self, mounts: Mapping[str, Path]) -> str:
        directory = kept.begin()
        try:
            await self._pack(directory / kept.ARCHIVE)
            name = kept.name_of(self._spec, self.id)
            name = kept.finish(directory, name, self._spec, mounts)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        return f"metaflow-sandbox shell {name}"

    async def _pack(self, archive: Path) -> None:
        """Stores the work directory.

        Raises:
            SandboxError: it is too large, or not all of it can be read.
        """
        # Twice what it may hold, since every file has a header. But a file may say that
        # it is larger than any disk, and hold nothing.
        most = (self._spec.disk or _DEFAULT_DISK) << 21
        with open(archive, "wb") as file:

            async def store(data: bytes) -> None:
                if file.tell() + len(data) > most:
                    raise SandboxError(f"as an archive they have over {most >> 20} MB", op="keep")
                file.write(data)

            command = [self.backend.interpreter(self._spec.image), "-I", "-S", "-c", kept.PACK]
            code = await self.exec([*command, policy.WORK], on_stdout=store, timeout=_KEEP_SECONDS)
        if code != 0:
            raise SandboxError("not all of them can be read", op="keep")

    async def terminal(self, argv: Sequence[str]) -> int:
        """Runs a command at this process's terminal. Returns its exit code."""
        master, slave = os.openpty()
        stdin = sys.stdin.fileno()
        terminal.copy_size(stdin, master)
        request = {
            "op": "terminal", "argv": list(argv), "cwd": policy.WORK,
            "env": {"TERM": os.environ.get("TERM", "dumb")},
        }  # fmt: skip
        try:
            with terminal.raw_mode(stdin):
                async with self._operation(request, slave) as line:
                    await terminal.join(master)
                    return await self._result(line, "terminal")
        finally:
            os.close(master)

    # --- operations

    def _send(self, request: dict[str, Any], line: socket.socket, fds: Sequence[int]) -> None:
        message = json.dumps(request).encode()
        try:
            if len(message) > _MESSAGE:
                raise SandboxError(
                    f"the arguments of a command are longer than {_MESSAGE} bytes: write them to "
                    "a file in the sandbox",
                    code="too_long",
                    op=request["op"],
                    retryable=False,
                )
            payload = array.array("i", [line.fileno(), *fds]).tobytes()
            self._control.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, payload)])
        except OSError as e:
            raise SandboxGone("the sandbox has ended", op=request["op"]) from e
        finally:
            line.close()
            for fd in fds:
                os.close(fd)

    def diagnose(self) -> str | None:
        if self._group is not None and (kills := self._group.kills()):
            return (
                f"the kernel ended {kills} of the step's processes because the sandbox reached "
                "its memory limit: give it more with memory=… (MB)"
            )
        if self._passed is None and not self._ended and self._process is not None:
            with contextlib.suppress(OSError):
                said = self._control.recv(16)
                self._passed = said.decode() if said in (b"memory", b"inodes") else None
        if self._passed == "memory":
            return (
                "the sandbox was ended because its processes and files used more memory than "
                "its limit: give it more with memory=… (MB)"
            )
        if self._passed == "inodes":
            return (
                "the sandbox was ended because it made more files than its disk is meant to "
                "hold: give it more with disk=… (MB)"
            )
        return None

    def facts(self) -> dict[str, str]:
        connected = "proxy" if self._gate else "device" if self._route else "none"
        return {
            "sandbox-provider": f"bubblewrap at {self.way.program}",
            "sandbox-limits": self.way.means.name if self.way.means else "watcher",
            "sandbox-network": connected,
        }

    def remarks(self) -> list[str]:
        found = self._gate.refusals() if self._gate is not None else {}
        refused = [f"network: {target} was refused: {reason}" for target, reason in found.items()]
        return ([self.routeless] if self.routeless else []) + refused

    async def destroy(self) -> None:
        if self._ended:
            return
        self.diagnose()
        self._ended = True
        with anyio.CancelScope(shield=True):
            if self._process is not None and self._init < 0:
                # Killed before it has told its child to go on, bubblewrap leaves a child
                # that waits for it for ever: learn who that is first.
                errors = (SandboxError, OSError, ValueError)
                with anyio.move_on_after(5), contextlib.suppress(*errors):
                    await self._open_init()
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
            if self._gate is not None:
                await self._gate.close()
            if self._route is not None:
                await self._route.close()
            if self._group is not None:
                await anyio.to_thread.run_sync(self._group.remove)
            self._cleanup.close()
