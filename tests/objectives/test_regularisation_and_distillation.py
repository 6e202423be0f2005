"""EWC, LwF, iCaRL, FDR and Co2L against slow computations from their formulas, and what each must not change."""

import copy
from collections import OrderedDict
from itertools import pairwise, permutations
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.demos import toy_tasks
from lightning_sparse_cl.objectives.co2l import relation_distance, supervised_contrast
from lightning_sparse_cl.objectives.ewc import fisher
from lightning_sparse_cl.objectives.features import fit_head
from lightning_sparse_cl.objectives.icarl import herding
from lightning_sparse_cl.objectives.memory import Exemplars


class Net(nn.Module):
    """Features of 2x2 images are their pixels, times a weight each; three classes."""

    def __init__(self, classes=3):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())
        self.head = nn.Linear(4, classes)

    @property
    def network(self):
        return nn.Sequential(OrderedDict(backbone=self.backbone, head=self.head))

    def forward(self, x, features=False):
        found = self.backbone(x)
        return (self.head(found), found) if features else self.head(found)


class Data(SimpleNamespace):
    """One task after the other, as objectives ask for them."""

    num_tasks = 2

    def __init__(self, images, labels, classes=3):
        super().__init__(images=images, labels=labels, classes=classes)

    def live(self):
        return torch.zeros(self.classes, dtype=torch.bool).index_fill(0, self.labels.unique(), True)

    def stored(self, count=None):
        return self.images[:count], self.labels[:count]

    def samples(self, count=None):
        yield self.prepare(self.images[:count]), self.labels[:count]

    def prepare(self, images, augment=True):
        return images / 128 - 1


def images(n, seed=0):
    return torch.randint(256, (n, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def learnt(objective, *labels):
    """The objective after a task for each of ``labels``, with a network that has moved since."""
    model = Net()
    objective.build(model.network, (1, 2, 2), seed=0)
    for task, y in enumerate(labels):
        data = Data(images(len(y), task), torch.tensor(y))
        objective.on_task_start(model, task, data)
        objective.on_task_end(model, task, data)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def weights(model):
    return torch.cat([p.reshape(-1) for p in model.network.parameters()])


# -- EWC -----------------------------------------------------------------------------------------------------------


def test_the_fisher_is_the_mean_square_of_single_gradients():
    model, x, y = Net(), torch.randn(5, 1, 2, 2), torch.tensor([0, 1, 2, 1, 0])
    model.eval()
    squares = torch.zeros_like(weights(model))
    for i in range(5):
        log_p = model(x[i : i + 1]).log_softmax(1)[0, y[i]]
        squares += torch.cat([g.reshape(-1) for g in torch.autograd.grad(log_p, model.network.parameters())]) ** 2
    model.train()
    statistics = {n: b.clone() for n, b in model.named_buffers()}
    found = fisher(model.network, [(x[:3], y[:3]), (x[3:], y[3:])])
    torch.testing.assert_close(found, squares / 5)
    assert (found >= 0).all() and found.max() > 0
    among = torch.tensor([True, True, False])  # a single head: the third class's row has no part in it
    single = fisher(model.network, [(x[:2], y[:2])], among)
    assert not single[-1:].any() and not single[-7:-3].any() and single[-3:-1].all()
    assert all(m.training for m in model.modules())
    assert all(torch.equal(b, statistics[n]) for n, b in model.named_buffers())


def test_the_fisher_of_a_linear_softmax_model_is_its_closed_form():
    """(p_c - [c = y])^2 x_d^2, by hand."""
    model = nn.Sequential(OrderedDict(backbone=nn.Flatten(), head=nn.Linear(4, 3)))
    x, y = torch.randn(6, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    error = model(x).softmax(1) - F.one_hot(y, 3)
    expected = (error[:, :, None] ** 2 * x.flatten(1)[:, None] ** 2).mean(0)
    found = fisher(model, [(x, y)])
    torch.testing.assert_close(found[:12].view(3, 4), expected)
    torch.testing.assert_close(found[12:], (error**2).mean(0))


def test_ewc_pulls_back_by_the_fisher_and_forgets_by_gamma():
    ewc = scl.EWC(strength=7.0, gamma=0.5, bound=1e9)
    model = learnt(ewc, [0, 1, 0, 1], [2, 2, 1, 2])
    data = [Data(images(4, t), torch.tensor(y)) for t, y in enumerate(([0, 1, 0, 1], [2, 2, 1, 2]))]
    again = Net()
    first, second = (fisher(again.network, d.samples()) for d in data)
    torch.testing.assert_close(ewc.F, 0.5 * first + second)
    theta, anchor = weights(model), weights(again)
    assert torch.equal(ewc.anchor, anchor)
    rest = ewc(model, torch.randn(2, 1, 2, 2), torch.tensor([0, 1]), None)["rest"]
    torch.testing.assert_close(rest, 7 * (ewc.F * (theta - anchor) ** 2).sum())
    grads = torch.cat([g.reshape(-1) for g in torch.autograd.grad(rest, model.network.parameters())])
    torch.testing.assert_close(grads, 2 * 7 * ewc.F * (theta - anchor))
    ewc.bound = 0.3  # what is stiffer is cut
    rest = ewc(model, torch.randn(2, 1, 2, 2), torch.tensor([0, 1]), None)["rest"]
    assert 0 < (7 * ewc.F > 0.3).sum() < len(theta)
    torch.testing.assert_close(rest, ((7 * ewc.F).clamp(max=0.3) * (theta - anchor) ** 2).sum())


def fitted(objective, **kwargs):
    torch.manual_seed(0)
    model = scl.ContinualModule(scl.SmallCNN(4), objective, **kwargs)
    trainer(scl.ContinualEvaluation(), epochs=2).fit(model, toy_tasks())
    return torch.cat([p.detach().reshape(-1) for p in model.network.parameters()])


def test_a_zero_coefficient_or_fisher_is_fine_tuning_bit_for_bit(monkeypatch):
    finetuned = fitted(scl.CrossEntropy())
    assert torch.equal(fitted(scl.EWC(strength=0.0)), finetuned)
    assert torch.equal(fitted(scl.LwF(alpha=0.0, warmup=False)), finetuned)
    assert not torch.equal(fitted(scl.EWC(strength=1e4)), finetuned)
    monkeypatch.setattr("lightning_sparse_cl.objectives.ewc.fisher", lambda *_: torch.zeros(()))
    assert torch.equal(fitted(scl.EWC(strength=1e4)), finetuned)


# -- LwF -----------------------------------------------------------------------------------------------------------


def test_lwf_keeps_the_softened_answers_for_old_classes():
    lwf = scl.LwF(alpha=3.0, temperature=2.0, warmup=False)
    model, before = learnt(lwf, [0, 1, 0, 1]), Net().eval()
    x, y = torch.randn(3, 1, 2, 2), torch.tensor([2, 2, 2])
    terms = lwf(model, x, y, None)
    teacher, student = before(x), model(x)
    expected = 0.0
    for i in range(3):
        p = ((teacher[i, :2] / 2).exp() / (teacher[i, :2] / 2).exp().sum()).detach()
        q = (student[i, :2] / 2).exp() / (student[i, :2] / 2).exp().sum()
        expected -= sum(p[c] * q[c].log() for c in (0, 1)) / 3
    torch.testing.assert_close(terms["rest"], 3 * expected)
    torch.testing.assert_close(terms["per_sample"], F.cross_entropy(student, y, reduction="none"))


def test_a_teacher_is_never_updated_and_agrees_with_itself():
    lwf = scl.LwF(alpha=1.0, warmup=False)
    model = learnt(lwf, [0, 1, 0, 1])
    before = {n: b.clone() for n, b in lwf.teacher.named_buffers()}
    assert not list(lwf.parameters())
    optimizer = torch.optim.SGD([*model.parameters(), *lwf.parameters()], lr=1.0, weight_decay=0.1)
    for _ in range(3):
        terms = lwf(model, torch.randn(4, 1, 2, 2), torch.tensor([2, 2, 1, 0]), None)
        (terms["per_sample"].mean() + terms["rest"]).backward()
        optimizer.step()
    assert all(torch.equal(b, before[n]) for n, b in lwf.teacher.named_buffers())
    lwf.teacher.take(model.network)  # of a student like the teacher, the distillation's gradient is zero
    rest = lwf(model.eval(), torch.randn(4, 1, 2, 2), torch.tensor([2, 2, 1, 0]), None)["rest"]
    assert max(g.abs().max() for g in torch.autograd.grad(rest, model.network.parameters())) < 1e-6


def test_the_warm_up_fits_the_new_rows_of_the_head_and_no_others():
    lwf = scl.LwF()
    model = learnt(lwf, [0, 1, 0, 1])
    before = model.head.weight.detach().clone()
    data = Data(images(12, 5), torch.tensor([2] * 12))
    lwf.on_task_start(model, 1, data)
    assert torch.equal(model.head.weight[:2], before[:2]) and not torch.equal(model.head.weight[2], before[2])
    again = model.head.weight.detach().clone()
    lwf.on_task_start(model, 1, Data(images(12, 6), torch.tensor([0, 1] * 6)))  # no new class
    assert torch.equal(model.head.weight, again)


def test_fit_head_solves_the_balanced_regression():
    torch.manual_seed(0)
    features, labels = torch.randn(90, 5) * 30, torch.cat([torch.zeros(60), torch.full((30,), 2)]).long()
    head, classes = nn.Linear(5, 4), torch.tensor([True, False, True, False])
    fit_head(head, features, labels, classes, decay=0.1)
    scale = features.square().mean().sqrt()
    weight = (head.weight[[0, 2]] * scale).detach().requires_grad_()
    logits = F.linear(features / scale, weight, head.bias[[0, 2]])
    parts = [F.cross_entropy(logits[labels == c], torch.full_like(labels[labels == c], c // 2)) for c in (0, 2)]
    (grad,) = torch.autograd.grad(sum(parts) / 2 + 0.05 * weight.square().sum(), weight)
    assert grad.abs().max() < 1e-3  # each class's mean counts the same, and nothing is left to descend


# -- iCaRL ---------------------------------------------------------------------------------------------------------


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
    icarl = scl.ICaRL(memory=7, minibatch=4)
    model = learnt(icarl, [0] * 9 + [1] * 9, [2] * 9)
    assert icarl.memory.contents().labels.bincount().tolist() == [3, 2, 2]
    data = Data(images(1), torch.tensor([0]))
    before = Net().eval()
    features = F.normalize(before.backbone(data.prepare(icarl.memory.contents().images)))
    labels = icarl.memory.contents().labels
    means = torch.stack([F.normalize(features[labels == c].mean(0), dim=0) for c in range(3)])
    torch.testing.assert_close(icarl.means, means)
    asked = before.backbone(data.prepare(images(20, 9)))
    nearest = torch.stack([(F.normalize(asked) - m).norm(dim=1) for m in means], 1).argmin(1)
    assert torch.equal(icarl.classify(model.head, asked).argmax(1), nearest)


def test_icarl_learns_new_classes_from_labels_and_old_ones_from_the_teacher():
    icarl = scl.ICaRL(memory=6, minibatch=4)
    model, before = learnt(icarl, [0] * 5 + [1] * 5), Net().eval()
    icarl.on_task_start(model, 1, Data(images(4), torch.tensor([2] * 4)))
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
    icarl = scl.ICaRL(memory=6, minibatch=4)
    model = learnt(icarl, [0] * 5 + [1] * 5)
    icarl.on_task_start(model, 1, Data(images(4), torch.tensor([0, 1, 0, 1])))
    x = torch.randn(2, 1, 2, 2)
    one, other = (icarl(model, x, torch.tensor(y), None)["per_sample"] for y in ([0, 1], [1, 0]))
    assert not torch.allclose(one, other)
    expected = F.binary_cross_entropy_with_logits(model(x)[:, :2], torch.eye(2), reduction="none").mean(1)
    torch.testing.assert_close(one, expected)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize(
    "objective", [scl.ICaRL(30, 8), scl.CO2L(30, 8, dim=8), scl.EWC()],
    ids=lambda o: type(o).__name__,
)  # fmt: skip
def test_any_precision(objective, precision):
    torch.manual_seed(0)
    evaluation = scl.ContinualEvaluation()
    model = scl.ContinualModule(scl.SmallCNN(8), copy.deepcopy(objective))
    trainer(evaluation, epochs=3, precision=precision).fit(model, toy_tasks())
    assert evaluation.matrices["task_il"].R[-1, -1] > 0.7


def test_close_means_are_told_apart_under_autocast():
    icarl = scl.ICaRL(memory=100)
    icarl.build(nn.Sequential(OrderedDict(head=nn.Linear(64, 100))), (1, 2, 2), seed=0)
    torch.manual_seed(0)
    features = torch.rand(100, 64) * 0.1 + 1
    icarl.means.copy_(F.normalize(features))
    icarl.old.fill_(True)
    icarl.tasks = 1
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(icarl.classify(None, features).argmax(1), torch.arange(100))


# -- FDR -----------------------------------------------------------------------------------------------------------


def test_fdr_measures_how_far_the_function_has_moved():
    fdr = scl.FDR(memory=6, minibatch=4, alpha=0.7)
    model = learnt(fdr, [0, 1] * 8, [2, 1] * 8)
    held = fdr.memory.contents()
    assert held.tasks.tolist() == [0, 0, 0, 1, 1, 1]
    data, before = Data(images(1), torch.tensor([0])), Net().eval()
    torch.testing.assert_close(held.logits, before(data.prepare(held.images)))
    (drawn,) = fdr.draw(data.prepare)
    z = model(drawn.images)
    moved = [float(((a.softmax(0) - b.softmax(0)) ** 2).sum() ** 0.5) for a, b in zip(z, drawn.logits)]
    assert float(fdr.replay_loss([z], [drawn])) == pytest.approx(0.7 * sum(moved) / 4, rel=1e-5)
    same = fdr.replay_loss([before(drawn.images)], [drawn])
    assert same < 1e-6


# -- Co2L ----------------------------------------------------------------------------------------------------------


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
    co2l = scl.CO2L(memory=6, minibatch=4, dim=5)
    model = learnt(co2l, [0] * 5 + [1] * 5)
    assert co2l.memory.contents().labels.bincount().tolist() == [3, 3]
    x, y = torch.randn(3, 2, 1, 2, 2), torch.tensor([2, 2, 1])
    replay = co2l.draw(lambda raw: raw / 128 - 1 + 0.1 * torch.randn(len(raw), 1, 2, 2))
    assert co2l.replayed == 8
    terms = co2l(model, x, y, replay)
    assert terms["per_sample"].shape == (3,) and terms["logits"].shape == (3, 3)
    all_views = torch.cat([x[:, 0], replay[0].images[:, 0], x[:, 1], replay[0].images[:, 1]])
    labels = torch.cat([y, replay[0].labels]).repeat(2)
    z = F.normalize(co2l.projection(model.backbone(all_views)))
    anchors = supervised_contrast(z, labels, 0.5)[[0, 1, 2, 7, 8, 9]]
    torch.testing.assert_close(terms["per_sample"].mean(), anchors.mean())
    without = scl.CO2L(memory=6, minibatch=4, dim=5, strength=0.0)
    without.build(model.network, (1, 2, 2), seed=0)
    rest = without(model, x, y, None)["rest"]
    grads = torch.autograd.grad(rest, model.network.parameters(), allow_unused=True, materialize_grads=True)
    assert [bool(g.any()) for g in grads] == [False] * 4 + [True] * 2


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scl.EWC(strength=-1.0), r"EWC\(strength=-1.0\): a loss coefficient is >= 0"),
        (lambda: scl.EWC(strength=float("inf")), r"EWC\(strength=inf\): .* finite"),
        (lambda: scl.EWC(gamma=1.5), r"EWC\(gamma=1.5\).*in \[0, 1\]"),
        (lambda: scl.EWC(samples=0), r"EWC\(samples=0\)"),
        (lambda: scl.EWC(bound=0.0), r"EWC\(bound=0.0\): bound is > 0"),
        (lambda: scl.LwF(temperature=0.0), r"LwF\(temperature=0.0\): temperature is > 0"),
        (lambda: scl.LwF(alpha=-3.0), r"LwF\(alpha=-3.0\)"),
        (lambda: scl.FDR(alpha=-0.1), r"FDR\(alpha=-0.1\)"),
        (lambda: scl.DER(alpha=float("nan")), r"DER\(alpha=nan\)"),
        (lambda: scl.CO2L(student_temperature=-1.0), r"CO2L\(student_temperature=-1.0\)"),
        (lambda: learnt(scl.ICaRL(memory=2), [0, 1]), r"ICaRL\(memory=2\): one exemplar a class.*there are 3;"),
        (lambda: learnt(scl.CO2L(memory=2), [0, 1]), r"CO2L\(memory=2\): one exemplar a class"),
        (lambda: learnt(scl.FDR(memory=1), [0, 1]), r"FDR\(memory=1\): one exemplar a task.*there are 2;"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
