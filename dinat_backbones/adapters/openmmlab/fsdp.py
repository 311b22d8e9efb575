"""Training in shards (FSDP) with mmengine, for `configs/_base_/fsdp.py`."""

from typing import Any

import torch
from mmengine._strategy import FSDPStrategy
from mmengine.registry import FUNCTIONS, STRATEGIES

from ...layers import Block


@FUNCTIONS.register_module(force=True)
def wrap_dinat_blocks(module: torch.nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """`auto_wrap_policy` for FSDP: every transformer block of a backbone is gathered and freed by itself."""
    return recurse or isinstance(module, Block)


@STRATEGIES.register_module(force=True)
class ResumableFSDPStrategy(FSDPStrategy):
    """mmengine's, which passes the optimizer's state in the order of torch 2.0 and so cannot resume with newer ones."""

    def load_optim_state_dict(self, state_dict: dict[str, Any]) -> None:
        optimizer = self.optim_wrapper.optimizer
        to_load = torch.distributed.fsdp.FullyShardedDataParallel.optim_state_dict_to_load(
            model=self.model, optim=optimizer, optim_state_dict=state_dict
        )
        self.optim_wrapper.load_state_dict(to_load)
