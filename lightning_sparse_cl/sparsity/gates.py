"""Learnable binary masks over channels and kernels: what CL-LSG grows, picks and releases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_sparse_cl.sparsity.channels import Channels
from lightning_sparse_cl.sparsity.units import kernelwise


def binary_concrete(m: Tensor, temperature: float = 1.0) -> Tensor:
    """Draw binary masks that are 1 with probability sigma(m), with a gradient straight through the threshold.

    sigma((m + g_0 - g_1) / T) > 0.5, where g_0 and g_1 are Gumbel noise. Eq 5 of CL-LSG as printed lacks the log-odds
    of the alternative: the mask would be on with probability 1/2 at most, whatever m is.

    Args:
        m: real-valued mask, any shape.
        temperature: T; the larger it is, the farther from the threshold the gradient reaches.
    """
    uniform = torch.rand(m.shape, device=m.device).clamp_(1e-6, 1 - 1e-6)
    soft = ((m.float() + uniform.logit()) / temperature).sigmoid()  # the difference of two Gumbels is logistic
    return ((soft > 0.5).float() + (soft - soft.detach())).to(m.dtype)


class GrowthGates(nn.Module):
    """The masks m^g, m^a and m^s of CL-LSG over a network of full size, of which a part is in use.

    Channels are *allocated* (the seed's, and those grown) or not; kernels, one k x k slice for an input and an output
    channel, or a weight of a linear layer, are *owned* by the tasks that use them, *released* (allocated but unused),
    or can be grown. What a kernel is multiplied with:

    * owned: the selective mask m^s, binary, learnt on frozen weights (the paper calls it soft, and defines it binary);
    * released: 1, its weights are trained again; so are those of the seed in the first task (eq 2 read to the letter
      would learn m^a on them too);
    * grown: m^g of its output channel, m^g of its input channel (1 where allocated) and the attentive mask m^a.

    m^s and m^a are on different kernels, so that one real-valued tensor per layer serves both. In eval mode, and when
    noise is off, a mask is 1 where m > 0. Layers whose outputs are added share channels. The head reads all channels
    that are on.

    Args:
        seed: fraction of each layer's channels that the seed network has, in (0, 1]: the first ones.
        penalty: lambda, the loss coefficient (eq 2) of the expected number of grown channels, sum sigma(m^g).
        selective: learn m^s; otherwise all owned kernels are used.
        attentive: learn m^a; otherwise all kernels of a grown channel are used.
        retrain: train released kernels; otherwise they stay unused.
        temperature: temperature of the draws.
        kernel_init: value of m^a and m^s at a task's start; at 1 a kernel is on with probability 0.73.
        channel_init: value of m^g at a task's start.
        noise: draw masks in training; otherwise they are thresholded, with the same gradient. Drawing regularises:
            in runs of a few hundred steps per task, networks whose masks are not drawn learn more.

    Raises:
        ValueError: if an argument is out of range.
    """

    growing: Tensor
    first: Tensor
    """Whether no earlier task owns a kernel."""

    def __init__(
        self,
        seed: float = 0.125,
        penalty: float = 1e-4,
        selective: bool = True,
        attentive: bool = True,
        retrain: bool = True,
        temperature: float = 1.0,
        kernel_init: float = 1.0,
        channel_init: float = 0.0,
        noise: bool = True,
    ) -> None:
        super().__init__()
        if not 0 < seed <= 1:
            raise ValueError(f"GrowthGates(seed={seed}): the fraction of channels to start from, in (0, 1]")
        if not penalty >= 0:
            raise ValueError(f"GrowthGates(penalty={penalty}): a loss coefficient is >= 0")
        if not temperature > 0:
            raise ValueError(f"GrowthGates(temperature={temperature}): a temperature is positive")
        self.seed, self.penalty, self.temperature = seed, penalty, temperature
        self.selective, self.attentive, self.retrain = selective, attentive, retrain
        self.kernel_init, self.channel_init = kernel_init, channel_init
        self.noise = noise
        self.register_buffer("growing", torch.tensor(False))
        self.channel, self.kernel = nn.ParameterList(), nn.ParameterList()

    def build(self, network: nn.Module) -> None:
        """Masks for every convolution and linear layer of ``network``; the last one is the head.

        Raises:
            ValueError: if channels cannot be followed through the network, or a convolution has groups.
        """
        self.channel, self.kernel = nn.ParameterList(), nn.ParameterList()
        self.channels = Channels.of(network)
        weights = dict(network.named_parameters())
        if grouped := [n for n in self.channels.along if isinstance(network.get_submodule(n), nn.Conv2d)]:
            raise ValueError(
                f"GrowthGates: {grouped[0]} is a depthwise convolution, which has no kernels to choose from"
            )
        *self.names, self.head = (f"{name}.weight" for name in self.channels.reads)
        self.width = {name: weights[name].shape[1] for name in (*self.names, self.head)}
        fixed = (self.channels.input, self.channels.output)
        for s, size in enumerate(self.channels.sizes):
            allocated = torch.ones(size, dtype=torch.bool)
            allocated[size if s in fixed else max(1, int(self.seed * size)) :] = False
            self.register_buffer(f"allocated_{s}", allocated)
            self.channel.append(nn.Parameter(torch.zeros(size), requires_grad=s not in fixed))
        for i, name in enumerate(self.names):
            shape = weights[name].shape[:2]
            self.kernel.append(nn.Parameter(torch.zeros(shape), requires_grad=self.selective or self.attentive))
            self.register_buffer(f"owned_{i}", torch.zeros(shape, dtype=torch.bool))
        self.register_buffer("first", torch.tensor(True))
        self.begin({})

    @torch.no_grad()
    def begin(self, owned: dict[str, Tensor]) -> None:
        """A task starts: masks are reset, nothing grows yet; ``owned`` says, by weight, which entries tasks use."""
        self.growing.fill_(False)
        self.first.fill_(not owned)
        for i, name in enumerate(self.names):
            self.kernel[i].fill_(self.kernel_init)
            if name in owned:
                self._owned(i).copy_(kernelwise(owned[name]))
        for m in self.channel:
            m.fill_(self.channel_init)

    @torch.no_grad()
    def finish(self) -> dict[str, Tensor]:
        """A task ends: grown channels are allocated. Returns what the task uses, a mask of each weight's shape."""
        with self.still():
            masks = self.masks()
        if self.growing:
            for s, m in enumerate(self.channel):
                self.allocated(s).logical_or_(m > 0)
        return {name: mask > 0 for name, mask in masks.items()}

    def allocated(self, s: int) -> Tensor:
        """Channels (C,) of a set that are in the network now."""
        return self.get_buffer(f"allocated_{s}")

    def allocated_kernels(self) -> dict[str, Tensor]:
        """Kernels (C_out, n_in) between allocated channels, by weight."""
        return {
            name: _outer(self.allocated(self._writes(name)), self._wide(name, self.allocated(self._reads(name))))
            for name in (*self.names, self.head)
        }

    def masks(self) -> dict[str, Tensor]:
        """What each weight is multiplied with: (C_out, n_in), 0 or 1, drawn unless noise is off."""
        channel = [
            torch.where(self.allocated(s), 1.0, self._draw(m) * self.growing if m.requires_grad else 0.0)
            for s, m in enumerate(self.channel)
        ]
        found = {}
        for i, name in enumerate(self.names):
            reads, writes = self._reads(name), self._writes(name)
            allocated = _outer(self.allocated(writes), self._wide(name, self.allocated(reads)))
            drawn = self._draw(self.kernel[i])
            grown = _outer(channel[writes], self._wide(name, channel[reads]))
            found[name] = torch.where(
                self._owned(i),
                drawn if self.selective else 1.0,
                torch.where(
                    allocated,
                    self.first.to(drawn) if not self.retrain else 1.0,
                    grown * drawn if self.attentive else grown,
                ),
            )
        found[self.head] = self._wide(self.head, channel[self._reads(self.head)])[None]
        return found

    def weights(self, network: nn.Module) -> dict[str, Tensor]:
        """The weights of ``network`` times their masks."""
        weights = dict(network.named_parameters())
        return {n: weights[n] * m.view(*m.shape, *[1] * (weights[n].ndim - 2)) for n, m in self.masks().items()}

    def expected_size(self) -> Tensor:
        """Expected number of grown channels, sum sigma(m^g) over those that are not allocated; 0 unless growing."""
        return sum((m.sigmoid() * ~self.allocated(s)).sum() for s, m in enumerate(self.channel)) * self.growing

    @contextmanager
    def still(self) -> Iterator[None]:
        """Inside, masks are thresholded, as in eval mode."""
        before, self.noise = self.noise, False
        try:
            yield
        finally:
            self.noise = before

    def _draw(self, m: Tensor) -> Tensor:
        if self.training and self.noise:
            return binary_concrete(m, self.temperature)
        soft = (m / self.temperature).sigmoid()
        return (m > 0).to(m) + (soft - soft.detach())

    def _owned(self, i: int) -> Tensor:
        return self.get_buffer(f"owned_{i}")

    def _reads(self, name: str) -> int:
        return self.channels.reads[name.removesuffix(".weight")]

    def _writes(self, name: str) -> int:
        return self.channels.writes[name.removesuffix(".weight")]

    def _wide(self, name: str, channels: Tensor) -> Tensor:
        """One entry per value that a layer reads; a linear layer after convolutions reads several per channel."""
        return channels.repeat_interleave(self.width[name] // len(channels))


def _outer(out: Tensor, into: Tensor) -> Tensor:
    return out[:, None] * into[None]
