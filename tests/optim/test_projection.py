"""A-GEM's and GPM's projections of gradients, against their definitions."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_sparse_cl.optim.projection import agem_, correlation, extend_basis, null_space_


def dot(a, b):
    return sum(float((x * y).sum()) for x, y in zip(a, b))


def test_agem_by_hand():
    g, ref = [torch.tensor([1.0, 0.0]), torch.tensor([-3.0])], [torch.tensor([1.0, 1.0]), torch.tensor([1.0])]
    agem_(g, ref)  # g . ref = -2, ref . ref = 3
    torch.testing.assert_close(g, [torch.tensor([1 + 2 / 3, 2 / 3]), torch.tensor([-3 + 2 / 3])])


def test_agem_never_opposes_the_memory_and_leaves_the_rest_alone():
    torch.manual_seed(0)
    opposed = 0
    for _ in range(100):
        g, ref = ([torch.randn(3, 2), torch.randn(5)] for _ in range(2))
        before = [x.clone() for x in g]
        agem_(g, ref)
        assert dot(g, ref) >= -1e-5
        if dot(before, ref) >= 0:
            assert all(torch.equal(a, b) for a, b in zip(g, before))
        else:
            opposed += 1
            once = [x.clone() for x in g]
            agem_(g, ref)
            torch.testing.assert_close(g, once)
    assert 30 < opposed < 70
    g = [torch.tensor([1.0, -0.0])]
    agem_(g, [torch.zeros(2)])  # nothing to go by
    assert g[0].tolist() == [1.0, -0.0]


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_patches_are_what_the_weight_meets(k, stride):
    """Outputs computed from the patches' correlation: E |W x|^2 = tr(W R R^T W^T)."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, k, stride, k // 2, bias=False).double()
    x = torch.randn(2, 3, 5, 5, dtype=torch.double)
    w = conv.weight.flatten(1)
    torch.testing.assert_close((w @ correlation(conv, x) @ w.T).trace(), conv(x).square().sum())
    linear = nn.Linear(3, 2, bias=False).double()
    rows = torch.randn(7, 3, dtype=torch.double)
    torch.testing.assert_close(correlation(linear, rows), rows.T @ rows)


def test_the_basis_holds_the_energy_asked_for_in_as_few_directions_as_can_be():
    torch.manual_seed(0)
    basis = torch.empty(10, 0)
    for threshold in (0.8, 0.9, 0.97):
        R = (torch.randn(10, 30) * torch.linspace(3, 0.1, 10)[:, None]).double()
        R = torch.linalg.qr(torch.randn(10, 10).double())[0] @ R
        before, basis = basis, extend_basis(basis, R @ R.T, threshold)
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-6, rtol=0)
        kept = float((basis.double().T @ R).square().sum() / R.square().sum())
        assert kept >= threshold - 1e-6
        torch.testing.assert_close(basis @ (basis.T @ before), before, atol=1e-6, rtol=0)  # it still holds the old
        # by brute force: the singular values of what the old basis leaves
        M = before.double()
        left = R - M @ (M.T @ R)
        sigma = torch.linalg.svdvals(left).square()
        energy = [float(R.square().sum() - left.square().sum() + sigma[:k].sum()) for k in range(11)]
        fewest = next(k for k in range(11) if energy[k] >= threshold * float(R.square().sum()))
        assert basis.shape[1] - before.shape[1] == fewest
    assert extend_basis(basis, R @ R.T, 0.97).shape == basis.shape  # known inputs ask for nothing
    assert extend_basis(torch.empty(10, 0), R @ R.T, 1.0).shape == (10, 10)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_projected_step_does_not_change_outputs_for_stored_inputs(memory_format):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 5, 3, padding=1).to(memory_format=memory_format)
    x = torch.randn(1, 4, 4, 4)
    x = torch.cat([x, 2 * x])
    basis = extend_basis(torch.empty(36, 0), correlation(conv, x), 1.0)
    before = conv(x).detach()
    grad = torch.randn(5, 4, 3, 3).to(memory_format=memory_format)
    null_space_(grad, basis)
    assert float((grad.flatten(1) @ basis).abs().max()) < 1e-5 * float(grad.norm())
    assert float(grad.norm()) > 0.1
    with torch.no_grad():
        conv.weight -= grad
    torch.testing.assert_close(conv(x), before, atol=1e-4, rtol=0)
    assert not torch.allclose(F.conv2d(torch.randn(1, 4, 4, 4), grad, padding=1), torch.zeros(()), atol=0.1)
