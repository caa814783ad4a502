"""The pickle inside a PyTorch file, read as tensors only: nothing in it is called or imported.

The instructions are those that ``torch.load(weights_only=True)`` takes. Of the names that a pickle
may ask for, those that rebuild dense tensors are understood; the others that PyTorch takes become
an :class:`Opaque`, which is no tensor; any other name is refused. Time and memory are bounded by
the number of instructions: nothing in a pickle can ask for more than it holds.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

MAX_STEPS = 2_000_000
"""Instructions of one pickle; a tensor takes about sixty."""

_MAX_DEPTH = 1000
_MAX_DIMENSIONS = 64
_MAX_NAME_BYTES = 512
_MAX_NUMBER = 2**63
_MAX_KEY = 2**31


class PickleError(ValueError):
    """A pickle is damaged, or holds more than tensors; says in a few words what was found."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a pickle describes it.

    Attributes:
        dtype: as torch names it, such as ``"bfloat16"``.
        key: the name of its storage's record, after ``data/``.
        storage_bytes: bytes that its storage is said to have.
        offset: where it begins in its storage, in elements.
        shape: its dimensions.
        strides: elements from one index to the next, for each dimension.
        oddity: what it is instead of a dense tensor with values as stored; empty for one.
    """

    dtype: str
    key: str
    storage_bytes: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    oddity: str = ""

    @property
    def is_contiguous(self) -> bool:
        """Whether its values lie one after another, the last dimension first."""
        if 0 in self.shape:
            return True
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


@dataclass(frozen=True, slots=True)
class Opaque:
    """What PyTorch takes and is no tensor: only its name is known."""

    name: str


class Ordered(dict[Any, Any]):
    """An ``OrderedDict`` of a pickle, whose attributes are passed over."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class _Name:
    """A class or function that a pickle asks for, by its full name."""

    path: str


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    key: str
    nbytes: int


STORAGES: dict[str, tuple[str, int]] = {
    "DoubleStorage": ("float64", 8),
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
    "ComplexFloatStorage": ("complex64", 8),
    "ComplexDoubleStorage": ("complex128", 16),
    "QUInt8Storage": ("quint8", 1),
    "QInt8Storage": ("qint8", 1),
    "QInt32Storage": ("qint32", 4),
    "QUInt4x2Storage": ("quint4x2", 1),
    "QUInt2x4Storage": ("quint2x4", 1),
}
"""The dtype of each of torch's typed storages, and its bytes per element."""

_UNTYPED = ("torch.storage.UntypedStorage", "torch.UntypedStorage")
_STORAGE_MODULES = ("torch", "torch.cuda")


def read_pickle(content: bytes) -> Any:
    """Return what a pickle holds: dicts, lists, tuples, numbers, text, and :class:`StoredTensor`.

    Raises:
        PickleError: it is damaged, too long, or holds what PyTorch's ``weights_only`` refuses.
    """
    try:
        return _Machine(content).run()
    except PickleError:
        raise
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise PickleError(f"damaged instructions ({type(error).__name__})") from None


class _Machine:
    """Carries out a pickle's instructions on a stack, within a number of steps."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0
        self._left = MAX_STEPS
        self._memo: dict[int, Any] = {}
        self._below: list[list[Any]] = []
        self._storages: dict[str, _Storage] = {}
        self.stack: list[Any] = []

    def run(self) -> Any:
        """Return what is on the stack when the pickle says stop."""
        content, operations = self._content, _OPERATIONS
        while True:
            code = content[self._at]
            self._at += 1
            self.spend(1)
            if code == _STOP:
                return self._result()
            operation = operations.get(code)
            if operation is None:
                raise PickleError(f"the instruction {bytes([code])!r}, which no tensor needs")
            operation(self)

    def _result(self) -> Any:
        value = self.stack.pop()
        if self.stack or self._below:
            raise PickleError("values that belong to nothing")
        return value

    def spend(self, steps: int) -> None:
        """Count steps; what copies several values counts each of them."""
        self._left -= steps
        if self._left < 0:
            raise PickleError(f"more than {MAX_STEPS} instructions")

    def take(self, length: int) -> bytes:
        """Return the next bytes of the pickle."""
        taken = self._content[self._at : self._at + length]
        if len(taken) < length:
            raise PickleError("the end inside an instruction")
        self._at += length
        return taken

    def number(self, form: str) -> Any:
        """Return the number that comes next."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        """Return the name that comes next, up to the end of its line."""
        end = self._content.index(b"\n", self._at, self._at + _MAX_NAME_BYTES)
        text = self._content[self._at : end].decode()
        self._at = end + 1
        return text

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    def mark(self) -> None:
        """Begin a group of values."""
        if len(self._below) >= _MAX_DEPTH:
            raise PickleError(f"values nested more than {_MAX_DEPTH} deep")
        self._below.append(self.stack)
        self.stack = []

    def group(self) -> list[Any]:
        """End a group, and return its values."""
        items, self.stack = self.stack, self._below.pop()
        return items

    def remember(self, place: int) -> None:
        """Note the topmost value."""
        self._memo[place] = self.stack[-1]

    def recall(self, place: int) -> None:
        """Push a value that was noted."""
        self.stack.append(self._memo[place])

    def top(self, *kinds: type) -> Any:
        """Return the topmost value, which has to be of one of the kinds."""
        if not isinstance(self.stack[-1], kinds):
            raise PickleError(f"an instruction that is not for a {kind_of(self.stack[-1])}")
        return self.stack[-1]

    def fill(self, items: list[Any]) -> None:
        """Put pairs of keys and values into the dict on top."""
        _fill(self.top(dict), zip(items[::2], items[1::2], strict=True))

    def global_name(self) -> None:
        """Push a name, if it is one that PyTorch takes for tensors."""
        path = f"{self.line()}.{self.line()}"
        if path not in _FUNCTIONS and path not in _NAMES and not _is_torch_value(path):
            raise PickleError(f"the Python object {path}")
        self.push(_Name(path))

    def call(self) -> None:
        """Push what a function of :data:`_FUNCTIONS` makes of its arguments."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(arguments, tuple) or not isinstance(function, _Name):
            raise PickleError(f"a call of a {kind_of(function)}")
        self.spend(len(arguments))
        makes = _FUNCTIONS.get(function.path)
        self.push(makes(self, arguments) if makes else Opaque(function.path.rpartition(".")[2]))

    def set_state(self) -> None:
        """Pass over attributes: a state dict's versions of modules, and the like."""
        self.stack.pop()
        self.top(Ordered, Opaque)

    def storage(self) -> None:
        """Push the storage that ``("storage", class, key, location, elements)`` names."""
        what, kind, key, _, count = self.stack.pop()
        if what != "storage" or not isinstance(kind, _Name) or not isinstance(key, str):
            raise PickleError("a reference to something other than a storage")
        if not _is_count(count):
            raise PickleError("a storage without a number of elements")
        module, _, name = kind.path.rpartition(".")
        dtype, size = ("", 1) if kind.path in _UNTYPED else STORAGES.get(name, ("", 0))
        if not size or (dtype and module not in _STORAGE_MODULES):
            raise PickleError(f"a storage of the class {kind.path}")
        self.push(self._same_storage(_Storage(dtype, key, count * size)))

    def _same_storage(self, storage: _Storage) -> _Storage:
        """Return it, unless it was named before as another: PyTorch would go by the first."""
        if self._storages.setdefault(storage.key, storage) != storage:
            raise PickleError("one storage under two dtypes or sizes")
        return storage


def _fill(target: dict[Any, Any], pairs: Iterable[tuple[Any, Any]]) -> None:
    """Put pairs into a dict; only keys that cost nothing to compare."""
    for key, value in pairs:
        if not isinstance(key, str) and not (type(key) is int and -_MAX_KEY <= key < _MAX_KEY):
            raise PickleError(f"a dict with a {kind_of(key)} as a key")
        target[key] = value


def kind_of(value: object) -> str:
    """Return what a value of a pickle is called."""
    names = {Ordered: "dict", StoredTensor: "tensor", _Storage: "storage", _Name: "class"}
    return value.name if isinstance(value, Opaque) else names.get(type(value), type(value).__name__)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _MAX_NUMBER


# ---- what may be called

_Function = Callable[[_Machine, tuple[Any, ...]], Any]


def _ordered(machine: _Machine, arguments: tuple[Any, ...]) -> Ordered:
    """Return an OrderedDict, empty or of a list of pairs."""
    made = Ordered()
    for items in arguments:
        machine.spend(len(items))
        _fill(made, (tuple(item) for item in items))
    return made


def _size(machine: _Machine, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    (sizes,) = arguments
    machine.spend(len(sizes))
    return tuple(sizes)


def _tensor(_: _Machine, arguments: tuple[Any, ...]) -> StoredTensor:
    """``_rebuild_tensor`` and ``_rebuild_tensor_v2``: the dtype is the storage's."""
    storage, offset, size, stride, *more = arguments
    return _checked(storage, None, offset, size, stride, more[2] if len(more) > 2 else None)


def _tensor_with_dtype(_: _Machine, arguments: tuple[Any, ...]) -> StoredTensor:
    """``_rebuild_tensor_v3``: the dtype is given by itself, and the storage has none."""
    storage, offset, size, stride, _, _, dtype, *more = arguments
    return _checked(storage, dtype, offset, size, stride, more[0] if more else None)


def _checked(
    storage: Any, dtype: Any, offset: Any, size: Any, stride: Any, metadata: Any
) -> StoredTensor:
    if not isinstance(metadata, dict | None):
        raise PickleError("a tensor with unknown flags")
    if not isinstance(storage, _Storage) or not isinstance(dtype, _Name | None):
        raise PickleError("a tensor without a storage")
    sound = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride)
    sound = sound and len(size) <= _MAX_DIMENSIONS
    if not sound or not all(map(_is_count, (offset, *size, *stride))):
        raise PickleError("a tensor whose offset, shape and strides do not fit together")
    named = dtype.path.removeprefix("torch.") if dtype else storage.dtype
    flags = metadata.values() if metadata else ()
    oddity = "a lazily conjugated or negated view" if any(f is not False for f in flags) else ""
    return StoredTensor(named, storage.key, storage.nbytes, offset, size, stride, oddity)


def _odd(oddity: str) -> _Function:
    """Return a function that stands for a kind of tensor that is not read, and names the kind."""
    return lambda *_: StoredTensor("", "", 0, 0, (), (), oddity)


def _first(_: _Machine, arguments: tuple[Any, ...]) -> Any:
    """A parameter is its tensor, whatever hooks and attributes it has."""
    if not isinstance(arguments[0], StoredTensor):
        raise PickleError("a parameter without a tensor")
    return arguments[0]


def _typed(machine: _Machine, arguments: tuple[Any, ...]) -> Any:
    """``_rebuild_from_type_v2``: a tensor with attributes; of torch's own two classes only."""
    function, kind, inner, _ = arguments
    if not isinstance(function, _Name) or _FUNCTIONS.get(function.path) is _typed:
        raise PickleError("a tensor that is rebuilt in an unknown way")
    if not isinstance(kind, _Name) or kind.path not in _TENSOR_CLASSES:
        raise PickleError(f"a tensor of another class ({kind_of(kind)})")
    machine.stack += [function, inner]
    machine.call()
    return machine.stack.pop()


_TENSOR_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter")

_FUNCTIONS: dict[str, _Function] = {
    "collections.OrderedDict": _ordered,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_with_dtype,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.nn.parameter.Parameter": _first,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "torch._utils._rebuild_sparse_tensor": _odd("a sparse tensor"),
    "torch._utils._rebuild_qtensor": _odd("a quantized tensor of PyTorch"),
    "torch._utils._rebuild_nested_tensor": _odd("a nested tensor"),
    "torch._utils._rebuild_meta_tensor_no_storage": _odd('a tensor without values (on "meta")'),
    "torch._utils._rebuild_device_tensor_from_numpy": _odd("a tensor of another device"),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _odd("a tensor of another device"),
    "torch._utils._rebuild_wrapper_subclass": _odd("a tensor of another class"),
}
"""What a pickle may call to a purpose."""

_NAMES = frozenset(
    (
        *_UNTYPED,
        "torch.Tensor",
        "torch.device",
        "torch.serialization._get_layout",
        "torch.storage.TypedStorage",
        "collections.Counter",
        "_codecs.encode",
        "builtins.bytearray",
        "builtins.set",
        "builtins.complex",
        "__builtin__.bytearray",
        "__builtin__.set",
        "__builtin__.complex",
    )
)
"""What else PyTorch takes; a call of it makes an :class:`Opaque`."""


def _is_torch_value(path: str) -> bool:
    """Whether a name is that of a storage, a dtype or a scheme of torch: words of no power."""
    module, _, name = path.rpartition(".")
    if name in STORAGES:
        return module in _STORAGE_MODULES
    words = ("float", "bfloat", "int", "uint", "bool", "complex", "qint", "quint", "bits", "per_")
    return module == "torch" and name.startswith(words)


# ---- the instructions, by their codes


def _append(machine: _Machine) -> None:
    item = machine.stack.pop()
    machine.top(list).append(item)


def _append_group(machine: _Machine) -> None:
    items = machine.group()
    machine.top(list).extend(items)


def _set_item(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.fill([key, value])


def _tuple_of(count: int) -> Callable[[_Machine], None]:
    def operation(machine: _Machine) -> None:
        if len(machine.stack) < count:
            raise PickleError("a tuple of more values than there are")
        machine.stack[-count:] = [tuple(machine.stack[-count:])]

    return operation


def _constant(value: object) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(value)


def _number(form: str) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(machine.number(form))


def _text(length: str) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(machine.take(machine.number(length)).decode())


_STOP = ord(".")

_OPERATIONS: dict[int, Callable[[_Machine], None]] = {
    code[0]: operation
    for code, operation in (
        (b"\x80", lambda machine: machine.take(1)),  # which protocol
        (b"c", _Machine.global_name),
        (b"R", _Machine.call),
        (b"\x81", _Machine.call),  # a class made anew, which takes its arguments as a call does
        (b"b", _Machine.set_state),
        (b"Q", _Machine.storage),
        (b"(", _Machine.mark),
        (b"a", _append),
        (b"e", _append_group),
        (b"s", _set_item),
        (b"u", lambda machine: machine.fill(machine.group())),
        (b"t", lambda machine: machine.push(tuple(machine.group()))),
        (b"\x85", _tuple_of(1)),
        (b"\x86", _tuple_of(2)),
        (b"\x87", _tuple_of(3)),
        (b")", _constant(())),
        (b"N", _constant(None)),
        (b"\x88", _constant(True)),
        (b"\x89", _constant(False)),
        (b"]", lambda machine: machine.push([])),
        (b"}", lambda machine: machine.push({})),
        (b"\x8f", _constant(Opaque("set"))),
        (b"J", _number("<i")),
        (b"K", _number("B")),
        (b"M", _number("<H")),
        (b"G", _number(">d")),
        (b"\x8a", lambda m: m.push(int.from_bytes(m.take(m.number("B")), "little", signed=True))),
        (b"X", _text("<I")),
        (b"U", _text("B")),
        (b"h", lambda machine: machine.recall(machine.number("B"))),
        (b"j", lambda machine: machine.recall(machine.number("<I"))),
        (b"q", lambda machine: machine.remember(machine.number("B"))),
        (b"r", lambda machine: machine.remember(machine.number("<I"))),
    )
}
