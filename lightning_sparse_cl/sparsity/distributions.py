"""How a density is divided among layers: the same everywhere, or Erdős–Rényi with kernels (ERK)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch

from lightning_sparse_cl.sparsity.scores import check_number

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
Distribution = str | Mapping[str, float]
"""A name in ``DISTRIBUTIONS``, or sparsities by shell pattern of weight names, of which the first match counts.
"""


def check_distribution(owner: str, distribution: Distribution) -> None:
    """Raise ValueError unless ``distribution`` is one of the names, or sparsities in [0, 1) by pattern."""
    if isinstance(distribution, Mapping):
        for pattern, sparsity in distribution.items():
            check_number(owner, f"distribution[{pattern!r}]", sparsity)
            if not 0 <= sparsity < 1:
                raise ValueError(f"{owner}(distribution[{pattern!r}]={sparsity}): a sparsity is in [0, 1)")
    elif not isinstance(distribution, str) or distribution not in DISTRIBUTIONS:
        raise ValueError(
            f"{owner}(distribution={distribution!r}): distribution is one of {', '.join(DISTRIBUTIONS)}, or a sparsity "
            "by pattern"
        )


def counts(owner: str, distribution: Distribution, shapes: Shapes, density: float) -> dict[str, int]:
    """How many weights each layer keeps: less than one away from its exact density; round(density * N) in all.

    Args:
        owner: name of the class that asks, for the error.
        distribution: a name in ``DISTRIBUTIONS``, or sparsities by pattern.
        shapes: shapes of the weights, by name.
        density: fraction kept of all N weights; with patterns, of those that match none.

    Raises:
        ValueError: if a layer would have no weight, or a pattern matches none.
    """
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    if isinstance(distribution, str):
        densities = DISTRIBUTIONS[distribution](shapes, density)
    else:
        for pattern in distribution:
            if not any(fnmatch(name, pattern) for name in shapes):
                raise ValueError(f"{owner}(distribution={pattern!r}): matches none of {', '.join(shapes)}")
        patterns = distribution.items()
        densities = {n: next((1 - s for p, s in patterns if fnmatch(n, p)), density) for n in shapes}
    exact = {name: densities[name] * size[name] for name in shapes}
    found = {name: int(value + 1e-9) for name, value in exact.items()}
    over = round(sum(exact.values())) - sum(found.values())
    for name in sorted(shapes, key=lambda n: found[n] - exact[n])[:over]:  # to the largest remainders
        found[name] += 1
    if empty := [name for name, count in found.items() if count < 1]:
        sparsity = float(f"{1 - density:.10g}")
        raise ValueError(
            f"{owner}(sparsity={sparsity}): {distribution} leaves no weight in {empty[0]}, which has {size[empty[0]]}; "
            "lower the sparsity or keep the layer dense"
        )
    return found
