"""A long sequence takes no more memory than a short one."""

import gc
import resource

import lightning.pytorch as pl
import torch
from forked import forked

from lightning_sparse_cl import (
    ContinualEvaluation,
    DERpp,
    EsaCL,
    FiniteLoss,
    FlopsCounter,
    RandomState,
    RunReport,
    SequenceCheckpoint,
    SmallCNN,
    TaskSchedule,
)
from lightning_sparse_cl.demos import toy_tasks


class Watch(pl.Callback):
    """Bytes of all live tensors, and the process's peak in MiB, at the start of each task."""

    def __init__(self):
        self.tensors, self.peaks = [], []

    def on_task_start(self, trainer, pl_module, task):
        gc.collect()
        live = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) in
                (torch.Tensor, torch.nn.Parameter)}  # fmt: skip
        self.tensors.append(sum(live.values()))
        self.peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def test_twenty_tasks_take_the_memory_of_five(tmp_path):
    """Whatever grows must be named here: nothing does, for masks, memory and matrices are allocated once."""
    assert forked(fit_and_watch, tmp_path) == 0  # its peak is no earlier test's


def fit_and_watch(tmp_path):
    gc.freeze()  # what other tests have left is not looked through
    watch = Watch()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=-1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[TaskSchedule(1), RandomState(), FlopsCounter(), FiniteLoss(), RunReport(), ContinualEvaluation(),
                   SequenceCheckpoint(tmp_path, save_last=True), watch],
    )  # fmt: skip
    trainer.fit(EsaCL(SmallCNN(16), DERpp(50, 8)), toy_tasks(num_tasks=20, per_class=10, batch_size=10))
    assert len(watch.tensors) == 20
    assert watch.tensors[-1] <= watch.tensors[5] * 1.001 + 1024
    assert watch.peaks[-1] - watch.peaks[5] < 8
