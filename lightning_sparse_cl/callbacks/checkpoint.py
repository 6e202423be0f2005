"""Checkpoints of a task sequence: including the finished run, and a last one before leaving on a signal."""

from __future__ import annotations

import re
import signal
import threading
import time
import uuid
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_sparse_cl.callbacks.claims import Claim
from lightning_sparse_cl.callbacks.launchers import no_requeue_before_training, requeue, slurm_job
from lightning_sparse_cl.callbacks.trainer_parts import parts_of
from lightning_sparse_cl.checkpoint_file import AtomicCheckpointIO, read_checkpoint


class SequenceCheckpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint``, with the same arguments, made safe for a sequence of tasks.

    * The finished run, consolidated, is in ``last.ckpt``. Lightning saves every n steps *or* at epoch ends, so with
      ``every_n_train_steps`` every file would lack the last task's pruning.
    * Files are written and checked by :class:`AtomicCheckpointIO`, unless the Trainer has a plugin of its own for it.
    * SIGTERM and Ctrl-C (SIGINT) finish the running step, write ``last.ckpt`` and leave with status 128 + signal; a
      second one leaves at once. Several processes leave at the same step.
    * In a SLURM job the signal that announces the time limit (SIGUSR1, or the ``requeue_signal`` of the Trainer's
      ``SLURMEnvironment``) does the same and then queues the job again. Lightning's own handler for it, which saves in
      the middle of a step, is off. ``SLURMEnvironment(auto_requeue=False)`` turns both off.
    * ``every_n_train_steps`` and ``train_time_interval`` also work under manual optimisation, where Lightning heeds
      only the first.
    * Nothing is written between an epoch's last batch and its end: Lightning, resuming there, would skip validation and
      the epoch-end hooks, and :class:`TaskSchedule` refuses to do that. A checkpoint due then is written at the epoch's
      end.
    * Several runs may share a ``dirpath``: the second writes ``last-v1.ckpt``, and so on, even while the first is
      running. Only a run that is resumed replaces its own ``last.ckpt``; a second fit with the same Trainer is a run of
      its own, and removes no file of the first.
    """

    _signal: int = 0
    _due = False
    _requeue_signal: int | None = None
    _handlers: dict[int, Any] | None = None
    _run = ""
    """Distinguishes this run from others that write to the same folder; a resumed run keeps it."""
    _claim: Claim | None = None
    _version = 0
    """Version in the files' names; 0 means none."""
    _offered: frozenset[str] = frozenset()
    """What Lightning has found for ``ckpt_path="last"``."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) in (TorchCheckpointIO, AtomicCheckpointIO):
            trainer.strategy.checkpoint_io = AtomicCheckpointIO(resuming=stage == "fit")
        if stage == "fit":
            self._run, self.last_model_path = "", ""
            self.best_model_path, self.best_model_score = "", None
            self.best_k_models, self.kth_best_model_path = {}, ""
        environment = trainer._accelerator_connector.cluster_environment  # Lightning has no public way to it
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and slurm_job() is not None:
            self._requeue_signal = environment.requeue_signal
            environment.auto_requeue = False
        if self._requeue_signal is None:
            no_requeue_before_training()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._run = self._run or uuid.uuid4().hex
        if trainer.is_global_zero and not parts_of(trainer).fast_dev_run and "://" not in str(self.dirpath):
            self._claim_names()
        self._version = trainer.strategy.broadcast(self._version)
        super().on_train_start(trainer, pl_module)
        self._signal, self._due = 0, False
        if threading.current_thread() is threading.main_thread():  # handlers can only be set there
            numbers = (signal.SIGTERM, signal.SIGINT, self._requeue_signal)
            self._handlers = {number: signal.signal(number, self._heard) for number in numbers if number is not None}

    # -- names ---------------------------------------------------------------------------------------------------

    def _claim_names(self) -> None:
        """Claim the first version that no running process has claimed and whose ``last.ckpt`` is not another run's."""
        self._release_names()
        folder, self._version = Path(str(self.dirpath)), 0
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            path = self._last_path()
            claim = Claim(path)
            if claim.take() and self._is_free(path):
                break
            claim.release()
            self._version += 1
        self._claim = claim
        for part in folder.glob(f"*{self.FILE_EXTENSION}.*.part"):  # left by a process that was killed while writing
            version = re.search(rf"{self.CHECKPOINT_JOIN_CHAR}v(\d+){re.escape(self.FILE_EXTENSION)}\.", part.name)
            if int(version[1] if version else 0) == self._version:
                part.unlink(missing_ok=True)

    def _is_free(self, path: Path) -> bool:
        if not path.exists():
            return True
        try:
            return read_checkpoint(path, mmap=True).get("run") == self._run
        except ValueError:
            return False  # it is not known whose it was

    def _release_names(self) -> None:
        if self._claim is not None:
            self._claim.release()
        self._claim = None

    def _last_path(self) -> Path:
        suffix = f"{self.CHECKPOINT_JOIN_CHAR}v{self._version}" if self._version else ""
        return Path(str(self.dirpath), f"{self.CHECKPOINT_NAME_LAST}{suffix}{self.FILE_EXTENSION}")

    def format_checkpoint_name(
        self, metrics: dict[str, Tensor], filename: str | None = None, ver: int | None = None,
        prefix: str | None = None,
    ) -> str:  # fmt: skip
        """Lightning's name, with the version that this run has claimed."""
        return super().format_checkpoint_name(metrics, filename, self._version or None if ver is None else ver, prefix)

    def _find_last_checkpoints(self, trainer: pl.Trainer) -> set[str]:
        found = super()._find_last_checkpoints(trainer)
        self._offered = frozenset(found)
        return found

    def was_offered(self, path: Any) -> bool:
        """Whether this checkpoint was found for ``ckpt_path="last"``, and not chosen by the user."""
        return str(path) in self._offered

    # -- when ----------------------------------------------------------------------------------------------------

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self._signal and number != self._requeue_signal:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._signal = self._signal or number

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
        """Whether a checkpoint is due, by steps, or by time on the first process's clock."""
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
            return  # no metric measured yet: still due
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
        self._due = False

    def _save_last_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self.save_last == "link":
            super()._save_last_checkpoint(trainer, monitor_candidates)
        elif self.save_last:
            self._write_last(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if parts_of(trainer).fast_dev_run:
            return
        super().on_train_end(trainer, pl_module)
        if self.save_last:
            self._write_last(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restore_handlers()
        self._release_names()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()
        super().on_exception(trainer, pl_module, exception)
        self._release_names()

    def _leave_if_told(self, trainer: pl.Trainer) -> None:
        told, again = bool(self._signal), self._signal == self._requeue_signal
        if trainer.world_size > 1:
            told = trainer.strategy.reduce_boolean_decision(told, all=False)
            again = told and trainer.strategy.reduce_boolean_decision(again, all=False)
        if not told:
            return
        self._write_last(trainer)
        number = self._requeue_signal if again and self._requeue_signal is not None else self._signal or signal.SIGTERM
        rank_zero_info(f"{signal.Signals(number).name}: saved {self._last_path()}; go on with --ckpt_path last")
        if again and trainer.is_global_zero:
            requeue()
        raise SystemExit(128 + number)

    def _write_last(self, trainer: pl.Trainer) -> None:
        if self.dirpath and not parts_of(trainer).fast_dev_run:
            self.last_model_path = str(self._last_path())
            trainer.save_checkpoint(self.last_model_path, self.save_weights_only)

    def _restore_handlers(self) -> None:
        for number, handler in (self._handlers or {}).items():
            signal.signal(number, handler)
        self._handlers = None

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        checkpoint["run"] = self._run

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        self._run = checkpoint.get("run", "")
