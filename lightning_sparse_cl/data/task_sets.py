"""The data sets of a task sequence: checked, their classes counted, and joined to what was learnt before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset

from lightning_sparse_cl.data.checks import Part, check_labels, check_samples, refuse_empty, warn_of_untested
from lightning_sparse_cl.data.fingerprint import fingerprints
from lightning_sparse_cl.data.items import Items
from lightning_sparse_cl.data.learnt import LearntTasks
from lightning_sparse_cl.data.loader import SampleTensors, length
from lightning_sparse_cl.data.targets import KINDS, Target
from lightning_sparse_cl.nests import described, in_words, layout_of_one


@dataclass(frozen=True)
class TaskSets:
    """Training and test sets, one per task, with labels in ``range(len(class_names))``."""

    train: list[Part]
    test: list[Part]
    class_names: list[str]
    classes: list[list[int]]
    """Labels that occur in each task."""
    fingerprints: list[str]
    samples: list[int]
    """Number of training samples of each task."""
    tested_only: list[Part]
    """Test sets of classes that were learnt before and no longer have training images."""

    def after(self, learnt: LearntTasks) -> TaskSets:
        """The tasks learnt before, with whatever data of them are there, followed by those still to be learnt.

        A task is recognised by its fingerprint; a test set without training images by its classes.
        """
        places, new = learnt.match(self.fingerprints)
        old = self._placed(places, learnt)
        return TaskSets(
            train=old.train + [self.train[i] for i in new],
            test=old.test + [self.test[i] for i in new],
            class_names=self.class_names,
            classes=learnt.classes + [self.classes[i] for i in new],
            fingerprints=learnt.fingerprints + [self.fingerprints[i] for i in new],
            samples=learnt.samples + [self.samples[i] for i in new],
            tested_only=[],
        )

    def only(self, fingerprints: set[str]) -> TaskSets:
        """Only these tasks, and their classes; if none of them is there, all tasks."""
        kept = [i for i, found in enumerate(self.fingerprints) if found in fingerprints]
        if len(kept) in (0, len(self.train)):
            return self
        most = max(c for i in kept for c in self.classes[i]) + 1
        return TaskSets(
            train=[self.train[i] for i in kept],
            test=[self.test[i] for i in kept],
            class_names=self.class_names[:most],
            classes=[self.classes[i] for i in kept],
            fingerprints=[self.fingerprints[i] for i in kept],
            samples=[self.samples[i] for i in kept],
            tested_only=self.tested_only,
        )

    def by_classes(self, name: str, learnt: LearntTasks) -> TaskSets:
        """The test sets in the order of the tasks that were learnt, with empty sets for tasks that are missing.

        A task is recognised by its fingerprint, or else by its classes: other images of them may be tested. If the data
        have a task that was not learnt, they stay as they are.

        Raises:
            ValueError: naming ``name``, if several of the tasks learnt have the classes of a given one, and nothing
                says which it is.
        """
        places, left = learnt.match(self.fingerprints)
        of = [frozenset(self.class_names[c] for c in classes) for classes in self.classes]
        open_ = [task for task, place in enumerate(places) if place is None]
        for i in list(left):
            fitting = [task for task in open_ if frozenset(learnt.names[task]) == of[i]]
            if not fitting:
                return self
            if len(fitting) > sum(of[j] == of[i] for j in left if j >= i):
                raise ValueError(
                    f"{name}: tasks {', '.join(map(str, fitting))} of the sequence all have the classes "
                    f"{', '.join(sorted(of[i])[:5])}, and these data are none of them; test on the data of all"
                )
            places[fitting[0]] = i
            open_.remove(fitting[0])
        return self._placed(places, learnt)

    def _placed(self, places: Sequence[int | None], learnt: LearntTasks) -> TaskSets:
        """The data of each learnt task, from its place here; for missing tasks, test sets without training data."""
        nothing = _nothing((self.train or self.tested_only)[0])
        only = [(set(part.target.occurring(labels_of(part))), part) for part in self.tested_only]
        tested = [next((part for labels, part in only if labels <= set(task)), nothing) for task in learnt.classes]
        return TaskSets(
            train=[nothing if i is None else self.train[i] for i in places],
            test=[part if i is None else self.test[i] for i, part in zip(places, tested, strict=True)],
            class_names=self.class_names,
            classes=learnt.classes,
            fingerprints=["" if i is None else self.fingerprints[i] for i in places],
            samples=learnt.samples,
            tested_only=[],
        )


def read_tasks(
    name: str, train: Sequence[Dataset], test: Sequence[Dataset], class_names: Sequence[str],
    learnt: LearntTasks | None, target: Target = KINDS["classes"],
) -> TaskSets:  # fmt: skip
    """Check data sets, one per task, and count their classes.

    Args:
        name: for errors.
        train, test: as :meth:`TaskDataModule.load` gives them.
        class_names: names by label. If empty, the classes are counted, and named after their labels.
        learnt: what was learnt before: its classes have the first labels.
        target: what labels are.

    Raises:
        ValueError: in one line, if they are not a task sequence, or do not agree with what was learnt.
    """
    refuse_empty(name, train, test, every=learnt is None)
    trained = [length(data) > 0 for data in train]
    parts = {
        part: [_part(d, f"{name}: {part} of task {t}", target) for t, d in s]
        for part, s in (
            ("training", [(t, d) for t, d in enumerate(train) if trained[t]]),
            ("test", [(t, d) for t, d in enumerate(test) if trained[t]]),
            ("other test", [(t, d) for t, d in enumerate(test) if not trained[t]]),
        )
    }
    there, tested, others = parts["training"], parts["test"], parts["other test"]
    check_samples(name, there or others, tested or others)
    learning, testing, other = ([target.occurring(labels_of(d)) for d in sets] for sets in (there, tested, others))
    _refuse_other_labels(name, [labels_of(d) for d in (*there, *tested, *others)])
    ids = sorted(set().union(*learning, *other))
    if target is not KINDS["classes"]:
        ids = list(range(max(target.count(labels_of(d)) for d in (*there, *tested, *others))))
        if not ids:
            raise ValueError(f"{name}: no label counts; labels are {target.expected}")
        if class_names and target is not KINDS["class_maps"] and len(class_names) != len(ids):
            raise ValueError(f"{name}: there are {len(class_names)} names, but labels of {target.kind} have {len(ids)}")
    elif there:
        check_labels(name, learning, testing)
    if not class_names:
        names, numbers = [str(i) for i in ids], ids
    elif len(class_names) <= ids[-1]:
        raise ValueError(f"{name}: there are {len(class_names)} names of labels, but there is the label {ids[-1]}")
    else:
        names, numbers = list(class_names), list(range(len(class_names)))
    for t, found in zip([t for t, there_is in enumerate(trained) if not there_is], other, strict=True):
        named = dict(zip(numbers, names, strict=True))
        if learnt is None or {named[c] for c in found} - set(learnt.class_names):
            raise ValueError(f"{name}: task {t} has no training samples")
    positions = list(range(len(names)))
    if learnt is not None:
        _refuse_other_samples(name, (there or others)[0], learnt)
        here = names
        names, positions = learnt.labels_of(names, name)
    if learnt is not None and positions != numbers and target is not KINDS["classes"]:
        raise ValueError(
            f"{name}: labels are {', '.join(here[:5])}, those learnt before {', '.join(learnt.class_names[:5])}; those "
            f"of {target.kind} go on in the same order, and others come after them"
        )
    if positions != numbers:
        label = dict(zip(numbers, positions, strict=True))
        there, tested, others = ([_renumbered(d, label) for d in sets] for sets in (there, tested, others))
        learning, testing = ([sorted(label[c] for c in part) for part in sets] for sets in (learning, testing))
    warn_of_untested(name, learning, testing, names)
    return TaskSets(
        train=there,
        test=tested,
        class_names=names,
        classes=[sorted({*one, *other}) for one, other in zip(learning, testing, strict=True)],
        fingerprints=fingerprints(there, tested),
        samples=[length(d) for d in there],
        tested_only=others,
    )


def following(
    name: str, found: TaskSets, learnt: LearntTasks, asked: bool, joint: bool, by_classes: bool
) -> tuple[TaskSets, LearntTasks | None]:
    """The tasks of a sequence, including those learnt before, and the latter if the sequence goes on from them.

    Args:
        name: for errors.
        found: the data.
        learnt: the tasks learnt before.
        asked: whether the sequence goes on even if none of the data are new; otherwise such data begin a new sequence.
        joint: whether all data are trained on at once.
        by_classes: whether the data are only tested, see :meth:`TaskSets.by_classes`.

    Raises:
        ValueError: if the sequence cannot go on with these data.
    """
    if by_classes:
        return found.by_classes(name, learnt), None
    if not learnt.is_sequence:
        return found, None
    if joint or learnt.joint:
        if asked or joint != learnt.joint or len(found.class_names) > len(learnt.class_names):
            raise ValueError(
                f"{name}(joint={joint}): joint training learns all tasks at once, and cannot go on with further ones; "
                "start anew with the old and the new data"
            )
        return found, None
    if not asked and set(found.fingerprints) <= set(learnt.fingerprints):
        return found, None
    if learnt.running is not None and learnt.running not in found.fingerprints:
        raise ValueError(
            f"{name}: the sequence was stopped inside task {len(learnt.classes)}, whose data are not among these; go "
            "on with them first (ckpt_path), or give them together with the further tasks"
        )
    joined, before = found.after(learnt), len(learnt.classes)
    again = [t for t in range(before, len(joined.classes)) if max(joined.classes[t]) < len(learnt.class_names)]
    line = f"{name}: goes on after {before} tasks; still to be learnt: {len(joined.classes) - before}"
    tasks = ", ".join(str(t) for t in again)
    rank_zero_info(f"{line}; all classes of task {tasks} are known, and learnt again" if again else line)
    return joined, learnt


def _refuse_other_samples(name: str, data: Part, learnt: LearntTasks) -> None:
    if data.target.kind != learnt.target:
        raise ValueError(f"{name}: labels are {data.target.kind}, those learnt before {learnt.target}")
    found = described(layout_of_one(data[0][0]))
    if found != learnt.layout:
        kinds = [in_words(kind) for kind in (found, learnt.layout)]
        raise ValueError(f"{name}: samples are {kinds[0]}, those learnt before {kinds[1]}; all must be equal")


def _nothing(like: Part) -> SampleTensors:
    """A data set without samples."""
    return SampleTensors(layout_of_one(like[0][0]), labels_of(like)[:0], like.target)


def _part(data: Dataset, name: str, target: Target) -> Part:
    """A data set in one of the forms whose items are checked."""
    known = data if isinstance(data, SampleTensors | Items) else Items(data, name, target=target)
    if known.target is not target:
        raise ValueError(f"{name}: labels are {known.target.kind}, those of the sequence {target.kind}")
    return known


def _refuse_other_labels(name: str, labels: Sequence[Tensor]) -> None:
    """Raise ValueError unless the labels of all data sets have one shape."""
    shapes = list(dict.fromkeys(tuple(found.shape[1:]) for found in labels))
    if len(shapes) > 1:
        raise ValueError(f"{name}: labels of shape {shapes[1]} and of shape {shapes[0]}; all must be equal")


def labels_of(data: Part) -> Tensor:
    """Labels (N, ...), on the CPU."""
    return data.labels.cpu() if isinstance(data, SampleTensors) else data.targets


def _renumbered(data: Part, label: dict[int, int]) -> Part:
    """The same samples, with another label for each."""
    if isinstance(data, Items):
        return data.renumbered(label)
    table = torch.zeros(max(label) + 1, dtype=torch.long)
    table[list(label)] = torch.tensor(list(label.values()))
    return SampleTensors(data.inputs, table.to(data.labels.device)[data.labels])
