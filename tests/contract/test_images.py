# ruff: noqa: E501 - tables
"""`image=` of bubblewrap: root file systems and OCI layouts, what they give, and what is refused."""

import contextlib
import gzip
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import anyio
import images
import pytest

from metaflow_sandbox.backends.base import Recipe, SandboxSpec
from metaflow_sandbox.backends.bubblewrap import Bubblewrap, image, policy
from metaflow_sandbox.testing import BackendContract

AS_ROOT = os.getuid() == 0
MACHINE = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
OTHER = "arm64" if MACHINE == "amd64" else "amd64"
NOT_NEEDED = ("config-*", "ensurepip", "lib2to3", "pydoc_data", "tkinter", "distutils", "sqlite3")
MORE_PROGRAMS = ("touch", "head", "setsid", "chmod", "mkfifo", "echo")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A root file system, which nobody changes."""
    root = images.root_file_system(tmp_path_factory.mktemp("base") / "rootfs")
    for name in NOT_NEEDED:
        for path in (root / "usr/lib").glob(f"python3.*/{name}"):
            shutil.rmtree(path)
    for name in MORE_PROGRAMS:
        found = Path(shutil.which(name, path="/usr/bin:/bin")).resolve()
        shutil.copy(found, root / "usr/bin" / name)
        for library in images.libraries(found):
            copy = root / "usr" / library.relative_to("/usr" if library.parts[1] == "usr" else "/")
            if not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(library, copy)
    return root


@pytest.fixture(scope="module")
def base_layer(base):
    return images.layer(tree=base)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Where images are unpacked: what is above it is private, as a home directory may be."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield Path(os.environ["XDG_CACHE_HOME"], "metaflow-sandbox/images")
    del os.environ["XDG_CACHE_HOME"]
    if before is not None:
        os.environ["XDG_CACHE_HOME"] = before


def prepare(name):
    anyio.run(Bubblewrap().prepare, Recipe(str(name)))


def run(name, *argv, prepared=False, **more):
    """What a command in a sandbox made from an image prints."""

    async def main():
        backend = Bubblewrap()
        if not prepared:
            await backend.prepare(Recipe(str(name)))
        spec = SandboxSpec(image=str(name), disk=64, network=False, **more)
        sandbox = await backend.create(spec)
        try:
            return await sandbox.run(argv, timeout=60)
        finally:
            await sandbox.destroy()

    done = anyio.run(main)
    assert done.exit_code == 0, done
    return done.stdout.decode()


def python(name, script, **more):
    return run(name, "python3", "-I", "-S", "-c", script, **more)


def refusal(name):
    with pytest.raises(image.BadImage) as caught:
        prepare(name)
    assert caught.value.code == "bad_image"
    return str(caught.value)


@pytest.fixture
def unpacked_by_nothing(monkeypatch):
    """Fails a test in which anything of an image is run or unpacked."""

    async def start(*_):
        pytest.fail("a sandbox was made")

    monkeypatch.setattr(Bubblewrap, "_create", start)


# --- the contract


class OnAnImage(Bubblewrap):
    """Whose every sandbox is made from one image, so that the contract is tried on it."""

    python = "python3"

    async def create(self, spec):
        return await super().create(replace(spec, image=os.environ["IMAGE_OF_TESTS"]))


@pytest.mark.sample(0.4)
class TestOnAnImage(BackendContract):
    @pytest.fixture(scope="class")
    @classmethod
    def an_image(cls, base_layer, tmp_path_factory):
        layout = images.layout(tmp_path_factory.mktemp("contract") / "oci", [base_layer])
        prepare(layout)
        os.environ["IMAGE_OF_TESTS"] = str(layout)
        yield
        del os.environ["IMAGE_OF_TESTS"]

    @pytest.fixture
    def backend(self, an_image):
        return OnAnImage()


# --- what can be an image


def test_a_directory_is_an_image(base):
    assert run(base, "cat", "/opt/app/note") == "from the image"
    assert run(f"oci:{base}", "cat", "/opt/app/note") == "from the image"


@pytest.mark.parametrize("compress", [True, False], ids=["gzip", "plain"])
def test_a_layout_with_two_layers_is_an_image(tmp_path, base_layer, compress):
    note = images.layer([("opt/app/note", b"from above"), ("opt/.wh.app", b"")], compress=compress)
    below = base_layer if compress else gzip.decompress(base_layer)
    media = "tar+gzip" if compress else "tar"
    layout = images.layout(tmp_path / "oci", [below, note], media=media)
    assert run(f"oci:{layout}:latest", "cat", "/opt/app/note") == "from above"
    names = (layout, f"oci:{layout}", f"{layout}:latest")
    assert {image.parse(str(name)).digest for name in names} == {image.parse(str(layout)).digest}
    assert run(layout, "ls", "/opt/app") == "note\n"


def test_what_docker_saves_is_an_image(tmp_path, base_layer):
    layout = images.layout(tmp_path / "oci", [base_layer])
    manifest = the_manifest(layout)
    manifest["layers"][0]["mediaType"] = "application/vnd.docker.image.rootfs.diff.tar.gzip"
    put_manifest(layout, manifest)
    assert run(layout, "cat", "/opt/app/note") == "from the image"


def test_a_path_may_have_colons_and_be_relative(tmp_path, base, monkeypatch):
    layout = images.layout(tmp_path / "a:b", [images.layer(tree=base / "etc")])
    assert image.parse(str(layout)).digest == image.parse(f"{layout}:latest").digest
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rootfs").symlink_to(base)
    assert image.parse("rootfs") == base
    monkeypatch.setenv("HOME", str(tmp_path))
    assert image.parse("~/rootfs") == base


def the_manifest(layout):
    index = json.loads((layout / "index.json").read_text())
    digest = index["manifests"][0]["digest"].partition(":")[2]
    return json.loads((layout / "blobs/sha256" / digest).read_text())


def put_manifest(layout, manifest, **changes):
    index = json.loads((layout / "index.json").read_text())
    index["manifests"][0].update(images.blob(layout, json.dumps(manifest).encode()), **changes)
    put_index(layout, index["manifests"])


def put_index(layout, manifests):
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": manifests}))


def put_config(layout, config):
    manifest = the_manifest(layout)
    manifest["config"] = images.blob(layout, json.dumps(config).encode())
    put_manifest(layout, manifest)


def entries(layout):
    return json.loads((layout / "index.json").read_text())["manifests"]


@pytest.fixture
def small(tmp_path):
    """A layout with one small layer, which nobody needs to unpack."""
    return images.layout(tmp_path / "oci", [images.layer([("etc/x", b"x")])], ["A=1"])


def tagged(entry, tag):
    return {**entry, "annotations": {"org.opencontainers.image.ref.name": tag}}


def test_a_tag_chooses_and_two_need_one(small):
    images.layout(small, [images.layer([("etc/x", b"y")])])
    first, second = entries(small)[0], images.blob(small, json.dumps(the_manifest(small)).encode())
    second = {**second, "platform": first["platform"], "size": 1}
    manifest = {**the_manifest(small), "annotations": {"other": "manifest"}}
    second.update(images.blob(small, json.dumps(manifest).encode()))
    put_index(small, [tagged(first, "one"), tagged(second, "two")])
    assert image.parse(f"{small}:one").digest == first["digest"]
    assert image.parse(f"{small}:two").digest == second["digest"]
    said = refusal(small)
    assert f"image='{small}:" in said
    assert "'one', 'two'" in said
    assert "no image with the tag 'three'" in refusal(f"{small}:three")


def test_an_index_of_several_platforms_gives_the_one_of_this_machine(small):
    fitting = {**entries(small)[0], "platform": {"os": "linux", "architecture": MACHINE}}
    others = [
        {**fitting, "digest": "sha256:" + "0" * 64, "platform": described}
        for described in (
            {"os": "linux", "architecture": OTHER},
            {"os": "windows", "architecture": MACHINE},
            {"os": "unknown", "architecture": "unknown"},  # what buildx signs with
        )
    ]
    inner = {"schemaVersion": 2, "manifests": [*others, fitting]}
    entry = images.blob(small, json.dumps(inner).encode())
    put_index(small, [tagged(entry, "latest")])
    assert image.parse(f"{small}:latest").digest == fitting["digest"]
    inner["manifests"].pop()
    put_index(small, [images.blob(small, json.dumps(inner).encode())])
    said = refusal(small)
    assert f"no image for linux/{MACHINE}" in said
    assert f"--override-arch {MACHINE}" in said
    assert f"linux/{OTHER}" in said


# --- what is seen inside


def test_the_environment_is_the_images_but_not_what_is_ours(tmp_path, base_layer):
    given = ["PATH=/opt/app:/usr/bin", "GREETING=a = b\nc", "HOME=/root", "USER=root", "TMPDIR=/",
             "no name=x", "=x", "half", "X\0=1", "LD_AUDIT="]  # fmt: skip
    layout = images.layout(tmp_path / "oci", [base_layer], given)
    put_config(layout, {"config": {"Env": [*given, "HALF=\ud800", 7, None]}})
    found = json.loads(python(layout, "import json, os; print(json.dumps(dict(os.environ)))"))
    assert found["PATH"] == "/opt/app:/usr/bin"
    assert found["GREETING"] == "a = b\nc"
    assert (found["HOME"], found["USER"]) == ("/sandbox/home", "sandbox")
    assert found["TMPDIR"] == "/sandbox/tmp"
    assert not {"HALF", "half", "", "no name"} & found.keys()
    assert not {k for k in found if k.startswith(("XDG", "METAFLOW"))}


SURROUNDINGS = """
import json, os, pathlib, sys
status = dict(l.split(":\\t", 1) for l in open("/proc/self/status").read().splitlines())
def can(f, *a):
    try: f(*a); return True
    except OSError: return False
print(json.dumps({
    "root": sorted(os.listdir("/")), "etc": sorted(os.listdir("/etc")), "usr": sorted(os.listdir("/usr")),
    "prefix": sys.prefix, "capabilities": [status["Cap" + n] for n in ("Inh", "Prm", "Eff", "Bnd", "Amb")],
    "map": open("/proc/self/uid_map").read().split(), "uid": os.getuid(),
    "timers": can(open, "/proc/timer_list"), "kernel": can(open, "/proc/sys/kernel/core_pattern", "w"),
    "kmsg": can(open, "/proc/kmsg"), "host": os.path.exists(sys.argv[1]),
    "writes": [p for p in ("/", "/usr", "/etc", "/opt", "/run", "/dev", "/proc", "/sandbox", "/tmp")
               if can(open, p + "/planted", "w")],
    "owner": os.stat("/tmp").st_uid, "passwd": open("/etc/passwd").read(),
}))
"""  # fmt: skip


def test_nothing_of_the_host_is_there_and_the_user_is_nobody(tmp_path, base, base_layer):
    layout = images.layout(tmp_path / "oci", [base_layer])
    for name in (base, layout):
        script = SURROUNDINGS.replace("sys.argv[1]", repr(sys.prefix))
        seen = json.loads(python(name, script))
        assert set(seen["root"]) == {
            "bin", "lib", "lib64", "usr", "opt", "etc", "dev", "proc", "run", "sandbox", "tmp",
        }  # fmt: skip
        assert set(seen["etc"]) == {"group", "hosts", "os-release", "passwd"}
        assert seen["usr"] == sorted(os.listdir(base / "usr"))
        assert seen["prefix"] == "/usr"
        assert not seen["host"]
        assert {int(c, 16) for c in seen["capabilities"]} == {0}
        assert seen["uid"] == 1000
        assert seen["map"][0::2] == ["1000", "1"]
        assert not seen["timers"]
        assert not seen["kernel"]
        assert not seen["kmsg"]
        assert seen["writes"] == ["/sandbox", "/tmp"]


async def first_process(name, look, namespace=False):
    """What `look` says of a sandbox's first process, seen from here."""
    backend = Bubblewrap()
    ways = backend._ways
    if namespace:
        backend._ways = lambda spec: (w for w in ways(spec) if w.namespace)
    sandbox = await backend.create(SandboxSpec(image=str(name), disk=64, network=False))
    try:
        return look(Path("/proc", str(sandbox._init_pid)))
    finally:
        await sandbox.destroy()


def ids(process):
    status = dict(x.split(":\t", 1) for x in (process / "status").read_text().splitlines())
    return {int(n) for name in ("Uid", "Gid", "Groups") for n in status[name].split()}


NAMESPACES = [False, pytest.param(True, marks=pytest.mark.skipif(not AS_ROOT, reason="roots's"))]


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_to_the_host_its_first_process_is_not_root(base, namespace):
    """By the host's numbers: a map of users inside shows those of the namespace above it."""
    found = anyio.run(first_process, base, ids, namespace)
    assert 0 not in found
    if AS_ROOT:
        assert min(found) > 1 << 30
        assert 0 in ids(Path("/proc/self"))  # the control


@pytest.mark.skipif(not AS_ROOT, reason="this user's own files are what is looked at")
def test_what_is_unpacked_is_not_roots(tmp_path, base_layer):
    layout = images.layout(tmp_path / "oci", [base_layer])
    prepare(layout)
    found = list(image.root(str(layout)).path.rglob("*"))
    assert len(found) > 100
    assert not [p for p in found if p.lstat().st_uid == 0]


@pytest.mark.skipif(not AS_ROOT, reason="only root can")
def test_enter_binds_what_lies_below_the_place_where_it_binds(tmp_path):
    """A disk at /mnt with the image or the environment on it."""
    source = tmp_path / "place/below"
    source.mkdir(parents=True)
    (source / "file").write_text("there")
    (tmp_path / "place/program").write_text("x")
    tmp_path.chmod(0o711)
    config = {
        "uid": 61235, "processes": 100, "userns": None, "place": str(tmp_path / "place"),
        "binds": {str(source): "0", str(tmp_path / "place/program"): "1"},
        "argv": ["/bin/sh", "-c", "cd $0 && ls && cat 0/file && id -u", str(tmp_path / "place")],
    }  # fmt: skip
    for directory in tmp_path.parents:  # pytest's own are private
        if directory.stat().st_uid == 0 and directory.stat().st_mode & 0o007 == 0:
            config["argv"][2] = "cat /proc/self/mountinfo; id -u"
    config_file = os.memfd_create("config")
    os.write(config_file, json.dumps(config).encode())
    os.lseek(config_file, 0, os.SEEK_SET)
    enter = Path(image.__file__).with_name("enter.py")
    done = subprocess.run(
        [sys.executable, "-I", "-S", enter, str(config_file)],
        pass_fds=[config_file], capture_output=True, text=True,
    )  # fmt: skip
    os.close(config_file)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("61235\n")
    assert f"{tmp_path}/place/0" in done.stdout or "there" in done.stdout


def test_an_image_has_its_own_python_or_the_one_that_is_named(tmp_path, base_layer):
    backend = Bubblewrap()
    assert backend.interpreter(None) == sys.executable
    assert backend.interpreter("anything") == "python3"
    other = images.layer([images.link("opt/app/other", "/usr/bin/python3")])
    layout = images.layout(tmp_path / "oci", [base_layer, other])
    script = "import sys; print(sys.version_info[:2], sys.executable)"
    assert "/opt/app/other" in run(layout, "/opt/app/other", "-I", "-c", script)


# --- what layers may have


LAYERED = [
    ("opt/file", b"x"), ("opt/directory/file", b"x"), ("opt/hidden", b"x"), ("opt/all/old", b"x"),
    ("opt/gone/file", b"x"),
]  # fmt: skip


def special(name, kind):
    info = tarfile.TarInfo(name)
    info.type, info.mode = kind, 0o666
    return info, b""


def with_mode(name, mode, content=b"#!/bin/sh\necho ran\n"):
    info = tarfile.TarInfo(name)
    info.mode = mode
    return info, content


def test_layers_are_applied_as_their_format_says(tmp_path, base_layer):
    """Every case of it is in tests/unit/test_unpack.py; here the result is seen from inside."""
    above = [
        ("opt/file/now", b"a directory"), ("opt/directory", b"a file"), ("opt/.wh.hidden", b""),
        ("opt/all/new", b"n"), ("opt/all/.wh..wh..opq", b""), ("opt/.wh.gone", b""),
        ("lib/through/the/link", b"merged"), images.link("opt/same", "opt/all/new", tarfile.LNKTYPE),
        with_mode("opt/setuid", 0o4755), with_mode("opt/secret", 0o700), special("opt/fifo", tarfile.FIFOTYPE),
        special("opt/device", tarfile.CHRTYPE),
    ]  # fmt: skip
    layers = [base_layer, images.layer(LAYERED), images.layer(above)]
    layout = images.layout(tmp_path / "oci", layers)
    script = """
import json, os
def look(p):
    return sorted(os.listdir(p)) if os.path.isdir(p) else open(p).read()
print(json.dumps([look("/opt"), look("/opt/file"), look("/opt/directory"), look("/opt/all"),
    look("/usr/lib/through/the/link"), look("/opt/same"), oct(os.stat("/opt/setuid").st_mode),
    os.popen("/opt/secret").read(), os.readlink("/lib")]))
"""
    assert json.loads(python(layout, script)) == [
        ["all", "app", "directory", "file", "same", "secret", "setuid"], ["now"], "a file", ["new"],
        "merged", "n", "0o100755", "ran\n", "usr/lib",
    ]  # fmt: skip


# --- once


def spy(monkeypatch):
    """The labels of the sandboxes that are made."""
    seen, create = [], Bubblewrap._create

    async def noted(self, spec, writable):
        seen.append(spec.labels.get("purpose", "try"))
        return await create(self, spec, writable)

    monkeypatch.setattr(Bubblewrap, "_create", noted)
    return seen


def test_an_image_is_unpacked_once(tmp_path, base_layer, cache, monkeypatch):
    layout = images.layout(tmp_path / "oci", [base_layer], ["ONCE=1"])
    seen = spy(monkeypatch)
    prepare(layout)
    first = time.monotonic()
    prepare(layout)
    assert seen == ["unpack", "try", "try"]
    assert time.monotonic() - first < 5
    # By its content, wherever it is.
    moved = layout.rename(tmp_path / "elsewhere")
    prepare(moved)
    assert seen.count("unpack") == 1


def test_an_image_that_was_not_prepared_is_refused(small):
    with pytest.raises(image.BadImage, match="not unpacked"):
        anyio.run(Bubblewrap().create, SandboxSpec(image=str(small), disk=64))


PREPARE = """
import sys, time, anyio
from metaflow_sandbox.backends.base import Recipe
from metaflow_sandbox.backends.bubblewrap import Bubblewrap
class Spied(Bubblewrap):
    async def _create(self, spec, writable):
        print(spec.labels.get("purpose", "try"), flush=True)
        if "wait" in sys.argv and writable:
            await anyio.sleep(60)
        return await super()._create(spec, writable)
anyio.run(Spied().prepare, Recipe(sys.argv[1]))
"""


def preparing(layout, *more):
    argv = [sys.executable, "-c", PREPARE, str(layout), *more]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)


def left_over(cache):
    return [p.name for p in cache.iterdir() if p.name.startswith(".new-")]


def test_of_two_processes_one_unpacks(tmp_path, base_layer, cache):
    layout = images.layout(tmp_path / "oci", [base_layer], ["TWO=1"])
    running = [preparing(layout) for _ in range(2)]
    said = [p.communicate(timeout=60)[0].split() for p in running]
    assert [p.returncode for p in running] == [0, 0]
    assert sorted(said) == [["try"], ["unpack", "try"]]
    assert left_over(cache) == []


def test_a_prepare_that_is_killed_leaves_nothing_that_counts(tmp_path, base_layer, cache):
    layout = images.layout(tmp_path / "oci", [base_layer], ["KILLED=1"])
    with preparing(layout, "wait") as process:
        assert process.stdout.readline() == "unpack\n"
        # Who waits for it can be told to stop.
        started = time.monotonic()

        async def impatient():
            with anyio.move_on_after(0.3):
                await Bubblewrap().prepare(Recipe(str(layout)))

        anyio.run(impatient)
        assert time.monotonic() - started < 5
        process.send_signal(signal.SIGKILL)
    (left,) = left_over(cache)
    assert not image.parse(str(layout)).unpacked.exists()
    with pytest.raises(image.BadImage, match="not unpacked"):
        image.root(str(layout))
    prepare(layout)
    assert run(layout, "cat", "/opt/app/note", prepared=True) == "from the image"
    long_ago = time.time() - 100_000
    os.utime(cache / left, (long_ago, long_ago))
    images.layout(tmp_path / "next", [base_layer], ["NEXT=1"])
    prepare(tmp_path / "next")
    assert left_over(cache) == []


def test_a_prepare_that_fails_leaves_nothing(tmp_path, cache):
    bad = images.layer([images.link("a", "nothing", tarfile.LNKTYPE)])
    layout = images.layout(tmp_path / "oci", [bad])
    said = refusal(layout)
    assert str(layout) in said
    assert "No such file" in said
    assert left_over(cache) == []
    assert not image.parse(str(layout)).unpacked.exists()


def test_a_cache_that_can_not_be_written_is_named(small, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    said = refusal(small)
    assert "XDG_CACHE_HOME" in said
    assert str(small) in said


# --- what is refused before anything runs


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("python:3.12-slim", "skopeo copy docker://python:3.12-slim oci:image"),
        ("ghcr.io/some/thing:1", "skopeo copy docker://ghcr.io/some/thing:1 oci:image"),
        ("localhost:5000/thing", "docker://localhost:5000/thing oci"),
        ("docker://python:3.12", "docker://python:3.12 oci"),
        ("python@sha256:" + "0" * 64, "docker://python@sha256:"),
        ("/no/such/directory", "skopeo"),
        ("oci:/no/such/directory:tag", "skopeo"),
        ("/", "leave image= out"),
        ("/usr/..", "leave image= out"),
        ("a\0b", "can't be read"),
        ("~nosuchuser/image", "can't be read"),
        ("x" * 5000, "can't be read"),
        ("", ""),
        (":", ""),
        ("oci:", ""),
        ("\x1b[2Jx", "\\x1b"),
    ],
)
@pytest.mark.usefixtures("unpacked_by_nothing")
def test_what_is_not_there_is_refused_with_what_to_do(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = refusal(name)
    assert words.lower() in said.lower()
    assert repr(name) in said
    assert "\x1b" not in said.replace(name, "") or not words


@pytest.mark.usefixtures("unpacked_by_nothing")
def test_a_loop_of_links_and_a_pipe_are_no_image(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    refusal(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    refusal(tmp_path / "pipe")
    (tmp_path / "empty").mkdir()
    refusal(tmp_path / "empty")
    if not AS_ROOT:
        (tmp_path / "private/usr").mkdir(parents=True)
        (tmp_path / "private").chmod(0o111)
        assert "can't be read" in refusal(tmp_path / "private")


def blob_path(layout, described):
    return layout / "blobs/sha256" / described["digest"].partition(":")[2]


def blobs(layout):
    manifest = the_manifest(layout)
    return {
        "manifest": blob_path(layout, entries(layout)[0]),
        "config": blob_path(layout, manifest["config"]),
        "layer": blob_path(layout, manifest["layers"][0]),
    }


def flip(path):
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def replace_by(make):
    def damage(path):
        path.unlink()
        make(path)

    return damage


DAMAGE = {
    "missing": Path.unlink,
    "changed": flip,
    "empty": lambda p: p.write_bytes(b""),
    "a directory": replace_by(Path.mkdir),
    "a pipe": replace_by(os.mkfifo),
    "endless": replace_by(lambda p: p.symlink_to("/dev/zero")),
    "a loop": replace_by(lambda p: p.symlink_to(p)),
    "somebody's file": replace_by(lambda p: p.symlink_to("/etc/passwd")),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("which", ["manifest", "config", "layer", "index"])
@pytest.mark.usefixtures("unpacked_by_nothing")
def test_a_damaged_layout_is_refused(small, which, damage):
    path = {**blobs(small), "index": small / "index.json"}[which]
    if (which, damage) == ("index", "changed"):
        pytest.skip("an index has no digest")
    DAMAGE[damage](path)
    with deadline(10):
        said = refusal(small)
    assert str(small) in said
    assert path.name in said
    assert "skopeo copy" in said
    assert "root:" not in said


@contextlib.contextmanager
def deadline(seconds):
    def late(*_):
        raise TimeoutError(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ["tar+zstd", "tar+bzip2", "x", "", "zip"])
@pytest.mark.usefixtures("unpacked_by_nothing")
def test_a_layer_in_another_form_is_refused_with_the_command_that_converts_it(tmp_path, kind):
    layout = images.layout(tmp_path / "oci", [b"\x28\xb5\x2f\xfd"], media=kind)
    said = refusal(layout)
    assert "--dest-compress-format gzip" in said
    assert f"oci:{layout}" in said


@pytest.mark.usefixtures("unpacked_by_nothing")
def test_an_image_for_another_machine_is_refused(small):
    entry = entries(small)[0]
    put_index(small, [{**entry, "platform": {"os": "linux", "architecture": OTHER}}])
    assert f"it has 'linux/{OTHER}'" in refusal(small)
    # As skopeo leaves it: the index doesn't say, the configuration does.
    del entry["platform"]
    put_index(small, [entry])
    put_config(small, {"architecture": OTHER, "os": "linux"})
    assert f"--override-arch {MACHINE}" in refusal(small)


HUGE = b'{"manifests": [' + b" " * (5 << 20) + b"]}"
NO_JSON = {
    "huge": HUGE, "malformed": b"{", "deep": b"[" * 100_000, "text": b"hello", "bytes": b"\xff\xfe\x00",
    "digits": b'{"a": ' + b"9" * 100_000 + b"}", "a list": b"[]", "a number": b"1", "null": b"null",
    "nothing in it": b"{}", "no manifests": b'{"manifests": []}', "null manifests": b'{"manifests": null}',
    "a manifest": b'{"layers": [], "config": {}}',
}  # fmt: skip


@pytest.mark.parametrize("case", NO_JSON)
@pytest.mark.usefixtures("unpacked_by_nothing")
def test_json_that_is_none_is_refused(small, case):
    (small / "index.json").write_bytes(NO_JSON[case])
    assert str(small) in refusal(small)
    if case not in ("nothing in it", "no manifests", "null manifests", "a manifest"):
        entry = images.blob(small, NO_JSON[case])
        put_index(small, [entry])
        assert str(small) in refusal(small)


WRONG = [None, True, 1, 1.5, "text", [], {}, [1], ["x"], [[]], [None], [{}], {"a": 1}]


def changed(document, path, value):
    """A copy of a JSON document with one value in it replaced."""
    if not path:
        return value
    copy = list(document) if isinstance(document, list) else dict(document)
    copy[path[0]] = changed(document[path[0]], path[1:], value)
    return copy


def paths_of(document, path=()):
    yield path
    if isinstance(document, (dict, list)):
        keys = document if isinstance(document, dict) else range(len(document))
        for key in keys:
            yield from paths_of(document[key], (*path, key))


@pytest.mark.usefixtures("unpacked_by_nothing")
def test_any_value_of_another_type_is_refused_or_left_alone(small):
    """Never a TypeError, and a message each time; some values don't matter."""
    index = json.loads((small / "index.json").read_text())
    manifest = the_manifest(small)
    config = {"os": "linux", "architecture": MACHINE, "config": {"Env": ["A=1"]}}
    refused = 0
    documents = {"index": index, "manifest": manifest, "config": config}
    for which, document in documents.items():
        for path in [p for p in paths_of(document) if p or which == "index"]:
            for value in WRONG:
                (small / "index.json").write_text(json.dumps(index))
                damaged = changed(document, path, value)
                if which == "index":
                    (small / "index.json").write_text(json.dumps(damaged))
                elif which == "manifest":
                    put_manifest(small, damaged)
                else:
                    put_manifest(small, manifest)
                    put_config(small, damaged)
                try:
                    assert isinstance(image.parse(str(small)), image.Layout)
                except image.BadImage as e:
                    assert str(small) in str(e)
                    refused += 1
    assert refused > 150


@pytest.mark.parametrize(
    "digest",
    ["sha256:../../etc/passwd", "sha256:" + "0" * 63, "sha256:" + "0" * 64 + "\n", "sha256:/etc/passwd",
     "sha512:" + "0" * 128, "../../../etc/passwd", "sha256:" + "A" * 64, "", "sha256:", "\x1b[2J", 5],
)  # fmt: skip
@pytest.mark.usefixtures("unpacked_by_nothing")
def test_a_digest_is_never_a_path(small, digest):
    entry, manifest = entries(small)[0], the_manifest(small)
    put_index(small, [{**entry, "digest": digest}])
    said = refusal(small)
    for part in ("config", "layers"):
        bad = {"digest": digest, "mediaType": "tar"}
        put_index(small, [entry])
        put_manifest(small, {**manifest, part: [bad] if part == "layers" else bad})
        said += refusal(small)
    assert said.count("is not a sha256 digest") == 3
    assert "\x1b" not in said


@pytest.mark.usefixtures("unpacked_by_nothing")
def test_more_layers_than_an_image_has_are_refused(small):
    manifest = the_manifest(small)
    put_manifest(small, {**manifest, "layers": manifest["layers"] * 501})
    assert "501 layers" in refusal(small)
    put_manifest(small, {**manifest, "layers": manifest["layers"] * 500})
    assert len(image.parse(str(small)).layers) == 500


# --- what is found out by trying


def without_python(target, base, content=None):
    images_root = shutil.copytree(base, target, symlinks=True, copy_function=os.link)
    (images_root / "usr/bin/python3").unlink()
    if content is not None:
        (images_root / "usr/bin/python3").write_bytes(content)
        (images_root / "usr/bin/python3").chmod(0o755)
    return images_root


def elf_for(number):
    program = bytearray(images.PYTHON.read_bytes()[:4096])
    program[18:20] = number.to_bytes(2, "little")
    return bytes(program)


PYTHONS = {
    "none": None, "text": b"hello", "empty": b"", "another machine's": elf_for(0x15),
    "half a program": images.PYTHON.read_bytes()[:4096], "no interpreter": b"#!/no/such/file\n",
    "one that says nothing": b"#!/bin/sh\nexit 3\n", "one that fails": b"#!/bin/sh\necho broken >&2\nexit 1\n",
}  # fmt: skip


@pytest.mark.parametrize("case", PYTHONS)
def test_an_image_without_a_python_that_runs_is_refused(tmp_path, base, case):
    root = without_python(tmp_path / "rootfs", base, PYTHONS[case])
    said = refusal(root)
    assert repr(str(root)) in said
    assert "It needs a python3" in said
    if case == "one that fails":
        assert "broken" in said


def test_a_layer_that_is_no_archive_is_refused(tmp_path):
    for content in (b"x" * 1000, gzip.compress(b"x" * 1000), b""):
        layout = images.layout(tmp_path / "oci", [content])
        said = refusal(layout)
        assert str(layout) in said
        assert "could not be unpacked" in said
        assert "ReadError" in said


def test_etc_of_an_image_is_there_without_what_is_ours(tmp_path, base_layer):
    etc = [
        (f"etc/{name}", b"the image's")
        for name in ("passwd", "shadow", "hosts", "resolv.conf", "ssl/cert", "profile")
    ]
    layout = images.layout(tmp_path / "oci", [base_layer, images.layer(etc)])
    script = "import os; print(sorted(os.listdir('/etc')), [open('/etc/' + n).read() for n in ('passwd', 'profile', 'ssl/cert')])"
    said = python(layout, script)
    assert "['group', 'hosts', 'os-release', 'passwd', 'profile', 'ssl']" in said
    assert said.count("the image's") == 2
    assert policy._OWN_ETC[0] == "passwd"
