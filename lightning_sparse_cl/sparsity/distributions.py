"""How a density is divided among layers: the same everywhere, or Erdős–Rényi with kernels (ERK)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

Shapes = Mapping[str, Sequence[int]]


def uniform(shapes: Shapes, density: float) -> dict[str, float]:
    """The same density in every layer."""
    return dict.fromkeys(shapes, density)


def erk(shapes: Shapes, density: float) -> dict[str, float]:
    """Density of each layer in proportion to (sum of its dimensions) / (product of them); ``density`` over all.

    A convolution counts as (n_in + n_out + w + h) / (n_in n_out w h), a linear layer as (n_in + n_out) / (n_in n_out)
    (Evci et al., 2020; section 3 of "Continual Dynamic Sparse Training"). Layers with few weights are the densest; one
    that would be denser than 1 is dense, and the others share what is left.
    """
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        left = density * sum(size.values()) - sum(size[name] for name in dense)
        open_ = [name for name in shapes if name not in dense]
        scale = left / sum(raw[name] * size[name] for name in open_) if open_ else 0.0
        largest = max((raw[name] for name in open_), default=0.0)
        if scale * largest <= 1:
            return {name: 1.0 if name in dense else scale * raw[name] for name in shapes}
        dense |= {name for name in open_ if raw[name] == largest}


DISTRIBUTIONS: dict[str, Callable[[Shapes, float], dict[str, float]]] = {"uniform": uniform, "erk": erk}


def counts(owner: str, distribution: str, shapes: Shapes, density: float) -> dict[str, int]:
    """Weights of each layer, whole numbers that differ from its density by less than one; round(density * N) in all.

    Args:
        owner: who asks, for the error.
        distribution: a name in ``DISTRIBUTIONS``.
        shapes: of the weights, by name.
        density: fraction kept of all N weights.

    Raises:
        ValueError: if a layer would have no weight.
    """
    densities = DISTRIBUTIONS[distribution](shapes, density)
    exact = {name: densities[name] * math.prod(shape) for name, shape in shapes.items()}
    found = {name: int(value + 1e-9) for name, value in exact.items()}
    over = round(density * sum(map(math.prod, shapes.values()))) - sum(found.values())
    for name in sorted(shapes, key=lambda n: found[n] - exact[n])[:over]:  # to the largest remainders
        found[name] += 1
    if empty := [name for name, count in found.items() if count < 1]:
        sparsity = float(f"{1 - density:.10g}")
        raise ValueError(
            f"{owner}(sparsity={sparsity}): {distribution} leaves no weight in {empty[0]}, which has "
            f"{math.prod(shapes[empty[0]])}; lower the sparsity or keep the layer dense"
        )
    return found
