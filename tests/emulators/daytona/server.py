"""The emulator's process: `python -m tests.emulators.daytona.server DIRECTORY`.

Prints its port, and ends when its input does. Tests ask it things below /_test/:

    PUT  /_test/cloud      settings of `cloud.Settings`; "reset": true for the first ones
    GET  /_test/cloud      what there is, and flaws that were found in answers
    POST /_test/evict/ID   ends a sandbox as a provider may
    POST /_test/write/ID   writes a file in it: {"path": …, "content": …}
    PUT  /_test/drops      [[bytes, close code], …]: the next log followers are dropped so
    PUT  /_test/hostile    [[text, times] or an address, …]: what they get instead of a log
    PUT  /_test/snapshots  {name: state}: puts snapshots into a state

The rest of /_test/ is `tests/emulators/faults.py`'s.
"""

import asyncio
import contextlib
import datetime
import os
import sys
import time

import socketio
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from tests.emulators.faults import Front

from .api import Api
from .cloud import Cloud, Refused
from .snapshots import Snapshots
from .toolbox import Toolbox, _said
from .wire import Wire


class Server:
    """All parts together."""

    def __init__(self, directory):
        self.wire = Wire()
        self.cloud = Cloud(directory)
        self.snapshots = Snapshots(self.cloud)
        self.api = Api(self.cloud, self.snapshots, self.wire)
        self.toolbox = Toolbox(self.cloud, self.wire)
        app = Starlette(
            routes=[*self.api.routes(), *self.toolbox.routes(), *self._tests()],
            exception_handlers={Refused: self._refused, OSError: self._failed},
        )
        self.front = Front(self._guarded(app))
        self.toolbox.note = self._note
        self.toolbox.abort = self.front.abort
        self.app = socketio.ASGIApp(self.api.events, self.front, socketio_path="/api/socket.io")

    def _guarded(self, app):
        """Lets in who has the key."""

        async def guarded(scope, receive, send):
            if scope["type"] == "http" and not scope["path"].startswith("/_test/"):
                given = dict(scope["headers"]).get(b"authorization", b"").decode()
                if given != f"Bearer {self.cloud.settings.key}":
                    answer = self._error(scope["path"], 401, "Invalid credentials", "DAYTONA_API")
                    await answer(scope, receive, send)
                    return
            await app(scope, receive, send)

        return guarded

    def _note(self, path, headers):
        entry = {
            "number": len(self.front.journal), "method": "WS", "path": path, "query": "",
            "headers": headers, "began": time.time(), "status": 101, "received": 0, "sent": 0,
            "ended": None,
        }  # fmt: skip
        self.front.journal.append(entry)

    # --- errors

    async def _refused(self, request, error):
        source = "DAYTONA_DAEMON" if request.url.path.startswith("/toolbox") else "DAYTONA_API"
        return self._error(
            request.url.path, error.status, error.message, source, error.headers, **error.more
        )

    async def _failed(self, request, error):
        message, status, code = _said(error)
        return self._error(request.url.path, status, message, "DAYTONA_DAEMON", code=code)

    def _error(self, path, status, message, source, headers=None, **more):
        now = datetime.datetime.now(datetime.timezone.utc).isoformat()
        body = {
            "path": path, "timestamp": now, "statusCode": status, "message": message,
            "source": source, **more,
        }  # fmt: skip
        if source == "DAYTONA_DAEMON":
            self.wire.check("toolbox", "ErrorResponse", body)
        return JSONResponse(body, status, headers=headers)

    # --- what tests ask

    def _tests(self):
        return [
            Route("/_test/cloud", self._change, methods=["PUT"]),
            Route("/_test/cloud", self._tell, methods=["GET"]),
            Route("/_test/evict/{id}", self._evict, methods=["POST"]),
            Route("/_test/write/{id}", self._write, methods=["POST"]),
            Route("/_test/drops", self._drop, methods=["PUT"]),
            Route("/_test/hostile", self._hostile, methods=["PUT"]),
            Route("/_test/snapshots", self._states, methods=["PUT"]),
        ]

    async def _change(self, request):
        changes = await request.json()
        if changes.get("reset"):
            self.toolbox.drops, self.toolbox.hostile = [], []
        self.cloud.change(changes)
        return JSONResponse({})

    async def _tell(self, request):
        return JSONResponse({
            "sandboxes": {b.id: b.state for b in self.cloud.boxes.values()},
            "requests": {b.id: b.request for b in self.cloud.boxes.values()},
            "snapshots": {s.name: s.state for s in self.snapshots.by_name.values()},
            "builds": self.snapshots.builds, "now": self.cloud.now(),
            "flaws": self.wire.flaws, "checked": self.wire.checked,
            "specified": self.wire.specified,
        })  # fmt: skip

    async def _evict(self, request):
        await self.cloud.evict(self.cloud.find(request.path_params["id"]))
        return JSONResponse({})

    async def _write(self, request):
        asked = await request.json()

        async def content():
            yield asked["content"].encode()

        machine = self.cloud.find(request.path_params["id"]).machine
        await machine.write_file(asked["path"], content())
        return JSONResponse({})

    async def _drop(self, request):
        self.toolbox.drops = [tuple(drop) for drop in await request.json()]
        return JSONResponse({})

    async def _hostile(self, request):
        self.toolbox.hostile = await request.json()
        return JSONResponse({})

    async def _states(self, request):
        for name, state in (await request.json()).items():
            self.snapshots.find(name).state = state
        return JSONResponse({})

    async def run(self):
        self.snapshots.begin()
        config = uvicorn.Config(
            self.app, "127.0.0.1", 0, log_level="warning", ws="websockets-sansio",
            ws_max_size=1 << 20, timeout_graceful_shutdown=1, lifespan="off",
            ws_ping_interval=None,  # the daemon sends none; a reader may be as slow as it likes
        )  # fmt: skip
        server = uvicorn.Server(config)
        serving = asyncio.ensure_future(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        self.api.base = f"http://127.0.0.1:{port}"
        self.front.connections = lambda: server.server_state.connections
        clock = asyncio.ensure_future(self.cloud.keep_time())
        os.write(1, b"%d\n" % port)
        loop = asyncio.get_running_loop()
        over = asyncio.Event()
        loop.add_reader(0, lambda: os.read(0, 1) or over.set())
        await over.wait()
        loop.remove_reader(0)
        clock.cancel()
        server.should_exit = server.force_exit = True
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.cloud.close(), 20)
        await self.snapshots.close()
        serving.cancel()


if __name__ == "__main__":
    os.umask(0o022)
    asyncio.run(Server(sys.argv[1]).run())
