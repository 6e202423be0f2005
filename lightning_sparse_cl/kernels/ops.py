"""A sparse convolution as a torch operator: by itself, or in graphs that ``torch.compile`` makes.

:func:`~lightning_sparse_cl.acceleration.accelerate` does more: activations stay in the kernels' layout from
layer to layer, and only alive values are trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.weak import WeakIdKeyDictionary

from lightning_sparse_cl.kernels.layout import Grid
from lightning_sparse_cl.kernels.pattern import Geometry, Pattern

_patterns: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by mask, for as long as the mask exists


@custom_op("lightning_sparse_cl::conv2d", mutates_args=(), device_types="cpu")
def sparse_conv2d(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0
) -> Tensor:
    """``F.conv2d(x, weight * mask, bias, stride, padding)`` that multiplies by the alive weights only.

    It is differentiable; the gradient of the weight is zero outside the mask. What was computed for a mask is kept with
    it, so pass the same tensor every time; writing to it is noticed, except through ``mask.data``.

    Args:
        x: (B, in, H, W), float32 on the CPU.
        weight: (out, in, k, k), float32; k is 1 or 3.
        mask: bool, of the weight's shape, True where a weight is alive.
        bias: (out,) or None.
        stride: 1 or 2.
        padding: number of zeros, 0 to k - 1.

    Returns:
        (B, out, H', W'), channels_last.

    Raises:
        ValueError: if there are no kernels for these arguments.
        KernelsUnavailable: if the kernels cannot be compiled here.
    """
    pattern, grid = _find(x, weight, mask, stride, padding)
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != torch.float32):
        raise ValueError(
            f"sparse_conv2d: bias is {bias.dtype} of shape {tuple(bias.shape)}; it must be torch.float32 of shape "
            f"{tuple(weight.shape[:1])}"
        )
    bias = None if bias is None else bias.contiguous()
    y = pattern.forward(grid.block(x), pattern.gather(weight), grid, bias)
    return grid.unblock(y).contiguous(memory_format=torch.channels_last)


@custom_op("lightning_sparse_cl::conv2d_input_gradient", mutates_args=(), device_types="cpu")
def _input_gradient(dy: Tensor, x: Tensor, weight: Tensor, mask: Tensor, stride: int, padding: int) -> Tensor:
    pattern, grid = _find(x, weight, mask, stride, padding)
    size = (x.shape[2] // grid.rows, x.shape[3] // grid.columns)
    dx = pattern.input_gradient(grid.block(dy), pattern.gather(weight), grid, size)
    return grid.unblock(dx).contiguous(memory_format=torch.channels_last)


@custom_op("lightning_sparse_cl::conv2d_weight_gradient", mutates_args=(), device_types="cpu")
def _weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, mask: Tensor, stride: int, padding: int) -> Tensor:
    pattern, grid = _find(x, weight, mask, stride, padding)
    whole = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    pattern.scatter(pattern.weight_gradient(grid.block(x), grid.block(dy), grid), whole)
    return whole


@sparse_conv2d.register_fake
def _(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0) -> Tensor:
    size = [(n + 2 * padding - weight.shape[2]) // stride + 1 for n in x.shape[2:]]
    shape = (x.shape[0], weight.shape[0], *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@_input_gradient.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, mask: Tensor, stride: int, padding: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@_weight_gradient.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, mask: Tensor, stride: int, padding: int) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, mask, _, ctx.stride, ctx.padding = inputs
    ctx.save_for_backward(x, weight, mask)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    given = (dy, *ctx.saved_tensors, ctx.stride, ctx.padding)
    wanted = ctx.needs_input_grad
    dx = _input_gradient(*given) if wanted[0] else None
    dweight = _weight_gradient(*given) if wanted[1] else None
    db = dy.sum((0, 2, 3)) if len(wanted) > 3 and wanted[3] else None  # it has entries for given arguments only
    return (dx, dweight, None, db, None, None)[: len(wanted)]


sparse_conv2d.register_autograd(_gradients, setup_context=_save)


def _find(x: Tensor, weight: Tensor, mask: Tensor, stride: int, padding: int) -> tuple[Pattern, Grid]:
    """The lists of a mask, and how to lay out the images."""
    for name, value, dtype in (("x", x, torch.float32), ("weight", weight, torch.float32), ("mask", mask, torch.bool)):
        if value.ndim != 4 or value.dtype != dtype or value.device.type != "cpu":
            raise ValueError(
                f"sparse_conv2d: {name} is {value.dtype} of shape {tuple(value.shape)} on {value.device}; it must be "
                f"{dtype} of four dimensions on cpu"
            )
    if mask.shape != weight.shape:
        raise ValueError(f"sparse_conv2d: the mask has shape {tuple(mask.shape)}, the weight {tuple(weight.shape)}")
    k, (h, w) = weight.shape[2], x.shape[2:]
    if weight.numel() == 0 or x.shape[1] != weight.shape[1] or len(x) == 0 or min(h, w) + 2 * padding < k:
        raise ValueError(f"sparse_conv2d: x is {tuple(x.shape)}, which a weight {tuple(weight.shape)} cannot take")
    parts = 2 * padding + 1 == k and not (h % stride or w % stride)  # parts of images stay parts
    grid = Grid.of(len(x), h, w, stride) if parts else Grid(len(x))
    if mask.is_inference():  # it does not record when it is written to
        known, version = {}, 0
    else:
        known, version = _patterns.setdefault(mask, {}), mask._version
    key = (version, stride, padding)
    if key not in known:
        for old in [old for old in known if old[0] != version]:
            del known[old]
        like = weight.detach().contiguous()  # values are gathered from, and gradients written to, plain memory
        known[key] = Pattern(mask, like, Geometry(stride, padding))
    return known[key], grid
