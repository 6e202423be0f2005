"""Masks in training: they hold through every step, in any training loop, and step aside where they are asked to."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, distributed, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from lightning_sparse_cl.sparsity.masks import Masks, WeightMask

_KEY = "_mask_enforcement"


def enforce(module: nn.Module, optimizer: Optimizer) -> Enforcement:
    """Keep the masks of ``module`` through every step of ``optimizer``; calling it again does nothing.

    Freezing and gradient masks act on the *update*, not on the gradient alone: weight decay, momentum, Adam and
    Frank-Wolfe steps all move weights whose gradient is zero, so after every step the held values are put back, bit
    for bit. Gradients of pruned and held coordinates arrive as zero, too, so that SAM does not perturb them and
    Frank-Wolfe does not choose them.
    """
    found = Enforcement.of(module)
    found.attach(optimizer)
    return found


class Enforcement:
    """What happens around the gradients of a masked module. Every trained module has one, which :meth:`of` finds.

    A copy of the module starts with an empty one: optimisers and hooks are not copied.
    """

    def __init__(self) -> None:
        self._module: ReferenceType[nn.Module] | None = None  # a module must not be kept alive by its own hooks
        self._optimizers: WeakSet[Optimizer] = WeakSet()
        self._hooked = WeakIdKeyDictionary()  # by identity: tensors compare element by element
        self._places: list[tuple[str, ReferenceType[nn.Module], str, WeightMask]] = []  # name, layer, own name, record
        self._averages: list[ReferenceType[nn.Module]] = []
        self._whole: dict[str, Tensor | None] = {}
        self._elsewhere: set[str] = set()
        self._taken_away: dict[Optimizer, _Before] = {}
        self._steps: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._depth: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()  # a step may call its base class's step
        self.version = 0
        """Grows when whole gradients are asked for or taken."""
        self.is_scoring = False
        """Whether the passes that run now measure the importance of weights: gradients arrive whole."""
        self.is_scoring_pruned = False
        """Whether these passes need the gradients of pruned weights, too."""

    @classmethod
    def of(cls, module: nn.Module) -> Enforcement:
        """The enforcement of ``module``, made on first use."""
        found = module.__dict__.get(_KEY)
        if found is None:
            found = module.__dict__[_KEY] = cls()
        if found._module is None or found._module() is not module:
            found._module = ref(module)
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Enforcement:
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    @property
    def module(self) -> nn.Module:
        """The module whose masks hold."""
        module = None if self._module is None else self._module()
        if module is None:
            raise ReferenceError("Enforcement: the module it belongs to no longer exists")
        return module

    @property
    def masks(self) -> Masks:
        """The masks of the module."""
        return Masks.of(self.module)

    # -- steps -------------------------------------------------------------------------------------------------

    def attach(self, optimizer: Optimizer) -> None:
        """See :func:`enforce`."""
        self.hook()
        if optimizer not in self._optimizers:
            self._optimizers.add(optimizer)
            optimizer.register_step_pre_hook(self._steps_now)
            optimizer.register_step_post_hook(self._stepped)

    def begin(self) -> None:
        """Training begins: forget what an earlier training has left behind, whether it ended or broke off."""
        self._whole, self._elsewhere = {}, set()
        self._taken_away.clear()
        self._depth.clear()

    def hook(self) -> None:
        """Mask the gradients of all weights that are trained by now; layers may have been added or unfrozen."""
        masks = self.masks
        names = {}
        self._places = []
        for name, record in masks.records():
            path, _, own = name.rpartition(".")
            self._places.append((name, ref(masks.module.get_submodule(path)), own, record))
        for prefix, layer in masks.layers:
            for own, weight in dict.items(layer._parameters):  # a plain look-up would end compact training
                if weight is None or isinstance(weight, UninitializedParameter) or weight in self._hooked:
                    continue
                if weight.ndim > 1 and weight.requires_grad:
                    names[prefix + own] = weight
        for name, weight in names.items():
            if weight not in self._hooked:
                self._hooked[weight] = True
                record = masks.record(name)  # the hook must not lead back to the weight: such a cycle is never freed
                at = ref(weight)
                weight.register_hook(lambda grad, *, n=name, r=record, at=at: self._masked(n, r, at, grad))

    def _steps_now(self, optimizer: Optimizer, *_: Any) -> None:
        self._depth[optimizer] = self._depth.get(optimizer, 0) + 1

    @torch.no_grad()
    def _stepped(self, optimizer: Optimizer, *_: Any) -> None:
        self._depth[optimizer] = max(self._depth.get(optimizer, 0) - 1, 0)
        if not self._depth[optimizer]:
            self._steps[optimizer] = self.steps(optimizer) + 1
            if optimizer in self._taken_away:
                self._taken_away.pop(optimizer).restore(optimizer)
        self.apply_()

    def steps(self, optimizer: Optimizer) -> int:
        """How many steps of an optimiser were taken since it was attached."""
        return self._steps.get(optimizer, 0)

    def apply_(self) -> None:
        """Put the held weights of the module back and zero the pruned ones."""
        if not self._places:
            self.hook()
        for name, place, own, record in self._places:
            if (record.alive is None and record.values is None) or name in self._elsewhere:
                continue
            layer = place()
            weight = None if layer is None else layer._parameters.get(own)
            if weight is not None:
                record.apply_(weight)

    def take_away_step(self, optimizer: Optimizer) -> None:
        """The coming step of ``optimizer`` changes nothing: weights and optimiser state are put back after it.

        Gradients stay where they are, so that they can be clipped and logged. During the step, the optimiser's weights
        and state are in memory twice.
        """
        self._taken_away[optimizer] = _Before(optimizer)

    def forget_steps(self) -> None:
        """Do not take away a later step: a gradient scaler may have skipped the one that was meant."""
        self._taken_away.clear()
        self._depth.clear()

    def _masked(self, name: str, record: WeightMask, at: ReferenceType[Tensor], grad: Tensor) -> Tensor:
        if self.is_scoring:
            return grad
        if name in self._whole:
            before, weight = self._whole[name], at()
            if before is None or weight is None or weight.grad is None:  # the first since gradients were None
                self._whole[name] = grad.clone()
            else:
                self._whole[name] = before + grad
        if record.alive is not None:
            grad = grad * record.alive
        if record.values is not None and (free := record.free()) is not None:
            grad = grad * free
        return grad

    # -- averages of the weights -------------------------------------------------------------------------------

    def follow(self, average: nn.Module) -> None:
        """From now on ``average``, a copy of the module that holds averages of its weights, has the same masks."""
        self.masks.share_with(average)
        if all(known() is not average for known in self._averages):
            self._averages.append(ref(average))

    def apply_to_averages(self) -> None:
        """Apply the masks to the averages, after these were updated or masks have changed."""
        for average in self._averages:
            if (module := average()) is not None:
                Masks.of(module).apply_()

    # -- whole gradients ---------------------------------------------------------------------------------------

    @contextmanager
    def scoring(self, alive_only: bool = False) -> Iterator[None]:
        """For passes that measure the importance of weights: gradients arrive whole, and FLOPs are counted apart.

        With ``alive_only`` gradients of pruned weights are not looked at, and may be anything.
        """
        before = self.is_scoring, self.is_scoring_pruned
        self.is_scoring, self.is_scoring_pruned = True, not alive_only
        try:
            yield
        finally:
            self.is_scoring, self.is_scoring_pruned = before

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """For passes that are not the step's own: masks act on their gradients, and whole ones are not kept."""
        before, self._whole = self._whole, {}
        try:
            yield
        finally:
            self._whole = before

    @property
    def whole(self) -> frozenset[str]:
        """Names of the weights whose whole gradients are being kept."""
        return frozenset(self._whole)

    @property
    def needs_whole(self) -> bool:
        """Whether the passes that run now are to give gradients of pruned weights."""
        return bool(self._whole) or self.is_scoring_pruned

    def ask_whole(self, names: Iterable[str]) -> None:
        """Keep the unmasked gradients of the backward passes that follow: policies grow weights by them."""
        missing = [name for name in names if name not in self._whole]
        self._whole |= dict.fromkeys(missing)
        self.version += bool(missing)

    def take_whole(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The sums of these gradients, as ``.grad`` sums them, averaged over processes; they are no longer kept.

        Args:
            names: names of the weights. If None, all.
        """
        asked = list(self._whole) if names is None else [name for name in names if name in self._whole]
        taken = {name: grad for name in asked if (grad := self._whole.pop(name)) is not None}
        self.version += bool(asked)
        if taken and distributed.is_available() and distributed.is_initialized():
            for grad in taken.values():
                distributed.all_reduce(grad)
            torch._foreach_div_(list(taken.values()), distributed.get_world_size())
        return taken

    def forget_whole(self, names: Iterable[str]) -> None:
        """Whole gradients of these names are not wanted after all."""
        asked = [name for name in names if name in self._whole]
        for name in asked:
            del self._whole[name]
        self.version += bool(asked)

    # -- weights that are trained in another form --------------------------------------------------------------

    def leave_to_others(self, names: Iterable[str]) -> None:
        """These weights are trained in another form for now, which holds the masks by itself; steps skip them."""
        self._elsewhere |= set(names)

    def take_back(self, names: Iterable[str]) -> None:
        """These weights are trained as they are again."""
        self._elsewhere -= set(names)


class _Before:
    """The weights and the state of an optimiser before a step."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.weights = [(p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
        self.state = {p: {k: _copied(v) for k, v in state.items()} for p, state in optimizer.state.items()}
        self.groups = [{k: _copied(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]

    def restore(self, optimizer: Optimizer) -> None:
        for group, before in zip(optimizer.param_groups, self.groups):
            group.update(before)
        for weight, value in self.weights:
            weight.copy_(value)
        optimizer.state.clear()
        optimizer.state.update(self.state)


def _copied(value: Any) -> Any:
    return value.clone() if torch.is_tensor(value) else copy.deepcopy(value)
