"""Stochastic Frank-Wolfe on K-sparse polytopes (Pokutta et al., 2020; Miao et al., 2022; EsaCL eqs 3.11-3.15)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse_cl.optim.polytopes import KSparsePolytope
from lightning_sparse_cl.sparsity.blocks import SINGLE, Block


class StochasticFrankWolfe(Optimizer):
    """theta <- theta + lr * (LMO(m) - theta), projection-free descent inside C(K, r), one polytope per weight.

    Each step contracts theta towards a vertex with K non-zeros, so that the weights that are not among the K most
    needed decay geometrically and can be pruned afterwards without retraining.

    Decisions where the paper (EsaCL) is silent or contradicts its code lineage:

    * Algorithm 1, line 9 lost a minus sign; eq 3.12, ``v - theta``, is used.
    * ``momentum=None`` is eq 3.15 as printed, m <- m + g: a running sum. It is by far the most prunable
      (``benchmarks/esacl_choices.py``), because the set of the K largest |m| becomes nearly constant. A float is the
      exponential average of the Frank-Wolfe code bases, m <- beta*m + (1 - beta)*g; where a mask holds already, and
      nothing is pruned afterwards, it is the more accurate with small steps (``benchmarks/esacl_cifar10.py``). The
      learning rate alpha of eq 3.15 is left out: the LMO is invariant to the scale of m. Reset the state at task starts
      (``optimizer.state.clear()``).
    * Radius r = tau * ||W||_2 / sqrt(K) with the norm of the weight at *initialisation*. It is kept in the parameter
      groups, so that it is checkpointed and survives a reset of the state.
    * Matrices and convolution kernels (two or more dimensions) are constrained, unless their parameter group says
      ``constrained=False``. The rest, with vectors (batch-norm, biases), takes plain SGD steps with ``sgd_lr`` and
      ``sgd_momentum``; the paper does not say. :class:`~lightning_sparse_cl.EsaCL` constrains exactly what is pruned:
      a layer that stays dense has nothing to gain from K-sparse vertices (``benchmarks/esacl_choices.py``).
    * No rescaling of the step size.

    Args:
        params: parameters or parameter groups.
        lr: eta, the step towards the vertex, in (0, 1].
        tau: radius factor; r = tau * ||W at init|| / sqrt(K).
        k: K as a fraction of a weight's free coordinates, in (0, 1]; at least ``min_k`` coordinates. Keep it below
            the fraction that is to survive pruning (:class:`~lightning_sparse_cl.EsaCL` takes a quarter of it, and all
            of it where a mask holds already).
            If None, it has to be set in the parameter groups before the first step.
        momentum: if None, gradients add up (eq 3.15); a float in [0, 1) averages them.
        sgd_lr: learning rate of parameters that are not constrained.
        sgd_momentum: momentum of these.
        min_k: lower bound on K.
        block: outputs and inputs of a block of weights, of which the vertices' non-zeros consist; see
            :class:`KSparsePolytope`. If None, single weights, or the blocks in which
            :class:`~lightning_sparse_cl.EsaCL` prunes.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.01,
        tau: float = 5.0,
        k: float | None = 0.05,
        momentum: float | None = None,
        sgd_lr: float = 0.01,
        sgd_momentum: float = 0.9,
        min_k: int = 10,
        block: Sequence[int] | None = None,
    ) -> None:
        for name, value, ok, allowed in (
            ("lr", lr, 0 < lr <= 1, "in (0, 1]: a convex combination"),
            ("tau", tau, tau > 0, "> 0"),
            ("k", k, k is None or 0 < k <= 1, "a fraction in (0, 1]"),
            ("momentum", momentum, momentum is None or 0 <= momentum < 1, "None (accumulate) or in [0, 1)"),
            ("sgd_lr", sgd_lr, sgd_lr >= 0, ">= 0"),
            ("sgd_momentum", sgd_momentum, 0 <= sgd_momentum < 1, "in [0, 1)"),
            ("min_k", min_k, min_k >= 1, ">= 1"),
        ):
            if not ok:
                raise ValueError(f"StochasticFrankWolfe({name}={value}): {name} is {allowed}")
        super().__init__(
            params,
            dict(
                lr=lr, tau=tau, k=k, momentum=momentum,
                sgd_lr=sgd_lr, sgd_momentum=sgd_momentum, min_k=min_k, constrained=True, started=False,
                block=None if block is None else tuple(Block.of("StochasticFrankWolfe", block)),
            ),
        )  # fmt: skip
        for group in self.param_groups:
            group["norms"] = [p.detach().norm().item() or 1.0 for p in group["params"]]  # ||W||_2 at initialisation
            group["free"] = [p.numel() for p in group["params"]]  # coordinates that may move

    def set_free(self, param: Tensor, count: int) -> None:
        """Declare that only ``count`` coordinates of ``param`` can move (others are frozen): K refers to these."""
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                if p is param:
                    group["free"][i] = count

    def polytope(self, group: dict[str, Any], i: int) -> KSparsePolytope:
        """The polytope of the group's i-th parameter."""
        if group["k"] is None:
            raise ValueError("StochasticFrankWolfe(k=None): set k, the fraction of non-zeros of a vertex, in (0, 1]")
        n, free = group["params"][i].numel(), group["free"][i]
        full = min(max(group["min_k"], int(group["k"] * n)), n)  # the radius belongs to the whole weight
        k = min(max(group["min_k"], int(group["k"] * free)), max(free, 1))
        block = Block(*(group["block"] or SINGLE))
        block.check("StochasticFrankWolfe", "a constrained weight", group["params"][i].shape)
        return KSparsePolytope(k, group["tau"] * group["norms"][i] / full**0.5, block)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Coordinates whose gradient is masked to zero never enter a vertex, but theta contracts there too:
        restore frozen coordinates after the step (:class:`~lightning_sparse_cl.sparsity.Masks` does)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for i, theta in enumerate(group["params"]):
                if theta.grad is None:
                    continue
                if group["constrained"] and theta.ndim >= 2:
                    self._frank_wolfe(theta, theta.grad, group, self.polytope(group, i))
                else:
                    self._sgd(theta, theta.grad, group)
            group["started"] = True
        return loss

    def _frank_wolfe(self, theta: Tensor, grad: Tensor, group: dict[str, Any], polytope: KSparsePolytope) -> None:
        if not group["started"]:  # here and not in __init__, which a resumed run calls with trained weights
            theta.copy_(polytope.scale_in(theta))
        beta, state = group["momentum"], self.state[theta]
        if "m" not in state:
            state["m"] = grad.clone()
        elif beta is None:
            state["m"].add_(grad)  # eq 3.15
        else:
            state["m"].lerp_(grad, 1 - beta)
        theta.lerp_(polytope.lmo(state["m"]), group["lr"])  # eq 3.12

    def _sgd(self, theta: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[theta]
        if "m" not in state:
            state["m"] = grad.clone()
        else:
            state["m"].mul_(group["sgd_momentum"]).add_(grad)
        scheduled = group["lr"] / group.get("initial_lr", group["lr"])  # a scheduler of lr holds for both
        theta.add_(state["m"], alpha=-group["sgd_lr"] * scheduled)
