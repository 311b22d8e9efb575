"""Good checkpoints of every format, and changes of them."""

import io
import pickle
import random
import struct
import zipfile

import numpy
import torch

MARK = "dinat_code_was_run"  # the folder that CALLS make


def text(value: str) -> bytes:
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

# What is harmless until someone prints, compares or converts it: a list of ten times the list before, 30 deep, and a
# number that is the length of something.
NESTED = b"]q\xc8" + b"".join(b"0](" + bytes([104, 200 + n]) * 10 + bytes([101, 113, 201 + n]) for n in range(30))
NUMBER = b"\x8a\x05" + (1 << 36).to_bytes(5, "little")
PARTS = [NESTED, NUMBER, b"\xff" * 8, b"\x80\x04", b"(", b"R", b"b", b"s", b"\x85", b"\x85R", b"0"]


def samples() -> list[bytes]:
    """Good files of every format."""
    arrays = {"a.weight": numpy.arange(12.0).reshape(3, 4), "b": numpy.float32(1), "c": numpy.ones((2, 2), order="F")}
    state = {
        "state_dict": {"a.weight": torch.linspace(-1, 1, 12).reshape(3, 4), "b": torch.arange(5)},
        "meta": {"epoch": 3, "best": arrays},
    }
    files = [pickle.dumps({"model": arrays}, protocol) for protocol in (0, 2, 4, 5)]
    for zipped in (True, False):
        torch.save(state, buffer := io.BytesIO(), _use_new_zipfile_serialization=zipped)
        files.append(buffer.getvalue())
    numpy.savez(buffer := io.BytesIO(), **arrays)
    files.append(buffer.getvalue())
    return files


def safetensors_sample() -> bytes:
    """The same in the format of safetensors, which has to be installed."""
    from safetensors.torch import save

    return save(
        {"a.weight": torch.linspace(-1, 1, 12).reshape(3, 4), "b": torch.arange(5)}, {"openmmlab_meta": '{"epoch": 3}'}
    )


def mutate(original: bytes, rng: random.Random) -> bytes:
    """One to sixteen random changes."""
    content = bytearray(original)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at = rng.randrange(len(content))
        change = rng.randrange(7)
        if change == 0:
            content[at] = rng.randrange(256)
        elif change == 1:
            content[at] ^= 1 << rng.randrange(8)
        elif change == 2:
            del content[at : at + rng.choice([1, 4, 64])]
        elif change == 3:
            content[at:at] = rng.choice([*CALLS.values(), *PARTS])
        elif change == 4 and len(content) > 2:  # some value for another: in front of an opcode that takes one or two
            ends = [i for i, byte in enumerate(content) if byte in b"tRbQ\x85\x86"]
            at = rng.choice(ends or [at])
            content[at:at] = b"0" * rng.randrange(2) + rng.choice([NESTED, NUMBER])
        elif change == 5:
            source = rng.randrange(len(content))
            content[at : at + 16] = content[source : source + 16]
        else:
            content[at : at + 8] = struct.pack("<q", rng.choice([-1, 1 << 20, 1 << 31, 1 << 40, (1 << 63) - 1]))
        if not content:
            return b""
    if content[:2] == b"PK" and rng.random() < 0.7:  # so that more than its checksums is tried
        return with_new_checksums(bytes(content))
    return bytes(content)


def with_new_checksums(content: bytes) -> bytes:
    """A damaged zip archive packed anew, if its directory still leads to its files."""
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
