"""What a network predicts for a sample: its class, several labels, real numbers, or the class of each pixel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import JaccardIndex, Metric
from torchmetrics.functional.classification import multilabel_average_precision
from torchmetrics.functional.regression import r2_score
from torchmetrics.utilities import dim_zero_cat

from lightning_sparse_cl.data.labels import whole_labels

IGNORED = 255
"""Marks pixels in a map of classes that count neither in the loss nor in the metric."""


class Target:
    """Base of the kinds of label. An objective says which of them it takes.

    Outputs are what the network's head gives: (B, C) for a batch of B samples, or (B, C, H, W) for maps.
    """

    kind: str
    """Name of the target, in arguments and checkpoints."""
    figure: str
    """Name of a task's metric, in tables."""
    expected: str
    """The labels that a data set should give, in words."""

    def labels(self, given: Tensor, name: str) -> Tensor:
        """Labels (N, ...) of a data set as they are stored.

        Raises:
            ValueError: naming ``name``, if they are of another kind.
        """
        raise NotImplementedError

    def occurring(self, labels: Tensor) -> list[int]:
        """The outputs that stored labels (N, ...) use, in ascending order: the classes or labels that occur."""
        raise NotImplementedError

    def count(self, labels: Tensor) -> int:
        """How many outputs stored labels (N, ...) need."""
        return max(self.occurring(labels), default=-1) + 1

    def for_loss(self, labels: Tensor) -> Tensor:
        """A stored batch of labels as a training step gets it."""
        return labels

    def loss(self, outputs: Tensor, labels: Tensor, live: Tensor | None = None) -> Tensor:
        """The loss (B,) of each sample.

        Args:
            outputs: outputs of the network.
            labels: (B, ...).
            live: which outputs (C,) take part. If None, all.
        """
        raise NotImplementedError

    def among(self, outputs: Tensor, live: Tensor) -> Tensor:
        """The outputs, of which only ``live`` (C,) can be answers: Task-IL uses these."""
        return outputs

    def answers(self, outputs: Tensor) -> Tensor:
        """The network's answers: (B,) classes, (B, C) yes or no, (B, C) numbers, or (B, H, W) classes."""
        raise NotImplementedError

    def measure(self, outputs: int) -> Metric | None:
        """The metric of one task, updated with outputs and labels. If None, accuracy.

        Args:
            outputs: how many the network has.
        """
        return None

    def __reduce__(self) -> Any:  # a copy is the same object
        return target_of, (self.kind, "Target")

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Classes(Target):
    """One of C classes. Loss: cross-entropy. Measured by accuracy."""

    kind, figure = "classes", "accuracy"
    expected = "whole numbers (N,), one for each sample"

    def labels(self, given: Tensor, name: str) -> Tensor:
        return whole_labels(given, name)

    def occurring(self, labels: Tensor) -> list[int]:
        return labels.unique().tolist()

    def loss(self, outputs: Tensor, labels: Tensor, live: Tensor | None = None) -> Tensor:
        return F.cross_entropy(outputs if live is None else self.among(outputs, live), labels, reduction="none")

    def among(self, outputs: Tensor, live: Tensor) -> Tensor:
        live = F.pad(live, (0, outputs.shape[1] - len(live)))  # a module may have more outputs than the data classes
        return outputs.masked_fill(~live.view(-1, *[1] * (outputs.ndim - 2)), -torch.inf)

    def answers(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(1)


class ClassMaps(Classes):
    """The class of each pixel (segmentation). Loss: cross-entropy, averaged over the pixels that count.

    Measured by mIoU: intersection over union, averaged over the classes that occur in labels or answers.
    """

    kind, figure = "class_maps", "mIoU"
    expected = f"maps of classes (N, H, W), whole numbers 0-{IGNORED - 1}, and {IGNORED} where a pixel does not count"

    def labels(self, given: Tensor, name: str) -> Tensor:
        if given.is_floating_point() and bool((given != given.round()).any()):
            raise ValueError(f"{name}: labels are {self.expected}, got {given.dtype}")
        whole = whole_labels(given, name)
        if whole.ndim != 3:
            raise ValueError(f"{name}: labels are {self.expected}, got the shape {tuple(given.shape)}")
        if (wrong := whole[(whole < 0) | (whole > IGNORED)]).numel():
            raise ValueError(f"{name}: labels are {self.expected}, got {int(wrong[0])}")
        return whole.to(torch.uint8)

    def occurring(self, labels: Tensor) -> list[int]:
        return [c for c in labels.unique().tolist() if c != IGNORED]

    def for_loss(self, labels: Tensor) -> Tensor:
        return labels.long()

    def loss(self, outputs: Tensor, labels: Tensor, live: Tensor | None = None) -> Tensor:
        outputs = outputs if live is None else self.among(outputs, live)
        pixels = F.cross_entropy(outputs, labels.long(), ignore_index=IGNORED, reduction="none").flatten(1)
        return pixels.sum(1) / (labels != IGNORED).flatten(1).sum(1).clamp_min(1)

    def measure(self, outputs: int) -> Metric:
        return JaccardIndex("multiclass", num_classes=outputs, ignore_index=IGNORED, validate_args=False)


class MultiLabel(Target):
    """Which of C labels a sample has; several, or none. Loss: binary cross-entropy, averaged over labels.

    Measured by mAP: for each label the average precision of the task's test samples in the order of its output,
    averaged over the task's labels. Each label is ranked by itself, so that Class-IL and Task-IL are the same figure.
    """

    kind, figure = "multi_label", "mAP"
    expected = "(N, C) of 0 and 1, a column for each label"

    def labels(self, given: Tensor, name: str) -> Tensor:
        if given.ndim != 2 or given.is_complex():
            raise ValueError(f"{name}: labels are {self.expected}, got the shape {tuple(given.shape)}")
        if (wrong := given[(given != 0) & (given != 1)]).numel():
            raise ValueError(f"{name}: labels are {self.expected}, got {wrong[0].item():g}")
        return given.detach().float()

    def occurring(self, labels: Tensor) -> list[int]:
        return labels.any(0).nonzero().flatten().tolist()

    def count(self, labels: Tensor) -> int:
        return labels.shape[1]

    def loss(self, outputs: Tensor, labels: Tensor, live: Tensor | None = None) -> Tensor:
        each = F.binary_cross_entropy_with_logits(outputs[:, : labels.shape[1]], labels, reduction="none")
        return each.mean(1) if live is None else each[:, live].mean(1)

    def answers(self, outputs: Tensor) -> Tensor:
        return outputs > 0

    def measure(self, outputs: int) -> Metric:
        return LabelsRanked()


class RealNumbers(Target):
    """C real numbers (regression). Loss: the squared error, averaged over the numbers.

    Measured by R², averaged over the numbers: 1 is exact, 0 as good as predicting their mean, and worse is negative.
    Every task has all outputs, so that Class-IL and Task-IL are the same figure.
    """

    kind, figure = "real_numbers", "R²"
    expected = "real numbers (N,) or (N, C)"

    def labels(self, given: Tensor, name: str) -> Tensor:
        if given.ndim not in (1, 2) or given.is_complex():
            raise ValueError(f"{name}: labels are {self.expected}, got {given.dtype} {tuple(given.shape)}")
        if not bool(given.isfinite().all()):
            first = int((~given.isfinite()).nonzero()[0, 0])
            raise ValueError(f"{name}: labels are {self.expected}; label {first} has values that are NaN or infinite")
        return given.detach().float()

    def occurring(self, labels: Tensor) -> list[int]:
        return list(range(self.count(labels)))

    def count(self, labels: Tensor) -> int:
        return labels.shape[1] if labels.ndim == 2 else 1

    def loss(self, outputs: Tensor, labels: Tensor, live: Tensor | None = None) -> Tensor:
        return (outputs - labels.view(outputs.shape)).square().mean(1)

    def answers(self, outputs: Tensor) -> Tensor:
        return outputs

    def measure(self, outputs: int) -> Metric:
        return NumbersExplained()


class OfAll(Metric):
    """Base of the metrics that are computed from all outputs and labels at once."""

    outputs: list[Tensor]
    labels: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("outputs", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        """Outputs (B, C), and labels (B, C), or (B,) if C is 1."""
        self.outputs.append(outputs)
        self.labels.append(labels.view(outputs.shape))


class NumbersExplained(OfAll):
    """R², averaged over the numbers; nan for fewer than two samples.

    A number that is the same for all samples counts as 1 if every output is that number, and as 0 otherwise, as in
    scikit-learn. Sums are taken in float64 and about the mean: ``R2Score`` sums squares in float32, which loses numbers
    that vary little compared with their size.
    """

    def compute(self) -> Tensor:
        """The mean over the numbers."""
        outputs, labels = (dim_zero_cat(part).cpu().double() for part in (self.outputs, self.labels))
        if len(labels) < 2:
            return torch.full((), torch.nan)
        scores, vary = (outputs == labels).all(0).double(), (labels != labels[0]).any(0)
        if vary.any():
            mean, std = labels[:, vary].mean(0), labels[:, vary].std(0)  # r2_score has thresholds for small values
            outputs, labels = ((part[:, vary] - mean) / std for part in (outputs, labels))
            scores[vary] = r2_score(outputs, labels, multioutput="raw_values")
        return scores.mean().float()


class LabelsRanked(OfAll):
    """mAP over the labels that some sample has; nan if no sample has any.

    (``MultilabelAveragePrecision`` takes the sigmoid of outputs, which makes all large ones equal.)
    """

    def compute(self) -> Tensor:
        """The mean over labels."""
        outputs, labels = dim_zero_cat(self.outputs), dim_zero_cat(self.labels).long()
        found = labels.any(0)
        if not found.any():
            return torch.full((), torch.nan, device=outputs.device)
        values, place = outputs[:, found].unique(return_inverse=True)  # replaced by numbers in 0-1 in this order
        return multilabel_average_precision(
            place.double() / len(values), labels[:, found], int(found.sum()), validate_args=False
        )


KINDS: dict[str, Target] = {target.kind: target for target in (Classes(), MultiLabel(), RealNumbers(), ClassMaps())}


def target_of(kind: str, owner: str) -> Target:
    """The target of that name. Raises ValueError, naming ``owner``, if there is none."""
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{owner}(target={kind!r}): target is one of {', '.join(KINDS)}")
    return KINDS[kind]
