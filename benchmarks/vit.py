"""ViT-tiny of timm, with random weights, beside a small CNN: DER++ and SparCL at 90 %, with and without kernels.

CIFAR-10 in five tasks of two classes, 32 images per class, one epoch: what is pruned, what it costs and how long a step
takes; there are too few images to learn from. Steps are timed one by one on one thread, in one run after the other.

python benchmarks/vit.py [--quick] [--root FOLDER]

FOLDER holds CIFAR-10 as torchvision downloads it, or as an image folder {train,test}/<class>/*. Needs timm.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import harness
import lightning.pytorch as pl
import torch
from rich.progress import track
from torch import nn
from torch.optim import SGD

import lightning_sparse_cl as scl

FIGURES = ("ms a step", "TFLOPs", "weights", "alive", "dense weights")


class StepTimes(pl.Callback):
    """Milliseconds of each training step."""

    def __init__(self) -> None:
        self.taken: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.taken.append(1000 * (time.perf_counter() - self._start))


def backbones(quick: bool) -> dict[str, Callable[[], nn.Module]]:
    depth = 2 if quick else 12
    options = {"patch_size": 4, "depth": depth}
    return {
        "ViT-tiny": lambda: scl.Timm("vit_tiny_patch16_224", options=options),
        "SmallCNN": lambda: scl.SmallCNN(32),
    }


def run(backbone: nn.Module, method: str, seed: int, parts: list[Any]) -> dict[str, Any]:
    pl.seed_everything(seed, verbose=False)
    data, times, flops = scl.SplitTensors(*parts, num_tasks=5, batch_size=32), StepTimes(), scl.FlopsCounter()
    objective, optimizer = scl.DERpp(100, 32, forward="joint"), partial(SGD, lr=0.03)
    if method == "DER++":
        module = scl.ContinualModule(backbone, objective, optimizer=optimizer)
    else:
        gradients = scl.DynamicGradientMasking(0.05, interval=10)
        masking, removal = scl.TaskAwareDynamicMasking(0.9, 1), scl.DynamicDataRemoval(0.0)
        module = scl.SparCL(backbone, objective, masking, removal, gradients, optimizer=optimizer)
    if method.endswith("kernels"):
        module.policies.append(scl.SparseAcceleration())
    callbacks = [scl.TaskSchedule(1), scl.RandomState(), flops, times]
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(module, data)
    pruned = [module.get_parameter(name) for name in scl.Masks.of(module)]
    every = sum(p.numel() for p in module.parameters())
    return {
        "ms a step": statistics.median(times.taken[4:]),  # the memory is filled, and kernels have been chosen
        "TFLOPs": flops.summary()["training"] / 1e12,
        "weights": sum(p.numel() for p in pruned),
        "alive": sum(int(p.count_nonzero()) for p in pruned),
        "dense weights": every - sum(p.numel() for p in pruned),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/cifar10-images")
    args = harness.arguments(parser)
    harness.quiet()
    torch.set_num_threads(1)
    parts, seeds = harness.first_of_each(args.root, 32, 16), [0] if args.quick else [0, 1, 2]
    methods = ("DER++", "SparCL", "SparCL with kernels")
    jobs = [(name, method, seed) for name in backbones(args.quick) for seed in seeds for method in methods]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name, method, seed in track(jobs, "runs"):
        result = run(backbones(args.quick)[name](), method, seed, parts)
        found.setdefault((name, method), []).append(result)
    rows = [
        {"backbone": name, "method": method} | {f: harness.spread([r[f] for r in runs]) for f in FIGURES}
        for (name, method), runs in found.items()
    ]
    harness.show("ViT-tiny and a small CNN", rows, ["backbone", "method", *FIGURES], FIGURES)
    if not args.quick:
        harness.save("vit", rows, seeds=seeds)


if __name__ == "__main__":
    main()
