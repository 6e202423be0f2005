"""Threads that use torch, also in a process that was forked."""

import torch
from forked import forked

from lightning_sparse_cl.thread_pool import thread_pool


def in_threads() -> None:
    with thread_pool(8) as pool:
        assert [len(found) for found in pool.map(torch.arange, range(100, 200))] == list(range(100, 200))


def test_threads_of_a_forked_process_may_use_torch() -> None:
    """Without the care that is taken there, about one in thirty fails."""
    assert not any(forked(in_threads) for _ in range(60))
