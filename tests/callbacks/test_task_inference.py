"""Which task a sample belongs to: rules against formulas; evaluation, test and prediction answer the same."""

import copy
import math
from itertools import accumulate, pairwise

import lightning.pytorch as pl
import pytest
import torch
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.demos import toy_tasks

RULES = [scl.LargestLogit, scl.LowestEntropy, scl.CalibratedLogit]


class AsTested(pl.Callback):
    """After each task, Class-IL accuracies of the module itself beside those of the evaluation."""

    @torch.no_grad()
    def on_after_task_end(self, trainer, pl_module, task):
        evaluation = next(c for c in trainer.callbacks if isinstance(c, scl.ContinualEvaluation))
        training, data, classes = pl_module.training, trainer.datamodule, trainer.datamodule.num_classes
        pl_module.eval()
        for t, test in enumerate(data.test_sets):
            labels = pl_module(data.prepare(test.inputs, augment=False))[:, :classes].argmax(1)
            accuracy = float((labels == test.labels).float().mean())
            assert evaluation.matrices["class_il"].R[task, t] == pytest.approx(accuracy), (task, t)
        pl_module.train(training)


def learnt(inference, tasks=3, epochs=3, data=None, seen=AsTested, **options):
    torch.manual_seed(0)
    growth = scl.SET(0.6, interval=3, dense=["head.weight"])
    module = scl.ContinualDST(scl.SmallCNN(8), growth=growth, subnetworks=scl.TaskSubnetworks(inference=inference))
    evaluation, data = scl.ContinualEvaluation(), toy_tasks(num_tasks=tasks) if data is None else data
    run = trainer(evaluation, seen(), epochs=epochs, **options)
    run.fit(module, data)
    return module, data, evaluation, run


def by_hand(module, x, rule):
    """The class of each sample: the best of the task with the best score."""
    networks, labels = scl.Subnetworks.of(module), []
    for image in x.split(1):
        scores = []
        for t, task in enumerate(networks.tasks):
            logits = networks.network(t)(image)[0].double()
            if rule is scl.LowestEntropy:
                p = logits.exp() / logits.exp().sum()
                score = float((p * p.log()).sum()) / math.log(len(logits))
            else:
                score = float(logits.max())
                if rule is scl.CalibratedLogit:
                    mean, deviation = task.calibration["CalibratedLogit"]
                    score = (score - mean) / deviation
            scores.append((score, task.classes[int(logits.argmax())]))
        labels.append(max(scores)[1])
    return torch.tensor(labels)


def test_evaluation_test_and_prediction_agree_where_tasks_are_told_together(tmp_path):
    module, data, evaluation, run = learnt(scl.EntropyGradient())
    tested = run.test(module, data, verbose=False)[0]
    for t, test in enumerate(data.test_sets):
        found = torch.tensor([data.class_names.index(p.name) for p in module.predict_images(test.inputs)])
        accuracy = float((found == test.labels).float().mean())
        assert evaluation.matrices["class_il"].R[-1, t] == pytest.approx(accuracy)
        assert tested[f"class_il/task_{t}"] == pytest.approx(accuracy)


@pytest.mark.parametrize("rule", RULES)
def test_the_class_is_the_best_of_the_best_task(rule, tmp_path):
    module, data, evaluation, run = learnt(rule())
    module.eval()
    hits = []
    for t, test in enumerate(data.test_sets):
        x = data.prepare(test.inputs, augment=False)
        labels = by_hand(module, x, rule)
        assert torch.equal(module(x).argmax(1), labels)
        hits.append(float((labels == test.labels).float().mean()))
        assert evaluation.matrices["class_il"].R[-1, t] == pytest.approx(hits[-1])
        named = [found.name for found in module.predict_images(test.inputs)]
        assert named == [data.class_names[label] for label in labels.tolist()]
    assert evaluation.matrices["task_il"].summary()["bwt"] == 0
    run.save_checkpoint(tmp_path / "run.ckpt")
    loaded = scl.ContinualDST.load_from_checkpoint(tmp_path / "run.ckpt").eval()
    assert type(scl.Subnetworks.of(loaded).inference) is rule
    assert torch.equal(loaded(x).argmax(1), labels)
    assert torch.equal(copy.deepcopy(module)(x).argmax(1), labels)


def uneven(*sizes):
    """Tasks of so many classes."""
    of_all, bounds = toy_tasks(num_tasks=3), [0, *accumulate(sizes)]
    parts = [[torch.cat(p) for p in zip(*((d.inputs, d.labels) for d in sets))] for sets in of_all.load()]
    tasks = [list(range(a, b)) for a, b in pairwise(bounds)]
    return scl.SplitTensors(*parts, tasks=tasks, batch_size=16)


@pytest.mark.parametrize("rule", RULES)
def test_tasks_of_different_numbers_of_classes(rule):
    module, data, _, _ = learnt(rule(), data=uneven(4, 2))
    module.eval()
    for test in data.test_sets:
        x = data.prepare(test.inputs, augment=False)
        assert torch.equal(module(x).argmax(1), by_hand(module, x, rule))


def test_a_task_of_one_class_has_no_entropy():
    with pytest.raises(ValueError, match=r"inference=LowestEntropy\(\)\): task 1 has 1 class, .* use LargestLogit"):
        learnt(scl.LowestEntropy(), data=uneven(5, 1))
    learnt(scl.CalibratedLogit(), data=uneven(5, 1))


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_in_any_precision_one_task_answers(precision):
    module, data, _, _ = learnt(scl.LowestEntropy(), precision=precision, seen=pl.Callback)
    x = data.prepare(data.test_sets[0].inputs, augment=False).to(next(module.parameters()).dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        logits = module.eval()(x)
    assert (logits.isfinite().sum(1) == 2).all() and logits.dtype != torch.bfloat16


def test_calibration_is_of_the_tasks_own_training_samples():
    module, data, _, _ = learnt(scl.CalibratedLogit())
    networks = scl.Subnetworks.of(module)
    for t, task in enumerate(networks.tasks):
        x = data.prepare(data.train_sets[t].inputs, augment=False)
        largest = networks.network(t)(x).amax(1)
        expected = float(largest.mean()), float(largest.std(correction=0))
        assert task.calibration["CalibratedLogit"] == pytest.approx(expected, rel=1e-4)


def test_a_test_may_take_another_rule_than_the_training():
    module, data, _, _ = learnt(scl.LargestLogit())
    module.policies[0].inference = scl.LowestEntropy()
    (metrics,) = trainer(scl.ContinualEvaluation()).test(module, data, verbose=False)[:1]
    x = torch.cat([data.prepare(s.inputs, augment=False) for s in data.test_sets])
    right = by_hand(module, x, scl.LowestEntropy) == torch.cat([s.labels for s in data.test_sets])
    assert metrics["class_il/acc"] == pytest.approx(float(right.float().mean()))
    module.policies[0].inference = scl.CalibratedLogit()
    with pytest.raises(ValueError, match=r"CalibratedLogit: tasks were learnt without it.*take LowestEntropy"):
        trainer(scl.ContinualEvaluation()).test(module, data, verbose=False)


def test_only_the_inferred_tasks_classes_are_answered():
    module, data, _, _ = learnt(scl.LowestEntropy())
    logits = module.eval()(data.prepare(data.test_sets[0].inputs, augment=False))
    assert (logits.isfinite().sum(1) == 2).all()  # each task has two
    torch.testing.assert_close(logits.softmax(1).sum(1), torch.ones(len(logits)))


def test_one_task_is_none_to_infer_and_a_file_of_all_tasks_infers_none():
    with pytest.raises(ValueError, match=r"inference=LowestEntropy\(\)\): the data have one task"):
        learnt(scl.LowestEntropy(), tasks=1)
    module, _, _, _ = learnt(scl.LowestEntropy(), tasks=2)
    with pytest.raises(ValueError, match="inferred by LowestEntropy, which a file of all subnetworks cannot do"):
        scl.export_model(module, "all.pt2")

    class Silent(scl.TaskInference):
        pass

    class Wrong(scl.TaskInference):
        def score(self, answer):
            return answer

    with pytest.raises(ValueError, match=r"Wrong.score\(\) gives \(3, 2\): one number per sample, \(3,\), is needed"):
        Wrong().comparable(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"inference='LowestEntropy'\): a TaskInference, such as LowestEntropy\(\)"):
        scl.TaskSubnetworks(inference="LowestEntropy")
    with pytest.raises(NotImplementedError, match=r"Silent does not say how tasks are compared: override score\(\)"):
        Silent().comparable(torch.zeros(1, 2))
