"""Masked weights trained as the vector of their alive values, so that an optimiser touches nothing else."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_sparse_cl.acceleration.layer import Layer
from lightning_sparse_cl.kernels.pattern import Pattern

ELEMENTWISE = (
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax,
    torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.ASGD, torch.optim.Rprop,
)  # fmt: skip
"""Optimisers that treat every element alike, so that they may be given the alive elements alone."""


_Place = tuple[Optimizer, dict[str, Any], int]
"""An optimiser, one of its groups of parameters, and the index in that group."""


class CompactWeights:
    """Takes the weights of sparse layers out of optimisers and puts their alive values in, with the state they have.

    The weights in the modules are out of date until :meth:`stop`; this does not show where their parameters are
    :class:`~lightning_sparse_cl.acceleration.watched.Watched`. Optimiser state of pruned weights is zero afterwards.

    Args:
        layers: layers with masks; weights outside the masks are zeroed.
        optimizers: those in :data:`ELEMENTWISE` are given the values, others keep the whole weights.
        movable: gives, for a layer, where its weight may move, of the weight's shape, or None for everywhere; other
            entries keep their values bit for bit.
    """

    def __init__(
        self,
        layers: Iterable[Layer],
        optimizers: Iterable[Optimizer],
        movable: Callable[[Layer], Tensor | None] = lambda layer: None,
    ) -> None:
        self._optimizers = [o for o in optimizers if type(o) in ELEMENTWISE]
        self.given = list(layers)
        self.given_up: list[tuple[Layer, Pattern, Tensor, int]] = []
        """Values that may be written to after :meth:`stop`, as they have gradients or have been moved since the last
        step, with their versions when last checked."""
        self._held: dict[str, tuple[Tensor, Tensor]] = {}
        self._trained: list[_Trained] = []
        for layer in self.given:
            place = self._place(layer.weight)
            if place is not None:
                self._trained.append(self._take(layer, place, movable(layer)))
        self.layers = [trained.layer for trained in self._trained]
        self._stepped = self._versions()

    def _take(self, layer: Layer, place: _Place, movable: Tensor | None) -> _Trained:
        """Train the values of a layer in place of its weight."""
        weight, pattern = layer.weight, layer.pattern
        if layer.mask is not None:  # other values may have been loaded; running passes do not notice
            weight.data.masked_fill_(~layer.mask, 0)
        values = nn.Parameter(pattern.gather(weight.detach()))
        if weight.grad is not None:
            values.grad, weight.grad = pattern.gather(weight.grad), None
        optimizer, group, i = place
        group["params"][i] = values
        state = optimizer.state.pop(weight, {})
        if state:
            optimizer.state[values] = {k: pattern.gather(v) if _like(v, weight) else v for k, v in state.items()}
        if movable is not None:
            moves = pattern.gather(torch.empty_like(weight).copy_(movable))
            self._held[layer.name] = moves.bool(), values.detach().clone()
            values.register_hook(lambda grad: grad * moves)
        heir = _Heir(weight, pattern, weight.register_post_accumulate_grad_hook(partial(_pass_on, weakref.ref(layer))))
        values.register_post_accumulate_grad_hook(heir)
        layer.compact = values
        return _Trained(layer, pattern, values, heir)

    @torch.no_grad()
    def stop(self) -> None:
        """The weights, their gradients and their optimiser state are whole again."""
        for (layer, pattern, values, heir), stepped in zip(self._trained, self._stepped):
            weight = layer.weight
            layer.forget()
            layer.compact, heir.given_up = None, True
            heir.hook.remove()
            pattern.scatter(values.detach(), weight.detach())
            increment_version(weight)
            if values.grad is not None or values._version != stepped:
                self.given_up.append((layer, pattern, values, values._version))
            if values.grad is not None:
                _add(weight, pattern.whole(values.grad, weight))
                values.grad = None
            place = self._place(values)
            if place is not None:  # otherwise they were taken out
                _, group, i = place
                group["params"][i] = weight
            for optimizer in self._optimizers:
                state = optimizer.state.pop(values, {})
                if state:
                    optimizer.state[weight] = {
                        k: pattern.whole(v, weight) if _like(v, values) else v for k, v in state.items()
                    }
        self._held.clear()
        self._trained.clear()  # values that may not be written to are freed

    @torch.no_grad()
    def take_over(self) -> None:
        """Take over what SAM, or other code that moves values between steps, has written to given-up values."""
        for i, (layer, pattern, values, version) in enumerate(self.given_up):
            if values._version != version:
                self.given_up[i] = layer, pattern, values, values._version
                weight = layer.weight.detach()
                pattern.scatter(values.detach(), weight)
                if layer.mask is not None:  # it may be another one by now
                    weight.mul_(layer.mask)
                increment_version(layer.weight)
                if layer.compact is not None:
                    layer.compact.copy_(layer.pattern.gather(layer.weight.detach()))

    @torch.no_grad()
    def hold(self) -> None:
        """To be called after every step of an optimiser."""
        for layer, _, values, _ in self._trained:
            if layer.name in self._held:
                moves, kept = self._held[layer.name]
                values.copy_(torch.where(moves, values, kept))
        self._stepped = self._versions()

    def _versions(self) -> list[int]:
        return [trained.values._version for trained in self._trained]

    def _place(self, parameter: Tensor) -> _Place | None:
        """Where a parameter is trained, if that is exactly one place."""
        found = [
            (optimizer, group, i)
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for i, p in enumerate(group["params"])
            if p is parameter
        ]
        return found[0] if len(found) == 1 else None


@dataclass
class _Heir:
    """Passes gradients of values that were given up between the passes on to the weight.

    It is a hook of the values and must not refer back to them: such a cycle, through C++, would never be freed.
    """

    weight: Tensor
    pattern: Pattern
    hook: RemovableHandle
    """The weight's hook, for gradients of passes that began before it had values."""
    given_up: bool = False

    @torch.no_grad()
    def __call__(self, values: Tensor) -> None:
        if self.given_up and values.grad is not None:
            grad, values.grad = self.pattern.whole(values.grad, self.weight), None
            if not self.weight.requires_grad:  # frozen meanwhile
                return
            for hook in (self.weight._backward_hooks or {}).values():  # masks may have changed meanwhile
                changed = hook(grad)
                grad = grad if changed is None else changed
            _add(self.weight, grad)
            # hooks of code that trains its values now
            for hook in list((self.weight._post_accumulate_grad_hooks or {}).values()):
                hook(self.weight)


class _Trained(NamedTuple):
    """A layer whose values are trained in place of its weight."""

    layer: Layer
    pattern: Pattern
    values: nn.Parameter
    heir: _Heir


@torch.no_grad()
def _pass_on(layer: weakref.ref[Layer], weight: Tensor) -> None:
    """Pass the gradient of a weight on to its values, if these are trained now."""
    found = layer()
    if found is not None and found.compact is not None and weight.grad is not None:
        _add(found.compact, found.pattern.gather(weight.grad))
        weight.grad = None


def _add(parameter: Tensor, grad: Tensor) -> None:
    parameter.grad = grad if parameter.grad is None else parameter.grad + grad


def _like(value: Any, parameter: Tensor) -> bool:
    return torch.is_tensor(value) and value.shape == parameter.shape and value.dtype == parameter.dtype
