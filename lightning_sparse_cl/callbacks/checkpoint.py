"""Checkpoints of a task sequence: the finished run included, and one last before leaving on a signal."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info

from lightning_sparse_cl.callbacks.trainer_parts import parts_of

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint is there whole or not at all, and the file it replaces stays until it is.

    Lightning's own goes through the folder for temporary files; where that is on another disk, the last step is a copy
    that can be cut off.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write beside ``path``, then rename.

        Raises:
            OSError: if the file cannot be written, a full disk for example; ``path`` is as it was.
        """
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        target = Path(path)
        part = target.with_name(f"{target.name}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise OSError(
                f"checkpoint {target}: {error.strerror or error}; earlier checkpoints are untouched"
            ) from error


class SequenceCheckpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint``, with the same arguments, made safe for a sequence of tasks.

    * The finished run, consolidated, is in ``last.ckpt``. Lightning saves every n steps *or* at epoch ends, so that
      with ``every_n_train_steps`` the last task's pruning would be missing from every file.
    * Files are written by :class:`AtomicCheckpointIO`, unless the Trainer has a plugin of its own for it.
    * SIGTERM and Ctrl-C (SIGINT) finish the running step, write ``last.ckpt`` and leave with status 128 + signal; a
      second one leaves at once. Several processes leave at the same step.
    * ``every_n_train_steps`` and ``train_time_interval`` hold under manual optimisation too, where Lightning heeds only
      the first.
    * Nothing is written between an epoch's last batch and its end: Lightning, resuming there, would skip validation and
      the epoch-end hooks, and :class:`TaskSchedule` refuses to. What is due then is written at the epoch's end.
    """

    _signal: int = 0
    _due = False
    _handlers: dict[int, Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._signal, self._due = 0, False
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            self._handlers = {number: signal.signal(number, self._heard) for number in SIGNALS}

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self._signal:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._signal = number

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._due = self._due or self._is_due(trainer)
        if not trainer.is_last_batch:
            self._save_if_due(trainer)
            self._leave_if_told(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not (trainer.state.fn == "fit" and trainer.is_last_batch):
            super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        n = self._every_n_epochs
        self._due = self._due or (n > 0 and (trainer.current_epoch + 1) % n == 0)
        self._save_if_due(trainer)
        self._leave_if_told(trainer)

    def _is_due(self, trainer: pl.Trainer) -> bool:
        """By steps, or by time as the first process's clock has it."""
        if self._train_time_interval is not None:
            now, last = time.monotonic(), self._last_time_checked or 0.0
            if trainer.strategy.broadcast(now - last >= self._train_time_interval.total_seconds()):
                self._last_time_checked = now
                return True
        return self._every_n_train_steps > 0 and trainer.global_step % self._every_n_train_steps == 0

    def _save_if_due(self, trainer: pl.Trainer) -> None:
        if not self._due:
            return
        candidates = self._monitor_candidates(trainer)
        if self.monitor is not None and self.monitor not in candidates:
            return  # not measured yet: still due
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
        self._due = False

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if parts_of(trainer).fast_dev_run:
            return
        super().on_train_end(trainer, pl_module)
        if self.save_last:
            self._write_last(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restore_handlers()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()
        super().on_exception(trainer, pl_module, exception)

    def _leave_if_told(self, trainer: pl.Trainer) -> None:
        told = bool(self._signal)
        if trainer.world_size > 1:
            told = trainer.strategy.reduce_boolean_decision(told, all=False)
        if told:
            self._write_last(trainer)
            rank_zero_info(f"{signal.Signals(self._signal or signal.SIGTERM).name}: saved {self.dirpath}/last.ckpt; "
                           "go on with --ckpt_path last")  # fmt: skip
            raise SystemExit(128 + (self._signal or signal.SIGTERM))

    def _write_last(self, trainer: pl.Trainer) -> None:
        if self.dirpath and not parts_of(trainer).fast_dev_run:
            trainer.save_checkpoint(Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}.ckpt", self.save_weights_only)

    def _restore_handlers(self) -> None:
        for number, handler in (self._handlers or {}).items():
            signal.signal(number, handler)
        self._handlers = None
