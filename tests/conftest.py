"""Fixtures shared by all tests, and the order in which they are run."""

import contextlib
import fcntl
import logging
import warnings

import pytest
import torch

from lightning_sparse_cl.kernels import KernelsUnavailable, build


def pytest_collection_modifyitems(items):
    """Tests of the whole package first, for they take longest: two workers then end at the same time."""
    items.sort(key=lambda item: len(item.path.parents))


@pytest.fixture(autouse=True, scope="session")
def compiled():
    """The sparse kernels are there, compiled once: a second worker waits for the first."""
    with build.SOURCE.open() as lock, contextlib.suppress(KernelsUnavailable):
        fcntl.flock(lock, fcntl.LOCK_EX)
        build.library()


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    """Each test in a folder of its own, on one thread (small tensors), without Lightning's notices."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
