"""Print what a bug report needs: versions, the CPU kernel, the backends, mmcv's operators, GPUs and frameworks.

    dinat info

No framework needs to be installed. Every backend runs a small call on the CPU and, if there is one, on the GPU;
where it cannot, all reasons are printed.
"""

import argparse
import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__, ops

# Module, and further names of distributions that contain it.
FRAMEWORKS = {
    "mmcv": ("onedl-mmcv", "mmcv-lite"),
    "mmengine": ("onedl-mmengine",),
    "mmdet": ("onedl-mmdetection",),
    "mmseg": ("mmsegmentation", "onedl-mmsegmentation"),
    "mmpretrain": ("onedl-mmpretrain",),
    "detectron2": ("sal-detectron2",),
    "mask2former": ("maskformer2",),
    "transformers": (),
    "timm": (),
}
LIBRARIES = ("torchvision", "numpy", "triton", "natten", "onnx", "onnxruntime", "safetensors", "pycocotools")
KERNEL_SIZE = 3
# Half precision on a GPU, as detectors are trained
CASES = (("cpu", torch.float32), ("cuda", torch.bfloat16))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    for title, section in SECTIONS.items():
        print(f"{title}:")
        for name, value in section():
            print(f"  {name:18}{value}", flush=True)


def system() -> Iterator[tuple[str, str]]:
    """This package, Python, torch and the machine."""
    yield "dinat_backbones", f"{__version__} in {Path(__file__).resolve().parents[1]}"
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "platform", platform.platform()
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"
    yield "cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    for name in LIBRARIES:
        yield name, installed_version(name)


def installed_version(module: str, distributions: Sequence[str] = ()) -> str:
    """The version of a package from its metadata, without importing it."""
    for name in (module, *distributions):
        try:
            return version(name) + (f" ({name})" if name != module else "")
        except PackageNotFoundError:
            continue
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    # a source checkout on PYTHONPATH has no metadata; a folder without __init__.py is not the package
    return f"not installed as a package; found in {found.origin}" if found and found.origin else "not installed"


def frameworks() -> Iterator[tuple[str, str]]:
    """The frameworks that the adapters are for."""
    for module, distributions in FRAMEWORKS.items():
        yield module, installed_version(module, distributions)
    yield "mmcv._ext", mmcv_operators()


def mmcv_operators() -> str:
    """What computes mmcv's operators: compiled ones, the stand-in of this package, or nothing."""
    try:
        importlib.import_module("dinat_backbones.adapters.openmmlab")  # provides the stand-in
        extension = importlib.import_module("mmcv._ext")
    except ModuleNotFoundError as error:
        return f"none: {error.name} is not installed"
    except Exception as error:  # an mmcv for another torch, numpy or CUDA raises many things
        return f"none: {first_line(error)}"
    if getattr(extension, "STAND_IN", False):
        return "stand-in of dinat_backbones (torchvision and PyTorch), nothing compiled"
    return f"compiled ({extension.__file__})"


def backends() -> Iterator[tuple[str, str]]:
    """The CPU kernel, then every backend of the op on every available kind of device."""
    yield "cpu kernel", instruction_set()
    for device, dtype in CASES:
        if device == "cuda" and not torch.cuda.is_available():
            yield "on cuda", "no GPU that torch sees"
            continue
        for name in ops.BACKENDS:
            yield f"{name} on {device}", try_backend(name, device, dtype)


def instruction_set() -> str:
    """The instruction set of the C++ kernel, or why there is no kernel."""
    try:
        return str(ops.BACKENDS["cpu"].instruction_set())  # type: ignore[attr-defined]  # only the C++ kernel has one
    except RuntimeError as error:
        return f"none: {error}"


def try_backend(backend: str, device: str, dtype: torch.dtype) -> str:
    """Run a small call with a bias table; returns "yes", or why the backend cannot run it."""
    query = torch.zeros(1, 8, 8, 1, 32, dtype=dtype, device=device)
    rpb = torch.zeros(1, 2 * KERNEL_SIZE - 1, 2 * KERNEL_SIZE - 1, device=device)
    try:
        ops.neighborhood_attention_2d(query, query, query, rpb, kernel_size=KERNEL_SIZE, backend=backend)
    except RuntimeError as error:
        _, refused, reasons = str(error).partition("cannot run this call: ")
        return f"no: {reasons}" if refused else f"no: it failed: {first_line(error)}"
    except Exception as error:  # a broken installation raises many things
        return f"no: it failed: {first_line(error)}"
    return "yes"


def first_line(error: Exception) -> str:
    """The type of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def gpus() -> Iterator[tuple[str, str]]:
    """The GPUs that torch sees."""
    if not torch.cuda.is_available():
        yield (
            "none",
            f"torch.cuda.is_available() is False, CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')}",
        )
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB, sm_{device.major}{device.minor}"


SECTIONS: dict[str, Callable[[], Iterator[tuple[str, Any]]]] = {
    "system": system,
    "backends of the op": backends,
    "frameworks": frameworks,
    "GPUs": gpus,
}
