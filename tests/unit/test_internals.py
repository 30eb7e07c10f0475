"""The host decides what is recorded: what steers the scheduler, and how an artifact is loaded."""

import copy
import hashlib
import json
import pickle
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metaflow.exception import MetaflowExceptionWrapper, MetaflowInternalError
from metaflow.task import MetaflowTask
from metaflow.tuple_util import ForeachFrame

from metaflow_extensions.sandbox.plugins.tainted import MARK, mark, tainted, unmarked
from metaflow_sandbox.admission import reader
from metaflow_sandbox.admission.artifacts import decide, inherited_records
from metaflow_sandbox.admission.internals import (
    FORBIDDEN,
    INTERNAL,
    MAX_SPLITS,
    Delivered,
    Position,
    admit,
    admit_foreach_stack,
)
from metaflow_sandbox.admission.results import Results
from metaflow_sandbox.errors import Rejected

# --- stand-ins for Metaflow's graph and for what a sandbox wrote ----------------------


def a_node(kind="linear", out=("next",), foreach=None):
    return SimpleNamespace(type=kind, out_funcs=list(out), foreach_param=foreach)


def a_parent(**artifacts):
    """The host's own record of an input."""
    return lambda name, default=None: artifacts.get(name, default)


def a_position(node=None, *, parents=({},), **changes):
    values = {
        "flow": "F",
        "step": "s",
        "node": node or a_node(),
        "join_type": None,
        "is_start": False,
        "split_index": None,
        "parents": tuple(a_parent(**p) for p in parents),
        "succeeded": True,
    }
    return Position(**{**values, **changes})


_FILES = tempfile.TemporaryDirectory()


def a_delivery(raw=None, **values):
    """What a sandbox wrote, values or `raw` pickles, as the reader finds it."""
    contents = {name: pickle.dumps(value, 4) for name, value in values.items()} | (raw or {})
    answers = {}
    for name, form in Delivered.FORMS.items():
        if name in contents:
            file = Path(_FILES.name, name)
            file.write_bytes(contents[name])
            sha = hashlib.sha1(contents[name]).hexdigest()
            item = {"name": name, "form": form, "file": str(file), "raw": True, "sha": sha}
            answers[name] = json.loads(json.dumps(reader.read(item)))
    return Delivered(answers)


NODES = {
    "linear": (a_node(), (["next"], None)),
    "split": (a_node("split", ["a", "b"]), (["a", "b"], None)),
    "join": (a_node("join", ["after"]), (["after"], None)),
    "foreach": (a_node("foreach", ["body"], "items"), (["body"], "items")),
    "end": (a_node("end", []), None),
}
HONEST = {"_success": True, "_task_ok": True, "_foreach_num_splits": 3}


# --- what the scheduler acts on -------------------------------------------------------


@pytest.mark.parametrize(("node", "transition"), NODES.values(), ids=NODES)
def test_the_next_steps_are_those_of_the_graph(node, transition):
    delivered = a_delivery(**HONEST, _transition=transition)
    assert admit(a_position(node), delivered)["_transition"] == transition


@pytest.mark.parametrize(("node", "transition"), NODES.values(), ids=NODES)
@pytest.mark.parametrize(
    "written",
    [
        (["evil"], None),
        (["next", "next"], None),
        (["b", "a"], None),
        (["next"], "items"),
        (["body"], None),
        ("next", None),
        [["next"], None],
        (("next",), None),
        (["next"],),
        (["next"], None, None),
        ([["next"]], None),
        {},
        5,
        "next",
    ],
    ids=repr,
)
def test_no_step_goes_where_the_flow_does_not(node, transition, written):
    try:
        admitted = admit(a_position(node), a_delivery(**HONEST, _transition=written))
    except Rejected:
        return
    assert admitted["_transition"] is None or admitted["_transition"] == transition
    assert not node.out_funcs, "a transition that the graph doesn't have is rejected"


def test_a_step_that_did_not_call_next_has_no_transition():
    for written in ({}, {"_transition": None}):
        assert admit(a_position(), a_delivery(**written))["_transition"] is None


SWITCH = a_node("split-switch", ["yes", "no"])


@pytest.mark.parametrize("choice", ["yes", "no"])
def test_a_switch_goes_to_the_step_that_was_chosen(choice):
    delivered = a_delivery(_transition=([choice], None))
    assert admit(a_position(SWITCH), delivered)["_transition"] == ([choice], None)


@pytest.mark.parametrize(
    "written",
    [
        None, "yes", ["yes"], ("yes", None), (["maybe"], None), ([], None), (["yes", "no"], None),
        (["yes"],), ([["yes"]], None), (("yes",), None), ([None], None), [["yes"], None],
    ],
    ids=repr,
)  # fmt: skip
def test_a_switch_goes_nowhere_but_where_the_graph_allows(written):
    for delivered in (a_delivery(_transition=written), a_delivery()):
        with pytest.raises(Rejected):
            admit(a_position(SWITCH), delivered)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=4,
)
DERIVED = (
    "name",
    "_current_step",
    "_foreach_stack",
    "_iteration_stack",
    "_task_ok",
    "_foreach_var",
)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.sampled_from(sorted(INTERNAL)), plain),
    st.sampled_from(sorted(NODES)),
    st.booleans(),
)
def test_what_follows_from_the_graph_is_derived_whatever_the_sandbox_wrote(lies, kind, succeeded):
    node, transition = NODES[kind]
    frame = ForeachFrame("outer", "xs", 5, 2, "c")
    position = a_position(node, parents=[{"_foreach_stack": [frame]}], succeeded=succeeded)
    try:
        admitted = admit(position, a_delivery(**lies))
    except Rejected:
        return
    honest = a_delivery(_foreach_num_splits=1, _transition=transition)
    truth = admit(position, honest)
    for name in DERIVED:
        # A foreach that did not call `self.next` says nothing of what it would be over.
        expected = (
            truth if admitted["_transition"] == transition else {**truth, "_foreach_var": None}
        )
        assert admitted[name] == expected[name]
    assert set(admitted) <= INTERNAL
    assert admitted["_transition"] in (None, transition)
    assert admitted["_success"] is (succeeded and lies.get("_success") is True)
    assert type(admitted["_foreach_num_splits"]) in (int, type(None))


HOSTILE_PICKLES = {
    "a call": b"\x80\x04cos\nsystem\n\x8c\x04true\x85R.",
    "nothing": b"",
    "text": b"hello",
    "cut short": b"\x80\x04]",
    "control characters": b"\x80\x04\x8c\x02os\x8c\x04\x1b[0m\x93.",
}


@pytest.mark.parametrize("hostile", HOSTILE_PICKLES.values(), ids=HOSTILE_PICKLES)
@pytest.mark.parametrize(
    "name", ["_success", "_exception", "_catch_exception", "_foreach_num_splits", "_transition"]
)
def test_what_only_the_step_knows_is_never_unpickled(name, hostile):
    delivered = a_delivery(raw={**{k: pickle.dumps(v) for k, v in HONEST.items()}, name: hostile})
    with pytest.raises(Rejected, match=name) as rejected:
        admit(a_position(NODES["foreach"][0]), delivered)
    assert "\x1b" not in str(rejected.value)


@pytest.mark.parametrize(("node", "transition"), NODES.values(), ids=NODES)
def test_a_step_that_failed_goes_nowhere_whatever_it_claims(node, transition):
    delivered = a_delivery(**HONEST, _transition=transition)
    admitted = admit(a_position(node, succeeded=False), delivered)
    assert (admitted["_task_ok"], admitted["_success"]) == (False, False)
    for name in ("_transition", "_foreach_num_splits", "_foreach_var"):
        assert admitted[name] is None
    assert "_foreach_values" not in admitted


@pytest.mark.parametrize("written", [1, 0, "True", [True], (), 1.0, {"a": 1}], ids=repr)
def test_a_flag_is_a_truth_value_and_nothing_that_looks_like_one(written):
    with pytest.raises(Rejected, match="_success"):
        admit(a_position(), a_delivery(_success=written))


@pytest.mark.parametrize("name", ["_exception", "_catch_exception"])
def test_an_exception_is_one_as_metaflow_records_it(name):
    wrapped = MetaflowExceptionWrapper(ValueError("why"))
    admitted = admit(a_position(succeeded=False), a_delivery(**{name: wrapped}))
    assert admitted[name].__dict__ == wrapped.__dict__
    for written in ("why", 5, ["why"], True):
        with pytest.raises(Rejected, match=name):
            admit(a_position(succeeded=False), a_delivery(**{name: written}))


def test_what_an_exception_says_is_harmless_and_keeps_its_lines():
    wrapped = MetaflowExceptionWrapper(ValueError("\x1b[31m"))
    wrapped.stacktrace = "Traceback:\n  line\r\n\ttab \x9b \u202e \ud800"
    admitted = admit(a_position(succeeded=False), a_delivery(_exception=wrapped))["_exception"]
    assert type(admitted) is MetaflowExceptionWrapper
    assert admitted.exception == "␛[31m"
    assert admitted.stacktrace == "Traceback:\n  line␍\n\ttab ␦c2␦9b ␦e2␦80␦ae ␦ed␦a0␦80"


# --- foreach --------------------------------------------------------------------------

FOREACH = NODES["foreach"][0]


def splits(**values):
    delivered = a_delivery(_transition=(["body"], "items"), **values)
    return admit(a_position(FOREACH), delivered)


def test_the_name_that_a_foreach_has_in_a_variable_is_what_the_step_says():
    delivered = a_delivery(**HONEST, _transition=(["body"], "items"))
    admitted = admit(a_position(a_node("foreach", ["body"])), delivered)
    assert admitted["_transition"] == (["body"], "items")
    assert admitted["_foreach_var"] == "items"


@pytest.mark.parametrize(
    "name",
    [None, "", "a b", "a.b", "1a", "\x1b[31m", "x" * 1001, "_parallel_ubf_iter", "_exception", 5],
)
def test_a_foreach_goes_over_nothing_that_is_no_name_of_an_artifact(name):
    delivered = a_delivery(**HONEST, _transition=(["body"], name))
    with pytest.raises(Rejected):
        admit(a_position(a_node("foreach", ["body"])), delivered)


@pytest.mark.parametrize("count", [1, 2, 1000, MAX_SPLITS])
def test_a_foreach_splits_into_as_many_as_the_step_says(count):
    admitted = splits(_foreach_num_splits=count)
    assert admitted["_foreach_num_splits"] == count
    assert (admitted["_foreach_var"], admitted["_foreach_values"]) == ("items", None)


@pytest.mark.parametrize(
    "count",
    [0, -1, MAX_SPLITS + 1, 2**70, True, None, 1.0, float("inf"), "3", [3], (3,), {3: 3}, b"3"],
    ids=repr,
)
def test_a_foreach_of_another_number_is_rejected(count):
    with pytest.raises(Rejected, match="_foreach_num_splits"):
        splits(_foreach_num_splits=count)


def test_a_foreach_without_a_number_is_rejected():
    with pytest.raises(Rejected, match="_foreach_num_splits"):
        splits()


@pytest.mark.parametrize("values", [None, ["a", "b"], ["", None], ["x" * 10_000, "\x1b"]], ids=repr)
def test_the_values_of_a_foreach_are_short_strings_for_people(values):
    admitted = splits(_foreach_num_splits=2, _foreach_values=values)["_foreach_values"]
    assert admitted == (None if values is None else [v and v.replace("\x1b", "␛") for v in values])


@pytest.mark.parametrize(
    "values",
    [
        [], ["a"], ["a", "b", "c"], ("a", "b"), "ab", {"a"}, ["a", 1], ["a", b"b"],
        [["a"], ["b"]], ["a", "x" * 10_001], 2, True, {0: "a", 1: "b"},
    ],
    ids=lambda v: repr(v)[:30],
)  # fmt: skip
def test_other_values_of_a_foreach_are_rejected(values):
    with pytest.raises(Rejected, match="_foreach_values"):
        splits(_foreach_num_splits=2, _foreach_values=values)


# --- a task's place in its foreaches and loops, as Metaflow itself works it out -----------


class Input:
    """An input as Metaflow's task reads it."""

    def __init__(self, artifacts):
        self.artifacts = copy.deepcopy(artifacts)

    def __contains__(self, name):
        return name in self.artifacts

    def __getitem__(self, name):
        return self.artifacts[name]

    def is_none(self, name):
        return self.artifacts.get(name) is None


def by_metaflow(step, node, join_type, is_start, inputs, split_index):
    """(foreach stack, iteration stack), or None where Metaflow refuses."""
    flow = SimpleNamespace(_graph=SimpleNamespace(start_step=step if is_start else "start"))
    task = SimpleNamespace(flow=flow, ubf_context=None)
    inputs = [Input(i) for i in inputs]
    recursive = node.type == "split-switch" and step in node.out_funcs
    try:
        MetaflowTask._init_foreach(task, step, join_type, inputs, split_index)
        MetaflowTask._init_iteration(task, step, inputs, recursive)
    except MetaflowInternalError:
        return None
    return getattr(flow, "_foreach_stack", []), flow._iteration_stack


OUTER = ForeachFrame("outer", "xs", 2, 1, "b")
INNER = ForeachFrame("inner", "ys", 1, 0, None)
SPLIT = {"_foreach_var": "items", "_foreach_num_splits": 3, "_foreach_stack": []}
LOOP = a_node("split-switch", ["s", "out"])
PLACES = {
    "the start": (a_node(), None, True, [{}], None),
    "a step": (a_node(), None, False, [{"_foreach_stack": []}], None),
    "a step in a foreach": (a_node(), None, False, [{"_foreach_stack": [OUTER]}], None),
    "a step whose input has no place": (a_node(), None, False, [{}], None),
    "a split's first": (a_node(), None, False, [SPLIT], 0),
    "a split's last": (a_node(), None, False, [SPLIT], 2),
    "a split with values": (
        a_node(), None, False, [{**SPLIT, "_foreach_values": ["a", "b", None]}], 1,
    ),
    "a split in a foreach": (a_node(), None, False, [{**SPLIT, "_foreach_stack": [OUTER]}], 1),
    "a join": (a_node("join"), "split", False, [{"_foreach_stack": []}] * 2, None),
    "a join in a foreach": (
        a_node("join"), "split", False, [{"_foreach_stack": [OUTER]}] * 2, None,
    ),
    "a foreach's join": (
        a_node("join"), "foreach", False,
        [{"_foreach_stack": [OUTER._replace(index=i)]} for i in range(2)], None,
    ),
    "an inner foreach's join": (
        a_node("join"), "foreach", False, [{"_foreach_stack": [OUTER, INNER]}], None,
    ),
    "a loop entered": (LOOP, None, False, [{"_foreach_stack": [], "_iteration_stack": []}], None),
    "a loop entered from the first step": (LOOP, None, False, [{}], None),
    "a loop again": (LOOP, None, False, [{"_foreach_stack": [], "_iteration_stack": [4]}], None),
    "a loop left": (a_node(), None, False, [{"_foreach_stack": [], "_iteration_stack": [4]}], None),
    "another switch": (SWITCH, None, False, [{"_iteration_stack": [4]}], None),
}  # fmt: skip


@pytest.mark.parametrize(
    ("node", "join_type", "is_start", "inputs", "split_index"), PLACES.values(), ids=PLACES
)
def test_a_tasks_place_is_worked_out_as_metaflow_does_it(
    node, join_type, is_start, inputs, split_index
):
    before = copy.deepcopy(inputs)
    position = a_position(
        node, join_type=join_type, is_start=is_start, parents=inputs, split_index=split_index
    )
    lies = a_delivery(
        _foreach_stack=[], _iteration_stack=[99], **HONEST, _transition=(node.out_funcs[:1], None)
    )
    admitted = admit(position, lies)
    expected = by_metaflow("s", node, join_type, is_start, inputs, split_index)
    assert (admitted["_foreach_stack"], admitted["_iteration_stack"]) == expected
    assert inputs == before, "the host's records are left as they are"


frames = st.builds(
    ForeachFrame, st.just("o"), st.just("v"), st.integers(1, 3), st.just(0), st.none() | st.text()
)


@settings(max_examples=200, deadline=None)
@given(
    stack=st.lists(frames, max_size=3),
    split=st.booleans(),
    values=st.none() | st.just(["a", "b", "c"]),
    join=st.sampled_from([None, None, "split", "foreach"]),
    index=st.integers(0, 2),
    loop=st.lists(st.integers(0, 5), max_size=1),
    kind=st.sampled_from([a_node(), SWITCH, LOOP]),
)
def test_any_tasks_place_is_worked_out_as_metaflow_does_it(
    stack, split, values, join, index, loop, kind
):
    if join == "foreach":
        stack = [*stack, ForeachFrame("o", "v", 1, 0, None)]
    record = {"_foreach_stack": stack, "_iteration_stack": loop}
    if split:
        record |= {"_foreach_var": "xs", "_foreach_num_splits": 3, "_foreach_values": values}
    expected = by_metaflow("s", kind, join, False, [record], index)
    if expected is None:
        return
    position = a_position(kind, join_type=join, parents=[record], split_index=index)
    admitted = admit(position, a_delivery(_transition=([kind.out_funcs[0]], None)))
    assert (admitted["_foreach_stack"], admitted["_iteration_stack"]) == expected


@pytest.mark.parametrize("index", [None, -1, 3, 10**9])
def test_a_place_that_its_foreach_does_not_have_is_rejected(index):
    with pytest.raises(Rejected, match="place"):
        admit_foreach_stack(a_position(parents=[SPLIT], split_index=index))


# --- the user's artifacts -----------------------------------------------------------------

SHAS = {name: (name * 40)[:40] for name in "0123456789abcdef"}
PICKLED = {"type": "<class 'int'>", "size": 5, "encoding": "pickle-v4"}
TAINTED = {
    "type": "<class 'list'>",
    "size": 9,
    "encoding": MARK + "pickle-v4",
    "serializer_info": {"source": "metaflow-sandbox", "origin": "F/1/a/1", "artifact": "bad"},
}
POINTER = "<class 'metaflow.includefile.IncludedFile'>"


def decided(objects, claims=None, *, known=None, inherited=None, trust="data"):
    claims = claims or {}
    info = {name: claims.get(name, PICKLED) for name in objects}
    return decide(
        Results(objects=objects, info=info),
        known=known or {},
        inherited=inherited or {},
        trust=trust,
        origin="F/1/s/2",
    )


BOTH = pytest.mark.parametrize("trust", ["data", "all"])


@BOTH
@pytest.mark.parametrize("name", ["bad", "harmless", "other"])
def test_an_inherited_artifact_saved_again_under_a_harmless_claim_keeps_its_taint(name, trust):
    decision = decided(
        {name: SHAS["b"]}, {name: PICKLED}, inherited={SHAS["b"]: TAINTED}, trust=trust
    )
    assert decision.objects == {name: SHAS["b"]}
    assert decision.info == {name: TAINTED}
    assert decision.new == frozenset()


@BOTH
def test_what_came_from_the_host_keeps_the_hosts_record(trust):
    decision = decided(
        {"x": SHAS["a"]},
        {"x": {**TAINTED, "type": POINTER}},
        inherited={SHAS["a"]: PICKLED},
        trust=trust,
    )
    assert decision.info == {"x": PICKLED} and not decision.new


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("again", [1, 2])
def test_where_inputs_differ_the_tainted_record_wins(order, again):
    parents = [({"x": SHAS["a"]}, {"x": PICKLED}), ({"y": SHAS["a"]}, {"y": TAINTED})][::order]
    assert inherited_records(parents * again) == {SHAS["a"]: TAINTED}
    within = {"x": SHAS["a"], "y": SHAS["a"]}
    assert inherited_records([(within, {"x": TAINTED, "y": PICKLED})]) == {SHAS["a"]: TAINTED}


@BOTH
def test_what_no_step_can_change_is_the_hosts_whatever_is_claimed(trust):
    known = {"alpha": (SHAS["a"], PICKLED), "_graph_info": (SHAS["c"], PICKLED)}
    objects = {"alpha": SHAS["e"], "_graph_info": SHAS["b"], "x": SHAS["d"]}
    decision = decided(
        objects, known=known, inherited={SHAS["b"]: TAINTED, SHAS["a"]: PICKLED}, trust=trust
    )
    assert decision.objects == {"alpha": SHAS["a"], "_graph_info": SHAS["c"], "x": SHAS["d"]}
    assert decision.info["alpha"] == decision.info["_graph_info"] == PICKLED
    assert decision.new == {SHAS["d"]}


def test_what_no_step_can_change_is_recorded_even_if_the_sandbox_left_it_out():
    decision = decided({}, known={"alpha": (SHAS["a"], PICKLED)})
    assert decision.objects == {"alpha": SHAS["a"]}


@BOTH
@pytest.mark.parametrize("name", sorted(INTERNAL))
def test_what_steers_the_scheduler_is_never_taken_from_the_sandbox(name, trust):
    for inherited in ({}, {SHAS["a"]: PICKLED}):
        decision = decided({name: SHAS["a"]}, inherited=inherited, trust=trust)
        assert (decision.objects, decision.info, decision.new) == ({}, {}, frozenset())


@BOTH
@pytest.mark.parametrize("inherited", [{}, {SHAS["a"]: PICKLED}], ids=["new", "an input's content"])
@pytest.mark.parametrize("name", sorted(FORBIDDEN))
def test_an_artifact_that_starts_an_unbounded_foreach_is_rejected(name, inherited, trust):
    with pytest.raises(Rejected, match=name):
        decided({name: SHAS["a"]}, inherited=inherited, trust=trust)


def test_what_is_new_is_tainted_and_says_where_it_comes_from():
    decision = decided({"x": SHAS["a"], "y": SHAS["a"], "z": SHAS["b"]})
    assert decision.new == {SHAS["a"], SHAS["b"]}
    for name in "xyz":
        assert decision.info[name] == {
            "size": 0,
            "type": "<class 'int'>",
            "encoding": MARK + "pickle-v4",
            "serializer_info": {
                "source": "metaflow-sandbox",
                "origin": "F/1/s/2",
                "artifact": name,
            },
        }


def test_a_pointer_that_metaflow_would_open_is_no_pointer_any_more():
    claim = {**PICKLED, "type": POINTER}
    decision = decided({"x": SHAS["a"]}, {"x": claim})
    assert decision.info["x"]["type"] == "<class 'object'>"


def test_a_pointer_of_the_hosts_stays_one():
    pointer = {**PICKLED, "type": POINTER}
    assert decided({"x": SHAS["a"]}, inherited={SHAS["a"]: pointer}).info["x"] == pointer


CLAIMS = {
    "no type": {"encoding": "pickle-v4"},
    "a type that is none": {**PICKLED, "type": "int"},
    "a type with control characters": {**PICKLED, "type": "<class '\x1b[31m'>"},
    "a type with a newline": {**PICKLED, "type": "<class 'int'>\n"},
    "a type that goes on": {**PICKLED, "type": "<class 'int'> "},
    "a long type": {**PICKLED, "type": f"<class '{'x' * 201}'>"},
    "a type that is a number": {**PICKLED, "type": 5},
    "a type that is a list": {**PICKLED, "type": ["<class 'int'>"]},
}


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
@BOTH
def test_a_type_that_python_never_writes_is_recorded_as_object(claim, trust):
    info = decided({"x": SHAS["a"]}, {"x": claim}, trust=trust).info["x"]
    assert info["type"] == "<class 'object'>"


ENCODINGS = [None, 5, [], "", "a b", "pickle\n", "\x1b", "pickle/v4", "x" * 65]


@pytest.mark.parametrize("encoding", ENCODINGS, ids=repr)
def test_an_encoding_that_is_no_word_is_recorded_as_unknown(encoding):
    claims = {"x": {**PICKLED, "encoding": encoding}}
    assert decided({"x": SHAS["a"]}, claims).info["x"]["encoding"] == MARK + "unknown"
    assert decided({"x": SHAS["a"]}, claims, trust="all").info["x"]["encoding"] == "unknown"


@pytest.mark.parametrize("encoding", ["pickle-v4", "arrow", MARK + "pickle-v4", MARK * 2])
def test_nothing_that_is_claimed_takes_the_taint_off(encoding):
    claim = {**PICKLED, "encoding": encoding, "serializer_info": {"source": "numpy"}, "size": 10**9}
    info = decided({"x": SHAS["a"]}, {"x": claim}).info["x"]
    assert info["encoding"] == MARK + encoding
    assert info["serializer_info"]["source"] == "metaflow-sandbox"
    assert info["size"] == 0


# --- trust="all" --------------------------------------------------------------------------


def test_a_step_that_is_trusted_keeps_its_own_record():
    claim = {
        "type": "<class 'numpy.ndarray'>", "size": 99, "encoding": "npy", "more": 1,
        "serializer_info": {"shape": [2, 3], "source": "theirs"},
    }  # fmt: skip
    decision = decided({"x": SHAS["a"]}, {"x": claim}, trust="all")
    assert decision.new == {SHAS["a"]}
    assert decision.info["x"] == {
        "type": "<class 'numpy.ndarray'>", "size": 0, "encoding": "npy",
        "serializer_info": {"shape": [2, 3], "source": "theirs"},
    }  # fmt: skip


@pytest.mark.parametrize("encoding", [MARK, MARK + "pickle-v4", MARK + MARK + "x"])
def test_no_step_can_claim_the_hosts_own_mark(encoding):
    with pytest.raises(Rejected, match="admission"):
        decided({"x": SHAS["a"]}, {"x": {**PICKLED, "encoding": encoding}}, trust="all")


@pytest.mark.parametrize(
    "details", [None, [], "x", 5, {"x": "y" * 5000}], ids=lambda d: type(d).__name__
)
def test_a_trusted_record_is_small_and_of_metaflows_form(details):
    with pytest.raises(Rejected):
        decided({"x": SHAS["a"]}, {"x": {**PICKLED, "serializer_info": details}}, trust="all")


def test_a_trusted_record_of_any_depth_is_kept_or_rejected():
    for depth in range(1, 900, 13):  # JSON reads no more
        details = {}
        for _ in range(depth):
            details = {"a": details}
        claim = {**PICKLED, "serializer_info": details}
        try:
            decided({"x": SHAS["a"]}, {"x": claim}, trust="all")
        except Rejected:
            pass


def with_classes(*classes):
    return {**TAINTED, "encoding": mark(classes) + "pickle-v4"}


def test_what_is_new_may_have_the_classes_that_trust_names():
    decision = decided({"x": SHAS["a"]}, trust=("pkg.B", "pkg.A"))
    assert decision.info["x"]["encoding"] == "sandbox-v1(pkg.A,pkg.B)+pickle-v4"


@pytest.mark.parametrize("order", [1, -1])
def test_where_inputs_have_other_classes_only_those_of_both_may_be_in_it(order):
    two = [with_classes("pkg.A", "pkg.B"), with_classes("pkg.B", "pkg.C")]
    for first, second, expected in [(*two, ("pkg.B",)), (TAINTED, two[0], ())]:
        parents = [({"x": SHAS["a"]}, {"x": first}), ({"y": SHAS["a"]}, {"y": second})][::order]
        record = inherited_records([*parents, ({"z": SHAS["a"]}, {"z": PICKLED})])[SHAS["a"]]
        assert unmarked(record["encoding"]) == (expected, "pickle-v4")


def test_a_step_that_is_trusted_with_classes_can_not_give_them_to_what_it_inherited():
    decision = decided({"x": SHAS["b"]}, inherited={SHAS["b"]: TAINTED}, trust=("pkg.A",))
    assert decision.info == {"x": TAINTED}


@pytest.mark.parametrize(
    "claim", ["(pkg.A)+pickle-v4", "sandbox-v1(pkg.A)+pickle-v4", ")+x", "a,b"]
)
def test_a_sandbox_can_not_name_classes_by_what_it_claims(claim):
    info = decided({"x": SHAS["a"]}, {"x": {**PICKLED, "encoding": claim}}).info
    assert unmarked(info["x"]["encoding"]) == ((), "unknown")


@pytest.mark.parametrize(
    "encoding", ["sandbox-v1", "sandbox-v2+x", "sandbox-v1()+x", "sandbox-v1(a;b)+x"]
)
def test_a_mark_that_is_not_understood_is_one_still(encoding):
    assert tainted(encoding) == encoding.startswith("sandbox-v1")
    with pytest.raises(ValueError, match="no mark"):
        unmarked(encoding)
