"""Task-aware dynamic masking keeps the numbers of weights that SparCL's paper gives, and ranks by its importance."""

from collections import defaultdict

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toy_trainer import trainer

from lightning_sparse_cl import (
    ContinualModule,
    DERpp,
    DynamicDataRemoval,
    Masks,
    SmallCNN,
    TaskAwareDynamicMasking,
)
from lightning_sparse_cl.demos import PlainClassifier, toy_tasks
from lightning_sparse_cl.sparsity import Enforcement


class Counts(pl.Callback):
    """Every number of weights that a layer's mask had, by task."""

    def __init__(self, name):
        self.name, self.events, self.task = name, defaultdict(list), -1

    def on_fit_start(self, trainer, pl_module):
        masks = next(c for c in trainer.callbacks if isinstance(c, TaskAwareDynamicMasking)).masks
        put = masks.set_alive
        self.events[0].append(int(masks.alive[self.name].sum()))

        def recorded(name, mask):
            put(name, mask)
            if name == self.name:
                self.events[trainer.datamodule.task].append(int(mask.sum()))
                assert int(pl_module.get_parameter(name).count_nonzero()) <= int(mask.sum())

        masks.set_alive = recorded


@pytest.mark.parametrize(
    ("width", "counts"),
    [
        (64, (9216, 9216 - 368, 9216 + 368)),
        (512, (589824, 589824 - 23592, 589824 + 23592)),
    ],  # 64 * 64 * 9, 512 * 512 * 9
)
def test_every_event_leaves_exactly_so_many_weights(width, counts):
    k, shrunk, expanded = counts
    model, counter = PlainClassifier(width=width), Counts("net.3.weight")
    masking = TaskAwareDynamicMasking(0.75, interval=2, p_intra=0.01, p_inter=0.01)
    trainer(masking, counter, epochs=5, limit_train_batches=1).fit(model, toy_tasks(num_tasks=2))
    assert counter.events[0] == [k, shrunk, k, shrunk, k]  # after epochs 2 and 4
    assert counter.events[1] == [expanded, shrunk, k, shrunk, k]


def test_a_task_that_ends_while_expanded_is_shrunk():
    model, counter = PlainClassifier(width=16), Counts("net.3.weight")
    trainer(TaskAwareDynamicMasking(0.75, interval=3, p_inter=0.1), counter, epochs=2).fit(
        model, toy_tasks(num_tasks=2)
    )
    assert counter.events[0] == [576] and counter.events[1] == [576 + 230, 576]


def test_all_layers_ranked_together_keep_the_total():
    model = PlainClassifier(width=16)
    masking = TaskAwareDynamicMasking(0.5, interval=1, ranking="global", init="magnitude", dense=["net.8.weight"])
    trainer(masking, epochs=3).fit(model, toy_tasks(num_tasks=2))
    alive = {name: mask.sum().item() for name, mask in Masks.of(model).alive.items()}
    assert sum(alive.values()) == round(0.5 * (144 + 2304))
    assert alive["net.0.weight"] > 0.6 * 144  # earlier layers keep more (Appendix E)


def test_importance_is_that_of_equations_1_and_3():
    """Against autograd by hand, over the whole task and the whole memory."""
    pl.seed_everything(0, verbose=False)
    seen = []

    class Check(TaskAwareDynamicMasking):
        def importance(self, trainer, pl_module):
            found, data = super().importance(trainer, pl_module), trainer.datamodule
            at, memory = data.task, pl_module.objective.memory
            norms = [m for m in pl_module.modules() if isinstance(m, nn.BatchNorm2d)]
            statistics = [m.running_mean.clone() for m in norms]
            grads = {n: pl_module.get_parameter(n).grad.clone() for n in found}
            alive = data.alive[at]
            x, y = data.train_sets[at][alive]
            logits = pl_module(data.prepare(x, augment=False))[:, 2 * at : 2 * at + 2]
            names = list(found)
            weights = [pl_module.get_parameter(n) for n in names]
            with Enforcement.of(pl_module).scoring():
                current = torch.autograd.grad(F.cross_entropy(logits, y - 2 * at), weights)
                n = len(memory)
                logits = pl_module(data.prepare(memory.inputs[:n], augment=False))
                old = torch.autograd.grad(F.cross_entropy(logits, memory.labels[:n]), weights)
            for m, mean in zip(norms, statistics):
                m.running_mean.copy_(mean)
            for name, w, a, b in zip(names, weights, current, old):
                expected = w.abs() + 2.0 * a.abs() + 3.0 * b.abs()
                assert torch.allclose(found[name], expected, rtol=1e-4, atol=1e-7)
                assert torch.equal(pl_module.get_parameter(name).grad, grads[name])
            seen.append(at)
            return found

    parts = [Check(0.5, interval=2, alpha=2.0, beta=3.0), DynamicDataRemoval(0.3, cutoff=2, interval=2)]
    trainer(epochs=4).fit(ContinualModule(SmallCNN(4), DERpp(30, 8), policies=parts), toy_tasks())
    assert seen == [0, 1, 2]


def test_grown_weights_are_random_and_start_without_momentum():
    grown = {}

    class Check(TaskAwareDynamicMasking):
        def _expand(self, trainer, pl_module, more):
            before = dict(self.masks.alive)
            super()._expand(trainer, pl_module, more)
            for name, mask in before.items():
                new = self.masks.alive[name] & ~mask
                momentum = trainer.optimizers[0].state[pl_module.get_parameter(name)]["momentum_buffer"]
                assert new.any() and not momentum[new].any() and momentum[mask].any()
                unused = (~mask).flatten().nonzero().squeeze(1)
                place = torch.searchsorted(unused, new.flatten().nonzero().squeeze(1)).float() / len(unused)
                grown.setdefault((pl_module, name), []).append(place)

    for seed in (0, 1):
        pl.seed_everything(seed, verbose=False)
        model = PlainClassifier(width=16)
        trainer(Check(0.5, interval=1, p_intra=0.2), epochs=2).fit(model, toy_tasks(num_tasks=1))
    places = torch.cat([p for found in grown.values() for p in found])
    assert abs(float(places.mean()) - 0.5) < 0.05 and float(places.std()) > 0.25  # all over the unused ones
    assert len({tuple(p.tolist()) for found in grown.values() for p in found}) == len(grown)
