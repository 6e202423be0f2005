"""The policies that every foreign module is trained with, and how many weights each of them is to leave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EMAWeightAveraging

import lightning_sparse_cl as lsc

SPARSITY = 0.8
DROP_GROW = dict(sparsity=SPARSITY, interval=2, fraction=0.4)


@dataclass(frozen=True)
class Policy:
    """Callbacks, and what is true of their masks."""

    name: str
    make: Callable[..., list[pl.Callback]]
    """Of keyword arguments for those that rank by a loss."""
    division: Literal["each", "shared", "total"] = "shared"
    """How (1 - sparsity) n is made whole: for each weight by itself; within one for each weight, and exactly for all of
    them; or exactly for all of them alone."""
    moves: bool = False
    """Whether masks are others at the end than after the first step."""
    measures: type[Any] | None = None
    """What counts costs and must leave the training as it was."""


def _one_shot(scored):
    return [lsc.OneShotPruning(SPARSITY)]


def _set(scored):
    return [lsc.SET(**DROP_GROW)]


def _tdm(scored):
    return [lsc.TaskAwareDynamicMasking(SPARSITY, interval=1, p_intra=0.1, p_inter=0.1, **scored)]


def _masking(scored):
    return [lsc.DynamicGradientMasking(0.1, interval=1, **scored)]


def _drop_grow(policy):
    return lambda scored: [policy(**DROP_GROW)]


def _measured(measure):
    return lambda scored: [*_set(scored), measure()]


POLICIES = [
    Policy("OneShotPruning", _one_shot, division="each"),
    Policy("SNIP", lambda scored: [lsc.SNIP(SPARSITY, **scored)]),
    Policy("SET", _set, moves=True),
    Policy("RigL", _drop_grow(lsc.RigL), moves=True),
    Policy("SNFS", _drop_grow(lsc.SNFS), moves=True, division="total"),
    Policy("UnfiredGrowth", _drop_grow(lsc.UnfiredGrowth), moves=True),
    Policy("MomentumGrowth", _drop_grow(lsc.MomentumGrowth), moves=True),
    Policy("TaskAwareDynamicMasking", _tdm, moves=True, division="each"),
    Policy("DynamicGradientMasking, OneShotPruning", lambda s: [*_masking(s), *_one_shot(s)], division="each"),
    Policy("DynamicGradientMasking, SET", lambda s: [*_masking(s), *_set(s)], moves=True),
    Policy("SET, EMAWeightAveraging", lambda s: [*_set(s), EMAWeightAveraging(decay=0.5)], moves=True),
    Policy("SET, FlopsCounter", _measured(lsc.FlopsCounter), moves=True, measures=lsc.FlopsCounter),
    Policy("SET, MemoryFootprint", _measured(lsc.MemoryFootprint), moves=True, measures=lsc.MemoryFootprint),
]
