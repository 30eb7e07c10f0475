"""Rules for the standard library's values.

Each value is made by its own public constructor, out of parts that were checked: what a
pickle calls instead often checks nothing (a datetime's ten bytes may say hour 200).

Not here: `re.Pattern`, since to match is to run a program of the sandbox's without a
bound on its time; exceptions other than Metaflow's, and functions.
"""

from __future__ import annotations

import array
import datetime
import decimal
import fractions
import ipaddress
import pathlib
import re
import sys
import types
import uuid
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .grammar import (
    Pending,
    Refused,
    Rule,
    Rules,
    attributes,
    fields_of,
    mark_of,
    odd,
    only,
    value_of,
)

try:
    import zoneinfo
except ImportError:  # Python 3.8, which a sandbox may have
    zoneinfo = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from .opcodes import Machine

_NUMBER = re.compile(
    r"[+-]?(\d+(\.\d*)?|\.\d+)(E[+-]?\d{1,18})?\Z|[+-]?s?nan\d*\Z|[+-]?inf", re.I | re.A
)
_RATIO = re.compile(r"-?\d+(/\d+)?\Z", re.A)
_ZONE = re.compile(r"[A-Za-z][\w+-]*(/[A-Za-z0-9][\w+-]*){0,3}\Z", re.A)
#: What the table of a time zone takes at the most.
_ZONE_SIZE = 1 << 15
#: Digits of a Decimal or Fraction. Work on them grows faster than they do.
_DIGITS = 10_000
_RATIO_BITS = 1 << 15
#: Characters of a path or an address.
_PATH = 1 << 16
_ADDRESS = 200


# --- dates and times


def _date(machine: Machine, args: tuple[Any, ...]) -> datetime.date:
    (raw,) = only(args, bytes)
    if len(raw) != 4:
        raise odd("a date has arguments")
    return datetime.date(int.from_bytes(raw[:2], "big"), raw[2], raw[3])


def _time(machine: Machine, args: tuple[Any, ...]) -> datetime.time:
    raw, zone = _bytes_and_zone(args, 6)
    hour, fold = raw[0] & 0x7F, raw[0] >> 7
    micro = int.from_bytes(raw[3:], "big")
    return datetime.time(hour, raw[1], raw[2], micro, zone, fold=fold)


def _datetime(machine: Machine, args: tuple[Any, ...]) -> datetime.datetime:
    raw, zone = _bytes_and_zone(args, 10)
    year, month, fold = int.from_bytes(raw[:2], "big"), raw[2] & 0x7F, raw[2] >> 7
    micro = int.from_bytes(raw[7:], "big")
    return datetime.datetime(year, month, raw[3], raw[4], raw[5], raw[6], micro, zone, fold=fold)


def _bytes_and_zone(args: tuple[Any, ...], size: int) -> tuple[bytes, datetime.tzinfo | None]:
    raw, zone = value_of(args[0]), value_of(args[1]) if len(args) == 2 else None
    if not 1 <= len(args) <= 2 or type(raw) is not bytes or len(raw) != size:
        raise odd("a time has arguments")
    return raw, None if zone is None else a_zone(zone)


def a_zone(zone: Any) -> datetime.tzinfo:
    """A time zone that is one of ours, whose code runs whenever a time is shown."""
    kind = type(zone)
    ours = kind is datetime.timezone or (zoneinfo and kind is zoneinfo.ZoneInfo)
    if ours or kind.__module__.split(".")[0] == "pytz":
        found: datetime.tzinfo = zone
        return found
    raise odd("a time has a time zone")


def _timedelta(machine: Machine, args: tuple[Any, ...]) -> datetime.timedelta:
    return datetime.timedelta(*only(args, int, int, int))


def _timezone(machine: Machine, args: tuple[Any, ...]) -> datetime.timezone:
    types = (datetime.timedelta, str)[: len(args)] or (datetime.timedelta,)
    return datetime.timezone(*only(args, *types))


def _zone(machine: Machine, args: tuple[Any, ...]) -> zoneinfo.ZoneInfo:
    """A zone of this machine's, by name. Its file is looked up there, so no name is a path."""
    key, cached = only(args, str, (int, bool))
    if not _ZONE.match(key) or len(key) > 100:
        raise odd("a time zone has a name")
    if cached:
        return zoneinfo.ZoneInfo(key)
    machine.charge(_ZONE_SIZE)
    return zoneinfo.ZoneInfo.no_cache(key)


def _pytz(machine: Machine, args: tuple[Any, ...]) -> Any:
    import pytz

    if len(args) == 1:
        (name,) = only(args, str)
    else:
        name, offset, dst, short = only(args, str, int, int, str)
    if name not in pytz.all_timezones_set:
        raise odd("a time zone has a name")
    zone = pytz.timezone(name)
    if len(args) == 1:
        return zone
    # What isn't there would be added to the zone, for all who use it in this process.
    key = (datetime.timedelta(seconds=offset), datetime.timedelta(seconds=dst), short)
    return zone._tzinfos[key]


def _pytz_utc(machine: Machine, args: tuple[Any, ...]) -> Any:
    import pytz

    only(args)
    return pytz.utc


def _getattr(machine: Machine, args: tuple[Any, ...]) -> Any:
    """The one method of a class that a pickle of a standard type gets by `getattr`."""
    if len(args) != 2 or mark_of(args[0]) != "ZoneInfo" or args[1] != "_unpickle":
        raise Refused("the pickle refers to `builtins.getattr`", "builtins.getattr")
    from .grammar import Name

    return Name("zoneinfo.ZoneInfo._unpickle", Rule(call=_zone))


# --- numbers


def _decimal(machine: Machine, args: tuple[Any, ...]) -> decimal.Decimal:
    (text,) = only(args, str)
    if len(text) > _DIGITS or not _NUMBER.match(text):
        raise odd("a Decimal has digits")
    machine.charge(len(text))
    return decimal.Decimal(text)


def _fraction(machine: Machine, args: tuple[Any, ...]) -> fractions.Fraction:
    if len(args) == 1:  # Python 3.10 and before
        (text,) = only(args, str)
        if len(text) > _DIGITS or not _RATIO.match(text):
            raise odd("a Fraction has digits")
        machine.charge(len(text))
        return fractions.Fraction(text)
    above, below = only(args, int, int)
    if max(above.bit_length(), below.bit_length()) > _RATIO_BITS:
        raise odd("a Fraction has digits")
    machine.charge((above.bit_length() + below.bit_length()) >> 2)
    return fractions.Fraction(above, below)


def _uuid(machine: Machine, args: tuple[Any, ...]) -> Pending:
    only(args)

    def finish(state: Any) -> uuid.UUID:
        fields = fields_of(state, "int", "is_safe")
        number, safe = fields["int"], fields.get("is_safe")
        if type(number) is not int or type(safe) not in (int, type(None)):
            raise odd("a UUID has a state")
        return uuid.UUID(int=number, is_safe=uuid.SafeUUID(safe))

    return Pending("uuid.UUID", finish)


_ARRAY_SIZES = {code: array.array(code).itemsize for code in "bBhHiIlLqQfd"}
_SIGNED, _BIG = "bhilq", sys.byteorder == "big"
#: {machine format: (kinds of numbers, size)}, in this machine's byte order: see PEP 3118.
_FORMATS = {
    **{f: ("u", s) for f, s in zip((0, 2 + _BIG, 6 + _BIG, 10 + _BIG), (1, 2, 4, 8))},
    **{f: ("s", s) for f, s in zip((1, 4 + _BIG, 8 + _BIG, 12 + _BIG), (1, 2, 4, 8))},
    14 + _BIG: ("f", 4),
    16 + _BIG: ("f", 8),
}


def _array(machine: Machine, args: tuple[Any, ...]) -> array.array[Any]:
    if len(args) != 4 or mark_of(args[0]) != "array":
        raise odd("an array has arguments")
    code, form, raw = only(args[1:], str, int, bytes)
    kind = "f" if code in "fd" else "s" if code in _SIGNED else "u"
    size = _ARRAY_SIZES.get(code)
    if size is None or _FORMATS.get(form) != (kind, size) or len(raw) % size:
        raise odd("an array has arguments")
    machine.charge_copy(len(raw))
    made = array.array(code)
    made.frombytes(raw)
    return made


def _array_of_list(machine: Machine, args: tuple[Any, ...]) -> array.array[Any]:
    """How protocol 2 writes arrays."""
    code, items = only(args, str, list)
    if code not in _ARRAY_SIZES or any(type(i) not in (int, float) for i in items):
        raise odd("an array has arguments")
    machine.charge(8 * len(items))
    return array.array(code, items)


# --- names of things


def _path(kind: type[pathlib.PurePath]) -> Rule:
    def call(machine: Machine, args: tuple[Any, ...]) -> pathlib.PurePath:
        parts = only(args, *[str] * len(args))
        if len(parts) + sum(map(len, parts)) > _PATH:
            raise odd("a path has a length")
        machine.charge(sum(64 + 8 * len(part) for part in parts))
        return kind(*parts)

    return Rule(call=call)


def _address(kind: Callable[[Any], Any]) -> Rule:
    def call(machine: Machine, args: tuple[Any, ...]) -> Any:
        (value,) = only(args, (str, int))
        if type(value) is str and len(value) > _ADDRESS:
            raise odd("an address has a length")
        return kind(value)

    return Rule(call=call)


# --- containers


def _empty(kind: type) -> Rule:
    def call(machine: Machine, args: tuple[Any, ...]) -> Any:
        only(args)
        return kind()

    return Rule(call=call, mark=kind.__name__)


#: What a defaultdict may make: nothing of it takes more than a dict does.
_FACTORIES: dict[str, type] = {
    **{
        kind.__name__: kind
        for kind in (list, dict, set, frozenset, tuple, int, float, complex, bool, str, bytes)
    },
    **{kind.__name__: kind for kind in (OrderedDict, Counter, deque)},
}


def _defaultdict(machine: Machine, args: tuple[Any, ...]) -> defaultdict[Any, Any]:
    factory = None
    if len(args) == 1 and mark_of(args[0]) in _FACTORIES:
        factory = _FACTORIES[str(mark_of(args[0]))]
    else:
        only(args, *[type(None)] * len(args[:1]))
    made: defaultdict[Any, Any] = defaultdict(factory)
    machine.contain(made)
    return made


def _deque(machine: Machine, args: tuple[Any, ...]) -> deque[Any]:
    most = None
    if args:
        empty, most = only(args, tuple, int)
        if empty:
            raise odd("a deque has items")
    made: deque[Any] = deque(maxlen=most)
    machine.contain(made)
    return made


def _counter(machine: Machine, args: tuple[Any, ...]) -> Counter[Any]:
    counts = only(args, dict)[0] if args else {}
    made: Counter[Any] = Counter()
    machine.charge_items(Counter, len(counts))
    dict.update(made, counts)
    return made


def _namespace(machine: Machine, args: tuple[Any, ...]) -> types.SimpleNamespace:
    only(args)
    made = types.SimpleNamespace()

    def build(state: Any) -> None:
        fields = attributes(value_of(state))
        machine.charge_items(dict, len(fields))
        made.__dict__.update(fields)

    return machine.own(made, build)  # type: ignore[no-any-return]


_PATHS: tuple[type[pathlib.PurePath], ...] = (
    pathlib.PurePosixPath,
    pathlib.PureWindowsPath,
    type(pathlib.Path()),
)
_ADDRESSES = (
    ipaddress.IPv4Address,
    ipaddress.IPv6Address,
    ipaddress.IPv4Network,
    ipaddress.IPv6Network,
    ipaddress.IPv4Interface,
    ipaddress.IPv6Interface,
)
_NAMES = ("list", "dict", "tuple", "int", "float", "bool", "str", "complex", "bytes")

RULES: Rules = {
    "datetime.date": Rule(call=_date),
    "datetime.time": Rule(call=_time),
    "datetime.datetime": Rule(call=_datetime),
    "datetime.timedelta": Rule(call=_timedelta),
    "datetime.timezone": Rule(call=_timezone),
    "zoneinfo.ZoneInfo": Rule(mark="ZoneInfo"),
    "builtins.getattr": Rule(call=_getattr),
    "pytz._p": Rule(call=_pytz),
    "pytz._UTC": Rule(call=_pytz_utc),
    "decimal.Decimal": Rule(call=_decimal),
    "fractions.Fraction": Rule(call=_fraction),
    "uuid.UUID": Rule(new=_uuid),
    "array._array_reconstructor": Rule(call=_array),
    "array.array": Rule(call=_array_of_list, mark="array"),
    "collections.OrderedDict": _empty(OrderedDict),
    "collections.defaultdict": Rule(call=_defaultdict),
    "collections.deque": Rule(call=_deque, mark="deque"),
    "collections.Counter": Rule(call=_counter, mark="Counter"),
    "types.SimpleNamespace": Rule(call=_namespace),
    # pathlib moved its classes in 3.13, and back in 3.14.
    **{
        f"{module}.{kind.__name__}": _path(kind)
        for kind in _PATHS
        for module in ("pathlib", "pathlib._local")
    },
    **{f"ipaddress.{kind.__name__}": _address(kind) for kind in _ADDRESSES},
    **{f"builtins.{name}": Rule(mark=name) for name in _NAMES if name not in ("complex", "bytes")},
}
