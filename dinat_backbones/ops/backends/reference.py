"""The definition of neighborhood attention in plain PyTorch: every query gathers its keys. Slow, written to be read."""

from collections.abc import Sequence

import torch

from .base import Backend


def window(length: int, kernel_size: int, dilation: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of every query along one axis.

    Returns:
        Two int64 tensors ``[length, kernel_size]``: the key's index on the axis, and its bias index
        ``key_position - query_position + kernel_size - 1`` with positions counted inside the query's dilation group.
    """
    index = torch.arange(length, device=device)
    group, position = index % dilation, index // dilation
    group_length = (length - group + dilation - 1) // dilation
    start = torch.minimum((position - kernel_size // 2).clamp(min=0), group_length - kernel_size)
    keys = start[:, None] + torch.arange(kernel_size, device=device)
    return keys * dilation + group[:, None], keys - position[:, None] + kernel_size - 1


def weights(
    query: torch.Tensor, key: torch.Tensor, rpb: torch.Tensor | None, kernel_size: int, dilation: int, scale: float
) -> torch.Tensor:
    """Attention weights ``[B, H, W, heads, K, K]`` (rows, then columns of the window), in float32 or float64."""
    _, height, width, heads, _ = query.shape
    rows, row_bias = window(height, kernel_size, dilation, query.device)
    columns, column_bias = window(width, kernel_size, dilation, query.device)
    accumulate = torch.promote_types(query.dtype, torch.float32)
    keys = gather(key, rows, columns).to(accumulate)
    logits = torch.einsum("bhwnd,bhiwjnd->bhwnij", query.to(accumulate) * scale, keys)
    if rpb is not None:
        bias = rpb[:, row_bias[:, None, :, None], column_bias[None, :, None, :]]  # [heads, H, W, K, K]
        logits = logits + bias.permute(1, 2, 0, 3, 4)
    return logits.flatten(-2).softmax(-1).reshape(logits.shape)


def gather(source: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """``[B, H, W, heads, head_dim]`` to the window of every query, ``[B, H, K, W, K, heads, head_dim]``."""
    return source[:, rows][:, :, :, columns]


def apply_weights(probabilities: torch.Tensor, value: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    """Sum the values of every window with weights ``[B, H, W, heads, K, K]``; result in the dtype of `value`."""
    _, height, width, _, _ = value.shape
    rows, _ = window(height, kernel_size, dilation, value.device)
    columns, _ = window(width, kernel_size, dilation, value.device)
    values = gather(value, rows, columns).to(probabilities.dtype)
    return torch.einsum("bhwnij,bhiwjnd->bhwnd", probabilities, values).to(value.dtype)


class ReferenceBackend(Backend):
    """Any device and dtype; used only when named."""

    traceable = True

    def automatic(self, device: torch.device) -> bool:
        """See `Backend`."""
        return False

    def attention(
        self, qkv: Sequence[torch.Tensor], rpb: torch.Tensor | None, kernel_size: int, dilation: int, scale: float
    ) -> torch.Tensor:
        """See `Backend`."""
        query, key, value = qkv
        probabilities = weights(query, key, rpb, kernel_size, dilation, scale)
        return apply_weights(probabilities, value, kernel_size, dilation)
