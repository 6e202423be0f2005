"""Activity of units by hand, the smallest active set, and connections between sets."""

import pytest
import torch
from torch import nn

import lightning_sparse_cl as scl
from lightning_sparse_cl.sparsity.channels import Channels
from lightning_sparse_cl.sparsity.units import connections, most_active


@pytest.mark.parametrize(("share", "count"), [(0.75, 3), (0.7, 2), (0.4, 1), (1.0, 4), (0.0, 1)])
def test_the_smallest_set_that_has_the_share(share, count):
    assert most_active(torch.tensor([2.0, 4.0, 1.0, 3.0]), share).nonzero().squeeze(1).tolist() == sorted(
        [1, 3, 0, 2][:count]
    )


def test_a_layer_without_activity_has_one_unit():
    assert int(most_active(torch.zeros(5), 0.9).sum()) == 1


def test_activity_is_the_mean_of_what_readers_read():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(),
    )  # fmt: skip
    network = nn.Sequential(*network[:5], nn.ReLU(), nn.Linear(5, 2))
    x, channels = torch.randn(7, 2, 4, 4), Channels.of(network)
    with scl.UnitActivity(network, channels) as activity:
        network(x[:3])
        network(x[3:])
    network(x)  # outside the block nothing is counted
    means, pooled = activity.means(), network[:3](x)
    torch.testing.assert_close(means[channels.reads["0"]], x.double().abs().mean((0, 2, 3)))
    torch.testing.assert_close(means[channels.reads["4"]], pooled.double().mean((0, 2, 3)))
    torch.testing.assert_close(means[channels.reads["6"]], network[:6](x).double().mean(0))
    assert not means[channels.output].any()


def test_connections_lead_from_channels_to_units_of_a_linear_layer():
    network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(8, 3))
    channels = Channels.of(network)
    units = [torch.ones(n, dtype=torch.bool) for n in channels.sizes]
    units[channels.writes["0"]] = torch.tensor([False, True])
    units[channels.writes["2"]] = torch.tensor([True, False, True])
    found = connections(channels, "2.weight", network[2].weight, units, units)
    assert found.int().tolist() == [[0, 0, 0, 0, 1, 1, 1, 1], [0] * 8, [0, 0, 0, 0, 1, 1, 1, 1]]
    found = connections(channels, "0.weight", network[0].weight, units, units)
    assert found.flatten(1).all(1).tolist() == [False, True] and found.flatten(1).any(1).tolist() == [False, True]


def test_a_depthwise_kernel_connects_a_channel_to_itself():
    network = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1))
    channels = Channels.of(network)
    chosen = [torch.ones(n, dtype=torch.bool) for n in channels.sizes]
    chosen[channels.along["1"]] = torch.tensor([True, False, True, False])
    others = [~units for units in chosen]
    weight = network[1].weight
    assert connections(channels, "1.weight", weight, chosen, chosen)[:, 0, 0, 0].tolist() == [True, False, True, False]
    assert not connections(channels, "1.weight", weight, chosen, others).any()
