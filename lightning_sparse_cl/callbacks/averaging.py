"""The averages of the weights that Lightning's callbacks keep (EMA, SWA), which obey the masks, too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_sparse_cl.callbacks.trainer_parts import callbacks_of, parts_of

AVERAGING = (WeightAveraging, StochasticWeightAveraging)


def averages(trainer: pl.Trainer) -> list[nn.Module]:
    """The copies of the module in which callbacks average its weights."""
    found = [c._average_model for c in parts_of(trainer).callbacks if isinstance(c, AVERAGING)]
    return [m.module if isinstance(m, AveragedModel) else m for m in found if m is not None]


@contextmanager
def averaged(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Inside, the module has the averaged weights, as in Lightning's own validation and checkpoints."""
    keepers = [c for c in callbacks_of(trainer, WeightAveraging) if c._average_model is not None]
    for keeper in keepers:
        keeper._swap_models(pl_module)
    try:
        yield
    finally:
        for keeper in reversed(keepers):
            keeper._swap_models(pl_module)
