"""Lightning callbacks around the gradient. Each works on its own, even on modules that know nothing of this package."""

from lightning_sparse_cl.callbacks.acceleration import SparseAcceleration
from lightning_sparse_cl.callbacks.agem import AGEM
from lightning_sparse_cl.callbacks.anytime import AnytimeAccuracy
from lightning_sparse_cl.callbacks.capacity import ModelCapacity
from lightning_sparse_cl.callbacks.checkpoint import SequenceCheckpoint
from lightning_sparse_cl.callbacks.clipping import GradientClipping
from lightning_sparse_cl.callbacks.compact_pick_grow import CompactPickGrow
from lightning_sparse_cl.callbacks.data_removal import DynamicDataRemoval
from lightning_sparse_cl.callbacks.drop_grow import SET, DropAndGrow, RigL
from lightning_sparse_cl.callbacks.dynamic_masking import TaskAwareDynamicMasking
from lightning_sparse_cl.callbacks.early_stopping import TaskEarlyStopping
from lightning_sparse_cl.callbacks.evaluation import ContinualEvaluation
from lightning_sparse_cl.callbacks.finite import FiniteLoss
from lightning_sparse_cl.callbacks.flops import FlopsCounter
from lightning_sparse_cl.callbacks.footprint import MemoryFootprint
from lightning_sparse_cl.callbacks.freezing import FreezeMasks
from lightning_sparse_cl.callbacks.gpm import GPM
from lightning_sparse_cl.callbacks.gradient_masking import DynamicGradientMasking
from lightning_sparse_cl.callbacks.gradual_pruning import GradualPruning
from lightning_sparse_cl.callbacks.growth_rules import SNFS, AdaptiveGrowth, MomentumGrowth, UnfiredGrowth
from lightning_sparse_cl.callbacks.launchers import join_after_restart
from lightning_sparse_cl.callbacks.lr_schedule import TaskLRSchedule
from lightning_sparse_cl.callbacks.progress import TaskProgressBar
from lightning_sparse_cl.callbacks.pruning import OneShotPruning, Reopen
from lightning_sparse_cl.callbacks.report import RunReport
from lightning_sparse_cl.callbacks.schedule import TaskSchedule, position
from lightning_sparse_cl.callbacks.score_pruning import ScorePruning
from lightning_sparse_cl.callbacks.snip import SNIP
from lightning_sparse_cl.callbacks.sparse_growth import SparseGrowth
from lightning_sparse_cl.callbacks.sparsifier import Sparsifier
from lightning_sparse_cl.callbacks.stable_units import StableUnits
from lightning_sparse_cl.callbacks.state import RandomState
from lightning_sparse_cl.callbacks.subnetworks import FromScratch, TaskSubnetworks
from lightning_sparse_cl.callbacks.task_callback import TaskCallback

__all__ = [
    "AGEM",
    "GPM",
    "SET",
    "SNFS",
    "SNIP",
    "AdaptiveGrowth",
    "AnytimeAccuracy",
    "CompactPickGrow",
    "ContinualEvaluation",
    "DropAndGrow",
    "DynamicDataRemoval",
    "DynamicGradientMasking",
    "FiniteLoss",
    "FlopsCounter",
    "FreezeMasks",
    "FromScratch",
    "GradientClipping",
    "GradualPruning",
    "MemoryFootprint",
    "ModelCapacity",
    "MomentumGrowth",
    "OneShotPruning",
    "RandomState",
    "Reopen",
    "RigL",
    "RunReport",
    "ScorePruning",
    "SequenceCheckpoint",
    "SparseAcceleration",
    "SparseGrowth",
    "Sparsifier",
    "StableUnits",
    "TaskAwareDynamicMasking",
    "TaskCallback",
    "TaskEarlyStopping",
    "TaskLRSchedule",
    "TaskProgressBar",
    "TaskSchedule",
    "TaskSubnetworks",
    "UnfiredGrowth",
    "join_after_restart",
    "position",
]
