"""Sparse kernels for linear layers of tokens: the layers of ViT-tiny on a batch of 32 images of 65 tokens.

Milliseconds on one thread, with kernels and torch's dense product taking turns in one run: a forward pass for
inference, and a training step's forward and backward pass. Medians and ranges over rounds.

python benchmarks/tokens.py [--quick]
"""

from __future__ import annotations

import copy
import time

import harness
import torch
from rich.progress import track
from torch import Tensor, nn

import lightning_sparse_cl as scl

LAYERS = {"attention, qkv": (192, 576), "attention, out": (192, 192), "MLP, in": (192, 768), "MLP, out": (768, 192)}
SPARSITIES = (0.75, 0.9, 0.95)
IMAGES, TOKENS = 32, 65
FIGURES = ("dense, inference", "kernels, inference", "dense, training", "kernels, training")


def timed(net: nn.Module, x: Tensor, training: bool) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    if training:
        net(x).square().mean().backward()
    else:
        with torch.no_grad():
            net(x)
    return 1000 * (time.perf_counter() - start)


def measure(sizes: tuple[int, int], sparsity: float, rounds: int) -> dict[str, list[float]]:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(*sizes))
    mask = torch.rand_like(dense[0].weight) >= sparsity
    with torch.no_grad():
        dense[0].weight.mul_(mask)
    sparse = copy.deepcopy(dense)
    scl.accelerate(sparse, {"0.weight": mask}, measure=False)
    x = torch.randn(IMAGES, TOKENS, sizes[0], requires_grad=True)
    taken: dict[str, list[float]] = {figure: [] for figure in FIGURES}
    for i in range(rounds + 2):
        for kind, training in (("inference", False), ("training", True)):
            for name, net in (("dense", dense), ("kernels", sparse)):
                found = timed(net, x, training)
                if i > 1:
                    taken[f"{name}, {kind}"].append(found)
    return taken


def main() -> None:
    args = harness.arguments(__doc__)
    torch.set_num_threads(1)
    rounds = 3 if args.quick else 15
    cases = [(layer, sparsity) for layer in LAYERS for sparsity in SPARSITIES]
    rows = []
    for layer, sparsity in track(cases, "layers"):
        taken = measure(LAYERS[layer], sparsity, rounds)
        faster = {
            kind: harness.spread([d / k for d, k in zip(taken[f"dense, {kind}"], taken[f"kernels, {kind}"])])
            for kind in ("inference", "training")
        }
        row = {"layer": layer, "sparsity": sparsity} | {f: harness.spread(taken[f]) for f in FIGURES}
        rows.append(row | {f"faster, {kind}": value for kind, value in faster.items()})
    columns = ["layer", "sparsity", *FIGURES, "faster, inference", "faster, training"]
    harness.show("Linear layers of tokens, ms and times as fast", rows, columns, columns[1:])
    if not args.quick:
        harness.save("tokens", rows, images=IMAGES, tokens=TOKENS, rounds=rounds)


if __name__ == "__main__":
    main()
