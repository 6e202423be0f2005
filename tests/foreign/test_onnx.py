"""What is exported to ONNX computes the same in ONNX Runtime."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import network, trained
from toy_trainer import trainer

import lightning_sparse_cl as scl

pytestmark = pytest.mark.foreign


def session(path: Path) -> Any:
    onnxruntime = pytest.importorskip("onnxruntime")
    return onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])


def test_a_trained_module_takes_bytes_and_names_its_classes(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    module, data = trained()
    scl.export_model(module, tmp_path / "model.onnx")
    run, stored = session(tmp_path / "model.onnx"), torch.cat([d.inputs for d in data.test_sets])
    for some in (stored, stored[:1]):
        (found,) = run.run(None, {"samples": some.permute(0, 2, 3, 1).contiguous().numpy()})
        wanted = module.eval()(module.prepare_images(some)).detach()
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-5)
    about = json.loads(run.get_modelmeta().custom_metadata_map["metadata"])
    assert about["class_names"] == data.class_names and about["method"] == "EsaCL"


@pytest.mark.parametrize(("values", "agreeing", "smaller"), [("float16", 0.99, 0.65), ("int8", 0.95, 0.8)])
def test_narrow_models_say_the_same_classes(values: Any, agreeing: float, smaller: float, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    module, data = trained()
    stored = torch.cat([d.inputs for d in data.train_sets])[:200]
    whole = scl.export_model(module, tmp_path / "whole.onnx")
    size = scl.export_model(module, tmp_path / "model.onnx", values=values, calibration=stored)
    (found,) = session(tmp_path / "model.onnx").run(None, {"samples": stored.permute(0, 2, 3, 1).contiguous().numpy()})
    wanted = module.eval()(module.prepare_images(stored)).argmax(1)
    assert (torch.from_numpy(found).argmax(1) == wanted).float().mean() >= agreeing and size < smaller * whole
    if values == "int8":  # no weight that was zero is another number now
        held = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "model.onnx").graph.initializer}
        offsets = [v for n, v in held.items() if n.endswith("weight_zero_point")]
        assert offsets and not any(v.any() for v in offsets)
        with pytest.raises(ValueError, match="has to be calibrated; give calibration"):
            scl.export_model(module, tmp_path / "model.onnx", values="int8")


def test_a_plain_network_takes_floats(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    net, shape = network("ResNet18")
    scl.export_model(net, tmp_path / "model.onnx", shape)
    x = torch.randn(3, *shape)
    (found,) = session(tmp_path / "model.onnx").run(None, {"samples": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), net(x).detach(), rtol=1e-4, atol=1e-4)


def test_a_table_is_standardised_inside(tmp_path: Path) -> None:
    rows, y = 7 + 3 * torch.randn(80, 5), torch.arange(80) % 2
    module = scl.ContinualModule(scl.SmallMLP([8]))
    trainer(epochs=1).fit(module, scl.SplitTensors((rows, y), (rows, y), 1, batch_size=8))
    wanted = module.eval()(module.data_description.transform()(rows)).detach()
    scl.export_model(module, tmp_path / "model.pt2")
    found = torch.export.load(tmp_path / "model.pt2").module()(rows).detach()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    pytest.importorskip("onnxscript")
    scl.export_model(module, tmp_path / "model.onnx")
    (by_onnx,) = session(tmp_path / "model.onnx").run(None, {"samples": rows.numpy()})
    torch.testing.assert_close(torch.from_numpy(by_onnx), wanted, rtol=1e-4, atol=1e-5)
