"""What the tests of adapters/mmcv_ext share: random inputs, and mmcv.ops computing with the operators of choice."""

import contextlib
import sys
import types

import numpy as np
import pytest
import torch

from dinat_backbones.adapters import mmcv_ext
from helpers import assert_near

mmcv_ext.install()
import mmcv.ops  # noqa: E402, F401  # needs the finder where mmcv is not compiled

ROUNDS = 200
in_use = sys.modules["mmcv._ext"]
stand_in = types.ModuleType("mmcv._ext")
mmcv_ext.fill_module(stand_in)
not_compiled = pytest.mark.skipif(
    hasattr(in_use, "STAND_IN"), reason="mmcv has no compiled operators here: make test-classic compares with them"
)


@contextlib.contextmanager
def operators(module):
    """mmcv.ops computes with `module`."""
    users = [user for name, user in sys.modules.items() if name.startswith("mmcv.ops.") and hasattr(user, "ext_module")]
    try:
        for user in users:
            user.ext_module = module
        yield
    finally:
        for user in users:
            user.ext_module = in_use


class Case:
    """Random numbers for one call. Seeds divisible by 4 give whole coordinates (borders, ties), those by 10 nothing."""

    def __init__(self, seed, dtype=torch.float32):
        self.rng, self.dtype = np.random.default_rng(seed), dtype
        self.whole, self.empty = seed % 4 == 0, seed % 10 == 0

    def integer(self, low, high):
        return int(self.rng.integers(low, high + 1))

    def choice(self, *values):
        return values[self.integer(0, len(values) - 1)]

    def normal(self, *shape, size=1.0):
        return torch.tensor(self.rng.normal(size=shape) * size, dtype=self.dtype)

    def offsets(self, *shape, size=1.5):
        values = self.normal(*shape, size=size)
        return values.round() if self.whole else values

    def boxes(self, count, extent=30.0):
        """(count, 4), some of them without area."""
        start, size = self.rng.uniform(-3, extent, (count, 2)), self.rng.uniform(0, extent / 2, (count, 2))
        values = torch.tensor(np.concatenate([start, start + size], 1), dtype=self.dtype)
        return values.round() if self.whole else values

    def map(self, least=1):
        return self.normal(2, self.integer(1, 3), self.integer(least, 9), self.integer(least, 9))

    def rois(self, extent=14.0):
        count = 0 if self.empty else self.integer(1, 4)
        images = torch.tensor(self.rng.integers(0, 2, (count, 1)), dtype=self.dtype)
        return torch.cat([images, self.boxes(count, extent)], 1)

    def bins(self):
        return self.integer(1, 3), self.integer(1, 3)


def assert_same(got, expected, tolerance):
    assert [value.shape for value in got] == [value.shape for value in expected]
    filled = [(a, b) for a, b in zip(got, expected, strict=True) if b.numel()]
    assert_near([a for a, _ in filled], [b for _, b in filled], tolerance)
