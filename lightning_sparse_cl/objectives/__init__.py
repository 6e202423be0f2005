"""Continual-learning objectives: a loss and the memory it needs. They know nothing of masks or optimisers."""

from lightning_sparse_cl.objectives.base import CrossEntropy, Objective
from lightning_sparse_cl.objectives.memory import Exemplars, ReservoirMemory
from lightning_sparse_cl.objectives.replay import ER, DERpp, DERppOneDraw

__all__ = ["ER", "CrossEntropy", "DERpp", "DERppOneDraw", "Exemplars", "Objective", "ReservoirMemory"]
