"""The stack machine of pickle, for the opcodes that data needs: it makes what they make.

It imports nothing and calls nothing that the pickle names: what a name may be used for
is said by the rules that it is given (`grammar.py`). Everything else is refused.
"""

from __future__ import annotations

import _compat_pickle
import struct
import time
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .grammar import MARK, Blob, Name, NotHere, Parts, Pending, Refused, Rule, items_of, value_of

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
    OrderedDict: (64, 200),
    defaultdict: (64, 105),
    Counter: (64, 105),
    deque: (0, 9),
}
_DICTS = (dict, OrderedDict, defaultdict, Counter)
_LISTS = (list, deque)
#: What an object that a rule makes takes at the most, but for what it holds.
_OBJECT = 800
#: Keys are hashed by recursion in C that nothing checks, and anew for each use.
KEY_DEPTH = 50
#: How deep deques, defaultdicts and arrays of objects may directly lie in each other. They
#: end by recursion in C that nothing checks; all other containers put that off after 50.
NESTED = 50
#: Keys of one container that may have the same hash.
COLLISIONS = 200
#: Bytes from which on a string of bytes is copied when it is wanted, not when it is read.
_LARGE = 1 << 16
#: Opcodes between two looks at the clock.
_PIECE = 1 << 12


#: The forms of the numbers that opcodes have beside them.
_PACKED = {form: struct.Struct(form) for form in ("<H", "<i", "<I", "<Q", ">d")}


class _Reader:
    """Bounds-checked reading of a pickle's bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.view = memoryview(data)
        self.at = 0

    def _advance(self, count: int) -> int:
        start, end = self.at, self.at + count
        if count < 0 or end > len(self.data):
            raise Refused("the pickle is cut short")
        self.at = end
        return start

    def take(self, count: int) -> bytes:
        start = self._advance(count)
        return self.data[start : self.at]

    def look(self, count: int) -> memoryview:
        """As `take`, but not copied."""
        start = self._advance(count)
        return self.view[start : self.at]

    def byte(self) -> int:
        start = self._advance(1)
        return self.data[start]

    def number(self, form: str) -> Any:
        if form == "<B":
            return self.byte()
        packed = _PACKED[form]
        return packed.unpack_from(self.data, self._advance(packed.size))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 1000)
        if end < 0:
            raise Refused("the pickle is cut short")
        taken = self.data[self.at : end]
        self.at = end + 1
        return taken.decode("utf-8", "replace")


class Machine:
    """One pickle's run. One method an opcode, found in `_OPCODES`.

    Args:
        rules: {name: what it may be used for}.
        seconds: CPU time of this thread that it may take. The clock is looked at
            between opcodes, and before each object: no thread or signal ends it in the
            middle of one.
    """

    def __init__(
        self, data: bytes, rules: Mapping[str, Rule], seconds: float | None = None
    ) -> None:
        self.reader = _Reader(data)
        self.rules = rules
        self.seconds = seconds
        self.until = 0.0
        self.protocol = 2
        self.stack: list[Any] = []
        self.memo: list[Any] = []
        self.memory = MEMORY
        # Items of keys that may be looked at; more is a key used over and over.
        self.hashing = 500_000 + 4 * len(data)
        # {id of a container: it (so that its id stays its own), {hash: keys that have it}}
        self.hashes: dict[int, tuple[object, dict[int, int]]] = {}
        # A pickle holds the content of each of its arrays, and text is copied twice: more
        # means that it copies one of them over and over.
        self.copied = 1024 + 2 * len(data)
        # {id: (object, what gives it a state)} of objects that may change after they were made
        self.owned: dict[int, tuple[object, Callable[[Any], None]]] = {}

        # {id: [it, how many lie in each other from it on, whether it lies in one]}, of those
        # that end by recursion
        self.levels: dict[int, list[Any]] = {}
        self.linked = 0

    def run(self) -> Any:
        reader, opcodes = self.reader, _OPCODES
        data, size = reader.data, len(reader.data)
        self.until = time.thread_time() + (self.seconds or 0)
        while True:
            for _ in range(_PIECE):
                if reader.at >= size:
                    raise Refused("the pickle is cut short")
                code = data[reader.at]
                reader.at += 1
                handler = opcodes[code]
                if handler is None:
                    if code == _STOP:
                        return self._result()
                    raise Refused(
                        f"the pickle uses opcode 0x{code:02x}, which plain data never needs"
                    )
                handler(self)
            self._look_at_clock()

    def _look_at_clock(self) -> None:
        if self.seconds is not None and time.thread_time() > self.until:
            raise Refused(f"it takes longer than {self.seconds:g} s to read")

    def _result(self) -> Any:
        if len(self.stack) != 1 or self.reader.at != len(self.reader.data):
            raise Refused("the pickle goes on after its end")
        return value_of(self.stack[0])

    # -- helpers

    def _pop(self) -> Any:
        if not self.stack:
            raise Refused("the pickle's stack is out of order")
        return self.stack.pop()

    def _pop_value(self) -> Any:
        return value_of(self._pop())

    def _pop_items(self, count: int) -> list[Any]:
        return [self._item(self._pop()) for _ in range(count)][::-1]

    def _item(self, item: Any) -> Any:
        if item is MARK:
            raise Refused("the pickle's stack is out of order")
        return item.result if type(item) is Pending and item.done else item

    def _pop_to_mark(self) -> list[Any]:
        stack = self.stack
        for i in range(len(stack) - 1, -1, -1):
            if stack[i] is MARK:
                items = stack[i + 1 :]
                del stack[i:]
                return items
        raise Refused("the pickle's stack is out of order")

    def _pop_values(self) -> list[Any]:
        return [value_of(x) for x in self._pop_to_mark()]

    def _top(self, kinds: tuple[type, ...], base: type) -> Any:
        """What is on top of the stack, if this pickle made it and it holds such items."""
        top = self.stack[-1] if self.stack else None
        if type(top) in kinds or (id(top) in self.owned and isinstance(top, base)):
            return top
        raise Refused("the pickle changes something that it did not make")

    def charge(self, size: int) -> None:
        """Counts memory.

        Raises:
            Refused: there was more than a pickle may take.
        """
        self.memory -= size
        if self.memory < 0:
            raise Refused(f"the pickle expands to more than {MEMORY >> 30} GB")

    def charge_copy(self, size: int) -> None:
        """Counts bytes that a rule copies out of what the pickle holds."""
        self.copied -= size
        if self.copied < 0:
            raise Refused("the pickle expands to more than it holds")

    def own(self, made: object, build: Callable[[Any], None]) -> Any:
        """Lets the pickle give a new object a state, and items if it is a list or a dict."""
        self.owned[id(made)] = made, build
        return made

    def contain(self, outer: Any, items: Iterable[Any] = ()) -> None:
        """Counts how deep containers lie in each other that end by recursion (`NESTED`).

        What lies in one already and gets another makes a longer chain than what is counted
        here, so such links are few.
        """
        levels = self.levels
        here = levels.setdefault(id(outer), [outer, 1, False])
        for item in items:
            there = levels.get(id(item))
            if there is None or there is here:
                continue
            self.linked += here[2]
            there[2] = True
            here[1] = max(here[1], there[1] + 1)
        if here[1] > NESTED or self.linked > NESTED:
            raise Refused("the pickle is nested too deep")

    # -- atoms

    def proto(self) -> None:
        self.protocol = self.reader.number("<B")
        if not 2 <= self.protocol <= 5:
            raise Refused("the pickle's protocol is not one of 2 to 5")

    def frame(self) -> None:
        self.reader.look(8)  # a hint for file readers; the bytes are here anyway

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

    def raw(self, form: str) -> None:
        size = self.reader.number(form)
        self.push(self.reader.take(size) if size < _LARGE else Blob(self.reader.look(size)))

    def raw_array(self) -> None:
        self.push(bytearray(self.reader.look(self.reader.number("<Q"))))

    # -- containers

    def charge_items(self, kind: type, items: int, empty: int = 0) -> None:
        """Counts the memory of `empty` new containers and of items added to one."""
        base, each = _SIZES.get(kind, (800, 200))
        self.charge(base * empty + each * items)

    def make(self, kind: type) -> None:
        self.charge_items(kind, 0, 1)
        self.push(kind())

    def make_tuple(self, items: list[Any]) -> None:
        self.charge_items(tuple, len(items), 1)
        if _SYMBOLIC.isdisjoint(map(type, items)):
            self.push(tuple(items))
        else:
            self.push(Parts([self._item(item) for item in items]))

    def make_long_tuple(self) -> None:
        self.make_tuple([self._item(item) for item in self._pop_to_mark()])

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
            nested = []
            for v in level:
                kind = type(v)
                if kind in (tuple, frozenset):
                    nested.append(v)
                    self.hashing -= len(v)
                elif kind is int:
                    self.hashing -= v.bit_length() >> 6
                elif isinstance(v, (str, bytes)):
                    self.hashing -= len(v) >> 4
                elif kind not in (float, complex, bool, type(None)):
                    self.hashing -= 8 + (getattr(v, "nbytes", 0) >> 4)
                    # The hash of a dtype is worked out from all that it refers to.
                    if kind.__name__.lower().endswith("dtype"):
                        raise TypeError
            if self.hashing < 0:
                break
            if not nested:
                return hash(value)
            level = [x for v in nested for x in v]
        raise Refused("the pickle has keys that are nested too deep, or used too often")

    def append(self) -> None:
        self._extend([self._pop_value()])

    def appends(self) -> None:
        self._extend(self._pop_values())

    def _extend(self, values: list[Any]) -> None:
        target = self._top(_LISTS, list)
        self.charge_items(type(target), len(values))
        if type(target) is deque:
            self.contain(target, values)
        target.extend(values)

    def _set_items(self, pairs: list[Any]) -> None:
        target = self._top(_DICTS, dict)
        if len(pairs) % 2:
            raise Refused("the pickle has a dictionary with half an item")
        self.charge_items(type(target), len(pairs) // 2)
        keys = self._hashed("a dictionary key", pairs[::2], target)
        if type(target) is dict:
            target.update(zip(keys, pairs[1::2]))
        else:
            if type(target) is defaultdict:
                self.contain(target, pairs[1::2])
            for key, value in zip(keys, pairs[1::2]):
                target[key] = value

    def _hashed(self, what: str, values: list[Any], target: object) -> list[Any]:
        try:
            return self.keys(values, target)
        except TypeError:
            raise Refused(f"the pickle has {what} that can't be one") from None

    def setitem(self) -> None:
        value, key = self._pop_value(), self._pop_value()
        self._set_items([key, value])

    def setitems(self) -> None:
        self._set_items(self._pop_values())

    def additems(self) -> None:
        values = self._pop_values()
        self.charge_items(set, len(values))
        target = self._top((set,), set)
        target.update(self._hashed("a set member", values, target))

    def make_frozenset(self) -> None:
        self.push(self.frozen(self._pop_values()))

    def frozen(self, values: list[Any]) -> frozenset[Any]:
        """A frozen set, counted and checked."""
        self.charge_items(frozenset, len(values), 1)
        return frozenset(self._hashed("a set member", values, values))

    # -- memo: a list, since pickle numbers its entries from 0 without gaps

    def memoize(self) -> None:
        if not self.stack or self.stack[-1] is MARK:
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
        if self.protocol < 3:  # as pickle reads what was written for Python 2
            module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
            module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        text = f"{module}.{name}"
        rule = self.rules.get(text)
        if rule is None:
            shown = ascii(text[:200])[1:-1]  # it is shown on terminals
            raise Refused(f"the pickle refers to `{shown}`", shown)
        self.push(Name(text, rule) if rule.value is None else self._made(text, rule.value))

    def stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise Refused("the pickle names something by what is no name")
        self._name(module, name)

    def global_(self) -> None:
        module = self.reader.line()
        self._name(module, self.reader.line())

    def reduce(self) -> None:
        args, callee = self._pop(), self._pop()
        rule = callee.rule if type(callee) is Name else None
        if rule is None or rule.call is None:
            raise Refused("the pickle calls something that is no constructor")
        self.charge(_OBJECT)
        self.push(self._made(callee.text, rule.call, self, items_of(args)))

    def newobj(self) -> None:
        args, callee = self._pop(), self._pop()
        rule = callee.rule if type(callee) is Name else None
        if rule is None or rule.new is None:
            raise Refused("the pickle makes an object of something that is no class of data")
        self.charge(_OBJECT)
        self.push(self._made(callee.text, rule.new, self, items_of(args)))

    def build(self) -> None:
        state = self._item(self._pop())
        top = self.stack[-1] if self.stack else None
        if type(top) is Pending:
            self._made(top.name, top.build, state)
        elif id(top) in self.owned:
            self._made(type(top).__name__, self.owned[id(top)][1], state)
        else:
            raise Refused("the pickle changes something that it did not make")

    def _made(self, name: str, make: Callable[..., Any], *args: Any) -> Any:
        """What a rule makes. Whatever else it meets in what the pickle gives it is refused."""
        self._look_at_clock()
        try:
            return make(*args)
        except (Refused, RecursionError, MemoryError):
            raise
        except ImportError as e:
            raise NotHere(f"`{name}` needs {e.name}, which is not installed here", name) from None
        except Exception as e:
            why = type(e).__name__
            raise Refused(f"`{name}` can't be made of what the pickle gives it ({why})") from None


_STOP = ord(".")
_SYMBOLIC = frozenset({Name, Blob, Pending, Parts})
_HANDLERS: dict[int, Callable[[Machine], object]] = {
    0x80: Machine.proto,
    0x95: Machine.frame,
    ord("("): lambda m: m.push(MARK),
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("J"): lambda m: m.push(m.reader.number("<i")),
    ord("K"): lambda m: m.push(m.reader.byte()),
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
    0x96: Machine.raw_array,
    ord("]"): lambda m: m.make(list),
    ord("}"): lambda m: m.make(dict),
    ord(")"): lambda m: m.push(()),
    0x8F: lambda m: m.make(set),
    0x85: lambda m: m.make_tuple(m._pop_items(1)),
    0x86: lambda m: m.make_tuple(m._pop_items(2)),
    0x87: lambda m: m.make_tuple(m._pop_items(3)),
    ord("t"): Machine.make_long_tuple,
    0x91: Machine.make_frozenset,
    ord("a"): Machine.append,
    ord("e"): Machine.appends,
    ord("s"): Machine.setitem,
    ord("u"): Machine.setitems,
    0x90: Machine.additems,
    0x94: Machine.memoize,
    ord("q"): lambda m: m.put("<B"),
    ord("r"): lambda m: m.put("<I"),
    ord("h"): lambda m: m.get("<B"),
    ord("j"): lambda m: m.get("<I"),
    0x93: Machine.stack_global,
    ord("c"): Machine.global_,
    ord("R"): Machine.reduce,
    0x81: Machine.newobj,
    ord("b"): Machine.build,
    ord("0"): Machine._pop,
    ord("1"): Machine._pop_to_mark,
}
_OPCODES = [_HANDLERS.get(code) for code in range(256)]
