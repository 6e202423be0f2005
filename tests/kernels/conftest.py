"""Kernels are tested where they can be compiled."""

import pytest

from lightning_sparse_cl.kernels import KernelsUnavailable
from lightning_sparse_cl.kernels.build import library


@pytest.fixture(autouse=True, scope="session")
def kernels():
    try:
        return library()
    except KernelsUnavailable as error:
        pytest.skip(str(error))
