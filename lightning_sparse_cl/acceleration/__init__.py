"""Swaps the sparse kernels into networks and out again. Nothing here imports Lightning."""

from lightning_sparse_cl.acceleration.network import Acceleration, accelerate, densify

__all__ = ["Acceleration", "accelerate", "densify"]
