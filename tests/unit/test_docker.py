"""What the engine is asked for, and what becomes of it when it is slow."""

import anyio
import pytest
from metaflow import metaflow_config

from metaflow_sandbox.backends import build
from metaflow_sandbox.backends.base import Recipe, SandboxSpec, unsaid
from metaflow_sandbox.backends.docker import images
from metaflow_sandbox.errors import SandboxError

from .test_environments import ENGINE, command, docker

IMAGE = {"Id": "sha256:image", "Config": {}}


class Answers:
    """A container in which every command ends with this exit code, or never."""

    id = "metaflow-sandbox-1"

    def __init__(self, code):
        self.code = code
        self.asked = []

    async def exec(self, argv, *, on_stderr, timeout=None, **_):
        self.asked.append((list(argv), timeout))
        if self.code is None:
            raise TimeoutError
        await on_stderr(b"what it said\n")
        return self.code

    def diagnose(self):
        return None

    async def destroy(self):
        pass


def test_an_engine_that_does_not_answer_is_an_error_of_ours(tmp_path):
    program = tmp_path / "docker"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    engine = docker(program=str(program)).engine
    with pytest.raises(SandboxError, match="did not answer") as slow:
        anyio.run(lambda: engine.call("commit", "one", seconds=0.2))
    assert slow.value.code == "engine_slow"


def test_packages_are_installed_with_as_much_memory_as_on_other_backends(monkeypatch):
    monkeypatch.setattr(metaflow_config, "SANDBOX_MEMORY", 512)
    backend, specs = docker(), []

    async def start(spec, *_, **__):
        specs.append(spec)

    backend._start = start
    anyio.run(lambda: backend.create_to_commit(IMAGE, {}, False))
    assert specs[0].memory == 512 == build.memory(backend)


@pytest.mark.parametrize(("code", "said"), [(1, "exited with 1:\nwhat it said"), (None, "60 min")])
def test_an_installation_that_fails_is_called_what_it_is(monkeypatch, tmp_path, code, said):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    backend, container = docker(), Answers(code)

    async def nothing(*_):
        return None

    async def create(*_):
        return container

    monkeypatch.setattr(type(ENGINE), "image", nothing)
    backend.create_to_commit = create
    recipe = Recipe(
        install=("python3", "install.py", "/build"), prefix="/env", title="two packages"
    )
    with pytest.raises(build.BuildFailed, match=said) as failed:
        anyio.run(images.make, backend, "python:3.12-slim", IMAGE, recipe, unsaid)
    assert "two packages" in str(failed.value) and "image=" not in str(failed.value)
    assert container.asked == [(list(recipe.install), build.SECONDS)]


def test_a_limit_of_this_machine_is_not_given_to_an_engine_elsewhere():
    for local in (True, False):
        words = command(docker(podman=True, local=local), SandboxSpec())
        assert any(word.startswith("nofile=") for word in words) == local


@pytest.mark.parametrize(("limited", "notes"), [(True, 0), (False, 1)])
def test_an_engine_that_leaves_swap_open_says_so(limited, notes):
    backend = docker(swap=limited, program="/bin/true")
    said = anyio.run(backend.preflight).notes
    assert len([note for note in said if "swap" in note]) == notes
