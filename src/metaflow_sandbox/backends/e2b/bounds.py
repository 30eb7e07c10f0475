"""Has the SDK read no more of an answer than `answers.py` says.

It reads all of every answer but a command's output and a file's content, which stream. What isn't
public of the SDK and its RPC library is used here alone (`tests/structural/test_e2b_sdk.py`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from ..answers import MESSAGE, beginning

if TYPE_CHECKING:
    from e2b import AsyncSandbox

_STREAMED = "/process.Process/Start"


class Bounded:
    """A transport of pyqwest's whose answers end after a while, unless they stream."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    async def execute(self, request: Any) -> Any:
        from pyqwest import Response

        answer = await self._inner.execute(request)
        if answer.status == 200 and request.url.endswith(_STREAMED):
            return answer
        return Response(status=answer.status, headers=answer.headers, content=_first(answer))


async def _first(answer: Any) -> AsyncIterator[bytes]:
    async with answer:  # which ends the connection if there is more
        async for piece in beginning(answer.content):
            yield piece


def bound(remote: AsyncSandbox) -> None:
    """Has no answer from inside a sandbox fill this process's memory."""
    from e2b.api import proxy_to_config
    from e2b.api.client_async import get_pyqwest_transport
    from e2b.envd.client_async import PlainHTTPErrorTransport
    from pyqwest import Client
    from pyqwest.httpx import AsyncPyqwestTransport

    config = remote.connection_config
    pool = get_pyqwest_transport(proxy_to_config(config.proxy), http_version=config.http_version)
    commands: Any = remote.commands
    files: Any = remote.files
    own: Any = remote
    for rpc in (commands._rpc, files._rpc):
        rpc._http_client = Client(PlainHTTPErrorTransport(Bounded(pool)))
        rpc._read_max_bytes = MESSAGE
    for client in (own._envd_api, commands._envd_health_api, files._envd_health_api):
        # The adapter is shared by other sandboxes and by the control plane.
        client._transport = AsyncPyqwestTransport(Bounded(client._transport._transport))
