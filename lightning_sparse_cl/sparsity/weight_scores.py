"""A learnt score for each weight, and masks made of scores with a gradient that passes straight through them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_sparse_cl.sparsity.layers import weight_layers
from lightning_sparse_cl.sparsity.scores import check_number


def top_k(scores: Tensor, count: int) -> Tensor:
    """1 at the ``count`` scores of largest magnitude, else 0; the gradient with respect to |s| is that of the mask.

    Args:
        scores: any shape.
        count: how many are kept, exactly.
    """
    size = scores.abs()
    flat = size.detach().reshape(-1)
    mask = torch.zeros_like(flat).scatter_(0, flat.topk(count, sorted=False).indices, 1)  # nothing is read back
    return mask.view_as(size) + (size - size.detach())


def above(scores: Tensor, threshold: float) -> Tensor:
    """1 at the scores above the threshold, else 0; the gradient with respect to s is that of the mask."""
    return (scores > threshold).to(scores) + (scores - scores.detach())


def ternary(scores: Tensor, threshold: float) -> Tensor:
    """1 at scores above the threshold, -1 at negative ones, else 0; the gradient with respect to s is the mask's."""
    return (scores > threshold).to(scores) - (scores < 0).to(scores) + (scores - scores.detach())


class WeightScores(nn.Module):
    """Scores for all weights of convolutions and linear layers except the head, the last of them.

    Each weight is multiplied with a mask of 0 and 1 that its scores decide: either the largest scores of a layer are
    on, or those above a threshold. The scores learn by the gradient of the mask, dL/dm = w dL/d(m w). Where negative
    scores change a weight's sign, masks have entries -1, 0 and 1.

    Args:
        keep: fraction of each layer's weights that is on, in (0, 1].
        threshold: scores above it are on. Give either this or ``keep``.
        init: value that all scores start from. If None, they are drawn as a linear layer draws its weights.
        anew: whether every task starts from such scores, or from those that the last task has left.
        negates: whether negative scores change signs; goes with ``threshold``.

    Raises:
        ValueError: if both or neither of ``keep`` and ``threshold`` are given, ``keep`` is out of range or keeps no
            weight of a layer, or signs are to change without a threshold that is positive.
    """

    def __init__(
        self,
        keep: float | None = None,
        threshold: float | None = None,
        init: float | None = None,
        anew: bool = False,
        negates: bool = False,
    ) -> None:
        super().__init__()
        if (keep is None) == (threshold is None):
            raise ValueError(f"WeightScores(keep={keep}, threshold={threshold}): give one of them")
        if keep is not None:
            check_number("WeightScores", "keep", keep)
            if not 0 < keep <= 1:
                raise ValueError(f"WeightScores(keep={keep}): the fraction of weights that is on, in (0, 1]")
        if negates and (threshold is None or threshold <= 0):
            raise ValueError(f"WeightScores(threshold={threshold}, negates=True): a positive threshold is needed")
        self.keep, self.threshold, self.init, self.anew, self.negates = keep, threshold, init, anew, negates
        self.names: list[str] = []
        self.scores = nn.ParameterList()

    def build(self, network: nn.Module, seed: int) -> None:
        """Allocate scores for ``network``."""
        *layers, _ = weight_layers(network).items()
        self.names, self.seed = [name for name, _ in layers], seed
        self.scores = nn.ParameterList(nn.Parameter(torch.empty_like(layer.weight)) for _, layer in layers)
        for name, scores in zip(self.names, self.scores, strict=True):
            if self.keep is not None and not self._count(scores):
                raise ValueError(
                    f"WeightScores(keep={self.keep}): it keeps none of {name}'s {scores.numel()} weights; keep more"
                )
        self.begin(0)

    @torch.no_grad()
    def begin(self, task: int) -> None:
        """A task starts. The same scores are drawn on every process and in a resumed run."""
        if task and not self.anew:
            return
        generator = torch.Generator().manual_seed((self.seed + 7919 * task) % 2**62)
        for scores in self.scores:
            if self.init is not None:
                scores.fill_(self.init)
            else:
                bound = 1 / math.sqrt(scores[0].numel())  # kaiming_uniform_(a=sqrt(5))
                drawn = torch.empty(scores.shape).uniform_(-bound, bound, generator=generator)
                scores.copy_(drawn)

    def masks(self) -> dict[str, Tensor]:
        """What each weight is multiplied with: 0 or 1, or -1 where its sign changes; of its shape."""
        return {name: self._mask(scores) for name, scores in zip(self.names, self.scores, strict=True)}

    def weights(self, network: nn.Module, learn: bool = True) -> dict[str, Tensor]:
        """The weights of ``network`` times their masks; if the scores do not learn, without a gradient for them."""
        masks = self.masks() if learn else {name: mask.detach() for name, mask in self.masks().items()}
        return {name: network.get_parameter(name) * mask for name, mask in masks.items()}

    def _mask(self, scores: Tensor) -> Tensor:
        if self.threshold is None:
            return top_k(scores, self._count(scores))
        return (ternary if self.negates else above)(scores, self.threshold)

    def _count(self, scores: Tensor) -> int:
        return round((self.keep or 0) * scores.numel())
