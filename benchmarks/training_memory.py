"""Peak memory of a training step of masked networks with the sparse kernels, beside the dense network, and what it is.

ResNet-18 of width 64 for 32x32 images, batches of 32, SGD with momentum; uniform random masks on all convolutions but
the stem. Each row is a process of its own; three steps, one thread. "process" is the most that the process held during
the third step, above what it had after its imports, the median and range of three processes; the kinds of tensors are
those that exist between its forward and its backward pass, and the gradients after it. It needs Linux.

python benchmarks/training_memory.py [--quick]
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import harness
import torch
from sparse_speed import masks, network
from torch import Tensor
from torch.nn import functional as F

import lightning_sparse_cl as scl
from lightning_sparse_cl.kernels.pattern import Pattern

SPARSITIES = (0.75, 0.9, 0.95)


def held(what: str) -> float:
    """MB of the process now (``VmRSS``), or at most since :func:`forget` (``VmHWM``)."""
    found = re.search(rf"{what}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1e3 if found else float("nan")


def forget() -> None:
    """Give freed memory back, and forget what the process held at most."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def size(tensors: Iterable[Tensor], seen: set[int]) -> float:
    """MB of the memory of tensors, which others may share, without what was ``seen`` before."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total / 1e6


def lists() -> list[Tensor]:
    """What the kernels know of masks."""
    found = [v for p in gc.get_objects() if isinstance(p, Pattern) for v in vars(p).values()]
    return [t for v in found for t in (v.values() if isinstance(v, dict) else [v]) if isinstance(t, Tensor)]


def run(way: str, sparsity: float, batch: int) -> dict[str, Any]:
    """Three steps."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.randn(64, 64) @ torch.randn(64, 64)
    start = held("VmRSS")
    net, x, y = network().train(), torch.randn(batch, 3, 32, 32), torch.arange(batch) % 10
    sgd = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    kernels = scl.accelerate(net, masks(net, sparsity), [sgd]) if way == "kernels" else None
    saved: list[Tensor] = []
    kinds: dict[str, float] = {}
    for _ in range(3):
        saved.clear()
        if kernels is not None:
            kernels.train_compact()
        sgd.zero_grad()
        forget()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            loss = F.cross_entropy(net(x), y)
        seen: set[int] = set()
        state = [v for of in sgd.state.values() for v in of.values() if isinstance(v, Tensor)]
        trained = [p for group in sgd.param_groups for p in group["params"]]
        kinds = {
            "what is trained": size(trained, seen), "optimiser": size(state, seen), "lists": size(lists(), seen),
            "saved for backward": size(saved, seen),
        }  # fmt: skip
        saved.clear()
        loss.backward()
        kinds["gradients"] = size((p.grad for p in trained if p.grad is not None), set())
        sgd.step()
    return {"process": held("VmHWM") - start} | kinds


def main() -> None:
    args = harness.arguments(__doc__)
    ways = [("dense", 0.0), *(("kernels", s) for s in ((0.9,) if args.quick else SPARSITIES))]
    jobs = [(way, s, batch) for batch in ((32,) if args.quick else (32, 128)) for way, s in ways]
    rows = []
    for job in jobs:
        runs = [harness.run_all(run, [job], 1)[0] for _ in range(1 if args.quick else 3)]  # each in a new process
        about = dict(zip(("way", "sparsity", "batch"), job, strict=True))
        rows.append(about | {k: harness.spread([r[k] for r in runs]) for k in runs[0]})
    harness.show("Memory of a training step, MB", rows, list(rows[0]), list(rows[0]))
    if not args.quick:
        harness.save("training_memory", rows)


if __name__ == "__main__":
    main()
