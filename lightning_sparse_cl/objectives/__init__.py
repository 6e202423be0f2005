"""Continual-learning objectives: a loss and the memory it needs. They know nothing of masks or optimisers."""

from lightning_sparse_cl.objectives.base import CrossEntropy, Learner, Objective
from lightning_sparse_cl.objectives.class_balanced import ClassBalancedReservoir
from lightning_sparse_cl.objectives.co2l import CO2L
from lightning_sparse_cl.objectives.ewc import EWC
from lightning_sparse_cl.objectives.fdr import FDR
from lightning_sparse_cl.objectives.icarl import ICaRL
from lightning_sparse_cl.objectives.lwf import LwF
from lightning_sparse_cl.objectives.memory import BalancedMemory, ExemplarMemory, Exemplars, ReservoirMemory
from lightning_sparse_cl.objectives.replay import DER, ER, DERpp, DERppOneDraw, Replay

__all__ = [
    "CO2L",
    "DER",
    "ER",
    "EWC",
    "FDR",
    "BalancedMemory",
    "ClassBalancedReservoir",
    "CrossEntropy",
    "DERpp",
    "DERppOneDraw",
    "ExemplarMemory",
    "Exemplars",
    "ICaRL",
    "Learner",
    "LwF",
    "Objective",
    "Replay",
    "ReservoirMemory",
]
