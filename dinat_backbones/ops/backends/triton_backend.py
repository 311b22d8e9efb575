"""Fused kernels for CUDA GPUs, in Triton, forward and backward.

Queries are processed in 2-D tiles of one dilation group; a query tile attends to the block of keys its windows span, on
the tensor cores, with an online softmax in float32. The backward pass recomputes the weights from the saved logarithm
of the softmax's denominator. Besides inputs and outputs there are two float32 numbers per query and head, and no matrix
[.., K * K]. `triton_kernels.py` has the kernels; they are compiled at the first call on a GPU, so that importing this
package needs no Triton.

Of the products a tile computes, ``K**2 / (rows * columns)`` are in some window, where rows x columns is the block of
keys, padded to what the tensor cores take: 49 of 256 for K=7 with tiles of 8x8. Narrower tiles waste less and reuse
keys less; `tiles` weighs the two.
"""

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch

from ..registration import Call, CompiledBackend, Gradients, Saved
from . import triton_check

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_DIM = 128
CHECKED_DEVICES = ("cuda",)  # not the CPU, where the interpreter would take minutes; see triton_check.py
MIN_VERSION = (3, 2)  # the first with tl.gather
MIN_CAPABILITY = (8, 0)  # the first with bfloat16 on the tensor cores
WIDE = 1 << 30  # elements of one image from which on offsets inside it have 64 bit; offsets of images always have


class Tiles(NamedTuple):
    """How one kernel splits its work; powers of two."""

    tile_rows: int  # a program's positions, rows x columns
    tile_columns: int
    rows: int  # the positions it goes through at a time
    columns: int
    warps: int
    stages: int  # of the software pipeline

    def constants(self) -> dict[str, int]:
        return dict(TILE_ROWS=self.tile_rows, TILE_COLUMNS=self.tile_columns, ROWS=self.rows, COLUMNS=self.columns)

    def options(self) -> dict[str, int]:
        return dict(num_warps=self.warps, num_stages=self.stages)


KERNELS = ("forward", "query_gradient", "key_gradient")

# Printed by `tools/triton_kernels.py tune` on a GPU: (kernel_size, head_dim, dtype) to the tiles of each of KERNELS.
# Other combinations follow the rule in `tiles`.
TUNED: dict[tuple[int, int, torch.dtype], tuple[Tiles, Tiles, Tiles]] = {}


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


def tiles(kernel_size: int, head_dim: int, dtype: torch.dtype) -> tuple[Tiles, Tiles, Tiles]:
    """The tiles of each of `KERNELS`: 64 positions in the shape that spans the fewest padded keys."""
    tuned = TUNED.get((kernel_size, head_dim, dtype))
    if tuned:
        return tuned

    def keys(columns: int) -> tuple[int, int]:
        return (64 // columns + kernel_size - 1) * power_of_two(columns + kernel_size - 1), abs(columns - 8)

    tile_columns = min((2, 4, 8, 16, 32), key=keys)
    columns = power_of_two(tile_columns + kernel_size - 1)
    # keys at a time: many keep the tensor cores busy, few fit into registers and shared memory
    if dtype == torch.float32:
        at_a_time = (64, 32, 16) if head_dim <= 32 else (32, 32, 16) if head_dim <= 64 else (16, 16, 16)
    else:
        at_a_time = (64, 32, 32) if head_dim <= 64 else (32, 32, 32)

    warps = 8 if dtype == torch.float32 and head_dim > 32 else 4  # more registers

    def tiles_of(keys: int, least_rows: int) -> Tiles:
        rows = max(keys // columns, least_rows)
        return Tiles(64 // tile_columns, tile_columns, rows, keys // rows, warps, 2)

    # The sums over rows in the gradient of the bias are a product over tile_rows * rows, which must be 16 or more.
    least_rows = -(-16 * tile_columns // 64)
    return tiles_of(at_a_time[0], 1), tiles_of(at_a_time[1], least_rows), tiles_of(at_a_time[2], 1)


def _missing_triton() -> str:
    """Why the kernels cannot be compiled here, or "". Does not import Triton."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton (Linux wheels of PyTorch for CUDA bring it)"
    for name in ("triton", "pytorch-triton", "triton-windows"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        numbers = re.match(r"(\d+)\.(\d+)", version)  # 3.2rc1 as well
        if numbers and (int(numbers[1]), int(numbers[2])) < MIN_VERSION:
            return f"Triton {version} is too old; {'.'.join(map(str, MIN_VERSION))} or newer is needed"
    return ""


def constants(
    kernel_size: int, head_dim: int, has_rpb: bool = True, tf32: bool = False, wide: bool = False
) -> dict[str, Any]:
    """Compile-time constants of all three kernels, besides those of `Tiles`."""
    return dict(
        KERNEL=kernel_size,
        DIM=head_dim,
        BLOCK_DIM=max(16, power_of_two(head_dim)),  # of a matrix product
        HAS_RPB=has_rpb,
        BLOCK_TABLE=power_of_two((2 * kernel_size - 1) ** 2),
        PRECISION="tf32" if tf32 else "ieee",
        WIDE=wide,
    )


def gradient_constants(kernel_size: int, atomic: bool) -> dict[str, bool | int]:
    """Further compile-time constants of `query_gradient_kernel`."""
    return dict(ATOMIC=atomic, BLOCK_SPAN=max(16, power_of_two(2 * kernel_size - 1)))


class _Launcher:
    """Launches the kernels of one call: their common arguments, grid and tiles."""

    def __init__(self, call: Call):
        query, key, value, rpb, kernel_size, dilation, scale, _ = call
        if query.stride(-1) != 1 or not query.stride() == key.stride() == value.stride():
            query, key, value = (t.contiguous() for t in (query, key, value))
        batch, self.height, self.width, self.heads, self.dim = query.shape
        self.dilation, self.device = dilation, query.device
        # without a bias the kernels do not read it
        self.inputs = query, key, value, query if rpb is None else rpb.contiguous()
        self.numbers = (*query.stride()[:4], self.height, self.width, self.heads, dilation, scale)
        self.groups = batch * self.heads * dilation**2
        self.tiles = dict(zip(KERNELS, tiles(kernel_size, self.dim, query.dtype), strict=True))
        reach = self.height * query.stride(1), self.width * query.stride(2)
        wide = max(*reach, 3 * query[:1].numel()) >= WIDE
        tf32 = query.dtype == torch.float32 and _tf32()
        self.constants = constants(kernel_size, self.dim, rpb is not None, tf32, wide)

    def programs(self, kernel: str) -> int:
        tiles = self.tiles[kernel]
        rows, columns = (-(-length // self.dilation) for length in (self.height, self.width))
        return self.groups * -(-rows // tiles.tile_rows) * -(-columns // tiles.tile_columns)

    def launch(self, name: str, *pointers: torch.Tensor, **constants: bool | int) -> None:
        programs = self.programs(name)
        if not programs:
            return
        tiles = self.tiles[name]
        with torch.cuda.device_of(pointers[0]):
            getattr(_kernels(), f"{name}_kernel")[(programs,)](
                *pointers,
                *self.numbers,
                **self.constants,
                **constants,
                **tiles.constants(),
                **tiles.options(),
            )


@cache
def _kernels() -> ModuleType:
    from . import triton_kernels

    return triton_kernels


def _tf32() -> bool:
    matmul = torch.backends.cuda.matmul
    # Since torch 2.9 reading allow_tf32 raises an error if fp32_precision was set.
    return bool(matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32)


# Triton's own switch, which it reads when kernels are defined: they then run in NumPy, slowly, on any device.
_interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


class TritonBackend(CompiledBackend):
    """float32, float16 and bfloat16 on a CUDA GPU."""

    requires = "triton"
    dispatch_key = "CompositeExplicitAutograd"  # also on a CPU, in Triton's interpreter
    keeps_lse = True

    def __init__(self, name: str):
        self.missing = _missing_triton()  # at import, so that torch.compile finds a constant
        self.disagreements: dict[tuple[Any, ...], str] = {}  # what triton_check found, for each kind of call
        super().__init__(name)

    def automatic(self, device: torch.device) -> bool:
        """See `Backend`."""
        return device.type == "cuda"

    def faults(self, device: torch.device) -> list[str]:
        """See `Backend`."""
        return [self.missing, *self.disagreements.values()] if device.type == "cuda" else []

    def unsupported(
        self, qkv: Sequence[torch.Tensor], rpb: torch.Tensor | None, kernel_size: int, dilation: int, scale: float
    ) -> list[str]:
        """See `Backend`."""
        reasons = super().unsupported(qkv, rpb, kernel_size, dilation, scale)
        device, dtype, head_dim = qkv[0].device, qkv[0].dtype, qkv[0].shape[-1]
        if self.missing:
            reasons.append(self.missing)
        if device.type == "cuda":
            # The GPU is not queried while a graph is traced, but when the compiled graph calls the kernel.
            reasons += [] if torch.compiler.is_compiling() else _gpu_reasons(device)
        elif not _interpreted:
            reasons.append(f"the tensors are on {device}, the kernel runs on cuda")
        if dtype not in DTYPES:
            reasons.append(f"dtype {dtype} is not one of {', '.join(map(str, DTYPES))}")
        if head_dim > MAX_DIM:
            reasons.append(f"head_dim={head_dim} is more than {MAX_DIM}")
        if not reasons and device.type in CHECKED_DEVICES:
            reason = self._disagreement(device, dtype, kernel_size, head_dim)
            reasons += [reason] if reason else []
        return reasons

    def _disagreement(self, device: torch.device, dtype: torch.dtype, kernel_size: int, head_dim: int) -> str:
        """The result of triton_check for this kind of call, computed once; "" if the kernels agree."""
        kind = device, dtype, kernel_size, head_dim
        if kind not in self.disagreements:
            if not triton_check.possible():
                return ""
            off = triton_check.turned_off()
            self.disagreements[kind] = "" if off else triton_check.disagreement(self, *kind)
        return self.disagreements[kind]

    def forward(self, call: Call, out: torch.Tensor, lse: torch.Tensor) -> None:
        """See `CompiledBackend`."""
        launcher = _Launcher(call)
        launcher.launch("forward", *launcher.inputs, out, lse)

    def backward(self, call: Call, grad_out: torch.Tensor, saved: Saved, gradients: Gradients) -> None:
        """See `CompiledBackend`.

        The gradient of the bias is added up with atomic operations, which need no extra memory. With
        `torch.use_deterministic_algorithms` every query tile writes a table ``[2K-1, 2K-1]`` of its own, and these are
        summed in order: about ``(2K-1)**2 / 64`` float32 numbers per query and head.
        """
        out, lse = saved
        assert out is not None and lse is not None  # see `keeps_lse`
        launcher = _Launcher(call)
        grad_query, grad_key, grad_value = gradients.qkv.unbind(3)
        grad_rpb = gradients.rpb
        out, grad_out, delta = out.contiguous(), grad_out.contiguous(), torch.empty_like(lse)
        atomic = not torch.are_deterministic_algorithms_enabled()
        span = 2 * call.kernel_size - 1
        if grad_rpb is None:
            tables = lse  # not written
        elif atomic:
            tables = grad_rpb
        else:
            tables = lse.new_empty((launcher.programs("query_gradient") // launcher.heads, launcher.heads, span, span))
        launcher.launch(
            "query_gradient",
            *(*launcher.inputs, out, lse, grad_out, grad_query, tables, delta),
            **gradient_constants(call.kernel_size, atomic),
        )
        launcher.launch("key_gradient", *(*launcher.inputs, lse, grad_out, delta, grad_key, grad_value))
        if grad_rpb is not None and not atomic:
            grad_rpb += tables.sum(0)


@cache
def _gpu_reasons(device: torch.device) -> list[str]:
    if torch.version.hip:
        return ["the kernels were written for NVIDIA GPUs, this torch is built for AMD's"]
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < MIN_CAPABILITY:
        return [f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}; sm_80 or newer is needed"]
    return []
