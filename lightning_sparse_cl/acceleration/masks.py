"""The masks of an accelerated network: those of a :class:`Masks`, which may change, or given ones, which may not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_sparse_cl.sparsity.enforcement import Enforcement
from lightning_sparse_cl.sparsity.masks import Masks


class FollowedMasks:
    """The masks of a :class:`Masks`, whose owner enforces them.

    Everything that acceleration needs of :class:`Masks` and their :class:`Enforcement` goes through this class. Weights
    go by their names in the accelerated model, which may be a part of the module that the masks belong to.

    Args:
        masks: the masks to follow.
        model: the accelerated network.

    Raises:
        ValueError: if the model is not a part of the module of the masks.
    """

    def __init__(self, masks: Masks, model: nn.Module) -> None:
        inside = [name for name, module in masks.module.named_modules() if module is model]
        if not inside:
            raise ValueError(f"accelerate({type(model).__name__}): the masks belong to another module")
        self._masks, self._enforcement = masks, Enforcement.of(masks.module)
        self._prefix = f"{inside[0]}." if inside[0] else ""
        self._version: int | None = None

    def changed(self) -> bool:
        """Whether any mask has changed since the last call; True at the first."""
        before, self._version = self._version, self._masks.version
        return before != self._version

    def names(self) -> set[str]:
        """The masked weights."""
        return {name.removeprefix(self._prefix) for name in self._masks.alive}

    def get(self, weight: str) -> Tensor | None:
        """The mask of a weight, True where alive, or None if it has none."""
        return self._masks.record(self._prefix + weight).alive

    def movable(self, weight: str) -> Tensor | None:
        """Where the next step may move a weight, of its shape. If it may move wherever it is alive, None."""
        name = self._prefix + weight
        return None if self._masks.record(name).values is None else self._masks.movable(name)

    @property
    def need_whole_gradients(self) -> bool:
        """Whether gradients of pruned weights are wanted now, which the kernels do not compute."""
        return self._enforcement.needs_whole

    def begin_compact(self, weights: Iterable[str]) -> None:
        """From now on weights are trained as compact vectors, and masks are not enforced on them."""
        self._enforcement.leave_to_others(self._prefix + weight for weight in weights)

    def end_compact(self, weights: Iterable[str]) -> None:
        self._enforcement.take_back(self._prefix + weight for weight in weights)

    def enforce(self) -> list[RemovableHandle]:
        """Nothing to do: the owner of the masks does it."""
        return []

    def apply_(self, skip: Callable[[Tensor], bool]) -> None:
        """Nothing to do: the owner of the masks does it."""


class FixedMasks:
    """Masks that do not change, and that nothing else enforces; see :class:`FollowedMasks` for the methods.

    Args:
        masks: by the names of their weights, True where alive. If None, a weight with at least 10 % zeros is masked
            at its zeros.
        model: the accelerated network.
        weights: names of the weights that may be masked at their zeros.

    Raises:
        ValueError: if a mask has no name, is not 0 and 1, or does not fit its weight.
    """

    def __init__(self, masks: Mapping[str, Tensor] | None, model: nn.Module, weights: Iterable[str]) -> None:
        parameters = dict(model.named_parameters())
        if masks is None:
            found = {n: parameters[n].detach() != 0 for n in weights if n in parameters}  # some are computed, or shared
            self._alive = {n: m for n, m in found.items() if m.count_nonzero() < 0.9 * m.numel()}
        else:
            _check(masks, model)
            self._alive = {name: mask.bool().clone() for name, mask in masks.items()}
        self._weights = {name: parameters[name] for name in self._alive}
        self._new = True

    def changed(self) -> bool:
        before, self._new = self._new, False
        return before

    def names(self) -> set[str]:
        return set(self._alive)

    def get(self, weight: str) -> Tensor | None:
        return self._alive.get(weight)

    def movable(self, weight: str) -> Tensor | None:
        return None

    @property
    def need_whole_gradients(self) -> bool:
        return False

    def begin_compact(self, weights: Iterable[str]) -> None:
        pass

    def end_compact(self, weights: Iterable[str]) -> None:
        pass

    @torch.no_grad()
    def enforce(self) -> list[RemovableHandle]:
        """Zero the pruned weights, and their gradients from now on, even without kernels."""
        self.apply_(lambda weight: False)
        masked = ((weight, self._alive[name]) for name, weight in self._weights.items() if weight.requires_grad)
        return [weight.register_hook(lambda grad, mask=mask: grad * mask) for weight, mask in masked]

    @torch.no_grad()
    def apply_(self, skip: Callable[[Tensor], bool]) -> None:
        """Zero the pruned weights again, except those that are skipped."""
        for name, weight in self._weights.items():
            if not skip(weight):
                weight.mul_(self._alive[name])


def _check(masks: Mapping[str, Tensor], model: nn.Module) -> None:
    if not isinstance(masks, Mapping):
        raise ValueError(f"accelerate(masks={type(masks).__name__}): Masks, or masks by the names of their weights")
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in parameters:
            raise ValueError(f"accelerate: there is no weight {name!r} in {type(model).__name__}")
        shape, device = parameters[name].shape, parameters[name].device
        if not isinstance(mask, Tensor) or mask.device != device:
            where = f"a tensor on {mask.device}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
            raise ValueError(f"accelerate: the mask of {name!r} is {where}; a tensor on {device}")
        if mask.shape != shape:
            sizes = f"{tuple(mask.shape)}, the weight {tuple(shape)}"
            raise ValueError(f"accelerate: the mask of {name!r} has shape {sizes}")
        if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
            raise ValueError(f"accelerate: the mask of {name!r} has values other than 0 and 1")
