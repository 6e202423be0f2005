"""A fixture for tests that need the compiled kernels: they are skipped where there is no compiler."""

import pytest

from lightning_sparse_cl.kernels import KernelsUnavailable
from lightning_sparse_cl.kernels.build import library


@pytest.fixture(autouse=True, scope="session")
def compiled_kernels():
    try:
        return library()
    except KernelsUnavailable as error:
        pytest.skip(str(error))
