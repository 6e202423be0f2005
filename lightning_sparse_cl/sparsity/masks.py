"""Masks over plain weights: which are alive, which are frozen, and their enforcement in any training loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

_of: WeakKeyDictionary[nn.Module, Masks] = WeakKeyDictionary()


class Masks:
    """Boolean masks by parameter name; the weights themselves stay plain parameters with their usual names.

    ``alive[name]`` is True where a weight may be non-zero, ``frozen[name]`` True where it is alive but never updated.
    A name that is absent has no mask: all alive, none frozen. Pruning a coordinate sets it to zero; freezing acts on
    the *update*, not on the gradient: weight decay, momentum, Adam and Frank-Wolfe steps all move weights whose
    gradient is zero, so after every optimiser step the frozen values are put back, bit for bit.

    Args:
        module: the module whose weights are masked. Use :meth:`of` to share one ``Masks`` among callbacks.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = ref(module)  # the module must not be kept alive by its own masks
        self.alive: dict[str, Tensor] = {}
        self.frozen: dict[str, Tensor] = {}
        self._values: dict[str, Tensor] = {}  # the frozen weights, kept to put back
        self._optimizers: WeakSet[Optimizer] = WeakSet()
        self._hooked = WeakIdKeyDictionary()  # by identity: tensors compare element by element

    @property
    def module(self) -> nn.Module:
        """The module whose weights are masked."""
        module = self._module()
        if module is None:
            raise ReferenceError("Masks: the module they belong to no longer exists")
        return module

    @classmethod
    def of(cls, module: nn.Module) -> Masks:
        """The one ``Masks`` of ``module``, made on first use."""
        if module not in _of:
            _of[module] = cls(module)
        return _of[module]

    def set_alive(self, name: str, mask: Tensor | None) -> None:
        """Prune: zero the weights where ``mask`` is False. None takes the mask away.

        Raises:
            ValueError: if the mask does not have the weight's shape.
        """
        weight = self._weight(name, mask)
        if mask is None:
            self.alive.pop(name, None)
        else:
            self.alive[name] = torch.empty_like(weight, dtype=torch.bool).copy_(mask)  # in the weight's memory format
            self.apply_()

    def set_frozen(self, name: str, mask: Tensor | None) -> None:
        """Hold the weights where ``mask`` is True at their present value. None releases them all.

        Raises:
            ValueError: if the mask does not have the weight's shape.
        """
        weight = self._weight(name, mask)
        if mask is None:
            self.frozen.pop(name, None)
            self._values.pop(name, None)
        else:
            self.frozen[name] = torch.empty_like(weight, dtype=torch.bool).copy_(mask)
            self._values[name] = weight.detach().clone()

    def movable(self, name: str) -> Tensor:
        """Where the weight is alive and not frozen, of the weight's shape."""
        free = torch.ones_like(self.module.get_parameter(name), dtype=torch.bool)
        if name in self.alive:
            free &= self.alive[name]
        if name in self.frozen:
            free &= ~self.frozen[name]
        return free

    def density(self, name: str | None = None) -> float:
        """Fraction of weights alive, of one masked weight or over all that have a mask."""
        masks = [self.alive[name]] if name else list(self.alive.values())
        total = sum(m.numel() for m in masks)
        return sum(int(m.sum()) for m in masks) / total if total else 1.0

    def enforce(self, optimizer: Optimizer) -> None:
        """Keep the masks through every step of ``optimizer``, in manual and automatic optimisation.

        Gradients of pruned and frozen coordinates arrive as zero (so that SAM does not perturb them and Frank-Wolfe
        does not choose them), and weights are put right after every step. Calling it again does nothing.
        """
        if optimizer in self._optimizers:
            return
        self._optimizers.add(optimizer)
        optimizer.register_step_post_hook(lambda *_: self.apply_())
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, weight in self.module.named_parameters():
            if weight.ndim > 1 and id(weight) in stepped and weight not in self._hooked:
                self._hooked[weight] = True
                weight.register_hook(lambda grad, name=name: self._masked(name, grad))

    @torch.no_grad()
    def apply_(self) -> None:
        """Zero the pruned weights and put the frozen ones back."""
        for name, mask in self.alive.items():
            self.module.get_parameter(name).mul_(mask)
        for name, mask in self.frozen.items():
            weight = self.module.get_parameter(name)
            weight.copy_(torch.where(mask, self._values[name], weight))

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {"alive": dict(self.alive), "frozen": dict(self.frozen)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore after the weights: frozen values are those the module holds now. Names keep the saved order."""
        for name in [*self.alive, *self.frozen]:
            self.set_alive(name, None)
            self.set_frozen(name, None)
        for name, mask in state["alive"].items():
            self.set_alive(name, mask)
        for name, mask in state["frozen"].items():
            self.set_frozen(name, mask)

    def __iter__(self) -> Iterator[str]:
        return iter(self.alive)

    def __len__(self) -> int:
        return len(self.alive)

    def _masked(self, name: str, grad: Tensor) -> Tensor:
        if name in self.alive:
            grad = grad * self.alive[name]
        if name in self.frozen:
            grad = grad * ~self.frozen[name]
        return grad

    def _weight(self, name: str, mask: Tensor | None) -> nn.Parameter:
        weight = self.module.get_parameter(name)
        if mask is not None and mask.shape != weight.shape:
            raise ValueError(f"Masks: mask of {name!r} has shape {tuple(mask.shape)}, the weight {tuple(weight.shape)}")
        return weight
