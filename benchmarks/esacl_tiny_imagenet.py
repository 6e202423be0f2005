"""EsaCL on a stand-in for Split Tiny-ImageNet at a size for CPUs, beside rivals at the same sparsity.

The first 50 classes of Tiny ImageNet in five tasks of ten, 100 training and 25 test images per class, resized to 16x16;
ResNet-18 of width 16, 500 exemplars, batch 32, 10 epochs per task. Masked networks run by sparse kernels. Frank-Wolfe's
radius and step, the epoch of the pruning and the part reopened were searched on seeds 100 and 101 ("search" in the
results); the rows have seeds 0 to 4, and the names of esacl_cifar10.py.

python benchmarks/esacl_tiny_imagenet.py [--quick] [--root FOLDER] [--finished]

FOLDER holds ``tiny-imagenet-200`` (a subset of its images will do). Finished runs are kept in
benchmarks/results/esacl_tiny_imagenet_runs.json; the same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import harness
import lightning.pytorch as pl
import torch
from continual_dst import images_of
from esacl_cifar10 import ESACL, PLAIN, SPARSE, figures, module_of

import lightning_sparse_cl as scl

EPOCHS, CLASSES = 10, 50
ROWS = [
    ("DER++", 0.0), ("SparCL", 0.9), ("SNIP", 0.9), ("EsaCL", 0.9), ("efficient, large steps", 0.9), ("efficient", 0.9),
    ("efficient without SP", 0.9), ("SFW, share", 0.9),
]  # fmt: skip


def steps(lr: float, tau: float, momentum: float | None = 0.9) -> dict[str, Any]:
    """Frank-Wolfe with this step and radius, along a running mean of the gradients, or their sum."""
    return {"optimizer": partial(scl.StochasticFrankWolfe, lr=lr, tau=tau, k=None, momentum=momentum)}


SEARCH: dict[str, dict[str, Any]] = {
    "efficient, eta 0.01, tau 8, sum": PLAIN | SPARSE | steps(0.01, 8, None),
    "efficient, eta 0.001, tau 5": PLAIN | SPARSE | steps(0.001, 5),
    "efficient, eta 0.001, tau 15": PLAIN | SPARSE | steps(0.001, 15),
    "efficient, eta 0.003, tau 5": PLAIN | SPARSE | steps(0.003, 5),
    "efficient, eta 0.0003, tau 15": PLAIN | SPARSE | steps(0.0003, 15),
    "efficient, eta 0.001, tau 5, pruned after 4": PLAIN | SPARSE | steps(0.001, 5) | {"prune_epoch": 4},
    "efficient, eta 0.001, tau 5, all reopened": PLAIN | SPARSE | steps(0.001, 5) | {"reopen": scl.Reopen("zero")},
    "EsaCL, rho 0.1, tau 8": {"update": scl.SharpnessAware(0.1)} | steps(0.01, 8, None),
}
HELD_OUT = (100, 101)
ESACL.update(SEARCH)


def run(row: str, sparsity: float, seed: int, epochs: int, per_class: int, images: str) -> dict[str, Any]:
    """One sequence."""
    pl.seed_everything(seed, verbose=False)
    augment = scl.ImageTransform([0.4802, 0.4480, 0.3975], [0.2770, 0.2691, 0.2821], crop=2, flip=True)
    data = scl.SplitTensors(*torch.load(images), num_tasks=5, batch_size=32, transform=augment)
    return figures(harness.fit(module_of(row, sparsity), data, epochs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data")
    parser.add_argument("--finished", action="store_true", help="run nothing; save the rows whose runs are all kept")
    args = harness.arguments(parser)
    seeds, epochs, per_class = ([0], 3, 8) if args.quick else (list(range(5)), EPOCHS, 100)
    found = [] if args.quick else [(row, 0.9, seed) for row in SEARCH for seed in HELD_OUT]
    rows = ROWS
    if args.finished:
        done = harness.kept_runs("esacl_tiny_imagenet")
        kept = {job for job in [*found, *((*r, s) for r in rows for s in seeds)]
                if json.dumps([*job, epochs, per_class]) in done}  # fmt: skip
        rows, found = [r for r in rows if all((*r, s) in kept for s in seeds)], [job for job in found if job in kept]
    jobs = [*((*row, seed) for seed in seeds for row in rows), *found]
    run_all = harness.run_all if args.quick else partial(harness.run_kept, "esacl_tiny_imagenet")
    with TemporaryDirectory() as folder:
        images = f"{folder}/images.pt"
        torch.save([(x[y < CLASSES], y[y < CLASSES]) for x, y in images_of(args.root, per_class, 16)], images)
        every = run_all(partial(run, images=images), [(*job, epochs, per_class) for job in jobs], args.processes)
    results, table = dict(zip(jobs, every, strict=True)), []
    for row in rows:
        runs = [results[(*row, seed)] for seed in seeds]
        spreads = {k: harness.spread([r[k] for r in runs]) for k in runs[0]}
        by_seed = {k: [round(r[k], 5) for r in runs] for k in ("Class-IL", "Task-IL")}  # for paired differences
        table.append({"method": row[0], "sparsity": row[1]} | spreads | {"by seed": by_seed})
    harness.beside(table, table[0])
    for row in table:
        for name in ("DER++", "SparCL"):
            harness.differ(row, next(r for r in table if r["method"] == name), name)
    harness.show("Split Tiny-ImageNet, 50 classes, in percent", table,
                 ["method", "sparsity", "Class-IL", "Class-IL to DER++", "Task-IL", "of DER++", "used"])  # fmt: skip
    if not args.quick:
        search = {f"{row}, seed {seed}": round(results[(row, s, seed)]["Class-IL"], 4) for row, s, seed in found}
        harness.save("esacl_tiny_imagenet", table, seeds=seeds, epochs_per_task=epochs, images_per_class=per_class,
                     missing=[f"{row}, {s:g}" for row, s in ROWS if (row, s) not in rows], search=search)  # fmt: skip


if __name__ == "__main__":
    main()
