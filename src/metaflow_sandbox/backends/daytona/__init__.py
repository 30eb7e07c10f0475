"""Sandboxes in Daytona's cloud, or in one of one's own, by the official SDK.

The SDK is pinned to the releases whose wire protocol the tests hold (`tests/emulators/daytona`):
its models refuse answers that they don't know, and it changes in minor releases.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import math
import os
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import anyio

from ...concurrency import plain_errors
from ...errors import BackendUnavailable, NotEnforceable, SandboxError
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
    refuse_latest,
    renewed,
    unsaid,
)
from . import client, faults, network, snapshots
from .sandbox import DaytonaSandbox, why_gone
from .snapshots import Size

if TYPE_CHECKING:
    from daytona import AsyncDaytona, AsyncSandbox

_BUILDER_SECONDS = 900.0  # that others wait at most for one whose launcher was killed
_CREATE_SECONDS = 60.0  # some servers answer when it has started, or after 30 s
_START_SECONDS = 300.0
_LOOK_SECONDS = 10.0
_ENDING = ("destroyed", "destroying")
_DESTROY_SECONDS = 180.0  # whoever forgets one pays for it
_LATE_SECONDS = 30.0  # after which a creation whose answer was lost comes no more
_LONGEST_PAUSE = 5.0
_SDK_LABEL = "code-toolbox-language"


@dataclass(frozen=True)
class _Tier:
    """What an organisation may have, as far as its key may know.

    Attributes:
        restricted: whether the tier decides what sandboxes reach.
        largest: what one sandbox may have.
    """

    restricted: bool = False
    largest: Size = field(default_factory=Size)


# {account: its tier}, once a preflight in this process has asked.
_TIERS: dict[str, _Tier] = {}


class Daytona(Backend):
    name = "daytona"
    capabilities = Capabilities(
        cpu=True,
        memory=True,
        disk=True,
        gpu=True,
        image=True,
        network=("internet", "none", "hosts"),
        setup=True,
        stream="spool",
    )
    options = {"snapshot": "my-snapshot"}
    # The smallest tier has 10 CPUs, which the smallest sandboxes take one of, and 300
    # creations a minute.
    quota = Quota(concurrent=10, per_second=5)
    longest_lifetime = 3600.0
    hosted = True
    keeps_builds = True
    # Every image has /tmp, whoever its user is.
    work = "/tmp/metaflow-sandbox"  # noqa: S108 - inside
    inbox = "/tmp/metaflow-sandbox/inbox"  # noqa: S108 - inside

    def __init__(self) -> None:
        self.clients = client.Clients()

    @property
    def _tier(self) -> _Tier:
        return _TIERS.get(self.account(), _Tier())

    def account(self) -> str:
        return client.account()

    def limits(self) -> Capabilities:
        if self._tier.restricted:
            return replace(self.capabilities, network=("internet",))
        return self.capabilities

    def refuse(self, spec: SandboxSpec) -> None:
        super().refuse(spec)
        network.settings(spec.network)
        if "snapshot" in spec.options:
            snapshots.refuse_with_snapshot(spec, Size.of(spec))

    # --- before the first task

    async def preflight(self) -> Preflight:
        """Asks for what sandboxes there are, and what the organisation may have."""
        async with self.clients.one() as sdk:
            from daytona_api_client_async import SandboxApi  # is there, or `one` has said so

            ask = functools.partial(SandboxApi(client.api(sdk)).list_sandboxes, limit=1)
            await self._ask("preflight", ask)
            notes = await self._organisation(sdk)
            await self._region(sdk)
        return Preflight(f"Daytona at {client.url()} (SDK {version('daytona')})", notes)

    async def _organisation(self, sdk: AsyncDaytona) -> list[str]:
        """What its tier may have. A key that may not see that leaves it to the creation."""
        from daytona_api_client_async import ApiKeysApi, OrganizationsApi

        try:
            key = await client.call("preflight", ApiKeysApi(client.api(sdk)).get_current_api_key)
            ask = OrganizationsApi(client.api(sdk)).get_organization
            get = functools.partial(ask, key.organization_id or "")
            found = await client.call("preflight", get)
        except Exception:
            return []
        largest = Size(
            int(found.max_cpu_per_sandbox),
            int(found.max_memory_per_sandbox),
            int(found.max_disk_per_sandbox),
        )
        _TIERS[self.account()] = _Tier(found.sandbox_limited_network_egress, largest)
        if found.suspended:
            raise BackendUnavailable(
                f"Daytona has suspended the organisation {found.name}: {found.suspension_reason}. "
                "See https://app.daytona.io/dashboard/billing.",
                code="suspended",
                op="preflight",
                retryable=False,
            )
        if not self._tier.restricted:
            return []
        return [
            "this organisation's tier decides what its sandboxes reach: package indexes and the "
            "like, not the whole internet, and `network` can't change it "
            "(https://www.daytona.io/docs/en/network-limits)."
        ]

    async def _region(self, sdk: AsyncDaytona) -> None:
        target = os.environ.get("DAYTONA_TARGET")
        if not target:
            return
        from daytona_api_client_async import OrganizationsApi

        try:
            ask = OrganizationsApi(client.api(sdk)).list_available_regions
            regions = await client.call("preflight", ask)
        except Exception:
            return
        known = sorted({region.id for region in regions} | {region.name for region in regions})
        if target not in known:
            raise BackendUnavailable(
                f"DAYTONA_TARGET={target!r} is no region of this organisation, which has: "
                f"{', '.join(known)}. Set it to one of these, or unset it for the default.",
                code="region_unavailable",
                op="preflight",
                retryable=False,
            )

    def beneath(self, recipe: Recipe) -> Recipe:
        """The account's default snapshot may change: nothing that is kept is built on it."""
        if recipe.image or "snapshot" in recipe.options:
            return recipe
        return replace(recipe, image=self._default_image())

    async def prepare(self, recipe: Recipe, say: Say = unsaid) -> Prepared:
        size = Size.of(recipe)
        for name, most in self._tier.largest.given.items():
            asked = size.given.get(name, 0)
            if asked > most:
                unit = "CPUs" if name == "cpu" else "GB"
                raise NotEnforceable(
                    f"{name}: this organisation's sandboxes have {most} {unit} at most, not "
                    f"{asked}. Ask for less, or see https://app.daytona.io/dashboard/limits.",
                    op="prepare",
                    retryable=False,
                )
        if rounded := size.rounded(recipe):
            await say(rounded)
        if named := recipe.options.get("snapshot"):
            snapshots.refuse_with_snapshot(recipe, size)
            async with self.clients.one() as sdk:
                if not await snapshots.usable(sdk, named, say):
                    raise SandboxError(
                        f"snapshot={named!r}: there is no such snapshot that can be used. See "
                        "yours at https://app.daytona.io/dashboard/snapshots.",
                        code="no_snapshot",
                        op="prepare",
                        retryable=False,
                    )
            return Prepared()
        if recipe.image is None and recipe.plain and not size.given:
            return Prepared()  # the account's default snapshot
        image = recipe.image or self._default_image()
        refuse_latest(image, self.name)
        recipe = replace(recipe, image=image)
        base = replace(recipe, files={}, install=(), prefix=None, contents="")
        name = await anyio.to_thread.run_sync(snapshots.name_of, base, size, image)
        async with self.clients.one() as sdk:
            await snapshots.make(sdk, name, base, size, image, say)
            if recipe.install:
                whole = await anyio.to_thread.run_sync(snapshots.name_of, recipe, size, image)
                await self._install(sdk, whole, name, recipe, say)
                name = whole
        return Prepared(name)

    async def _install(
        self, sdk: AsyncDaytona, name: str, base: str, recipe: Recipe, say: Say
    ) -> None:
        """Makes a snapshot of a sandbox in which the recipe's files were installed.

        A Dockerfile could bring the files too, by an object store; this way they take the
        road of all others, and need no more than the API. The sandbox's name is taken while
        it is there, so that launchers that come at the same time wait for it.
        """
        builder = f"{name}-builder"
        while not await snapshots.usable(sdk, name, say):
            await snapshots.forget_failed(sdk, name)
            spec = SandboxSpec(
                recipe.labels,
                lifetime=_BUILDER_SECONDS,
                network=self.least_network(),
            )
            try:
                sandbox = await self._make(spec, base, builder)
            except NotEnforceable:
                if self.least_network() == spec.network:
                    raise
                continue  # the tier is known now
            except SandboxError as e:
                if faults.status_of(e) != 409:
                    raise
                await self._ended(sdk, builder, say)
                continue
            await self._install_in(sandbox, name, recipe, say)

    @staticmethod
    async def _install_in(sandbox: DaytonaSandbox, name: str, recipe: Recipe, say: Say) -> None:
        try:
            async with renewed(lambda: sandbox, _BUILDER_SECONDS):
                await snapshots.install(sandbox, recipe, say)
                await sandbox.renew(_BUILDER_SECONDS)
                await sandbox.capture(name, snapshots.BUILD_SECONDS)
        finally:
            with anyio.CancelScope(shield=True):
                await sandbox.destroy()

    async def _ended(self, sdk: AsyncDaytona, name: str, say: Say) -> None:
        """Waits until another launcher's sandbox is gone, or about to be."""
        said = False
        async for _ in snapshots.waiting():
            try:
                box = await client.call("prepare", functools.partial(sdk.get, name), again=True)
            except Exception as e:
                if faults.status_of(e) == 404:
                    return
                raise faults.explain(e, "prepare", client.url()) from e
            if getattr(box.state, "value", "") in _ENDING:
                return
            if not said:
                said = True
                await say(
                    f"waiting for the sandbox {box.id}, in which another launcher makes what this "
                    f"step needs. If that was killed, it ends by itself within "
                    f"{_BUILDER_SECONDS / 60:.0f} minutes, or now by: metaflow-sandbox kill "
                    f"{box.id}"
                )

    @staticmethod
    def _default_image() -> str:
        """An image with this interpreter's version, so that what a step leaves fits."""
        return f"python:{sys.version_info[0]}.{sys.version_info[1]}-slim"

    # --- sandboxes

    async def create(self, spec: SandboxSpec) -> DaytonaSandbox:
        self.refuse(spec)
        snapshot = spec.options.get("snapshot") or spec.image
        prepared = "snapshot" in spec.options or (snapshot or "").startswith(snapshots.PREFIX)
        if not prepared:
            recipe = Recipe(
                spec.image, cpu=spec.cpu, memory=spec.memory, disk=spec.disk, gpu=spec.gpu
            )
            snapshot = (await self.prepare(recipe)).image
        # By its name it is found again if the answer is lost.
        return await self._make(spec, snapshot, f"metaflow-{uuid.uuid4().hex[:20]}")

    async def _make(self, spec: SandboxSpec, snapshot: str | None, name: str) -> DaytonaSandbox:
        sdk = await self.clients.acquire()
        try:
            box = await self._create(sdk, spec, snapshot, name)
            toolbox = self.clients.daemon_of(box)
            sandbox = DaytonaSandbox(self, box, toolbox, network.name(spec.network))
            try:
                await sandbox.ready()
            except BaseException as e:
                await self._destroy_quietly(sdk, box.id)
                if isinstance(e, SandboxError) and e.retryable is None:
                    e.retryable = True  # nothing of the user's has run
                raise
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.clients.release()
            raise
        return sandbox

    async def _create(
        self, sdk: AsyncDaytona, spec: SandboxSpec, snapshot: str | None, name: str
    ) -> AsyncSandbox:
        """Makes a sandbox and waits for it.

        `AsyncDaytona.create` tells its id only when it has started. If that is cancelled, the
        sandbox would live on, so that the request is made here, and is waited for.
        """
        from daytona_api_client_async import CreateSandbox, SandboxApi

        request = CreateSandbox(
            name=name,
            snapshot=snapshot,
            labels=dict(spec.labels),
            target=os.environ.get("DAYTONA_TARGET") or None,
            auto_stop_interval=0,  # what runs inside is no activity to Daytona
            auto_delete_interval=0,  # ephemeral: gone as soon as it stops
            ttl_minutes=max(1, math.ceil(spec.lifetime / 60)),
            **network.settings(spec.network),
        )
        made: Any = None
        ask = functools.partial(SandboxApi(client.api(sdk)).create_sandbox, request)
        try:
            made = await client.call("create", ask, seconds=_CREATE_SECONDS, whole=True)
            self._hold(made, spec)
            await anyio.lowlevel.checkpoint_if_cancelled()
            return await self._started(sdk, made.id)
        except BaseException as e:
            if made is not None:
                await self._destroy_quietly(sdk, made.id)
            elif faults.is_local(e) or faults.is_transient(e):
                await self._destroy_quietly(sdk, name, late=faults.is_unanswered(e))
            if isinstance(e, SandboxError) or not isinstance(e, Exception):
                raise
            raise faults.explain(e, "create", client.url()) from e

    def _hold(self, made: Any, spec: SandboxSpec) -> None:
        """Sees that the network is the one that was asked for: a tier may overrule it.

        Raises:
            NotEnforceable: it isn't.
        """
        for key, value in network.settings(spec.network).items():
            if getattr(made, key) != value:
                _TIERS[self.account()] = replace(self._tier, restricted=True)
                raise NotEnforceable(
                    f"network={spec.network!r}: Daytona made a sandbox without it, as your tier "
                    "does not have it. Leave it out, or see "
                    "https://app.daytona.io/dashboard/limits.",
                    op="create",
                    retryable=False,
                )

    async def _started(self, sdk: AsyncDaytona, sandbox_id: str) -> AsyncSandbox:
        box = await client.call("create", functools.partial(sdk.get, sandbox_id), again=True)
        if getattr(box.state, "value", "") == "started":
            return box

        async def look() -> None:
            """Where no events come, the SDK looks once a second: look more often at first."""
            pause = 0.15
            while True:
                await anyio.sleep(pause)
                if not client.hears_events(sdk):
                    with contextlib.suppress(Exception):
                        await box.refresh_data(request_timeout=_LOOK_SECONDS)
                    pause = min(pause * 1.3, 1.0)

        problem: str | None
        try:
            with plain_errors():
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(look)
                    wait = functools.partial(box.wait_for_sandbox_start, timeout=0)
                    await client.call("create", wait, seconds=_START_SECONDS)
                    tasks.cancel_scope.cancel()
        except TimeoutError:
            problem = f"it did not start within {_START_SECONDS:.0f} s"
        except Exception as e:
            if why_gone(box) is not None and not box.error_reason:
                # An event says that it failed, and not why.
                with contextlib.suppress(Exception), anyio.move_on_after(_LOOK_SECONDS):
                    await box.refresh_data(request_timeout=_LOOK_SECONDS)
            if (problem := why_gone(box)) is None:
                raise faults.explain(e, "create", client.url()) from e
        else:
            return box
        raise SandboxError(
            f"Daytona could not start the sandbox {sandbox_id} ({problem}). Try again; if it "
            "persists, see https://status.daytona.io.",
            code="start_failed",
            op="create",
            retryable=True,
        )

    async def list(self, labels: Mapping[str, str]) -> list[SandboxInfo]:
        async def ask() -> list[SandboxInfo]:
            from daytona import ListSandboxesQuery

            found = []
            async for box in sdk.list(ListSandboxesQuery(labels=dict(labels) or None)):
                if getattr(box.state, "value", "") not in _ENDING:
                    own = {k: v for k, v in box.labels.items() if k != _SDK_LABEL}
                    found.append(SandboxInfo(box.id, own, _seconds(box.created_at)))
            return found

        async with self.clients.one() as sdk:
            infos: list[SandboxInfo] = await self._ask("list", ask, seconds=120.0)
        return infos

    async def destroy(self, sandbox_id: str) -> None:
        async with self.clients.one() as sdk:
            await self._destroy(sdk, sandbox_id, _DESTROY_SECONDS)

    async def _destroy(
        self, sdk: AsyncDaytona, sandbox_id: str, patience: float, late: bool = False
    ) -> None:
        """Asks for the end of a sandbox, which Daytona then brings about by itself.

        Args:
            patience: seconds for which that is tried.
            late: whether one that isn't there may still come.
        """
        from daytona_api_client_async import SandboxApi

        remove = functools.partial(SandboxApi(client.api(sdk)).delete_sandbox, sandbox_id)
        over = time.monotonic() + patience
        pause = 0.1
        while True:
            try:
                await client.call("destroy", remove, again=True, patience=patience)
            except Exception as e:
                missing, decided = faults.status_of(e) == 404, not faults.is_transient(e)
                if missing and not late:
                    return
                # A conflict: it changes its state just now, as it is starting, for instance.
                if (decided and not missing and faults.status_of(e) != 409) or (
                    time.monotonic() > over
                ):
                    raise faults.explain(e, "destroy", client.url(), nothing_ran=False) from e
                await anyio.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE)
            else:
                return

    async def _destroy_quietly(
        self, sdk: AsyncDaytona, sandbox_id: str, late: bool = False
    ) -> None:
        """For a creation that failed; its lifetime ends what can't be ended now."""
        with anyio.CancelScope(shield=True), contextlib.suppress(Exception):
            await self._destroy(sdk, sandbox_id, _LATE_SECONDS, late)

    async def _ask(self, op: str, make: Any, seconds: float = client.CALL_SECONDS) -> Any:
        try:
            return await client.call(op, make, seconds=seconds, again=True)
        except Exception as e:
            raise faults.explain(e, op, client.url()) from e


def _seconds(created: str | None) -> float | None:
    if not created:
        return None
    with contextlib.suppress(ValueError):
        return datetime.datetime.fromisoformat(created.replace("Z", "+00:00")).timestamp()
    return None
