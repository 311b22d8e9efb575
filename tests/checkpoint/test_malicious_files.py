"""Files made to do harm: none runs code, hangs or takes much memory; each gets one clear error.

`python tools/fuzz.py files` tries mutations of good files.
"""

import os
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile

import numpy
import pytest
import torch
from fuzzing.mutations import CALLS, MARK, NESTED, NUMBER, text

from dinat_backbones.checkpoint import Inert, read


def refused(path, *words):
    with pytest.raises(ValueError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in (str(path), *words)), message


def write_zip(path, data_pkl, storages=(), compression=zipfile.ZIP_STORED, **more):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("file/data.pkl", data_pkl)
        for key, content in storages:
            archive.writestr(f"file/data/{key}", content)
        for name, content in more.items():
            archive.writestr(f"file/{name}", content)
    return path


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "zip"])
@pytest.mark.parametrize("name", CALLS)
def test_calls(tmp_path, monkeypatch, name, wrapped):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file.pth"
    if wrapped:
        write_zip(path, CALLS[name])
    else:
        path.write_bytes(CALLS[name])
    refused(path)
    assert not (tmp_path / MARK).exists()


@pytest.mark.parametrize("name", ["na\nme", "\x1b[2Jname", "name" * 1000])
def test_names_do_nothing_to_a_terminal(tmp_path, name):
    """What a file asks for is said in a line of printable characters."""
    path = tmp_path / "file.pkl"
    word = b"\x8d" + struct.pack("<Q", len(name)) + name.encode()
    for content in (b"\x80\x04" + text("os") + word + b"\x93.", b"\x80\x04}" + word + text("a") + b"\x93" + b"s."):
        path.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            read(path)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def test_attributes_of_what_is_read_stay_as_they_are(tmp_path):
    """A pickle may set attributes of the objects that it makes, but of no function or class of this process."""
    state = b"}" + text("__defaults__") + b"N" + b"s"
    for module, name in (("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict"), ("torch", "Size")):
        path = write_zip(tmp_path / "file.pth", b"\x80\x04" + text(module) + text(name) + b"\x93N" + state + b"\x86b.")
        refused(path)
    assert torch._utils._rebuild_tensor_v2.__defaults__ is not None


def test_torchscript(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "file.pth")
    refused(tmp_path / "file.pth", "TorchScript archive", "save model.state_dict()")
    with pytest.raises(ValueError, match="TorchScript"):
        read(tmp_path / "file.pth", allow_pickle=True)
    (tmp_path / "old.pth").write_bytes(b"model.json".ljust(257, b"\0") + b"ustar\x0000" + bytes(512))
    refused(tmp_path / "old.pth", "tar archive")


def test_objects_in_arrays(tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (MARK,)

    for protocol in (2, 4, 5):
        torch.save({"a": numpy.array([Code()], dtype=object)}, tmp_path / "file.pth", pickle_protocol=protocol)
        refused(tmp_path / "file.pth", "mkdir")
    numpy.savez(tmp_path / "file.npz", a=numpy.array([Code()], dtype=object))
    refused(tmp_path / "file.npz", "archive of numpy arrays")


def storage(key, count, kind=b"FloatStorage"):
    """The opcodes of a storage."""
    number = b"\x8a\x08" + struct.pack("<q", count)
    name = b"ctorch\n" + kind + b"\n"
    return b"(" + text("storage") + name + text(key) + text("cpu") + number + b"tQ"


def tensor(stored, offset, size, stride):
    def numbers(values):
        return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values) + b"t"

    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + stored + numbers([offset])[1:-1] + numbers(size) + numbers(stride)
    return b"\x80\x02}" + text("a") + call + b"\x89Nt" + b"R" + b"s."


@pytest.mark.parametrize(
    "count, offset, size, stride",
    [
        (1 << 40, 0, [4], [1]),  # a storage far larger than the file
        (5, 0, [5], [1]),  # one element more than there is
        (4, 0, [1 << 40], [1]),
        (4, 2, [3], [1]),
        (4, 0, [2, 2], [3, 1]),
        (4, 0, [4], [-1]),
        (4, -1, [4], [1]),
        (-4, 0, [4], [1]),
        (4, 0, [1 << 62, 1 << 62], [1 << 62, 1]),
    ],
)
def test_forged_sizes_of_tensors(tmp_path, count, offset, size, stride):
    content = tensor(storage("0", count), offset, size, stride)
    refused(write_zip(tmp_path / "file.pth", content, [("0", bytes(16))]))
    good = write_zip(tmp_path / "good.pth", tensor(storage("0", 4), 0, [4], [1]), [("0", bytes(16))])
    assert torch.equal(read(good)["a"], torch.zeros(4))


HUGE = (1 << 36, 1 << 62)
FORGED = {
    **{f"BINBYTES8 {n}": b"\x80\x04\x8e" + struct.pack("<Q", n) + b"." for n in HUGE},
    **{f"BINUNICODE8 {n}": b"\x80\x04\x8d" + struct.pack("<Q", n) + b"." for n in HUGE},
    **{f"BYTEARRAY8 {n}": b"\x80\x05\x96" + struct.pack("<Q", n) + b"." for n in HUGE},
    **{f"FRAME {n}": b"\x80\x04\x95" + struct.pack("<Q", n) + b"." for n in HUGE},
    "LONG4": b"\x80\x02\x8b" + struct.pack("<i", (1 << 31) - 1) + b".",
    "LONG_BINPUT": b"\x80\x02}r" + struct.pack("<I", (1 << 32) - 1) + b"X" + struct.pack("<I", (1 << 32) - 1) + b".",
    "bytearray": b"\x80\x04" + text("builtins") + text("bytearray") + b"\x93J\xff\xff\xff\x7f\x85R.",
    # hashing a tuple of twice the tuple before takes 2 to the power of its depth
    "hash": b"\x80\x02}N\x85" + b"2\x86" * 60 + b"Ns.",
    # a text of a megabyte, encoded ten thousand times
    "copies": b"\x80\x02c_codecs\nencode\nq\x000X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20) + b"q\x010("
    + b"h\x00h\x01\x85R" * 10_000 + b"t.",
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_forged_lengths_and_doublings(tmp_path, name):
    path = tmp_path / "file.pkl"
    path.write_bytes(FORGED[name])
    tracemalloc.start()
    begin = time.perf_counter()
    refused(path)
    assert time.perf_counter() - begin < 30
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * path.stat().st_size + (4 << 20), f"{peak} bytes"


def call(module, name, *arguments):
    return text(module) + text(name) + b"\x93(" + b"".join(arguments) + b"tR"


def pid(*parts):
    return b"(" + b"".join(parts) + b"tQ"


STORAGE = b"ctorch\nFloatStorage\n"
ENDLESS = {
    "bytes of a number": call("builtins", "bytes", NUMBER),
    "encoded number": call("_codecs", "encode", NUMBER),
    "bytearray of a number": call("builtins", "bytearray", NUMBER),
    "array of a number": call("numpy.core.multiarray", "scalar", call("numpy", "dtype", text("f4")), NUMBER),
    "dtype": call("numpy", "dtype", NESTED),
    "array of a nested dtype": call("numpy.core.numeric", "_frombuffer", text("abcd"), NESTED),
    "sizes": call("torch._utils", "_rebuild_tensor_v2", pid(text("storage"), STORAGE, text("0"), text("cpu"), b"K\x04"),
                  b"K\x00", NESTED, NESTED),
    "metadata": call("torch._utils", "_rebuild_tensor_v2", pid(text("storage"), STORAGE, text("0"), text("cpu"),
                     b"K\x04"), b"K\x00", b"K\x04\x85", b"K\x01\x85", b"\x89", b"N", NESTED),
    "kind of a storage": pid(NESTED, STORAGE, text("0"), text("cpu"), b"K\x04"),
    "key of a storage": pid(text("storage"), STORAGE, NESTED, text("cpu"), b"K\x04"),
    "class of a tensor": call("torch._tensor", "_rebuild_from_type_v2", NESTED, NESTED, b")", b"N"),
    "device": call("torch", "device", NESTED),
    "shape": call("torch", "Size", NESTED),
    "counter": call("collections", "Counter", NESTED),
    "set": call("builtins", "set", NESTED),
}  # fmt: skip


READ_ALL = """
import resource, signal, sys
from dinat_backbones.checkpoint import backbone_state, read
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), -1))
for path in sys.argv[1:]:
    signal.alarm(20)
    print(path, flush=True)
    try:
        backbone_state(read(path))
    except ValueError as error:
        assert len(str(error)) < 1000
"""


def test_values_that_must_not_be_walked_through(tmp_path):
    """Printing or comparing a nested list takes forever, and so many bytes do not fit into memory."""
    content = {name: b"\x80\x04}" + text("a") + part + b"s." for name, part in ENDLESS.items()}
    paths = [write_zip(tmp_path / f"{name}.pth", content[name], [("0", bytes(16))]) for name in ENDLESS]
    done = subprocess.run([sys.executable, "-c", READ_ALL, *map(str, paths)], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1]}: status {done.returncode}, {done.stderr[-1000:]}"
    assert len(done.stdout.splitlines()) == len(ENDLESS)


def test_zip_bombs(tmp_path):
    bomb = write_zip(tmp_path / "file.pth", bytes(1 << 24), compression=zipfile.ZIP_DEFLATED)
    refused(bomb, "compressed")
    # a thousand storages that are all the same bytes of the file
    pid = b"".join(text(str(i)) + tensor(storage(str(i), 1 << 14), 0, [1], [1])[6:-2] for i in range(100))
    content = b"\x80\x02}(" + pid + b"u."
    path = write_zip(tmp_path / "overlap.pth", content, [(str(i), bytes(16)) for i in range(100)])
    refused(path)


def test_a_pickle_of_many_references_is_read_in_linear_time(tmp_path):
    """Lists of ten times the list before; ten to the power of 30 elements for whoever walks through them."""
    content = b"\x80\x02}" + text("a") + b"]q\x000"
    for level in range(30):
        content += b"](" + bytes([104, level]) * 10 + bytes([101, 113, level + 1, 48])
    content += bytes([104, 30])
    (tmp_path / "file.pkl").write_bytes(content + b"s.")
    assert len(read(tmp_path / "file.pkl")["a"]) == 10


def test_inert_objects_keep_what_the_file_says(tmp_path):
    torch.save({"a": slice(1, 2)}, tmp_path / "file.pth")
    found = read(tmp_path / "file.pth")["a"]
    assert isinstance(found, Inert) and (found.name, found.arguments) == ("builtins.slice", (1, 2, None))
