"""Predictions: a module knows how its training samples were prepared, and its classes by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_sparse_cl.callbacks.trainer_parts import parts_of
from lightning_sparse_cl.data.datamodule import TaskDataModule
from lightning_sparse_cl.data.description import DataDescription
from lightning_sparse_cl.data.raw_images import RawImages, as_stored
from lightning_sparse_cl.nests import (
    Nest,
    as_nest,
    described,
    each,
    in_words,
    is_image,
    moved,
    named,
    refuse_other_kind,
    rows,
    split,
)

DESCRIPTION = "data_description"
"""Entry of a checkpoint: what is known of the data, as primitives."""


class Prediction(NamedTuple):
    """The answer for one sample."""

    name: str
    """Name of the class."""
    probability: float
    """Probability of the class among all classes, in 0-1."""
    task: int | None
    """The task that has the class, counted from 0. None if several tasks have it."""


Answer = Prediction | list[Prediction] | dict[str, float] | Tensor
"""The answer for one sample: its class; for several labels, those whose probability is above one half, the most
probable first; real numbers by their names; or a map (H, W) of class labels."""


class PredictsImages(pl.LightningModule):
    """Base of modules that answer for raw images and other samples, after a fit or out of a checkpoint."""

    data_description: DataDescription | None = None
    """What is known of the data of the latest fit. None before the first."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._describe_data()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self._trainer is not None and self._trainer.state.fn == "fit":
            self._describe_data()  # tasks may have been added since
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
        """Raw images as network input (N, C, H, W): converted, resized and normalised as in training.

        Args:
            images: uint8 (N, C, H, W), or a list of images (C, H, W), PIL images or paths, of any sizes and modes; or
                one PIL image or path.
            transform: from stored images (N, C, H, W) to network input. If None, the normalisation of training.

        Raises:
            ValueError: if the module was never trained, an image cannot be read or converted, or training had a
                transform of its own and none is given.
        """
        known = self._known()
        if not is_image(known.layout):
            kinds = in_words(described(known.layout))
            raise ValueError(f"{type(self).__name__}: it was trained on {kinds}, no images; use predict_samples")
        return self._prepared(as_stored(images, known), transform)

    @torch.no_grad()
    def predict_images(
        self, images: RawImages, transform: Callable[[Tensor], Tensor] | None = None, batch_size: int = 64
    ) -> list[Answer]:
        """The class of each raw image, out of all classes; for other targets see :data:`Answer`.

        If each task has a subnetwork, all of them are asked, and the winning class decides the task.

        Args:
            images, transform: see :meth:`prepare_images`.
            batch_size: how many images are read and sent through the network at a time.

        Raises:
            ValueError: as for :meth:`prepare_images`.
        """
        if isinstance(images, str | os.PathLike) or hasattr(images, "getbands"):
            images = [images]
        batches = (images[i : i + batch_size] for i in range(0, len(images), batch_size))
        return self._predictions(self.prepare_images(batch, transform) for batch in batches)

    @torch.no_grad()
    def predict_samples(
        self, stored: Nest, transform: Callable[[Nest], Nest] | None = None, batch_size: int = 64
    ) -> list[Answer]:
        """The class of each of N samples of any kind, out of all classes; for other targets see :data:`Answer`.

        Args:
            stored: N samples, stored as the training samples were: a tensor (N, ...), or a dict or tuple of tensors.
            transform: from a stored batch to network input. If None, the normalisation of training.
            batch_size: how many samples are sent through the network at a time.

        Raises:
            ValueError: if the samples are of another kind than the training samples; and as for :meth:`prepare_images`.
        """
        name, known = type(self).__name__, each(lambda tensor: tensor.new_empty(tensor.shape[1:]), self._known().layout)
        stored = as_nest(stored, name)
        if batch_size < 1:
            raise ValueError(f"{name}.predict_samples(batch_size={batch_size}): a batch has at least one sample")
        counts = {key: len(tensor) if tensor.ndim else 0 for key, tensor in named(stored).items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"{name}: every tensor has the N samples in its first dimension, got {counts}")
        if not any(counts.values()):
            return []
        refuse_other_kind(f"{name}: samples", rows(stored, 0), "the training's", known)
        return self._predictions(self._prepared(batch, transform) for batch in split(stored, batch_size))

    def _prepared(self, stored: Nest, transform: Callable[[Nest], Nest] | None) -> Nest:
        stored = stored if transform is None else each(Tensor.clone, stored)  # it may change its input in place
        transform = transform or self._known().transform()
        if transform is None:
            raise ValueError(
                f"{type(self).__name__}: the data it was trained on had a transform of their own; give transform=..."
            )
        weight = next(self.parameters())
        x = transform(moved(stored, weight.device))
        return each(lambda tensor: tensor.to(weight.dtype) if tensor.is_floating_point() else tensor, x)

    def _predictions(self, batches: Iterable[Nest]) -> list[Answer]:
        known, was_training = self._known(), self.training
        self.eval()
        found: list[Answer] = []
        try:
            for x in batches:
                found += _answers(self(x)[:, : len(known.class_names)].float(), known)
        finally:
            self.train(was_training)
        return found

    def _known(self) -> DataDescription:
        if self.data_description is None:
            raise ValueError(
                f"{type(self).__name__}: it does not know its classes and how images are prepared; train it, or load "
                "a checkpoint of this version"
            )
        return self.data_description


def _answers(outputs: Tensor, known: DataDescription) -> list[Answer]:
    """The answers of outputs (B, C, ...), one per sample."""
    names = known.class_names
    if known.target == "real_numbers":
        return [dict(zip(names, numbers, strict=True)) for numbers in outputs.tolist()]
    if known.target == "class_maps":
        return list(outputs.argmax(1))
    if known.target == "multi_label":
        return [
            [
                Prediction(names[label], probabilities[label], known.task_of(label))
                for label in sorted(range(len(names)), key=lambda label: -probabilities[label])
                if probabilities[label] > 0.5
            ]
            for probabilities in outputs.sigmoid().tolist()
        ]
    best = outputs.softmax(1).max(1)
    return [
        Prediction(names[label], probability, known.task_of(label))
        for probability, label in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
