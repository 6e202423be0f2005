"""The network as it was: what distillation compares with."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Teacher(nn.Module):
    """A copy of a network, kept in buffers: no optimiser steps it, no mask prunes it, and checkpoints hold it.

    It is always in eval mode, and without gradient.
    """

    def build(self, network: nn.Module) -> None:
        """Allocate a copy of ``network`` with its present weights."""
        skeleton = copy.deepcopy(network).to("meta").eval()
        self._skeleton = (skeleton,)  # in a tuple: its weights are not parameters of this module
        self._names = [name for name, _ in (*network.named_parameters(), *network.named_buffers())]
        for name, tensor in self._tensors(network).items():
            self.register_buffer(name.replace(".", "/"), tensor.detach().clone())

    @staticmethod
    def _tensors(network: nn.Module) -> dict[str, Tensor]:
        return dict(network.named_parameters()) | dict(network.named_buffers())

    @torch.no_grad()
    def take(self, network: nn.Module) -> None:
        """Take over the present weights of ``network``."""
        for name, tensor in self._tensors(network).items():
            self.get_buffer(name.replace(".", "/")).copy_(tensor)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        """What the network would have returned for ``x``."""
        tensors = {name: self.get_buffer(name.replace(".", "/")) for name in self._names}
        return functional_call(self._skeleton[0], tensors, (x,))
