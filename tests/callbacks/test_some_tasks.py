"""`trainer.test` of some tasks: their figures are those of a test of all, and of the others nothing is said."""

import json

import pytest
import torch
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.demos import toy_tasks


@pytest.fixture
def model():
    trainer(epochs=1).fit(model := scl.ContinualModule(scl.SmallCNN(4)), toy_tasks(num_tasks=4))
    return model


def figures_of(model, tasks, door="test", data=None):
    t = trainer(evaluation := scl.ContinualEvaluation(tasks=tasks))
    getattr(t, door)(model, data or toy_tasks(num_tasks=4), verbose=False)
    return {name: value.item() for name, value in t.callback_metrics.items()}, evaluation


@pytest.mark.parametrize("door", ["test", "validate"])
@pytest.mark.parametrize(("tasks", "chosen"), [([2, 0], [0, 2]), (["5"], [2]), (["0", 3, "1"], [0, 3])])
def test_only_what_is_asked_for_is_tested(model, door, tasks, chosen):
    part, evaluation = figures_of(model, tasks, door)
    whole, _ = figures_of(model, None, door)
    for scenario in ("class_il", "task_il"):
        figures = {name: value for name, value in part.items() if name.startswith(scenario)}
        wanted = {f"{scenario}/task_{t}": whole[f"{scenario}/task_{t}"] for t in chosen}
        mean = pytest.approx(sum(wanted.values()) / len(wanted))
        assert figures == wanted | {f"{scenario}/acc": mean}
        row = evaluation.tested[scenario].R[0]
        assert (~row.isnan()).nonzero().flatten().tolist() == chosen


def test_held_out_samples_of_some_tasks(model):
    data = toy_tasks(num_tasks=4, val_fraction=0.25)
    part, whole = (figures_of(model, tasks, "validate", data)[0] for tasks in ([1], None))
    assert part["class_il/task_1"] == whole["class_il/task_1"] == part["class_il/acc"]


def test_what_comes_later_is_of_all_tasks(model):
    data = toy_tasks(num_tasks=4)
    figures_of(model, [1], data=data)
    assert len(data.test_dataloader()) == 4
    t = trainer(evaluation := scl.ContinualEvaluation(tasks=[1]), epochs=1)
    assert len(t.predict(model, data)) == 4
    t.fit(scl.ContinualModule(scl.SmallMLP([8])), data)
    assert not evaluation.matrices["class_il"].R.isnan().any()


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([4], r"there is no 4; tasks are 0-3"),
        ([-1], r"there is no -1; tasks are 0-3"),
        (["cat"], r"there is no 'cat'; classes are 0, 1, 2, 3, 4, \.\.\."),
    ],
)
def test_unknown_tasks_are_one_line(model, tasks, message):
    with pytest.raises(ValueError, match=message) as error:
        figures_of(model, tasks)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="at least one task"):
        scl.ContinualEvaluation(tasks=[])


def test_tables_show_the_tasks_that_were_tested(model, capsys):
    t = trainer(scl.ContinualEvaluation(tasks=["5"]), scl.RunReport())
    t.test(model, toy_tasks(num_tasks=4), verbose=False)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines if len(line) == 3 and line[0].isdigit()] == ["3"]
    assert ["3:", "4,", "5"] in lines and not any(line[:1] == ["1:"] for line in lines)


def test_metrics_name_the_classes(tmp_path):
    images = torch.rand(60, 1, 8, 8)
    data = scl.SplitTensors((images, torch.arange(60) % 4 + 10), (images, torch.arange(60) % 4 + 10), 2, batch_size=10)
    trainer(scl.ContinualEvaluation(), scl.RunReport(str(tmp_path)), epochs=1).fit(
        scl.ContinualModule(scl.SmallMLP([8])), data
    )
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["class_names"] == ["10", "11", "12", "13"]
    assert metrics["classes"] == [["10", "11"], ["12", "13"]]
