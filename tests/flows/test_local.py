"""What `@bubblewrap` alone gives a step: images, kept sandboxes, and a network."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import images
import internet
import pytest

COMMAND = [sys.executable, "-m", "metaflow_sandbox.cli"]


def test_a_step_runs_in_an_image_that_has_only_python(project, tmp_path):
    root = images.root_file_system(tmp_path / "rootfs")
    images.layout(tmp_path / "oci", [images.layer(tree=root)], ["FROM_IMAGE=yes"])
    project.write(
        "flow.py",
        """
        import os, sys
        from metaflow import FlowSpec, Parameter, bubblewrap, step

        class Image(FlowSpec):
            n = Parameter("n", default=3)

            @step
            def start(self):
                self.given = {"a": [1, 2]}
                self.next(self.inside)

            @bubblewrap(image=sys.argv[0].replace("flow.py", "") + "../oci:latest")
            @step
            def inside(self):
                self.note = open("/opt/app/note").read()
                self.seen = [sys.prefix, sys.executable, os.environ["FROM_IMAGE"], self.n]
                self.given["b"] = 3
                self.has = [os.path.exists(p) for p in ("/root", "/home", "/usr/share/doc")]
                self.next(self.end)

            @step
            def end(self):
                assert self.given == {"a": [1, 2], "b": 3}

        if __name__ == "__main__":
            Image()
        """,
    )
    project.run(str(project.directory / "flow.py"), "run").ok()
    note, seen, has = project.client(
        'd = Flow("Image").latest_run["inside"].task.data; answer = [d.note, d.seen, d.has]'
    )
    assert note == "from the image"
    assert seen == ["/usr", "/usr/bin/python3", "yes", 3]
    assert has == [False, False, False]


def test_an_image_that_is_not_there_stops_the_run_before_any_step(project):
    said = project.stopped('@bubblewrap(image="python:3.12-slim")')
    assert "skopeo copy docker://python:3.12-slim" in said


KEEP = """
    import os
    from metaflow import FlowSpec, bubblewrap, resources, step

    class Keep(FlowSpec):
        @resources(shared_memory=96)
        @bubblewrap(keep="on-failure", env=["TOKEN"], memory=300)
        @step
        def start(self):
            os.makedirs("sub")
            open("sub/note", "w").write("look here")
            os.symlink("/etc/shadow", "link")
            os.mkfifo("fifo")
            if os.environ["TOKEN"] != "well":
                raise ValueError("failed on purpose")
            self.next(self.end)

        @step
        def end(self):
            pass

    if __name__ == "__main__":
        Keep()
"""


@pytest.fixture
def kept(project):
    """The project, and the name of a sandbox that was kept."""
    project.write("flow.py", KEEP)
    done = project.run("flow.py", "run", env={"TOKEN": "canary-5150"})
    assert done.code != 0
    return project, re.search(r"metaflow-sandbox shell (\S+)", done.output).group(1)


def test_a_failed_step_can_be_looked_at_in_a_sandbox_like_its_own(kept):
    project, name = kept
    script = (
        "cat sub/note; readlink link; id -u; cat /inbox/code/flow.py | wc -l; "
        "df -m --output=size /dev/shm | tail -1"
    )

    def shell(*command):
        return subprocess.run(
            [*COMMAND, "shell", name, *command],
            env=project.environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )

    done = shell("sh", "-c", f"cd /sandbox/flow; {script}; exit 5")
    lines = done.stdout.splitlines()
    assert done.returncode == 5, done.stderr
    assert lines[0] == "look here/etc/shadow"
    assert int(lines[1]) not in (0, os.getuid())
    assert int(lines[2]) == len(KEEP.splitlines())
    assert int(lines[3]) == 96
    # It is entered as often as one likes.
    assert shell("cat", "/sandbox/flow/sub/note").stdout == "look here"


def test_nothing_secret_is_kept_and_nothing_is_unpacked_on_the_host(kept):
    project, name = kept
    place = Path(project.environment["HOME"], ".local/state/metaflow-sandbox/kept", name)
    assert place.parent.stat().st_mode & 0o077 == 0
    names = {str(p.relative_to(place)) for p in place.rglob("*")}
    assert {"work.tar", "spec.json"} <= names
    assert not any("note" in n or "fifo" in n for n in names)
    assert all(b"canary-5150" not in p.read_bytes() for p in place.rglob("*") if p.is_file())


def test_a_shell_at_a_terminal(kept):
    project, name = kept
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(COMMAND[0], [*COMMAND, "shell", name], project.environment)
    seen = b""

    def wait_for(text):
        nonlocal seen
        deadline = time.monotonic() + 60
        while text not in seen:
            assert time.monotonic() < deadline, seen
            if select.select([terminal], [], [], 1)[0]:
                seen += os.read(terminal, 4096)

    wait_for(b"$ ")
    os.write(terminal, b"echo $((6 * 7)); tty; cat flow/sub/note; sleep 60\n")
    wait_for(b"look here")
    assert b"42" in seen
    time.sleep(0.5)  # until `sleep` is what a key would stop
    seen = b""
    os.write(terminal, b"\x03")  # Ctrl-C is the command's, not ours
    wait_for(b"$ ")
    os.write(terminal, b"echo on $((40 + 2)); exit 3\n")
    wait_for(b"on 42")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    os.close(terminal)


def test_a_step_that_succeeds_is_not_kept(project):
    project.write("flow.py", KEEP)
    done = project.run("flow.py", "run", env={"TOKEN": "well"}).ok()
    assert "metaflow-sandbox shell" not in done.output


def test_a_name_that_was_not_kept_is_said(project):
    done = subprocess.run(
        [*COMMAND, "shell", "nothing"], env=project.environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "nothing" in done.stderr and "Traceback" not in done.stderr


def test_a_key_goes_to_the_host_that_is_listed_and_to_no_other(project):
    """The recipe for a model's API, in a network of its own."""
    project.write(
        "flow.py",
        """
        import os, urllib.error, urllib.request
        from metaflow import FlowSpec, bubblewrap, step

        class Ask(FlowSpec):
            @bubblewrap(env=["OPENAI_API_KEY"], network=["api.example.com"])
            @step
            def start(self):
                key = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
                ask = urllib.request.Request("http://api.example.com/", headers=key)
                self.answer = urllib.request.urlopen(ask, timeout=10).read().decode()
                try:
                    urllib.request.urlopen("http://other.example.com/?" + key["Authorization"][7:])
                except urllib.error.HTTPError as e:
                    self.refused = e.code
                self.next(self.end)

            @step
            def end(self):
                print("answer:", self.answer, self.refused)

        if __name__ == "__main__":
            Ask()
        """,
    )
    user = [] if os.getuid() == 0 else ["--user", "--map-root-user"]
    done = subprocess.run(
        ["unshare", "--net", "--mount", *user, sys.executable, internet.__file__,
         sys.executable, "flow.py", "--no-pylint", "run"],
        cwd=project.directory,
        env={**project.environment, "OPENAI_API_KEY": "canary-4711"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert f"answer: hello from {internet.PUBLIC} 403" in output
    assert "other.example.com:80 was refused" in output
    assert "canary-4711" not in output


def test_what_limited_a_step_is_recorded(project):
    project.write(
        "flow.py",
        """
        from metaflow import FlowSpec, bubblewrap, step

        class Level(FlowSpec):
            @bubblewrap(network=False)
            @step
            def start(self):
                self.next(self.end)

            @step
            def end(self):
                pass

        if __name__ == "__main__":
            Level()
        """,
    )
    done = project.run("flow.py", "run").ok()
    known = project.client('answer = Flow("Level").latest_run["start"].task.metadata_dict')
    assert known["sandbox-provider"].startswith("bubblewrap at /")
    assert known["sandbox-network"] == "none"
    limits = known["sandbox-limits"]
    assert limits in done.output or limits == "watcher"


@pytest.mark.parametrize("no", ["false", "False"])
def test_with_may_say_no_in_either_spelling(project, no):
    project.write(
        "flow.py",
        """
        from metaflow import FlowSpec, step

        class No(FlowSpec):
            @step
            def start(self):
                self.next(self.end)

            @step
            def end(self):
                pass

        if __name__ == "__main__":
            No()
        """,
    )
    project.run("flow.py", "run", "--with", f"bubblewrap:network={no},cache={no}").ok()
    known = project.client('answer = Flow("No").latest_run["end"].task.metadata_dict')
    assert known["sandbox-network"] == "none"


def test_an_interpreter_may_be_named_by_a_path_with_dots(project):
    """As `../venv/bin/python flow.py` does."""
    project.write(
        "flow.py",
        """
        from metaflow import FlowSpec, bubblewrap, step

        class Dots(FlowSpec):
            @bubblewrap(network=False)
            @step
            def start(self):
                import sys
                self.python = sys.executable
                self.next(self.end)

            @step
            def end(self):
                print("inside:", self.python)

        if __name__ == "__main__":
            Dots()
        """,
    )
    (project.directory / "below").mkdir()
    python = os.path.relpath(os.path.dirname(sys.executable), project.directory / "below")
    done = subprocess.run(
        [f"{python}/{os.path.basename(sys.executable)}", "../flow.py", "--no-pylint", "run"],
        cwd=project.directory / "below",
        env=project.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "inside: /" in done.stdout
