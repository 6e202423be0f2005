"""Checks of all tasks before any is trained, as one network serves them all."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from lightning_sparse_cl.data.items import Items
from lightning_sparse_cl.data.loader import SampleTensors, length
from lightning_sparse_cl.nests import Nest, is_image, is_padded, layout_of_one, named, refuse_other_kind, rows

Part = SampleTensors | Items
"""The training or test set of a task, in one of the forms that tasks may have."""


def refuse_empty(name: str, train: Sequence[Dataset], test: Sequence[Dataset], every: bool = True) -> None:
    """Refuse tasks without training or test samples.

    Args:
        name: for the error.
        train, test: data sets, one per task.
        every: if False, a task may have no training samples: it was learnt before.
    """
    for part, sets in {"training": train, "test": test}.items():
        for t, data in enumerate(sets):
            if not length(data) and (every or part == "test"):
                raise ValueError(f"{name}: task {t} has no {part} samples")


def check_samples(name: str, train: Sequence[Part], test: Sequence[Part]) -> None:
    """Refuse samples unless keys, shapes and types agree in all tasks, values are finite, and images have one range.

    Of items that are not in memory, eight per set are read, evenly spaced.

    Raises:
        ValueError: in one line, with the task.
    """
    first = _example(train[0])
    refuse_odd_types(name, layout_of_one(first))
    images = is_image(layout_of_one(first))
    if images:
        refuse_channels_last(name, tuple(first.shape), first.dtype, batch=isinstance(train[0], SampleTensors))
    before: tuple[str, Tensor] | None = None  # the latest training images that are not all zero
    for task, pair in enumerate(zip(train, test, strict=True)):
        for data, part in zip(pair, ("training", "test"), strict=True):
            refuse_other_kind(f"{name}: {part} samples of task {task}", _example(data), "those of task 0", first)
            if isinstance(data, SampleTensors):
                for key, tensor in named(data.inputs).items():
                    _refuse_not_finite(f"{name}: task {task}, {part} sample", tensor, f", {key!r}," if key else "")
                if is_padded(data.inputs):
                    lengths, most = data.inputs["length"], data.inputs["series"].shape[2]
                    if (wrong := lengths[(lengths < 1) | (lengths > most)]).numel():
                        raise ValueError(
                            f"{name}: task {task}, {part} samples: the length {wrong[0].item()} of a series of {most} "
                            f"steps; lengths are 1 to {most}"
                        )
            if not images:
                continue
            sample = f"the {part} images of task {task}", _sample(data)
            if before is not None:
                refuse_other_range(name, before, sample)
            if part == "training" and (before is None or sample[1].any()):
                before = sample


def refuse_odd_types(name: str, layout: Nest) -> None:
    """Raise ValueError, naming ``name``, if samples are (C, H, W) but not images, or are complex."""
    for key, tensor in named(layout).items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if not key and tensor.ndim == 4 and not is_image(tensor):
            raise ValueError(f"{name}: images are uint8 or float, got {kind}")
        if tensor.is_complex():
            raise ValueError(f"{name}: {f'{key!r} of the ' if key else ''}samples are real numbers, got {kind}")


def refuse_channels_last(name: str, shape: Sequence[int], dtype: torch.dtype, batch: bool) -> None:
    """Refuse images (H, W, C), which look like images of H channels, one, three or four pixels wide.

    Args:
        name: for the error.
        shape: three sizes, which should be (C, H, W).
        dtype: type of the images.
        batch: whether the remedy is for a batch (N, C, H, W), or else for an image.
    """
    height, width, last = shape
    square, pixel = height == width, dtype == torch.uint8 or last == 3
    if last in (1, 3, 4) and min(height, width) > last and (square or (pixel and min(height, width) > 4)):
        order = "0, 3, 1, 2" if batch else "2, 0, 1"
        raise ValueError(
            f"{name}: images are (C, H, W); those of shape {tuple(shape)} seem to be (H, W, C), use .permute({order})"
        )


def refuse_other_range(name: str, one: tuple[str, Tensor], other: tuple[str, Tensor]) -> None:
    """Refuse two sets of images unless they are on one scale.

    They are not if the largest absolute values of a typical image (the median over images) differ by more than a factor
    of 10, as those of images in 0-1 and in 0-255 do. Outliers, dark images and sparse pixels do not matter. Sets of
    mostly zero images fit any scale.

    Args:
        name: for the error.
        one, other: what the images are called, and the images, of which at most 200 are examined.
    """
    (called, images), (named, others) = one, other
    peak, peak_of_others = (float(_spaced(x).float().abs().flatten(1).amax(1).median()) for x in (images, others))
    low, high = sorted((peak, peak_of_others))
    if 0 < 10 * low < high < inf:  # values that are not finite are refused elsewhere, by sample
        raise ValueError(
            f"{name}: the values of {called} go up to {peak:.4g}, those of {named} to {peak_of_others:.4g}; bring them "
            "to one range"
        )


def check_labels(name: str, train: Sequence[Sequence[int]], test: Sequence[Sequence[int]]) -> None:
    """Refuse negative labels, which often mark samples without a label, and labels that are tested but not learnt.

    Args:
        name: for errors.
        train, test: labels that occur in each task.

    Raises:
        ValueError: in one line, with the task.
    """
    learnt = set().union(*train)
    for task, labels in enumerate(map(set.union, map(set, train), map(set, test))):
        if min(labels, default=0) < 0:
            raise ValueError(f"{name}: task {task} has the label {min(labels)}; labels count from 0")
        if unknown := set(test[task]) - learnt:
            raise ValueError(f"{name}: task {task} is tested on the label {min(unknown)}, which no training sample has")


def warn_of_untested(
    name: str, train: Sequence[Sequence[int]], test: Sequence[Sequence[int]], class_names: Sequence[str]
) -> None:
    """Warn of classes that a task trains but does not test. Arguments as for :func:`check_labels`."""
    for task, (learnt, tested) in enumerate(zip(train, test, strict=True)):
        if missing := sorted(set(learnt) - set(tested)):
            names = ", ".join(repr(class_names[c]) for c in missing[:5]) + ", ..." * (len(missing) > 5)
            rank_zero_warn(f"{name}: task {task} has no test samples of {len(missing)} of its classes: {names}")


def _example(data: Part) -> Nest:
    return rows(data.inputs, 0) if isinstance(data, SampleTensors) else data.first


def _sample(data: Part) -> Tensor:
    """Images (n, C, H, W), evenly spaced; at most 8 are read."""
    if isinstance(data, SampleTensors):
        return _spaced(data.inputs)
    n = min(len(data), 8)
    return torch.stack([data[i * len(data) // n][0] for i in range(n)])


def _spaced(images: Tensor) -> Tensor:
    """At most 200 images, evenly spaced."""
    n = min(len(images), 200)
    return images[torch.arange(n, device=images.device) * len(images) // n]


def _refuse_not_finite(where: str, values: Tensor, key: str) -> None:
    if not values.is_floating_point() or not values.numel():
        return
    if not all(bool(v.isfinite()) for v in values.aminmax()):  # one pass, no copy
        first = next(i for i, value in enumerate(values) if not value.isfinite().all())
        raise ValueError(f"{where} {first}{key} has values that are NaN or infinite")
