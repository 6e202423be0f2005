"""What a run tells while it goes on: a line per task in a log, the time left, and a file if it is stopped."""

import io
import json
import os
import re
import signal
import warnings

import lightning.pytorch as pl
import pytest
import torch
from forked import forked
from rich import reconfigure
from rich.console import Console
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.callbacks import progress, time_left
from lightning_sparse_cl.callbacks.time_left import SequenceTime, batches_left, duration
from lightning_sparse_cl.demos import PlainClassifier, toy_tasks


def lines_of(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("task ")]


def test_a_log_has_a_line_for_every_task(capsys):
    evaluation = scl.ContinualEvaluation()
    trainer(scl.RunReport(), evaluation).fit(scl.ContinualModule(scl.SmallMLP([8])), toy_tasks())
    lines = lines_of(capsys)
    for task, line in enumerate(lines):
        means = [100 * float(evaluation.matrices[s].R[task, : task + 1].mean()) for s in ("class_il", "task_il")]
        said = rf"task {task + 1}/3 learnt: Class-IL ([\d.]+) %, Task-IL ([\d.]+) % so far; \d+ s"
        found = re.fullmatch(said + ("" if task == 2 else r", \d+ s left"), line)
        assert [float(figure) for figure in found.groups()] == pytest.approx(means, abs=0.06)
    assert len(lines) == 3

    trainer(scl.RunReport(), epochs=1).fit(PlainClassifier(), toy_tasks())
    assert re.fullmatch(r"task 1/3 learnt; \d+ s, \d+ s left", lines_of(capsys)[0])
    joint = toy_tasks(joint=True)
    trainer(scl.RunReport(), scl.ContinualEvaluation(), epochs=1).fit(scl.ContinualModule(scl.SmallMLP([8])), joint)
    (line,) = lines_of(capsys)
    assert line.startswith("task 1/1 learnt: Class-IL ") and len(line) <= 80


def test_a_terminal_gets_no_such_lines(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    trainer(scl.RunReport(), epochs=1).fit(PlainClassifier(), toy_tasks())
    assert not lines_of(capsys)


def fit_on_two():
    data = toy_tasks(num_tasks=2, batch_size=8)
    trainer(scl.RunReport(), epochs=1, devices=2, strategy="ddp").fit(PlainClassifier(4), data)


def test_one_of_two_processes_tells_it(capfd):
    assert forked(fit_on_two, processes=2) == 0
    assert capfd.readouterr().out.count("task 1/2 learnt; ") == 1


class Clock(pl.Callback):
    """Every batch takes a second of its clock; writes down the batches left and the time estimated."""

    def __init__(self, monkeypatch):
        self.now, self.seen, self.time = 0.0, [], SequenceTime()
        monkeypatch.setattr(time_left.time, "monotonic", lambda: self.now)

    def on_train_batch_start(self, trainer, *_):
        self.time.begin(trainer)

    def on_train_batch_end(self, trainer, *_):
        self.now += 1.0
        self.time.update(trainer)
        self.seen.append((batches_left(trainer), self.time.elapsed, self.time.left))


@pytest.mark.parametrize(
    ("epochs", "options", "batches"),
    [(2, {}, 30), ([1, 3, 2], {}, 30), (1, {"limit_train_batches": 2}, 6), (1, {"limit_train_batches": 0.4}, 6)],
)
def test_the_time_left_is_that_of_the_sequence(monkeypatch, epochs, options, batches):
    clock = Clock(monkeypatch)
    trainer(clock, epochs=epochs, **options).fit(PlainClassifier(), toy_tasks())
    assert clock.seen == [(batches - n, n, batches - n) for n in range(1, batches + 1)]


def test_tasks_of_different_sizes_that_shrink_or_end_early(monkeypatch):
    class Change(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            data = trainer.datamodule
            if trainer.is_last_batch and data.task == 0 and data.epoch_in_task == 0:
                data.alive[0] = data.alive[0][:48]
            if trainer.is_last_batch and data.task == 1:
                data.end_task()

    clock, whole = Clock(monkeypatch), toy_tasks()
    sets = whole.load()
    train = [torch.utils.data.Subset(d, [*range(n), *range(40, 40 + n)]) for d, n in zip(sets[0], (40, 32, 16))]
    data = scl.TaskDatasets(train, sets[1], batch_size=16)
    trainer(Change(), clock, epochs=2).fit(PlainClassifier(), data)
    left = [left for left, *_ in clock.seen]
    # planned are 2 * 5, 2 * 4 and 2 * 2 batches; the second epoch has 3, and the second task one epoch
    assert left == [21, 20, 19, 18, 15, 14, 13, 12, 11, 10, 9, 4, 3, 2, 1, 0]


def test_a_resumed_run_counts_its_own_time(monkeypatch, tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 12:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    trainer(Stop()).fit(PlainClassifier(), toy_tasks())
    clock = Clock(monkeypatch)
    trainer(clock).fit(PlainClassifier(), toy_tasks(), ckpt_path=tmp_path / "half.ckpt")
    assert clock.seen == [(18 - n, n, 18 - n) for n in range(1, 19)]


def test_durations():
    assert [duration(s) for s in (0.4, 59.4, 59.6, 200, 7500)] == [
        "0 s",
        "59 s",
        "1 min 0 s",
        "3 min 20 s",
        "2 h 5 min",
    ]


@pytest.mark.parametrize("scheduled", [True, False])
def test_the_bar_shows_the_time_of_the_sequence(scheduled):
    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            bar = trainer.progress_bar_callback
            columns = [type(c).__name__ for c in bar.progress.columns]
            assert ("SequenceTimeColumn" in columns) == scheduled != ("CustomTimeColumn" in columns)
            if scheduled and trainer.is_last_batch:
                column = bar.progress.columns[columns.index("SequenceTimeColumn")]
                seen.append((bar.sequence_time.left, column.render(bar.train_progress_bar).plain))

    seen, screen = [], Console(file=io.StringIO(), width=100)
    bar = scl.TaskProgressBar()
    bar._console_kwargs = {"file": screen.file}
    t = pl.Trainer(
        accelerator="cpu", max_epochs=-1 if scheduled else 2, logger=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[bar, Look(), *[scl.TaskSchedule(2)] * scheduled],
    )  # fmt: skip
    t.fit(PlainClassifier(), toy_tasks())
    assert len(seen) == 6 * scheduled
    assert all(re.fullmatch(r"\d:\d\d:\d\d • \d:\d\d:\d\d", text) for _, text in seen)
    assert not seen or seen[-1][0] == 0


def test_a_notebook_without_ipywidgets_shows_one_bar_that_changes(monkeypatch):
    shown, later = [], []

    class Handle:
        def update(self, what):
            later.append(what)

    def display(*what, display_id=False, **_):
        shown.extend(what if display_id else [])
        return Handle() if display_id else None

    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr(progress, "find_spec", lambda name: None)
    bar = scl.TaskProgressBar()
    bar._console_kwargs = {"force_jupyter": True}
    t = pl.Trainer(
        accelerator="cpu", max_epochs=-1, logger=False, enable_checkpointing=False, enable_model_summary=False,
        callbacks=[bar, scl.TaskSchedule(1)],
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            t.fit(PlainClassifier(), toy_tasks())
        finally:
            reconfigure()  # the console of other tests
    assert shown == [bar.progress] and set(later) == {bar.progress}  # one output, which IPython draws anew
    assert "Task 3/3, epoch 1/1" in bar.progress._repr_mimebundle_((), ())["text/plain"]
    assert not any("ipywidgets" in str(warning.message) for warning in warned)


# -- stopped runs ------------------------------------------------------------------------------------------------


class Halt(pl.Callback):
    """Raises, or sends a signal, at a step."""

    def __init__(self, step, what):
        self.step, self.what = step, what

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            if isinstance(self.what, signal.Signals):
                os.kill(os.getpid(), self.what)
            else:
                raise self.what


def run(folder, *more, ckpt_path=None):
    torch.manual_seed(0)
    checkpoint = scl.SequenceCheckpoint(folder, save_last=True)
    measures = scl.RandomState(), scl.FlopsCounter(), scl.ContinualEvaluation(), scl.ModelCapacity(), scl.RunReport()
    t = trainer(*measures, checkpoint, *more, default_root_dir=folder, enable_checkpointing=True)
    t.fit(scl.ContinualModule(scl.SmallMLP([8])), toy_tasks(), ckpt_path=ckpt_path)


@pytest.mark.parametrize(
    ("what", "raised"),
    [
        (signal.SIGTERM, SystemExit), (signal.SIGINT, SystemExit), (KeyboardInterrupt(), SystemExit),
        (RuntimeError("broken"), RuntimeError),
    ],
)  # fmt: skip
def test_a_stopped_run_leaves_what_it_had_and_a_resumed_one_the_whole(tmp_path, what, raised):
    folder, path = tmp_path / "run", tmp_path / "run" / "metrics.json"
    with pytest.raises(raised) as error:
        run(folder, Halt(17, what))
    assert raised is SystemExit or error.value is what
    found, step = json.loads(path.read_text()), 17 + isinstance(what, signal.Signals)  # which finishes its step
    assert found["finished"] is False and found["stopped_at"] == {"task": 1, "epoch": 1, "step": step}
    matrix = found["class_il"]["matrix"]
    assert None not in matrix[0] and matrix[1:] == [[None] * 3] * 2 and found["flops"]["samples"] == 16 * step
    assert {p.suffix for p in folder.iterdir()} == {".json", ".ckpt"} and found["seconds"] > 0
    if isinstance(what, signal.Signals):
        run(folder, ckpt_path=folder / "last.ckpt")
        run(tmp_path / "whole")
        whole, resumed = (json.loads((f / "metrics.json").read_text()) for f in (tmp_path / "whole", folder))
        assert resumed["finished"] is True and "stopped_at" not in resumed
        changing = {"seconds", "task_seconds", "memory"}
        assert len(resumed["task_seconds"]) == 3 and all(t > 0 for t in resumed["task_seconds"])
        assert {k: v for k, v in whole.items() if k not in changing}.items() <= resumed.items()


def test_what_goes_wrong_with_the_file_does_not_hide_why_the_run_stopped(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    folder, why = tmp_path / "run", ZeroDivisionError("the first")
    with pytest.raises(ZeroDivisionError, match="the first") as error:
        trainer(scl.RunReport(), Halt(3, why), default_root_dir=folder).fit(PlainClassifier(), toy_tasks())
    assert error.value is why and not list(folder.iterdir())


def test_a_refused_fit_leaves_the_file_of_an_earlier_one(tmp_path):
    folder = tmp_path / "run"
    trainer(scl.RunReport(), epochs=1, default_root_dir=folder).fit(PlainClassifier(), toy_tasks())
    before = (folder / "metrics.json").read_text()
    with pytest.raises(ValueError, match="shorten"):
        trainer(scl.RunReport(), epochs=2, default_root_dir=folder, max_epochs=1).fit(PlainClassifier(), toy_tasks())
    assert (folder / "metrics.json").read_text() == before


def test_a_fit_that_a_callback_ends_is_not_finished(tmp_path):
    class Enough(pl.Callback):
        def on_train_epoch_end(self, trainer, *_):
            trainer.should_stop = trainer.current_epoch == 2

    trainer(scl.RunReport(), Enough(), default_root_dir=tmp_path / "run").fit(PlainClassifier(), toy_tasks())
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert found["finished"] is False and found["stopped_at"] == {"task": 1, "epoch": 1, "step": 15}
