"""Base of the methods that give each task a subnetwork of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_sparse_cl.methods.base import ContinualModule
from lightning_sparse_cl.sparsity import Masks, Subnetworks


class IsolatingModule(ContinualModule):
    """A :class:`ContinualModule` whose tasks have subnetworks: nothing that was learnt is forgotten.

    Trains the network of the running task, and answers with the subnetworks of all tasks learnt. Its policies hold
    :class:`TaskSubnetworks`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, num_classes); in eval mode a class has that of its task's subnetwork."""
        learnt = Subnetworks.of(self)
        if self.training or not len(learnt):
            return self.running(x)
        return learnt.logits(x, self.running)

    def running(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of the network that the running task trains."""
        return super().forward(x)

    def predict(self, x: Tensor, task: int) -> Tensor:
        """Labels (B,) of images (B, C, H, W), out of the classes of ``task``, by its compact subnetwork alone.

        Raises:
            ValueError: if ``task`` was never trained.
        """
        learnt = Subnetworks.of(self)
        best = learnt.network(task)(x).argmax(1)
        return best.new_tensor(learnt.tasks[task].classes)[best]

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Predicted labels (B,); the data module has one loader a task, so that a loader's place is its task."""
        return self.predict(batch[0], dataloader_idx)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Masks and subnetworks are restored too, so that a loaded module needs no trainer to answer."""
        super().on_load_checkpoint(checkpoint)
        Masks.of(self).load_state_dict(checkpoint["masks"])
        Subnetworks.of(self).load_state_dict(checkpoint["subnetworks"])
