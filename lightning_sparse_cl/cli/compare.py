"""``sparsecl compare RUN...``: many runs in one table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lightning_sparse_cl.cli.parser import Parser
from lightning_sparse_cl.comparing import QUANTITIES, compare
from lightning_sparse_cl.comparing.statistics import TESTS


def command(args: Sequence[str]) -> None:
    """Print the table and the tests, and write them and the pictures to a folder.

    Args:
        args: of the command line, after ``compare``.

    Raises:
        ValueError: see :func:`~lightning_sparse_cl.compare`.
    """
    given = _parse(args)
    made = compare(
        *given.runs,
        metrics=given.metrics.split(",") if given.metrics else None,
        reference=given.reference,
        test=given.test,
        tune_on=_settings(given.tune_on),
    )
    made.print(given.show)
    if given.output:
        files = made.save(given.output, given.show, not given.no_pictures)
        print(f"{len(files)} files in {given.output}")


def _settings(words: Sequence[str]) -> dict[str, str]:
    pairs = [word.partition("=") for word in words]
    if wrong := next((word for word, (_, equals, _) in zip(words, pairs) if not equals), None):
        raise ValueError(f"compare --tune_on {wrong}: SETTING=VALUE, such as data.class_order=1")
    return {name: value for name, _, value in pairs}


def _parse(args: Sequence[str]) -> argparse.Namespace:
    parser = Parser("sparsecl compare", description="Compare finished runs: tables, tests on common seeds, pictures.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that are searched for runs, to any depth")
    parser.add_argument("--metrics", metavar="A,B", help=f"columns: {', '.join(QUANTITIES)}, or paths in metrics.json")
    shown = "mean ± deviation (default), or median and range"
    parser.add_argument("--show", choices=("mean", "median"), default="mean", help=shown)
    parser.add_argument("--reference", metavar="METHOD", help="test the others against it (default: all pairs)")
    parser.add_argument("--test", choices=TESTS, default="t", help="paired t-test (default) or Wilcoxon's")
    tuning = "runs to tune on; the others are reported. May be given several times"
    parser.add_argument("--tune_on", action="append", default=[], metavar="SETTING=VALUE", help=tuning)
    written = "where tables and pictures are written (default: comparison); empty for nowhere"
    parser.add_argument("--output", default="comparison", metavar="FOLDER", help=written)
    parser.add_argument("--no_pictures", action="store_true", help="write tables only")
    return parser.parse_args(args)
