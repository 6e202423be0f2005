"""The one base of all policies that rank weights by a score and keep the best."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_sparse_cl.callbacks.sparsifier import Sparsifier
from lightning_sparse_cl.callbacks.trainer_parts import callbacks_of
from lightning_sparse_cl.sparsity.blocks import SINGLE, NofM, unit
from lightning_sparse_cl.sparsity.distributions import Distribution, check_distribution, counts
from lightning_sparse_cl.sparsity.enforcement import Enforcement
from lightning_sparse_cl.sparsity.layers import Chosen
from lightning_sparse_cl.sparsity.scores import check_number, check_sparsity, top_k_masks


class ScorePruning(Sparsifier):
    """Keeps the weights of largest score. A policy defines the scores, and may define when and how many to prune.

    A subclass overrides :meth:`scores`, and may override

    * *when*: :meth:`due`, asked before every batch. By default weights are pruned once, before the first batch that
      finds them without a mask. A policy that prunes at other moments returns False and calls :meth:`prune`.
    * *how many*: :meth:`density`, or :meth:`how_many`: how many of the weights that are ranked together stay alive.

    The base does the rest: which weights are ranked together, their division among layers, exact counts with ties
    broken by position, frozen weights (kept, and counted), the mean over processes, and several rounds.

    Args:
        sparsity: zero fraction of the masked weights, in [0, 1).
        ranking: ``"layer"``, each weight tensor is ranked by itself; ``"global"``, all together.
        distribution: how the density is divided among layers that are ranked by themselves: ``"uniform"``, ``"erk"``
            (see ``sparsity/distributions.py``), or the sparsity of some by pattern, ``{"*.fc1.weight": 0.95}``; the
            others have ``sparsity``.
        dense: weights that stay dense; see :class:`Sparsifier`.
        sparse: weights that are pruned; see :class:`Sparsifier`.
        rounds: number of rounds of pruning, each with new scores; the density falls geometrically.
        block: outputs and inputs of a block of weights, which are kept or dropped together, by the sum of their scores.
            Layers have whole blocks, and the nearest number of blocks is kept. Or ``"2:4"``: two of every four
            neighbouring inputs are kept; ``sparsity`` is then 0.5, the same in every layer.

    Raises:
        ValueError: if an argument is out of range.
    """

    makes_masks = True
    goes_on: ClassVar[bool] = True
    """Whether it keeps existing masks."""

    def __init__(
        self,
        sparsity: float,
        ranking: Literal["layer", "global"] = "layer",
        distribution: Distribution = "uniform",
        dense: Chosen | None = None,
        sparse: Chosen | None = None,
        rounds: int = 1,
        block: Sequence[int] | str = SINGLE,
    ) -> None:
        super().__init__(dense, sparse)
        name = type(self).__name__
        check_sparsity(name, sparsity)
        self.block = unit(name, block, sparsity)
        if ranking not in ("layer", "global"):
            raise ValueError(f"{name}(ranking={ranking!r}): ranking is 'layer' or 'global'")
        check_distribution(name, distribution)
        if ranking == "global" and distribution != "uniform":
            raise ValueError(
                f"{name}(distribution={distribution!r}): weights that are ranked together are not divided among layers"
            )
        if isinstance(self.block, NofM) and distribution != "uniform":
            raise ValueError(f"{name}(distribution={distribution!r}, block={block!r}): n:m is the same in every layer")
        check_number(name, "rounds", rounds, whole=True)
        if rounds < 1:
            raise ValueError(f"{name}(rounds={rounds}): at least one round")
        self.sparsity = self.block.sparsity if isinstance(self.block, NofM) else sparsity
        self.ranking, self.distribution, self.rounds = ranking, distribution, rounds

    # -- what a policy says ------------------------------------------------------------------------------------

    @abstractmethod
    def scores(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> Mapping[str, Tensor]:
        """A score for each weight of :meth:`names`, of the weight's shape; the largest are kept.

        Args:
            trainer: the trainer.
            pl_module: the module.
            batch: the batch that comes next. None if weights are pruned between batches.
        """

    def due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Whether to prune before the coming batch."""
        return bool(self.unmasked(pl_module))

    def density(self, trainer: pl.Trainer) -> float:
        """The fraction of the weights that is kept now."""
        return 1 - self.sparsity

    def how_many(self, trainer: pl.Trainer, pl_module: pl.LightningModule, group: list[str], density: float) -> int:
        """How many of the weights of ``group``, which are ranked together, stay alive."""
        if self.ranking == "global":
            return self.block.whole(density * sum(pl_module.get_parameter(name).numel() for name in group))
        return self.block.whole(self._divided(pl_module, density)[group[0]])

    # -- what the base does ------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        for weight in self.names(pl_module):
            self.block.check(type(self).__name__, weight, pl_module.get_parameter(weight).shape)
        groups = self.groups(pl_module)  # a pattern without a match, or a layer left without a weight, is an error now
        asked = sum(self.how_many(trainer, pl_module, group, 1 - self.sparsity) for group in groups)
        if self.makes_masks:
            self._say_how_much(pl_module)
        others = callbacks_of(trainer, Sparsifier)
        rivals = [c for c in others if isinstance(c, ScorePruning) and c.goes_on and c is not self]
        for rival in rivals if self.goes_on else ():
            if set(self.names(pl_module)) & set(rival.names(pl_module)):
                raise ValueError(
                    f"{type(self).__name__}: {type(rival).__name__} makes masks of the same weights; divide them by "
                    "`sparse` and `dense`"
                )
        if self.goes_on and self._loaded is None:
            self._say_other_sparsity([name for group in groups for name in group], asked)

    def _say_other_sparsity(self, names: list[str], asked: int) -> None:
        masks = [mask for name, mask in self.masks.alive.items() if name in names]
        kept, total = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
        if not names or len(masks) < len(names):
            return
        how = "Masks.of(module).set_alive(name, None) removes the mask of a weight"
        if abs(kept - asked) > 0.02 * asked:
            rank_zero_warn(
                f"{type(self).__name__}(sparsity={self.sparsity}): the weights already have masks, of sparsity "
                f"{1 - kept / total:.3g}, and keep them; {how}"
            )
        elif isinstance(self.block, NofM) and not all(map(self.block.holds, masks)):
            rank_zero_warn(
                f"{type(self).__name__}(block='{self.block}'): the weights already have masks, which are not "
                f"{self.block}, and keep them; {how}"
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.due(trainer, pl_module):
            self.prune(trainer, pl_module, batch)

    def prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any = None) -> None:
        """Score and keep the best, in :attr:`rounds` rounds."""
        new, density = self.unmasked(pl_module), self.density(trainer)
        for i in range(self.rounds):
            scores = dict(self.scores(trainer, pl_module, batch))
            if missing := [name for name in self.names(pl_module) if name not in scores]:
                raise ValueError(f"{type(self).__name__}.scores() has no score for {', '.join(missing)}")
            finite = torch.stack([score.isnan().logical_not().all() for score in scores.values()]).tolist()
            if not all(finite):
                name = next(name for name, is_finite in zip(scores, finite) if not is_finite)
                raise ValueError(
                    f"{type(self).__name__}: scores of {name} are not numbers, as with a NaN loss; none is pruned"
                )
            if trainer.world_size > 1:  # so that every process has the same masks
                for name, score in scores.items():
                    scores[name] = score = score.clone()
                    torch.distributed.all_reduce(score)
                    score /= trainer.world_size
            alive = self.masks.alive
            for group in self.groups(pl_module):
                if new and not set(group) & set(new):
                    continue  # the others were pruned before these were trained
                count = self.how_many(trainer, pl_module, group, density ** ((i + 1) / self.rounds))
                among = {n: alive[n] for n in group if n in alive} if i else {}
                self.keep(pl_module, {name: scores[name] for name in group}, count, among)

    def keep(
        self, pl_module: pl.LightningModule, scores: Mapping[str, Tensor], count: int, among: Mapping[str, Tensor]
    ) -> None:
        """Keep ``count`` of the weights that are ranked together: the protected ones, and the best of the others.

        Args:
            pl_module: the module.
            scores: scores of the weights, by name.
            count: how many stay alive in all.
            among: where the others are chosen from, by name; everywhere for names that it lacks.
        """
        kept = {name: self.protected(name) for name in scores}
        pools = {name: ~mask & among[name] if name in among else ~mask for name, mask in kept.items()}
        best = self.rank(scores, count - sum(int(m.sum()) for m in kept.values()), pools, kept)
        for name, mask in best.items():
            self.masks.set_alive(name, mask | kept[name])
        Enforcement.of(pl_module).apply_to_averages()

    def rank(
        self,
        scores: Mapping[str, Tensor],
        count: int,
        among: Mapping[str, Tensor],
        taken: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> dict[str, Tensor]:
        """Masks of the best blocks that lie in ``among``: as many as ``count`` weights fill, beside those ``taken``."""
        rated = self.block.rated(scores, among, taken)
        pools = {name: self.block.all(among[name]) for name in scores}
        best = top_k_masks(rated, count // self.block.size, pools)
        return {name: self.block.spread(mask) for name, mask in best.items()}

    def groups(self, pl_module: pl.LightningModule) -> list[list[str]]:
        """Names of the weights that are ranked together."""
        names = self.names(pl_module)
        return [names] if names and self.ranking == "global" else [[name] for name in names]

    def _divided(self, pl_module: pl.LightningModule, density: float) -> dict[str, int]:
        shapes = {name: pl_module.get_parameter(name).shape for name in self.names(pl_module)}
        return counts(type(self).__name__, self.distribution, shapes, density)
