"""Gradients that do not harm earlier tasks: A-GEM's half-space and GPM's null space. Plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@torch.no_grad()
def agem_(grads: Sequence[Tensor], reference: Sequence[Tensor]) -> None:
    """g <- g - min(0, g . g_ref) / (g_ref . g_ref) * g_ref, in place (A-GEM, eq 11; Chaudhry et al., 2019).

    One inner product over all parameters. A gradient with g . g_ref >= 0 keeps its bits, and so does every gradient
    where g_ref is zero. Nothing is read back from the device.

    Args:
        grads: g, the gradient of each parameter.
        reference: g_ref, of the same shapes: the gradient of the loss on memory.
    """
    along, length = _dot(grads, reference), _dot(reference, reference)
    excess = along.clamp_max(0) / length.clamp_min(torch.finfo(length.dtype).tiny)
    torch._foreach_sub_(list(grads), torch._foreach_mul(list(reference), excess))


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def null_space_(grad: Tensor, basis: Tensor) -> None:
    """g <- g - g M M^T, in place (GPM, eq 6-7): rows of ``grad`` (C_out, ...) become orthogonal to M.

    Args:
        grad: gradient of a weight, (C_out, C_in) or (C_out, C_in, k, k).
        basis: M, (C_in k k, r), with orthonormal columns.
    """
    rows = grad.reshape(len(grad), -1).to(basis.dtype)
    grad.copy_((rows - rows @ basis @ basis.T).reshape(grad.shape))


def projectable(layer: nn.Module) -> bool:
    """Whether :func:`correlation` can find the inputs of a layer's weight."""
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear)


def correlation(layer: nn.Module, x: Tensor) -> Tensor:
    """R R^T (d, d) of the inputs that a layer's weight of d = C_in k k meets, rows or patches; double, to be summed.

    Args:
        layer: :func:`projectable`.
        x: its input, (B, C_in, H, W) or (..., C_in).
    """
    if not isinstance(layer, nn.Conv2d) or isinstance(layer.padding, str):
        patches = x.reshape(-1, x.shape[-1])
    else:
        columns = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # (B, d, positions)
        patches = columns.transpose(1, 2).flatten(0, 1)
    return (patches.T @ patches).double()


def extend_basis(basis: Tensor, gram: Tensor, threshold: float) -> Tensor:
    """The basis (d, r') that also holds the directions of new inputs, in as few as reach the threshold (GPM, eq 8-9).

    With R^ = R - M M^T R and its singular values sigma (their squares are the eigenvalues of R^ R^T): the smallest k
    with ||M M^T R||^2 + sigma_1^2 + ... + sigma_k^2 >= threshold * ||R||^2.

    Args:
        basis: M (d, r), orthonormal; r may be 0.
        gram: R R^T (d, d), double precision.
        threshold: epsilon, in (0, 1].
    """
    outside = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) - basis.double() @ basis.double().T
    new = outside @ gram @ outside
    values, vectors = torch.linalg.eigh((new + new.T) / 2)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    total, free = gram.trace(), len(gram) - basis.shape[1]
    covered = total - values.sum() + torch.cat([values.new_zeros(1), values.cumsum(0)])
    enough = covered >= threshold * total * (1 - 1e-12)  # rounding must not ask for a direction without energy
    k = min(int(enough.int().argmax()) if bool(enough.any()) else free, free)
    both, _ = torch.linalg.qr(torch.cat([basis.double(), vectors[:, :k]], 1))
    return both.to(basis.dtype)
