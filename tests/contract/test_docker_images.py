"""Images that a recipe asks for are made once, whoever asks, and hold what was installed."""

import uuid
from dataclasses import replace

import anyio
import engines
import pytest

from metaflow_sandbox.backends.base import Recipe, SandboxSpec
from metaflow_sandbox.backends.docker import Docker, images

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def recipe(docker, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # Other processes of these tests have the same engine.
    monkeypatch.setattr(images, "REPOSITORY", f"metaflow-sandbox-{uuid.uuid4().hex[:12]}")
    (tmp_path / "wheels/sub").mkdir(parents=True)
    (tmp_path / "wheels/a").write_bytes(b"first")
    (tmp_path / "wheels/sub/b").write_bytes(bytes(3 << 20))
    install = ("sh", "-c", "mkdir /env && cat /wheels/a > /env/a && wc -c < /wheels/sub/b > /env/b")
    yield Recipe(
        engines.IMAGE, ("echo set up >> /opt/setup",), {"/wheels": tmp_path / "wheels"}, install,
        "/env",
    )  # fmt: skip
    docker.docker("rmi", "--force", *made(docker, "{{.Repository}}:{{.Tag}}"))


async def test_an_installation_is_in_the_image_and_its_files_are_not(recipe):
    backend = Docker()
    prepared = await backend.prepare(recipe)
    sandbox = await backend.create(SandboxSpec(image=prepared.image, disk=64, network=False))
    try:
        done = await sandbox.run(["sh", "-c", "cat /opt/setup /env/a /env/b; ls /wheels"])
    finally:
        await sandbox.destroy()
    assert done.stdout == b"set up\nfirst3145728\n"
    assert b"No such file" in done.stderr


async def test_who_asks_at_the_same_time_waits_and_gets_the_same(recipe, docker):
    said, found = [], []

    async def prepare():
        async def say(line):
            said.append(line)

        found.append((await Docker().prepare(recipe, say)).image)

    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(prepare)
    assert len(set(found)) == 1
    assert said.count("setup: echo set up >> /opt/setup") == 1
    other = replace(recipe, install=(*recipe.install[:2], "mkdir /env && echo other > /env/a"))
    assert (await Docker().prepare(other)).image not in found
    # What `setup` gave was there already.
    assert len(made(docker)) == 3


def made(docker, what="{{.ID}}"):
    """The images that recipes have made, without those that lost their name."""
    return sorted(docker.docker("images", "--format", what, images.REPOSITORY).stdout.split())


async def test_what_serves_one_run_alone_is_removed_after_it(recipe, docker):
    ordinary = await Docker().prepare(recipe)
    before = made(docker)
    assert ordinary.discard is None
    once = replace(recipe, once="run-1")
    set_up = await Docker().prepare(replace(once, files={}, install=(), prefix=None))
    both = await Docker().prepare(once)
    assert ordinary.image not in (set_up.image, both.image)
    assert len(made(docker)) == 4
    await both.discard()
    await set_up.discard()
    assert made(docker) == before


async def test_what_is_made_anew_takes_the_place_of_what_was_there(recipe, docker):
    first = await Docker().prepare(recipe)
    run = Docker()
    again = [(await run.prepare(replace(recipe, rebuild=True))).image for _ in range(2)]
    assert again[0] == again[1] != first.image
    assert (await Docker().prepare(recipe)).image == again[0]
    assert len(made(docker)) == 2
