"""Layers whose weight is made of other tensors: there is nothing to prune, and that is said before the training."""

import torch
from foreign.case import BATCH, BATCHES, Case, classifier, tensors
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm


def _build(change):
    hidden = nn.Linear(16, 16)
    change(hidden)
    mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), hidden, nn.ReLU(), nn.Linear(16, 4))
    n = BATCH * BATCHES
    return classifier(mlp), tensors(torch.randn(n, 8), torch.arange(n) % 4)


def _case(name, change, how, **others):
    refused = {"*": f": model.2.weight is {how}, and has no plain weight"} | others
    return Case(name, "torch", lambda: _build(change), refused=refused)


UNCOPIED = {"SET, EMAWeightAveraging": "Only Tensors created explicitly by the user"}
"""Lightning's average copies the module first; these are torch's words."""

CASES = [
    _case("weight_norm", parametrizations.weight_norm, "reparametrised by torch.nn.utils.parametrize"),
    _case("weight_norm, the deprecated one", weight_norm, "reparametrised by weight_norm", **UNCOPIED),
    _case("spectral_norm", parametrizations.spectral_norm, "reparametrised by torch.nn.utils.parametrize"),
    _case(
        "spectral_norm, the deprecated one", spectral_norm, "reparametrised by torch.nn.utils.prune or spectral_norm"
    ),
    _case(
        "torch.nn.utils.prune",
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
        "reparametrised by torch.nn.utils.prune or spectral_norm",
        **UNCOPIED,
    ),
]
