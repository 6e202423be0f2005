"""The choices that the EsaCL paper leaves open, measured side by side on Split Digits at 80 % and 95 % sparsity.

python benchmarks/esacl_choices.py [--quick]
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import harness
import lightning.pytorch as pl

import lightning_sparse_cl as scl


class EveryMatrix(scl.StochasticFrankWolfe):
    """Frank-Wolfe that also constrains the layers that are never pruned."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group | {"constrained": True})


SFW = scl.StochasticFrankWolfe
CHOICES: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "freeze: share": {"freeze": "share"},
    "freeze: free": {"freeze": "free"},
    "reopened weights at zero": {"reopen": scl.Reopen("zero")},
    "no selection": {"selection": scl.LossSelection(1, 1)},
    "sse .4, ere .4, no warm-up": {"selection": scl.LossSelection(0.4, 0.4, 0)},
    "momentum 0.9 (average)": {"optimizer": partial(SFW, k=None, momentum=0.9)},
    "unpruned layers constrained": {"optimizer": partial(EveryMatrix, k=None)},
    "separate forwards": {"forward": "separate"},
}
ALSO_AT_95 = ["as shipped", "freeze: share", "freeze: free", "momentum 0.9 (average)", "unpruned layers constrained"]


def run(choice: str, sparsity: float, seed: int, epochs: int) -> dict[str, Any]:
    """One sequence; ACC before and after the last pruning."""
    options = copy.deepcopy(CHOICES[choice])
    objective = scl.DERpp(200, 16, forward=options.pop("forward", "joint"))
    pl.seed_everything(seed, verbose=False)
    module = scl.EsaCL(scl.SmallCNN(32), objective, sparsity=sparsity, **options)
    metrics = harness.fit(module, scl.SplitDigits(batch_size=16), epochs)
    return {
        "class_il_before": metrics["class_il_before"]["acc"],
        "class_il": metrics["class_il"]["acc"],
        "task_il": metrics["task_il"]["acc"],
        "used": 1 - metrics["sparsity"],
        "seconds": metrics["seconds"],
    }


def main() -> None:
    args = harness.arguments(__doc__)
    sparsities, seeds, epochs = ([0.8], [0], 3) if args.quick else ([0.8, 0.95], [0, 1, 2], 20)
    cells = [(c, s) for s in sparsities for c in CHOICES if s == 0.8 or c in ALSO_AT_95]
    results = iter(harness.run_all(run, [(c, s, seed, epochs) for c, s in cells for seed in seeds], args.processes))
    rows = []
    for choice, sparsity in cells:
        runs = [next(results) for _ in seeds]
        rows.append(
            {"choice": choice, "sparsity": sparsity} | {k: harness.spread([r[k] for r in runs]) for k in runs[0]}
        )
    columns = ["choice", "sparsity", "class_il_before", "class_il", "task_il", "used"]
    harness.show("Split Digits, in percent", rows, columns)
    if not args.quick:
        harness.save("esacl_choices", rows, seeds=seeds, epochs_per_task=epochs)


if __name__ == "__main__":
    main()
