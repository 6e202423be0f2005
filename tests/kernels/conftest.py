"""Kernels are tested where they can be compiled."""

from compiled_kernels import compiled_kernels  # noqa: F401
