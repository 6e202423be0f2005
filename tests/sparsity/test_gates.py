"""The masks of CL-LSG: the right probabilities, a gradient in both states, and sizes that are counted, not computed."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_sparse_cl import VGG16, GrowthGates, LeNet5, ResNet18, SmallCNN, SmallImageMobileNetV2
from lightning_sparse_cl.sparsity.gates import binary_concrete


@pytest.mark.parametrize("m", [-4.0, 0.0, 4.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_mask_is_on_with_probability_sigma_of_m(m, temperature):
    torch.manual_seed(0)
    n = 100_000
    real = torch.full((n,), m, requires_grad=True)
    drawn = binary_concrete(real, temperature)
    assert set(drawn.unique().tolist()) <= {0.0, 1.0}
    p = torch.tensor(m).sigmoid().item()
    assert abs(drawn.mean().item() - p) < 3 * (p * (1 - p) / n) ** 0.5
    drawn.sum().backward()
    for state in (0.0, 1.0):
        assert (real.grad[drawn == state] > 0).float().mean() > 0.98  # the rest is below the precision of a float


# Weights of the seed, 1/8 of the channels, of networks as the papers have them (CL-LSG's tables; golden).
@pytest.mark.parametrize(
    ("make", "seed", "whole", "head"),
    [(VGG16, 524_952, 33_584_832, 0), (LeNet5, 45_050, 2_986_500, 0), (ResNet18, 174_872, 11_161_792, 5)],
)
def test_the_seed_of_the_papers_networks(make, seed, whole, head):
    with torch.device("meta"):
        backbone = make().eval()
        features = backbone(torch.zeros(1, 3, 32, 32)).shape[1]
        network = nn.Sequential(backbone, nn.Linear(features, 5))
    network = network.to_empty(device="cpu")
    gates = GrowthGates(0.125)
    gates.build(network)
    kernels = list(gates.allocated_kernels())[: None if head else -1]
    weights = {n: p for n, p in network.named_parameters() if n in kernels}
    counted = 0
    for name, weight in weights.items():  # by brute force, entry by entry of the mask as broadcast to the weight
        mask = gates.allocated_kernels()[name]
        counted += int(mask.view(*mask.shape, *[1] * (weight.ndim - 2)).expand_as(weight).sum())
    assert (counted, sum(w.numel() for w in weights.values())) == (seed, whole)
    assert round(524_952 / 33_584_832, 4) == 0.0156


def network_and_gates(**kwargs):
    torch.manual_seed(0)
    network = nn.Sequential(ResNet18(8), nn.Linear(64, 4)).eval()
    network(torch.zeros(1, 3, 8, 8))
    gates = GrowthGates(0.25, **kwargs)
    gates.build(network)
    return network, gates


def test_what_is_not_grown_has_no_effect_whatever_its_weights_and_batch_norm():
    network, gates = network_and_gates()
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.bias)
    x = torch.randn(4, 3, 8, 8)
    before = functional_call(network, gates.weights(network), (x,))
    for name, allocated in gates.allocated_kernels().items():
        weight = network.get_parameter(name)
        off = ~allocated.view(*allocated.shape, *[1] * (weight.ndim - 2)).expand_as(weight)
        weight.data[off] = 1e3
    torch.testing.assert_close(functional_call(network, gates.weights(network), (x,)), before)
    gates.growing.fill_(True)
    assert not torch.allclose(functional_call(network, gates.weights(network), (x,)), before, atol=1.0)


def test_kernels_are_owned_released_or_grown():
    network, gates = network_and_gates(kernel_init=0.5, channel_init=0.5)
    name, i = gates.names[1], 1
    owned = torch.zeros_like(network.get_parameter(name), dtype=torch.bool)
    owned[0, 0, 1, 1] = True  # one entry owns the kernel
    gates.begin({name: owned})
    gates.eval()
    assert gates.masks()[name][:2, :2].tolist() == [[1, 1], [1, 1]]
    with torch.no_grad():
        gates.kernel[i][0, 0] = -1.0  # selective: the owned kernel off
        gates.kernel[i][1, 1] = -1.0  # released: no mask on it
        gates.kernel[i][2, 2] = -1.0  # attentive: of a grown channel, off
    assert gates.masks()[name][:3, :3].tolist() == [[0, 1, 0], [1, 1, 0], [0, 0, 0]]
    gates.growing.fill_(True)
    assert gates.masks()[name][:3, :3].tolist() == [[0, 1, 1], [1, 1, 1], [1, 1, 0]]
    with torch.no_grad():
        gates.channel[gates.channels.writes["0.stages.0.0.conv1"]][2] = -1.0
    assert gates.masks()[name][:3, :3].tolist() == [[0, 1, 1], [1, 1, 1], [0, 0, 0]]
    for flag, want in (("selective", (1, 1, 0)), ("retrain", (0, 0, 0)), ("attentive", (0, 1, 1))):
        setattr(gates, flag, False)
        with torch.no_grad():
            gates.channel[gates.channels.writes["0.stages.0.0.conv1"]][2] = 1.0
        mask = gates.masks()[name]
        assert (int(mask[0, 0]), int(mask[1, 1]), int(mask[2, 2])) == want, flag
        setattr(gates, flag, True)
    allocated = int(gates.allocated(gates.channels.writes["0.stages.0.0.conv1"]).sum())
    gates.finish()
    assert int(gates.allocated(gates.channels.writes["0.stages.0.0.conv1"]).sum()) == 8 > allocated


def test_the_seed_is_the_first_tasks_to_train_whatever_becomes_of_released_kernels():
    _, gates = network_and_gates(retrain=False)
    gates.eval()
    assert all(torch.equal(gates.masks()[n] > 0, gates.allocated_kernels()[n]) for n in gates.names)
    gates.begin({name: torch.zeros_like(kernels) for name, kernels in gates.allocated_kernels().items()})
    assert not any(gates.masks()[name].any() for name in gates.names)


def test_the_penalty_is_the_expected_number_of_grown_channels():
    _, gates = network_and_gates()
    assert float(gates.expected_size()) == 0
    gates.growing.fill_(True)
    candidates = sum(int((~gates.allocated(s)).sum()) for s in range(len(gates.channel)))
    assert float(gates.expected_size()) == pytest.approx(candidates / 2) and candidates > 0


def test_bad_input_is_named():
    for kwargs in ({"seed": 0}, {"seed": 1.5}, {"penalty": -1}, {"temperature": 0}):
        with pytest.raises(ValueError, match=rf"GrowthGates\({next(iter(kwargs))}="):
            GrowthGates(**kwargs)
    network = nn.Sequential(SmallImageMobileNetV2(0.25), nn.LazyLinear(4)).eval()
    network(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="is a depthwise convolution"):
        GrowthGates().build(network)


def test_a_small_network_reads_several_values_of_a_channel():
    network = nn.Sequential(SmallCNN(8), nn.LazyLinear(4)).eval()
    x = torch.randn(2, 1, 8, 8)
    network(x)
    gates = GrowthGates(0.5)
    gates.build(network)
    assert gates.masks()[gates.head].shape == (1, 64)
    assert functional_call(network, gates.weights(network), (x,)).shape == (2, 4)
