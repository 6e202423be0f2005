"""Sparse continual learning in PyTorch Lightning."""

from lightning_sparse_cl.acceleration import accelerate, densify
from lightning_sparse_cl.backbones import VGG16, LeNet5, MobileNetV2, ResNet18, SmallCNN, SmallMLP
from lightning_sparse_cl.callbacks import (
    AGEM,
    GPM,
    SET,
    SNFS,
    SNIP,
    AdaptiveGrowth,
    ContinualEvaluation,
    DropAndGrow,
    DynamicDataRemoval,
    DynamicGradientMasking,
    FiniteLoss,
    FlopsCounter,
    FreezeMasks,
    FromScratch,
    GradientClipping,
    MemoryFootprint,
    ModelCapacity,
    MomentumGrowth,
    OneShotPruning,
    RandomState,
    Reopen,
    RigL,
    RunReport,
    SequenceCheckpoint,
    SparseAcceleration,
    SparseGrowth,
    Sparsifier,
    TaskAwareDynamicMasking,
    TaskEarlyStopping,
    TaskLRSchedule,
    TaskProgressBar,
    TaskSchedule,
    TaskSubnetworks,
    UnfiredGrowth,
)
from lightning_sparse_cl.data import *  # noqa: F403  # all that its __all__ names
from lightning_sparse_cl.methods import CLLSG, ContinualDST, ContinualModule, EsaCL, IsolatingModule, SparCL
from lightning_sparse_cl.metrics import AccuracyMatrix
from lightning_sparse_cl.objectives import (
    CO2L,
    DER,
    ER,
    EWC,
    FDR,
    BalancedMemory,
    CrossEntropy,
    DERpp,
    DERppOneDraw,
    ICaRL,
    LwF,
    Objective,
    ReservoirMemory,
)
from lightning_sparse_cl.optim import (
    KSparsePolytope,
    LaMAML,
    LossSelection,
    Plain,
    SharpnessAware,
    StochasticFrankWolfe,
    UpdateRule,
)
from lightning_sparse_cl.sparsity import (
    GrowthGates,
    Masks,
    Subnetworks,
    compact,
    export_network,
    load_sparse,
    save_sparse,
)

__version__ = "0.1.0"
