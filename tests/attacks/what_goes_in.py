"""What goes into a sandbox: every path, variable and descriptor. Makes docs/what-goes-in.md.

    python tests/attacks/what_goes_in.py      writes that page anew

`test_what_goes_in.py` looks at all that is in a sandbox: what no rule here lists fails it,
and so does a rule for which nothing is there.
"""

import re
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "what-goes-in.md"
BOTH, BOUND, SENT = "everywhere", "bubblewrap", "clouds"


@dataclass(frozen=True)
class Rule:
    """Attributes:
    shown: how the page writes it; INBOX is /inbox, or where a backend has it.
    pattern: what it covers, matched against a whole path.
    where: on which backends it is.
    may: whether it may be absent.
    """

    shown: str
    pattern: str
    what: str
    where: str = BOTH
    may: bool = False

    def covers(self, path):
        return re.fullmatch(self.pattern, path) is not None


_STORE = r"INBOX/attempt/datastore/Goes"
FILES = [
    Rule("INBOX/attempt/agent.py", r"INBOX/attempt/agent\.py", "the program that runs the step"),
    Rule(
        "INBOX/attempt/job.json",
        r"INBOX/attempt/job\.json",
        "the step's command line, its identifiers, its variables, the keys of its inputs, limits",
    ),
    Rule("INBOX/attempt/input-paths", r"INBOX/attempt/input-paths", "identifiers of its inputs"),
    Rule(
        "INBOX/attempt/metaflow/config.json",
        r"INBOX/attempt/metaflow/config\.json",
        "a fixed configuration of Metaflow; yours stays out",
    ),
    Rule(
        "INBOX/attempt/files/*",
        r"INBOX/attempt/files/[0-9a-f]{16}",
        "content of `IncludeFile` Parameters",
    ),
    Rule(
        "…/datastore/FLOW/RUN/STEP/TASK/N.*",
        rf"{_STORE}/\d+/\w+/\d+/\d\.(attempt\.json|data\.json|DONE\.lock)",
        "for each direct input of the step: the record of its artifacts, with their sizes and "
        "types",
    ),
    Rule(
        "…/datastore/FLOW/data/*",
        rf"{_STORE}/data/[0-9a-f]{{2}}/[0-9a-f]{{40}}(_meta)?",
        "the artifacts of these inputs, all of them, since nobody knows before which a step "
        "reads: Parameters and Configs are among them. `_graph_info` goes in without the values "
        "of decorators",
    ),
    Rule(
        "…/datastore/FLOW/**/_meta/_self.json",
        rf"{_STORE}(/\d+(/\w+(/\d+)?)?)?/_meta/_self\.json",
        "identifiers of the run, the step and the task, and your user name as Metaflow has it",
    ),
    Rule(
        "INBOX/code/*.py",
        r"INBOX/code/(?!\.)[\w/]+\.(py|R|RDS)",
        "your code: the files of the flow's directory that Metaflow packs, by suffix (`.py`, "
        "`.R`, `.RDS` and those of `--package-suffixes`). No file or directory whose name begins "
        "with a dot (a suffix that is a whole name, as `.env`, takes such a file in); nothing that "
        "a link leads to outside of that directory",
    ),
    Rule(
        "INBOX/code/.mf_code/metaflow",
        r"INBOX/code/\.mf_code/metaflow/.+",
        "Metaflow; on bubblewrap as it is installed",
    ),
    Rule(
        "INBOX/code/.mf_code/metaflow_extensions",
        r"INBOX/code/\.mf_code/metaflow_extensions/.+",
        "every extension of Metaflow that is installed, this one too",
    ),
    Rule(
        "INBOX/code/.mf_meta/INFO",
        r"INBOX/code/\.mf_meta/INFO",
        "versions, the platform, the script's name: no git remote, no user, no path",
    ),
    Rule(
        "INBOX/code/.mf_meta/CONFIG",
        r"INBOX/code/\.mf_meta/CONFIG",
        "the values of all `Config`s of the flow: Metaflow makes the flow's class from them, in "
        "every step. What only one step should know belongs in its `env=[…]`",
    ),
    Rule(
        "INBOX/code/.mf_meta/**",
        r"INBOX/code/\.mf_(code|meta)/(\.mf_install|dist_info.*|DIST_INFO|INFO|\.mf_meta.*)|"
        r"INBOX/code/\.mf_install|INBOX/code/.mf_meta/[\w.]+",
        "Metaflow's list of what is packed, and what entry points the packed packages have",
        may=True,
    ),
    Rule(
        "INBOX/environments/*",
        r"INBOX/environments/[0-9a-f]{16}/.+",
        "the step's environment, where it has one (`@conda`, `@pypi`, `--environment=uv`); in "
        "`/opt/metaflow-sandbox` on boxlite and docker",
        may=True,
    ),
    Rule(
        "/etc/*",
        r"/etc/(ld\.so\.cache|ssl/certs|ca-certificates|pki|alternatives|localtime|"
        r"nsswitch\.conf|mime\.types)(/.*)?",
        "the linker's cache, certificates, the time zone, what programs are called",
        BOUND,
    ),
    Rule(
        "/etc/passwd, group, hosts",
        r"/etc/(passwd|group|hosts|resolv\.conf)",
        "made anew: two users and `localhost`",
        BOUND,
    ),
    Rule("/run/box.py", r"/run/box\.py", "the sandbox's first process", BOUND),
    Rule("/usr, /bin, /lib*", r"/(usr|bin|sbin|lib\w*)(/.*)?", "the system's programs", BOUND),
    Rule(
        "the Python environment",
        r"PYTHON(/.*)?",
        "the interpreter's and the virtual environment's directories, but for `pip.conf`, "
        "`.netrc`, `.pypirc`, `.env`, `.condarc` in their top. No sources of editable installs, "
        "nothing of PYTHONPATH. Where they lie on the host can be seen",
        BOUND,
    ),
]
#: Names of variables, beside those of `@environment`, `env=` and bubblewrap's own.
VARIABLES = [
    "METAFLOW_CARD_LOCALROOT", "METAFLOW_DATASTORE_SYSROOT_LOCAL", "METAFLOW_DEFAULT_DATASTORE",
    "METAFLOW_DEFAULT_METADATA", "METAFLOW_EXTRACTED_ROOT", "METAFLOW_FLOW_FILENAME",
    "METAFLOW_HOME", "METAFLOW_RUNTIME_ENVIRONMENT", "METAFLOW_RUN_ID",
    "METAFLOW_SANDBOX_WORKLOAD", "METAFLOW_USER", "PYTHONDONTWRITEBYTECODE", "PYTHONPATH",
    "PYTHONUNBUFFERED",
]  # fmt: skip
SANDBOX_VARIABLES = ["HOME", "LANG", "PATH", "TMPDIR", "USER", "PWD"]
JOB = ["argv", "env", "known", "limits", "task"]

#: What was planted on the host: {name: where}. None of these may be anywhere inside.
STAYS_OUT = {
    "environment": "a variable of the shell that started the run",
    "aws-key": "`AWS_SECRET_ACCESS_KEY`",
    "aws-session": "`AWS_SESSION_TOKEN`",
    "e2b-key": "`E2B_API_KEY`",
    "daytona-key": "`DAYTONA_API_KEY`",
    "home-aws": "`~/.aws/credentials`",
    "home-ssh": "`~/.ssh/id_ed25519`",
    "home-netrc": "`~/.netrc`",
    "home-metaflow": "`~/.metaflowconfig/config.json`",
    "home-pip": "`~/.config/pip/pip.conf`",
    "git-remote": "a token in the URL of the git remote",
    "other-environment": "a value of another step's `@environment`",
    "other-env": "a variable that another step's `env=[…]` names",
    "uv-index": "a password of an index, in `pyproject.toml` and `uv.lock` of `--environment=uv`",
    "uv-password": "`UV_INDEX_NAME_PASSWORD`",
    "conda-channel": "a password of a channel, in the lock of `--environment=conda` and `=pypi`",
    "dotenv": "`.env` beside the flow",
    "hidden-file": "`.hidden.py` beside the flow",
    "hidden-directory": "`.hidden/module.py` beside the flow",
    "other-suffix": "`notes.txt` beside the flow",
    "linked-file": "a file outside of the flow's directory, by a link in it",
    "linked-directory": "a directory outside of the flow's directory, by a link in it",
    "editable": "the sources of an editable install",
    "pythonpath": "a directory of PYTHONPATH",
    "venv-pip": "`pip.conf` of the virtual environment",
    "venv-netrc": "`.netrc` of the virtual environment",
    "other-run": "an artifact of another run, in the same datastore",
    "other-task": "an artifact of a task that is no input of the step",
    "with-sandbox": "what `--with` gives to a sandbox decorator",
}
#: What was planted and does go in: {name: (what, {rules by `shown` where it may be})}.
_BLOBS = "…/datastore/FLOW/data/*"
_JOB = "INBOX/attempt/job.json"
GOES_IN = {
    "named": ("a variable that the step's `env=[…]` names", {_JOB}),
    "with-environment": ("`--with environment:vars=…`, which is given to every step", {_JOB}),
    "parameter": ("a Parameter", {_BLOBS}),
    "included": ("an `IncludeFile` Parameter's content", {"INBOX/attempt/files/*"}),
    "config": ("a Config", {_BLOBS, "INBOX/code/.mf_meta/CONFIG"}),
    "unused": ("an artifact of an input that the step doesn't read", {_BLOBS}),
}

_HEAD = """# What goes into a sandbox

<!-- Made by tests/attacks/what_goes_in.py, and held by tests/attacks/test_what_goes_in.py. -->

Everything that a sandboxed step can see of the machine that started it, and of its flow.
A test plants secrets wherever people keep them, runs a step that looks into every file,
process, variable and descriptor that it can find, and fails if one of them is there, or if
anything is there that this page doesn't list. It does so where directories are bound
(bubblewrap) and where inputs are sent as archives (as clouds get them), whose every byte it
reads too.

## Files

`INBOX` is `/inbox` on bubblewrap, `/sandbox/inbox` elsewhere.

| path | what it is | where |
| --- | --- | --- |
"""


def page():
    lines = [_HEAD]
    lines += [f"| {_code(r.shown)} | {r.what} | {r.where} |\n" for r in FILES]
    lines += ["\nThe content of `/usr` is the system's; it is listed here and not searched.\n"]
    lines += ["\n## The job file\n\n", ", ".join(map(_code, JOB)), ".\n\n## Variables\n\n"]
    lines += ["Set for every step: ", ", ".join(map(_code, VARIABLES)), ".\n"]
    lines += ["Those of the sandbox itself: ", ", ".join(map(_code, SANDBOX_VARIABLES)), ".\n"]
    lines += ["Then those of the step's `@environment`, `env=[…]` and `@secrets`, and no other.\n"]
    lines += ["\n## Processes and descriptors\n\n"]
    lines += ["A step sees its own processes, the agent's and the sandbox's first one. It has\n"]
    lines += ["three descriptors: `/dev/null` and two pipes.\n"]
    lines += ["\n## Planted, and not found inside\n\n"]
    lines += [f"* {where}\n" for where in STAYS_OUT.values()]
    lines += ["\n## Planted, and found where it belongs\n\n| what | where |\n| --- | --- |\n"]
    lines += [
        f"| {what} | {', '.join(map(_code, sorted(places)))} |\n"
        for what, places in GOES_IN.values()
    ]
    lines += [_TAIL]
    return "".join(lines)


def _code(text):
    return f"`{text}`" if re.search(r"[/*_A-Z.]", text) or text in JOB else text


_TAIL = """
Variables are in the job file and in the step's environment; nothing of `--with` that is
given to a sandbox decorator or to `@environment` is on the step's command line.

Configs and Parameters are the flow's own: Metaflow gives each to every step, and makes the
flow's class from them before a step runs, inside as outside. So they are no place for a
secret that only one step may know. `env=["NAME"]` and `@secrets` are.
"""


if __name__ == "__main__":
    PAGE.write_text(page())
