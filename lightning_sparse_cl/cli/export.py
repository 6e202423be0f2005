"""``sparsecl export``: the trained network as a file for torch alone, or for the C++ runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import Dataset

import lightning_sparse_cl as scl
from lightning_sparse_cl.callbacks.identity import sequence_of
from lightning_sparse_cl.checkpoint_file import read_checkpoint
from lightning_sparse_cl.cli.parser import Parser
from lightning_sparse_cl.data import TaskDataModule
from lightning_sparse_cl.data.loader import length
from lightning_sparse_cl.deploy.export import ENDINGS, Values
from lightning_sparse_cl.nests import described, in_words

CALIBRATION = 256
"""Samples, about, that an ONNX model of int8 is calibrated with."""


class ExportingTrainer(pl.Trainer):
    """A Trainer with ``export``, a subcommand beside ``fit`` and ``test``."""

    def export(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str = "last",
        output: str = "model.pt2",
        task: int | None = None,
        values: Values = "float32",
        weights_only: bool | None = None,
    ) -> None:
        """Write the trained network, without dead channels, for use elsewhere; the file's ending says how.

        See :func:`~lightning_sparse_cl.export_model`.

        Args:
            model: the method.
            datamodule: some of its training samples calibrate an ONNX model of int8; else it is not needed.
            ckpt_path: a checkpoint, or "last": the newest run of this configuration.
            output: the file to write, ``.pt2``, ``.spnet`` or ``.onnx``.
            task: answer among the classes of this task alone, counted from 0. If None, among all.
            values: type of the weights.
            weights_only: as for ``torch.load``. If None, True.

        Raises:
            ValueError: if the checkpoint is damaged, of another version or method, or cannot be exported.
        """
        _refuse_ending(output)
        checkpoint = restore(model, ckpt_path, weights_only)
        calibration = None
        if values == "int8" and isinstance(datamodule, TaskDataModule):
            datamodule.setup()
            calibration = some_samples(datamodule.train_sets, CALIBRATION)[0]
        _write(model, checkpoint, ckpt_path, output, values=values, task=task, calibration=calibration)


def restore(model: pl.LightningModule, ckpt_path: str, weights_only: bool | None = None) -> dict[str, Any]:
    """Put a module into the state of a checkpoint, which is returned.

    Raises:
        ValueError: if the checkpoint is damaged, or of another version or method.
    """
    checkpoint = read_checkpoint(ckpt_path, weights_only=weights_only is not False)
    trained = sequence_of(checkpoint)["tested"]["method"] if "task_sequence" in checkpoint else None
    if "built_for" not in checkpoint or trained not in (None, type(model).__qualname__):
        raise ValueError(
            f"export: {ckpt_path} is of a {trained} and the configuration of a {type(model).__qualname__}; use "
            "export_model(network, path)"
        )
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"])
    return checkpoint


def some_samples(sets: Sequence[Dataset], count: int | None = None) -> tuple[Tensor | None, Tensor]:
    """Samples of data sets as they are stored, about so many in all, and their labels; if None, all.

    Where a sample is no tensor, there are none.
    """
    inputs, labels = [], []
    for own in sets:
        most = length(own) if count is None else min(length(own), count // len(sets) + 1)
        for i in torch.linspace(0, length(own) - 1, most).long().tolist():
            x, y = own[i]
            inputs.append(x)
            labels.append(torch.as_tensor(y))
    tensors = all(isinstance(x, Tensor) for x in inputs)
    return (torch.stack(inputs) if tensors and inputs else None), torch.stack(labels)


def is_meant(args: Sequence[str]) -> bool:
    """Whether a command line exports a checkpoint alone: it gives a checkpoint, and neither configuration nor model."""
    given = {word.partition("=")[0] for word in args}
    configured = {"-c", "--config", "-h", "--help", "--print_config"} | {n for n in given if n.startswith("--model")}
    return args[:1] == ["export"] and "--ckpt_path" in given and not given & configured


def command(args: Sequence[str]) -> None:
    """Export what a checkpoint holds; see :meth:`ExportingTrainer.export`.

    Args:
        args: of the command line, after ``export``.

    Raises:
        ValueError: if an argument is wrong, or the checkpoint cannot be exported.
    """
    parser = Parser("sparsecl export", description="Export a trained network.")
    parser.add_argument("--ckpt_path", required=True, metavar="FILE", help="a checkpoint of a run")
    parser.add_argument(
        "--output", default="model.pt2", metavar="FILE", help="the file, .pt2, .spnet or .onnx (model.pt2)"
    )
    parser.add_argument("--task", type=int, metavar="TASK", help="answer among its classes alone, counted from 0")
    parser.add_argument("--values", default="float32", help="type of the weights (float32)")
    given = parser.parse_args(args)
    _refuse_ending(given.output)
    checkpoint = read_checkpoint(given.ckpt_path)
    if "arguments" not in checkpoint:
        raise ValueError(
            f"checkpoint {given.ckpt_path}: it does not say how its network was built; give the run's configuration, -c"
        )
    module: scl.ContinualModule = scl.ContinualModule.load_from_checkpoint(given.ckpt_path, map_location="cpu")
    _write(module, checkpoint, given.ckpt_path, given.output, values=given.values, task=given.task)


def _refuse_ending(output: str) -> None:
    if not output.endswith(ENDINGS):
        raise ValueError(f"export(output={output!r}): the ending says what is written: {', '.join(ENDINGS)}")


def _write(
    model: pl.LightningModule, checkpoint: Mapping[str, Any], ckpt_path: str, output: str, **options: Any
) -> None:
    inputs = checkpoint["built_for"]["inputs"]
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        raise ValueError(
            f"export: {ckpt_path} is of a network that takes {in_words(described(inputs))}; what can be exported "
            "takes one tensor of floats"
        )
    print(f"{output}: {scl.export_model(model, output, inputs.shape[1:], **options):,} bytes")
