"""The daemon in each sandbox: sessions and their logs, files.

A session is a shell that sources each command's file. What a command writes gets into its log as
whole lines, each after a marker that says which stream it is of; nothing else divides them. A
log's follower learns of the end a second late, by finding nothing more after there is an exit code.
"""

import asyncio
import contextlib
import errno
import os
import random
import time
import uuid
from dataclasses import dataclass, field

from daytona_toolbox_api_client_async.models import CreateSessionRequest, SessionExecuteRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocketDisconnect

from tests.emulators.machine import pieces_of

from .api import parsed
from .cloud import Refused, iso

OUT, ERR = b"\x01\x01\x01", b"\x02\x02\x02"
_PLACE = "/run/daytona"
_MESSAGE = 1024
_CODES = (1000, 1001, 1011, 1012, None)
_POLL = 0.02
_WORDS = {
    errno.ENOENT: ("no such file or directory", 404, "FILE_NOT_FOUND"),
    errno.EACCES: ("permission denied", 403, "FILE_ACCESS_DENIED"),
    errno.EISDIR: ("is a directory", 400, "INVALID_FILE_PATH"),
    errno.ENOTDIR: ("not a directory", 400, "INVALID_FILE_PATH"),
    errno.EEXIST: ("not a directory", 400, "INVALID_FILE_PATH"),
    errno.ENOSPC: ("no space left on device", 500, "INTERNAL_SERVER_ERROR"),
}
_END_TREE = """
import os, signal, sys, time
def tree(root):
    below = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try: stat = open("/proc/%s/stat" % name).read()
            except OSError: continue
            below.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(name))
    found, queue = [root], [root]
    while queue:
        for pid in below.get(queue.pop(), ()):
            found.append(pid); queue.append(pid)
    return [p for p in found if os.path.exists("/proc/%d" % p)]
def send(pids, number):
    for pid in pids:
        try: os.kill(pid, number)
        except OSError: pass
every = tree(int(sys.argv[1]))
send(every, signal.SIGTERM)
end = time.monotonic() + 5
while time.monotonic() < end and any(os.path.exists("/proc/%d" % p) for p in every):
    time.sleep(0.02)
send(every, signal.SIGKILL)
"""


@dataclass
class Command:
    """A command of a session; its log is a file, so that memory stays flat."""

    id: str
    text: str
    log: str
    code: int | None = None
    pumps: list = field(default_factory=list)

    def describe(self):
        found = {"id": self.id, "command": self.text}
        return found if self.code is None else {**found, "exitCode": self.code}


class Session:
    """A shell in a sandbox."""

    def __init__(self, box, name):
        self.box, self.name = box, name
        self.commands = {}
        self.ended = False
        self._turn = asyncio.Lock()

    async def open(self):
        machine = self.box.machine
        self.shell = await machine.spawn(
            ["/bin/bash"], user=self.box.user, env=self.box.environment, stdin=True
        )
        machine.keep(self._codes())
        machine.keep(self._discard())
        self.user_process = self.shell.pid

    async def _codes(self):
        """The shell's own output: the exit codes of commands, as they are done."""
        rest = b""
        async for piece in self.shell.read("stdout"):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                words = line.split()
                if len(words) == 3 and words[0] == b"done":
                    if command := self.commands.get(words[1].decode()):
                        command.code = int(words[2])
        self.ended = True

    async def _discard(self):
        async for _ in self.shell.read("stderr"):
            pass

    async def run(self, text):
        if self.ended:
            raise Refused(410, "session has ended", code="SESSION_ENDED")
        identity = str(uuid.uuid4())
        log = str(self.box.root) + f".log-{identity}"
        command = self.commands[identity] = Command(identity, text, log)
        open(log, "wb").close()
        machine, place = self.box.machine, f"{_PLACE}/{identity}"

        async def content():
            yield text.encode() + b"\n"

        await machine.write_file(f"{place}/command", content(), owner=self.box.user)
        fifos = " ".join(f"{place}/{name}" for name in ("in", "out", "err"))
        script = (
            f"mkfifo {fifos}; . {place}/command <>{place}/in >{place}/out 2>{place}/err; "
            f"printf 'done {identity} %s\\n' $?\n"
        )
        await machine.ask("chmod", path=place, mode=0o777)
        async with self._turn:
            await self.shell.write(script.encode())
        for name, marker in (("out", OUT), ("err", ERR)):
            command.pumps.append(machine.keep(self._label(command, f"{place}/{name}", marker)))
        return command

    async def _label(self, command, path, marker):
        """Copies one stream of a command into its log, line by line."""
        fd = await self._open_when_there(path)
        rest = b""
        loop = asyncio.get_running_loop()
        os.set_blocking(fd, False)
        try:
            while piece := await _read(loop, fd):
                whole, newline, rest = (rest + piece).rpartition(b"\n")
                if newline:
                    lines = whole.split(b"\n")
                    self._append(command, b"".join(marker + line + b"\n" for line in lines))
            if rest:
                self._append(command, marker + rest + b"\n")
        finally:
            os.close(fd)

    async def _open_when_there(self, path):
        while True:
            with contextlib.suppress(FileNotFoundError):
                fd, _ = await self.box.machine.open(path)
                return fd
            await asyncio.sleep(0.005)

    @staticmethod
    def _append(command, data):
        with open(command.log, "ab") as file:
            file.write(data)

    def close(self):
        """Its sandbox ends: logs go with it."""
        self.ended = True
        for command in self.commands.values():
            with contextlib.suppress(OSError):
                os.unlink(command.log)

    async def end(self):
        """Ends the shell and what it started: SIGTERM, five seconds, SIGKILL."""
        killer = await self.box.machine.spawn(
            ["/usr/bin/python3", "-c", _END_TREE, str(self.shell.pid)], user="root", cwd="/"
        )
        await killer.wait()
        self.close()


async def _read(loop, fd):
    while True:
        try:
            return os.read(fd, 1 << 16)
        except BlockingIOError:
            ready = loop.create_future()
            loop.add_reader(fd, lambda: ready.done() or ready.set_result(None))
            try:
                await ready
            finally:
                loop.remove_reader(fd)


class Toolbox:
    """The routes below /toolbox/{sandbox}.

    Attributes:
        drops: what becomes of the next log followers: [(bytes that are sent, close code)].
        hostile: what they get of a daemon that was taken over, in the log's place: an address to
            which they are sent, or [text, how many times it comes in one message].
        note: called with what a follower asks for, since those are no HTTP requests.
        abort: resets a client's connection, without a word.
    """

    def __init__(self, cloud, wire):
        self.cloud, self.wire = cloud, wire
        self.drops = []
        self.hostile = []
        self.note = lambda path, headers: None
        self.abort = lambda client: None

    def _box(self, identity):
        """The sandbox behind a request, in the words of the proxy before it."""
        box = self.cloud.find(identity)
        if box.state != "started" or box.machine is None:
            raise Refused(400, "bad request: failed to get container IP. Is the Sandbox started?")
        return box

    @contextlib.contextmanager
    def _using(self, identity):
        box = self._box(identity)
        box.active = self.cloud.now()
        box.open += 1
        try:
            yield box
        finally:
            box.open -= 1

    def _session(self, box, name):
        if name not in box.sessions:
            raise Refused(404, "session not found")
        return box.sessions[name]

    def _command(self, box, session, command):
        found = self._session(box, session).commands.get(command)
        if found is None:
            raise Refused(404, "command not found")
        return found

    def _answer(self, model, value, status=200):
        return JSONResponse(self.wire.check("toolbox", model, value), status)

    # --- sessions

    async def create_session(self, request):
        with self._using(request.path_params["box"]) as box:
            name = parsed(CreateSessionRequest, await request.json())["sessionId"]
            if name in box.sessions:
                raise Refused(409, "session already exists")
            session = box.sessions[name] = Session(box, name)
            await session.open()
            return Response(status_code=201)

    async def delete_session(self, request):
        with self._using(request.path_params["box"]) as box:
            session = self._session(box, request.path_params["session"])
            del box.sessions[session.name]
            await session.end()
            return Response(status_code=204)

    async def get_session(self, request):
        with self._using(request.path_params["box"]) as box:
            session = self._session(box, request.path_params["session"])
            commands = [c.describe() for c in session.commands.values()]
            return self._answer("Session", {"sessionId": session.name, "commands": commands})

    async def execute(self, request):
        with self._using(request.path_params["box"]) as box:
            session = self._session(box, request.path_params["session"])
            asked = parsed(SessionExecuteRequest, await request.json())
            command = await session.run(asked["command"])
            if asked.get("runAsync") or asked.get("async"):
                return self._answer("SessionExecuteResponse", {"cmdId": command.id}, 202)
            while command.code is None:
                await asyncio.sleep(0.05)
            await asyncio.gather(*command.pumps)
            found = {"cmdId": command.id, "exitCode": command.code, **self._logs(command)}
            return self._answer("SessionExecuteResponse", found)

    async def get_command(self, request):
        with self._using(request.path_params["box"]) as box:
            command = self._command(
                box, request.path_params["session"], request.path_params["command"]
            )
            return self._answer("Command", command.describe())

    async def get_logs(self, request):
        with self._using(request.path_params["box"]) as box:
            command = self._command(
                box, request.path_params["session"], request.path_params["command"]
            )
            return self._answer("SessionCommandLogsResponse", self._logs(command))

    @staticmethod
    def _logs(command):
        with open(command.log, "rb") as file:
            whole = file.read()
        streams = {OUT: b"", ERR: b""}
        for line in whole.splitlines(True):
            streams[line[:3]] += line[3:]
        return {
            "output": whole.decode(errors="replace"),
            "stdout": streams[OUT].decode(errors="replace"),
            "stderr": streams[ERR].decode(errors="replace"),
        }

    async def send_input(self, request):
        with self._using(request.path_params["box"]) as box:
            name = request.path_params["command"]
            command = self._command(box, request.path_params["session"], name)
            if command.code is not None:
                raise Refused(410, "command completed", code="COMMAND_ALREADY_COMPLETED")
            data = (await request.json())["data"].encode()
            fd, _ = await box.machine.open(f"{_PLACE}/{name}/in", write=True)
            os.write(fd, data)
            os.close(fd)
            return Response(status_code=204)

    async def follow(self, socket):
        """A log from its first byte, until there is an exit code and nothing more comes."""
        self.note(socket.url.path, dict(socket.headers))
        if socket.headers.get("authorization") != f"Bearer {self.cloud.settings.key}":
            await socket.close(1008)
            return
        names = socket.path_params
        try:
            with self._using(names["box"]) as box:
                command = self._command(box, names["session"], names["command"])
                if self.hostile:
                    await self._attack(socket, self.hostile.pop(0))
                    return
                await socket.accept()
                drop, code = self._next_drop()
                reader = asyncio.ensure_future(self._until_gone(socket))
                try:
                    sent = await self._send(socket, box, command, drop, reader)
                finally:
                    reader.cancel()
                if drop is not None and sent >= drop:
                    if code is None:
                        self.abort(socket.client)
                    else:
                        await socket.close(code)
                elif box.machine is None:
                    await socket.close(1011)  # the sandbox went away
                else:
                    await socket.close(1000)
        except Refused:
            await socket.close(1008)
        except (WebSocketDisconnect, RuntimeError):
            pass  # it went away, in one of several ways

    @staticmethod
    async def _attack(socket, what):
        if isinstance(what, str):
            await socket.send_denial_response(Response(None, 302, {"location": what}))
            return
        await socket.accept()
        text, times = what
        await socket.send_bytes(text.encode() * times)
        await socket.close(1000)

    def _next_drop(self):
        """(bytes, code) after and with which a follower is dropped; no code: by a reset."""
        if self.drops:
            return self.drops.pop(0)
        if self.cloud.settings.drop_between:
            return random.randint(*self.cloud.settings.drop_between), random.choice(_CODES)
        return None, None

    @staticmethod
    async def _until_gone(socket):
        while True:
            if (await socket.receive())["type"] == "websocket.disconnect":
                return

    async def _send(self, socket, box, command, drop, reader):
        """Returns how many bytes were sent."""
        sent, empty, began = 0, 0, time.monotonic()
        rounds = max(1, round(self.cloud.settings.log_close_delay / _POLL))
        with open(command.log, "rb") as file:
            while not reader.done() and box.machine is not None:
                data = file.read(_MESSAGE if drop is None else min(_MESSAGE, max(1, drop - sent)))
                if data:
                    empty = 0
                    await socket.send_bytes(data)
                    sent += len(data)
                    if rate := self.cloud.settings.log_rate:
                        await asyncio.sleep(began + sent / rate - time.monotonic())
                    if drop is not None and sent >= drop:
                        break
                    continue
                if drop == 0:
                    break
                empty += 1
                if command.code is not None and empty > rounds:
                    break
                await asyncio.sleep(_POLL)
        return sent

    # --- files

    async def upload(self, request):
        with self._using(request.path_params["box"]) as box:
            async with request.form(max_files=10_000, max_fields=10_000) as form:
                problems = []
                for key, path in form.multi_items():
                    if not key.endswith(".path"):
                        continue
                    file = form[key.removesuffix(".path") + ".file"]
                    try:
                        await box.machine.write_file(
                            path, _pieces(file), user=box.user, owner=box.user
                        )
                    except OSError as e:
                        problems.append(f"{path}: open {path}: {_said(e)[0]}")
            if problems:
                return JSONResponse({"errors": problems}, 400)
            return Response(status_code=200)

    async def download(self, request):
        path = request.query_params["path"]
        with self._using(request.path_params["box"]) as box:
            found = await box.machine.ask("stat", path=path, user=box.user)
            if found["kind"] == "dir":
                raise Refused(400, "path must be a file")
            try:
                fd, size = await box.machine.open(path, user=box.user)
            except PermissionError:  # which Go's own server of files says
                return Response("403 Forbidden\n", 403, media_type="text/plain")

        async def content():
            with self._using(box.id):
                async for piece in pieces_of(fd):
                    yield piece

        headers = {"content-length": str(size), "content-type": "application/octet-stream"}
        return StreamingResponse(content(), headers=headers)

    async def info(self, request):
        with self._using(request.path_params["box"]) as box:
            found = await box.machine.ask("stat", path=request.query_params["path"], user=box.user)
            when = iso(found["modified"])
            described = {
                "name": found["name"], "isDir": found["kind"] == "dir", "size": found["size"],
                "mode": found["text"], "permissions": f"{found['mode']:04o}",
                "owner": found["owner"], "group": found["group"], "modTime": when,
                "modifiedAt": when, "path": found["path"],
            }  # fmt: skip
            return self._answer("FileInfo", described)

    async def folder(self, request):
        with self._using(request.path_params["box"]) as box:
            path, mode = request.query_params["path"], request.query_params["mode"]
            await box.machine.ask("mkdir", path=path, user=box.user, owner=box.user)
            await box.machine.ask("chmod", path=path, user=box.user, mode=int(mode, 8))
            return Response(status_code=201)

    def routes(self):
        one = "/process/session/{session}"
        command = f"{one}/command/{{command}}"
        table = [
            ("POST", "/process/session", self.create_session),
            ("GET", one, self.get_session),
            ("DELETE", one, self.delete_session),
            ("POST", f"{one}/exec", self.execute),
            ("GET", command, self.get_command),
            ("GET", f"{command}/logs", self.get_logs),
            ("POST", f"{command}/input", self.send_input),
            ("POST", "/files/bulk-upload", self.upload),
            ("GET", "/files/download", self.download),
            ("GET", "/files/info", self.info),
            ("POST", "/files/folder", self.folder),
        ]
        before = "/toolbox/{box}"
        return [
            WebSocketRoute(f"{before}{command}/logs", self.follow),
            *[Route(before + path, handler, methods=[m]) for m, path, handler in table],
        ]


async def _pieces(file):
    while piece := await file.read(1 << 18):
        yield piece


def _said(error):
    return _WORDS.get(
        error.errno, (os.strerror(error.errno or 5).lower(), 500, "INTERNAL_SERVER_ERROR")
    )
