"""Pickles are read without importing or calling anything that they name.

A pickle is a program that may call any function. Here its calls reach only the functions of `REBUILD`, which make
tensors, numbers and plain containers; objects of the training libraries in `_LIBRARIES` become `Inert`; everything else
is refused. torch's own `weights_only` reader refuses what training programs save (numpy scalars, `Counter`, mmengine's
`HistoryBuffer`), and checks neither sizes nor bounds.
"""

import itertools
import pickle
import struct
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

from .objects import DTYPES, REBUILD, STORAGES, Dtype, Inert, Known, UnfinishedArray, array_from_bytes, check_keys

# Objects of these modules are bookkeeping of training runs: never imported, never called, kept as `Inert`.
_LIBRARIES = (
    *("mmengine", "mmcv", "mmdet", "mmseg", "mmpretrain", "mmcls", "detectron2", "fvcore", "iopath", "mask2former"),
    *("timm", "transformers", "accelerate", "yacs", "addict", "omegaconf", "ml_collections", "easydict"),
    *("torch.optim", "torch.amp", "torch.cuda.amp", "torch.distributions", "torch._C.Generator", "torch.Generator"),
    *("numpy.random", "argparse", "collections", "datetime", "decimal", "enum", "fractions", "functools", "operator"),
    *("pathlib", "types.SimpleNamespace", "uuid", "zoneinfo", "random.Random"),
)
# And these: names of types, and `getattr`, by which mmengine saves methods (`getattr(HistoryBuffer, "mean")`).
_NAMES = {
    *(f"builtins.{name}" for name in ("getattr", "object", "type", "slice", "range", "int", "float", "bool", "str")),
    *(f"builtins.{name}" for name in ("list", "dict", "tuple", "bytes", "print", "min", "max", "sum", "abs")),
    *(f"numpy.{name}" for name in ("ndarray", "generic", "bool_", "bool", "str_", "float16", "float32", "float64")),
    *(f"numpy.{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    *(
        f"torch.{name}"
        for name in ("memory_format", "layout", "Tensor", "nn.parameter.Parameter", "nn.parameter.Buffer")
    ),
    "torch.serialization._get_layout",
}


class RefusedName(Exception):
    """A pickle asks for something that is not on the lists of this module; the message is its name."""


class _Bounded:
    """A file whose `read` never asks for more than there is: a forged length would be allocated at once."""

    def __init__(self, file: BinaryIO) -> None:
        start = file.tell()
        self.file, self.size = file, file.seek(0, 2)
        file.seek(start)
        self.readline = file.readline

    def read(self, count: int) -> bytes:
        if count > 1 and count > self.size - self.file.tell():
            raise EOFError(f"{count} bytes more were expected")
        return self.file.read(count)


class SafeUnpickler(pickle._Unpickler):
    """Python's own unpickler in Python, so that every call, assignment and allocation passes the checks of this module.

    Args:
        file: a binary file at the beginning of a pickle; afterwards at its end.
        load_storage: answers persistent ids, as torch.save writes them for storages: type, key, location, ...
        load_bytes: answers `torch.storage._load_from_bytes`.

    Raises (by `load`):
        RefusedName: see there.
        Exception: nearly any other, for damaged and for malicious files.
    """

    if TYPE_CHECKING:  # of the base class, undocumented
        stack: list[Any]
        memo: dict[int, Any]
        append: Callable[[Any], None]
        read: Callable[[int], bytes]
        readline: Callable[[], bytes]

        def pop_mark(self) -> list[Any]: ...

    def __init__(
        self,
        file: BinaryIO,
        load_storage: Callable[[Any], Any] | None = None,
        load_bytes: Callable[[bytes], Any] | None = None,
    ) -> None:
        bounded = _Bounded(file)
        super().__init__(bounded, encoding="latin1", fix_imports=False)
        self._load_storage = load_storage
        self._load_bytes = load_bytes
        # What calls may copy altogether: a pickle of n bytes can name the same n bytes n times.
        self._budget = 16 * bounded.size + (1 << 16)

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        full = f"{module}.{name}"
        if full == "torch.storage._load_from_bytes" and self._load_bytes:
            return Known(full, self._load_bytes)
        if full in REBUILD:
            return Known(full, REBUILD[full])
        if full in DTYPES:
            return DTYPES[full]
        if module in ("torch", "torch.cuda", "torch.storage") and name in STORAGES:
            return Inert(f"torch.{name}")
        if full in _NAMES or any(full == library or full.startswith(f"{library}.") for library in _LIBRARIES):
            return Inert(full)
        raise RefusedName(full)

    def persistent_load(self, pid: Any) -> Any:
        if self._load_storage is None:
            raise pickle.UnpicklingError("a storage in a pickle that has none")
        return self._load_storage(pid)

    def _call(self, function: Any, args: Any) -> None:
        if not isinstance(function, Inert) or not isinstance(args, (tuple, list)):
            raise pickle.UnpicklingError(f"a call of a {type(function).__name__}")
        sized = (arg for arg in args if isinstance(arg, (str, bytes, bytearray, list, tuple, dict, set, frozenset)))
        self._budget -= sum(len(arg) * (1 if isinstance(arg, (str, bytes, bytearray)) else 8) for arg in sized)
        if self._budget < 0:
            raise pickle.UnpicklingError("calls that copy far more than the file holds")
        self.append(function(*args))

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self._call(self.stack.pop(), args)

    def load_newobj_ex(self) -> None:
        self.stack.pop()  # keyword arguments
        self.load_reduce()

    def load_obj(self) -> None:
        function, *args = self.pop_mark()
        self._call(function, args)

    def load_inst(self) -> None:
        module, name = (self.readline()[:-1].decode("ascii") for _ in range(2))
        self._call(self.find_class(module, name), self.pop_mark())

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, UnfinishedArray):
            _, shape, dtype, fortran, content = state
            self._call(Known("numpy.ndarray", array_from_bytes), (content, dtype, shape, fortran))
            array = self.stack.pop()
            self.stack[-1] = array
            for index, value in itertools.islice(reversed(self.memo.items()), 64):
                if value is target:
                    self.memo[index] = array
        elif isinstance(target, Dtype):
            target.order = state[1] if isinstance(state[1], str) else "="
        elif isinstance(target, OrderedDict):
            if isinstance(state, dict) and "_metadata" in state:  # versions of the modules of a state dict
                target._metadata = state["_metadata"]  # type: ignore[attr-defined]
        elif type(target) is Inert:
            target.state = state
        elif not isinstance(target, (dict, deque, set)):  # whose attributes are dropped
            raise pickle.UnpicklingError(f"attributes of a {type(target).__name__}")

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        pairs = list(zip(items[::2], items[1::2], strict=True))
        if type(target) is Inert:
            target.items.extend(pairs)
        elif isinstance(target, dict):
            check_keys(items[::2])
            for key, value in pairs:
                target[key] = value
        else:
            raise pickle.UnpicklingError(f"items of a {type(target).__name__}")

    def load_setitem(self) -> None:
        value = self.stack.pop()
        self._set_items([self.stack.pop(), value])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, set):
            check_keys(items)
            target.update(items)
        elif isinstance(target, (list, deque)):
            target.extend(items)
        elif type(target) is Inert:
            target.items.extend(items)
        else:
            raise pickle.UnpicklingError(f"elements of a {type(target).__name__}")

    def load_append(self) -> None:
        self._extend([self.stack.pop()])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        check_keys(items)
        self.append(frozenset(items))

    def load_bytearray8(self) -> None:
        (count,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(count)))

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch) | {
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_reduce,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.OBJ[0]: load_obj,
        pickle.INST[0]: load_inst,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends,
        pickle.ADDITEMS[0]: load_appends,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }
    for _extension in (pickle.EXT1, pickle.EXT2, pickle.EXT4):  # names in a registry of this process
        del dispatch[_extension[0]]
