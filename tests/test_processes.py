"""Two gloo processes: the same weights, masks and memory on both, kills, and every test sample counted once."""

import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_resume import CONFIGS, COUNT, assert_identical, command, ends_of, final_state, points

SCRIPT = """
import functools, sys, torch, lightning.pytorch as pl, logging, warnings
from pathlib import Path
torch.set_num_threads(1)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")
import lightning_sparse_cl as scl
from lightning_sparse_cl.demos import toy_tasks

class Compare(pl.Callback):
    def on_after_task_end(self, trainer, pl_module, task):
        state = {k: v for k, v in pl_module.state_dict().items() if isinstance(v, torch.Tensor)}
        state |= {f"alive/{k}": v for k, v in scl.Masks.of(pl_module).alive.items()}
        state |= {f"frozen/{k}": v for k, v in scl.Masks.of(pl_module).frozen.items()}
        state |= {f"updated/{k}": v for k, v in scl.Masks.of(pl_module).updated.items()}
        state |= {f"samples/{i}": v for i, v in enumerate(trainer.datamodule.alive)}
        state |= {f"agem/{k}": v for k, v in AGEM.memory.state_dict().items() if isinstance(v, torch.Tensor)}
        state |= {f"gpm/{k}": v for k, v in GPM.bases.items()}
        assert ANOTHER or "objective.memory.images" in state and any(k.startswith("alive") for k in state)
        for name, value in state.items():
            first = trainer.strategy.broadcast(value)
            assert torch.equal(first, value), f"{name} differs after task {task}"
        starts = trainer.strategy.broadcast(trainer.datamodule.starts)
        assert starts == trainer.datamodule.starts  # each process has losses of its own, and they stop together
        if not ANOTHER:
            seen = trainer.strategy.broadcast(pl_module.objective.memory.seen)
            assert seen == pl_module.objective.memory.seen == flops.counts["samples"]
            assert REMOVED or seen == 5 * 16 * starts[task + 1]
        assert flops.summary() == trainer.strategy.broadcast(flops.summary())
        rates = trainer.strategy.broadcast([g["lr"] for g in trainer.optimizers[0].param_groups])
        assert rates == [g["lr"] for g in trainer.optimizers[0].param_groups]

evaluation = scl.ContinualEvaluation()
pl.seed_everything(0, verbose=False)
halved = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
aids = [scl.GradientClipping(1.0), scl.TaskLRSchedule(halved), scl.TaskEarlyStopping("train/loss", 1)]
flops, REMOVED = scl.FlopsCounter(), METHOD == "SparCL"
backbone, objective = scl.SmallCNN(4), scl.DERpp(30, 8)
AGEM, GPM = scl.AGEM(30, 8), scl.GPM()
ANOTHER = {
    "EWC": (scl.EWC(), []), "LwF": (scl.LwF(), []), "ICaRL": (scl.ICaRL(30, 8), []), "FDR": (scl.FDR(30, 8), []),
    "CO2L": (scl.CO2L(30, 8), []), "AGEM": (None, [AGEM]), "GPM": (scl.CrossEntropy(True), [GPM]),
    "LaMAML": (scl.ER(30, 8), []),
}.get(METHOD)
if METHOD == "EsaCL":
    model = scl.EsaCL(backbone, objective, freeze="share", selection=scl.LossSelection(warmup=1), policies=aids)
elif METHOD == "SparCL":
    model = scl.SparCL(backbone, objective, scl.TaskAwareDynamicMasking(0.7, 2), scl.DynamicDataRemoval(0.4, 2, 2, BY),
        scl.DynamicGradientMasking(0.1, 3, gradients=GRADIENTS))
elif ANOTHER:
    update = scl.LaMAML(parts=2) if METHOD == "LaMAML" else None
    model = scl.ContinualModule(backbone, ANOTHER[0], update, policies=ANOTHER[1])
else:
    policy = getattr(scl, METHOD)(0.7)
    policy.interval = 3
    model = scl.ContinualModule(backbone, objective, policies=[policy])
trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=-1, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    callbacks=[scl.TaskSchedule(5), scl.RandomState(), flops, evaluation, Compare()])
data = toy_tasks(batch_size=8)
trainer.fit(model, data)
model.eval()
test = data.test_sets[1]
with torch.no_grad():
    alone = (model(data.prepare(test.images, augment=False)).argmax(1) == test.labels).float().mean()
assert abs(float(evaluation.matrices["class_il"].R[-1, 1]) - float(alone)) < 1e-6
Path(f"ok{trainer.global_rank}").touch()
"""


@pytest.mark.parametrize(
    ("method", "gradients", "by"),
    [
        ("EsaCL", "", ""),
        ("SparCL", "measured", "forgetting"),
        pytest.param("SparCL", "training", "loss", marks=pytest.mark.slow),
        *(pytest.param(method, "", "", marks=pytest.mark.slow) for method in ("RigL", "SET", "SNFS", "SNIP")),
        *(
            pytest.param(method, "", "", marks=pytest.mark.slow)
            for method in ("CO2L", "EWC", "LwF", "ICaRL", "FDR", "AGEM", "GPM", "LaMAML")
        ),
    ],
)
def test_two_processes_agree_bit_for_bit(tmp_path, method, gradients, by):
    (tmp_path / "two.py").write_text(f"METHOD, GRADIENTS, BY = {method!r}, {gradients!r}, {by!r}\n{SCRIPT}")
    done = subprocess.run([sys.executable, "two.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {p.name for p in tmp_path.glob("ok*")} == {"ok0", "ok1"}


def launch(args, processes=2, batch_size=8):
    """The command line on several gloo processes, in a session of its own; its exit status and what it said."""
    many = [f"--trainer.devices={processes}", f"--data.init_args.batch_size={batch_size}"]
    many += ["--trainer.strategy=ddp"] if processes > 1 else []
    job = subprocess.Popen(
        [sys.executable, "-m", "lightning_sparse_cl", *args, *many], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
    )  # fmt: skip
    try:
        said, _ = job.communicate(timeout=300)
    finally:
        if job.poll() is None or processes > 1:
            subprocess.run(["kill", "-KILL", "--", f"-{job.pid}"], capture_output=True)
    return job.returncode, said


def strike(hook, at, number=signal.SIGKILL):
    return ["--trainer.callbacks+=test_resume.Strike", f"--trainer.callbacks.hook={hook}",
            f"--trainer.callbacks.at={at}", f"--trainer.callbacks.number={int(number)}"]  # fmt: skip


def whole_run(folder, config):
    """The run of two processes that is never stopped; the last step of each task."""
    status, said = launch(command(folder, config, COUNT))
    assert status == 0, said[-3000:]
    ends = ends_of(folder)
    assert ends[-1] == torch.load(folder / "last.ckpt", weights_only=True)["global_step"]
    return ends


def kill_and_resume(whole, folder, config, hook, at):
    status, said = launch([*command(folder, config), *strike(hook, at)])
    assert status == -signal.SIGKILL, said[-3000:]
    resume = ["--ckpt_path=last"] if (folder / "last.ckpt").exists() else []
    status, said = launch([*command(folder, config), *resume])
    assert status == 0, said[-3000:]
    assert_identical(final_state(whole), final_state(folder), f"{config}, {hook} {at}: ")


def test_two_processes_killed_and_resumed_then_one_goes_on(tmp_path):
    ends = whole_run(tmp_path / "whole", "esacl")
    kill_and_resume(tmp_path / "whole", tmp_path / "killed", "esacl", "on_task_end", 2)
    told = tmp_path / "told"
    status, said = launch([*command(told, "esacl"), *strike("on_train_batch_start", ends[0] + 4, signal.SIGTERM)])
    assert status == 128 + signal.SIGTERM, said[-3000:]
    at = torch.load(told / "last.ckpt", weights_only=True)["global_step"]
    assert ends[0] < at < ends[1]
    status, said = launch([*command(told, "esacl"), "--ckpt_path=last"], processes=1, batch_size=16)
    assert status == 0, said[-3000:]
    two, one = (torch.load(tmp_path / f / "last.ckpt", weights_only=True) for f in ("whole", "told"))
    assert one["global_step"] == two["global_step"]
    memory = "objective.memory._extra_state"
    assert one["state_dict"][memory] == two["state_dict"][memory]  # seen, and by which seed


@pytest.mark.slow
@pytest.mark.parametrize("config", sorted(p.stem for p in CONFIGS.glob("*.yaml")))
def test_two_processes_killed_anywhere_and_resumed(tmp_path, config):
    ends = whole_run(tmp_path / "whole", config)
    chosen = dict(list(points(ends, config).items())[::3])
    for name, point in chosen.items():
        kill_and_resume(tmp_path / "whole", tmp_path / name, config, *point)
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
            status, said = launch(args, processes, 16 // processes)
            assert status == 0, said[-3000:]
            R = torch.load(folder / "last.ckpt", weights_only=True)["callbacks"]["ContinualEvaluation"]["class_il"]["R"]
            accuracies[processes].append(float(R[-1].mean()))
    assert abs(statistics.median(accuracies[1]) - statistics.median(accuracies[2])) < 0.05, accuracies
