"""SparCL's claim on the whole of CIFAR-10: 50,000 images of 32x32 pixels in five tasks of two classes.

ResNet-18 of width 8, DER++ with 500 exemplars (each draw passes through the network separately, as in the code that
SparCL builds on), batch 32, SGD 0.03, 10 epochs per task: 15,600 steps, where the paper has 78,000 at width 64. Masks
change every 5 epochs, as in the paper, and 30 % of a task's samples leave after the first 5, all at once (the paper: in
four parts, after 5, 10, 15 and 20 of 50 epochs). Masked networks run by sparse kernels. A verdict needs five seeds;
three run first.

python benchmarks/sparcl_cifar10.py [--quick] [--root FOLDER] [--seeds N] [--finished]

FOLDER holds CIFAR-10 as torchvision downloads it, or as an image folder {train,test}/<class>/*. Finished runs are kept
in benchmarks/results/sparcl_cifar10_runs.json, and a run that is stopped goes on from its last checkpoint in
benchmarks/runs/: the same command goes on, over as many sittings as it takes.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import harness
import lightning.pytorch as pl
import torch
from esacl_cifar10 import ESACL, figures
from torch.optim import SGD

import lightning_sparse_cl as scl

WIDTH, EPOCHS, STAGE = 8, 10, 5
Q = {0.75: 0.05, 0.9: 0.02, 0.95: 0.01}
"""Gradient sparsity minus sparsity, as in the paper."""


def tdm(sparsity: float) -> scl.TaskAwareDynamicMasking:
    return scl.TaskAwareDynamicMasking(sparsity, interval=STAGE)


def ddr(by: Any = "misclassification") -> scl.DynamicDataRemoval:
    return scl.DynamicDataRemoval(0.3, cutoff=1, interval=STAGE, by=by)


def dgm(sparsity: float) -> scl.DynamicGradientMasking:
    return scl.DynamicGradientMasking(Q[sparsity])


POLICIES: dict[str, Callable[[float], list[pl.Callback]]] = {
    "DER++": lambda s: [],
    "SparCL": lambda s: [tdm(s), ddr(), dgm(s)],
    "SNIP": lambda s: [scl.SNIP(s)],
    "RigL": lambda s: [scl.RigL(s)],
    "TDM only": lambda s: [tdm(s)],
    "TDM + DDR": lambda s: [tdm(s), ddr()],
    "TDM + DGM": lambda s: [tdm(s), dgm(s)],
    "TDM + DDR by loss": lambda s: [tdm(s), ddr("loss")],
    "TDM + DDR at random": lambda s: [tdm(s), ddr("random")],
}
ROWS = [
    ("DER++", 0.0), ("SparCL", 0.9), ("SNIP", 0.9), ("RigL", 0.9), ("TDM only", 0.9), ("TDM + DDR", 0.9),
    ("TDM + DDR at random", 0.9), ("TDM + DDR by loss", 0.9), ("TDM + DGM", 0.9), ("efficient", 0.9), ("SparCL", 0.75),
    ("SparCL", 0.95), ("efficient", 0.8), ("EsaCL", 0.9), ("EsaCL", 0.8),
]  # fmt: skip
CLAIMS = {
    "SparCL beats SNIP at 90 %": (("SparCL", 0.9), ("SNIP", 0.9)),
    "SparCL beats RigL at 90 %": (("SparCL", 0.9), ("RigL", 0.9)),
    "removing the easiest beats removing at random": (("TDM + DDR", 0.9), ("TDM + DDR at random", 0.9)),
    "removing data costs nothing": (("TDM + DDR", 0.9), ("TDM only", 0.9)),
    "dynamic masks beat SNIP's": (("TDM only", 0.9), ("SNIP", 0.9)),
    "EsaCL beats SparCL at 90 %": (("EsaCL", 0.9), ("SparCL", 0.9)),
}
"""The first row is more accurate than the second."""


def module_of(row: str, sparsity: float, width: int) -> scl.ContinualModule:
    backbone, objective = scl.ResNet18(width), scl.DERpp(500, 32)
    if row in ESACL:
        module: scl.ContinualModule = scl.EsaCL(backbone, objective, sparsity, **copy.deepcopy(ESACL[row]))
    else:
        policies = POLICIES[row](sparsity)
        module = scl.ContinualModule(backbone, objective, optimizer=partial(SGD, lr=0.03), policies=policies)
    if row != "DER++":
        module.policies.append(scl.SparseAcceleration())
    return module


def run(row: str, sparsity: float, seed: int, epochs: int, per_class: int, width: int, images: str) -> dict[str, Any]:
    """One sequence; it goes on where it was stopped."""
    pl.seed_everything(seed, verbose=False)
    augment = scl.ImageTransform([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2615], crop=4, flip=True)
    data = scl.SplitTensors(*torch.load(images), num_tasks=5, batch_size=32, transform=augment)
    name = f"{row} {sparsity:g} {seed} {epochs} {per_class} {width}".replace(" ", "_")
    folder = Path(__file__).parent / "runs" / "sparcl_cifar10" / name
    metrics = harness.fit(module_of(row, sparsity, width), data, epochs, folder=folder)
    return figures(metrics) | {"seconds": metrics["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/cifar10-images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--finished", action="store_true", help="run nothing; save the rows whose runs are all kept")
    args = harness.arguments(parser)
    sizes = (STAGE + 1, 48, 4) if args.quick else (EPOCHS, 5000, WIDTH)
    seeds = [0, 1] if args.quick else list(range(args.seeds))
    rows = ROWS[:3] if args.quick else ROWS
    kept = {} if args.quick else harness.kept_runs("sparcl_cifar10")
    if args.finished:
        rows = [r for r in rows if all(json.dumps([*r, seed, *sizes]) in kept for seed in seeds)]
    jobs = [(*row, seed, *sizes) for seed in seeds for row in rows]
    run_all = harness.run_all if args.quick else partial(harness.run_kept, "sparcl_cifar10")
    with TemporaryDirectory() as folder:
        images = f"{folder}/images.pt"
        if any(json.dumps(job) not in kept for job in jobs):
            torch.save(harness.first_of_each(args.root, sizes[1], 50 if args.quick else 1000), images)
        results = dict(zip(jobs, run_all(partial(run, images=images), jobs, args.processes), strict=True))
    of = {row: [results[(*row, seed, *sizes)] for seed in seeds] for row in rows}
    table = [{"method": m, "sparsity": s} | {k: harness.spread([r[k] for r in runs]) for k in runs[0]}
             for (m, s), runs in of.items()]  # fmt: skip
    harness.beside(table, table[0])
    harness.show("The whole of CIFAR-10, in percent", table,
                 ["method", "sparsity", "Class-IL", "Task-IL", "of DER++", "of DER++ as in the tables"])  # fmt: skip
    claims = []
    for name, (first, second) in CLAIMS.items():
        if first in of and second in of:
            claim: dict[str, Any] = {"claim": name}
            for key in ("Class-IL", "Task-IL"):
                claim[key] = harness.paired(*([r[key] for r in of[row]] for row in (first, second)))
                claim[f"{key}: verdict"] = harness.verdict(claim[key], len(seeds))
            claims.append(claim)
    if claims:
        harness.show(f"Paired differences in points, {len(seeds)} seeds", claims, list(claims[0]))
    if not args.quick:
        missing = [f"{m}, {s:g}" for m, s in ROWS if (m, s) not in rows]
        harness.save("sparcl_cifar10", table, seeds=seeds, epochs_per_task=EPOCHS, width=WIDTH, missing=missing,
                     claims=claims)  # fmt: skip


if __name__ == "__main__":
    main()
