"""What every benchmark needs: runs in parallel processes under a progress bar, and results on disk."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import functional as F

import lightning_sparse_cl as scl
from lightning_sparse_cl import comparing
from lightning_sparse_cl.comparing import Interval, Spread
from lightning_sparse_cl.whole_file import whole_file

RESULTS = Path(__file__).parent / "results"


def arguments(parser: argparse.ArgumentParser | str) -> argparse.Namespace:
    """``--quick`` and ``--processes``, on top of the benchmark's own parser or description."""
    if isinstance(parser, str):
        parser = argparse.ArgumentParser(description=parser)
    parser.add_argument("--quick", action="store_true", help="a small preset, under three minutes on two cores")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    return parser.parse_args()


def first_of_each(root: str, per_class: int, to_test: int = 500) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """CIFAR-10: the first images of every class, to train and to test on; and labels."""
    source = scl.ImageFolderSource(root) if (Path(root) / "train").is_dir() else scl.CIFAR10Source(root)
    parts = []
    for train in (True, False):
        images, labels = source.read(train)
        at = torch.cat([(labels == c).nonzero().squeeze(1)[: per_class if train else to_test] for c in range(10)])
        parts.append((images[at], labels[at]))
    return parts


def halved(root: str, per_class: int, to_test: int = 500) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same, averaged over 2x2 pixels."""
    parts = first_of_each(root, per_class, to_test)
    return [(F.avg_pool2d(images.float(), 2).round().byte(), labels) for images, labels in parts]


def small_cifar10(train: tuple[torch.Tensor, ...], test: tuple[torch.Tensor, ...]) -> scl.SplitTensors:
    """Five tasks of two classes of :func:`halved` images, in batches of 32, shifted by up to two pixels and flipped."""
    augment = scl.ImageTransform([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2615], crop=2, flip=True)
    return scl.SplitTensors(train, test, num_tasks=5, batch_size=32, transform=augment)


def fit(
    module: pl.LightningModule,
    data: scl.TaskDataModule,
    epochs: int,
    task_il_only: bool = False,
    before_pruning: bool = True,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Train a sequence on one CPU thread and return what ``metrics.json`` would hold.

    With a ``folder``, a run that was stopped goes on from its last checkpoint there; a finished one leaves nothing.
    """
    evaluation, report = (
        scl.ContinualEvaluation(before_pruning and not task_il_only, not task_il_only),
        scl.RunReport(show=False),
    )
    measures = [scl.FlopsCounter(), scl.MemoryFootprint()]
    checkpoints = [] if folder is None else [scl.SequenceCheckpoint(folder, save_last=True, save_top_k=0)]
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=-1, logger=False, enable_checkpointing=folder is not None,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[scl.TaskSchedule(epochs), scl.RandomState(), evaluation, *measures, report, *checkpoints],
    )  # fmt: skip
    last = None if folder is None else folder / "last.ckpt"
    trainer.fit(module, data, ckpt_path=last if last is not None and last.exists() else None)
    metrics = report.collect(trainer, module)
    if folder is not None:
        shutil.rmtree(folder)
    return metrics


def run_all(
    run: Callable[..., Any],
    jobs: Sequence[tuple],
    processes: int,
    keep: Callable[[tuple, Any], None] = lambda job, result: None,
) -> list[Any]:
    """``run(*job)`` for every job, in parallel; results in the order of the jobs. ``keep`` gets each as it is done."""
    start = time.monotonic()
    results: list[Any] = [None] * len(jobs)
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=quiet) as pool:
        futures = {pool.submit(run, *job): i for i, job in enumerate(jobs)}
        for future in track(as_completed(futures), "runs", total=len(jobs)):
            results[futures[future]] = future.result()
            keep(jobs[futures[future]], results[futures[future]])
    print(f"{len(jobs)} runs in {time.monotonic() - start:.0f} s")
    return results


def kept_runs(name: str) -> dict[str, Any]:
    """Results that :func:`run_kept` has kept, by the job as JSON."""
    path = RESULTS / f"{name}_runs.json"
    return json.loads(path.read_text()) if path.exists() else {}


def run_kept(name: str, run: Callable[..., Any], jobs: Sequence[tuple], processes: int) -> list[Any]:
    """:func:`run_all` of long measurements: each result is kept in ``results/NAME_runs.json`` as soon as it is there.

    The same command goes on with what is missing; :func:`save` takes the file away when nothing is. Where a change of
    the code changes the results, take it away by hand.
    """
    done = kept_runs(name)

    def keep(job: tuple, result: Any) -> None:
        done[json.dumps(job)] = result
        with whole_file(RESULTS / f"{name}_runs.json") as part:
            part.write_text(json.dumps(done, indent=1) + "\n")

    run_all(run, [job for job in jobs if json.dumps(job) not in done], processes, keep)
    return [done[json.dumps(job)] for job in jobs]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    found = Spread.of(values)
    return {"median": found.median, "min": found.least, "max": found.greatest}


def paired(values: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Mean of the differences of runs with the same seeds, and its 95 % interval (Student's t)."""
    return comparing.paired(values, others)._asdict()


def differ(row: dict[str, Any], reference: dict[str, Any], name: str) -> None:
    """Add the paired differences of a row's accuracies, which it has by seed, to those of another row."""
    for of, values in row["by seed"].items():
        row[f"{of} to {name}"] = "-" if row is reference else paired(values, reference["by seed"][of])


def verdict(difference: dict[str, float], pairs: int) -> str:
    """What :func:`paired` says of a claim that the difference is positive: an interval needs five pairs at least."""
    return comparing.verdict(Interval(**difference), pairs)


def beside(rows: Sequence[dict[str, Any]], derpp: dict[str, Any]) -> None:
    """Add to each row its training FLOPs as a share of those of DER++, physically and as SparCL's tables count."""
    for row in rows:
        for share, of in (("of DER++", "TFLOPs"), ("of DER++ as in the tables", "TFLOPs as in the tables")):
            row[share] = {k: v / derpp[of]["median"] for k, v in row[of].items()}


def save(name: str, rows: list[dict[str, Any]], **more: Any) -> Path:
    """Write ``results/NAME.json`` with the machine and the command that made it."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    result = {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "lightning": lightning.__version__,
            "lightning_sparse_cl": scl.__version__,
        },
        "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores, one thread a run",
        **more,
        "rows": rows,
    }  # fmt: skip
    path.write_text(json.dumps(result, indent=1) + "\n")
    if not more.get("missing"):
        (RESULTS / f"{name}_runs.json").unlink(missing_ok=True)
    return path


def show(title: str, rows: list[dict[str, Any]], columns: Sequence[str], plain: Sequence[str] = ()) -> None:
    """Print rows as a rich table; a spread as median and range, in percent unless the column is ``plain``."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(_cell(row[c], 1 if c in plain else 100) for c in columns))
    Console(width=140).print(table)


def _cell(value: Any, scale: float) -> str:
    if isinstance(value, dict) and "mean" in value and math.isnan(value["low"]):
        return f"{scale * value['mean']:+.1f}"  # of one seed
    if isinstance(value, dict) and "mean" in value:
        return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(scale * value[of] for of in ("mean", "low", "high")))
    if isinstance(value, dict):
        middle, least, greatest = (_figure(scale * value[of]) for of in ("median", "min", "max"))
        return middle if least == greatest else f"{middle} ({least}-{greatest})"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _figure(value: float) -> str:
    """Counts as they are, percentages and times with one digit behind the point, what is small with two digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 1 or not value else f"{value:.2g}"


def quiet() -> None:
    """One thread, and no messages: of a run among others."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
