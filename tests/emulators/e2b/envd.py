"""The daemon in each sandbox: processes and files by RPC, on the stubs of the installed SDK."""

import asyncio
import base64
import contextlib
import contextvars
import errno
import os
import posixpath
import zlib
from dataclasses import dataclass, field

from connectrpc.code import Code
from connectrpc.errors import ConnectError
from e2b.envd.filesystem import filesystem_connect, filesystem_pb
from e2b.envd.process import process_connect, process_pb
from protobuf import Oneof
from protobuf.wkt.google.protobuf.timestamp_pb import Timestamp
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .cloud import HOME

_QUEUE = 64  # events that wait for a reader before the process is made to
_REMEMBERED_SECONDS = 30.0  # how long an end is told to whoever connects
_KEEPALIVE_SECONDS = 90.0
_GZIP = 16 + zlib.MAX_WBITS
_WORDS = {errno.ENOENT: (404, "not found"), errno.EISDIR: (400, "is a directory")}

#: The sandbox that the request at hand is for.
CURRENT = contextvars.ContextVar("sandbox")

Event = process_pb.ProcessEvent


class Envd:
    """Routes by the header that names the sandbox; the account is one."""

    def __init__(self, cloud):
        self.cloud = cloud
        processes = process_connect.ProcessASGIApplication(Processes(), read_max_bytes=None)
        files = filesystem_connect.FilesystemASGIApplication(Files(), read_max_bytes=None)
        self.rpc = {"/process.Process": processes, "/filesystem.Filesystem": files}
        self.rest = Starlette(
            routes=[
                Route("/files", upload, methods=["POST"]),
                Route("/files", download, methods=["GET"]),
                Route("/health", health, methods=["GET"]),
            ]
        )

    def serves(self, path):
        return path in ("/files", "/health") or path.rpartition("/")[0] in self.rpc

    async def __call__(self, scope, receive, send):
        headers = {k.decode(): v.decode() for k, v in scope["headers"]}
        sandbox = self.cloud.sandboxes.get(headers.get("e2b-sandbox-id"))
        if sandbox is None or sandbox.state != "running":
            body = {
                "sandboxId": headers.get("e2b-sandbox-id", ""),
                "message": "The sandbox was not found", "code": 502,
            }  # fmt: skip
            return await JSONResponse(body, 502)(scope, receive, send)
        if scope["path"] != "/health" and headers.get("x-access-token") != sandbox.token:
            return await error(401, "unauthorized")(scope, receive, send)
        CURRENT.set(sandbox)
        try:
            app = self.rpc.get(scope["path"].rpartition("/")[0], self.rest)
            return await app(scope, receive, send)
        except ClientDisconnect:
            return None


def error(status, message):
    return JSONResponse({"code": status, "message": message}, status)


def user_of(headers):
    """The user that a request names, as the name of an `Authorization: Basic`; else "user"."""
    words = (headers.get("authorization") or "").split()
    name = base64.b64decode(words[1]).decode().partition(":")[0] if len(words) == 2 else "user"
    if name not in ("root", "user"):
        raise ConnectError(Code.UNAUTHENTICATED, f"invalid username: '{name}'")
    return name


# --- processes


@dataclass
class Running:
    """A process, and who listens to it."""

    config: process_pb.ProcessConfig
    tag: str | None
    process: object
    readers: set = field(default_factory=set)
    end: Event | None = None

    async def tell(self, event):
        """Hands an event to everybody who is connected, and waits for the slowest; or drops it."""
        for reader in list(self.readers):
            await reader.put(event)


class Reader:
    """What one connection has not been sent yet."""

    def __init__(self):
        self._events = asyncio.Queue(_QUEUE)
        self._gone = asyncio.Event()

    async def put(self, event):
        put, gone = (asyncio.ensure_future(c) for c in (self._events.put(event), self._gone.wait()))
        await asyncio.wait({put, gone}, return_when=asyncio.FIRST_COMPLETED)
        for task in (put, gone):
            task.cancel()

    def leave(self):
        self._gone.set()

    async def next(self, seconds):
        return await asyncio.wait_for(self._events.get(), seconds)


class Processes:
    async def start(self, request, ctx):
        sandbox, config, user = CURRENT.get(), request.process, user_of(ctx.request_headers)
        cwd = config.cwd if config.has_field("cwd") else None
        if request.pty is not None:
            raise ConnectError(Code.UNIMPLEMENTED, "this emulator has no terminals")
        stdin = request.stdin if request.has_field("stdin") else True
        try:
            process = await sandbox.machine.spawn(
                [config.cmd, *config.args], env=dict(config.envs), cwd=cwd, user=user, stdin=stdin
            )
        except OSError as e:
            if cwd and e.errno == errno.ENOENT:
                raise ConnectError(Code.INVALID_ARGUMENT, f"cwd '{cwd}' does not exist") from None
            raise ConnectError(Code.INVALID_ARGUMENT, f"error starting process: {e}") from None
        running = Running(config, request.tag if request.has_field("tag") else None, process)
        sandbox.processes[process.pid] = running
        if ctx.timeout_ms is not None:  # its life, not the connection's
            seconds = ctx.timeout_ms / 1000
            sandbox.machine.keep(self._end_at(running, seconds))
        reader = Reader()
        running.readers.add(reader)
        sandbox.machine.keep(self._pump(sandbox, running))
        async for event in self._events(sandbox, running, reader, ctx):
            yield process_pb.StartResponse(event=event)

    async def connect(self, request, ctx):
        sandbox = CURRENT.get()
        running = self._find(sandbox, request.process)
        reader = Reader()
        if running.end is None:
            running.readers.add(reader)
        async for event in self._events(sandbox, running, reader, ctx):
            yield process_pb.ConnectResponse(event=event)

    async def _events(self, sandbox, running, reader, ctx):
        every = float(ctx.request_headers.get("keepalive-ping-interval") or _KEEPALIVE_SECONDS)
        try:
            yield Event(event=Oneof("start", Event.StartEvent(pid=running.process.pid)))
            if running.end is not None and reader not in running.readers:
                yield running.end
                return
            while True:
                try:
                    event = await reader.next(every)
                except asyncio.TimeoutError:
                    event = Event(event=Oneof("keepalive", Event.KeepAlive()))
                if event is None:
                    raise ConnectError(Code.DEADLINE_EXCEEDED, "context deadline exceeded")
                if sandbox.machine.ended:
                    raise ConnectError(
                        Code.UNAVAILABLE,
                        f"the connection to sandbox {sandbox.id} ended before the stream completed",
                    )
                yield event
                if event is running.end:
                    return
        finally:
            running.readers.discard(reader)
            reader.leave()

    async def _pump(self, sandbox, running):
        """Passes on what a process writes, or drops it; its end waits for both streams."""

        async def stream(name):
            async for piece in running.process.read(name):
                data = Event.DataEvent(output=Oneof(name, piece))
                await running.tell(Event(event=Oneof("data", data)))

        with contextlib.suppress(OSError):
            await asyncio.gather(stream("stdout"), stream("stderr"))
        status = await running.process.wait()
        if os.WIFSIGNALED(status):
            word = {9: "killed", 15: "terminated"}.get(os.WTERMSIG(status), str(status))
            code, exited, said = -1, False, f"signal: {word}"
        else:
            code, exited, said = os.WEXITSTATUS(status), True, f"exit status {status >> 8}"
        failure = {"error": said} if code else {}
        end = Event.EndEvent(exit_code=code, exited=exited, status=said, **failure)
        running.end = Event(event=Oneof("end", end))
        await running.tell(running.end)
        loop = asyncio.get_running_loop()
        loop.call_later(_REMEMBERED_SECONDS, sandbox.processes.pop, running.process.pid, None)

    async def _end_at(self, running, seconds):
        await asyncio.sleep(seconds)
        if running.end is None:
            await running.process.signal(9)  # this one, not its children
            await running.tell(None)

    @staticmethod
    def _find(sandbox, selector):
        wanted = selector.selector
        for pid, running in sandbox.processes.items():
            if (wanted.field, wanted.value) in (("pid", pid), ("tag", running.tag)):
                return running
        raise ConnectError(Code.NOT_FOUND, f"process with {wanted.field} {wanted.value} not found")

    async def list(self, request, ctx):
        found = [
            process_pb.ProcessInfo(config=r.config, pid=pid, **({"tag": r.tag} if r.tag else {}))
            for pid, r in CURRENT.get().processes.items()
            if r.end is None
        ]
        return process_pb.ListResponse(processes=found)

    async def send_signal(self, request, ctx):
        running = self._find(CURRENT.get(), request.process)
        if running.end is not None:
            raise ConnectError(Code.NOT_FOUND, "process has ended")
        await running.process.signal(int(request.signal))
        return process_pb.SendSignalResponse()

    async def send_input(self, request, ctx):
        running = self._find(CURRENT.get(), request.process)
        with contextlib.suppress(BrokenPipeError):
            await running.process.write(request.input.input.value)
        return process_pb.SendInputResponse()

    async def close_stdin(self, request, ctx):
        self._find(CURRENT.get(), request.process).process.close_stdin()
        return process_pb.CloseStdinResponse()

    async def stream_input(self, request, ctx):
        running = None
        async for message in request:
            part = message.event
            if part.field == "start":
                running = self._find(CURRENT.get(), part.value.process)
            elif part.field == "data" and running is not None:
                await running.process.write(part.value.input.input.value)
        return process_pb.StreamInputResponse()

    async def update(self, request, ctx):
        raise ConnectError(Code.UNIMPLEMENTED, "this emulator has no terminals")


# --- files


def absolute(path):
    return posixpath.normpath(posixpath.join(HOME, path.replace("~", HOME, 1)))


def entry_of(found):
    kinds = {"file": filesystem_pb.FileType.FILE, "dir": filesystem_pb.FileType.DIRECTORY}
    seconds = int(found["modified"])
    more = {"symlink_target": found["target"]} if found["target"] else {}
    return filesystem_pb.EntryInfo(
        name=found["name"], type=kinds.get(found["kind"], filesystem_pb.FileType.UNSPECIFIED),
        path=found["path"], size=found["size"], mode=found["mode"], permissions=found["text"],
        owner=found["owner"], group=found["group"], modified_time=Timestamp(seconds=seconds),
        **more,
    )  # fmt: skip


async def asked(op, path, **more):
    """An operation on files, whose errors are RPC's."""
    codes = {
        errno.ENOENT: Code.NOT_FOUND, errno.EEXIST: Code.ALREADY_EXISTS,
        errno.ENOTDIR: Code.INVALID_ARGUMENT, errno.EISDIR: Code.INVALID_ARGUMENT,
    }  # fmt: skip
    try:
        return await CURRENT.get().machine.ask(op, path=absolute(path), **more)
    except OSError as e:
        raise ConnectError(codes.get(e.errno, Code.INTERNAL), f"{path}: {e.strerror}") from None


class Files:
    async def stat(self, request, ctx):
        return filesystem_pb.StatResponse(entry=entry_of(await asked("stat", request.path)))

    async def make_dir(self, request, ctx):
        if not await asked("mkdir", request.path, owner=user_of(ctx.request_headers)):
            raise ConnectError(Code.ALREADY_EXISTS, f"directory already exists: {request.path}")
        return filesystem_pb.MakeDirResponse(entry=entry_of(await asked("stat", request.path)))

    async def move(self, request, ctx):
        owner = user_of(ctx.request_headers)
        await asked("move", request.source, target=absolute(request.destination), owner=owner)
        found = await asked("stat", request.destination)
        return filesystem_pb.MoveResponse(entry=entry_of(found))

    async def list_dir(self, request, ctx):
        found = await asked("list", request.path, depth=request.depth or 1)
        return filesystem_pb.ListDirResponse(entries=[entry_of(e) for e in found])

    async def remove(self, request, ctx):
        with contextlib.suppress(ConnectError):  # nothing there is as good
            await asked("remove", request.path)
        return filesystem_pb.RemoveResponse()

    def watch_dir(self, request, ctx):
        raise ConnectError(Code.UNIMPLEMENTED, "this emulator watches nothing")

    async def create_watcher(self, request, ctx):
        raise ConnectError(Code.UNIMPLEMENTED, "this emulator watches nothing")

    get_watcher_events = remove_watcher = create_watcher


async def health(request):
    return Response(status_code=204)


async def upload(request):
    """Writes a body as it comes, or each file of a form."""
    machine = CURRENT.get().machine
    user = request.query_params.get("username") or "user"
    written = []

    async def write(path, pieces):
        target = absolute(path)
        await machine.write_file(target, pieces, owner=user)
        written.append({"name": posixpath.basename(target), "path": target, "type": "file"})

    try:
        if request.headers["content-type"].startswith("application/octet-stream"):
            await write(request.query_params["path"], inflated(request))
        else:
            async with request.form() as form:
                for part in form.getlist("file"):
                    path = request.query_params.get("path") or part.filename
                    await write(path, whole(part))
    except OSError as e:
        status, words = _WORDS.get(e.errno, (500, e.strerror))
        if e.errno in (errno.ENOTDIR, errno.EEXIST):
            status, words = 400, "error resolving path: not a directory"
        return error(status, f"error opening file: {words}")
    return JSONResponse(written)


async def inflated(request):
    inflate = zlib.decompressobj(_GZIP) if "gzip" in request.headers.get("content-encoding", "") \
        else None  # fmt: skip
    async for piece in request.stream():
        yield inflate.decompress(piece) if inflate else piece


async def whole(part):
    while piece := await part.read(1 << 18):
        yield piece


async def download(request):
    """Sends a file, packed if the client says that it takes that: so does envd."""
    path = absolute(request.query_params["path"])
    machine = CURRENT.get().machine
    try:
        fd, size = await machine.open(path)
    except OSError as e:
        status, words = _WORDS.get(e.errno, (500, e.strerror))
        return error(status, f"path '{path}' {words}")
    from ..machine import pieces_of

    if "gzip" not in request.headers.get("accept-encoding", ""):
        return StreamingResponse(pieces_of(fd), headers={"content-length": str(size)})

    async def packed():
        deflate = zlib.compressobj(wbits=_GZIP)
        async for piece in pieces_of(fd):
            yield await asyncio.to_thread(deflate.compress, piece)
        yield deflate.flush()

    return StreamingResponse(packed(), headers={"content-encoding": "gzip"})
