"""SparCL: sparse weights, data and gradients throughout continual learning (Wang et al., NeurIPS 2022)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import lightning.pytorch as pl
from torch import nn
from torch.optim import Optimizer

from lightning_sparse_cl.callbacks.data_removal import DynamicDataRemoval
from lightning_sparse_cl.callbacks.dynamic_masking import TaskAwareDynamicMasking
from lightning_sparse_cl.callbacks.gradient_masking import DynamicGradientMasking
from lightning_sparse_cl.methods.base import ContinualModule
from lightning_sparse_cl.objectives.base import Objective
from lightning_sparse_cl.objectives.replay import DERpp
from lightning_sparse_cl.optim.sam import UpdateRule


class SparCL(ContinualModule):
    """ "SparCL: Sparse Continual Learning on the Edge", each of whose parts is a callback::

        4.1  theta * M_theta, one sparse mask that adapts          masking = TaskAwareDynamicMasking(sparsity)
        4.2  easy samples leave after each stage                   removal = DynamicDataRemoval(fraction, cutoff)
        4.3  only the most important gradients update              gradients = DynamicGradientMasking(q, interval)

    The ablations set one part's quantity to zero: without DDR ``fraction=0``, without DGM ``q=0``, without TDM
    ``sparsity=0``. (In other modules they are left out of the list of callbacks.)

    Args:
        backbone: maps a batch of samples, such as images (B, C, H, W), to features (B, D).
        objective: the base method, ER, DER++, ... If None, DER++ with 500 exemplars.
        masking: TDM. If None, the paper's at sparsity 0.75.
        removal: DDR. If None, the paper's, 30 % in four stages of five epochs.
        gradients: DGM. If None, the paper's at sparsity 0.75, q = 0.05, every 30 batches.
        update: if None, one backward pass.
        optimizer: if None, SGD with learning rate 0.03, as in the released code.
        policies: further callbacks.
    """

    def __init__(
        self,
        backbone: nn.Module,
        objective: Objective | None = None,
        masking: TaskAwareDynamicMasking | None = None,
        removal: DynamicDataRemoval | None = None,
        gradients: DynamicGradientMasking | None = None,
        update: UpdateRule | None = None,
        optimizer: Callable[[Iterable], Optimizer] | None = None,
        policies: Sequence[pl.Callback] = (),
    ) -> None:
        parts = [
            masking or TaskAwareDynamicMasking(),
            removal or DynamicDataRemoval(),
            gradients or DynamicGradientMasking(),
        ]
        super().__init__(
            backbone, objective or DERpp(), update=update, optimizer=optimizer, policies=[*parts, *policies]
        )
