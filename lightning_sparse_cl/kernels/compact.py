"""Masked weights trained as the vector of their alive values, so that an optimiser touches nothing else."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_sparse_cl.kernels.layer import Layer
from lightning_sparse_cl.kernels.pattern import Pattern

ELEMENTWISE = (
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax,
    torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.ASGD, torch.optim.Rprop,
)  # fmt: skip
"""Optimisers that treat every element alike, so that they may be given those that are alive and no others."""


class CompactWeights:
    """Takes the weights of sparse layers out of optimisers and puts their alive values in, with the state they have.

    The weights in the modules are out of date until :meth:`stop`; where their parameters are
    :class:`Watched`, nobody sees it. Optimiser state of pruned weights is zero afterwards.

    Args:
        layers: with masks; what their weights have outside of these is zeroed.
        optimizers: those of :data:`ELEMENTWISE` are served, the others keep the whole weights.
        movable: of a layer, where its weights may move, of the weight's shape, or None for everywhere; the others keep
            their values bit for bit.
    """

    def __init__(
        self,
        layers: Iterable[Layer],
        optimizers: Iterable[Optimizer],
        movable: Callable[[Layer], Tensor | None] = lambda layer: None,
    ) -> None:
        self._optimizers = [o for o in optimizers if type(o) in ELEMENTWISE]
        self.given = list(layers)
        self.layers = [layer for layer in self.given if self._place(layer.weight) is not None]
        self._held: dict[str, tuple[Tensor, Tensor]] = {}
        self.given_up: list[tuple[Layer, Pattern, Tensor, int]] = []
        """Values that somebody may write to after :meth:`stop`, and their versions when that was last seen: those that
        have gradients, or have been moved since the last step."""
        self._heirs: list[_Heir] = []
        self._patterns = [layer.pattern for layer in self.layers]
        for layer, pattern in zip(self.layers, self._patterns):
            weight = layer.weight
            weight.data.masked_fill_(~layer.mask, 0)  # others may have been loaded; passes on their way do not see it
            values = nn.Parameter(pattern.gather(weight.detach()))
            if weight.grad is not None:
                values.grad, weight.grad = pattern.gather(weight.grad), None
            optimizer, group, i = self._place(weight)
            group["params"][i] = values
            state = optimizer.state.pop(weight, {})
            if state:
                optimizer.state[values] = {k: pattern.gather(v) if _like(v, weight) else v for k, v in state.items()}
            where = movable(layer)
            if where is not None:
                moves = pattern.gather(torch.empty_like(weight).copy_(where))
                self._held[layer.name] = moves.bool(), values.detach().clone()
                values.register_hook(lambda grad, moves=moves: grad * moves)
            self._heirs.append(_Heir(weight, pattern))
            values.register_post_accumulate_grad_hook(self._heirs[-1])
            self._heirs[-1].hook = weight.register_post_accumulate_grad_hook(partial(_pass_on, weakref.ref(layer)))
            layer.compact = values
        self._stepped = self._versions()

    @torch.no_grad()
    def stop(self) -> None:
        """The weights, their gradients and their optimiser state are whole again."""
        for layer, pattern, heir, stepped in zip(self.layers, self._patterns, self._heirs, self._stepped):
            weight, values = layer.weight, layer.compact
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
            if place is not None:  # else somebody has taken them out
                _, group, i = place
                group["params"][i] = weight
            for optimizer in self._optimizers:
                state = optimizer.state.pop(values, {})
                if state:
                    optimizer.state[weight] = {
                        k: pattern.whole(v, weight) if _like(v, values) else v for k, v in state.items()
                    }
        self._held.clear()

    @torch.no_grad()
    def take_over(self) -> None:
        """What SAM, or whoever moves values between steps, has written to them since they were given up."""
        for i, (layer, pattern, values, version) in enumerate(self.given_up):
            if values._version != version:
                self.given_up[i] = layer, pattern, values, values._version
                weight = layer.weight.detach()
                pattern.scatter(values.detach(), weight)
                if layer.mask is not None:  # another one by now, perhaps
                    weight.mul_(layer.mask)
                increment_version(layer.weight)
                if layer.compact is not None:
                    layer.compact.copy_(layer.pattern.gather(layer.weight.detach()))

    @torch.no_grad()
    def hold(self) -> None:
        """To be called after every step of an optimiser."""
        for layer in self.layers:
            if layer.name in self._held:
                moves, kept = self._held[layer.name]
                layer.compact.copy_(torch.where(moves, layer.compact, kept))
        self._stepped = self._versions()

    def _versions(self) -> list[int]:
        return [layer.compact._version for layer in self.layers]

    def _place(self, parameter: Tensor) -> tuple[Optimizer, dict[str, Any], int] | None:
        """Where a parameter is trained, if that is one place."""
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
    """Takes gradients of values that were given up between the passes to the weight.

    It is a hook of the values and must not lead back to them: such a ring, through C++, would never be freed.
    """

    weight: nn.Parameter
    pattern: Pattern
    given_up: bool = False
    hook: RemovableHandle | None = None
    """The weight's, for gradients of passes that began before it had values."""

    @torch.no_grad()
    def __call__(self, values: Tensor) -> None:
        if self.given_up:
            grad, values.grad = self.pattern.whole(values.grad, self.weight), None
            if not self.weight.requires_grad:  # frozen since
                return
            for hook in (self.weight._backward_hooks or {}).values():  # masks may have changed since
                changed = hook(grad)
                grad = grad if changed is None else changed
            _add(self.weight, grad)
            for hook in list((self.weight._post_accumulate_grad_hooks or {}).values()):  # of who trains its values now
                hook(self.weight)


@torch.no_grad()
def _pass_on(layer: weakref.ref[Layer], weight: nn.Parameter) -> None:
    """The gradient of a weight goes to its values, if these are what is trained now."""
    found = layer()
    if found is not None and found.compact is not None:
        _add(found.compact, found.pattern.gather(weight.grad))
        weight.grad = None


def _add(parameter: nn.Parameter, grad: Tensor) -> None:
    parameter.grad = grad if parameter.grad is None else parameter.grad + grad


class Watched(dict):
    """The parameters of a layer; whoever reads one calls ``wake`` first. A copy is a plain ``dict``."""

    def __init__(self, parameters: Mapping[str, Tensor | None], wake: Callable[[], None]) -> None:
        super().__init__(parameters)
        self._wake = wake

    def __getitem__(self, name: str) -> Tensor | None:
        self._wake()
        return super().__getitem__(name)

    def __setitem__(self, name: str, value: Tensor | None) -> None:
        self._wake()
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        self._wake()
        super().__delitem__(name)

    def __iter__(self) -> Any:  # without it, {**parameters} would go past __getitem__
        return super().__iter__()

    def get(self, *args: Any) -> Any:
        self._wake()
        return super().get(*args)

    def pop(self, *args: Any) -> Any:
        self._wake()
        return super().pop(*args)

    def items(self) -> Any:
        self._wake()
        return super().items()

    def values(self) -> Any:
        self._wake()
        return super().values()

    def copy(self) -> dict[str, Tensor | None]:
        return dict(self.items())

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        return dict, (self.copy(),)


def _like(value: Any, parameter: Tensor) -> bool:
    return torch.is_tensor(value) and value.shape == parameter.shape and value.dtype == parameter.dtype
