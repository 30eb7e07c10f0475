"""The contract in Daytona's own cloud: `pytest tests/integration -m integration`.

Needs DAYTONA_API_KEY, and says what it did not run. It makes about 90 of the smallest
sandboxes, one or two at a time, and a few snapshots named metaflow-sandbox-….
"""

import os

import pytest

from metaflow_sandbox.backends.daytona import Daytona
from metaflow_sandbox.testing import BackendContract


class TestHostedDaytona(BackendContract):
    pytestmark = [pytest.mark.anyio, pytest.mark.integration]
    cpu, memory, disk = 1, 1024, 1024

    @pytest.fixture
    def backend(self):
        if not os.environ.get("DAYTONA_API_KEY"):
            pytest.skip("NOT RUN: DAYTONA_API_KEY is not set")
        return Daytona()
