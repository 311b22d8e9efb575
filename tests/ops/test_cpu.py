"""The C++ kernel: every instruction set, items and threads, forks, memory; its library and the OpenMP runtime."""

import ctypes
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dinat_backbones
from dinat_backbones import neighborhood_attention_2d
from dinat_backbones.ops import BACKENDS
from dinat_backbones.ops.backends.cpu import library, openmp
from helpers import assert_near, draw, run, sample, to_dtype

pytestmark = pytest.mark.usefixtures("poison")
CPU = BACKENDS["cpu"]
PACKAGE = Path(dinat_backbones.__file__).parent


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"])
def test_instruction_sets(name):
    best = CPU.instruction_set()
    if not CPU.use_instruction_set(name):
        pytest.skip(f"this machine or build has no {name}")
    try:
        assert CPU.instruction_set() == name
        for index in range(2000, 2040):
            case = sample(index)
            tensors, rpb, grad_out = draw(*case["shape"], case["kernel_size"], rpb=case["rpb"], seed=index)
            settings = dict(kernel_size=case["kernel_size"], dilation=case["dilation"])
            expected = run(tensors, rpb, grad_out, backend="reference", **settings)
            for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 4e-2)):
                *converted, table, grad = to_dtype([*tensors, rpb, grad_out], dtype)
                assert_near(run(converted, table, grad, backend="cpu", **settings), expected, tolerance)
    finally:
        CPU.use_instruction_set(best)


# height and width beside kernel_size * dilation, heads, dim: blocks of 2 x 8 queries that are not full, one column or
# row of them, key rows of up to 15 and of more keys, dims that fill no tile of 32 or some of them
BLOCKS = [
    ((0, 0), 2, 32),
    ((1, 0), 1, 33),
    ((0, 1), 1, 31),
    ((3, 7), 2, 16),
    ((8, 9), 1, 64),
    ((5, 24), 2, 8),
    ((2, 41), 3, 40),
    ((29, 17), 2, 96),
]


@pytest.mark.parametrize("kernel_size, dilation", [(3, 1), (3, 4), (5, 1), (5, 3), (7, 1), (7, 2), (7, 5)])
def test_blocks_of_bfloat16(kernel_size, dilation):
    for (more_rows, more_columns), heads, dim in BLOCKS:
        reach = kernel_size * dilation
        shape = 2, reach + more_rows, reach + more_columns, heads, dim, kernel_size
        tensors, rpb, grad_out = draw(*shape, dtype=torch.bfloat16, seed=dim, fused=dim == 32)
        settings = dict(kernel_size=kernel_size, dilation=dilation)
        for table in (rpb.float(), None):
            exact = [None if t is None else t.double() for t in (*tensors, table, grad_out)]
            expected = run(exact[:3], exact[3], exact[4], backend="reference", **settings)
            got = run(tensors, table, grad_out, backend="cpu", **settings)
            assert_near(got[:4], expected[:4], 2e-2)
            assert_near(got[4:], expected[4:], 1e-4)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(
    "height, width, heads, dim, kernel_size, dilation",
    [(50, 700, 1, 128, 7, 1), (61, 580, 1, 64, 5, 12), (23, 700, 2, 32, 7, 3)],
)
def test_maps_split_into_strips(height, width, heads, dim, kernel_size, dilation, dtype, tolerance):
    tensors, rpb, grad_out = draw(1, height, width, heads, dim, kernel_size, dtype=dtype)
    rpb = rpb.float()
    settings = dict(kernel_size=kernel_size, dilation=dilation)
    expected = run([t.double() for t in tensors], rpb.double(), grad_out.double(), backend="tiled", **settings)
    assert_near(run(tensors, rpb, grad_out, backend="cpu", **settings), expected, tolerance)


@pytest.mark.parametrize("batch, heads, dilation", [(52, 8, 3), (160, 8, 2)])
def test_items_share_bias_tables(batch, heads, dilation):
    """One table for each of these items would take more than 4 MiB: two share one, or all of a head do. Image by image
    each has its own."""
    tensors, rpb, grad_out = draw(batch, 15 * dilation, 15 * dilation, heads, 1, 15, dtype=torch.float32)
    settings = dict(kernel_size=15, dilation=dilation, backend="cpu")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        first, second = (run(tensors, rpb, grad_out, **settings) for _ in range(2))
        images = [run([t[i : i + 1] for t in tensors], rpb, grad_out[i : i + 1], **settings) for i in range(batch)]
    finally:
        torch.set_num_threads(before)
    *maps, tables = zip(*images, strict=True)
    assert_near(first, [*map(torch.cat, maps), torch.stack(tables).double().sum(0)], 1e-5)
    assert all(map(torch.equal, first, second))


# ---- threads


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads_change_nothing(threads):
    tensors, rpb, grad_out = draw(2, 57, 40, 2, 16, 7, dtype=torch.float32)
    settings = dict(kernel_size=7, dilation=2, backend="cpu")
    before = torch.get_num_threads()
    first = run(tensors, rpb, grad_out, **settings)
    try:
        torch.set_num_threads(threads)
        got = run(tensors, rpb, grad_out, **settings)
        assert_near(got, first, 2e-6)
        assert all(map(torch.equal, got, run(tensors, rpb, grad_out, **settings)))  # deterministic, rpb included
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_child_of_a_fork():
    # small enough for torch itself not to start threads, which would hang in a child
    tensors, rpb, _ = draw(1, 30, 30, 2, 16, 7, dtype=torch.float32)
    # the parent's threads exist by now
    expected = neighborhood_attention_2d(*tensors, rpb, kernel_size=7, backend="cpu")
    pipe, end = multiprocessing.Pipe()

    def child():
        end.send(neighborhood_attention_2d(*tensors, rpb, kernel_size=7, backend="cpu").numpy())

    process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
    process.start()
    answered = pipe.poll(30)
    result = pipe.recv() if answered else None
    process.kill()
    assert answered, "the child hangs"
    assert np.array_equal(result, expected.numpy())


def execute(code, *, path=PACKAGE.parent, **environment):
    """Standard output of Python code that is run with the package at `path`, in a process of its own."""
    environment = os.environ | dict(PYTHONPATH=f"{path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}") | environment
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd="/")
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip()


ATTEND = """
import torch
import dinat_backbones as d
from dinat_backbones.ops import BACKENDS
from dinat_backbones.ops.backends.cpu import openmp

torch.set_num_threads(4)
torch.manual_seed(0)
qkv, rpb = torch.randn(1, 40, 40, 3, 2, 8), torch.randn(2, 13, 13)
out = d.neighborhood_attention_2d_qkvpacked(qkv, rpb, kernel_size=7, backend="cpu")
expected = d.neighborhood_attention_2d_qkvpacked(qkv.double(), rpb.double(), kernel_size=7, backend="reference")
assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()
"""

NO_MORE_THREADS = (
    ATTEND
    + """
import resource, threading
openmp._forked = True  # the kernel starts threads itself
torch.set_num_threads(1)
d.neighborhood_attention_2d_qkvpacked(qkv, rpb, kernel_size=7, backend="cpu")  # this thread has its memory
torch.set_num_threads(64)
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), resource.RLIM_INFINITY))  # no stack of 8 MiB fits
try:
    threading.Thread(target=print).start()
    raise SystemExit("the limit does not keep threads from starting")
except RuntimeError:
    pass
again = d.neighborhood_attention_2d_qkvpacked(qkv, rpb, kernel_size=7, backend="cpu")
assert torch.equal(again, out)
print("done")
"""
)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits address space as Linux does")
def test_no_more_threads():
    """A system that gives no more threads slows the kernel down, and nothing else."""
    assert execute(NO_MORE_THREADS) == "done"


# ---- torch's OpenMP runtime


class _Symbol(ctypes.Structure):
    _fields_ = [
        ("path", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("at", ctypes.c_void_p),
    ]


def library_at(address):
    """The file that the dynamic linker loaded at an address."""
    symbol = _Symbol()
    assert ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), ctypes.byref(symbol))
    return Path(os.fsdecode(symbol.path)).resolve()


def torch_runtime():
    """The OpenMP runtime among the dependencies of libtorch_cpu, as the linker's own program lists them."""
    if not sys.platform.startswith("linux") or shutil.which("ldd") is None:
        pytest.skip("needs ldd, which lists the dependencies of a library")
    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    listed = subprocess.run(["ldd", str(torch_cpu)], capture_output=True, text=True, check=True).stdout
    found = [line.split(" => ")[1].rsplit(" (", 1)[0] for line in listed.splitlines() if "omp" in line.split(" => ")[0]]
    assert len(found) == 1, listed
    return Path(found[0]).resolve()


def test_runtime_is_the_one_torch_is_linked_with():
    assert library_at(openmp.parallel()) == torch_runtime()


def test_runtime_of_another_package_is_left_alone(tmp_path):
    """Wheels such as scikit-learn's bring an OpenMP runtime of their own, and may be imported before torch."""
    expected = torch_runtime()
    other = tmp_path / "scikit_learn.libs" / "libgomp-d22c30c5.so.1.0.0"
    other.parent.mkdir()
    other.write_bytes(expected.read_bytes().replace(b"libgomp", b"libgomq"))  # with a name of its own, as theirs has
    code = f"import ctypes; other = ctypes.CDLL({str(other)!r}, ctypes.RTLD_GLOBAL); other.GOMP_parallel"
    code += ATTEND + "print(openmp.parallel())\n" + LIBRARY_OF_THE_RUNTIME
    address, path = execute(code).splitlines()
    assert Path(path).resolve() == expected, address


LIBRARY_OF_THE_RUNTIME = """
import os
class Symbol(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("path", "base", "name", "at")]
symbol = Symbol()
ctypes.CDLL(None).dladdr(ctypes.c_void_p(openmp.parallel()), ctypes.byref(symbol))
print(os.fsdecode(ctypes.string_at(symbol.path)))
"""


def test_after_importing_scikit_learn():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed; a copied runtime stands in for its own above")
    code = "import ctypes, sklearn.cluster" + ATTEND + LIBRARY_OF_THE_RUNTIME
    assert Path(execute(code)).resolve() == torch_runtime()


def test_without_register_at_fork():
    """As on Windows, which has none."""
    code = "import os, torch; del os.register_at_fork" + ATTEND
    assert execute(code + "print(openmp.parallel() is not None)") == str(openmp.parallel() is not None)


def test_path_with_blanks_and_umlauts(tmp_path):
    """Package and torch are both below it."""
    site = tmp_path / "a path with bl\u00e4nk" / "site-packages"
    shutil.copytree(PACKAGE, site / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", "csrc"))
    try:
        (site / "torch").symlink_to(Path(torch.__file__).parent, target_is_directory=True)
    except OSError as error:
        pytest.skip(f"this system makes no symbolic links: {error}")
    code = ATTEND + "print(d.__file__, torch.__file__, openmp.parallel() is not None, sep='\\n')"
    *paths, found = execute(code, path=site).splitlines()
    assert [Path(path).parents[1] for path in paths] == [site, site]
    assert found == str(openmp.parallel() is not None)


# ---- the library


def test_missing_library_is_explained(monkeypatch, tmp_path):
    loaded, reason = library.load(tmp_path / library.PATH.name)
    assert loaded is None
    monkeypatch.setattr(CPU, "library", loaded)
    monkeypatch.setattr(CPU, "missing", reason)
    tensors, rpb, _ = draw(1, 9, 9, 1, 8, 7, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="was not built when the package was installed"):
        neighborhood_attention_2d(*tensors, rpb, kernel_size=7, backend="cpu")
    with pytest.raises(RuntimeError, match="was not built when the package was installed"):
        CPU.op(tensors, rpb, 7, 1, 1.0)
    with pytest.raises(RuntimeError, match="was not built when the package was installed"):
        CPU.instruction_set()
    neighborhood_attention_2d(*tensors, rpb, kernel_size=7)  # tiled takes over


def test_broken_library_is_explained(tmp_path):
    broken = tmp_path / library.PATH.name
    broken.write_bytes(b"not a library")
    loaded, reason = library.load(broken)
    assert loaded is None and "does not load on this machine" in reason


SIZE = ctypes.sizeof(library.Problem)


@pytest.mark.parametrize(
    "interface, size, found",
    [
        (None, None, "interface unknown, unknown bytes"),
        (library.INTERFACE, SIZE + 8, f"interface {library.INTERFACE}, {SIZE + 8} bytes"),
        (library.INTERFACE - 1, SIZE, f"interface {library.INTERFACE - 1}, {SIZE} bytes"),
    ],
    ids=["older than the question", "another struct", "another interface"],
)
def test_stale_library_is_refused(tmp_path, interface, size, found, monkeypatch):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, built = tmp_path / "stale.c", tmp_path / library.PATH.name
    functions = f"int na2d_interface() {{ return {interface}; }} long long na2d_problem_size() {{ return {size}; }}"
    functions = "" if interface is None else functions
    source.write_text(functions + " int na2d_forward(void* p) { return 0; }")
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", built], check=True)
    loaded, reason = library.load(built)
    assert loaded is None
    assert found in reason and "rebuild it with `python setup.py build_ext --inplace`" in reason
    monkeypatch.setattr(CPU, "missing", reason)
    assert CPU.unsupported([torch.zeros(1, 9, 9, 1, 8)] * 3, None, 7, 1, 1.0) == [reason]


def test_library_and_its_mirror_agree():
    loaded, reason = library.load()
    assert loaded is not None and not reason
    header = (Path(library.__file__).parent / "csrc" / "na2d.h").read_text()
    assert f"#define NA2D_INTERFACE {library.INTERFACE}\n" in header
