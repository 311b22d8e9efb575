"""An installed NATTEN: 0.14 to 0.17 with the bias, 0.20 and later without.

The old releases hold the attention weights ``[B, heads, H, W, K * K]``; with them, half precision is computed in
float32, because softmax and the gradient of the bias would accumulate in half precision otherwise. The later ones have
fused kernels for CUDA (`libnatten`); on a CPU they use FlexAttention, forward only, with a dense mask of all pairs of
pixels, which is useful for comparisons on small maps only. NATTEN is imported by the first call that may run on it.
"""

import types
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from .. import transforms
from .base import Backend

RELEASES = "0.14 to 0.17 (with rpb) or 0.20 and later (without)"


class _Installed:
    """The imported module, or in `missing` the reason why it cannot be used."""

    def __init__(self, module: Any = None, missing: str = ""):
        self.module, self.missing = module, missing
        self.version: str = getattr(module, "__version__", "")
        functions = getattr(module, "functional", types.SimpleNamespace())
        self.fused = hasattr(functions, "na2d") and not hasattr(functions, "na2d_av")  # 0.20 and later
        self.biased = hasattr(functions, "natten2dqkrpb") or hasattr(functions, "na2d_qk")
        self.functions = functions
        if module is not None and not (self.fused or self.biased):
            self.missing = f"natten {self.version} is installed; expected {RELEASES}"


@cache
def installed() -> _Installed:
    """Import NATTEN once; no error if that fails, see `_Installed.missing`."""
    try:
        import natten
        import natten.functional
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "natten":
            return _Installed(missing=f"natten does not import: {error}")
        return _Installed(missing='natten is not installed: pip install "dinat_backbones[natten]"')
    except (ImportError, OSError, RuntimeError) as error:  # for example, built for another torch
        return _Installed(missing=f"natten does not import: {error}")
    return _Installed(natten)


class NattenBackend(Backend):
    """Automatic on CUDA only: on a CPU `tiled` is faster than any NATTEN, and importing NATTEN is slow."""

    requires = "natten"

    def automatic(self, device: torch.device) -> bool:
        """See `Backend`."""
        return device.type == "cuda"

    def unsupported(
        self, qkv: Sequence[torch.Tensor], rpb: torch.Tensor | None, kernel_size: int, dilation: int, scale: float
    ) -> list[str]:
        """See `Backend`."""
        found = installed()
        if found.missing:
            return [found.missing]
        name, device, dim = f"natten {found.version}", qkv[0].device.type, qkv[0].shape[-1]
        reasons = [transforms.REASON] if transforms.active() else []
        if not found.fused:
            if device not in ("cpu", "cuda"):
                reasons.append(f"{name} runs on cpu and cuda, the tensors are on {device}")
            if kernel_size > 13:
                reasons.append(f"{name} has kernels up to 13, this one is {kernel_size}")
            if torch.compiler.is_compiling():
                reasons.append(f"{name} cannot be part of a compiled graph")
            return reasons
        if rpb is not None:
            reasons.append(f"{name} has no relative positional bias (rel_pos_bias=False needs none)")
        if qkv[0].dtype not in (torch.float32, torch.float16, torch.bfloat16):
            reasons.append(f"{name} has no kernels for {qkv[0].dtype}")
        if device == "cuda":
            if not found.module.HAS_LIBNATTEN:
                reasons.append(f"{name} was installed without its CUDA kernels (libnatten)")
            if dim % 8:
                reasons.append(f"{name} needs a head_dim that is a multiple of 8, not {dim}")
        elif device == "cpu":
            if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in qkv):
                reasons.append(f"{name} has no gradients on a CPU")
            if dim not in (8, 16, 32, 64, 128, 256, 512):
                reasons.append(f"{name} needs a power of two from 8 to 512 as head_dim on a CPU, not {dim}")
        else:
            reasons.append(f"{name} runs on cuda and, slowly, on cpu; the tensors are on {device}")
        return reasons

    def attention(
        self, qkv: Sequence[torch.Tensor], rpb: torch.Tensor | None, kernel_size: int, dilation: int, scale: float
    ) -> torch.Tensor:
        """See `Backend`."""
        query, key, value = qkv
        found = installed()
        if not query.numel():  # natten does not support an empty batch; autograd gets zero gradients from this
            return query * key * value * (1.0 if rpb is None else rpb.sum())
        if found.fused:
            query, key, value = (tensor.contiguous() for tensor in qkv)  # natten would copy views as well
            if not torch.is_grad_enabled():  # FlexAttention on a CPU checks requires_grad only
                query, key, value = query.detach(), key.detach(), value.detach()
            window = dict(kernel_size=kernel_size, dilation=dilation, scale=scale)
            result: torch.Tensor = found.module.na2d(query, key, value, **window)
            return result
        dtype, accumulate = query.dtype, torch.promote_types(query.dtype, torch.float32)
        query, key, value = (
            tensor.to(accumulate).permute(0, 3, 1, 2, 4).contiguous() for tensor in (query * scale, key, value)
        )
        rpb = None if rpb is None else rpb.to(accumulate)
        out = _with_weights(found.functions, query, key, value, rpb, kernel_size, dilation)
        return out.permute(0, 2, 3, 1, 4).to(dtype)


def _with_weights(
    functions: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rpb: torch.Tensor | None,
    kernel_size: int,
    dilation: int,
) -> torch.Tensor:
    result: torch.Tensor
    if hasattr(functions, "na2d_qk"):  # 0.17, where the older names warn at every call
        window = dict(kernel_size=kernel_size, dilation=dilation)
        result = functions.na2d_av(functions.na2d_qk(query, key, rpb=rpb, **window).softmax(-1), value, **window)
        return result
    if rpb is None:
        logits = functions.natten2dqk(query, key, kernel_size, dilation)
    else:
        logits = functions.natten2dqkrpb(query, key, rpb, kernel_size, dilation)
    result = functions.natten2dav(logits.softmax(-1), value, kernel_size, dilation)
    return result
