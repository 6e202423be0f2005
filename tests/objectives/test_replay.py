"""ER and DER++ against their formulas, written out."""

import copy
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_sparse_cl import DER, ER, CrossEntropy, DERpp, DERppOneDraw
from lightning_sparse_cl.objectives import Exemplars


def prepared(objective, filled=True):
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(backbone=nn.Flatten(), head=nn.Linear(4, 3)))
    objective.build(model, torch.empty(0, 1, 2, 2, dtype=torch.uint8), seed=0)
    if filled:
        raw = torch.randint(256, (10, 1, 2, 2), dtype=torch.uint8)
        objective.observe(raw, torch.arange(10) % 3, torch.randn(10, 3), task=0)
    return model, torch.randn(6, 1, 2, 2), torch.arange(6) % 3


def prepare(images):
    return images / 255


def cross_entropy(logits, y):
    return torch.stack([z.exp().sum().log() - z[c] for z, c in zip(logits, y)])


def test_er_adds_the_cross_entropy_of_one_draw():
    model, x, y = prepared(er := ER(memory=10, replay_batch_size=4))
    (drawn,) = replay = er.draw(prepare)
    terms = er(model, x, y, replay)
    torch.testing.assert_close(terms["per_sample"], cross_entropy(model(x), y))
    torch.testing.assert_close(terms["rest"], cross_entropy(model(drawn.inputs), drawn.labels).mean())


def test_derpp_takes_logits_from_one_draw_and_labels_from_another():
    model, x, y = prepared(derpp := DERpp(memory=10, replay_batch_size=4, alpha=0.3, beta=0.7))
    first, second = replay = derpp.draw(prepare)
    assert not torch.equal(first.labels, second.labels) or not torch.equal(first.inputs, second.inputs)
    expected = 0.3 * ((model(first.inputs) - first.logits) ** 2).sum() / (4 * 3)
    expected += 0.7 * cross_entropy(model(second.inputs), second.labels).mean()
    torch.testing.assert_close(derpp(model, x, y, replay)["rest"], expected)


def test_one_draw_variant_uses_the_same_exemplars_for_both_terms():
    model, x, y = prepared(one := DERppOneDraw(memory=10, replay_batch_size=4, alpha=0.3, beta=0.7))
    (drawn,) = replay = one.draw(prepare)
    expected = 0.3 * ((model(drawn.inputs) - drawn.logits) ** 2).mean()
    expected += 0.7 * cross_entropy(model(drawn.inputs), drawn.labels).mean()
    torch.testing.assert_close(one(model, x, y, replay)["rest"], expected)


@pytest.mark.parametrize("objective", [CrossEntropy(), ER(10, 4), DERpp(10, 4), DERpp(10, 4, alpha=0, beta=0)])
def test_without_memory_or_weight_replay_adds_nothing(objective):
    filled = isinstance(objective, DERpp) and objective.alpha == 0
    model, x, y = prepared(objective, filled=filled)
    replay = objective.draw(prepare)
    assert filled or replay is None
    assert objective(model, x, y, replay)["rest"] == 0


def with_batch_norm(objective):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU())
    model = nn.Sequential(OrderedDict(backbone=backbone, head=nn.Linear(5, 3)))
    objective.build(model, torch.empty(0, 1, 2, 2, dtype=torch.uint8), seed=0)
    raw = torch.randint(256, (10, 1, 2, 2), dtype=torch.uint8)
    objective.observe(raw, torch.arange(10) % 3, torch.randn(10, 3), task=0)
    return model, torch.randn(6, 1, 2, 2), torch.arange(6) % 3


@pytest.mark.parametrize("objective", [ER, DER, DERpp, DERppOneDraw])
def test_each_draw_passes_through_batch_norm_alone_or_all_together(objective):
    model, x, y = with_batch_norm(apart := objective(10, 4))
    together, replay = objective(10, 4, forward="joint"), apart.draw(prepare)
    batches, before = [x, *(draw.inputs for draw in replay)], copy.deepcopy(model)
    terms = apart(model, x, y, replay)
    other = copy.deepcopy(before)
    each = [other(batch) for batch in batches]  # in this order
    assert torch.equal(terms["logits"], each[0])
    torch.testing.assert_close(terms["rest"], sum(p.mean() for p in apart.replay_losses(each[1:], replay)))
    assert torch.equal(model.backbone[2].running_mean, other.backbone[2].running_mean)
    model = copy.deepcopy(before)
    terms = together(model, x, y, replay)
    all_at_once = before(torch.cat(batches))
    assert torch.equal(terms["logits"], all_at_once[:6]) and not torch.equal(terms["logits"], each[0])
    assert model.backbone[2].num_batches_tracked == 1 and other.backbone[2].num_batches_tracked == len(batches)


def test_one_exemplar_alone_cannot_be_normalised_and_that_is_said():
    model, x, y = with_batch_norm(er := ER(10, 1))
    with pytest.raises(ValueError, match=r"ER\(forward='separate'\): .* one exemplar .* use forward='joint'"):
        er(model, x, y, er.draw(prepare))
    joint = ER(10, 1, forward="joint")
    assert joint(model, x, y, er.draw(prepare))["rest"].isfinite()


def test_replay_begins_with_the_second_task_if_wished():
    _, _, _ = prepared(er := ER(10, 4, replay_in_first_task=False))
    assert er.draw(prepare) is None and er.drawn == 0
    er.on_task_end(None, None, 0)
    assert len(er.draw(prepare)[0].labels) == er.drawn == 4


@pytest.mark.parametrize("bad", [{"alpha": -0.1}, {"beta": -1}, {"replay_batch_size": 0}, {"memory": 0}])
def test_bad_arguments_are_named(bad):
    with pytest.raises(ValueError, match=f"{'size' if 'memory' in bad else next(iter(bad))}="):
        DERpp(**bad)


def test_a_single_head_leaves_other_classes_out_of_the_current_loss_only():
    objective = ER(20, 4, single_head=True)
    objective.build(nn.Sequential(OrderedDict(head=nn.Linear(1, 4))), torch.empty(0, 1), seed=0)
    data = SimpleNamespace(live=lambda: torch.tensor([False, True, True, False]))
    objective.on_task_start(SimpleNamespace(datamodule=data), nn.Identity(), 1)
    logits, y = torch.randn(5, 4), torch.tensor([1, 2, 2, 1, 1])
    expected = F.cross_entropy(logits[:, 1:3], y - 1, reduction="none")
    assert torch.allclose(objective.current_loss(logits, y), expected)
    replayed = [Exemplars(torch.randn(3, 1), torch.tensor([0, 3, 1]), torch.zeros(3))]
    terms = objective(lambda x: logits, logits, y, None)
    assert torch.allclose(terms["per_sample"], expected)
    (losses,) = objective.replay_losses([logits[:3]], replayed)
    assert torch.allclose(losses, F.cross_entropy(logits[:3], replayed[0].labels, reduction="none"))
