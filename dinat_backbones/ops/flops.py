"""Multiply-accumulates (MACs) as the published tables count them, from shapes alone.

Those tables are fvcore's "FLOPs": a multiply-accumulate counts as one, a LayerNorm as five per element, and additions,
softmax and activations as zero. They are counted by torch's own counter, where a multiply-accumulate is two. What
fvcore adds for BatchNorm and resampling, below 0.1 % of any published model, is left out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry, shape_wrapper

from .backends import BACKENDS
from .registration import CompiledBackend


def attention_macs(tokens: int, heads: int, head_dim: int, kernel_size: int, bias: bool = True) -> int:
    """MACs of neighborhood attention without its projections.

    Args:
        tokens: number of queries: batch x height x width of the map after padding.
        heads, head_dim, kernel_size: of the op.
        bias: with a relative positional bias, counted as one per key and head.

    Returns:
        ``tokens * heads * kernel_size**2`` times `head_dim` for the logits, 1 for the bias, `head_dim` for the values.
    """
    return tokens * heads * kernel_size**2 * (2 * head_dim + bias)


def _na2d(qkv: Sequence[torch.Size], rpb: torch.Size | None, kernel_size: int, *args: object, **kwargs: object) -> int:
    batch, height, width, *_, heads, head_dim = qkv[0]  # query or packed qkv
    return 2 * attention_macs(batch * height * width, heads, head_dim, kernel_size, rpb is not None)


def _na2d_backward(grad_out: torch.Size, out: Any, lse: Any, *call: Any, **kwargs: object) -> int:
    """As torch counts the backward pass of its own attention: the logits once more, then four products."""
    batch, height, width, heads, head_dim = grad_out
    rpb: torch.Size | None = call[1]
    kernel_size: int = call[2]
    tokens = batch * height * width
    products = 5 * attention_macs(tokens, heads, head_dim, kernel_size, bias=False) // 2
    return 2 * (products + 2 * (rpb is not None) * tokens * heads * kernel_size**2)  # bias, and its gradient


def _layer_norm(shape: torch.Size, *args: object, **kwargs: object) -> int:
    return 2 * 5 * shape.numel()


def _traced_na2d(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """A handle of fvcore and mmengine, which count MACs in traced graphs: see `attention_macs`."""
    batch, height, width, heads, head_dim = outputs[0].type().sizes()
    bias = inputs[1].type().kind() == "TensorType"
    return attention_macs(batch * height * width, heads, head_dim, inputs[2].toIValue(), bias)


_BACKENDS = [backend for backend in BACKENDS.values() if isinstance(backend, CompiledBackend)]
# Registered for all users of torch's counter. `register_flop_formula` does not work for custom ops in torch 2.3.
flop_registry.update({backend.op.overloadpacket: shape_wrapper(_na2d) for backend in _BACKENDS})
flop_registry.update({backend.backward_op.overloadpacket: shape_wrapper(_na2d_backward) for backend in _BACKENDS})
_FORMULAS = {torch.ops.aten.native_layer_norm: _layer_norm}
# For `set_op_handle` of mmengine's FlopAnalyzer and fvcore's FlopCountAnalysis. Adapters put them among the defaults.
TRACED_OPS: dict[str, Callable[..., Any]] = {
    f"dinat_backbones::na2d_{backend.name}": _traced_na2d for backend in _BACKENDS
}


def count_macs(function: Callable[..., Any], *args: Any) -> int:
    """MACs of one call, without gradients. On meta tensors nothing is computed, whatever the size.

    with torch.device("meta"):
        model = DiNAT(arch="dinat_mini", dilations="coco").eval()
        count_macs(model, torch.empty(1, 3, 800, 1280))  # 55399056000
    """
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        function(*args)
    return int(counter.get_total_flops()) // 2
