"""An accelerated network is the same network, only faster."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_sparse_cl as scl
from lightning_sparse_cl.kernels import choices
from lightning_sparse_cl.optim.sam import perturbed
from lightning_sparse_cl.sparsity import Masks


class Odd(nn.Module):
    """What there are no kernels for, and control flow that cannot be traced."""

    def __init__(self):
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 5, padding=2), nn.Conv2d(8, 8, 3, groups=2),
            nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.Conv2d(8, 12, 3, padding=2, stride=2),
        )  # fmt: skip
        self.last = nn.Linear(12, 5)

    def forward(self, x):
        x = self.convs(x)
        if x.mean() > 1e9:
            x = -x
        return self.last(F.max_pool2d(x, 2).amax((2, 3)))


class Branches(nn.Module):
    """Sums, norms and pools in the orders that fusing must not mistake for others."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, 8, 3, padding=1, bias=i == 3) for i in (3, 8, 8))
        self.norm, self.same = nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False)

    def forward(self, x):
        x = self.a(x)
        y = self.b(self.norm(x).relu())
        y = F.relu(y + x) + y
        z = self.same(self.c(y)) + y
        return F.avg_pool2d(z + z, 2).mean((2, 3))


class InPlace(nn.Module):
    """A sum with what an in-place ReLU has changed."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.a(x)
        y = self.b(self.relu(x))
        return (y + x).mean((2, 3))


class Shared(nn.Module):
    """One layer called twice, and one weight in two layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8))
        self.linear, self.tied = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.linear.weight

    def forward(self, x):
        x = self.c(self.b(self.b(self.a(x)).relu()))
        return self.tied(self.linear(x.mean((2, 3))))


NETWORKS = {
    "shared": Shared,
    "in place": InPlace,
    "resnet": lambda: scl.ResNet18(8),
    "vgg": lambda: scl.VGG16(4),
    "cnn": lambda: scl.SmallCNN(8),
    "mlp": lambda: scl.SmallMLP((32, 32)),
    "lenet": lambda: scl.LeNet5(),
    "mobilenet": lambda: scl.MobileNetV2(),
    "odd": Odd,
    "branches": Branches,
}


def network(name, side=16):
    torch.manual_seed(0)
    net = NETWORKS[name]()
    net.eval()(torch.zeros(2, 3, side, side))
    masks = {n: torch.rand_like(p) < 0.3 for n, p in net.named_parameters() if p.ndim > 1}
    with torch.no_grad():
        for n, p in net.named_parameters():
            p.mul_(masks.get(n, 1))
        net.train()(torch.randn(16, 3, side, side))
    return net, masks


def difference(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-9)).item()


def passes(net, x, weights=None):
    """Output, then gradients of input and parameters, of their weighted sum."""
    x = x.detach().clone().requires_grad_()
    out = net(x)
    weights = torch.randn_like(out) if weights is None else weights.to(out)
    parameters = {n: p for n, p in net.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad((out * weights).sum(), [x, *parameters.values()], allow_unused=True)
    return weights, out.detach(), dict(zip(["input", *parameters], grads))


@pytest.mark.parametrize("images", [3, 16, 21])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_compute_what_they_did(name, images):
    net, masks = network(name, side := 32 if name == "mobilenet" else 16)
    exact, plain = copy.deepcopy(net).double(), copy.deepcopy(net)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    scl.accelerate(net, masks, measure=False)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    for training in (True, False, True, False):
        x = torch.randn(images, 3, side, side)
        weights, out, grads = passes(exact.train(training), x.double())
        near = x.to(memory_format=torch.channels_last)  # in which torch's batch-norm is less exact
        _, usual, usual_grads = passes(plain.train(training), near, weights)
        _, ours, our_grads = passes(net.train(training), x, weights)
        assert difference(ours, out) < 1e-5 + 8 * difference(usual, out)
        largest = max(g.norm() for g in grads.values() if g is not None)
        for n, g in grads.items():
            assert (g is None) == (our_grads[n] is None)
            if g is not None:
                alive = masks.get(n, torch.tensor(True))
                error, rounding = ((d[n] - g * alive).norm() for d in (our_grads, {n: usual_grads[n] * alive}))
                assert error < 1e-5 * g.norm() + 8 * rounding + 1e-6 * largest, n
                assert (our_grads[n] * ~alive == 0).all()
        if not training:
            with torch.no_grad():
                assert difference(net(x), out) < 1e-5 + 8 * difference(usual, out)
    for (n, a), b, c in zip(net.named_buffers(), exact.buffers(), plain.buffers()):
        assert difference(a, b) < 1e-5 + 3 * difference(c, b), n  # running statistics and their number
    assert scl.densify(net) is net
    assert torch.equal(net(x), plain.train(training)(x)) or difference(net(x), exact(x.double())) < 1e-4


def train(net, optimizer, steps, before=lambda: None):
    torch.manual_seed(1)
    for _ in range(steps):
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
        own = Masks.of(net)
        for name, mask in masks.items():
            own.set_alive(name, mask)
        optimizer = make(net.parameters())
        own.enforce(optimizer)
        before = lambda: None  # noqa: E731
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
    net, masks = network("resnet")
    own, optimizer = Masks.of(net), torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
    for name, mask in masks.items():
        own.set_alive(name, mask)
    own.enforce(optimizer)
    found = scl.accelerate(net, own, [optimizer], measure=False)
    train(net, optimizer, 2, found.train_compact)  # there is momentum now
    names = list(masks)[2:5]
    frozen = {name: torch.rand(masks[name].shape) < 0.5 for name in names}
    own.set_frozen(names[0], frozen[names[0]])
    own.set_updated(names[1], ~frozen[names[1]])
    own.set_frozen(names[2], frozen[names[2]])
    before = {name: net.get_parameter(name).detach().clone() for name in names}
    train(net, optimizer, 3, found.train_compact)
    assert found.compact is not None
    for name in names:
        after = net.get_parameter(name)
        assert torch.equal(after[frozen[name]], before[name][frozen[name]])
        moved = masks[name] & ~frozen[name]
        assert (after[moved] != before[name][moved]).float().mean() > 0.9


def test_masks_are_followed_and_grown_weights_learn():
    net, masks = network("cnn")
    own, optimizer = Masks.of(net), torch.optim.SGD(net.parameters(), 0.1)
    for name, mask in masks.items():
        own.set_alive(name, mask)
    own.enforce(optimizer)
    found = scl.accelerate(net, own, [optimizer], measure=False)
    train(net, optimizer, 1, found.train_compact)
    name = list(masks)[1]
    own.set_alive(name, ~masks[name])
    train(net, optimizer, 1, found.train_compact)
    weight = net.get_parameter(name)
    assert (weight[masks[name]] == 0).all()
    assert (weight[~masks[name]] != 0).float().mean() > 0.2  # the rest sees no image
    own.ask_whole([name])
    train(net, optimizer, 1)
    assert (own.take_whole()[name][masks[name]] != 0).any()  # gradients of pruned weights, for who grows them


def test_a_weight_read_between_the_passes_still_gets_its_gradient():
    net, masks = network("cnn")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    found = scl.accelerate(net, masks, [optimizer], measure=False)
    x = torch.randn(8, 3, 16, 16)
    (net(x) ** 2).mean().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    optimizer.zero_grad()
    found.train_compact()
    loss = (net(x) ** 2).mean()
    penalty = sum((p**2).sum() for p in net.parameters())  # as EWC does
    assert found.compact is None
    (loss + 0 * penalty).backward()
    assert all(torch.allclose(p.grad, e, atol=1e-7) for p, e in zip(net.parameters(), expected))


def test_weights_given_up_inside_sam_are_put_back():
    net, masks = network("cnn")
    sgd = torch.optim.SGD(net.parameters(), 0.0)
    found = scl.accelerate(net, masks, [sgd], measure=False)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    found.train_compact()
    x = torch.randn(8, 3, 16, 16)
    net(x).square().mean().backward()
    with perturbed([p for p in sgd.param_groups[0]["params"] if p.grad is not None], 1.0):
        assert sum(p.norm() for p in net.parameters())  # somebody reads every weight
        assert found.compact is None
    sgd.step()
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters() if n in masks)


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


def test_who_looks_into_the_network_finds_what_torch_computes():
    net, masks = network("cnn")
    scl.accelerate(net, masks, measure=False)
    x, seen = torch.randn(4, 3, 16, 16), []
    other = {n: torch.randn_like(p) for n, p in net.named_parameters()}
    expected = torch.func.functional_call(copy.deepcopy(net), other, x)
    assert torch.equal(torch.func.functional_call(net, other, x), expected)
    hook = next(m for m in net.modules() if isinstance(m, nn.Conv2d)).register_forward_hook(lambda *a: seen.append(a))
    net(x)
    assert len(seen) == 1
    hook.remove()
    net.register_forward_hook(lambda *a: seen.append(a))
    net(x)
    assert len(seen) == 2
    clone = copy.deepcopy(net)
    assert clone._compiled_call_impl is None
    assert type(next(m for m in clone.modules() if isinstance(m, nn.Conv2d))._parameters) is dict


def test_batch_norm_of_one_value_is_refused_as_by_torch():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8))
    scl.accelerate(net, {"0.weight": torch.rand(8, 3, 3, 3) < 0.5}, measure=False)
    net(torch.randn(2, 3, 2, 2))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        net(torch.randn(1, 3, 2, 2))


def test_bad_input_is_refused_or_computed_as_it_was():
    net, masks = network("cnn")
    first = next(iter(masks))
    with pytest.raises(ValueError, match="no weight 'nothing'"):
        scl.accelerate(net, {"nothing": torch.ones(1)})
    with pytest.raises(ValueError, match="has shape"):
        scl.accelerate(net, {first: masks[first][:1]})
    with pytest.raises(ValueError, match="not accelerated"):
        scl.densify(net)
    scl.accelerate(net, masks, measure=False)
    with pytest.raises(ValueError, match="already accelerated"):
        scl.accelerate(net, masks)
    plain, x = copy.deepcopy(net), torch.randn(5, 16, 16, 3).permute(0, 3, 1, 2)
    for given in (x, x[:, :, ::2, ::2].repeat(1, 1, 2, 2).transpose(2, 3)):  # not contiguous
        assert difference(net.eval()(given), plain.eval()(given)) < 1e-5
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(12):
            with torch.autocast("cpu", torch.bfloat16):
                half = net(x)
    assert half.dtype == torch.bfloat16
    assert ["autocast" in str(w.message) for w in said] == [True]
    assert torch.isfinite(net(x)).all()
    scl.densify(net)
    net.compile()
    with pytest.raises(ValueError, match="compiled"):
        scl.accelerate(net, masks)


def test_layers_without_kernels_are_told():
    net, masks = network("odd")
    found = scl.accelerate(net, masks, measure=False)
    assert {n: why.split()[0] for n, why in found.left.items()} == {
        "convs.2": "a", "convs.3": "2", "convs.4": "padding",
    }  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_run_as_a_whole_where_that_is_the_same(name):
    net, masks = network(name, 32)
    parts = [runner.part for runner in scl.accelerate(net, masks)._runners]
    assert (parts == [net]) == (name not in ("odd", "in place"))


class Moody(nn.Module):
    """What tracing would lose."""

    def __init__(self, how):
        super().__init__()
        self.how, self.task, self.calls = how, 0, 0
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        if self.how == "no_grad":
            with torch.no_grad():
                x = self.a(x)
            return self.b(x)
        if self.how == "draws":
            return self.b(self.a(x)) * torch.rand(())
        if self.how == "counts":
            self.calls += 1
        if self.how == "chooses":
            x = x * (1 + self.task)
        return self.b(self.a(x))


@pytest.mark.parametrize("how", ["no_grad", "draws", "counts", "chooses"])
def test_what_tracing_would_lose_is_not_lost(how):
    torch.manual_seed(0)
    net = Moody(how)
    masks = {"a.weight": torch.rand(8, 3, 3, 3) < 0.3, "b.weight": torch.rand(8, 8, 3, 3) < 0.3}
    scl.accelerate(net, masks, measure=False)
    plain, x = copy.deepcopy(net), torch.randn(4, 3, 9, 9)
    for task in (0, 1, 1):
        net.task = plain.task = task
        results = []
        for n in (net, plain):
            torch.manual_seed(task)
            results.append(n(x))
        assert difference(*results) < 1e-5
    assert net.calls == plain.calls
    results[0].sum().backward()
    assert (net.a.weight.grad is None) == (how == "no_grad")


@pytest.mark.parametrize("side", [12, 20, 24, 28])
@pytest.mark.parametrize("images", [1, 2, 3, 9])
def test_any_side_and_small_batches(side, images):
    net, masks = network("resnet", 32)
    plain, x = copy.deepcopy(net).eval(), torch.randn(images, 3, side, side)
    scl.accelerate(net, masks, measure=False)
    with torch.no_grad():
        assert difference(net.eval()(x), plain(x)) < 1e-5


def test_wrong_shapes_are_torchs_errors():
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 8))
    scl.accelerate(net, {"0.weight": torch.ones(8, 4, 3, 3) < 2, "2.weight": torch.rand(8, 8) < 0.5}, measure=False)
    for wrong in (torch.randn(2, 40, 3, 3), torch.randn(2, 3, 3, 3), torch.randn(2, 4, 9, 9), torch.randn(2, 4, 2, 2)):
        with pytest.raises(RuntimeError):
            net(wrong)
    odd = torch.randn(2 * 4 * 9 + 1)[1:].view(2, 4, 3, 3)  # no address that vectors like
    assert torch.isfinite(net(odd)).all()


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


def test_slower_kernels_are_not_used(monkeypatch):
    for times, used in (((1.0, 2.0), True), ((2.0, 1.0), False)):
        net, masks = network("cnn")
        monkeypatch.setattr(choices, "_measure", lambda *_, times=times: times)
        found = scl.accelerate(net, masks)
        net(torch.randn(4, 3, 16, 16)).sum().backward()
        assert set(found.choices.taken.values()) == {used}
        name = list(masks)[1]
        assert (net.get_parameter(name).grad[~masks[name]] == 0).all()  # either way
        again = choices.Choices()
        again.load_state_dict(found.choices.state_dict())
        assert again.taken == found.choices.taken
