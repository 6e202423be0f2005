"""Two gloo processes: the same weights, masks and memory on both, and every test sample counted once."""

import subprocess
import sys

SCRIPT = """
import sys, torch, lightning.pytorch as pl, logging, warnings
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
        assert "objective.memory.images" in state and any(k.startswith("alive") for k in state)
        for name, value in state.items():
            first = trainer.strategy.broadcast(value)
            assert torch.equal(first, value), f"{name} differs after task {task}"
        seen = trainer.strategy.broadcast(pl_module.objective.memory.seen)
        assert seen == pl_module.objective.memory.seen == 2 * 5 * 16 * (task + 1)

evaluation = scl.ContinualEvaluation()
pl.seed_everything(0, verbose=False)
model = scl.EsaCL(scl.SmallCNN(4), scl.DERpp(30, 8), freeze="share", selection=scl.LossSelection(warmup=1))
trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=-1, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    callbacks=[scl.TaskSchedule(2), scl.RandomState(), evaluation, Compare()])
data = toy_tasks(batch_size=8)
trainer.fit(model, data)
model.eval()
test = data.test_sets[1]
with torch.no_grad():
    alone = (model(data.prepare(test.images, augment=False)).argmax(1) == test.labels).float().mean()
assert abs(float(evaluation.matrices["class_il"].R[-1, 1]) - float(alone)) < 1e-6
Path(f"ok{trainer.global_rank}").touch()
"""


def test_two_processes_agree_bit_for_bit(tmp_path):
    (tmp_path / "two.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "two.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {p.name for p in tmp_path.glob("ok*")} == {"ok0", "ok1"}
