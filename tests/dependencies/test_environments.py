"""Steps get the packages that they name, and nothing runs on the host to that end."""

import os
import signal
import subprocess
import sys
import time

import channel
import pytest

COMMAND = [sys.executable, "-m", "metaflow_sandbox.cli"]
FLOW = """
import os, sys
from metaflow import FlowSpec, bubblewrap, conda, conda_base, pypi, pypi_base, sandbox, step

{before}
class Deps(FlowSpec):
    {decorators}
    @step
    def start(self):
        {body}
        self.next(self.end)

    @{kind}(disabled=True)
    @step
    def end(self):
        pass

if __name__ == "__main__":
    Deps()
"""


def write_flow(project, decorators, body="pass", *, kind="pypi", before=""):
    """A flow whose first step has these decorators, and whose last is Metaflow's own."""
    lines = {"decorators": "\n    ".join(decorators), "body": body, "kind": kind, "before": before}
    project.write("flow.py", FLOW.format(**lines))


def a_step(project, decorators, body="pass", *, kind="pypi", before="", env=None):
    """Runs such a flow."""
    write_flow(project, decorators, body, kind=kind, before=before)
    return project.run("flow.py", f"--environment={kind}", "run", env=env)


def answer(project, name="found"):
    return project.client(f'answer = Flow("Deps").latest_run["start"].task.data.{name}')


def test_the_readmes_example(project, shared_packages):
    project.write(
        "flow.py",
        """
        import sys
        from metaflow import FlowSpec, bubblewrap, conda, pypi, step

        class Readme(FlowSpec):
            @pypi(disabled=True)
            @step
            def start(self):
                self.next(self.fetch)

            @bubblewrap(network=False)
            @pypi(packages={"pydash": "8.0.5"})
            @step
            def fetch(self):
                import pydash
                self.pydash = [pydash.__version__, pydash.chunk([1, 2, 3], 2)]
                self.next(self.count)

            @bubblewrap(network=False)
            @conda(packages={"numpy": "NUMPY"})
            @step
            def count(self):
                import numpy
                self.numpy = [numpy.__version__, int(numpy.arange(5).sum())]
                self.pythons = [sys.executable, "/tomli" in str(sys.path)]
                try:
                    import pydash
                    self.other = "there"
                except ImportError:
                    self.other = "not there"
                self.next(self.end)

            @pypi(disabled=True)
            @step
            def end(self):
                assert self.pydash[1] == [[1, 2], [3]] and self.numpy[1] == 10

        if __name__ == "__main__":
            Readme()
        """.replace("NUMPY", channel.NUMPY),
    )
    project.run("flow.py", "--environment=pypi", "run").ok()
    assert not (project.directory.parent / "mamba/envs").exists()  # none was made on the host
    found = project.client(
        'd = Flow("Readme").latest_run["count"].task.data;'
        "answer = [d.pydash[0], d.numpy[0], d.pythons[0], d.other]"
    )
    assert found[:2] == ["8.0.5", channel.NUMPY]
    assert found[2].startswith("/inbox/environments/")
    assert found[3] == "not there"


HOSTILE = 'import os, pathlib; pathlib.Path("{marker}").write_text(str(os.getuid()))'


def test_a_package_that_runs_code_when_it_is_installed_or_loaded_runs_none_on_the_host(
    project, packages, tmp_path
):
    marker = tmp_path / "marker"
    code = HOSTILE.format(marker=marker)
    attempt = f"try: exec({code!r})\nexcept OSError: sys.refused = 1"
    files = {
        "hostile.pth": f"import sys; exec({attempt!r})\n",
        "hostile.py": "import sys\nrefused = getattr(sys, 'refused', 0)\n",
    }
    packages.wheel("hostile", "1.0", files)
    decorators = ["@bubblewrap(network=False)", '@pypi(packages={"hostile": "1.0"})']
    done = a_step(project, decorators, "import hostile; self.found = hostile.refused")
    done.ok()
    assert answer(project) == 1  # it did run, inside, and got nowhere
    assert not marker.exists()


@pytest.mark.sample(0.5)
def test_the_same_package_runs_code_on_the_host_without_a_sandbox(project, packages, tmp_path):
    marker = tmp_path / "marker"
    packages.wheel("hostile", "1.0", {"hostile.pth": HOSTILE.format(marker=marker) + "\n"})
    decorators = ['@pypi(packages={"hostile": "1.0"})']
    a_step(project, decorators).ok()
    assert marker.exists()


SETUP = """
try:
    {code}
    refused = 0
except OSError:
    refused = 1
open({name!r} + ".py", "w").write(f"refused = {{refused}}")
from setuptools import setup
setup(name={name!r}, version="1.0", py_modules=[{name!r}])
"""


@pytest.mark.sample(0.5)
def test_source_is_built_inside_and_runs_nothing_on_the_host(project, packages, tmp_path):
    marker = tmp_path / "marker"
    code = HOSTILE.format(marker=marker)
    paths = {}
    for name in ("named", "addressed", "needed"):
        files = {
            "setup.py": SETUP.format(code=code, name=name),
            "PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        }
        paths[name] = packages.source(name, "1.0", files)
    packages.wheel("middle", "1.0", {"middle.py": ""}, [f"needed @ file://{paths['needed']}"])
    wanted = {"named": "1.0", "addressed": f"@ file://{paths['addressed']}", "middle": "1.0"}
    body = "import named, addressed, needed, middle; self.found = "
    body += "[named.refused, addressed.refused, needed.refused]"
    a_step(project, ["@bubblewrap", f"@pypi(packages={wanted!r})"], body).ok()
    assert answer(project) == [1, 1, 1]  # they did run, inside, and got nowhere
    assert not marker.exists()
    for path in paths.values():
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-index"]
        pip += [f"--find-links={packages.made / 'index'}", "-d", str(tmp_path), str(path)]
        subprocess.run(pip, capture_output=True)
        assert marker.exists()  # the control: it would have run
        marker.unlink()


PROJECT = """
[build-system]
requires = [{needs!r}]
build-backend = {backend!r}
[project]
name = {name!r}
version = "1.0"
description = "-"
dependencies = ["tomli"]
"""
BACKENDS = {"flit_core": "flit_core.buildapi", "hatchling": "hatchling.build"}


@pytest.mark.sample(0.08)
def test_source_is_built_with_what_it_asks_for(project, packages):
    for needs, backend in BACKENDS.items():
        name = f"by_{needs}"
        about = PROJECT.format(name=name, needs=needs, backend=backend)
        info = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: tomli\n"
        files = {f"{name}.py": "import tomli", "pyproject.toml": about, "PKG-INFO": info}
        packages.source(name, "1.0", files)
    wanted = {"by_flit_core": "1.0", "by_hatchling": ">=1"}
    body = "import by_flit_core, by_hatchling, importlib.util as u; "
    body += "self.found = [by_hatchling.tomli.__name__, u.find_spec('hatchling') is None]"
    a_step(project, ["@bubblewrap", f"@pypi(packages={wanted!r})"], body).ok()
    assert answer(project) == ["tomli", True]


@pytest.mark.sample(0.08)
def test_source_that_needs_more_than_it_said_is_not_installed(project, packages):
    files = {
        "setup.py": "from setuptools import setup\n"
        "setup(name='liar', version='1.0', install_requires=['tomli'])",
        "PKG-INFO": "Metadata-Version: 2.1\nName: liar\nVersion: 1.0\n",
    }
    packages.source("liar", "1.0", files)
    done = a_step(project, ["@bubblewrap", '@pypi(packages={"liar": "1.0"})'])
    assert done.code != 0
    assert "liar 1.0 requires tomli" in done.output and "add it to the packages" in done.output
    assert packages.environments() == []


FAILURES = {
    "no such package": ('@pypi(packages={"nowhere": "1.0"})', "no wheel of nowhere==1.0"),
    "no such version": ('@conda(packages={"tomli": "99"})', "tomli"),
    "a conflict": ('@pypi(packages={"one": "1", "two": "1"})', "conflict"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_packages_that_can_not_be_had_stop_the_run_before_any_step(project, packages, case):
    packages.wheel("one", "1", {"one.py": ""}, ["tomli==2.0.1"])
    packages.wheel("two", "1", {"two.py": ""}, ["tomli<2"])
    decorator, said = FAILURES[case]
    done = a_step(project, ["@bubblewrap", decorator])
    assert done.code != 0
    assert said in done.output
    assert "Task is starting" not in done.output
    # Python 3.13.0 has one of its own, before, for an archive that Metaflow leaves open.
    assert "Traceback" not in done.output.rpartition("Sandbox:")[2]


@pytest.mark.sample(0.5)
def test_a_package_that_is_not_what_the_lock_says_is_refused(project, packages):
    path = packages.wheel("thing", "1.0", {"thing.py": "good = 1\n"})
    decorators = ["@bubblewrap", '@pypi(packages={"thing": "1.0"})']
    a_step(project, decorators, "import thing").ok()
    subprocess.run([*COMMAND, "cache", "clear"], env=project.environment, check=True)
    good = path.read_bytes()
    packages.wheel("thing", "1.0", {"thing.py": "good = 0\n"})
    done = a_step(project, decorators, "import thing")
    assert done.code != 0
    assert "HASH" in done.output.upper()
    assert "Task is starting" not in done.output
    # The same for a conda package, which micromamba has in its own cache.
    path.write_bytes(good)
    (conda,) = (project.directory.parent / "mamba/pkgs").glob("pip-*.tar.bz2")
    with open(conda, "ab") as file:
        file.write(b"more")
    done = a_step(project, decorators, "import thing")
    assert done.code != 0
    assert "is not what the lock says" in done.output
    assert "--force-rebuild-environments" in done.output
    assert "Task is starting" not in done.output


@pytest.mark.sample(0.5)
def test_a_foreach_shares_one_build_and_runs_at_once_wait_for_it(project, packages):
    project.write(
        "flow.py",
        """
        from metaflow import FlowSpec, bubblewrap, conda, step

        class Many(FlowSpec):
            @conda(disabled=True)
            @step
            def start(self):
                self.items = list(range(20))
                self.next(self.work, foreach="items")

            @bubblewrap(network=False)
            @conda(packages={"tomli": "2.2.1"})
            @step
            def work(self):
                import tomli
                self.got = tomli.loads(f"x = {self.input}")["x"]
                self.next(self.join)

            @conda(disabled=True)
            @step
            def join(self, inputs):
                assert sorted(i.got for i in inputs) == list(range(20))
                self.next(self.end)

            @conda(disabled=True)
            @step
            def end(self):
                pass

        if __name__ == "__main__":
            Many()
        """,
    )
    first = project.start("flow.py", "--environment=conda", "run", "--max-workers=4")
    second = project.start("flow.py", "--environment=conda", "run", "--max-workers=4")
    said = [process.communicate(timeout=600)[0].decode() for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], said
    assert len(packages.environments()) == 1
    assert sum("is built, once" in text for text in said) == 1
    assert sum("another run builds its environment" in text for text in said) == 1


@pytest.mark.sample(0.08)
def test_a_build_that_is_killed_half_way_leaves_nothing_that_counts(project, packages):
    decorators = ["@bubblewrap(network=False)", '@conda(packages={"tomli": "2.2.1"})']
    # The first is ended as soon as something of the environment is on the disk.
    base = packages.cache / "metaflow-sandbox/environments"
    write_flow(project, decorators)
    process = project.start("flow.py", "--environment=pypi", "run")
    deadline = time.monotonic() + 300
    while not list(base.glob(".new-*/root/.build/pkgs/*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert [n for n in packages.environments() if not n.startswith(".new-")] == []
    a_step(project, decorators, "import tomli; self.found = 1").ok()
    assert answer(project) == 1


@pytest.mark.sample(0.5)
@pytest.mark.parametrize("kind", ["pypi", "conda"])
def test_a_run_that_is_ended_while_it_waits_for_packages_ends(project, packages, silent, kind):
    url = f"http://127.0.0.1:{silent.getsockname()[1]}"
    settings = project.directory.parent / "silent.conf"
    settings.write_text(f"[global]\nindex-url = {url}\n")
    write_flow(project, ["@bubblewrap", f'@{kind}(packages={{"tomli": "2.2.1"}})'], kind=kind)
    env = {"pypi": {"PIP_CONFIG_FILE": str(settings)}, "conda": {"CONDA_CHANNELS": url}}
    project.ended_while_it_asks(silent, f"--environment={kind}", "run", env=env[kind])
