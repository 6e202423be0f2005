"""The kernels against slow float64 convolutions, for whatever shapes may come.

Under the address and undefined-behaviour sanitisers of GCC, which tell of every read or write out of bounds:

    CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -g" ASAN_OPTIONS=detect_leaks=0 \
        LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" pytest tests/kernels
"""

import random
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from lightning_sparse_cl.kernels.build import lanes
from lightning_sparse_cl.kernels.layout import Grid
from lightning_sparse_cl.kernels.pattern import Geometry, Pattern


def cases(seed, count):
    """Random convolutions: k, stride, padding, channels, images, sides, density."""
    draw = random.Random(seed)
    for _ in range(count):
        k, stride = draw.choice([1, 3, 3]), draw.choice([1, 1, 2])
        padding = draw.choice([k // 2, draw.randrange(k)])
        least, most = max(1, k - 2 * padding), draw.choice([4, 14])  # within a tile, or not
        images, sides = draw.randint(1, 67), [draw.randint(least, most), draw.randint(least, most)]
        if draw.random() < 0.4:  # small batches, in parts
            side = draw.choice([2, 4, 8, 16, 32])
            padding, images, sides = k // 2, draw.randint(1, 9), [side, side]
        yield (
            k,
            stride,
            padding,
            draw.randint(1, 40),
            draw.randint(1, 40),
            images,
            sides,
            draw.choice([0, 0.02, 0.1, 0.4, 1]),
        )


def difference(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("seed", range(6))
def test_passes_are_those_of_a_convolution_in_float64(seed):
    torch.manual_seed(seed)
    for case in cases(seed, 25):
        k, stride, padding, inputs, outputs, images, sides, density = case
        weight = torch.randn(outputs, inputs, k, k, dtype=torch.float64)
        if seed % 2:
            weight = weight.contiguous(memory_format=torch.channels_last)
        mask = torch.rand_like(weight) < density
        weight = (weight * mask).requires_grad_()
        x = torch.randn(images, inputs, *sides, dtype=torch.float64, requires_grad=True)
        y = F.conv2d(x, weight, None, stride, padding)
        dy = torch.randn_like(y)
        dx, dweight = torch.autograd.grad(y, [x, weight], dy)

        pattern = Pattern(
            mask, weight.detach(), Geometry(stride, padding), side=random.Random(images).choice([1, 2, 3, 4])
        )
        parted = padding == k // 2 and not any(side % 2 for side in sides)
        grid = Grid.of(images, *sides, stride) if parted else Grid(images)
        values = pattern.gather(weight.detach().float())
        blocked, dblocked = grid.block(x.detach().float()), grid.block(dy.float())
        found = grid.unblock(pattern.forward(blocked, values, grid))
        dfound = grid.unblock(pattern.input_gradient(dblocked, values, grid, blocked.shape[2:4]))
        whole = torch.full_like(weight, torch.nan, dtype=torch.float32).masked_fill_(~mask, 0)
        pattern.scatter(pattern.weight_gradient(blocked, dblocked, grid), whole)

        assert difference(found.double(), y.detach()) < 1e-5, case
        assert difference(dfound.double(), dx) < 1e-5, case
        assert difference(whole.double(), dweight * mask) < 1e-5, case
        assert (whole[~mask] == 0).all(), case  # and every alive one has been written


# Threads take tiles one by one, several at once, and parts of the rows where tiles and blocks are few
@pytest.mark.parametrize(("side", "stride", "density"), [(9, 1, 0.1), (61, 1, 0.1), (9, 2, 0.03), (5, 1, 0.01)])
def test_any_number_of_threads_computes_the_same_bits(side, stride, density):
    torch.manual_seed(0)
    before, found = torch.get_num_threads(), []
    mask = torch.rand(48, 40, 3, 3) < density
    after = (side - 1) // stride + 1
    x, dy = torch.randn(2, 40, side, side, lanes()), torch.randn(2, 48, after, after, lanes())
    pattern = Pattern(mask, torch.empty(48, 40, 3, 3), Geometry(stride, 1))
    grid = Grid(2 * x.shape[4])
    values = torch.randn(pattern.entries)
    try:
        for threads in (1, 2, 4, 7):
            torch.set_num_threads(threads)
            y, dx = pattern.forward(x, values, grid), pattern.input_gradient(dy, values, grid, (side, side))
            found.append((y, dx, pattern.weight_gradient(x, dy, grid)))
    finally:
        torch.set_num_threads(before)
    for one, other in pairwise(found):
        assert all(torch.equal(a, b) for a, b in zip(one, other))


@pytest.mark.parametrize(
    ("images", "height", "width", "down", "parts"),
    [(32, 32, 32, 8, 1), (1, 32, 32, 8, 16), (3, 32, 32, 8, 8), (1, 28, 28, 1, 16), (1, 7, 7, 1, 1), (1, 4, 8, 4, 2)],
)
def test_small_batches_fill_the_lanes_with_parts_of_each_image(images, height, width, down, parts):
    grid = Grid.of(images, height, width, down)
    x = torch.randn(images, 3, height, width)
    if grid.each * grid.rows * grid.columns == 16:  # AVX-512
        assert grid.rows * grid.columns == parts
    assert height % (grid.rows * down) == 0 or grid.rows == 1
    assert torch.equal(grid.unblock(grid.block(x)), x)


@pytest.mark.parametrize(
    ("shape", "geometry", "mask"),
    [
        ((4, 4, 5, 5), Geometry(1, 2), (4, 4, 5, 5)),
        ((4, 4, 3, 3), Geometry(3, 1), (4, 4, 3, 3)),
        ((4, 4, 3, 3), Geometry(1, 3), (4, 4, 3, 3)),
        ((4, 4, 3, 3), Geometry(1, 1), (4, 2, 3, 3)),
    ],
)
def test_what_there_is_no_kernel_for_is_refused(shape, geometry, mask):
    with pytest.raises(ValueError, match="Pattern"):
        Pattern(torch.ones(mask, dtype=torch.bool), torch.empty(shape), geometry)
