"""Two gloo processes: the same weights, masks and memory on both, kills, and every test sample counted once."""

import functools
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from forked import forked
from test_resume import BATCH_SIZE, CONFIGS, COUNT, assert_identical, command, ends_of, final_state, points, strike
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.__main__ import main
from lightning_sparse_cl.demos import toy_tasks
from lightning_sparse_cl.sparsity import Masks


class Compare(pl.Callback):
    """After each task, everything that must be the same on both processes is compared bit for bit.

    Args:
        flops: the counter of the run.
        more: tensors beside those of the module and its masks, asked for anew each time.
        removal: samples are removed.
    """

    def __init__(self, flops, more, removal):
        self.flops, self.more, self.removal = flops, more, removal

    def on_after_task_end(self, trainer, pl_module, task):
        masks, broadcast = Masks.of(pl_module), trainer.strategy.broadcast
        state = {k: v for k, v in pl_module.state_dict().items() if isinstance(v, torch.Tensor)}
        state |= {f"alive/{k}": v for k, v in masks.alive.items()}
        state |= {f"frozen/{k}": v for k, v in masks.frozen.items()}
        state |= {f"updated/{k}": v for k, v in masks.updated.items()}
        state |= {f"samples/{i}": v for i, v in enumerate(trainer.datamodule.alive)}
        state |= self.more()
        for name, value in state.items():
            assert torch.equal(broadcast(value), value), f"{name} differs after task {task}"
        starts = trainer.datamodule.starts
        assert broadcast(starts) == starts  # each process has losses of its own, and they stop together
        if isinstance(pl_module.objective, scl.DERpp):
            assert "objective.memory.samples" in state and masks.alive
            seen = pl_module.objective.memory.seen
            assert broadcast(seen) == seen == self.flops.counts["samples"]
            assert self.removal or seen == 5 * 16 * starts[task + 1]
        assert broadcast(self.flops.summary()) == self.flops.summary()
        rates = [g["lr"] for g in trainer.optimizers[0].param_groups]
        assert broadcast(rates) == rates


STAGES = {"learn": 1, "compact": 1, "ramp": 1, "retrain": 1, "steps": (0.3, 0.6), "sizes": (2 / 3, 1.0), "fits": 0.0}
ISOLATING = {
    "PackNet": lambda net: scl.PackNet(net, scl.OneShotPruning(0.5, retrain=2, dense=["head.weight"])),
    "LPS": lambda net: scl.LPS(net, rho=(0.1,), admm=1, retrain=1),
    "WSN": scl.WSN,
    "SupSup": lambda net: scl.SupSup(net, train_free=2),
    "Piggyback": lambda net: scl.Piggyback(net, ternary=True),
    "CPG": lambda net: scl.CPG(net, scl.CompactPickGrow([0.0, 1.1, 0.0], **STAGES)),
    "NISPA": lambda net: scl.NISPA(net, scl.StableUnits(0.5, 1, 6), scl.TaskSubnetworks(full="share")),
}


def fit_and_compare(method, gradients="", by=""):
    """One of two processes: what a method trains is the same on both, and as accurate as it says."""
    pl.seed_everything(0, verbose=False)
    backbone, more = scl.SmallCNN(4), dict
    if method == "EsaCL":
        halved = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
        aids = [scl.GradientClipping(1.0), scl.TaskLRSchedule(halved), scl.TaskEarlyStopping("train/loss", 1)]
        selection = scl.LossSelection(warmup=1)
        model = scl.EsaCL(backbone, scl.DERpp(30, 8), freeze="share", selection=selection, policies=aids)
    elif method == "efficient EsaCL":
        update, selection = scl.SharpnessAware(replays=False), scl.LossSelection(warmup=1, replay=0.5)
        model = scl.EsaCL(
            backbone, scl.DERpp(30, 8), update=update, selection=selection, prune_epoch=2,
            reopen=scl.Reopen("zero", 0.1),
        )  # fmt: skip
    elif method == "SparCL":
        model = scl.SparCL(
            backbone, scl.DERpp(30, 8), scl.TaskAwareDynamicMasking(0.7, 2), scl.DynamicDataRemoval(0.4, 2, 2, by),
            scl.DynamicGradientMasking(0.1, 3, gradients=gradients),
        )  # fmt: skip
    elif method in ("RigL", "SET", "SNFS", "SNIP"):
        policy = getattr(scl, method)(0.7)
        policy.interval = 3
        model = scl.ContinualModule(backbone, scl.DERpp(30, 8), policies=[policy])
    elif method == "AGEM":
        agem = scl.AGEM(30, 8)
        model = scl.ContinualModule(backbone, policies=[agem])

        def more():
            return {f"agem/{k}": v for k, v in agem.memory.state_dict().items() if isinstance(v, torch.Tensor)}
    elif method == "GPM":
        gpm = scl.GPM()
        model = scl.ContinualModule(backbone, scl.CrossEntropy(True), policies=[gpm])

        def more():
            return {f"gpm/{k}": v for k, v in gpm.bases.items()}
    elif method == "balanced":
        model = scl.ContinualModule(backbone, scl.ER(30, 8, balanced=True))
    elif method == "per class":
        model = scl.ContinualModule(backbone, scl.DER(None, 8, per_class=5))
    elif method in ISOLATING:
        model = ISOLATING[method](backbone)
    elif method == "LaMAML":
        model = scl.ContinualModule(backbone, scl.ER(30, 8), scl.LaMAML(parts=2))
    else:
        sizes = () if method in ("EWC", "LwF") else (30, 8)
        model = scl.ContinualModule(backbone, getattr(scl, method)(*sizes))
    flops, evaluation = scl.FlopsCounter(), scl.ContinualEvaluation()
    callbacks = scl.RandomState(), flops, evaluation, Compare(flops, more, method == "SparCL")
    data = toy_tasks(batch_size=8, val_fraction=0.2 if method in ISOLATING else 0.0)
    quiet = {"limit_val_batches": 0} if method in ISOLATING else {}  # a validation would bring buffers in step
    trainer(*callbacks, epochs=5, devices=2, strategy="ddp", **quiet).fit(model, data)
    model.eval()
    test = data.test_sets[1]
    with torch.no_grad():
        alone = (model(data.prepare(test.inputs, augment=False)).argmax(1) == test.labels).float().mean()
    assert abs(float(evaluation.matrices["class_il"].R[-1, 1]) - float(alone)) < 1e-6


@pytest.mark.xdist_group("two processes")
@pytest.mark.parametrize(
    "method",
    [
        ("EsaCL",),
        ("efficient EsaCL",),
        ("SparCL", "measured", "forgetting"),
        ("balanced",),
        ("Piggyback",),
        pytest.param(("per class",), marks=pytest.mark.slow),
        pytest.param(("SparCL", "training", "loss"), marks=pytest.mark.slow),
        *(
            pytest.param((method,), marks=pytest.mark.slow)
            for method in (
                "RigL",
                "SET",
                "SNFS",
                "SNIP",
                "CO2L",
                "EWC",
                "LwF",
                "ICaRL",
                "FDR",
                "AGEM",
                "GPM",
                "LaMAML",
                *(name for name in ISOLATING if name != "Piggyback"),
            )
        ),
    ],
    ids="-".join,
)
def test_two_processes_agree_bit_for_bit(method):
    assert forked(fit_and_compare, *method, processes=2) == 0


def on(processes, args):
    """The command line's arguments for so many processes, with the same batch over all."""
    share = [f"--trainer.devices={processes}", f"--data.init_args.batch_size={BATCH_SIZE // processes}"]
    return [*args, *share, *["--trainer.strategy=ddp"] * (processes > 1)]


def launched(args):
    """The command line, which launches its second process itself, in a session of its own; its exit status."""
    job = subprocess.Popen(
        [sys.executable, "-m", "lightning_sparse_cl", *on(2, args)], start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )  # fmt: skip
    try:
        return job.wait(timeout=300)
    finally:
        subprocess.run(["kill", "-KILL", "--", f"-{job.pid}"], capture_output=True)


def train(args):
    """The command line on two processes, copies of this one; the exit status."""
    return forked(main, on(2, args), processes=2)


def kill_and_resume(whole, folder, config, hook, at):
    assert train([*command(folder, config), *strike(hook, at)]) == -signal.SIGKILL
    resume = ["--ckpt_path=last"] if (folder / "last.ckpt").exists() else []
    assert train([*command(folder, config), *resume]) == 0
    assert_identical(final_state(whole), final_state(folder), f"{config}, {hook} {at}: ")


@pytest.mark.slow  # kills of two processes in the fast tests: test_domains
def test_two_processes_killed_and_resumed_then_one_goes_on(tmp_path):
    whole, told = tmp_path / "whole", tmp_path / "told"
    assert launched(command(whole, "esacl", COUNT)) == 0
    ends, two = ends_of(whole), torch.load(whole / "last.ckpt", weights_only=True)
    assert ends[-1] == two["global_step"]
    kill_and_resume(whole, tmp_path / "killed", "esacl", "on_task_end", 2)
    term = strike("on_train_batch_start", ends[0] + 4, signal.SIGTERM)
    assert launched([*command(told, "esacl"), *term]) == 128 + signal.SIGTERM
    assert ends[0] < torch.load(told / "last.ckpt", weights_only=True)["global_step"] < ends[1]
    assert forked(main, on(1, [*command(told, "esacl"), "--ckpt_path=last"])) == 0
    one = torch.load(told / "last.ckpt", weights_only=True)
    assert one["global_step"] == two["global_step"]
    memory = "objective.memory._extra_state"
    assert one["state_dict"][memory] == two["state_dict"][memory]  # seen, and by which seed


@pytest.mark.slow
@pytest.mark.parametrize("config", sorted(p.stem for p in CONFIGS.glob("*.yaml")))
def test_two_processes_killed_anywhere_and_resumed(tmp_path, config):
    whole = tmp_path / "whole"
    assert train(command(whole, config, COUNT)) == 0
    chosen = dict(list(points(ends_of(whole), config).items())[::3])
    for name, point in chosen.items():
        kill_and_resume(whole, tmp_path / name, config, *point)
    print(f"{config}, two processes: {len(chosen)} of {len(chosen)} kills resumed bit for bit")


@pytest.mark.slow
def test_two_processes_learn_as_well_as_one(tmp_path):
    """Median accuracy over three seeds, with the same global batch."""
    accuracies = {1: [], 2: []}
    for seed in range(3):
        for processes in accuracies:
            folder = tmp_path / f"{processes}-{seed}"
            args = [*command(folder, "derpp", "--schedule.epochs=8", f"--seed_everything={seed}"),
                    "--model.init_args.backbone.width=16"]  # fmt: skip
            batch = f"--data.init_args.batch_size={16 // processes}"
            assert forked(main, [*on(processes, args), batch], processes=processes) == 0
            R = torch.load(folder / "last.ckpt", weights_only=True)["callbacks"]["ContinualEvaluation"]["class_il"]["R"]
            accuracies[processes].append(float(R[-1].mean()))
    assert abs(statistics.median(accuracies[1]) - statistics.median(accuracies[2])) < 0.05, accuracies
