"""Where pixels look: the attention weights of every block of a model, while it runs as usual.

    maps = attention_maps(model, images)            # one per block, in the order of the blocks
    rows, columns, weights = maps[1].at(10, 20)     # what pixel (10, 20) of the second block's map attends to

The model may be a backbone, a classifier, a detector, or a model of transformers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .attention import NeighborhoodAttention2D
from .ops.backends.reference import window


@dataclass(frozen=True)
class AttentionMap:
    """The attention weights of one block.

    Attributes:
        name: of the attention module in the model, such as "levels.0.blocks.1.attn".
        kernel_size, dilation: of its window.
        weights: ``[B, H, W, heads, K, K]`` (rows, then columns of the window) in float32, on the model's device, before
            dropout; the last two axes sum to 1.
    """

    name: str
    kernel_size: int
    dilation: int
    weights: torch.Tensor

    def at(self, row: int, column: int, image: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the pixel at `row`, `column` of the block's map attends to.

        Returns:
            The rows ``[K]`` and columns ``[K]`` of its keys on the map, and the weights ``[K, K]``, the mean over the
            heads. Rows and columns from H and W on are padding of a map smaller than kernel size x dilation.

        Raises:
            IndexError: the map has no such pixel.
        """
        height, width = self.weights.shape[1:3]
        if not (0 <= row < height and 0 <= column < width):
            raise IndexError(f"pixel ({row}, {column}): {self.name} has a map of {height} x {width}")
        reach = self.kernel_size * self.dilation
        rows, columns = (
            window(max(length, reach), self.kernel_size, self.dilation, self.weights.device)[0][position]
            for length, position in ((height, row), (width, column))
        )
        return rows, columns, self.weights[image, row, column].mean(0)

    def dense(self, row: int, column: int, image: int = 0) -> torch.Tensor:
        """The weights of `at` in the places of their keys, ``[H, W]``; those of padding are left out."""
        rows, columns, weights = self.at(row, column, image)
        height, width = self.weights.shape[1:3]
        dense = weights.new_zeros(max(height, int(rows.max()) + 1), max(width, int(columns.max()) + 1))
        dense[rows[:, None], columns] = weights
        return dense[:height, :width]


@contextmanager
def recorded_attention(model: nn.Module) -> Iterator[list[AttentionMap]]:
    """Inside, every call of the model adds the `AttentionMap` of each block to the list. It computes what it did, but
    the attention in plain PyTorch, which takes time and memory for the weights.

    Raises:
        ValueError: the model has no neighborhood attention.
    """
    found: list[AttentionMap] = []
    modules = {name: m for name, m in model.named_modules() if isinstance(m, NeighborhoodAttention2D)}
    if not modules:
        raise ValueError(f"{type(model).__name__} has no neighborhood attention")
    handles = []
    for name, module in modules.items():
        before, after = _hooks(name, found)
        handles += [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, with_kwargs=True),
        ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _hooks(name: str, found: list[AttentionMap]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    asked: list[bool] = []  # whether the caller wanted the weights, too

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        asked.append(bool(kwargs.get("return_attention") or args[1:2] == (True,)))
        return args[:1], {**kwargs, "return_attention": True}

    def after(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        out, weights = output
        found.append(AttentionMap(name, module.kernel_size, module.dilation, weights.detach()))
        return output if asked.pop() else out

    return before, after


def attention_maps(model: nn.Module, images: torch.Tensor) -> list[AttentionMap]:
    """The `AttentionMap` of every block for images ``[B, in_chans, H, W]``, without gradients.

    Raises:
        ValueError: see `recorded_attention`.
    """
    with recorded_attention(model) as found, torch.no_grad():
        model(images)
    return found
