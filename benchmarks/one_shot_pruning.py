"""EsaCL's central claim: a network trained with SAM and Frank-Wolfe is pruned in one shot without retraining.

CIFAR-10 airplane against automobile, 1,000 images each, ResNet-18 of width 16, batch 32, 5 epochs, one task; accuracy
before and after keeping 40, 20, 10 and 5 % of the weights of every pruned layer.

python benchmarks/one_shot_pruning.py [--quick] [--root FOLDER]

FOLDER holds CIFAR-10 as torchvision downloads it, or as an image folder {train,test}/{airplane,automobile}/*.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import harness
import lightning.pytorch as pl
import torch
from torch.optim import SGD

import lightning_sparse_cl as scl
from lightning_sparse_cl.sparsity import sparse_weights, top_k_mask

KEPT = [0.4, 0.2, 0.1, 0.05]
SGD_MOMENTUM = partial(SGD, lr=0.03, momentum=0.9)
FRANK_WOLFE = partial(scl.StochasticFrankWolfe, k=0.03)  # K below the smallest fraction kept
VARIANTS: dict[str, dict[str, Any]] = {
    "EsaCL": {"optimizer": FRANK_WOLFE},
    "without SP": {"optimizer": SGD_MOMENTUM},
    "without SA": {"optimizer": FRANK_WOLFE, "update": scl.SingleBackward()},
    "plain SGD": {"optimizer": SGD_MOMENTUM, "update": scl.SingleBackward()},
}


def two_classes(root: str, per_class: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Training and test images and labels of airplane and automobile."""
    source = scl.ImageFolderSource(root) if (Path(root) / "train").is_dir() else scl.CIFAR10Source(root)
    parts = []
    for train in (True, False):
        images, labels = source.read(train)
        at = torch.cat([(labels == c).nonzero().squeeze(1)[: per_class if train else None] for c in (0, 1)])
        parts.append((images[at], labels[at]))
    return parts


def run(variant: str, seed: int, images: str, epochs: int) -> dict[str, float]:
    """Train once; accuracy of the dense network and of copies pruned to each fraction."""
    pl.seed_everything(seed, verbose=False)
    module = scl.EsaCL(
        scl.ResNet18(16), scl.CrossEntropy(), selection=scl.LossSelection(1, 1), sparsity=0.0, **VARIANTS[variant]
    )
    data = scl.SplitTensors(*torch.load(images), num_tasks=1, batch_size=32)
    metrics = harness.fit(module, data, epochs)
    accuracies = {"before": metrics["class_il"]["acc"]}
    for kept in KEPT:
        pruned = copy.deepcopy(module)
        for name in sparse_weights(pruned):
            weight = pruned.get_parameter(name)
            weight.data.mul_(top_k_mask(weight.abs(), round(kept * weight.numel())))
        accuracies[f"keep {100 * kept:g} %"] = accuracy(pruned, data)
    return accuracies


@torch.no_grad()
def accuracy(module: pl.LightningModule, data: scl.TaskDataModule) -> float:
    """Accuracy on the test images, in eval mode."""
    test = data.test_sets[0]
    logits = [module.eval()(data.prepare(x, augment=False)) for x in test.inputs.split(250)]
    return (torch.cat(logits).argmax(1) == test.labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/cifar10-images")
    args = harness.arguments(parser)
    per_class, epochs, seeds = (300, 2, [0]) if args.quick else (1000, 5, [0, 1, 2])
    with TemporaryDirectory() as folder:
        images = f"{folder}/images.pt"
        torch.save(two_classes(args.root, per_class), images)
        jobs = [(variant, seed, images, epochs) for variant in VARIANTS for seed in seeds]
        results = iter(harness.run_all(run, jobs, args.processes))
    rows = []
    for variant in VARIANTS:
        runs = [next(results) for _ in seeds]
        rows.append({"variant": variant} | {key: harness.spread([r[key] for r in runs]) for key in runs[0]})
    harness.show("Accuracy in percent, median (range) over seeds", rows, list(rows[0]))
    if not args.quick:
        harness.save("one_shot_pruning", rows, seeds=seeds, epochs=epochs, images_per_class=per_class)
        plot(rows)


def plot(rows: list[dict[str, Any]]) -> None:
    """Accuracy over the fraction kept."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5.2, 3.4))
    keys = list(rows[0])[1:]
    for row in rows:
        (line,) = axis.plot(keys, [100 * row[k]["median"] for k in keys], "o-", ms=4, label=row["variant"])
        low, high = ([100 * row[k][end] for k in keys] for end in ("min", "max"))
        axis.fill_between(keys, low, high, alpha=0.15, color=line.get_color())
    axis.set(
        title="CIFAR-10, two classes: accuracy after one-shot pruning, %",
        xlabel="weights kept (not to scale)",
        ylim=(45, 95),
    )
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(harness.RESULTS / "one_shot_pruning.png", dpi=130)


if __name__ == "__main__":
    main()
