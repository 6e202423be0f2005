"""Kernels and ``torch.compile``: what is compiled already is refused, what is compiled later computes the same."""

import copy

import pytest
import torch
from masked_networks import difference, enforced, network
from torch import nn

import lightning_sparse_cl as scl


class Net(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.other = inner, nn.Linear(5, 5)

    def forward(self, x):
        return self.inner(x)


class Decorated(Net):
    forward = torch.compile(Net.forward, backend="eager")


def compiled(module):
    return torch.compile(module, backend="eager")


def by_method(module):
    module.compile(backend="eager")
    return module


def forward_compiled(module):
    module.forward = compiled(module.forward)
    return module


BEFORE = {
    "wrapped": (lambda net: compiled(Net(net)), "it is compiled"),
    "wrapped inside": (lambda net: Net(compiled(net)), "its 'inner' is compiled"),
    "its compile()": (lambda net: by_method(Net(net)), "it is compiled"),
    "compile() of a layer": (lambda net: (by_method(net[0]), Net(net))[1], "its 'inner.0' is compiled"),
    "its forward": (lambda net: forward_compiled(Net(net)), "it is compiled"),
    "its class": (Decorated, "it is compiled"),
    "scripted": (lambda net: torch.jit.script(net), "it is compiled"),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("way", BEFORE)
def test_what_is_compiled_is_refused_in_one_line(way):
    make, told = BEFORE[way]
    net = make(network("cnn")[0])
    before, weight = [m._compiled_call_impl for m in net.modules()], next(net.parameters()).detach().clone()
    with pytest.raises(ValueError, match=told) as error:
        scl.accelerate(net, measure=False)
    assert "\n" not in str(error.value)
    assert [m._compiled_call_impl for m in net.modules()] == before
    assert all(type(m._parameters) is dict for m in net.modules()) or way == "scripted"
    assert torch.equal(weight, next(net.parameters()))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_compiled_modules_beside_the_parts_are_no_hindrance():
    inner, masks = network("cnn")
    net = Net(inner)
    net.teacher = compiled(copy.deepcopy(inner))
    net.activation = torch.jit.script(nn.ReLU())
    found = scl.accelerate(net, {f"inner.{n}": m for n, m in masks.items()}, parts=["inner"], measure=False)
    assert [runner.part for runner in found._runners] == [inner]


AFTER = {
    "wrapped": compiled,
    "its compile()": by_method,
    "compile() of a layer": lambda net: (by_method(net[0]), net)[1],
    "its forward": forward_compiled,
    "code around it": lambda net: compiled(lambda x: net(x)),
    "code around that reads weights": lambda net: compiled(lambda x: net(x) + 0 * net[0].weight.sum()),
}


@pytest.mark.filterwarnings("ignore:accelerate. SmallCNN was compiled later")
@pytest.mark.parametrize("masks_move", [False, True])
@pytest.mark.parametrize("way", AFTER)
def test_what_is_compiled_later_trains_the_same(way, masks_move):
    results = []
    for compile_ in (lambda net: net, AFTER[way]):
        torch._dynamo.reset()
        net, masks = network("cnn")
        sgd = torch.optim.SGD(net.parameters(), 0.01, momentum=0 if masks_move else 0.9)
        own = enforced(net, masks, sgd) if masks_move else masks
        found = scl.accelerate(net, own, [sgd], measure=False)
        call, name = net, list(masks)[1]
        torch.manual_seed(1)
        for step in range(4):
            if step == (not masks_move):
                call = compile_(net)
            found.train_compact()
            if masks_move and step == 2:  # the call finds that they have
                own.set_alive(name, torch.rand_like(net.get_parameter(name)) < 0.3)
            sgd.zero_grad()
            call(torch.randn(8, 3, 16, 16)).square().mean().backward()
            sgd.step()
        scl.densify(found)
        results.append([p.detach().clone() for p in net.parameters()])
    assert all(difference(a, b) < 1e-4 for a, b in zip(*results))


def test_a_module_that_is_compiled_later_is_told_once_and_stays_compiled():
    net, masks = network("cnn")
    found = scl.accelerate(net, masks, [torch.optim.SGD(net.parameters(), 0.01)], measure=False)
    by_method(net)
    own = net._compiled_call_impl
    with pytest.warns(UserWarning, match="SmallCNN was compiled later") as told:
        for _ in range(3):
            found.train_compact()
    assert len(told) == 1 and found.compact is None
    scl.densify(found)
    assert net._compiled_call_impl is own
