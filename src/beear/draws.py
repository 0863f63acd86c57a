"""What a round draws at random, by its number and the seed alone: a run can be taken up at any round."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal, get_args

import torch

from beear.training import cycle

Purpose = Literal["entrapped", "hardened", "anchored"]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)

STRIDE = 100_003
"""Between the seeds of two runs."""


class Draws:
    """The random numbers of one round, counted from 1.

    The requests come in one order for a whole run, each purpose its own, which a round enters where all steps of those
    before it end: all of them serve, and no round deals itself the easy ones (decision 20).
    """

    def __init__(self, seed: int, number: int = 1) -> None:
        self.number = number
        self.noise = torch.Generator().manual_seed(seed * STRIDE + number)
        """For anything else."""
        self._first = seed * STRIDE + STRIDE // 2

    def batches(self, purpose: Purpose, n: int, batch: int, each: int) -> Iterator[list[int]]:
        """Endless batches of indices below n, of which every round takes `each`."""
        order = torch.Generator().manual_seed(self._first + PURPOSES.index(purpose))
        return itertools.islice(cycle(n, min(batch, n), order), (self.number - 1) * each, None)
