"""Files that `pickle.dump` wrote, as detectron2's are: arrays and tensors are read, code is not run."""

import os
import pickle
from collections import OrderedDict

import numpy
import pytest
import torch
from torch import nn

from dinat_backbones.checkpoint import Inert, read
from dinat_backbones.checkpoint.loading import tensors

ARRAYS = {
    "floats": numpy.arange(6, dtype=numpy.float32).reshape(2, 3),
    "fortran": numpy.asfortranarray(numpy.arange(6, dtype=numpy.float64).reshape(2, 3)),
    "half": numpy.ones((2,), dtype=numpy.float16),
    "strided": numpy.arange(8, dtype=numpy.int64)[::2],
    "scalar": numpy.float32(2.5),
    "no dimension": numpy.array(7, dtype=numpy.int64),
    "empty": numpy.zeros((0, 3), dtype=numpy.float32),
    "flags": numpy.array([True, False]),
    "bytes": numpy.arange(3, dtype=numpy.uint8),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_arrays_are_read_as_tensors(tmp_path, protocol):
    content = {"model": ARRAYS, "__author__": "third_party", "matching_heuristics": True}
    (tmp_path / "file.pkl").write_bytes(pickle.dumps(content, protocol))
    for allow_pickle in (False, True):
        found = read(tmp_path / "file.pkl", allow_pickle=allow_pickle)
        assert (found["__author__"], found["matching_heuristics"]) == ("third_party", True)
        for name, array in ARRAYS.items():
            tensor = found["model"][name]
            assert isinstance(tensor, torch.Tensor) and tensor.numpy().dtype == array.dtype, name
            assert tensor.shape == array.shape and numpy.array_equal(tensor.numpy(), array), name


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickles_of_tensors_are_read(tmp_path, protocol):
    """As scripts that turn ImageNet files into detectron2's write them."""
    base = torch.arange(12.0).reshape(3, 4)
    tensors = OrderedDict(whole=base, part=base[1:, ::2], half=base.bfloat16(), parameter=nn.Parameter(base))
    (tmp_path / "file.pkl").write_bytes(pickle.dumps({"model": tensors, "__author__": "a"}, protocol))
    found = read(tmp_path / "file.pkl")["model"]
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [2, 5])
def test_code_in_a_plain_pickle_does_not_run(tmp_path, protocol):
    folder = tmp_path / "made by the pickle"
    content = {"model": {"a": numpy.ones(3)}, "objects": numpy.array([Code(folder)], dtype=object)}
    (tmp_path / "file.pkl").write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(ValueError, match=r"mkdir.*allow_pickle=True"):
        read(tmp_path / "file.pkl")
    assert not folder.exists()
    nested = {"model": {"a": torch.ones(3)}}
    torch.save({"a": Code(folder)}, tmp_path / "inner.pth", _use_new_zipfile_serialization=False)
    nested["model"]["b"] = Storage((tmp_path / "inner.pth").read_bytes())
    (tmp_path / "nested.pkl").write_bytes(pickle.dumps(nested, protocol))
    with pytest.raises(ValueError):
        read(tmp_path / "nested.pkl")
    assert not folder.exists()


class Storage:
    """Whose pickle has another one inside, as a tensor's has."""

    def __init__(self, content):
        self.content = content

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.content,)


def test_what_no_tensor_can_hold_is_inert_and_damage_is_said(tmp_path):
    content = {"names": numpy.array(["a", "b"]), "big": numpy.arange(3, dtype=">f4"), "model": {"a": numpy.ones(2)}}
    (tmp_path / "file.pkl").write_bytes(whole := pickle.dumps(content, 4))
    found = read(tmp_path / "file.pkl")
    assert isinstance(found["names"], Inert) and found["names"].name == "numpy.ndarray"
    assert torch.equal(found["big"], torch.arange(3.0))  # of the other order of bytes
    assert torch.equal(found["model"]["a"], torch.ones(2, dtype=torch.float64))
    for damaged in (whole[:-20], whole[: len(whole) // 2], b"no pickle at all"):
        (tmp_path / "file.pkl").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"file\.pkl .*truncated"):
            read(tmp_path / "file.pkl")


@pytest.mark.parametrize("name", ["uint16", "uint32", "uint64", "complex64", ">i4", "float16"])
def test_every_type_of_number_is_read(tmp_path, name):
    array = numpy.arange(5).astype(name)
    (tmp_path / "file.pkl").write_bytes(pickle.dumps({"model": {"a": array}}))
    torch.save({"model": {"a": array}}, tmp_path / "file.pth")
    for file in ("file.pkl", "file.pth"):
        found = tensors(read(tmp_path / file))["a"]
        assert found.dtype == getattr(torch, array.dtype.newbyteorder("=").name)
        assert (found.numpy() == array).all()


def test_numbers_that_torch_does_not_know_are_refused(tmp_path):
    (tmp_path / "file.pkl").write_bytes(pickle.dumps({"model": {"a": numpy.ones(3, numpy.longdouble)}}))
    with pytest.raises(ValueError, match="a is an array of numpy's f16; torch has no such type"):
        tensors(read(tmp_path / "file.pkl"))
