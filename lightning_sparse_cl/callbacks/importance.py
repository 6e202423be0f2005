"""Gradients that show which weights matter, taken in separate passes (the terms of SparCL's eqs 1 and 3)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_sparse_cl.callbacks.own_loss import LossOf, own_loss
from lightning_sparse_cl.callbacks.trainer_parts import parts_of
from lightning_sparse_cl.data.datamodule import TaskDataModule
from lightning_sparse_cl.nests import split
from lightning_sparse_cl.objectives.memory import ExemplarMemory, Exemplars
from lightning_sparse_cl.sparsity.enforcement import Enforcement


def mean_gradients(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    names: Sequence[str],
    batches: Iterable[Any],
    live: Tensor | None = None,
    alive_only: bool = False,
    loss: LossOf | None = None,
) -> dict[str, Tensor]:
    """Gradient of the mean loss over all ``batches`` and processes, by weight.

    The loss is the module's own, see :func:`~lightning_sparse_cl.callbacks.own_loss.own_loss`. Weights, ``.grad``,
    batch-norm statistics and random numbers are left as they are. Gradients are whole: masks do not act on them.

    Args:
        trainer: the trainer.
        pl_module: the module whose loss it is.
        names: names of the weights.
        batches: the batches to average over; each process may have its own.
        live: classes (C,) that compete in the loss, if the module gives its loss by ``scoring_loss``. If None, all.
            With the current task's classes the loss is *single-head*.
        alive_only: gradients of pruned weights are not looked at, and may be anything.
        loss: a function of (module, batch) that is used instead.

    Raises:
        ValueError: if the loss cannot be computed.
    """
    weights = {name: pl_module.get_parameter(name) for name in names}
    sums = {n: torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for n, w in weights.items()}
    asked, count = [name for name, w in weights.items() if w.requires_grad], 0
    with Enforcement.of(pl_module).scoring(alive_only), own_loss(trainer, pl_module, loss) as (module, compute):
        tensors = [module.get_parameter(name) for name in asked]
        reached = False
        for batch in batches:
            with torch.enable_grad():
                total, samples = compute(batch, live)
            grads = torch.autograd.grad(total, tensors, allow_unused=True)
            reached = reached or any(grad is not None for grad in grads)
            for name, grad in zip(asked, grads, strict=True):
                if grad is not None:
                    sums[name] += grad
            count += samples
        if count and asked and not reached:
            raise ValueError(
                f"{type(pl_module).__name__}: its loss has no gradient for {', '.join(asked[:3])}; a function that it "
                "holds may compute with the weights of another module. Give a function of (module, batch) as `loss`"
            )
    if trainer.world_size > 1:
        over = torch.tensor(count, device=pl_module.device)
        for value in (*sums.values(), over):
            torch.distributed.all_reduce(value)
        count = int(over)
    torch._foreach_div_(list(sums.values()), max(count, 1))
    return sums


def task_batches(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[Any]:
    """D_t: the samples that the current task trains on, once each."""
    if isinstance(data := parts_of(trainer).datamodule, TaskDataModule):
        yield from data.samples()
    else:
        for i, batch in enumerate(cast(Iterable[Any], trainer.train_dataloader)):
            if i >= trainer.num_training_batches:
                break
            batch = pl_module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
            yield trainer.strategy.batch_to_device(batch, pl_module.device)


def live_classes(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Tensor | None:
    """The current task's classes as a mask (C,). None if there are no tasks."""
    data = parts_of(trainer).datamodule
    return data.live().to(pl_module.device) if isinstance(data, TaskDataModule) else None


def memory_of(pl_module: pl.LightningModule) -> ExemplarMemory | None:
    """The module's memory, if it has one that is not empty."""
    memory = next((m for m in pl_module.modules() if isinstance(m, ExemplarMemory)), None)
    return memory if memory is not None and len(memory) else None


def memory_batches(trainer: pl.Trainer, exemplars: Exemplars, size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
    """Exemplars as the network sees them, not augmented."""
    data = parts_of(trainer).datamodule
    for x, y in zip(split(exemplars.inputs, size), exemplars.labels.split(size), strict=True):
        yield data.prepare(x, augment=False) if isinstance(data, TaskDataModule) else x, y
