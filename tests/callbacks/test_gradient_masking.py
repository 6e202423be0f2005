"""Dynamic gradient masking updates the weights of largest importance, beside whatever else moves the masks."""

import pytest
import torch
from torch.nn import functional as F
from toy_trainer import trainer

from lightning_sparse_cl import (
    ContinualModule,
    DERpp,
    DynamicGradientMasking,
    OneShotPruning,
    RigL,
    SmallCNN,
    TaskAwareDynamicMasking,
)
from lightning_sparse_cl.backbones.batch_norm import batch_norm_still
from lightning_sparse_cl.demos import PlainClassifier, toy_tasks
from lightning_sparse_cl.sparsity import Enforcement, top_k_mask


@pytest.mark.parametrize("memory", [True, False])
def test_gradient_masks_keep_the_largest_importance_of_equation_3(memory):
    checked = []

    class Check(DynamicGradientMasking):
        def scores(self, trainer, pl_module, batch):
            state = torch.get_rng_state()
            found, data = super().scores(trainer, pl_module, batch), trainer.datamodule
            names, at = list(found), data.task
            weights = [pl_module.get_parameter(n) for n in names]
            with Enforcement.of(pl_module).scoring(), batch_norm_still(pl_module):
                logits = pl_module(batch[0])[:, 2 * at : 2 * at + 2]
                loss = F.cross_entropy(logits, batch[1] - 2 * at)
                expected = [2.0 * g.abs() for g in torch.autograd.grad(loss, weights)]
                if memory and len(pl_module.objective.memory):
                    torch.set_rng_state(state)
                    x, y, *_ = pl_module.objective.memory.draw(16)
                    loss = F.cross_entropy(pl_module(data.prepare(x, augment=False)), y)
                    expected = [e + 3.0 * g.abs() for e, g in zip(expected, torch.autograd.grad(loss, weights))]
            for name, value in zip(names, expected):
                assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-7)
            self.found = found
            return found

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            if batch_idx % self.interval == 0:
                for name, score in self.found.items():
                    alive = self.masks.alive[name]
                    kept = top_k_mask(score, int(alive.sum()) - int(0.2 * score.numel()), among=alive)
                    assert torch.equal(self.masks.updated[name], kept)
                checked.append(trainer.global_step)

    objective = DERpp(30, 8) if memory else None
    policies = [TaskAwareDynamicMasking(0.5, interval=2), Check(0.2, interval=3, alpha=2.0, beta=3.0)]
    trainer(epochs=2).fit(ContinualModule(SmallCNN(4), objective, policies=policies), toy_tasks())
    assert len(checked) == 3 * 2 * 2


def test_gradient_masks_wait_for_a_step_that_rigl_has_taken_away():
    model = PlainClassifier()
    parts = [RigL(0.5, interval=3), DynamicGradientMasking(0.05, interval=3, gradients="training")]
    trainer(*parts, epochs=3).fit(model, toy_tasks())
    assert int(model.net[3].weight.count_nonzero()) <= 1152


def test_pruning_goes_well_with_gradient_masks():
    """Weights that the gradient mask holds may be pruned, and stay so."""
    model = ContinualModule(SmallCNN(4), policies=[DynamicGradientMasking(0.05, 4), OneShotPruning(0.9)])
    trainer(epochs=2).fit(model, toy_tasks())
    assert int(model.backbone[3].weight.count_nonzero()) <= round(0.1 * 144)
