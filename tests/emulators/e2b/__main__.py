"""Serves an account on loopback until its input is closed: `python -m emulators.e2b KEY`.

Prints one line with the port once it listens.
"""

import asyncio
import socket
import sys
import tempfile

import uvicorn

from ..faults import Front
from .cloud import Cloud
from .control import Control
from .envd import Envd


async def main(key):
    cloud = Cloud(key, tempfile.mkdtemp(prefix="e2b-emulator-"))
    control, envd = Control(cloud).app, Envd(cloud)

    async def app(scope, receive, send):
        part = envd if envd.serves(scope["path"]) else control
        await part(scope, receive, send)

    front = Front(app)
    config = uvicorn.Config(
        front, log_level="critical", lifespan="off", timeout_graceful_shutdown=1, http="h11"
    )
    server = uvicorn.Server(config)
    front.connections = lambda: server.server_state.connections
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    print(listener.getsockname()[1], flush=True)
    try:
        # Whoever started it may be killed: then the pipe is closed.
        await asyncio.wait(
            {serving, asyncio.ensure_future(asyncio.to_thread(sys.stdin.read))},
            return_when=asyncio.FIRST_COMPLETED,
        )
    finally:
        server.should_exit = True
        await cloud.close()
        await serving


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
