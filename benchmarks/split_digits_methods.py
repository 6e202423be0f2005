"""Every configuration of configs/split_digits as shipped: accuracy, forgetting and cost.

python benchmarks/split_digits_methods.py [--quick]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import harness

CONFIGS = Path(__file__).parents[1] / "configs" / "split_digits"
FIGURES = {"Class-IL": ("class_il", "acc"), "Task-IL": ("task_il", "acc"), "forgetting": ("class_il", "forgetting")}


def run(config: str, seed: int, epochs: int | None) -> dict[str, Any]:
    """One run of the command line, in process."""
    from tempfile import TemporaryDirectory

    from lightning_sparse_cl import RunReport
    from lightning_sparse_cl.__main__ import main

    with TemporaryDirectory() as folder:
        cli = main(
            ["fit", "-c", str(CONFIGS / f"{config}.yaml"), f"--seed_everything={seed}", "--trainer.accelerator=cpu",
             "--trainer.enable_progress_bar=false", "--trainer.logger=false", f"--trainer.default_root_dir={folder}",
             *([f"--schedule.epochs={epochs}"] if epochs else [])]
        )  # fmt: skip
        report = next(c for c in cli.trainer.callbacks if isinstance(c, RunReport))
        metrics = report.collect(cli.trainer, cli.model)
    figures = {title: metrics[scenario][key] for title, (scenario, key) in FIGURES.items()}
    passes = metrics["flops"]
    return figures | {
        "sparsity": metrics["sparsity"],
        "backward passes": passes["backward"] / passes["samples"],
        "FLOPs of dense": passes["training"] / passes["dense"],
        "seconds": metrics["seconds"],
    }


def main() -> None:
    args = harness.arguments(__doc__)
    configs = sorted(p.stem for p in CONFIGS.glob("*.yaml"))
    seeds, epochs = ([0], 2) if args.quick else ([0, 1, 2], None)
    results = iter(harness.run_all(run, [(c, s, epochs) for c in configs for s in seeds], args.processes))
    rows = []
    for config in configs:
        runs = [next(results) for _ in seeds]
        figures = {k: harness.spread([r[k] for r in runs]) for k in runs[0] if runs[0][k] is not None}
        rows.append({"configuration": config} | dict.fromkeys(runs[0], "-") | figures)
    title = "Split Digits, in percent; passes per sample served; training FLOPs in percent of dense ones; seconds"
    harness.show(title, rows, list(rows[0]), plain=("backward passes", "seconds"))
    if not args.quick:
        harness.save("split_digits_methods", rows, seeds=seeds)


if __name__ == "__main__":
    main()
