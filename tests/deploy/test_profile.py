"""What a trained network costs, by each way to run it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import network, trained
from torch import nn

import lightning_sparse_cl as scl
from lightning_sparse_cl.__main__ import main, run
from lightning_sparse_cl.deploy.profiling import WAYS

QUICK = ["PyTorch, eager", "PyTorch, sparse kernels", "FlatNetwork", "C runtime", "C runtime, int8"]


@pytest.mark.slow
@pytest.mark.parametrize("task", [None, 1])
def test_each_way_answers_as_the_module(task: int | None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    module, data = trained()
    sets = data.test_sets if task is None else data.test_sets[task : task + 1]
    stored, labels = torch.cat([d.inputs for d in sets]), torch.cat([d.labels for d in sets])
    rows = scl.profile_model(module, stored, labels, tmp_path / "p", task=task, ways=QUICK, seconds=0.01)
    classes = data.classes[task] if task is not None else list(range(10))
    best = module.eval()(module.prepare_images(stored))[:, classes].argmax(1)
    accuracy = (torch.tensor(classes)[best] == labels).float().mean().item()
    found: dict[str, Any] = {row["way"]: row for row in rows}
    assert list(found) == QUICK
    for way, row in found.items():
        narrow = "int8" in way
        assert row["difference"] < (0.1 if narrow else 1e-5), way
        assert row["accuracy"] == pytest.approx(accuracy, abs=0.1 if narrow else 1e-6), way
        assert row["bytes"] == (tmp_path / "p" / row["file"]).stat().st_size
        assert row["peak_mb"] > row["own_mb"] >= 0 and row["batch_1_ms"]["p90"] >= row["batch_1_ms"]["median"] > 0
    assert found["C runtime"]["peak_mb"] < found["PyTorch, eager"]["peak_mb"] / 3  # without torch
    assert found["C runtime, int8"]["bytes"] < 0.7 * found["C runtime"]["bytes"]
    assert json.loads((tmp_path / "p" / "profile.json").read_text())["rows"] == rows
    assert (tmp_path / "p" / "profile.png").read_bytes()[1:4] == b"PNG" and "C runtime, int8" in capsys.readouterr().out


@pytest.mark.slow
def test_a_way_that_cannot_be_gone_is_said_and_the_others_go_on(tmp_path: Path) -> None:
    class Own(nn.Module):  # another process does not know it, and no runtime layer computes a sigmoid
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sigmoid().flatten(1)

    plain, shape = network("SmallCNN")
    mixed = nn.Sequential(plain[0], nn.GELU(), *plain[1:])
    ways = ["C runtime", "ONNX Runtime, int8", "PyTorch, eager"]
    rows = scl.profile_model(mixed, torch.randn(8, *shape), folder=tmp_path, ways=ways, seconds=0.01)
    assert "GELU" in rows[0]["note"] and "to be calibrated" in rows[1]["note"] and "note" not in rows[2]
    assert "accuracy" not in rows[2] and rows[2]["difference"] < 1e-5
    (row,) = scl.profile_model(Own(), torch.randn(8, 3, 4, 4), folder=tmp_path, ways=["PyTorch, eager"], seconds=0.01)
    assert "Own" in row["note"]


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    net, shape = network("SmallCNN")
    x = torch.randn(2, *shape)
    for options, message in (
        ({"ways": ["TensorRT"]}, r"profile_model\(ways=\['TensorRT'\]\): the ways are 'PyTorch, eager', "),
        ({"threads": 0}, "both are greater than 0"),
        ({"seconds": float("nan")}, "both are greater than 0"),
        ({"ways": []}, "there are 2 samples and 0 ways"),
        ({"labels": torch.zeros(3)}, "there are 2 samples, but 3 labels"),
    ):
        with pytest.raises(ValueError, match=message):
            scl.profile_model(net, x, folder=tmp_path / "p", **options)
    with pytest.raises(ValueError, match="there are 0 samples"):
        scl.profile_model(net, x[:0], folder=tmp_path / "p")
    with pytest.raises(ValueError, match="it was never trained"):
        scl.profile_model(scl.EsaCL(scl.SmallCNN(4)), x, folder=tmp_path / "p")
    assert not (tmp_path / "p").exists() and len(WAYS) == 11


@pytest.mark.slow  # half a minute
def test_the_command_takes_the_folder_of_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    about = ["--data.init_args.num_tasks=2", "--schedule.epochs=1", "--trainer.limit_train_batches=2"]
    cli = main(["fit", "-c", "split_digits/esacl", *about])
    folder = Path(cli.trainer.log_dir)
    options = ["--ways=[C runtime, FlatNetwork]", "--seconds=0.01", "--samples=40"]
    monkeypatch.setattr(sys, "argv", ["sparsecl", "profile", str(folder), *options])
    run()
    found = json.loads((folder / "profile" / "profile.json").read_text())
    assert [row["way"] for row in found["rows"]] == ["C runtime", "FlatNetwork"] and 40 <= found["samples"] <= 42
    assert found["model"]["class_names"] == cli.datamodule.class_names and "note" not in found["rows"][0]
    monkeypatch.setattr(sys, "argv", ["sparsecl", "profile", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match=r"it is no folder of a run, which has a config\.yaml"):
        run()
