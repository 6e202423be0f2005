"""The task sequence as a LightningDataModule: it serves the current task and tests on all of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_sparse_cl.data.augment import ImageTransform
from lightning_sparse_cl.data.description import DataDescription
from lightning_sparse_cl.data.fingerprint import combined
from lightning_sparse_cl.data.learnt import Before, LearntTasks, before_this
from lightning_sparse_cl.data.loader import (
    DrawnByBatch,
    SampleTensors,
    ShareSampler,
    StreamSampler,
    TaskLoader,
    TaskSampler,
    collate,
    length,
    union,
)
from lightning_sparse_cl.data.standardised import Normalisation, Standardisation, normaliser, standardised
from lightning_sparse_cl.data.targets import KINDS, Target
from lightning_sparse_cl.data.task_sets import following, labels_of, read_tasks
from lightning_sparse_cl.nests import Nest, described, each, joined, layout_of_one, moved, rows, tensors


class TaskDataModule(pl.LightningDataModule):
    """Serves one data set per task, one after the other, within a single ``trainer.fit``.

    Batches are ``(x, y)``: x a tensor or nest of tensors (B, ...), images for example (B, C, H, W), normalised and, in
    training, augmented on the device; y (B,) in ``range(num_classes)``. Which task is served follows from the epoch
    alone: :attr:`starts` holds the first epoch of each task, and :meth:`end_task` (called by
    :class:`~lightning_sparse_cl.TaskSchedule`) ends the running one.

    * training: the current task's samples that are ``alive``;
    * validation during ``fit``: the current task's validation samples, if ``val_fraction`` > 0;
    * ``validate`` and ``test``: one loader per task.

    A subclass overrides :meth:`load`, nothing else; for data of your own see ``SplitTensors``, ``SplitImageFolder`` and
    ``TaskDatasets``.

    Args:
        batch_size: samples per batch and process. The last, smaller batch of an epoch is left out.
        val_fraction: fraction of each task's training samples set aside for validation, in [0, 1).
        augment: random crop and flip, where the data set has them; or a callable that changes a stored batch in
            training, on the device and before ``transform``, such as one of ``torchvision.transforms.v2``.
        joint: train on the union of all tasks at once (the upper bound) and test on each.
        stream: train on all tasks in one go, as with ``joint``, but in each epoch one after the other, and without
            telling the method where one ends: the task-free setting. With one epoch every sample is seen once.
        num_workers: loader processes for data that are not in memory.
        transform: from a stored batch to network input, on the device: any callable. If None, uint8 images, series and
            tables are normalised by the mean and deviation of the first task's training samples (of an evenly spaced
            sample of 2,000 if there are more), and anything else passes unchanged; see :func:`standardised`.

    Raises:
        ValueError: if an argument is out of range, or a task has no samples, or fewer training samples than a batch.
    """

    target: Target = KINDS["classes"]
    """What labels are. A subclass may set another target."""
    is_open = False
    """Whether the number of tasks is not known in advance; see :class:`OpenTasks`."""

    def __init__(
        self,
        *,
        batch_size: int = 32,
        val_fraction: float = 0.0,
        augment: bool | Callable[[Any], Any] = True,
        joint: bool = False,
        stream: bool = False,
        num_workers: int = 0,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if batch_size < 1:
            raise ValueError(f"{name}(batch_size={batch_size}): a batch has at least one sample")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"{name}(val_fraction={val_fraction}): the fraction set aside is in [0, 1)")
        if not isinstance(augment, bool) and not callable(augment):
            raise ValueError(f"{name}(augment={augment!r}): true, false, or a callable that changes batches")
        if transform is not None and not callable(transform):
            raise ValueError(f"{name}(transform={transform!r}): a callable from a stored batch to network input")
        self.train_sets: list[Dataset] = []
        self.test_sets: list[Dataset] = []
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.augment = augment
        if joint and stream:
            raise ValueError(f"{name}(joint=True, stream=True): all tasks mixed, or one after the other; not both")
        self.joint, self.stream = joint or stream, stream
        """Whether all tasks are trained on in one go; a stream brings them in their order."""
        self._ends: list[int] = []  # where each task ends in the union of all
        self.num_workers = num_workers
        self.transform = self.given_transform = self.usual_transform = transform
        self._computed_transform: Normalisation | None = None  # computed from the data when they were read
        self.starts = [0]
        """First epoch of each task begun so far, and of the next one once :meth:`end_task` has been called."""
        self.alive: list[Tensor] = []
        """For each task, the indices (n,) of the samples that are still trained on."""
        self.classes: list[list[int]] = []
        """Labels that occur in each task."""
        self.num_classes = 0
        self.class_names: list[str] = []
        """Name of each label (num_classes,): what the data call the class."""
        self.fingerprints: list[str] = []
        """For each task a digest of all its stored samples and labels, see :mod:`lightning_sparse_cl.data.fingerprint`.
        With ``joint`` there is one for everything."""
        self.layout: Nest = None
        """A batch of no samples, as they are stored: shapes and types."""
        self.labels: Tensor = torch.zeros(0, dtype=torch.long)
        """Labels of such a batch."""
        self.tested: list[int] | None = None
        """Tasks that ``validate`` and ``test`` serve; :class:`~lightning_sparse_cl.ContinualEvaluation` sets it while
        they run. If None, all."""
        self.raw: Nest = None
        """The last batch as stored, neither augmented nor normalised, which a memory keeps."""
        self.samples_per_task: list[int] = []
        """Number of training samples of each task, even if its data are no longer there."""
        self.known: LearntTasks | None = None
        """What a module had learnt when these data were read for it. None if it had learnt nothing."""
        self.learnt: LearntTasks | None = None
        """The same if this sequence goes on from it: its tasks come first. None if this is a new sequence."""
        self._asked_to_go_on = False
        self.only: set[str] | None = None
        """Fingerprints of the tasks of a checkpoint, to which an open sequence keeps. None without a checkpoint."""
        self.is_resumed = False
        """Whether the fit or test begins with a checkpoint."""
        self.left_for_later = 0
        """Number of tasks of an open sequence that have come, but are not in the checkpoint."""
        self._held_out: list[Tensor] = []
        self.order_seed = 0
        """Seed of the order of samples, and of what all processes draw alike: the run's seed, kept in the checkpoint.
        """

    def load(self) -> tuple[Sequence[Dataset], Sequence[Dataset]]:
        """The training and test data sets, one per task. Called once, in :meth:`setup`, on every process.

        Items are pairs (sample, label): samples are tensors or nests of tensors, all alike, such as images (C, H, W),
        uint8 in 0-255 or float; labels are integers from 0 on. If this method sets :attr:`class_names`, labels are
        positions in it. Otherwise the classes of all tasks are counted: their labels become 0, 1, ... in ascending
        order, and their names are the old labels as text.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what its tasks are: override load()")

    # -- the sequence ------------------------------------------------------------------------------------------

    @property
    def num_tasks(self) -> int:
        """Number of tasks to train on one after the other."""
        return len(self.train_sets)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of a stored sample that is one tensor, such as an image (C, H, W)."""
        return tuple(self.layout.shape[1:])

    @property
    def task(self) -> int:
        """The task being trained, a pure function of the trainer's epoch."""
        return min(bisect_right(self.starts, self._attached.current_epoch), self.num_tasks) - 1

    @property
    def epoch_in_task(self) -> int:
        """Number of complete epochs of the current task."""
        return self._attached.current_epoch - self.starts[self.task]

    @property
    def finished(self) -> bool:
        """True once the last task has ended."""
        return len(self.starts) > self.num_tasks

    def end_task(self) -> None:
        """Make the running epoch the last of its task. Calling it twice in an epoch does nothing more."""
        epoch = self._attached.current_epoch
        if self.starts[-1] <= epoch:
            self.starts.append(epoch + 1)

    def indices(self, batch_idx: int) -> Tensor:
        """Indices (B,) into the current task's training set of this rank's batch ``batch_idx`` of the epoch."""
        loader = cast(TaskLoader, self._attached.train_dataloader)
        return loader.sampler.order()[batch_idx * self.batch_size : (batch_idx + 1) * self.batch_size]

    def begun(self, batch_idx: int) -> int:
        """How many tasks of a stream have begun after the epoch's batch ``batch_idx``."""
        if self.epoch_in_task:  # all have come once
            return len(self._ends)
        return bisect_right(self._ends, int(self.indices(batch_idx).max())) + 1

    def live(self) -> Tensor:
        """Which classes (num_classes,) the current task has."""
        classes = sorted(set().union(*self.classes)) if self.joint else self.classes[self.task]
        live = torch.zeros(self.num_classes, dtype=torch.bool)
        live[classes] = True
        return live

    def whole(self, task: int) -> int:
        """Number of training samples of a task before any was removed: all that are not set aside for validation."""
        return length(self.train_sets[task]) - len(self._held_out[task])

    def samples(self, count: int | None = None, share: bool = True) -> Iterator[tuple[Nest, Tensor]]:
        """The current task's samples that are alive, once, in batches, not augmented.

        Args:
            count: largest number of samples, in random order: the same on every process and after a resume. If None,
                all.
            share: whether each process gets its share; otherwise each gets them all.
        """
        for x, y in self._batches(count, share):
            yield self.prepare(x, augment=False), self.target.for_loss(y)

    def stored(self, count: int | None = None) -> tuple[Nest, Tensor]:
        """All :meth:`samples` at once as they are stored, and their labels (n, ...), on every process."""
        inputs, labels = zip(*self._batches(count, share=False))
        return joined(inputs), torch.cat(labels)

    def example(self) -> Nest:
        """One sample as network input, in a batch."""
        data = next(d for d in (*self.train_sets, *self.test_sets) if length(d))
        found = self.prepare(rows(data[0][0], None), augment=False)
        if not all(isinstance(part, Tensor) for part in tensors(found)):
            raise ValueError(
                f"{type(self).__name__}(transform=...): it makes tensors of a stored batch, or nests of them, but gave "
                f"{type(found).__name__}"
            )
        return found

    def _batches(self, count: int | None, share: bool) -> Iterator[tuple[Nest, Tensor]]:
        device, alive = self._attached.strategy.root_device, self.alive[self.task]
        if count is not None:
            generator = torch.Generator().manual_seed(self.order_seed + self.task)
            alive = alive[torch.randperm(len(alive), generator=generator)[:count]]
        for x, y in self._eval_loader(self.train_sets[self.task], alive, share):
            yield moved(x, device), y.to(device)

    # -- Lightning ---------------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        fitting = stage == "fit"
        before = Before() if self.trainer is None else before_this(self.trainer, fitting, self.is_open, self.joint)
        learnt, self._asked_to_go_on, self.only, self.is_resumed = before
        if fitting or learnt is None:
            if not self.train_sets or (fitting and not self._is_for(learnt)):
                self._load(learnt)
        elif not self.train_sets or self.names_of_tasks() != learnt.names:
            self._load(learnt, by_classes=True)
        if fitting or not self.alive:
            self._begin()
        for part in (self.transform, self.augment):
            if self.trainer is not None and isinstance(part, nn.Module):
                part.to(self.trainer.strategy.root_device)

    def unload(self) -> None:
        """Forget the data sets, so that the next fit reads them anew."""
        self.train_sets, self.test_sets = [], []

    def _is_for(self, learnt: LearntTasks | None) -> bool:
        """Whether the data that were read can serve a module that has learnt these tasks, as they are."""
        if learnt is None or self._asked_to_go_on or self.learnt is not None:
            return self.known == learnt
        same = self.class_names == learnt.class_names and set(self.fingerprints) <= set(learnt.fingerprints)
        return self.known == learnt or (same and self._is_normalised_as(learnt))

    def _is_normalised_as(self, learnt: LearntTasks) -> bool:
        return isinstance(self.transform, Normalisation) and self.transform.normalisation() == learnt.normalisation

    def names_of_tasks(self) -> list[list[str]]:
        """Names of each task's classes."""
        return [[self.class_names[c] for c in classes] for classes in self.classes]

    def _load(self, learnt: LearntTasks | None, by_classes: bool = False) -> None:
        """Read the data, refuse anything that is not a task sequence, and take the sizes from the data.

        Args:
            learnt: what was learnt before.
            by_classes: whether this is only a test, and tasks are recognised by their classes; otherwise by all their
                data.
        """
        name = type(self).__name__
        self.class_names, self.known, self.learnt = [], learnt, None
        if self.transform is self._computed_transform:
            self.transform = self.usual_transform
        train, test = map(list, self.load())
        found, self.left_for_later = read_tasks(name, train, test, self.class_names, learnt, self.target), 0
        if self.only is not None:
            every, found = len(found.train), found.only(self.only)
            self.left_for_later = every - len(found.train)
        if learnt is not None:
            found, self.learnt = following(name, found, learnt, self._asked_to_go_on, self.joint, by_classes)
        self.class_names, self.classes, self.fingerprints = found.class_names, found.classes, found.fingerprints
        self.samples_per_task, self.num_classes = found.samples, len(found.class_names)
        self._ends = torch.tensor([length(data) for data in found.train]).cumsum(0).tolist()
        joined: Sequence[Dataset] = [union(found.train)] if self.joint else found.train
        if self.joint:
            order = ["stream"] if self.stream else []
            self.fingerprints, self.samples_per_task = [combined([*self.fingerprints, *order])], [sum(found.samples)]
        example = next(d for d in (*found.train, *found.test) if length(d))
        self.layout, self.labels = layout_of_one(example[0][0]), labels_of(found.test[0])[:0]
        if self.transform is None:
            self.transform = self._normalised(example)
        self._refuse_moved_maps()
        self.train_sets, self.test_sets = list(joined), list(found.test)
        if learnt is not None and learnt.normalisation is not None and not self._is_normalised_as(learnt):
            rank_zero_warn(f"{name}(transform=...): samples are not normalised like those learnt before")

    def _refuse_moved_maps(self) -> None:
        """Refuse an ``augment`` that moves pixels, as it would move them in images alone."""
        moves = isinstance(self.transform, ImageTransform) and (self.transform.crop or self.transform.flip)
        if self.target is KINDS["class_maps"] and (callable(self.augment) or (self.augment and moves)):
            raise ValueError(
                f"{type(self).__name__}(augment={self.augment!r}): it would change images, but not their maps of "
                "classes; change both inside the data set (in_memory=False), and give augment=False"
            )

    def _normalised(self, data: Dataset, crop: int = 0, flip: bool = False) -> Normalisation:
        """The normalisation of samples learnt before, or else one from these samples; see :func:`standardised`."""
        before = None if self.known is None else self.known.normalisation
        if before is None:
            found = standardised(data, crop, flip)
        else:
            found = normaliser(layout_of_one(data[0][0]), **before, crop=crop, flip=flip)
        self._computed_transform = found
        return found

    def _begin(self) -> None:
        """Begin a new sequence, whatever an earlier fit has left behind; a checkpoint is restored afterwards."""
        epoch = self.trainer.current_epoch if self.trainer is not None else 0
        self.starts, self.alive, self._held_out = [epoch], [], []
        for t, data in enumerate(self.train_sets):
            order = torch.randperm(length(data), generator=torch.Generator().manual_seed(t))  # the same in every run
            held_out = round(self.val_fraction * length(data))
            is_learnt = not length(data) or (self.learnt is not None and t < len(self.learnt.classes))
            if self.val_fraction and not held_out and not is_learnt:
                raise ValueError(
                    f"{type(self).__name__}(val_fraction={self.val_fraction}): none of the {length(data)} training "
                    f"samples of task {t} is set aside; use a larger fraction, or 0"
                )
            self._held_out.append(order[:held_out].sort().values)
            self.alive.append(order[held_out:].sort().values)
            if len(self.alive[t]) < self.batch_size * self._world_size and not is_learnt:
                raise ValueError(
                    f"{type(self).__name__}(batch_size={self.batch_size}): task {t} has {len(self.alive[t])} training "
                    f"samples for {self._world_size} process(es); use a smaller batch or val_fraction"
                )
        self.order_seed = torch.initial_seed() % 2**62
        if self.trainer is not None:
            self.order_seed = self.trainer.strategy.broadcast(self.order_seed)

    def train_dataloader(self) -> TaskLoader:
        t, trainer = self.task, self._attached
        place = (self.alive[t], self._world_size, trainer.global_rank, self.order_seed)
        sampler = StreamSampler(*place, self._ends) if self.stream else TaskSampler(*place)
        data, workers = self._placed(self.train_sets[t]), self._workers(self.train_sets[t])
        return TaskLoader(
            DrawnByBatch(data) if workers else data, batch_size=self.batch_size, sampler=sampler, drop_last=True,
            num_workers=workers, collate_fn=collate,
            generator=torch.Generator().manual_seed(self.order_seed + trainer.current_epoch),  # seeds workers
        )  # fmt: skip

    def val_dataloader(self) -> list[DataLoader]:
        if self._attached.state.fn == "fit":
            return [self._eval_loader(self.train_sets[self.task], self._held_out[self.task])] * bool(self.val_fraction)
        if self.val_fraction and not self.joint:
            held_out = list(zip(self.train_sets, self._held_out, strict=True))
            return [self._eval_loader(*held_out[t]) for t in self.tasks_tested]
        return self.test_dataloader()

    def test_dataloader(self) -> list[DataLoader]:
        """One loader per task; each process has its share, every sample in exactly one."""
        return [self._eval_loader(d, torch.arange(length(d))) for d in (self.test_sets[t] for t in self.tasks_tested)]

    @property
    def tasks_tested(self) -> list[int]:
        """The task of each loader of ``validate`` and ``test``."""
        return list(range(len(self.test_sets))) if self.tested is None else self.tested

    predict_dataloader = test_dataloader

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        training = self.trainer is not None and self.trainer.training
        if training:
            self.raw = x
        return self.prepare(x, augment=training), self.target.for_loss(y)

    def prepare(self, x: Nest, augment: bool = True) -> Nest:
        """Stored samples to network input, on their device; augmented if both call and data module ask for it."""
        if self.transform is None:
            raise RuntimeError(f"{type(self).__name__}: call setup() first; it finds the mean and deviation")
        if callable(self.augment) or not isinstance(self.transform, Normalisation):
            x = each(Tensor.clone, x)  # a user's callable may change its input in place
        if augment and callable(self.augment):
            x = self.augment(x)
        if isinstance(self.transform, ImageTransform):
            x = self.transform(x, augment=augment and self.augment is True)
        else:
            x = self.transform(x)
        if self.trainer is None or x is None:  # example() refuses a transform that returns nothing
            return x
        dtype = self.trainer.lightning_module.dtype  # bf16-true, 64-true
        return each(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, x)

    def description(self) -> DataDescription:
        """What a trained network has to know of these data. Available after :meth:`setup`."""
        exactly = type(self.transform) in (ImageTransform, Standardisation)  # a subclass may do anything
        known = cast(Normalisation, self.transform) if exactly else None
        return DataDescription(
            layout=self.layout,
            mean=known.mean if known else None,
            std=known.std if known else None,
            size=None,
            class_names=tuple(self.class_names),
            classes=tuple(map(tuple, self.classes)),
            target=self.target.kind,
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "starts": self.starts, "alive": self.alive, "order_seed": self.order_seed,
            "class_names": self.class_names, "classes": self.classes, "fingerprints": self.fingerprints,
            "samples": self.samples_per_task, "planned": self.num_tasks if self.learnt is None else self.learnt.planned,
            "learnt_before": 0 if self.learnt is None else len(self.learnt.classes),
            "layout": described(self.layout), "joint": self.joint, "stream": self.stream, "target": self.target.kind,
            "normalisation": self.transform.normalisation() if isinstance(self.transform, Normalisation) else None,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.starts, self.order_seed = list(state["starts"]), state["order_seed"]
        begun = min(len(self.starts), len(state["alive"]), self.num_tasks)
        self.alive = [*state["alive"][:begun], *self.alive[begun:]]

    # ----------------------------------------------------------------------------------------------------------

    @property
    def _attached(self) -> pl.Trainer:
        """The trainer. Raises RuntimeError if there is none."""
        if self.trainer is None:
            raise RuntimeError(f"{type(self).__name__}: no Trainer is attached; ask inside fit, validate or test")
        return self.trainer

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1

    def _placed(self, data: Dataset) -> Dataset:
        """Data in memory are moved to the device once, so that batches are gathered there."""
        return data.to(self._attached.strategy.root_device) if isinstance(data, SampleTensors) else data

    def _workers(self, data: Dataset) -> int:
        return 0 if isinstance(data, SampleTensors) else self.num_workers

    def _eval_loader(self, data: Dataset, indices: Tensor, share: bool = True) -> DataLoader:
        rank = self.trainer.global_rank if self.trainer is not None else 0
        if self.trainer is not None:
            data = self._placed(data)
        sampler = ShareSampler(indices, self._world_size, rank) if share else ShareSampler(indices, 1, 0)
        return DataLoader(
            data, batch_size=256, sampler=sampler, num_workers=self._workers(data), collate_fn=collate,
            generator=torch.Generator(),  # its own: measuring must not change the random numbers of training
        )  # fmt: skip
