"""Which task a sample belongs to: rules against formulas; evaluation, test and prediction answer the same."""

import copy
import math

import pytest
import torch
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.demos import toy_tasks

RULES = [scl.LargestLogit, scl.LowestEntropy, scl.CalibratedLogit]


def learnt(inference, tasks=3, epochs=3, **options):
    torch.manual_seed(0)
    growth = scl.SET(0.6, interval=3, dense=["head.weight"])
    module = scl.ContinualDST(scl.SmallCNN(8), growth=growth, subnetworks=scl.TaskSubnetworks(inference=inference))
    evaluation, data = scl.ContinualEvaluation(), toy_tasks(num_tasks=tasks)
    run = trainer(evaluation, epochs=epochs, **options)
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
                    mean, deviation = task.calibration
                    score = (score - mean) / deviation
            scores.append((score, task.classes[int(logits.argmax())]))
        labels.append(max(scores)[1])
    return torch.tensor(labels)


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


def test_calibration_is_of_the_tasks_own_training_samples():
    module, data, _, _ = learnt(scl.CalibratedLogit())
    networks = scl.Subnetworks.of(module)
    for t, task in enumerate(networks.tasks):
        x = data.prepare(data.train_sets[t].inputs, augment=False)
        largest = networks.network(t)(x).amax(1)
        assert task.calibration == pytest.approx((float(largest.mean()), float(largest.std())), rel=1e-4)


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
    with pytest.raises(ValueError, match="told by LowestEntropy, which a file of all subnetworks does not do"):
        scl.export_model(module, "all.pt2")

    class Silent(scl.TaskInference):
        pass

    with pytest.raises(NotImplementedError, match=r"Silent does not say how tasks are compared: override score\(\)"):
        Silent().comparable(torch.zeros(1, 2))
