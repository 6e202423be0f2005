"""Methods that give tasks subnetworks on a stand-in for Split CIFAR-100: accuracy, size and bits of masks.

The tasks of benchmarks/continual_dst.py (Tiny ImageNet, 10 tasks of 10 classes, 100 images per class, 32x32), ResNet-18
of width 8 with a 7x7 stem, batch 32, 12 epochs per task, separate batch-norm for each task; five seeds. Optimisers are
those of the methods' code: SGD with momentum for PackNet (0.01, a tenth of that while the last four epochs retrain),
Adam 0.001 for scores and weights of WSN, SupSup, Piggyback and Continual DST, divided by ten at half and three quarters
of a task, 0.0005 for LPS, whose stages have two epochs each, and 0.002 for NISPA, whose phases have two. Class-IL
infers the task by the lowest entropy. The target of CL-LSG and CPG is Scratch's accuracy on held-out images, which are
a fifth of the training images, for all rows. CPG's stages need more epochs, at most 24 per task; it starts with two
thirds of the weights.

python benchmarks/isolation.py [--quick] [--root FOLDER] [--finished]

FOLDER holds ``tiny-imagenet-200`` (a subset of its images will do). Finished runs are kept in
benchmarks/results/isolation_runs.json; the same command goes on with what is missing.
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
from continual_dst import data_of, images_of
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import MultiStepLR

import lightning_sparse_cl as scl

HEAD = ["head.weight"]
ADAM, MOMENTUM = partial(Adam, lr=0.001), partial(SGD, lr=0.01, momentum=0.9)


def subnetworks(**options: Any) -> scl.TaskSubnetworks:
    return scl.TaskSubnetworks(inference=scl.LowestEntropy(), **options)


def drops(*epochs: int) -> list[pl.Callback]:
    """The learning rate falls to a tenth at these epochs of a task."""
    return [scl.TaskLRSchedule(partial(MultiStepLR, milestones=list(epochs), gamma=0.1))]


def packnet(net: Any, epochs: int, of: Any, sparsity: float, last: bool) -> scl.IsolatingModule:
    retrain = epochs // 3
    pruning = scl.OneShotPruning(sparsity, of, dense=HEAD, retrain=retrain, last=last)
    return scl.PackNet(net, pruning, subnetworks(), optimizer=MOMENTUM, policies=drops(epochs - retrain))


def scored(method: Any, net: Any, epochs: int, full: Any, **options: Any) -> scl.IsolatingModule:
    kept = subnetworks(full=full)
    return method(net, subnetworks=kept, optimizer=ADAM, policies=drops(epochs // 2, 3 * epochs // 4), **options)


def lps(net: Any, epochs: int) -> scl.IsolatingModule:
    part = max(1, epochs // 6)
    rho = (0.01, 0.1, 1.0) if epochs >= 3 * part + 2 * part else (0.1,)
    adam = partial(Adam, lr=0.0005)
    return scl.LPS(net, rho=rho, admm=part, retrain=part, subnetworks=subnetworks(), optimizer=adam)


def dst(net: Any, epochs: int) -> scl.IsolatingModule:
    growth = scl.RigL(0.9, interval=25, fraction=0.5, until=1.0, final=0.005, distribution="erk", dense=HEAD)
    policies = drops(epochs // 2, 3 * epochs // 4)
    return scl.ContinualDST(net, growth=growth, subnetworks=subnetworks(), optimizer=ADAM, policies=policies)


def scratch(net: Any, epochs: int) -> scl.IsolatingModule:
    policies = [subnetworks(share=False), scl.FromScratch(), *drops(epochs // 2, 3 * epochs // 4)]
    return scl.IsolatingModule(net, scl.CrossEntropy(single_head=True), optimizer=ADAM, policies=policies)


def nispa(net: Any, epochs: int) -> scl.IsolatingModule:
    units = scl.StableUnits(0.9, phase=max(1, epochs // 6), phases=8, tolerance=0.02)
    return scl.NISPA(net, units, subnetworks(full="share"), optimizer=partial(Adam, lr=0.002))


def cpg(net: Any, epochs: int, target: list[float]) -> scl.IsolatingModule:
    part = max(1, epochs // 6)
    stages = scl.CompactPickGrow(
        target, learn=3 * part, compact=part, ramp=1, retrain=2 * part, steps=(0.3, 0.6, 0.8, 0.9), interval=5, fits=0.6
    )
    masks = partial(Adam, lr=0.002)
    sgd = partial(SGD, lr=0.02, momentum=0.9, nesterov=True, weight_decay=4e-5)
    return scl.CPG(net, stages, subnetworks(full="share"), optimizer=sgd, mask_optimizer=masks)


def cl_lsg(net: Any, epochs: int, target: list[float]) -> scl.IsolatingModule:
    growth = scl.SparseGrowth(target, max(1, epochs // 3))
    gates, masks = scl.GrowthGates(penalty=1e-3, channel_init=0.5, noise=False), partial(Adam, lr=0.02)
    kept, sgd = subnetworks(full="share"), partial(SGD, lr=0.02, momentum=0.9)
    return scl.CLLSG(net, growth, gates, subnetworks=kept, optimizer=sgd, mask_optimizer=masks)


METHODS: dict[str, Callable[[Any, int], scl.IsolatingModule]] = {
    "Scratch": scratch,
    "PackNet, half of what is free": lambda net, e: packnet(net, e, "free", 0.5, False),
    "PackNet, equal shares": lambda net, e: packnet(net, e, "share", 0.0, True),
    "LPS, equal shares": lps,
    "WSN, 10 %": lambda net, e: scored(scl.WSN, net, e, "share", keep=0.1),
    "WSN, 50 %": lambda net, e: scored(scl.WSN, net, e, "share", keep=0.5),
    "SupSup, 50 %": lambda net, e: scored(scl.SupSup, net, e, "share", keep=0.5),
    "Piggyback": lambda net, e: scored(scl.Piggyback, net, e, "share"),
    "NISPA, 90 %": nispa,
    "Continual DST, 90 %": dst,
}
GROWN: dict[str, tuple[Callable[[Any, int, list[float]], scl.IsolatingModule], Callable[[int], int]]] = {
    "CL-LSG": (cl_lsg, lambda epochs: epochs),
    "CPG": (cpg, lambda epochs: 14 * max(1, epochs // 6)),
}
"""How each method is made, given a target, and the largest number of epochs of its tasks."""


def run(
    method: str, seed: int, per_class: int, epochs: int, width: int, target: list[float] | None = None, images: str = ""
) -> dict[str, Any]:
    """One sequence."""
    pl.seed_everything(seed, verbose=False)
    net = scl.ResNet18(width, "7x7")
    make, planned = GROWN.get(method, (None, lambda epochs: epochs))
    module = METHODS[method](net, epochs) if make is None else make(net, epochs, target or [])
    metrics = harness.fit(module, data_of(images, val_fraction=0.2), planned(epochs), before_pruning=False)
    shared, flops = metrics["subnetworks"], metrics["flops"]
    bits = shared.get("mask_bits")
    return {
        "Task-IL": metrics["task_il"]["acc"],
        "Class-IL": metrics["class_il"]["acc"],
        "BWT": metrics["task_il"]["bwt"],
        "used": shared["used"][-1],
        "mask bits": None if bits is None else bits["coded"] / bits["plain"],
        "of plain": flops["training"] / flops["dense"],
        "held out": metrics["held_out"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data")
    parser.add_argument("--finished", action="store_true", help="run nothing; save the rows whose runs are all kept")
    args = harness.arguments(parser)
    sizes = (40, 3, 4) if args.quick else (100, 12, 8)
    seeds = [0] if args.quick else list(range(5))
    rows = list(METHODS)
    kept = {} if args.quick else harness.kept_runs("isolation")
    if args.finished:
        rows = [row for row in rows if all(json.dumps([row, seed, *sizes]) in kept for seed in seeds)]
    run_all = harness.run_all if args.quick else partial(harness.run_kept, "isolation")
    with TemporaryDirectory() as folder:
        images = f"{folder}/images.pt"
        torch.save(images_of(args.root, sizes[0]), images)
        one = partial(run, images=images)
        jobs: list[tuple] = [(row, seed, *sizes) for seed in seeds for row in rows]
        found = dict(zip([job[:2] for job in jobs], run_all(one, jobs, args.processes), strict=True))
        if not args.finished:
            jobs = [(row, seed, *sizes, found["Scratch", seed]["held out"]) for seed in seeds for row in GROWN]
            found |= dict(zip([job[:2] for job in jobs], run_all(one, jobs, args.processes), strict=True))
            rows += GROWN
    table = []
    for row in rows:
        runs = [found[row, seed] for seed in seeds]
        figures = {k: harness.spread([r[k] for r in runs]) for k in runs[0] if isinstance(runs[0][k], float)}
        plain = [found["Scratch", seed]["Task-IL"] for seed in seeds]
        beside = harness.paired([r["Task-IL"] for r in runs], plain) if row != "Scratch" else "-"
        table.append({"method": row} | dict.fromkeys(("mask bits",), "-") | figures | {"Task-IL to Scratch": beside})
    columns = ["method", "Task-IL", "Task-IL to Scratch", "Class-IL", "used", "mask bits", "of plain"]
    harness.show("Tiny ImageNet, 10 tasks, in percent", table, columns)
    if not args.quick:
        missing = [row for row in (*METHODS, *GROWN) if row not in rows]
        about = {"images_per_class": sizes[0], "epochs_per_task": sizes[1], "width": sizes[2], "missing": missing}
        harness.save("isolation", table, seeds=seeds, **about)


if __name__ == "__main__":
    main()
