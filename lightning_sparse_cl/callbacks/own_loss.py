"""The module's own loss, taken from its ``training_step`` without leaving a trace in the run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_sparse_cl.backbones.batch_norm import batch_norm_still
from lightning_sparse_cl.callbacks.flops import FlopsCounter
from lightning_sparse_cl.callbacks.trainer_parts import callbacks_of, parts_of

LossOf = Callable[[pl.LightningModule, Any], Tensor]
"""A loss of a module on a batch: a scalar, the mean over the batch."""


@runtime_checkable
class ScoresItself(Protocol):
    """A module that says by which loss its weights are ranked, if that is not its training loss."""

    def scoring_loss(self, batch: Any, live: Tensor | None) -> tuple[Tensor, int]:
        """The sum of the loss over a batch, and the number of samples; ``live`` (C,) are the classes that compete in
        it; if None, all do."""


def check_loss(owner: object, pl_module: pl.LightningModule, loss: LossOf | None) -> None:
    """Refuse, when a fit is set up, a module whose loss cannot be computed separately.

    Raises:
        ValueError: if ``loss`` is not a function, or the module optimises by itself, so that its ``training_step``
            cannot be asked for a loss alone.
    """
    if loss is not None and not callable(loss):
        raise ValueError(f"{type(owner).__name__}(loss={loss!r}): a function of (module, batch) that returns a scalar")
    if loss is None and not isinstance(pl_module, ScoresItself) and not pl_module.automatic_optimization:
        raise ValueError(
            f"{type(owner).__name__}: {type(pl_module).__name__} optimises by itself, so its training_step cannot be "
            f"asked for a loss alone; give {type(owner).__name__}(loss=...), a function of (module, batch) that "
            "returns a scalar"
        )


@contextmanager
def own_loss(
    trainer: pl.Trainer, pl_module: pl.LightningModule, loss: LossOf | None = None
) -> Iterator[tuple[nn.Module, Callable[[Any, Tensor | None], tuple[Tensor, int]]]]:
    """Yields a module and a function of (batch, live) that returns the sum of its loss, and the number of samples.

    The loss is ``loss`` if it is given, else the module's ``scoring_loss`` if it has one, else the loss of its
    ``training_step``. The last runs on a copy of the module, whose logging goes nowhere: batch-norm, metrics, teachers
    and anything else that a step changes belong to the copy. Random generators and learning-rate schedulers are put
    back. Take gradients with respect to the parameters of the module that is yielded.
    """
    with isolate_rng(), _put_back(trainer), trainer.precision_plugin.train_step_context():
        if loss is not None or isinstance(pl_module, ScoresItself):
            with batch_norm_still(pl_module):
                yield pl_module, _given(pl_module, loss)
            return
        loggers = trainer.loggers
        trainer.loggers = [DummyLogger()] if loggers else []
        try:
            quiet = _quiet_copy(trainer, pl_module)
            with ExitStack() as counted:
                for counter in callbacks_of(trainer, FlopsCounter):
                    counted.enter_context(counter.counting(quiet))
                yield quiet, _of_step(quiet)
        finally:
            trainer.loggers = loggers


def _given(pl_module: pl.LightningModule, loss: LossOf | None) -> Callable[[Any, Tensor | None], tuple[Tensor, int]]:
    def compute(batch: Any, live: Tensor | None) -> tuple[Tensor, int]:
        if loss is None:
            assert isinstance(pl_module, ScoresItself)
            return pl_module.scoring_loss(batch, live)
        size, found = _size(batch), loss(pl_module, batch)
        if not torch.is_tensor(found) or found.numel() != 1 or not found.requires_grad:
            raise ValueError(
                f"loss={loss!r} returned {_told(found)}; it must return a scalar tensor that has a gradient"
            )
        return found.reshape(()) * size, size

    return compute


@contextmanager
def _put_back(trainer: pl.Trainer) -> Iterator[None]:
    """Put back schedulers and learning rates afterwards, as a step may change them."""
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    states = [copy.deepcopy(scheduler.state_dict()) for scheduler in schedulers]
    rates = [(group, group["lr"]) for o in trainer.optimizers for group in o.param_groups if "lr" in group]
    try:
        yield
    finally:
        for scheduler, state in zip(schedulers, states):
            scheduler.load_state_dict(state)
        for group, rate in rates:
            group["lr"] = rate


def _of_step(quiet: pl.LightningModule) -> Callable[[Any, Tensor | None], tuple[Tensor, int]]:
    args = [0] if is_param_in_hook_signature(quiet.training_step, "batch_idx", min_args=2) else []  # like Lightning

    def compute(batch: Any, live: Tensor | None) -> tuple[Tensor, int]:
        outputs = quiet.training_step(batch, *args)
        found = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if not torch.is_tensor(found):
            raise ValueError(
                f"{type(quiet).__name__}.training_step returned {type(outputs).__name__} and no loss by which weights "
                "could be ranked; give a function of (module, batch) as `loss`"
            )
        size = _size(batch)
        return found * size, size

    return compute


def _quiet_copy(trainer: pl.Trainer, pl_module: pl.LightningModule) -> pl.LightningModule:
    """A copy of the module that logs nothing; callbacks with hooks on it are not copied."""
    kept = {id(each): each for each in (trainer, *parts_of(trainer).callbacks)}
    try:
        with _Detached():
            quiet = copy.deepcopy(pl_module, kept)
    except Exception as error:  # the module may hold anything
        raise ValueError(
            f"{type(pl_module).__name__} cannot be copied ({type(error).__name__}: {error}), so its training_step "
            "cannot be run without a trace; give a function of (module, batch) as `loss`"
        ) from error
    quiet.trainer = trainer
    if quiet._compiler_ctx is not None:  # the compiled code uses the weights of the original
        for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
            quiet.__dict__.pop(name, None)
    for name in ("log", "log_dict"):
        quiet.__dict__[name] = lambda *_, **__: None
    return quiet


class _Detached(TorchFunctionMode):
    """Inside, ``copy.deepcopy`` also takes tensors that were computed, such as losses that a module collects."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            computed, memo = args
            memo[id(computed)] = found = computed.detach().clone()
            return found
        return func(*args, **(kwargs or {}))


def _told(value: Any) -> str:
    if not torch.is_tensor(value):
        return f"a {type(value).__name__}"
    return f"a tensor of shape {tuple(value.shape)} {'with' if value.requires_grad else 'without'} a gradient"


def _size(batch: Any) -> int:
    try:
        return max(int(extract_batch_size(batch)), 1)
    except Exception:  # Lightning raises it for a batch without a tensor
        return 1
