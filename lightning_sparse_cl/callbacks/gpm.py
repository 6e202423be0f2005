"""Gradient projection memory (GPM; Saha et al., 2021), around any objective."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lightning_sparse_cl.backbones.batch_norm import in_eval
from lightning_sparse_cl.callbacks.agem import AGEM
from lightning_sparse_cl.callbacks.pruning import OneShotPruning, Reopen
from lightning_sparse_cl.callbacks.sparsifier import Sparsifier
from lightning_sparse_cl.callbacks.trainer_parts import callbacks_of, parts_of, task_data
from lightning_sparse_cl.nests import split
from lightning_sparse_cl.optim.projection import correlation, extend_basis, null_space_, projectable
from lightning_sparse_cl.sparsity.layers import network_of, weight_layers


class GPM(pl.Callback):
    """Steps keep to directions that inputs of earlier tasks do not have, so that the outputs for these stay::

        at a task's end, of every layer:  R = its inputs (patches of a convolution) for ``samples`` images
                                          M <- as many singular vectors more as hold epsilon of ||R||^2    (eqs 8, 9)
        in later tasks:                   g <- g - g M M^T                                                 (eqs 6, 7)

    The rank is the smallest that reaches epsilon in every task (the released code stops one short in the first). Biases
    and batch-norm, including statistics, stay as the first task leaves them. The last layer is free: if only the
    current task's classes compete (``CrossEntropy(single_head=True)``), each task trains rows of its own, which
    corresponds to the paper's head per task.

    Works with any LightningModule on a :class:`TaskDataModule`. It is refused together with anything that would leave
    the null space again: callbacks that mask weights or gradients while a task trains (the masked part of an orthogonal
    matrix is not orthogonal), :class:`AGEM`, which adds a direction of its own, and optimisers other than SGD without
    weight decay. :class:`OneShotPruning` at a task's end with ``Reopen("zero")`` is fine: masks hold between a task's
    end and the next one's start, and only pruning itself changes what earlier tasks have learnt.

    Args:
        threshold: epsilon, part of the inputs' energy that is protected, in (0, 1].
        increment: how much epsilon grows per task, >= 0; epsilon stays at most 1.
        samples: number of images per task whose representations are taken.

    Raises:
        ValueError: if an argument is out of range, a layer has groups, or another callback or the optimiser would
            leave the null space.
        TypeError: if the data are not a :class:`TaskDataModule`.
    """

    def __init__(self, threshold: float = 0.97, increment: float = 0.003, samples: int = 125) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"GPM(threshold={threshold}): the part of the inputs' energy protected, in (0, 1]")
        if not increment >= 0:
            raise ValueError(f"GPM(increment={increment}): how much the threshold grows per task, >= 0")
        if samples < 1:
            raise ValueError(f"GPM(samples={samples}): at least one image per task")
        self.threshold, self.increment, self.samples = threshold, increment, samples
        self.bases: dict[str, Tensor] = {}
        """M for each projected weight, (C_in k k, r); empty before the first task's end."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.bases = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        task_data(trainer, self)
        self._refuse_what_leaves_the_null_space(trainer)
        network = network_of(pl_module)
        *layers, (_, last) = weight_layers(network).items()
        for name, layer in layers:
            if not projectable(layer):
                raise ValueError(
                    f"GPM: {name} of {type(pl_module).__name__} belongs to {layer}; GPM projects linear layers and 2-D "
                    "convolutions without groups, padded by numbers of zeros"
                )
        self.layers = dict(layers)
        moved = {id(p) for p in (*last.parameters(), *(layer.weight for layer in self.layers.values()))}
        self.held = [p for p in network.parameters() if id(p) not in moved]
        self.norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.bases = {name: basis.to(pl_module.device) for name, basis in self.bases.items()}

    def _refuse_what_leaves_the_null_space(self, trainer: pl.Trainer) -> None:
        kinds = [type(c) for c in parts_of(trainer).callbacks]
        movers = [k for k in kinds if issubclass(k, Sparsifier) and not issubclass(k, OneShotPruning | Reopen)]
        if any(issubclass(k, AGEM) for k in kinds):
            raise ValueError("GPM: A-GEM's projection adds a direction that GPM takes away; leave one of them out")
        pruning, reopening = callbacks_of(trainer, OneShotPruning), callbacks_of(trainer, Reopen)
        if any(c.init != "zero" for c in reopening):
            raise ValueError(
                'GPM: Reopen(init="random") moves weights in all directions at a task\'s start; use Reopen(init="zero")'
            )
        masked = [k.__name__ for k in movers]
        masked += ["OneShotPruning without Reopen"] if pruning and not reopening else []
        masked += [f"OneShotPruning({c.inside})" for c in pruning if c.inside]
        masked += [f"Reopen(part={c.part})" for c in reopening if c.part < 1]
        if masked:
            name = masked[0]
            raise ValueError(
                f"GPM: {name} masks weights or gradients while tasks train; the masked part of an orthogonal update is "
                "not orthogonal to the inputs of earlier tasks, so nothing would be protected. Leave one of them out"
            )
        for optimizer in trainer.optimizers:
            decay = max(group.get("weight_decay", 0) for group in optimizer.param_groups)
            if not isinstance(optimizer, SGD) or decay:
                raise ValueError(
                    f"GPM: {type(optimizer).__name__}(weight_decay={decay}) moves weights in directions other than "
                    "their gradients'; use SGD without weight decay (with momentum, if you like)"
                )

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self.bases:
            for norm in self.norms:
                norm.eval()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if not self.bases:
            return
        for name, layer in self.layers.items():
            if layer.weight.grad is not None:
                null_space_(layer.weight.grad, self.bases[name])
        torch._foreach_zero_([p.grad for p in self.held if p.grad is not None])

    @torch.no_grad()
    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        grams: dict[str, Tensor] = {}

        def look(module: nn.Module, inputs: tuple[Tensor], name: str) -> None:
            found = correlation(module, inputs[0].detach().float())
            grams[name] = grams[name] + found if name in grams else found

        hooks = [m.register_forward_pre_hook(partial(look, name=n)) for n, m in self.layers.items()]
        with in_eval(pl_module):
            for x, _ in task_data(trainer).samples(self.samples, share=False):
                for part in split(x, 25):  # in parts, as patches take memory
                    pl_module(part)
        for hook in hooks:
            hook.remove()
        threshold = min(1.0, self.threshold + self.increment * task)
        for name, gram in grams.items():
            before = self.bases.get(name, torch.empty(len(gram), 0, device=gram.device))
            self.bases[name] = extend_basis(before, gram, threshold)
        if trainer.world_size > 1:
            for basis in self.bases.values():
                torch.distributed.broadcast(basis, 0)

    def state_dict(self) -> dict[str, Any]:
        return {"bases": dict(self.bases)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bases = dict(state["bases"])
