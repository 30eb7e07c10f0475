"""What `@docker` gives a step: containers, images and their setup, and what goes wrong."""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import engines
import images
import pytest
import registry

pytestmark = pytest.mark.sample(0.3)
SANDBOX = "metaflow-sandbox"


@pytest.fixture
def project(project, docker):
    project.environment["DOCKER_HOST"] = docker.host
    yield project
    assert docker.docker("ps", "--all", "--quiet", "--filter", f"label={SANDBOX}").stdout == ""


@pytest.fixture(scope="session")
def small(dockerd, tmp_path_factory):
    """An image of a few files, to make others of."""
    root = images.root_file_system(tmp_path_factory.mktemp("small") / "rootfs")
    (root / "opt/app/note").write_text("from the image")
    archive = root.parent / "rootfs.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(root, arcname=".")
    dockerd.docker("import", "--change", "ENV FROM_IMAGE=yes", str(archive), "small:1")
    return "small:1"


def flow(project, step, decorator="@docker", before="pass", extra=""):
    """A flow whose middle step is in a container."""
    lines = "\n".join("        " + line for line in step.strip().splitlines())
    source = f"""
from metaflow import FlowSpec, catch, docker, resources, retry, step, timeout
import os, sys, time


class Contained(FlowSpec):
    @step
    def start(self):
        {before}
        self.next(self.inside)

    {decorator}
    @step
    def inside(self):
{lines}
        self.next(self.end)

    @step
    def end(self):
        {extra or "pass"}


if __name__ == "__main__":
    Contained()
"""
    (project.directory / "flow.py").write_text(source)
    return "flow.py"


def data(project, *names, step="inside"):
    wanted = ", ".join(f"d.{name}" for name in names)
    return project.client(
        f'd = Flow("Contained").latest_run["{step}"].task.data; answer = [{wanted}]'
    )


def test_a_foreach_and_its_join_run_in_containers(project):
    project.write(
        "flow.py",
        """
        import os
        from metaflow import FlowSpec, Parameter, docker, step

        class Contained(FlowSpec):
            n = Parameter("n", default=3)

            @step
            def start(self):
                self.items = [1, 2]
                self.next(self.inside, foreach="items")

            @docker
            @step
            def inside(self):
                self.value = self.input * self.n
                self.where = [os.uname().nodename, os.getuid(), os.path.exists("/.dockerenv")]
                self.next(self.join)

            @docker(network=False, memory=512, cpu=1, disk=128)
            @step
            def join(self, inputs):
                self.total = sum(i.value for i in inputs)
                self.where = inputs[0].where
                self.next(self.end)

            @step
            def end(self):
                assert self.total == 9

        if __name__ == "__main__":
            Contained()
        """,
    )
    done = project.run("flow.py", "run").ok()
    assert "Steps run in sandboxes of Docker" in done.output
    assert data(project, "where", "total", step="end") == [["sandbox", 0, True], 9]


def test_a_failing_step_is_retried_and_caught(project):
    name = flow(
        project,
        'print("attempt", os.environ.get("ATTEMPT"), flush=True)\nraise ValueError("as planned")',
        '@catch(var="failure")\n    @retry(times=1, minutes_between_retries=0)\n    @docker',
        extra='assert "as planned" in str(self.failure)',
    )
    done = project.run(name, "run").ok()
    assert done.output.count("ValueError: as planned") >= 2


def test_a_step_that_takes_too_long_is_ended(project):
    done = project.run(flow(project, "time.sleep(600)", "@docker(timeout=5)"), "run")
    assert done.code != 0
    assert "the step was ended after 5 s" in done.output


def test_a_step_that_takes_too_much_memory_is_told_so(project):
    done = project.run(flow(project, "x = bytearray(600 << 20)", "@docker(memory=256)"), "run")
    assert done.code != 0
    assert "reached its memory limit" in done.output


def test_what_was_recorded_names_the_image_and_the_limits(project, docker):
    project.run(flow(project, "pass"), "run").ok()
    facts = project.client('answer = Flow("Contained").latest_run["inside"].task.metadata_dict')
    image = docker.docker("image", "inspect", "--format", "{{.Id}}", engines.IMAGE).stdout.strip()
    assert facts["sandbox-image"] == image
    assert facts["sandbox-provider"].startswith("Docker ")
    assert facts["sandbox-limits"].startswith("control groups")
    assert facts["sandbox-network"] == "proxy"


def test_an_image_with_another_python_and_nothing_else_will_do(project, small):
    step = 'self.seen = [open("/opt/app/note").read(), os.environ["FROM_IMAGE"], sys.prefix]'
    project.run(flow(project, step, f'@docker(image="{small}")'), "run").ok()
    assert data(project, "seen") == [["from the image", "yes", "/usr"]]


def test_setup_runs_once_as_root_and_its_result_is_found_again(project, small, docker):
    setup = ["id -u > /opt/who", "echo $HOME >> /opt/who; echo run >> /opt/who"]
    decorator = f'@docker(image="{small}", setup={setup!r})'
    name = flow(project, 'self.who = open("/opt/who").read().split()', decorator)
    first = project.run(name, "run").ok()
    assert "setup: id -u" in first.output
    assert data(project, "who") == [["0", "/root", "run"]]
    second = project.run(name, "run").ok()
    assert "setup: id -u" not in second.output
    made = docker.docker("images", "--quiet", SANDBOX).stdout.split()
    docker.docker("rmi", *made)


def test_what_was_made_for_a_run_that_was_killed_is_removed_by_gc(project, small, docker):
    decorator = f'@docker(image="{small}", setup=["echo > /opt/here"], cache=False)'
    name = flow(project, 'print("it waits", flush=True)\ntime.sleep(600)', decorator)
    command = [sys.executable, "-m", "metaflow_sandbox.cli", "gc", "--backend", "docker"]

    def left_by_gc():
        subprocess.run(command, env=project.environment, check=True)
        label = "label=metaflow-sandbox-once"
        return docker.docker("images", "--quiet", "--filter", label).stdout.split()

    run = project.start(name, "run")
    said = []
    while not said or said[-1] and b"it waits" not in said[-1]:
        said.append(run.stdout.readline())
    assert said[-1], b"".join(said)
    assert len(left_by_gc()) == 1
    run.kill()
    run.communicate()
    assert left_by_gc() == []


def test_a_package_is_installed_by_dpkg_while_a_step_runs(project, docker, tmp_path):
    step = """
import subprocess
os.makedirs("/tmp/p/DEBIAN"); os.makedirs("/tmp/p/opt/hello")
open("/tmp/p/DEBIAN/control", "w").write(
    "Package: hello-here\\nVersion: 1\\nArchitecture: all\\nMaintainer: x <x@y>\\n"
    "Description: x\\n")
open("/tmp/p/DEBIAN/postinst", "w").write("#!/bin/sh\\nchown daemon:daemon /opt/hello/file\\n")
os.chmod("/tmp/p/DEBIAN/postinst", 0o755)
open("/tmp/p/opt/hello/file", "w").write("installed")
subprocess.run(["dpkg-deb", "--build", "/tmp/p", "/tmp/p.deb"], check=True)
subprocess.run(["apt-get", "install", "-y", "/tmp/p.deb"], check=True)
self.owner = os.stat("/opt/hello/file").st_uid
"""
    project.run(flow(project, step, '@docker(root="writable")'), "run").ok()
    assert data(project, "owner") == [1]


def test_the_root_can_not_be_written_unless_that_was_asked(project):
    step = """
try:
    open("/usr/bin/mine", "w")
except OSError as e:
    self.error = e.errno
"""
    project.run(flow(project, step), "run").ok()
    assert data(project, "error") == [30]


def test_values_of_env_and_keys_reach_the_step_and_no_command_line(project, docker):
    step = """
import glob
self.key = os.environ["TOKEN"]
self.lines = [open(p, "rb").read().decode() for p in glob.glob("/proc/[0-9]*/cmdline")]
open(os.environ["TMPDIR"] + "/wait", "w"); time.sleep(3)
"""
    name = flow(project, step, '@docker(env=["TOKEN"])')
    process = project.start(name, "run", env={"TOKEN": "s3cret-token"})
    seen = []
    while process.poll() is None:
        for identifier in docker.docker("ps", "--quiet", check=False).stdout.split():
            seen.append(docker.docker("inspect", identifier, check=False).stdout)
        done = subprocess.run(["ps", "-eo", "args", "-ww"], capture_output=True, text=True)
        seen.append(done.stdout)
    assert process.wait() == 0
    key, lines = data(project, "key", "lines")
    assert key == "s3cret-token"
    assert any("metaflow-run" in s for s in seen)
    assert not [s for s in [*seen, *lines] if "s3cret-token" in s]


# --- what is refused, and what to do


def refused(project, decorator, env=None):
    """What a run says that must fail before any step of it."""
    name = flow(project, "pass", decorator, before='print("a step has run")')
    done = project.run(name, "run", env=env)
    assert done.code != 0
    assert "a step has run" not in done.output
    assert "Traceback" not in done.output, done.output
    return done.output


def test_an_image_without_python_is_refused(project, docker, tmp_path):
    with tarfile.open(tmp_path / "empty.tar", "w") as tar:
        (tmp_path / "file").write_text("x")
        tar.add(tmp_path / "file", arcname="file")
    docker.docker("import", str(tmp_path / "empty.tar"), "no-python:1")
    output = refused(project, '@docker(image="no-python:1")')
    assert "no-python:1" in output
    assert "no python3 on its PATH" in output


#: What is in the place of an image's python3, and what is said of it.
NO_PYTHON = {
    "none": ("#!/bin/sh\necho hello\n", "python3 is none"),
    "too old": (
        '#!/bin/sh\nexec /usr/bin/real -I -S -c "import sys; sys.version_info = (3, 7)\n'
        'sys.version = \'3.7.17 of this test\'\n$4" "$5"\n',
        "python3 3.7.17 is too old",
    ),
}


@pytest.mark.parametrize("kind", NO_PYTHON)
def test_an_image_whose_python_will_not_do_is_refused(project, docker, small, kind):
    program, said = NO_PYTHON[kind]
    script = (
        "import os; os.rename('/usr/bin/python3', '/usr/bin/real'); "
        f"open('/usr/bin/python3', 'w').write({program!r}); os.chmod('/usr/bin/python3', 0o755)"
    )
    docker.docker("run", "--name", "strange", "--network", "none", small, "python3", "-c", script)
    docker.docker("commit", "strange", "strange:1")
    docker.docker("rm", "strange")
    assert said in refused(project, '@docker(image="strange:1")')


def test_a_setup_that_fails_shows_what_it_said(project, small):
    output = refused(project, f"@docker(image=\"{small}\", setup=['echo what it said; exit 7'])")
    assert "exits with 7" in output
    assert "what it said" in output


def test_a_disk_that_no_driver_limits_is_refused_with_a_root_that_can_be_written(project):
    output = refused(project, '@docker(root="writable", disk=2048)')
    assert "disk= can't be held together with root" in output


def test_a_runtime_that_is_not_there_is_refused(project):
    output = refused(project, '@docker(runtime="runsc")')
    assert "docker info" in output


def test_gpus_are_refused_where_the_engine_has_none(project):
    assert "gpu=1 can't be enforced by docker" in refused(project, "@docker(gpu=1)")


def test_a_stopped_engine_is_named_with_the_command_that_starts_it(project, tmp_path):
    output = refused(project, "@docker", env={"DOCKER_HOST": f"unix://{tmp_path}/none.sock"})
    assert "systemctl start docker" in output


def test_without_a_client_program_the_ways_to_get_one_are_shown(project):
    output = refused(project, "@docker", env={"METAFLOW_SANDBOX_DOCKER": "no-such-program"})
    assert "there is no no-such-program" in output
    assert "docs.docker.com/engine/install" in output


@pytest.mark.skipif(os.getuid() != 0, reason="an ordinary user has no other to become")
def test_a_user_who_may_not_use_the_socket_is_told_how_to(project, docker):
    os.chmod(docker.socket, 0o600)
    done = subprocess.run(
        ["setpriv", "--reuid", "61234", "--regid", "61234", "--clear-groups",
         "docker", "--host", docker.host, "info"],
        capture_output=True, text=True,
    )  # fmt: skip
    from metaflow_sandbox.backends.docker.engine import explain

    error = explain(done.stderr, "preflight")
    assert error.code == "backend_unavailable"
    assert "usermod -aG docker" in str(error)


# --- registries


@pytest.fixture
def server(docker, small, tmp_path):
    with registry.serving(tmp_path) as server:
        docker.docker("tag", small, f"{server.address}/private/image:1")
        server.login(docker)
        docker.docker(*server.client, "push", f"{server.address}/private/image:1")
        docker.docker("rmi", f"{server.address}/private/image:1")
        yield server


def test_an_image_is_pulled_and_its_digest_is_recorded(project, server, docker):
    name = f"{server.address}/private/image:1"
    project.environment["DOCKER_CONFIG"] = str(server.config)
    done = project.run(flow(project, "pass", f'@docker(image="{name}")'), "run").ok()
    assert f"the image {name} is pulled" in done.output
    facts = project.client('answer = Flow("Contained").latest_run["inside"].task.metadata_dict')
    assert facts["sandbox-image"].startswith(f"{server.address}/private/image@sha256:")
    docker.docker("rmi", name)


def test_a_registry_that_refuses_says_how_to_log_in(project, server):
    output = refused(project, f'@docker(image="{server.address}/private/image:1")')
    assert f"docker login {server.address}" in output


@pytest.fixture
def little(request):
    """An engine with so many MB of disk."""
    if os.getuid() != 0:
        pytest.skip("NOT CHECKED as an ordinary user: only root can start an engine")
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:  # a short name, for sockets
        engine = engines.Dockerd(Path(directory) / "engine")
        data = engine.directory / "data"
        data.mkdir(parents=True)
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={request.param}m", "test", data], check=True
        )
        try:
            engine.start()
            yield engine
        finally:
            engine.stop()


@pytest.mark.parametrize(("little", "setup"), [(24, []), (256, ["cat /dev/zero > /big"])],
                         indirect=["little"], ids=["pull", "setup"])  # fmt: skip
def test_an_engine_whose_disk_is_full_says_how_to_make_room(project, server, little, setup):
    project.environment["DOCKER_HOST"] = little.host
    project.environment["DOCKER_CONFIG"] = str(server.config)
    name = f"{server.address}/private/image:1"
    output = refused(project, f"@docker(image={name!r}, setup={setup!r})")
    assert "no space left on device" in output.lower()
    assert "docker system prune" in output


def test_an_image_that_is_not_there_is_named(project, server):
    project.environment["DOCKER_CONFIG"] = str(server.config)
    output = refused(project, f'@docker(image="{server.address}/private/image:2")')
    assert "private/image:2" in output
    assert "no such tag" in output or "there is none" in output


def test_a_registry_that_does_not_answer_is_named(project):
    output = refused(project, '@docker(image="127.0.0.1:1/image:1")')
    assert "127.0.0.1:1/image:1" in output
    assert "must reach the registry" in output


def test_a_run_that_is_ended_while_it_pulls_ends(project, silent):
    flow(project, "pass", f'@docker(image="127.0.0.1:{silent.getsockname()[1]}/image:1")')
    project.ended_while_it_asks(silent, "run")
