"""Masks over plain weights: which are alive, which are frozen, and their enforcement in any training loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

_of: WeakKeyDictionary[nn.Module, Masks] = WeakKeyDictionary()


class Masks:
    """Boolean masks by parameter name; the weights themselves stay plain parameters with their usual names.

    ``alive[name]`` is True where a weight may be non-zero, ``frozen[name]`` True where it is never updated,
    ``updated[name]`` True where it is updated until further notice (a gradient mask). A name that is absent has no
    mask: all alive, none frozen, all updated. Pruning a coordinate sets it to zero; freezing and gradient masks act on
    the *update*, not on the gradient alone: weight decay, momentum, Adam and Frank-Wolfe steps all move weights whose
    gradient is zero, so after every optimiser step the held values are put back, bit for bit. A frozen weight may be
    pruned too: it is zero while it is, and has its frozen value when it is alive again.

    Args:
        module: the module whose weights are masked. Use :meth:`of` to share one ``Masks`` among callbacks.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = ref(module)  # the module must not be kept alive by its own masks
        self.alive: dict[str, Tensor] = {}
        self.frozen: dict[str, Tensor] = {}
        self.updated: dict[str, Tensor] = {}
        self.version = 0
        """Grows with every change of a mask."""
        self.scores_taken = False
        """True inside :meth:`scoring`."""
        self.scores_whole = False
        """True inside :meth:`scoring` of all weights."""
        self.whole: dict[str, Tensor | None] = {}
        """Gradients that no mask acts on, of the names asked for by :meth:`ask_whole`."""
        self.elsewhere: frozenset[str] = frozenset()
        """Weights that are trained in another form for now, where their masks hold already."""
        self.stored = False
        """True where each task's own mask remembers its frozen weights, so that the present mask may drop them."""
        self._values: dict[str, Tensor] = {}  # the weights when they were last held, kept to put back
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
        self._change(self.alive, name, mask)

    def set_frozen(self, name: str, mask: Tensor | None) -> None:
        """Hold the weights where ``mask`` is True at their present value. None releases them all.

        Raises:
            ValueError: if the mask does not have the weight's shape.
        """
        self._change(self.frozen, name, mask)

    def set_updated(self, name: str, mask: Tensor | None) -> None:
        """Update only where ``mask`` is True and hold the other weights at their present value. None updates all.

        Raises:
            ValueError: if the mask does not have the weight's shape.
        """
        self._change(self.updated, name, mask)

    @torch.no_grad()
    def _change(self, kind: dict[str, Tensor], name: str, mask: Tensor | None) -> None:
        weight = self._weight(name, mask)
        self.version += 1
        whole = torch.where(self.frozen[name], self._values[name], weight) if name in self.frozen else weight.clone()
        if mask is None:
            kind.pop(name, None)
        else:
            kind[name] = torch.empty_like(weight, dtype=torch.bool).copy_(mask)  # in the weight's memory format
        if name in self.frozen or name in self.updated:
            self._values[name] = whole
        else:
            self._values.pop(name, None)
        weight.copy_(whole.masked_fill(~self.alive[name], 0) if name in self.alive else whole)

    @contextmanager
    def scoring(self, alive_only: bool = False) -> Iterator[None]:
        """For passes that measure the importance of weights: gradients arrive whole, and FLOPs are counted apart.

        With ``alive_only`` gradients of pruned weights are not looked at, and may be anything.
        """
        before = self.scores_taken, self.scores_whole
        self.scores_taken, self.scores_whole = True, not alive_only
        try:
            yield
        finally:
            self.scores_taken, self.scores_whole = before

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """For passes that are not the step's own: masks act on their gradients, and whole ones are not kept."""
        before, self.whole = self.whole, {}
        try:
            yield
        finally:
            self.whole = before

    def ask_whole(self, names: Iterable[str]) -> None:
        """Keep the unmasked gradients of the backward passes that follow, for who grows weights by gradient."""
        missing = [name for name in names if name not in self.whole]
        self.whole |= dict.fromkeys(missing)
        self.version += bool(missing)

    def take_whole(self) -> dict[str, Tensor]:
        """The sums of these gradients since they were asked for, mean over processes; nothing is kept any more."""
        taken = {name: grad for name, grad in self.whole.items() if grad is not None}
        self.version += bool(self.whole)
        self.whole = {}
        if distributed.is_available() and distributed.is_initialized():
            for grad in taken.values():
                distributed.all_reduce(grad)
            torch._foreach_div_(list(taken.values()), distributed.get_world_size())
        return taken

    def is_frozen(self, name: str) -> Tensor:
        """Where the weight is frozen, of the weight's shape: who prunes keeps these."""
        frozen = self.frozen.get(name)
        return torch.zeros_like(self.module.get_parameter(name), dtype=torch.bool) if frozen is None else frozen

    def held(self, name: str) -> Tensor:
        """The weight with the values that are frozen, also of those that are pruned now."""
        weight = self.module.get_parameter(name).detach()
        return torch.where(self.frozen[name], self._values[name], weight) if name in self.frozen else weight

    def protected(self, name: str) -> Tensor:
        """Where whoever drops weights has to keep them: frozen and alive, and in no task's own mask."""
        frozen = self.is_frozen(name) & self.alive.get(name, True)
        return torch.zeros_like(frozen) if self.stored else frozen

    def movable(self, name: str) -> Tensor:
        """Where the next step may move the weight: alive and not held; of the weight's shape."""
        free = self._free(name) if name in self._values else True
        return torch.ones_like(self.module.get_parameter(name), dtype=torch.bool) & free & self.alive.get(name, True)

    def density(self, name: str | None = None) -> float:
        """Fraction of weights alive, of one masked weight or over all that have a mask."""
        masks = [self.alive[name]] if name else list(self.alive.values())
        total = sum(m.numel() for m in masks)
        return sum(int(m.sum()) for m in masks) / total if total else 1.0

    def enforce(self, optimizer: Optimizer) -> None:
        """Keep the masks through every step of ``optimizer``, in manual and automatic optimisation.

        Gradients of pruned and held coordinates arrive as zero (so that SAM does not perturb them and Frank-Wolfe
        does not choose them), and weights are put right after every step. Calling it again does nothing.
        """
        if optimizer in self._optimizers:
            return
        self._optimizers.add(optimizer)
        optimizer.register_step_post_hook(lambda *_: self.apply_())
        weights = list(self.module.named_parameters())  # first: who trains their values gives them up
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, weight in weights:
            if weight.ndim > 1 and weight.requires_grad and id(weight) in stepped and weight not in self._hooked:
                self._hooked[weight] = True
                weight.register_hook(lambda grad, name=name: self._masked(name, grad))

    @torch.no_grad()
    def apply_(self) -> None:
        """Put the held weights back and zero the pruned ones."""
        for name in self._values.keys() - self.elsewhere:
            weight = self.module.get_parameter(name)
            weight.copy_(torch.where(self._free(name), weight, self._values[name]))
        for name in self.alive.keys() - self.elsewhere:
            self.module.get_parameter(name).mul_(self.alive[name])

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        kinds = {"alive": dict(self.alive), "frozen": dict(self.frozen), "updated": dict(self.updated)}
        return kinds | {"values": {name: self._values[name][frozen] for name, frozen in self.frozen.items()}}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore after the weights: what a gradient mask holds are the values now. Names keep the saved order.

        Raises:
            ValueError: if the masks are of another network; nothing is changed then.
        """
        weights = dict(self.module.named_parameters())
        kinds = (("frozen", self.set_frozen), ("alive", self.set_alive), ("updated", self.set_updated))
        for name, mask in ((n, m) for kind, _ in kinds for n, m in state.get(kind, {}).items()):
            if name not in weights:
                raise ValueError(f"Masks: the checkpoint has a mask of {name!r}, which this network does not have")
            self._weight(name, mask)
        for kind, put in kinds:
            for name in list(getattr(self, kind)):
                put(name, None)
        for kind, put in kinds:
            for name, mask in state.get(kind, {}).items():
                put(name, mask)
        for name, values in state.get("values", {}).items():
            self._values[name][self.frozen[name]] = values.to(self._values[name])
            self.set_frozen(name, self.frozen[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.alive)

    def __len__(self) -> int:
        return len(self.alive)

    def _free(self, name: str) -> Tensor:
        """Where a held weight is neither frozen nor outside its gradient mask."""
        if name not in self.frozen:
            return self.updated[name]
        free = ~self.frozen[name]
        return free & self.updated[name] if name in self.updated else free

    def _masked(self, name: str, grad: Tensor) -> Tensor:
        if self.scores_taken:
            return grad
        if name in self.whole:
            before = self.whole[name]
            self.whole[name] = grad.clone() if before is None else before + grad
        if name in self.alive:
            grad = grad * self.alive[name]
        if name in self._values:
            grad = grad * self._free(name)
        return grad

    def _weight(self, name: str, mask: Tensor | None) -> nn.Parameter:
        weight = self.module.get_parameter(name)
        if mask is not None and mask.shape != weight.shape:
            raise ValueError(f"Masks: mask of {name!r} has shape {tuple(mask.shape)}, the weight {tuple(weight.shape)}")
        return weight
