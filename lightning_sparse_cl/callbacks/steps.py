"""Time in optimiser steps: how many each optimiser has taken, however the module steps it."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
from torch.optim import Optimizer

from lightning_sparse_cl.sparsity.enforcement import Enforcement


class StepCounter:
    """Counts the steps of each optimiser since :meth:`restart`; saved and restored by the callback that has it.

    A step is a call of ``optimizer.step()``: accumulated batches make one, several passes inside a step make one, and
    optimisers that step in turn have separate counts. (Lightning counts batches under manual optimisation, and the
    steps of all optimisers together in ``global_step``.)
    """

    def __init__(self) -> None:
        self._optimizers: list[Optimizer] = []
        self._zero: list[int] = []
        self._loaded: list[int] = []
        self._enforcement = Enforcement()

    def begin(self, trainer: pl.Trainer, enforcement: Enforcement) -> None:
        """Begin training, or go on from where the loaded counts were saved."""
        self._optimizers, self._enforcement = list(trainer.optimizers), enforcement
        loaded = self._loaded if len(self._loaded) == len(self._optimizers) else [0] * len(self._optimizers)
        self._zero = [enforcement.steps(o) - count for o, count in zip(self._optimizers, loaded)]

    def restart(self) -> None:
        """Count from now on."""
        self._zero = [self._enforcement.steps(optimizer) for optimizer in self._optimizers]

    def taken(self, optimizer: Optimizer) -> int:
        """Steps of one optimiser."""
        found = next((i for i, own in enumerate(self._optimizers) if own is optimizer), None)
        return 0 if found is None else self._enforcement.steps(optimizer) - self._zero[found]

    def most(self) -> int:
        """Steps of the optimiser that has taken most of them."""
        return max((self.taken(optimizer) for optimizer in self._optimizers), default=0)

    def state_dict(self) -> list[int]:
        return [self.taken(optimizer) for optimizer in self._optimizers]

    def load_state_dict(self, state: Sequence[int]) -> None:
        self._loaded = list(state)
