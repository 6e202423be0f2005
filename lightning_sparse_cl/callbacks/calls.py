"""What the forward passes of training cost, whichever modules they go through."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from lightning_sparse_cl.metrics.accounting import DenseCost
from lightning_sparse_cl.metrics.plain import plain_copy, steps_aside, weights_of
from lightning_sparse_cl.metrics.products import ProductCounter
from lightning_sparse_cl.objectives.teacher import Teacher
from lightning_sparse_cl.sparsity.layers import network_of


class Call(NamedTuple):
    """An outermost call of a module: one that is not inside a call of another module."""

    name: str
    """Name of the module in the LightningModule; ``""`` is the LightningModule itself."""
    module: nn.Module
    samples: int
    cost: DenseCost
    """Cost of all samples together."""
    backward: bool
    """Whether a gradient is taken through it."""


class OutermostCalls:
    """Reports what every outermost call in a LightningModule costs while it is in training mode.

    A call with inputs of new shapes is counted while it happens, by
    :class:`~lightning_sparse_cl.metrics.products.ProductCounter`, which only observes; a call with known shapes costs
    what it did before. A module with compiled or accelerated parts would compute differently while observed: it is
    called once more for the count, without a trace. Recomputation in backward passes is not reported.

    Args:
        pl_module: the module.
        told: called after every outermost call.
    """

    def __init__(self, pl_module: pl.LightningModule, told: Callable[[Call], None]) -> None:
        self.pl_module, self.told = pl_module, told
        self.failed: dict[str, str] = {}
        """Modules whose calls could not be counted, each with the reason."""
        self.heard = 0
        """How many calls have been reported."""
        self._hooks: list[RemovableHandle] = []
        # by identity: a metric's hash changes with its state
        self._names: dict[int, str] = {}
        self._fixed: set[int] = set()  # modules that no gradient trains
        self._met: set[int] = set()
        self._costs: dict[tuple, DenseCost] = {}
        self._inside: nn.Module | None = None
        self._level = 0
        self._apart: dict[tuple, tuple[int, DenseCost]] = {}
        self._key: tuple = ()
        self._samples = 0
        self._counter: ProductCounter | None = None
        self._counting = False

    def watch(self, all_modules: bool = True) -> None:
        """Hook into the modules that may be called from outside.

        Call it again whenever modules may have been added, exchanged or compiled.

        Args:
            all_modules: if False, leave out what is inside modules that have been called since all were watched.
        """
        self.remove()
        if all_modules:
            self._met = set()
        self._names = {id(module): name for name, module in self.pl_module.named_modules()}
        self._counter = None
        self._fixed = set()
        for module in dict.fromkeys(self._outer(self.pl_module)):
            if not any(p.requires_grad for p in weights_of(module).values()):
                self._fixed.add(id(module))
            self._hooks += [
                module.register_forward_pre_hook(_Hook(self._before), with_kwargs=True),
                module.register_forward_hook(_Hook(self._after), prepend=True, always_call=True),
            ]

    def _outer(self, module: nn.Module) -> Iterator[nn.Module]:
        closed = steps_aside(module)  # hooks inside would be compiled, or keep the kernels from running
        own = module is self.pl_module
        if not closed or own:
            yield module
        if not closed and (own or id(module) not in self._met):
            for part in module.children():
                yield from self._outer(part)

    def remove(self) -> None:
        """Take all hooks away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._leave()

    def _leave(self) -> None:
        self._inside = None
        if self._counting and self._counter is not None:
            self._counting = False
            self._counter.__exit__(None, None, None)

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or any(isinstance(a, fx.Proxy) for a in args):  # traced, not run
            return
        if self._inside is not None:
            self._met.add(id(module))
            self._level += self._inside is module
            return
        evaluates = not self.pl_module.training or not (module.training or id(module) in self._fixed)
        if evaluates or torch._C._current_graph_task_id() != -1 or _redirected(module):
            return
        if any(isinstance(a, nn.Module) for a in args):  # an objective, which calls the network itself
            return
        self._met.add(id(module))
        name = self._names[id(module)]
        self._samples = len(args[0]) if _is_batch(args) else batch_size((args, kwargs))
        self._key = (name, *map(_signature, args), *((k, _signature(v)) for k, v in kwargs.items()))
        if self._key not in self._costs:
            if len(self._costs) > 1000:  # shapes or numbers keep changing
                self._costs.clear()
            if any(map(steps_aside, module.modules())):
                self._count_apart(module, args, kwargs)
            else:
                # Made anew: a functional call, such as La-MAML's, puts other tensors in place of weights.
                self._counter = ProductCounter(self._weights(), self.pl_module.buffers())
                self._counter.begin((args, kwargs))
                self._counter.__enter__()
                self._counting = True
        self._inside, self._level = module, 1

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        if torch.compiler.is_compiling() or self._inside is not module:
            return
        self._level -= 1
        if self._level:
            return
        counter = self._counter if self._counting else None
        self._leave()
        if output is None:  # it failed
            return
        if counter is not None:
            self._costs[self._key] = DenseCost.counted(counter, module)
        if self._key in self._costs:
            trained = id(module) not in self._fixed or any(t.requires_grad for t in _tensors(args))
            backward = torch.is_grad_enabled() and trained
            self.heard += 1
            self.told(Call(self._key[0], module, self._samples, self._costs[self._key], backward))

    def _count_apart(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Count by a copy for a module that would compute differently while observed; per sample of any batch."""
        name, n = self._names[id(module)], self._samples
        each = (name, *(_signature(t, batch=False) for t in (*args, *kwargs.values())), *kwargs)
        if each not in self._apart:
            network = network_of(module)
            if network is not module:
                args, kwargs = args[:1], {}
            try:
                self._apart[each] = n, DenseCost.of_call(plain_copy(network), *args, **kwargs)
            except Exception as error:  # a module that cannot be counted must still be trained
                self.failed[name or type(module).__name__] = f"compiled, and a copy fails ({type(error).__name__})"
                return
        counted, cost = self._apart[each]
        prefix = f"{name}." if name else ""
        self._costs[self._key] = replace(
            cost,
            macs={prefix + weight: macs * n // counted for weight, macs in cost.macs.items()},
            weightless=cost.weightless * n // counted,
            activations=cost.activations * n // counted,
        )

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights by name; a teacher's weights, which are copies, have the names of the originals."""
        own = weights_of(self.pl_module)
        yield from own.items()
        for teacher in (m for m in self.pl_module.modules() if isinstance(m, Teacher)):
            for name, copied in teacher.named_buffers():
                path = name.replace("/", ".")
                ends = (f".{path}", f".{path.partition('.')[2]}")
                found = [n for n, p in own.items() if f".{n}".endswith(ends) and p.shape == copied.shape]
                if len(found) == 1:
                    yield found[0], copied


class _Hook:
    """A hook that copies and pickles of the module do not have."""

    def __init__(self, call: Callable[..., None]) -> None:
        self.call = call

    def __call__(self, *args: Any) -> None:
        self.call(*args)

    def __reduce__(self) -> tuple:
        return _Hook, (_nothing,)


def _nothing(*_: Any) -> None:
    pass


def batch_size(values: Any) -> int:
    """Length of the first tensor in nested containers; 0 if there is none."""
    return next((len(t) for t in _tensors(values) if t.ndim), 0)


def _is_batch(values: Any) -> bool:
    """Whether this is the usual case, which needs no search: a tensor comes first."""
    return bool(values) and isinstance(values[0], Tensor) and values[0].ndim > 0


def _tensors(values: Any) -> Iterator[Tensor]:
    return (t for t in tree_leaves(values) if isinstance(t, Tensor))


def _signature(value: Any, batch: bool = True) -> Any:
    """The part of an argument that decides the cost: shapes, and plain values such as flags."""
    if isinstance(value, Tensor):
        return value.shape if batch else value.shape[1:]
    leaves = tree_leaves(value)
    return tuple(
        _signature(v, batch) if isinstance(v, Tensor) else v if isinstance(v, bool | int | str) else type(v)
        for v in leaves
    )


def _redirected(module: nn.Module) -> bool:
    """Whether this call is really one of ``training_step``: strategies that wrap the module redirect it."""
    return getattr(module.__dict__.get("forward"), "__qualname__", "").startswith("_ForwardRedirection")
