"""Under autocast the kernels take their layers, too: types are torch's, and errors no larger."""

import copy
import warnings
from functools import partial

import pytest
import torch
from masked_networks import NETWORKS, network
from torch import nn
from torch.optim import SGD
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.acceleration.program import Program
from lightning_sparse_cl.demos import toy_tasks


def halved(run, x):
    with torch.autocast("cpu", torch.bfloat16):
        return run(x)


def error(found, exact):
    return float((found.detach().double() - exact).norm())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "mobilenet"])
def test_types_are_those_of_torch_and_errors_no_larger(name, training):
    net, masks = network(name)
    exact, plain = copy.deepcopy(net).double().train(training), copy.deepcopy(net).train(training)
    scl.accelerate(net.train(training), masks, measure=False)
    x = torch.randn(9, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(12):
            ours = halved(net, x)
    usual, wanted = halved(plain, x), exact(x.double())
    assert ours.dtype == usual.dtype
    assert error(ours, wanted) <= 1.2 * error(usual, wanted) + 1e-2 * float(wanted.norm())
    weights = torch.randn_like(wanted)
    grads = {}
    for key, out, of in (("ours", ours, net), ("usual", usual, plain), ("exact", wanted, exact)):
        parameters = [p for n, p in of.named_parameters() if n in masks]
        grads[key] = torch.autograd.grad((out * weights.to(out.dtype)).sum(), parameters)
    off = {key: 0.0 for key in ("ours", "usual")}
    for mask, *each in zip(masks.values(), *grads.values(), strict=True):
        found, usual_grad, right = (g * mask for g in each)
        assert (each[0] * ~mask == 0).all()
        off["ours"] += error(found, right) ** 2
        off["usual"] += error(usual_grad, right) ** 2
    assert off["ours"] <= 2 * off["usual"]
    with torch.no_grad():
        for _ in range(3):  # the later ones of a network that is still may be one call
            again = halved(net, x)
            assert again.dtype == usual.dtype
            assert error(again, wanted) <= 1.2 * error(usual, wanted) + 1e-2 * float(wanted.norm())
            assert net(x).dtype == torch.float32


@pytest.mark.parametrize("compact", [True, False])
def test_a_run_in_bf16_mixed_uses_the_kernels_and_holds_its_masks(compact):
    class Count(scl.TaskCallback):
        calls = 0

        def on_train_batch_end(self, trainer, pl_module, *_):
            for name, mask in scl.Masks.of(pl_module).alive.items():
                weight = dict(pl_module.named_parameters())[name]
                if weight.shape == mask.shape:
                    assert not weight[~mask].any()
            Count.calls += 1

    policies = [scl.RigL(0.7, interval=5), scl.SparseAcceleration(measure=False), *([] if compact else [Count()])]
    module = scl.ContinualModule(
        scl.SmallCNN(16), scl.ER(30, 8), optimizer=partial(SGD, lr=0.05, momentum=0.9), policies=policies
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*run as it is.*")
        trainer(epochs=4, precision="bf16-mixed").fit(module, toy_tasks())
    assert compact or Count.calls > 20
    for name, mask in scl.Masks.of(module).alive.items():
        weight = module.get_parameter(name)
        assert weight.dtype == torch.float32 and not weight[~mask].any() and weight.isfinite().all()


class Sum(nn.Module):
    """Adds its float32 input to what a convolution makes of it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.conv(x) + x


class Exact(nn.Module):
    """A part of it is computed in float32 under autocast."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = self.first(x)
        with torch.autocast("cpu", enabled=False):
            return self.second(x.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [Sum, Exact])
def test_what_torch_computes_in_float32_is_float32(make, dtype):
    torch.manual_seed(0)
    net, x = make(), torch.rand(4, 8, 8, 8) + 1000
    plain, masks = (
        copy.deepcopy(net),
        {n: torch.ones_like(p, dtype=bool) for n, p in net.named_parameters() if p.ndim > 1},
    )
    scl.accelerate(net, masks, measure=False)
    with torch.autocast("cpu", dtype):
        ours, usual = net(x), plain(x)
    assert ours.dtype == usual.dtype == torch.float32
    assert error(ours, plain(x).double()) <= error(usual, plain(x).double()) + 1e-3


class BesideTorch(nn.Module):
    """Adds to a convolution what torch has computed in autocast's type."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.second(x) + torch.sigmoid(self.first(x))


def test_sums_with_what_torch_computed_are_made_by_the_kernels(monkeypatch):
    torch.manual_seed(0)
    net, x = BesideTorch(), torch.randn(4, 8, 8, 8)
    plain = copy.deepcopy(net)
    weights = {name: torch.ones_like(p, dtype=torch.bool) for name, p in net.named_parameters() if p.ndim > 1}
    scl.accelerate(net, weights, measure=False)
    monkeypatch.setattr(Program, "_as_it_is", None)  # a call of it fails
    assert error(halved(net, x), plain(x).double()) <= 1.2 * error(halved(plain, x), plain(x).double())


def test_residual_sums_are_made_by_the_kernels_and_each_kind_of_call_is_measured(monkeypatch):
    """Blocks do not fall back to torch under autocast, and what was measured without it is not taken for it."""
    net, masks = network("resnet")
    run = scl.accelerate(net.train(), masks, measure=False)
    made = []
    monkeypatch.setattr(Program, "_as_it_is", lambda *_: made.append(1))
    halved(net, torch.randn(9, 3, 16, 16))
    assert not made
    monkeypatch.undo()
    scl.densify(net)
    run = scl.accelerate(net, masks)
    x = torch.randn(9, 3, 16, 16)
    assert net(x).isfinite().all()
    before = set(run.choices.state_dict()["taken"])
    assert halved(net, x).isfinite().all()
    after = set(run.choices.state_dict()["taken"]) - before
    assert before and after and all("bfloat16" in key for key in after) and not any("bfloat16" in key for key in before)
