"""Kernels or torch: measured for each layer and shape."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sparse_cl.acceleration.layer import Layer
from lightning_sparse_cl.acceleration.rows import images_as_rows, rows_as_images
from lightning_sparse_cl.kernels.functions import Convolution
from lightning_sparse_cl.kernels.layout import Blocked

MOST = 32  # images per measurement: with more, both take proportionally longer


class Choices:
    """Measures, once for each layer and shape, whether the kernels are faster than torch, and remembers it.

    Args:
        measure: whether to time the kernels; if False, they are assumed to be faster.
    """

    def __init__(self, measure: bool = True) -> None:
        self.measure = measure
        self.taken: dict[str, bool] = {}
        """For each layer and shape measured, whether the kernels are used."""
        self._dense: set[str] = set()  # layers and densities

    def sparse(self, layer: Layer, x: Tensor | Blocked) -> bool:
        """Whether to use the kernels for a layer and its input, forward and, where gradients are taken, backward."""
        if not self.measure:
            return True
        if isinstance(layer.module, nn.Linear):
            assert isinstance(x, Tensor), "rows are never blocked"
            x = rows_as_images(x)
        grads, threads = torch.is_grad_enabled(), torch.get_num_threads()
        shape = (x.data.shape, x.grid) if isinstance(x, Blocked) else x.shape
        halved = str(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else ""
        if (shape, grads, threads, halved) in layer.chosen:
            return layer.chosen[shape, grads, threads, halved]
        images, h, w = (x.grid.images, *_pixels(x)) if isinstance(x, Blocked) else (len(x), *x.shape[2:])
        images = min(MOST, 1 << (images - 1).bit_length())  # an epoch's last batch may have any size
        about = (tuple(layer.weight.shape), tuple(layer.geometry), images, h, w, round(layer.density, 2), grads)
        key = f"{about} {threads} {halved}".strip()
        if key not in self.taken:
            sparse, dense = _measure(layer, x, grads)
            self.taken[key] = sparse <= dense
        layer.chosen[shape, grads, threads, halved] = self.taken[key]
        if grads and not self.taken[key]:
            self._dense.add(f"{layer.name} {layer.density:.2f}")
        return self.taken[key]

    def state_dict(self) -> dict[str, Any]:
        return {"taken": dict(self.taken), "dense": sorted(self._dense)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Decide as before, so that what is computed is the same."""
        self.taken |= state.get("taken", {})
        self._dense |= set(state.get("dense", ()))

    def dense(self, layer: Layer) -> bool:
        """Whether torch was faster in training."""
        return f"{layer.name} {layer.density:.2f}" in self._dense


def _pixels(x: Blocked) -> tuple[int, int]:
    return x.data.shape[2] * x.grid.rows, x.data.shape[3] * x.grid.columns


def _measure(layer: Layer, x: Tensor | Blocked, grads: bool) -> tuple[float, float]:
    """Seconds that a layer takes by the kernels and by torch, each with the changes of layout that it needs here.

    Args:
        layer: the layer.
        x: its input; for a linear layer, rows as images.
        grads: whether to measure the backward pass, too.
    """
    if isinstance(x, Blocked) and not layer.keeps(x):
        x = x.plain()
    if isinstance(x, Blocked):
        grid = x.grid._replace(images=min(MOST, x.grid.images))
        x = Blocked(x.data[: grid.groups], grid)
    else:
        x = x[:MOST]
    linear = isinstance(layer.module, nn.Linear)
    grid = x.grid if isinstance(x, Blocked) else layer.grid(x)
    first = x if isinstance(x, Blocked) else Blocked(grid.block(x), grid)
    if linear and isinstance(x, Tensor):
        x = x.permute(0, 2, 3, 1).flatten(0, 2)
    pattern = layer.pattern_for(first)
    values, weight = (t.detach().requires_grad_(grads) for t in (pattern.gather(layer.weight), layer.weight))
    there = (x.data if isinstance(x, Blocked) else x).detach().clone().requires_grad_(grads)

    def sparse() -> Tensor:
        given = rows_as_images(there) if linear else there
        given = given if isinstance(x, Blocked) else grid.block(given.float())
        y = Convolution.apply(given, values, None, pattern, grid)
        return images_as_rows(grid.unblock(y), there.shape) if linear else y

    def dense() -> Tensor:
        given = grid.unblock(there) if isinstance(x, Blocked) else there
        return F.linear(given, weight) if linear else grid.block(F.conv2d(given, weight, None, *layer.geometry))

    times: dict[Callable[[], Tensor], list[float]] = {sparse: [], dense: []}
    for _ in range(4):
        for run, taken in times.items():
            start = time.perf_counter()
            y = run()
            if grads:
                y.backward(y.detach())
            taken.append(time.perf_counter() - start)
        fast, slow = sorted((min(times[sparse]), min(times[dense])))
        if len(taken) > 1 and slow > 1.5 * fast:  # clear enough
            break
    return min(times[sparse]), min(times[dense])
