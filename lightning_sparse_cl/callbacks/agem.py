"""Averaged gradient episodic memory (A-GEM; Chaudhry et al., 2019), around any objective."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse_cl.backbones.batch_norm import batch_norm_still
from lightning_sparse_cl.callbacks.outputs import logits_of
from lightning_sparse_cl.callbacks.task_callback import TaskCallback
from lightning_sparse_cl.callbacks.trainer_parts import task_data
from lightning_sparse_cl.objectives.memory import BalancedMemory
from lightning_sparse_cl.optim.projection import agem_
from lightning_sparse_cl.sparsity.enforcement import Enforcement


class AGEM(TaskCallback):
    """No step may raise, to first order, the average loss on exemplars of earlier tasks::

        g <- g - (g . g_ref / g_ref . g_ref) g_ref   where g . g_ref < 0                                     (eq 11)

    g is the gradient of the coming step, from any objective and update rule; g_ref is the gradient of the cross-entropy
    on exemplars drawn for the step, in a pass of its own. The memory is shared equally among the tasks that are over,
    each part drawn at random at the task's end, and all of it is used. (The released mammoth code keeps one batch per
    task, whatever its buffer size.) Masks of pruned and frozen weights act on both gradients.

    Works with any LightningModule whose ``forward`` maps images to logits, on a :class:`TaskDataModule`.

    Args:
        memory: number of exemplars.
        replay_batch_size: number of exemplars drawn for each step's reference gradient.

    Raises:
        ValueError: if an argument is not positive, there are more tasks than exemplars, or a checkpoint has a memory of
            another size.
        TypeError: if the data are not a :class:`TaskDataModule`.
    """

    def __init__(self, memory: int = 500, replay_batch_size: int = 32) -> None:
        if replay_batch_size < 1:
            raise ValueError(
                f"AGEM(replay_batch_size={replay_batch_size}): a reference gradient needs at least one exemplar"
            )
        self.memory = BalancedMemory(memory, by="task")
        self.replay_batch_size = replay_batch_size
        self._loaded: dict[str, Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._loaded = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data = task_data(trainer, self)
        self.memory.room_for(data.num_tasks, self)
        self.memory = BalancedMemory(self.memory.size, by="task")
        self.memory.build(data.layout, None, 0, data.labels)
        if self._loaded is not None:
            if (found := len(self._loaded["labels"])) != self.memory.size:
                raise ValueError(
                    f"AGEM(memory={self.memory.size}): the checkpoint has a memory of {found}; use that size"
                )
            self.memory.load_state_dict(self._loaded)
        self.memory.to(pl_module.device)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if len(self.memory) and params:
            agem_([p.grad for p in params], self.reference(trainer, pl_module, params))

    def reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule, params: list[Tensor]) -> list[Tensor]:
        """g_ref for each of ``params``: mean over exemplars and processes."""
        drawn = self.memory.draw(self.replay_batch_size)
        with batch_norm_still(pl_module), trainer.precision_plugin.forward_context(), torch.enable_grad():
            data = task_data(trainer)
            logits = logits_of(pl_module(data.prepare(drawn.inputs)), pl_module, data.labels.ndim == 3)
            loss = data.target.loss(logits.float(), data.target.for_loss(drawn.labels)).mean()
        with Enforcement.of(pl_module).unrecorded():
            grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
        if trainer.world_size > 1:
            for grad in grads:
                torch.distributed.all_reduce(grad)
            torch._foreach_div_(list(grads), trainer.world_size)
        return list(grads)

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        raw, labels = task_data(trainer).stored(self.memory.size)
        self.memory.admit(raw, labels, task)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.memory.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = state
