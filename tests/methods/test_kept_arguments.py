"""A checkpoint makes its module again: by the path alone, and nothing but what is known to be harmless."""

import copy
import os
import pickle
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.__main__ import main
from lightning_sparse_cl.demos import toy_tasks
from lightning_sparse_cl.methods.blueprint import from_bytes, to_bytes

IMAGES = torch.rand(5, 1, 8, 8)


class OwnNet(nn.Sequential):
    """A class that this package does not know."""

    def __init__(self, width):
        super().__init__(nn.Flatten(), nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, width))


class OwnMethod(scl.EsaCL):
    """A method whose constructor is of its own."""

    def __init__(self, width, *, depth=1, **kwargs):
        super().__init__(scl.SmallMLP([width] * depth), scl.DERpp(20, 8), **kwargs)
        self.depth = depth


def saved(model, path, epochs=1):
    (t := trainer(epochs=epochs)).fit(model, toy_tasks(val_fraction=0.2))
    t.save_checkpoint(path)
    return model.eval()


MADE = {
    "EsaCL": lambda: scl.EsaCL(scl.SmallCNN(4), optimizer=partial(torch.optim.SGD, lr=0.02)),
    "SparCL": lambda: scl.SparCL(scl.SmallCNN(4), scl.ER(20, 8), removal=scl.DynamicDataRemoval(0.0)),
    "ContinualDST": lambda: scl.ContinualDST(scl.SmallMLP([16])),
    "CLLSG": lambda: scl.CLLSG(scl.SmallMLP([16, 8]), scl.SparseGrowth(1.1, reuse_epochs=1)),
    "ICaRL": lambda: scl.ContinualModule(scl.SmallMLP([8]), scl.ICaRL(20)),
    "LwF": lambda: scl.ContinualModule(nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4), nn.Flatten()), scl.LwF()),
    "LaMAML": lambda: scl.ContinualModule(scl.SmallMLP([8, 8]), scl.ER(20, 8), scl.LaMAML(), policies=[scl.SNIP(0.5)]),
}


@pytest.mark.parametrize("name", MADE)
def test_the_path_alone_gives_the_trained_module(name, tmp_path):
    model = saved(MADE[name](), tmp_path / "x.ckpt", epochs=2)
    for loaded in (cls.load_from_checkpoint(tmp_path / "x.ckpt") for cls in (type(model), scl.ContinualModule)):
        assert type(loaded) is type(model)
        assert torch.equal(loaded.eval()(IMAGES), model(IMAGES))
        assert [type(p) for p in loaded.policies] == [type(p) for p in model.policies]


def test_a_run_of_the_command_line_is_made_again():
    options = ["--schedule.epochs=1", "--trainer.limit_train_batches=2", "--trainer.accelerator=cpu"]
    model = main(["fit", "-c", "split_digits/esacl", *options, "--trainer.logger=false"]).model.eval()
    loaded = scl.EsaCL.load_from_checkpoint("checkpoints/last.ckpt").eval()
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    assert loaded.optimizer.func is scl.StochasticFrankWolfe and loaded.optimizer.keywords["tau"] == 5.0
    assert loaded.policies[0].sparsity == 0.8 and loaded.update.rho == 0.05


def test_constructors_of_ones_own_and_arguments_that_are_given(tmp_path):
    model = saved(OwnMethod(8, depth=2, sparsity=0.5), tmp_path / "x.ckpt")
    loaded = OwnMethod.load_from_checkpoint(tmp_path / "x.ckpt")
    assert torch.equal(loaded.eval()(IMAGES), model(IMAGES)) and (loaded.depth, loaded.sparsity) == (2, 0.5)
    assert type(scl.EsaCL.load_from_checkpoint(tmp_path / "x.ckpt")) is OwnMethod
    assert OwnMethod.load_from_checkpoint(tmp_path / "x.ckpt", sparsity=0.25).sparsity == 0.25
    with pytest.raises(ValueError, match="another network"):
        OwnMethod.load_from_checkpoint(tmp_path / "x.ckpt", width=4)


def test_classes_of_others_are_asked_for(tmp_path):
    model = saved(scl.EsaCL(OwnNet(8), sparsity=0.3), tmp_path / "x.ckpt")
    with pytest.raises(
        ValueError, match=r"OwnNet.* give backbone=\.\.\. again, or call .*add_safe_globals\(\[OwnNet\]\)"
    ) as e:
        scl.EsaCL.load_from_checkpoint(tmp_path / "x.ckpt")
    assert "\n" not in str(e.value)
    given = scl.ContinualModule.load_from_checkpoint(tmp_path / "x.ckpt", backbone=OwnNet(8))
    with torch.serialization.safe_globals([OwnNet]):
        allowed = scl.EsaCL.load_from_checkpoint(tmp_path / "x.ckpt")
    trusted = scl.EsaCL.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    for loaded in (given, allowed, trusted):
        assert type(loaded) is scl.EsaCL and loaded.sparsity == 0.3
        assert torch.equal(loaded.eval()(IMAGES), model(IMAGES))


def test_what_cannot_be_pickled_is_asked_for(tmp_path):
    saved(scl.ContinualModule(scl.SmallMLP([8]), optimizer=lambda p: torch.optim.SGD(p, 0.1)), tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"'optimizer' could not be saved .*; give optimizer=\.\.\. again"):
        scl.ContinualModule.load_from_checkpoint(tmp_path / "x.ckpt")
    assert scl.ContinualModule.load_from_checkpoint(tmp_path / "x.ckpt", optimizer=torch.optim.SGD)
    with pytest.warns(UserWarning, match="'optimizer' could not be saved.* it has its default"):
        assert scl.ContinualModule.load_from_checkpoint(tmp_path / "x.ckpt", backbone=scl.SmallMLP([8]))


def test_what_cannot_be_made_again_is_asked_for(tmp_path):
    model = scl.ContinualModule(scl.SmallMLP([8]), policies=[1 << 3000])  # an opcode of its own
    model.policies = []
    saved(model, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"'policies' cannot be made again .*; give policies=\.\.\. again") as error:
        scl.ContinualModule.load_from_checkpoint(tmp_path / "x.ckpt")
    assert "\n" not in str(error.value)


def test_a_class_that_is_not_imported_is_named(tmp_path, monkeypatch):
    saved(OwnMethod(8, depth=2), tmp_path / "x.ckpt")
    monkeypatch.delitem(sys.modules, OwnMethod.__module__)
    with pytest.raises(ValueError, match=r"is from the class .*OwnMethod; import it"):
        scl.ContinualModule.load_from_checkpoint(tmp_path / "x.ckpt")
    parts = {"backbone": scl.SmallMLP([8, 8]), "objective": scl.DERpp(20, 8)}
    assert type(scl.EsaCL.load_from_checkpoint(tmp_path / "x.ckpt", **parts)) is scl.EsaCL


@pytest.mark.parametrize("call", [os.system, scl.load_sparse, torch.load, print], ids=lambda f: f.__name__)
def test_a_file_calls_no_function(call, tmp_path):
    class Evil:
        def __reduce__(self):
            return call, ("touch here",)

    model = scl.ContinualModule(scl.SmallMLP([8]), policies=[Evil()])
    model.policies = []
    saved(model, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="not made from a file without asking"):
        scl.ContinualModule.load_from_checkpoint(tmp_path / "x.ckpt")
    assert not os.path.exists("here")


def test_weights_are_saved_once(tmp_path):
    wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 4096), nn.ReLU(), nn.BatchNorm1d(4096))
    saved(scl.ContinualModule(wide), tmp_path / "x.ckpt")
    kept = torch.load(tmp_path / "x.ckpt", weights_only=True)["arguments"]["given"]
    assert sum(len(value) for value in kept.values()) < 8000 < wide[1].weight.numel()


def test_weights_that_no_other_module_has_are_kept():
    layer = nn.Linear(3, 2)
    layer.register_buffer("constant", torch.arange(3.0), persistent=False)
    assert torch.equal(from_bytes(to_bytes(layer)).constant, layer.constant)
    assert not from_bytes(to_bytes(layer)).weight.any()
    assert torch.equal(from_bytes(to_bytes([layer]))[0].weight, layer.weight)


def test_copies_and_reloads_can_be_saved_again(tmp_path):
    model = saved(scl.EsaCL(scl.SmallCNN(4), sparsity=0.4), tmp_path / "x.ckpt")
    loaded = scl.EsaCL.load_from_checkpoint(tmp_path / "x.ckpt")
    for i, twin in enumerate([copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded]):
        (t := trainer(epochs=1)).fit(twin, toy_tasks())
        t.save_checkpoint(tmp_path / f"{i}.ckpt")
        again = scl.EsaCL.load_from_checkpoint(tmp_path / f"{i}.ckpt")
        assert again.sparsity == 0.4 and torch.equal(again.eval()(IMAGES), twin.eval()(IMAGES))


def test_older_checkpoints_ask_for_the_arguments(tmp_path):
    model = saved(scl.ContinualModule(scl.SmallMLP([8])), tmp_path / "x.ckpt")
    older = torch.load(tmp_path / "x.ckpt", weights_only=True)
    del older["arguments"], older["data_description"]
    torch.save(older, tmp_path / "older.ckpt")
    with pytest.raises(TypeError, match="backbone"):
        scl.ContinualModule.load_from_checkpoint(tmp_path / "older.ckpt")
    loaded = scl.ContinualModule.load_from_checkpoint(tmp_path / "older.ckpt", backbone=scl.SmallMLP([8]))
    assert torch.equal(loaded.eval()(IMAGES), model(IMAGES))


@pytest.mark.parametrize(
    "value",
    [{1, 2}, int, frozenset("a"), range(3), slice(1, 2), F.gelu, partial(F.relu, inplace=True), nn.GELU, 1 + 2j],
)
def test_harmless_values_come_back(value):
    found = from_bytes(to_bytes([value]))[0]
    assert found == value or (found.func, found.keywords) == (value.func, value.keywords)


def test_making_a_module_draws_no_random_numbers():
    backbone = scl.SmallMLP([8])
    state = torch.get_rng_state()
    scl.ContinualModule(backbone)
    assert torch.equal(torch.get_rng_state(), state)
