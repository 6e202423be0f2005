"""A subnetwork per task: what a task has used is frozen and remembered, so that nothing of it is ever forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_sparse_cl.backbones.batch_norm import norm_tensors, norms
from lightning_sparse_cl.callbacks.compact_pick_grow import CompactPickGrow
from lightning_sparse_cl.callbacks.score_pruning import ScorePruning
from lightning_sparse_cl.callbacks.sparse_growth import SparseGrowth
from lightning_sparse_cl.callbacks.sparsifier import Sparsifier
from lightning_sparse_cl.callbacks.stable_units import StableUnits
from lightning_sparse_cl.callbacks.task_callback import TaskCallback
from lightning_sparse_cl.callbacks.trainer_parts import task_data
from lightning_sparse_cl.data.targets import KINDS
from lightning_sparse_cl.metrics import mask_bits
from lightning_sparse_cl.objectives.base import Objective
from lightning_sparse_cl.sparsity.layers import network_of, weight_layers
from lightning_sparse_cl.sparsity.sharing import sharing
from lightning_sparse_cl.sparsity.subnetworks import Subnetworks
from lightning_sparse_cl.sparsity.task_inference import LargestLogit, TaskInference


class TaskSubnetworks(Sparsifier):
    """At a task's end, store its mask as bits, freeze its weights for all later tasks, and copy its own tensors.

    Which weights a task uses is decided by other callbacks (:class:`DropAndGrow`, :class:`OneShotPruning`,
    :class:`SparseGrowth`, :class:`StableUnits`, :class:`CompactPickGrow`), or by a module that learns masks and returns
    them from ``task_masks()``, and from ``task_negated()`` where it changes signs; list this one after those that prune
    at task ends and before those that draw masks at task starts. Layers without a mask are used, and so frozen, by the
    first task. A task's own tensors are the rows of its classes in the head, the last linear layer, and biases. Later
    tasks may use frozen weights, but never change them.

    Every task's logits are bit-identical ever after: those of ``Subnetworks.of(module).network(task)``. Works on any
    LightningModule whose ``forward`` maps images to logits and whose last layer is a linear head.

    Args:
        batch_norm: what happens to batch-norm, whose statistics and parameters are part of what a task has learnt:

            * ``"per_task"``: each task has a copy; nothing is forgotten.
            * ``"frozen"``: all tasks use the first task's, in eval mode (PackNet); nothing is forgotten.
            * ``"shared"``: it keeps changing, as in "Continual Dynamic Sparse Training", section 4: earlier tasks
              change with it. (Its code has batch-norm without running statistics, so that logits depend on the other
              samples of the test batch; that is not offered.)

        full: what to do in a task that finds no free weight in its mask: ``"error"``, or ``"share"`` to go on with
            batch-norm, biases and head on top of frozen weights.
        share: if False, keep a whole copy of the network for every task, and freeze nothing: independent networks, each
            starting from the last one's weights (fine-tuning) or, with :class:`FromScratch`, anew.
        inference: how the task of a sample is inferred where it is not given, in Class-IL and by ``predict``. If None,
            :class:`~lightning_sparse_cl.LargestLogit`. A test may use another one than training did.

    Raises:
        ValueError: if an argument is none of these, no weight is free, there is only one task and so none to infer, the
            last layer is not a head of all classes, the objective does not train the head by its loss, or the module
            has already learnt tasks.
        TypeError: if the data are not a :class:`TaskDataModule`.
    """

    after = (*Sparsifier.after, ScorePruning, SparseGrowth, StableUnits, CompactPickGrow)
    needs_tasks = True
    keeps_tasks = True

    def __init__(
        self,
        batch_norm: Literal["per_task", "frozen", "shared"] = "per_task",
        full: Literal["error", "share"] = "error",
        share: bool = True,
        inference: TaskInference | None = None,
    ) -> None:
        super().__init__()  # other callbacks choose the weights
        if batch_norm not in ("per_task", "frozen", "shared"):
            raise ValueError(
                f"TaskSubnetworks(batch_norm={batch_norm!r}): batch_norm is 'per_task', 'frozen', 'shared'"
            )
        if full not in ("error", "share"):
            raise ValueError(f"TaskSubnetworks(full={full!r}): full is 'error' or 'share'")
        if not isinstance(inference, TaskInference | None):
            raise ValueError(
                f"TaskSubnetworks(inference={inference!r}): a TaskInference, such as LowestEntropy(), or None"
            )
        self.batch_norm, self.full, self.share = batch_norm, full, share
        self.inference = inference or LargestLogit()
        self._norms: dict[str, Tensor] = {}  # frozen batch-norm: tensors to put back

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._saved: dict[str, Any] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self.subnetworks = Subnetworks.of(pl_module)
        data = task_data(trainer, self)
        if data.target is not KINDS["classes"]:
            raise ValueError(
                f"{type(self).__name__}: tasks and their subnetworks have classes, but the data have labels of "
                f"the kind {data.target.kind!r}; it takes 'classes'"
            )
        objective = getattr(pl_module, "objective", None)
        if isinstance(objective, Objective) and not objective.trains_head:
            raise ValueError(
                f"{type(pl_module).__name__}(objective={type(objective).__name__}()): a task's subnetwork is stored "
                "with its head when the task ends, before this objective has fitted its classifier; take one whose "
                "loss trains the head, such as CrossEntropy, ER or DERpp"
            )
        *_, (name, head) = weight_layers(network_of(pl_module)).items()
        if not isinstance(head, nn.Linear) or head.out_features < data.num_classes:
            raise ValueError(
                f"TaskSubnetworks: {name} of {type(pl_module).__name__}, its last layer, is not a linear head of "
                f"{data.num_classes} classes; define the layers in the order in which they are used"
            )
        if self._saved is not None:
            self.subnetworks.load_state_dict(self._saved)
        elif len(self.subnetworks) and data.learnt is None:
            raise ValueError(
                f"TaskSubnetworks: this {type(pl_module).__name__} has already learnt {len(self.subnetworks)} tasks; "
                "train a new one, or go on with ckpt_path"
            )
        self._check_inference(data.num_tasks)

    def _check_inference(self, num_tasks: int) -> None:
        rule = type(self.inference).__name__
        if num_tasks == 1 and type(self.inference) is not LargestLogit:
            raise ValueError(
                f"TaskSubnetworks(inference={rule}()): the data have one task, so there is none to infer; leave it out"
            )
        self.subnetworks.inference = self.inference
        learnt = range(len(self.subnetworks))
        if self.inference.calibrated and any(self.subnetworks.calibration(task) is None for task in learnt):
            raise ValueError(
                f"TaskSubnetworks(inference={rule}()): this module has learnt tasks without it, so their scores were "
                "not measured on their own samples; take LowestEntropy"
            )

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        """Let classes that are met for the first time begin as they were drawn, whatever has happened to their weights.

        So a task learns the same whether or not its classes were known from the beginning.
        """
        live = int(task_data(trainer).live().sum())
        if live < self.inference.least_classes:
            raise ValueError(
                f"TaskSubnetworks(inference={type(self.inference).__name__}()): task {task} has {live} class, but its "
                f"answers are compared among at least {self.inference.least_classes}; use LargestLogit"
            )
        met = set(self.subnetworks.known())
        new = [c for c in task_data(trainer).live().nonzero().squeeze(1).tolist() if c not in met]
        if callable(draw := getattr(pl_module, "draw_head", None)):
            draw(classes=new)
            self.masks.apply_()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if batch_idx == 0 and task_data(trainer).epoch_in_task == 0:
            self._refuse_full(trainer, pl_module)
        if self.batch_norm == "frozen" and len(self.subnetworks):
            if not self._norms:
                self._norms = {n: t.detach().clone() for n, t in norm_tensors(pl_module).items()}
            for norm in norms(pl_module).values():
                norm.eval()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        for name, tensor in norm_tensors(pl_module).items() if self._norms else ():
            tensor.data.copy_(self._norms[name])

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        if len(self.subnetworks) != task:
            raise ValueError(
                f"TaskSubnetworks: task {task} ends, but {len(self.subnetworks)} are stored; the checkpoint was taken "
                "without TaskSubnetworks"
            )
        network, head, alive = network_of(pl_module), self.subnetworks.head, self.masks.alive
        if callable(learnt := getattr(pl_module, "task_masks", None)):
            alive |= learnt()
        masks = {
            name: alive.get(name, torch.ones_like(layer.weight, dtype=torch.bool))
            for name, layer in weight_layers(network).items()
            if self.share and name not in head
        }
        for name, mask in masks.items():
            self.masks.set_frozen(name, self.masks.frozen_part(name) | mask)
        own = [n for n, _ in (*network.named_parameters(), *network.named_buffers()) if n not in masks]
        if self.batch_norm != "per_task":
            own = [n for n in own if n not in norm_tensors(pl_module)]
        classes = task_data(trainer).live().nonzero().squeeze(1).tolist()
        negated: dict[str, Tensor] = getattr(pl_module, "task_negated", dict)()
        self.subnetworks.add(classes, masks, own, negated)
        if self.inference.calibrated:
            self.subnetworks.calibrate(task, (x for x, _ in task_data(trainer).samples(share=False)))

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the checkpoint's subnetworks in a module that does not do so itself."""
        if trainer.ckpt_path and not len(Subnetworks.of(pl_module)):
            checkpoint = trainer.strategy.load_checkpoint(trainer.ckpt_path)
            if "subnetworks" in checkpoint:
                super().on_test_start(trainer, pl_module)
                Subnetworks.of(pl_module).load_state_dict(checkpoint["subnetworks"])
        Subnetworks.of(pl_module).inference = self.inference

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._norms = {}

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint["subnetworks"] = Subnetworks.of(pl_module).state_dict()

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._saved = checkpoint.get("subnetworks")

    def _refuse_full(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        task = len(self.subnetworks)
        names = list(self.subnetworks.tasks[0].masks) if task and self.share and self.full == "error" else []
        if not names or any(bool(self.masks.movable(name).any()) for name in names):
            return
        ended = next(t for t in range(task) if self._none_left(names, t + 1)) if self._none_left(names, task) else None
        since = f"; the free weights ended with task {ended}."
        if ended is None:
            since = (
                ", although some weights are free: either no Reopen, listed after pruning and before this callback, "
                "gives them back, or all units are stable."
            )
        raise ValueError(
            f"TaskSubnetworks: task {task} of {task_data(trainer).num_tasks} has no free weight in its mask{since} "
            "Take a wider network or a higher sparsity, or go on with frozen weights alone by full='share'"
        )

    def _none_left(self, names: list[str], tasks: int) -> bool:
        return all(bool(self.subnetworks.used(name, tasks).all()) for name in names)

    def _planes(self, names: list[str]) -> Iterator[Tensor]:
        """For each task a row of the weights that it uses, and one of those with changed signs, if it has any."""
        for task, learnt in enumerate(self.subnetworks.tasks if names else ()):
            signs = torch.cat([self.subnetworks.signs(task, name).reshape(-1) for name in names])
            yield signs != 0
            if learnt.negated:
                yield signs < 0

    def summary(self) -> dict[str, Any]:
        """What the subnetworks share, as fractions of the weights of convolutions and linear layers except the head.

        ``density`` by layer, one entry per task; ``overlap`` (T, T), the part of task i's weights that task j also
        uses; ``used`` after each task: the part of the weights that any task uses; ``free_in_mask``: the part of each
        task's weights that no earlier task had; ``compact``: parameters of each task's network without the channels
        that it does not use; ``mask_bits``: the size of all masks together, in bits per weight (see
        :func:`~lightning_sparse_cl.metrics.mask_bits`; a mask that changes signs counts as two). Without sharing there
        is only ``used``, in whole networks.
        """
        tasks = self.subnetworks.tasks
        if not self.share:
            return {"used": [float(i + 1) for i in range(len(tasks))]}
        shared = {name: sharing([t.masks[name] for t in tasks]) for name in (tasks[0].masks if tasks else ())}
        sizes = {name: self.subnetworks.module.get_parameter(name).numel() for name in shared}
        nothing = torch.zeros(len(tasks), dtype=torch.long)
        both = sum((s.both for s in shared.values()), nothing.expand(len(tasks), -1)).tolist()
        used = sum((s.used for s in shared.values()), nothing).tolist()
        counts = [max(row[i], 1) for i, row in enumerate(both)]
        new = [after - before for before, after in pairwise([0, *used])]
        whole = sum(p.numel() for p in network_of(self.subnetworks.module).parameters())
        return {
            "density": {name: [n / sizes[name] for n in s.both.diagonal().tolist()] for name, s in shared.items()},
            "overlap": [[n / count for n in row] for row, count in zip(both, counts)],
            "used": [n / max(sum(sizes.values()), 1) for n in used],
            "free_in_mask": [n / count for n, count in zip(new, counts)],
            "compact": [self.subnetworks.parameters(i) / whole for i in range(len(tasks))],
            "mask_bits": mask_bits(self._planes(list(shared))),
        }


class FromScratch(TaskCallback):
    """Every task after the first starts from newly drawn parameters and batch-norm, including the head."""

    needs_tasks = True

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        if task > 0:
            with torch.random.fork_rng():  # so that every process draws the same
                seed = (task_data(trainer).order_seed + 1000 * task) % 2**62
                torch.manual_seed(seed)
                for layer in pl_module.modules():
                    if callable(reset := getattr(layer, "reset_parameters", None)):
                        reset()
                if callable(draw := getattr(pl_module, "draw_head", None)):
                    draw(seed)
