"""Every method that gives tasks subnetworks, on Split Digits: Task-IL, and Class-IL by five rules of inference.

The configurations of configs/split_digits as shipped, three seeds. Each run is tested under each TaskInference: the
task of a sample is inferred by the largest logit, by the lowest entropy, and by the largest logit relative to those of
the task's own training samples; and, as in SupSup, by the gradient of the entropy of all subnetworks in superposition.

python benchmarks/isolation_digits.py [--quick]
Finished runs are kept in benchmarks/results/isolation_digits_runs.json; the same command goes on with the rest.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import harness

import lightning_sparse_cl as scl

CONFIGS = Path(__file__).parents[1] / "configs" / "split_digits"
METHODS = (
    "packnet", "lps", "wsn", "supsup", "piggyback", "cpg", "nispa", "continual_dst", "cl_lsg", "scratch",
    "finetune_copies",
)  # fmt: skip
RULES = {
    "largest logit": scl.LargestLogit, "entropy": scl.LowestEntropy, "calibrated": scl.CalibratedLogit,
    "entropy gradient": scl.EntropyGradient, "its binary search": partial(scl.EntropyGradient, "binary"),
}  # fmt: skip


def run(config: str, seed: int, batches: int | None) -> dict[str, Any]:
    """One run of the command line, in process."""
    from lightning_sparse_cl.__main__ import main

    with TemporaryDirectory() as folder:
        options = [f"--seed_everything={seed}", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
                   "--trainer.logger=false", f"--trainer.default_root_dir={folder}",
                   *([f"--trainer.limit_train_batches={batches}"] if batches else [])]  # fmt: skip
        cli = main(["fit", "-c", str(CONFIGS / f"{config}.yaml"), *options])
        report = next(c for c in cli.trainer.callbacks if isinstance(c, scl.RunReport))
        metrics = report.collect(cli.trainer, cli.model)
        kept = next(c for c in cli.trainer.callbacks if isinstance(c, scl.TaskSubnetworks))
        learnt, data, by_rule = scl.Subnetworks.of(cli.model.eval()), cli.datamodule, {}
        learnt.inference = scl.CalibratedLogit()
        for task, samples in enumerate(data.train_sets):
            learnt.calibrate(task, [data.prepare(samples.inputs, augment=False)])
        for name, rule in RULES.items():
            kept.inference = rule()
            by_rule[f"Class-IL, {name}"] = cli.trainer.test(cli.model, cli.datamodule, verbose=False)[0]["class_il/acc"]
    shared, flops = metrics["subnetworks"], metrics["flops"]
    bits = shared.get("mask_bits")
    return {"Task-IL": metrics["task_il"]["acc"]} | by_rule | {
        "used": shared["used"][-1],
        "mask bits": None if bits is None else bits["coded"] / bits["plain"],
        "of plain": flops["training"] / flops["dense"],
        "seconds": metrics["seconds"],
    }  # fmt: skip


def main() -> None:
    args = harness.arguments(__doc__)
    seeds, batches = ([0], 3) if args.quick else ([0, 1, 2], None)  # batches per epoch
    jobs = [(config, seed, batches) for seed in seeds for config in METHODS]
    run_all = harness.run_all if args.quick else partial(harness.run_kept, "isolation_digits")
    results = dict(zip(jobs, run_all(run, jobs, args.processes), strict=True))
    rows = []
    for config in METHODS:
        runs = [results[config, seed, batches] for seed in seeds]
        spreads = {k: harness.spread([r[k] for r in runs]) if runs[0][k] is not None else "-" for k in runs[0]}
        rows.append({"configuration": config} | spreads)
    harness.show("Split Digits, in percent; seconds", rows, list(rows[0]), ("seconds",))
    if not args.quick:
        harness.save("isolation_digits", rows, seeds=seeds)


if __name__ == "__main__":
    main()
