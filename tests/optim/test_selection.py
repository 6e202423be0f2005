"""Data selection inside a training step: of the batch, and of each draw from memory."""

import lightning.pytorch as pl
import pytest
import torch
from torch.nn import functional as F
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.demos import toy_tasks
from lightning_sparse_cl.objectives import base


class Watched(scl.DERpp):
    """Keeps what each pass of each step sees, and the losses and weights that it starts from."""

    def __init__(self) -> None:
        super().__init__(40, 10)
        self.steps: list[list[dict]] = []

    def draw(self, prepare):
        self.steps.append([])
        return super().draw(prepare)

    def forward(self, model: base.Learner, x, y, replay):
        terms = super().forward(model, x, y, replay)
        self.steps[-1].append(
            {"x": x, "replay": replay, "gradient": torch.is_grad_enabled(), "losses": terms["per_sample"].detach(),
             "replayed": terms.get("replayed")}
        )  # fmt: skip
        return terms


def steps(update: scl.UpdateRule, selection: scl.LossSelection) -> list[list[dict]]:
    """Of a fit of two epochs of five steps."""
    pl.seed_everything(0, verbose=False)
    objective = Watched()
    module = scl.ContinualModule(scl.SmallMLP([8]), objective, update, selection=selection)
    trainer(epochs=2).fit(module, toy_tasks(num_tasks=1, per_class=40, batch_size=16))
    return objective.steps


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same samples in any order."""
    rows = [sorted(map(tuple, x.flatten(1).tolist())) for x in (a, b)]
    return rows[0] == rows[1]


@pytest.mark.parametrize("update", [scl.SingleBackward(), scl.SharpnessAware(), scl.SharpnessAware(replays=False)])
def test_training_selects_the_largest_losses_of_the_batch_and_of_each_draw(update):
    chosen = 0
    for ranking, *passes in steps(update, scl.LossSelection(0.5, 0.25, 1, replay=0.3))[5:]:
        assert not ranking["gradient"] and len(ranking["x"]) == 16 and all(p["gradient"] for p in passes)
        sizes = [8, 4] if len(passes) == 2 else [4]
        for one, size in zip(passes, sizes, strict=True):
            assert same(one["x"], ranking["x"][ranking["losses"].topk(size).indices])
            assert not same(one["x"], ranking["x"][:size])
            if one["replay"] is None:
                assert isinstance(update, scl.SharpnessAware) and not update.replays and one is passes[0]
                continue
            for draw, of, losses in zip(one["replay"], ranking["replay"], ranking["replayed"], strict=True):
                top = losses.topk(3).indices
                assert same(draw.inputs, of.inputs[top]) and torch.equal(draw.labels, of.labels[top])
                assert draw.logits is not None and torch.equal(draw.logits, of.logits[top])
                chosen += not same(draw.inputs, of.inputs[:3])
    assert chosen


def test_a_warm_up_sees_everything_in_one_pass():
    for (one,) in steps(scl.SingleBackward(), scl.LossSelection(0.5, 0.25, 1, replay=0.3))[:5]:
        assert one["gradient"] and len(one["x"]) == 16
        assert one["replay"] is None or [len(d.labels) for d in one["replay"]] == [10, 10]


@pytest.mark.parametrize("objective", [scl.ER(20, 6), scl.DER(20, 6), scl.DERpp(20, 6), scl.DERppOneDraw(20, 6)])
def test_losses_of_exemplars_are_those_of_the_formula(objective):
    """The mean of them is what the paper adds, to be summed over draws."""
    logits = [torch.randn(6, 4) for _ in range(objective.draws)]
    replay = [
        scl.objectives.Exemplars(torch.zeros(6, 1), torch.arange(6) % 4, torch.zeros(6), torch.randn(6, 4))
        for _ in range(objective.draws)
    ]
    losses = objective.replay_losses(logits, replay)
    assert [each.shape for each in losses] == [(6,)] * objective.draws
    expected = 0.0
    if isinstance(objective, scl.DER):
        expected = objective.alpha * F.mse_loss(logits[0], replay[0].logits)
    if not isinstance(objective, scl.DER) or isinstance(objective, scl.DERpp):
        expected = expected + getattr(objective, "beta", 1.0) * F.cross_entropy(logits[-1], replay[-1].labels)
    torch.testing.assert_close(torch.stack([each.mean() for each in losses]).sum(), expected)


@pytest.mark.parametrize(("forward", "sizes"), [("joint", [26]), ("separate", [16, 10])])
@pytest.mark.parametrize("replays", [True, False])
def test_batch_norm_moves_in_the_pass_that_sees_the_exemplars(replays, forward, sizes):
    """Once a step; an ascent without replay would move it by the current task's images alone."""
    pl.seed_everything(0, verbose=False)
    objective = scl.ER(40, 10, forward=forward)
    module = scl.ContinualModule(scl.SmallCNN(4), objective, scl.SharpnessAware(replays=replays))
    norm = next(m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d))
    seen: list[tuple[int, int]] = []  # samples of each pass, and how often statistics had moved before it
    norm.register_forward_pre_hook(lambda layer, args: seen.append((len(args[0]), int(layer.num_batches_tracked))))
    trainer(epochs=1).fit(module, toy_tasks(num_tasks=1, per_class=40, batch_size=16))
    expected = [16, *sizes * 4]  # in the first step the memory is empty
    assert int(norm.num_batches_tracked) == len(expected)
    moved = [n for (n, before), (_, after) in zip(seen, [*seen[1:], (0, len(expected))]) if after > before]
    assert moved == expected


def test_an_objective_that_forgets_to_tell_losses_is_named():
    class Silent(scl.ER):
        def forward(self, model, x, y, replay):
            return {k: v for k, v in super().forward(model, x, y, replay).items() if k != "replayed"}

    module = scl.ContinualModule(scl.SmallMLP([8]), Silent(40, 10), selection=scl.LossSelection(1, 1, 0, replay=0.4))
    with pytest.raises(ValueError, match=r"LossSelection\(replay=0.4\): Silent.forward\(\) returns no 'replayed'"):
        trainer(epochs=1).fit(module, toy_tasks(num_tasks=1))


def test_an_objective_of_before_is_told_what_to_override():
    with pytest.raises(TypeError, match=r"Old.replay_loss\(\) is not called any more: override replay_losses"):

        class Old(scl.ER):
            def replay_loss(self, logits, replay):
                return F.cross_entropy(logits[0], replay[0].labels)

    class Single(scl.ER):
        def replay_losses(self, logits, replay):
            return F.cross_entropy(logits[0], replay[0].labels, reduction="none")

    with pytest.raises(TypeError, match=r"Single.replay_losses\(\) returns a list with one tensor per draw, 1 here"):
        trainer(epochs=1).fit(scl.ContinualModule(scl.SmallMLP([8]), Single(40, 10)), toy_tasks(num_tasks=1))


def test_draws_of_another_form_need_no_losses_of_each():
    class Own(scl.ER):
        def draw(self, prepare):
            drawn = super().draw(prepare)
            return None if drawn is None else (drawn[0].inputs, drawn[0].labels)

        def forward(self, model, x, y, replay):
            terms = scl.CrossEntropy.forward(self, model, x, y, None)
            return terms if replay is None else terms | {"rest": F.cross_entropy(model(replay[0]), replay[1])}

    trainer(epochs=1).fit(scl.ContinualModule(scl.SmallMLP([8]), Own(40, 10)), toy_tasks(num_tasks=1))


@pytest.mark.parametrize("objective", [None, scl.EWC(), scl.LwF(), scl.CO2L(40, 8)])
def test_selection_of_replay_without_replay_is_refused(objective):
    with pytest.raises(ValueError, match=r"LossSelection\(replay=0.4\): \w+ returns no loss for each") as error:
        scl.ContinualModule(scl.SmallMLP([8]), objective, selection=scl.LossSelection(replay=0.4))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [0, -0.1, 1.1, float("nan"), "0.4", True, None])
def test_a_fraction_is_in_0_to_1(value):
    with pytest.raises(ValueError, match=r"LossSelection\(replay="):
        scl.LossSelection(replay=value)
