"""A fixture for tests that need the compiled kernels: they are skipped where there is no compiler."""

import pytest

from lightning_sparse_cl.kernels import KernelsUnavailable
from lightning_sparse_cl.kernels.build import library


@pytest.fixture(autouse=True, scope="session")
def compiled_kernels():
    try:
        return library()
    except KernelsUnavailable as error:
        if "no C++ compiler" not in str(error):  # there is one, and it does not take our source
            raise
        pytest.skip(str(error))
