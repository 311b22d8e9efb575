"""The backbone's modules with their children under the names of transformers' files.

Construction and forward pass are inherited from the backbone's modules; properties give the renamed children their
original names as well.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from ...attention import NeighborhoodAttention2D
from ...backbone import BackboneBase
from ...layers import Block, ConvDownsampler, ConvTokenizer, Stage, drop_path_rates, normed, per_sample
from ...mlp import in_pieces, large_on_cpu, plain
from .configuration import NatConfig


def _rename(module: nn.Module, **names: str) -> None:
    """Rename children of `module`, ``old="new"``; they move to the end."""
    for old, new in names.items():
        module._modules[new] = module._modules.pop(old)


def _alias(name: str) -> property:
    return property(lambda self: getattr(self, name))


def _layer_scale(layer: Any, row: int) -> torch.Tensor | None:
    return None if layer.layer_scale_parameters is None else layer.layer_scale_parameters[row]


class NatPatchEmbeddings(ConvTokenizer):
    """The two convolutions: ``[B, num_channels, H, W]`` to ``[B, ceil(H/4), ceil(W/4), embed_dim]``."""

    projection: nn.Sequential
    proj = _alias("projection")

    def __init__(self, config: NatConfig):
        if config.patch_size not in (4, [4, 4], (4, 4)):
            raise ValueError(f"patch_size={config.patch_size}: expected 4, the only one of NAT and DiNAT")
        super().__init__(config.num_channels, config.embed_dim, norm_layer=None)
        self.num_channels = config.num_channels
        _rename(self, proj="projection")

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if pixel_values.dim() != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"pixel_values has shape {list(pixel_values.shape)}; expected [B, {self.num_channels}, H, W], as the "
                "configuration's num_channels says"
            )
        return super().forward(pixel_values)


class NatEmbeddings(nn.Module):
    """Patch embeddings, norm and dropout."""

    def __init__(self, config: NatConfig):
        super().__init__()
        self.patch_embeddings = NatPatchEmbeddings(config)
        self.norm = nn.LayerNorm(config.embed_dim)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.dropout(normed(self.norm, self.patch_embeddings(pixel_values)))


@per_sample
class NatSelfAttention(NeighborhoodAttention2D):
    """The attention with three projections, and without the last one."""

    def __init__(self, config: NatConfig, dim: int, num_heads: int, dilation: int):
        drop = config.attention_probs_dropout_prob
        super().__init__(dim, num_heads, config.kernel_size, dilation, qkv_bias=config.qkv_bias, attn_drop=drop)
        del self.qkv
        # Called as modules, not as one product of joined weights, so that hooks and replacements of them take effect.
        self.query, self.key, self.value = (nn.Linear(dim, dim, bias=config.qkv_bias) for _ in range(3))
        self.proj = nn.Identity()  # type: ignore[assignment]  # `NatAttention` has it

    def _projections(self) -> tuple[nn.Linear, ...]:
        return self.query, self.key, self.value


@per_sample
class NatOutput(nn.Module):
    """Linear and dropout, the end of both branches of a layer."""

    def __init__(self, width: int, dim: int, drop: float):
        super().__init__()
        self.dense = nn.Linear(width, dim)
        self.dropout = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.dense(x))


@per_sample
class NatAttention(nn.Module):
    """Attention and its last projection; see `NeighborhoodAttention2D` for `return_attention`."""

    def __init__(self, config: NatConfig, dim: int, num_heads: int, dilation: int):
        super().__init__()
        self.self = NatSelfAttention(config, dim, num_heads, dilation)
        self.output = NatOutput(dim, dim, config.attention_probs_dropout_prob)

    def forward(self, x: torch.Tensor, return_attention: bool = False):
        if not return_attention:
            return self.output(self.self(x))
        x, attention = self.self(x, return_attention=True)
        return self.output(x), attention


@per_sample
class NatIntermediate(nn.Module):
    """Linear and activation, the beginning of the MLP."""

    def __init__(self, config: NatConfig, dim: int, width: int):
        super().__init__()
        self.dense = nn.Linear(dim, width)
        self.activation = ACT2FN[config.hidden_act] if isinstance(config.hidden_act, str) else config.hidden_act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.dense(x))


per_sample(type(ACT2FN["gelu"]))


class NatLayer(GradientCheckpointingLayer, Block):
    """The backbone's block. With `output_attentions` also returns the weights ``[B, heads, H, W, K * K]``, float32."""

    layernorm_before: nn.Module
    layernorm_after: nn.Module
    attention: NatAttention
    layer_scale_parameters: nn.Parameter | None
    norm1, attn, norm2 = _alias("layernorm_before"), _alias("attention"), _alias("layernorm_after")
    gamma1, gamma2 = (property(partial(_layer_scale, row=row)) for row in (0, 1))

    def __init__(self, config: NatConfig, dim: int, num_heads: int, dilation: int, drop_path: float):
        norm = partial(nn.LayerNorm, eps=config.layer_norm_eps)
        attention = NatAttention(config, dim, num_heads, dilation)
        super().__init__(dim, config.mlp_ratio, 0.0, drop_path, norm, None, attention)
        _rename(self, norm1="layernorm_before", attn="attention", norm2="layernorm_after")
        del self.mlp, self.gamma1, self.gamma2
        self.intermediate = NatIntermediate(config, dim, self.hidden)
        self.output = NatOutput(self.hidden, dim, config.hidden_dropout_prob)
        scale = config.layer_scale_init_value
        scales = nn.Parameter(torch.full((2, dim), float(scale))) if scale > 0 else None
        self.register_parameter("layer_scale_parameters", scales)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # the backbone only calls it
        """As the backbone's `Mlp`."""
        if not self.training and large_on_cpu(x, self.hidden):
            modules = (*self.intermediate.modules(), *self.output.modules())
            types = (NatIntermediate, NatOutput, nn.Linear, nn.Dropout, type(ACT2FN["gelu"]))
            if plain(*modules, types=types):
                return in_pieces(self._mlp, x, self.hidden)
        return self._mlp(x)

    def _mlp(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.intermediate(x))

    def forward(self, x: torch.Tensor, output_attentions: bool = False):
        if not output_attentions:
            return super().forward(x)
        attended, attention = self.attention(self.layernorm_before(x), return_attention=True)
        x = x + self.drop_path(self._scaled(attended, self.gamma1))
        x = self._add(x, self.layernorm_after, self.mlp, self.gamma2)
        return x, attention.permute(0, 3, 1, 2, 4, 5).flatten(4)


class NatStage(Stage):
    """The backbone's stage."""

    layers: nn.ModuleList
    blocks = _alias("layers")

    def __init__(self, layers: list[NatLayer], downsample: nn.Module | None):
        super().__init__(layers, downsample, with_cp=False)
        _rename(self, blocks="layers")

    def forward(self, x: torch.Tensor, output_attentions: bool = False):
        """As `Stage.forward`, and the attention weights of the last layer or None."""
        if not output_attentions:
            return *super().forward(x), None
        for layer in self.layers[:-1]:
            x = layer(x)
        x, attention = self.layers[-1](x, True)
        return x, x if self.downsample is None else self.downsample(x), attention


class NatEncoder(nn.Module):
    """The first `built_stages` stages, or all of them."""

    def __init__(self, config: NatConfig, built_stages: int | None = None):
        super().__init__()
        dilations: Any = [[1] * depth for depth in config.depths]
        if config.model_type == "dinat":
            dilations = config.dilations
        BackboneBase.check_arguments(config.depths, config.num_heads, dilations, -1)
        drop_path = iter(drop_path_rates(config.drop_path_rate, sum(config.depths)))
        self.levels = nn.ModuleList()
        built = len(config.depths) if built_stages is None else built_stages
        for i, (heads, stage) in enumerate(zip(config.num_heads[:built], dilations[:built], strict=True)):
            dim = config.embed_dim * 2**i
            layers = [NatLayer(config, dim, heads, dilation, next(drop_path)) for dilation in stage]
            downsample = ConvDownsampler(dim, nn.LayerNorm) if i + 1 < built else None
            self.levels.append(NatStage(layers, downsample))

    def forward(self, x: torch.Tensor, output_attentions: bool = False):
        """``[B, H, W, embed_dim]`` to three tuples: the maps that enter the stages and the last one's output, the map
        of the embeddings and the stages' own outputs, the attention weights of every stage's last layer."""
        inputs, outputs, attentions = [x], [x], []
        for stage in self.levels:
            features, x, attention = stage(x, output_attentions)
            inputs.append(x)
            outputs.append(features)
            attentions.append(attention)
        return tuple(inputs), tuple(outputs), tuple(attentions) if output_attentions else None
