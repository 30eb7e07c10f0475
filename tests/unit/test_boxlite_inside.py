"""The program that runs in a microVM, and the host's end of its line, joined as boxlite joins them.

boxlite gives the standard output as text in pieces of 1,024 characters.
"""

import contextlib
import itertools
import os
import socket
import sys
from pathlib import Path

import anyio
import boxlite
import pytest

from metaflow_sandbox.backends.base import SandboxSpec
from metaflow_sandbox.backends.boxlite import Boxlite, inside, network
from metaflow_sandbox.backends.boxlite.operation import Life, operation
from metaflow_sandbox.backends.boxlite.sandbox import BoxliteSandbox
from metaflow_sandbox.egress.rules import Rules
from metaflow_sandbox.errors import ProtocolError, SandboxGone

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


class Execution:
    """A process of this machine, by the names that boxlite has for one of a guest."""

    def __init__(self, process):
        self._process = process

    def stdin(self):
        return self

    async def send_input(self, data):
        try:
            await self._process.stdin.send(data)
        except anyio.BrokenResourceError:
            raise boxlite.errors.InternalError("stdin channel closed") from None

    async def close(self):
        await self._process.stdin.aclose()

    def stdout(self):
        return self

    async def __anext__(self):
        try:
            return (await self._process.stdout.receive(1024)).decode()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None

    async def wait(self):
        await self._process.wait()


class Machine:
    """Where processes are started, in the place of a microVM."""

    def __init__(self, program=inside.__file__):
        self.program = program
        self.processes = []

    async def exec(self, command, arguments):
        self.processes.append(await anyio.open_process([command, *arguments]))
        return Execution(self.processes[-1])

    @contextlib.asynccontextmanager
    async def begin(self, request):
        life = Life(os.getpid())
        try:
            async with operation(life, self, sys.executable, self.program, request) as running:
                yield running
        finally:
            life.close()

    async def run(self, script, env=(), cwd="/"):
        request = {"op": "exec", "argv": ["sh", "-c", script], "cwd": cwd, "env": dict(env)}
        said = {"o": b"", "e": b""}
        async with self.begin(request) as running:
            while True:
                kind, data = await running.frame()
                if kind == "x":
                    return int(data), said["o"], said["e"]
                said[kind] += data
                await running.taken()


@pytest.mark.parametrize(
    ("script", "result"),
    [
        ("exit 7", (7, b"", b"")),
        ("echo out; echo err >&2", (0, b"out\n", b"err\n")),
        ("printf '\\377\\000;\\n'", (0, b"\xff\0;\n", b"")),
        ("kill -9 $$", (137, b"", b"")),
        ("cat", (0, b"", b"")),
        ("sleep 60 & echo done", (0, b"done\n", b"")),
        ("exec >&- 2>&-; sleep 0.3; exit 5", (5, b"", b"")),
        ('echo "$A|$PWD"', (0, b"x y|/\n", b"")),
    ],
)
async def test_a_command_gives_its_output_and_its_code(script, result):
    assert await Machine().run(script, {"A": "x y"}) == result


async def test_a_command_that_is_not_there_and_a_directory_that_is_not():
    request = {"op": "exec", "argv": ["no-such-command"], "cwd": "/", "env": {}}
    async with Machine().begin(request) as running:
        assert (await running.frame())[0] == "e"
        assert await running.frame() == ("x", b"127")
    assert (await Machine().run("true", cwd="/no/such"))[0] == 127


async def test_much_output_comes_whole():
    code, out, err = await Machine().run("head -c 3000000 /dev/urandom | tee /dev/stderr")
    assert (code, len(out)) == (0, 3_000_000)
    assert out == err


async def test_what_was_sent_before_a_program_ended_is_read_after_it():
    script = f"head -c {inside.PIECE * (inside.WINDOW - 2)} /dev/zero"
    request = {"op": "exec", "argv": ["sh", "-c", script], "cwd": "/", "env": {}}
    machine, size = Machine(), 0
    async with machine.begin(request) as running:
        await machine.processes[0].wait()
        while (frame := await running.frame())[0] != "x":
            size += len(frame[1])
            await running.taken()
    assert (frame[1], size) == (b"0", inside.PIECE * (inside.WINDOW - 2))


async def test_a_reader_that_is_slow_is_waited_for():
    """Without a window all of it would be in the memory of the host."""
    request = {"op": "exec", "argv": ["sh", "-c", "yes"], "cwd": "/", "env": {}}
    machine = Machine()
    async with machine.begin(request) as running:
        await running.frame()
        pid = machine.processes[0].pid
        last, same = None, 0
        while same < 5:
            written = Path(f"/proc/{pid}/io").read_text().split("wchar: ")[1].split()[0]
            same = same + 1 if written == last else 0
            last = written
            await anyio.sleep(0.1)
        assert int(last) < inside.WINDOW * inside.PIECE


@pytest.mark.parametrize("escape", ["sleep 611", "sleep 611 & wait", "setsid sleep 611 & wait"])
async def test_hanging_up_ends_the_whole_tree(escape):
    request = {"op": "exec", "argv": ["sh", "-c", f"echo; {escape}"], "cwd": "/", "env": {}}
    machine = Machine()
    async with machine.begin(request) as running:
        await running.frame()
        below = inside.children_of(machine.processes[0].pid)
        assert below
    assert not any(Path(f"/proc/{pid}").exists() for pid in below)


async def test_files_are_read_and_written(tmp_path):
    source, target = tmp_path / "source", tmp_path / "a b" / "ü"
    source.write_bytes(bytes(range(256)) * 1000)
    request = {"op": "write", "path": str(target), "source": str(source)}
    async with Machine().begin(request) as running:
        assert await running.frame() == ("x", b"0")
    found = b""
    async with Machine().begin({"op": "read", "path": str(target)}) as running:
        while (frame := await running.frame())[0] == "d":
            found += frame[1]
            await running.taken()
    assert frame == ("x", b"0")
    assert found == source.read_bytes()


@pytest.mark.parametrize(
    ("request_", "number"),
    [
        ({"op": "read", "path": "/no/such"}, 2),
        ({"op": "read", "path": "/tmp"}, 21),
        ({"op": "write", "path": "/tmp", "source": "/dev/null"}, 21),
    ],
)
async def test_an_error_of_a_file_is_its_number(request_, number):
    async with Machine().begin(request_) as running:
        assert await running.frame() == ("x", b"%d" % number)


async def test_what_is_no_file_can_not_block_a_reader(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    async with Machine().begin({"op": "read", "path": str(tmp_path / "fifo")}) as running:
        assert (await running.frame())[0] == "x"


@pytest.mark.parametrize(
    "line", ["no frame;", "o" * 200_000, "oAAAA;", "o;", ";"], ids=lambda line: line[:8]
)
async def test_what_is_no_frame_is_refused(line, tmp_path):
    program = tmp_path / "hostile.py"
    program.write_text(f"print({line!r}, flush=True); import sys; sys.stdin.read()")
    async with Machine(str(program)).begin({"op": "exec"}) as running:
        with pytest.raises(ProtocolError):
            await running.frame()


async def test_a_frame_that_expands_beyond_a_piece_is_refused(tmp_path):
    program = tmp_path / "hostile.py"
    program.write_text(
        "import base64, sys, zlib\n"
        "print('o' + base64.b64encode(zlib.compress(bytes(30 << 20))).decode() + ';', flush=True)\n"
        "sys.stdin.read()"
    )
    async with Machine(str(program)).begin({"op": "exec"}) as running:
        with pytest.raises(ProtocolError):
            await running.frame()


async def test_a_program_that_ends_early_is_gone(tmp_path):
    program = tmp_path / "short.py"
    program.write_text("import sys; sys.stdin.readline()")
    async with Machine(str(program)).begin({"op": "exec"}) as running:
        with pytest.raises(SandboxGone):
            await running.frame()


# --- the proxy's port


@pytest.fixture
def port(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(network, "PORT", port)
    return port


@contextlib.asynccontextmanager
async def listening(path, answer):
    """Programs that connect to the port speak to `answer`, which is a server of the host's."""
    listener = await anyio.create_unix_listener(path)
    ready = anyio.Event()
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, answer)
        tasks.start_soon(network._listen, Machine().begin, str(path), ready)
        await ready.wait()
        yield
        tasks.cancel_scope.cancel()


async def echo(stream):
    async with stream:
        async for data in stream:
            await stream.send(data)


async def test_connections_are_carried_both_ways_to_their_ends(port, tmp_path):
    data = os.urandom(300_000)

    async def one():
        async with await anyio.connect_tcp("127.0.0.1", port) as stream:

            async def say():
                await stream.send(data)
                await stream.send_eof()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(say)
                assert b"".join([piece async for piece in stream]) == data

    async with listening(tmp_path / "s", echo):
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(one)


async def test_a_connection_that_nobody_reads_does_not_hold_up_others(port, tmp_path):
    async with listening(tmp_path / "s", echo):
        async with await anyio.connect_tcp("127.0.0.1", port) as silent:
            with anyio.move_on_after(1):
                while True:
                    await silent.send(bytes(65536))
            async with await anyio.connect_tcp("127.0.0.1", port) as stream:
                await stream.send(b"hello")
                assert await stream.receive() == b"hello"


async def test_the_proxy_answers_at_the_port(port, tmp_path):
    async with network._serving(Machine().begin, Rules(("allowed.invalid",)), tmp_path) as proxy:
        async with await anyio.connect_tcp("127.0.0.1", port) as stream:
            await stream.send(
                b"CONNECT other.invalid:443 HTTP/1.1\r\nHost: other.invalid:443\r\n\r\n"
            )
            assert (await stream.receive()).startswith(b"HTTP/1.1 403")
    assert "other.invalid:443" in proxy.refusals


@pytest.mark.usefixtures("port")
async def test_a_proxy_ends_in_peace_after_its_microvm(tmp_path):
    machine = Machine()
    async with network._serving(machine.begin, Rules(("allowed.invalid",)), tmp_path):
        for process in machine.processes:
            process.kill()
            await process.wait()


async def test_a_number_that_does_not_wait_is_refused(port, tmp_path):
    async with listening(tmp_path / "s", echo):
        request = {"op": "connect", "port": port, "number": 77}
        async with Machine().begin(request) as running:
            assert (await running.frame())[0] in ("x", "f")


class Hostile:
    """A guest whose listener says what it likes; each connection it is asked for stays open."""

    def __init__(self, numbers):
        self.numbers = iter(numbers)
        self.said = self.carried = 0

    @contextlib.asynccontextmanager
    async def begin(self, request):
        self.carried += request["op"] == "connect"
        yield self if request["op"] == "listen" else Silent()

    async def frame(self):
        await anyio.lowlevel.checkpoint()
        number = next(self.numbers)
        self.said += 1
        return "c", number

    async def taken(self):
        pass


class Silent:
    async def frame(self):
        await anyio.sleep_forever()


async def test_a_guest_is_carried_so_many_connections_and_no_more(tmp_path):
    guest = Hostile(b"%d" % number for number in itertools.count())
    async with network._serving(guest.begin, Rules(None), tmp_path):
        await anyio.wait_all_tasks_blocked()
        await anyio.sleep(0.5)
        assert guest.carried <= network._CONNECTIONS
        assert guest.said <= network._CONNECTIONS + 2


async def test_a_number_that_is_none_ends_the_proxy_and_nothing_else(tmp_path):
    guest = Hostile([b"0", b"9" * 5000])
    async with network._serving(guest.begin, Rules(None), tmp_path):
        await anyio.sleep(0.2)


class Closes:
    def __init__(self, error=None):
        self.closed, self._error = False, error

    async def close(self):
        self.closed = True
        if self._error:
            raise self._error


async def test_a_microvm_is_gone_whatever_goes_wrong_at_its_end(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    sandbox = BoxliteSandbox(Boxlite(), SandboxSpec(), tmp_path / "layout")
    sandbox._gate, sandbox._runtime = Closes(ValueError("hostile")), Closes()
    runtime, lease = sandbox._runtime, sandbox._lease.path
    with pytest.raises(ValueError, match="hostile"):
        await sandbox.destroy()
    assert runtime.closed and not lease.exists()
