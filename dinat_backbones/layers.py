"""The layers of the backbones, from the patch embedding to a stage. Maps between layers are ``[B, H, W, C]``.

Module names are those of the published checkpoints.
"""

import platform
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint

from .ops import autocast, transforms

NormLayer = Callable[[int], nn.Module]  # called with a width

# On a CPU without gradients, an MLP whose hidden layer takes LARGE_BYTES or more computes PIECE_BYTES of it at a time,
# which stay in the cache: 30 % less time. Smaller ones would be slower, because each product repacks the weights.
LARGE_BYTES, PIECE_BYTES = 32 << 20, 2 << 20


def _onednn_linear() -> Callable[..., torch.Tensor] | None:
    """The linear layer of oneDNN that torch.compile uses, which also computes what follows the layer.

    It is no public part of torch: None where this build has none, or not the one that `linear` knows how to call.
    """
    queries = ("_len_torch_function_stack", "_len_torch_dispatch_stack", "_get_mkldnn_enabled")  # of `_can_fuse`
    op = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if op is None or platform.machine() not in ("x86_64", "AMD64") or not all(hasattr(torch._C, q) for q in queries):
        return None
    arguments = "(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y"
    found: Callable[..., torch.Tensor] = op
    return found if str(op.default._schema) == f"mkldnn::_linear_pointwise{arguments}" else None


_LINEAR_POINTWISE = _onednn_linear()
_LINEAR = nn.Linear.forward, F.linear  # what it stands for, unless someone has replaced them


def check_images(x: torch.Tensor, channels: int | None) -> None:
    """ValueError unless these are images ``[B, channels, H, W]`` of floating point; None for any number of channels."""
    if x.dim() != 4:
        hint = "; one image without a batch dimension is given as images[None]" if x.dim() == 3 else ""
        raise ValueError(f"images of shape {list(x.shape)}: expected [B, {channels or 'C'}, H, W]{hint}")
    if channels is not None and x.shape[1] != channels:
        last = x.shape[3] == channels
        hint = (
            "images.permute(0, 3, 1, 2) moves the channels"
            if last
            else f"in_chans={x.shape[1]} builds a model for them"
        )
        raise ValueError(f"images of shape {list(x.shape)}: expected [B, {channels}, H, W]; {hint}")
    if not x.is_floating_point() and not x.is_quantized:
        raise ValueError(
            f"images of dtype {x.dtype}: expected floating point, normalized with the mean and standard deviation that "
            "the weights were trained with (zoo.IMAGENET_MEAN and IMAGENET_STD, of pixels from 0 to 255)"
        )


torch.fx.wrap("check_images")  # a call in traced graphs: they have no sizes to decide by


class ConvTokenizer(nn.Module):
    """Two 3x3 stride-2 convolutions and a norm: ``[B, in_chans, H, W]`` to ``[B, ceil(H/4), ceil(W/4), embed_dim]``."""

    def __init__(self, in_chans: int, embed_dim: int, norm_layer: NormLayer | None):
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim // 2, 3, stride=2, padding=1),
            nn.Conv2d(embed_dim // 2, embed_dim, 3, stride=2, padding=1),
        )
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_images(x, getattr(self.proj[0], "in_channels", None))
        # channels_last makes the permutation below a view of contiguous memory
        x = self.proj(x.contiguous(memory_format=torch.channels_last))
        x = self.norm(x.permute(0, 2, 3, 1))
        return x


class ConvDownsampler(nn.Module):
    """A 3x3 stride-2 convolution and a norm: ``[B, H, W, C]`` to ``[B, ceil(H/2), ceil(W/2), 2C]``."""

    def __init__(self, dim: int, norm_layer: NormLayer):
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
        self.norm = norm_layer(2 * dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 3, 1, 2)
        if torch.compiler.is_dynamo_compiling():
            # Inductor saves the convolution's input for the backward pass, and fails to order the strides of a saved
            # view if they are open. A product is no view, and costs nothing: it is fused into what computes `x`.
            # `clone` would not do, since Inductor removes it.
            x = x * 1
        x = self.norm(self.reduction(x).permute(0, 2, 3, 1))
        return x


class PatchEmbed(nn.Module):
    """Patches of side P: ``[B, in_chans, H, W]``, zero-padded to multiples of P, to ``[B, H/P, W/P, embed_dim]``."""

    def __init__(self, in_chans: int, embed_dim: int, norm_layer: NormLayer | None, patch_size: int = 4):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_images(x, getattr(self.proj, "in_channels", None))
        x = F.pad(x, (0, -x.shape[3] % self.patch_size, 0, -x.shape[2] % self.patch_size))
        x = self.proj(x.contiguous(memory_format=torch.channels_last))
        x = self.norm(x.permute(0, 2, 3, 1))
        return x


class PatchMerging(nn.Module):
    """Merges 2x2 pixels into one: ``[B, H, W, C]``, zero-padded to even sizes, to ``[B, H/2, W/2, 2C]`` rounded up."""

    def __init__(self, dim: int, norm_layer: NormLayer):
        super().__init__()
        self.norm = norm_layer(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        # published channel order, as (row, column): (0,0) (1,0) (0,1) (1,1)
        x = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], dim=-1)
        x = self.reduction(self.norm(x))
        return x


class DropPath(nn.Module):
    """Stochastic depth of ``[B, H, W, C]``: in training, a sample's residual branch is dropped with probability `p`,
    else scaled up."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        keep = 1 - self.p
        return x * (x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(keep) / keep)

    def extra_repr(self) -> str:
        return f"p={self.p:.3f}"


class Mlp(nn.Module):
    """Linear, GELU, linear, each linear layer followed by dropout; ``[..., dim]`` to the same shape."""

    def __init__(self, dim: int, hidden: int, drop: float):
        super().__init__()
        self.hidden = hidden
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training and large_on_cpu(x, self.hidden) and can_run_in_pieces(self.fc1, self.fc2, self.drop):
            return in_pieces(self._forward, x, self.hidden)
        return self._forward(x)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
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


def _can_fuse(layer: nn.Linear, x: torch.Tensor) -> bool:
    """Whether oneDNN computes what `layer` would, and nobody watches the layer.

    oneDNN checks no shapes and takes every tensor for dense. Hooks, replaced functions, modes and transforms would not
    see its product.
    """
    if not _plain_on_cpu(x) or type(x) is not torch.Tensor or not x.is_floating_point() or not x.numel():
        return False
    weight, bias = layer.weight, layer.bias
    parameters = [weight] if bias is None else [weight, bias]
    if any(type(tensor) is not nn.Parameter or tensor.device.type != "cpu" for tensor in parameters):
        return False
    if any(tensor.layout != torch.strided for tensor in (x, *parameters)) or x.shape[-1:] != weight.shape[1:]:
        return False
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_contiguous()):
        return False
    watched = torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack() or transforms.active()
    replaced = "forward" in layer.__dict__ or (nn.Linear.forward, F.linear) != _LINEAR
    return not watched and not replaced and can_run_in_pieces(layer) and torch._C._get_mkldnn_enabled()


def _has_products(dtypes: set[torch.dtype]) -> bool:
    """Whether oneDNN multiplies tensors of these dtypes on this CPU."""
    if dtypes == {torch.bfloat16}:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtypes == {torch.float32}


def _plain_on_cpu(x: torch.Tensor) -> bool:
    """Whether this is inference on a CPU, and not being recorded."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy)
    return not traced and not torch.is_grad_enabled() and x.device.type == "cpu"


def large_on_cpu(x: torch.Tensor, hidden: int) -> bool:
    """Whether an MLP with `hidden` channels on ``[..., C]`` is worth computing in pieces."""
    return _plain_on_cpu(x) and x.numel() // x.shape[-1] * hidden * x.element_size() >= LARGE_BYTES


def can_run_in_pieces(*modules: nn.Module, types: tuple[type[nn.Module], ...] = (nn.Linear, nn.Dropout)) -> bool:
    """Whether these modules can be called on pieces of a map: all are of exactly these types and have no hooks.

    Others (a quantized layer, an adapter of PEFT) may depend on the whole map.
    """
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return False
    return all(
        type(module) in types and not module._forward_hooks and not module._forward_pre_hooks for module in modules
    )


def in_pieces(mlp: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, hidden: int) -> torch.Tensor:
    """``mlp(x)`` for `x` of shape ``[..., C]``, computed for some pixels at a time."""
    pixels = max(1, PIECE_BYTES // (hidden * x.element_size()))
    pieces = x.flatten(0, -2).split(pixels)
    return torch.cat([mlp(piece) for piece in pieces]).view(x.shape)


class Block(nn.Module):
    """Pre-norm transformer block on ``[B, H, W, dim]``.

    Args:
        dim: channels.
        mlp_ratio: hidden channels of the MLP, as a multiple of `dim`.
        drop: dropout in the MLP.
        drop_path: probability of stochastic depth.
        norm_layer: called with `dim`.
        layer_scale: initial value of the learned factors `gamma1`, `gamma2`; None for none.
        attention: ``[B, H, W, dim]`` to the same shape.
    """

    gamma1: nn.Parameter | None
    gamma2: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        mlp_ratio: float,
        drop: float,
        drop_path: float,
        norm_layer: NormLayer,
        layer_scale: float | None,
        attention: nn.Module,
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = attention
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm_layer(dim)
        self.hidden = int(dim * mlp_ratio)
        self.mlp = Mlp(dim, self.hidden, drop)
        for name in ("gamma1", "gamma2"):
            gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))
            self.register_parameter(name, gamma)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self._branch(self.attn(self.norm1(x)), self.gamma1)
        x = x + self._branch(self.mlp(self.norm2(x)), self.gamma2)
        return x

    def _branch(self, x: torch.Tensor, gamma: torch.Tensor | None) -> torch.Tensor:
        x = self.drop_path(x if gamma is None else gamma * x)
        return x


class Stage(nn.Module):
    """Blocks, then (except in the last stage) a downsampler; `with_cp`: activation checkpointing of each block."""

    def __init__(self, blocks: Sequence[Block], downsample: nn.Module | None, with_cp: bool):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.with_cp = with_cp

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the feature map of this stage and the input of the next one, both ``[B, H, W, C]``."""
        for block in self.blocks:
            x = run_block(block, x, self.with_cp)
        return x, x if self.downsample is None else self.downsample(x)


def run_block(block: nn.Module, x: torch.Tensor, with_cp: bool) -> torch.Tensor:
    """``block(x)``; if `with_cp` and gradients are on, the backward pass recomputes its activations."""
    recompute = with_cp and torch.is_grad_enabled() and not isinstance(x, torch.fx.Proxy)
    x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
    return x


def drop_path_rates(last: float, blocks: int) -> list[float]:
    """Stochastic depth of every block: from 0 in equal steps to `last`.

    Raises:
        ValueError: `last` is not in [0, 1).
    """
    if not 0 <= last < 1:
        raise ValueError(f"drop_path_rate={last}: expected at least 0 and less than 1")
    return [last * i / max(1, blocks - 1) for i in range(blocks)]


def init_linear(module: nn.Module) -> None:
    """Truncated normal weights of standard deviation 0.02 and zero biases, as in the original code."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
