"""An accelerated network is the same network, only faster."""

import copy
import warnings
from itertools import product

import pytest
import torch
from masked_networks import NETWORKS, difference, network
from torch import nn

import lightning_sparse_cl as scl
from lightning_sparse_cl.acceleration import choices


def passes(net, x, weights=None):
    """Output, then gradients of input and parameters, of their weighted sum."""
    x = x.detach().clone().requires_grad_()
    out = net(x)
    weights = torch.randn_like(out) if weights is None else weights.to(out)
    parameters = {n: p for n, p in net.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad((out * weights).sum(), [x, *parameters.values()], allow_unused=True)
    return weights, out.detach(), dict(zip(["input", *parameters], grads))


SLOW = [("mobilenet", 16), ("mobilenet", 21)]


@pytest.mark.parametrize(
    ("name", "images"),
    [pytest.param(*c, marks=[pytest.mark.slow] if c in SLOW else []) for c in product(NETWORKS, (3, 16, 21))],
)
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
                # Both round; where gradients explode, as in a deep network at its start, one up to ten times as much.
                assert error < 1e-5 * g.norm() + 20 * rounding + 1e-6 * largest, n
                assert (our_grads[n] * ~alive == 0).all()
        if not training:
            with torch.no_grad():
                assert difference(net(x), out) < 1e-5 + 8 * difference(usual, out)
    for (n, a), b, c in zip(net.named_buffers(), exact.buffers(), plain.buffers()):
        assert difference(a, b) < 1e-5 + 3 * difference(c, b), n  # running statistics and their number
    assert scl.densify(net) is net
    assert torch.equal(net(x), plain.train(training)(x)) or difference(net(x), exact(x.double())) < 1e-4


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


def test_layers_that_are_changed_later_compute_what_they_say_then():
    net, masks = network("resnet")
    scl.accelerate(net, masks, measure=False)
    plain, batches = copy.deepcopy(net), [torch.randn(8, 3, 16, 16) for _ in range(3)]
    for n in (net, plain):
        n.train()(batches[0])
        torch.optim.swa_utils.update_bn(batches, n)  # for it, batch-norm has no momentum
    for (name, a), b in zip(net.named_buffers(), plain.buffers()):
        assert difference(a, b) < 1e-5, name
    for n in (net, plain):
        next(m for m in n.modules() if isinstance(m, nn.Conv2d)).dilation = (2, 2)
    assert difference(net.eval()(batches[0]), plain.eval()(batches[0])) < 1e-5


def test_bad_input_is_refused_or_computed_as_it_was():
    net, masks = network("cnn")
    first = next(iter(masks))
    with pytest.raises(ValueError, match="no weight 'nothing'"):
        scl.accelerate(net, {"nothing": torch.ones(1)})
    with pytest.raises(ValueError, match="masks=list"):
        scl.accelerate(net, list(masks.values()))
    with pytest.raises(ValueError, match="has shape"):
        scl.accelerate(net, {first: masks[first][:1]})
    for bad, message in (
        (torch.full_like(net.get_parameter(first), 0.5), "other than 0 and 1"),
        (masks[first].numpy(), "is a ndarray"),
        (masks[first].to("meta"), "is a tensor on meta"),
    ):
        before = net.get_parameter(first).detach().clone()
        with pytest.raises(ValueError, match=message):
            scl.accelerate(net, masks | {list(masks)[-1]: torch.zeros_like(masks[list(masks)[-1]]), first: bad})
        assert torch.equal(net.get_parameter(first), before) and net.get_parameter(list(masks)[-1]).any()
    nothing, sgd = {first: torch.zeros_like(masks[first])}, torch.optim.SGD(net.parameters(), 0.1)
    with pytest.raises(ValueError, match="optimizers=SGD"):
        scl.accelerate(net, nothing, sgd)
    with pytest.raises(ValueError, match=r"parts=\[\]"):
        scl.accelerate(net, nothing, [sgd], parts=[])
    assert torch.equal(net.get_parameter(first), before)
    with pytest.raises(ValueError, match="no 'nowhere'"):
        scl.accelerate(net, masks, parts=["nowhere"])
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
            assert torch.isfinite(net(x)).all()
            with pytest.raises(RuntimeError, match="type"):
                net(x.double())
    assert ["float64 on cpu and not" in str(w.message) for w in said] == [True]
    assert torch.isfinite(net(x)).all()
    scl.densify(net)
    net.compile()
    with pytest.raises(ValueError, match="compiled"):
        scl.accelerate(net, masks)


def test_layers_without_kernels_are_told():
    net, masks = network("odd")
    told = r"no kernels for convs.2 \(.*5x5.*\), convs.3 \(2 groups\), convs.4 \(padding.*\); these layers are run"
    with pytest.warns(match=told) as said:
        found = scl.accelerate(net, masks, measure=False)
    assert len(said) == 1 and list(found.left) == ["convs.2", "convs.3", "convs.4"]
    scl.densify(net)
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    with pytest.warns(match=told):
        scl.accelerate(net, optimizers=[sgd], measure=False)
    net(torch.randn(4, 3, 16, 16)).square().mean().backward()
    sgd.step()
    assert not any(net.get_parameter(name)[~mask].any() for name, mask in masks.items())  # kept zero all the same
    only = nn.Sequential(nn.Conv2d(3, 8, 5), nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)))
    scl.densify(scl.accelerate(only))
    with pytest.warns(match="5x5"):
        scl.accelerate(only, {"0.weight": torch.rand(8, 3, 5, 5) < 0.5})
    scl.densify(only)


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
