"""Training data and random numbers as functions of the run's seed and the step, so that a resumed run repeats an
uninterrupted one. Detectron2 saves neither the position in the data nor the states of the random generators."""

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

from detectron2.data.samplers import TrainingSampler
from detectron2.engine import HookBase
from detectron2.utils import comm
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ..seeding import seed_everything

# The first number of a seed, so that data and model do not use the same random numbers.
_DATA, _STEP = 0, 1


class SeedSteps(HookBase):
    """Seeds Python, numpy and torch before every step by the run's seed, the rank and the step's number."""

    def __init__(self, seed: int):
        self.seed = seed

    def before_step(self) -> None:
        seed_everything(_STEP, self.seed, comm.get_rank(), self.trainer.iter)


class Batches:
    """Batch sampler: endless lists of ``(position, index)``, position counting this process's samples from 0.

    The order is that of Detectron2's `TrainingSampler`. With `size_of`, each batch has either landscape or portrait
    images only, as with Detectron2's aspect-ratio grouping, but batches are formed before images are read, so that any
    step can be resumed without reading the data before it.

    Args:
        sampler: of indices, endless.
        batch_size: of this process.
        size_of: index to (width, height), or None for batches in order.
    """

    def __init__(
        self, sampler: TrainingSampler, batch_size: int, size_of: Callable[[int], tuple[int, int]] | None = None
    ):
        self.sampler, self.batch_size, self.size_of = sampler, batch_size, size_of
        self.start = 0  # batches to skip

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return itertools.islice(self._all(), self.start, None)

    def _all(self) -> Iterator[list[tuple[int, int]]]:
        waiting: tuple[list, list] = ([], [])
        for position, index in enumerate(self.sampler):
            width, height = self.size_of(index) if self.size_of else (0, 0)
            batch = waiting[width > height]
            batch.append((position, index))
            if len(batch) == self.batch_size:
                yield batch[:]
                batch.clear()


class Samples(Dataset):
    """Maps ``(position, index)`` to a sample whose random augmentation depends on the seed, rank and position only, not
    on the worker."""

    def __init__(self, dicts: list[dict], mapper: Callable[[dict], Any], seed: int):
        self.dicts, self.mapper, self.key = dicts, mapper, (_DATA, seed, comm.get_rank())
        self._sizes: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self.dicts)

    def __getitem__(self, position_and_index: tuple[int, int]) -> Any:
        """The sample at (position, index).

        Raises:
            ValueError: the mapper returns None for every image of the data set.
        """
        position, index = position_and_index
        # As in Detectron2, an image without annotations in its crop (None) is replaced by another one.
        for attempt in range(len(self)):
            seed_everything(*self.key, position)
            sample = self.mapper(self.dicts[(index + attempt) % len(self)])
            if sample is not None:
                return sample
        raise ValueError(
            f"none of the {len(self)} training images gives a sample: their crops have no annotations; check "
            "DATASETS.TRAIN, INPUT.CROP and the annotations"
        )

    def size(self, index: int) -> tuple[int, int]:
        """Width and height in pixels, from the data set or the head of the file."""
        if index not in self._sizes:
            entry = self.dicts[index]
            if "width" in entry and "height" in entry:
                self._sizes[index] = entry["width"], entry["height"]
            else:
                with Image.open(entry["file_name"]) as image:
                    self._sizes[index] = image.size
        return self._sizes[index]


def build_loader(
    dicts: list[dict],
    mapper: Callable[[dict], Any],
    *,
    seed: int,
    total_batch_size: int,
    aspect_ratio_grouping: bool,
    num_workers: int,
) -> DataLoader:
    """An endless loader of lists of samples; ``loader.batch_sampler.start = step`` begins it at a later step.

    Args:
        dicts: of the data set.
        mapper: makes a training sample of one of them, or returns None to skip the image.
        seed: the same in all processes.
        total_batch_size: of all processes together.
        aspect_ratio_grouping: see `Batches`.
        num_workers: processes that read, 0 for none.

    Raises:
        ValueError: the batch cannot be divided among the processes.
    """
    processes = comm.get_world_size()
    if total_batch_size < 1 or total_batch_size % processes:
        raise ValueError(f"SOLVER.IMS_PER_BATCH={total_batch_size}: expected a multiple of the {processes} processes")
    samples = Samples(dicts, mapper, seed)
    batches = Batches(
        TrainingSampler(len(dicts), seed=seed),
        total_batch_size // processes,
        samples.size if aspect_ratio_grouping else None,
    )
    logging.getLogger("detectron2").info("%d training images, %d a step", len(dicts), total_batch_size)
    return DataLoader(samples, batch_sampler=batches, num_workers=num_workers, collate_fn=_identity)


def _identity(batch: list) -> list:
    return batch
