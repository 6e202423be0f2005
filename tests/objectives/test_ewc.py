"""EWC's Fisher information and penalty against single gradients and closed forms."""

from collections import OrderedDict

import torch
from small_network import Data, Net, images, learnt, weights
from torch import nn
from torch.nn import functional as F

import lightning_sparse_cl as scl
from lightning_sparse_cl.objectives.ewc import fisher


def test_the_fisher_is_the_mean_square_of_single_gradients():
    model, x, y = Net(), torch.randn(5, 1, 2, 2), torch.tensor([0, 1, 2, 1, 0])
    model.eval()
    squares = torch.zeros_like(weights(model))
    for i in range(5):
        log_p = model(x[i : i + 1]).log_softmax(1)[0, y[i]]
        squares += torch.cat([g.reshape(-1) for g in torch.autograd.grad(log_p, model.network.parameters())]) ** 2
    model.train()
    statistics = {n: b.clone() for n, b in model.named_buffers()}
    found = fisher(model.network, [(x[:3], y[:3]), (x[3:], y[3:])])
    torch.testing.assert_close(found, squares / 5)
    assert (found >= 0).all() and found.max() > 0
    among = torch.tensor([True, True, False])  # a single head: the third class's row has no part in it
    single = fisher(model.network, [(x[:2], y[:2])], among)
    assert not single[-1:].any() and not single[-7:-3].any() and single[-3:-1].all()
    assert all(m.training for m in model.modules())
    assert all(torch.equal(b, statistics[n]) for n, b in model.named_buffers())


def test_the_fisher_of_a_linear_softmax_model_is_its_closed_form():
    """(p_c - [c = y])^2 x_d^2, by hand."""
    model = nn.Sequential(OrderedDict(backbone=nn.Flatten(), head=nn.Linear(4, 3)))
    x, y = torch.randn(6, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    error = model(x).softmax(1) - F.one_hot(y, 3)
    expected = (error[:, :, None] ** 2 * x.flatten(1)[:, None] ** 2).mean(0)
    found = fisher(model, [(x, y)])
    torch.testing.assert_close(found[:12].view(3, 4), expected)
    torch.testing.assert_close(found[12:], (error**2).mean(0))


def test_ewc_pulls_back_by_the_fisher_and_forgets_by_gamma():
    ewc = scl.EWC(alpha=7.0, gamma=0.5, bound=1e9)
    model = learnt(ewc, [0, 1, 0, 1], [2, 2, 1, 2])
    data = [Data(images(4, t), torch.tensor(y)) for t, y in enumerate(([0, 1, 0, 1], [2, 2, 1, 2]))]
    again = Net()
    first, second = (fisher(again.network, d.samples()) for d in data)
    torch.testing.assert_close(ewc.F, 0.5 * first + second)
    theta, anchor = weights(model), weights(again)
    assert torch.equal(ewc.anchor, anchor)
    rest = ewc(model, torch.randn(2, 1, 2, 2), torch.tensor([0, 1]), None)["rest"]
    torch.testing.assert_close(rest, 7 * (ewc.F * (theta - anchor) ** 2).sum())
    grads = torch.cat([g.reshape(-1) for g in torch.autograd.grad(rest, model.network.parameters())])
    torch.testing.assert_close(grads, 2 * 7 * ewc.F * (theta - anchor))
    ewc.bound = 0.3  # what is stiffer is cut
    rest = ewc(model, torch.randn(2, 1, 2, 2), torch.tensor([0, 1]), None)["rest"]
    assert 0 < (7 * ewc.F > 0.3).sum() < len(theta)
    torch.testing.assert_close(rest, ((7 * ewc.F).clamp(max=0.3) * (theta - anchor) ** 2).sum())
