"""The MLP of a block, linear layers, and how both are computed on a CPU."""

import platform
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from .ops import autocast, symbolic, transforms

# On a CPU without gradients, an MLP whose hidden layer takes LARGE_BYTES or more computes PIECE_BYTES of it at a time,
# which stay in the cache: 30 % less time. Smaller ones would be slower, because each product repacks the weights.
LARGE_BYTES, PIECE_BYTES = 32 << 20, 2 << 20
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _onednn_linear() -> Callable[..., torch.Tensor] | None:
    """The linear layer of oneDNN that torch.compile uses, which also computes what follows the layer.

    It is no public part of torch: None where this build has none, or not the one that `linear` knows how to call.
    """
    op = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if op is None or platform.machine() not in ("x86_64", "AMD64") or not hasattr(torch._C, "_get_mkldnn_enabled"):
        return None
    arguments = "(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y"
    found: Callable[..., torch.Tensor] = op
    return found if str(op.default._schema) == f"mkldnn::_linear_pointwise{arguments}" else None


def _mode_counters() -> tuple[Callable[[], int], ...] | None:
    """Functions that count the active modes of torch functions and of dispatch; None where this torch has none."""
    names = ("_len_torch_function_stack", "_len_torch_dispatch_stack")
    return tuple(getattr(torch._C, name) for name in names) if all(hasattr(torch._C, name) for name in names) else None


_LINEAR_POINTWISE = _onednn_linear()
_MODES = _mode_counters()
_LINEAR = nn.Linear.forward, F.linear  # what it stands for, unless someone has replaced them


class Mlp(nn.Module):
    """Linear, GELU, linear, each linear layer followed by dropout; ``[..., dim]`` to the same shape."""

    def __init__(self, dim: int, hidden: int, drop: float):
        super().__init__()
        self.hidden = hidden
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training and large_on_cpu(x, self.hidden) and plain(self.fc1, self.fc2, self.drop):
            return in_pieces(self._forward, x, self.hidden)
        return self._forward(x)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        drops = self.drop.training and self.drop.p > 0
        if torch.is_grad_enabled() and not drops and not is_recorded(x) and plain(self.drop):
            return linear_of_gelu(self.fc2, self.fc1(x))
        x = self.drop(linear(self.fc1, x, gelu=True))
        x = self.drop(linear(self.fc2, x))
        return x


def linear(layer: nn.Module, x: torch.Tensor, *, gelu: bool = False) -> torch.Tensor:
    """``layer(x)``, and GELU of it if wanted; ``[..., C]`` to ``[..., D]``.

    For inference on a CPU, oneDNN adds the bias and computes GELU while a product is in the cache; torch copies the
    bias into the output first, and makes GELU another pass.
    """
    if _LINEAR_POINTWISE is not None and type(layer) is nn.Linear and _can_fuse(layer, x):
        tensors = [x, layer.weight] if layer.bias is None else [x, layer.weight, layer.bias]
        if autocast.enabled("cpu"):
            tensors = [autocast.cast(tensor) for tensor in tensors]
        if _has_products({tensor.dtype for tensor in tensors}):
            weight, bias = tensors[1], None if layer.bias is None else tensors[2]
            return _LINEAR_POINTWISE(tensors[0], weight, bias, "gelu" if gelu else "none", [], "none")
    x = layer(x)
    return F.gelu(x) if gelu else x


def linear_of_gelu(layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """``layer(F.gelu(hidden))``; ``[..., C]`` to ``[..., D]``.

    In training on a CPU, the backward pass computes GELU again; torch would keep it, a fifth of a block's activations.
    """
    if type(layer) is nn.Linear and hidden.dim() > 1 and is_ordinary(layer, hidden) and hidden.requires_grad:
        # flattened outside of the function: its result must be no view, or nobody could change it in place
        tensors = [hidden.flatten(0, -2), layer.weight, layer.bias]
        if autocast.enabled("cpu"):
            tensors = [tensor if tensor is None else autocast.cast(tensor) for tensor in tensors]
        out: torch.Tensor = _LinearOfGelu.apply(*tensors)
        return out.view(*hidden.shape[:-1], len(layer.weight))
    x: torch.Tensor = layer(F.gelu(hidden))
    return x


class _LinearOfGelu(torch.autograd.Function):
    """``F.linear(F.gelu(hidden), weight, bias)`` of ``[N, C]``, which keeps `hidden` and not its GELU."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        return F.linear(F.gelu(hidden), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        of_hidden, of_weight, of_bias = ctx.needs_input_grad
        return (
            torch.ops.aten.gelu_backward(grad @ weight, hidden) if of_hidden else None,
            grad.t() @ F.gelu(hidden) if of_weight else None,
            grad.sum(0) if of_bias else None,
        )


def _can_fuse(layer: nn.Linear, x: torch.Tensor) -> bool:
    """Whether this is inference on a CPU, and oneDNN computes what `layer` would: it takes every tensor for dense."""
    if not is_ordinary(layer, x) or torch.is_grad_enabled() or not torch._C._get_mkldnn_enabled():
        return False
    return x.numel() > 0 and (layer.bias is None or layer.bias.is_contiguous())


def is_ordinary(layer: nn.Linear, x: torch.Tensor) -> bool:
    """Whether a function of its tensors, on a CPU, may stand for ``layer(x)``.

    They fit, are not of subclasses, and nobody watches: hooks, replaced functions, modes and transforms would not see
    the call of the layer.
    """
    if watched(x) or x.device.type != "cpu" or type(x) is not torch.Tensor or not x.is_floating_point():
        return False
    parameters = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    if any(type(tensor) is not nn.Parameter or tensor.device.type != "cpu" for tensor in parameters):
        return False
    if any(tensor.layout != torch.strided for tensor in (x, *parameters)) or x.shape[-1:] != layer.weight.shape[1:]:
        return False
    if layer.bias is not None and layer.bias.shape != layer.weight.shape[:1]:
        return False
    return (nn.Linear.forward, F.linear) == _LINEAR and plain(layer)


def is_ordinary_in_graph(layer: nn.Linear, x: torch.Tensor) -> bool:
    """`is_ordinary` while torch.compile traces, as far as its dynamo can tell; False where that is too old to."""
    return (
        symbolic.DYNAMO_DECIDES
        and x.device.type == "cpu"
        and type(x) is torch.Tensor
        and (nn.Linear.forward, F.linear) == _LINEAR
        and "forward" not in layer.__dict__
        and not hooked(layer)
        and not torch._C._len_torch_function_stack()
    )


def _has_products(dtypes: set[torch.dtype]) -> bool:
    """Whether oneDNN multiplies tensors of these dtypes on this CPU."""
    if dtypes == {torch.bfloat16}:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtypes == {torch.float32}


def is_recorded(x: torch.Tensor) -> bool:
    """Whether the calls on `x` are being recorded in a graph."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy)


def watched(x: torch.Tensor) -> bool:
    """Whether something else than PyTorch itself sees the calls on `x`: a recorder, a mode or a transform."""
    if is_recorded(x) or transforms.active():
        return True
    return bool(_MODES is None or any(count() for count in _MODES))


def large_on_cpu(x: torch.Tensor, hidden: int) -> bool:
    """Whether this is inference on a CPU, and an MLP with `hidden` channels on ``[..., C]`` is worth computing in
    pieces."""
    if is_recorded(x) or torch.is_grad_enabled() or x.device.type != "cpu":
        return False
    return x.numel() // x.shape[-1] * hidden * x.element_size() >= LARGE_BYTES


def plain(*modules: nn.Module, types: Collection[type[nn.Module]] = (nn.Linear, nn.Dropout)) -> bool:
    """Whether these modules can be called on parts of a map or a batch, or a function can stand for the call.

    All are of exactly these types, and have no hooks and no `forward` of their own. Others (a quantized layer, an
    adapter of PEFT) may depend on the whole.
    """
    return not hooked(*modules) and all(type(module) in types and "forward" not in vars(module) for module in modules)


def hooked(*modules: nn.Module) -> bool:
    """Whether there are hooks of these modules or of all modules; torch.compile can trace it."""
    if any(getattr(torch_module, f"_global{kind}") for kind in _HOOKS):
        return True
    return any(getattr(module, kind) for module in modules for kind in _HOOKS)


def in_pieces(mlp: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, hidden: int) -> torch.Tensor:
    """``mlp(x)`` for `x` of shape ``[..., C]``, computed for some pixels at a time."""
    pixels = max(1, PIECE_BYTES // (hidden * x.element_size()))
    pieces = x.flatten(0, -2).split(pixels)
    return torch.cat([mlp(piece) for piece in pieces]).view(x.shape)
