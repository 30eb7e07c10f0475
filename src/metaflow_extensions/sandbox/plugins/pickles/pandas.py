"""Rules for pandas' series, frames, indexes and values, as pandas 1.5 to 3 write them.

A frame's columns are blocks: arrays that say which columns they are. Pandas believes what
a pickle says of them, and its compiled parts read where codes and places point. So
codes, places and lengths are checked here, and each part is then made by a constructor
that checks as well.

Not here: periods (their calendar counts with numbers that nobody checks), sparse and
Arrow-backed columns, offsets with calendars of their own, subclasses.
"""

from __future__ import annotations

import datetime
import math
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .grammar import (
    Pending,
    Refused,
    Rule,
    Rules,
    fields_of,
    items_of,
    mark_of,
    odd,
    only,
    value_of,
)
from .opcodes import COLLISIONS
from .stdlib import a_zone

if TYPE_CHECKING:
    from .opcodes import Machine

_ATOMS = (str, bytes, int, float, bool, type(None), complex)
_RESOLUTIONS = (7, 8, 9, 10)  # s, ms, us, ns: numpy's numbers of them
_UNITS = ("s", "ms", "us", "ns")
#: What a label takes at the most where it is hashed: a few bytes describe a range of any length.
_HASHED = 40
#: What pandas' hashes of floats are made of (MurmurHash2).
_MURMUR = 0x5BD1E995
_MURMUR_SEED = (0xC70F6907 ^ 4) * _MURMUR & 0xFFFFFFFF
#: What a column takes at the most in a frame, beside its values: a frame may have no row.
_COLUMN = 40
#: Offsets that are a step of the calendar by themselves.
_OFFSETS = (
    *("Day", "Hour", "Minute", "Second", "Milli", "Micro", "Nano"),
    *("MonthEnd", "MonthBegin", "BusinessDay", "BusinessMonthEnd", "BusinessMonthBegin"),
)


def _long(value: Any) -> int:
    if type(value) is not int or not -(1 << 63) <= value < 1 << 63:
        raise odd("a value of pandas has a number")
    return value


def _names(machine: Machine, values: Any) -> Any:
    """What labels a series or an index. It is hashed again and again."""
    machine.keys([values], values)
    return values


# --- single values


def _timestamp(machine: Machine, args: tuple[Any, ...]) -> Any:
    from pandas._libs.tslibs.timestamps import _unpickle_timestamp

    if not 3 <= len(args) <= 4:
        raise odd("a Timestamp has arguments")
    value, freq, zone = map(value_of, args[:3])
    _long(value)
    resolution = [value_of(a) for a in args[3:]]
    if freq is not None or any(type(r) is not int or r not in _RESOLUTIONS for r in resolution):
        raise odd("a Timestamp has arguments")
    return _unpickle_timestamp(value, None, zone if zone is None else a_zone(zone), *resolution)


def _timedelta(machine: Machine, args: tuple[Any, ...]) -> Any:
    from pandas._libs.tslibs.timedeltas import _timedelta_unpickle

    value, resolution = only(args, int, int)
    if resolution not in _RESOLUTIONS:
        raise odd("a Timedelta has arguments")
    return _timedelta_unpickle(_long(value), resolution)


def _nat(machine: Machine, args: tuple[Any, ...]) -> Any:
    import pandas

    only(args, type(None))
    return pandas.NaT


def _na() -> Any:
    import pandas

    return pandas.NA


def _interval(machine: Machine, args: tuple[Any, ...]) -> Any:
    import pandas

    if len(args) != 3:
        raise odd("an Interval has arguments")
    left, right, closed = map(value_of, args)
    kinds = (int, float, pandas.Timestamp, pandas.Timedelta)
    if type(left) not in kinds or type(right) not in kinds or type(closed) is not str:
        raise odd("an Interval has arguments")
    return pandas.Interval(left, right, closed)


def _offset(name: str) -> Rule:
    def call(machine: Machine, args: tuple[Any, ...]) -> Any:
        from pandas._libs.tslibs import offsets

        if len(args) == 3 and value_of(args[2]) == datetime.timedelta(0):
            args = args[:2]
        count, normalize = only(args, int, bool)
        return getattr(offsets, name)(_long(count), normalize)

    return Rule(call=call)


# --- dtypes


def _zone_dtype(machine: Machine, args: tuple[Any, ...]) -> Pending:
    only(args)

    def finish(state: Any) -> Any:
        import pandas

        fields = fields_of(state, "unit", "tz")
        if fields["unit"] not in _UNITS:
            raise odd("a dtype has a unit")
        return pandas.DatetimeTZDtype(fields["unit"], a_zone(fields["tz"]))

    return Pending("pandas.DatetimeTZDtype", finish)


def _category_dtype(machine: Machine, args: tuple[Any, ...]) -> Pending:
    only(args)

    def finish(state: Any) -> Any:
        import pandas

        fields = fields_of(state, "categories", "ordered")
        categories, ordered = fields["categories"], fields["ordered"]
        if type(ordered) not in (bool, type(None)):
            raise odd("a dtype has a state")
        if categories is not None:
            _unhashed(machine, categories)
        return pandas.CategoricalDtype(categories, ordered)

    return Pending("pandas.CategoricalDtype", finish)


def _unhashed(machine: Machine, index: Any) -> None:
    """Makes sure that an index's labels can be hashed, in reasonable time and memory."""
    import pandas

    if not isinstance(index, pandas.Index) or isinstance(index, pandas.MultiIndex):
        raise odd("an index has labels")
    machine.charge(_HASHED * len(index))
    if index.dtype == object:
        labels = list(index)
        machine.keys(labels, index)
        _spread_objects(labels)
    elif isinstance(index, pandas.IntervalIndex):
        _spread(index.left)
        _spread(index.right)
    elif not isinstance(index, pandas.RangeIndex):
        _spread(index)


def _spread_objects(labels: list[Any]) -> None:
    """Makes sure that objects don't collide by pandas' hash, which is half of Python's."""
    from pandas._libs.hashtable import object_hash

    found = Counter(object_hash(label) & 0xFFFFFFFF for label in labels)
    if max(found.values(), default=0) > COLLISIONS:
        raise Refused("the pickle has labels that are made to collide")


def _spread(index: Any) -> None:
    """Makes sure that numbers don't collide where pandas hashes them: anybody can tell how."""
    import numpy

    values = getattr(index._data, "_ndarray", getattr(index._data, "_data", index._data))
    if not isinstance(values, numpy.ndarray) or values.dtype.itemsize < 8 or not values.size:
        return  # all others have hashes of their own
    if values.dtype.kind in "mM":
        values = values.view("i8")
    if values.dtype.kind in "iu":
        hashes = (values >> 33) ^ values ^ (values << 11)
    elif values.dtype.kind == "f":
        words = values.view("u4").reshape(len(values), 2) * numpy.uint32(_MURMUR)
        words = (words ^ (words >> 24)) * numpy.uint32(_MURMUR)
        low, high = words[:, 0], words[:, 1]
        hashes = (low ^ numpy.uint32(_MURMUR_SEED)) * numpy.uint32(_MURMUR) ^ high
        hashes = (hashes ^ (hashes >> 13)) * numpy.uint32(_MURMUR)
        hashes = hashes ^ (hashes >> 15)
    elif values.dtype.kind == "c":  # so few are in use that how many collide is not worth knowing
        hashes = numpy.zeros(len(values))
    else:
        return
    if numpy.unique(hashes.astype("u4"), return_counts=True)[1].max() > COLLISIONS:
        raise Refused("the pickle has labels that are made to collide")


def _string_dtype(machine: Machine, args: tuple[Any, ...]) -> Any:
    def make(storage: Any, missing: tuple[Any, ...] = ()) -> Any:
        import pandas

        if storage != "python":
            raise Refused("the pickle has text that Arrow stores")
        if any(m is not pandas.NA and not (type(m) is float and math.isnan(m)) for m in missing):
            raise odd("a dtype has a state")
        return pandas.StringDtype(storage, *missing)

    if args:  # pandas 2.3 and later call it
        return make(value_of(args[0]), tuple(map(value_of, args[1:])))

    def finish(state: Any) -> Any:
        fields = fields_of(state, "storage", "_na_value")
        return make(fields.get("storage"), tuple(fields[k] for k in ("_na_value",) if k in fields))

    return Pending("pandas.StringDtype", finish)


# --- arrays

#: {what a pickle calls it: the name in `pandas.arrays`}
_MASKED = {
    "integer.IntegerArray": "IntegerArray",
    "floating.FloatingArray": "FloatingArray",
    "boolean.BooleanArray": "BooleanArray",
}


def _masked(name: str) -> Rule:
    def new(machine: Machine, args: tuple[Any, ...]) -> Pending:
        only(args)

        def finish(state: Any) -> Any:
            import numpy
            import pandas

            # The cache and the dtype follow from the data.
            fields = fields_of(state, "_data", "_mask", "_dtype", "_cache")
            data, mask = fields["_data"], fields["_mask"]
            if type(data) is not numpy.ndarray or type(mask) is not numpy.ndarray:
                raise odd("an array has a state")
            if data.shape != mask.shape or data.ndim != 1 or not data.dtype.isnative:
                raise odd("an array has a shape")
            return getattr(pandas.arrays, name)(data, mask)

        return Pending(f"pandas.arrays.{name}", finish)

    return Rule(new=new)


def _masked_dtype(name: str) -> Rule:
    """A dtype without parameters."""

    def new(machine: Machine, args: tuple[Any, ...]) -> Any:
        import pandas

        only(args)
        made = getattr(pandas, name)()
        return machine.own(made, _no_state)

    return Rule(new=new)


def _no_state(state: Any) -> None:
    """A cache is worked out again."""
    fields_of(state, "_cache")


_MASKED_DTYPES = {
    **{
        f"integer.{sign}Int{n}Dtype": f"{sign}Int{n}Dtype"
        for sign in ("", "U")
        for n in (8, 16, 32, 64)
    },
    "floating.Float32Dtype": "Float32Dtype",
    "floating.Float64Dtype": "Float64Dtype",
    "boolean.BooleanDtype": "BooleanDtype",
}


_BACKED = ("DatetimeArray", "TimedeltaArray", "StringArray", "Categorical")


def _backed(machine: Machine, args: tuple[Any, ...]) -> Pending:
    """Arrays of pandas on top of an array of numpy."""
    kind = mark_of(args[0]) if len(args) == 3 else None
    if kind not in _BACKED or value_of(args[2]) is not None:
        raise Refused("the pickle has an array of pandas that is not read")

    def finish(state: Any) -> Any:
        import numpy

        parts = items_of(state)
        if not 2 <= len(parts) <= 3:
            raise odd("an array has a state")
        dtype, values = value_of(parts[0]), value_of(parts[1])
        if type(values) is not numpy.ndarray or not 1 <= values.ndim <= 2:
            raise odd("an array has a state")
        more = fields_of(parts[2], "_freq", "_cache", "_readonly") if len(parts) == 3 else {}
        made = _MAKERS[str(kind)](machine, dtype, values, more.get("_freq"))
        if more.get("_readonly") is True:
            made._readonly = True
        return made

    return Pending(f"pandas.arrays.{kind}", finish)


def _datetimes(machine: Machine, dtype: Any, values: Any, freq: Any) -> Any:
    import numpy
    import pandas
    from pandas.core.arrays import DatetimeArray

    if values.dtype.kind != "M" or numpy.datetime_data(values.dtype)[0] not in _UNITS:
        raise odd("an array has a dtype")
    if not values.dtype.isnative or numpy.datetime_data(values.dtype)[1] != 1:
        raise odd("an array has a dtype")
    if isinstance(dtype, pandas.DatetimeTZDtype):
        if dtype.unit != numpy.datetime_data(values.dtype)[0]:
            raise odd("an array has a dtype")
    elif dtype != values.dtype:
        raise odd("an array has a dtype")
    made = DatetimeArray._simple_new(values, dtype=dtype)
    return _with_freq(pandas.DatetimeIndex, made, freq)


def _timedeltas(machine: Machine, dtype: Any, values: Any, freq: Any) -> Any:
    import numpy
    import pandas
    from pandas.core.arrays import TimedeltaArray

    if values.dtype.kind != "m" or dtype != values.dtype or not values.dtype.isnative:
        raise odd("an array has a dtype")
    if numpy.datetime_data(values.dtype)[0] not in _UNITS:
        raise odd("an array has a dtype")
    made = TimedeltaArray._simple_new(values, dtype=dtype)
    return _with_freq(pandas.TimedeltaIndex, made, freq)


def _with_freq(index: Any, array: Any, freq: Any) -> Any:
    """The array with a frequency, if it has that: pandas counts on it."""
    if freq is None:
        return array
    return _index_with_freq(index, array, freq)._data


def _index_with_freq(index: Any, data: Any, freq: Any) -> Any:
    from pandas._libs.tslibs import offsets

    if type(freq).__name__ not in _OFFSETS or not isinstance(freq, offsets.BaseOffset):
        raise odd("an index has a frequency")
    return index(data, freq=freq, copy=False)


def _strings(machine: Machine, dtype: Any, values: Any, freq: Any) -> Any:
    import pandas

    if not isinstance(dtype, pandas.StringDtype) or values.dtype != object or freq is not None:
        raise odd("an array has a dtype")
    missing = getattr(dtype, "na_value", pandas.NA)
    for item in values.flat:
        if type(item) is float:
            if not math.isnan(item):
                raise odd("an array has text")
        elif type(item) is not str and item is not pandas.NA:
            raise odd("an array has text")
    if missing is pandas.NA:
        return pandas.arrays.StringArray(values)
    return type(pandas.array([""], dtype=dtype))(values, dtype=dtype)


def _categorical(machine: Machine, dtype: Any, values: Any, freq: Any) -> Any:
    import pandas

    if not isinstance(dtype, pandas.CategoricalDtype) or values.dtype.kind != "i":
        raise odd("an array has a dtype")
    if dtype.categories is None or values.ndim != 1 or not values.dtype.isnative:
        raise odd("an array has a dtype")
    if values.size and not -1 <= values.min() <= values.max() < len(dtype.categories):
        raise Refused("the pickle has codes that no category has")
    # Codes are not checked again, so nothing else may share them.
    machine.charge_copy(values.nbytes)
    return pandas.Categorical.from_codes(values.copy(), dtype=dtype)


_MAKERS: dict[str, Callable[[Machine, Any, Any, Any], Any]] = {
    "DatetimeArray": _datetimes,
    "TimedeltaArray": _timedeltas,
    "StringArray": _strings,
    "Categorical": _categorical,
}


def _intervals(machine: Machine, args: tuple[Any, ...]) -> Pending:
    if len(args) != 3 or mark_of(args[0]) != "IntervalArray" or value_of(args[2]) is not None:
        raise odd("an array has arguments")

    def finish(state: Any) -> Any:
        import pandas

        (parts,) = items_of(state)
        fields = fields_of(parts, "_left", "_right", "_dtype")
        ends = [_ends(machine, fields[k]) for k in ("_left", "_right")]
        return pandas.arrays.IntervalArray.from_arrays(*ends, closed=fields["_dtype"].closed)

    return Pending("pandas.arrays.IntervalArray", finish)


def _ends(machine: Machine, values: Any) -> Any:
    """What intervals begin or end with. It is copied."""
    import numpy
    import pandas

    kinds = (numpy.ndarray, pandas.arrays.DatetimeArray, pandas.arrays.TimedeltaArray)
    if not isinstance(values, kinds) or values.ndim != 1:
        raise odd("an array has intervals")
    machine.charge(2 * values.nbytes)
    return values


def _interval_dtype(machine: Machine, args: tuple[Any, ...]) -> Pending:
    only(args)

    def finish(state: Any) -> Any:
        import numpy
        import pandas

        fields = fields_of(state, "subtype", "closed")
        subtype = fields["subtype"]
        # By a text, pandas would look for a dtype, and for a time zone in a file of that name.
        kinds = (numpy.dtype, pandas.DatetimeTZDtype)
        if not isinstance(subtype, kinds) or subtype.kind not in "iufmM":
            raise odd("a dtype has intervals")
        return pandas.IntervalDtype(subtype, fields["closed"])

    return Pending("pandas.IntervalDtype", finish)


# --- indexes


def _index(machine: Machine, args: tuple[Any, ...]) -> Any:
    import pandas

    if len(args) != 2:
        raise odd("an index has arguments")
    kind = mark_of(args[0])
    if kind == "MultiIndex":
        return _multi_index(machine, args[1])
    if kind == "RangeIndex":
        fields = fields_of(args[1], "name", "start", "stop", "step")
        ends = [_long(fields[end]) for end in ("start", "stop", "step")]
        return pandas.RangeIndex(*ends, name=_names(machine, fields["name"]))
    if kind not in ("Index", "CategoricalIndex", "DatetimeIndex", "TimedeltaIndex"):
        raise Refused("the pickle has an index of a kind that is not read")
    fields = fields_of(args[1], "data", "name", "freq")
    return _flat_index(machine, str(kind), fields)


def _flat_index(machine: Machine, kind: str, fields: dict[str, Any]) -> Any:
    import numpy
    import pandas

    data, name = fields["data"], _names(machine, fields.get("name"))
    arrays = {
        "Index": (numpy.ndarray, pandas.api.extensions.ExtensionArray),
        "CategoricalIndex": pandas.Categorical,
        "DatetimeIndex": pandas.arrays.DatetimeArray,
        "TimedeltaIndex": pandas.arrays.TimedeltaArray,
    }
    if not isinstance(data, arrays[kind]) or data.ndim != 1:
        raise odd("an index has labels")
    if isinstance(data, numpy.ndarray) and data.dtype.kind not in "biufcO":
        raise odd("an index has labels")
    machine.charge(8 * len(data))  # older versions of pandas make them all that long
    dtype = object if data.dtype == object else None
    index = getattr(pandas, kind)
    freq = fields.get("freq")
    if freq is None:
        made = index(data, dtype=dtype, copy=False)
    else:
        made = _index_with_freq(index, data, freq)
    if type(made) is not index:
        raise odd("an index has labels")
    made.name = name
    return made


def _multi_index(machine: Machine, fields: Any) -> Any:
    import numpy
    import pandas

    state = fields_of(fields, "levels", "codes", "sortorder", "names")
    levels, codes, names = (list(state[k]) for k in ("levels", "codes", "names"))
    if type(state["sortorder"]) not in (int, type(None)) or len(levels) > 1000:
        raise odd("an index has levels")
    for level, code in zip(levels, codes):
        _unhashed(machine, level)
        if type(code) is not numpy.ndarray or code.dtype.kind != "i" or code.ndim != 1:
            raise odd("an index has codes")
        machine.charge_copy(code.nbytes)
    return pandas.MultiIndex(
        levels=levels,
        codes=[code.copy() for code in codes],
        sortorder=state["sortorder"],
        names=[_names(machine, name) for name in names],
        verify_integrity=True,
    )


def _interval_index(machine: Machine, args: tuple[Any, ...]) -> Any:
    import pandas

    if len(args) != 2 or mark_of(args[0]) != "IntervalIndex":
        raise odd("an index has arguments")
    fields = fields_of(args[1], "left", "right", "closed", "name")
    left, right = fields["left"], fields["right"]
    kinds = (pandas.Index, pandas.DatetimeIndex, pandas.TimedeltaIndex)
    if type(left) not in kinds or type(right) not in kinds:  # not a range: that is not there yet
        raise odd("an index has labels")
    ends = [_ends(machine, part._data) for part in (left, right)]
    made = pandas.IntervalIndex.from_arrays(*ends, fields["closed"])
    made.name = _names(machine, fields["name"])
    return made


# --- frames and series


def _values(values: Any) -> Any:
    """The array of a block: of a kind of which pandas makes blocks itself."""
    import numpy
    import pandas

    if type(values) is numpy.ndarray:
        if values.dtype.kind not in "biufcO":
            raise odd("a column has a dtype")
    elif not isinstance(values, pandas.api.extensions.ExtensionArray):
        raise odd("a column has values")
    return values


def _block(machine: Machine, args: tuple[Any, ...]) -> Any:
    import numpy
    import pandas
    from pandas._libs.internals import _unpickle_block

    if len(args) != 3:
        raise odd("a column has arguments")
    values, places, dimensions = map(value_of, args)
    _values(values)
    if type(places) is slice:
        ends = (places.start, places.stop, places.step)
        if any(type(end) is not int or end < 0 for end in ends) or places.step == 0:
            raise odd("a column has a place")
        count = len(range(*ends))
    elif type(places) is numpy.ndarray and places.dtype == numpy.int64 and places.ndim == 1:
        places = places.copy()
        if places.size and places.min() < 0:
            raise odd("a column has a place")
        count = len(places)
    else:
        raise odd("a column has a place")
    whole = isinstance(values, (numpy.ndarray, pandas.arrays.DatetimeArray))
    whole = whole or isinstance(values, pandas.arrays.TimedeltaArray)
    if dimensions != 2 or values.ndim not in ((1, 2) if whole else (1,)):
        raise odd("a column has a shape")
    if values.ndim == 1 and isinstance(values, numpy.ndarray):
        raise odd("a column has a shape")
    if count != (values.shape[0] if values.ndim == 2 else 1):
        raise odd("a column has a shape")
    return _unpickle_block(values, places, 2)


def _blocks(machine: Machine, args: tuple[Any, ...]) -> Any:
    """A frame's columns."""
    import numpy
    import pandas
    from pandas.core.internals import BlockManager
    from pandas.core.internals.blocks import Block

    blocks, axes = only(args, tuple, list)
    if len(axes) != 2 or not all(isinstance(axis, pandas.Index) for axis in axes):
        raise odd("a frame has axes")
    columns, rows = map(len, axes)
    if not all(isinstance(block, Block) for block in blocks):
        raise odd("a frame has columns")
    if any(block.values.shape[-1] != rows for block in blocks):
        raise Refused("the pickle has a frame whose columns and rows don't agree")
    if sum(len(block.mgr_locs) for block in blocks) != columns:
        raise Refused("the pickle has a frame whose columns and names don't agree")
    machine.charge(_COLUMN * columns)
    seen: Any = numpy.zeros(columns, bool)
    for block in blocks:
        places = block.mgr_locs.as_array
        # Below zero numpy counts from the end, and pandas writes before its arrays.
        if places.size and not 0 <= places.min() <= places.max() < columns:
            raise Refused("the pickle has a frame whose columns and names don't agree")
        seen[places] = True
    if not seen.all():
        raise Refused("the pickle has a frame whose columns and names don't agree")
    # A frame that gets a column moves the places of its blocks, so it shares none.
    return BlockManager(tuple(block.copy(deep=False) for block in blocks), list(axes))


def _block_of_series(machine: Machine, args: tuple[Any, ...]) -> Pending:
    only(args)

    def finish(state: Any) -> Any:
        import pandas
        from pandas.core.internals import SingleBlockManager

        parts = items_of(state)
        if len(parts) != 4:  # the rest says the same, for older versions
            raise odd("a series has a state")
        (index,), (values,) = value_of(parts[0]), value_of(parts[1])
        if not isinstance(index, pandas.Index) or _values(values).shape != (len(index),):
            raise Refused("the pickle has a series whose values and index don't agree")
        return SingleBlockManager.from_array(values, index)

    return Pending("pandas.Series", finish)


def _frame(kind: str, manager: str) -> Rule:
    def new(machine: Machine, args: tuple[Any, ...]) -> Pending:
        only(args)

        def finish(state: Any) -> Any:
            import pandas
            from pandas.core import internals

            fields = fields_of(state, "_mgr", "_typ", "_metadata", "attrs", "_flags", "_name")
            if type(fields.get("_mgr")) is not getattr(internals, manager):
                raise odd("a frame has columns")
            flags = fields_of(fields.get("_flags", {}), "allows_duplicate_labels")
            attrs = fields.get("attrs", {})
            if any(type(flag) is not bool for flag in flags.values()) or type(attrs) is not dict:
                raise odd("a frame has a state")
            checked = {"_mgr": fields["_mgr"], "_typ": kind.lower(), "attrs": dict(attrs)}
            if kind == "Series":
                checked.update(_metadata=["_name"], _name=_names(machine, fields.get("_name")))
            else:
                checked["_metadata"] = []
            checked["_flags"] = flags or {"allows_duplicate_labels": True}
            cls = getattr(pandas, kind)
            made = cls.__new__(cls)
            made.__setstate__(checked)
            return made

        return Pending(f"pandas.{kind}", finish)

    return Rule(new=new)


def _each(rule: Rule, *names: str) -> Rules:
    return {f"pandas.{name}": rule for name in names}


_FRAME, _SERIES = _frame("DataFrame", "BlockManager"), _frame("Series", "SingleBlockManager")

# pandas 3 names its public classes by their public names.
RULES: Rules = {
    **_each(_FRAME, "DataFrame", "core.frame.DataFrame"),
    **_each(_SERIES, "Series", "core.series.Series"),
    **_each(Rule(call=_blocks), "core.internals.managers.BlockManager"),
    **_each(Rule(new=_block_of_series), "core.internals.managers.SingleBlockManager"),
    **_each(Rule(call=_block), "_libs.internals._unpickle_block"),
    **_each(Rule(call=_index), "core.indexes.base._new_Index"),
    **_each(Rule(call=_index), "core.indexes.datetimes._new_DatetimeIndex"),
    **_each(Rule(call=_index), "core.indexes.timedeltas._new_TimedeltaIndex"),
    **_each(Rule(call=_interval_index), "core.indexes.interval._new_IntervalIndex"),
    **_each(Rule(mark="Index"), "Index", "core.indexes.base.Index"),
    **_each(Rule(mark="RangeIndex"), "RangeIndex", "core.indexes.range.RangeIndex"),
    **_each(Rule(mark="MultiIndex"), "MultiIndex", "core.indexes.multi.MultiIndex"),
    **_each(
        Rule(mark="CategoricalIndex"), "CategoricalIndex", "core.indexes.category.CategoricalIndex"
    ),
    **_each(Rule(mark="DatetimeIndex"), "DatetimeIndex", "core.indexes.datetimes.DatetimeIndex"),
    **_each(
        Rule(mark="TimedeltaIndex"), "TimedeltaIndex", "core.indexes.timedeltas.TimedeltaIndex"
    ),
    **_each(Rule(mark="IntervalIndex"), "IntervalIndex", "core.indexes.interval.IntervalIndex"),
    **_each(Rule(call=_backed), "_libs.arrays.__pyx_unpickle_NDArrayBacked"),
    **_each(Rule(mark="Categorical"), "Categorical", "core.arrays.categorical.Categorical"),
    **_each(
        Rule(mark="DatetimeArray"), "arrays.DatetimeArray", "core.arrays.datetimes.DatetimeArray"
    ),
    **_each(
        Rule(mark="TimedeltaArray"),
        "arrays.TimedeltaArray",
        "core.arrays.timedeltas.TimedeltaArray",
    ),
    **_each(
        Rule(mark="StringArray"),
        "arrays.StringArray",
        "core.arrays.string_.StringArray",
        "core.arrays.string_.StringArrayNumpySemantics",
    ),
    **_each(Rule(call=_intervals), "_libs.interval.__pyx_unpickle_IntervalMixin"),
    **_each(
        Rule(mark="IntervalArray"), "arrays.IntervalArray", "core.arrays.interval.IntervalArray"
    ),
    **{
        f"pandas.{path}": _masked(name)
        for short, name in _MASKED.items()
        for path in (f"arrays.{name}", f"core.arrays.{short}")
    },
    **{
        f"pandas.{path}": _masked_dtype(name)
        for long, name in _MASKED_DTYPES.items()
        for path in (name, f"core.arrays.{long}")
    },
    **_each(Rule(new=_zone_dtype), "DatetimeTZDtype", "core.dtypes.dtypes.DatetimeTZDtype"),
    **_each(Rule(new=_category_dtype), "CategoricalDtype", "core.dtypes.dtypes.CategoricalDtype"),
    **_each(Rule(new=_interval_dtype), "IntervalDtype", "core.dtypes.dtypes.IntervalDtype"),
    **_each(
        Rule(call=_string_dtype, new=_string_dtype),
        "StringDtype",
        "core.arrays.string_.StringDtype",
    ),
    **_each(Rule(call=_timestamp), "_libs.tslibs.timestamps._unpickle_timestamp"),
    **_each(Rule(call=_timedelta), "_libs.tslibs.timedeltas._timedelta_unpickle"),
    **_each(
        Rule(call=_nat),
        "_libs.tslibs.nattype._nat_unpickle",
        "_libs.tslibs.nattype.__nat_unpickle",
    ),
    **_each(Rule(value=_na), "NA", "_libs.missing.NA"),
    **_each(Rule(call=_interval), "Interval", "_libs.interval.Interval"),
    **{f"pandas._libs.tslibs.offsets.{name}": _offset(name) for name in _OFFSETS},
}
