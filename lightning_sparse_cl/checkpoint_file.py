"""A checkpoint as a file: written whole or not at all, sealed by a checksum, and checked wherever it is read."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_sparse_cl.whole_file import whole_file

SEAL = b"lightning_sparse_cl sha256 "
"""What the comment at the end of a sealed archive begins with; the digest of all bytes before the comment follows."""
SEALED = "sealed"
"""Entry of every checkpoint that is written with a seal, so that a lost seal is noticed."""
_LENGTH = len(SEAL) + hashlib.sha256().digest_size * 2


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, and reads only what was written.

    Lightning's own class writes to the folder for temporary files first; if that is on another disk, the last step is a
    copy that can be cut off. It also reads altered bytes without complaint.

    Args:
        resuming: whether checkpoints are read to train on, and not only to test.
    """

    def __init__(self, resuming: bool = False) -> None:
        super().__init__()
        self.resuming = resuming

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write beside ``path``, then rename.

        Raises:
            OSError: if the file cannot be written, for example to a full disk; ``path`` is left as it was.
        """
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        buffer = io.BytesIO()
        torch.save(checkpoint | {SEALED: True}, buffer)
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as part, part.open("wb") as file:
                _write_sealed(buffer, file)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(f"checkpoint {path}: {error.strerror or error}; earlier checkpoints are untouched") from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read ``path``.

        Raises:
            ValueError: if the file is missing, truncated, altered or no checkpoint, or lacks what a fit needs.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only)
        found = read_checkpoint(path, map_location, weights_only is not False)
        if self.resuming and (missing := {"callbacks", "loops", "optimizer_states"} - found.keys()):
            raise ValueError(
                f"checkpoint {path}: it has no {' and no '.join(sorted(missing))}, as one of save_weights_only; a fit "
                "cannot go on from it"
            )
        return found


def read_checkpoint(
    path: str | Path, map_location: Any = "cpu", weights_only: bool = True, mmap: bool = False
) -> dict[str, Any]:
    """The contents of a checkpoint file, after its checksums have been compared.

    Args:
        path: the file.
        map_location: as for ``torch.load``.
        weights_only: as for ``torch.load``.
        mmap: leave the tensors on disk, for callers that need only the rest.

    Raises:
        ValueError: if the file is missing, truncated, altered or no checkpoint of Lightning.
    """
    sealed = _check_sums(Path(path))
    try:
        found = torch.load(path, map_location=map_location, weights_only=weights_only, mmap=mmap)
    except Exception as error:  # an unpickler raises anything
        raise ValueError(f"checkpoint {path}: this file is no checkpoint ({type(error).__name__})") from error
    if not isinstance(found, dict) or not isinstance(found.get("state_dict"), dict):
        raise ValueError(f"checkpoint {path}: this file is no checkpoint of Lightning")
    if found.get(SEALED) and not sealed:
        raise ValueError(f"checkpoint {path}: this file is altered: it has lost the seal that it was written with")
    return found


def _write_sealed(buffer: io.BytesIO, file: BinaryIO) -> None:
    """Write a zip archive, which ``torch.save`` makes without a comment, with the seal as its comment."""
    archive = buffer.getbuffer()
    archive[-2:] = _LENGTH.to_bytes(2, "little")  # an archive ends with the length of its comment
    file.write(archive)
    file.write(SEAL + hashlib.sha256(archive).hexdigest().encode())


def _check_sums(path: Path) -> bool:
    """Compare the seal, or without one the archive's own checksums; returns whether the file has a seal.

    Raises:
        ValueError: if the file is missing or does not match.
    """
    if path.is_dir():
        raise ValueError(f"checkpoint {path}: this is a folder; give a file in it")
    if not path.is_file():
        raise ValueError(f"checkpoint {path}: this file is not there")
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _LENGTH, 0))
        comment = file.read()
        if comment.startswith(SEAL):
            found, left = hashlib.sha256(), size - _LENGTH
            file.seek(0)
            while left > 0:
                found.update(block := file.read(min(left, 1 << 20)))
                left -= len(block)
            if found.hexdigest().encode() != comment.removeprefix(SEAL):
                raise ValueError(f"checkpoint {path}: this file is altered: its checksum does not match")
            return True
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:  # of a damaged archive, zipfile raises anything
        raise ValueError(
            f"checkpoint {path}: this file is truncated, altered or no checkpoint ({type(error).__name__})"
        ) from error
    if broken is not None:
        raise ValueError(f"checkpoint {path}: this file is altered: the checksum of {broken} does not match")
    return False
