"""Every sparsity callback on a module that knows nothing of it, under every option of Lightning: exact zeros."""

import copy
import io
import pickle

import pytest
import torch
from foreign_module import PRUNED, Mlp, Streaming, TwoOptimizers, fit
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)

import lightning_sparse_cl as scl
from lightning_sparse_cl.callbacks.averaging import averages

ZEROS = 2 * (64 * 64 - round(0.2 * 64 * 64))
RULES = dict(sparsity=0.8, interval=4, fraction=0.3, until=0.5)
POLICIES = {
    "OneShotPruning": lambda loss: [scl.OneShotPruning(0.8)],
    "SNIP": lambda loss: [scl.SNIP(0.8, loss=loss)],
    "SNIP, global": lambda loss: [scl.SNIP(0.8, "global", loss=loss)],
    "SET": lambda loss: [scl.SET(**RULES)],
    "RigL": lambda loss: [scl.RigL(**RULES)],
    "SNFS": lambda loss: [scl.SNFS(**RULES)],
    "UnfiredGrowth": lambda loss: [scl.UnfiredGrowth(**RULES)],
    "MomentumGrowth": lambda loss: [scl.MomentumGrowth(**RULES)],
    "AdaptiveGrowth": lambda loss: [scl.AdaptiveGrowth(**RULES)],
    "TDM": lambda loss: [scl.TaskAwareDynamicMasking(0.8, interval=2, p_intra=0.01, loss=loss)],
    "DGM": lambda loss: [scl.DynamicGradientMasking(0.05, 3, loss=loss), scl.OneShotPruning(0.8)],
}
MOVING = {"SET", "RigL", "SNFS", "UnfiredGrowth", "MomentumGrowth", "AdaptiveGrowth", "TDM"}


def again(module, how, tmp_path):
    """The module that goes on: itself, or what is left of it after a copy, a pickle or a checkpoint."""
    if how == "deepcopy":
        return copy.deepcopy(module)
    if how == "pickle":
        return pickle.loads(pickle.dumps(module))
    if how == "torch.save":
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        return torch.load(file, weights_only=False)
    return Mlp.load_from_checkpoint(tmp_path / "last.ckpt")


def check_zeros(state, what):
    found = sum(int((state[name] == 0).sum()) for name in PRUNED)
    assert found == ZEROS, f"{what}: {found} zeros of {ZEROS}"


OPTIONS = {
    "stock": {},
    "accumulate 2": dict(accumulate_grad_batches=2),
    "accumulate 5": dict(accumulate_grad_batches=5),
    "clip norm": dict(gradient_clip_val=0.1),
    "clip value": dict(gradient_clip_val=0.1, gradient_clip_algorithm="value"),
    "bf16": dict(precision="bf16-mixed"),
    "max_steps": dict(max_steps=45, max_epochs=-1),
}
AVERAGES = {
    "EMA": lambda: EMAWeightAveraging(decay=0.9),
    "average": lambda: WeightAveraging(),
    "SWA": lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1),
}
DOORS = [
    *OPTIONS, "stream, max_steps", "stream, max_epochs", "two optimisers", "compile",
    *(f"{a} {where}" for a in AVERAGES for where in ("before", "after")),
    "deepcopy", "pickle", "torch.save", "load_from_checkpoint",
]  # fmt: skip


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.filterwarnings("ignore")
def test_exactly_the_zeros_asked_for(policy, door, tmp_path):
    torch.manual_seed(0)
    module, options, extra = Mlp(), dict(OPTIONS.get(door, {})), []
    loss = None
    if door.startswith("stream"):
        module = Streaming()
        options = dict(max_steps=45, max_epochs=-1) if door == "stream, max_steps" else {}
    elif door == "two optimisers":
        module = TwoOptimizers()
        loss = lambda module, batch: torch.nn.functional.cross_entropy(module(batch[0]), batch[1])  # noqa: E731
    elif door == "compile":
        module.net.compile(backend="eager")
    elif door.split()[0] in AVERAGES:
        extra = [AVERAGES[door.split()[0]]()]
    policies = POLICIES[policy](loss)
    listed = [*extra, *policies] if door.endswith("before") else [*policies, *extra]
    last = ModelCheckpoint(tmp_path, save_last=True)
    if "max_steps" in options:
        last = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=5)
    masks = Masks(door)
    trainer = fit(module, *listed, masks, last, **options)
    if door in ("deepcopy", "pickle", "torch.save", "load_from_checkpoint"):
        module = again(module, door, tmp_path)
        before = {name: mask.clone() for name, mask in scl.Masks.of(module).alive.items()}
        assert door == "load_from_checkpoint" or before.keys() == set(PRUNED)
        last = ModelCheckpoint(tmp_path / "again", save_last=True)
        trainer = fit(module, *POLICIES[policy](loss), last)
        if door != "load_from_checkpoint" and policy not in MOVING | {"OneShotPruning", "DGM"}:
            assert all(torch.equal(scl.Masks.of(module).alive[name], mask) for name, mask in before.items())
    check_zeros(dict(module.named_parameters()), "the live weights")
    for average in averages(trainer):
        check_zeros(dict(average.named_parameters()), "the averaged weights")
    saved = torch.load(last.last_model_path, weights_only=False)  # Lightning's averages keep a method in it
    check_zeros(saved["state_dict"], "the last checkpoint")
    assert list(saved["state_dict"]) == list(Mlp().state_dict()) or door == "compile"
    assert set(saved["masks"]["alive"]) == set(PRUNED)
    assert (masks.changes > 0) == (policy in MOVING), masks.changes


class Masks(scl.TaskCallback):
    """How often a mask was changed between batches, once there was one; and that the weights obey it all the time."""

    def __init__(self, door):
        self.before, self.changes = {}, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        alive = scl.Masks.of(pl_module).alive
        self.changes += any(name in self.before and not torch.equal(alive[name], self.before[name]) for name in alive)
        self.before = {name: mask.clone() for name, mask in alive.items()}
        for module in (pl_module, *averages(trainer)):
            assert not any(bool(module.get_parameter(name)[~mask].any()) for name, mask in alive.items())
