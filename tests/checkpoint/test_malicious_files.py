"""Files made to do harm: none runs code, hangs or takes much memory; each gets one clear error.

DINAT_FUZZ_SECONDS=600 lets the mutations run longer than their few seconds; DINAT_FUZZ_SEED=N starts at another seed.
"""

import io
import os
import pickle
import random
import resource
import struct
import time
import tracemalloc
import zipfile

import numpy
import pytest
import torch

from dinat_backbones.checkpoint import Inert, read

MARK = "dinat_code_was_run"


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


def text(value):
    """The opcode of a short string."""
    return b"\x8c" + bytes([len(value)]) + value.encode()


MKDIR = text("os") + text("mkdir") + b"\x93"
CALLS = {
    "GLOBAL, REDUCE": b"\x80\x02cos\nmkdir\n" + b"(" + text(MARK) + b"tR.",
    "STACK_GLOBAL, REDUCE": b"\x80\x04" + MKDIR + text(MARK) + b"\x85R.",
    "INST": b"(" + text(MARK) + b"ios\nmkdir\n.",
    "OBJ": b"\x80\x04(" + MKDIR + text(MARK) + b"o.",
    "NEWOBJ": b"\x80\x04" + MKDIR + text(MARK) + b"\x85\x81.",
    "NEWOBJ_EX": b"\x80\x04" + MKDIR + text(MARK) + b"\x85}\x92.",
    "memo": b"\x80\x04" + MKDIR + b"\x940" + text(MARK) + b"\x85\x940" + b"h\x00h\x01R.",
    "getattr": b"\x80\x04" + text("builtins") + text("getattr") + b"\x93" + MKDIR + text("__call__") + b"\x86R.",
    "eval": b"\x80\x04" + text("builtins") + text("eval") + b"\x93" + text("open('a', 'w')") + b"\x85R.",
    "dotted": b"\x80\x04" + text("torch.optim") + text("os.mkdir") + b"\x93" + text(MARK) + b"\x85R.",
    "through numpy": b"\x80\x04" + text("numpy.random") + text("os.mkdir") + b"\x93" + text(MARK) + b"\x85R.",
    "partial": b"\x80\x04" + text("functools") + text("partial") + b"\x93" + MKDIR + text(MARK) + b"\x86R)R.",
    "BUILD of a function": b"\x80\x04" + text("torch._utils") + text("_rebuild_tensor") + b"\x93}" + MKDIR + b"sb.",
    "extension": b"\x80\x02\x82\x01.",
}


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


def samples():
    """Good files of every format."""
    arrays = {"a.weight": numpy.arange(12.0).reshape(3, 4), "b": numpy.float32(1), "c": numpy.ones((2, 2), order="F")}
    state = {"state_dict": {"a.weight": torch.randn(3, 4), "b": torch.arange(5)}, "meta": {"epoch": 3, "best": arrays}}
    files = [pickle.dumps({"model": arrays}, protocol) for protocol in (0, 2, 4, 5)]
    for zipped in (True, False):
        torch.save(state, buffer := io.BytesIO(), _use_new_zipfile_serialization=zipped)
        files.append(buffer.getvalue())
    numpy.savez(buffer := io.BytesIO(), **arrays)
    files.append(buffer.getvalue())
    return files


def safetensors_sample():
    save = pytest.importorskip("safetensors.torch", reason="safetensors is not installed").save
    return save({"a.weight": torch.randn(3, 4), "b": torch.arange(5)}, {"openmmlab_meta": '{"epoch": 3}'})


def mutate(content, rng):
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        place = rng.randrange(len(content))
        change = rng.randrange(6)
        if change == 0:
            content[place] = rng.randrange(256)
        elif change == 1:
            content[place] ^= 1 << rng.randrange(8)
        elif change == 2:
            del content[place : place + rng.choice([1, 4, 64])]
        elif change == 3:
            content[place:place] = rng.choice([*CALLS.values(), b"\xff" * 8, b"\x80\x04", b"(", b"R", b"b", b"s"])
        elif change == 4:
            other = rng.randrange(len(content))
            content[place : place + 16] = content[other : other + 16]
        else:
            content[place : place + 8] = struct.pack("<q", rng.choice([-1, 1 << 20, 1 << 31, 1 << 40, (1 << 63) - 1]))
        if not content:
            return b""
    if content[:2] == b"PK" and rng.random() < 0.7:  # so that more than its checksums is tried
        return with_new_checksums(bytes(content))
    return bytes(content)


def with_new_checksums(content):
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            files = []
            for item in archive.infolist():
                start = item.header_offset + 30 + len(item.filename)
                extra = struct.unpack("<H", content[item.header_offset + 28 : item.header_offset + 30])[0]
                files.append((item.filename, content[start + extra : start + extra + item.compress_size]))
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for name, data in files:
                archive.writestr(name, data)
        return out.getvalue()
    except Exception:
        return content


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_mutated_files(tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    seconds, seed = float(os.environ.get("DINAT_FUZZ_SECONDS", 5)), int(os.environ.get("DINAT_FUZZ_SEED", 0))
    files = samples() if suffix == ".pth" else [safetensors_sample()]
    path, end, outcomes = tmp_path / f"file{suffix}", time.perf_counter() + seconds, {"read": 0, "refused": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while time.perf_counter() < end:
        rng = random.Random(seed)
        path.write_bytes(mutate(rng.choice(files), rng))
        begin = time.perf_counter()
        try:
            found = read(path)
            assert isinstance(found, dict)
            outcomes["read"] += 1
        except ValueError as error:
            assert "\n" not in str(error) and str(path) in str(error), f"seed {seed}: {error}"
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        assert time.perf_counter() - begin < 10, f"seed {seed}"
        assert os.listdir(tmp_path) == [path.name], f"seed {seed}"
        seed += 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 200 << 10, f"{grown} KiB"
    print(f"{sum(outcomes.values())} files {suffix}, next seed {seed}: {outcomes}")
    assert outcomes["refused"] and outcomes["read"]


def test_inert_objects_keep_what_the_file_says(tmp_path):
    torch.save({"a": slice(1, 2)}, tmp_path / "file.pth")
    found = read(tmp_path / "file.pth")["a"]
    assert isinstance(found, Inert) and (found.name, found.arguments) == ("builtins.slice", (1, 2, None))
