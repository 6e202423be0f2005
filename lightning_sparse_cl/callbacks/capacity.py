"""How much of the network is left in the end, counted and on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_sparse_cl.callbacks.averaging import AVERAGING
from lightning_sparse_cl.callbacks.sparsifier import Sparsifier
from lightning_sparse_cl.callbacks.task_callback import TaskCallback
from lightning_sparse_cl.callbacks.trainer_parts import parts_of
from lightning_sparse_cl.metrics.accounting import capacity
from lightning_sparse_cl.sparsity import Masks, Subnetworks
from lightning_sparse_cl.sparsity.export import save_sparse
from lightning_sparse_cl.sparsity.layers import network_of


class ModelCapacity(TaskCallback):
    """Writes the trained network, without its memory of exemplars, as a sparse file when the fit ends.

    The file, ``model.safetensors`` in the folder of the run, is read by
    :func:`~lightning_sparse_cl.sparsity.load_sparse`, and loaded into a module that has a memory with
    ``module.load_state_dict(state, strict=False)``. Where each task has a subnetwork, the file holds them all, see
    :meth:`~lightning_sparse_cl.Subnetworks.stored`; to go on computing with them load the checkpoint. iCaRL's means of
    exemplars, by which it classifies, are in the checkpoint alone.
    """

    after = (Sparsifier, *AVERAGING)

    def __init__(self) -> None:
        self._found: dict[str, Any] = {}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        if not trainer.is_global_zero or parts_of(trainer).fast_dev_run:
            return
        folder.mkdir(parents=True, exist_ok=True)
        network = {
            n: t for n, t in pl_module.state_dict().items() if not n.startswith(("objective.", "update.", "gates."))
        }
        if len(learnt := Subnetworks.of(pl_module)):
            network = learnt.stored()
        masks, parameters = Masks.of(pl_module), list(network_of(pl_module).parameters())
        self._found = {
            "capacity": capacity(1 - masks.density()),
            "parameters": sum(p.numel() for p in parameters),
            "nonzero": sum(int(p.count_nonzero()) for p in parameters),
            "bytes": save_sparse(network, folder / "model.safetensors"),
            "dense_bytes": sum(t.numel() * t.element_size() for t in network.values()),
        }

    def summary(self) -> dict[str, Any]:
        """``capacity``: EsaCL's eq 6.24, the fraction of the masked weights that is kept; ``parameters`` and how many
        are ``nonzero``; ``bytes`` of the file and ``dense_bytes`` of the tensors in it.
        """
        return dict(self._found)
