"""Trained sparse networks for use elsewhere: one C++ call for a whole network."""

from lightning_sparse_cl.deploy.export import export_model, write_runtime
from lightning_sparse_cl.deploy.flat import FlatNetwork
from lightning_sparse_cl.deploy.profiling import profile_model

__all__ = ["FlatNetwork", "export_model", "profile_model", "write_runtime"]
