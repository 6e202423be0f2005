"""What in SparCL costs or gains accuracy at a small size: its first mask, its gradient masks, what it removes.

DER++ at 90 % sparsity on five tasks of two classes of CIFAR-10, 192 images per class, halved to 16x16 pixels; ResNet-18
of width 8, 500 exemplars, batches of 32, 10 epochs per task, stages of two epochs, SGD 0.03; five seeds. Each part is
added to TDM alone; differences are paired, with their 95 % interval.

python benchmarks/sparcl_diagnoses.py [--quick] [--root FOLDER]

FOLDER holds CIFAR-10 as torchvision downloads it, or as an image folder {train,test}/<class>/*. Finished runs are kept
in benchmarks/results/sparcl_diagnoses_runs.json; the same command goes on with what is missing.
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
from torch import Tensor
from torch.optim import SGD

import lightning_sparse_cl as scl

SPARSITY, Q, EVERY, CUTOFF = 0.9, 0.02, 2, 4


class RandomGradients(scl.DynamicGradientMasking):
    """Drops gradients at random, as many and as often."""

    def scores(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> dict[str, Tensor]:
        return self.random(pl_module, self.names(pl_module), trainer.global_step)


class FromSNIP(scl.TaskAwareDynamicMasking):
    """Begins with the mask that SNIP would keep."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        scl.ScorePruning.on_fit_start(self, trainer, pl_module)  # the mask waits for the first batch

    def scores(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> dict[str, Tensor]:
        snip = scl.SNIP(self.sparsity)
        snip.setup(trainer, pl_module, "fit")
        return snip.scores(trainer, pl_module, batch)


def ddr(by: Any = "misclassification") -> scl.DynamicDataRemoval:
    return scl.DynamicDataRemoval(0.3, CUTOFF, EVERY, by=by)


TDM = partial(scl.TaskAwareDynamicMasking, SPARSITY, EVERY)
ROWS: dict[str, Callable[[], list[pl.Callback]]] = {
    "TDM": lambda: [TDM()],
    "TDM from SNIP's mask": lambda: [FromSNIP(SPARSITY, EVERY)],
    "SNIP": lambda: [scl.SNIP(SPARSITY)],
    "TDM + DGM by CGI": lambda: [TDM(), scl.DynamicGradientMasking(Q, interval=10)],
    "TDM + DGM at random": lambda: [TDM(), RandomGradients(Q, interval=10)],
    "TDM + DDR": lambda: [TDM(), ddr()],
    "TDM + DDR by loss": lambda: [TDM(), ddr("loss")],
    "TDM + DDR at random": lambda: [TDM(), ddr("random")],
}
FIGURES = ("Class-IL", "Task-IL")
PAIRS = (
    ("TDM + DDR", "TDM + DDR at random"), ("TDM from SNIP's mask", "SNIP"), ("TDM + DDR", "SNIP"),
    ("TDM + DGM by CGI", "TDM + DGM at random"),
)  # fmt: skip


def run(name: str, seed: int, epochs: int, images: str) -> dict[str, float]:
    """One sequence."""
    pl.seed_everything(seed, verbose=False)
    module = scl.ContinualModule(
        scl.ResNet18(8), scl.DERpp(500, 32), optimizer=partial(SGD, lr=0.03), policies=ROWS[name]()
    )
    metrics = harness.fit(module, harness.small_cifar10(*torch.load(images)), epochs)
    return dict(zip(FIGURES, (metrics["class_il"]["acc"], metrics["task_il"]["acc"]), strict=True))


def pairs(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Paired differences of the rows that are compared."""
    by = {row["method"]: row["by seed"] for row in table}
    return [{"rows": f"{a} - {b}"} | {k: harness.paired(by[a][k], by[b][k]) for k in FIGURES} for a, b in PAIRS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/cifar10-images")
    args = harness.arguments(parser)
    seeds, epochs, per_class = ([0, 1], 8, 32) if args.quick else (list(range(5)), 10, 192)
    jobs = [(name, seed, epochs) for seed in seeds for name in ROWS]
    run_all = harness.run_all if args.quick else partial(harness.run_kept, "sparcl_diagnoses")
    with TemporaryDirectory() as folder:
        images = f"{folder}/images.pt"
        torch.save(harness.halved(args.root, per_class, 100 if args.quick else 500), images)
        results = dict(zip(jobs, run_all(partial(run, images=images), jobs, args.processes), strict=True))
    table: list[dict[str, Any]] = []
    for name in ROWS:
        by_seed = {k: [results[(name, seed, epochs)][k] for seed in seeds] for k in FIGURES}
        table.append({"method": name} | {k: harness.spread(v) for k, v in by_seed.items()} | {"by seed": by_seed})
        harness.differ(table[-1], table[0], "TDM")
    harness.show("SparCL's parts at 90 %, in percent", table, [c for c in table[0] if c != "by seed"])
    harness.show("Differences in points", pairs(table), ["rows", *FIGURES])
    if not args.quick:
        about = {"epochs_per_task": epochs, "images_per_class": per_class}
        harness.save("sparcl_diagnoses", table, seeds=seeds, **about, pairs=pairs(table))


if __name__ == "__main__":
    main()
