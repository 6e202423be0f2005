"""Other people's LightningDataModules as a task sequence."""

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from forked import forked
from killed import Strike, final_state
from test_resume import assert_identical
from torch import Tensor
from torch.optim import SGD, Adam
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from toy_trainer import trainer

import lightning_sparse_cl as scl


def points(task: int, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(10 * seed + task)
    y = torch.arange(80) % 2
    return TensorDataset(torch.randn(80, 8, generator=generator) + 3 * torch.eye(8)[y + 2 * task], y)


class Points(pl.LightningDataModule):
    """Two classes of points, a pair of them for each task."""

    def __init__(self, task: int, make: Callable[..., DataLoader] = DataLoader, **kwargs: Any) -> None:
        super().__init__()
        self.task, self.make, self.kwargs = task, make, kwargs

    def setup(self, stage: str) -> None:
        self.sets = points(self.task), points(self.task, 1)

    def train_dataloader(self) -> DataLoader:
        return self.make(self.sets[0], batch_size=16, shuffle=True, **self.kwargs)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.sets[1], 40, **{k: v for k, v in self.kwargs.items() if k == "collate_fn"})


def as_dict(items: list[Any]) -> dict[str, Tensor]:
    return {"point": torch.stack([x for x, _ in items]), "label": torch.stack([y for _, y in items])}


def with_names(items: list[Any]) -> tuple[Any, ...]:
    x, y = torch.utils.data.default_collate(items)
    return x, y, ["a name"] * len(y)


class Stream(IterableDataset):
    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return (self.data[i] for i in range(80))


def iterable(data: Dataset, batch_size: int, shuffle: bool, **kwargs: Any) -> DataLoader:
    return DataLoader(Stream(data), batch_size, **kwargs)


class Normalising(Points):
    """Its hook normalises, and in training it adds noise."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        assert self.trainer is not None
        x = x + 0.1 * torch.randn_like(x) if self.trainer.training else x
        return x.mul_(0.5), y


KINDS: dict[str, Callable[[int], pl.LightningDataModule]] = {
    "pairs": Points,
    "dicts": partial(Points, collate_fn=as_dict),
    "hooks": Normalising,
    "iterable": partial(Points, make=iterable),
    "from_datasets": lambda task: pl.LightningDataModule.from_datasets(
        points(task), None, points(task, 1), batch_size=16
    ),
}


def learner() -> scl.ContinualModule:
    return scl.ContinualModule(scl.SmallMLP((16, 16)), scl.DERpp(20, 8), optimizer=partial(Adam, lr=0.01))


def train(kind: str, folder: Path | None = None, at: int | None = None, path: str | None = None, **kwargs: Any) -> Any:
    pl.seed_everything(0, verbose=False)
    data = scl.Tasks.of([KINDS[kind](0), KINDS[kind](1)], own_classes=True, **kwargs)
    module, evaluation = learner(), scl.ContinualEvaluation()
    saving = [] if folder is None else [scl.SequenceCheckpoint(str(folder), every_n_train_steps=3, save_last=True)]
    callbacks = (evaluation, scl.RandomState(), *saving, Strike(at))
    trainer(*callbacks, epochs=4, enable_checkpointing=folder is not None).fit(module, data, ckpt_path=path)
    return module, evaluation, data


@pytest.mark.parametrize(
    "kind", [kind if kind in ("hooks", "iterable") else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_they_are_learnt_and_resumed_exactly(kind: str, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("whole", "killed")]
    _, evaluation, data = train(kind, folders[0])
    assert evaluation.matrices["task_il"].R.diag().min() > 0.8
    assert data.batch_size == 16 and data.num_classes == 4 and data.num_tasks == 2
    assert forked(train, kind, folders[1], 27) == -signal.SIGKILL
    assert forked(train, kind, folders[1], None, str(folders[1] / "last.ckpt")) == 0
    assert_identical(final_state(folders[0]), final_state(folders[1]))


def test_they_learn_what_their_data_sets_would() -> None:
    """The same bits as the data sets, each with a number of its own, without the modules around them."""
    ours = train("pairs")[0].state_dict()
    pl.seed_everything(0, verbose=False)
    sets = [[TensorDataset(p.tensors[0], p.tensors[1] + 2 * t) for t, p in enumerate(part)] for part in (
        [points(0), points(1)], [points(0, 1), points(1, 1)])]  # fmt: skip
    data = scl.TaskDatasets(*sets, batch_size=16, transform=lambda x: x)
    module = learner()
    trainer(scl.ContinualEvaluation(), scl.RandomState(), epochs=4).fit(module, data)
    assert all(torch.equal(t, module.state_dict()[n]) for n, t in ours.items() if torch.is_tensor(t))


def test_hooks_tell_training_from_measuring() -> None:
    data = train("hooks")[2]
    x = data.test_sets[0][0][0][None]
    assert torch.equal(data.prepare(x, augment=False), x * 0.5) and not torch.equal(data.prepare(x), x * 0.5)


def test_the_same_number_is_the_same_class_unless_they_are_said_to_be_apart() -> None:
    data = scl.Tasks.of([Points(0), Points(1)])
    data.setup()
    assert data.classes == [[0, 1], [0, 1]] and data.num_classes == 2
    alone = scl.Tasks.of(Points(0), batch_size=8)
    alone.setup()
    assert alone.num_tasks == 1 and alone.batch_size == 8


def test_predictions_are_refused_without_what_hooks_do() -> None:
    module, _, data = train("hooks")
    with pytest.raises(ValueError, match="had a transform of their own; give transform"):
        module.predict_samples(torch.zeros(1, 8))
    assert len(module.predict_samples(torch.zeros(2, 8), partial(data.prepare, augment=False))) == 2


def test_samplers_that_choose_are_followed_and_others_are_named() -> None:
    def chosen(data: Dataset, batch_size: int, shuffle: bool) -> DataLoader:
        return DataLoader(data, batch_size, sampler=SubsetRandomSampler(range(40)))

    def in_batches(data: Dataset, batch_size: int, shuffle: bool) -> DataLoader:
        return DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(range(80)), 8, False))

    data = scl.Tasks.of(Points(0, make=chosen))
    data.setup()
    assert len(data.train_sets[0]) == 40 and data.classes == [[0, 1]]
    data = scl.Tasks.of(Points(0, make=in_batches))
    data.setup()
    assert data.batch_size == 8

    data = scl.Tasks.of(Points(0, make=partial(batched, SubsetRandomSampler(range(20)))))
    data.setup()
    assert len(data.train_sets[0]) == 20 and data.batch_size == 4


def batched(sampler: Any, data: Dataset, batch_size: int, shuffle: bool) -> DataLoader:
    return DataLoader(data, batch_sampler=BatchSampler(sampler, 4, True))


def sampled(sampler: Any, data: Dataset, batch_size: int, shuffle: bool) -> DataLoader:
    return DataLoader(data, batch_size, sampler=sampler)


@pytest.mark.parametrize("make", [batched, sampled])
@pytest.mark.parametrize(
    "sampler",
    [WeightedRandomSampler([1.0] * 80, 80), RandomSampler(range(80), num_samples=16), RandomSampler(range(80), True)],
)
def test_what_is_left_out_is_said(make: Any, sampler: Any, recwarn: pytest.WarningsRecorder) -> None:
    scl.Tasks.of(Points(0, make=partial(make, sampler))).setup()
    assert any(f"its {type(sampler).__name__} is not used" in str(w.message) for w in recwarn)


def test_hooks_that_are_not_called_are_said(recwarn: pytest.WarningsRecorder) -> None:
    scl.Tasks.of([Points(0), Normalising(1)]).setup()
    assert any("the hooks of the first data module are called for it" in str(w.message) for w in recwarn)


class Shifted(Points):
    """Other points of the same classes."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.sets = [TensorDataset(part.tensors[0] + 9, part.tensors[1]) for part in self.sets]


@pytest.mark.parametrize("in_memory", [True, False])
def test_other_data_are_another_task(in_memory: bool) -> None:
    data = scl.Tasks.of([Points(0), Shifted(0)], in_memory=in_memory)
    data.setup()
    assert data.fingerprints[0] != data.fingerprints[1]
    module = learner()
    trainer(epochs=1).fit(module, scl.Tasks.of([Points(0)], in_memory=in_memory))
    evaluation = scl.ContinualEvaluation()
    trainer(evaluation, epochs=1).fit(module, scl.Tasks.of([Shifted(0)], in_memory=in_memory))
    assert evaluation.matrices["class_il"].R.shape == (2, 2)  # it goes on
    with pytest.raises(ValueError, match=r"own_classes=True\): classes are numbered from 0 on, and these data modules"):
        trainer(epochs=1).fit(module, scl.Tasks.of([Points(1)], own_classes=True, in_memory=in_memory))


def test_further_modules_with_classes_of_their_own_come_behind_the_learnt_ones() -> None:
    module, evaluation = learner(), scl.ContinualEvaluation()
    trainer(epochs=2).fit(module, scl.Tasks.of([Points(0)], own_classes=True))
    data = scl.Tasks.of([Points(0), Points(1)], own_classes=True)
    trainer(evaluation, epochs=2).fit(module, data)
    assert data.classes == [[0, 1], [2, 3]] and evaluation.matrices["class_il"].R.shape == (2, 2)


class Turning(Dataset):
    """Noise on every item, drawn where it is read; and labels that a collate function turns round."""

    targets = [0, 1] * 40

    def __len__(self) -> int:
        return 80

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.eye(8)[index % 2] + 0.1 * torch.randn(8), index % 2


def turned(items: list[Any]) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _ in items]), torch.tensor([1 - y for _, y in items])


def named(items: list[Any]) -> tuple[Tensor, list[str]]:
    return torch.stack([x for x, _ in items]), ["low" if y else "high" for _, y in items]


def of_several_sizes(items: list[Any]) -> tuple[Tensor, Tensor]:
    return torch.zeros(1, 2 + int(items[0][0][0] > 0)), items[0][1][None]


class OfItems(Points):
    def setup(self, stage: str) -> None:
        self.sets = Turning(), Turning()


def test_labels_are_what_the_collate_function_makes_of_them() -> None:
    data = scl.Tasks.of(OfItems(0, collate_fn=turned))
    data.setup()
    assert [data.train_sets[0][i][1] for i in range(4)] == [1, 0, 1, 0]
    data = scl.Tasks.of(OfItems(0, collate_fn=named))
    data.setup()
    assert data.class_names == ["high", "low"] and [data.train_sets[0][i][1] for i in range(3)] == [0, 1, 0]


def noisy(folder: Path, at: int | None = None, path: str | None = None) -> None:
    pl.seed_everything(0, verbose=False)
    data = scl.Tasks.of([OfItems(0), Points(0)], num_workers=2, batch_size=8)
    saving = scl.SequenceCheckpoint(str(folder), every_n_train_steps=3, save_last=True)
    run = trainer(scl.RandomState(), saving, Strike(at), epochs=2, enable_checkpointing=True)
    run.fit(learner(), data, ckpt_path=path)


def test_draws_in_worker_processes_are_resumed_inside_an_epoch(tmp_path: Path) -> None:
    noisy(tmp_path / "whole")
    assert forked(noisy, tmp_path / "killed", 15) == -signal.SIGKILL
    assert forked(noisy, tmp_path / "killed", None, str(tmp_path / "killed" / "last.ckpt")) == 0
    assert_identical(final_state(tmp_path / "whole"), final_state(tmp_path / "killed"))


class Nothing(pl.LightningDataModule):
    pass


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: scl.Tasks.of([]), "Tasks: LightningDataModules are expected, one per task, got nothing"),
    (lambda: scl.Tasks.of([Points(0), [1]]), "got Points, list"),
    (lambda: scl.Tasks.of(None), "expected, one per task, got NoneType"),
    (lambda: scl.Tasks.of(Points(0), pair=lambda b: b[9]).setup(), r"task 0 \(Points\): pair raised IndexError"),
    (lambda: scl.Tasks.of(Nothing()).setup(), r"Tasks: task 0 \(Nothing\): it has no loader; train_dataloader\(\)"),
    (
        lambda: scl.Tasks.of(Points(0, collate_fn=with_names)).setup(),
        r"a batch is a pair \(samples, labels\), or a dict .*, got tuple of 3; give pair=...",
    ),
    (lambda: scl.Tasks.of(Points(0, collate_fn=lambda items: {}["x"])).setup(), "item 0 raised KeyError: 'x'"),
    (lambda: scl.Tasks.of(Points(0, make=iterable, collate_fn=named)).setup(), "labels that are names need a data set"),
    (
        lambda: scl.Tasks.of(Points(0, collate_fn=of_several_sizes)).setup(),
        r"Tasks\(train\[0\]\): tensors of item .*; item_transform=... makes them so",
    ),
    (lambda: scl.Tasks.of(OfItems(0, collate_fn=named), own_classes=True).setup(), "=True.: it is for numbers"),
    (lambda: scl.Tasks.of(Points(0), own_classes=True, target="real_numbers"), "own_classes=True.*real_numbers"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_refusals_are_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_function_makes_pairs_of_other_batches() -> None:
    data = scl.Tasks.of(Points(0, collate_fn=with_names), pair=lambda batch: batch[:2])
    data.setup()
    assert data.num_classes == 2 and len(data.train_sets[0]) == 80


def of_forecasting(group: int) -> pl.LightningDataModule:
    """Sine waves of pytorch-forecasting: eight steps tell the next two."""
    pandas = pytest.importorskip("pandas")
    module = pytest.importorskip("pytorch_forecasting.data.data_module")
    from pytorch_forecasting.data.timeseries import TimeSeries

    steps, waves = torch.arange(30.0), range(4 * group, 4 * group + 4)
    rows = [{"time": t, "group": g, "y": float(torch.sin(steps[t] / 3 + g))} for g in waves for t in range(30)]
    columns = {"group": ["group"], "num": [], "cat": [], "known": [], "unknown": [], "static": []}
    series = TimeSeries(data=pandas.DataFrame(rows), time="time", target="y", **columns)
    return module.EncoderDecoderTimeSeriesDataModule(
        time_series_dataset=series, max_encoder_length=8, max_prediction_length=2, batch_size=16
    )


class History(torch.nn.Module):
    """Features of the last eight values."""

    def __init__(self) -> None:
        super().__init__()
        self.network = scl.SmallMLP((32, 32))

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return self.network(x["target_past"])


def forecast(folder: Path, at: int | None = None, path: str | None = None) -> scl.ContinualEvaluation:
    pl.seed_everything(0, verbose=False)
    data = scl.Tasks.of([of_forecasting(0), of_forecasting(1)], target="real_numbers")
    module = scl.ContinualModule(History(), scl.ER(50, 16), optimizer=partial(SGD, lr=0.05), policies=[scl.RigL(0.5)])
    evaluation, saving = (
        scl.ContinualEvaluation(),
        scl.SequenceCheckpoint(str(folder), every_n_train_steps=3, save_last=True),
    )
    callbacks = (evaluation, scl.RandomState(), saving, Strike(at))
    trainer(*callbacks, epochs=15, enable_checkpointing=True).fit(module, data, ckpt_path=path)
    return evaluation


@pytest.mark.foreign
def test_a_data_module_of_another_package_killed_and_resumed(tmp_path: Path) -> None:
    evaluation = forecast(tmp_path / "whole")
    assert evaluation.matrices["class_il"].R[-1].min() > 0.5
    assert forked(forecast, tmp_path / "killed", 40) == -signal.SIGKILL
    assert forked(forecast, tmp_path / "killed", None, str(tmp_path / "killed" / "last.ckpt")) == 0
    assert_identical(final_state(tmp_path / "whole"), final_state(tmp_path / "killed"))
    assert os.path.exists(tmp_path / "killed" / "last.ckpt")
