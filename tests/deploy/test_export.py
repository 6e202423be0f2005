"""Trained modules as files: they answer as the modules do, with normalisation, classes and tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import assert_close, network, trained
from torch import Tensor, nn
from toy_trainer import trainer

import lightning_sparse_cl as scl


def test_a_trained_module_takes_bytes_and_names_classes(tmp_path: Path) -> None:
    module, data = trained()
    size = scl.export_model(module, tmp_path / "model.spnet")
    flat = scl.FlatNetwork.load(tmp_path / "model.spnet")
    assert size == (tmp_path / "model.spnet").stat().st_size
    stored = torch.cat([d.inputs for d in data.test_sets])
    found = flat.of_bytes(stored.permute(0, 2, 3, 1))
    module.eval()
    assert_close(found, module, module.prepare_images(stored))
    names = [flat.metadata["class_names"][i] for i in found.argmax(1)]
    assert names == [p.name for p in module.predict_images(stored)]
    assert flat.metadata["tasks"] == [[data.class_names[c] for c in task] for task in data.classes]


def test_exports_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"export_model\(ContinualModule\): it was never trained; fit it, or load a checkpoint"
    ):
        scl.export_model(scl.ContinualModule(scl.SmallCNN(4)), tmp_path / "x.spnet")
    with pytest.raises(ValueError, match=r"the ending says what is written: \.spnet, \.pt2, \.onnx"):
        scl.export_model(network("SmallCNN")[0], tmp_path / "x.zip", (3, 16, 16))
    with pytest.raises(ValueError, match=r"values in a \.spnet are float32, bfloat16, int8"):
        scl.export_model(network("SmallCNN")[0], tmp_path / "x.spnet", (3, 16, 16), values="int4")
    module, _ = trained()
    for options, message in (
        ({"task": "x"}, "task 'x' was asked for; tasks are counted from 0"),
        ({"task": True}, "task True was asked for"),
        ({"task": -1}, "task -1 was asked for, and it has tasks 0 to 4"),
        ({"input_shape": (1, 9, 9)}, r"it was trained on \(1, 8, 8\), not on \(1, 9, 9\)"),
        ({"input_shape": 5}, r"it was trained on \(1, 8, 8\), not on \(5,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            scl.export_model(module, tmp_path / "x.pt2", **options)
    for shape in ((1, 16, 16), (8, 8), (3, -8, 8)):
        with pytest.raises(ValueError, match=r"it cannot take samples|how large is a sample") as error:
            scl.export_model(network("SmallCNN")[0], tmp_path / "x.pt2", shape)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError) as missing:
        scl.export_model(module, tmp_path / "nowhere" / "x.pt2")
    assert missing.value.filename == str(tmp_path / "nowhere" / "x.pt2")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        scl.FlatNetwork.load(tmp_path / "none.spnet")
    assert not list(tmp_path.iterdir())


def learnt(module: Any, data: scl.TaskDataModule) -> tuple[Any, Tensor]:
    """Trained, in eval mode, and the test images as stored."""
    trainer(epochs=2, limit_train_batches=4).fit(module, data)
    return module.eval(), torch.cat([d.inputs for d in data.test_sets])


@pytest.mark.parametrize(
    "make",
    [
        lambda net: scl.ContinualModule(net, scl.ICaRL(20)), scl.ContinualDST,
        lambda net: scl.CLLSG(net, scl.SparseGrowth(1.1, reuse_epochs=1)),
        lambda net: scl.IsolatingModule(net, policies=[scl.Reopen(), scl.SET(0.9), scl.TaskSubnetworks("frozen")]),
    ],
    ids=["iCaRL", "ContinualDST", "CLLSG", "TaskSubnetworks"],
)  # fmt: skip
def test_memories_and_subnetworks_are_exported_as_they_answer(make: Callable[[nn.Module], Any], tmp_path: Path) -> None:
    """All tasks in one file, and one task alone."""
    data = scl.SplitDigits(5, batch_size=16, val_fraction=0.1)
    module, stored = learnt(make(scl.SmallCNN(8)), data)
    wanted, images = module(module.prepare_images(stored)), stored.permute(0, 2, 3, 1).contiguous()
    for task in (None, 3):
        classes = list(range(10)) if task is None else data.classes[task]
        for ending in (".spnet", ".pt2"):
            scl.export_model(module, tmp_path / f"x{ending}", task=task)
        flat = scl.FlatNetwork.load(tmp_path / "x.spnet")
        by_torch = torch.export.load(tmp_path / "x.pt2").module()(images)
        for found in (flat.of_bytes(images), by_torch):
            torch.testing.assert_close(found, wanted[:, classes], rtol=1e-4, atol=1e-5)
        assert flat.metadata["class_names"] == [str(c) for c in classes]
        assert [name for own in flat.metadata["tasks"] for name in own] == flat.metadata["class_names"]


class Doubling(scl.ContinualModule):
    """Answers by more than its network."""

    def forward(self, x: Tensor, features: bool = False) -> Any:
        return 2 * super().forward(x)


def test_a_module_that_answers_by_more_than_a_network_is_refused(tmp_path: Path) -> None:
    module, _ = learnt(Doubling(scl.SmallCNN(8)), scl.SplitDigits(5, batch_size=16))
    with pytest.raises(ValueError, match="it does not answer by a network that can be written"):
        scl.export_model(module, tmp_path / "x.pt2")
    assert not list(tmp_path.glob("x*"))


def test_a_task_of_any_module(tmp_path: Path) -> None:
    module, data = trained()
    stored = torch.cat([d.inputs for d in data.test_sets])
    scl.export_model(module, tmp_path / "x.spnet", task=2)
    flat = scl.FlatNetwork.load(tmp_path / "x.spnet")
    wanted = module.eval()(module.prepare_images(stored))[:, data.classes[2]].detach()
    torch.testing.assert_close(flat.of_bytes(stored.permute(0, 2, 3, 1)), wanted, rtol=1e-4, atol=1e-5)
    assert flat.metadata["class_names"] == ["4", "5"] and flat.metadata["tasks"] == [["4", "5"]]
    trained_how = flat.metadata["trained"]
    assert trained_how["settings"]["objective"] == "DERpp" and trained_how["sparsity"] > 0.5
    with pytest.raises(ValueError, match="task 5 was asked for, and it has tasks 0 to 4"):
        scl.export_model(module, tmp_path / "y.spnet", task=5)


def test_subnetworks_that_share_classes_are_exported_one_by_one(tmp_path: Path) -> None:
    module, stored = learnt(scl.ContinualDST(scl.SmallCNN(8)), scl.PermutedDigits(num_tasks=2, batch_size=16))
    with pytest.raises(ValueError, match=r"2 tasks have the same classes.* give a task.*sparsecl export --task 0"):
        scl.export_model(module, tmp_path / "x.spnet")
    scl.export_model(module, tmp_path / "x.spnet", task=1)
    flat = scl.FlatNetwork.load(tmp_path / "x.spnet")
    found = flat.of_bytes(stored.permute(0, 2, 3, 1)).argmax(1)
    assert torch.equal(found, module.predict(module.prepare_images(stored), 1))


def test_samples_that_are_no_images_are_refused(tmp_path: Path) -> None:
    module = scl.ContinualModule(scl.SmallMLP([8]))
    rows, y = torch.randn(40, 4), torch.arange(40) % 2
    trainer(epochs=1).fit(module, scl.SplitTensors((rows, y), (rows, y), 1, batch_size=8))
    with pytest.raises(ValueError, match=r"a \.spnet takes images \(C, H, W\); samples are \(4,\)"):
        scl.export_model(module, tmp_path / "x.spnet")
