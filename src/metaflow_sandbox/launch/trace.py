"""What an attempt did and when, for whoever has to find out: METAFLOW_SANDBOX_DEBUG=1.

A private directory for each attempt, with one line of JSON for each event: what was
asked of the backend, each frame's kind and size, how long each part took. Never a value
of a variable, a line of output or an artifact. Kept for a week.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from platformdirs import user_state_path

from metaflow_extensions.sandbox.plugins.settings import flag

from ..agent.frames import Frame
from ..backends.base import SandboxSpec
from ..leases import remove_old
from .job import Job

_SECONDS = 7 * 86400.0
_MOST = 100_000  # events: a step decides how many frames there are


class Trace:
    """Appends events to `events.jsonl`; does nothing unless it was asked for.

    Attributes:
        directory: where it goes; None if it is off.
    """

    def __init__(self, job: Job) -> None:
        self.directory: Path | None = None
        self._start = time.monotonic()
        self._events = 0
        if not flag("DEBUG"):
            return
        base = Path(user_state_path("metaflow-sandbox")) / "debug"
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        remove_old(base, _SECONDS)
        name = f"{job.flow}-{job.run}-{job.step}-{job.task}-{job.attempt}"
        self.directory = base / name
        self.directory.mkdir(mode=0o700, exist_ok=True)
        self.event("attempt", backend=job.backend, variables=sorted(job.environment))

    def event(self, name: str, **facts: Any) -> None:
        """Notes that something happened. No fact may be a secret."""
        if self.directory is None or self._events >= _MOST:
            return
        self._events += 1
        seconds = round(time.monotonic() - self._start, 4)
        line = json.dumps({"seconds": seconds, "event": name, **facts}, default=str)
        with open(self.directory / "events.jsonl", "a") as file:
            file.write(line + "\n")

    def asked(self, spec: SandboxSpec) -> None:
        """What a sandbox was asked to be."""
        self.event(
            "create",
            labels=dict(spec.labels),
            lifetime=spec.lifetime,
            mounts=sorted(spec.mounts),
            cpu=spec.cpu,
            memory=spec.memory,
            disk=spec.disk,
            gpu=spec.gpu,
            shared_memory=spec.shared_memory,
            image=spec.image,
            network=spec.network,
        )

    def frame(self, frame: Frame) -> None:
        """That a frame came."""
        if self.directory is not None:
            self.event("frame", seq=frame.seq, kind=frame.kind, size=len(frame.payload))
