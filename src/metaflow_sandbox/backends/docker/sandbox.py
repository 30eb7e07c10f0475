"""One container, the client program that is attached to it, and the link to its first process."""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import json
import os
import subprocess
import tempfile
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from resource import RLIMIT_NOFILE, getrlimit
from socket import socket
from typing import TYPE_CHECKING, Any

import anyio
from anyio.from_thread import BlockingPortal

from ...egress.rules import Rules
from ...egress.variables import PROXY_PORT, proxy_variables
from ...errors import SandboxError, SandboxGone
from .. import seccomp
from ..base import SandboxSpec
from ..boxed import BoxedSandbox, bundle
from .engine import Engine, explain
from .link import READY, Link, write

if TYPE_CHECKING:
    from . import Docker

#: On every container of ours: when it was made, and its labels as they were given.
MARK = "metaflow-sandbox"
#: On them too, but not on what users make of images of ours, which have the labels of what they
#: were made from.
MADE = "metaflow-sandbox-made=container"
#: Processes and threads that a container may have.
PROCESSES = 2048
_START_SECONDS = 120.0
_END_SECONDS = 10.0
_DEFAULT_DISK = 2048
_BYTES_PER_INODE = 4096
_BOX = Path(__file__).with_name("box.py")
_KILLED = 137
# What dpkg, apt and pip need to install as root, and `KILL`, by which the first process ends
# what changed its user. Not what Docker gives beyond: raw sockets, device nodes, chroot, low
# ports, audit records.
_CAPABILITIES = (
    "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "SETFCAP", "SETGID", "SETUID",
)  # fmt: skip
# The first process gets its program by its input: no file has to be in the container before.
_BOOTSTRAP = """
import os, sys
if sys.version_info < (3, 8):
    sys.exit("python3 " + sys.version.split()[0] + " is too old")
program = b""
while len(program) < int(sys.argv[1]):
    piece = os.read(0, int(sys.argv[1]) - len(program))
    if not piece:
        os._exit(1)
    program += piece
exec(compile(program, "box", "exec"))
"""
_PROXY_VARIABLES = ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy")


class DockerSandbox(BoxedSandbox):
    """A container that ends with the connection to it. Made by `start` alone.

    Args:
        image: what the engine says of the image.
        writable: whether its root can be written, on the engine's disk.
        sized: whether the engine limits that.
        bound: whether mounts are bound.
    """

    backend: Docker

    def __init__(
        self,
        backend: Docker,
        engine: Engine,
        spec: SandboxSpec,
        image: dict[str, Any],
        *,
        writable: bool = False,
        sized: bool = False,
        bound: bool = False,
    ) -> None:
        self.backend = backend
        self.id = f"metaflow-sandbox-{uuid.uuid4().hex[:12]}"
        self._engine = engine
        self._spec = spec
        self._image = image
        self._writable = writable or sized
        self._sized = sized
        self._bound = bound
        self._cleanup = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._portal: BlockingPortal | None = None
        self._link: Link | None = None
        self._running: Future[None] | None = None
        self._began = time.time()
        self._out_of_memory = False
        self._ended = False

    async def start(self) -> DockerSandbox:
        """Starts the container and waits until its first process answers."""
        try:
            await self._start()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.destroy()
            raise
        return self

    async def _start(self) -> None:
        self._errors = self._cleanup.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        box = bundle(_BOX)
        inside, into = os.pipe()
        out, outside = os.pipe()
        with contextlib.ExitStack() as ours:  # until the link has them
            for fd in (into, out):
                ours.callback(os.close, fd)
                os.set_blocking(fd, False)
            try:
                self._process = subprocess.Popen(
                    [*self._command(), *self._first(len(box))],
                    stdin=inside,
                    stdout=outside,
                    stderr=self._errors,
                    start_new_session=True,  # Ctrl-C is for us to act on
                )
            finally:
                os.close(inside)
                os.close(outside)
            try:
                with anyio.fail_after(_START_SECONDS):
                    with contextlib.suppress(BrokenPipeError):
                        await write(into, box + json.dumps(self._settings()).encode() + b"\n")
                    await self._answered(out)
            except TimeoutError:
                raise SandboxError(
                    f"a container did not start within {_START_SECONDS:.0f} s: {self._said()}",
                    code="create_failed",
                    op="create",
                    retryable=True,
                ) from None
            portal = await anyio.to_thread.run_sync(
                self._cleanup.enter_context, self.backend.portals
            )
            ours.pop_all()
        self._portal = portal
        self._link = Link(into, out, self._rules(), self._learn)
        self._running = portal.start_task_soon(self._link.run)

    async def _answered(self, out: int) -> None:
        answer = b""
        while len(answer) < len(READY):
            await anyio.wait_readable(out)
            piece = os.read(out, len(READY) - len(answer))
            answer += piece
            if not piece or not READY.startswith(answer):
                await self._client_ended()
                said = self._said()
                if piece:
                    said = f"the image's python3 is none: it answers {answer!r}. {said}"
                raise explain(said, "create")

    async def _client_ended(self) -> int | None:
        """Waits for the client program, for a while. Returns its exit code."""
        process = self._process
        if process is None:
            return None

        def wait() -> int | None:
            try:
                return process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                return None

        return await anyio.to_thread.run_sync(wait)

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read(1 << 16).decode(errors="replace")

    # --- what it is

    def _rules(self) -> Rules | None:
        network = self._spec.network
        if network is False:
            return None
        return Rules(hosts=None if isinstance(network, bool) else tuple(network or ()))

    def _settings(self) -> dict[str, Any]:
        variables = {"HOME": f"{self.backend.work}/home", "TMPDIR": f"{self.backend.work}/tmp"}
        proxied = self._rules() is not None
        return {
            "lifetime": self._spec.lifetime,
            "variables": {**variables, **(proxy_variables() if proxied else {})},
            "work": self.backend.work,
            "proxy": PROXY_PORT if proxied else None,
            "filters": {
                machine: base64.b64encode(seccomp.program(machine)).decode()
                for machine in seccomp.SUPPORTED
            },
        }

    def _first(self, length: int) -> list[str]:
        python = self.backend.interpreter(self._spec.image)
        return [
            "--entrypoint", python, self._image["Id"],
            "-I", "-S", "-c", _BOOTSTRAP, str(length),
        ]  # fmt: skip

    def _command(self) -> list[str]:
        engine, spec = self._engine, self._spec
        mark = json.dumps({"created": self._began, "labels": dict(spec.labels)})
        options = [
            "--rm", "--interactive", "--pull", "never", "--name", self.id,
            "--label", f"{MARK}={mark}", "--label", MADE,
            *(f"--label={name}={value}" for name, value in spec.labels.items()),
            "--network", "none", "--hostname", "sandbox", "--ipc", "private",
            "--cgroupns", "private",  # on version 1 it would be the host's
            "--user", "0:0", "--workdir", "/",
            "--cap-drop", "ALL", *(f"--cap-add={name}" for name in _CAPABILITIES),
            "--security-opt", "no-new-privileges",
            "--log-driver", "none", "--no-healthcheck", "--ulimit", "core=0",
        ]  # fmt: skip
        if engine.podman:
            # It would take the host's proxies along, and read the stream for keys to press.
            options += ["--http-proxy=false", "--detach-keys=", "--image-volume=ignore"]
            # It would raise these to its own defaults, for which not every root has the right.
            if engine.local:
                soft, hard = getrlimit(RLIMIT_NOFILE)
                options += ["--ulimit", f"nofile={soft}:{hard}"]
                options += ["--ulimit", f"nproc={PROCESSES}:{PROCESSES}"]
        else:
            # The client's configuration may have proxies, with passwords, for every container.
            names = [n for name in _PROXY_VARIABLES for n in (name, name.upper())]
            options += [f"--env={name}=" for name in names]
            # The engine would tell a container the host's own resolvers.
            options += ["--dns", "127.0.0.1", "--dns-search", "."]
        if engine.processes:
            options += ["--pids-limit", str(PROCESSES)]
        if spec.memory is not None:
            options += ["--memory", f"{spec.memory}m", "--memory-swap", f"{spec.memory}m"]
        if spec.cpu is not None:
            options += ["--cpus", str(spec.cpu)]
        if spec.gpu is not None:
            options += ["--gpus", str(spec.gpu)]
        if runtime := spec.options.get("runtime"):
            options += ["--runtime", runtime]
        options += self._storage()
        if self._bound:
            for target, source in spec.mounts.items():
                options += ["--mount", _fields("type=bind", f"source={source}",
                                               f"target={target}", "readonly")]  # fmt: skip
        return [engine.program, "run", *options]

    def _storage(self) -> list[str]:
        """What can be written, and how much: nothing on the host grows beyond `disk`."""
        size = (self._spec.disk or _DEFAULT_DISK) << 20
        shared = (self._spec.shared_memory or 0) << 20
        options = [f"--shm-size={shared or size // 8}"]
        if self._sized:
            return [*options, "--storage-opt", f"size={size}"]
        if not self._writable:
            options += ["--read-only"]
        if self._writable and not self._spec.disk:
            return options
        shares = {self.backend.work: size // 4 * 3, "/tmp": size // 8}
        # A volume that an image declares would be a directory on the engine's disk.
        volumes = self._engine.volumes(self._image)
        shares.update({volume: size // 8 for volume in volumes if volume not in shares})
        for path, share in shares.items():
            mode = "0755" if path == self.backend.work else "1777"
            limits = f"size={share},mode={mode}"
            if not self._engine.podman:  # which has no such option; there memory is their limit
                limits += f",nr_inodes={max(share // _BYTES_PER_INODE, 64)}"
            options += ["--tmpfs", f"{path}:rw,exec,nosuid,nodev,{limits}"]
        return options

    # --- operations

    def _send(self, request: dict[str, Any], line: socket, fds: Sequence[int]) -> None:
        with contextlib.ExitStack() as owned:
            owned.enter_context(line)
            for fd in fds:
                owned.callback(os.close, fd)
            if self._ended or self._running is None or self._running.done():
                raise SandboxGone(self.diagnose() or "the sandbox has ended", op=request["op"])
            assert self._portal is not None and self._link is not None  # noqa: S101
            self._portal.start_task_soon(self._link.attend, request, line, fds)
            owned.pop_all()

    async def _learn(self) -> None:
        """Finds out why a container ended by itself, before who waits for it is told."""
        if self._ended:
            return
        code = await self._client_ended()
        if code == _KILLED and not self._engine.podman:
            with contextlib.suppress(SandboxError):
                answer = await self._engine.call(
                    "events", "--since", f"{self._began - 1:.3f}", "--until", f"{time.time():.3f}",
                    "--filter", f"container={self.id}", "--filter", "event=oom",
                    "--format", "{{.ID}}",
                )  # fmt: skip
                self._out_of_memory = bool(answer.out.strip())

    def diagnose(self) -> str | None:
        kills = self._link.memory_kills if self._link is not None else 0
        if kills or self._out_of_memory:
            return (
                f"the kernel ended {kills or 'some'} of the step's processes because the container "
                "reached its memory limit, in which files in memory count: give it more with "
                "memory=… (MB)"
            )
        return None

    def facts(self) -> dict[str, str]:
        digests = self._image.get("RepoDigests") or []
        root = "sized" if self._sized else "writable" if self._writable else "read-only"
        return {
            "sandbox-provider": self._engine.name,
            "sandbox-image": digests[0] if digests else self._image["Id"],
            "sandbox-runtime": self._spec.options.get("runtime", "the engine's default"),
            "sandbox-root": f"{root}, {'' if self._engine.remapped else 'not '}remapped",
            "sandbox-limits": self._engine.groups,
            "sandbox-network": "none" if self._rules() is None else "proxy",
        }

    def remarks(self) -> list[str]:
        found = self._link.refusals() if self._link is not None else {}
        return [f"network: {target} was refused: {reason}" for target, reason in found.items()]

    async def destroy(self) -> None:
        if self._ended:
            return
        self._ended = True
        with anyio.CancelScope(shield=True):
            if self._portal is not None and self._link is not None:
                # With the connection the container ends, and the engine removes it.
                self._portal.start_task_soon(self._link.hang_up)
            code = await self._client_ended()
            if code is None or code < 0 or self._link is None:
                await self.backend.destroy(self.id)
            if self._process is not None:
                self._process.kill()
                await anyio.to_thread.run_sync(self._process.wait)
            await anyio.to_thread.run_sync(self._cleanup.close)


def _fields(*fields: str) -> str:
    """One argument of several fields, of which any may have a comma."""
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(fields)
    return text.getvalue()
