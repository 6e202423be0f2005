"""Sparse arithmetic for CPUs: convolutions that multiply by the alive weights only. Plain torch and one C++ file."""

from lightning_sparse_cl.kernels.build import KernelsUnavailable
from lightning_sparse_cl.kernels.ops import sparse_conv2d

__all__ = ["KernelsUnavailable", "sparse_conv2d"]
