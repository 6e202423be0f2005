"""What training costs by the papers' own closed formulas. They count what a plan says; nothing here is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_sparse_cl.metrics.products import ProductCounter
from lightning_sparse_cl.metrics.undisturbed import undisturbed


@dataclass(frozen=True)
class DenseCost:
    """What a forward pass costs a dense network.

    Args:
        macs: multiply-accumulates, by the name of the weight that takes part in them; a shared weight has one name.
        activations: elements of all outputs of products with weights: convolutions, linear and recurrent layers.
        parameters: all parameters, batch-norm and biases included.
        weightless: multiply-accumulates of activations with each other, such as attention's QK^T and AV. No mask
            reduces them.
        not_counted: operators that multiply but are not counted, each with the reason.
    """

    macs: dict[str, int]
    activations: int
    parameters: int
    weightless: int = 0
    not_counted: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, network: nn.Module, input_shape: Sequence[int]) -> DenseCost:
        """The cost of one sample of zeros of this shape, such as an image (C, H, W); see :meth:`of_call`."""
        own = next(network.parameters())
        return cls.of_call(network, torch.zeros(1, *input_shape, device=own.device, dtype=own.dtype))

    @classmethod
    def of_call(cls, network: nn.Module, *args: Any, **kwargs: Any) -> DenseCost:
        """Count by calling ``network`` in eval mode, with the formulas of ``torch.utils.flop_counter`` and our own.

        The network is left as it was: modes, buffers and random numbers do not change.
        """
        counter = ProductCounter(network.named_parameters(), network.buffers())
        fast = torch.backends.mha.get_fastpath_enabled()
        with undisturbed(network), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            torch.backends.mha.set_fastpath_enabled(False)  # it runs whole Transformer layers as one operator
            try:
                network.eval()
                counter.begin((args, kwargs))
                with counter:
                    network(*args, **kwargs)
            finally:
                torch.backends.mha.set_fastpath_enabled(fast)
        return cls.counted(counter, network)

    @classmethod
    def counted(cls, counter: ProductCounter, network: nn.Module) -> DenseCost:
        """What ``counter`` counted in a pass of ``network``."""
        parameters = sum(p.numel() for p in network.parameters())
        return cls(dict(counter.macs), counter.activations, parameters, counter.weightless, dict(counter.missing))

    def total_macs(self) -> int:
        """Multiply-accumulates of a forward pass."""
        return sum(self.macs.values()) + self.weightless

    def share(self, names: Sequence[str]) -> float:
        """Fraction of the multiply-accumulates that the named weights take part in."""
        return sum(self.macs[name] for name in names) / self.total_macs()


def sparcl_flops(
    macs: int,
    samples: float,
    draws: float = 0,
    sparsity: float = 0.0,
    gradient_sparsity: float | None = None,
    dense_share: float = 0.0,
    kept: float = 1.0,
) -> float:
    """FLOPs of a training run as SparCL's tables count them (Appendix B.1); EsaCL's eq 6.23 is the dense case.

    2 * macs * samples * (3 + draws) * (d + (1 - d)(1 - s)) * (2 + (1 - g)/(1 - s))/3 * kept: a training pass is three
    forward passes, and a replayed batch is charged *one*. It really needs its backward pass as well, three in all.

    Args:
        macs: multiply-accumulates of a dense forward pass of one image.
        samples: images times epochs.
        draws: replayed batches of the current batch's size per step: 1 for ER, 2 for DER++.
        sparsity: s, zero fraction of the pruned weights.
        gradient_sparsity: g = s + q, zero fraction of the weight gradient. If None, s.
        dense_share: d, share of ``macs`` in layers that are not pruned.
        kept: mean fraction of the samples that are trained on, see :func:`mean_kept`.
    """
    g = sparsity if gradient_sparsity is None else gradient_sparsity
    weights = dense_share + (1 - dense_share) * (1 - sparsity)
    return 2 * macs * samples * (3 + draws) * weights * (2 + (1 - g) / (1 - sparsity)) / 3 * kept


def mean_kept(removed: float, after: Sequence[int], epochs: int) -> float:
    """Mean over a task's epochs of the fraction of samples left, removed in equal steps after the given epochs.

    SparCL's default, 30 % after epochs 5, 10, 15 and 20, gives 0.775 for 50 epochs and 0.7375 for 100.
    """
    return 1 - sum(removed / len(after) * (epochs - e) for e in after) / epochs


def packnet_share(num_tasks: int) -> float:
    """Mean over tasks of the fraction t/T of the weights that PackNet and LPS are charged for: (T + 1)/(2T)."""
    return (num_tasks + 1) / (2 * num_tasks)


def sparcl_memory(
    cost: DenseCost,
    batch_size: int = 32,
    sparsity: float = 0.0,
    gradient_sparsity: float | None = None,
    activations: int = 2,
) -> float:
    """Bytes of SparCL's footprint (Appendix B.2): 4 * (2BA + (1 - s)N + (1 - g)N), as its tables print it in 10^6.

    The savings in the text of its section 5.4 (51 %, 48 %) take the activations once, the tables twice.
    """
    g = sparsity if gradient_sparsity is None else gradient_sparsity
    activations *= batch_size * cost.activations
    return 4 * (activations + (1 - sparsity) * cost.parameters + (1 - g) * cost.parameters)


def mask_overhead(parameters: int, updates: int) -> float:
    """FLOPs of TDM, DDR and DGM together: eight operations per parameter at every mask update (SparCL, B.1)."""
    return 8.0 * parameters * updates


def capacity(sparsity: float, num_tasks: int = 0, gamma: float = 0.75) -> float:
    """EsaCL's eq 6.24: fraction of weights kept, plus ``num_tasks`` masks of one bit, compressed by ``gamma``.

    EsaCL keeps no mask per task: its rows have ``num_tasks = 0``. No other row of the paper's table follows from it.
    """
    return (1 - sparsity) + (1 - gamma) * num_tasks / 32
