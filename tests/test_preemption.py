"""One command serves SLURM's time limit, SIGTERM and torchrun's restarts; it ends with an undisturbed run's bits."""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from forked import FORK, forked
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from test_resume import assert_identical, command, final_state
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.__main__ import main, run
from lightning_sparse_cl.callbacks.launchers import requeue_before_training, slurm_job
from lightning_sparse_cl.checkpoint_file import read_checkpoint
from lightning_sparse_cl.demos import toy_tasks

ROOT = Path(__file__).parents[1]
SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS_PER_NODE": "1",
}  # fmt: skip


class TellStep(pl.Callback):
    """Writes the running step to a file, for those who strike at a certain one."""

    def on_train_batch_start(self, trainer, *_):
        if trainer.is_global_zero:
            Path(trainer.default_root_dir, "step").write_text(str(trainer.global_step))


class KillOnce(pl.Callback):
    """SIGKILL to one rank at a step, the first time that it is there."""

    def __init__(self, at: int, rank: int):
        self.at, self.rank = at, rank

    def on_train_batch_end(self, trainer, *_):
        mark = Path(trainer.default_root_dir, "killed")
        if trainer.global_step == self.at and trainer.global_rank == self.rank and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def environment(**more):
    return os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"} | more


def fake_slurm(folder):
    """Variables of a job, and a ``scontrol`` that writes down what it is asked."""
    bin = folder / "bin"
    bin.mkdir()
    script = bin / "scontrol"
    script.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\n')
    script.chmod(0o755)
    return SLURM | {"PATH": f"{bin}:{os.environ['PATH']}"}


def as_a_command(args, env, log):
    """What the console script does, in a copy of this process; its output goes to a file."""
    os.environ.update(env)
    sys.argv = ["sparsecl", *args]
    sys.stdout = sys.stderr = log.open("a", buffering=1)
    logging.getLogger("lightning.pytorch").handlers = [logging.StreamHandler(sys.stderr)]
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    run()


def run_struck(folder, args, env, number, at):
    """Run the command, send it a signal when it is at a step; its exit status and what it said."""
    step, log = folder / "step", folder / "log"
    step.unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    process = FORK.Process(target=as_a_command, args=(args, env, log))
    process.start()
    while process.is_alive() and not (step.exists() and int(step.read_text() or -1) >= at):
        time.sleep(0.001)
    if process.is_alive():
        os.kill(process.pid, number)
    process.join(240)
    return process.exitcode, log.read_text()


TELL = "--trainer.callbacks+=test_preemption.TellStep"


def struck_until_it_ends(folder, config, env, number, steps, more=()):
    """The same command again and again, as a requeued job's; signals at the given steps."""
    args = command(folder, config, *more, TELL, "--ckpt_path=last", "--checkpoint.every_n_train_steps=1000000")
    for at in steps:
        status, said = run_struck(folder, args, env, number, at)
        assert status == 128 + number, said
    status, said = run_struck(folder, args, env, number, 10**9)
    assert status == 0, said
    return said


def undisturbed(folder, config):
    assert forked(main, command(folder, config, "--checkpoint.every_n_train_steps=1000000")) == 0
    return final_state(folder)


def test_slurm_time_limit_saves_at_a_steps_end_and_requeues(tmp_path):
    whole, job = undisturbed(tmp_path / "whole", "derpp"), tmp_path / "job"
    job.mkdir()
    env = fake_slurm(job)
    said = struck_until_it_ends(job, "derpp", env, signal.SIGUSR1, [5, 33])
    assert (job / "asked").read_text().splitlines() == ["requeue 4711"] * 2
    assert not list(tmp_path.rglob("hpc_ckpt*")) and "Restored all states" in said
    assert_identical(whole, final_state(job))


def test_a_requeued_job_goes_on_without_being_told(tmp_path, monkeypatch):
    args = command(tmp_path, "finetune", "--trainer.limit_train_batches=2", "--schedule.epochs=1")
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert main(args).trainer.ckpt_path is None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    start = shutil.copy(tmp_path / "last.ckpt", tmp_path / "start.ckpt")
    for given in ([], [f"--ckpt_path={start}"]):  # or the second time slot begins where the first did
        assert main([*args, *given]).trainer.ckpt_path == str(tmp_path / "last.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=["SIGUSR1 of SLURM", "SIGTERM"])
def test_twenty_random_preemptions_over_five_configurations(tmp_path, number):
    configs, drawn = ["esacl", "sparcl", "continual_dst", "cl_lsg", "icarl"], random.Random(0)
    for config in configs:
        whole, job = undisturbed(tmp_path / config / "whole", config), tmp_path / config / "job"
        job.mkdir()
        env = fake_slurm(job) if number == signal.SIGUSR1 else {}
        steps = sorted(drawn.sample(range(1, 55), 4))
        struck_until_it_ends(job, config, env, number, steps)
        assert_identical(whole, final_state(job), config)
        print(f"{config}: {number.name} at steps {steps}, bit for bit")


TEN = ["esacl", "sparcl", "continual_dst", "cl_lsg", "derpp", "icarl", "agem", "gpm", "rigl_derpp", "lamaml"]


@pytest.mark.slow
@pytest.mark.parametrize("config", TEN)
def test_five_kills_at_random_moments_of_one_command(tmp_path, config):
    """While it starts, trains, measures or writes: SIGKILL, and the same command again."""
    folder, drawn = tmp_path / "job", random.Random(config)
    started = time.monotonic()
    whole = undisturbed(tmp_path / "whole", config)
    usual, kills = time.monotonic() - started, []
    args = command(folder, config, "--ckpt_path=last", "--checkpoint.every_n_train_steps=3")
    while len(kills) < 5:
        process = FORK.Process(target=main, args=(args,))
        process.start()
        time.sleep(drawn.uniform(0, usual))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode:
            kills.append(read_checkpoint(folder / "last.ckpt")["global_step"] if (folder / "last.ckpt").exists() else 0)
        else:
            shutil.rmtree(folder)  # it had ended: from the start again
            kills = []
    assert forked(main, args) == 0
    assert_identical(whole, final_state(folder))
    assert [p.name for p in folder.glob("last*")] == ["last.ckpt"] and not list(folder.glob("*.part"))
    print(f"{config}: killed five times, with steps {kills} saved, bit for bit")


@pytest.mark.parametrize("auto_requeue", [True, False])
def test_lightnings_handler_which_saves_in_a_step_is_off(tmp_path, monkeypatch, auto_requeue):
    """In a script: SequenceCheckpoint takes its place, unless the user wants none at all."""
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert slurm_job() == "12_3"
    asked, handlers = [], []
    monkeypatch.setattr("lightning_sparse_cl.callbacks.checkpoint.requeue", lambda: asked.append(slurm_job()))
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # any other, and Lightning leaves it alone

    class Told(pl.Callback):
        def on_train_start(self, trainer, *_):
            assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL  # until ours, which comes last

        def on_train_batch_start(self, trainer, *_):
            handlers.append(signal.getsignal(signal.SIGUSR1))
            if trainer.global_step == 3 and auto_requeue:
                os.kill(os.getpid(), signal.SIGUSR1)

    environment = SLURMEnvironment(auto_requeue=auto_requeue)
    fit = trainer(Told(), scl.SequenceCheckpoint(dirpath=tmp_path, save_last=True), plugins=[environment],
                  enable_checkpointing=True)  # fmt: skip
    try:
        if auto_requeue:
            with pytest.raises(SystemExit) as exit:
                fit.fit(scl.ContinualModule(scl.SmallMLP([8])), toy_tasks(batch_size=8))
            assert exit.value.code == 128 + signal.SIGUSR1 and asked == ["12_3"]
            assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4
        else:
            fit.fit(scl.ContinualModule(scl.SmallMLP([8])), toy_tasks(batch_size=8))
            assert set(handlers) == {signal.SIG_DFL} and not asked
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_without_auto_requeue_a_command_that_trains_does_not_requeue(tmp_path, monkeypatch):
    """Neither at a step's end nor as it did while it started."""
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    before = signal.getsignal(signal.SIGUSR1)
    try:
        requeue_before_training()
        assert signal.getsignal(signal.SIGUSR1) not in (before, signal.SIG_DFL)
        off = ["--trainer.plugins=lightning.fabric.plugins.environments.SLURMEnvironment",
               "--trainer.plugins.init_args.auto_requeue=false"]  # fmt: skip
        main(command(tmp_path, "finetune", "--trainer.limit_train_batches=2", "--schedule.epochs=1", *off))
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("other", ["--seed_everything=5", "--model.init_args.optimizer.lr=0.5"])
def test_an_hpc_checkpoint_of_another_run_is_not_taken(tmp_path, monkeypatch, other):
    args = command(tmp_path, "finetune", "--trainer.limit_train_batches=2", "--schedule.epochs=1")
    main(args)
    os.replace(tmp_path / "last.ckpt", tmp_path / "hpc_ckpt_1.ckpt")
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="is from another run"):
        main([*args, other])


def torchrun(folder, *args, restarts=0, standalone=False):
    options = ["--nproc_per_node=2", f"--max-restarts={restarts}"] + ["--standalone"] * standalone
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, "-m", "lightning_sparse_cl", *args],
        env=environment(MASTER_PORT=str(random.randrange(20000, 60000))), cwd=folder.parent, capture_output=True,
        text=True, timeout=400,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.xdist_group("two processes")
def test_torchrun_is_one_run_and_goes_on_after_a_killed_worker(tmp_path):
    options = "--data.init_args.batch_size=24", "--trainer.limit_train_batches=4", "--schedule.epochs=1"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    assert forked(main, command(whole, "derpp", *options, *two), processes=2) == 0
    kill = ["--trainer.callbacks+=test_preemption.KillOnce", "--trainer.callbacks.at=10", "--trainer.callbacks.rank=1"]
    killed.mkdir()
    done = torchrun(killed, *command(killed, "derpp", *options, *kill, "--ckpt_path=last"), restarts=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (killed / "killed").exists()
    assert json.loads((killed / "metrics.json").read_text())["processes"] == 2
    assert [p.name for p in killed.glob("last*.ckpt")] == ["last.ckpt"]
    assert_identical(final_state(whole), final_state(killed))


@pytest.mark.slow
@pytest.mark.xdist_group("two processes")
def test_agents_of_torchrun_on_two_nodes_are_one_run(tmp_path):
    """Two agents on this machine, with one process each, as two nodes would have them."""
    options = "--data.init_args.batch_size=24", "--trainer.limit_train_batches=4", "--schedule.epochs=1"
    whole, nodes = tmp_path / "whole", tmp_path / "nodes"
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    assert forked(main, command(whole, "derpp", *options, *two), processes=2) == 0
    nodes.mkdir()
    meeting = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=two_nodes",
               f"--rdzv_endpoint=localhost:{random.randrange(20000, 60000)}"]  # fmt: skip
    run = [sys.executable, "-m", "torch.distributed.run", *meeting, "-m", "lightning_sparse_cl"]
    agents = [
        subprocess.Popen([*run, *command(nodes, "derpp", *options)], env=environment(), cwd=tmp_path,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]  # fmt: skip
    said = [agent.communicate(timeout=400)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert json.loads((nodes / "metrics.json").read_text())["processes"] == 2
    assert_identical(final_state(whole), final_state(nodes))


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_strategies_that_keep_weights_in_parts_are_refused(strategy):
    """Lightning itself takes them on GPUs only."""
    t = trainer()
    t._accelerator_connector.strategy = strategy()
    for callback in (scl.TaskSchedule(1), scl.OneShotPruning(0.5), scl.ContinualEvaluation()):
        t.callbacks = [scl.TaskSchedule(1), callback]
        t.datamodule = toy_tasks()
        if isinstance(callback, scl.ContinualEvaluation):
            continue  # it only measures
        with pytest.raises(ValueError, match=rf"Trainer\(strategy={strategy.__name__}\): .*use strategy='ddp'"):
            callback.setup(t, scl.ContinualModule(scl.SmallMLP([8])), "fit")


@pytest.mark.slow
@pytest.mark.parametrize("standalone", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_restarts_ten_times(tmp_path, rank, standalone):
    """What dies without :func:`join_after_restart` does so about every second time."""
    options = "--data.init_args.batch_size=24", "--trainer.limit_train_batches=4", "--schedule.epochs=1"
    drawn, whole = random.Random(rank), None
    for i in range(6):
        folder = tmp_path / str(i)
        folder.mkdir()
        kill = ["--trainer.callbacks+=test_preemption.KillOnce", f"--trainer.callbacks.rank={rank}"]
        at = [f"--trainer.callbacks.at={drawn.randrange(1, 20) if i else 10**6}"]
        done = torchrun(
            folder, *command(folder, "esacl", *options, *kill, *at, "--ckpt_path=last"), restarts=1,
            standalone=standalone,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        whole = whole or final_state(folder)
        assert_identical(whole, final_state(folder))


def test_processes_that_a_launcher_started_are_not_runs_of_their_own(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    with pytest.raises(ValueError, match=r"SLURM started 2 processes.*Use Trainer\(devices=2, num_nodes=1\)"):
        trainer().fit(scl.ContinualModule(scl.SmallMLP([8])), toy_tasks(batch_size=8))
