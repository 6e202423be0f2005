"""Blocks of weights that live and die together: what they cost in accuracy, on Split Digits and on CIFAR-10.

DER++ under SparCL, with RigL's masks, and under EsaCL with vertices of the same blocks, at 80, 90 and 95 % sparsity.
Digits: SmallCNN(32), 200 exemplars, batches of 16. CIFAR-10: five tasks of two classes, 192 images per class, halved to
16x16 pixels, SmallCNN(16), 500 exemplars, batches of 32. 10 epochs per task, five seeds; differences to single weights
are paired, with their 95 % interval.

python benchmarks/block_masks.py [--quick] [--root FOLDER] [--finished]

FOLDER holds CIFAR-10 as torchvision downloads it, or as an image folder {train,test}/<class>/*. Finished runs are kept
in benchmarks/results/block_masks_runs.json; the same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import harness
import lightning.pytorch as pl
import torch
from torch.optim import SGD

import lightning_sparse_cl as scl

BLOCKS = {"1x1": (1, 1), "2x2": (2, 2), "4x1": (4, 1)}
SPARSITIES = (0.8, 0.9, 0.95)
EVERY, CUTOFF = 2, 4
"""Epochs of a stage of SparCL, and stages after which no more data are removed."""
Q = {0.8: 0.05, 0.9: 0.02, 0.95: 0.01}
"""Gradient sparsity minus sparsity."""
POLICIES: dict[str, Callable[[float, Sequence[int]], list[pl.Callback]]] = {
    "SparCL": lambda s, block: [
        scl.TaskAwareDynamicMasking(s, EVERY, block=block), scl.DynamicDataRemoval(0.3, CUTOFF, EVERY),
        scl.DynamicGradientMasking(Q[s], interval=10),
    ],
    "RigL": lambda s, block: [scl.RigL(s, interval=20, block=block)],
}  # fmt: skip
METHODS = (*POLICIES, "EsaCL")
ROWS = [(data, m, s, b) for data in ("digits", "CIFAR-10") for m in METHODS for s in SPARSITIES for b in BLOCKS]
FIGURES = ("Class-IL", "Task-IL")


def run(data: str, method: str, sparsity: float, block: str, seed: int, epochs: int, images: str) -> dict[str, float]:
    """One sequence."""
    pl.seed_everything(seed, verbose=False)
    digits = data == "digits"
    backbone, objective = scl.SmallCNN(32 if digits else 16), scl.DERpp(*((200, 16) if digits else (500, 32)))
    if method == "EsaCL":
        module: scl.ContinualModule = scl.EsaCL(backbone, objective, sparsity, block=BLOCKS[block])
    else:
        policies = POLICIES[method](sparsity, BLOCKS[block])
        module = scl.ContinualModule(backbone, objective, optimizer=partial(SGD, lr=0.03), policies=policies)
    tasks = scl.SplitDigits(batch_size=16) if digits else harness.small_cifar10(*torch.load(images))
    metrics = harness.fit(module, tasks, epochs)
    return dict(zip(FIGURES, (metrics["class_il"]["acc"], metrics["task_il"]["acc"]), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/cifar10-images")
    parser.add_argument("--finished", action="store_true", help="run nothing; save the rows whose runs are all kept")
    args = harness.arguments(parser)
    seeds, epochs, per_class = ([0, 1], 8, 32) if args.quick else (list(range(5)), 10, 192)
    rows = [row for row in ROWS if row[2] == 0.9] if args.quick else ROWS
    kept = {} if args.quick else harness.kept_runs("block_masks")
    if args.finished:
        rows = [row for row in rows if all(json.dumps([*row, seed, epochs]) in kept for seed in seeds)]
    jobs = [(*row, seed, epochs) for seed in seeds for row in rows]
    run_all = harness.run_all if args.quick else partial(harness.run_kept, "block_masks")
    with TemporaryDirectory() as folder:
        images = f"{folder}/images.pt"
        if any(job[0] != "digits" for job in jobs):
            torch.save(harness.halved(args.root, per_class, 100 if args.quick else 500), images)
        results = dict(zip(jobs, run_all(partial(run, images=images), jobs, args.processes), strict=True))
    table = []
    for data, method, sparsity, block in rows:
        by_seed = {k: [results[(data, method, sparsity, block, s, epochs)][k] for s in seeds] for k in FIGURES}
        row: dict[str, Any] = {"data": data, "method": method, "sparsity": sparsity, "block": block}
        row |= {k: harness.spread(values) for k, values in by_seed.items()} | {"by seed": by_seed}
        single = (data, method, sparsity, "1x1")
        if block == "1x1":
            row |= {f"{k} to 1x1": "-" for k in FIGURES}
        elif single in rows:
            for k, values in by_seed.items():
                row[f"{k} to 1x1"] = harness.paired(values, [results[(*single, s, epochs)][k] for s in seeds])
        table.append(row)
    columns = [c for c in table[0] if c != "by seed"]
    harness.show("Blocks of weights, in percent", table, columns)
    if not args.quick:
        missing = [" ".join(map(str, row)) for row in ROWS if row not in rows]
        harness.save(
            "block_masks", table, seeds=seeds, epochs_per_task=epochs, images_per_class=per_class, missing=missing
        )


if __name__ == "__main__":
    main()
