"""Which task a sample belongs to, told by the entropy of all subnetworks in superposition (SupSup)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.func import functional_call, jvp

from lightning_sparse_cl.nests import Nest, count, each, rows
from lightning_sparse_cl.sparsity.layers import network_of
from lightning_sparse_cl.sparsity.subnetworks import Subnetworks
from lightning_sparse_cl.sparsity.task_inference import TaskInference


class EntropyGradient(TaskInference):
    """Picks the task whose mask, given more weight, would make the joint answer the most certain (SupSup).

    One network has the masks of all T tasks at once, sum_i alpha_i m_i with alpha_i = 1/T, and answers with the classes
    of all of them. The task is the one with the smallest dH/dalpha_i, H being the entropy of the answer. The one-shot
    search stops there; the binary search keeps the half of the tasks with the smaller gradients and asks again,
    ceil(log2 T) times. Each sample is decided by itself; the paper's experiments decide for a whole batch by one image.

    The paper's networks have nothing but masks. Here tensors that a task has for itself are superposed, too: biases and
    batch-norm, with its statistics, are averaged with the weights alpha_i; rows of the head belong to classes, and
    stay. **It is made for networks without batch-norm**: an average of several tasks' batch-norm suits none of them,
    and tasks are then hardly told apart (docs/guide/subnetworks.md).

    One shot takes T forward passes with derivatives through the whole network, each costing about two plain passes.

    Args:
        search: ``"one_shot"`` or ``"binary"``.

    Raises:
        ValueError: if ``search`` is neither.
    """

    together = True

    def __init__(self, search: Literal["one_shot", "binary"] = "one_shot") -> None:
        if search not in ("one_shot", "binary"):
            raise ValueError(f"EntropyGradient(search={search!r}): search is 'one_shot' or 'binary'")
        self.search = search

    def comparable(self, answer: Tensor, calibration: tuple[float, float] | None = None) -> Tensor:
        return answer

    @torch.no_grad()
    def scores(self, learnt: Subnetworks, x: Nest, tasks: Sequence[int]) -> Tensor:
        gradients = _Gradients(learnt, tasks)
        x = each(lambda part: part.to(gradients.dtype) if part.is_floating_point() else part, x)
        device = next(learnt.module.parameters()).device
        alive, left = torch.ones(count(x), len(tasks), dtype=torch.bool, device=device), len(tasks)
        while True:
            found = torch.full(alive.shape, torch.inf, dtype=gradients.dtype, device=device)
            masks, group = alive.unique(dim=0, return_inverse=True)
            for i, mask in enumerate(masks):  # samples with the same tasks left share one network
                here = (group == i).nonzero()[:, 0]
                alpha = mask.to(gradients.dtype) / left
                found[here] = gradients.of(alpha, rows(x, here)).masked_fill(~mask, torch.inf)
            if self.search == "one_shot" or left <= 2:
                return -found.T
            left = math.ceil(left / 2)
            kept = found.topk(left, largest=False).indices
            alive = torch.zeros_like(alive).scatter_(1, kept, True)


class _Gradients:
    """dH/dalpha of the superposition of some of a module's subnetworks, in single precision at least."""

    def __init__(self, learnt: Subnetworks, tasks: Sequence[int]) -> None:
        self.network = copy.deepcopy(network_of(learnt.module)).eval().requires_grad_(False)
        own = next(self.network.parameters()).dtype
        self.dtype = own if own == torch.float64 else torch.float32
        self.network.to(self.dtype)
        self.known = learnt.known(tasks)
        tensors = [learnt.tensors(task) for task in tasks]
        self.stacked = {
            name: torch.stack([t[name] for t in tensors]).to(self.dtype)
            for name, tensor in tensors[0].items()
            if name not in learnt.head and tensor.is_floating_point()
        }
        self.moving = {name for name, _ in self.network.named_parameters()}
        weight = tensors[0][learnt.head[0]]
        owners = torch.zeros(len(weight), dtype=self.dtype, device=weight.device)
        for task in tasks:
            owners[learnt.tasks[task].classes] += 1
        owners.clamp_(min=1)  # a class of several tasks has the mean of their rows
        summed = {name: torch.stack([t[name] for t in tensors]).sum(0).to(self.dtype) for name in learnt.head}
        self.head = {name: total / owners.view(-1, *[1] * (total.ndim - 1)) for name, total in summed.items()}

    def entropy(self, alpha: Tensor, x: Nest) -> Tensor:
        """H (B,) of the answers."""
        superposed = {
            name: torch.tensordot(alpha if name in self.moving else alpha.detach(), tensor, 1)
            for name, tensor in self.stacked.items()
        }
        logits = functional_call(self.network, superposed | self.head, (x,))
        log_p = logits[:, self.known].log_softmax(1)
        return -(log_p.exp() * log_p).sum(1)

    def of(self, alpha: Tensor, x: Nest) -> Tensor:
        """dH/dalpha (B, T) at ``alpha`` (T,): one forward pass with its derivative per task whose alpha is not zero."""
        found = torch.zeros(count(x), len(alpha), device=alpha.device, dtype=alpha.dtype)
        for task in alpha.nonzero()[:, 0].tolist():
            along = torch.zeros_like(alpha)
            along[task] = 1
            found[:, task] = jvp(lambda a: self.entropy(a, x), (alpha,), (along,))[1]
        return found
