"""What a backend of the op is."""

from collections.abc import Sequence

import torch


class Backend:
    """One way to compute neighborhood attention; see CONTRIBUTING.md, "Adding a backend"."""

    takes_packed_qkv = False  # whether `attention` takes one tensor [B, H, W, 3, heads, head_dim], too
    requires = ""  # the optional package behind it, if any

    def automatic(self, device: torch.device) -> bool:
        """Whether calls on `device` come here without being told to, if `unsupported` has no objection."""
        return True

    def faults(self, device: torch.device) -> list[str]:
        """Of the reasons that `unsupported` may give, those that are faults of this installation on `device`.

        A call that goes to another backend for such reasons alone causes a warning.
        """
        return []

    def unsupported(
        self, qkv: Sequence[torch.Tensor], rpb: torch.Tensor | None, kernel_size: int, dilation: int, scale: float
    ) -> list[str]:
        """All the reasons, in words, why this call cannot run here.

        Args:
            qkv: query, key and value, or one packed tensor; with the rest it has passed `check_call`.
        """
        return []

    def attention(
        self, qkv: Sequence[torch.Tensor], rpb: torch.Tensor | None, kernel_size: int, dilation: int, scale: float
    ) -> torch.Tensor:
        """Run the call: see `neighborhood_attention_2d`.

        Args:
            qkv: query, key and value; one packed tensor only where `takes_packed_qkv`.
        """
        raise NotImplementedError
