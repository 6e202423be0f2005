"""Seconds of efficient EsaCL with sparse kernels beside dense DER++, on a network large enough for kernels to matter.

Split CIFAR-10, five tasks, ResNet-18 of width 64 on 32x32 images, 32 images per class, batch 32 and two replay draws of
32, four epochs a task, pruned after the first; two CPU threads. The two runs of a seed are two new processes that take
turns of a few steps, so that disturbances of the machine affect both; seconds are a process's own, for the whole fit,
including the evaluation after every task. Images and epochs are enough to compare times, not accuracies.

python benchmarks/esacl_seconds.py --root FOLDER_WITH_CIFAR10 [--quick]
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import harness
import lightning.pytorch as pl
from rich.progress import track
from sparse_training import Images, Turns, begin, tasks
from torch.optim import SGD

import lightning_sparse_cl as scl

RUNS = {"efficient EsaCL": {}, "efficient EsaCL without SP": {"optimizer": partial(SGD, lr=0.03)}}


def run(
    images: Images, width: int, epochs: int, seed: int, name: str, first: bool, other: Connection
) -> dict[str, Any]:
    """A whole sequence of DER++ or, with kernels, of EsaCL."""
    begin()
    pl.seed_everything(seed, verbose=False)
    turns, backbone, objective = Turns(other, first), scl.ResNet18(width), scl.DERpp(200, 32, forward="joint")
    if name in RUNS:
        plain: dict[str, Any] = {"update": scl.SingleBackward(), "selection": scl.LossSelection(1, 1)}
        module: scl.ContinualModule = scl.EsaCL(
            backbone, objective, 0.9, prune_epoch=1, reopen=scl.Reopen("zero", 0.3),
            policies=[turns, scl.SparseAcceleration()], **plain, **RUNS[name],
        )  # fmt: skip
    else:
        sgd = partial(SGD, lr=0.03)
        module = scl.ContinualModule(backbone, objective, optimizer=sgd, policies=[turns])
    with other:
        found = harness.fit(module, tasks(images), epochs, before_pruning=False)
    return {"TFLOPs": found["flops"]["training"] / 1e12, "seconds": round(found["seconds"] - turns.waited, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of CIFAR-10, as images or as distributed")
    args = harness.arguments(parser)
    width, per_class, epochs, seeds = (16, 32, 2, [0]) if args.quick else (64, 32, 4, [0, 1, 2])
    images = harness.first_of_each(args.root, per_class, 20)
    rows: list[dict[str, Any]] = []
    for name, seed in track([(name, seed) for name in RUNS for seed in seeds], "pairs of runs"):
        context = get_context("spawn")
        with ProcessPoolExecutor(2, context) as pool:
            pair = [
                pool.submit(run, images, width, epochs, seed, each, i == 0, end)
                for i, (each, end) in enumerate(zip(("DER++", name), context.Pipe()))
            ]
            dense, sparse = (each.result() for each in pair)
        rows.append(
            {"method": name, "seed": seed, "DER++, s": dense["seconds"], "EsaCL, s": sparse["seconds"],
             "seconds of DER++": round(sparse["seconds"] / dense["seconds"], 2),
             "FLOPs of DER++": round(sparse["TFLOPs"] / dense["TFLOPs"], 2)}
        )  # fmt: skip
    harness.show("Efficient EsaCL with kernels beside dense DER++, two threads", rows, list(rows[0]), list(rows[0]))
    if not args.quick:
        harness.save("esacl_seconds", rows, seeds=seeds, width=width, images_per_class=per_class, epochs=epochs)


if __name__ == "__main__":
    main()
