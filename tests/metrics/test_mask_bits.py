"""Bits of masks against closed forms."""

import math

import pytest
import torch

from lightning_sparse_cl.metrics import mask_bits
from lightning_sparse_cl.metrics.mask_bits import huffman_bits


def independent(density, tasks, n=400_000):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(n, generator=generator) < density for _ in range(tasks)]


@pytest.mark.parametrize(("density", "coded"), [(0.03, 0.237), (0.05, 0.304), (0.1, 0.474), (0.3, 0.884), (0.5, 1.0)])
def test_seven_independent_masks(density, coded):
    bits = mask_bits(independent(density, 7))
    entropy = -density * math.log2(density) - (1 - density) * math.log2(1 - density)
    assert bits["entropy"] / 7 == pytest.approx(entropy, abs=2e-3)
    assert bits["coded"] / 7 == pytest.approx(coded, abs=3e-3)
    assert bits["entropy"] <= bits["coded"] <= min(7, bits["entropy"] + 1) and bits["plain"] == 7


def test_masks_that_are_the_same_cost_once_and_many_are_taken_in_groups():
    (mask,) = independent(0.5, 1)
    assert mask_bits([mask] * 5)["coded"] == pytest.approx(1, abs=1e-4)
    assert mask_bits([mask] * 40)["entropy"] == pytest.approx(2, abs=1e-4)  # 32, and 8
    assert mask_bits(iter([mask.view(2, -1)] * 3))["plain"] == 3
    assert mask_bits([]) == {"plain": 0, "entropy": 0, "coded": 0}


def test_of_few_weights_the_table_is_counted_and_nothing_takes_more_than_the_masks_themselves():
    bits = mask_bits(independent(0.5, 20, n=2304))
    assert bits["coded"] == bits["plain"] == 20
    few = mask_bits([torch.tensor([True, False, True, True])] * 3)
    assert few["coded"] == 3


def test_a_huffman_code_by_hand():
    assert huffman_bits([1, 1, 2, 4]) == 1 * 3 + 1 * 3 + 2 * 2 + 4 * 1
    assert huffman_bits([8]) == 8 and huffman_bits([]) == 0
