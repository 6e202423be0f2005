"""Measures in plain torch and torchmetrics; nothing here imports Lightning."""

from lightning_sparse_cl.metrics.accounting import (
    DenseCost,
    capacity,
    mask_overhead,
    mean_kept,
    packnet_share,
    sparcl_flops,
    sparcl_memory,
)
from lightning_sparse_cl.metrics.accuracy_matrix import (
    AccuracyMatrix,
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
)
from lightning_sparse_cl.metrics.mask_bits import mask_bits

__all__ = [
    "AccuracyMatrix",
    "DenseCost",
    "average_accuracy",
    "backward_transfer",
    "capacity",
    "forgetting",
    "forward_transfer",
    "mask_bits",
    "mask_overhead",
    "mean_kept",
    "packnet_share",
    "sparcl_flops",
    "sparcl_memory",
]
