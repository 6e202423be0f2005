"""What sparse kernels save in whole runs: SparCL with DER++ at sparsity 0.90, and inference after EsaCL's pruning.

SparCL: Split CIFAR-10, five tasks, ResNet-18 of width 64 on 32x32 images, batch 32 and two replay draws of 32; masks,
gradient masks and data removal move; two CPU threads. Each seed is trained with and without SparseAcceleration, one
after the other, each in a new process; seconds are of the whole fit, with the evaluation after every task. Images and
epochs are enough to compare times, and accuracies with each other, not with the paper's.

EsaCL: one task and its pruning; then inference with and without kernels, in turn, the dense network in channels_last.

python benchmarks/sparse_training.py --root FOLDER_WITH_CIFAR10 [--quick]
"""

from __future__ import annotations

import argparse
import copy
import statistics
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import harness
import torch
from rich.progress import Progress
from sparse_speed import in_turn, inference
from torch import Tensor, nn
from torch.optim import SGD

import lightning_sparse_cl as scl
from lightning_sparse_cl.kernels.memory import keep_freed_memory
from lightning_sparse_cl.sparsity.layers import network_of

Images = list[tuple[Tensor, Tensor]]


def begin() -> None:
    """The same in every process."""
    harness.quiet()
    torch.set_num_threads(2)
    keep_freed_memory()


def tasks(images: Images, num_tasks: int = 5) -> scl.TaskDataModule:
    """Split CIFAR-10 with the usual augmentation."""
    transform = scl.ImageTransform((0.491, 0.482, 0.447), (0.247, 0.243, 0.262), crop=4, flip=True)
    return scl.SplitTensors(*images, num_tasks=num_tasks, batch_size=32, transform=transform)


def sparcl(images: Images, width: int, epochs: int, seed: int, accelerated: bool) -> dict[str, Any]:
    """A whole sequence."""
    begin()
    torch.manual_seed(seed)
    module = scl.SparCL(
        scl.ResNet18(width), scl.DERpp(200, 32), scl.TaskAwareDynamicMasking(0.9, every=1),
        scl.DynamicDataRemoval(0.3, cutoff=1, every=1), scl.DynamicGradientMasking(0.05, interval=30),
        optimizer=partial(SGD, lr=0.03), policies=[scl.SparseAcceleration()] if accelerated else [],
    )  # fmt: skip
    found = harness.fit(module, tasks(images), epochs)
    return {"class_il": found["class_il"]["acc"], "task_il": found["task_il"]["acc"], "seconds": found["seconds"]}


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
    width, per_class, epochs, seeds = (32, 64, 2, [0]) if args.quick else (64, 512, 2, [0, 1, 2, 3, 4, 5])
    images = harness.first_of_each(args.root, per_class, 20 if args.quick else 100)
    rows: list[dict[str, Any]] = []
    with Progress() as progress:
        bar = progress.add_task("runs", total=2 * len(seeds) + 2)
        pruned = []
        for sparsity in (0.8, 0.9):
            pruned += esacl(images, width, sparsity, 3 if args.quick else 9)
            progress.advance(bar)
        for seed in seeds:
            pair = {}
            for accelerated in (False, True):
                with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
                    pair[accelerated] = fresh.submit(sparcl, images, width, epochs, seed, accelerated).result()
                progress.advance(bar)
            for accelerated, found in pair.items():
                speedup = round(pair[False]["seconds"] / found["seconds"], 2)
                rows.append({"seed": seed, "accelerated": accelerated} | found | {"speedup": speedup})
                progress.log(rows[-1])
    harness.show("SparCL-DER++, sparsity 0.90, two threads", rows, list(rows[0]), list(rows[0]))
    harness.show("Inference after EsaCL's pruning, two threads", pruned, list(pruned[0]), list(pruned[0]))
    name = "sparse_training_quick" if args.quick else "sparse_training"
    about = {"width": width, "images_per_class": per_class, "epochs": epochs}
    machine = f"{torch.backends.cpu.get_cpu_capability()}, 2 cores, 2 threads"
    print(harness.save(name, rows, machine=machine, settings=about, esacl=pruned))


if __name__ == "__main__":
    main()
