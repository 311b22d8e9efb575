"""Seeds from the step of a run, so that a resumed run draws the same random numbers as an uninterrupted one."""

import random

import numpy as np
import torch


def seed_everything(*key: int) -> None:
    """Seed the generators of Python, numpy and torch with non-negative integers, such as a seed, a rank and a step."""
    words = np.random.SeedSequence(list(key)).generate_state(3).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    torch.manual_seed(words[2])
