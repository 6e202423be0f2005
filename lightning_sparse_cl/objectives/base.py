"""What every objective of continual learning offers: a loss, and a memory if it has one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sparse_cl.data.targets import KINDS, Target
from lightning_sparse_cl.nests import Nest
from lightning_sparse_cl.task_hooks import TaskHooks

Terms = dict[str, Any]
"""``per_sample`` (B,): loss of each sample of the current batch; ``rest``: replay and penalty terms, a scalar;
``logits`` (B, C) of the current batch; if :attr:`Objective.ranks_replay` and something is replayed, ``replayed``: for
each draw, the loss (m,) of each exemplar."""


class Learner(Protocol):
    """The module that learns, as an objective sees it. :class:`~lightning_sparse_cl.ContinualModule` is one."""

    @property
    def backbone(self) -> nn.Module:
        """Maps a batch of B samples to features (B, D)."""

    @property
    def head(self) -> nn.Linear:
        """Maps features (B, D) to logits (B, num_classes)."""

    @property
    def network(self) -> nn.Module:
        """Backbone and head, one after the other."""

    def __call__(self, x: Nest, features: bool = False) -> Any:
        """Maps a batch to logits (B, num_classes); with ``features=True`` to logits and features (B, D)."""


class Objective(TaskHooks, nn.Module):
    """Base of the objectives. State lives in buffers, which checkpoints hold. The module passes the hooks of tasks on.

    An objective is called once for every pass of a training step. What it draws at random for the step is drawn
    beforehand, by :meth:`draw`, so that both passes of SAM see the same.
    """

    drawn = 0
    """Exemplars of the last :meth:`draw`, which sets it. FlopsCounter reads it."""
    replayed = 0
    """Views of exemplars in the running pass; 0 in passes that do not replay any. FlopsCounter reads it."""
    ranks_replay = False
    """Whether :meth:`forward` returns the loss of each exemplar, so that :class:`LossSelection` can select by it."""
    trains_head = True
    """Whether the head learns by the loss; otherwise it is fitted, or not used, when a task has ended."""
    reads_network = False
    """Whether it computes with ``network`` itself, so that the module must also use the network's parameters.
    """
    views = 1
    """Augmented views of each sample of the current batch; if several, the tensors of ``x`` are (B, views, ...).
    """
    takes: tuple[str, ...] = ("classes",)
    """The targets whose labels it can learn, see :mod:`lightning_sparse_cl.data.targets`."""
    target: Target = KINDS["classes"]
    """What labels are, once :meth:`set_target` has been called."""
    _labels: Tensor | None = None

    @property
    def own_classes(self) -> Tensor | None:
        """Labels (n,) of the only classes whose logits a training step needs. If None, it needs all."""
        return None

    def set_target(self, target: Target, labels: Tensor) -> None:
        """Say what labels are; called before :meth:`build`.

        Args:
            target: what labels are.
            labels: the labels of a batch of no samples, as they are stored.

        Raises:
            ValueError: if the objective cannot learn such labels.
        """
        if target.kind not in self.takes:
            raise ValueError(
                f"{type(self).__name__}: the data have labels of the kind {target.kind!r}; it takes "
                + " or ".join(map(repr, self.takes))
            )
        self.target, self._labels = target, labels

    def build(self, network: nn.Module, layout: Nest, seed: int) -> None:
        """Allocate what depends on the network (its ``head`` is linear) and on the form of a sample.

        Called once, before a checkpoint is restored.

        Args:
            network: backbone and head.
            layout: a batch of no samples as they are stored, for their shapes and types.
            seed: seed of random draws.
        """

    def add_classes(self, model: Learner, known: int, prepare: Callable[..., Nest]) -> None:
        """Called when ``model`` has got outputs for further classes, before it trains on them.

        Args:
            model: the module that learns.
            known: number of classes that it had before.
            prepare: makes stored samples network input.
        """

    def draw(self, prepare: Callable[[Nest], Nest]) -> Any:
        """What the step replays, if anything; ``prepare`` augments and normalises stored samples."""
        return None

    def forward(self, model: Learner, x: Nest, y: Tensor, replay: Any) -> Terms:
        """The loss terms of one pass.

        Args:
            model: the module that learns.
            x: the current batch as network input, or the samples of it that the pass keeps.
            y: labels (B,).
            replay: what :meth:`draw` has returned, or None to leave replay out.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what its loss is: override forward()")

    def observe(self, raw: Nest, y: Tensor, logits: Tensor, task: int) -> None:
        """Called after the update with the whole batch as stored, and its logits from before the update."""

    def classify(self, head: nn.Linear, features: Tensor) -> Tensor:
        """Logits (B, num_classes) with which the network is tested, from features (B, D)."""
        return head(features)

    def classifier(self, head: nn.Linear) -> tuple[nn.Module, list[int] | None]:
        """:meth:`classify` as a network of its own, and the labels of its outputs. If these are None, all in order."""
        return head, None


class LooksBack(Objective):
    """Base of the objectives that compare with the end of the last task: it knows whether there is one."""

    tasks = 0
    """How many tasks have been learnt to their end."""

    def on_task_end(self, trainer: Any, pl_module: Any, task: int) -> None:
        super().on_task_end(trainer, pl_module, task)
        self.tasks += 1

    def get_extra_state(self) -> dict[str, int]:
        return {"tasks": self.tasks}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.tasks = state["tasks"]


class CrossEntropy(Objective):
    """The loss of the current batch and nothing else: fine-tuning.

    It is cross-entropy where labels are classes, and otherwise the target's loss: binary cross-entropy, squared error,
    or the mean cross-entropy of pixels.

    Args:
        single_head: only the current task's classes compete in the loss of the current batch. Old classes are then
            not pushed down by it, which counters the bias towards recent ones. SparCL's code does this (with replay
            among all classes); its paper, DER++ and ER do not mention it.
    """

    live: Tensor
    """Which classes (num_classes,) the current task has; kept with ``single_head`` only."""
    takes: tuple[str, ...] = ("classes", "multi_label", "real_numbers", "class_maps")

    def __init__(self, single_head: bool = False) -> None:
        super().__init__()
        self.single_head = single_head
        self._own: Tensor | None = None  # labels of ``live``

    def build(self, network: nn.Module, layout: Nest, seed: int) -> None:
        if self.single_head:
            self.register_buffer("live", torch.ones(head_of(network).out_features, dtype=torch.bool))

    def on_task_start(self, trainer: Any, pl_module: Any, task: int) -> None:
        if self.single_head:
            self.live.copy_(trainer.datamodule.live())
            self._own = None

    @property
    def own_classes(self) -> Tensor | None:
        """With ``single_head`` the current task's classes, unless a subclass has loss terms of its own."""
        if not self.single_head or type(self).forward is not CrossEntropy.forward:
            return None
        if self.target is not KINDS["classes"]:
            return None
        if self._own is None or self._own.device != self.live.device:
            self._own = self.live.nonzero().squeeze(1)
        return self._own

    def forward(self, model: Learner, x: Nest, y: Tensor, replay: Any) -> Terms:
        logits = model(x)
        return {"per_sample": self.current_loss(logits, y), "rest": logits.new_zeros(()), "logits": logits}

    def current_loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Loss (B,) of the current batch's samples from outputs (B, C, ...) and labels (B, ...)."""
        if (own := self.own_classes) is not None:  # summed over these alone, however many others there are
            return F.cross_entropy(logits[:, own], self.live.cumsum(0)[y] - 1, reduction="none")
        return self.target.loss(logits, y, self.live if self.single_head else None)


def head_of(network: nn.Module) -> nn.Linear:
    """The layer ``network.head``, which maps features to logits."""
    return cast(nn.Linear, network.head)


def coefficient(owner: object, name: str, value: float) -> float:
    """``value``, a loss coefficient. Raises ValueError if negative or not finite."""
    if not 0 <= value < math.inf:
        raise ValueError(
            f"{type(owner).__name__}({name}={value}): a loss coefficient is >= 0 and finite; 0 leaves it out"
        )
    return value


def positive(owner: object, name: str, value: float) -> Any:
    """``value``, a temperature, bound or size. Raises ValueError if not positive and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{type(owner).__name__}({name}={value}): {name} is > 0 and finite")
    return value
