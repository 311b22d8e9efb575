"""The fused kernel for CUDA GPUs, in Triton, forward and backward, registered with `torch.library`.

Queries are taken in 2-D tiles of one residue class; a tile attends to the block of keys its windows span, on the tensor
cores, with an online softmax in float32. The backward pass recomputes the weights from the saved logarithm of the
softmax's denominator. Beside inputs and outputs there are two float32 numbers per query and head, and no matrix
[.., K * K]. `triton_kernels.py` has the kernels; they are compiled at the first call on a GPU, so that importing this
package needs no Triton.

Of the products a tile computes, ``K**2 / (rows * columns)`` are in some window, where rows x columns is the block of
keys, padded to what the tensor cores take: 49 of 256 for K=7 with tiles of 8x8. Narrower tiles waste less and reuse
keys less; `tiles` weighs the two.
"""

import importlib.metadata
import importlib.util
import os
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_DIM = 128
MIN_VERSION = (3, 2)  # the first with tl.gather
WIDE = 1 << 30  # from so many elements in one image on, offsets inside it have 64 bit; those of images always do


class Tiles(NamedTuple):
    """How one kernel cuts its work; powers of two."""

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

# What tools/triton_kernels.py prints after trying them out on a GPU: (kernel_size, head_dim, dtype) to the tiles of
# each of KERNELS. Whatever is not in here is cut by the rule below.
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

    def cut(keys: int, least_rows: int) -> Tiles:
        rows = max(keys // columns, least_rows)
        return Tiles(64 // tile_columns, tile_columns, rows, keys // rows, warps, 2)

    # The sums over rows in the gradient of the bias are a product over tile_rows * rows, which has to be 16 or more.
    return cut(at_a_time[0], 1), cut(at_a_time[1], -(-16 * tile_columns // 64)), cut(at_a_time[2], 1)


def _missing_triton() -> str:
    """Why the kernels cannot be compiled here, or nothing. Does not import Triton."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton (Linux wheels of PyTorch for CUDA bring it)"
    for name in ("triton", "pytorch-triton", "triton-windows"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if tuple(int(part) for part in version.split(".")[:2]) < MIN_VERSION:
            return f"Triton {version} is too old; {'.'.join(map(str, MIN_VERSION))} or newer is needed"
    return ""


# At import, so that torch.compile finds constants
_missing = _missing_triton()
# Triton's own switch, which it reads when kernels are defined: they then run in NumPy, slowly, on any device.
_interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def unsupported(query, key, value, rpb, kernel_size, dilation, scale) -> list[str]:
    """Reasons, in words, why this call cannot run here."""
    reasons = []
    if _missing:
        reasons.append(_missing)
    if query.device.type != "cuda" and not _interpreted:
        reasons.append(f"the tensors are on {query.device}, the kernel runs on cuda")
    if query.dtype not in DTYPES:
        reasons.append(f"dtype {query.dtype} is not one of {', '.join(map(str, DTYPES))}")
    if query.shape[-1] > MAX_DIM:
        reasons.append(f"head_dim={query.shape[-1]} is more than {MAX_DIM}")
    return reasons


def attention(query, key, value, rpb, kernel_size, dilation, scale) -> torch.Tensor:
    """See `neighborhood_attention_2d`."""
    return torch.ops.dinat_backbones.na2d_triton([query, key, value], rpb, kernel_size, dilation, scale)[0]


def attention_qkvpacked(qkv, rpb, kernel_size, dilation, scale) -> torch.Tensor:
    """See `neighborhood_attention_2d_qkvpacked`."""
    return torch.ops.dinat_backbones.na2d_triton([qkv], rpb, kernel_size, dilation, scale)[0]


def constants(kernel_size: int, head_dim: int, has_rpb: bool = True, tf32: bool = False, wide: bool = False) -> dict:
    """What all three kernels are compiled for, beside dtypes and `Tiles`."""
    return dict(
        KERNEL=kernel_size,
        DIM=head_dim,
        BLOCK_DIM=max(16, power_of_two(head_dim)),  # of a matrix product
        HAS_RPB=has_rpb,
        BLOCK_TABLE=power_of_two((2 * kernel_size - 1) ** 2),
        PRECISION="tf32" if tf32 else "ieee",
        WIDE=wide,
    )


def gradient_constants(kernel_size: int, atomic: bool) -> dict:
    """What the kernel of the query's gradient is compiled for besides."""
    return dict(ATOMIC=atomic, BLOCK_SPAN=max(16, power_of_two(2 * kernel_size - 1)))


class _Call:
    """What the kernels of one direction have in common."""

    def __init__(self, qkv, rpb, kernel_size, dilation, scale):
        query, key, value = qkv[0].unbind(3) if len(qkv) == 1 else qkv
        if query.stride(-1) != 1 or not query.stride() == key.stride() == value.stride():
            query, key, value = (t.contiguous() for t in (query, key, value))
        batch, self.height, self.width, self.heads, self.dim = query.shape
        self.dilation, self.device = dilation, query.device
        # without a bias the kernels do not read it
        self.inputs = query, key, value, query if rpb is None else rpb.contiguous()
        self.numbers = (*query.stride()[:4], self.height, self.width, self.heads, dilation, scale)
        self.classes = batch * self.heads * dilation**2
        self.tiles = dict(zip(KERNELS, tiles(kernel_size, self.dim, query.dtype), strict=True))
        reach = self.height * query.stride(1), self.width * query.stride(2)
        wide = max(*reach, 3 * query[:1].numel()) >= WIDE
        tf32 = query.dtype == torch.float32 and _tf32()
        self.constants = constants(kernel_size, self.dim, rpb is not None, tf32, wide)

    def programs(self, kernel: str) -> int:
        cut = self.tiles[kernel]
        rows, columns = (-(-length // self.dilation) for length in (self.height, self.width))
        return self.classes * -(-rows // cut.tile_rows) * -(-columns // cut.tile_columns)

    def launch(self, name: str, *pointers, **constants) -> None:
        programs = self.programs(name)
        if not programs:
            return
        cut = self.tiles[name]
        with torch.cuda.device_of(pointers[0]):
            getattr(_kernels(), f"{name}_kernel")[(programs,)](
                *pointers,
                *self.numbers,
                **self.constants,
                **constants,
                **cut.constants(),
                **cut.options(),
            )


@cache
def _kernels() -> ModuleType:
    from . import triton_kernels

    if _interpreted:
        _mend_interpreter()
    return triton_kernels


def _mend_interpreter() -> None:
    """Two things that Triton 3.6's interpreter lacks: NumPy 2.4 in range(), and bfloat16 in products."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def widened(handle):
        if handle.dtype != tl.bfloat16:
            return handle
        bits = handle.data.astype("uint32") << 16
        return interpreter.TensorHandle(bits.view("float32"), tl.float32)

    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)


def _tf32() -> bool:
    matmul = torch.backends.cuda.matmul
    # Since torch 2.9 the old name raises where the new one was set.
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


# ---- the op, as torch sees it

# qkv as in cpu.py. The second result is the base-2 logarithm of the softmax's denominator, [B, H, W, heads] in float32.
_SIGNATURE = "Tensor[] qkv, Tensor? rpb, int kernel_size, int dilation, float scale"
_ops = torch.library.Library("dinat_backbones", "FRAGMENT")
_ops.define(f"na2d_triton({_SIGNATURE}) -> (Tensor out, Tensor lse)")
_ops.define(
    f"na2d_triton_backward(Tensor grad_out, Tensor out, Tensor lse, {_SIGNATURE}) -> (Tensor grad_qkv, Tensor grad_rpb)"
)


@torch.library.impl(_ops, "na2d_triton", "Meta")
def _forward_meta(qkv, rpb, kernel_size, dilation, scale):
    batch, height, width, *_, heads, dim = qkv[0].shape
    lse = qkv[0].new_empty((batch, height, width, heads), dtype=torch.float32)
    return qkv[0].new_empty((batch, height, width, heads, dim)), lse


@torch.library.impl(_ops, "na2d_triton_backward", "Meta")
def _backward_meta(grad_out, out, lse, qkv, rpb, kernel_size, dilation, scale):
    batch, height, width, heads, dim = out.shape
    grad_rpb = out.new_empty(0, dtype=torch.float32) if rpb is None else rpb.new_empty(rpb.shape)
    return out.new_empty((batch, height, width, 3, heads, dim)), grad_rpb


@torch.library.impl(_ops, "na2d_triton", "CompositeExplicitAutograd")
def _forward(qkv, rpb, kernel_size, dilation, scale):
    out, lse = _forward_meta(qkv, rpb, kernel_size, dilation, scale)
    call = _Call(qkv, rpb, kernel_size, dilation, scale)
    call.launch("forward", *call.inputs, out, lse)
    return out, lse


@torch.library.impl(_ops, "na2d_triton_backward", "CompositeExplicitAutograd")
def _backward(grad_out, out, lse, qkv, rpb, kernel_size, dilation, scale):
    grad_qkv, grad_rpb = _backward_meta(grad_out, out, lse, qkv, rpb, kernel_size, dilation, scale)
    call = _Call(qkv, rpb, kernel_size, dilation, scale)
    grad_query, grad_key, grad_value = grad_qkv.unbind(3)
    grad_out, delta = grad_out.contiguous(), torch.empty_like(lse)
    # Every tile of queries has one table of partial sums. Where torch asks for determinism the tables are stored and
    # summed up in order; otherwise they are added up in place, which needs no memory.
    atomic = not torch.are_deterministic_algorithms_enabled()
    span = 2 * kernel_size - 1
    if rpb is None:
        tables = lse  # not written
    elif atomic:
        tables = lse.new_zeros((1, call.heads, span, span))
    else:
        tables = lse.new_empty((call.programs("query_gradient") // call.heads, call.heads, span, span))
    call.launch(
        "query_gradient",
        *(*call.inputs, out, lse, grad_out, grad_query, tables, delta),
        **gradient_constants(kernel_size, atomic),
    )
    call.launch("key_gradient", *(*call.inputs, lse, grad_out, delta, grad_key, grad_value))
    return grad_qkv, grad_rpb if rpb is None else tables.sum(0).to(grad_rpb.dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rpb, kernel_size, dilation, scale, *qkv):
        ctx.settings = kernel_size, dilation, scale
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = torch.ops.dinat_backbones.na2d_triton(qkv, rpb, *ctx.settings)
        ctx.save_for_backward(rpb, out, lse, *qkv)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_lse):
        rpb, out, lse, *qkv = ctx.saved_tensors
        grad_qkv, grad_rpb = torch.ops.dinat_backbones.na2d_triton_backward(grad_out, out, lse, qkv, rpb, *ctx.settings)
        grads = (grad_qkv,) if len(qkv) == 1 else grad_qkv.unbind(3)
        return None if rpb is None else grad_rpb, None, None, None, *grads


@torch.library.impl(_ops, "na2d_triton", "Autograd")
def _differentiable(qkv, rpb, kernel_size, dilation, scale):
    return _Attention.apply(rpb, kernel_size, dilation, scale, *qkv)
