"""Sweeps on Ray: a killed process, a lost node, early stopping and Optuna; with the extra ``sweep``."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_sparse_cl.cli.sweep import command

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]
SPACE = ["-c", "split_digits/er", "--sweep.configs=[split_digits/er, split_digits/esacl]", "--sweep.seeds=[0, 1]"]
SMALL = ["--schedule.epochs=6", "--data.init_args.num_tasks=5"]


def finished(folder):
    """The figures of every trial, by its name."""
    found = {}
    for path in Path(folder).glob("*/version_*/metrics.json"):
        metrics = json.loads(path.read_text())
        if metrics["finished"]:
            found[path.parts[-3]] = [metrics[key] for key in ("class_il", "task_il", "density_per_layer", "settings")]
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    command([*SPACE[2:], *SMALL, "--sweep.engine=sequential", f"--sweep.folder={folder}"])
    return finished(folder)


def wait_for(condition, seconds=240):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.2)
    return found


def begun_workers():
    """Processes of Ray that train."""
    listed = subprocess.run(["pgrep", "-f", "ray::ImplicitFunc"], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in listed]


def test_a_killed_process_changes_nothing(tmp_path, undisturbed):
    args = [*SPACE[2:], *SMALL, "--sweep.engine=ray", f"--sweep.folder={tmp_path}"]
    with (tmp_path / "screen.txt").open("w") as screen:
        sweep = subprocess.Popen([sys.executable, "-m", "lightning_sparse_cl", "sweep", *args], stdout=screen)
    wait_for(lambda: list(tmp_path.glob("*/version_0/checkpoints/last.ckpt")))
    os.kill(begun_workers()[0], signal.SIGKILL)
    assert sweep.wait(timeout=500) == 0
    assert "its process died; it goes on" in (tmp_path / "screen.txt").read_text()
    assert finished(tmp_path) == undisturbed


def test_a_lost_node_loses_nothing(tmp_path, undisturbed):
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    node = cluster.add_node(num_cpus=1)
    try:
        cluster.wait_for_nodes()
        args = [*SPACE[2:], *SMALL, "--sweep.engine=ray", f"--sweep.folder={tmp_path}"]
        args += [f"--sweep.address={cluster.address}"]
        sweep = subprocess.Popen([sys.executable, "-m", "lightning_sparse_cl", "sweep", *args])
        wait_for(lambda: len(list(tmp_path.glob("*/version_0/checkpoints/last.ckpt"))) >= 2)
        cluster.remove_node(node, allow_graceful=False)
        assert sweep.wait(timeout=500) == 0
    finally:
        cluster.shutdown()
    assert finished(tmp_path) == undisturbed


def test_bad_trials_are_stopped_early_and_not_run_again(tmp_path, capsys):
    rates = "--sweep.search={model.init_args.optimizer.init_args.lr: {log_uniform: [0.000001, 0.1]}}"
    args = ["-c", "split_digits/er", rates, "--sweep.trials=6", "--sweep.stop_early={grace: 1, factor: 2}",
            "--sweep.engine=ray", f"--sweep.folder={tmp_path}", "--schedule.epochs=1"]  # fmt: skip
    command(args)
    states = [json.loads(p.read_text())["state"] for p in tmp_path.glob("*/trial.json")]
    assert set(states) == {"finished", "stopped early"} and len(states) == 6
    assert "stopped early" in capsys.readouterr().out
    command(args)
    assert "6 of 6 trials were over before" in capsys.readouterr().out


def test_optuna_goes_on_with_what_it_knows(tmp_path, capsys):
    pytest.importorskip("optuna")
    rates = "--sweep.search={model.init_args.optimizer.init_args.lr: {log_uniform: [0.001, 0.1]}}"
    args = ["-c", "split_digits/er", rates, "--sweep.method=optuna", f"--sweep.folder={tmp_path}",
            "--schedule.epochs=1", "--trainer.limit_train_batches=2"]  # fmt: skip
    command([*args, "--sweep.trials=2"])
    before = {p: p.read_text() for p in tmp_path.glob("*/trial.json")}
    command([*args, "--sweep.trials=4"])
    after = {p: p.read_text() for p in tmp_path.glob("*/trial.json")}
    assert len(before) == 2 and len(after) == 4 and before.items() <= after.items()
    assert "2 of 4 trials were over before" in capsys.readouterr().out


def test_a_trial_on_two_processes_is_that_of_ddp(tmp_path):
    small = ["--schedule.epochs=1", "--data.init_args.batch_size=24", "--trainer.enable_progress_bar=false"]
    args = ["-c", "split_digits/er", *small, "--trainer.accelerator=cpu"]
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--threads=1", f"--trainer.logger.save_dir={tmp_path}/ddp"]
    subprocess.run([sys.executable, "-m", "lightning_sparse_cl", "fit", *args, *two], check=True)
    command([*args, "--sweep.engine=ray", "--sweep.workers=2", f"--sweep.folder={tmp_path}/sweep"])
    (expected,) = (json.loads(p.read_text()) for p in (tmp_path / "ddp").rglob("metrics.json"))
    (found,) = (json.loads(p.read_text()) for p in (tmp_path / "sweep").glob("*/version_*/metrics.json"))
    assert found["processes"] == expected["processes"] == 2
    for key in ("class_il", "task_il", "settings", "sparsity"):
        assert found[key] == expected[key], key


def test_more_processes_than_there_is_room_for_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"sweep.workers=64: .* need more than this cluster has"):
        command(["-c", "split_digits/er", "--sweep.engine=ray", "--sweep.workers=64", f"--sweep.folder={tmp_path}"])


def test_a_trial_that_fails_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"1 trials failed; er-width=0-seed=0: SmallCNN\(width=0\): a "):
        command(["-c", "split_digits/er", "--sweep.grid={model.init_args.backbone.init_args.width: [0]}",
                 "--sweep.engine=ray", f"--sweep.folder={tmp_path}"])  # fmt: skip
