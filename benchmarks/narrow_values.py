"""What weights of fewer bits cost: accuracy and size of a trained network, by the type of the values in its file.

EsaCL on Split Digits (SmallCNN(32), 80 % pruned, 20 epochs per task) and SparCL on five tasks of CIFAR-10 (400 images
per class, halved to 16x16 pixels, ResNet-18 of width 16, 90 % pruned, 10 epochs per task). Class-IL accuracy on all
test data; ONNX models of int8 are calibrated with 256 training samples.

python benchmarks/narrow_values.py [--quick] [--root FOLDER]

FOLDER holds CIFAR-10 as torchvision downloads it, or as an image folder {train,test}/<class>/*. Needs onnx, onnxscript
and onnxruntime. Finished runs are kept in benchmarks/results/narrow_values_runs.json; the same command goes on.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import harness
import lightning.pytorch as pl
import onnxruntime
import torch
from esacl_cifar10 import module_of

import lightning_sparse_cl as scl

FILES = {
    "float32": ".spnet", "bfloat16": ".spnet", "int8": ".spnet", "float32 (ONNX)": ".onnx", "float16 (ONNX)": ".onnx",
    "int8 (ONNX)": ".onnx",
}  # fmt: skip


def answered(path: Path, images: torch.Tensor) -> torch.Tensor:
    """The class of each image (N, H, W, C), as the file alone answers."""
    if path.suffix == ".spnet":
        return scl.FlatNetwork.load(path).of_bytes(images).argmax(1)
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"samples": images.numpy()})[0]).argmax(1)


def run(data: str, seed: int, epochs: int, images: str) -> dict[str, Any]:
    """One sequence, and its files."""
    pl.seed_everything(seed, verbose=False)
    if data == "Split Digits":
        module: scl.ContinualModule = scl.EsaCL(scl.SmallCNN(32), scl.DERpp(200, 16, forward="joint"), 0.8)
        tasks: scl.TaskDataModule = scl.SplitDigits(5, batch_size=32)
    else:
        module = module_of("SparCL", 0.9)
        tasks = scl.SplitTensors(*torch.load(images), num_tasks=5, batch_size=32, augment=True)
    harness.fit(module, tasks, epochs)
    given, labels = (torch.cat([getattr(d, part) for d in tasks.test_sets]) for part in ("inputs", "labels"))
    seen = torch.cat([d.inputs[:52] for d in tasks.train_sets])
    found = {}
    with TemporaryDirectory() as folder:
        for title, ending in FILES.items():
            path = Path(folder, f"model{ending}")
            size = scl.export_model(module, path, values=title.split()[0], calibration=seen)
            best = answered(path, given.permute(0, 2, 3, 1).contiguous())
            found[title] = {"accuracy": (best == labels).float().mean().item(), "kB": size / 1000}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/cifar10-images")
    args = harness.arguments(parser)
    seeds, per_class = ([0], 24) if args.quick else (list(range(5)), 400)
    epochs = {"Split Digits": 2 if args.quick else 20, "CIFAR-10": 1 if args.quick else 10}
    jobs = [(data, seed, epochs[data]) for data in epochs for seed in seeds]
    run_all = harness.run_all if args.quick else partial(harness.run_kept, "narrow_values")
    with TemporaryDirectory() as folder:
        images = f"{folder}/images.pt"
        torch.save(harness.halved(args.root, per_class, 100 if args.quick else 500), images)
        results = dict(zip(jobs, run_all(partial(run, images=images), jobs, args.processes), strict=True))
    rows = []
    for data in epochs:
        runs = [results[data, seed, epochs[data]] for seed in seeds]
        for title in FILES:
            lost = [100 * (r["float32"]["accuracy"] - r[title]["accuracy"]) for r in runs]
            accuracy, size = (harness.spread([r[title][key] for r in runs]) for key in ("accuracy", "kB"))
            row = {"data": data, "values": title, "accuracy": accuracy, "points lost": harness.spread(lost), "kB": size}
            rows.append(row)
    harness.show("Fewer bits", rows, list(rows[0]), plain=["points lost", "kB"])
    if not args.quick:
        harness.save("narrow_values", rows, seeds=seeds, onnxruntime=onnxruntime.__version__)


if __name__ == "__main__":
    main()
