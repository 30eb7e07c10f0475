"""pip resolves for the Python and the platform inside, whatever runs it."""

import http.server
import json
import os
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import channel
import pytest

from metaflow_sandbox.environments import DependencyError, Package, pypi

LINUX, ARM = "linux-64", "linux-aarch64"


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A directory, the only one where pip looks."""
    directory = tmp_path / "wheels"
    directory.mkdir()
    settings = tmp_path / "pip.conf"
    settings.write_text(f"[global]\nno-index = true\nfind-links = {directory}\n")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(settings))
    return directory


def names(found):
    return sorted(item["url"].rsplit("/", 1)[-1].split("-")[0] for item in found)


CONDITIONS = {
    "for 3.10": ("3.10.4", LINUX, ["old", "one", "x86"]),
    "for 3.12": ("3.12.1", LINUX, ["new", "one", "x86"]),
    "for another processor": ("3.12.1", ARM, ["arm", "new", "one"]),
}


@pytest.mark.parametrize("case", CONDITIONS)
def test_conditions_of_dependencies_are_those_inside(wheels, case):
    conditions = [
        "old; python_version < '3.11'",
        "new; python_full_version >= '3.11'",
        "x86; platform_machine == 'x86_64'",
        "arm; platform_machine == 'aarch64'",
        "never; sys_platform == 'win32' or sys_platform == 'darwin'",
    ]
    channel.make_wheel(wheels, "one", "1", {}, conditions)
    for name in ("old", "new", "x86", "arm"):
        channel.make_wheel(wheels, name, "1", {})
    python, platform, expected = CONDITIONS[case]
    assert names(pypi.solve({"one": "1"}, python, platform)) == expected


@pytest.mark.parametrize(
    "tag",
    ["cp312-cp312-win_amd64", "cp312-cp312-manylinux_2_17_aarch64", "cp39-cp39-manylinux1_x86_64"],
)
def test_a_wheel_for_another_platform_is_none(wheels, tag):
    channel.make_wheel(wheels, "one", "1", {}, tag=tag)
    with pytest.raises(
        DependencyError, match=r"no wheel of one==1 for Python 3\.12\.1 on linux-64"
    ):
        pypi.solve({"one": "1"}, "3.12.1", LINUX)


def test_the_lock_has_the_hash_of_what_is_downloaded(wheels, tmp_path):
    path = channel.make_wheel(wheels, "one", "1", {"one.py": "x = 1\n"})
    (item,) = pypi.solve({"one": ">=1"}, "3.12.1", LINUX)
    package = Package(item["url"], item["sha256"])
    pypi.download((package,), "3.12.1", LINUX, tmp_path / "good")
    assert (tmp_path / "good" / path.name).read_bytes() == path.read_bytes()
    wrong = Package(item["url"], "0" * 64)
    with pytest.raises(DependencyError, match="(?i)hash"):
        pypi.download((wrong,), "3.12.1", LINUX, tmp_path / "bad")


INFO = "Metadata-Version: {}\nName: one\nVersion: 1\n"
PROJECT = '[project]\nname = "one"\nversion = "1"\n'
OLD_NEEDS = "b\n\n[:python_version < '3']\nc\n\n[more]\nd; python_version > '3'\n"
SAID = {
    "in PKG-INFO": ({"PKG-INFO": INFO.format("2.2") + "Requires-Dist: b\n"}, ["b", "one"]),
    "nothing, in PKG-INFO that is final": (
        {"PKG-INFO": INFO.format("2.2"), "one.egg-info/requires.txt": "b"},
        ["one"],
    ),
    "in pyproject.toml": (
        {
            "PKG-INFO": INFO.format("2.2") + "Dynamic: Requires-Dist\n",
            "pyproject.toml": PROJECT
            + "dependencies = ['b']\n[project.optional-dependencies]\nmore = ['d']",
        },
        ["b", "d", "one"],
    ),
    "in pyproject.toml alone": ({"pyproject.toml": PROJECT + "dependencies = ['b']"}, ["b", "one"]),
    "beside an old PKG-INFO": (
        {"PKG-INFO": INFO.format("1.1"), "src/one.egg-info/requires.txt": OLD_NEEDS},
        ["b", "d", "one"],
    ),
}
RUNS = "import pathlib, sys; pathlib.Path({marker!r}).touch(); sys.exit(1)"


@pytest.mark.parametrize("case", SAID)
def test_what_source_needs_is_read_and_it_is_not_run(wheels, tmp_path, case):
    files, expected = SAID[case]
    for name in "bcd":
        channel.make_wheel(wheels, name, "1", {})
    marker = tmp_path / "marker"
    setup = {"setup.py": RUNS.format(marker=str(marker))}
    source = channel.make_source(wheels, "one", "1", {**setup, **files})
    found = pypi.solve({"one[more]": "1"}, "3.12.1", LINUX)
    assert names(found) == expected
    (item,) = [item for item in found if item["require_build"]]
    assert item["build"] == ["setuptools>=40.8.0", "wheel"]
    pypi.download((Package(item["url"], item["sha256"]),), "3.12.1", LINUX, tmp_path / "got")
    assert (tmp_path / "got" / source.name).read_bytes() == source.read_bytes()
    assert not marker.exists()


def test_a_wheel_is_taken_rather_than_newer_source(wheels):
    channel.make_wheel(wheels, "one", "1", {})
    channel.make_source(wheels, "one", "2", {"PKG-INFO": INFO.format("2.2")})
    (item,) = pypi.solve({"one": ">=1"}, "3.12.1", LINUX)
    assert item["url"].endswith("one-1-py3-none-any.whl")


def link(name, target):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, str(target)
    return member


UNREADABLE = {
    "no version but by running it": (
        {"pyproject.toml": '[project]\nname = "one"\ndynamic = ["version"]'},
        "must be run|what it needs can't be read",
    ),
    "options for pip": (
        {
            "PKG-INFO": INFO.format("2.2"),
            "pyproject.toml": '[build-system]\nrequires = ["--index-url=https://example.com"]',
        },
        "what it needs can't be read",
    ),
    "a huge description": ({"PKG-INFO": " " * (5 << 20)}, "larger than 4 MB"),
    "a package from Git": (
        {"PKG-INFO": INFO.format("2.2") + "Requires-Dist: b @ git+https://example.com/b\n"},
        "from a repository",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_source_that_can_not_be_read_is_refused(wheels, case):
    files, said = UNREADABLE[case]
    channel.make_source(wheels, "one", "1", files)
    with pytest.raises(DependencyError, match=said):
        pypi.solve({"one": "1"}, "3.12.1", LINUX)


def test_an_archive_of_source_writes_nowhere_else(wheels, tmp_path):
    files = {"PKG-INFO": INFO.format("2.2"), "one.egg-info/requires.txt": "planted"}
    outside = tmp_path / "outside"
    outside.mkdir()
    members = [link("one-1/one.egg-info", outside), link("one-1/PKG-INFO", outside / "PKG-INFO")]
    source = channel.make_source(wheels, "one", "1", files, members)
    assert len(pypi.solve({"one": "1"}, "3.12.1", LINUX)) == 1
    assert list(outside.iterdir()) == []
    with tarfile.open(source) as archive:  # the control
        archive.extractall(tmp_path / "control", filter="fully_trusted")
    assert list(outside.iterdir()) != []


@pytest.mark.parametrize("version", ["@ git+https://example.com/a", "@ https://example.com/a"])
def test_a_repository_is_refused_without_a_look_at_it(wheels, version):
    with pytest.raises(DependencyError, match=r"is no file.*archive/COMMIT\.zip"):
        pypi.solve({"one": version}, "3.12.1", LINUX)


def test_a_pip_that_would_run_source_anyway_is_stopped(wheels, tmp_path):
    """Should pip one day ask source in another way than `pip_for.py` knows."""
    marker = tmp_path / "marker"
    channel.make_source(wheels, "one", "1", {"setup.py": RUNS.format(marker=str(marker))})
    told = {"markers": {}, "sources": None}
    program = Path(pypi.__file__).with_name("pip_for.py")
    words = ["download", "--no-deps", f"--dest={tmp_path}", "--no-index", f"--find-links={wheels}"]
    command = [sys.executable, "-I", str(program), json.dumps(told), *words, "one"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "would run here" in done.stderr
    assert not marker.exists()


def test_pip_can_start_no_program(wheels):
    program = Path(pypi.__file__).with_name("pip_for.py")
    script = f"""import runpy, subprocess, sys
sys.argv = ['x', '{{"markers": {{}}}}', '--version']
try: runpy.run_path({str(program)!r}, run_name='__main__')
except SystemExit: subprocess.run(['true'])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "PermissionError" in done.stderr and "only there as source" in done.stderr


def test_passwords_of_pips_configuration_are_on_no_command_line(wheels, monkeypatch, tmp_path):
    secret = "https://user:secret@localhost:1/simple"
    (tmp_path / "pip.conf").write_text(
        f"[global]\nindex-url = {secret}\nretries = 0\nfind-links = {wheels}\n    /b\n"
    )
    assert pypi._sources()["PIP_INDEX_URL"] == secret
    assert pypi._sources()["PIP_FIND_LINKS"] == f"{wheels} /b"
    started = []

    def run(command, *arguments, **options):
        started.append(" ".join(map(str, command)))
        return original(command, *arguments, **options)

    original = subprocess.run
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(DependencyError) as failed:
        pypi.solve({"one": "1"}, "3.12.1", LINUX)
    assert started and not any("secret" in command for command in started)
    assert "secret" not in str(failed.value)


def test_two_sources_may_be_built_with_two_versions_of_the_same(wheels, tmp_path):
    for number in ("1", "2"):
        channel.make_wheel(wheels, "builder", number, {})
        needs = f'[build-system]\nrequires = ["builder=={number}"]\nbuild-backend = "builder"\n'
        described = f"Metadata-Version: 2.2\nName: made{number}\nVersion: 1\n"
        files = {"PKG-INFO": described, "pyproject.toml": needs}
        channel.make_source(wheels, f"made{number}", "1", files)
    items = pypi.solve({"made1": "1", "made2": "1"}, "3.12.1", LINUX)
    build = pypi.solve_build(items, "3.12.1", LINUX)
    packages = tuple(Package(item["url"], item["sha256"]) for item in build)
    pypi.download(packages, "3.12.1", LINUX, tmp_path / "build")
    there = sorted(path.name.split("-")[:2] for path in (tmp_path / "build").iterdir())
    assert there == [["builder", "1"], ["builder", "2"]]


@pytest.mark.parametrize("ending", [".whl", ".tar.gz"])
def test_an_address_may_end_in_a_query(ending):
    pypi.refuse_git(f"https://example.org/one-1{ending}?token=x#sha256=00")
    assert pypi.is_source(f"https://example.org/one-1{ending}?token=x") == (ending != ".whl")


ADDRESS = "https://me:token@example.org/"


@pytest.mark.parametrize("version", [f"@ {ADDRESS}one-1-py3-none-any.whl", "1"])
def test_a_password_that_no_lock_keeps_is_refused_with_where_it_belongs(
    wheels, monkeypatch, version
):
    if version == "1":
        monkeypatch.setenv("PIP_FIND_LINKS", ADDRESS)
    with pytest.raises(DependencyError, match="netrc") as refused:
        pypi.solve({"one": version}, "3.12.1", LINUX)
    assert "example.org" in str(refused.value) and "token@" not in str(refused.value)


@pytest.mark.parametrize("status", [401, 403])
def test_an_index_that_wants_another_password_is_named(wheels, monkeypatch, status):
    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(status)

        def log_message(self, *_):
            pass

    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://me:wrong-password@127.0.0.1:{server.server_port}/simple"
        monkeypatch.setenv("PIP_INDEX_URL", url)
        with pytest.raises(DependencyError, match=f"127.0.0.1 answered {status}") as refused:
            pypi.solve({"one": "1"}, "3.12.1", LINUX)
        server.shutdown()
    assert "wrong-password" not in str(refused.value)
