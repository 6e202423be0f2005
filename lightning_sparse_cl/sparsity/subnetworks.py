"""One subnetwork per task in one network: a mask of bits over shared weights, and tensors of the task's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from lightning_sparse_cl.nests import Nest, count
from lightning_sparse_cl.sparsity.bits import pack, unpack
from lightning_sparse_cl.sparsity.channels import compact
from lightning_sparse_cl.sparsity.layers import network_of, weight_layers
from lightning_sparse_cl.sparsity.masks import Masks
from lightning_sparse_cl.sparsity.task_inference import LargestLogit, TaskInference

_KEY = "_subnetworks"
"""In the module's ``__dict__``: copies and pickles of the module have them."""


class Subnetwork(NamedTuple):
    """What a task has learnt."""

    classes: list[int]
    masks: dict[str, Tensor]
    """By weight: which entries it uses, eight per byte. Their values are shared and frozen."""
    own: dict[str, Tensor]
    """Tensors that it shares with no other task: batch-norm, biases, and the head's rows of its classes."""
    calibration: dict[str, tuple[float, float]] | None = None
    """By the name of a :class:`TaskInference`, mean and deviation of its scores on the task's own training samples."""
    negated: dict[str, Tensor] | None = None
    """By weight: which entries it uses with their sign changed, eight per byte. If None, none."""


class Subnetworks:
    """The subnetworks of a module, by task; each computes the same for ever, bit for bit.

    The values of shared weights are those that :class:`Masks` holds frozen.

    Args:
        module: maps images (B, C, H, W) to logits (B, num_classes). Use :meth:`of` to share one among callbacks.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        self._module: ReferenceType[nn.Module] | None = None if module is None else ref(module)
        self.tasks: list[Subnetwork] = []
        self.inference: TaskInference = LargestLogit()
        """How the task of a sample is inferred where it is not given."""
        self._forget()

    def __repr__(self) -> str:
        uses = [sum(int(self.mask(i, name).sum()) for name in task.masks) for i, task in enumerate(self.tasks)]
        lines = [f"  task {i}: {count:,} masked weights in use" for i, count in enumerate(uses)]
        return "\n".join([f"Subnetworks of {len(self.tasks)} tasks", *lines])

    def _forget(self) -> None:
        """Drop what is kept only for speed."""
        self._ready: dict[int, tuple[Subnetwork, nn.Module]] = {}  # extracted networks, each with its subnetwork
        self._sizes: dict[int, tuple[Subnetwork, int]] = {}  # parameters of each extracted network
        self._unions: dict[str, tuple[list[Subnetwork], Tensor]] = {}  # what those tasks use together, by weight

    @classmethod
    def of(cls, module: nn.Module) -> Subnetworks:
        """The one ``Subnetworks`` of ``module``, made on first use."""
        found = module.__dict__.get(_KEY)
        if found is None:
            found = module.__dict__[_KEY] = cls(module)
        if found._module is None or found._module() is not module:
            found._module = ref(module)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"tasks": self.tasks, "inference": self.inference}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.tasks, self.inference, self._module = state["tasks"], state["inference"], None
        self._forget()

    @property
    def module(self) -> nn.Module:
        """The module that they are parts of."""
        module = None if self._module is None else self._module()
        if module is None:
            raise ReferenceError("Subnetworks: the module they belong to no longer exists")
        return module

    @property
    def head(self) -> list[str]:
        """Names of weight and bias of the last linear layer, whose rows are classes."""
        weight, layer = list(weight_layers(network_of(self.module)).items())[-1]
        return [weight] if layer.bias is None else [weight, weight.removesuffix("weight") + "bias"]

    def __len__(self) -> int:
        return len(self.tasks)

    def add(
        self,
        classes: Sequence[int],
        masks: Mapping[str, Tensor],
        own: Sequence[str],
        negated: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Remember what the next task uses: masks by weight, copies of the tensors named ``own``, and rows of the head;
        and which weights it uses with their sign changed.

        Extracted networks are dropped: only those that are asked for between two tasks take memory at a time. Where the
        answers of earlier tasks are kept, as in :class:`ContinualEvaluation`, that is one network.

        Raises:
            ValueError: if a mask does not have its weight's shape.
        """
        for name, mask in masks.items():
            if mask.shape != (shape := self.module.get_parameter(name).shape):
                raise ValueError(
                    f"Subnetworks: mask of {name!r} has shape {tuple(mask.shape)}, the weight {tuple(shape)}"
                )
        state = self._tensors()
        copies = {name: state[name].detach().clone() for name in own if name not in self.head}
        copies |= {name: state[name].detach()[list(classes)].clone() for name in self.head}
        signs = {n: pack(m) for n, m in negated.items()} if negated else None
        self.tasks.append(Subnetwork(list(classes), {n: pack(m) for n, m in masks.items()}, copies, negated=signs))
        self.drop_networks()

    @torch.no_grad()
    def calibrate(self, task: int, batches: Iterable[Nest]) -> None:
        """Measure the scores of :attr:`inference` on samples of the task itself."""
        scores = torch.cat([self.inference.score(self.network(task)(x)).float() for x in batches])
        found = {type(self.inference).__name__: (scores.mean().item(), scores.std(correction=0).item())}
        learnt = self._task(task)
        self.tasks[task] = learnt = learnt._replace(calibration=(learnt.calibration or {}) | found)
        self._ready[task] = learnt, self._ready[task][1]

    def calibration(self, task: int) -> tuple[float, float] | None:
        """Mean and deviation of :attr:`inference`'s scores on the task's own samples. If None, they are not known."""
        return (self._task(task).calibration or {}).get(type(self.inference).__name__)

    def mask(self, task: int, name: str) -> Tensor:
        """Which of a weight's entries a task uses, of the weight's shape."""
        weight = self.module.get_parameter(name)
        return unpack(self._task(task).masks[name].to(weight.device), weight.shape)

    def signs(self, task: int, name: str) -> Tensor:
        """What a task multiplies a weight with: 0, 1, or -1 where it changes its sign; of the weight's shape."""
        mask, negated = self.mask(task, name), (self._task(task).negated or {}).get(name)
        if negated is None:
            return mask
        return torch.where(unpack(negated.to(mask.device), mask.shape), -1, mask.int())

    def used(self, name: str, tasks: int | None = None) -> Tensor:
        """Which entries the first ``tasks`` tasks use together, of the weight's shape. If None, all tasks."""
        weight, wanted = self.module.get_parameter(name), self.tasks[:tasks]
        counted, found = self._unions.get(name, ([], torch.zeros_like(weight, dtype=torch.bool)))
        if not starts_with(wanted, counted):
            counted, found = [], torch.zeros_like(weight, dtype=torch.bool)
        found = found.to(weight.device)
        for task in wanted[len(counted) :]:
            found = found | unpack(task.masks[name].to(weight.device), weight.shape)
        self._unions[name] = wanted, found
        return found.clone()

    def from_module(self, tasks: int | None = None) -> dict[str, Tensor]:
        """What the first ``tasks`` tasks take from the module itself, by name. If None, all tasks.

        Shared weights, zero where none of these tasks uses them, and tensors that belong to no task, such as
        batch-norm that all share. As long as these stay the same, so do the tasks' logits.
        """
        learnt = self.tasks[:tasks]
        weights = {name: self._held(name, tasks) for name in (learnt[0].masks if learnt else ())}
        network = network_of(self.module)
        tensors = (*network.named_parameters(), *network.named_buffers())
        others = {n: t for n, t in tensors if any(n not in task.masks and n not in task.own for task in learnt)}
        return weights | others

    def _held(self, name: str, tasks: int | None = None) -> Tensor:
        return Masks.of(self.module).held(name).masked_fill(~self.used(name, tasks), 0)

    def tensors(self, task: int) -> dict[str, Tensor]:
        """Parameters and buffers of the module as the task's subnetwork has them, of full size."""
        learnt, held, state = self._task(task), Masks.of(self.module).held, self._tensors()
        head = {name: torch.zeros_like(state[name]) for name in self.head}
        for name, tensor in head.items():
            tensor[learnt.classes] = learnt.own[name].to(tensor)
        return {name: held(name) * self.signs(task, name) for name in learnt.masks} | learnt.own | head

    @contextmanager
    def use(self, task: int) -> Iterator[None]:
        """Inside, the module is the task's subnetwork; only the logits of the task's classes mean something."""
        tensors, before = self._tensors(), {}
        try:
            for name, value in self.tensors(task).items():
                before[name], tensors[name].data = tensors[name].data, value.to(tensors[name])
            yield
        finally:
            for name, value in before.items():
                tensors[name].data = value

    def network(self, task: int) -> nn.Module:
        """The task's subnetwork alone, in eval mode, without the channels that it does not use.

        It maps images (B, C, H, W) to logits (B, len(classes)) and has weights of its own. Made when it is first asked
        for, and kept until another task is added.
        """
        if task not in self._ready or self._ready[task][0] is not self._task(task):
            self._ready[task] = self._task(task), self._extract(task)
        return self._ready[task][1].to(next(self.module.parameters()).device)

    def drop_networks(self) -> None:
        """Drop the extracted networks, which do not follow later changes of the module."""
        self._ready = {}

    def parameters(self, task: int) -> int:
        """How many parameters :meth:`network` of the task has. Counted once per task."""
        if task not in self._sizes or self._sizes[task][0] is not self._task(task):
            self._extract(task)
        return self._sizes[task][1]

    def _extract(self, task: int) -> nn.Module:
        learnt = self._task(task)
        with self.use(task), torch.no_grad():
            small = compact(network_of(self.module), outputs=learnt.classes)
        self._sizes[task] = learnt, sum(p.numel() for p in small.parameters())
        return small.eval().requires_grad_(False)

    def stored(self) -> dict[str, Tensor]:
        """All that the subnetworks need: shared weights under their names, zero where no task uses them; masks, eight
        entries per byte, under ``mask.TASK.NAME``, changed signs under ``negated.TASK.NAME``; a task's own tensors
        under ``own.TASK.NAME``.
        """
        shared = {name: self._held(name) for name in (self.tasks[0].masks if self.tasks else ())}
        masks = {f"mask.{i}.{n}": bits for i, task in enumerate(self.tasks) for n, bits in task.masks.items()}
        for i, task in enumerate(self.tasks):
            masks |= {f"negated.{i}.{n}": bits for n, bits in (task.negated or {}).items()}
        own = {f"own.{i}.{n}": tensor for i, task in enumerate(self.tasks) for n, tensor in task.own.items()}
        return shared | masks | own

    def known(self, tasks: Iterable[int] | None = None) -> list[int]:
        """The classes that tasks have learnt, in ascending order. If None, all tasks."""
        return sorted({c for task in (range(len(self)) if tasks is None else tasks) for c in self.tasks[task].classes})

    def running(self, x: Nest) -> Tensor:
        """Logits (B, num_classes) of the network that is being trained, whatever tasks have been learnt."""
        own = getattr(type(self.module), "running", None)
        return own(self.module, x) if callable(own) else self.module(x)

    def answers(self, x: Nest, task: int | None = None) -> dict[int, Tensor]:
        """Logits (B, len(classes)) of each task's subnetwork for a batch; of one task, or of all learnt."""
        asked = range(len(self.tasks)) if task is None else range(task, min(task + 1, len(self.tasks)))
        return {i: self.network(i)(x) for i in asked}

    def combined(self, x: Nest, answers: Mapping[int, Tensor], task: int | None = None) -> Tensor:
        """Logits (B, num_classes): each class has its task's subnetwork's, made comparable by :attr:`inference`.

        A class that several tasks have, as in domain-incremental learning, has the largest of their logits; one that
        none of ``answers`` has gets the logit of the network that is being trained. Under an :attr:`inference` other
        than the largest logit only the classes of the sample's task are answered; all others are -inf.

        Args:
            x: the batch.
            answers: what :meth:`answers` has returned.
            task: the task of the samples, where it is known; if it has been learnt, only its classes are answered.
        """
        if task is not None:
            answers = {task: answers[task]} if task in answers else {}
        classes = len(self.module.get_parameter(self.head[0]))
        known = self.known(answers)
        if len(known) == classes or not self.asks_running(answers, task):
            logits = next(iter(answers.values())).new_full((count(x), classes), -torch.inf)
        else:
            logits = self.running(x).clone()
        logits[:, known] = -torch.inf
        comparable = {i: self.inference.comparable(a, self.calibration(i)) for i, a in answers.items()}
        if len(comparable) > 1 and type(self.inference) is not LargestLogit:
            if self.inference.together:
                scores = self.inference.scores(self, x, list(comparable))
            else:
                scores = torch.stack([a.amax(1) for a in comparable.values()])
            others = zip(comparable.items(), scores < scores.amax(0), strict=True)
            comparable = {i: answer.masked_fill(other[:, None], -torch.inf) for (i, answer), other in others}
            logits = logits.to(next(iter(comparable.values())).dtype)
        for i, answer in comparable.items():
            own = self.tasks[i].classes
            logits[:, own] = logits[:, own].maximum(answer.to(logits.dtype))
        return logits

    def asks_running(self, answers: Sized, task: int | None = None) -> bool:
        """Whether the network that is being trained answers for classes that none of ``answers`` has."""
        return not answers or (task is None and type(self.inference) is LargestLogit)

    def state_dict(self) -> dict[str, Any]:
        return {"tasks": [task._asdict() for task in self.tasks]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore; the values of the weights are those of the module's :class:`Masks`.

        Raises:
            ValueError: if the masks belong to another network; nothing is changed then.
        """
        weights = dict(self.module.named_parameters())
        tasks = [Subnetwork(**task) for task in state["tasks"]]
        for name, bits in ((n, b) for task in tasks for n, b in task.masks.items()):
            if name not in weights or bits.numel() != -(-weights[name].numel() // 8):
                raise ValueError(f"Subnetworks: the checkpoint has a mask of {name!r}, which does not fit this network")
        self.tasks = tasks
        self._forget()

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}

    def _task(self, task: int) -> Subnetwork:
        if not 0 <= task < len(self.tasks):
            learnt = f"tasks 0 to {len(self.tasks) - 1}" if self.tasks else "no task"
            raise ValueError(f"Subnetworks: task {task} was never trained; this module has learnt {learnt}")
        return self.tasks[task]


def starts_with(tasks: Sequence[Subnetwork], first: Sequence[Subnetwork]) -> bool:
    """Whether ``tasks`` begins with these very subnetworks."""
    return len(first) <= len(tasks) and all(a is b for a, b in zip(first, tasks))
