"""One plain HTTP request, and its response."""

from __future__ import annotations

import anyio
import h11

from .messages import Reply, Target, passed_on
from .streams import Stream

_Response = h11.InformationalResponse | h11.Response | h11.Data | h11.EndOfMessage


class Exchange:
    """Carries one request to its host and the response back, both as streams.

    Both are parsed and written anew, so that nothing but one well-formed request gets
    through; whatever a client sends after it is read and dropped.

    Args:
        client: the sandbox's connection.
        server: the parser that read the request's head from it.
        upstream: the connection to the host.
        limit: bytes of a response's head.
        patience: as in `streams.tunnel`.
    """

    def __init__(
        self,
        client: Stream,
        server: h11.Connection,
        upstream: Stream,
        *,
        limit: int,
        patience: float,
    ) -> None:
        self._client = client
        self._server = server
        self._upstream = upstream
        self._onward = h11.Connection(h11.CLIENT, max_incomplete_event_size=limit)
        self._patience = patience
        self._refused_body = False
        self._responding = False

    async def run(self, request: h11.Request, target: Target) -> None:
        """Returns when the response was sent.

        Raises:
            Reply: there is no response.
            ConnectionError: there is only a part of it.
        """
        headers = [(n, v) for n, v in passed_on(request) if n.lower() != b"host"]
        head = h11.Request(
            method=request.method,
            target=target.path,
            headers=[(b"Host", target.authority.encode("ascii")), *headers],
        )
        problem: Reply | None = None

        async def upload() -> None:
            nonlocal problem
            problem = await self._upload()
            if problem:
                tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            await self._to_upstream(head)
            tasks.start_soon(upload)
            problem = await self._download(request.http_version)
            tasks.cancel_scope.cancel()
        if problem and self._responding:
            self._client.break_off()
            raise ConnectionError(problem.text)
        if problem:
            raise problem

    async def _upload(self) -> Reply | None:
        try:
            while True:
                event = self._server.next_event()
                if event is h11.NEED_DATA:
                    self._server.receive_data(await self._client.receive())
                elif isinstance(event, h11.Data):
                    await self._to_upstream(h11.Data(data=event.data))
                else:
                    break
            await self._to_upstream(h11.EndOfMessage())
            while await self._client.receive():
                pass
        except (OSError, h11.RemoteProtocolError):
            return Reply(400, "the request's body is broken")
        self._upstream.hurry(self._patience)
        return None

    async def _to_upstream(self, event: h11.Request | h11.Data | h11.EndOfMessage) -> None:
        if self._refused_body:
            return
        try:
            await self._upstream.send(self._onward.send(event))
        except (OSError, h11.LocalProtocolError):
            self._refused_body = True  # it may have answered all the same

    async def _download(self, version: bytes) -> Reply | None:
        while True:
            try:
                event = self._onward.next_event()
                if event is h11.NEED_DATA:
                    self._onward.receive_data(await self._upstream.receive())
                    continue
            except (OSError, h11.RemoteProtocolError):
                event = h11.PAUSED
            if not isinstance(event, _Response):
                return Reply(502, "the host ended the connection, or what it sent isn't HTTP")
            if isinstance(event, h11.InformationalResponse) and version < b"1.1":
                continue  # older clients take it for the response
            try:
                await self._client.send(self._to_client(event))
            except (OSError, h11.LocalProtocolError):
                return Reply(502, "the response can't be passed on")
            if isinstance(event, h11.EndOfMessage):
                return None

    def _to_client(self, event: _Response) -> bytes:
        if isinstance(event, h11.InformationalResponse):
            headers = passed_on(event)[:-1]
            event = h11.InformationalResponse(status_code=event.status_code, headers=headers)
        elif isinstance(event, h11.Response):
            self._responding = True
            event = h11.Response(
                status_code=event.status_code, reason=event.reason, headers=passed_on(event)
            )
        elif isinstance(event, h11.EndOfMessage):
            event = h11.EndOfMessage()  # without trailers, which nothing announces any more
        return self._server.send(event)
