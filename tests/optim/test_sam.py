"""SAM and data selection."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lightning_sparse_cl import LossSelection, SharpnessAware
from lightning_sparse_cl.optim import perturbed


def test_perturbation_has_length_rho_along_the_gradient_and_is_undone_bit_for_bit():
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(50, 40)), nn.Parameter(torch.randn(7))]
    for p in params:
        p.grad = torch.randn_like(p)
    before = [p.detach().clone() for p in params]
    with perturbed(params, rho=0.3):
        moved = torch.cat([(p - b).flatten() for p, b in zip(params, before)])
        g = torch.cat([p.grad.flatten() for p in params])
        assert moved.norm().item() == pytest.approx(0.3, rel=1e-5)
        torch.testing.assert_close(moved, 0.3 * g / g.norm(), atol=1e-6, rtol=1e-4)
    assert all(torch.equal(p, b) for p, b in zip(params, before))


class Quadratic(nn.Module):
    """loss = theta' A theta / 2, with what SharpnessAware asks of a LightningModule."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.A = torch.tensor([[3.0, 1.0], [1.0, 2.0]])
        self.sgd = torch.optim.SGD(self.parameters(), 0.1)
        self.sgd.toggle_model = lambda sync_grad: nullcontext()
        self.stages = []

    def optimizers(self):
        return self.sgd

    def manual_backward(self, loss):
        loss.backward()

    def loss(self, stage):
        self.stages.append(stage)
        return {"loss": self.theta @ self.A @ self.theta / 2}


def test_gradient_is_taken_at_the_worst_point_nearby():
    model = Quadratic()
    theta, A = model.theta.detach().clone(), model.A
    epsilon = 0.1 * (A @ theta) / (A @ theta).norm()
    SharpnessAware(rho=0.1)(model, model.loss)
    assert model.stages == ["ascent", "descent"]
    torch.testing.assert_close(model.theta.grad, A @ (theta + epsilon))
    assert torch.equal(model.theta.detach(), theta)


def test_selection_keeps_the_largest_losses():
    selection = LossSelection(sse=0.4, ere=0.8, warmup=2)
    assert [selection.size(s, 10, epoch) for epoch in (0, 1, 2) for s in ("ascent", "descent")] == [
        10,
        10,
        10,
        10,
        4,
        8,
    ]
    assert selection.size("ascent", 1, 5) == 1
    losses = torch.tensor([0.1, 5.0, 0.3, 4.0])
    assert set(selection.top(losses, 2).tolist()) == {1, 3}


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: SharpnessAware(rho=-1), "rho"),
        (lambda: LossSelection(sse=0), "sse"),
        (lambda: LossSelection(ere=2), "ere"),
        (lambda: LossSelection(warmup=-1), "warmup"),
    ],
)
def test_bad_arguments_are_named(make, field):
    with pytest.raises(ValueError, match=rf"\({field}="):
        make()
