"""A forward proxy on loopback, as a company has it: the only one that knows where a host is."""

import asyncio
import contextlib
import re
import threading

_ABSOLUTE = re.compile(rb"^([A-Z]+) (?:http|ws)://[^/ ]+", re.M)


class Proxy:
    """Leads every request to `port` of this machine, whatever host it is for, in a thread.

    Attributes:
        upgrades: how many of the connections became websockets.
    """

    def __init__(self, port):
        self.target, self.upgrades = port, 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self):
        self._thread.start()
        start = asyncio.start_server(self._serve, "127.0.0.1", 0)
        server = asyncio.run_coroutine_threadsafe(start, self._loop).result()
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_):
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _end(self):
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _serve(self, reader, writer):
        there = await asyncio.open_connection("127.0.0.1", self.target)

        async def up():
            while data := await reader.read(1 << 16):
                if b"upgrade: websocket" in data.lower():
                    self.upgrades += 1
                # Only the first line of a request looks so.
                there[1].write(_ABSOLUTE.sub(rb"\1 ", data))
                await there[1].drain()

        async def down():
            while data := await there[0].read(1 << 16):
                writer.write(data)
                await writer.drain()

        tasks = [asyncio.ensure_future(up()), asyncio.ensure_future(down())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        for end in (writer, there[1]):
            with contextlib.suppress(Exception):
                end.close()
