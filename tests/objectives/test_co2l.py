"""Co2L's contrast and relations by enumeration, and what must not shape its features."""

from itertools import permutations

import pytest
import torch
from small_network import learnt
from torch.nn import functional as F

import lightning_sparse_cl as scl
from lightning_sparse_cl.objectives.co2l import relation_distance, supervised_contrast


def test_supervised_contrast_by_enumeration():
    torch.manual_seed(0)
    z, labels = F.normalize(torch.randn(6, 3)), torch.tensor([0, 1, 0, 1, 0, 2])
    found = supervised_contrast(z, labels, 0.5)
    for i in range(6):
        others = [k for k in range(6) if k != i]
        total = sum(float((z[i] @ z[k] / 0.5).exp()) for k in others)
        positives = [p for p in others if labels[p] == labels[i]]
        terms = [-torch.log((z[i] @ z[p] / 0.5).exp() / total) for p in positives]
        expected = float(sum(terms) / len(terms)) if terms else 0.0
        assert float(found[i]) == pytest.approx(expected, rel=1e-5)
    for order in [torch.tensor(p) for p in list(permutations(range(6)))[::97]]:
        torch.testing.assert_close(supervised_contrast(z[order], labels[order], 0.5), found[order])


def test_relations_are_closest_to_themselves():
    torch.manual_seed(0)
    before = F.normalize(torch.randn(5, 3))
    z = before.clone().requires_grad_()
    at = relation_distance(z, before, 0.2, 0.2)
    p = [[(before[i] @ before[j] / 0.2).exp() if j != i else torch.tensor(0.0) for j in range(5)] for i in range(5)]
    entropy = -sum(float(v / sum(row) * (v / sum(row)).log()) for row in p for v in row if v > 0) / 5
    assert float(at) == pytest.approx(entropy, rel=1e-5)
    (grad,) = torch.autograd.grad(at, z)
    assert grad.abs().max() < 1e-5
    assert relation_distance(F.normalize(before + 0.3 * torch.randn(5, 3)), before, 0.2, 0.2) > at


def test_exemplars_are_no_anchors_and_the_head_does_not_shape_features():
    co2l = scl.CO2L(memory=6, replay_batch_size=4, dim=5)
    model = learnt(co2l, [0] * 5 + [1] * 5)
    assert co2l.memory.contents().labels.bincount().tolist() == [3, 3]
    x, y = torch.randn(3, 2, 1, 2, 2), torch.tensor([2, 2, 1])
    replay = co2l.draw(lambda raw: raw / 128 - 1 + 0.1 * torch.randn(len(raw), 1, 2, 2))
    assert co2l.drawn == 4
    terms = co2l(model, x, y, replay)
    assert terms["per_sample"].shape == (3,) and terms["logits"].shape == (3, 3)
    all_views = torch.cat([x[:, 0], replay[0].inputs[:, 0], x[:, 1], replay[0].inputs[:, 1]])
    labels = torch.cat([y, replay[0].labels]).repeat(2)
    z = F.normalize(co2l.projection(model.backbone(all_views)))
    anchors = supervised_contrast(z, labels, 0.5)[[0, 1, 2, 7, 8, 9]]
    torch.testing.assert_close(terms["per_sample"].mean(), anchors.mean())
    without = scl.CO2L(memory=6, replay_batch_size=4, dim=5, alpha=0.0)
    without.build(model.network, torch.empty(0, 1, 2, 2, dtype=torch.uint8), seed=0)
    rest = without(model, x, y, None)["rest"]
    grads = torch.autograd.grad(rest, model.network.parameters(), allow_unused=True, materialize_grads=True)
    assert [bool(g.any()) for g in grads] == [False] * 4 + [True] * 2
