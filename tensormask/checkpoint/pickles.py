"""Pickles read as data: numbers, texts, plain containers and NumPy's arrays.

A pickle is a program for a small stack machine, which can call whatever it names. Here is that
machine with nothing to call: a name stands for one of a few functions of ours, or the file is
refused. Nothing is imported on a file's behalf, and what is made is never much larger than the
file. The readers of Python and PyTorch promise the first at best: they make the `bytearray` of
100 GB that 40 bytes of a file can ask for.
"""

import codecs
import math
import pickletools
from collections.abc import Callable, Iterable, Mapping
from io import BytesIO
from typing import Any

import numpy as np

from tensormask.utils.errors import UserError

_OPCODES = {opcode.code.encode("latin1"): opcode for opcode in pickletools.opcodes}
# Instructions whose argument is the value itself.
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
}
_MAX_STEPS = 1_000_000  # a checkpoint with its optimiser has some 30,000
_MAX_COPIES = 4  # what functions are given, in sizes of the file
_MAX_NAME = 1000  # characters in a key of a dict
_MAX_DIMS = 64  # NumPy's


class RefusedContent(UserError):
    """A file holds more than plain data, or contradicts itself; the message says what it has."""


def load_pickle(
    file: BytesIO,
    functions: Mapping[tuple[str, str], Any] | None = None,
    load_persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Read the pickle, of any protocol, at the place of `file`, which is behind it afterwards.

    Args:
        functions: what a name in the file stands for beside `NUMPY_FUNCTIONS`, by (module, name).
        load_persistent: gives the object of a persistent id.

    Returns:
        numbers, texts, arrays, and lists, tuples and dicts of them. Texts of Python 2, whose bytes
        they are as well, are read as latin-1.

    Raises:
        RefusedContent: it asks for more than that, or for more memory than a file of its size can
            need.
        Exception: it is broken, in one of many ways.
    """
    machine = _Machine(
        NUMPY_FUNCTIONS | dict(functions or {}), load_persistent, file.getbuffer().nbytes
    )
    for _ in range(_MAX_STEPS):
        opcode = _OPCODES.get(file.read(1))
        if opcode is None:
            raise UserError("it ends early, or is no pickle")
        if opcode.name == "STOP":
            return machine.pop()
        machine.step(opcode.name, _read_argument(opcode, file))
    raise RefusedContent(f"it has more than {_MAX_STEPS:,} instructions, weights need far fewer")


def _read_argument(opcode: pickletools.OpcodeInfo, file: BytesIO) -> Any:
    if opcode.name == "STRING":  # quoted bytes of Python 2; pickletools reads ASCII only
        line = file.readline().strip()
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
            raise UserError("a text without quotes")
        return codecs.escape_decode(line[1:-1])[0].decode("latin1")
    if opcode.name in ("GLOBAL", "INST"):
        return tuple(file.readline().removesuffix(b"\n").decode() for _ in range(2))
    return opcode.arg.reader(file) if opcode.arg else None


class _Unbuilt:
    """An object that a pickle makes first and fills later."""

    def __init__(self, build: Callable[[Any], Any]) -> None:
        self.build = build
        self.value: Any = None


class _Machine:
    def __init__(
        self,
        functions: Mapping[tuple[str, str], Any],
        load_persistent: Callable[[Any], Any] | None,
        file_size: int,
    ) -> None:
        self.functions, self.load_persistent = functions, load_persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []  # lengths of the stack
        self.memo: dict[int, Any] = {}
        self.budget = _MAX_COPIES * file_size

    def step(self, name: str, argument: Any) -> None:
        """Do one instruction, by its name in `pickletools`."""
        push = self.stack.append
        match name:
            case "PROTO" | "FRAME":
                pass
            case _ if name in _LITERALS:
                push(argument)
            case "NONE":
                push(None)
            case "NEWTRUE" | "NEWFALSE":
                push(name == "NEWTRUE")
            case "MARK":
                self.marks.append(len(self.stack))
            case "POP" if self.marks and self.marks[-1] == len(self.stack):
                self.marks.pop()
            case "POP":
                self.pop()
            case "POP_MARK":
                self.pop_to_mark()
            case "EMPTY_TUPLE":
                push(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple([self.pop() for _ in range(int(name[-1]))][::-1]))
            case "TUPLE":
                push(tuple(self.pop_to_mark()))
            case "EMPTY_LIST":
                push([])
            case "LIST":
                push(self.pop_to_mark())
            case "APPEND":
                value = self.pop()
                self.top(list).append(value)
            case "APPENDS":
                values = self.pop_to_mark()
                self.top(list).extend(values)
            case "EMPTY_DICT":
                push({})
            case "DICT":
                push(_with_items({}, self.pop_to_mark()))
            case "SETITEM":
                value, key = self.pop(), self.pop()
                _with_items(self.top(dict), [key, value])
            case "SETITEMS":
                items = self.pop_to_mark()
                _with_items(self.top(dict), items)
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.top(object)
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.top(object)
            case "GET" | "BINGET" | "LONG_BINGET":
                push(self.recall(argument))
            case "GLOBAL" | "INST":  # INST would also call it: here it is named where it is refused
                push(self.find(*argument))
            case "STACK_GLOBAL":
                attribute, module = self.pop(), self.pop()
                push(self.find(module, attribute))
            case "REDUCE":
                arguments, function = self.pop(), self.pop()
                push(self.call(function, arguments))
            case "BUILD":
                state = self.pop()
                self.build(state)
            case "BINPERSID" if self.load_persistent:
                push(self.load_persistent(self.pop()))
            case _:
                raise RefusedContent(f"it has a {name} instruction, which plain data does not need")

    def pop(self) -> Any:
        self.top(object)
        return self.stack.pop()

    def top(self, kind: type) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise UserError("an instruction lacks its operands")
        if not isinstance(self.stack[-1], kind):
            raise UserError(f"{kind.__name__} expected, got {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def pop_to_mark(self) -> list[Any]:
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def recall(self, place: int) -> Any:
        value = self.memo[place]
        built = isinstance(value, _Unbuilt) and value.value is not None
        return value.value if built else value

    def find(self, module: Any, name: Any) -> Any:
        if type(module) is not str or type(name) is not str:
            raise UserError("a name that is no text")
        known = module.replace("numpy.core.", "numpy._core.")  # before NumPy 2
        if (known, name) in self.functions:
            return self.functions[known, name]
        raise RefusedContent(
            f"it asks for {shorten(f'{module}.{name}')}, which is neither an array nor a plain "
            "container, and is not loaded: save the weights alone"
        )

    def call(self, function: Any, arguments: Any) -> Any:
        # Only our functions can be called: all else on the stack is data.
        if not callable(function) or type(arguments) is not tuple:
            raise UserError("a call of what is no function")
        self.spend(arguments)
        return function(*arguments)

    def build(self, state: Any) -> None:
        target = self.top(object)
        if isinstance(target, _Unbuilt):
            self.spend(state)
            self.stack[-1] = target.value = target.build(state)
        elif not isinstance(target, dict):  # of a dict, these are attributes, which ours has not
            raise UserError(f"a state for {type(target).__name__}")

    def spend(self, values: tuple[Any, ...]) -> None:
        """Count what may be copied: one long text of the memo could be copied again and again."""
        sized = (str, bytes, bytearray, list, tuple, dict)
        self.budget -= sum(len(value) if isinstance(value, sized) else 1 for value in values)
        if self.budget < 0:
            raise RefusedContent("it would grow far beyond its size")


def _with_items(target: dict[Any, Any], keys_and_values: list[Any]) -> dict[Any, Any]:
    for key, value in zip(keys_and_values[::2], keys_and_values[1::2], strict=True):
        target[_checked_key(key)] = value
    return target


def _checked_key(key: Any) -> str | int | float:
    """The key, unless it is one that takes long to hash, as nested tuples do."""
    if type(key) in (str, bytes) and len(key) <= _MAX_NAME:
        return key if type(key) is str else key.decode("latin1")
    if type(key) in (bool, int, float) and -(2**63) <= key < 2**63:
        return key
    if type(key) in (str, bytes):
        raise RefusedContent(f"it has a name of {len(key):,} characters")
    raise RefusedContent(f"it has a dict whose keys are {type(key).__name__}, not texts")


def shorten(text: str, length: int = 100) -> str:
    """A text of a file, fit for a line of a message."""
    text = text if len(text) <= length else text[: length - 3] + "..."
    return text if text.isprintable() else ascii(text)


# ---- what NumPy writes ----

_NDARRAY = object()  # the class as an argument; nothing that could be called
_NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


def _make_array(kind: Any, shape: Any, code: Any) -> _Unbuilt:
    # NumPy makes an empty array, and says by BUILD what it is.
    if kind is not _NDARRAY or shape != (0,) or code not in (b"b", "b"):
        raise RefusedContent("it has an array that NumPy has not written")
    return _Unbuilt(_fill_array)


def _fill_array(state: tuple[Any, ...]) -> np.ndarray:
    shape, dtype, is_fortran, data = state[-4:]  # the first of five is a version
    return _array_from(data, dtype, shape, "F" if is_fortran else "C")


def _array_from(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if isinstance(data, str):  # of Python 2
        data = data.encode("latin1")
    if not isinstance(dtype, np.dtype) or not isinstance(data, bytes | bytearray):
        raise RefusedContent("it has an array of objects, not of numbers")
    if math.prod(checked_sizes(shape)) * dtype.itemsize != len(data):
        raise RefusedContent(
            f"it has an array of shape {shorten(str(shape))} and {len(data):,} bytes for it"
        )
    return np.ndarray(shape, dtype, data, order="F" if order == "F" else "C")


def checked_sizes(sizes: Any) -> tuple[int, ...]:
    """Lengths of a few axes, or strides in elements, as a file gives them."""
    if isinstance(sizes, tuple) and len(sizes) <= _MAX_DIMS:
        if all(type(n) is int and 0 <= n < 2**63 for n in sizes):
            return sizes
    raise RefusedContent("it has an array whose shape is none")


def _make_dtype(code: Any, align: Any = False, copy: Any = True) -> _Unbuilt:
    if code not in _NUMBERS:
        kind = shorten(code) if isinstance(code, str) else type(code).__name__
        raise RefusedContent(f"it has an array of dtype {kind}, not of numbers")
    return _Unbuilt(lambda state: np.dtype(code).newbyteorder(state[1]))


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes in the protocols before 3."""
    if encoding != "latin1":
        raise RefusedContent("it has bytes in an encoding other than latin1")
    return text.encode("latin1")


def _make_dict(items: Iterable[Any] | dict[Any, Any] = ()) -> dict[Any, Any]:
    pairs = items.items() if isinstance(items, dict) else items
    return _with_items({}, [part for key, value in pairs for part in (key, value)])


NUMPY_FUNCTIONS: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): lambda: b"",  # in the protocols before 3, for no bytes at all
    ("collections", "OrderedDict"): _make_dict,
    ("collections", "Counter"): _make_dict,
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _make_dtype,
    ("numpy._core.multiarray", "_reconstruct"): _make_array,
    ("numpy._core.multiarray", "scalar"): lambda dtype, data: _array_from(data, dtype, (), "C")[()],
    ("numpy._core.numeric", "_frombuffer"): _array_from,
}
