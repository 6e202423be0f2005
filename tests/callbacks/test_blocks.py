"""Weights are ranked, dropped, grown and given back in whole blocks, and in exact numbers of them."""

from functools import partial

import pytest
import torch
from torch.optim import SGD
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.demos import toy_tasks
from lightning_sparse_cl.optim.polytopes import KSparsePolytope
from lightning_sparse_cl.sparsity.blocks import Block

BLOCKS = [(1, 1), (2, 2), (4, 1), (1, 4)]
POLICIES = {
    "one shot": lambda s, b: [scl.OneShotPruning(s, block=b), scl.Reopen("zero", 0.5, block=b)],
    "global": lambda s, b: [scl.OneShotPruning(s, ranking="global", block=b)],
    "inside": lambda s, b: [scl.OneShotPruning(s, epoch=1, block=b)],
    "freezing": lambda s, b: [scl.OneShotPruning(s, block=b), scl.FreezeMasks(), scl.Reopen("random", block=b)],
    "gradual": lambda s, b: [scl.GradualPruning(s, block=b)],
    "SNIP": lambda s, b: [scl.SNIP(s, block=b)],
    "TDM": lambda s, b: [scl.TaskAwareDynamicMasking(s, 1, p_intra=0.1, p_inter=0.1, block=b)],
    "SET": lambda s, b: [scl.SET(s, interval=3, block=b)],
    "RigL": lambda s, b: [scl.RigL(s, interval=3, block=b)],
    "SNFS": lambda s, b: [scl.SNFS(s, interval=3, block=b)],
}


def of_whole_blocks(mask, block):
    parts = Block(*block).parts(mask)
    return torch.equal(parts.all(3).all(1), parts.any(3).any(1))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_masks_are_of_whole_blocks_and_exact_at_every_step(policy, block):
    seen = []

    class Look(scl.TaskCallback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            for name, mask in scl.Masks.of(pl_module).alive.items():
                seen.append(mask.clone())
                assert of_whole_blocks(mask, block), name
                assert not pl_module.get_parameter(name)[~mask].any()

        on_after_task_end = on_train_batch_end

    module = scl.ContinualModule(
        scl.SmallCNN(8), scl.ER(30, 8), optimizer=partial(SGD, lr=0.05, momentum=0.9),
        policies=[*POLICIES[policy](0.6, block), Look()],
    )  # fmt: skip
    trainer(epochs=3).fit(module, toy_tasks())
    assert seen
    if policy in ("TDM", "SET", "RigL", "SNFS"):
        assert len({mask.numpy().tobytes() for mask in seen}) > 5  # they move
    masks = scl.Masks.of(module).alive
    size = Block(*block).size
    if policy == "freezing":  # each task keeps its part of the blocks that are free
        for mask in masks.values():
            n, kept = mask.numel() // size, 0
            for _ in range(3):
                kept += round(0.4 * (n - kept))
            assert int(mask.sum()) == size * kept
    elif policy in ("global", "SNFS"):
        total = sum(mask.numel() for mask in masks.values()) // size
        exact = round(0.4 * total) if policy == "global" else sum(round(0.4 * m.numel() / size) for m in masks.values())
        assert sum(int(mask.sum()) for mask in masks.values()) == size * exact
    else:
        for name, mask in masks.items():
            assert int(mask.sum()) == size * round(0.4 * mask.numel() / size), name


def test_the_best_blocks_are_kept():
    """By the sums of their scores, against a loop over all blocks."""
    weights = {}

    class Scores(scl.ScorePruning):
        def scores(self, trainer, pl_module, batch):
            weights.update({n: pl_module.get_parameter(n).detach().clone() for n in self.names(pl_module)})
            return {name: weight.abs() for name, weight in weights.items()}

    module = scl.ContinualModule(scl.SmallCNN(8), policies=[Scores(0.7, block=[2, 4])])
    trainer(epochs=1).fit(module, toy_tasks(num_tasks=1))
    for name, mask in scl.Masks.of(module).alive.items():
        size = weights[name].abs()
        norms = {
            (o, i, *at): float(size[(slice(o, o + 2), slice(i, i + 4), *at)].sum())
            for o in range(0, size.shape[0], 2)
            for i in range(0, size.shape[1], 4)
            for at in ((h, w) for h in range(3) for w in range(3))
        }
        best = sorted(norms, key=norms.__getitem__, reverse=True)[: round(0.3 * len(norms))]
        expected = torch.zeros_like(mask)
        for o, i, h, w in best:
            expected[o : o + 2, i : i + 4, h, w] = True
        assert torch.equal(mask, expected), name


@pytest.mark.parametrize("shape", [(8, 4), (8, 4, 3, 3)], ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_vertex_of_blocks_is_the_minimiser(shape, block, channels_last):
    """<m, v> is at most that of every other vertex of the kind: here of 200 drawn ones."""
    torch.manual_seed(0)
    m = torch.randn(shape)
    if channels_last and m.ndim == 4:
        m = m.to(memory_format=torch.channels_last)
    size = Block(*block).size
    polytope = KSparsePolytope(8, 0.5, Block(*block))
    v = polytope.lmo(m)
    assert int(v.count_nonzero()) == 8 and v.abs().max() == 0.5 and of_whole_blocks(v != 0, block)
    count = m.numel() // size
    for _ in range(200):
        chosen = torch.zeros(count, dtype=torch.bool)
        chosen[torch.randperm(count)[: 8 // size]] = True
        other = Block(*block).spread(chosen.view(Block(*block).sums(m).shape)) * torch.randn(shape).sign() * 0.5
        assert (m * v).sum() <= (m * other).sum() + 1e-6


def test_esacl_in_blocks_contracts_to_blocks():
    """What one-shot pruning in blocks removes is small where the vertices are blocks; not where they are weights."""
    lost = {}
    for name, vertices in (("blocks", None), ("weights", (1, 1))):
        torch.manual_seed(0)
        seen = []

        class Look(scl.TaskCallback):
            def on_before_task_end(self, trainer, pl_module, task):
                for weight in scl.sparse_weights(pl_module):
                    size = pl_module.get_parameter(weight).detach().abs()
                    sums = Block(2, 2).sums(size).flatten().sort(descending=True).values
                    seen.append(float(sums[round(0.2 * len(sums)) :].sum() / sums.sum()))  # noqa: B023 - of this round

        optimizer = partial(scl.StochasticFrankWolfe, k=0.2, lr=0.05, block=vertices)
        module = scl.EsaCL(scl.SmallCNN(16), scl.ER(30, 8), 0.8, optimizer=optimizer, block=(2, 2), policies=[Look()])
        trainer(epochs=6).fit(module, toy_tasks(num_tasks=1))
        lost[name] = sum(seen) / len(seen)
        assert all(of_whole_blocks(mask, (2, 2)) for mask in scl.Masks.of(module).alive.values())
    assert lost["blocks"] < 0.5 * lost["weights"], lost


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: scl.OneShotPruning(0.5, block=2), "OneShotPruning(block=2): outputs and inputs of a block"),
        (lambda: scl.RigL(0.5, block=[2, 0]), "RigL(block=[2, 0])"),
        (lambda: scl.SNIP(0.5, block=[2, 2, 2]), "SNIP(block=[2, 2, 2])"),
        (lambda: scl.Reopen(block=[1.0, 2]), "Reopen(block=[1.0, 2])"),
        (lambda: scl.EsaCL(scl.SmallCNN(4), block="22"), "EsaCL(block='22')"),
        (
            lambda: scl.EsaCL(scl.SmallCNN(4), block=[2, 2], reopen=scl.Reopen("zero", 0.5)),
            "both have the same blocks",
        ),
    ],
)
def test_wrong_blocks_are_refused_in_one_line(make, said):
    with pytest.raises(ValueError) as error:
        make()
    assert said in str(error.value) and "\n" not in str(error.value)


def test_layers_without_whole_blocks_are_named():
    module = scl.ContinualModule(scl.SmallCNN(6), policies=[scl.OneShotPruning(0.5, block=[4, 4])])
    with pytest.raises(ValueError, match=r"block=\[4, 4\]\): backbone.3.weight has 6 outputs and 6 inputs"):
        trainer(epochs=1).fit(module, toy_tasks())
