"""Replay through batch-norm: the current batch and each draw separately, as published, or all together.

Five tasks of two classes of CIFAR-10, 192 images per class, halved to 16x16 pixels; SmallCNN(8), 500 exemplars, batches
of 32, 10 epochs per task. ER, DER, DER++ and FDR with the coefficients of their configurations and SGD 0.03; five
seeds, and the paired difference with its 95 % interval.

python benchmarks/replay_forward.py [--quick] [--root FOLDER]

FOLDER holds CIFAR-10 as torchvision downloads it, or as an image folder {train,test}/<class>/*. Finished runs are kept
in benchmarks/results/replay_forward_runs.json; the same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import harness
import lightning.pytorch as pl
import torch
from torch.optim import SGD

import lightning_sparse_cl as scl

OBJECTIVES: dict[str, partial] = {
    "ER": partial(scl.ER, 500, 32),
    "DER": partial(scl.DER, 500, 32, alpha=0.3),
    "DER++": partial(scl.DERpp, 500, 32, alpha=0.2, beta=0.5),
    "FDR": partial(scl.FDR, 500, 32, alpha=1.0),
}
FIGURES = ("Class-IL", "Task-IL", "seconds")


def run(name: str, forward: str, seed: int, epochs: int, per_class: int, images: str) -> dict[str, Any]:
    """One sequence."""
    pl.seed_everything(seed, verbose=False)
    objective = OBJECTIVES[name](forward=forward)
    module = scl.ContinualModule(scl.SmallCNN(8), objective, optimizer=partial(SGD, lr=0.03))
    metrics = harness.fit(module, harness.small_cifar10(*torch.load(images)), epochs)
    return dict(zip(FIGURES, (metrics["class_il"]["acc"], metrics["task_il"]["acc"], metrics["seconds"]), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/cifar10-images")
    args = harness.arguments(parser)
    seeds, epochs, per_class = ([0, 1], 2, 48) if args.quick else (list(range(5)), 10, 192)
    jobs = [(n, f, seed, epochs, per_class) for n in OBJECTIVES for f in ("separate", "joint") for seed in seeds]
    run_all = harness.run_all if args.quick else partial(harness.run_kept, "replay_forward")
    with TemporaryDirectory() as folder:
        images = f"{folder}/images.pt"
        torch.save(harness.halved(args.root, per_class, 100 if args.quick else 500), images)
        results = iter(run_all(partial(run, images=images), jobs, args.processes))
    table = []
    for name in OBJECTIVES:
        separate, joint = ([next(results) for _ in seeds] for _ in range(2))
        for forward, runs in (("separate", separate), ("joint", joint)):
            row = {"objective": name, "forward": forward} | {k: harness.spread([r[k] for r in runs]) for k in FIGURES}
            for k in FIGURES[:2]:
                beside = harness.paired([r[k] for r in joint], [r[k] for r in separate]) if runs is joint else "-"
                row[f"{k}, joint - separate"] = beside
            table.append(row)
    harness.show("CIFAR-10 at 16x16, in percent", table, [k for k in table[0] if k != "seconds"])
    if not args.quick:
        harness.save("replay_forward", table, seeds=seeds, epochs_per_task=epochs, images_per_class=per_class)


if __name__ == "__main__":
    main()
