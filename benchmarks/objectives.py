"""Every objective, projection and update rule on Split CIFAR-10 at a size for CPUs: accuracy, forgetting and cost.

Five tasks of two classes, 400 images per class, halved to 16x16 pixels, ResNet-18 of width 16, memories of 500, batch
32, 10 epochs per task: the same for all rows. Learning rates and coefficients are the published ones for Split CIFAR-10
(configs/split_cifar10), except where CHANGED says otherwise. Afterwards single steps are timed, all methods in turn.

python benchmarks/objectives.py [--quick] [--root FOLDER] [--only NAME ...]
python benchmarks/objectives.py --steps [--root FOLDER]    times the steps again, and puts them into the results

FOLDER holds CIFAR-10 as torchvision downloads it, or as an image folder {train,test}/<class>/*.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import harness
import lightning.pytorch as pl
import torch
from torch.optim import SGD

import lightning_sparse_cl as scl

BATCH, MEMORY, EPOCHS = 32, 500, 10
CHANGED = {
    "Co2L": "learning rate 0.1, for its 0.5 is for batches of 512",
    "GPM": "batch 32",
    "La-MAML": "batch 32 in 2 parts, memory 500, as many epochs as the others",
}
Make = Callable[..., dict[str, Any]]
"""Arguments of ContinualModule, given ``memory`` and ``replay_batch_size``."""

METHODS: dict[str, tuple[float, Make]] = {  # learning rate, and the parts
    "fine-tuning": (0.1, lambda **m: {}),
    "EWC": (0.03, lambda **m: {"objective": scl.EWC(10.0, samples=1000)}),
    "LwF": (0.01, lambda **m: {"objective": scl.LwF(3.0)}),
    "A-GEM": (0.03, lambda **m: {"policies": [scl.AGEM(**m)]}),
    "GPM": (0.01, lambda **m: {"objective": scl.CrossEntropy(single_head=True), "policies": [scl.GPM()]}),
    "La-MAML": (1.0, lambda **m: {"objective": scl.ER(**m, forward="joint"), "update": scl.LaMAML(parts=2)}),
    "FDR": (0.03, lambda **m: {"objective": scl.FDR(**m, alpha=1.0, forward="joint")}),
    "iCaRL": (0.1, lambda **m: {"objective": scl.ICaRL(**m)}),
    "Co2L": (0.1, lambda **m: {"objective": scl.CO2L(**m)}),
    "ER": (0.1, lambda **m: {"objective": scl.ER(**m, forward="joint")}),
    "DER": (0.03, lambda **m: {"objective": scl.DER(**m, alpha=0.3, forward="joint")}),
    "DER++": (0.03, lambda **m: {"objective": scl.DERpp(**m, alpha=0.2, beta=0.5, forward="joint")}),
    "joint": (0.1, lambda **m: {}),
}
ORDER = [("fine-tuning", "EWC"), ("fine-tuning", "LwF"), ("EWC", "A-GEM"), ("LwF", "A-GEM"), ("A-GEM", "ER"),
         ("ER", "DER++"), ("DER++", "joint")]  # fmt: skip
"""The order in the literature by Class-IL, the lower one first."""


def module_of(method: str, width: int) -> scl.ContinualModule:
    lr, make = METHODS[method]
    decay = {"LwF": 5e-4, "iCaRL": 1e-5, "Co2L": 1e-4}.get(method, 0.0)
    optimizer = partial(SGD, lr=lr, weight_decay=decay, momentum=0.9 * (method == "Co2L"))
    return scl.ContinualModule(scl.ResNet18(width), optimizer=optimizer, **make(memory=MEMORY, replay_batch_size=BATCH))


def data_of(images: str, **kwargs: Any) -> scl.SplitTensors:
    return scl.SplitTensors(
        *torch.load(images), num_tasks=5, batch_size=BATCH,
        transform=scl.ImageTransform([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2615], crop=2, flip=True), **kwargs,
    )  # fmt: skip


def run(method: str, seed: int, images: str, epochs: int, width: int) -> dict[str, Any]:
    """One sequence."""
    pl.seed_everything(seed, verbose=False)
    metrics = harness.fit(module_of(method, width), data_of(images, joint=method == "joint"), epochs)
    return {
        "Class-IL": metrics["class_il"]["acc"],
        "Task-IL": metrics["task_il"]["acc"],
        "forgetting": metrics["class_il"]["forgetting"] or 0.0,
        "Task-IL forgetting": metrics["task_il"]["forgetting"] or 0.0,
        "TFLOPs": metrics["flops"]["training"] / 1e12,
        "seconds": metrics["seconds"],
    }


class Stopwatch(pl.Callback):
    """Milliseconds of each step of the second task."""

    def __init__(self) -> None:
        self.ms: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.datamodule.task == 1:
            self.ms.append(1e3 * (time.perf_counter() - self._start))
            trainer.should_stop = len(self.ms) >= trainer.num_training_batches - 1


def step_times(methods: list[str], images: str, width: int, rounds: int, batches: int) -> dict[str, float]:
    """Median milliseconds of a step, alone on one thread; all methods in turn, ``rounds`` times."""
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {method: [] for method in methods}
    for seed in range(rounds):
        for method in methods:
            pl.seed_everything(seed, verbose=False)
            watch = Stopwatch()
            trainer = pl.Trainer(
                accelerator="cpu", max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False, limit_train_batches=batches, callbacks=[scl.TaskSchedule(1), watch],
            )  # fmt: skip
            trainer.fit(module_of(method, width), data_of(images))
            found[method] += watch.ms[1:]
    return {method: statistics.median(ms) for method, ms in found.items()}


def with_times(rows: list[dict[str, Any]], times: dict[str, float]) -> list[dict[str, Any]]:
    """Each row with the milliseconds of a step, and its ratio to fine-tuning's; joint training has the same."""
    base = times.get("fine-tuning")
    costs = {
        m: {"ms a step": round(t, 2), "of fine-tuning": round(t / base, 2) if base else None} for m, t in times.items()
    }
    return [row | costs.get(row["method"].replace("joint", "fine-tuning"), {}) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data")
    parser.add_argument("--only", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", action="store_true", help="time the steps again, and nothing else")
    args = harness.arguments(parser)
    per_class, epochs, width = (64, 2, 8) if args.quick else (400, EPOCHS, 16)
    seeds = [0] if args.quick else list(range(args.seeds))
    rows, path = [], harness.RESULTS / "objectives.json"
    with TemporaryDirectory() as folder:
        images = f"{folder}/images.pt"
        torch.save(harness.halved(args.root, per_class), images)
        if not args.steps:
            jobs = [(method, seed, images, epochs, width) for method in args.only for seed in seeds]
            results = iter(harness.run_all(run, jobs, args.processes))
            for method in args.only:
                runs = [next(results) for _ in seeds]
                rows.append({"method": method} | {k: harness.spread([r[k] for r in runs]) for k in runs[0]})
        harness.quiet()
        times = step_times([m for m in args.only if m != "joint"], images, width, 1 if args.quick else 3, 12)
    if args.steps:
        result = json.loads(path.read_text())
        result["rows"] = with_times(result["rows"], times)
        path.write_text(json.dumps(result, indent=1) + "\n")
        return harness.show("Steps on one thread", result["rows"], ("method", "ms a step", "of fine-tuning"))
    rows = with_times(rows, times)
    harness.show("Split CIFAR-10, 16x16: accuracies in percent", rows, list(rows[-1]), ("TFLOPs", "seconds"))
    medians = {row["method"]: row["Class-IL"]["median"] for row in rows}
    order = {f"{a} < {b}": medians[a] < medians[b] for a, b in ORDER if {a, b} <= medians.keys()}
    for pair, holds in order.items():
        print(f"{pair}: {'yes' if holds else 'no'}")
    if not args.quick and args.only == list(METHODS):
        sizes = {"epochs_per_task": epochs, "images_per_class": per_class, "width": width}
        harness.save("objectives", rows, seeds=seeds, **sizes, order=order, changed=CHANGED)


if __name__ == "__main__":
    main()
