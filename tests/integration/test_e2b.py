"""The contract in E2B's own sandboxes, with the user's own key; says what it used."""

import os
import statistics
import time

import anyio
import pytest

from metaflow_sandbox.backends.base import SandboxSpec
from metaflow_sandbox.backends.e2b import E2B
from metaflow_sandbox.testing import BackendContract

pytestmark = pytest.mark.integration
_RUNS = 5


@pytest.fixture(autouse=True)
def key():
    if "E2B_API_KEY" not in os.environ:
        pytest.skip("NOT RUN: E2B_API_KEY is not set")


@pytest.fixture(scope="module", autouse=True)
def used():
    """Ends what is left of this module's sandboxes, and prints how many there were."""
    made = []
    create = E2B._create

    async def counted(self, sdk, template, spec):
        sandbox = await create(self, sdk, template, spec)
        made.append((sandbox.id, time.time()))
        return sandbox

    E2B._create = counted
    yield
    E2B._create = create

    async def sweep():
        mine = {name for name, _ in made}
        left = [info.id for info in await E2B().list({}) if info.id in mine]
        for name in left:
            await E2B().destroy(name)
        return left

    left = anyio.run(sweep) if made else []
    print(f"\nE2B: {len(made)} sandboxes were made, and {len(left)} of them ended only now.")


class TestHostedE2B(BackendContract):
    pytestmark = [pytest.mark.integration, pytest.mark.anyio]
    cpu = 1  # it gives whole ones

    @pytest.fixture
    def backend(self):
        return E2B()


def test_how_long_a_cold_start_takes():
    async def once():
        began = time.monotonic()
        sandbox = await E2B().create(SandboxSpec(lifetime=60, network=False))
        created = time.monotonic()
        try:
            assert (await sandbox.run(["true"])).exit_code == 0
        finally:
            ran = time.monotonic()
            await sandbox.destroy()
        return created - began, ran - created, time.monotonic() - ran

    runs = [anyio.run(once) for _ in range(_RUNS)]
    for name, seconds in zip(("create", "first command", "destroy"), zip(*runs)):
        print(f"{name}: median {statistics.median(seconds):.2f} s, of {_RUNS}")
