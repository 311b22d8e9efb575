"""The op under `torch.autocast`, the same for every backend.

As for PyTorch's own attention, query, key and value are cast to the dtype of the autocast region, float64 excepted;
`rpb` stays as it is, because softmax and its gradient accumulate in float32 anyway. The op itself runs with autocast
off.
"""

import torch


def enabled(device_type: str) -> bool:
    """Whether autocast is on for this kind of device."""
    if _PER_DEVICE:
        return torch.is_autocast_enabled(device_type) if device_type in _DEVICE_TYPES else False
    return torch.is_autocast_cpu_enabled() if device_type == "cpu" else torch.is_autocast_enabled()


def cast(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in the dtype of the current autocast region; float64 is not cast."""
    if tensor.dtype == torch.float64:
        return tensor
    if _PER_DEVICE:
        return tensor.to(torch.get_autocast_dtype(tensor.device.type))
    one = tensor.new_ones(1, 1)
    return tensor.to((one @ one).dtype)  # torch.compile of torch 2.3 cannot trace a query of it


_DEVICE_TYPES = ("cpu", "cuda", "mps", "xpu")
_PER_DEVICE = hasattr(torch, "get_autocast_dtype")  # since torch 2.4
