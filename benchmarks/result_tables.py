"""Writes the tables of README and docs from benchmarks/results/*.json: python benchmarks/result_tables.py

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``. ``<!-- table: NAME of A|B* -->`` has those rows
only whose first cell is A or begins with B.
"""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))

COLUMNS = {
    "split_digits_sparsity": {
        "variant": "", "class_il": "Class-IL", "cost": "cost of pruning", "task_il": "Task-IL",
    },
    "papers": {"method": "method", "paper": "paper", "file": "file"},
    "methods": {"method": "method", "paper": "paper", "file": "file"},
    "objectives": {
        "method": "", "Class-IL": "Class-IL ACC", "forgetting": "forgetting", "Task-IL": "Task-IL ACC",
        "Task-IL forgetting": "forgetting", "TFLOPs": "TFLOPs", "ms a step": "ms a step",
        "of fine-tuning": "of fine-tuning's",
    },
    "split_digits_methods": {
        "configuration": "configuration", "scenario": "made for", "Class-IL": "Class-IL ACC", "Task-IL": "Task-IL ACC",
        "forgetting": "forgetting", "sparsity": "sparsity", "FLOPs of plain": "training FLOPs, % of plain training",
    },
    "split_digits_costs": {
        "configuration": "configuration", "kept": "kept, kB", "backward passes": "backward passes per sample",
        "of DER++": "FLOPs, % of DER++", "of DER++ as in the tables": "as the papers count", "seconds": "seconds",
        "pruned": "Class-IL under EsaCL",
    },
    "split_japanese_vowels": {
        "configuration": "", "Class-IL": "Class-IL ACC", "Task-IL": "Task-IL ACC", "forgetting": "forgetting",
        "sparsity": "sparsity", "FLOPs of plain": "training FLOPs, % of plain training", "seconds": "seconds",
    },
    "one_shot_pruning": {
        "variant": "", "before": "dense", "keep 40 %": "keep 40 %", "keep 20 %": "20 %", "keep 10 %": "10 %",
        "keep 5 %": "5 %",
    },
    "esacl_cifar10": {
        "method": "", "sparsity": "sparsity", "Class-IL before": "Class-IL before pruning", "Class-IL": "Class-IL",
        "Task-IL": "Task-IL", "of DER++": "FLOPs, % of DER++", "of DER++ as in the tables": "as the papers count",
        "backward passes": "backward passes per sample", "used": "weights in use",
    },
    "esacl_differences": {
        "method": "", "other": "beside", "0.9": "Class-IL at 90 %", "0.8": "at 80 %", "0.6": "at 60 %",
        "Task-IL": "Task-IL at 90 %",
    },
    "esacl_tiny_imagenet": {
        "method": "", "sparsity": "sparsity", "Class-IL": "Class-IL", "Class-IL to DER++": "beside DER++",
        "Class-IL to SparCL": "beside SparCL", "Task-IL": "Task-IL", "Task-IL to DER++": "beside DER++",
        "Task-IL to SparCL": "beside SparCL", "of DER++": "FLOPs, % of DER++", "used": "weights in use",
    },
    "esacl_steps": {
        "method": "", "epochs": "epochs per task", "Class-IL": "Class-IL", "Class-IL to DER++": "beside DER++",
        "Task-IL": "Task-IL", "Task-IL to DER++": "beside DER++", "of plain": "FLOPs, % of plain training",
    },
    "esacl_seconds": {
        "method": "", "seed": "seed", "DER++, s": "DER++, s", "EsaCL, s": "EsaCL with kernels, s",
        "seconds of DER++": "seconds of DER++", "FLOPs of DER++": "FLOPs of DER++",
    },
    "esacl_choices": {
        "choice": "", "sparsity": "sparsity", "class_il_before": "Class-IL before", "class_il": "Class-IL after",
        "task_il": "Task-IL after", "used": "weights in use",
    },
    "sparcl": {
        "method": "", "sparsity": "sparsity", "Class-IL": "Class-IL ACC", "Task-IL": "Task-IL ACC",
        "of plain": "FLOPs, % of plain training", "seconds": "seconds",
    },
    "sparcl_costs": {
        "method": "", "sparsity": "sparsity", "FLOPs": "TFLOPs", "to find masks": "to find masks, %",
        "FLOPs as in the tables": "TFLOPs as the papers count", "closed formula": "closed formula",
        "footprint, MB": "footprint, MB",
    },
    "block_masks": {
        "data": "", "method": "method", "sparsity": "sparsity", "block": "block", "Class-IL": "Class-IL ACC",
        "Class-IL to 1x1": "to single weights, points", "Task-IL": "Task-IL ACC",
        "Task-IL to 1x1": "to single weights, points",
    },
    "sparcl_diagnoses": {
        "method": "", "Class-IL": "Class-IL ACC", "Class-IL to TDM": "to TDM, points", "Task-IL": "Task-IL ACC",
        "Task-IL to TDM": "to TDM, points",
    },
    "sparcl_diagnoses_pairs": {"rows": "", "Class-IL": "Class-IL, points", "Task-IL": "Task-IL, points"},
    "training_memory": {
        "way": "", "sparsity": "sparsity", "batch": "batch", "process": "process, MB",
        "what is trained": "what is trained", "optimiser": "optimiser", "gradients": "gradients", "lists": "lists",
        "saved for backward": "saved for backward",
    },
    "replay_forward": {
        "objective": "", "forward": "forward", "Class-IL": "Class-IL ACC", "Task-IL": "Task-IL ACC",
        "Class-IL, joint - separate": "joint - separate, Class-IL", "Task-IL, joint - separate": "and Task-IL",
    },
    "isolation_digits": {
        "configuration": "", "Task-IL": "Task-IL ACC", "used": "weights in use, %",
        "mask bits": "bits of a mask, % of a bit per weight", "of plain": "training FLOPs, % of plain training",
        "seconds": "seconds",
    },
    "isolation_digits_rules": {
        "configuration": "", "Class-IL, largest logit": "largest logit", "Class-IL, entropy": "lowest entropy",
        "Class-IL, calibrated": "calibrated", "Class-IL, entropy gradient": "gradient of the entropy",
        "Class-IL, its binary search": "its binary search",
    },
    "isolation": {
        "method": "", "Task-IL": "Task-IL ACC", "Task-IL to Scratch": "beside Scratch", "Class-IL": "Class-IL ACC",
        "used": "weights in use, %", "mask bits": "bits of a mask, % of a bit per weight",
        "of plain": "training FLOPs, % of plain training",
    },
    "continual_dst": {
        "sparsity": "sparsity", "init": "start", "growth": "growth", "ACC": "ACC", "first half": "tasks 1 to 5",
        "second half": "tasks 6 to 10", "used": "backbone used, %", "free in the last mask": "free in the last mask, %",
        "saturated at task": "saturated at task", "of plain": "training FLOPs, % of plain training",
    },
    "continual_dst_findings": {
        "finding": "finding", "verdict": "verdict", "difference": "paired difference, points (95 % interval)",
    },
    "cl_lsg": {
        "method": "", "ACC": "Task-IL ACC", "held out": "on held-out images", "allocated": "allocated",
        "used in networks": "used", "tasks that grew": "tasks that grew", "seconds": "seconds",
    },
    "cl_lsg_against_grow": {
        "claim": "", "accuracy": "Task-IL ACC (95 % interval)", "size": "size, networks",
        "verdict": "more accurate at equal size",
    },
    "cl_lsg_tasks": {"method": ""} | {str(t): str(t) for t in range(1, 11)},
    "sparse_speed": {
        "what": "", "batch": "batch", "threads": "threads", "dense": "dense, ms", "0": "nothing pruned", "0.75": "75 %",
        "0.9": "90 %", "0.95": "95 %",
    },
    "sparse_speed_layers": {"layer": "layer", "0": "dense", "0.75": "75 %", "0.9": "90 %", "0.95": "95 %"},
    "sparse_training": {
        "seed": "seed", "dense s": "masked dense, s", "kernels s": "kernels, s", "ratio": "ratio",
        "dense ACC": "ACC masked dense, Class-IL / Task-IL", "kernels ACC": "ACC kernels",
    },
    "sparse_training_esacl": {
        "sparsity": "sparsity", "batch": "batch", "dense_ms": "dense, ms", "sparse_ms": "kernels, ms",
        "speedup": "ratio",
    },
    "overhead": {
        "network": "", "method": "method", "ms a step": "ms a step", "bare loop, ms": "bare loop, ms", "ratio": "ratio",
    },
    "long_sequences": {
        "tasks": "tasks", "training": "training, ms", "evaluation before": "evaluation before, ms",
        "evaluation": "evaluation, ms", "checkpoint": "checkpoint, ms", "MB": "MB",
    },
    "continuing": {
        "configuration": "", "Class-IL, at once": "Class-IL, at once", "Class-IL, continued": "continued",
        "Task-IL, at once": "Task-IL, at once", "Task-IL, continued": "continued", "same weights": "same weights",
    },
    "tokens": {
        "layer": "", "sparsity": "sparsity", "dense, inference": "inference: dense, ms",
        "kernels, inference": "kernels, ms", "faster, inference": "ratio", "dense, training": "training: dense, ms",
        "kernels, training": "kernels, ms", "faster, training": "ratio",
    },
    "vit": {
        "backbone": "", "method": "method", "ms a step": "ms a step", "TFLOPs": "TFLOPs", "weights": "weights pruned",
        "alive": "alive", "dense weights": "dense",
    },
    "deploy": {
        "network": "", "batch": "batch", "threads": "threads", "flat": "one call, ms",
        "onnxruntime": "ONNX Runtime, ms (times)", "kernels": "kernels in PyTorch, ms",
        "dense": "dense PyTorch, ms (times)",
        "0.75": "at 75 %, ms", "0.95": "at 95 %, ms",
    },
    "ways_to_run": {
        "way": "", "file": "file, kB", "accuracy": "accuracy, %", "peak": "peak, MB", "own": "own, MB",
        "one": "one image, ms", "many": "32 images, ms",
    },
    "runtime_sizes": {"compiled": "", "kB": "kB"},
    "narrow_values": {"data": "", "values": "values", "accuracy": "accuracy", "points lost": "points lost", "kB": "kB"},
    "overhead_choices": {
        "network": "", "ms a step": "ms a step", "without channels_last": "without channels_last",
        "compiled": "compiled",
    },
}  # fmt: skip
ROWS = {"split_digits_sparsity": lambda row: row["sparsity"] == 0.8}
PLAIN = {"backward passes": 1, "seconds": 1, "footprint, MB": 2, "saturated at task": 1, "tasks that grew": 0}
PLAIN |= {"points lost": 1, "kB": 1, "TFLOPs": 2, "allocated": 2, "used in networks": 2}
PLAIN |= dict.fromkeys((f"{name}, {kind}" for name in ("dense", "kernels") for kind in ("inference", "training")), 1)
PLAIN |= {"faster, inference": 2, "faster, training": 2, "ms a step": 0, "weights": 0, "alive": 0, "dense weights": 0}
PLAIN |= dict.fromkeys(("FLOPs", "FLOPs as in the tables", "closed formula"), 3)
PLAIN |= dict.fromkeys(("process", "what is trained", "optimiser", "gradients", "lists", "saved for backward"), 0)


def findings(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each finding of the paper, with what bears on it."""
    return [{"finding": name} | found for name, found in result["findings"].items()]


PAIRS = (
    ("efficient, large steps", "EsaCL"), ("efficient, large steps", "all but replay selected"),
    ("efficient, large steps", "DER++"), ("efficient, large steps", "SparCL"),
    ("efficient", "efficient, large steps"), ("efficient", "EsaCL"), ("efficient", "SparCL"), ("efficient", "DER++"),
    ("efficient without SP", "efficient, large steps"), ("efficient without SP", "SparCL"),
    ("efficient without SP", "RigL"), ("efficient without SP", "DER++"), ("SFW, share", "EsaCL"),
    ("SFW, share", "DER++"), ("SFW, share", "SFW, none"), ("SFW, free", "SFW, none"), ("SFW, free", "SparCL"),
    ("EsaCL, share", "EsaCL"), ("efficient, large steps, with SAM, rho 0.01", "efficient, large steps"),
    ("efficient, large steps, with SAM", "efficient, large steps"),
    ("efficient without SP, with SAM, rho 0.01", "efficient without SP"),
    ("all four parts", "all but replay selected"), ("only replay selected", "EsaCL"),
    ("only pruning inside", "EsaCL"), ("only a part reopened", "EsaCL"), ("only ascent without replay", "EsaCL"),
)  # fmt: skip
"""Rows of esacl_cifar10 that are compared with each other."""


def differences(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each pair of methods, with the paired differences at each sparsity that both were run at."""
    from harness import paired

    runs = {(row["method"], row["sparsity"]): row["by seed"] for row in result["rows"]}
    rows = []
    for method, other in PAIRS:
        row: dict[str, Any] = {"method": method, "other": other, "Task-IL": "-"}
        for sparsity in (0.9, 0.8, 0.6):
            own, its = runs.get((method, sparsity)), runs.get((other, 0.0 if other == "DER++" else sparsity))
            both = own is not None and its is not None
            row[str(sparsity)] = paired(own["Class-IL"], its["Class-IL"]) if both else "-"
            if both and sparsity == 0.9:
                row["Task-IL"] = paired(own["Task-IL"], its["Task-IL"])
        rows.append(row)
    return rows


def by_task(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Two rows a method: accuracy in percent on each task, and size after it in whole networks."""
    rows = []
    for row in result["rows"]:
        accuracy, size = row["accuracy of each task"], row["size after each task"]
        rows.append({"method": row["method"]} | {str(i + 1): f"{100 * a:.1f}" for i, a in enumerate(accuracy)})
        rows.append({"method": "size"} | {str(i + 1): f"{s:.2f}x" for i, s in enumerate(size)})
    return rows


PAPERS = {
    "EsaCL": ("Ren & Honavar, 2024", "methods/esacl.py", "esacl"),
    "SparCL": ("Wang et al., 2022", "methods/sparcl.py", "sparcl"),
    "Continual DST": ("Yildirim et al., 2024", "methods/continual_dst.py", "continual_dst"),
    "CL-LSG": ("Yang et al., 2022", "methods/cl_lsg.py", "cl_lsg"),
    "PackNet": ("Mallya & Lazebnik, 2018", "methods/packnet.py", "packnet"),
    "LPS": ("Wang et al., 2020", "methods/lps.py", "lps"),
    "CPG": ("Hung et al., 2019", "methods/cpg.py", "cpg"),
    "NISPA": ("Gurbuz & Dovrolis, 2022", "methods/nispa.py", "nispa"),
    "WSN": ("Kang et al., 2022", "methods/wsn.py", "wsn"),
    "SupSup, ExSSNeT": ("Wortsman et al., 2020; Yadav & Bansal, 2023", "methods/supsup.py", "supsup"),
    "Piggyback": ("Mallya et al., 2018", "methods/piggyback.py", "piggyback"),
    "ER": ("Chaudhry et al., 2019", "objectives/replay.py", "replay"),
    "DER, DER++": ("Buzzega et al., 2020", "objectives/replay.py", "replay"),
    "FDR": ("Benjamin et al., 2019", "objectives/fdr.py", "fdr"),
    "online EWC": ("Kirkpatrick et al., 2017; Schwarz et al., 2018", "objectives/ewc.py", "ewc"),
    "LwF": ("Li & Hoiem, 2016", "objectives/lwf.py", "lwf"),
    "iCaRL": ("Rebuffi et al., 2017", "objectives/icarl.py", "icarl"),
    "Co2L": ("Cha et al., 2021", "objectives/co2l.py", "co2l"),
    "A-GEM": ("Chaudhry et al., 2019", "callbacks/agem.py", "agem"),
    "GPM": ("Saha et al., 2021", "callbacks/gpm.py", "gpm"),
    "La-MAML": ("Gupta et al., 2020", "optim/la_maml.py", "lamaml"),
    "SNIP": ("Lee et al., 2019", "callbacks/snip.py", "snip"),
    "SET, RigL": ("Mocanu et al., 2018; Evci et al., 2020", "callbacks/drop_grow.py", "drop_grow"),
    "SNFS": ("Dettmers & Zettlemoyer, 2019", "callbacks/growth_rules.py", "drop_grow"),
}
"""Each method with its paper, its file in the package and its page in docs/methods."""

SCENARIOS = {
    "finetune": "both", "joint": "both", "scratch": "Task-IL", "finetune_copies": "Task-IL", "esacl": "both",
    "esacl, efficient": "both", "esacl, efficient, without_sp": "both", "esacl, efficient, joint_forward": "both",
    "sparcl": "both", "continual_dst": "Task-IL", "cl_lsg": "Task-IL", "packnet": "Task-IL", "lps": "Task-IL",
    "cpg": "Task-IL", "nispa": "Task-IL", "wsn": "Task-IL", "supsup": "Task-IL", "piggyback": "Task-IL",
    "er": "both", "der": "both", "derpp": "both", "fdr": "both", "ewc": "Task-IL", "lwf": "Task-IL",
    "icarl": "Class-IL", "co2l": "both", "agem": "Task-IL", "gpm": "Task-IL", "lamaml": "both",
    "snip_derpp": "both", "rigl_derpp": "both",
}  # fmt: skip
"""The scenario that a configuration of configs/split_digits was made for; the order of the rows."""


def papers(pages: str, package: str) -> list[dict[str, Any]]:
    """A row for each method, with links to its page and its file; nothing in it is measured."""
    return [
        {"method": f"[{name}]({pages}{page}.md)", "paper": paper, "file": f"[{file}]({package}/{file})"}
        for name, (paper, file, page) in PAPERS.items()
    ]


LINKS = {"papers": ("docs/methods/", "lightning_sparse_cl"), "methods": ("", "../../lightning_sparse_cl")}
"""Tables of the papers, in README.md and in docs/methods, and where their links lead."""


def digits(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each configuration, in the order of SCENARIOS."""
    measured = {row["configuration"]: row for row in result["rows"]}
    rows = []
    for configuration, scenario in SCENARIOS.items():
        row = measured[configuration]
        kept, pruned = row["kept, kB"]["median"], row["under EsaCL"]
        pruned = f"{100 * pruned:.1f}" if isinstance(pruned, float) else pruned
        rows.append(row | {"scenario": scenario, "kept": f"{kept:.0f}", "pruned": pruned})
    return rows


def speeds(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each way to run: the dense time, and how many times faster each sparsity is."""
    rows: dict[tuple, dict[str, Any]] = {}
    for row in result["rows"]:
        what = {"train": "training step", "inference": "inference"}[row["mode"]]
        own = rows.setdefault(
            (row["mode"], row["batch"], row["threads"]),
            {"what": what, "batch": row["batch"], "threads": row["threads"], "dense": f"{row['dense_ms']:.1f}"},
        )
        own[f"{row['sparsity']:g}"] = f"{row['speedup']:.1f}"
        if row["bf16_ms"] is not None:
            half = {"what": f"{what}, bf16", "batch": row["batch"], "threads": row["threads"]}
            half |= dict.fromkeys(("0", "0.75", "0.9", "0.95"), "")
            half = rows.setdefault(
                (row["mode"], row["batch"], row["threads"], "bf16"), half | {"dense": f"{row['bf16_ms']:.1f}"}
            )
            if row.get("speedup under bf16") is not None:
                half[f"{row['sparsity']:g}"] = f"{row['speedup under bf16']:.1f}"
    return list(rows.values())


def layers(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each kind of layer: the part of the FMA peak, forward / input gradient / weight gradient."""
    rows: dict[str, dict[str, Any]] = {}
    for row in result["fractions"]:
        own = rows.setdefault(row["layer"], {"layer": row["layer"], "0": "", "0.75": "", "0.9": "", "0.95": ""})
        passes = (row[p] for p in ("forward", "input gradient", "weight gradient"))
        own[f"{row['sparsity']:g}"] = " / ".join(f"{100 * p:.0f}" for p in passes)
    return list(rows.values())


def sequences(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a seed, dense and accelerated beside each other."""
    rows = []
    for dense, fast in zip(result["rows"][::2], result["rows"][1::2], strict=True):
        row = {"seed": dense["seed"], "ratio": f"{fast['speedup']:.2f}"}
        for name, run in (("dense", dense), ("kernels", fast)):
            row[f"{name} s"] = f"{run['seconds']:.0f}"
            row[f"{name} ACC"] = f"{100 * run['class_il']:.1f} / {100 * run['task_il']:.1f}"
        rows.append(row)
    return rows


def long_sequences(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for ten tasks, in ms per task, with the evaluation of the code before beside that of today."""
    by_code = {code: [r for r in result["rows"] if r["code"] == code] for code in ("before", "now")}
    return [
        {k: f"{v['median']:.0f}" if isinstance(v, dict) else v for k, v in now.items()}
        | {"evaluation before": f"{before['evaluation']['median']:.0f}"}
        for before, now in zip(by_code["before"], by_code["now"], strict=True)
    ]


def inference(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each network, batch and number of threads at 90 %, with how many times faster one call is."""
    rows = []
    for row in (r for r in result["rows"] if r["sparsity"] == 0.9):
        others = {
            r["sparsity"]: r for r in result["rows"] if all(r[k] == row[k] for k in ("network", "batch", "threads"))
        }
        own = {k: row[k] for k in ("network", "batch", "threads")}
        own |= {"flat": _ms(row["flat_ms"]), "kernels": _ms(row["kernels_ms"])}
        own |= {k: f"{_ms(row[f'{k}_ms'])} ({row[f'flat to {k}']:.1f})" for k in ("onnxruntime", "dense")}
        rows.append(own | {f"{s:g}": _ms(r["flat_ms"]) for s, r in others.items()})
    return rows


def ways(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each way to run a network."""
    rows = []
    for row in (r for r in result["rows"] if "note" not in r):
        own = {"way": row["way"], "file": f"{row['bytes'] / 1000:.1f}", "accuracy": f"{100 * row['accuracy']:.1f}"}
        own |= {"peak": f"{row['peak_mb']:.0f}", "own": f"{row['own_mb']:.1f}"}
        for column, times in (("one", row["batch_1_ms"]), ("many", row["batch_32_ms"])):
            own[column] = f"{times['median']:.3g} ({times['p90']:.3g})"
        rows.append(own)
    return rows


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.1f}"


def against_grow(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each part of CL-LSG beside Grow; sizes are in whole networks."""
    rows = []
    for row in result["against_grow"]:
        mean, low, high = (row["size"][key] for key in ("mean", "low", "high"))
        rows.append(row | {"size": f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"})
    return rows


DERIVED = {
    "ways_to_run": ("ways_to_run", ways),
    "runtime_sizes": ("ways_to_run", lambda result: result["sizes"]),
    "deploy": ("deploy", inference),
    "long_sequences": ("long_sequences", long_sequences),
    "sparse_speed": ("sparse_speed", speeds),
    "sparse_speed_layers": ("sparse_speed", layers),
    "sparse_training": ("sparse_training", sequences),
    "sparse_training_esacl": ("sparse_training", lambda result: result["esacl"]),
    "split_digits_methods": ("split_digits_methods", digits),
    "split_digits_costs": ("split_digits_methods", digits),
    "sparcl_costs": ("sparcl", lambda result: result["rows"]),
    "isolation_digits_rules": ("isolation_digits", lambda result: result["rows"]),
    "esacl_differences": ("esacl_cifar10", differences),
    "continual_dst_findings": ("continual_dst", findings),
    "sparcl_diagnoses_pairs": ("sparcl_diagnoses", lambda result: result["pairs"]),
    "cl_lsg_tasks": ("cl_lsg", by_task),
    "cl_lsg_against_grow": ("cl_lsg", against_grow),
}
"""Tables that are made from a result file of another name, and how."""


def cell(column: str, value: Any) -> str:
    """A median with its range, in percent where it is a fraction."""
    if not isinstance(value, dict):
        return f"{100 * value:g} %" if column == "sparsity" else str(value)
    if "mean" in value:
        return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * value[of] for of in ("mean", "low", "high")))
    scale, digits = (1, PLAIN[column]) if column in PLAIN else (100, 1)
    median, low, high = (f"{scale * value[k]:.{digits}f}" for k in ("median", "min", "max"))
    return median if low == high else f"{median} ({low} to {high})"


def table(name: str, only: str | None = None) -> str:
    """The markdown table of one result file; of all rows, or of those whose first cell is like ``only``."""
    if name in LINKS:
        rows = papers(*LINKS[name])
    else:
        file, rows_of = DERIVED.get(name, (name, lambda result: result["rows"]))
        rows = rows_of(json.loads((ROOT / "benchmarks" / "results" / f"{file}.json").read_text()))
    columns = COLUMNS[name]
    cells = [[cell(c, r[c]) for c in columns] for r in filter(ROWS.get(name), rows)]
    if only is not None:
        cells = [row for row in cells if any(fnmatchcase(row[0], pattern) for pattern in only.split("|"))]
        if not cells:
            raise ValueError(f"table {name}: no row is like {only}")
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in cells])


def render(text: str) -> str:
    """A page with every table brought up to date."""
    return re.sub(
        r"(<!-- table: (\w+)(?: of (.*?))? -->\n).*?(<!-- end -->)",
        lambda m: f"{m[1]}{table(m[2], m[3])}\n{m[4]}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(render(page.read_text()))
