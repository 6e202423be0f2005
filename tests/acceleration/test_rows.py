"""Linear layers of rows: tables (B, D), tokens (B, T, D), and what is added to them."""

import copy

import pytest
import torch
from torch import Tensor, nn

import lightning_sparse_cl as scl
from lightning_sparse_cl.acceleration import program
from lightning_sparse_cl.acceleration.rows import images_as_rows, rows_as_images
from lightning_sparse_cl.kernels.build import lanes


class Residual(nn.Module):
    """The MLP of a Transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 48), nn.Linear(48, 24)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.relu(self.first(x)))


def masked(net: nn.Module) -> dict[str, Tensor]:
    masks = {name: torch.rand_like(p) < 0.2 for name, p in net.named_parameters() if p.ndim == 2}
    with torch.no_grad():
        for name, mask in masks.items():
            net.get_parameter(name).mul_(mask)
    return masks


SHAPES = [(1, 24), (16, 24), (255, 24), (256, 24), (257, 24), (2, 5, 24), (40, 17, 24), (3, 4, 30, 24)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_of_any_number_and_shape_are_computed_as_by_torch(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = Residual()
    masks, calls = masked(net), 0
    exact = copy.deepcopy(net).double()
    real = program.images_as_rows

    def counted(*args: object) -> Tensor:
        nonlocal calls
        calls += 1
        return real(*args)

    monkeypatch.setattr(program, "images_as_rows", counted)
    scl.accelerate(net, masks, measure=False)
    x = torch.randn(shape)
    for grads in (True, False):
        with torch.set_grad_enabled(grads):
            given, same = (t.clone().requires_grad_(grads) for t in (x, x.double()))
            ours, theirs = net(given), exact(same)
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)
        if grads:
            for y in (ours, theirs):
                y.square().sum().backward()
            assert given.grad is not None and same.grad is not None
            torch.testing.assert_close(given.grad.double(), same.grad, atol=1e-4, rtol=1e-4)
            for name, p in exact.named_parameters():
                found, wanted = net.get_parameter(name).grad, p.grad
                assert found is not None and wanted is not None
                wanted = wanted * masks.get(name, torch.tensor(True))
                torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-4)
    assert calls == 4  # both layers, each time


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_become_images_and_rows_again(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    images = rows_as_images(x)
    assert images.shape[2:] == ((4, 4) if x[..., 0].numel() >= 16 * lanes() else (1, 1))
    assert torch.equal(images_as_rows(images, x.shape), x)


def test_what_is_broadcast_is_added_as_by_torch() -> None:
    class Positions(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Parameter(torch.randn(17, 48))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x) + self.positions)

    torch.manual_seed(0)
    net = Positions()
    masks = masked(net)
    plain = copy.deepcopy(net)
    scl.accelerate(net, masks, measure=False)
    x = torch.randn(40, 17, 24)
    torch.testing.assert_close(net(x), plain(x), atol=1e-5, rtol=1e-5)
