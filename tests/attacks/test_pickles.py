"""Pickles that name nothing but data's own types, against the interpreter.

Each of them does harm when plain unpickling loads it, which its control shows in a process
of its own: `test_the_pickle_does_harm_when_it_is_unpickled`. The interpreter refuses it.
"""

import collections
import contextlib
import copyreg
import datetime
import decimal
import fractions
import os
import pathlib
import pickle
import pickletools
import random
import resource
import signal
import struct
import sys
import tracemalloc
import warnings
import zoneinfo

import numpy
import pandas
import pytest
import pytz
from pandas._libs.internals import _unpickle_block
from pandas.core.indexes.base import _new_Index
from pandas.core.indexes.interval import _new_IntervalIndex
from pandas.core.internals.managers import BlockManager

from metaflow_extensions.sandbox.plugins.pickles import Refused, load_data, opcodes

GIGABYTE = 1 << 30


class Made:
    """Pickles as a call of anything with any arguments and any state."""

    def __init__(self, call, args, state=None):
        self.parts = (call, args) if state is None else (call, args, state)

    def __reduce__(self):
        return self.parts


class MadeAnew(Made):
    """The same by NEWOBJ, which pickle writes for the object's own class alone."""

    def __init__(self, cls, state):
        super().__init__(copyreg.__newobj__, (cls,), state)

    @property
    def __class__(self):
        return self.parts[1][0]


def in_a_child(function, seconds=5):
    """What a call comes to in a process of its own: its result, or how it ended."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            import faulthandler

            faulthandler.disable()
            warnings.simplefilter("ignore")
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
            resource.setrlimit(resource.RLIMIT_AS, (4 * GIGABYTE, 4 * GIGABYTE))
            os.write(into, str(function()).encode()[:100])
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


def dtype(code, *state):
    return Made(numpy.dtype, (code, False, True), state)


NUMBERS = (3, "<", None, None, None, -1, -1, 0)
BOOLS = (3, "|", None, None, None, -1, -1, 0)
core = numpy.array(0).__reduce__()[0]  # numpy's `_reconstruct`, wherever this version has it


def array(kind, shape, content):
    return Made(core, (numpy.ndarray, (0,), b"b"), (1, shape, kind, False, content))


def floats(count, value=0.0):
    return struct.pack("<d", value) * count


# A field that holds references, in a dtype whose flags deny it: the bytes become addresses.
OBJECTS = dtype("O8", 3, "|", None, None, None, -1, -1, 63)
DENIED = dtype("V8", 3, "|", None, ("a",), {"a": (OBJECTS, 0)}, 8, 1, 0)
OVERLAP = dtype("V8", 3, "|", None, ("a",), {"a": (dtype("f8", *NUMBERS), 4096)}, 8, 1, 0)
TEXT = dtype("U1", 3, "<", None, None, None, 4, 4, 8)

SERIES = pandas.Series(["a", "b"], dtype="category")
CODES = pickle.dumps(pandas.Categorical(["a", "b"], categories=["a", "b"]), 4)


def with_codes(codes):
    """A Categorical of two categories whose codes are other ones."""
    assert CODES.count(b"C\x02\x00\x01") == 1
    return CODES.replace(b"C\x02\x00\x01", b"C\x02" + codes)


FRAME = pickle.dumps(pandas.DataFrame({"a": [1.0, 2.0], "b": [3.0, 4.0]}), 4)


def with_slice(stop):
    """A frame of two columns whose block says that it is others."""
    mark = b"K\x00K\x02K\x01\x87"
    assert mark in FRAME
    return FRAME.replace(mark, b"K\x00K" + bytes([stop]) + b"K\x01\x87", 1)


def block(places, values):
    return Made(_unpickle_block, (values, places, 2))


def frame(*blocks, columns, rows=1):
    axes = [pandas.RangeIndex(columns), pandas.RangeIndex(rows)]
    manager = Made(BlockManager, (blocks, axes))
    state = {"_mgr": manager, "_typ": "dataframe", "_metadata": [], "attrs": {}}
    return MadeAnew(pandas.DataFrame, {**state, "_flags": {"allows_duplicate_labels": True}})


ROWS = numpy.arange(3).reshape(3, 1)
SHARED = block(numpy.array([0, 1, 2]), ROWS)


def widened(data):
    """A column more for the first of two frames, and then the second is looked at."""
    one, other = pickle.loads(data)
    one.insert(0, "more", 1)
    return other[2]


def attributes_of(cls):
    """BUILD on the class itself, with a state for slots."""
    name = f"{cls.__module__}\n{cls.__qualname__}\n".encode()
    return b"\x80\x04c" + name + b"N}\x8c\x05_evilK\x01s\x86b."


def injected():
    pickle.loads(attributes_of(fractions.Fraction))
    return getattr(fractions.Fraction, "_evil", None)


def zones():
    zone = pytz.timezone("Europe/Berlin")
    before = len(zone._tzinfos)
    pickle.loads(ADDED_ZONE)
    return len(zone._tzinfos) - before


ADDED_ZONE = pickle.dumps(Made(pytz._p, ("Europe/Berlin", 60, 60, "EVIL")), 4)
SOMETIME = pickle.dumps(Made(datetime.datetime, (bytes([7, 228, 1, 1, 99, 99, 99, 0, 0, 0]),)), 4)

# {name: (the pickle, what loading it leads to, what that comes to)}
ATTACKS = {
    "references in bytes": (
        array(DENIED, (4,), b"\x41" * 32),
        lambda data: repr(pickle.loads(data)["a"]),
        "crashed",
    ),
    "a field beyond its array": (
        array(OVERLAP, (1,), b"\0" * 8),
        lambda data: pickle.loads(data)["a"].nbytes,
        ("8", "crashed", "ValueError"),
    ),
    "twenty gigabytes of nothing": (
        Made(core, (numpy.ndarray, (20 * GIGABYTE,), b"b")),
        lambda data: pickle.loads(data),
        ("MemoryError", "_ArrayMemoryError"),
    ),
    "truth values that are neither": (
        array(dtype("b1", *BOOLS), (64,), b"\x07" * 64),
        lambda data: pickle.loads(data).view("u1").max(),
        "7",
    ),
    "text beyond Unicode": (
        array(TEXT, (2,), b"\xff\xff\xff\x7f" * 2),
        lambda data: pickle.loads(data)[0],
        ("SystemError", "ValueError", "crashed"),
    ),
    "codes beyond the categories": (
        with_codes(b"\x70\x71"),
        lambda data: list(pickle.loads(data)),
        ("IndexError", "crashed"),
    ),
    "codes below the categories": (
        with_codes(b"\x80\x81"),
        lambda data: list(pickle.loads(data)),
        ("IndexError", "ValueError", "crashed"),
    ),
    "a block in the place of others": (
        with_slice(1),
        lambda data: str(pickle.loads(data)),
        ("ValueError", "AssertionError", "IndexError", "crashed"),
    ),
    "columns before the first": (
        frame(block(numpy.array([-3, -2, -1]), ROWS), columns=3),
        lambda data: pickle.loads(data)[2],
        ("AssertionError", "crashed"),
    ),
    "BUILD on a class": (attributes_of(fractions.Fraction), lambda data: injected(), "1"),
    "a zone of the host's process": (ADDED_ZONE, lambda data: zones(), "1"),
    "a time that isn't one": (
        SOMETIME,
        lambda data: pickle.loads(data).hour,
        "99",
    ),
    "a number that takes for ever": (
        Made(fractions.Fraction, ("1e999999999",)),
        lambda data: pickle.loads(data),
        ("hung", "MemoryError"),
    ),
}


def bytes_of(attack):
    return attack if isinstance(attack, bytes) else pickle.dumps(attack, 4)


@pytest.mark.parametrize("name", ATTACKS)
def test_the_pickle_does_harm_when_it_is_unpickled(name):
    attack, harm, comes_to = ATTACKS[name]
    data = bytes_of(attack)
    found = in_a_child(lambda: harm(data))
    assert found in ((comes_to,) if isinstance(comes_to, str) else comes_to)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_pickle_that_names_only_data_and_is_none_is_refused(name):
    data = bytes_of(ATTACKS[name][0])

    def load():
        try:
            load_data(data)
        except Refused:
            return "refused"
        return "loaded"

    assert in_a_child(load) == "refused"


def test_frames_that_share_their_columns_part_when_one_is_changed():
    data = pickle.dumps([frame(SHARED, columns=3), frame(SHARED, columns=3)])
    assert in_a_child(lambda: widened(data)) in ("AssertionError", "IndexError", "crashed")
    one, other = load_data(data)
    one.insert(0, "more", 1)
    assert list(other.loc[0]) == [0, 1, 2]


FORGED = {
    "columns that are not there": frame(block(numpy.array([0, 3]), ROWS[:2]), columns=2),
    "columns that come twice": frame(block(numpy.array([0, 0]), ROWS[:2]), columns=2),
    "more items than bytes": array(dtype("f8", *NUMBERS), (4,), floats(3)),
    "fewer items than bytes": array(dtype("f8", *NUMBERS), (2,), floats(3)),
    "a length below zero": array(dtype("f8", *NUMBERS), (-1, -3), floats(3)),
    "lengths that overflow": array(dtype("f8", *NUMBERS), (1 << 62, 1 << 62, 0), b""),
    "a shape that is a list": array(dtype("f8", *NUMBERS), [3], floats(3)),
    "a shape of floats": array(dtype("f8", *NUMBERS), (3.0,), floats(3)),
    "too many dimensions": array(dtype("f8", *NUMBERS), (1,) * 65, floats(1)),
    "objects in bytes": array(OBJECTS, (1,), b"\x41" * 8),
    "fewer objects than items": array(OBJECTS, (2,), [1]),
    "numbers in a list": array(dtype("f8", *NUMBERS), (1,), [1.0]),
    "a dtype for a dtype": array("f8", (3,), floats(3)),
    "a size of its own": array(dtype("f8", 3, "<", None, ("a",), {}, 8, 8, 0), (1,), floats(1)),
    "nothing that takes no place": array(
        dtype("V0", 3, "|", None, None, None, 0, 1, 0), (1 << 40,), b""
    ),
    "a size that isn't its letter's": dtype("S5", 3, "|", None, None, None, 500, 1, 0),
    "a longdouble": dtype("f16", 3, "<", None, None, None, -1, -1, 0),
    "fields that are not there": dtype(
        "V8", 3, "|", None, ("a", "b"), {"a": (OBJECTS, 0)}, 8, 1, 0
    ),
    "a field below zero": dtype(
        "V8", 3, "|", None, ("a",), {"a": (dtype("f8", *NUMBERS), -4)}, 8, 1, 0
    ),
    "no unit of time": dtype("M8", 4, "<", None, None, None, -1, -1, 0, ({}, (b"xx", 1, 1, 1))),
    "no part of a unit": dtype("M8", 4, "<", None, None, None, -1, -1, 0, ({}, (b"s", 0, 0, 1))),
    "metadata": dtype("M8", 4, "<", None, None, None, -1, -1, 0, ({"a": 1}, (b"s", 1, 1, 1))),
    "a subclass": Made(core, (numpy.matrix, (0,), b"b"), (1, (1, 1), OBJECTS, False, [1])),
    "two states": b"\x80\x04cnumpy\ndtype\n(\x8c\x02f8\x89\x88tR(K\x03\x8c\x01<NNNJ\xff\xff\xff\xff"
    b"J\xff\xff\xff\xffK\x00t\x94bh\x00b.",
    "no state": b"\x80\x04cnumpy\ndtype\n(\x8c\x02f8\x89\x88tR.",
    "an array within itself before it is whole": b"\x80\x04cnumpy._core.multiarray\n_reconstruct\n"
    b"(cnumpy\nndarray\nK\x00\x85C\x01btR\x94]h\x00a.",
    "a random generator": numpy.random.default_rng(1),
    "a defaultdict that calls": b"\x80\x04ccollections\ndefaultdict\ncos\nsystem\n\x85R.",
    "a defaultdict of arrays": b"\x80\x04ccollections\ndefaultdict\ncnumpy\nndarray\n\x85R.",
    "a deque with items": Made(collections.deque, ([1], 3)),
    "a zone that is a path": b"\x80\x04cbuiltins\ngetattr\nczoneinfo\nZoneInfo\n\x8c\x09_unpickle"
    b"\x86R\x8c\x10../../etc/passwdK\x01\x86R.",
    "another method of a zone": b"\x80\x04cbuiltins\ngetattr\nczoneinfo\nZoneInfo\n"
    b"\x8c\x0bclear_cache\x86R)R.",
    "getattr of a value": b"\x80\x04cbuiltins\ngetattr\n\x8c\x01a\x8c\x05upper\x86R)R.",
    "a path that is none": b"\x80\x04cpathlib\nPosixPath\nK\x01\x85R.",
    "attributes of Python's own": b"\x80\x04ctypes\nSimpleNamespace\n)R}"
    b"\x8c\x0d__reduce_ex__K\x01sb.",
    "a pattern": __import__("re").compile("(a+)+$"),
    "BUILD on a list of the memo": b"\x80\x04]\x94}b.",
    "BUILD on a constant": b"\x80\x04cpandas\nNA\n}\x8c\x01xK\x01sb.",
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_value_is_refused(name):
    with pytest.raises(Refused):
        load_data(bytes_of(FORGED[name]))


# --- what a few bytes make much of ------------------------------------------------------


def index(cls, **fields):
    return Made(_new_Index, (cls, {"name": None, **fields}))


def the_range(count):
    return index(pandas.RangeIndex, start=0, stop=count, step=1)


def levels(levels, codes):
    names = [None] * len(levels)
    fields = {"levels": levels, "codes": codes, "sortorder": None, "names": names}
    return Made(_new_Index, (pandas.MultiIndex, fields))


def intervals(ends):
    fields = {"left": ends, "right": ends, "closed": "right", "name": None}
    return Made(_new_IntervalIndex, (pandas.IntervalIndex, fields))


def repeated(count, call, *args):
    return [Made(call, args) for _ in range(count)]


LONG = dtype("S100000000", 3, "|", None, None, None, 100_000_000, 1, 0)
MEGABYTE = numpy.zeros(1 << 20, "i1")
LABELS = numpy.arange(100_000)
ENDS = range(10_000_000)
INTERVALS = pandas.arrays.IntervalArray([]).__reduce__()
MANY_FIELDS = numpy.dtype([(f"f{i}", "u1") for i in range(1000)]).__reduce__()
BOMBS = {
    "intervals of a range": intervals(the_range(10_000_000)),
    "an array of intervals of ranges": Made(
        *INTERVALS[:2],
        ({"_left": ENDS, "_right": ENDS, "_dtype": pandas.IntervalDtype("i8", "right")},),
    ),
    "a level of a range": levels([the_range(100_000_000)], [numpy.zeros(1, "i1")]),
    "levels of the same codes": levels([the_range(1)] * 200, [MEGABYTE] * 200),
    "columns of nothing": frame(
        block(slice(0, 10_000_000, 1), array(dtype("f8", *NUMBERS), (10_000_000, 0), b"")),
        columns=10_000_000,
        rows=0,
    ),
    "what fills nothing": Made(
        numpy.ma.core._mareconstruct,
        (numpy.ma.MaskedArray, numpy.ndarray, (0,), b"b"),
        (1, (0,), LONG, False, b"", b"", numpy.array(b"x")),
    ),
    "indexes of the same labels": [index(pandas.Index, data=MEGABYTE) for _ in range(200)],
    "categories of the same labels": [
        MadeAnew(
            pandas.CategoricalDtype,
            {"categories": index(pandas.Index, data=LABELS), "ordered": False},
        )
        for _ in range(100)
    ],
    "scalars of the same bytes": repeated(
        200,
        numpy.bytes_().__reduce__()[0],
        numpy.dtype("S1048576"),
        b"x" * (1 << 20),
    ),
    "dtypes of the same fields": [Made(*MANY_FIELDS) for _ in range(1000)],
    "paths of the same parts": repeated(500, pathlib.PurePosixPath, "a/" * 30_000),
    "numbers of the same digits": repeated(40_000, decimal.Decimal, "9" * 10_000),
    "zones of their own": repeated(
        20_000,
        *zoneinfo.ZoneInfo.no_cache("Europe/Berlin").__reduce__()[:1],
        "Europe/Berlin",
        False,
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_few_bytes_do_not_take_much_memory(name, monkeypatch):
    monkeypatch.setattr(opcodes, "MEMORY", 16 << 20)
    data = pickle.dumps(BOMBS[name], 4)

    def peak():
        tracemalloc.start()
        with contextlib.suppress(Refused):
            load_data(data)
        return tracemalloc.get_traced_memory()[1] >> 20

    assert int(in_a_child(peak, 60)) < 40 + 5 * (len(data) >> 20)


# --- what one opcode takes for ever with ------------------------------------------------


def tree(fields, levels):
    """A dtype whose fields are all the same one, and that one's too: few, and a tree of many."""
    kind = dtype("u1", 3, "|", None, None, None, -1, -1, 0)
    for _ in range(levels):
        names = tuple(f"f{i}" for i in range(fields))
        places = dict.fromkeys(names, (kind, 0))
        kind = dtype("V1", 3, "|", None, names, places, 1, 1, 16)
    return kind


def of_one_hash(count):
    """Different numbers that have the same hash in pandas."""
    low = numpy.arange(1, count + 1)
    return (low ^ (low << 11)) << 33 | low


def floats_of_one_hash(count):
    m, bits = 0x5BD1E995, 0xFFFFFFFF

    def mixed(words, factor):
        words = words * factor & bits
        return (words ^ (words >> 24)) * factor & bits

    low = numpy.arange(1, 4 * count, dtype="u8")
    high = mixed((((0xC70F6907 ^ 4) * m & bits) ^ mixed(low, m)) * m & bits, pow(m, -1, 1 << 32))
    found = (high << 32 | low).view("f8")
    return found[numpy.isfinite(found)][:count]


def of_one_hash_in_objects(count, make=int):
    """Different labels whose Python hashes are one where pandas has folded them.

    Not in their order, in which pandas needs no hashes."""
    numbers = [k << 32 | (k ^ 0x1234567) for k in range(1, count + 1)]
    random.Random(0).shuffle(numbers)
    labels = numpy.empty(count, object)
    for i, number in enumerate(numbers):
        labels[i] = make(number)
    return labels


def categories(values, cls=pandas.Index):
    fields = {"categories": index(cls, data=values), "ordered": False}
    return MadeAnew(pandas.CategoricalDtype, fields)


VIEW = (b"\0" * (16 << 20), numpy.dtype(">U1"), (4 << 20,), "C")
SLOW = {
    "a range of huge ends": Made(range, (0, 1 << 16_000_000, (1 << 8_000_000) - 1)),
    "a tree of fields": tree(fields=1000, levels=4),
    "integers of one hash": categories(of_one_hash(200_000)),
    "floats of one hash": categories(floats_of_one_hash(100_000)),
    "complex numbers of one hash": categories(numpy.arange(100_000.0) * (1 + 1j)),
    "short complex numbers of one hash": categories(
        numpy.random.RandomState(0).permutation(100_000).astype("f4") * numpy.complex64(1 + 1j)
    ),
    "integers of one hash as objects": categories(of_one_hash_in_objects(50_000)),
    "floats of one hash as objects": categories(of_one_hash_in_objects(50_000, float)),
    "tuples of one hash": categories(of_one_hash_in_objects(50_000, lambda n: (n,))),
    "moments of one hash": categories(
        of_one_hash_in_objects(30_000, lambda n: pandas.Timestamp(n | 1))
    ),
    "a level of one hash": levels(
        [index(pandas.Index, data=of_one_hash_in_objects(50_000))], [numpy.zeros(1, "i4")]
    ),
    "dates of one hash": categories(
        pandas.DatetimeIndex(of_one_hash(200_000))._data, pandas.DatetimeIndex
    ),
    "text that is looked at again and again": repeated(
        4000, numpy.array(0).__reduce_ex__(5)[0], *VIEW
    ),
}


@pytest.mark.parametrize("name", SLOW)
def test_loading_ends_in_time_whatever_one_opcode_asks_for(name):
    data = pickle.dumps(SLOW[name], 4)

    def load():
        try:
            load_data(data, seconds=1)
        except Refused:
            return "refused"
        return "loaded"

    assert in_a_child(load, 6) == "refused"


# --- what is read as a text, and looked for elsewhere ------------------------------------


@pytest.mark.parametrize("subtype", ["datetime64[ns, dateutil/%s]", "period[D]", "Sparse[float]"])
def test_no_file_is_opened_for_what_intervals_are_of(subtype, tmp_path):
    zone = tmp_path / "zone"
    zone.write_bytes(b"TZif")
    text = subtype % zone if "%" in subtype else subtype
    data = pickle.dumps(MadeAnew(pandas.IntervalDtype, {"subtype": text, "closed": "right"}), 4)

    def load():
        opened = []
        sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" else None)
        try:
            load_data(data)
        except Refused:
            return "refused" if str(zone) not in map(str, opened) else "opened"
        return "loaded"

    assert in_a_child(load, 20) == "refused"


# --- what ends by recursion in C when it is dropped -------------------------------------


def code_of(made):
    return pickletools.optimize(pickle.dumps(made, 3))[2:-1]


# {kind: (what begins one of them, what ends it)}
KINDS = {
    "deque": (b"ccollections\ndeque\n)R", b"a"),
    "defaultdict": (b"ccollections\ndefaultdict\n)RK\x01", b"s"),
    "array": (
        code_of(Made(core, (numpy.ndarray, (0,), b"b")))
        + b"(K\x01K\x01\x85"
        + code_of(OBJECTS)
        + b"\x89]",
        b"atb",
    ),
}


def deep(times, *kinds):
    starts, ends = zip(*kinds, strict=True)
    return b"\x80\x03" + b"".join(starts) * times + b"N" + b"".join(ends[::-1]) * times + b"."


def linked(times):
    """Deques in each other, from the outermost to the innermost."""
    links = b"".join(
        b"j%bj%ba0" % (struct.pack("<I", i), struct.pack("<I", i + 1)) for i in range(times)
    )
    return b"\x80\x04" + (KINDS["deque"][0] + b"\x940") * (times + 1) + links + b"j\0\0\0\0."


def loaded_and_dropped(load, data):
    try:
        load(data)
    except Refused:
        return "refused"
    return "dropped"


DEEP = {
    "deque": deep(200_000, KINDS["deque"]),
    "defaultdict": deep(300_000, KINDS["defaultdict"]),
    "array": deep(20_000, KINDS["array"]),
    "all of them": deep(20_000, *KINDS.values()),
    "linked": linked(200_000),
}


@pytest.mark.parametrize("name", DEEP)
def test_what_can_not_be_dropped_without_a_crash_is_refused(name):
    data = DEEP[name]
    assert in_a_child(lambda: loaded_and_dropped(pickle.loads, data), 60) == "crashed"
    assert in_a_child(lambda: loaded_and_dropped(load_data, data), 60) == "refused"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_nested_as_deep_as_it_may_be_is_dropped_whatever_lies_between(kind):
    most = deep(opcodes.NESTED, KINDS[kind])
    assert in_a_child(lambda: loaded_and_dropped(load_data, most)) == "dropped"
    between = (b"]", b"a"), *[KINDS[kind]] * opcodes.NESTED
    data = deep(300, *between)
    assert in_a_child(lambda: loaded_and_dropped(load_data, data), 30) == "dropped"


def test_deques_that_contain_each_other_load():
    one, other = collections.deque(), collections.deque()
    one += [other, one]
    other += [one, other]
    loaded = load_data(pickle.dumps(one))
    assert loaded[0][0] is loaded and loaded[1] is loaded and loaded[0][1] is loaded[0]


# --- classes that the user named, and what hides behind them ---------------------------


class Plain:
    pass


class Slotted:
    __slots__ = ("x",)


class Color(__import__("enum").Enum):
    RED = 1


ran = []


class Reduced:
    def __reduce__(self):
        return (ran.append, (1,))


def function():
    ran.append(2)


alias = os.system
NAMES = [f"{__name__}.{n}" for n in ("Plain", "Slotted", "Color", "Reduced", "function", "alias")]
HERE = __name__.encode()


def named(name, code):
    return b"\x80\x04c" + HERE + b"\n" + name.encode() + b"\n" + code + b"."


BEHIND = {
    "a call of a class": named("Plain", b")R"),
    "a call of a function": named("function", b")R"),
    "NEWOBJ of a function": named("function", b")\x81"),
    "another name of something": named("alias", b"\x8c\x04true\x85R"),
    "NEWOBJ of another name": named("alias", b"\x8c\x04true\x85\x81"),
    "a call from __reduce__": pickle.dumps(Reduced(), 4),
    "BUILD on the class": named("Plain", b"}\x8c\x01xK\x01sb"),
    "BUILD on the class's slots": named("Plain", b"N}\x8c\x01xK\x01s\x86b"),
    "BUILD on a member": named("Color", b"K\x01\x85R}\x8c\x07_value_K\x02sb"),
    "NEWOBJ of a member": named("Color", b"K\x01\x85\x81}\x8c\x07_value_K\x02sb"),
    "a member that isn't there": named("Color", b"K\x05\x85R"),
    "a member that is equal only": named("Color", b"\x88\x85R"),
    "the class of an object": named("Plain", b")\x81}\x8c\x09__class__K\x01sb"),
    "a slot that isn't one": named("Slotted", b")\x81N}\x8c\x07__doc__K\x01s\x86b"),
    "an attribute of a class": named("Plain.__init__", b")R"),
    "getattr": b"\x80\x04cbuiltins\ngetattr\nc" + HERE + b"\nPlain\n\x8c\x08__init__\x86R.",
    "APPEND to what is no list": named("Plain", b")\x81K\x01a"),
    "the class as a value": named("Plain", b""),
    "the class in a list": b"\x80\x04]c" + HERE + b"\nPlain\na.",
}


@pytest.mark.parametrize("name", BEHIND)
def test_nothing_but_objects_is_behind_the_name_of_a_class(name):
    with pytest.raises(Refused):
        load_data(BEHIND[name], NAMES)
    assert ran == []
    assert Color.RED.value == 1 and not hasattr(Plain, "x")


def test_a_class_of_data_is_not_made_in_another_way_by_naming_it():
    data = b"\x80\x04cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85\x85\x81."
    with pytest.raises(Refused):
        load_data(data, ["numpy.ndarray"])


def test_the_time_that_loading_may_take_is_bounded():
    data = b"\x80\x04(" + b"N0" * 20_000_000 + b"t."

    def load():
        try:
            load_data(data, seconds=1)
        except Refused as e:
            return e
        return "loaded"

    assert in_a_child(load) == "it takes longer than 1 s to read"
