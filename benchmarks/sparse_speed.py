"""How much faster masked networks are with the sparse kernels than with the fastest dense PyTorch, on this CPU.

ResNet-18 of width 64 for 32x32 images, uniform random masks on all convolutions but the stem. A training step is
forward, loss, backward and SGD with momentum and weight decay. The dense network is the fastest of eager and compiled,
NCHW and channels_last, in float32; and under autocast to bfloat16, where both sides are. Dense and sparse take turns;
the figures are medians of times and of their ratios. Rows at sparsity 0 have the same kernels with nothing pruned,
which shows the effect of layout and fusion alone. A second table shows, for each kind of layer, which part of the CPU's
peak of multiply-adds in registers is reached.

python benchmarks/sparse_speed.py [--quick]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import harness
import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_sparse_cl as scl
from lightning_sparse_cl.allocator import keep_freed_memory
from lightning_sparse_cl.kernels.build import lanes, library
from lightning_sparse_cl.kernels.layout import Grid
from lightning_sparse_cl.kernels.pattern import Geometry, Pattern

KINDS = {  # inputs, outputs, side, kernel, stride of ResNet-18's layers
    "stem": (3, 64, 32, 3, 1), "3x3, 64, 32x32": (64, 64, 32, 3, 1), "3x3/2, 64-128": (64, 128, 32, 3, 2),
    "3x3, 128, 16x16": (128, 128, 16, 3, 1), "1x1/2, 64-128": (64, 128, 32, 1, 2),
    "3x3, 256, 8x8": (256, 256, 8, 3, 1), "3x3, 512, 4x4": (512, 512, 4, 3, 1),
}  # fmt: skip


def network() -> nn.Module:
    """ResNet-18 with a head of ten classes, with batch-norm statistics of some data."""
    torch.manual_seed(0)
    backbone = scl.ResNet18(64)
    backbone.eval()(torch.zeros(1, 3, 32, 32))
    net = nn.Sequential(backbone, nn.Linear(512, 10)).train()
    with torch.no_grad():
        net(torch.randn(32, 3, 32, 32))
    return net


def masks(net: nn.Module, sparsity: float) -> dict[str, Tensor]:
    """Random masks of exactly this sparsity on each convolution but the first."""
    generator, found = torch.Generator().manual_seed(1), {}
    for name, p in net.named_parameters():
        if p.ndim == 4 and "stem" not in name:
            order = torch.randperm(p.numel(), generator=generator)
            found[name] = (order < round((1 - sparsity) * p.numel())).view(p.shape)
    return found


def training(net: nn.Module, x: Tensor, run: Callable, bf16: bool = False) -> tuple[Callable, torch.optim.Optimizer]:
    """A step, and its optimiser."""
    y = torch.arange(len(x)) % 10
    sgd = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, fused=True)

    def step() -> None:
        sgd.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            loss = F.cross_entropy(run(x), y)
        loss.backward()
        sgd.step()

    return step, sgd


def dense(mode: str, batch: int, quick: bool) -> dict[str, Callable]:
    """Dense candidates by name."""
    found = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        for compiled in (False,) if quick else (False, True):
            for bf16 in (False, True):
                if bf16 and (quick or layout is torch.contiguous_format):
                    continue
                net = network().to(memory_format=layout).train(mode == "train")
                x = torch.randn(batch, 3, 32, 32).to(memory_format=layout)
                run = torch.compile(net) if compiled else net
                name = " ".join(
                    ["bf16"] * bf16
                    + ["compiled" if compiled else "eager", "NCHW" if layout is torch.contiguous_format else "NHWC"]
                )
                found[name] = training(net, x, run, bf16)[0] if mode == "train" else inference(run, x, bf16)
    return found


def inference(run: Callable, x: Tensor, bf16: bool = False) -> Callable:
    """One batch."""

    def go() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            run(x)

    return go


def sparse(mode: str, batch: int, sparsity: float, bf16: bool = False) -> Callable:
    """The accelerated network."""
    net, x = network().train(mode == "train"), torch.randn(batch, 3, 32, 32)
    if mode == "inference":
        scl.accelerate(net, masks(net, sparsity), measure=sparsity > 0)  # at 0 also where dense is faster
        go = inference(net, x, bf16)
    else:
        go, sgd = training(net, x, net, bf16)
        found = scl.accelerate(net, masks(net, sparsity), [sgd], measure=sparsity > 0)
        go()
        found.train_compact()
    return go


def in_turn(
    runs: dict[str, Callable], rounds: int, tick: Callable[[], None], pause: float = 0
) -> dict[str, list[float]]:
    """Milliseconds of each, round after round, with several calls per turn if they are short.

    The first call of a turn is not counted: it finds the caches full of another network. ``pause`` seconds before each
    turn let the threads of the previous one go to sleep.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            time.sleep(pause)
            run()
            calls, start = 0, time.perf_counter()
            while calls < 1 or time.perf_counter() - start < 0.05:
                run()
                calls += 1
            times[name].append((time.perf_counter() - start) / calls * 1e3)
        tick()
    return times


def speeds(
    mode: str, batch: int, threads: int, sparsities: list[float], rounds: int, quick: bool, tick: Callable
) -> list[dict[str, Any]]:
    """Rows of the table, for one way to run."""
    torch.set_num_threads(threads)
    torch.compiler.reset()
    candidates = dense(mode, batch, quick)
    kernels = {f"{s}": sparse(mode, batch, s) for s in sparsities}
    if not quick:
        kernels |= {f"{s} bf16": sparse(mode, batch, s, bf16=True) for s in sparsities if s}
    times = in_turn(candidates | kernels, rounds, tick)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    best = min((n for n in candidates if "bf16" not in n), key=medians.get)
    half = min((n for n in candidates if "bf16" in n), key=medians.get, default=None)
    return [
        {
            "mode": mode, "batch": batch, "threads": threads, "sparsity": s, "dense": best,
            "dense_ms": round(medians[best], 2), "sparse_ms": round(medians[f"{s}"], 2),
            "speedup": round(statistics.median(d / o for d, o in zip(times[best], times[f"{s}"])), 2),
            "bf16_ms": None if half is None else round(medians[half], 2),
            "speedup under bf16": None if f"{s} bf16" not in times or half is None else
            round(statistics.median(d / o for d, o in zip(times[half], times[f"{s} bf16"])), 2),
        }
        for s in sparsities
    ]  # fmt: skip


def peak() -> float:
    """Multiply-adds per second of one thread, in registers."""
    n, best = 2_000_000, float("inf")
    for _ in range(7):
        start = time.perf_counter()
        library().multiply_adds(n)
        best = min(best, time.perf_counter() - start)
    return 16 * lanes() * n / best


def fractions(sparsities: list[float], batch: int = 32) -> list[dict[str, Any]]:
    """Fractions of the peak, by kind of layer and pass, on one thread."""
    torch.set_num_threads(1)
    rows = []
    for kind, (inputs, outputs, side, k, stride) in KINDS.items():
        for s in [0.0] if kind == "stem" else sparsities:
            weight, grid = torch.randn(outputs, inputs, k, k), Grid(batch)
            pattern = Pattern(torch.rand_like(weight) >= s, weight, Geometry(stride, k // 2))
            x, values = grid.block(torch.randn(batch, inputs, side, side)), pattern.gather(weight)
            y = pattern.forward(x, values, grid)
            passes = {
                "forward": lambda p=pattern, x=x, v=values, g=grid: p.forward(x, v, g),
                "input gradient": lambda p=pattern, x=x, y=y, v=values, g=grid: p.input_gradient(y, v, g, x.shape[2:4]),
                "weight gradient": lambda p=pattern, x=x, y=y, g=grid: p.weight_gradient(x, y, g),
            }
            times = in_turn(passes, 7, lambda: None)
            work = batch * pattern.entries * (side // stride) ** 2 / peak() * 1e3
            rows.append({"layer": kind, "sparsity": s} | {n: round(work / min(t), 3) for n, t in times.items()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = harness.arguments(parser)
    keep_freed_memory()
    torch._inductor.config.freezing = True  # folds constants of networks that are not trained
    sparsities = [0.9] if args.quick else [0.0, 0.75, 0.9, 0.95]
    threads = [2] if args.quick else [1, 2]
    rounds = 3 if args.quick else 7
    jobs = [(m, b, t) for t in threads for m, b in (("train", 32), ("inference", 32), ("inference", 1), ("train", 1))]
    rows: list[dict[str, Any]] = []
    with Progress() as progress:
        bar = progress.add_task("rounds", total=len(jobs) * rounds)
        for mode, batch, count in jobs:
            rows += speeds(mode, batch, count, sparsities, rounds, args.quick, partial(progress.advance, bar))
    parts = fractions([0.9] if args.quick else sparsities[1:])
    columns = ("mode", "batch", "threads", "sparsity", "dense", "dense_ms", "sparse_ms", "speedup", "bf16_ms",
               "speedup under bf16")  # fmt: skip
    harness.show("Milliseconds, the fastest dense network and the sparse one", rows, columns, columns)
    harness.show("Fraction of the FMA peak, one thread, batch 32", parts, list(parts[0]), list(parts[0]))
    name = "sparse_speed_quick" if args.quick else "sparse_speed"
    cpu = f"{torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"
    machine = f"{cpu}, {peak() / 1e9:.0f} G multiply-adds/s a core"
    print(harness.save(name, rows, machine=machine, seed=0, fractions=parts))


if __name__ == "__main__":
    main()
