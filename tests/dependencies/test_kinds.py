"""Every way to name packages, with every kind of step beside it."""

import base64
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from functools import partial
from pathlib import Path
from urllib.parse import quote

import channel
import images
import pytest
from metaflow.plugins.uv.uv_environment import UVEnvironment
from test_environments import COMMAND, a_step, answer

from metaflow_sandbox.environments import uv

WHICH = "import tomli, sys; self.found = [tomli.__file__, sys.executable, sys.version.split()[0]]"
INSIDE = "/inbox/environments/"


def cached(packages):
    said = subprocess.run(
        [*COMMAND, "cache", "--json"],
        env={**os.environ, "XDG_CACHE_HOME": str(packages.cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in said.stdout.splitlines()]


BASES = {
    "pypi_base": ('@pypi_base(packages={"tomli": "2.0.1"})', "2.0.1"),
    "conda_base": ('@conda_base(packages={"tomli": "2.2.1"})', "2.2.1"),
}


@pytest.mark.sample(0.08)
@pytest.mark.parametrize("base", BASES)
def test_packages_of_the_whole_flow(project, shared_packages, base):
    before, version = BASES[base]
    body = "from importlib.metadata import version; self.found = version('tomli')"
    kind = base.partition("_")[0]
    a_step(project, ["@bubblewrap"], body, kind=kind, before=before).ok()
    assert answer(project) == version


def test_a_disabled_step_has_what_is_installed_here_and_steps_mix(project, shared_packages):
    project.write(
        "flow.py",
        """
        import sys
        from metaflow import FlowSpec, bubblewrap, conda, step

        class Mixed(FlowSpec):
            @conda(disabled=True)
            @step
            def start(self):
                self.where = [sys.executable]
                self.next(self.bare)

            @bubblewrap
            @conda(disabled=True)
            @step
            def bare(self):
                import anyio
                self.where += [sys.executable]
                self.next(self.boxed)

            @bubblewrap(network=False)
            @conda(packages={"tomli": "2.2.1"})
            @step
            def boxed(self):
                import tomli
                self.where += [sys.executable]
                self.next(self.end)

            @conda(disabled=True)
            @step
            def end(self):
                pass

        if __name__ == "__main__":
            Mixed()
        """,
    )
    project.run("flow.py", "--environment=conda", "run").ok()
    where = project.client('answer = Flow("Mixed").latest_run["end"].task.data.where')
    assert where[0] == where[1] == sys.executable
    assert where[2].startswith(INSIDE)


@pytest.mark.sample(0.08)
def test_a_plain_step_beside_it_has_its_environment_on_the_host_as_ever(project, shared_packages):
    project.write(
        "flow.py",
        """
        import sys
        from metaflow import FlowSpec, bubblewrap, conda, step

        class Mixed(FlowSpec):
            @bubblewrap(network=False)
            @conda(packages={"tomli": "2.2.1"})
            @step
            def start(self):
                import tomli
                self.where = [sys.executable]
                self.next(self.end)

            @conda(packages={"tomli": "2.2.1"})
            @step
            def end(self):
                import tomli
                self.where += [sys.executable]

        if __name__ == "__main__":
            Mixed()
        """,
    )
    project.run("flow.py", "--environment=conda", "run").ok()
    inside, outside = project.client('answer = Flow("Mixed").latest_run["end"].task.data.where')
    assert inside.startswith(INSIDE)
    assert "/envs/metaflow/" in outside


@pytest.mark.parametrize("order", ["--with bubblewrap first", "--with conda first"])
@pytest.mark.sample(0.08)
def test_decorators_from_the_command_line_in_both_orders(project, shared_packages, order):
    project.write(
        "flow.py",
        """
        import sys
        from metaflow import FlowSpec, step

        class Deps(FlowSpec):
            @step
            def start(self):
                import tomli
                self.found = sys.executable
                self.next(self.end)

            @step
            def end(self):
                pass

        if __name__ == "__main__":
            Deps()
        """,
    )
    given = ["--with", "bubblewrap:network=False", "--with", 'conda:packages={"tomli": "2.2.1"}']
    if order.startswith("--with conda"):
        given = given[2:] + given[:2]
    project.run("flow.py", "--environment=conda", "run", *given).ok()
    assert answer(project).startswith(INSIDE)


def another_python():
    """A CPython of another version on this machine, if there is one."""
    for short in ("3.12", "3.13", "3.10", "3.11"):
        if short == f"{sys.version_info[0]}.{sys.version_info[1]}":
            continue
        asked = [
            "sh",
            "-c",
            f"command -v python{short}; ls ~/.pyenv/versions/{short}.*/bin/python{short}",
        ]
        for path in subprocess.run(asked, capture_output=True, text=True).stdout.split():
            if subprocess.run([path, "-c", "pass"], capture_output=True).returncode == 0:
                return path, short
    return None


@pytest.mark.sample(0.08)
@pytest.mark.parametrize("kind", ["pypi", "conda"])
def test_another_python_inside(project, packages, conda, kind, tmp_path):
    found = another_python()
    if found is None:
        pytest.skip("NOT CHECKED: this machine has no other Python")
    path, short = found
    own = tmp_path / "channel"
    version = channel.python_package(own, path)
    specs = ("pip", "requests", "tomli==2.2.1")
    options = ("--python-version", short)
    for wheel in channel.download(tmp_path / "other", *options, *specs):
        channel.wheel_package(own, wheel, python=short)
    channel.index(own)
    channel.download(packages.wheels, *options, *specs)
    decorators = ["@bubblewrap", f'@{kind}(packages={{"tomli": "2.2.1"}}, python="{version}")']
    env = {"CONDA_CHANNELS": f"file://{own}"}
    a_step(project, decorators, WHICH, kind=kind, env=env).ok()
    file, executable, number = answer(project)
    assert number == version != sys.version.split()[0]
    assert file.startswith(INSIDE) and executable.startswith(INSIDE)


UV = """
[project]
name = "flows"
version = "0"
requires-python = ">=3.10"
dependencies = [
    "tomli==2.0.1",
    "pydash==8.0.5; python_version >= '3.10'",
    "colorama; python_version < '3.9'",
]
[dependency-groups]
dev = ["iniconfig"]
[[tool.uv.index]]
name = "our-own"
url = "{index}"
default = true
"""
UV_FLOW = """
import sys
from metaflow import FlowSpec, bubblewrap, step

class Deps(FlowSpec):
    @bubblewrap(network=False)
    @step
    def start(self):
        import importlib.util, pydash, tomli
        names = ("iniconfig", "colorama", "anyio")
        there = [importlib.util.find_spec(name) is not None for name in names]
        self.found = [tomli.__file__, sys.executable, there]
        self.next(self.end)

    @step
    def end(self):
        pass

if __name__ == "__main__":
    Deps()
"""
USER, PASSWORD = "tester", "a pass/word@"


class Asking(http.server.SimpleHTTPRequestHandler):
    """Files for who says who they are."""

    def send_head(self):
        key = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        if self.headers.get("Authorization") == f"Basic {key}":
            return super().send_head()
        self.send_response(401)
        self.send_header("WWW-Authenticate", 'Basic realm="tests"')
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def log_message(self, *_):
        pass


def in_address(index):
    return index.replace("//", f"//{USER}:{quote(PASSWORD, '')}@")


#: How one tells uv the password, as variables, of which NETRC is a file's text.
PASSWORDS = {
    "by the name of the index": lambda index: {
        "UV_INDEX_OUR_OWN_USERNAME": USER,
        "UV_INDEX_OUR_OWN_PASSWORD": PASSWORD,
    },
    "in UV_DEFAULT_INDEX": lambda index: {"UV_DEFAULT_INDEX": in_address(index)},
    "in UV_INDEX_URL": lambda index: {"UV_INDEX_URL": in_address(index)},
    "in UV_EXTRA_INDEX_URL": lambda index: {"UV_EXTRA_INDEX_URL": in_address(index)},
    "by the name that UV_INDEX gives": lambda index: {
        "UV_INDEX": f"theirs={index}",
        "UV_INDEX_THEIRS_USERNAME": USER,
        "UV_INDEX_THEIRS_PASSWORD": PASSWORD,
    },
    "in netrc": lambda index: {
        "NETRC": f'machine 127.0.0.1 login {USER} password "{PASSWORD}"',
    },
}


@pytest.fixture
def index(packages, conda):
    """The address of an index, on this machine, of the wheels for pip and two more."""
    channel.download(packages.wheels, "iniconfig", "colorama")
    root = packages.cache / "index"
    for wheel in (*packages.wheels.glob("*.whl"), *(conda / "index").glob("*.whl")):
        directory = root / wheel.name.split("-")[0].lower().replace("_", "-")
        directory.mkdir(parents=True, exist_ok=True)
        content = wheel.read_bytes()
        (directory / wheel.name).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        with open(directory / "index.html", "a") as page:
            page.write(f'<a href="{wheel.name}#sha256={digest}">{wheel.name}</a>\n')
    handler = partial(Asking, directory=root)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def lock(project, packages, index):
    """Writes a project and its uv.lock. Returns the variables for its flow."""
    project.write("pyproject.toml", UV.format(index=index))
    uv = Path(sys.prefix, "bin/uv")
    env = {**project.environment, "UV_CACHE_DIR": str(packages.cache / "uv")}
    env["UV_DEFAULT_INDEX"] = in_address(index)
    subprocess.run([uv, "lock"], cwd=project.directory, env=env, check=True)
    path = f"{uv.parent}:{project.environment['PATH']}"
    return {"PATH": path, "PIP_CONFIG_FILE": os.devnull}


@pytest.mark.parametrize("case", PASSWORDS)
def test_passwords_of_indexes_are_taken_from_where_uv_takes_them(
    project, packages, index, tmp_path, monkeypatch, case
):
    env = {**lock(project, packages, index), **PASSWORDS[case](index)}
    if "NETRC" in env:
        (tmp_path / "netrc").write_text(env["NETRC"])
        env["NETRC"] = str(tmp_path / "netrc")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(project.directory)
    version = ".".join(map(str, sys.version_info[:3]))
    found = uv.resolve_uv(UVEnvironment(None), "linux-64", version, sys.executable)
    assert PASSWORD not in json.dumps(found.lock) and USER not in json.dumps(found.lock)
    (tmp_path / "got").mkdir()
    found.download(tmp_path / "got")
    got = sorted(path.name.split("-")[0] for path in (tmp_path / "got/wheels").iterdir())
    assert got == ["pydash", "tomli", "typing_extensions"]


def test_an_index_that_uv_has_no_password_for_is_named(project, packages, index):
    env = lock(project, packages, index)
    project.write("flow.py", UV_FLOW)
    done = project.run("flow.py", "--environment=uv", "run", env=env)
    assert done.code != 0
    assert "127.0.0.1 answered 401" in done.output and "UV_INDEX_NAME_USERNAME" in done.output


def test_the_packages_of_uv_lock_without_the_development_ones(project, packages, index):
    env = {**lock(project, packages, index), **PASSWORDS["by the name of the index"](index)}
    project.write("flow.py", UV_FLOW)
    project.run("flow.py", "--environment=uv", "run", env=env).ok()
    file, executable, there = answer(project)
    assert file.startswith(INSIDE) and executable.startswith(INSIDE)
    assert there == [False, False, False]


@pytest.mark.sample(0.2)
def test_packages_of_uv_lock_are_for_the_python_on_which_they_are_installed(
    project, packages, index, daytona
):
    env = {**lock(project, packages, index), **PASSWORDS["by the name of the index"](index)}
    project.write("flow.py", UV_FLOW.replace("bubblewrap", "daytona"))
    project.environment |= daytona.environment
    project.run("flow.py", "--environment=uv", "run", env=env).ok()
    file, executable, _ = answer(project)
    assert file.startswith(executable.rpartition("/bin/")[0])


@pytest.mark.sample(0.08)
def test_a_backend_without_a_cache_of_its_own_gets_an_archive(project, shared_packages):
    body = WHICH.replace("import tomli", "import tomli, numpy")
    decorators = ['@sandbox(backend="remote-like", network=False)']
    decorators += [f'@conda(packages={{"tomli": "2.2.1", "numpy": "{channel.NUMPY}"}})']
    a_step(project, decorators, body, kind="conda").ok()
    assert answer(project)[1].startswith("/sandbox/inbox/environments/")


@pytest.mark.sample(0.08)
def test_an_image_and_packages_on_top_of_it(project, shared_packages, conda, tmp_path):
    root = images.root_file_system(tmp_path / "rootfs")
    # What conda packages may expect of any Linux.
    programs = [Path(sys.executable).resolve(), *(conda / "micromamba/lib").rglob("*.so")]
    for path in {path for program in programs for path in images.libraries(program)}:
        if path.parts[1] in ("lib", "lib64", "usr"):
            copy = root / "usr" / path.relative_to("/usr" if path.is_relative_to("/usr") else "/")
            shutil.copy(path, copy)
    (root / "etc/ssl/certs").mkdir(parents=True)
    shutil.copy("/etc/ssl/certs/ca-certificates.crt", root / "etc/ssl/certs")
    decorators = [f'@bubblewrap(image="{root}", network=False)']
    decorators += ['@conda(packages={"tomli": "2.2.1"})']
    body = WHICH + "; self.note = open('/opt/app/note').read()"
    a_step(project, decorators, body, kind="conda").ok()
    assert answer(project)[1].startswith(INSIDE)
    assert answer(project, "note") == "from the image"


def test_what_can_not_be_the_python_is_said_before_any_step(project, tmp_path):
    root = images.root_file_system(tmp_path / "rootfs")
    said = project.stopped(f'@bubblewrap(image="{root}", executable="/bin/cat")')
    assert "/bin/cat is no Python in the image" in said


def test_netflixs_environments_are_refused_with_what_to_do(project, tmp_path):
    wheel = ["--no-deps", "--dest", str(tmp_path), "metaflow-netflixext"]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *wheel], check=True)
    (found,) = tmp_path.glob("metaflow_netflixext-*.whl")
    with zipfile.ZipFile(found) as archive:
        archive.extractall(tmp_path / "netflix")
    env = {
        "PYTHONPATH": f"{tmp_path / 'netflix'}:{project.environment['PYTHONPATH']}",
        "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(tmp_path / "store"),
        "METAFLOW_CONDA_REMOTE_COMMANDS": '["bubblewrap"]',
    }
    done = a_step(project, ["@bubblewrap"], kind="conda", env=env)
    assert done.code != 0
    assert "netflixext" in done.output and "image=" in done.output
    assert "Task is starting" not in done.output and "Traceback" not in done.output


@pytest.mark.sample(0.08)
def test_cache_false_builds_for_one_run_alone(project, packages):
    decorators = ["@bubblewrap(cache=False)", '@conda(packages={"tomli": "2.2.1"})']
    for _ in range(2):
        done = a_step(project, decorators, WHICH, kind="conda").ok()
        assert "is built, once" in done.output
        assert packages.environments() == []


@pytest.mark.sample(0.5)
def test_what_was_kept_is_looked_at_with_the_steps_environment(project, packages):
    decorators = ['@bubblewrap(keep="on-failure")', '@conda(packages={"tomli": "2.2.1"})']
    done = a_step(project, decorators, "import tomli; 1 / 0", kind="conda")
    name = re.search(r"metaflow-sandbox shell (\S+)", done.output)[1]

    def shell():
        python = f"{INSIDE}*/bin/python -c 'import tomli; print(tomli.__name__)'"
        command = [*COMMAND, "shell", name, "sh", "-c", python]
        kept = subprocess.run(command, env=project.environment, capture_output=True, text=True)
        return kept.stdout + kept.stderr

    def clear():
        return subprocess.check_output([*COMMAND, "cache", "clear"], env=project.environment)

    assert shell() == "tomli\n"
    command = [*COMMAND, "shell", name, "sh", "-c", "echo inside; sleep 600"]
    with subprocess.Popen(command, env=project.environment, stdout=subprocess.PIPE) as looking:
        assert looking.stdout.readline() == b"inside\n"
        said = clear()
        looking.kill()
    assert b"is in use" in said
    assert shell() == "tomli\n"
    clear()
    assert "was removed from the cache" in shell()
    a_step(project, decorators, "import tomli; 1 / 0", kind="conda")
    assert shell() == "tomli\n"


@pytest.mark.sample(0.08)
def test_what_was_not_used_for_longest_goes_when_the_cache_is_full(project, packages):
    one = ["@bubblewrap", '@conda(packages={"tomli": "2.2.1"})']
    numpy = f'@conda(packages={{"tomli": "2.2.1", "numpy": "{channel.NUMPY}"}})'
    two = ["@bubblewrap", numpy]
    a_step(project, one, kind="conda").ok()
    a_step(project, two, kind="conda").ok()
    second, first = cached(packages)
    room = {"METAFLOW_SANDBOX_CACHE": str((second["bytes"] >> 20) + 10)}
    env = {**project.environment, **room}
    subprocess.run([*COMMAND, "gc"], env=env, check=True)
    assert packages.environments() == [second["key"]] != [first["key"]]
    done = a_step(project, one, kind="conda", env={"METAFLOW_SANDBOX_CACHE": "10"})
    assert done.code != 0
    assert "more than 10 MB" in done.output and "METAFLOW_SANDBOX_CACHE" in done.output
    assert packages.environments() == [second["key"]]


@pytest.mark.sample(0.08)
def test_large_compiled_packages(project, packages):
    """From pip's own index, as a user would have them."""
    wanted = {"numpy": channel.NUMPY, "pandas": "2.2.3", "pydantic": "2.9.2"}
    os.unlink(project.environment.pop("PIP_CONFIG_FILE"))
    body = "import numpy, pandas, pydantic; self.found = [pandas.__version__, pydantic.VERSION]"
    kept = {k: v for k, v in os.environ.items() if k.lower().startswith("pip_")}
    decorators = ["@bubblewrap(network=False)", f"@pypi(packages={wanted!r})"]
    a_step(project, decorators, body, env=kept).ok()
    assert answer(project) == ["2.2.3", "2.9.2"]
