"""The axes are orthogonal: every objective, A-GEM and La-MAML under every sparsity policy, whose masks hold exactly."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.demos import toy_tasks
from lightning_sparse_cl.sparsity import sparse_weights

MEMORY = dict(memory=30, replay_batch_size=8)
PARTS = {
    "EWC": {"objective": scl.EWC(10.0)},
    "LwF": {"objective": scl.LwF()},
    "iCaRL": {"objective": scl.ICaRL(**MEMORY)},
    "FDR": {"objective": scl.FDR(**MEMORY)},
    "Co2L": {"objective": scl.CO2L(**MEMORY, dim=8)},
    "DER": {"objective": scl.DER(**MEMORY)},
    "A-GEM": {"objective": scl.CrossEntropy(), "policies": [scl.AGEM(**MEMORY)]},
    "La-MAML": {"objective": scl.ER(**MEMORY), "update": scl.LaMAML(parts=2)},
}


class Watch(pl.Callback):
    """Every step: pruned weights are zero, held ones have not moved; finite all the time."""

    def __init__(self):
        self.pruned = 0

    def on_train_batch_start(self, trainer, pl_module, *_):
        masks = scl.Masks.of(pl_module)
        self.frozen = {n: pl_module.get_parameter(n)[m].clone() for n, m in masks.frozen.items()}

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        masks = scl.Masks.of(pl_module)
        assert outputs["loss"].isfinite()
        self.on_after_task_end(trainer, pl_module)
        for name, value in self.frozen.items():
            if name in masks.frozen and masks.frozen[name].sum() == len(value):
                assert torch.equal(pl_module.get_parameter(name)[masks.frozen[name]], value)

    def on_after_task_end(self, trainer, pl_module, *_):
        for name, alive in scl.Masks.of(pl_module).alive.items():
            assert not pl_module.get_parameter(name)[~alive].any()
            self.pruned += int((~alive).sum())


def one_shot(policies=(), **parts):
    pruning = [scl.OneShotPruning(0.5, of="share"), scl.FreezeMasks(), scl.Reopen()]
    return scl.ContinualModule(scl.SmallCNN(8), policies=[*pruning, *policies], **parts)


def esacl(**parts):
    return scl.EsaCL(scl.SmallCNN(8), sparsity=0.5, selection=scl.LossSelection(warmup=1), **parts)


def sparcl(**parts):
    masking, removal = scl.TaskAwareDynamicMasking(0.5, 1), scl.DynamicDataRemoval(0.3, 1, 1)
    return scl.SparCL(scl.SmallCNN(8), masking=masking, removal=removal, gradients=scl.DynamicGradientMasking(0.1, 3),
                      **parts)  # fmt: skip


def grown(policies=(), **parts):
    return scl.ContinualModule(scl.SmallCNN(8), policies=[scl.RigL(0.5, interval=3), *policies], **parts)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "La-MAML" else n for n in PARTS])
@pytest.mark.parametrize(
    "policy",
    [esacl, sparcl, *(pytest.param(p, marks=pytest.mark.slow) for p in (one_shot, grown))],
    ids=["esacl", "sparcl", "one_shot", "grown"],
)
def test_masks_hold_under_every_objective(name, policy):
    if policy is esacl and "update" in PARTS[name]:
        pytest.skip("La-MAML takes the place of EsaCL's update")
    torch.manual_seed(0)
    module, watch = policy(**copy.deepcopy(PARTS[name])), Watch()
    trainer(watch, scl.FlopsCounter(), epochs=2).fit(module, toy_tasks())
    names = sparse_weights(module)
    assert all(n.startswith("backbone.") for n in names) and watch.pruned
    for n in scl.Masks.of(module).alive:
        alive = int(scl.Masks.of(module).alive[n].sum())
        assert alive == pytest.approx(0.5 * module.get_parameter(n).numel(), abs=2), n
