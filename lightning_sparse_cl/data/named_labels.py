"""Labels that are names: data sets whose items say "cat" where others say 3."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import Dataset

from lightning_sparse_cl.data.labels import listed_labels
from lightning_sparse_cl.data.loader import length


class Numbered(Dataset):
    """A data set of pairs (image, name), with numbers in place of the names.

    Args:
        data: the data set.
        numbers: the number of each name.
    """

    def __init__(self, data: Dataset, numbers: dict[str, int]) -> None:
        self.data, self.numbers = data, numbers

    def __len__(self) -> int:
        return length(self.data)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, name = self.data[index]
        return image, self.numbers[str(name)]


def numbered(sets: Sequence[Dataset], known: Sequence[str] = ()) -> tuple[list[Dataset], list[str]]:
    """Replace labels that are names by numbers; if the first data set has names, all must.

    Args:
        sets: the data sets; those whose labels are not names are returned as they are.
        known: names that have the first numbers already.

    Returns:
        The data sets, and the names by number: the known ones, and then the others in alphabetical order. Empty if
        labels are not names.
    """
    if not sets or not all(map(_has_names, sets)):
        return list(sets), []
    names = list(known) + sorted({name for data in sets for name in _names(data)} - set(known))
    numbers = {name: i for i, name in enumerate(names)}
    return [Numbered(data, numbers) for data in sets], names


def _has_names(data: Any) -> bool:
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")) or not len(data):
        return False
    if listed_labels(data) is not None:  # as numbers, so that no image has to be decoded
        return False
    item = data[0]
    return isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[1], str)


def _names(data: Any) -> Iterator[str]:
    for i in range(len(data)):
        yield str(data[i][1])
