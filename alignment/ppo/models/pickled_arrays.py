"""Reads the arrays of a pickle without running it, for PaddleNLP's LoRA adapters exist in no other form.

A pickle is a program for a stack machine that may call anything. Its instructions are listed by ``pickletools``, which
executes none, and followed here as far as a dictionary of NumPy arrays needs them. What they name is compared with
what such a file has to name, and never imported or called.
"""

from __future__ import annotations

import pickletools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

DTYPES = ("f2", "f4", "f8", "u2")  # u2: Paddle's way to store bfloat16
_VALUES = frozenset(
    "BININT BININT1 BININT2 LONG1 BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8".split()
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = ("PROTO", "FRAME", "STOP")
_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")


class _Name(NamedTuple):
    """What a pickle calls: told apart, never looked up."""

    module: str
    name: str


class _Array:
    """An array that is yet to be filled; `value` once it is."""

    value: np.ndarray


class _DType(NamedTuple):
    name: str


def read_pickled_arrays(path: Path) -> dict[str, np.ndarray]:
    """{name: array} of a pickled dictionary; its entries that are no arrays are left out.

    Raises: ValueError for a pickle of anything else, or one that calls what no array needs.
    """
    with path.open("rb") as file:
        try:
            content = _Machine().run(pickletools.genops(file))
        except (IndexError, KeyError, TypeError, AttributeError, MemoryError) as error:  # a false length of a text too
            raise ValueError(f"it is damaged ({error!r})") from None
    if not isinstance(content, dict):
        raise ValueError("it holds no dictionary")
    return {name: entry.value for name, entry in content.items() if isinstance(entry, _Array)}


class _Machine:
    """The stack, its marks and the memory of things made before."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memory: list[Any] = []

    def run(self, operations: Any) -> Any:
        """What the instructions build."""
        for operation, argument, _ in operations:
            name = operation.name
            if name in _VALUES:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _TUPLES:
                self.stack.append(tuple(self._pop(_TUPLES[name])))
            elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):  # numbered as they come, in every protocol
                self.memory.append(self.stack[-1])
            elif name in ("BINGET", "LONG_BINGET"):
                self.stack.append(self.memory[argument])
            elif name not in _IGNORED:
                self._build(name, argument)
        return self.stack.pop()

    def _build(self, name: str, argument: Any) -> None:
        if name == "EMPTY_DICT":
            self.stack.append({})
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name == "TUPLE":
            self.stack.append(tuple(self._pop_mark()))
        elif name in ("SETITEM", "SETITEMS"):
            items = self._pop(2) if name == "SETITEM" else self._pop_mark()
            self.stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name == "GLOBAL":
            self.stack.append(_Name(*argument.split(" ")))
        elif name == "STACK_GLOBAL":
            self.stack.append(_Name(*self._pop(2)))
        elif name == "REDUCE":
            self.stack.append(_call(*self._pop(2)))
        elif name == "BUILD":
            _fill(self.stack[-2], self.stack.pop())
        else:
            raise ValueError(f"it uses {name}")

    def _pop(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise IndexError("too short a stack")
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def _pop_mark(self) -> list[Any]:
        return self._pop(len(self.stack) - self.marks.pop())


def _call(name: _Name, arguments: tuple) -> Any:
    """The four things that a dictionary of arrays calls."""
    if name.name == "_reconstruct" and name.module in _MODULES:
        return _Array()
    if name == ("numpy", "dtype"):
        return _DType(arguments[0])
    if name == ("_codecs", "encode") and arguments[1] == "latin1":
        return arguments[0].encode("latin1")
    if name == ("collections", "OrderedDict") and not arguments:
        return {}
    raise ValueError(f"it calls {name.module}.{name.name}")


def _fill(thing: Any, state: tuple) -> None:
    if isinstance(thing, _DType):
        if state[1] not in ("<", "|", "="):
            raise ValueError(f"its numbers have byte order {state[1]!r}")
        return
    _, shape, dtype, is_fortran, content = state
    if not isinstance(thing, _Array) or dtype.name not in DTYPES or not isinstance(content, bytes):
        raise ValueError(f"it holds what is no array of {', '.join(DTYPES)}")
    thing.value = np.frombuffer(content, dtype.name).reshape(shape, order="F" if is_fortran else "C")
