"""What a trained network costs where it is used: size, memory and time of each way to run it, and its accuracy."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_sparse_cl.deploy.export import Exportable
from lightning_sparse_cl.deploy.profile_picture import draw_bars
from lightning_sparse_cl.kernels.build import compiled
from lightning_sparse_cl.runtime.flat import SOURCE
from lightning_sparse_cl.whole_file import whole_file

MEASURED = Path(__file__).with_name("measured.py")
BATCHES = (1, 32)
ROUNDS = 5
WAYS = {  # title: way, file, type of the values
    "PyTorch, eager": ("eager", "network.pt", "float32"),
    "PyTorch, compiled": ("compiled", "network.pt", "float32"),
    "PyTorch, exported": ("exported", "model.pt2", "float32"),
    "PyTorch, sparse kernels": ("kernels", "network.pt", "float32"),
    "FlatNetwork": ("flat", "model.spnet", "float32"),
    "C runtime": ("runtime", "model.spnet", "float32"),
    "C runtime, bfloat16": ("runtime", "model.bfloat16.spnet", "bfloat16"),
    "C runtime, int8": ("runtime", "model.int8.spnet", "int8"),
    "ONNX Runtime": ("onnxruntime", "model.onnx", "float32"),
    "ONNX Runtime, float16": ("onnxruntime", "model.float16.onnx", "float16"),
    "ONNX Runtime, int8": ("onnxruntime", "model.int8.onnx", "int8"),
}


def profile_model(
    model: nn.Module,
    samples: Tensor,
    labels: Tensor | None = None,
    folder: str | os.PathLike = "profile",
    calibration: Tensor | None = None,
    task: int | None = None,
    ways: Sequence[str] | None = None,
    threads: int = 1,
    seconds: float = 0.5,
    progress: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Measure size, memory, time and accuracy of a trained network for each way to run it, before shipping it.

    Each way has a process of its own, which loads nothing else. They are timed in turn, one at a time, in five rounds.
    The measured files are written into the folder, with ``profile.json`` and ``profile.png``; a table is printed.

    Args:
        model, task: see :func:`~lightning_sparse_cl.export_model`.
        samples: samples to test on, as they were stored, such as images (N, C, H, W).
        labels: their labels (N,). If None, or not classes, there is no accuracy.
        folder: the folder; it is made if it is missing.
        calibration: training samples, as they were stored, for int8 ONNX models. If None, these are left out.
        ways: some of :data:`WAYS`. If None, all.
        threads: number of threads per process.
        seconds: for how long each way is timed per round and size of batch.
        progress: called with a line on what is being done.

    Returns:
        A row per way: ``way``, ``file``, ``bytes``; ``accuracy``; ``difference``, the largest difference from the
        model's outputs, over the largest output; ``peak_mb``, the peak of the whole process, and ``own_mb``, without
        the libraries; ``batch_1_ms`` and ``batch_32_ms``, each with ``median`` and ``p90`` of a call. A way that cannot
        be run has a ``note`` in their place.

    Raises:
        ValueError: if a way is unknown, there are no samples, or the module cannot be exported at all.
    """
    wanted = list(WAYS) if ways is None else list(ways)
    if unknown := [way for way in wanted if way not in WAYS]:
        raise ValueError(f"profile_model(ways={unknown}): the ways are {', '.join(map(repr, WAYS))}")
    if not len(samples) or not wanted:
        raise ValueError(f"profile_model: there are {len(samples)} samples and {len(wanted)} ways; both are needed")
    if labels is not None and len(labels) != len(samples):
        raise ValueError(f"profile_model: there are {len(samples)} samples, but {len(labels)} labels")
    if threads < 1 or not seconds > 0:
        raise ValueError(f"profile_model(threads={threads}, seconds={seconds}): both are greater than 0")
    what = Exportable.of(model, None if hasattr(model, "data_description") else samples.shape[1:], task)
    if tuple(samples.shape[1:]) != what.shape or (samples.dtype == torch.uint8) != what.as_bytes:
        raise ValueError(
            f"profile_model: samples are {samples.dtype} {tuple(samples.shape)}, but the network takes "
            f"{'uint8' if what.as_bytes else 'floats'} (N, {', '.join(map(str, what.shape))})"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    given = what.given(samples)
    with torch.no_grad():
        answers = torch.cat([what.whole()(x) for x in given.split(BATCHES[-1])]).numpy()
    measured = [_Measured(way, folder) for way in wanted]
    try:
        for way in measured:
            progress(way.title)
            way.begin(what, calibration, threads)
        for way in measured:
            progress(f"{way.title}: outputs")
            way.compare(given.numpy(), answers, _targets(what, labels))
        for turn in range(ROUNDS):
            for way in measured:
                progress(f"{way.title}: round {turn + 1} of {ROUNDS}")
                way.time(given.numpy(), seconds)
        rows = [way.row() for way in measured]
    finally:
        for way in measured:
            way.end()
    about = {"model": what.metadata, "samples": len(samples), "threads": threads, "rows": rows}
    with whole_file(folder / "profile.json") as part:
        part.write_text(json.dumps(about, indent=1) + "\n")
    with whole_file(folder / "profile.png") as part:
        _draw(rows, part)
    show(rows)
    return rows


@dataclass
class _Measured:
    """One way to run the network, and its process."""

    title: str
    folder: Path
    note: str | None = None
    found: dict[str, Any] = field(default_factory=dict)
    times: dict[int, list[float]] = field(default_factory=lambda: {batch: [] for batch in BATCHES})
    process: subprocess.Popen | None = None
    pipe: Any = None

    def begin(self, what: Exportable, calibration: Tensor | None, threads: int) -> None:
        """Write the file, and start the process."""
        way, name, values = WAYS[self.title]
        path, library = self.folder / name, ""
        try:
            if way == "runtime":
                library = str(compiled(SOURCE, torch_threads=False))
            if name.endswith(".pt"):
                with whole_file(path) as part:
                    torch.save(what.whole(), part)
            else:
                what.write(path, values, calibration)
        except Exception as error:  # the user's network: the note says what cannot be written
            self.note = " ".join(str(error).split())[:300]
            return
        self.found = {"file": name, "bytes": path.stat().st_size}
        self.pipe, theirs = Pipe()
        start = f"import runpy; runpy.run_path({str(MEASURED)!r}, run_name='__main__')"
        order = [sys.executable, "-c", start, way, str(path), str(theirs.fileno()), str(threads), library]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            order, pass_fds=[theirs.fileno()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
        )
        theirs.close()
        self._answer()

    def compare(self, samples: np.ndarray, answers: np.ndarray, targets: np.ndarray | None) -> None:
        """Get the outputs for all samples, and compare them with the model's."""
        size, parts = BATCHES[-1], []
        for at in range(0, len(samples), size):
            parts.append(self._ask("outputs", samples[at : at + size]))
        if self.note is not None:
            return
        found = np.concatenate(parts)
        largest = max(float(np.abs(answers).max()), 1e-30)
        self.found["difference"] = float(np.abs(found - answers).max()) / largest
        if targets is not None:
            self.found["accuracy"] = float((found.argmax(1) == targets).mean())

    def time(self, samples: np.ndarray, seconds: float) -> None:
        """One turn."""
        for batch, times in self.times.items():
            x = np.resize(samples, (batch, *samples.shape[1:]))
            times += self._ask("time", x, seconds) or []

    def row(self) -> dict[str, Any]:
        """The measurements of this way."""
        before, most = self._ask("memory") or (0, 0)
        if self.note is not None:
            return {"way": self.title, "note": self.note}
        memory = {"peak_mb": round(most, 1), "own_mb": round(most - before, 1)}
        times = {f"batch_{batch}_ms": _spread(times) for batch, times in self.times.items()}
        return {"way": self.title} | self.found | memory | times

    def end(self) -> None:
        """The process ends when nothing more is asked of it."""
        if self.pipe is not None:
            self.pipe.close()
        if self.process is not None:
            self.process.wait()

    def _ask(self, *command: Any) -> Any:
        if self.note is not None:
            return None
        try:
            self.pipe.send(command)
        except OSError:
            self.note = "its process has ended"
            return None
        return self._answer()

    def _answer(self) -> Any:
        """The process's answer. A text says what went wrong."""
        try:
            found = self.pipe.recv()
        except (EOFError, OSError):
            found = f"its process has ended, with exit status {self.process.wait() if self.process else None}"
        if isinstance(found, str):
            self.note = found
            return None
        return found


def _targets(what: Exportable, labels: Tensor | None) -> np.ndarray | None:
    """The output that should be the largest for each sample."""
    if labels is None or labels.ndim != 1 or what.metadata.get("target", "classes") != "classes":
        return None
    if what.classes is None:
        return labels.numpy()
    return np.array([what.classes.index(c) if c in what.classes else -1 for c in labels.tolist()])


def _spread(times: Sequence[float]) -> dict[str, float]:
    return {"median": round(statistics.median(times), 4), "p90": round(float(np.percentile(times, 90)), 4)}


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows of :func:`profile_model` as a table."""
    table = Table(title="Ways to run the network", title_justify="left")
    batches = [f"batch {b}, ms (90 %)" for b in BATCHES]
    for column in ("", "file, kB", "accuracy, %", "peak, MB", "own, MB", *batches):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        if "note" in row:
            table.add_row(row["way"], "-")
            continue
        times = [f"{row[f'batch_{b}_ms']['median']:.3g} ({row[f'batch_{b}_ms']['p90']:.3g})" for b in BATCHES]
        accuracy = f"{100 * row['accuracy']:.1f}" if "accuracy" in row else "-"
        size = f"{row['bytes'] / 1000:,.1f}"
        table.add_row(row["way"], size, accuracy, f"{row['peak_mb']:.0f}", f"{row['own_mb']:.1f}", *times)
    console = Console(width=max(120, Console().width))
    console.print(table)
    for row in rows:
        if "note" in row:
            console.print(f"{row['way']}: {row['note']}", markup=False, highlight=False)


def _draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    there = [row for row in rows if "note" not in row]
    panels = {f"batch {b}, ms per call": [row[f"batch_{b}_ms"]["median"] for row in there] for b in BATCHES}
    panels |= {"file, kB": [row["bytes"] / 1000 for row in there], "peak, MB": [row["peak_mb"] for row in there]}
    draw_bars([row["way"] for row in there], panels, path)
