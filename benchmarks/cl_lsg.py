"""CL-LSG, its ablation and the baselines of its tables on a stand-in for Split CIFAR-100: accuracy and size per task.

The tasks of benchmarks/continual_dst.py (Tiny ImageNet, 10 tasks of 10 classes, 32x32), a fifth of the training images
held out. ResNet-18 of width 16 with a 7x7 stem, SGD 0.02 with momentum 0.9, batch 32, at most 12 epochs per task, 4 of
them before growth. Masks are thresholded without noise, by Adam 0.02, lambda 0.001, m^g from 0.5; the last row draws
them, as the paper does in runs ten times as long. The target of the rows that grow is the better of Scratch and
Fine-tune on held-out images, task by task, of the same seed. Sizes are in whole networks.

python benchmarks/cl_lsg.py [--quick] [--root FOLDER]

FOLDER holds ``tiny-imagenet-200`` (a subset of its images will do). Finished runs are kept in
benchmarks/results/cl_lsg_runs.json; the same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import harness
import lightning.pytorch as pl
import torch
from continual_dst import data_of, images_of

import lightning_sparse_cl as scl

COPIES = {"Scratch": [scl.FromScratch], "Fine-tune": []}
GROWN = {
    "Grow": {"selective": False, "attentive": False, "retrain": False},
    "+ Sel-mask": {"attentive": False, "retrain": False},
    "+ LSG": {"retrain": False},
    "+ Re-train = CL-LSG": {},
    "CL-LSG, masks drawn": {"noise": True},
}
PRESET = {"penalty": 1e-3, "channel_init": 0.5, "noise": False}
REUSE = 4


def run(
    row: str, seed: int, per_class: int, epochs: int, width: int, target: list[float] | None = None, images: str = ""
) -> dict[str, Any]:
    """One sequence."""
    pl.seed_everything(seed, verbose=False)
    backbone, sgd = scl.ResNet18(width, "7x7"), partial(torch.optim.SGD, lr=0.02, momentum=0.9)
    if row in COPIES:
        policies = [scl.TaskSubnetworks(share=False), *(make() for make in COPIES[row])]
        module = scl.IsolatingModule(backbone, scl.CrossEntropy(single_head=True), optimizer=sgd, policies=policies)
    else:
        growth, gates = scl.SparseGrowth(target, min(REUSE, epochs - 1)), scl.GrowthGates(**PRESET | GROWN[row])
        adam = partial(torch.optim.Adam, lr=0.02)
        module = scl.CLLSG(backbone, growth, gates, optimizer=sgd, mask_optimizer=adam)
    metrics = harness.fit(module, data_of(images, val_fraction=0.2), epochs, task_il_only=True)
    used = metrics["subnetworks"]["used"]
    grown = metrics.get("growth", {"grew": [], "allocated": used})
    return {
        "ACC": metrics["task_il"]["acc"],
        "BWT": metrics["task_il"]["bwt"],
        "held out": statistics.mean(metrics["held_out"]),
        "allocated": grown["allocated"][-1],
        "used in networks": used[-1],
        "tasks that grew": sum(grown["grew"]),
        "seconds": metrics["seconds"],
        "accuracy of each task": metrics["task_il"]["matrix"][-1],
        "size after each task": grown["allocated"],
        "target": metrics["held_out"],
    }


def against_grow(row: str, found: dict[tuple, dict[str, Any]], seeds: list[int]) -> dict[str, Any]:
    """Differences from Grow in accuracy and size, and whether the row is more accurate at equal size.

    Sizes count as equal where their interval holds zero; a row that is also smaller is better still.
    """
    accuracy, size = (
        harness.paired(*([found[name, seed][key] for seed in seeds] for name in (row, "Grow")))
        for key in ("ACC", "allocated")
    )
    better = harness.verdict(accuracy, len(seeds))
    return {"accuracy": accuracy, "size": size, "verdict": better if size["low"] <= 0 else "larger than Grow"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data")
    args = harness.arguments(parser)
    per_class, epochs, width = sizes = (40, 3, 4) if args.quick else (100, 12, 16)
    seeds = [0] if args.quick else list(range(5))
    run_all = harness.run_all if args.quick else partial(harness.run_kept, "cl_lsg")
    with TemporaryDirectory() as folder:
        images = f"{folder}/images.pt"
        torch.save(images_of(args.root, per_class), images)
        one = partial(run, images=images)
        jobs: list[tuple] = [(row, seed, *sizes) for seed in seeds for row in COPIES]
        found = dict(zip([job[:2] for job in jobs], run_all(one, jobs, args.processes)))
        targets = {s: [max(v) for v in zip(*(found[row, s]["target"] for row in COPIES))] for s in seeds}
        jobs = [(row, seed, *sizes, targets[seed]) for seed in seeds for row in GROWN]
        found |= dict(zip([job[:2] for job in jobs], run_all(one, jobs, args.processes)))
    rows = []
    for row in (*COPIES, *GROWN):
        runs = [found[row, seed] for seed in seeds]
        spread = {k: harness.spread([r[k] for r in runs]) for k in runs[0] if not isinstance(runs[0][k], list)}
        lists = ("accuracy of each task", "size after each task")
        each = {k: [statistics.median(v) for v in zip(*(r[k] for r in runs))] for k in lists}
        rows.append({"method": row} | spread | each)
    columns = ["method", "ACC", "BWT", "held out", "allocated", "used in networks", "tasks that grew", "seconds"]
    harness.show("CL-LSG: accuracies in percent, sizes in whole networks", rows, columns,
                 ("allocated", "used in networks", "tasks that grew", "seconds"))  # fmt: skip
    for key in ("accuracy of each task", "size after each task"):
        tasks = [{"method": r["method"], **{str(t + 1): round(v, 3) for t, v in enumerate(r[key])}} for r in rows]
        harness.show(key, tasks, list(tasks[0]))
    if not args.quick:
        against = [{"claim": name} | against_grow(name, found, seeds) for name in GROWN if name != "Grow"]
        harness.show("Against Grow, paired", against, list(against[0]), ("size",))
        about = {"epochs_per_task": epochs, "images_per_class": per_class, "width": width}
        harness.save("cl_lsg", rows, seeds=seeds, **about, against_grow=against)


if __name__ == "__main__":
    main()
