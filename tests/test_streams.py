"""Streams: one pass over the tasks, whose ends the method is not told, and accuracy at any time."""

import signal
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from forked import forked
from killed import Strike, final_state
from test_resume import assert_identical
from torch.optim import SGD
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.demos import toy_tasks

METHODS = {
    "ER": lambda: scl.ER(30, 8), "DER": lambda: scl.DER(30, 8), "DER++": lambda: scl.DERpp(30, 8),
    "balanced": lambda: scl.ER(30, 8, balanced=True), "fine-tuning": scl.CrossEntropy,
}  # fmt: skip


def module(method: str) -> scl.ContinualModule:
    return scl.ContinualModule(scl.SmallCNN(4), METHODS[method](), optimizer=partial(SGD, lr=0.05))


class Seen(pl.Callback):
    """The classes of each batch, and how often a task was announced."""

    def __init__(self) -> None:
        self.labels: list[torch.Tensor] = []
        self.places: list[torch.Tensor] = []
        self.tasks: list[int] = []

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: int) -> None:
        self.tasks.append(task)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, i: int) -> None:
        self.labels.append(batch[1])
        self.places.append(trainer.datamodule.indices(i))


def fit(method: str, *callbacks: pl.Callback, path: str | None = None, **kwargs: Any) -> Any:
    pl.seed_everything(0, verbose=False)
    learner, data = module(method), toy_tasks(stream=True, batch_size=8)
    trainer(*callbacks, scl.RandomState(), epochs=1, **kwargs).fit(learner, data, ckpt_path=path)
    return learner, data


@pytest.mark.parametrize("method", METHODS)
def test_every_sample_comes_once_task_by_task_and_nothing_tells_where_one_ends(method: str) -> None:
    seen, evaluation = Seen(), scl.ContinualEvaluation()
    learner, data = fit(method, seen, evaluation)
    assert seen.tasks == [0]
    places, labels = torch.cat(seen.places), torch.cat(seen.labels)
    assert places.sort().values.tolist() == list(range(len(places)))
    of = [next(t for t, classes in enumerate(data.classes) if label in classes) for label in labels.tolist()]
    assert of == sorted(of) and len(set(of)) == len(data.classes) > 1
    assert places.tolist() != sorted(places.tolist())  # in a random order within each
    assert evaluation.matrices["class_il"].R.shape == (1, len(data.classes))
    if method != "fine-tuning":
        held = learner.objective.memory.contents()
        assert not held.tasks.any() and len(held.labels.unique()) > 2


def test_anytime_accuracy_is_that_of_the_tasks_that_have_begun() -> None:
    class Measured(pl.Callback):
        """After every fourth step, by the network itself."""

        found: list[float] = []

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
            if trainer.global_step % 4:
                return
            data, begun = trainer.datamodule, max(seen.labels[-1].tolist()) // 2 + 1
            pl_module.eval()
            with torch.no_grad():
                hits = [(pl_module(data.prepare(t.inputs, augment=False)).argmax(1) == t.labels).float().mean()
                        for t in data.test_sets[:begun]]  # fmt: skip
            pl_module.train()
            self.found.append(float(torch.stack(hits).mean()))

    seen, measured, anytime = Seen(), Measured(), scl.AnytimeAccuracy(4)
    _, data = fit("ER", seen, measured, anytime)
    assert data.classes == [[2 * t, 2 * t + 1] for t in range(len(data.classes))]
    assert anytime.accuracies == pytest.approx(measured.found) and anytime.steps == list(range(4, 31, 4))
    assert anytime.summary()["mean"] == pytest.approx(sum(measured.found) / len(measured.found))
    assert len(set(anytime.accuracies)) > 2


def test_in_a_second_epoch_all_tasks_have_begun() -> None:
    begun, anytime = [], scl.AnytimeAccuracy(4)

    class Begun(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, at: int) -> None:
            begun.append(trainer.datamodule.begun(at))

    learner, data = module("ER"), toy_tasks(stream=True, batch_size=8)
    trainer(scl.ContinualEvaluation(), anytime, Begun(), epochs=2).fit(learner, data)
    assert begun == sorted(begun) and begun[len(begun) // 2 :] == [len(data.classes)] * (len(begun) // 2)
    assert begun[0] == 1 and len(anytime.accuracies) == len(begun) // 4


def killed(folder: Path, at: int | None = None, path: str | None = None) -> None:
    saving = scl.SequenceCheckpoint(str(folder), every_n_train_steps=3, save_last=True)
    fit(
        "DER++",
        scl.AnytimeAccuracy(5),
        scl.ContinualEvaluation(),
        saving,
        Strike(at),
        path=path,
        enable_checkpointing=True,
    )


def test_killed_and_resumed(tmp_path: Path) -> None:
    killed(tmp_path / "whole")
    assert forked(killed, tmp_path / "killed", 17) == -signal.SIGKILL
    assert forked(killed, tmp_path / "killed", None, str(tmp_path / "killed" / "last.ckpt")) == 0
    assert_identical(final_state(tmp_path / "whole"), final_state(tmp_path / "killed"))


def on_two() -> None:
    anytime = scl.AnytimeAccuracy(2)
    learner, data = fit("ER", anytime, scl.ContinualEvaluation(), devices=2, strategy="ddp")
    for tensor in (*learner.state_dict().values(), torch.tensor(anytime.accuracies)):
        assert not torch.is_tensor(tensor) or torch.equal(data.trainer.strategy.broadcast(tensor), tensor)
    assert len(anytime.accuracies) == 7


@pytest.mark.xdist_group("two processes")
def test_two_processes_share_the_stream() -> None:
    assert forked(on_two, processes=2) == 0


def test_another_order_is_another_run_and_both_at_once_are_refused(tmp_path: Path) -> None:
    killed(tmp_path)
    with pytest.raises(ValueError, match="the checkpoint is from another run"):
        learner, data = module("DER++"), toy_tasks(joint=True, batch_size=8)
        trainer(epochs=1).fit(learner, data, ckpt_path=str(tmp_path / "last.ckpt"))
    with pytest.raises(ValueError, match=r"joint=True, stream=True\): all tasks mixed, or one after the other"):
        toy_tasks(joint=True, stream=True)
    with pytest.raises(ValueError, match=r"AnytimeAccuracy\(every_n_steps=0\): a whole number of steps, at least 1"):
        scl.AnytimeAccuracy(0)
