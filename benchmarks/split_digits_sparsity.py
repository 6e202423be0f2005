"""Accuracy over sparsity on Split Digits, pruned in one shot at each task's end: EsaCL and its ablations.

python benchmarks/split_digits_sparsity.py [--quick]
"""

from __future__ import annotations

from functools import partial
from typing import Any

import harness
import lightning.pytorch as pl
from torch.optim import SGD

import lightning_sparse_cl as scl

SPARSITIES = [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98]
SGD_DERPP = partial(SGD, lr=0.03)  # the learning rate that DER++ publishes for its SGD
VARIANTS: dict[str, dict[str, Any]] = {
    "EsaCL": {},
    "without SP": {"optimizer": SGD_DERPP},
    "without SA": {"update": scl.SingleBackward()},
    "plain SGD": {"optimizer": SGD_DERPP, "update": scl.SingleBackward(), "selection": scl.LossSelection(1, 1)},
}


def run(variant: str, sparsity: float, seed: int, epochs: int) -> dict[str, Any]:
    """One sequence; ACC before and after the last pruning."""
    pl.seed_everything(seed, verbose=False)
    module = scl.EsaCL(scl.SmallCNN(32), scl.DERpp(200, 16, forward="joint"), sparsity=sparsity, **VARIANTS[variant])
    metrics = harness.fit(module, scl.SplitDigits(batch_size=16), epochs)
    return {
        "class_il": metrics["class_il"]["acc"],
        "class_il_before": metrics["class_il_before"]["acc"],
        "task_il": metrics["task_il"]["acc"],
        "cost": metrics["class_il_before"]["acc"] - metrics["class_il"]["acc"],
        "seconds": metrics["seconds"],
    }


def main() -> None:
    args = harness.arguments(__doc__)
    sparsities, seeds, epochs = ([0.8, 0.95], [0], 6) if args.quick else (SPARSITIES, [0, 1, 2], 20)
    cells = [(v, s) for v in VARIANTS for s in sparsities]
    results = iter(harness.run_all(run, [(v, s, seed, epochs) for v, s in cells for seed in seeds], args.processes))
    rows = []
    for variant, sparsity in cells:
        runs = [next(results) for _ in seeds]
        rows.append(
            {"variant": variant, "sparsity": sparsity} | {k: harness.spread([r[k] for r in runs]) for k in runs[0]}
        )
    harness.show(
        "Split Digits, ACC in percent", rows, ["variant", "sparsity", "class_il_before", "class_il", "task_il"]
    )
    if not args.quick:
        harness.save("split_digits_sparsity", rows, seeds=seeds, epochs_per_task=epochs)
        plot(rows)


def plot(rows: list[dict[str, Any]]) -> None:
    """ACC over sparsity, the median and the range over seeds."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharex=True)
    for axis, key, title in zip(axes, ("class_il", "task_il"), ("Class-IL", "Task-IL")):
        for variant in VARIANTS:
            own = [r for r in rows if r["variant"] == variant]
            x = range(len(own))
            (line,) = axis.plot(x, [100 * r[key]["median"] for r in own], "o-", ms=4, label=variant)
            low, high = ([100 * r[key][end] for r in own] for end in ("min", "max"))
            axis.fill_between(x, low, high, alpha=0.15, color=line.get_color())
        axis.set(
            title=f"{title} ACC after pruning, %",
            xlabel="sparsity of the pruned layers, % (not to scale)",
            ylim=(0, 102),
        )
        axis.set_xticks(range(len(SPARSITIES)), [f"{100 * s:g}" for s in SPARSITIES])
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(harness.RESULTS / "split_digits_sparsity.png", dpi=130)


if __name__ == "__main__":
    main()
