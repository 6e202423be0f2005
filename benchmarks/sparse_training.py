"""What sparse kernels save in whole runs: SparCL with DER++ at sparsity 0.90, and inference after EsaCL's pruning.

SparCL: Split CIFAR-10, five tasks, ResNet-18 of width 64 on 32x32 images, batch 32 and two replay draws of 32; masks,
gradient masks and data removal are on; two CPU threads. Each seed is trained with and without SparseAcceleration, in
two new processes that take turns of a few steps, so that disturbances of the machine affect both; seconds are a
process's own, for the whole fit, including the evaluation after every task. Images and epochs suffice to compare times,
and accuracies with each other, but not with the paper's.

EsaCL: one task and its pruning; then inference with and without kernels, in turn, the dense network in channels_last.

python benchmarks/sparse_training.py --root FOLDER_WITH_CIFAR10 [--quick]
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import harness
import lightning.pytorch as pl
import torch
from rich.progress import Progress
from sparse_speed import in_turn, inference
from torch import Tensor, nn
from torch.optim import SGD

import lightning_sparse_cl as scl
from lightning_sparse_cl.allocator import keep_freed_memory
from lightning_sparse_cl.sparsity.layers import network_of

Images = list[tuple[Tensor, Tensor]]


def begin() -> None:
    """Set up every process in the same way."""
    harness.quiet()
    torch.set_num_threads(2)
    keep_freed_memory()


def tasks(images: Images, num_tasks: int = 5) -> scl.TaskDataModule:
    """Split CIFAR-10 with the usual augmentation."""
    transform = scl.ImageTransform((0.491, 0.482, 0.447), (0.247, 0.243, 0.262), crop=4, flip=True)
    return scl.SplitTensors(*images, num_tasks=num_tasks, batch_size=32, transform=transform)


class Turns(pl.Callback):
    """Makes two runs go on in turn.

    Args:
        other: an end of a pipe between them.
        first: whether this run begins.
        steps: steps per turn.
    """

    def __init__(self, other: Connection, first: bool, steps: int = 4) -> None:
        self.other, self.first, self.steps = other, first, steps
        self.alone = False
        self.waited = 0.0
        """Seconds of training spent waiting for the other."""

    def wait(self) -> None:
        try:
            self.alone = not self.other.recv()
        except EOFError:  # the other has failed
            self.alone = True

    def on_fit_start(self, *_: Any) -> None:
        self.other.send(True)  # both are ready
        self.wait()
        if not self.first and not self.alone:
            self.wait()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self.alone and batch_idx % self.steps == 0:
            start = time.monotonic()
            self.other.send(True)
            self.wait()
            self.waited += time.monotonic() - start

    def on_fit_end(self, *_: Any) -> None:
        if not self.alone:
            self.other.send(False)


def sparcl(images: Images, width: int, epochs: int, seed: int, accelerated: bool, other: Connection) -> dict[str, Any]:
    """A whole sequence."""
    begin()
    torch.manual_seed(seed)
    turns = Turns(other, first=not accelerated)
    policies = [turns, scl.SparseAcceleration()] if accelerated else [turns]
    module = scl.SparCL(
        scl.ResNet18(width), scl.DERpp(200, 32, forward="joint"), scl.TaskAwareDynamicMasking(0.9, interval=1),
        scl.DynamicDataRemoval(0.3, cutoff=1, interval=1), scl.DynamicGradientMasking(0.05, interval=30),
        optimizer=partial(SGD, lr=0.03), policies=policies,
    )  # fmt: skip
    with other:
        found = harness.fit(module, tasks(images), epochs, before_pruning=False)  # nothing is pruned
    seconds = round(found["seconds"] - turns.waited, 1)
    return {"class_il": found["class_il"]["acc"], "task_il": found["task_il"]["acc"], "seconds": seconds}


def in_two_processes(*arguments: Any) -> list[dict[str, Any]]:
    """A sequence without kernels and one with them."""
    context = get_context("spawn")
    with ProcessPoolExecutor(2, context) as pool:
        runs = [pool.submit(sparcl, *arguments, i == 1, end) for i, end in enumerate(context.Pipe())]
        return [run.result() for run in runs]


def esacl(images: Images, width: int, sparsity: float, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of inference after pruning."""
    torch.manual_seed(0)
    module = scl.EsaCL(scl.ResNet18(width), scl.CrossEntropy(), sparsity)
    some = [(x[:: max(1, len(x) // 320)], y[:: max(1, len(y) // 320)]) for x, y in images]  # of every class
    harness.fit(module, tasks(some, num_tasks=1), 1)
    dense = nn.Sequential(*network_of(module)).eval()
    sparse, rows = copy.deepcopy(dense), []
    scl.accelerate(sparse)
    for batch in (32, 1):
        x = torch.randn(batch, 3, 32, 32)
        runs = {"dense": inference(dense, x.to(memory_format=torch.channels_last)), "sparse": inference(sparse, x)}
        times = in_turn(runs, rounds, lambda: None)
        ratios = [d / s for d, s in zip(times["dense"], times["sparse"], strict=True)]
        medians = {f"{name}_ms": round(statistics.median(t), 2) for name, t in times.items()}
        rows.append({"sparsity": sparsity, "batch": batch} | medians | {"speedup": round(statistics.median(ratios), 2)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of CIFAR-10, as images or as distributed")
    args = harness.arguments(parser)
    begin()
    width, per_class, epochs, seeds = (32, 64, 2, [0]) if args.quick else (64, 512, 2, [0, 1, 2])
    images = harness.first_of_each(args.root, per_class, 20 if args.quick else 100)
    rows: list[dict[str, Any]] = []
    with Progress() as progress:
        bar = progress.add_task("runs", total=len(seeds) + 2)
        pruned = []
        for sparsity in (0.8, 0.9):
            pruned += esacl(images, width, sparsity, 3 if args.quick else 9)
            progress.advance(bar)
        for seed in seeds:
            pair = in_two_processes(images, width, epochs, seed)
            progress.advance(bar)
            for accelerated, found in enumerate(pair):
                speedup = round(pair[0]["seconds"] / found["seconds"], 2)
                rows.append({"seed": seed, "accelerated": bool(accelerated)} | found | {"speedup": speedup})
                progress.log(rows[-1])
    harness.show("SparCL-DER++, sparsity 0.90, two threads", rows, list(rows[0]), list(rows[0]))
    harness.show("Inference after EsaCL's pruning, two threads", pruned, list(pruned[0]), list(pruned[0]))
    name = "sparse_training_quick" if args.quick else "sparse_training"
    about = {"width": width, "images_per_class": per_class, "epochs": epochs}
    machine = f"{torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, 2 threads"
    print(harness.save(name, rows, machine=machine, settings=about, esacl=pruned))


if __name__ == "__main__":
    main()
