"""When masked weights are trained as compact vectors, and when they are whole again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_sparse_cl.acceleration.choices import Choices
from lightning_sparse_cl.acceleration.compact import CompactWeights
from lightning_sparse_cl.acceleration.layer import Layer
from lightning_sparse_cl.acceleration.sparse_layers import SparseLayers, weight_name


class CompactTraining:
    """Gives optimisers the alive values of masked weights, until a weight or an optimiser's state is read.

    Args:
        layers: the layers whose weights are trained.
        choices: layers for which torch was faster keep their whole weights.
        optimizers: the optimisers of the weights.
    """

    def __init__(self, layers: SparseLayers, choices: Choices, optimizers: Iterable[Optimizer]) -> None:
        self._layers, self._choices, self._optimizers = layers, choices, list(optimizers)
        self.compact: CompactWeights | None = None
        """The weights that are compact now, if any are."""
        self._given_up: list[CompactWeights] = []  # since the last step, as SAM may still write to their values
        self._hooks: list[RemovableHandle] = []

    def watch(self) -> None:
        """Follow the steps of the optimisers, and every read of their state."""
        for optimizer in self._optimizers:
            self._hooks.append(optimizer.register_step_pre_hook(self._before_step))
            self._hooks.append(optimizer.register_step_post_hook(self._after_step))
            self._hooks.append(optimizer.register_state_dict_pre_hook(self._looked_at))
            self._hooks.append(optimizer.register_load_state_dict_pre_hook(self._looked_at))

    def follow(self) -> None:
        """Take the masks as they are now, and what SAM has put back into values that were given up."""
        self._layers.follow()
        for compact in self._given_up:
            compact.take_over()

    def begin(self) -> None:
        """Give the optimisers the alive values, where there is something to gain."""
        self.follow()
        layers = (
            layer
            for layer in self._layers.with_kernels.values()
            if layer.mask is not None and layer.weight.requires_grad and not layer.changed
        )
        masked = [layer for layer in layers if not self._choices.dense(layer)]
        if self.compact is not None and self.compact.given != masked:  # other weights have been masked since
            self.end()
        if self.compact is None and masked:
            self.compact = CompactWeights(masked, self._optimizers, self._movable)
            self._layers.masks.begin_compact(weight_name(layer.name) for layer in self.compact.layers)

    def end(self) -> None:
        """Give the optimisers the whole weights back."""
        if self.compact is not None:
            compact, self.compact = self.compact, None
            compact.stop()
            if compact.given_up:
                self._given_up.append(compact)
            self._layers.masks.end_compact(weight_name(layer.name) for layer in compact.layers)

    def wake(self, layer: Layer) -> None:
        """Code reads a parameter of ``layer``, perhaps to write to it."""
        if self._given_up:
            self.follow()
        layer.forget()
        if layer.compact is not None:
            self.end()

    def stop(self) -> None:
        """Leave whole weights behind, and the optimisers alone."""
        self.end()
        self._before_step()
        for hook in self._hooks:
            hook.remove()

    def _movable(self, layer: Layer) -> Tensor | None:
        return self._layers.masks.movable(weight_name(layer.name))

    def _before_step(self, *_: Any) -> None:
        self.follow()
        self._given_up.clear()  # these values are no longer written to

    def _after_step(self, *_: Any) -> None:
        if self.compact is not None:
            self.compact.hold()
        compact = {id(layer.weight) for layer in self._layers.with_kernels.values() if layer.compact is not None}
        self._layers.masks.apply_(lambda weight: id(weight) in compact)

    def _looked_at(self, *_: Any) -> None:
        self.follow()
        self.end()
