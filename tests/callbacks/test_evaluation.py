"""What is measured at task ends, and that measuring changes nothing."""

import json
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from toy_trainer import trainer

from lightning_sparse_cl import (
    AGEM,
    ContinualEvaluation,
    ContinualModule,
    DERpp,
    DynamicDataRemoval,
    EsaCL,
    FlopsCounter,
    RunReport,
    SmallCNN,
    SmallMLP,
)
from lightning_sparse_cl.demos import PlainClassifier, toy_tasks


def test_figures_agree_with_a_measurement_by_hand(tmp_path):
    evaluation = ContinualEvaluation(before_pruning=True)
    data, model, folder = toy_tasks(), EsaCL(SmallCNN(4), DERpp(30, 8), sparsity=0.9), tmp_path / "run"
    t = trainer(evaluation, FlopsCounter(), RunReport(), default_root_dir=folder)
    t.fit(model, data)
    metrics = json.loads((folder / "metrics.json").read_text())
    model.eval()
    for scenario, offset in (("class_il", 0), ("task_il", 1)):
        row = []
        for task, test in enumerate(data.test_sets):
            logits = model(data.prepare(test.inputs, augment=False))
            if offset:
                logits = logits[:, 2 * task : 2 * task + 2]
            row.append(float((logits.argmax(1) + 2 * task * offset == test.labels).float().mean()))
        assert metrics[scenario]["matrix"][-1] == pytest.approx(row, abs=1e-6)
        assert metrics[scenario]["acc"] == pytest.approx(sum(row) / 3)
        assert None not in metrics[scenario]["baseline"]
        assert metrics[f"{scenario}_before"]["acc"] is not None
    # 3 tasks, 2 epochs, 5 batches of 16, two passes of 16 + 2 * 8; the very first batch replays nothing
    passes = {"samples": 480, "forward": 30 * 64 - 32, "backward": 30 * 64 - 32}
    assert passes.items() <= metrics["flops"].items()
    assert metrics["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert (folder / "accuracy_matrix.png").stat().st_size > 0
    tested = t.test(model, data, verbose=False)[0]
    assert tested["class_il/acc"] == pytest.approx(metrics["class_il"]["acc"])
    assert tested["task_il/task_1"] == pytest.approx(metrics["task_il"]["matrix"][-1][1], abs=1e-6)


@pytest.mark.parametrize("measure", [[ContinualEvaluation()], [ContinualEvaluation(before_pruning=True)]])
def test_measuring_changes_nothing(measure):
    weights = []
    for callbacks in ([], measure):
        torch.manual_seed(0)
        model = ContinualModule(nn.Sequential(SmallMLP([8]), nn.Dropout(0.5)), DERpp(30, 8))
        trainer(*callbacks).fit(model, toy_tasks())
        weights.append(nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(*weights)


OUTPUTS = {
    "dict": lambda logits: {"loss": logits.sum(), "logits": logits},
    "one entry": lambda logits: {"prediction": logits},
    "object": lambda logits: SimpleNamespace(logits=logits, hidden=None),
    "tuple": lambda logits: (None, logits, logits.sum()),
    "larger head": lambda logits: torch.cat([logits, torch.full_like(logits, 1e3)], 1),
}


class Wrapped(PlainClassifier):
    """Trains as PlainClassifier, and returns its logits in some form."""

    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, x):
        return self.form(self.net(x))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


@pytest.mark.parametrize("name", OUTPUTS)
def test_logits_are_found_in_what_forward_returns(name):
    """The same accuracies, task by task; extra outputs, though the largest, are no classes."""
    results = []
    for form in (lambda logits: logits, OUTPUTS[name]):
        torch.manual_seed(0)
        evaluation, module, data = ContinualEvaluation(), Wrapped(form), toy_tasks(val_fraction=0.2)
        others = [AGEM(30, 8), DynamicDataRemoval(0.3, 1, 1)] if name != "larger head" else []
        t = trainer(evaluation, *others)
        t.fit(module, data)
        module.test_step = lambda batch, *_: None
        figures = t.test(module, data, verbose=False)[0]
        results.append([*(evaluation.matrices[s].R for s in evaluation.scenarios), figures, evaluation.held_out])
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert results[0][2:] == results[1][2:] and results[0][0].isfinite().all()


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (lambda logits: None, "it returned None"),
        (lambda logits: {"a": logits, "b": logits}, "it returned a dict of a, b"),
        (lambda logits: logits[:, None], r"it returned a tensor of shape \(40, 1, 6\)"),
        (lambda logits: logits[:, :4], "its forward gives 4 logits, but the data have 6 classes"),
    ],
)
def test_what_cannot_be_logits_is_refused(form, said):
    with pytest.raises((TypeError, ValueError), match=f"^Wrapped: .*{said}") as error:
        trainer(ContinualEvaluation()).fit(Wrapped(form), toy_tasks())
    assert "\n" not in str(error.value)


def test_evaluation_without_tasks_is_refused():
    data = pl.LightningDataModule()
    with pytest.raises(TypeError, match="ContinualEvaluation: the trainer's datamodule is a LightningDataModule"):
        pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[ContinualEvaluation()]).fit(
            PlainClassifier(), datamodule=data
        )
