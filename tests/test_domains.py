"""Text, tables and labels of every kind: killed and resumed, and on two processes."""

import csv
import functools
import signal
from pathlib import Path
from typing import Any

import kinds_of_labels as kinds
import lightning.pytorch as pl
import pytest
import torch
from forked import forked
from killed import Strike, final_state
from test_resume import assert_identical
from toy_trainer import trainer

import lightning_sparse_cl as scl


def of_text(folder: Path, **kwargs: Any) -> scl.TaskDataModule:
    topics = ["bread soup cheese", "song drum guitar", "star orbit moon", "ball goal team"]
    rows = [(t, f"{topic} {i % 7} {i % 5}") for i in range(40) for t, topic in enumerate(topics)]
    if not (path := folder / "topics.csv").exists():
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("topic", "text"), *rows])
    tokenizer = scl.HashTokenizer(256)
    return scl.SplitCSV(str(path), 2, label="topic", text="text", tokenizer=tokenizer, length=6, **kwargs)


def of_numbers(folder: Path, **kwargs: Any) -> scl.TaskDataModule:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(160, 5, generator=generator), torch.arange(160) % 4
    table = (x + 3 * torch.eye(5)[y], y)
    return scl.SplitTensors(table, table, 2, **kwargs)


def of_series(folder: Path, **kwargs: Any) -> scl.TaskDataModule:
    return scl.SplitJapaneseVowels(3, **kwargs)


DOMAINS = {"text": of_text, "table": of_numbers, "series": of_series}


def learner(domain: str) -> scl.ContinualModule:
    if domain == "text":
        return scl.EsaCL(scl.TextTransformer(256, width=16, layers=1, heads=2), scl.ER(20, 8), 0.5)
    if domain == "series":
        return scl.EsaCL(scl.SeriesCNN(8), scl.DERpp(20, 8), 0.8)
    if domain == "table":
        masking, removal = scl.TaskAwareDynamicMasking(0.7, 1), scl.DynamicDataRemoval(0.2, 1, 1)
        return scl.SparCL(scl.SmallMLP((16, 16)), scl.DERpp(20, 8), masking, removal)
    policies = {"multi_label": [scl.RigL(0.5, interval=3)], "real_numbers": [scl.SNIP(0.5)], "class_maps": []}[domain]
    return kinds.module(domain, scl.ER(20, 8), policies=policies)


def data_of(domain: str, folder: Path, **kwargs: Any) -> scl.TaskDataModule:
    return DOMAINS[domain](folder, **kwargs) if domain in DOMAINS else kinds.data(domain, **kwargs)


def train(domain: str, folder: Path, at: int | None, ckpt_path: str | None, processes: int = 1) -> None:
    pl.seed_everything(0, verbose=False)
    saving = scl.SequenceCheckpoint(dirpath=str(folder), every_n_train_steps=4, save_last=True)
    evaluation = scl.ContinualEvaluation()
    callbacks = (evaluation, scl.FlopsCounter(), scl.RandomState(), saving, Strike(at))
    on: dict[str, Any] = {"devices": 2, "strategy": "ddp"} if processes == 2 else {}
    fitting = trainer(*callbacks, enable_checkpointing=True, **on)
    data = data_of(domain, folder.parent, batch_size=16 // processes)
    fitting.fit(learner(domain), data, ckpt_path=ckpt_path)


@pytest.mark.parametrize("domain", [*DOMAINS, *kinds.KINDS])
def test_killed_and_resumed(domain: str, tmp_path: Path) -> None:
    """Inside the first task, and at the end of it, where the metrics of the row are measured."""
    (tmp_path / "whole").mkdir()
    assert forked(train, domain, tmp_path / "whole", None, None) == 0
    steps = torch.load(tmp_path / "whole" / "last.ckpt", weights_only=True)["global_step"]
    for at in (steps // 3, steps // 2):
        folder = tmp_path / str(at)
        folder.mkdir()
        assert forked(train, domain, folder, at, None) == -signal.SIGKILL
        assert forked(train, domain, folder, None, str(folder / "last.ckpt")) == 0
        assert_identical(final_state(tmp_path / "whole"), final_state(folder), f"{domain}, killed after step {at}: ")


def on_two(domain: str, folder: Path) -> None:
    pl.seed_everything(0, verbose=False)
    module, evaluation = learner(domain), scl.ContinualEvaluation()
    data = data_of(domain, folder, batch_size=8, val_fraction=0.1)
    fitting = trainer(evaluation, scl.RandomState(), epochs=3, devices=2, strategy="ddp")
    fitting.fit(module, data)
    same = {name: t for name, t in module.state_dict().items() if torch.is_tensor(t)}
    for name, tensor in (same | {"R": evaluation.matrices["class_il"].R}).items():
        assert torch.equal(fitting.strategy.broadcast(tensor).nan_to_num(-9), tensor.nan_to_num(-9)), name
    alone = scl.metrics.AccuracyMatrix(1, 1, functools.partial(data.target.measure, data.num_classes))
    module.eval()
    with torch.no_grad():
        alone.update(module(data.prepare(data.test_sets[0].inputs, augment=False)), data.test_sets[0].labels, 0)
    measured = float(evaluation.matrices["class_il"].R[-1, 0])
    # no synchronisation: each process has all samples
    value = alone.metrics[0] if alone.metrics else alone
    value.sync_on_compute = False
    assert abs(measured - float(value.compute())) < 1e-5, (measured, value.compute())


@pytest.mark.xdist_group("two processes")
@pytest.mark.parametrize("domain", [*DOMAINS, *kinds.KINDS])
def test_two_processes_agree_and_measure_every_sample_once(domain: str, tmp_path: Path) -> None:
    assert forked(on_two, domain, tmp_path, processes=2) == 0


@pytest.mark.xdist_group("two processes")
@pytest.mark.parametrize("domain", ["series", "multi_label"])
def test_two_processes_killed_and_resumed(domain: str, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
    assert forked(train, domain, folders[0], None, None, 2, processes=2) == 0
    steps = torch.load(folders[0] / "last.ckpt", weights_only=True)["global_step"]
    assert forked(train, domain, folders[1], 2 * steps // 3, None, 2, processes=2) == -signal.SIGKILL
    assert forked(train, domain, folders[1], None, str(folders[1] / "last.ckpt"), 2, processes=2) == 0
    assert_identical(final_state(folders[0]), final_state(folders[1]), f"{domain}, two processes: ")
