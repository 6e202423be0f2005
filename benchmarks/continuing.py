"""Three tasks and, later, two whose classes were unknown, against five tasks known from the beginning: Split Digits.

Every configuration of configs/split_digits as shipped. python benchmarks/continuing.py [--quick]
Finished runs are kept in benchmarks/results/continuing_runs.json; the same command goes on with what is missing.
"""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import harness
import torch

CONFIGS = Path(__file__).parents[1] / "configs" / "split_digits"
FIRST, LATER, ALL = "[[0,1],[2,3],[4,5]]", "[[6,7],[8,9]]", "[[0,1],[2,3],[4,5],[6,7],[8,9]]"
REFUSED = {"joint"}
"""Configurations that cannot go on."""
SCENARIOS = {"Class-IL": "class_il", "Task-IL": "task_il"}


def run(config: str, seed: int, epochs: int | None) -> dict[str, Any]:
    """Accuracies after five tasks, all at once and continued, and whether both end with the same weights."""
    from lightning_sparse_cl.__main__ import main

    with TemporaryDirectory() as root, redirect_stdout(StringIO()):

        def fit(name: str, tasks: str, *more: str) -> Path:
            folder = Path(root, name)
            main(
                ["fit", "-c", str(CONFIGS / f"{config}.yaml"), f"--seed_everything={seed}", "--trainer.accelerator=cpu",
                 "--trainer.enable_progress_bar=false", "--trainer.logger=false", f"--checkpoint.dirpath={folder}",
                 f"--trainer.default_root_dir={folder}", "--data.init_args.num_tasks=null",
                 f"--data.init_args.tasks={tasks}", *([f"--schedule.epochs={epochs}"] if epochs else []), *more]
            )  # fmt: skip
            return folder

        whole = fit("whole", ALL)
        first = fit("first", FIRST)
        # With all data, so that all five tasks are tested; learnt tasks are not learnt again.
        later = fit("later", ALL, f"--continue_from={first / 'last.ckpt'}")
        found: dict[str, Any] = {}
        for name, folder in (("at once", whole), ("continued", later)):
            metrics = json.loads((folder / "metrics.json").read_text())
            found |= {f"{title}, {name}": metrics[scenario]["acc"] for title, scenario in SCENARIOS.items()}
        a, b = (torch.load(folder / "last.ckpt")["state_dict"] for folder in (whole, later))
        found["same"] = all(torch.equal(a[k], b[k]) for k in a if torch.is_tensor(a[k]))
    return found


def main() -> None:
    args = harness.arguments(__doc__.splitlines()[0])
    configs = sorted(p.stem for p in CONFIGS.glob("*.yaml") if p.stem not in REFUSED)
    seeds, epochs = ([0], 2) if args.quick else ([0, 1, 2], None)
    if args.quick:
        configs = ["continual_dst", "derpp", "er", "esacl", "ewc"]
    run_all = harness.run_all if args.quick else partial(harness.run_kept, "continuing")
    results = iter(run_all(run, [(c, s, epochs) for c in configs for s in seeds], args.processes))
    rows = []
    for config in configs:
        runs = [next(results) for _ in seeds]
        row: dict[str, Any] = {"configuration": config}
        for title in SCENARIOS:
            at_once, continued = ([r[f"{title}, {name}"] for r in runs] for name in ("at once", "continued"))
            row |= {f"{title}, at once": harness.spread(at_once), f"{title}, continued": harness.spread(continued)}
            within = max(min(at_once), min(continued)) <= min(max(at_once), max(continued))
            row[f"{title}, ranges meet"] = "yes" if within else "no"
        row["same weights"] = f"{sum(r['same'] for r in runs)} of {len(runs)}"
        rows.append(row)
    harness.show("Split Digits, accuracy after five tasks in percent: median (range) over seeds", rows, list(rows[0]))
    if not args.quick:
        harness.save("continuing", rows, seeds=seeds)


if __name__ == "__main__":
    main()
