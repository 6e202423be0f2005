"""``sparsecl``: the command line, which is LightningCLI's with a few commands of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable

from lightning_sparse_cl.callbacks.launchers import requeue_before_training
from lightning_sparse_cl.cli import compare, export, predict, profile, shipped, sweep
from lightning_sparse_cl.cli.errors import one_line
from lightning_sparse_cl.cli.lightning_cli import SparseCLI, main

__all__ = ["SparseCLI", "main", "run"]
COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "configs": shipped.command,
    "compare": compare.command,
    "sweep": sweep.command,
}
"""Without a Trainer, a model and data."""


def run() -> None:
    """The console script: like :func:`main`; what the user can mend is told in one line, with exit status 1."""
    requeue_before_training()
    try:
        if (own := COMMANDS.get("".join(sys.argv[1:2]))) is not None:
            own(sys.argv[2:])
        elif predict.is_meant(sys.argv[1:]):
            predict.command(sys.argv[2:])
        elif export.is_meant(sys.argv[1:]):
            export.command(sys.argv[2:])
        else:
            sys.argv[1:] = profile.in_run(sys.argv[1:]) or ["--help"]
            main()
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        sys.exit(f"sparsecl: error: {line}")


if __name__ == "__main__":
    run()
