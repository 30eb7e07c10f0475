"""The client program of Docker or Podman: what its engine can do, and what its errors mean."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from subprocess import DEVNULL
from typing import Any

import anyio
from metaflow import metaflow_config

from ...errors import NOT_SET_UP, BackendUnavailable, SandboxError
from ...text import printable

_INFO_SECONDS = 60.0
_CALL_SECONDS = 300.0
_TRANSIENT = ("i/o timeout", "deadline exceeded", "tls handshake timeout", "connection reset")


class BadImage(SandboxError):
    """An image is not there, or no sandbox can be made from it."""

    code = "bad_image"


def find_program() -> str:
    """The client program.

    Raises:
        BackendUnavailable: there is none.
    """
    asked = metaflow_config.SANDBOX_DOCKER
    names = [asked] if asked else ["docker", "podman"]
    for name in names:
        if found := shutil.which(name):
            return found
    raise BackendUnavailable(
        f"there is no {' and no '.join(names)} on the PATH. Install Docker "
        "(https://docs.docker.com/engine/install/) or Podman (sudo apt install podman).",
        code=None if asked else NOT_SET_UP,
        op="preflight",
    )


@dataclass(frozen=True)
class Engine:
    """An engine as it describes itself.

    Attributes:
        podman: whether it is Podman, some of whose options differ.
        local: whether it sees this machine's files at their paths, as their owner does.
        memory, cpu, processes: whether it holds containers to such a limit.
        sizes: whether its storage driver may limit a container's root.
        runtimes: those that can be named; None: it doesn't say.
        remapped: whether root inside is another user outside.
        swap: whether it can keep memory that is limited out of swap.
    """

    program: str
    podman: bool
    version: str
    local: bool
    memory: bool
    cpu: bool
    processes: bool
    sizes: bool
    runtimes: frozenset[str] | None
    remapped: bool
    groups: str
    swap: bool = True

    @property
    def name(self) -> str:
        return f"{'Podman' if self.podman else 'Docker'} {self.version}"

    def volumes(self, image: dict[str, Any]) -> list[str]:
        """Where an image would have directories on the engine's disk."""
        return [] if self.podman else sorted(image.get("Config", {}).get("Volumes") or {})

    @classmethod
    def ask(cls) -> Engine:
        """Has the engine describe itself. Blocks.

        Raises:
            BackendUnavailable: it doesn't answer, with what to do.
        """
        program = find_program()
        try:
            done = subprocess.run(
                [program, "info", "--format", "{{json .}}"],
                stdin=DEVNULL, capture_output=True, timeout=_INFO_SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise BackendUnavailable(
                f"the engine did not answer `{program} info` within {_INFO_SECONDS:.0f} s: "
                "restart it (sudo systemctl restart docker).",
                op="preflight",
            ) from None
        except OSError as e:
            raise BackendUnavailable(
                f"{program} can't be run: {e.strerror}", op="preflight"
            ) from None
        said = done.stderr.decode(errors="replace")
        try:
            info: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            info = {}
        if done.returncode != 0 or info.get("ServerErrors") or not info:
            text = "\n".join([said, *info.get("ServerErrors", [])])
            raise explain(text, "preflight")
        return cls._podman(program, info) if "host" in info else cls._docker(program, info)

    @classmethod
    def _docker(cls, program: str, info: dict[str, Any]) -> Engine:
        if info.get("OSType") != "linux":
            raise BackendUnavailable(
                "this Docker runs Windows containers. Switch it to Linux containers.",
                op="preflight",
            )
        security = [o.split(",")[0].removeprefix("name=") for o in info["SecurityOptions"] or []]
        details = dict(info.get("DriverStatus") or [])
        return cls(
            program=program,
            podman=False,
            version=info["ServerVersion"],
            local=(
                _here(info.get("KernelVersion"), info.get("Name"))
                and _endpoint(program).startswith("unix:")
                # Inside, these make an owner's private files unreadable.
                and not {"userns", "selinux"} & set(security)
            ),
            memory=bool(info["MemoryLimit"]),
            cpu=bool(info["CpuCfsQuota"]),
            processes=bool(info["PidsLimit"]),
            sizes=(
                info["Driver"] in ("btrfs", "zfs")
                or (info["Driver"] == "overlay2" and details.get("Backing Filesystem") == "xfs")
            ),
            runtimes=frozenset(info.get("Runtimes") or ()),
            remapped=bool({"userns", "rootless"} & set(security)),
            groups=f"control groups, version {info.get('CgroupVersion', '1')}",
            swap=bool(info.get("SwapLimit", True)),
        )

    @classmethod
    def _podman(cls, program: str, info: dict[str, Any]) -> Engine:
        host = info["host"]
        security = host.get("security", {})
        rootless = bool(security.get("rootless"))
        controllers = set(host.get("cgroupControllers") or ())

        def holds(name: str) -> bool:
            # On version 1 a user's limits are ignored, with a warning that nobody reads.
            return not rootless or name in controllers

        return cls(
            program=program,
            podman=True,
            version=info["version"]["Version"],
            local=(
                _here(host.get("kernel"), host.get("hostname"))
                and not host.get("serviceIsRemote")
                and not security.get("selinuxEnabled")
            ),
            memory=holds("memory"),
            cpu=holds("cpu"),
            processes=holds("pids"),
            sizes=False,
            runtimes=None,
            remapped=rootless,
            groups=f"control groups, version {str(host.get('cgroupVersion', 'v1'))[1:]}",
        )

    async def call(self, *arguments: str, seconds: float = _CALL_SECONDS) -> Answer:
        """Runs the client program to its end; it is waited for even when cancelled.

        Raises:
            SandboxError: it did not end within so many seconds.
        """

        def run() -> Answer:
            try:
                done = subprocess.run(
                    [self.program, *arguments],
                    stdin=DEVNULL, capture_output=True, timeout=seconds, check=False,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                raise SandboxError(
                    f"the engine did not answer `{self.program} {arguments[0]}` within "
                    f"{seconds:.0f} s: look at what it is busy with, or restart it.",
                    code="engine_slow",
                    op=arguments[0],
                ) from None
            return Answer(done.returncode, done.stdout, done.stderr.decode(errors="replace"))

        return await anyio.to_thread.run_sync(run)

    async def image(self, name: str) -> dict[str, Any] | None:
        """What the engine knows of an image that it has; None if it hasn't."""
        answer = await self.call("image", "inspect", name)
        if answer.code != 0:
            if is_missing(answer.said):
                return None
            raise explain(answer.said, "prepare")
        found: dict[str, Any] = json.loads(answer.out)[0]
        return found


@dataclass(frozen=True)
class Answer:
    """What a run of the client program gave."""

    code: int
    out: bytes
    said: str


def _here(kernel: object, name: object) -> bool:
    """Whether an engine runs where this process does, not in a machine or container beside it."""
    return platform.system() == "Linux" and kernel == platform.release() and name == platform.node()


def _endpoint(program: str) -> str:
    if host := os.environ.get("DOCKER_HOST"):
        return host
    asked = ["context", "inspect", "--format", "{{.Endpoints.docker.Host}}"]
    done = subprocess.run([program, *asked], stdin=DEVNULL, capture_output=True, check=False)
    return done.stdout.decode(errors="replace").strip()


def is_missing(said: str) -> bool:
    """Whether an engine says that it hasn't got an image."""
    text = said.lower()
    return any(t in text for t in ("no such image", "image not known", "no such object"))


def _tail(said: str) -> str:
    """The end of what a program said, without warnings and what could steer a terminal."""
    lines = [line for line in said.splitlines() if not line.startswith("WARNING: ")]
    text = "\n".join(lines).strip()[-1000:]
    return printable(text)


_UNAVAILABLE = {
    "permission denied while trying to connect": (
        "this user may not use Docker's socket: sudo usermod -aG docker $USER, and log in again. "
        "(Whoever may use it is as good as root.) Without root: rootless Docker, or Podman."
    ),
    "cannot connect to": (
        "Docker doesn't run, or runs elsewhere: sudo systemctl start docker, or start Docker "
        "Desktop; `docker context ls` and DOCKER_HOST say where it is looked for."
    ),
    "is the docker daemon running": "start it: sudo systemctl start docker.",
    "error during connect": "look at DOCKER_HOST and `docker context ls`.",
    "unable to resolve docker endpoint": "look at DOCKER_HOST and `docker context ls`.",
    "newuidmap": "rootless containers need it: sudo apt install uidmap.",
    "cannot set up namespace": "rootless containers need it: sudo apt install uidmap.",
}
_IMAGE = {
    'exec: "python3"': "the image has no python3 on its PATH, which a step needs: 3.8 or later.",
    "executable file `python3` not found": "the image has no python3 on its PATH: 3.8 or later.",
    "exec format error": "the image is for another kind of processor: choose one for this engine.",
    "is too old": "the image's python3 is too old: 3.8 or later.",
}
NO_SPACE = "the engine's disk is full: docker system prune removes what nobody uses."
_OTHER = {
    "no space left on device": ("no_space", NO_SPACE),
    "unknown runtime": ("no_runtime", "name one that `docker info` lists under Runtimes."),
    "unknown or invalid runtime": (
        "no_runtime",
        "name one that `docker info` lists under Runtimes.",
    ),
    "could not select device driver": (
        "no_gpu",
        "the engine can't give GPUs: install the NVIDIA Container Toolkit.",
    ),
    "bind source path does not exist": (
        "create_failed",
        "the engine doesn't see this machine's files there: set TMPDIR to a directory that it "
        "sees (below your home, for Docker from a snap).",
    ),
}


def explain(said: str, op: str) -> SandboxError:
    """The error for what the client program said."""
    text, lower = _tail(said), said.lower()
    for mark, remedy in _UNAVAILABLE.items():
        if mark in lower:
            return BackendUnavailable(f"{text}\n{remedy}", op=op)
    for mark, remedy in _IMAGE.items():
        if mark in lower:
            return BadImage(f"{text}\n{remedy}", op=op, retryable=False)
    for mark, (code, remedy) in _OTHER.items():
        if mark in lower:
            return SandboxError(f"{text}\n{remedy}", code=code, op=op, retryable=False)
    transient = any(mark in lower for mark in _TRANSIENT)
    return SandboxError(
        f"the engine could not do it: {text or 'it said nothing'}",
        code=f"{op}_failed",
        op=op,
        retryable=True if transient and op == "create" else None,
    )


def explain_pull(name: str, lines: Sequence[str]) -> SandboxError:
    """The error for an image that did not come from its registry."""
    text = _tail("\n".join(lines[-3:]))
    lower = text.lower()
    registry = name.partition("/")[0]
    where = f" {registry}" if "/" in name and ("." in registry or ":" in registry) else ""
    reasons = {
        "unauthorized": f"log in and run the flow again: docker login{where}",
        "authentication required": f"log in and run the flow again: docker login{where}",
        "no basic auth credentials": f"log in and run the flow again: docker login{where}",
        "toomanyrequests": f"the registry counts what you pull. Log in: docker login{where}",
        "denied": f"there is none, or you may not have it. Then log in: docker login{where}",
        "no space left": NO_SPACE,
        "no matching manifest": "there is none for this engine's kind of processor.",
        "manifest unknown": "there is no such tag: look at its name.",
        "not found": "there is none of that name: look at it, and at its tag.",
        "invalid reference": "that is no name of an image: name:tag, or registry/name:tag.",
        "http response to https": (
            f"the registry speaks plain HTTP: list {registry} under insecure-registries in the "
            "engine's configuration."
        ),
    }
    for mark, remedy in reasons.items():
        if mark in lower:
            return BadImage(f"image={name!r}: {text}\n{remedy}", op="prepare", retryable=False)
    return BadImage(
        f"image={name!r} can't be pulled: {text}\n"
        "The engine must reach the registry; or bring the image to it: docker load, docker import.",
        op="prepare",
    )
