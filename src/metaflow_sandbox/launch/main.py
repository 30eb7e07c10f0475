"""The launcher's process: one attempt, started by Metaflow's scheduler."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from typing import Any

import anyio

from ..backends import registry
from ..errors import SandboxError
from .attempt import Attempt, run_until_signal
from .job import Job
from .record import Recorder

_PR_SET_PDEATHSIG = 1


def launch(context: Any, options: dict[str, Any]) -> int:
    """Runs the attempt that `flow.py sandbox step` was started for. Returns its exit code."""
    if sys.platform.startswith("linux"):
        # A scheduler that is killed can't tell us; then nobody wants the results.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if options["scheduler"] not in (None, os.getppid()):
            # It ended before we could ask to be told; or something else started us.
            with contextlib.suppress(OSError):
                print("[sandbox] the scheduler of this task has ended", file=sys.stderr)
            return 1
    try:
        job = Job.from_context(context, options)
        backend = registry.load(job.backend)
        attempt = Attempt(job, backend, Recorder(job, context.obj))
        return anyio.run(run_until_signal, attempt)
    except SandboxError as e:
        print(f"[sandbox] {e}", file=sys.stderr)
        return 1
