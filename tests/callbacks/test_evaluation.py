"""What is measured at task ends, and that measuring changes nothing."""

import json

import pytest
import torch
from torch import nn
from toy_trainer import trainer

from lightning_sparse_cl import (
    ContinualEvaluation,
    ContinualModule,
    DERpp,
    EsaCL,
    FlopsCounter,
    RunReport,
    SmallCNN,
    SmallMLP,
)
from lightning_sparse_cl.demos import toy_tasks


def test_figures_agree_with_a_measurement_by_hand(tmp_path):
    evaluation = ContinualEvaluation(before_pruning=True)
    data, model = toy_tasks(), EsaCL(SmallCNN(4), DERpp(30, 8), sparsity=0.9)
    t = trainer(evaluation, FlopsCounter(), RunReport(), default_root_dir=tmp_path)
    t.fit(model, data)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    model.eval()
    for scenario, offset in (("class_il", 0), ("task_il", 1)):
        row = []
        for task, test in enumerate(data.test_sets):
            logits = model(data.prepare(test.images, augment=False))
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
    assert (tmp_path / "accuracy_matrix.png").stat().st_size > 0
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
