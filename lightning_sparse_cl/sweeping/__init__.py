"""Many task sequences by one command: a grid or a search over configurations, methods and seeds."""

from lightning_sparse_cl.sweeping.space import Space, Trial
from lightning_sparse_cl.sweeping.sweep import run_sweep

__all__ = ["Space", "Trial", "run_sweep"]
