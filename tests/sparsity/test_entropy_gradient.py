"""SupSup's inference of the task: a case by hand, finite differences, single tasks, and the binary search."""

import math
from functools import partial

import pytest
import torch
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.demos import toy_tasks
from lightning_sparse_cl.sparsity import entropy_gradient
from lightning_sparse_cl.sparsity.entropy_gradient import _Gradients


def two_masks():
    """W = 1, x = 1; one mask has the first of two units, the other one both; the head is the identity."""
    network = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        network[0].weight.fill_(1)
        network[1].weight.copy_(torch.eye(2))
    learnt = scl.Subnetworks.of(network)
    for mask in ([[True], [False]], [[True], [True]]):
        learnt.add([0, 1], {"0.weight": torch.tensor(mask)}, ["1.weight"])
    return network, learnt


def test_the_gradient_of_a_case_by_hand():
    network, learnt = two_masks()
    gradients, x = _Gradients(learnt, [0, 1]), torch.ones(1, 1)
    half = torch.tensor([0.5, 0.5])
    p = torch.tensor([1.0, 0.5]).softmax(0)
    entropy = -(p * p.log()).sum()
    assert gradients.entropy(half, x).item() == pytest.approx(entropy.item()) == pytest.approx(0.663, abs=1e-3)
    by_z = -p * (p.log() + entropy)  # dH/dz
    torch.testing.assert_close(gradients.of(half, x), torch.stack([by_z[0], by_z.sum()])[None])
    assert gradients.of(half, x)[0].tolist() == pytest.approx([-0.1175, 0], abs=1e-4)
    for search in ("one_shot", "binary"):
        assert scl.EntropyGradient(search).scores(learnt, x, range(len(learnt))).argmax(0).tolist() == [0]
    del network


def learnt_by(backbone):
    torch.manual_seed(0)
    module, data = scl.SupSup(backbone, optimizer=partial(torch.optim.Adam, lr=0.01)), toy_tasks(5)
    trainer(epochs=4).fit(module, data)
    return module.eval(), data


@pytest.fixture(scope="module", params=["mlp", "batch-norm"])
def supsup(request):
    return learnt_by(scl.SmallMLP((64, 64)) if request.param == "mlp" else scl.SmallCNN(8))


def test_gradients_are_those_of_finite_differences(supsup):
    module, data = supsup
    gradients, x = (
        _Gradients(scl.Subnetworks.of(module), range(5)),
        data.prepare(data.test_sets[1].inputs[:3], augment=False),
    )
    gradients.network.double()
    gradients.stacked = {n: t.double() for n, t in gradients.stacked.items()}
    gradients.head = {n: t.double() for n, t in gradients.head.items()}
    alpha, x, step = torch.full((5,), 0.2, dtype=torch.double), x.double(), 1e-6
    found = gradients.of(alpha, x)
    for name in gradients.stacked.keys() - gradients.moving:  # statistics of batch-norm are no function of alpha
        gradients.network.get_buffer(name).copy_(gradients.stacked.pop(name).mean(0))
    for task in range(5):
        ends = []
        for sign in (-1, 1):
            moved = alpha.clone()
            moved[task] += sign * step
            ends.append(gradients.entropy(moved, x))
        torch.testing.assert_close(found[:, task], (ends[1] - ends[0]) / (2 * step), rtol=1e-5, atol=1e-6)


def test_one_mask_alone_answers_as_its_task(supsup):
    module, data = supsup
    learnt, x = scl.Subnetworks.of(module), data.prepare(data.test_sets[3].inputs[:4], augment=False)
    gradients = _Gradients(learnt, range(5))
    for task in range(5):
        alone = {n: t[task] for n, t in gradients.stacked.items()}
        logits = torch.func.functional_call(gradients.network, alone | gradients.head, (x,))
        torch.testing.assert_close(logits[:, learnt.tasks[task].classes], learnt.network(task)(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("search", "least"), [("one_shot", 5), ("binary", 5 + 3 + 2)])
def test_every_class_is_one_of_the_task_told_and_the_binary_search_halves_the_tasks(supsup, search, least, monkeypatch):
    module, data = supsup
    learnt, x = scl.Subnetworks.of(module), data.prepare(data.test_sets[2].inputs[:1], augment=False)
    asked, of = [], entropy_gradient._Gradients.of

    def counted(self, alpha, x):
        asked.append(int(alpha.count_nonzero()))
        return of(self, alpha, x)

    monkeypatch.setattr(entropy_gradient._Gradients, "of", counted)
    monkeypatch.setattr(learnt, "inference", scl.EntropyGradient(search))
    label, told = int(module(x).argmax()), int(learnt.inference.scores(learnt, x, range(len(learnt))).argmax())
    assert sum(asked) == 2 * least and len(asked) == 2 * (1 if search == "one_shot" else math.ceil(math.log2(5)))
    assert label in learnt.tasks[told].classes


@pytest.mark.parametrize("search", ["one_shot", "binary"])
def test_without_batch_norm_most_tasks_are_told(search):
    module, data = learnt_by(scl.SmallMLP((64, 64)))
    learnt, hits = scl.Subnetworks.of(module), []
    for task, test in enumerate(data.test_sets):
        told = scl.EntropyGradient(search).scores(learnt, data.prepare(test.inputs, augment=False), range(5)).argmax(0)
        hits.append(float((told == task).float().mean()))
    assert sum(hits) / 5 > 0.6


def test_samples_are_told_by_themselves(supsup):
    module, data = supsup
    learnt, x = scl.Subnetworks.of(module), data.prepare(data.test_sets[0].inputs, augment=False)
    for search in ("one_shot", "binary"):
        whole = scl.EntropyGradient(search).scores(learnt, x, range(len(learnt)))
        torch.testing.assert_close(scl.EntropyGradient(search).scores(learnt, x[3:5], range(5)), whole[:, 3:5])


@pytest.mark.parametrize("search", ["one_shot", "binary"])
def test_some_tasks_alone_no_samples_and_other_precisions(search):
    module, data = learnt_by(scl.SmallMLP((64, 64)))
    learnt, x = scl.Subnetworks.of(module), data.prepare(data.test_sets[0].inputs, augment=False)
    learnt.inference = scl.EntropyGradient(search)
    answers = learnt.answers(x)
    logits = learnt.combined(x, {task: answers[task] for task in (0, 2, 3)})
    finite = torch.stack([logits[:, learnt.tasks[task].classes].isfinite().all(1) for task in range(5)])
    assert (finite.sum(0) == 1).all() and not finite[[1, 4]].any(), "the classes of one of the tasks that were asked"
    assert module(x[:0]).shape == (0, data.num_classes)
    single = module(x).argmax(1)
    for dtype, same in ((torch.float64, 0.9), (torch.bfloat16, 0.5)):
        module.to(dtype)
        learnt.drop_networks()
        assert float((module(x.to(dtype)).argmax(1) == single).float().mean()) > same


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"EntropyGradient\(search='both'\): search is 'one_shot' or 'binary'"):
        scl.EntropyGradient("both")
