"""Samples of any kind, tensors or nests of them, through every method; and what is done to nests."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import Dataset, TensorDataset
from toy_trainer import trainer

import lightning_sparse_cl as scl
from lightning_sparse_cl import nests

COUNT = 96
LABELS = torch.arange(COUNT) % 4


def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def tokens() -> Tensor:
    """Each class has ten words of its own."""
    return torch.randint(10, (COUNT, 6), generator=random()) + 10 * LABELS[:, None]


def table() -> Tensor:
    return torch.randn(COUNT, 5, generator=random()) + 3 * torch.eye(5)[LABELS]


def series() -> dict[str, Tensor]:
    level = torch.tensor([[2.0, 2.0], [2.0, -2.0], [-2.0, 2.0], [-2.0, -2.0]])[LABELS]
    steps = [torch.randn(2, 3 + i % 5, generator=random()) + level[i, :, None] for i in range(COUNT)]
    return scl.padded(steps)


KINDS: dict[str, Callable[[], Any]] = {
    "tokens": tokens,
    "table": table,
    "bytes": lambda: (40 * table().abs()).clamp(max=255).byte(),
    "series": lambda: table()[:, None].expand(-1, 2, -1).contiguous(),
    "padded series": series,
    "dict": lambda: {"ids": tokens(), "mask": torch.ones(COUNT, 6, dtype=torch.bool), "numbers": {"row": table()}},
    "tuple": lambda: (table(), tokens()),
}


class AnyBackbone(nn.Module):
    """Features of whatever is in a sample."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embedding, self.width = nn.Embedding(40, width), width
        self.first, self.second = nn.LazyLinear(width), nn.Linear(width, width)

    def forward(self, x: Any) -> Tensor:
        parts = []
        for tensor in nests.tensors(x):
            if tensor.dtype == torch.long and tensor.ndim == 2:
                parts.append(self.embedding(tensor).mean(1))
            elif tensor.is_floating_point():
                parts.append(tensor.flatten(1))
        return self.second(self.first(torch.cat(parts, 1)).relu()).relu()


def learner(objective: scl.Objective | None = None, update: scl.UpdateRule | None = None, **kwargs: Any) -> Any:
    return scl.ContinualModule(AnyBackbone(), objective, update, partial(SGD, lr=0.1), **kwargs)


REPLAY = {"memory": 24, "replay_batch_size": 6}
METHODS: dict[str, Callable[[], scl.ContinualModule]] = {
    "ER": lambda: learner(scl.ER(**REPLAY)),
    "balanced": lambda: learner(scl.ER(**REPLAY, balanced=True)),
    "DER++": lambda: learner(scl.DERpp(**REPLAY)),
    "FDR": lambda: learner(scl.FDR(**REPLAY)),
    "iCaRL": lambda: learner(scl.ICaRL(**REPLAY)),
    "Co2L": lambda: learner(scl.CO2L(**REPLAY, teacher_temperature=0.1)),
    "EWC": lambda: learner(scl.EWC()),
    "LwF": lambda: learner(scl.LwF()),
    "A-GEM": lambda: learner(policies=[scl.AGEM(**REPLAY)]),
    "GPM": lambda: learner(scl.CrossEntropy(True), policies=[scl.GPM()]),
    "La-MAML": lambda: learner(scl.ER(**REPLAY), scl.LaMAML(parts=2)),
    "EsaCL": lambda: scl.EsaCL(AnyBackbone(), scl.DERpp(**REPLAY), selection=scl.LossSelection(warmup=1, replay=0.5)),
    "SparCL": lambda: scl.SparCL(
        AnyBackbone(), scl.DERpp(**REPLAY), scl.TaskAwareDynamicMasking(0.5, 1), scl.DynamicDataRemoval(0.3, 1, 1),
        scl.DynamicGradientMasking(0.3, 2), optimizer=partial(SGD, lr=0.1),
    ),
    "SNIP": lambda: learner(scl.ER(**REPLAY), policies=[scl.SNIP(0.5)]),
    "RigL": lambda: learner(scl.ER(**REPLAY), policies=[scl.RigL(0.5, interval=3)]),
    "Continual DST": lambda: scl.ContinualDST(
        AnyBackbone(), growth=scl.SET(0.5, interval=3, dense=["head.weight"]), optimizer=partial(SGD, lr=0.1)
    ),
}  # fmt: skip


class Pairs(Dataset):
    """A data set of one's own: a sample and its label, item by item."""

    def __init__(self, inputs: Any, labels: Tensor) -> None:
        self.inputs, self.targets = inputs, labels

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return nests.rows(self.inputs, index), int(self.targets[index])


def of_items(inputs: Any, in_memory: bool = True) -> scl.TaskDatasets:
    parts = [Pairs(nests.rows(inputs, here), LABELS[here]) for here in (LABELS < 2, LABELS > 1)]
    return scl.TaskDatasets(parts, parts, batch_size=8, in_memory=in_memory)


def fit(method: str, data: scl.TaskDataModule, epochs: int = 3) -> tuple[scl.ContinualModule, scl.ContinualEvaluation]:
    pl.seed_everything(0, verbose=False)
    module, evaluation = METHODS[method](), scl.ContinualEvaluation()
    trainer(evaluation, scl.FlopsCounter(), scl.MemoryFootprint(), epochs=epochs).fit(module, data)
    return module, evaluation


PAIRS = [(kind, method) for kind in KINDS for method in ("DER++", "EsaCL")] + [("dict", method) for method in METHODS]


@pytest.mark.parametrize(("kind", "method"), dict.fromkeys(PAIRS))
def test_every_method_learns_every_kind_of_sample(kind: str, method: str) -> None:
    """In its own task each is far above chance."""
    inputs = nests.as_nest(KINDS[kind](), kind)
    data = scl.SplitTensors((inputs, LABELS), (inputs, LABELS), 2, batch_size=8)
    module, evaluation = fit(method, data, 8)
    own = evaluation.matrices["task_il"].R.diag()
    assert own.min() > 0.6, own
    memory = next((m for m in module.modules() if isinstance(m, scl.ReservoirMemory | scl.BalancedMemory)), None)
    if memory is not None:  # it holds samples as they are stored
        held = memory.contents()
        assert nests.described(held.inputs) == nests.described(inputs)
        of_class = nests.rows(inputs, held.labels[0] == LABELS)
        same = [
            t.reshape(len(t), -1).eq(h[0].flatten()).all(1)
            for t, h in zip(nests.tensors(of_class), nests.tensors(held.inputs))
        ]
        assert torch.stack(same).all(0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_in_memory_or_item_by_item_is_the_same(kind: str) -> None:
    inputs = KINDS[kind]()
    split = scl.SplitTensors((inputs, LABELS), (inputs, LABELS), 2, batch_size=8)
    results = [fit("DER++", data)[0].state_dict() for data in (split, of_items(inputs), of_items(inputs, False))]
    for other in results[1:]:
        assert all(
            torch.equal(a, b) for a, b in zip(results[0].values(), other.values(), strict=True) if torch.is_tensor(a)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_answers_as_its_module(kind: str, tmp_path: Any) -> None:
    inputs = KINDS[kind]()
    data = scl.SplitTensors((inputs, LABELS), (inputs, LABELS), 2, batch_size=8)
    pl.seed_everything(0, verbose=False)
    module = scl.ContinualModule(AnyBackbone(), scl.DERpp(**REPLAY))
    fitting = trainer(epochs=2)
    fitting.fit(module, data)
    fitting.save_checkpoint(tmp_path / "a.ckpt")
    loaded = scl.ContinualModule.load_from_checkpoint(
        tmp_path / "a.ckpt", backbone=AnyBackbone(), objective=scl.DERpp(**REPLAY)
    )
    x = data.prepare(data.test_sets[0].inputs, augment=False)
    assert torch.equal(loaded.eval()(x), module.eval()(x))
    found = loaded.predict_samples(data.test_sets[0].inputs)
    assert loaded.predict_samples(nests.rows(inputs, slice(0))) == []
    assert [p.name for p in found] == [data.class_names[c] for c in module(x).argmax(1)]
    assert {p.task for p in found} <= {0, 1}


def test_series_and_tables_are_standardised_and_nothing_else_is() -> None:
    def prepared(kind: str) -> Any:
        data = scl.SplitTensors(*[(KINDS[kind](), LABELS)] * 2, num_tasks=1, batch_size=8)
        data.setup()
        return data.prepare(data.train_sets[0].inputs), data.train_sets[0].inputs

    for kind in ("table", "bytes", "series"):
        x = prepared(kind)[0].transpose(0, 1).flatten(1)
        torch.testing.assert_close(x.mean(1), torch.zeros(len(x)), atol=1e-5, rtol=0)
        torch.testing.assert_close(x.std(1), torch.ones(len(x)))
    x, _ = prepared("padded series")
    steps = nests.within(x["length"], x["series"]).expand_as(x["series"])
    valid = x["series"].transpose(0, 1)[:, steps[:, 0]]
    torch.testing.assert_close(valid.mean(1), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(valid.std(1), torch.ones(2))
    assert not x["series"][~steps].any()
    for kind in ("tokens", "dict", "tuple"):
        x, stored = prepared(kind)
        assert all(map(torch.equal, nests.tensors(x), nests.tensors(stored)))


def test_any_callable_transforms_and_augments_batches_on_the_device() -> None:
    from torchvision.transforms import v2

    images = torch.randint(256, (COUNT, 3, 8, 8), dtype=torch.uint8, generator=random())
    transform = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])
    data = scl.SplitTensors(
        (images, LABELS), (images, LABELS), 2, batch_size=8, transform=transform, augment=v2.RandomHorizontalFlip(1.0)
    )
    data.setup()
    torch.testing.assert_close(data.prepare(images, augment=False), images / 127.5 - 1)
    torch.testing.assert_close(data.prepare(images), images.flip(3) / 127.5 - 1)
    trainer(epochs=1).fit(scl.ContinualModule(scl.SmallCNN(4), scl.CO2L(**REPLAY)), data)


def test_callables_that_write_into_their_batch_leave_the_memory_as_stored() -> None:
    stored = series()

    def spoil(x: dict[str, Tensor]) -> dict[str, Tensor]:
        x["series"].fill_(7.0)
        x["length"] = x["length"] * 0 + 1
        return x

    for way in ("augment", "transform"):
        objective = scl.FDR(**REPLAY)
        data = scl.SplitTensors((stored, LABELS), (stored, LABELS), 2, batch_size=8, **{way: spoil})
        module = scl.ContinualModule(AnyBackbone(), objective)
        trainer(epochs=1).fit(module, data)
        held = objective.memory.contents().inputs
        assert held["series"].abs().max() < 7 and held["length"].max() > 1
    module.predict_samples(stored, transform=spoil)
    assert stored["series"].abs().max() < 7


def test_small_units_large_ones_and_constants_are_standardised() -> None:
    noise = torch.randn(COUNT, 1, generator=random())
    columns = [1e-5 * noise, 1e6 + 100 * noise, torch.full((COUNT, 1), 123456789.0), torch.zeros(COUNT, 1)]
    data = scl.SplitTensors(*[(torch.cat(columns, 1), LABELS)] * 2, num_tasks=1, batch_size=8)
    data.setup()
    x = data.prepare(data.train_sets[0].inputs)
    torch.testing.assert_close(x[:, :2].std(0), torch.ones(2), atol=0.02, rtol=0)
    assert x[:, 2:].abs().max() < 1e-3 and x.isfinite().all()


def test_points_in_time_are_standardised() -> None:
    seconds = 1.7e9 + 10 * torch.randn(COUNT, 2, generator=random(), dtype=torch.float64)
    data = scl.SplitTensors(*[(seconds, LABELS)] * 2, num_tasks=1, batch_size=8)
    data.setup()
    stored = data.train_sets[0].inputs
    x = data.prepare(stored)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, ((stored - stored.mean(0)) / stored.std(0)).float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("way", [{"joint": True}, {"stream": True}, {}])
@pytest.mark.parametrize("in_memory", [True, False])
def test_the_first_task_alone_normalises_all(way: dict[str, bool], in_memory: bool) -> None:
    sets = [TensorDataset(torch.randn(40, 4, generator=random()) + 1000 * t, LABELS[:40]) for t in range(2)]
    data = scl.TaskDatasets(sets, sets, in_memory=in_memory, batch_size=8, **way)
    data.setup()
    assert max(map(abs, data.transform.mean)) < 1


def test_the_order_of_keys_does_not_matter() -> None:
    class Turned(Pairs):
        def __getitem__(self, index: int) -> tuple[Any, int]:
            sample, label = super().__getitem__(index)
            return (dict(reversed(sample.items())) if index % 2 else sample), label

    one, other = Pairs(MIXED, LABELS), Turned(MIXED, LABELS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = scl.TaskDatasets([other, one], [one, other])
        data.setup()
    assert {tuple(d.inputs) for d in (*data.train_sets, *data.test_sets)} == {("a", "b")}
    assert tuple(scl.SampleTensors(dict(reversed(MIXED.items())), LABELS).inputs) == ("a", "b")


MIXED = {"a": torch.zeros(COUNT, 2), "b": torch.zeros(COUNT, 3)}
REFUSED: list[tuple[Callable[[], scl.TaskDataModule], str]] = [
    (
        lambda: scl.SplitTensors((MIXED, LABELS), (MIXED | {"b": torch.zeros(COUNT, 4)}, LABELS), 2),
        r"TensorSource: test samples are b: float32 \(4,\), train samples b: float32 \(3,\); all must be equal",
    ),
    (
        lambda: scl.SplitTensors((MIXED, LABELS), ({"a": MIXED["a"]}, LABELS), 2),
        r"test samples are a: float32 \(2,\), train samples a: float32 \(2,\), b: float32 \(3,\)",
    ),
    (
        lambda: scl.SplitTensors(*[(MIXED | {"b": torch.zeros(5, 3)}, LABELS)] * 2, num_tasks=2),
        r"'b' of the samples are \(N, ...\) and labels \(N,\), N > 0, got \(5, 3\) and \(96,\)",
    ),
    (
        lambda: scl.SplitTensors(*[(MIXED | {"b": ["x"] * COUNT}, LABELS)] * 2, num_tasks=2),
        r"samples\['b'\]: a tensor, an array of numbers or a number is expected, got a list",
    ),
    (lambda: scl.SplitTensors(*[({}, LABELS)] * 2, num_tasks=2), "samples: there is no tensor in it"),
    (
        lambda: scl.SplitTensors(*[({1: MIXED["a"], "1": MIXED["b"]}, LABELS)] * 2, num_tasks=2),
        "samples: keys are texts without dots, got 1",
    ),
    (
        lambda: scl.SplitTensors(*[({"a.b": MIXED["a"]}, LABELS)] * 2, num_tasks=2),
        "samples: keys are texts without dots, got 'a.b'",
    ),
    (
        lambda: scl.SplitTensors(*[(series() | {"length": 1 + LABELS * 4}, LABELS)] * 2, num_tasks=2),
        "task 1, training samples: the length 9 of a series of 7 steps; lengths are 1 to 7",
    ),
    (lambda: scl.SplitTensors(*[(table(), LABELS)] * 2, num_tasks=2, augment="flip"), r"augment='flip'\): true, false"),
    (lambda: scl.SplitTensors(*[(table(), LABELS)] * 2, num_tasks=2, transform="x"), r"transform='x'\): a callable"),
    (
        lambda: scl.SplitTensors(*[(table(), LABELS)] * 2, num_tasks=2, transform=lambda x: None, batch_size=8),
        r"SplitTensors\(transform=...\): it makes tensors of a stored batch, or nests of them, but gave NoneType",
    ),
    (
        lambda: scl.SplitTensors(*[(tokens(), LABELS)] * 2, num_tasks=2, batch_size=8),
        r"SmallMLP: it cannot take samples of int64 \(6,\): RuntimeError: mat1 and mat2 must have the same dtype",
    ),
    (
        lambda: scl.SplitTensors(*[(np.zeros((COUNT, 2), np.longdouble), LABELS)] * 2, num_tasks=2),
        "got a array of float128|got an array of float128|array of",
    ),
    (
        lambda: of_items(MIXED | {"b": torch.full((COUNT, 3), torch.nan)}),
        r"TaskDatasets\(train\[0\]\): the sample of item 0 has values that are NaN or infinite",
    ),
    (
        lambda: scl.SplitTensors(*[(MIXED | {"b": torch.full((COUNT, 3), torch.nan)}, LABELS)] * 2, num_tasks=2),
        "task 0, training sample 0, 'b', has values that are NaN or infinite",
    ),
]


@pytest.mark.parametrize("make, message", REFUSED, ids=[message for _, message in REFUSED])
def test_nests_that_differ_are_refused_by_key(make: Callable[[], scl.TaskDataModule], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        trainer(epochs=1).fit(scl.ContinualModule(scl.SmallMLP([8])), make())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", [(torch.zeros(2, 3),), {"x": torch.zeros(2, 3)}, [torch.zeros(2, 3)]])
def test_features_that_are_no_tensor_are_refused(given: Any) -> None:
    class Several(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return given

    with pytest.raises(ValueError, match=rf"Several: a backbone gives features .* got a {type(given).__name__}$"):
        scl.ContinualModule(Several()).build((3,), 2)


def test_items_whose_keys_differ_are_refused_where_they_are_read() -> None:
    class Odd(Pairs):
        def __getitem__(self, index: int) -> tuple[Any, int]:
            sample, label = super().__getitem__(index)
            return ({"a": sample["a"]} if index == 7 else sample), label

    odd = Odd(MIXED, LABELS)
    with pytest.raises(ValueError, match=r"tensors of item 7 are a: float32 \(2,\), those of item 0 a: .*, b: float32"):
        scl.TaskDatasets([odd], [odd]).setup()


def test_items_of_other_sizes_are_made_alike_where_they_are_read() -> None:
    lengths = torch.randint(3, 8, (COUNT,), generator=random())
    data = Pairs([torch.ones(2, n) for n in lengths.tolist()], LABELS)
    data.__class__ = type("Listed", (Pairs,), {"__getitem__": lambda d, i: (d.inputs[i], int(d.targets[i]))})

    def pad(x: Tensor) -> dict[str, Tensor]:
        return nests.rows(scl.padded([x], 7), 0)

    with pytest.raises(ValueError, match="all must be equal"):
        scl.TaskDatasets([data], [data]).setup()
    for in_memory in (True, False):
        split = scl.TaskDatasets([data], [data], batch_size=8, in_memory=in_memory, item_transform=pad)
        split.setup()
        loader = split.test_dataloader()[0]
        found = nests.joined([x for x, _ in loader])
        assert found["length"].tolist() == lengths.tolist()
        assert found["series"].sum((1, 2)).tolist() == (2 * lengths).tolist()


def test_series_of_other_channels_or_too_long_are_refused() -> None:
    for given, message in (
        ([torch.zeros(2, 3), torch.zeros(3, 3)], r"series 1 is \(3, 3\)"),
        ([torch.zeros(2, 3), torch.zeros(2, 0)], r"series 1 is \(2, 0\)"),
    ):
        with pytest.raises(ValueError, match=message):
            scl.padded(given)
    with pytest.raises(ValueError, match=r"padded\(length=2\): series 0 has 3 steps"):
        scl.padded([torch.zeros(2, 3)], 2)


def test_the_vowels_are_those_of_their_archive() -> None:
    aeon = pytest.importorskip("aeon.datasets")
    names = {"train": True, "test": False}
    for part, train in names.items():
        series, speakers = aeon.load_classification("JapaneseVowels", split=part)
        inputs, labels = scl.JapaneseVowelsSource().read(train)
        assert labels.tolist() == [int(s) - 1 for s in speakers]
        for found, length, theirs in zip(inputs["series"], inputs["length"], series, strict=True):
            torch.testing.assert_close(found[:, :length], torch.as_tensor(theirs, dtype=torch.float32))
            assert not found[:, length:].any()


@pytest.mark.parametrize("backbone", [scl.SeriesCNN(4), scl.SeriesGRU(4)], ids=["CNN", "GRU"])
def test_features_of_a_padded_series_are_those_of_the_series(backbone: nn.Module) -> None:
    one, longer = torch.randn(2, 3, 9), torch.zeros(2, 3, 12)
    longer[..., :9], longer[..., 9:] = one, 100.0
    backbone(one)
    backbone.eval()
    padded = {"series": longer, "length": torch.tensor([9, 9])}
    torch.testing.assert_close(backbone(padded), backbone(one))
