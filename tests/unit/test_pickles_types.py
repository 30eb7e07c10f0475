"""Values of each type that is data load as pickle loads them: equal, of the same type."""

import array
import collections
import contextlib
import datetime
import decimal
import enum
import fractions
import ipaddress
import math
import os
import pathlib
import pickle
import sys
import types
import uuid
import zoneinfo
from dataclasses import dataclass, field
from random import Random

import numpy
import pandas
import pytest
import pytz
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hn
from hypothesis.extra import pandas as hp

from metaflow_extensions.sandbox.plugins.pickles import Refused, load_data, names, rules
from tests.attacks.test_pickles import in_a_child

PROTOCOLS = st.sampled_from([2, 3, 4, 5])
EVERY = pytest.mark.parametrize("protocol", [2, 3, 4, 5])
# Shrinking what is drawn from so much takes minutes, and the values are short anyway.
fuzzing = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
frames = settings(fuzzing, max_examples=20)


def same(a, b):
    """Equal in type and value, NaN and what is masked included."""
    assert type(a) is type(b), (type(a), type(b))
    if a is numpy.ma.masked:
        assert a is b
    elif isinstance(a, numpy.ma.MaskedArray):
        same(numpy.asarray(a.data), numpy.asarray(b.data))
        same(numpy.ma.getmaskarray(a), numpy.ma.getmaskarray(b))
        same(numpy.asarray(a.fill_value), numpy.asarray(b.fill_value))
    elif isinstance(a, numpy.ndarray):
        assert (a.dtype, a.shape, a.strides) == (b.dtype, b.shape, b.strides)
        assert a.dtype.isalignedstruct == b.dtype.isalignedstruct
        assert a.flags.writeable == b.flags.writeable
        if a.dtype.hasobject:
            same(list(a.flat), list(b.flat))
        else:
            assert a.tobytes() == b.tobytes()
    elif isinstance(a, numpy.generic):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()
    elif isinstance(a, pandas.DataFrame):
        pandas.testing.assert_frame_equal(a, b, check_freq=True)
        same(dict(a.attrs), dict(b.attrs))
        for x, y in zip(a._mgr.blocks, b._mgr.blocks, strict=True):
            assert type(x) is type(y) and type(x.values) is type(y.values)
    elif isinstance(a, pandas.Series):
        if a.dtype == object:
            same([list(a), a.name], [list(b), b.name])
            same(a.index, b.index)
        else:
            pandas.testing.assert_series_equal(a, b, check_freq=True)
        assert type(a.array) is type(b.array)
    elif isinstance(a, pandas.Index):
        pandas.testing.assert_index_equal(a, b, exact=True)
        assert getattr(a, "freq", None) == getattr(b, "freq", None)
    elif isinstance(a, pandas.api.extensions.ExtensionArray):
        pandas.testing.assert_extension_array_equal(a, b)
    elif a is pandas.NaT or a is pandas.NA:
        assert a is b
    elif isinstance(a, (list, tuple, collections.deque)):
        assert len(a) == len(b) and getattr(a, "maxlen", 0) == getattr(b, "maxlen", 0)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    elif isinstance(a, dict):
        same(list(a.items()), list(b.items()))
        assert getattr(a, "default_factory", 0) == getattr(b, "default_factory", 0)
    elif isinstance(a, float):
        assert a == b or (math.isnan(a) and math.isnan(b))
    elif isinstance(a, decimal.Decimal):
        assert a.as_tuple() == b.as_tuple()
    elif isinstance(a, (datetime.datetime, datetime.time)):
        assert (a.replace(tzinfo=None), a.fold) == (b.replace(tzinfo=None), b.fold)
        assert str(a.tzinfo) == str(b.tzinfo) and type(a.tzinfo) is type(b.tzinfo)
    elif isinstance(a, array.array):
        assert (a.typecode, a.tobytes()) == (b.typecode, b.tobytes())
    elif isinstance(a, types.SimpleNamespace):
        same(vars(a), vars(b))
    elif isinstance(a, datetime.tzinfo):
        assert str(a) == str(b)
    else:
        assert a == b


def check(value, protocol, classes=()):
    dumped = pickle.dumps(value, protocol)
    same(pickle.loads(dumped), load_data(dumped, classes))


# --- the standard library ---------------------------------------------------------

zones = st.one_of(
    st.none(),
    st.timezones(),
    st.just(datetime.timezone.utc),
    st.builds(
        datetime.timezone,
        st.timedeltas(datetime.timedelta(hours=-23), datetime.timedelta(hours=23)),
        st.text(max_size=5),
    ),
    st.sampled_from([pytz.utc, pytz.timezone("Europe/Berlin")]),
)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
standard = st.one_of(
    st.dates(),
    st.datetimes(timezones=zones),
    st.datetimes().map(lambda d: d.replace(fold=1)),
    st.times(timezones=zones),
    st.timedeltas(),
    zones,
    st.decimals(),
    st.decimals().map(lambda d: d.scaleb(900) if d.is_finite() and d else d),
    st.fractions(),
    st.uuids(),
    st.lists(st.text(st.characters(exclude_characters="\0"), max_size=5), max_size=4).map(
        lambda parts: pathlib.Path(*parts)
    ),
    st.lists(st.text("abc:/\\. ", max_size=5), max_size=4).map(
        lambda parts: pathlib.PureWindowsPath(*parts)
    ),
    st.ip_addresses(),
    st.ip_addresses(v=4).map(lambda a: ipaddress.ip_network(f"{a}/19", strict=False)),
    st.ip_addresses(v=6).map(lambda a: ipaddress.ip_interface(f"{a}/70")),
    st.dictionaries(st.text(max_size=3), plain).map(collections.OrderedDict),
    st.dictionaries(st.text(max_size=3), st.lists(st.integers())).map(
        lambda d: collections.defaultdict(list, d)
    ),
    st.lists(plain).map(collections.deque),
    st.lists(plain).map(lambda items: collections.deque(items, 3)),
    st.text().map(collections.Counter),
    st.lists(st.integers(-100, 100)).map(lambda n: array.array("b", n)),
    st.lists(st.integers(0, 2**63)).map(lambda n: array.array("Q", n)),
    st.lists(st.floats(width=32)).map(lambda n: array.array("f", n)),
    st.dictionaries(st.text("ab", min_size=1), plain).map(lambda d: types.SimpleNamespace(**d)),
    st.slices(100),
)
nested = st.recursive(
    standard | plain, lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner)
)


@fuzzing
@given(value=nested, protocol=PROTOCOLS)
def test_values_of_the_standard_library_load_as_pickle_loads_them(value, protocol):
    check(value, protocol)


@EVERY
@pytest.mark.parametrize(
    "value",
    [
        collections.defaultdict(collections.OrderedDict, a=1),
        collections.defaultdict(None),
        zoneinfo.ZoneInfo.no_cache("Asia/Tokyo"),
        pytz.timezone("Europe/Berlin").localize(datetime.datetime(2020, 7, 1)),
        uuid.UUID(int=5, is_safe=uuid.SafeUUID.safe),
        fractions.Fraction(-(10**300), 7),
        {datetime.date(2020, 1, 1): 1, uuid.UUID(int=1): 2, pathlib.PurePosixPath("a"): 3},
        {decimal.Decimal(1), fractions.Fraction(1, 2), ipaddress.ip_address("::1")},
    ],
    ids=repr,
)
def test_rare_values_load_as_pickle_loads_them(value, protocol):
    check(value, protocol)


def test_what_contains_itself_by_way_of_other_containers_does_so_afterwards():
    space = types.SimpleNamespace()
    space.deque = collections.deque([space])
    space.dict = collections.OrderedDict(me=space)
    loaded = load_data(pickle.dumps(space))
    assert loaded.deque[0] is loaded and loaded.dict["me"] is loaded


# --- numpy ------------------------------------------------------------------------

scalars = (
    hn.scalar_dtypes()
    .filter(lambda d: d.char not in "gG")
    .map(lambda d: numpy.dtype(f"{d.str[:2]}{d.itemsize // 4 or 1}") if d.kind == "U" else d)
)
dtypes = scalars | hn.array_dtypes(scalars, max_size=3, allow_subarrays=True)
arrays = hn.arrays(dtypes, hn.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)).filter(
    lambda a: a.dtype.itemsize
)


@fuzzing
@given(value=arrays, protocol=PROTOCOLS, order=st.sampled_from("CFT"))
def test_arrays_of_any_dtype_shape_and_order_load_as_pickle_loads_them(value, protocol, order):
    value = value.T if order == "T" else numpy.require(value, requirements=order)
    check(value, protocol)


@fuzzing
@given(value=arrays.filter(lambda a: a.size), protocol=PROTOCOLS)
def test_scalars_and_dtypes_load_as_pickle_loads_them(value, protocol):
    check([value.flat[0], value.dtype], protocol)


@fuzzing
@given(
    value=hn.arrays(
        object, hn.array_shapes(max_side=3), elements=nested | hn.arrays("f8", 2), fill=st.nothing()
    ),
    protocol=PROTOCOLS,
    fortran=st.booleans(),
)
def test_arrays_of_objects_load_as_pickle_loads_them(value, protocol, fortran):
    check(numpy.asfortranarray(value) if fortran else value, protocol)


@fuzzing
@given(
    value=hn.arrays("f8", (3, 2)), mask=hn.arrays("?", (3, 2)), protocol=PROTOCOLS, f=st.booleans()
)
def test_masked_arrays_load_as_pickle_loads_them(value, mask, protocol, f):
    order = numpy.asfortranarray if f else numpy.ascontiguousarray
    check(numpy.ma.MaskedArray(order(value), mask=order(mask), fill_value=7), protocol)


RARE_ARRAYS = {
    "aligned": numpy.ones(2, numpy.dtype([("a", "i1"), ("b", "f8")], align=True)),
    "nested": numpy.zeros(2, [("p", [("x", "f4"), ("ok", "?")]), ("q", "U2", (2,))]),
    "gaps": numpy.zeros(2, {"names": ["a"], "formats": ["i4"], "offsets": [4], "itemsize": 16}),
    "odd unit": numpy.array([1, 2], "M8[25us]"),
    "no unit": numpy.array(["NaT"], "m8"),
    "big-endian": numpy.arange(3, dtype=">i4"),
    "big-endian text": numpy.array(["ä"], ">U1"),
    "transposed": numpy.arange(24).reshape(2, 3, 4).transpose(1, 2, 0),
    "read-only": numpy.frombuffer(b"abcd", "u1"),
    "bytes": numpy.array([b"\xff"]),
    "void": numpy.zeros(2, "V5"),
    "masked": numpy.ma.masked,
    "large": numpy.zeros(100_000),
    "many dimensions": numpy.zeros((1,) * 32),
    "array in an array": numpy.array([numpy.array(5), None], dtype=object),
    "key": {numpy.int64(3): 1, numpy.str_("x"): 2, numpy.datetime64("2020"): 3},
}


@EVERY
@pytest.mark.parametrize("value", RARE_ARRAYS.values(), ids=RARE_ARRAYS)
def test_rare_arrays_load_as_pickle_loads_them(value, protocol):
    check(value, protocol)


def test_what_numpy_1_and_2_call_their_insides_is_the_same():
    dumped = pickle.dumps(numpy.arange(3), 2)
    other = dumped.replace(b"numpy._core.", b"numpy.core.")
    if other == dumped:
        other = dumped.replace(b"numpy.core.", b"numpy._core.")
    same(load_data(dumped), load_data(other))


# --- pandas -----------------------------------------------------------------------

labels = st.text("abc", max_size=3) | st.integers(-5, 5)
indexes = hp.range_indexes(max_size=5) | hp.indexes(dtype="int64", max_size=5)
columns = st.lists(
    st.builds(
        hp.column,
        name=st.uuids().map(str),
        dtype=st.sampled_from(["int64", "float64", "bool", "datetime64[ns]", "timedelta64[ns]"]),
    )
    | st.builds(hp.column, name=st.uuids().map(str), elements=st.just(st.text(max_size=3))),
    max_size=5,
)


@frames
@given(value=columns.flatmap(lambda c: hp.data_frames(c, index=indexes)), protocol=PROTOCOLS)
def test_frames_load_as_pickle_loads_them(value, protocol):
    check(value, protocol)


@frames
@given(
    value=hp.series(elements=nested.filter(lambda v: not isinstance(v, dict)), dtype=object),
    protocol=PROTOCOLS,
)
def test_series_of_objects_load_as_pickle_loads_them(value, protocol):
    check(value, protocol)


def _frames():
    days = pandas.date_range("2020", periods=3, freq="D")
    wide = pandas.DataFrame(numpy.arange(12.0).reshape(3, 4))
    mixed = wide.assign(z=1, y="s", x=2.5, w=[True, False, True])
    noted = pandas.DataFrame({"a": [1]})
    noted.attrs["source"] = ["x", 1]
    pairs = pandas.MultiIndex.from_product([[1, 2], ["a", "b"]], names=["n", None])
    zoned = pandas.DataFrame(
        {"t": days.tz_localize("Europe/Berlin"), "c": pandas.Categorical(["a", None, "b"])}
    )
    table = pandas.DataFrame({"a": [1, 2], "b": ["x", "y"], "v": [1.0, 2.0]})
    return {
        "wide": wide,
        "transposed": wide.T,
        "mixed": mixed,
        "part": mixed[["z", "y"]],
        "rows": mixed[mixed.z > 0],
        "empty": pandas.DataFrame(),
        "attributes": noted,
        "pairs": pandas.DataFrame({"a": range(4)}, index=pairs),
        "zoned": zoned,
        "grouped": mixed.groupby("y").sum(),
        "pivoted": table.pivot(index="a", columns="b", values="v"),
        "described": table.describe(),
        "counted": table["b"].value_counts(),
        "sampled": pandas.Series(range(3), index=days).resample("2D").sum(),
        "cut": pandas.cut(pandas.Series([1, 2, 3]), 2),
        "days": days,
        "hours": pandas.date_range("2020", periods=3, freq="h", tz="UTC"),
        "months": pandas.date_range("2020", periods=3, freq="MS"),
        "weekdays": pandas.date_range("2020", periods=3, freq="B"),
        "steps": pandas.timedelta_range("1h", periods=3),
        "intervals": pandas.interval_range(0, 3),
        "categories": pandas.CategoricalIndex(["a", "b"], ordered=True),
        "objects": pandas.Index(["a", 1, None], dtype=object),
        "text": pandas.Series(["a", None, "c"]),
        "strings": pandas.Series(["a", None], dtype="string"),
        "nullable": pandas.DataFrame(
            {
                "i": pandas.array([1, None], dtype="Int32"),
                "u": pandas.array([1, None], dtype="UInt8"),
                "f": pandas.array([1.5, None], dtype="Float64"),
                "b": pandas.array([True, None], dtype="boolean"),
            }
        ),
        "values": [
            pandas.Timestamp("2020-01-01 01:02:03.000000004", tz="UTC"),
            pandas.Timestamp("2020-01-01", tz="Europe/Berlin"),
            pandas.Timedelta("1s"),
            pandas.NaT,
            pandas.NA,
            pandas.Interval(0, 1.5),
        ],
        "keys": {pandas.Timestamp("2020"): 1, pandas.Timedelta("1s"): 2},
    }


FRAMES = _frames()


@EVERY
@pytest.mark.parametrize("value", FRAMES.values(), ids=FRAMES)
def test_what_people_do_with_frames_loads_as_pickle_loads_it(value, protocol):
    check(value, protocol)


# --- and what isn't one of them any more ------------------------------------------


def use(value):
    """What a user does with what was loaded: it is then that a forged value does its harm."""
    repr(value)
    if isinstance(value, pandas.DataFrame):
        for place in range(value.shape[1]):
            use(value.iloc[:, place])
        value.insert(0, object(), 0)
        value.pop(value.columns[-1])
    elif isinstance(value, pandas.Series):
        use(value.index)
        value.iloc[::-1].sort_values()
    elif isinstance(value, pandas.Index):
        value.get_indexer_for(value[:1])
        value.sort_values()
    elif isinstance(value, numpy.ndarray):
        numpy.sort(value.ravel()).tolist()


def changed(data, random):
    """The bytes with a few of them changed, moved or taken out."""
    data = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at, to = sorted(random.randrange(len(data) + 1) for _ in range(2))
        kind = random.randrange(4)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << random.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = random.choice(b"\x00\x01\x7f\x80\xff.(tbR\x81")
        elif kind == 2:
            del data[at : min(to, at + 9)]
        else:
            data[at:at] = data[to : to + 30]
    return bytes(data)


def test_changed_pickles_of_arrays_and_frames_crash_and_hang_nobody():
    values = [*RARE_ARRAYS.values(), *FRAMES.values()]
    pickles = [pickle.dumps(value, protocol) for value in values for protocol in (4, 5)]
    pickles = [dumped for dumped in pickles if len(dumped) < 1 << 14]

    def load_all():
        random, loaded = Random(os.environ.get("PYTHONHASHSEED", "")), 0
        for _ in range(3000):
            data = changed(random.choice(pickles), random)
            with contextlib.suppress(Refused):
                value = load_data(data, seconds=5)
                loaded += 1
                with contextlib.suppress(Exception):  # a date that no calendar has, for one
                    use(value)
        return "some loaded" if loaded else "none loaded"

    assert in_a_child(load_all, seconds=100) == "some loaded"


# --- classes that the user named --------------------------------------------------


class Color(enum.Enum):
    RED = 1
    BLUE = "blue"


class Flags(enum.Flag):
    A = 1
    B = 2


@dataclass
class Node:
    name: str
    color: Color = Color.RED
    nodes: list = field(default_factory=list)


@dataclass(frozen=True)
class Frozen:
    x: int


class Slots:
    __slots__ = ("a", "b")


class Pairs(dict):
    pass


Point = collections.namedtuple("Point", "x y")


class Outer:
    class Inner:
        pass


HERE = {
    f"{__name__}.{name}"
    for name in ("Color", "Flags", "Node", "Frozen", "Slots", "Pairs", "Point", "Outer.Inner")
}


@EVERY
def test_objects_of_named_classes_load_as_pickle_loads_them(protocol):
    node = Node("a", Color.BLUE)
    node.nodes += [node, Node("b")]
    slots = Slots()
    slots.a = 1
    value = [node, {Frozen(1): Flags.A | Flags.B}, slots, Pairs(x=[1]), Point(1, Point(2, 3))]
    if protocol >= 4:
        value.append(Outer.Inner())
    loaded = load_data(pickle.dumps(value, protocol), HERE)
    assert loaded[0].nodes[0] is loaded[0] and loaded[0].nodes[1] == Node("b")
    assert loaded[0].color is Color.BLUE and type(loaded[0]) is Node
    assert loaded[1] == value[1]
    assert loaded[2].a == 1 and not hasattr(loaded[2], "b")
    assert type(loaded[3]) is Pairs and loaded[3:5] == value[3:5]


def test_members_of_an_enum_that_are_written_by_their_name_load():
    """As Python 3.11 and 3.12 write them."""
    data = b"\x80\x04cbuiltins\ngetattr\nc" + __name__.encode() + b"\nColor\n\x8c\x03RED\x86R."
    assert pickle.loads(data) is load_data(data, HERE) is Color.RED


def test_a_class_of_a_flows_own_file_loads_where_that_was_imported(monkeypatch):
    value = pickle.dumps(Color.BLUE.value, 2)[2:-1]
    data = b"\x80\x04c__main__\nColor\n" + value + b"\x85R."
    with pytest.raises(Refused, match="there is no class `__main__.Color` here"):
        load_data(data, ["__main__.Color"])
    monkeypatch.setattr(sys.modules["__main__"], "Color", Color, raising=False)
    assert load_data(data, ["__main__.Color"]) is pickle.loads(data) is Color.BLUE


@pytest.mark.parametrize("left_out", sorted(HERE - {f"{__name__}.Outer.Inner"}))
def test_each_class_has_to_be_named(left_out):
    node = Node("a", Color.RED)
    value = [node, Frozen(1), Flags.A, Slots(), Pairs(), Point(1, 2)]
    with pytest.raises(Refused) as refused:
        load_data(pickle.dumps(value), HERE - {left_out})
    assert refused.value.name == left_out


def test_all_names_of_a_pickle_are_found():
    value = [Node("a"), numpy.arange(2), datetime.date(2020, 1, 1), Color.RED, Color.RED, print]
    for protocol in range(6):
        found = names(pickle.dumps(value, protocol))
        more = {n.replace("__builtin__", "builtins") for n in found} - rules()
        assert {f"{__name__}.Node", f"{__name__}.Color", "builtins.print"} <= more
