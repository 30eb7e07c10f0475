"""Where the environments of steps are inside, on each kind of engine."""

import re
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest
from metaflow.plugins.pypi.micromamba import Micromamba

from metaflow_sandbox.backends.base import Recipe, SandboxSpec
from metaflow_sandbox.backends.boxlite import Boxlite, build
from metaflow_sandbox.backends.docker import Docker
from metaflow_sandbox.backends.docker.engine import Engine
from metaflow_sandbox.backends.docker.sandbox import DockerSandbox
from metaflow_sandbox.environments import Package
from metaflow_sandbox.environments.conda import CondaEnvironment, Solver, fetch_conda
from metaflow_sandbox.environments.uv import UvEnvironment

PYTHON = Package("https://example.org/linux-64/python-3.12.1-0.conda", "00")
ENVIRONMENT = CondaEnvironment("linux-64", "3.12.1", (PYTHON,), (), (), None)
ENGINE = Engine(
    "docker", podman=False, version="27", local=True, memory=True, cpu=True, processes=True,
    sizes=False, runtimes=frozenset(), remapped=False, groups="version 2",
)  # fmt: skip


def docker(**engine):
    made = Docker()
    made.__dict__["engine"] = replace(ENGINE, **engine)
    return made


def command(backend, spec, **how):
    """How a container is started."""
    image = {"Id": "sha256:image", "Config": {}}
    return DockerSandbox(backend, backend.engine, spec, image, **how)._command()


def covered(directory, by):
    return any(PurePosixPath(directory).is_relative_to(place) for place in by)


@pytest.mark.parametrize("local", [True, False])
def test_a_container_covers_nothing_of_what_its_image_has_of_an_environment(local, tmp_path):
    backend = docker(local=local)
    prefix = ENVIRONMENT.recipe(Recipe(), backend, tmp_path).prefix
    mounts = {f"{backend.inbox}/{name}": tmp_path for name in ("code", "attempt")}
    words = command(backend, SandboxSpec(disk=64, mounts=mounts), bound=local)
    places = [word.partition(":")[0] for word in words if re.match("/[^:]*:rw", word)]
    places += [found[1] for word in words if (found := re.search(r"target=([^,]+)", word))]
    assert covered(backend.work, places)
    assert not covered(prefix, places)


def test_a_microvm_keeps_what_its_image_has_of_an_environment(tmp_path):
    backend = Boxlite()
    recipe = ENVIRONMENT.recipe(Recipe(), backend, tmp_path)
    recipe = replace(recipe, files={f"{backend.work}/build": Path(tmp_path)})
    left_out = build.left_out(backend, recipe)
    assert covered(recipe.install[-1], left_out)
    assert not covered(recipe.prefix, left_out)


def test_the_packages_of_every_environment_for_another_platform_are_downloaded(
    tmp_path, monkeypatch
):
    """Metaflow downloads those for another platform once for each name of an environment."""
    stored = tmp_path / "pkgs"
    stored.mkdir()

    def call(_solver, words, _env=None):
        if words[0] == "config":
            places = {"envs_dirs": [f"{tmp_path}/envs"], "pkgs_dirs": [str(stored)]}
            return {**places, "platform": "osx-arm64", "channels": []}
        for url in (word for word in words if word.startswith("https://")):
            (stored / url.rpartition("/")[2]).write_text("a package")
        return {"envs": []}

    monkeypatch.setattr(Micromamba, "_call", call)
    for name in ("one", "two"):
        package = Package(f"https://example.org/linux-64/{name}-1-0.conda", "")
        (path,) = fetch_conda(Solver(), (package,), "linux-64").values()
        assert path.read_text() == "a package"
    assert not list((tmp_path / "envs").rglob("fake.done"))


def test_a_token_in_the_address_of_an_index_makes_no_other_environment():
    """Those of some clouds are others every day."""
    requirements = "--index-url https://aws:{}@example.org/simple\n\nidna==3.10 --hash=sha256:9\n"
    found = {
        UvEnvironment("linux-64", "3.11.7", "/usr/bin/python3", requirements.format(token)).digest
        for token in ("monday", "tuesday")
    }
    assert len(found) == 1
