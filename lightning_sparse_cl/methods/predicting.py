"""Predictions for raw images: a module knows what its training's images were made into, and its classes by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_sparse_cl.callbacks.trainer_parts import parts_of
from lightning_sparse_cl.data.datamodule import TaskDataModule
from lightning_sparse_cl.data.description import DataDescription
from lightning_sparse_cl.data.raw_images import RawImages, as_stored

DESCRIPTION = "data_description"
"""Entry of a checkpoint: what is known of the data, as primitives."""


class Prediction(NamedTuple):
    """What an image is taken for."""

    name: str
    """Of the class."""
    probability: float
    """Of the class among all classes, in 0-1."""
    task: int | None
    """The task that has the class, counted from 0. If several tasks have it, None."""


class PredictsImages(pl.LightningModule):
    """Base of modules that answer for raw images, after a fit or out of a checkpoint."""

    data_description: DataDescription | None = None
    """What is known of the data of the latest fit. If there was none yet, None."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._describe_data()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self._trainer is not None and self._trainer.state.fn == "fit":
            self._describe_data()  # tasks may have come since
        if self.data_description is not None:
            checkpoint[DESCRIPTION] = self.data_description.to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if DESCRIPTION in checkpoint:
            self.data_description = DataDescription.from_dict(checkpoint[DESCRIPTION])

    def _describe_data(self) -> None:
        data = parts_of(self.trainer).datamodule
        if isinstance(data, TaskDataModule):
            self.data_description = data.description()

    def prepare_images(self, images: RawImages, transform: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Raw images as network input (N, C, H, W): converted, resized and normalised as the training's were.

        Args:
            images: uint8 (N, C, H, W), or a list of images (C, H, W), PIL images or paths, of any sizes and modes; or
                one PIL image or path.
            transform: from stored images (N, C, H, W) to network input. If None, the training's normalisation.

        Raises:
            ValueError: if the module was never trained, an image cannot be read or converted, or the training had a
                transform of its own and none is given.
        """
        known = self._known()
        transform = transform or known.transform()
        if transform is None:
            raise ValueError(
                f"{type(self).__name__}: the data it was trained on had a transform of their own; give transform=..."
            )
        weight = next(self.parameters())
        return transform(as_stored(images, known).to(weight.device)).to(weight.dtype)

    @torch.no_grad()
    def predict_images(
        self, images: RawImages, transform: Callable[[Tensor], Tensor] | None = None, batch_size: int = 64
    ) -> list[Prediction]:
        """The class of each raw image, out of all classes.

        Where each task has a subnetwork, all of them are asked, and the task is that of the winning class.

        Args:
            images, transform: see :meth:`prepare_images`.
            batch_size: images that are read and sent through the network at a time.

        Raises:
            ValueError: as for :meth:`prepare_images`.
        """
        known, was_training = self._known(), self.training
        if isinstance(images, str | os.PathLike) or hasattr(images, "getbands"):
            images = [images]
        self.eval()
        found: list[Prediction] = []
        try:
            for start in range(0, len(images), batch_size):
                batch = images[start : start + batch_size]
                logits = self(self.prepare_images(batch, transform))[:, : len(known.class_names)]
                best = logits.float().softmax(1).max(1)
                found += [
                    Prediction(known.class_names[label], probability, known.task_of(label))
                    for probability, label in zip(best.values.tolist(), best.indices.tolist(), strict=True)
                ]
        finally:
            self.train(was_training)
        return found

    def _known(self) -> DataDescription:
        if self.data_description is None:
            raise ValueError(
                f"{type(self).__name__}: it does not know its classes and what images are made into; train it, or load "
                "a checkpoint of this version"
            )
        return self.data_description
