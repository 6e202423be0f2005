"""torch_geometric: its linear layers are its own, and a batch is a graph."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from foreign.case import BATCH, BATCHES, Case
from torch import Tensor


class GraphClassifier(pl.LightningModule):
    """Two graph convolutions, the mean over the nodes, and torch_geometric's own linear layers."""

    def __init__(self) -> None:
        super().__init__()
        from torch_geometric.nn import GCNConv, Linear

        self.first, self.second = GCNConv(8, 32), GCNConv(32, 32)
        self.hidden, self.head = Linear(32, 32), Linear(32, 3)

    def forward(self, graphs: Any) -> Tensor:
        from torch_geometric.nn import global_mean_pool

        x = self.first(graphs.x, graphs.edge_index).relu()
        x = self.second(x, graphs.edge_index).relu()
        return self.head(self.hidden(global_mean_pool(x, graphs.batch)).relu())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = torch.nn.functional.cross_entropy(self(batch), batch.y)
        self.log("train_loss", loss, batch_size=batch.num_graphs)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def _build():
    geometric = pytest.importorskip("torch_geometric")
    edges = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]])
    graphs = [
        geometric.data.Data(x=torch.randn(6, 8), edge_index=edges, y=torch.tensor([i % 3]))
        for i in range(BATCH * BATCHES)
    ]
    return GraphClassifier(), geometric.loader.DataLoader(graphs, batch_size=BATCH, shuffle=True)


CASES = [Case("torch_geometric GCN", "torch_geometric", _build)]
