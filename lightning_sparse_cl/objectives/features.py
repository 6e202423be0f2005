"""What objectives do with the features of a network that stands still: collect them, and fit a linear head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import LBFGS

from lightning_sparse_cl.backbones.batch_norm import in_eval
from lightning_sparse_cl.nests import Nest, split


@torch.no_grad()
def features_of(backbone: nn.Module, stored: Nest, prepare: Callable[..., Nest]) -> Tensor:
    """Features (n, D) of n samples as stored, in eval mode; ``prepare`` makes them network input."""
    with in_eval(backbone):
        return torch.cat([backbone(prepare(x, augment=False)).float() for x in split(stored, 256)])


def fit_head(
    head: nn.Linear, features: Tensor, labels: Tensor, classes: Tensor, decay: float = 1e-3, steps: int = 100
) -> None:
    """Multinomial logistic regression, by L-BFGS: fits the head's rows of ``classes`` in place, all with equal weight.

    It is solved to the end, where the papers take many epochs of SGD with samples drawn evenly from the classes: there
    is no learning rate to choose, and nothing is drawn at random.

    Args:
        head: the head of all classes; rows of other classes stay as they are, and do not compete.
        features: (n, D).
        labels: (n,), each one of ``classes``.
        classes: mask (C,).
        decay: weight of half the squared norm of the weights.
        steps: largest number of iterations.
    """
    rows = classes.nonzero().squeeze(1)
    y = torch.searchsorted(rows, labels)
    balance = 1 / y.bincount(minlength=len(rows)).clamp_min(1).to(features.dtype)
    with torch.inference_mode(False), torch.enable_grad():
        scale = features.square().mean().sqrt().clamp_min(1e-12)  # the solver likes features of size one
        x = (features / scale).clone()
        weight = torch.zeros(len(rows), x.shape[1], device=x.device, requires_grad=True)
        bias = torch.zeros(len(rows), device=x.device, requires_grad=True)
        solver = LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            solver.zero_grad()
            value = F.cross_entropy(F.linear(x, weight, bias), y, weight=balance) + decay / 2 * weight.square().sum()
            value.backward()
            return value

        solver.step(loss)
    with torch.no_grad():
        head.weight[rows] = (weight / scale).to(head.weight.dtype)
        head.bias[rows] = bias.to(head.bias.dtype)
