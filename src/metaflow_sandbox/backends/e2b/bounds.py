"""How much of an answer is read: a step may become root and answer in the daemon's place.

The SDK reads all of every answer but a command's output and a file's content, which stream. Those
are small, so no more is read of one than a real one has. What isn't public of the SDK and its RPC
library is used here alone (`tests/structural/test_e2b_sdk.py`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx
    from e2b import AsyncSandbox

ANSWER = 1 << 16
MESSAGE = 1 << 20  # of a command's output
_STREAMED = "/process.Process/Start"


class Bounded:
    """A transport of pyqwest's whose answers end after `ANSWER` bytes, unless they stream."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    async def execute(self, request: Any) -> Any:
        from pyqwest import Response

        answer = await self._inner.execute(request)
        if answer.status == 200 and request.url.endswith(_STREAMED):
            return answer
        return Response(
            status=answer.status, headers=answer.headers, content=beginning(answer, answer.content)
        )


async def beginning(answer: Any, content: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    """The first `ANSWER` bytes of an answer, whose connection is ended with more."""
    left = ANSWER
    async with answer:
        async for piece in content:
            yield bytes(piece[:left])
            left -= len(piece)
            if left <= 0:
                return


async def text(response: httpx.Response) -> str:
    """The beginning of an answer that is no success."""
    data = bytearray()
    async for piece in response.aiter_raw(ANSWER):
        data += piece
        if len(data) >= ANSWER:
            break
    return bytes(data[:ANSWER]).decode(errors="replace")


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
