"""How much of the network is left at the end, counted and on disk."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_sparse_cl.callbacks.averaging import AVERAGING
from lightning_sparse_cl.callbacks.run_folder import run_folder
from lightning_sparse_cl.callbacks.sparsifier import Sparsifier
from lightning_sparse_cl.callbacks.task_callback import TaskCallback
from lightning_sparse_cl.callbacks.trainer_parts import parts_of
from lightning_sparse_cl.metrics.accounting import capacity
from lightning_sparse_cl.sparsity import Masks, Subnetworks
from lightning_sparse_cl.sparsity.export import save_sparse
from lightning_sparse_cl.sparsity.layers import network_of


class ModelCapacity(TaskCallback):
    """Writes the trained network, without its memory of exemplars, as a sparse file when the fit ends.

    The file, ``model.safetensors`` in the folder of the run
    (:func:`~lightning_sparse_cl.callbacks.run_folder.run_folder`), is read by
    :func:`~lightning_sparse_cl.sparsity.load_sparse`, and loaded into a module that has a memory with
    ``module.load_state_dict(state, strict=False)``. Where each task has a subnetwork, the file holds them all, see
    :meth:`~lightning_sparse_cl.Subnetworks.stored`; to go on computing with them, load the checkpoint. iCaRL's means of
    exemplars, by which it classifies, are only in the checkpoint. If the run has no folder, no file is kept.

    Args:
        folder: where to write instead of the folder of the run.
    """

    after = (Sparsifier, *AVERAGING)

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self._folder: Path | None = None
        self._found: dict[str, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._found = {}
            self._folder = run_folder(trainer) if self.folder is None else Path(self.folder)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero or parts_of(trainer).fast_dev_run:
            return
        network = {
            n: t
            for n, t in pl_module.state_dict().items()
            if not n.startswith(("objective.", "update.", "gates.", "scores."))
        }
        if len(learnt := Subnetworks.of(pl_module)):
            network = learnt.stored()
        masks, parameters = Masks.of(pl_module), list(network_of(pl_module).parameters())
        self._found = {
            "capacity": capacity(1 - masks.density()),
            "parameters": sum(p.numel() for p in parameters),
            "nonzero": sum(int(p.count_nonzero()) for p in parameters),
            "bytes": self._save(network),
            "dense_bytes": sum(t.numel() * t.element_size() for t in network.values()),
        }

    def _save(self, network: dict[str, Any]) -> int:
        """Write the file (temporarily if the run has no folder) and return its size in bytes."""
        if self._folder is None:
            with tempfile.TemporaryDirectory() as folder:
                return save_sparse(network, Path(folder, "model.safetensors"))
        self._folder.mkdir(parents=True, exist_ok=True)
        return save_sparse(network, self._folder / "model.safetensors")

    def summary(self) -> dict[str, Any]:
        """``capacity``: EsaCL's eq 6.24, the fraction of the masked weights that is kept; ``parameters``, and how many
        of them are ``nonzero``; ``bytes`` of the file and ``dense_bytes`` of the tensors in it.
        """
        return dict(self._found)
