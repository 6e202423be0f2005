"""Class-balanced memory and exemplars per class: equal shares, uniform samples, exact state, no waiting."""

import copy

import pytest
import torch
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl.demos import toy_tasks
from lightning_sparse_cl.objectives.class_balanced import equal_shares


def memory(size, classes, per_class=None, seed=0):
    m = scl.ClassBalancedReservoir(size, per_class)
    m.room_for(classes, m)
    m.build(torch.empty(0, 1, 1, 1, dtype=torch.long), 2, seed)
    return m


def present(m, labels, batch, start=0):
    """Samples number ``start``, ... with these labels; images and logits tell their number. The lot of each."""
    lots = []
    for first in range(0, len(labels), batch):
        y = labels[first : first + batch]
        generator = torch.Generator().manual_seed((m.seed + m.seen * 0x9E3779B97F4A7C15) % 2**63)
        lots += torch.randint(2**40, (len(y),), generator=generator).tolist()
        ids = torch.arange(start + first, start + first + len(y))
        m.add(ids.view(-1, 1, 1, 1), y, int(ids[0]), logits=ids.float()[:, None].expand(-1, 2))
    return lots


STREAMS = {
    "in order": torch.arange(5).repeat_interleave(40),
    "one large, then small ones": torch.cat([torch.zeros(90), torch.tensor([1.0, 2, 2]), torch.full((60,), 4)]).long(),
    "small ones, then a large": torch.cat([torch.tensor([3.0, 1, 1]), torch.full((80,), 2), torch.arange(5)]).long(),
    "mixed and skewed": (torch.rand(300, generator=torch.Generator().manual_seed(0)) ** 3 * 5).long(),
}


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(
    ("size", "per_class", "batch"),
    [
        (13, None, 1),
        (13, None, 7),
        (8, None, 30),
        (400, None, 30),
        (None, 4, 1),
        (None, 4, 7),
        (None, 30, 30),
        (13, 4, 7),
    ],
)
def test_each_class_has_its_share_and_holds_those_of_the_lowest_lots(stream, size, per_class, batch):
    """Against a slow count, after every batch."""
    m, labels = memory(size, 5, per_class), STREAMS[stream]
    lots = []
    for first in range(0, len(labels), batch):
        lots += present(m, labels[first : first + batch], batch, first)
        offered = [sorted(i for i in range(len(lots)) if labels[i] == c) for c in range(5)]
        counts = m.counts.tolist()
        wanted = [min(len(ids), per_class or len(ids)) for ids in offered]
        assert sum(counts) == min(sum(wanted), m.size)
        for count, most in zip(counts, wanted):  # one less than the largest, or all there are
            assert count == most or max(counts) - 1 <= count < most
        kept = {i for c, ids in enumerate(offered) for i in sorted(ids, key=lambda i: lots[i])[: counts[c]]}
        held = m.contents()
        ids = held.inputs.flatten()
        assert set(ids.tolist()) == kept and len(m) == len(ids) == len(kept)
        assert torch.equal(held.labels, labels[ids]) and torch.equal(held.logits[:, 1].long(), ids)
        assert torch.equal(held.tasks, ids // batch * batch)


def test_shares_are_filled_one_by_one_from_the_lowest():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        classes, places, most = (int(torch.randint(1, high, (), generator=generator)) for high in (9, 40, 30))
        available = torch.randint(0, most, (classes,), generator=generator)
        shares = [0] * classes
        while sum(shares) < min(places, int(available.sum())):
            shares[min((s, c) for c, s in enumerate(shares) if s < available[c])[1]] += 1
        assert equal_shares(available, places).tolist() == shares


@pytest.mark.parametrize("per_class", [False, True])
def test_every_sample_of_a_class_is_kept_with_equal_probability(per_class):
    labels = torch.tensor([0] * 30 + [1] * 20 + [0] * 10 + [2] * 20)
    kept, trials = torch.zeros(len(labels)), 1000
    for seed in range(trials):
        m = memory(None, 3, 5, seed) if per_class else memory(15, 3, seed=seed)
        present(m, labels, batch=9)
        kept[m.contents().inputs.flatten()] += 1
    p = 5 / labels.bincount()[labels]
    chi2 = ((kept - trials * p) ** 2 / (trials * p * (1 - p))).sum()
    assert chi2 < 131  # below the 99.99 % quantile of 77 degrees of freedom


def state_of(m):
    return {k: v for k, v in m.state_dict().items() if isinstance(v, torch.Tensor)} | {"seen": m.seen}


@pytest.mark.parametrize("sizes", [(7, 5), (None, 5, 7), (20, 5, 7)])
def test_a_memory_that_is_saved_and_loaded_goes_on_with_the_same_bits(sizes, tmp_path):
    labels = STREAMS["mixed and skewed"]
    whole = memory(*sizes, seed=3)
    present(whole, labels[:64], 8)
    torch.save(whole.state_dict(), tmp_path / "memory.pt")
    resumed = memory(*sizes, seed=99)
    resumed.load_state_dict(torch.load(tmp_path / "memory.pt", weights_only=True))
    for m in (whole, resumed):
        present(m, labels[64:], 8, start=64)
    one, other = state_of(whole), state_of(resumed)
    assert one.keys() == other.keys() and all(
        torch.equal(torch.as_tensor(one[k]), torch.as_tensor(other[k])) for k in one
    )


@pytest.mark.parametrize("sizes", [(6, 3), (None, 3, 6), (6, 3, 6)])
def test_no_step_waits_for_the_device(sizes):
    """A device without values: code that asks for one fails."""
    m = memory(*sizes).to("meta")
    for _ in range(3):
        present_on_meta = torch.zeros(8, 1, 1, 1, dtype=torch.long, device="meta")
        m.add(present_on_meta, torch.zeros(8, dtype=torch.long, device="meta"), 0, torch.zeros(8, 2, device="meta"))
        assert m and m.draw(4, times=2).labels.shape == (8,)


def test_a_draw_repeats_exemplars_only_where_there_are_too_few():
    m = memory(None, 3, per_class=4)
    assert not m and len(m) == 0
    present(m, torch.zeros(10, dtype=torch.long), 10)
    assert sorted(m.draw(6).labels.tolist()) == [0] * 6
    assert m.draw(6).inputs.flatten().unique(return_counts=True)[1].sort().values.tolist() == [1, 1, 2, 2]
    present(m, torch.tensor([2] * 9), 9, start=10)
    for _ in range(20):
        assert m.draw(6).inputs.flatten().unique().numel() == 6
        assert set(m.draw(100).inputs.flatten().tolist()) == set(m.contents().inputs.flatten().tolist())


def fitted(objective):
    torch.manual_seed(0)
    model = scl.ContinualModule(scl.SmallCNN(4), copy.deepcopy(objective))
    trainer(epochs=2).fit(model, toy_tasks())
    return model


@pytest.mark.parametrize("kind", [scl.ER, scl.DER, scl.DERpp, scl.DERppOneDraw])
def test_options_of_the_replay_objectives(kind):
    plain = kind()
    assert type(plain.memory) is scl.ReservoirMemory and plain.memory.size == 500
    balanced = fitted(kind(20, 8, balanced=True)).objective.memory
    assert balanced.counts.tolist() == [4, 4, 3, 3, 3, 3] == balanced.contents().labels.bincount().tolist()
    per_class = fitted(kind(None, 8, per_class=3)).objective.memory
    assert per_class.counts.tolist() == [3] * 6 == per_class.contents().labels.bincount().tolist()
    assert per_class.size == 18
    both = fitted(kind(20, 8, per_class=3)).objective.memory
    assert (both.size, both.counts.tolist()) == (18, [3] * 6)


def test_draws_of_the_reservoir_are_those_of_a_permutation():
    m = scl.ReservoirMemory(20)
    m.build(torch.empty(0, 1, 1, 1, dtype=torch.long), None, 0)
    m.add(torch.arange(20).view(-1, 1, 1, 1), torch.arange(20), 0)
    torch.manual_seed(5)
    drawn = m.draw(6, times=2).labels
    torch.manual_seed(5)
    assert drawn.tolist() == torch.cat([torch.randperm(20)[:6], torch.randperm(20)[:6]]).tolist()
    assert m.draw(30, times=2).labels.tolist() == [*range(20), *range(20)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scl.ClassBalancedReservoir(), r"^ClassBalancedReservoir: give size, per_class or both$"),
        (
            lambda: scl.DERpp(per_class=0),
            r"^ClassBalancedReservoir\(per_class=0\): at least one exemplar per class$",
        ),
        (lambda: scl.DER(memory=0, balanced=True), r"^ClassBalancedReservoir\(size=0\)"),
        (lambda: fitted(scl.ER(5, balanced=True)), r"^ER\(memory=5\): at least one exemplar per class, .* are 6;"),
    ],
)
def test_errors_say_what_is_allowed(make, message):
    with pytest.raises(ValueError, match=message):
        make()
