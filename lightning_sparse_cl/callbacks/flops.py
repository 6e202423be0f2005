"""What training costs, counted from what was run: passes, samples, live masks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_sparse_cl.callbacks.calls import Call, OutermostCalls
from lightning_sparse_cl.data.datamodule import TaskDataModule
from lightning_sparse_cl.metrics.accounting import DenseCost
from lightning_sparse_cl.metrics.plain import weights_of
from lightning_sparse_cl.objectives.base import Objective
from lightning_sparse_cl.objectives.teacher import Teacher
from lightning_sparse_cl.sparsity.enforcement import Enforcement
from lightning_sparse_cl.sparsity.masks import Masks

UNIT = 64  # uses of a weight are counted in units of 1/64, as a call may use only a part of it


@dataclass
class _Plain:
    """One sample's pass through a network, as in the running step."""

    macs: int = 0
    backward: bool = False


@dataclass
class _Passes:
    """Calls with the same cost since the masks last changed."""

    cost: DenseCost
    samples: int
    """Per call."""
    macs: int
    """Per call."""
    forward: int = 0
    backward: int = 0
    thirds: int = 0
    """Three per sample, but one per replayed sample and per sample without a gradient."""


class FlopsCounter(pl.Callback):
    """Counts training FLOPs of any module as its forward passes happen, without reading anything from the device.

    A product of activations with a weight, of m multiply-accumulates (see
    :class:`~lightning_sparse_cl.metrics.DenseCost`), costs 2ma FLOPs forward and, if a gradient is taken, 2ma for the
    error and 2mg for the weight. a and g are the fractions of the weight that are alive and updated; g is 0 for a
    weight that is not trained, and 1 where its whole gradient is needed: in steps such as RigL's exchanges, and where
    scores learn by it. A product of two activations, as attention has them, costs 2m forward and 4m backward.
    Everything is counted with the masks of the moment: removed data, replay, SAM's second pass, ranking passes.
    Evaluation does not count. Counts are for all processes together, each assumed to do what this one does.

    :meth:`summary` gives, in FLOPs:

    * ``training``: the training steps, physically: a replayed sample costs its forward and its backward pass;
    * ``scoring``: passes that measure which weights or samples matter;
    * ``papers``: the training steps as SparCL's tables count them (see
      :func:`~lightning_sparse_cl.metrics.sparcl_flops`): a replayed sample is charged a third of a trained one, a
      gradient mask saves the same part in all layers, and RigL's whole gradients are not charged;
    * ``dense``: plain training, the yardstick: one dense forward and backward pass, through each network that a step
      calls, for every sample served, every sample removed, and every exemplar that an :class:`Objective` draws.
      ``training / dense`` shows what SAM, selection, masks and data removal cost or save, and what a teacher's passes
      and further views cost;
    * ``per_layer``: ``training`` for each weight, by its name;
    * ``weightless``: ``training`` for products of activations, which no mask reduces;
    * ``not_counted``: what is missing in all of these, and why; empty if nothing is known to be missing.

    Every outermost call of a module counts, so that ``training_step`` need not use the module's own ``forward``. Work
    in eval mode, as objectives do at task ends (features for herding and linear heads), is not counted, nor are
    products outside modules, such as those of a loss or Fisher information. Which samples of a pass are replayed is
    known only if the module has an ``objective`` (:class:`Objective`). A :class:`Teacher`'s passes count as forward
    passes with the masks of the moment.
    """

    def __init__(self) -> None:
        self._calls: OutermostCalls | None = None
        self._clear()

    def _clear(self) -> None:
        self._served = 0
        self._sent: dict[str, list[int]] = {}  # see counts
        self._dense = 0.0
        self._plain: dict[str, _Plain] = {}
        self._weightless = {"training": 0, "scoring": 0}
        self._done: dict[str, Tensor] = {}
        """Uses of the alive and of the updated weights, (weights,), in ``UNIT``; FLOPs of ``papers``."""
        self._layers: dict[str, None] = {}  # the layers in the order of their first use
        self._missing: dict[str, str] = {}
        self._passed: dict[tuple[int, bool], _Passes] = {}
        self._version: tuple[int, int] | None = None
        self._whole = 1.0

    @property
    def counts(self) -> dict[str, int]:
        """``samples`` that the loader served; samples sent ``forward`` through the module and its teachers, including
        replayed and repeated ones; and how many of these have a gradient taken (``backward``).

        If ``training_step`` does not call its own module, the most costly module that it calls counts instead.
        """
        most = max(self._sent, key=lambda name: self._sent[name][2], default="")
        forward, backward, _ = self._sent.get("", self._sent.get(most, [0, 0, 0]))
        return {"samples": self._served, "forward": forward, "backward": backward}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._clear()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._masks, self._enforcement = Masks.of(pl_module), Enforcement.of(pl_module)
        self._processes, self._device = trainer.world_size, pl_module.device
        self._sizes = {name: p.numel() for name, p in weights_of(pl_module).items() if p.ndim > 1}
        self._calls = OutermostCalls(pl_module, self._count)
        self._calls.watch()  # now: a measurement of importance may come before training

    @contextmanager
    def counting(self, copy: pl.LightningModule) -> Iterator[None]:
        """Inside, passes through a copy of the module also count."""
        calls = OutermostCalls(copy, self._count)
        calls.watch()
        try:
            yield
        finally:
            calls.remove()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._whole = self._without_removal(trainer)  # for an epoch that is resumed in its middle
        self._new_epoch = True

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._whole = self._without_removal(trainer)
        self._settle()
        self._version = None  # weights may now be trained, or no longer be trained
        self._new_epoch = True

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._calls is not None and self._new_epoch:
            self._calls.watch()
            self._calls.heard = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        usual = type(batch) in (tuple, list) and all(isinstance(part, Tensor) for part in batch)
        tensors = [t for t in (batch if usual else tree_leaves(batch)) if isinstance(t, Tensor) and t.ndim]
        served = len(tensors[-1]) if tensors else 0
        self._served += served * self._processes
        self._add_plain(served, getattr(pl_module, "objective", None))
        if self._calls is not None and self._new_epoch:
            self._new_epoch = False
            self._miss(self._calls.failed)
            if not self._calls.heard:
                self._miss({f"{type(pl_module).__name__}.training_step": "it calls no module that can be watched"})
            self._calls.watch(all_modules=False)

    def _miss(self, missing: dict[str, str]) -> None:
        new = {name: why for name, why in missing.items() if name not in self._missing}
        self._missing |= new
        for name, why in new.items():
            rank_zero_warn(f"FlopsCounter: {name} is not counted: {why}")

    def _without_removal(self, trainer: pl.Trainer) -> float:
        """How many batches the epoch would have per batch that it has, if no data had been removed."""
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, TaskDataModule):
            return 1.0
        limit = trainer.limit_train_batches
        most = limit if isinstance(limit, int) else float("inf")
        whole, alive = (
            min(n // (data.batch_size * trainer.world_size), most)
            for n in (data.whole(data.task), len(data.alive[data.task]))
        )
        return whole / max(alive, 1)

    def _count(self, call: Call) -> None:
        if self._now() != self._version:
            self._settle()
            self._look()
        cost, scoring, n = call.cost, self._enforcement.is_scoring, call.samples
        if (passes := self._passed.get((id(cost), scoring))) is None:
            passes = self._passed[id(cost), scoring] = _Passes(cost, n, cost.total_macs())
            self._layers |= dict.fromkeys(cost.macs)
            self._miss(cost.not_counted)
        passes.forward += self._processes
        passes.backward += self._processes * call.backward
        own = "" if isinstance(call.module, Teacher) else call.name
        if (sent := self._sent.get(own)) is None:
            sent = self._sent[own] = [0, 0, passes.macs // max(n, 1)]
        sent[0] += n * self._processes
        sent[1] += n * self._processes * call.backward
        if not scoring:
            replayed = min(getattr(getattr(self._masks.module, "objective", None), "replayed", 0), n)
            passes.thirds += self._processes * (3 * (n - replayed) + replayed if call.backward else n)
            if not isinstance(call.module, Teacher):
                plain = self._plain.setdefault(call.name, _Plain())
                plain.backward |= call.backward
                plain.macs = max(plain.macs, passes.macs // max(n, 1))

    def _add_plain(self, served: int, objective: Any) -> None:
        """Add what plain training would have cost for the step that is over."""
        samples = served + (objective.drawn if isinstance(objective, Objective) else 0)
        for plain in self._plain.values():
            self._dense += 2 * plain.macs * samples * self._processes * (1 + 2 * plain.backward) * self._whole
        self._plain = {}

    def _look(self) -> None:
        """Note the masks from here on: how many weights of each layer are alive, and how many are updated."""
        masks, device = self._masks, self._device
        self._version = self._now()
        sizes, held = self._sizes, {*masks.frozen, *masks.updated}
        trained = {name for name, p in weights_of(masks.module).items() if p.requires_grad}
        alive = {n: masks.alive[n].count_nonzero() if n in masks.alive else size for n, size in sizes.items()}
        moved = {n: masks.movable(n).count_nonzero() if n in held else size for n, size in alive.items()}
        masked = torch.tensor([n in masks.alive or n in held for n in sizes], device=device)
        asked = {*self._enforcement.whole, *getattr(masks.module, "whole_gradients", list)()}
        whole = torch.tensor([n in asked for n in sizes], device=device)
        every = torch.tensor(list(sizes.values()), device=device)
        self._alive, updated = (
            torch.stack([torch.as_tensor(n, device=device) for n in counts.values()] or [every])
            for counts in (alive, moved)
        )
        updated = updated * torch.tensor([n in trained for n in sizes], device=device)
        ratio = (updated * masked).sum().float() / (self._alive * masked).sum().float()
        self._ratio = torch.where(masked.any(), ratio, 1.0)
        self._updated = torch.where(whole, every, updated)

    def _now(self) -> tuple[int, int]:
        """Changes whenever masks, or the gradients that are needed, change."""
        return self._masks.version, self._enforcement.version

    def _settle(self) -> None:
        """Add up the passes under the masks until now."""
        if self._version is None or not self._passed:
            return
        done = self._done or {
            "training": torch.zeros_like(self._alive), "scoring": torch.zeros_like(self._alive),
            "papers": torch.zeros((), dtype=torch.long),
        }  # fmt: skip
        done = {kind: value.to(self._device) for kind, value in done.items()}
        for (_, scoring), passes in self._passed.items():
            cost, forward, backward = passes.cost, passes.forward, passes.backward
            part = [cost.macs.get(name, 0) / size for name, size in self._sizes.items()]
            uses = torch.tensor([round(UNIT * each) for each in part], device=self._device)
            kind = "scoring" if scoring else "training"
            self._weightless[kind] += 2 * cost.weightless * (forward + 2 * backward)
            if scoring:
                done[kind] += uses * self._alive * (forward + 2 * backward)
                continue
            done[kind] += uses * (self._alive * (forward + backward) + self._updated * backward)
            flops = 2 * (uses.float() / UNIT * self._alive).sum() * (2 + self._ratio) / 3 + 2 * cost.weightless
            done["papers"] += (flops / max(passes.samples, 1)).round().long() * passes.thirds
        self._done, self._passed = done, {}

    def summary(self) -> dict[str, Any]:
        """The figures named above, and the :attr:`counts` of samples. Reads from the device."""
        self._settle()
        found = self.counts | {"not_counted": dict(self._missing)}
        if not self._done:
            return found
        at = {name: i for i, name in enumerate(self._sizes)}
        layers = {
            kind: {name: 2 * uses[at[name]] / UNIT for name in self._layers}
            for kind, uses in ((kind, self._done[kind].tolist()) for kind in ("training", "scoring"))
        }
        return found | {
            "training": sum(layers["training"].values()) + self._weightless["training"],
            "scoring": sum(layers["scoring"].values()) + self._weightless["scoring"],
            "papers": float(self._done["papers"]),
            "dense": self._dense,
            "weightless": float(self._weightless["training"]),
            "per_layer": layers["training"],
        }

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._calls is not None:
            self._calls.remove()
            self._calls = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        self._settle()
        return {
            "served": self._served, "sent": {name: list(sent) for name, sent in self._sent.items()},
            "dense": self._dense, "weightless": dict(self._weightless), "done": dict(self._done),
            "layers": list(self._layers), "missing": dict(self._missing),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._served, self._sent = state["served"], {name: list(sent) for name, sent in state["sent"].items()}
        self._dense, self._weightless = state["dense"], dict(state["weightless"])
        self._done, self._layers = dict(state["done"]), dict.fromkeys(state["layers"])
        self._missing = dict(state["missing"])
