"""Measures in plain torch and torchmetrics; nothing here imports Lightning."""

from lightning_sparse_cl.metrics.accuracy_matrix import (
    AccuracyMatrix,
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
)

__all__ = ["AccuracyMatrix", "average_accuracy", "backward_transfer", "forgetting", "forward_transfer"]
