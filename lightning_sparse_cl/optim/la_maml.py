"""La-MAML: look-ahead meta-learning with a learning rate for every weight (Gupta et al., 2020)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.func import functional_call

from lightning_sparse_cl.optim.sam import Outputs, UpdateRule


class LaMAML(nn.Module, UpdateRule):
    """Learn so that learning the new does not harm the old (Algorithm 1)::

        theta'_0 = theta;  for k = 1 .. K:  theta'_k = theta'_{k-1} - alpha * grad l(theta'_{k-1}; part k of the batch)
        L = mean_k L(theta'_k; whole batch and replay)
        alpha <- alpha - eta * dL/dalpha;  theta <- theta - max(0, alpha) * dL/dtheta            (with the new alpha)

    l is the objective's loss of the current samples alone, L all of it. What is left in ``.grad`` is
    max(0, alpha) * dL/dtheta, so that ``SGD(lr=1)`` takes the paper's step; the objective should replay (ER). Inner
    gradients are clipped by value, the gradients of L by norm. Masks act on the inner steps too.

    The paper's memory takes samples in the first epoch only; ours is the objective's, and logits that DER stores are
    those at theta'_1. FLOPs of the second derivatives are not counted, and the whole gradients that RigL asks for are
    summed over all passes.

    Args:
        alpha: initial learning rate of every weight.
        lr: eta, learning rate of the learning rates.
        parts: K, inner steps per batch; a batch has at least that many samples.
        clip: bound on inner gradients, and on the norm of the outer ones.
        second_order: differentiate through the inner steps; if False, inner gradients count as constants.

    Raises:
        ValueError: if an argument is not positive, a rate negative, or a batch smaller than ``parts``.
    """

    alpha: Tensor
    """The learning rates of all weights, one after the other (n,); made by :meth:`build`."""
    per_weight = ("alpha",)
    weight_names: list[str]
    """Names of the weights, in the order of ``alpha``."""

    def __init__(
        self, alpha: float = 0.1, lr: float = 0.25, parts: int = 5, clip: float = 2.0, second_order: bool = True
    ) -> None:
        super().__init__()
        for name, value in (("alpha", alpha), ("lr", lr)):
            if not value >= 0:
                raise ValueError(f"LaMAML({name}={value}): a learning rate is >= 0")
        if not (isinstance(parts, int) and parts >= 1):
            raise ValueError(f"LaMAML(parts={parts}): a whole number of inner steps, at least 1")
        if not clip > 0:
            raise ValueError(f"LaMAML(clip={clip}): clip is > 0")
        self._alpha, self.lr, self.parts, self.clip, self.second_order = alpha, lr, parts, clip, second_order

    def build(self, module: nn.Module) -> None:
        sizes = {name: p.numel() for name, p in module.named_parameters() if p.requires_grad}
        self.register_buffer("alpha", torch.full((sum(sizes.values()),), self._alpha))
        self.weight_names = list(sizes)

    @torch.compiler.set_stance("force_eager")  # compiled networks have no second derivatives
    def __call__(self, module: Any, loss: Callable[..., Outputs]) -> Outputs:
        theta = {name: p for name, p in module.named_parameters() if p.requires_grad}
        weights = list(theta.values())
        alpha = self.alpha.detach().requires_grad_()
        rates = [a.view_as(w) for a, w in zip(alpha.split([w.numel() for w in weights]), weights, strict=True)]

        def at(values: list[Tensor], *args: Any) -> Outputs:
            renamed = {f"module.{name}": value for name, value in zip(theta, values, strict=True)}
            return functional_call(_Call(module), renamed, (loss, *args))

        fast, meta = weights, []
        for k in range(self.parts):
            inner = at(fast, "descent", (k, self.parts))["loss"]
            grads = torch.autograd.grad(
                inner, fast, create_graph=self.second_order, allow_unused=True, materialize_grads=True
            )
            steps = [a * g.clamp(-self.clip, self.clip) for a, g in zip(rates, grads, strict=True)]
            fast = [_like(w, w0, w - s) for w, w0, s in zip(fast, weights, steps, strict=True)]
            meta.append(at(fast, "descent"))
        total = torch.stack([outputs["loss"] for outputs in meta]).mean()
        *d_weights, d_alpha = torch.autograd.grad(total, [*weights, alpha], allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            if distributed.is_available() and distributed.is_initialized():
                distributed.all_reduce(d_alpha)
                d_alpha /= distributed.get_world_size()
            self.alpha -= self.lr * _clipped([d_alpha], self.clip)[0]
            rates = self.alpha.clamp_min(0).split([w.numel() for w in weights])
            steps = [a.view_as(g) * g for a, g in zip(rates, _clipped(d_weights, self.clip), strict=True)]
        # By a backward pass whose gradient is these steps, which processes average as they do any other.
        module.manual_backward(sum((w * s).sum() for w, s in zip(weights, steps, strict=True)))
        return meta[-1] | {"loss": total}


class _Call(nn.Module):
    """Calls a function while the parameters of a module have other values."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


def _like(before: Tensor, weight: Tensor, after: Tensor) -> Tensor:
    """Give a fast weight the gradient hooks of the weight it stands for: masks act by them."""
    for hook in (weight._backward_hooks or {}).values():
        after.register_hook(hook)
    return after


def _clipped(grads: list[Tensor], norm: float) -> list[Tensor]:
    """Scaled to a common norm of at most ``norm``."""
    scale = (norm / nn.utils.get_total_norm(grads).clamp_min(1e-12)).clamp_max(1)
    return list(torch._foreach_mul(grads, scale))
