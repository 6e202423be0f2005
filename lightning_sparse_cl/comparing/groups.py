"""Runs that differ in their seeds alone are a group, and a group is named by what sets it apart."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_sparse_cl.comparing.quantities import Quantity
from lightning_sparse_cl.comparing.runs import Run
from lightning_sparse_cl.comparing.statistics import Spread

MISSING = "-"
DIGEST = "digest of the "
MOST_LETTERS = 30
"""Of the value of a setting in a name."""


@dataclass(frozen=True)
class Group:
    """Runs of one configuration.

    Args:
        name: unique among the groups that are compared.
        data: what they were trained on.
        runs: by seed.
        settings: the settings that set this group apart from others of the same name, by short name.
    """

    name: str
    data: str
    runs: dict[int, Run] = field(repr=False)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def tested_on(self) -> str:
        """See :class:`Run`; of the first seed."""
        return next(iter(self.runs.values())).tested_on

    def spread(self, quantity: Quantity) -> Spread | None:
        """Over the seeds. If the runs have no such quantity, None."""
        values = [v for v in map(quantity.of, self.runs.values()) if v is not None and v == v]
        return Spread.of(values) if values else None

    def curve(self, scenario: str) -> list[Spread]:
        """ACC over the tasks seen so far, after each task, in percent, as far as it was measured."""
        curves = [run.metrics[scenario]["acc_seen"] for run in self.runs.values() if scenario in run.metrics]
        found = []
        for after in zip(*curves):
            known = [100 * value for value in after if value is not None]
            if not known:
                break
            found.append(Spread.of(known))
        return found

    def matrix(self, scenario: str) -> list[list[float | None]]:
        """The accuracy matrix, the mean over seeds, as fractions; None where nothing was measured."""
        runs = [run.metrics[scenario]["matrix"] for run in self.runs.values() if scenario in run.metrics]
        return [[_mean(entries) for entries in zip(*rows)] for rows in zip(*runs)]

    def tasks(self) -> list[str]:
        """The classes of each task, as names; none if the seeds have other tasks."""
        found = {tuple(", ".join(names) for names in run.metrics.get("classes", ())) for run in self.runs.values()}
        return list(found.pop()) if len(found) == 1 else []


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs by configuration, in the order in which these come first.

    A group is called by the ``name`` of its runs or, without one, by their method. Where several groups would have one
    name, the settings in which they differ are added, as few as tell them apart; where data differ, they are, too.
    """
    alike: dict[str, list[Run]] = {}
    for run in runs:
        alike.setdefault(run.what, []).append(run)
    first = [members[0] for members in alike.values()]
    bases = [str(run.metrics.get("name") or run.method) for run in first]
    several = len({run.data for run in first}) > 1
    apart: list[dict[str, Any]] = [{} for _ in first]
    for key in dict.fromkeys(zip(bases, (run.data for run in first))):
        at = [i for i, pair in enumerate(zip(bases, (run.data for run in first))) if pair == key]
        for i, differing in zip(at, differences([first[i] for i in at])):
            apart[i] = differing
    names = [
        base + "".join(f", {told(k, v)}" for k, v in settings.items()) + (f" on {run.data}" if several else "")
        for base, settings, run in zip(bases, apart, first)
    ]
    return [
        Group(name, members[0].data, {run.seed: run for run in members}, settings)
        for name, members, settings in zip(names, alike.values(), apart)
    ]


def told(name: str, value: Any) -> str:
    """A setting in words: ``lr=0.1``."""
    return str(value) if name == value else f"{name}={value}"


def differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """For each run the settings in which it differs from the others, by short name.

    Of settings that always change together one is told; a part's own settings are not where its class tells enough.
    """
    if len(runs) < 2:
        return [{} for _ in runs]
    known = [_whole(run) for run in runs]
    keys = list(dict.fromkeys(key for settings in known for key in settings))
    columns = {key: tuple(_fixed(settings.get(key, MISSING)) for settings in known) for key in keys}
    varied = {key: column for key, column in columns.items() if len(set(column)) > 1}
    order = sorted(varied, key=lambda k: (k.startswith(DIGEST), k.count("."), not k.islower(), len(k)))
    whole = len(set(zip(*varied.values())))
    alone = next((key for key in order if len(set(varied[key])) == whole), None)
    chosen: dict[tuple[Hashable, ...], str] = {} if alone is None else {varied[alone]: alone}
    for key in order if alone is None else ():
        if not any(_follows(varied[key], column) for column in chosen):
            chosen[varied[key]] = key
    short = _shortened(list(chosen.values()))
    return [{short[key]: _shown(settings.get(key, MISSING)) for key in chosen.values()} for settings in known]


def _whole(run: Run) -> dict[str, Any]:
    digests = {f"{DIGEST}{name}": value for name, value in run.metrics["digests"].items()}
    return {**run.settings, "processes": run.metrics["processes"], **digests}


def _fixed(value: Any) -> Hashable:
    return tuple(map(_fixed, value)) if isinstance(value, list) else value


def _shown(value: Any) -> Any:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= MOST_LETTERS else f"{text[: MOST_LETTERS - 3]}..."


def _follows(column: tuple[Hashable, ...], other: tuple[Hashable, ...]) -> bool:
    """Whether one setting is known from the other in all runs."""
    return len(set(zip(other, column))) == len(set(other))


def _shortened(keys: list[str]) -> dict[str, str]:
    """Each key's last parts, as many as tell it from the others."""
    found = {}
    for key in keys:
        parts = key.split(".")
        tails = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        clashes = [other for other in keys if other != key]
        found[key] = next(
            (
                t
                for t in tails
                if not t.isdigit() and t != "size" and not any(o == t or o.endswith(f".{t}") for o in clashes)
            ),
            key,
        )
    return found


def _mean(entries: Sequence[float | None]) -> float | None:
    known = [value for value in entries if value is not None]
    return sum(known) / len(known) if known else None
