"""What a task costs after many have been learnt: Continual DST on a hundred tasks of permuted digits.

A perceptron with two hidden layers of 64; each task uses 10 % of it, two steps of 256 images per task; after every
task all hundred test sets are measured in both scenarios and a checkpoint is written. The figures are CPU seconds of
one thread, which other processes on the machine hardly change: for a task's training, evaluation and checkpoint, and
for the end of the fit, where the report counts what the subnetworks share. They do not include waiting for the disk.

python benchmarks/long_sequences.py [--quick] [--code NAME]

To measure other code, set PYTHONPATH to its folder and give it a name. Results are added to the result file; the last
ones of a name replace earlier ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import harness
import lightning.pytorch as pl
import torch
from rich.progress import Progress

import lightning_sparse_cl as scl

TASKS, BLOCK = 100, 10
PARTS = ("training", "evaluation", "checkpoint")


class Clock(pl.Callback):
    """CPU seconds at the start of each task and at the end of the last."""

    def __init__(self, bar: Progress, bar_id: Any) -> None:
        self.at: list[float] = []
        self._bar, self._id = bar, bar_id

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        self.at.append(time.process_time())
        self._bar.advance(self._id, 1 if task else 0)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.at.append(time.process_time())
        self._bar.advance(self._id)


class Evaluation(scl.ContinualEvaluation):
    """Records how long it took after each task."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.took: list[float] = []

    def on_after_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        start = time.process_time()
        super().on_after_task_end(trainer, pl_module, task)
        self.took.append(time.process_time() - start)


class Checkpoint(scl.SequenceCheckpoint):
    """Records how long the file after each epoch took, and its size in MB."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.took: list[float] = []
        self.megabytes: list[float] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        start = time.process_time()
        super().on_train_epoch_end(trainer, pl_module)
        self.took.append(time.process_time() - start)
        self.megabytes.append(Path(self.last_model_path).stat().st_size / 1e6)


class Report(scl.RunReport):
    """Prints nothing."""

    def on_after_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        pass

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pass


def run(tasks: int, bar: Progress, bar_id: Any, folder: str) -> dict[str, list[float]]:
    """One sequence: by part, the seconds that each task took."""
    pl.seed_everything(0, verbose=False)
    growth = scl.SET(0.9, interval=1, dense=["head.weight"])
    module = scl.ContinualDST(
        scl.SmallMLP([64, 64]), growth=growth, subnetworks=scl.TaskSubnetworks(full="share"),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.003),
    )  # fmt: skip
    clock, evaluation = Clock(bar, bar_id), Evaluation()
    checkpoint = Checkpoint(folder, save_last=True)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=-1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        limit_train_batches=2, default_root_dir=folder,
        callbacks=[
            clock, scl.TaskSchedule(1), scl.RandomState(), evaluation, scl.FlopsCounter(), scl.MemoryFootprint(),
            scl.ModelCapacity(), Report(folder), checkpoint,
        ],
    )  # fmt: skip
    trainer.fit(module, scl.PermutedDigits(num_tasks=tasks, batch_size=256))
    end = time.process_time() - clock.at[-1]
    whole = [b - a for a, b in zip(clock.at, clock.at[1:])]
    rest = [w - e - c for w, e, c in zip(whole, evaluation.took, checkpoint.took)]
    parts = {"training": rest, "evaluation": evaluation.took, "checkpoint": checkpoint.took}
    return parts | {"megabytes": checkpoint.megabytes, "end": [end]}


def blocks(runs: list[dict[str, list[float]]]) -> list[dict[str, Any]]:
    """A row per ten tasks: milliseconds per task over the tasks and runs, and the size of a checkpoint."""
    rows = []
    for first in range(0, len(runs[0]["training"]), BLOCK):
        at = slice(first, first + BLOCK)
        found = {part: harness.spread([1000 * t for r in runs for t in r[part][at]]) for part in PARTS}
        size = statistics.median(m for r in runs for m in r["megabytes"][at])
        rows.append({"tasks": f"{first + 1} to {first + BLOCK}"} | found | {"MB": round(size, 2)})
    return rows


def code() -> str:
    """The commit of the package that is measured."""
    folder = Path(scl.__file__).parent
    changed = subprocess.run(["git", "-C", folder, "diff", "--quiet", "HEAD", "--", folder], check=False).returncode
    commit = subprocess.run(["git", "-C", folder, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return commit.stdout.strip() + (" and changes" if changed else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", default="now", help="name of the code that is measured")
    parser.add_argument("--repeats", type=int, default=3)
    args = harness.arguments(parser)
    harness.quiet()
    repeats = 1 if args.quick else args.repeats
    runs = []
    with Progress() as bar, TemporaryDirectory() as folder:
        bar_id = bar.add_task("tasks", total=repeats * TASKS)
        for i in range(repeats):
            runs.append(run(TASKS, bar, bar_id, f"{folder}/{i}"))
    rows = [{"code": args.code, "commit": code(), "runs": repeats} | row for row in blocks(runs)]
    end = harness.spread([1000 * r["end"][0] for r in runs])
    harness.show(
        f"Of the package {args.code} ({code()}), milliseconds per task", rows, ["tasks", *PARTS, "MB"], (*PARTS, "MB")
    )
    print(f"the end of the fit: {end['median']:.0f} ms")
    if not args.quick:
        path, others, ends = harness.RESULTS / "long_sequences.json", [], {}
        if path.exists():
            before = json.loads(path.read_text())
            others, ends = [r for r in before["rows"] if r["code"] != args.code], before["end of the fit"]
        harness.save("long_sequences", others + rows, tasks=TASKS, **{"end of the fit": ends | {args.code: end}})


if __name__ == "__main__":
    main()
