"""Many runs in one table, with statistics and pictures."""

from lightning_sparse_cl.comparing.comparison import Comparison, Difference, compare
from lightning_sparse_cl.comparing.quantities import QUANTITIES, SHOWN, Quantity
from lightning_sparse_cl.comparing.runs import Run, find_runs
from lightning_sparse_cl.comparing.statistics import Interval, Spread, holm, p_value, paired, verdict

__all__ = [
    "QUANTITIES",
    "SHOWN",
    "Comparison",
    "Difference",
    "Interval",
    "Quantity",
    "Run",
    "Spread",
    "compare",
    "find_runs",
    "holm",
    "p_value",
    "paired",
    "verdict",
]
