"""What a trained network costs with each way to run it, and how large the runtime is.

EsaCL on Split Digits (SmallCNN(32), 80 % pruned, 20 epochs per task), profiled on one CPU thread; the bytes of code and
data of spnet.cpp, compiled by the C++ compilers found, with several options.

python benchmarks/ways_to_run.py [--quick]

Needs onnx, onnxscript and onnxruntime.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import harness
import lightning.pytorch as pl
import torch
from rich.progress import Progress

import lightning_sparse_cl as scl

COMPILED = {
    "x86-64, three kinds of vectors, -O3": ("g++", "size", ["-O3"]),
    "x86-64, three kinds of vectors, -O2": ("g++", "size", ["-O2"]),
    "x86-64, AVX-512 alone, -O2": ("g++", "size", ["-O2", "-march=skylake-avx512"]),
    "x86-64, AVX2 alone, -O2": ("g++", "size", ["-O2", "-mavx2", "-mfma"]),
    "ARM64, -O2": ("aarch64-linux-gnu-g++", "aarch64-linux-gnu-size", ["-O2"]),
}


def code_size(compiler: str, size: str, options: list[str], folder: Path) -> int | None:
    """Bytes of code and data of the runtime. None if there is no such compiler."""
    if shutil.which(compiler) is None:
        return None
    order = [compiler, "-std=c++17", *options, "-c", "spnet.cpp", "-o", "spnet.o"]
    subprocess.run(order, cwd=folder, check=True)
    told = subprocess.run([size, "spnet.o"], cwd=folder, check=True, capture_output=True, text=True).stdout
    text, data, *_ = map(int, told.splitlines()[1].split()[:2])
    return text + data


def main() -> None:
    args = harness.arguments(__doc__ or "")
    pl.seed_everything(0, verbose=False)
    module, data = (
        scl.EsaCL(scl.SmallCNN(32), scl.DERpp(200, 16, forward="joint"), 0.8),
        scl.SplitDigits(5, batch_size=32),
    )
    harness.quiet()
    harness.fit(module, data, 2 if args.quick else 20)
    stored, labels = (torch.cat([getattr(d, part) for d in data.test_sets]) for part in ("inputs", "labels"))
    seen = torch.cat([d.inputs[:52] for d in data.train_sets])
    sizes: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder, Progress() as progress:
        task = progress.add_task("sizes", total=len(COMPILED))
        scl.write_runtime(folder)
        for how, (compiler, size, options) in COMPILED.items():
            if (found := code_size(compiler, size, options, Path(folder))) is not None:
                sizes.append({"compiled": how, "kB": round(found / 1000, 1)})
            progress.advance(task)
        progress.update(task, total=1, completed=0)
        rows = scl.profile_model(
            module, stored, labels, folder, seen, seconds=0.05 if args.quick else 0.5,
            progress=lambda text: progress.update(task, description=text),
        )  # fmt: skip
    harness.show("The runtime", sizes, ["compiled", "kB"], plain=["kB"])
    if not args.quick:
        harness.save("ways_to_run", rows, sizes=sizes)


if __name__ == "__main__":
    main()
