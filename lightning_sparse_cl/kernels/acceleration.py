"""Makes a masked network fast, and plain again: ``accelerate`` and ``densify``."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_sparse_cl.kernels.build import library
from lightning_sparse_cl.kernels.choices import Choices
from lightning_sparse_cl.kernels.compact import CompactWeights, Watched
from lightning_sparse_cl.kernels.layer import Layer, unsupported
from lightning_sparse_cl.kernels.runner import Runner, traceable
from lightning_sparse_cl.sparsity.enforcement import Enforcement
from lightning_sparse_cl.sparsity.layers import weight_layers
from lightning_sparse_cl.sparsity.masks import Masks


def accelerate(
    model: nn.Module,
    masks: Masks | Mapping[str, Tensor] | None = None,
    optimizers: Iterable[Optimizer] = (),
    parts: Sequence[str] = ("",),
    measure: bool = True,
) -> Acceleration:
    """Run a masked network by sparse kernels from now on, in training and evaluation, on CPUs in float32.

    The module, its parameters and its ``state_dict`` stay what they are: only calls of it are computed in another way.
    Convolutions (1x1 and 3x3, stride 1 and 2, one group) and linear layers whose weights are masked use the kernels
    where these were measured to be faster for the shapes that come; batch-norm, ReLU, sums and pooling between them
    stay in the kernels' layout; everything else is called as it is. Gradients are those of the alive weights, and zero
    elsewhere.

    With ``optimizers`` the masked weights are trained as vectors of their alive values: the parameters of the modules
    are brought up to date when somebody reads them *from the modules*. So read ``model.parameters()`` anew wherever
    weights or gradients are wanted between the steps (to clip, to average), or take the optimiser's groups: a list from
    before is out of date, and hooks on the weights' gradients are not called. Optimisers that do not treat every
    element alone, such as Frank-Wolfe, and multi-process training keep the whole weights.

    Args:
        model: any network, or one whose parts can be traced by ``torch.fx``: the largest such parts are run as a whole.
            Where layers outside of a part share its weights, give the whole network and the part's name in ``parts``.
        masks: of its weights by name, True where alive. :class:`Masks` are followed: their changes, gradients asked for
            whole, held weights. None is: where the weights are not zero now, if a tenth of a weight is.
        optimizers: of the weights, for training; in Lightning, ``trainer.optimizers``. One that is made later, from the
            same weights, must be given, too: accelerate the network anew.
        parts: names of the submodules that are called as a whole; the model itself is ``""``.
        measure: False uses the kernels wherever there are any, without a look at the clock.

    Returns:
        What :func:`densify` takes, if not the model; it tells what is run how. Masked layers without kernels are named
        in a warning, too.

    Raises:
        KernelsUnavailable: if the kernels cannot be compiled here.
        ValueError: if a mask has no name or does not fit its weight, ``optimizers`` are not torch's, ``parts`` names no
            submodule, or the model is already accelerated or compiled; nothing has changed then.
    """
    library()
    return Acceleration(model, masks, optimizers, parts, measure)


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
    ) -> None:
        if any(m._compiled_call_impl or isinstance(m._parameters, Watched) for m in model.modules()):
            raise ValueError(f"accelerate({type(model).__name__}): it is already accelerated or compiled")
        names = {name for name, _ in model.named_modules()}
        if not parts:
            raise ValueError(f"accelerate(parts={parts!r}): names of submodules, '' is the model itself")
        for part in parts:
            if part not in names:
                raise ValueError(f"accelerate(parts={list(parts)}): there is no {part!r} in {type(model).__name__}")
        listed = isinstance(optimizers, Iterable)
        self.optimizers = list(optimizers) if listed else []
        if not listed or not all(isinstance(o, Optimizer) for o in self.optimizers):
            raise ValueError(f"accelerate(optimizers={type(optimizers).__name__}): a list of torch's optimisers")
        self.model = model
        self.masks = masks
        self.removed = False
        self._hooks: list[RemovableHandle] = []
        self._enforced: list[tuple[Tensor, Tensor]] = []  # weights with masks that nobody else enforces
        self.choices = Choices(measure)
        self.layers: dict[str, Layer] = {}
        self.left: dict[str, str] = {}
        """Layers without kernels, and why."""
        self._told: set[str] = set()
        around = masks.module if isinstance(masks, Masks) else model
        uses = Counter(id(p) for m in around.modules() for p in m._parameters.values())
        for weight, module in weight_layers(model).items():
            name = weight.removesuffix("weight").removesuffix(".")
            if not any(name == part or name.startswith(f"{part}." if part else "") for part in parts):
                continue
            reason = unsupported(module) or ("a shared weight" if uses[id(module.weight)] > 1 else None)
            if reason is None:
                self.layers[name] = Layer(name, module, None)
            else:
                self.left[name] = reason
        self._version: int | None = None
        self._orphans: list[CompactWeights] = []
        self._prefix = ""
        if isinstance(masks, Masks) and masks.module is not model:
            inside = [name for name, m in masks.module.named_modules() if m is model]
            if not inside:
                raise ValueError(f"accelerate({type(model).__name__}): the masks are of another module")
            self._prefix = f"{inside[0]}."
        given = self._given(masks)
        whole = [found for n in parts for found in traceable(model.get_submodule(n), self.layers, n)]
        self._tell(given)
        self.follow()
        for name, mask in given.items():
            self._enforce(name, mask)
        self.compact: CompactWeights | None = None
        for optimizer in self.optimizers:
            self._hooks += [
                optimizer.register_step_pre_hook(self._restored), optimizer.register_step_post_hook(self._stepped),
                optimizer.register_state_dict_pre_hook(self._looked_at),
                optimizer.register_load_state_dict_pre_hook(self._looked_at),
            ]  # fmt: skip
        found_by = whole or [(parts[0], model.get_submodule(parts[0]))]  # see _of
        self._runners = [Runner(self, part, name) for name, part in found_by]
        for layer in self.layers.values():
            layer.module._parameters = Watched(layer.module._parameters, partial(self._wake, layer))
        for runner in self._runners:
            runner.part._compiled_call_impl = runner

    def _given(self, masks: Masks | Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Masks that do not change, by weight."""
        if isinstance(masks, Masks):
            return {}
        if masks is None:
            own, names = dict(self.model.named_parameters()), map(_weight, (*self.layers, *self.left))
            found = {n: own[n].detach() != 0 for n in names if n in own}  # others are computed, or another's
            return {n: m for n, m in found.items() if m.count_nonzero() < 0.9 * m.numel()}
        if not isinstance(masks, Mapping):
            raise ValueError(f"accelerate(masks={type(masks).__name__}): Masks, or masks by the names of their weights")
        parameters = dict(self.model.named_parameters())
        for name, mask in masks.items():
            if name not in parameters:
                raise ValueError(f"accelerate: there is no weight {name!r} in {type(self.model).__name__}")
            if not isinstance(mask, Tensor) or mask.device != parameters[name].device:
                where = f"a tensor on {mask.device}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
                raise ValueError(f"accelerate: the mask of {name!r} is {where}; a tensor on {parameters[name].device}")
            if mask.shape != parameters[name].shape:
                raise ValueError(
                    f"accelerate: the mask of {name!r} has shape {tuple(mask.shape)}, the weight "
                    f"{tuple(parameters[name].shape)}"
                )
            if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
                raise ValueError(f"accelerate: the mask of {name!r} has values other than 0 and 1")
        return {name: mask.bool().clone() for name, mask in masks.items()}

    def _enforce(self, name: str, mask: Tensor) -> None:
        """Keep a weight at zero outside a mask that does not change, also where there are no kernels."""
        weight = self.model.get_parameter(name)
        self._enforced.append((weight, mask))
        with torch.no_grad():
            weight.mul_(mask)
        if weight.requires_grad:
            self._hooks.append(weight.register_hook(lambda grad: grad * mask))
        layer = name.removesuffix("weight").removesuffix(".")
        if layer in self.layers and name == _weight(layer):
            self.layers[layer].remask(mask)

    def _tell(self, masked: Iterable[str]) -> None:
        """Name the layers without kernels among those whose weights are masked, once."""
        new = [n for n in self.left if _weight(n) in masked and n not in self._told]
        self._told.update(new)
        if new:
            told = ", ".join(f"{name or 'the model'} ({self.left[name]})" for name in new)
            warnings.warn(f"accelerate: no kernels for {told}; these layers are run as they are", stacklevel=4)

    def follow(self) -> None:
        """Take the masks as they are now, and what SAM has put back into values that were given up."""
        if isinstance(self.masks, Masks) and self._version != self.masks.version:
            self._version = self.masks.version
            alive = self.masks.alive
            for name, layer in self.layers.items():
                mask = alive.get(self._full(name))
                if mask is not layer.mask:
                    layer.remask(mask)
            self._tell({name.removeprefix(self._prefix) for name in alive})
        for compact in self._orphans:
            compact.take_over()

    def _full(self, name: str) -> str:
        """The name of a layer's weight in the module whose masks are followed."""
        return self._prefix + _weight(name)

    @property
    def masked(self) -> bool:
        """Whether any weight has a mask."""
        return any(layer.mask is not None for layer in self.layers.values())

    def train_compact(self) -> None:
        """Give the optimisers the alive values, until somebody reads a weight or :meth:`train_whole`.

        Raises:
            ValueError: if the model is not accelerated any more.
        """
        if self.removed:
            raise ValueError(f"train_compact: {type(self.model).__name__} is not accelerated any more")
        self.follow()
        layers = (x for x in self.layers.values() if x.mask is not None and x.weight.requires_grad and not x.changed)
        masked = [x for x in layers if not self.choices.dense(x)]
        if self.compact is not None and self.compact.given != masked:  # others have been masked since
            self.train_whole()
        if self.compact is None and masked:
            self.compact = CompactWeights(masked, self.optimizers, self._movable)
            if isinstance(self.masks, Masks):
                self._enforcement.leave_to_others(self._full(x.name) for x in self.compact.layers)

    def train_whole(self) -> None:
        """Give the optimisers the whole weights back."""
        if self.compact is not None:
            compact, self.compact = self.compact, None
            compact.stop()
            if compact.given_up:
                self._orphans.append(compact)
            if isinstance(self.masks, Masks):
                self._enforcement.take_back(self._full(x.name) for x in compact.layers)

    def _restored(self, *_: Any) -> None:
        """A step comes: what was given up before it is not written to any more."""
        self.follow()
        self._orphans.clear()

    @torch.no_grad()
    def _stepped(self, *_: Any) -> None:
        if self.compact is not None:
            self.compact.hold()
        compact = {id(x.weight) for x in self.layers.values() if x.compact is not None}
        for weight, mask in self._enforced:
            if id(weight) not in compact:
                weight.mul_(mask)

    def _looked_at(self, *_: Any) -> None:
        self.follow()
        self.train_whole()

    def _wake(self, layer: Layer) -> None:
        """Somebody reads a parameter of ``layer``, perhaps to write to it."""
        if self._orphans:
            self.follow()
        layer.forget()
        if layer.compact is not None:
            self.train_whole()

    def _movable(self, layer: Layer) -> Tensor | None:
        name = self._full(layer.name)
        if not isinstance(self.masks, Masks) or self.masks.record(name).values is None:
            return None
        return self.masks.movable(name)

    @property
    def _enforcement(self) -> Enforcement:
        assert isinstance(self.masks, Masks)
        return Enforcement.of(self.masks.module)

    def remove(self) -> None:
        """See :func:`densify`."""
        self.train_whole()
        self._restored()
        self.removed = True
        for layer in self.layers.values():
            layer.module._parameters = layer.module._parameters.copy()
        for runner in self._runners:
            runner.part._compiled_call_impl = None
        for hook in self._hooks:
            hook.remove()

    @property
    def steps_aside(self) -> bool:
        """Whether gradients are wanted that the kernels do not take."""
        return isinstance(self.masks, Masks) and self._enforcement.needs_whole


def _weight(layer: str) -> str:
    """The name of a layer's weight."""
    return f"{layer}.weight" if layer else "weight"


def _of(model: nn.Module) -> Acceleration | None:
    owners = (getattr(m._compiled_call_impl, "owner", None) for m in model.modules())
    return next((owner for owner in owners if owner is not None and owner.model is model), None)
