"""Ways to share a model between processes under which masks hold, and those under which they would not."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

SHARDED = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)
"""Strategies that keep each weight in parts, on several processes."""


def refuse_shards(trainer: pl.Trainer) -> None:
    """Refuse strategies that keep weights in parts.

    Masks, scores, memories and projections take each weight as a whole: a part of a flattened one would be ranked and
    masked as if it were a layer.

    Raises:
        ValueError: with the strategy.
    """
    if isinstance(strategy := trainer.strategy, SHARDED):
        raise ValueError(
            f"Trainer(strategy={type(strategy).__name__}): it keeps each weight in parts, and masks and scores need it "
            "whole; use strategy='ddp', under which each process has the whole network"
        )
