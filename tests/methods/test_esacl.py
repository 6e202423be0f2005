"""EsaCL's composition, and its claim on real digits."""

import statistics
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch.optim import SGD

from lightning_sparse_cl import (
    ContinualEvaluation,
    DERpp,
    EsaCL,
    OneShotPruning,
    RandomState,
    SingleBackward,
    SmallCNN,
    SmallMLP,
    SplitDigits,
    StochasticFrankWolfe,
    TaskSchedule,
)


@pytest.mark.parametrize(("sparsity", "k"), [(0.8, 0.05), (0.9, 0.025), (0.0, 0.25)])
def test_k_follows_the_sparsity_unless_set(sparsity, k):
    module = EsaCL(SmallMLP([30, 20]), sparsity=sparsity)
    module.build((1, 8, 8), 10)
    assert module.configure_optimizers().param_groups[0]["k"] == pytest.approx(k)
    module = EsaCL(SmallMLP([30, 20]), sparsity=sparsity, prune_epoch=1)
    module.build((1, 8, 8), 10)
    assert module.configure_optimizers().param_groups[0]["k"] == pytest.approx(1 - sparsity)
    module = EsaCL(SmallMLP([30, 20]), sparsity=sparsity, optimizer=partial(StochasticFrankWolfe, k=0.3))
    module.build((1, 8, 8), 10)
    assert module.configure_optimizers().param_groups[0]["k"] == 0.3
    module = EsaCL(SmallMLP([30, 20]), optimizer=partial(SGD, lr=0.1), update=SingleBackward())
    module.build((1, 8, 8), 10)
    assert isinstance(module.configure_optimizers(), SGD)


def test_polytopes_hold_what_is_pruned_and_nothing_else():
    module = EsaCL(SmallCNN(8), dense=["backbone.3.weight"])
    module.build((1, 8, 8), 10)
    optimizer = module.configure_optimizers()
    held = {p for g in optimizer.param_groups if g["constrained"] for p in g["params"]}
    pruned = {p for policy in module.policies if isinstance(policy, OneShotPruning)
              for p in map(module.get_parameter, policy.names(module))}  # fmt: skip
    assert held == pruned and len(held) == 4  # five layers with weights, one of them dense
    assert {p for g in optimizer.param_groups for p in g["params"]} == set(module.parameters())


def test_a_network_loads_from_its_checkpoint_without_a_trainer(tmp_path):
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=-1, logger=False, enable_progress_bar=False, default_root_dir=tmp_path,
        callbacks=[TaskSchedule(1)], limit_train_batches=2,
    )  # fmt: skip
    module = EsaCL(SmallCNN(4), DERpp(20, 8))
    trainer.fit(module, SplitDigits(batch_size=16))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = EsaCL.load_from_checkpoint(
        tmp_path / "x.ckpt", backbone=SmallCNN(4), objective=DERpp(20, 8), weights_only=True
    )
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(loaded.eval()(x), module.eval()(x))
    assert torch.equal(loaded.objective.memory.inputs, module.objective.memory.inputs)


@pytest.mark.slow
def test_one_shot_pruning_costs_esacl_little_and_sgd_much():
    def run(seed, **parts):
        pl.seed_everything(seed, verbose=False)
        evaluation = ContinualEvaluation(before_pruning=True)
        pl.Trainer(
            accelerator="cpu", max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            callbacks=[TaskSchedule(20), RandomState(), evaluation],
        ).fit(EsaCL(SmallCNN(32), DERpp(200, 16), **parts), SplitDigits(batch_size=16))  # fmt: skip
        names = ("class_il_before", "class_il", "task_il")
        return [evaluation.matrices[name].summary()["acc"] for name in names]

    before, after, task = zip(*(run(seed) for seed in range(3)))
    assert statistics.median(after) >= 0.95 and statistics.median(task) >= 0.99
    assert statistics.median(b - a for b, a in zip(before, after)) <= 0.01
    before, after, _ = zip(*(run(seed, optimizer=partial(SGD, lr=0.03)) for seed in range(3)))
    assert statistics.median(b - a for b, a in zip(before, after)) >= 0.08
