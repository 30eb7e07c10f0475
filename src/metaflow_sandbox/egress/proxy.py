"""The server: takes a sandbox's connections and brings each to where it may go."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import anyio
import anyio.to_thread
import h11

from .addresses import is_reachable
from .exchange import Exchange
from .messages import Reply, Target, plain, read_target
from .rules import Rules, is_address, normal
from .streams import Stream, accept, connect, tunnel

_log = logging.getLogger(__name__)
_REMEMBERED = 100

#: Finds a host's addresses: (host, port) -> addresses. Raises OSError if it has none.
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
#: Says whether a sandbox may be connected to an address.
Reachable = Callable[[str], bool]


@dataclass(frozen=True)
class Limits:
    """What one sandbox gets of the proxy.

    Attributes:
        connections: open at once; more wait until one ends.
        head: bytes of a request's or a response's head while its end is still to come.
        head_seconds: for a request's head to arrive.
        connect_seconds: for looking up a host, and again for connecting to it.
        attempt_seconds: for connecting to one of its addresses.
        half_closed_seconds: for which one direction may be silent once the other has ended.
        linger_seconds: for which a client that still sends is listened to after its answer,
            because a connection closed on unread data takes the answer with it.
    """

    connections: int = 128
    head: int = 64 << 10
    head_seconds: float = 15.0
    connect_seconds: float = 10.0
    attempt_seconds: float = 4.0
    half_closed_seconds: float = 300.0
    linger_seconds: float = 2.0


_DEFAULTS = Limits()


async def resolve(host: str, port: int) -> list[str]:
    """A host's addresses, as this machine's resolver finds them.

    The name is made absolute: with the resolver's search list, "pypi.org" could become
    "pypi.org.corp.example", and one word a host of the local network.

    Raises:
        OSError: there are none.
    """

    def ask() -> list[str]:
        found = socket.getaddrinfo(f"{host}.".encode("ascii"), port, type=socket.SOCK_STREAM)
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))

    # Not anyio.getaddrinfo, whose threads the event loop waits for when it ends, and not the
    # limiter that all share: names that never answer would take every thread.
    return await anyio.to_thread.run_sync(
        ask, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1)
    )


@contextlib.asynccontextmanager
async def proxy(
    listener: socket.socket | None,
    rules: Rules,
    *,
    resolve: Resolve = resolve,
    reachable: Reachable = is_reachable,
    limits: Limits = _DEFAULTS,
) -> AsyncIterator[Proxy]:
    """Serves a sandbox while the context is open; then every connection is cut.

    Args:
        listener: a listening socket, TCP or Unix, which is made non-blocking. It stays the
            caller's to close, after the context. None where connections come by `attend`.
        rules: which hosts may be reached.
        resolve, reachable: stand-ins for tests.
    """
    running = Proxy(rules, resolve, reachable, limits)
    error: Exception | None = None
    async with anyio.create_task_group() as tasks:
        if listener is not None:
            listener.setblocking(False)
            tasks.start_soon(running._serve, listener)
        try:
            yield running
        except Exception as e:
            error = e  # to be raised as it is, not in a group
        tasks.cancel_scope.cancel()
    if error:
        raise error


class Proxy:
    """A running proxy.

    Attributes:
        refusals: {"host:port": why it was refused}, for the user; the first hundred.
            A dict that is never changed, only replaced: any thread can read it.
    """

    def __init__(
        self, rules: Rules, resolve: Resolve, reachable: Reachable, limits: Limits
    ) -> None:
        self.refusals: dict[str, str] = {}
        self._rules = rules
        self._resolve = resolve
        self._reachable = reachable
        self._limits = limits
        self._slots = anyio.Semaphore(limits.connections)

    async def _serve(self, listener: socket.socket) -> None:
        async with anyio.create_task_group() as tasks:
            while True:
                await self._slots.acquire()
                tasks.start_soon(self._connection, await accept(listener))

    async def attend(self, connection: socket.socket) -> None:
        """Answers on a connection, which it closes, that came in another way than by a listener."""
        await self._slots.acquire()
        await self._connection(Stream(connection))

    async def _connection(self, client: Stream) -> None:
        try:
            with client:
                await self._answer(client)
        except OSError:
            pass  # the client is gone
        except Exception as e:
            # Ours to mend, but the sandbox goes on. Only the kind: messages may hold secrets.
            _log.warning("a connection of the egress proxy failed: %s", type(e).__name__)
        finally:
            self._slots.release()

    async def _answer(self, client: Stream) -> None:
        limits = self._limits
        server = h11.Connection(h11.SERVER, max_incomplete_event_size=limits.head)
        request = None
        try:
            request = await self._head(client, server)
            if request is None:
                return
            target = self._admit(read_target(request))
            with await self._reach(target) as upstream:
                if request.method == b"CONNECT":
                    await client.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
                    client.unread(server.trailing_data[0])
                    await tunnel(client, upstream, patience=limits.half_closed_seconds)
                    return
                exchange = Exchange(
                    client,
                    server,
                    upstream,
                    limit=limits.head,
                    patience=limits.half_closed_seconds,
                )
                await exchange.run(request, target)
        except Reply as reply:
            await client.send(reply.encode(request))
        client.end()
        with anyio.move_on_after(limits.linger_seconds):
            while await client.receive():
                pass

    async def _head(self, client: Stream, server: h11.Connection) -> h11.Request | None:
        try:
            with anyio.fail_after(self._limits.head_seconds):
                while True:
                    event = server.next_event()
                    if isinstance(event, h11.Request):
                        return event
                    if event is not h11.NEED_DATA:
                        return None  # closed before it asked for anything
                    server.receive_data(await client.receive())
        except TimeoutError:
            raise Reply(408, "the request didn't arrive in time") from None
        except h11.RemoteProtocolError as e:
            raise Reply(e.error_status_hint, "the request isn't valid HTTP/1.1") from None

    def _admit(self, target: Target) -> Target:
        """The target with its host in the one spelling that is looked up and sent on.

        Raises:
            Reply: the rules refuse it.
        """
        if reason := self._rules.refusal(target.host, target.port):
            raise self._refused(target, reason)
        return replace(target, host=normal(target.host))

    async def _reach(self, target: Target) -> Stream:
        """A connection to a host that was admitted.

        Raises:
            Reply: it isn't public, or can't be reached.
        """
        found = await self._look_up(target)
        addresses = [address for address in found if self._reachable(address)]
        if not addresses:
            reason = "it is not on the public internet, and a sandbox reaches nothing else"
            raise self._refused(target, reason)
        status = 504
        with anyio.move_on_after(self._limits.connect_seconds):
            for address in addresses:
                with anyio.move_on_after(self._limits.attempt_seconds):
                    try:
                        return await connect(address, target.port)
                    except OSError:
                        status = 502
        raise Reply(status, f"{target} can't be reached from this machine")

    async def _look_up(self, target: Target) -> Sequence[str]:
        if is_address(target.host):
            return [target.host]
        try:
            with anyio.fail_after(self._limits.connect_seconds):
                if found := await self._resolve(target.host, target.port):
                    return found
        except TimeoutError:
            raise Reply(504, f"looking up {target} took too long") from None
        except OSError:
            pass
        raise Reply(502, f"{target} has no address")

    def _refused(self, target: Target, reason: str) -> Reply:
        where = plain(str(target), 300)
        if len(self.refusals) < _REMEMBERED:
            self.refusals = {**self.refusals, where: reason}
        return Reply(403, f"{where} is refused: {reason}")
