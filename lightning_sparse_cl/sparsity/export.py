"""A trained sparse network on disk: its non-zero values and where they are."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_sparse_cl.sparsity.bits import pack, unpack
from lightning_sparse_cl.sparsity.layers import network_of
from lightning_sparse_cl.sparsity.masks import Masks
from lightning_sparse_cl.whole_file import whole_file


def save_sparse(
    model: nn.Module | Mapping[str, Tensor], path: str | os.PathLike, layout: Literal["bitmask", "csr"] = "bitmask"
) -> int:
    """Write the tensors of a network as a sparse ``safetensors`` file.

    Weights with enough zeros are stored as their non-zero values and one bit per weight, or as compressed sparse rows
    (CSR, of the weight as a matrix (outputs, rest)); others are smaller when stored whole. :func:`load_sparse` gives
    back the same bits (a negative zero comes back positive).

    Args:
        model: a network, or its ``state_dict``; entries that are not tensors are left out.
        path: the file; it is replaced at once or not at all.
        layout: how sparse weights are stored. From about 97 % sparsity on, CSR is smaller.

    Returns:
        The size of the file in bytes.

    Raises:
        ValueError: if ``layout`` is neither, or names clash.
        OSError: if the file cannot be written; an earlier one is untouched.
    """
    if layout not in ("bitmask", "csr"):
        raise ValueError(f"save_sparse(layout={layout!r}): layout is 'bitmask' or 'csr'")
    state = model.state_dict() if isinstance(model, nn.Module) else model
    parts: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in state.items():
        if not torch.is_tensor(tensor):
            continue
        whole = tensor.detach().cpu().contiguous()
        sparse = (_to_bits if layout == "bitmask" else _to_csr)(whole) if whole.ndim > 1 else {}
        if sparse and sum(map(_bytes, sparse.values())) < _bytes(whole):
            shapes[name] = list(whole.shape)
            found = {f"{name}:{kind}": part for kind, part in sparse.items()}
        else:
            found = {name: whole.clone()}  # tied weights are no longer one tensor
        if clash := found.keys() & parts.keys():
            raise ValueError(f"save_sparse: {clash.pop()!r} is the name of two parts; rename one entry")
        parts |= found
    path = Path(path)
    shapes_text = json.dumps(shapes, sort_keys=True)
    about = {"layout": layout, "shapes": shapes_text, "sha256": _digest(parts, layout + shapes_text)}
    try:
        with whole_file(path) as part:
            save_file(parts, part, about)
    except SafetensorError as error:
        raise OSError(f"save_sparse({str(path)!r}): not written, {error}; an earlier file is untouched") from error
    return path.stat().st_size


def load_sparse(path: str | os.PathLike, module: nn.Module | None = None) -> dict[str, Tensor]:
    """The dense ``state_dict`` that :func:`save_sparse` has written.

    Args:
        path: the file.
        module: if given, the tensors are loaded into it, and weights that are sparse in the file get :class:`Masks` at
            their zeros, so that they stay pruned in training. (Anything beside its network, such as a memory of
            exemplars, is left as it is.)

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, altered or of another kind, or does not fit the module, which is then left
            as it was.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"load_sparse({str(path)!r}): there is no such file")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it cannot be iterated
    except (SafetensorError, OSError) as error:
        raise ValueError(f"load_sparse({str(path)!r}): truncated, altered or no safetensors file ({error})") from error
    if "sha256" not in about:
        raise ValueError(f"load_sparse({str(path)!r}): not a file of save_sparse")
    if about["sha256"] != _digest(parts, about.get("layout", "") + about.get("shapes", "")):
        raise ValueError(f"load_sparse({str(path)!r}): altered, its checksum does not match")
    shapes = json.loads(about["shapes"])
    bits = about["layout"] == "bitmask"
    dense, kinds = (_from_bits, ("values", "mask")) if bits else (_from_csr, ("values", "columns", "rows"))
    sparse = {name: dense(shape, *(parts.pop(f"{name}:{k}") for k in kinds)) for name, shape in shapes.items()}
    state = parts | sparse
    if module is not None:
        own, needed = module.state_dict(), network_of(module).state_dict()
        if wrong := sorted((needed.keys() - state.keys()) | (state.keys() - own.keys())):
            raise ValueError(
                f"load_sparse({str(path)!r}): the file is from another network than this {type(module).__name__}; "
                f"{wrong[0]} is in one and not in the other"
            )
        for name, tensor in state.items():
            if tensor.shape != own[name].shape:
                raise ValueError(
                    f"load_sparse({str(path)!r}): {name} has shape {tuple(tensor.shape)}, in this "
                    f"{type(module).__name__} {tuple(own[name].shape)}"
                )
        module.load_state_dict(state, strict=False)
        Masks.from_zeros(module, sparse)
    return state


def _to_bits(tensor: Tensor) -> dict[str, Tensor]:
    alive = tensor.flatten() != 0
    return {"values": tensor.flatten()[alive], "mask": pack(alive)}


def _from_bits(shape: list[int], values: Tensor, mask: Tensor) -> Tensor:
    dense = torch.zeros(shape, dtype=values.dtype)
    dense[unpack(mask, shape)] = values
    return dense


def _to_csr(tensor: Tensor) -> dict[str, Tensor]:
    matrix = tensor.flatten(1)
    alive = matrix != 0
    index = torch.int16 if matrix.shape[1] <= 2**15 else torch.int32
    rows = nn.functional.pad(alive.sum(1).cumsum(0), (1, 0)).int()
    return {"values": matrix[alive], "columns": alive.nonzero()[:, 1].to(index), "rows": rows}


def _from_csr(shape: list[int], values: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    dense = torch.zeros(shape, dtype=values.dtype)
    row = torch.arange(shape[0]).repeat_interleave(rows.long().diff())
    dense.flatten(1)[row, columns.long()] = values
    return dense


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _digest(parts: Mapping[str, Tensor], about: str) -> str:
    digest = hashlib.sha256(about.encode())
    for name in sorted(parts):
        part = parts[name].contiguous()
        digest.update(f"{name} {part.dtype} {tuple(part.shape)}".encode())
        digest.update(part.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
