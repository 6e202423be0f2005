"""Makes a masked network fast, and plain again: ``accelerate`` and ``densify``."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparse_cl.acceleration.choices import Choices
from lightning_sparse_cl.acceleration.compact import CompactWeights
from lightning_sparse_cl.acceleration.compiled import find_compiled
from lightning_sparse_cl.acceleration.layer import Layer
from lightning_sparse_cl.acceleration.runner import Runner, traceable
from lightning_sparse_cl.acceleration.sparse_layers import SparseLayers
from lightning_sparse_cl.acceleration.training import CompactTraining
from lightning_sparse_cl.acceleration.watched import Watched
from lightning_sparse_cl.kernels.build import library
from lightning_sparse_cl.sparsity.masks import Masks


def accelerate(
    model: nn.Module,
    masks: Masks | Mapping[str, Tensor] | None = None,
    optimizers: Iterable[Optimizer] = (),
    parts: Sequence[str] = ("",),
    measure: bool = True,
    in_one_call: bool = True,
) -> Acceleration:
    """Run a masked network by sparse kernels from now on, in training and evaluation, on CPUs in float32.

    The module, its parameters and its ``state_dict`` stay the same: only its calls are computed differently.
    Convolutions (1x1 and 3x3, stride 1 and 2, one group) and linear layers whose weights are masked use the kernels
    where these prove to be faster for the shapes that occur; batch-norm, ReLU, sums and pooling between them stay in
    the kernels' layout; everything else is called as it is. Gradients are those of the alive weights, and zero
    elsewhere.

    With ``optimizers`` the masked weights are trained as vectors of their alive values: the parameters of the modules
    are brought up to date when they are read *from the modules*. So read ``model.parameters()`` anew whenever weights
    or gradients are needed between the steps (to clip, to average), or use the optimiser's groups: an older list is out
    of date, and hooks on the weights' gradients are not called. Optimisers that do not treat every element alone, such
    as Frank-Wolfe, and multi-process training keep the whole weights; so does, in effect, a network that is compiled
    afterwards, or called from compiled code, which reads them.

    Args:
        model: any network, or one whose parts can be traced by ``torch.fx``: the largest such parts are run as a whole.
            If layers outside a part share its weights, give the whole network and the part's name in ``parts``.
        masks: masks of its weights by name, True where alive. Of :class:`Masks`, changes, requests for whole gradients
            and held weights are followed. If None, a weight with at least 10 % zeros is masked at its zeros.
        optimizers: the optimisers of the weights, for training; in Lightning, ``trainer.optimizers``. If another one is
            made later from the same weights, accelerate the network anew with it.
        parts: names of the submodules that are called as a whole; the model itself is ``""``.
        measure: if False, the kernels are used wherever there are any, and nothing is measured.
        in_one_call: run a network whose weights stay the same, in eval mode and without gradients, as a
            :class:`~lightning_sparse_cl.FlatNetwork` from the second call on, if that has all its layers. Only without
            ``optimizers``: evaluation inside training computes in the same way as training. Writing to ``weight.data``,
            or by NumPy, leaves no trace, and is seen only after a call with gradients.

    Returns:
        An object that :func:`densify` takes, like the model, and that says how each layer is run. A warning also names
        the masked layers without kernels.

    Raises:
        KernelsUnavailable: if the kernels cannot be compiled here.
        ValueError: if a mask has no name or does not fit its weight, ``optimizers`` are not torch's, ``parts`` names no
            submodule, the model is already accelerated, or a part is compiled or scripted; nothing has changed then.
    """
    library()
    return Acceleration(model, masks, optimizers, parts, measure, in_one_call)


def densify(model: nn.Module | Acceleration) -> nn.Module:
    """Undo :func:`accelerate`; what was trained stays.

    Raises:
        ValueError: if the model is not accelerated.
    """
    found = model if isinstance(model, Acceleration) else _of(model)
    if found is None or found.removed:
        raise ValueError(f"densify({type(model).__name__}): it is not accelerated")
    found.remove()
    return found.model


class Acceleration:
    """An accelerated model. See :func:`accelerate`, which makes it."""

    def __init__(
        self,
        model: nn.Module,
        masks: Masks | Mapping[str, Tensor] | None,
        optimizers: Iterable[Optimizer],
        parts: Sequence[str],
        measure: bool,
        in_one_call: bool,
    ) -> None:
        optimizers = _checked(model, optimizers, parts)
        self.model = model
        self.removed = False
        self._told = False
        self.choices = Choices(measure)
        self.in_one_call = in_one_call and not optimizers
        self._sparse = SparseLayers(model, masks, parts)
        whole = [found for n in parts for found in traceable(model.get_submodule(n), self.layers, n)]
        self._training = CompactTraining(self._sparse, self.choices, optimizers)
        self.follow()
        self._hooks = self._sparse.masks.enforce()
        self._training.watch()
        found_by = whole or [(parts[0], model.get_submodule(parts[0]))]  # see _of
        self._runners = [Runner(self, part, name) for name, part in found_by]
        for layer in self.layers.values():
            layer.module._parameters = Watched(layer.module._parameters, partial(self._training.wake, layer))
        for runner in self._runners:
            runner.part._compiled_call_impl = runner

    @property
    def layers(self) -> dict[str, Layer]:
        """The layers with kernels, by name."""
        return self._sparse.with_kernels

    @property
    def left(self) -> dict[str, str]:
        """Layers without kernels, and why."""
        return self._sparse.left

    @property
    def compact(self) -> CompactWeights | None:
        """The weights that are trained as compact vectors now, if any are."""
        return self._training.compact

    def follow(self) -> None:
        """Take the masks as they are now, and what SAM has put back into values that were given up."""
        self._training.follow()

    def train_compact(self) -> None:
        """Give the optimisers the alive values, until a weight is read or :meth:`train_whole` is called.

        Raises:
            ValueError: if the model is no longer accelerated.
        """
        if self.removed:
            raise ValueError(f"train_compact: {type(self.model).__name__} is not accelerated any more")
        if self._is_replaced():
            self._training.end()
        else:
            self._training.begin()

    def train_whole(self) -> None:
        """Give the optimisers the whole weights back."""
        self._training.end()

    def takes_calls(self) -> bool:
        """Whether calls are computed by kernels now: there are masks, and no gradients of pruned weights are wanted."""
        self.follow()
        return self._sparse.masked and not self._sparse.masks.need_whole_gradients

    def _is_replaced(self) -> bool:
        """Whether a part was compiled since, so that its calls bypass the kernels; warns once."""
        part = next((r.part for r in self._runners if r.part._compiled_call_impl is not r), None)
        if part is not None and not self._told:
            self._told = True
            warnings.warn(f"accelerate: {type(part).__name__} was compiled later; it is run dense", stacklevel=3)
        return part is not None

    def remove(self) -> None:
        """See :func:`densify`."""
        self._training.stop()
        self.removed = True
        for layer in self.layers.values():
            layer.module._parameters = layer.module._parameters.copy()
        for runner in self._runners:
            if runner.part._compiled_call_impl is runner:
                runner.part._compiled_call_impl = None
        for hook in self._hooks:
            hook.remove()


def _checked(model: nn.Module, optimizers: Iterable[Optimizer], parts: Sequence[str]) -> list[Optimizer]:
    """The optimisers, if the arguments are valid."""
    kind = type(model).__name__
    if any(isinstance(m._compiled_call_impl, Runner) or isinstance(m._parameters, Watched) for m in model.modules()):
        raise ValueError(f"accelerate({kind}): it is already accelerated")
    if not parts:
        raise ValueError(f"accelerate(parts={parts!r}): names of submodules, '' is the model itself")
    names = {name for name, _ in model.named_modules()}
    for part in parts:
        if part not in names:
            raise ValueError(f"accelerate(parts={list(parts)}): there is no {part!r} in {kind}")
    compiled = find_compiled(model, parts)
    if compiled is not None:
        what = f"its {compiled!r}" if compiled else "it"
        raise ValueError(f"accelerate({kind}): {what} is compiled, and compiled code does not use the kernels")
    listed = list(optimizers) if isinstance(optimizers, Iterable) else [optimizers]
    if not isinstance(optimizers, Iterable) or not all(isinstance(o, Optimizer) for o in listed):
        raise ValueError(f"accelerate(optimizers={type(optimizers).__name__}): a list of torch's optimisers")
    return listed


def _of(model: nn.Module) -> Acceleration | None:
    runners = (m._compiled_call_impl for m in model.modules())
    owners = (runner.owner for runner in runners if isinstance(runner, Runner))
    return next((owner for owner in owners if isinstance(owner, Acceleration) and owner.model is model), None)
