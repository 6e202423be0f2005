"""The .spnet file: a network's layers and the alive values of its weights, for a runtime without Python.

Little-endian. A header of 64 bytes: ``SPNET`` and three bytes, version, size of the file, CRC-32 of all that follows;
channels, height and width of an image, number of layers, bytes of metadata, whether bytes are normalised, bytes of
names, zero. If they are normalised, a factor and a summand per channel. Then the layers (88 bytes each, see ``Layer``
in spnet.cpp), metadata as JSON, names of the outputs, each followed by a zero, and what layers point to: a bit per
weight, the values where bits are set (float32, bfloat16, or int8 with a factor per output channel), and biases.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from lightning_sparse_cl.runtime.description import KINDS, Layer
from lightning_sparse_cl.sparsity.bits import pack

VERSION = 1
TYPES = ("float32", "bfloat16", "int8")
HEADER, LAYER, SUMMED_FROM = struct.Struct("<8s3Q8I"), struct.Struct("<12i2f4Q"), 32


def spnet_bytes(
    layers: Sequence[Layer],
    shape: Sequence[int],
    normalisation: tuple[Tensor, Tensor] | None = None,
    names: Sequence[str] = (),
    metadata: Mapping[str, Any] | None = None,
    values: str = "float32",
) -> bytes:
    """A network as the bytes of a .spnet file.

    Args:
        layers: see :func:`~lightning_sparse_cl.runtime.description.layers_of`.
        shape: (C, H, W) of an image.
        normalisation: factor and summand (C,) that turn bytes into network input. If None, bytes are divided by 255.
        names: names of the outputs.
        metadata: further data to keep in the file.
        values: type of the weights in the file. Zeros stay zeros; sums are taken in float32.

    Raises:
        ValueError: if ``values`` is not such a type.
    """
    if values not in TYPES:
        raise ValueError(f"spnet_bytes(values={values!r}): values are {', '.join(TYPES)}")
    about = json.dumps(dict(metadata or {})).encode()
    normalised = b"" if normalisation is None else b"".join(_raw(t.float()) for t in normalisation)
    called = b"".join(name.replace("\0", "").encode(errors="replace") + b"\0" for name in names)
    begin = HEADER.size + len(normalised) + len(layers) * LAYER.size + len(about) + len(called)
    records, blob, at = [], [b"\0" * (-begin % 8)], begin + -begin % 8

    def put(part: bytes) -> int:
        nonlocal at
        where, padded = at, part + b"\0" * (-len(part) % 8)
        blob.append(padded)
        at += len(padded)
        return where

    for layer in layers:
        mask = alive = rest = count = 0
        kind = TYPES.index(values) if layer.weight is not None else 0
        if layer.weight is not None:
            assert layer.bias is not None
            whole = layer.weight.contiguous()
            bits, factors = whole != 0, b""
            found: Tensor = whole[bits]
            if values == "bfloat16":
                found = found.bfloat16().view(torch.int16)
            elif values == "int8":
                most = whole.flatten(1).abs().amax(1).clamp(min=1e-30)
                scale = (most / 127).view(-1, *[1] * (whole.ndim - 1))
                found, factors = (whole / scale).round()[bits].to(torch.int8), _raw(most / 127)
            mask, alive, count = put(_raw(pack(bits))), put(_raw(found)), len(found)
            rest = put(_raw(layer.bias) + factors)
        elif layer.scale is not None and layer.bias is not None:
            rest = put(_raw(layer.scale) + _raw(layer.bias))
        records.append(
            LAYER.pack(
                KINDS.index(layer.kind), layer.input, -1 if layer.other is None else layer.other, layer.kernel,
                layer.stride, layer.padding, layer.dilation, layer.groups, layer.inputs, layer.outputs, kind,
                int(layer.rectified), layer.low, layer.high, mask, count, alive, rest,
            )
        )  # fmt: skip
    sizes = (*shape, len(layers), len(about), int(normalisation is not None), len(called), 0)
    body = struct.pack("<8I", *sizes) + normalised + b"".join(records) + about + called + b"".join(blob)
    size = SUMMED_FROM + len(body)
    return struct.pack("<8s3Q", b"SPNET\r\n", VERSION, size, crc32(body)) + body


def _raw(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()
