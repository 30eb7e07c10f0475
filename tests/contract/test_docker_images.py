"""Images that a recipe asks for are made once, whoever asks, and hold what was installed."""

from dataclasses import replace

import anyio
import engines
import pytest

from metaflow_sandbox.backends.base import Recipe, SandboxSpec
from metaflow_sandbox.backends.docker import Docker

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def recipe(docker, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "wheels/sub").mkdir(parents=True)
    (tmp_path / "wheels/a").write_bytes(b"first")
    (tmp_path / "wheels/sub/b").write_bytes(bytes(3 << 20))
    install = ("sh", "-c", "mkdir /env && cat /wheels/a > /env/a && wc -c < /wheels/sub/b > /env/b")
    yield Recipe(
        engines.IMAGE, ("echo set up >> /opt/setup",), {"/wheels": tmp_path / "wheels"}, install,
        "/env",
    )  # fmt: skip
    made = docker.docker("images", "--quiet", "metaflow-sandbox").stdout.split()
    docker.docker("rmi", "--force", *made)


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
    said, images = [], []

    async def prepare():
        async def say(line):
            said.append(line)

        images.append((await Docker().prepare(recipe, say)).image)

    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(prepare)
    assert len(set(images)) == 1
    assert said.count("setup: echo set up >> /opt/setup") == 1
    other = replace(recipe, install=(*recipe.install[:2], "mkdir /env && echo other > /env/a"))
    assert (await Docker().prepare(other)).image not in images
    # What `setup` gave was there already.
    assert len(docker.docker("images", "--quiet", "metaflow-sandbox").stdout.split()) == 3
