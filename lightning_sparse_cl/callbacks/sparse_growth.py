"""When CL-LSG grows: pick and reuse first, grow channels only if the target accuracy is missed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn

from lightning_sparse_cl.backbones.batch_norm import norm_tensors
from lightning_sparse_cl.callbacks.evaluation import held_out_accuracy
from lightning_sparse_cl.callbacks.pruning import Reopen, redraw
from lightning_sparse_cl.callbacks.schedule import TaskSchedule, position
from lightning_sparse_cl.callbacks.sparsifier import Sparsifier
from lightning_sparse_cl.callbacks.target_accuracy import check_target, targets_of
from lightning_sparse_cl.callbacks.trainer_parts import first_callback, task_data
from lightning_sparse_cl.nests import Nest
from lightning_sparse_cl.sparsity.enforcement import Enforcement
from lightning_sparse_cl.sparsity.gates import GrowthGates
from lightning_sparse_cl.sparsity.units import expanded


class Growing(Protocol):
    """A module that grows, as this callback sees it. :class:`~lightning_sparse_cl.CLLSG` is one."""

    gates: GrowthGates

    def running(self, x: Nest) -> Tensor:
        """Logits (B, num_classes) of images (B, C, H, W) by the network of the running task."""


class SparseGrowth(Sparsifier):
    """Two stages per task (Algorithm 1 of CL-LSG), on a module that has :class:`GrowthGates` as ``gates``.

    Stage 1, pick and reuse: selective masks on the kernels that earlier tasks own, and training of the released ones,
    for at most ``reuse_epochs``. Stage 2, growth of new channels, for the rest of the task's epochs. After every epoch
    the Task-IL accuracy of the noiseless network on the held-out samples is compared with the target: as soon as it is
    reached the task ends; a task that never reaches it keeps what it has. The first task does the same from the seed
    network (the paper grows it at once), so that with a target that is always reached the network never grows. The
    seed's weights, except the head's, are scaled to the variance of a freshly drawn network of its size.

    Batch-norm statistics of training belong to drawn masks, and are measured anew for the network without noise, before
    each comparison and when a task ends (``torch.optim.swa_utils.update_bn``).

    Args:
        target: accuracy in [0, 1] that makes growth unnecessary: one for all tasks, or one per task. Above 1 it is
            never reached. Or the ``metrics.json`` of a run (or of several: the best is taken, task by task) whose
            ``held_out`` accuracies are the target, such as the paper's best of "scratch" and "fine-tune". The paper
            compares on test data, so that the structure is chosen on the data by which it is judged.
        reuse_epochs: largest number of epochs in stage 1; fewer than the epochs of a task.

    Raises:
        ValueError: if an argument is out of range or does not fit the run, or no samples are held out to decide by.
        TypeError: if the module has no gates.
    """

    after = (*Sparsifier.after, Reopen)
    needs_tasks = True
    makes_masks = True

    def __init__(self, target: float | list[float] | str | list[str], reuse_epochs: int = 10) -> None:
        super().__init__()
        if reuse_epochs < 1:
            raise ValueError(f"SparseGrowth(reuse_epochs={reuse_epochs}): stage 1 takes at least one epoch")
        check_target("SparseGrowth", target)
        self.target, self.reuse_epochs = target, reuse_epochs
        self.grew: list[bool] = []
        self.reached: list[float] = []
        self.allocated: list[float] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.grew, self.reached, self.allocated = [], [], []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        data = task_data(trainer, self)
        if not isinstance(getattr(pl_module, "gates", None), GrowthGates):
            raise TypeError(f"SparseGrowth: {type(pl_module).__name__} has no GrowthGates as `gates`; use CLLSG")
        if not data.val_fraction:
            raise ValueError("SparseGrowth: growth is decided on held-out samples; set the data module's val_fraction")
        schedule = first_callback(trainer, TaskSchedule)
        if schedule is None:
            raise TypeError("SparseGrowth: stages are epochs of tasks; add a TaskSchedule")
        shortest = min(schedule.epochs_of(task) for task in range(data.num_tasks))
        if self.reuse_epochs >= shortest:
            raise ValueError(
                f"SparseGrowth(reuse_epochs={self.reuse_epochs}): a task has {shortest} epochs, none is left to grow"
            )
        self.targets = targets_of("SparseGrowth", self.target, data.num_tasks)

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        gates = _growing(pl_module).gates
        gates.begin(self.masks.frozen)
        for name, allocated in gates.allocated_kernels().items():
            weight = pl_module.get_parameter(name)
            self.masks.set_alive(name, expanded(allocated, weight))
            if task == 0 and name != gates.head:  # it was drawn for as many inputs as the whole network has
                weight.data *= math.sqrt(allocated.shape[1] / int(allocated[0].sum()))
        self.grew.append(False)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        at = position(trainer)
        if at.over:  # the task ended with its last batch
            return
        self._measure_batch_norm(trainer, pl_module)
        accuracy = held_out_accuracy(trainer, pl_module, _growing(pl_module).running)
        pl_module.log("growth/held_out", accuracy, rank_zero_only=True)
        if accuracy >= self.targets[at.task]:
            task_data(trainer).end_task()
        elif at.epoch + 1 == self.reuse_epochs:
            self.grow(trainer, pl_module)

    def grow(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin stage 2: draw the weights of channels that can be grown, and open all gates."""
        at, gates = position(trainer), _growing(pl_module).gates
        for i, (name, allocated) in enumerate(gates.allocated_kernels().items()):
            self.masks.set_alive(name, None)
            new = ~expanded(allocated, pl_module.get_parameter(name))
            redraw(pl_module, name, new, task_data(trainer).order_seed + 1000 * at.task + 500 + i)
        gates.growing.fill_(True)
        for optimizer in trainer.optimizers:
            optimizer.state.clear()
        self.grew[-1] = True

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        self._measure_batch_norm(trainer, pl_module)
        self.reached.append(held_out_accuracy(trainer, pl_module, _growing(pl_module).running))
        for name, mask in _growing(pl_module).gates.finish().items():
            weight = pl_module.get_parameter(name)
            self.masks.set_alive(name, expanded(mask.expand(weight.shape[:2]), weight))
        self.allocated.append(self._allocated(pl_module))

    def _allocated(self, pl_module: pl.LightningModule) -> float:
        """Weights between allocated channels, except the head's, as a fraction of the whole network's."""
        *kernels, _ = _growing(pl_module).gates.allocated_kernels().items()
        weights = {name: pl_module.get_parameter(name) for name, _ in kernels}
        there = sum(int(mask.sum()) * weights[name][0, 0].numel() for name, mask in kernels)
        return there / sum(w.numel() for w in weights.values())

    def _measure_batch_norm(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        training, gates = pl_module.training, _growing(pl_module).gates
        with gates.still(), Enforcement.of(pl_module).scoring(), trainer.precision_plugin.forward_context():
            update_bn(_equal_batches(task_data(trainer).samples()), pl_module)
        pl_module.train(training)
        if trainer.world_size > 1:  # the mean over the processes' shares
            for tensor in norm_tensors(pl_module).values():
                if not tensor.requires_grad and tensor.is_floating_point():
                    torch.distributed.all_reduce(tensor)
                    tensor /= trainer.world_size

    def summary(self) -> dict[str, Any]:
        """By task: whether it ``grew``, the ``target`` and what it ``reached`` on held-out samples, and the weights
        that are ``allocated`` after it, released ones included, as a fraction of the whole network's.
        """
        return {
            "grew": self.grew, "target": self.targets[: len(self.reached)], "reached": self.reached,
            "allocated": self.allocated,
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"grew": self.grew, "reached": self.reached, "allocated": self.allocated}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.grew, self.reached, self.allocated = (list(state[k]) for k in ("grew", "reached", "allocated"))


def _growing(pl_module: pl.LightningModule) -> Growing:
    return cast(Growing, pl_module)  # on_fit_start has checked


def _equal_batches(batches: Iterable[tuple[Nest, Tensor]]) -> Iterator[tuple[Nest]]:
    """Batches of samples without a smaller last batch, as all count the same; in tuples, as torch expects."""
    size = 0
    for x, y in batches:
        if len(y) >= size:
            size = len(y)
            yield (x,)
