"""Labels that are names: of items, and of tensors."""

import numpy as np
import pytest
import torch

import lightning_sparse_cl as scl


def items(*names, each=4):
    image = torch.zeros(1, 8, 8, dtype=torch.uint8)
    return [(image, name) for name in names for _ in range(each)]


@pytest.mark.parametrize("in_memory", [True, False])
def test_names_of_items_are_classes(in_memory):
    sets = [items("zebra", "cat"), items("ant")]
    data = scl.TaskDatasets(sets, sets, in_memory=in_memory, batch_size=2)
    data.setup()
    assert data.class_names == ["ant", "cat", "zebra"] and data.classes == [[1, 2], [0]]
    assert data.train_sets[0][0][1] == 2


@pytest.mark.parametrize("kind", [list, np.array, lambda names: np.array(names, dtype=object)])
def test_names_of_tensors_are_classes(kind):
    images, names = torch.zeros(8, 1, 8, 8, dtype=torch.uint8), kind(["dog", "cat"] * 4)
    data = scl.SplitTensors((images, names), (images, names), tasks=[["dog"], ["cat"]], batch_size=2)
    data.setup()
    assert data.names_of_tasks() == [["dog"], ["cat"]]
    with pytest.raises(ValueError, match=r"TensorSource\(test=...\): no training sample has the label 'cow'"):
        scl.SplitTensors((images, names), (images, ["cow"] * 8), num_tasks=1)
