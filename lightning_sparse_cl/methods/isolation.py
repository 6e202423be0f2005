"""Base of the methods that give each task a subnetwork of its own."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from lightning_sparse_cl.backbones.head import logits_among
from lightning_sparse_cl.callbacks.subnetworks import TaskSubnetworks
from lightning_sparse_cl.callbacks.trainer_parts import parts_of, task_data
from lightning_sparse_cl.methods.base import ContinualModule
from lightning_sparse_cl.nests import Nest
from lightning_sparse_cl.optim.la_maml import LaMAML
from lightning_sparse_cl.sparsity import Subnetworks


class IsolatingModule(ContinualModule):
    """A :class:`ContinualModule` whose tasks have subnetworks: nothing that was learnt is forgotten.

    It trains the network of the running task, and answers with the subnetworks of all tasks learnt. Its policies hold
    :class:`TaskSubnetworks`. In ``fit``, ``val/acc`` and ``val/loss`` are Task-IL figures of the running task.

    Raises:
        ValueError: if no policy is a :class:`TaskSubnetworks`, or the network computes with learnt masks and the
            objective or the update rule does not.
    """

    masks_are_learnt = False
    """Whether the running network has :meth:`effective_weights`."""

    def configure_callbacks(self) -> list[pl.Callback]:
        if not any(isinstance(p, TaskSubnetworks) for p in self.policies):
            raise ValueError(
                f"{type(self).__name__}(policies=...): add TaskSubnetworks(), which keeps what tasks learnt"
            )
        objective, update = self.objective, self.update
        for part, wrong in ((objective, objective.reads_network), (update, isinstance(update, LaMAML))):
            if wrong and self.masks_are_learnt:
                raise ValueError(
                    f"{type(self).__name__}: {type(part).__name__} computes with the network's weights as they are, "
                    "but its running network uses weights times learnt masks; use ER or SingleBackward, for example"
                )
        return super().configure_callbacks()

    def forward(self, x: Nest, features: bool = False) -> Tensor:
        """Images (B, C, H, W) to logits (B, num_classes); in eval mode each class has its subnetwork's logit.

        Raises:
            ValueError: if ``features`` is True: each task has its own.
        """
        if features:
            raise ValueError(f"{type(self).__name__}: features=True is not offered, each task has its own; use False")
        learnt = Subnetworks.of(self)
        if self.training or not len(learnt):
            return self.running(x)
        return learnt.combined(x, learnt.answers(x))

    def running(self, x: Nest) -> Tensor:
        """Logits (B, num_classes) of the network that the running task trains."""
        if not (weights := self.effective_weights()):
            return super().forward(x)
        own = self.objective.own_classes if self.training else None
        if own is None:
            return functional_call(self.network, weights, (x,))
        of_backbone = {n.removeprefix("backbone."): w for n, w in weights.items() if n.startswith("backbone.")}
        found = functional_call(self.backbone, of_backbone, (x,))
        return logits_among(own, found, weights.get("head.weight", self.head.weight), self.head.bias)

    def effective_weights(self) -> dict[str, Tensor]:
        """What the running task's network uses in place of its parameters, by name: weights times learnt masks.

        If it is empty, the network computes with its parameters as they are.
        """
        return {}

    def task_masks(self) -> dict[str, Tensor]:
        """Which weights the ending task uses, by name, as far as the module has learnt it; others see to the rest."""
        return {}

    def idle(self) -> list[nn.Parameter]:
        """Parameters of learnt masks that the running network does not use now, and that must not move."""
        return []

    def penalty(self) -> Tensor | float:
        """Zero; with several processes it involves the idle parameters, as DDP waits for every parameter's gradient."""
        idle = self.idle() if self.trainer.world_size > 1 else []
        return super().penalty() + 0.0 * sum(p.sum() for p in idle)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        for parameter in self.idle():  # a gradient of zero would let momentum and weight decay move it
            parameter.grad = None

    def predict(self, x: Nest, task: int) -> Tensor:
        """Labels (B,) of images (B, C, H, W), out of the classes of ``task``, by its compact subnetwork alone.

        Raises:
            ValueError: if ``task`` was never trained.
        """
        learnt = Subnetworks.of(self)
        best = learnt.network(task)(x).argmax(1)
        return best.new_tensor(learnt.tasks[task].classes)[best]

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Predicted labels (B,); the data module has one loader per task, so that a loader's index is its task."""
        joint = getattr(parts_of(self.trainer).datamodule, "joint", False)
        return self.predict(batch[0], 0 if joint else dataloader_idx)

    def held_out_logits(self, x: Nest) -> Tensor:
        """Logits of the running task alone, among its classes."""
        live = task_data(self.trainer).live().to(self.device)
        return self.running(x).masked_fill(~live, -torch.inf)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Subnetworks are restored, too, so that a loaded module needs no trainer to answer."""
        super().on_load_checkpoint(checkpoint)
        if "subnetworks" in checkpoint:
            learnt, kept = Subnetworks.of(self), [p for p in self.policies if isinstance(p, TaskSubnetworks)]
            learnt.load_state_dict(checkpoint["subnetworks"])
            learnt.inference = kept[0].inference if kept else learnt.inference
