"""Trained modules for use elsewhere: files of them, and what each way to run them costs."""

from lightning_sparse_cl.deploy.export import export_model
from lightning_sparse_cl.deploy.profiling import profile_model

__all__ = ["export_model", "profile_model"]
