"""Experience replay: ER (Chaudhry et al., 2019), DER and DER++ (Buzzega et al., 2020)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sparse_cl.backbones.batch_norm import in_eval
from lightning_sparse_cl.data.targets import KINDS, Target
from lightning_sparse_cl.nests import Nest, count, joined, split
from lightning_sparse_cl.objectives.base import CrossEntropy, Learner, LooksBack, Terms, coefficient, head_of
from lightning_sparse_cl.objectives.class_balanced import ClassBalancedReservoir
from lightning_sparse_cl.objectives.memory import ExemplarMemory, Exemplars, ReservoirMemory

FORWARDS = ("separate", "joint")


class Replay(LooksBack, CrossEntropy):
    """Base of the objectives that add a loss of exemplars to the loss of the current batch.

    Batch-norm normalises what goes through the network together. The released code of DER, DER++ and FDR sends the
    current batch and each draw through separately (``"separate"``): each is normalised by its own mean and variance. In
    one pass (``"joint"``) old and new classes are normalised together, as all are at test time. This is more accurate
    where it was measured (docs/results/objectives.md), and not what the papers did. Without batch-norm they are the
    same. (ER's own code is joint; SparCL's ER is separate.)

    Args:
        memory: where exemplars come from.
        replay_batch_size: number of exemplars replayed in each step.
        single_head: see :class:`CrossEntropy`.
        forward: ``"separate"`` or ``"joint"``.
        replay_in_first_task: whether the first task replays its own samples, as soon as the memory holds some. DER,
            DER++ and ER do so; SparCL's code begins with the second task.
    """

    draws = 1
    """Independent draws from memory per step."""
    keeps_logits = False
    ranks_replay = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "replay_loss" in cls.__dict__:
            raise TypeError(
                f"{cls.__name__}.replay_loss() is not called any more: override replay_losses(), which returns, for "
                "each draw, the loss of each exemplar"
            )

    def __init__(
        self,
        memory: ExemplarMemory,
        replay_batch_size: int = 32,
        single_head: bool = False,
        forward: Literal["separate", "joint"] = "separate",
        replay_in_first_task: bool = True,
    ) -> None:
        super().__init__(single_head)
        if forward not in FORWARDS:
            raise ValueError(f"{type(self).__name__}(forward={forward!r}): 'separate' or 'joint'")
        if replay_batch_size < 1:
            raise ValueError(
                f"{type(self).__name__}(replay_batch_size={replay_batch_size}): each step replays at least one exemplar"
            )
        self.memory = memory
        self.replay_batch_size = replay_batch_size
        self._forward = forward
        self.replay_in_first_task = replay_in_first_task

    def build(self, network: nn.Module, layout: Nest, seed: int) -> None:
        super().build(network, layout, seed)
        self.memory.build(layout, head_of(network).out_features if self.keeps_logits else None, seed, self._labels)

    @torch.no_grad()
    def add_classes(self, model: Learner, known: int, prepare: Callable[..., Nest]) -> None:
        """Logits of exemplars are kept for all classes: for new ones, the network's logits before it learns them.

        It is the same where all classes are known from the beginning.
        """
        held = self.memory.contents()
        if held.logits is not None and len(held.logits):
            with in_eval(model.network):
                now = [model.network(prepare(x, augment=False)) for x in split(held.inputs, 256)]
            held.logits[:, known:] = torch.cat(now)[:, known:].to(held.logits)

    def draw(self, prepare: Callable[[Nest], Nest]) -> list[Exemplars] | None:
        if not self.memory or not (self.tasks or self.replay_in_first_task):
            self.drawn = 0
            return None
        drawn = self.memory.draw(self.replay_batch_size, self.draws)
        self.drawn = len(drawn.labels)
        each = self.drawn // self.draws
        drawn = drawn._replace(inputs=prepare(drawn.inputs))
        return [drawn.at(slice(i * each, (i + 1) * each)) for i in range(self.draws)]

    def forward(self, model: Learner, x: Nest, y: Tensor, replay: list[Exemplars] | None) -> Terms:
        if replay is None:
            return super().forward(model, x, y, None)
        logits, *replayed = self._logits(model, [x, *(draw.inputs for draw in replay)])
        losses = self.replay_losses(replayed, replay)
        if not isinstance(losses, list) or len(losses) != len(replay):
            name, draws = type(self).__name__, len(replay)
            raise TypeError(f"{name}.replay_losses() returns a list with one tensor per draw, {draws} here")
        return {
            "per_sample": self.current_loss(logits, y),
            "rest": torch.stack([each.mean() for each in losses]).sum(),
            "logits": logits,
            "replayed": [each.detach() for each in losses],
        }

    def _logits(self, model: Learner, batches: list[Nest]) -> list[Tensor]:
        """Logits of the current batch, and of each draw."""
        if self._forward == "joint":
            return list(model(joined(batches)).split([count(batch) for batch in batches]))
        found = []
        for i, batch in enumerate(batches):
            self.replayed = count(batch) if i else 0
            try:
                found.append(model(batch))
            except ValueError as error:
                if i and count(batch) == 1 and "more than 1 value per channel" in str(error):
                    raise ValueError(
                        f"{type(self).__name__}(forward='separate'): batch-norm cannot normalise a draw of one "
                        "exemplar by itself; use forward='joint', or a larger memory and replay_batch_size"
                    ) from error
                raise
        return found

    def replay_losses(self, logits: Sequence[Tensor], replay: Sequence[Exemplars]) -> list[Tensor]:
        """A list with one entry per draw: the loss (m,) of each of its exemplars. The objective adds their means.

        Args:
            logits: logits (m, num_classes) of each draw.
            replay: the draws.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what its replay costs: override replay_losses()")


class ER(Replay):
    """Cross-entropy on the current batch plus cross-entropy on a batch from memory: L = CE(x, y) + CE(x', y').

    Both terms are means. The paper's Algorithm 1 and the code whose settings are in use send both batches through the
    network together and take one mean over them, which for batches of one size is half of this loss. Under plain SGD,
    ``ER(forward="joint")`` takes the same steps at half the learning rate published for that mean.

    Args:
        memory: number of exemplars. If None, 500, or what ``per_class`` needs.
        replay_batch_size: number of exemplars replayed in each step.
        single_head: see :class:`CrossEntropy`.
        balanced: the memory holds equal numbers of all classes seen so far, by :class:`ClassBalancedReservoir`. If
            False, it is a uniform sample of everything seen.
        per_class: largest number of exemplars per class, a uniform sample of the class. If ``memory`` is None, there is
            room for these of all classes; otherwise the memory is balanced, and no larger than ``memory``.
        forward: see :class:`Replay`.
        replay_in_first_task: see :class:`Replay`.

    Raises:
        ValueError: if a number is not positive, or a balanced memory is smaller than the number of classes.
    """

    memory: ReservoirMemory

    def __init__(
        self,
        memory: int | None = None,
        replay_batch_size: int = 32,
        single_head: bool = False,
        balanced: bool = False,
        per_class: int | None = None,
        forward: Literal["separate", "joint"] = "separate",
        replay_in_first_task: bool = True,
    ) -> None:
        size = 500 if memory is None and per_class is None else memory
        held: ReservoirMemory
        if balanced or size is None or per_class is not None:
            held = ClassBalancedReservoir(size, per_class)
        else:
            held = ReservoirMemory(size)
        super().__init__(held, replay_batch_size, single_head, forward, replay_in_first_task)

    def set_target(self, target: Target, labels: Tensor) -> None:
        super().set_target(target, labels)
        if isinstance(self.memory, ClassBalancedReservoir) and target is not KINDS["classes"]:
            raise ValueError(
                f"{type(self).__name__}: a memory that is balanced over classes takes labels of classes, but those of "
                f"the data are {target.kind}; leave balanced and per_class out"
            )

    def build(self, network: nn.Module, layout: Nest, seed: int) -> None:
        if isinstance(self.memory, ClassBalancedReservoir):
            self.memory.room_for(head_of(network).out_features, self)
        super().build(network, layout, seed)

    def replay_losses(self, logits: Sequence[Tensor], replay: Sequence[Exemplars]) -> list[Tensor]:
        return [self.target.loss(logits[0], replay[0].labels)]

    def observe(self, raw: Nest, y: Tensor, logits: Tensor, task: int) -> None:
        self.memory.add(raw, y, task, logits)


class DER(ER):
    """Dark experience replay: L = CE(x, y) + alpha * MSE(logits(x'), z'), with one draw x' from memory.

    z' are the logits of the augmented view that was trained on, from before that update; the sample is stored without
    augmentation.

    Args:
        memory: see :class:`ER`.
        replay_batch_size: number of exemplars in each draw.
        alpha: weight of the distance to the stored logits.
        single_head: see :class:`CrossEntropy`.
        balanced: see :class:`ER`.
        per_class: see :class:`ER`.
        forward: see :class:`Replay`.
        replay_in_first_task: see :class:`Replay`.

    Raises:
        ValueError: if a coefficient is negative; and see :class:`ER`.
    """

    keeps_logits = True
    takes = ("classes", "multi_label", "real_numbers")

    def __init__(
        self,
        memory: int | None = None,
        replay_batch_size: int = 32,
        alpha: float = 0.3,
        single_head: bool = False,
        balanced: bool = False,
        per_class: int | None = None,
        forward: Literal["separate", "joint"] = "separate",
        replay_in_first_task: bool = True,
    ) -> None:
        super().__init__(memory, replay_batch_size, single_head, balanced, per_class, forward, replay_in_first_task)
        self.alpha = coefficient(self, "alpha", alpha)

    def replay_losses(self, logits: Sequence[Tensor], replay: Sequence[Exemplars]) -> list[Tensor]:
        stored = replay[0].logits
        assert stored is not None  # keeps_logits
        return [self.alpha * F.mse_loss(logits[0].float(), stored.float(), reduction="none").mean(1)]


class DERpp(DER):
    """DER++: DER and beta * CE(x'', y''), with a second, independent draw x''.

    Args:
        memory: see :class:`ER`.
        replay_batch_size: number of exemplars in each draw.
        alpha: weight of the distance to the stored logits.
        beta: weight of the cross-entropy on exemplars.
        single_head: see :class:`CrossEntropy`.
        balanced: see :class:`ER`.
        per_class: see :class:`ER`.
        forward: see :class:`Replay`.
        replay_in_first_task: see :class:`Replay`.

    Raises:
        ValueError: if a coefficient is negative; and see :class:`ER`.
    """

    draws = 2

    def __init__(
        self,
        memory: int | None = None,
        replay_batch_size: int = 32,
        alpha: float = 0.2,
        beta: float = 0.5,
        single_head: bool = False,
        balanced: bool = False,
        per_class: int | None = None,
        forward: Literal["separate", "joint"] = "separate",
        replay_in_first_task: bool = True,
    ) -> None:
        super().__init__(
            memory, replay_batch_size, alpha, single_head, balanced, per_class, forward, replay_in_first_task
        )
        self.beta = coefficient(self, "beta", beta)

    def replay_losses(self, logits: Sequence[Tensor], replay: Sequence[Exemplars]) -> list[Tensor]:
        labels = self.target.loss(logits[-1], replay[-1].labels)
        return [*super().replay_losses(logits, replay), self.beta * labels]


class DERppOneDraw(DERpp):
    """DER++ with both terms on one draw: a third less computation, and another algorithm, not the paper's."""

    draws = 1

    def replay_losses(self, logits: Sequence[Tensor], replay: Sequence[Exemplars]) -> list[Tensor]:
        return [torch.stack(super().replay_losses(logits, replay)).sum(0)]
