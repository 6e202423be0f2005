"""What cannot be done is refused in one line, and what is done otherwise than one may think is said once."""

import lightning.pytorch as pl
import pytest
from foreign_module import PRUNED, Mlp, fit
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.demos import PlainClassifier, toy_tasks


def test_weights_that_are_not_trained_are_left_alone_and_that_is_said_once():
    module = Mlp()
    module.net[2].weight.requires_grad_(False)
    with pytest.warns(UserWarning) as said:
        fit(module, scl.OneShotPruning(0.8), scl.DynamicGradientMasking(0.1), epochs=1)
    told = [str(w.message) for w in said if "require no gradient" in str(w.message)]
    assert len(told) == 1 and "1 weights require no gradient (net.2.weight)" in told[0]
    assert module.net[2].weight.all() and list(scl.Masks.of(module)) == ["net.4.weight"]
    other = Mlp()
    other.net[2].weight.requires_grad_(False)
    assert scl.sparse_weights(other, sparse=[nn.Linear]) == scl.sparse_weights(other, sparse=["Linear"])
    assert "net.2.weight" not in scl.sparse_weights(other, sparse=[nn.Linear])


def test_masks_of_another_sparsity_are_kept_and_that_is_said():
    module = Mlp()
    fit(module, scl.SET(0.8), epochs=1)
    with pytest.warns(UserWarning, match=r"RigL\(sparsity=0.9\): the weights already have masks, of sparsity 0.8"):
        fit(module, scl.RigL(0.9), epochs=1)


def test_a_checkpoint_from_before_the_pruning_is_said_in_the_fit(tmp_path):
    with pytest.warns(UserWarning, match="the last checkpoint was written before the weights were pruned"):
        fit(Mlp(), scl.OneShotPruning(0.8), ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=7))


def test_two_policies_of_a_kind_act_on_weights_of_their_own(tmp_path):
    module, last = Mlp(), ModelCheckpoint(tmp_path, save_last=True)
    parts = [scl.OneShotPruning(0.8, sparse=["net.2.*"]), scl.OneShotPruning(0.5, sparse=["net.4.*"])]
    fit(module, *parts, last)
    assert [int((module.get_parameter(n) == 0).sum()) for n in PRUNED] == [4096 - 819, 2048]
    with pytest.raises(ValueError, match="makes masks of the same weights; divide them by"):
        fit(Mlp(), scl.RigL(0.8), scl.SNFS(0.8))


def test_an_average_obeys_the_masks_before_training_begins(tmp_path):
    seen = []

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            average = next(c for c in trainer.callbacks if isinstance(c, EMAWeightAveraging))._average_model.module
            seen.append(int((average.net[2].weight == 0).sum()))

    fit(Mlp(), Look(), EMAWeightAveraging(), scl.RigL(0.8), epochs=1)
    assert seen == [4096 - 819]


class Foreign(pl.Callback):
    """Attributes and methods that only look like ours."""

    after = 3
    needs_tasks = True

    def on_multitask_loss(self):
        pass


def test_other_peoples_attributes_are_not_taken_for_declarations():
    fit(Mlp(), Foreign(), scl.SET(0.8), epochs=1)


class OldArguments(pl.Callback):
    def on_task_start(self, trainer, task):
        pass


LAZY = nn.Sequential(nn.Linear(20, 64), nn.LazyLinear(64), nn.Linear(64, 4))


def lazy():
    module = Mlp()
    module.net = LAZY
    return module


class Rounds(scl.ScorePruning):
    def scores(self, trainer, pl_module, batch):
        return {}


BAD = {
    "rounds": (lambda: Rounds(0.5, rounds=1.5), r"Rounds\(rounds=1\.5\): rounds is a whole number"),
    "sparsity": (lambda: scl.SET("0.8"), r"SET\(sparsity='0\.8'\): sparsity is a number"),
    "interval": (lambda: scl.SET(0.8, interval=2.5), r"SET\(interval=2\.5\): interval is a whole number"),
    "until": (lambda: scl.RigL(0.8, until=None), r"RigL\(until=None\): until is a number"),
    "q": (lambda: scl.DynamicGradientMasking(None), r"DynamicGradientMasking\(q=None\)"),
    "a list": (lambda: scl.SET(0.8, distribution=["x"]), r"SET\(distribution=\['x'\]\)"),
    "a text": (lambda: scl.SET(0.8, distribution={"*": "0.5"}), r"SET\(distribution\['\*'\]='0\.5'\): .* is a number"),
    "one pattern": (lambda: fit(Mlp(), scl.SET(0.8, dense="net.2.weight")), r"dense='net\.2\.weight': a list of"),
    "one type": (lambda: fit(Mlp(), scl.SET(0.8, sparse=nn.Linear)), r"sparse=<class .*Linear'>: a list of patterns"),
    "a number": (lambda: fit(Mlp(), scl.SET(0.8, sparse=[5])), r"sparse=\[5\]: 5 is neither a pattern nor a type"),
    "loss": (lambda: fit(Mlp(), scl.SNIP(0.8, loss="ce")), r"SNIP\(loss='ce'\): a function of \(module, batch\)"),
    "no tensor": (lambda: fit(Mlp(), scl.SNIP(0.8, loss=lambda m, b: 1.0)), "returned a float"),
    "a vector": (lambda: fit(Mlp(), scl.SNIP(0.8, loss=lambda m, b: m(b[0]))), r"a tensor of shape \(8, 4\) with"),
    "restart": (lambda: scl.TaskSchedule(1, restart_schedulers="yes"), r"restart_schedulers='yes'\): True, False"),
    "nothing left": (lambda: fit(Mlp(), scl.OneShotPruning(0.9999)), "leaves no weight in net.2.weight, which"),
    "lazy": (lambda: fit(lazy(), scl.SET(0.8)), r"SET: net\.1\.weight has no size yet"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_one_line(case):
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_hook_with_other_arguments_is_refused_by_name():

    with pytest.raises(
        TypeError, match=r"OldArguments\.on_task_start: a hook of tasks takes \(trainer, pl_module, task\)"
    ):
        trainer(OldArguments()).fit(PlainClassifier(), toy_tasks())
