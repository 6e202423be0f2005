"""Gradients that tell which weights matter, taken in passes of their own (the terms of SparCL's eqs 1 and 3)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_sparse_cl.backbones.batch_norm import batch_norm_still
from lightning_sparse_cl.data.datamodule import TaskDataModule
from lightning_sparse_cl.objectives.memory import ExemplarMemory, Exemplars
from lightning_sparse_cl.sparsity import Masks

Batches = Iterable[tuple[Tensor, Tensor]]


def mean_gradients(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    names: Sequence[str],
    batches: Batches,
    live: Tensor | None = None,
    alive_only: bool = False,
) -> dict[str, Tensor]:
    """Gradient of the mean cross-entropy over all ``batches`` (x, y) and processes, by weight.

    Weights, ``.grad`` and batch-norm statistics are left as they are. Gradients are whole: no mask acts on them.

    Args:
        trainer: the trainer.
        pl_module: maps x to logits (B, C).
        names: of the weights.
        batches: what to take the mean over; each process may have other ones.
        live: classes (C,) that compete in the loss; None is all. The current task's make it *single-head*.
        alive_only: gradients of pruned weights are not looked at, and may be anything.

    Raises:
        ValueError: if a batch is not (x, y), or the module does not map images to logits.
    """
    weights = {name: pl_module.get_parameter(name) for name in names}
    sums = {n: torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for n, w in weights.items()}
    asked, count = [name for name, w in weights.items() if w.requires_grad], 0
    for batch in batches:
        if not (isinstance(batch, tuple | list) and len(batch) == 2 and all(map(torch.is_tensor, batch))):
            raise ValueError(
                f"{type(pl_module).__name__}: gradients are measured on batches (images, labels), this one is a "
                f"{type(batch).__name__}; use the gradients of the training step where there is a choice"
            )
        x, y = batch
        with (
            Masks.of(pl_module).scoring(alive_only),
            batch_norm_still(pl_module),
            trainer.precision_plugin.forward_context(),
        ):
            logits = pl_module(x)
            if not torch.is_tensor(logits) or logits.ndim != 2:
                raise ValueError(
                    f"{type(pl_module).__name__}: its forward must map images to logits (B, C) for gradients to be "
                    "measured; use the gradients of the training step where there is a choice"
                )
            if live is not None:  # the module may have more outputs than the data have classes
                logits = logits.masked_fill(~F.pad(live, (0, logits.shape[1] - len(live))), -torch.inf)
            loss = F.cross_entropy(logits.float(), y, reduction="sum")
            grads = torch.autograd.grad(loss, [weights[name] for name in asked], allow_unused=True)
        for name, grad in zip(asked, grads, strict=True):
            if grad is not None:
                sums[name] += grad
        count += len(y)
    if trainer.world_size > 1:
        total = torch.tensor(count, device=pl_module.device)
        for value in (*sums.values(), total):
            torch.distributed.all_reduce(value)
        count = int(total)
    torch._foreach_div_(list(sums.values()), max(count, 1))
    return sums


def task_batches(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[tuple[Tensor, Tensor]]:
    """D_t: the samples of the current task that are trained on, once."""
    if isinstance(trainer.datamodule, TaskDataModule):
        yield from trainer.datamodule.samples()
    else:
        for i, batch in enumerate(trainer.train_dataloader):
            if i >= trainer.num_training_batches:
                break
            yield trainer.strategy.batch_to_device(batch, pl_module.device)


def live_classes(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Tensor | None:
    """The current task's classes as a mask (C,); None where tasks are not known."""
    data = trainer.datamodule
    return data.live().to(pl_module.device) if isinstance(data, TaskDataModule) else None


def memory_of(pl_module: pl.LightningModule) -> ExemplarMemory | None:
    """The module's memory, if it has one and something is in it."""
    memory = next((m for m in pl_module.modules() if isinstance(m, ExemplarMemory)), None)
    return memory if memory is not None and len(memory) else None


def memory_batches(trainer: pl.Trainer, exemplars: Exemplars, size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
    """Exemplars as the network sees them, not augmented."""
    data = trainer.datamodule
    for x, y in zip(exemplars.images.split(size), exemplars.labels.split(size), strict=True):
        yield data.prepare(x, augment=False) if isinstance(data, TaskDataModule) else x, y
