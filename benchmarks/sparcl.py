"""SparCL, its parts and its competitors on Split CIFAR-10 at a size for CPUs: accuracy, FLOPs, footprint, seconds.

Five tasks of two classes, 400 images per class, halved to 16x16 pixels, ResNet-18 of width 16, DER++ with 500
exemplars, batch 32, 10 epochs per task, SGD with learning rate 0.03: the same for all rows. Stages of TDM and DDR are
two epochs.

python benchmarks/sparcl.py [--quick] [--root FOLDER]

FOLDER holds CIFAR-10 as torchvision downloads it, or as an image folder {train,test}/<class>/*.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import harness
import lightning.pytorch as pl
import torch

import lightning_sparse_cl as scl
from lightning_sparse_cl.metrics import DenseCost, sparcl_flops, sparcl_memory
from lightning_sparse_cl.sparsity import sparse_weights

EPOCHS, EVERY, CUTOFF, BATCH, REMOVED = 10, 2, 4, 32, 0.3
Q = {0.75: 0.05, 0.9: 0.02, 0.95: 0.01}  # gradient sparsity minus sparsity, as in the paper


def tdm(s: float) -> scl.TaskAwareDynamicMasking:
    return scl.TaskAwareDynamicMasking(s, interval=EVERY)


def ddr() -> scl.DynamicDataRemoval:
    return scl.DynamicDataRemoval(REMOVED, CUTOFF, EVERY)


def dgm(s: float) -> scl.DynamicGradientMasking:
    return scl.DynamicGradientMasking(Q[s], interval=10)


POLICIES: dict[str, Callable[[float], list[pl.Callback]]] = {
    "DER++": lambda s: [],
    "SparCL-DER++": lambda s: [tdm(s), ddr(), dgm(s)],
    "TDM only": lambda s: [tdm(s)],
    "TDM + DDR": lambda s: [tdm(s), ddr()],
    "TDM + DGM": lambda s: [tdm(s), dgm(s)],
    "SNIP-DER++": lambda s: [scl.SNIP(s)],
    "RigL-DER++": lambda s: [scl.RigL(s, interval=20)],
}
ROWS = [
    ("DER++", 0.0), *(("SparCL-DER++", s) for s in Q), ("TDM only", 0.9), ("TDM + DDR", 0.9), ("TDM + DGM", 0.9),
    *((name, s) for name in ("SNIP-DER++", "RigL-DER++") for s in (0.9, 0.95)),
]  # fmt: skip


def run(row: str, sparsity: float, seed: int, images: str, epochs: int, width: int) -> dict[str, Any]:
    """One sequence, and what the closed formulas give for its plan."""
    pl.seed_everything(seed, verbose=False)
    optimizer = partial(torch.optim.SGD, lr=0.03)
    objective, policies = scl.DERpp(500, BATCH, forward="joint"), POLICIES[row](sparsity)
    module = scl.ContinualModule(scl.ResNet18(width), objective, optimizer=optimizer, policies=policies)
    data = harness.small_cifar10(*torch.load(images))
    metrics = harness.fit(module, data, epochs)
    flops, cost = metrics["flops"], DenseCost.of(module, data.input_shape)
    gradient = sparsity + (Q[sparsity] if policies and isinstance(policies[-1], scl.DynamicGradientMasking) else 0.0)
    dense_share = 1 - cost.share(sparse_weights(module))
    return {
        "Class-IL": metrics["class_il"]["acc"],
        "Task-IL": metrics["task_il"]["acc"],
        "FLOPs": flops["training"] / 1e12,
        "of plain": flops["training"] / flops["dense"],
        "to find masks": flops["scoring"] / flops["dense"],
        "FLOPs as in the tables": flops["papers"] / 1e12,
        "closed formula": planned(policies, cost.total_macs(), dense_share, sparsity, gradient, data, epochs) / 1e12,
        "footprint, MB": metrics["memory"]["formula"] / 1e6,
        "footprint by plan, MB": sparcl_memory(cost, BATCH, sparsity, gradient) / 1e6,
        "seconds": metrics["seconds"],
    }


def planned(
    policies: list[pl.Callback],
    macs: int,
    dense_share: float,
    s: float,
    g: float,
    data: scl.TaskDataModule,
    epochs: int,
) -> float:
    """The closed formula for every epoch of the plan: whole batches, data removed, masks expanded at task starts."""
    masking = next((p for p in policies if isinstance(p, scl.TaskAwareDynamicMasking)), None)
    removal = next((p for p in policies if isinstance(p, scl.DynamicDataRemoval)), scl.DynamicDataRemoval(0.0))
    total = 0.0
    for task, samples in enumerate(map(len, data.train_sets)):
        for epoch in range(epochs):
            n = removal.remaining(samples, epoch // EVERY) // BATCH * BATCH
            more = masking.p_inter if masking and task > 0 and epoch < EVERY else 0.0
            draws = 2 - (2 * BATCH / n if task == epoch == 0 else 0)  # the first batch finds the memory empty
            total += sparcl_flops(macs, n, draws, s - more, g - more, dense_share)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/cifar10-images")
    args = harness.arguments(parser)
    per_class, epochs, width, seeds = (48, 8, 16, [0]) if args.quick else (400, EPOCHS, 16, [0, 1, 2])
    with TemporaryDirectory() as folder:
        images = f"{folder}/images.pt"
        torch.save(harness.halved(args.root, per_class, 100 if args.quick else 500), images)
        jobs = [(*row, seed, images, epochs, width) for row in ROWS for seed in seeds]
        results = iter(harness.run_all(run, jobs, args.processes))
    rows = []
    for row, sparsity in ROWS:
        runs = [next(results) for _ in seeds]
        rows.append({"method": row, "sparsity": sparsity} | {k: harness.spread([r[k] for r in runs]) for k in runs[0]})
    plain = ("FLOPs", "FLOPs as in the tables", "closed formula", "footprint, MB", "footprint by plan, MB", "seconds")
    columns = [c for c in rows[0] if c not in ("closed formula", "footprint by plan, MB")]
    harness.show("Split CIFAR-10: accuracies and shares in percent, TFLOPs, MB, seconds", rows, columns, plain)
    if not args.quick:
        harness.save("sparcl", rows, seeds=seeds, epochs_per_task=epochs, images_per_class=per_class, width=width)


if __name__ == "__main__":
    main()
