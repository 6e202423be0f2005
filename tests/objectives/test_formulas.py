"""Every objective against a bare loop of its paper's formula: the same weights after all steps of three tasks.

No batch-norm, no augmentation, and all that a memory holds is replayed in every step, so that nothing is drawn.
"""

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.demos import toy_tasks

LR = 0.05
ALL = dict(memory=300, replay_batch_size=300)
"""More than the 48 samples of three tasks, presented twice."""


class Recorder(pl.Callback):
    """The network as it begins, and the batches of all tasks: ``tasks[t]`` is a list of (x, y)."""

    def on_train_start(self, trainer, pl_module):
        self.network = copy.deepcopy(pl_module.network)
        self.projection = copy.deepcopy(getattr(pl_module.objective, "projection", nn.Identity()))
        self.tasks = [[] for _ in range(trainer.datamodule.num_tasks)]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        x, y = batch
        self.tasks[trainer.datamodule.task].append(
            ((x[:, 0] if pl_module.objective.views > 1 else x).clone(), y.clone())
        )


def descend(loss, parameters, change=lambda grads: grads):
    grads = change(torch.autograd.grad(loss, parameters))
    with torch.no_grad():
        for p, g in zip(parameters, grads):
            p -= LR * g


def samples(task):
    """Each sample of a task once: its first epoch."""
    half = len(task) // 2
    return torch.cat([x for x, _ in task[:half]]), torch.cat([y for _, y in task[:half]])


def mean_square(z, stored):
    return ((z - stored) ** 2).mean()


def replaying(loss_of_memory):
    """CE on the batch, and a loss of everything that was ever presented, with its logits from before the update."""

    def loop(net, tasks):
        seen = []
        for x, y in (step for task in tasks for step in task):
            z = net(x)
            loss = F.cross_entropy(z, y)
            if seen:
                loss = loss + loss_of_memory(net, *(torch.cat(part) for part in zip(*seen)))
            descend(loss, list(net.parameters()))
            seen.append((x, y, z.detach()))

    return loop


def second_task_on(net, tasks):
    seen = []
    for t, task in enumerate(tasks):
        for x, y in task:
            loss = F.cross_entropy(net(x), y)
            if t:
                loss = loss + F.cross_entropy(net(torch.cat([a for a, _ in seen])), torch.cat([b for _, b in seen]))
            descend(loss, list(net.parameters()))
            seen.append((x, y))


def own_classes(net, tasks):
    for task in tasks:
        own = torch.cat([y for _, y in task]).unique()
        for x, y in task:
            descend(F.cross_entropy(net(x)[:, own], (y[:, None] == own).float()), list(net.parameters()))


def fdr(net, tasks):
    kept = []
    for task in tasks:
        for x, y in task:
            loss = F.cross_entropy(net(x), y)
            if kept:
                z = torch.cat([then for _, then in kept])
                apart = (net(torch.cat([x for x, _ in kept])).softmax(1) - z.softmax(1)).norm(dim=1)
                loss = loss + 0.7 * apart[apart > 1e-6].sum() / len(apart)  # below it is rounding
            descend(loss, list(net.parameters()))
        kept.append((samples(task)[0], net(samples(task)[0]).detach()))


def ewc(net, tasks):
    theta, fisher, anchor = list(net.parameters()), None, None
    for task in tasks:
        for x, y in task:
            loss = F.cross_entropy(net(x), y)
            if fisher is not None:
                for p, information, then in zip(theta, fisher, anchor):
                    loss = loss + ((30 * information).clamp(max=2.0) * (p - then) ** 2).sum()
            descend(loss, theta)
        squares = [torch.zeros_like(p) for p in theta]
        for x, y in zip(*samples(task)):
            likelihood = net(x[None]).log_softmax(1)[0, y]
            for square, g in zip(squares, torch.autograd.grad(likelihood, theta)):
                square += g**2 / len(samples(task)[1])
        fisher = squares if fisher is None else [0.5 * old + new for old, new in zip(fisher, squares)]
        anchor = [p.detach().clone() for p in theta]


def lwf(net, tasks):
    old, teacher = [], None
    for task in tasks:
        for x, y in task:
            z = net(x)
            loss = F.cross_entropy(z, y)
            if teacher is not None:
                p = (teacher(x)[:, old] / 2).softmax(1).detach()
                loss = loss - 3 * (p * (z[:, old] / 2).log_softmax(1)).sum(1).mean()
            descend(loss, list(net.parameters()))
        teacher, old = copy.deepcopy(net), sorted({*old, *torch.cat([y for _, y in task]).tolist()})


def icarl(over_all):
    def loop(net, tasks):
        old, teacher, kept = [], None, []
        for task in tasks:
            seen = sorted({*old, *torch.cat([y for _, y in task]).tolist()})

            def loss_of(x, y, seen=seen, old=old, teacher=teacher):
                z = net(x)
                target = F.one_hot(y, z.shape[1]).float()
                if teacher is not None:
                    target[:, old] = teacher(x).sigmoid().detach()[:, old]
                among = slice(None) if over_all else seen
                p = z[:, among].sigmoid()
                return -(target[:, among] * p.log() + (1 - target[:, among]) * (1 - p).log()).mean()

            for x, y in task:
                loss = loss_of(x, y)
                if kept:
                    loss = loss + loss_of(torch.cat([x for x, _ in kept]), torch.cat([y for _, y in kept]))
                descend(loss, list(net.parameters()))
            kept.append(samples(task))
            teacher, old = copy.deepcopy(net), seen

    return loop


def co2l(net, tasks, projection):
    features, teacher, kept = net.backbone, None, []
    for task in tasks:
        for x, y in task:
            both, labels = (torch.cat([part, *(k[i] for k in kept)]) for i, part in enumerate((x, y)))
            both, labels = torch.cat([both, both]), torch.cat([labels, labels])
            z = F.normalize(projection(features(both)))
            n, loss = len(z), 0.0
            anchors = [i for i in range(n) if i % (n // 2) < len(y)]
            for i in anchors:
                others = [k for k in range(n) if k != i]
                log_p = (z[i] @ z[others].T / 0.5).log_softmax(0)
                same = labels[others] == labels[i]
                loss = loss - log_p[same].mean() / len(anchors)
            if teacher is not None:
                before = F.normalize(teacher(both)).detach()
                for i in range(n):
                    others = [k for k in range(n) if k != i]
                    p = (before[i] @ before[others].T / 0.01).softmax(0)
                    loss = loss - 0.5 * (p * (z[i] @ z[others].T / 0.2).log_softmax(0)).sum() / n
            descend(loss, [*features.parameters(), *projection.parameters()])
        kept.append(samples(task))
        teacher = copy.deepcopy(nn.Sequential(features, projection))


def agem(net, tasks):
    kept, theta = [], list(net.parameters())
    for task in tasks:
        for x, y in task:

            def project(grads):
                if not kept:
                    return grads
                loss = F.cross_entropy(net(torch.cat([x for x, _ in kept])), torch.cat([y for _, y in kept]))
                g, ref = (torch.cat([p.flatten() for p in part]) for part in (grads, torch.autograd.grad(loss, theta)))
                g = g - (g @ ref / (ref @ ref)).clamp(max=0) * ref
                return [part.view_as(p) for part, p in zip(g.split([p.numel() for p in theta]), theta)]

            descend(F.cross_entropy(net(x), y), theta, project)
        kept.append(samples(task))


def er_loss(net, x, y, z):
    return F.cross_entropy(net(x), y)


def der_loss(net, x, y, z):
    return 0.3 * mean_square(net(x), z)


def derpp_loss(net, x, y, z):
    return 0.2 * mean_square(net(x), z) + 0.5 * F.cross_entropy(net(x), y)


PAPERS = {
    "fine-tuning": (scl.CrossEntropy(), replaying(lambda net, *_: 0.0)),
    "fine-tuning, own classes": (scl.CrossEntropy(single_head=True), own_classes),
    "ER": (scl.ER(**ALL), replaying(er_loss)),
    "ER, joint": (scl.ER(**ALL, forward="joint"), replaying(er_loss)),
    "ER, balanced": (scl.ER(**ALL, balanced=True), replaying(er_loss)),
    "ER, from the second task on": (scl.ER(**ALL, replay_in_first_task=False), second_task_on),
    "DER": (scl.DER(**ALL, alpha=0.3), replaying(der_loss)),
    "DER++": (scl.DERpp(**ALL, alpha=0.2, beta=0.5), replaying(derpp_loss)),
    "DER++, joint": (scl.DERpp(**ALL, alpha=0.2, beta=0.5, forward="joint"), replaying(derpp_loss)),
    "DER++, one draw": (scl.DERppOneDraw(**ALL, alpha=0.2, beta=0.5), replaying(derpp_loss)),
    "FDR": (scl.FDR(**ALL, alpha=0.7), fdr),
    "FDR, joint": (scl.FDR(**ALL, alpha=0.7, forward="joint"), fdr),
    "EWC": (scl.EWC(alpha=30, gamma=0.5, bound=2.0), ewc),
    "LwF": (scl.LwF(alpha=3, temperature=2, warmup=False), lwf),
    "iCaRL": (scl.ICaRL(**ALL), icarl(over_all=False)),
    "iCaRL, over all": (scl.ICaRL(**ALL, over="all"), icarl(over_all=True)),
    "Co2L": (scl.CO2L(**ALL, alpha=0.5, dim=6), co2l),
    "A-GEM": (scl.CrossEntropy(), agem),
}


@pytest.mark.parametrize("name", PAPERS)
def test_the_weights_are_those_of_a_bare_loop(name):
    objective, loop = copy.deepcopy(PAPERS[name])
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh())
    policies = [scl.AGEM(**ALL)] if name == "A-GEM" else []
    module = scl.ContinualModule(
        backbone, objective, optimizer=lambda p: torch.optim.SGD(p, lr=LR), policies=policies
    )  # fmt: skip
    recorder = Recorder()
    trainer(recorder, epochs=2).fit(module, toy_tasks(3, per_class=8, size=4, batch_size=8))
    assert [len(task) for task in recorder.tasks] == [4, 4, 4]
    net, projection = recorder.network, recorder.projection
    start = [p.detach().clone() for p in net.backbone.parameters()]
    loop(net, recorder.tasks, *([projection] if name == "Co2L" else []))
    expected, found = [*net.backbone.parameters()], [*module.backbone.parameters()]
    if name == "Co2L":  # its head is fitted when a task has ended
        expected, found = [*expected, *projection.parameters()], [*found, *module.objective.projection.parameters()]
    else:
        expected, found = [*expected, *net.head.parameters()], [*found, *module.head.parameters()]
    assert max(float((p - q.detach()).abs().max()) for p, q in zip(start, found)) > 1e-2  # it has learnt
    for p, q in zip(expected, found):
        torch.testing.assert_close(q, p, atol=1e-6, rtol=0)
