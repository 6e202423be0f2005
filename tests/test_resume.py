"""A run that is killed anywhere and resumed ends with the same bits as one that never stopped."""

import json
import os
import random
import signal
from functools import cache
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from forked import forked
from toy_trainer import shortened

from lightning_sparse_cl.__main__ import main, run

CONFIGS = Path(__file__).parents[1] / "configs" / "split_digits"
SERIES = [f"../split_japanese_vowels/{name}" for name in ("derpp", "esacl")]
EPOCHS = 2
BATCH_SIZE = 48  # about six steps an epoch
EVERY = 3  # steps from one checkpoint to the next


class Strike(pl.Callback):
    """Sends this process a signal the ``at``-th time (from 1) that a hook is called; SIGKILL cannot be caught.

    ``hook`` is a hook's name, or ``"write"``: a checkpoint is written but not yet in its place.
    """

    def __init__(self, hook: str, at: int, number: int = 9):
        self.left = at
        self.number = number
        if hook == "write":
            replace = os.replace
            os.replace = lambda *args: self.strike() if str(args[0]).endswith(".part") and self.left == 1 else (
                self.strike() if str(args[0]).endswith(".part") else None, replace(*args))  # fmt: skip
        else:
            setattr(self, hook, self.strike)

    def strike(self, *_, **__):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)


def command(folder, config, *more):
    return [
        "fit", "-c", str(CONFIGS / f"{config}.yaml"), f"--schedule.epochs={EPOCHS}",
        "--model.init_args.backbone.width=4", f"--trainer.default_root_dir={folder}", "--trainer.logger=false",
        f"--checkpoint.dirpath={folder}", f"--checkpoint.every_n_train_steps={EVERY}", "--trainer.accelerator=cpu",
        f"--data.init_args.batch_size={16 if config in SERIES else BATCH_SIZE}",
        "--trainer.enable_progress_bar=false", *shortened(config), *more,
    ]  # fmt: skip


def final_state(folder):
    """Everything in the last checkpoint but clocks, paths, the run's name and the loops' progress."""
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    callbacks = {k: v for k, v in checkpoint["callbacks"].items() if "Checkpoint" not in k and k != "RunReport"}
    left_out = ("callbacks", "loops", "pytorch-lightning_version", "epoch", "run", "config")
    return {k: v for k, v in checkpoint.items() if k not in left_out} | {"callbacks": callbacks}


def assert_identical(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_identical(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_identical(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)), where
    else:
        assert a == b, where


def strike(hook, at, number=signal.SIGKILL):
    return ["--trainer.callbacks+=test_resume.Strike", f"--trainer.callbacks.hook={hook}",
            f"--trainer.callbacks.at={at}", f"--trainer.callbacks.number={int(number)}"]  # fmt: skip


class Counter(pl.Callback):
    """Writes the last step of each task beside the checkpoints."""

    def __init__(self):
        self.ends = []

    def on_task_end(self, trainer, pl_module, task):
        self.ends.append(trainer.global_step)
        Path(trainer.default_root_dir, "ends.json").write_text(json.dumps(self.ends))


COUNT = "--trainer.callbacks+=test_resume.Counter"


def ends_of(folder):
    return json.loads((folder / "ends.json").read_text())


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """The folder of a configuration's run that is never stopped, and the last step of each task."""

    @cache
    def run(config, *more):
        folder = tmp_path_factory.mktemp("whole")
        main(command(folder, config, *more, COUNT))
        return folder, ends_of(folder)

    return run


def kill_and_resume(whole, folder, config, hook, at, *more):
    """Kill at the point, go on from ``last.ckpt`` (anew if there is none), compare everything."""
    killed = forked(main, command(folder, config, *more, *strike(hook, at)))
    assert killed == -signal.SIGKILL, f"never reached {hook} {at}"
    assert not (folder / "metrics.json").exists()
    resume = ["--ckpt_path=last"] if (folder / "last.ckpt").exists() else []
    assert forked(main, command(folder, config, *more, *resume)) == 0
    assert_identical(final_state(whole), final_state(folder), f"{config}, {hook} {at}: ")


def points(ends, seed):
    """Where to kill: (hook, how many calls of it)."""
    drawn = random.Random(seed).sample(range(4, ends[-1]), 10)
    anywhere = {f"step {step}": ("on_train_batch_end", step) for step in drawn}
    if len(ends) == 1:  # joint training knows no transition
        return anywhere | {
            "between pruning and measuring": ("on_task_end", 1),
            "a checkpoint's write": ("write", ends[-1] // 8),
            "the last step": ("on_train_batch_end", ends[-1]),
        }
    return anywhere | {
        "inside an epoch": ("on_train_batch_end", ends[1] - 1),
        "just before a transition": ("on_train_batch_start", ends[1]),
        "between pruning and measuring": ("on_task_end", 2),
        "after the measurement": ("on_after_task_end", 2),
        "the epoch's end at a transition": ("on_train_epoch_end", 2 * EPOCHS),
        "between epochs of a task, for CL-LSG stages": ("on_train_epoch_start", 2 * EPOCHS),
        "the next task's start": ("on_task_start", 3),
        "its first batch": ("on_train_batch_start", ends[1] + 1),
        "in its first step": ("on_before_optimizer_step", ends[1] + 1),
        "a checkpoint's write": ("write", ends[-1] // 8),
        "a checkpoint's write at a transition": ("write", 2 * (ends[1] // EVERY)),
        "the last step": ("on_train_batch_end", ends[-1]),
    }


IN_CI = ["inside an epoch", "between pruning and measuring", "a checkpoint's write"]
ISOLATING = ["between epochs of a task, for CL-LSG stages", "after the measurement", "its first batch"]


@pytest.mark.parametrize(
    "config",
    [
        "continual_dst",
        "esacl",
        "sparcl",
        pytest.param("cl_lsg", marks=pytest.mark.slow),
        pytest.param(SERIES[0], marks=pytest.mark.slow),
        SERIES[1],
        pytest.param("derpp", marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed(tmp_path, whole_run, config):
    whole, ends = whole_run(config)
    for name in ISOLATING if config in ("continual_dst", "cl_lsg") else IN_CI[:2] if config in SERIES else IN_CI:
        kill_and_resume(whole, tmp_path / name, config, *points(ends, 0)[name])


ACCELERATED = ["--trainer.callbacks+=SparseAcceleration", "--trainer.callbacks.measure=false"]


@pytest.mark.parametrize(
    "config", ["sparcl", *(pytest.param(c, marks=pytest.mark.slow) for c in ("rigl_derpp", "esacl", "continual_dst"))]
)
def test_killed_and_resumed_with_sparse_kernels(tmp_path, whole_run, config):
    whole, ends = whole_run(config, *ACCELERATED)
    chosen = points(ends, 0)
    for name in ["inside an epoch"] if config == "sparcl" else chosen:
        kill_and_resume(whole, tmp_path / name, config, *chosen[name], *ACCELERATED)
    folder = tmp_path / "stopped"
    at = strike("on_train_batch_end", ends[0] + 3)
    assert forked(main, command(folder, config, *ACCELERATED, *at)) == -signal.SIGKILL
    last = folder / "last.ckpt"
    assert forked(main, command(tmp_path / "dense", config, f"--ckpt_path={last}")) == 0  # without the kernels
    dense, fast = final_state(tmp_path / "dense"), final_state(whole)
    assert dense["state_dict"].keys() == fast["state_dict"].keys()


EFFICIENT = [  # and the parts that it leaves out
    "-c", str(CONFIGS.parent / "esacl" / "efficient.yaml"), "--model.init_args.prune_epoch=1",
    "--model.init_args.update=SharpnessAware", "--model.init_args.update.init_args.replays=false",
    "--model.init_args.selection.init_args.sse=0.4", "--model.init_args.selection.init_args.ere=0.4",
    "--model.init_args.selection.init_args.replay=0.4", "--model.init_args.selection.init_args.warmup=1",
]  # fmt: skip
AT_PRUNING = {
    "before the epoch that prunes": ("on_train_epoch_start", 2 * EPOCHS),
    "after it has pruned": ("on_before_optimizer_step", 3 * EVERY + 1),
}


@pytest.mark.parametrize("more", [[], pytest.param(ACCELERATED, marks=pytest.mark.slow)], ids=["dense", "kernels"])
@pytest.mark.parametrize(
    "every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some points", "all points"]
)
def test_efficient_esacl_killed_and_resumed(tmp_path, whole_run, every, more):
    whole, ends = whole_run("esacl", *EFFICIENT, *more)
    chosen = points(ends, 0) | AT_PRUNING
    for name in chosen if every else [*AT_PRUNING, "its first batch"]:
        kill_and_resume(whole, tmp_path / name, "esacl", *chosen[name], *EFFICIENT, *more)


@pytest.mark.slow
@pytest.mark.parametrize("config", [*sorted(p.stem for p in CONFIGS.glob("*.yaml")), *SERIES])
def test_killed_anywhere_and_resumed(tmp_path, whole_run, config):
    whole, ends = whole_run(config)
    chosen = points(ends, config)
    for name, point in chosen.items():
        kill_and_resume(whole, tmp_path / name, config, *point)
    print(f"{config}: {len(chosen)} of {len(chosen)} kills resumed bit for bit")


@pytest.mark.xdist_group("esacl with validation")
@pytest.mark.parametrize(
    "point", [("on_validation_batch_end", 3), ("on_validation_end", 3), ("on_train_batch_end", 11)]
)
def test_killed_during_validation(tmp_path, whole_run, point):
    held_out = ["--data.init_args.val_fraction=0.2", "--model.init_args.freeze=share"]
    whole, _ = whole_run("esacl", *held_out)
    kill_and_resume(whole, tmp_path / "killed", "esacl", *point, *held_out)


@pytest.mark.xdist_group("derpp")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("point", [("on_train_batch_start", 15), ("on_after_task_end", 2)])
def test_signals_finish_the_step_save_and_leave(tmp_path, whole_run, number, point):
    whole, _ = whole_run("derpp")
    never = ["--checkpoint.every_n_train_steps=1000000"]
    handler = signal.getsignal(number)
    assert forked(main, command(tmp_path / "told", "derpp", *never, *strike(*point, number))) == 128 + number
    assert signal.getsignal(number) is handler
    assert torch.load(tmp_path / "told" / "last.ckpt", weights_only=True)["global_step"] >= 15
    main(command(tmp_path / "told", "derpp", *never, "--ckpt_path=last"))
    assert_identical(final_state(whole), final_state(tmp_path / "told"))


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    calls = 0

    def fsync(_):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr("sys.argv", ["sparsecl", *command(tmp_path, "finetune")])
    with pytest.raises(SystemExit) as exit:
        run()
    assert "No space left on device; earlier checkpoints are untouched" in exit.value.code
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] in (EVERY, 2 * EVERY)
    assert not list(tmp_path.glob("*.part"))


def test_a_finished_run_that_is_resumed_says_so_and_changes_nothing(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("lightning_sparse_cl.callbacks.schedule.rank_zero_info", said.append)
    folder = tmp_path / "run"
    main(command(folder, "finetune"))
    before, figures = final_state(folder), json.loads((folder / "metrics.json").read_text())
    assert not said
    main(command(folder, "finetune", "--ckpt_path", str(folder / "last.ckpt")))
    assert "all tasks of this run are finished" in said[0]
    assert_identical(before, final_state(folder))
    again = json.loads((folder / "metrics.json").read_text())
    assert figures["flops"]["training"] > 0
    assert {k: v for k, v in figures.items() if k not in ("seconds", "memory")}.items() <= again.items()
