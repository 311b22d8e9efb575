"""Two-dimensional neighborhood attention with relative positional bias: one signature, several backends."""

from collections.abc import Callable, Sequence

import torch

from . import autocast
from .backends import BACKENDS, reference
from .checks import check_call
from .dispatch import choose_backend
from .padding import crop, pad_qkv
from .registration import CompiledBackend

__all__ = [
    "BACKENDS",
    "neighborhood_attention_2d",
    "neighborhood_attention_2d_qkvpacked",
    "neighborhood_attention_2d_with_weights",
]


def neighborhood_attention_2d(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rpb: torch.Tensor | None = None,
    *,
    kernel_size: int,
    dilation: int = 1,
    scale: float | None = None,
    padding: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Softmax attention of every pixel over its `kernel_size` x `kernel_size` dilated neighborhood.

    Along each axis the positions with equal ``index % dilation`` form a sequence of their own. Within it the window of
    position `p` starts at ``clamp(p - kernel_size // 2, 0, length - kernel_size)``: at borders it shifts; every query
    has exactly ``kernel_size ** 2`` keys (NAT, arXiv 2204.07143, section 3.1; DiNAT, arXiv 2209.15001, section 3.2).

    Args:
        query, key, value: ``[B, H, W, heads, head_dim]``, one floating dtype, one device; any strides. Under
            `torch.autocast` they are cast to its dtype (float64 is not), as for PyTorch's own attention.
        rpb: relative positional bias ``[heads, 2 * kernel_size - 1, 2 * kernel_size - 1]`` or None; its index per axis
            is ``key_position - query_position + kernel_size - 1``, positions counted inside the sequence.
        kernel_size: odd, at least 3.
        dilation: at least 1; without `padding`, H and W must be at least ``kernel_size * dilation``.
        scale: multiplies the query; None stands for ``head_dim ** -0.5``.
        padding: what query, key and value are outside of the map, ``[3, heads, head_dim]`` like them: with it a map may
            have any size, and one smaller than ``kernel_size * dilation`` counts as padded to that at the bottom and
            the right. These keys and values take part in the attention; of queries there are none. With the bias of
            qkv it is as if the input of qkv had been padded with zeros, without a copy where the backend pads.
        backend: one of `BACKENDS`; None takes the first that supports the call.

    Returns:
        ``[B, H, W, heads, head_dim]`` in the dtype of `query`. Softmax and the gradient of `rpb` accumulate in float32
        (float64 for float64 inputs). Second derivatives and the transforms of `torch.func` are computed in plain
        PyTorch, which takes more memory and time.

    Raises:
        ValueError: shapes, sizes, dtypes or devices that do not fit together, an unknown `backend`.
        RuntimeError: the named `backend` does not support the call; the message has all its reasons.
    """
    return _attend((query, key, value), rpb, kernel_size, dilation, scale, backend, padding)


def neighborhood_attention_2d_qkvpacked(
    qkv: torch.Tensor,
    rpb: torch.Tensor | None = None,
    *,
    kernel_size: int,
    dilation: int = 1,
    scale: float | None = None,
    padding: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """`neighborhood_attention_2d` of one tensor ``[B, H, W, 3, heads, head_dim]``, as a qkv projection leaves it.

    Arguments, result and errors are the same otherwise. The gradient of `qkv` is one tensor as well, which saves a copy
    in backends that support it.
    """
    return _attend((qkv,), rpb, kernel_size, dilation, scale, backend, padding)


def neighborhood_attention_2d_with_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rpb: torch.Tensor | None = None,
    *,
    kernel_size: int,
    dilation: int = 1,
    scale: float | None = None,
    dropout: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`neighborhood_attention_2d` and its attention weights, in plain PyTorch.

    Args:
        query, key, value, rpb, kernel_size, dilation, scale: see `neighborhood_attention_2d`.
        dropout: applied to the weights before they multiply the values.

    Returns:
        The output, and the weights before dropout ``[B, H, W, heads, K, K]`` (rows, then columns of the window) in
        float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, sizes, dtypes or devices that do not fit together.
    """
    check_call((query, key, value), rpb, kernel_size, dilation)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    weights = reference.weights(query, key, rpb, kernel_size, dilation, scale)
    dropped = weights if dropout is None else dropout(weights)
    return reference.apply_weights(dropped, value, kernel_size, dilation), weights


def _attend(
    qkv: Sequence[torch.Tensor],
    rpb: torch.Tensor | None,
    kernel_size: int,
    dilation: int,
    scale: float | None,
    backend: str | None,
    padding: torch.Tensor | None,
) -> torch.Tensor:
    device_type = qkv[0].device.type
    casts = autocast.enabled(device_type)
    if casts:
        qkv = [autocast.cast(tensor) for tensor in qkv]
        padding = None if padding is None else autocast.cast(padding)
    check_call(qkv, rpb, kernel_size, dilation, padding)
    scale = float(qkv[0].shape[-1] ** -0.5 if scale is None else scale)
    if casts:
        with torch.autocast(device_type, enabled=False):
            return _run(qkv, rpb, kernel_size, dilation, scale, backend, padding)
    return _run(qkv, rpb, kernel_size, dilation, scale, backend, padding)


def _run(
    qkv: Sequence[torch.Tensor],
    rpb: torch.Tensor | None,
    kernel_size: int,
    dilation: int,
    scale: float,
    backend: str | None,
    padding: torch.Tensor | None,
) -> torch.Tensor:
    chosen = choose_backend(qkv, rpb, kernel_size, dilation, scale, backend)
    if not chosen.traceable and not torch.compiler.is_compiling() and torch.jit.is_tracing():
        _refuse_legacy_exporter()
    if padding is not None and isinstance(chosen, CompiledBackend) and chosen.pads:
        return chosen.attention(qkv, rpb, kernel_size, dilation, scale, padding)
    _, height, width, *_ = qkv[0].shape
    qkv = pad_qkv(qkv, padding, kernel_size * dilation)
    if len(qkv) == 1 and not chosen.takes_packed_qkv:
        qkv = qkv[0].unbind(3)
    out = chosen.attention(qkv, rpb, kernel_size, dilation, scale)
    return out if padding is None else crop(out, height, width)


def _refuse_legacy_exporter() -> None:
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "the legacy ONNX exporter cannot export this op: use torch.onnx.export(..., dynamo=True) or `dinat export "
            "--format onnx`, which keep sizes open; a model built with backend='exportable' passes it for one size"
        )
