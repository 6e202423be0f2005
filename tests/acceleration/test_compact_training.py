"""Training the alive values alone is training the weights, and every read of a weight finds it up to date."""

import copy
import gc
import weakref

import pytest
import torch
from masked_networks import difference, enforced, network
from torch import nn
from torch.nn import functional as F

import lightning_sparse_cl as scl
from lightning_sparse_cl.sparsity import Masks


def train(net, optimizer, steps, before=None):
    torch.manual_seed(1)
    for _ in range(steps):
        if before:
            before()
        x, y = torch.randn(16, 3, 16, 16), torch.randint(5, (16,))
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9, weight_decay=1e-3),
        lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9, nesterov=True),
        lambda p: torch.optim.AdamW(p, 1e-4, weight_decay=1e-2),
        lambda p: torch.optim.Adagrad(p, 1e-4),
    ],
)
def test_training_the_alive_values_is_training_the_weights(make):
    runs = []
    for kind in ("plain", "whole", "compact", "woken"):
        net, masks = network("resnet")
        optimizer = make(net.parameters())
        own = enforced(net, masks, optimizer)
        before = None
        if kind != "plain":
            found = scl.accelerate(net, own, [optimizer], measure=False)
            if kind != "whole":
                before = found.train_compact
        train(net, optimizer, 3, before)
        if kind == "compact":
            assert found.compact is not None
            assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) < 0.4 * 700_000
        if kind == "woken":
            copy.deepcopy(net)  # reads every weight
            assert found.compact is None
        train(net, optimizer, 3, before)
        state = [(net.state_dict()[n], optimizer.state[p]) for n, p in net.named_parameters()]
        assert all((p[~masks[n]] == 0).all() for n, p in net.named_parameters() if n in masks)
        runs.append(state)
    for (w, s), (v, t) in zip(runs[1], runs[0]):  # rounding apart
        assert difference(w, v) < 0.01
        assert s.keys() == t.keys()
    for other in runs[2:]:
        for (w, s), (v, t) in zip(other, runs[1]):
            assert torch.equal(w, v)
            assert all(torch.equal(s[k], t[k]) if torch.is_tensor(s[k]) else s[k] == t[k] for k in s)


def test_held_weights_stay_as_they_are_bit_for_bit():
    momenta = []
    for compact in (False, True):
        net, masks = network("resnet")
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
        own = enforced(net, masks, optimizer)
        found = scl.accelerate(net, own, [optimizer], measure=False)
        before_step = found.train_compact if compact else None
        train(net, optimizer, 2, before_step)  # there is momentum now
        names = list(masks)[2:5]
        torch.manual_seed(2)
        frozen = {name: torch.rand(masks[name].shape) < 0.5 for name in names}
        own.set_frozen(names[0], frozen[names[0]])
        own.set_updated(names[1], ~frozen[names[1]])
        own.set_frozen(names[2], frozen[names[2]])
        before = {name: net.get_parameter(name).detach().clone() for name in names}
        train(net, optimizer, 3, before_step)
        assert (found.compact is not None) == compact
        for name in names:
            after = net.get_parameter(name)
            assert torch.equal(after[frozen[name]], before[name][frozen[name]])
            moved = masks[name] & ~frozen[name]
            assert (after[moved] != before[name][moved]).float().mean() > 0.9
        momenta.append([optimizer.state[net.get_parameter(name)]["momentum_buffer"] for name in names])
    assert all(map(torch.equal, *momenta))


def test_masks_are_followed_and_grown_weights_learn():
    net, masks = network("cnn")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    own = enforced(net, masks, optimizer)
    found = scl.accelerate(net, own, [optimizer], measure=False)
    train(net, optimizer, 1, found.train_compact)
    name = list(masks)[1]
    own.set_alive(name, ~masks[name])
    train(net, optimizer, 1, found.train_compact)
    weight = net.get_parameter(name)
    assert (weight[masks[name]] == 0).all()
    assert (weight[~masks[name]] != 0).float().mean() > 0.2  # the rest sees no image
    scl.Enforcement.of(net).ask_whole([name])
    train(net, optimizer, 1)
    assert (
        scl.Enforcement.of(net).take_whole()[name][masks[name]] != 0
    ).any()  # gradients of pruned weights, which growth needs


@pytest.mark.parametrize("followed", [False, True])
def test_weights_that_were_loaded_into_pruned_places_are_gone_after_a_step(followed):
    net, masks = network("cnn")
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    own = enforced(net, masks, sgd) if followed else masks
    found = scl.accelerate(net, own, [sgd], measure=False)
    train(net, sgd, 1, found.train_compact)
    net.load_state_dict({n: t + 1 for n, t in net.state_dict().items()})  # an average of weights, for one
    train(net, sgd, 1, found.train_compact)
    assert found.compact is not None
    assert all((net.get_parameter(n)[~m] == 0).all() for n, m in masks.items())


def test_parameters_that_are_unpacked_are_up_to_date():
    net, masks = network("cnn")
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    found = scl.accelerate(net, masks, [sgd], measure=False)
    found.train_compact()
    net(torch.randn(8, 3, 16, 16)).square().mean().backward()
    sgd.step()
    layer = next(m for m in net.modules() if isinstance(m, nn.Conv2d))
    before = dict.get(layer._parameters, "weight").detach().clone()
    assert not torch.equal({**layer._parameters}["weight"], before)
    assert found.compact is None


def test_frozen_layers_and_states_of_optimisers_stay_whole():
    net, masks = network("cnn")
    net[0].weight.requires_grad_(False)
    before = net[0].weight.clone()
    sgd = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    found = scl.accelerate(net, masks, [sgd], measure=False)
    train(net, sgd, 2, found.train_compact)
    assert found.compact is not None
    shapes = {i: s["momentum_buffer"].shape for i, s in sgd.state_dict()["state"].items()}
    assert shapes == {i: p.shape for i, p in enumerate(net.parameters()) if p.requires_grad}
    assert torch.equal(net[0].weight, before)


def test_values_that_were_given_up_are_freed():
    net, masks = network("cnn")
    sgd = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    found, refs = scl.accelerate(net, masks, [sgd], measure=False), []

    def look():
        found.train_compact()
        refs.extend(map(weakref.ref, (found.compact, *(layer.compact for layer in found.compact.layers))))

    train(net, sgd, 2, look)
    copy.deepcopy(net)  # reads every weight
    train(net, sgd, 1)
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)


def test_layers_that_torch_computes_faster_are_trained_compact_until_the_step():
    net, masks = network("cnn")
    net.append(nn.Linear(net.eval()(torch.zeros(1, 3, 16, 16)).shape[1], 5)).train()
    masks[f"{len(net) - 1}.weight"] = torch.rand_like(net[-1].weight) < 0.3
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    found = scl.accelerate(net, masks, [sgd], measure=False)
    x, gradients = torch.randn(8, 3, 16, 16), []
    for sparse in (True, False):
        found.choices.sparse = lambda layer, x, sparse=sparse: sparse
        sgd.zero_grad()
        found.train_compact()
        net(x).square().mean().backward()
        assert found.compact is not None
        gradients.append([p.grad.clone() for group in sgd.param_groups for p in group["params"]])
    assert all(difference(a, b) < 1e-5 for a, b in zip(*gradients))


def test_evaluation_with_frozen_batch_norm_uses_the_weights_of_now():
    results = []
    for compact in (False, True):
        net, masks = network("cnn")
        net.eval()
        sgd, seen = torch.optim.SGD([net.get_parameter(n) for n in masks], 0.5), []
        found = scl.accelerate(net, masks, [sgd], measure=False)
        torch.manual_seed(1)
        for _ in range(6):
            for _ in range(2):
                if compact:
                    found.train_compact()
                (net(torch.randn(8, 3, 16, 16)) - 1).square().mean().backward()
                sgd.step()
                sgd.zero_grad()
            with torch.no_grad():
                seen.append(net(torch.ones(8, 3, 16, 16)))
            assert net[0].weight.norm()  # one weight is read
        results.append(seen)
    assert all(difference(a, b) < 1e-3 for a, b in zip(*results))


def test_two_parts_with_one_set_of_masks_and_masks_enforced_later():
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Sequential(nn.Conv2d(i, 8, 3, padding=1), nn.ReLU()) for i in (3, 8)))
    own, sgd = Masks.of(net), torch.optim.SGD(net.parameters(), 0.01)
    for part in net:
        name = f"{part is net[1]:d}.0.weight"
        own.set_alive(name, torch.rand_like(part[0].weight) < 0.3)
    parts = [scl.accelerate(part, own, [sgd], measure=False) for part in net]
    for found in parts:
        found.train_compact()
    scl.enforce(net, sgd)  # reads the weights
    for _ in range(2):
        for found in parts:
            found.train_compact()
        net(torch.randn(4, 3, 8, 8)).square().mean().backward()
        sgd.step()
        assert all(found.compact is not None for found in parts)
    for part in net:
        scl.densify(part)
    net(torch.randn(4, 3, 8, 8)).square().mean().backward()
    assert not any(net.get_parameter(name).grad[~mask].any() for name, mask in own.alive.items())


def test_parameter_groups_made_anew():
    net, masks = network("cnn")
    sgd = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    found = scl.accelerate(net, masks, [sgd], measure=False)
    train(net, sgd, 1, found.train_compact)
    layer = found.compact.layers[0]
    trained = layer.compact.detach().clone()
    sgd.param_groups.clear()
    sgd.add_param_group({"params": list(net.parameters()), **sgd.defaults})
    assert torch.equal(layer.pattern.gather(net.get_parameter(f"{layer.name}.weight").detach()), trained)
    shapes = {i: s["momentum_buffer"].shape for i, s in sgd.state_dict()["state"].items()}
    assert shapes == {i: p.shape for i, p in enumerate(net.parameters())}


def test_values_are_not_kept_without_a_step_nor_for_two_optimisers_or_other_types():
    net, masks = network("cnn")
    first, second = torch.optim.SGD(net.parameters(), 0.01), torch.optim.SGD([net[0].weight], 0.01)
    weight, trained = net[0].weight, first.param_groups[0]["params"]
    found, refs = scl.accelerate(net, masks, [first, second], measure=False), []
    for _ in range(3):
        found.train_compact()
        assert trained[0] is weight and any(p.ndim == 1 and p.numel() > 100 for p in trained)
        refs.append(weakref.ref(found.compact))
        net.state_dict()
    assert [ref() for ref in refs] == [None] * 3
    net.half()
    found.train_compact()
    assert found.compact is None
    scl.densify(net)
    with pytest.raises(ValueError, match="not accelerated any more"):
        found.train_compact()
    with pytest.raises(ValueError, match="not accelerated"):
        scl.densify(found)
