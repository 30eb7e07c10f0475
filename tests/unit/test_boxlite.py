"""boxlite's real parts that need no microVM, and what becomes of its errors."""

import base64
import hashlib
import http.server
import io
import json
import os
import re
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
from pathlib import Path

import anyio
import boxlite as sdk
import pytest

from metaflow_sandbox.backends import registry
from metaflow_sandbox.backends.base import SandboxSpec
from metaflow_sandbox.backends.boxlite import Boxlite, build, faults, images, operation, processes
from metaflow_sandbox.backends.boxlite.runtime import Runtime, cache
from metaflow_sandbox.backends.bubblewrap.program import candidates
from metaflow_sandbox.errors import BackendUnavailable, NotEnforceable, SandboxError, SandboxGone
from metaflow_sandbox.leases import Lease, base

pytestmark = pytest.mark.anyio
NAME, PASSWORD = "user", "a-password-that-is-secret"


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    for variable in ("XDG_CACHE_HOME", "TMPDIR", "DOCKER_CONFIG", "HOME"):
        path = tmp_path / variable.lower()
        path.mkdir()
        monkeypatch.setenv(variable, str(path))
    monkeypatch.setattr("tempfile.tempdir", None)


@pytest.fixture
def layout(tmp_path):
    return build.trial(tmp_path / "layout")


class Registry:
    """A registry on this machine with one image, which it shows to who has the password."""

    def __init__(self, layout, kind=None):
        (entry,) = json.loads((layout / "index.json").read_text())["manifests"]
        self.manifest = (layout / "blobs" / entry["digest"].replace(":", "/")).read_bytes()
        if kind is not None:
            self.manifest = kind(self.manifest)
        self.digest = "sha256:" + hashlib.sha256(self.manifest).hexdigest()
        self.requests = []
        registry, blobs = self, layout / "blobs"
        secret = base64.b64encode(f"{NAME}:{PASSWORD}".encode()).decode()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def answer(self, code, data=b"", kind="application/json", **headers):
                self.send_response(code)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(data)

            def do_GET(self):
                registry.requests.append(self.path)
                if self.headers.get("Authorization") != f"Basic {secret}":
                    self.answer(401, WWW_Authenticate='Basic realm="registry"')
                elif self.path == "/v2/":
                    self.answer(200, b"{}")
                elif self.path in (
                    "/v2/team/image/manifests/1",
                    f"/v2/team/image/manifests/{registry.digest}",
                ):
                    kind = json.loads(registry.manifest)["mediaType"]
                    self.answer(200, registry.manifest, kind, Docker_Content_Digest=registry.digest)
                elif re.match(r"/v2/team/image/blobs/sha256:[0-9a-f]{64}\Z", self.path):
                    blob = blobs / self.path.rpartition("/")[2].replace(":", "/")
                    self.answer(200, blob.read_bytes(), "application/octet-stream")
                else:
                    self.answer(404)

            do_HEAD = do_GET

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(layout):
    server = Registry(layout)
    yield server
    server.close()


def log_in(host, name=NAME, password=PASSWORD):
    auth = base64.b64encode(f"{name}:{password}".encode()).decode()
    config = {"auths": {host: {"auth": auth}}}
    Path(os.environ["DOCKER_CONFIG"], "config.json").write_text(json.dumps(config))


# --- a registry


async def test_an_image_comes_from_a_private_registry_with_dockers_credentials(server):
    log_in(server.host)
    layout = await images.bring(f"{server.host}/team/image:1")
    assert images.parse(str(layout)) == layout
    assert build.digest_of(layout)


async def test_an_image_is_brought_once_by_any_number_at_once_and_later_without_its_registry(
    server,
):
    log_in(server.host)
    found = []

    async def bring():
        found.append(await images.bring(f"{server.host}/team/image:1"))

    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(bring)
    assert len(set(found)) == 1
    blobs = [path for path in server.requests if "/blobs/" in path]
    assert len(blobs) == len(set(blobs)) == 2
    server.close()
    await bring()
    assert len(set(found)) == 1


async def test_two_processes_bring_an_image_once(server):
    log_in(server.host)
    script = (
        "import sys, anyio\nfrom metaflow_sandbox.backends.boxlite import images\n"
        "print(anyio.run(images.bring, sys.argv[1]))"
    )
    command = [sys.executable, "-c", script, f"{server.host}/team/image:1"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    said = {process.communicate()[0] for process in running}
    assert len(said) == 1
    assert [process.returncode for process in running] == [0, 0]
    blobs = [path for path in server.requests if "/blobs/" in path]
    assert len(blobs) == 2


async def test_an_image_in_dockers_own_format_becomes_a_layout(layout):
    def as_dockers(manifest):
        text = manifest.decode()
        for docker, oci in images._OCI.items():
            text = text.replace(oci, docker)
        return text.encode()

    server = Registry(layout, as_dockers)
    try:
        log_in(server.host)
        found = await images.bring(f"{server.host}/team/image:1")
    finally:
        server.close()
    digest = build.digest_of(found).replace(":", "/")
    assert "docker" not in (found / "blobs" / digest).read_text()


@pytest.mark.parametrize(
    ("tag", "password", "said"),
    [("1", "wrong", "docker login"), ("2", PASSWORD, "its name right")],
    ids=["refused", "missing"],
)
async def test_a_registry_that_refuses_is_explained(server, tag, password, said):
    log_in(server.host, password=password)
    with pytest.raises(faults.BadImage, match=said) as caught:
        await images.bring(f"{server.host}/team/image:{tag}")
    assert f"{server.host}/team/image:{tag}" in str(caught.value)
    assert password not in str(caught.value)
    assert not list(base().glob("pull-*"))


async def test_a_registry_that_is_not_there_is_explained():
    with pytest.raises(faults.BadImage, match="within reach"):
        await images.bring("127.0.0.1:9/team/image:1")


async def test_the_password_is_on_no_command_line_and_in_no_file_of_ours(server, tmp_path):
    log_in(server.host)
    await images.bring(f"{server.host}/team/image:1")
    for path in (cache(), base()):
        for file in path.rglob("*"):
            if file.is_file():
                assert PASSWORD.encode() not in file.read_bytes(), file


def helper(tmp_path, monkeypatch, script):
    program = tmp_path / "docker-credential-test"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


@pytest.mark.parametrize("key", ["credsStore", "credHelpers"])
def test_a_credential_helper_is_asked_by_its_input(key, tmp_path, monkeypatch):
    answer = json.dumps({"Username": "u", "Secret": "s"})
    script = f"read host; [ \"$host\" = a.example ] && [ $# = 1 ] && echo '{answer}'"
    helper(tmp_path, monkeypatch, script)
    value = "test" if key == "credsStore" else {"a.example": "test"}
    place = Path(os.environ["DOCKER_CONFIG"], "config.json")
    place.write_text(json.dumps({key: value}))
    assert images.credentials("a.example") == ("u", "s")
    assert images.credentials("b.example") is None


def test_a_token_that_boxlite_can_not_use_is_said(tmp_path, monkeypatch):
    answer = json.dumps({"Username": "<token>", "Secret": "s"})
    helper(tmp_path, monkeypatch, f"echo '{answer}'")
    place = Path(os.environ["DOCKER_CONFIG"], "config.json")
    place.write_text(json.dumps({"credsStore": "test"}))
    with pytest.raises(faults.BadImage, match="docker login -u"):
        images.credentials("a.example")


def test_docker_hub_has_names_of_its_own():
    log_in("https://index.docker.io/v1/")
    assert images.credentials("docker.io") == (NAME, PASSWORD)


# --- names


@pytest.mark.parametrize(
    ("image", "registry_", "name"),
    [
        ("python", "docker.io", "docker.io/library/python:latest"),
        ("python:3.12-slim", "docker.io", "docker.io/library/python:3.12-slim"),
        ("docker://a/b", "docker.io", "docker.io/a/b:latest"),
        ("localhost/b", "localhost", "localhost/b:latest"),
        ("r.example:5000/a/b:c", "r.example:5000", "r.example:5000/a/b:c"),
        ("ghcr.io/a/b@sha256:" + "0" * 64, "ghcr.io", "ghcr.io/a/b@sha256:" + "0" * 64),
    ],
)
def test_a_name_is_read_as_docker_reads_it(image, registry_, name):
    assert images.parse(image) == images.Reference(registry_, name)


@pytest.mark.parametrize("image", ["/no/such", "oci:none", "./x", "Upper", "a b", "a;b", "-x"])
def test_what_is_no_image_is_explained(image):
    with pytest.raises(faults.BadImage) as caught:
        images.parse(image)
    assert image in str(caught.value)
    assert "python:3.12-slim" in str(caught.value)


def test_a_layout_with_several_images_is_refused(layout):
    index = json.loads((layout / "index.json").read_text())
    (layout / "index.json").write_text(json.dumps({**index, "manifests": index["manifests"] * 2}))
    with pytest.raises(faults.BadImage, match="skopeo copy"):
        images.parse(str(layout))


def test_the_default_image_has_the_hosts_python():
    major, minor = sys.version_info[:2]
    assert (
        images.parse(Boxlite.default_image).name == f"docker.io/library/python:{major}.{minor}-slim"
    )


# --- boxlite itself


async def test_boxes_are_made_listed_and_removed_in_a_home_of_their_own(layout, tmp_path):
    runtime = Runtime(tmp_path / "home")
    try:
        box = await runtime.create(sdk.BoxOptions(rootfs_path=str(layout), memory_mib=128))
        assert [info.id for info in await runtime._boxlite.list_info()] == [box.id]
        with pytest.raises(sdk.InternalError) as caught:
            Runtime(tmp_path / "home")
        error = faults.translated(caught.value, "create", tmp_path / "home", "x")
        assert error.code == "home_locked"
        other = Runtime(tmp_path / "other")  # which is why each sandbox has its own
        await other.close()
        await runtime._boxlite.remove(box.id)
        assert await runtime._boxlite.list_info() == []
    finally:
        box = None
        await runtime.close()
    again = Runtime(tmp_path / "home")
    await again.close()


async def test_the_images_of_all_homes_are_one_directory(tmp_path):
    homes = [Runtime(tmp_path / name) for name in ("a", "b")]
    for runtime in homes:
        await runtime.close()
    assert os.path.realpath(tmp_path / "a" / "images") == os.path.realpath(
        tmp_path / "b" / "images"
    )
    assert not (tmp_path / "a" / "bases").is_symlink()


def test_the_trial_image_waits_and_needs_nothing(tmp_path):
    machine, code = build._WAIT["amd64"]
    program = tmp_path / "pause"
    program.write_bytes(build._executable(machine, bytes.fromhex(code)))
    program.chmod(0o755)
    if os.uname().machine != "x86_64":
        pytest.skip("the program for aarch64 was not run: this is another machine")
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([program], timeout=0.5)


# --- errors


CASES = [
    (
        sdk.UnsupportedError,
        "KVM is not available on this host.",
        BackendUnavailable,
        "boxlite can't",
    ),
    (sdk.EngineError, "The VM failed to start.", BackendUnavailable, "nested"),
    (sdk.EngineError, "timed out after 30s waiting", BackendUnavailable, "too busy"),
    (sdk.StorageError, "Failed to pull image", faults.BadImage, "docker login"),
    (sdk.StorageError, "No space left on device (os error 28)", SandboxError, "XDG_CACHE_HOME"),
    (sdk.InternalError, "spawn_failed: not found in $PATH", faults.BadImage, "python3"),
    (sdk.InternalError, "Failed to acquire runtime lock", SandboxError, "another process"),
    (sdk.ConfigError, "volume path", SandboxError, "ConfigError"),
]


@pytest.mark.parametrize(("kind", "text", "becomes", "said"), CASES)
def test_an_error_says_what_to_do(kind, text, becomes, said, tmp_path):
    error = faults.translated(kind(text), "create", tmp_path, "image:1")
    assert type(error) is becomes
    assert said in str(error)
    # Only a guest that may be ready next time is worth another try, which `start` makes.
    assert faults.starts_slowly(error) == ("timed out" in text)
    assert error.retryable is not True


@pytest.mark.parametrize(
    "kind", [sdk.StoppedError, sdk.NotFoundError, sdk.UpstreamUnavailableError]
)
def test_a_microvm_that_has_ended_is_gone(kind, tmp_path):
    error = faults.translated(kind("ended"), "exec", tmp_path, "image:1")
    assert type(error) is SandboxGone


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ('{"type":"signal","exit_code":159,"signal":"SIGSYS"}', "df, statvfs"),
        ('{"type":"signal","exit_code":137,"signal":"SIGKILL"}', "ended by SIGKILL"),
        ('{"type":"code","exit_code":0}', None),
        ("not JSON", None),
        ("[]", None),
    ],
)
def test_how_a_microvm_ended_is_read_from_what_boxlite_left(record, said, tmp_path):
    box = tmp_path / "boxes" / "one"
    box.mkdir(parents=True)
    (box / "exit.previous").write_text(record)
    found = faults.how_it_ended(tmp_path)
    assert found is None if said is None else said in found


def test_what_a_guest_said_is_shown_without_control_characters(tmp_path):
    logs = tmp_path / "boxes" / "x" / "logs"
    logs.mkdir(parents=True)
    (logs / "console.log").write_bytes(b"\x1b]0;title\x07 panic \xff")
    error = faults.translated(sdk.EngineError("The VM failed"), "create", tmp_path, "image:1")
    assert "panic" in str(error)
    assert "\x1b" not in str(error)


# --- what can be told before anything boots


def test_a_machine_without_kvm_learns_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(faults, "KVM", tmp_path / "kvm")
    with pytest.raises(BackendUnavailable) as caught:
        Boxlite().usable()
    for word in ("modprobe", "--device /dev/kvm", "nested", "@bubblewrap", "@docker", "@e2b"):
        assert word in str(caught.value)


def test_a_user_who_may_not_use_kvm_learns_what_to_do(monkeypatch):
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        os.chmod(directory, 0o755)
        kvm = Path(directory, "kvm")
        kvm.touch(mode=0o600 if os.getuid() == 0 else 0o000)
        monkeypatch.setattr(faults, "KVM", kvm)
        said, inside = os.pipe()
        if os.fork() == 0:
            try:
                if os.getuid() == 0:
                    os.setuid(65534)
                os.write(inside, (faults.no_machine() or "").encode())
            finally:
                os._exit(0)
        os.wait()
        os.close(inside)
        with os.fdopen(said) as text:
            assert "usermod -aG kvm" in text.read()


@pytest.mark.parametrize(
    ("platform", "machine", "said"),
    [
        ("darwin", "x86_64", "Apple silicon"),
        ("win32", "AMD64", "Linux and on Macs"),
        ("linux", "riscv64", "no riscv64"),
    ],
)
def test_a_machine_on_which_boxlite_does_not_run_is_named(platform, machine, said, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(faults.platform, "machine", lambda: machine)
    assert said in (faults.no_machine() or "")


def test_a_mac_tries_boxlite_then_docker(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert registry.local_order() == ("boxlite", "docker")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (SandboxSpec(cpu=0.5), "whole number"),
        (SandboxSpec(memory=64), "128 MB"),
        (SandboxSpec(gpu=1), "gpu"),
    ],
)
async def test_what_a_microvm_can_not_be_is_refused(spec, said):
    with pytest.raises(NotEnforceable, match=said):
        await Boxlite().create(spec)


# --- what others left


async def test_a_lease_whose_owner_was_killed_is_swept_with_its_process():
    script = (
        "import json, os, subprocess, sys, time\n"
        "from metaflow_sandbox.backends.boxlite import processes\n"
        "from metaflow_sandbox.backends.boxlite.sandbox import KIND\n"
        "from metaflow_sandbox.leases import Lease\n"
        "lease = Lease(KIND)\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "record = {'labels': {'a': 'b'}, 'process': processes.identity(child.pid),"
        " 'expires': time.time() + 600}\n"
        "(lease.path / 'record.json').write_text(json.dumps(record))\n"
        "print(child.pid, flush=True)\nsys.stdin.read()"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    identity = processes.identity(int(owner.stdout.readline()))
    assert [dict(info.labels) for info in await Boxlite().list({"a": "b"})] == [{"a": "b"}]
    Boxlite().sweep()
    assert processes.lives(identity)  # its owner lives, and its time is not over
    owner.kill()
    owner.wait()
    Boxlite().sweep()
    with anyio.fail_after(20):
        while processes.lives(identity):
            await anyio.sleep(0.02)
    assert not list(base().glob("vm-*"))


async def test_what_outlives_its_time_is_ended_by_whoever_looks():
    child = subprocess.Popen(["sleep", "600"])
    lease = Lease("vm")
    try:
        record = {"labels": {}, "process": processes.identity(child.pid), "expires": 1}
        (lease.path / "record.json").write_text(json.dumps(record))
        Boxlite().sweep()
        assert child.wait(20) == -9
    finally:
        lease.release()


def test_a_process_with_the_number_of_another_is_left_alone():
    mine = {**processes.identity(os.getpid()), "started": "1"}
    processes.end(mine)
    assert not processes.lives(mine)


def test_what_is_shared_is_private_to_the_user(layout, tmp_path):
    images.new_layout(cache() / "layouts" / "x").__enter__()
    assert stat.S_IMODE((cache() / "layouts").stat().st_mode) == 0o700


# --- what setup leaves


def test_what_setup_made_changed_or_removed_is_the_layer(tmp_path):
    """The two programs that a guest runs, here in a root file system made by bubblewrap."""
    before = "mkdir -p /etc/old /opt; cd /etc; echo a > kept; echo a > changed; echo a > gone"
    made = (
        "cd /etc; echo b > changed; rm gone; rm -r old; mkdir new; echo c > new/file; "
        "chmod 4755 new/file; ln -s file new/link; touch -d 2001-01-01 new/file; "
        "echo x > /inbox/not-this"
    )
    script = f"""
mkdir /inbox; {before}; echo a > /etc/old/file; sleep 0.05
python3 -c "$LIST" /tmp/listed && {{ {made}; }} && python3 -c "$PACK" /tmp/listed /inbox
"""
    tops = ("lib", "lib64", "bin", "sbin")
    mounts = [word for top in tops for word in ("--symlink", f"usr/{top}", f"/{top}")]
    done = subprocess.run(
        [next(candidates()), "--unshare-all", "--tmpfs", "/", "--ro-bind", "/usr", "/usr",
         *mounts, "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--clearenv",
         "--setenv", "PATH", "/usr/bin:/bin", "--setenv", "LIST", build._LIST,
         "--setenv", "PACK", build._PACK, "sh", "-euc", script],
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as layer:
        found = {member.name: member for member in layer if not member.isdir()}
        assert set(found) == {
            "etc/changed", "etc/new/file", "etc/new/link", "etc/.wh.gone", "etc/.wh.old",
        }  # fmt: skip
        assert layer.extractfile("etc/changed").read() == b"b\n"
        assert found["etc/new/file"].mode == 0o4755
        assert found["etc/new/link"].linkname == "file"


def test_a_layer_is_put_upon_those_of_its_image(layout, tmp_path):
    with images.new_layout(tmp_path / "made") as new:
        (new / "blobs" / "sha256" / ("0" * 64)).write_bytes(b"layer")
        build._describe(new, build.Layer("0" * 64, 5, "1" * 64), layout, {})
    made = tmp_path / "made"
    assert images.parse(str(made)) == made
    manifest = build._document(made, build.digest_of(made))
    config = build._document(made, manifest["config"]["digest"])
    assert len(manifest["layers"]) == len(config["rootfs"]["diff_ids"]) == 2
    assert manifest["layers"][-1]["digest"] == "sha256:" + "0" * 64
    assert config["config"]["Cmd"] == ["/pause"]
    for part in (manifest["config"], *manifest["layers"]):
        assert (made / "blobs" / part["digest"].replace(":", "/")).is_file()


@pytest.mark.anyio
async def test_an_error_of_boxlites_is_raised_by_itself():
    """In a group, nothing would say what it means."""

    class Life:
        async def over(self):
            await anyio.sleep_forever()

    async def call():
        raise sdk.BoxliteError("stopped")

    with pytest.raises(sdk.BoxliteError):
        await operation.unless_over(Life(), call)
