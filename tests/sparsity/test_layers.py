"""Which weights are pruned by default, by pattern and by type; and which are refused."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from lightning_sparse_cl import Masks, sparse_weights


def part(network, **kwargs):
    """Of the weights with two or more dimensions, the part that is pruned."""
    names = sparse_weights(network, **kwargs)
    matrices = {n: p.numel() for n, p in network.named_parameters() if p.ndim > 1}
    return sum(matrices[n] for n in names) / sum(matrices.values())


@pytest.mark.parametrize(
    ("make", "least"),
    [
        (torchvision.models.efficientnet_b0, 0.7),  # its head is a quarter of it
        (torchvision.models.mobilenet_v3_small, 0.5),
        (torchvision.models.convnext_tiny, 0.95),
        (lambda: torchvision.models.mobilenet_v2(num_classes=10), 0.97),
        (lambda: torchvision.models.vit_b_16(num_classes=10), 0.97),
        (lambda: torchvision.models.swin_t(num_classes=10), 0.97),
        (lambda: torchvision.models.resnet50(num_classes=10), 0.87),
        (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4), 4), 0.8),
    ],
)
def test_the_default_prunes_real_networks(make, least):
    with torch.device("meta"):
        assert part(make()) > least


def test_the_default_keeps_stem_head_and_shortcuts_of_a_resnet():
    with torch.device("meta"):
        network = torchvision.models.resnet50()
    names = sparse_weights(network)
    dense = [n for n, p in network.named_parameters() if p.ndim > 1 and n not in names]
    assert dense == ["conv1.weight", *(f"layer{i}.0.downsample.0.weight" for i in (1, 2, 3, 4)), "fc.weight"]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.lstm = nn.LSTM(8, 16, 2)
        self.attention = nn.MultiheadAttention(16, 2)
        self.head = nn.Linear(16, 3)


def test_weights_by_pattern_and_type():
    network = Recurrent()
    recurrent = [f"lstm.weight_{kind}_l{i}" for i in (0, 1) for kind in ("ih", "hh")]
    attention = ["attention.in_proj_weight", "attention.out_proj.weight"]
    assert sparse_weights(network) == [*recurrent, *attention]
    assert sparse_weights(network, sparse=["Embedding"]) == sparse_weights(network, sparse=[nn.Embedding])
    assert sparse_weights(network, sparse=["embedding.weight", "LSTM"]) == ["embedding.weight", *recurrent]
    assert sparse_weights(network, dense=[nn.LSTM]) == [*attention, "head.weight"]
    assert sparse_weights(network, dense=["lstm.*", "head.weight"]) == attention
    with pytest.raises(ValueError, match=r"sparse='GRU' matches none of the weights: embedding\.weight, lstm"):
        sparse_weights(network, sparse=["GRU"])


def test_other_layers_with_a_matrix_as_weight_are_pruned():
    class Conv1D(nn.Module):  # as transformers has it
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

    network = nn.Sequential(Conv1D(), Conv1D(), nn.LayerNorm(8), Conv1D())
    assert sparse_weights(network) == ["1.weight"]


def test_weights_that_are_not_trained_are_left_alone_unless_named():
    network = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    network[1].weight.requires_grad_(False)
    assert sparse_weights(network) == ["2.weight"]
    assert sparse_weights(network, dense=[]) == ["0.weight", "2.weight", "3.weight"]
    assert sparse_weights(network, sparse=["1.weight", "3.weight"]) == ["1.weight", "3.weight"]


def test_a_weight_of_several_layers_has_one_name_and_one_mask():
    network = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(5)))
    network[3].weight = network[1].weight
    assert sparse_weights(network) == ["1.weight", "2.weight"]
    assert sparse_weights(network, dense=["3.weight"]) == ["0.weight", "2.weight", "4.weight"]
    masks = Masks.of(network)
    mask = torch.rand(8, 8) < 0.5
    masks.set_alive("3.weight", mask)
    assert list(masks) == ["1.weight"] and torch.equal(masks.record("1.weight").alive, mask)
    assert masks.record("3.weight") is masks.record("1.weight")
    assert list(Masks.of(network[3])) == ["weight"]
    masks.load_state_dict({"alive": {"3.weight": ~mask}})
    assert torch.equal(masks.alive["1.weight"], ~mask) and len(masks) == 1


FORMS = {
    "parametrize": lambda layer: parametrizations.weight_norm(layer),
    "spectral norm": lambda layer: parametrizations.spectral_norm(layer),
    "old weight_norm": lambda layer: weight_norm(layer),
    "old spectral_norm": lambda layer: nn.utils.spectral_norm(layer),
    "torch.nn.utils.prune": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore")
def test_a_reparametrised_layer_is_refused_by_name_and_may_stay_dense(form):
    network = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    FORMS[form](network[1])
    with pytest.raises(ValueError, match=r"^1\.weight is reparametrised by .*dense=\[\.\.\., '1\.weight'\]$"):
        sparse_weights(network)
    assert sparse_weights(network, dense=["0.*", "1.*", "3.*"]) == ["2.weight"]
