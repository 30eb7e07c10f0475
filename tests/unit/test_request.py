"""What a decorator asks for is checked before anything runs, and refused with the remedy."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from metaflow import metaflow_config
from metaflow.plugins.resources_decorator import ResourcesDecorator
from metaflow.plugins.timeout_decorator import TimeoutDecorator

from metaflow_extensions.sandbox.plugins.decorators import (
    BubblewrapDecorator,
    E2BDecorator,
    SandboxDecorator,
    SandboxException,
    _with_specs,
)
from metaflow_sandbox.backends.base import (
    Capabilities,
    Prepared,
    Recipe,
    SandboxSpec,
)
from metaflow_sandbox.errors import BackendUnavailable, NotEnforceable, SandboxError
from metaflow_sandbox.launch.request import TIMEOUT_MARGIN, InvalidParameter, Request
from tests.unit.idle import Idle


def a_deco(kind=SandboxDecorator, **attributes):
    deco = kind(attributes=attributes, statically_defined=True)
    deco.external_init()
    return deco


def a_request(*others, kind=SandboxDecorator, **attributes):
    deco = a_deco(kind, **attributes)
    return Request.from_decorator(deco, [deco, *others])


# --- single parameters ------------------------------------------------------------------

GOOD = [
    ("backend", "bubblewrap", "bubblewrap"),
    ("backend", "theirs", "theirs"),
    ("cpu", 2, 2.0),
    ("cpu", 0.5, 0.5),
    ("cpu", "1.5", 1.5),  # --with gives text
    ("memory", 512, 512),
    ("memory", "4096", 4096),
    ("memory", 512.0, 512),
    ("disk", 1, 1),
    ("gpu", 1, 1),
    ("image", "python:3.12-slim", "python:3.12-slim"),
    ("env", ["OPENAI_API_KEY", "_x1"], ("OPENAI_API_KEY", "_x1")),
    ("env", ("A",), ("A",)),
    ("env", [], ()),
    ("env", {"A": "", "B": "a\nvalue=ü"}, {"A": "", "B": "a\nvalue=ü"}),
    ("network", True, True),
    ("network", False, False),
    ("network", "False", False),
    ("network", "true", True),
    ("network", "api.openai.com", ("api.openai.com",)),
    ("network", ["PyPI.org", "*.pythonhosted.org"], ("pypi.org", "*.pythonhosted.org")),
    ("network", ["93.184.216.34", "xn--bcher-kva.example", "a-b.c_d.e"], ...),
    ("timeout", 60, 60),
    ("timeout", "60", 60),
    ("trust", "data", "data"),
    ("trust", "all", "all"),
    ("transfer", "relay", "relay"),
    ("setup", [], ()),
    ("setup", ["apt-get update", "apt-get install -y git"], ...),
    ("cache", True, True),
    ("cache", False, False),
    ("cache", "False", False),
    ("keep", "on-failure", "on-failure"),
    ("executable", "/usr/bin/python3.12", "/usr/bin/python3.12"),
]


@pytest.mark.parametrize(("name", "value", "expected"), GOOD)
def test_a_good_value_is_taken(name, value, expected):
    expected = tuple(value) if expected is ... else expected
    found = getattr(a_request(**{name: value}), name)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize("written", ["network=false", "network=False", 'network=["a.b"]'])
def test_what_with_gives_is_the_same_in_the_process_that_it_is_handed_on_to(written):
    given = SandboxDecorator.parse_decorator_spec(f"{written},cache=false")
    given.external_init()
    step = SimpleNamespace(decorators=[given])
    ((_, _, handed_on),) = [spec.partition(":") for spec in _with_specs([step])]
    received = SandboxDecorator.parse_decorator_spec(handed_on)
    received.external_init()
    request = Request.from_decorator(received, [received])
    assert request == Request.from_decorator(given, [given])
    assert request.cache is False


def test_nothing_asked_is_nothing_in_the_request():
    assert a_request() == Request(backend=metaflow_config.SANDBOX_BACKEND)


NO_NUMBERS = [
    0,
    -1,
    "",
    "many",
    "0",
    "-1",
    True,
    False,
    [],
    {},
    [1],
    float("nan"),
    float("inf"),
    1e20,
]
BAD = [
    *[
        (name, value)
        for name in ("cpu", "memory", "disk", "gpu", "timeout")
        for value in NO_NUMBERS
    ],
    *[(name, 1.5) for name in ("memory", "disk", "gpu", "timeout")],
    *[(name, "1.5") for name in ("memory", "disk", "gpu", "timeout")],
    *[(name, v) for name in ("image", "executable") for v in ("", "  ", 5, [], ["x"], True)],
    *[("backend", value) for value in ("  ", 5, ["x"], True)],
    ("env", "OPENAI_API_KEY"),
    ("env", 5),
    ("env", True),
    ("network", 5),
    ("network", []),
    ("network", ()),
    ("network", {"a.b"}),
    ("network", ""),
    ("network", [""]),
    ("network", [5]),
    ("network", ["https://a.b"]),
    ("network", ["a.b:443"]),
    ("network", ["a.b/path"]),
    ("network", ["a b"]),
    ("network", ["a..b"]),
    ("network", ["10.1.2.3"]),
    ("network", ["127.1"]),
    ("network", ["0x7f000001"]),
    ("network", ["a.b\n"]),
    ("network", ["*"]),
    ("network", ["localhost"]),
    ("network", "internet"),
    ("network", "none"),
    ("memory", 63),
    ("cpu", 0.009),
    ("network", ["*.*.b"]),
    ("network", ["a.*.b"]),
    ("network", ["büch.example"]),
    ("network", ["::1"]),
    ("network", ["a" * 64 + ".b"]),
    ("trust", "Data"),
    ("trust", "none"),
    ("trust", True),
    ("trust", 5),
    ("transfer", "direct"),
    ("transfer", "copy"),
    ("transfer", True),
    ("setup", "apt-get install git"),
    ("setup", [5]),
    ("setup", {"a": "b"}),
    ("setup", True),
    ("cache", "yes"),
    ("cache", 1),
    ("keep", "always"),
    ("keep", True),
]
REMEDY = re.compile(r"give |leave it out|Leave out|such as|above 0", re.IGNORECASE)


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_refused_by_the_parameters_name_and_with_a_remedy(name, value):
    with pytest.raises((InvalidParameter, NotEnforceable)) as refused:
        a_request(**{name: value})
    message = str(refused.value)
    assert message.startswith(name)
    assert REMEDY.search(message)


VARIABLES = [
    ["A B"], ["A=B"], ["1A"], [""], [5], [None], ["A\n"], ["Ä"], ["METAFLOW_HOME"], ["MF_PATH"],
    {"A-B": "x"}, {"METAFLOW_SANDBOX_WORKLOAD": "0"}, {5: "x"}, {"A": 5}, {"A": None}, {"A": "\0"},
]  # fmt: skip


@pytest.mark.parametrize("env", VARIABLES, ids=repr)
def test_a_bad_variable_is_refused_by_its_name_and_its_value_is_not_shown(env):
    with pytest.raises(InvalidParameter) as refused:
        a_request(env=env)
    assert str(refused.value).startswith("env: ")
    assert repr(next(iter(env))).strip("'") in str(refused.value)


@pytest.mark.parametrize("env", [["A B"], b"A", ["METAFLOW_HOME"], {"A": 5}], ids=repr)
def test_a_bad_variable_is_refused_with_a_remedy(env):
    with pytest.raises(InvalidParameter) as refused:
        a_request(env=env)
    assert REMEDY.search(str(refused.value))


@pytest.mark.parametrize("backend", ["", [], 0, False], ids=repr)
def test_an_empty_backend_is_refused_and_not_replaced_by_the_default(backend):
    with pytest.raises(InvalidParameter, match="backend"):
        a_request(backend=backend)


def test_a_value_of_a_variable_is_a_secret_that_no_message_shows():
    for env in ({"A": "sk-secret\0"}, {"A B": "sk-secret"}, {"A": b"sk-secret"}):
        with pytest.raises(InvalidParameter) as refused:
            a_request(env=env)
        assert "sk-secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("trust", ["Result"]),
        ("trust", [int]),
        ("trust", ["pkg.Result"] * 51),
        ("trust", ["pkg.Result)+pickle-v4"]),
        ("trust", {"data": True}),
        ("transfer", ["relay"]),
        ("keep", ["on-failure"]),
        ("memory", 10**400),
        ("timeout", 10**400),
    ],
    ids=lambda v: repr(v)[:20],
)
def test_a_value_that_can_not_even_be_compared_is_refused_with_a_remedy(name, value):
    with pytest.raises(InvalidParameter, match=name):
        a_request(**{name: value})


# --- the decorator, its siblings and the configuration ------------------------------------


def test_an_alias_is_its_backend():
    assert a_request(kind=E2BDecorator).backend == "e2b"
    assert a_request(kind=E2BDecorator, backend="e2b").backend == "e2b"


def test_an_alias_with_another_backend_is_refused():
    with pytest.raises(SandboxException, match="contradicts"):
        a_deco(BubblewrapDecorator, backend="e2b")


def test_what_is_configured_is_taken_where_the_decorator_says_nothing(monkeypatch):
    monkeypatch.setattr(metaflow_config, "SANDBOX_BACKEND", "docker")
    monkeypatch.setattr(metaflow_config, "SANDBOX_TRUST", "all")
    assert (a_request().backend, a_request().trust) == ("docker", "all")
    assert a_request(backend="theirs").backend == "theirs"
    assert a_request(kind=E2BDecorator).backend == "e2b"
    assert a_request(trust="data").trust == "data"


def test_a_configured_value_is_checked_too(monkeypatch):
    monkeypatch.setattr(metaflow_config, "SANDBOX_TRUST", "everything")
    with pytest.raises(InvalidParameter, match="trust"):
        a_request()


def resources(**attributes):
    return a_deco(ResourcesDecorator, **attributes)


def test_what_only_resources_asks_for_is_a_wish():
    request = a_request(resources(cpu=2, memory="1000"), disk=5)
    assert (request.cpu, request.memory, request.disk) == (2.0, 1000, 5)
    assert request.wishes == {"cpu", "memory"}


def test_the_larger_of_resources_and_the_decorator_counts_and_is_no_wish():
    assert a_request(resources(memory=1000), memory=100).memory == 1000
    request = a_request(resources(memory=100), memory=1000)
    assert request.memory == 1000 and request.wishes == frozenset()


def test_what_resources_only_has_by_default_is_not_asked():
    request = a_request(resources(memory=1000))
    assert (request.cpu, request.gpu, request.wishes) == (None, None, {"memory"})


@pytest.mark.parametrize("nothing", [None, 0, "0"])
def test_nothing_of_resources_is_not_asked(nothing):
    assert a_request(resources(gpu=nothing)).gpu is None


def test_a_bad_value_of_resources_is_refused_by_its_name():
    with pytest.raises(InvalidParameter, match="@resources memory"):
        a_request(resources(memory="lots"))


# --- deadlines ----------------------------------------------------------------------------


def timeout(**attributes):
    return a_deco(TimeoutDecorator, **attributes)


DEADLINES = [
    ({}, None, float(metaflow_config.DEFAULT_RUNTIME_LIMIT)),
    ({"timeout": 10}, None, 10.0),
    ({}, {"seconds": 30}, 30.0 + TIMEOUT_MARGIN),
    ({}, {"minutes": 1, "hours": 1}, 3660.0 + TIMEOUT_MARGIN),
    ({"timeout": 10}, {"seconds": 30}, 10.0),
    ({"timeout": 1000}, {"seconds": 30}, 30.0 + TIMEOUT_MARGIN),
    ({"timeout": 30 + TIMEOUT_MARGIN}, {"seconds": 30}, 30.0 + TIMEOUT_MARGIN),
    ({"timeout": 10**9}, None, 1e9),
]


@pytest.mark.parametrize(("attributes", "step", "deadline"), DEADLINES)
def test_the_deadline_is_the_first_of_the_limits(attributes, step, deadline):
    others = [timeout(**step)] if step else []
    found = a_request(*others, **attributes).deadline
    assert found == deadline and isinstance(found, float)


# --- against a backend --------------------------------------------------------------------

EVERYTHING = Capabilities(
    cpu=True, memory=True, disk=True, gpu=True, image=True, setup=True, keep=True,
    network=("internet", "none", "hosts"),
)  # fmt: skip


class Theirs(Idle):
    """A backend that can what it is told, and makes nothing."""

    name = "theirs"
    capabilities = Capabilities()

    def __init__(self, limits=capabilities):
        self._limits = limits

    def limits(self):
        return self._limits


ASKED = {
    "cpu": {"cpu": 2},
    "memory": {"memory": 1000},
    "disk": {"disk": 1000},
    "gpu": {"gpu": 1},
    "image": {"image": "python"},
    "setup": {"setup": ["true"]},
    "keep": {"keep": "on-failure"},
    "executable": {"executable": "python3"},
    "network": {"network": ["a.b"]},
}


@pytest.mark.parametrize(("name", "asked"), ASKED.items(), ids=ASKED)
def test_what_a_backend_can_not_enforce_is_refused_and_what_it_can_is_kept(name, asked):
    request = a_request(**asked)
    assert request.check(Theirs(EVERYTHING)) == (request, [])
    with pytest.raises(NotEnforceable, match=name) as refused:
        request.check(Theirs())
    assert "theirs" in str(refused.value) and "Leave it out" in str(refused.value)


def test_what_is_kept_needs_an_environment_that_stays():
    request = a_request(keep="on-failure", cache=False)
    with pytest.raises(NotEnforceable, match="keep.*cache=False.*--force-rebuild-environments"):
        request.check(Theirs(EVERYTHING))
    for one in ({"keep": "on-failure"}, {"cache": False}):
        a_request(**one).check(Theirs(EVERYTHING))


@pytest.mark.parametrize("name", ["cpu", "memory", "disk", "gpu"])
def test_one_missing_capability_is_enough_to_refuse(name):
    backend = Theirs(replace(EVERYTHING, **{name: False}))
    with pytest.raises(NotEnforceable, match=f"^{name}=1"):
        a_request(cpu=1, memory=100, disk=1, gpu=1).check(backend)


@pytest.mark.parametrize("can", [(), ("none",), ("internet",), ("hosts",), ("internet", "none")])
@pytest.mark.parametrize(
    ("network", "needs"), [(None, None), (True, "internet"), (False, "none"), (["a.b"], "hosts")]
)
def test_a_network_is_had_or_refused_with_what_there_is(network, needs, can):
    backend = Theirs(Capabilities(network=can))
    request = a_request(**({} if network is None else {"network": network}))
    if needs is None or needs in can:
        assert request.check(backend) == (request, [])
    else:
        with pytest.raises(NotEnforceable, match="network") as refused:
            request.check(backend)
        assert all(kind in str(refused.value) for kind in can)


def test_wishes_that_can_not_be_enforced_are_dropped_and_said():
    request = a_request(resources(cpu=2, memory=1000, gpu=1, shared_memory=64), disk=5)
    checked, notes = request.check(Theirs(Capabilities(memory=True, disk=True)))
    assert (checked.cpu, checked.memory, checked.disk, checked.gpu) == (None, 1000, 5, None)
    assert checked.shared_memory is None
    for note, name in zip(notes, ("cpu", "gpu", "shared_memory"), strict=True):
        assert name in note and "@resources" in note and "theirs" in note


def test_a_request_that_was_checked_is_not_changed():
    request = a_request(resources(cpu=2))
    request.check(Theirs())
    assert request.cpu == 2.0


def test_asking_for_nothing_can_be_had_anywhere():
    assert a_request(env=["A"], timeout=5, trust="all").check(Theirs(Capabilities(network=())))


@pytest.mark.parametrize(("name", "remedy"), [("e2b", "pip install"), ("nobodys", "Installed: ")])
def test_a_backend_that_is_not_there_is_said_with_the_remedy(name, remedy):
    try:
        with pytest.raises(BackendUnavailable, match=remedy) as refused:
            a_request(backend=name).check()
        assert name in str(refused.value)
    except pytest.fail.Exception:
        assert name == "e2b"  # once it is there, asking for nothing is all right


# --- variables ----------------------------------------------------------------------------


def test_variables_are_taken_from_here_by_name(monkeypatch):
    monkeypatch.setenv("NAMED", "a value")
    assert a_request(env=["NAMED"]).variables() == {"NAMED": "a value"}
    assert a_request(env={"PLAIN": "x"}).variables() == {"PLAIN": "x"}
    assert a_request().variables() == {}


def test_a_variable_that_is_not_set_is_said_with_the_command(monkeypatch):
    monkeypatch.delenv("MISSING", raising=False)
    with pytest.raises(SandboxError, match="export MISSING="):
        a_request(env=["PATH", "MISSING"]).variables()


# --- parameters that one backend has


class MintyDecorator(SandboxDecorator):
    name = backend = "theirs"
    defaults = {**SandboxDecorator.defaults, "flavour": None}


class Minty(Theirs):
    options = {"flavour": "vanilla"}


def test_a_parameter_that_one_backend_has_reaches_it_and_no_other():
    request = a_request(kind=MintyDecorator, flavour="mint")
    assert request.options == {"flavour": "mint"}
    assert request.check(Minty())[0].options == {"flavour": "mint"}
    assert a_request(kind=MintyDecorator).options == {}
    with pytest.raises(NotEnforceable, match="no parameter flavour"):
        replace(request, backend="other").check(Theirs())
    with pytest.raises(InvalidParameter, match="flavour"):
        a_request(kind=MintyDecorator, flavour=3)


def test_a_backend_refuses_parameters_of_others():
    spec = SandboxSpec(options={"flavour": "mint"})
    Minty().refuse(spec)
    with pytest.raises(NotEnforceable, match="no parameter flavour"):
        Theirs().refuse(spec)


# --- what sandboxes are made from


def test_a_recipe_has_another_key_for_anything_else(tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels/a.whl").write_bytes(b"a")
    recipe = Recipe("python:3.12", ("apt-get update",), {"/wheels": tmp_path / "wheels"})
    key = recipe.key("linux/amd64")
    assert key == recipe.key("linux/amd64") and len(key) == 40
    others = [
        replace(recipe, image="python:3.13"),
        replace(recipe, image=None),
        replace(recipe, setup=("apt-get", "update")),
        replace(recipe, setup=()),
        replace(recipe, files={"/other": tmp_path / "wheels"}),
        replace(recipe, install=("sh", "x")),
        replace(recipe, prefix="/env"),
        replace(recipe, options={"runtime": "runsc"}),
    ]
    keys = {key, recipe.key(), *(other.key("linux/amd64") for other in others)}
    (tmp_path / "wheels/a.whl").rename(tmp_path / "wheels/b.whl")
    keys.add(recipe.key("linux/amd64"))
    (tmp_path / "wheels/b.whl").write_bytes(b"b")
    keys.add(recipe.key("linux/amd64"))
    assert len(keys) == len(others) + 4


@pytest.mark.anyio
async def test_a_backend_that_prepares_nothing_refuses_to():
    assert await Theirs().prepare(Recipe("an:image")) == Prepared("an:image")
    with pytest.raises(NotEnforceable, match="prepare"):
        await Theirs().prepare(Recipe("an:image", ("apt-get update",)))


@pytest.mark.parametrize(
    "given", [["pkg.A", "__main__.B"], "pkg.A,__main__.B", "pkg.A, __main__.B"]
)
def test_trust_may_be_names_of_classes(given):
    assert a_request(trust=given).trust == ("pkg.A", "__main__.B")


def test_a_class_in_the_place_of_its_name_is_answered_with_its_name():
    with pytest.raises(InvalidParameter, match=r'"collections.Counter"'):
        a_request(trust=[__import__("collections").Counter])
