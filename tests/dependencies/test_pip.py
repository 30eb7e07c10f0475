"""pip resolves for the Python and the platform inside, whatever runs it."""

import os
import subprocess
import sys
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


@pytest.mark.parametrize("version", ["@ git+https://example.com/a", "@ https://example.com/a.zip"])
def test_source_by_address_is_refused_without_a_look_at_it(wheels, version):
    with pytest.raises(DependencyError, match="is source"):
        pypi.solve({"one": version}, "3.12.1", LINUX)


def test_pip_can_start_no_program(wheels):
    program = Path(pypi.__file__).with_name("pip_for.py")
    script = "import runpy, subprocess, sys; sys.argv = ['x', '{}', '--version']\n"
    script += f"try: runpy.run_path({str(program)!r}, run_name='__main__')\n"
    script += "except SystemExit: subprocess.run(['true'])"
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
