"""What the pickles of checkpoints may make: tensors, numbers, plain containers, and `Inert` objects for all else."""

import re
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy
import torch
from torch import Tensor


class Inert:
    """Stands for an object that is neither a tensor nor a plain container; nothing of it was imported or run.

    Attributes:
        name: the full name of its class or of the function that makes it.
        arguments: what it is made from; empty for the class or function itself.
        state: its attributes, as the file has them.
        items: the content of a container, pairs for a dictionary.
    """

    def __init__(self, name: str, arguments: tuple[Any, ...] = ()) -> None:
        self.name, self.arguments = name, arguments
        self.state: Any = None
        self.items: list[Any] = []

    def __call__(self, *args: Any) -> Any:
        return Inert(self.name, args)

    @property
    def is_numeric(self) -> bool:
        """Whether it is a numpy array of numbers, in a type that torch does not have."""
        dtypes = [argument for argument in self.arguments[1:2] if isinstance(argument, Dtype)]
        return self.name == "numpy.ndarray" and any(dtype.name[:1] in "biufc" for dtype in dtypes)

    def __repr__(self) -> str:
        return f"Inert({self.name!r})"


class Known(Inert):
    """A name whose call is answered by a function of this module."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        super().__init__(name)
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


# ---- tensors


def _tensor(flat: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any) -> Tensor:
    """A view of a storage, which is a flat tensor here; `rest` are requires_grad, hooks, metadata."""
    if len(rest) > 2 and rest[2]:
        raise ValueError("a tensor with metadata")
    # before comparing and printing them: values of a file may be lists of lists that no one gets to the end of
    if not all(isinstance(number, int) and number.bit_length() <= 64 for number in (*size, *stride, offset)):
        raise ValueError("a tensor whose sizes are no numbers")
    if min((*size, *stride, offset), default=0) < 0 or len(size) != len(stride):
        raise ValueError(f"a tensor of size {size} with stride {stride} at {offset}")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if 0 not in size and last >= len(flat):
        raise ValueError(f"a tensor of size {size} with stride {stride} at {offset} in a storage of {len(flat)}")
    return torch.as_strided(flat, size, stride, offset) if 0 not in size else flat.new_empty(size)


def _tensor_of_dtype(
    flat: Tensor,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    grad: bool,
    hooks: Any,
    dtype: Any,
    *rest: Any,
) -> Tensor:
    """As `_tensor`, of an untyped storage."""
    return _tensor(flat.view(dtype), offset, size, stride, grad, hooks, *rest)


def _tensor_with_state(function: Callable[..., Any], kind: Any, arguments: tuple[Any, ...], state: Any) -> Any:
    """A parameter or buffer with attributes of its own, which are dropped."""
    names = [item.name for item in (function, kind) if isinstance(item, Inert)]
    if len(names) < 2 or not names[0].startswith("torch._utils._rebuild_") or not names[1].startswith("torch."):
        raise ValueError(f"a tensor made by {' and '.join(names)}")
    return function(*arguments)


# ---- numpy


class Dtype:
    """What a pickle says of an array's elements: numpy's name of the type, such as "f4", and the order of bytes."""

    def __init__(self, name: Any, *args: Any) -> None:
        if not isinstance(name, str):
            raise ValueError(f"a dtype named by a {type(name).__name__}")
        self.name, self.order = name, "="

    def __str__(self) -> str:
        return self.name

    def numpy(self) -> numpy.dtype[Any] | None:
        """None if an element is more than a number or text."""
        known = re.fullmatch(r"[biufcSU]\d{1,9}", self.name) is not None
        return numpy.dtype(self.name).newbyteorder(self.order if self.order in "<>" else "=") if known else None  # type: ignore[arg-type]


class UnfinishedArray:
    """An array whose content comes in the pickle's next step."""

    def __init__(self, *args: Any) -> None: ...


def array_from_bytes(content: Any, dtype: Any, shape: tuple[int, ...] = (), order: Any = "C") -> Any:
    """The tensor of an array's bytes; `Inert` if torch has no such elements (text, dates, objects)."""
    found = dtype.numpy() if isinstance(dtype, Dtype) else None
    if found is None or isinstance(content, list):
        return Inert("numpy.ndarray", (content, dtype, shape))
    array = numpy.frombuffer(_as_bytes(content), found).reshape(shape, order="F" if order in ("F", True) else "C")
    try:
        return torch.from_numpy(array.astype(found.newbyteorder("="), order="K", copy=True))
    except TypeError:
        return Inert("numpy.ndarray", (content, dtype, shape))


def _scalar(dtype: Any, content: Any = b"") -> Any:
    """A tensor without dimensions, or text."""
    found = dtype.numpy() if isinstance(dtype, Dtype) else None
    if found is not None and found.kind in "SU":
        return numpy.frombuffer(_as_bytes(content), found)[0].item() if found.itemsize else found.type().item()
    return array_from_bytes(content, dtype)


def _as_bytes(content: Any) -> bytes:
    if not isinstance(content, (str, bytes, bytearray)):
        raise ValueError(f"bytes of a {type(content).__name__}")  # bytes(n) would be n zeros
    return content.encode("latin1") if isinstance(content, str) else bytes(content)  # a str in files of Python 2


# ---- plain containers


def check_keys(keys: Iterable[Any]) -> None:
    """Dictionary keys and elements of sets: hashing a tuple of tuples may take forever."""
    for key in keys:
        parts = key if isinstance(key, tuple) and len(key) <= 16 else (key,)
        for part in parts:
            small = isinstance(part, int) and part.bit_length() <= 64
            if not small and not isinstance(part, (str, bytes, float, Inert, torch.dtype, type(None))):
                raise ValueError(f"a {type(part).__name__} as key of a dictionary or element of a set")


def _make(container: type) -> Callable[..., Any]:
    def make(items: Any = (), *rest: Any) -> Any:
        if not isinstance(items, (list, tuple, dict, set, frozenset)):
            raise ValueError(f"a {container.__name__} of a {type(items).__name__}")
        if container is not deque:
            check_keys(key for key in items if not isinstance(key, list))
        return container(items, *rest)

    return make


def _defaultdict(factory: Any = None, *items: Any) -> dict[Any, Any]:
    return {}


def _bytearray(content: Any = b"", *encoding: Any) -> bytearray:
    return bytearray(_as_bytes(b"" if isinstance(content, int) else content))


def _new_object(kind: Any, *args: Any) -> Any:
    if not isinstance(kind, Inert):
        raise ValueError(f"an object of {type(kind).__name__}")
    return kind(*args)


REBUILD: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": lambda tensor, *rest: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *rest: tensor,
    "torch._tensor._rebuild_from_type_v2": _tensor_with_state,
    "torch.Size": lambda size=(): torch.Size(size),
    "torch.device": lambda *name: torch.device(*name),
    "numpy.dtype": Dtype,
    **{f"numpy.{core}.multiarray._reconstruct": UnfinishedArray for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": array_from_bytes for core in ("core", "_core")},
    "collections.OrderedDict": _make(OrderedDict),
    "collections.Counter": _make(Counter),
    "collections.deque": _make(deque),
    "collections.defaultdict": _defaultdict,
    **{
        name: _make(dict)
        for name in ("mmengine.config.config.ConfigDict", "addict.addict.Dict", "addict.Dict", "yacs.config.CfgNode")
    },
    "builtins.set": _make(set),
    "builtins.frozenset": _make(frozenset),
    "builtins.complex": lambda real=0.0, imaginary=0.0: complex(real, imaginary),
    "builtins.bytearray": _bytearray,
    "builtins.bytes": lambda content=b"", *encoding: _as_bytes(content),  # of protocol 2
    "_codecs.encode": lambda content, *encoding: _as_bytes(content),  # the same, not empty
    "copyreg.__newobj__": _new_object,
    "copyreg.__newobj_ex__": lambda kind, args, keywords: _new_object(kind, *args),
    "copyreg._reconstructor": lambda kind, base, state: _new_object(kind),
}
DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
    "_UntypedStorage": torch.uint8,
}
