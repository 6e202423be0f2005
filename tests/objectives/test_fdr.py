"""FDR's distance against its formula, exemplar by exemplar."""

import pytest
import torch
from small_network import Data, Net, images, learnt

import lightning_sparse_cl as scl


def test_fdr_measures_how_far_the_function_has_moved():
    fdr = scl.FDR(memory=6, replay_batch_size=4, alpha=0.7)
    model = learnt(fdr, [0, 1] * 8, [2, 1] * 8)
    held = fdr.memory.contents()
    assert held.tasks.tolist() == [0, 0, 0, 1, 1, 1]
    data, before = Data(images(1), torch.tensor([0])), Net().eval()
    torch.testing.assert_close(held.logits, before(data.prepare(held.inputs)))
    (drawn,) = fdr.draw(data.prepare)
    z = model(drawn.inputs)
    moved = [float(((a.softmax(0) - b.softmax(0)) ** 2).sum() ** 0.5) for a, b in zip(z, drawn.logits)]
    assert fdr.replay_losses([z], [drawn])[0].tolist() == pytest.approx([0.7 * each for each in moved], rel=1e-5)
    (same,) = fdr.replay_losses([before(drawn.inputs)], [drawn])
    assert same.max() < 1e-6
