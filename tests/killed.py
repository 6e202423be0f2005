"""Runs in Python that are killed and resumed."""

import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch


class Strike(pl.Callback):
    """Kills this process after the ``at``-th step."""

    def __init__(self, at: int | None) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def final_state(folder: Path) -> dict[str, Any]:
    """Everything in ``folder/last.ckpt`` but paths, the run's name and the loops' progress."""
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    left_out = ("callbacks", "loops", "pytorch-lightning_version", "epoch", "run", "config")
    found = {k: v for k, v in checkpoint.items() if k not in left_out}
    return found | {"callbacks": {k: v for k, v in checkpoint["callbacks"].items() if "Checkpoint" not in k}}
