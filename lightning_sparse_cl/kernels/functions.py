"""Sparse layers on blocked tensors, differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from lightning_sparse_cl.kernels.build import call, numbers
from lightning_sparse_cl.kernels.layout import Grid
from lightning_sparse_cl.kernels.pattern import Pattern


class Gather(Function):
    """The values (n,) of a masked weight; its gradient comes back whole, zero outside the mask."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, pattern: Pattern) -> Tensor:
        ctx.pattern, ctx.like = pattern, weight
        return pattern.gather(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.pattern.whole(grad.contiguous(), ctx.like), None


class Scatter(Function):
    """The masked weight, in the form of ``weight``, from its values (n,)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, pattern: Pattern) -> Tensor:
        ctx.pattern = pattern
        return pattern.whole(values, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.pattern.gather(grad), None, None


class Convolution(Function):
    """A convolution of a blocked tensor with the values (n,) of a pattern, and a bias (out,) or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern, grid: Grid) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, values)
        ctx.pattern, ctx.grid = pattern, grid
        return pattern.forward(x, values, grid, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values = ctx.saved_tensors
        dy = dy.contiguous()
        wanted = ctx.needs_input_grad
        dx = ctx.pattern.input_gradient(dy, values, ctx.grid, x.shape[2:4]) if wanted[0] else None
        dvalues = ctx.pattern.weight_gradient(x, dy, ctx.grid) if wanted[1] else None
        return dx, dvalues, dy.sum((0, 2, 3, 4)) if wanted[2] else None, None, None


class Norm(Function):
    """Batch-norm of a blocked tensor by its own statistics, plus ``add``, rectified if ``relu``: all in one pass.

    Running statistics, where given, move by ``momentum``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        add: Tensor | None,
        relu: bool,
        grid: Grid,
        eps: float,
        momentum: float,
        running: tuple[Tensor, Tensor] | tuple[None, None],
    ) -> Tensor:
        x, add = x.contiguous(), None if add is None else add.contiguous()
        y, mean, inverse = torch.empty_like(x), x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
        ctx.shape = numbers(*x.shape[:2], x.shape[2] * x.shape[3], *grid)
        call(
            *("norm_forward", ctx.shape, x, gamma, beta, add, int(relu), float(eps), float(momentum)),
            *(*running, mean, inverse, y),
        )
        if running[0] is not None:
            increment_version(running)
        ctx.save_for_backward(x, y if relu and add is not None else None, gamma, beta, mean, inverse)
        ctx.relu, ctx.adds = relu, add is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, y, gamma, beta, mean, inverse = ctx.saved_tensors
        dx, dadd = torch.empty_like(x), torch.empty_like(x) if ctx.adds else None
        dgamma, dbeta = torch.empty_like(mean), torch.empty_like(mean)
        where = (dx, dadd, dgamma, dbeta)
        given = (dy.contiguous(), y, x, gamma, beta, mean, inverse)
        call("norm_backward", ctx.shape, *given, int(ctx.relu), *where)
        affine = (dgamma, dbeta) if gamma is not None else (None, None)
        return dx, *affine, dadd, None, None, None, None, None
