"""Modules of other packages, each with every sparsity policy: the fit runs, and exactly what was asked for is zero."""

from __future__ import annotations

import copy
import warnings

import lightning.pytorch as pl
import pytest
import torch
from foreign import (
    forecasting_models,
    geometric_models,
    lightly_models,
    plain_torch,
    reparametrised,
    segmentation_models,
    timm_models,
    torchvision_models,
    transformers_models,
)
from foreign.policies import POLICIES, SPARSITY
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_sparse_cl import Masks
from lightning_sparse_cl.metrics import DenseCost

FAMILIES = (
    timm_models, torchvision_models, segmentation_models, transformers_models, lightly_models, geometric_models,
    forecasting_models, plain_torch, reparametrised,
)  # fmt: skip
CASES = [case for family in FAMILIES for case in family.CASES]


class Watch(pl.Callback):
    """The masks before and after the first step, what the last step moves, and that what is held does not move."""

    def __init__(self):
        self.start, self.first, self.stepped, self.held, self.has_held = {}, {}, {}, {}, False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        masks = Masks.of(pl_module)
        if not self.start:
            self.start = {name: mask.clone() for name, mask in masks.alive.items()}
        updated = masks.updated
        self.held = {n: (updated[n], masks.alive.get(n), pl_module.get_parameter(n).detach().clone()) for n in updated}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for name in Masks.of(pl_module).alive:
            grad = pl_module.get_parameter(name).grad
            self.stepped[name] = torch.tensor(False) if grad is None else grad != 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        masks = Masks.of(pl_module)
        if not self.first:
            self.first = {name: mask.clone() for name, mask in masks.alive.items()}
        for name, (updated, alive, before) in self.held.items():
            now = masks.alive.get(name)
            still = ~updated if now is None else ~updated & now
            still = still if alive is None else still & alive
            moved = still & (pl_module.get_parameter(name) != before)
            assert not moved.any(), f"{name}: {int(moved.sum())} of the held weights were updated"
            self.has_held |= bool(still.any())


def fit(case, callbacks, folder, seed=0, epochs=3, **kwargs):
    """The module before and after the fit, the watch, and what was warned."""
    pl.seed_everything(seed, verbose=False)
    module, loader = case.build()
    before, watch = copy.deepcopy(module.state_dict()), Watch()
    keeper = ModelCheckpoint(folder, save_last=True, save_top_k=0)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, callbacks=[*callbacks, watch, keeper],
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(module, loader, **kwargs)
    return module, before, watch, [str(w.message) for w in said]


@pytest.mark.foreign
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_policy(case, policy, tmp_path, record_property):
    for key, value in {"module": case.name, "package": case.package, "policy": policy.name}.items():
        record_property(key, value)
    scored = {} if case.loss is None else {"loss": case.loss}

    if (words := case.words(policy.name)) is not None:
        with pytest.raises((ValueError, RuntimeError)) as error:
            fit(case, policy.make(scored), tmp_path)
        assert words in str(error.value)
        assert "\n" not in str(error.value)
        record_property("saw", f"refused: {error.value}")
        return

    callbacks = policy.make(scored)
    module, before, watch, said = fit(case, callbacks, tmp_path)
    masks = Masks.of(module).alive
    check_frozen(module, before, masks)
    check_counts(module, masks, policy, watch)
    check_checkpoint(module, before, masks, tmp_path / "last.ckpt")
    if policy.moves:
        check_moved(watch.first, masks)
    if "DynamicGradientMasking" in policy.name:
        assert watch.has_held
    saw = f"{masked(module, masks):.0%} of the trained weights in masks"
    if policy.measures is not None:
        other, *_ = fit(case, policy.make(scored)[:1], tmp_path / "without")
        for (name, value), without in zip(module.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(value, without), f"{name} is another with {policy.measures.__name__}"
        saw = counted(next(c for c in callbacks if isinstance(c, policy.measures)), said)
    record_property("saw", saw)


@pytest.mark.foreign
@pytest.mark.parametrize("case", [c for c in CASES if c.words("SET") is None], ids=lambda c: c.name)
def test_copies_and_resumed_fits_go_on_with_the_masks(case, tmp_path):
    policy = next(p for p in POLICIES if p.name == "SET")
    module, *_ = fit(case, policy.make({}), tmp_path, epochs=2)
    masks = Masks.of(module).alive
    copied = Masks.of(copy.deepcopy(module) if case.is_copied else module).alive
    assert masks.keys() == copied.keys()
    assert all(torch.equal(mask, copied[name]) for name, mask in masks.items())

    resumed, before, watch, _ = fit(
        case, policy.make({}), tmp_path / "on", seed=1, ckpt_path=tmp_path / "last.ckpt", weights_only=False
    )
    assert all(torch.equal(mask, watch.start[name]) for name, mask in masks.items())
    check_frozen(resumed, before, Masks.of(resumed).alive)
    check_counts(resumed, Masks.of(resumed).alive, policy, watch)


def masked(module, masks):
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return sum(m.numel() for m in masks.values()) / trained


def check_frozen(module, before, masks):
    """What requires no gradient has no mask, and not more zeros than it had."""
    for name, weight in module.named_parameters():
        if not weight.requires_grad:
            assert name not in masks
            assert weight.count_nonzero() >= before[name].count_nonzero()


def check_counts(module, masks, policy, watch):
    """Exactly as many weights are alive as was asked for, and exactly the others are zero.

    Weights that have grown start from zero, and stay there where they have no gradient (behind a dead unit).
    """
    assert masks
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    asked = {name: (1 - SPARSITY) * mask.numel() for name, mask in masks.items()}
    if policy.division == "each":
        assert kept == {name: round(part) for name, part in asked.items()}
    else:
        assert sum(kept.values()) == round(sum(asked.values()))
    if policy.division == "shared":
        assert all(abs(kept[name] - asked[name]) < 1 for name in masks)
    for name, mask in masks.items():
        zero = module.get_parameter(name) == 0
        assert zero[~mask].all(), name
        assert not (zero & mask & (watch.stepped[name] if policy.moves else mask)).any(), f"{name} has zeros too many"


def check_checkpoint(module, before, masks, path):
    """It has the keys of the module as it was built, its zeros and its masks."""
    saved = torch.load(path, weights_only=False)
    assert saved["state_dict"].keys() == before.keys()
    for name, mask in masks.items():
        assert torch.equal(saved["masks"]["alive"][name], mask)
        assert torch.equal(saved["state_dict"][name], module.get_parameter(name)), name


def check_moved(first, masks):
    """Other weights are alive than after the first step, wherever there are enough that some are exchanged."""
    assert first.keys() == masks.keys()
    still = [name for name, mask in masks.items() if mask.sum() >= 20 and torch.equal(mask, first[name])]
    assert not still, f"the masks of {', '.join(still)} have not moved"


def counted(measure, said):
    """That the measure has figures, or the words with which it says that it has none."""
    summary = measure.summary()
    if "dense" in summary:
        assert 0 < summary["training" if "training" in summary else "formula"] < summary["dense"]
        return "counted"
    words = {w for w in said if "not counted" in w}
    assert len(words) == 1, "no figures, and not a word"
    return words.pop()


@pytest.mark.foreign
@pytest.mark.parametrize("build", [transformers_models.build_bert, transformers_models.build_gpt2])
def test_flops_are_those_of_a_training_forward(build):
    module, loader = build()
    batch = next(iter(loader))
    cost = DenseCost.of_call(module, **batch)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module.train()(**batch)
    assert 2 * cost.total_macs() == pytest.approx(counter.get_total_flops(), rel=0.01) and not cost.not_counted
