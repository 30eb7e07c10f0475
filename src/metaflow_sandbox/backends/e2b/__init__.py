"""Sandboxes in E2B's cloud, by its official SDK: microVMs that start in a fraction of a second.

sandbox.py     commands and files of one
inside.py      what runs a command inside
templates.py   what they are made from
failures.py    what the SDK raises, as this package's errors
bounds.py      how much of an answer is read
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import ipaddress
import math
import os
import random
import shlex
import sys
import time
import uuid
from collections.abc import Mapping
from typing import Any

import anyio
import anyio.lowlevel

from ...concurrency import blocking
from ...errors import (
    NO_PLACE,
    NOT_SET_UP,
    BackendUnavailable,
    ConnectionLost,
    NotEnforceable,
    SandboxError,
)
from ...settings import number
from ..base import (
    Backend,
    Capabilities,
    Preflight,
    Prepared,
    Quota,
    Recipe,
    SandboxInfo,
    SandboxSpec,
    Say,
    network_kind,
    refuse_latest,
    unsaid,
)
from . import templates
from .failures import KEY_REMEDY, translate, translated
from .sandbox import E2BSandbox, kill

_REQUEST_SECONDS = 30.0
_END_MARGIN = 60.0  # what a step's sandbox needs before and after it
_CREATION = "metaflow-creation"  # a label of ours, by which one is found whose answer got lost
_CREATIONS = 3  # how often one is asked for whose answer gets lost
_AGAIN_SECONDS = 1.0
_LATE_SECONDS = 30.0  # for which one is looked for that was asked for without an answer
# Answers after which there may be one all the same: E2B's, or of a gateway that waited no longer.
_UNDECIDED = ("busy", "provider_failed")
_CHECK_SECONDS = 60.0
_PLACE_SECONDS = 1800.0  # that others of the account are waited for
_CHECK = "import sys; sys.exit(sys.version_info < (3, 8))"


class E2B(Backend):
    name = "e2b"
    capabilities = Capabilities(
        cpu=True,
        memory=True,
        image=True,
        setup=True,
        network=("internet", "none", "hosts"),
        stream="spool",
    )
    options = {"template": "my-template"}
    # Those of the plan without a subscription.
    quota = Quota(concurrent=20, per_second=1)
    longest_lifetime = 1800.0
    hosted = True
    keeps_builds = True
    hosts_remark = (
        "with a list of hosts E2B lets everything through to 8.8.8.8 too, by which names are found."
    )
    work = templates.WORK
    inbox = templates.INBOX

    def __init__(self) -> None:
        #: Seconds after which E2B ends a sandbox, however often it is renewed.
        self.longest_life = number("E2B_HOURS") * 3600
        self.longest_step = self.longest_life - _END_MARGIN
        self.longest_step_remedy = (
            "If your plan of E2B's has longer sandboxes, say so: export METAFLOW_SANDBOX_E2B_HOURS="
            "24."
        )

    def refuse(self, spec: SandboxSpec) -> None:
        super().refuse(spec)
        for host in spec.network if isinstance(spec.network, (list, tuple)) else ():
            with contextlib.suppress(ValueError):
                ipaddress.ip_network(host, strict=False)
                raise NotEnforceable(
                    f"network: {host}: of an address E2B opens every port and protocol. Name the "
                    "host instead.",
                    op="create",
                    retryable=False,
                )

    def account(self) -> str:
        key = hashlib.sha256(os.environ.get("E2B_API_KEY", "").encode()).hexdigest()
        where = os.environ.get("E2B_API_URL") or os.environ.get("E2B_DOMAIN") or ""
        return f"{where} {key}"

    async def _sdk(self) -> Any:
        """The SDK, whose import takes a second or two: other tasks go on meanwhile.

        Raises:
            BackendUnavailable: it isn't installed, or there is no key.
        """
        try:
            sdk = await blocking(lambda: importlib.import_module("e2b"))
        except ImportError as e:
            needs = "" if sys.version_info >= (3, 11) else ", with Python 3.11 or later"
            raise BackendUnavailable(
                f'E2B\'s SDK is not installed ({e}): pip install "metaflow-sandbox[e2b]"{needs}',
                code=NOT_SET_UP,
                op="create",
            ) from e
        if not os.environ.get("E2B_API_KEY"):
            raise BackendUnavailable(
                f"E2B needs an API key. {KEY_REMEDY}", code=NOT_SET_UP, op="create"
            )
        return sdk

    async def preflight(self) -> Preflight:
        sdk = await self._sdk()
        # Any call tells whether the key is right; this one makes nothing.
        with translated("preflight"):
            await sdk.AsyncSandbox.list(limit=1, request_timeout=_REQUEST_SECONDS).next_items()
        where = os.environ.get("E2B_DOMAIN") or os.environ.get("E2B_API_URL") or "e2b.app"
        return Preflight(
            f"E2B at {where}",
            (
                "a sandbox is paid for by the second, and is ended at the latest "
                f"{self.longest_lifetime / 60:.0f} minutes after whoever runs the flow is gone.",
            ),
        )

    async def prepare(self, recipe: Recipe, say: Say = unsaid) -> Prepared:
        sdk = await self._sdk()
        own = recipe.options.get("template")
        if own is not None and recipe.image is not None:
            raise NotEnforceable(
                f"image={recipe.image!r} and template={own!r}: a sandbox is made from one of them. "
                "Leave one out.",
                op="prepare",
            )
        if recipe.image is not None:
            refuse_latest(recipe.image, "E2B")
        if not templates.needed(recipe):
            if own is not None:
                await self._check(sdk, recipe, own, f"template={own!r}", say)
            return Prepared()
        name = await blocking(lambda: templates.name_of(recipe))
        what = f"image={recipe.image!r}" if recipe.image else "the template"
        async with templates.alone(name):
            # One that is there may still be built elsewhere, or its build may have failed.
            if not await templates.exists(name) or not await self._usable(
                sdk, recipe, name, what, say
            ):
                await templates.build(recipe, name, say)
                await self._check(sdk, recipe, name, what, say)
        return Prepared(name)

    async def _usable(self, sdk: Any, recipe: Recipe, template: str, what: str, say: Say) -> bool:
        try:
            await self._check(sdk, recipe, template, what, say)
        except SandboxError as e:
            if e.code != "no_template":
                raise
            return False
        return True

    async def _check(self, sdk: Any, recipe: Recipe, template: str, what: str, say: Say) -> None:
        """Makes one sandbox of a template and looks for Python in it.

        Raises:
            SandboxError: there is no such template ("no_template"), or no Python in it.
        """
        try:
            sandbox = await self._placed(sdk, template, recipe.labels, say)
        except SandboxError as e:
            if e.code != "refused":
                raise
            raise SandboxError(
                f"{what}: E2B has no such template that is ready: {e.message}. See `e2b template "
                "list`.",
                code="no_template", op="prepare", retryable=False,
            ) from e  # fmt: skip
        python = recipe.python or self.python
        command = shlex.join([python, "-c", _CHECK])
        try:
            with translated("prepare", template), anyio.fail_after(_CHECK_SECONDS):
                try:
                    await sandbox.remote.commands.run(command, user="user", timeout=0)
                except sdk.CommandExitException as e:
                    raise SandboxError(
                        f"{what}: it has no {python}, 3.8 or later, which a step needs. Take one "
                        "that has, such as python:3.12-slim, install it by setup=[…], or name "
                        "another by executable=….",
                        code="no_python", op="prepare", retryable=False,
                    ) from e  # fmt: skip
        finally:
            await sandbox.destroy()

    async def _placed(
        self, sdk: Any, template: str, labels: Mapping[str, str], say: Say
    ) -> E2BSandbox:
        """A short sandbox; waits for a place for it, as attempts do."""
        spec = SandboxSpec(labels, lifetime=120, network=False)
        patience, said = time.monotonic() + _PLACE_SECONDS, False
        while True:
            try:
                return await self._create(sdk, template, spec)
            except SandboxError as e:
                if e.code != NO_PLACE or time.monotonic() > patience:
                    raise
                if not said:
                    await say(f"{e.message} It is tried again.")
                said = True
            await anyio.sleep(random.uniform(1, 10))  # noqa: S311

    async def create(self, spec: SandboxSpec) -> E2BSandbox:
        self.refuse(spec)
        sdk = await self._sdk()
        template = spec.image
        if template is None or not template.startswith(templates.PREFIX):
            recipe = Recipe(
                spec.image,
                options=spec.options,
                cpu=spec.cpu,
                memory=spec.memory,
                python=spec.python,
            )
            if templates.needed(recipe):
                template = (await self.prepare(recipe)).image
            else:
                template = spec.options.get("template")
        return await self._create(sdk, template or "base", spec)

    async def _create(self, sdk: Any, template: str, spec: SandboxSpec) -> E2BSandbox:
        creation = uuid.uuid4().hex
        options: dict[str, Any] = {
            "template": template,
            "timeout": math.ceil(min(spec.lifetime, self.longest_life)),
            "metadata": {**spec.labels, _CREATION: creation},
            "request_timeout": _REQUEST_SECONDS,
            "idempotency_key": creation,
        }
        kind = "internet" if spec.network is None else network_kind(spec.network)
        if kind == "none":
            options["allow_internet_access"] = False
        elif kind == "hosts" and isinstance(spec.network, (list, tuple)):
            options["network"] = {"allow_out": list(spec.network), "deny_out": ["0.0.0.0/0"]}
        # Whoever is cancelled in the middle could not tell what became of it.
        with anyio.CancelScope(shield=True):
            remote = await self._request(sdk, options)
        sandbox = E2BSandbox(self, remote, template, spec.python)
        try:
            await anyio.lowlevel.checkpoint_if_cancelled()
        except BaseException:
            await sandbox.destroy()
            raise
        return sandbox

    async def _request(self, sdk: Any, options: dict[str, Any]) -> Any:
        """Asks for a sandbox, again under the same key if it isn't known what became of that."""
        lost = 0
        while True:
            try:
                return await sdk.AsyncSandbox.create(**options)
            except Exception as e:
                error = translate(e, "create", options["template"])
                if isinstance(error, ConnectionLost) or getattr(error, "code", "") in _UNDECIDED:
                    lost += 1
                    if lost < _CREATIONS:
                        await anyio.sleep(_AGAIN_SECONDS)
                        continue
                if lost:
                    await self._sweep(options["metadata"], late=isinstance(error, ConnectionLost))
                if isinstance(error, ConnectionLost):
                    error = SandboxError(
                        f"{error.message}. Try again later.", code="create_failed", op="create",
                        retryable=True,
                    )  # fmt: skip
                raise error from e
            except BaseException:  # not every cancellation heeds a shield
                with anyio.CancelScope(shield=True):
                    await self._sweep(options["metadata"], late=True)
                raise

    async def _sweep(self, labels: Mapping[str, str], *, late: bool) -> None:
        """Ends what may have been made by requests whose answers got lost.

        Args:
            late: whether one may still be on its way, and is waited for a while.
        """
        patience = time.monotonic() + (_LATE_SECONDS if late else 0)
        while True:
            with contextlib.suppress(Exception):
                if found := await self._found({_CREATION: labels[_CREATION]}):
                    for info in found:
                        await kill(info.sandbox_id)
                    return
            if time.monotonic() > patience:
                return
            await anyio.sleep(_AGAIN_SECONDS)

    async def _found(self, labels: Mapping[str, str]) -> list[Any]:
        sdk = await self._sdk()
        query = sdk.SandboxQuery(
            metadata=dict(labels), state=[sdk.SandboxState.RUNNING, sdk.SandboxState.PAUSED]
        )
        pages = sdk.AsyncSandbox.list(query=query, request_timeout=_REQUEST_SECONDS)
        found: list[Any] = []
        with translated("list"):
            while pages.has_next:
                found += await pages.next_items()
        return found

    async def list(self, labels: Mapping[str, str]) -> list[SandboxInfo]:
        return [
            SandboxInfo(
                info.sandbox_id,
                {k: v for k, v in (info.metadata or {}).items() if k != _CREATION},
                info.started_at.timestamp(),
            )
            for info in await self._found(labels)
            if _CREATION in (info.metadata or {})  # others of the account are none of ours
        ]

    async def destroy(self, sandbox_id: str) -> None:
        await self._sdk()
        await kill(sandbox_id)
