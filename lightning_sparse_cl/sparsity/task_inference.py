"""Which task a sample belongs to, told by the answers of all tasks' subnetworks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_sparse_cl.nests import Nest


class TaskInference:
    """Base of the rules that compare the answers of subnetworks, which have never seen each other's classes.

    A rule gives each task a score for each sample; the sample belongs to the task with the highest score, and to the
    most probable class of that task. The rule is asked task by task, so that no network has to answer twice.

    To write one, override :meth:`score`.
    """

    calibrated: ClassVar[bool] = False
    """Whether it needs the mean and deviation of scores on each task's own training samples."""
    least_classes: ClassVar[int] = 1
    """How many classes a task needs at least."""
    together: ClassVar[bool] = False
    """Whether the scores of all tasks are found at once, by :meth:`scores`."""

    def score(self, answer: Tensor) -> Tensor:
        """How much each sample looks like one of the task's, (B,), from the logits (B, n) of its subnetwork."""
        raise NotImplementedError(f"{type(self).__name__} does not say how tasks are compared: override score()")

    def scores(self, learnt: Any, x: Nest, tasks: Sequence[int]) -> Tensor:
        """How much samples look like those of each of ``tasks``, (len(tasks), B), where one answer alone does not tell.

        Args:
            learnt: the :class:`~lightning_sparse_cl.Subnetworks` of all tasks.
            x: the batch.
            tasks: the tasks to compare.
        """
        raise NotImplementedError(f"{type(self).__name__} asks tasks one by one")

    def comparable(self, answer: Tensor, calibration: tuple[float, float] | None = None) -> Tensor:
        """Logits (B, n) whose largest is the task's score, in the order of ``answer``.

        Args:
            answer: logits (B, n) of the task's subnetwork.
            calibration: mean and deviation of the task's scores on its own samples.

        Raises:
            ValueError: if the rule needs a calibration, and there is none, or scores have another shape.
        """
        answer = answer.float() if answer.dtype in (torch.bfloat16, torch.float16) else answer  # scores may be close
        score = self.score(answer)
        if score.shape != answer.shape[:1]:
            raise ValueError(
                f"{type(self).__name__}.score() gives {tuple(score.shape)}: one number per sample, "
                f"({len(answer)},), is needed"
            )
        if self.calibrated:
            if calibration is None:
                raise ValueError(
                    f"{type(self).__name__}: tasks were learnt without it, and their scores were not measured on their "
                    "own samples; train with TaskSubnetworks(inference=...), or take LowestEntropy"
                )
            mean, deviation = calibration
            score = (score - mean) / max(deviation, 1e-6)
        return answer - answer.amax(1, keepdim=True) + score[:, None].to(answer.dtype)


class LargestLogit(TaskInference):
    """Picks the task whose subnetwork gives the largest logit; the default."""

    def score(self, answer: Tensor) -> Tensor:
        return answer.amax(1)

    def comparable(self, answer: Tensor, calibration: tuple[float, float] | None = None) -> Tensor:
        return answer


class CalibratedLogit(LargestLogit):
    """Picks the task whose largest logit is the largest in comparison with those of its own training samples.

    Their mean is subtracted from the largest logit, and the rest divided by their deviation: networks that were trained
    for longer, or on easier tasks, give larger logits to anything.
    """

    calibrated = True
    comparable = TaskInference.comparable


class LowestEntropy(TaskInference):
    """Picks the task whose subnetwork is the surest: its answer has the lowest entropy.

    Tasks of different numbers of classes are compared by entropy as a fraction of the largest possible one, log n. A
    task of one class is refused: its answer has no entropy, so that it would get every sample.
    """

    least_classes = 2

    def score(self, answer: Tensor) -> Tensor:
        log_p = answer.float().log_softmax(1)
        entropy = -(log_p.exp() * log_p).sum(1)
        return -entropy / math.log(max(answer.shape[1], 2))
