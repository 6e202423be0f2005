"""The operator is a convolution by a masked weight, and torch may do with it what it does with its own."""

import pytest
import torch
from torch.nn import functional as F

from lightning_sparse_cl.kernels import sparse_conv2d


def given(k=3, images=18, sides=(9, 8), stride=1):
    torch.manual_seed(0)
    x = torch.randn(images, 5, *sides, requires_grad=True)
    weight = torch.randn(7, 5, k, k, requires_grad=True)
    return x, weight, torch.rand_like(weight) < 0.3, torch.randn(7, requires_grad=True), stride, k // 2


CASES = [given(), given(1), given(3, 2, (8, 8), 2), given(3, 1, (9, 9), 2), given(1, 3, (1, 1))]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_it_is_a_convolution_by_the_masked_weight(case, compiled):
    x, weight, mask, bias, *about = case
    torch.compiler.reset()  # what other tests have compiled counts against a limit
    run = torch.compile(sparse_conv2d, backend="aot_eager", fullgraph=True) if compiled else sparse_conv2d
    found, wanted = run(*case), F.conv2d(x, weight * mask, bias, *about)
    dy = torch.randn_like(wanted)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    grads = zip(*(torch.autograd.grad(y, [x, weight, bias], dy) for y in (found, wanted)), strict=True)
    for a, b in grads:
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_torch_finds_it_well_registered(case):
    torch.library.opcheck(torch.ops.lightning_sparse_cl.conv2d.default, case)


@pytest.mark.parametrize("weight", [torch.randn(7, 9, 3, 3)[:, 2:7], torch.randn(7, 5, 1, 1).expand(7, 5, 3, 3)])
def test_weights_may_be_parts_of_other_tensors(weight):
    x, _, mask, *_ = given()
    weight = weight.detach().requires_grad_()
    grads = [
        torch.autograd.grad(y.sum(), [x, weight]) for y in (sparse_conv2d(x, weight, mask), F.conv2d(x, weight * mask))
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


def test_it_follows_a_mask_that_is_written_to():
    x, weight, mask, bias, *about = given()
    sparse_conv2d(x, weight, mask, bias, *about)
    mask[:, :2] = False
    found = sparse_conv2d(x, weight, mask, bias, *about)
    torch.testing.assert_close(found, F.conv2d(x, weight * mask, bias, *about), atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        made = mask.clone()
        sparse_conv2d(x, weight, made, bias, *about)
        made.zero_()
        assert (sparse_conv2d(x, weight, made, None, *about) == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 4, 8, 8)}, "cannot take"),
        ({"x": torch.randn(2, 5, 8, 8).half()}, "x is torch.float16"),
        ({"mask": torch.ones(7, 5, 3, 3)}, "mask is torch.float32"),
        ({"mask": torch.ones(7, 5, 1, 1).bool()}, "the mask has shape"),
        ({"weight": torch.ones(9, 5, 3, 3)}, "the mask has shape"),
        ({"bias": torch.ones(1)}, r"bias is torch.float32 of shape \(1,\)"),
        ({"bias": torch.ones(7).double()}, "bias is torch.float64"),
        ({"stride": 3}, "stride 3"),
        ({"padding": 3}, "padding is 0 to 2"),
    ],
)
def test_what_it_cannot_take_is_refused(change, message):
    names = ("x", "weight", "mask", "bias", "stride", "padding")
    sparse_conv2d(*given())
    with pytest.raises(ValueError, match=message):
        sparse_conv2d(**(dict(zip(names, given())) | change))
