"""A whole network in one call of C++: it computes what the module does, and refuses what it cannot."""

from __future__ import annotations

import copy
import pickle
import random
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from exported import NETWORKS, assert_close, data_of, network, signed
from forked import forked
from torch import Tensor, nn

import lightning_sparse_cl as scl
from lightning_sparse_cl.runtime.description import layers_of
from lightning_sparse_cl.runtime.file import SUMMED_FROM, spnet_bytes


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_those_of_the_module(name: str) -> None:
    """For batches that fill a vector's lanes with images, with parts of images, and not; in both orders of memory."""
    net, shape = network(name)
    flat = scl.FlatNetwork.of(net, shape)
    for batch in (1, 2, 3, 5, 8, 16, 17, 33):
        x = torch.randn(batch, *shape)
        assert_close(flat(x), net, x)
        if batch > 1 and min(shape) > 1:
            assert_close(flat(x.to(memory_format=torch.channels_last)), net, x)
    assert flat(torch.zeros(0, *shape)).shape == (0, flat.outputs)


@pytest.mark.parametrize("sparsity", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_sparsity_and_number_of_threads(sparsity: float, threads: int) -> None:
    net, shape = network("ResNet18", sparsity)
    flat, x = scl.FlatNetwork.of(net, shape), torch.randn(9, *shape)
    torch.set_num_threads(threads)
    assert_close(flat(x), net, x)
    assert_close(flat(x[:1]), net, x[:1])


def test_the_number_of_threads_changes_no_bit() -> None:
    net, shape = network("ResNet18")
    flat, x = scl.FlatNetwork.of(net, shape), torch.randn(39, *shape)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(flat(x))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize(("values", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.02), ("int8", 0.05)])
def test_narrow_values_are_smaller_and_zeros_stay_zeros(values: Any, tolerance: float) -> None:
    net, shape = network("SmallCNN")
    data = spnet_bytes(layers_of(net, shape), shape, values=values)
    x = torch.randn(4, *shape)
    assert_close(scl.FlatNetwork(data)(x), net, x, tolerance)
    whole = len(spnet_bytes(layers_of(net, shape), shape))
    alive = sum(int(m.weight.count_nonzero()) for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    assert len(data) < whole - (4 - {"float32": 4, "bfloat16": 2, "int8": 1}[values]) * alive * 0.9 + 1


def test_copies_and_threads() -> None:
    net, shape = network("SmallCNN")
    flat, x = scl.FlatNetwork.of(net, shape), torch.randn(8, 5, *shape)
    wanted = [flat(batch) for batch in x]
    for again in (copy.copy(flat), copy.deepcopy(flat), pickle.loads(pickle.dumps(flat))):
        assert torch.equal(again(x[0]), wanted[0]) and again.shape == flat.shape
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            assert all(map(torch.equal, pool.map(flat, x), wanted))


def test_what_is_not_a_number_stays_so() -> None:
    """As in torch: through ReLU and pooling, and in its own image alone."""
    for name in ("SmallCNN", "5x5, odd sizes", "SmallMLP"):
        net, shape = network(name, 0.0)
        x = torch.randn(3, *shape)
        x[1, 0, 2, 2] = torch.nan
        found = scl.FlatNetwork.of(net, shape)(x).isnan()
        with torch.no_grad():
            assert torch.equal(found, net(x).isnan()) and found[1].all() and not found[[0, 2]].any()


def test_networks_of_other_precisions_and_lists_for_sizes() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d([2, 2]), nn.Flatten()).eval()
    x = torch.randn(2, 3, 8, 8)
    wanted = net(x).detach()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        found = scl.FlatNetwork.of(copy.deepcopy(net).to(dtype), (3, 8, 8))(x)
        torch.testing.assert_close(found, wanted, rtol=0.02 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


def test_a_modules_training_mode_is_left_as_it_was() -> None:
    net, shape = network("SmallCNN")
    net.train()[0].eval()
    before = [m.training for m in net.modules()]
    layers_of(net, shape)
    assert [m.training for m in net.modules()] == before


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.conv(x)).flatten(1)


class Dropping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x).flatten(1)  # in eval mode, too


def hooked(where: int | None) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten())
    (net if where is None else net[where]).register_forward_hook(lambda module, args, output: 3 * output)
    return net


def replaced() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    net[0].forward = lambda x: x
    return net


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: Branching(), "Branching: what it computes cannot be traced: control flow"),
    (lambda: Scaled(), r"Scaled: the operation sigmoid cannot be exported: no layer of the runtime computes it"),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU()), r"Sequential: 1 \(GELU\) cannot be exported"),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, (3, 1))), r"its kernel is \(3, 1\)"),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")), "its padding is .*circular"),
    (lambda: nn.Sequential(nn.MaxPool2d(3, ceil_mode=True)), r"0 \(MaxPool2d\) cannot be exported"),
    (lambda: nn.Sequential(nn.AvgPool2d(3, 2, 1, count_include_pad=False)), r"0 \(AvgPool2d\) cannot be exported"),
    (lambda: nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), "it has no running statistics"),
    (Dropping, "it drops at random in eval mode, too"),
    (lambda: hooked(None), "Sequential: it has hooks"),
    (lambda: hooked(0), "Sequential: 0 has hooks"),
    (replaced, "Sequential: 0 has hooks, or a forward of its own"),
    (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.BatchNorm1d(288)), "it normalises flattened pixels"),
    (lambda: nn.Sequential(nn.Conv2d(3, 8, 1, padding=2)), "the runtime cannot run it: padding"),
    (lambda: nn.Identity(), "the runtime cannot run it: it has no layers"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_what_the_runtime_cannot_do_is_named(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        scl.FlatNetwork.of(make(), (3, 8, 8))
    assert "\n" not in str(error.value) and "use torch.export (.pt2)" in str(error.value)


def test_inputs_of_another_kind_are_refused() -> None:
    net, shape = network("SmallCNN")
    flat = scl.FlatNetwork.of(net, shape)
    for x in (torch.zeros(1, 3, 8, 8), torch.zeros(1, *shape).double(), torch.zeros(shape)):
        with pytest.raises(ValueError, match=r"it takes float32 images \(B, 3, 16, 16\) on the CPU, and got"):
            flat(x)
    with pytest.raises(ValueError, match=r"it takes uint8 images \(B, 16, 16, 3\)"):
        flat.of_bytes(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_damaged_files_are_refused_in_one_line() -> None:
    data = data_of()
    newer = data[:8] + struct.pack("<Q", 9) + data[16:]
    cases = {b"": "too short", data[:-8]: "cut, or too long", data + b"\0" * 8: "cut", b"x" * 200: "no .spnet file"}
    for bad, message in (cases | {newer: r"of version 9 of the format, and this runtime reads up to 1"}).items():
        with pytest.raises(ValueError, match=message):
            scl.FlatNetwork(bad)
    rng = random.Random(0)
    for _ in range(200):
        at = rng.randrange(len(data))
        with pytest.raises(ValueError, match="spnet: "):
            scl.FlatNetwork(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])


def hostile(seed: int, rounds: int) -> None:
    """Files with a right checksum and anything in them, mostly in the header and the layers; what opens is run."""
    rng, opened = random.Random(seed), 0
    for _ in range(rounds):
        body = bytearray(data_of(rng.choice(["pre-activation", "averages", "SmallMLP", "dilation, groups"])))
        for _ in range(rng.choice([1, 1, 2, 5])):
            at = rng.randrange(SUMMED_FROM, min(len(body), 1200))
            kind = rng.randrange(3)
            if kind == 0:
                body[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                body[at] = rng.randrange(256)
            else:
                at -= at % 4
                body[at : at + 4] = struct.pack("<i", rng.choice([-1, 0, 1, 2, 3, 7, 255, 2**16, 2**31 - 1, -(2**31)]))
        try:
            flat = scl.FlatNetwork(signed(bytes(body)))
            if max(flat.shape) > 64 or flat.outputs > 2**16:
                continue
            for batch in (1, 3):
                flat(torch.randn(batch, *flat.shape))
            opened += 1
        except (ValueError, UnicodeDecodeError):
            pass
    assert opened > rounds / 20


@pytest.mark.parametrize("rounds", [300, pytest.param(20_000, marks=pytest.mark.slow)])
def test_hostile_files_do_not_end_the_process(rounds: int) -> None:
    assert forked(hostile, 0, rounds) == 0


@pytest.mark.parametrize("pooling", [nn.AvgPool2d, nn.MaxPool2d])
@pytest.mark.parametrize(("side", "size"), [(8, 4), (8, 8), (16, 2), (16, 4), (16, 8), (16, 16), (32, 8), (32, 16)])
def test_pooling_of_windows_larger_than_the_parts_of_images(pooling: Any, side: int, size: int) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), pooling(size), nn.Flatten()).eval()
    flat = scl.FlatNetwork.of(net, (3, side, side))
    for batch in (1, 2, 4, 9):
        x = torch.randn(batch, 3, side, side)
        assert_close(flat(x), net, x)
        x[0, 0, 1, 2] = float("nan")
        assert torch.equal(flat(x).isnan(), net(x).isnan())
