"""The Triton op: in the interpreter, on a GPU if there is one, and compiled for two without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton_kernels as tool

from dinat_backbones import neighborhood_attention_2d
from dinat_backbones.ops import BACKENDS
from dinat_backbones.ops.backends import triton_backend as triton
from helpers import ROOT

HERE = Path(__file__).parent
TRITON = BACKENDS["triton"]

needs_triton = pytest.mark.skipif(bool(TRITON.missing), reason=TRITON.missing)


def run_on_device(**environment):
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(HERE / "triton_on_device.py"), "-p", "no:cacheprovider"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


@needs_triton
def test_in_the_interpreter():
    """64 shapes and more, forward and all gradients, on the CPU."""
    run_on_device(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU; the interpreter ran the same tests")
def test_on_a_gpu():
    run_on_device(TRITON_INTERPRET="0")


# ---- compiled without a GPU


@needs_triton
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kernel", triton.KERNELS)
@pytest.mark.parametrize(
    "kernel_size, head_dim, dtype", [(7, 32, torch.bfloat16), (11, 32, torch.float16), (13, 64, torch.bfloat16)]
)
def test_compiles_within_limits(kernel, arch, kernel_size, head_dim, dtype):
    """For A100 and H100: at least two programs per multiprocessor, next to nothing spilled."""
    tiles = triton.tiles(kernel_size, head_dim, dtype)[triton.KERNELS.index(kernel)]
    report = tool.compile_kernel(kernel, tiles, kernel_size, head_dim, dtype, arch)
    assert report.shared <= 99 * 1024, report  # of sm_86 and sm_89, the least of all
    assert report.programs >= 2, report
    assert report.spilled <= 256, report
    assert 10 < report.instructions < 60, report


@needs_triton
@pytest.mark.parametrize("kernel", triton.KERNELS)
def test_largest_head_dim_fits(kernel):
    """128 in float32 on sm_86, whose programs have 99 KiB of shared memory."""
    tiles = triton.tiles(7, 128, torch.float32)[triton.KERNELS.index(kernel)]
    report = tool.compile_kernel(kernel, tiles, 7, 128, torch.float32, 86)
    assert report.shared <= 99 * 1024, report


@pytest.mark.parametrize("kernel_size", range(3, 33, 2))
@pytest.mark.parametrize("head_dim", [1, 16, 20, 32, 64, 100, 128])
@pytest.mark.parametrize("dtype", triton.DTYPES)
def test_tiles_are_powers_of_two(kernel_size, head_dim, dtype):
    for tiles in triton.tiles(kernel_size, head_dim, dtype):
        assert all(number & (number - 1) == 0 and number > 0 for number in tiles[:4])
        assert tiles.tile_rows * tiles.tile_columns == 64 and tiles.rows * tiles.columns >= 16
    query_gradient = triton.tiles(kernel_size, head_dim, dtype)[1]
    assert query_gradient.tile_rows * query_gradient.rows >= 16


PRETENDED_GPU = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 80, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


driver.set_active(Driver())
from dinat_backbones.ops import BACKENDS
from dinat_backbones.ops.backends import triton_backend as triton, triton_kernels

triton._interpreted = True  # calls with tensors on a CPU pass

kernels = [getattr(triton_kernels, name + "_kernel") for name in triton.KERNELS]
for kernel in kernels:  # compile, but launch nothing
    kernel.run = lambda *args, run=kernel.run, **keywords: run(*args, **keywords | dict(warmup=True))
for height, width, heads, dilation in ((20, 30, 2, 1), (33, 17, 2, 2), (16, 64, 4, 2), (21, 21, 1, 3)):
    qkv = torch.zeros(1, height, width, 3, heads, 16, dtype=torch.bfloat16, requires_grad=True)
    rpb = torch.zeros(heads, 13, 13, requires_grad=True)
    out = BACKENDS["triton"].attention([qkv], rpb, 7, dilation, 0.25)
    torch.autograd.grad(out, (qkv, rpb), out)
print([len(kernel.device_caches[0][0]) for kernel in kernels])
"""


@needs_triton
def test_new_sizes_compile_nothing_new():
    """Four sizes, numbers of heads and dilations, one compilation of each kernel."""
    command = [sys.executable, "-c", PRETENDED_GPU]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    assert out.strip() == "[1, 1, 1]"


# ---- what is not supported


def reasons(device="cpu", dtype=torch.float32, dim=32):
    query = torch.zeros(1, 9, 9, 1, dim, dtype=dtype, device=device)
    return TRITON.unsupported([query] * 3, None, 7, 1, 1.0)


def test_reasons_in_words(monkeypatch):
    monkeypatch.setattr(TRITON, "missing", "")
    monkeypatch.setattr(triton, "_interpreted", False)
    assert reasons() == ["the tensors are on cpu, the kernel runs on cuda"]
    assert "head_dim=256 is more than 128" in reasons(dim=256)
    assert any("dtype torch.float64 is not one of torch.float16" in reason for reason in reasons(dtype=torch.float64))
    monkeypatch.setattr(triton, "_interpreted", True)
    assert reasons() == []


@pytest.fixture
def pretended_gpu(monkeypatch):
    triton._gpu_reasons.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Pretended GPU")
    yield monkeypatch
    triton._gpu_reasons.cache_clear()


@pytest.mark.parametrize(
    "capability, reason",
    [((7, 5), ["Pretended GPU is sm_75; sm_80 or newer is needed"]), ((8, 0), []), ((9, 0), []), ((12, 0), [])],
)
def test_old_gpus_are_not_chosen(pretended_gpu, capability, reason):
    pretended_gpu.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert triton._gpu_reasons(torch.device("cuda", 0)) == reason


def test_gpus_of_other_makers_are_not_chosen(pretended_gpu):
    pretended_gpu.setattr(torch.version, "hip", "6.0")
    assert "written for NVIDIA GPUs" in triton._gpu_reasons(torch.device("cuda", 0))[0]


def test_missing_triton_is_explained(monkeypatch):
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: None)
    missing = triton._missing_triton()
    assert "Triton is not installed: pip install triton" in missing
    monkeypatch.setattr(TRITON, "missing", missing)
    query = torch.zeros(1, 9, 9, 1, 32)
    with pytest.raises(RuntimeError, match="backend='triton' cannot run this call: Triton is not installed"):
        neighborhood_attention_2d(query, query, query, kernel_size=7, backend="triton")
    assert missing in TRITON.faults(torch.device("cuda")) and not TRITON.faults(torch.device("cpu"))


@pytest.mark.parametrize(
    "version, missing",
    [
        ("2.3.1", "Triton 2.3.1 is too old; 3.2 or newer is needed"),
        ("3.1rc2", "Triton 3.1rc2 is too old; 3.2 or newer is needed"),
        ("3.2rc1", ""),
        ("3.2.0+git0d4682f", ""),
        ("3.10", ""),
        ("4", ""),
        ("unknown", ""),
    ],
)
def test_versions(monkeypatch, version, missing):
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(triton.importlib.metadata, "version", lambda name: version)
    assert triton._missing_triton() == missing


TUNER = """
import triton_interpreter, triton_kernels
triton_interpreter.add_missing_operations()
triton_kernels.main()
"""


@needs_triton
def test_tuner_runs_to_its_end_in_the_interpreter():
    command = [sys.executable, "-c", TUNER, "tune", "--quick", "--kernel-size", "3"]
    command += ["--head-dim", "16", "--dtype", "float32"]
    folders = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": folders}
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    assert "(3, 16, torch.float32): (Tiles(" in out.splitlines()[-1]
