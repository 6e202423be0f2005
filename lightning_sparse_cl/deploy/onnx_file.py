"""The .onnx file: torch's exporter, and ONNX Runtime's quantiser for weights of eight bits."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse_cl.backbones.pretrained import imported

INPUT, OUTPUT = "samples", "outputs"
BATCH = 32
"""How many samples the quantiser takes at a time."""


def onnx_bytes(
    network: nn.Module,
    example: Tensor,
    metadata: str,
    values: str = "float32",
    calibration: Tensor | None = None,
) -> bytes:
    """A network as the bytes of an ONNX model.

    Args:
        network: a network in eval mode; for ``float16`` it computes in that type.
        example: a batch of two samples for it; the model takes batches of any size.
        metadata: JSON, kept as the property ``metadata``.
        values: type of the weights, and of what is computed from them. With ``int8`` each output channel has a factor
            and no offset, so that zeros stay zeros; values between layers have the range seen in ``calibration``.
        calibration: samples (N, ...) as the network takes them, needed for ``int8``.

    Raises:
        ValueError: if a package of the extra ``[onnx]`` is missing, or ``int8`` has no ``calibration``.
    """
    if values == "int8" and (calibration is None or not len(calibration)):
        raise ValueError(
            "export_model(values='int8'): an ONNX model of 8 bits has to be calibrated; give calibration, a few "
            "hundred training samples (the command takes them from the data of a configuration)"
        )
    onnx = imported("onnx", "export_model")
    imported("onnxscript", "export_model", extra="onnx")
    with torch.compiler.set_stance("default"), contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(
            network, (example,), dynamo=True, verbose=False, input_names=[INPUT], output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("samples", min=1)},),
        )  # fmt: skip
    assert program is not None
    model = program.model_proto
    for part in (model.graph, *model.graph.node, *model.graph.value_info):
        del part.metadata_props[:]  # the place in the source where it was made
    if values == "int8":
        assert calibration is not None
        model = _quantised(model, calibration)
    onnx.helper.set_model_props(model, {"metadata": metadata})
    return model.SerializeToString()


def _quantised(model: Any, calibration: Tensor) -> Any:
    imported("onnxruntime", "export_model", extra="onnx")
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Batches(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[Tensor] = iter(calibration.split(BATCH))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batch.numpy()}

    logger, before = logging.getLogger(), logging.getLogger().level
    with TemporaryDirectory() as folder:
        whole, prepared, small = (str(Path(folder, name)) for name in ("whole", "prepared", "small"))
        onnx.save(model, whole)
        logger.setLevel(logging.ERROR)  # it recommends what has just been done
        try:
            quant_pre_process(whole, prepared, skip_symbolic_shape=True)
            quantization.quantize_static(
                prepared, small, Batches(), per_channel=True, weight_type=quantization.QuantType.QInt8,
                activation_type=quantization.QuantType.QInt8, extra_options={"WeightSymmetric": True},
            )  # fmt: skip
        finally:
            logger.setLevel(before)
        return onnx.load(small)
