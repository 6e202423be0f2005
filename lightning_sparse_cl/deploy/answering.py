"""The network that answers for a trained module: its own, a task's subnetwork, or those of all tasks together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_sparse_cl.data.description import DataDescription
from lightning_sparse_cl.objectives.base import Objective
from lightning_sparse_cl.sparsity.channels import compact
from lightning_sparse_cl.sparsity.layers import network_of
from lightning_sparse_cl.sparsity.subnetworks import Subnetworks
from lightning_sparse_cl.sparsity.task_inference import LargestLogit


class Answering(NamedTuple):
    """A copy of a network alone, in eval mode, in float32 on the CPU."""

    network: nn.Module
    classes: list[int] | None
    """The label of each of its outputs. If None, they are the module's labels in order."""


def answering(model: nn.Module, task: int | None = None) -> Answering:
    """The network that computes the outputs by which a module is tested, without the channels that no layer reads.

    If tasks have subnetworks, it holds all of them, each for the classes of its task: the class with the largest output
    also decides the task. If a memory classifies (iCaRL), the means of its exemplars are the last layer.

    Args:
        model: a trained module of this package, or any network.
        task: answer only among the classes of this task, counted from 0, and by its subnetwork if it has one. If None,
            among all classes.

    Raises:
        ValueError: if there is no such task, or several subnetworks have the same class, so that they cannot be
            combined.
    """
    name, learnt = type(model).__name__, Subnetworks.of(model)
    if task is not None and type(task) is not int:
        raise ValueError(f"{name}: task {task!r} was asked for; tasks are counted from 0")
    if len(learnt):
        if task is not None:
            return _alone(learnt.network(task), learnt.tasks[task].classes)
        known = learnt.known()
        if type(learnt.inference) is not LargestLogit:
            raise ValueError(
                f"{name}: its tasks are inferred by {type(learnt.inference).__name__}, which a file of all "
                "subnetworks cannot do; give a task, counted from 0 (sparsecl export --task 0)"
            )
        if sum(len(own.classes) for own in learnt.tasks) > len(known):
            raise ValueError(
                f"{name}: several of its {len(learnt)} tasks have the same classes, and one file holds the subnetwork "
                "of only one of them; give a task, counted from 0 (sparsecl export --task 0)"
            )
        return _alone(_Together(learnt, known), known)
    network, classes = network_of(model), None
    objective = getattr(model, "objective", None)
    if isinstance(objective, Objective) and network is not model:
        *_, head = network.children()
        own, classes = objective.classifier(head)  # type: ignore[arg-type]  # the head of a ContinualModule
        network = network if own is head else nn.Sequential(*list(network.children())[:-1], own)
    if task is None:
        return _alone(network, classes)
    wanted = _classes_of(model, task)
    rows = [c if classes is None else classes.index(c) for c in wanted]
    return _alone(compact(network, outputs=rows), wanted)


class _Together(nn.Module):
    """All subnetworks as one network: the outputs of each stand at the places of its classes."""

    def __init__(self, learnt: Subnetworks, known: list[int]) -> None:
        super().__init__()
        places = [[known.index(c) for c in own.classes] for own in learnt.tasks]
        self.tasks = nn.ModuleList(_spread(learnt.network(i), at, len(known)) for i, at in enumerate(places))

    def forward(self, x: Tensor) -> Tensor:
        first, *others = [network(x) for network in self.tasks]
        for found in others:  # each class belongs to one task; the others have zeros there
            first = first + found
        return first


@torch.no_grad()
def _spread(network: nn.Module, places: list[int], outputs: int) -> nn.Module:
    """A copy with ``outputs`` outputs, of which those at ``places`` are its own and the others zero."""
    network = compact(network)
    name, last = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear)][-1]
    wide = nn.Linear(last.in_features, outputs).to(last.weight)
    wide.weight.zero_()
    wide.bias.zero_()
    wide.weight[places] = last.weight
    if last.bias is not None:
        wide.bias[places] = last.bias
    network.set_submodule(name, wide)
    return network


def _alone(network: nn.Module, classes: list[int] | None) -> Answering:
    return Answering(compact(network).cpu().float().eval().requires_grad_(False), classes)


def _classes_of(model: nn.Module, task: int) -> list[int]:
    known: DataDescription | None = getattr(model, "data_description", None)
    if known is None or not 0 <= task < len(known.classes):
        has = "knows no tasks" if known is None else f"has tasks 0 to {len(known.classes) - 1}"
        raise ValueError(f"{type(model).__name__}: task {task} was asked for, and it {has}")
    return list(known.classes[task])
