"""Transforms of torch.func and forward-mode derivatives, which support plain PyTorch operations only."""

import torch
from torch.autograd import forward_ad

REASON = "torch.func transforms and forward-mode derivatives need plain operations, which backend='tiled' consists of"


def active() -> bool:
    """Whether a call is inside torch.func (grad, vmap, jvp, ...) or a level of forward-mode derivatives."""
    if torch.compiler.is_compiling():
        return False  # the queries below cannot be traced
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
