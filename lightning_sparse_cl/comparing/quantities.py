"""The quantities that runs are compared by, and how they are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_sparse_cl.comparing.runs import Run


@dataclass(frozen=True)
class Quantity:
    """A number that each run has, or has not.

    Args:
        name: as it is asked for.
        title: as it stands above a column, with the unit.
        path: dotted keys of ``metrics.json``.
        per: the path of what it is divided by. If empty, by nothing.
        scale: what it is multiplied by.
        digits: after the point. If None, three digits are significant.
        more_is_better: whether larger values are; None where it is no matter of better and worse.
    """

    name: str
    title: str
    path: str
    per: str = ""
    scale: float = 1.0
    digits: int | None = 1
    more_is_better: bool | None = None

    def of(self, run: Run) -> float | None:
        """In the unit of the title. If the run has none, None."""
        value = _at(run.metrics, self.path)
        if value is None or not self.per:
            return None if value is None else value * self.scale
        per = _at(run.metrics, self.per)
        return None if not per else value / per * self.scale

    def written(self, value: float | None, sign: str = "") -> str:
        """A value of this quantity, "-" if there is none; with "+" before positive ones, if that is the ``sign``."""
        if value is None or value != value:
            return "-"
        if self.digits is None:
            return f"{value + 0.0:{sign}.3g}"
        return f"{round(value, self.digits) + 0.0:{sign}.{self.digits}f}"  # no minus before zero


def _accuracies(scenario: str, title: str) -> list[Quantity]:
    rows = [
        ("", "ACC", "", "acc", True),
        ("_incremental", "incremental ACC", "", "incremental_acc", True),
        ("_bwt", "BWT", "", "bwt", True),
        ("_fwt", "FWT", "", "fwt", True),
        ("_forgetting", "forgetting", "", "forgetting", False),
        ("_before", "ACC before pruning", "_before", "acc", True),
    ]
    return [
        Quantity(f"{scenario}{name}", f"{title} {called}, %", f"{scenario}{of}.{key}", scale=100, more_is_better=more)
        for name, called, of, key, more in rows
    ]


QUANTITIES: dict[str, Quantity] = {
    quantity.name: quantity
    for quantity in (
        *_accuracies("class_il", "Class-IL"),
        *_accuracies("task_il", "Task-IL"),
        Quantity("sparsity", "sparsity, %", "sparsity", scale=100),
        Quantity("flops", "training TFLOPs", "flops.training", scale=1e-12, digits=None, more_is_better=False),
        Quantity(
            "flops_of_plain", "FLOPs, % of plain", "flops.training", per="flops.dense", scale=100, more_is_better=False
        ),
        Quantity("footprint", "training memory, MB", "memory.formula", scale=1e-6, more_is_better=False),
        Quantity("size", "network, kB", "size.bytes", scale=1e-3, more_is_better=False),
        Quantity("seconds", "seconds", "seconds", more_is_better=False),
    )
}
SHOWN = ("class_il", "task_il", "class_il_forgetting", "sparsity", "flops_of_plain")
"""Unless others are asked for."""


def quantity_named(name: str) -> Quantity:
    """A quantity by its name or, any other number in ``metrics.json``, by its path: ``flops.scoring``."""
    return QUANTITIES.get(name) or Quantity(name, name, name, digits=None)


def _at(metrics: Mapping[str, Any], path: str) -> float | None:
    found: Any = metrics
    for key in path.split("."):
        if isinstance(found, list) and key.isdigit() and int(key) < len(found):
            found = found[int(key)]
        else:
            found = found.get(key) if isinstance(found, Mapping) else None
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None
