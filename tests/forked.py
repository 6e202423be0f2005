"""Copies of this process, which may be killed or train together: nothing is imported anew."""

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

from lightning.fabric.plugins.environments.lightning import find_free_network_port

FORK = multiprocessing.get_context("fork")


def forked(call: Callable[..., Any], *args: Any, processes: int = 1, timeout: float = 300) -> int:
    """Run ``call(*args)`` in a copy of this process, or in several that are one run of DDP.

    Args:
        call: what to run.
        args: its arguments.
        processes: number of copies.
        timeout: seconds until they are killed.

    Returns:
        The exit status of the first copy that failed, else 0; minus the signal's number where a signal ended it.
    """
    port = find_free_network_port()
    copies = [FORK.Process(target=_rank, args=(r, processes, port, call, args)) for r in range(processes)]
    for copy in copies:
        copy.start()
    for copy in copies:
        copy.join(timeout)
        copy.kill()
        copy.join()
        timeout = 20  # the others end with the first, or wait for it in vain
    return next((copy.exitcode for copy in copies if copy.exitcode), 0)


def _rank(rank: int, processes: int, port: int, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if processes > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    call(*args)
