"""Threads that use torch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch


def thread_pool(threads: int | None = None) -> ThreadPoolExecutor:
    """A pool whose threads may use torch, also in a process that was forked.

    After a fork torch makes its own threads anew when a thread first needs them, and fails if two need them at once
    ("Invalid thread pool!"). So torch has to make them before there are several threads.

    Args:
        threads: number of threads. If None, a few more than there are cores.
    """
    torch.set_num_threads(torch.get_num_threads())
    return ThreadPoolExecutor(threads)
