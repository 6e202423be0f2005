"""Continual DST on a stand-in for Split CIFAR-100: initialisation, growth and sparsity; the paper's findings I to IV.

The first 100 classes of Tiny ImageNet in 10 tasks of 10, 100 training and 25 test images a class, resized to 32x32.
ResNet-18 of width 16 with the paper's 7x7 stem, Adam 0.001 divided by ten at half and three quarters of a task, batch
32, 6 epochs a task, exchanges every 25 steps, the fraction from 0.5 to 0.005: the same for all rows.

python benchmarks/continual_dst.py [--quick] [--root FOLDER]  (50 runs of about two minutes)

FOLDER holds ``tiny-imagenet-200`` (a subset of its images will do).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import harness
import lightning.pytorch as pl
import torch
from torch.nn import functional as F
from torch.optim.lr_scheduler import MultiStepLR

import lightning_sparse_cl as scl

BATCH, TASKS, CLASSES = 32, 10, 100
SPARSITIES = (0.8, 0.9, 0.95)
GROWTH: dict[str, Callable[..., scl.DropAndGrow]] = {
    "random": scl.SET, "unfired": scl.UnfiredGrowth, "gradient": scl.RigL, "momentum": scl.MomentumGrowth,
    "adaptive": scl.AdaptiveGrowth,
}  # fmt: skip
FIXED = ("random", "unfired", "gradient", "momentum")
SATURATED = 0.25
"""A task is saturated if fewer of its mask's weights than this fraction were free for it to train."""
ROWS = [
    *((init, growth, s) for s in SPARSITIES for init in ("uniform", "erk") for growth in FIXED),
    *(("erk", growth, 0.9) for growth in GROWTH if growth not in FIXED),
]  # fmt: skip


def images_of(root: str, train: int, size: int = 32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The first 100 classes, to train and to test on, resized with antialiasing; and their labels."""
    source, parts = scl.TinyImageNetSource(root), []
    for part in (True, False):
        images, labels = source.read(part)
        at = torch.cat([(labels == c).nonzero().squeeze(1)[: train if part else 25] for c in range(CLASSES)])
        small = F.interpolate(images[at].float(), (size, size), mode="bilinear", antialias=True)
        parts.append((small.round().byte(), labels[at]))
    return parts


def data_of(images: str, **kwargs: Any) -> scl.SplitTensors:
    """The ten tasks, augmented by crop and flip."""
    augment = scl.ImageTransform([0.4802, 0.4480, 0.3975], [0.2770, 0.2691, 0.2821], crop=4, flip=True)
    return scl.SplitTensors(*torch.load(images), num_tasks=TASKS, batch_size=BATCH, transform=augment, **kwargs)


def run(init: str, growth: str, sparsity: float, seed: int, images: str, epochs: int, width: int) -> dict[str, Any]:
    """One sequence."""
    pl.seed_everything(seed, verbose=False)
    about = dict(interval=25, fraction=0.5, until=1.0, final=0.005, distribution=init, dense=["head.weight"])
    rule = GROWTH[growth](sparsity, **about)
    drops = scl.TaskLRSchedule(partial(MultiStepLR, milestones=[epochs // 2, 3 * epochs // 4], gamma=0.1))
    module = scl.ContinualDST(scl.ResNet18(width, "7x7"), growth=rule, policies=[drops])
    metrics = harness.fit(module, data_of(images), epochs, task_il_only=True)
    shared = metrics["subnetworks"]
    learnt = [row[i] for i, row in enumerate(metrics["task_il"]["matrix"])]
    saturated = next((i + 1 for i, free in enumerate(shared["free_in_mask"]) if free < SATURATED), TASKS + 1)
    return {
        "ACC": metrics["task_il"]["acc"],
        "BWT": metrics["task_il"]["bwt"],
        "first half": statistics.mean(learnt[: TASKS // 2]),
        "second half": statistics.mean(learnt[TASKS // 2 :]),
        "used": shared["used"][-1],
        "free in the last mask": shared["free_in_mask"][-1],
        "saturated at task": saturated,
        "of plain": metrics["flops"]["training"] / metrics["flops"]["dense"],
    }


def findings(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each finding: the differences of paired runs (same seed) that bear on it, and whether their signs agree.

    Confirmed or not confirmed: all paired differences of mean ACC have one sign; else not decidable at this size.
    """

    def acc(init: str, growth: str, s: float) -> list[float]:
        row = next(r for r in rows if (r["init"], r["growth"], r["sparsity"]) == (init, growth, s))
        return row["ACC of each seed"]

    def over(inits: Sequence[str], growths: Sequence[str], s: float) -> list[float]:
        return [statistics.mean(v) for v in zip(*(acc(i, g, s) for i in inits for g in growths))]

    def less(a: Sequence[float], b: Sequence[float]) -> list[float]:
        return [x - y for x, y in zip(a, b)]

    def verdict(*differences: Sequence[float]) -> dict[str, Any]:
        every = [d for part in differences for d in part]
        word = "confirmed" if min(every) > 0 else "not confirmed" if max(every) < 0 else "not decidable at this size"
        return {"verdict": word, "differences": every}

    both, blind, led = ("uniform", "erk"), ("random", "unfired"), ("gradient", "momentum")
    adaptive = acc("erk", "adaptive", 0.9)
    gain = {s: less(over(["erk"], led, s), over(["erk"], blind, s)) for s in SPARSITIES}
    return {
        "I, at sparsity 0.80: ERK beats uniform": verdict(
            less(over(["erk"], FIXED, 0.8), over(["uniform"], FIXED, 0.8))
        ),
        "I, at 0.90": verdict(less(over(["erk"], FIXED, 0.9), over(["uniform"], FIXED, 0.9))),
        "II, at 0.95: uniform beats ERK": verdict(less(over(["uniform"], FIXED, 0.95), over(["erk"], FIXED, 0.95))),
        "II, at 0.95: ACC ranges less over the growth rules with uniform than with ERK": verdict(
            less(spread_over_growth(acc, "erk"), spread_over_growth(acc, "uniform"))
        ),
        "III, at 0.95: gradient and momentum beat random and unfired": verdict(
            less(over(both, led, 0.95), over(both, blind, 0.95))
        ),
        "III, at 0.80 with ERK: random and unfired beat gradient and momentum": verdict([-d for d in gain[0.8]]),
        "III, with ERK: gradient and momentum gain more at 0.95 than at 0.80": verdict(less(gain[0.95], gain[0.8])),
        "IV, at 0.90 with ERK: adaptive beats random": verdict(less(adaptive, acc("erk", "random", 0.9))),
        "IV, at 0.90 with ERK: adaptive beats gradient": verdict(less(adaptive, acc("erk", "gradient", 0.9))),
    }


def spread_over_growth(acc: Callable[[str, str, float], list[float]], init: str) -> list[float]:
    """Range of ACC over the growth rules at 0.95, by seed."""
    return [max(v) - min(v) for v in zip(*(acc(init, growth, 0.95) for growth in FIXED))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data")
    parser.add_argument("--seeds", type=int, default=2)
    args = harness.arguments(parser)
    per_class, epochs, width, seeds = (32, 2, 4, [0]) if args.quick else (100, 6, 16, list(range(args.seeds)))
    with TemporaryDirectory() as folder:
        images = f"{folder}/images.pt"
        torch.save(images_of(args.root, per_class), images)
        jobs = [(*row, seed, images, epochs, width) for row in ROWS for seed in seeds]
        results = iter(harness.run_all(run, jobs, args.processes))
    rows = []
    for init, growth, sparsity in ROWS:
        runs = [next(results) for _ in seeds]
        figures = {k: harness.spread([r[k] for r in runs]) for k in runs[0]}
        each = {"ACC of each seed": [r["ACC"] for r in runs]}
        rows.append({"init": init, "growth": growth, "sparsity": sparsity} | figures | each)
    columns = [c for c in rows[0] if c != "ACC of each seed"]
    harness.show("Continual DST: accuracies and shares in percent", rows, columns, ("saturated at task",))
    found = findings(rows)
    for name, finding in found.items():
        points = ", ".join(f"{100 * d:+.1f}" for d in finding["differences"])
        print(f"{name}: {finding['verdict']} ({points} points)")
    if not args.quick:
        sizes = {"epochs_per_task": epochs, "images_per_class": per_class, "width": width}
        harness.save("continual_dst", rows, seeds=seeds, **sizes, findings=found)


if __name__ == "__main__":
    main()
