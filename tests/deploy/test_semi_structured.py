"""Networks of 2:4 sparsity for tensor cores: which layers are, and the products on a device that has them."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.deploy.semi_structured import two_of_four


def network() -> nn.Module:
    """Trained with two of four weights alive in its inner layer."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 64), torch.arange(64) % 4
    backbone = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
    policies = [scl.RigL(0.5, interval=3, block="2:4")]
    module = scl.ContinualModule(backbone, optimizer=partial(SGD, lr=0.05), policies=policies)
    trainer(epochs=2).fit(module, scl.SplitTensors((x, y), (x, y), num_tasks=2, batch_size=16))
    return module.backbone


def test_layers_of_two_of_four_are_found_and_a_cpu_is_refused():
    net = network()
    assert [name for name, _ in two_of_four(net)] == ["2"]
    with pytest.raises(ValueError, match=r"to_semi_structured: 2.weight is torch.float32 on cpu; it must be"):
        scl.to_semi_structured(net)
    with pytest.raises(ValueError, match="no linear layer of Sequential with sides of multiples of 64"):
        scl.to_semi_structured(nn.Sequential(nn.Linear(64, 64), nn.Linear(60, 64)))
    with pytest.raises(ValueError, match=r"to_semi_structured: Tensor is no nn\.Module"):
        scl.to_semi_structured(torch.zeros(64, 64))
    layer = nn.Linear(64, 64)
    layer.weight.data.unflatten(1, (-1, 4))[:, :, 0] = 0  # three of four
    assert not list(two_of_four(layer))
    layer.weight.data.unflatten(1, (-1, 4))[:, :, 2] = 0
    assert len(list(two_of_four(layer))) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_products_are_those_of_the_network():
    net = network().cuda().half()
    x = torch.randn(128, 64, device="cuda", dtype=torch.float16)
    made = scl.to_semi_structured(net)
    assert type(made[2].weight.data).__name__.startswith("SparseSemiStructured")
    assert type(net[2].weight.data) is torch.Tensor
    torch.testing.assert_close(made(x), net(x), rtol=1e-2, atol=1e-2)
