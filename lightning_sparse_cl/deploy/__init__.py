"""Trained modules for use elsewhere: writes them to files, and measures what each way to run them costs."""

from lightning_sparse_cl.deploy.export import export_model
from lightning_sparse_cl.deploy.profiling import profile_model
from lightning_sparse_cl.deploy.semi_structured import to_semi_structured

__all__ = ["export_model", "profile_model", "to_semi_structured"]
