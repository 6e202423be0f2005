"""Tune on one class order or data set, report on another."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_sparse_cl.comparing.quantities import Quantity
from lightning_sparse_cl.comparing.runs import Run

ORDER = "data.class_order"


def tuned(runs: Sequence[Run], on: Mapping[str, str], by: Quantity) -> tuple[list[Run], list[str]]:
    """Of each method, the runs to report, with the settings that were best where they were tuned; and how they were.

    Runs whose settings have the values of ``on`` are there to tune on, all others to report. The best settings of a
    method are those with the best mean over seeds. Where the tuning runs have the data of the others, in another order
    of classes for example, they share test samples, which must not decide: then the mean of ``held_out`` does, the
    accuracies on validation samples, each taken when its task had been learnt.

    Args:
        runs: of both kinds.
        on: settings (or ``data``, the class of the data) and their values, as text.
        by: what is compared on other data.

    Raises:
        ValueError: if there are no runs of one kind, validation samples are needed and were not set aside, or no run
            to report has a method's best settings.
    """
    told = ", ".join(f"{name}={value}" for name, value in on.items())
    tuning = [run for run in runs if all(_value(run, name) == value for name, value in on.items())]
    reported = [run for run in runs if run not in tuning]
    if not tuning or not reported:
        there = "; ".join(f"{name} is {', '.join(sorted({_value(run, name) for run in runs}))}" for name in on)
        raise ValueError(
            f"compare --tune_on {told}: {len(tuning)} runs to tune on and {len(reported)} to report; {there}"
        )
    same_data = {run.data for run in tuning} & {run.data for run in reported}
    names = {*on, ORDER} | {name for run in runs for name in run.settings if name.startswith("data.")}
    best: dict[str, tuple[float, dict[str, Any]]] = {}
    seeds: dict[str, set[int]] = {}
    candidates: dict[tuple[str, str], list[Run]] = {}
    for run in tuning:
        candidates.setdefault((_method(run), repr(sorted(_choice(run, names).items()))), []).append(run)
    for (method, _), members in candidates.items():
        values = [_held_out(run, told) if same_data else by.of(run) for run in members]
        known = [value for value in values if value is not None]
        if not known:
            raise ValueError(f"compare --tune_on {told}: the runs of {method} have no {by.name}")
        seeds.setdefault(method, set()).add(len(known))
        mean = statistics.fmean(known) * (-1 if by.more_is_better is False and not same_data else 1)
        if method not in best or mean > best[method][0]:
            best[method] = mean, _choice(members[0], names)
    chosen = [run for run in reported if _method(run) in best and _choice(run, names) == best[_method(run)][1]]
    if missing := best.keys() - {_method(run) for run in chosen}:
        names_told = ", ".join(sorted(missing))
        raise ValueError(f"compare --tune_on {told}: no run to report has the settings that were best for {names_told}")
    decided = "validation samples" if same_data else by.title
    notes = [f"tuned on {told}, by {decided}: {method}{_told(best[method][1], candidates, method)}" for method in best]
    notes += [
        f"note: the settings of {method} were tuned with different numbers of seeds ({', '.join(map(str, sorted(n)))})"
        for method, n in seeds.items()
        if len(n) > 1
    ]
    notes += [f"left out: {method} was not tuned" for method in sorted({_method(r) for r in reported} - best.keys())]
    return chosen, notes


def _told(choice: Mapping[str, Any], candidates: Mapping[tuple[str, str], list[Run]], method: str) -> str:
    """The settings that were chosen among others."""
    tried = [members[0].settings for (name, _), members in candidates.items() if name == method]
    varied = {name: value for name, value in choice.items() if len({str(settings.get(name)) for settings in tried}) > 1}
    return "".join(f", {name}={value}" for name, value in varied.items()) or ", with the only settings there are"


def _method(run: Run) -> str:
    return str(run.metrics.get("name") or run.method)


def _value(run: Run, name: str) -> str:
    return run.data if name == "data" else str(run.settings.get(name))


def _choice(run: Run, without: set[str]) -> dict[str, Any]:
    return {name: value for name, value in run.settings.items() if name not in without}


def _held_out(run: Run, told: str) -> float:
    accuracies = run.metrics.get("held_out")
    if not accuracies:
        raise ValueError(
            f"compare --tune_on {told}: {run.folder} has the data of the runs to report, so that their test samples "
            "must not decide, and no validation samples; train with data.val_fraction"
        )
    return statistics.fmean(accuracies)
