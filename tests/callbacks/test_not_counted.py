"""What cannot be counted is said, and not taken for nothing."""

import lightning.pytorch as pl
import pytest
import torch

from lightning_sparse_cl.callbacks.flops import dense_cost


class Fed(pl.LightningModule):
    pass


@pytest.mark.parametrize("batch", [{"x": torch.ones(2, 3)}, ((torch.ones(2, 3),), torch.ones(2))])
def test_batches_that_do_not_begin_with_a_tensor_are_said_not_to_be_counted(batch):
    with pytest.warns(UserWarning, match=f"Fed: .* not counted, for a batch, a {type(batch).__name__}, does not begin"):
        assert dense_cost(Fed(), batch) is None
