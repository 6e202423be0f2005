"""La-MAML on a network of two weights, against second derivatives by hand and by finite differences."""

import pytest
import torch
from torch import nn

from lightning_sparse_cl import LaMAML, Masks, SingleBackward, enforce
from lightning_sparse_cl.optim import SharpnessAware

X = torch.tensor([[1.0, 2.0], [0.5, -1.0], [2.0, 0.3], [-1.0, 1.0]], dtype=torch.double)
Y = torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=torch.double)
OLD = torch.tensor([[0.2, -2.0]], dtype=torch.double), torch.tensor([3.0], dtype=torch.double)


class Two(nn.Module):
    """Predicts tanh(x . w); what an update rule asks of a LightningModule."""

    def __init__(self, w=(0.3, -0.4)):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([list(w)], dtype=torch.double))

    def manual_backward(self, loss):
        loss.backward()

    def optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def loss(self, stage, part=None):
        if part is not None:
            rows = torch.arange(4).tensor_split(part[1])[part[0]]
            return {"loss": error(self.w, X[rows], Y[rows])}
        return {"loss": error(self.w, X, Y) + error(self.w, *OLD)}


def error(w, x, y):
    return ((torch.tanh(x @ w[0]) - y) ** 2).mean()


def updated(rule, w=(0.3, -0.4)):
    module = Two(w)
    rule.build(module)
    rule.double()
    before = rule.alpha.clone()
    rule(module, module.loss)
    return module.w.grad.detach().clone(), before, rule.alpha


def meta(w, alpha, parts):
    """L as a function of w (1, 2) and alpha (2,), with the inner gradients by hand."""
    total, fast = 0.0, w
    for k in range(parts):
        rows = torch.arange(4).tensor_split(parts)[k]
        p = torch.tanh(X[rows] @ fast[0])
        grad = (2 * (p - Y[rows]) * (1 - p**2)) @ X[rows] / len(rows)
        fast = fast - alpha * grad
        total = total + error(fast, X, Y) + error(fast, *OLD)
    return total / parts


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_step_is_the_derivative_through_the_inner_steps(parts):
    step, alpha, now = updated(LaMAML(alpha=0.2, lr=0.05, parts=parts, clip=1e9))
    w, eps = torch.tensor([[0.3, -0.4]], dtype=torch.double), 1e-6
    slopes = []
    for which in range(2):  # of w, of alpha
        for i in range(2):
            d = torch.zeros(2, dtype=torch.double)
            d[i] = eps
            ends = [meta(w + s * d * (which == 0), alpha + s * d * (which == 1), parts) for s in (1, -1)]
            slopes.append(float(ends[0] - ends[1]) / (2 * eps))
    torch.testing.assert_close(now, alpha - 0.05 * torch.tensor(slopes[2:], dtype=torch.double))
    torch.testing.assert_close(step[0], now.clamp_min(0) * torch.tensor(slopes[:2], dtype=torch.double))


@pytest.mark.parametrize("parts", [1, 2])
def test_first_order_takes_the_gradients_at_the_fast_weights(parts):
    step, alpha, now = updated(LaMAML(alpha=0.2, lr=0.0, parts=parts, clip=1e9, second_order=False))
    assert torch.equal(now, alpha)
    fast, outer = torch.tensor([[0.3, -0.4]], dtype=torch.double, requires_grad=True), 0
    for k in range(parts):
        rows = torch.arange(4).tensor_split(parts)[k]
        (inner,) = torch.autograd.grad(error(fast, X[rows], Y[rows]), fast)
        fast = (fast - 0.2 * inner).detach().requires_grad_()
        outer += torch.autograd.grad(error(fast, X, Y) + error(fast, *OLD), fast)[0] / parts
    torch.testing.assert_close(step, 0.2 * outer)


def test_without_learning_rates_nothing_moves_and_negative_ones_are_cut_off():
    step, _, now = updated(LaMAML(alpha=0.0, lr=0.0))
    assert not step.any() and not now.any()
    step, _, now = updated(LaMAML(alpha=0.01, lr=100.0, parts=1, clip=1e9))
    assert now.min() < 0 and not step[0][now < 0].any()


def test_gradients_are_clipped():
    w = (0.3, -0.4)
    outer = updated(LaMAML(alpha=0.2, lr=0.0, parts=1, clip=0.05), w)[0]
    assert float(outer.norm()) == pytest.approx(0.2 * 0.05, rel=1e-5)
    seen, module, rule = [], Two(w), LaMAML(alpha=1.0, lr=0.0, parts=1, clip=0.05)
    rule.build(module)
    rule.double()

    def loss(stage, part=None):
        seen.append(module.w.detach().clone())
        return module.loss(stage, part)

    rule(module, loss)
    assert float((seen[1] - seen[0]).abs().max()) == pytest.approx(0.05)  # of inner gradients by value


def test_masks_hold_in_the_inner_steps_too():
    module = Two((0.3, 0.0))
    masks = Masks.of(module)
    masks.set_alive("w", torch.tensor([[True, False]]))
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    enforce(module, optimizer)
    seen = []
    rule = LaMAML(lr=0.0, parts=3)
    rule.build(module)
    rule.double()

    def loss(stage, part=None):
        seen.append(float(module.w[0, 1]))
        return module.loss(stage, part)

    rule(module, loss)
    assert seen == [0.0] * 6
    assert module.w.grad[0, 0] != 0 and module.w.grad[0, 1] == 0


@pytest.mark.parametrize("rule", [SingleBackward(), SharpnessAware(0.1)])
def test_other_rules_have_nothing_to_allocate(rule):
    assert rule.build(Two()) is None


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"lr": -0.1}, "lr=-0.1"),
        ({"parts": 0}, "parts=0"),
        ({"parts": 2.5}, "parts=2.5"),
        ({"clip": 0.0}, "clip=0"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(bad, message):
    with pytest.raises(ValueError, match=rf"LaMAML\({message}"):
        LaMAML(**bad)
