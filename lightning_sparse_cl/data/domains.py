"""One problem seen through changing inputs: the same labels in every task, pixels permuted or images rotated."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sparse_cl.data.loader import SampleTensors
from lightning_sparse_cl.data.source_tasks import SourceTasks
from lightning_sparse_cl.data.sources import DigitsSource, MNISTSource, Source


class Permuted(SourceTasks):
    """Every task is the whole source with pixels in another fixed order (Goodfellow et al., 2014); task 0 is unchanged.

    The tasks share their labels. Nothing is augmented: permuted pixels have no neighbours.

    Args:
        source: the images.
        num_tasks: length of the sequence.
        seed: seed of the permutations.
        kwargs: see :class:`TaskDataModule`.
    """

    def __init__(self, source: Source, num_tasks: int = 5, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(source, num_tasks, **kwargs)
        self.augment = False
        self.seed = seed

    def permutation(self, task: int, pixels: int) -> Tensor:
        """Which of the H*W pixels a task has at each place; the same in all channels."""
        order = np.random.RandomState([self.seed, task]).permutation(pixels) if task else np.arange(pixels)
        return torch.from_numpy(order)

    def divide(self, images: Tensor, labels: Tensor) -> list[SampleTensors]:
        pixels = images.flatten(2)
        orders = [self.permutation(t, pixels.shape[2]) for t in range(self.planned)]
        return [SampleTensors(pixels[:, :, order].view_as(images), labels) for order in orders]


class Rotated(SourceTasks):
    """Every task is the whole source, turned further each time, from 0 to ``max_angle`` (Lopez-Paz and Ranzato, 2017).

    The tasks share their labels.

    Args:
        source: the images.
        num_tasks: length of the sequence.
        max_angle: angle of the last task, in degrees, counter-clockwise; the others are evenly spaced.
        kwargs: see :class:`TaskDataModule`.
    """

    def __init__(self, source: Source, num_tasks: int = 5, max_angle: float = 180.0, **kwargs: Any) -> None:
        super().__init__(source, num_tasks, **kwargs)
        self.angles = [t * max_angle / max(num_tasks - 1, 1) for t in range(num_tasks)]

    def divide(self, images: Tensor, labels: Tensor) -> list[SampleTensors]:
        from torchvision.transforms.functional import InterpolationMode, rotate

        def turn(angle: float) -> Tensor:  # in pieces, as it needs many times the memory of its input
            if angle == 0:
                return images
            return torch.cat([rotate(part, angle, InterpolationMode.BILINEAR) for part in images.split(4096)])

        return [SampleTensors(turn(angle), labels) for angle in self.angles]


class PermutedDigits(Permuted):
    """:class:`Permuted` :class:`DigitsSource`."""

    def __init__(self, num_tasks: int = 5, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(DigitsSource(), num_tasks, seed, **kwargs)


class PermutedMNIST(Permuted):
    """:class:`Permuted` :class:`MNISTSource`.

    Args:
        root: folder of the data.
        download: fetch what is missing.
    """

    def __init__(
        self, num_tasks: int = 10, root: str = "data", download: bool = False, seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(MNISTSource(root, download), num_tasks, seed, **kwargs)


class RotatedDigits(Rotated):
    """:class:`Rotated` :class:`DigitsSource`."""

    def __init__(self, num_tasks: int = 5, max_angle: float = 180.0, **kwargs: Any) -> None:
        super().__init__(DigitsSource(), num_tasks, max_angle, **kwargs)


class RotatedMNIST(Rotated):
    """:class:`Rotated` :class:`MNISTSource`.

    Args:
        root: folder of the data.
        download: fetch what is missing.
    """

    def __init__(
        self, num_tasks: int = 10, root: str = "data", download: bool = False, max_angle: float = 180.0, **kwargs: Any
    ) -> None:
        super().__init__(MNISTSource(root, download), num_tasks, max_angle, **kwargs)
