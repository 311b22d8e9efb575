"""Comparison of the Triton kernels with `tiled` before their first use, since a GPU may be one they never ran on.

Once per process and kind of call (device, dtype, kernel size, head dimension), forward and backward on a map of a few
pixels: a few milliseconds beside compilation. DINAT_CHECK=0 in the environment turns it off.
"""

import os
from typing import TYPE_CHECKING

import torch

from ..registration import Call, Gradients, Saved
from .tiled import plain_attention

if TYPE_CHECKING:
    from .triton_backend import TritonBackend

# relative to the largest magnitude; float32 allows for TF32 products, which can be turned on in torch
TOLERANCES = {torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 6e-2}
REPORT = "please report this with the output of `dinat info`; DINAT_CHECK=0 in the environment skips the comparison"


def turned_off() -> bool:
    """Whether DINAT_CHECK in the environment turns the comparison off."""
    return os.environ.get("DINAT_CHECK", "").lower() in ("0", "false", "no", "off", "n")


def possible() -> bool:
    """Whether kernels can be launched now: not while a CUDA graph is captured, nor below modes such as fake tensors."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def disagreement(
    backend: "TritonBackend", device: torch.device, dtype: torch.dtype, kernel_size: int, head_dim: int
) -> str:
    """What is wrong with the kernels for this kind of call, in words; "" if they agree with `tiled`."""
    kind = f"kernel_size={kernel_size}, head_dim={head_dim}, {dtype}"
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            errors = _errors(backend, device, dtype, kernel_size, head_dim)
    except Exception as error:  # compilers and drivers raise many types
        first_line = next(iter(str(error).splitlines()), "")
        return f"the Triton kernels do not run here ({kind}; {type(error).__name__}: {first_line}): {REPORT}"
    wrong = [f"{name} {error:.2g}" for name, error in errors.items() if not error <= TOLERANCES[dtype]]  # NaN, too
    if not wrong:
        return ""
    return (
        f"the Triton kernels differ from 'tiled' here ({kind}; relative to the largest: {', '.join(wrong)}): {REPORT}"
    )


def _errors(
    backend: "TritonBackend", device: torch.device, dtype: torch.dtype, kernel_size: int, head_dim: int
) -> dict[str, float]:
    """Largest difference from `tiled` in float64, divided by the largest magnitude, of the output and each gradient."""
    generator = torch.Generator().manual_seed(0)  # does not change torch's random state
    height, width, heads, scale = 2 * kernel_size, 2 * kernel_size + 3, 2, head_dim**-0.5

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    qkv, grad_out = draw(1, height, width, 3, heads, head_dim), draw(1, height, width, heads, head_dim)
    rpb = draw(heads, 2 * kernel_size - 1, 2 * kernel_size - 1).float()
    query, key, value = qkv.unbind(3)
    call = Call(query, key, value, rpb, kernel_size, 2, scale)
    with torch.no_grad():
        out, lse = torch.empty_like(query, memory_format=torch.contiguous_format), rpb.new_empty(query.shape[:-1])
        backend.forward(call, out, lse)
        grad_qkv, grad_rpb = torch.empty_like(qkv), torch.zeros_like(rpb)
        backend.backward(call, grad_out, Saved(out, lse), Gradients(grad_qkv, grad_rpb, None))
    exact = [tensor.double().requires_grad_() for tensor in (query, key, value, rpb)]
    expected_out = plain_attention(exact[:3], exact[3], *call[4:7])
    expected = [expected_out, *torch.autograd.grad(expected_out, exact, grad_out.double())]
    got = [out, *grad_qkv.unbind(3), grad_rpb]
    return {
        name: ((a.double() - b).abs().max() / b.abs().max()).item()
        for name, a, b in zip(("out", "dq", "dk", "dv", "drpb"), got, expected, strict=True)
    }
