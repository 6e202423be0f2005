"""Inference of sparse networks: one call of C++ beside ONNX Runtime, the kernels inside PyTorch, and dense PyTorch.

ResNet-18 of width 64 and 16 and SmallCNN(32) for 32x32 images, SmallCNN(32) for 8x8; uniform random masks on all
convolutions but the first. "flat" is FlatNetwork, "kernels" is accelerate layer by layer, "dense" the fastest of eager
and compiled PyTorch, NCHW and channels_last; ONNX Runtime gets what torch exports. All in float32, in turn in one
process; medians.

python benchmarks/deploy.py [--quick]

Needs onnx, onnxscript and onnxruntime.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable
from typing import Any

import harness
import numpy as np
import onnxruntime
import torch
from rich.progress import Progress
from sparse_speed import in_turn
from torch import Tensor, nn

import lightning_sparse_cl as scl

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ResNet-18 width 64": (lambda: scl.ResNet18(64), 32),
    "ResNet-18 width 16": (lambda: scl.ResNet18(16), 32),
    "SmallCNN, 32x32": (lambda: scl.SmallCNN(32), 32),
    "SmallCNN, 8x8": (lambda: scl.SmallCNN(32), 8),
}
FIGURES = ("flat_ms", "onnxruntime_ms", "kernels_ms", "dense_ms")


def network(name: str, sparsity: float) -> tuple[nn.Module, int]:
    """A pruned network with a head of ten classes and some batch-norm statistics; and the side of its images."""
    make, side = NETWORKS[name]
    torch.manual_seed(0)
    net = nn.Sequential(make(), nn.LazyLinear(10)).train()
    with torch.no_grad():
        net(torch.randn(32, 3, side, side))
    generator = torch.Generator().manual_seed(1)
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    for module in convolutions[1:]:
        order = torch.randperm(module.weight.numel(), generator=generator)
        alive = order < round((1 - sparsity) * module.weight.numel())
        module.weight.data.mul_(alive.view(module.weight.shape))
    return net.eval().requires_grad_(False), side


def inference(run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    def go() -> Tensor:
        with torch.no_grad():
            return run(x)

    return go


def by_onnx_runtime(net: nn.Module, x: Tensor, threads: int) -> Callable[[], list[np.ndarray]]:
    file, options = io.BytesIO(), onnxruntime.SessionOptions()
    torch.onnx.export(net, (x,), file, dynamo=True, verbose=False)
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, given)


def candidates(name: str, batch: int, threads: int, sparsity: float, compiles: bool) -> dict[str, Callable[[], Any]]:
    """The ways to run that take turns."""
    net, side = network(name, sparsity)
    x = torch.randn(batch, 3, side, side)
    found: dict[str, Callable[[], Any]] = {"onnxruntime_ms": by_onnx_runtime(net, x, threads)}
    flat = scl.FlatNetwork.of(net, x.shape[1:])
    found["flat_ms"] = lambda: flat(x)
    for layout in (torch.contiguous_format, torch.channels_last):
        own, given = network(name, sparsity)[0].to(memory_format=layout), x.to(memory_format=layout)
        found[f"eager {layout}"] = inference(own, given)
        if compiles:
            found[f"compiled {layout}"] = inference(torch.compile(own), given)
    scl.accelerate(net, in_one_call=False)
    return found | {"kernels_ms": inference(net, x)}


def row(name: str, batch: int, threads: int, sparsity: float, rounds: int, compiles: bool) -> dict[str, Any]:
    torch.set_num_threads(threads)
    torch.compiler.reset()
    runs = candidates(name, batch, threads, sparsity, compiles)
    outputs = {n: torch.as_tensor(run()[0] if n == "onnxruntime_ms" else run()) for n, run in runs.items()}
    for found in outputs.values():
        torch.testing.assert_close(found, outputs["eager torch.contiguous_format"], rtol=1e-3, atol=1e-4)
    times = in_turn(runs, rounds, lambda: None, pause=0.3 if threads > 1 else 0)  # ONNX Runtime's threads spin
    dense = min((n for n in runs if not n.endswith("_ms")), key=lambda n: statistics.median(times[n]))
    times["dense_ms"] = times[dense]
    figures = {figure: round(statistics.median(times[figure]), 4) for figure in FIGURES}
    faster = {
        f"flat to {of}": round(statistics.median(t / f for t, f in zip(times[of + "_ms"], times["flat_ms"])), 2)
        for of in ("onnxruntime", "dense")
    }
    about = {"network": name, "batch": batch, "threads": threads, "sparsity": sparsity}
    return about | figures | {"dense": dense.replace("torch.", "")} | faster


def main() -> None:
    args = harness.arguments(__doc__ or "")
    torch._inductor.config.freezing = True  # constants are folded
    sparsities, threads, rounds = ([0.9], [1], 3) if args.quick else ([0.75, 0.9, 0.95], [1, 2], 7)
    jobs = [(n, b, t, s) for n in NETWORKS for b in (1, 32) for t in threads for s in sparsities]
    rows = []
    with Progress() as progress:
        task = progress.add_task("rows", total=len(jobs))
        for job in jobs:
            rows.append(row(*job, rounds, not args.quick))
            progress.advance(task)
    harness.show("Inference, milliseconds a call", rows, list(rows[0]))
    if not args.quick:
        harness.save("deploy", rows, onnxruntime=onnxruntime.__version__)


if __name__ == "__main__":
    main()
