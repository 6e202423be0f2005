"""Data sets in memory, and a sampler and loader that shrink with the data and resume inside an epoch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence, Sized
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, DistributedSampler, get_worker_info

from lightning_sparse_cl.data.targets import KINDS, Target
from lightning_sparse_cl.nests import Nest, as_nest, each, gathered, joined, moved, named, rows, tensors


class SampleTensors(Dataset):
    """Samples and their labels in memory; whole batches are gathered at once.

    Args:
        inputs: N samples: a tensor (N, ...), such as images (N, C, H, W), or a dict, tuple or list of tensors.
        labels: (N, ...), in the target's form; for classes whole numbers (N,).
        target: what labels are.

    Raises:
        ValueError: if the lengths differ, or labels are not what the target expects.
    """

    def __init__(self, inputs: Nest, labels: Tensor, target: Target = KINDS["classes"]) -> None:
        inputs, labels, alone = as_nest(inputs, "SampleTensors"), torch.as_tensor(labels), target is KINDS["classes"]
        for key, tensor in named(inputs).items():
            if not tensor.ndim or not labels.ndim or len(labels) != len(tensor) or (alone and labels.ndim > 1):
                raise ValueError(
                    f"SampleTensors: {f'{key!r} of the ' if key else ''}samples are (N, ...) and labels "
                    f"{'(N,)' if alone else '(N, ...)'}, got "
                    f"{tuple(tensor.shape)} and {tuple(labels.shape)}"
                )
        self.inputs = each(Tensor.detach, inputs)
        self.labels = target.labels(labels, "SampleTensors").to(tensors(inputs)[0].device)
        self.target = target

    def to(self, device: torch.device) -> SampleTensors:
        self.inputs, self.labels = moved(self.inputs, device), self.labels.to(device)
        return self

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Nest, Tensor]:
        return rows(self.inputs, index), self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Nest, Tensor]:
        at = torch.tensor(indices).to(self.labels.device, non_blocking=True)
        return gathered(self.inputs, at), self.labels[at]


class TaskSampler(DistributedSampler):
    """Shuffled order of the samples still alive, split over processes; a new order every epoch, the same on resume.

    A ``DistributedSampler`` in one process too, so that Lightning never replaces it.

    Args:
        alive: indices (n,) into the data set.
    """

    def __init__(self, alive: Tensor, num_replicas: int, rank: int, seed: int) -> None:
        super().__init__(
            alive,  # type: ignore[arg-type]  # torch's types require a Dataset; only its length is read
            num_replicas,
            rank,
            shuffle=True,
            seed=seed,
            drop_last=True,
        )
        self.alive = alive
        self.skip = 0
        self._order: tuple[int, Tensor] | None = None

    def order(self) -> Tensor:
        """Indices of this epoch's samples on this rank."""
        if self._order is None or self._order[0] != self.epoch:
            self._order = self.epoch, self.alive[torch.tensor(list(super().__iter__()), dtype=torch.long)]
        return self._order[1]

    def __iter__(self) -> Iterator[int]:
        return iter(self.order()[self.skip :].tolist())


class StreamSampler(TaskSampler):
    """Blocks of samples one after the other, as a stream brings them, in a random order within each block.

    Args:
        alive: indices into the data set, (n,), in ascending order.
        ends: where each block ends, in ascending order: the first index after it.
    """

    def __init__(self, alive: Tensor, num_replicas: int, rank: int, seed: int, ends: Sequence[int]) -> None:
        super().__init__(alive, num_replicas, rank, seed)
        self.ends = ends

    def order(self) -> Tensor:
        if self._order is None or self._order[0] != self.epoch:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            blocks = self.alive.tensor_split(torch.searchsorted(self.alive, torch.tensor(self.ends[:-1])))
            drawn = torch.cat([block[torch.randperm(len(block), generator=generator)] for block in blocks])
            self._order = self.epoch, drawn[: self.total_size][self.rank :: self.num_replicas]
        return self._order[1]


class ShareSampler(DistributedSampler):
    """Gives every index to exactly one process, in order and without repetition, as an exact evaluation needs."""

    def __init__(self, indices: Tensor, num_replicas: int, rank: int) -> None:
        super().__init__(
            indices,  # type: ignore[arg-type]  # as above
            num_replicas,
            rank,
            shuffle=False,
        )
        self.share = indices[rank::num_replicas].tolist()

    def __iter__(self) -> Iterator[int]:
        return iter(self.share)

    def __len__(self) -> int:
        return len(self.share)


class DrawnByBatch(Dataset):
    """A data set whose random draws in a worker process follow from the epoch and the batch alone.

    After a resume in the middle of an epoch, a worker then draws as if it had run from the start of the epoch.
    """

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return length(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]

    def __getitems__(self, indices: list[int]) -> Any:
        worker = get_worker_info()
        if worker is not None:
            seed = worker.seed - worker.id + 1_000_003 * indices[0]  # the epoch's, and the batch's first index
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed % 2**63)
        together = getattr(self.data, "__getitems__", None)
        return [self.data[i] for i in indices] if together is None else together(indices)


class TaskLoader(DataLoader):
    """A ``DataLoader`` whose position in the epoch is part of the checkpoint (Lightning saves and restores it)."""

    batch_size: int
    sampler: TaskSampler
    _seen = 0
    _first = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator is no _BaseDataLoaderIter
        # A generator because the order is drawn at the first batch, when Lightning has told the sampler the epoch.
        first, self._first = self._first, 0
        self.sampler.skip = first * self.batch_size
        for self._seen, batch in enumerate(super().__iter__(), first + 1):
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"seen": self._seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._first = self._seen = state["seen"]


def length(data: Dataset) -> int:
    """Number of items. Torch's ``Dataset`` does not declare ``__len__``."""
    return len(cast(Sized, data))


def collate(batch: Any) -> Any:
    """Batches of ``SampleTensors`` come gathered; others are lists of items."""
    if isinstance(batch, tuple):
        return batch
    samples, labels = zip(*batch, strict=True)
    if isinstance(samples[0], Tensor):
        return torch.utils.data.default_collate(batch)
    return each(lambda *parts: torch.stack(parts), *samples), torch.utils.data.default_collate(list(labels))


def union(sets: Sequence[Dataset]) -> Dataset:
    """All samples of several data sets; in memory if those are."""
    held = [d for d in sets if isinstance(d, SampleTensors)]
    if len(held) == len(sets):
        labels = torch.cat([d.labels for d in held])
        return SampleTensors(joined([d.inputs for d in held]), labels, held[0].target)
    return ConcatDataset(sets)
