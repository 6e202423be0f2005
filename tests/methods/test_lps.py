"""LPS: ADMM by a closed form, shares that are exact, old weights that are shared and never change."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from logits_of_tasks import Logits
from stopped import assert_resumes
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.demos import toy_tasks
from lightning_sparse_cl.sparsity.admm import ADMM
from lightning_sparse_cl.sparsity.scores import top_k_mask

EPOCHS, STEPS = 6, 5  # one to learn, three of ADMM, two to retrain
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
}


def lps(optimizer="adamw", **options):
    options = {"admm": 1, "retrain": 2} | options
    return scl.LPS(scl.SmallCNN(8), optimizer=OPTIMIZERS[optimizer], **options)


def project(name, value):
    return value * top_k_mask(value.abs(), 1)


def test_admm_halves_what_is_outside_the_set():
    """L = 1/2 ||W - (3, 1)||^2, one entry, rho = 1: W = ((3, 1) + Z - U) / 2, and Z is (3, 0) from the beginning."""
    goal, w = torch.tensor([3.0, 1.0]), torch.tensor([3.0, 1.0])
    admm = ADMM()
    admm.build({"w": w})
    admm.begin({"w": w}, project)
    for step in range(1, 6):
        ((z, u),) = admm.pairs().values()
        w = ((goal + z - u) / 2).requires_grad_()
        loss = 0.5 * ((w - goal) ** 2).sum() + admm.distance({"w": w})
        assert torch.autograd.grad(loss, w)[0].abs().max() < 1e-6  # it is the minimum
        w = w.detach()
        assert torch.allclose(w, torch.tensor([3.0, 0.5**step]))
        admm.update({"w": w}, project)
        assert torch.equal(admm.pairs()["w"][0], torch.tensor([3.0, 0.0]))


def test_what_is_in_the_set_stays():
    w = {"w": torch.tensor([0.0, 2.0, 0.0])}
    admm = ADMM()
    admm.build(w)
    admm.begin(w, project)
    admm.update(w, project)
    assert not admm.pairs()["w"][1].any() and admm.distance(w) == 0


@pytest.mark.parametrize("batch_norm", ["per_task", "frozen"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_is_forgotten(optimizer, batch_norm):
    torch.manual_seed(0)
    logits, evaluation = Logits(), scl.ContinualEvaluation()
    module = lps(optimizer, subnetworks=scl.TaskSubnetworks(batch_norm))
    trainer(logits, evaluation, epochs=EPOCHS).fit(module, toy_tasks(num_tasks=4))
    logits.assert_same()
    assert evaluation.matrices["task_il"].summary()["bwt"] == 0


@pytest.mark.parametrize(("shares", "parts"), [(None, [1 / 3] * 3), ([5.0, 1.0, 4.0], [0.5, 0.1, 0.4])])
def test_tasks_have_their_shares_and_so_much_of_the_old_weights(shares, parts):
    module = lps(shares=shares, kept=0.75)
    trainer(epochs=EPOCHS).fit(module, toy_tasks(num_tasks=3))
    learnt = scl.Subnetworks.of(module)
    for name in learnt.tasks[0].masks:
        n, used = module.get_parameter(name).numel(), [0, *(int(learnt.used(name, t + 1).sum()) for t in range(3))]
        assert used[-1] == n
        for t, part in enumerate(parts):
            assert abs(used[t + 1] - used[t] - part * n) <= 1, name
            if t:
                old = learnt.used(name, t)
                assert int((learnt.mask(t, name) & old).sum()) == round(0.75 * int(old.sum()))


def test_admm_brings_the_weights_close_to_what_is_kept():
    apart = []

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch != EPOCHS - 3:
                return  # the last one before it is pruned
            free = pl_module._free()
            kept = {n: pl_module._kept_free(n, w) for n, w in free.items()}
            gone = sum(float((w.detach()[~kept[n]] ** 2).sum()) for n, w in free.items())
            apart.append(gone / sum(float((w.detach() ** 2).sum()) for w in free.values()))

    for rho in ((1e-9,) * 3, (1.0,) * 3):
        torch.manual_seed(0)
        trainer(Look(), epochs=EPOCHS).fit(lps("sgd", rho=rho), toy_tasks(num_tasks=2, per_class=80))
    without, drawn = apart
    assert drawn < without / 2


@pytest.mark.parametrize(
    "step",
    [
        EPOCHS * STEPS + 2 * STEPS + 2,
        *(
            pytest.param(s, marks=pytest.mark.slow)
            for s in (2 * STEPS, 4 * STEPS + 1, EPOCHS * STEPS, 2 * EPOCHS * STEPS - 2)
        ),
    ],
)
def test_resumed_it_ends_with_the_same_bits(step, tmp_path):
    assert_resumes(lps, step, EPOCHS, tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lps(kept=0.0), r"LPS\(kept=0.0\): the fraction of old weights"),
        (lambda: lps(rho=()), r"LPS\(rho=\(\)\): at least one stage"),
        (lambda: lps(rho=(0.1, -1.0)), r"each > 0"),
        (lambda: lps(admm=0), r"LPS\(admm=0\): a number of epochs, at least 1"),
        (lambda: lps(shares=[1.0, 0.0]), r"LPS\(shares=\[1.0, 0.0\]\): one positive number per task"),
        (
            lambda: trainer(epochs=EPOCHS).fit(lps(shares=[1.0, 2.0]), toy_tasks(3)),
            r"shares=\[1.0, 2.0\]\): one per task, and there are 3",
        ),
        (
            lambda: trainer(epochs=4).fit(lps(), toy_tasks(3)),
            "these take 5 epochs, but task 0 has 4",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
