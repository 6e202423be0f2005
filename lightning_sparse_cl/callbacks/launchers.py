"""What started this process, SLURM or torchrun: how many processes it started, and how a job is queued again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import FrameType
from typing import NamedTuple

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn


class Launched(NamedTuple):
    """Processes that were started as one run."""

    by: str
    per_node: int
    nodes: int


def launched() -> Launched | None:
    """What started this process, and how many in all. None if it was neither SLURM nor torchrun."""
    env = os.environ
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        per_node = int(env["LOCAL_WORLD_SIZE"])
        return Launched("torchrun", per_node, int(env["WORLD_SIZE"]) // per_node)
    if SLURMEnvironment.detect():
        nodes = int(env.get("SLURM_NNODES") or 1)
        return Launched("SLURM", int(env["SLURM_NTASKS"]) // nodes, nodes)
    return None


def join_after_restart(device: torch.device) -> None:
    """Form the process group of a run that ``torchrun --max-restarts`` has started again.

    torchrun keeps one store for all its attempts, and PyTorch reads the addresses in it without asking which attempt
    they belong to: gloo then connects to a process that is dead ("connectFullMesh failed ... Connection refused"). Here
    each attempt has names of its own. This does nothing in the first attempt, and without torchrun. A script has to
    call it before ``trainer.fit``; the command line does so itself.

    Args:
        device: the device on which this process trains.
    """
    env = os.environ
    attempt = int(env.get("TORCHELASTIC_RESTART_COUNT") or 0)
    if not attempt or env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or torch.distributed.is_initialized():
        return
    world = int(env["WORLD_SIZE"])
    store = torch.distributed.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), world, is_master=False)
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=torch.distributed.PrefixStore(f"attempt_{attempt}", store),
        rank=int(env["RANK"]),
        world_size=world,
    )


def slurm_job() -> str | None:
    """The job's number, with the index in a job array, as ``scontrol`` takes it. None outside SLURM jobs."""
    if not SLURMEnvironment.detect():
        return None
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{index}" if array and index else os.environ.get("SLURM_JOB_ID")


def is_requeued() -> bool:
    """Whether SLURM runs this job again."""
    return slurm_job() is not None and int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0


def requeue() -> None:
    """Ask SLURM to run this job again. A refusal is a warning: what was saved stays."""
    job = slurm_job() or ""
    try:
        status = subprocess.call(["scontrol", "requeue", job])
    except OSError as error:
        status = error.errno or 1
    if status:
        rank_zero_warn(f"SLURM did not requeue job {job}: scontrol ended with status {status}; submit it again")
    else:
        rank_zero_info(f"SLURM runs job {job} again")


def requeue_before_training() -> None:
    """Until training begins, let SIGUSR1 in a SLURM job requeue it and leave: there is nothing to save yet."""
    if slurm_job() is not None:
        signal.signal(signal.SIGUSR1, _requeue_and_leave)


def no_requeue_before_training() -> None:
    """Undo :func:`requeue_before_training`."""
    if slurm_job() is not None and signal.getsignal(signal.SIGUSR1) is _requeue_and_leave:  # not every system has it
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def _requeue_and_leave(number: int, frame: FrameType | None) -> None:
    if int(os.environ.get("SLURM_PROCID") or 0) == 0:
        requeue()
    sys.exit(128 + number)
