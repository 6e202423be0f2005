"""Dynamic data removal: stop training on samples that are already learnt (SparCL, 4.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_sparse_cl.backbones.batch_norm import batch_norm_still
from lightning_sparse_cl.callbacks.outputs import logits_of
from lightning_sparse_cl.callbacks.schedule import TaskSchedule, position
from lightning_sparse_cl.callbacks.task_callback import TaskCallback
from lightning_sparse_cl.callbacks.trainer_parts import first_callback, parts_of, task_data
from lightning_sparse_cl.data.loader import length
from lightning_sparse_cl.data.targets import KINDS
from lightning_sparse_cl.sparsity.enforcement import Enforcement


def _wrong(logits: Tensor, y: Tensor) -> Tensor:
    return (logits.argmax(1) != y).float()


def _gradient(logits: Tensor, y: Tensor) -> Tensor:
    return (logits.softmax(1) - F.one_hot(y, logits.shape[1])).norm(dim=1)


DIFFICULTY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "misclassification": _wrong,
    "forgetting": _wrong,
    "gradient": _gradient,
}
WITHOUT_CLASSES = ("loss", "random")


class DynamicDataRemoval(TaskCallback):
    """DDR (SparCL, section 4.2): remove the easiest samples of the task, a part after each of its first stages.

    After stage i = 1 ... cutoff, each of ``interval`` epochs, fraction * i / cutoff of the task's samples are gone:
    those that were easiest during the stage, with ties broken at random, identically on every process and in a resumed
    run. Removed samples can no longer enter a memory; those in it are still replayed. Statistics start anew with every
    stage.

    How hard a sample is (means over its presentations in the stage, as it may miss one in an incomplete last batch; the
    logits are the training step's, for the augmented image, and all classes compete):

    * ``"misclassification"``: how often it was misclassified (the paper);
    * ``"forgetting"``: how often it was unlearnt, i.e. right once and wrong the next time; a sample that was never
      right counts as hardest (the released code);
    * ``"gradient"``: norm of the loss's gradient with respect to the logits (DDR-GSS in Table A4, which does not say
      how; GSS itself compares the directions of gradients, which the paper's remark on redundancy does not need);
    * ``"loss"``: its loss (DDR-LARS in Table A4): what ``training_step`` returns as ``per_sample``, (B,), if it does;
      otherwise the target's loss, for classes cross-entropy;
    * ``"random"``: the same for all, so that samples are removed at random: the baseline for the other ways.

    Works with any LightningModule on a :class:`TaskDataModule`. If ``training_step`` returns ``logits`` (B, C) of the
    batch they are used, otherwise the batch is passed forward once more, without gradient. If labels are not classes,
    only ``by="loss"`` works.

    Args:
        fraction: rho, the total fraction of each task's samples that is removed, in [0, 1).
        cutoff: the last stage that removes samples.
        interval: delta k, epochs per stage; the same as in :class:`TaskAwareDynamicMasking`.
        by: how hard and easy samples are told apart.
        one_shot: remove all at once after stage ``cutoff``, as in the comparison of Fig 3.

    Raises:
        ValueError: if an argument is out of range, or labels are not classes and ``by`` is not ``"loss"``.
        TypeError: if the data are not a :class:`TaskDataModule`.
    """

    def __init__(
        self,
        fraction: float = 0.3,
        cutoff: int = 4,
        interval: int = 5,
        by: Literal["misclassification", "forgetting", "gradient", "loss", "random"] = "misclassification",
        one_shot: bool = False,
    ) -> None:
        name = type(self).__name__
        if not 0 <= fraction < 1:
            raise ValueError(f"{name}(fraction={fraction}): the fraction of samples removed, in [0, 1)")
        if cutoff < 1:
            raise ValueError(f"{name}(cutoff={cutoff}): the last stage that removes samples, at least 1")
        if interval < 1:
            raise ValueError(f"{name}(interval={interval}): epochs per stage, at least 1")
        if by not in (ways := [*DIFFICULTY, *WITHOUT_CLASSES]):
            raise ValueError(f"{name}(by={by!r}): by is one of {', '.join(ways)}")
        self.fraction, self.cutoff, self.interval, self.by, self.one_shot = fraction, cutoff, interval, by, one_shot
        self._stage: dict[str, Tensor] = {}

    def remaining(self, samples: int, stage: int) -> int:
        """How many of a task's ``samples`` are left after the given number of stages."""
        stages = min(stage, self.cutoff) if not self.one_shot else self.cutoff * (stage >= self.cutoff)
        return samples - round(self.fraction * samples * stages / self.cutoff)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data, name = task_data(trainer, self), type(self).__name__
        if self.by not in WITHOUT_CLASSES and data.target is not KINDS["classes"]:
            raise ValueError(
                f"{name}(by={self.by!r}): labels of the kind {data.target.kind!r} are not classes; use by='loss'"
            )
        schedule = first_callback(trainer, TaskSchedule)
        further = range(0 if data.learnt is None else len(data.learnt.classes), data.num_tasks)
        for task in further if self.fraction and not parts_of(trainer).fast_dev_run else ():
            epochs = position(trainer).epochs if schedule is None else schedule.epochs_of(task)
            if self.cutoff * self.interval > epochs:
                raise ValueError(
                    f"{name}(cutoff={self.cutoff}, interval={self.interval}): task {task} takes {epochs} epochs, which "
                    f"is {int(epochs // self.interval)} stages of {self.interval}; cutoff is at most that"
                )
            left = self.remaining(data.whole(task), self.cutoff)
            if left < data.batch_size * trainer.world_size:
                raise ValueError(
                    f"{name}(fraction={self.fraction}): {left} of the {data.whole(task)} samples of task {task} would "
                    f"be left, fewer than a batch of {data.batch_size} for each of {trainer.world_size} process(es)"
                )

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: tuple[Tensor, Tensor],
        batch_idx: int,
    ) -> None:  # fmt: skip
        data, at = task_data(trainer), position(trainer)
        if not self.fraction or at.epoch >= self.cutoff * self.interval:
            return
        y = batch[1]
        hard = self._hard(trainer, pl_module, outputs if isinstance(outputs, Mapping) else {}, batch)
        index = data.indices(batch_idx).to(y.device, non_blocking=True)
        if trainer.world_size > 1:  # so that every process has the same statistics
            hard, index = (torch.as_tensor(pl_module.all_gather(part)).flatten() for part in (hard, index))
        if not self._stage:
            self._stage = self._empty(length(data.train_sets[at.task]), y.device)
        stage = self._stage
        if self.by == "forgetting":
            right = 1 - hard
            hard = stage["right"][index] * hard
            stage["ever"][index] = torch.maximum(stage["ever"][index], right)
            stage["right"][index] = right
        stage["sum"][index] += hard
        stage["seen"][index] += 1

    def _hard(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Mapping[str, Any], batch: Any
    ) -> Tensor:
        """How hard each sample (B,) of the batch is now."""
        x, y = batch
        if self.by == "random":
            return torch.zeros(len(y), device=y.device)
        if self.by == "loss" and "per_sample" in outputs:
            return outputs["per_sample"].detach().float()
        data = task_data(trainer)
        if y.ndim != data.labels.ndim or y.is_floating_point() != data.labels.is_floating_point():
            raise ValueError(
                f"{type(self).__name__}(by={self.by!r}): labels of shape {tuple(y.shape)} and {y.dtype} are not "
                f"{data.target.kind} like those of the data; return each sample's loss (B,) from training_step as "
                "'per_sample', and use by='loss'"
            )
        difficulty = DIFFICULTY.get(self.by, data.target.loss)
        if "logits" in outputs:
            return difficulty(outputs["logits"].float(), y)
        apart = Enforcement.of(pl_module).scoring()
        with apart, batch_norm_still(pl_module), trainer.precision_plugin.forward_context():
            return difficulty(logits_of(pl_module(x), pl_module, y.ndim == 3).float(), y)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        at, data = position(trainer), task_data(trainer)
        if not self._stage or (at.epoch + 1) % self.interval:
            return
        alive, stage = data.alive[at.task], (at.epoch + 1) // self.interval
        superfluous = len(alive) - self.remaining(data.whole(at.task), stage)
        if superfluous > 0 and not at.over:
            hard = self.difficulty().cpu()[alive]
            tie_break = torch.Generator().manual_seed((data.order_seed + 1000 * at.task + stage) % 2**63)
            shuffled = torch.randperm(len(alive), generator=tie_break)
            easiest = shuffled[hard[shuffled].argsort(stable=True)[:superfluous]]
            kept = torch.ones(len(alive), dtype=torch.bool)
            kept[easiest] = False
            data.alive[at.task] = alive[kept]
        self._stage = {}

    def difficulty(self) -> Tensor:
        """How hard each sample (n,) of the task's training set was in the running stage."""
        stage = self._stage
        keep = stage["seen"] == 0  # nothing is known about them
        if self.by == "forgetting":
            keep = keep | (stage["ever"] == 0)
        return (stage["sum"] / stage["seen"]).masked_fill(keep, torch.inf)

    def _empty(self, samples: int, device: torch.device) -> dict[str, Tensor]:
        kinds = ("sum", "seen", "right", "ever") if self.by == "forgetting" else ("sum", "seen")
        return {kind: torch.zeros(samples, device=device) for kind in kinds}

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        self._stage = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._stage = {}
        if stage == "fit":
            parts_of(trainer).reload_dataloaders_every_n_epochs = 1  # a shrunken task needs a new loader

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stage = {kind: value.to(pl_module.device) for kind, value in self._stage.items()}

    def state_dict(self) -> dict[str, Any]:
        return dict(self._stage)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stage = dict(state)
