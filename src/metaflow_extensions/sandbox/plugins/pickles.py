"""Reads pickles without running them: the part of the trust boundary that meets hostile bytes.

A pickle is a program. This interpreter knows the opcodes that build plain data
and builds that data itself; everything else is refused by name. It imports
nothing, calls nothing that the pickle names, and acts only on objects that the
same pickle made. So loading is as safe as parsing JSON, whatever the bytes are.

It lives in the package that travels, not with the host's other checks, because
an artifact may be read wherever Metaflow runs: a later step on Kubernetes has
this package and not the host's.

Names that a pickle may use are the keys of `CONSTRUCTORS`; each has a function
that checks its arguments and makes the value. Protocols 2 to 5 are read.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any


class Refused(Exception):
    """The pickle is not plain data. `name` is what it asks for, if it names something."""

    def __init__(self, reason: str, name: str | None = None) -> None:
        super().__init__(reason)
        self.name = name


class _Name:
    """A global that a pickle names: a mark on the stack, never the thing itself."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


_MARK = object()
#: Bytes of containers that one pickle may make. An empty set takes 216 bytes and
#: one byte of pickle, so a small file could otherwise fill the host's memory.
MEMORY = 4 << 30
#: What a container takes when it is empty, and for each of its items, at the most.
_SIZES = {  # type: dict[type, tuple[int, int]]
    list: (56, 9),
    dict: (64, 105),
    set: (216, 64),
    tuple: (48, 8),
    frozenset: (216, 64),
}
#: What an object that a constructor makes takes at the most, but for what it holds.
_OBJECT = 800
#: Keys are hashed by recursion in C that nothing checks, and anew for each use.
KEY_DEPTH = 50
#: Keys of one container that may have the same hash.
COLLISIONS = 200
_EXCEPTION_FIELDS = {"exception", "type", "stacktrace"}


def _only(args: tuple[Any, ...], *types: type) -> tuple[Any, ...]:
    if len(args) != len(types) or any(type(a) is not t for a, t in zip(args, types)):
        raise Refused("a constructor has arguments that it is never pickled with")
    return args


def _bytearray(args: tuple[Any, ...]) -> bytearray:
    return bytearray(_only(args, bytes)[0]) if args else bytearray()


def _complex(args: tuple[Any, ...]) -> complex:
    return complex(*_only(args, float, float))


def _range(args: tuple[Any, ...]) -> range:
    return range(*_only(args, int, int, int))


def _slice(args: tuple[Any, ...]) -> slice:
    if len(args) != 3 or any(type(a) not in (int, type(None)) for a in args):
        raise Refused("a slice of something other than integers")
    return slice(*args)


#: What a pickle may call, by the name it uses.
CONSTRUCTORS: dict[str, Callable[[tuple[Any, ...]], object]] = {
    "builtins.bytearray": _bytearray,
    "builtins.complex": _complex,
    "builtins.range": _range,
    "builtins.slice": _slice,
}
#: What @catch leaves and what every failed task has: an object with three strings.
EXCEPTION = "metaflow.exception.MetaflowExceptionWrapper"


class _Reader:
    """Bounds-checked reading of a pickle's bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        end = self.at + count
        if count < 0 or end > len(self.data):
            raise Refused("the pickle is cut short")
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 1000)
        if end < 0:
            raise Refused("the pickle is cut short")
        taken = self.data[self.at : end]
        self.at = end + 1
        return taken.decode("utf-8", "replace")


class _Machine:
    """The stack machine. One method an opcode, found in `_OPCODES`."""

    def __init__(self, data: bytes, exception_type: type | None) -> None:
        self.reader = _Reader(data)
        self.exception_type = exception_type
        self.stack: list[Any] = []
        self.memo: list[Any] = []
        self.memory = MEMORY
        # Items of keys that may be looked at; more is a key used over and over.
        self.hashing = 1_000_000 + 16 * len(data)
        # {id of a container: it (so that its id stays its own), {hash: keys that have it}}
        self.hashes: dict[int, tuple[object, dict[int, int]]] = {}
        # A pickle holds the content of each of its byte arrays: more means that
        # it copies one of them over and over.
        self.copied = len(data)

    def run(self) -> Any:
        reader, opcodes = self.reader, _OPCODES
        while True:
            code = reader.take(1)[0]
            if code == 0x2E:  # STOP
                break
            handler = opcodes.get(code)
            if handler is None:
                raise Refused(f"the pickle uses opcode 0x{code:02x}, which plain data never needs")
            handler(self)
        if len(self.stack) != 1 or reader.at != len(reader.data):
            raise Refused("the pickle goes on after its end")
        return self._value(self.stack[0])

    # -- helpers

    def _value(self, item: Any) -> Any:
        """An item that may become part of data: no mark, no bare name."""
        if type(item) is _Name:
            raise Refused(f"the pickle refers to `{item.text}`", item.text)
        if item is _MARK:
            raise Refused("the pickle's stack is out of order")
        return item

    def _pop(self) -> Any:
        if not self.stack:
            raise Refused("the pickle's stack is out of order")
        return self.stack.pop()

    def _pop_values(self, count: int) -> list[Any]:
        return [self._value(self._pop()) for _ in range(count)][::-1]

    def _pop_to_mark(self) -> list[Any]:
        stack = self.stack
        for i in range(len(stack) - 1, -1, -1):
            if stack[i] is _MARK:
                items = [self._value(x) for x in stack[i + 1 :]]
                del stack[i:]
                return items
        raise Refused("the pickle's stack is out of order")

    def _top(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise Refused("the pickle changes something that it did not make")
        return self.stack[-1]

    # -- atoms

    def proto(self) -> None:
        if not 2 <= self.reader.number("<B") <= 5:
            raise Refused("the pickle's protocol is not one of 2 to 5")

    def frame(self) -> None:
        self.reader.take(8)  # a hint for file readers; the bytes are here anyway

    def push(self, value: object) -> None:
        self.stack.append(value)

    def long(self, form: str) -> None:
        count = self.reader.number(form)
        self.push(int.from_bytes(self.reader.take(count), "little", signed=True))

    def text(self, form: str) -> None:
        raw = self.reader.take(self.reader.number(form))
        try:
            self.push(raw.decode("utf-8", "surrogatepass"))
        except UnicodeDecodeError:
            raise Refused("the pickle has a string that is not UTF-8") from None

    def raw(self, form: str, kind: type[bytes | bytearray] = bytes) -> None:
        self.push(kind(self.reader.take(self.reader.number(form))))

    # -- containers

    def charge(self, kind: type, items: int, empty: int = 0) -> None:
        """Counts the memory of `empty` new containers and of items added to one."""
        base, each = _SIZES[kind]
        self.memory -= base * empty + each * items
        if self.memory < 0:
            raise Refused(f"the pickle expands to more than {MEMORY >> 30} GB")

    def make(self, kind: type) -> None:
        self.charge(kind, 0, 1)
        self.push(kind())

    def make_tuple(self, values: list[Any]) -> None:
        self.charge(tuple, len(values), 1)
        self.push(tuple(values))

    def keys(self, values: list[Any], target: object) -> list[Any]:
        """Dictionary keys or set members: hashable, and in reasonable time."""
        hashes = None
        for value in values:
            kind = type(value)
            if kind in (str, bytes):
                self.hashing -= len(value) >> 4  # compared with an equal one that is there
            # All other hashes can be made to collide, and then each insertion looks
            # at all that is there.
            elif not (kind in (bool, type(None)) or (kind is int and value.bit_length() < 61)):
                self.hashing -= 1
                if hashes is None:
                    _, hashes = self.hashes.setdefault(id(target), (target, {}))
                key = self._hash(value)
                hashes[key] = hashes.get(key, 0) + 1
                if hashes[key] > COLLISIONS:
                    raise Refused("the pickle has keys that are made to collide")
        if self.hashing < 0:
            raise Refused("the pickle has keys that are nested too deep, or used too often")
        return values

    def _hash(self, value: Any) -> int:
        """The hash of a key, if it isn't nested too deep for that."""
        level = [value]
        for _ in range(KEY_DEPTH):
            nested = [v for v in level if type(v) in (tuple, frozenset)]
            self.hashing -= sum(map(len, nested)) + sum(
                v.bit_length() >> 6 if type(v) is int else len(v) >> 4
                for v in level
                if type(v) in (int, str, bytes)
            )
            if self.hashing < 0:
                break
            if not nested:
                return hash(value)
            level = [x for v in nested for x in v]
        raise Refused("the pickle has keys that are nested too deep, or used too often")

    def append(self) -> None:
        (value,) = self._pop_values(1)
        self.charge(list, 1)
        self._top(list).append(value)

    def appends(self) -> None:
        values = self._pop_to_mark()
        self.charge(list, len(values))
        self._top(list).extend(values)

    def _set_items(self, pairs: list[Any]) -> None:
        target = self._top(dict)
        if len(pairs) % 2:
            raise Refused("the pickle has a dictionary with half an item")
        self.charge(dict, len(pairs) // 2)
        try:
            target.update(zip(self.keys(pairs[::2], target), pairs[1::2]))
        except TypeError:
            raise Refused("the pickle has a dictionary key that can't be one") from None

    def setitem(self) -> None:
        self._set_items(self._pop_values(2))

    def setitems(self) -> None:
        self._set_items(self._pop_to_mark())

    def additems(self) -> None:
        values = self._pop_to_mark()
        self.charge(set, len(values))
        try:
            target = self._top(set)
            target.update(self.keys(values, target))
        except TypeError:
            raise Refused("the pickle has a set member that can't be one") from None

    def make_frozenset(self) -> None:
        values = self._pop_to_mark()
        self.charge(frozenset, len(values), 1)
        try:
            self.push(frozenset(self.keys(values, values)))
        except TypeError:
            raise Refused("the pickle has a set member that can't be one") from None

    # -- memo: a list, since pickle numbers its entries from 0 without gaps

    def memoize(self) -> None:
        if not self.stack or self.stack[-1] is _MARK:
            raise Refused("the pickle's stack is out of order")
        self.memo.append(self.stack[-1])

    def put(self, form: str) -> None:
        if self.reader.number(form) != len(self.memo):
            raise Refused("the pickle numbers its memo out of order")
        self.memoize()

    def get(self, form: str) -> None:
        index = self.reader.number(form)
        if index >= len(self.memo):
            raise Refused("the pickle refers to something that it did not make")
        self.push(self.memo[index])

    # -- names

    def _name(self, module: str, name: str) -> None:
        text = f"{module}.{name}"
        if text not in CONSTRUCTORS and text != EXCEPTION:
            shown = ascii(text[:200])[1:-1]  # it is shown on terminals
            raise Refused(f"the pickle refers to `{shown}`", shown)
        self.push(_Name(text))

    def stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise Refused("the pickle names something by what is no name")
        self._name(module, name)

    def global_(self) -> None:
        module = self.reader.line()
        self._name(module, self.reader.line())

    def reduce(self) -> None:
        (args,) = self._pop_values(1)
        callee = self._pop()
        if type(callee) is not _Name or type(args) is not tuple:
            raise Refused("the pickle calls something that is no constructor")
        self.memory -= _OBJECT
        if self.memory < 0:
            raise Refused(f"the pickle expands to more than {MEMORY >> 30} GB")
        if callee.text == EXCEPTION:
            _only(args, type(None))
            self.push(self._new_exception())
            return
        self.copied -= sum(len(a) for a in args if type(a) is bytes)
        if self.copied < 0:
            raise Refused("the pickle expands to more than it holds")
        try:
            self.push(CONSTRUCTORS[callee.text](args))
        except (TypeError, ValueError):
            raise Refused("a constructor has arguments that it is never pickled with") from None

    def _new_exception(self) -> Any:
        if self.exception_type is None:
            from metaflow.exception import MetaflowExceptionWrapper

            self.exception_type = MetaflowExceptionWrapper
        exception = self.exception_type()
        exception.__dict__.update(exception="", type="", stacktrace=None)
        return exception

    def build(self) -> None:
        (state,) = self._pop_values(1)
        if self.exception_type is None:  # none was made
            raise Refused("the pickle changes something that it did not make")
        target = self._top(self.exception_type)
        if type(state) is not dict or not _EXCEPTION_FIELDS.issuperset(state):
            raise Refused("an exception has a state that it is never pickled with")
        if any(type(v) not in (str, type(None)) for v in state.values()):
            raise Refused("an exception has a state that it is never pickled with")
        target.__dict__.update(state)


_OPCODES: dict[int, Callable[[_Machine], object]] = {
    0x80: _Machine.proto,
    0x95: _Machine.frame,
    ord("("): lambda m: m.push(_MARK),
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("J"): lambda m: m.push(m.reader.number("<i")),
    ord("K"): lambda m: m.push(m.reader.number("<B")),
    ord("M"): lambda m: m.push(m.reader.number("<H")),
    0x8A: lambda m: m.long("<B"),
    0x8B: lambda m: m.long("<i"),
    ord("G"): lambda m: m.push(m.reader.number(">d")),
    0x8C: lambda m: m.text("<B"),
    ord("X"): lambda m: m.text("<I"),
    0x8D: lambda m: m.text("<Q"),
    ord("C"): lambda m: m.raw("<B"),
    ord("B"): lambda m: m.raw("<I"),
    0x8E: lambda m: m.raw("<Q"),
    0x96: lambda m: m.raw("<Q", bytearray),
    ord("]"): lambda m: m.make(list),
    ord("}"): lambda m: m.make(dict),
    ord(")"): lambda m: m.push(()),
    0x8F: lambda m: m.make(set),
    0x85: lambda m: m.make_tuple(m._pop_values(1)),
    0x86: lambda m: m.make_tuple(m._pop_values(2)),
    0x87: lambda m: m.make_tuple(m._pop_values(3)),
    ord("t"): lambda m: m.make_tuple(m._pop_to_mark()),
    0x91: _Machine.make_frozenset,
    ord("a"): _Machine.append,
    ord("e"): _Machine.appends,
    ord("s"): _Machine.setitem,
    ord("u"): _Machine.setitems,
    0x90: _Machine.additems,
    0x94: _Machine.memoize,
    ord("q"): lambda m: m.put("<B"),
    ord("r"): lambda m: m.put("<I"),
    ord("h"): lambda m: m.get("<B"),
    ord("j"): lambda m: m.get("<I"),
    0x93: _Machine.stack_global,
    ord("c"): _Machine.global_,
    ord("R"): _Machine.reduce,
    ord("b"): _Machine.build,
    ord("0"): _Machine._pop,
    ord("1"): _Machine._pop_to_mark,
}


def load_data(data: bytes, exception_type: type | None = None) -> Any:
    """The plain data that a pickle describes.

    Builtin containers, numbers, strings and bytes, and the exceptions that
    Metaflow records, each as deep and as shared as pickle would make them.

    Args:
        exception_type: stands for Metaflow's exception wrapper; that by default.

    Raises:
        Refused: the bytes are anything else. Nothing of them was run.
    """
    try:
        return _Machine(data, exception_type).run()
    except RecursionError:  # comparing keys that are nested
        raise Refused("the pickle is nested too deep") from None
