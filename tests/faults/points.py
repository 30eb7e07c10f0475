"""Stops an attempt at a named point of its life until a test has done what it wants.

A test's project has a `sitecustomize.py` that calls `install`. In the supervisor the
method that stands for the point in FAULT_POINT then says that it was reached, by a file,
and waits for another file, once.
"""

import os
import sys
import time
from functools import wraps
from pathlib import Path

import anyio

#: {point: (module, class, method, whether it is stopped at after it has run)}; None: see below.
POINTS = {
    "creating": None,
    "created": None,
    "uploading": ("launch.stage", "Staging", "_inputs", True),
    "starting": ("launch.attempt", "Attempt", "_run_step", False),
    "running": ("launch.attempt", "Attempt", "_frames", False),
    "exited": ("launch.attempt", "Attempt", "_finish", False),
    "collecting": ("launch.attempt", "Attempt", "_collect", True),
    "recording": ("launch.record", "Recorder", "_save_cards", False),
    "destroying": ("launch.attempt", "Attempt", "_destroy", False),
}
_BUBBLEWRAP = {
    "creating": ("backends.bubblewrap.sandbox", "BubblewrapSandbox", "_start", True),
    "created": ("backends.bubblewrap.sandbox", "BubblewrapSandbox", "facts", False),
}
#: Where each backend has the others; FAULT_BACKEND names it. A new one is two lines.
OF_BACKENDS = {
    "bubblewrap": _BUBBLEWRAP,
    "remote-like": _BUBBLEWRAP,
    "docker": {
        "creating": ("backends.docker.sandbox", "DockerSandbox", "_start", True),
        "created": ("backends.docker.sandbox", "DockerSandbox", "facts", False),
    },
    "daytona": {
        "creating": ("backends.daytona", "Daytona", "_started", True),
        "created": ("backends.daytona.sandbox", "DaytonaSandbox", "facts", False),
    },
    "e2b": {
        "creating": ("backends.e2b", "E2B", "_request", True),
        "created": ("backends.e2b.sandbox", "E2BSandbox", "facts", False),
    },
}
REACHED, GO, CLOCK = "fault-reached", "fault-go", "fault-clock"


def install():
    """Puts the stop in, if this process is a supervisor and a point is named."""
    point = os.environ.get("FAULT_POINT")
    real = time.time
    time.time = lambda: real() + jump()
    if point and "supervise" in sys.orig_argv and not Path(REACHED).exists():
        own = OF_BACKENDS[os.environ["FAULT_BACKEND"]]
        sys.meta_path.insert(0, Finder({**POINTS, **own}[point]))


def jump():
    """Seconds by which somebody has set the clock."""
    try:
        return float(Path(CLOCK).read_text())
    except (OSError, ValueError):
        return 0.0


class Finder:
    """Wraps the method when its module has been loaded."""

    def __init__(self, place):
        self.module, self.owner, self.method, self.after = place
        self.module = "metaflow_sandbox." + self.module

    def find_spec(self, name, path=None, target=None):
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        import importlib.util

        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            owner = getattr(module, self.owner)
            wrapped = stopping(getattr(owner, self.method), self.after)
            setattr(owner, self.method, wrapped)

        spec.loader.exec_module = exec_module
        return spec


def reach():
    """Whether this is the first time; says that the point was reached."""
    try:
        os.close(os.open(REACHED, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def stopping(function, after):
    import inspect

    if inspect.iscoroutinefunction(function):

        @wraps(function)
        async def stopped(*args, **kwargs):
            result = await function(*args, **kwargs) if after else None
            if reach():
                while not Path(GO).exists():
                    await anyio.sleep(0.02)
            return result if after else await function(*args, **kwargs)

    else:

        @wraps(function)
        def stopped(*args, **kwargs):
            result = function(*args, **kwargs) if after else None
            if reach():
                while not Path(GO).exists():
                    time.sleep(0.02)
            return result if after else function(*args, **kwargs)

    return stopped
