"""A trained network in one call of C++: its layers as a list, the file of them, and the program that runs them."""

from lightning_sparse_cl.runtime.flat import FlatNetwork
from lightning_sparse_cl.runtime.source_files import write_runtime

__all__ = ["FlatNetwork", "write_runtime"]
