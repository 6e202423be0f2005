"""What training costs, counted from what was run: passes, samples, live masks."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_sparse_cl.data.datamodule import TaskDataModule
from lightning_sparse_cl.metrics.accounting import DenseCost
from lightning_sparse_cl.objectives.teacher import Teacher
from lightning_sparse_cl.sparsity.enforcement import Enforcement
from lightning_sparse_cl.sparsity.layers import network_of
from lightning_sparse_cl.sparsity.masks import Masks


class FlopsCounter(pl.Callback):
    """Counts training FLOPs as samples pass through ``pl_module(x)``, without reading anything from the device.

    Of each convolution and linear layer, with m multiply-accumulates an image (``torch.utils.flop_counter``) and the
    fractions a of its weights alive and g updated, a sample costs 2ma forward and, if a gradient is taken, 2ma for the
    error and 2mg for the weights (1 in place of g on steps that need whole gradients, such as RigL's exchanges).
    Everything is counted at the masks of its moment: removed data, replay, SAM's second pass, ranking passes.
    Evaluation is not training and does not count. Counts are of all processes together.

    :meth:`summary` tells, in FLOPs:

    * ``training``: of the training steps, physically: a replayed sample costs its forward and its backward pass;
    * ``scoring``: of passes that measure which weights or samples matter;
    * ``papers``: of the training steps as SparCL's tables count (see
      :func:`~lightning_sparse_cl.metrics.sparcl_flops`): a replayed sample is charged a third of a trained one, a
      gradient mask saves its part in all layers alike, and RigL's whole gradients are not charged;
    * ``dense``: what ``training`` would have been without masks and with no data removed;
    * ``per_layer``: ``training`` of each layer.

    A module whose ``training_step`` does not go through its own ``forward``, or whose ``forward`` does not take a batch
    of images, has its samples counted only. Work in functional calls and in eval mode, as objectives do it at task ends
    (Fisher information, features for herding and linear heads), is not counted. List it before callbacks that measure
    importance, or their first pass is missed. Which samples of a pass are replayed is known where the module has an
    ``objective`` (:class:`Objective`). A :class:`Teacher`'s passes count as forward passes at the masks of the moment.
    """

    def __init__(self) -> None:
        self.counts = {"samples": 0, "forward": 0, "backward": 0}
        """Samples that the loader served; those sent forward, replayed and repeated ones included; those of them
        through which a gradient is taken."""
        self.cost: DenseCost | None = None
        self._hooks: list[RemovableHandle] = []
        self._clear()

    def _clear(self) -> None:
        self.counts = dict.fromkeys(self.counts, 0)
        self._dense = 0.0
        self._done: dict[str, Tensor] = {}
        """Products of samples and weights of each layer, (layers,), whole numbers; thirds of trained samples' FLOPs."""
        self._passed = {"training": [0, 0], "scoring": [0, 0], "papers": [0]}  # since the masks last changed
        self._version: tuple[int, int] | None = None
        self._whole = 1.0
        self._tried = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.cost = None
            self._clear()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._masks, self._enforcement = Masks.of(pl_module), Enforcement.of(pl_module)
        self._processes = trainer.world_size
        self._done = {name: value.to(pl_module.device) for name, value in self._done.items()}
        self._whole = self._without_removal(trainer)  # of an epoch that is resumed in its middle
        teachers = [m for m in pl_module.modules() if isinstance(m, Teacher)]
        self._hooks = [pl_module.register_forward_pre_hook(self._count)]
        self._hooks += [teacher.register_forward_pre_hook(self._count_teacher) for teacher in teachers]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._whole = self._without_removal(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.cost is None and not self._tried:
            self._tried, self.cost = True, dense_cost(pl_module, batch)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        if isinstance(batch, tuple | list) and torch.is_tensor(batch[-1]):
            self.counts["samples"] += len(batch[-1]) * self._processes

    def _without_removal(self, trainer: pl.Trainer) -> float:
        """How many batches the epoch would have for each that it has, had no data been removed."""
        data = trainer.datamodule
        if not isinstance(data, TaskDataModule):
            return 1.0
        limit = trainer.limit_train_batches
        most = limit if isinstance(limit, int) else float("inf")
        whole, alive = (
            min(n // (data.batch_size * trainer.world_size), most)
            for n in (data.whole(data.task), len(data.alive[data.task]))
        )
        return whole / max(alive, 1)

    def _count(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        # Under DDP the training step itself is sent through the module's call, with a batch and not with images.
        if not module.training or self.cost is None or not inputs or not torch.is_tensor(inputs[0]):
            return
        if self._now() != self._version:
            self._settle()
            self._look()
        self._add(len(inputs[0]) * self._processes, torch.is_grad_enabled(), getattr(module, "objective", None))

    def _count_teacher(self, teacher: nn.Module, inputs: tuple[Tensor]) -> None:
        if teacher.training and self.cost is not None and self._version is not None:
            self._add(len(inputs[0]) * self._processes, False, None)

    def _add(self, n: int, backward: bool, objective: nn.Module | None) -> None:
        self.counts["forward"] += n
        self.counts["backward"] += n * backward
        passed = self._passed["scoring" if self._enforcement.is_scoring else "training"]
        passed[0] += n
        passed[1] += n * backward
        if not self._enforcement.is_scoring:
            replayed = getattr(objective, "replayed", 0) * self._processes
            self._passed["papers"][0] += 3 * (n - replayed) + replayed if backward else n
            self._dense += 2 * self.cost.total_macs() * n * (1 + 2 * backward) * self._whole

    def _look(self) -> None:
        """The masks of what follows: how many weights of each layer are alive, and how many updated."""
        masks, device = self._masks, self._masks.module.device
        self._version = self._now()
        sizes = {name: masks.module.get_parameter(name).numel() for name in self.cost.macs}
        alive = {name: masks.alive[name].count_nonzero() if name in masks.alive else n for name, n in sizes.items()}
        held = {*masks.frozen, *masks.updated}
        updated = {name: masks.movable(name).count_nonzero() if name in held else n for name, n in alive.items()}
        masked = torch.tensor([name in masks.alive or name in held for name in sizes], device=device)
        every = torch.tensor(list(sizes.values()), device=device)
        macs = torch.tensor(list(self.cost.macs.values()), device=device, dtype=torch.float32)
        whole = torch.tensor([name in self._enforcement.whole for name in sizes], device=device)
        self._alive, updated = (
            torch.stack([torch.as_tensor(n, device=device) for n in counts.values()]) for counts in (alive, updated)
        )
        self._updated = torch.where(whole, every, updated)
        forward = (2 * macs * self._alive.float() / every.float()).sum()
        ratio = torch.where(masked.any(), (updated * masked).sum().float() / (self._alive * masked).sum().float(), 1.0)
        self._third = (forward * (2 + ratio) / 3).round().long()

    def _now(self) -> tuple[int, int]:
        """Another one whenever masks are others, or other gradients are wanted."""
        return self._masks.version, self._enforcement.version

    def _settle(self) -> None:
        """Add up what passed under the masks until now."""
        if self._version is None:
            return
        (forward, backward), (scored, graded), (papers,) = self._passed.values()
        now = {
            "training": (forward + backward) * self._alive + backward * self._updated,
            "scoring": (scored + 2 * graded) * self._alive,
            "papers": papers * self._third,
        }
        self._done = {name: value + self._done.get(name, 0) for name, value in now.items()}
        self._passed = {name: [0] * len(passed) for name, passed in self._passed.items()}

    def summary(self) -> dict[str, Any]:
        """The figures named above, and the :attr:`counts` of samples. Reads from the device."""
        self._settle()
        if self.cost is None or not self._done:
            return dict(self.counts)
        sizes = {name: self._masks.module.get_parameter(name).numel() for name in self.cost.macs}
        layers = {
            kind: {n: 2 * m / sizes[n] * v for (n, m), v in zip(self.cost.macs.items(), self._done[kind].tolist())}
            for kind in ("training", "scoring")
        }
        return dict(self.counts) | {
            "training": sum(layers["training"].values()),
            "scoring": sum(layers["scoring"].values()),
            "papers": float(self._done["papers"]),
            "dense": self._dense,
            "per_layer": layers["training"],
        }

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        self._settle()
        cost = None if self.cost is None else asdict(self.cost)
        return {"counts": dict(self.counts), "dense": self._dense, "done": dict(self._done), "cost": cost}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts, self._dense, self._done = dict(state["counts"]), state["dense"], dict(state["done"])
        self.cost = None if state["cost"] is None else DenseCost(**state["cost"])


def dense_cost(pl_module: pl.LightningModule, batch: Any) -> DenseCost | None:
    """What an image of ``batch`` (x, ...) costs ``pl_module`` dense; None, with a warning, where that is not known."""
    if not (isinstance(batch, tuple | list) and torch.is_tensor(batch[0])):
        rank_zero_warn(
            f"{type(pl_module).__name__}: its FLOPs and footprint are not counted, for a batch, a "
            f"{type(batch).__name__}, does not begin with a tensor of images"
        )
        return None
    try:
        return DenseCost.of(network_of(pl_module), batch[0].shape[1:])
    except Exception as error:  # any module may be trained; one that cannot be counted is not to be stopped
        rank_zero_warn(
            f"{type(pl_module).__name__}: its FLOPs and footprint are not counted, for its forward does not take "
            f"images of {tuple(batch[0].shape[1:])} ({type(error).__name__})"
        )
        return None
