"""Sparse kernels in a Lightning run: sparsity that saves time, not only FLOPs."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn

from lightning_sparse_cl.acceleration import Acceleration, accelerate
from lightning_sparse_cl.allocator import keep_freed_memory
from lightning_sparse_cl.kernels import KernelsUnavailable
from lightning_sparse_cl.sparsity import Masks
from lightning_sparse_cl.sparsity.layers import network_of, weight_layers


class SparseAcceleration(pl.Callback):
    """Runs the masked network by sparse kernels, on CPUs in 32-bit precision; it can be added to any run, or left out.

    Nothing else changes: masks are followed as they change, optimisers train the alive values only, other callbacks
    read up-to-date weights, and steps that need gradients of pruned weights (RigL's exchanges, ranking by SNIP) are
    computed dense. Checkpoints are those of a run without it, plus which way was measured to be faster for each layer,
    so that a resumed run computes the same.

    In ``test``, ``validate`` and ``predict``, which know no masks, zero weights are skipped. Without kernels (another
    device or precision, no C++ compiler, a network under ``torch.compile``) the run goes on dense, and says so. With
    several processes, or optimisers that look at more than one element at a time, weights stay whole: slower, but
    otherwise the same. Layers are computed one by one in every stage, so that a test gives the figures of the
    evaluation inside ``fit``; :class:`~lightning_sparse_cl.FlatNetwork` is faster for a trained network.

    Args:
        measure: for each layer and shape, use the kernels only where they are measured to be faster. If False, they are
            used wherever there are any, so that results depend neither on the clock nor on the number of threads.
    """

    def __init__(self, measure: bool = True) -> None:
        self.measure = measure
        self.acceleration: Acceleration | None = None
        self._choices: dict[str, Any] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer, pl_module, Masks.of(pl_module))  # a measurement may come before training

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.acceleration is not None:  # anew: other callbacks may have changed the network, and now it is trained
            alone = isinstance(trainer.strategy, SingleDeviceStrategy)  # others watch the parameters
            self._begin(trainer, pl_module, Masks.of(pl_module), trainer.optimizers if alone else [])

    def on_train_batch_start(self, *_: Any) -> None:
        if self.acceleration is not None:
            self.acceleration.train_compact()

    def on_train_end(self, *_: Any) -> None:
        self._end()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.acceleration is None and trainer.state.fn != "fit":
            self._begin(trainer, pl_module)

    on_test_start = on_predict_start = on_validation_start

    def on_exception(self, *_: Any) -> None:
        self._end()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._end()

    def _begin(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, masks: Masks | None = None, optimizers: Any = ()
    ) -> None:
        self._end()
        if pl_module.device.type != "cpu" or trainer.precision != "32-true":
            rank_zero_warn(
                f"SparseAcceleration: its kernels are for CPUs in 32-true precision, this run is on {pl_module.device} "
                f"in {trainer.precision}; it goes on dense"
            )
            return
        try:
            parts = _parts(pl_module)
            self.acceleration = accelerate(pl_module, masks, optimizers, parts, self.measure, in_one_call=False)
        except (KernelsUnavailable, ValueError) as error:  # for example a compiled backbone
            rank_zero_warn(f"SparseAcceleration: {error}; the run goes on dense")
            return
        keep_freed_memory()
        self.acceleration.choices.load_state_dict(self._choices)

    def _end(self) -> None:
        if self.acceleration is not None:
            self._choices = self.acceleration.choices.state_dict()
            self.acceleration.remove()
            self.acceleration = None

    def state_dict(self) -> dict[str, Any]:
        return self._choices if self.acceleration is None else self.acceleration.choices.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._choices = state


def _parts(pl_module: pl.LightningModule) -> list[str]:
    """The parts that are called as a whole: the network's children, unless it also has layers of its own."""
    layers = weight_layers(network_of(pl_module))
    names = dict.fromkeys(name.removesuffix(".weight").split(".")[0] for name in layers)
    own = [name for name in layers if name.count(".") == 1]
    return [""] if not names or (len(own) > 1 and network_of(pl_module) is pl_module) else list(names)
