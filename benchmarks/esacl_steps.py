"""When SAM and the selection of the largest losses pay: more steps per task, other radii, a longer warm-up.

Five tasks of two classes of CIFAR-10, 400 images per class, halved to 16x16 pixels; SmallCNN(16) with DER++ and 500
exemplars, batch 32, SGD 0.03, nothing pruned, 10 or 40 epochs per task (250 or 1,000 steps). A warm-up trains on all
samples; it lasts two epochs of each task, or half of its epochs.

python benchmarks/esacl_steps.py [--quick] [--root FOLDER] [--finished]

FOLDER holds CIFAR-10 as torchvision downloads it, or as an image folder {train,test}/<class>/*. Finished runs are kept
in benchmarks/results/esacl_steps_runs.json; the same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import harness
import lightning.pytorch as pl
import torch
from torch.optim import SGD

import lightning_sparse_cl as scl

PER_CLASS = 400
METHODS: dict[str, Callable[[int], dict[str, Any]]] = {
    "DER++": lambda epochs: {},
    "SAM, rho 0.01": lambda epochs: {"update": scl.SharpnessAware(0.01)},
    "SAM, rho 0.05": lambda epochs: {"update": scl.SharpnessAware(0.05)},
    "largest 40 %, warm-up of 2": lambda epochs: {"selection": scl.LossSelection(1, 0.4, warmup=2)},
    "largest 40 %, warm-up of half": lambda epochs: {"selection": scl.LossSelection(1, 0.4, warmup=epochs // 2)},
    "largest 70 %, warm-up of 2": lambda epochs: {"selection": scl.LossSelection(1, 0.7, warmup=2)},
}
EPOCHS = (10, 40)


def run(method: str, epochs: int, seed: int, per_class: int, images: str) -> dict[str, Any]:
    """One sequence."""
    pl.seed_everything(seed, verbose=False)
    module = scl.ContinualModule(
        scl.SmallCNN(16),
        scl.DERpp(500, 32, forward="joint"),
        optimizer=partial(SGD, lr=0.03),
        **METHODS[method](epochs),
    )
    metrics = harness.fit(module, harness.small_cifar10(*torch.load(images)), epochs)
    flops = metrics["flops"]
    return {
        "Class-IL": metrics["class_il"]["acc"],
        "Task-IL": metrics["task_il"]["acc"],
        "of plain": flops["training"] / flops["dense"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/cifar10-images")
    parser.add_argument("--finished", action="store_true", help="run nothing; save the rows whose runs are all kept")
    args = harness.arguments(parser)
    seeds, per_class = ([0], 48) if args.quick else (list(range(5)), PER_CLASS)
    rows = [(method, epochs) for epochs in ((10,) if args.quick else EPOCHS) for method in METHODS]
    if args.finished:
        done = harness.kept_runs("esacl_steps")
        rows = [r for r in rows if all(json.dumps([*r, seed, per_class]) in done for seed in seeds)]
    jobs = [(*row, seed, per_class) for seed in seeds for row in rows]
    run_all = harness.run_all if args.quick else partial(harness.run_kept, "esacl_steps")
    with TemporaryDirectory() as folder:
        images = f"{folder}/images.pt"
        torch.save(harness.halved(args.root, per_class, 100 if args.quick else 500), images)
        every = run_all(partial(run, images=images), jobs, args.processes)
    results, table = dict(zip(jobs, every, strict=True)), []
    for method, epochs in rows:
        runs = [results[method, epochs, seed, per_class] for seed in seeds]
        row = {"method": method, "epochs": epochs} | {k: harness.spread([r[k] for r in runs]) for k in runs[0]}
        table.append(row | {"by seed": {k: [round(r[k], 5) for r in runs] for k in ("Class-IL", "Task-IL")}})
    for row in table:
        plain = next(r for r in table if r["method"] == "DER++" and r["epochs"] == row["epochs"])
        harness.differ(row, plain, "DER++")
    harness.show("SAM and selection, in percent", table, [k for k in table[0] if k != "by seed"])
    if not args.quick:
        missing = [f"{m}, {e} epochs" for e in EPOCHS for m in METHODS if (m, e) not in rows]
        harness.save("esacl_steps", table, seeds=seeds, images_per_class=per_class, missing=missing)


if __name__ == "__main__":
    main()
