"""The order of callbacks does not matter, hooks are what they look like, and what is needed is there."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from foreign_module import Mlp, TwoOptimizers, fit
from lightning.pytorch.callbacks import BackboneFinetuning
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.demos import PlainClassifier, toy_tasks


def stays(*callbacks, model=None):
    """How many of the weights that the first task kept are the same in the end."""
    kept = {}

    class Keep(scl.TaskCallback):
        def on_after_task_end(self, trainer, pl_module, task):
            if task == 0:
                weight = pl_module.net[3].weight
                kept["mask"], kept["values"] = weight != 0, weight.detach().clone()

    model = model or PlainClassifier()
    trainer(*callbacks, Keep(), epochs=2).fit(model, toy_tasks())
    mask = kept["mask"]
    return float((model.net[3].weight[mask] == kept["values"][mask]).float().mean())


def test_freezing_comes_after_pruning_whatever_the_list_says():
    parts = [scl.FreezeMasks(), scl.OneShotPruning(0.5), scl.Reopen()]
    assert stays(*parts) == stays(*parts[::-1]) == stays(parts[1], parts[0], parts[2]) == 1.0
    assert stays(parts[1], parts[2]) < 0.1


def test_gradients_are_masked_after_weights_are_pruned_whatever_the_list_says():
    ends = []
    for parts in (
        [scl.SNIP(0.7), scl.DynamicGradientMasking(0.1, 2)],
        [scl.DynamicGradientMasking(0.1, 2), scl.SNIP(0.7)],
    ):
        pl.seed_everything(0, verbose=False)
        trainer(*parts, epochs=1).fit(model := PlainClassifier(), toy_tasks())
        ends.append(model.state_dict())
    assert all(torch.equal(ends[1][name], tensor) for name, tensor in ends[0].items())


def test_growth_comes_after_reopening_and_masks_are_there_in_every_task():
    alive = []

    class Count(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            alive.append(int(scl.Masks.of(pl_module).alive["net.3.weight"].sum()))

    for parts in ([scl.Reopen(), scl.SET(0.5, interval=2)], [scl.SET(0.5, interval=2), scl.Reopen()]):
        trainer(*parts, Count(), epochs=2).fit(PlainClassifier(), toy_tasks())
    assert set(alive) == {1152}


@pytest.mark.parametrize("first", [True, False])
def test_the_cost_of_scoring_is_counted_in_any_order(first):
    flops = scl.FlopsCounter()
    trainer(*([flops, scl.SNIP(0.5)] if first else [scl.SNIP(0.5), flops])).fit(PlainClassifier(), toy_tasks())
    assert flops.summary()["scoring"] > 0


@pytest.mark.parametrize("callback", [scl.FreezeMasks(), scl.Reopen(), scl.FromScratch(), scl.TaskSubnetworks()])
def test_what_acts_at_tasks_is_refused_without_tasks(callback):
    with pytest.raises(TypeError, match=f"{type(callback).__name__} acts when tasks begin and end; add a TaskSchedule"):
        fit(Mlp(), scl.OneShotPruning(0.5), callback)


def test_freezing_without_anybody_who_prunes_is_refused():
    with pytest.raises(ValueError, match="FreezeMasks: PlainClassifier has no masks and no callback here makes any"):
        trainer(scl.FreezeMasks()).fit(PlainClassifier(), toy_tasks())


class Typo(pl.Callback):
    def on_task_begin(self, trainer, pl_module, task):
        pass


class TypoInModule(PlainClassifier):
    def on_before_task_start(self, trainer, pl_module, task):
        pass


class TypoInObjective(scl.CrossEntropy):
    def on_task_finished(self, trainer, pl_module, task):
        pass


@pytest.mark.parametrize(
    ("model", "callbacks", "name"),
    [
        (PlainClassifier, [Typo()], "Typo.on_task_begin"),
        (TypoInModule, [], "TypoInModule.on_before_task_start"),
        (lambda: scl.ContinualModule(scl.SmallCNN(4), TypoInObjective()), [], "TypoInObjective.on_task_finished"),
    ],
)
def test_a_method_that_looks_like_a_hook_and_is_none_is_refused_by_name(model, callbacks, name):
    with pytest.raises(TypeError, match=f"{name} is no hook of tasks; they are on_task_start, on_before_task_end"):
        trainer(*callbacks).fit(model(), toy_tasks())


def test_hooks_have_the_same_arguments_everywhere():
    seen = []

    class Objective(scl.CrossEntropy):
        def on_task_end(self, trainer, pl_module, task):
            seen.append(("objective", trainer, pl_module, task))

    class Module(scl.ContinualModule):
        def on_task_end(self, trainer, pl_module, task):
            super().on_task_end(trainer, pl_module, task)
            seen.append(("module", trainer, pl_module, task))

    class Callback(scl.TaskCallback):
        def on_task_end(self, trainer, pl_module, task):
            seen.append(("callback", trainer, pl_module, task))

    model = Module(scl.SmallCNN(4), Objective())
    t = trainer(Callback(), epochs=1)
    t.fit(model, toy_tasks(num_tasks=2))
    assert seen == [(who, t, model, task) for task in (0, 1) for who in ("callback", "objective", "module")]


def test_what_declares_a_circle_is_refused():
    class One(scl.TaskCallback):
        pass

    class Other(scl.TaskCallback):
        after = (One,)

    One.after = (Other,)
    with pytest.raises(ValueError, match="One, Other are each declared to come after another"):
        fit(Mlp(), One(), Other())


def test_freeze_is_the_method_of_lightning():
    model = scl.EsaCL(scl.SmallMLP([8]))
    model.freeze()
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("objective", [scl.CO2L, scl.ICaRL])
def test_an_objective_that_fits_the_head_afterwards_is_refused_by_isolating_methods(objective):
    with pytest.raises(ValueError, match=rf"ContinualDST\(objective={objective.__name__}\(\)\).*CrossEntropy, ER"):
        trainer().fit(scl.ContinualDST(scl.SmallCNN(4), objective(60)), toy_tasks())


def test_who_prunes_a_small_part_says_how_small_and_what_stays_dense_once():
    class Words(Mlp):
        def __init__(self):
            super().__init__()
            self.words = torch.nn.Embedding(1000, 20)

    message = r"SET prunes weights that are 2\d\.\d% of .*Words.* are words\.weight"
    with pytest.warns(UserWarning, match=message) as said:
        fit(Words(), scl.SET(0.8, sparse=["net.*"], dense=["net.0.weight", "net.6.weight"]), epochs=2)
    assert sum("prunes weights that are" in str(w.message) for w in said) == 1


# -- time ------------------------------------------------------------------------------------------------------


class LogsGradients(Mlp):
    def on_before_optimizer_step(self, optimizer):
        self.log("norm", torch.stack([p.grad.norm() for p in self.parameters()]).norm())


@pytest.mark.parametrize("policy", [scl.RigL, scl.SET, scl.SNFS])
def test_a_module_may_look_at_its_gradients_in_the_step_of_an_exchange(policy):
    model = LogsGradients()
    fit(model, policy(0.8, interval=3, until=1.0), gradient_clip_val=0.1, gradient_clip_algorithm="value")


def test_an_exchange_of_rigl_moves_nothing_else():
    before = {}

    class Check(pl.Callback):
        exchanges = 0

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.alive = {n: m.clone() for n, m in scl.Masks.of(pl_module).alive.items()}
            before.update({n: p.detach().clone() for n, p in pl_module.named_parameters()})
            before["state"] = [{k: v.clone() for k, v in s.items()} for s in trainer.optimizers[0].state.values()]

        def on_train_batch_end(self, trainer, pl_module, *_):
            alive = scl.Masks.of(pl_module).alive
            if all(torch.equal(alive[n], m) for n, m in self.alive.items()):
                return
            self.exchanges += 1
            for name, p in pl_module.named_parameters():
                kept = alive[name] & self.alive[name] if name in alive else ...
                assert torch.equal(p[kept], before[name][kept])
            dense = [i for i, (n, _) in enumerate(pl_module.named_parameters()) if n not in alive]
            now = list(trainer.optimizers[0].state.values())
            for i in dense:
                assert all(torch.equal(now[i][k], v) for k, v in before["state"][i].items())

    check = Check()
    fit(Mlp(), scl.RigL(0.8, interval=5, until=1.0), check)
    assert check.exchanges == 9  # at steps 5, 10, ..., 45 of 48


@pytest.mark.parametrize("accumulate", [1, 2, 4, 5])
@pytest.mark.parametrize("policy", [scl.SET, scl.RigL, scl.UnfiredGrowth])
def test_exchanges_are_so_many_optimiser_steps_apart(policy, accumulate):
    steps = []

    class Recorded(policy):
        def exchange(self, trainer, pl_module, names):
            steps.append(trainer.global_step)
            super().exchange(trainer, pl_module, names)

    t = fit(Mlp(), Recorded(0.8, interval=2, until=1.0), accumulate_grad_batches=accumulate)
    assert steps == list(range(2, t.global_step, 2))


def test_both_halves_of_a_module_with_two_optimisers_move():
    seen = set()

    class Recorded(scl.RigL):
        def exchange(self, trainer, pl_module, names):
            seen.update((trainer.fit_loop.epoch_loop.total_batch_idx, name) for name in names)
            super().exchange(trainer, pl_module, names)

    fit(TwoOptimizers(), Recorded(0.8, interval=10, until=1.0))
    assert seen == {(batch, name) for batch in (10, 20, 30, 40) for name in ("net.2.weight", "net.4.weight")}


def test_a_task_end_that_is_not_known_is_refused_by_the_argument_that_needs_it():
    with pytest.raises(ValueError, match=r"SET\(until=0.75\): the end of the training is not known"):
        fit(Mlp(), scl.SET(0.8), max_epochs=-1)


class Scheduled(PlainClassifier):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


@pytest.mark.parametrize("restart", [None, False, True])
def test_the_modules_own_schedulers_restart_with_tasks_if_asked(restart, recwarn):
    rates = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    t = pl.Trainer(
        callbacks=[scl.TaskSchedule(2, restart), Watch()], accelerator="cpu", max_epochs=-1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    t.fit(Scheduled(), toy_tasks())
    assert rates == ([0.1, 0.05] * 3 if restart else [0.1 * 0.5**i for i in range(6)])
    said = [str(w.message) for w in recwarn if "goes on through all tasks" in str(w.message)]
    assert len(said) == (restart is None)


@pytest.mark.parametrize("accumulate", [1, 5])
def test_a_schedule_of_steps_counts_those_of_the_optimiser(accumulate):
    rates = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    schedule = scl.TaskLRSchedule(partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5), "step")
    trainer(schedule, Watch(), epochs=2, accumulate_grad_batches=accumulate).fit(PlainClassifier(), toy_tasks())
    assert rates == [0.1 * 0.5 ** (i // accumulate) for i in range(10)] * 3


# -- layers that are unfrozen later ----------------------------------------------------------------------------


class Backbone(Mlp):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = self.net[:6], self.net[6]
        del self.net

    def forward(self, x):
        return self.head(self.backbone(x))

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.05, momentum=0.9)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "policy",
    [
        lambda: scl.SET(0.8, interval=2, until=0.7),
        lambda: scl.RigL(0.8, interval=2, until=0.7),
        lambda: scl.OneShotPruning(0.8),
        lambda: scl.SNIP(0.8),
        lambda: scl.TaskAwareDynamicMasking(0.8, interval=2),
    ],
    ids=["SET", "RigL", "OneShotPruning", "SNIP", "TDM"],
)
def test_layers_that_are_unfrozen_later_are_taken_in(policy, first):
    model = Backbone()
    parts = [policy(), BackboneFinetuning(2, train_bn=False)]
    fit(model, *(parts if first else parts[::-1]), epochs=6)
    for name in ("backbone.2.weight", "backbone.4.weight"):
        weight = model.get_parameter(name)
        assert int((weight == 0).sum()) == weight.numel() - round(0.2 * weight.numel()), name
