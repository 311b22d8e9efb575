"""Checks of the op's arguments, the same for all its entry points."""

from collections.abc import Sequence

import torch


def check_window(kernel_size: int, dilation: int) -> None:
    """Raise a ValueError unless `kernel_size` is odd and at least 3, and `dilation` at least 1."""
    if kernel_size < 3 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size}: expected an odd number of at least 3")
    if dilation < 1:
        raise ValueError(f"dilation={dilation}: expected at least 1")


def check_call(
    qkv: Sequence[torch.Tensor],
    rpb: torch.Tensor | None,
    kernel_size: int,
    dilation: int,
    padding: torch.Tensor | None = None,
) -> None:
    """Raise a ValueError for the first invalid argument of a call.

    Args:
        qkv: query, key and value, ``[B, H, W, heads, head_dim]`` each, or one packed ``[B, H, W, 3, heads, head_dim]``.
        rpb, kernel_size, dilation, padding: as in `neighborhood_attention_2d_qkvpacked`.
    """
    check_window(kernel_size, dilation)
    if len(qkv) == 3:
        query, key, value = qkv
        shape, dtype, device = query.shape, query.dtype, query.device
        if len(shape) != 5 or shape != key.shape or shape != value.shape:
            raise ValueError(
                "query, key and value must share one shape [B, H, W, heads, head_dim]; got "
                f"{list(shape)}, {list(key.shape)}, {list(value.shape)}"
            )
        if dtype != key.dtype or dtype != value.dtype or not dtype.is_floating_point:
            raise ValueError(
                f"query, key and value must share one floating dtype; got {dtype}, {key.dtype}, {value.dtype}"
            )
        same_device = device == key.device and device == value.device
    elif len(qkv) == 1:
        shape, dtype, device = qkv[0].shape, qkv[0].dtype, qkv[0].device
        if len(shape) != 6 or shape[3] != 3:
            raise ValueError(f"qkv must be [B, H, W, 3, heads, head_dim]; got {list(shape)}")
        if not dtype.is_floating_point:
            raise ValueError(f"qkv must have a floating dtype; got {dtype}")
        same_device = True
    else:
        raise ValueError(f"expected query, key and value or one packed qkv; got {len(qkv)} tensors")
    if not same_device or (rpb is not None and device != rpb.device):
        devices = {str(t.device) for t in (*qkv, rpb) if t is not None}
        raise ValueError(f"query, key, value and rpb must be on one device; got {sorted(devices)}")
    height, width, heads, head_dim = shape[1], shape[2], shape[-2], shape[-1]
    if heads < 1 or head_dim < 1:
        raise ValueError(
            f"expected at least one head and one dimension per head; got heads={heads}, head_dim={head_dim}"
        )
    reach = kernel_size * dilation
    if padding is not None:
        check_padding(padding, qkv[0])
    elif height < reach or width < reach:
        raise ValueError(
            f"a {height}x{width} map is smaller than kernel_size * dilation = {kernel_size} * {dilation} = {reach}; "
            "zero-pad the input of qkv at the bottom and right first (NeighborhoodAttention2D does), or pass what qkv "
            "makes of zeros as padding"
        )
    if rpb is not None:
        span = 2 * kernel_size - 1
        if rpb.shape != (heads, span, span):
            raise ValueError(f"rpb has shape {list(rpb.shape)}; expected [heads, 2K-1, 2K-1] = {[heads, span, span]}")
        if not rpb.dtype.is_floating_point:
            raise ValueError(f"rpb must have a floating dtype; got {rpb.dtype}")


def check_padding(padding: torch.Tensor, qkv: torch.Tensor) -> None:
    """Raise a ValueError unless `padding` is ``[3, heads, head_dim]`` in the dtype and on the device of `qkv`."""
    expected = [3, *qkv.shape[-2:]]
    if list(padding.shape) != expected or padding.dtype != qkv.dtype or padding.device != qkv.device:
        raise ValueError(
            f"padding must be [3, heads, head_dim] = {expected} in {qkv.dtype} on {qkv.device}, like qkv; got "
            f"{list(padding.shape)} in {padding.dtype} on {padding.device}"
        )


def check_like_query(name: str, tensor: torch.Tensor, query: torch.Tensor) -> None:
    """Raise a ValueError unless the output or its gradient has the shape, dtype and device of `query`."""
    if tensor.shape != query.shape or tensor.dtype != query.dtype or tensor.device != query.device:
        raise ValueError(
            f"{name} must be like query, {list(query.shape)} in {query.dtype} on {query.device}; got "
            f"{list(tensor.shape)} in {tensor.dtype} on {tensor.device}"
        )


def check_lse(lse: torch.Tensor, query: torch.Tensor) -> None:
    """Raise a ValueError unless `lse` is ``[B, H, W, heads]`` in float32, contiguous, on the device of `query`."""
    if (
        lse.shape != query.shape[:-1]
        or lse.dtype != torch.float32
        or lse.device != query.device
        or not lse.is_contiguous()
    ):
        raise ValueError(
            f"lse must be what the forward pass returned, {list(query.shape[:-1])} in float32 on {query.device}; got "
            f"{list(lse.shape)} in {lse.dtype} on {lse.device}"
        )
