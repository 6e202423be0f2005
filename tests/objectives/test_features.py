"""A linear head fitted to features that stand still."""

import torch
from torch import nn
from torch.nn import functional as F

from lightning_sparse_cl.objectives.features import fit_head


def test_fit_head_solves_the_balanced_regression():
    torch.manual_seed(0)
    features, labels = torch.randn(90, 5) * 30, torch.cat([torch.zeros(60), torch.full((30,), 2)]).long()
    head, classes = nn.Linear(5, 4), torch.tensor([True, False, True, False])
    fit_head(head, features, labels, classes, decay=0.1)
    scale = features.square().mean().sqrt()
    weight = (head.weight[[0, 2]] * scale).detach().requires_grad_()
    logits = F.linear(features / scale, weight, head.bias[[0, 2]])
    parts = [F.cross_entropy(logits[labels == c], torch.full_like(labels[labels == c], c // 2)) for c in (0, 2)]
    (grad,) = torch.autograd.grad(sum(parts) / 2 + 0.05 * weight.square().sum(), weight)
    assert grad.abs().max() < 1e-3  # each class's mean counts the same, and nothing is left to descend
