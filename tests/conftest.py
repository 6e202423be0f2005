"""Fixtures shared by all tests."""

import logging
import warnings

import pytest
import torch


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    """Each test in a folder of its own, on one thread (small tensors), without Lightning's notices."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
