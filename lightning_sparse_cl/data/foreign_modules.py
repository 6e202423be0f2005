"""Other people's LightningDataModules as a task sequence: their data sets, transforms and collate functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    default_collate,
)

from lightning_sparse_cl.data.description import DataDescription
from lightning_sparse_cl.data.labels import listed_labels
from lightning_sparse_cl.data.learnt import LearntTasks
from lightning_sparse_cl.data.loader import SampleTensors, length
from lightning_sparse_cl.data.standardised import Normalisation, Standardisation
from lightning_sparse_cl.data.task_datasets import TaskDatasets
from lightning_sparse_cl.nests import Nest, as_nest, count, each, is_image, joined, layout_of_one, rows, tensors

LABELS = ("label", "labels", "target", "targets", "y")
"""Keys under which a batch that is a dict may hold labels."""
Pair = Callable[[Any], tuple[Nest, Any]]
"""From a batch, as the user's collate function makes it, to samples and labels."""


class Tasks(TaskDatasets):
    """A sequence of LightningDataModules, one per task, or a single one for one task.

    From each, the data set, collate function, batch size and number of workers of its training loader are taken, and
    the data set of its test loader, or, without one, of its validation loader; several loaders of a module make one
    task. The hooks ``on_before_batch_transfer`` and ``on_after_batch_transfer`` of the first module are called for all
    tasks, before ``transform``, with a pair of samples and zeros in place of labels; by default ``transform``
    normalises uint8 images alone. Batches are drawn by this package's sampler, so that resuming is exact, processes
    share an epoch, and samples can be removed. (As always, random draws in a data set or a hook need
    :class:`RandomState` for that.) A data set that can only be iterated is read once, into memory; a sampler that
    chooses samples (``SubsetRandomSampler``) is followed, any other is ignored, with a message. To go on after a
    sequence with ``own_classes``, also give the modules that were learnt, before the new ones.

    A batch is a pair (samples, labels), or a dict with labels under one of the keys ``label``, ``labels``, ``target``,
    ``targets`` and ``y``. A collate function is called with one item at a time: anything it does to several items, such
    as mixing them or padding to the longest, has no effect.

    Args:
        modules: the data modules, in the order of the tasks.
        pair: function from a batch to its samples and labels, if a batch is something else.
        own_classes: each data module numbers its own classes from 0, which differ from those of the modules before. If
            False, a number is the same class everywhere.
        batch_size: if None, the batch size of the first module's loader.
        num_workers: if None, the number of the first module's loader.
        in_memory: read everything once; a data set's random transforms then draw only once.
        kwargs: see :class:`TaskDatasets`, ``target`` above all, and :class:`TaskDataModule`.

    Raises:
        ValueError: if there is no data module, or one has no loader to train or test on, or its batches are of another
            kind; when a sequence goes on, if ``own_classes`` is set and the data modules do not begin with those
            learnt.
    """

    def __init__(
        self,
        modules: pl.LightningDataModule | Sequence[pl.LightningDataModule],
        pair: Pair | None = None,
        own_classes: bool = False,
        batch_size: int | None = None,
        num_workers: int | None = None,
        in_memory: bool = False,
        **kwargs: Any,
    ) -> None:
        if not isinstance(modules, pl.LightningDataModule | Sequence):
            raise ValueError(f"Tasks: LightningDataModules are expected, one per task, got {type(modules).__name__}")
        self.modules = [modules] if isinstance(modules, pl.LightningDataModule) else list(modules)
        if not self.modules or not all(isinstance(module, pl.LightningDataModule) for module in self.modules):
            kinds = ", ".join(type(module).__name__ for module in self.modules) or "nothing"
            raise ValueError(f"Tasks: LightningDataModules are expected, one per task, got {kinds}")
        empty: list[Dataset] = [SampleTensors(torch.zeros(0, 1), torch.zeros(0))] * len(self.modules)
        kwargs |= {"batch_size": 1 if batch_size is None else batch_size, "num_workers": num_workers or 0}
        super().__init__(empty, empty, in_memory, **kwargs)
        if self.target.kind != "classes" and own_classes:
            raise ValueError(f"Tasks(own_classes=True): it is for classes, and the target is {self.target.kind}")
        self.pair, self.own_classes = pair or _pair, own_classes
        self.own_batch_size, self.own_num_workers = batch_size is None, num_workers is None

    @classmethod
    def of(cls, modules: pl.LightningDataModule | Sequence[pl.LightningDataModule], **kwargs: Any) -> Tasks:
        """The sequence of these data modules; arguments as for the class."""
        return cls(modules, **kwargs)

    def prepare_data(self) -> None:
        for module in self.modules:
            module.prepare_data()

    def load(self) -> tuple[Sequence[Dataset], Sequence[Dataset]]:
        train, test = [], []
        for task, module in enumerate(self.modules):
            name = f"Tasks: task {task} ({type(module).__name__})"
            module.trainer = self.trainer
            module.setup("fit")
            loaders = _loaders(module, "train_dataloader", name)
            if not task:
                self._take_sizes(loaders[0], name)
            train.append(self._items(loaders, name))
            module.setup("test")
            tested = _loaders(module, "test_dataloader", name, "val_dataloader")
            test.append(self._items(tested, f"{name}, test"))
            if _hooks_of(module) != _hooks_of(self.modules[0]):
                rank_zero_warn(f"{name}: the hooks of the first data module are called for it, in place of its own")
        if self.own_classes:
            train, test = _numbered_apart(train, test)
        self.given = {"train": train, "test": test}
        return super().load()

    def _load(self, learnt: LearntTasks | None, by_classes: bool = False) -> None:
        super()._load(learnt, by_classes)
        if self.own_classes and self.learnt is not None and self.num_tasks > len(self.modules):
            self.unload()
            raise ValueError(
                "Tasks(own_classes=True): classes are numbered from 0 on, and these data modules do not begin with "
                "those of the tasks that were learnt; give all of them in their order, or own_classes=False and "
                "numbers of your own"
            )

    def prepare(self, x: Nest, augment: bool = True) -> Nest:
        module = self.modules[0]  # one network serves all tasks, and so do the hooks that make its input
        if hooks := _hooks_of(module):
            batch: Any = (each(Tensor.clone, x), torch.zeros(count(x), dtype=torch.long, device=tensors(x)[0].device))
            module.trainer = cast(Any, _Told(self.trainer, augment))
            try:
                for hook in hooks:
                    batch = getattr(module, hook)(batch, 0)
                x, _ = batch
            except Exception as error:  # a user's hook
                raise ValueError(
                    f"Tasks: {type(module).__name__}.{hook} is given a pair (samples, zeros in place of labels) and "
                    f"returns one; it raised {type(error).__name__}: {error}"
                ) from error
            finally:
                module.trainer = self.trainer
        return super().prepare(x, augment)

    def _normalised(self, data: Dataset, crop: int = 0, flip: bool = False) -> Normalisation:
        """Normalises uint8 images as usual; anything else stays as the data modules' own transforms have made it."""
        stored = layout_of_one(data[0][0])
        if is_image(stored) and stored.dtype == torch.uint8 and not _hooks_of(self.modules[0]):
            return super()._normalised(data, crop, flip)
        self._computed_transform = Standardisation()
        return self._computed_transform

    def description(self) -> DataDescription:
        """As usual, but without the normalisation if hooks may do more."""
        found = super().description()
        return replace(found, mean=None, std=None) if _hooks_of(self.modules[0]) else found

    def _take_sizes(self, loader: Any, name: str) -> None:
        if self.own_batch_size:
            owners = (loader, getattr(loader, "batch_sampler", None))
            size = next(filter(None, (getattr(owner, "batch_size", None) for owner in owners)), None)
            if not size:
                raise ValueError(f"{name}: its loader has no batch_size; give Tasks.of(..., batch_size=...)")
            self.batch_size = int(size)
        if self.own_num_workers:
            self.num_workers = int(getattr(loader, "num_workers", 0))

    def _items(self, loaders: Sequence[Any], name: str) -> Dataset:
        found = [self._one(loader, name) for loader in loaders]
        return found[0] if len(found) == 1 else ConcatDataset(found)

    def _one(self, loader: Any, name: str) -> Dataset:
        data = getattr(loader, "dataset", None)
        if not isinstance(loader, DataLoader) or isinstance(data, IterableDataset):
            batches = [_made(self.pair, batch, name) for batch in cast(Iterable[Any], loader)]
            if not batches:
                raise ValueError(f"{name}: its loader gives no batch")
            if any(isinstance(y, list) for _, y in batches):
                raise ValueError(f"{name}: labels that are names need a data set with a length; use numbers")
            inputs, labels = joined([x for x, _ in batches]), torch.cat([y for _, y in batches])
            rank_zero_info(f"{name}: its data can only be iterated, and are read into memory: {len(labels)} samples")
            return SampleTensors(inputs, labels, self.target)
        own = loader.batch_sampler
        sampler = own.sampler if type(own) is BatchSampler else loader.sampler
        if isinstance(sampler, SubsetRandomSampler):
            data = Subset(cast(Dataset, data), list(sampler.indices))
        for one in (sampler, own):
            if not _draws_all_once(one, data):
                rank_zero_warn(f"{name}: its {type(one).__name__} is not used; every sample is drawn once per epoch")
        return Collated(data, loader.collate_fn or default_collate, self.pair, name)


def _draws_all_once(sampler: Any, data: Any) -> bool:
    """Whether an epoch of a sampler has every sample once, as with this package's."""
    if isinstance(sampler, RandomSampler):
        return not sampler.replacement and sampler.num_samples == length(data)
    return sampler is None or type(sampler) in (BatchSampler, SequentialSampler, SubsetRandomSampler)


class Collated(Dataset):
    """Pairs (sample, label) of a data set: each item is collated as a batch of its own.

    Args:
        data: the data set.
        collate: function from a list of items to a batch.
        pair: function from a batch to samples and labels.
        name: for errors.
    """

    def __init__(self, data: Any, collate: Callable[[list[Any]], Any], pair: Pair, name: str) -> None:
        self.data, self.collate, self.pair, self.name = data, collate, pair, name
        usual = collate is default_collate and pair is _pair  # otherwise labels may be changed
        self.targets = listed_labels(data) if usual else None

    def __len__(self) -> int:
        return length(self.data)

    def __getitem__(self, index: int) -> tuple[Nest, Any]:
        try:
            batch = self.collate([self.data[index]])
        except IndexError:  # ends an iteration
            raise
        except Exception as error:  # a user's data set or function
            raise ValueError(f"{self.name}: item {index} raised {type(error).__name__}: {error}") from error
        inputs, labels = _made(self.pair, batch, self.name)
        return rows(inputs, 0), labels[0]


class _Shifted(Dataset):
    """The same pairs with labels that begin at ``first``."""

    def __init__(self, data: Any, first: int) -> None:
        self.data, self.first = data, first
        listed = listed_labels(data)
        self.targets = None if listed is None else listed + first

    def __len__(self) -> int:
        return length(self.data)

    def __getitem__(self, index: int) -> tuple[Nest, Tensor]:
        sample, label = self.data[index]
        return sample, label + self.first


class _Told:
    """A trainer that says whether a batch is for training, for hooks that augment."""

    def __init__(self, trainer: pl.Trainer | None, training: bool) -> None:
        self._trainer, self.training = trainer, training

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


def _pair(batch: Any) -> tuple[Nest, Any]:
    """Samples and labels of a batch in one of the usual forms."""
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, Mapping):
        found = [key for key in LABELS if key in batch]
        if len(found) == 1:
            rest = {key: value for key, value in batch.items() if key != found[0]}
            return next(iter(rest.values())) if len(rest) == 1 else rest, batch[found[0]]
    kind = f"a dict of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
    kind += f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
    raise ValueError(
        f"a batch is a pair (samples, labels), or a dict in which labels are one of {', '.join(LABELS)}, got {kind}; "
        "give pair=..., a function from a batch to the two"
    )


def _made(pair: Pair, batch: Any, name: str) -> tuple[Nest, Any]:
    """Samples and labels of a batch, as tensors; labels may be a list of names."""
    try:
        given, labelled = pair(batch)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    except Exception as error:  # a user's function
        raise ValueError(f"{name}: pair raised {type(error).__name__}: {error}") from error
    inputs = as_nest(given, f"{name}: samples")
    if isinstance(labelled, tuple | list) and labelled and all(isinstance(label, str) for label in labelled):
        return inputs, list(labelled)
    labels = as_nest(labelled, f"{name}: labels")
    if not isinstance(labels, Tensor) or not labels.ndim:
        raise ValueError(f"{name}: labels of a batch are one tensor (B, ...), got {type(labelled).__name__}")
    return inputs, labels


def _loaders(module: pl.LightningDataModule, hook: str, name: str, otherwise: str | None = None) -> list[Any]:
    """What a hook of a data module returns, or else the hook ``otherwise``, as a list of loaders."""
    for called in filter(None, (hook, otherwise)):
        if getattr(type(module), called) is getattr(pl.LightningDataModule, called) and called not in vars(module):
            continue
        found = getattr(module, called)()
        loaders = list(found.values()) if isinstance(found, Mapping) else found
        loaders = list(loaders) if isinstance(loaders, tuple | list) else [loaders]
        if loaders and all(loader is not None for loader in loaders):
            return loaders
    wanted = f"{hook}() or {otherwise}()" if otherwise else f"{hook}()"
    raise ValueError(f"{name}: it has no loader; {wanted} gives one")


def _hooks_of(module: pl.LightningDataModule) -> list[str]:
    """The hooks of a data module that change batches."""
    names = ("on_before_batch_transfer", "on_after_batch_transfer")
    return [name for name in names if getattr(type(module), name) is not getattr(pl.LightningDataModule, name)]


def _numbered_apart(train: list[Dataset], test: list[Dataset]) -> tuple[list[Dataset], list[Dataset]]:
    """The data sets with labels that follow the labels of the tasks before."""
    first = 0
    moved: tuple[list[Dataset], list[Dataset]] = ([], [])
    for pair in zip(train, test, strict=True):
        for sets, data in zip(moved, pair, strict=True):
            sets.append(_Shifted(data, first))
        labels = [label for data in pair for label in _labels_in(data)]
        if any(isinstance(label, str) for label in labels):
            raise ValueError("Tasks(own_classes=True): it is for numbers; names already say which classes are the same")
        first += 1 + max(int(label) for label in labels)
    return moved


def _labels_in(data: Any) -> Iterable[Any]:
    listed = listed_labels(data)
    return listed.tolist() if listed is not None else (data[i][1] for i in range(len(data)))
