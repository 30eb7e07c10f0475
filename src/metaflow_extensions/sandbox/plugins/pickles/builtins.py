"""Rules for Python's own types, and for the exceptions that Metaflow records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .grammar import Rule, Rules, fields_of, odd, only

if TYPE_CHECKING:
    from .opcodes import Machine

#: What @catch leaves and what every failed task has: an object with three strings.
EXCEPTION = "metaflow.exception.MetaflowExceptionWrapper"
_EXCEPTION_FIELDS = ("exception", "type", "stacktrace")
_ENDS = (int, float, str, type(None))
#: Bits of an end of a range or a slice.
_BITS = 1 << 15


def _bytes(machine: Machine, args: tuple[Any, ...]) -> bytes:
    if not args:
        return b""
    raise odd("bytes have arguments")


def _encode(machine: Machine, args: tuple[Any, ...]) -> bytes:
    """How protocol 2 writes bytes."""
    text, encoding = only(args, str, str)
    if encoding not in ("latin1", "latin-1"):
        raise odd("bytes have an encoding")
    machine.charge_copy(len(text))
    return bytes(text.encode("latin-1"))


def _bytearray(machine: Machine, args: tuple[Any, ...]) -> bytearray:
    if len(args) == 2:  # protocol 2
        return bytearray(_encode(machine, args))
    content = only(args, bytes)[0] if args else b""
    machine.charge_copy(len(content))
    return bytearray(content)


def _complex(machine: Machine, args: tuple[Any, ...]) -> complex:
    return complex(*only(args, float, float))


def _range(machine: Machine, args: tuple[Any, ...]) -> range:
    return range(*_bounded(machine, only(args, int, int, int)))


def _slice(machine: Machine, args: tuple[Any, ...]) -> slice:
    return slice(*_bounded(machine, only(args, _ENDS, _ENDS, _ENDS)))


def _bounded(machine: Machine, ends: tuple[Any, ...]) -> tuple[Any, ...]:
    """Ends of a range: how long that is takes the square of their digits to find out."""
    for end in ends:
        if type(end) is int:
            if end.bit_length() > _BITS:
                raise odd("a range has ends")
            machine.charge(end.bit_length() >> 3)
    return ends


def _set(machine: Machine, args: tuple[Any, ...]) -> set[Any]:
    """How protocols 2 and 3 write sets."""
    (items,) = only(args, list)
    return set(machine.frozen(items))


def _frozenset(machine: Machine, args: tuple[Any, ...]) -> frozenset[Any]:
    (items,) = only(args, list)
    return machine.frozen(items)


def _exception(kind: type | None) -> Rule:
    def call(machine: Machine, args: tuple[Any, ...]) -> Any:
        only(args, type(None))
        made: Any = kind() if kind else _wrapper()()
        made.__dict__.update(exception="", type="", stacktrace=None)

        def build(state: Any) -> None:
            fields = fields_of(state, *_EXCEPTION_FIELDS)
            if any(type(v) not in (str, type(None)) for v in fields.values()):
                raise odd("an exception has a state")
            made.__dict__.update(fields)

        return machine.own(made, build)

    return Rule(call=call)


def _wrapper() -> Any:
    from metaflow.exception import MetaflowExceptionWrapper

    return MetaflowExceptionWrapper


def rules(exception_type: type | None = None) -> Rules:
    """The rules, with another type in the place of Metaflow's exception wrapper."""
    return {**_PLAIN, EXCEPTION: _exception(exception_type)}


_PLAIN: Rules = {
    "_codecs.encode": Rule(call=_encode),
    "builtins.bytes": Rule(call=_bytes),
    "builtins.bytearray": Rule(call=_bytearray),
    "builtins.complex": Rule(call=_complex),
    "builtins.range": Rule(call=_range),
    "builtins.slice": Rule(call=_slice),
    "builtins.set": Rule(call=_set, mark="set"),
    "builtins.frozenset": Rule(call=_frozenset, mark="frozenset"),
}
RULES = rules()
