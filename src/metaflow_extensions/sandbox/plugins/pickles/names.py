"""What a pickle names, for somebody who is to decide about it. Nothing of it is run."""

from __future__ import annotations

import pickletools
from typing import Any

from .grammar import Refused

_TEXTS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "STRING"}
_TEXTS |= {"BINSTRING", "SHORT_BINSTRING"}
#: Opcodes that refer to something by other means than a name.
_OTHERS = {"EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "NEXT_BUFFER"}
_MARK, _OTHER = object(), object()


def names(data: bytes) -> list[str]:
    """The globals that unpickling would import, `module.name`, in their order.

    Follows the strings on the pickle's stack and in its memo, so that what is named by
    parts, or twice by the same part, is found like anything else.

    Raises:
        Refused: the pickle can't be followed to its end.
    """
    found: dict[str, None] = {}
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for op, arg, _ in pickletools.genops(data):
            _step(op, arg, stack, memo, found)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as e:
        raise Refused(f"the pickle can't be followed to its end ({type(e).__name__})") from None
    return list(found)


def _step(
    op: Any, arg: Any, stack: list[Any], memo: dict[int, Any], found: dict[str, None]
) -> None:
    name = op.name
    if name in ("GLOBAL", "INST"):
        found[str(arg).replace(" ", ".", 1)] = None
    elif name == "STACK_GLOBAL":
        found[f"{stack[-2]}.{stack[-1]}" if _are_text(stack[-2:]) else "?"] = None
    elif name in _OTHERS:
        found[f"({name})"] = None
    if name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif "PUT" in name:
        memo[arg] = stack[-1]
    elif "GET" in name:
        stack.append(memo[arg])
    elif name == "DUP":
        stack.append(stack[-1])
    else:
        before = [kind.name for kind in op.stack_before]
        if "mark" in before or name == "POP_MARK":
            while stack.pop() is not _MARK:
                pass
            before = before[: before.index("mark")] if "mark" in before else []
        elif name == "POP":
            before = ["any"]
        if before:
            del stack[-len(before) :]
        for kind in op.stack_after:
            new = _MARK if kind.name == "mark" else arg if name in _TEXTS else _OTHER
            stack.append(new)


def _are_text(items: list[Any]) -> bool:
    return len(items) == 2 and all(isinstance(i, str) for i in items)
