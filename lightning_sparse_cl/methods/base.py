"""The continual learner: a backbone with one head, an objective, an update rule, an optimiser and policies."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from lightning_sparse_cl.allocator import keep_freed_memory
from lightning_sparse_cl.backbones.head import PixelHead, draw_head, logits_among
from lightning_sparse_cl.backbones.memory_format import channels_last_
from lightning_sparse_cl.backbones.pretrained import Pretrained
from lightning_sparse_cl.callbacks.trainer_parts import parts_of, task_data
from lightning_sparse_cl.data.targets import KINDS, Target, target_of
from lightning_sparse_cl.methods.going_on import GoesOn
from lightning_sparse_cl.methods.kept_arguments import KeepsArguments
from lightning_sparse_cl.methods.passes import Passes
from lightning_sparse_cl.methods.predicting import PredictsImages
from lightning_sparse_cl.nests import Nest, described, each, in_words, stacked
from lightning_sparse_cl.nests import layout as layout_of
from lightning_sparse_cl.objectives.base import CrossEntropy, Objective
from lightning_sparse_cl.optim.sam import Outputs, SingleBackward, UpdateRule
from lightning_sparse_cl.optim.selection import LossSelection
from lightning_sparse_cl.sparsity.enforcement import Enforcement, enforce
from lightning_sparse_cl.sparsity.masks import Masks
from lightning_sparse_cl.task_hooks import TaskHooks


class ContinualModule(TaskHooks, GoesOn, PredictsImages, KeepsArguments):
    """Composes the orthogonal parts of a continual-learning method; each can be exchanged on its own.

    Args:
        backbone: maps a batch of samples, such as images (B, C, H, W), to features (B, D); lazy layers take their
            sizes from the data.
        objective: loss and memory. If None, cross-entropy (fine-tuning).
        update: how the loss becomes gradients. If None, one backward pass.
        optimizer: makes the optimiser from the parameters. If None, SGD with learning rate 0.03.
        selection: which samples of a batch each pass keeps. If None, all.
        policies: callbacks that go with the method (pruning, freezing, ...), in the order in which they act.

    Raises:
        ValueError: if the backbone has no ``forward``, or exemplars are to be selected and the objective does not
            return a loss for each.
    """

    automatic_optimization = False
    head: nn.Linear
    """Maps features (B, D) to logits (B, num_classes). Made by :meth:`build`."""
    target: Target = KINDS["classes"]
    """What labels are."""

    def __init__(
        self,
        backbone: nn.Module,
        objective: Objective | None = None,
        update: UpdateRule | None = None,
        optimizer: Callable[[Iterable], Optimizer] | None = None,
        selection: LossSelection | None = None,
        policies: Sequence[pl.Callback] = (),
    ) -> None:
        super().__init__()
        if type(backbone).forward is nn.Module.forward:
            raise ValueError(f"{type(self).__name__}(backbone={type(backbone).__name__}()): a backbone has a forward")
        self.backbone = backbone
        self.head = cast(nn.Linear, None)  # until its size is known
        self.objective = objective or CrossEntropy()
        self.update = update or SingleBackward()
        self.optimizer = optimizer or partial(SGD, lr=0.03)
        self.selection = selection
        if selection is not None and selection.replay < 1 and not self.objective.ranks_replay:
            raise ValueError(
                f"LossSelection(replay={selection.replay}): {type(self.objective).__name__} returns no loss "
                "for each exemplar to select by; use replay=1, or an objective that returns them, such as DERpp, DER, "
                "ER, FDR or ICaRL"
            )
        self.policies = list(policies)

    def configure_model(self) -> None:
        if self._trainer is None:
            return
        data = task_data(self.trainer, self)
        if self.head is None:
            seed = self.trainer.strategy.broadcast(torch.initial_seed())
            example = layout_of(data.example())
            self.build(data.layout, data.num_classes, seed, example, data.target.kind, data.labels)
        elif self.trainer.state.fn == "fit" and data.num_classes > self.head.out_features and data.learnt is None:
            raise ValueError(
                f"{type(self).__name__}: it knows {self.head.out_features} classes, and the data have "
                f"{data.num_classes}; it learns more only if its sequence is known: after a fit that has ended, or "
                "from a checkpoint"
            )

    def build(
        self, layout: Nest, num_classes: int, seed: int = 0, inputs: Nest | None = None, target: str = "classes",
        labels: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Size the network for the data: lazy layers, head, memory. Lightning calls it through ``configure_model``.

        Args:
            layout: a batch as the data are stored, of which only shapes and types count; or the shape of a stored
                image.
            num_classes: number of outputs.
            seed: seed of the head, and of what the objective draws.
            inputs: likewise a batch as the network gets it. If None, ``layout`` with floats in the place of uint8.
            target: what labels are; see :mod:`lightning_sparse_cl.data.targets`.
            labels: the labels of a batch, of which only shape and type count. If None, they are classes.

        Raises:
            ValueError: if the objective cannot learn such labels, or the features do not suit them.
        """
        self.target = target_of(target, type(self).__name__)
        labels = torch.zeros(0, dtype=torch.long) if labels is None else labels[:0].cpu()
        self.objective.set_target(self.target, labels)
        training = self.backbone.training
        if isinstance(layout, tuple | list) and all(isinstance(size, int) for size in layout):
            layout = torch.empty(0, *layout, dtype=torch.uint8)
        if inputs is None:
            inputs = each(lambda t: t.float() if t.dtype == torch.uint8 else t, layout)
        layout, inputs = layout_of(layout), layout_of(inputs)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # a compiled backbone would draw other weights
            own = next((p.dtype for p in self.backbone.parameters()), torch.get_default_dtype())
            features = self._features(each(partial(_zeros, floats=own), inputs))
        self.backbone.train(training)
        maps = labels.ndim == 3
        if not isinstance(features, Tensor) or features.ndim != (4 if maps else 2):
            got = tuple(features.shape) if isinstance(features, Tensor) else f"a {type(features).__name__}"
            raise ValueError(
                f"{type(self.backbone).__name__}: a backbone gives features {'(B, D, H, W)' if maps else '(B, D)'} for "
                f"labels of {target}, got {got}"
            )
        if maps and features.shape[2:] != labels.shape[1:]:
            sizes = [" x ".join(map(str, size)) for size in (features.shape[2:], labels.shape[1:])]
            raise ValueError(
                f"{type(self.backbone).__name__}: it gives features of {sizes[0]} pixels, and maps of classes have "
                f"{sizes[1]}"
            )
        with torch.random.fork_rng([]):
            self.head = (PixelHead if maps else nn.Linear)(features.shape[1], num_classes, dtype=own)
        self._seed = seed
        self.draw_head()
        channels_last_(self.backbone)
        self.built = {
            "layout": layout, "num_classes": num_classes, "seed": seed, "inputs": inputs, "target": target,
            "labels": labels,
        }  # fmt: skip
        self.objective.build(self.network, layout, seed)
        self.update.build(self)

    def _features(self, example: Nest) -> Any:
        """The output of the backbone for an example."""
        try:
            return self.backbone.eval()(example)
        except ValueError:  # already one line
            raise
        except Exception as error:  # a module of the user's
            line = next(iter(str(error).strip().splitlines()), "")
            raise ValueError(
                f"{type(self.backbone).__name__}: it cannot take samples of {in_words(described(example))}: "
                f"{type(error).__name__}: {line}"
            ) from error

    def draw_head(self, seed: int | None = None, classes: Iterable[int] | None = None) -> None:
        """Draw the head, each class by itself.

        Args:
            seed: if None, the seed that the module was built with.
            classes: the classes whose weights are drawn. If None, all.
        """
        draw_head(self.head, self._seed if seed is None else seed, classes)

    @property
    def network(self) -> nn.Sequential:
        """What maps a batch to logits: backbone and head, under the names they have here."""
        return nn.Sequential(OrderedDict(backbone=self.backbone, head=self.head))

    def configure_callbacks(self) -> list[pl.Callback]:
        """The policies.

        Raises:
            ValueError: if the Trainer is asked for something that it does under automatic optimisation only.
        """
        clip, accumulate = self.trainer.gradient_clip_val, self.trainer.accumulate_grad_batches
        if clip:
            raise ValueError(
                f"Trainer(gradient_clip_val={clip}): {type(self).__name__} steps by itself; add "
                f"GradientClipping({clip}) to its policies"
            )
        if accumulate != 1:
            raise ValueError(
                f"Trainer(accumulate_grad_batches={accumulate}): {type(self).__name__} steps by itself, once per "
                f"batch; use a batch_size {accumulate} times as large"
            )
        if self.trainer.precision.startswith("16"):
            raise ValueError(
                f"Trainer(precision={self.trainer.precision!r}): float16 needs a loss scale, and SAM's first pass and "
                'clipping would see scaled gradients; use "bf16-mixed"'
            )
        if self._compiler_ctx is not None:
            raise ValueError(
                f"torch.compile({type(self).__name__}): a step that draws from memory is compiled anew every time; "
                "compile the backbone alone, with module.backbone.compile()"
            )
        return self.policies

    def configure_optimizers(self) -> Optimizer | list[Optimizer]:
        return self.optimizer(self.parameters())

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.train()  # it may have answered since it was trained
        keep_freed_memory()

    def forward(self, x: Nest, features: bool = False) -> Any:
        """A batch to logits (B, num_classes) of all tasks; in eval mode by the objective's classifier.

        With ``features``, a pair of the logits and the features (B, D) they are made of.
        """
        found = self.backbone(x)
        own = self.objective.own_classes if self.training else None
        if own is not None:
            logits = logits_among(own, found, self.head.weight, self.head.bias)
        else:
            logits = self.head(found) if self.training else self.objective.classify(self.head, found)
        return (logits, found) if features else logits

    def training_step(self, batch: tuple[Nest, Tensor], batch_idx: int) -> Outputs:
        x, y = batch
        data, optimizers = task_data(self.trainer), self.optimizers()
        stored = data.raw  # the batch before it was augmented
        if self.objective.views > 1:
            x = stacked([x, *(data.prepare(stored) for _ in range(self.objective.views - 1))])
        optimizer, *others = optimizers if isinstance(optimizers, list) else [optimizers]
        replay, selection = self.objective.draw(data.prepare), self.selection or LossSelection(1, 1)
        loss = Passes(self, self.objective, (x, y), replay, selection, data.epoch_in_task)
        for one in (optimizer, *others):
            one.zero_grad()
        outputs = self.update(self, loss)
        optimizer.step()
        for other in others:
            other.optimizer.step()  # Lightning does not count it: a batch is one step
        if type(self.objective).observe is not Objective.observe:
            raw, labels, logits = self._from_all((stored, y, loss.logits))
            self.objective.observe(raw, labels, logits, data.task)
        value = outputs["loss"].detach()
        if self._logs():
            self.log("train/loss", value, prog_bar=True)
        return {"loss": value, "logits": loss.logits}

    def penalty(self) -> Tensor | float:
        """What a method adds to the loss, once per pass."""
        return 0.0

    def _logs(self) -> bool:
        """Whether this step is logged: logging costs as much as a small network's step."""
        parts = parts_of(self.trainer)
        every = parts.log_every_n_steps
        shown = self.trainer.is_last_batch or (every and self.trainer.global_step % every == 0)
        return shown or any(getattr(c, "monitor", None) == "train/loss" for c in parts.callbacks)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.world_size > 1:  # manual optimisation never broadcasts batch-norm buffers by itself
            cast(DistributedDataParallel, self.trainer.model).require_forward_param_sync = True

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        """Optimiser state does not outlive a task."""
        if task > 0:
            for optimizer in trainer.optimizers:
                optimizer.state.clear()
        self.objective.on_task_start(trainer, self, task)
        self._settle()

    def on_before_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        self.objective.on_before_task_end(trainer, self, task)

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        self.objective.on_task_end(trainer, self, task)
        self._settle()

    def on_after_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        self.objective.on_after_task_end(trainer, self, task)

    def _settle(self) -> None:
        """Apply masks to a head that an objective may have fitted, and give all processes the same one."""
        if self.trainer.world_size > 1:
            for tensor in (*self.head.parameters(), *self.objective.buffers()):
                torch.distributed.broadcast(tensor.data, 0)
        Enforcement.of(self).apply_()

    def validation_step(self, batch: tuple[Nest, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Outputs:
        x, y = batch
        fitting = self.trainer.state.fn == "fit"
        logits = self.held_out_logits(x) if fitting else self(x)
        if fitting:  # the current task only; `validate` is reported by ContinualEvaluation
            y = self.target.for_loss(y)
            self.log("val/loss", self.target.loss(logits, y).mean(), sync_dist=True)
            if self.target is KINDS["classes"]:
                self.log("val/acc", (logits.argmax(1) == y).float().mean(), sync_dist=True)
        return {"logits": logits}

    def held_out_logits(self, x: Nest) -> Tensor:
        """Logits (B, num_classes) with which the running task is validated."""
        return self.network(x)

    def test_step(self, batch: tuple[Nest, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Outputs:
        return {"logits": self(batch[0])}

    def predict_step(self, batch: tuple[Nest, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Predicted labels (B,), out of all classes; for other targets see :class:`Target`."""
        return self.target.answers(self(batch[0]))

    def on_train_start(self) -> None:
        if Masks.of(self).is_pruned():  # a network that was pruned before stays so, whatever the policies
            for optimizer in self.trainer.optimizers:
                enforce(self, optimizer)

    def scoring_loss(self, batch: tuple[Nest, Tensor], live: Tensor | None) -> tuple[Tensor, int]:
        """The loss by which SparCL ranks weights: among the classes ``live`` (C,), summed over the batch."""
        x, y = batch
        return self.target.loss(self(x).float(), self.target.for_loss(y), live).sum(), len(y)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["built_for"] = self.built
        checkpoint["masks"] = Masks.of(self).state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the masks, after sizing the network if there is no trainer to ask (``load_from_checkpoint``).

        Raises:
            ValueError: if the checkpoint is from another network or memory, or from a version before samples were
                nests.
        """
        if "layout" not in checkpoint.get("built_for", {}):
            raise ValueError(
                f"{type(self).__name__}: the checkpoint is from an older version, or not from a method of this "
                "package; train anew, or read it with that version"
            )
        super().on_load_checkpoint(checkpoint)
        if self.head is None:
            for part in self.backbone.modules():
                if isinstance(part, Pretrained):
                    part.weights_follow = True
            self.build(**checkpoint["built_for"])
        if self._trainer is not None and self.trainer.state.fn == "fit":
            known, classes = checkpoint["built_for"]["num_classes"], task_data(self.trainer, self).num_classes
            if self.trainer.ckpt_path and known != classes:
                raise ValueError(
                    f"{type(self).__name__}: the checkpoint is from another network: it knows {known} classes, but the "
                    f"data have {classes}; to learn further ones from it, use --continue_from (go_on_from in Python)"
                )
            self.grow(checkpoint, classes)
        else:
            self.remember_sequence(checkpoint)
        own, found = self.state_dict(), checkpoint["state_dict"]
        for name in sorted(own | found, key=lambda name: name.endswith("_extra_state")):  # the most telling first
            shapes = [tuple(s[name].shape) if torch.is_tensor(s.get(name)) else name in s for s in (found, own)]
            if shapes[0] != shapes[1]:
                there, here = (s if isinstance(s, tuple) else "present" if s else "missing" for s in shapes)
                raise ValueError(
                    f"{type(self).__name__}: the checkpoint is from another network: {name} is {there} in it and "
                    f"{here} in this one"
                )
        if "masks" in checkpoint:  # gradient masks are those of a step that is over
            Masks.of(self).load_state_dict(checkpoint["masks"] | {"updated": {}})

    def _from_all(self, batch: Nest) -> Nest:
        """The batches of all processes, in the same order on each, so that all hold the same memory."""
        if self.trainer.world_size == 1:
            return batch
        return each(lambda tensor: cast(Tensor, self.all_gather(tensor)).flatten(0, 1), batch)


def _zeros(tensor: Tensor, floats: torch.dtype) -> Tensor:
    """A batch of one sample, with floats of the type ``floats``."""
    return torch.zeros(1, *tensor.shape[1:], dtype=floats if tensor.is_floating_point() else tensor.dtype)
