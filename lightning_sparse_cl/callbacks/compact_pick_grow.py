"""When CPG compacts, picks and grows: the stages of a task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_sparse_cl.callbacks.early_stopping import TaskEarlyStopping
from lightning_sparse_cl.callbacks.evaluation import accuracy_on, held_out_accuracy
from lightning_sparse_cl.callbacks.gradual_pruning import cubic
from lightning_sparse_cl.callbacks.kept_network import kept_network, put_back
from lightning_sparse_cl.callbacks.lr_schedule import TaskLRSchedule
from lightning_sparse_cl.callbacks.pruning import Reopen, redraw
from lightning_sparse_cl.callbacks.schedule import TaskSchedule, position
from lightning_sparse_cl.callbacks.sparsifier import Sparsifier, reset_state
from lightning_sparse_cl.callbacks.target_accuracy import check_target, targets_of
from lightning_sparse_cl.callbacks.trainer_parts import first_callback, parts_of, task_data
from lightning_sparse_cl.nests import Nest
from lightning_sparse_cl.sparsity.channels import Channels
from lightning_sparse_cl.sparsity.layers import network_of, weight_layers
from lightning_sparse_cl.sparsity.scores import check_number, top_k_mask
from lightning_sparse_cl.sparsity.units import connections
from lightning_sparse_cl.sparsity.weight_scores import WeightScores

STEPS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""The sparsities that CPG's code tries, one after the other."""


class Picking(Protocol):
    """A module that picks weights of earlier tasks, as this callback sees it: :class:`~lightning_sparse_cl.CPG`."""

    picks: WeightScores

    def running(self, x: Nest) -> Tensor:
        """Logits (B, num_classes) of images (B, C, H, W) by the network of the running task."""


class CompactPickGrow(Sparsifier):
    """The stages of a task of CPG, on a module that has scores of old weights as ``picks``.

    * *learn*: the free weights, and which of the old ones are used, for ``learn`` epochs. If the held-out accuracy is
      below the target, or the accuracy on the training samples not above ``fits``, the network grows to the next of
      ``sizes``, and the task starts over. In the largest network it goes on with what it has.
    * *compact*: prune the task's weights to each of the sparsities ``steps`` in turn, in ``compact`` epochs each, while
      the training samples are fitted. In the first ``ramp`` epochs of each the sparsity rises along a cubic. The
      largest sparsity that reaches the target is kept. A task that has missed either in the largest network is pruned
      anyway, until every remaining task has an equal share.
    * *retrain*: what is left, and which old weights are used, all of them at first, for ``retrain`` epochs, or until
      ``patience`` epochs pass without improvement; the best network is kept. The first task has no old weights to pick,
      and skips this stage.

    A sparsity is the fraction of the weights that no earlier task has. The learning rates fall as in the code: for the
    weights to a tenth at half of learning, again at four fifths, and to a tenth in the other stages; for the picks to a
    fifth at half of learning, to zero at seven tenths if there are free weights, and to a fifth while retraining.
    Passes that measure accuracy do not count in the FLOPs.

    Args:
        target: accuracy that a task is to reach, see :class:`~lightning_sparse_cl.SparseGrowth`.
        learn: epochs of learning.
        compact: epochs per sparsity.
        ramp: how many of these raise the sparsity.
        retrain: largest number of epochs of retraining; 0 for none.
        patience: epochs of retraining without improvement after which it ends.
        steps: the sparsities, rising, in (0, 1).
        interval: steps between two prunings of a ramp.
        sizes: the network's size at first and after each growth, as a fraction of all weights, rising to 1; each layer
            uses its first sqrt(size) channels.
        fits: accuracy on the training samples that must be exceeded, in [0, 1].

    Raises:
        ValueError: if an argument is out of range or does not fit the run, nothing is held out to decide by, or
            channels cannot be followed through the network.
        TypeError: if the module has no picks.
    """

    after = (*Sparsifier.after, Reopen)
    needs_tasks = True
    makes_masks = True

    def __init__(
        self,
        target: float | list[float] | str | list[str],
        learn: int = 100,
        compact: int = 20,
        ramp: int = 4,
        retrain: int = 30,
        patience: int = 5,
        steps: Sequence[float] = STEPS,
        interval: int = 10,
        sizes: Sequence[float] = (2 / 3, 1.0),
        fits: float = 0.95,
    ) -> None:
        super().__init__()
        check_target("CompactPickGrow", target)
        whole = {"learn": learn, "compact": compact, "ramp": ramp, "patience": patience, "interval": interval}
        for name, value, least in (*((name, value, 1) for name, value in whole.items()), ("retrain", retrain, 0)):
            check_number("CompactPickGrow", name, value, whole=True)
            if value < least:
                raise ValueError(f"CompactPickGrow({name}={value}): a whole number, at least {least}")
        if ramp > compact:
            raise ValueError(f"CompactPickGrow(ramp={ramp}): at most compact={compact}, the epochs of one sparsity")
        for name, values in (("steps", steps), ("sizes", sizes)):
            if not isinstance(values, list | tuple) or not values:
                raise ValueError(f"CompactPickGrow({name}={values!r}): a list of fractions")
            for value in values:
                check_number("CompactPickGrow", name, value)
            if list(values) != sorted(set(values)):
                raise ValueError(f"CompactPickGrow({name}={values}): each is larger than the one before")
        if not 0 < steps[0] <= steps[-1] < 1:
            raise ValueError(f"CompactPickGrow(steps={steps}): sparsities in (0, 1)")
        if sizes[0] <= 0 or sizes[-1] != 1:
            raise ValueError(f"CompactPickGrow(sizes={sizes}): fractions of the weights, of which the last is 1")
        check_number("CompactPickGrow", "fits", fits)
        if not 0 <= fits <= 1:
            raise ValueError(f"CompactPickGrow(fits={fits}): an accuracy, in [0, 1]")
        steps, sizes = tuple(steps), tuple(sizes)
        self.target, self.learn, self.compact, self.ramp, self.retrain = target, learn, compact, ramp, retrain
        self.patience, self.steps, self.interval, self.sizes, self.fits = patience, steps, interval, sizes, fits
        self._restart()

    def _restart(self) -> None:
        """Set the state in which nothing has been learnt."""
        self.grown = 0
        """How often the network has grown."""
        self.size_of: list[float] = []
        """The size in which each task was learnt."""
        self.sparsities: list[float] = []
        """The sparsity to which each task was pruned; 0 if not at all."""
        self._at: dict[str, Any] = {}  # the running task's stage, and its findings
        self._start: dict[str, Any] = {}  # the network at the task's start
        self._best: dict[str, Any] = {}  # the best network so far

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._restart()

    @property
    def longest(self) -> int:
        """Largest number of epochs of a task."""
        return self.learn * len(self.sizes) + self.compact * len(self.steps) + self.retrain

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        data, schedule = task_data(trainer, self), first_callback(trainer, TaskSchedule)
        if not isinstance(getattr(pl_module, "picks", None), WeightScores):
            raise TypeError(f"CompactPickGrow: {type(pl_module).__name__} has no WeightScores as `picks`; use CPG")
        self._refuse_rivals(trainer)
        for other in parts_of(trainer).callbacks:
            if isinstance(other, TaskEarlyStopping | TaskLRSchedule):
                raise ValueError(
                    f"CompactPickGrow: its stages end by themselves, and set the learning rates; leave "
                    f"{type(other).__name__} out"
                )
            if isinstance(other, Reopen) and other.part < 1:
                raise ValueError(f"CompactPickGrow: a task gets all free weights; leave Reopen(part={other.part}) out")
        if not data.val_fraction:
            raise ValueError("CompactPickGrow: it decides on held-out samples; set the data module's val_fraction")
        learnt = len(data.learnt.classes) if data.learnt else 0
        for task in range(learnt, data.num_tasks) if not parts_of(trainer).fast_dev_run else ():
            if schedule is not None and (epochs := schedule.epochs_of(task)) < self.longest:
                raise ValueError(
                    f"CompactPickGrow(learn={self.learn}, compact={self.compact}, retrain={self.retrain}): all stages "
                    f"take up to {self.longest} epochs, and task {task} has {epochs}; use more epochs or shorter stages"
                )
        self.targets = targets_of("CompactPickGrow", self.target, data.num_tasks)
        self.channels = Channels.of(network_of(pl_module))
        followed = {f"{name}.weight" for name in (*self.channels.reads, *self.channels.along)}
        *self._layers, self._head = (n for n in weight_layers(network_of(pl_module)) if n in followed)

    # -- stages ----------------------------------------------------------------------------------------------------

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        self._open(pl_module)
        _picking(pl_module).picks.begin(task)
        self.sparsities.append(0.0)
        self._at, self._best = {}, {}
        self._start = kept_network(self._parts(pl_module), self.masks)
        self._enter(trainer, "learn")

    def _enter(self, trainer: pl.Trainer, stage: str) -> None:
        """Begin a stage, with fresh optimisers."""
        self._at |= {"stage": stage, "epoch": 0}
        for optimizer in trainer.optimizers:
            optimizer.state.clear()

    @property
    def picks_learn(self) -> bool:
        """Whether the running stage learns which old weights are used."""
        return self._at.get("stage") in ("learn", "retrain")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if batch_idx == 0:
            self._set_rates(trainer, pl_module)

    def _set_rates(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the learning rates of the epoch that begins."""
        free = any(bool(self.masks.movable(name).any()) for name in self._layers)
        done = self._at["epoch"] / self.learn
        of_weights, of_picks = {
            "learn": (0.1 ** ((done >= 0.5) + (done >= 0.8)), (1.0 if done < 0.5 else 0.2) * (done < 0.7 or not free)),
            "compact": (0.1, 0.0),
            "retrain": (0.1, 0.2),
        }[self._at["stage"]]
        picks = {id(p) for p in _picking(pl_module).picks.parameters()}
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                rate = group.setdefault("initial_lr", group["lr"])
                group["lr"] = rate * (of_picks if any(id(p) in picks for p in group["params"]) else of_weights)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        batches = self._at["epoch"] * trainer.num_training_batches + batch_idx + 1
        until = self.ramp * trainer.num_training_batches
        if self._at["stage"] == "compact" and (batches == until or (batches < until and batches % self.interval == 0)):
            self._prune(trainer, pl_module, cubic(batches / until, self._sparsity(-1), self._sparsity()))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if position(trainer).over:  # the task has ended with its last batch
            return
        self._end_epoch(trainer, pl_module)
        if self._at["stage"] == "done":
            task_data(trainer).end_task()

    def _end_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._at["epoch"] += 1
        ended = {"learn": self._learnt, "compact": self._compacted, "retrain": self._retrained}
        ended[self._at["stage"]](trainer, pl_module)

    def _learnt(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._at["epoch"] < self.learn:
            return
        task, tasks = task_data(trainer).task, task_data(trainer).num_tasks
        reached, fits = self._accuracy(trainer, pl_module), self._fits(trainer, pl_module)
        missed = reached < self.targets[task] or not fits
        if missed and self.grown + 1 < len(self.sizes):
            self._grow(trainer, pl_module)
            return
        must = 1 - round(1 / (tasks - task), 1) if missed else None  # leaves an equal share to each coming task
        self._keep(pl_module, reached)
        self._at |= {"must": must, "step": 0}
        if not any(bool(self.masks.movable(name).any()) for name in self._layers):
            self._enter(trainer, "done")
        elif must == 0:
            self._to_retrain(trainer, pl_module)
        else:
            self._enter(trainer, "compact")

    def _compacted(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._at["epoch"] < self.compact:
            return
        reached, must = self._accuracy(trainer, pl_module), self._at["must"]
        goes_on = self._fits(trainer, pl_module) if must is None else self._sparsity() < must - 1e-9
        if must is not None or (goes_on and reached >= self.targets[task_data(trainer).task]):
            self._keep(pl_module, reached, self._sparsity())
        if goes_on and self._at["step"] + 1 < len(self.steps):
            self._at["step"] += 1
            self._enter(trainer, "compact")
        else:
            self._to_retrain(trainer, pl_module)

    def _to_retrain(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._take_best(pl_module)
        self._enter(trainer, "retrain" if self.masks.frozen and self.retrain else "done")
        if self._at["stage"] == "retrain":
            _picking(pl_module).picks.begin(task_data(trainer).task)
            self._at["waited"] = 0

    def _retrained(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        reached = self._accuracy(trainer, pl_module)
        if reached > self._best["reached"]:
            self._keep(pl_module, reached, self._best["sparsity"])
            self._at["waited"] = 0
        else:
            self._at["waited"] += 1
        if self._at["epoch"] == self.retrain or self._at["waited"] == self.patience:
            self._enter(trainer, "done")

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        if self._at["stage"] in ("compact", "retrain"):  # its epochs are over
            self._end_epoch(trainer, pl_module)
        if self._best:  # otherwise it was ended before it had learnt anything
            self._take_best(pl_module)
            self.sparsities[-1] = self._best["sparsity"]
        self.size_of.append(self.sizes[self.grown])
        self._start, self._best = {}, {}

    # -- what a stage does -------------------------------------------------------------------------------------------

    def _parts(self, pl_module: pl.LightningModule) -> list[nn.Module]:
        return [network_of(pl_module), _picking(pl_module).picks]

    def _keep(self, pl_module: pl.LightningModule, reached: float, sparsity: float = 0.0) -> None:
        kept = kept_network(self._parts(pl_module), self.masks)
        self._best = kept | {"reached": reached, "sparsity": sparsity}

    def _take_best(self, pl_module: pl.LightningModule) -> None:
        put_back(self._parts(pl_module), self.masks, self._best)

    def _accuracy(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> float:
        found = held_out_accuracy(trainer, pl_module, _picking(pl_module).running)
        pl_module.log("growth/held_out", found, rank_zero_only=True)
        return found

    def _fits(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Whether the training samples are learnt well enough."""
        samples = task_data(trainer).samples()
        return accuracy_on(trainer, pl_module, _picking(pl_module).running, samples) > self.fits

    def _sparsity(self, further: int = 0) -> float:
        """The sparsity of the running step of compacting, or of the step before."""
        step = self._at["step"] + further
        return self.steps[step] if step >= 0 else 0.0

    def _open(self, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        """Open the network to its present size; returns which entries of each weight exist."""
        part, device = math.sqrt(self.sizes[self.grown]), pl_module.device
        fixed = (self.channels.input, self.channels.output)
        units = [
            torch.arange(size, device=device) < (size if s in fixed else max(1, round(part * size)))
            for s, size in enumerate(self.channels.sizes)
        ]
        names = (*self._layers, self._head)
        there = {n: connections(self.channels, n, pl_module.get_parameter(n), units, units) for n in names}
        for name, mask in there.items():
            self.masks.set_alive(name, mask)
        return there

    def _grow(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the task over in a larger network."""
        put_back(self._parts(pl_module), self.masks, self._start)
        before = dict(self.masks.alive)
        self.grown += 1
        seed = task_data(trainer).order_seed + 1000 * task_data(trainer).task + 100 * self.grown
        for i, (name, there) in enumerate(self._open(pl_module).items()):
            redraw(pl_module, name, there & ~before[name], seed + i)
        self._start = kept_network(self._parts(pl_module), self.masks)
        self._enter(trainer, "learn")

    def _prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, sparsity: float) -> None:
        """Keep the largest of the task's own weights; ``sparsity`` counts the weights that no earlier task has."""
        dead = {}
        for name in self._layers:
            frozen, alive = self.masks.frozen_part(name), self.masks.alive[name]
            there = self._start["alive"][name].to(frozen.device) & ~frozen
            count = max(1, int(there.sum()) - round(sparsity * int(there.sum())))
            own = top_k_mask(pl_module.get_parameter(name).abs(), count, alive & ~frozen)
            self.masks.set_alive(name, own | (alive & frozen))
            dead[name] = alive & ~own & ~frozen
        reset_state(trainer, pl_module, dead)

    # -- summary and state -------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """By task: the ``size`` of the network as a fraction of the whole one's weights, the ``sparsity`` of the
        weights that the task could have, and the ``target``.
        """
        return {
            "size": self.size_of, "sparsity": self.sparsities[: len(self.size_of)],
            "target": self.targets[: len(self.size_of)],
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "grown": self.grown, "size_of": self.size_of, "sparsities": self.sparsities, "at": self._at,
            "start": self._start, "best": self._best,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.grown, self.size_of, self.sparsities = state["grown"], list(state["size_of"]), list(state["sparsities"])
        self._at, self._start, self._best = dict(state["at"]), state["start"], state["best"]


def _picking(pl_module: pl.LightningModule) -> Picking:
    return cast(Picking, pl_module)  # on_fit_start has checked
