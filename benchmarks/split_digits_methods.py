"""Every configuration of configs/split_digits as shipped: accuracy, forgetting and cost; objectives under EsaCL too.

python benchmarks/split_digits_methods.py [--quick]
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import harness
import lightning.pytorch as pl
import torch

import lightning_sparse_cl as scl

CONFIGS = Path(__file__).parents[1] / "configs" / "split_digits"
FIGURES = {"Class-IL": ("class_il", "acc"), "Task-IL": ("task_il", "acc"), "forgetting": ("class_il", "forgetting")}


OVERLAYS = CONFIGS.parent / "objectives"
ESACL = "under EsaCL"


def kept(trainer: pl.Trainer, module: scl.ContinualModule) -> float:
    """kB of what a method keeps beside its network: buffers of objective and update rule, and states of projections."""
    tensors = list(module.objective.buffers())
    tensors += list(module.update.buffers()) if isinstance(module.update, torch.nn.Module) else []
    for callback in trainer.callbacks:
        if isinstance(callback, scl.AGEM):
            tensors += list(callback.memory.buffers())
        if isinstance(callback, scl.GPM):
            tensors += list(callback.bases.values())
    return sum(t.numel() * t.element_size() for t in tensors) / 1e3


def run(config: str, seed: int, epochs: int | None, overlay: str | None = None) -> dict[str, Any]:
    """One run of the command line, in process."""
    from lightning_sparse_cl.__main__ import main

    laid = ["-c", str(OVERLAYS / f"{overlay}.yaml")] if overlay else []
    with TemporaryDirectory() as folder:
        cli = main(
            ["fit", "-c", str(CONFIGS / f"{config}.yaml"), *laid, f"--seed_everything={seed}",
             "--trainer.accelerator=cpu",
             "--trainer.enable_progress_bar=false", "--trainer.logger=false", f"--trainer.default_root_dir={folder}",
             *([f"--schedule.epochs={epochs}"] if epochs else [])]
        )  # fmt: skip
        report = next(c for c in cli.trainer.callbacks if isinstance(c, scl.RunReport))
        metrics = report.collect(cli.trainer, cli.model)
    figures = {title: metrics[scenario][key] for title, (scenario, key) in FIGURES.items()}
    passes = metrics["flops"]
    return figures | {
        "sparsity": metrics["sparsity"],
        "kept, kB": kept(cli.trainer, cli.model),
        "backward passes": passes["backward"] / passes["samples"],
        "FLOPs of dense": passes["training"] / passes["dense"],
        "seconds": metrics["seconds"],
    }


def main() -> None:
    args = harness.arguments(__doc__)
    configs = sorted(p.stem for p in CONFIGS.glob("*.yaml"))
    seeds, epochs = ([0], 2) if args.quick else ([0, 1, 2], None)
    based = [c for c in configs if (OVERLAYS / f"{c}.yaml").exists()]
    jobs = [*((c, s, epochs) for c in configs for s in seeds), *(("esacl", 0, epochs, c) for c in based)]
    (*results,) = harness.run_all(run, jobs, args.processes)
    under = dict(zip(based, (r["Class-IL"] for r in results[len(configs) * len(seeds) :]), strict=True))
    refused = {"gpm": "refused", "lamaml": "another update"}
    results = iter(results)
    rows = []
    for config in configs:
        runs = [next(results) for _ in seeds]
        figures = {k: harness.spread([r[k] for r in runs]) for k in runs[0] if runs[0][k] is not None}
        pruned = {ESACL: under.get(config, refused.get(config, "-"))}
        rows.append({"configuration": config} | dict.fromkeys(runs[0], "-") | figures | pruned)
    title = "Split Digits, in percent; passes per sample served; training FLOPs in percent of dense ones; seconds"
    harness.show(title, rows, list(rows[0]), plain=("backward passes", "seconds", "kept, kB"))
    if not args.quick:
        harness.save("split_digits_methods", rows, seeds=seeds)


if __name__ == "__main__":
    main()
