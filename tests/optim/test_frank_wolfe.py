"""Frank-Wolfe on K-sparse polytopes, against brute force and closed forms."""

from itertools import combinations, product

import pytest
import torch

from lightning_sparse_cl import KSparsePolytope, StochasticFrankWolfe
from lightning_sparse_cl.optim.polytopes import largest


@pytest.mark.parametrize("k", [1, 2, 5])
def test_lmo_is_the_best_vertex_by_enumeration(k):
    polytope = KSparsePolytope(k, radius=0.7)
    m = torch.randn(5, generator=torch.Generator().manual_seed(k))
    vertices = []
    for support, signs in product(combinations(range(5), k), product((-0.7, 0.7), repeat=k)):
        v = torch.zeros(5)
        v[list(support)] = torch.tensor(signs)
        vertices.append(v)
    best = min(vertices, key=lambda v: float(m @ v))
    assert torch.equal(polytope.lmo(m), best)


def test_lmo_takes_the_largest_magnitudes_not_the_largest_values():
    v = KSparsePolytope(2, radius=1.0).lmo(torch.tensor([[1.0, -3.0], [2.0, 0.5]]))
    assert v.tolist() == [[0.0, 1.0], [-1.0, 0.0]]


def test_lmo_is_the_same_in_every_memory_format():
    m = torch.randn(8, 4, 3, 3)
    lmo = KSparsePolytope(20, radius=1.0).lmo
    assert torch.equal(lmo(m), lmo(m.to(memory_format=torch.channels_last)))


@pytest.mark.parametrize("n", [100, 5_000, 100_000])
@pytest.mark.parametrize("part", [0.0, 0.001, 0.025, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["normal", "sparse", "zeros", "ties", "rising", "falling", "never in the sample"])
def test_the_largest_are_found_whatever_the_values(n, part, kind):
    k, generator = max(1, int(part * n)), torch.Generator().manual_seed(n)
    at, drawn = torch.arange(n), torch.rand(n, generator=generator)
    values = {
        "normal": drawn, "sparse": drawn * (torch.rand(n, generator=generator) < 0.1), "zeros": drawn * 0,
        "ties": (4 * drawn).floor(), "rising": at / n, "falling": 1 - at / n,
        "never in the sample": drawn * (at % 64 != 0),
    }[kind]  # fmt: skip
    found = largest(values, k)
    assert len(found.unique()) == len(found) == k
    assert torch.equal(values[found].sort(descending=True).values, values.topk(k).values)


def test_a_vertex_where_fewer_than_k_weights_are_alive():
    m = torch.randn(4_000, generator=torch.Generator().manual_seed(0)) * (torch.arange(4_000) % 10 == 3)
    for k in (399, 400, 401, 4_000):
        v = KSparsePolytope(k, radius=0.5).lmo(m)
        assert int(v.count_nonzero()) == min(k, 400)
        assert torch.equal(v[v != 0], -0.5 * m[v != 0].sign())


def quadratic(weight, target):
    return ((weight - target) ** 2).sum()


@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("tau", [0.5, 5.0])
def test_iterates_stay_in_the_polytope(momentum, tau):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(30, 10))
    optimizer = StochasticFrankWolfe([weight], lr=0.3, tau=tau, k=0.1, momentum=momentum)
    polytope = optimizer.polytope(optimizer.param_groups[0], 0)
    assert polytope.k == 30
    assert polytope.radius == pytest.approx(tau * optimizer.param_groups[0]["norms"][0] / 30**0.5)
    for _ in range(50):
        optimizer.zero_grad()
        quadratic(weight, torch.randn(30, 10)).backward()
        optimizer.step()
        assert weight.abs().max() <= polytope.radius * (1 + 1e-5)
        assert weight.abs().sum() <= polytope.radius * 30 * (1 + 1e-5)


def test_constant_gradient_has_the_closed_form():
    weight = torch.nn.Parameter(torch.full((4, 5), 0.1))
    optimizer = StochasticFrankWolfe([weight], lr=0.25, tau=50.0, k=0.25, min_k=1)
    theta0 = weight.detach().clone()
    grad = torch.zeros(4, 5)
    grad[0] = torch.tensor([5.0, -4.0, 3.0, -2.0, 1.0])
    v = optimizer.polytope(optimizer.param_groups[0], 0).lmo(grad)
    for _ in range(7):
        weight.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(weight.detach(), 0.75**7 * theta0 + (1 - 0.75**7) * v)


def test_momentum_accumulates_as_printed_in_eq_3_15():
    weight = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = StochasticFrankWolfe([weight], k=0.5)
    grads = [torch.randn(3, 4) for _ in range(5)]
    for g in grads:
        weight.grad = g.clone()
        optimizer.step()
    torch.testing.assert_close(optimizer.state[weight]["m"], sum(grads))


@pytest.mark.parametrize("shape, options", [((6,), {}), ((6, 4), {"constrained": False})])
def test_vectors_and_unconstrained_groups_take_plain_sgd_steps(shape, options):
    weight, twin = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    ours = StochasticFrankWolfe([{"params": [weight]} | options], sgd_lr=0.05, sgd_momentum=0.9)
    sgd = torch.optim.SGD([twin], lr=0.05, momentum=0.9)
    for _ in range(4):
        g = torch.randn(shape)
        weight.grad, twin.grad = g.clone(), g.clone()
        ours.step()
        sgd.step()
    torch.testing.assert_close(weight, twin)


def test_radius_survives_a_reset_and_a_checkpoint():
    weight = torch.nn.Parameter(torch.randn(20, 20))
    optimizer = StochasticFrankWolfe([weight], k=0.1)
    radius = optimizer.polytope(optimizer.param_groups[0], 0).radius
    optimizer.set_free(weight, 100)
    weight.data.mul_(3)  # as after training
    resumed = StochasticFrankWolfe([weight], k=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    resumed.state.clear()
    polytope = resumed.polytope(resumed.param_groups[0], 0)
    assert polytope.radius == radius
    assert polytope.k == 10  # a tenth of the 100 coordinates that are free


@pytest.mark.parametrize(
    "bad",
    [{"lr": 0.0}, {"lr": 1.5}, {"tau": 0}, {"k": 0}, {"k": 1.1}, {"momentum": 1.0}, {"sgd_lr": -1}, {"min_k": 0}],
)
def test_bad_arguments_are_named(bad):
    with pytest.raises(ValueError, match=rf"StochasticFrankWolfe\({next(iter(bad))}="):
        StochasticFrankWolfe([torch.nn.Parameter(torch.ones(2, 2))], **bad)


def test_k_that_was_never_filled_in_is_an_error():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match="set k"):
        StochasticFrankWolfe([weight], k=None).step()
