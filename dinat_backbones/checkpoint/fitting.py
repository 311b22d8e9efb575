"""Tensors of a file made to fit a model of another kernel size or of images with other channels."""

import math
from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional

FIRST_CONVOLUTIONS = ("patch_embed.proj.0.weight", "patch_embed.proj.weight")
RGB = 3


def fitted(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Those tensors of a file that have to be changed to fit a model, by their names: bias tables resized (see
    `resize_rpb`), and the first convolution adapted to other image channels (see `adapt_image_channels`).

    Args:
        own: the model's state dict.
        state: the file's tensors under the model's names.
    """
    return resize_rpb_to(own, state), adapt_image_channels_to(own, state)


def adapt_image_channels_to(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first convolution of an RGB model for the channels of the images that the model of `own` takes, by its name;
    empty if the channels are the same, or the file's model is not for RGB."""
    return {
        key: adapt_image_channels(state[key], own[key].shape[1])
        for key in FIRST_CONVOLUTIONS
        if key in own and key in state and state[key].dim() == own[key].dim() == 4
        if state[key].shape[1] == RGB != own[key].shape[1]
    }


def adapt_image_channels(weight: Tensor, channels: int) -> Tensor:
    """The weight ``[out, 3, K, K]`` of a convolution over RGB images, for images of other channels, as timm has it.

    One channel gets the sum of the three, so that a gray image gives what it gave as RGB. Several get the three in
    turn, times ``3 / channels``.
    """
    if channels == 1:
        return weight.float().sum(1, keepdim=True).to(weight.dtype)
    repeated = weight.float().repeat(1, math.ceil(channels / RGB), 1, 1)[:, :channels]
    return (repeated * (RGB / channels)).to(weight.dtype)


def resize_rpb(table: Tensor, kernel_size: int) -> Tensor:
    """The bias tables of another kernel size, each head's interpolated bicubically, corners not aligned.

    The released 11x11 ImageNet-22k weights were made from the 7x7 ones by such a resize of 13x13 to 21x21 entries; how
    its corners were aligned was not published.

    Args:
        table: ``[heads, 2K-1, 2K-1]``, floating point.
        kernel_size: the new K, odd.

    Returns:
        ``[heads, 2*kernel_size-1, 2*kernel_size-1]`` in the dtype of `table`.

    Raises:
        ValueError: `table` has another shape or `kernel_size` is not odd.
    """
    if not _is_rpb(table):
        raise ValueError(f"an rpb table of shape {list(table.shape)}; expected [heads, 2K-1, 2K-1] with an odd K")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size}: expected an odd number of at least 1")
    size = 2 * kernel_size - 1
    if table.shape[-1] == size:
        return table
    resized = functional.interpolate(table[None].float(), size=(size, size), mode="bicubic", align_corners=False)
    return resized[0].to(table.dtype)


def _is_rpb(table: Tensor) -> bool:
    return table.dim() == 3 and table.shape[1] == table.shape[2] and table.shape[1] % 4 == 1


def resize_all_rpb(state: Mapping[str, Tensor], kernel_size: int) -> dict[str, Tensor]:
    """Those bias tables of `state` that belong to another kernel size, resized; by their names."""
    tables = {key: table for key, table in state.items() if key.endswith(".attn.rpb") and _is_rpb(table)}
    return {k: resize_rpb(t, kernel_size) for k, t in tables.items() if t.shape[-1] != 2 * kernel_size - 1}


def resize_rpb_to(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`resize_all_rpb` to the kernel size of the model whose state dict `own` is."""
    table = next((value for key, value in own.items() if key.endswith(".attn.rpb")), None)
    return {} if table is None or not _is_rpb(table) else resize_all_rpb(state, table.shape[-1] // 2 + 1)
