"""Random choices of training that survive a restart."""

from typing import Any

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ..seeding import seed_everything


@HOOKS.register_module(force=True)
class SeedStepsHook(Hook):
    """Makes the random choices of a training step depend on nothing but the run's seed, the rank and the step's number,
    so that a run that was killed and resumed ends with the weights of one that never stopped.

        custom_hooks = [dict(type="SeedStepsHook")]
        randomness = dict(seed=0)

    mmengine saves no states of random generators. For data this is exact where the training process reads it
    (``num_workers=0``), and with workers that start anew each epoch (``persistent_workers=False``) when the checkpoint
    is from the end of an epoch.
    """

    def before_train_epoch(self, runner: Any) -> None:  # and once before a run without epochs
        self._seed(runner, 2 * runner.iter)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self._seed(runner, 2 * runner.iter + 1)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._seed(runner, 2 * (runner.iter + 1))  # for reading the next batch

    def _seed(self, runner: Any, step: int) -> None:
        seed_everything(runner.seed, get_rank(), step)
