"""Reservoir memory: uniform, sequential semantics, exact state."""

import pytest
import torch

from lightning_sparse_cl import BalancedMemory, ReservoirMemory


def memory(size, seed=0, logits=None):
    m = ReservoirMemory(size)
    m.build(torch.empty(0, 1, 2, 2, dtype=torch.uint8), logits, seed)
    return m


def fill(m, total, batch, start=0):
    for first in range(start, total, batch):
        ids = torch.arange(first, min(first + batch, total))
        m.add((ids % 256).byte().view(-1, 1, 1, 1).expand(-1, 1, 2, 2), ids, task=0)


def test_every_sample_is_kept_with_equal_probability():
    kept = torch.zeros(60)
    for seed in range(2000):
        fill(m := memory(10, seed), 60, batch=7)
        kept[m.labels] += 1
    expected = 2000 * 10 / 60
    chi2 = ((kept - expected) ** 2 / (expected * (1 - 10 / 60))).sum()
    assert chi2 < 110  # 59 degrees of freedom: 99.99 % quantile


def test_fills_in_order_then_replaces_and_later_samples_win():
    fill(m := memory(8), 5, batch=5)
    assert len(m) == 5 and m.labels[:5].tolist() == [0, 1, 2, 3, 4]
    fill(m, 8, batch=3, start=5)
    assert m.labels.tolist() == list(range(8))
    slots, rows = m.slots(500)  # 500 candidates for 8 slots: many collide
    assert slots.unique().numel() == slots.numel()
    n = torch.arange(8, 508)
    drawn = (torch.rand(500, generator=generator_of(m), dtype=torch.float64) * (n + 1)).long()
    brute = {}
    for row, slot in enumerate(drawn.tolist()):
        if slot < 8:
            brute[slot] = row
    assert dict(zip(slots.tolist(), rows.tolist())) == brute


def generator_of(m):
    return torch.Generator().manual_seed((m.seed + m.seen * 0x9E3779B97F4A7C15) % 2**63)


def test_state_dict_carries_the_counter(tmp_path):
    fill(m := memory(10, seed=3), 35, batch=5)
    torch.save(m.state_dict(), tmp_path / "m.pt")
    resumed = memory(10, seed=99)
    resumed.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True))
    for one in (m, resumed):
        fill(one, 70, batch=5, start=35)
    assert resumed.seen == 70 and torch.equal(resumed.labels, m.labels) and torch.equal(resumed.inputs, m.inputs)


def test_draws_do_not_repeat_an_exemplar_and_carry_their_logits():
    m = memory(20, logits=3)
    ids = torch.arange(20)
    m.add(ids.byte().view(-1, 1, 1, 1).expand(-1, 1, 2, 2), ids, 1, logits=ids.float()[:, None].expand(-1, 3))
    drawn = m.draw(12)
    assert drawn.labels.unique().numel() == 12
    assert torch.equal(drawn.inputs[:, 0, 0, 0].long(), drawn.labels) and torch.equal(
        drawn.logits[:, 0].long(), drawn.labels
    )
    assert len(m.draw(50).labels) == 20
    assert m.inputs.dtype == torch.uint8 and (m.tasks == 1).all()


def test_size_must_be_positive():
    with pytest.raises(ValueError, match=r"ReservoirMemory\(size=0\)"):
        ReservoirMemory(0)


@pytest.mark.parametrize("by", ["class", "task"])
def test_a_balanced_memory_holds_the_first_of_each_group(by):
    """Against a slow count: M/G each, the rest one by one, and never more than there are; old ones lose their last."""
    m = BalancedMemory(11, by)
    m.build(torch.empty(0, 1, 1, 1, dtype=torch.long), None, 0)
    offered, preference = {}, 0
    for task, labels in enumerate([[0] * 9 + [1] * 2, [2] * 8, [0] * 3 + [3] * 6]):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(task))
        labels = torch.tensor(labels)[order]
        images = torch.arange(preference, preference + len(labels)).view(-1, 1, 1, 1)
        preference += len(labels)
        m.admit(images, labels, task)
        for i, c in zip(images.flatten().tolist(), labels.tolist()):
            offered.setdefault(c if by == "class" else task, []).append(i)
        share = [11 // len(offered) + (k < 11 % len(offered)) for k in range(len(offered))]
        offered = {g: offered[g][:n] for g, n in zip(sorted(offered), share)}
        held = m.contents()
        assert sorted(held.inputs.flatten().tolist()) == sorted(i for kept in offered.values() for i in kept)
        assert len(m) == len(held.labels) <= 11
    assert held.tasks.unique().tolist() == [0, 1, 2]
    other = BalancedMemory(11, by)
    other.build(torch.empty(0, 1, 1, 1, dtype=torch.long), None, 0)
    other.load_state_dict(m.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.contents(), held) if a is not None)
    with pytest.raises(ValueError, match=r"BalancedMemory\(memory=1\): at least one exemplar per .* there are"):
        BalancedMemory(1, by).room_for(2, m)
