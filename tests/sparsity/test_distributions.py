"""ERK as the papers' networks have it; whole numbers that add up."""

import math

import pytest
import torch

from lightning_sparse_cl import SET, ResNet18
from lightning_sparse_cl.sparsity.distributions import counts, erk, uniform

NET = torch.nn.Sequential(ResNet18(64, "7x7"), torch.nn.Linear(512, 100, bias=False)).eval()
NET(torch.zeros(1, 3, 32, 32))
SHAPES = {n: p.shape for n, p in NET.named_parameters() if p.ndim > 1}
SIZES = {n: math.prod(s) for n, s in SHAPES.items()}

# Of the ResNet-18 of "Continual Dynamic Sparse Training", at density 0.20, 0.10 and 0.05, to four digits.
ERK = {
    "0.stem": (1, 1, 0.5185), "0.stages.0.0.conv1": (0.9975, 0.4580, 0.2189),
    "0.stages.0.1.conv2": (0.9975, 0.4580, 0.2189),
    "0.stages.1.0.conv1": (0.7370, 0.3383, 0.1617), "0.stages.1.0.conv2": (0.4876, 0.2239, 0.1070),
    "0.stages.2.0.conv1": (0.3629, 0.1666, 0.0796), "0.stages.2.1.conv1": (0.2410, 0.1106, 0.0529),
    "0.stages.3.0.conv1": (0.1801, 0.0827, 0.0395), "0.stages.3.1.conv2": (0.1198, 0.0550, 0.0263),
    "0.stages.1.0.shortcut.0": (1, 1, 1), "0.stages.2.0.shortcut.0": (1, 1, 0.7095),
    "0.stages.3.0.shortcut.0": (1, 0.7401, 0.3538), "1": (1, 1, 0.7199),
}  # fmt: skip


@pytest.mark.parametrize(("column", "density"), list(enumerate((0.2, 0.1, 0.05))))
def test_erk_of_the_papers_resnet(column, density):
    assert sum(SIZES.values()) == 11_218_112
    found = erk(SHAPES, density)
    assert {name: round(found[f"{name}.weight"], 4) for name in ERK} == {n: row[column] for n, row in ERK.items()}
    assert sum(found[n] * SIZES[n] for n in SHAPES) / sum(SIZES.values()) == pytest.approx(density, abs=1e-9)


@pytest.mark.parametrize("density", [0.2, 0.1, 0.05, 0.0137, 1.0])
@pytest.mark.parametrize("init", [uniform, erk])
def test_counts_are_whole_and_add_up(init, density):
    found = counts("", init.__name__, SHAPES, density)
    assert sum(found.values()) == round(density * sum(SIZES.values()))
    for name, exact in init(SHAPES, density).items():
        assert abs(found[name] - exact * SIZES[name]) < 1 + 1e-6


def test_a_layer_without_weights_is_refused():
    with pytest.raises(ValueError, match=r"RigL\(sparsity=0.99\): uniform leaves no weight in b, which has 16"):
        counts("RigL", "uniform", {"a": (100, 100), "b": (4, 4)}, 0.01)
    with pytest.raises(ValueError, match="distribution is one of uniform, erk"):
        SET(0.5, distribution="ERK")
