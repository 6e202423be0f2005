"""Every run has a folder of its own under any logger, the same on every process."""

import json
from pathlib import Path

import pytest
from forked import forked
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.callbacks.run_folder import run_folder
from lightning_sparse_cl.demos import toy_tasks

FILES = {"metrics.json", "model.safetensors", "accuracy_matrix.png", "checkpoints"}


class Elsewhere(Logger):
    """Knows a place, a name and a version, as loggers of services do."""

    def __init__(self, save_dir, version):
        super().__init__()
        self.place, self.number = save_dir, version

    save_dir = property(lambda self: self.place)
    name = property(lambda self: "project")
    version = property(lambda self: self.number)

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, *args, **kwargs):
        pass


def fit(logger, **options):
    checkpoint = scl.SequenceCheckpoint(save_last=True)
    measures = scl.ContinualEvaluation(), scl.ModelCapacity(), scl.RunReport(), checkpoint
    t = trainer(*measures, epochs=1, logger=logger, enable_checkpointing=True, **options)
    t.fit(scl.ContinualModule(scl.SmallMLP([8])), toy_tasks(num_tasks=2))
    return run_folder(t), Path(checkpoint.dirpath)


LOGGERS = {
    "CSV": lambda place, run: CSVLogger(place),
    "another": lambda place, run: Elsewhere(place, f"r{run}"),
    "another, numbered": lambda place, run: Elsewhere(place, run),
    "another, without a place": lambda place, run: Elsewhere(None, f"r{run}"),
}


@pytest.mark.parametrize("name", LOGGERS)
def test_two_runs_of_one_logger_have_two_folders(tmp_path, name):
    folders = []
    for run in range(2):
        folder, checkpoints = fit(LOGGERS[name](str(tmp_path / "runs"), run))
        assert {p.name for p in folder.iterdir()} >= FILES and checkpoints == folder / "checkpoints"
        assert json.loads((folder / "metrics.json").read_text())["finished"]
        folders.append(folder)
    assert folders[0] != folders[1]
    found = [p for p in tmp_path.rglob("*") if p.name in FILES]
    assert {p.parent.resolve() for p in found} == {f.resolve() for f in folders}


def test_the_folder_without_a_logger_is_the_one_told(tmp_path):
    assert run_folder(trainer()) is None
    assert run_folder(trainer(default_root_dir=tmp_path / "told")) == tmp_path / "told"
    assert fit(False, default_root_dir=tmp_path / "told")[0] == tmp_path / "told"


def same_on_both(place):
    class Look(scl.TaskCallback):
        def setup(self, trainer, pl_module, stage):
            found = run_folder(trainer)
            assert found is not None and trainer.strategy.broadcast(found) == found
            Path(place, f"seen{trainer.global_rank}").write_text(str(found))

    class OnFirst(Elsewhere):
        version = property(lambda self: "first" if look.rank == 0 else None)  # as of a service that only one asks

    look = Look()
    t = trainer(look, scl.RunReport(), epochs=1, devices=2, strategy="ddp", logger=False)
    look.rank = t.global_rank
    t.loggers = [OnFirst(place, None)]
    t.fit(scl.ContinualModule(scl.SmallMLP([8])), toy_tasks(num_tasks=1, batch_size=8))


def test_two_processes_have_one_folder(tmp_path):
    assert forked(same_on_both, str(tmp_path), processes=2) == 0
    seen = {(tmp_path / f"seen{rank}").read_text() for rank in range(2)}
    assert seen == {str(tmp_path / "project" / "first")}
    assert (tmp_path / "project" / "first" / "metrics.json").exists()
