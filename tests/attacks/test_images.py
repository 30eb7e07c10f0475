# ruff: noqa: E501 - scripts
"""Attacks by an image: by its layers when they are unpacked, by its files and by its Python.

Its Python is the first process inside, so a hostile one is all that the host talks to.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import tarfile
import warnings
from pathlib import Path

import anyio
import images
import pytest
from test_isolation import below_others, bubblewrap, end_all, left_of, places, with_token

from metaflow_sandbox.backends.base import Recipe, SandboxSpec
from metaflow_sandbox.backends.bubblewrap import Bubblewrap, image, policy
from metaflow_sandbox.backends.bubblewrap import sandbox as sandbox_module
from metaflow_sandbox.errors import SandboxError, SandboxGone

AS_ROOT = os.getuid() == 0


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return images.root_file_system(tmp_path_factory.mktemp("base") / "rootfs")


@pytest.fixture(scope="module")
def base_layer(base):
    return images.layer(tree=base)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def rootfs(base, tmp_path):
    """A root file system of the test's own; its files are those of the others."""
    return shutil.copytree(base, tmp_path / "rootfs", symlinks=True, copy_function=os.link)


@pytest.fixture
def victim(tmp_path):
    """A directory on the host, in which nothing may change."""
    made = tmp_path / "victim"
    made.mkdir()
    (made / "file").write_text("untouched")
    yield made
    assert [p.name for p in made.iterdir()] == ["file"]
    assert (made / "file").read_text() == "untouched"


def with_sandbox(name, function, prepare=True, **more):
    async def main():
        backend = Bubblewrap()
        if prepare:
            await backend.prepare(Recipe(str(name)))
        spec = SandboxSpec(image=str(name), disk=64, **{"network": False, **more})
        sandbox = await backend.create(spec)
        try:
            return await function(sandbox)
        finally:
            await sandbox.destroy()

    return anyio.run(main)


def run(name, *argv, **more):
    done = with_sandbox(name, lambda s: s.run(argv, timeout=60), **more)
    assert done.exit_code == 0, done
    return done.stdout.decode(errors="surrogateescape")


# --- layers


def escapes(victim):
    """Layers that write in a directory of the host's, for who unpacks them plainly."""
    up, down = "../" * 30, str(victim).lstrip("/")
    link, hard = images.link, tarfile.LNKTYPE
    return {
        "by dots": [(f"{up}{down}/planted", b"x")],
        "by an absolute path": [(f"/{down}/planted", b"x")],
        "by a link": [link("opt/l", f"/{down}"), ("opt/l/planted", b"x")],
        "by a link with dots": [link("opt/l", up + down), ("opt/l/planted", b"x")],
        "by a link to the root": [link("opt/l", "/"), (f"opt/l/{down}/planted", b"x")],
        "by two links": [link("opt/a", "/"), link("opt/b", f"a/{down}"), ("opt/b/planted", b"x")],
        "by a link to a file": [link("opt/l", f"/{down}/file"), ("opt/l", b"changed")],
        "by a whiteout": [link("opt/l", f"/{down}"), ("opt/l/.wh.file", b"")],
        "by an opaque mark": [link("opt/l", f"/{down}"), ("opt/l/.wh..wh..opq", b"")],
        "by the old root": [link("opt/l", f"/oldroot/{down}"), ("opt/l/planted", b"x")],
        "by a hard link": [link("opt/h", f"/{down}/file", hard), ("opt/h", b"changed")],
    }  # fmt: skip


#: Those that a plain extraction does as it is told; it knows no whiteouts and no old root.
PLAIN = ("by dots", "by an absolute path", "by a link", "by a link with dots",
         "by a link to the root", "by two links")  # fmt: skip


@pytest.mark.parametrize("attack", escapes(Path("/x")))
def test_a_layer_that_leads_out_stays_inside(tmp_path, base_layer, victim, attack):
    layer = images.layer(escapes(victim)[attack])
    if attack in PLAIN:
        control = tmp_path / "control"
        control.mkdir()
        with tarfile.open(fileobj=io.BytesIO(layer)) as archive:
            if hasattr(tarfile, "fully_trusted_filter"):
                archive.extraction_filter = staticmethod(tarfile.fully_trusted_filter)
            archive.extractall(control)
        assert (victim / "planted").exists()
        (victim / "planted").unlink()
    layout = images.layout(tmp_path / "oci", [base_layer, layer])
    try:
        root = image.root(prepared(layout)).path
    except image.BadImage as e:
        assert attack == "by a hard link"
        assert "which is not there" in str(e)
    else:
        assert (root / "usr/bin/python3").is_file()


def prepared(name):
    anyio.run(Bubblewrap().prepare, Recipe(str(name)))
    return str(name)


def test_a_hard_link_to_a_file_of_the_host_is_none(tmp_path, base_layer):
    for target in ("/etc/passwd", "../../../etc/passwd", "etc/passwd"):
        layer = images.layer([images.link("opt/stolen", target, tarfile.LNKTYPE)])
        layout = images.layout(tmp_path / "oci", [base_layer, layer])
        with pytest.raises(image.BadImage):
            prepared(layout)


def test_what_unpacks_sees_only_the_layers(tmp_path, base_layer, monkeypatch):
    """So that a fault of it would reach nothing."""
    seen, options = [], policy.options
    monkeypatch.setattr(
        policy, "options", lambda **k: seen.append((k, options(**k))) or seen[-1][1]
    )
    layout = images.layout(tmp_path / "oci", [base_layer])
    prepared(layout)
    (asked, unpacking), _ = seen
    assert set(asked["mounts"]) == {"/layers/0000", "/unpack"}
    assert set(asked["writable"]) == {"/rootfs"}
    written = [(o, place) for o, _, place in places(unpacking) if o in ("--bind", "--dev-bind")]
    assert written == [("--bind", "/rootfs")]
    assert below_others(unpacking) == []


NAMES = [b"line\nbreak", b"\x1b]0;title\x07", b"\xff\xfe", b"--bind", b"-", b" ", b"a'b\"c$(id)"]


def test_names_of_files_are_bytes(tmp_path, base_layer):
    entries = [(f"opt/names/{os.fsdecode(name)}", b"x") for name in NAMES]
    layout = images.layout(tmp_path / "oci", [base_layer, images.layer(entries)])
    script = "import os; print([n.hex() for n in sorted(os.listdir(b'/opt/names'))])"
    found = run(layout, "python3", "-I", "-S", "-c", script)
    assert found.strip() == str([n.hex() for n in sorted(NAMES)])


def test_an_error_carries_no_control_characters(tmp_path):
    entries = [images.link("\x1b[2Ja\nb", "\x1b[2J", tarfile.LNKTYPE)]
    layout = images.layout(tmp_path / "oci", [images.layer(entries)])
    with pytest.raises(image.BadImage) as caught:
        prepared(layout)
    assert not [c for c in str(caught.value) if not c.isprintable()]


# --- a root file system with links where mounts are made: CVE-2026-87766

PLACES = ("tmp", "sandbox", "run", "proc", "dev", "sys", "etc", "kept", "inbox")


def replace(path, make):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.is_symlink() or path.exists():
        path.unlink()
    make(path)


def test_bubblewrap_follows_links_of_an_image_that_it_mounts_in(rootfs, tmp_path):
    """The control: the line that everybody writes makes files on the host."""
    other = tmp_path / "other"
    other.mkdir()
    replace(rootfs / "inbox", lambda p: p.symlink_to(f"/oldroot{other}"))
    argv = [bubblewrap(), "--bind", rootfs, "/", "--dir", "/inbox/planted", "/usr/bin/true"]
    subprocess.run(argv, capture_output=True)
    if not (other / "planted").exists():
        warnings.warn("no control, since this bubblewrap follows no such link", stacklevel=1)


@pytest.mark.parametrize("prefix", ["/oldroot", "", "/newroot/../oldroot"])
def test_links_where_mounts_are_made_lead_nowhere(rootfs, tmp_path, victim, prefix):
    for name in PLACES:
        replace(rootfs / name, lambda p: p.symlink_to(f"{prefix}{victim}"))
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    (inputs / "file").write_text("an input")
    inputs.chmod(0o755)
    script = (
        f"import os; print([os.path.islink('/' + n) for n in {PLACES[:-1]}],"
        f" open('/inbox/sub/file').read(), os.path.exists({str(victim)!r}))"
    )
    argv = ("python3", "-I", "-S", "-c", script)
    said = run(rootfs, *argv, mounts={"/inbox/sub": inputs, "/kept": inputs}).strip()
    assert said.replace("True", "False") == said
    assert "an input" in said


@pytest.mark.parametrize("name", ["passwd", "group", "hosts", "resolv.conf"])
def test_files_that_are_ours_are_not_found_by_the_images_links(rootfs, victim, name):
    for make in (
        lambda p: p.symlink_to(f"/oldroot{victim}/file"),
        lambda p: p.symlink_to(f"/oldroot{victim}/planted"),
        lambda p: p.mkdir(),
        os.mkfifo,
    ):
        replace(rootfs / "etc" / name, make)
        if name != "resolv.conf":
            assert "sandbox" in run(rootfs, "cat", f"/etc/{name}", prepare=False)
        else:
            assert name not in run(rootfs, "ls", "/etc", prepare=False)


def test_links_of_a_root_to_the_host_are_links_inside(rootfs, victim):
    (rootfs / "home").symlink_to(victim.parent)
    (rootfs / "opt/out").symlink_to(victim)
    (rootfs / "root").symlink_to("/")
    (rootfs / "escape").symlink_to("/oldroot")
    (rootfs / "loop").symlink_to("loop")
    (rootfs / "file").write_text("x")
    os.mkfifo(rootfs / "fifo")
    assert (rootfs / "home/victim/file").exists()  # the control: followed, they lead there
    script = """
import os
print([os.readlink("/" + n) for n in ("home", "root", "escape", "loop")])
print([os.path.exists(p) for p in ("/home", "/opt/out/file", "/escape", "/root/oldroot", "/file", "/fifo")])
print(sorted(os.listdir("/root")) == sorted(os.listdir("/")))
"""
    said = run(rootfs, "python3", "-I", "-S", "-c", script).splitlines()
    assert said[0] == str([str(victim.parent), "/", "/oldroot", "loop"])
    assert said[1:] == [str([False] * 6), "True"]


def test_a_root_whose_programs_are_links_to_the_host_has_none(rootfs):
    replace(rootfs / "usr", lambda p: p.symlink_to("/usr"))
    (rootfs / "bin").unlink()
    (rootfs / "bin").symlink_to("/usr/bin")
    assert (rootfs / "usr/bin/python3").exists()
    with pytest.raises(image.BadImage, match="It needs a python3"):
        prepared(rootfs)


@pytest.mark.parametrize("name", [b"line\nbreak", b"\x1b[2J", b"--bind", b"\xff\xfe"])
def test_names_in_its_root_are_bytes(rootfs, name):
    os.mkdir(os.path.join(os.fsencode(rootfs), name))
    os.symlink(b"to" + name, os.path.join(os.fsencode(rootfs), b"link" + name))
    script = "import os; print([n.hex() for n in os.listdir(b'/')])"
    found = run(rootfs, "python3", "-I", "-S", "-c", script, prepare=False)
    assert repr(name.hex()) in found
    assert repr((b"link" + name).hex()) in found


def test_no_mount_point_lies_below_a_tree_of_an_image(rootfs, tmp_path, monkeypatch):
    seen, options = [], policy.options
    monkeypatch.setattr(policy, "options", lambda **k: seen.append(options(**k)) or seen[-1])
    (rootfs / "etc/ssl/certs").mkdir(parents=True)
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    inputs.chmod(0o755)
    run(rootfs, "true", prepare=False, mounts={"/inbox/sub": inputs})
    (made,) = seen
    bound = [place for option, _, place in places(made) if option == "--ro-bind"]
    assert {"/usr", "/opt", "/etc/ssl", "/etc/os-release"} <= set(bound)
    assert below_others(made) == []
    assert [o for o, _, _ in places(made) if o.startswith(("--bind", "--dev-bind"))] == []
    root = str(rootfs)
    assert not [s for _, s, place in places(made) if s in (root, "/") or place == "/"]


# --- a Python that is hostile

TOKEN = "hostile-python"
CONTROL = """
import array, json, os, socket, sys, time
control = socket.socket(fileno=int(sys.argv[-2]))
def send(data, *fds):
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    control.sendmsg([data], rights)
def request():
    data, rights, _, _ = control.recvmsg(60000, 1000)
    fds = array.array("i", rights[0][2]) if rights else []
    return (json.loads(data), list(fds)) if data else sys.exit()
"""


@pytest.fixture
def hostile(rootfs, request):
    """Makes the image's python3 a program of the test's."""
    token = f"{TOKEN}-{os.getpid()}-{abs(hash(request.node.name))}"

    def make(script):
        program = rootfs / "usr/bin/python3"
        program.rename(rootfs / "usr/bin" / token)
        program.write_text(f"#!/usr/bin/{token} -IS\n{CONTROL}{script}")
        program.chmod(0o755)
        return rootfs

    yield make
    assert left_of(token, 5) == []
    end_all(token)


@pytest.fixture
def deadline(monkeypatch):
    monkeypatch.setattr(sandbox_module, "_START_SECONDS", 1.5)


async def nothing(sandbox):
    return None


def failure(name, function=nothing, **more):
    with within(20), pytest.raises(SandboxError) as caught:
        with_sandbox(name, function, prepare=False, **more)
    return caught.value


@contextlib.contextmanager
def within(seconds):
    """Fails what takes too long, whatever the event loop does."""

    def late(*_):
        raise AssertionError(f"it takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


FACTS = """
status = dict(l.split(":\\t", 1) for l in open("/proc/self/status").read().splitlines())
def tried(f, *a):
    try: f(*a)
    except OSError as e: return e.strerror
    return "done"
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def called(name, *a): return getattr(libc, name)(*a) == 0
def opened():
    found = set()
    for n in range(1000):
        try: found.add(os.readlink(f"/proc/self/fd/{n}").split("[")[0].split(" ")[0])
        except OSError: pass
    return sorted(found)
facts = {
    "ids": status["Uid"].split() + status["Gid"].split() + status["Groups"].split(),
    "capabilities": [int(status["Cap" + n], 16) for n in ("Inh", "Prm", "Eff", "Bnd", "Amb")],
    "rights": [status["NoNewPrivs"], status["Seccomp"]],
    "written": [p for p in ("/usr/bin/id", "/etc/os-release", "/usr/new", "/new", "/run/box.py",
        "/etc/passwd", "/dev/new", "/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger")
        if tried(open, p, "a") == "done"],
    "read": [p for p in ("/proc/timer_list", "/proc/kmsg", "/proc/kcore") if tried(open, p) == "done"],
    "chmod": tried(os.chmod, "/usr/bin/id", 0o4777), "chown": tried(os.chown, "/tmp", 0, 0),
    "setuid": tried(os.setresuid, 0, 0, 0),
    "calls": [n for n, a in (("unshare", (0x10000000,)), ("unshare", (0x20000,)), ("chroot", (b"/tmp",)),
        ("umount2", (b"/usr", 2)), ("mount", (b"a", b"/tmp", b"tmpfs", 0, 0))) if called(n, *a)],
    "descriptors": opened(),
    "processes": [n for n in os.listdir("/proc") if n.isdigit()],
    "host": [p for p in sys.path + [HOST] if os.path.exists(p) and not p.startswith("/usr")],
    "connected": [tried(socket.create_connection, ("127.0.0.1", PORT), 1)],
    "environment": sorted(os.environ),
}
os.write(2, json.dumps(facts).encode()[:4096])
"""


@pytest.mark.parametrize("namespace", [False, True] if AS_ROOT else [False])
def test_an_images_python_is_as_confined_as_a_step(hostile, victim, namespace, monkeypatch):
    if namespace:
        ways = Bubblewrap._ways
        monkeypatch.setattr(
            Bubblewrap, "_ways", lambda b, s: (w for w in ways(b, s) if w.namespace)
        )
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()  # the control
        script = FACTS.replace("HOST", repr(str(victim))).replace("PORT", str(port))
        said = str(failure(hostile(script)))
    assert '{"ids"' in said, said
    seen, _ = json.JSONDecoder().raw_decode(said[said.index('{"ids"') :])
    assert set(seen["ids"]) == {"1000"}
    assert set(seen["capabilities"]) == {0}
    assert seen["rights"] == ["1", "2"]
    assert seen["written"] == []
    assert seen["read"] == []
    assert seen["chmod"] == "Read-only file system"
    assert seen["chown"] != "done"
    assert seen["setuid"] == "Operation not permitted" or seen["setuid"] == "Invalid argument"
    assert seen["calls"] == []
    assert set(seen["descriptors"]) <= {"/dev/null", "/memfd:errors", "socket:", "/run/box.py"}
    assert len(seen["processes"]) == 1
    assert seen["host"] == []
    assert seen["connected"] == ["Connection refused"]
    assert not {k for k in seen["environment"] if k.startswith(("AWS", "METAFLOW", "XDG"))}


ANSWERS = {
    "nothing": "time.sleep(60)",
    "nothing, and it ignores what ends it": (
        "import signal\nfor n in range(1, 30):\n try: signal.signal(n, signal.SIG_IGN)\n"
        " except OSError: pass\nwhile True: time.sleep(1)"
    ),
    "its end": "sys.exit(3)",
    "a closed socket": "control.close(); time.sleep(60)",
    "a crash": "os.write(2, b'something'); os.abort()",
    "an empty message": "send(b''); time.sleep(60)",
}  # fmt: skip


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.usefixtures("deadline")
def test_a_python_that_does_not_get_ready_is_an_error(hostile, answer):
    said = failure(hostile(ANSWERS[answer]))
    assert said.code in ("create_failed", "backend_unavailable")


FALSE_ANSWERS = {
    "something else": "send(b'hello'); time.sleep(60)",
    "bytes that are no text": "send(b'\\xff\\x1b[2J'); time.sleep(60)",
    "more than was asked": "send(b'ready and more'); time.sleep(60)",
    "a descriptor that nobody asked for": "send(b'ready', os.open('/dev/null', 0)); time.sleep(60)",
    "many descriptors": "send(b'ready', *[os.open('/dev/null', 0)] * 100); time.sleep(60)",
    "a socket that nobody asked for": (
        "s = socket.create_server(('127.0.0.1', 0)); send(b'ready', s.fileno()); time.sleep(60)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("answer", FALSE_ANSWERS)
@pytest.mark.usefixtures("deadline")
def test_a_python_that_answers_something_else_is_an_error(hostile, answer):
    before = len(os.listdir("/proc/self/fd"))
    said = failure(hostile(FALSE_ANSWERS[answer]))
    assert said.code in ("create_failed", "backend_unavailable")
    assert "\x1b" not in str(said)
    assert len(os.listdir("/proc/self/fd")) <= before


LISTENERS = {
    "no socket": "os.open('/dev/null', 0)",
    "none": None,
    "a socket that doesn't listen": "socket.socket().fileno()",
    "datagrams": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).fileno()",
    "a file's socket": "(s := socket.socket(socket.AF_UNIX), s.bind('/tmp/s'), s.listen(), s.fileno())[-1]",
    "a pipe": "os.pipe()[0]",
}  # fmt: skip


@pytest.mark.parametrize("listener", LISTENERS)
@pytest.mark.usefixtures("deadline")
def test_a_proxy_is_only_given_what_listens(hostile, listener):
    make = LISTENERS[listener]
    send = "send(b'ready')" if make is None else f"keep = {make}; send(b'ready', keep)"
    said = failure(hostile(f"import os\n{send}; time.sleep(60)"), network=["example.com"])
    assert said.code in ("create_failed", "backend_unavailable")


PROXY = """
import threading
server = socket.create_server(("127.0.0.1", 0))
send(b"ready", server.fileno())
client = socket.create_connection(server.getsockname(), 2)
client.sendall(b"CONNECT 127.0.0.1:1 HTTP/1.1\\r\\nHost: 127.0.0.1:1\\r\\n\\r\\n")
client.settimeout(2)
try: answer = client.recv(1000)
except OSError as e: answer = b""
request_, fds = request()
line = socket.socket(fileno=fds[0])
os.write(fds[1], answer or b"nobody answers")
os.close(fds[1]); os.close(fds[2])
line.send(b"0")
time.sleep(60)
"""


def test_a_python_that_opens_a_socket_by_itself_gets_no_proxy(hostile):
    """Without a network the host would carry what it sends to anywhere."""
    root = hostile(PROXY)
    try:
        said = with_sandbox(root, lambda s: s.run(["x"], timeout=10), prepare=False).stdout
    except SandboxError:
        return  # refused from the start
    assert said == b"nobody answers"


@pytest.mark.parametrize("sent", [b"\xff\xfe", b"memory\x1b[2J", b"x" * 5000, b"9" * 16])
def test_what_a_python_says_later_changes_nothing(hostile, sent):
    root = hostile(f"send(b'ready'); send({sent!r}); time.sleep(60)")

    async def look(sandbox):
        await anyio.sleep(0.2)
        return sandbox.diagnose()

    with within(20):
        assert with_sandbox(root, look, prepare=False) is None


@pytest.mark.parametrize("answer", [b"", b"-1", b"x", b"\xb2", b"1" * 20])
def test_a_result_that_is_no_number_is_the_end_of_the_sandbox(hostile, answer):
    script = f"""
send(b"ready")
_, fds = request()
line = socket.socket(fileno=fds[0])
line.send({answer!r}, 0)
time.sleep(60)
"""
    root = hostile(script)

    async def ask(sandbox):
        with anyio.fail_after(10):
            try:
                return await sandbox.exec(["true"])
            except SandboxGone:
                return None

    with within(20):
        code = with_sandbox(root, ask, prepare=False)
    assert code is None or 0 <= code <= 255


@pytest.mark.usefixtures("deadline")
def test_what_a_python_prints_is_shown_without_control_characters(hostile):
    said = str(failure(hostile("os.write(2, b'\\x1b[2Jhello\\x07\\0\\xff'); sys.exit(1)")))
    assert "hello" in said
    assert not [c for c in said if not c.isprintable() and c != "\n"]


def test_a_living_python_of_an_image_is_seen(hostile, request):
    """The control of what says that no process is left."""
    root = hostile("send(b'ready'); time.sleep(60)")
    token = next(p.name for p in (root / "usr/bin").iterdir() if p.name.startswith(TOKEN))

    async def look(sandbox):
        return with_token(token)

    assert with_sandbox(root, look, prepare=False)
