"""Snapshots: root directories, built from Dockerfiles or captured from sandboxes."""

import asyncio
import contextlib
import re
import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from tests.emulators.machine import Machine, copy_root, lay_out, remove_root

from .cloud import HOMES, ORGANIZATION, Refused, iso

#: What there is at registries: all have this machine's /usr.
IMAGES = re.compile(r"(python|debian|ubuntu|daytonaio/sandbox):[\w.-]+\Z")
#: One whose PATH has everything but Python.
WITHOUT_PYTHON = "no-python:1"
DEFAULT = "daytonaio/sandbox:0.5.0"
SIZE = (1, 1, 3, 0)  # CPUs, GB, GB, GPUs where a request doesn't say
_BUILT = (".", "build", "active")


@dataclass
class Snapshot:
    """A snapshot, or one in the making."""

    id: str
    name: str
    root: Path
    created: float
    cpu: int
    memory: int
    disk: int
    gpu: int
    user: str = "daytona"
    general: bool = False
    state: str = "pending"
    error: str | None = None
    dockerfile: str | None = None
    image: str | None = None
    source: str | None = None  # the sandbox that it was captured from
    environment: dict = field(default_factory=dict)
    log: str = ""
    used: float | None = None
    task: asyncio.Task | None = None


class Snapshots:
    """The organisation's snapshots, by name."""

    def __init__(self, cloud):
        self.cloud = cloud
        self.by_name = {}
        self.builds = 0

    def begin(self):
        """Makes the one that everybody has."""
        made = self._new(DEFAULT, {}, general=True)
        lay_out(self._place(made), HOMES["daytona"])
        # A Python of its own, where no image has one.
        own = made.root / "opt" / "python" / "bin"
        own.mkdir(parents=True)
        (own / "python3").symlink_to("/usr/bin/python3")
        made.environment = {"PATH": "/opt/python/bin:/usr/local/bin:/usr/bin:/bin"}
        made.state = "active"

    def _new(self, name, request, **more):
        sizes = (
            request.get(k) or d for k, d in zip(("cpu", "memory", "disk", "gpu"), SIZE, strict=True)
        )
        identity = str(uuid.uuid4())
        root = self.cloud.directory / "snapshots" / identity
        made = Snapshot(identity, name, root, self.cloud.now(), *sizes, **more)
        self.by_name[name] = made
        return made

    @staticmethod
    def _place(snapshot):
        snapshot.root.mkdir(parents=True)
        return snapshot.root

    def find(self, id_or_name):
        for snapshot in self.by_name.values():
            if id_or_name in (snapshot.id, snapshot.name):
                return snapshot
        raise Refused(404, f"Snapshot with ID or name {id_or_name} not found")

    def usable(self, id_or_name):
        """For a creation, in the words of the real one."""
        snapshot = self.find(id_or_name or DEFAULT)
        if snapshot.state != "active":
            raise Refused(400, f"Snapshot {snapshot.name} is {snapshot.state}")
        snapshot.used = self.cloud.now()
        return snapshot

    def create(self, request):
        name = request["name"]
        self._refuse(name)
        image = request.get("imageName")
        if image and (":" not in image or image.endswith((":latest", ":lts", ":stable"))):
            raise Refused(400, "Image must have a fixed tag (latest, lts and stable are refused)")
        sizes = [request.get(k) or d for k, d in zip(("cpu", "memory", "disk"), SIZE, strict=False)]
        self.cloud.admit(*sizes)
        made = self._new(name, request)
        made.image = image
        build = request.get("buildInfo") or {}
        made.dockerfile = build.get("dockerfileContent") or f"FROM {image}\n"
        made.task = asyncio.ensure_future(self._build(made, bool(build)))
        return made

    def _refuse(self, name):
        if name in self.by_name:
            raise Refused(409, f"Snapshot with name {name} already exists for this organization")
        if "write:snapshots" not in self.cloud.settings.may:
            raise Refused(403, "Insufficient permissions: write:snapshots")

    async def _build(self, snapshot, built):
        self.builds += 1
        try:
            await asyncio.sleep(self.cloud.settings.build_delay)
            snapshot.state = "building" if built else "pulling"
            await self._run(snapshot)
            snapshot.state = "active"
        except Exception as e:
            snapshot.error = str(e) or type(e).__name__
            snapshot.state = "build_failed" if built else "error"

    async def _run(self, snapshot):
        """The lines of a Dockerfile, in their order."""
        first, *lines = snapshot.dockerfile.strip().splitlines()
        image = first.partition(" ")[2].strip()
        snapshot.log += f"Step 1: {first}\n"
        if not IMAGES.match(image) and image != WITHOUT_PYTHON:
            raise Refused(400, f"pull access denied for {image}, repository does not exist")
        await asyncio.to_thread(lay_out, self._place(snapshot), HOMES["daytona"])
        if image == WITHOUT_PYTHON:
            snapshot.environment = {"PATH": "/opt/bin"}
            await asyncio.to_thread(_all_but_python, snapshot.root)
        machine = None
        try:
            for number, line in enumerate(lines, 2):
                snapshot.log += f"Step {number}: {line}\n"
                word, _, rest = line.partition(" ")
                if word == "USER":
                    snapshot.user = rest.strip()
                elif word == "RUN":
                    machine = machine or await Machine.start(snapshot.root, HOMES["daytona"])
                    await self._command(snapshot, machine, rest)
                elif line.strip():
                    raise Refused(400, f"the emulator knows no {word} in a Dockerfile")
        finally:
            if machine is not None:
                await machine.destroy(keep_root=True)

    async def _command(self, snapshot, machine, command):
        process = await machine.spawn(
            ["/bin/sh", "-c", command], user=snapshot.user, cwd="/", env=snapshot.environment
        )

        async def read(name):
            async for piece in process.read(name):
                snapshot.log += piece.decode(errors="replace")

        _, _, status = await asyncio.gather(read("stdout"), read("stderr"), process.wait())
        if status:
            code = status >> 8 or 128 + (status & 127)
            raise Refused(
                400, f"The command '/bin/sh -c {command}' returned a non-zero code: {code}"
            )

    def capture(self, box, name):
        """A snapshot of a sandbox's files, by which that is stopped for a moment."""
        self._refuse(name)
        sizes = {"cpu": box.cpu, "memory": box.memory, "disk": box.disk, "gpu": box.gpu}
        made = self._new(name, sizes, user=box.user, source=box.id)
        made.environment = dict(box.environment)
        made.state = "snapshotting"
        self.cloud.move(box, "snapshotting")
        made.task = asyncio.ensure_future(self._capture(made, box))

    async def _capture(self, snapshot, box):
        await asyncio.sleep(self.cloud.settings.build_delay)
        if box.machine:
            await box.machine.save()
        await asyncio.to_thread(copy_root, box.root, self._place(snapshot))
        snapshot.state = "active"
        if box.state == "snapshotting":
            self.cloud.move(box, "started")

    async def remove(self, snapshot):
        self.by_name.pop(snapshot.name, None)
        await asyncio.to_thread(remove_root, snapshot.root)

    async def close(self):
        for snapshot in list(self.by_name.values()):
            if snapshot.task:
                snapshot.task.cancel()
                with contextlib.suppress(BaseException):
                    await snapshot.task
            await self.remove(snapshot)

    def activate(self, snapshot):
        if snapshot.state != "inactive":
            raise Refused(400, f"Snapshot {snapshot.name} is already active")
        snapshot.state = "pending"

        async def wake():
            await asyncio.sleep(self.cloud.settings.build_delay)
            snapshot.state = "active"

        snapshot.task = asyncio.ensure_future(wake())

    def describe(self, snapshot):
        """As the API has it."""
        now = iso(snapshot.created)
        found = {
            "id": snapshot.id, "general": snapshot.general, "name": snapshot.name,
            "state": snapshot.state, "size": 0.2, "entrypoint": [],
            "cpu": snapshot.cpu, "gpu": snapshot.gpu, "mem": snapshot.memory,
            "disk": snapshot.disk, "errorReason": snapshot.error, "createdAt": now,
            "updatedAt": now, "lastUsedAt": snapshot.used and iso(snapshot.used),
            "sourceSandboxId": snapshot.source, "ref": f"registry/{snapshot.id}",
            "regionIds": ["us"],
        }  # fmt: skip
        if not snapshot.general:
            found["organizationId"] = ORGANIZATION
        if snapshot.image:
            found["imageName"] = snapshot.image
        elif snapshot.dockerfile:
            found["buildInfo"] = {
                "dockerfileContent": snapshot.dockerfile, "contextHashes": [], "createdAt": now,
                "updatedAt": now, "snapshotRef": f"registry/{snapshot.id}",
            }  # fmt: skip
        return found


def _all_but_python(root):
    """A directory of programs without Python."""
    target = root / "opt" / "bin"
    target.mkdir()
    for path in Path("/usr/bin").iterdir():
        if not path.name.startswith(("python", "pydoc")):
            with contextlib.suppress(OSError):
                (target / path.name).symlink_to(path)


def forget(directory):
    """Removes what a server that was killed has left."""
    for path in Path(directory).glob("*"):
        shutil.rmtree(path, ignore_errors=True)
