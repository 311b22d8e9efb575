"""The interface of a backend of the op."""

from collections.abc import Sequence

import torch


class Backend:
    """One way to compute neighborhood attention. A new one is a file in this folder, with a subclass, and a line in the
    folder's `__init__.py`; see CONTRIBUTING.md, "Adding a backend of the op"."""

    takes_packed_qkv = False  # whether `attention` also takes one tensor [B, H, W, 3, heads, head_dim]
    traceable = False  # whether the legacy ONNX exporter can trace it, for one size
    requires = ""  # the optional package it needs, if any

    def automatic(self, device: torch.device) -> bool:
        """Whether calls on `device` that name no backend may run here; `unsupported` is asked next."""
        return True

    def faults(self, device: torch.device) -> list[str]:
        """Those reasons of `unsupported` that are faults of the installation, for calls on `device`.

        If a call runs on another backend for such reasons only, a warning is logged.
        """
        return []

    def unsupported(
        self, qkv: Sequence[torch.Tensor], rpb: torch.Tensor | None, kernel_size: int, dilation: int, scale: float
    ) -> list[str]:
        """All reasons, in words, why this call cannot run here; empty if it can.

        Args:
            qkv: query, key and value, or one packed tensor.
            rpb, kernel_size, dilation, scale: as in `neighborhood_attention_2d`. All have passed `check_call`.
        """
        return []

    def attention(
        self, qkv: Sequence[torch.Tensor], rpb: torch.Tensor | None, kernel_size: int, dilation: int, scale: float
    ) -> torch.Tensor:
        """Run the call: see `neighborhood_attention_2d`.

        Args:
            qkv: query, key and value, or with `takes_packed_qkv` possibly one packed tensor.
            rpb, kernel_size, dilation, scale: of a call for which `unsupported` is empty.
        """
        raise NotImplementedError
