"""A layer of a masked network as the kernels see it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sparse_cl.kernels.build import library
from lightning_sparse_cl.kernels.functions import Gather, Scatter
from lightning_sparse_cl.kernels.layout import Blocked, Grid
from lightning_sparse_cl.kernels.pattern import AROUND, FLAT, Geometry, Pattern


class Layer:
    """A convolution or linear layer, its pattern, and where its values come from.

    Args:
        name: name of the layer in the network.
        module: the layer.
        mask: a mask of the weight's shape, True where alive. None if the weight is not masked.
    """

    def __init__(self, name: str, module: nn.Conv2d | nn.Linear, mask: Tensor | None) -> None:
        self.name, self.module = name, module
        self.weight = module.weight
        self.geometry = Geometry()
        if isinstance(module, nn.Conv2d) and not isinstance(module.padding, str):  # see unsupported
            self.geometry = Geometry(module.stride[0], module.padding[0])
        self._form = _form(module)
        self.compact: nn.Parameter | None = None
        """The values that are trained in place of the weight, if there are any."""
        self.remask(mask)

    def remask(self, mask: Tensor | None) -> None:
        """Follow a change of the mask; its lists are made when they are needed."""
        self.mask = mask
        self.density = 1.0 if mask is None else mask.count_nonzero().item() / mask.numel()
        self._patterns: dict[int, Pattern] = {}
        self._still: dict[Pattern, tuple[object, Tensor]] = {}
        self._folded: dict[Pattern, tuple[object, Tensor, Tensor]] = {}
        self.chosen: dict[tuple[object, ...], bool] = {}
        """What :class:`Choices` has found for the layer."""

    def forget(self) -> None:
        """Forget the values: other code may have written to the weight."""
        self._still.clear()
        self._folded.clear()

    @property
    def bias(self) -> Tensor | None:
        return dict.get(self.module._parameters, "bias")  # a plain look-up would end compact training

    @property
    def changed(self) -> bool:
        """Whether the module now has another weight (as in ``torch.func.functional_call``), type or form."""
        weight, bias = dict.get(self.module._parameters, "weight"), self.bias
        whole = bias is None or (bias.dtype == torch.float32 and bias.device.type == "cpu")
        if weight is not self.weight or weight.dtype != torch.float32 or weight.device.type != "cpu" or not whole:
            return True
        return _form(self.module) != self._form

    def takes(self, x: Blocked | Tensor) -> bool:
        """Whether the kernels can take this input: others are left to torch, and its errors."""
        data = x.data if isinstance(x, Blocked) else x
        linear = isinstance(self.module, nn.Linear)
        if not is_taken(data.dtype) or data.numel() == 0:
            return False
        if linear:
            return not isinstance(x, Blocked) and data.ndim > 1 and data.shape[-1] == self.weight.shape[1]
        if (not isinstance(x, Blocked) and data.ndim != 4) or data.shape[1] != self.weight.shape[1]:
            return False
        h, w = (n * p for n, p in zip(data.shape[2:4], x.grid[1:])) if isinstance(x, Blocked) else data.shape[2:]
        return min(h, w) + 2 * self.geometry.padding >= self.weight.shape[2]

    @property
    def keeps_size(self) -> bool:
        """Whether it pads so that parts of an image remain parts of an image."""
        return 2 * self.geometry.padding + 1 == (self.weight.shape[2] if self.weight.ndim == 4 else 1)

    def keeps(self, x: Blocked) -> bool:
        """Whether the parts of images in which an input is laid out stay whole."""
        parts = [n % self.geometry.stride == 0 for n in x.data.shape[2:4]]
        return x.grid[1:] == (1, 1) or (self.keeps_size and all(parts))

    def grid(self, x: Tensor) -> Grid:
        """The grid in which to lay out images (B, C, H, W), also for layers that may follow until images are 4x4."""
        h, w = x.shape[2:]
        stride = self.geometry.stride
        if not self.keeps_size or h % stride or w % stride:
            return Grid(len(x))
        return Grid.of(len(x), h, w, stride * max(1, min(h, w) // 4 // stride))  # parts that the stride divides

    @property
    def pattern(self) -> Pattern:
        """The lists in whose order values are trained."""
        return self._pattern(3)

    def pattern_for(self, x: Blocked) -> Pattern:
        """The lists for an input: with gradients those of training, otherwise lists that suit the size of its parts."""
        if torch.is_grad_enabled():
            return self.pattern
        stride, padding = self.geometry
        k = self.weight.shape[2] if self.weight.ndim == 4 else 1
        h, w = (((n * p + 2 * padding - k) // stride + 1) // p for n, p in zip(x.data.shape[2:4], x.grid[1:]))
        mode = AROUND if k == 3 and stride == 1 else FLAT
        return self._pattern(library().side(mode, h, w, x.grid[1:] == (1, 1)))

    def _pattern(self, side: int) -> Pattern:
        found = self._patterns.get(side)
        if found is None or found.strides != self.weight.stride():
            weight = self.weight.detach()
            mask = torch.ones_like(weight, dtype=torch.bool) if self.mask is None else self.mask
            found = self._patterns[side] = Pattern(mask, weight, self.geometry, side)
        return found

    def values(self, pattern: Pattern) -> Tensor:
        """The values (n,) in the order of a pattern, with a gradient if one is wanted."""
        if self.compact is not None:
            return self.compact if pattern is self.pattern else self.pattern.reordered(self.compact, pattern)
        if torch.is_grad_enabled() and self.weight.requires_grad:
            self.forget()  # an optimiser that writes to ``weight.data`` leaves no trace
            return Gather.apply(self.weight, pattern)
        kept = self._still.get(pattern)
        if kept is None or kept[0] != self._at:
            with torch.inference_mode(False):  # values are kept, and a later call may take gradients
                kept = self._still[pattern] = self._at, pattern.gather(self.weight.detach())
        return kept[1]

    def dense(self, x: Tensor) -> Tensor:
        """What torch computes from x and the values that are trained in place of the weight."""
        weight = Scatter.apply(self.compact, self.weight.detach(), self.pattern)
        if isinstance(self.module, nn.Linear):
            return F.linear(x, weight, self.bias)
        return F.conv2d(x, weight, self.bias, *self.geometry)

    @property
    def _at(self) -> tuple[int, int]:
        """Changes whenever the values change."""
        weight = self.weight if self.compact is None else self.compact
        return weight._version, weight.data_ptr()

    def folded(self, pattern: Pattern, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor | None]:
        """Values and bias with which the layer also does its batch-norm, in eval mode."""
        if norm is None:
            return self.values(pattern).detach(), self.bias
        gamma, beta = norm._parameters["weight"], norm._parameters["bias"]
        mean, variance = norm._buffers["running_mean"], norm._buffers["running_var"]
        bias, kept = self.bias, self._folded.get(pattern)
        at = [
            self._at,
            norm.eps,
            *(None if t is None else (t._version, t.data_ptr()) for t in (bias, gamma, beta, mean, variance)),
        ]
        if kept is None or kept[0] != at:
            assert mean is not None and variance is not None, "a batch-norm without statistics is not fused"
            scale = torch.rsqrt(variance + norm.eps)
            scale = scale if gamma is None else scale * gamma.detach()
            shift = -mean if bias is None else bias.detach() - mean
            shift = shift * scale if beta is None else shift * scale + beta.detach()
            whole = scale.view(-1, *(1,) * (self.weight.ndim - 1)).expand_as(self.weight)
            whole = torch.empty_like(self.weight).copy_(whole)
            kept = self._folded[pattern] = at, self.values(pattern).detach() * pattern.gather(whole), shift
        return kept[1:]


def _form(module: nn.Module) -> tuple[Any, ...]:
    """The attributes of a convolution, besides weight and bias, that decide what it computes."""
    if not isinstance(module, nn.Conv2d):
        return ()
    return module.stride, module.padding, module.dilation, module.groups, module.padding_mode


def is_taken(dtype: torch.dtype) -> bool:
    """Whether the kernels take inputs of a type: float32, and under autocast those that torch has made shorter."""
    return dtype == torch.float32 or (torch.is_autocast_enabled("cpu") and dtype == torch.get_autocast_dtype("cpu"))


def unsupported(module: nn.Module) -> str | None:
    """Why there is no kernel for a layer, or None."""
    if type(module) is nn.Linear:
        plain = module.weight.is_contiguous() and module.weight.dtype == torch.float32
        return None if plain and module.weight.device.type == "cpu" else "no plain float32 weights on the CPU"
    if type(module) is not nn.Conv2d:
        return f"a {type(module).__name__}"
    k, s, p = module.kernel_size, module.stride, module.padding
    if module.groups != 1:
        return f"{module.groups} groups"
    if k not in ((1, 1), (3, 3)):
        return f"a kernel of {k[0]}x{k[1]} pixels"
    if s not in ((1, 1), (2, 2)):
        return f"stride {s}"
    if module.dilation != (1, 1):
        return f"dilation {module.dilation}"
    if isinstance(p, str) or p[0] != p[1] or not p[0] < k[0] or module.padding_mode != "zeros":
        return f"padding {p!r}, {module.padding_mode}"
    if not (module.weight.is_contiguous() or module.weight.is_contiguous(memory_format=torch.channels_last)):
        return "weights that are a part of another tensor"
    if module.weight.dtype != torch.float32 or module.weight.device.type != "cpu":
        return f"weights in {module.weight.dtype} on {module.weight.device}"
    return None
