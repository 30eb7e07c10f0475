"""What is asked of the daemon in a sandbox, past the SDK.

Daytona's SDK trusts the daemon, in whose place a step may answer that has become root. It holds all
of an answer; it looks for marks in a log for a time that grows with the square of a message; it
keeps cookies, which go to other sandboxes too; it follows redirects, to this machine too. None of
that is done here.
"""

from __future__ import annotations

import contextlib
import json
import re
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio

from ...errors import ProtocolError
from ..answers import ANSWER, MESSAGE, held

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession

_CONNECT_SECONDS = 30.0
_CONNECTS = 3  # how often a connection is tried: nothing was sent before there is one
_AGAIN_SECONDS = 0.3
_NORMAL = (1000, None)
_TOO_BIG = 1009
_IDENTITY = re.compile(r"[\w-]{1,100}\Z", re.ASCII)
_MARK = re.compile(rb"(\x01\x01\x01|\x02\x02\x02)")
_CUT_MARK = re.compile(rb"(\x01{1,2}|\x02{1,2})\Z")
_OUT = b"\x01\x01\x01"


class Refused(Exception):
    """An answer that is no success, as `faults` reads it."""

    def __init__(self, status: int, headers: Mapping[str, str], body: str = "") -> None:
        super().__init__(f"HTTP {status}: {body[:500]}")
        self.status, self.headers, self.body = status, headers, body


@dataclass(frozen=True)
class Info:
    """What is at a path."""

    directory: bool
    regular: bool
    size: int


def connections() -> ClientSession:
    """For the daemons of all sandboxes. What one answers changes nothing for another."""
    import aiohttp

    redirects = aiohttp.TraceConfig()
    redirects.on_request_redirect.append(_refuse)
    return aiohttp.ClientSession(
        auto_decompress=False,
        connector=aiohttp.TCPConnector(limit=0),  # launchers keep to the quota
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
        trace_configs=[redirects],
        trust_env=True,
    )


async def _refuse(session: Any, context: Any, redirect: Any) -> None:
    redirect.response.close()
    raise Refused(redirect.response.status, redirect.response.headers, "it leads elsewhere")


class Toolbox:
    """The daemon of one sandbox.

    Every method raises `Refused` for an answer that is no success, `ProtocolError` for one that
    the daemon doesn't give, and what its HTTP client raises.

    Args:
        connections: see there.
        url: where it is.
        headers: those of the SDK's, with the key.
    """

    def __init__(self, connections: ClientSession, url: str, headers: Mapping[str, str]) -> None:
        self._connections = connections
        self._url = url.rstrip("/")
        self._headers = {**headers, "Accept-Encoding": "identity"}

    # --- sessions

    async def new_session(self, name: str) -> None:
        await self._done("POST", "/process/session", json={"sessionId": name})

    async def end_session(self, name: str) -> None:
        await self._done("DELETE", f"/process/session/{name}")

    async def start(self, session: str, line: str) -> str:
        """Has a session's shell run a line. Returns the command's identity."""
        asked = {"command": line, "runAsync": True}
        found = await self._json("POST", f"/process/session/{session}/exec", json=asked)
        return str(_of(found, "cmdId", _IDENTITY.match))

    async def exit_code(self, session: str, command: str) -> int | None:
        """None while it runs."""
        path = f"/process/session/{session}/command/{command}"
        found = await self._json("GET", path, most=MESSAGE)  # the line is in it
        code = found.get("exitCode")
        return code if isinstance(code, int) else None

    async def output(self, session: str, command: str) -> AsyncGenerator[bytes, None]:
        """A command's standard output, from its first byte, until its log is closed.

        Raises:
            ConnectionError: it was closed in bad order.
        """
        import aiohttp

        socket = await self._connected(
            lambda: self._connections.ws_connect(
                f"{self._url}/process/session/{session}/command/{command}/logs",
                params={"follow": "true"},
                headers=self._headers,
                max_msg_size=MESSAGE,
            )
        )
        marks = Marks()
        try:
            while True:
                message = await socket.receive()
                if message.type is aiohttp.WSMsgType.BINARY:
                    data: bytes = message.data
                elif message.type is aiohttp.WSMsgType.TEXT:
                    data = message.data.encode()
                elif socket.close_code in _NORMAL and socket.exception() is None:
                    break
                elif socket.close_code == _TOO_BIG:
                    raise ProtocolError("more of a log comes at once than Daytona sends", op="exec")
                else:
                    raise ConnectionError(
                        f"closed ({socket.close_code}) {socket.exception() or ''}".strip()
                    )
                if out := marks.output(data):
                    yield out
        finally:
            with anyio.move_on_after(0):  # it is said, and no answer waited for
                await socket.close()

    # --- files

    async def make_folder(self, path: str, mode: str) -> None:
        await self._done("POST", "/files/folder", params={"path": path, "mode": mode})

    async def info(self, path: str) -> Info:
        found = await self._json("GET", "/files/info", params={"path": path})
        size = _of(found, "size", lambda n: isinstance(n, int) and n >= 0)
        return Info(found.get("isDir") is True, str(found.get("mode"))[:1] == "-", size)

    async def upload(self, path: str, source: AsyncIterator[bytes]) -> None:
        boundary = uuid.uuid4().hex
        part = f'--{boundary}\r\nContent-Disposition: form-data; name="files[0].'
        failed: list[Exception] = []

        async def form() -> AsyncIterator[bytes]:
            yield f'{part}path"\r\n\r\n{path}\r\n{part}file"; filename="file"\r\n\r\n'.encode()
            try:
                async for piece in source:
                    yield piece
            except Exception as e:
                failed.append(e)  # the HTTP client would raise something else for it
                raise
            yield f"\r\n--{boundary}--\r\n".encode()

        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        try:
            await self._done("POST", "/files/bulk-upload", data=form(), headers=headers)
        except Exception:
            if failed:
                raise failed[0] from None
            raise

    async def download(self, path: str) -> AsyncGenerator[bytes, None]:
        async with self._asked("GET", "/files/download", params={"path": path}) as answer:
            async for piece in answer.content.iter_any():
                yield piece

    # --- requests

    @contextlib.asynccontextmanager
    async def _asked(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, **more: Any
    ) -> AsyncIterator[ClientResponse]:
        """An answer that is a success, of which nothing has been read."""
        answer = await self._connected(
            lambda: self._connections.request(
                method, self._url + path, headers={**self._headers, **(headers or {})}, **more
            )
        )
        try:
            if not 200 <= answer.status < 300:
                said = await held(answer.content.iter_any())
                raise Refused(answer.status, answer.headers, said.decode(errors="replace"))
            yield answer
        finally:
            answer.release()  # which ends the connection if there is more

    async def _connected(self, make: Callable[[], Any]) -> Any:
        from aiohttp import ClientConnectorError

        for left in reversed(range(_CONNECTS)):
            try:
                return await make()
            except ClientConnectorError:
                if not left:
                    raise
            await anyio.sleep(_AGAIN_SECONDS)
        raise AssertionError("unreachable")

    async def _done(self, method: str, path: str, **more: Any) -> None:
        async with self._asked(method, path, **more) as answer:
            await held(answer.content.iter_any())  # so that the connection can be used again

    async def _json(
        self, method: str, path: str, most: int = ANSWER, **more: Any
    ) -> dict[str, Any]:
        async with self._asked(method, path, **more) as answer:
            data = await held(answer.content.iter_any(), most)
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise _unknown(path)
        return found


def _of(found: Mapping[str, Any], name: str, right: Callable[[Any], Any]) -> Any:
    """What an answer has under a name."""
    value = found.get(name)
    try:
        if right(value):
            return value
    except TypeError:
        pass
    raise _unknown(name)


def _unknown(what: str) -> ProtocolError:
    return ProtocolError(
        f"a sandbox's daemon answers what Daytona's does not ({what}): the step has taken it over, "
        "or something on the way answers in its place.",
        op="toolbox",
    )


class Marks:
    """Takes a log apart, in which three bytes say whose the following ones are."""

    def __init__(self) -> None:
        self._cut = b""
        self._is_output = False

    def output(self, data: bytes) -> bytes:
        """What is standard output of the next piece of a log."""
        *parts, last = _MARK.split(self._cut + data)
        found = _CUT_MARK.search(last[-2:])
        self._cut = found.group() if found else b""
        kept = []
        for part in (*parts, last[: len(last) - len(self._cut)]):
            if _MARK.fullmatch(part):
                self._is_output = part == _OUT
            elif self._is_output:
                kept.append(part)
        return b"".join(kept)
