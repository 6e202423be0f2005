"""What holds of all objectives: zero coefficients, precisions, and errors that name what is wrong."""

import copy
from functools import partial

import pytest
import torch
from small_network import learnt
from torch.optim.lr_scheduler import LambdaLR
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.demos import toy_tasks


def fitted(objective, **kwargs):
    torch.manual_seed(0)
    model = scl.ContinualModule(scl.SmallCNN(4), objective, **kwargs)
    trainer(scl.ContinualEvaluation(), epochs=2).fit(model, toy_tasks())
    return torch.cat([p.detach().reshape(-1) for p in model.network.parameters()])


def test_a_zero_coefficient_or_fisher_is_fine_tuning_bit_for_bit(monkeypatch):
    finetuned = fitted(scl.CrossEntropy())
    assert torch.equal(fitted(scl.EWC(alpha=0.0)), finetuned)
    assert torch.equal(fitted(scl.LwF(alpha=0.0, warmup=False)), finetuned)
    assert not torch.equal(fitted(scl.EWC(alpha=1e4)), finetuned)
    monkeypatch.setattr("lightning_sparse_cl.objectives.ewc.fisher", lambda *_: torch.zeros(()))
    assert torch.equal(fitted(scl.EWC(alpha=1e4)), finetuned)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize(
    "objective", [scl.ICaRL(30, 8), scl.CO2L(30, 8, dim=8), scl.EWC()],
    ids=lambda o: type(o).__name__,
)  # fmt: skip
def test_any_precision(objective, precision):
    torch.manual_seed(0)
    evaluation = scl.ContinualEvaluation()
    model = scl.ContinualModule(scl.SmallCNN(8), copy.deepcopy(objective))
    trainer(evaluation, epochs=3, precision=precision).fit(model, toy_tasks())
    assert evaluation.matrices["task_il"].R[-1, -1] > 0.7


def test_a_bound_binds_sgd_only():
    for optimizer in (lambda p: torch.optim.Adam(p, 1e-3), lambda p: torch.optim.SGD(p, 1e-13)):
        assert fitted(scl.EWC(bound=1e12), optimizer=optimizer).isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scl.EWC(alpha=-1.0), r"EWC\(alpha=-1.0\): a loss coefficient is >= 0"),
        (lambda: scl.EWC(alpha=float("inf")), r"EWC\(alpha=inf\): .* finite"),
        (lambda: scl.EWC(gamma=1.5), r"EWC\(gamma=1.5\).*in \[0, 1\]"),
        (lambda: scl.EWC(samples=0), r"EWC\(samples=0\)"),
        (lambda: scl.EWC(bound=0.0), r"EWC\(bound=0.0\): bound is > 0"),
        (lambda: fitted(scl.EWC(bound=1e12)), r"EWC\(bound=1e\+12\): SGD's .* learning rate, 0.03, .* at most 33.3"),
        (
            lambda: fitted(scl.EWC(bound=40), policies=[scl.TaskLRSchedule(partial(LambdaLR, lr_lambda=lambda e: e))]),
            "learning rate, 0.03, is above 1",
        ),
        (lambda: scl.ER(forward="together"), r"ER\(forward='together'\): 'separate' or 'joint'"),
        (lambda: scl.FDR(forward=None), r"FDR\(forward=None\): 'separate' or 'joint'"),
        (lambda: scl.ICaRL(over="new"), r"ICaRL\(over='new'\).*'seen' or 'all'"),
        (lambda: scl.LwF(temperature=0.0), r"LwF\(temperature=0.0\): temperature is > 0"),
        (lambda: scl.LwF(alpha=-3.0), r"LwF\(alpha=-3.0\)"),
        (lambda: scl.FDR(alpha=-0.1), r"FDR\(alpha=-0.1\)"),
        (lambda: scl.DER(alpha=float("nan")), r"DER\(alpha=nan\)"),
        (lambda: scl.CO2L(student_temperature=-1.0), r"CO2L\(student_temperature=-1.0\)"),
        (lambda: learnt(scl.ICaRL(memory=2), [0, 1]), r"ICaRL\(memory=2\): at least one exemplar per class.* 3; "),
        (lambda: learnt(scl.CO2L(memory=2), [0, 1]), r"CO2L\(memory=2\): at least one exemplar per class"),
        (lambda: learnt(scl.FDR(memory=1), [0, 1]), r"FDR\(memory=1\): at least one exemplar per task.*there are 2;"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
