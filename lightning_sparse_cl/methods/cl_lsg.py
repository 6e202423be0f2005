"""CL-LSG: continual learning via learnable sparse growth from a seed network (Yang et al., 2022)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from lightning_sparse_cl.callbacks.pruning import Reopen
from lightning_sparse_cl.callbacks.sparse_growth import SparseGrowth
from lightning_sparse_cl.callbacks.subnetworks import TaskSubnetworks
from lightning_sparse_cl.methods.isolation import IsolatingModule
from lightning_sparse_cl.nests import Nest
from lightning_sparse_cl.objectives.base import CrossEntropy, Objective
from lightning_sparse_cl.optim.sam import UpdateRule
from lightning_sparse_cl.sparsity.gates import GrowthGates


class CLLSG(IsolatingModule):
    """ "CL-LSG: Continual Learning via Learnable Sparse Growth", Algorithm 1::

        seed network of 1/8 of the channels                        gates = GrowthGates(seed)
        3.2  stage 1: selective mask m^s on frozen weights,        gates (selective, retrain)
             released weights trained again
        2    growth only if the target accuracy is missed          growth = SparseGrowth(target, reuse_epochs)
        eq 2 L(f(w * m^g * m^a)) + lambda ||m^g||_0                gates (attentive, penalty)
        A.2  masks by Gumbel-sigmoid, straight through             sparsity/gates.py
             what a task uses is frozen, and its own mask          subnetworks = TaskSubnetworks

    ``backbone`` is the network at its full size, to which it can grow; sizes are reported as fractions of it. (The
    paper's tables reach 1.5 times a VGG16: give one that is wider by the square root of 1.5.) While a task trains, the
    full network is computed; the subnetwork that remains has the task's channels only.

    Drawn masks need the paper's thousands of steps per task. In 200 steps of growth they cost 13 points compared with
    masks that are only thresholded, ``GrowthGates(noise=False)`` (``benchmarks/cl_lsg.py``).

    Released weights that a task trains are its own from then on, which the paper does not say: otherwise the next task
    would train weights that this one relies on.

    Args:
        backbone: images (B, C, H, W) to features (B, D), of plain convolutions, linear layers and batch-norm.
        growth: when to grow.
        gates: what to grow, and the masks. If None, the paper's.
        objective: if None, cross-entropy among the task's classes.
        subnetworks: how tasks are kept apart. If None, each has its own batch-norm.
        update: if None, one backward pass. Under SAM each pass draws its own masks.
        optimizer: for the weights. If None, SGD with learning rate 0.01.
        mask_optimizer: for the real-valued masks. If None, Adam with learning rate 0.0005. In runs much shorter than
            the paper's 4,000 steps per task, masks need a larger rate to change sign at all.
        policies: further callbacks.

    Raises:
        ValueError: if ``subnetworks`` refuses tasks without free weights, or has frozen batch-norm.
    """

    masks_are_learnt = True

    def __init__(
        self,
        backbone: nn.Module,
        growth: SparseGrowth,
        gates: GrowthGates | None = None,
        objective: Objective | None = None,
        subnetworks: TaskSubnetworks | None = None,
        update: UpdateRule | None = None,
        optimizer: Callable[[Iterable], Optimizer] | None = None,
        mask_optimizer: Callable[[Iterable], Optimizer] | None = None,
        policies: Sequence[pl.Callback] = (),
    ) -> None:
        subnetworks = subnetworks or TaskSubnetworks(full="share")
        if subnetworks.full == "error" or subnetworks.batch_norm == "frozen":
            raise ValueError(
                f"CLLSG(subnetworks=TaskSubnetworks({subnetworks.batch_norm!r}, {subnetworks.full!r})): picking starts "
                "without free weights, full='share', and every task measures its own batch-norm statistics"
            )
        parts = [Reopen(), growth, subnetworks]
        super().__init__(
            backbone,
            objective or CrossEntropy(single_head=True),
            update,
            optimizer or partial(SGD, lr=0.01),
            policies=[*parts, *policies],
        )
        self.gates = gates or GrowthGates()
        self.mask_optimizer = mask_optimizer or partial(Adam, lr=0.0005)

    def build(
        self, layout: Nest, num_classes: int, seed: int = 0, inputs: Nest | None = None, target: str = "classes",
        labels: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().build(layout, num_classes, seed, inputs, target, labels)
        self.gates.build(self.network)

    def draw_head(self, seed: int | None = None, classes: Iterable[int] | None = None) -> None:
        """Draw the head for as many features as the network has now, not for as many as it can grow to."""
        super().draw_head(seed, classes)
        if len(self.gates.channel):
            used = self.gates.allocated_kernels()[self.gates.head][0]
            rows = slice(None) if classes is None else list(classes)
            with torch.no_grad():
                self.head.weight[rows] *= (len(used) / used.sum()).sqrt()

    def effective_weights(self) -> dict[str, Tensor]:
        """Weights times masks, drawn in training mode."""
        return self.gates.weights(self.network)

    def penalty(self) -> Tensor | float:
        """lambda ||m^g||_0 of eq 2, in expectation."""
        return super().penalty() + self.gates.penalty * self.gates.expected_size()

    def configure_optimizers(self) -> list[Optimizer]:
        """One optimiser for the weights, one for the real-valued masks."""
        masks = [p for p in self.gates.parameters() if p.requires_grad]
        weights = [p for n, p in self.named_parameters() if not n.startswith("gates.")]
        return [self.optimizer(weights), self.mask_optimizer(masks)]
