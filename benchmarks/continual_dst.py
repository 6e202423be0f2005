"""Continual DST on a stand-in for Split CIFAR-100: initialisation, growth and sparsity; the paper's findings I to IV.

The first 100 classes of Tiny ImageNet in 10 tasks of 10, 100 training and 25 test images per class, resized to 32x32.
ResNet-18 of width 8 with the paper's 7x7 stem, Adam 0.001 divided by ten at half and three quarters of a task, batch
32, 12 epochs per task (375 steps), exchanges every 25 steps, the fraction from 0.5 to 0.005: the same for all rows. A
verdict needs five seeds and a 95 % interval of paired differences on one side of zero.

python benchmarks/continual_dst.py [--quick] [--root FOLDER] [--finished]

FOLDER holds ``tiny-imagenet-200`` (a subset of its images will do). Finished runs are kept in
benchmarks/results/continual_dst_runs.json; the same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
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
    """Training and test images of the first 100 classes, resized with antialiasing, and their labels."""
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


def run(
    init: str, growth: str, sparsity: float, seed: int, per_class: int, epochs: int, width: int, images: str
) -> dict[str, Any]:
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
        "spread over tasks": statistics.pstdev(learnt),
        "BWT": metrics["task_il"]["bwt"],
        "first half": statistics.mean(learnt[: TASKS // 2]),
        "second half": statistics.mean(learnt[TASKS // 2 :]),
        "used": shared["used"][-1],
        "free in the last mask": shared["free_in_mask"][-1],
        "saturated at task": saturated,
        "of plain": metrics["flops"]["training"] / metrics["flops"]["dense"],
    }


def findings(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each finding, the paired differences (runs of the same seed) that bear on it, and the verdict."""

    def of(key: str, init: str, growth: str, s: float) -> list[float]:
        row = next(r for r in rows if (r["init"], r["growth"], r["sparsity"]) == (init, growth, s))
        return row["by seed"][key]

    def over(inits: Sequence[str], growths: Sequence[str], s: float, key: str = "ACC") -> list[float]:
        return [statistics.mean(v) for v in zip(*(of(key, i, g, s) for i in inits for g in growths))]

    def less(a: Sequence[float], b: Sequence[float]) -> list[float]:
        return [x - y for x, y in zip(a, b, strict=True)]

    def verdict(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
        difference = harness.paired(a, b)
        return {"difference": difference, "verdict": harness.verdict(difference, len(a))}

    both, blind, led = ("uniform", "erk"), ("random", "unfired"), ("gradient", "momentum")
    adaptive, erk, uniform = of("ACC", "erk", "adaptive", 0.9), ["erk"], ["uniform"]
    gain = {s: less(over(erk, led, s), over(erk, blind, s)) for s in (0.8, 0.95)}
    return {
        "I, at sparsity 0.80: ERK beats uniform": verdict(over(erk, FIXED, 0.8), over(uniform, FIXED, 0.8)),
        "I, at 0.90": verdict(over(erk, FIXED, 0.9), over(uniform, FIXED, 0.9)),
        "II, at 0.95: uniform is more stable, its accuracies spread less over tasks": verdict(
            over(erk, FIXED, 0.95, "spread over tasks"), over(uniform, FIXED, 0.95, "spread over tasks")
        ),
        "II, at 0.95: uniform loses less from tasks 1 to 5 to tasks 6 to 10": verdict(
            less(over(uniform, FIXED, 0.95, "second half"), over(uniform, FIXED, 0.95, "first half")),
            less(over(erk, FIXED, 0.95, "second half"), over(erk, FIXED, 0.95, "first half")),
        ),
        "III, at 0.95: gradient and momentum beat random and unfired": verdict(
            over(both, led, 0.95), over(both, blind, 0.95)
        ),
        "III, at 0.80 with ERK: random and unfired beat gradient and momentum": verdict(
            over(erk, blind, 0.8), over(erk, led, 0.8)
        ),
        "III, with ERK: gradient and momentum gain more at 0.95 than at 0.80": verdict(gain[0.95], gain[0.8]),
        "IV, at 0.90 with ERK: adaptive beats random": verdict(adaptive, of("ACC", "erk", "random", 0.9)),
        "IV, at 0.90 with ERK: adaptive beats gradient": verdict(adaptive, of("ACC", "erk", "gradient", 0.9)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data")
    parser.add_argument("--finished", action="store_true", help="run nothing; save the rows whose runs are all kept")
    args = harness.arguments(parser)
    per_class, epochs, width = sizes = (32, 4, 4) if args.quick else (100, 12, 8)
    seeds, rows = ([0], [row for row in ROWS if row[2] == 0.95]) if args.quick else (list(range(5)), ROWS)
    kept = {} if args.quick else harness.kept_runs("continual_dst")
    if args.finished:
        rows = [row for row in ROWS if all(json.dumps([*row, seed, *sizes]) in kept for seed in seeds)]
    jobs = [(*row, seed, *sizes) for seed in seeds for row in rows]
    run_all = harness.run_all if args.quick else partial(harness.run_kept, "continual_dst")
    with TemporaryDirectory() as folder:
        images = f"{folder}/images.pt"
        torch.save(images_of(args.root, per_class), images)
        results = dict(zip(jobs, run_all(partial(run, images=images), jobs, args.processes), strict=True))
    table = []
    for row in rows:
        runs = [results[(*row, seed, *sizes)] for seed in seeds]
        by_seed = {k: [r[k] for r in runs] for k in ("ACC", "spread over tasks", "first half", "second half")}
        about = dict(zip(("init", "growth", "sparsity"), row, strict=True))
        table.append(about | {k: harness.spread([r[k] for r in runs]) for k in runs[0]} | {"by seed": by_seed})
    columns = [c for c in table[0] if c != "by seed"]
    harness.show("Continual DST: accuracies and shares in percent", table, columns, ("saturated at task",))
    missing = [row for row in ROWS if row not in rows]
    found = {} if missing else findings(table)
    claims = [{"finding": name} | each for name, each in found.items()]
    if claims:
        harness.show("Paired differences in points", claims, list(claims[0]))
    if not args.quick:
        about = {"epochs_per_task": epochs, "images_per_class": per_class, "width": width}
        harness.save("continual_dst", table, seeds=seeds, **about, findings=found, missing=missing)


if __name__ == "__main__":
    main()
