"""What a sandbox may reach: nothing, some hosts through a proxy, or the internet.

Every sandbox has a network namespace of its own, with a loopback device alone.

    hosts       an HTTP proxy on the host. Its socket is made inside by `box.py`, so the
                step can reach it, and answered by this process, outside
    internet    a device that slirp4netns serves, with a filter in the sandbox's own
                namespace, where slirp4netns and nft are installed; else the proxy
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
from anyio.from_thread import BlockingPortalProvider

from ...egress.rules import Rules
from ...errors import BackendUnavailable
from . import userns
from .program import mapped

if TYPE_CHECKING:
    from ...egress.proxy import Proxy

_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_PROGRAMS = ("slirp4netns", "nft", "nsenter", "unshare")
_DEVICE, _RESOLVER = "tap0", "10.0.2.3"  # as slirp4netns has them
RESOLV = f"nameserver {_RESOLVER}\n".encode()
_READY_SECONDS = 10.0
# For its own sandbox slirp4netns detaches all mounts of a namespace in which only the root is
# private. As root that takes what lies below any other shared mount from the whole machine:
# /dev/pts and /run/user, where systemd runs, and the roots of containers that start.
_APART = ("unshare", "--mount", "--propagation", "slave")


def route_available() -> bool:
    """Whether the internet can be given as a device, not as a proxy."""
    return (
        all(shutil.which(program, path=_PATH) for program in _PROGRAMS)
        and os.access("/dev/net/tun", os.R_OK | os.W_OK)
    )  # fmt: skip


def listener(fd: int) -> socket.socket | None:
    """A socket that a proxy can answer on, of a descriptor that came from inside; or None."""
    try:
        found = socket.socket(fileno=fd)
    except OSError:  # no socket at all
        return None
    listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if found.family == socket.AF_INET and found.type == socket.SOCK_STREAM and listens:
        return found
    found.detach()
    return None


class Gate:
    """The proxy of one sandbox. It runs in a thread that all sandboxes of this process share."""

    def __init__(self, portals: BlockingPortalProvider) -> None:
        self._portals = portals
        self._cleanup = contextlib.ExitStack()
        self._proxy: Proxy | None = None

    async def open(self, listener: socket.socket, rules: Rules) -> None:
        """Answers on a listening socket, which is closed in the end."""
        self._cleanup.callback(listener.close)
        listener.setblocking(False)

        def start() -> Proxy:
            from ...egress.proxy import proxy

            portal = self._cleanup.enter_context(self._portals)
            serving = portal.wrap_async_context_manager(proxy(listener, rules))
            return self._cleanup.enter_context(serving)

        self._proxy = await anyio.to_thread.run_sync(start)

    def refusals(self) -> dict[str, str]:
        """{"host:port": why} of what the step asked for and did not get."""
        return dict(self._proxy.refusals) if self._proxy is not None else {}

    async def close(self) -> None:
        await anyio.to_thread.run_sync(self._cleanup.close)


class Route:
    """A device for one sandbox, behind which slirp4netns makes its connections."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._cleanup = contextlib.ExitStack()
        self._errors = os.memfd_create("slirp4netns")
        self._cleanup.callback(os.close, self._errors)

    async def open(self, init: int) -> None:
        """Gives a sandbox, whose first process doesn't run yet, a filter and then a device.

        Raises:
            BackendUnavailable: one of them can't be had; the sandbox must not start.
        """
        await mapped(init)
        with contextlib.ExitStack() as opened:

            def keep(fd: int) -> int:
                opened.callback(os.close, fd)
                return fd

            network = keep(os.open(f"/proc/{init}/ns/net", os.O_RDONLY | os.O_CLOEXEC))
            # It may belong to a user namespace, which only that one's maker enters with
            # all rights.
            if (owner := userns.owner_of(network)) is not None:
                keep(owner)
            await self._filter(network, owner)
            await self._device(network, owner)

    async def _filter(self, network: int, owner: int | None) -> None:
        inherited = [fd for fd in (network, owner) if fd is not None]
        with os.fdopen(os.memfd_create("rules"), "w+b") as rules:
            rules.write(rules_text().encode())
            rules.seek(0)
            done = await anyio.run_process(
                [*_enter(owner, network), "nft", "-f", "-"],
                stdin=rules,
                check=False,
                env={"PATH": _PATH},
                pass_fds=inherited,
            )
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip()
            raise BackendUnavailable(f"nft could not set the network filter: {said}", op="create")

    async def _device(self, network: int, owner: int | None) -> None:
        ready, ready_inside = os.pipe()
        exit_inside, exit_ = os.pipe()
        self._cleanup.callback(os.close, exit_)  # it ends when this closes, also if we are killed
        inherited = [fd for fd in (ready_inside, exit_inside, network, owner) if fd is not None]
        try:
            self._process = subprocess.Popen(
                [*_enter(owner), *_APART, "slirp4netns", "--configure", "--mtu=65520",
                 "--disable-host-loopback", "--enable-sandbox", "--enable-seccomp",
                 f"--ready-fd={ready_inside}", f"--exit-fd={exit_inside}", "--netns-type=path",
                 f"/proc/self/fd/{network}", _DEVICE],
                pass_fds=inherited,
                stdin=subprocess.DEVNULL,
                stdout=self._errors,
                stderr=self._errors,
                env={"PATH": _PATH},
                cwd="/",
            )  # fmt: skip
        except OSError:
            os.close(ready)
            raise
        finally:
            os.close(ready_inside)
            os.close(exit_inside)
        try:
            with anyio.move_on_after(_READY_SECONDS):
                os.set_blocking(ready, False)
                await anyio.wait_readable(ready)
                if os.read(ready, 1):
                    return
        finally:
            os.close(ready)
        os.lseek(self._errors, 0, os.SEEK_SET)
        said = os.read(self._errors, 4000).decode(errors="replace").strip()
        raise BackendUnavailable(f"slirp4netns did not start: {said}", op="create")

    async def close(self) -> None:
        self._cleanup.close()
        if self._process is not None:
            with anyio.move_on_after(2):
                await anyio.to_thread.run_sync(self._process.wait, abandon_on_cancel=True)
            self._process.kill()
            await anyio.to_thread.run_sync(self._process.wait)


def _enter(owner: int | None, network: int | None = None) -> list[str]:
    """What runs a command with all rights over a user namespace that this user made."""
    options = []
    if network is not None:
        options += [f"--net=/proc/self/fd/{network}"]
    if owner is not None:
        options += [f"--user=/proc/self/fd/{owner}", "--preserve-credentials"]
    return ["nsenter", *options] if options else []


def rules_text() -> str:
    """What nft loads: the resolver's port, then nothing that isn't public, nor this machine."""
    from ...egress.addresses import NOT_PUBLIC

    refused = [str(n) for n in NOT_PUBLIC if n.version == 4]
    refused += [a for a in own_addresses() if not a.startswith("127.")]
    return f"""
table inet sandbox {{
    set refused {{
        type ipv4_addr
        flags interval
        auto-merge
        elements = {{ {", ".join(refused)} }}
    }}
    chain output {{
        type filter hook output priority 0; policy accept;
        oifname "lo" accept
        ip daddr {_RESOLVER} udp dport 53 accept
        ip daddr {_RESOLVER} tcp dport 53 accept
        ip daddr @refused reject
        meta nfproto ipv6 reject
    }}
}}
"""


def own_addresses() -> list[str]:
    """This machine's IPv4 addresses, by the kernel's routing table."""
    found, last = set(), ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/fib_trie").read_text().splitlines():
            words = line.split()
            if words[:1] == ["|--"]:
                last = words[1]
            elif words[:3] == ["/32", "host", "LOCAL"]:
                found.add(last)
    return sorted(found)
