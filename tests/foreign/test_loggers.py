"""The loggers of other packages: two runs in one place leave two folders of files."""

import json
from pathlib import Path

import pytest
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.callbacks.run_folder import run_folder
from lightning_sparse_cl.demos import toy_tasks

pytestmark = pytest.mark.foreign

FILES = {"metrics.json", "model.safetensors", "accuracy_matrix.png", "checkpoints"}
LOGGERS = {
    "tensorboard": TensorBoardLogger,
    "wandb": lambda place: WandbLogger(save_dir=place, offline=True),
    "mlflow": lambda place: MLFlowLogger(save_dir=place),
}


@pytest.mark.parametrize("package", LOGGERS)
def test_two_runs_in_one_place_have_two_folders(tmp_path, package, monkeypatch):
    pytest.importorskip(package)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # from mlflow 3 on it asks for a database
    folders = []
    for _ in range(2):
        checkpoint = scl.SequenceCheckpoint(save_last=True)
        callbacks = scl.ContinualEvaluation(), scl.ModelCapacity(), scl.RunReport(), checkpoint
        logger = LOGGERS[package](str(tmp_path / "runs"))
        t = trainer(*callbacks, epochs=1, logger=logger, enable_checkpointing=True)
        t.fit(scl.ContinualModule(scl.SmallMLP([8])), toy_tasks(num_tasks=2))
        folder = run_folder(t)
        assert {p.name for p in folder.iterdir()} >= FILES and Path(checkpoint.dirpath) == folder / "checkpoints"
        assert json.loads((folder / "metrics.json").read_text())["finished"]
        folders.append(folder)
        if package == "wandb":
            logger.experiment.finish()  # a second run of this process would go on with it
    found = {p.parent for p in tmp_path.rglob("*") if p.name in FILES}
    assert found == set(folders) and len(found) == 2
