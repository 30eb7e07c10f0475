"""Every byte that enters a sandbox, for a flow on a host full of secrets.

A hostile step looks at all that it can see; on the backend that sends archives, the bytes
that were sent are searched too. What is found is held against `what_goes_in.py`.
"""

import gzip
import io
import json
import re
import secrets
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
from pathlib import Path

import pytest
import what_goes_in as manifest

LOOKING = r'''
    import gzip, os, re, stat

    SECRET = re.compile(rb"canary-[0-9a-f]{12}-[a-z0-9-]+[a-z]")
    OF_A_LIBRARY = re.compile(r"^/usr/|/lib/python3[^ ]*\.(py|pyc|so|a|h)$")
    LARGE = 64 << 20

    def secrets_in(data):
        if data[:2] == b"\x1f\x8b":
            try:
                data += gzip.decompress(data)
            except Exception:
                pass
        return sorted({m.decode() for m in SECRET.findall(data)})

    def content(path):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            return b""
        with os.fdopen(fd, "rb") as f:
            try:
                return f.read(LARGE) or b""
            except OSError:
                return b""

    def files(root, without):
        for folder, names, found in os.walk(root):
            names[:] = [n for n in names if os.path.join(folder, n) not in without]
            for name in found + [n for n in names if os.path.islink(os.path.join(folder, n))]:
                yield os.path.join(folder, name)

    def look(root, without=()):
        """All paths, and {path: the secrets that are in it}."""
        paths, hits = [], {}
        for path in files(root, without):
            paths.append(path)
            if os.path.islink(path):
                data = os.readlink(path).encode()
            elif OF_A_LIBRARY.search(path):
                continue
            else:
                data = content(path)
            found = sorted({*secrets_in(data), *secrets_in(path.encode())})
            if found:
                hits[path] = found
        for pid in [p for p in os.listdir("/proc") if p.isdigit()]:
            for name in ("cmdline", "environ", "mountinfo", "maps", "status", "cgroup"):
                found = secrets_in(content("/proc/%s/%s" % (pid, name)))
                if found:
                    hits["/proc/%s" % name] = found
            fds = "/proc/%s/fd" % pid
            try:
                for fd in os.listdir(fds):
                    found = secrets_in(content(fds + "/" + fd))
                    if found:
                        hits["descriptor"] = found
            except OSError:
                pass
        return paths, hits
'''
FLOW = """
    import json, os
    from metaflow import Config, FlowSpec, IncludeFile, Parameter, environment, sandbox, step

    class Goes(FlowSpec):
        settings = Config("settings", default="settings.json")
        key = Parameter("key", default="none")
        text = IncludeFile("text", default="included.txt")

        @environment(vars={"OTHER": os.environ.get("PLANT_OTHER", "")})
        @step
        def start(self):
            self.unused = os.environ["PLANT_UNUSED"]
            self.next(self.first, self.second)

        @environment(vars={"OTHER": os.environ.get("PLANT_OTHER", "")})
        @step
        def first(self):
            self.of_another_task = os.environ["PLANT_TASK"]
            self.next(self.join)

        %s
        @step
        def second(self):
            import looking
            pipes = ["pipe:" in os.readlink("/proc/self/fd/%%d" %% fd) for fd in (1, 2)]
            fds = sorted(int(fd) for fd in os.listdir("/proc/self/fd"))
            null = os.readlink("/proc/self/fd/0")
            with open("/proc/self/cmdline") as f:
                self.argv = f.read().split("\\0")
            with open(self.argv[self.argv.index("--input-paths-filename") + 1]) as f:
                f.read()
            inbox = os.environ["METAFLOW_HOME"].partition("/attempt/")[0]
            self.job = sorted(json.load(open(inbox + "/attempt/job.json")))
            root = "/" if inbox == "/inbox" else inbox
            self.found = looking.look(root, ("/proc", "/sys", "/dev", "/sandbox"))
            self.variables = dict(os.environ)
            self.descriptors = [null, pipes, fds]
            self.next(self.join)

        @sandbox(env=["ANOTHER"], network=False)
        @step
        def join(self, inputs):
            self.next(self.end)

        @step
        def end(self):
            pass

    if __name__ == "__main__":
        Goes()
"""


UV_PROJECT = """
    [project]
    name = "project"
    version = "1"
    requires-python = ">=3.8"
    [[tool.uv.index]]
    name = "ours"
    url = "https://user:%s@example.org/simple"
    explicit = true
"""
UV_LOCK = """
    # https://user:%s@example.org/simple
    version = 1
    requires-python = ">=3.8"
    [[package]]
    name = "project"
    version = "1"
    source = { virtual = "." }
"""


class Host:
    """A machine with secrets in all the places where people keep them."""

    def __init__(self, project):
        self.project = project
        self.token = secrets.token_hex(6)
        self.home = Path(project.environment["HOME"])
        self.outside = project.directory.parent / "outside"
        self.capture = project.directory.parent / "capture"
        self.capture.mkdir()
        self._files()
        self.python = self._environment()
        self.variables = {
            **project.environment,
            "SECRET": self.canary("environment"),
            "AWS_SECRET_ACCESS_KEY": self.canary("aws-key"),
            "AWS_SESSION_TOKEN": self.canary("aws-session"),
            "E2B_API_KEY": self.canary("e2b-key"),
            "DAYTONA_API_KEY": self.canary("daytona-key"),
            **self.uv_password(),
            "ANOTHER": self.canary("other-env"),
            "PLANT_OTHER": self.canary("other-environment"),
            "PLANT_UNUSED": self.canary("unused"),
            "PLANT_TASK": self.canary("other-task"),
            "WANTED": self.canary("named"),
            "PYTHONPATH": f"{project.environment['PYTHONPATH']}:{self.outside / 'path'}",
            "CAPTURE": str(self.capture),
            "METAFLOW_SANDBOX_BACKEND": "bubblewrap",
        }

    def uv_password(self):
        """For the index of `UV_PROJECT`."""
        return {
            "UV_INDEX_OURS_USERNAME": "user",
            "UV_INDEX_OURS_PASSWORD": self.canary("uv-password"),
        }

    def canary(self, name):
        assert name in manifest.STAYS_OUT or name in manifest.GOES_IN
        return f"canary-{self.token}-{name}"

    def _put(self, path, name, form="%s"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(form) % self.canary(name))

    def _files(self):
        home, here, outside = self.home, self.project.directory, self.outside
        self._put(home / ".aws/credentials", "home-aws")
        self._put(home / ".ssh/id_ed25519", "home-ssh")
        self._put(home / ".netrc", "home-netrc", "machine x login y password %s")
        self._put(home / ".config/pip/pip.conf", "home-pip")
        headers = '{"METAFLOW_SERVICE_HEADERS": "{\\"x-api-key\\": \\"%s\\"}"}'
        self._put(home / ".metaflowconfig/config.json", "home-metaflow", headers)
        self._put(here / ".env", "dotenv", "KEY=%s")
        self._put(here / ".hidden.py", "hidden-file", "KEY = '%s'")
        self._put(here / ".hidden/module.py", "hidden-directory", "KEY = '%s'")
        self._put(here / "notes.txt", "other-suffix")
        self._put(here / "pyproject.toml", "uv-index", UV_PROJECT)
        self._put(here / "uv.lock", "uv-index", UV_LOCK)
        locked = (
            '{"id": {"linux-64": {"conda": [{"url": "https://u:%s@example.org/a-1-0.conda"}]}}}'
        )
        self._put(here / ".metaflow/Goes/conda.manifest", "conda-channel", locked)
        self._put(here / "included.txt", "included")
        self._put(here / "settings.json", "config", '{"key": "%s"}')
        self._put(here / ".metaflow/Goes/7/start/1/0.data.json", "other-run")
        self._put(here / ".metaflow/Goes/data/ab" / ("ab" + 38 * "0"), "other-run")
        self._put(outside / "file.py", "linked-file", "KEY = '%s'")
        self._put(outside / "directory/module.py", "linked-directory", "KEY = '%s'")
        self._put(outside / "editable/package.py", "editable", "KEY = '%s'")
        self._put(outside / "path/on_path.py", "pythonpath", "KEY = '%s'")
        (here / "linked.py").symlink_to(outside / "file.py")
        (here / "linked").symlink_to(outside / "directory")
        (here / "inner.py").write_text("INNER = 1")
        (here / "inner_link.py").symlink_to("inner.py")  # stays within
        remote = f"https://user:{self.canary('git-remote')}@example.invalid/repo.git"
        for command in (["init", "-q"], ["remote", "add", "origin", remote]):
            subprocess.run(["git", *command], cwd=here, check=True)

    def _environment(self):
        """A virtual environment of its own, that has the packages of this one."""
        venv = self.project.directory.parent / "venv"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
        self._put(venv / "pip.conf", "venv-pip", "[global]\nindex-url = https://u:%s@x/simple")
        self._put(venv / ".netrc", "venv-netrc")
        packages = next((venv / "lib").glob("python*/site-packages"))
        ours = sysconfig.get_path("purelib")
        (packages / "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
        (packages / "planted.pth").write_text(f"{self.outside / 'editable'}\n")
        self.trees = [str(venv)]
        return str(venv / "bin" / "python")

    def run(self, decorator, *options):
        here = self.project.directory
        self.project.write("looking.py", LOOKING)
        self.project.write("flow.py", FLOW % decorator)
        done = subprocess.run(
            [self.python, "flow.py", "--no-pylint", "run", "--key", self.canary("parameter"),
             "--with", "environment:vars=" + json.dumps({"GIVEN": self.canary("with-environment")}),
             *options],
            cwd=here, env=self.variables, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        self.output = done.stdout + done.stderr
        return self.project.client(
            """
            d = Flow("Goes").latest_run["second"].task.data
            paths, hits = d.found
            answer = {"paths": paths, "hits": hits, "variables": d.variables,
                      "argv": d.argv, "job": d.job, "descriptors": d.descriptors}
            """,
            env=self.variables,
        )


@pytest.fixture
def host(project):
    return Host(project)


def named(secret):
    return secret.split("-", 2)[2]


def shown(path, inbox, trees):
    """A path as the rules write it."""
    if path == inbox or path.startswith(inbox + "/"):
        return "INBOX" + path[len(inbox) :]
    for tree in trees:
        if path == tree or path.startswith(tree + "/"):
            return "PYTHON"
    return path


def held_against_the_manifest(seen, inbox, trees, where):
    rules = [r for r in manifest.FILES if r.where in (manifest.BOTH, where)]
    used, unlisted, misplaced = set(), [], []
    for path in seen["paths"]:
        rule = next((r for r in rules if r.covers(shown(path, inbox, trees))), None)
        if rule is None:
            unlisted.append(path)
        else:
            used.add(rule)
        for secret in seen["hits"].get(path, ()):
            allowed = manifest.GOES_IN.get(named(secret), ("", ()))[1]
            if rule is None or rule.shown not in allowed:
                misplaced.append((named(secret), path))
    elsewhere = {p: h for p, h in seen["hits"].items() if p not in set(seen["paths"])}
    for secret in elsewhere.pop("/proc/environ", ()):
        if named(secret) not in ("named", "with-environment"):
            misplaced.append((named(secret), "environ"))
    assert not unlisted, unlisted
    assert not misplaced, misplaced
    assert elsewhere == {}
    assert [r.shown for r in rules if r not in used and not r.may] == []


def check(host, seen, inbox, trees, where):
    held_against_the_manifest(seen, inbox, trees, where)
    assert seen["job"] == manifest.JOB
    variables = seen["variables"]
    listed = {*manifest.VARIABLES, *manifest.SANDBOX_VARIABLES, "WANTED", "GIVEN"}
    assert set(variables) - listed == set()
    assert set(manifest.VARIABLES) - set(variables) == set()
    assert variables["WANTED"] == host.canary("named")
    null, pipes, descriptors = seen["descriptors"]
    assert null == "/dev/null" and pipes == [True, True]
    assert descriptors[:3] == [0, 1, 2] and len(descriptors) <= 4  # and what listed them
    assert host.token not in " ".join(seen["argv"])
    # It was found by the same search where it does go in, so it would have been elsewhere.
    found = {named(s) for hits in seen["hits"].values() for s in hits}
    assert found == set(manifest.GOES_IN), seen["hits"]


SANDBOXED = '@sandbox(env=["WANTED"], network=False)'


def test_only_what_is_listed_is_in_a_sandbox_that_binds_directories(host):
    seen = host.run(SANDBOXED)
    trees = [str(Path(p)) for p in (*host.trees, *python_trees(host.python))]
    check(host, seen, "/inbox", trees, manifest.BOUND)
    assert "Not in any sandbox: " in host.output
    assert "linked.py" in host.output and "linked/module.py" in host.output
    names = {Path(p).name for p in seen["paths"] if p.startswith("/inbox/code/")}
    assert {"inner.py", "inner_link.py"} <= names


def test_only_what_is_listed_is_sent_to_a_sandbox_that_gets_archives(host):
    seen = host.run(SANDBOXED.replace("(", '(backend="capturing", ', 1))
    check(host, seen, "/sandbox/inbox", [], manifest.SENT)
    sent = everything_sent(host.capture)
    allowed = set(manifest.GOES_IN)
    assert {named(s) for s in re.findall(rf"canary-{host.token}-[a-z0-9-]+[a-z]", sent)} == allowed
    for path in host.capture.iterdir():
        if path.name in ("create", "commands"):
            assert host.token not in path.read_text()


def everything_sent(capture):
    """All bytes that were written, archives unpacked, as text."""
    parts = []
    for path in sorted(capture.iterdir()):
        data = path.read_bytes()
        parts.append(data)
        if path.name.startswith("write-") and tarfile.is_tarfile(path):
            with tarfile.open(path) as archive:
                for member in archive:
                    assert (member.uid, member.gid, member.uname, member.gname) == (0, 0, "", "")
                    parts.append(member.name.encode())
                    assert member.isreg() or member.isdir()
                    if member.isreg():
                        content = archive.extractfile(member).read()
                        if content[:2] == b"\x1f\x8b":
                            content += gzip.GzipFile(fileobj=io.BytesIO(content)).read()
                        parts.append(content)
    return b"\n".join(parts).decode("latin-1")


def python_trees(python):
    script = "from metaflow_sandbox.backends.bubblewrap import policy; print(policy.python_trees())"
    code = f"{script.replace('print(', 'print(*map(str, ')})"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


GIVEN = """
    from metaflow import FlowSpec, conda_base, step

    %s
    class Goes(FlowSpec):
        @step
        def start(self):
            import looking
            self.paths, self.hits = looking.look("/inbox")
            self.next(self.end)

        @step
        def end(self):
            pass

    if __name__ == "__main__":
        Goes()
"""


def test_what_with_gives_to_a_sandbox_stays_outside(host):
    """Metaflow puts the decorators of --with on every task's command line."""
    host.project.write("looking.py", LOOKING)
    host.project.write("flow.py", GIVEN % "")
    given = "bubblewrap:network=" + json.dumps([host.canary("with-sandbox") + ".example.org"])
    host.project.run("flow.py", "run", "--with", given).ok()
    answer = 'answer = Flow("Goes").latest_run["start"].task.data.hits'
    assert host.project.client(answer) == {}


@pytest.mark.parametrize("kind", ["uv", "conda"])
def test_what_metaflow_makes_environments_from_stays_outside(host, kind):
    """It packs the lock, in which addresses of indexes and channels have passwords."""
    host.project.write("looking.py", LOOKING)
    host.project.write("flow.py", GIVEN % ("@conda_base(disabled=True)" if kind == "conda" else ""))
    path = f"{Path(sys.executable).parent}:{host.project.environment['PATH']}"
    env = {"PATH": path, **host.uv_password()}
    host.project.run(
        "flow.py", f"--environment={kind}", "run", "--with", "bubblewrap", env=env
    ).ok()
    answer = """
    d = Flow("Goes").latest_run["start"].task.data
    answer = [d.paths, d.hits]
    """
    paths, hits = host.project.client(answer)
    listed = [rule for rule in manifest.FILES if rule.where in (manifest.BOTH, manifest.BOUND)]
    shown_as = [shown(path, "/inbox", []) for path in paths]
    assert [path for path in shown_as if not any(rule.covers(path) for rule in listed)] == []
    assert hits == {}


def test_the_page_of_the_manual_is_the_manifest():
    assert manifest.PAGE.read_text() == manifest.page(), "run: python tests/attacks/what_goes_in.py"


def test_secrets_are_seen_without_a_sandbox(host):
    """The control: the same search, in a step that isn't sandboxed, finds what it should not."""
    source = (
        "import json, looking; paths = []\n"
        "_, hits = looking.look('.'); _, more = looking.look(%r)\n"
        "print(json.dumps(sorted({h for hs in [*hits.values(), *more.values()] for h in hs})))"
    )
    host.project.write("looking.py", LOOKING)
    done = subprocess.run(
        [sys.executable, "-c", source % str(host.project.directory.parent)],
        cwd=host.project.directory, env=host.variables, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = {named(s) for s in json.loads(done.stdout)}
    given_in_the_run = {"parameter", "with-environment", "with-sandbox"}
    assert found >= set(manifest.STAYS_OUT) - given_in_the_run
