"""Series of different lengths, padded to one length; and the packaged Japanese vowels."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sparse_cl.data.sources import Source
from lightning_sparse_cl.nests import Nest


def padded(series: Sequence[Any], length: int | None = None) -> dict[str, Tensor]:
    """Series (C, T_i) as one batch: ``series`` (N, C, T) float, with zeros after each end, and ``length`` (N,).

    Args:
        series: tensors or arrays.
        length: T. If None, the length of the longest series.

    Raises:
        ValueError: if one is not a series with the same channels as the others, is empty, or is longer than ``length``.
    """
    found = [torch.as_tensor(one, dtype=torch.float32) for one in series]
    if not found:
        raise ValueError("padded: a list of series is expected, got an empty one")
    for i, one in enumerate(found):
        if one.ndim != 2 or not one.numel() or len(one) != len(found[0]):
            raise ValueError(
                f"padded: series are (C, T), each of the same C and at least one step; the first is "
                f"{tuple(found[0].shape)}; series {i} is {tuple(one.shape)}"
            )
        if length is not None and one.shape[1] > length:
            raise ValueError(f"padded(length={length}): series {i} has {one.shape[1]} steps; length is at least that")
    lengths = torch.tensor([one.shape[1] for one in found])
    batch = torch.zeros(len(found), len(found[0]), int(lengths.max()) if length is None else length)
    for held, one in zip(batch, found, strict=True):
        held[:, : one.shape[1]] = one
    return {"series": batch, "length": lengths}


@dataclass(frozen=True)
class JapaneseVowelsSource(Source):
    """640 utterances of the vowels "ae" by nine speakers, who are the classes; they come with the package.

    Each is a series of 7 to 29 steps of 12 cepstral coefficients, padded to 29 steps: ``series`` (N, 12, 29) and
    ``length`` (N,). 270 are for training, 30 of each speaker, and 370 for testing.

    "Japanese Vowels", M. Kudo, J. Toyama and M. Shimbo, UCI Machine Learning Repository, 1999,
    https://doi.org/10.24432/C5NS47, CC BY 4.0; with the six digits of the copy in the UEA archive of multivariate
    series.
    """

    num_classes = 9

    def read(self, train: bool) -> tuple[Nest, Tensor]:
        with (
            resources.files(__package__).joinpath("japanese_vowels.csv.gz").open("rb") as file,
            gzip.open(file) as table,
        ):
            rows = np.loadtxt(table, delimiter=",")
        rows = rows[rows[:, 0] == train]  # columns: training or test, number of the series, speaker, coefficients
        starts = np.flatnonzero(np.diff(rows[:, 1], prepend=-1))
        series = padded([part.T for part in np.split(rows[:, 3:], starts[1:])], length=29)
        return series, torch.from_numpy(rows[starts, 2].astype(np.int64) - 1)

    def names(self) -> list[str]:
        return [f"speaker {c}" for c in range(1, 10)]
