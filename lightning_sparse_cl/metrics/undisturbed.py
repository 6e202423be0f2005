"""Run a module without a trace: a measurement must leave nothing behind."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_STRUCTURE = ("_parameters", "_modules", "_compiled_call_impl")


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Put back, on leaving, all that calls of ``module`` may change.

    That is: random states (Python, NumPy, CPU, the module's GPUs, generators that it owns), modes, buffers, counters
    and other attributes of it and of the modules in it, including tensors, lists and dicts (such as the states of
    torchmetrics). Weights are not copied: a forward pass does not change them.
    """
    devices = {t.device.index for t in (*module.parameters(), *module.buffers()) if t.device.type == "cuda"}
    modules = [_Attributes(m) for m in module.modules()]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for attributes in modules:
            attributes.restore()


class _Attributes:
    """The attributes of one module, as they were."""

    def __init__(self, module: nn.Module) -> None:
        own = module.__dict__
        self._own = own
        self._values = {name: value for name, value in own.items() if name not in _STRUCTURE}
        self._containers = [(v, copy.copy(v)) for v in self._values.values() if type(v) in (list, dict, set, deque)]
        self._generators = [(v, v.get_state()) for v in self._values.values() if isinstance(v, torch.Generator)]
        held: list[Any] = list(self._values.values())
        for container, _ in self._containers:
            held += container.values() if isinstance(container, dict) else container
        tensors = (t for t in held if isinstance(t, Tensor) and not isinstance(t, nn.Parameter))
        self._tensors = [(t, t.detach().clone(), t._version) for t in tensors if not t.is_inference()]

    @torch.no_grad()
    def restore(self) -> None:
        for name in self._own.keys() - self._values.keys() - set(_STRUCTURE):
            del self._own[name]
        self._own.update(self._values)
        for container, before in self._containers:
            container.clear()
            container.update(before) if isinstance(container, dict | set) else container.extend(before)
        for generator, state in self._generators:
            generator.set_state(state)
        for tensor, before, version in self._tensors:
            if tensor._version != version:
                tensor.copy_(before)
