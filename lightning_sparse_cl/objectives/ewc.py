"""Elastic weight consolidation, online (Kirkpatrick et al., 2017; Schwarz et al., 2018)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.func import functional_call, grad, vmap
from torch.optim import SGD

from lightning_sparse_cl.backbones.batch_norm import in_eval
from lightning_sparse_cl.nests import Nest, rows, split
from lightning_sparse_cl.objectives.base import CrossEntropy, Learner, LooksBack, Terms, coefficient, positive


class EWC(LooksBack, CrossEntropy):
    """Weights that mattered to earlier tasks are held near the values they had::

        L = CE(x, y) + sum_i min(alpha F_i, bound) (theta_i - theta*_i)^2
        after a task:  F <- gamma F + F_t,  theta* <- theta

    without the factor 1/2 of the first paper, as in the released code whose coefficients are in use. theta are the
    weights of backbone and head. F_t is the empirical Fisher information: the mean over single samples of the squared
    gradient of log p(y|x), y the sample's label, in eval mode. (Released code squares gradients in train mode, where a
    batch of one normalises itself, and weights samples by p(y|x), which makes it neither the empirical nor the true
    Fisher; samples that are learnt have gradients near zero either way.) ``bound`` is ours: gradient descent at
    learning rate lr diverges where lr * alpha * F_i > 1, which the published coefficients exceed with this Fisher, by
    far in networks that are not yet trained to the end; a weight at the bound is held just as well. A bound that lets
    SGD diverge is refused when training starts.

    Args:
        alpha: weight of the penalty, the paper's lambda.
        bound: the largest value of alpha F_i, > 0; at most 1 / the learning rate of SGD, or (1 + momentum) / it.
        gamma: part of earlier tasks' information that stays, in [0, 1].
        samples: number of samples per task for the Fisher information, drawn at random. If None, all.
        single_head: see :class:`CrossEntropy`.

    Raises:
        ValueError: if an argument is out of range, or steps of SGD along the penalty may diverge.
    """

    F: Tensor
    """Fisher information (P,) of the weights, one value each."""
    anchor: Tensor
    """Weights (P,) at the last task's end, theta*."""
    per_weight = ("F", "anchor")
    weight_names: list[str]
    """Names of the weights theta, in their order."""
    takes = ("classes",)
    reads_network = True

    def __init__(
        self,
        alpha: float = 10.0,
        gamma: float = 1.0,
        samples: int | None = None,
        bound: float = 5.0,
        single_head: bool = False,
    ) -> None:
        super().__init__(single_head)
        self.alpha = coefficient(self, "alpha", alpha)
        self.bound = positive(self, "bound", bound)
        if not 0 <= gamma <= 1:
            raise ValueError(f"EWC(gamma={gamma}): the part of earlier tasks' Fisher information kept, in [0, 1]")
        if samples is not None and samples < 1:
            raise ValueError(f"EWC(samples={samples}): at least one sample per task, or None for all")
        self.gamma, self.samples = gamma, samples

    def build(self, network: nn.Module, layout: Nest, seed: int) -> None:
        super().build(network, layout, seed)
        theta = vector(network.parameters()).detach()
        self.register_buffer("F", torch.zeros_like(theta))
        self.register_buffer("anchor", theta)
        self.weight_names = [name for name, _ in network.named_parameters()]

    def forward(self, model: Learner, x: Nest, y: Tensor, replay: Any) -> Terms:
        terms = super().forward(model, x, y, replay)
        if self.tasks:
            moved = vector(model.network.parameters()) - self.anchor
            stiffness = (self.alpha * self.F).clamp_max(self.bound)
            terms["rest"] = torch.dot(stiffness * moved, moved)
        return terms

    def on_task_start(self, trainer: Any, pl_module: Any, task: int) -> None:
        super().on_task_start(trainer, pl_module, task)
        groups = [group for o in trainer.optimizers if isinstance(o, SGD) for group in o.param_groups]
        for group in groups if self.alpha and trainer.datamodule.num_tasks > 1 else ():
            lr, most = float(max(group["lr"], group.get("initial_lr", 0))), 1 + float(group["momentum"])
            if lr * self.bound > most:
                raise ValueError(
                    f"EWC(bound={self.bound:g}): SGD's steps along the penalty may diverge, as bound times the "
                    f"learning rate, {lr:g}, is above {most:g}; use a bound of at most {most / lr:g}"
                )

    @torch.no_grad()
    def on_task_end(self, trainer: Any, pl_module: Any, task: int) -> None:
        among = self.live if self.single_head else None
        self.F.mul_(self.gamma).add_(fisher(pl_module.network, trainer.datamodule.samples(self.samples), among))
        self.anchor.copy_(vector(pl_module.network.parameters()))
        super().on_task_end(trainer, pl_module, task)


def vector(tensors: Iterable[Tensor]) -> Tensor:
    """All values in one row (P,), in logical order, whatever the memory format is."""
    return torch.cat([t.reshape(-1) for t in tensors])


def fisher(network: nn.Module, batches: Iterable[tuple[Nest, Tensor]], among: Tensor | None = None) -> Tensor:
    """Empirical Fisher information, diagonal, (P,): E[(d log p(y|x) / d theta)^2] over all samples and processes.

    Args:
        network: maps samples to logits; it runs in eval mode, and is left as it was.
        batches: (x, y), B samples as network input and labels (B,); each process gives its own.
        among: classes (num_classes,) that compete in p(y|x). If None, all.
    """
    theta = {name: p.detach() for name, p in network.named_parameters()}
    at_once = max(1, min(256, 2**27 // sum(p.numel() for p in theta.values())))  # half a gigabyte of gradients

    def log_likelihood(theta: dict[str, Tensor], x: Nest, y: Tensor) -> Tensor:
        logits = functional_call(network, theta, (rows(x, None),))[0].float()
        logits = logits if among is None else logits.masked_fill(~among, -torch.inf)
        return logits.log_softmax(0).gather(0, y[None])[0]

    squares = {
        name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in theta.items()
    }
    count = torch.zeros((), device=next(iter(theta.values())).device)
    with in_eval(network), torch.compiler.set_stance("force_eager"):
        for xs, ys in batches:
            for x, y in zip(split(xs, at_once), ys.split(at_once), strict=True):
                for name, g in vmap(grad(log_likelihood), (None, 0, 0))(theta, x, y).items():
                    squares[name] += g.square().sum(0)
                count += len(y)
    total = vector(squares.values())
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(total)
        distributed.all_reduce(count)
    return total / count.clamp_min(1)
