"""A fake remote backend: its sandboxes are objects in the launching process that run nothing.

What a real attempt of the same step left, captured once by the backend "recording", comes
out of them again after a while. So all of the host's side is real and costs what it costs,
and hundreds of sandboxes fit on a small machine.

    REPLAY            directory with the captured ends of steps, one file a step
    REPLAY_CREATE     seconds that `create` takes (0)
    REPLAY_SECONDS    seconds that a step takes: "2", or "0.5-2" for a random time (0)
    REPLAY_FAULTS     shares of sandboxes that meet a fault: "gone=0.01,lost=0.05" (none)
    REPLAY_LOG        file that gets a line for each event: what, which sandbox, process (none)
"""

import base64
import functools
import io
import json
import os
import random
import uuid
from pathlib import Path

import anyio
from remote_like import RemoteLike

from metaflow_sandbox.agent.agent import encode_frame
from metaflow_sandbox.agent.frames import FrameDecoder
from metaflow_sandbox.backends.base import Backend, Capabilities, Sandbox, SandboxInfo, discard
from metaflow_sandbox.errors import ConnectionLost, SandboxGone


def captured(step):
    return Path(os.environ["REPLAY"], f"{step}.json")


class Recording(RemoteLike):
    """Runs steps for real, and writes down how they ended."""

    name = "recording"

    async def create(self, spec):
        sandbox = await super().create(spec)
        sandbox.exec = functools.partial(_recorded, sandbox.exec, spec.labels.get("metaflow-step"))
        return sandbox


async def _recorded(execute, step, argv, *, on_stdout=discard, **options):
    decoder = FrameDecoder()

    async def both(data):
        for frame in decoder.feed(data) if {"start", "follow"} & {*argv} else ():
            if frame.kind == "x":
                captured(step).write_bytes(frame.payload)
        await on_stdout(data)

    return await execute(argv, on_stdout=both, **options)


class Replaying(Backend):
    name = "replaying"
    capabilities = Capabilities(cpu=True, memory=True, disk=True, stream="spool")

    def __init__(self):
        self.sandboxes = {}

    async def create(self, spec):
        self.refuse(spec)
        sandbox = ReplayedSandbox(self, spec)
        await anyio.sleep(float(os.environ.get("REPLAY_CREATE", "0")))
        self.sandboxes[sandbox.id] = sandbox
        _log("create", sandbox.id)
        return sandbox

    async def list(self, labels):
        return [
            SandboxInfo(s.id, s.spec.labels)
            for s in self.sandboxes.values()
            if labels.items() <= s.spec.labels.items()
        ]

    async def destroy(self, sandbox_id):
        if self.sandboxes.pop(sandbox_id, None):
            _log("destroy", sandbox_id)


class ReplayedSandbox(Sandbox):
    def __init__(self, backend, spec):
        self.backend, self.spec, self.id = backend, spec, uuid.uuid4().hex[:12]
        self._ends_at = None
        self._faults = _faults()

    async def exec(
        self, argv, *, cwd=None, env=None, on_stdout=discard, on_stderr=discard, timeout=None
    ):
        if self.id not in self.backend.sandboxes:
            raise SandboxGone(f"the sandbox {self.id} is gone", op="exec")
        with anyio.fail_after(timeout):
            if self._ends_at is None and "start" in argv:
                self._ends_at = anyio.current_time() + _seconds()
            if "start" in argv or "follow" in argv:
                await self._follow(on_stdout)
        return 0

    async def _follow(self, on_stdout):
        fault = self._faults.pop() if self._faults else None
        left = max(0.0, self._ends_at - anyio.current_time())
        if fault is not None:
            await anyio.sleep(left * random.random())
            _log(fault, self.id)
            raise _error(fault, self)
        await anyio.sleep(left)
        _log("end", self.id)
        inputs = self.spec.mounts[f"{self.backend.inbox}/attempt"]
        await on_stdout(_end(captured(self.spec.labels["metaflow-step"]), _inherited(inputs)))

    async def write(self, path, source):
        async for _ in source:
            pass

    async def read(self, path):
        raise FileNotFoundError(path)
        yield

    async def destroy(self):
        await self.backend.destroy(self.id)


# --- the settings


def _seconds():
    low, _, high = os.environ.get("REPLAY_SECONDS", "0").partition("-")
    return random.uniform(float(low), float(high or low))


def _faults():
    """What happens to a sandbox, one at each `follow`, the last one first."""
    found = []
    for item in filter(None, os.environ.get("REPLAY_FAULTS", "").split(",")):
        kind, _, share = item.partition("=")
        if random.random() < float(share):
            found.append(kind)
    return found


def _error(fault, sandbox):
    if fault == "gone":
        sandbox.backend.sandboxes.pop(sandbox.id, None)
        return SandboxGone(f"the sandbox {sandbox.id} is gone", op="exec")
    return ConnectionLost(f"the line to {sandbox.id} dropped", op="exec")


def _log(*words):
    if path := os.environ.get("REPLAY_LOG"):
        with open(path, "a") as file:
            # One write, so that the lines of all processes stay whole.
            file.write(" ".join([*words, str(os.getpid())]) + "\n")


# --- the end of a step, as another task of it left it


def _inherited(attempt):
    """(name, key) of each artifact of an attempt's inputs."""
    objects = {}
    for record in sorted(Path(attempt, "datastore").glob("*/*/*/*/*.data.json")):
        for name, sha in json.loads(record.read_text())["objects"].items():
            objects.setdefault(name, sha)
    return tuple(sorted(objects.items()))


@functools.lru_cache(maxsize=64)
def _end(file, inherited):
    """The exit frame, with the keys that the step only passed on from this task's own inputs.

    Everything else of one task's results is another's too: its blobs have keys that follow
    from their content, and its place in the foreach is worked out by the host.
    """
    end = json.loads(file.read_bytes())
    entries = list(_entries(base64.b64decode(end["inline"])))
    own = {header["sha"] for header, _ in entries if header["name"] == "blob"}
    archive = io.BytesIO()
    for header, content in entries:
        if header["name"] == "data.json":
            record = json.loads(content)
            passed_on = {n: s for n, s in inherited if record["objects"].get(n, n) not in own}
            record["objects"] |= {n: s for n, s in passed_on.items() if n in record["objects"]}
            content = json.dumps(record).encode()
        header["size"] = len(content)
        archive.write(json.dumps(header).encode() + b"\n" + content)
    end["inline"] = base64.b64encode(archive.getvalue()).decode()
    return encode_frame(1, b"x", json.dumps(end).encode())


def _entries(archive):
    file = io.BytesIO(archive)
    while line := file.readline():
        header = json.loads(line)
        yield header, file.read(header["size"])
