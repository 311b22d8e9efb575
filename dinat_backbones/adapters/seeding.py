"""Random numbers that depend on where a run is, not on how it got there: what makes a resumed run repeat itself."""

import random

import numpy as np
import torch


def seed_everything(*key: int) -> None:
    """Seed Python's, numpy's and torch's generators by non-negative integers, such as a seed, a rank and a step."""
    words = np.random.SeedSequence(list(key)).generate_state(3).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    torch.manual_seed(words[2])
