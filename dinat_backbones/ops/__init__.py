"""Two-dimensional neighborhood attention with relative positional bias: one signature, several backends."""

import types

import torch

from . import cpu, exportable, natten, reference, tiled, triton

# In order of preference; the first one with nothing to object runs. `reference` is for reading and for tests.
BACKENDS: dict[str, types.ModuleType] = {
    "cpu": cpu,
    "triton": triton,
    "natten": natten,
    "tiled": tiled,
    "exportable": exportable,
    "reference": reference,
}


def neighborhood_attention_2d(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rpb: torch.Tensor | None = None,
    *,
    kernel_size: int,
    dilation: int = 1,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Softmax attention of every pixel over its `kernel_size` x `kernel_size` dilated neighborhood.

    Along each axis the positions with equal ``index % dilation`` form a sequence of their own. Within it the window of
    position `p` starts at ``clamp(p - kernel_size // 2, 0, length - kernel_size)``: at borders it shifts; every query
    has exactly ``kernel_size ** 2`` keys (NAT, arXiv 2204.07143, section 3.1; DiNAT, arXiv 2209.15001, section 3.2).

    Args:
        query, key, value: ``[B, H, W, heads, head_dim]``, one floating dtype, one device; any strides.
        rpb: relative positional bias ``[heads, 2 * kernel_size - 1, 2 * kernel_size - 1]`` or None; its index per axis
            is ``key_position - query_position + kernel_size - 1``, positions counted inside the sequence.
        kernel_size: odd, at least 3 (1 would attend to itself alone).
        dilation: at least 1; H and W must be at least ``kernel_size * dilation``.
        scale: multiplies the query; None stands for ``head_dim ** -0.5``.
        backend: one of `BACKENDS` to insist on it; None takes the first that supports the call.

    Returns:
        ``[B, H, W, heads, head_dim]`` in the dtype of `query`. Softmax and the gradient of `rpb` accumulate in float32
        (float64 for float64 inputs).

    Raises:
        ValueError: shapes, sizes or dtypes that do not fit together, an unknown `backend`.
        RuntimeError: `backend` was named but does not support the call; the message holds all its reasons.
    """
    module, settings = _choose(query, key, value, rpb, kernel_size, dilation, scale, backend)
    return module.attention(query, key, value, *settings)


def neighborhood_attention_2d_qkvpacked(
    qkv: torch.Tensor,
    rpb: torch.Tensor | None = None,
    *,
    kernel_size: int,
    dilation: int = 1,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """`neighborhood_attention_2d` of one tensor ``[B, H, W, 3, heads, head_dim]``, as a qkv projection leaves it.

    Its gradient comes in one tensor, too, which saves a copy where the backend can do that.
    """
    if qkv.dim() != 6 or qkv.shape[3] != 3:
        raise ValueError(f"qkv must be [B, H, W, 3, heads, head_dim]; got {list(qkv.shape)}")
    query, key, value = qkv.unbind(3)
    module, settings = _choose(query, key, value, rpb, kernel_size, dilation, scale, backend)
    if module in (cpu, triton):
        return module.attention_qkvpacked(qkv, *settings)
    return module.attention(query, key, value, *settings)


def _choose(query, key, value, rpb, kernel_size, dilation, scale, backend) -> tuple[types.ModuleType, tuple]:
    """The backend that runs this call, and what it wants to know besides query, key and value."""
    check(query, key, value, rpb, kernel_size, dilation)
    settings = (rpb, kernel_size, dilation, float(query.shape[-1] ** -0.5 if scale is None else scale))
    if backend is None and exportable.exporting():
        return exportable, settings
    if backend is None:
        # On a CPU `tiled` is faster than any natten; nobody should pay for its import there
        candidates = (m for m in BACKENDS.values() if m is not natten or query.is_cuda)
        return next(m for m in candidates if not m.unsupported(query, key, value, *settings)), settings
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {sorted(BACKENDS)} or None")
    reasons = BACKENDS[backend].unsupported(query, key, value, *settings)
    if reasons:
        raise RuntimeError(f"backend={backend!r} cannot run this call: {'; '.join(reasons)}")
    return BACKENDS[backend], settings


def check(query, key, value, rpb, kernel_size, dilation) -> None:
    """Raise a ValueError that names the first thing wrong with a call (arguments as above)."""
    if kernel_size < 3 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size}: expected an odd number of at least 3")
    if dilation < 1:
        raise ValueError(f"dilation={dilation}: expected at least 1")
    if query.dim() != 5 or query.shape != key.shape or query.shape != value.shape:
        raise ValueError(
            "query, key and value must share one shape [B, H, W, heads, head_dim]; got "
            f"{list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
        )
    if not (query.dtype == key.dtype == value.dtype and query.is_floating_point()):
        raise ValueError(
            f"query, key and value must share one floating dtype; got {query.dtype}, {key.dtype}, {value.dtype}"
        )
    devices = {t.device for t in (query, key, value, rpb) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"query, key, value and rpb must be on one device; got {sorted(map(str, devices))}")
    _, height, width, heads, head_dim = query.shape
    if heads < 1 or head_dim < 1:
        raise ValueError(
            f"expected at least one head and one dimension per head; got heads={heads}, head_dim={head_dim}"
        )
    reach = kernel_size * dilation
    if height < reach or width < reach:
        raise ValueError(
            f"a {height}x{width} map is smaller than kernel_size * dilation = {kernel_size} * {dilation} = {reach}; "
            "zero-pad the input of qkv at the bottom and right first (NeighborhoodAttention2D does)"
        )
    span = 2 * kernel_size - 1
    if rpb is not None and rpb.shape != (heads, span, span):
        raise ValueError(f"rpb has shape {list(rpb.shape)}; expected [heads, 2K-1, 2K-1] = {[heads, span, span]}")
