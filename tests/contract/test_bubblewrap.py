"""Bubblewrap keeps the contract: by its own bindings, and like a remote provider would."""

import pytest
from remote_like import RemoteLike

from metaflow_sandbox.backends.bubblewrap import Bubblewrap
from metaflow_sandbox.testing import BackendContract


class TestBubblewrap(BackendContract):
    @pytest.fixture
    def backend(self):
        return Bubblewrap()


class TestRemoteLike(BackendContract):
    @pytest.fixture
    def backend(self):
        return RemoteLike()
