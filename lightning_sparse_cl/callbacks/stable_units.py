"""Stable and plastic units: how NISPA changes connections in the phases of a task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_sparse_cl.callbacks.evaluation import held_out_accuracy, measuring
from lightning_sparse_cl.callbacks.kept_network import kept_network, put_back
from lightning_sparse_cl.callbacks.pruning import redraw
from lightning_sparse_cl.callbacks.schedule import TaskSchedule, position
from lightning_sparse_cl.callbacks.sparsifier import Sparsifier
from lightning_sparse_cl.callbacks.trainer_parts import callbacks_of, first_callback, parts_of, task_data
from lightning_sparse_cl.sparsity.channels import Channels
from lightning_sparse_cl.sparsity.enforcement import Enforcement
from lightning_sparse_cl.sparsity.layers import Chosen, network_of, weight_layers
from lightning_sparse_cl.sparsity.scores import check_number, check_sparsity, top_k_mask
from lightning_sparse_cl.sparsity.units import UnitActivity, connections, expanded, kernelwise, most_active

FEWEST = 0.05
"""A task ends when the share of activity that is to be stable is no larger."""


class StableUnits(Sparsifier):
    """Choose a task's units by their activity, and let no connection lead from other units into them (NISPA).

    The network starts with random connections, kernels of convolutions and weights of linear layers, exactly as many as
    the sparsity says, and keeps that number while there is room. A task is trained in phases. At the end of phase tau,
    in each layer,

    * the *stable* units are those of earlier tasks and the smallest set of units that has the share
      p = (1 + cos(pi tau / phases)) / 2 of the layer's activity on the training samples; the others are *plastic*;
    * connections from plastic to stable units are dropped, including those to the logits of the task's classes;
    * as many grow at random into plastic units, starting with one for each plastic unit that has no outgoing
      connection. Their weights are drawn from a normal distribution with the mean and deviation of the layer's weights.

    So a task keeps fewer units after each phase. From the third phase on, a task ends when the accuracy on held-out
    samples is lower than the best by more than ``tolerance``, or p is at most 5 %, and goes back to the network of the
    phase before. Otherwise it ends with its epochs, and keeps its network. The connections among stable units are what
    :class:`TaskSubnetworks`, which is needed next to this callback, stores and freezes; all other weights are drawn
    anew for the next task. Inputs count as stable.

    Layers whose outputs are added share units. Layers that stay dense, and the head, lose connections like all others.
    The optimiser starts afresh with each phase. Passes that measure activity and accuracy do not count in the FLOPs.

    Args:
        sparsity: zero fraction of the masked weights, in [0, 1).
        phase: epochs per phase.
        phases: after how many phases the share p would be zero.
        tolerance: how far the accuracy may fall, as a fraction.
        dense: weights that stay dense; see :class:`Sparsifier`. Depthwise convolutions always do.
        sparse: weights that are sparse; see :class:`Sparsifier`.

    Raises:
        ValueError: if an argument is out of range, a task has fewer than two phases, nothing is held out, there is no
            :class:`TaskSubnetworks`, or channels cannot be followed through the network (see :meth:`Channels.of`).
    """

    needs_tasks = True
    makes_masks = True

    def __init__(
        self,
        sparsity: float,
        phase: int = 5,
        phases: int = 30,
        tolerance: float = 0.0075,
        dense: Chosen | None = None,
        sparse: Chosen | None = None,
    ) -> None:
        super().__init__(dense, sparse)
        check_sparsity("StableUnits", sparsity)
        for name, value, least in (("phase", phase, 1), ("phases", phases, 3)):
            check_number("StableUnits", name, value, whole=True)
            if value < least:
                raise ValueError(f"StableUnits({name}={value}): a whole number, at least {least}")
        check_number("StableUnits", "tolerance", tolerance)
        if not 0 <= tolerance <= 1:
            raise ValueError(f"StableUnits(tolerance={tolerance}): a difference of accuracies, in [0, 1]")
        self.sparsity, self.phase, self.phases, self.tolerance = sparsity, phase, phases, tolerance
        self._begin()

    def _begin(self) -> None:
        """Set the state in which nothing has been learnt."""
        self.stable: list[Tensor] = []
        """The units that tasks use, one boolean (n,) for each set of :class:`Channels`."""
        self.connected: dict[str, Tensor] = {}
        """All connections after the last task, by weight."""
        self.stopped_in: list[int] = []
        """The phase whose network each task has kept, counted from 1."""
        self._chosen: list[Tensor] = []  # the stable units of the running phase
        self._kept: dict[str, Any] = {}  # the network that the last phase has trained
        self._phase, self._best = 0, 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._begin()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        data, schedule = task_data(trainer, self), first_callback(trainer, TaskSchedule)
        self._refuse_rivals(trainer)
        keeping = [c for c in callbacks_of(trainer, Sparsifier) if c.keeps_tasks]
        if not keeping:
            raise ValueError("StableUnits: TaskSubnetworks stores what tasks use; add it to the callbacks")
        if not getattr(keeping[0], "share", True):
            raise ValueError(
                "StableUnits: TaskSubnetworks(share=False) keeps whole networks, and freezes nothing; leave it out"
            )
        if not data.val_fraction:
            raise ValueError(
                "StableUnits: phases end by the accuracy on held-out samples; set the data module's val_fraction"
            )
        if schedule is not None and not parts_of(trainer).fast_dev_run:
            learnt = len(data.learnt.classes) if data.learnt else 0
            for task in range(learnt, data.num_tasks):
                if (epochs := schedule.epochs_of(task)) < 2 * self.phase:
                    raise ValueError(
                        f"StableUnits(phase={self.phase}): task {task} has {epochs} epochs, but at least two phases "
                        f"of {self.phase} are needed; use a shorter phase or more epochs"
                    )
        self.channels = Channels.of(network_of(pl_module))
        *names, self._head = weight_layers(network_of(pl_module))
        followed = {*self.channels.reads, *self.channels.along}
        self._layers = [name for name in names if name.removesuffix(".weight") in followed]
        self._say_how_much(pl_module)

    # -- a task ----------------------------------------------------------------------------------------------------

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        sparse, device = set(self.names(pl_module)), pl_module.device
        self.masks.set_alive(self._head, None)
        for i, name in enumerate(self._layers):
            weight, seed = pl_module.get_parameter(name), task_data(trainer).order_seed + 1000 * task + i
            if name not in self.connected:
                is_sparse = name in sparse and name.removesuffix(".weight") in self.channels.reads
                self.masks.set_alive(name, self._drawn(weight, seed) if is_sparse else torch.ones_like(weight).bool())
            else:
                redraw(pl_module, name, ~self.masks.frozen_part(name), seed)
                self.masks.set_alive(name, self.connected[name].to(device))
        self.stable = self.stable or [torch.zeros(n, dtype=torch.bool, device=device) for n in self.channels.sizes]
        self.stable = [units.to(device) for units in self.stable]
        self.stable[self.channels.input].fill_(True)
        outputs = torch.zeros(self.channels.sizes[self.channels.output], dtype=torch.bool, device=device)
        self.stable[self.channels.output] = outputs  # each task has its own outputs, and there may be more than before
        if task > 0:
            self._clear_biases(pl_module)
        self._chosen, self._kept, self._phase, self._best = [], {}, 0, 0.0
        self.stopped_in.append(0)

    def _drawn(self, weight: Tensor, seed: int) -> Tensor:
        """Connections at random, exactly as many as the sparsity says."""
        scores = torch.rand(weight.shape[:2], generator=torch.Generator().manual_seed(seed % 2**62))
        kernels = top_k_mask(scores, max(1, round((1 - self.sparsity) * scores.numel())))
        return expanded(kernels.to(weight.device), weight)

    @torch.no_grad()
    def _clear_biases(self, pl_module: pl.LightningModule) -> None:
        """Biases of plastic units start from zero, as their weights start anew."""
        network = network_of(pl_module)
        for layer, units in (*self.channels.writes.items(), *self.channels.along.items()):
            bias = network.get_submodule(layer).bias
            if f"{layer}.weight" in self._layers and isinstance(bias, Tensor):
                bias.masked_fill_(~self.stable[units], 0)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        at = position(trainer)
        if at.over or (at.epoch + 1) % self.phase:  # if over, the task has ended with its last batch
            return
        if self._end_phase(trainer, pl_module) or self._share() <= FEWEST:
            self._take_back(pl_module)
            task_data(trainer).end_task()
            return
        kept = kept_network([network_of(pl_module)], self.masks)
        self._kept = kept | {"chosen": self._chosen, "phase": self._phase}
        self._choose(trainer, pl_module)

    def _share(self) -> float:
        """p, the share of each layer's activity that stable units have in the running phase."""
        return (1 + math.cos(math.pi * min(self._phase, self.phases) / self.phases)) / 2

    def _end_phase(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """End a phase; returns whether it has cost too much accuracy."""
        accuracy = held_out_accuracy(trainer, pl_module, getattr(pl_module, "running", pl_module))
        pl_module.log("units/held_out", accuracy, rank_zero_only=True)
        self._phase += 1
        failed = self._phase > 2 and accuracy < self._best - self.tolerance
        self._best = max(self._best, accuracy)
        return failed

    def _take_back(self, pl_module: pl.LightningModule) -> None:
        """Go back to the network that the last phase had trained, and to the units that were stable then."""
        put_back([network_of(pl_module)], self.masks, self._kept)
        self._chosen = [units.to(pl_module.device) for units in self._kept["chosen"]]
        self.stopped_in[-1] = self._kept["phase"]

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        if not self.stopped_in[-1]:  # the task's epochs are over
            if self._end_phase(trainer, pl_module):
                self._take_back(pl_module)
            else:
                self.stopped_in[-1] = self._phase
        if not self._chosen:  # the task was ended within its first phase
            self._choose(trainer, pl_module)
        self.stable = self._chosen
        alive = self.masks.alive
        for name in self._layers:
            weight = pl_module.get_parameter(name)
            self.connected[name] = alive[name]
            self.masks.set_alive(name, alive[name] & self._between(name, weight, self.stable, self.stable))
        self._chosen, self._kept = [], {}

    # -- units and connections ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def _choose(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the stable units of the next phase; drop connections into them, and grow others."""
        data, share = task_data(trainer), self._share()
        chosen = [most_active(activity, share) for activity in self._activity(trainer, pl_module)]
        self._chosen = [old | new for old, new in zip(self.stable, chosen, strict=True)]
        live = torch.zeros_like(self.stable[self.channels.output])
        live[: data.num_classes] = data.live().to(live.device)
        self._chosen[self.channels.input], self._chosen[self.channels.output] = self.stable[self.channels.input], live
        plastic = [~units for units in self._chosen]
        for i, name in enumerate(self._layers):
            weight, alive = pl_module.get_parameter(name), self.masks.alive[name]
            kept = alive & ~self._between(name, weight, self._chosen, plastic)
            if (dropped := int(kernelwise(alive & ~kept).sum())) == 0:
                continue
            seed = data.order_seed + 1000 * data.task + 50 * self._phase + i
            generator = torch.Generator().manual_seed((seed + 2**40) % 2**62)
            grown = self._grown(name, weight, kept, dropped, plastic, generator)
            values = weight[kept] if kept.any() else weight.new_zeros(1)
            drawn = torch.randn(weight.shape, generator=generator).to(weight)
            new = values.mean() + values.std(correction=0) * drawn
            self.masks.set_alive(name, kept | grown)
            weight.copy_(torch.where(grown, new, weight))
        head = pl_module.get_parameter(self._head)
        self.masks.set_alive(self._head, ~self._between(self._head, head, self._chosen, plastic))
        for optimizer in trainer.optimizers:
            optimizer.state.clear()
        Enforcement.of(pl_module).apply_to_averages()

    def _activity(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[Tensor]:
        """Mean activity on the task's training samples, of all processes."""
        run: Callable[[Any], Any] = getattr(pl_module, "running", pl_module)
        scoring = Enforcement.of(pl_module).scoring()
        with scoring, measuring(trainer, pl_module), UnitActivity(network_of(pl_module), self.channels) as activity:
            for x, _ in task_data(trainer).samples():
                run(x)
        means = activity.means()
        for mean in means if trainer.world_size > 1 else ():
            torch.distributed.all_reduce(mean)
        return means

    def _between(self, name: str, weight: Tensor, to: Sequence[Tensor], of: Sequence[Tensor]) -> Tensor:
        return connections(self.channels, name, weight, to, of)

    def _grown(
        self, name: str, weight: Tensor, kept: Tensor, count: int, plastic: list[Tensor], generator: torch.Generator
    ) -> Tensor:
        """``count`` new connections into plastic units, at random; units that lead nowhere come first."""
        everything = [torch.ones_like(units) for units in plastic]
        alive = kernelwise(kept)
        pool = kernelwise(self._between(name, weight, plastic, everything)) & ~alive
        scores = torch.rand(pool.shape, generator=generator).to(weight.device).masked_fill_(~pool, -1)
        units = plastic[self.channels.reads[name.removesuffix(".weight")]]
        of_unit = scores.view(len(scores), len(units), -1).transpose(0, 1).flatten(1)  # (C_in, all its connections)
        leads = alive.view(len(scores), len(units), -1).any(2).any(0)
        first = torch.zeros_like(of_unit).scatter_(1, of_unit.argmax(1, keepdim=True), 1)
        of_unit = of_unit + first * (units & ~leads)[:, None]
        scores = of_unit.view(len(units), len(scores), -1).transpose(0, 1).flatten(1)
        return expanded(top_k_mask(scores, count, pool), weight)

    # -- summary and state -------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """``phases``: the phase whose network each task has kept; ``stable``: by layer, the part of its units that the
        tasks use together.
        """
        parts = [float(units.float().mean()) for units in self.stable]
        writes = self.channels.writes.items()
        layers = {layer: parts[units] for layer, units in writes if f"{layer}.weight" in self._layers}
        return {"phases": self.stopped_in, "stable": layers if parts else {}}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "stable": self.stable, "connected": self.connected, "stopped_in": self.stopped_in, "chosen": self._chosen,
            "kept": self._kept, "phase": self._phase, "best": self._best,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.stable, self.connected = list(state["stable"]), dict(state["connected"])
        self.stopped_in, self._chosen, self._kept = list(state["stopped_in"]), list(state["chosen"]), state["kept"]
        self._phase, self._best = state["phase"], state["best"]
