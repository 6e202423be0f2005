"""What a step costs here compared with a bare hand-written PyTorch loop that does identical work.

DER++ and EsaCL-DER++ (every sample kept), batch 32, two replay draws of 32, images 3x32x32, on a ResNet-18 of width 64
and 20 and on a linear network, which shows the fixed cost. The package's fit and the loop alternate in one process; the
figures are medians over rounds of the median step, and of their ratio. The loop has what the package has:
channels_last, index_select, one augmentation for both draws, an allocator that keeps freed memory.

python benchmarks/overhead.py [--quick]
"""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import harness
import lightning.pytorch as pl
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_sparse_cl as scl

BATCH, MEMORY, CLASSES = 32, 200, 10
IMAGES = torch.randint(256, (2048, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(2048) % CLASSES
MEAN, STD = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.29)
SCALE, SHIFT = 1 / (255 * STD), MEAN / STD


class Clock(pl.Callback):
    """Seconds from one step's start to the next."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.at.append(time.perf_counter())


class Contiguous(pl.Callback):
    """Undoes channels_last, to show what it gains."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        nn.utils.convert_conv2d_weight_memory_format(pl_module, torch.contiguous_format)


def package(method: str, backbone: nn.Module, steps: int, *more: pl.Callback) -> list[float]:
    """Seconds of each step in the package; neither side logs, saves or shows anything."""
    torch.manual_seed(0)
    objective = scl.DERpp(MEMORY, BATCH, forward="joint")
    if method == "EsaCL":
        keep_all = scl.LossSelection(1, 1)
        dense = [] if isinstance(backbone, nn.Flatten) else None
        module = scl.EsaCL(backbone, objective, selection=keep_all, dense=dense)
    else:
        module = scl.ContinualModule(backbone, objective)
    clock = Clock()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_train_batches=steps + 1,
        callbacks=[scl.TaskSchedule(1), scl.RandomState(), scl.FlopsCounter(), scl.FiniteLoss(), clock, *more],
    )  # fmt: skip
    n = min(BATCH * (steps + 1), len(IMAGES))
    repeat = -(-BATCH * (steps + 1) // n)
    train = (IMAGES[:n].repeat(repeat, 1, 1, 1), LABELS[:n].repeat(repeat))
    transform = scl.ImageTransform(MEAN.flatten().tolist(), STD.flatten().tolist(), crop=4, flip=True)
    trainer.fit(module, scl.SplitTensors(train, train, 1, batch_size=BATCH, transform=transform))
    return [b - a for a, b in pairwise(clock.at)]


def augmented(x: Tensor) -> Tensor:
    """Random crop and flip of each sample, then normalisation, all in one batch."""
    b, c, h, w = x.shape
    x = F.pad(x, [4] * 4)
    x = torch.cat([x, x.flip(3)])
    image, channel, row, _ = x.stride()
    top, left = torch.randint(9, (2, b))
    first = (torch.arange(b) + b * torch.randint(2, (b,))) * image + top * row + left
    x = x.as_strided(((2 * b - 1) * image + 8 * (row + 1) + 1, c, h, w), (1, channel, row, 1)).index_select(0, first)
    return x * SCALE - SHIFT


def loop(method: str, backbone: nn.Module, steps: int) -> list[float]:
    """Seconds of each step of the hand-written loop."""
    torch.manual_seed(0)
    backbone.eval()
    with torch.no_grad():
        head = nn.Linear(backbone(torch.zeros(1, 3, 32, 32)).shape[1], CLASSES)
    backbone.to(memory_format=torch.channels_last)
    network = nn.Sequential(backbone, head).train()
    step = {"DER++": plain, "EsaCL": sam_and_frank_wolfe}[method](network, not isinstance(backbone, nn.Flatten))
    images, labels = torch.zeros(MEMORY, 3, 32, 32, dtype=torch.uint8), torch.zeros(MEMORY, dtype=torch.long)
    logits, seen, at = torch.zeros(MEMORY, CLASSES), 0, []
    for batch in torch.randperm(len(IMAGES)).repeat(-(-steps * BATCH // len(IMAGES)) + 1).split(BATCH):
        at.append(time.perf_counter())
        if len(at) > steps:
            break
        raw, y = IMAGES.index_select(0, batch), LABELS[batch]
        x, sizes = augmented(raw), [BATCH]
        drawn = [torch.randperm(min(seen, MEMORY))[:BATCH] for _ in range(2 if seen else 0)]
        if drawn:
            x = torch.cat([x, augmented(images.index_select(0, torch.cat(drawn)))])
            sizes += [len(i) for i in drawn]

        def loss(x: Tensor = x, y: Tensor = y, sizes: list[int] = sizes, drawn: list = drawn) -> tuple[Tensor, Tensor]:
            out, *replayed = network(x).split(sizes)
            total = F.cross_entropy(out, y)
            if replayed:
                total = total + 0.2 * F.mse_loss(replayed[0], logits[drawn[0]])
                total = total + 0.5 * F.cross_entropy(replayed[1], labels[drawn[1]])
            return total, out

        out = step(loss)
        n = torch.arange(seen, seen + BATCH)
        slots = torch.where(n < MEMORY, n, (torch.rand(BATCH) * (n + 1)).long())
        kept = slots < MEMORY
        images[slots[kept]], labels[slots[kept]], logits[slots[kept]] = raw[kept], y[kept], out.detach()[kept]
        seen += BATCH
    return [b - a for a, b in pairwise(at)]


def plain(network: nn.Module, _: bool) -> Callable[[Callable], Tensor]:
    """SGD."""
    sgd = torch.optim.SGD(network.parameters(), lr=0.03)

    def step(loss: Callable) -> Tensor:
        sgd.zero_grad()
        value, out = loss()
        value.backward()
        sgd.step()
        return out

    return step


def sam_and_frank_wolfe(network: nn.Module, dense: bool) -> Callable[[Callable], Tensor]:
    """SAM, then Frank-Wolfe on the pruned weights and SGD with momentum on the others."""
    named = dict(network.named_parameters())
    pruned = [named[n] for n in scl.sparse_weights(network, None if dense else [])]
    rest = [p for p in named.values() if not any(p is q for q in pruned)]
    sgd = torch.optim.SGD(rest, lr=0.01, momentum=0.9)
    norms = nn.modules.batchnorm._BatchNorm
    sums: list[Tensor] = []
    ks = [max(10, int(0.05 * p.numel())) for p in pruned]
    radii = [5 * float(p.detach().norm()) / k**0.5 for p, k in zip(pruned, ks)]
    params = list(network.parameters())

    def step(loss: Callable) -> Tensor:
        network.zero_grad()
        value, out = loss()
        value.backward()
        with torch.no_grad():
            theta = [p.clone() for p in params]
            grads = [p.grad for p in params]
            scale = 0.05 / (nn.utils.get_total_norm(grads) + 1e-12)
            torch._foreach_add_(params, torch._foreach_mul(grads, scale))
        network.zero_grad()
        for m in network.modules():
            if isinstance(m, norms):
                m.track_running_stats = False
        loss()[0].backward()
        for m in network.modules():
            if isinstance(m, norms):
                m.track_running_stats = True
        with torch.no_grad():
            torch._foreach_copy_(params, theta)
            for i, (p, k, r) in enumerate(zip(pruned, ks, radii)):
                if len(sums) <= i:
                    sums.append(p.grad.clone())
                else:
                    sums[i].add_(p.grad)
                size = sums[i].abs()
                vertex, n = torch.zeros_like(size), size.numel()
                top = size.as_strided((n,), (1,)).topk(k, sorted=False).indices
                vertex.as_strided((n,), (1,))[top] = -r
                p.lerp_(vertex.mul_(sums[i].sign()), 0.01)
        sgd.step()
        return out

    return step


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18, width 64": partial(scl.ResNet18, 64),
    "ResNet-18, width 20": partial(scl.ResNet18, 20),
    "linear": nn.Flatten,
}


def measure(network: str, method: str, steps: int, rounds: int) -> Iterator[tuple[float, float]]:
    """Median step of the package and of the loop, round after round, in turn."""
    for r in range(rounds):
        sides = {side: statistics.median(side(method, NETWORKS[network](), steps)[1:])
                 for side in ((package, loop) if r % 2 else (loop, package))}  # fmt: skip
        yield sides[package], sides[loop]


def without_channels_last(method: str, backbone: nn.Module, steps: int) -> list[float]:
    return package(method, backbone, steps, Contiguous())


def compiled(method: str, backbone: nn.Module, steps: int) -> list[float]:
    backbone.compile()
    return package(method, backbone, steps)


def defaults(network: str, steps: int, rounds: int) -> dict[str, Any]:
    """How much longer the package's DER++ step takes with one choice changed: the median of the rounds' ratios."""
    sides = (package, without_channels_last, compiled)
    times: dict[Callable, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            times[side].append(statistics.median(side("DER++", NETWORKS[network](), steps)[2:]))
    ratios = {side: statistics.median(a / b for a, b in zip(times[side], times[package])) for side in sides}
    return {
        "network": network, "ms a step": round(1000 * statistics.median(times[package]), 1),
        "without channels_last": round(ratios[without_channels_last], 3), "compiled": round(ratios[compiled], 3),
    }  # fmt: skip


def main() -> None:
    args = harness.arguments(__doc__)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    plan = {"ResNet-18, width 20": (8, 4), "linear": (200, 6)}
    if not args.quick:
        plan = {"ResNet-18, width 64": (5, 3), "ResNet-18, width 20": (10, 7), "linear": (300, 15)}
    rows = []
    for network, method in track([(n, m) for n in plan for m in ("DER++", "EsaCL")], "networks"):
        pairs = list(measure(network, method, *plan[network]))
        ours, bare = (1000 * statistics.median(side) for side in zip(*pairs))
        rows.append(
            {"network": network, "method": method, "ms a step": round(ours, 3), "bare loop, ms": round(bare, 3),
             "ratio": round(statistics.median(a / b for a, b in pairs), 3)}
        )  # fmt: skip
    harness.show("One step, one CPU thread", rows, list(rows[0]))
    if not args.quick:
        choices = [defaults(network, 6, 3) for network in track([n for n in plan if n != "linear"], "choices")]
        harness.show("Time of a step against the defaults'", choices, list(choices[0]))
        harness.save("overhead", rows, rounds={n: r for n, (_, r) in plan.items()})
        harness.save("overhead_choices", choices, rounds=3)


if __name__ == "__main__":
    main()
