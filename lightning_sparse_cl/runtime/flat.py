"""A network for inference in one call, without Python between its layers."""

from __future__ import annotations

import ctypes
import json
import os
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse_cl.kernels.build import KernelsUnavailable, compiled
from lightning_sparse_cl.runtime.description import layers_of, refuse_hooks
from lightning_sparse_cl.runtime.file import spnet_bytes

SOURCE = Path(__file__).with_name("spnet.cpp")


class FlatNetwork:
    """A trained sparse network that one call of C++ runs: layers, layout and memory are planned beforehand.

    It has the weights of the time when it was made; zeros are not multiplied. Compared with
    :func:`~lightning_sparse_cl.acceleration.accelerate`, which follows a network that goes on training, nothing is
    checked or looked up between the layers: on small networks and single images that is most of the time. Calls from
    several threads wait for each other; within a call, torch's threads are used. There are no gradients.

    Args:
        data: the contents of a .spnet file; see :meth:`of` for a network.

    Raises:
        ValueError: if the data are damaged, or from a newer version.
        KernelsUnavailable: if the runtime cannot be compiled here.
    """

    def __init__(self, data: bytes) -> None:
        self._runtime, self._handle = _runtime(), ctypes.c_void_p()
        self._data, self._lock = data, threading.Lock()
        self._check(self._runtime.spnet_read(data, len(data), ctypes.byref(self._handle)))
        self._run = self._runtime.spnet_run
        shape = (ctypes.c_int64 * 3)()
        self._runtime.spnet_shape(self._handle, shape)
        self.shape: tuple[int, ...] = tuple(shape)
        """(C, H, W) of an image."""
        self.outputs = int(self._runtime.spnet_outputs(self._handle))
        """Number of outputs per image."""
        self.metadata: dict[str, Any] = json.loads(self._runtime.spnet_metadata(self._handle))
        """Further data of the file, such as ``class_names``."""

    @classmethod
    def load(cls, path: str | os.PathLike) -> FlatNetwork:
        """From a file of :func:`~lightning_sparse_cl.export_model`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged, or from a newer version.
            KernelsUnavailable: if the runtime cannot be compiled here.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"FlatNetwork.load({str(path)!r}): there is no such file")
        return cls(Path(path).read_bytes())

    @classmethod
    def of(cls, network: nn.Module, shape: Sequence[int]) -> FlatNetwork:
        """From a network in eval mode, for images of the given shape (C, H, W).

        Raises:
            ValueError: if the network does something that the runtime cannot; the error names it.
            KernelsUnavailable: if the runtime cannot be compiled here.
        """
        refuse_hooks(network)
        return cls.opened(spnet_bytes(layers_of(network, shape), shape), type(network).__name__)

    @classmethod
    def opened(cls, data: bytes, name: str) -> FlatNetwork:
        """From the data of a network that was just described.

        Raises:
            ValueError: if the runtime has a layer of this kind, but not of this size.
        """
        try:
            return cls(data)
        except ValueError as error:
            reason = str(error).removeprefix("spnet: the file is damaged: ")
            raise ValueError(f"{name}: the runtime cannot run it: {reason}; use torch.export (.pt2)") from error

    def __call__(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W), float32 on the CPU, to (B, outputs).

        Raises:
            ValueError: if the images have another shape or type.
        """
        if x.shape[1:] != self.shape or x.dtype != torch.float32 or not x.is_cpu:
            raise ValueError(
                f"FlatNetwork: it takes float32 images (B, {', '.join(map(str, self.shape))}) on the CPU, and got "
                f"{x.dtype} {tuple(x.shape)} on {x.device}"
            )
        last = False
        if not x.is_contiguous():
            last = x.is_contiguous(memory_format=torch.channels_last)
            x = x if last else x.contiguous()
        count = x.shape[0]
        y = torch.empty(count, self.outputs)
        if count:
            with self._lock:
                failed = self._run(self._handle, x.data_ptr(), count, last, y.data_ptr())
            if failed:
                self._check(failed)
        return y

    def of_bytes(self, images: Tensor) -> Tensor:
        """Images (B, H, W, C), uint8 as image files give them, to (B, outputs); they are normalised as in training.

        Raises:
            ValueError: if the images have another shape or type.
        """
        c, h, w = self.shape
        if images.shape[1:] != (h, w, c) or images.dtype != torch.uint8 or images.device.type != "cpu":
            raise ValueError(
                f"FlatNetwork: it takes uint8 images (B, {h}, {w}, {c}) on the CPU, and got {images.dtype} "
                f"{tuple(images.shape)} on {images.device}"
            )
        images, y = images.contiguous(), torch.empty(len(images), self.outputs)
        if len(images):
            with self._lock:
                failed = self._runtime.spnet_run_bytes(self._handle, images.data_ptr(), len(images), y.data_ptr())
            self._check(failed)
        return y

    def __reduce__(self) -> Any:  # each copy makes its own plan
        return FlatNetwork, (self._data,)

    def _check(self, code: int) -> None:
        if code:
            raise ValueError(f"spnet: {self._runtime.spnet_error().decode()}")

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._runtime.spnet_close(self._handle)


@cache
def _runtime() -> ctypes.CDLL:
    path = compiled(SOURCE)
    try:
        found = ctypes.CDLL(str(path))
        n, p = ctypes.c_int64, ctypes.c_void_p
        found.spnet_read.argtypes = [ctypes.c_char_p, ctypes.c_size_t, p]
        found.spnet_run.argtypes = [p, p, n, ctypes.c_int, p]
        found.spnet_run_bytes.argtypes = [p, p, n, p]
        found.spnet_shape.argtypes = [p, p]
        found.spnet_outputs.argtypes, found.spnet_outputs.restype = [p], n
        found.spnet_metadata.argtypes, found.spnet_metadata.restype = [p], ctypes.c_char_p
        found.spnet_error.argtypes, found.spnet_error.restype = [], ctypes.c_char_p
        found.spnet_close.argtypes, found.spnet_close.restype = [p], None
    except (OSError, AttributeError) as error:
        path.unlink(missing_ok=True)  # compiled anew next time
        raise KernelsUnavailable(f"spnet: {path} cannot be loaded ({error}); it is removed") from error
    return found
