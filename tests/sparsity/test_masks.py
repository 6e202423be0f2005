"""Masks hold exactly what they promise, under every optimiser."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_sparse_cl import Masks, OneShotPruning, ResNet18, StochasticFrankWolfe, TaskSchedule
from lightning_sparse_cl.demos import PlainClassifier, toy_tasks
from lightning_sparse_cl.sparsity import enforce, sparse_weights, top_k_mask


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 20), nn.ReLU(), nn.Linear(20, 4))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
    "sfw": lambda p: StochasticFrankWolfe(p, lr=0.1, k=0.05),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_weights_are_bit_identical_and_pruned_ones_zero_after_50_steps(optimizer):
    model = net()
    masks = Masks.of(model)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    enforce(model, optimizer)
    enforce(model, optimizer)
    weight = model[2].weight
    frozen = torch.rand_like(weight) < 0.3
    alive = frozen | (torch.rand_like(weight) < 0.3)
    for _ in range(5):  # momentum and Adam state exist before anything is frozen
        step(model, optimizer)
    masks.set_alive("2.weight", alive)
    masks.set_frozen("2.weight", frozen)
    before = weight.detach().clone()
    for _ in range(50):
        step(model, optimizer)
        assert not weight[~alive].any()
    assert torch.equal(weight[frozen], before[frozen])
    assert (weight != before)[alive & ~frozen].float().mean() > 0.9
    assert not weight.grad[frozen | ~alive].any()


def step(model, optimizer):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(torch.randn(8, 3, 8, 8)), torch.randint(4, (8,))).backward()
    optimizer.step()


def test_state_goes_through_a_weights_only_checkpoint(tmp_path):
    model = net()
    masks = Masks.of(model)
    masks.set_alive("2.weight", torch.rand(20, 288) < 0.5)
    masks.set_frozen("2.weight", masks.alive["2.weight"])
    torch.save({"model": model.state_dict(), "masks": masks.state_dict()}, tmp_path / "x.pt")
    saved = torch.load(tmp_path / "x.pt", weights_only=True)
    assert list(saved["model"]) == list(net().state_dict())  # masks do not change the keys
    other = net()
    other.load_state_dict(saved["model"])
    Masks.of(other).load_state_dict(saved["masks"])
    assert torch.equal(Masks.of(other).movable("2.weight"), torch.zeros(20, 288, dtype=torch.bool))


def test_density_and_shapes():
    masks = Masks.of(model := net())
    assert masks.density() == 1.0
    mask = torch.zeros(20, 288, dtype=torch.bool)
    mask[:5] = True
    masks.set_alive("2.weight", mask)
    assert masks.density() == masks.density("2.weight") == 0.25
    assert int(model[2].weight.count_nonzero()) == 5 * 288
    with pytest.raises(ValueError, match=r"'4.weight' has shape \(20, 288\)"):
        masks.set_alive("4.weight", mask)


@pytest.mark.parametrize("k", [0, 1, 7, 12, 50])
def test_top_k_keeps_exactly_k_even_with_ties(k):
    scores = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    pool = torch.ones(3, 4, dtype=torch.bool)
    pool[1, 2] = False
    mask = top_k_mask(scores, k, among=pool)
    assert mask.sum() == min(k, 11) and not mask[1, 2]
    if k >= 3:
        assert mask[0, 0] and mask[0, 1] and mask[1, 3]


def test_top_k_is_the_head_of_a_stable_sort_in_the_pool():
    torch.manual_seed(0)
    for n in [*range(1, 60)] * 5:
        scores = torch.randint(0, 8, (n,)).float() if n % 2 else torch.randn(n)
        scores[torch.rand(n) < 0.1] = torch.tensor([torch.nan, torch.inf, -torch.inf])[n % 3]
        pool, k = torch.rand(n) < 0.6, int(torch.randint(0, n + 3, ()))
        places = pool.nonzero()[:, 0]
        best = places[
            scores.nan_to_num(torch.inf, torch.inf, -torch.inf)[places].sort(descending=True, stable=True).indices
        ]
        assert torch.equal(top_k_mask(scores, k, pool).nonzero()[:, 0], best[:k].sort().values)
    assert top_k_mask(torch.arange(10), 3).nonzero()[:, 0].tolist() == [7, 8, 9]  # of integers as well


def test_dense_profile_of_resnet18_is_that_of_the_sparcl_code():
    model = nn.Sequential(ResNet18(8), nn.Linear(64, 10))
    model(torch.zeros(2, 3, 32, 32))
    names = sparse_weights(model)
    assert len(names) == 16 and all("conv" in n for n in names)
    assert len(sparse_weights(model, dense=["*.conv1.weight"])) == 13  # 21 less the 8 first convolutions of the blocks
    with pytest.raises(ValueError, match="matches none"):
        sparse_weights(model, dense=["fc*"])
    with pytest.raises(ValueError, match="no weight is left"):
        sparse_weights(model, dense=["*"])


def test_a_second_fit_goes_on_with_the_masks():
    model = PlainClassifier(6)
    for _ in range(2):
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            callbacks=[TaskSchedule(1), OneShotPruning(0.5)],
        )  # fmt: skip
        trainer.fit(model, toy_tasks())
        pruned = Masks.of(model).alive["net.3.weight"]
        assert int(pruned.sum()) == pruned.numel() // 2
        assert not model.net[3].weight[~pruned].any()


def test_masks_are_in_the_order_of_the_module():
    """What draws per weight by position must draw the same after a resume, in whatever order masks were set."""
    source, target = (ResNet18(4) for _ in range(2))
    for module in (source, target):
        module(torch.zeros(2, 3, 16, 16))
    masks = Masks.of(source)
    for name in reversed(sparse_weights(source)):
        masks.set_alive(name, torch.ones_like(source.get_parameter(name), dtype=torch.bool))
    Masks.of(target).load_state_dict(masks.state_dict())
    assert list(Masks.of(target)) == list(masks) == sparse_weights(source)
