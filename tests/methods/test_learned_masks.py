"""WSN, SupSup, Piggyback: masks from scores, gradients straight through them, and nothing forgotten."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from logits_of_tasks import Logits
from stopped import assert_resumes
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.callbacks.train_free_weights import TrainFreeWeights
from lightning_sparse_cl.demos import toy_tasks
from lightning_sparse_cl.sparsity.weight_scores import above, ternary, top_k

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
}
METHODS = {
    "WSN": lambda **m: scl.WSN(scl.SmallCNN(8), 0.4, **m),
    "SupSup": lambda **m: scl.SupSup(scl.SmallCNN(8), 0.4, **m),
    "SupSup, free weights trained": lambda **m: scl.SupSup(scl.SmallCNN(8), 0.4, train_free=1, **m),
    "Piggyback": lambda **m: scl.Piggyback(scl.SmallCNN(8), **m),
    "Piggyback, pretrained": lambda **m: scl.Piggyback(scl.SmallCNN(8), pretrained=True, **m),
    "Piggyback, ternary": lambda **m: scl.Piggyback(scl.SmallCNN(8), ternary=True, **m),
}


def subnetworks(name, batch_norm="per_task"):
    return scl.TaskSubnetworks(batch_norm, full="error" if name == "WSN" else "share")


def masks_of(module):
    learnt = scl.Subnetworks.of(module)
    return [{name: learnt.mask(t, name) for name in task.masks} for t, task in enumerate(learnt.tasks)]


@pytest.mark.parametrize("batch_norm", ["per_task", pytest.param("frozen", marks=pytest.mark.slow)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_forgotten(name, optimizer, batch_norm):
    torch.manual_seed(0)
    logits, evaluation = Logits(), scl.ContinualEvaluation()
    module = METHODS[name](optimizer=OPTIMIZERS[optimizer], subnetworks=subnetworks(name, batch_norm))
    trainer(logits, evaluation, epochs=3).fit(module, toy_tasks(num_tasks=4))
    logits.assert_same()
    assert evaluation.matrices["task_il"].summary()["bwt"] == 0


class Still(scl.TaskCallback):
    """The weights, before training and after each task."""

    def __init__(self):
        self.weights = []

    def on_train_start(self, trainer, pl_module):
        self.weights = [{n: pl_module.get_parameter(n).detach().clone() for n in pl_module.scores.names}]

    def on_task_end(self, trainer, pl_module, task):
        self.weights.append({n: pl_module.get_parameter(n).detach().clone() for n in pl_module.scores.names})


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("WSN", "SupSup, free weights trained")])
def test_the_weights_stay_and_only_masks_learn(name):
    torch.manual_seed(0)
    module, still = METHODS[name](optimizer=OPTIMIZERS["adamw"]), Still()
    trainer(still, epochs=3).fit(module, toy_tasks(num_tasks=3))
    masks, (before, *after) = masks_of(module), still.weights
    for weight in before:
        assert torch.equal(before[weight], after[0][weight]) == ("pretrained" in name or name == "SupSup")
        assert torch.equal(after[0][weight], after[1][weight]) and torch.equal(after[1][weight], after[2][weight])
        assert masks[0][weight].all() == (name not in ("SupSup", "Piggyback, pretrained"))
        assert all(0 < int(mask[weight].sum()) < mask[weight].numel() for mask in masks[1:])
    assert any(not torch.equal(masks[1][n], masks[2][n]) for n in masks[1])


def test_the_last_epochs_train_the_weights_that_no_earlier_task_has():
    seen = {}

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            at = trainer.datamodule.task, trainer.datamodule.epoch_in_task
            parts = (pl_module.get_parameter(n) for n in pl_module.scores.names), pl_module.scores.scores
            seen[at] = [[p.detach().clone() for p in part] for part in parts]

    torch.manual_seed(0)
    module = METHODS["SupSup, free weights trained"](optimizer=OPTIMIZERS["adamw"])
    trainer(Look(), epochs=3).fit(module, toy_tasks(num_tasks=2))
    learnt = scl.Subnetworks.of(module)
    for i, name in enumerate(module.scores.names):
        first, second = learnt.mask(0, name), learnt.mask(1, name)
        (w1, w2, w3, v2, v3), (_, s2, s3, r2, r3) = zip(*((seen[at][0][i], seen[at][1][i]) for at in
            ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2))))  # fmt: skip
        assert torch.equal(w1, w2) and torch.equal(s2, s3), "a mask, and then weights"
        assert torch.equal((w2 != w3), first & (w2 != w3)) and float((w2 != w3)[first].float().mean()) > 0.9
        changed, free = v2 != v3, second & ~first
        assert torch.equal(w3, v2) and torch.equal(r2, r3) and not (changed & ~free).any() and changed.any()


def test_every_task_of_supsup_starts_from_scores_of_its_own():
    scores = scl.WeightScores(0.5, anew=True)
    scores.build(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)), seed=0)
    first = scores.scores[0].clone()
    scores.begin(1)
    assert not torch.equal(first, scores.scores[0])
    second = scores.scores[0].clone()
    scores.begin(1)
    assert torch.equal(second, scores.scores[0])


def test_signed_constants_have_the_signs_that_were_drawn():
    nets = []
    for constants in (False, True):
        torch.manual_seed(0)
        module = scl.SupSup(scl.SmallCNN(8), signed_constants=constants)
        module.build((1, 8, 8), 6)
        nets.append({n: module.get_parameter(n) for n in module.scores.names})
    for drawn, constant in zip(*(net.values() for net in nets)):
        assert torch.equal(drawn.sign(), constant.sign())
        torch.testing.assert_close(constant.abs(), torch.full_like(constant, (2 / constant[0].numel()) ** 0.5))


def test_wsn_keeps_exact_counts_and_shares_more_than_independent_masks_would():
    torch.manual_seed(0)
    module = METHODS["WSN"](optimizer=OPTIMIZERS["adamw"])
    trainer(epochs=3).fit(module, toy_tasks(num_tasks=4))
    masks, shared = masks_of(module), module.policies[0].summary()
    for task in masks:
        assert all(int(mask.sum()) == round(0.4 * mask.numel()) for mask in task.values())
    assert shared["used"][-1] < 1 - 0.6**4
    assert all(0 < shared["overlap"][0][t] < 1 for t in (1, 2, 3))
    assert shared["mask_bits"]["entropy"] <= shared["mask_bits"]["coded"] < shared["mask_bits"]["plain"] == 4


def test_gradients_pass_straight_through_top_k():
    generator = torch.Generator().manual_seed(0)
    s, w, x = (torch.randn(5, 7, generator=generator) for _ in range(3))
    s.requires_grad_(), w.requires_grad_()
    mask = top_k(s, 10)
    assert set(mask.detach().unique().tolist()) == {0.0, 1.0} and int(mask.sum()) == 10
    assert float(s.abs()[mask < 1].max()) <= float(s.abs()[mask > 0].min())
    masked = (mask * w).detach().requires_grad_()
    (of_masked,) = torch.autograd.grad(((masked * x).sin()).sum(), masked)
    of_s, of_w = torch.autograd.grad(((mask * w * x).sin()).sum(), [s, w])
    torch.testing.assert_close(of_s, s.detach().sign() * w.detach() * of_masked)
    torch.testing.assert_close(of_w, mask.detach() * of_masked)


def test_gradients_pass_straight_through_a_threshold_and_adam_takes_fifty_steps_to_it():
    r = torch.tensor([0.01], requires_grad=True)
    mask = above(r, 0.005)
    assert mask.item() == 1
    loss = 0.5 * (mask * 1.0 * 1.0 - 0.0) ** 2  # w = x = 1, y = 0
    assert torch.autograd.grad(loss.sum(), r)[0].item() == pytest.approx(1)
    adam, steps = torch.optim.Adam([r], lr=1e-4), 0
    while above(r, 0.005).item():
        adam.zero_grad()
        (0.5 * above(r, 0.005) ** 2).sum().backward()
        adam.step()
        steps += 1
    assert steps in (50, 51)


def test_ternary_masks_have_three_values_and_the_gradient_of_the_mask():
    r = torch.tensor([0.01, 0.005, 0.001, 0.0, -0.001, -1.0], requires_grad=True)
    mask, upstream = ternary(r, 0.005), torch.arange(6.0)
    assert mask.tolist() == [1, 0, 0, 0, -1, -1]
    assert torch.equal(torch.autograd.grad((mask * upstream).sum(), r)[0], upstream)


def test_changed_signs_are_stored_and_a_checkpoint_has_them(tmp_path):
    torch.manual_seed(0)
    module = METHODS["Piggyback, ternary"](optimizer=partial(torch.optim.Adam, lr=0.02))
    run, data = trainer(epochs=3), toy_tasks(3)
    run.fit(module, data)
    learnt, kept = scl.Subnetworks.of(module), next(p for p in module.policies if isinstance(p, scl.TaskSubnetworks))
    assert learnt.tasks[0].negated is None, "the first task trains all weights"
    for task in (1, 2):
        signs = [learnt.signs(task, name) for name in module.scores.names]
        assert all(set(s.unique().tolist()) == {-1, 0, 1} for s in signs)
        assert all(torch.equal(s != 0, learnt.mask(task, n)) for s, n in zip(signs, module.scores.names))
    assert kept.summary()["mask_bits"]["plain"] == 5  # one for the first task, two for each later one
    run.save_checkpoint(tmp_path / "run.ckpt")
    loaded, x = scl.Piggyback.load_from_checkpoint(tmp_path / "run.ckpt"), data.prepare(data.test_sets[2].inputs)
    assert torch.equal(loaded.predict(x, 2), module.predict(x, 2))
    assert torch.equal(scl.Subnetworks.of(loaded).network(2)(x), learnt.network(2)(x))


def test_piggyback_starts_from_the_whole_network():
    module = scl.Piggyback(scl.SmallCNN(8), pretrained=True)
    module.build((1, 8, 8), 6)
    x = torch.randn(4, 1, 8, 8)
    module.eval()
    torch.testing.assert_close(module.running(x), module.network(x))
    assert all(mask.all() for mask in module.task_masks().values())


@pytest.mark.parametrize("name", [name for name in METHODS if "trained" not in name or "pre" in name])
def test_scores_need_the_gradients_of_all_weights_and_flops_say_so(name):
    counter = scl.FlopsCounter()
    trainer(counter, epochs=1).fit(METHODS[name](), toy_tasks(num_tasks=3))
    flops = counter.summary()
    assert flops["training"] == pytest.approx(flops["dense"], rel=1e-5)


@pytest.mark.parametrize("step", [16, *(pytest.param(s, marks=pytest.mark.slow) for s in (3, 10, 22))])
@pytest.mark.parametrize("name", METHODS)
def test_resumed_it_ends_with_the_same_bits(name, step, tmp_path):
    assert_resumes(lambda: METHODS[name](optimizer=OPTIMIZERS["adamw"]), step, 2, tmp_path)


def test_a_checkpoint_answers_alone(tmp_path):
    module = scl.WSN(scl.SmallCNN(8), 0.4, scl.TaskSubnetworks(inference=scl.CalibratedLogit()))
    run = trainer(epochs=2)
    run.fit(module, data := toy_tasks(3))
    run.save_checkpoint(tmp_path / "run.ckpt")
    loaded = scl.WSN.load_from_checkpoint(tmp_path / "run.ckpt")
    x = data.prepare(data.test_sets[1].inputs, augment=False)
    assert torch.equal(loaded.eval()(x), module.eval()(x))
    assert torch.equal(loaded.predict(x, 1), module.predict(x, 1))


@pytest.mark.parametrize("name", ["WSN", "SupSup", "Piggyback"])
def test_a_module_that_does_not_stop_its_scores_is_refused(name):
    with pytest.raises(TypeError, match=r"does not stop its scores for it; use SupSup\(train_free=2\)"):
        trainer(TrainFreeWeights(2), epochs=4).fit(METHODS[name](), toy_tasks(2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scl.WSN(scl.SmallCNN(4), keep=0.0), r"keep=0.0\): the fraction of weights that is on, in \(0, 1\]"),
        (lambda: scl.WSN(scl.SmallCNN(4), keep=1.1), r"keep=1.1\)"),
        (lambda: scl.WSN(scl.SmallCNN(4), 1e-4).build((1, 8, 8), 4), r"keep=0.0001\): it keeps none of backbone"),
        (lambda: scl.WeightScores(), "keep=None, threshold=None.*give one of them"),
        (lambda: scl.WeightScores(0.5, negates=True), "negates=True.*: a positive threshold is needed"),
        (lambda: scl.WeightScores(0.5, 0.1), "keep=0.5, threshold=0.1.*give one of them"),
        (lambda: scl.SupSup(scl.SmallCNN(4), subnetworks=scl.TaskSubnetworks()), "no weight is ever free; use 'share'"),
        (
            lambda: trainer(epochs=2).fit(scl.SupSup(scl.SmallCNN(4), train_free=2), toy_tasks(2)),
            r"TrainFreeWeights\(epochs=2\): task 0 has 2 epochs, so none is left to learn its mask",
        ),
        (lambda: scl.Piggyback(scl.SmallCNN(4), subnetworks=scl.TaskSubnetworks()), "after the first task no weight"),
        (lambda: scl.SupSup(scl.SmallCNN(4), train_free=-1), r"SupSup\(train_free=-1\): how many"),
        (lambda: scl.SupSup(scl.SmallCNN(4), train_free=None), r"SupSup\(train_free=None\)"),
        (lambda: scl.Piggyback(scl.SmallCNN(4), ternary="no"), r"Piggyback\(ternary='no'\): ternary is True or False"),
        (lambda: scl.Piggyback(scl.SmallCNN(4), threshold=0.0, ternary=True), r"Piggyback\(threshold=0.0, ternary"),
        (lambda: scl.Piggyback(scl.SmallCNN(4), init=float("inf")), "init=inf.*finite"),
        (lambda: scl.Piggyback(scl.SmallCNN(4), threshold=None), "threshold=None"),
        (lambda: scl.WSN(scl.SmallCNN(4), subnetworks=scl.TaskSubnetworks(share=False)), "leave share=False out"),
        (lambda: scl.SupSup(scl.SmallCNN(4), policies=[scl.FromScratch()]), "leave FromScratch out"),
        (lambda: trainer().fit(scl.WSN(scl.SmallCNN(4), objective=scl.LwF()), toy_tasks(2)), "WSN: LwF computes with"),
        (
            lambda: trainer().fit(scl.SupSup(scl.SmallCNN(4), objective=scl.EWC()), toy_tasks(2)),
            "SupSup: EWC computes with",
        ),
        (
            lambda: trainer().fit(scl.WSN(scl.SmallCNN(4), objective=scl.ER(), update=scl.LaMAML()), toy_tasks(2)),
            "WSN: LaMAML computes with",
        ),
        (lambda: scl.Piggyback(scl.SmallCNN(4), init=0.001), r"threshold=0.005, init=0.001\): scores start above"),
        (
            lambda: trainer(epochs=1).fit(scl.WSN(scl.SmallCNN(4), keep=1.0), toy_tasks(3)),
            "task 1 of 3 has no free weight in its mask; the free weights ended with task 0",
        ),
        (
            lambda: scl.WSN(scl.SmallCNN(4)).predict(torch.zeros(1, 1, 8, 8), 0),
            "task 0 was never trained",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
