"""What the end of a run does with what was prepared for it."""

import anyio
import pytest

from metaflow_sandbox.backends.base import Prepared, Recipe, unsaid
from metaflow_sandbox.errors import SandboxError
from metaflow_sandbox.launch.session import Session
from tests.unit.idle import Idle


class Keeper(Idle):
    """Prepares what is for one run alone; the image "stuck" can't be removed."""

    name = "keeper"

    def __init__(self):
        self.kept = []

    async def prepare(self, recipe, say=unsaid):
        async def discard():
            if recipe.image == "stuck":
                raise SandboxError("in use", op="discard")
            self.kept.remove(recipe.image)

        self.kept.append(recipe.image)
        return Prepared(recipe.image, discard=discard)


@pytest.fixture(autouse=True)
def _temporary(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)


def test_what_was_prepared_for_one_run_is_removed_at_its_end():
    backend, session = Keeper(), Session("Flow", [])
    for image in ("one", "stuck", "two"):
        anyio.run(session._make, backend, Recipe(image), unsaid)
    assert backend.kept == ["one", "stuck", "two"]
    session.close()
    assert backend.kept == ["stuck"]
