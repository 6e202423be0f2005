"""Methods: one paper per file, each a composition of an objective, an update rule, an optimiser and policies."""

from lightning_sparse_cl.methods.base import ContinualModule
from lightning_sparse_cl.methods.cl_lsg import CLLSG
from lightning_sparse_cl.methods.continual_dst import ContinualDST
from lightning_sparse_cl.methods.cpg import CPG
from lightning_sparse_cl.methods.esacl import EsaCL
from lightning_sparse_cl.methods.isolation import IsolatingModule
from lightning_sparse_cl.methods.lps import LPS
from lightning_sparse_cl.methods.nispa import NISPA
from lightning_sparse_cl.methods.packnet import PackNet
from lightning_sparse_cl.methods.piggyback import Piggyback
from lightning_sparse_cl.methods.predicting import Prediction
from lightning_sparse_cl.methods.scored import ScoredModule
from lightning_sparse_cl.methods.sparcl import SparCL
from lightning_sparse_cl.methods.supsup import SupSup
from lightning_sparse_cl.methods.wsn import WSN

__all__ = [
    "CLLSG",
    "CPG",
    "LPS",
    "NISPA",
    "WSN",
    "ContinualDST",
    "ContinualModule",
    "EsaCL",
    "IsolatingModule",
    "PackNet",
    "Piggyback",
    "Prediction",
    "ScoredModule",
    "SparCL",
    "SupSup",
]
