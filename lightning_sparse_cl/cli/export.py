"""``sparsecl export``: the trained network as a program that torch runs alone."""

from __future__ import annotations

import lightning.pytorch as pl
from torch import Tensor

import lightning_sparse_cl as scl
from lightning_sparse_cl.callbacks.identity import sequence_of
from lightning_sparse_cl.checkpoint_file import read_checkpoint
from lightning_sparse_cl.nests import described, in_words
from lightning_sparse_cl.sparsity.layers import network_of


class ExportingTrainer(pl.Trainer):
    """A Trainer with ``export``, a subcommand beside ``fit`` and ``test``."""

    def export(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str = "last",
        output: str = "model.pt2",
        weights_only: bool | None = None,
    ) -> None:
        """Write the trained network, without dead channels, for use elsewhere; the file's ending says how.

        ``.pt2``: ``torch.export.load(output).module()`` maps images (B, C, H, W), normalised as in training, to logits
        of all classes. ``.spnet``: for the C++ runtime (``write_runtime``) and ``FlatNetwork.load``; it takes images as
        bytes, and has the names of the classes.

        Args:
            model: the method.
            datamodule: not needed.
            ckpt_path: a checkpoint, or "last": the newest run of this configuration.
            output: the file to write, ``.pt2`` or ``.spnet``.
            weights_only: as for ``torch.load``. If None, True.

        Raises:
            ValueError: if the checkpoint is damaged, of another version or method, has one subnetwork for each task, or
                classifies by a memory.
        """
        if not output.endswith((".pt2", ".spnet")):
            raise ValueError(f"export(output={output!r}): the ending says what is written: .pt2 or .spnet")
        checkpoint = read_checkpoint(ckpt_path, weights_only=weights_only is not False)
        if checkpoint.get("subnetworks") or isinstance(getattr(model, "objective", None), scl.ICaRL):
            raise ValueError(
                f"export: a {type(model).__name__} of this checkpoint is no single network; load it with "
                "load_from_checkpoint and export each that you need by export_network"
            )
        trained = sequence_of(checkpoint)["tested"]["method"] if "task_sequence" in checkpoint else None
        if "built_for" not in checkpoint or trained not in (None, type(model).__qualname__):
            raise ValueError(
                f"export: {ckpt_path} is of a {trained} and the configuration of a {type(model).__qualname__}; use "
                "export_network(network, path)"
            )
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
        inputs = checkpoint["built_for"]["inputs"]
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            raise ValueError(
                f"export: {ckpt_path} is of a network that takes {in_words(described(inputs))}; what can be exported "
                "takes one tensor of floats"
            )
        if output.endswith(".spnet"):
            size = scl.export_spnet(model, output)
            print(f"{output}: {size:,} bytes; images as bytes, classes by name, for FlatNetwork and the C++ runtime")
            return
        shape = tuple(inputs.shape[1:])
        left = scl.export_network(network_of(model), output, shape)
        print(f"{output}: maps images {('B', *shape)} to logits; {left:,} weights, some of them zero")
