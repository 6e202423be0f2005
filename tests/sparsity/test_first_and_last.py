"""Which layers stay dense by default."""

import copy

from torch import nn

from lightning_sparse_cl import sparse_weights


def test_the_last_layer_is_the_last_that_is_trained():
    """A copy that follows by momentum often stands behind what it follows."""
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    module = nn.ModuleDict({"online": network, "target": copy.deepcopy(network).requires_grad_(False)})
    assert sparse_weights(module) == ["online.1.weight"]
