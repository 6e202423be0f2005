"""Trained modules as files for use elsewhere, and the runtime that reads one kind of them."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_sparse_cl.callbacks.identity import settings_of
from lightning_sparse_cl.data.description import DataDescription
from lightning_sparse_cl.deploy.answering import answering
from lightning_sparse_cl.deploy.onnx_file import onnx_bytes
from lightning_sparse_cl.kernels.build import KernelsUnavailable
from lightning_sparse_cl.methods.base import ContinualModule
from lightning_sparse_cl.nests import is_image
from lightning_sparse_cl.runtime.description import layers_of, refuse_hooks
from lightning_sparse_cl.runtime.file import spnet_bytes
from lightning_sparse_cl.runtime.flat import FlatNetwork
from lightning_sparse_cl.sparsity.layers import network_of, weight_layers
from lightning_sparse_cl.whole_file import whole_file

Values = Literal["float32", "float16", "bfloat16", "int8"]
VALUES = {
    ".spnet": ("float32", "bfloat16", "int8"), ".pt2": ("float32",), ".onnx": ("float32", "float16", "int8"),
}  # fmt: skip
"""Types of weights, by the file's ending."""
ENDINGS = tuple(VALUES)


def export_model(
    model: nn.Module,
    path: str | os.PathLike,
    input_shape: Sequence[int] | None = None,
    values: Values = "float32",
    task: int | None = None,
    calibration: Tensor | None = None,
) -> int:
    """Write a trained network for use elsewhere; the file's ending says how.

    * ``.spnet``: for :class:`FlatNetwork` and the runtime without Python; weights that are zero are left out.
    * ``.pt2``: for torch: ``torch.export.load(path).module()(images)``. Zeros are stored, and multiplied.
    * ``.onnx``: for ONNX Runtime and others (extra ``[onnx]``). Likewise.

    Channels that no layer reads are left out. The file of a module of this package includes the normalisation, and
    takes samples as they were stored: images as bytes (B, H, W, C), as image files give them. It holds the names of the
    classes, the classes of each task and how it was trained, as JSON: ``metadata.json`` among the extra files of a
    ``.pt2``, and ``metadata`` among the properties of an ONNX model. A plain network, or one whose data had a transform
    of their own, takes floats (B, C, H, W) like those it was trained on.

    Where each task has a subnetwork, all of them are in the file; the class with the largest output also decides the
    task. iCaRL's means of exemplars are the last layer.

    Args:
        model: a network, or a trained module of this package.
        path: the file; it is replaced at once or not at all.
        input_shape: shape of one sample, such as (C, H, W). If None, the shape in the module's training.
        values: type of the weights: float32, bfloat16 or int8 in a ``.spnet`` file, whose sums are always taken in
            float32; float32, float16 or int8 in an ONNX model, which also computes in that type.
        task: answer only among the classes of this task, counted from 0, and by its subnetwork if it has one. If None,
            among all classes.
        calibration: samples as they were stored, such as images (N, C, H, W), for an int8 ONNX model.

    Returns:
        The size of the file in bytes.

    Raises:
        ValueError: if the ending is another, no shape is known, the network does something that cannot be exported (the
            error names it), there is no such task, or the module does not answer by a network.
        OSError: if the file cannot be written; an earlier one is untouched.
    """
    ending = Path(path).suffix
    if ending not in ENDINGS:
        raise ValueError(f"export_model(path={str(path)!r}): the ending says what is written: {', '.join(ENDINGS)}")
    if values not in VALUES[ending]:
        raise ValueError(f"export_model(values={values!r}): values in a {ending} are {', '.join(VALUES[ending])}")
    return Exportable.of(model, input_shape, task).write(path, values, calibration)


@dataclass(frozen=True)
class Exportable:
    """What is written of a trained module, for any kind of file."""

    network: nn.Module
    """The network that answers, for network input; in eval mode, float32, on the CPU."""
    shape: tuple[int, ...]
    """Shape of one sample as network input."""
    normalisation: tuple[Tensor, Tensor] | None
    """Factor and summand (C,) that turn stored samples into network input."""
    as_bytes: bool
    """Whether stored samples are bytes."""
    turned: bool
    """Whether stored samples are images, which files give as bytes (B, H, W, C)."""
    metadata: dict[str, Any]
    classes: list[int] | None
    """The label of each output. If None, 0, 1, ..."""

    @classmethod
    def of(cls, model: nn.Module, input_shape: Sequence[int] | None = None, task: int | None = None) -> Exportable:
        """See :func:`export_model` for arguments and errors."""
        name = type(model).__name__
        known: DataDescription | None = getattr(model, "data_description", None)
        if known is None and isinstance(model, ContinualModule):
            raise ValueError(f"export_model({name}): it was never trained; fit it, or load a checkpoint")
        layout = known.layout if known is not None and isinstance(known.layout, Tensor) else None
        given = (input_shape,) if isinstance(input_shape, int) else input_shape
        shape = tuple(given or (() if layout is None else layout.shape[1:]))
        if not shape or any(type(n) is not int or n < 1 for n in shape):
            raise ValueError(
                f"export_model({name}): how large is a sample? input_shape is a shape such as (3, 32, 32), got {shape}"
            )
        if layout is not None and shape != tuple(layout.shape[1:]):
            raise ValueError(f"export_model({name}): it was trained on {tuple(layout.shape[1:])}, not on {shape}")
        if layout is not None and layout.dtype != torch.uint8 and not layout.is_floating_point():
            raise ValueError(
                f"export_model({name}): it was trained on {layout.dtype}; only floats and bytes can be exported"
            )
        network, classes = answering(model, task)
        if task is None:
            _refuse_other_answers(model, network, classes, shape)
        normalisation = _normalisation(known, layout)
        as_bytes = normalisation is not None and layout is not None and layout.dtype == torch.uint8
        metadata = _metadata(model, known, shape, classes, task)
        found = cls(network, shape, normalisation, as_bytes, as_bytes and is_image(layout), metadata, classes)
        try:
            with torch.no_grad():
                found.whole()(found.example())
        except Exception as error:  # the user's network may raise anything
            line = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ValueError(f"export_model({name}): it cannot take samples {shape}: {line}") from error
        return found

    def whole(self, half: bool = False) -> nn.Module:
        """The network for samples as :meth:`given` makes them; if ``half``, it computes in float16."""
        network = _Half(copy.deepcopy(self.network)) if half else self.network
        if self.normalisation is not None:
            network = _Normalising(network, *self.normalisation, self.turned)
        return network.eval()

    def given(self, stored: Tensor) -> Tensor:
        """Stored samples as exports take them: images (N, C, H, W) of bytes as (N, H, W, C)."""
        return stored.permute(0, 2, 3, 1).contiguous() if self.turned else stored

    def example(self) -> Tensor:
        """Two samples as exports take them."""
        found = torch.zeros(2, *self.shape)
        return self.given(found.byte() if self.as_bytes else found)

    def write(self, path: str | os.PathLike, values: str = "float32", calibration: Tensor | None = None) -> int:
        """Write a file by its ending; see :func:`export_model`."""
        ending, metadata = Path(path).suffix, json.dumps(self.metadata)
        if ending == ".spnet":
            if len(self.shape) != 3:
                name = self.metadata["method"]
                raise ValueError(f"export_model({name}): a .spnet takes images (C, H, W); samples are {self.shape}")
            normalisation = self.normalisation if self.as_bytes else None
            names = self.metadata.get("class_names", ())
            refuse_hooks(self.network)
            layers = layers_of(self.network, self.shape)
            data = spnet_bytes(layers, self.shape, normalisation, names, self.metadata, values)
            with contextlib.suppress(KernelsUnavailable):  # it cannot be tried without a compiler
                FlatNetwork.opened(data, self.metadata["method"])
        elif ending == ".pt2":
            data = _pt2(self.whole(), self.example(), metadata)
        else:
            seen = None if calibration is None else self.given(calibration)
            data = onnx_bytes(self.whole(values == "float16"), self.example(), metadata, values, seen)
        with whole_file(path) as part:
            part.write_bytes(data)
        return len(data)


def _metadata(
    model: nn.Module, known: DataDescription | None, shape: Sequence[int], classes: list[int] | None, task: int | None
) -> dict[str, Any]:
    weights = [layer.weight for layer in weight_layers(network_of(model)).values()]
    alive, every = sum(int(w.count_nonzero()) for w in weights), sum(w.numel() for w in weights)
    found: dict[str, Any] = {"method": type(model).__name__, "input_shape": list(shape)}
    if known is not None:
        outputs = range(len(known.class_names)) if classes is None else classes
        tasks = known.classes if task is None else [known.classes[task]]
        found["class_names"] = [known.class_names[c] for c in outputs]
        found["tasks"] = [[known.class_names[c] for c in own if c in outputs] for own in tasks]
        found["target"] = known.target
    trained = {"settings": settings_of(model), "sparsity": round(1 - alive / max(every, 1), 4)}
    return found | {"trained": trained}


class _Half(nn.Module):
    """A network in float16 that takes and returns the same types as before."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.half()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.half() if x.is_floating_point() else x).float()


class _Normalising(nn.Module):
    """A network that takes samples as they were stored, and images as bytes (B, H, W, C)."""

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, scale: Tensor, shift: Tensor, images: bool) -> None:
        super().__init__()
        self.network, self.images = network, images
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        x = (x.permute(0, 3, 1, 2) if self.images else x).float()
        each = [-1, *[1] * (x.ndim - 2)]
        return self.network(x * self.scale.view(each) + self.shift.view(each))


def _normalisation(known: DataDescription | None, layout: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Factor and summand (C,) that turn stored samples into network input, if there are any."""
    if known is None or layout is None or known.std is None or not known.mean:
        return None
    mean, std = torch.tensor(known.mean), torch.tensor(known.std)
    most = 255 if layout.dtype == torch.uint8 and is_image(layout) else 1
    return 1 / (most * std), -mean / std


def _pt2(network: nn.Module, example: Tensor, metadata: str) -> bytes:
    file, batches = io.BytesIO(), torch.export.Dim("samples", min=1)
    network = copy.deepcopy(network).to(memory_format=torch.contiguous_format)  # the only format that ExecuTorch takes
    with torch.compiler.set_stance("default"):
        program = torch.export.export(network, (example,), dynamic_shapes=({0: batches},))
    torch.export.save(program, file, extra_files={"metadata.json": metadata})
    return file.getvalue()


def _refuse_other_answers(
    model: nn.Module, network: nn.Module, classes: list[int] | None, shape: Sequence[int]
) -> None:
    """Compare the network's answers with the module's: a module of another package may add something of its own."""
    if network_of(model) is model or not isinstance(model, ContinualModule):
        return
    weight, training = next(model.parameters()), {m: m.training for m in model.modules()}
    samples = torch.rand(2, *shape, device=weight.device, dtype=weight.dtype)
    model.eval()
    with torch.no_grad():
        found, own = model(samples), network(samples.cpu().float())
    for module, was in training.items():
        module.training = was
    found = (found if classes is None else found[:, classes]).cpu().float()
    if found.shape != own.shape or not torch.allclose(found, own, rtol=1e-3, atol=1e-4):
        raise ValueError(f"export_model({type(model).__name__}): it does not answer by a network that can be written")
