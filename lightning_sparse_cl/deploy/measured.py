"""One way of running a trained network, in a process of its own that loads nothing else; :mod:`profiling` drives it.

Run as a script: ``measured.py WAY FILE PIPE THREADS LIBRARY``. It reads commands from the pipe: ``("outputs", x)``
returns the outputs for a batch, ``("time", x, seconds)`` the milliseconds of calls, ``("memory",)`` megabytes.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

Run = Callable[[np.ndarray], np.ndarray]


def by_torch(way: str, file: str, threads: int, ready: Callable[[], None]) -> Run:
    import torch

    torch.set_num_threads(threads)
    network: Any
    if way == "exported":
        ready()
        network = torch.export.load(file).module()
    else:
        import lightning_sparse_cl as scl  # the file needs it

        ready()
        network = torch.load(file, weights_only=False)  # the parent has just written it
        if way == "kernels":
            scl.accelerate(getattr(network, "network", network))
        if way == "compiled":
            network = torch.compile(network)

    def run(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return network(torch.from_numpy(x)).numpy()

    return run


def by_flat(file: str, threads: int, ready: Callable[[], None]) -> Run:
    import torch

    import lightning_sparse_cl as scl

    torch.set_num_threads(threads)
    ready()
    flat = scl.FlatNetwork.load(file)

    def run(x: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(x)
        return (flat.of_bytes(tensor) if tensor.dtype == torch.uint8 else flat(tensor)).numpy()

    return run


def by_onnx_runtime(file: str, threads: int, ready: Callable[[], None]) -> Run:
    import onnxruntime

    ready()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def by_runtime(file: str, threads: int, library: str, ready: Callable[[], None]) -> Run:
    """The C runtime, without torch."""
    ready()
    runtime, network = ctypes.CDLL(library), ctypes.c_void_p()
    runtime.spnet_error.restype, runtime.spnet_outputs.restype = ctypes.c_char_p, ctypes.c_int64
    runtime.spnet_threads(threads)
    if runtime.spnet_open(file.encode(), ctypes.byref(network)):
        raise ValueError(runtime.spnet_error().decode())
    outputs = runtime.spnet_outputs(network)

    def run(x: np.ndarray) -> np.ndarray:
        x, y = np.ascontiguousarray(x), np.empty((len(x), outputs), np.float32)
        count, given, found = (
            ctypes.c_int64(len(x)),
            x.ctypes.data_as(ctypes.c_void_p),
            y.ctypes.data_as(ctypes.c_void_p),
        )
        if x.dtype == np.uint8:
            failed = runtime.spnet_run_bytes(network, given, count, found)
        else:
            failed = runtime.spnet_run(network, given, count, 0, found)
        if failed:
            raise ValueError(runtime.spnet_error().decode())
        return y

    return run


def megabytes(which: str) -> float:
    """Memory of this process: ``VmRSS`` now, ``VmHWM`` at its peak. NaN if the system does not say."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) / 1000 for line in status if line.startswith(which))
    except (OSError, StopIteration):
        return float("nan")


def timed(run: Run, x: np.ndarray, seconds: float) -> list[float]:
    """Milliseconds of each call, repeated for ``seconds`` and at least three times."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run(x)
        times.append(1000 * (time.perf_counter() - start))
    return times


def main(way: str, file: str, pipe: str, threads: str, library: str) -> None:
    connection, before = Connection(int(pipe)), [0.0]

    def ready() -> None:
        before[0] = megabytes("VmRSS")

    commands: dict[str, Callable[..., Any]] = {"memory": lambda: (before[0], megabytes("VmHWM"))}
    try:
        if way == "onnxruntime":
            run = by_onnx_runtime(file, int(threads), ready)
        elif way == "flat":
            run = by_flat(file, int(threads), ready)
        elif way == "runtime":
            run = by_runtime(file, int(threads), library, ready)
        else:
            run = by_torch(way, file, int(threads), ready)
        commands |= {"outputs": run, "time": lambda x, seconds: timed(run, x, seconds)}
        connection.send(None)
        while True:
            name, *arguments = connection.recv()
            connection.send(commands[name](*arguments))
    except EOFError:  # the parent has closed the pipe
        return
    except Exception as error:  # any way may raise anything
        connection.send(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
