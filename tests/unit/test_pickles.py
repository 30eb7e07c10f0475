"""Hostile pickles are refused, plain data loads as pickle would load it, and nothing is run."""

import builtins
import contextlib
import faulthandler
import os
import pickle
import pickletools
import re
import resource
import signal
import struct
import sys
import time
import tracemalloc

import numpy
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from metaflow.datastore.artifacts.serializer import SerializationMetadata
from metaflow.exception import MetaflowExceptionWrapper

from metaflow_extensions.sandbox.plugins.pickles import Refused, load_data, opcodes
from metaflow_extensions.sandbox.plugins.tainted import ArtifactRefused, TaintedPickle, mark

PROTOCOLS = (2, 3, 4, 5)


# --- any plain data, with what is shared and what contains itself -----------------

text = st.text(st.characters(exclude_categories=()), max_size=8)  # surrogates too
numbers = st.integers() | st.integers(-(2**3000), 2**3000) | st.sampled_from([0, 255, 65536, -1])
bound = st.none() | st.integers(-(2**70), 2**70)
keys = st.one_of(
    st.none(), st.booleans(), numbers, st.floats(allow_nan=False), text, st.binary(max_size=300)
)
leaves = st.one_of(
    keys,
    st.floats(),
    st.complex_numbers(),
    st.binary(max_size=20).map(bytearray),
    st.builds(range, st.integers(), st.integers(), st.integers().filter(bool)),
    st.builds(slice, bound, bound, bound),
)


@st.composite
def graphs(draw):
    """Plain data whose parts are shared, and whose lists and dicts may contain themselves."""
    values = draw(st.lists(leaves, min_size=1, max_size=6))
    hashable = draw(st.lists(keys, min_size=1, max_size=6))
    values += hashable
    open_ends = []

    def some(items, most=4):
        return [draw(st.sampled_from(items)) for _ in range(draw(st.integers(0, most)))]

    for kind in draw(st.lists(st.sampled_from("tThsflLdD"), max_size=10)):
        if kind in "tT":
            values.append(tuple(some(values)))
        elif kind == "h":
            hashable.append(tuple(some(hashable)))
            values.append(hashable[-1])
        elif kind == "f":
            hashable.append(frozenset(some(hashable)))
            values.append(hashable[-1])
        elif kind == "s":
            values.append(set(some(hashable)))
        else:
            values.append([] if kind in "lL" else {})
            open_ends.append(values[-1])
    for end in open_ends:
        if isinstance(end, list):
            end += some(values)
        else:
            end.update((draw(st.sampled_from(hashable)), v) for v in some(values))
    return draw(st.sampled_from(values)) if draw(st.booleans()) else values


CONTAINERS = (list, tuple, dict, set, frozenset, bytearray, range, slice, complex)


def assert_same(a, b):
    """Equal in value, type and order, and shared in the same places."""
    there, back = {}, {}  # which object of one is which of the other
    work = [(a, b)]
    while work:
        a, b = work.pop()
        assert type(a) is type(b)
        if type(a) in CONTAINERS and (type(a) in (list, dict, set, bytearray) or a):
            seen = id(a) in there
            assert there.setdefault(id(a), id(b)) == id(b)
            assert back.setdefault(id(b), id(a)) == id(a)
            if seen:
                continue
        if type(a) is float:
            assert struct.pack("d", a) == struct.pack("d", b)
        elif type(a) is complex:
            assert struct.pack("dd", a.real, a.imag) == struct.pack("dd", b.real, b.imag)
        elif type(a) is MetaflowExceptionWrapper:
            assert a.__dict__ == b.__dict__
        elif type(a) is dict:
            assert len(a) == len(b)
            work += zip(a.keys(), b.keys(), strict=True)
            work += zip(a.values(), b.values(), strict=True)
        elif type(a) in (list, tuple, set, frozenset):
            work += zip(a, b, strict=True)
        else:
            assert a == b


def assert_loads_as_pickle_does(dumped):
    assert_same(pickle.loads(dumped), load_data(dumped))


@settings(max_examples=400, deadline=None)
@given(graphs(), st.sampled_from(PROTOCOLS))
def test_plain_data_loads_as_pickle_loads_it(value, protocol):
    assert_loads_as_pickle_does(pickle.dumps(value, protocol))


@settings(max_examples=100, deadline=None)
@given(graphs(), st.sampled_from(PROTOCOLS))
def test_what_pickle_writes_in_pure_python_loads_too(value, protocol):
    with contextlib.closing(pickle.io.BytesIO()) as file:
        pickle._Pickler(file, protocol).dump(value)
        assert_loads_as_pickle_does(file.getvalue())


def itself(container):
    container.append(container) if type(container) is list else container.update(me=container)
    return container


def tuple_around_itself(more=(1, 2, 3)):
    inner = []
    outer = (inner, inner, *more)
    inner.append(outer)
    return outer


SPECIAL = {
    "list of itself": itself([1]),
    "dict of itself": itself({}),
    "tuple in itself": tuple_around_itself(),
    "short tuple in itself": tuple_around_itself(()),
    "list in a tuple in itself": tuple_around_itself()[1],
    "many strings": [str(i) for i in range(3000)] * 2,
    "many items": {i: [i] for i in range(3000)},
    "many members": [set(range(2500)), frozenset(range(2500))],
    "many memos": [[] for _ in range(70_000)],
    "long tuple": tuple(range(1000)),
    "long text": "ä" * 100_000,
    "long bytes": b"x" * 200_000,
    "long bytearray": bytearray(200_000),
    "many bytearrays": [bytearray(b"x" * n) for n in range(300)],
    "long integer": [2**100_000, -(2**100_000), 2**2039, -(2**2039)],
    "deep list": [],
    "nan": [float("nan"), float("inf"), -0.0, complex(float("nan"), -0.0)],
    "empty": [(), [], {}, "", b"", set(), frozenset(), bytearray()],
}
for _ in range(200):
    SPECIAL["deep list"] = [SPECIAL["deep list"]]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("value", SPECIAL.values(), ids=SPECIAL)
def test_large_deep_and_circular_data_loads_as_pickle_loads_it(value, protocol):
    assert_loads_as_pickle_does(pickle.dumps(value, protocol))


@pytest.mark.parametrize(
    "value",
    [
        [frozenset([(1, 2)]) for _ in range(1000)],
        [frozenset([2.5, i]) for i in range(5000)],
        {frozenset([2**70, i]): i for i in range(5000)},
    ],
    ids=["tuples", "floats", "integers"],
)
def test_many_frozensets_may_have_the_same_member(value):
    assert load_data(pickle.dumps(value, 4)) == value


@pytest.mark.parametrize(
    "value",
    [
        [{(1, 2): i} for i in range(1000)],
        [{2.5, i} for i in range(1000)],
        {float(i): i for i in range(5000)},
        {(i, i % 3): i for i in range(5000)},
        {2**61 + i for i in range(5000)},
        {complex(i, -i) for i in range(5000)},
    ],
    ids=["dicts", "sets", "floats", "tuples", "integers", "complex"],
)
def test_keys_of_any_kind_are_not_taken_for_an_attack(value):
    assert load_data(pickle.dumps(value, 4)) == value


@settings(max_examples=50, deadline=None)
@given(graphs(), st.sampled_from([0, 1]))
def test_protocols_0_and_1_are_refused_or_load_as_what_they_are(value, protocol):
    dumped = pickle.dumps(value, protocol)
    with contextlib.suppress(Refused):
        assert_same(pickle.loads(dumped), load_data(dumped))


# --- the exceptions that Metaflow records -----------------------------------------


def caught():
    try:
        raise ValueError("wrong \udcff \x1b[31m value")
    except ValueError as e:
        return MetaflowExceptionWrapper(e)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("wrapped", [caught(), MetaflowExceptionWrapper(KeyError(1))])
def test_an_exception_as_metaflow_records_it_comes_back_whole(wrapped, protocol):
    loaded = load_data(pickle.dumps([wrapped, wrapped], protocol))
    assert type(loaded[0]) is MetaflowExceptionWrapper
    assert loaded[0] is loaded[1]
    assert loaded[0].__dict__ == wrapped.__dict__
    assert str(loaded[0]) == str(wrapped)


def test_an_exception_without_a_state_can_still_be_shown():
    assert "no stacktrace" in str(load_data(b"\x80\x04" + EXCEPTION + b"."))


# --- hostile pickles ----------------------------------------------------------------

OS_SYSTEM = b"cos\nsystem\n"
RANGE = b"cbuiltins\nrange\n"
COMMAND = b"\x8c\x04true"
EXCEPTION = b"cmetaflow.exception\nMetaflowExceptionWrapper\nN\x85R"
HUGE = b"\xff\xff\xff\x7f"

HOSTILE = {
    # a call of something of the host's, in every way that pickle has
    "GLOBAL, REDUCE": OS_SYSTEM + COMMAND + b"\x85R",
    "STACK_GLOBAL, REDUCE": b"\x8c\x02os\x8c\x06system\x93" + COMMAND + b"\x85R",
    "STACK_GLOBAL by memo": b"\x8c\x02os\x940\x8c\x06system\x940h\x00h\x01\x93"
    + COMMAND
    + b"\x85R",
    "INST": b"(" + COMMAND + b"ios\nsystem\n",
    "OBJ": b"(" + OS_SYSTEM + COMMAND + b"o",
    "NEWOBJ": OS_SYSTEM + COMMAND + b"\x85\x81",
    "NEWOBJ_EX": OS_SYSTEM + COMMAND + b"\x85}\x92",
    "INST of a known name": b"(K\x01K\x02K\x01ibuiltins\nrange\n",
    "OBJ of a known name": b"(" + RANGE + b"K\x01K\x02K\x01o",
    "NEWOBJ of a known name": RANGE + b"K\x01K\x02K\x01\x87\x81",
    "NEWOBJ_EX of a known name": RANGE + b"K\x01K\x02K\x01\x87}\x92",
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\x00",
    "EXT4": b"\x84\x01\x00\x00\x00",
    "PERSID": b"Pid\n",
    "BINPERSID": COMMAND + b"Q",
    "NEXT_BUFFER": b"\x97",
    "READONLY_BUFFER": COMMAND + b"\x98",
    "builtins.eval": b"cbuiltins\neval\n" + COMMAND + b"\x85R",
    "builtins.getattr": b"cbuiltins\ngetattr\nN" + COMMAND + b"\x86R",
    "__builtin__.eval": b"c__builtin__\neval\n" + COMMAND + b"\x85R",
    "a dotted name": b"\x8c\x08builtins\x8c\x0erange.__init__\x93)R",
    "a dotted module": b"\x8c\x00\x8c\x02os\x93)R",
    "copyreg": b"ccopyreg\n_reconstructor\n)R",
    "metaflow's own": b"cmetaflow.exception\nMetaflowException\n)R",
    "numpy": b"cnumpy.core.multiarray\n_reconstruct\n)R",
    # a name where a value belongs
    "name as the result": RANGE,
    "name in a list": b"]" + RANGE + b"a",
    "name among many": b"](" + RANGE + b"e",
    "name in a tuple": RANGE + b"\x85",
    "name in a dict": b"}K\x01" + RANGE + b"s",
    "name as a key": b"}" + RANGE + b"K\x01s",
    "name in a set": b"\x8f(" + RANGE + b"\x90",
    "name in a frozenset": b"(" + RANGE + b"\x91",
    "name as a state": EXCEPTION + RANGE + b"b",
    "name as an argument": RANGE + RANGE + b"\x85R",
    "name by memo as the result": RANGE + b"\x940h\x00",
    "names named by numbers": b"K\x01K\x02\x93",
    "name of a name": b"\x8c\x08builtins" + RANGE + b"\x93",
    # a constructor with what it is never given
    "REDUCE of a value": b"]K\x01\x85R",
    "REDUCE of text": b"\x8c\x0ebuiltins.range)R",
    "REDUCE with a list": RANGE + b"]R",
    "REDUCE with None": RANGE + b"NR",
    "range with step 0": RANGE + b"K\x01K\x02K\x00\x87R",
    "range of truth values": RANGE + b"\x88\x88\x88\x87R",
    "range of text": RANGE + COMMAND + b"\x85R",
    "range of one": RANGE + b"K\x05\x85R",
    "range of none": RANGE + b")R",
    "bytearray of a number": b"cbuiltins\nbytearray\nJ" + HUGE + b"\x85R",
    "bytearray of text": b"cbuiltins\nbytearray\n" + COMMAND + b"\x8c\x05utf-8\x86R",
    "bytearray of a list": b"cbuiltins\nbytearray\n]\x85R",
    "complex of text": b"cbuiltins\ncomplex\n\x8c\x011\x85R",
    "complex of integers": b"cbuiltins\ncomplex\nK\x01K\x02\x86R",
    "slice of lists": b"cbuiltins\nslice\n]]]\x87R",
    "slice of one": b"cbuiltins\nslice\nK\x01\x85R",
    "exception of text": b"cmetaflow.exception\nMetaflowExceptionWrapper\n" + COMMAND + b"\x85R",
    "exception of nothing": b"cmetaflow.exception\nMetaflowExceptionWrapper\n)R",
    # BUILD, APPEND and SETITEM on what is not theirs
    "BUILD on a list": b"]}b",
    "BUILD on a dict": b"}}b",
    "BUILD on a name": RANGE + b"}b",
    "BUILD on a range": RANGE + b"K\x01K\x02K\x01\x87R}b",
    "BUILD on a bytearray": b"cbuiltins\nbytearray\n)R}b",
    "BUILD on nothing": b"}b",
    "BUILD with two states": EXCEPTION + b"}}\x86b",
    "BUILD with a list": EXCEPTION + b"]b",
    "BUILD of another field": EXCEPTION + b"}\x8c\x09__class__Nsb",
    "BUILD of a field of another type": EXCEPTION + b"}\x8c\x04type]sb",
    "BUILD of a field by a number": EXCEPTION + b"}K\x01Nsb",
    "APPEND to a tuple": b")K\x01a",
    "APPEND to a bytearray": b"cbuiltins\nbytearray\n)RK\x01a",
    "APPEND to a name": RANGE + b"K\x01a",
    "APPENDS to a set": b"\x8f(K\x01e",
    "ADDITEMS to a list": b"](K\x01\x90",
    "ADDITEMS to a frozenset": b"(\x91(K\x01\x90",
    "SETITEM of a list": b"]K\x00K\x01s",
    "SETITEMS of a list": b"](K\x00K\x01u",
    "SETITEMS with half an item": b"}(K\x00u",
    "a list as a key": b"}]Ns",
    "a list deep in a key": b"}]\x85\x85Ns",
    "a bytearray as a key": b"}cbuiltins\nbytearray\n)RNs",
    "a dict in a set": b"\x8f(}\x90",
    "a set in a frozenset": b"(\x8f\x91",
    # the stack
    "nothing": b"",
    "a mark": b"(",
    "two values": b"NN",
    "a value on a mark": b"(N",
    "POP of nothing": b"0",
    "POP of too much": b"N00N",
    "POP_MARK of nothing": b"1",
    "POP_MARK without a mark": b"N1",
    "POP of the only mark": b"(N00t",
    "TUPLE without a mark": b"Nt",
    "TUPLE1 of a mark": b"(\x85",
    "TUPLE2 across a mark": b"N(N\x86",
    "TUPLE3 of too little": b"NN\x87",
    "APPEND of a mark": b"](a",
    "FROZENSET without a mark": b"\x91",
    "REDUCE of nothing": b"R",
    "DUP": b"N2\x86",
    # the memo
    "MEMOIZE of nothing": b"\x94N",
    "MEMOIZE of a mark": b"(\x94N",
    "BINGET of nothing": b"h\x00",
    "BINGET too far": b"N\x94h\x01\x86",
    "LONG_BINGET too far": b"j\xff\xff\xff\xff",
    "BINPUT out of order": b"Nq\x01",
    "BINPUT over another": b"Nq\x00Nq\x00\x86",
    "LONG_BINPUT far out": b"Nr\xff\xff\xff\xff",
    "GET": b"N\x94g0\n\x86",
    "PUT": b"Np0\n",
    # sizes that lie
    "BINBYTES": b"B" + HUGE,
    "BINBYTES8": b"\x8e" + b"\xff" * 8,
    "BYTEARRAY8": b"\x96" + b"\xff" * 8,
    "BINUNICODE": b"X" + HUGE,
    "BINUNICODE8": b"\x8d" + b"\xff" * 8,
    "LONG4": b"\x8b" + HUGE,
    "LONG4 below zero": b"\x8b\xff\xff\xff\xff",
    "a name without end": b"c" + b"x" * 5000,
    "a name of nothing": b"c\n\n",
    # text and numbers
    "text that is not UTF-8": b"\x8c\x01\xff",
    "PROTO 0": b"\x80\x00N",
    "PROTO 1": b"\x80\x01N",
    "PROTO 6": b"\x80\x06N",
    "PROTO 255": b"\x80\xffN",
    "INT": b"I1\n",
    "LONG": b"L1L\n",
    "FLOAT": b"F1.0\n",
    "STRING": b"S'x'\n",
    "UNICODE": b"Vx\n",
    "LIST": b"(l",
    "DICT": b"(d",
}


@pytest.mark.parametrize(
    "code",
    [pytest.param(c, id=name) for name, c in HOSTILE.items()],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_is_more_than_plain_data_is_refused(code, protocol, spied):
    with pytest.raises(Refused):
        spied(b"\x80" + bytes([protocol]) + code + b".")


def test_the_name_of_what_was_refused_is_told():
    with pytest.raises(Refused, match=r"os\.system") as refused:
        load_data(b"\x80\x04" + HOSTILE["STACK_GLOBAL, REDUCE"] + b".")
    assert refused.value.name == "os.system"


def test_only_opcodes_that_plain_data_needs_are_known():
    allowed = {
        "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "NONE", "NEWTRUE", "NEWFALSE",
        "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "SHORT_BINUNICODE",
        "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8",
        "EMPTY_LIST", "EMPTY_DICT", "EMPTY_TUPLE", "EMPTY_SET", "TUPLE", "TUPLE1", "TUPLE2",
        "TUPLE3", "FROZENSET", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "MEMOIZE",
        "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE",
        "BUILD", "NEWOBJ",
    }  # fmt: skip
    names = {ord(op.code): op.name for op in pickletools.opcodes}
    for code in range(256):
        if names.get(code) not in allowed:
            with pytest.raises(Refused, match=f"opcode 0x{code:02x}"):
                load_data(b"\x80\x04N" + bytes([code]) + b"\x00" * 16)


VALID = [1, 2.5, "text", b"bytes", [1, [2]], {"a": (1, 2, 3, 4)}, {1, 2}, range(5), caught()]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("value", VALID, ids=lambda v: type(v).__name__)
def test_a_pickle_cut_anywhere_is_refused(value, protocol):
    dumped = pickle.dumps(value, protocol)
    for length in range(len(dumped)):
        with pytest.raises(Refused):
            load_data(dumped[:length])


@pytest.mark.parametrize("value", VALID, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("more", [b"\0", b".", b"\n", pickle.dumps(1, 4)])
def test_a_pickle_that_goes_on_after_its_end_is_refused(value, more):
    with pytest.raises(Refused):
        load_data(pickle.dumps(value, 4) + more)


# --- bombs --------------------------------------------------------------------------

COUNT = 100_000
COUNTED_BOMBS = {
    "sets": b"\x8f" * COUNT,
    "lists": b"]" * COUNT,
    "dicts": b"}" * COUNT,
    "sets in a list": b"](" + b"\x8f" * COUNT + b"e",
    "sets made and dropped": b"\x8f0" * COUNT + b"N",
}
LARGE_BOMBS = [
    pytest.param(b"(\x91" * COUNT, id="frozensets"),
    pytest.param(b"N\x85" * COUNT, id="tuples"),
    pytest.param(b"N" + b"\x85" * COUNT, id="nested tuples"),
    pytest.param(b"}NNs" * (COUNT // 8), id="dicts of one item"),
    pytest.param(b"\x8f(K\x00K\x01K\x02K\x03K\x04\x90" * (COUNT // 10), id="sets of some members"),
    pytest.param(
        b"cmetaflow.exception\nMetaflowExceptionWrapper\n\x94N\x85\x94"
        + b"h\x00h\x01R" * (COUNT // 4),
        id="exceptions",
    ),
    pytest.param(b"cbuiltins\nbytearray\n\x94" + b"h\x00)R" * COUNT, id="bytearrays"),
]


def peak_of(data):
    tracemalloc.start()
    try:
        with contextlib.suppress(Refused):
            load_data(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("code", COUNTED_BOMBS.values(), ids=COUNTED_BOMBS)
def test_a_small_pickle_of_many_containers_is_refused_before_it_fills_memory(code, monkeypatch):
    monkeypatch.setattr(opcodes, "MEMORY", 1 << 20)
    with pytest.raises(Refused, match="expands"):
        load_data(b"\x80\x04" + code + b".")
    # Each of them is also on the stack: 8 bytes, and as much again while that grows.
    assert peak_of(b"\x80\x04" + code + b".") < (2 << 20) + len(code)


@pytest.mark.parametrize("code", LARGE_BOMBS)
def test_no_small_pickle_takes_much_more_than_the_memory_it_may(code, monkeypatch):
    monkeypatch.setattr(opcodes, "MEMORY", 1 << 20)
    assert peak_of(b"\x80\x04" + code + b".") < (2 << 20) + len(code)


def test_as_many_containers_as_fit_are_loaded(monkeypatch):
    monkeypatch.setattr(opcodes, "MEMORY", 1 << 20)
    many = [set() for _ in range(4000)]
    assert load_data(pickle.dumps(many, 4)) == many


def test_one_byte_string_is_not_copied_into_many_byte_arrays():
    content = b"x" * 100_000
    code = (
        b"\x80\x04]\x94cbuiltins\nbytearray\n\x940B"
        + struct.pack("<I", len(content))
        + content
        + b"\x940("
        + b"h\x01h\x02\x85R" * 10_000
        + b"e."
    )
    with pytest.raises(Refused, match="expands"):
        load_data(code)
    assert peak_of(code) < 1 << 20


def in_a_child(function, seconds):
    """What becomes of a call in a process of its own: its result, "hung" or "crashed".

    Seconds are of CPU time, so that a busy machine makes no difference.
    """
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()  # a crash is what we look for
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        try:
            os.write(into, function().encode())
        except BaseException as e:
            os.write(into, type(e).__name__.encode())
        finally:
            os._exit(0)
    os.close(into)
    said = os.read(out, 100).decode()
    os.close(out)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return "hung" if os.WTERMSIG(status) == signal.SIGXCPU else "crashed"
    return said


def outcome(data):
    try:
        load_data(data)
    except Refused:
        return "refused"
    return "loaded"


def nested(depth):
    return b"N" + b"\x85" * depth


def doubled(depth):
    """A tuple of twice a tuple of twice …: small to hold, 2**depth long to walk through."""
    steps = b"".join(b"h%ch%c\x86\x940" % (i, i) for i in range(depth))
    return b"N\x940" + steps + b"h%c" % depth


def colliding(count):
    """Different integers that all have the same hash."""
    modulus = sys.hash_info.modulus
    return b"".join(pickle.dumps(modulus * i, 4)[2:-1] for i in range(1, count))


def used_often(key, count):
    """The same object as the key again and again: it is hashed each time."""
    return key + b"\x940}(" + b"h\x00N" * count + b"u"


def used_everywhere(key, *others, count):
    """The same key, and then those that are equal to it, in each of many dictionaries."""
    keys = [key, *others]
    made = b"".join(k + b"\x940" for k in keys)
    one = b"}" + b"".join(b"h%cNs" % i for i in range(len(keys)))
    return made + b"(" + one * count + b"t"


def compared_often(key, count):
    """Two equal keys: the second is compared with the first each time."""
    return b"}" + key + b"Ns" + key + b"\x940(" + b"h\x00N" * count + b"u"


SIZE = 4_000_000
INTEGER = b"\x8b" + struct.pack("<i", SIZE) + b"\x01" * SIZE
TEXT = b"X" + struct.pack("<I", SIZE) + b"x" * SIZE
BLOW_UPS = [  # each of these crashed or hung an earlier version
    pytest.param(b"}" + nested(400_000) + b"Ns", id="key nested too deep to be hashed"),
    pytest.param(b"\x8f(" + nested(400_000) + b"\x90", id="member nested too deep"),
    pytest.param(
        b"}" + nested(5000) + b"Ns" + nested(5000) + b"Ns", id="keys nested too deep to be compared"
    ),
    pytest.param(b"}" + doubled(60) + b"Ns", id="key that is hashed 2**60 times"),
    pytest.param(used_often(b"(" + b"N" * 100_000 + b"t", 100_000), id="wide key used often"),
    pytest.param(b"\x8f(" + colliding(60_000) + b"\x90", id="keys of one hash"),
    pytest.param(used_often(INTEGER, 100_000), id="huge number used often"),
    pytest.param(compared_often(TEXT, 100_000), id="long text used often"),
    pytest.param(used_everywhere(INTEGER, count=50_000), id="huge number in many dicts"),
    pytest.param(used_everywhere(INTEGER + b"\x85", count=50_000), id="huge number in tuples"),
    pytest.param(
        used_everywhere(TEXT + b"\x85", TEXT + b"\x85", count=120_000),
        id="long text in tuples",
    ),
]


@pytest.mark.parametrize("code", BLOW_UPS)
def test_no_pickle_crashes_or_hangs_the_process(code):
    # Each of these takes far longer than that on any machine if nothing bounds it.
    found = in_a_child(lambda: outcome(b"\x80\x04" + code + b"."), seconds=10)
    assert found in ("loaded", "refused")


def test_data_nested_without_end_loads_and_is_dropped_again():
    code = b"\x80\x04" + b"]" * 500_000 + b"a" * 499_999 + b"."
    assert in_a_child(lambda: outcome(code), seconds=15) in ("loaded", "refused")


# --- any bytes ----------------------------------------------------------------------

_watching = []
_FORBIDDEN = ("import", "exec", "compile", "open", "os.", "subprocess.", "socket.", "pickle.")


def _audit(event, args):
    if _watching and event.startswith(_FORBIDDEN):
        _watching[-1].append(event)


sys.addaudithook(_audit)


@pytest.fixture(scope="module")
def spied():
    """`load_data`, watched: it imports nothing, runs nothing, opens nothing, and is quick."""

    def load(data):
        events, modules, really = [], set(sys.modules), builtins.__import__

        def no_import(name, *args, **kwargs):
            if name != "metaflow.exception":  # the one type of ours, and not by the pickle's word
                events.append(f"__import__({name})")
            return really(name, *args, **kwargs)

        started = time.process_time()
        _watching.append(events)
        builtins.__import__ = no_import
        try:
            return load_data(data)
        finally:
            builtins.__import__ = really
            _watching.pop()
            assert events == []
            assert set(sys.modules) == modules
            assert time.process_time() - started < 5
            assert type(range) is type and range.__name__ == "range"

    return load


def test_the_watch_over_imports_sees_what_pickle_does(spied):
    events = []
    _watching.append(events)
    pickle.loads(b"cos\ngetpid\n)R.")
    _watching.pop()
    assert "pickle.find_class" in events


@settings(max_examples=400, deadline=None)
@given(data=st.binary(max_size=100))
def test_random_bytes_are_refused_or_data(data, spied):
    for start in (b"", b"\x80\x04"):
        with contextlib.suppress(Refused):
            spied(start + data + b".")


edits = st.lists(
    st.tuples(st.sampled_from("rids"), st.floats(0, 1), st.floats(0, 1), st.binary(max_size=3)),
    min_size=1,
    max_size=4,
)


def edited(data, changes):
    for kind, where, length, content in changes:
        at = round(where * len(data))
        to = at + round(length * 8)
        if kind == "r":
            data = data[:at] + content + data[at + len(content) :]
        elif kind == "i":
            data = data[:at] + content + data[at:]
        elif kind == "d":
            data = data[:at] + data[to:]
        else:
            data = data[:to] + data[at:]
    return data


@settings(max_examples=500, deadline=None)
@given(value=graphs(), protocol=st.sampled_from(PROTOCOLS), changes=edits)
def test_a_changed_pickle_is_refused_or_loads_as_pickle_loads_it(value, protocol, changes, spied):
    assert_refused_or_same(edited(pickle.dumps(value, protocol), changes), spied)


def operands(op):
    if op.name in ("GLOBAL", "INST"):
        return st.sampled_from(
            [b"builtins\nrange\n", b"builtins\nbytearray\n", b"builtins\nset\n", b"os\nsystem\n"]
        )
    if op.arg is None:
        return st.just(b"")
    if op.arg.n >= 0:
        small = st.sampled_from([bytes([n]) + b"\0" * (op.arg.n - 1) for n in range(6)])
        return small | st.binary(min_size=op.arg.n, max_size=op.arg.n)
    size = {"1": 1, "4": 4, "8": 8}.get(op.arg.name[-1], 1)
    return st.binary(max_size=5).map(lambda b: len(b).to_bytes(size, "little") + b)


programs = st.lists(
    st.one_of(
        [
            operands(op).map(lambda b, op=op: op.code.encode("latin-1") + b)
            for op in pickletools.opcodes
        ]
    ),
    max_size=30,
).map(b"".join)


@settings(max_examples=800, deadline=None)
@given(program=programs, protocol=st.sampled_from(PROTOCOLS))
def test_a_random_program_is_refused_or_loads_as_pickle_loads_it(program, protocol, spied):
    assert_refused_or_same(b"\x80" + bytes([protocol]) + program + b".", spied)


def assert_refused_or_same(data, spied):
    try:
        loaded = spied(data)
    except Refused:
        return
    # What loads is plain data, so it is safe to let pickle load it too.
    try:
        expected = pickle.loads(data)
    except Exception:
        return  # pickle looks at what is only a hint, such as the length of a frame
    assume(b"MetaflowExceptionWrapper" not in data)  # whose fields we complete
    assert_same(expected, loaded)


# --- what the user is told ------------------------------------------------------------


def deserialize(data, encoding="pickle-v4", classes=()):
    origin = {"source": "metaflow-sandbox", "origin": "F/1/s/2", "artifact": "x"}
    metadata = SerializationMetadata("<class 'list'>", len(data), mark(classes) + encoding, origin)
    return TaintedPickle.deserialize([data], metadata)


def test_outside_of_a_sandbox_plain_data_loads_and_the_rest_is_refused_with_the_ways_on():
    assert deserialize(pickle.dumps([1, "x"], 4)) == [1, "x"]
    with pytest.raises(ArtifactRefused, match="pkg.Result") as refused:
        deserialize(naming("pkg.Result"))
    for words in (
        "`x` of F/1/s/2",
        "leave data",
        "@sandbox",
        'trust="all"',
        'trust=["pkg.Result"]',
        "release F/1/s/2/x",
        'trusting("pkg.Result")',
    ):
        assert words in str(refused.value)


def naming(name):
    module, _, last = name.rpartition(".")
    return b"\x80\x04c" + f"{module}\n{last}\n".encode() + b")R."


CLASSES = [
    "pkg.Result",
    "pkg.of.Result",
    "argparse.Namespace",
    "argparse.ArgumentParser",
    "__main__.A",
]
CODE = [
    "os.system", "posix.system", "builtins.eval", "builtins.type", "functools.partial",
    "functools.reduce", "operator.methodcaller", "types.FunctionType", "pty.spawn", "os.path.join",
    "this.is_not_loaded",
]  # fmt: skip


@pytest.mark.parametrize("name", CODE)
def test_one_is_not_told_to_name_code_as_if_it_were_a_class(name):
    with pytest.raises(ArtifactRefused, match=re.escape(f"`{name}` is no class")) as refused:
        deserialize(naming(name))
    said = str(refused.value)
    assert "trust=[" not in said and f'"{name}"' not in said
    for words in ("leave data", 'trust="all"', "release F/1/s/2/x --all", 'trusting("all")'):
        assert words in said
    assert "this" not in sys.modules  # nothing was imported to find out


@pytest.mark.parametrize("name", CLASSES)
def test_one_is_told_to_name_a_class(name):
    with pytest.raises(ArtifactRefused, match=re.escape(f'trust=["{name}"]')):
        deserialize(naming(name))


@pytest.mark.parametrize(
    "name, remedy",
    [("pkg.Result", "install what has it"), ("__main__.A", "import it first: from FLOW import A")],
)
def test_of_a_class_that_is_named_already_and_not_here_one_is_told_to_have_it_here(name, remedy):
    with pytest.raises(ArtifactRefused, match=re.escape(remedy)) as refused:
        deserialize(naming(name), classes=[name])
    said = str(refused.value)
    assert "read it in a step that runs in a sandbox" in said
    for words in ("trust", '"all"', "--all", "release", "run code"):
        assert words not in said


def test_of_data_whose_package_is_not_here_one_is_not_told_that_it_is_code(monkeypatch):
    data = pickle.dumps(numpy.float64(1))
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(ArtifactRefused, match="needs numpy, which is not installed") as refused:
        deserialize(data)
    assert "install what has it" in str(refused.value)
    assert "no class" not in str(refused.value)


def test_what_is_no_pickle_is_refused():
    with pytest.raises(ArtifactRefused, match="arrow"):
        deserialize(b"", encoding="arrow")


@pytest.mark.parametrize("name", ["\x1b]0;title\x07", "\x9b31m", "\r\n[ok]", "\ud800"])
def test_what_the_user_is_told_has_no_control_characters_of_the_sandboxs(name):
    raw = name.encode("utf-8", "surrogatepass")
    hostile = b"\x80\x04\x8c\x02os\x8c" + bytes([len(raw)]) + raw + b"\x93."
    with pytest.raises(ArtifactRefused) as refused:
        deserialize(hostile)
    shown = str(refused.value)
    shown.encode()
    assert not [c for c in shown.replace("\n", "") if ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0]
    assert "\n[ok]" not in shown
