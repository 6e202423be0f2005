"""Trained modules as .spnet files, and the runtime that reads them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_sparse_cl.data.description import DataDescription
from lightning_sparse_cl.deploy.description import layers_of
from lightning_sparse_cl.deploy.file import spnet_bytes
from lightning_sparse_cl.kernels.build import HEADERS
from lightning_sparse_cl.sparsity.channels import compact
from lightning_sparse_cl.sparsity.layers import network_of
from lightning_sparse_cl.whole_file import whole_file

HERE = Path(__file__).parent


def export_spnet(
    model: nn.Module,
    path: str | os.PathLike,
    input_shape: Sequence[int] | None = None,
    values: Literal["float32", "bfloat16", "int8"] = "float32",
) -> int:
    """Write a trained network as a .spnet file: for :class:`FlatNetwork`, and for the runtime without Python.

    Channels that no layer reads are left out, and so are weights that are zero. Of a module of this package the file
    has the normalisation, so that it takes images as bytes, the names of the classes, and the classes of each task.

    Args:
        model: a network, or a trained module of this package.
        path: the file; it is replaced at once or not at all.
        input_shape: (C, H, W) of an image. If None, that of the module's training.
        values: type of the weights in the file. Sums are taken in float32 all the same.

    Returns:
        The size of the file in bytes.

    Raises:
        ValueError: if the network does something that the runtime cannot, which is named, or takes no images; or if the
            module does not answer by its network alone.
        OSError: if the file cannot be written; an earlier one is untouched.
    """
    known: DataDescription | None = getattr(model, "data_description", None)
    name = type(model).__name__
    shape = tuple(input_shape or (known.input_shape if known is not None and isinstance(known.layout, Tensor) else ()))
    if len(shape) != 3:
        raise ValueError(f"export_spnet({name}): it takes images (C, H, W); give input_shape, got {shape}")
    _refuse_other_answers(model, shape)
    normalisation: tuple[Tensor, Tensor] | None = None
    names: tuple[str, ...] = ()
    metadata: dict[str, Any] = {"method": name}
    if known is not None:
        if known.dtype == torch.uint8 and known.mean is not None and known.std is not None:
            mean, std = torch.tensor(known.mean), torch.tensor(known.std)
            normalisation = 1 / (255 * std), -mean / std
        names = known.class_names
        metadata |= {"class_names": list(names), "tasks": known.names_of_tasks(), "target": known.target}
    data = spnet_bytes(layers_of(compact(network_of(model)), shape), shape, normalisation, names, metadata, values)
    with whole_file(path) as part:
        part.write_bytes(data)
    return len(data)


def _refuse_other_answers(model: nn.Module, shape: Sequence[int]) -> None:
    """Of modules that choose among subnetworks, or classify by a memory, the network is not all."""
    network = network_of(model)
    if network is model:
        return
    weight, training = next(network.parameters()), {m: m.training for m in model.modules()}
    images = torch.rand(2, *shape, device=weight.device, dtype=weight.dtype)
    model.eval()
    with torch.no_grad():
        found, own = model(images), network(images)
    for module, was in training.items():
        module.training = was
    if found.shape != own.shape or not torch.allclose(found, own, rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"export_spnet({type(model).__name__}): it does not answer by its network alone, but by subnetworks or a "
            "memory; export the network that you mean"
        )


def write_runtime(folder: str | os.PathLike) -> list[Path]:
    """Write the runtime's source into a folder: ``spnet.h`` and ``spnet.cpp``, C++17 without dependencies.

    ``c++ -std=c++17 -O3 -march=native -pthread -c spnet.cpp`` compiles it. Beside them is ``example.c``, a program that
    says what images show.
    """
    source = (HERE / "spnet.cpp").read_text()
    kernels = (HEADERS / "convolve.h").read_text()
    Path(folder).mkdir(parents=True, exist_ok=True)
    texts = {name: (HERE / name).read_text() for name in ("spnet.h", "example.c")}
    texts |= {"spnet.cpp": source.replace('#include "convolve.h"', kernels)}
    for file, text in texts.items():
        with whole_file(Path(folder, file)) as part:
            part.write_text(text)
    return [Path(folder, file) for file in texts]
