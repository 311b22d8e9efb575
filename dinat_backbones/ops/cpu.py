"""The C++ kernel on the CPU, registered with `torch.library` so that `torch.compile` sees one node each way.

The library (csrc/, built by setup.py) has a plain C interface and does not link a threading runtime: it is handed
the entry point of the OpenMP runtime torch has loaded, because a second pool of threads would fight with torch's
spinning one.
"""

import ctypes
import os
from functools import cache
from pathlib import Path

import torch

DTYPES = (torch.float32, torch.bfloat16)


class _View(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 5)]

    @classmethod
    def of(cls, tensor: torch.Tensor):
        return cls(tensor.data_ptr(), (ctypes.c_int64 * 5)(*tensor.stride()))


class _Problem(ctypes.Structure):  # Na2dProblem of csrc/na2d.h, field by field
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "heads", "dim")),
        *((name, ctypes.c_int32) for name in ("kernel", "dilation", "bf16", "threads")),
        ("scale", ctypes.c_float),
        ("rpb", ctypes.c_void_p),
        *((name, _View) for name in ("query", "key", "value", "out")),
        *((name, _View) for name in ("grad_out", "grad_query", "grad_key", "grad_value")),
        ("grad_rpb", ctypes.c_void_p),
        ("parallel", ctypes.c_void_p),
    ]


def _load(path: Path) -> tuple[ctypes.CDLL | None, str]:
    """The kernel's library, or None and the reason why there is none."""
    if not path.exists():
        return None, (
            f"the C++ kernel was not built when the package was installed ({path.name} is missing): "
            "install a C++17 compiler and reinstall dinat_backbones"
        )
    try:
        return ctypes.CDLL(str(path)), ""
    except OSError as error:
        return None, f"the C++ kernel does not load on this machine: {error}"


# At import, so that torch.compile finds a constant
_library, _missing = _load(Path(__file__).with_name("_na2d.so"))


@cache
def _openmp_parallel() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime of this process; None lets the kernel start threads itself."""
    torch.get_num_threads()  # makes sure the runtime is there
    try:
        mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
    except OSError:
        return None
    for path in sorted(mapped):
        if Path(path).name.startswith(("libgomp", "libiomp5", "libomp")):
            entry = getattr(ctypes.CDLL(path), "GOMP_parallel", None)
            if entry is not None:
                return ctypes.cast(entry, ctypes.c_void_p).value
    return None


# The OpenMP runtime's threads do not survive a fork; a child gets threads of its own.
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


def instruction_set() -> str:
    """What the kernel runs on this machine: "avx512", "avx2" or "baseline".

    Raises:
        RuntimeError: there is no kernel.
    """
    if _library is None:
        raise RuntimeError(_missing)
    _library.na2d_instruction_set.restype = ctypes.c_char_p
    return _library.na2d_instruction_set().decode()


def unsupported(query, key, value, rpb, kernel_size, dilation, scale) -> list[str]:
    """Reasons, in words, why this call cannot run here."""
    if query.is_meta:
        return []  # shapes alone, which need no library
    reasons = [_missing] if _missing else []
    if query.device.type != "cpu":
        reasons.append(f"the tensors are on {query.device}, the kernel runs on cpu")
    if query.dtype not in DTYPES:
        reasons.append(f"dtype {query.dtype} is not one of {', '.join(map(str, DTYPES))}")
    return reasons


def attention(query, key, value, rpb, kernel_size, dilation, scale) -> torch.Tensor:
    """See `neighborhood_attention_2d`."""
    return torch.ops.dinat_backbones.na2d([query, key, value], rpb, kernel_size, dilation, scale)


def attention_qkvpacked(qkv, rpb, kernel_size, dilation, scale) -> torch.Tensor:
    """See `neighborhood_attention_2d_qkvpacked`."""
    return torch.ops.dinat_backbones.na2d([qkv], rpb, kernel_size, dilation, scale)


def _call(function: str, qkv, rpb, kernel_size, dilation, scale, **outputs) -> None:
    query, key, value = _split(qkv)
    batch, height, width, heads, dim = query.shape
    problem = _Problem(batch=batch, height=height, width=width, heads=heads, dim=dim)
    problem.kernel, problem.dilation, problem.scale = kernel_size, dilation, scale
    problem.bf16 = query.dtype == torch.bfloat16
    problem.threads = torch.get_num_threads()
    problem.parallel = None if _forked else _openmp_parallel()
    if rpb is not None:
        rpb = rpb.to(torch.float32).contiguous()
        problem.rpb = rpb.data_ptr()
    for name, tensor in dict(query=query, key=key, value=value, **outputs).items():
        setattr(problem, name, tensor.data_ptr() if name == "grad_rpb" else _View.of(tensor))
    if getattr(_library, function)(ctypes.byref(problem)):
        raise MemoryError(f"{function}: no memory for scratch at query shape {list(query.shape)}")


# ---- the op, as torch sees it

# qkv: either query, key and value, [B, H, W, heads, head_dim] each, or all in one, [B, H, W, 3, heads, head_dim]
_SIGNATURE = "Tensor[] qkv, Tensor? rpb, int kernel_size, int dilation, float scale"
_ops = torch.library.Library("dinat_backbones", "DEF")
_ops.define(f"na2d({_SIGNATURE}) -> Tensor")
# The gradient of the three always comes in one, so that a packed qkv gets it without a copy.
_ops.define(f"na2d_backward(Tensor grad_out, {_SIGNATURE}) -> (Tensor grad_qkv, Tensor grad_rpb)")


def _split(qkv):
    return qkv[0].unbind(3) if len(qkv) == 1 else qkv


@torch.library.impl(_ops, "na2d", "Meta")
def _forward_meta(qkv, rpb, kernel_size, dilation, scale):
    query = _split(qkv)[0]
    return query.new_empty(query.shape)


@torch.library.impl(_ops, "na2d_backward", "Meta")
def _backward_meta(grad_out, qkv, rpb, kernel_size, dilation, scale):
    query = _split(qkv)[0]
    batch, height, width, heads, dim = query.shape
    grad_rpb = query.new_empty(0, dtype=torch.float32) if rpb is None else rpb.new_empty(rpb.shape)
    return query.new_empty((batch, height, width, 3, heads, dim)), grad_rpb


@torch.library.impl(_ops, "na2d", "CPU")
def _forward(qkv, rpb, kernel_size, dilation, scale):
    out = _forward_meta(qkv, rpb, kernel_size, dilation, scale)
    if out.numel():
        _call("na2d_forward", qkv, rpb, kernel_size, dilation, scale, out=out)
    return out


@torch.library.impl(_ops, "na2d_backward", "CPU")
def _backward(grad_out, qkv, rpb, kernel_size, dilation, scale):
    grad_qkv, grad_rpb = _backward_meta(grad_out, qkv, rpb, kernel_size, dilation, scale)
    sums = torch.zeros(grad_rpb.shape, dtype=torch.float32)
    if grad_qkv.numel():
        gradients = dict(zip(("grad_query", "grad_key", "grad_value"), grad_qkv.unbind(3), strict=True))
        if rpb is not None:
            gradients["grad_rpb"] = sums
        _call("na2d_backward", qkv, rpb, kernel_size, dilation, scale, grad_out=grad_out, **gradients)
    return grad_qkv, sums.to(grad_rpb.dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rpb, kernel_size, dilation, scale, *qkv):
        ctx.save_for_backward(rpb, *qkv)
        ctx.settings = kernel_size, dilation, scale
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.dinat_backbones.na2d(qkv, rpb, *ctx.settings)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        rpb, *qkv = ctx.saved_tensors
        grad_qkv, grad_rpb = torch.ops.dinat_backbones.na2d_backward(grad_out, qkv, rpb, *ctx.settings)
        grads = (grad_qkv,) if len(qkv) == 1 else grad_qkv.unbind(3)
        return None if rpb is None else grad_rpb, None, None, None, *grads


@torch.library.impl(_ops, "na2d", "Autograd")
def _differentiable(qkv, rpb, kernel_size, dilation, scale):
    return _Attention.apply(rpb, kernel_size, dilation, scale, *qkv)
