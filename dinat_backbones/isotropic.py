"""The isotropic models of the DiNAT paper (arXiv 2209.15001): equal blocks on one grid of patches."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from . import zoo
from .attention import GlobalAttention2D, NeighborhoodAttention2D
from .layers import Block, NormLayer, PatchEmbed, drop_path_rates, init_linear, run_block


class Isotropic(nn.Module):
    """NAT-iso, DiNAT-iso and ViT-rpb without their head; parameters are named as in the published files.

    Args:
        arch: a name of `zoo.ISOTROPIC`; further arguments override its values. None stands for the values of
            `nat_isotropic_small`.
        embed_dim, depth, num_heads, mlp_ratio, patch_size, patch_norm: the architecture; `patch_norm`: whether there is
            a norm after the patch embedding.
        kernel_size: side of the window; None stands for the whole grid, as in ViT-rpb.
        dilation_of_odd_blocks: of blocks 1, 3, 5, ... counted from 0; the even ones have dilation 1.
        img_size: side of the images, for ViT-rpb, which takes only images that are padded to the same number of
            patches. The others take any size.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
        qkv_bias, qk_scale, drop_rate, attn_drop_rate, rel_pos_bias, norm_layer, in_chans, with_cp, backend: see `NAT`.

    Raises:
        ValueError: an unknown `arch`, arguments that do not fit together.
        TypeError: an unknown argument.
    """

    stages_name = "layers"

    def __init__(
        self,
        arch: str | None = None,
        *,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        rel_pos_bias: bool = True,
        norm_layer: NormLayer = nn.LayerNorm,
        in_chans: int = 3,
        with_cp: bool = False,
        backend: str | None = None,
        **shape: Any,
    ):
        super().__init__()
        design = zoo.isotropic(arch or "nat_isotropic_small", **shape)
        self.with_cp = with_cp
        self.patch_embed = PatchEmbed(
            in_chans, design.embed_dim, norm_layer if design.patch_norm else None, design.patch_size
        )
        self.pos_drop = nn.Dropout(drop_rate)

        def attention(number: int) -> nn.Module:
            settings: dict[str, Any] = dict(
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                attn_drop=attn_drop_rate,
                proj_drop=drop_rate,
                rel_pos_bias=rel_pos_bias,
            )
            if design.kernel_size is None:
                size = -(-design.img_size // design.patch_size)
                return GlobalAttention2D(design.embed_dim, design.num_heads, size, **settings)
            dilation = (design.dilation_of_odd_blocks or 1) if number % 2 else 1
            return NeighborhoodAttention2D(
                design.embed_dim, design.num_heads, design.kernel_size, dilation, backend=backend, **settings
            )

        self.layers = nn.ModuleList(
            Block(design.embed_dim, design.mlp_ratio, drop_rate, drop_path, norm_layer, None, attention(number))
            for number, drop_path in enumerate(drop_path_rates(design.drop_path_rate, design.depth))
        )
        self.stage_channels = (design.embed_dim,) * design.depth
        self.stage_strides = (design.patch_size,) * design.depth
        self.apply(init_linear)

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """See `BackboneBase.get_layer_depth`."""
        top = len(self.layers) + 1
        name = param_name.removeprefix(prefix) if param_name.startswith(prefix) else ""
        block = re.match(r"layers\.(\d+)\.", name)
        if name.startswith("patch_embed."):
            return 0, top + 1
        return int(block[1]) + 1 if block else top - name.startswith("norm."), top + 1

    def stage_maps(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """Images ``[B, in_chans, H, W]`` to the output of every block, one at a time: ``[B, H / patch_size,
        W / patch_size, C]``, sizes rounded up."""
        x = self.pos_drop(self.patch_embed(x))
        for block in self.layers:
            x = run_block(block, x, self.with_cp)
            yield x
