"""Memory that training takes: by SparCL's formula, and as actually allocated."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_sparse_cl.callbacks.calls import Call, OutermostCalls, batch_size
from lightning_sparse_cl.metrics.accounting import DenseCost, sparcl_memory
from lightning_sparse_cl.metrics.plain import weights_of
from lightning_sparse_cl.sparsity.enforcement import Enforcement
from lightning_sparse_cl.sparsity.layers import network_of
from lightning_sparse_cl.sparsity.masks import Masks


class MemoryFootprint(pl.Callback):
    """Two figures that answer different questions; see :meth:`summary`."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.cost: DenseCost | None = None
        self.batch_size = 0
        self._version = -1
        self._calls: OutermostCalls | None = None  # during the first batch
        self._activations: dict[str, float] = {}
        self._device = torch.device("cpu")
        self._densest: Tensor | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._clear()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._masks, self._device = Masks.of(pl_module), pl_module.device
        if self._densest is not None:
            self._densest = self._densest.to(self._device)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self.cost is None and not self.batch_size:
            self._calls = OutermostCalls(pl_module, self._note)
            self._calls.watch()

    def _note(self, call: Call) -> None:
        if call.backward and not Enforcement.of(self._masks.module).is_scoring:
            self._activations.setdefault(call.name, call.cost.activations / max(call.samples, 1))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        if self._calls is not None:
            self._calls.remove()
            self._calls, self.batch_size = None, batch_size(batch)
            if self._activations:
                parameters = sum(p.numel() for p in weights_of(network_of(pl_module)).values())
                self.cost = DenseCost({}, round(sum(self._activations.values())), parameters)
        if self._masks.version != self._version:
            self._version = self._masks.version
            densest = self._densities()
            self._densest = densest if self._densest is None else torch.maximum(self._densest, densest)

    def _densities(self) -> Tensor:
        """Fractions (2,) of the masked weights that are alive and that are updated."""
        masks, module = self._masks, self._masks.module
        names = {*masks.alive, *masks.updated, *masks.frozen}
        if not names:
            return torch.ones(2, device=self._device)
        total = sum(module.get_parameter(name).numel() for name in names)
        alive = sum(masks.alive[n].sum() if n in masks.alive else module.get_parameter(n).numel() for n in names)
        updated = sum(masks.movable(name).sum() for name in names)
        return torch.stack([torch.as_tensor(part, device=self._device) / total for part in (alive, updated)])

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._calls is not None:
            self._calls.remove()

    def summary(self) -> dict[str, Any]:
        """``formula``: bytes by :func:`~lightning_sparse_cl.metrics.sparcl_memory` (SparCL, Appendix B.2) with the
        densest masks used in training (two activations of the batch, weights and gradients; it leaves out a replayed
        batch, optimiser state, memory and the whole gradients of RigL's and SNFS's steps; the activations of each
        module that ``training_step`` calls count once per sample); ``dense``: the same without masks; ``peak``: the
        most bytes actually allocated, by a GPU's allocator or else by the whole process (``source``). Masks save none
        of the latter: tensors stay dense while training.
        """
        found: dict[str, Any] = {}
        if self.cost is not None and self._densest is not None:
            alive, updated = self._densest.tolist()
            found["formula"] = sparcl_memory(self.cost, self.batch_size, 1 - alive, 1 - updated)
            found["dense"] = sparcl_memory(self.cost, self.batch_size)
        if self._device.type == "cuda":
            return found | {"peak": torch.cuda.max_memory_allocated(self._device), "source": "CUDA allocator"}
        try:
            import resource
        except ImportError:  # Windows
            return found
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return found | {"peak": peak * (1 if sys.platform == "darwin" else 1024), "source": "process"}

    def state_dict(self) -> dict[str, Any]:
        cost = None if self.cost is None else asdict(self.cost)
        return {"densest": self._densest, "cost": cost, "batch_size": self.batch_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._densest, self.batch_size = state["densest"], state["batch_size"]
        self.cost = None if state["cost"] is None else DenseCost(**state["cost"])
