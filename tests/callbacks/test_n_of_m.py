"""n:m: in every group of m neighbouring inputs exactly n weights are alive, and they are the best ones."""

from functools import partial

import pytest
import torch
from torch.optim import SGD
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.callbacks.identity import describe
from lightning_sparse_cl.demos import toy_tasks
from lightning_sparse_cl.sparsity.blocks import NofM
from lightning_sparse_cl.sparsity.scores import top_k_mask, top_k_masks

POLICIES = {
    "one shot": lambda s, b: [scl.OneShotPruning(s, block=b)],
    "global": lambda s, b: [scl.OneShotPruning(s, ranking="global", block=b)],
    "inside": lambda s, b: [scl.OneShotPruning(s, epoch=1, block=b), scl.Reopen("zero", 0.5)],
    "gradual": lambda s, b: [scl.GradualPruning(s, block=b)],
    "SNIP": lambda s, b: [scl.SNIP(s, block=b)],
    "TDM": lambda s, b: [scl.TaskAwareDynamicMasking(s, 1, p_intra=0.1, p_inter=0.1, block=b)],
    "SET": lambda s, b: [scl.SET(s, interval=3, block=b)],
    "RigL": lambda s, b: [scl.RigL(s, interval=3, block=b)],
    "RigL, frozen": lambda s, b: [scl.RigL(s, interval=3, block=b), scl.FreezeMasks()],
    "SET, frozen": lambda s, b: [scl.SET(s, interval=3, block=b), scl.FreezeMasks()],
}


def counts(mask, m):
    """Alive weights of each group."""
    return mask.unflatten(1, (-1, m)).sum(2)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (3, 8)])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_group_has_n_of_m_at_the_end_and_while_masks_move(policy, n, m):
    seen = []

    class Look(scl.TaskCallback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append({name: mask.clone() for name, mask in scl.Masks.of(pl_module).alive.items()})

    module = scl.ContinualModule(
        scl.SmallCNN(8), scl.ER(30, 8), optimizer=partial(SGD, lr=0.05, momentum=0.9),
        policies=[*POLICIES[policy](1 - n / m, f"{n}:{m}"), Look()],
    )  # fmt: skip
    trainer(epochs=3).fit(module, toy_tasks())
    masks = scl.Masks.of(module).alive
    assert masks
    for name, mask in masks.items():
        assert counts(mask, m).eq(n).all(), name
        assert not module.get_parameter(name)[~mask].any()
    if policy.split(",")[0] in ("SNIP", "SET", "RigL"):  # at every step
        assert all(counts(mask, m).eq(n).all() for at in seen for mask in at.values())
    if policy in ("TDM", "SET", "RigL"):
        assert len({b"".join(mask.numpy().tobytes() for mask in at.values()) for at in seen}) > 5  # they move


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_of_each_group_are_kept(dtype):
    torch.manual_seed(0)
    score = torch.rand(6, 8, 3, 3, dtype=dtype)
    free = {"w": torch.rand(6, 8, 3, 3) < 0.9}
    taken = {"w": ~free["w"] & (torch.rand(6, 8, 3, 3) < 0.5)}
    slots = 6 * 2 * 9 * 2
    rated = NofM(2, 4).rated({"w": score}, free, taken)
    room = (2 - counts(taken["w"], 4)).clamp(min=0)
    most = torch.minimum(room, counts(free["w"], 4))
    mask = top_k_masks(rated, int(most.sum()), free)["w"]
    assert slots > int(most.sum()) > slots / 2
    assert torch.equal(counts(mask, 4), most)
    groups = score.float().masked_fill(~free["w"], -1).unflatten(1, (-1, 4))
    worst = groups.masked_fill(~mask.unflatten(1, (-1, 4)), 2).amin(2)
    left = groups.masked_fill(mask.unflatten(1, (-1, 4)), -1).amax(2)
    assert (worst >= left).all()


SCORES = {
    "one minus infinity": lambda w: w.abs().index_fill(0, torch.tensor([0]), -torch.inf),
    "infinite": lambda w: torch.full_like(w, torch.inf),
    "large": lambda w: w.abs().double() * 1e300,
    "an outlier": lambda w: w.abs().index_fill(0, torch.tensor([0]), 1e30),
    "equal": torch.ones_like,
    "negative": lambda w: -w.abs(),
}


@pytest.mark.parametrize("ranking", ["layer", "global"])
@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("scores", SCORES)
def test_any_scores(scores, rounds, ranking):
    weights = {}

    class Own(scl.ScorePruning):
        def scores(self, trainer, pl_module, batch):
            weights.update({n: pl_module.get_parameter(n).detach().clone() for n in self.names(pl_module)})
            return {name: SCORES[scores](weight) for name, weight in weights.items()}

    module = scl.ContinualModule(scl.SmallCNN(8), policies=[Own(0.5, ranking, rounds=rounds, block="2:4")])
    trainer(epochs=1).fit(module, toy_tasks(num_tasks=1))
    for name, mask in scl.Masks.of(module).alive.items():
        assert counts(mask, 4).eq(2).all(), name
        if scores == "large" or (scores == "negative" and rounds == 1):
            score = SCORES[scores](weights[name]).unflatten(1, (-1, 4))
            assert torch.equal(mask.unflatten(1, (-1, 4)), score >= score.topk(2, 2).values[:, :, 1:]), name


def test_the_groups_with_the_best_scores_come_first():
    x = {"a": torch.arange(32.0).view(4, 8) * 100, "b": torch.arange(32.0).view(4, 8)}
    everywhere = {name: torch.ones(4, 8, dtype=torch.bool) for name in x}
    masks = top_k_masks(NofM(2, 4).rated(x, everywhere, {}), 6, everywhere)
    assert masks["a"].nonzero().tolist() == [[2, 6], [2, 7], [3, 2], [3, 3], [3, 6], [3, 7]] and not masks["b"].any()


def test_the_smallest_weights_are_dropped_wherever_they_are():
    """As without groups: which weights may be grown is what n:m restricts."""
    torch.manual_seed(0)
    x, alive = torch.randn(8, 16).abs(), torch.zeros(8, 16, dtype=torch.bool)
    alive.unflatten(1, (-1, 4))[:, :, :2] = True
    protected = alive & (torch.rand(8, 16) < 0.2)
    pool = alive & ~protected
    kept = top_k_masks(NofM(2, 4).rated({"w": x}, {"w": pool}, {"w": protected}), 20, {"w": pool})["w"]
    assert torch.equal(kept, top_k_mask(x, 20, pool))


def test_masks_of_before_that_are_not_n_of_m_are_told():
    module = scl.ContinualModule(scl.SmallCNN(8), policies=[scl.SNIP(0.5)])
    trainer(epochs=1).fit(module, toy_tasks(num_tasks=1))
    again = scl.ContinualModule(module.backbone, policies=[scl.SNIP(0.5, block="2:4")])
    for name, mask in scl.Masks.of(module).alive.items():
        scl.Masks.of(again).set_alive(name, mask)
    with pytest.warns(UserWarning, match=r"SNIP\(block='2:4'\): .* masks, which are not 2:4, and keep them"):
        trainer(epochs=1).fit(again, toy_tasks(num_tasks=1))


@pytest.mark.parametrize("sparsity", [2 / 3, 0.667])
def test_sparsity_is_that_of_n_of_m(sparsity):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 192), torch.nn.ReLU(), torch.nn.Linear(192, 192))
    module = scl.ContinualModule(net, policies=[scl.RigL(sparsity, interval=3, block="1:3")])
    trainer(epochs=1).fit(module, toy_tasks(num_tasks=1))
    assert all(counts(mask, 3).eq(1).all() for mask in scl.Masks.of(module).alive.values())


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (
            lambda: scl.OneShotPruning(0.9, block="2:4"),
            r"OneShotPruning\(sparsity=0.9, block='2:4'\): 2:4 .* of 0.5",
        ),
        (lambda: scl.RigL(0.5, block="4:2"), r"RigL\(block='4:2'\): outputs and inputs of a block, .* or n:m"),
        (lambda: scl.SNIP(0.5, block=124), r"SNIP\(block=124\): .* or n:m in quotes, such as '2:4'"),  # 2:4 in YAML
        (lambda: scl.SNIP(0.5, block="02:4"), r"SNIP\(block='02:4'\)"),
        (lambda: scl.SNIP(0.5, block="two"), r"SNIP\(block='two'\)"),
        (lambda: scl.SNIP(0.5, block="2:4", distribution="erk"), r"SNIP\(distribution='erk', block='2:4'\)"),
        (lambda: scl.OneShotPruning(0.5, "share", block="2:4"), r"OneShotPruning\(of='share', block='2:4'\)"),
        (lambda: scl.SNFS(0.5, block="2:4"), r"SNFS\(block='2:4'\): it moves weights between layers"),
        (lambda: scl.EsaCL(scl.SmallCNN(8), sparsity=0.5, block="2:4"), r"EsaCL\(block='2:4'\)"),
    ],
)
def test_bad_input(make, error):
    with pytest.raises(ValueError, match=error):
        make()


def test_layers_of_other_sizes_are_named():
    module = scl.ContinualModule(scl.SmallCNN(6), policies=[scl.SNIP(0.5, block="2:4")])
    with pytest.raises(ValueError, match=r"SNIP\(block='2:4'\): .*weight has 6 inputs, .* multiple of 4"):
        trainer(epochs=1).fit(module, toy_tasks())


def test_frozen_weights_are_refused():
    policies = [scl.OneShotPruning(0.5, block="2:4"), scl.FreezeMasks()]
    module = scl.ContinualModule(scl.SmallCNN(8), policies=policies)
    with pytest.raises(ValueError, match=r"OneShotPruning\(block='2:4'\): .* has frozen weights"):
        trainer(epochs=1).fit(module, toy_tasks())


def test_a_run_says_which_it_was():
    """2:4 and blocks of two by four are not the same in the settings that a resumed run must share."""
    told = []
    for sparsity, block in ((0.5, "2:4"), (0.5, [2, 4])):
        found = {}
        describe(scl.SNIP(sparsity, block=block), "policy", found)
        told.append(found)
    assert told[0] != told[1] and told[0]["policy.block.m"] == 4
