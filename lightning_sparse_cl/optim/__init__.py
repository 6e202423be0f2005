"""Optimisers and update rules in plain torch; nothing here imports Lightning."""

from lightning_sparse_cl.optim.frank_wolfe import StochasticFrankWolfe
from lightning_sparse_cl.optim.la_maml import LaMAML
from lightning_sparse_cl.optim.polytopes import KSparsePolytope
from lightning_sparse_cl.optim.sam import SharpnessAware, SingleBackward, UpdateRule, perturbed
from lightning_sparse_cl.optim.selection import LossSelection

__all__ = [
    "KSparsePolytope",
    "LaMAML",
    "LossSelection",
    "SharpnessAware",
    "SingleBackward",
    "StochasticFrankWolfe",
    "UpdateRule",
    "perturbed",
]
