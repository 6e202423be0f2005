"""Task-aware dynamic masking: one sparse network throughout, adapted within tasks and between them (SparCL, 4.1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from torch import Tensor

from lightning_sparse_cl.callbacks.importance import (
    live_classes,
    mean_gradients,
    memory_batches,
    memory_of,
    task_batches,
)
from lightning_sparse_cl.callbacks.own_loss import LossOf, check_loss
from lightning_sparse_cl.callbacks.schedule import position
from lightning_sparse_cl.callbacks.score_pruning import ScorePruning
from lightning_sparse_cl.callbacks.sparsifier import reset_state
from lightning_sparse_cl.sparsity.blocks import SINGLE
from lightning_sparse_cl.sparsity.layers import Chosen
from lightning_sparse_cl.sparsity.scores import check_number, whole_part


class TaskAwareDynamicMasking(ScorePruning):
    """TDM, Algorithm 1 of "SparCL: Sparse Continual Learning on the Edge" (Wang et al., 2022).

    Weights are ranked by their continual weight importance::

        CWI(w) = |w| + alpha |dL~(D_t)/dw| + beta |dL(M)/dw|                     (eq 1)

    with L~ the cross-entropy among the current task's classes over its samples D_t, and L the one among all classes
    over the memory M. Of n weights (of a layer, or of all layers) k = round((1 - s) n) are alive, but

    * a later task starts with int(p_inter n) more, chosen at random, for its first ``interval`` epochs;
    * after every ``interval`` epochs the mask shrinks to k - int(p_intra n) by CWI and grows back to k at random, among
      all unused weights, including those just dropped. Grown weights start from zero, and so does their momentum.

    Frozen weights are kept, and count as part of k. At a task's end the mask has k weights, whenever it ends; the last
    epoch's adjustment is left out, as nothing would be learnt with it. Algorithm 1 as printed grows at every epoch;
    what is meant, and done here and in the released code, is growth at the task's first epoch. That code also grows
    before the first task, which the paper does not, and starts from the largest of the initial weights
    (``init="magnitude"``) where the paper starts at random.

    Works without a memory (the last term is then left out), and with any LightningModule: if it has no loss among the
    current task's classes, its own loss is used.

    Args:
        sparsity: s, zero fraction of the masked weights, in [0, 1); 0 switches the masks off.
        interval: delta k, epochs between adjustments.
        p_intra: fraction of the weights exchanged within a task, in [0, 1 - s).
        p_inter: fraction of the weights that a new task has in addition, in [0, s].
        alpha: weight of the current task's gradient.
        beta: weight of the memory's gradient.
        gradients: ``"measured"`` accumulates both terms over one epoch of D_t and over M, for the weights that are
            ranked: one more epoch of plain passes per ``interval``. ``"training"`` is free: it replaces both by the
            gradient that the epoch's last step left behind, of the whole training loss and gradient-masked, weighted
            with alpha, as in the released code.
        ranking: ``"layer"``, the same sparsity in every layer; ``"global"``, all layers ranked together (Appendix E).
        init: the first mask, ``"random"`` or by ``"magnitude"``.
        dense: weights that stay dense, see :class:`Sparsifier`; if None, the released profile.
        sparse: weights that are pruned; see :class:`Sparsifier`.
        loss: replaces L~ and L: a function of (module, batch) that returns a scalar.
        block: see :class:`ScorePruning`.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        sparsity: float = 0.75,
        interval: int = 5,
        p_intra: float = 0.005,
        p_inter: float = 0.01,
        alpha: float = 0.5,
        beta: float = 1.0,
        gradients: Literal["measured", "training"] = "measured",
        ranking: Literal["layer", "global"] = "layer",
        init: Literal["random", "magnitude"] = "random",
        dense: Chosen | None = None,
        sparse: Chosen | None = None,
        loss: LossOf | None = None,
        block: Sequence[int] | str = SINGLE,
    ) -> None:
        super().__init__(sparsity, ranking, dense=dense, sparse=sparse, block=block)
        name = type(self).__name__
        check_number(name, "interval", interval, whole=True)
        if interval < 1:
            raise ValueError(f"{name}(interval={interval}): epochs between adjustments, at least 1")
        if sparsity and not 0 <= p_intra < 1 - sparsity:
            raise ValueError(
                f"{name}(p_intra={p_intra}): the fraction exchanged is in [0, 1 - sparsity), here [0, {1 - sparsity:g})"
            )
        if sparsity and not 0 <= p_inter <= sparsity:
            raise ValueError(f"{name}(p_inter={p_inter}): the fraction added is in [0, sparsity], here [0, {sparsity}]")
        if not (alpha >= 0 and beta >= 0):
            raise ValueError(f"{name}(alpha={alpha}, beta={beta}): the weights of the gradients are >= 0")
        for field, value, allowed in (
            ("gradients", gradients, ("measured", "training")),
            ("init", init, ("random", "magnitude")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}({field}={value!r}): {field} is {' or '.join(map(repr, allowed))}")
        self.interval = interval
        self.p_intra, self.p_inter = p_intra, p_inter
        self.alpha, self.beta = alpha, beta
        self.gradients, self.init, self.loss = gradients, init, loss

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.sparsity and self.gradients == "measured":
            check_loss(self, pl_module, self.loss)

    # -- Algorithm 1 -------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.due(trainer, pl_module):
            self.prune(trainer, pl_module)

    def due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        return self.sparsity > 0 and super().due(trainer, pl_module)

    def scores(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> dict[str, Tensor]:
        """The scores by which the first mask is chosen."""
        names = self.names(pl_module)
        if self.init == "magnitude":
            return {name: pl_module.get_parameter(name).detach().abs() for name in names}
        return self.random(pl_module, names, 0)

    def how_many(self, trainer: pl.Trainer, pl_module: pl.LightningModule, group: list[str], density: float) -> int:
        return self._target(pl_module, group)

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        if task > 0:
            self._expand(trainer, pl_module, self.p_inter)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        at = position(trainer)
        if (at.epoch + 1) % self.interval == 0 and not at.over:
            self._shrink(trainer, pl_module, self.p_intra)
            self._expand(trainer, pl_module, 0.0)

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        self._shrink(trainer, pl_module, 0.0)  # the task may end while it is still expanded

    def importance(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        """CWI (eq 1) of every masked weight."""
        names = self.names(pl_module)
        cwi = {name: pl_module.get_parameter(name).detach().abs() for name in names}
        if self.gradients == "training":
            left = {name: pl_module.get_parameter(name).grad for name in names}
            return {n: w if (grad := left[n]) is None else w + self.alpha * grad.abs() for n, w in cwi.items()}
        live = live_classes(trainer, pl_module)
        batches = task_batches(trainer, pl_module)
        terms = [(self.alpha, mean_gradients(trainer, pl_module, names, batches, live, True, self.loss))]
        memory = memory_of(pl_module)
        if memory is not None:
            held = memory_batches(trainer, memory.contents())
            terms.append((self.beta, mean_gradients(trainer, pl_module, names, held, None, True, self.loss)))
        for weight, grads in terms:
            cwi = {name: value + weight * grads[name].abs() for name, value in cwi.items()}
        return cwi

    def _shrink(self, trainer: pl.Trainer, pl_module: pl.LightningModule, less: float) -> None:
        """Drop the weights of smallest CWI until there are (1 - s) n - int(less n)."""
        left = {tuple(g): self._target(pl_module, g) - self._part(pl_module, g, less) for g in self.groups(pl_module)}
        if any(self._alive(group) > count for group, count in left.items()):
            cwi, alive = self.importance(trainer, pl_module), self.masks.alive
            for group, count in left.items():
                self.keep(pl_module, {name: cwi[name] for name in group}, count, alive)

    def _expand(self, trainer: pl.Trainer, pl_module: pl.LightningModule, more: float) -> None:
        """Grow at random, from zero, up to (1 - s) n + int(more n) weights."""
        alive = self.masks.alive
        for i, group in enumerate(self.groups(pl_module)):
            count = self._target(pl_module, group) + self._part(pl_module, group, more) - self._alive(group)
            scores = self.random(pl_module, group, 1 + (more > 0), trainer.current_epoch, i)
            grown = self.rank(scores, count, {name: ~alive[name] for name in group}, alive)
            for name, mask in grown.items():
                self.masks.set_alive(name, alive[name] | mask)
            reset_state(trainer, pl_module, grown)

    def _alive(self, group: Iterable[str]) -> int:
        alive = self.masks.alive
        return sum(int(alive[name].sum()) for name in group)

    def _target(self, pl_module: pl.LightningModule, group: Iterable[str]) -> int:
        """k, at least one block."""
        return self.block.whole((1 - self.sparsity) * _size(pl_module, group))

    def _part(self, pl_module: pl.LightningModule, group: Iterable[str], part: float) -> int:
        """int(part n), in whole blocks."""
        return self.block.size * whole_part(part, _size(pl_module, group) // self.block.size)

    def groups(self, pl_module: pl.LightningModule) -> list[list[str]]:
        return super().groups(pl_module) if self.sparsity else []


def _size(pl_module: pl.LightningModule, group: Iterable[str]) -> int:
    return sum(pl_module.get_parameter(name).numel() for name in group)
