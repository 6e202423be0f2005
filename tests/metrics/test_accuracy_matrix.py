"""Figures of the accuracy matrix, by hand."""

import pytest
import torch

from lightning_sparse_cl import AccuracyMatrix
from lightning_sparse_cl.metrics import average_accuracy, backward_transfer, forgetting, forward_transfer

R = torch.tensor([[0.9, 0.2, 0.1], [0.95, 0.8, 0.3], [0.6, 0.7, 0.7]])
b = torch.tensor([0.1, 0.15, 0.05])


def test_figures_of_a_three_task_matrix():
    assert average_accuracy(R).item() == pytest.approx((0.6 + 0.7 + 0.7) / 3)
    assert backward_transfer(R).item() == pytest.approx(((0.6 - 0.9) + (0.7 - 0.8)) / 2)
    assert forward_transfer(R, b).item() == pytest.approx(((0.2 - 0.15) + (0.3 - 0.05)) / 2)
    assert forgetting(R).item() == pytest.approx(((0.95 - 0.6) + (0.8 - 0.7)) / 2)


def test_rows_that_are_not_measured_yet_do_not_count():
    part = torch.cat([R[:2], torch.full((1, 3), torch.nan)])
    assert average_accuracy(part).item() == pytest.approx((0.95 + 0.8 + 0.3) / 3)
    assert backward_transfer(part).item() == pytest.approx(0.05)
    assert forward_transfer(part, b).item() == pytest.approx(0.05)
    assert forgetting(part).item() == pytest.approx(-0.05)


def test_joint_training_has_one_row_and_no_transfer():
    matrix = AccuracyMatrix(stages=1, tasks=3)
    matrix.R[0] = R[2]
    summary = matrix.summary()
    assert summary["acc"] == pytest.approx(2 / 3)
    assert summary["bwt"] is summary["fwt"] is summary["forgetting"] is None


def test_a_single_task_is_a_matrix_too():
    matrix = AccuracyMatrix(1)
    matrix.update(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]), task=0)
    matrix.close_row(None)
    matrix.update(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), task=0)
    matrix.close_row(0)
    assert matrix.summary()["matrix"] == [[1.0]] and matrix.summary()["baseline"] == [0.5]


def test_rows_count_hits_per_task():
    matrix = AccuracyMatrix(2)
    matrix.update(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1, 1]), task=0)
    matrix.update(torch.tensor([[1.0, 0.0]]), torch.tensor([1]), task=1)
    matrix.update(torch.tensor([[0.0, 1.0]]), torch.tensor([1]), task=1)
    matrix.close_row(1)
    matrix.update(torch.tensor([[0.0, 1.0]]), torch.tensor([1]), task=0)
    torch.testing.assert_close(matrix.close_row(None)[0], torch.tensor(1.0))
    torch.testing.assert_close(matrix.R[1], torch.tensor([2 / 3, 0.5]))
    assert matrix.R[0].isnan().all()
