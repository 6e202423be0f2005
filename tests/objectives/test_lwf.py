"""LwF's distillation and warm-up against its formula, class by class."""

from types import SimpleNamespace

import torch
from small_network import Data, Net, images, learnt
from torch.nn import functional as F

import lightning_sparse_cl as scl


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
    lwf.on_task_start(SimpleNamespace(datamodule=data), model, 1)
    assert torch.equal(model.head.weight[:2], before[:2]) and not torch.equal(model.head.weight[2], before[2])
    again = model.head.weight.detach().clone()
    lwf.on_task_start(
        SimpleNamespace(datamodule=Data(images(12, 6), torch.tensor([0, 1] * 6))), model, 1
    )  # no new class
    assert torch.equal(model.head.weight, again)
