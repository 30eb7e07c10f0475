"""The contract of backends as tests. Needs pytest.

A backend's own tests subclass `BackendContract` and give it one fixture:

    from metaflow_sandbox.testing import BackendContract

    class TestMine(BackendContract):
        @pytest.fixture
        def backend(self):
            return Mine()

Every test makes its own sandboxes and destroys them.
"""

import pytest

pytest.register_assert_rewrite("metaflow_sandbox.testing.contract")

from .contract import BackendContract  # noqa: E402 - after pytest knows of it

__all__ = ["BackendContract"]
