"""The organisation: its settings, quotas and sandboxes, and a clock that can go fast."""

import asyncio
import contextlib
import datetime
import shutil
import time
import uuid
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from tests.emulators.machine import Machine, copy_root

ORGANIZATION = "7e1a64b2-8d0f-4c3b-9a54-2f6d1c0e9b77"
REGIONS = ("us", "eu")
HOMES = {"root": "/root", "daytona": "/home/daytona"}
_TICK = 0.05


class Refused(Exception):
    """An answer that is an error: its status, what it says, and headers."""

    def __init__(self, status, message, headers=None, **more):
        super().__init__(message)
        self.status, self.message, self.headers, self.more = status, message, headers or {}, more


@dataclass
class Settings:
    """What a test may choose, with the defaults of a small account."""

    speed: float = 1.0  # seconds of the cloud's in one of ours
    events: bool = True
    start_delay: float = 0.05  # seconds until a sandbox has started
    fails_to_start: int = 0  # how many of the next sandboxes do
    build_delay: float = 0.05
    key: str = "dtn_emulated_key_0123456789abcdef"
    may: tuple = ("write:sandboxes", "write:snapshots")
    sees_organization: bool = True
    restricted: bool = False  # a tier that decides what sandboxes reach
    suspended: bool = False
    total_cpu: int = 1000
    total_memory: int = 1000
    largest: tuple = (4, 8, 10)  # CPUs, GB, GB of one sandbox
    create_rate: int = 0  # creations in each window; 0: no limit
    rate_window: float = 1.0  # seconds of ours
    log_close_delay: float = 1.0  # seconds after a command's end until its log is closed
    log_rate: float = 0.0  # bytes a second of each log's follower; 0: as fast as it goes
    drop_between: tuple = ()  # every follower is dropped after so many bytes, at random
    page: int = 100
    toolbox_host: str = "127.0.0.1"  # as sandboxes say it
    open_renews: bool = True  # whether a request of the toolbox that is open counts as activity


@dataclass
class Box:
    """A sandbox."""

    id: str
    name: str
    request: dict
    cpu: int
    memory: int
    disk: int
    gpu: int
    user: str
    snapshot: str
    created: float
    root: Path
    environment: dict
    state: str = "creating"
    desired: str = "started"
    intervals: dict = field(default_factory=dict)  # stop, archive, delete: minutes
    ends: float | None = None  # by the cloud's clock
    active: float = 0.0
    stopped: float | None = None
    evicted: str | None = None
    open: int = 0  # requests of its toolbox that are under way
    machine: Machine | None = None
    sessions: dict = field(default_factory=dict)
    task: asyncio.Task | None = None


class Cloud:
    """Everything that one key sees.

    Attributes:
        listeners: called with (event, box) for each change.
    """

    def __init__(self, directory):
        self.directory = Path(directory)
        self.settings = Settings()
        self.boxes = {}
        self.listeners = []
        self._creations = deque()
        self._began, self._zero = time.time(), time.monotonic()
        self._offset = 0.0

    # --- time

    def now(self):
        """Seconds since 1970 by the cloud's clock."""
        return self._began + self._offset + (time.monotonic() - self._zero) * self.settings.speed

    def change(self, changes):
        """Takes new settings; the clock goes on from where it is."""
        self._offset, self._began, self._zero = 0.0, self.now(), time.monotonic()
        if changes.pop("reset", False):
            self.settings = Settings()
            self._creations.clear()
            self.boxes = {i: b for i, b in self.boxes.items() if b.state != "destroyed"}
        self._offset = changes.pop("advance", 0.0)
        for name, value in changes.items():
            if not hasattr(self.settings, name):
                raise Refused(400, f"no setting {name}")
            setattr(self.settings, name, value)

    # --- creations

    def throttle(self):
        limit, window = self.settings.create_rate, self.settings.rate_window
        if not limit:
            return
        now = time.monotonic()
        while self._creations and self._creations[0] <= now - window:
            self._creations.popleft()
        if len(self._creations) >= limit:
            wait = self._creations[0] + window - now
            raise Refused(
                429, "Rate limit exceeded", {"Retry-After-sandbox-create": f"{max(wait, 0.01):.2f}"}
            )
        self._creations.append(now)

    def admit(self, cpu, memory, disk):
        """Holds a creation against the organisation's quota, in the words of the real one."""
        names = (("CPU", cpu), ("memory", memory), ("disk", disk))
        for (name, asked), most in zip(names, self.settings.largest, strict=True):
            if asked > most:
                raise Refused(
                    403, f"{name} request {asked} exceeds maximum allowed per sandbox ({most})"
                )
        living = [b for b in self.boxes.values() if b.state not in ("destroyed", "destroying")]
        for name, used, most in (
            ("CPU", sum(b.cpu for b in living) + cpu, self.settings.total_cpu),
            ("memory", sum(b.memory for b in living) + memory, self.settings.total_memory),
        ):
            if used > most:
                raise Refused(400, f"Total {name} limit exceeded. Maximum allowed: {most}.")

    def create(self, request, snapshot):
        """A new sandbox, which starts by itself."""
        identity = str(uuid.uuid4())
        name = request.get("name") or identity
        living = [b for b in self.boxes.values() if b.state != "destroyed"]
        if name in {b.name for b in living}:
            raise Refused(409, f"Sandbox with name {name} already exists")
        self.admit(snapshot.cpu, snapshot.memory, snapshot.disk)
        now = self.now()
        box = Box(
            id=identity, name=name, request=request, cpu=snapshot.cpu, memory=snapshot.memory,
            disk=snapshot.disk, gpu=snapshot.gpu, user=snapshot.user, snapshot=snapshot.name,
            created=now, root=self.directory / identity, environment=dict(snapshot.environment),
            active=now,
        )  # fmt: skip
        box.intervals = {
            "stop": request.get("autoStopInterval", 15),
            "archive": request.get("autoArchiveInterval", 7 * 24 * 60),
            "delete": request.get("autoDeleteInterval", -1),
        }
        if minutes := request.get("ttlMinutes"):
            box.ends = now + minutes * 60
        self.boxes[box.id] = box
        box.task = asyncio.ensure_future(self._start(box, snapshot.root))
        self.tell("sandbox.created", box)
        return box

    async def _start(self, box, source):
        try:
            box.root.mkdir(parents=True)
            await asyncio.gather(
                asyncio.sleep(self.settings.start_delay),
                asyncio.to_thread(copy_root, source, box.root),
            )
            if self.settings.fails_to_start > 0:
                self.settings.fails_to_start -= 1
                box.error = "the runner has no place"
                self.move(box, "error")
                return
            await self._boot(box)
        except Exception as e:
            box.error = str(e)
            self.move(box, "error")
            raise

    async def _boot(self, box):
        machine = await Machine.start(
            box.root, HOMES[box.user], memory=box.memory << 10, cpus=box.cpu,
            counter="/sys/fs/cgroup/memory.events", disk=box.disk << 10,
        )  # fmt: skip
        if box.state in ("destroying", "destroyed"):
            await machine.destroy()
            return
        box.machine = machine
        box.active = self.now()
        self.move(box, "started")

    # --- a sandbox's life

    def find(self, id_or_name):
        for box in self.boxes.values():
            if id_or_name in (box.id, box.name) and box.state != "destroyed":
                return box
        raise Refused(404, f"Sandbox with ID or name {id_or_name} not found")

    def move(self, box, state):
        box.state = state
        self.tell("sandbox.state.updated", box)

    def tell(self, event, box):
        for listener in self.listeners:
            listener(event, box)

    def destroy(self, box, reason=None):
        """Begins the end of a sandbox, as DELETE does."""
        if box.state in ("destroying", "destroyed"):
            return
        box.desired = "destroyed"
        self.move(box, "destroying")
        box.end = asyncio.ensure_future(self._end(box))

    async def _end(self, box):
        with contextlib.suppress(Exception):
            await box.task
        await self._halt(box, keep=False)
        self.move(box, "destroyed")

    async def _halt(self, box, keep):
        for session in list(box.sessions.values()):
            session.close()
        box.sessions.clear()
        if box.machine is not None:
            machine, box.machine = box.machine, None
            await machine.destroy(keep_root=keep)
        if not keep:
            await asyncio.to_thread(shutil.rmtree, box.root, ignore_errors=True)

    async def stop(self, box):
        """Stops a sandbox; an ephemeral one goes away with that."""
        self.move(box, "stopping")
        await self._halt(box, keep=True)
        box.stopped = self.now()
        self.move(box, "stopped")

    async def start(self, box):
        if box.state != "stopped":
            raise Refused(400, "Sandbox is not in valid state")
        self.move(box, "starting")
        await self._boot(box)

    async def evict(self, box):
        """Ends a sandbox without being asked, as a provider may."""
        box.evicted = iso(self.now())
        self.destroy(box)
        await box.end

    async def keep_time(self):
        """What intervals bring about."""
        while True:
            await asyncio.sleep(_TICK)
            now = self.now()
            for box in list(self.boxes.values()):
                if box.state in ("destroying", "destroyed"):
                    continue
                if box.open and self.settings.open_renews:
                    box.active = now  # the proxy renews it while a request is open
                if box.ends is not None and now >= box.ends:
                    self.destroy(box)
                elif box.state == "started":
                    minutes = box.intervals["stop"]
                    if minutes > 0 and now - box.active >= minutes * 60:
                        await self.stop(box)
                elif box.state == "stopped":
                    minutes = box.intervals["delete"]
                    if minutes >= 0 and now - box.stopped >= minutes * 60:
                        self.destroy(box)

    async def close(self):
        for box in self.boxes.values():
            self.destroy(box)
        for box in self.boxes.values():
            with contextlib.suppress(Exception):
                await box.end


def iso(seconds):
    found = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return found.isoformat(timespec="milliseconds").replace("+00:00", "Z")
