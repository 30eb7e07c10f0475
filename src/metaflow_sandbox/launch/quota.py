"""How many sandboxes of an account there may be at once, and how fast they are made.

A provider refuses what is over an account's limits, and a foreach of 500 would fail on
an account of 20. So launchers wait, across all runs of this user on this machine. Each
place is a locked file, which the kernel unlocks when its owner ends, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import anyio
from metaflow import metaflow_config

from ..backends import registry
from ..backends.base import Backend, Quota
from ..errors import SandboxError
from ..leases import base

_POLL_SECONDS = 0.25
_SAY_AFTER, _SAY_AGAIN = 2.0, 60.0


def quota_of(backend: Backend) -> Quota:
    """A backend's own limits, with those that the user set.

    Raises:
        SandboxError: a setting that isn't like "e2b=20,daytona=10".
    """
    quota = backend.quota
    for setting, field in (("CONCURRENT", "concurrent"), ("PER_SECOND", "per_second")):
        text = getattr(metaflow_config, f"SANDBOX_{setting}") or ""
        for item in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = item.partition("=")
            try:
                number = float(value)
            except ValueError:
                number = 0
            if number <= 0:
                raise SandboxError(
                    f"METAFLOW_SANDBOX_{setting}={text!r}: give numbers above 0 for backends, "
                    'such as "e2b=20,daytona=10".',
                    code="invalid_setting",
                )
            if name.strip() not in {backend.name, *registry.PROMISED, *registry.names()}:
                raise SandboxError(
                    f"METAFLOW_SANDBOX_{setting}={text!r}: there is no backend {name.strip()!r}.",
                    code="invalid_setting",
                )
            if name.strip() == backend.name:
                quota = replace(quota, **{field: number})
    return quota


class Places:
    """The places for one backend's sandboxes. One object a process: its tasks queue in it."""

    def __init__(self, backend: Backend) -> None:
        self._name = backend.name
        self._quota = quota_of(backend)
        account = hashlib.sha256(backend.account().encode()).hexdigest()[:12]
        self._directory = base() / f"places-{backend.name}-{account}"
        self._turn = anyio.Lock()  # fair; and only the first in the queue looks for a place

    @contextlib.asynccontextmanager
    async def one(self, say: Callable[[str], Awaitable[None]]) -> AsyncIterator[None]:
        """Holds a place; waits for it, and says so.

        Args:
            say: tells the user, who waits too.
        """
        if self._quota.concurrent is None and self._quota.per_second is None:
            yield
            return
        fd = -1
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._say, say)
                async with self._turn:
                    self._directory.mkdir(mode=0o700, exist_ok=True)
                    fd = await self._find()
                    await self._pace()
                tasks.cancel_scope.cancel()
            yield
        finally:
            if fd >= 0:
                os.close(fd)

    async def _find(self) -> int:
        """A descriptor that holds a place's lock; -1 if their number isn't limited."""
        if self._quota.concurrent is None:
            return -1
        while True:
            for number in range(int(self._quota.concurrent)):
                fd = os.open(self._directory / str(number), os.O_RDWR | os.O_CREAT, 0o600)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(fd)
                else:
                    return fd
            await anyio.sleep(_POLL_SECONDS * (1 + random.random()))  # noqa: S311

    async def _pace(self) -> None:
        """Waits until the next sandbox may be made."""
        if self._quota.per_second is not None:
            await anyio.sleep(self._reserve(self._quota.per_second))

    def _reserve(self, per_second: float) -> float:
        """Takes the next time at which one may be made. Returns the seconds until then."""
        with open(self._directory / "next", "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            now = time.time()
            # A clock that was set back must not stop everybody.
            due = min(max(now, float(text or 0)), now + 60)
            file.truncate(0)
            file.write(repr(due + 1 / per_second))
        return due - now

    async def _say(self, say: Callable[[str], Awaitable[None]]) -> None:
        limits = []
        if self._quota.concurrent is not None:
            limits.append(f"{self._quota.concurrent:g} at once")
        if self._quota.per_second is not None:
            limits.append(f"{self._quota.per_second:g} a second")
        await anyio.sleep(_SAY_AFTER)
        while True:
            await say(
                f"waiting for a sandbox: {self._name} is limited to {' and '.join(limits)} here "
                "(METAFLOW_SANDBOX_CONCURRENT, METAFLOW_SANDBOX_PER_SECOND)."
            )
            await anyio.sleep(_SAY_AGAIN)
