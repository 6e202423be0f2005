"""Texts and numbers from CSV files and folders: what is read, learnt, predicted and refused."""

import csv
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.optim import Adam
from toy_trainer import trainer

import lightning_sparse_cl as scl

WORDS = {
    "food": "bread soup cheese wine sauce", "music": "song drum guitar note choir",
    "space": "star orbit rocket moon comet", "sport": "ball goal team match player",
}  # fmt: skip


def sentences(count: int = 200) -> list[tuple[str, str]]:
    """Class and text, a class after the other; each text has words of its class, and others."""
    draw, names = random.Random(0), list(WORDS)
    found = []
    for i in range(count):
        own = WORDS[names[i % 4]].split()
        found.append((names[i % 4], " ".join(draw.choices([*own, *["the", "a", "of", "and"]], k=9) + own[:1])))
    return found


@pytest.fixture
def topics(tmp_path: Path) -> str:
    with open(path := tmp_path / "topics.csv", "w", newline="") as file:
        csv.writer(file).writerows([("topic", "text"), *sentences()])
    return str(path)


@pytest.fixture
def numbers(tmp_path: Path) -> str:
    generator = torch.Generator().manual_seed(0)
    with open(path := tmp_path / "numbers.csv", "w", newline="") as file:
        rows = [(f"kind {i % 4}", *(torch.randn(3, generator=generator) + 5 * (i % 4)).tolist()) for i in range(80)]
        csv.writer(file).writerows([("label", "a", "b", "c"), *rows])
    return str(path)


def split(path: str, **kwargs: Any) -> scl.SplitCSV:
    options = {"label": "topic", "text": "text", "length": 12, "batch_size": 8, "tokenizer": scl.HashTokenizer(512)}
    return scl.SplitCSV(path, 2, **(options | kwargs))


def backbone(**kwargs: Any) -> scl.TextTransformer:
    return scl.TextTransformer(**({"vocabulary": 512, "width": 32, "layers": 1, "heads": 2} | kwargs))


METHODS: dict[str, Callable[[], scl.ContinualModule]] = {
    "ER": lambda: scl.ContinualModule(backbone(), scl.ER(40, 8), optimizer=partial(Adam, lr=0.003)),
    "EsaCL": lambda: scl.EsaCL(backbone(), scl.ER(40, 8)),
    "RigL": lambda: scl.ContinualModule(
        backbone(), scl.ER(40, 8), optimizer=partial(Adam, lr=0.003), policies=[scl.RigL(0.8, interval=5)]
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_topics_are_learnt_in_two_tasks_and_named(topics: str, method: str) -> None:
    pl.seed_everything(0, verbose=False)
    data, module, evaluation = split(topics), METHODS[method](), scl.ContinualEvaluation()
    trainer(evaluation, scl.FlopsCounter(), epochs=8).fit(module, data)
    assert data.class_names == sorted(WORDS) and len(data.test_sets[0]) == 20
    assert evaluation.matrices["task_il"].R[-1].min() > 0.8
    latest = [(label, text) for label, text in sentences() if label in ("space", "sport")]
    found = module.predict_samples(data.source.encode(text for _, text in latest))
    right = sum(p.name == label and p.task == 1 for p, (label, _) in zip(found, latest, strict=True))
    assert right > 0.8 * len(latest)
    masked = [name for name, alive in scl.Masks.of(module).alive.items() if not alive.all()]
    attention_and_mlp = ("in_proj_weight", "out_proj.weight", "linear1.weight", "linear2.weight")
    assert method == "ER" or (all(name.endswith(attention_and_mlp) for name in masked) and len(masked) == 4)


def test_what_is_read_from_text(topics: str, tmp_path: Path) -> None:
    source = split(topics).source
    x, labels = source.read(train=True)
    assert x["ids"].shape == x["mask"].shape == (160, 12) and labels.bincount().tolist() == [40] * 4
    assert source.read(train=False)[1].bincount().tolist() == [10] * 4
    assert torch.equal(x["mask"], x["ids"] > 0) and x["mask"].sum(1).eq(10).all()
    assert source.encode(["Soup, SOUP"])["ids"][0, [0, 2]].unique().numel() == 1
    cut = split(topics, length=4).source.encode(["one two three four five six"])
    assert cut["ids"].shape == (1, 4) and cut["mask"].all()
    for name, (label, text) in enumerate(sentences(40)):
        folder = tmp_path / ("train" if name < 32 else "test") / label / "more"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name:03}.txt").write_text(text)
    files = scl.SplitTextFolder(str(tmp_path), 2, length=12, tokenizer=scl.HashTokenizer(512), batch_size=4)
    files.setup()
    assert files.class_names == sorted(WORDS) and [len(d) for d in files.train_sets] == [16, 16]
    texts = [text for label, text in sentences(32) if label == "food"]
    assert torch.equal(files.train_sets[0].inputs["ids"][:8], source.encode(texts)["ids"])


def test_a_tokenizer_of_transformers_is_taken() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "star": 1, "ball": 2}, unk_token="[UNK]"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=own, unk_token="[UNK]")
    assert scl.CSVSource("x.csv", tokenizer=fast, length=3).encode(["star ball"])["ids"].tolist() == [[1, 2, 0]]


def test_columns_of_numbers(numbers: str, tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    data, evaluation = scl.SplitCSV(numbers, 2, batch_size=8), scl.ContinualEvaluation()
    trainer(evaluation, epochs=30).fit(scl.ContinualModule(scl.SmallMLP([16]), scl.ER(20, 8)), data)
    assert data.input_shape == (3,) and data.class_names == [f"kind {i}" for i in range(4)]
    assert evaluation.matrices["task_il"].R[-1].min() > 0.7
    one = scl.SplitCSV(numbers, 2, columns=["c", "a"])
    one.setup()
    assert torch.equal(one.train_sets[0].inputs, data.train_sets[0].inputs[:, [2, 0]])
    beside = tmp_path / "test.csv"
    beside.write_text("b,label,c,a\n1,kind 0,2,3\n4,kind 3,5,6\n7,kind 1,8,9\n")
    other = scl.SplitCSV(numbers, 2, test=str(beside))
    other.setup()
    assert [len(d) for d in other.train_sets] == [40, 40] and other.test_sets[1].inputs.tolist() == [[6.0, 4.0, 5.0]]


def changed(path: str, old: str, new: str) -> str:
    file = Path(path)
    file.write_text(file.read_text().replace(old, new, 1))
    return path


def empty(path: str, contents: bytes = b"") -> str:
    Path(path).write_bytes(contents)
    return path


def texts(near: str, **files: bytes) -> scl.SplitTextFolder:
    """A folder of texts of two classes, and what is given."""
    root = Path(near).parent / "texts"
    plain = {f"{part}/{c}/0.txt": c.encode() * 3 for part in ("train", "test") for c in "ab"}
    for name, contents in (plain | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(contents)
    return scl.SplitTextFolder(str(root), 2, batch_size=1)


def test_hidden_files_and_byte_order_marks_are_no_texts(topics: str) -> None:
    hidden = {
        "train/a/._1.txt": b"\x00",
        "train/.cache/1.txt": b"x",
        "test/.cache/1.txt": b"x",
        "train/a/.b/1.txt": b"x",
    }
    data = texts(topics, **hidden, **{"train/a/1.txt": b"\xef\xbb\xbfaaa"})
    data.setup()
    assert data.class_names == ["a", "b"] and [len(d) for d in data.train_sets] == [2, 1]
    ids = data.train_sets[0].inputs["ids"]
    assert torch.equal(ids[0], ids[1])


def test_numbers_that_float32_cannot_tell_apart_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "times.csv"
    file.write_text("label,time\n" + "".join(f"{i % 2},{1_700_000_000 + i}\n" for i in range(40)))
    data = scl.SplitCSV(str(file), 1, batch_size=8)
    data.setup()
    assert data.prepare(data.train_sets[0].inputs).unique().numel() == 32


REFUSED: list[tuple[Callable[[str, str], Any], str]] = [
    (lambda t, n: scl.SplitCSV(t + "x", 2), "CSVSource: there is no file "),
    (lambda t, n: scl.SplitCSV(t, 2), r"CSVSource\(label='label'\): .* has no such column; it has topic, text"),
    (lambda t, n: split(t, text="body"), r"CSVSource\(text='body'\): .* it has topic, text"),
    (lambda t, n: scl.SplitCSV(n, 2, columns=["a", "d"]), r"CSVSource\(columns='d'\): .* it has label, a, b, c"),
    (lambda t, n: split(t, columns=["a"]), r"CSVSource\(text='text', columns=\['a'\]\): give one of them"),
    (lambda t, n: split(t, text=None), "line 2, column text: a number is expected, got "),
    (lambda t, n: scl.SplitCSV(changed(n, "kind 1,", "kind 1,nan,"), 2), "line 3, has more fields than the header"),
    (lambda t, n: scl.SplitCSV(changed(n, "kind 1,", ","), 2), "line 3, has no label"),
    (lambda t, n: split(t, length=0), r"CSVSource\(length=0\): how many tokens are kept of each text, at least 1"),
    (lambda t, n: split(t, tokenizer=str.split), "tokenizer: a list of integers from 0 on is expected"),
    (lambda t, n: split(t, tokenizer=lambda text: []), "text 0, '.*', has no tokens"),
    (lambda t, n: split(t, text="topic"), r"CSVSource\(label='topic'\): the label is no part of a sample"),
    (lambda t, n: scl.SplitCSV(n, 2, columns=[]), r"CSVSource\(columns=\[\]\): at least one column"),
    (lambda t, n: scl.SplitCSV(changed(n, "a,b", "a,a"), 2), "has the column 'a' twice"),
    (lambda t, n: scl.SplitCSV(n, 2, test=empty(t, b"label,a,c\nkind 0,1,2\n")), "it has no column 'b', which"),
    (lambda t, n: scl.SplitCSV(empty(n), 2), r"CSVSource\(label='label'\): .* has no such column; it has $"),
    (lambda t, n: scl.SplitCSV(empty(n, b"label,a\n\xff\xfe,1"), 2), "is not UTF-8 text"),
    (lambda t, n: split(t).source.encode("one text"), "texts: a list of texts is expected, got one text, 'one text'"),
    (lambda t, n: scl.padded([]), "padded: a list of series is expected, got an empty one"),
    (lambda t, n: scl.HashTokenizer(1), r"HashTokenizer\(vocabulary=1\)"),
    (lambda t, n: scl.SplitTextFolder(t, 2), "there is no folder '.*topics.csv/train'/<class>"),
    (lambda t, n: scl.SplitCSV(n, 2, columns="ab"), r"CSVSource\(columns='ab'\): a list of names of columns"),
    (lambda t, n: scl.SplitCSV(empty(n, b"label,a\n" + b"0,1\n1,2\n" * 4), 2), "has no rows to test on: every 5th row"),
    (lambda t, n: scl.SplitCSV(empty(n, b"label,a\n0," + b"1" * 200_000), 2), "line .*, cannot be read: field larger"),
    (lambda t, n: texts(t, **{"train/a/1.txt": b"\xff\xfe"}), "1.txt' is not UTF-8 text"),
    (lambda t, n: texts(t, **{"train/a/1.txt": b"  \n"}), "1.txt' has no text"),
    (lambda t, n: backbone(heads=3), r"TextTransformer\(width=32, heads=3\): heads divide the width"),
    (lambda t, n: backbone(layers=0), r"TextTransformer\(layers=0\): layers is at least 1"),
]


@pytest.mark.parametrize("make, message", REFUSED, ids=[message for _, message in REFUSED])
def test_what_is_refused(make: Callable[[str, str], Any], message: str, topics: str, numbers: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        made = make(topics, numbers)
        made.setup()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vocabulary": 100}, r"vocabulary=100\): there is the token id"),
        ({"length": 8}, r"length=8\): texts have 12 tokens"),
    ],
)
def test_texts_that_a_backbone_cannot_take(topics: str, change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(epochs=1).fit(scl.ContinualModule(backbone(**change)), split(topics))


@pytest.mark.parametrize("parameter", ["vocabulary", "width", "layers", "heads"])
def test_every_size_of_the_backbone_is_its_own(parameter: str) -> None:
    def shapes(net: nn.Module) -> list[torch.Size]:
        return [p.shape for p in net.parameters()]

    one, other = (
        backbone(),
        backbone(**{parameter: {"vocabulary": 600, "width": 64, "layers": 2, "heads": 4}[parameter]}),
    )
    ids = {"ids": torch.tensor([[5, 6, 7, 0]]), "mask": torch.tensor([[True, True, True, False]])}
    assert shapes(one) != shapes(other) or one.encoder.layers[0].self_attn.num_heads == 2
    assert one(ids).shape == (1, 32) and other(ids).shape == (1, 64 if parameter == "width" else 32)
    one.eval()
    behind = {"ids": torch.tensor([[5, 6, 7, 9]]), "mask": ids["mask"]}
    torch.testing.assert_close(one(ids), one(behind))  # what is masked does not matter
    torch.testing.assert_close(one(ids), one(torch.tensor([[5, 6, 7]])))
