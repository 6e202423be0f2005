"""What runs with several seeds say: their spread, and tests of paired differences."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

LEAST_PAIRS = 5
"""With fewer common seeds nothing is decided: with four, Wilcoxon's p is at least 1/8, and an interval is a guess."""
TESTS = ("wilcoxon", "t")
TestName = Literal["wilcoxon", "t"]


class Spread(NamedTuple):
    """Of a quantity, over seeds."""

    n: int
    mean: float
    deviation: float
    """Of the sample (n - 1); nan for a single value."""
    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
        mean, median = statistics.fmean(values), statistics.median(values)
        return cls(len(values), mean, deviation, median, min(values), max(values))


class Interval(NamedTuple):
    """A mean of paired differences, and the 95 % interval of Student's t around it."""

    mean: float
    low: float
    high: float


def paired(values: Sequence[float], others: Sequence[float]) -> Interval:
    """Of ``values - others``, which are of the same seeds in the same order; an interval of nan for a single pair.

    Raises:
        ModuleNotFoundError: without SciPy, which the extra ``compare`` brings.
    """
    differences = [a - b for a, b in zip(values, others, strict=True)]
    mean, n = statistics.fmean(differences), len(differences)
    if n < 2:
        return Interval(mean, float("nan"), float("nan"))
    half = float(_scipy().t.ppf(0.975, n - 1)) * statistics.stdev(differences) / n**0.5
    return Interval(mean, mean - half, mean + half)


def p_value(values: Sequence[float], others: Sequence[float], test: TestName) -> float:
    """Of no difference between ``values`` and ``others``, two-sided; 1 if all pairs are equal.

    nan for a single pair, and by the t-test for differences that are all the same: they say nothing of their deviation.

    Args:
        values: of one method.
        others: of another one, with the same seeds in the same order.
        test: ``"wilcoxon"``, the signed-rank test, exact for few pairs; or ``"t"``, the paired t-test.

    Raises:
        ModuleNotFoundError: without SciPy.
    """
    differences = [round(a - b, 9) for a, b in zip(values, others, strict=True)]  # equal ones are ties
    if len(differences) < 2:
        return float("nan")
    if not any(differences):
        return 1.0
    if test == "wilcoxon":
        return float(_scipy().wilcoxon(differences).pvalue)
    if len(set(differences)) == 1:
        return float("nan")
    return float(_scipy().ttest_rel(values, others).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction (1979) for as many comparisons as there are values; nan counts as one, and stays nan."""
    order = sorted(range(len(p_values)), key=lambda i: (p_values[i] != p_values[i], p_values[i]))
    corrected, largest = [float("nan")] * len(p_values), 0.0
    for rank, i in enumerate(order):
        if p_values[i] == p_values[i]:
            largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
            corrected[i] = largest
    return corrected


def verdict(difference: Interval, pairs: int) -> str:
    """Whether a claim that a difference is positive holds, by its interval, which takes five pairs at least."""
    if pairs < LEAST_PAIRS or difference.low <= 0 <= difference.high:
        return "not decidable"
    return "confirmed" if difference.low > 0 else "not confirmed"


def _scipy() -> Any:
    try:
        from scipy import stats
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "tests and intervals need SciPy: pip install 'lightning_sparse_cl[compare]'", name="scipy"
        ) from error
    return stats
