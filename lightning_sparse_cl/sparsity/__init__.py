"""Sparsity in plain torch: functions on tensors and masks over modules; nothing here imports Lightning."""

from lightning_sparse_cl.sparsity.channels import compact
from lightning_sparse_cl.sparsity.enforcement import Enforcement, enforce
from lightning_sparse_cl.sparsity.entropy_gradient import EntropyGradient
from lightning_sparse_cl.sparsity.export import load_sparse, save_sparse
from lightning_sparse_cl.sparsity.gates import GrowthGates
from lightning_sparse_cl.sparsity.layers import sparse_weights
from lightning_sparse_cl.sparsity.masks import Masks
from lightning_sparse_cl.sparsity.scores import top_k_mask
from lightning_sparse_cl.sparsity.subnetworks import Subnetworks
from lightning_sparse_cl.sparsity.task_inference import CalibratedLogit, LargestLogit, LowestEntropy, TaskInference
from lightning_sparse_cl.sparsity.units import UnitActivity
from lightning_sparse_cl.sparsity.weight_scores import WeightScores

__all__ = [
    "CalibratedLogit",
    "Enforcement",
    "EntropyGradient",
    "GrowthGates",
    "LargestLogit",
    "LowestEntropy",
    "Masks",
    "Subnetworks",
    "TaskInference",
    "UnitActivity",
    "WeightScores",
    "compact",
    "enforce",
    "load_sparse",
    "save_sparse",
    "sparse_weights",
    "top_k_mask",
]
