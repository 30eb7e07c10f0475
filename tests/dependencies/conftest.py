"""A conda channel and an index of wheels on this disk: tests that use them need no network."""

import contextlib
import fcntl
import os
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path

import channel
import pytest

#: From pip's index, for the channel; and for pip, from a directory.
IN_CHANNEL = ("pip", "requests", "tomli==2.2.1", f"numpy=={channel.NUMPY}")
FOR_PIP = ("requests", "pydash==8.0.5", "tomli==2.0.1")
TO_BUILD = ("setuptools", "wheel", "flit_core", "hatchling")


@contextlib.contextmanager
def alone(path):
    """One of pytest's workers at a time."""
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A directory of this run of pytest, whose workers share it; of many runs if one is named."""
    if kept := os.environ.get("TEST_PACKAGES"):
        Path(kept).mkdir(parents=True, exist_ok=True)
        return Path(kept)
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def conda(shared):
    """A directory with a channel, wheels for pip, and `micromamba`; made once."""
    made = shared / "conda"
    with alone(shared / "conda.lock"):
        if not (made / "done").exists():
            channel.micromamba(made / "micromamba")
            channel.python_package(made / "channel")
            for wheel in channel.download(made / "wheels", *IN_CHANNEL):
                channel.wheel_package(made / "channel", wheel)
            channel.index(made / "channel")
            channel.download(made / "index", *FOR_PIP, *TO_BUILD)
            (made / "done").touch()
    return made


@dataclass
class Packages:
    """Where a project's flows find packages, and where their environments go.

    Attributes:
        made: the channel, the wheels and micromamba; of all tests.
        wheels: a directory where pip looks, too; of this test alone.
        cache: where environments are kept.
    """

    made: Path
    wheels: Path
    cache: Path
    environment: dict = field(default_factory=dict)

    def wheel(self, name, version, files, requires=()):
        """Puts a wheel there, with these files: {name: text}."""
        return channel.make_wheel(self.wheels, name, version, files, requires)

    def source(self, name, version, files):
        """The same for source."""
        return channel.make_source(self.wheels, name, version, files)

    def environments(self):
        base = self.cache / "metaflow-sandbox/environments"
        there = sorted(p.name for p in base.iterdir()) if base.exists() else []
        return [name for name in there if not name.startswith(".lock-")]


def packages_for(project, conda, cache):
    wheels = project.directory.parent / "wheels"
    wheels.mkdir()
    settings = project.directory.parent / "pip.conf"
    settings.write_text(
        f"[global]\nno-index = true\nfind-links = {conda / 'index'}\n    {wheels}\n"
    )
    made = Packages(conda, wheels, cache)
    project.seconds = 1200  # to build takes what it takes
    project.environment.update(
        PATH=f"{conda / 'micromamba/bin'}:{project.environment['PATH']}",
        CONDA_CHANNELS=f"file://{conda / 'channel'}",
        MAMBA_ROOT_PREFIX=str(project.directory.parent / "mamba"),
        MICROMAMBA_PYTHON=sys.executable,
        METAFLOW_SANDBOX_MICROMAMBA=str(conda / "micromamba"),
        PIP_CONFIG_FILE=str(settings),
        XDG_CACHE_HOME=str(cache),
    )
    return made


@pytest.fixture
def packages(project, conda, tmp_path):
    """What a project's flows find, with a cache of their own."""
    return packages_for(project, conda, tmp_path / "cache")


@pytest.fixture
def shared_packages(project, conda, shared):
    """The same, with environments that other tests have built, too."""
    return packages_for(project, conda, shared / "cache")


assert platform.system() == "Linux", "these tests build environments in bubblewrap"
