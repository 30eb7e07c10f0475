"""The tests behind `BackendContract`."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import socket
import subprocess
import sys
import tarfile
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import anyio
import pytest

from ..backends.base import Backend, Recipe, Sandbox, SandboxSpec, network_kind
from ..errors import ConnectionLost, NotEnforceable, SandboxError, SandboxGone

BIG = 32 << 20
_HERE = Path(__file__).parent


def small(
    backend: Backend, labels: Mapping[str, str] | None = None, *, disk: int = 64, **more: Any
) -> SandboxSpec:
    """A sandbox that costs this machine little, where that can be asked for."""
    space = disk if backend.limits().disk else None
    return SandboxSpec(labels=labels or {}, disk=space, **more)


class BackendContract:
    """Subclass it, and override `backend`.

    Attributes:
        cpu, memory, disk: small amounts (MB) that sandboxes are limited to in tests of limits.
            Where a provider has larger units, these are the smallest that it has.
    """

    pytestmark = pytest.mark.anyio
    cpu: float = 0.3
    memory: int = 256
    disk: int = 64

    @pytest.fixture
    def anyio_backend(self) -> str:
        return "asyncio"

    @pytest.fixture
    def backend(self) -> Backend:
        raise NotImplementedError("a contract test overrides the fixture `backend`")

    @pytest.fixture
    async def sandbox(self, backend: Backend) -> AsyncIterator[Sandbox]:
        async with self.made(backend) as sandbox:
            yield sandbox

    @contextlib.asynccontextmanager
    async def made(
        self, backend: Backend, spec: SandboxSpec | None = None
    ) -> AsyncIterator[Sandbox]:
        sandbox = await backend.create(spec or small(backend, disk=256))
        try:
            yield sandbox
        finally:
            await sandbox.destroy()

    async def python(self, sandbox: Sandbox, script: str, *args: str) -> tuple[int, bytes, bytes]:
        """Runs a script in the sandbox's Python: (exit code, stdout, stderr)."""
        done = await sandbox.run([sandbox.backend.python, "-I", "-c", script, *args])
        return done.exit_code, done.stdout, done.stderr

    # --- lifecycle

    async def test_preflight_names_the_provider(self, backend: Backend) -> None:
        assert (await backend.preflight()).provider

    async def test_the_work_directory_is_empty_and_writable(self, sandbox: Sandbox) -> None:
        script = "import os, sys; print(os.listdir(sys.argv[1])); open(sys.argv[1] + '/x', 'w')"
        code, out, err = await self.python(sandbox, script, sandbox.backend.work)
        assert (code, out.strip(), err) == (0, b"[]", b"")

    async def test_destroy_may_be_called_twice(self, backend: Backend) -> None:
        sandbox = await backend.create(small(backend, disk=256))
        await sandbox.destroy()
        await sandbox.destroy()
        await backend.destroy(sandbox.id)
        await backend.destroy("no-such-sandbox")

    async def test_a_destroyed_sandbox_says_that_it_is_gone(self, backend: Backend) -> None:
        sandbox = await backend.create(small(backend, disk=256))
        await sandbox.destroy()
        with pytest.raises(SandboxGone):
            await sandbox.run(["true"])

    async def test_sandboxes_are_found_by_their_labels_and_destroyed_by_their_id(
        self, backend: Backend
    ) -> None:
        labels = {"metaflow-run": uuid.uuid4().hex, "metaflow-step": "a"}
        async with self.made(backend, small(backend, labels=labels, disk=256)) as sandbox:
            found = await backend.list({"metaflow-run": labels["metaflow-run"]})
            assert [(info.id, dict(info.labels)) for info in found] == [(sandbox.id, labels)]
            assert not await backend.list({**labels, "metaflow-step": "b"})
            await backend.destroy(sandbox.id)
            with pytest.raises(SandboxGone):
                await sandbox.run(["true"])
        assert not await backend.list(labels)

    async def test_a_sandbox_that_is_destroyed_while_it_works_is_gone(
        self, backend: Backend
    ) -> None:
        async with self.made(backend) as sandbox:

            async def destroy() -> None:
                await anyio.sleep(0.3)
                await backend.destroy(sandbox.id)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(destroy)
                with pytest.raises(SandboxGone):
                    await sandbox.run(["sleep", "60"])

    async def test_a_sandbox_ends_with_its_lifetime(self, backend: Backend) -> None:
        labels = {"metaflow-run": uuid.uuid4().hex}
        async with self.made(backend, small(backend, labels, lifetime=3, disk=64)) as sandbox:
            with anyio.fail_after(120), pytest.raises((SandboxGone, ConnectionLost)):
                # What ignores signals ends too.
                await sandbox.run(["sh", "-c", "trap '' TERM ALRM; sleep 90; sleep 90"])

    @pytest.mark.parametrize("milliseconds", [1, 10, 30, 100])
    async def test_a_creation_that_is_cancelled_leaves_nothing(
        self, backend: Backend, milliseconds: int
    ) -> None:
        labels = {"metaflow-run": uuid.uuid4().hex}
        with anyio.move_on_after(milliseconds / 1000):
            sandbox = await backend.create(small(backend, labels, disk=64))
            await sandbox.destroy()
        assert await backend.list(labels) == []

    async def test_two_sandboxes_see_nothing_of_each_other(self, backend: Backend) -> None:
        async with self.made(backend) as one, self.made(backend) as other:
            path = f"{backend.work}/mine"
            await one.write_bytes(path, b"1")
            with pytest.raises(FileNotFoundError):
                await other.read_bytes(path, 100)

    async def test_two_processes_make_sandboxes_at_once(self, backend: Backend) -> None:
        script = _HERE / "one_sandbox.py"
        name = f"{type(backend).__module__}:{type(backend).__qualname__}"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        running = [
            subprocess.Popen(
                [sys.executable, str(script), name], stdout=subprocess.PIPE, env=environment
            )
            for _ in range(2)
        ]
        assert [p.communicate(timeout=120)[0] for p in running] == [b"ok\n", b"ok\n"]

    # --- commands

    @pytest.mark.parametrize("code", [0, 1, 7, 202, 255])
    async def test_an_exit_code_is_a_result(self, sandbox: Sandbox, code: int) -> None:
        assert (await sandbox.run(["sh", "-c", f"exit {code}"])).exit_code == code

    @pytest.mark.parametrize("number", [9, 11, 15])
    async def test_a_signal_is_128_and_its_number(self, sandbox: Sandbox, number: int) -> None:
        assert (await sandbox.run(["sh", "-c", f"kill -{number} $$"])).exit_code == 128 + number

    async def test_a_command_that_is_not_there_exits_with_127(self, sandbox: Sandbox) -> None:
        assert (await sandbox.run(["no-such-command"])).exit_code == 127

    @pytest.mark.parametrize(
        "argument",
        [
            "",
            " ",
            "a b",
            "'",
            '"',
            "$HOME",
            "`id`",
            "\\",
            "a\nb",
            "*",
            "--",
            "-n",
            "ü€𝄞",
            ";&|<>()",
        ],
    )
    async def test_arguments_arrive_as_they_are(self, sandbox: Sandbox, argument: str) -> None:
        script = "import os, sys; sys.stdout.buffer.write(os.fsencode(sys.argv[1]))"
        assert (await self.python(sandbox, script, argument))[1] == argument.encode()

    async def test_a_command_has_no_input(self, sandbox: Sandbox) -> None:
        with anyio.fail_after(20):
            assert await self.python(sandbox, "print(repr(input()))") != (0, b"", b"")
            assert (await sandbox.run(["cat"])).exit_code == 0

    async def test_a_directory_that_is_not_there_fails_the_command(self, sandbox: Sandbox) -> None:
        assert await sandbox.exec(["true"], cwd="/no/such/directory") != 0

    async def test_arguments_may_be_long(self, sandbox: Sandbox) -> None:
        script = "import sys; print(len(sys.argv[1]))"
        assert (await self.python(sandbox, script, "x" * 32_000))[1] == b"32000\n"

    async def test_commands_run_side_by_side(self, sandbox: Sandbox) -> None:
        wait = "until [ -e $0 ]; do sleep 0.05; done; touch $1"
        work = sandbox.backend.work
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(sandbox.run, ["sh", "-c", wait, f"{work}/b", f"{work}/c"])
                await sandbox.run(["touch", f"{work}/b"])
                await sandbox.run(["sh", "-c", wait, f"{work}/c", f"{work}/d"])

    async def test_variables_are_added_and_the_directory_is_used(self, sandbox: Sandbox) -> None:
        out = bytearray()

        async def keep(data: bytes) -> None:
            out.extend(data)

        argv = ["sh", "-c", 'echo "$A|$PATH|$PWD"']
        await sandbox.exec(argv, env={"A": "x y"}, cwd="/usr", on_stdout=keep)
        value, path, directory = bytes(out).decode().strip().split("|")
        assert (value, directory) == ("x y", "/usr")
        assert path

    async def test_streams_are_apart_and_carry_any_byte(self, sandbox: Sandbox) -> None:
        script = (
            "import sys; b = bytes(range(256)) * 10; "
            "sys.stdout.buffer.write(b); sys.stderr.buffer.write(b[::-1])"
        )
        data = bytes(range(256)) * 10
        assert await self.python(sandbox, script) == (0, data, data[::-1])

    async def test_output_comes_while_the_command_runs(self, sandbox: Sandbox) -> None:
        seen = anyio.Event()

        async def see(_: bytes) -> None:
            seen.set()

        async with anyio.create_task_group() as tasks:

            async def run() -> None:
                await sandbox.exec(["sh", "-c", "echo now; sleep 60"], on_stdout=see)

            tasks.start_soon(run)
            with anyio.fail_after(20):
                await seen.wait()
            tasks.cancel_scope.cancel()

    async def test_much_output_arrives_whole_and_memory_stays_flat(self, sandbox: Sandbox) -> None:
        digest, size = hashlib.sha256(), 0

        async def take(data: bytes) -> None:
            nonlocal size
            digest.update(data)
            size += len(data)

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        script = (
            "import sys\nfor i in range(512): sys.stdout.buffer.write(bytes([i % 256]) * 65536)"
        )
        await sandbox.exec([sandbox.backend.python, "-c", script], on_stdout=take)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < BIG // 1024 // 2
        expected = hashlib.sha256()
        for i in range(512):
            expected.update(bytes([i % 256]) * 65536)
        assert (size, digest.digest()) == (BIG, expected.digest())

    async def test_both_streams_may_be_full_at_once(self, sandbox: Sandbox) -> None:
        script = (
            "import os\nfor i in range(64):\n os.write(1, b'o' * 65536)\n os.write(2, b'e' * 65536)"
        )
        sizes = {"o": 0, "e": 0}

        async def out(data: bytes) -> None:
            sizes["o"] += len(data)

        async def err(data: bytes) -> None:
            sizes["e"] += len(data)

        with anyio.fail_after(60):
            await sandbox.exec([sandbox.backend.python, "-c", script], on_stdout=out, on_stderr=err)
        assert sizes == {"o": 64 * 65536, "e": 64 * 65536}

    async def test_a_slow_reader_loses_nothing(self, sandbox: Sandbox) -> None:
        size = 0

        async def slow(data: bytes) -> None:
            nonlocal size
            await anyio.sleep(0.01)
            size += len(data)

        await sandbox.exec(["sh", "-c", "head -c 2000000 /dev/zero"], on_stdout=slow)
        assert size == 2_000_000

    async def test_a_daemon_does_not_hold_a_command_up(self, sandbox: Sandbox) -> None:
        with anyio.fail_after(20):
            done = await sandbox.run(["sh", "-c", "sleep 60 & echo done"])
        assert (done.exit_code, done.stdout) == (0, b"done\n")

    async def test_a_closed_output_is_not_the_end(self, sandbox: Sandbox) -> None:
        script = "import os, sys, time; os.close(1); os.close(2); time.sleep(0.5); sys.exit(5)"
        assert (await self.python(sandbox, script))[0] == 5

    @pytest.mark.parametrize("escape", ["sleep 61", "sleep 61 & wait", "setsid sleep 61 & wait"])
    async def test_the_deadline_ends_the_whole_tree(self, sandbox: Sandbox, escape: str) -> None:
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            await sandbox.run(["sh", "-c", escape], timeout=1.0)
        assert time.monotonic() - start < 20
        assert await self.running(sandbox, b"sleep\x0061") == 0

    async def test_cancelling_ends_the_whole_tree(self, sandbox: Sandbox) -> None:
        with anyio.move_on_after(1.0):
            await sandbox.run(["sh", "-c", "setsid sleep 62 & sleep 62"])
        with anyio.fail_after(20):
            while await self.running(sandbox, b"sleep\x0062"):
                await anyio.sleep(0.1)

    async def running(self, sandbox: Sandbox, command: bytes) -> int:
        """How many processes in the sandbox have this in their command line."""
        script = (
            "import glob, sys\nn = 0\nfor f in glob.glob('/proc/[0-9]*/cmdline'):\n"
            " try: n += sys.argv[1].encode().replace(b'|', b'\\0') in open(f, 'rb').read()[:60]\n"
            " except OSError: pass\nprint(n)"
        )
        out = await self.python(sandbox, script, command.replace(b"\0", b"|").decode())
        return int(out[1])

    # --- files

    @pytest.mark.parametrize("size", [0, 1, 65536, BIG])
    async def test_files_go_in_and_come_out(self, sandbox: Sandbox, size: int) -> None:
        data = (bytes(range(251)) * (size // 251 + 1))[:size]
        path = f"{sandbox.backend.work}/in and out/ü/file"
        await sandbox.write_bytes(path, b"before" * 100)
        await sandbox.write_bytes(path, data)
        assert await sandbox.read_bytes(path, BIG) == data

    @pytest.mark.parametrize("name", ["a'b", 'a"b', "a b", "$HOME", "a\nb", "-n", "ü"])
    async def test_names_of_files_are_taken_as_they_are(self, sandbox: Sandbox, name: str) -> None:
        path = f"{sandbox.backend.work}/{name}"
        await sandbox.write_bytes(path, b"x")
        assert (await sandbox.run(["cat", path])).stdout == b"x"
        assert await sandbox.read_bytes(path, 10) == b"x"

    async def test_a_reader_that_stops_harms_nobody(self, sandbox: Sandbox) -> None:
        path = f"{sandbox.backend.work}/big"
        await sandbox.write_bytes(path, bytes(4 << 20))
        with pytest.raises(OverflowError):
            await sandbox.read_bytes(path, 10)
        with anyio.move_on_after(0.001):
            await sandbox.read_bytes(path, 8 << 20)
        assert len(await sandbox.read_bytes(path, 8 << 20)) == 4 << 20

    async def test_files_are_seen_by_commands(self, sandbox: Sandbox) -> None:
        path = f"{sandbox.backend.work}/x"
        await sandbox.write_bytes(path, b"in")
        assert (await sandbox.run(["cat", path])).stdout == b"in"
        await sandbox.run(["sh", "-c", f"printf out > {path}"])
        assert await sandbox.read_bytes(path, 100) == b"out"

    async def test_errors_of_files_are_the_built_in_ones(self, sandbox: Sandbox) -> None:
        work = sandbox.backend.work
        await sandbox.write_bytes(f"{work}/file", b"")
        with pytest.raises(FileNotFoundError):
            await sandbox.read_bytes(f"{work}/nothing", 100)
        with pytest.raises(IsADirectoryError):
            await sandbox.read_bytes(work, 100)
        with pytest.raises(IsADirectoryError):
            await sandbox.write_bytes(work, b"")
        with pytest.raises(OSError):
            await sandbox.write_bytes(f"{work}/file/below", b"")
        await sandbox.run(["chmod", "000", f"{work}/file"])
        # A provider's own daemon may read all that there is, as root does.
        with contextlib.suppress(PermissionError):
            assert await sandbox.read_bytes(f"{work}/file", 100) == b""

    async def test_what_is_no_file_can_not_block_a_reader(self, sandbox: Sandbox) -> None:
        path = f"{sandbox.backend.work}/fifo"
        await sandbox.run(["mkfifo", path])
        with anyio.fail_after(20), pytest.raises(OSError):
            await sandbox.read_bytes(path, 100)

    async def test_reading_stops_at_its_limit(self, sandbox: Sandbox) -> None:
        path = f"{sandbox.backend.work}/x"
        await sandbox.write_bytes(path, b"x" * 1000)
        with pytest.raises(OverflowError):
            await sandbox.read_bytes(path, 999)

    async def test_mounts_are_delivered(self, backend: Backend, tmp_path: Path) -> None:
        inputs = tmp_path / "inputs"
        (inputs / "sub").mkdir(parents=True)
        mounts = {f"{backend.inbox}/attempt": inputs}
        async with self.made(backend, small(backend, mounts=mounts, disk=256)) as sandbox:
            (inputs / "sub" / "file").write_bytes(b"later")  # staged while it starts
            await sandbox.deliver(mounts)
            assert await sandbox.read_bytes(f"{backend.inbox}/attempt/sub/file", 100) == b"later"

    async def test_a_mount_may_be_an_archive_where_it_is_not_bound(
        self, backend: Backend, tmp_path: Path
    ) -> None:
        if backend.binds_mounts:
            return
        (tmp_path / "tree" / "sub").mkdir(parents=True)
        (tmp_path / "tree" / "sub" / "file").write_bytes(b"packed")
        with tarfile.open(tmp_path / "tree.tar.gz", "w:gz") as archive:
            archive.add(tmp_path / "tree", arcname=".")
        mounts = {f"{backend.inbox}/code": tmp_path / "tree.tar.gz"}
        async with self.made(backend) as sandbox:
            await sandbox.deliver(mounts)
            assert await sandbox.read_bytes(f"{backend.inbox}/code/sub/file", 100) == b"packed"

    # --- what it declares

    async def test_it_declares_what_exists(self, backend: Backend) -> None:
        limits = backend.limits()
        assert set(limits.network) <= {"none", "hosts", "internet"}
        assert limits.network
        assert limits.stream in ("pipe", "spool")

    async def test_what_it_does_not_declare_is_refused(self, backend: Backend) -> None:
        limits = backend.limits()
        asked: dict[str, SandboxSpec] = {
            "cpu": SandboxSpec(cpu=1),
            "memory": SandboxSpec(memory=256),
            "disk": SandboxSpec(disk=64),
            "gpu": SandboxSpec(gpu=1),
            "shared_memory": SandboxSpec(shared_memory=64),
            "image": SandboxSpec(image="python:3.12"),
        }
        refused = [spec for name, spec in asked.items() if not getattr(limits, name)]
        networks: dict[str, bool | list[str]] = {
            "none": False,
            "internet": True,
            "hosts": ["example.com"],
        }
        for kind, network in networks.items():
            if kind not in limits.network:
                refused.append(SandboxSpec(network=network))
        for spec in refused:
            with pytest.raises(NotEnforceable):
                await backend.create(spec)

    async def test_an_image_that_is_not_there_is_found_out_early(self, backend: Backend) -> None:
        if not backend.limits().image:
            return
        with pytest.raises(SandboxError) as caught:
            await backend.prepare(Recipe("no/such/image/anywhere:nowhere"))
        assert caught.value.code
        assert "no/such/image" in str(caught.value)

    async def test_memory_is_limited_where_that_is_declared(self, backend: Backend) -> None:
        if not backend.limits().memory:
            return
        script = f"import time; x = bytearray({self.memory * 9 // 4} << 20); time.sleep(2)"
        async with self.made(
            backend, small(backend, memory=self.memory, disk=self.disk)
        ) as sandbox:
            with contextlib.suppress(SandboxGone):
                code, _, _ = await self.python(sandbox, script)
                assert code != 0
            assert "memory" in (sandbox.diagnose() or "")

    async def test_memory_of_many_processes_is_limited_together(self, backend: Backend) -> None:
        if not backend.limits().memory:
            return
        script = (
            "import os, time\nfor i in range(6):\n if os.fork() == 0:\n"
            f"  x = b'x' * ({self.memory // 3} << 20); time.sleep(3); os._exit(0)\n"
            "while True:\n try: os.wait()\n except ChildProcessError: break"
        )
        async with self.made(
            backend, small(backend, memory=self.memory, disk=self.disk)
        ) as sandbox:
            with contextlib.suppress(SandboxGone):
                await self.python(sandbox, script)
            # The command itself may have ended well; the attempt has not.
            assert "memory" in (sandbox.diagnose() or "")

    async def test_files_in_memory_count_as_memory(self, backend: Backend) -> None:
        limits = backend.limits()
        if not limits.memory or not limits.disk or limits.stream != "pipe":
            return
        script = "import time; open('big', 'wb').write(bytes(500 << 20)); time.sleep(2)"
        async with self.made(backend, small(backend, memory=256, disk=1024)) as sandbox:
            with contextlib.suppress(SandboxGone):
                await self.python(sandbox, script)
            assert "memory" in (sandbox.diagnose() or "")

    async def test_what_stays_below_its_limits_is_left_alone(self, backend: Backend) -> None:
        limits = backend.limits()
        spec = SandboxSpec(
            memory=512 if limits.memory else None,
            cpu=1 if limits.cpu else None,
            disk=256 if limits.disk else None,
        )
        async with self.made(backend, spec) as sandbox:
            # Shared by forks: counted once.
            script = (
                "import os, time\nx = b'x' * (200 << 20)\nfor i in range(4):\n"
                " if os.fork() == 0: time.sleep(1.5); os._exit(0)\n"
                "for i in range(4): os.wait()\nprint('well')"
            )
            assert (await self.python(sandbox, script))[:2] == (0, b"well\n")
            assert sandbox.diagnose() is None

    async def test_cpu_is_limited_where_that_is_declared(self, backend: Backend) -> None:
        if not backend.limits().cpu:
            return
        # Two processes, since some providers give whole CPUs alone.
        script = (
            "import os, time\nstart = time.monotonic()\nchild = os.fork()\n"
            "while time.monotonic() - start < 2: pass\n"
            "if not child: os._exit(0)\nos.wait(); t = os.times()\n"
            "print(sum(t[:4]) / (time.monotonic() - start))"
        )
        async with self.made(backend, small(backend, cpu=self.cpu, disk=self.disk)) as sandbox:
            _, out, _ = await self.python(sandbox, script)
            assert float(out) < self.cpu + 0.3

    async def test_disk_is_limited_where_that_is_declared(self, backend: Backend) -> None:
        if not backend.limits().disk:
            return
        async with self.made(backend, small(backend, disk=self.disk)) as sandbox:
            script = f"open('big', 'wb').write(bytes({self.disk * 5 // 4} << 20))"
            code, _, err = await self.python(sandbox, script)
            assert code != 0
            assert b"No space left" in err

    async def test_shared_memory_has_its_size_where_that_is_declared(
        self, backend: Backend
    ) -> None:
        if not backend.limits().shared_memory:
            return
        script = "import os; s = os.statvfs('/dev/shm'); print(s.f_blocks * s.f_frsize >> 20)"
        spec = small(backend, shared_memory=self.disk * 2, disk=self.disk)
        async with self.made(backend, spec) as sandbox:
            _, out, _ = await self.python(sandbox, script)
            assert int(out) == self.disk * 2

    async def test_there_is_no_network_where_none_was_asked(self, backend: Backend) -> None:
        if "none" not in backend.limits().network:
            return
        async with self.made(backend, small(backend, network=False, disk=64)) as sandbox:
            code, _, err = await self.python(sandbox, _CONNECT, "1.1.1.1", "53")
            assert code != 0
            assert b"Error" in err

    @pytest.mark.parametrize("network", [True, ["allowed.invalid"]])
    async def test_this_machine_is_never_part_of_the_network(
        self, backend: Backend, network: bool | list[str]
    ) -> None:
        if network_kind(network) not in backend.limits().network:
            return
        with socket.create_server(("0.0.0.0", 0)) as server:  # noqa: S104 - that is the point
            port = str(server.getsockname()[1])
            own = {"127.0.0.1", socket.gethostbyname(socket.gethostname())}
            async with self.made(backend, small(backend, network=network, disk=64)) as sandbox:
                for address in own:
                    for script in (_CONNECT, _FETCH):
                        code, _, _ = await self.python(sandbox, script, address, port)
                        assert code != 0
            server.setblocking(False)
            with pytest.raises(BlockingIOError):
                server.accept()

    async def test_a_host_that_is_not_listed_is_refused(self, backend: Backend) -> None:
        if "hosts" not in backend.limits().network:
            return
        spec = small(backend, network=["allowed.invalid"], disk=64)
        async with self.made(backend, spec) as sandbox:
            for script in (_CONNECT, _FETCH):
                code, _, _ = await self.python(sandbox, script, "other.invalid", "80")
                assert code != 0

    async def test_what_is_kept_has_a_way_in(self, backend: Backend, tmp_path: Path) -> None:
        if not backend.limits().keep:
            return
        async with self.made(backend) as sandbox:
            await sandbox.write_bytes(f"{backend.work}/note", b"look here")
            assert await sandbox.keep({})


_CONNECT = (
    "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5)"
)
_FETCH = (
    "import sys, urllib.request as u; "
    "u.urlopen('http://%s:%s/' % (sys.argv[1], sys.argv[2]), timeout=5)"
)
