"""Masks that no copy, average, order or checkpoint loses, and what is said where they cannot be known."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from foreign_module import PRUNED, Mlp, fit
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.demos import PlainClassifier, toy_tasks


def zeros(module, names=PRUNED):
    return [int((module.get_parameter(name) == 0).sum()) for name in names]


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda module: pickle.loads(pickle.dumps(module))}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_has_alive_and_frozen_masks_and_goes_its_own_way(how):
    module = scl.EsaCL(scl.SmallCNN(4), scl.ER(30, 8), freeze="share")
    trainer(epochs=1).fit(module, toy_tasks())
    other = COPIES[how](module)
    own, theirs = scl.Masks.of(module), scl.Masks.of(other)
    for kind in ("alive", "frozen"):
        assert getattr(own, kind).keys() == getattr(theirs, kind).keys() != set()
    name = next(iter(own.frozen))
    assert torch.equal(own.held(name), theirs.held(name)) and torch.equal(own.frozen[name], theirs.frozen[name])
    theirs.set_frozen(name, None)
    theirs.set_alive(name, torch.zeros_like(theirs.alive[name]))
    assert own.frozen[name].any() and own.alive[name].any() and module.get_parameter(name).any()


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_has_the_subnetworks(how):
    module = scl.ContinualDST(scl.SmallCNN(4), growth=scl.SET(0.5, interval=2, dense=["head.weight"]))
    data = toy_tasks(num_tasks=2)
    trainer(epochs=1).fit(module, data)
    other, x = COPIES[how](module).eval(), torch.rand(3, *data.input_shape)
    assert len(scl.Subnetworks.of(other)) == 2
    assert torch.equal(module.eval()(x), other(x))


def test_a_part_of_a_module_keeps_its_masks_wherever_it_is_put():
    module = Mlp()
    fit(module, scl.OneShotPruning(0.8), epochs=1, enable_checkpointing=False)
    other = Mlp()
    other.net = copy.deepcopy(module.net)
    assert scl.Masks.of(other).alive.keys() == set(PRUNED)
    fit(other, scl.DynamicGradientMasking(0.05, 2), epochs=1, enable_checkpointing=False)  # which prunes nothing
    assert zeros(other) == zeros(module) == [4096 - round(0.2 * 4096)] * 2


@pytest.mark.parametrize("seed", [1, 2])
def test_a_method_that_is_loaded_from_a_checkpoint_has_its_masks(tmp_path, seed):
    def method():
        return scl.ContinualModule(scl.SmallCNN(4), policies=[scl.RigL(0.9, interval=3)])

    first = method()
    trainer(ModelCheckpoint(tmp_path, save_last=True), epochs=1, enable_checkpointing=True).fit(first, toy_tasks())
    saved = {name: mask.clone() for name, mask in scl.Masks.of(first).alive.items()}
    pl.seed_everything(seed, verbose=False)
    again = scl.ContinualModule.load_from_checkpoint(
        tmp_path / "last.ckpt", weights_only=True, backbone=scl.SmallCNN(4), policies=[scl.RigL(0.9, interval=1000)]
    )
    trainer(epochs=1).fit(again, toy_tasks())
    assert all(torch.equal(scl.Masks.of(again).alive[name], mask) for name, mask in saved.items())
    unpruned = scl.ContinualModule.load_from_checkpoint(
        tmp_path / "last.ckpt", weights_only=True, backbone=scl.SmallCNN(4), policies=[]
    )
    trainer(epochs=1).fit(unpruned, toy_tasks())  # no policy: what is pruned stays so
    assert not any(bool(unpruned.get_parameter(name)[~mask].any()) for name, mask in saved.items())


def test_zeros_without_masks_are_said_and_from_zeros_takes_them(tmp_path):
    module = Mlp()
    last = ModelCheckpoint(tmp_path, save_last=True)
    fit(module, scl.OneShotPruning(0.8), last, epochs=1)
    scl.save_sparse(module, tmp_path / "sparse.safetensors")
    loaded = Mlp.load_from_checkpoint(last.last_model_path)
    with pytest.warns(UserWarning, match=r"Mlp: 2 of its weights are mostly zero .*Masks\.from_zeros\(module\)"):
        fit(loaded, scl.SET(0.8), epochs=1, enable_checkpointing=False)
    loaded = Mlp.load_from_checkpoint(last.last_model_path)
    assert set(scl.Masks.from_zeros(loaded)) == set(PRUNED)
    fit(loaded, scl.SET(0.8, interval=1000), epochs=1, enable_checkpointing=False)
    assert zeros(loaded) == zeros(module)
    assert all(torch.equal(m, scl.Masks.of(module).alive[n]) for n, m in scl.Masks.of(loaded).alive.items())
    again = Mlp()
    scl.load_sparse(tmp_path / "sparse.safetensors", again)
    assert zeros(again) == zeros(module) and set(scl.Masks.of(again)) == set(PRUNED)


def test_a_sparsifier_without_a_policy_keeps_the_masks():
    module = Mlp()
    fit(module, scl.OneShotPruning(0.8), epochs=1, enable_checkpointing=False)
    other = copy.deepcopy(module)
    fit(other, scl.Sparsifier(), epochs=1, enable_checkpointing=False)
    assert zeros(other) == zeros(module)
    fit(other, scl.OneShotPruning(0.5), epochs=1, enable_checkpointing=False)
    assert zeros(other) == [4096 - 819] * 2  # what is pruned stays pruned


def test_masks_from_zeros_leaves_alone_what_is_dense_all_zero_or_masked():
    module = Mlp()
    with torch.no_grad():
        module.net[0].weight[:3] = 0  # a twentieth
        module.net[2].weight.zero_()
        module.net[4].weight[:32] = 0
    masks = scl.Masks.from_zeros(module)
    assert list(masks) == ["net.4.weight"] and masks.density() == 0.5
    assert list(scl.Masks.from_zeros(module, ["net.0.weight"])) == ["net.0.weight", "net.4.weight"]


def test_a_checkpoint_from_before_the_pruning_is_dense_and_says_so(tmp_path):
    module = Mlp()
    module.test_step, module.test_dataloader = lambda batch, batch_idx: None, module.train_dataloader
    kept = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    t = fit(module, scl.OneShotPruning(0.8), kept, epochs=2)
    assert zeros(module) == [4096 - round(0.2 * 4096)] * 2
    with pytest.warns(UserWarning, match="was written before the weights were pruned; it is dense"):
        t.test(module, ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert zeros(module) == [0, 0] and not len(scl.Masks.of(module))
    t.test(module, ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
    assert zeros(module) == [4096 - round(0.2 * 4096)] * 2 and len(scl.Masks.of(module)) == 2


def test_a_checkpoint_holds_the_masks_once(tmp_path):
    module = scl.ContinualModule(
        scl.SmallCNN(16), policies=[scl.OneShotPruning(0.5), scl.FreezeMasks(), scl.Reopen("zero")]
    )
    t = trainer(epochs=1)
    t.fit(module, toy_tasks(num_tasks=1))
    t.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    sizes = {}

    def look(value, path):
        if isinstance(value, dict):
            for key, part in value.items():
                look(part, f"{path}.{key}")
        elif torch.is_tensor(value) and value.dtype == torch.bool:
            sizes.setdefault(value.untyped_storage().data_ptr(), (path, value.numel()))

    look(saved, "")
    masked = sum(mask.numel() for mask in scl.Masks.of(module).alive.values())
    assert sum(n for path, n in sizes.values() if "alive" in path) == masked
    assert sum(n for _, n in sizes.values()) <= 2 * masked, sizes  # alive and frozen are two things


@pytest.mark.parametrize("first", [True, False])
def test_with_averaged_weights_the_report_is_of_what_is_saved(first, tmp_path):
    evaluation, last = scl.ContinualEvaluation(), ModelCheckpoint(tmp_path, save_last=True)
    parts = [EMAWeightAveraging(decay=0.9), scl.OneShotPruning(0.8)]
    module = PlainClassifier()
    t = trainer(*(parts if first else parts[::-1]), evaluation, last, epochs=2, enable_checkpointing=True)
    t.fit(module, toy_tasks())
    saved = torch.load(last.last_model_path, weights_only=True)["state_dict"]
    weight = saved["net.3.weight"]
    assert int((weight == 0).sum()) == weight.numel() - round(0.2 * weight.numel())
    assert torch.equal(module.net[3].weight, weight)
    other = PlainClassifier()
    other.load_state_dict(saved)
    again = scl.ContinualEvaluation()
    trainer(again).test(Tested(other), toy_tasks(), verbose=False)
    assert torch.equal(again.tested["task_il"].R[0], evaluation.matrices["task_il"].R[-1])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("policy", [scl.OneShotPruning, scl.SET, scl.RigL])
@pytest.mark.parametrize("average", [EMAWeightAveraging, WeightAveraging, StochasticWeightAveraging])
@pytest.mark.filterwarnings("ignore")
def test_averages_obey_masks_through_tasks(average, policy, first, tmp_path):
    averaging = average(swa_lrs=0.05, swa_epoch_start=1) if average is StochasticWeightAveraging else average()
    parts = [averaging, policy(0.8, **({} if policy is scl.OneShotPruning else {"interval": 2, "until": 0.3}))]
    module, last = PlainClassifier(), ModelCheckpoint(tmp_path, save_last=True)
    t = trainer(*(parts if first else parts[::-1]), last, epochs=3, enable_checkpointing=True)
    t.fit(module, toy_tasks())
    alive = scl.Masks.of(module).alive["net.3.weight"]
    for state in (module.state_dict(), torch.load(last.last_model_path, weights_only=False)["state_dict"]):
        weight = state["net.3.weight"]
        assert not weight[~alive].any() and int(alive.sum()) == round(0.2 * alive.numel())
        assert int(weight.count_nonzero()) > 0.8 * int(alive.sum())  # what grew to units that never fire stays zero


class Tied(Mlp):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.net[4].weight = self.net[2].weight


TIED = {
    "OneShotPruning": lambda: scl.OneShotPruning(0.8),
    "SNIP": lambda: scl.SNIP(0.8),
    "TDM": lambda: scl.TaskAwareDynamicMasking(0.8, interval=2),
    **{
        rule.__name__: lambda rule=rule: rule(0.8, interval=3, until=0.4)
        for rule in (scl.SET, scl.RigL, scl.SNFS, scl.UnfiredGrowth)
    },
}


@pytest.mark.parametrize("policy", TIED)
def test_a_weight_of_two_layers_has_one_mask_exactly_and_resumes(policy, tmp_path):
    def run(epochs, **kwargs):
        pl.seed_everything(0, verbose=False)
        last = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        module = Tied()
        pl.Trainer(
            accelerator="cpu", max_epochs=epochs, callbacks=[TIED[policy](), last], logger=False,
            enable_progress_bar=False, enable_model_summary=False,
        ).fit(module, **kwargs)  # fmt: skip
        return module

    whole = run(4)
    assert list(scl.Masks.of(whole)) == ["net.2.weight"]
    assert zeros(whole, ["net.2.weight"]) == [4096 - 819] and whole.net[2].weight is whole.net[4].weight
    resumed = run(4, ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


class Tested(pl.LightningModule):
    def __init__(self, network):
        super().__init__()
        self.network_of = network

    def forward(self, x):
        return self.network_of(x)

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        return {"logits": self(batch[0])}
