"""The SDK's client: one for all that goes on at a time, and every call by a deadline of ours."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import weakref
from asyncio import AbstractEventLoop, get_running_loop
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import anyio

from ...errors import NOT_SET_UP, BackendUnavailable, SandboxError
from . import faults, toolbox

if TYPE_CHECKING:
    from aiohttp import ClientSession
    from daytona import AsyncDaytona, AsyncSandbox
    from daytona_api_client_async import ApiClient

T = TypeVar("T")

DEFAULT_URL = "https://app.daytona.io/api"
CALL_SECONDS = 30.0
# A rate limit is waited out: a foreach of hundreds meets it as a matter of course.
PATIENCE_SECONDS = 900.0
_TRIES = 4
_CLOSE_SECONDS = 5.0


def url() -> str:
    """Where the API is: Daytona's own, or a self-hosted one."""
    return os.environ.get("DAYTONA_API_URL") or DEFAULT_URL


def account() -> str:
    """Whose quota counts: never the key itself."""
    secret = os.environ.get("DAYTONA_API_KEY") or os.environ.get("DAYTONA_JWT_TOKEN") or ""
    digest = hashlib.sha256(b"account" + secret.encode()).hexdigest()[:16]
    return f"{url()} {os.environ.get('DAYTONA_ORGANIZATION_ID', '')} {digest}"


def _sdk() -> type[AsyncDaytona]:
    """The SDK's client, which it loads with all of its models when asked for."""
    from daytona import AsyncDaytona

    return AsyncDaytona


# --- what isn't public of the SDK is used here alone (docs/daytona.md says what for)


def api(sdk: AsyncDaytona) -> ApiClient:
    """For the generated classes, one for each part of the API, which are public."""
    return sdk._api_client


def hears_events(sdk: AsyncDaytona) -> bool:
    """Whether the server tells of changes, so that nobody need look."""
    events = sdk._event_dispatcher
    return events is not None and events.is_connected


class _Shared:
    """A client, connections to the daemons in sandboxes, and how many use them."""

    def __init__(self, client: AsyncDaytona, daemons: ClientSession) -> None:
        self.client, self.daemons = client, daemons
        self.users = 1


class Clients:
    """Clients of this process: one for each event loop, as long as anybody uses it."""

    def __init__(self) -> None:
        self._shared: weakref.WeakKeyDictionary[AbstractEventLoop, _Shared] = (
            weakref.WeakKeyDictionary()
        )

    async def acquire(self) -> AsyncDaytona:
        """The client, which `release` gives back.

        Raises:
            BackendUnavailable: the SDK or a key is missing.
        """
        try:
            # Two seconds' work at first: others go on meanwhile, and who is cancelled doesn't wait.
            made = await anyio.to_thread.run_sync(_sdk, abandon_on_cancel=True)
        except ImportError as e:
            raise BackendUnavailable(
                f"Daytona's SDK is not installed ({e}). Install it with: "
                'pip install "metaflow-sandbox[daytona]"',
                code=NOT_SET_UP,
                op="load",
            ) from e
        loop = get_running_loop()
        if shared := self._shared.get(loop):
            shared.users += 1
            return shared.client
        try:
            client = made()
        except Exception as e:
            keys = {"DAYTONA_API_KEY", "DAYTONA_JWT_TOKEN"} & os.environ.keys()
            raise BackendUnavailable(
                "there is no key for Daytona: make one at https://app.daytona.io/dashboard/keys, "
                f"and export DAYTONA_API_KEY=… ({e})",
                code=None if keys else NOT_SET_UP,
                op="load",
                retryable=False,
            ) from None
        self._shared[loop] = _Shared(client, toolbox.connections())
        return client

    def daemon_of(self, box: AsyncSandbox) -> toolbox.Toolbox:
        """The daemon of a sandbox, for as long as whoever asks has a client."""
        shared = self._shared[get_running_loop()]
        where = f"{box.toolbox_proxy_url}/{box.id}"
        return toolbox.Toolbox(shared.daemons, where, api(shared.client).default_headers)

    async def release(self) -> None:
        loop = get_running_loop()
        shared = self._shared[loop]
        shared.users -= 1
        if shared.users:
            return
        del self._shared[loop]
        for close in (shared.daemons.close, shared.client.close):
            with (
                anyio.CancelScope(shield=True),
                anyio.move_on_after(_CLOSE_SECONDS),
                contextlib.suppress(Exception),
            ):
                await close()

    @contextlib.asynccontextmanager
    async def one(self) -> AsyncIterator[AsyncDaytona]:
        client = await self.acquire()
        try:
            yield client
        finally:
            await self.release()


async def call(
    op: str,
    make: Callable[[], Awaitable[T]],
    *,
    seconds: float = CALL_SECONDS,
    again: bool = False,
    whole: bool = False,
    patience: float = PATIENCE_SECONDS,
) -> T:
    """One call of the SDK, which has no deadlines that hold and repeats nothing.

    Args:
        make: starts it, each time anew.
        seconds: for one try.
        again: whether it may be sent twice, where it can't be known if it arrived.
        whole: whether a try that has begun goes on to its answer when this is cancelled.
        patience: seconds for which a rate limit is waited out.

    Raises:
        TimeoutError: there was no answer in time.
        Exception: what the SDK raises.
    """
    over = time.monotonic() + patience
    tries = 0
    while True:
        tries += 1
        try:
            with anyio.fail_after(seconds, shield=whole):
                return await make()
        except TimeoutError:
            if not again or tries >= _TRIES:
                raise
        except SandboxError:
            raise
        except Exception as e:
            if faults.status_of(e) == 429:
                tries -= 1
                wait = faults.wait_of(e)
                if time.monotonic() + wait > over:
                    raise
                await anyio.sleep(wait)
            elif again and tries < _TRIES and faults.is_transient(e):
                await anyio.sleep(0.2 * 2**tries)
            else:
                raise
