"""A step: passes, batch-norm, what memory keeps, what optimisers forget."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from toy_trainer import trainer

from lightning_sparse_cl import (
    ContinualModule,
    DERpp,
    EsaCL,
    FlopsCounter,
    LossSelection,
    RandomState,
    SharpnessAware,
    SingleBackward,
    SmallCNN,
    SmallMLP,
    SplitTensors,
)
from lightning_sparse_cl.demos import toy_tasks


def test_batch_norm_statistics_move_once_a_step_under_sam():
    norm = nn.BatchNorm2d(4)
    model = ContinualModule(nn.Sequential(nn.LazyConv2d(4, 3), norm, nn.Flatten()), update=SharpnessAware(0.5))
    trainer(epochs=1).fit(model, toy_tasks())
    assert norm.num_batches_tracked == 15


def test_sam_of_radius_zero_is_plain_training():
    states = []
    for update in (SingleBackward(), SharpnessAware(0.0), SharpnessAware(0.5)):
        pl.seed_everything(1, verbose=False)
        model = ContinualModule(SmallMLP([8]), update=update)
        trainer(RandomState(), epochs=1).fit(model, toy_tasks())
        states.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(states[0], states[1])
    assert not torch.allclose(states[0], states[2], atol=1e-3)


def test_float_images_survive_a_checkpoint_in_memory(tmp_path):
    images, labels = torch.randn(80, 1, 8, 8), torch.arange(80) % 4
    data = SplitTensors((images, labels), (images, labels), num_tasks=2, batch_size=10)
    t = trainer(epochs=1)
    t.fit(model := ContinualModule(SmallMLP([8]), DERpp(20, 8)), data)
    t.save_checkpoint(tmp_path / "x.ckpt")
    loaded = ContinualModule.load_from_checkpoint(
        tmp_path / "x.ckpt", backbone=SmallMLP([8]), objective=DERpp(20, 8), weights_only=True
    )
    assert model.objective.memory.inputs.dtype == torch.float32
    assert torch.equal(loaded.objective.memory.inputs, model.objective.memory.inputs)


def test_selection_saves_passes_after_its_warm_up():
    passes = FlopsCounter()
    selection = LossSelection(sse=0.5, ere=0.25, warmup=1)
    model = ContinualModule(SmallMLP([8]), update=SharpnessAware(), selection=selection)
    trainer(passes).fit(model, toy_tasks(num_tasks=1, per_class=40))
    warm, selected = 5, 5  # steps of the first and of the second epoch
    assert passes.counts == {
        "samples": 160,
        "forward": warm * 2 * 16 + selected * (16 + 8 + 4),  # ranking, ascent, descent
        "backward": warm * 2 * 16 + selected * (8 + 4),
    }


@pytest.mark.parametrize("selection", [None, LossSelection(0.5, 0.5, 0)])
@pytest.mark.parametrize("update", [SingleBackward(), SharpnessAware(0.1)])
def test_memory_keeps_stored_images_and_the_logits_from_before_the_update(update, selection):
    pl.seed_everything(0, verbose=False)
    data = toy_tasks(num_tasks=1, per_class=8)  # one batch
    model = ContinualModule(SmallMLP([8]), DERpp(16, 8), update=update, selection=selection)
    data.setup()
    model.build(data.input_shape, data.num_classes)
    before = copy.deepcopy(model)
    trainer(epochs=1).fit(model, data)
    memory = model.objective.memory
    assert len(memory) == 16 and memory.inputs.dtype == torch.uint8
    torch.testing.assert_close(memory.logits, before(data.prepare(memory.inputs, augment=False)))
    assert not torch.allclose(memory.logits, model(data.prepare(memory.inputs, augment=False)))
    assert sorted(memory.inputs.flatten(1).sum(1).tolist()) == sorted(
        data.train_sets[0].inputs.flatten(1).sum(1).tolist()
    )


def test_momentum_does_not_outlive_a_task_but_radii_do():
    class Watch(pl.Callback):
        seen, norms = {}, set()

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.seen[trainer.global_step] = len(optimizer.state)
            self.norms.add(tuple(optimizer.param_groups[0]["norms"]))

    watch = Watch()
    trainer(watch, epochs=1).fit(EsaCL(SmallCNN(4), DERpp(30, 8)), toy_tasks())
    assert [step for step, size in watch.seen.items() if size == 0] == [0, 5, 10]  # five steps a task
    assert len(watch.norms) == 1
