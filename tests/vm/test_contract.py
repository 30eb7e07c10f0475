"""boxlite keeps the contract, on real guests: in the machine of `make test-vm`, or with KVM.

VM_IMAGE      an OCI layout or an image's name, instead of the backend's own
VM_SECONDS    after so many no further test begins; each that didn't is named
VM_SHARED     set where a guest is slow: tests that ask for any sandbox share one
"""

import contextlib
import json
import os
import platform
import subprocess
import sys
import uuid

import anyio
import pytest
from of_this_machine import OfThisMachine

from metaflow_sandbox.backends.base import Recipe, SandboxSpec
from metaflow_sandbox.backends.boxlite import processes
from metaflow_sandbox.errors import NotEnforceable, SandboxError, SandboxGone
from metaflow_sandbox.leases import base
from metaflow_sandbox.testing import BackendContract

pytestmark = pytest.mark.integration


class TestBoxlite(BackendContract):
    @pytest.fixture(scope="class")
    def anyio_backend(self):
        return "asyncio"

    @pytest.fixture
    def backend(self):
        return OfThisMachine()

    @pytest.fixture(scope="class")
    async def common(self):
        async with self.made(OfThisMachine()) as sandbox:
            yield sandbox

    @pytest.fixture
    async def own(self, backend):
        async with self.made(backend) as sandbox:
            yield sandbox

    @pytest.fixture
    def sandbox(self, request):
        # No coroutine, since inside of one no other such fixture can be had.
        return request.getfixturevalue("common" if os.environ.get("VM_SHARED") else "own")

    async def test_the_work_directory_is_empty_and_writable(self, backend):
        async with self.made(backend) as sandbox:  # no shared one
            await super().test_the_work_directory_is_empty_and_writable(sandbox)

    # --- where a microVM is another thing than the other backends are

    async def test_memory_is_limited_where_that_is_declared(self, backend):
        """One piece that is too large is refused by the guest's kernel, and Python says so."""
        async with self.made(backend, SandboxSpec(memory=256)) as sandbox:
            code, _, err = await self.python(sandbox, "x = bytearray(600 << 20)")
            assert code != 0
            assert b"MemoryError" in err or "memory" in (sandbox.diagnose() or "")

    async def test_cpu_is_limited_where_that_is_declared(self, backend):
        with pytest.raises(NotEnforceable, match="whole"):
            await backend.create(SandboxSpec(cpu=0.3))
        async with self.made(backend, SandboxSpec(cpu=2)) as sandbox:
            assert (await self.python(sandbox, "import os; print(os.cpu_count())"))[1] == b"2\n"

    async def test_disk_is_limited_where_that_is_declared(self, backend):
        """In steps of a GB."""
        script = "import os; os.posix_fallocate(os.open('big', os.O_CREAT | os.O_RDWR), 0, 2 << 30)"
        async with self.made(backend, SandboxSpec(disk=1000)) as sandbox:
            code, _, err = await self.python(sandbox, f"import os; os.chdir('/sandbox'); {script}")
            assert code != 0
            assert b"No space left" in err

    async def test_files_in_memory_count_as_memory(self, backend):
        """Files are on a disk of the guest's own, so that they need no memory."""
        async with self.made(backend, SandboxSpec(memory=256, disk=1024)) as sandbox:
            done = await sandbox.run(
                ["dd", "if=/dev/zero", "of=/sandbox/big", "bs=1M", "count=500"]
            )
            assert done.exit_code == 0, done.stderr
            assert sandbox.diagnose() is None

    # --- what only boxlite promises

    async def test_the_kernel_is_not_the_hosts(self, sandbox):
        code, out, _ = await self.python(sandbox, "import platform; print(platform.release())")
        assert code == 0
        assert out.decode().strip() not in ("", platform.release())

    async def test_root_inside_may_do_what_packages_need(self, sandbox):
        script = (
            "id -u; touch /usr/x && chown 1000:1000 /usr/x && su -s /bin/sh nobody -c 'id -u' && "
            "mknod /tmp/p p && chmod 4755 /usr/x && rm /usr/x"
        )
        done = await sandbox.run(["sh", "-c", script])
        assert (done.exit_code, done.stdout) == (0, b"0\n65534\n"), done.stderr

    async def test_inputs_are_read_only(self, backend, tmp_path):
        (tmp_path / "file").write_bytes(b"mine")
        mounts = {f"{backend.inbox}/attempt": tmp_path}
        async with self.made(backend, SandboxSpec(mounts=mounts)) as sandbox:
            await sandbox.deliver(mounts)
            for script in ("echo x > {}/file", "rm {}/file", "touch {}/new", "chmod 777 {}/file"):
                command = script.format(f"{backend.inbox}/attempt")
                assert (await sandbox.run(["sh", "-c", command])).exit_code != 0
            assert await sandbox.read_bytes(f"{backend.inbox}/attempt/file", 10) == b"mine"
        assert (tmp_path / "file").read_bytes() == b"mine"

    async def test_a_killed_owner_takes_its_microvm_along(self, backend):
        labels = {"metaflow-run": uuid.uuid4().hex}
        script = (
            "import json, sys, anyio\nfrom of_this_machine import OfThisMachine\n"
            "from metaflow_sandbox.backends.base import SandboxSpec\n"
            "async def main():\n"
            "    await OfThisMachine().create(SandboxSpec(json.loads(sys.argv[1])))\n"
            "    print('made', flush=True)\n    await anyio.sleep(600)\n"
            "anyio.run(main)"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with subprocess.Popen(
            [sys.executable, "-c", script, json.dumps(labels)],
            stdout=subprocess.PIPE,
            env=environment,
        ) as owner:
            assert owner.stdout.readline() == b"made\n"
            (info,) = await backend.list(labels)
            record = json.loads((base() / f"vm-{info.id}" / "record.json").read_text())
            owner.kill()
        with anyio.fail_after(10):  # seconds, whatever the machine
            while processes.lives(record["process"]):
                await anyio.sleep(0.05)
        backend.sweep()
        assert await backend.list(labels) == []
        assert not (base() / f"vm-{info.id}").exists()

    async def test_setup_is_kept_and_run_once(self, backend, tmp_path):
        (tmp_path / "wheel").write_bytes(b"content")
        recipe = Recipe(
            setup=("echo made > /etc/made", "rm /etc/debian_version", "chmod 600 /etc/made"),
            files={"/packages": tmp_path},
            install=("sh", "-c", "mkdir -p /opt/prefix && cp /packages/wheel /opt/prefix"),
            prefix="/opt/prefix",
        )
        said = []

        async def say(line):
            said.append(line)

        one = await backend.prepare(recipe, say)
        assert [line for line in said if line.startswith("setup:")]
        said.clear()
        assert await backend.prepare(recipe, say) == one
        assert said == []
        async with self.made(backend, SandboxSpec(image=one.image)) as sandbox:
            script = "cat /etc/made /opt/prefix/wheel; stat -c %a /etc/made; ls -d /packages"
            done = await sandbox.run(["sh", "-c", f"{script}; ls /etc/debian_version"])
            assert done.stdout == b"made\ncontent600\n"

    async def test_a_setup_that_fails_says_what_the_command_said(self, backend):
        with pytest.raises(SandboxError, match="no luck") as caught:
            await backend.prepare(Recipe(setup=("echo no luck >&2; exit 3",)))
        assert "exit code 3" in str(caught.value)

    async def test_ten_at_once(self, backend):
        if os.environ.get("VM_SHARED"):
            pytest.skip("not checked: ten guests at once are too many for an emulated machine")
        async with contextlib.AsyncExitStack() as stack:
            made = []

            async def one():
                made.append(await stack.enter_async_context(self.made(backend)))

            async with anyio.create_task_group() as tasks:
                for _ in range(10):
                    tasks.start_soon(one)
            found = [await sandbox.run(["hostname"]) for sandbox in made]
            assert [done.exit_code for done in found] == [0] * 10

    async def test_df_on_the_inputs_harms_nobody(self, backend):
        """boxlite 0.10.8 ends the microVM for it, so that the error has to say why."""
        async with self.made(backend) as sandbox:
            try:
                await sandbox.run(["df", backend.inbox])
            except SandboxGone as e:
                assert "df, statvfs" in str(e)
            else:
                assert (await sandbox.run(["true"])).exit_code == 0
