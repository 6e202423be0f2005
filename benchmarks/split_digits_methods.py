"""Every configuration of configs/split_digits as shipped: accuracy, forgetting and cost; and objectives under EsaCL.

python benchmarks/split_digits_methods.py [--quick]
Finished runs are kept in benchmarks/results/split_digits_methods_runs.json; the same command goes on with the rest.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import harness
import lightning.pytorch as pl
import torch

import lightning_sparse_cl as scl

CONFIGS = Path(__file__).parents[1] / "configs"
FIGURES = {"Class-IL": ("class_il", "acc"), "Task-IL": ("task_il", "acc"), "forgetting": ("class_il", "forgetting")}


OVERLAYS = CONFIGS / "objectives"
ESACL = "under EsaCL"
EFFICIENT = {
    "esacl, efficient": ["esacl/efficient"],
    "esacl, efficient, without_sp": ["esacl/efficient", "esacl/without_sp"],
    "esacl, efficient, joint_forward": ["esacl/efficient", "objectives/joint_forward"],
}
"""Rows of overlays on ``esacl``."""
COMPARED = {"derpp", "sparcl", "esacl", *EFFICIENT}
"""Rows with five seeds, which are compared with each other; the others have three."""


def kept(trainer: pl.Trainer, module: scl.ContinualModule) -> float:
    """kB that a method keeps beside its network: buffers of objective and update rule, and states of projections."""
    tensors = list(module.objective.buffers())
    tensors += list(module.update.buffers()) if isinstance(module.update, torch.nn.Module) else []
    for callback in trainer.callbacks:
        if isinstance(callback, scl.AGEM):
            tensors += list(callback.memory.buffers())
        if isinstance(callback, scl.GPM):
            tensors += list(callback.bases.values())
    return sum(t.numel() * t.element_size() for t in tensors) / 1e3


def run(config: str, seed: int, batches: int | None, overlays: list[str]) -> dict[str, Any]:
    """One run of the command line, in process; ``config`` is a configuration's name, such as ``split_digits/esacl``."""
    from lightning_sparse_cl.__main__ import main

    laid = [part for overlay in overlays for part in ("-c", str(CONFIGS / f"{overlay}.yaml"))]
    with TemporaryDirectory() as folder:
        cli = main(
            ["fit", "-c", str(CONFIGS / f"{config}.yaml"), *laid, f"--seed_everything={seed}",
             "--trainer.accelerator=cpu",
             "--trainer.enable_progress_bar=false", "--trainer.logger=false", f"--trainer.default_root_dir={folder}",
             *([f"--trainer.limit_train_batches={batches}"] if batches else [])]
        )  # fmt: skip
        report = next(c for c in cli.trainer.callbacks if isinstance(c, scl.RunReport))
        metrics = report.collect(cli.trainer, cli.model)
    figures = {title: metrics[scenario][key] for title, (scenario, key) in FIGURES.items()}
    passes = metrics["flops"]
    return figures | {
        "sparsity": metrics["sparsity"],
        "kept, kB": kept(cli.trainer, cli.model),
        "backward passes": passes["backward"] / passes["samples"],
        "FLOPs of plain": passes["training"] / passes["dense"],
        "TFLOPs": passes["training"] / 1e12,
        "TFLOPs as in the tables": passes["papers"] / 1e12,
        "seconds": metrics["seconds"],
    }


def main() -> None:
    args = harness.arguments(__doc__)
    configs = sorted(p.stem for p in (CONFIGS / "split_digits").glob("*.yaml"))
    batches = 1 if args.quick else None  # batches per epoch
    based = [c for c in configs if (OVERLAYS / f"{c}.yaml").exists()]
    of = {config: (config, []) for config in configs} | {row: ("esacl", laid) for row, laid in EFFICIENT.items()}
    seeds = {row: list(range(1 if args.quick else 5 if row in COMPARED else 3)) for row in of}
    jobs = [
        (f"split_digits/{config}", seed, batches, laid) for row, (config, laid) in of.items() for seed in seeds[row]
    ]
    jobs += [("split_digits/esacl", 0, batches, [f"objectives/{c}"]) for c in based]
    run_all = harness.run_all if args.quick else partial(harness.run_kept, "split_digits_methods")
    (*results,) = run_all(run, jobs, args.processes)
    under = dict(zip(based, (r["Class-IL"] for r in results[-len(based) :]), strict=True))
    refused = {"gpm": "refused", "lamaml": "another update"}
    results = iter(results)
    rows = []
    for config in of:
        runs = [next(results) for _ in seeds[config]]
        figures = {k: harness.spread([r[k] for r in runs]) for k in runs[0] if runs[0][k] is not None}
        pruned = {ESACL: under.get(config, refused.get(config, "-"))}
        rows.append({"configuration": config} | dict.fromkeys(runs[0], "-") | figures | pruned)
    harness.beside(rows, next(row for row in rows if row["configuration"] == "derpp"))
    title = "Split Digits, in percent; passes per sample served; TFLOPs; seconds"
    plain = ("backward passes", "seconds", "kept, kB", "TFLOPs", "TFLOPs as in the tables")
    harness.show(title, rows, list(rows[0]), plain)
    if not args.quick:
        harness.save("split_digits_methods", rows, seeds=seeds)


if __name__ == "__main__":
    main()
