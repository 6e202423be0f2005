"""Every configuration of configs/split_japanese_vowels as shipped: accuracy and cost on series of different lengths.

python benchmarks/split_japanese_vowels.py [--quick] [--only CONFIGURATION]

With ``--only`` one configuration is run, and its row is put among those measured before; its seconds then belong to the
machine of that day.
"""

from __future__ import annotations

import argparse
import json

import harness
from split_digits_methods import CONFIGS, run

FIGURES = ("Class-IL", "Task-IL", "forgetting", "sparsity", "FLOPs of plain", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one configuration")
    args = harness.arguments(parser)
    folder = CONFIGS / "split_japanese_vowels"
    configs = [args.only] if args.only else sorted(path.stem for path in folder.glob("*.yaml"))
    seeds = [0] if args.quick else [0, 1, 2]
    jobs = [(f"{folder.name}/{config}", seed, 3 if args.quick else None, []) for config in configs for seed in seeds]
    results = iter(harness.run_all(run, jobs, args.processes))
    rows = []
    for config in configs:
        runs = [next(results) for _ in seeds]
        found = {key: [r[key] for r in runs if r[key] is not None] for key in FIGURES}
        rows.append({"configuration": config} | {k: harness.spread(v) if v else "-" for k, v in found.items()})
    harness.show("Split Japanese Vowels, in percent; seconds", rows, ["configuration", *FIGURES], ("seconds",))
    if args.only and not args.quick:
        before = json.loads((harness.RESULTS / "split_japanese_vowels.json").read_text())["rows"]
        kept = [row for row in before if row["configuration"] != args.only]
        rows = sorted([*kept, *rows], key=lambda row: row["configuration"])
    if not args.quick:
        harness.save("split_japanese_vowels", rows, seeds=seeds)


if __name__ == "__main__":
    main()
