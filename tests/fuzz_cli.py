"""Nonsense in configurations: ``python tests/fuzz_cli.py SEED COUNT`` puts wrong values into shipped ones, one by one.

Every case is a run of two batches per task in a process of its own. Allowed outcomes: it is refused in one line, with
status 1 and nothing half-written left; the value makes sense and it runs; it runs long, and leaves on SIGTERM. The
status is 1 if any case ended otherwise: with a traceback, killed, hung, or with a value accepted that cannot be meant.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from toy_trainer import SHORTER, epochs_of

from lightning_sparse_cl.__main__ import run
from lightning_sparse_cl.cli.shipped import configs
from lightning_sparse_cl.kernels import KernelsUnavailable, build

NO_NUMBERS = (math.nan, math.inf, -math.inf)
VALUES = (
    None, *NO_NUMBERS, 0, -1, 1, 2, 0.5, 1.5, -0.5, 1e30, -1e30, 10**12, -(10**12), 2**63, True, "", "text", "1e",
    "ä" * 300, [], [1, 2], [[]], {}, {"a": 1}, {"class_path": "SGD"}, {"class_path": "no.such.Class"},
)  # fmt: skip
QUICK = {"growth": {"interval": 2}, "removal": {"interval": 1, "cutoff": 1}, "masking": {"interval": 1}}
"""What makes sense for a task of one epoch."""
UNCHANGED = "(as it is)"
LONG = 25
"""Seconds until a case is told to stop, and as many again until it is taken for hung."""
MEMORY = 16 * 2**30


class Case(NamedTuple):
    """One wrong value."""

    config: str
    key: str
    value: Any
    text: str
    """The configuration's file."""


class Outcome(NamedTuple):
    kind: str
    fault: bool
    said: str


def base(name: str) -> dict[str, Any]:
    """A shipped configuration at the size of a test, on the digits that come with the package."""
    files = configs()
    below = {"esacl": "esacl", "objectives": "esacl", "sparcl": "sparcl", "policies": "derpp", "cl_lsg": "cl_lsg"}
    folder = name.partition("/")[0]
    found: dict[str, Any] = {}
    for file in ([f"split_digits/{below[folder]}"] if folder in below else []) + [name]:
        _merge(found, yaml.safe_load(files[file].read_text()))
    found.setdefault("trainer", {}).update(limit_train_batches=2, enable_progress_bar=False, accelerator="cpu")
    epochs = 3 if name == "esacl/efficient" else epochs_of(name)
    found["schedule"] = found.get("schedule", {}) | {"epochs": epochs}
    own = found.get("data", {}).get("init_args", {})
    found["data"] = {"class_path": "SplitDigits", "init_args": {k: own[k] for k in ("joint",) if k in own}}
    found["data"]["init_args"] |= {"num_tasks": 5, "batch_size": 40, "val_fraction": 0.1, "num_workers": 0}
    found["threads"] = 1
    found.setdefault("seed_everything", 0)
    found["checkpoint"] = {"every_n_train_steps": 4}
    backbone = found["model"]["init_args"]["backbone"]
    backbone["class_path"] = "SmallCNN" if "class_path" in backbone else backbone
    backbone["init_args"] = {"width": 4}
    for part, values in QUICK.items():
        own = found["model"]["init_args"].get(part)
        if own is not None and own["class_path"] not in ("SparseGrowth", "CompactPickGrow"):
            own.setdefault("init_args", {}).update(values)
    for values in (values for method, values in SHORTER.items() if method in name):
        for dotted, value in values.items():
            *path, last = dotted.split(".")
            inside = found["model"]["init_args"]
            for key in path:
                inside = inside[key]
            inside[last] = value
    return found


def _merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict) and "class_path" not in value:
            _merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key and every entry of a list, at any depth."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def draw(seed: int, count: int) -> Iterator[Case]:
    """Cases that are the same for a seed; ``count`` large enough meets every value of every configuration.

    From 500 on, every configuration is run as it is, too: what does not run by itself refuses every value.
    """
    drawn = random.Random(seed)
    trees = {name: base(name) for name in configs()}
    if count >= 500:
        yield from (Case(name, "", UNCHANGED, yaml.safe_dump(tree)) for name, tree in trees.items())
        count -= len(trees)
    every = [(name, path) for name, tree in trees.items() for path in places(tree)]
    drawn.shuffle(every)
    for i in range(count):
        name, path = every[i % len(every)]
        tree = copy.deepcopy(trees[name])
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        dotted, how = ".".join(map(str, path)), drawn.random()
        number = parent[path[-1]] if type(parent[path[-1]]) in (int, float) else None
        if how < 0.25 and number is not None:
            value = parent[path[-1]] = drawn.choice([number + 1, 2 * number, number / 2, -number])
            text = yaml.safe_dump(tree, sort_keys=False)
        elif how < 0.85:
            value = parent[path[-1]] = drawn.choice(VALUES)
            text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
        elif how < 0.92 and isinstance(path[-1], str):
            parent[value := f"{path[-1]}x"] = parent.pop(path[-1])
            text = yaml.safe_dump(tree, sort_keys=False)
        else:
            value = "a repeated key"
            text = yaml.safe_dump(tree, sort_keys=False) + "threads: 1\n"
        yield Case(name, dotted, value, text)


def _run(case: Case, folder: Path) -> None:
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    log = os.open("log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    Path("case.yaml").write_text(case.text)
    sys.argv = ["sparsecl", "fit", "-c", "case.yaml"]
    run()


def judge(case: Case, folder: Path, status: int | None, told: bool) -> Outcome:
    """What became of a case."""
    log = (folder / "log").read_text(errors="replace") if (folder / "log").exists() else ""
    last = (log.strip().splitlines() or [""])[-1]
    halves = [
        p
        for p in folder.rglob("*")
        if p.suffix in (".part", ".tmp") or (p.is_file() and p.name != "log" and not p.stat().st_size)
    ]
    if status is None:
        return Outcome("hung", True, last)
    if "Traceback" in log:
        return Outcome("traceback", True, last)
    if halves:
        return Outcome("left something half-written", True, str(halves[0]))
    if status == 128 + signal.SIGTERM and told:
        return Outcome("runs long, left on SIGTERM", False, last)
    if case.value == UNCHANGED:
        return Outcome("runs as it is" if not status else "does not run as it is", bool(status), last)
    if status == 1 and last.startswith("sparsecl: error: FiniteLoss"):
        return Outcome("stopped in training, as the loss is not finite", False, last)
    if status == 1 and last.startswith("sparsecl: error: "):
        names = case.key.replace("_", " ").split(".")
        short = case.key.rpartition(".")[2]
        named = short in last or "given twice" in last or any(name in last for name in names[-2:] if name)
        return Outcome("refused in one line" if named else "refused, field not named", False, last)
    if status:
        return Outcome(f"status {status}", True, last)
    if _cannot_be_meant(case, folder):
        return Outcome("nonsense accepted", True, last)
    return Outcome("runs", False, last)


def _cannot_be_meant(case: Case, folder: Path) -> bool:
    if isinstance(case.value, float) and not math.isfinite(case.value):
        return True
    if case.value == "a repeated key":
        return True
    reports = list(folder.rglob("metrics.json"))
    if not reports:
        return "fast_dev_run" not in case.key
    figures = json.loads(reports[0].read_text())
    matrix = figures.get("class_il", {}).get("matrix") or [[0.0]]
    return any(v is not None and not 0 <= v <= 1 for row in matrix for v in row)


def main(seed: int, count: int) -> int:
    torch.set_num_threads(1)
    with contextlib.suppress(KernelsUnavailable):
        build.library()  # compiled once, and not in the time of a case
    console, fork = Console(), multiprocessing.get_context("fork")
    kinds: Counter[str] = Counter()
    faults: list[tuple[Case, Outcome]] = []
    unnamed: list[tuple[Case, Outcome]] = []
    running: list[tuple[Any, Case, Path, list[float]]] = []
    with Progress(console=console) as progress:
        bar = progress.add_task("cases", total=count)
        cases = draw(seed, count)
        left = True
        while left or running:
            while left and len(running) < 2:
                case = next(cases, None)
                if case is None:
                    left = False
                    break
                folder = Path(tempfile.mkdtemp(prefix="fuzz"))
                process = fork.Process(target=_run, args=(case, folder))
                process.start()
                running.append((process, case, folder, [time.monotonic(), 0.0]))
            time.sleep(0.02)
            for entry in list(running):
                process, case, folder, times = entry
                since = time.monotonic() - times[0]
                if process.is_alive() and since > LONG and not times[1]:
                    times[1] = since
                    os.kill(process.pid, signal.SIGTERM)
                if process.is_alive() and since < 2 * LONG:
                    continue
                status = None if process.is_alive() else process.exitcode
                process.kill()
                process.join()
                outcome = judge(case, folder, status, bool(times[1]))
                kinds[outcome.kind] += 1
                if outcome.fault:
                    faults.append((case, outcome))
                elif "not named" in outcome.kind:
                    unnamed.append((case, outcome))
                shutil.rmtree(folder, ignore_errors=True)
                running.remove(entry)
                progress.advance(bar)
    table = Table("outcome", "cases", title=f"python tests/fuzz_cli.py {seed} {count}", title_justify="left")
    for kind, number in kinds.most_common():
        table.add_row(kind, str(number))
    console.print(table)
    for title, found in (("not named", unnamed), ("FAULT", faults)):
        for case, outcome in found:
            print(f"{title}: {case.config}: {case.key} = {case.value!r:.60}: {outcome.kind}: {outcome.said[:300]}")
    return 1 if faults else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
