"""Inference of an accelerated network in one call: the same outputs, whatever happens to the network between calls."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from exported import PreActivation
from masked_networks import Odd
from torch import nn

import lightning_sparse_cl as scl
from lightning_sparse_cl.acceleration import whole
from lightning_sparse_cl.sparsity import Masks


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each call in one piece."""
    found: list[int] = []
    real = whole.FlatNetwork.__call__
    monkeypatch.setattr(whole.FlatNetwork, "__call__", lambda self, x: found.append(len(x)) or real(self, x))
    return found


def sparse(net: nn.Module, sparsity: float = 0.8) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        net.eval()(torch.randn(2, 3, 16, 16))
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.mul_(torch.rand_like(module.weight) >= sparsity)
    return net


def classifier() -> nn.Module:
    return sparse(nn.Sequential(scl.ResNet18(8), nn.ReLU(), nn.LazyLinear(5)))


def assert_as_dense(net: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        found, wanted = net(x), net._call_impl(x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_from_the_second_call_on(calls: list[int]) -> None:
    net = classifier()
    scl.accelerate(net, measure=False)
    for batch in (1, 3, 16, 1, 3, 16, 7, 7):
        assert_as_dense(net, torch.randn(batch, 3, 16, 16))
    assert calls == [1, 3, 16, 7]
    with torch.inference_mode():
        net(torch.randn(3, 3, 16, 16))
    assert len(calls) == 5
    scl.densify(net)
    assert_as_dense(net, torch.randn(3, 3, 16, 16))
    assert len(calls) == 5


def doubled(net: nn.Module) -> None:
    with torch.no_grad():
        next(net.parameters()).mul_(2)


def moved_statistics(net: nn.Module) -> None:
    next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)).running_mean.add_(0.5)


def loaded(net: nn.Module) -> None:
    net.load_state_dict({k: v * 1.1 if v.is_floating_point() else v for k, v in net.state_dict().items()})


def stepped_by_data(net: nn.Module) -> None:
    """As some optimisers do it: no version is counted."""
    net(torch.randn(2, 3, 16, 16)).sum().backward()
    for parameter in net.parameters():
        parameter.data -= 0.1 * parameter.data


def pruned(net: nn.Module) -> None:
    name = next(n for n, p in net.named_parameters() if p.ndim == 4 and p.shape[2] == 3)
    Masks.of(net).set_alive(name, torch.rand_like(net.get_parameter(name)) > 0.7)
    Masks.of(net).apply_()


def other_numbers(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.5


def without_a_relu(net: nn.Module) -> None:
    net[1] = nn.LeakyReLU(-1.0)


def other_weights(net: nn.Module) -> None:
    net[2].weight = nn.Parameter(torch.randn_like(net[2].weight))


CHANGES = [other_numbers, without_a_relu, other_weights, doubled, moved_statistics, loaded, stepped_by_data, pruned]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_changes_are_followed(change: Callable[[nn.Module], None], calls: list[int]) -> None:
    net, x = classifier(), torch.randn(3, 3, 16, 16)
    scl.accelerate(net, Masks.from_zeros(net), measure=False)
    for _ in range(3):
        assert_as_dense(net, x)
    before = len(calls)
    change(net)
    for _ in range(3):
        assert_as_dense(net, x)
    unknown = change in (without_a_relu, other_weights)  # what the runtime, or the acceleration, does not follow
    assert before == 2 and len(calls) == (2 if unknown else 4)


def test_training_goes_layer_by_layer(calls: list[int]) -> None:
    net, x = classifier(), torch.randn(3, 3, 16, 16)
    scl.accelerate(net, Masks.from_zeros(net), [torch.optim.SGD(net.parameters(), lr=0.1)], measure=False)
    for _ in range(3):
        assert_as_dense(net, x)
    scl.densify(net)
    scl.accelerate(net, in_one_call=False)
    for _ in range(3):
        assert_as_dense(net, x)
    scl.densify(net)
    scl.accelerate(net.train())
    with torch.no_grad():
        for _ in range(3):
            net(x)
    assert not calls


def test_what_the_runtime_does_not_know_falls_back(calls: list[int]) -> None:
    for net in (sparse(Odd()), sparse(nn.Sequential(scl.SmallCNN(8), nn.GELU(), nn.LazyLinear(4)))):
        scl.accelerate(net, measure=False)
        for _ in range(3):
            assert_as_dense(net, torch.randn(3, 3, 16, 16))
    assert not calls
    known = sparse(PreActivation())
    scl.accelerate(known, measure=False)
    for _ in range(3):
        assert_as_dense(known, torch.randn(3, 3, 16, 16))
    assert len(calls) == 2


def test_hooks_see_the_call(calls: list[int]) -> None:
    net, seen = classifier(), []
    scl.accelerate(net, measure=False)
    net.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(3, 3, 16, 16))
    assert len(seen) == 3 and len(calls) == 2
