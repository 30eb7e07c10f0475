"""Tells Metaflow's service that tasks live, for all tasks of a process at once.

Metaflow starts a process of its own for each task that has a heartbeat.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import anyio

from ..concurrency import blocking, plain_errors

_SECONDS = 10.0
_TIMEOUT = 10.0


@contextlib.asynccontextmanager
async def beating(metadata: Any, flow: str, run: str, step: str, task: str) -> AsyncIterator[None]:
    """Sends heartbeats for a task until the context ends, if its metadata provider has them."""
    template = getattr(metadata, "url_task_template", None)
    if template is None:  # local metadata has none; another provider has its own way
        await blocking(partial(metadata.start_task_heartbeat, flow, run, step, task))
        try:
            yield
        finally:
            with anyio.CancelScope(shield=True):
                await blocking(metadata.stop_heartbeat)
        return
    url = template.format(flow_id=flow, run_number=run, step_name=step, task_id=task)
    with plain_errors():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_beat, url)
            yield
            tasks.cancel_scope.cancel()


async def _beat(url: str) -> None:
    import requests
    from metaflow.metaflow_config import SERVICE_HEADERS

    def post() -> None:
        with contextlib.suppress(requests.exceptions.RequestException):
            requests.post(url, data="{}", headers=dict(SERVICE_HEADERS), timeout=_TIMEOUT)

    while True:
        await anyio.to_thread.run_sync(post, abandon_on_cancel=True)
        await anyio.sleep(_SECONDS)
