"""Counts on packed masks are those of the masks themselves; running sums follow the subnetworks."""

import pytest
import torch

import lightning_sparse_cl as scl
from lightning_sparse_cl.demos import PlainClassifier
from lightning_sparse_cl.sparsity import sharing
from lightning_sparse_cl.sparsity.bits import digest, pack


@pytest.mark.parametrize("entries", [2**22, 100])
@pytest.mark.parametrize("shape", [(3, 5), (17, 4, 3, 3), (1,)])
def test_counts_are_those_of_the_masks(shape, entries, monkeypatch):
    monkeypatch.setattr(sharing, "ENTRIES", entries)
    masks = torch.rand(5, *shape, generator=torch.Generator().manual_seed(0)) < 0.4
    found = sharing.sharing([pack(m) for m in masks])
    assert found.both.tolist() == [[int((a & b).sum()) for b in masks] for a in masks]
    assert found.used.tolist() == [int(masks[: i + 1].any(0).sum()) for i in range(5)]


def test_what_is_used_follows_the_tasks():
    module, name = PlainClassifier(4), "net.0.weight"
    learnt = scl.Subnetworks.of(module)
    masks = torch.rand(4, *module.net[0].weight.shape, generator=torch.Generator().manual_seed(0)) < 0.3

    def check():
        for tasks in (2, 4, 1, None, 0):
            expected = [learnt.mask(t, name) for t in range(len(learnt))][:tasks]
            union = torch.stack(expected).any(0) if expected else torch.zeros_like(masks[0])
            assert torch.equal(learnt.used(name, tasks), union)

    for mask in masks:
        learnt.add([0, 1], {name: mask}, [])
        check()
    learnt.used(name).fill_(True)  # the caller's own
    check()
    learnt.tasks[1] = learnt.tasks[1]._replace(masks={name: pack(~masks[1])})
    check()
    del learnt.tasks[2:]
    check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_a_digest_tells_what_has_changed(dtype):
    before = torch.tensor([[0, 1, 0], [1, 1, 0]]).to(dtype)
    swapped = before.clone()
    swapped[0, 0], swapped[0, 1] = 1, 0
    other = before.clone()
    other[1, 2] = 1
    assert torch.equal(digest(before), digest(before.clone().T.contiguous().T))
    assert not torch.equal(digest(before), digest(swapped)) and not torch.equal(digest(before), digest(other))
    assert digest(before[0, 0]).shape == (2,)
