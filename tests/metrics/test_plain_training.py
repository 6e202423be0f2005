"""FLOPs against a count by hand: what SAM, selection and replay cost beside one plain pass over served and drawn."""

import itertools

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.demos import toy_tasks
from lightning_sparse_cl.metrics import DenseCost

BATCH, DRAW, STEPS, EPOCHS, WARMUP = 16, 10, 5, 3, 1
DRAWS = {"CrossEntropy": 0, "ER": 1, "DERpp": 2, "DERppOneDraw": 1}
SELECTIONS = [None, *itertools.product((1.0, 0.5), (1.0, 0.25), (1.0, 0.4))]
CASES = [(o, s) for o in DRAWS for s in SELECTIONS if DRAWS[o] or s is None or s[2] == 1]


def by_hand(sam: bool, replays: bool, selection: tuple[float, float, float] | None, draws: int) -> tuple[int, int, int]:
    """Samples of plain training, sent forward, and of these backward."""
    plain = forward = backward = 0
    sse, ere, rep = selection or (1.0, 1.0, 1.0)
    for epoch, step in itertools.product(range(EPOCHS), range(STEPS)):
        warm = epoch < WARMUP
        drawn = draws if epoch or step else 0  # the first batch finds the memory empty
        of_batch = {stage: BATCH if warm else round(part * BATCH) for stage, part in (("up", sse), ("down", ere))}
        of_draw = DRAW if warm else round(rep * DRAW)
        passes = [(of_batch["up"], of_draw * drawn if replays else 0)] * sam + [(of_batch["down"], of_draw * drawn)]
        if of_draw < DRAW and drawn:  # everything is ranked
            forward += BATCH + DRAW * drawn
        elif passes[0][0] < BATCH:
            forward += BATCH
        plain += BATCH + DRAW * drawn
        forward += sum(map(sum, passes))
        backward += sum(map(sum, passes))
    return plain, forward, backward


@pytest.mark.parametrize(("objective", "selection"), CASES)
@pytest.mark.parametrize("update", ["plain", "SAM", "SAM without replay"])
def test_every_selection_with_and_without_sam(objective, update, selection):
    draws = DRAWS[objective]
    loss = getattr(scl, objective)(*([40, DRAW] if draws else []))
    rule = scl.SingleBackward() if update == "plain" else scl.SharpnessAware(replays=update == "SAM")
    select = scl.LossSelection(*selection[:2], WARMUP, selection[2]) if selection else None
    flops, data = scl.FlopsCounter(), toy_tasks(num_tasks=1, per_class=40, batch_size=BATCH)
    module = scl.ContinualModule(scl.SmallMLP([8]), loss, rule, selection=select)
    trainer(flops, epochs=EPOCHS).fit(module, data)
    plain, forward, backward = by_hand(update != "plain", update != "SAM without replay", selection, draws)
    macs, found = DenseCost.of(module, data.input_shape).total_macs(), flops.summary()
    assert (found["samples"], found["forward"], found["backward"]) == (BATCH * STEPS * EPOCHS, forward, backward)
    assert found["training"] == 2 * macs * (forward + 2 * backward)
    assert found["dense"] == 6 * macs * plain


def test_masks_and_removed_data_show_and_the_yardstick_does_not_move():
    shares = {}
    for name, policies in {
        "nothing": [], "masks": [scl.SNIP(0.5)], "removal": [scl.DynamicDataRemoval(0.5, 2, 1)],
    }.items():  # fmt: skip
        flops = scl.FlopsCounter()
        module = scl.ContinualModule(scl.SmallCNN(4), policies=policies)
        trainer(flops, epochs=4).fit(module, toy_tasks(num_tasks=1, per_class=40, batch_size=BATCH))
        shares[name] = flops.summary()["dense"], flops.summary()["training"] / flops.summary()["dense"]
    dense, plain = shares["nothing"]
    assert plain == 1
    assert all(each == pytest.approx(dense) for each, _ in shares.values())
    assert shares["masks"][1] < 1 and shares["removal"][1] < 0.9


def test_a_second_view_and_a_teacher_are_paid_for():
    flops = scl.FlopsCounter()
    module = scl.ContinualModule(scl.SmallCNN(4), scl.CO2L(40, 8, dim=4))
    trainer(flops, epochs=2).fit(module, toy_tasks(num_tasks=1))
    co2l = flops.summary()
    assert co2l["training"] / co2l["dense"] == pytest.approx(2, rel=0.05)  # and the projection, which is small
    replaying = scl.FlopsCounter()
    module = scl.ContinualModule(scl.SmallCNN(4), scl.CO2L(40, 8, dim=4))
    trainer(replaying, epochs=1).fit(module, toy_tasks(num_tasks=2))
    assert replaying.summary()["dense"] == pytest.approx(co2l["dense"] * (160 + 5 * 8) / 160, rel=0.01)
    flops = scl.FlopsCounter()
    trainer(flops, epochs=2).fit(scl.ContinualModule(scl.SmallCNN(4), scl.LwF()), toy_tasks(num_tasks=2))
    assert flops.summary()["training"] / flops.summary()["dense"] == pytest.approx((3 + 4) / 6)


class OwnSAM(pl.LightningModule):
    """A foreign module that steps twice, on the half of the batch with the largest losses."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 6))

    def training_step(self, batch, batch_idx):
        x, y = batch
        with torch.no_grad():
            losses = nn.functional.cross_entropy(self.net(x), y, reduction="none")
        top = losses.topk(len(y) // 2).indices
        for _ in range(2):
            self.optimizers().zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self.net(x[top]), y[top]))
            self.optimizers().step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class MicroBatches(OwnSAM):
    """One that passes each sample once, a few at a time."""

    def training_step(self, batch, batch_idx):
        self.optimizers().zero_grad()
        for x, y in zip(batch[0].split(4), batch[1].split(4)):
            self.manual_backward(nn.functional.cross_entropy(self.net(x), y))
        self.optimizers().step()


def test_parts_of_a_batch_are_plain_training_and_a_reference_gradient_is_not():
    flops, data = scl.FlopsCounter(), toy_tasks(num_tasks=1, per_class=40, batch_size=BATCH)
    trainer(flops, epochs=1).fit(MicroBatches(), data)
    assert flops.summary()["training"] == flops.summary()["dense"] == 6 * 64 * 6 * BATCH * STEPS
    shares = []
    for module in (scl.demos.PlainClassifier(), scl.ContinualModule(scl.SmallCNN(4))):
        agem = scl.FlopsCounter()
        trainer(agem, scl.AGEM(30, 32), epochs=1).fit(module, toy_tasks())
        shares.append(agem.summary()["training"] / agem.summary()["dense"])
    assert shares[0] == pytest.approx(shares[1]) and shares[0] > 1.5


def test_passes_of_a_foreign_module_show_too():
    flops, data = scl.FlopsCounter(), toy_tasks(num_tasks=1, per_class=40, batch_size=BATCH)
    trainer(flops, epochs=1).fit(OwnSAM(), data)
    found = flops.summary()
    assert found["dense"] == 6 * 64 * 6 * BATCH * STEPS
    assert found["training"] == (2 + 2 * 6 / 2) * 64 * 6 * BATCH * STEPS
