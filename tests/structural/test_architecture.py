"""The architecture, held by reading the source: worlds, layers, registration, documents."""

import ast
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
TRAVELS = sorted((SOURCE / "metaflow_extensions").rglob("*.py"))
PROGRAMS = [
    SOURCE / "metaflow_sandbox/agent/agent.py",
    SOURCE / "metaflow_sandbox/backends/operations.py",
    SOURCE / "metaflow_sandbox/backends/docker/box.py",
    SOURCE / "metaflow_sandbox/backends/boxlite/inside.py",
    SOURCE / "metaflow_sandbox/backends/bubblewrap/box.py",
    SOURCE / "metaflow_sandbox/backends/bubblewrap/enter.py",
    SOURCE / "metaflow_sandbox/backends/bubblewrap/unpack.py",
    SOURCE / "metaflow_sandbox/backends/daytona/runner.py",
    SOURCE / "metaflow_sandbox/environments/install.py",
    SOURCE / "metaflow_sandbox/backends/e2b/inside.py",
]
HOST = sorted((SOURCE / "metaflow_sandbox").rglob("*.py"))
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]

# Who may import whom: data flows from the decorator to the launcher, then to the
# backend and through admission to the datastore.
LAYERS = {
    "errors": set(),
    "concurrency": set(),
    "settings": {"errors"},
    "text": set(),
    "leases": {"errors"},
    "cache": {"errors", "concurrency", "settings"},
    "agent": {"errors"},
    "egress": set(),
    "backends": {"errors", "concurrency", "leases", "egress", "cache", "settings", "text"},
    "environments": {"errors", "backends"},
    "admission": {"errors"},
    "launch": {
        "errors",
        "concurrency",
        "leases",
        "agent",
        "backends",
        "cache",
        "environments",
        "admission",
        "egress",
        "manage",
        "settings",
    },
    "testing": {"errors", "backends"},
    "manage": {"errors", "leases", "backends"},
    "release": {"errors"},
    "cli": {"errors", "backends", "cache", "manage", "release"},
}


def imports(path):
    """(module, whether it is imported when the file is loaded) of every import."""
    tree = ast.parse(path.read_text())
    loaded = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in loaded
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), id(node) in loaded


@pytest.mark.parametrize("path", TRAVELS, ids=lambda p: str(p.relative_to(SOURCE)))
def test_what_travels_needs_only_the_standard_library_and_metaflow(path):
    for module, at_load in imports(path):
        top = module.split(".")[0]
        allowed = top in sys.stdlib_module_names or top in ("metaflow", "")
        # The host's package is imported where only the launching process gets to, and
        # what owns a type of data when there is a value of it to be read.
        late = {"numpy", "pandas", "pytz"} if "pickles" in path.parts else {"metaflow_sandbox"}
        assert allowed or (top in late and not at_load), module


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: p.name)
def test_a_program_that_runs_inside_needs_only_the_standard_library(path):
    for module, _ in imports(path):
        # `boxed.bundle` puts this one into the programs that import it.
        together = module == "metaflow_sandbox.backends.operations"
        assert together or module.split(".")[0] in sys.stdlib_module_names, module


def test_metaflow_loads_without_the_hosts_package():
    script = (
        "import sys; sys.modules['metaflow_sandbox'] = None; import metaflow; "
        "print(metaflow.sandbox, metaflow.e2b)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "SandboxDecorator" in done.stdout or "functools.partial" in done.stdout, done.stderr


def test_loading_metaflow_loads_neither_the_hosts_package_nor_an_sdk():
    script = (
        "import sys, metaflow; "
        "print([m for m in ('metaflow_sandbox', 'anyio', 'e2b', 'daytona', 'boxlite', 'docker') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("path", HOST, ids=lambda p: str(p.relative_to(SOURCE)))
def test_layers_import_only_what_is_below_them(path):
    parts = path.relative_to(SOURCE / "metaflow_sandbox").with_suffix("").parts
    layer = parts[0]
    if layer == "__init__":
        return
    package = list(parts[:-1])
    for module, _ in imports(path):
        if module.startswith("."):
            level = len(module) - len(module.lstrip("."))
            base = package[: len(package) - level + 1]
            target = (base + [p for p in module.lstrip(".").split(".") if p])[:1]
        elif module.startswith("metaflow_sandbox."):
            target = [module.split(".")[1]]
        else:
            continue
        if target and target[0] != layer:
            assert target[0] in LAYERS[layer], f"{layer} imports {target[0]}"


@pytest.mark.parametrize("path", [*HOST, *TRAVELS], ids=lambda p: str(p.relative_to(SOURCE)))
def test_text_of_others_is_made_harmless_by_one_function(path):
    """`"".join(… c.isprintable() …)` is `text.printable`."""
    loops = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.GeneratorExp)]
    own = [n.lineno for n in loops if "isprintable" in ast.dump(n)]
    assert own == [] or path.name == "text.py"


def test_no_sdk_is_imported_when_a_backend_is_loaded():
    sdks = {"e2b", "daytona", "boxlite", "docker"}
    for path in (SOURCE / "metaflow_sandbox/backends").rglob("*.py"):
        for module, at_load in imports(path):
            assert not (at_load and module.split(".")[0] in sdks), path


def test_every_promised_backend_has_a_decorator_and_is_documented():
    from metaflow import metaflow_config

    from metaflow_extensions.sandbox.plugins import STEP_DECORATORS_DESC
    from metaflow_sandbox.backends.registry import PROMISED

    names = [name for name, _ in STEP_DECORATORS_DESC]
    assert names == metaflow_config.SANDBOX_DECORATORS
    assert names == ["sandbox", *PROMISED]
    text = (ROOT / "docs/configuration.md").read_text()
    for name in names:
        assert f"`@{name}`" in text


def test_every_installed_backend_is_promised_or_from_elsewhere():
    from metaflow_sandbox.backends.registry import GROUP, PROMISED

    ours = [e.name for e in entry_points(group=GROUP) if e.value.startswith("metaflow_sandbox.")]
    assert set(ours) <= set(PROMISED)


def test_every_parameter_and_setting_is_documented():
    from metaflow import sandbox  # noqa: F401

    from metaflow_extensions.sandbox.plugins.decorators import SandboxDecorator

    text = (ROOT / "docs/configuration.md").read_text()
    for parameter in SandboxDecorator.defaults:
        assert f"`{parameter}`" in text, parameter
    config = SOURCE / "metaflow_extensions/sandbox/config/mfextinit_sandbox.py"
    for setting in re.findall(r'from_conf\("(SANDBOX_\w+)"', config.read_text()):
        assert f"`METAFLOW_{setting}`" in text, setting


def test_spin_refuses_every_decorator():
    from metaflow import metaflow_config

    assert set(metaflow_config.SANDBOX_DECORATORS) <= set(
        metaflow_config.SPIN_DISALLOWED_DECORATORS
    )


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_and_named_files_in_documents_exist(path):
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (path.parent / target).exists(), target
    for named in re.findall(r"`((?:src|tests|docs|examples|benchmarks|scripts)/[\w./-]+)`", text):
        assert (ROOT / named).exists(), named


@pytest.mark.parametrize("path", [*HOST, *TRAVELS], ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_message_names_a_page_that_is_not_installed(path):
    tree = ast.parse(path.read_text())
    notes = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in notes]
    named = [found for n in texts for found in re.findall(r"[\w/-]+\.md\b", str(n.value))]
    assert named == []


def test_tests_that_security_names_exist():
    text = (ROOT / "docs/security.md").read_text()
    named = re.findall(r"`(test_\w+)`", text)
    assert len(named) > 20
    sources = "\n".join(p.read_text() for p in (ROOT / "tests").rglob("*.py"))
    sources += (SOURCE / "metaflow_sandbox/testing/contract.py").read_text()
    for name in named:
        assert f"def {name}(" in sources, name


def test_the_page_of_attacks_is_the_suite():
    from importlib.machinery import SourceFileLoader

    table = SourceFileLoader("attack_table", str(ROOT / "scripts/attack-table")).load_module()
    assert table.PAGE.read_text() == table.page(), "run: scripts/attack-table --page"
