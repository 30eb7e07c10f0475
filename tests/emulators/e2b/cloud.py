"""What an account has: sandboxes that end with their lifetime, templates, and limits."""

import asyncio
import contextlib
import datetime
import secrets
import shutil
import string
import tarfile
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from ..machine import Machine, copy_root, lay_out, remove_root

HOME = "/home/user"
ENVD_VERSION = "0.6.10"
#: What can be pulled, and which of this machine's programs it lacks.
IMAGES = {
    "e2bdev/base": (),
    "python:3.12-slim": (),
    "python:3.11": (),
    "debian:12": (),
    "busybox:1": ("python3*", "pydoc3*"),
}
_LETTERS = string.ascii_lowercase + string.digits


class Refused(Exception):
    """An answer of the control plane that is an error."""

    def __init__(self, status, message, headers=None):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or {}


def identifier(length=19):
    return "i" + "".join(secrets.choice(_LETTERS) for _ in range(length))


def now():
    return datetime.datetime.now(datetime.timezone.utc)


@dataclass
class Settings:
    """What a test may change while it runs.

    Attributes:
        concurrent, per_second: the account's limits.
        hours: how long a sandbox may live, at most.
        boot: seconds that a creation takes.
        build: seconds that each step of a build takes at least.
        disk: MB that can be written below /home/user in a sandbox; 0: what there is.
    """

    concurrent: int = 20
    per_second: float = 1.0
    hours: float = 1.0
    boot: float = 0.0
    build: float = 0.0
    disk: int = 0


@dataclass
class Template:
    id: str
    names: list
    cpus: int = 2
    memory: int = 512
    limited: bool = False  # whether `memory` and `cpus` are kept to
    hidden: tuple = ()
    root: Path | None = None
    builds: dict = field(default_factory=dict)


@dataclass
class Build:
    id: str
    status: str = "waiting"
    log: list = field(default_factory=list)
    reason: dict | None = None

    def say(self, message, level="info"):
        entry = {"timestamp": now().isoformat(), "message": message, "level": level}
        self.log.append(entry)


@dataclass
class Sandbox:
    id: str
    template: Template
    machine: Machine
    token: str
    metadata: dict
    request: dict
    started: datetime.datetime
    ends: datetime.datetime
    state: str = "running"
    processes: dict = field(default_factory=dict)
    timer: asyncio.TimerHandle | None = None


class Cloud:
    """One account, whose key is `key`."""

    def __init__(self, key, directory):
        self.key, self.directory = key, Path(directory)
        self.settings = Settings()
        self.sandboxes = {}
        self.templates = {}
        self.uploads = {}  # {hash: path}
        self.created = {}  # {idempotency key: sandbox}
        self._reserved = 0
        self._next = 0.0
        self._tasks = set()
        base = Template("base0base0base0base0", ["base"])
        self.templates[base.id] = base

    # --- sandboxes

    async def create(self, request, key=None):
        """A new sandbox, or the one that the same idempotency key made before."""
        if key is not None:
            if key not in self.created:
                self.created[key] = asyncio.ensure_future(self._create(request))
            try:
                return await asyncio.shield(self.created[key])
            except Refused:
                self.created.pop(key, None)
                raise
        return await self._create(request)

    async def _create(self, request):
        seconds = request.get("timeout", 300)
        self._check_lifetime(seconds)
        template = self.template(request["templateID"])
        self._pace()
        living = sum(s.state == "running" for s in self.sandboxes.values()) + self._reserved
        if living >= self.settings.concurrent:
            raise Refused(
                429,
                "you have reached the maximum number of concurrent E2B sandboxes "
                f"({self.settings.concurrent}). If you need more, please contact us.",
            )
        self._reserved += 1
        try:
            await asyncio.sleep(self.settings.boot)
            machine = await self._boot(template)
        finally:
            self._reserved -= 1
        began = now()
        sandbox = Sandbox(
            identifier(), template, machine, secrets.token_hex(16),
            dict(request.get("metadata") or {}), request, began, began,
        )  # fmt: skip
        self.sandboxes[sandbox.id] = sandbox
        self.set_timeout(sandbox, seconds)
        return sandbox

    async def _boot(self, template):
        root = Path(tempfile.mkdtemp(dir=self.directory))
        if template.root is None:
            await asyncio.to_thread(lay_out, root, HOME)
        else:
            await asyncio.to_thread(copy_root, template.root, root)
        size = {"memory": template.memory, "cpus": template.cpus} if template.limited else {}
        size["disk"] = self.settings.disk
        return await Machine.start(root, HOME, hidden=template.hidden, below=HOME, **size)

    def _pace(self):
        """The limiter of creations, which says when to come again."""
        due = max(self._next, time.monotonic())
        if due - time.monotonic() > 0 and self.settings.per_second:
            wait = max(1, round(due - time.monotonic()))
            raise Refused(429, "Rate limit exceeded", {"retry-after": str(wait)})
        if self.settings.per_second:
            self._next = due + 1 / self.settings.per_second

    def _check_lifetime(self, seconds):
        if seconds <= 0:
            raise Refused(400, "Timeout must be greater than 0")
        if seconds > self.settings.hours * 3600:
            raise Refused(400, f"Timeout cannot be greater than {self.settings.hours:g} hours")

    def set_timeout(self, sandbox, seconds):
        """Has it end so many seconds from now."""
        self._check_lifetime(seconds)
        if sandbox.timer is not None:
            sandbox.timer.cancel()
        sandbox.ends = now() + datetime.timedelta(seconds=seconds)
        loop = asyncio.get_running_loop()
        sandbox.timer = loop.call_later(seconds, self.keep, self._expire, sandbox)

    async def _expire(self, sandbox):
        if sandbox.request.get("autoPause"):
            await self.pause(sandbox)
        else:
            await self.kill(sandbox)

    async def kill(self, sandbox):
        self.sandboxes.pop(sandbox.id, None)
        if sandbox.timer is not None:
            sandbox.timer.cancel()
        await sandbox.machine.destroy()

    async def pause(self, sandbox):
        sandbox.state = "paused"
        sandbox.timer.cancel()
        await sandbox.machine.pause()

    async def resume(self, sandbox, seconds):
        await sandbox.machine.resume()
        sandbox.state = "running"
        self.set_timeout(sandbox, seconds)

    def find(self, sandbox_id):
        if sandbox_id not in self.sandboxes:
            raise Refused(404, f"Sandbox {sandbox_id} not found")
        return self.sandboxes[sandbox_id]

    def keep(self, function, *arguments):
        task = asyncio.ensure_future(function(*arguments))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- templates

    def template(self, name):
        """A template that can be used, by its id or a name."""
        found = self.find_template(name)
        if found.builds and not any(b.status == "ready" for b in found.builds.values()):
            raise Refused(404, f"template '{name}' has no ready build")
        return found

    def find_template(self, name):
        for template in self.templates.values():
            if name == template.id or name.partition(":")[0] in template.names:
                return template
        raise Refused(404, f"template '{name}' not found")

    def request_build(self, request):
        """A template of that name, and a build of it that waits for its steps."""
        name, cpus, memory = request["name"], request.get("cpuCount"), request.get("memoryMB")
        if cpus is not None and not 1 <= cpus <= 8:
            raise Refused(400, "CPU count must be between 1 and 8")
        if memory is not None and (memory < 128 or memory > 8192 or memory % 2):
            raise Refused(400, "Memory must be an even number between 128 and 8192 MiB")
        try:
            template = self.find_template(name)
        except Refused:
            template = Template(identifier(), [name])
            self.templates[template.id] = template
        template.limited = cpus is not None or memory is not None
        template.cpus, template.memory = cpus or 2, memory or 512
        build = Build(identifier())
        template.builds[build.id] = build
        return template, build

    def start_build(self, template, build, request):
        build.status = "building"
        self.keep(self._build, template, build, request)

    async def _build(self, template, build, request):
        root = Path(tempfile.mkdtemp(dir=self.directory))
        machine = None
        step = "base"
        try:
            hidden = await self._base(request, root)
            machine = await Machine.start(root, HOME, hidden=hidden)
            state = {"user": "root", "cwd": "/", "env": {}}
            for number, instruction in enumerate(request.get("steps") or [], 1):
                step = str(number)
                build.say(f"[{number}] {instruction['type']} {' '.join(instruction['args'])}")
                await asyncio.sleep(self.settings.build)
                await self._step(machine, build, instruction, state)
            await machine.destroy(keep_root=True)
            template.root, template.hidden = root, hidden
            build.say("Build finished")
            build.status = "ready"
        except Exception as e:  # whatever it is, the build has failed
            if machine is not None:
                await machine.destroy(keep_root=True)
            remove_root(root)
            build.reason = {"message": str(e), "step": step}
            build.status = "error"

    async def _base(self, request, root):
        if name := request.get("fromTemplate"):
            base = self.template(name)
            if base.root is not None:
                await asyncio.to_thread(copy_root, base.root, root)
                return base.hidden
            hidden = base.hidden
        else:
            image = (request.get("fromImage") or "e2bdev/base").removesuffix(":latest")
            if image not in IMAGES:
                raise Refused(400, f"failed to pull image '{image}': not found")
            hidden = IMAGES[image]
        await asyncio.to_thread(lay_out, root, HOME)
        return hidden

    async def _step(self, machine, build, instruction, state):
        kind, args = instruction["type"], instruction["args"]
        if kind == "RUN":
            user = args[1] if len(args) > 1 else state["user"]
            process = await machine.spawn(
                ["/bin/bash", "-l", "-c", args[0]], env=state["env"], cwd=state["cwd"], user=user
            )

            async def pump(name):
                async for piece in process.read(name):
                    for line in piece.decode(errors="replace").splitlines():
                        build.say(line)

            await asyncio.gather(pump("stdout"), pump("stderr"))
            status = await process.wait()
            if status:
                raise Refused(400, f"failed to run command '{args[0]}': exit status {status >> 8}")
        elif kind == "COPY":
            await self._copy(machine, instruction, args)
        elif kind == "USER":
            state["user"] = args[0]
        elif kind == "WORKDIR":
            state["cwd"] = args[0]
            await machine.ask("mkdir", path=args[0], owner=state["user"])
        elif kind == "ENV":
            state["env"].update(zip(args[::2], args[1::2]))
        else:
            raise Refused(400, f"unknown step {kind}")

    async def _copy(self, machine, instruction, args):
        source, target = args[0], args[1]
        owner = (args[2] if len(args) > 2 else "") or "root"
        with tarfile.open(self.uploads[instruction["filesHash"]]) as archive:
            for member in archive:
                relative = member.name.removeprefix(source.rstrip("/")).lstrip("/")
                path = f"{target.rstrip('/')}/{relative}" if relative else target
                if target.endswith("/") and not relative:
                    path = target + Path(member.name).name
                if member.isdir():
                    await machine.ask("mkdir", path=path, owner=owner)
                elif member.isfile():
                    content = archive.extractfile(member)

                    async def pieces(content=content):
                        while piece := content.read(1 << 18):
                            yield piece

                    await machine.write_file(path, pieces(), owner=owner)
                    await machine.ask("chmod", path=path, mode=member.mode & 0o7777)

    async def delete_template(self, name):
        template = self.find_template(name)
        del self.templates[template.id]
        if template.root is not None:
            await asyncio.to_thread(remove_root, template.root)

    async def close(self):
        for sandbox in list(self.sandboxes.values()):
            with contextlib.suppress(OSError):
                await self.kill(sandbox)
        for template in self.templates.values():
            if template.root is not None:
                remove_root(template.root)
        shutil.rmtree(self.directory, ignore_errors=True)
