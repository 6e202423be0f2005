"""EsaCL on Split CIFAR-10 at a size for CPUs: its readings, what makes it efficient, and rivals at the same sparsity.

The preset of sparcl.py: five tasks of two classes, 400 images per class, halved to 16x16 pixels, ResNet-18 of width 16,
500 exemplars, batch 32, 10 epochs per task. Masked networks run by sparse kernels. All choices were made on seeds 100
to 102.

python benchmarks/esacl_cifar10.py [--quick] [--root FOLDER] [--finished]

FOLDER holds CIFAR-10 as torchvision downloads it, or as an image folder {train,test}/<class>/*. Finished runs are kept
in benchmarks/results/esacl_cifar10_runs.json; the same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import harness
import lightning.pytorch as pl
import sparcl
import torch
from torch.optim import SGD

import lightning_sparse_cl as scl

WIDTH, EPOCHS, PRUNED_AFTER = 16, 10, 2
PLAIN: dict[str, Any] = {"update": scl.SingleBackward(), "selection": scl.LossSelection(1, 1)}
"""Neither SAM nor selection."""
WITHOUT_SP: dict[str, Any] = {"optimizer": partial(SGD, lr=0.03)}
SMALL_STEPS: dict[str, Any] = {"optimizer": partial(scl.StochasticFrankWolfe, lr=0.001, k=None, momentum=0.9)}
PARTS: dict[str, dict[str, Any]] = {
    "pruning inside": {"prune_epoch": PRUNED_AFTER},
    "a part reopened": {"reopen": scl.Reopen("zero", 0.3)},
    "ascent without replay": {"update": scl.SharpnessAware(replays=False)},
    "replay selected": {"selection": scl.LossSelection(replay=0.4)},
}
SPARSE = PARTS["pruning inside"] | PARTS["a part reopened"]
HALF: dict[str, Any] = {"prune_epoch": 4, "reopen": scl.Reopen("zero")}


def without(part: str) -> dict[str, Any]:
    """All parts but one."""
    return {key: value for name, own in PARTS.items() if name != part for key, value in own.items()}


ESACL: dict[str, dict[str, Any]] = {
    "EsaCL": {},
    "EsaCL, share": {"freeze": "share"},
    "SFW, none": PLAIN,
    "SFW, share": PLAIN | {"freeze": "share"},
    "SFW, free": PLAIN | {"freeze": "free"},
    "efficient, large steps": PLAIN | SPARSE,
    "efficient": PLAIN | SPARSE | SMALL_STEPS,
    "efficient without SP": PLAIN | SPARSE | WITHOUT_SP,
    "half without SP": PLAIN | HALF | WITHOUT_SP,
    "efficient, large steps, with SAM": PLAIN | SPARSE | PARTS["ascent without replay"],
    "efficient, large steps, with SAM, rho 0.01": PLAIN | SPARSE | {"update": scl.SharpnessAware(0.01, replays=False)},
    "efficient without SP, with SAM, rho 0.01": PLAIN
    | SPARSE
    | WITHOUT_SP
    | {"update": scl.SharpnessAware(0.01, replays=False)},
    **{f"only {part}": own for part, own in PARTS.items()},
    **{f"all but {part}": without(part) for part in PARTS},
    "all four parts": without(""),
}
OTHERS: dict[str, Callable[[float], list[pl.Callback]]] = {
    "SparCL": lambda s: [sparcl.tdm(s), sparcl.ddr(), scl.DynamicGradientMasking(sparcl.Q.get(s, 0.05), interval=10)],
    "SNIP": lambda s: [scl.SNIP(s)],
    "RigL": lambda s: [scl.RigL(s, interval=20)],
}
ROWS = [
    ("DER++", 0.0), ("SparCL", 0.9), ("SNIP", 0.9), ("RigL", 0.9), ("efficient, large steps", 0.9), ("efficient", 0.9),
    ("efficient without SP", 0.9), ("half without SP", 0.9), ("EsaCL", 0.9), ("all four parts", 0.9),
    *((f"all but {part}", 0.9) for part in PARTS), ("SFW, share", 0.9), ("SparCL", 0.8),
    ("efficient, large steps", 0.8), ("efficient", 0.8), ("efficient without SP", 0.8), ("SFW, none", 0.9),
    ("EsaCL", 0.8),
    ("SFW, free", 0.9), *((f"only {part}", 0.9) for part in PARTS), ("SFW, share", 0.8), ("EsaCL, share", 0.9),
    ("efficient, large steps, with SAM, rho 0.01", 0.9), ("SFW, none", 0.8), ("SFW, free", 0.8),
    ("efficient without SP, with SAM, rho 0.01", 0.9), ("efficient, large steps, with SAM", 0.9),
    ("efficient", 0.6), ("efficient without SP", 0.6),
]  # fmt: skip


def module_of(row: str, sparsity: float, width: int = WIDTH) -> scl.ContinualModule:
    """ResNet-18 with DER++ and 500 exemplars under the row's method."""
    backbone, objective = scl.ResNet18(width), scl.DERpp(500, 32, forward="joint")
    if row in ESACL:
        module: scl.ContinualModule = scl.EsaCL(backbone, objective, sparsity, **copy.deepcopy(ESACL[row]))
    else:
        policies = OTHERS[row](sparsity) if row in OTHERS else []
        module = scl.ContinualModule(backbone, objective, optimizer=partial(SGD, lr=0.03), policies=policies)
    if row != "DER++":
        module.policies.append(scl.SparseAcceleration())
    return module


def figures(metrics: dict[str, Any]) -> dict[str, float]:
    """The figures of a run's report that the tables show."""
    flops = metrics["flops"]
    return {
        "Class-IL before": metrics["class_il_before"]["acc"],
        "Class-IL": metrics["class_il"]["acc"],
        "Task-IL": metrics["task_il"]["acc"],
        "TFLOPs": flops["training"] / 1e12,
        "TFLOPs as in the tables": flops["papers"] / 1e12,
        "of plain": flops["training"] / flops["dense"],
        "backward passes": flops["backward"] / flops["samples"],
        "used": 1 - metrics["sparsity"],
    }


def run(row: str, sparsity: float, seed: int, epochs: int, per_class: int, images: str) -> dict[str, Any]:
    """One sequence."""
    pl.seed_everything(seed, verbose=False)
    module, data = module_of(row, sparsity), harness.small_cifar10(*torch.load(images))
    return figures(harness.fit(module, data, epochs))


def draw(rows: list[dict[str, Any]]) -> None:
    """Accuracy over training FLOPs: median and range."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharex=True)
    for axis, key in zip(axes, ("Class-IL", "Task-IL")):
        for i, row in enumerate(rows):
            x, y = 100 * row["of DER++"]["median"], {k: 100 * v for k, v in row[key].items()}
            label = f"{row['method']}, {100 * row['sparsity']:g} %" if row["sparsity"] else row["method"]
            span = [[y["median"] - y["min"]], [y["max"] - y["median"]]]
            marker = "o^sDvP*X<>dhp"[i % 13]
            axis.errorbar(x, y["median"], span, fmt=marker, ms=5, capsize=2, elinewidth=0.8, label=label)
        axis.set(title=f"{key} accuracy, %", xlabel="training FLOPs, % of DER++", xscale="log")
        axis.set_xticks([10, 20, 50, 100, 200], ["10", "20", "50", "100", "200"])
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside right center", fontsize=7)
    figure.tight_layout(rect=(0, 0, 0.78, 1))
    figure.savefig(harness.RESULTS / "esacl_cifar10.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/cifar10-images")
    parser.add_argument("--finished", action="store_true", help="run nothing; save the rows whose runs are all kept")
    args = harness.arguments(parser)
    rows = ROWS
    seeds, epochs, per_class = ([0], 4, 48) if args.quick else (list(range(5)), EPOCHS, 400)
    if args.finished:
        done = harness.kept_runs("esacl_cifar10")
        rows = [r for r in ROWS if all(json.dumps([*r, seed, epochs, per_class]) in done for seed in seeds)]
    jobs = [(*row, seed, epochs, per_class) for row in rows for seed in seeds]
    run_all = harness.run_all if args.quick else partial(harness.run_kept, "esacl_cifar10")
    with TemporaryDirectory() as folder:
        images = f"{folder}/images.pt"
        torch.save(harness.halved(args.root, per_class, 100 if args.quick else 500), images)
        results = iter(run_all(partial(run, images=images), jobs, args.processes))
    table = []
    for row, sparsity in rows:
        runs = [next(results) for _ in seeds]
        spreads = {k: harness.spread([r[k] for r in runs]) for k in runs[0]}
        by_seed = {k: [round(r[k], 5) for r in runs] for k in ("Class-IL", "Task-IL")}  # for paired differences
        table.append({"method": row, "sparsity": sparsity} | spreads | {"by seed": by_seed})
    harness.beside(table, table[0])
    columns = ["method", "sparsity", "Class-IL before", "Class-IL", "Task-IL", "of DER++", "of plain", "used"]
    harness.show("Split CIFAR-10, in percent", table, columns)
    if not args.quick:
        missing = [f"{row}, {s:g}" for row, s in ROWS if (row, s) not in rows]
        draw([row for row in table if row["sparsity"] != 0.8])
        harness.save(
            "esacl_cifar10", table, seeds=seeds, epochs_per_task=epochs, images_per_class=per_class, missing=missing
        )


if __name__ == "__main__":
    main()
