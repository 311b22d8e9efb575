"""The two formats of `torch.save`, and plain pickles, read by `SafeUnpickler`; torch.load never sees the file.

torch.load hands a TorchScript archive to `torch.jit.load`, before torch 2.6 even with ``weights_only=True``
(CVE-2025-32434), and believes the sizes that a file states.
"""

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .objects import STORAGES, Inert
from .unpickling import SafeUnpickler

_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of torch.save before torch 1.6


class WrongFormat(ValueError):
    """The file is whole but something else than a checkpoint; the message ends the sentence "... is"."""


def read_pickle(file: BinaryIO) -> Any:
    """What `torch.save` (any version since 0.4) or `pickle.dump` put into a file, with numpy's arrays as tensors.

    Args:
        file: opened for reading in binary mode, at its beginning.

    Raises:
        WrongFormat: a TorchScript, numpy or other archive.
        RefusedName: see there.
        Exception: nearly any other for a damaged file.
    """
    if zipfile.is_zipfile(file):
        return _read_zip(file)
    file.seek(257)
    if file.read(5) == b"ustar":
        raise WrongFormat("a tar archive, which torch.save wrote before 2017 and TorchScript before 2018")
    file.seek(0)
    content = SafeUnpickler(file, load_bytes=_read_bytes).load()
    return _read_legacy(file) if content == _MAGIC else content


def _read_bytes(content: bytes) -> Any:
    """A storage in a plain pickle, which is a file of torch.save itself."""
    return read_pickle(io.BytesIO(content))


class _Storages:
    """Flat tensors by key; those of a file cannot have more bytes than the file.

    Args:
        size: of the file in bytes.
        load: from key and number of bytes to a flat tensor of bytes.
    """

    def __init__(self, size: int, load: Callable[[str, int], Tensor]) -> None:
        self.left, self.load, self.by_key = size, load, dict[str, Tensor]()

    def __call__(self, pid: Any) -> Tensor:
        """The answer to a persistent id: "storage", type, key, device, number of elements and, in old files, a view."""
        kind, storage, key, _, count, *view = pid
        known = kind == "storage" and isinstance(storage, Inert) and isinstance(key, (str, int))
        if not known or not isinstance(count, int) or any(item is not None for item in view):
            raise ValueError("a persistent id that is no storage's")
        dtype = STORAGES[storage.name.removeprefix("torch.")]
        key, size = str(key), count * dtype.itemsize
        if key not in self.by_key:
            self.left -= size
            if size < 0 or self.left < 0:
                raise EOFError(f"storage {key} should have {size} bytes, which are not there")
            self.by_key[key] = self.load(key, size)
        if len(self.by_key[key]) != size:
            raise ValueError(f"storage {key} has {len(self.by_key[key])} bytes and should have {size}")
        return self.by_key[key].view(dtype)


class _Records:
    """The files of an uncompressed zip archive, read in one go; another thread compares them with their CRC-32.

    Args:
        file: what `archive` reads from.
        checks: one thread.
    """

    def __init__(self, file: BinaryIO, archive: zipfile.ZipFile, checks: Executor) -> None:
        self.file, self.archive, self.checks = file, archive, checks
        self.size = file.seek(0, 2)
        self.sums: list[tuple[zipfile.ZipInfo, Future[int]]] = []

    def read(self, name: str) -> Tensor:
        """A flat tensor of bytes."""
        item = self.archive.getinfo(name)
        if item.compress_type != zipfile.ZIP_STORED or item.compress_size != item.file_size:
            raise WrongFormat("a compressed zip archive, which torch.save does not write")
        self.archive.open(item).close()  # raises if the local header is another file's, or an encrypted one
        self.file.seek(item.header_offset + 26)
        self.file.seek(sum(struct.unpack("<HH", self.file.read(4))), 1)  # name and extra field
        if item.file_size > self.size:
            raise EOFError(f"{name} should have {item.file_size} bytes, which are not there")
        flat = torch.empty(item.file_size, dtype=torch.uint8)
        content = flat.numpy()
        if self.file.readinto(content) != item.file_size:  # type: ignore[attr-defined]
            raise EOFError(f"{name} ends early")
        if item.CRC:  # 0 in files that torch wrote after set_crc32_options(False)
            self.sums.append((item, self.checks.submit(zlib.crc32, content)))  # type: ignore[arg-type]
        return flat

    def check(self) -> None:
        for item, found in self.sums:
            if found.result() != item.CRC:
                raise ValueError(f"{item.filename} has another CRC-32 than was written")


def _read_zip(file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as archive, ThreadPoolExecutor(1) as checks:
        names = archive.namelist()
        if any(re.fullmatch(r"(.*/)?(constants\.pkl|code/.*)", name) for name in names):
            raise WrongFormat(
                "a TorchScript archive, which is a program, not a state dict; save model.state_dict() of it"
            )
        if any(name.endswith(".npy") for name in names):
            raise WrongFormat("an archive of numpy arrays (.npz)")
        pickles = [name for name in names if re.fullmatch(r"([^/]*/)?data\.pkl", name)]
        if len(pickles) != 1:
            raise WrongFormat("a zip archive that torch.save did not write")
        folder = pickles[0].removesuffix("data.pkl")
        records = _Records(file, archive, checks)
        if folder + "byteorder" in names and bytes(records.read(folder + "byteorder").numpy()) == b"big":
            raise WrongFormat("a checkpoint of a big-endian machine")

        def load(key: str, count: int) -> Tensor:
            name = f"{folder}data/{key}"
            if archive.getinfo(name).file_size != count:
                raise ValueError(f"storage {key} has {archive.getinfo(name).file_size} bytes and should have {count}")
            return records.read(name)

        program = bytes(records.read(pickles[0]).numpy())
        records.check()  # before anything is made of it
        content = SafeUnpickler(io.BytesIO(program), _Storages(records.size, load)).load()
        records.check()
        return content


def _read_legacy(file: BinaryIO) -> Any:
    """After the magic number: protocol, machine, content, the keys of its storages, and these in that order."""
    start, size = file.tell(), file.seek(0, 2)
    file.seek(start)
    protocol, machine = (SafeUnpickler(file).load() for _ in range(2))
    if protocol != 1001 or not machine.get("little_endian", True):
        raise WrongFormat("a checkpoint of a big-endian machine, or of another protocol than torch's 1001")
    storages = _Storages(size, lambda key, count: torch.empty(count, dtype=torch.uint8))
    content = SafeUnpickler(file, storages).load()
    for key in SafeUnpickler(file).load():
        flat = storages.by_key[str(key)]
        (count,) = struct.unpack("<q", file.read(8))
        if count and len(flat) % count:
            raise ValueError(f"storage {key} has {len(flat)} bytes and should have {count} elements")
        if file.readinto(flat.numpy()) != len(flat):  # type: ignore[attr-defined]
            raise EOFError(f"storage {key} ends early")
    return content
