"""A run that is killed and resumed ends with the same bits as one that never stopped."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from lightning_sparse_cl.__main__ import main

CONFIGS = Path(__file__).parents[1] / "configs" / "split_digits"


class Kill(pl.Callback):
    """SIGKILL, which nothing can catch, after a given training step."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def command(folder, config, *more):
    return [
        "fit", "-c", str(CONFIGS / f"{config}.yaml"), "--schedule.epochs", "2", "--model.init_args.backbone.width", "4",
        "--trainer.default_root_dir", str(folder), "--trainer.logger", "false", "--checkpoint.dirpath", str(folder),
        "--checkpoint.every_n_train_steps", "5", "--checkpoint.save_top_k", "-1", "--trainer.accelerator", "cpu",
        "--trainer.enable_progress_bar", "false", *more,
    ]  # fmt: skip


def final_state(folder):
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    checkpoint["callbacks"] = {
        k: v for k, v in checkpoint["callbacks"].items() if k in ("TaskSchedule", "ContinualEvaluation")
    }
    kept = ("state_dict", "masks", "optimizer_states", "callbacks", "random_states", "SplitDigits", "global_step")
    return {name: checkpoint[name] for name in kept if name in checkpoint}


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


@pytest.mark.parametrize(
    ("config", "more", "step"),
    [
        ("esacl", ["--model.init_args.freeze", "share", "--model.init_args.selection.warmup", "1"], 88),
        ("esacl", [], 72),
        ("derpp", ["--data.init_args.val_fraction", "0.1"], 58),
    ],
)
def test_killed_in_the_middle_of_a_task_and_resumed(tmp_path, config, more, step):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    main(command(whole, config, *more))
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch; torch.set_num_threads(1)\n"
        "from lightning_sparse_cl.__main__ import main; import test_resume\n"
        f"main(test_resume.command({str(killed)!r}, *sys.argv[2:]) + ['--trainer.callbacks+=test_resume.Kill', "
        f"'--trainer.callbacks.step={step}'])"
    )
    died = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parent), config, *more], capture_output=True, text=True
    )
    assert died.returncode == -signal.SIGKILL, died.stderr[-3000:]
    resumed_from = max(killed.glob("epoch*.ckpt"), key=lambda p: int(p.stem.split("step=")[1]))
    assert int(resumed_from.stem.split("step=")[1]) % 34  # inside a task and inside an epoch
    main(command(killed, config, *more, "--ckpt_path", str(resumed_from)))
    expected, found = final_state(whole), final_state(killed)
    assert "SplitDigits" in expected and "state_dict" in expected
    assert_identical(expected, found)


def test_a_finished_run_that_is_resumed_changes_nothing(tmp_path, capsys):
    main(command(tmp_path, "finetune"))
    before = final_state(tmp_path)
    main(command(tmp_path, "finetune", "--ckpt_path", str(tmp_path / "last.ckpt")))
    assert_identical(before, final_state(tmp_path))
