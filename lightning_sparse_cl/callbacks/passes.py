"""What a run spends: samples sent forward and backward through the network, against plain training."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle


class PassCounter(pl.Callback):
    """Counts samples as they pass through ``pl_module(x)`` in training, in Python integers: no device sync.

    * ``samples``: samples that the loader served; plain training sends each forward and backward once;
    * ``forward``: samples sent forward, replayed ones, SAM's second pass and the ranking pass of SSE included;
    * ``backward``: those of them through which a gradient is taken.

    Counts are of this process. A module whose ``training_step`` does not go through its own ``forward`` counts samples
    only.
    """

    def __init__(self) -> None:
        self.counts = {"samples": 0, "forward": 0, "backward": 0}
        self._hook: RemovableHandle | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.counts = dict.fromkeys(self.counts, 0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._hook = pl_module.register_forward_pre_hook(self._count)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._hook is not None:
            self._hook.remove()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: tuple[Tensor, Tensor], *_: Any
    ) -> None:
        self.counts["samples"] += len(batch[1])

    def _count(self, module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module.training:
            self.counts["forward"] += len(inputs[0])
            self.counts["backward"] += len(inputs[0]) * torch.is_grad_enabled()

    def state_dict(self) -> dict[str, Any]:
        return self.counts

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts.update(state)
