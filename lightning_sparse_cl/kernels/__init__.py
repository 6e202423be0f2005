"""Sparse kernels for CPUs: masked networks that are really faster. Nothing here imports Lightning."""

from lightning_sparse_cl.kernels.acceleration import Acceleration, accelerate, densify
from lightning_sparse_cl.kernels.build import KernelsUnavailable
from lightning_sparse_cl.kernels.ops import sparse_conv2d

__all__ = ["Acceleration", "KernelsUnavailable", "accelerate", "densify", "sparse_conv2d"]
