"""iCaRL's herding, targets and nearest means against brute force."""

from collections import OrderedDict
from itertools import pairwise
from types import SimpleNamespace

import torch
from small_network import Data, Net, images, learnt
from torch import nn
from torch.nn import functional as F

import lightning_sparse_cl as scl
from lightning_sparse_cl.objectives.icarl import herding
from lightning_sparse_cl.objectives.memory import Exemplars


def test_herding_is_the_greedy_choice_and_approaches_the_mean():
    torch.manual_seed(0)
    features = F.normalize(torch.randn(7, 3))
    chosen, mean = herding(features, 5).tolist(), features.mean(0)
    for k in range(5):
        left = [i for i in range(7) if i not in chosen[:k]]
        distances = {i: float((mean - features[[*chosen[:k], i]].mean(0)).norm()) for i in left}
        assert chosen[k] == min(distances, key=distances.get)
    everything = herding(features, 7)
    assert sorted(everything.tolist()) == list(range(7))
    assert (features[everything].mean(0) - mean).norm() < 1e-6


def test_a_herded_mean_approaches_the_class_mean():
    """Monotonically, at powers of two, on a cloud large enough."""
    torch.manual_seed(1)
    features = F.normalize(torch.randn(500, 16) + 1)
    order = herding(features, 64)
    errors = [float((features[order[: 2**k]].mean(0) - features.mean(0)).norm()) for k in range(7)]
    assert all(b < a for a, b in pairwise(errors)), errors
    random = float((features[:64].mean(0) - features.mean(0)).norm())
    assert errors[-1] < random / 4


def test_icarl_stores_equal_shares_and_classifies_by_the_nearest_mean():
    icarl = scl.ICaRL(memory=7, replay_batch_size=4)
    model = learnt(icarl, [0] * 9 + [1] * 9, [2] * 9)
    assert icarl.memory.contents().labels.bincount().tolist() == [3, 2, 2]
    data = Data(images(1), torch.tensor([0]))
    before = Net().eval()
    features = F.normalize(before.backbone(data.prepare(icarl.memory.contents().inputs)))
    labels = icarl.memory.contents().labels
    means = torch.stack([F.normalize(features[labels == c].mean(0), dim=0) for c in range(3)])
    torch.testing.assert_close(icarl.means, means)
    asked = before.backbone(data.prepare(images(20, 9)))
    nearest = torch.stack([(F.normalize(asked) - m).norm(dim=1) for m in means], 1).argmin(1)
    assert torch.equal(icarl.classify(model.head, asked).argmax(1), nearest)


def test_icarl_learns_new_classes_from_labels_and_old_ones_from_the_teacher():
    icarl = scl.ICaRL(memory=6, replay_batch_size=4)
    model, before = learnt(icarl, [0] * 5 + [1] * 5), Net().eval()
    icarl.on_task_start(SimpleNamespace(datamodule=Data(images(4), torch.tensor([2] * 4))), model, 1)
    x, y, old = torch.randn(3, 1, 2, 2), torch.tensor([2, 2, 2]), torch.randn(2, 1, 2, 2)
    drawn = Exemplars(old, torch.tensor([0, 1]), torch.zeros(2))
    terms = icarl(model, x, y, [drawn])
    z, q = model(torch.cat([x, old])), before(torch.cat([x, old])).sigmoid()
    losses = []
    for i, label in enumerate([2, 2, 2, 0, 1]):
        target = [q[i, 0], q[i, 1], float(label == 2)]
        p = z[i].sigmoid()
        losses.append(-sum(t * p[c].log() + (1 - t) * (1 - p[c]).log() for c, t in enumerate(target)) / 3)
    torch.testing.assert_close(terms["per_sample"], torch.stack(losses[:3]))
    torch.testing.assert_close(terms["rest"], torch.stack(losses[3:]).mean())


def test_icarl_learns_classes_that_come_back_from_their_labels():
    icarl = scl.ICaRL(memory=6, replay_batch_size=4)
    model = learnt(icarl, [0] * 5 + [1] * 5)
    icarl.on_task_start(SimpleNamespace(datamodule=Data(images(4), torch.tensor([0, 1, 0, 1]))), model, 1)
    x = torch.randn(2, 1, 2, 2)
    one, other = (icarl(model, x, torch.tensor(y), None)["per_sample"] for y in ([0, 1], [1, 0]))
    assert not torch.allclose(one, other)
    expected = F.binary_cross_entropy_with_logits(model(x)[:, :2], torch.eye(2), reduction="none").mean(1)
    torch.testing.assert_close(one, expected)


def test_close_means_are_told_apart_under_autocast():
    icarl = scl.ICaRL(memory=100)
    icarl.build(nn.Sequential(OrderedDict(head=nn.Linear(64, 100))), torch.empty(0, 1, 2, 2, dtype=torch.uint8), seed=0)
    torch.manual_seed(0)
    features = torch.rand(100, 64) * 0.1 + 1
    icarl.means.copy_(F.normalize(features))
    icarl.old.fill_(True)
    icarl.tasks = 1
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(icarl.classify(None, features).argmax(1), torch.arange(100))
