"""Update rules: how a loss becomes gradients. Plain backpropagation and SAM (Foret et al., 2021; EsaCL eqs 3.7-3.8)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

Stage = Literal["ascent", "descent"]
Outputs = dict[str, Any]
"""What an objective returns, with ``loss`` the mean over the samples that the stage keeps."""


class UpdateRule(ABC):
    """Runs the backward passes of one step and leaves the gradient of the descent in ``.grad``.

    ``loss(stage)`` computes the loss afresh, on the same batch and the same replay draw; an update rule may call it
    several times. ``loss(stage, part=(k, n))`` is the loss of the k-th of n parts of the batch alone; ``loss(stage,
    replays=False)`` leaves the replay out. ``module`` offers ``manual_backward(loss)`` and ``optimizers()``, as a
    LightningModule does.
    """

    def build(self, module: nn.Module) -> None:  # noqa: B027  # most have nothing to allocate
        """Allocate what depends on the network. Called once, before a checkpoint is restored."""

    @abstractmethod
    def __call__(self, module: Any, loss: Callable[..., Outputs]) -> Outputs:
        """Returns the outputs of the descent pass."""


class SingleBackward(UpdateRule):
    """Plain backpropagation: one backward pass, on the loss of the descent."""

    def __call__(self, module: Any, loss: Callable[..., Outputs]) -> Outputs:
        outputs = loss("descent")
        module.manual_backward(outputs["loss"])
        return outputs


class SharpnessAware(UpdateRule):
    """SAM: the gradient at the worst point within distance rho (Algorithm 1, lines 5-6; eqs 3.14, 3.18).

    epsilon = rho * g / ||g||_2 with one norm over all parameters; the mean gradient, not the sum of eq 3.14. Masked
    coordinates have zero gradient and are not perturbed. The first backward pass is not synchronised between
    processes: each climbs on its own batch, as in the paper.

    Args:
        rho: radius of the perturbation, >= 0.
        replays: whether the ascent replays exemplars, too. The paper does not say; Algorithm 1 climbs on the loss of
            the whole objective. If False, the ascent leaves the exemplars out; penalty terms stay. With DER++ this
            saves a third of the passes. Batch-norm statistics then move in the descent, which sees the exemplars.

    Raises:
        ValueError: if ``rho`` is negative.
    """

    def __init__(self, rho: float = 0.05, replays: bool = True) -> None:
        if not rho >= 0:
            raise ValueError(f"SharpnessAware(rho={rho}): rho is the radius of the perturbation, >= 0")
        if not isinstance(replays, bool):
            raise ValueError(f"SharpnessAware(replays={replays!r}): replays is true or false")
        self.rho, self.replays = rho, replays

    def __call__(self, module: Any, loss: Callable[..., Outputs]) -> Outputs:
        optimizers = module.optimizers()
        optimizer = optimizers[0] if isinstance(optimizers, list) else optimizers  # the first is that of the weights
        with optimizer.toggle_model(sync_grad=False):
            ascent = loss("ascent") if self.replays else loss("ascent", replays=False)
            module.manual_backward(ascent["loss"])
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        with perturbed(params, self.rho):
            optimizer.zero_grad()
            outputs = loss("descent")
            module.manual_backward(outputs["loss"])
        return outputs


@contextmanager
def perturbed(params: Iterable[Tensor], rho: float) -> Iterator[None]:
    """Move ``params`` by rho along their normalised gradient, and put them back on leaving, bit for bit.

    The values are copied back: subtracting the perturbation again would change about 2.5 % of them by rounding.
    """
    weights = list(params)
    theta = [p.detach().clone() for p in weights]
    grads = [p.grad for p in weights if p.grad is not None]
    with torch.no_grad():
        scale = rho / (nn.utils.get_total_norm(grads) + 1e-12)
        torch._foreach_add_(weights, torch._foreach_mul(grads, scale))
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(weights, theta)
