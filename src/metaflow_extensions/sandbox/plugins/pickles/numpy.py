"""Rules for numpy's arrays, scalars and dtypes, as numpy 1 and 2 write them.

Nothing here calls what such a pickle names: `ndarray.__setstate__` and
`dtype.__setstate__` believe what they are given. A dtype is made of its letter and size,
and an array of a dtype, a shape and bytes whose number was checked, by numpy's public
constructors. Contents that numpy relies on are looked at: it reads past its memory when
it counts truth values that are neither 0 nor 1, or meets text beyond Unicode.

Not here: `longdouble` (its bits depend on the machine, and not all of them are numbers),
numpy's own strings of any length, subclasses (`matrix`, `recarray`, `memmap`), random
generators (their state is believed too).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from .grammar import (
    Blob,
    Pending,
    Refused,
    Rule,
    Rules,
    items_of,
    mark_of,
    odd,
    only,
    value_of,
)

if TYPE_CHECKING:
    from .opcodes import Machine

_CODE = re.compile(r"(?:([biufcmM])(\d{1,2})?|([SUV])(\d{1,9})|O8?)\Z", re.A)
#: {letter: sizes in bytes}
_SIZES = {
    "b": (1,),
    "i": (1, 2, 4, 8),
    "u": (1, 2, 4, 8),
    "f": (2, 4, 8),
    "c": (8, 16),
    "m": (8,),
    "M": (8,),
}
_UNITS = {b"Y", b"M", b"W", b"D", b"h", b"m", b"s", b"ms", b"us", b"ns", b"ps", b"fs", b"as"}
_UNITS |= {b"generic"}
_DIMENSIONS = 32
#: Fields of one structured dtype, those of its fields too, and how deep these may be nested.
_FIELDS, _LEAVES, _NESTED = 1000, 10_000, 8
#: What a field takes at the most.
_FIELD = 400
_ALIGNED = 0x80
_WHOLE = 1 << 62


# --- dtypes


def _dtype(machine: Machine, args: tuple[Any, ...]) -> Pending:
    code, _align, _copy = only(args, str, (bool, int), (bool, int))
    matched = _CODE.match(code)
    if not matched or (matched[1] and int(matched[2] or 8) not in _SIZES[matched[1]]):
        raise Refused(f"the pickle has an array of `{ascii(code[:40])[1:-1]}`")
    return Pending("numpy.dtype", lambda state: _with_state(machine, code, items_of(state)))


def _with_state(machine: Machine, code: str, state: tuple[Any, ...]) -> Any:
    """The dtype with this letter and size, if the state is one that numpy gives it."""
    import numpy

    # version, byte order, (base, shape), names, fields, size, alignment, flags[, unit]
    if not 8 <= len(state) <= 9 or value_of(state[0]) not in (3, 4):
        raise odd("a dtype has a state")
    order, base, names, fields, size, _, flags = map(value_of, state[1:8])
    if order not in ("<", ">", "|", "=") or type(size) is not int or type(flags) is not int:
        raise odd("a dtype has a state")
    if code[0] in "mM":
        return _dtype_of_time(numpy, code, order, state)
    if len(state) == 9 and value_of(state[8]) not in (None, {}):
        raise Refused("the pickle has a dtype with metadata")
    if code[0] == "V" and base is not None:
        return _dtype_of_arrays(numpy, base, size)
    if code[0] == "V" and names is not None:
        return _structured(machine, numpy, names, fields, size, bool(flags & _ALIGNED))
    if base is not None or names is not None or fields is not None:
        raise odd("a dtype has a state")
    made = numpy.dtype(code).newbyteorder(order if order in "<>" else "=")
    if made.itemsize == 0 or (code[0] in "SUV" and size != made.itemsize):
        raise odd("a dtype has a size")
    return made


def _dtype_of_time(numpy: Any, code: str, order: str, state: tuple[Any, ...]) -> Any:
    if any(value_of(part) is not None for part in state[2:5]) or len(state) != 9:
        raise odd("a dtype has a state")
    metadata, unit = items_of(value_of(state[8]))
    if metadata not in (None, {}) or type(unit) is not tuple or len(unit) != 4:
        raise odd("a dtype has a state")
    name, count, below, events = unit
    if name not in _UNITS or below != 1 or events != 1 or type(count) is not int:
        raise odd("a dtype has a unit")
    if not 1 <= count < 1 << 31:
        raise odd("a dtype has a unit")
    text = "" if name == b"generic" else f"[{count}{name.decode()}]"
    return numpy.dtype(f"{order if order in '<>' else '='}{code[0]}8{text}")


def _dtype_of_arrays(numpy: Any, base: Any, size: int) -> Any:
    kind, shape = items_of(base)
    _plain_dtype(numpy, kind)
    shape = (shape,) if type(shape) is int else shape
    if _count(shape) * kind.itemsize != size or size == 0:
        raise odd("a dtype has a size")
    return numpy.dtype((kind, shape))


def _structured(
    machine: Machine, numpy: Any, names: Any, fields: Any, size: int, aligned: bool
) -> Any:
    if type(names) is not tuple or type(fields) is not dict or not 0 < len(names) <= _FIELDS:
        raise odd("a dtype has fields")
    machine.charge(_FIELD * len(names))
    formats, offsets, titles, leaves = [], [], [], 0
    for name in names:
        kind, offset, *title = items_of(fields.get(name))
        _plain_dtype(numpy, kind)
        if type(offset) is not int or not 0 <= offset <= size - kind.itemsize:
            raise odd("a dtype has fields")
        if any(type(text) is not str or not text for text in (name, *title)) or len(title) > 1:
            raise odd("a dtype has fields")
        leaves += _leaves(kind, _LEAVES)
        if leaves > _LEAVES:  # whoever looks at it looks at each, though most be the same
            raise odd("a dtype has fields")
        formats.append(kind)
        offsets.append(offset)
        titles.append(title[0] if title else None)
    if set(fields) != {*names, *filter(None, titles)}:
        raise odd("a dtype has fields")
    layout = {"names": list(names), "formats": formats, "offsets": offsets, "itemsize": size}
    if any(titles):
        layout["titles"] = titles
    made = numpy.dtype(layout, align=aligned)
    if made.itemsize != size or made.hasobject or _depth(made) > _NESTED:
        raise odd("a dtype has fields")
    return made


def _plain_dtype(numpy: Any, kind: Any) -> None:
    if not isinstance(kind, numpy.dtype) or kind.hasobject:
        raise odd("a dtype has fields")


def _leaves(kind: Any, most: int) -> int:
    """How many fields it has that have none themselves; no more than a few beyond `most`."""
    if kind.subdtype:
        return _leaves(kind.subdtype[0], most)
    count = 0
    for name in kind.names or ():
        count += _leaves(kind[name], most - count)
        if count > most:
            break
    return count or 1


def _depth(kind: Any) -> int:
    if kind.subdtype:
        return 1 + _depth(kind.subdtype[0])
    if kind.names:
        return 1 + max(_depth(kind[name]) for name in kind.names)
    return 0


# --- arrays


def _count(shape: Any) -> int:
    """Items of an array.

    Raises:
        Refused: it is no shape of one.
    """
    if type(shape) is not tuple or len(shape) > _DIMENSIONS:
        raise odd("an array has a shape")
    count, whole = 1, 1
    for length in shape:
        if type(length) is not int or length < 0:
            raise odd("an array has a shape")
        count *= length
        whole *= max(length, 1)
    if whole >= _WHOLE:
        raise odd("an array has a shape")
    return count


def _content(raw: Any) -> Any:
    """What has an array's bytes: not copied if that isn't needed."""
    content = raw.view if type(raw) is Blob else value_of(raw)
    if type(content) not in (bytes, bytearray, memoryview):
        raise odd("an array has contents")
    return content


def _viewed(numpy: Any, raw: Any, kind: Any, shape: Any, order: str) -> Any:
    """An array on top of bytes, whose number and contents are right."""
    content = _content(raw)
    if not isinstance(kind, numpy.dtype) or kind.hasobject:
        raise odd("an array has a dtype")
    if _count(shape) * kind.itemsize != len(content):
        raise Refused("the pickle has an array whose shape and bytes don't agree")
    made = numpy.ndarray(shape, kind, buffer=content, order=order)
    _check(numpy, made, kind)
    return made


def _check(numpy: Any, made: Any, kind: Any) -> None:
    """Looks at contents that numpy relies on."""
    if kind.names:
        for name in kind.names:
            _check(numpy, made[name], kind[name].base)
    elif made.size == 0:
        return
    elif kind.subdtype:
        _check(numpy, made, kind.base)
    elif kind.kind == "b" and made.view(numpy.uint8).max() > 1:
        raise Refused("the pickle has truth values that are neither true nor false")
    elif kind.kind == "U":
        points = numpy.ascontiguousarray(made).view(numpy.dtype("u4").newbyteorder(kind.byteorder))
        if points.max() > 0x10FFFF:
            raise Refused("the pickle has text that is not Unicode")


def _objects(numpy: Any, machine: Machine, items: Any, shape: Any, fortran: bool) -> Any:
    if type(items) is not list or len(items) != _count(shape):
        raise Refused("the pickle has an array whose shape and items don't agree")
    machine.charge(8 * len(items))
    flat = numpy.empty(len(items), object)
    for i, item in enumerate(items):
        flat[i] = item
    made = flat.reshape(shape)
    made = made.copy("F") if fortran else made
    machine.contain(made, items)
    return made


def _with_contents(machine: Machine, state: tuple[Any, ...]) -> Any:
    import numpy

    version, shape, kind, fortran = map(value_of, state[:4])
    if version != 1 or type(fortran) not in (bool, int) or len(state) != 5:
        raise odd("an array has a state")
    if not isinstance(kind, numpy.dtype):
        raise odd("an array has a dtype")
    if kind.char == "O":
        return _objects(numpy, machine, value_of(state[4]), shape, bool(fortran))
    viewed = _viewed(numpy, state[4], kind, shape, "F" if fortran else "C")
    made = _own(machine, numpy, viewed, _content(state[4]))
    # As numpy does it when it unpickles.
    if made.dtype.isnative or kind.names:
        return made
    return made.byteswap(inplace=True).view(kind.newbyteorder("="))


def _own(machine: Machine, numpy: Any, viewed: Any, content: Any) -> Any:
    """The array with bytes of its own, those between its fields too."""
    machine.charge_copy(viewed.nbytes)
    order = "C" if viewed.flags.c_contiguous else "F"
    return numpy.ndarray(viewed.shape, viewed.dtype, buffer=bytearray(content), order=order)


def _reconstruct(machine: Machine, args: tuple[Any, ...]) -> Pending:
    if len(args) != 3 or mark_of(args[0]) != "ndarray":
        raise Refused("the pickle has a subclass of numpy's array")
    _only_empty(args[1:])
    return Pending("numpy.ndarray", lambda state: _with_contents(machine, items_of(state)))


def _only_empty(args: tuple[Any, ...]) -> None:
    shape, code = map(value_of, args)
    if shape != (0,) or code not in (b"b", "b"):
        raise odd("an array has arguments")


def _frombuffer(machine: Machine, args: tuple[Any, ...]) -> Any:
    """How protocol 5 writes arrays: on top of bytes, which are read-only if those are."""
    import numpy

    if not 4 <= len(args) <= 5:
        raise odd("an array has arguments")
    raw, kind, shape, order = map(value_of, args[:4])
    axes = value_of(args[4]) if len(args) == 5 else None
    if order == "K" and axes is not None:
        if type(axes) is not tuple or any(type(a) is not int for a in axes):
            raise odd("an array has arguments")
        return _viewed(numpy, raw, kind, shape, "C").transpose(axes)
    if order not in ("C", "F") or axes is not None:
        raise odd("an array has arguments")
    made = _viewed(numpy, raw, kind, shape, order)
    if type(raw) is bytearray and kind.kind not in "iufcmMS":
        # What was looked at must not change when the byte array does.
        return _own(machine, numpy, made, raw)
    return made


def _scalar(machine: Machine, args: tuple[Any, ...]) -> Any:
    import numpy

    if len(args) != 2:
        raise odd("a number of numpy has arguments")
    viewed = _viewed(numpy, args[1], value_of(args[0]), (), "C")
    machine.charge_copy(viewed.nbytes)
    return viewed.copy()[()]


# --- masked arrays


def _mareconstruct(machine: Machine, args: tuple[Any, ...]) -> Pending:
    if len(args) != 4 or mark_of(args[0]) != "MaskedArray" or mark_of(args[1]) != "ndarray":
        raise Refused("the pickle has a subclass of numpy's array")
    _only_empty(args[2:])
    return Pending("numpy.ma.MaskedArray", lambda state: _masked(machine, items_of(state)))


def _masked(machine: Machine, state: tuple[Any, ...]) -> Any:
    import numpy

    if len(state) != 7:
        raise odd("an array has a state")
    data = _with_contents(machine, state[:5])
    order = "F" if value_of(state[3]) else "C"
    if data.dtype.names:
        raise Refused("the pickle has a masked array of a structured dtype")
    mask = _viewed(numpy, state[5], numpy.dtype(bool), data.shape, order)
    machine.charge_copy(mask.nbytes + data.itemsize)  # it fills as much, though there be nothing
    fill: Any = value_of(state[6])
    if fill is not None:
        if not isinstance(fill, (numpy.ndarray, numpy.generic)) or fill.shape != ():
            raise odd("a masked array has a fill value")
        fill = value_of(fill)[()]
    return numpy.ma.MaskedArray(data, mask=mask.copy("K"), fill_value=fill, copy=False)


def _the_masked(machine: Machine, args: tuple[Any, ...]) -> Any:
    import numpy

    only(args)
    return numpy.ma.masked


def _both(name: str, rule: Rule) -> Rules:
    """numpy 2 moved its insides from `numpy.core` to `numpy._core`."""
    return {f"numpy.{core}.{name}": rule for core in ("core", "_core")}


RULES: Rules = {
    "numpy.ndarray": Rule(mark="ndarray"),
    "numpy.dtype": Rule(call=_dtype),
    **_both("multiarray._reconstruct", Rule(call=_reconstruct)),
    **_both("multiarray.scalar", Rule(call=_scalar)),
    **_both("numeric._frombuffer", Rule(call=_frombuffer)),
    "numpy.ma.core._mareconstruct": Rule(call=_mareconstruct),
    "numpy.ma.core.MaskedArray": Rule(mark="MaskedArray"),
    "numpy.ma.MaskedArray": Rule(mark="MaskedArray"),
    "numpy.ma.core.MaskedConstant": Rule(call=_the_masked),
}
