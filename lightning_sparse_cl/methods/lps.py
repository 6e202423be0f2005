"""LPS: learn, prune and share, a subnetwork per task found by ADMM (Wang et al., 2020)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from lightning_sparse_cl.callbacks.pruning import Reopen
from lightning_sparse_cl.callbacks.schedule import TaskSchedule, position
from lightning_sparse_cl.callbacks.sparsifier import reset_state
from lightning_sparse_cl.callbacks.subnetworks import TaskSubnetworks
from lightning_sparse_cl.callbacks.trainer_parts import first_callback, parts_of, task_data
from lightning_sparse_cl.methods.isolation import IsolatingModule
from lightning_sparse_cl.nests import Nest
from lightning_sparse_cl.objectives.base import CrossEntropy, Objective
from lightning_sparse_cl.optim.sam import UpdateRule
from lightning_sparse_cl.sparsity.admm import ADMM
from lightning_sparse_cl.sparsity.layers import weight_layers
from lightning_sparse_cl.sparsity.masks import Masks
from lightning_sparse_cl.sparsity.scores import top_k_mask


class LPS(IsolatingModule):
    """ "Learn-Prune-Share for Lifelong Learning"::

        learn   train the free weights W; old ones are multiplied   ``multipliers``
                with B, which starts at 1 and is learnt
        prune   ADMM draws W to its k largest entries, and B to     pruning, sharing = ADMM()
                the 90 % largest, for rho = 0.01, 0.1, 1 in turn
                then W keeps k entries, and B is 0 or 1
        share   retrain W with the old weights that B has kept;     subnetworks = TaskSubnetworks
                a task's weights stay for ever

    Task t keeps the share a_t of all weights of a layer; the last one is not pruned. W is projected among free weights
    alone and B among old ones, where the released code ranks both together, and exactly k are kept. The code keeps the
    epoch that is best on test data; here the last one is kept. It cycles the learning rate within each stage: policy
    ``TaskLRSchedule``.

    Args:
        backbone: maps a batch of samples, such as images (B, C, H, W), to features (B, D).
        shares: how the weights are divided among the tasks, one positive number per task. If None, equally.
        kept: fraction of the old weights that a task uses, in (0, 1].
        rho: the rho of each stage of ADMM, in turn.
        admm: epochs per stage.
        every: epochs between updates of Z and U.
        retrain: a task's last epochs, which train under its mask.
        subnetworks: how tasks are kept apart. If None, each has its own batch-norm.
        objective: if None, cross-entropy among the task's classes.
        update: if None, one backward pass.
        optimizer: for W and B. If None, Adam with learning rate 0.0005.
        policies: further callbacks.

    Raises:
        ValueError: if an argument is out of range, there are not as many shares as tasks, or a task has too few
            epochs for all stages.
    """

    masks_are_learnt = True

    def __init__(
        self,
        backbone: nn.Module,
        shares: list[float] | None = None,
        kept: float = 0.9,
        rho: tuple[float, ...] = (0.01, 0.1, 1.0),
        admm: int = 3,
        every: int = 1,
        retrain: int = 3,
        subnetworks: TaskSubnetworks | None = None,
        objective: Objective | None = None,
        update: UpdateRule | None = None,
        optimizer: Callable[[Iterable], Optimizer] | None = None,
        policies: Sequence[pl.Callback] = (),
    ) -> None:
        for name, value in (("admm", admm), ("every", every), ("retrain", retrain)):
            if value < 1:
                raise ValueError(f"LPS({name}={value}): a number of epochs, at least 1")
        if not 0 < kept <= 1:
            raise ValueError(f"LPS(kept={kept}): the fraction of old weights that a task uses, in (0, 1]")
        if not rho or min(rho) <= 0:
            raise ValueError(f"LPS(rho={rho}): at least one stage, each > 0")
        if shares is not None and (not shares or min(shares) <= 0):
            raise ValueError(f"LPS(shares={shares}): one positive number per task")
        super().__init__(
            backbone,
            objective or CrossEntropy(single_head=True),
            update,
            optimizer or partial(Adam, lr=0.0005),
            policies=[subnetworks or TaskSubnetworks(), Reopen("zero"), *policies],
        )
        self.shares, self.kept, self.rho = shares, kept, tuple(rho)
        self.admm, self.every, self.retrain = admm, every, retrain
        self.names: list[str] = []
        self.multipliers = nn.ParameterList()
        """B, of each weight's shape; it acts on old weights."""
        self.pruning, self.sharing = ADMM(), ADMM()

    def build(
        self, layout: Nest, num_classes: int, seed: int = 0, inputs: Nest | None = None, target: str = "classes",
        labels: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().build(layout, num_classes, seed, inputs, target, labels)
        *layers, _ = weight_layers(self.network).items()
        self.names = [name for name, _ in layers]
        self.multipliers = nn.ParameterList(nn.Parameter(torch.ones_like(layer.weight)) for _, layer in layers)
        self.pruning.build(self._free())
        self.sharing.build(self._old())

    # -- the two sets of values ------------------------------------------------------------------------------------

    def _free(self) -> dict[str, Tensor]:
        """W: the weights that no task has, zero elsewhere."""
        masks = Masks.of(self)
        return {name: self.get_parameter(name).masked_fill(masks.frozen_part(name), 0) for name in self.names}

    def _old(self) -> dict[str, Tensor]:
        """B where tasks have weights, zero elsewhere."""
        masks = Masks.of(self)
        return {n: b * masks.frozen_part(n) for n, b in zip(self.names, self.multipliers, strict=True)}

    def _kept_free(self, name: str, value: Tensor) -> Tensor:
        free = ~Masks.of(self).frozen_part(name)
        return top_k_mask(value.abs(), self._count(name), free)

    def _kept_old(self, name: str, value: Tensor) -> Tensor:
        old = Masks.of(self).frozen_part(name)
        return top_k_mask(value, round(self.kept * int(old.sum())), old)

    def _count(self, name: str) -> int:
        """How many of a weight's entries the running task keeps; the last task keeps all that are left."""
        data, n = task_data(self.trainer), self.get_parameter(name).numel()
        shares = self.shares or [1.0] * data.num_tasks
        until = [round(part * n / sum(shares)) for part in accumulate(shares)]
        return until[data.task] - (until[data.task - 1] if data.task else 0)

    # -- stages ----------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        super().on_fit_start()
        data, schedule = task_data(self.trainer), first_callback(self.trainer, TaskSchedule)
        if self.shares is not None and len(self.shares) != data.num_tasks:
            raise ValueError(f"LPS(shares={self.shares}): one per task, and there are {data.num_tasks} tasks")
        for task in range(data.num_tasks) if not parts_of(self.trainer).fast_dev_run else ():
            epochs = position(self.trainer).epochs if schedule is None else schedule.epochs_of(task)
            if (needed := len(self.rho) * self.admm + self.retrain) > epochs:
                raise ValueError(
                    f"LPS(rho={self.rho}, admm={self.admm}, retrain={self.retrain}): together these take {needed} "
                    f"epochs, but task {task} has {epochs}"
                )

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        super().on_task_start(trainer, pl_module, task)
        with torch.no_grad():
            for b in self.multipliers:
                b.fill_(1)

    def on_train_epoch_start(self) -> None:
        at = position(self.trainer)
        first = int(at.epochs) - self.retrain - len(self.rho) * self.admm
        if at.epoch == int(at.epochs) - self.retrain:
            self.prune()
        elif at.epoch == first:
            self.pruning.begin(self._free(), self._projected(self._kept_free))
            self.sharing.begin(self._old(), self._projected(self._kept_old))
        elif at.epoch > first and (at.epoch - first) % self.every == 0 and self._stage() is not None:
            self.pruning.update(self._free(), self._projected(self._kept_free))
            self.sharing.update(self._old(), self._projected(self._kept_old))

    @staticmethod
    def _projected(mask_of: Callable[[str, Tensor], Tensor]) -> Callable[[str, Tensor], Tensor]:
        return lambda name, value: value * mask_of(name, value)

    def _stage(self) -> float | None:
        """The rho of the running epoch. If None, ADMM does not run."""
        at = position(self.trainer)
        since = at.epoch - (int(at.epochs) - self.retrain - len(self.rho) * self.admm)
        return self.rho[since // self.admm] if 0 <= since < len(self.rho) * self.admm else None

    def penalty(self) -> Tensor | float:
        """rho/2 ||W - Z + U||^2, for W and for B."""
        if (rho := self._stage()) is None:
            return super().penalty()
        return super().penalty() + rho * (self.pruning.distance(self._free()) + self.sharing.distance(self._old()))

    @torch.no_grad()
    def prune(self) -> None:
        """Set the mask for the rest of the task: its own k weights, and the old ones that it shares."""
        masks, last = Masks.of(self), task_data(self.trainer).task == task_data(self.trainer).num_tasks - 1
        free, old = self._free(), self._old()
        for name in self.names:
            own = ~masks.frozen_part(name) if last else self._kept_free(name, free[name])
            masks.set_alive(name, own | self._kept_old(name, old[name]))
        reset_state(self.trainer, self, {name: ~masks.alive[name] for name in self.names})

    def on_before_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        super().on_before_task_end(trainer, pl_module, task)
        if not self._is_pruned():
            self.prune()  # the task ended early

    def _is_pruned(self) -> bool:
        alive = Masks.of(self).alive  # looked up once
        return all(name in alive for name in self.names)

    def effective_weights(self) -> dict[str, Tensor]:
        """Weights times B, until the task is pruned."""
        masks = Masks.of(self)
        if not masks.frozen or self._is_pruned():
            return {}
        return {
            name: torch.where(masks.frozen_part(name), self.get_parameter(name) * b, self.get_parameter(name))
            for name, b in zip(self.names, self.multipliers, strict=True)
        }

    def idle(self) -> list[nn.Parameter]:
        """B, unless it multiplies weights, or ADMM draws it."""
        return [] if self._stage() is not None or self.effective_weights() else list(self.multipliers)

    def whole_gradients(self) -> list[str]:
        """While B is learnt, the gradients of old weights are taken, too."""
        return self.names if self.effective_weights() else []
